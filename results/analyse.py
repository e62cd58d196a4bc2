"""The paper's analyses of trained runs: how well the learned optimizer maximises, and what it does.

    python results/analyse.py runs/*                                    # every table
    python results/analyse.py runs/rnn-adv --only step,behaviour        # some of them
    python results/analyse.py runs/* --json analyses.json --figures figures

(a) step       the inner loss after every step: PGD, its variants and the learned optimizer (also sharp: W_out times 10),
               on each run's classifier
(b) longer     the learned optimizer run for more steps than the T = 10 it was trained for
(c) transfer   attacks made on one run's classifier, tested on another's
(d) behaviour  how long the learned steps are, how often they follow sign(g), how much of x' lies on the boundary

Test images; cross-entropy or TRADES' KL as inner loss, whichever the run was trained with; (c) is cross-entropy
throughout. All attacks start from the same noise. Figures need matplotlib, which nothing else here does.

[1] Dong et al., Boosting Adversarial Attacks with Momentum, CVPR 2018, arXiv 1710.06081
"""
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
from l2l_adv import (LEARNED, Parser, as_program, learned_attack, make_objective, pick_device, positive, seed, sharpened,
                     write_whole)
from results import figures
from results.evaluate import load_runs

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


# ---- Inner maximisers: a rule takes (here, state) → (the move proposed, the next state), as m_φ does ----------------

class Here(NamedTuple):
    """Where an attack stands. x, x_adv, g (B, C, H, W): the images, x'_t and g_t; losses (B,) at x'_t."""
    model: nn.Module
    objective: AdvTrain
    target: torch.Tensor
    eps: float
    x: torch.Tensor
    x_adv: torch.Tensor
    g: torch.Tensor
    losses: torch.Tensor


def fixed_step(share):
    """PGD with step size share·eps."""
    return lambda here, _: (share * here.eps * here.g.sign(), None)


def line_search(here, _):
    """PGD, each step found by backtracking from eps: three forward passes a step on top of the gradient."""
    model, objective, target, eps, x, x_adv, g, losses = here
    return backtrack(model, x_adv, x, g, losses, objective, target, eps, step_size=eps) - x_adv, None


def momentum(share, decay=1.0):
    """MI-FGSM [1]: the sign of the gathered gradients, each divided by its image's L1 norm. The start is everyone's."""
    def rule(here, gathered):
        norm = here.g.abs().sum((1, 2, 3), keepdim=True).clamp(min=torch.finfo(here.g.dtype).tiny)  # (B, 1, 1, 1)
        gathered = here.g / norm + (0 if gathered is None else decay * gathered)
        return share * here.eps * gathered.sign(), gathered
    return rule


def learned(optimizer):
    """The paper's: δ_t is in units of eps."""
    def rule(here, state):
        delta, state = optimizer(here.g, state)
        return here.eps * delta, state
    return rule


@torch.no_grad()
def trajectory(model, x, y, rule, *, eps, steps, objective):
    """One attack step by step: yields (x'_t, losses, g_t, the move proposed there) for t = 0 … steps; at the end the
    last two are None. Losses (B,), all else (B, C, H, W). To reach x'_t takes t gradients."""
    with eval_mode(model):
        target = objective.target(model, x, y)
        x_adv, state = start_point(x, eps), None
        for _ in range(steps):
            g, losses = input_gradient(model, x_adv, objective, target)
            move, state = rule(Here(model, objective, target, eps, x, x_adv, g, losses), state)
            yield x_adv, losses, g, move
            x_adv = project(x_adv + move, x, eps)
        yield x_adv, objective.inner_loss(model(x_adv), target), None, None


@torch.no_grad()
def climb(run, images, rule, steps):
    """The inner loss by step and image, (steps + 1, N), and the accuracy after each number of steps in LONGER."""
    losses, right = [], {t: 0 for t in LONGER if t <= steps}
    for x, y in images.batches():
        losses.append([])
        path = trajectory(run.model, x, y, rule, eps=images.eps, steps=steps, objective=run.objective)
        for t, (x_adv, loss, _, _) in enumerate(path):
            losses[-1].append(loss)
            if t in right:
                right[t] += (run.model(x_adv).argmax(1) == y).sum().item()
    losses = torch.cat([torch.stack(batch) for batch in losses], 1).double().cpu().numpy()  # (steps + 1, N)
    return losses, {t: n / len(images.x) for t, n in right.items()}


