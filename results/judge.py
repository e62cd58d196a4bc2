"""How many test images stay right under every attack? One JSON line for each checkpoint of a run.

An image has to survive all of these, each from the same seed:
    natural, pgd-10, pgd-100   PGD from near x with steps of eps/4, on all images
    learned-10                 with the φ of the run, or of its learned twin if it has none
    apgd-ce, apgd-t            100 steps of APGD [1]; cross-entropy, and targeted DLR to 3 classes
    decay-20                   PGD with a decaying step size
    square-8th                 5,000 queries of Square [2], on the eighth of the survivors with
                               the highest cross-entropy under decay-20
From learned-10 on, an attack meets the survivors only, and its number is what is left after it.
Torch and device are those of the judge. A key that the file has already is not judged again.

[1] Croce & Hein, Reliable Evaluation of Adversarial Robustness, ICML 2020
[2] Andriushchenko et al., Square Attack, ECCV 2020
"""
import argparse
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from baselines import InputError, evaluate, hold_out, load_dataset, pgd
from l2l_adv import check_settings, get_args, learned_attack, load_run

try:
    import torchattacks
except ImportError:
    print("judge.py: first python3 -m pip install --no-deps torchattacks scipy", file=sys.stderr)
    sys.exit(2)


def library(kind, eps, **settings):
    """An attack of torchattacks as a callable(model, x, y) → x_adv."""
    def attack(model, x, y):
        return getattr(torchattacks, kind)(model, eps=eps, seed=0, **settings)(x, y).detach()
    return attack


def attack_survivors(model, x, y, alive, attacks, eps):
    """Attack the images that are alive, a mask (N,), and clear it where an attack succeeds.
    Returns the accuracy that is left after each attack."""
    left = {}
    for name, attack in attacks.items():
        i = alive.nonzero()[:, 0]
        if name == "square-8th" and len(i):
            i = i[losses.argsort(descending=True)[:math.ceil(len(i) / 8)]]
        if len(i):
            correct, loss = evaluate(model, x[i], y[i], {name: attack}, eps=eps)
            alive[i] = correct["worst"]
            losses = loss[name][correct["worst"]]  # those of the images that are still alive
        left[name] = alive.double().mean().item()
    return left


def judge(model, optimizer, x, y, eps):
    """Return the accuracies, and which images survive, a mask (N,)."""
    on_all = {f"pgd-{steps}": partial(pgd, eps=eps, step_size=eps / 4, steps=steps)
              for steps in (10, 100)}
    correct, _ = evaluate(model, x, y, on_all, eps=eps)
    alive = correct.pop("worst")
    accuracy = {name: right.double().mean().item() for name, right in correct.items()}
    left = attack_survivors(model, x, y, alive, {
        "learned-10": lambda model, x, y: learned_attack(model, optimizer, x, y, eps=eps),
        "apgd-ce": library("APGD", eps, steps=100),
        "apgd-t": library("APGDT", eps, steps=100, n_classes=4),
        "decay-20": partial(pgd, eps=eps, step_size=eps, steps=20, decay=True),
        "square-8th": library("Square", eps, n_queries=5000)}, eps)
    return {**accuracy, **left, "judge": left["square-8th"]}, alive


def autoattack(model, x, y, eps):
    """The accuracy under the standard AutoAttack [1], which in torchattacks takes too few steps."""
    return attack_survivors(model, x, y, torch.ones_like(y, dtype=torch.bool), {
        "apgd-ce": library("APGD", eps, steps=100),
        "apgd-t": library("APGDT", eps, steps=100),
        "fab-t": library("FAB", eps, steps=100, multi_targeted=True),
        "square": library("Square", eps, n_queries=5000)}, eps)["square"]


def describe(settings, images):
    """Return a run's key, which names all that is not default, and its settings."""
    argv = [f"--{name}={getattr(settings, name)}" for name in ("dataset", "model", "method")]
    default = vars(check_settings(get_args(["train", "--out=runs", *argv])))
    settings = {name: value for name, value in vars(settings).items()
                if name not in ("out", "device")}
    for each in (settings, default):
        if each["step_size"]:
            share = Fraction(each["step_size"] / each["eps"]).limit_denominator(64)
            each["step_size"] = f"{share}*eps"
        each["eps"] = f"{255 * each['eps']:g}/255"
    changed = [name if value is True else f"{name}={value}" for name, value in settings.items()
               if name not in ("limit", "epochs", "start", "seed") and value != default[name]]
    key = " ".join(["{dataset} {images}x{epochs} {model} {start} {method}".format(
        images=images, **settings), *changed, f"s{settings['seed']}"])
    return key, settings


def read(path):
    """The rows of a .jsonl file, none if there is no file."""
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []


def append(path, rows):
    """Append the rows in one piece, because another process may append to the file as well."""
    file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
    os.close(file)


def judge_run(folder, args):
    """Append the lines of a run that are missing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log = read(f"{folder}/log.jsonl")
    settings = load_run(folder)[2]
    if len(log) < settings.epochs:
        raise InputError(f"{folder} is not finished: train it further with --resume")
    data = load_dataset(settings.dataset, args.data_dir)
    x = data.x_test[:args.limit].to(device).float() / 255
    y = data.y_test[:args.limit].to(device)
    images = len(hold_out(data, settings.limit)[0])
    run, about = describe(settings, images)
    if not any(row["run"] == run for row in read(args.logs_file)):
        append(args.logs_file, [{"run": run, **row} for row in log])

    best = max(log, key=lambda row: row["accuracy"]["pgd-10"])["epoch"]
    epochs = {"best=last": best} if best == len(log) else {"best": best, "last": len(log)}
    done = {row["key"] for row in read(args.runs_file)}
    for checkpoint, epoch in epochs.items():
        key = f"{run} {checkpoint}"
        if key in done or args.checkpoint not in (None, *checkpoint.split("=")):
            continue
        which = checkpoint[:4]  # "best" or "last"
        model, optimizer, _ = load_run(folder, which, device)
        twin = None
        if optimizer is None:
            if args.twin is None:
                raise InputError(f"{folder} has no learned optimizer: name its twin with --twin")
            _, optimizer, theirs = load_run(args.twin, which, device)
            twin, _ = describe(theirs, images)
        accuracy, alive = judge(model, optimizer, x, y, settings.eps)
        if args.autoattack:
            accuracy["autoattack"] = autoattack(model, x, y, settings.eps)
        accuracy = {name: round(value, 4) for name, value in accuracy.items()}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True,
                                capture_output=True).stdout.strip()
        append(args.runs_file, [{
            "key": key, "run": run, "images": images, "settings": about, "commit": commit,
            "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "checkpoint": checkpoint, "epoch": epoch, "test_images": len(x), "twin": twin,
            "accuracy": accuracy, "broken": (~alive).nonzero()[:, 0].tolist()}])
        print(key, accuracy, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders made by l2l_adv.py train")
    parser.add_argument("--twin", help="the learned run whose φ attacks those that have none")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: both")
    parser.add_argument("--limit", type=int, default=1000, help="test images; default 1000")
    parser.add_argument("--autoattack", action="store_true", help="the standard AutoAttack, too")
    parser.add_argument("--runs-file", default=HERE / "runs.jsonl")
    parser.add_argument("--logs-file", default=HERE / "logs.jsonl")
    parser.add_argument("--data-dir")
    args = parser.parse_args()
    try:
        for folder in args.runs:
            judge_run(folder, args)
    except (InputError, OSError) as error:
        print(f"judge.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
