"""Tests of l2l_adv.py and baselines.py: every part against an independent reference, forward and gradient.

    python3 -m pytest -q
"""
import gzip
import hashlib
import http.server
import io
import importlib.util
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import l2l_adv
from baselines import (MODELS, AdvTrain, InputError, Margin, SmallCNN, Trades, augment, cw_linf, eval_mode, evaluate,
                       hold_out, input_gradient, load_dataset, pgd, project, to_unit, worst_of)
from l2l_adv import (METHODS, LearnedOptimizer, NotFinite, Settings, ctrl_c_asks, fused, learned_attack, learning_rate,
                     load_classifier, load_run, locked, main, meta_objective, named_attack, sharpened, size, train_optimizer,
                     train_step_learned, train_step_pgd, unroll, write_whole)
from results.evaluate import checks, not_above
from results.table import main as table

torch.set_num_threads(1)  # the problems are so small that threads would only wait for each other
HERE = Path(__file__).parent
OBJECTIVES = [AdvTrain(), Trades(beta=6.0)]


class Net(nn.Module):
    """A small smooth classifier; batch norm on request."""

    def __init__(self, shape=(2, 4, 4), classes=3, batch_norm=False):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(shape[0], 6, 3, padding=1), nn.BatchNorm2d(6) if batch_norm else nn.Identity(), nn.Tanh(),
            nn.Dropout(0.5) if batch_norm else nn.Identity(), nn.Flatten(), nn.Linear(6 * shape[1] * shape[2], classes))

    def forward(self, x):
        return self.layers(x)


def problem(batch=5, shape=(2, 4, 4), classes=3, batch_norm=False, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = Net(shape, classes, batch_norm).to(dtype)
    return model, torch.rand(batch, *shape, dtype=dtype), torch.randint(0, classes, (batch,))


def attacks(eps, steps=5, optimizer=None):
    """Every attack of both modules, by name."""
    optimizer = optimizer or LearnedOptimizer()
    by_hand = dict(eps=eps, step_size=eps / 2, steps=steps)
    learned = dict(eps=eps, steps=steps)
    return {
        "pgd": lambda m, x, y: pgd(m, x, y, **by_hand),
        "pgd-uniform": lambda m, x, y: pgd(m, x, y, **by_hand, start="uniform"),
        "pgd-trades": lambda m, x, y: pgd(m, x, y, **by_hand, objective=Trades()),
        "line-search": lambda m, x, y: pgd(m, x, y, **by_hand, line_search=True),
        "cw": lambda m, x, y: cw_linf(m, x, y, **by_hand),
        "learned": lambda m, x, y: learned_attack(m, optimizer.to(x.dtype), x, y, **learned),
        "learned-trades": lambda m, x, y: learned_attack(m, optimizer.to(x.dtype), x, y, **learned, objective=Trades()),
    }


# ---- Threat model, objectives ----------------------------------------------------------------------------------------

def test_project_is_the_nearest_point_of_ball_and_box():
    rng = np.random.default_rng(0)
    x, x_adv = rng.random((3, 2, 4, 4)), rng.normal(0.5, 0.5, (3, 2, 4, 4))
    expected = np.clip(np.clip(x_adv, x - 0.1, x + 0.1), 0, 1)
    assert np.array_equal(project(torch.tensor(x_adv), torch.tensor(x), 0.1).numpy(), expected)


def kl(p_logits, q_logits):
    p = np.exp(p_logits - p_logits.max(1, keepdims=True))
    q = np.exp(q_logits - q_logits.max(1, keepdims=True))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return (p * (np.log(p) - np.log(q))).sum(1)


def test_trades_equals_an_independent_computation():
    model, x, y = problem()
    x_adv = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    objective = Trades(beta=3.0)
    clean, adv = model(x).detach().numpy(), model(x_adv).detach().numpy()
    inner = objective.inner_loss(model(x_adv), objective.target(model, x, y))
    assert np.allclose(inner.detach().numpy(), kl(clean, adv))
    p = np.exp(clean) / np.exp(clean).sum(1, keepdims=True)
    expected = -np.log(p[range(len(y)), y]).mean() + 3.0 * kl(clean, adv).mean()
    assert math.isclose(objective.outer_loss(model, x, x_adv, y).item(), expected, rel_tol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_of_the_outer_loss_equals_finite_differences(objective):
    model, x, y = problem()
    x_adv = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    weight = model.layers[0].weight
    grad, = torch.autograd.grad(objective.outer_loss(model, x, x_adv, y), weight)
    for index in [(0, 0, 0, 0), (3, 1, 2, 1), (5, 0, 1, 2)]:
        with torch.no_grad():
            values = []
            for h in (1e-5, -2e-5):
                weight[index] += h
                values.append(objective.outer_loss(model, x, x_adv, y).item())
            weight[index] += 1e-5
        assert grad[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_losses_are_finite_for_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 3e4]], requires_grad=True)
    target = F.log_softmax(-logits.detach(), dim=1)
    for loss in (Trades().inner_loss(logits, target), AdvTrain().inner_loss(logits, torch.tensor([1, 0])),
                 Margin().inner_loss(logits, torch.tensor([1, 0]))):
        grad, = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all() and grad.isfinite().all()


def test_margin_is_the_best_wrong_logit_minus_the_true_one():
    logits, y = torch.randn(20, 5), torch.randint(0, 5, (20,))
    expected = [max(z for j, z in enumerate(row) if j != t) - row[t] for row, t in zip(logits.tolist(), y.tolist())]
    assert torch.allclose(Margin().inner_loss(logits, y), torch.tensor(expected))
    assert torch.allclose(Margin().outer_loss(nn.Identity(), None, logits, y), torch.tensor(expected).mean())


# ---- Attacks ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", attacks(0.1))
@pytest.mark.parametrize("seed", range(4))
def test_attacks_stay_in_the_ball_and_the_box(name, seed):
    rng = np.random.default_rng(seed)
    eps, shape = float(rng.uniform(0.001, 0.9)), tuple(int(n) for n in rng.integers(1, 6, 3))
    model, x, y = problem(int(rng.integers(1, 5)), shape, dtype=torch.float32, seed=seed)
    x = (3 * x - 1).clamp(0, 1)  # many pixels on the faces of the box
    x_adv = attacks(eps)[name](model, x, y)
    assert x_adv.shape == x.shape and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (x_adv - x).abs().max() <= eps + 1e-6


@pytest.mark.parametrize("name", attacks(0.1))
@pytest.mark.parametrize("grads", [False, True])
def test_attacks_leave_no_trace_on_the_model(name, grads):
    model, x, y = problem(batch_norm=True, dtype=torch.float32)
    model.train()
    model.layers[1].eval()  # a frozen batch norm within a training model must stay so
    if grads:
        model(x).sum().backward()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    old_grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    attacks(0.1)[name](model, x, y)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    for p, old in zip(model.parameters(), old_grads):
        assert p.grad is None if old is None else torch.equal(p.grad, old)


def test_the_mode_comes_back_after_an_error():
    model, x, y = problem(dtype=torch.float32)
    with pytest.raises(IndexError):
        pgd(model.train(), x, y + 100, eps=0.1, step_size=0.1, steps=1)
    assert all(module.training for module in model.modules())


