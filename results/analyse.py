"""The paper's analyses of trained runs: how well the learned optimizer maximises, and what it does.

    python3 results/analyse.py runs/* --json analyses.json --figures figures
    python3 results/analyse.py runs/rnn-adv --only step,behaviour             # there are also longer and transfer

Test images; the inner loss that each run was trained with, in `transfer` cross-entropy. Only figures need matplotlib.
"""
import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import AdvTrain, InputError, Trades, evaluate, input_gradient, pgd, project, sign, start_point
from l2l_adv import SHARP, as_program, learned_attack, write_whole
from results.runs import load, parser

ANALYSES = "step", "longer", "transfer", "behaviour"
T, LONGER = 10, [10, 20, 40, 100]  # the steps trained for; and those to read the longer attacks at


@torch.no_grad()
def momentum(model, x, y, *, eps, step_size, steps, objective):
    """MI-FGSM (Dong et al. 2018, arXiv 1710.06081): the sign of the gathered gradients, each over its L1 norm."""
    target, x_adv, gathered = objective.target(model, x, y), start_point(x, eps), torch.zeros_like(x)
    for _ in range(steps):
        g, _ = input_gradient(model, x_adv, objective, target)  # (B, C, H, W)
        gathered += g / g.abs().sum((1, 2, 3), keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        x_adv = project(x_adv + step_size * sign(gathered), x, eps)
    return x_adv


def maximisers(run):
    """{name: callable(x, y, steps=, objective=) → x'}."""
    eps, result = run.settings.eps, {}
    for name, size in ("eps/8", eps / 8), ("eps/4", eps / 4), ("eps/2", eps / 2):
        result[f"pgd {name}"] = partial(pgd, run.model, eps=eps, step_size=size)
    for name, size in ("eps/4", eps / 4), ("eps/2", eps / 2), ("eps", eps):
        result[f"momentum {name}"] = partial(momentum, run.model, eps=eps, step_size=size)
    result["line search"] = partial(pgd, run.model, eps=eps, step_size=eps, line_search=True)
    if run.optimizer:
        result["learned"] = partial(learned_attack, run.model, run.optimizer, eps=eps)
        result["sharp"] = partial(result["learned"], gain=SHARP)
    return result


def batches(run):
    """(x, y) batch by batch, the random state set anew at each: every attack starts from the same x'_0."""
    for i, batch in enumerate(zip(run.x.split(run.batch_size), run.y.split(run.batch_size))):
        torch.manual_seed(run.seed + i)
        yield batch


class Recorder:
    """An objective that keeps, at every gradient that an attack computes, the losses and who is right, (B,) each."""

    def __init__(self, objective, y):
        self.objective, self.target, self.y, self.losses, self.right = objective, objective.target, y, [], []

    def inner_loss(self, logits, target):
        loss = self.objective.inner_loss(logits, target)
        if logits.requires_grad:  # a line search also asks without
            self.losses.append(loss.detach())
            self.right.append(logits.argmax(1) == self.y)
        return loss


def climb(run, attack, steps):
    """The inner losses at x'_0 … x'_steps, and who is right there, as 1 or 0: (steps + 1, N) each."""
    losses, right = [], []
    for x, y in batches(run):
        recorder = Recorder(run.objective, y)
        attack(x, y, steps=steps + 1, objective=recorder)  # its last gradient is at x'_steps
        losses.append(torch.stack(recorder.losses))
        right.append(torch.stack(recorder.right))
    return torch.cat(losses, 1).double().cpu(), torch.cat(right, 1).double().cpu()


def table(title, columns, rows):
    """Print rows {name: numbers}, which may differ in length. Returns {name: {column: number}}."""
    first, width = max(map(len, rows)), max(10, *(len(str(column)) + 2 for column in columns))
    print(f"\n{title}\n{'':{first}}" + "".join(f"{column:>{width}}" for column in columns))
    for name, numbers in rows.items():
        print(f"{name:{first}}" + "".join(f"{number:{width}.4g}" for number in numbers), flush=True)
    return {name: dict(zip(map(str, columns), map(float, numbers))) for name, numbers in rows.items()}


def step(run, climbs):
    """(a) Mean inner loss at t = 0 … T, and after 100 steps of the attacks that went on."""
    means = {name: losses.mean(1).tolist() for name, (losses, _) in climbs.items()}
    kind = "KL(f(x) || f(x'))" if isinstance(run.objective, Trades) else "cross-entropy"
    losses = table(f"(a) {run.folder}: inner loss ({kind}) after t gradients", [*range(T + 1), 100],
                   {name: each[:T + 1] + each[T + 1:][-1:] for name, each in means.items()})
    return {"loss": kind, "by step": losses, "verdict": verdict(climbs) if run.optimizer else None}


def verdict(climbs):
    """The paper's claim on one run: T learned steps (not `sharp`) reach a higher loss than T of any attack by hand, and
    than 100 of PGD's. The standard error is that of the difference, image by image."""
    ours, result, margins = climbs["learned"][0][T], {}, []  # (N,)
    for when, t, rivals in ("after 10", T, ("pgd", "momentum", "line")), ("after 100", 100, ("pgd",)):
        theirs = {name: losses[t] for name, (losses, _) in climbs.items() if name.startswith(rivals)}
        best = max(theirs, key=lambda name: theirs[name].mean())
        gain, error = (ours - theirs[best]).mean().item(), (ours - theirs[best]).std().item() / len(ours) ** 0.5
        margins.append(gain / max(error, 1e-12))
        result[when] = {"best": best, "loss": theirs[best].mean().item(), "difference": gain, "error": error}
        print(f"{T} learned steps {ours.mean():.4g}, the best by hand {when} {theirs[best].mean():.4g} ({best}): "
              f"difference {gain:+.2g}, standard error {error:.2g}")
    claim = "holds" if min(margins) > 2 else "does not hold" if min(margins) < -2 else "is within two standard errors"
    print(f"verdict: that {T} learned steps beat {T} of any by hand and 100 of PGD {claim}", flush=True)
    return {"claim": claim, **result}


def longer(run, climbs):
    """(b) Mean inner loss, and accuracy, after each number of steps in LONGER."""
    columns = [f"{t} {what}" for what in ("loss", "acc.") for t in LONGER]
    rows = {name: torch.cat([each[LONGER].mean(1) for each in climbs[name]]) for name in ("learned", "pgd eps/4")}
    return table(f"(b) {run.folder}: run for longer, inner loss and accuracy", columns, rows)


def transfer(run, runs):
    """(c) Accuracy of all runs on attacks made on this one, with cross-entropy."""
    rows = {}
    for name in ("pgd eps/4", "learned") if run.optimizer else ("pgd eps/4",):
        x_adv = torch.cat([maximisers(run)[name](x, y, steps=T) for x, y in batches(run)])  # (N, C, H, W)
        rows[name] = [evaluate(each.model, x_adv, run.y, {}, run.batch_size)["natural"] for each in runs]
    return table(f"(c) {run.folder}: accuracy of runs on {T} steps made on it", [each.folder for each in runs], rows)


@torch.no_grad()
def behaviour(run):
    """(d) At t = 1 … T: the mean |δ_t| in units of eps; the share of coordinates of x'_t on the boundary; and the share
    with sign(δ_t) = sign(g_{t−1}) among those with g_{t−1} ≠ 0."""
    calls, points, sums, eps = [], [], torch.zeros(4, T, dtype=torch.float64), run.settings.eps
    hooks = (run.optimizer.register_forward_hook(lambda _, args, output: calls.append((args[0], output[0]))),
             run.model.register_forward_pre_hook(lambda _, args: points.append(args[0])))
    for x, y in batches(run):
        learned_attack(run.model, run.optimizer, x, y, eps=eps, steps=T + 1, objective=run.objective)
        u, delta = (torch.stack(each) for each in zip(*calls[:T]))  # (T, N); sign(u) is sign(g)
        x_adv = torch.stack(points[-T:])  # x'_1 … x'_T: (T, B, C, H, W)
        # A black pixel that never moved counts too: it lies on the box's face at 0. 1e-6: ten times fp32's rounding.
        on = (x_adv <= (x - eps).clamp(min=0) + 1e-6) | (x_adv >= (x + eps).clamp(max=1) - 1e-6)
        parts = delta.abs(), on.flatten(1), (delta.sign() == u.sign()) & (u != 0), u != 0
        sums += torch.stack([part.double().sum(1).cpu() for part in parts])
        del calls[:], points[:]
    for hook in hooks:
        hook.remove()
    length, boundary, same, nonzero = sums
    rows = {"mean |delta| / eps": length / run.x.numel(), "on the boundary": boundary / run.x.numel(),
            "agrees with sign(g)": same / nonzero.clamp(min=1)}
    return table(f"(d) {run.folder}: the learned optimizer at step t", range(1, T + 1), rows)


def draw_steps(ax, run, result):
    """The best attack of each kind, the upper part of the climb."""
    lines = {name: list(losses.values()) for name, losses in result["step"][run.folder]["by step"].items()}
    for kind, style in ("pgd", "C0-"), ("momentum", "C1-x"), ("line", "C2-s"), ("learned", "k-o"), ("sharp", "k--^"):
        for name in sorted((name for name in lines if name.startswith(kind)), key=lambda name: lines[name][T])[-1:]:
            ax.plot(lines[name][:T + 1], style, label=name)
    start, top = lines[name][0], max(map(max, lines.values()))
    ax.axhline(max(losses[-1] for losses in lines.values() if losses[T + 1:]), color="grey", label="the best after 100")
    ax.legend(loc="lower right")
    ax.set(xlabel="gradients t", ylabel="inner loss", ylim=(0.5 * (start + top), 1.02 * top))


def draw_images(ax, run, _):
    """Four images, what the run's own attack makes of them, and the change."""
    x, y = run.x[:4], run.y[:4]
    x_adv = maximisers(run)["learned" if run.optimizer else "pgd eps/4"](x, y, steps=T)
    columns = torch.cat([x, x_adv, (x_adv - x) / (2 * run.settings.eps) + 0.5], 2)  # (4, C, 3H, W)
    ax.imshow(torch.cat([*columns], 2).permute(1, 2, 0).expand(-1, -1, 3).clamp(0, 1).cpu())  # (3H, 4W, 3)
    ax.set(xticks=[x.shape[3] * (i + 0.5) for i in range(len(x))], yticks=[], xlabel="class → answer",
           xticklabels=[f"{true}→{answer}" for true, answer in zip(y.tolist(), run.model(x_adv).argmax(1).tolist())])


@torch.no_grad()
def draw_surface(ax, run, _):
    """Mean cross-entropy of 64 images at x + eps·(a·sign(g) + b·r), clipped to [0, 1]."""
    x, y, shares = run.x[:64], run.y[:64], torch.linspace(-1.5, 1.5, 15)
    r = torch.randint_like(x, 2) * 2 - 1  # (B, C, H, W), like g
    g, _ = input_gradient(run.model, x, AdvTrain(), y)
    points = [[(x + run.settings.eps * (a * g.sign() + b * r)).clamp(0, 1) for a in shares] for b in shares]
    loss = [[AdvTrain().inner_loss(run.model(point), y).mean().item() for point in row] for row in points]
    ax.contourf(shares, shares, loss, 12, cmap="Greys", alpha=0.6)
    ax.clabel(ax.contour(shares, shares, loss, 12, colors="k", linewidths=0.7))
    ax.plot([1, 0, -1, 0, 1], [0, 1, 0, -1, 0], "C1--", linewidth=2.5)  # |a| + |b| = 1: eps, where the signs agree
    ax.set(xlabel="along sign(g), in eps", ylabel="along a random sign, in eps")


def draw(folder, about, runs, result):
    """A panel for each run. Readable in grey: lines differ in style or marker too."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("analyse.py: no figures without matplotlib: python3 -m pip install matplotlib", file=sys.stderr)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    figures = {"images": ("Clean, attacked, change", draw_images),
               "surface": ("Mean cross-entropy around x; dashed: the eps-ball", draw_surface),
               **({"inner-loss": ("The best attack of each kind", draw_steps)} if "step" in result else {})}
    for name, (title, draw_panel) in figures.items():
        figure = Figure(figsize=(4 * len(runs) + 1, 4.4), layout="constrained")
        for run, ax in zip(runs, figure.subplots(1, len(runs), squeeze=False)[0]):
            torch.manual_seed(run.seed)
            draw_panel(ax, run, result)
            ax.set_title(run.folder)
        figure.suptitle(f"{title}\n{about}")
        figure.savefig(f"{folder}/{name}.png", dpi=110)


def analyse(args):
    if not {*args.only} <= {*ANALYSES}:
        raise InputError(f"--only takes some of {','.join(ANALYSES)}, not {','.join(args.only)}")
    runs, about = load(args)
    result = {name: {} for name in args.only}
    for run in runs:
        climbs = {name: climb(run, attack, 100 if name.startswith(("pgd", "learned")) else T)  # 100 take the time
                  for name, attack in maximisers(run).items() if {"step", "longer"} & {*args.only}}
        analyses = {"step": partial(step, climbs=climbs), "longer": partial(longer, climbs=climbs),
                    "transfer": partial(transfer, runs=runs), "behaviour": behaviour}
        for name in args.only:
            if run.optimizer or name in ("step", "transfer"):
                result[name][run.folder] = analyses[name](run)
    if args.json:
        write_whole(args.json, (json.dumps({"about": about, **result}, indent=1) + "\n").encode())
    if args.figures:
        draw(args.figures, about, runs, result)


def main(argv=None):
    command = parser("analyse.py", __doc__.splitlines()[0], analyse)
    command.add_argument("--only", default=ANALYSES, type=lambda text: text.split(","), metavar="NAME,NAME")
    command.add_argument("--json", metavar="FILE", help="write all the numbers to this file")
    command.add_argument("--figures", metavar="DIR", help="draw figures into this folder; needs matplotlib")
    return as_program(command.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
