"""Make the tables of README.md and results/README.md from the raw rows in results/.

With --write, the tables are put between the markers of the pages, <!-- table NAME --> and
<!-- end -->. With --check, the exit status is 1 if a page differs from the raw rows. Accuracies
are in %: mean ± standard deviation over the seeds. The raw rows are in results/, or in $NUMBERS.
With --figure, the README's picture is drawn (needs matplotlib).
"""
import json
import os
import re
import sys
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev

from scipy.stats import ttest_1samp

HERE = Path(__file__).resolve().parent
NUMBERS = Path(os.environ.get("NUMBERS", HERE))
METHODS = {  # the rows of reproduce.sh, in the order of the tables
    "advtrain": "AdvTrain, eps/4", "advtrain-third": "AdvTrain, eps/3",
    "advtrain-half": "AdvTrain, eps/2", "advtrain-decay": "AdvTrain, decaying step",
    "advtrain-search": "AdvTrain, line search",
    "rnn-adv": "RNN-Adv", "rnn-adv-rnn": "RNN-Adv, RNN cell", "trades": "TRADES, eps/4",
    "trades-decay": "TRADES, decaying step", "rnn-trades": "RNN-TRADES"}
LENGTHS = (2, 5, 10)  # numbers of gradients


def group(file, target):
    """Return {(start, row): {seed: line}} of a file, in the order of the tables. Where the best
    and the last checkpoint differ, take the best."""
    found = {}
    for line in map(json.loads, open(NUMBERS / file)):
        where, start, name = line["run"].split("/")  # mnist/gaussian/advtrain-decay-s0
        if where == target and line.get("checkpoint") != "last":
            row, _, seed = name.rpartition("-s")
            found.setdefault((start, row), {})[seed] = line
    if len({line.get("test_images") for runs in found.values() for line in runs.values()}) > 1:
        sys.exit(f"table.py: the runs of {target} were judged on different numbers of images")
    order = list(METHODS)
    return {key: found[key] for key in sorted(found, key=lambda key: (key[0], order.index(key[1])))}


def label(start, row):
    """The name of a row in tables and picture."""
    return METHODS[row] + (", uniform" if start == "uniform" else "")


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(values):
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def full(targets, starts=("gaussian", "uniform"), least=1):
    """A row for each method with that many seeds at least, and its accuracies. Rows of a second
    target, as in "mnist mnist-long", say so."""
    first, *_ = targets.split()
    names = ["natural", "pgd-10", "pgd-100", "judge"] + ["autoattack"] * (first == "gpu")
    rows = []
    for target in targets.split():
        for key, runs in group("runs.jsonl", target).items():
            if key[0] in starts and len(runs) >= least:
                training = label(*key) if target == first else f"{label(*key)}, {target}"
                scores = [[100 * line["accuracy"][name] for line in runs.values()]
                          for name in names]
                rows.append([training, *map(spread, scores), len(runs)])
    return markdown(["training", *names, "seeds"], rows)


def breaks(target):
    """The trainings whose last PGD-10 accuracy on held-out images is far below their row's."""
    broken = []
    for runs in group("logs.jsonl", target).values():
        ends = {line["run"]: line["accuracy"]["pgd-10"] for line in runs.values()}
        broken += [run for run, end in ends.items() if end < median(ends.values()) - 0.1]
    return broken


def minus(target):
    """Every learned row minus every PGD row with its loss and start, paired by three or more
    seeds."""
    groups = group("runs.jsonl", target)
    for ((start, row), ours), ((their_start, rival), theirs) in product(groups.items(), repeat=2):
        seeds = sorted(ours.keys() & theirs.keys())
        alike = start == their_start and ("trades" in row) == ("trades" in rival)
        if "rnn" not in row or "rnn" in rival or not alike or len(seeds) < 3:
            continue
        gains = [100 * (ours[seed]["accuracy"]["judge"] - theirs[seed]["accuracy"]["judge"])
                 for seed in seeds]
        test = ttest_1samp(gains, 0)
        low, high = test.confidence_interval(0.95)
        yield [target, label(start, row), label(their_start, rival), f"{mean(gains):+.1f}",
               f"{low:+.1f} to {high:+.1f}", f"{test.pvalue:.2g}",
               ", ".join(f"{gain:+.1f}" for gain in gains)]


def pairs(targets):
    """The differences and the broken trainings of several targets, such as "mnist cifar10"."""
    rows = [row for target in targets.split() for row in minus(target)]
    broken = [run for target in targets.split() for run in breaks(target)]
    head = ["runs", "training", "minus", "points", "95 % interval", "p", "each seed"]
    return (f"{markdown(head, rows)}\nComparisons: {len(rows)}. "
            f"Trainings that broke: {', '.join(broken) or 'none'}.\n")


def maximizer(_):
    """The inner loss at the end of attacks of several lengths, in % of the best of 100 steps."""
    rows = []
    for run in json.loads((NUMBERS / "analyse.json").read_text()):
        unit = run["best of 100"] / 100
        name = run["run"].replace("/gaussian/", " ")
        best = f"{run['best of 100']:.3f}"
        for attack, loss in run["loss"].items():
            shares = [f"{loss[n - 1] / unit:.1f} ± {run['error'][attack][n - 1] / unit:.1f}"
                      for n in LENGTHS]
            rows.append([name, attack, *shares, best])
            name = best = ""  # so that they are shown once
    return markdown(["run", "attack", *LENGTHS, "best of 100"], rows)


KINDS = {"full": full, "near-x": partial(full, starts=["gaussian"], least=3), "pairs": pairs,
         "maximizer": maximizer}


def fill(match):
    """The new content of a pair of markers, such as <!-- table mnist full -->."""
    target, _, kind = match[1].rpartition(" ")
    if kind not in KINDS:
        sys.exit(f"table.py: there is no table {match[1]}, but a {', '.join(KINDS)} of a target")
    return f"<!-- table {match[1]} -->\n{KINDS[kind](target)}\n<!-- end -->"


def draw(path):
    """Draw a dot for each MNIST training of the rows with three seeds or more, under PGD-10 and
    under the judge, and a line for their means."""
    from matplotlib.figure import Figure
    rows = {label(*key): runs for key, runs in group("runs.jsonl", "mnist").items()
            if len(runs) >= 3}
    figure = Figure(figsize=(9, 0.8 + 0.4 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for name, color, legend in (("pgd-10", "C7", "under PGD-10"), ("judge", "C0", "judge")):
        for i, runs in enumerate(rows.values()):
            scores = [100 * line["accuracy"][name] for line in runs.values()]
            ax.plot(scores, [i] * len(scores), "o", color=color, alpha=0.6, label=legend)
            ax.plot(mean(scores), i, "|", color=color, markersize=22, markeredgewidth=2)
            legend = None  # so that a color is named once
    ax.set(xlabel="robust accuracy (%)", ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), list(rows))
    ax.legend()
    figure.savefig(path, dpi=100)


if sys.argv[1:] not in (["--check"], ["--write"], ["--figure"]):
    sys.exit("table.py: say --check, --write or --figure")
if "--figure" in sys.argv:
    draw(HERE / "verdict.png")
    sys.exit()
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
