"""What was there before the paper: everything that adversarial training needs and a learned optimizer does not change.

1 threat model, 2 objectives, 3 attacks, 4 evaluation, 5 classifiers, 6 data. The learned optimizer of Xiong & Hsieh
(ECCV 2020) is in l2l_adv.py, which imports this file.

Images are float tensors in [0, 1], (B, C, H, W). eps and step sizes are in the same pixel scale: CIFAR-10's usual
radius is eps=8/255.

[1] Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv 1706.06083
[2] Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019, arXiv 1901.08573
[3] Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017, arXiv 1608.04644
[4] Tsipras et al., Robustness May Be at Odds with Accuracy, ICLR 2019, arXiv 1805.12152
[5] Dong et al., Boosting Adversarial Attacks with Momentum, CVPR 2018, arXiv 1710.06081
"""
import gzip
import math
import os
import pickletools
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """A mistake of the caller's; its message is the one line to show. The command line exits with 2."""


class NotFinite(ArithmeticError):
    """A loss, a gradient or logits that are NaN or infinite. No weight was moved by them; batch norm's statistics may
    have been."""


# ---- 1. Threat model ------------------------------------------------------------------------------------------------

def project(x_adv, x, eps):
    """Π of the paper: the point nearest to x_adv in the l-infinity ball of radius eps around x and the box [0, 1]."""
    return torch.clamp(x_adv, (x - eps).clamp(min=0), (x + eps).clamp(max=1))


def start_point(x, eps, start="gaussian"):
    """x'_0: x + 0.001·N(0, I) as in the paper and TRADES ("gaussian"), or uniform in the ball as in [1] ("uniform")."""
    if start not in ("gaussian", "uniform"):
        raise InputError(f"start must be 'gaussian' or 'uniform', not {start!r}")
    noise = 0.001 * torch.randn_like(x) if start == "gaussian" else eps * (2 * torch.rand_like(x) - 1)
    return project(x + noise, x, eps)


def check(x, y, eps=0.5, steps=1, step_size=1.0):
    """Raise InputError unless x is a batch of images (B, C, H, W) in [0, 1], y their classes, int64 (B,), 0 < eps < 1,
    steps a positive whole number and 0 < step_size <= 1. What is not given is not checked."""
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        raise InputError(f"images and labels must be torch tensors, not {type(x).__name__} and {type(y).__name__}")
    if x.dim() != 4 or not x.is_floating_point() or x.numel() == 0:
        raise InputError(f"images must be a float tensor (B, C, H, W), not {x.dtype} {tuple(x.shape)}")
    if not (x.min() >= 0 and x.max() <= 1):
        raise InputError(f"images must lie in [0, 1] but reach from {x.min():.3g} to {x.max():.3g}: "
                         "divide by 255, and normalise inside the model")
    if y.shape != x.shape[:1] or y.dtype != torch.int64 or y.min() < 0:
        raise InputError(f"labels must be {len(x)} class numbers from 0 up, one per image: int64, not {y.dtype} "
                         f"{tuple(y.shape)}")
    if not (isinstance(eps, Real) and 0 < eps < 1):
        raise InputError(f"eps must be above 0 and below 1 (pixels are in [0, 1]; write 8/255), not {eps!r}")
    if not (isinstance(steps, Integral) and steps >= 1):
        raise InputError(f"steps must be a positive whole number, not {steps!r}")
    if not (isinstance(step_size, Real) and 0 < step_size <= 1):
        raise InputError(f"step_size must be above 0 and at most 1 (pixels are in [0, 1]), not {step_size!r}")


# ---- 2. Objectives: θ descends the outer loss, x' ascends the inner one; any maximiser works with any of them --------

class AdvTrain:
    """min_θ max_x' CE(f(x'), y)  [1]; the base class of all objectives."""

    beta = 1.0  # in x', the outer loss of AdvTrain and Trades is beta times the batch mean of the inner one

    def target(self, model, x, y):
        """What the inner loss is measured against, computed once per batch: the labels, (B,)."""
        return y

    def inner_loss(self, logits, target):
        """Loss of each image, (B,), from the logits at x'. The inner maximiser ascends it."""
        return F.cross_entropy(logits, target, reduction="none")

    def outer_loss(self, model, x, x_adv, y):
        """Mean over the batch, a scalar. The classifier descends it."""
        return F.cross_entropy(model(x_adv), y)