def maximisers(run, only):
    """{name: (rule, steps)} for the analyses in `only`. 100 steps are what takes the time, so only PGD and the learned
    optimizer go on so long. Momentum also gets a step of eps, its best one on `synthetic`."""
    rules = {f"pgd {name}": (fixed_step(share), LONGER[-1]) for name, share in STEP_SIZES.items()}
    rules["line search"] = line_search, T
    rules |= {f"momentum {name}": (momentum(share), T) for name, share in {**STEP_SIZES, "eps": 1}.items()}
    if run.optimizer is not None:
        rules |= {"learned": (learned(run.optimizer), LONGER[-1]), "sharp": (learned(sharpened(run.optimizer)), T)}
    if "step" not in only:
        both = ("pgd eps/4", "learned") if "longer" in only and run.optimizer is not None else ()
        rules = {name: rules[name] for name in both}
    return rules


# ---- The analyses: each returns what goes into the JSON file, plain numbers by name ---------------------------------

def step(run, climbs):
    """(a) Mean inner loss at t = 0 … T, and after 100 steps where an attack goes on. climbs: {name: climb(…)}."""
    losses = {name: losses for name, (losses, _) in climbs.items()}
    result = {"loss": run.loss_name, "by step": {name: each[:T + 1].mean(1).tolist() for name, each in losses.items()},
              "after 100": {name: each[-1].mean() for name, each in losses.items() if len(each) > T + 1}}
    return result if run.optimizer is None else {**result, "verdict": verdict(losses)}


def verdict(losses):
    """The paper's claim on one run: T learned steps reach a higher loss than T of any attack by hand, and than 100 of
    PGD's. `sharp` is counted on neither side. Losses are compared image by image, which gives the standard error of the
    mean difference."""
    ours = losses["learned"][T]  # (N,)
    result = {"claim": "holds", "learned": ours.mean()}
    rivals = {"after 10": {name: each[T] for name, each in losses.items() if name not in LEARNED},
              "after 100": {name: each[-1] for name, each in losses.items() if name.startswith("pgd")}}
    for when, rival in rivals.items():
        best = max(rival, key=lambda name: rival[name].mean())
        gain = ours - rival[best]
        error = gain.std() / max(len(gain) - 1, 1) ** 0.5
        result[when] = {"best": best, "loss": rival[best].mean(), "difference": gain.mean(), "error": error}
        if gain.mean() < -2 * error:
            result["claim"] = "does not hold"
        elif gain.mean() <= 2 * error and result["claim"] == "holds":
            result["claim"] = "is undecided, within two standard errors"
    return result


def longer(climbs):
    """(b) Mean inner loss and accuracy after each number of steps in LONGER."""
    return {name: {"loss": [climbs[name][0][t].mean() for t in LONGER], "accuracy": list(climbs[name][1].values())}
            for name in ("learned", "pgd eps/4")}


def attacks(run, eps):
    """The run's T-step attacks on cross-entropy, {name: callable(x, y) → x_adv}."""
    result = {f"pgd-{T}": lambda x, y: pgd(run.model, x, y, eps=eps, step_size=eps / 4, steps=T)}
    if run.optimizer is not None:
        result[f"learned-{T}"] = lambda x, y: learned_attack(run.model, run.optimizer, x, y, eps=eps, steps=T)
    return result


def transfer(runs, images):
    """(c) {"source's label, attack": {target's label: accuracy}}."""
    result = {}
    for source in runs:
        for name, attack in attacks(source, images.eps).items():
            x_adv = torch.cat([attack(x, y) for x, y in images.batches()])  # (N, C, H, W)
            result[f"{source.label} {name}"] = {
                run.label: evaluate(run.model, x_adv, images.y, {}, images.batch_size)["natural"] for run in runs}
    return result


def behaviour(run, images):
    """(d) Three lists over t = 1 … T: the mean |δ_t| in units of eps; the share of coordinates of x'_t on the boundary;
    and the share with sign(δ_t) = sign(g_{t−1}) among those with g_{t−1} ≠ 0."""
    length, boundary, same, nonzero = np.zeros((4, T))
    for x, y in images.batches():
        # On the boundary: at the lower or the upper end of what ball and box allow. The tolerance is ten times the
        # rounding of x ± eps in fp32. A black pixel that never moved counts too: it lies on the box's face at 0.
        lower, upper = (x - images.eps).clamp(min=0) + 1e-6, (x + images.eps).clamp(max=1) - 1e-6
        path = trajectory(run.model, x, y, learned(run.optimizer), eps=images.eps, steps=T, objective=run.objective)
        for t, (x_adv, _, g, move) in enumerate(path):
            if t > 0:
                boundary[t - 1] += ((x_adv <= lower) | (x_adv >= upper)).sum().item()
            if t < T:  # δ_{t+1} of the paper's count from 1
                length[t] += move.abs().double().sum().item() / images.eps
                same[t] += ((move.sign() == g.sign()) & (g != 0)).sum().item()
                nonzero[t] += (g != 0).sum().item()
    n = images.x.numel()
    return {"mean |delta| / eps": (length / n).tolist(), "on the boundary": (boundary / n).tolist(),
            "agrees with sign(g)": (same / nonzero.clip(min=1)).tolist()}


