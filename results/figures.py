"""Two figures of the reports. They need matplotlib.

    python3 results/figures.py budget results/mnist budget.png    # the lead against the budget: folders IMAGESxEPOCHS
    python3 results/figures.py epochs results/cifar10/epochs.json epochs.png    # of `analyse.py` on keep.py's folders
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from analyse import BY_HAND
from table import read

STYLES = {"advtrain-decay": "C0--o", "rnn-adv": "C0-o", "trades-decay": "C1--s", "rnn-trades": "C1-s"}
BATCH = 64


def points(folder):
    """{method: [(steps, seconds, mean, standard deviation)]}, a point per schedule."""
    result = {method: [] for method in STYLES}
    for schedule in sorted(Path(folder).glob("[0-9]*x*"), key=lambda path: [*map(int, path.name.split("x"))]):
        images, epochs = map(int, schedule.name.split("x"))
        for method, runs in read(schedule, "referee").items():
            if method in STYLES:
                accuracy = [100 * run["accuracy"]["worst"] for run in runs.values()]
                logs = [(schedule / f"{method}-s{seed}.log.jsonl").read_text().splitlines() for seed in runs]
                seconds = mean(sum(json.loads(row)["seconds"] for row in log) for log in logs)
                result[method].append((epochs * (images // BATCH), seconds, mean(accuracy),
                                       stdev(accuracy) if len(accuracy) > 1 else 0.0))
    return result


def budget(figure, folder):
    """Robust accuracy under the referee, by training steps and by seconds."""
    for ax, column, label in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("training steps", "seconds, one thread")):
        for method, found in points(folder).items():
            ax.errorbar([each[column] for each in found], [each[2] for each in found], [each[3] for each in found],
                        fmt=STYLES[method], label=method, capsize=3)
        ax.set(xscale="log", xlabel=label)
    figure.axes[0].set(ylabel="left by the referee, in %")
    figure.axes[0].legend()


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
    figure = Figure(figsize=(9, 4), layout="constrained")
    {"budget": budget, "epochs": epochs}[kind](figure, source)
    figure.savefig(target, dpi=110)