class Trades(AdvTrain):
    """min_θ CE(f(x), y) + β·max_x' KL(f(x) ‖ f(x'))  [2]. The inner loss leaves the labels out."""

    def __init__(self, beta=6.0):
        if not (isinstance(beta, Real) and 0 < beta < math.inf):
            raise InputError(f"beta must be above 0, not {beta!r}")
        self.beta = beta

    def target(self, model, x, y):
        """log f(x), (B, classes). x stays where it is while x' moves, so one pass per batch is enough."""
        with torch.no_grad():
            return F.log_softmax(model(x), dim=1)

    def inner_loss(self, logits, target):
        """KL(f(x) ‖ f(x')) of each image, from log-probabilities: finite however extreme the logits are."""
        return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="none", log_target=True).sum(1)

    def outer_loss(self, model, x, x_adv, y):
        # Unlike in the inner problem, gradients flow into f(x) as well: θ moves both ends of the KL. One pass for x and
        # x': batch norm then learns and runs on the same mixture. With two, neither is the classifier that is attacked.
        logits, logits_adv = model(torch.cat([x, x_adv])).chunk(2)  # (B, classes) each
        robust = self.inner_loss(logits_adv, F.log_softmax(logits, dim=1)).mean()
        return F.cross_entropy(logits, y) + self.beta * robust


class Margin(AdvTrain):
    """The inner loss of [3], for attacks: the best wrong logit minus the true one. It does not saturate."""

    def inner_loss(self, logits, target):
        true = logits.gather(1, target[:, None])[:, 0]
        wrong = logits.scatter(1, target[:, None], -math.inf).amax(1)
        return wrong - true


# ---- 3. Attacks: the hand-made inner maximisers ---------------------------------------------------------------------

