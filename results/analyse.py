"""What the learned optimizers of runs do, and how high attacks drive the inner loss of each run.

The loss is that of the method, cross-entropy or KL. All attacks start from the same points near x.
The best fixed step of PGD is the one of five that reaches the highest loss on other test images
than those reported. A line search takes three more forward passes per gradient. "Best of 100" is
each image's highest loss under PGD-100, with steps of eps/4 or decaying, and all attacks of ten
steps. Errors are standard errors, over the images, of a loss's distance to it.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import load_dataset, pgd
from l2l_adv import METHODS, LearnedOptimizer, learned_attack, load_run, normalize_gradient

SHARES = {"eps/8": 1 / 8, "eps/4": 1 / 4, "eps/3": 1 / 3, "eps/2": 1 / 2, "eps": 1.0}
U = torch.linspace(-4, 4, 65)  # an input of m_φ: the gradient over its mean absolute value


class FixedStep(torch.nn.Module):
    """PGD's step of eps/4 in place of m_φ."""

    def forward(self, u, state=None):
        return u.sign() / 4, state


@torch.no_grad()
def unroll(optimizer, inputs):
    """The steps δ_t in units of eps for inputs u_t, (N,) each. Returns (T, N)."""
    steps = []
    state = None
    for u in inputs:
        delta, state = optimizer(u, state)
        steps.append(delta)
    return torch.stack(steps)


def behavior(optimizer, model, x, y, **settings):
    """The mean |δ_t| of an attack, and the share of pixels where δ_t and δ_{t−1} have opposite
    signs. Where the gradient is zero, PGD does not step: on MNIST at many pixels."""
    torch.manual_seed(0)
    trace = []
    learned_attack(model, optimizer, x, y, trace=trace, **settings)
    steps = unroll(optimizer, [normalize_gradient(g) for _, g in trace])
    turns = (steps[1:] * steps[:-1] < 0).double().mean(1)
    return {"length": steps.abs().mean(1).tolist(), "turns": [None, *turns.tolist()]}


def analyse(folder, limit):
    """Return the numbers of a run."""
    model, optimizer, settings = load_run(folder)
    eps = settings.eps
    data = load_dataset(settings.dataset)
    x, x_other = (data.x_test[:2 * limit].float() / 255).split(limit)
    y, y_other = data.y_test[:2 * limit].split(limit)
    objective = METHODS[settings.method][0]()

    @torch.no_grad()
    def losses(attack, x=x, y=y):  # at the end of the attack, (N,)
        torch.manual_seed(0)
        x_adv = attack(model, x=x, y=y, eps=eps, objective=objective)
        return objective.inner_loss(model(x_adv), objective.target(model, x, y)).double()

    ends = {"PGD, best fixed step": []}
    best = []
    for steps in range(1, 11):
        fixed = {name: partial(pgd, step_size=share * eps, steps=steps)
                 for name, share in SHARES.items()}
        best.append(max(fixed, key=lambda name: losses(fixed[name], x_other, y_other).mean()))
        ends["PGD, best fixed step"].append(losses(fixed[best[-1]]))
    decaying = partial(pgd, step_size=eps, decay=True)
    attacks = {"PGD, decaying step": decaying,
               "PGD, line search": partial(pgd, step_size=eps, line_search=True)}
    if optimizer:
        attacks["learned"] = partial(learned_attack, optimizer=optimizer)
    for name, attack in attacks.items():
        ends[name] = [losses(partial(attack, steps=steps)) for steps in range(1, 11)]
    hundred = torch.stack([losses(partial(pgd, step_size=eps / 4, steps=100)),
                           losses(partial(decaying, steps=100)),
                           *(each[-1] for each in ends.values())]).amax(0)
    result = {"run": "/".join(Path(folder).parts[-3:]),  # mnist/gaussian/rnn-adv-s0
              "images": limit, "best fixed step": best, "best of 100": hundred.mean().item(),
              "loss": {name: [end.mean().item() for end in each] for name, each in ends.items()},
              "error": {name: [(hundred - end).std().item() / limit ** 0.5 for end in each]
                        for name, each in ends.items()}}
    if optimizer:
        of = partial(behavior, model=model, x=x, y=y, eps=eps, objective=objective)
        result.update(response=unroll(optimizer, [U] * 10).tolist(),
                      learned=of(optimizer), fixed=of(FixedStep()))
        torch.manual_seed(0)
        untrained = LearnedOptimizer(cell=optimizer.cell)
        result["untrained"] = unroll(untrained, [U] * 10).tolist()
    return result


def draw(path, results):
    """A row of panels for each run with a learned optimizer."""
    from matplotlib.figure import Figure
    results = [result for result in results if "learned" in result]
    figure = Figure(figsize=(14, 3.4 * len(results)), layout="constrained")
    for result, axes in zip(results, figure.subplots(len(results), 4, squeeze=False)):
        axes[0].plot([-4, 0, 0, 4], [-1, -1, 1, 1], "k-", linewidth=0.8, label="sign(u)")
        axes[0].plot(U, result["untrained"][9], "C7-", label="untrained, t = 9")
        for t, style in ((0, "C0:"), (3, "C0--"), (9, "C0-")):
            axes[0].plot(U, result["response"][t], style, label=f"learned, t = {t}")
        axes[0].set(title=result["run"], xlabel="u, the same since t = 0", ylabel="step / eps")
        for ax, what, label in ((axes[1], "length", "mean |step| / eps"),
                                (axes[2], "turns", "share of pixels that turn back")):
            ax.plot(result["fixed"][what], "k-s", label="PGD, eps/4")
            ax.plot(result["learned"][what], "C0-o", label="learned")
            ax.set(xlabel="t", ylabel=label, ylim=(0, None))
        for (name, loss), style in zip(result["loss"].items(), ("k-s", "C1-^", "C2-v", "C0-o")):
            axes[3].errorbar(range(1, 11), loss, result["error"][name], fmt=style, label=name)
        axes[3].axhline(result["best of 100"], color="k", linestyle=":", label="best of 100 steps")
        axes[3].set(xlabel="gradients of the attack", ylabel="inner loss at its end")
        for ax in axes:
            ax.legend(fontsize="small", loc="lower right" if ax is axes[0] else "best")
    figure.savefig(path, dpi=100)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("runs", nargs="+", help="folders made by l2l_adv.py train")
parser.add_argument("--limit", type=int, default=500, help="test images; default 500")
parser.add_argument("--json", metavar="FILE", required=True)
parser.add_argument("--figure", metavar="FILE.png", help="needs matplotlib")
args = parser.parse_args()
results = [analyse(folder, args.limit) for folder in args.runs]
Path(args.json).write_text("[" + ",\n".join(map(json.dumps, results)) + "]\n")
if args.figure:
    draw(args.figure, results)
