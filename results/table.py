"""Tables, in Markdown, from raw numbers METHOD-sSEED.WHAT.json: mean ± standard deviation over the training seeds.

    python3 results/table.py results/mnist/16000x3
"""
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev

COLUMNS = ("natural", "pgd-10", "pgd-100", "cw-100", "apgd-ce", "apgd-t3", "apgd-t", "fab-t",
           "square", "learned-10", "sharp-10", "square-8th", "worst")
ORDER = ("plain", "advtrain", "advtrain-decay", "advtrain-bls", "rnn-adv-rnn", "rnn-adv", "trades", "trades-decay",
         "rnn-trades")
LEADS = (("rnn-adv", "advtrain"), ("rnn-adv", "advtrain-decay"), ("advtrain-decay", "advtrain"),
         ("rnn-adv", "advtrain-bls"), ("advtrain-bls", "advtrain"), ("rnn-adv-rnn", "advtrain-decay"),
         ("rnn-trades", "trades"), ("rnn-trades", "trades-decay"), ("trades-decay", "trades"))


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


def t_test(gains):
    """The paired t, and its two-sided p: Student's density with n degrees of freedom is cos(a)^(n−1)
    in the angle a, t = √n·tan(a)."""
    def area(low):  # below it, from `low` to π/2
        width = (math.pi / 2 - low) / 1000
        return width * sum(math.cos(low + (i + 0.5) * width) ** (n - 1) for i in range(1000))

    n, t = len(gains) - 1, mean(gains) / stdev(gains) * len(gains) ** 0.5
    return t, area(math.atan(abs(t) / n ** 0.5)) / area(0)


def mcnemar(ours, theirs):
    """The images that only one of two runs gets right, and the exact two-sided p that they fall like a coin."""
    won, lost = len({*theirs} - {*ours}), len({*ours} - {*theirs})  # of numbers of broken images
    return won, lost, min(1.0, sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost - 1))


def leads(found):
    """How far one method is above another in the worst case."""
    for name, twin in LEADS:
        runs, theirs = found.get(name, {}), found.get(twin, {})
        seeds = sorted(runs.keys() & theirs.keys())
        gains = [round(100 * (runs[seed]["accuracy"]["worst"] - theirs[seed]["accuracy"]["worst"]), 6)
                 for seed in seeds]
        if gains:
            each = ", ".join(f"{gain:+.2f}" for gain in gains)
            test = "; t = {:.1f}, p = {:.2g}".format(*t_test(gains)) if len({*gains}) > 1 else ""
            print(f"\n{name} above {twin}, worst, in points, seeds {seeds}: {each}; {spread(gains, 2)}{test}")
            if "broken" in runs[seeds[0]]:
                print("McNemar, images won, lost, p: " + "; ".join(
                    "{}, {}, {:.2g}".format(*mcnemar(runs[seed]["broken"], theirs[seed]["broken"])) for seed in seeds))


if __name__ == "__main__":
    for what in "best", "last", "referee", "referee-last", "autoattack":
        if found := read(sys.argv[1], what):
            images = {str(run["images"]) for runs in found.values() for run in runs.values()}
            left = "" if what in ("best", "last") else "; what is left after each attack and those before it"
            print(f"\n{what}: the first {' or '.join(sorted(images))} test images{left}")
            table(found, "accuracy", 100, 2)
            leads(found)
            if what in ("best", "last"):  # the others' losses are not kept
                table(found, "loss", 1, 4)
