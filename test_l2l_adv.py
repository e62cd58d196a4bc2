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
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baselines
import l2l_adv
from baselines import (MODELS, AdvTrain, Dataset, InputError, Margin, SmallCNN, Trades, augment,
                       eval_mode, evaluate, hold_out, input_gradient, load_dataset, pgd, progress,
                       project)
from l2l_adv import (METHODS, LearnedOptimizer, get_args, learned_attack, load_run, main,
                     normalize_gradient, phi_gradient, train, train_optimizer, train_step_learned,
                     train_step_pgd)

torch.set_num_threads(1)  # the problems are so small that threads would only wait for each other
HERE = Path(__file__).parent
OBJECTIVES = [AdvTrain(), Trades(beta=3.0)]


def problem(batch=5, shape=(2, 4, 4), dtype=torch.float64, batch_norm=False, dropout=0.0, seed=0):
    """A small smooth classifier of three classes, images and labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, padding=1), nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        nn.Tanh(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(6 * shape[1] * shape[2], 3))
    x = torch.rand(batch, *shape, dtype=dtype)
    return model.to(dtype), x, torch.randint(0, 3, (batch,))


def returning(function):
    model = nn.Module()
    model.forward = function
    return model


def Hill(height):
    """Two classes, logits (0, height(x)): for label 0 the attack climbs."""
    return returning(lambda x: F.pad(height(x).sum((1, 2, 3))[:, None], (1, 0)))


def seeded(seed, function, *args, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


def flat(tensors):
    return torch.cat([each.detach().flatten() for each in tensors])


def weights_of(*modules):
    return flat(weight for module in modules for weight in module.parameters())


def close(a, b, tolerance=1e-12):
    return (a - b).norm() <= tolerance * b.norm()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=1.0)


def big_steps(cell="lstm", dtype=torch.float64):
    """A learned optimizer whose steps reach the surface of the ball within a few steps."""
    with torch.random.fork_rng(), torch.no_grad():
        optimizer = seeded(1, LearnedOptimizer, hidden_size=4, cell=cell).to(dtype)
        for weight in optimizer.parameters():
            weight.mul_(3)
    return optimizer


def attacks(eps):
    """Attacks of both modules, by name."""
    def learned(m, x, y, objective=AdvTrain()):
        return learned_attack(m, big_steps(dtype=x.dtype), x, y, eps=eps, objective=objective)

    by_hand = partial(pgd, eps=eps, step_size=eps / 2, steps=5)
    return {"pgd": by_hand, "uniform": partial(by_hand, start="uniform"),
            "line search": partial(by_hand, line_search=True),
            "margin": partial(by_hand, objective=Margin()), "learned": learned,
            "trades": partial(by_hand, objective=Trades(), decay=True),
            "learned trades": partial(learned, objective=Trades())}


# ---- baselines 1 and 2: threat model, objectives -------------------------------------------------

def test_project_finds_the_nearest_point_of_ball_and_box():
    rng = np.random.default_rng(0)
    x, x_adv = rng.random((3, 2, 4, 4)), rng.normal(0.5, 0.5, (3, 2, 4, 4))
    expected = np.clip(np.clip(x_adv, x - 0.1, x + 0.1), 0, 1)
    assert np.array_equal(project(torch.tensor(x_adv), torch.tensor(x), 0.1).numpy(), expected)


@pytest.mark.parametrize("objective", [*OBJECTIVES, Margin()])
def test_losses_equal_numpy_and_their_gradients_finite_differences(objective):
    model, x, y = problem()
    weight, h = model[0].weight, 1e-6
    x_adv = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)

    @torch.no_grad()
    def reference():
        z, z_adv = model(x).numpy(), model(x_adv).numpy()
        p, q = (np.exp(each) / np.exp(each).sum(1, keepdims=True) for each in (z, z_adv))
        if type(objective) is Trades:
            kl = (p * (np.log(p) - np.log(q))).sum(1)
            return kl, -np.log(p[range(5), y]).mean() + 3.0 * kl.mean()
        ce = -np.log(q[range(5), y])
        margin = [max(np.delete(row, true)) - row[true] for row, true in zip(z_adv, y)]
        return ce if type(objective) is AdvTrain else margin, ce.mean()

    inner, outer = reference()
    target = objective.target(model, x, y)
    assert np.allclose(objective.inner_loss(model(x_adv), target).detach(), inner, rtol=1e-10)
    loss = objective.outer_loss(model, x, x_adv, y)
    assert loss.item() == pytest.approx(outer, rel=1e-12)
    grad, = torch.autograd.grad(loss, weight)
    weight.data[3, 1, 2, 1] += h
    assert grad[3, 1, 2, 1].item() == pytest.approx((reference()[1] - outer) / h, rel=1e-4)


def test_trades_has_beta_6_and_passes_x_and_x_adv_through_batch_norm_together():
    model, x, y = problem(batch_norm=True)
    features = model[0](torch.cat([x, 1 - x])).detach()
    Trades().outer_loss(model, x, 1 - x, y)
    assert torch.allclose(model[1].running_mean, 0.1 * features.mean((0, 2, 3)))
    assert Trades().beta == 6 and Trades(beta=0.5).beta == 0.5 and AdvTrain().beta == 1


# ---- baselines 3 and 4: attacks, evaluation ------------------------------------------------------

@pytest.mark.parametrize("name", attacks(0.1))
@pytest.mark.parametrize("eps", [0.01, 0.1, 0.9])
def test_an_attack_stays_in_ball_and_box_and_leaves_no_trace(name, eps):
    model, x, y = problem(3, (2, 4, 5), torch.float32, batch_norm=True, dropout=0.5)
    x, attack = (3 * x - 1).clamp(0, 1), attacks(eps)[name]  # many pixels on the faces of the box
    model.train()(x).sum().backward()
    model[1].eval()  # a frozen batch norm within a training model must stay so
    model[0].bias.grad = None

    def trace():
        return ([module.training for module in model.modules()], x.tolist(),
                [(weight.requires_grad, weight.grad is None or weight.grad.tolist())
                 for weight in model.parameters()],
                [value.tolist() for value in model.state_dict().values()])

    before = trace()
    x_adv = seeded(1, attack, model, x, y)
    assert x_adv.shape == x.shape and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and (x_adv - x).abs().max() <= eps + 1e-6
    with pytest.raises(RuntimeError):
        attack(model, torch.rand(3, 9, 9, 9), y)
    assert trace() == before  # also after an error
    with torch.inference_mode():
        assert torch.equal(seeded(1, attack, model.eval(), x.clone(), y.clone()), x_adv)


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
        if type(objective) is Trades:
            loss = (p * (p.log() - model(z).log_softmax(1))).sum()
        g, = torch.autograd.grad(loss, z)
        size = 0.06 * (4 - t) / 4 if decay else 0.06
        x_adv = torch.min(torch.max(z.detach() + size * g.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    kind = {"decay": True} if decay else {}  # the default is a fixed step size
    ours = seeded(1, pgd, model, x, y, eps=0.1, step_size=0.06, steps=4, objective=objective,
                  start=start, **kind)
    assert torch.allclose(ours, x_adv, atol=1e-14)


def test_line_search_halves_the_step_of_each_image_until_armijos_condition_holds():
    x = torch.tensor([0.2, 0.395, 0.47, 0.499]).double().view(4, 1, 1, 1)  # ever nearer to the top
    x_adv = seeded(1, pgd, Hill(lambda x: -10 * (x - 0.5) ** 2), x, torch.zeros(4).long(), eps=0.2,
                   step_size=0.2, steps=1, line_search=True)
    x_0 = x + 0.001 * seeded(1, torch.randn_like, x)
    for ours, z, x_i in zip(*(each.flatten().tolist() for each in (x_adv, x_0, x))):
        def loss(z):
            return math.log1p(math.exp(-10 * (z - 0.5) ** 2))
        slope = -20 * (z - 0.5) / (1 + math.exp(10 * (z - 0.5) ** 2))
        ends = [z + math.copysign(0.2 / 2 ** k, slope) for k in range(4)]
        ends = [min(max(end, x_i - 0.2), x_i + 0.2) for end in ends]
        good = [end for end in ends[:3] if loss(end) >= loss(z) + 0.1 * slope * (end - z)]
        assert ours == pytest.approx([*good, ends[3]][0], rel=1e-12)
    assert (x_adv - x).abs().flatten().tolist() == pytest.approx([0.2, 0.1, 0.05, 0.025], abs=3e-3)


def fgsm(model, x, y):
    """An attack of another library, which uses autograd as it likes."""
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), y).backward()
    return (x + 0.02 * x.grad.sign()).clamp(0, 1).detach()


def test_evaluate_counts_as_by_hand():
    model, x, y = problem(batch=40, dtype=torch.float32)
    by = {"invert": lambda m, x, y: torch.where(x[:, :1, :1, :1] > 0.5, 1 - x, x), "fgsm": fgsm}
    correct, loss = evaluate(model, x, y, by, batch_size=7)
    assert list(correct) == ["natural", "invert", "fgsm", "worst"]
    worst = torch.ones(40).bool()
    for name in loss:
        x_adv = by[name](model, x, y) if name in by else x
        right = model(x_adv).argmax(1) == y
        assert 0 < right.sum() < 40 and torch.equal(correct[name], right)
        assert torch.allclose(loss[name], -model(x_adv).log_softmax(1)[range(40), y])
        assert not torch.equal(worst & right, worst)  # each breaks some that are not broken yet
        worst &= right
    assert list(loss) == ["natural", "invert", "fgsm"] and torch.equal(correct["worst"], worst)


def test_an_attack_that_changes_its_images_or_the_mode_changes_no_result():
    model, x, y = problem(dtype=torch.float32, dropout=0.5)
    spoil = {"spoil": lambda m, x, y: x.fill_(0), "mode": lambda m, x, y: m.train() and x}
    with pytest.raises(InputError, match="'spoil' left"):
        evaluate(model, x, y, spoil, eps=0.1)
    correct, loss = evaluate(model, x, y, spoil)
    assert torch.equal(loss["mode"], loss["natural"]) and x.any()


def test_an_attack_meets_the_same_randomness_whatever_else_is_listed():
    model, x, y = problem(dtype=torch.float32)
    model.register_forward_hook(lambda _, x, logits: logits + 0 * torch.rand(1))  # random, too
    seen = []
    noisy = {name: lambda m, x, y: seen.append(torch.rand(1).item()) or x for name in "ab"}
    state = seeded(3, torch.get_rng_state)
    evaluate(model, x, y, noisy)
    evaluate(model, x[:1], y[:1], {"b": noisy["b"]}, seed=1, batch_size=1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own is not touched
    assert seen == [seeded(seed, torch.rand, 1).item() for seed in (0, 0, 1)]


@pytest.mark.parametrize("attack, words", [
    (lambda m, x, y: x[:, :1], r"not torch.Size\(\[5, 1, 4, 4\]\)"),
    (lambda m, x, y: (x, y), r"must return images \(5, 2, 4, 4\), not <class 'tuple'>"),
    (lambda m, x, y: x + 2e-6, "left"), (lambda m, x, y: x - 2e-6, "left"),
    (lambda m, x, y: (x - 0.101).abs(), "left"), (lambda m, x, y: x * math.nan, "NaN"),
    (attacks(0.1)["pgd"], "NaN"), (attacks(0.1)["learned"], "NaN")])
def test_evaluate_refuses_an_attack_that_returns_something_else(attack, words):
    x = torch.cat([torch.zeros(5, 1, 4, 4), torch.ones(5, 1, 4, 4)], 1)
    no_gradient = Hill(lambda x: torch.sqrt(0 * x.nan_to_num()))  # NaN: PGD must not stand still
    with pytest.raises(FloatingPointError if words == "NaN" else InputError, match=f"bad.*{words}"):
        evaluate(no_gradient, x, torch.zeros(5).long(), {"bad": attack}, eps=0.1)


@pytest.mark.parametrize("rounded, cut, words", [
    (1, None, None), (2, None, "2 of 10 images have a zero"), (0, "input", "10 of 10 images"),
    (0, "output", "10 of 10 images")])
def test_evaluate_warns_if_over_a_tenth_of_the_gradients_are_zero(rounded, cut, words):
    smooth, x, y = problem(batch=10, dtype=torch.float32)
    x[:rounded] = 0.7  # the first ones
    model = returning({
        None: lambda x: smooth(torch.where((x == 0.7).all(3, True), x.round(), x)),
        "input": lambda x: smooth(x.detach()), "output": lambda x: smooth(x).detach()}[cut])
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(model, x, y, {})
        assert caught == [] and sum(seen) == 12  # two to try the model
        with torch.inference_mode():
            evaluate(model, x, y, {"none": lambda m, x, y: x}, batch_size=4)
    assert [words in str(each.message) for each in caught] == ([True] if words else [])
    assert sum(seen) == 12 + 32  # two to try the model, natural, the gradient, and the attack


class NoFloat64(torch.overrides.TorchFunctionMode):
    """Stands for a device without float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert getattr(result, "dtype", None) != torch.float64, function
        return result