@contextmanager
def eval_mode(model):
    """Evaluation mode inside, and afterwards every sub-module's own mode again: an attack leaves no trace."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def input_gradient(model, x_adv, objective, target):
    """g_t = ∇_x' of the inner loss, one gradient per image (B, C, H, W), and the losses (B,).

    autograd.grad asks for the input's gradient alone: nothing is computed for, or left on, the weights.
    """
    with torch.enable_grad():
        x_adv = x_adv.detach().requires_grad_()
        loss = objective.inner_loss(model(x_adv), target)
        g, = torch.autograd.grad(loss.sum(), x_adv)
    return g, loss.detach()


def sign(g):
    """sign(g), and NaN where g is NaN: torch.sign makes 0 of it, PGD would stand still, and the model seem robust."""
    return torch.where(g.isnan(), g, g.sign())


@torch.no_grad()
def pgd(model, x, y, *, eps, step_size, steps, objective=AdvTrain(), start="gaussian", line_search=False,
        momentum=False, decay=False):
    """Projected gradient ascent on the objective's inner loss, x' ← Π(x' + step_size·sign(g))  [1].

    x: (B, C, H, W) in [0, 1]; y: (B,) labels; eps, step_size: in [0, 1] pixel scale. Returns x' like x, within eps of
    it. line_search: find each step by backtracking instead, from step_size down. (The paper's evidence that PGD with
    one fixed step is not the best maximiser.) momentum, not with line_search: follow the sum of all gradients so far,
    each over its L1 norm (MI-FGSM)  [5]. decay: step t has size step_size·(1 − t/steps), t = 0, 1, … Raises InputError.
    """
    check(x, y, eps, steps, step_size)
    if line_search and momentum:  # the slope that a line search measures is that of g, not of the sum
        raise InputError("choose line_search or momentum, not both")
    with eval_mode(model):
        target = objective.target(model, x, y)
        x_adv, gathered = start_point(x, eps, start), 0.0  # (B, C, H, W), like g
        for t in range(steps):
            g, loss = input_gradient(model, x_adv, objective, target)
            if momentum:
                norm = g.abs().sum((1, 2, 3), keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)  # (B, 1, 1, 1)
                g = gathered = gathered + g / norm
            step = step_size * (1 - t / steps) if decay else step_size
            if line_search:
                step = backtrack(model, x_adv, x, g, loss, objective, target, eps, step)
            x_adv = project(x_adv + step * sign(g), x, eps)
    return x_adv


def backtrack(model, x_adv, x, g, loss, objective, target, eps, step_size, trials=4, slope=0.1):
    """The length of a step along sign(g), (B, 1, 1, 1): step_size is halved, image by image, until Armijo's condition
    holds: the loss gains at least `slope` of what its linear model ⟨g, Δ⟩ promises. The last trial is not checked.
    (trials and slope are our choice: steps of eps, eps/2, eps/4 and eps/8 where step_size = eps.)"""
    step, direction = torch.full_like(loss, step_size)[:, None, None, None], sign(g)  # (B, 1, 1, 1), (B, C, H, W)
    for _ in range(trials - 1):
        x_new = project(x_adv + step * direction, x, eps)
        promised = (g * (x_new - x_adv)).sum((1, 2, 3))  # (B,)
        enough = objective.inner_loss(model(x_new), target) >= loss + slope * promised
        step = torch.where(enough[:, None, None, None], step, step / 2)
    return step


def cw_linf(model, x, y, *, eps, step_size, steps):
    """PGD on Carlini & Wagner's margin loss, the C&W-∞ attack of the field's tables  [3]. Arguments as for pgd."""
    return pgd(model, x, y, eps=eps, step_size=step_size, steps=steps, objective=Margin())


# ---- 4. Evaluation --------------------------------------------------------------------------------------------------

def evaluate(model, x, y, attacks, batch_size=256, details=False, quick=False):
    """Accuracies in [0, 1]: {"natural": …, each attack's name: …, "worst": …}.

    x: (N, C, H, W) in [0, 1]; y: (N,); attacks: {name: callable(model, x, y) → x_adv}. "worst" counts the images that
    are classified correctly as they are and under every attack: the number to quote. details: return two things more,
    the mean cross-entropy that each attack reached, which ranks them as maximisers, and which images survive all, (N,).
    quick: an image that is broken is not attacked again. That is faster, and "worst" means the same, but each accuracy
    counts the images that survive this attack and all before it, and losses are of the images attacked. Raises
    InputError, NotFinite.
    """
    check(x, y)
    accuracy, loss, survives = {}, {}, torch.ones_like(y, dtype=torch.bool)
    for name, attack in {"natural": lambda model, x, y: x, **attacks}.items():
        attacked = survives.clone() if quick else torch.ones_like(survives)  # (N,)
        correct, each_loss = under_attack(model, x[attacked], y[attacked], attack, batch_size, name)
        survives[attacked] &= correct
        counted = survives if quick else correct
        accuracy[name], loss[name] = counted.double().mean().item(), each_loss.mean().item()
    accuracy["worst"] = survives.double().mean().item()
    return (accuracy, loss, survives) if details else accuracy


def under_attack(model, x, y, attack, batch_size=256, label=""):
    """Whether each image is classified correctly after `attack`, and its cross-entropy there; (N,) each.
    An attack that returns anything but images in [0, 1] is refused: NaN would pass for a perfect attack."""
    if not (isinstance(batch_size, Integral) and batch_size >= 1):
        raise InputError(f"batch_size must be a positive whole number, not {batch_size!r}")
    correct, loss = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y, dtype=x.dtype)
    with eval_mode(model):
        for i in progress(range(0, len(x), batch_size), label):
            batch = slice(i, i + batch_size)
            xb, yb = x[batch], y[batch]
            x_adv = attack(model, xb, yb)
            if x_adv.shape != xb.shape or not (x_adv.min() >= 0 and x_adv.max() <= 1):
                raise InputError(f"the attack {label} returned something other than images in [0, 1]")
            with torch.no_grad():
                logits = model(x_adv)
            if not logits.isfinite().all():
                raise NotFinite("the model's logits are not finite")
            correct[batch], loss[batch] = logits.argmax(1) == yb, F.cross_entropy(logits, yb, reduction="none")
    return correct, loss


def progress(items, label):
    """Yield the items of a sequence; on a terminal, and only there, with a bar and the time left on stderr."""
    start = time.time()
    for done, item in enumerate(items):
        if sys.stderr.isatty():
            left = (time.time() - start) / max(done, 1) * (len(items) - done)
            print(f"\r{label} [{'#' * (20 * done // len(items)):20}] {done}/{len(items)}, {left:.0f} s left\033[K",
                  end="", file=sys.stderr, flush=True)
        yield item
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- 5. Classifiers: images in [0, 1], (B, C, H, W) → logits (B, classes) -------------------------------------------

class Classifier(nn.Module):
    """A network behind its own normalisation, so that eps means the same for every model and attack. The buffers `mean`
    and `std` travel in the state_dict; `normalize_like` sets them from training images."""

    def __init__(self, in_channels, *layers):
        super().__init__()
        self.register_buffer("mean", torch.full((1, in_channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((1, in_channels, 1, 1), 0.25))
        self.layers = nn.Sequential(*layers)

    def normalize_like(self, x):
        """Take each channel's mean and standard deviation from uint8 images x (N, C, H, W)."""
        x = to_unit(x.transpose(0, 1).flatten(1))  # (C, N·H·W)
        self.mean.copy_(x.mean(1).view_as(self.mean))
        self.std.copy_(x.std(1).clamp(min=1e-3).view_as(self.std))

    def forward(self, x):
        if x.dim() != 4 or x.shape[1] != self.mean.shape[1]:
            raise InputError(f"this model takes images (B, {self.mean.shape[1]}, H, W), not {tuple(x.shape)}")
        return self.layers((x - self.mean) / self.std)


def conv(in_channels, out_channels, kernel=3, stride=1):
    """A convolution that keeps the size, or divides it by the stride. Batch norm comes after it, so it has no bias."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, bias=False)


class Residual(nn.Module):
    """body(x) + shortcut(x)."""

    def __init__(self, body, shortcut):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


class SmallCNN(Classifier):
    """Three convolutions with batch norm, 0.13 M weights, that learn fast on a CPU. Any input of 4×4 or more."""

    def __init__(self, in_channels=1, num_classes=10):
        super().__init__(
            in_channels,
            conv(in_channels, 32, 4, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            conv(32, 64, 4, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            conv(64, 128), nn.BatchNorm2d(128), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128 * 16, num_classes))


class CNN4(Classifier):
    """Four convolutions without batch norm, 0.31 M weights: for MNIST, close to the classifier of [2] there."""

    def __init__(self, in_channels=1, num_classes=10):
        layers = []
        for last, width in ((in_channels, 32), (32, 64)):
            layers += [nn.Conv2d(last, width, 3, padding=1), nn.ReLU(),
                       nn.Conv2d(width, width, 4, stride=2, padding=1), nn.ReLU()]
        super().__init__(in_channels, *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, 200),
                         nn.ReLU(), nn.Linear(200, num_classes))
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
        with torch.no_grad():  # logits near 0: with large ones the attack wins at once, and training never starts
            self.layers[-1].weight.mul_(0.1)


class VGG16(Classifier):
    """VGG-16 with batch norm for 32×32 images (Simonyan & Zisserman 2015), 14.7 M weights: the paper's first model."""

    def __init__(self, in_channels=3, num_classes=10):
        layers, last = [], in_channels
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            layers += [conv(last, width), nn.BatchNorm2d(width), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            last = width or last
        super().__init__(in_channels, *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


class ResNet18(Classifier):
    """ResNet-18 for 32×32 images (He et al. 2016; 3×3 stem, no first pooling), 11.2 M weights: the field's usual."""

    def __init__(self, in_channels=3, num_classes=10):
        def block(last, width, stride):
            body = nn.Sequential(conv(last, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(),
                                 conv(width, width), nn.BatchNorm2d(width))
            projection = nn.Sequential(conv(last, width, 1, stride), nn.BatchNorm2d(width))
            return [Residual(body, nn.Identity() if last == width else projection), nn.ReLU()]

        layers, last = [conv(in_channels, 64), nn.BatchNorm2d(64), nn.ReLU()], 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += block(last, width, stride) + block(width, width, 1)
            last = width
        super().__init__(in_channels, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


class WideResNet(Classifier):
    """WideResNet-34-10 by default (Zagoruyko & Komodakis 2016), 46.2 M weights: the paper's second model."""

    def __init__(self, in_channels=3, num_classes=10, depth=34, width=10):
        def block(last, width, stride):
            first = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU())
            rest = nn.Sequential(conv(last, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(), conv(width, width))
            if last == width:
                return Residual(nn.Sequential(first, rest), nn.Identity())
            return nn.Sequential(first, Residual(rest, conv(last, width, 1, stride)))

        layers, last = [conv(in_channels, 16)], 16
        for channels, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            layers.append(block(last, channels, stride))
            layers += [block(channels, channels, 1) for _ in range((depth - 4) // 6 - 1)]
            last = channels
        super().__init__(in_channels, *layers, nn.BatchNorm2d(last), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(last, num_classes))


MODELS = {"small": SmallCNN, "cnn4": CNN4, "vgg16": VGG16, "resnet18": ResNet18, "wrn34": WideResNet}


# ---- 6. Data: uint8 on disk and on the device, float in [0, 1] batch by batch ---------------------------------------

class Dataset(NamedTuple):
    """Images uint8 (N, C, H, W), labels int64 (N,)."""
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


DATASETS = "synthetic", "mnist", "cifar10"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
HOMES = ".", "mnist", "MNIST/raw", "cifar-10-batches-bin", "cifar-10-batches-py"  # below the folder that is named
CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def load_dataset(name, data_dir=None):
    """Read "synthetic", "mnist" or "cifar10" → Dataset. Files are looked for in data_dir, else in $MNIST_DIR or
    $CIFAR10_DIR, else in data/, to which CIFAR-10 is downloaded if it is not there. Raises InputError."""
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    if name == "synthetic":
        return synthetic()
    named = data_dir or os.environ.get(f"{name.upper()}_DIR")
    root = Path(named or "data")
    if name == "mnist":
        first, endings, read = "train-images-idx3-ubyte", ("", ".gz"), read_mnist
    else:
        first, endings, read = "data_batch_1", (".bin", ""), read_cifar10
    for folder in (root / home for home in HOMES):
        for ending in endings:
            if (folder / f"{first}{ending}").exists():
                return read(folder, ending)
    if named or name == "mnist":
        raise InputError(f"no {name} in {root}: put {first}{endings[0]} and its companions there, or name "
                         f"their folder by --data-dir or {name.upper()}_DIR")
    return read_cifar10(download_cifar10(root / "cifar-10-batches-bin"), ".bin")


def download_cifar10(folder):
    """Fetch the binary version from its authors into `folder`, which appears only when it is whole. Returns it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            archive = Path(part, "cifar-10-binary.tar.gz")
            torch.hub.download_url_to_file(CIFAR10_URL, archive, CIFAR10_SHA256, progress=sys.stderr.isatty())
            shutil.unpack_archive(archive, part)
            if not folder.exists():  # another process may have been faster
                Path(part, folder.name).rename(folder)
        return folder
    except Exception as error:  # no network, a broken connection, a full disk
        raise InputError(f"CIFAR-10 could not be downloaded ({one_line(error)}): unpack cifar-10-binary.tar.gz into "
                         f"{folder.parent}, or name its folder by --data-dir or CIFAR10_DIR") from None


def read_mnist(folder, ending):
    """The four idx files → Dataset. Each holds 0, 0, 8 (uint8), the number of dimensions, their sizes, the values."""
    def read(name, dims):
        with as_input_error(folder / f"{name}-idx{dims}-ubyte{ending}") as path:
            raw = gzip.decompress(path.read_bytes()) if ending == ".gz" else path.read_bytes()
            if raw[:4] != bytes((0, 0, 8, dims)):
                raise ValueError(f"not an idx file of {dims} dimension(s)")
            shape = np.frombuffer(raw, ">u4", dims, offset=4)
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)

    return to_dataset(folder, read("train-images", 3)[:, None], read("train-labels", 1),  # (N, 1, 28, 28), (N,)
                      read("t10k-images", 3)[:, None], read("t10k-labels", 1))


def read_cifar10(folder, ending):
    """The six batches → Dataset. Binary ones hold records of 1 label byte and 1,024 red, green and blue bytes each."""
    def read_binary(path):
        with as_input_error(path):
            records = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 3073)
            return records[:, 1:], records[:, 0]

    read = read_binary if ending == ".bin" else read_pickle
    pixels, labels = zip(*(read(folder / f"{name}{ending}") for name in CIFAR10_FILES))  # (N, 3072), (N,) each
    if len({len(part) for part in (*pixels, *labels)}) > 1:
        raise InputError(f"the batches in {folder} differ in size, so one is truncated: fetch them again")
    return to_dataset(folder, np.concatenate(pixels[:5]).reshape(-1, 3, 32, 32), np.concatenate(labels[:5]),
                      pixels[5].reshape(-1, 3, 32, 32), labels[5])


def read_pickle(path):
    """One file of cifar-10-batches-py, a pickled dictionary. It is not unpickled, so nothing can be executed: its
    opcodes are read as text. The pixels are the longest string in it, the labels the integers after "labels"."""
    with as_input_error(path):
        strings, labels = [b""], []
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if isinstance(argument, (str, bytes, bytearray)):
                strings.append(argument.encode("latin1") if isinstance(argument, str) else bytes(argument))
            elif "INT" in opcode.name and strings[-1] == b"labels":
                labels.append(argument)
        return np.frombuffer(max(strings, key=len), np.uint8).reshape(len(labels), 3072), np.array(labels)


@contextmanager
def as_input_error(path):
    """Whatever goes wrong inside is the file's fault: a damaged one can raise anything."""
    try:
        yield path
    except Exception as error:
        raise InputError(f"cannot use {path}: it is missing, damaged or does not fit ({one_line(error)})") from None


def one_line(error):
    """What somebody else's exception says, for an InputError."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def to_dataset(folder, x_train, y_train, x_test, y_test):
    """uint8 arrays → Dataset. Raises InputError unless each image has a label and each label is in 0 … 9."""
    for x, y in ((x_train, y_train), (x_test, y_test)):
        if len(x) != len(y) or len(y) == 0 or y.min() < 0 or y.max() > 9:
            raise InputError(f"{folder} is damaged: {len(x)} images and {len(y)} labels, or a label outside 0 to 9")
    x_train, y_train, x_test, y_test = (torch.from_numpy(part.copy()) for part in (x_train, y_train, x_test, y_test))
    return Dataset(x_train, y_train.long(), x_test, y_test.long())


def synthetic(n_train=4000, n_test=1000, size=16):
    """Small colour images with two patterns per class, after [4]. A coarse one (4×4 blocks) survives eps = 8/255 but
    is drawn from all classes once in ten images; a fine one (single pixels, amplitude 6/255) is always right, but
    weaker than the attack. So a plain model leans on the fine one, and falls."""
    rng = np.random.default_rng(0)
    coarse = rng.choice([-1.0, 1.0], (10, 3, size // 4, size // 4)).repeat(4, 2).repeat(4, 3)  # (10, 3, size, size)
    fine = np.tile(rng.choice([-1.0, 1.0], (10, 3, 4, 4)), (1, 1, size // 4, size // 4))
    y = rng.integers(0, 10, n_train + n_test)
    seen = np.where(rng.random(len(y)) < 0.9, y, rng.integers(0, 10, len(y)))
    contrast = rng.uniform(0, 0.3, (len(y), 1, 1, 1))
    x = 0.5 + contrast * coarse[seen] + 6 / 255 * fine[y] + 0.04 * rng.standard_normal((len(y), 3, size, size))
    x = (x.clip(0, 1) * 255).round().astype(np.uint8)
    return to_dataset("synthetic", x[:n_train], y[:n_train], x[n_train:], y[n_train:])


def hold_out(data, limit=None):
    """Split the training images into training (at most `limit`) and held-out ones: 1,000, or a fifth of a small set.
    Always the same split, whatever the run's seed. Returns (x_train, y_train), (x_held_out, y_held_out). Raises
    InputError."""
    if data.x_train.dtype != torch.uint8 or len(data.x_train) < 5:
        raise InputError(f"a Dataset holds five or more uint8 images, not {len(data.x_train)} of {data.x_train.dtype}")
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    n = min(1000, len(order) // 5)
    train, held_out = order[n:][:limit], order[:n]
    return (data.x_train[train], data.y_train[train]), (data.x_train[held_out], data.y_train[held_out])


def to_unit(x):
    """uint8 images → float in [0, 1]."""
    return x.float() / 255


def augment(x, padding=4):
    """Random crop after padding with black by so many pixels, and random flip; the whole batch at once, on its device.
    (B, C, H, W)"""
    B, _, H, W = x.shape
    shift = torch.randint(0, 2 * padding + 1, (2, B), device=x.device)
    crops = F.pad(x, [padding] * 4).unfold(2, H, 1).unfold(3, W, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
    crop = crops[torch.arange(B, device=x.device), :, shift[0], shift[1]]  # (B, C, H, W)
    keep = torch.rand(B, 1, 1, 1, device=x.device) < 0.5
    return torch.where(keep, crop, crop.flip(3)).contiguous(memory_format=torch.channels_last)
