"""Tests of baselines.py and l2l_adv.py, in their order, against independent references.

    python3 -m pytest -q              FUZZ=1000 KILLS=20: more damaged files, more killed trainings
"""
import ast
import copy
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baselines
import l2l_adv
from baselines import (MODELS, AdvTrain, Dataset, InputError, Margin, SmallCNN, Trades, augment,
                       check_batch, eval_mode, evaluate, hold_out, input_gradient, load_dataset,
                       pgd, progress, project, random_start)
from l2l_adv import (METHODS, LearnedOptimizer, get_args, learned_attack, load_run, main,
                     normalize_gradient, phi_gradient, train, train_optimizer, train_step_learned,
                     train_step_pgd)

torch.set_num_threads(1)  # the problems are so small that threads would only wait for each other
HERE = Path(__file__).parent
OBJECTIVES = [AdvTrain(), Trades(beta=3.0)]
FUZZ = int(os.environ.get("FUZZ", 40))
KILLS = int(os.environ.get("KILLS", 2))


def problem(batch=5, shape=(2, 4, 4), dtype=torch.float64, batch_norm=False, dropout=0.0, seed=0):
    """A small smooth classifier of three classes, images and labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, padding=1), nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        nn.Tanh(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(6 * shape[1] * shape[2], 3))
    x = torch.rand(batch, *shape, dtype=dtype)
    return model.to(dtype), x, torch.randint(0, 3, (batch,))


class Hill(nn.Module):
    """Two classes, logits (0, height(x)): for label 0 the attack climbs."""

    def __init__(self, height):
        super().__init__()
        self.height = height
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        z = self.w * self.height(x).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(z), z], 1)


def seeded(seed, function, *args, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


def flat(tensors):
    return torch.cat([each.detach().flatten() for each in tensors])


def weights_of(*modules):
    return flat(weight for module in modules for weight in module.parameters())


def close(a, b, tolerance=1e-12):
    return (a - b).norm() <= tolerance * b.norm()


def big_steps(cell="lstm"):
    """A learned optimizer whose steps reach the surface of the ball within a few steps."""
    with torch.random.fork_rng(), torch.no_grad():
        optimizer = seeded(1, LearnedOptimizer, hidden_size=4, cell=cell).double()
        optimizer.W.mul_(3)
        optimizer.W_out.mul_(3)
    return optimizer


def attacks(eps):
    """Every attack of both modules, by name."""
    def by_hand(**kind):
        return lambda m, x, y: pgd(m, x, y, eps=eps, step_size=eps / 2, steps=5, **kind)

    def learned(**kind):
        return lambda m, x, y: learned_attack(m, big_steps().to(x.dtype), x, y, eps=eps, **kind)

    return {"pgd": by_hand(), "uniform": by_hand(start="uniform"), "decay": by_hand(decay=True),
            "trades": by_hand(objective=Trades()), "line search": by_hand(line_search=True),
            "margin": by_hand(objective=Margin()), "learned": learned(),
            "learned trades": learned(objective=Trades())}


# ---- baselines 1 and 2: threat model, objectives -------------------------------------------------

def test_project_finds_the_nearest_point_of_ball_and_box():
    rng = np.random.default_rng(0)
    x, x_adv = rng.random((3, 2, 4, 4)), rng.normal(0.5, 0.5, (3, 2, 4, 4))
    expected = np.clip(np.clip(x_adv, x - 0.1, x + 0.1), 0, 1)
    assert np.array_equal(project(torch.tensor(x_adv), torch.tensor(x), 0.1).numpy(), expected)


def test_starts_are_near_x_or_anywhere_in_the_ball():
    x = torch.full((1, 1, 100, 100), 0.5).double()
    near = random_start(x, 0.1, "gaussian") - x
    anywhere = random_start(x, 0.1, "uniform") - x
    assert near.std().item() == pytest.approx(0.001, rel=0.05) and abs(near.mean()) < 1e-4
    assert anywhere.min() == pytest.approx(-0.1, abs=1e-3) and anywhere.std() == pytest.approx(
        0.1 / math.sqrt(3), rel=0.02) and anywhere.max() == pytest.approx(0.1, abs=1e-3)
    assert (random_start(x, 0.0005, "gaussian") - x).abs().max() <= 0.0005 + 1e-12


@torch.no_grad()
def finite_difference(function, weight, index, h=1e-5):
    values = []
    for step in (h, -2 * h, h):  # up, down, and back
        weight[index] += step
        values.append(function())
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_equal_numpy_and_their_gradients_finite_differences(objective):
    model, x, y = problem()
    x_adv = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    p, q = (np.exp(model(images).detach().numpy()) for images in (x, x_adv))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    inner, outer = -np.log(q[range(5), y]), -np.log(q[range(5), y]).mean()
    if isinstance(objective, Trades):
        inner = (p * (np.log(p) - np.log(q))).sum(1)  # KL
        outer = -np.log(p[range(5), y]).mean() + 3.0 * inner.mean()
    ours = objective.inner_loss(model(x_adv), objective.target(model, x, y)).detach().numpy()
    loss = objective.outer_loss(model, x, x_adv, y)
    assert np.allclose(ours, inner, rtol=1e-10, atol=1e-14)
    assert loss.item() == pytest.approx(outer, rel=1e-12)
    grad, = torch.autograd.grad(loss, model[0].weight)
    for index in [(0, 0, 0, 0), (3, 1, 2, 1), (5, 0, 1, 2)]:
        expected = finite_difference(
            lambda: objective.outer_loss(model, x, x_adv, y).item(), model[0].weight, index)
        assert grad[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_trades_has_beta_6_and_passes_x_and_x_adv_through_batch_norm_together():
    model, x, y = problem(batch_norm=True)
    x_adv = (x + 0.3).clamp(0, 1)
    features = model[0](torch.cat([x, x_adv])).detach()
    Trades().outer_loss(model, x, x_adv, y)
    assert torch.allclose(model[1].running_mean, 0.1 * features.mean((0, 2, 3)))
    assert torch.allclose(model[1].running_var, 0.9 + 0.1 * features.var((0, 2, 3)))
    assert Trades().beta == 6 and AdvTrain().beta == 1


def test_margin_is_the_best_wrong_logit_minus_the_true_one():
    logits, y = torch.randn(20, 5), torch.randint(0, 5, (20,))
    expected = [max(z for j, z in enumerate(row) if j != true) - row[true]
                for row, true in zip(logits.tolist(), y.tolist())]
    assert torch.allclose(Margin().inner_loss(logits, y), torch.tensor(expected))


# ---- baselines 3 and 4: attacks, evaluation ------------------------------------------------------

@pytest.mark.parametrize("name", attacks(0.1))
@pytest.mark.parametrize("seed", range(3))
def test_an_attack_stays_in_ball_and_box_and_leaves_no_trace(name, seed):
    rng = np.random.default_rng(seed)
    eps, shape = float(rng.uniform(0.001, 0.9)), tuple(int(n) for n in rng.integers(1, 6, 3))
    model, x, y = problem(int(rng.integers(2, 5)), shape, torch.float32, True, 0.5, seed)
    x, attack = (3 * x - 1).clamp(0, 1), attacks(eps)[name]  # many pixels on the faces of the box
    model.train()(x).sum().backward()
    model[1].eval()  # a frozen batch norm within a training model must stay so
    model[0].bias.grad = None
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    grads = [None if w.grad is None else w.grad.clone() for w in model.parameters()]
    x_before = x.clone()
    x_adv = seeded(1, attack, model, x, y)
    assert x_adv.shape == x.shape and not x_adv.requires_grad and torch.equal(x, x_before)
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and (x_adv - x).abs().max() <= eps + 1e-6
    with pytest.raises((IndexError, RuntimeError)):  # the modes come back after an error too
        attack(model, torch.rand(len(x), 9, 9, 9), y)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(weight.grad is grad or torch.equal(weight.grad, grad)
               for weight, grad in zip(model.parameters(), grads))
    assert torch.equal(seeded(1, attack, model.eval(), x, y), x_adv)  # it saw evaluation mode
    with torch.inference_mode():
        assert torch.equal(seeded(1, attack, model, x.clone(), y.clone()), x_adv)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("start", ["gaussian", "uniform"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pgd_equals_a_plain_loop(objective, start, decay):
    model, x, y = problem()
    p = model(x).softmax(1).detach()
    torch.manual_seed(1)
    noise = 0.001 * torch.randn_like(x) if start == "gaussian" else 0.2 * torch.rand_like(x) - 0.1
    x_adv = (x + noise).clamp(0, 1)
    for t in range(4):
        z = x_adv.clone().requires_grad_()
        loss = F.cross_entropy(model(z), y)
        if isinstance(objective, Trades):
            loss = (p * (p.log() - model(z).log_softmax(1))).sum()
        g, = torch.autograd.grad(loss, z)
        size = 0.06 * (4 - t) / 4 if decay else 0.06
        x_adv = torch.min(torch.max(z.detach() + size * g.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    ours = seeded(1, pgd, model, x, y, eps=0.1, step_size=0.06, steps=4, objective=objective,
                  start=start, decay=decay)
    assert torch.allclose(ours, x_adv, atol=1e-14)


def test_line_search_halves_the_step_of_each_image_until_armijos_condition_holds():
    model = Hill(lambda x: -10 * (x - 0.5) ** 2).double()
    x = torch.tensor([0.2, 0.395, 0.47, 0.499]).double()  # nearer and nearer to the top, at 0.5
    x = x.view(4, 1, 1, 1)
    x_adv = seeded(1, pgd, model, x, torch.zeros(4).long(), eps=0.2, step_size=0.2, steps=1,
                   line_search=True)
    x_0 = x + 0.001 * seeded(1, torch.randn_like, x)
    expected = []
    for z, x_i in zip(x_0.flatten().tolist(), x.flatten().tolist()):
        def loss(z):
            return math.log1p(math.exp(-10 * (z - 0.5) ** 2))
        slope = -20 * (z - 0.5) / (1 + math.exp(10 * (z - 0.5) ** 2))
        ends = [z + math.copysign(0.2 / 2 ** k, slope) for k in range(4)]
        ends = [min(max(end, x_i - 0.2), x_i + 0.2) for end in ends]
        good = [end for end in ends[:3] if loss(end) >= loss(z) + 0.1 * slope * (end - z)]
        expected.append(good[0] if good else ends[3])
    assert x_adv.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert len({round(step, 2) for step in (x_adv - x).abs().flatten().tolist()}) >= 3


def test_a_line_search_lets_the_loss_fall_short_of_a_tenth_only_after_three_trials():
    x, tried = torch.full((1, 1, 1, 1), 0.5).double(), []
    model = Hill(lambda x: tried.append(x.item()) or torch.relu(0.501 - (x - 0.5).abs())).double()
    x_adv = seeded(1, pgd, model, x, torch.zeros(1).long(), eps=0.4, step_size=0.4, steps=1,
                   line_search=True)
    lengths = [abs(each - tried[0]) for each in [*tried[1:], x_adv.item()]]
    assert lengths == pytest.approx([0.4, 0.2, 0.1, 0.05], abs=2e-3)


def inverting(channel):
    """An attack that inverts the images whose first pixel in this channel is bright."""
    return lambda m, x, y: torch.where(x[:, channel, :1, :1, None] > 0.5, 1 - x, x)


def test_evaluate_counts_as_by_hand():
    model, x, y = problem(batch=40, dtype=torch.float32)
    by = {"a": inverting(0), "b": inverting(1)}
    correct, loss = evaluate(model, x, y, by, batch_size=7)
    expected = {"natural": x, "a": by["a"](model, x, y), "b": by["b"](model, x, y)}
    assert list(correct) == ["natural", "a", "b", "worst"] and list(loss) == ["natural", "a", "b"]
    for name, x_adv in expected.items():
        assert torch.equal(correct[name], model(x_adv).argmax(1) == y)
        assert torch.allclose(loss[name], -model(x_adv).log_softmax(1)[range(40), y])
    assert torch.equal(correct["worst"], correct["natural"] & correct["a"] & correct["b"])
    assert 0 < correct["worst"].sum() < min(correct[name].sum() for name in expected)


def test_an_attack_meets_the_same_randomness_whatever_else_is_listed_and_leaves_the_callers():
    model, x, y = problem(dtype=torch.float32)
    seen = []
    noisy = {name: lambda m, x, y: seen.append(torch.rand(1).item()) or x for name in "ab"}
    state = seeded(3, torch.get_rng_state)
    evaluate(model, x, y, noisy)
    evaluate(model, x, y, {"b": noisy["b"]})
    evaluate(model, x, y, noisy, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(seen)) == 2 and seen[0] == seeded(0, torch.rand, 1).item() == seen[2]
    assert seen[3] == seen[4] == seeded(1, torch.rand, 1).item()


@pytest.mark.parametrize("attack, words", [
    (lambda m, x, y: x * math.nan, "did not return images"),
    (lambda m, x, y: x[:, :1], "did not return images"), (lambda m, x, y: x + 2e-6, "did not"),
    (lambda m, x, y: x - 2e-6, "did not"), (lambda m, x, y: 1 - x, "by more than eps = 0.1"),
    (lambda m, x, y: (x - 0.1001).clamp(0), "by more than eps")])
def test_evaluate_refuses_an_attack_that_returns_something_else(attack, words):
    model, _, y = problem(dtype=torch.float32)
    x = torch.cat([torch.zeros(5, 1, 4, 4), torch.ones(5, 1, 4, 4)], 1)
    with pytest.raises(InputError, match=words):
        evaluate(model, x, y, {"bad": attack}, eps=0.1)


def test_rounding_at_the_edges_is_forgiven_and_clipped():
    model, _, y = problem(dtype=torch.float32)
    x, seen = torch.ones(5, 2, 4, 4), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].max().item()))
    evaluate(model, x + 1e-6, y, {"edge": lambda m, x, y: x + 5e-7}, eps=1e-6)
    assert max(seen) == 1
    for outside in (x + 2e-6, x - 1 - 2e-6):
        with pytest.raises(InputError, match="must lie in"):
            check_batch(outside, y)
    assert pgd(model, x + 1e-6, y, eps=0.1, step_size=0.1, steps=1).max() <= 1


def test_nan_is_an_error_and_never_robust():
    model, x, y = problem(dtype=torch.float32)
    no_gradient = Hill(lambda x: torch.sqrt(0 * x))  # it is NaN: PGD must not stand still
    with pytest.raises(InputError, match="did not return images"):
        evaluate(no_gradient, x, 0 * y, {"pgd": attacks(0.1)["pgd"]})
    with pytest.raises(FloatingPointError, match="natural: the model's logits"):
        evaluate(nn.Sequential(model, nn.Threshold(math.inf, math.nan)), x, y, {})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_a_bar_on_a_terminal_only(monkeypatch):
    for stderr in (None, io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stderr)
        clock = iter(range(0, 100, 10))
        monkeypatch.setattr(time, "time", lambda: next(clock))
        assert list(progress("abcd", "epoch 1")) == list("abcd")
        monkeypatch.undo()
    shown = stderr.getvalue().split("\r")
    assert [line[:-3] for line in shown[3:]] == [
        "epoch 1 [##########          ] 30 s left", "epoch 1 [###############     ] 13 s left", ""]
    assert stderr.getvalue().endswith("\r\033[K")


# ---- baselines 5 and 6: classifiers, data --------------------------------------------------------

@pytest.mark.parametrize("name, millions", [
    ("small", 0.129), ("cnn4", 0.308), ("vgg16", 14.7), ("resnet18", 11.2), ("wrn34", 46.2)])
@torch.no_grad()
def test_a_classifier_has_its_size_and_normalizes_inside(name, millions):
    model, x = MODELS[name](in_channels=3).eval(), torch.rand(2, 3, 32, 32)
    model.normalize_like((x * 255).byte())
    std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
    assert len(weights_of(model)) / 1e6 == pytest.approx(millions, rel=0.01)
    assert model(x).shape == (2, 10)
    assert torch.allclose(model(x), model.layers((x - mean) / std), rtol=0.05, atol=0.05)
    with pytest.raises(InputError, match="takes images"):
        model(x[:, :1])


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def binary(x, y):
    return np.concatenate([y[:, None], x], 1).tobytes()


def pickled(protocol, order="C"):
    labels, data = ("labels", "data") if protocol == 4 else (b"labels", b"data")
    return lambda x, y: pickle.dumps({b"batch_label": b"1", labels: y.tolist(),
                                      data: np.array(x, order=order), b"names": ["a"]}, protocol)


def python_2(x, y):
    """What Python 2 made of a batch: keys are U (SHORT_BINSTRING), the pixels T (BINSTRING)."""
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\x01btR(K\x01K%cM\0"
             b"\x0c\x86cnumpy\ndtype\n(U\x02u1K\0K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
             b"\xff\xffK\0tb\x89T%b%btb")
    array = array % (len(x), x.nbytes.to_bytes(4, "little"), x.tobytes())
    labels = b"".join(b"K%c" % label for label in y)
    return (b"\x80\x02}q\x01(U\x0bbatch_labelU\x061 of 5U\x06labelsq\x02](" + labels
            + b"eU\x04data" + array + b"U\x05names](U\x05a.pngeu.")


def write_cifar10(folder, n=12, pack=binary):
    """All six files, n random images each; returns (pixels (n, 3072), labels) of each."""
    folder.mkdir(parents=True)
    rng, parts = np.random.default_rng(0), {}
    for name in NAMES:
        parts[name] = rng.integers(0, 256, (n, 3072), np.uint8), rng.integers(0, 10, n, np.uint8)
        (folder / (f"{name}.bin" if pack == binary else name)).write_bytes(pack(*parts[name]))
    return parts


def is_cifar10(data, parts):
    x, y = (np.concatenate([parts[name][k] for name in NAMES[:5]]) for k in range(2))
    assert np.array_equal(data.x_train[:, 1, 2].numpy(), x[:, 1024 + 64:1024 + 96])  # third green row
    assert np.array_equal(data.x_train.flatten(1).numpy(), x) and data.y_train.tolist() == y.tolist()
    assert np.array_equal(data.x_test.flatten(1).numpy(), parts["test_batch"][0])
    return data.y_test.tolist() == parts["test_batch"][1].tolist()


@pytest.mark.parametrize("pack", [
    binary, *map(pickled, range(1, 6)), pickled(2, "F"), pickled(5, "F"), python_2])
def test_cifar10_of_every_age_is_found_and_read(tmp_path, monkeypatch, pack):
    folder = f"data/cifar-10-batches-{'bin' if pack == binary else 'py'}"
    parts = write_cifar10(tmp_path / folder, pack=pack)
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    for named in (None, "data", folder):
        assert is_cifar10(load_dataset("cifar10", named), parts)
    monkeypatch.chdir("/")
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "data"))
    assert is_cifar10(load_dataset("cifar10"), parts)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Bomb.target),)


@pytest.mark.parametrize("place", [b"data", b"labels", "whole"])
def test_nothing_in_a_malicious_pickle_is_executed(tmp_path, place):
    Bomb.target, path = tmp_path / "executed", tmp_path / "py" / "data_batch_3"
    write_cifar10(tmp_path / "py", pack=pickled(2))
    batch = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(
        Bomb() if place == "whole" else {**batch, place: [batch[place], Bomb()]}))
    with pytest.raises(InputError, match="mkdir has no place in a data set"):
        load_dataset("cifar10", tmp_path / "py")
    assert not Bomb.target.exists()
    pickle.loads(path.read_bytes())  # a reader that unpickles would have executed it
    assert Bomb.target.exists()


def write_mnist(folder, n=7, pack=gzip.compress):
    folder.mkdir(parents=True)
    rng, parts = np.random.default_rng(0), {}
    for name in ("train", "t10k"):
        parts[name] = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), parts[name]):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            path = folder / f"{name}-{kind}-ubyte{'' if pack == bytes else '.gz'}"
            path.write_bytes(pack(head + array.tobytes()))
    return parts


@pytest.mark.parametrize("folder, pack", [("mnist", gzip.compress), ("MNIST/raw", bytes)])
def test_mnist_is_read(tmp_path, monkeypatch, folder, pack):
    parts = write_mnist(tmp_path / folder, 7, pack)
    monkeypatch.setenv("MNIST_DIR", str(tmp_path))
    data = load_dataset("mnist")
    for x, y, name in ((data.x_train, data.y_train, "train"), (data.x_test, data.y_test, "t10k")):
        assert x.shape == (7, 1, 28, 28) and np.array_equal(x[:, 0].numpy(), parts[name][0])
        assert y.tolist() == parts[name][1].tolist()


@pytest.mark.parametrize("failure", [None, "no such file", "wrong SHA-256", "no folder"])
def test_cifar10_is_downloaded_whole_or_not_at_all(tmp_path, monkeypatch, failure):
    parts, archive = write_cifar10(tmp_path / "cifar-10-batches-bin"), tmp_path / "c.tar.gz"
    shutil.make_archive(str(tmp_path / "c"), "gztar", tmp_path, "cifar-10-batches-bin")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(baselines, "CIFAR10_SHA256", "0" * 64 if "SHA" in f"{failure}" else sha256)
    url = archive.as_uri() + ("x" if failure == "no such file" else "")
    monkeypatch.setattr(baselines, "CIFAR10_URL", url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    if failure is None:
        assert is_cifar10(load_dataset("cifar10"), parts)
        monkeypatch.setattr(baselines, "CIFAR10_URL", "not asked again")
        assert is_cifar10(load_dataset("cifar10"), parts)
        assert sorted(os.listdir("data")) == ["cifar-10-batches-bin"]
        return
    with pytest.raises(InputError, match="could not be downloaded|no cifar10 in elsewhere"):
        load_dataset("cifar10", "elsewhere" if failure == "no folder" else None)
    assert not Path("elsewhere").exists() and list(Path("data").rglob("*")) == []


def test_a_download_that_loses_the_race_takes_the_winners_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-bin"
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: None)
    monkeypatch.setattr(shutil, "unpack_archive", lambda _, part: (
        write_cifar10(Path(part, folder.name)), write_cifar10(folder)))  # another one was faster
    assert baselines.download_cifar10(folder) == folder and len(os.listdir(folder)) == 6


@pytest.mark.parametrize("count, limit, trained, held_out", [
    (200, None, 160, 40), (200, 10, 10, 2), (200, 1, 1, 1), (8000, None, 7000, 1000),
    (8000, 6000, 6000, 1000), (8000, 100, 100, 20)])
def test_held_out_images_are_fixed_and_not_trained_on(count, limit, trained, held_out):
    x = torch.arange(count).view(count, 1, 1, 1)
    data = Dataset(x, torch.arange(count), None, None)
    x_train, y_train, x_held, y_held = seeded(5, hold_out, data, limit)
    assert torch.equal(x_train.flatten(), y_train) and torch.equal(x_held.flatten(), y_held)
    assert (len(y_train), len(y_held)) == (trained, held_out)
    assert not set(y_train.tolist()) & set(y_held.tolist())
    assert torch.equal(y_train, hold_out(data)[1][:trained])
    assert torch.equal(y_held, hold_out(data)[3][:held_out])


def test_synthetic_data_tells_the_story():
    """The fine pattern is always right and below eps, the coarse one is right 9 times in 10."""
    data = load_dataset("synthetic")
    assert torch.equal(data.x_train, load_dataset("synthetic").x_train)
    assert data.y_train.bincount().min() > 300 and data.x_test.shape == (1000, 3, 16, 16)
    x = data.x_train / 255 - 0.5
    tile = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((2, 3))  # (N, 3, 4, 4), the mean over blocks
    tile = tile - tile.mean((2, 3), keepdim=True)
    fine = torch.stack([tile[data.y_train == k].mean(0) for k in range(10)])
    amplitude = (fine.amax((2, 3)) - fine.amin((2, 3))) / 2
    assert amplitude.median() == pytest.approx(6 / 255, rel=0.05)
    match = torch.einsum("nchw,kchw->nk", tile, fine)
    guess = (match - fine.pow(2).sum((1, 2, 3)) / 2).argmax(1)
    assert (guess == data.y_train).float().mean() > 0.99
    block = F.avg_pool2d(x, 4)
    coarse = torch.stack([block[data.y_train == k].mean(0) for k in range(10)])
    match = torch.einsum("nchw,kchw->nk", block, F.normalize(coarse, dim=(1, 2, 3)))
    assert 0.8 < (match.argmax(1) == data.y_train).float().mean() < 0.95


@pytest.mark.parametrize("padding, crops_seen", [(4, 61), (0, 1)])
def test_augment_crops_and_flips_each_image_on_its_own(padding, crops_seen):
    x, seen = seeded(0, torch.randint, 0, 256, (200, 3, 6, 6), dtype=torch.uint8), []
    for image, out in zip(F.pad(x, [padding] * 4), augment(x, padding)):
        crops = {(i, j, flip): image[:, i:i + 6, j:j + 6].flip([2] * flip)
                 for i in range(2 * padding + 1) for j in range(2 * padding + 1)
                 for flip in (False, True)}
        seen.append(next(key for key, crop in crops.items() if torch.equal(crop, out)))
    assert len({key[:2] for key in seen}) >= crops_seen
    assert 60 < sum(flip for *_, flip in seen) < 140


# ---- l2l_adv 1: the learned optimizer ------------------------------------------------------------

@pytest.mark.parametrize("cell, weights", [("lstm", 450), ("rnn", 120)])
def test_the_cell_equals_torchs_forward_and_gradient(cell, weights):
    ours = seeded(0, LearnedOptimizer, cell=cell).double()
    theirs = (nn.LSTMCell if cell == "lstm" else nn.RNNCell)(1, 10, bias=False).double()
    theirs.load_state_dict({"weight_ih": ours.W[:, :1], "weight_hh": ours.W[:, 1:]})
    inputs, weight = torch.randn(2, 4, 7, dtype=torch.float64)  # four steps, seven pixels
    state, reference, outputs, expected = None, None, [], []
    for u in inputs:
        delta, state = ours(u, state)
        reference = theirs(u[:, None], reference)
        outputs.append(delta)
        h = reference[0] if cell == "lstm" else reference
        expected.append(torch.tanh(h @ ours.W_out.T)[:, 0])
    assert len(weights_of(ours)) == weights and close(flat(outputs), flat(expected))
    grads = torch.autograd.grad((weight * torch.stack(outputs)).sum(), [ours.W, ours.W_out])
    (weight * torch.stack(expected)).sum().backward()
    assert close(grads[0], torch.cat([theirs.weight_ih.grad, theirs.weight_hh.grad], 1))
    assert close(grads[1], ours.W_out.grad)


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
@torch.no_grad()
def test_a_fresh_optimizer_steps_along_the_sign_of_the_gradient(cell):
    for seed in range(5):
        optimizer, state = seeded(seed, LearnedOptimizer, cell=cell), None
        for t in range(10):
            u = torch.randn(4096)
            delta, state = optimizer(u, state)
            assert (delta * u > 0).double().mean() > (0.8 if t else 0.999)
            assert 0.09 < delta.abs().mean() < 0.27
        assert -0.316 < optimizer.W.min() < -0.2 and 0.2 < optimizer.W_out.max() < 0.317
        assert optimizer.W[:, 1:].max() < 0.317 and optimizer.W_out.min() > 0


def test_the_optimizer_sees_the_gradient_of_each_image_over_its_mean_size():
    size = torch.tensor([1e-20, 1.0, 1e9]).double().view(3, 1, 1, 1)
    g = torch.randn(3, 2, 4, 4, dtype=torch.float64) * size
    expected = [image / np.abs(image).mean() for image in g.flatten(1).numpy()]
    assert np.allclose(normalize_gradient(g).view(3, -1).numpy(), expected)
    assert torch.equal(normalize_gradient(0 * g), torch.zeros(96, dtype=torch.float64))


# ---- l2l_adv 2: its attack, and the gradient of φ ------------------------------------------------

def unrolled(model, optimizer, x, y, eps, steps, objective):
    """Reference of the attack: x'_0 … x'_T with their graph through m_φ, and g_0 … g_{T−1}."""
    target, state = objective.target(model, x, y), None
    x_adv = project(x + 0.001 * torch.randn_like(x), x, eps)
    points, gradients = [x_adv], []
    for t in range(steps):
        at = x_adv.detach().requires_grad_()
        gradients += torch.autograd.grad(objective.inner_loss(model(at), target).sum(), at)
        u = gradients[-1] / gradients[-1].abs().mean((1, 2, 3), keepdim=True)
        delta, state = optimizer(u.flatten(), state)
        x_adv = torch.min(torch.max(x_adv + eps * delta.view(x.shape), x - eps), x + eps)
        x_adv = x_adv.clamp(0, 1)
        points.append(x_adv)
    return points, gradients


def weighted(losses):
    """Σ_t t·loss(x'_t) over Σ_t t, the mean over the images, from a loss of each image for each t."""
    total = sum(t * loss.sum() for t, loss in enumerate(losses, 1))
    return total / (len(losses[0]) * sum(range(1, len(losses) + 1)))


def meta_gradient(model, optimizer, x, y, eps, steps, objective, n=None):
    """Reference of φ's gradient: autograd through the unrolled losses of the first n images."""
    points, _ = seeded(7, unrolled, model, optimizer, x, y, eps, steps, objective)
    target = objective.target(model, x, y)
    losses = [objective.inner_loss(model(x_adv), target)[:n] for x_adv in points[1:]]
    return flat(torch.autograd.grad(weighted(losses), list(optimizer.parameters())))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_meta_gradient_equals_autograd_through_the_unrolled_losses(cell, objective):
    model, x, y = problem()
    optimizer, trace = big_steps(cell), []
    points, gradients = seeded(7, unrolled, model, optimizer, x, y, 0.2, 5, objective)
    cut = ((points[-1] - x).abs() > 0.2 - 1e-9).double().mean()
    assert 0.03 < cut < 0.97  # the projection cuts some pixels, and not others
    x_adv = seeded(7, learned_attack, model, optimizer, x, y, eps=0.2, steps=5, objective=objective,
                   trace=trace)
    assert close(x_adv, points[-1]) and close(flat(trace), flat([points[0], *gradients]))
    g_T, _ = input_gradient(model, x_adv, objective, objective.target(model, x, y))
    length = phi_gradient(optimizer, x, trace[0], [*trace[1:], g_T], 0.2)
    ours = -flat(weight.grad for weight in optimizer.parameters())
    assert close(ours, meta_gradient(model, optimizer, x, y, 0.2, 5, objective), 1e-12)
    state, lengths = None, []
    for g in gradients:
        delta, state = optimizer(normalize_gradient(g), state)
        lengths.append(delta.abs().mean().item())
    assert length.item() == pytest.approx(np.mean(lengths))


def test_meta_gradient_equals_finite_differences():
    model, x, y = problem()
    optimizer = big_steps()
    _, gradients = seeded(7, unrolled, model, optimizer, x, y, 0.2, 5, AdvTrain())

    def losses():  # at the recorded gradients, without any of autograd
        state, x_t, losses = None, x + 0.001 * seeded(7, torch.randn_like, x), []
        for g in gradients:
            delta, state = optimizer(normalize_gradient(g), state)
            x_t = project(x_t + 0.2 * delta.view(x.shape), x, 0.2)
            losses.append(F.cross_entropy(model(x_t), y, reduction="none"))
        return weighted(losses).item()

    ours = meta_gradient(model, optimizer, x, y, 0.2, 5, AdvTrain())
    for weight, grad in zip(optimizer.parameters(), ours.split([optimizer.W.numel(), 4])):
        for index in [(0, 0), (weight.shape[0] - 1, 2)]:
            expected = finite_difference(losses, weight, index, 1e-6)
            assert grad.view_as(weight)[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def train_phi(model, x, y, steps, updates, cell="lstm"):
    """x' within 0.1 of x, of a φ that train_optimizer trained on this one batch."""
    optimizer = seeded(0, LearnedOptimizer, cell=cell)
    train_optimizer(model, [(x, y)] * updates, eps=0.1, steps=steps, optimizer=optimizer, lr=0.02)
    return learned_attack(model, optimizer, x, y, eps=0.1, steps=steps)


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_a_trained_optimizer_and_pgd_reach_the_optimum_of_a_linear_model(cell):
    w, x, y = seeded(0, torch.randn, 1, 3, 3), torch.rand(8, 1, 3, 3), torch.zeros(8).long()
    w = w + 0.2 * w.sign()
    model, optimum = Hill(lambda x: w * x), project(x + 0.1 * w.sign(), x, 0.1)
    assert torch.allclose(train_phi(model, x, y, 5, updates=60, cell=cell), optimum, atol=1e-3)
    for name in ("pgd", "uniform", "line search", "margin"):
        assert torch.allclose(attacks(0.1)[name](model, x, y), optimum, atol=1e-6)


def test_a_trained_optimizer_beats_every_fixed_step_on_hidden_curvature():
    x, y = torch.full((16, 1, 5, 5), 0.5), torch.zeros(16).long()
    top = 0.5 + 0.1 * (2 * seeded(0, torch.rand, 1, 5, 5) - 1)
    curvature = 10 ** (2 * torch.rand(1, 5, 5))
    model = Hill(lambda x: -curvature * (x - top) ** 2)

    def gap(x_adv):  # log 2 is the top of the hill
        return math.log(2) - F.cross_entropy(model(x_adv), y).item()

    best = min(gap(pgd(model, x, y, eps=0.1, step_size=0.1 / k, steps=10)) for k in (1, 2, 4, 8, 16))
    assert gap(train_phi(model, x, y, 10, updates=150)) < 0.75 * best


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_train_optimizer_follows_autograd_through_a_frozen_classifier(objective):
    model, x, y = problem(batch_norm=True, dropout=0.5)
    before, optimizer = copy.deepcopy(model.state_dict()), big_steps()
    expected = weights_of(optimizer).requires_grad_()
    with eval_mode(model):
        expected.grad = -meta_gradient(model, optimizer, x, y, 0.1, 3, objective)
    torch.optim.Adam([expected], 0.003).step()
    got = seeded(7, train_optimizer, model, iter([(x, y)]), eps=0.1, steps=3, objective=objective,
                 optimizer=optimizer, lr=0.003)
    assert got is optimizer and not got.training
    assert torch.allclose(weights_of(got), expected, atol=1e-8)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and all(weight.grad is None for weight in model.parameters())


def test_train_optimizer_makes_one_and_adam_moves_it_by_a_hundredth_in_ten_steps():
    model, x, y = problem(dtype=torch.float32)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = seeded(2, train_optimizer, model, [(x, y)], eps=0.1)
    moved = (weights_of(optimizer) - weights_of(seeded(2, LearnedOptimizer))).abs()
    assert isinstance(optimizer, LearnedOptimizer) and len(calls) == 11
    assert moved.max() == pytest.approx(0.01, rel=1e-3)


# ---- l2l_adv 3: one training step ----------------------------------------------------------------

def moved(model, optimizer, x, y, **settings):
    """How far train_step_learned moves the weights of (φ, θ), per unit of learning rate."""
    before = weights_of(optimizer), weights_of(model)
    opt_phi, opt_theta = (torch.optim.SGD(player.parameters(), 0.1) for player in (optimizer, model))
    seeded(7, train_step_learned, model, optimizer, x, y, opt_theta=opt_theta, opt_phi=opt_phi,
           eps=0.2, **settings)
    return (weights_of(optimizer) - before[0]) / 0.1, (weights_of(model) - before[1]) / 0.1


def clipped(gradient, norm):
    return gradient / max(1, gradient.norm() / norm)


class Mart(AdvTrain):
    """As in MART, images that are sure when clean count less: the outer loss is no multiple of the
    mean inner one."""

    def outer_loss(self, model, x, x_adv, y):
        p = model(x).softmax(1).gather(1, y[:, None])[:, 0]
        return (F.cross_entropy(model(x_adv), y, reduction="none") * (1 - p)).mean()


class MoreThanTrades(Trades):
    def outer_loss(self, model, x, x_adv, y):
        return super().outer_loss(model, x, x_adv, y) + model(x_adv).pow(2).mean()


@pytest.mark.parametrize("objective, passes, scale", [
    (AdvTrain(), 11, 1), (Trades(beta=3.0), 12, 1), (Mart(), 13, 1), (MoreThanTrades(), 15, 1),
    (AdvTrain(), 11, 1000)])
def test_the_default_learned_step_equals_its_reference(objective, passes, scale):
    model, x, y = problem(batch=20)
    model[-1].weight.data.mul_(scale)
    optimizer, calls = big_steps(), []
    ascent = meta_gradient(model, optimizer, x, y, 0.2, 10, objective, n=2)  # a sixteenth of 20
    x_adv = seeded(7, learned_attack, model, optimizer, x, y, eps=0.2, objective=objective)
    outer = objective.outer_loss(model, x, x_adv, y)
    descent = flat(torch.autograd.grad(outer, list(model.parameters())))
    assert (ascent.norm() > 1) == (descent.norm() > 5) == (scale == 1000)
    model.register_forward_hook(lambda *_: calls.append(1))
    phi, theta = moved(model, optimizer, x, y, objective=objective)
    assert len(calls) == passes  # ten, TRADES' f(x), the outer loss's, and g_T's if it is not free
    assert close(phi, clipped(ascent, 1), 1e-5 if scale > 1 else 1e-9)
    assert close(theta, -clipped(descent, 5), 1e-5 if scale > 1 else 1e-9)


@pytest.mark.parametrize("settings", [
    {"phi_share": 1, "steps": 5}, {"phi_share": 0.3, "steps": 4, "clip": math.inf}, {"clip": 0.01}])
def test_the_settings_of_the_learned_step_mean_what_they_say(settings):
    model, x, y = problem()
    optimizer, log, steps = big_steps(), [], settings.get("steps", 10)
    n = math.ceil(5 * settings.get("phi_share", 1 / 16))
    ascent = meta_gradient(model, optimizer, x, y, 0.2, steps, AdvTrain(), n)
    x_adv = seeded(7, learned_attack, model, optimizer, x, y, eps=0.2, steps=steps)
    outer = F.cross_entropy(model(x_adv), y)
    descent = flat(torch.autograd.grad(outer, list(model.parameters())))
    phi, theta = moved(model, optimizer, x, y, log=log, **settings)
    clip = settings.get("clip", 5.0)
    assert close(phi, clipped(ascent, 1), 1e-9) and close(theta, -clipped(descent, clip), 1e-5)
    entry, = log
    assert entry["clipped"] == (clip == 0.01) and 0 < entry["length"] < 1
    assert [entry[key] for key in ("loss", "theta_norm", "phi_norm")] == pytest.approx(
        [outer.item(), descent.norm().item(), ascent.norm().item()])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_batch_norm_the_attack_runs_in_eval_mode_and_the_free_g_T_in_training_mode(objective):
    model, x, y = problem(batch_norm=True)
    model(3 * x)  # running statistics of their own
    still, twin, optimizer = copy.deepcopy(model).eval(), copy.deepcopy(model), big_steps()
    points, gradients = seeded(7, unrolled, still, optimizer, x, y, 0.2, 5, objective)
    x_T = points[-1].detach().requires_grad_()
    outer = objective.outer_loss(twin, x, x_T, y)
    g_T, *descent = torch.autograd.grad(outer, [x_T, *twin.parameters()])
    gradients = [*gradients[1:], g_T * len(x) / objective.beta]
    linear = weighted([g * x_adv for g, x_adv in zip(gradients, points[1:])])
    ascent = flat(torch.autograd.grad(linear, list(optimizer.parameters())))
    in_eval = meta_gradient(still, optimizer, x, y, 0.2, 5, objective)
    phi, theta = moved(model, optimizer, x, y, steps=5, objective=objective, phi_share=1, clip=1e9)
    assert close(phi, ascent, 1e-9) and not close(phi, in_eval, 1e-3)
    assert close(theta, -flat(descent), 1e-9)
    assert torch.equal(flat(model.buffers()), flat(twin.buffers()))  # only the outer loss moved them
    assert not torch.equal(flat(model.buffers()), flat(still.buffers()))


@pytest.mark.parametrize("settings", [
    {}, {"line_search": True}, {"decay": True}, {"start": "uniform"}, {"clip": 0.01},
    {"objective": Trades(3.0)}])
def test_train_step_pgd_is_one_clipped_descent_step(settings):
    model, x, y = problem()
    attack = {key: value for key, value in settings.items() if key != "clip"}
    x_adv = seeded(1, pgd, model, x, y, eps=0.1, step_size=0.03, steps=10, **attack)
    loss = settings.get("objective", AdvTrain()).outer_loss(model, x, x_adv, y)
    gradient, log = flat(torch.autograd.grad(loss, list(model.parameters()))), []
    expected = weights_of(model) - 0.1 * clipped(gradient, settings.get("clip", 5))
    opt_theta = torch.optim.SGD(model.parameters(), 0.1)
    got = seeded(1, train_step_pgd, model, x, y, opt_theta=opt_theta, eps=0.1, step_size=0.03,
                 log=log, **settings)
    assert torch.equal(got, loss.detach()) and close(weights_of(model), expected, 1e-6)
    assert log == [{"loss": loss.item(), "theta_norm": pytest.approx(gradient.norm().item()),
                    "clipped": "clip" in settings}]


@pytest.mark.parametrize("bad", ["loss", "theta", "phi"])
def test_numbers_that_are_not_finite_move_no_weight(bad):
    model, x, y = problem()
    optimizer = big_steps()
    settings = {"opt_theta": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), "eps": 0.1,
                "opt_phi": torch.optim.Adam(optimizer.parameters(), 0.1), "steps": 2}
    train_step_learned(model, optimizer, x, y, **settings)  # so that there is momentum
    before = weights_of(model, optimizer)
    if bad == "loss":
        settings["objective"] = type("Bad", (AdvTrain,), {"outer_loss": lambda self, *args: (
            AdvTrain().outer_loss(*args) + torch.tensor(math.inf))})()
    else:
        weight = model[0].weight if bad == "theta" else optimizer.W_out
        weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        train_step_learned(model, optimizer, x, y, **settings)
    assert torch.equal(weights_of(model, optimizer), before)


# ---- l2l_adv 4: training -------------------------------------------------------------------------

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """36 random images in CIFAR-10's format, and flags that train on 24 of them within a second."""
    write_cifar10(tmp_path / "cifar", n=6)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "cifar"))
    monkeypatch.chdir(tmp_path)
    return ["train", "--dataset", "cifar10", "--model", "small", "--epochs", "2", "--steps", "2",
            "--batch-size", "8"]