class Linear(nn.Module):
    """Two classes, logits (0, ⟨w, x⟩): for label 0 the optimum in the ball is Π(x + eps·sign(w))."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        z = (self.w * x).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize("name", ["pgd", "pgd-uniform", "line-search", "cw"])
def test_attacks_reach_the_optimum_of_a_linear_model(name):
    torch.manual_seed(0)
    model, x, y = Linear(torch.randn(1, 3, 3)), torch.rand(4, 1, 3, 3), torch.zeros(4, dtype=torch.long)
    x_adv = attacks(0.1)[name](model, x, y)
    assert torch.allclose(x_adv, project(x + 0.1 * model.w.sign(), x, 0.1), atol=1e-6)


def test_one_pgd_step_is_the_sign_of_the_gradient():
    model, x, y = problem()
    torch.manual_seed(1)
    x_0 = project(x + 0.001 * torch.randn_like(x), x, 0.1).requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(model(x_0), y), x_0)
    torch.manual_seed(1)
    assert torch.equal(pgd(model, x, y, eps=0.1, step_size=0.03, steps=1), project(x_0 + 0.03 * g.sign(), x, 0.1))


class Bowl(nn.Module):
    """Logits (0, −Σ a_i (x_i − c_i)²): for label 0 the loss peaks at c, and the curvatures a_i are hidden in it."""

    def __init__(self, a, c):
        super().__init__()
        self.a, self.c = nn.Parameter(a), c

    def forward(self, x):
        z = -(self.a * (x - self.c) ** 2).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(z), z], 1)


def bowl(seed=0):
    torch.manual_seed(seed)
    x = torch.full((16, 1, 5, 5), 0.5)
    c = x[:1] + 0.1 * (2 * torch.rand(1, 1, 5, 5) - 1)  # within the ball of 0.1
    return Bowl(10 ** (2 * torch.rand(1, 5, 5)), c), x, torch.zeros(16, dtype=torch.long)


def test_line_search_finds_a_step_where_a_long_one_overshoots():
    model, x, y = bowl()
    loss = {name: F.cross_entropy(model(pgd(model, x, y, eps=0.1, step_size=0.1, steps=10, line_search=name)), y).item()
            for name in (False, True)}
    assert loss[True] > loss[False] + 0.01


def test_evaluate_counts_by_hand_and_spares_what_is_broken():
    model, x, y = problem(batch=40, dtype=torch.float32)
    seen = []

    def flip(images):  # an attack that ruins the images where `images` says so
        def attack(model, xb, yb):
            seen.append(len(xb))
            return torch.where(images(xb)[:, None, None, None], 1 - xb, xb)
        return attack

    by = {"a": flip(lambda x: x[:, 0, 0, 0] > 0.5), "b": flip(lambda x: x[:, 1, 0, 0] > 0.5)}
    right = {name: model(attack(model, x, y)).argmax(1) == y for name, attack in by.items()}
    natural = model(x).argmax(1) == y
    seen.clear()
    result = evaluate(model, x, y, by, batch_size=7)
    worst = (natural & right["a"] & right["b"]).sum().item() / 40
    assert result == {"natural": natural.sum().item() / 40, "worst": worst,
                      **{name: r.sum().item() / 40 for name, r in right.items()}}
    assert list(result) == ["natural", "a", "b", "worst"] and sum(seen) == 80
    seen.clear()
    assert evaluate(model, x, y, by, batch_size=7, worst_only=True)["worst"] == pytest.approx(worst)
    assert sum(seen) == natural.sum() + (natural & right["a"]).sum()
    for broken in (lambda m, x, y: x * float("nan"), lambda m, x, y: x + 1, lambda m, x, y: x[:, :1]):
        with pytest.raises(InputError, match="returned something other"):
            evaluate(model, x, y, {"broken": broken})
    with pytest.raises(NotFinite, match="logits"):
        evaluate(nn.Sequential(model, nn.Threshold(math.inf, math.nan)), x, y, {})
    nan = lambda m, x, y: x * float("nan")
    for attacks in ([nan], [nan, by["a"]], [by["a"], nan]):
        with pytest.raises(InputError, match="returned something other"):
            evaluate(model, x, y, {"broken": worst_of(attacks)})


def test_evaluate_gives_the_mean_cross_entropy_each_attack_reached():
    model, x, y = problem(batch=11, dtype=torch.float32)
    accuracy, loss = evaluate(model, x, y, {"invert": lambda m, x, y: 1 - x}, batch_size=4, losses=True)
    assert accuracy == evaluate(model, x, y, {"invert": lambda m, x, y: 1 - x})
    assert loss == pytest.approx({"natural": F.cross_entropy(model(x), y).item(),
                                  "invert": F.cross_entropy(model(1 - x), y).item()}, rel=1e-5)


def test_the_worst_of_several_attacks_leaves_what_survives_all():
    model, x, y = problem(batch=30, dtype=torch.float32)
    attacks = [lambda m, x, y, k=k: (x + k * torch.linspace(-1, 1, 32).view(2, 4, 4)).clamp(0, 1) for k in (0, 1, -1)]
    margins = torch.stack([Margin().inner_loss(model(attack(model, x, y)), y) for attack in attacks])
    x_adv = worst_of(attacks)(model, x, y)
    assert torch.equal(Margin().inner_loss(model(x_adv), y), margins.amax(0))
    assert len(set(margins.argmax(0).tolist())) == 3  # each attack is the best one for some image
    right = torch.stack([model(attack(model, x, y)).argmax(1) == y for attack in attacks]).all(0)
    assert torch.equal(model(x_adv).argmax(1) == y, right)


def test_named_attacks_are_the_ones_they_name():
    model, x, y = problem(dtype=torch.float32)
    optimizer, by_hand = big_steps("lstm").float(), dict(eps=0.1, step_size=0.025)
    sharp = big_steps("lstm").float()
    sharp.load_state_dict({**optimizer.state_dict(), "W_out": 10 * optimizer.W_out.detach()})
    for name, expected in (("pgd-3", lambda start: pgd(model, x, y, **by_hand, steps=3, start=start)),
                           ("cw-12", lambda start: cw_linf(model, x, y, **by_hand, steps=12, start=start)),
                           ("learned-5", lambda start: learned_attack(model, optimizer, x, y, eps=0.1, steps=5, start=start)),
                           ("sharp-5", lambda start: learned_attack(model, sharp, x, y, eps=0.1, steps=5, start=start))):
        torch.manual_seed(0)
        once = named_attack(name, 0.1, optimizer)(model, x, y)
        torch.manual_seed(0)
        assert torch.equal(once, expected("gaussian"))
        torch.manual_seed(0)
        twice = named_attack(name, 0.1, optimizer, restarts=2)(model, x, y)
        torch.manual_seed(0)
        starts = [expected("gaussian"), expected("uniform")]
        margins = torch.stack([Margin().inner_loss(model(x_adv), y) for x_adv in starts])
        assert torch.equal(Margin().inner_loss(model(twice), y), margins.amax(0))


def test_a_sharpened_optimizer_has_ten_times_the_output_weights():
    optimizer, g = big_steps("lstm"), torch.randn(2, 1, 3, 3).double()
    with torch.no_grad():
        optimizer.W_out.mul_(0.01)  # far from saturation
        soft, sharp = optimizer(g)[0], sharpened(optimizer)(g)[0]
        assert torch.allclose(sharp.atanh(), 10 * soft.atanh(), rtol=1e-9)
        unfused, optimizer.forward = optimizer.forward, lambda *args: unfused(*args)  # as `fused` sets it
        assert torch.equal(sharpened(optimizer)(g)[0], sharp) and torch.equal(optimizer(g)[0], soft)
    for other in (nn.Identity(), "nothing"):
        with pytest.raises(InputError, match="only a LearnedOptimizer"):
            named_attack("sharp-2", 0.1, other)


# ---- The learned optimizer -------------------------------------------------------------------------------------------

def torch_order(W, scale):
    """torch orders the gates i, f, g, o, ours are i, f, o, g; and our rows of g hold the 2 of tanh(z) = 2σ(2z) − 1."""
    i, f, o, g = W.chunk(4)
    return torch.cat([i, f, scale * g, o])


@pytest.mark.parametrize("cell, weights", [("lstm", 450), ("rnn", 120)])
def test_cell_equals_the_one_of_torch_forward_and_gradient(cell, weights):
    torch.manual_seed(0)
    ours, H = LearnedOptimizer(hidden_size=10, cell=cell).double(), 10
    assert sum(p.numel() for p in ours.parameters()) == weights
    theirs = (nn.LSTMCell if cell == "lstm" else nn.RNNCell)(1, H, bias=False).double()
    with torch.no_grad():
        W = ours.W
        if cell == "lstm":
            W = torch_order(W, 0.5)
        theirs.weight_ih.copy_(W[:, :1])
        theirs.weight_hh.copy_(W[:, 1:])
    gradients = torch.randn(4, 2, 3, 2, 2, dtype=torch.float64)
    state, reference, outputs, expected = None, None, [], []
    for g in gradients:
        delta, state = ours(g, state)
        u = (g / g.abs().mean((1, 2, 3), keepdim=True)).reshape(-1, 1)
        reference = theirs(u, reference)
        h = reference[0] if cell == "lstm" else reference
        outputs.append(delta)
        expected.append(torch.tanh(h @ ours.W_out.T).reshape(g.shape))
    assert torch.allclose(torch.stack(outputs), torch.stack(expected), atol=1e-14)
    weight = torch.randn_like(gradients)
    ours_grad, = torch.autograd.grad((weight * torch.stack(outputs)).sum(), ours.W)
    (weight * torch.stack(expected)).sum().backward()
    if cell == "lstm":
        ours_grad = torch_order(ours_grad, 2.0)
    assert torch.allclose(ours_grad, torch.cat([theirs.weight_ih.grad, theirs.weight_hh.grad], 1), atol=1e-12)


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_permuting_coordinates_or_images_permutes_the_updates(cell):
    torch.manual_seed(0)
    optimizer, g = LearnedOptimizer(cell=cell).double(), torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)

    def two_steps(g):
        _, state = optimizer(g[0])
        return optimizer(g[1], state)[0]

    pixels, images = torch.randperm(32), torch.randperm(3)
    shuffled = g.flatten(2)[:, :, pixels].reshape(g.shape)
    assert torch.allclose(two_steps(shuffled), two_steps(g).flatten(1)[:, pixels].reshape(g.shape[1:]), atol=1e-15)
    assert torch.allclose(two_steps(g[:, images]), two_steps(g)[images], atol=1e-15)
    assert torch.allclose(two_steps(g * 1e-20), two_steps(g), atol=1e-12)  # the gradient's scale does not matter
    assert torch.equal(two_steps(g * 0), torch.zeros_like(g[0])) and two_steps(g).abs().max() > 1e-4


def test_state_is_fresh_for_every_batch():
    model, x, y = problem(batch=6)
    optimizer = LearnedOptimizer().double()

    def attack(x, y):
        torch.manual_seed(3)
        return learned_attack(model, optimizer, x, y, eps=0.1, steps=4)

    first = attack(x, y)
    attack(x.flip(0), y.flip(0))
    assert torch.equal(attack(x, y), first)


def weighted_losses(model, optimizer, x, y, eps, steps, objective):
    """Reference for the meta-gradient: Σ_t t·L(f(x'_t), y) with the graph of everything but the g_t's own inputs."""
    target = objective.target(model, x, y)
    x_adv = project(x + 0.001 * torch.randn_like(x), x, eps)
    state, total = None, 0.0
    for t in range(1, steps + 1):
        at = x_adv.detach().requires_grad_()
        g, = torch.autograd.grad(objective.inner_loss(model(at), target).sum(), at)
        delta, state = optimizer(g, state)
        x_adv = torch.min(torch.max(x_adv + eps * delta, x - eps), x + eps).clamp(0, 1)
        total = total + t * objective.inner_loss(model(x_adv), target).sum()
    active = ((x_adv - x).abs() > eps - 1e-9).double().mean().item()
    return total / (len(x) * steps * (steps + 1) / 2), active


def big_steps(cell):
    """A learned optimizer whose steps reach the surface of the ball within a few steps."""
    torch.manual_seed(1)
    optimizer = LearnedOptimizer(hidden_size=4, cell=cell).double()
    with torch.no_grad():
        optimizer.W.mul_(3)
        optimizer.W_out.mul_(60)
    return optimizer


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_meta_gradient_equals_autograd_through_the_unrolled_losses(cell, objective):
    model, x, y = problem()
    optimizer, eps, steps = big_steps(cell), 0.2, 5
    torch.manual_seed(7)
    reference, active = weighted_losses(model, optimizer, x, y, eps, steps, objective)
    assert 0.05 < active < 0.95  # the projection cuts some coordinates, and leaves some
    expected = torch.autograd.grad(reference, list(optimizer.parameters()))
    torch.manual_seed(7)
    x_0, gradients, x_adv = unroll(model, optimizer, x, y, eps=eps, steps=steps, objective=objective)
    gradients.append(input_gradient(model, x_adv, objective, objective.target(model, x, y))[0])
    ours = torch.autograd.grad(meta_objective(optimizer, x, x_0, gradients, eps), list(optimizer.parameters()))
    for a, b in zip(ours, expected):
        assert b.abs().max() > 1e-4 and torch.allclose(a, b, rtol=1e-10, atol=1e-13)

    # Finite differences of the weighted losses along the recorded gradients, without any of autograd
    def losses():
        state, x_t, total = None, x_0, 0.0
        for t in range(steps):
            delta, state = optimizer(gradients[t], state)
            x_t = project(x_t + eps * delta, x, eps)
            total += (t + 1) * objective.inner_loss(model(x_t), objective.target(model, x, y)).sum().item()
        return total / (len(x) * steps * (steps + 1) / 2)

    for parameter, grad in zip(optimizer.parameters(), ours):
        for index in [(0, 0), (parameter.shape[0] - 1, 2)]:
            with torch.no_grad():
                parameter[index] += 1e-6
                up = losses()
                parameter[index] -= 2e-6
                down = losses()
                parameter[index] += 1e-6
            assert grad[index].item() == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("at_once", [2 ** 16, 70])  # coordinates: all five images, or two by two
def test_one_learned_step_moves_both_players_along_their_own_gradients(objective, at_once, monkeypatch):
    monkeypatch.setattr("l2l_adv.COORDINATES_AT_ONCE", (at_once, at_once))
    model, x, y = problem()
    optimizer = big_steps("lstm")
    torch.manual_seed(7)
    reference, _ = weighted_losses(model, optimizer, x, y, 0.2, 5, objective)
    ascent = torch.autograd.grad(reference, list(optimizer.parameters()))
    assert torch.stack([g.norm() for g in ascent]).norm() < 1  # else clipping would scale it
    torch.manual_seed(7)
    x_adv = learned_attack(model, optimizer, x, y, eps=0.2, steps=5, objective=objective)
    outer = objective.outer_loss(model, x, x_adv, y)
    descent = torch.autograd.grad(outer, list(model.parameters()))
    before = [p.detach().clone() for p in [*optimizer.parameters(), *model.parameters()]]
    theta, phi = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(optimizer.parameters(), 0.1)
    torch.manual_seed(7)
    loss = train_step_learned(model, optimizer, theta, phi, x, y, eps=0.2, steps=5, objective=objective)
    assert torch.equal(loss, outer.detach())
    expected = [p + 0.1 * g for p, g in zip(before, ascent)]
    expected += [p - 0.1 * g for p, g in zip(before[len(ascent):], descent)]
    for p, e in zip([*optimizer.parameters(), *model.parameters()], expected):
        assert torch.allclose(p, e, rtol=1e-10, atol=1e-13)


def test_meta_gradient_of_some_images_is_unbiased():
    model, x, y = problem(batch=4)
    optimizer = big_steps("lstm")
    x_0, gradients, x_adv = unroll(model, optimizer, x, y, eps=0.2, steps=3, objective=AdvTrain())
    gradients.append(input_gradient(model, x_adv, AdvTrain(), y)[0])

    def grad(rows):
        return torch.autograd.grad(meta_objective(optimizer, x[rows], x_0[rows], [g[rows] for g in gradients], 0.2),
                                   optimizer.W)[0]

    pairs = [[i, j] for i in range(4) for j in range(i)]
    assert torch.allclose(sum(grad(p) for p in pairs) / len(pairs), grad([0, 1, 2, 3]), atol=1e-14)
    theta, phi = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(optimizer.parameters(), 0.1)
    seen, firsts = [], set()
    optimizer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    for _ in range(20):
        seen.clear()
        train_step_learned(model, optimizer, theta, phi, x, y, eps=0.2, steps=3, meta_images=1)
        assert [len(g) for g in seen] == [4, 4, 4, 1, 1, 1]  # all images are attacked, one is learned from
        firsts.add([torch.equal(g, seen[3][0]) for g in seen[0]].index(True))
    assert firsts == {0, 1, 2, 3}  # any of them


def test_a_large_meta_gradient_is_clipped_and_keeps_its_direction():
    def step(lr, scale):
        model, x, y = problem()
        with torch.no_grad():
            model.layers[-1].weight.mul_(scale)
        optimizer = big_steps("lstm")
        before = torch.cat([p.detach().flatten() for p in optimizer.parameters()])
        torch.manual_seed(7)
        reference, _ = weighted_losses(model, optimizer, x, y, 0.2, 5, AdvTrain())
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(reference, list(optimizer.parameters()))])
        torch.manual_seed(7)
        train_step_learned(model, optimizer, torch.optim.SGD(model.parameters(), 0.1),
                           torch.optim.SGD(optimizer.parameters(), lr), x, y, eps=0.2, steps=5)
        return (torch.cat([p.detach().flatten() for p in optimizer.parameters()]) - before) / lr, grad

    moved, grad = step(0.1, scale=100.0)
    assert grad.norm() > 2 and torch.allclose(moved, grad / grad.norm(), rtol=1e-5, atol=1e-7)


def train_phi(model, x, y, eps, steps, updates, cell="lstm"):
    """Train φ alone, against a classifier that stands still."""
    torch.manual_seed(0)
    optimizer = LearnedOptimizer(cell=cell)
    theta, phi = torch.optim.SGD(model.parameters(), lr=0.0), torch.optim.Adam(optimizer.parameters(), lr=0.02)
    for _ in range(updates):
        train_step_learned(model, optimizer, theta, phi, x, y, eps=eps, steps=steps)
    return optimizer


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_trained_optimizer_reaches_the_optimum_of_a_linear_model(cell):
    torch.manual_seed(0)
    w = torch.randn(1, 3, 3)
    model, x, y = Linear(w + 0.2 * w.sign()), torch.rand(8, 1, 3, 3), torch.zeros(8, dtype=torch.long)
    optimizer = train_phi(model, x, y, eps=0.1, steps=5, updates=100, cell=cell)
    x_adv = learned_attack(model, optimizer, x, y, eps=0.1, steps=5)
    assert torch.allclose(x_adv, project(x + 0.1 * model.w.sign(), x, 0.1), atol=1e-3)


def test_trained_optimizer_beats_every_pgd_on_hidden_curvature():
    model, x, y = bowl()
    optimizer = train_phi(model, x, y, eps=0.1, steps=10, updates=200)

    def loss(x_adv):
        return F.cross_entropy(model(x_adv), y).item()

    best = max(loss(pgd(model, x, y, eps=0.1, step_size=0.1 / k, steps=10)) for k in (1, 2, 4, 8, 16))
    # log 2 is the top of the hill: the learned steps must leave less than 3/4 of the gap that the best PGD leaves
    assert math.log(2) - loss(learned_attack(model, optimizer, x, y, eps=0.1)) < 0.75 * (math.log(2) - best)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_train_optimizer_follows_autograd_through_a_frozen_classifier(objective):
    model, x, y = problem(batch_norm=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = big_steps("lstm")
    expected = [w.detach().clone().requires_grad_() for w in optimizer.parameters()]
    adam = torch.optim.Adam(expected, 0.003)
    torch.manual_seed(1)
    with eval_mode(model):
        losses, _ = weighted_losses(model, optimizer, x, y, 0.1, 3, objective)
    for w, g in zip(expected, torch.autograd.grad(-losses, list(optimizer.parameters()))):
        w.grad = g
    nn.utils.clip_grad_norm_(expected, 1.0)
    adam.step()
    torch.manual_seed(1)
    got = train_optimizer(model, iter([(x, y)]), eps=0.1, steps=3, objective=objective, optimizer=optimizer, lr=0.003)
    assert got is optimizer and all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got.parameters(), expected))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()) and model.training
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(train_optimizer(model.float(), [(x.float(), y)], eps=0.1), LearnedOptimizer)


# ---- Classifiers and data --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, millions", [("small", 0.31), ("vgg16", 14.7), ("resnet18", 11.2), ("wrn34", 46.2)])
def test_classifiers(name, millions):
    model = MODELS[name](in_channels=3).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (2, 10) and logits[0].std() > 0
        model.normalize_like((x * 255).byte())  # the normalisation is inside, in buffers
        assert torch.allclose(model(x), model.layers((x - model.mean) / model.std), atol=1e-6)
    assert torch.allclose(model.mean.flatten(), x.mean((0, 2, 3)), atol=0.01)
    with pytest.raises(InputError, match="takes images"):
        model(x[:, :1])


@pytest.mark.parametrize("size", [4, 16, 28, 33])
def test_small_cnn_takes_any_size(size):
    assert SmallCNN()(torch.rand(2, 1, size, size)).shape == (2, 10)


def write_cifar10(folder, n=12, seed=0):
    """All six files of the binary version, n random records each; returns the records."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    records = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records[name] = np.concatenate([rng.integers(0, 10, (n, 1)), rng.integers(0, 256, (n, 3072))], 1).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(records[name].tobytes())
    return records


def write_cifar10_py(folder, records, protocol=2, names=(b"data", b"labels")):
    folder.mkdir()
    for name, record in records.items():
        batch = {names[0]: record[:, 1:].copy(), names[1]: record[:, 0].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))


def write_mnist(folder, n=7, pack=True):
    folder.mkdir(parents=True)
    rng, parts = np.random.default_rng(0), {}
    for name in ("train", "t10k"):
        parts[name] = x, y = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            path = folder / f"{name}-{kind}-ubyte{'.gz' if pack else ''}"
            path.write_bytes(gzip.compress(raw) if pack else raw)
    return parts


def check_cifar10(data, records):
    train = np.concatenate([records[f"data_batch_{i}"] for i in range(1, 6)])
    assert data.x_train.dtype == torch.uint8 and data.x_train.shape == (60, 3, 32, 32)
    assert np.array_equal(data.x_train.numpy().reshape(60, -1), train[:, 1:])
    assert data.y_train.tolist() == train[:, 0].tolist()
    assert np.array_equal(data.x_test[3, 1, 2].numpy(), records["test_batch"][3, 1 + 1024 + 64:1 + 1024 + 96])


def test_cifar10_binary_is_found_where_the_readme_says(tmp_path, monkeypatch):
    records = write_cifar10(tmp_path / "data" / "cifar-10-batches-bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    check_cifar10(load_dataset("cifar10"), records)
    check_cifar10(load_dataset("cifar10", tmp_path / "data" / "cifar-10-batches-bin"), records)
    monkeypatch.chdir("/")
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "data"))
    check_cifar10(load_dataset("cifar10"), records)


