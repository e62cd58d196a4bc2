"""What one training step of each method costs on this machine, relative to `advtrain`.

The images are random. `plain` is left out, because it makes no attack. In every round each method
takes its turn, so that a machine that slows down slows all of them. Peak memory is that of CUDA.
"""
import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import MODELS
from l2l_adv import METHODS, LearnedOptimizer, train_step_learned, train_step_pgd

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", choices=MODELS, default="vgg16")
parser.add_argument("--methods", default="advtrain,trades,rnn-adv,rnn-trades")
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--steps", type=int, default=10, help="T, steps of the attack")
parser.add_argument("--cell", choices=("lstm", "rnn"), default="lstm")
parser.add_argument("--rounds", type=int, default=5, help="after one round to warm up")
parser.add_argument("--size", type=int, default=32, help="height and width of the images")
parser.add_argument("--channels", type=int, default=3)
parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="in place of the table")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.rand(args.batch_size, args.channels, args.size, args.size, device=device)
y = torch.randint(0, 10, (args.batch_size,), device=device)
steps = {}  # for each method, a function that makes one training step
for method in args.methods.split(","):
    objective, maximizer = METHODS[method]
    model = MODELS[args.model](in_channels=args.channels).to(device)
    opt_theta = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)  # weights hardly move
    common = {"opt_theta": opt_theta, "eps": 8 / 255, "steps": args.steps, "objective": objective()}
    if maximizer == "pgd":
        steps[method] = partial(train_step_pgd, model, x, y, step_size=2 / 255, **common)
    elif maximizer == "learned":
        phi = LearnedOptimizer(cell=args.cell).to(device)
        opt_phi = torch.optim.Adam(phi.parameters(), lr=1e-9)
        steps[method] = partial(train_step_learned, model, phi, x, y, opt_phi=opt_phi, **common)

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
ms = {method: 1000 * statistics.median(each[1:]) / len(x) for method, each in times.items()}
heading = (f"{args.model}, batch {len(x)}, T = {args.steps}, {args.cell}, {device} "
           f"({torch.backends.cpu.get_cpu_capability()}), threads {torch.get_num_threads()}, torch "
           f"{torch.__version__}, median of {args.rounds} rounds")
if args.json:
    result = {"heading": heading, "ms_per_image": ms, "peak_bytes": peak}
    print(json.dumps(result), file=sys.stdout if args.json == "-" else open(args.json, "w"))
else:
    print(f"{heading}\n{'':12}{'ms/image':>10}{'/ advtrain':>12}{'peak MB':>10}")
    for name in ms:
        ratio = ms[name] / ms.get("advtrain", float("nan"))
        print(f"{name:12}{ms[name]:10.3f}{ratio:12.2f}{peak[name] / 2 ** 20:10.0f}")