def test_no_function_of_baselines_needs_float64():
    data = load_dataset("synthetic")
    with NoFloat64():
        x, y, _, _ = hold_out(data, 4)
        model = SmallCNN(3)
        model.normalize_like(x)
        evaluate(model, augment(x, 2) / 255, y, attacks(0.1))


def test_rounding_at_the_edges_is_forgiven_and_clipped():
    model, _, y = problem(dtype=torch.float32)
    x, seen = torch.ones(5, 2, 4, 4), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].max().item()))
    evaluate(model, x + 1e-6, y, {"edge": lambda m, x, y: x + 5e-7}, eps=1e-6)
    pgd(model, x + 1e-6, y, eps=0.1, step_size=0.1, steps=1, objective=Trades())
    assert max(seen) == 1
    for outside in (x + 2e-6, x - 1 - 2e-6):
        with pytest.raises(InputError, match="must lie in"):
            evaluate(model, outside, y, {})


@pytest.mark.parametrize("stderr, terminal", [(None, 0), (io.StringIO(), 0), (io.StringIO(), 1)])
def test_progress_shows_a_bar_on_a_terminal_only(monkeypatch, stderr, terminal):
    if terminal:
        stderr.isatty = lambda: True
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        assert list(progress("abcd", "epoch 1")) == list("abcd")
    bars = ["", "#####", "##########", "###############"]
    lines = [f"\repoch 1 [{bar:20}] {k}/4\033[K" for k, bar in enumerate(bars)]
    assert stderr is None or stderr.getvalue() == "".join([*lines, "\r\033[K"] * terminal)


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


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def binary(x, y):
    return np.concatenate([y[:, None], x], 1).tobytes()


def pickled(protocol, order="C"):
    labels, data = ("labels", "data") if protocol == 4 else (b"labels", b"data")
    return lambda x, y: pickle.dumps({labels: y.tolist(), data: np.array(x, order=order)}, protocol)


def python_2(x, y):
    """What Python 2 made of a batch: keys are U (SHORT_BINSTRING), the pixels T (BINSTRING)."""
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\x01btR(K\x01K%cM\0"
             b"\x0c\x86cnumpy\ndtype\n(U\x02u1K\0K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
             b"\xff\xffK\0tb\x89T%b%btb")
    array = array % (len(x), x.nbytes.to_bytes(4, "little"), x.tobytes())
    labels = b"".join(b"K%c" % label for label in y)
    return b"\x80\x02}q\x01(U\x06labelsq\x02](" + labels + b"eU\x04data" + array + b"u."


def write_cifar10(folder, n=12, pack=binary):
    """All six files, n random images each. Returns all pixels, (6n, 3072), and labels."""
    folder.mkdir(parents=True)
    rng, x, y = np.random.default_rng(0), [], []
    for name in NAMES:
        x.append(rng.integers(0, 256, (n, 3072), np.uint8))
        y.append(rng.integers(0, 10, n, np.uint8))
        (folder / (f"{name}.bin" if pack == binary else name)).write_bytes(pack(x[-1], y[-1]))
    return np.concatenate(x), np.concatenate(y)


def is_cifar10(data, parts):
    images, labels = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    assert len(data.x_test) * 6 == len(images) and images.shape[1:] == (3, 32, 32)
    return np.array_equal(images.flatten(1), parts[0]) and np.array_equal(labels, parts[1])


@pytest.mark.parametrize("pack", [binary, pickled(1), pickled(2), pickled(3, "F"), pickled(4),
                                  pickled(5), pickled(5, "F"), python_2])
def test_cifar10_of_every_age_is_found_and_read(tmp_path, monkeypatch, pack):
    folder = f"data/cifar-10-batches-{'bin' if pack == binary else 'py'}"
    parts = write_cifar10(tmp_path / folder, pack=pack)
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert all(is_cifar10(load_dataset("cifar10", named), parts) for named in (None, folder))
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
    bad = Bomb() if place == "whole" else {**batch, place: [batch[place], Bomb()]}
    path.write_bytes(pickle.dumps(bad))
    with pytest.raises(InputError, match="mkdir has no place in a data set"):
        load_dataset("cifar10", tmp_path / "py")
    assert not Bomb.target.exists()
    pickle.loads(path.read_bytes())  # a reader that unpickles would have executed it
    assert Bomb.target.exists()