@pytest.mark.parametrize("protocol", range(6))
def test_cifar10_pickles_are_read_and_not_executed(tmp_path, protocol):
    records = write_cifar10(tmp_path / "bin")
    write_cifar10_py(tmp_path / "cifar-10-batches-py", records, protocol, ("data", "labels") if protocol == 4 else
                     (b"data", b"labels"))
    check_cifar10(load_dataset("cifar10", tmp_path), records)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Bomb.target),)


@pytest.mark.parametrize("place", ["data", "labels", "whole"])
def test_a_malicious_pickle_is_refused_unexecuted(tmp_path, place):
    Bomb.target = tmp_path / "executed"
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10_py(folder, write_cifar10(tmp_path / "bin"))
    batch = Bomb() if place == "whole" else {b"data": b"", b"labels": [], place.encode(): Bomb()}
    (folder / "data_batch_3").write_bytes(pickle.dumps(batch))
    with pytest.raises(InputError, match="refused"):
        load_dataset("cifar10", tmp_path)
    assert not Bomb.target.exists()


@pytest.mark.parametrize("pack", [True, False])
def test_mnist_is_read(tmp_path, pack):
    parts = write_mnist(tmp_path / "mnist", pack=pack)
    data = load_dataset("mnist", tmp_path)
    assert np.array_equal(data.x_train.numpy()[:, 0], parts["train"][0]) and data.x_train.shape == (7, 1, 28, 28)
    assert data.y_test.tolist() == parts["t10k"][1].tolist()


def test_held_out_images_are_fixed_and_not_trained_on(tmp_path):
    data = load_dataset("synthetic")
    (x, y), (x_held_out, y_held_out) = hold_out(data)
    assert len(x) == len(y) == 3200 and len(x_held_out) == len(y_held_out) == 800
    rows = {bytes(image.flatten().tolist()) for image in x}
    assert len(rows) == 3200 and not any(bytes(image.flatten().tolist()) in rows for image in x_held_out)
    torch.manual_seed(5)
    (few, _), (again, _) = hold_out(data, limit=10)
    assert torch.equal(few, x[:10]) and torch.equal(again, x_held_out)


def test_synthetic_data_tells_the_story():
    """The fine pattern is always right and below eps, the coarse one right nine times in ten and mostly above eps."""
    data = load_dataset("synthetic")
    again = load_dataset("synthetic")
    assert torch.equal(data.x_train, again.x_train) and data.y_train.bincount(minlength=10).min() > 300
    x = to_unit(data.x_train) - 0.5
    tile = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((2, 3))  # (N, 3, 4, 4), the mean over blocks shows the fine pattern
    tile = tile - tile.mean((2, 3), keepdim=True)
    fine = torch.stack([tile[data.y_train == k].mean(0) for k in range(10)])
    assert ((fine.amax((2, 3)) - fine.amin((2, 3))) / 2).median() == pytest.approx(6 / 255, rel=0.05)  # its amplitude
    guess = torch.einsum("nchw,kchw->nk", tile, fine).sub(fine.pow(2).sum((1, 2, 3)) / 2).argmax(1)
    assert (guess == data.y_train).float().mean() > 0.99
    block = F.avg_pool2d(x, 4)
    coarse = torch.stack([block[data.y_train == k].mean(0) for k in range(10)])
    guess = torch.einsum("nchw,kchw->nk", block, coarse / coarse.pow(2).sum((1, 2, 3), keepdim=True).sqrt()).argmax(1)
    assert 0.8 < (guess == data.y_train).float().mean() < 0.95


def test_augment_crops_and_flips_each_image_on_its_own():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (200, 3, 6, 6), dtype=torch.uint8)
    padded = F.pad(x, [4] * 4)
    shifts, flips = set(), 0
    for image, out in zip(padded, augment(x)):
        crops = {(i, j, flip): image[:, i:i + 6, j:j + 6].flip(2) if flip else image[:, i:i + 6, j:j + 6]
                 for i in range(9) for j in range(9) for flip in (False, True)}
        match = [key for key, crop in crops.items() if torch.equal(crop, out)]
        assert len(match) >= 1
        shifts.add(match[0][:2])
        flips += match[0][2]
    assert len(shifts) > 60 and 60 < flips < 140


