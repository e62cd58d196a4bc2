"""Two figures of the reports. They need matplotlib.

    python3 results/figures.py budget results/mnist budget.png    # the lead against the budget: folders IMAGESxEPOCHS
    python3 results/figures.py epochs results/cifar10/epochs.json epochs.png    # of `analyse.py` on keep.py's folders
"""
import json
import sys
from pathlib import Path
from statistics import mean, median, stdev

from matplotlib.figure import Figure

from analyse import BY_HAND
from table import read

PAIRS = ("advtrain-decay", "rnn-adv", "C0", "o"), ("trades-decay", "rnn-trades", "C1", "s")
BATCH = 64


def points(folder):
    """{method: {training steps: (seconds, {seed: accuracy in %})}}, a point per schedule."""
    result = {}
    for schedule in sorted(Path(folder).glob("[0-9]*x*"), key=lambda path: [*map(int, path.name.split("x"))]):
        images, epochs = map(int, schedule.name.split("x"))
        for method, runs in read(schedule, "referee").items():
            logs = [(schedule / f"{method}-s{seed}.log.jsonl").read_text().splitlines() for seed in runs]
            seconds = mean(sum(json.loads(row)["seconds"] for row in log) for log in logs)
            left = {seed: 100 * run["accuracy"]["worst"] for seed, run in runs.items()}
            result.setdefault(method, {})[epochs * (images // BATCH)] = seconds, left
    return result


def budget(figure, folder):
    """What the referee leaves, by training steps and by seconds; and the lead of each learned run over its twin."""
    by_steps, by_seconds, lead = figure.subplots(1, 3)
    found = points(folder)
    for by_hand, learned, color, marker in PAIRS:
        for method, line in (by_hand, "--"), (learned, "-"):
            seconds, left = zip(*found[method].values())
            for ax, x in (by_steps, found[method]), (by_seconds, seconds):
                whiskers(ax, x, [[*each.values()] for each in left], color + line + marker, method)
        gains = {}  # {training steps: [points, a number per seed that both have]}
        for steps in sorted(found[learned].keys() & found[by_hand].keys()):
            (_, ours), (_, theirs) = found[learned][steps], found[by_hand][steps]
            gains[steps] = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
            lead.plot([steps] * len(gains[steps]), gains[steps], color + marker, alpha=0.5)
        lead.plot([*gains], [*map(median, gains.values())], color, label=f"{learned} over {by_hand}, median")
    lead.axhline(0, color="k", linewidth=1)
    for ax, label in (by_steps, "training steps"), (by_seconds, "seconds, one thread"), (lead, "training steps"):
        ax.set(xscale="log", xlabel=label, xticks=[125, 250, 500, 1000, 2000])
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.minorticks_off()
        ax.legend()
    by_steps.set(ylabel="left by the referee, in %")
    lead.set(ylabel="lead, in points")


def whiskers(ax, x, values, style, label):
    """Mean ± standard deviation of each of the `values`."""
    ax.errorbar([*x], [*map(mean, values)], [stdev(each) if len(each) > 1 else 0 for each in values], fmt=style,
                label=label, capsize=3)


def epochs(figure, path):
    """By how much an attack passes ten steps of PGD in inner loss, by epoch; a panel per run."""
    runs = {}
    for folder, found in json.loads(Path(path).read_text())["step"].items():
        run, _, epoch = folder.rpartition("/epoch-")
        runs.setdefault(run, {})[int(epoch)] = found["by step"]
    shown = (("PGD after 100", "pgd", "100", "C0--"), ("the best by hand after 10", BY_HAND, "10", "C1-s"),
             ("learned after 10", "learned", "10", "k-o"), ("sharp after 10", "sharp", "10", "k:^"))
    for ax, (run, by_epoch) in zip(figure.subplots(1, len(runs), sharey=True, squeeze=False)[0], runs.items()):
        for label, kind, t, style in shown:
            gains = [100 * max(losses[t] for name, losses in each.items() if name.startswith(kind))
                     / max(losses["10"] for name, losses in each.items() if name.startswith("pgd")) - 100
                     for each in by_epoch.values()]
            ax.plot(list(by_epoch), gains, style, label=label)
        ax.axhline(0, color="C0", label="PGD after 10, best step")
        ax.set(title=run, xlabel="epoch", ylabel="inner loss above PGD-10's, in %")
    figure.axes[0].legend()


if __name__ == "__main__":
    kind, source, target = sys.argv[1:]
    figure = Figure(figsize=(12, 4), layout="constrained")
    {"budget": budget, "epochs": epochs}[kind](figure, source)
    figure.savefig(target, dpi=110)