def write_mnist(folder, n=7, pack=gzip.compress):
    folder.mkdir(parents=True)
    rng, parts = np.random.default_rng(0), []
    for name, shape in (("train-images-idx3", (n, 1, 28, 28)), ("train-labels-idx1", (n,)),
                        ("t10k-images-idx3", (n, 1, 28, 28)), ("t10k-labels-idx1", (n,))):
        parts.append(rng.integers(0, 10, shape, np.uint8))
        sizes = np.array(parts[-1].squeeze().shape, ">i4")
        raw = bytes([0, 0, 8, len(sizes)]) + sizes.tobytes() + parts[-1].tobytes()
        (folder / f"{name}-ubyte{'' if pack == bytes else '.gz'}").write_bytes(pack(raw))
    return parts


@pytest.mark.parametrize("folder, pack", [("mnist", gzip.compress), ("MNIST/raw", bytes)])
def test_mnist_is_read(tmp_path, monkeypatch, folder, pack):
    parts = write_mnist(tmp_path / folder, 7, pack)
    monkeypatch.setenv("MNIST_DIR", str(tmp_path))
    assert all(np.array_equal(*pair) for pair in zip(load_dataset("mnist"), parts))


@pytest.mark.parametrize("error", [MemoryError, torch.cuda.OutOfMemoryError])
def test_running_out_of_memory_is_not_blamed_on_the_file(error):
    with pytest.raises(error), baselines.reading("a file"):
        raise error


@pytest.mark.parametrize("failure", [None, "no such file", "wrong SHA-256", "a folder was named"])
def test_cifar10_is_downloaded_whole_or_not_at_all(tmp_path, monkeypatch, failure):
    parts, archive = write_cifar10(tmp_path / "cifar-10-batches-bin"), tmp_path / "c.tar.gz"
    shutil.make_archive(str(tmp_path / "c"), "gztar", tmp_path, "cifar-10-batches-bin")
    sha256 = hashlib.sha256(archive.read_bytes() if failure != "wrong SHA-256" else b"").hexdigest()
    url = archive.as_uri() + "x" * (failure == "no such file")
    monkeypatch.setattr(baselines, "CIFAR10_SHA256", sha256)
    monkeypatch.setattr(baselines, "CIFAR10_URL", url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    if failure is None:
        assert is_cifar10(load_dataset("cifar10"), parts)
        assert os.listdir("data") == ["cifar-10-batches-bin"]
    else:
        with pytest.raises(InputError, match="could not be downloaded|no cifar10 in elsewhere"):
            load_dataset("cifar10", "elsewhere" if failure == "a folder was named" else None)
        assert not Path("elsewhere").exists() and list(Path("data").rglob("*")) == []


def test_a_download_that_loses_the_race_takes_the_winners_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-bin"
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: None)
    monkeypatch.setattr(shutil, "unpack_archive", lambda _, part: (
        write_cifar10(Path(part, folder.name)), write_cifar10(folder)))  # another one was faster
    assert baselines.download_cifar10(folder) == folder and len(os.listdir(folder)) == 6


@pytest.mark.parametrize("count, limit, trained, held_out", [
    (200, None, 160, 40), (200, 10, 10, 2), (200, 1, 1, 1), (8000, None, 7000, 1000),
    (8000, 6000, 6000, 1000)])
def test_held_out_images_are_fixed_and_not_trained_on(count, limit, trained, held_out):
    y = torch.arange(count)
    data = Dataset((y % 256).byte().view(count, 1, 1, 1), y, None, None)
    x_train, y_train, x_held, y_held = seeded(5, hold_out, data, limit)
    assert (len(y_train), len(y_held)) == (trained, held_out)
    assert torch.equal(torch.cat([x_train, x_held]).flatten(), torch.cat([y_train, y_held]) % 256)
    assert not set(y_train.tolist()) & set(y_held.tolist())
    _, all_train, _, all_held = hold_out(data)
    assert torch.equal(y_train, all_train[:trained]) and torch.equal(y_held, all_held[:held_out])


def test_synthetic_data_has_a_fine_pattern_always_right_and_a_coarse_one_nine_times_in_ten():
    data = load_dataset("synthetic")
    x = data.x_train / 255 - 0.5
    tile = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((2, 3))  # (N, 3, 4, 4), the mean over blocks
    fine = tile - tile.mean((2, 3), keepdim=True)
    for features, right in ((fine, 0.99), (F.avg_pool2d(x, 4), 0.8)):
        mean = torch.stack([features[data.y_train == k].mean(0) for k in range(10)])
        match = torch.einsum("nchw,kchw->nk", features, F.normalize(mean, dim=(1, 2, 3)))
        accuracy = (match.argmax(1) == data.y_train).float().mean()
        assert right < accuracy < right + 0.15
    assert x.shape == (4000, 3, 16, 16) and data.x_test.shape == (1000, 3, 16, 16)


@pytest.mark.parametrize("padding, crops_seen", [(2, 25), (0, 1)])
def test_augment_crops_and_flips_each_image_on_its_own(padding, crops_seen):
    x, seen = seeded(0, torch.randint, 0, 256, (300, 3, 6, 6), dtype=torch.uint8), set()
    for image, out in zip(F.pad(x, [padding] * 4), augment(x, padding)):
        seen |= {(i, j, flip) for i in range(2 * padding + 1) for j in range(2 * padding + 1)
                 for flip in (0, 1)
                 if torch.equal(image[:, i:i + 6, j:j + 6].flip([2] * flip), out)}
    assert len(seen) == 2 * crops_seen


# ---- l2l_adv 1: the learned optimizer ------------------------------------------------------------

@pytest.mark.parametrize("cell, weights", [("lstm", 450), ("rnn", 120)])
def test_the_cell_equals_torchs_forward_and_gradient(cell, weights):
    ours = seeded(0, LearnedOptimizer, cell=cell).double()
    theirs = (nn.LSTMCell if cell == "lstm" else nn.RNNCell)(1, 10, bias=False).double()
    theirs.load_state_dict({"weight_ih": ours.W[:, :1], "weight_hh": ours.W[:, 1:]})
    inputs, weight = torch.randn(2, 4, 20_000, dtype=torch.float64)  # 4 steps; pixels: 2 blocks
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
        assert -0.32 < optimizer.W.min() < -0.2 and 0.2 < optimizer.W[:, 1:].max() < 0.32
        assert 0 < optimizer.W_out.min() and 0.2 < optimizer.W_out.max() < 0.32


def test_the_optimizer_sees_the_gradient_of_each_image_over_its_mean_size():
    size = torch.tensor([1e-20, 1.0, 1e9]).double().view(3, 1, 1, 1)
    g = torch.randn(3, 2, 4, 4, dtype=torch.float64) * size
    expected = [image / np.abs(image).mean() for image in g.flatten(1).numpy()]
    assert np.allclose(normalize_gradient(g).view(3, -1).numpy(), expected)
    assert not normalize_gradient(0 * g).any()


# ---- l2l_adv 2: its attack, and the gradient of φ ------------------------------------------------

def unrolled(model, optimizer, x, y, eps, steps, objective):
    """Reference of the attack: x'_0 … x'_T with their graph through m_φ, and g_0 … g_{T−1}."""
    target, state = objective.target(model, x, y), None
    points, gradients = [project(x + 0.001 * seeded(7, torch.randn_like, x), x, eps)], []
    for t in range(steps):
        at = points[-1].detach().requires_grad_()
        gradients += torch.autograd.grad(objective.inner_loss(model(at), target).sum(), at)
        u = gradients[-1] / gradients[-1].abs().mean((1, 2, 3), keepdim=True)
        delta, state = optimizer(u.flatten(), state)
        x_adv = points[-1] + eps * delta.view(x.shape)
        points.append(torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1))
    return points, gradients


def weighted(losses):
    """Σ_t t·loss(x'_t) over Σ_t t, the mean over the images. losses: one tensor (B,) for each t."""
    total = sum(t * loss.sum() for t, loss in enumerate(losses, 1))
    return total / (len(losses[0]) * sum(range(1, len(losses) + 1)))