# ---- Training, checkpoints, the command line -------------------------------------------------------------------------

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Real CIFAR-10 format with 36 random images, and a settings list that trains on 24 of them within a second."""
    write_cifar10(tmp_path / "cifar", n=6)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "cifar"))
    monkeypatch.chdir(tmp_path)
    return ["train", "--dataset", "cifar10", "--model", "small", "--epochs", "2", "--steps", "2", "--batch-size", "8"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_evaluated(tiny, tmp_path, capsys, method):
    assert main([*tiny, "--method", method, "--out", "runs/one"]) is None
    assert sorted(p.name for p in Path("runs/one").iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    rows = [json.loads(line) for line in Path("runs/one/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)
    capsys.readouterr()
    assert main(["eval", "runs/one", "--limit", "4", "--batch-size", "3"]) is None
    header, columns, row, losses = capsys.readouterr().out.splitlines()
    for words in ("eps = 8/255", "first 4 test images", "best checkpoint", "training seed 0", "attack seed 0"):
        assert words in header
    assert row.split()[0] == "one"
    accuracy, loss = (json.loads(Path("runs/one/eval.json").read_text())[key] for key in ("accuracy", "loss"))
    learned = ["learned-10"] if method.startswith("rnn") else []
    assert list(accuracy) == ["natural", "pgd-10", "pgd-100", "cw-100", *learned, "worst"]
    assert accuracy["worst"] <= min(accuracy.values())
    assert list(loss) == list(accuracy)[:-1]
    for name, text, below in zip(columns.split()[2:], row.split()[2:], [*losses.split()[2:], None]):
        assert text == (f"{100 * accuracy[name]:.2f}" if name in accuracy else "-")
        assert name == "worst" or below == (f"{loss[name]:.4f}" if name in loss else "-")
    start = MODELS["small"](3).state_dict()
    weights = torch.load("runs/one/last.pt", weights_only=True)
    assert weights["state_dict"].keys() == start.keys() and weights["settings"]["eps"] == 8 / 255
    assert (weights["learned_optimizer"] is not None) == bool(learned)


def test_two_seeded_runs_are_identical(tiny, capsys):
    outputs = []
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        main([*tiny, "--method", "rnn-trades", "--seed", str(seed), "--meta-images", "5", "--out", out])
        outputs.append(re.sub(r" +[\d.]+$", "", capsys.readouterr().out, flags=re.M))  # all but the seconds
    checkpoints = [torch.load(f"{out}/last.pt", weights_only=True) for out in "abc"]
    for player in ("state_dict", "learned_optimizer"):
        a, b, c = (checkpoint[player] for checkpoint in checkpoints)
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert not all(torch.equal(a[key], c[key]) for key in a)
    assert outputs[0] == outputs[1]


def test_the_best_checkpoint_is_the_best_on_held_out_images(tiny, monkeypatch):
    robust = iter([0.2, 0.5, 0.5, 0.1])
    monkeypatch.setattr("l2l_adv.held_out_scores", lambda *_: {"natural": 0.9, "pgd-10": next(robust), "pgd-10 loss": 1})
    main([*tiny, "--method", "advtrain", "--epochs", "4", "--out", "run"])
    assert torch.load("run/best.pt", weights_only=True)["held_out"]["epoch"] == 2
    assert torch.load("run/last.pt", weights_only=True)["held_out"]["epoch"] == 4


def test_load_classifier_and_load_run(tiny):
    main([*tiny, "--method", "rnn-adv", "--cell", "rnn", "--out", "run"])
    model = load_classifier("run/last.pt").train()
    model, again = load_classifier("run/last.pt"), load_run("run", "last")
    assert not model.training and torch.equal(model(torch.ones(1, 3, 32, 32)), again[0](torch.ones(1, 3, 32, 32)))
    assert again[1].cell == "rnn" and again[2].method == "rnn-adv"


def test_learning_rate_schedules():
    assert [learning_rate(0.3, p / 6, "one-cycle") for p in range(7)] == pytest.approx(
        [0, 0.15, 0.3, 0.225, 0.15, 0.075, 0])
    assert [learning_rate(1, p, "piecewise") for p in (0, 0.74, 0.75, 0.89, 0.9, 0.99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_training_follows_the_schedule_and_the_warm_up_of_eps(tiny, monkeypatch):
    seen = []

    def step(players, settings, x, y, strength):
        seen.append((players.theta.param_groups[0]["lr"], strength))
        return torch.tensor(1.0)

    monkeypatch.setattr("l2l_adv.train_step", step)
    main([*tiny, "--lr", "0.3", "--eps-warmup", "0.5", "--out", "run"])  # 2 epochs of 3 steps
    done = [(2 * k + 1) / 12 for k in range(6)]
    assert [lr for lr, _ in seen] == pytest.approx([learning_rate(0.3, d, "one-cycle") for d in done])
    assert [strength for _, strength in seen] == pytest.approx([1 / 6, 3 / 6, 5 / 6, 1, 1, 1])


def test_train_step_pgd_is_one_descent_step():
    model, x, y = problem()
    torch.manual_seed(1)
    x_adv = pgd(model, x, y, eps=0.1, step_size=0.05, steps=3, objective=Trades())
    loss = Trades().outer_loss(model, x, x_adv, y)
    expected = [p - 0.1 * g for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())))]
    torch.manual_seed(1)
    theta = torch.optim.SGD(model.parameters(), 0.1)
    got = train_step_pgd(model, theta, x, y, eps=0.1, step_size=0.05, steps=3, objective=Trades())
    assert torch.equal(got, loss.detach())
    assert all(torch.allclose(p, e, atol=1e-14) for p, e in zip(model.parameters(), expected))


def test_sizes_on_the_command_line_read_as_fractions():
    assert size("8/255") == 8 / 255 and size("0.031") == 0.031


def test_two_processes_train_as_one(tiny):
    flags = [*tiny, "--method", "rnn-trades", "--epochs", "1", "--meta-images", "8", "--lr", "0.05"]
    assert main([*flags, "--out", "one"]) is None
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                             HERE / "l2l_adv.py", *flags, "--out", "two"], capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0 and result.stdout.count("epoch") == 1, result.stderr
    one, two = (torch.load(f"{out}/last.pt", weights_only=True) for out in ("one", "two"))
    torch.manual_seed(0)
    start = SmallCNN(3).state_dict()
    assert not torch.allclose(one["state_dict"]["layers.0.weight"], start["layers.0.weight"], atol=1e-4)
    for player in ("state_dict", "learned_optimizer"):
        for key in one[player]:
            assert torch.allclose(one[player][key], two[player][key], rtol=1e-4, atol=1e-5), key


def test_bench_prints_a_row_per_method(capsys):
    flags = ["bench", "--model", "small", "--batch-size", "4", "--steps", "2", "--rounds", "1"]
    assert main([*flags, "--json"]) is None
    result = json.loads(capsys.readouterr().out)
    assert list(result["methods"]) == list(METHODS) and list(result["attacks"]) == ["pgd", "learned"]
    for cost in result["methods"].values():
        assert cost["ms_per_image"] > 0 and cost["floor_ratio"] > 0
        assert cost["ratio"] == cost["ms_per_image"] / result["methods"]["advtrain"]["ms_per_image"]
        assert cost["hours"] == pytest.approx(cost["ms_per_image"] / 1000 / 3600 * 50_000 * 30)
    assert main(flags) is None
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[2:]] == [*METHODS, "pgd", "learned"]


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_a_compiled_cell_gives_the_same_numbers(cell, monkeypatch):
    # aot_eager traces forward and backward as on a GPU, and leaves out the slow part, generating code
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend="aot_eager", fullgraph=True))
    torch.manual_seed(0)
    optimizer, x = LearnedOptimizer(cell=cell).double(), torch.rand(3, 1, 4, 4, dtype=torch.float64)
    gradients = [torch.randn_like(x) for _ in range(4)]

    def meta_gradient():
        return torch.autograd.grad(meta_objective(optimizer, x, x, gradients, 0.1), list(optimizer.parameters()))

    expected, keys = meta_gradient(), list(optimizer.state_dict())
    optimizer.forward = fused(optimizer.forward)
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(meta_gradient(), expected))
    assert list(optimizer.state_dict()) == keys


def test_without_a_compiler_the_cell_runs_unfused_with_one_warning(monkeypatch, capsys):
    def broken(function):
        def call(*args):
            raise RuntimeError("no compiler")
        return call

    monkeypatch.setattr(torch, "compile", broken)
    double = fused(lambda x: 2 * x)
    assert [double(1), double(2)] == [2, 4]
    assert capsys.readouterr().err.count("torch.compile does not work here (RuntimeError)") == 1


def test_bf16_is_for_training_only(tiny, monkeypatch):
    used = []
    forward = SmallCNN.forward
    monkeypatch.setattr(SmallCNN, "forward", lambda self, x: used.append((self.training, self.bf16)) or forward(self, x))
    assert main([*tiny, "--method", "rnn-adv", "--precision", "bf16", "--out", "run"]) is None
    modes = set(used)
    assert (True, True) in modes and (False, False) in modes and (True, False) not in modes
    assert used[-1] == (False, False)  # the last thing it does is to evaluate
    weights = torch.load("run/last.pt", weights_only=True)["state_dict"]
    assert all(value.dtype == torch.float32 for value in weights.values())
    torch.manual_seed(0)
    model, x = SmallCNN(3), torch.rand(4, 3, 32, 32, requires_grad=True)
    outputs = []
    for model.bf16 in (False, True):
        logits = model(x)
        outputs.append((logits, torch.autograd.grad(logits[:, 0].sum(), x)[0]))
        assert logits.dtype == outputs[-1][1].dtype == torch.float32
    for fp32, bf16 in zip(*outputs):
        assert not torch.equal(fp32, bf16) and F.cosine_similarity(fp32.flatten(), bf16.flatten(), dim=0) > 0.98


# ---- Interruptions, damaged files, bad numbers -----------------------------------------------------------------------

KILLS = int(os.environ.get("KILLS", 2))  # trainings to kill, and damaged files to read: more than here is for a longer test
FUZZ = int(os.environ.get("FUZZ", 40))


def outcome_of(out):
    """All that a training leaves but the time it took: two checkpoints and the log, as comparable values."""
    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes(), value.shape
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items() if key not in ("seconds", "out")}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    log = [plain(json.loads(line)) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return log, *(plain(torch.load(Path(out, name), weights_only=True)) for name in ("last.pt", "best.pt"))


@pytest.mark.parametrize("trial", range(KILLS))
def test_a_killed_training_goes_on_to_the_same_bits(tiny, trial):
    flags = [*tiny, "--method", ("rnn-trades", "advtrain", "rnn-adv")[trial % 3], "--batch-size", "4", "--meta-images", "2"]
    assert main([*flags, "--out", "whole"]) is None
    killed = [*flags, "--resume", "--checkpoint-every", "1e-9", "--out", "killed"]  # saves after every step
    process = subprocess.Popen([sys.executable, HERE / "l2l_adv.py", *killed], stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not Path("killed").exists() and process.poll() is None:  # it is about to begin
        time.sleep(0.001)
    rng = np.random.default_rng(trial + 1000 * KILLS)
    time.sleep(rng.uniform(0, 0.6))
    process.kill()
    process.wait()
    saved = Path("killed/last.pt").exists() and torch.load("killed/last.pt", weights_only=True)["training"]["run"]
    print("killed after", saved and f"epoch {len(saved['rows'])}, step {saved['step']}", [p.name for p in Path("killed").iterdir()])
    assert main(killed) is None
    assert outcome_of("killed") == outcome_of("whole")
    assert sorted(p.name for p in Path("killed").iterdir()) == ["best.pt", "last.pt", "log.jsonl"]


def test_ctrl_c_saves_and_says_how_to_go_on(tiny, monkeypatch, capsys):
    flags = [*tiny, "--method", "rnn-adv", "--meta-images", "5"]  # 2 epochs of 3 steps
    assert main([*flags, "--out", "whole"]) is None
    step, steps = l2l_adv.train_step, []

    def interrupted_step(*args):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr("l2l_adv.train_step", interrupted_step)
        assert main([*flags, "--out", "run"]) == 130 and len(steps) == 5
    assert "with --resume" in capsys.readouterr().err
    saved = torch.load("run/last.pt", weights_only=True)["training"]["run"]
    assert len(saved["rows"]) == 1 and saved["step"] == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main([*flags, "--out", "run"]) == 2 and "--resume" in capsys.readouterr().err
    assert main([*flags, "--resume", "--out", "run"]) is None
    assert outcome_of("run") == outcome_of("whole")
    capsys.readouterr()
    before = {p.name: p.read_bytes() for p in Path("run").iterdir()}
    assert main([*flags, "--resume", "--out", "run"]) is None and "run is finished" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path("run").iterdir()} == before


def test_a_training_saves_itself_within_an_epoch(tiny, monkeypatch):
    step = l2l_adv.train_step

    def dying_step(*args):
        if len(steps) == 5:  # the second epoch's third step
            raise MemoryError
        steps.append(1)
        return step(*args)

    monkeypatch.setattr("l2l_adv.train_step", dying_step)
    for minutes, saved_step in ((["--checkpoint-every", "1e-9"], 2), ([], 0)):
        steps, out = [], f"run{saved_step}"
        with pytest.raises(MemoryError):
            main([*tiny, "--method", "advtrain", *minutes, "--out", out])
        run = torch.load(f"{out}/last.pt", weights_only=True)["training"]["run"]
        assert (len(run["rows"]), run["step"]) == (1, saved_step)


def test_only_what_a_killed_training_left_is_cleared_away(tiny, capsys):
    Path("run").mkdir()
    for name in ("last.pt.tmp", "best.pt.tmp", "thesis.tmp", "eval.json.tmp"):
        Path("run", name).write_text("half of it")
    assert main([*tiny, "--out", "run"]) is None
    assert sorted(p.name for p in Path("run").glob("*.tmp")) == ["eval.json.tmp", "thesis.tmp"]
    Path("run/last.pt").unlink()
    assert main([*tiny, "--resume", "--out", "run"]) == 2 and "without last.pt" in capsys.readouterr().err
    assert Path("run/best.pt").exists()


def test_settings_of_other_types_make_a_checkpoint_that_can_be_read(tiny, tmp_path):
    settings = Settings(out=tmp_path / "run", method="plain", dataset="cifar10", model="small", epochs=np.int64(1),
                        eps=np.float64(8 / 255), seed=np.int32(1), beta=6)
    l2l_adv.train(settings)
    assert load_run("run")[2] == settings and settings.out == str(tmp_path / "run") and type(settings.beta) is float


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt):
        with ctrl_c_asks() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            pytest.fail("not interrupted")


def test_resume_with_other_settings_says_which_differ(tiny, capsys):
    flags = [*tiny, "--method", "rnn-adv", "--out", "run"]
    main(flags)
    before = {p.name: p.read_bytes() for p in Path("run").iterdir()}
    assert main([*flags, "--resume", "--epochs", "5", "--eps", "4/255"]) == 2
    error = capsys.readouterr().err
    assert "epochs was 2 and is 5" in error and "eps was" in error and error.count("\n") == 1 and "seed" not in error
    assert {p.name: p.read_bytes() for p in Path("run").iterdir()} == before


def test_two_trainings_do_not_share_a_folder(tiny, capsys):
    with locked(Path("run")):
        assert main([*tiny, "--out", "run"]) == 2 and "another training is at work" in capsys.readouterr().err
    assert main([*tiny, "--out", "run"]) is None


def test_a_full_disk_leaves_the_old_checkpoint(tiny, monkeypatch, capsys):
    main([*tiny, "--method", "advtrain", "--out", "run"])
    before = Path("run/last.pt").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot write run/last.pt: No space left"):
        write_whole("run/last.pt", b"half of it")
    assert Path("run/last.pt").read_bytes() == before and not list(Path("run").glob("*.tmp"))
    assert main([*tiny, "--out", "new"]) == 2 and "No space left" in capsys.readouterr().err
    assert not any(Path("new").iterdir())


@pytest.mark.parametrize("method", ["plain", "advtrain", "trades", "rnn-adv", "rnn-trades"])
def test_numbers_that_are_not_finite_stop_the_training(tiny, capsys, method):
    assert main([*tiny, "--method", method, "--lr", "1e30", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(rf"{method}, epoch \d, after \d steps: the (loss|gradient|model's logits)", error)
    assert all(p.isfinite().all() for file in Path("run").glob("*.pt") for p in load_classifier(file).parameters())


@pytest.mark.parametrize("player", ["theta", "phi"])
def test_a_bad_batch_reaches_no_weight(player, monkeypatch):
    model, x, y = problem()
    optimizer = big_steps("lstm")
    theta, phi = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), torch.optim.Adam(optimizer.parameters(), 0.1)
    objective = AdvTrain()
    train_step_learned(model, optimizer, theta, phi, x, y, eps=0.1, steps=2)  # so that there is momentum
    before = [p.detach().clone() for p in (*model.parameters(), *optimizer.parameters())]
    if player == "theta":
        objective.outer_loss = lambda *args: AdvTrain().outer_loss(*args) * math.inf
    else:
        monkeypatch.setattr("l2l_adv.meta_objective", lambda *args: meta_objective(*args) * math.nan)
    with pytest.raises(NotFinite, match="the loss is not finite" if player == "theta" else "gradient of phi"):
        train_step_learned(model, optimizer, theta, phi, x, y, eps=0.1, steps=2, objective=objective)
    assert all(torch.equal(p, b) for p, b in zip((*model.parameters(), *optimizer.parameters()), before))


def test_a_learned_optimizer_that_stalls_is_a_warning_in_the_table(tiny, monkeypatch, capsys):
    losses = iter([0.5, 0.9, 0.5, 0.5])
    scores = {"natural": 0.9, "pgd-10": 0.4, "pgd-10 loss": 0.8}
    monkeypatch.setattr("l2l_adv.held_out_scores", lambda *_: {**scores, "learned-10 loss": next(losses)})
    main([*tiny, "--method", "rnn-adv", "--epochs", "4", "--out", "run"])
    lines = capsys.readouterr().out.splitlines()
    assert ["warning" in line for line in lines] == [False] * 6 + [True] and "0.5000 and PGD's 0.8000" in lines[-1]


def test_the_held_out_scores_are_of_the_attacks_they_name(tiny, monkeypatch):
    x, y = torch.randint(0, 256, (300, 1, 4, 4)).byte(), torch.zeros(300, dtype=torch.long)
    seen = []

    def outcome(model, x, y, attack, batch_size=256, label=""):
        kind = "natural" if attack is None else {0.5: "learned", 0.25: "pgd"}[(attack(model, x, y) - x).abs().max().item()]
        seen.append((kind, len(x)))
        right = torch.zeros(len(x), dtype=torch.bool)
        right[:{"natural": 150, "pgd": 30, "learned": 0}[kind]] = True
        return right, torch.full((len(x),), {"natural": 0.1, "pgd": 0.7, "learned": 0.9}[kind])

    monkeypatch.setattr("l2l_adv.outcome", outcome)
    monkeypatch.setattr("l2l_adv.pgd", lambda model, x, y, **_: x + 0.25)
    monkeypatch.setattr("l2l_adv.learned_attack", lambda model, optimizer, x, y, **_: x + 0.5)
    players = types.SimpleNamespace(model=None, optimizer="any")
    scores = l2l_adv.held_out_scores(players, x // 255, y, 0.1)
    assert scores == pytest.approx({"natural": 0.5, "pgd-10": 0.1, "pgd-10 loss": 0.7, "learned-10 loss": 0.9})
    assert seen == [("natural", 300), ("pgd", 300), ("learned", 256)]


def damaged(raw, rng):
    """The bytes cut short, or with some of them changed."""
    raw = bytearray(raw)
    if rng.random() < 0.4:
        return bytes(raw[:rng.integers(len(raw))])
    for _ in range(rng.integers(1, 4)):
        head = rng.random() < 0.5  # where the structure is, more often than not
        raw[rng.integers(min(len(raw), 300) if head else len(raw))] = rng.integers(256)
    return bytes(raw)


def read_damaged(path, read, rng):
    """How many of FUZZ damaged versions of a file were refused; nothing but InputError may come out."""
    raw, refused = path.read_bytes(), 0
    for _ in range(FUZZ):
        path.write_bytes(damaged(raw, rng))
        try:
            read()
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    path.write_bytes(raw)
    read()
    print(f"{path.name}: {refused} of {FUZZ} damaged files refused, the others read")
    return refused


@pytest.mark.parametrize("kind", ["bin", "py", "mnist", "mnist.gz"])
def test_damaged_data_is_refused_or_read_but_never_more(tmp_path, kind):
    folder = tmp_path / ("cifar-10-batches-" + kind if "mnist" not in kind else "mnist")
    if "mnist" in kind:
        write_mnist(folder, pack=kind == "mnist.gz")
        path = folder / ("train-labels-idx1-ubyte" + ".gz" * (kind == "mnist.gz"))
    else:
        records = write_cifar10(tmp_path / "cifar-10-batches-bin" if kind == "bin" else tmp_path / "unused")
        if kind == "py":
            write_cifar10_py(folder, records)
        path = folder / ("data_batch_2" + ".bin" * (kind == "bin"))
    name = "mnist" if "mnist" in kind else "cifar10"
    assert read_damaged(path, lambda: load_dataset(name, tmp_path), np.random.default_rng(FUZZ)) > FUZZ / 4


def test_damaged_checkpoints_are_refused(tiny, capsys):
    flags = [*tiny, "--method", "rnn-adv", "--epochs", "1", "--limit", "16", "--out", "run"]
    main(flags)
    rng, last = np.random.default_rng(FUZZ), Path("run/last.pt")
    assert read_damaged(last, lambda: load_run("run", "last"), rng) > 0.8 * FUZZ
    raw = bytearray(last.read_bytes())
    raw[len(raw) // 2] ^= 1  # a single bit of the weights
    last.write_bytes(raw)
    with pytest.raises(InputError, match="checksum"):
        load_run("run", "last")
    for raw in (b"", b"PK", bytes(raw[:-1000]), bytes(raw)):
        last.write_bytes(raw)
        assert main([*flags, "--resume"]) == 2
        error = capsys.readouterr().err
        assert "last.pt is not a checkpoint of l2l_adv, or is damaged" in error and error.count("\n") == 1
        assert last.read_bytes() == raw


def test_a_malicious_checkpoint_is_refused_unexecuted(tiny, tmp_path, capsys):
    flags = [*tiny, "--epochs", "1", "--out", "run"]
    main(flags)
    Bomb.target = tmp_path / "executed"
    checkpoint = torch.load("run/last.pt", weights_only=True)
    for bad in (Bomb(), checkpoint | {"settings": Bomb()}, checkpoint | {"more": [Bomb()]}):
        for name in ("last.pt", "best.pt"):
            torch.save(bad, Path("run", name))
        assert main(["eval", "run"]) == 2 and main([*flags, "--resume"]) == 2
        assert capsys.readouterr().err.count("\n") == 2 and not Bomb.target.exists()


# ---- Bad input -------------------------------------------------------------------------------------------------------

X, Y = torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("change, words", [
    (dict(eps=0.0), "eps must be above 0"), (dict(eps=1.0), "below 1"), (dict(eps=float("nan")), "eps must"),
    (dict(eps=8), "8/255"), (dict(steps=0), "positive whole"), (dict(steps=2.5), "positive whole"),
    (dict(x=X * 255), "divide by 255"), (dict(x=X - 0.5), "must lie in"), (dict(x=X[0]), "(B, C, H, W)"),
    (dict(x=(X * 255).byte()), "float"), (dict(x=X * float("nan")), "must lie in"), (dict(x=X[:0], y=Y[:0]), "images"),
    (dict(y=Y[:1]), "one per image"), (dict(y=Y.float()), "int64"), (dict(y=Y - 1), "class numbers"),
])
def test_attacks_refuse_bad_input(change, words):
    call = dict(x=X, y=Y, eps=0.1, steps=1) | change
    model, optimizer = Net((3, 4, 4)), LearnedOptimizer()
    theta, phi = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(optimizer.parameters(), 0.1)
    x, y = call.pop("x"), call.pop("y")
    for attack in (lambda: pgd(model, x, y, **call, step_size=0.1), lambda: cw_linf(model, x, y, **call, step_size=0.1),
                   lambda: learned_attack(model, optimizer, x, y, **call),
                   lambda: train_step_pgd(model, theta, x, y, **call, step_size=0.1),
                   lambda: train_step_learned(model, optimizer, theta, phi, x, y, **call)):
        with pytest.raises(ValueError, match=re.escape(words)):
            attack()


@pytest.mark.parametrize("wrong", [
    lambda: pgd(Net((3, 4, 4)), X, Y, eps=0.1, step_size=0.0, steps=1),
    lambda: pgd(Net((3, 4, 4)), X, Y, eps=0.1, step_size=0.1, steps=1, start="zero"),
    lambda: learned_attack(Net((3, 4, 4)), None, X, Y, eps=0.1, steps=1), lambda: Settings(out="x", epochs="3"),
    lambda: Settings(out="x", method=None), lambda: Settings(out="x", dataset=None), lambda: Settings(out="x", seed=None),
    lambda: pgd(Net((3, 4, 4)), X.numpy(), Y, eps=0.1, step_size=0.1, steps=1),
    lambda: evaluate(Net((3, 4, 4)), X, Y, {}, batch_size=0), lambda: train_optimizer(Net((3, 4, 4)), [], eps=0.1),
    lambda: train_optimizer(Net((3, 4, 4)), [(X, Y)], eps=0.1, lr=-1), lambda: train_optimizer(Net((3, 4, 4)), [(X, Y)], eps=2),
    lambda: Settings(out="x", eps_warmup=2), lambda: Trades(beta=0), lambda: LearnedOptimizer(cell="gru"), lambda: LearnedOptimizer(hidden_size=0),
    lambda: evaluate(Net((3, 4, 4)), X * 2, Y, {}), lambda: load_dataset("cifar100"), lambda: Settings(out=""),
    lambda: Settings(out="x", method="fgsm"), lambda: Settings(out="x", epochs=-1),
])
def test_python_refuses_bad_input(wrong):
    with pytest.raises(InputError):
        wrong()


@pytest.mark.parametrize("flags, words", [
    (["--method", "fgsm"], "choose from plain, advtrain"), (["--model", "alexnet"], "choose from small, vgg16"),
    (["--dataset", "svhn"], "choose from synthetic, mnist"), (["--eps", "0"], "eps must be a number above 0"),
    (["--eps", "8"], "eps must be"), (["--eps", "8/0"], "--eps"), (["--eps", "nan"], "eps must be"),
    (["--steps", "0"], "steps must be"), (["--step-size", "-0.1"], "step_size must be"), (["--epochs", "0"], "epochs"),
    (["--epochs", "two"], "--epochs"), (["--batch-size", "-4"], "batch_size"), (["--lr", "inf"], "lr must be"),
    (["--device", "tpu9"], "no device"), (["--seed", "-1"], "at least 0"), (["--seed", "9" * 30], "seed"), (["--cell", "gru"], "unknown cell"),
    (["--data-dir", "nowhere"], "no cifar10 in nowhere"), (["--limit", "0"], "limit"), (["--bogus"], "--bogus"),
    (["--method", ""], "choose from"), (["--model", ""], "choose from"), (["--dataset", ""], "choose from"),
    (["--eps", ""], "--eps"), (["--eps=-8/255"], "eps must"), (["--eps", "1e30"], "eps must"), (["--eps", "8/255/2"], "--eps"),
    (["--steps", "1.5"], "--steps"), (["--steps", "9" * 30], "steps must"), (["--step-size", "nan"], "step_size must"),
    (["--step-size", "1e300"], "step_size must"), (["--step-size", ""], "--step-size"), (["--beta", "0"], "beta must"),
    (["--beta", "nan"], "beta must"), (["--beta", "six"], "--beta"), (["--hidden-size", "0"], "hidden_size"),
    (["--hidden-size", "9" * 12], "hidden_size"), (["--meta-lr", "-1"], "meta_lr"), (["--meta-lr", "nan"], "meta_lr"),
    (["--meta-images", "0"], "meta_images"), (["--meta-images", "few"], "--meta-images"), (["--epochs", "9" * 30], "epochs"),
    (["--epochs", ""], "--epochs"), (["--batch-size", "0"], "batch_size"), (["--batch-size", "9" * 30], "batch_size"),
    (["--lr", "0"], "lr must"), (["--lr", "1e300"], "lr must"), (["--model", "vgg16", "--limit", "1"], "too few for vgg16"), (["--lr", "nan"], "lr must"), (["--lr", "fast"], "--lr"), (["--schedule", "cosine"], "schedule"),
    (["--precision", "fp8"], "precision"), (["--compile", "yes"], "compile"), (["--seed", "1.5"], "--seed"),
    (["--seed", ""], "--seed"), (["--device", ""], "no device"), (["--device", "meta"], "no device"),
    (["--device", "cuda:-3"], "no device"), (["--limit", "-1"], "limit"), (["--limit", "9" * 30], "limit"),
    (["--eps-warmup", "-0.1"], "eps_warmup"), (["--eps-warmup", "1.1"], "eps_warmup"), (["--eps-warmup", "nan"], "eps_warmup"),
    (["--checkpoint-every", "0"], "checkpoint_every"), (["--checkpoint-every", "nan"], "checkpoint_every"),
    (["--checkpoint-every", "soon"], "--checkpoint-every"), (["--cell", ""], "unknown cell"), (["--out", ""], "--out"),
])
def test_train_refuses_bad_input_in_one_line(tiny, tmp_path, capsys, flags, words):
    try:
        status = main([*tiny, "--out", "run", *flags])
    except SystemExit as exit:  # argparse
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_overwritten(tiny, capsys):
    assert main([*tiny, "--out", "run"]) is None
    before = Path("run/last.pt").read_bytes()
    assert main([*tiny, "--out", "run"]) == 2 and "holds a run already" in capsys.readouterr().err
    assert Path("run/last.pt").read_bytes() == before


def damage_truncate(folder):
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-100])


def damage_whole_record(folder):
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-3073])


def damage_label(folder):
    path = folder / "test_batch.bin"
    path.write_bytes(bytes([10]) + path.read_bytes()[1:])


@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "data_batch_4.bin").unlink(), "data_batch_4.bin"), (damage_truncate, "truncated"),
    (damage_whole_record, "differ in size"), (damage_label, "label 10"),
    (lambda folder: (folder / "test_batch.bin").write_bytes(b""), "empty"),
])
def test_damaged_cifar10_is_refused(tiny, tmp_path, capsys, damage, words):
    damage(tmp_path / "cifar")
    assert main([*tiny, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [
    lambda raw: raw[:-1], lambda raw: b"", lambda raw: b"\x00\x00\x09" + raw[3:], lambda raw: raw[:9], lambda raw: raw + b"x"])
@pytest.mark.parametrize("pack", [True, False])
def test_damaged_mnist_is_refused(tmp_path, change, pack):
    write_mnist(tmp_path / "mnist", pack=pack)
    path = tmp_path / "mnist" / f"t10k-images-idx3-ubyte{'.gz' if pack else ''}"
    raw = gzip.decompress(path.read_bytes()) if pack else path.read_bytes()
    path.write_bytes(gzip.compress(change(raw)) if pack else change(raw))
    with pytest.raises(InputError, match="t10k-images"):
        load_dataset("mnist", tmp_path)
    if pack:
        path.write_bytes(gzip.compress(raw)[:-9])
        with pytest.raises(InputError, match="cannot read"):
            load_dataset("mnist", tmp_path)


def test_eval_refuses_what_is_not_a_run(tiny, tmp_path, capsys):
    main([*tiny, "--out", "run"])
    checkpoint = torch.load("run/best.pt", weights_only=True)
    Path("empty").mkdir()
    wrong = {"vgg": checkpoint | {"state_dict": MODELS["vgg16"](3).state_dict()},
             "tensor": torch.zeros(3), "keys": {"state_dict": {}}}
    for name, content in wrong.items():
        Path(name).mkdir()
        torch.save(content, f"{name}/best.pt")
    Path("file").write_bytes(Path("run/best.pt").read_bytes())  # a checkpoint, but not a folder
    Path("text").mkdir()
    Path("text/best.pt").write_text("not a checkpoint")
    capsys.readouterr()
    for name in ["empty", "nothing", "text", "file", *wrong]:
        assert main(["eval", "run", name, "--limit", "2"]) == 2
        captured = capsys.readouterr()
        assert name in captured.err and captured.err.count("\n") == 1 and captured.out == ""
        assert not Path("run/eval.json").exists() and not Path(name, "eval.json").exists()


def test_eval_refuses_runs_that_do_not_belong_in_one_table(tiny, capsys):
    main([*tiny, "--out", "a"])
    main([*tiny, "--eps", "4/255", "--out", "b"])
    assert main(["eval", "a", "b", "--limit", "2"]) == 2 and "differ in eps" in capsys.readouterr().err
    assert main(["eval", "a", "--eps", "0"]) == 2 and "eps must be" in capsys.readouterr().err
    assert main(["eval", "a", "b", "--limit", "2", "--eps", "2/255", "--worst-only"]) is None
    rows = capsys.readouterr().out.splitlines()
    assert "eps = 2/255" in rows[0] and rows[1].split() == ["run", "model", "natural", "worst"] and len(rows) == 6


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without a learned optimizer."""
    folder = tmp_path_factory.mktemp("runs")
    write_cifar10(folder / "cifar", n=6)
    main(["train", "--method", "plain", "--dataset", "cifar10", "--data-dir", str(folder / "cifar"), "--model", "small",
          "--epochs", "1", "--out", str(folder / "plain")])
    return folder / "plain"


