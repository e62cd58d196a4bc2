"""Tests of baselines.py and l2l_adv.py: every part against an independent reference, forward and gradient.

    python3 -m pytest -q                        # with FUZZ=1000 KILLS=20, more damaged files and killed trainings
"""
import copy
import gzip
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baselines
import l2l_adv
from baselines import (MODELS, AdvTrain, Dataset, InputError, Margin, NotFinite, SmallCNN, Trades, augment, cw_linf,
                       eval_mode, evaluate, hold_out, input_gradient, load_dataset, pgd, project, to_unit)
from l2l_adv import (METHODS, InBf16, LearnedOptimizer, Settings, Trace, Training, ascend, learned_attack,
                     load_classifier, load_run, main, make_objective, phi_gradient, scaled, theta_gradient, train,
                     train_optimizer, train_step_learned, train_step_pgd)

torch.set_num_threads(1)  # the problems are so small that threads would only wait for each other
HERE = Path(__file__).parent
OBJECTIVES = [AdvTrain(), Trades(beta=3.0)]
FUZZ, KILLS = int(os.environ.get("FUZZ", 40)), int(os.environ.get("KILLS", 2))


def problem(batch=5, shape=(2, 4, 4), dtype=torch.float64, seed=0, batch_norm=False, dropout=0.0):
    """A small smooth classifier of three classes, images and labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, padding=1), nn.BatchNorm2d(6) if batch_norm else nn.Identity(), nn.Tanh(),
        nn.Dropout(dropout), nn.Flatten(), nn.Linear(6 * shape[1] * shape[2], 3))
    return model.to(dtype), torch.rand(batch, *shape, dtype=dtype), torch.randint(0, 3, (batch,))


class Hill(nn.Module):
    """Two classes, logits (0, height(x)): for label 0 the attack climbs."""

    def __init__(self, height):
        super().__init__()
        self.height, self.w = height, nn.Parameter(torch.ones(1))

    def forward(self, x):
        z = self.w * self.height(x).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(z), z], 1)


def seeded(seed, function, *args, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


def flat(tensors):
    return torch.cat([each.detach().flatten() for each in tensors])


def weights_of(*modules):
    return flat(p for module in modules for p in module.parameters())


def big_steps(cell="lstm"):
    """A learned optimizer whose steps reach the surface of the ball within a few steps."""
    with torch.random.fork_rng(), torch.no_grad():
        optimizer = seeded(1, LearnedOptimizer, hidden_size=4, cell=cell).double()
        optimizer.W.mul_(3)
        optimizer.W_out.mul_(3)
    return optimizer


def attacks(eps):
    """Every attack of both modules, by name."""
    optimizer, by_hand, learned = big_steps(), dict(eps=eps, step_size=eps / 2, steps=5), dict(eps=eps, steps=5)
    return {"pgd": lambda m, x, y: pgd(m, x, y, **by_hand),
            "pgd-uniform": lambda m, x, y: pgd(m, x, y, **by_hand, start="uniform"),
            "pgd-trades": lambda m, x, y: pgd(m, x, y, **by_hand, objective=Trades()),
            "line-search": lambda m, x, y: pgd(m, x, y, **by_hand, line_search=True),
            "decay": lambda m, x, y: pgd(m, x, y, **by_hand, decay=True),
            "cw": lambda m, x, y: cw_linf(m, x, y, **by_hand),
            "learned": lambda m, x, y: learned_attack(m, optimizer.to(x.dtype), x, y, **learned),
            "learned-trades": lambda m, x, y: learned_attack(m, optimizer.to(x.dtype), x, y, **learned,
                                                             objective=Trades())}


# ---- baselines 1, 2: threat model, objectives ------------------------------------------------------------------------

def test_project_is_the_nearest_point_of_ball_and_box():
    rng = np.random.default_rng(0)
    x, x_adv = rng.random((3, 2, 4, 4)), rng.normal(0.5, 0.5, (3, 2, 4, 4))
    expected = np.clip(np.clip(x_adv, x - 0.1, x + 0.1), 0, 1)
    assert np.array_equal(project(torch.tensor(x_adv), torch.tensor(x), 0.1).numpy(), expected)


@torch.no_grad()
def finite_difference(function, weight, index, h=1e-5):
    values = []
    for step in (h, -2 * h, h):  # up, down, and back
        weight[index] += step
        values.append(function())
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_equal_numpy_and_their_gradient_finite_differences(objective):
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
    assert np.allclose(ours, inner, rtol=1e-10, atol=1e-14) and loss.item() == pytest.approx(outer, rel=1e-12)
    grad, = torch.autograd.grad(loss, model[0].weight)
    for index in [(0, 0, 0, 0), (3, 1, 2, 1), (5, 0, 1, 2)]:
        difference = finite_difference(lambda: objective.outer_loss(model, x, x_adv, y).item(), model[0].weight, index)
        assert grad[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_trades_normalises_x_and_x_adv_together():
    model, x, y = problem(batch_norm=True)
    x_adv = (x + 0.3).clamp(0, 1)
    features = model[0](torch.cat([x, x_adv])).detach()
    Trades().outer_loss(model, x, x_adv, y)
    assert torch.allclose(model[1].running_mean, 0.1 * features.mean((0, 2, 3)))
    assert torch.allclose(model[1].running_var, 0.9 + 0.1 * features.var((0, 2, 3)))


def test_margin_is_the_best_wrong_logit_minus_the_true_one():
    logits, y = torch.randn(20, 5), torch.randint(0, 5, (20,))
    expected = [max(z for j, z in enumerate(row) if j != t) - row[t] for row, t in zip(logits.tolist(), y.tolist())]
    assert torch.allclose(Margin().inner_loss(logits, y), torch.tensor(expected))


# ---- baselines 3, 4: attacks, evaluation -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", attacks(0.1))
@pytest.mark.parametrize("seed", range(4))
def test_attacks_stay_in_the_ball_and_the_box_see_eval_mode_and_leave_no_trace_on_the_model(name, seed):
    rng = np.random.default_rng(seed)
    eps, shape = float(rng.uniform(0.001, 0.9)), tuple(int(n) for n in rng.integers(1, 6, 3))
    model, x, y = problem(int(rng.integers(2, 5)), shape, torch.float32, seed, batch_norm=True, dropout=0.5)
    x, attack = (3 * x - 1).clamp(0, 1), attacks(eps)[name]  # many pixels on the faces of the box
    model.train()(x).sum().backward()
    model[1].eval()  # a frozen batch norm within a training model must stay so
    model[0].bias.grad = None
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    seeded(1, torch.rand_like if name == "pgd-uniform" else torch.randn_like, x)
    random_state = torch.get_rng_state()
    x_adv = seeded(1, attack, model, x, y)
    assert torch.equal(torch.get_rng_state(), random_state)  # it draws its start, as every attack, and nothing else
    assert x_adv.shape == x.shape and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and (x_adv - x).abs().max() <= eps + 1e-6
    with pytest.raises((IndexError, RuntimeError)):  # the modes come back after an error too
        attack(model, torch.rand(len(x), 9, 9, 9), y + 100)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is old or torch.equal(p.grad, old) for p, old in zip(model.parameters(), grads))
    assert torch.equal(seeded(1, attack, model.eval(), x, y), x_adv)


@pytest.mark.parametrize("start", ["gaussian", "uniform"])
def test_one_pgd_step_is_the_sign_of_the_gradient_at_the_start_point(start):
    model, x, y = problem()
    noise = 0.001 * seeded(1, torch.randn_like, x) if start == "gaussian" else 0.2 * seeded(1, torch.rand_like, x) - 0.1
    x_0 = project(x + noise, x, 0.1).requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(model(x_0), y), x_0)
    x_adv = seeded(1, pgd, model, x, y, eps=0.1, step_size=0.03, steps=1, start=start)
    assert torch.allclose(x_adv, project(x_0 + 0.03 * g.sign(), x, 0.1), atol=1e-15)


def test_momentum_follows_the_sum_of_the_gradients_each_over_its_l1_norm():
    model, x, y = problem()
    x_adv, gathered = project(x + 0.001 * seeded(1, torch.randn_like, x), x, 0.1), torch.zeros_like(x)
    for _ in range(4):
        z = x_adv.clone().requires_grad_()
        g, = torch.autograd.grad(F.cross_entropy(model(z), y), z)
        gathered += F.normalize(g.flatten(1), p=1).view_as(g)
        x_adv = project(x_adv + 0.06 * gathered.sign(), x, 0.1)
    budget = dict(eps=0.1, step_size=0.06, steps=4)
    assert torch.allclose(seeded(1, pgd, model, x, y, **budget, momentum=True), x_adv, atol=1e-15)
    assert not torch.allclose(seeded(1, pgd, model, x, y, **budget), x_adv, atol=1e-3)


def test_decay_shrinks_the_steps_evenly():
    model, x, seen = Hill(lambda x: x), torch.full((3, 1, 2, 2), 0.5), []
    model.register_forward_pre_hook(lambda _, images: seen.append(images[0].detach()))
    seen.append(pgd(model, x, torch.zeros(3).long(), eps=0.2, step_size=0.04, steps=4, decay=True))
    lengths = [(after - before).mean().item() for before, after in zip(seen, seen[1:])]
    assert lengths == pytest.approx([0.04, 0.03, 0.02, 0.01], abs=1e-6)


def test_line_search_halves_each_image_s_step_until_armijo_s_condition_holds():
    model, y = Hill(lambda x: -10 * (x - 0.5) ** 2).double(), torch.zeros(4, dtype=torch.long)
    x = torch.tensor([0.2, 0.395, 0.47, 0.499]).double().view(4, 1, 1, 1)  # ever nearer to the top, at 0.5
    x_adv = seeded(1, pgd, model, x, y, eps=0.2, step_size=0.2, steps=1, line_search=True)
    loss, expected = lambda z: np.log1p(np.exp(-10 * (z - 0.5) ** 2)), []
    for z, x_i in zip((x + 0.001 * seeded(1, torch.randn_like, x)).flatten().tolist(), x.flatten().tolist()):
        slope = -20 * (z - 0.5) / (1 + math.exp(10 * (z - 0.5) ** 2))
        ends = [float(np.clip(z + math.copysign(0.2 / 2 ** k, slope), x_i - 0.2, x_i + 0.2)) for k in range(4)]
        expected.append(next((end for end in ends[:3] if loss(end) >= loss(z) + 0.1 * slope * (end - z)), ends[3]))
    assert x_adv.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert len({round(float(step), 2) for step in (x_adv - x).abs().flatten()}) >= 3  # they took different steps


def test_evaluate_counts_by_hand():
    model, x, y = problem(batch=40, dtype=torch.float32)
    by = {name: lambda m, x, y, c=c: torch.where(x[:, c, 0, 0, None, None, None] > 0.5, 1 - x, x)
          for c, name in enumerate("ab")}  # each inverts other images
    adv = {"natural": x, **{name: attack(model, x, y) for name, attack in by.items()}}
    right = {name: model(x_adv).argmax(1) == y for name, x_adv in adv.items()}
    accuracy, losses, survives = evaluate(model, x, y, by, batch_size=7, details=True)
    expected = {name: each.sum().item() / 40 for name, each in right.items()}
    assert torch.equal(survives, right["natural"] & right["a"] & right["b"])
    worst = survives.sum().item() / 40
    assert accuracy == {**expected, "worst": worst} and 0 < worst < min(expected.values())
    assert list(accuracy) == ["natural", "a", "b", "worst"] and evaluate(model, x, y, by) == accuracy
    assert losses == pytest.approx({name: F.cross_entropy(model(x), y).item() for name, x in adv.items()}, rel=1e-5)
    met = {"a": [], "b": []}  # the images that a quick evaluation attacks
    noted = {name: lambda m, x, y, name=name: met[name].append(x) or by[name](m, x, y) for name in by}
    quick, left = evaluate(model, x, y, noted, batch_size=7, quick=True), right["natural"] & right["a"]
    assert torch.equal(torch.cat(met["a"]), x[right["natural"]]) and torch.equal(torch.cat(met["b"]), x[left])
    assert quick == {"natural": expected["natural"], "a": left.sum().item() / 40, "b": worst, "worst": worst}
    wrong = (model(x).argmax(1) + 1) % 3
    assert {*evaluate(model, x, wrong, {"not called": None}, quick=True).values()} == {0.0}
    for broken in (lambda m, x, y: x * math.nan, lambda m, x, y: x + 1, lambda m, x, y: x[:, :1]):
        with pytest.raises(InputError, match="returned something other"):
            evaluate(model, x, y, {"broken": broken})
    no_gradient = Hill(lambda x: torch.sqrt(0 * x))  # it is NaN: PGD must not stand still and find the model robust
    with pytest.raises(InputError, match="returned something other"):
        evaluate(no_gradient, x, 0 * y, {"pgd": attacks(0.1)["pgd"]})
    with pytest.raises(NotFinite, match="logits"):
        evaluate(nn.Sequential(model, nn.Threshold(math.inf, math.nan)), x, y, {})


# ---- baselines 5, 6: classifiers, data -------------------------------------------------------------------------------

@pytest.mark.parametrize("name, millions", [("small", 0.129), ("cnn4", 0.308), ("vgg16", 14.7), ("resnet18", 11.2),
                                            ("wrn34", 46.2)])
@torch.no_grad()
def test_classifiers_have_their_size_and_normalise_inside(name, millions):
    model, x = MODELS[name](in_channels=3).eval(), torch.rand(2, 3, 32, 32)
    model.normalize_like((x * 255).byte())
    std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
    assert len(weights_of(model)) / 1e6 == pytest.approx(millions, rel=0.01) and model(x).shape == (2, 10)
    assert torch.allclose(model(x), model.layers((x - mean) / std), rtol=0.05, atol=0.05)
    assert all(SmallCNN()(torch.rand(2, 1, size, size)).shape == (2, 10) for size in (4, 16, 28, 33))


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def binary(x, y):
    return np.concatenate([y[:, None], x], 1).tobytes()


def pickled(protocol):
    labels, data = ("labels", "data") if protocol == 4 else (b"labels", b"data")
    return lambda x, y: pickle.dumps({b"batch_label": b"1", labels: y.tolist(), data: x, b"names": [b"a"]}, protocol)


def python_2(x, y):
    """What cPickle of Python 2 made of a batch, protocol 2: keys are U (SHORT_BINSTRING), the pixels T (BINSTRING)."""
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\x01btR(K\x01K%cM\0\x0c\x86"
             b"cnumpy\ndtype\n(U\x02u1K\0K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89T%b%btb")
    return b"\x80\x02}q\x01(U\x0bbatch_labelU\x061 of 5U\x06labelsq\x02](%beU\x04data%bU\x05names](U\x05a.pngeu." % (
        b"".join(b"K%c" % label for label in y), array % (len(x), x.nbytes.to_bytes(4, "little"), x.tobytes()))


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
    assert np.array_equal(data.x_train[:, 1, 2].numpy(), x[:, 1024 + 64:1024 + 96])  # the third green row
    assert np.array_equal(data.x_train.flatten(1).numpy(), x) and data.y_train.tolist() == y.tolist()
    assert np.array_equal(data.x_test.flatten(1).numpy(), parts["test_batch"][0]) and data.y_test.dtype == torch.int64
    return data.y_test.tolist() == parts["test_batch"][1].tolist()


@pytest.mark.parametrize("pack", [binary, *map(pickled, range(1, 6)), python_2])
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
    path.write_bytes(pickle.dumps(Bomb() if place == "whole" else {**batch, place: [batch[place], Bomb()]}))
    with suppress(InputError):  # what is data in it may be read, or not
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
            raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            (folder / f"{name}-{kind}-ubyte{'' if pack == bytes else '.gz'}").write_bytes(pack(raw))
    return parts


@pytest.mark.parametrize("folder, pack", [("mnist", gzip.compress), ("MNIST/raw", bytes)])
def test_mnist_is_read(tmp_path, monkeypatch, folder, pack):
    parts = write_mnist(tmp_path / folder, 7, pack)
    monkeypatch.setenv("MNIST_DIR", str(tmp_path))
    data = load_dataset("mnist")
    for x, y, name in ((data.x_train, data.y_train, "train"), (data.x_test, data.y_test, "t10k")):
        assert x.shape == (7, 1, 28, 28) and np.array_equal(x[:, 0].numpy(), parts[name][0])
        assert y.tolist() == parts[name][1].tolist()


@pytest.mark.parametrize("failure", [None, "no such file", "wrong SHA-256"])
def test_cifar10_is_downloaded_whole_or_not_at_all_where_no_folder_was_named(tmp_path, monkeypatch, failure):
    parts, archive = write_cifar10(tmp_path / "cifar-10-batches-bin"), tmp_path / "c.tar.gz"
    shutil.make_archive(str(tmp_path / "c"), "gztar", tmp_path, "cifar-10-batches-bin")
    sha256 = "0" * 64 if failure == "wrong SHA-256" else hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(baselines, "CIFAR10_SHA256", sha256)
    monkeypatch.setattr(baselines, "CIFAR10_URL", f"{archive.as_uri()}{'x' if failure == 'no such file' else ''}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    with pytest.raises(InputError, match="no cifar10 in elsewhere"):
        load_dataset("cifar10", "elsewhere")
    with pytest.raises(InputError, match="could not be downloaded") if failure else nullcontext():
        assert is_cifar10(load_dataset("cifar10"), parts)
    files = [] if failure else [f"data/cifar-10-batches-bin/{name}.bin" for name in NAMES]
    assert sorted(map(str, Path("data").rglob("*"))) == ["data/cifar-10-batches-bin"] * (not failure) + files
    assert not Path("elsewhere").exists() and (failure or is_cifar10(load_dataset("cifar10"), parts))  # it is there


def test_held_out_images_are_fixed_and_not_trained_on():
    data = Dataset(torch.arange(200).byte().view(200, 1, 1, 1), torch.arange(200), None, None)
    (x, y), (x_held_out, y_held_out) = hold_out(data)
    assert len(y_held_out) == 40 and sorted([*y.tolist(), *y_held_out.tolist()]) == list(range(200))
    assert torch.equal(x.flatten(), y) and torch.equal(x_held_out.flatten(), y_held_out)
    (few, _), (again, _) = seeded(5, hold_out, data, limit=10)
    assert torch.equal(few, x[:10]) and torch.equal(again, x_held_out)
    assert len(hold_out(load_dataset("synthetic"))[1][0]) == 800


def test_synthetic_data_tells_the_story():
    """The fine pattern is always right and below eps, the coarse one right nine times in ten and mostly above eps."""
    data = load_dataset("synthetic")
    assert torch.equal(data.x_train, load_dataset("synthetic").x_train) and data.y_train.bincount().min() > 300
    x = to_unit(data.x_train) - 0.5
    tile = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((2, 3))  # (N, 3, 4, 4), the mean over blocks shows the fine pattern
    tile = tile - tile.mean((2, 3), keepdim=True)
    fine = torch.stack([tile[data.y_train == k].mean(0) for k in range(10)])
    assert ((fine.amax((2, 3)) - fine.amin((2, 3))) / 2).median() == pytest.approx(6 / 255, rel=0.05)  # its amplitude
    guess = torch.einsum("nchw,kchw->nk", tile, fine).sub(fine.pow(2).sum((1, 2, 3)) / 2).argmax(1)
    assert (guess == data.y_train).float().mean() > 0.99
    block = F.avg_pool2d(x, 4)
    coarse = torch.stack([block[data.y_train == k].mean(0) for k in range(10)])
    guess = torch.einsum("nchw,kchw->nk", block, F.normalize(coarse, dim=(1, 2, 3))).argmax(1)
    assert 0.8 < (guess == data.y_train).float().mean() < 0.95


@pytest.mark.parametrize("padding, crops_seen", [(4, 61), (0, 1)])
def test_augment_crops_and_flips_each_image_on_its_own(padding, crops_seen):
    x, seen = seeded(0, torch.randint, 0, 256, (200, 3, 6, 6), dtype=torch.uint8), []
    for image, out in zip(F.pad(x, [padding] * 4), augment(x, padding)):
        crops = {(i, j, flip): image[:, i:i + 6, j:j + 6].flip([2] * flip)
                 for i in range(2 * padding + 1) for j in range(2 * padding + 1) for flip in (False, True)}
        seen.append(next(key for key, crop in crops.items() if torch.equal(crop, out)))
    assert len({key[:2] for key in seen}) >= crops_seen and 60 < sum(flip for *_, flip in seen) < 140


# ---- l2l_adv 1: the learned optimizer --------------------------------------------------------------------------------

@pytest.mark.parametrize("cell, weights", [("lstm", 450), ("rnn", 120)])
def test_cell_equals_the_one_of_torch_forward_and_gradient(cell, weights):
    ours = seeded(0, LearnedOptimizer, 10, cell).double()
    theirs = (nn.LSTMCell if cell == "lstm" else nn.RNNCell)(1, 10, bias=False).double()
    theirs.load_state_dict({"weight_ih": ours.W[:, :1], "weight_hh": ours.W[:, 1:]})
    inputs, weight = torch.randn(2, 4, 7, dtype=torch.float64)  # of four steps, at seven coordinates
    state, reference, outputs, expected = None, None, [], []
    for u in inputs:
        delta, state = ours(u, state)
        reference = theirs(u[:, None], reference)
        outputs.append(delta)
        expected.append(torch.tanh((reference[0] if cell == "lstm" else reference) @ ours.W_out.T)[:, 0])
    assert len(weights_of(ours)) == weights and torch.allclose(flat(outputs), flat(expected), atol=1e-14)
    grad, grad_out = torch.autograd.grad((weight * torch.stack(outputs)).sum(), [ours.W, ours.W_out])
    (weight * torch.stack(expected)).sum().backward()
    assert torch.allclose(grad, torch.cat([theirs.weight_ih.grad, theirs.weight_hh.grad], 1), atol=1e-12)
    assert torch.allclose(grad_out, ours.W_out.grad, atol=1e-12)
    soft, sharp = ours(u, state)[0], ours(u, state, gain=10)[0]
    assert soft.abs().min() > 1e-6 and torch.allclose(sharp.atanh(), 10 * soft.atanh(), rtol=1e-9)


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
@torch.no_grad()
def test_a_fresh_optimizer_steps_along_the_sign_of_the_gradient(cell):
    for seed in range(5):
        optimizer, state = seeded(seed, LearnedOptimizer, cell=cell), None
        for t in range(10):
            u = torch.randn(4096)
            delta, state = optimizer(u, state)
            assert (delta * u > 0).double().mean() > (0.8 if t else 0.999) and 0.09 < delta.abs().mean() < 0.27


def test_the_optimizer_sees_each_image_s_gradient_over_its_mean_size():
    g = torch.randn(3, 2, 4, 4, dtype=torch.float64) * torch.tensor([1e-20, 1.0, 1e9]).double().view(3, 1, 1, 1)
    assert np.allclose(scaled(g).view(3, -1).numpy(), [each / np.abs(each).mean() for each in g.flatten(1).numpy()])
    assert torch.equal(scaled(0 * g), torch.zeros(96, dtype=torch.float64))


# ---- l2l_adv 2: the learned inner maximiser, and the gradient of φ ---------------------------------------------------

def unrolled(model, optimizer, x, y, eps, steps, objective, gain=1.0):
    """Reference of the attack: x'_1 … x'_T at gain 1 with their graph through m_φ; g_0 … g_{T−1} and u_0 … u_{T−1} of
    the attack at `gain`, as data, and where it ends."""
    target, state = objective.target(model, x, y), None
    x_adv = soft = project(x + 0.001 * torch.randn_like(x), x, eps)
    points, gradients, inputs = [], [], []
    for t in range(steps):
        at = x_adv.detach().requires_grad_()
        gradients += torch.autograd.grad(objective.inner_loss(model(at), target).sum(), at)
        inputs.append((gradients[-1] / gradients[-1].abs().mean((1, 2, 3), keepdim=True)).flatten())
        delta, state = optimizer(inputs[-1], state)
        x_adv, soft = (torch.min(torch.max(start + eps * (steps - t) / steps * step.view(x.shape), x - eps), x + eps)
                       .clamp(0, 1) for start, step in ((x_adv, torch.tanh(gain * delta.atanh())), (soft, delta)))
        points.append(soft)
    return points, gradients, inputs, x_adv.detach()


def weighted(losses):
    """Σ_t t·loss(x'_t), over Σ_t t and per image, from tensors with one row per image."""
    return sum(t * loss.sum() for t, loss in enumerate(losses, 1)) / (len(losses[0]) * sum(range(1, len(losses) + 1)))


def meta_gradient(model, optimizer, x, y, eps, steps, objective):
    """Reference of φ's gradient: autograd through the unrolled losses."""
    points, *_ = seeded(7, unrolled, model, optimizer, x, y, eps, steps, objective)
    target = objective.target(model, x, y)
    losses = weighted([objective.inner_loss(model(x_adv), target) for x_adv in points])
    return flat(torch.autograd.grad(losses, list(optimizer.parameters())))


def our_phi_gradient(optimizer, trace, g_T, eps):
    """What phi_gradient leaves on the weights, upwards."""
    phi_gradient(optimizer, torch.optim.SGD(optimizer.parameters(), 0.1), trace, g_T, eps)
    ours = -flat(p.grad for p in optimizer.parameters())
    assert ours.norm() < 0.99  # or it would be clipped
    return ours


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_meta_gradient_equals_autograd_through_the_unrolled_losses_and_finite_differences(cell, objective):
    model, x, y = problem()
    optimizer, eps, steps, target = big_steps(cell), 0.2, 5, objective.target(model, x, y)
    points, _, inputs, _ = seeded(7, unrolled, model, optimizer, x, y, eps, steps, objective)
    assert 0.03 < ((points[-1] - x).abs() > eps - 1e-9).double().mean() < 0.95  # the projection cuts some coordinates
    expected = meta_gradient(model, optimizer, x, y, eps, steps, objective)
    x_adv, trace = seeded(7, ascend, model, optimizer, x, y, eps, steps, objective, "gaussian", share=1.0)
    assert torch.allclose(x_adv, points[-1], atol=1e-12) and sorted(trace.drawn.tolist()) == list(range(x.numel()))
    ours = our_phi_gradient(optimizer, trace, input_gradient(model, x_adv, objective, target)[0], eps)
    assert expected.norm() > 1e-4 and torch.allclose(ours, expected, rtol=1e-8, atol=1e-12)

    def losses():  # at the recorded inputs, without any of autograd
        state, x_t, losses = None, x + 0.001 * seeded(7, torch.randn_like, x), []
        for t, u in enumerate(inputs):
            delta, state = optimizer(u, state)
            x_t = project(x_t + eps * (1 - t / steps) * delta.view(x.shape), x, eps)
            losses.append(objective.inner_loss(model(x_t), target))
        return weighted(losses).item()

    for weight, grad in zip(optimizer.parameters(), ours.split([p.numel() for p in optimizer.parameters()])):
        for index in [(0, 0), (weight.shape[0] - 1, 2)]:
            difference = finite_difference(losses, weight, index, 1e-6)
            assert grad.view_as(weight)[index].item() == pytest.approx(difference, rel=1e-4, abs=1e-7)

    optimizer.compile(backend="aot_eager", fullgraph=True)  # traces as for a GPU, and does not generate code
    compiled = our_phi_gradient(optimizer, trace, input_gradient(model, x_adv, objective, target)[0], eps)
    assert torch.allclose(compiled, ours, rtol=1e-10) and list(optimizer.state_dict()) == ["W", "W_out"]


def test_the_meta_gradient_of_drawn_coordinates_is_unbiased():
    model, x, y = problem(batch=4)
    optimizer, counts = big_steps(), torch.zeros(128)
    x_adv, trace = seeded(1, ascend, model, optimizer, x, y, 0.2, 5, AdvTrain(), "gaussian", share=1.0)
    g_T, _ = input_gradient(model, x_adv, AdvTrain(), y)
    quarters = [Trace(*(part[k::4] for part in trace[:3]), *([each[k::4] for each in part] for part in trace[3:]))
                for k in range(4)]
    each = [our_phi_gradient(optimizer, quarter, g_T, 0.2) for quarter in quarters]
    assert torch.allclose(sum(each) / 4, our_phi_gradient(optimizer, trace, g_T, 0.2), atol=1e-14)
    assert (each[0] - each[1]).norm() > 0.1 * each[0].norm()
    order = trace.drawn.argsort()
    for share, K in ((0.25, 32), (0.07, 9)):  # ascend draws K of the 128, and records what it passed there
        x_again, some = seeded(1, ascend, model, optimizer, x, y, 0.2, 5, AdvTrain(), "gaussian", share=share)
        assert torch.equal(x_again, x_adv) and len(set(some.drawn.tolist())) == K
        of_some, of_all = ([*each[1:3], *each.inputs, *each.gradients] for each in (some, trace))
        assert all(torch.equal(ours, theirs[order][some.drawn]) for ours, theirs in zip(of_some, of_all))
    for _ in range(400):
        counts[ascend(model, optimizer, x, y, 0.2, 1, AdvTrain(), "gaussian", share=0.25)[1].drawn] += 1
    assert 60 < counts.min() and counts.max() < 140  # 100 of each are expected, give or take 9


# ---- l2l_adv 3: one alternating update -------------------------------------------------------------------------------

def moved(model, optimizer, x, y, objective, gain):
    """How far train_step_learned moves the weights of (φ, θ), per unit of learning rate."""
    before = weights_of(optimizer), weights_of(model)
    opt_phi, opt_theta = (torch.optim.SGD(player.parameters(), 0.1) for player in (optimizer, model))
    seeded(7, train_step_learned, model, optimizer, opt_theta, opt_phi, x, y, eps=0.2, steps=5, objective=objective,
           start="gaussian", gain=gain, share=1.0)
    return (weights_of(optimizer) - before[0]) / 0.1, (weights_of(model) - before[1]) / 0.1


class Mart(AdvTrain):
    """As in MART, images that are sure when clean count less: the outer loss is no multiple of the mean inner one."""

    def outer_loss(self, model, x, x_adv, y):
        p = model(x).softmax(1).gather(1, y[:, None])[:, 0]
        return (F.cross_entropy(model(x_adv), y, reduction="none") * (1 - p)).mean()


class MoreThanTrades(Trades):
    def outer_loss(self, model, x, x_adv, y):
        return super().outer_loss(model, x, x_adv, y) + model(x_adv).pow(2).mean()


class Targeted(AdvTrain):
    def target(self, model, x, y):
        return (y + 1) % 3


@pytest.mark.parametrize("objective, passes, scale", [
    (AdvTrain(), 6, 1), (Trades(beta=3.0), 7, 1), (Mart(), 8, 1), (MoreThanTrades(), 10, 1), (Targeted(), 7, 1),
    (AdvTrain(), 6, 1000)])
def test_one_learned_step_moves_both_players_along_their_own_gradients(objective, passes, scale):
    model, x, y = problem()
    model[-1].weight.data.mul_(scale)
    optimizer, calls = big_steps(), []
    ascent = meta_gradient(model, optimizer, x, y, 0.2, 5, objective)
    assert (ascent.norm() > 2) == (scale == 1000)
    ascent = ascent / ascent.norm().clamp(min=1)  # a large one is clipped
    budget = dict(eps=0.2, steps=5, objective=objective)
    x_adv, again = (seeded(7, learned_attack, model, optimizer, x, y, **budget) for _ in range(2))
    assert torch.equal(x_adv, again)  # the state is a fresh one
    descent = flat(torch.autograd.grad(objective.outer_loss(model, x, x_adv, y), list(model.parameters())))
    model.register_forward_hook(lambda *_: calls.append(1))
    phi, theta = moved(model, optimizer, x, y, objective, gain=1.0)
    assert len(calls) == passes  # the attack's five, TRADES' f(x), the outer loss's; and g_T's where it is not free
    assert torch.allclose(phi, ascent, rtol=1e-6, atol=1e-12) and torch.allclose(theta, -descent, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("gain", [1.0, 10.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_batch_norm_the_attack_is_in_eval_mode_and_the_free_g_T_in_train_mode(objective, gain):
    model, x, y = problem(batch_norm=True)
    model(3 * x)  # running statistics of their own
    still, twin, optimizer = copy.deepcopy(model).eval(), copy.deepcopy(model), big_steps()
    points, gradients, _, expected = seeded(7, unrolled, still, optimizer, x, y, 0.2, 5, objective, gain)
    x_T, _ = seeded(7, ascend, still, optimizer, x, y, 0.2, 5, objective, "gaussian", gain)
    assert torch.allclose(x_T.requires_grad_(), expected, atol=1e-12)
    outer = objective.outer_loss(twin, x, x_T, y)
    g_T, *descent = torch.autograd.grad(outer, [x_T, *twin.parameters()])
    gradients = [*gradients[1:], g_T * len(x) / objective.beta]
    linear = weighted([g * x_adv for g, x_adv in zip(gradients, points)])
    ascent = flat(torch.autograd.grad(linear, list(optimizer.parameters())))
    in_eval = meta_gradient(still, optimizer, x, y, 0.2, 5, objective)
    phi, theta = moved(model, optimizer, x, y, objective, gain)
    assert torch.allclose(phi, ascent, rtol=1e-8, atol=1e-12) and (phi - in_eval).norm() > 1e-3 * phi.norm()
    assert torch.allclose(theta, -flat(descent), rtol=1e-8, atol=1e-12)
    assert torch.equal(flat(model.buffers()), flat(twin.buffers()))  # moved by the outer loss alone
    assert not torch.equal(flat(model.buffers()), flat(still.buffers()))


@pytest.mark.parametrize("kind", [{}, {"line_search": True}, {"momentum": True}, {"decay": True}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_train_step_pgd_is_one_descent_step(objective, kind):
    model, x, y = problem()
    budget = dict(eps=0.1, step_size=0.05, steps=3, objective=objective, **kind)
    loss = objective.outer_loss(model, x, seeded(1, pgd, model, x, y, **budget, start="uniform"), y)
    expected = weights_of(model) - 0.1 * flat(torch.autograd.grad(loss, list(model.parameters())))
    got = seeded(1, train_step_pgd, model, torch.optim.SGD(model.parameters(), 0.1), x, y, **budget)
    assert torch.equal(got, loss.detach()) and torch.allclose(weights_of(model), expected, atol=1e-14)


def test_the_learned_step_starts_anywhere_in_the_ball_and_unrolls_a_sixteenth_of_the_coordinates():
    (model, x, y), optimizer, started, seen = problem(), big_steps(), [], []
    opts = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(optimizer.parameters(), 0.1)
    model.register_forward_pre_hook(lambda _, images: started.append(images[0].detach().clone()))
    optimizer.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    seeded(7, train_step_learned, model, optimizer, *opts, x, y, eps=0.1, steps=2)
    noise = 0.2 * seeded(7, torch.rand_like, x) - 0.1
    assert torch.allclose(started[0], project(x + noise, x, 0.1), atol=1e-15) and seen == [160, 160, 10, 10]


@pytest.mark.parametrize("bad", ["loss", "theta", "phi"])
def test_numbers_that_are_not_finite_reach_no_weight(bad, monkeypatch):
    model, x, y = problem()
    optimizer = big_steps()
    opts = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), torch.optim.Adam(optimizer.parameters(), 0.1)
    train_step_learned(model, optimizer, *opts, x, y, eps=0.1, steps=2)  # so that there is momentum
    before = weights_of(model, optimizer)
    if bad == "loss":
        monkeypatch.setattr(l2l_adv, "theta_gradient", lambda *args: theta_gradient(*args) * math.inf)
    else:
        (model[0].weight if bad == "theta" else optimizer.W_out).register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NotFinite):
        train_step_learned(model, optimizer, *opts, x, y, eps=0.1, steps=2)
    assert torch.equal(weights_of(model, optimizer), before)


def train_phi(model, x, y, steps, updates, cell="lstm"):
    """x' of a φ trained alone, by steps of both players at θ's learning rate 0, to attack with eps = 0.1."""
    optimizer = seeded(0, LearnedOptimizer, cell=cell)
    opts = torch.optim.SGD(model.parameters(), 0.0), torch.optim.Adam(optimizer.parameters(), 0.02)
    for _ in range(updates):
        train_step_learned(model, optimizer, *opts, x, y, eps=0.1, steps=steps, gain=1.0, share=0.5)
    return learned_attack(model, optimizer, x, y, eps=0.1, steps=steps)


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_a_trained_optimizer_and_pgd_reach_the_optimum_of_a_linear_model(cell):
    w, x, y = seeded(0, torch.randn, 1, 3, 3), torch.rand(8, 1, 3, 3), torch.zeros(8, dtype=torch.long)
    w = w + 0.2 * w.sign()
    model, optimum = Hill(lambda x: w * x), project(x + 0.1 * w.sign(), x, 0.1)
    assert torch.allclose(train_phi(model, x, y, steps=5, updates=100, cell=cell), optimum, atol=1e-3)
    for name in ("pgd", "pgd-uniform", "line-search", "cw"):
        assert torch.allclose(attacks(0.1)[name](model, x, y), optimum, atol=1e-6)


def test_a_trained_optimizer_beats_every_pgd_on_hidden_curvature():
    x, y = torch.full((16, 1, 5, 5), 0.5), torch.zeros(16, dtype=torch.long)
    top, curvature = 0.5 + 0.1 * (2 * seeded(0, torch.rand, 1, 5, 5) - 1), 10 ** (2 * torch.rand(1, 5, 5))
    model = Hill(lambda x: -curvature * (x - top) ** 2)
    loss = lambda x_adv: F.cross_entropy(model(x_adv), y).item()  # noqa: E731
    learned = loss(train_phi(model, x, y, steps=10, updates=200))
    best = max(loss(pgd(model, x, y, eps=0.1, step_size=0.1 / k, steps=10)) for k in (1, 2, 4, 8, 16))
    # log 2 is the top of the hill: the learned steps must leave less than 3/4 of the gap that the best PGD leaves
    assert math.log(2) - learned < 0.75 * (math.log(2) - best)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_train_optimizer_follows_autograd_through_a_frozen_classifier(objective):
    model, x, y = problem(batch_norm=True, dropout=0.5)
    before, optimizer = copy.deepcopy(model.state_dict()), big_steps()
    expected = weights_of(optimizer).requires_grad_()
    with eval_mode(model):
        expected.grad = -meta_gradient(model, optimizer, x, y, 0.1, 3, objective)
    torch.optim.Adam([expected], 0.003).step()
    got = seeded(7, train_optimizer, model, iter([(x, y)]), eps=0.1, steps=3, objective=objective, optimizer=optimizer,
                 lr=0.003)
    assert got is optimizer and not got.training and torch.allclose(weights_of(got), expected, atol=1e-8)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    fresh, seen, x = train_optimizer(model.float(), [(x.float(), y)], eps=0.1), [], x.float()
    fresh.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    same = train_optimizer(model, [(x, y)], eps=0.1, steps=1, optimizer=fresh, share=0.25)
    assert same is fresh and isinstance(fresh, LearnedOptimizer) and seen == [160, 40]


# ---- l2l_adv 4: the training loop ------------------------------------------------------------------------------------

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """36 random images in CIFAR-10's format, and flags that train on 24 of them within a second."""
    write_cifar10(tmp_path / "cifar", n=6)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "cifar"))
    monkeypatch.chdir(tmp_path)
    return ["train", "--dataset", "cifar10", "--model", "small", "--epochs", "2", "--steps", "2", "--batch-size", "8"]


def saved(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_evaluated(tiny, capsys, method):
    assert main([*tiny, "--method", method, "--cell", "rnn", "--out", "runs/one"]) == 0
    rows = [json.loads(line) for line in Path("runs/one/log.jsonl").read_text().splitlines()]
    learned = ["learned-10"] * method.startswith("rnn")
    assert [row["epoch"] for row in rows] == [1, 2] and list(rows[1]["losses"]) == ["natural", "pgd-10", *learned]
    (model, optimizer, settings), x = load_run("runs/one", "last"), torch.rand(1, 3, 32, 32)
    assert not model.training and torch.equal(load_classifier("runs/one/last.pt")(x), model(x))
    assert settings.method == method and (optimizer.cell == "rnn" if learned else optimizer is None)
    capsys.readouterr()
    assert main(["eval", "runs/one", "--limit", "4", "--batch-size", "3"]) == 0
    header, columns, row = capsys.readouterr().out.splitlines()
    assert "eps = 8/255, the first 4 test images, best checkpoint, attack seed 0" in header
    accuracy, loss = (json.loads(Path("runs/one/eval.json").read_text())[key] for key in ("accuracy", "loss"))
    assert list(accuracy) == [*loss, "worst"] == ["natural", "pgd-10", "pgd-100", "cw-100", *learned, "worst"]
    cells = [f"{100 * accuracy[name]:.2f}" if name in accuracy else "-" for name in columns.split()[3:]]
    assert row.split()[3:] == cells
    assert sorted(os.listdir("runs/one")) == ["best.pt", "eval.json", "last.pt", "log.jsonl"]


def test_a_method_plays_for_the_objective_of_its_line(monkeypatch):
    for objective, beta in ((Mart, 1.0), (MoreThanTrades, 2.0)):
        monkeypatch.setitem(METHODS, "mine", (objective, "pgd"))
        objective_made = make_objective(Settings(out="none", method="mine", beta=2.0))
        assert type(objective_made) is objective and objective_made.beta == beta


@pytest.mark.parametrize("method, step, expected", [
    ("rnn-adv", "train_step_learned", {"objective": 1.0}), ("rnn-trades", "train_step_learned", {"objective": 2.0}),
    ("advtrain", "train_step_pgd", {"objective": 1.0, "step_size": 0.0125, "line_search": False, "decay": False}),
    ("advtrain-bls", "train_step_pgd", {"objective": 1.0, "step_size": 0.05, "line_search": True, "decay": False}),
    ("advtrain-decay", "train_step_pgd", {"objective": 1.0, "step_size": 0.05, "line_search": False, "decay": True}),
    ("trades", "train_step_pgd", {"objective": 2.0, "step_size": 0.0125, "line_search": False, "decay": False}),
    ("trades-decay", "train_step_pgd", {"objective": 2.0, "step_size": 0.05, "line_search": False, "decay": True})])
def test_a_method_takes_the_step_of_its_name(monkeypatch, method, step, expected):
    x, y, seen = torch.zeros(10, 1, 4, 4), torch.arange(10), []
    settings = Settings(out="none", method=method, eps=0.1, steps=3, beta=2.0)
    run = Training(settings, data=Dataset(x.byte(), y, None, None))
    monkeypatch.setattr(l2l_adv, step, lambda *args, **settings: seen.append(settings))
    run.step(x, y, 0.5)  # eps has grown to half
    assert [{**seen[0], "objective": seen[0]["objective"].beta}] == [{**expected, "eps": 0.05, "steps": 3}]


def test_pgd_s_step_in_training_is_a_share_of_eps():
    runs = [Settings("none", method, dataset, eps=0.24) for dataset in ("cifar10", "mnist")
            for method in ("advtrain", "trades", "advtrain-bls")]
    assert [run.step_size for run in runs] == pytest.approx([0.06, 0.06, 0.24, 0.08, 0.08, 0.24])


def test_an_epoch_takes_every_image_once_at_the_schedule_s_rate_and_eps(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Training, "step", lambda self, x, y, ramp: torch.tensor(float(seen.append(
        ([opt.param_groups[0]["lr"] for opt in (self.opt_theta, self.opt_phi)], ramp, y.tolist(), self.model.training))
        or 1)))
    data = Dataset(torch.zeros(30, 1, 4, 4).byte(), torch.arange(30), None, None)
    train(Settings(out=tmp_path / "run", epochs=2, batch_size=8, lr=0.3, phi_lr=0.03, eps_warmup=0.5), SmallCNN(1, 30),
          data)
    done = [(2 * k + 1) / 12 for k in range(6)]  # 2 epochs of 3 steps
    rates, ramps, labels, modes = zip(*seen)
    cycle = np.interp(done, [0, 1 / 3, 1], [0, 1, 0])
    assert np.array(rates).T == pytest.approx(np.array([0.3 * cycle, 0.03 * cycle]))
    assert ramps == pytest.approx([1 / 6, 3 / 6, 5 / 6, 1, 1, 1]) and all(modes)
    first, second = sum(labels[:3], []), sum(labels[3:], [])
    assert sorted(first) == sorted(second) == sorted(hold_out(data)[0][1].tolist()) and first != second


@pytest.mark.parametrize("method, score", [("advtrain", "pgd-10"), ("plain", "natural")])
def test_the_best_checkpoint_is_the_best_on_held_out_images(tiny, monkeypatch, method, score):
    scores, seen, augmented = iter([0.2, 0.5, 0.5, 0.1]), [], []
    monkeypatch.setattr(l2l_adv, "augment", lambda x, padding: augmented.extend(x[padding:]) or x)
    monkeypatch.setattr(l2l_adv, "evaluate", lambda model, x, y, attacks, details: seen.append(x) or (
        {"natural": 0.9, "pgd-10": 0.9, score: next(scores)}, {}, None))
    assert main([*tiny, "--method", method, "--epochs", "4", "--out", "run"]) == 0
    assert [len(saved(f"run/{name}.pt")["rows"]) for name in ("best", "last")] == [2, 4]
    assert all(torch.equal(x, to_unit(hold_out(load_dataset("cifar10"))[1][0])) for x in seen)
    assert len(seen) == 4 and len(augmented) == 4 * 24


def test_a_model_and_data_of_the_callers_own(tmp_path):
    model, new = (problem(shape=(1, 8, 8), dtype=torch.float32, seed=seed, batch_norm=True)[0] for seed in (0, 1))
    images, labels, before = torch.randint(0, 256, (50, 1, 8, 8)).byte(), torch.randint(0, 2, (50,)), weights_of(model)
    settings = Settings(out=tmp_path / "run", epochs=1, eps=0.1, steps=2, batch_size=10, lr=0.1)
    assert len(train(settings, model.eval(), Dataset(images, labels, images, labels))) == 1
    loaded, optimizer, again = load_run(tmp_path / "run", model=new)
    assert loaded[1].num_batches_tracked == 4  # it was trained in training mode
    assert again == replace(settings, model="own", dataset="own", precision="fp32")
    assert torch.equal(loaded(to_unit(images)), model.eval()(to_unit(images)))
    assert isinstance(optimizer, LearnedOptimizer) and not torch.equal(weights_of(loaded), before)
    with pytest.raises(InputError, match="give it to load_run"):
        load_run(tmp_path / "run")


WORKER = """
import torch
torch.set_num_threads(1)
from l2l_adv import LearnedOptimizer, Settings, Training, main, share_gradients, train
sizes, step = set(), Training.step
Training.step = lambda self, x, *more: sizes.add(len(x)) or step(self, x, *more)
torch.manual_seed(1)  # no batch norm: it would see half a batch in each process
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 10))
train(Settings(out="two", method="plain", dataset="mnist", epochs=1, batch_size=8), model)
assert sizes == {4}  # half a batch each
rank = torch.distributed.get_rank()
torch.manual_seed(rank)
optimizer = LearnedOptimizer()
share_gradients(optimizer)
optimizer(torch.tensor([1.0 + rank]))[0].sum().backward()
torch.save([optimizer.W.data, optimizer.W.grad], f"phi-{rank}.pt")
assert main("train --method rnn-trades --dataset mnist --epochs 1 --batch-size 8 --steps 2 --out rnn".split()) == 0
"""


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist", n=40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MNIST_DIR", str(tmp_path))
    Path("worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "worker.py"]
    result = subprocess.run(torchrun, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert result.returncode == 0 and result.stdout.count("epoch") == 2, result.stderr  # one process speaks
    model = seeded(1, lambda: nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)))
    before = flat(model.state_dict().values())
    train(Settings(out="one", method="plain", dataset="mnist", epochs=1, batch_size=8), model)
    one, two = (flat(saved(f"{out}/last.pt")["model"].values()) for out in ("one", "two"))
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)
    assert (one - before).norm() > 0.01
    optimizer = seeded(0, LearnedOptimizer)
    grads = [torch.autograd.grad(optimizer(torch.tensor([u]))[0].sum(), optimizer.W)[0] for u in (1.0, 2.0)]
    for W, grad in map(saved, ("phi-0.pt", "phi-1.pt")):
        assert torch.equal(W, optimizer.W) and torch.allclose(grad, sum(grads) / 2, atol=1e-9)
    assert load_run("rnn", "last")[1].W.isfinite().all()


def test_bf16_is_for_training_only(tiny, monkeypatch):
    used, forward = set(), SmallCNN.forward
    monkeypatch.setattr(SmallCNN, "forward", lambda self, x: used.add(
        (self.training, torch.is_autocast_enabled("cpu"))) or forward(self, x))
    assert main([*tiny, "--method", "rnn-adv", "--precision", "bf16", "--out", "run"]) == 0
    assert used == {(True, True), (False, True), (False, False)}  # a step, its attack, evaluation
    model, x = seeded(0, SmallCNN, 3), torch.rand(4, 3, 32, 32, requires_grad=True)
    fp32, bf16 = ([logits, *torch.autograd.grad(logits[:, 0].sum(), [x, model.layers[-1].weight])]
                  for logits in (model(x), InBf16(model)(x)))
    for a, b in zip(fp32, bf16):
        assert a.dtype == b.dtype == torch.float32 and F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98
    assert not torch.equal(fp32[0], bf16[0])


# Interruptions, damaged files

def outcome_of(out):
    """All that a training leaves but the time it took: its files, the log and two checkpoints, as comparable values."""
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items() if key not in ("seconds", "out")}
        value = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
        return [plain(v) for v in value] if isinstance(value, list) else value

    log = [plain(json.loads(line)) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return sorted(os.listdir(out)), log, plain(saved(f"{out}/last.pt")), plain(saved(f"{out}/best.pt"))


STOPS = [("ctrl-c", "rnn-adv"), ("nan", "plain"), ("nan", "trades"), ("nan", "rnn-trades")]


@pytest.mark.parametrize("stop, method", [*STOPS, *zip(range(KILLS), ("rnn-trades", "advtrain", "rnn-adv") * KILLS)])
def test_a_training_that_stopped_goes_on_to_the_same_bits(tiny, monkeypatch, capsys, stop, method):
    def stopping_step(self, *args):
        if self.rows and stop == "nan":
            self.model.layers[0].weight.data.fill_(math.nan)
        elif self.rows:
            raise KeyboardInterrupt
        return step(self, *args)

    flags, step, start = [*tiny, "--method", method, "--resume", "--epochs", "4", "--out"], Training.step, time.time()
    assert main([*flags, "whole"]) == 0
    if stop in ("nan", "ctrl-c"):
        with monkeypatch.context() as patch:
            patch.setattr(Training, "step", stopping_step)
            assert main([*flags, "run"]) == {"nan": 1, "ctrl-c": 130}[stop]
        words = "goes on by --resume" if stop == "ctrl-c" else f"{method}, epoch 2: .*not finite.*is saved, if any"
        assert re.search(f"{words}\n$", capsys.readouterr().err) and len(saved("run/last.pt")["rows"]) == 1
    else:  # kill -9 at any moment
        delay = np.random.default_rng(stop + 1000 * KILLS).uniform(0, time.time() - start)
        process = subprocess.Popen([sys.executable, HERE / "l2l_adv.py", *flags, "run"], stdout=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
        process.stdout.readline()  # it begins
        time.sleep(delay)
        process.kill()
        process.communicate()
        print("killed after", [(path.name, path.stat().st_size) for path in Path("run").glob("*")])
    assert main([*flags, "run"]) == 0 and outcome_of("run") == outcome_of("whole")


@pytest.mark.parametrize("kind", ["bin", "py", "idx", "idx.gz", "last.pt"])
def test_a_damaged_file_is_read_or_refused_but_never_more(tiny, kind):
    if kind == "last.pt":
        assert main([*tiny, "--epochs", "1", "--limit", "8", "--out", "data"]) == 0
    elif "idx" in kind:
        write_mnist(Path("data"), 7, gzip.compress if kind == "idx.gz" else bytes)
    else:
        write_cifar10(Path("data"), 12, pickled(2) if kind == "py" else binary)
    path, = (path for path in Path("data").iterdir() if re.match("last|data_batch_2|train-labels", path.name))
    read = {"la": lambda: load_run("data", "last"), "id": lambda: load_dataset("mnist", "data")}.get(
        kind[:2], lambda: load_dataset("cifar10", "data"))
    raw, rng, refused = path.read_bytes(), np.random.default_rng(FUZZ), 0
    for _ in range(FUZZ):
        damaged = bytearray(raw)
        for _ in range(rng.integers(1, 4)):  # bytes at the head, where the structure is, or anywhere
            damaged[rng.integers(min(len(raw), 300) if rng.random() < 0.5 else len(raw))] = rng.integers(256)
        path.write_bytes(damaged if rng.random() < 0.6 else raw[:rng.integers(len(raw))])
        try:
            read()
        except InputError as error:
            refused += "\n" not in str(error)
    print(f"{path.name}: {refused} of {FUZZ} damaged files refused, the others read")
    assert refused > FUZZ * (0.8 if kind == "last.pt" else 0.25)
    path.write_bytes(raw)
    read()
    if kind == "last.pt":  # a single bit of the weights
        path.write_bytes(raw[:len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1:])
        with pytest.raises(InputError, match="checksum"):
            read()


def test_a_malicious_checkpoint_is_refused_unexecuted(tiny, tmp_path, capsys):
    flags = [*tiny, "--method", "plain", "--epochs", "1", "--resume", "--out", "run"]
    main(flags)
    Bomb.target, checkpoint = tmp_path / "executed", saved("run/last.pt")
    for bad in (Bomb(), checkpoint | {"settings": Bomb()}, checkpoint | {"more": [Bomb()]}):
        for name in ("last.pt", "best.pt"):
            torch.save(bad, f"run/{name}")
        assert main(["eval", "run"]) == 2 and main(flags) == 2
        assert capsys.readouterr().err.count("\n") == 2 and not Bomb.target.exists()


# ---- l2l_adv 5: the command line -------------------------------------------------------------------------------------

def test_eval_runs_the_attacks_it_is_asked_for_and_lends_an_optimizer(tiny, capsys):
    for method in ("rnn-adv", "advtrain", "rnn-trades"):
        main([*tiny, "--method", method, "--out", method])
    checkpoint = saved("rnn-trades/last.pt")
    checkpoint["optimizer"]["W_out"].mul_(100)  # so that its steps are not tiny
    torch.save(checkpoint, "rnn-trades/last.pt")
    results, names = [], ["learned-2", "pgd-3", "sharp-2", "cw-4"]
    for more in ([], ["--lend", "rnn-trades"], ["--lend", "rnn-trades"]):
        flags = ["--limit", "4", "--attacks", ",".join(names), "--checkpoint", "last", "--eps", "0.1", "--seed", "5"]
        capsys.readouterr()
        assert main(["eval", "rnn-adv", "advtrain", *flags, *more]) == 0
        header, columns, _, row = capsys.readouterr().out.splitlines()
        results.append([json.loads(Path(out, "eval.json").read_text()) for out in ("rnn-adv", "advtrain")])
        assert (row.split()[4] == "-") == (row.split()[6] == "-") == (not more)
    assert columns.split()[3:] == ["natural", *names, "worst"] and "eps = 25.5/255" in header
    assert "last checkpoint, attack seed 5" in header and results[1] == results[2]
    data, model, optimizer = load_dataset("cifar10"), load_run("advtrain", "last")[0], load_run("rnn-trades", "last")[1]
    learned, by_hand = dict(eps=0.1, steps=2), dict(eps=0.1, step_size=0.025)
    attacks = dict(zip(names, (lambda m, x, y: learned_attack(m, optimizer, x, y, **learned),
                               lambda m, x, y: pgd(m, x, y, **by_hand, steps=3),
                               lambda m, x, y: learned_attack(m, optimizer, x, y, **learned, gain=10),
                               lambda m, x, y: cw_linf(m, x, y, **by_hand, steps=4))))
    accuracy, loss, _ = seeded(5, evaluate, model, to_unit(data.x_test[:4]), data.y_test[:4], attacks, details=True)
    own, lent = results[2]
    assert lent["accuracy"] == accuracy and lent["loss"] == pytest.approx(loss, rel=1e-5)
    assert (own["lender"], lent["lender"]) == (None, "rnn-trades") and own["loss"] == results[0][0]["loss"]
    assert main(["eval", "advtrain", *flags, *more, "--quick"]) == 0
    assert "after each attack and those before it" in capsys.readouterr().out
    quick = json.loads(Path("advtrain", "eval.json").read_text())
    expected = seeded(5, evaluate, model, to_unit(data.x_test[:4]), data.y_test[:4], attacks, quick=True)
    assert quick["accuracy"] == expected and quick["quick"] and quick["loss"] is None and not lent["quick"]


# Mistakes: one of each kind, one line each, and nothing written

X, Y, NET = torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.long), SmallCNN(3)


@pytest.mark.parametrize("change, words", [
    (dict(eps=0.0), "eps must be above 0"), (dict(eps=1.0), "below 1"), (dict(eps=math.nan), "eps must"),
    (dict(eps="8/255"), "eps must"), (dict(steps=0), "positive whole"), (dict(steps=2.5), "positive whole"),
    (dict(x=X * 255), "divide by 255"), (dict(x=X - 0.5), "must lie in"), (dict(x=X * math.nan), "must lie in"),
    (dict(x=X[0]), "(B, C, H, W)"), (dict(x=(X * 255).byte()), "float"), (dict(x=X[:0], y=Y[:0]), "images"),
    (dict(x=X.numpy()), "torch tensors"), (dict(y=Y[:1]), "one per image"), (dict(y=Y.float()), "int64"),
    (dict(y=Y - 1), "class numbers")])
def test_attacks_and_training_steps_refuse_bad_input(change, words):
    call, optimizer = dict(x=X, y=Y, eps=0.1, steps=1) | change, LearnedOptimizer()
    opts = [torch.optim.SGD(player.parameters(), 0.1) for player in (NET, optimizer)]
    x, y = call.pop("x"), call.pop("y")
    for attack in (lambda: pgd(NET, x, y, **call, step_size=0.1), lambda: cw_linf(NET, x, y, **call, step_size=0.1),
                   lambda: learned_attack(NET, optimizer, x, y, **call), lambda: train_optimizer(NET, [(x, y)], **call),
                   lambda: train_step_pgd(NET, opts[0], x, y, **call, step_size=0.1),
                   lambda: train_step_learned(NET, optimizer, *opts, x, y, **call)):
        with pytest.raises(InputError, match=re.escape(words)):
            attack()


@pytest.mark.parametrize("wrong, words", [
    (lambda: pgd(NET, X, Y, eps=0.1, step_size=0.0, steps=1), "step_size must"),
    (lambda: pgd(NET, X, Y, eps=0.1, step_size=2, steps=1), "step_size must"),
    (lambda: pgd(NET, X, Y, eps=0.1, step_size=0.1, steps=1, start="zero"), "start must"),
    (lambda: pgd(NET, X, Y, eps=0.1, step_size=0.1, steps=1, line_search=True, momentum=True), "not both"),
    (lambda: learned_attack(NET, None, X, Y, eps=0.1, steps=1), "needs a LearnedOptimizer"),
    (lambda: train_optimizer(NET, [], eps=0.1), "no batch"), (lambda: evaluate(NET, X * 2, Y, {}), "divide by 255"),
    (lambda: evaluate(NET, X, Y, {}, batch_size=0), "batch_size"), (lambda: NET(X[:, :1]), "takes images"),
    (lambda: Trades(beta=0), "beta must"), (lambda: LearnedOptimizer(cell="gru"), "unknown cell"),
    (lambda: LearnedOptimizer(hidden_size=0), "hidden size"),
    (lambda: load_dataset("cifar100"), "unknown data set"), (lambda: Settings(out=""), "--out"),
    (lambda: Settings(out="none", method="fgsm"), "unknown method"), (lambda: hold_out(Dataset(X, Y, X, Y)), "uint8"),
    (lambda: load_classifier("nowhere.pt"), "missing, damaged or")])
def test_python_calls_refuse_bad_input(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()


def is_refused(argv, words, capsys):
    """It ends with status 2 and one line on stderr, which has these words, and writes nothing."""
    files = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as exit:  # argparse's
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.count("\n") == 1
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == files


@pytest.mark.parametrize("flags", """
    --method fgsm; --model alexnet; --dataset svhn; --cell gru; --precision fp8; --compile maybe; --eps 0; --eps 8;
    --eps 8/0; --eps nan; --eps=-8/255; --eps-warmup 1.1; --steps 1.5; --epochs two; --bogus; --step-size 2; --beta 0;
    --phi-lr -1; --lr inf; --lr 1e999999999; --batch-size 9999999999; --limit 0; --seed -1; --out=;
    --batch-size 1 = two or more; --limit 1 = two or more; --device tpu9 = no device; --device meta = no device;
    --data-dir nowhere = no cifar10 in nowhere; --dataset mnist --data-dir . = no mnist""".split(";"))
def test_train_refuses_bad_input(tiny, capsys, flags):
    flags, _, words = flags.strip().partition(" = ")  # the line names the flag, or says this
    assert is_refused([*tiny, "--out", "run", *flags.split()], words or re.match("--[a-z-]+", flags)[0], capsys)


def test_numbers_on_the_command_line_may_be_fractions():
    assert [l2l_adv.PIXELS("8/255"), l2l_adv.PIXELS("0.031"), l2l_adv.COUNT("3")] == [8 / 255, 0.031, 3]


def test_a_folder_with_a_run_is_not_overwritten_nor_resumed_with_other_settings(tiny, capsys):
    flags = [*tiny, "--method", "plain", "--out", "run"]
    assert main(flags) == 0 and is_refused(flags, "holds a run already", capsys)
    words, before = "epochs was 2 and is 5; seed was 0 and is 1\n", outcome_of("run")
    assert is_refused([*flags, "--resume", "--epochs", "5", "--seed", "1"], words, capsys)
    assert main([*flags, "--resume"]) == 0 and outcome_of("run") == before  # it is finished
    assert main([*flags[:-1], "other", "--seed", "1"]) == 0 and outcome_of("other")[2]["model"] != before[2]["model"]


IDX = "t10k-images-idx3-ubyte"


@pytest.mark.parametrize("name, damage", [
    ("data_batch_2.bin", lambda raw: raw[:-9]), ("data_batch_2.bin", lambda raw: raw[:-3073]), ("data_batch_4.bin", 0),
    ("test_batch.bin", lambda raw: b""), ("test_batch.bin", lambda raw: b"\x0a" + raw[1:]), (IDX, lambda raw: raw[:-1]),
    (IDX, lambda raw: b"\0\0\x09" + raw[3:]), (IDX, lambda raw: raw[:9]), (IDX, lambda raw: raw + b"x"),
    ("t10k-labels-idx1-ubyte", 0), (IDX, lambda raw: raw[:7] + b"\x06" + raw[8:-28 * 28])])  # the last: six images
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
    train(Settings(folder / "run", "plain", "cifar10", model="small", data_dir=folder / "cifar", epochs=1))
    right = saved(folder / "run/best.pt")
    wrong = {"vgg": right | {"model": MODELS["vgg16"](3).state_dict()}, "tensor": torch.zeros(3), "keys": {"model": {}},
             "other-eps": right | {"settings": right["settings"] | {"eps": 4 / 255}},
             "settings": right | {"settings": right["settings"] | {"colour": "red"}}, "text": 0}
    for name, content in wrong.items():
        (folder / name).mkdir()
        torch.save(content, folder / name / "best.pt")
    (folder / "text/best.pt").write_text("not a checkpoint")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize("flags", """
    vgg; tensor; keys; settings; text; empty; nothing; run/best.pt; other-eps = differ in data set or eps; --seed x;
    --lend text = text; --attacks fgsm = unknown attack 'fgsm'; --attacks pgd-0 = unknown attack 'pgd-0'; --limit many;
    --attacks pgd-10, = unknown attack ''; --attacks pgd-9999999 = unknown attack; --batch-size 0; --eps 8;
    --checkpoint first; --data-dir nowhere = no cifar10 in nowhere; --lend run = no learned optimizer""".split(";"))
def test_eval_refuses_bad_input_and_what_is_not_a_run(folders, monkeypatch, capsys, flags):
    monkeypatch.chdir(folders)
    flags, _, words = flags.strip().partition(" = ")
    assert is_refused(["eval", "run", *flags.split()], words or flags.split()[0], capsys)


# ---- run_cifar.sh ----------------------------------------------------------------------------------------------------

STAND_IN = """#!/bin/sh
# python3 for run_cifar.sh: has torch unless NO_TORCH is set, has no CUDA, and plays bench, train and eval.
case "$*" in
    *"import numpy, torch"*) [ -z "$NO_TORCH" ] && echo 0; exit ;;
    "-m venv"*) exit 1 ;;
    -c*) shift; exec @PYTHON@ -c "$@" ;;
esac
echo "$*" >>calls
[ -n "$MISTAKE" ] && exit 2
case "$1" in
    *bench.py) echo '{"methods": {"a": {"ms_per_image": 7.4}, "b": {"ms_per_image": 4.1}}}'; exit ;;
esac
[ "$2" = train ] || { echo "the table"; exit; }
echo "a row"
case "$4" in $FAILS) exit 1 ;; esac
""".replace("@PYTHON@", sys.executable)


@pytest.fixture
def run_cifar(tmp_path, monkeypatch):
    """Runs a copy of run_cifar.sh with a stand-in for Python → (status, stdout, stderr, what it asked for)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(STAND_IN)
    (tmp_path / "bin" / "python3").chmod(0o755)
    (tmp_path / "a copy").mkdir()
    shutil.copy(HERE / "run_cifar.sh", tmp_path / "a copy")
    monkeypatch.chdir(tmp_path / "a copy")

    def run(*flags, **settings):
        Path("calls").write_text("")
        result = subprocess.run(["bash", "run_cifar.sh", *flags], capture_output=True, text=True, timeout=30,
                                env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **settings})
        asked = Path("calls").read_text().replace(f"{tmp_path}/a copy/", "").splitlines()
        return result.returncode, result.stdout, result.stderr, asked
    return run


def test_run_cifar_goes_on_when_a_method_fails_and_says_so(run_cifar):
    settings = {"METHODS": "plain trades rnn-adv", "SEED": "3", "FAILS": "trades", "OUT": "two words"}
    status, out, _, asked = run_cifar(JOBS="1", **settings)
    methods = "rnn-adv", "trades", "plain"  # the longest first
    assert status == 1 and out.splitlines() == [  # 11.5 ms, 38,000 images, 3 epochs, and a tenth
        "Training takes about 24 min from the start; then come the attacks.", *(f"{m:12}a row" for m in methods),
        "the table", "trades failed: see above"]
    common = "--dataset cifar10 --model small --steps 5 --epochs 3 --limit 38000 --seed 3 --resume"
    assert asked == ["results/bench.py --dataset cifar10 --model small --steps 5 --methods plain,trades,rnn-adv "
                     "--batch-size 64 --rounds 2 --json",
                     *(f"l2l_adv.py train --method {m} --out two words/{m} {common}" for m in methods),
                     "l2l_adv.py eval two words/plain two words/rnn-adv --limit 500 --quick"]
    status, two_at_once, _, asked = run_cifar(**settings)
    assert status == 1 and "about 12 min" in two_at_once and len(asked) == 5
    status, out, _, asked = run_cifar(METHODS="plain", FAILS="plain")  # one at a time, and nothing to evaluate
    assert status == 1 and "about 24 min" in out and len(asked) == 2
    status, out, err, asked = run_cifar("--synthetic", EPOCHS="2", LIMIT="9")
    assert status == 0 and "failed" not in out and err == "" and len(asked) == 7
    assert asked[-1].startswith("l2l_adv.py eval runs/synthetic-small-t5-n9-e2-s0/plain runs/")


def test_run_cifar_stops_at_a_mistake_in_the_settings(run_cifar):
    status, _, _, asked = run_cifar(MISTAKE="of which bench.py speaks")
    assert status == 2 and len(asked) == 1
    for flags, settings, words in (([], {"EPOCHS": "two"}, "whole numbers"), ([], {"TEST_LIMIT": "0"}, "whole numbers"),
                                   ([], {"NO_TORCH": "1"}, "install python3-venv"),
                                   (["--epochs", "3"], {}, "environment variables")):
        status, _, err, asked = run_cifar(*flags, **settings)
        assert status == 2 and words in err and err.count("\n") == 1 and asked == []
    status, out, _, asked = run_cifar("--help")
    assert status == 0 and "TEST_LIMIT" in out and "set -" not in out and asked == []


# ---- What the README shows, and results/ -----------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def test_the_examples_of_the_readme_run_in_their_order(tiny):
    main([*tiny, "--method", "rnn-adv", "--epochs", "1", "--limit", "8", "--out", "runs/rnn-adv"])
    for example in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(example, {})


def test_every_flag_in_the_readme_exists(capsys):
    known = "--nproc-per-node" + "".join(p.read_text() for p in [HERE / "run_cifar.sh", *HERE.glob("results/*.py")])
    for command in ("train", "eval"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known += capsys.readouterr().out
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", known)] == []


def test_bench_compares_every_method_with_advtrain(capsys, monkeypatch):
    from results import bench
    flags = ["--model", "small", "--batch-size", "4", "--rounds", "1", "--json"]
    assert bench.main(flags) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert list(methods) == list(METHODS)
    for cost in methods.values():
        assert cost["ratio"] == pytest.approx(cost["ms_per_image"] / methods["advtrain"]["ms_per_image"])
    seen, step = set(), Training.step
    monkeypatch.setattr(Training, "step", lambda run, x, y: seen.add((x.shape, run.settings.steps)) or step(run, x, y))
    assert bench.main([*flags, "--dataset", "synthetic", "--methods", "plain", "--steps", "3"]) == 0
    assert [*json.loads(capsys.readouterr().out)["methods"]] == ["plain"] and seen == {((4, 3, 16, 16), 3)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_analysis_climbs_where_the_attack_of_so_many_steps_does(objective):
    from results.analyse import climb, maximisers
    from results.runs import Run
    model, x, y = problem()
    run = Run("", model, LearnedOptimizer().double(), Settings("out", eps=0.1), objective, x, y, seed=3, batch_size=5)
    for name, attack in maximisers(run).items():
        losses, right = climb(run, attack, steps=3)
        x_0 = seeded(3, baselines.start_point, x, 0.1)
        x_3 = seeded(3, attack, x, y, steps=3, objective=objective)
        for t, x_adv in (0, x_0), (3, x_3):
            logits = model(x_adv)
            torch.testing.assert_close(losses[t], objective.inner_loss(logits, objective.target(model, x, y)), msg=name)
            assert right[t].tolist() == (logits.argmax(1) == y).tolist()
        assert len(losses) == len(right) == 4


def test_the_referee_s_square_meets_the_eighth_of_the_images_that_is_least_sure():
    from results.sanity import least_sure
    model, x, y = problem(batch=20)
    attacked = seeded(3, pgd, model, x, y, eps=0.1, step_size=0.1, steps=20, decay=True)
    margins, expected = Margin().inner_loss(model(attacked), y).tolist(), x.clone()
    for i in sorted(range(20), key=margins.__getitem__)[-3:]:
        expected[i] = 1 - x[i]
    assert torch.equal(least_sure(lambda model, x, y: 1 - x, eps=0.1, seed=3)(model, x, y), expected)