# ---- Tables ---------------------------------------------------------------------------------------------------------

def table(title, columns, rows, width=9):
    """Print a title and rows {name: texts}, the columns right-aligned."""
    first = max(map(len, rows))
    print(f"\n{title}")
    for name, cells in [("", columns), *rows.items()]:
        print(f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)


def print_step(label, result, about):
    best = max(result["by step"], key=lambda name: result["by step"][name][T])
    digits = 4 if result["by step"][best][T] >= 0.1 else 5
    after = {name: f"{loss:.{digits}f}" for name, loss in result["after 100"].items()}
    rows = {name: [*(f"{loss:.{digits}f}" for loss in losses), after.get(name, "-")]
            for name, losses in result["by step"].items()}
    rows[best][T] += "*"
    table(f"(a) {label}: inner loss ({result['loss']}) after t gradients; * the highest after {T}\n{about}",
          [*range(T + 1), 100], rows)
    if "verdict" in result:
        v = result["verdict"]
        print(f"{T} learned steps: {v['learned']:.{digits}f}")
        for what, r in (f"{T} by hand", v["after 10"]), ("100 of PGD", v["after 100"]):
            print(f"the best {what}: {r['loss']:.{digits}f} ({r['best']}); learned minus this: "
                  f"{r['difference']:+.{digits}f}, standard error {r['error']:.{digits}f}")
        print(f"verdict: that {T} learned steps beat {T} of any by hand and 100 of PGD {v['claim']}", flush=True)


def print_longer(by_run, about):
    rows = {f"{label} {name}": [*(f"{loss:.5f}" for loss in r["loss"]), *(f"{100 * a:.2f}" for a in r["accuracy"])]
            for label, by_name in by_run.items() for name, r in by_name.items()}
    table(f"(b) The learned optimizer run for longer: each run's own inner loss, and accuracy in %\n{about}",
          [*(f"loss {t}" for t in LONGER), *(f"acc {t}" for t in LONGER)], rows, 10)


def print_transfer(by_attack, about):
    labels = list(next(iter(by_attack.values())))
    rows = {attack: [f"{100 * accuracy:.2f}" for accuracy in row.values()] for attack, row in by_attack.items()}
    table(f"(c) Transfer: accuracy in % of the column's run on attacks made on the row's, with cross-entropy\n{about}",
          labels, rows, max(map(len, labels)) + 3)


def print_behaviour(label, by_quantity, about):
    table(f"(d) {label}: the learned optimizer at step t\n{about}", range(1, T + 1),
          {quantity: [f"{value:.3f}" for value in values] for quantity, values in by_quantity.items()})


# ---- What the figures show ------------------------------------------------------------------------------------------

def pictures(runs, images, n=8):
    """Rows of the picture grid, (name, images (n, C, H, W), n captions): the first n images and their classes, and for
    each run what its own attack (PGD, if it has no optimizer) makes of them, its answers, and the difference."""
    x, y = images.x[:n], images.y[:n]
    rows = [("clean", x, y.tolist())]
    for run in runs:
        name, attack = list(attacks(run, images.eps).items())[-1]
        torch.manual_seed(images.seed)
        x_adv = attack(x, y)
        with torch.no_grad():
            rows.append((f"{run.label}\n{name}", x_adv, run.model(x_adv).argmax(1).tolist()))
        rows.append(("difference", (x_adv - x) / (2 * images.eps) + 0.5, [""] * n))
    return rows


@torch.no_grad()
def surface(run, images, shares):
    """Mean cross-entropy at x + eps·(a·sign(g) + b·r), clipped to [0, 1]: row b, column a, both in `shares`."""
    x, y, objective = images.x[:64], images.y[:64], AdvTrain()
    torch.manual_seed(images.seed)
    r = torch.randint_like(x, 2) * 2 - 1  # (B, C, H, W), like g
    with eval_mode(run.model):
        g, _ = input_gradient(run.model, x, objective, y)
        return [[objective.inner_loss(run.model((x + images.eps * (a * g.sign() + b * r)).clamp(0, 1)), y).mean().item()
                 for a in shares] for b in shares]


