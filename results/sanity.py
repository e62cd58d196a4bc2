"""How far to trust a run's accuracies: is the gradient masked, and do stronger attacks break more images?

    python3 results/sanity.py runs/* [--limit 256]
    python3 results/sanity.py runs/* --judge referee autoattack    # instead: what is left of the images

Accuracies in %, PGD with steps of eps/4. The questions are those of Athalye et al. (2018, arXiv 1802.00420) and Carlini
et al. (2019, arXiv 1902.06705). A model that fails one may be less robust than its table says.
"""
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import AdvTrain, InputError, Margin, evaluate, input_gradient, pgd, start_point, under_attack
from l2l_adv import as_program, named_attacks, write_whole
from results.runs import load, parser

JUDGES = {"autoattack": ("apgd-ce", "apgd-t", "fab-t", "square"),  # what an image has to survive
          "referee": ("apgd-ce", "apgd-t3", "learned-10", "sharp-10", "square-8th")}


def not_above(a, b):
    """Whether accuracy a is at most accuracy b, but for noise: of the images on which the two differ, a's surplus is
    within two standard deviations of a coin's (McNemar). a, b: (N,), who is right."""
    up, down = (a & ~b).sum().item(), (b & ~a).sum().item()
    return up - down <= 2 * (up + down) ** 0.5


def checks(run, others):
    """Yields (question, whether it went well, {name: (N,), which images}). others: runs of the same data."""
    def right(attack):
        return under_attack(run.model, run.x, run.y, attack, run.batch_size)[0]  # (N,)

    def attacked(steps, eps=run.settings.eps, share=1 / 4, source=run.model):
        return right(lambda _, x, y: pgd(source, x, y, eps=eps, step_size=share * eps, steps=steps))

    by_steps = {f"{steps} steps": attacked(steps) for steps in (5, 10, 20, 50, 100)}
    masks, pgd_10, one = list(by_steps.values()), by_steps["10 steps"], attacked(1, share=1)
    yield "more steps do not raise accuracy", all(map(not_above, masks[1:], masks)), by_steps
    yield "iterations beat one step", not_above(pgd_10, one), {"one step of eps": one, "PGD-10": pgd_10}
    natural, noise = right(lambda _, x, y: x), right(lambda _, x, y: start_point(x, run.settings.eps, "uniform"))
    rare = 2 * (natural & ~noise).sum() < (natural & ~pgd_10).sum()
    yield "noise breaks less than half as much as PGD-10", rare, {"natural": natural, "noise": noise, "PGD-10": pgd_10}
    large = min(8 * run.settings.eps, 0.99)
    fallen = attacked(50, eps=large)
    yield "accuracy falls below 5 % as eps grows", fallen.double().mean() < 0.05, {f"{255 * large:.3g}/255": fallen}
    zero = torch.cat([(input_gradient(run.model, x, AdvTrain(), y)[0] == 0).flatten(1).all(1)
                      for x, y in zip(run.x.split(run.batch_size), run.y.split(run.batch_size))])  # (N,)
    yield "at most 1 % of the gradients are all zero", zero.double().mean() <= 0.01, {"zero": zero}
    for other in others:
        transferred = attacked(10, source=other.model)
        yield (f"PGD-10 made on {other.folder} is no stronger", not_above(pgd_10, transferred),
               {"transferred": transferred, "white box": pgd_10})


def autoattack(eps, seed):
    """{name: attack}, as `evaluate` takes them: the four of the standard AutoAttack (Croce & Hein 2020, arXiv
    2003.01690), and apgd-t3, apgd-t to three classes in place of nine, and square-8th. Raises InputError."""
    try:
        from torchattacks import APGD, APGDT, FAB, Square
    except ImportError:
        raise InputError("this needs a package: python3 -m pip install --no-deps torchattacks scipy") from None
    budget = {"eps": eps, "seed": seed}

    def square(model, x, y):
        return Square(model, **budget, n_queries=5000)(x, y).detach()

    return {"apgd-ce": lambda model, x, y: APGD(model, **budget, steps=100)(x, y).detach(),
            "apgd-t": lambda model, x, y: APGDT(model, **budget, steps=100)(x, y).detach(),
            "apgd-t3": lambda model, x, y: APGDT(model, **budget, steps=100, n_classes=4)(x, y).detach(),
            "fab-t": lambda model, x, y: FAB(model, **budget, steps=100, multi_targeted=True)(x, y).detach(),
            "square": square, "square-8th": least_sure(square, eps, seed)}


def least_sure(attack, eps, seed):
    """`attack` on the eighth of a batch that 20 shrinking steps of PGD bring nearest to another class. Of the images
    that gradients leave, Square breaks such ones, and takes 5,000 passes for each."""
    @torch.no_grad()
    def attack_some(model, x, y):
        torch.manual_seed(seed)
        logits = model(pgd(model, x, y, eps=eps, step_size=eps, steps=20, decay=True))
        near = Margin().inner_loss(logits, y).argsort(descending=True)[:math.ceil(len(x) / 8)]
        x_adv = x.clone()
        x_adv[near] = attack(model, x[near], y[near])
        return x_adv
    return attack_some


def sanity(args):
    runs, _ = load(args)
    theirs = autoattack(runs[0].settings.eps, args.seed) if args.judge else {}  # all runs have one eps
    for run in runs:
        print(run.folder)
        torch.manual_seed(args.seed)
        if args.judge:
            for name in args.judge:
                judge(name, run, theirs, args.checkpoint)
        else:
            for question, passed, masks in checks(run, [other for other in runs if other is not run]):
                numbers = ", ".join(f"{name} {100 * mask.double().mean():.2f}" for name, mask in masks.items())
                print(f"  {'pass' if passed else 'FAIL'}  {question}: {numbers}", flush=True)


def judge(name, run, theirs, checkpoint):
    """Print what is left after each of the judge's attacks. Write it, and which images are broken, to NAME.json in the
    run's folder."""
    attacks = {**theirs, **named_attacks(("learned-10", "sharp-10"), run.settings.eps, run.optimizer)}
    attacks = {each: attacks[each] for each in JUDGES[name] if each in attacks}
    accuracy, _, survives = evaluate(run.model, run.x, run.y, attacks, run.batch_size, details=True, quick=True)
    print(f"        {name}, what is left after each: "
          + ", ".join(f"{each} {100 * accuracy[each]:.2f}" for each in ("natural", *attacks)), flush=True)
    result = {"images": len(run.x), "checkpoint": checkpoint, "seed": run.seed, "training_seed": run.settings.seed,
              "accuracy": accuracy, "broken": (~survives).nonzero()[:, 0].tolist()}
    write_whole(Path(run.folder, f"{name}.json"), (json.dumps(result) + "\n").encode())


def main(argv=None):
    command = parser("sanity.py", __doc__.splitlines()[0], sanity)
    command.add_argument("--judge", choices=JUDGES, nargs="+", default=(), help="only these; each writes NAME.json")
    return as_program(command.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
