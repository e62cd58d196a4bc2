"""What one training step of each method costs on this machine, relative to `advtrain`.

The images are random, 3×32×32, and T = 10. In every round each method takes its turn, so that a
machine that slows down slows all of them. Peak memory is that of CUDA.
"""
import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import MODELS, AdvTrain, Trades
from l2l_adv import LearnedOptimizer, train_step_learned, train_step_pgd

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", choices=MODELS, default="vgg16")
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--cell", choices=("lstm", "rnn"), default="lstm")
parser.add_argument("--rounds", type=int, default=5, help="after one round to warm up")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.rand(args.batch_size, 3, 32, 32, device=device)
y = torch.randint(0, 10, (args.batch_size,), device=device)
steps = {}  # for each method, a function that makes one training step
for method in ("advtrain", "trades", "rnn-adv", "rnn-trades"):
    model = MODELS[args.model](in_channels=3).to(device)
    common = {"opt_theta": torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9),
              "eps": 8 / 255, "objective": Trades() if "trades" in method else AdvTrain()}
    if "rnn" in method:
        phi = LearnedOptimizer(cell=args.cell).to(device)
        opt_phi = torch.optim.Adam(phi.parameters(), lr=1e-9)
        steps[method] = partial(train_step_learned, model, phi, x, y, opt_phi=opt_phi, **common)
    else:
        steps[method] = partial(train_step_pgd, model, x, y, step_size=2 / 255, **common)

times = {method: [] for method in steps}
peak = dict.fromkeys(steps, 0)  # bytes that a step needs besides weights, gradients and momentum
order = list(steps)
for _ in range(args.rounds + 1):
    order.append(order.pop(0))  # another method begins
    for method in order:
        start = time.perf_counter()
        steps[method]()
        if device == "cuda":
            torch.cuda.synchronize()
            peak[method] = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        times[method].append(time.perf_counter() - start)
name = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
print(f"{args.model}, batch {len(x)}, {args.cell}, {name}, {torch.get_num_threads()} threads, "
      f"torch {torch.__version__}, median of {args.rounds} rounds")
print(f"{'':12}{'ms/image':>10}{'/ advtrain':>12}{'peak MB':>10}")
medians = {method: statistics.median(each[1:]) for method, each in times.items()}
for method, seconds in medians.items():
    print(f"{method:12}{1000 * seconds / len(x):10.3f}{seconds / medians['advtrain']:12.2f}"
          f"{peak[method] / 2 ** 20:10.0f}")
