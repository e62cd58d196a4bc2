"""Tables, in Markdown, from raw numbers METHOD-sSEED.WHAT.json: mean ± standard deviation over the training seeds.

    python3 results/table.py results/mnist
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

COLUMNS = "natural", "pgd-10", "pgd-100", "cw-100", "learned-10", "sharp-10", "referee", "autoattack", "worst"
ORDER = "plain", "advtrain", "advtrain-bls", "rnn-adv-rnn", "rnn-adv", "trades", "rnn-trades-rnn", "rnn-trades"


def read(folder, what):
    """{method: {seed: its JSON}}."""
    found = {}
    for path in sorted(Path(folder).glob(f"*-s*.{what}.json")):
        run = json.loads(path.read_text())
        found.setdefault(path.name.rpartition("-s")[0], {})[run["training_seed"]] = run
    return {name: found[name] for name in sorted(found, key=lambda name: (ORDER + (name,)).index(name))}


def spread(values, digits):
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}" if values else "-"


def table(found, kind, factor, digits):
    """Accuracies in % (kind "accuracy") or mean cross-entropies (kind "loss")."""
    columns = [name for name in COLUMNS if any(name in run[kind] for runs in found.values() for run in runs.values())]
    print(f"\n| {kind} | seeds | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for method, runs in found.items():
        values = [[factor * run[kind][name] for run in runs.values() if name in run[kind]] for name in columns]
        print(f"| {method} | {len(runs)} | {' | '.join(spread(each, digits) for each in values)} |")


def leads(found):
    """How far rnn-adv and rnn-trades are above their twins by hand in the worst case; the paired t, mean / (sd / √n).
    (The small cell has no twin: its own attack is not the one lent to advtrain.)"""
    for name, runs in found.items():
        twin = name.replace("rnn-adv", "advtrain").replace("rnn-trades", "trades")
        seeds = sorted(runs.keys() & found.get(twin, {})) if twin != name else []
        gains = [100 * (runs[seed]["accuracy"]["worst"] - found[twin][seed]["accuracy"]["worst"]) for seed in seeds]
        if gains:
            each = ", ".join(f"{gain:+.2f} (s{seed})" for seed, gain in zip(seeds, gains))
            t = f", t = {mean(gains) / stdev(gains) * len(gains) ** 0.5:.1f}" if len({*gains}) > 1 else ""
            print(f"\n{name} above {twin}, worst, in points: {each}; {spread(gains, 2)}{t}")


if __name__ == "__main__":
    for what in "best", "last", "sharp", "all", "referee", "autoattack":
        if found := read(sys.argv[1], what):
            images = {str(run["images"]) for runs in found.values() for run in runs.values()}
            print(f"\n{what}: the first {' or '.join(sorted(images))} test images")
            table(found, "accuracy", 100, 2)
            leads(found)
            if what not in ("referee", "autoattack"):  # their losses are not kept
                table(found, "loss", 1, 4)