def meta_gradient(model, optimizer, x, y, eps, steps, objective, n=None):
    """Reference of φ's gradient: autograd through the unrolled losses of the first n images."""
    points, _ = unrolled(model, optimizer, x, y, eps, steps, objective)
    target = objective.target(model, x, y)
    losses = [objective.inner_loss(model(x_adv), target)[:n] for x_adv in points[1:]]
    return flat(torch.autograd.grad(weighted(losses), list(optimizer.parameters())))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_meta_gradient_equals_autograd_through_the_unrolled_losses(cell, objective):
    model, x, y = problem()
    optimizer, trace = big_steps(cell), []
    points, gradients = unrolled(model, optimizer, x, y, 0.2, 5, objective)
    cut = ((points[-1] - x).abs() > 0.2 - 1e-9).double().mean()
    assert 0.03 < cut < 0.97  # the projection cuts some pixels, and not others
    x_adv = seeded(7, learned_attack, model, optimizer, x, y, eps=0.2, steps=5, objective=objective,
                   trace=trace)
    assert close(x_adv, points[-1]) and close(flat(g for _, g in trace), flat(gradients))
    assert close(flat(at for at, _ in trace), flat(points[:-1]))
    g_T, _ = input_gradient(model, x_adv, objective, objective.target(model, x, y))
    length = phi_gradient(optimizer, x, trace[0][0], [*(g for _, g in trace), g_T], 0.2)
    ours = -flat(weight.grad for weight in optimizer.parameters())
    assert close(ours, meta_gradient(model, optimizer, x, y, 0.2, 5, objective), 1e-12)
    state, lengths = None, []
    for g in gradients:
        delta, state = optimizer(normalize_gradient(g), state)
        lengths.append(delta.abs().mean().item())
    assert length.item() == pytest.approx(np.mean(lengths))
    trace.clear()
    learned_attack(model, optimizer, x, y, eps=0.2, trace=trace)
    assert len(trace) == 10  # by default it takes ten steps


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_a_trained_optimizer_and_pgd_reach_the_optimum_of_a_linear_model(cell):
    w, x, y = seeded(0, torch.randn, 1, 3, 3), torch.rand(8, 1, 3, 3), torch.zeros(8).long()
    w = w + 0.2 * w.sign()
    model, optimum = Hill(lambda x: w * x), project(x + 0.1 * w.sign(), x, 0.1)
    optimizer = LearnedOptimizer(cell=cell)
    train_optimizer(model, [(x, y)] * 60, eps=0.1, steps=5, optimizer=optimizer, lr=0.02)
    x_adv = learned_attack(model, optimizer, x, y, eps=0.1, steps=5)
    assert torch.allclose(x_adv, optimum, atol=1e-3)
    for name in ("pgd", "line search"):
        assert torch.allclose(attacks(0.1)[name](model, x, y), optimum, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_train_optimizer_follows_autograd_through_a_frozen_classifier(objective):
    model, x, y = problem(batch_norm=True, dropout=0.5)
    before, optimizer = copy.deepcopy(model.state_dict()), big_steps()
    expected = weights_of(optimizer).requires_grad_()
    with eval_mode(model):
        gradient = meta_gradient(model, optimizer, x, y, 0.1, 10, objective)
    expected.grad = -clipped(gradient, 1)
    torch.optim.Adam([expected], 0.01).step()
    for weight in optimizer.parameters():
        weight.grad = torch.ones_like(weight)  # left over from something else
    got = seeded(7, train_optimizer, model, iter([(x, y)]), eps=0.1, objective=objective,
                 optimizer=optimizer)
    assert got is optimizer and close(weights_of(got), expected, 1e-6)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and all(weight.grad is None for weight in model.parameters())


# ---- l2l_adv 3: one training step ----------------------------------------------------------------

def moved(step, *players, **settings):
    """How far a training step, made with learning rates of 1, moves the weights of each player."""
    before = [weights_of(player) for player in players]
    seeded(7, step, **settings)
    return [weights_of(player) - old for player, old in zip(players, before)]


def clipped(gradient, norm):
    return gradient / max(1, gradient.norm() / norm)


class Mart(AdvTrain):
    """As in MART, sure images count less: the outer loss is no multiple of the mean inner one."""

    def outer_loss(self, model, x, x_adv, y):
        p = model(x).softmax(1).gather(1, y[:, None])[:, 0]
        return (F.cross_entropy(model(x_adv), y, reduction="none") * (1 - p)).mean()


class MoreThanTrades(Trades):
    def outer_loss(self, model, x, x_adv, y):
        return super().outer_loss(model, x, x_adv, y) + model(x_adv).pow(2).mean()


@pytest.mark.parametrize("objective, passes, scale, settings", [
    (AdvTrain(), 11, 1, {}), (Trades(3.0), 12, 1, {}), (AdvTrain(), 11, 1000, {}),
    (Mart(), 13, 1, {}), (MoreThanTrades(), 15, 1, {}),
    (AdvTrain(), 6, 1, {"clip": 0.01, "steps": 5}), (Trades(3.0), 12, 1, {"phi_share": 1}),
    (AdvTrain(), 11, 1000, {"clip": math.inf})])
def test_a_learned_step_equals_its_reference(objective, passes, scale, settings):
    model, x, y = problem(batch=20)
    model[-1].weight.data.mul_(scale)
    optimizer, calls, log, steps = big_steps(), [], [], settings.get("steps", 10)
    n = 20 if "phi_share" in settings else 2  # the default is a sixteenth
    ascent = meta_gradient(model, optimizer, x, y, 0.2, steps, objective, n)
    x_adv = unrolled(model, optimizer, x, y, 0.2, steps, objective)[0][-1].detach()
    outer = objective.outer_loss(model, x, x_adv, y)
    descent = flat(torch.autograd.grad(outer, list(model.parameters())))
    clip = settings.get("clip", 10)
    assert (ascent.norm() > 1) == (descent.norm() > 10) == (scale == 1000)
    model.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    phi, theta = moved(train_step_learned, optimizer, model, model=model, optimizer=optimizer, x=x,
                       y=y, opt_theta=sgd(model), opt_phi=sgd(optimizer), eps=0.2, log=log,
                       objective=objective, **settings)
    # Two images to try the model, then T passes, TRADES' f(x), the outer loss's, g_T's if not free.
    assert calls[0] == 2 and len(calls) == 1 + passes
    assert close(phi, clipped(ascent, 1), 1e-6) and close(theta, -clipped(descent, clip), 1e-4)
    assert 0 < log[0]["length"] < 1
    assert [log[0][key] for key in ("loss", "theta_norm", "phi_norm")] == pytest.approx(
        [outer.item(), descent.norm().item(), ascent.norm().item()])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_batch_norm_the_attack_runs_in_eval_mode_and_the_free_g_T_in_training_mode(objective):
    model, x, y = problem(batch_norm=True)
    model(3 * x)  # running statistics of their own
    still, twin, optimizer = copy.deepcopy(model).eval(), copy.deepcopy(model), big_steps()
    points, gradients = unrolled(still, optimizer, x, y, 0.2, 5, objective)
    x_T = points[-1].detach().requires_grad_()
    outer = objective.outer_loss(twin, x, x_T, y)
    g_T, *descent = torch.autograd.grad(outer, [x_T, *twin.parameters()])
    gradients = [*gradients[1:], g_T * len(x) / objective.beta]
    linear = weighted([g * x_adv for g, x_adv in zip(gradients, points[1:])])
    ascent = flat(torch.autograd.grad(linear, list(optimizer.parameters())))
    in_eval = meta_gradient(still, optimizer, x, y, 0.2, 5, objective)
    phi, theta = moved(train_step_learned, optimizer, model, model=model, optimizer=optimizer, x=x,
                       y=y, opt_theta=sgd(model), opt_phi=sgd(optimizer), eps=0.2, steps=5,
                       objective=objective, phi_share=1, clip=1e9)
    assert close(phi, ascent, 1e-9) and not close(phi, in_eval, 1e-3)
    assert close(theta, -flat(descent), 1e-9)
    assert torch.equal(flat(model.buffers()), flat(twin.buffers()))  # moved by the outer loss alone


@pytest.mark.parametrize("settings", [
    {}, {"line_search": True}, {"decay": True}, {"start": "uniform"}, {"clip": 0.01},
    {"objective": Trades(3.0)}])
def test_a_step_with_pgd_is_one_clipped_descent_step(settings):
    model, x, y = problem()
    attack = {key: value for key, value in settings.items() if key != "clip"}
    x_adv = seeded(7, pgd, model, x, y, eps=0.1, step_size=0.03, steps=10, **attack)
    loss = settings.get("objective", AdvTrain()).outer_loss(model, x, x_adv, y)
    gradient, log = flat(torch.autograd.grad(loss, list(model.parameters()))), []
    theta, = moved(train_step_pgd, model, model=model, x=x, y=y, opt_theta=sgd(model), eps=0.1,
                   step_size=0.03, log=log, **settings)
    assert close(theta, -clipped(gradient, settings.get("clip", 10)), 1e-4)
    assert log == [{"loss": loss.item(), "theta_norm": pytest.approx(gradient.norm().item())}]


class Infinite(AdvTrain):
    def outer_loss(self, *args):
        return super().outer_loss(*args) + math.inf


@pytest.mark.parametrize("bad", ["loss", "theta", "phi"])
def test_numbers_that_are_not_finite_move_no_weight(bad):
    model, x, y = problem()
    optimizer = big_steps()
    before = weights_of(model, optimizer)
    if bad != "loss":
        weight = model[0].weight if bad == "theta" else optimizer.W_out
        weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        train_step_learned(model, optimizer, x, y, opt_theta=sgd(model), opt_phi=sgd(optimizer),
                           eps=0.1, objective=Infinite() if bad == "loss" else AdvTrain())
    assert torch.equal(weights_of(model, optimizer), before)


@pytest.mark.parametrize("swapped", [True, False])
def test_an_optimizer_of_other_weights_is_refused(swapped):
    model, optimizer, x, y = NET, LearnedOptimizer(), X, Y
    theta, phi = (sgd(optimizer), sgd(model)) if swapped else (sgd(SmallCNN()), sgd(optimizer))
    before = weights_of(model, optimizer)
    with pytest.raises(InputError, match="opt_theta holds no weight of the Classifier"):
        train_step_learned(model, optimizer, x, y, opt_theta=theta, opt_phi=phi, eps=0.1)
    with pytest.raises(InputError, match="opt_phi holds no weight of the LearnedOptimizer"):
        train_step_learned(model, optimizer, x, y, opt_theta=sgd(model), opt_phi=sgd(model),
                           eps=0.1)
    assert torch.equal(weights_of(model, optimizer), before)


# ---- l2l_adv 4: training -------------------------------------------------------------------------

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """36 random images in CIFAR-10's format, and flags that train on 24 of them within a second."""
    write_cifar10(tmp_path / "cifar", n=6)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "cifar"))
    monkeypatch.chdir(tmp_path)
    return ("train --dataset cifar10 --model small --epochs 2 --steps 2 --batch-size 8 --out run "
            "--method").split()


