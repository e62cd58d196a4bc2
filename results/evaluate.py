"""`python l2l_adv.py eval RUNS`: the table of accuracies under attack and, with --sanity, the checks for gradient masking."""
import json
from pathlib import Path
from typing import NamedTuple

import torch

from baselines import (AdvTrain, InputError, check_budget, eval_mode, evaluate, input_gradient, load_dataset, outcome, pgd,
                       start_point, to_unit)
from l2l_adv import (LEARNED, LearnedOptimizer, Parser, Settings, as_program, load_run, named_attack, pick_device, positive,
                     seed, size, write_whole)

STANDARD_ATTACKS = "pgd-10", "pgd-100", "cw-100", "learned-10"  # the paper's


class Loaded(NamedTuple):
    """A trained run: its classifier, and its learned optimizer if it has one."""
    label: str
    folder: Path
    model: torch.nn.Module
    optimizer: LearnedOptimizer
    settings: Settings
    lender: str = None  # the run that it has the learned optimizer from, if that is not its own


def load_runs(folders, which, device, same):
    """The runs of one table, [Loaded]. Raises InputError if they differ in one of the settings `same`."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"{folder} is not a run's folder")
    names = [Path(folder).resolve().name for folder in folders]
    labels = names if len(set(names)) == len(names) else folders
    if len(set(labels)) < len(labels):
        raise InputError("one run is given twice")
    runs = [Loaded(label, Path(folder), *load_run(folder, which, device)) for label, folder in zip(labels, folders)]
    for name in same:
        if len({getattr(run.settings, name) for run in runs}) > 1:
            raise InputError(f"these runs differ in {name}: make separate tables of them")
    return runs


def lend(runs, folder, which, device):
    """The runs, those without a learned optimizer now with the one of the run `folder`. Raises InputError."""
    (lender,) = load_runs([folder], which, device, same=())
    if lender.optimizer is None:
        raise InputError(f"{folder} has no learned optimizer to lend: take an rnn- run")
    return [run if run.optimizer else run._replace(optimizer=lender.optimizer, lender=lender.label) for run in runs]


def autoattack(eps, seed):
    """The standard AutoAttack (Croce & Hein 2020, arXiv 2003.01690), put together from the torchattacks package, as
    `evaluate` takes it. Raises InputError without the package."""
    try:
        from torchattacks import APGD, APGDT, FAB, MultiAttack, Square
    except ImportError:
        raise InputError("--autoattack needs a package: python3 -m pip install --no-deps torchattacks scipy") from None
    budget = {"eps": eps, "seed": seed}

    def attack(model, x, y):  # torchattacks.AutoAttack itself makes 10 steps of each of the first three, not 100
        return MultiAttack([APGD(model, **budget, steps=100), APGDT(model, **budget, steps=100),
                            FAB(model, **budget, steps=100, multi_targeted=True),
                            Square(model, **budget, n_queries=5000)])(x, y).detach()

    return attack


def evaluate_runs(args):
    """A table on stdout, a row per run; the same numbers in each run's eval.json. With --sanity, the checks below."""
    device = pick_device(args.device)
    runs = load_runs(args.runs, args.checkpoint, device, same=("dataset", "eps") if args.eps is None else ("dataset",))
    settings = runs[0].settings
    eps = settings.eps if args.eps is None else args.eps
    check_budget(eps, 1)
    if args.lend:
        runs = lend(runs, args.lend, args.checkpoint, device)
    names = list(dict.fromkeys(args.attacks or STANDARD_ATTACKS))
    for name in names:
        named_attack(name, eps)
        if args.attacks and name.startswith(LEARNED) and all(run.optimizer is None for run in runs):
            raise InputError(f"no run here has a learned optimizer, so no {name}: --lend that of an rnn- run, or leave it out")
    package = {"autoattack": autoattack(eps, args.seed)} if args.autoattack else {}
    data = load_dataset(settings.dataset, args.data_dir or settings.data_dir)
    limit = args.limit or (256 if args.sanity else None)
    x, y = to_unit(data.x_test[:limit]).to(device), data.y_test[:limit].to(device)
    seeds = ", ".join(str(s) for s in sorted({run.settings.seed for run in runs}))
    heading = (f"{settings.dataset}, eps = {eps * 255:g}/255, the first {len(x)} test images, {args.checkpoint} checkpoint, "
               f"training seed {seeds}, attack seed {args.seed}" + f", {args.restarts} restarts" * (args.restarts > 1)
               + "".join({f", with {run.lender}'s learned optimizer where there is none" for run in runs if run.lender}))
    if args.sanity:
        return print_checks(heading, runs, x, y, eps, args)
    columns = ["natural", *([] if args.worst_only else names + list(package)), "worst"]
    width = max(len("  mean loss"), *(len(run.label) for run in runs)) + 2
    print(f"{heading}; accuracy in %, below it the mean cross-entropy\n{'run':{width}}{'model':9}" + row(columns))
    for run in runs:
        attacks = {name: named_attack(name, eps, run.optimizer, args.restarts) for name in names
                   if run.optimizer is not None or not name.startswith(LEARNED)} | package
        torch.manual_seed(args.seed)
        accuracy, loss = evaluate(run.model, x, y, attacks, args.batch_size, args.worst_only, run.label, losses=True)
        print(f"{run.label:{width}}{run.settings.model:9}"
              + row(f"{100 * accuracy[name]:.2f}" if name in accuracy else "-" for name in columns))
        print(f"{'  mean loss':{width + 9}}" + row(f"{loss[name]:.4f}" if name in loss else "-" for name in columns[:-1]),
              flush=True)
        result = {"run": run.label, "method": run.settings.method, "dataset": settings.dataset, "model": run.settings.model,
                  "eps": eps, "images": len(x), "checkpoint": args.checkpoint, "training_seed": run.settings.seed,
                  "seed": args.seed, "batch_size": args.batch_size, "restarts": args.restarts, "attacks": list(attacks),
                  "lender": run.lender, "accuracy": accuracy, "loss": loss}
        write_whole(run.folder / "eval.json", (json.dumps(result, indent=1) + "\n").encode())


