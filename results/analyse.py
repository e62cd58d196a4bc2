"""The paper's analyses of trained runs: how well the learned optimizer maximises, compared with others.

    python3 results/analyse.py runs/* --json analyses.json --figures figures
    python3 results/analyse.py runs/rnn-adv --only step,longer    # there is also transfer

Test images; the inner loss that each run was trained with, in `transfer` cross-entropy. Only figures need matplotlib.
"""
import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import AdvTrain, InputError, Trades, evaluate, input_gradient, pgd
from l2l_adv import SHARP, as_program, last_gradient, learned_attack, write_whole
from results.runs import load, parser

BY_HAND = "momentum", "shrinking", "line"  # how the names of maximisers begin, but for plain PGD's
ANALYSES = "step", "longer", "transfer"
LASTING = "pgd", "shrinking", "learned"  # how the names of those begin that also take 100 steps
T, LONGER = 10, [10, 20, 40, 100]  # the steps trained for; and longer attacks


def maximisers(run):
    """{name: callable(x, y, steps=, objective=) → x'}."""
    eps, result = run.settings.eps, {}
    for name, size in ("eps/8", eps / 8), ("eps/4", eps / 4), ("eps/2", eps / 2):
        result[f"pgd {name}"] = partial(pgd, run.model, eps=eps, step_size=size)
    for name, size in ("eps/4", eps / 4), ("eps/2", eps / 2), ("eps", eps):
        result[f"momentum {name}"] = partial(pgd, run.model, eps=eps, step_size=size, momentum=True)
    result["shrinking from eps"] = partial(pgd, run.model, eps=eps, step_size=eps, decay=True)
    result["line search, 4 passes a step"] = partial(pgd, run.model, eps=eps, step_size=eps, line_search=True)
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
    """The inner losses at x'_0 … x'_steps of an attack of so many steps, and who is right, 1 or 0: (steps + 1, N)."""
    losses, right = [], []
    for x, y in batches(run):
        recorder = Recorder(run.objective, y)
        x_adv = attack(x, y, steps=steps, objective=recorder)
        last_gradient(run.model, x, x_adv, y, recorder)  # so that it sees x'_steps too
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


def step(run):
    """(a) Mean inner loss at t = 0 … T, and, of those that are LASTING, at the end of 100 steps."""
    attacks = maximisers(run)
    losses = {name: climb(run, attack, T)[0] for name, attack in attacks.items()}  # (T + 1, N) each
    lasting = {name: climb(run, attack, 100)[0][-1] for name, attack in attacks.items() if name.startswith(LASTING)}
    rows = {name: [*each.mean(1), lasting[name].mean()] if name in lasting else each.mean(1)
            for name, each in losses.items()}
    kind = "KL(f(x) || f(x'))" if isinstance(run.objective, Trades) else "cross-entropy"
    by_step = table(f"(a) {run.folder}: inner loss ({kind}) after t gradients", [*range(T + 1), 100], rows)
    ends = {name: each[T] for name, each in losses.items()}
    return {"loss": kind, "by step": by_step, "verdict": verdict(ends, lasting) if run.optimizer else None}


def verdict(ends, lasting):
    """Who is ahead after T steps, and after 100, in mean loss; the standard error is that of the difference, image by
    image. ends, lasting: {name: (N,)}."""
    result, by_hand = {}, ("pgd", *BY_HAND)
    for ours, t, after_t, rivals in (("learned", T, ends, by_hand), ("learned", 100, lasting, "pgd"),
                                     ("sharp", T, ends, by_hand)):
        best = max((name for name in after_t if name.startswith(rivals)), key=lambda name: after_t[name].mean())
        gain = ends[ours] - after_t[best]
        numbers = {"difference": gain.mean().item(), "error": gain.std().item() / len(gain) ** 0.5}
        result[f"{ours}-{T} over {best}-{t}"] = numbers
        print("{}-{} over {}-{}: {:+.2g}, standard error {:.2g}".format(ours, T, best, t, *numbers.values()))
    return result


def longer(run):
    """(b) Mean inner loss, and accuracy, after attacks of more steps than were trained for."""
    columns = [f"{steps} {what}" for what in ("loss", "acc.") for steps in LONGER]
    attacks, rows = maximisers(run), {}
    for name in "pgd eps/4", "shrinking from eps", "learned":
        ends = [climb(run, attacks[name], steps) for steps in LONGER]
        rows[name] = [part[-1].mean() for parts in zip(*ends) for part in parts]  # losses, then who is right
    return table(f"(b) {run.folder}: run for longer, inner loss and accuracy", columns, rows)


def transfer(run, runs):
    """(c) Accuracy of all runs on attacks made on this one, with cross-entropy."""
    rows = {}
    for name in ("pgd eps/4", "learned") if run.optimizer else ("pgd eps/4",):
        x_adv = torch.cat([maximisers(run)[name](x, y, steps=T) for x, y in batches(run)])  # (N, C, H, W)
        rows[name] = [evaluate(each.model, x_adv, run.y, {}, run.batch_size)["natural"] for each in runs]
    return table(f"(c) {run.folder}: accuracy of runs on {T} steps made on it", [each.folder for each in runs], rows)


def draw_steps(ax, run, result):
    """PGD at its best step, the best of the others by hand, and the learned optimizer."""
    lines = {name: list(losses.values()) for name, losses in result["step"][run.folder]["by step"].items()}
    kinds = (("pgd",), "C0-"), (BY_HAND, "C1-s"), (("learned",), "k-o"), (("sharp",), "k:^")
    for kind, style in kinds:
        for name in sorted((name for name in lines if name.startswith(kind)), key=lambda name: lines[name][T])[-1:]:
            ax.plot(lines[name][:T + 1], style, linewidth=2, label=name)
    start, lasting = lines["pgd eps/4"][0], max(lines[name][-1] for name in lines if name.startswith("pgd"))
    ax.axhline(lasting, color="C0", linestyle="--", label="pgd after 100")
    top = max(lasting, *(losses[T] for losses in lines.values()))
    ax.legend(loc="lower right")
    ax.set(xlabel="gradients", ylabel="inner loss", ylim=(start, start + 1.05 * (top - start)))


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
    figures = {"surface": ("Mean cross-entropy around x; dashed: the eps-ball", draw_surface),
               **({"inner-loss": ("How far ten gradients climb", draw_steps)} if "step" in result else {})}
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
        for name in args.only:
            if run.optimizer or name in ("step", "transfer"):
                analysis = {"step": step, "longer": longer, "transfer": partial(transfer, runs=runs)}[name]
                result[name][run.folder] = analysis(run)
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