def saved(path):
    return torch.load(path, weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_evaluated(tiny, capsys, method):
    assert main([*tiny, method, "--cell", "rnn"]) == 0
    learned = ["learned-10"] * method.startswith("rnn")
    heading, *rows = capsys.readouterr().out.splitlines()
    assert f"{method}, cifar10 (24 images), small, eps = 8/255, T = 2, seed 0, cpu" in heading
    assert [row["epoch"] for row in log_of("run")] == [1, 2] == [int(row[5:8]) for row in rows]
    last = log_of("run")[-1]
    scores = [f"{name} {100 * value:5.2f}" for name, value in last["accuracy"].items()]
    assert "  ".join(scores) in rows[1] and f"loss {last['loss']:.4f}" in rows[1]
    assert list(last["accuracy"]) == ["natural", "pgd-10", *learned, "worst"]
    assert ("phi_norm" in last) == ("length" in last) == bool(learned) and "clipped" in last
    _, optimizer, settings = load_run("run", "last")
    assert settings.method == method and (optimizer.cell == "rnn" if learned else not optimizer)
    assert main(["eval", "run", "--limit", "4"]) == 0
    heading, columns, row = capsys.readouterr().out.splitlines()
    assert heading == ("cifar10, eps = 8/255, 4 test images, best checkpoint, attack seed 0; "
                       "accuracy in %, worst: all attacks of the row")
    accuracy = json.loads(Path("run/eval.json").read_text())["accuracy"]
    assert list(accuracy) == ["natural", "pgd-10", "pgd-100", "cw-100", *learned, "worst"]
    assert row.split() == ["run", *(f"{100 * accuracy[name]:.2f}" if name in accuracy else "-"
                                    for name in columns.split()[1:])]
    assert sorted(os.listdir("run")) == ["best.pt", "eval.json", "last.pt", "log.jsonl"]


@pytest.mark.parametrize("flags, step, expected", [
    ("rnn-adv", "learned", {"beta": 1, "phi_share": 1 / 16, "start": "gaussian", "clip": 10}),
    ("rnn-trades --phi-share 1 --clip inf", "learned", {"beta": 2, "phi_share": 1,
                                                        "clip": math.inf}),
    ("advtrain", "pgd", {"beta": 1, "step_size": 0.03, "decay": False, "line_search": False}),
    ("advtrain --line-search", "pgd", {"step_size": 0.12, "line_search": True}),
    ("advtrain --decay --start uniform", "pgd", {"step_size": 0.12, "decay": True,
                                                 "start": "uniform"}),
    ("trades --step-size 0.06", "pgd", {"beta": 2, "step_size": 0.06, "eps": 0.12, "steps": 2})])
def test_a_method_takes_the_step_of_its_name(tiny, monkeypatch, flags, step, expected):
    seen = []

    def fake(*args, log, objective, **rest):
        log.append({"loss": 0.0, "theta_norm": 0.0})
        seen.append({"beta": objective.beta, **rest})

    monkeypatch.setattr(l2l_adv, f"train_step_{step}", fake)
    assert main([*tiny, *flags.split(), *"--eps 0.12 --beta 2 --eps-warmup 0".split()]) == 0
    assert len(seen) == 6 and {key: seen[0][key] for key in expected} == expected


@pytest.mark.parametrize("method, step", [("rnn-adv", "learned"), ("advtrain", "pgd")])
def test_an_epoch_takes_every_image_once_at_the_schedules_rate_and_eps(
        tmp_path, monkeypatch, method, step):
    rates, radii, images, labels = [], [], [], []

    def fake(model, *args, opt_theta, eps, log, opt_phi=None, step_size=None, **rest):
        rates.append([opt.param_groups[0]["lr"] for opt in (opt_theta, opt_phi or opt_theta)])
        radii.append([eps, step_size or eps / 4])
        images.extend((255 * args[-2][:, 0, 0, 0]).round().tolist())
        labels.extend(args[-1].tolist())
        log.append({"loss": float(len(radii)), "theta_norm": 8.0 + len(radii)})
        assert model.training

    monkeypatch.setattr(l2l_adv, f"train_step_{step}", fake)
    x = torch.arange(30).view(30, 1, 1, 1).repeat(1, 1, 4, 4).byte()
    data = Dataset(x, torch.arange(30), None, None)
    settings = get_args(f"train --out {tmp_path} --method {method} --epochs 2 --batch-size 8 --lr "
                        "0.3 --phi-lr 0.03 --eps 0.1 --eps-warmup 0.5".split())
    rows = train(settings, SmallCNN(1, 30), data)
    cycle = np.interp([(2 * k + 1) / 12 for k in range(6)], [0, 1 / 3, 1], [0, 1, 0])
    phi_lr = 0.03 if step == "learned" else 0.3
    assert np.array(rates) == pytest.approx(np.outer(cycle, [0.3, phi_lr]))
    assert np.array(radii) == pytest.approx(np.outer([1 / 6, 3 / 6, 5 / 6, 1, 1, 1], [0.1, 0.025]))
    assert images == labels and labels[:24] != labels[24:]
    assert sorted(labels[:24]) == sorted(labels[24:]) == sorted(hold_out(data)[1].tolist())
    assert [(row["loss"], row["clipped"]) for row in rows] == [(2.0, 1 / 3), (5.0, 1.0)]


@pytest.mark.parametrize("method, score", [("advtrain", "pgd-10"), ("plain", "natural")])
def test_the_best_checkpoint_is_the_best_on_held_out_images(tiny, monkeypatch, method, score):
    scores, seen, augmented = iter([0.2, 0.5, 0.5, 0.1]), [], []

    def fake(model, x, y, attacks, eps=None):
        if not attacks:  # the look at the model before the training
            return {}, {}
        seen.append(x)
        accuracy = {"natural": 0.9, "pgd-10": 0.9, score: next(scores)}
        return {name: torch.tensor(value) for name, value in accuracy.items()}, {}

    monkeypatch.setattr(l2l_adv, "augment", lambda x, padding: augmented.extend(x[padding:]) or x)
    monkeypatch.setattr(l2l_adv, "evaluate", fake)
    assert main([*tiny, method, "--epochs", "4"]) == 0
    best, last = saved("run/best.pt"), saved("run/last.pt")
    assert (len(best["rows"]), len(last["rows"]), len(augmented)) == (2, 4, 4 * 24)
    held_out = hold_out(load_dataset("cifar10"))[2] / 255
    assert len(seen) == 4 and all(torch.equal(x, held_out) for x in seen)
    assert not {"opt_theta", "data_dir", "resume"} & {*best, *best["settings"]}


class Own(nn.Module):
    """A model that is falsy, reshapes by view, and has a frozen layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3).requires_grad_(False)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(144, 3)

    def __len__(self):
        return 0

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).view(len(x), -1))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_and_data_of_the_callers_own(tmp_path, compiled):
    model, new = seeded(0, Own), seeded(1, Own)
    images, labels = torch.randint(0, 256, (50, 1, 8, 8)).byte(), torch.randint(0, 3, (50,))
    data = Dataset(images, labels, images, labels)
    settings = get_args(["train", "--out", "later"])
    settings.out, settings.epochs, settings.batch_size = tmp_path, np.arange(4)[1], np.int64(10)
    settings.eps, settings.seed, settings.steps = np.float64(8) / 255, np.arange(3)[2], 2
    trained = torch.compile(model, backend="eager") if compiled else model
    rows = train(settings, trained.eval(), data)
    loaded, optimizer, again = load_run(tmp_path, model=new)
    assert loaded is new and new.norm.num_batches_tracked == 4 and isinstance(
        optimizer, LearnedOptimizer)
    assert torch.equal(new(images / 255), model.eval()(images / 255))
    assert (again.model, again.dataset, again.eps, again.seed) == ("own", "own", 8 / 255, 2)
    with pytest.raises(InputError, match="holds a model of your own"):
        load_run(tmp_path)
    again.resume = True
    assert train(again, new, data) == rows  # it is finished


WORKER = """
import os, torch, l2l_adv
torch.set_num_threads(1)
sizes, step = set(), l2l_adv.train_step_learned
def counting(model, optimizer, x, y, **settings):
    sizes.add(len(x))
    return step(model, optimizer, x, y, **settings)
l2l_adv.train_step_learned = counting
l2l_adv.random_start = lambda x, eps, start: x  # any process meets the same points
batch, out = (9, "two") if "TORCHELASTIC_RUN_ID" in os.environ else (8, "one")
torch.manual_seed(out == "two" and int(os.environ["RANK"]))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 10))
model[1].bias.requires_grad_(False)
flags = f"--method rnn-adv --dataset mnist --epochs 1 --batch-size {batch} --steps 2 --phi-share 1"
l2l_adv.train(l2l_adv.get_args(["train", "--out", out, *flags.split()]), model)
assert sizes == {batch // 2 if out == "two" else batch}
"""


def test_two_processes_train_both_networks_as_one(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist", n=40)
    monkeypatch.chdir(tmp_path)
    Path("worker.py").write_text(WORKER)
    monkeypatch.setenv("MNIST_DIR", "mnist")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 worker.py".split()
    result = subprocess.run([sys.executable, *torchrun], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(HERE)})
    assert result.returncode == 0 and result.stdout.count("epoch") == 1, result.stderr
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):  # without torchrun, they mean nothing
        monkeypatch.setenv(name, value)
    for name in ("train_step_learned", "random_start"):  # the worker patches them
        monkeypatch.setattr(l2l_adv, name, getattr(l2l_adv, name))
    exec(WORKER, {})
    one, two = saved("one/last.pt"), saved("two/last.pt")
    for name in ("model", "optimizer"):
        for key, weight in one[name].items():
            assert torch.allclose(weight, two[name][key], rtol=1e-4, atol=1e-5)


# Interruptions and damaged files

def outcome_of(out):
    """All that a training leaves but the time it took, as comparable values."""
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items() if key not in ("seconds", "out")}
        value = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
        return [plain(v) for v in value] if isinstance(value, list) else value

    files = [plain(saved(f"{out}/{name}.pt")) for name in ("last", "best")]
    return sorted(os.listdir(out)), plain(log_of(out)), files


@pytest.mark.parametrize("method", ["plain", "trades", "rnn-trades"])
def test_nan_in_a_training_is_reported_and_resume_ends_in_the_same_bits(
        tiny, monkeypatch, capsys, method):
    flags = [*tiny, method, "--resume", "--out"]
    theta_gradient, calls = l2l_adv.theta_gradient, []

    def failing(model, *args):
        calls.append(1)
        model.layers[0].weight.data.mul_(math.nan if len(calls) == 5 else 1)
        return theta_gradient(model, *args)

    with monkeypatch.context() as patch:
        patch.setattr(l2l_adv, "theta_gradient", failing)
        assert main([*flags, "run"]) == 1
    assert re.search("epoch 2, step 2: .* not finite: .*\n$",
                     capsys.readouterr().err)
    assert main([*flags, "run"]) == main([*flags, "whole"]) == 0
    assert outcome_of("run") == outcome_of("whole")


@pytest.mark.parametrize("kill", range(int(os.environ.get("KILLS", 1))))
def test_a_killed_training_resumes_to_the_same_bits(tiny, kill):
    method = ("rnn-trades", "advtrain", "rnn-adv", "trades")[kill % 4]
    flags = [*tiny, method, "--resume", "--epochs", "4", "--out"]
    start = time.time()
    assert main([*flags, "whole"]) == 0
    delay = np.random.default_rng(kill).uniform(0, time.time() - start)
    process = subprocess.Popen([sys.executable, HERE / "l2l_adv.py", *flags, "run"],
                               stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.stdout.readline()  # the heading
    process.stdout.readline()  # the first row
    time.sleep(delay)
    process.kill()
    process.communicate()
    print(f"killed after {delay:.2f} s, {len(log_of('run'))} rows")
    assert main([*flags, "run"]) == 0 and outcome_of("run") == outcome_of("whole")


@pytest.mark.parametrize("kind", ["bin", "py", "idx", "last.pt"])
def test_a_damaged_file_is_read_or_refused_in_one_line(tiny, kind):
    def read():
        if kind == "last.pt":
            load_run("data", "last")
        else:
            load_dataset("mnist" if kind == "idx" else "cifar10", "data")

    if kind == "last.pt":
        assert main([*tiny, "rnn-adv", "--epochs", "1", "--out", "data"]) == 0
    elif kind == "idx":
        write_mnist(Path("data"))
    else:
        write_cifar10(Path("data"), 12, pickled(2) if kind == "py" else binary)
    names = {"last.pt": "last.pt", "idx": "train-labels*"}
    path, = Path("data").glob(names.get(kind, "data_batch_2*"))
    raw, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(int(os.environ.get("FUZZ", 40))):
        damaged = bytearray(raw)
        for end in rng.choice([min(len(raw), 300), len(raw)], 2):  # the head has the structure
            damaged[rng.integers(end)] = rng.integers(256)
        path.write_bytes(damaged if rng.random() < 0.6 else raw[:rng.integers(len(raw))])
        try:
            read()
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 10
    path.write_bytes(raw)
    read()


def test_a_malicious_or_older_checkpoint_is_refused_unexecuted(tiny, tmp_path, capsys):
    flags = [*tiny, "plain", "--epochs", "1", "--resume"]
    assert main(flags) == 0
    Bomb.target, good = tmp_path / "executed", saved("run/last.pt")
    older = {key: good[key] for key in good if key != "format"}
    for bad, words in ((Bomb(), "damaged"), ({**good, "settings": Bomb()}, "damaged"),
                       (older, "commit d36af19")):
        for name in ("last.pt", "best.pt"):
            torch.save(bad, f"run/{name}")
        assert is_refused(["eval", "run"], words, capsys) and is_refused(flags, words, capsys)
        assert not Bomb.target.exists()


# ---- l2l_adv 5: command line ---------------------------------------------------------------------

def test_eval_runs_the_attacks_it_is_asked_for_and_lends_an_optimizer(tiny, capsys):
    for method in ("rnn-adv", "advtrain"):
        assert main([*tiny, method, "--out", method]) == 0
    checkpoint = saved("rnn-adv/last.pt")
    checkpoint["optimizer"]["W_out"].mul_(100)  # so that its steps are not tiny
    torch.save(checkpoint, "rnn-adv/last.pt")
    names, results = ["learned-2", "pgd-3", "cw-4"], []
    for more in ([], ["--lend", "rnn-adv"]):
        capsys.readouterr()
        assert main(["eval", "rnn-adv", "advtrain", "--limit", "4", "--attacks", ",".join(names),
                     "--checkpoint", "last", "--eps", "0.1", "--seed", "5", *more]) == 0
        heading, columns, _, row = capsys.readouterr().out.splitlines()
        assert (row.split()[2] == "-") == (not more)
        results.append([json.loads(Path(out, "eval.json").read_text())
                        for out in ("rnn-adv", "advtrain")])
    assert columns.split() == ["run", "natural", *names, "worst"]
    assert "eps = 25.5/255" in heading and "last checkpoint, attack seed 5" in heading
    data, model = load_dataset("cifar10"), load_run("advtrain", "last")[0]
    optimizer = load_run("rnn-adv", "last")[1]
    step = {"eps": 0.1, "step_size": 0.025}
    correct, loss = evaluate(model, data.x_test[:4] / 255, data.y_test[:4], {
        "learned-2": lambda m, x, y: learned_attack(m, optimizer, x, y, eps=0.1, steps=2),
        "pgd-3": lambda m, x, y: pgd(m, x, y, steps=3, **step),
        "cw-4": lambda m, x, y: pgd(m, x, y, steps=4, objective=Margin(), **step)}, seed=5)
    (without, _), (own, lent) = results
    assert lent["accuracy"] == {name: each.double().mean().item() for name, each in correct.items()}
    assert lent["loss"] == pytest.approx({name: each.mean().item() for name, each in loss.items()})
    assert (own["lent_by"], lent["lent_by"], own["loss"]) == (None, "rnn-adv", without["loss"])
    assert (lent["images"], lent["eps"], lent["settings"]["method"]) == (4, 0.1, "advtrain")


def test_the_table_goes_on_when_an_eval_json_cannot_be_written(tiny, capsys):
    for out in "ab":
        assert main([*tiny, "plain", "--epochs", "1", "--out", out]) == 0
    Path("a/eval.json").mkdir()
    capsys.readouterr()
    assert main(["eval", "a", "b", "--limit", "2", "--attacks", "pgd-1"]) == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["a", "b"]
    assert Path("b/eval.json").exists() and "a/eval.json" in err and err.count("\n") == 1


# Mistakes: one line each, exit status 2, and nothing written

X, Y, NET = torch.rand(2, 3, 4, 4), torch.zeros(2).long(), SmallCNN(3)
MANY, Y9 = X.byte().repeat(9, 1, 1, 1), Y.repeat(9)


@pytest.mark.parametrize("change, words", [
    ({"eps": 0.0}, "eps must be above 0"), ({"eps": 1.1}, "at most 1"), ({"eps": "8/255"}, "eps"),
    ({"eps": math.nan}, "eps must"), ({"steps": 0}, "positive whole"), ({"steps": 2.5}, "whole"),
    ({"step_size": 0.0}, "step_size must"), ({"step_size": 1.1}, "at most 1"),
    ({"x": X * 255}, "divide by 255"), ({"x": X * math.nan}, "must lie in"),
    ({"x": X[0]}, "(B, C, H, W)"), ({"x": (X * 255).byte()}, "a float tensor"),
    ({"x": X[:0], "y": Y[:0]}, "images"), ({"x": X.numpy()}, "(B, C, H, W)"),
    ({"y": Y[:1]}, "int64 tensor"), ({"y": Y.int()}, "int64"), ({"y": Y - 1}, "class number"),
    ({"y": [0, 0]}, "int64 tensor (B,)"), ({"y": torch.eye(2).long()}, "(B,)"),
    ({"start": "zero"}, "start must be"), ({"x": X[:, :1]}, "takes images (B, 3, H, W)"),
    ({"model": returning(lambda x: (NET(x), 0))}, "(B, 2 or more), not <class 'tuple'>"),
    ({"model": returning(lambda x: NET(x)[:, 0])}, "torch.Size([2])"),
    ({"model": returning(lambda x: NET(x)[:, :1])}, "(B, 2 or more)"), ({"y": Y + 10}, "(B, 11"),
    ({"model": returning(lambda x: NET(x).softmax(1))}, "leave out its softmax")])
@pytest.mark.parametrize("objective", [AdvTrain(), Trades(), Margin()])
def test_attacks_and_training_steps_refuse_bad_input(change, words, objective):
    call = {"model": NET, "x": X, "y": Y, "eps": 0.1, "steps": 1, "objective": objective, **change}
    phi = LearnedOptimizer()
    doors = [partial(pgd, **{"step_size": 0.1, **call}),
             partial(train_step_pgd, opt_theta=sgd(NET), **{"step_size": 0.1, **call})]
    if "step_size" not in change:
        doors += [partial(learned_attack, optimizer=phi, **call),
                  partial(train_step_learned, optimizer=phi, opt_theta=sgd(NET), opt_phi=sgd(phi),
                          **call)]
    if not {"eps", "steps", "step_size", "start"} & set(change):
        doors.append(lambda: evaluate(call["model"], call["x"], call["y"], {}))
    for door in doors:
        with pytest.raises(InputError, match=re.escape(words)):
            door()


def learned_step(**wrong):
    phi = LearnedOptimizer()
    train_step_learned(NET, phi, X, Y, opt_theta=sgd(NET), opt_phi=sgd(phi), eps=0.1, steps=1,
                       **wrong)


def train_on(x, y):
    train(get_args(["train", "--out", "/dev/null/nowhere"]), data=Dataset(x, y, x, y))


@pytest.mark.parametrize("wrong, words", [
    (lambda: learned_attack(NET, None, X, Y, eps=0.1), "needs a LearnedOptimizer, not NoneType"),
    (lambda: evaluate(NET, X, Y, {"natural": None}), "choose another name"),
    (lambda: evaluate(NET, X, Y, {"worst": None}), "choose another name"),
    (lambda: LearnedOptimizer(cell="gru"), "unknown cell"),
    (lambda: load_dataset("cifar100"), "unknown data set"),
    (lambda: train_optimizer(NET, [], eps=0.1), "no batch"), (lambda: Trades(beta=0), "beta must"),
    (lambda: evaluate(NET, X, Y, {}, eps=0), "eps must"),
    (lambda: learned_step(clip=-1), "clip must"), (lambda: learned_step(clip=math.nan), "clip"),
    (lambda: learned_step(phi_share=16), "phi_share"), (lambda: learned_step(phi_share=0), "0"),
    (lambda: evaluate(NET, X, Y, {}, batch_size=0), "batch_size must"),
    (lambda: train_on(X.byte(), Y), "five or more"), (lambda: train_on(MANY / 1, Y9), "uint8"),
    (lambda: train_on(MANY[0], Y9), "uint8"), (lambda: train_on(MANY, Y), "as many labels"),
    (lambda: train_on(MANY.permute(0, 2, 3, 1), Y9), r"\(N, C, H, W\).*18, 4, 4, 3"),
    (lambda: load_run("nowhere"), "missing, damaged or unsuitable")])
def test_python_calls_refuse_bad_input(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()


def test_logits_that_are_not_finite_are_an_error():
    nan = returning(lambda x: NET(x) * math.nan)
    with pytest.raises(FloatingPointError, match="natural: the model's logits are NaN"):
        evaluate(nan, X, Y, {})


def is_refused(argv, words, capsys):
    """It ends with status 2 and one line on stderr, which has these words, and writes nothing."""
    def files():
        return {path: path.stat().st_mtime_ns for path in Path().rglob("*")}

    before = files()
    capsys.readouterr()
    assert main(argv) == 2
    out, error = capsys.readouterr()
    assert words in error and error.count("\n") == 1 and out == ""
    return files() == before


@pytest.mark.parametrize("flags", """
    --method fgsm; --model alexnet; --dataset svhn; --cell gru; --start zero; --eps 0; --eps 8;
    --eps 8/0; --eps nan; --eps=-8/255; --eps-warmup 1.1; --steps 1.5; --epochs two; --step-size 2;
    --beta 0; --phi-lr -1; --phi-share 0; --clip 0; --lr inf; --lr 1e999999999; --limit 0;
    --seed -1; --batch-size 9999999999; --padding 33; --bogus = unrecognized arguments: --bogus;
    --batch-size 1 = are too few; --limit 1 = are too few; --device tpu9 = the device 'tpu9';
    --data-dir nowhere = no cifar10 in nowhere; --dataset mnist --data-dir . = no mnist;
    --out file/run = Not a directory; --out /proc/self = /proc/self;
    --method plain --line-search = does not use PGD;
    --decay = does not use PGD; --step-size 0.1 = does not use PGD
    """.split(";"))
def test_train_refuses_bad_input(tiny, capsys, flags):
    Path("file").write_text("")
    flags, _, words = flags.strip().partition(" = ")  # the line names the flag, or says this
    words = words or re.match("--[a-z-]+", flags)[0]
    assert is_refused([*tiny, "rnn-adv", *flags.split()], words, capsys)


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("limit", -5), ("eps", 8), ("method", "fgsm"), ("batch_size", 1.5)])
def test_settings_that_were_changed_in_python_are_checked_too(tiny, name, value):
    settings = get_args([*tiny, "rnn-adv"])
    setattr(settings, name, value)
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}"):
        train(settings)
    assert not Path("run").exists()


def settings_of(flags):
    return l2l_adv.check_settings(get_args(["train", *flags.split()]))


def test_defaults_depend_on_data_set_and_model():
    a = settings_of("--out own --dataset mnist --method advtrain --model small")
    assert (a.out, a.decay, a.resume, a.seed) == ("own", False, False, 0)
    assert (a.eps, a.lr, a.batch_size, a.step_size) == (0.3, 0.05, 64, 0.075)
    b = settings_of("--out b --dataset cifar10 --eps 4/255 --method trades --padding 0 --seed 3")
    assert (b.model, b.epochs, b.padding, b.eps_warmup, b.seed) == ("vgg16", 30, 0, 0, 3)
    assert (b.eps, b.step_size, b.batch_size, b.lr) == (4 / 255, 1 / 255, 128, 0.05)


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(tiny, capsys):
    flags = [*tiny, "plain"]
    assert main(flags) == 0 and is_refused(flags, "already contains a run", capsys)
    before = outcome_of("run")
    assert is_refused([*flags, "--resume", "--epochs", "5"], "with epochs = 2: use", capsys)
    assert main([*flags, "--resume"]) == 0 and outcome_of("run") == before  # it is finished
    assert main([*flags, "--out", "other", "--seed", "1"]) == 0
    assert outcome_of("other")[2][0]["model"] != before[2][0]["model"]


IDX = "t10k-images-idx3-ubyte"


@pytest.mark.parametrize("name, damage", [
    ("data_batch_2.bin", lambda raw: raw[:-9]), ("data_batch_4.bin", None),
    ("data_batch_2.bin", lambda raw: raw[:-3073]), ("data_batch_2.bin", lambda raw: b""),
    ("test_batch.bin", lambda raw: b""), ("test_batch.bin", lambda raw: b"\x0a" + raw[1:]),
    (IDX, lambda raw: raw[:-1]), (IDX, lambda raw: raw[:9]), ("t10k-labels-idx1-ubyte", None),
    (IDX, lambda raw: b"\0\0\x09" + raw[3:]), (IDX, lambda raw: raw + b"x"),
    (IDX, lambda raw: raw[:7] + b"\x06" + raw[8:-28 * 28])])  # six images
def test_damaged_data_is_refused(tiny, capsys, name, damage):
    write_mnist(Path("mnist"), 7, bytes)
    path = Path("mnist" if "idx" in name else "cifar", name)
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    data = ["--dataset", "mnist", "--data-dir", "mnist"] if "idx" in name else []
    assert is_refused([*tiny, "plain", *data], str(path.parent), capsys)


@pytest.mark.parametrize("flags", """
    vgg; tensor; keys; text; empty; nothing; other = differ in data set or eps; --seed x;
    --lend text = text; --attacks fgsm = unknown attack 'fgsm'; --limit many; --eps 8;
    --attacks pgd-0 = unknown attack 'pgd-0'; --attacks pgd-10, = unknown attack '';
    --attacks pgd-999999 = unknown attack; --checkpoint first; --lend run = no learned optimizer;
    --data-dir nowhere = no cifar10 in nowhere""".split(";"))
def test_eval_refuses_bad_input_and_what_is_not_a_run(tiny, capsys, flags):
    assert main([*tiny, "plain", "--epochs", "1", "--limit", "8"]) == 0
    right = saved("run/best.pt")
    other = {**right["settings"], "eps": 0.1}
    wrong = {"vgg": {**right, "model": MODELS["vgg16"](3).state_dict()}, "tensor": torch.zeros(3),
             "keys": {"format": 1}, "other": {**right, "settings": other}}
    flags, _, words = flags.strip().partition(" = ")
    if flags in (*wrong, "text", "empty"):
        Path(flags).mkdir()
        torch.save(wrong.get(flags), Path(flags) / "best.pt")
    elif "text" in flags:
        Path("text").mkdir()
        Path("text/best.pt").write_text("not a checkpoint")
    assert is_refused(["eval", "run", *flags.split()], words or flags.split()[0], capsys)


# ---- README.md and run_cifar.sh ------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def test_the_examples_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(examples) == 3
    for example in examples:
        exec(example, {})


def test_every_flag_in_the_readme_exists(capsys):
    known = "--nproc-per-node" + (HERE / "run_cifar.sh").read_text()
    for command in ("train", "eval"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known += capsys.readouterr().out
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", known)] == []


@pytest.mark.parametrize("version, warned", [("2.0.1+cu118", 1), ("1.13.1", 1), ("2.1.2", 0),
                                             ("2.13.0+cpu", 0)])
def test_an_older_torch_is_named_at_import(monkeypatch, capsys, version, warned):
    monkeypatch.setattr(torch, "__version__", version)
    runpy.run_path(str(HERE / "baselines.py"))
    assert capsys.readouterr().err.count(f"{version} is older than 2.1") == warned


def test_the_modules_need_no_syntax_newer_than_python_3_9():
    for path in HERE.glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 9))


STAND_IN = """#!/bin/sh
# Plays python3 for run_cifar.sh: it has torch unless NO_TORCH is set, no CUDA, and notes its calls.
case "$*" in
    *is_available*) echo False; exit ;;
    -c*) [ -z "$NO_TORCH" ]; exit ;;
    "-m venv"*) exit 1 ;;
