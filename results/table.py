"""Make the tables of README.md and results/README.md from the raw rows in results/.

Without a flag it prints them, with --write it puts them between the markers of the pages, which
are <!-- table NAME --> and <!-- end -->, and with --check it exits with 1 if a page differs.
Accuracies are in %: mean ± standard deviation over the seeds. A row without a run is left out.
"""
import argparse
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

HERE = Path(__file__).resolve().parent
SETTINGS = {"mnist": "mnist 16000x3 cnn4", "mnist-long": "mnist 59000x3 cnn4",
            "cifar10": "cifar10 49000x5 small", "gpu": "cifar10 49000x30 vgg16"}
ATTACKS = {"": "PGD, eps/4", "step_size=0.1": "PGD, eps/3", "decay": "PGD, decaying step",
           "line_search": "PGD, line search", "cell=rnn": "learned, RNN", "rnn": "learned, LSTM"}
RIVALS = {"rnn-adv": "advtrain", "rnn-trades": "trades"}
STARTS = {"gaussian": "near x", "uniform": "uniform"}
T_975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom


def group(file, setting, checkpoint=""):
    """Return {(start, method, attack): {seed: line}} of a file, in the order of the tables."""
    found = {}
    for line in map(json.loads, open(HERE / file) if (HERE / file).exists() else []):
        *words, start, method, rest = line["run"].split(" ", 5)
        changed, _, seed = f" {rest}".rpartition(" ")
        key = changed.strip() or ("rnn" if method in RIVALS else "")
        if " ".join(words) == SETTINGS[setting] and checkpoint in line.get("checkpoint", ""):
            found.setdefault((start, method, ATTACKS.get(key, key)), {})[seed] = line
    if len({line.get("test_images") for runs in found.values() for line in runs.values()}) > 1:
        sys.exit(f"table.py: the runs of {setting} were judged on different numbers of images")
    order = [*ATTACKS.values(), *(attack for _, _, attack in found)]
    return {row: found[row] for row in sorted(found, key=lambda row: (
        row[0], "trades" in row[1], order.index(row[2])))}


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) if rows else ""


def spread(runs, name):
    values = [100 * line["accuracy"][name] for line in runs.values()]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def full(setting, checkpoint="best"):
    names = ["natural", "pgd-10", "pgd-100", "judge"] + ["autoattack"] * (setting == "gpu")
    rows = [[STARTS[start], f"`{method}`", attack, *(spread(runs, name) for name in names),
             len(runs)]
            for (start, method, attack), runs in group("runs.jsonl", setting, checkpoint).items()]
    return markdown(["start", "method", "attack in training", *names, "seeds"], rows)


def last(setting):
    return full(setting, "last")


def short(setting):
    """The judge's accuracy only: a row for each attack, a column for each loss and start."""
    cells = {(attack, "TRADES" if "trades" in method else "cross-entropy", start):
             spread(runs, "judge")
             for (start, method, attack), runs in group("runs.jsonl", setting, "best").items()}
    columns = sorted({cell[1:] for cell in cells}, key=lambda cell: (cell[0] == "TRADES", cell[1]))
    rows = [[attack, *(cells.get((attack, *column), "–") for column in columns)]
            for attack in ATTACKS.values() if attack in [cell[0] for cell in cells]]
    head = ["attack in training", *(f"{loss}, {STARTS[start]}" for loss, start in columns)]
    return markdown(head, rows)


def pairs(setting):
    """Every learned row against every PGD row of the same start and loss, paired by seed."""
    found = group("runs.jsonl", setting, "best")
    rows = []
    for (start, method, attack), ours in found.items():
        for (their_start, rival, their_attack), theirs in found.items():
            seeds = ours.keys() & theirs.keys()
            if start == their_start and rival == RIVALS.get(method) and len(seeds) > 1:
                gains = [100 * (ours[seed]["accuracy"]["judge"] - theirs[seed]["accuracy"]["judge"])
                         for seed in seeds]
                gain = mean(gains)
                error = stdev(gains) / len(gains) ** 0.5
                half = T_975[len(gains) - 2] * error
                rows.append([STARTS[start], f"`{method}`, {attack}", their_attack, f"{gain:+.1f}",
                             f"{gain - half:+.1f} to {gain + half:+.1f}",
                             p_value(gain, error, len(gains) - 1), len(gains)])
    head = ["start", "learned", "minus", "points", "95 % interval", "p", "seeds"]
    return markdown(head, rows) + f"\nComparisons: {len(rows)}.\n"


def p_value(gain, error, n):
    """The two-sided p of Student's t = gain/error with n degrees of freedom. With t = √n·tan(a),
    the density in the angle a is proportional to cos(a)^(n−1)."""
    def area(low):  # from `low` to π/2
        width = (math.pi / 2 - low) / 1000
        return width * sum(math.cos(low + (i + 0.5) * width) ** (n - 1) for i in range(1000))
    return f"{area(math.atan2(abs(gain), error * n ** 0.5)) / area(0):.2g}"


def breaks():
    """The trainings whose last PGD-10 accuracy on held-out images is far below their row's."""
    names = []
    for setting in SETTINGS:
        for runs in group("logs.jsonl", setting).values():
            ends = {line["run"]: line["accuracy"]["pgd-10"] for line in runs.values()}
            names += [run for run, end in ends.items() if end < median(ends.values()) - 0.1]
    return f"Trainings that broke: {', '.join(names) or 'none'}.\n"


def analysis(name):
    """A table of analyse.json, which has the cells of its tables as text."""
    path = HERE / "analyse.json"
    tables = json.loads(path.read_text())["tables"] if path.exists() else {}
    return markdown(*tables[name]) if name in tables else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    tables = {f"{setting} {make.__name__}": partial(make, setting)
              for setting in SETTINGS for make in (full, last, short, pairs)}
    tables.update(breaks=breaks, maximizer=partial(analysis, "maximizer"),
                  gain=partial(analysis, "gain"))

    def fill(match):
        if match[1] not in tables:
            sys.exit(f"table.py: {page} asks for an unknown table: {match[1]}")
        return f"<!-- table {match[1]} -->\n\n{tables[match[1]]()}\n<!-- end -->"

    differ = 0
    for page in (HERE.parent / "README.md", HERE / "README.md"):
        old = page.read_text()
        if old.count("<!-- table ") != old.count("<!-- end -->"):
            sys.exit(f"table.py: {page} has a marker without its other half")
        new = re.sub("<!-- table (.*?) -->.*?<!-- end -->", fill, old, flags=re.DOTALL)
        if args.write:
            page.write_text(new)
        elif args.check and new != old:
            print(f"{page} differs from the raw rows: python3 results/table.py --write")
            differ = 1
    if not (args.write or args.check):
        for name, make in tables.items():
            print(f"{name}\n\n{make()}")
    return differ


if __name__ == "__main__":
    sys.exit(main())
