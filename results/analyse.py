"""What the learned optimizer of trained runs does, and how high attacks drive the inner loss.

The loss is that of the run's method, cross-entropy or KL. All attacks start from the same points
near x. "Best fixed" is PGD with the one of five step sizes that reaches the highest loss on other
test images than those reported. A line search takes three more forward passes per gradient.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import InputError, load_dataset, pgd
from l2l_adv import METHODS, learned_attack, load_run, normalize_gradient

SHARES = {"eps/8": 1 / 8, "eps/4": 1 / 4, "eps/3": 1 / 3, "eps/2": 1 / 2, "eps": 1.0}
U = torch.linspace(-4, 4, 65)  # an input of m_φ: the gradient over its mean absolute value
T = range(10)


class FixedStep(torch.nn.Module):
    """PGD's step of eps/4 in place of m_φ."""

    def forward(self, u, state=None):
        return u.sign() / 4, state


@torch.no_grad()
def response(optimizer):
    """The steps δ_t in units of eps, t = 0 … 9, where every input since t = 0 was the same u."""
    steps = []
    state = None
    for _ in T:
        delta, state = optimizer(U, state)
        steps.append(delta.tolist())
    return steps


@torch.no_grad()
def behavior(optimizer, model, x, y, eps, objective):
    """The mean |δ_t| of an attack, and the share of pixels where δ_t and δ_{t−1} differ in sign."""
    trace = []
    learned_attack(model, optimizer, x, y, eps=eps, objective=objective, trace=trace)
    lengths = []
    changes = []
    before = torch.zeros(x.numel())
    state = None
    for g in trace[1:]:
        delta, state = optimizer(normalize_gradient(g), state)
        lengths.append(delta.abs().mean().item())
        changes.append((before * delta < 0).double().mean().item())
        before = delta
    return {"length": lengths, "sign changes": changes}


def analyse(folder, args):
    """Return the numbers of a run."""
    model, optimizer, settings = load_run(folder)
    eps = settings.eps
    data = load_dataset(settings.dataset, args.data_dir)
    x, x_other = (data.x_test[:2 * args.limit].float() / 255).split(args.limit)
    y, y_other = data.y_test[:2 * args.limit].split(args.limit)
    objective = METHODS[settings.method][0]()

    @torch.no_grad()
    def losses(attack, x=x, y=y):  # at the end of the attack, (N,)
        torch.manual_seed(0)
        x_adv = attack(model, x=x, y=y, eps=eps, objective=objective)
        return objective.inner_loss(model(x_adv), objective.target(model, x, y)).double()

    curves = {}
    best = []
    for steps in [t + 1 for t in T]:
        fixed = {name: partial(pgd, step_size=share * eps, steps=steps)
                 for name, share in SHARES.items()}
        best.append(max(fixed, key=lambda name: losses(fixed[name], x_other, y_other).mean()))
        attacks = {"PGD, best fixed step": fixed[best[-1]],
                   "PGD, decaying step": partial(pgd, step_size=eps, steps=steps, decay=True),
                   "PGD, line search": partial(pgd, step_size=eps, steps=steps, line_search=True)}
        if optimizer:
            attacks["learned"] = partial(learned_attack, optimizer=optimizer, steps=steps)
        for name, attack in attacks.items():
            curves.setdefault(name, []).append(losses(attack))
    ten = curves["PGD, best fixed step"][-1]
    hundred = torch.stack([ten, losses(partial(pgd, step_size=eps / 4, steps=100)),
                           losses(partial(pgd, step_size=eps, steps=100, decay=True))]).amax(0)
    run = f"{settings.dataset} {settings.start} {settings.method} s{settings.seed}"
    result = {"run": run, "images": len(x), "best fixed": best, "maximizer": {
        name: {"mean": [each.mean().item() for each in curve],
               "error": [each.std().item() / len(x) ** 0.5 for each in curve],
               "minus best fixed": (curve[-1] - ten).mean().item(),
               "its error": (curve[-1] - ten).std().item() / len(x) ** 0.5}
        for name, curve in curves.items()}, "pgd-10": ten.mean().item(),
        "best of 100": hundred.mean().item()}
    if optimizer:
        attack = partial(behavior, model=model, x=x, y=y, eps=eps, objective=objective)
        result.update(u=U.tolist(), response=response(optimizer), learned=attack(optimizer),
                      fixed=attack(FixedStep()))
    return result


def draw(path, results):
    """A row of panels for each run with a learned optimizer."""
    from matplotlib.figure import Figure
    results = [result for result in results if "response" in result]
    figure = Figure(figsize=(14, 3.4 * len(results)), layout="constrained")
    for result, row in zip(results, figure.subplots(len(results), 4, squeeze=False)):
        for t, style in ((0, "C0-"), (3, "C0--"), (9, "C0:")):
            row[0].plot(U, result["response"][t], style, label=f"learned, t = {t}")
        row[0].plot(U, U.sign(), "k-", linewidth=0.8, label="sign(u)")
        row[0].set(title=result["run"], xlabel="input u, the same at every t", ylabel="step / eps")
        for ax, what in ((row[1], "length"), (row[2], "sign changes")):
            ax.plot(T, result["learned"][what], "C0-o", label="learned")
            ax.plot(T, result["fixed"][what], "k-s", label="PGD, eps/4")
            ax.set(xlabel="t", ylim=(0, None))
        row[1].set(ylabel="mean |step| / eps")
        row[2].set(ylabel="share of pixels that turn")
        for (name, curve), style in zip(result["maximizer"].items(), ("k-s", "C1-^", "C2-v", "C0-o")):
            row[3].errorbar([t + 1 for t in T], curve["mean"], curve["error"], fmt=style, label=name)
        row[3].set(xlabel="gradients of the attack", ylabel="final inner loss")
        for ax in row:
            ax.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders made by l2l_adv.py train")
    parser.add_argument("--limit", type=int, default=500, help="test images; default 500")
    parser.add_argument("--json", metavar="FILE", required=True)
    parser.add_argument("--figure", metavar="FILE.png", help="needs matplotlib")
    parser.add_argument("--data-dir")
    args = parser.parse_args()
    try:
        results = [analyse(folder, args) for folder in args.runs]
    except (InputError, OSError) as error:
        print(f"analyse.py: {error}", file=sys.stderr)
        return 2
    Path(args.json).write_text("".join(json.dumps(result) + "\n" for result in results))
    if args.figure:
        draw(args.figure, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
