"""The paper's analyses of trained runs: how well the learned optimizer maximises, and what it does.

    python results/analyse.py runs/*                                    # every table
    python results/analyse.py runs/rnn-adv --only step,behaviour        # some of them
    python results/analyse.py runs/* --json analyses.json --figures figures

(a) step       the inner loss after every step: PGD, its variants and the learned optimizer, on each run's classifier
(b) longer     the learned optimizer run for more steps than the T = 10 it was trained for
(c) transfer   attacks made on one run's classifier, tested on another's
(d) behaviour  how long the learned steps are, how often they follow sign(g), how much of x' lies on the boundary

Test images; cross-entropy or TRADES' KL as inner loss, whichever the run was trained with; (c) is cross-entropy
throughout. All attacks start from the same noise. Figures need matplotlib, which nothing else here does.

[1] Dong et al., Boosting Adversarial Attacks with Momentum, CVPR 2018, arXiv 1710.06081
"""
import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import (AdvTrain, InputError, Trades, backtrack, eval_mode, evaluate, input_gradient, load_dataset, pgd,
                       project, start_point, to_unit)
from l2l_adv import METHODS, learned_attack, load_run, pick_device, write_whole

ANALYSES = ("step", "longer", "transfer", "behaviour")
T, LONGER = 10, (10, 20, 40, 100)  # the steps trained for; and those to read the longer attacks at
STEP_SIZES = {"eps/8": 1 / 8, "eps/4": 1 / 4, "eps/2": 1 / 2}  # in units of eps


class Run(NamedTuple):
    """One trained classifier, its learned optimizer or None, and the objective it was trained with."""
    label: str
    method: str
    model: nn.Module
    optimizer: nn.Module
    objective: AdvTrain
    folder: Path

    @property
    def loss_name(self):
        return "KL(f(x) || f(x'))" if isinstance(self.objective, Trades) else "cross-entropy"


class Images(NamedTuple):
    """What is attacked: x (N, C, H, W) in [0, 1], y (N,), eps in [0, 1] pixel scale."""
    x: torch.Tensor
    y: torch.Tensor
    eps: float
    seed: int
    batch_size: int

    def batches(self):
        """(x, y) batch by batch, the random state set anew: every attack starts from the same x'_0."""
        torch.manual_seed(self.seed)
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size))


# ---- Inner maximisers. A rule makes, for one batch, propose(x'_t, g_t, losses) → the move before the projection ------

class Batch(NamedTuple):
    """What a rule may look at besides the gradients."""
    model: nn.Module
    x: torch.Tensor
    target: torch.Tensor
    objective: AdvTrain
    eps: float


def fixed_step(share):
    """PGD with step size share·eps."""
    return lambda batch: lambda x_adv, g, loss: share * batch.eps * g.sign()


def line_search(batch):
    """PGD, its step found by backtracking from eps: up to three forward passes a step on top of the gradient."""
    model, x, target, objective, eps = batch
    return lambda x_adv, g, loss: backtrack(model, x_adv, x, g, loss, objective, target, eps, step_size=eps) - x_adv


