"""Make the tables of README.md and results/README.md from the raw rows in results/.

With --write, the tables are put between the markers of the pages, <!-- table NAME --> and
<!-- end -->. Otherwise the exit status is 1 if a page differs from the raw rows. Accuracies are
in %: mean ± standard deviation over the seeds. A row of a table without any run is left out.
"""
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

HERE = Path(__file__).resolve().parent
SETTINGS = {"mnist": "mnist 16000x3 cnn4", "mnist-long": "mnist allx3 cnn4",
            "cifar10": "cifar10 allx5 small", "gpu": "cifar10 allx30 vgg16"}
ATTACKS = {"": "PGD, eps/4", "step_size=0.1": "PGD, eps/3", "decay": "PGD, decaying step",
           "line-search": "PGD, line search", "cell=rnn": "learned, RNN", "rnn": "learned, LSTM"}
STARTS = {"gaussian": "near x", "uniform": "uniform"}
T_975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom
ANALYSES = json.loads((HERE / "analyse.json").read_text())


def group(file, setting, checkpoint=""):
    """Return {(start, method, attack): {seed: line}} of a file, in the order of the tables."""
    found = {}
    for line in map(json.loads, open(HERE / file) if (HERE / file).exists() else []):
        *words, start, method, rest = line["run"].split(" ", 5)
        changed = rest.rpartition(" ")[0] or "rnn" * method.startswith("rnn")
        if " ".join(words) == SETTINGS[setting] and checkpoint in line.get("checkpoint", ""):
            row = start, method, ATTACKS.get(changed, changed)
            found.setdefault(row, {})[line["run"].split()[-1]] = line
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


def short(setting):
    """The judge's accuracy only: a row for each attack, a column for each loss and start."""
    cells = {}
    for (start, method, attack), runs in group("runs.jsonl", setting, "best").items():
        loss = "TRADES" if "trades" in method else "cross-entropy"
        cells.setdefault(attack, {})[f"{loss}, {STARTS[start]}"] = spread(runs, "judge")
    columns = sorted({column for row in cells.values() for column in row}, key=str.lower)
    return markdown(["attack in training", *columns],
                    [[attack, *(cells[attack].get(column, "–") for column in columns)]
                     for attack in ATTACKS.values() if attack in cells])


def pairs(setting):
    """Every learned row against every PGD row of the same start and loss, paired by seed."""
    found = group("runs.jsonl", setting, "best")
    rows = []
    for (start, method, attack), ours in found.items():
        rival = {"rnn-adv": "advtrain", "rnn-trades": "trades"}.get(method)
        for (their_start, their_method, their_attack), theirs in found.items():
            seeds = ours.keys() & theirs.keys()
            if (their_start, their_method) != (start, rival) or len(seeds) < 2:
                continue
            gains = [100 * (ours[seed]["accuracy"]["judge"] - theirs[seed]["accuracy"]["judge"])
                     for seed in seeds]
            gain = mean(gains)
            error = stdev(gains) / len(gains) ** 0.5
            half = T_975[len(gains) - 2] * error
            rows.append([STARTS[start], f"`{method}`, {attack}", f"`{rival}`, {their_attack}",
                         f"{gain:+.1f}", f"{gain - half:+.1f} to {gain + half:+.1f}",
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
    broken = []
    for setting in SETTINGS:
        for runs in group("logs.jsonl", setting).values():
            ends = {line["run"]: line["accuracy"]["pgd-10"] for line in runs.values()}
            broken += [run for run, end in ends.items() if end < median(ends.values()) - 0.1]
    return f"Trainings that broke: {', '.join(broken) or 'none'}.\n"


def maximizer():
    """The inner loss at the end of attacks of different lengths."""
    lengths = (1, 2, 3, 5, 10)
    rows = [[run["run"], attack, *(f"{loss[n - 1]:.3f} ± {run['error'][attack][n - 1]:.3f}"
                                   for n in lengths)]
            for run in ANALYSES for attack, loss in run["loss"].items()]
    return markdown(["run", "attack", *(f"{n} gradients" for n in lengths)], rows)


def gain():
    """The inner loss of PGD-10 with the best fixed step, and the best of 100 steps."""
    rows = []
    for run in ANALYSES:
        ten = run["loss"]["PGD, best fixed step"][-1]
        most = run["best of 100"]
        rows.append([run["run"], f"{ten:.3f}", f"{most:.3f}", f"{100 * (most / ten - 1):.1f} %"])
    return markdown(["run", "PGD-10", "best of 100 steps", "more"], rows)


def main():
    tables = {f"{setting} {make.__name__}": partial(make, setting)
              for setting in SETTINGS for make in (full, short, pairs)}
    tables.update({f"{setting} last": partial(full, setting, "last") for setting in SETTINGS},
                  breaks=breaks, maximizer=maximizer, gain=gain)

    def fill(match):
        if match[1] not in tables:
            sys.exit(f"table.py: {page} asks for an unknown table, {match[1]}: try {[*tables]}")
        return f"<!-- table {match[1]} -->\n\n{tables[match[1]]()}\n<!-- end -->"

    status = 0
    for page in (HERE.parent / "README.md", HERE / "README.md"):
        old = page.read_text()
        if old.count("<!-- table ") != old.count("<!-- end -->"):
            sys.exit(f"table.py: {page} has a marker without its other half")
        new = re.sub("<!-- table (.*?) -->.*?<!-- end -->", fill, old, flags=re.DOTALL)
        if "--write" in sys.argv:
            page.write_text(new)
        elif new != old:
            print(f"{page} differs from the raw rows: python3 results/table.py --write")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
