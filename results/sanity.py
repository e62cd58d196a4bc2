"""Is the gradient masked? `python l2l_adv.py eval --sanity RUNS` asks each model the questions of Athalye et al. (2018,
"Obfuscated Gradients Give a False Sense of Security") and Carlini et al. (2019, "On Evaluating Adversarial Robustness"),
a line each, pass or fail with the numbers. A model that fails one may be less robust than its table says."""
import torch

from baselines import AdvTrain, eval_mode, input_gradient, outcome, pgd, start_point


def attack(eps, steps, step_size=None):
    """PGD as `outcome` takes it, with steps of eps/4 or of `step_size`."""
    return lambda model, x, y: pgd(model, x, y, eps=eps, steps=steps, step_size=step_size or eps / 4)


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

    by_steps = {f"{steps} steps": right(attack(eps, steps)) for steps in (5, 10, 20, 50, 100)}
    masks = list(by_steps.values())
    yield ("more steps do not raise accuracy", all(not_above(b, a) for a, b in zip(masks, masks[1:])), shown(by_steps))
    pgd_10, natural = by_steps["10 steps"], right(None)
    one = right(attack(eps, 1, step_size=eps))
    yield ("iterations beat one step", not_above(pgd_10, one), shown({"one step of eps": one, "PGD-10": pgd_10}))
    noise = right(lambda model, x, y: start_point(x, eps, "uniform"))
    broken = [(natural & ~mask).sum().item() for mask in (noise, pgd_10)]
    yield ("random noise breaks less than half of what PGD-10 breaks", 2 * broken[0] < broken[1],
           shown({"natural": natural, "noise": noise, "PGD-10": pgd_10}))
    larger = {f"{k}x": right(attack(min(k * eps, 0.99), 50)) for k in (1, 4, 8)}
    yield ("accuracy falls to about 0 (below 5 %) as eps grows", larger["8x"].double().mean() < 0.05,
           shown({f"{name} eps": mask for name, mask in larger.items()}))
    share = zero_gradient(model, x, y, batch_size)
    yield "at most 1 % of the images have an all-zero gradient", share <= 0.01, f"{100 * share:.2f} %"
    for name, other in others.items():
        transferred = right(lambda _, x, y: attack(eps, 10)(other, x, y))
        yield (f"PGD-10 made on {name} is no stronger", not_above(pgd_10, transferred),
               shown({"transferred": transferred, "white box": pgd_10}))


def print_checks(heading, runs, x, y, eps, args):
    """All checks of the runs of l2l_adv.load_runs, on stdout."""
    print(f"{heading}; accuracy in %, PGD with steps of eps/4")
    for label, _, model, _, settings in runs:
        print(f"{label} ({settings.method}, {settings.model})")
        torch.manual_seed(args.seed)
        others = {run[0]: run[2] for run in runs if run[0] != label}
        for question, passed, numbers in checks(model, x, y, eps, others, args.batch_size):
            print(f"  {'pass' if passed else 'FAIL'}  {question}: {numbers}", flush=True)
        if not others:
            print("  -     transfer from another run: give a second one")