def read_log(run):
    """The rows of the run's log.jsonl, one per epoch; none if it has no log."""
    path = run.folder / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError:
        raise InputError(f"{path} is damaged: a line is not JSON") from None


# ---- The command line -----------------------------------------------------------------------------------------------

def runs_of(folders, which, device):
    """The runs of one call → [Run], and the settings of the first."""
    loaded = load_runs(folders, which, device, same=("dataset", "eps"))
    return [Run(run.label, run.settings.method, run.model, run.optimizer, make_objective(run.settings), run.folder)
            for run in loaded], loaded[0].settings


def analyse(runs, images, only, about):
    """Do and print the analyses in `only` → {analysis: results}."""
    result = {name: {} for name in only}
    for run in runs:
        climbs = {name: climb(run, images, *rule) for name, rule in maximisers(run, only).items()}
        if "step" in only:
            result["step"][run.label] = step(run, climbs)
            print_step(run.label, result["step"][run.label], about)
        if "longer" in only and run.optimizer is not None:
            result["longer"][run.label] = longer(climbs)
    if {"longer", "behaviour"} & {*only} and all(run.optimizer is None for run in runs):
        print("\nno run has a learned optimizer: (b) and (d) are left out")
    if result.get("longer"):
        print_longer(result["longer"], about)
    if "transfer" in only:
        result["transfer"] = transfer(runs, images)
        print_transfer(result["transfer"], about)
    for run in runs:
        if "behaviour" in only and run.optimizer is not None:
            result["behaviour"][run.label] = behaviour(run, images)
            print_behaviour(run.label, result["behaviour"][run.label], about)
    return result


def work(args):
    for name in args.only:
        if name not in ANALYSES:
            raise InputError(f"unknown analysis {name!r}: choose from {', '.join(ANALYSES)}")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        raise InputError(f"cannot write {args.json}: it is a folder, or its folder is missing")
    if args.figures and not figures.plt:
        print("analyse.py: no figures without matplotlib: python3 -m pip install matplotlib", file=sys.stderr)
        args.figures = None
    device = pick_device(args.device)
    runs, settings = runs_of(args.runs, args.checkpoint, device)
    data = load_dataset(settings.dataset, args.data_dir or settings.data_dir)
    images = Images(to_unit(data.x_test[:args.limit]).to(device), data.y_test[:args.limit].to(device), settings.eps,
                    args.seed, args.batch_size)
    if args.figures:  # what can go wrong with these should do so now, not after the analyses
        logs, folder = {run.label: read_log(run) for run in runs}, Path(args.figures)
        folder.mkdir(parents=True, exist_ok=True)
    about = (f"{settings.dataset}, eps = {settings.eps * 255:g}/255, the first {len(images.x)} test images, "
             f"{args.checkpoint} checkpoint, seed {args.seed}")
    result = {"dataset": settings.dataset, "eps": settings.eps, "images": len(images.x), "checkpoint": args.checkpoint,
              "seed": args.seed, "batch_size": args.batch_size, "runs": {run.label: run.method for run in runs},
              **analyse(runs, images, args.only, about)}
    if args.json:
        write_whole(args.json, (json.dumps(result, indent=1) + "\n").encode())
    if args.figures:
        if "step" in args.only:
            figures.draw_steps(result["step"], about, folder)
        figures.draw_training(logs, folder)
        figures.draw_images(pictures(runs, images), about, folder)
        shares = np.linspace(-1.5, 1.5, 15).tolist()
        figures.draw_surfaces({run.label: surface(run, images, shares) for run in runs}, shares,
                              f"{min(64, len(images.x))} images", about, folder)


def main(argv=None):
    """The command line; returns the exit status."""
    parser = Parser(prog="analyse.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders, all of one data set and eps")
    parser.add_argument("--limit", type=positive, default=256, help="the first so many test images; default 256")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--data-dir", help="where the data lies; default as in training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--batch-size", type=positive, default=256)
    parser.add_argument("--only", type=lambda text: text.split(","), default=ANALYSES, help="e.g. step,transfer")
    parser.add_argument("--json", metavar="FILE", help="write all the numbers to this file")
    parser.add_argument("--figures", metavar="DIR", help="draw figures into this folder; needs matplotlib")
    return as_program("analyse.py", work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