def row(texts):
    return "".join(f"{text:>11}" for text in texts)


# ---- Is the gradient masked? ----------------------------------------------------------------------------------------
# The questions of Athalye et al. (2018, "Obfuscated Gradients Give a False Sense of Security") and Carlini et al. (2019,
# "On Evaluating Adversarial Robustness"). A model that fails one may be less robust than its table says.

def not_above(a, b):
    """Whether accuracy a is at most accuracy b, but for noise: of the images on which the two differ, a's surplus is
    within two standard deviations of a coin's (McNemar). a, b: (N,), who is right."""
    up, down = (a & ~b).sum().item(), (b & ~a).sum().item()
    return up - down <= 2 * (up + down) ** 0.5


def zero_gradient(model, x, y, batch_size):
    """Share of the images whose input gradient is zero in every pixel."""
    zero = 0
    with eval_mode(model):
        for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
            g, _ = input_gradient(model, xb, AdvTrain(), yb)
            zero += (g == 0).flatten(1).all(1).sum().item()  # (B, C·H·W)
    return zero / len(x)


def checks(model, x, y, eps, others, batch_size=256):
    """[(question, whether it went well, the numbers)]. x: (N, C, H, W) in [0, 1]; y: (N,); others: {name: model}."""
    def right(attack):
        return outcome(model, x, y, attack, batch_size)[0]  # (N,)

    def shown(masks):
        return ", ".join(f"{name} {100 * mask.double().mean():.2f}" for name, mask in masks.items())

    by_steps = {f"{steps} steps": right(named_attack(f"pgd-{steps}", eps)) for steps in (5, 10, 20, 50, 100)}
    masks = list(by_steps.values())
    yield ("more steps do not raise accuracy", all(not_above(b, a) for a, b in zip(masks, masks[1:])), shown(by_steps))
    pgd_10, natural = by_steps["10 steps"], right(None)
    one = right(lambda model, x, y: pgd(model, x, y, eps=eps, step_size=eps, steps=1))
    yield ("iterations beat one step", not_above(pgd_10, one), shown({"one step of eps": one, "PGD-10": pgd_10}))
    noise = right(lambda model, x, y: start_point(x, eps, "uniform"))
    broken = [(natural & ~mask).sum().item() for mask in (noise, pgd_10)]
    yield ("random noise breaks less than half of what PGD-10 breaks", 2 * broken[0] < broken[1],
           shown({"natural": natural, "noise": noise, "PGD-10": pgd_10}))
    larger = {"1x": by_steps["50 steps"], **{f"{k}x": right(named_attack("pgd-50", min(k * eps, 0.99))) for k in (4, 8)}}
    yield ("accuracy falls to about 0 (below 5 %) as eps grows", larger["8x"].double().mean() < 0.05,
           shown({f"{name} eps": mask for name, mask in larger.items()}))
    share = zero_gradient(model, x, y, batch_size)
    yield "at most 1 % of the images have an all-zero gradient", share <= 0.01, f"{100 * share:.2f} %"
    for name, other in others.items():
        transferred = right(lambda _, x, y: named_attack("pgd-10", eps)(other, x, y))
        yield (f"PGD-10 made on {name} is no stronger", not_above(pgd_10, transferred),
               shown({"transferred": transferred, "white box": pgd_10}))


def print_checks(heading, runs, x, y, eps, args):
    """All checks of the runs, on stdout."""
    print(f"{heading}; accuracy in %, PGD with steps of eps/4")
    for run in runs:
        print(f"{run.label} ({run.settings.method}, {run.settings.model})")
        torch.manual_seed(args.seed)
        others = {other.label: other.model for other in runs if other is not run}
        for question, passed, numbers in checks(run.model, x, y, eps, others, args.batch_size):
            print(f"  {'pass' if passed else 'FAIL'}  {question}: {numbers}", flush=True)
        if not others:
            print("  -     transfer from another run: give a second one")


def main(argv):
    """The command line; returns the exit status."""
    parser = Parser(prog="l2l_adv.py eval", description="One table, a row per run; also eval.json in each run's folder.")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--limit", type=positive, help="only the first so many test images; default all, with --sanity 256")
    parser.add_argument("--batch-size", type=positive, default=256)
    parser.add_argument("--eps", type=size, help="default: the one trained with")
    parser.add_argument("--attacks", type=lambda text: text.split(","), metavar="NAME,NAME",
                        help=f"pgd-N, cw-N, learned-N, sharp-N with N steps; default {','.join(STANDARD_ATTACKS)}")
    parser.add_argument("--restarts", type=positive, default=1, help="of each attack; an image must survive them all")
    parser.add_argument("--autoattack", action="store_true", help="a further column, by the torchattacks package")
    parser.add_argument("--lend", metavar="RUN", help="its learned optimizer attacks the runs that have none")
    parser.add_argument("--worst-only", action="store_true", help="skip what is broken already: faster, only the last column")
    parser.add_argument("--sanity", action="store_true", help="instead of the table: is the gradient masked?")
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=seed, default=0, help="of the attacks")
    return as_program("l2l_adv.py", evaluate_runs, parser.parse_args(argv))
