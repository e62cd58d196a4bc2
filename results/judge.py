"""How many test images stay right under every attack? One JSON line for each checkpoint of a run.

An image has to survive all of these, each from the same seed:
    natural, pgd-10, pgd-100   PGD from near x with steps of eps/4, on all images
    learned-10                 with the φ of the run, or of its learned twin if it has none
    apgd-ce, apgd-t            100 steps of APGD; cross-entropy, and targeted DLR to 3 classes
    decay-20                   PGD with a decaying step size
    square-8th                 5,000 queries of Square, on the eighth of the survivors with the
                               highest cross-entropy under decay-20
From learned-10 on, an attack meets the survivors only, and its number is what is left after it.
The best checkpoint is judged, and the last one where it differs, but none that the file has
already. Commit, torch and device are the judge's.
"""
import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from baselines import evaluate, load_dataset, pgd
from l2l_adv import learned_attack, load_run

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
            i = i[losses.argsort(descending=True)[:(len(i) + 7) // 8]]
        if len(i):
            correct, loss = evaluate(model, x[i], y[i], {name: attack}, eps=eps)
            alive[i] = correct["worst"]
            losses = loss[name][correct["worst"]]  # those of the images that are still alive
        left[name] = alive.double().mean().item()
    return left


def judge(model, optimizer, x, y, eps, autoattack):
    """Return the accuracies, and which images survive, a mask (N,)."""
    fixed = partial(pgd, eps=eps, step_size=eps / 4)
    on_all = {"pgd-10": partial(fixed, steps=10), "pgd-100": partial(fixed, steps=100)}
    apgd = library("APGD", eps, steps=100)
    square = library("Square", eps, n_queries=5000)
    on_survivors = {
        "learned-10": lambda model, x, y: learned_attack(model, optimizer, x, y, eps=eps),
        "apgd-ce": apgd, "apgd-t": library("APGDT", eps, steps=100, n_classes=4),
        "decay-20": partial(pgd, eps=eps, step_size=eps, steps=20, decay=True),
        "square-8th": square}
    standard = {  # AutoAttack; that of torchattacks takes 10 steps in place of 100
        "apgd-ce": apgd, "apgd-t": library("APGDT", eps, steps=100),
        "fab-t": library("FAB", eps, steps=100, multi_targeted=True), "square": square}
    correct, _ = evaluate(model, x, y, on_all, eps=eps)
    alive = correct.pop("worst")
    accuracy = {name: right.double().mean().item() for name, right in correct.items()}
    accuracy.update(attack_survivors(model, x, y, alive, on_survivors, eps))
    accuracy["judge"] = accuracy["square-8th"]
    if autoattack:
        left = attack_survivors(model, x, y, correct["natural"].clone(), standard, eps)
        accuracy["autoattack"] = left["square"]
    return {name: round(value, 4) for name, value in accuracy.items()}, alive


def name_of(folder):
    """The name of a run in its lines, such as mnist/uniform/advtrain-s0."""
    return "/".join(Path(folder).absolute().parts[-3:])


def read(path):
    return [json.loads(line) for line in open(path)] if Path(path).exists() else []


def append(path, rows):
    """Append the rows in one piece, because another process may append to the file as well."""
    with open(path, "ab", buffering=0) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", help="folder made by l2l_adv.py train")
parser.add_argument("--twin", help="the learned run whose φ attacks a run that has none")
parser.add_argument("--limit", type=int, default=1000, help="test images; default 1000")
parser.add_argument("--autoattack", action="store_true", help="the standard AutoAttack, too")
parser.add_argument("--numbers", type=Path, default=HERE, help="folder of runs.jsonl, logs.jsonl")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
_, _, settings = load_run(args.run)
run = name_of(args.run)
log = read(f"{args.run}/log.jsonl")
if len(log) < settings.epochs:
    sys.exit(f"judge.py: {args.run} is not finished: train it further with --resume")
if not any(line["run"] == run for line in read(args.numbers / "logs.jsonl")):
    append(args.numbers / "logs.jsonl", [{"run": run, **line} for line in log])
data = load_dataset(settings.dataset)
x = data.x_test[:args.limit].to(device).float() / 255
y = data.y_test[:args.limit].to(device)

score = "natural" if settings.method == "plain" else "pgd-10"
best = max(log, key=lambda line: line["accuracy"][score])["epoch"]
epochs = {"best=last": best} if best == len(log) else {"best": best, "last": len(log)}
done = [(line["run"], line["checkpoint"]) for line in read(args.numbers / "runs.jsonl")]
for checkpoint, epoch in epochs.items():
    if (run, checkpoint) in done:
        continue
    model, optimizer, _ = load_run(args.run, checkpoint[:4], device)
    twin = args.twin if optimizer is None else None
    if twin:
        _, optimizer, _ = load_run(twin, checkpoint[:4], device)
    if optimizer is None:
        sys.exit(f"judge.py: {args.run} has no learned optimizer: name its twin with --twin")
    accuracy, alive = judge(model, optimizer, x, y, settings.eps, args.autoattack)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True,
                            capture_output=True).stdout.strip()
    append(args.numbers / "runs.jsonl", [{
        "run": run, "checkpoint": checkpoint, "epoch": epoch,
        "twin": twin and name_of(twin), "commit": commit,
        "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "test_images": len(x), "accuracy": accuracy, "settings": {**vars(settings), "out": None},
        "broken": (~alive).nonzero()[:, 0].tolist()}])
    print(run, checkpoint, accuracy, flush=True)
