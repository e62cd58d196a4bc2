"""What one training step of each method costs on this machine, relative to AdvTrain.

    python3 results/bench.py --model vgg16

The methods take turns in several rounds, so that a machine that slows down slows all of them.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import MODELS, AdvTrain, Trades
from l2l_adv import LearnedOptimizer, train_step_learned, train_step_pgd


def make_step(method, args, x, y, device):
    """A function that takes one training step. The learning rates are too small to move weights."""
    torch.manual_seed(0)
    model = MODELS[args.model](in_channels=x.shape[1]).to(device)
    settings = {"opt_theta": torch.optim.SGD(model.parameters(), 1e-9, momentum=0.9),
                "objective": Trades() if "trades" in method else AdvTrain(),
                "eps": 8 / 255, "steps": args.steps}
    if not method.startswith("rnn"):
        return lambda: train_step_pgd(model, x, y, step_size=2 / 255, **settings)
    optimizer = LearnedOptimizer(cell=args.cell).to(device)
    settings["opt_phi"] = torch.optim.Adam(optimizer.parameters(), 1e-9)
    return lambda: train_step_learned(model, optimizer, x, y, **settings)


def seconds(step, device):
    """How long a step takes."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="vgg16")
    parser.add_argument("--methods", default="advtrain,rnn-adv,trades,rnn-trades")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="T")
    parser.add_argument("--cell", choices=("lstm", "rnn"), default="lstm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE as well")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.rand(args.batch_size, 3, 32, 32, device=device)
    y = torch.randint(0, 10, (args.batch_size,), device=device)
    methods = args.methods.split(",")
    steps = {method: make_step(method, args, x, y, device) for method in methods}
    times = {method: [] for method in methods}
    peak = {}
    for method in methods:  # a first step, not timed, which also shows the peak of the memory
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds(steps[method], device)
        peak[method] = torch.cuda.max_memory_allocated() / 2 ** 20 if device == "cuda" else None
    for turn in range(args.rounds):
        for i in range(len(methods)):
            method = methods[(i + turn) % len(methods)]
            times[method].append(seconds(steps[method], device))
    medians = {method: statistics.median(times[method]) for method in methods}
    print(f"{args.model}, batch {args.batch_size}, T = {args.steps}, {args.cell}, {device} "
          f"({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, median of {args.rounds} rounds")
    rows = {method: {"ms_per_image": 1000 * median / args.batch_size, "peak_mb": peak[method],
                     "over_first": median / medians[methods[0]]}
            for method, median in medians.items()}
    for method, row in rows.items():
        print(f"{method:12}{row['ms_per_image']:9.3f} ms per image{row['over_first']:7.2f} times "
              f"{methods[0]}" + (f"{row['peak_mb']:9.0f} MB" if row["peak_mb"] else ""))
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
