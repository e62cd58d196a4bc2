"""Make the tables of README.md and results/README.md from the raw rows in results/.

With --write, the tables are put between the markers of the pages, <!-- table NAME --> and
<!-- end -->. With --check, the exit status is 1 if a page differs from the raw rows. Accuracies
are in %: mean ± standard deviation over the seeds. A row without any run is left out. The raw rows
are in results/, or in the folder $NUMBERS.
"""
import json
import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

HERE = Path(__file__).resolve().parent
NUMBERS = Path(os.environ.get("NUMBERS", HERE))
SETTINGS = {"mnist": "mnist 16000x3 cnn4", "mnist-long": "mnist allx3 cnn4",
            "cifar10": "cifar10 allx5 small", "gpu": "cifar10 allx30 vgg16"}
ATTACKS = {"PGD": "PGD, eps/4", "PGD step_size=0.1": "PGD, eps/3",
           "PGD decay": "PGD, decaying step", "PGD line-search": "PGD, line search",
           "learned cell=rnn": "learned, RNN", "learned": "learned, LSTM"}
STARTS = {"gaussian": "near x", "uniform": "uniform"}
T_975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom


def group(file, setting, checkpoint=""):
    """Return {(start, loss, attack): {seed: line}} of a file, in the order of the tables."""
    found = {}
    for line in map(json.loads, open(NUMBERS / file)):
        words = line["run"].split()  # data, images x epochs, model, start, method, …, seed
        if words[:3] == SETTINGS[setting].split() and checkpoint in line.get("checkpoint", ""):
            loss = "TRADES" if "trades" in words[4] else "cross-entropy"
            attack = " ".join(["learned" if "rnn" in words[4] else "PGD", *words[5:-1]])
            row = STARTS[words[3]], loss, ATTACKS.get(attack, attack)
            found.setdefault(row, {})[words[-1]] = line
    if len({line.get("test_images") for runs in found.values() for line in runs.values()}) > 1:
        sys.exit(f"table.py: the runs of {setting} were judged on different numbers of images")
    order = [*ATTACKS.values(), *(attack for _, _, attack in found)]
    return {row: found[row] for row in sorted(
        found, key=lambda row: (row[0], row[1].lower(), order.index(row[2])))}


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(runs, name):
    values = [100 * line["accuracy"][name] for line in runs.values()]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def full(setting, checkpoint="best"):
    names = ["natural", "pgd-10", "pgd-100", "judge"] + ["autoattack"] * (setting == "gpu")
    return markdown(["start", "loss", "attack in training", *names, "seeds"], [
        [*row, *(spread(runs, name) for name in names), len(runs)]
        for row, runs in group("runs.jsonl", setting, checkpoint).items()])


def short(setting):
    """The judge's accuracy only: a row for each attack, a column for each loss and start."""
    found = group("runs.jsonl", setting, "best")
    columns = sorted({row[:2] for row in found}, key=lambda column: (column[1].lower(), column))
    rows = {}
    for (start, loss, attack), runs in found.items():
        row = rows.setdefault(attack, ["–"] * len(columns))
        row[columns.index((start, loss))] = spread(runs, "judge")
    return markdown(["attack in training", *(f"{loss}, {start}" for start, loss in columns)],
                    [[attack, *rows[attack]] for attack in ATTACKS.values() if attack in rows])


def pairs(setting):
    """Every learned row minus every PGD row of the same start and loss, paired by seed."""
    found = group("runs.jsonl", setting, "best")
    rows = []
    for (*kind, attack), ours in found.items():
        for (*their_kind, rival), theirs in found.items():
            seeds = sorted(ours.keys() & theirs.keys())
            if kind != their_kind or "PGD" not in rival or "learned" not in attack or not seeds:
                continue
            won, lost = (sum(len({*b[seed]["broken"]} - {*a[seed]["broken"]}) for seed in seeds)
                         for a, b in ((ours, theirs), (theirs, ours)))
            gains = [100 * (ours[seed]["accuracy"]["judge"] - theirs[seed]["accuracy"]["judge"])
                     for seed in seeds]
            gain = mean(gains)
            interval = p = "–"
            if len(gains) > 1:
                error = stdev(gains) / len(gains) ** 0.5
                half = T_975[len(gains) - 2] * error
                interval = f"{gain - half:+.1f} to {gain + half:+.1f}"
                p = p_value(gain, error, len(gains) - 1)
            rows.append([*kind, attack, rival, f"{gain:+.1f}", interval, p, f"{won}, {lost}",
                         len(seeds)])
    head = ["start", "loss", "attack in training", "minus", "points", "95 % interval", "p",
            "images won, lost", "seeds"]
    return markdown(head, rows) + f"\nComparisons: {len(rows)}.\n"


def p_value(gain, error, n):
    """The two-sided p of Student's t = gain/error with n degrees of freedom. With t = √n·tan(a),
    the density in the angle a is proportional to cos(a)^(n−1)."""
    def area(low):  # from `low` to π/2
        width = (math.pi / 2 - low) / 1000
        return width * sum(math.cos(low + (i + 0.5) * width) ** (n - 1) for i in range(1000))
    return f"{area(math.atan2(abs(gain), error * n ** 0.5)) / area(0):.2g}"


def breaks(setting):
    """The trainings whose last PGD-10 accuracy on held-out images is far below their row's."""
    broken = []
    for runs in group("logs.jsonl", setting).values():
        ends = {line["run"]: line["accuracy"]["pgd-10"] for line in runs.values()}
        broken += [run for run, end in ends.items() if end < median(ends.values()) - 0.1]
    return f"Trainings that broke: {', '.join(broken) or 'none'}.\n"


def maximizer(_):
    """The inner loss at the end of attacks of several lengths."""
    lengths = (1, 2, 3, 5, 10)
    return markdown(["run", "attack", *lengths, "best of 100"], [
        [run["run"], attack, *(f"{loss[n - 1]:.3f} ± {run['error'][attack][n - 1]:.3f}"
                               for n in lengths), f"{run['best of 100']:.3f}"]
        for run in json.loads((NUMBERS / "analyse.json").read_text())
        for attack, loss in run["loss"].items()])


def fill(match):
    """The new content of a pair of markers, such as <!-- table mnist pairs -->."""
    setting, _, kind = match[1].rpartition(" ")
    kinds = {"full": full, "last": partial(full, checkpoint="last"), "short": short,
             "pairs": pairs, "breaks": breaks, "maximizer": maximizer}
    if kind not in kinds or setting not in ("", *SETTINGS):
        sys.exit(f"table.py: there is no table {match[1]}, but {[*kinds]} of {[*SETTINGS]}")
    return f"<!-- table {match[1]} -->\n\n{kinds[kind](setting)}\n<!-- end -->"


if sys.argv[1:] not in (["--check"], ["--write"]):
    sys.exit("table.py: say --check or --write")
status = 0
for page in (HERE.parent / "README.md", HERE / "README.md"):
    old = page.read_text()
    new = re.sub("<!-- table (.*) -->[^<]*<!-- end -->", fill, old)
    if "--write" in sys.argv:
        page.write_text(new)
    elif new != old:
        print(f"{page} differs from the raw rows: python3 results/table.py --write")
        status = 1
sys.exit(status)