def momentum(share, decay=1.0):
    """MI-FGSM [1]: the sign of the gathered gradients, each divided by its image's L1 norm."""
    def rule(batch):
        gathered = torch.zeros_like(batch.x)  # (B, C, H, W)

        def propose(x_adv, g, loss):
            norm = g.abs().sum((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
            gathered.mul_(decay).add_(g / norm.clamp(min=torch.finfo(g.dtype).tiny))
            return share * batch.eps * gathered.sign()
        return propose
    return rule


def learned(optimizer):
    """The learned optimizer, from a fresh state."""
    def rule(batch):
        state = None

        def propose(x_adv, g, loss):
            nonlocal state
            delta, state = optimizer(g, state)
            return batch.eps * delta
        return propose
    return rule


@torch.no_grad()
def trajectory(model, x, y, rule, *, eps, steps, objective):
    """One attack step by step: yields (x'_t, losses at x'_t, g_t, the move proposed from there) for t = 0 … steps;
    the last two are None at the end. Losses (B,), all else (B, C, H, W). Every x'_t cost t gradients."""
    with eval_mode(model):
        target = objective.target(model, x, y)
        propose = rule(Batch(model, x, target, objective, eps))
        x_adv = start_point(x, eps)
        for _ in range(steps):
            g, loss = input_gradient(model, x_adv, objective, target)
            move = propose(x_adv, g, loss)
            yield x_adv, loss, g, move
            x_adv = project(x_adv + move, x, eps)
        yield x_adv, objective.inner_loss(model(x_adv), target), None, None


def climb(run, images, rule, steps):
    """The inner loss per step and image, (steps + 1, N), and the accuracy at each t of LONGER that is reached."""
    losses, right = [], dict.fromkeys((t for t in LONGER if t <= steps), 0)
    for x, y in images.batches():
        losses.append([])
        for t, (x_adv, loss, _, _) in enumerate(trajectory(run.model, x, y, rule, eps=images.eps, steps=steps,
                                                           objective=run.objective)):
            losses[-1].append(loss.cpu())
            if t in right:
                with torch.no_grad():
                    right[t] += (run.model(x_adv).argmax(1) == y).sum().item()
    losses = torch.cat([torch.stack(batch) for batch in losses], 1).double().numpy()  # (steps + 1, N)
    return losses, {t: n / len(images.x) for t, n in right.items()}


def maximisers(run):
    """{name: (rule, steps)}. Only PGD and the learned optimizer go on beyond T: 100 steps are what takes the time."""
    rules = {f"pgd {name}": (fixed_step(share), LONGER[-1]) for name, share in STEP_SIZES.items()}
    rules["line search"] = line_search, T
    rules |= {f"momentum {name}": (momentum(share), T) for name, share in STEP_SIZES.items()}
    if run.optimizer is not None:
        rules["learned"] = learned(run.optimizer), LONGER[-1]
    return rules


# ---- The analyses: each returns what goes into the JSON file, plain numbers by name ---------------------------------

def step(run, climbs):
    """(a) Mean inner loss at t = 0 … T, and after 100 steps where an attack went on. climbs: {name: what climb says}."""
    result = {"loss": run.loss_name, "by step": {name: losses[:T + 1].mean(1).tolist() for name, (losses, _) in climbs.items()},
              "after 100": {name: losses[-1].mean() for name, (losses, _) in climbs.items() if len(losses) > T + 1}}
    if run.optimizer is not None:
        result["verdict"] = verdict({name: losses for name, (losses, _) in climbs.items()})
    return result


def verdict(losses):
    """The paper's claim for one run: T learned steps reach a higher loss than T of any hand-made attack, and than 100 of
    PGD. The loss is compared image by image, which gives the standard error of the mean difference."""
    ours = losses["learned"][T]  # (N,)
    result = {"claim": "holds", "learned": ours.mean()}
    rivals = {"after 10": {name: each[T] for name, each in losses.items() if name != "learned"},
              "after 100": {name: each[-1] for name, each in losses.items() if name.startswith("pgd")}}
    for when, rival in rivals.items():
        best = max(rival, key=lambda name: rival[name].mean())
        difference = ours - rival[best]
        error = difference.std() / max(len(ours) - 1, 1) ** 0.5
        result[when] = {"best": best, "loss": rival[best].mean(), "difference": difference.mean(), "error": error}
        if difference.mean() < -2 * error:
            result["claim"] = "does not hold"
        elif difference.mean() <= 2 * error and result["claim"] == "holds":
            result["claim"] = "is undecided (within two standard errors)"
    return result


def longer(run, climbs):
    """(b) Mean inner loss and accuracy after each number of steps in LONGER."""
    return {name: {"loss": [climbs[name][0][t].mean() for t in LONGER], "accuracy": list(climbs[name][1].values())}
            for name in ("learned", "pgd eps/4")}


def transfer(runs, images):
    """(c) {attack: {target's label: accuracy}}; an attack is a source's label and pgd-10 or learned-10."""
    def attacks(run):
        yield "pgd-10", lambda x, y: pgd(run.model, x, y, eps=images.eps, step_size=images.eps / 4, steps=T)
        if run.optimizer is not None:
            yield "learned-10", lambda x, y: learned_attack(run.model, run.optimizer, x, y, eps=images.eps, steps=T)

    result = {}
    for source in runs:
        for name, attack in attacks(source):
            x_adv = torch.cat([attack(x, y) for x, y in images.batches()])
            result[f"{source.label} {name}"] = {
                target.label: evaluate(target.model, x_adv, images.y, {}, images.batch_size)["natural"] for target in runs}
    return result


def behaviour(run, images):
    """(d) Three lists over t = 1 … T: the mean |δ_t| in units of eps; the share of coordinates of x'_t on the boundary;
    and the share with sign(δ_t) = sign(g_{t−1}) among those with g_{t−1} ≠ 0."""
    length, boundary, same, nonzero = np.zeros((4, T))
    for x, y in images.batches():
        # On the boundary: at the lower or upper end of what ball and box allow. The tolerance is ten times the rounding
        # of x ± eps in fp32. A black pixel that never moved counts too: it lies on the face at 0.
        lower, upper = (x - images.eps).clamp(min=0) + 1e-6, (x + images.eps).clamp(max=1) - 1e-6
        for t, (x_adv, _, g, move) in enumerate(trajectory(run.model, x, y, learned(run.optimizer), eps=images.eps, steps=T,
                                                           objective=run.objective)):
            if t > 0:
                boundary[t - 1] += ((x_adv <= lower) | (x_adv >= upper)).sum().item()
            if t < T:
                length[t] += move.abs().double().sum().item() / images.eps
                same[t] += ((move.sign() == g.sign()) & (g != 0)).sum().item()
                nonzero[t] += (g != 0).sum().item()
    n = images.x.numel()
    return {"mean |delta| / eps": (length / n).tolist(), "on the boundary": (boundary / n).tolist(),
            "agrees with sign(g)": (same / nonzero.clip(min=1)).tolist()}


# ---- Tables ---------------------------------------------------------------------------------------------------------

def table(title, columns, rows, width=8):
    """Print a title and rows {name: texts}, the columns right-aligned."""
    first = max(map(len, rows))
    print(f"\n{title}\n" + "\n".join(f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells)
                                     for name, cells in [("", columns), *rows.items()]), flush=True)


def print_step(label, result, about):
    best = max(result["by step"], key=lambda name: result["by step"][name][T])
    rows = {name: [*(f"{loss:.4f}" for loss in losses[:T]), f"{losses[T]:.4f}{'*' if name == best else ' '}",
                   f"{result['after 100'][name]:.4f}" if name in result["after 100"] else "-"]
            for name, losses in result["by step"].items()}
    table(f"(a) {label}: inner loss ({result['loss']}) after t gradients; * the highest at t = {T}\n{about}",
          [*map(str, range(T)), f"{T} ", "100"], rows)
    if "verdict" in result:
        v = result["verdict"]
        print(f"{T} learned steps reach {v['learned']:.4f}. " + "; ".join(
            f"the best {what} reach {r['loss']:.4f} ({r['best']}), difference {r['difference']:+.4f}, standard error "
            f"{r['error']:.4f}" for what, r in ((f"{T} by hand", v["after 10"]), ("100 of PGD", v["after 100"]))))
        print(f"{label}: the claim that {T} learned steps find more than {T} of any other attack and 100 of PGD {v['claim']}")


def print_tables(result, about):
    """(b), (c) and (d); (a) is printed run by run."""
    if result.get("longer"):
        rows = {f"{label} {name}": [*(f"{loss:.4f}" for loss in r["loss"]), *(f"{100 * a:.2f}" for a in r["accuracy"])]
                for label, by_name in result["longer"].items() for name, r in by_name.items()}
        table(f"(b) Run for more steps than the {T} of training: each run's inner loss, then accuracy in %\n{about}",
              [*(f"loss {t}" for t in LONGER), *(f"acc {t}" for t in LONGER)], rows, 10)
    if "transfer" in result:
        rows = {attack: [f"{100 * a:.2f}" for a in by_target.values()] for attack, by_target in result["transfer"].items()}
        columns = list(next(iter(result["transfer"].values())))
        table(f"(c) Transfer: accuracy in % of each column's run on attacks made on the row's (cross-entropy)\n{about}",
              columns, rows, max(map(len, columns), default=0) + 3)
    for label, by_quantity in result.get("behaviour", {}).items():
        rows = {quantity: [f"{value:.3f}" for value in values] for quantity, values in by_quantity.items()}
        table(f"(d) {label}: what the learned optimizer does at step t\n{about}", range(1, T + 1), rows)


# ---- Figures --------------------------------------------------------------------------------------------------------

def pyplot():
    """matplotlib.pyplot drawing to files, or None after one line that says how to get it."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        return plt
    except ImportError:
        print("analyse.py: no figures without matplotlib: python3 -m pip install matplotlib", file=sys.stderr)


def save_figure(plt, figure, title, path):
    figure.suptitle(title)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)
    print(path)


def panels(plt, n, rows=1):
    """A figure with n columns of panels, flat where there is one row."""
    figure, axes = plt.subplots(rows, n, figsize=(max(3.2 * n, 6), 3.4 * rows + 0.6), squeeze=False, layout="constrained")
    return figure, axes[0] if rows == 1 else axes


STYLES = {"pgd eps/8": "C0:", "pgd eps/4": "C0-", "pgd eps/2": "C0--", "line search": "C2-.", "momentum eps/8": "C1:",
          "momentum eps/4": "C1-", "momentum eps/2": "C1--", "learned": "k-o"}


def draw_steps(plt, steps, about, folder):
    figure, axes = panels(plt, len(steps))
    for ax, (label, result) in zip(axes, steps.items()):
        top = max(result["after 100"].values())
        for name, losses in result["by step"].items():
            ax.plot(range(T + 1), [100 * loss / top for loss in losses], STYLES[name], markersize=4, label=name)
        ax.set(title=f"{label} ({result['loss']})", xlabel="gradients t", ylim=(85, 101.5), xlim=(0.5, T + 0.2))
    axes[0].set_ylabel("inner loss, % of the highest after 100 steps")
    axes[-1].legend(fontsize=8)
    save_figure(plt, figure, f"How fast each attack climbs the inner loss\n{about}", folder / "inner-loss.png")


def draw_training(plt, logs, folder):
    figure, axes = panels(plt, len(logs), rows=2)
    keys = [{"natural": "k-o", "pgd-10": "C0--s"}, {"loss": "k-o", "pgd-10 loss": "C0--s", "learned-10 loss": "C1:^"}]
    for column, (label, log) in zip(axes.T, logs.items()):
        for ax, styles in zip(column, keys):
            for key, style in styles.items():
                if log and key in log[-1]:
                    scale = 100 if key in keys[0] else 1
                    points = [(row["epoch"], scale * row[key]) for row in log if key in row]
                    ax.plot(*zip(*points), style, markersize=4, label="outer loss in training" if key == "loss" else key)
            ax.set(xlabel="epoch")
            ax.legend(fontsize=8)
        column[0].set(title=label, ylim=(0, 100))
    axes[0, 0].set_ylabel("accuracy in %, held-out images")
    axes[1, 0].set_ylabel("loss")
    save_figure(plt, figure, "Training, epoch by epoch", folder / "training.png")


def draw_images(plt, runs, images, about, folder, n=8):
    """Clean images, then for each run the attacked ones and the magnified difference."""
    batch = next(images._replace(x=images.x[:n], y=images.y[:n]).batches())
    rows = [("clean", batch[0], [""] * n)]
    for run in runs:
        torch.manual_seed(images.seed)
        if run.optimizer is None:
            x_adv = pgd(run.model, *batch, eps=images.eps, step_size=images.eps / 4, steps=T)
        else:
            x_adv = learned_attack(run.model, run.optimizer, *batch, eps=images.eps, steps=T)
        with torch.no_grad():
            guess = [f"{a} → {b}" for a, b in zip(run.model(batch[0]).argmax(1).tolist(), run.model(x_adv).argmax(1).tolist())]
        rows += [(f"{run.label}\n{'pgd' if run.optimizer is None else 'learned'}-{T}", x_adv, guess),
                 ("difference", (x_adv - batch[0]) / (2 * images.eps) + 0.5, [""] * n)]
    figure, axes = plt.subplots(len(rows), n, figsize=(n + 1, 1.15 * len(rows) + 0.8), squeeze=False, layout="constrained")
    for line, (name, shown, titles) in zip(axes, rows):
        for ax, image, title in zip(line, shown, titles):
            ax.imshow(image.permute(1, 2, 0).cpu().clamp(0, 1).expand(-1, -1, 3))  # (H, W, 3)
            ax.set_title(title, fontsize=9)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    save_figure(plt, figure, f"Class before → after the attack; difference: grey is 0, black and white are -eps and +eps\n"
                f"{about}", folder / "images.png")


@torch.no_grad()
def surface(run, images, size=21):
    """Mean cross-entropy at x + a·sign(g) + b·r, clipped to [0, 1]: (size, size), row b, column a, both in ±1.5 eps."""
    objective = AdvTrain()
    x, y = next(images._replace(batch_size=64).batches())
    with eval_mode(run.model):
        g, _ = input_gradient(run.model, x, objective, y)
        r = torch.randint_like(x, 2) * 2 - 1
        span = (1.5 * images.eps * torch.linspace(-1, 1, size)).tolist()
        return np.array([[objective.inner_loss(run.model((x + a * g.sign() + b * r).clamp(0, 1)), y).mean().item()
                          for a in span] for b in span])


def draw_surfaces(plt, runs, images, about, folder):
    figure, axes = panels(plt, len(runs))
    for ax, run in zip(axes, runs):
        loss = surface(run, images)
        span = np.linspace(-1.5, 1.5, len(loss))
        ax.contourf(span, span, loss, 12, cmap="Greys", alpha=0.6)
        ax.clabel(ax.contour(span, span, loss, 12, colors="k", linewidths=0.7), fontsize=7)
        ax.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], "C1--")
        ax.set(title=run.label, xlabel="along sign(g), in eps", aspect="equal")
    axes[0].set_ylabel("along a random sign, in eps")
    save_figure(plt, figure, f"The loss rises along sign(g) and hardly along a random direction: mean cross-entropy of "
                f"{min(64, len(images.x))} images\n{about}", folder / "surface.png")


# ---- The command line -----------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def whole(least):
    """A whole number of at least `least` on the command line."""
    def number(text):
        if not least <= int(text) < 2 ** 63:
            raise ValueError
        return int(text)
    return number


def load_runs(folders, which, device):
    """The runs that one table can hold → [Run], and the settings they share. Raises InputError."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"{folder} is not a run's folder")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise InputError("a run is given twice")
    names = [Path(folder).resolve().name for folder in folders]
    runs, shared = [], []
    for label, folder in zip(names if len(set(names)) == len(names) else folders, folders):
        model, optimizer, settings = load_run(folder, which, device)
        objective = METHODS[settings.method][0]
        objective = Trades(settings.beta) if objective is Trades else objective()
        runs.append(Run(label, settings.method, model, optimizer, objective, Path(folder)))
        shared.append(settings)
    for name in ("dataset", "eps"):
        if len({getattr(settings, name) for settings in shared}) > 1:
            raise InputError(f"these runs differ in {name}: analyse them separately")
    return runs, shared[0]


def read_log(run):
    """The rows of the run's log.jsonl, one per epoch; none if it has no log."""
    path = run.folder / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError:
        raise InputError(f"{path} is damaged: a line is not JSON") from None


def analyse(args):
    device = pick_device(args.device)
    runs, settings = load_runs(args.runs, args.checkpoint, device)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise InputError(f"no folder to write {args.json} into")
    data = load_dataset(settings.dataset, args.data_dir or settings.data_dir)
    x, y = to_unit(data.x_test[:args.limit]).to(device), data.y_test[:args.limit].to(device)
    images = Images(x, y, settings.eps, args.seed, args.batch_size)
    plt = pyplot() if args.figures else None
    if plt:
        logs = {run.label: read_log(run) for run in runs}
        Path(args.figures).mkdir(parents=True, exist_ok=True)
    about = (f"{settings.dataset}, eps = {settings.eps * 255:g}/255, the first {len(x)} test images, {args.checkpoint} "
             f"checkpoint, seed {args.seed}")
    result = {"dataset": settings.dataset, "eps": settings.eps, "images": len(x), "checkpoint": args.checkpoint,
              "seed": args.seed, "batch_size": args.batch_size, "runs": {run.label: run.method for run in runs},
              **{name: {} for name in args.only}}
    for run in runs:
        wanted = maximisers(run) if "step" in args.only else {}
        if "longer" in args.only and run.optimizer is not None:
            wanted = {name: maximisers(run)[name] for name in {**wanted, "pgd eps/4": 0, "learned": 0}}
        climbs = {name: climb(run, images, *rule_and_steps) for name, rule_and_steps in wanted.items()}
        if "step" in args.only:
            result["step"][run.label] = step(run, climbs)
            print_step(run.label, result["step"][run.label], about)
        if run.optimizer is not None:
            if "longer" in args.only:
                result["longer"][run.label] = longer(run, climbs)
            if "behaviour" in args.only:
                result["behaviour"][run.label] = behaviour(run, images)
    if "transfer" in args.only:
        result["transfer"] = transfer(runs, images)
    print_tables(result, about)
    if args.json:
        write_whole(args.json, lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))
    if plt:
        folder = Path(args.figures)
        if "step" in args.only:
            draw_steps(plt, result["step"], about, folder)
        draw_training(plt, logs, folder)
        draw_images(plt, runs, images, about, folder)
        draw_surfaces(plt, runs, images, about, folder)


def main(argv=None):
    """The command line; returns 2 after one clear line for a user's mistake, else None."""
    parser = Parser(prog="analyse.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders, all of one data set and eps")
    parser.add_argument("--limit", type=whole(1), default=256, help="only the first so many test images; default 256")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--data-dir", help="where the data lies; default as in training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--batch-size", type=whole(1), default=256)
    parser.add_argument("--only", default=",".join(ANALYSES), help="some of the analyses: step,longer,transfer,behaviour")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--figures", metavar="DIR", help="draw figures into this folder; needs matplotlib")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    try:
        for name in args.only:
            if name not in ANALYSES:
                raise InputError(f"unknown analysis {name!r}: choose from {', '.join(ANALYSES)}")
        analyse(args)
    except (InputError, OSError) as error:
        print(f"analyse.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
