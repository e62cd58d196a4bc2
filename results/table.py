"""The table of results/mnist.md from the raw numbers beside it: mean and standard deviation over the training seeds.

    python3 results/table.py results/mnist
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

COLUMNS = "natural", "pgd-10", "pgd-100", "cw-100", "learned-10", "sharp-10", "autoattack", "worst"
ORDER = "plain", "advtrain", "advtrain-bls", "rnn-adv-rnn", "rnn-adv", "trades", "rnn-trades-rnn", "rnn-trades"


def read(folder, what):
    """{method: [the JSON of each seed]} of the files METHOD-sSEED.what.json."""
    found = {}
    for path in sorted(Path(folder).glob(f"*-s*.{what}.json")):
        found.setdefault(path.name.rpartition("-s")[0], []).append(json.loads(path.read_text()))
    return {name: found[name] for name in sorted(found, key=lambda name: (ORDER + (name,)).index(name))}


def cell(values, factor, digits):
    """mean ± sample standard deviation; a single value without; - for none."""
    values = [factor * value for value in values]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" if values else "-"


def table(title, found, kind, factor, digits):
    """Print accuracies in % (kind "accuracy") or mean cross-entropies (kind "loss") as Markdown."""
    columns = [name for name in COLUMNS if any(name in run[kind] for runs in found.values() for run in runs)]
    print(f"\n{title}\n\n| method | seeds | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for method, runs in found.items():
        cells = [cell([run[kind][name] for run in runs if name in run[kind]], factor, digits) for name in columns]
        print(f"| {method} | {len(runs)} | {' | '.join(cells)} |")


def by_seed(found, sharp):
    """Print the same seed by seed: the worst case, and by how much the learned optimizer's loss is above PGD-100's, as it
    was trained and, from the files `sharp`, sharpened."""
    sharp_loss = {(method, run["training_seed"], run["images"]): run["loss"] for method in sharp for run in sharp[method]}
    seeds = sorted({run["training_seed"] for runs in found.values() for run in runs})
    print("\nworst, and the loss of learned-10 and of sharp-10 less that of pgd-100, by training seed\n")
    print(f"| method | {' | '.join(map(str, seeds))} |\n|{'---|' * (len(seeds) + 1)}")
    for method, runs in found.items():
        cells = {}
        for run in runs:
            loss = {**sharp_loss.get((method, run["training_seed"], run["images"]), {}), **run["loss"]}
            gaps = [f"{loss[name] - loss['pgd-100']:+.4f}" for name in ("learned-10", "sharp-10") if {name, "pgd-100"} <= {*loss}]
            cells[run["training_seed"]] = ", ".join([f"{100 * run['accuracy']['worst']:.2f}", *gaps])
        print(f"| {method} | {' | '.join(cells.get(seed, '-') for seed in seeds)} |")


def leads(found):
    """Print by how many points rnn-adv and rnn-trades are above their twins by hand in the worst case, over the seeds that
    both have. (The small cell has no twin: its own attack is another than the one lent to advtrain.)"""
    for name in found:
        twin = name.replace("rnn-adv", "advtrain").replace("rnn-trades", "trades")
        ours, theirs = ({run["training_seed"]: run["accuracy"]["worst"] for run in found.get(key, [])} for key in (name, twin))
        if twin != name and (seeds := sorted(ours.keys() & theirs.keys())):
            gains = [ours[seed] - theirs[seed] for seed in seeds]
            each = ", ".join(f"{100 * gain:.2f}" for gain in gains)
            print(f"\n{name} above {twin}, worst of this table, in points, by training seed: {each}; {cell(gains, 100, 2)}")


def main(folder):
    for what, checkpoint in (("best", "best checkpoint"), ("last", "last checkpoint"), ("sharp", "best checkpoint"),
                             ("all", "best checkpoint"), ("autoattack", "best checkpoint")):
        if found := read(folder, what):
            images, = {run["images"] for runs in found.values() for run in runs}
            table(f"{checkpoint}, the first {images:,} test images, accuracy in %", found, "accuracy", 100, 2)
            leads(found)
            if what in ("best", "sharp"):
                table("the same, mean cross-entropy that the attack reached", found, "loss", 1, 4)
            if what == "best":
                by_seed(found, read(folder, "sharp"))


if __name__ == "__main__":
    main(sys.argv[1])
