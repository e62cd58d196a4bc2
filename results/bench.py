"""What one training step costs: `python l2l_adv.py bench`. Every method and both attacks alone, interleaved over several
rounds after a warm-up, with device synchronisation; a table, or one object with --json."""
import ctypes
import json
import math
import statistics
import time
from pathlib import Path

import torch

from baselines import MODELS, eval_mode, pgd, progress, to_unit
from l2l_adv import (METHODS, Parser, Settings, as_program, learned_attack, make_players, pick_device, positive, train_step,
                     training_mode)


def bench(args):
    """What one training step of each method costs, and the attacks alone; a table or, with --json, one object."""
    device = pick_device(args.device)
    dataset, channels, side = ("mnist", 1, 28) if args.model == "small" else ("cifar10", 3, 32)
    x = torch.randint(0, 256, (args.batch_size, channels, side, side), device=device).byte()
    y, images = torch.randint(0, 10, (len(x),), device=device), to_unit(x)
    jobs = {}
    for method in METHODS:
        settings = Settings(out="none is made", method=method, dataset=dataset, model=args.model, steps=args.steps,
                            cell=args.cell, meta_images=args.meta_images, lr=1e-9, precision=args.precision,
                            compile=args.compile)
        players = make_players(settings, x, device)
        training_mode(players.model, settings)
        jobs[method] = lambda players=players, settings=settings: train_step(players, settings, images, y)
    model, optimizer, eps = players.model, players.optimizer, settings.eps  # the last method's, rnn-trades
    jobs["pgd"] = lambda: pgd(model, images, y, eps=eps, step_size=eps / 4, steps=args.steps)
    jobs["learned"] = lambda: learned_attack(model, optimizer, images, y, eps=eps, steps=args.steps)
    jobs["forward"] = lambda: forward(model, images)
    seconds, peaks = measure(jobs, args.rounds, device)
    costs = {name: {"ms_per_image": 1000 * s / len(x), "peak_mb": peaks[name]} for name, s in seconds.items()}
    pass_cost, attacks = costs.pop("forward")["ms_per_image"], {name: costs.pop(name) for name in ("pgd", "learned")}
    for cost in costs.values():
        cost["ratio"] = cost["ms_per_image"] / costs["advtrain"]["ms_per_image"]
        cost["floor_ratio"] = cost["ms_per_image"] / ((2 * args.steps + 3) * pass_cost)
        cost["hours"] = cost["ms_per_image"] * 50_000 * args.epochs / 3.6e6
    if args.json:
        print(json.dumps({"model": args.model, "batch_size": len(x), "steps": args.steps, "device": str(device),
                          "forward_ms_per_image": pass_cost, "methods": costs, "attacks": attacks}))
        return
    print(f"{args.model}, batch {len(x)}, T = {args.steps}, {args.cell} learning from {min(len(x), settings.meta_images)} images, "
          f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {args.rounds} rounds\n"
          f"{'':14}{'ms/image':>10}{'/ advtrain':>12}{'/ floor':>9}{'peak MB':>9}{'hours':>8}   (floor: 2T+3 forward "
          f"passes; hours: {args.epochs} epochs of 50,000 images)")
    for name, c in costs.items():
        print(f"{name:14}{c['ms_per_image']:10.3f}{c['ratio']:12.2f}{c['floor_ratio']:9.2f}{c['peak_mb'] or math.nan:9.0f}"
              f"{c['hours']:8.1f}")
    for name, c in attacks.items():
        print(f"{name + ' alone':14}{c['ms_per_image']:10.3f}{'':21}{c['peak_mb'] or math.nan:9.0f}")


def forward(model, x):
    """What the floor counts: one pass without a graph, in the mode of the attacks."""
    with torch.no_grad(), eval_mode(model):
        return model(x)


def measure(jobs, rounds, device):
    """Median seconds of each job, in turn over several rounds after a warm-up one; and, from that one, its peak memory:
    MB above what was in use before, as torch counts on CUDA, and elsewhere of the process (None if unknown)."""
    cuda = device.type == "cuda"
    sync = torch.cuda.synchronize if cuda else lambda: None
    seconds, peaks = {name: [] for name in jobs}, {}
    for turn in progress(range(rounds + 1), "bench"):
        order = list(jobs.items())
        for name, job in order[turn % len(jobs):] + order[:turn % len(jobs)]:  # no one has always the same place
            before = None if turn else memory(cuda, reset=True)
            sync()
            start = time.perf_counter()
            job()
            sync()
            seconds[name].append(time.perf_counter() - start)
            if turn == 0:
                peaks[name] = None if before is None else (memory(cuda) - before) / 2 ** 20
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}, peaks


def memory(cuda, reset=False):
    """Peak memory in bytes since the last reset."""
    if cuda:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:  # Linux: hand freed memory back, and let the high-water mark of the resident memory start anew
        if reset:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, AttributeError, IndexError):
        return None


def main(argv):
    """The command line; returns the exit status."""
    parser = Parser(prog="l2l_adv.py bench", description="What one training step of each method costs.")
    parser.add_argument("--model", choices=MODELS, default="vgg16", help="small is timed on MNIST's size, the others on 32x32")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument("--cell", choices=("lstm", "rnn"), default="lstm")
    parser.add_argument("--meta-images", type=positive, help="images of the batch that the optimizer learns from")
    parser.add_argument("--epochs", type=positive, default=30, help="for the hours")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: as in training")
    parser.add_argument("--compile", choices=("no", "cell", "all"), help="default: as in training")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    return as_program("l2l_adv.py", bench, parser.parse_args(argv))