@pytest.mark.parametrize("flags, words", [
    (["--attacks", "fgsm"], "unknown attack 'fgsm'"), (["--attacks", "pgd-0"], "unknown attack 'pgd-0'"),
    (["--attacks", "pgd-10,"], "unknown attack ''"), (["--attacks", "learned-10"], "no run here has a learned optimizer"),
    (["--attacks", "sharp-10"], "no run here has a learned optimizer"),
    (["--restarts", "0"], "--restarts"), (["--batch-size", "0"], "--batch-size"), (["--limit", "many"], "--limit"),
    (["--seed", "9" * 30], "--seed"), (["--seed", "-1"], "--seed"), (["--limit", "9" * 30], "--limit"), (["--limit", ""], "--limit"),
    (["--batch-size", "9" * 30], "--batch-size"), (["--eps", "nan"], "eps must"), (["--attacks", ""], "unknown attack ''"),
    (["--eps", "8"], "eps must"), (["--device", "meta"], "no device"), (["--attacks", "pgd-1e3"], "unknown attack"), (["--attacks", "pgd-" + "9" * 5000], "unknown attack"), (["--restarts", "-1"], "--restarts"), (["--restarts", "9" * 30], "--restarts"),
    (["--autoattack"], "pip install --no-deps torchattacks"), (["--eps", "x"], "--eps"), (["--checkpoint", "first"], "--checkpoint"),
])
def test_eval_refuses_bad_input_in_one_line(plain, capsys, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, "torchattacks", None)  # as if it were not installed
    try:
        status = main(["eval", str(plain), "--limit", "2", *flags])
    except SystemExit as exit:  # argparse
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2 and words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (plain / "eval.json").exists()