esac
echo "$*" >>calls
case "$*" in *"$FAILS "*) exit ${STATUS:-1} ;; esac
echo "a row"
"""


@pytest.fixture
def run_cifar(tmp_path, monkeypatch):
    """Runs a copy of run_cifar.sh with the stand-in → (status, stdout, stderr, its calls)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(STAND_IN)
    (tmp_path / "bin/python3").chmod(0o755)
    (tmp_path / "a copy").mkdir()
    shutil.copy(HERE / "run_cifar.sh", tmp_path / "a copy")
    monkeypatch.chdir(tmp_path / "a copy")

    def run(*flags, shell="bash", **variables):
        Path("calls").write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        result = subprocess.run([shell, "run_cifar.sh", *flags], capture_output=True, text=True,
                                env={"PATH": path, "FAILS": "nothing", **variables})
        calls = Path("calls").read_text().replace(f"{tmp_path}/a copy/l2l_adv.py ", "")
        return result.returncode, result.stdout, result.stderr, calls.splitlines()
    return run


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_run_cifar_goes_on_when_a_method_fails_and_says_so(run_cifar, shell):
    status, out, err, calls = run_cifar("--epochs", "5", shell=shell, FAILS="--method trades",
                                        METHODS="plain  trades\n rnn-adv", OUT="two words")
    common = "--model small --steps 4 --epochs 2 --dataset cifar10 --epochs 5"
    train_calls = [f"train {common} --method {method} --out two words/{method} --resume"
                   for method in ("plain", "rnn-adv", "trades")]
    assert sorted(calls[:-1]) == train_calls and calls[-1].startswith(
        "eval two words/plain two words/rnn-adv --attacks")
    assert status == 1 and err == "trades failed with status 1: see above\n"
    assert out.count("a row") == 3 and "plain       a row" in out


def test_run_cifar_gives_every_combination_of_flags_a_folder(run_cifar):
    for flags, folder in (((), "cifar10"), (("--synthetic",), "synthetic"),
                          (("--synthetic", "--seed", "1"), "synthetic-seed-1")):
        status, out, err, calls = run_cifar(*flags)
        assert status == 0 and err == "" and len(calls) == 6
        assert calls[-1].startswith(f"eval runs/{folder}/plain runs/{folder}/advtrain ")


@pytest.mark.parametrize("flags, variables, words", [
    (["--out", "x"], {}, "set OUT"), ([], {"OUT": "/proc/x"}, "/proc/x"),
    ([], {"NO_TORCH": "1"}, "install torch and numpy yourself")])
def test_run_cifar_stops_at_a_mistake(run_cifar, flags, variables, words):
    status, _, err, calls = run_cifar(*flags, **variables)
    assert status == 2 and words in err and err.count("\n") == 1 and calls == []
    status, _, _, calls = run_cifar("--eps", "8", FAILS="--eps 8", STATUS="2")
    assert status == 2 and len(calls) == 1  # the first method tells of it, the others do not try
