"""Tests of l2l_adv.py and baselines.py: every part against an independent reference, forward and gradient.

    python3 -m pytest -q
"""
import gzip
import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines import (MODELS, AdvTrain, InputError, Margin, SmallCNN, Trades, augment, cw_linf, evaluate, hold_out,
                       input_gradient, load_dataset, pgd, project, to_unit)
from l2l_adv import (METHODS, LearnedOptimizer, Settings, fused, learned_attack, learning_rate, load_classifier, load_run, main,
                     meta_objective, size, train_step_learned, train_step_pgd, unroll)

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
    """Real CIFAR-10 format with 60 random images, and a settings list that trains on them within a second."""
    write_cifar10(tmp_path / "cifar")
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "cifar"))
    monkeypatch.chdir(tmp_path)
    return ["train", "--dataset", "cifar10", "--model", "small", "--epochs", "2", "--steps", "2", "--batch-size", "16"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_evaluated(tiny, tmp_path, capsys, method):
    assert main([*tiny, "--method", method, "--out", "runs/one"]) is None
    assert sorted(p.name for p in Path("runs/one").iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    rows = [json.loads(line) for line in Path("runs/one/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)
    capsys.readouterr()
    assert main(["eval", "runs/one", "--limit", "4", "--batch-size", "3"]) is None
    header, columns, row = capsys.readouterr().out.splitlines()
    assert "eps = 8/255" in header and "first 4 test images" in header and row.split()[0] == "one"
    accuracy = json.loads(Path("runs/one/eval.json").read_text())["accuracy"]
    learned = ["learned-10"] if method.startswith("rnn") else []
    assert list(accuracy) == ["natural", "pgd-10", "pgd-100", "cw-100", *learned, "worst"]
    assert accuracy["worst"] <= min(accuracy.values())
    for name, text in zip(columns.split()[2:], row.split()[2:]):
        assert text == (f"{100 * accuracy[name]:.2f}" if name in accuracy else "-")
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
    monkeypatch.setattr("l2l_adv.evaluate", lambda *_, **__: {"natural": 0.9, "pgd-10": next(robust), "worst": 0})
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
    main([*tiny, "--lr", "0.3", "--eps-warmup", "0.5", "--limit", "48", "--out", "run"])  # 2 epochs of 3 steps
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
    flags = [*tiny, "--method", "rnn-trades", "--epochs", "1", "--limit", "48", "--meta-images", "16", "--lr", "0.05"]
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
    model, x = SmallCNN(3), torch.rand(4, 3, 32, 32, requires_grad=True)
    outputs = []
    for model.bf16 in (False, True):
        logits = model(x)
        outputs.append((logits, torch.autograd.grad(logits[:, 0].sum(), x)[0]))
        assert logits.dtype == outputs[-1][1].dtype == torch.float32
    for fp32, bf16 in zip(*outputs):
        assert not torch.equal(fp32, bf16) and F.cosine_similarity(fp32.flatten(), bf16.flatten(), dim=0) > 0.99


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
    assert "eps = 2/255" in rows[0] and rows[1].split() == ["run", "model", "natural", "worst"] and len(rows) == 4


# ---- The analyses ----------------------------------------------------------------------------------------------------

spec = importlib.util.spec_from_file_location("analyse", HERE / "results" / "analyse.py")
analyse = importlib.util.module_from_spec(spec)
spec.loader.exec_module(analyse)


def run_of(model, optimizer=None, label="a", objective=AdvTrain()):
    return analyse.Run(label, "rnn-adv" if optimizer else "advtrain", model, optimizer, objective, None)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["pgd eps/4", "line search", "learned"])
def test_analyse_follows_the_attacks_of_the_modules(name, objective):
    model, x, y = problem(batch=6, batch_norm=True)
    model.train()
    optimizer = big_steps("lstm")
    attack = {
        "pgd eps/4": lambda x, y: pgd(model, x, y, eps=0.2, step_size=0.05, steps=10, objective=objective),
        "line search": lambda x, y: pgd(model, x, y, eps=0.2, step_size=0.2, steps=10, objective=objective,
                                        line_search=True),
        "learned": lambda x, y: learned_attack(model, optimizer, x, y, eps=0.2, steps=10, objective=objective)}[name]
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
    at, gathered, signs = points[0][0].numpy(), z, []
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
                              "momentum eps": path((1.5, 1.4)), "learned": path(ours, (9, 9))})
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
    monkeypatch.setitem(sys.modules, "matplotlib", None)
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
    assert list(step["by step"]) == [line[:14].strip() for line in table[3:12]] and len(table[3].split()) == 2 + 12
    assert [line.split()[-2].endswith("*") for line in table[3:12]].count(True) == 1
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


@pytest.mark.parametrize("example", range(3))
def test_the_examples_of_the_readme_run(tiny, example):
    assert len(readme_examples()) == 3
    main([*tiny, "--method", "rnn-adv", "--out", "runs/rnn-adv"])
    torch.manual_seed(0)
    exec(readme_examples()[example], {})


def test_the_command_line_runs_as_a_program(tmp_path):
    result = subprocess.run([sys.executable, HERE / "l2l_adv.py", "eval", tmp_path], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("l2l_adv.py: ") and "Traceback" not in result.stderr
    shown = subprocess.run([sys.executable, HERE / "l2l_adv.py", "train", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--meta-images" in shown.stdout