# ---- Evidence: attacks by name, other people's attacks, checks for gradient masking ----------------------------------

def test_eval_runs_the_attacks_it_is_asked_for(tiny, capsys, monkeypatch):
    class Attack:  # stands for those of torchattacks
        def __init__(self, model, eps, seed, steps=100, n_queries=5000, multi_targeted=True):
            assert not model.training and (eps, seed) == (8 / 255, 5)
            assert (steps, n_queries, multi_targeted) == (100, 5000, True)

    class MultiAttack:
        def __init__(self, attacks):
            assert len(attacks) == 4

        def __call__(self, x, y):
            return 1 - x

    package = dict.fromkeys(("APGD", "APGDT", "FAB", "Square"), Attack) | {"MultiAttack": MultiAttack}
    monkeypatch.setitem(sys.modules, "torchattacks", types.SimpleNamespace(**package))
    main([*tiny, "--method", "rnn-adv", "--epochs", "1", "--seed", "4", "--out", "run"])
    capsys.readouterr()
    flags = ["--attacks", "learned-3,pgd-2", "--restarts", "2", "--autoattack", "--checkpoint", "last", "--seed", "5"]
    assert main(["eval", "run", "--limit", "6", *flags]) is None
    header, columns, *_ = capsys.readouterr().out.splitlines()
    assert columns.split()[2:] == ["natural", "learned-3", "pgd-2", "autoattack", "worst"]
    for words in ("last checkpoint", "training seed 4", "attack seed 5", "2 restarts"):
        assert words in header
    result = json.loads(Path("run/eval.json").read_text())
    x, y = to_unit(load_dataset("cifar10").x_test[:6]), load_dataset("cifar10").y_test[:6]
    model = load_classifier("run/last.pt")
    assert result["accuracy"]["autoattack"] == (model(1 - x).argmax(1) == y).sum().item() / 6
    assert result["loss"]["autoattack"] == pytest.approx(F.cross_entropy(model(1 - x), y).item(), rel=1e-4)
    assert result["restarts"] == 2 and result["attacks"] == ["learned-3", "pgd-2", "autoattack"]
    losses = []
    for attack_seed in ("5", "5", "6"):
        assert main(["eval", "run", "--limit", "6", "--attacks", "pgd-2", "--seed", attack_seed]) is None
        losses.append(json.loads(Path("run/eval.json").read_text())["loss"]["pgd-2"])
    assert losses[0] == losses[1] != losses[2]


def test_differences_within_a_coin_s_noise_are_not_held_against_a_model():
    a = torch.zeros(100, dtype=torch.bool)
    b = a.clone()
    a[:4] = True  # 4 of 4 differing images: two standard deviations
    assert not_above(a, b) and not_above(b, a)
    a[4] = True
    assert not not_above(a, b) and not_above(b, a)


class Masked(nn.Module):
    """Classifies by the mean pixel, behind a rounding that lets no gradient through."""

    def forward(self, x):
        rounded = (x * 8).round() / 8 + 0 * x
        return (rounded.flatten(1).mean(1, keepdim=True) - 0.5) * torch.tensor([[-9.0, 9.0]])


def test_sanity_checks_pass_an_open_model_and_fail_a_masked_one():
    torch.manual_seed(0)
    x = torch.rand(64, 1, 4, 4)
    y = (x.flatten(1).mean(1) > 0.5).long()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        linear[1].weight.copy_(torch.tensor([[-9 / 16], [9 / 16]]).expand(2, 16))
        linear[1].bias.copy_(torch.tensor([4.5, -4.5]))
    passed = {name: ok for name, ok, _ in checks(linear, x, y, 0.1, {"masked": Masked()})}
    assert len(passed) == 6 and all(passed.values())
    failed = {name: numbers for name, ok, numbers in checks(Masked(), x, y, 0.1, {"linear": linear}) if not ok}
    assert {name.split()[0] for name in failed} == {"random", "accuracy", "at", "PGD-10"}
    assert failed["at most 1 % of the images have an all-zero gradient"] == "100.00 %"


def test_eval_sanity_prints_a_line_for_each_check(tiny, capsys):
    for out in ("a", "b"):
        main([*tiny, "--method", "plain", "--epochs", "1", "--out", out])
    capsys.readouterr()
    assert main(["eval", "a", "b", "--sanity", "--limit", "2"]) is None
    header, *lines = capsys.readouterr().out.splitlines()
    assert "eps = 8/255" in header and len(lines) == 14 and lines[0].startswith("a (plain") and "made on b" in lines[6]
    assert all(re.match(r"  (pass|FAIL)  .*: .*\d", line) for line in lines[1:7] + lines[8:])
    assert not Path("a/eval.json").exists()


def test_a_lent_learned_optimizer_attacks_the_run_that_has_none(tiny, capsys):
    main([*tiny, "--method", "rnn-adv", "--out", "learned"])
    main([*tiny, "--method", "advtrain", "--out", "by-hand"])
    with torch.no_grad():  # so that its steps are not tiny
        saved = torch.load("learned/best.pt", weights_only=True)
        saved["learned_optimizer"]["W_out"].mul_(100)
        torch.save(saved, "learned/best.pt")
    capsys.readouterr()
    assert main(["eval", "by-hand", "--limit", "4", "--attacks", "learned-2", "--lend", "learned"]) is None
    assert "with learned's learned optimizer" in capsys.readouterr().out
    result = json.loads(Path("by-hand/eval.json").read_text())
    model, x, y = load_classifier("by-hand/best.pt"), *(part[:4] for part in load_dataset("cifar10")[2:4])
    attacks = {"learned-2": named_attack("learned-2", result["eps"], load_run("learned")[1])}
    torch.manual_seed(0)
    assert result["loss"] == pytest.approx(evaluate(model, to_unit(x), y, attacks, losses=True)[1], rel=1e-5)
    assert result["loss"]["learned-2"] > result["loss"]["natural"] and result["lender"] == "learned"
    assert main(["eval", "learned", "by-hand", "--limit", "4", "--attacks", "sharp-2"]) is None
    assert [row.split()[3] for row in capsys.readouterr().out.splitlines()[2::2]][1] == "-"  # by-hand has none of its own
    assert main(["eval", "by-hand", "--limit", "4", "--attacks", "sharp-2", "--lend", "learned"]) is None
    sharp = {"sharp-2": named_attack("sharp-2", result["eps"], load_run("learned")[1])}
    torch.manual_seed(0)
    expected = evaluate(model, to_unit(x), y, sharp, losses=True)[1]
    assert json.loads(Path("by-hand/eval.json").read_text())["loss"] == pytest.approx(expected, rel=1e-5)
    assert expected["sharp-2"] != result["loss"]["learned-2"]
    assert main(["eval", "learned", "--limit", "2", "--attacks", "pgd-1", "--lend", "learned"]) is None
    assert json.loads(Path("learned/eval.json").read_text())["lender"] is None  # it has its own
    assert main(["eval", "learned", "--limit", "2", "--lend", "by-hand"]) == 2
    assert "by-hand has no learned optimizer to lend" in capsys.readouterr().err


# ---- results/ --------------------------------------------------------------------------------------------------------

WORKER = f"""#!/bin/sh
# python3 for reproduce.sh: notes what it is asked for and leaves what a training and an evaluation leave.
case $1 in -c) exit 1 ;; results/table.py) exec "{sys.executable}" "$@" ;; esac
echo "$*" >>"$CALLS"
case $2 in
train) for out do case $last in --out) break ;; esac; last=$out; done
       case " $FAILS " in *" ${{out##*/}} "*) echo "out of memory" >&2; exit 1 ;; esac
       mkdir -p "$out"; touch "$out/log.jsonl" ;;
eval) echo '{{"images": 5, "training_seed": 2, "accuracy": {{"natural": 0.5, "worst": 0.25}}, "loss": {{"natural": 1.5}}}}' >"$3/eval.json" ;;
esac
"""


def test_reproduce_trains_and_attacks_each_run_once(tmp_path, monkeypatch):
    (tmp_path / "python3").write_text(WORKER)
    (tmp_path / "python3").chmod(0o755)
    for name in ("LIMIT", "EPOCHS", "TEST_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(PATH=f"{tmp_path}:{os.environ['PATH']}", RUNS=str(tmp_path / "runs"), JOBS="1", FAILS="",
                            RESULTS=str(tmp_path / "numbers"), CALLS=str(tmp_path / "calls")).items():
        monkeypatch.setenv(name, value)

    def run(*names):
        (tmp_path / "calls").write_text("")
        done = subprocess.run(["bash", HERE / "results" / "reproduce.sh", *names], capture_output=True, text=True, timeout=30)
        asked = (tmp_path / "calls").read_text().replace(str(tmp_path / "runs"), "R").replace("l2l_adv.py ", "")
        return done.returncode, done.stdout, done.stderr, asked.splitlines()

    names = "advtrain-s2", "rnn-adv-rnn-s0", "trades-s0"
    status, table, _, asked = run("mnist", *names)
    lenders = dict(zip(names, ("rnn-adv-s2", "rnn-adv-rnn-s0", "rnn-trades-s0")))
    attacked = {name: [f"eval R/{name} --limit 2000 --lend R/{lenders[name]}{last}" for last in ("", " --checkpoint last")]
                for name in names}
    mnist = "--resume --dataset mnist --precision bf16"
    assert status == 0 and "| advtrain | 1 | 50.00 | 25.00 |" in table and asked == [
        f"train --method advtrain --out R/advtrain-s2 {mnist} --seed 2",
        f"train --method rnn-adv --out R/rnn-adv-rnn-s0 {mnist} --seed 0 --cell rnn",
        f"train --method trades --out R/trades-s0 {mnist} --seed 0",
        *sum(attacked.values(), []),
        *(f"eval R/{name} --attacks learned-10,sharp-10 --limit 2000 --lend R/{lenders[name]}" for name in names),
        *(f"eval R/{name} --attacks pgd-10,learned-10 --limit 10000 --lend R/{lenders[name]}" for name in names),
        "eval R/trades-s0 --attacks pgd-10 --autoattack --limit 500"]
    assert run("mnist", *names)[3] == []  # nothing is done twice
    (tmp_path / "numbers" / "trades-s0.last.json").unlink()
    assert run("mnist", "trades-s0")[3][1:] == attacked["trades-s0"][1:]

    monkeypatch.setenv("FAILS", "trades-resnet18-s1")
    status, _, err, asked = run("cifar10", "trades-resnet18-s1", "rnn-adv-vgg16-s1")
    assert status != 0 and err == "reproduce.sh: trades-resnet18-s1 failed: out of memory\n" and asked == [
        "train --method trades --out R/trades-resnet18-s1 --resume --dataset cifar10 --seed 1 --model resnet18",
        "train --method rnn-adv --out R/rnn-adv-vgg16-s1 --resume --dataset cifar10 --seed 1 --model vgg16"]
    monkeypatch.setenv("FAILS", "")
    names = "trades-resnet18-s1", "rnn-adv-vgg16-s1"
    lenders = dict(zip(names, ("rnn-trades-resnet18-s1", names[1])))
    assert [line for line in run("cifar10", *names)[3] if line.startswith("eval")] == [
        *(f"eval R/{name} --limit 10000 --lend R/{lenders[name]}{last}" for name in names for last in ("", " --checkpoint last")),
        *(f"eval R/{name} --attacks learned-10,sharp-10 --limit 10000 --lend R/{lenders[name]}" for name in names)]
    mains = " ".join(f"R/{method}-vgg16-s0" for method in ("advtrain", "rnn-adv", "trades", "rnn-trades"))
    status, _, _, asked = run("cifar10")
    assert status == 0 and len([line for line in asked if line.startswith("train")]) == 9  # one of the ten is done
    assert asked[-2:] == ["bench --model vgg16 --batch-size 128 --json",
                          f"results/analyse.py {mains} --limit 1000 --json {tmp_path / 'numbers'}/analyses.json"]
    assert run("svhn")[0] == 2


