"""The lead against the budget: robust accuracy under the referee, by training steps and by seconds. Needs matplotlib.

    python3 results/budget.py results/mnist budget.png    # of its folders 16000x3, 59000x3 …: training images, epochs
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from table import read

STYLES = {"advtrain": "C0--o", "rnn-adv": "C0-o", "trades": "C1:s", "trades-mi": "C1--s", "rnn-trades": "C1-s"}
BATCH = 64


def points(folder):
    """{method: [(steps, seconds, mean, standard deviation)]}, a point per schedule."""
    result = {method: [] for method in STYLES}
    for schedule in sorted(Path(folder).glob("*x*"), key=lambda path: [*map(int, path.name.split("x"))]):
        images, epochs = map(int, schedule.name.split("x"))
        for method, runs in read(schedule, "referee").items():
            if method in STYLES:
                accuracy = [100 * run["accuracy"]["worst"] for run in runs.values()]
                logs = [(schedule / f"{method}-s{seed}.log.jsonl").read_text().splitlines() for seed in runs]
                seconds = mean(sum(json.loads(row)["seconds"] for row in log) for log in logs)
                result[method].append((epochs * (images // BATCH), seconds, mean(accuracy),
                                       stdev(accuracy) if len(accuracy) > 1 else 0.0))
    return result


if __name__ == "__main__":
    figure = Figure(figsize=(9, 4), layout="constrained")
    for ax, column, label in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("training steps", "seconds, one thread")):
        for method, found in points(sys.argv[1]).items():
            ax.errorbar([each[column] for each in found], [each[2] for each in found], [each[3] for each in found],
                        fmt=STYLES[method], label=method, capsize=3)
        ax.set(xscale="log", xlabel=label)
    figure.axes[0].set(ylabel="left by the referee, in %")
    figure.axes[0].legend()
    figure.savefig(sys.argv[2], dpi=110)