def saved(path):
    return torch.load(path, weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_evaluated(tiny, capsys, method):
    assert main([*tiny, "--method", method, "--cell", "rnn", "--out", "runs/one"]) == 0
    learned = ["learned-10"] * method.startswith("rnn")
    header, *rows = capsys.readouterr().out.splitlines()
    assert f"{method}, cifar10 (24 images), small, eps = 8/255, T = 2, seed 0, cpu" in header
    assert [row["epoch"] for row in log_of("runs/one")] == [1, 2] == [int(r[5:8]) for r in rows]
    last = log_of("runs/one")[-1]
    scores = [f"{name} {100 * value:5.2f}" for name, value in last["accuracy"].items()]
    assert "  ".join(scores) in rows[1] and f"loss {last['loss']:.4f}" in rows[1]
    assert list(last["accuracy"]) == ["natural", "pgd-10", *learned, "worst"]
    assert ("phi_norm" in last) == ("length" in last) == bool(learned) and "clipped" in last
    model, optimizer, settings = load_run("runs/one", "last")
    assert not model.training and settings.method == method
    assert optimizer.cell == "rnn" if learned else optimizer is None
    assert main(["eval", "runs/one", "--limit", "4"]) == 0
    heading, columns, row = capsys.readouterr().out.splitlines()
    assert heading == ("cifar10, eps = 8/255, 4 test images, best checkpoint, attack seed 0; "
                       "accuracy in %")
    result = json.loads(Path("runs/one/eval.json").read_text())
    names = ["natural", "pgd-10", "pgd-100", "cw-100", *learned]
    assert list(result["accuracy"]) == [*names, "worst"] and list(result["loss"]) == names
    cells = [f"{100 * result['accuracy'][name]:.2f}" if name in result["accuracy"] else "-"
             for name in columns.split()[1:]]
    assert row.split() == ["runs/one", *cells]
    assert sorted(os.listdir("runs/one")) == ["best.pt", "eval.json", "last.pt", "log.jsonl"]


@pytest.mark.parametrize("flags, step, expected", [
    (["rnn-adv"], "train_step_learned", {"beta": 1.0, "phi_share": 1 / 16, "start": "gaussian"}),
    (["rnn-trades", "--phi-share", "1"], "train_step_learned", {"beta": 2.0, "phi_share": 1.0}),
    (["rnn-adv", "--start", "uniform", "--clip", "inf"], "train_step_learned",
     {"start": "uniform", "clip": math.inf}),
    (["advtrain"], "train_step_pgd", {"beta": 1.0, "step_size": 0.03, "decay": False, "clip": 5.0}),
    (["advtrain", "--line-search"], "train_step_pgd", {"step_size": 0.12, "line_search": True}),
    (["advtrain", "--decay"], "train_step_pgd", {"step_size": 0.12, "decay": True}),
    (["trades"], "train_step_pgd", {"beta": 2.0, "step_size": 0.03, "line_search": False}),
    (["trades", "--step-size", "0.06"], "train_step_pgd", {"step_size": 0.06})])
def test_a_method_takes_the_step_of_its_name(tiny, monkeypatch, flags, step, expected):
    seen = []

    def fake(*args, log, objective, **rest):
        log.append({"loss": 0.0, "theta_norm": 0.0})
        seen.append({"beta": objective.beta, **rest})

    monkeypatch.setattr(l2l_adv, step, fake)
    assert main([*tiny, "--epochs", "1", "--eps", "0.12", "--beta", "2", "--eps-warmup", "0",
                 "--out", "run", "--method", *flags]) == 0
    assert len(seen) == 3 and {key: seen[0][key] for key in expected} == expected
    assert seen[0]["eps"] == 0.12 and seen[0]["steps"] == 2


@pytest.mark.parametrize("method, maximizer", [("rnn-adv", "learned"), ("advtrain", "pgd")])
def test_an_epoch_takes_every_image_once_at_the_schedules_rate_and_eps(
        tmp_path, monkeypatch, method, maximizer):
    seen = []

    def fake(model, *args, opt_theta, eps, log, opt_phi=None, step_size=None, **rest):
        rates = [opt.param_groups[0]["lr"] for opt in (opt_theta, opt_phi) if opt is not None]
        seen.append((rates, eps, step_size, args[-2], args[-1].tolist(), model.training))
        log.append({"loss": float(len(seen)), "theta_norm": 0.0})

    monkeypatch.setattr(l2l_adv, f"train_step_{maximizer}", fake)
    x = torch.arange(30).view(30, 1, 1, 1).repeat(1, 1, 4, 4).byte()
    data = Dataset(x, torch.arange(30), None, None)
    settings = get_args(f"train --out {tmp_path} --method {method} --epochs 2 --batch-size 8 --lr "
                        "0.3 --phi-lr 0.03 --eps 0.1 --eps-warmup 0.5".split())
    rows = train(settings, SmallCNN(1, 30), data)
    done = [(2 * k + 1) / 12 for k in range(6)]  # 2 epochs of 3 steps
    rates, radii, sizes, images, labels, modes = zip(*seen)
    cycle = np.interp(done, [0, 1 / 3, 1], [0, 1, 0])
    peaks = np.array([[0.3], [0.03]][:len(rates[0])])
    assert np.array(rates).T == pytest.approx(peaks * cycle)
    ramp = np.array([1 / 6, 3 / 6, 5 / 6, 1, 1, 1])
    assert radii == pytest.approx(0.1 * ramp) and all(modes)
    assert method == "rnn-adv" or sizes == pytest.approx(0.025 * ramp)
    assert all((255 * x[:, 0, 0, 0]).round().tolist() == y for x, y in zip(images, labels))
    first, second = sum(labels[:3], []), sum(labels[3:], [])
    assert sorted(first) == sorted(second) == sorted(hold_out(data)[1].tolist())
    assert first != second and [row["loss"] for row in rows] == [2.0, 5.0]


@pytest.mark.parametrize("method, score", [("advtrain", "pgd-10"), ("plain", "natural")])
def test_the_best_checkpoint_is_the_best_on_held_out_images(tiny, monkeypatch, method, score):
    scores, seen, augmented = iter([0.2, 0.5, 0.5, 0.1]), [], []

    def fake(model, x, y, attacks):
        if len(x) == 1:  # the look at the model before the training
            return {}, {}
        seen.append(x)
        accuracy = {"natural": 0.9, "pgd-10": 0.9, score: next(scores)}
        return {name: torch.tensor(value) for name, value in accuracy.items()}, {}

    monkeypatch.setattr(l2l_adv, "augment", lambda x, padding: augmented.extend(x[padding:]) or x)
    monkeypatch.setattr(l2l_adv, "evaluate", fake)
    assert main([*tiny, "--method", method, "--epochs", "4", "--out", "run"]) == 0
    assert [len(saved(f"run/{name}.pt")["rows"]) for name in ("best", "last")] == [2, 4]
    held_out = hold_out(load_dataset("cifar10"))[2] / 255
    assert len(seen) == 4 and all(torch.equal(x, held_out) for x in seen)
    assert len(augmented) == 4 * 24
    assert not {"opt_theta", "data_dir", "resume"} & {*saved("run/best.pt"),
                                                      *saved("run/best.pt")["settings"]}


class Lengthy(nn.Sequential):
    """A model that is falsy, reshapes by view, and has a frozen layer."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3))
        self[0].requires_grad_(False)

    def __len__(self):
        return 0

    def forward(self, x):
        norm = self[1](self[0](x))
        return self[2](norm.view(len(x), -1))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_and_data_of_the_callers_own(tmp_path, compiled):
    model, new = seeded(0, Lengthy), seeded(1, Lengthy)
    images, labels = torch.randint(0, 256, (50, 1, 8, 8)).byte(), torch.randint(0, 3, (50,))
    settings = get_args(["train", "--out", str(tmp_path / "run")])
    settings.out = tmp_path / "run"
    settings.epochs, settings.batch_size, settings.steps = np.arange(4)[1], np.int64(10), 2
    settings.eps, settings.seed = np.float64(8) / 255, np.arange(3)[2]
    trained = torch.compile(model, backend="eager") if compiled else model
    rows = train(settings, trained.eval(), Dataset(images, labels, images, labels))
    loaded, optimizer, again = load_run(tmp_path / "run", model=new)
    assert len(rows) == 1 and loaded is new and loaded[1].num_batches_tracked == 4
    assert torch.equal(loaded(images / 255), model.eval()(images / 255))
    assert (again.model, again.dataset, again.eps, again.seed) == ("own", "own", 8 / 255, 2)
    assert isinstance(optimizer, LearnedOptimizer) and again.out == str(tmp_path / "run")
    with pytest.raises(InputError, match="holds a model of your own"):
        load_run(tmp_path / "run")
    again.resume = True
    assert train(again, new, Dataset(images, labels, images, labels)) == rows


WORKER = """
import sys, torch, l2l_adv
torch.set_num_threads(1)
sizes, step = set(), l2l_adv.train_step_learned
def counting(model, optimizer, x, y, **rest):
    sizes.add(len(x))
    return step(model, optimizer, x, y, **rest)
l2l_adv.train_step_learned = counting
flags = "--dataset mnist --method rnn-adv --epochs 1 --batch-size 9 --steps 2 --phi-share 1"
torch.manual_seed(torch.distributed.is_torchelastic_launched() and int(sys.argv[2]))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 10))
model[1].bias.requires_grad_(False)
l2l_adv.random_start = lambda x, eps, start: x  # so that one process meets the same points
l2l_adv.train(l2l_adv.get_args(["train", *flags.split(), "--out", sys.argv[1]]), model)
assert sizes == {4}  # half of the batch each, less what cannot be divided
"""


def test_two_processes_train_both_networks_as_one(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist", n=40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MNIST_DIR", str(tmp_path))
    Path("worker.py").write_text(WORKER.replace("int(sys.argv[2])", "int(__import__('os').environ['RANK'])"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "2", "worker.py", "two"]
    result = subprocess.run(torchrun, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(HERE)})
    assert result.returncode == 0 and result.stdout.count("epoch") == 1, result.stderr
    monkeypatch.setattr(l2l_adv, "random_start", lambda x, eps, start: x)
    monkeypatch.setenv("RANK", "1")  # without torchrun, these mean nothing
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = seeded(0, lambda: nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)))
    model[1].bias.requires_grad_(False)
    train(get_args("train --dataset mnist --method rnn-adv --epochs 1 --batch-size 8 --steps 2 "
                   "--phi-share 1 --out one".split()), model)
    one, two = saved("one/last.pt"), saved("two/last.pt")
    for key, moved_by in (("model", 0.01), ("optimizer", 1e-3)):
        one_flat, two_flat = flat(one[key].values()), flat(two[key].values())
        assert torch.allclose(one_flat, two_flat, rtol=1e-4, atol=1e-5)
    assert torch.equal(one["model"]["1.bias"], two["model"]["1.bias"])


# Interruptions and damaged files

def outcome_of(out):
    """All that a training leaves but the time it took, as comparable values."""
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items() if key not in ("seconds", "out")}
        value = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
        return [plain(v) for v in value] if isinstance(value, list) else value

    files = [plain(saved(f"{out}/{name}.pt")) for name in ("last", "best")]
    return sorted(os.listdir(out)), [plain(row) for row in log_of(out)], files


@pytest.mark.parametrize("method", ["plain", "trades", "rnn-trades"])
def test_a_training_that_met_nan_says_where_and_goes_on_to_the_same_bits(
        tiny, monkeypatch, capsys, method):
    flags = [*tiny, "--method", method, "--resume", "--epochs", "4", "--out"]
    descend, calls = l2l_adv.descend, []

    def failing(model, *args):
        calls.append(1)
        if len(calls) == 5:
            model.layers[0].weight.data.fill_(math.nan)
        return descend(model, *args)

    with monkeypatch.context() as patch:
        patch.setattr(l2l_adv, "descend", failing)
        assert main([*flags, "run"]) == 1
    assert re.search("epoch 2, step 2: .*; the last finished epoch is saved\n$",
                     capsys.readouterr().err)
    assert len(saved("run/last.pt")["rows"]) == 1
    assert main([*flags, "run"]) == main([*flags, "whole"]) == 0
    assert outcome_of("run") == outcome_of("whole")


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_training_goes_on_to_the_same_bits(tiny, kill):
    method = ("rnn-trades", "advtrain", "rnn-adv", "trades")[kill % 4]
    flags, start = [*tiny, "--method", method, "--resume", "--epochs", "4", "--out"], time.time()
    assert main([*flags, "whole"]) == 0
    delay = np.random.default_rng(kill).uniform(0, time.time() - start)
    process = subprocess.Popen([sys.executable, HERE / "l2l_adv.py", *flags, "run"],
                               stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.stdout.readline()  # the heading
    process.stdout.readline()  # the first row
    time.sleep(delay)
    process.kill()
    process.communicate()
    print("killed after", [(path.name, path.stat().st_size) for path in Path("run").glob("*")])
    assert main([*flags, "run"]) == 0 and outcome_of("run") == outcome_of("whole")


@pytest.mark.parametrize("kind", ["bin", "py", "idx", "idx.gz", "last.pt"])
def test_a_damaged_file_is_read_or_refused_in_one_line(tiny, kind):
    def read():
        if kind == "last.pt":
            load_run("data", "last")
        else:
            load_dataset("mnist" if "idx" in kind else "cifar10", "data")

    if kind == "last.pt":
        assert main([*tiny, "--epochs", "1", "--limit", "8", "--out", "data"]) == 0
    elif "idx" in kind:
        write_mnist(Path("data"), 7, gzip.compress if kind == "idx.gz" else bytes)
    else:
        write_cifar10(Path("data"), 12, pickled(2) if kind == "py" else binary)
    path, = (p for p in Path("data").iterdir() if re.match("last|data_batch_2|train-labels", p.name))
    raw, rng, refused = path.read_bytes(), np.random.default_rng(FUZZ), 0
    for _ in range(FUZZ):
        damaged = bytearray(raw)
        for _ in range(rng.integers(1, 4)):  # at the head, where the structure is, or anywhere
            end = min(len(raw), 300) if rng.random() < 0.5 else len(raw)
            damaged[rng.integers(end)] = rng.integers(256)
        path.write_bytes(damaged if rng.random() < 0.6 else raw[:rng.integers(len(raw))])
        try:
            read()
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > FUZZ / 4
    path.write_bytes(raw)
    read()


def test_a_malicious_or_older_checkpoint_is_refused_unexecuted(tiny, tmp_path, capsys):
    flags = [*tiny, "--method", "plain", "--epochs", "1", "--resume", "--out", "run"]
    assert main(flags) == 0
    Bomb.target, good = tmp_path / "executed", saved("run/last.pt")
    for bad, words in ((Bomb(), "damaged"), ({**good, "settings": Bomb()}, "damaged"),
                       ({key: good[key] for key in good if key != "format"}, "commit d36af19")):
        for name in ("last.pt", "best.pt"):
            torch.save(bad, f"run/{name}")
        capsys.readouterr()
        assert main(["eval", "run"]) == 2 and main(flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 2 == error.count(words) and not Bomb.target.exists()


# ---- l2l_adv 5: command line ---------------------------------------------------------------------

def test_eval_runs_the_attacks_it_is_asked_for_and_lends_an_optimizer(tiny, capsys):
    for method in ("rnn-adv", "advtrain", "rnn-trades"):
        assert main([*tiny, "--method", method, "--out", method]) == 0
    checkpoint = saved("rnn-trades/last.pt")
    checkpoint["optimizer"]["W_out"].mul_(100)  # so that its steps are not tiny
    torch.save(checkpoint, "rnn-trades/last.pt")
    names, results = ["learned-2", "pgd-3", "cw-4"], []
    for more in ([], ["--lend", "rnn-trades"]):
        capsys.readouterr()
        assert main(["eval", "rnn-adv", "advtrain", "--limit", "4", "--attacks", ",".join(names),
                     "--checkpoint", "last", "--eps", "0.1", "--seed", "5", *more]) == 0
        heading, columns, _, row = capsys.readouterr().out.splitlines()
        assert (row.split()[2] == "-") == (not more)
        results.append([json.loads(Path(out, "eval.json").read_text())
                        for out in ("rnn-adv", "advtrain")])
    assert columns.split() == ["run", "natural", *names, "worst"] and "eps = 25.5/255" in heading
    assert "last checkpoint, attack seed 5" in heading
    data, model = load_dataset("cifar10"), load_run("advtrain", "last")[0]
    optimizer = load_run("rnn-trades", "last")[1]
    correct, loss = evaluate(model, data.x_test[:4] / 255, data.y_test[:4], {
        "learned-2": lambda m, x, y: learned_attack(m, optimizer, x, y, eps=0.1, steps=2),
        "pgd-3": lambda m, x, y: pgd(m, x, y, eps=0.1, step_size=0.025, steps=3),
        "cw-4": lambda m, x, y: pgd(m, x, y, eps=0.1, step_size=0.025, steps=4,
                                    objective=Margin())}, seed=5)
    own, lent = results[1]
    assert lent["accuracy"] == {name: c.double().mean().item() for name, c in correct.items()}
    assert lent["loss"] == pytest.approx({name: l.mean().item() for name, l in loss.items()})
    assert (own["lent_by"], lent["lent_by"]) == (None, "rnn-trades")
    assert own["loss"] == results[0][0]["loss"] and lent["images"] == 4 and lent["eps"] == 0.1


# Mistakes: one line each, exit status 2, and nothing written

X, Y, NET = torch.rand(2, 3, 4, 4), torch.zeros(2).long(), SmallCNN(3)


@pytest.mark.parametrize("change, words", [
    ({"eps": 0.0}, "eps must be above 0"), ({"eps": 1.1}, "at most 1"),
    ({"eps": math.nan}, "eps must"), ({"eps": "8/255"}, "eps must"),
    ({"steps": 0}, "positive whole"), ({"steps": 2.5}, "positive whole"),
    ({"x": X * 255}, "divide by 255"), ({"x": X * math.nan}, "must lie in"),
    ({"x": X[0]}, "(B, C, H, W)"), ({"x": (X * 255).byte()}, "not Tensor torch.uint8 (2, 3, 4, 4)"),
    ({"x": X[:0], "y": Y[:0]}, "images"), ({"x": X.numpy()}, "not ndarray float32"),
    ({"y": Y[:1]}, "one per image"), ({"y": Y.int()}, "int64"), ({"y": Y - 1}, "class numbers"),
    ({"y": [0, 0]}, "not list"), ({"y": torch.eye(2).long()}, "one per image"),
    ({"start": "zero"}, "start must be")])
def test_attacks_and_training_steps_refuse_bad_input(change, words):
    call = {"x": X, "y": Y, "eps": 0.1, "steps": 1, **change}
    optimizer, x, y = LearnedOptimizer(), call.pop("x"), call.pop("y")
    opts = {"opt_theta": torch.optim.SGD(NET.parameters(), 0.1),
            "opt_phi": torch.optim.SGD(optimizer.parameters(), 0.1)}
    theta = {"opt_theta": opts["opt_theta"]}
    for attack in (lambda: pgd(NET, x, y, **call, step_size=0.1),
                   lambda: learned_attack(NET, optimizer, x, y, **call),
                   lambda: train_step_pgd(NET, x, y, **theta, **call, step_size=0.1),
                   lambda: train_step_learned(NET, optimizer, x, y, **opts, **call)):
        with pytest.raises(InputError, match=re.escape(words)):
            attack()


@pytest.mark.parametrize("wrong, words", [
    (lambda: pgd(NET, X, Y, eps=0.1, step_size=0.0, steps=1), "step_size must"),
    (lambda: pgd(NET, X, Y, eps=0.1, step_size=1.1, steps=1), "step_size must"),
    (lambda: learned_attack(NET, None, X, Y, eps=0.1), "needs a LearnedOptimizer, not NoneType"),
    (lambda: train_optimizer(NET, [], eps=0.1), "no batch"),
    (lambda: evaluate(NET, X * 2, Y, {}), "divide by 255"),
    (lambda: evaluate(NET, X, Y, {}, batch_size=0), "steps must"),
    (lambda: evaluate(NET, X, Y, {"natural": None}), "choose another name"),
    (lambda: evaluate(NET, X, Y, {"worst": None}), "choose another name"),
    (lambda: evaluate(lambda_model(lambda x: (NET(x), 0)), X, Y, {}), "not tuple"),
    (lambda: evaluate(lambda_model(lambda x: NET(x)[:, :1]), X, Y + 1, {}), r"not \(2, 1\)"),
    (lambda: evaluate(lambda_model(lambda x: NET(x)[:, 0]), X, Y, {}), r"not \(2,\)"),
    (lambda: Trades(beta=0), "beta must"), (lambda: LearnedOptimizer(cell="gru"), "unknown cell"),
    (lambda: load_dataset("cifar100"), "unknown data set"),
    (lambda: hold_out(Dataset(X, Y, X, Y)), "five or more"),
    (lambda: hold_out(Dataset(X.repeat(9, 1, 1, 1), Y.repeat(9), X, Y)), "uint8"),
    (lambda: hold_out(Dataset(X.byte().repeat(9, 1, 1, 1), Y, X, Y)), "as many labels"),
    (lambda: load_run("nowhere"), "missing or damaged")])
def test_python_calls_refuse_bad_input(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()


def lambda_model(function):
    model = nn.Module()
    model.forward = function
    return model


def is_refused(argv, words, capsys):
    """It ends with status 2 and one line on stderr, which has these words, and writes nothing."""
    def files():
        return {path: path.stat().st_mtime_ns for path in Path().rglob("*")}

    before = files()
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    return files() == before


@pytest.mark.parametrize("flags", """
    --method fgsm; --model alexnet; --dataset svhn; --cell gru; --start zero; --eps 0; --eps 8;
    --eps 8/0; --eps nan; --eps=-8/255; --eps-warmup 1.1; --steps 1.5; --epochs two; --step-size 2;
    --beta 0; --phi-lr -1; --phi-share 0; --clip 0; --lr inf; --lr 1e999999999; --limit 0;
    --seed -1; --batch-size 9999999999; --padding 33; --bogus = unrecognized arguments: --bogus;
    --batch-size 1 = are too few; --limit 1 = are too few; --device tpu9 = the device 'tpu9';
    --device meta = the device 'meta'; --data-dir nowhere = no cifar10 in nowhere;
    --dataset mnist --data-dir . = no mnist; --method plain --line-search = does not use PGD;
    --method rnn-adv --decay = does not use PGD; --method rnn-adv --step-size 0.1 = not use PGD
    """.split(";"))
def test_train_refuses_bad_input(tiny, capsys, flags):
    flags, _, words = flags.strip().partition(" = ")  # the line names the flag, or says this
    words = words or re.match("--[a-z-]+", flags)[0]
    assert is_refused([*tiny, "--out", "run", *flags.split()], words, capsys)


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("limit", -5), ("eps", 8), ("method", "fgsm"), ("batch_size", 1.5)])
def test_settings_that_were_changed_in_python_are_checked_too(tiny, name, value):
    settings = get_args([*tiny, "--out", "run"])
    setattr(settings, name, value)
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}"):
        train(settings)
    assert not Path("run").exists()


def test_settings_depend_on_data_set_and_model():
    settings = get_args("train --out a --dataset mnist --method advtrain --model small".split())
    assert (settings.eps, settings.lr, settings.batch_size) == (0.3, 0.05, 64)
    assert settings.step_size == 0.075 and settings.start == "gaussian"
    settings = get_args("train --out a --dataset cifar10 --eps 4/255 --method trades".split())
    assert (settings.model, settings.epochs, settings.padding) == ("vgg16", 30, 4)
    assert (settings.eps, settings.step_size) == (4 / 255, 1 / 255)
    assert (settings.batch_size, settings.eps_warmup, settings.lr) == (128, 0, 0.05)


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(tiny, capsys):
    flags = [*tiny, "--method", "plain", "--out", "run"]
    assert main(flags) == 0 and is_refused(flags, "already contains a run", capsys)
    before = outcome_of("run")
    assert is_refused([*flags, "--resume", "--epochs", "5"], "with epochs = 2: use", capsys)
    assert main([*flags, "--resume"]) == 0 and outcome_of("run") == before  # it is finished
    assert main([*flags[:-1], "other", "--seed", "1"]) == 0
    assert outcome_of("other")[2][0]["model"] != before[2][0]["model"]


def test_an_out_that_cannot_be_written_is_noticed_at_once(tiny, capsys):
    Path("file").write_text("")
    assert is_refused([*tiny, "--out", "file/run"], "Not a directory", capsys)


IDX = "t10k-images-idx3-ubyte"


@pytest.mark.parametrize("name, damage", [
    ("data_batch_2.bin", lambda raw: raw[:-9]), ("data_batch_2.bin", lambda raw: raw[:-3073]),
    ("data_batch_4.bin", None), ("test_batch.bin", lambda raw: b""),
    ("test_batch.bin", lambda raw: b"\x0a" + raw[1:]), (IDX, lambda raw: raw[:-1]),
    (IDX, lambda raw: b"\0\0\x09" + raw[3:]), (IDX, lambda raw: raw[:9]),
    (IDX, lambda raw: raw + b"x"), ("t10k-labels-idx1-ubyte", None),
    (IDX, lambda raw: raw[:7] + b"\x06" + raw[8:-28 * 28])])  # the last: six images
def test_damaged_data_is_refused(tiny, capsys, name, damage):
    write_mnist(Path("mnist"), 7, bytes)
    path = Path("mnist" if "idx" in name else "cifar", name)
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    data = ["--dataset", "mnist", "--data-dir", "mnist"] if "idx" in name else []
    assert is_refused([*tiny, "--out", "run", *data], str(path.parent), capsys)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run without a learned optimizer, one of another eps, and what is not a run."""
    folder = tmp_path_factory.mktemp("folders")
    write_cifar10(folder / "cifar", n=6)
    train(get_args(["train", "--out", str(folder / "run"), "--method", "plain", "--dataset",
                    "cifar10", "--model", "small", "--data-dir", str(folder / "cifar"),
                    "--epochs", "1"]))
    right = saved(folder / "run/best.pt")
    wrong = {"vgg": {**right, "model": MODELS["vgg16"](3).state_dict()}, "tensor": torch.zeros(3),
             "keys": {"format": 1}, "text": None,
             "other-eps": {**right, "settings": {**right["settings"], "eps": 4 / 255}}}
    for name, content in wrong.items():
        (folder / name).mkdir()
        torch.save(content, folder / name / "best.pt")
    (folder / "text/best.pt").write_text("not a checkpoint")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize("flags", """
    vgg; tensor; keys; text; empty; nothing; other-eps = differ in data set or eps; --seed x;
    --lend text = text; --attacks fgsm = unknown attack 'fgsm'; --limit many; --eps 8;
    --attacks pgd-0 = unknown attack 'pgd-0'; --attacks pgd-10, = unknown attack '';
    --attacks pgd-999999 = unknown attack; --checkpoint first; --lend run = no learned optimizer;
    --data-dir nowhere = no cifar10 in nowhere""".split(";"))
def test_eval_refuses_bad_input_and_what_is_not_a_run(folders, monkeypatch, capsys, flags):
    monkeypatch.chdir(folders)
    flags, _, words = flags.strip().partition(" = ")
    assert is_refused(["eval", "run", *flags.split()], words or flags.split()[0], capsys)