def test_table_is_the_mean_and_the_standard_deviation_over_seeds(tmp_path, capsys):
    accuracy = {"trades": [0.91, 0.93, 0.98], "rnn-adv": [0.5, 0.75], "plain": [0.25]}
    for method, values in accuracy.items():
        for seed, value in enumerate(values):
            run = {"images": 2000, "training_seed": seed, "accuracy": {"natural": 0.99, "worst": value},
                   "loss": {"natural": value / 2} | ({"learned-10": 2.5, "pgd-100": 2.0 + value} if method == "rnn-adv" else {})}
            (tmp_path / f"{method}-s{seed}.best.json").write_text(json.dumps(run))
    sharp = {"images": 2000, "training_seed": 1, "accuracy": {"sharp-10": 0.5, "worst": 0.25}, "loss": {"learned-10": 7.0, "sharp-10": 3.5}}
    (tmp_path / "rnn-adv-s1.sharp.json").write_text(json.dumps(sharp))
    table(tmp_path)
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    assert rows[0] == ["method", "seeds", "natural", "worst"] and rows[4] == ["method", "seeds", "natural", "pgd-100", "learned-10"]
    for row, loss, method in zip(rows[1:4], rows[5:8], ("plain", "rnn-adv", "trades"), strict=True):
        values = np.array(accuracy[method])
        spread = [f" ± {np.std(values, ddof=1) * scale:.{digits}f}" if len(values) > 1 else ""
                  for scale, digits in ((100, 2), (0.5, 4))]
        assert row[:2] == [method, str(len(values))] and row[3] == f"{100 * values.mean():.2f}{spread[0]}"
        more = ["2.6250 ± 0.1768", "2.5000 ± 0.0000"] if method == "rnn-adv" else ["-", "-"]
        assert loss == [method, str(len(values)), f"{values.mean() / 2:.4f}{spread[1]}", *more]
    assert rows[8:] == [["method", "0", "1", "2"], ["plain", "25.00", "-", "-"],
                        ["rnn-adv", "50.00, +0.0000", "75.00, -0.2500, +0.7500", "-"], ["trades", "91.00", "93.00", "98.00"],
                        ["method", "seeds", "sharp-10", "worst"], ["rnn-adv", "1", "50.00", "25.00"],
                        ["method", "seeds", "learned-10", "sharp-10"], ["rnn-adv", "1", "7.0000", "3.5000"]]
    assert "first 2,000 test images" in printed and " above " not in printed
    for seed, value in enumerate((0.9, 0.94, 0.7)):
        run = {"images": 2000, "training_seed": seed + 1, "accuracy": {"natural": 1.0, "worst": value}, "loss": {}}
        (tmp_path / f"rnn-trades-s{seed + 1}.best.json").write_text(json.dumps(run))
    run = {"images": 2000, "training_seed": 1, "accuracy": {"natural": 1.0, "worst": 0.5}, "loss": {}}
    (tmp_path / "advtrain-s1.best.json").write_text(json.dumps(run))
    table(tmp_path)  # seeds 1 and 2 are those of both: 0.90 − 0.93 and 0.94 − 0.98; and 0.75 − 0.5
    leads = [line for line in capsys.readouterr().out.splitlines() if " above " in line]
    assert leads == ["rnn-adv above advtrain, worst of this table, in points, by training seed: 25.00; 25.00",
                     "rnn-trades above trades, worst of this table, in points, by training seed: -3.00, -4.00; -3.50 ± 0.71"]


# ---- run_cifar.sh ----------------------------------------------------------------------------------------------------

