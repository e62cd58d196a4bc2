"""What one training step of each method costs on this machine.

    python3 results/bench.py --model vgg16 [--json]

Every method takes its turn in several rounds, so that a machine that slows down slows all of them.
"""
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import DATASETS, MODELS, Dataset, load_dataset, progress, to_unit
from l2l_adv import COUNT, METHODS, Parser, Settings, Training, as_program


def bench(args):
    torch.manual_seed(0)
    n = 2 * args.batch_size  # a fifth of them is held out
    if args.dataset:
        data = Dataset(*(part[:n] for part in load_dataset(args.dataset)))
    else:
        x, y = torch.randint(0, 256, (n, 3, 32, 32)).byte(), torch.randint(0, 10, (n,))
        data = Dataset(x, y, x, y)
    runs = {}
    for method in args.methods.split(","):
        settings = Settings(out="none is made", method=method, dataset=args.dataset or "cifar10", model=args.model,
                            steps=args.steps, cell=args.cell, lr=1e-9, batch_size=args.batch_size,
                            precision=args.precision, compile=args.compile)
        runs[method] = Training(settings, data=data)
    device = next(iter(runs.values())).device
    x, y = to_unit(data.x_train[:args.batch_size]).to(device), data.y_train[:args.batch_size].to(device)
    jobs = {method: lambda run=run: run.step(x, y) for method, run in runs.items()}
    seconds, peaks = measure(jobs, args.rounds, device)
    costs = {method: {"ms_per_image": 1000 * seconds[method] / len(x), "peak_mb": peaks[method]} for method in jobs}
    for cost in costs.values():
        cost["ratio"] = cost["ms_per_image"] / costs["advtrain"]["ms_per_image"] if "advtrain" in costs else None
    if args.json:
        print(json.dumps({"model": args.model, "dataset": args.dataset, "batch_size": len(x), "T": args.steps,
                          "cell": args.cell, "device": str(device), "threads": torch.get_num_threads(),
                          "torch": torch.__version__, "methods": costs}))
        return
    print(f"{args.model}, batch {len(x)}, {args.dataset or 'random images'}, T = {args.steps}, {args.cell}, {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {args.rounds} rounds")
    print(f"{'':14}{'ms/image':>10}{'/ advtrain':>12}{'peak MB':>9}")
    for method, cost in costs.items():
        ratio, peak = (f"{number:.5g}" if number else "-" for number in (cost["ratio"], cost["peak_mb"]))
        print(f"{method:14}{cost['ms_per_image']:10.3f}{ratio:>12}{peak:>9}")


def measure(jobs, rounds, device):
    """Median seconds of each job over the rounds and, on a card, the peak memory of its warm-up: MB above what was in
    use before, else None."""
    cuda = device.type == "cuda"
    sync = torch.cuda.synchronize if cuda else lambda: None
    seconds, peaks = {name: [] for name in jobs}, dict.fromkeys(jobs)
    for turn in progress(range(rounds + 1), "bench"):
        for name in sorted(jobs, key=lambda name: (list(jobs).index(name) + turn) % len(jobs)):  # another one begins
            if cuda and turn == 0:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            sync()
            start = time.perf_counter()
            jobs[name]()
            sync()
            seconds[name].append(time.perf_counter() - start)
            if cuda and turn == 0:
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}, peaks


def main(argv=None):
    parser = Parser(prog="bench.py", description=__doc__.splitlines()[0])
    parser.set_defaults(command=bench)
    parser.add_argument("--model", choices=MODELS, default="vgg16")
    parser.add_argument("--dataset", choices=DATASETS, help="whose images; default random ones of 32x32")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="NAME,NAME")
    parser.add_argument("--batch-size", type=COUNT, default=32, metavar="X")
    parser.add_argument("--steps", type=COUNT, default=10, help="T")
    parser.add_argument("--cell", choices=("lstm", "rnn"), default="lstm")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: as in training")
    parser.add_argument("--compile", choices=("no", "yes"), default="no")
    parser.add_argument("--rounds", type=COUNT, default=5, metavar="X")
    parser.add_argument("--json", action="store_true")
    return as_program(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