STAND_IN = f"""#!/bin/sh
# python3 for run_cifar.sh: has torch, finds CIFAR-10 but no CUDA, and plays the trainer; the rest it leaves to Python.
case $1 in -c) exit ;; -) echo 0 1; exit ;; -I) exec "{sys.executable}" "$@" ;; esac
shift
(IFS="|"; echo "$*" >>calls)
[ "$1" = train ] || {{ echo "the table"; exit; }}
method=$3
for out do :; done
[ ! -e "$out/last.pt" ] || {{ echo "$method is finished"; exit; }}
mkdir -p "$out"
[ "$method" != "$HANGS" ] || {{ touch "$out/begun"; exec sleep 60; }}
case " $FAILS " in *" $method "*) echo "out of memory" >&2; exit 1 ;; esac
touch "$out/last.pt"
"""


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Starts run_cifar.sh, as a program, with a stand-in for Python, in an empty folder whose name has a space."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(STAND_IN)
    (tmp_path / "bin" / "python3").chmod(0o755)
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path / "a folder")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in "METHODS MODEL EPOCHS LIMIT TEST_LIMIT SEED DEVICE OUT CIFAR10_DIR FAILS HANGS".split():
        monkeypatch.delenv(name, raising=False)

    def start(*flags):
        return subprocess.Popen(
            ["bash", HERE / "run_cifar.sh", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return start


def finish(process):
    """(status, stdout, stderr)"""
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def calls():
    """What the stand-in was asked for since the last look: the trained methods, or "eval" and the evaluated runs."""
    lines = [line.split("|") for line in Path("calls").read_text().splitlines()]
    Path("calls").unlink()
    return [["eval", *(Path(a).name for a in line[1:line.index("--device")])] if line[0] == "eval" else line[2]
            for line in lines]


@pytest.mark.parametrize("flags, words", [
    (["--epoch", "3"], "--epoch"), (["--seed"], "needs a value"), (["--epochs", "0"], "EPOCHS"),
    (["--limit", "08"], "LIMIT"), (["--methods", " "], "METHODS"), (["--out", "calls/x"], "cannot write")])
def test_run_cifar_refuses_bad_flags_in_one_line(cifar, flags, words):
    Path("calls").touch()  # no folder can be made in it
    status, out, err = finish(cifar(*flags))
    assert status == 2 and words in err and err.count("\n") == 1 and Path("calls").read_text() == ""


def test_run_cifar_refuses_what_the_trainer_does_not_know(cifar, tmp_path):
    """With the real Python, in a folder with a module that it must not take for ours."""
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\n[ "$1" = -c ] || exec "{sys.executable}" "$@"\n')
    Path("baselines.py").write_text("raise SystemExit('the wrong module')")
    status, out, err = finish(cifar("--synthetic", "--methods", "plain rnn"))
    assert status == 2 and "unknown method 'rnn'" in err and err.count("\n") == 1 and not Path("runs").exists()


def test_run_cifar_help_is_right(cifar):
    status, out, err = finish(cifar("--help"))
    assert status == 0 and "else 5000 (synthetic: 0)\n" in out and "else 500 (synthetic: 300)\n" in out


def test_run_cifar_goes_on_when_a_method_fails_and_the_table_says_so(cifar, monkeypatch):
    flags = ["--methods", "plain trades rnn-adv", "--seed", "3", "--", "--beta", "2"]
    monkeypatch.setenv("FAILS", "trades")
    status, out, err = finish(cifar(*flags))
    assert status == 1 and "the table\ntrades       failed: see above\n" in out
    assert Path("calls").read_text().splitlines()[0].replace("|", " ") == (
        "train --method plain --dataset cifar10 --model small --epochs 3 --seed 3 --device auto --limit 5000 --beta 2 "
        "--resume --out runs/cifar10-small-n5000-e3-s3/plain")
    assert calls() == ["plain", "trades", "rnn-adv", ["eval", "plain", "rnn-adv"]]
    monkeypatch.setenv("FAILS", "")  # started again: the trainer finds what is finished
    status, out, err = finish(cifar(*flags))
    assert status == 0 and "plain is finished" in out and "failed" not in out and err == ""
    assert calls() == ["plain", "trades", "rnn-adv", ["eval", "plain", "trades", "rnn-adv"]]
    status, out, err = finish(cifar(*flags[:-1], "3"))
    assert status == 2 and "other settings" in err and err.count("\n") == 1 and not Path("calls").exists()
    monkeypatch.setenv("FAILS", "plain trades rnn-adv")
    Path("all fail").mkdir()
    Path("all fail/.settings").write_text("of a start that the trainer refused")
    status, out, err = finish(cifar("--out", "all fail", *flags))
    assert status == 1 and out.count("failed: see above") == 3 and calls() == ["plain", "trades", "rnn-adv"]


def wait_for(path):
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_run_cifar_stops_at_once_and_one_works_at_a_time(cifar, monkeypatch):
    monkeypatch.setenv("HANGS", "trades")
    monkeypatch.setenv("OUT", "two words")
    first = cifar("--methods", "plain trades rnn-adv")
    wait_for(Path("two words/trades/begun"))
    status, out, err = finish(cifar("--methods", "rnn-adv"))
    assert status == 2 and "another run_cifar.sh" in err and err.count("\n") == 1
    os.killpg(first.pid, signal.SIGINT)  # what Ctrl-C does
    status, out, err = finish(first)
    assert status == 130 and "goes on from here" in err and calls() == ["plain", "trades"]
    Path("two words/trades/begun").unlink()
    second = cifar("--methods", "trades")
    wait_for(Path("two words/trades/begun"))
    os.kill(second.pid, signal.SIGKILL)  # its training lives on
    second.wait()
    assert finish(cifar("--methods", "rnn-adv"))[0] == 2
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()
    assert calls() == ["trades"]
    monkeypatch.delenv("HANGS")
    assert finish(cifar("--methods", "plain trades"))[0] == 0
    assert calls() == ["plain", "trades", ["eval", "plain", "trades"]]


def test_run_cifar_leaves_no_half_made_environment(cifar, tmp_path):
    """In a copy, with a python3 that has neither torch nor venv."""
    here = tmp_path / "the copy"
    here.mkdir()
    (here / "run_cifar.sh").write_text((HERE / "run_cifar.sh").read_text())
    python3 = tmp_path / "bin" / "python3"
    python3.write_text(f"""#!/bin/sh
case "$*" in *torch*) exit 1 ;; "-m venv"*) mkdir -p "$3/bin"; echo "no ensurepip"; exit 1 ;; esac
exec "{sys.executable}" "$@"
""")

    def refused(words):
        result = subprocess.run(["bash", here / "run_cifar.sh", "--synthetic"], capture_output=True, text=True)
        assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1

    for _ in range(2):
        refused("install python3-venv")
        assert not (here / ".venv").exists()
    (here / ".venv").mkdir()
    (here / ".venv" / ".unfinished").touch()  # left by kill -9
    refused("install python3-venv")
    assert not (here / ".venv").exists()
    (here / ".venv").mkdir()  # somebody's own
    refused("lacks torch")
    assert (here / ".venv").exists()
    python3.write_text("#!/bin/sh\nexit 1\n")
    refused("3.9 or newer")


BATCHES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def cifar_archive(change=lambda member: None):
    """cifar-10-binary.tar.gz with 5 bytes per file; change(member) may spoil a member."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in [*BATCHES, "readme.html"]:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = 5
            change(member)
            tar.addfile(member, io.BytesIO(b"12345") if member.isreg() else None)
    return packed.getvalue()


@pytest.fixture
def download(tmp_path, monkeypatch):
    """download(what the server has, its MD5, ranges=…, cut=…) runs the download of run_cifar.sh against a server of
    ours that can begin in the middle or not, and breaks off after `cut` bytes. Returns (status, the line, begins of
    requests)."""
    (tmp_path / "in" / "side").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "side")
    code = re.search(r"<<'DOWNLOAD'\n(.*?)\nDOWNLOAD\n", (HERE / "run_cifar.sh").read_text(), re.S)[1]

    def run(content, md5=None, ranges=True, cut=None):
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                begin = int(re.fullmatch("bytes=([0-9]+)-", self.headers["Range"])[1])
                asked.append(begin)
                body = content[begin:] if ranges else content
                self.send_response(416 if not body else 206 if ranges else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:cut])

            def log_message(self, *args):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
            ours = re.sub("https://[^\"]*", f"http://127.0.0.1:{server.server_port}/", code)
            ours = re.sub('"[0-9a-f]{32}"', repr(md5 or hashlib.md5(content).hexdigest()), ours)
            assert ours.count("10000 * 3073") == 1
            result = subprocess.run([sys.executable, "-I", "-"], input=ours.replace("10000 * 3073", "5"), text=True,
                                    stderr=subprocess.PIPE, env={**os.environ, "no_proxy": "*"})
            server.shutdown()
        return result.returncode, result.stderr, asked
    return run


def test_a_broken_download_goes_on_and_a_wrong_one_is_refused(download):
    right = cifar_archive()
    status, line, asked = download(right, cut=100)
    assert status == 1 and "broke off" in line and line.count("\n") == 1
    assert [p.name for p in Path("data").iterdir()] == ["cifar-10-binary.tar.gz.part"]  # and nothing that would be used
    status, line, asked = download(right)
    assert status == 0 and line == "" and asked == [99]
    assert os.listdir("data") == ["cifar-10-batches-bin"]
    assert sorted(os.listdir("data/cifar-10-batches-bin")) == BATCHES
    assert Path("data/cifar-10-batches-bin/test_batch.bin").read_bytes() == b"12345"
    assert download(right) == (0, "", [])  # it is there: nothing is asked for
    shutil.rmtree("data")
    download(right, cut=100)
    assert download(right, ranges=False)[0] == 0  # a server that begins again
    shutil.rmtree("data")
    Path("data").mkdir()
    Path("data/cifar-10-binary.tar.gz.part").write_bytes(right)  # stopped between the download and the unpacking
    assert download(right) == (0, "", [len(right) - 1])
    shutil.rmtree("data")
    for attempt in range(2):
        status, line, asked = download(right, md5="0" * 32)
        assert status == 1 and "MD5" in line and asked == [0] and not Path("data").exists()


def absolute(member):
    member.name = f"{Path.cwd().parent}/outside-{Path(member.name).name}"


def upwards(member):
    member.name = f"cifar-10-batches-bin/../../../outside-{Path(member.name).name}"


def link(kind, target):
    def change(member):
        if "data_batch_4" in member.name:
            member.type, member.linkname, member.size = kind, target, 0
    return change


def too_short(member):
    if "data_batch_4" in member.name:
        member.size = 4


@pytest.mark.parametrize("change", [
    absolute, upwards, too_short, link(tarfile.DIRTYPE, ""), link(tarfile.FIFOTYPE, ""),
    link(tarfile.SYMTYPE, "/etc/passwd"), link(tarfile.SYMTYPE, "data_batch_1.bin"),
    link(tarfile.LNKTYPE, "cifar-10-batches-bin/data_batch_1.bin")])
def test_a_malicious_archive_does_no_harm(download, change):
    status, line, _ = download(cifar_archive(change))
    assert status == 1 and line.count("\n") == 1 and "Traceback" not in line
    assert not Path("data/cifar-10-batches-bin").exists() and sorted(os.listdir("..")) == ["side"]


def test_a_truncated_archive_is_refused(download):
    right = cifar_archive()
    for part in (right[:len(right) // 2], gzip.compress(gzip.decompress(right)[:1500]), b"", b"no archive"):
        status, line, _ = download(part)
        assert status == 1 and line.count("\n") == 1 and not Path("data/cifar-10-batches-bin").exists()
        shutil.rmtree("data", ignore_errors=True)


# ---- The analyses ----------------------------------------------------------------------------------------------------

spec = importlib.util.spec_from_file_location("analyse", HERE / "results" / "analyse.py")
analyse = importlib.util.module_from_spec(spec)
spec.loader.exec_module(analyse)


def run_of(model, optimizer=None, label="a", objective=AdvTrain()):
    return analyse.Run(label, "rnn-adv" if optimizer else "advtrain", model, optimizer, objective, None)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["pgd eps/4", "line search", "learned", "sharp"])
def test_analyse_follows_the_attacks_of_the_modules(name, objective):
    model, x, y = problem(batch=6, batch_norm=True)
    model.train()
    optimizer, sharp = big_steps("lstm"), big_steps("lstm")
    with torch.no_grad():
        sharp.W_out.mul_(10)
    attack = {
        "pgd eps/4": lambda x, y: pgd(model, x, y, eps=0.2, step_size=0.05, steps=10, objective=objective),
        "line search": lambda x, y: pgd(model, x, y, eps=0.2, step_size=0.2, steps=10, objective=objective,
                                        line_search=True),
        "learned": lambda x, y: learned_attack(model, optimizer, x, y, eps=0.2, steps=10, objective=objective),
        "sharp": lambda x, y: learned_attack(model, sharp, x, y, eps=0.2, steps=10, objective=objective)}[name]
    run, images = run_of(model, optimizer, objective=objective), analyse.Images(x, y, 0.2, seed=3, batch_size=4)
    rule = analyse.maximisers(run, ["step"])[name][0]
    losses, accuracy = analyse.climb(run, images, rule, 10)
    assert all(module.training for module in model.modules())
    torch.manual_seed(3)
    x_adv = torch.cat([attack(x[:4], y[:4]), attack(x[4:], y[4:])])
    model.eval()
    expected = objective.inner_loss(model(x_adv), objective.target(model, x, y)).detach().numpy()
    assert losses.shape == (11, 6) and np.allclose(losses[10], expected, atol=1e-12)
    assert accuracy == {10: (model(x_adv).argmax(1) == y).double().mean().item()}
    torch.manual_seed(3)
    *_, (end, _, _, _) = analyse.trajectory(model, x, y, rule, eps=0.2, steps=10, objective=objective)
    torch.manual_seed(3)
    assert torch.allclose(end, attack(x, y), atol=1e-15)


def test_analyse_momentum_equals_two_steps_by_hand():
    torch.manual_seed(0)
    model, x, y = Bowl(1 + torch.rand(1, 3, 3).double(), torch.rand(1, 1, 3, 3).double()), *problem(2, (1, 3, 3))[1:]
    a, c, z = model.a.detach().numpy(), model.c.numpy(), np.zeros_like(x.numpy())
    torch.manual_seed(1)
    points = list(analyse.trajectory(model, x, y * 0, analyse.momentum(0.25), eps=0.1, steps=2, objective=AdvTrain()))
    at, gathered = points[0][0].numpy(), z
    for t in range(2):
        logit = -(a * (at - c) ** 2).sum((1, 2, 3), keepdims=True)
        g = 1 / (1 + np.exp(-logit)) * -2 * a * (at - c)  # of log(1 + exp(logit)), the loss of label 0
        gathered = gathered + g / np.abs(g).sum((1, 2, 3), keepdims=True)
        at = np.clip(np.clip(at + 0.025 * np.sign(gathered), x.numpy() - 0.1, x.numpy() + 0.1), 0, 1)
        assert np.allclose(points[t + 1][0].numpy(), at, atol=1e-12)


@pytest.mark.parametrize("decay, expected", [(1.0, [1, -1]), (0.0, [-1, -1])])
def test_analyse_momentum_adds_up_normalised_gradients(decay, expected):
    rule, x = analyse.momentum(0.25, decay), torch.zeros(1, 1, 1, 2)
    state = None
    for g in ([3e-3, -1e-3], [-2.0, -2.0]):  # by their L1 norms: (3/4, −1/4) and (−1/2, −1/2)
        move, state = rule(analyse.Here(None, None, None, 0.4, x, x, torch.tensor(g).view(1, 1, 1, 2), None), state)
    assert torch.allclose(move.flatten(), 0.1 * torch.tensor(expected).float())


def test_analyse_transfer_has_the_white_box_on_its_diagonal():
    (a, x, _), (b, _, _) = problem(batch=40, dtype=torch.float32), problem(seed=5, dtype=torch.float32)
    y, optimizer = b(x).argmax(1), big_steps("lstm").float()  # b is always right, until it is attacked
    images = analyse.Images(x, y, 0.1, seed=3, batch_size=40)
    result = analyse.transfer([run_of(a, optimizer, "a"), run_of(b, None, "b")], images)
    by_hand = lambda model, x, y: pgd(model, x, y, eps=0.1, step_size=0.025, steps=10)  # noqa: E731
    for source, name, attack in ((a, "a pgd-10", by_hand), (b, "b pgd-10", by_hand), (
            a, "a learned-10", lambda model, x, y: learned_attack(model, optimizer, x, y, eps=0.1, steps=10))):
        for target, label in ((a, "a"), (b, "b")):
            torch.manual_seed(3)
            expected = evaluate(target, x, y, {"it": lambda _, x, y: attack(source, x, y)}, batch_size=40)["it"]
            assert result[name][label] == expected
    assert list(result) == ["a pgd-10", "a learned-10", "b pgd-10"]
    assert result["b pgd-10"]["b"] < result["a pgd-10"]["b"]


class HalfSign(nn.Module):
    """δ = sign(g) / 2, or against it where `turned`."""

    def forward(self, g, state=None, turned=False):
        return (-0.5 if turned else 0.5) * g.sign(), None


def test_analyse_behaviour_of_a_hand_made_optimizer():
    torch.manual_seed(0)
    w = torch.randn(1, 3, 3)
    w[0, 0, 0] = 0  # a coordinate without a gradient: it stays where it starts, inside, and does not count as agreeing
    x, y = 0.3 + 0.4 * torch.rand(4, 1, 3, 3), torch.zeros(4, dtype=torch.long)
    result = analyse.behaviour(run_of(Linear(w), HalfSign()), analyse.Images(x, y, 0.1, seed=0, batch_size=3))
    length, boundary, agreement = result.values()
    assert length == pytest.approx([0.5 * 8 / 9] * 10) and agreement == [1.0] * 10
    # From x + 0.001·noise two steps of eps/2 end at the surface, or up to the noise short of it; three are enough
    assert boundary[0] == 0 and boundary[2:] == pytest.approx([8 / 9] * 8)
    against = HalfSign()
    against.forward = lambda g, state=None: HalfSign.forward(against, g, turned=True)
    result = analyse.behaviour(run_of(Linear(w), against), analyse.Images(x, y, 0.1, seed=0, batch_size=4))
    assert result["agrees with sign(g)"] == [0.0] * 10
    # black images: every pixel starts within the noise of the face at 0, and half of the noise is cut there
    black = analyse.Images(torch.zeros(64, 1, 3, 3), torch.zeros(64, dtype=torch.long), 0.1, 0, 64)
    boundary = analyse.behaviour(run_of(Linear(-w.abs()), HalfSign()), black)["on the boundary"]
    assert boundary[0] == pytest.approx(8 / 9 + 1 / 18, abs=0.03)


@pytest.mark.parametrize("ours, claim", [
    ((3.0, 3.1), "holds"), ((1.1, 0.8), "does not hold"), ((2.5, 1.5), "is undecided")])
def test_analyse_verdict_is_about_the_best_of_the_others(ours, claim):
    def path(at_10, at_100=None):
        losses = np.zeros((11 if at_100 is None else 101, 2))
        losses[10], losses[-1] = at_10, at_10 if at_100 is None else at_100
        return losses

    result = analyse.verdict({"pgd eps/8": path((1, 1), (2, 2)), "pgd eps/4": path((1.1, 1.1), (1.9, 1.9)),
                              "momentum eps": path((1.5, 1.4)), "learned": path(ours, (9, 9)), "sharp": path((8, 8))})
    assert result["claim"].startswith(claim)
    assert (result["after 10"]["best"], result["after 100"]["best"]) == ("momentum eps", "pgd eps/8")
    gains = np.array(ours) - (1.5, 1.4)
    assert result["after 10"]["difference"] == pytest.approx(gains.mean())
    assert result["after 10"]["error"] == pytest.approx(gains.std(ddof=1) / 2 ** 0.5)


@pytest.fixture
def two_runs(tiny, monkeypatch):
    monkeypatch.setattr(analyse, "LONGER", (10, 12))  # the last of these is what the tables call 100
    for method in ("rnn-trades", "advtrain"):
        assert main([*tiny, "--method", method, "--out", method, "--epochs", "1", "--limit", "16"]) is None
    return ["rnn-trades", "advtrain", "--limit", "4", "--batch-size", "3"]


def test_analyse_prints_its_tables_and_one_json_file(two_runs, monkeypatch, capsys):
    capsys.readouterr()
    monkeypatch.setattr(analyse.figures, "plt", None)  # what there is without matplotlib
    assert analyse.main([*two_runs, "--json", "all.json", "--figures", "figures"]) is None
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "pip install matplotlib" in captured.err and not Path("figures").exists()
    titles = [line[:3] for line in captured.out.splitlines() if line.startswith("(")]
    assert titles == ["(a)", "(a)", "(b)", "(c)", "(d)"] and captured.out.count("verdict:") == 1
    assert captured.out.count("cifar10, eps = 8/255, the first 4 test images, best checkpoint, seed 0") == 5
    result = json.loads(Path("all.json").read_text())
    assert [len(result[name]) for name in analyse.ANALYSES] == [2, 1, 3, 1]
    step, table = result["step"]["rnn-trades"], captured.out.split("(a)")[1].splitlines()
    assert step["loss"].startswith("KL") and result["step"]["advtrain"]["loss"] == "cross-entropy"
    assert list(step["by step"]) == [line[:14].strip() for line in table[3:13]] and len(table[3].split()) == 2 + 12
    assert [line.split()[-2].endswith("*") for line in table[3:13]].count(True) == 1
    assert result["longer"]["rnn-trades"]["learned"]["loss"][0] == step["by step"]["learned"][10]
    assert analyse.main([*two_runs, "--only", "longer"]) is None
    assert capsys.readouterr().out.count("(") == 1 + 0 and Path("all.json").exists()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_analyse_draws_its_figures(two_runs):
    assert analyse.main([*two_runs, "--only", "step", "--figures", "figures"]) is None
    names = sorted(path.name for path in Path("figures").iterdir())
    assert names == ["images.png", "inner-loss.png", "surface.png", "training.png"]
    assert all(Path("figures", name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_analyse_refuses_bad_input_in_one_line(tiny, capsys):
    assert main([*tiny, "--method", "advtrain", "--out", "advtrain", "--epochs", "1", "--limit", "16"]) is None
    checkpoint = torch.load("advtrain/best.pt", weights_only=True)
    for name, change in (("other-eps", {"eps": 4 / 255}), ("mnist", {"dataset": "mnist"})):
        Path(name).mkdir()
        torch.save({**checkpoint, "settings": {**checkpoint["settings"], **change}}, f"{name}/best.pt")
    Path("empty").mkdir()
    before = sorted(Path(".").rglob("*"))
    for flags, words in (
            ("--only steps", "unknown analysis 'steps'"), ("--only step,", "unknown analysis ''"),
            ("--limit 0", "--limit"), ("--limit -3", "--limit"), ("--limit few", "--limit"), ("--seed -1", "--seed"),
            ("--batch-size 0", "--batch-size"),
            ("--checkpoint first", "--checkpoint"), ("--device tpu9", "no device"), ("nothing", "nothing is not a run"),
            ("advtrain/best.pt", "not a run"), ("empty", "best.pt is missing"), ("other-eps", "differ in eps"),
            ("mnist", "differ in dataset"), ("advtrain", "given twice"),
            ("--data-dir nowhere", "no cifar10 in nowhere"),
            ("--json nowhere/all.json", "cannot write nowhere/all.json"), ("--json empty", "cannot write empty")):
        capsys.readouterr()
        try:
            status = analyse.main(["--json", "all.json", "advtrain", *flags.split()])
        except SystemExit as exit:  # argparse
            status = exit.code
        captured = capsys.readouterr()
        assert status == 2 and captured.err.startswith("analyse.py: ") and words in captured.err, flags
        assert captured.err.count("\n") == 1 and captured.out == "" and sorted(Path(".").rglob("*")) == before


# ---- What the README shows -------------------------------------------------------------------------------------------

def readme_examples():
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)


@pytest.mark.parametrize("example", range(4))
def test_the_examples_of_the_readme_run(tiny, example):
    assert len(readme_examples()) == 4
    main([*tiny, "--method", "rnn-adv", "--epochs", "1", "--limit", "8", "--out", "runs/rnn-adv"])
    torch.manual_seed(0)
    exec(readme_examples()[example], {})


def test_the_command_line_runs_as_a_program(tmp_path):
    result = subprocess.run([sys.executable, HERE / "l2l_adv.py", "eval", tmp_path], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("l2l_adv.py: ") and "Traceback" not in result.stderr
    shown = subprocess.run([sys.executable, HERE / "l2l_adv.py", "train", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--meta-images" in shown.stdout
