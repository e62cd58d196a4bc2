"""What was there before the paper: everything that adversarial training needs and a learned optimizer does not change.

    1. threat model     the l-infinity ball of radius eps and the pixel box [0, 1]
    2. objectives       AdvTrain (Madry et al. 2018), Trades (Zhang et al. 2019), Margin (Carlini & Wagner 2017)
    3. attacks          pgd, with an optional backtracking line search, and cw_linf
    4. evaluation       accuracy under each attack, and the per-sample worst case
    5. classifiers      SmallCNN, VGG16, ResNet18, WideResNet; normalisation inside
    6. data             synthetic, MNIST, CIFAR-10 as uint8 tensors

The learned optimizer of "Improved Adversarial Training via Learned Optimizer" (Xiong & Hsieh, ECCV 2020) is in
l2l_adv.py, which imports this file and never the other way round. Images are float tensors in [0, 1], (B, C, H, W);
eps and step sizes are in the same pixel scale, so CIFAR-10's usual radius is eps=8/255.

[1] Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv 1706.06083
[2] Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019, arXiv 1901.08573
[3] Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017, arXiv 1608.04644
[4] Tsipras et al., Robustness May Be at Odds with Accuracy, ICLR 2019, arXiv 1805.12152
"""
import gzip
import math
import os
import pickle
import sys
import time
import zlib
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
    """Numbers that are NaN or infinite; no weight has been touched by them (running statistics of batch norm may be)."""


def one_line(error):
    """What somebody else's exception says, for an InputError."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


# ---- 1. Threat model ------------------------------------------------------------------------------------------------

def project(x_adv, x, eps):
    """Π of the paper: the point nearest to x_adv in the l-infinity ball of radius eps around x and in the box [0, 1]."""
    return torch.clamp(x_adv, (x - eps).clamp(min=0), (x + eps).clamp(max=1))


def start_point(x, eps, start="gaussian"):
    """x'_0: x + 0.001·N(0, I) as in the paper and TRADES ("gaussian"), or uniform in the ball as in [1] ("uniform")."""
    if start not in ("gaussian", "uniform"):
        raise InputError(f"start must be 'gaussian' or 'uniform', not {start!r}")
    # Every process draws the noise of the whole batch and takes its part: N processes see what one alone would.
    rank, world = processes()
    shape, kind = (world * len(x), *x.shape[1:]), {"dtype": x.dtype, "device": x.device}
    noise = 0.001 * torch.randn(shape, **kind) if start == "gaussian" else eps * (2 * torch.rand(shape, **kind) - 1)
    return project(x + noise.chunk(world)[rank], x, eps)


def processes():
    """(rank, number of processes): (0, 1) but under torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def check_images(x, y, values=True):
    """Raise InputError unless x is a batch of images (B, C, H, W) in [0, 1] and y their classes, int64 (B,).
    values=False leaves out what a GPU could only answer by making the host wait."""
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        raise InputError(f"images and labels must be torch tensors, not {type(x).__name__} and {type(y).__name__}")
    if x.dim() != 4 or not x.is_floating_point() or x.numel() == 0:
        raise InputError(f"images must be a float tensor (B, C, H, W), not {x.dtype} {tuple(x.shape)}")
    if values and not (x.min() >= 0 and x.max() <= 1):
        raise InputError(f"images must lie in [0, 1] but reach from {x.min():.3g} to {x.max():.3g}: "
                         "divide by 255, and normalise inside the model")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise InputError(f"labels must be {len(x)} class numbers, one per image: int64, not {y.dtype} {tuple(y.shape)}")
    if values and y.min() < 0:
        raise InputError(f"labels must be class numbers from 0 up, not {y.min()}")


def check_budget(eps, steps, step_size=1.0):
    """Raise InputError unless 0 < eps < 1, steps is a positive whole number and 0 < step_size <= 1."""
    if not (isinstance(eps, Real) and 0 < eps < 1):
        raise InputError(f"eps must be above 0 and below 1 (pixels are in [0, 1]; write 8/255), not {eps!r}")
    if not (isinstance(steps, Integral) and steps >= 1):
        raise InputError(f"steps must be a positive whole number, not {steps!r}")
    if not (isinstance(step_size, Real) and 0 < step_size <= 1):
        raise InputError(f"step_size must be above 0 and at most 1 (pixels are in [0, 1]), not {step_size!r}")


# ---- 2. Objectives: θ descends the outer loss, x' ascends the inner one; any inner maximiser works with any of them 

class AdvTrain:
    """min_θ max_x' CE(f(x'), y)  [1]. An objective of your own keeps to one rule: in x', the outer loss is beta times
    the batch mean of the inner one (the learned optimizer takes its last gradient from the outer loss)."""

    beta = 1.0

    def target(self, model, x, y):
        """What the inner loss is measured against, computed once per batch: the labels, (B,)."""
        return y

    def inner_loss(self, logits, target):
        """Per-sample loss (B,) of the logits at x'; the inner maximiser ascends it."""
        return F.cross_entropy(logits, target, reduction="none")

    def outer_loss(self, model, x, x_adv, y):
        """Batch mean (scalar) that the classifier descends."""
        return F.cross_entropy(model(x_adv), y)


class Trades(AdvTrain):
    """min_θ CE(f(x), y) + β·max_x' KL(f(x) ‖ f(x'))  [2]. The inner loss leaves the labels out."""

    def __init__(self, beta=6.0):
        if not (isinstance(beta, Real) and 0 < beta < float("inf")):
            raise InputError(f"beta must be above 0, not {beta!r}")
        self.beta = beta

    def target(self, model, x, y):
        """log f(x), (B, classes). x stays where it is while x' moves, so one pass per batch is enough."""
        with torch.no_grad():
            return F.log_softmax(model(x), dim=1)

    def inner_loss(self, logits, target):
        """KL(f(x) ‖ f(x')) per sample, from log-probabilities: finite however extreme the logits are."""
        return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="none", log_target=True).sum(1)

    def outer_loss(self, model, x, x_adv, y):
        # Unlike in the inner problem, gradients flow into f(x) as well: θ moves both ends of the KL.
        logits = model(x)
        robust = self.inner_loss(model(x_adv), F.log_softmax(logits, dim=1)).mean()
        return F.cross_entropy(logits, y) + self.beta * robust


class Margin(AdvTrain):
    """The loss of [3]: best wrong logit minus the true one. Does not saturate as cross-entropy does."""

    def inner_loss(self, logits, target):
        true = logits.gather(1, target[:, None])[:, 0]
        wrong = logits.scatter(1, target[:, None], float("-inf")).amax(1)
        return wrong - true

    def outer_loss(self, model, x, x_adv, y):
        return self.inner_loss(model(x_adv), y).mean()


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


def pgd(model, x, y, *, eps, step_size, steps, objective=AdvTrain(), start="gaussian", line_search=False):
    """Projected gradient ascent on the objective's inner loss, x' ← Π(x' + step_size·sign(g))  [1].

    x: (B, C, H, W) in [0, 1]; y: (B,) labels; eps, step_size: in [0, 1] pixel scale. Returns x' like x, within eps of it.
    line_search: find the step by backtracking instead, step_size being the longest one tried (the paper's evidence that
    PGD with one fixed step is not the best maximiser). Raises InputError for inputs outside [0, 1] or a budget that makes
    no sense.
    """
    check_images(x, y)
    check_budget(eps, steps, step_size)
    return sign_ascent(model, x, y, eps, step_size, steps, objective, start, line_search)


@torch.no_grad()
def sign_ascent(model, x, y, eps, step_size, steps, objective, start="gaussian", line_search=False):
    """What pgd does once its input is checked."""
    with eval_mode(model):
        target = objective.target(model, x, y)
        x_adv = start_point(x, eps, start)  # (B, C, H, W), like g
        for _ in range(steps):
            g, loss = input_gradient(model, x_adv, objective, target)
            if line_search:
                x_adv = backtrack(model, x_adv, x, g, loss, objective, target, eps, step_size)
            else:
                x_adv = project(x_adv + step_size * g.sign(), x, eps)
    return x_adv


def backtrack(model, x_adv, x, g, loss, objective, target, eps, step_size, trials=4, slope=0.1):
    """One step of sign ascent whose length is halved, image by image, until Armijo's condition holds:
    the loss gains at least `slope` of what its linear model ⟨g, Δ⟩ promises. The last trial is taken as it is.
    (trials and slope are our choice: steps of eps, eps/2, eps/4 and eps/8 where step_size = eps.)"""
    step = torch.full_like(loss, step_size)[:, None, None, None]  # (B, 1, 1, 1)
    for trial in range(trials):
        x_new = project(x_adv + step * g.sign(), x, eps)
        if trial < trials - 1:
            promised = (g * (x_new - x_adv)).sum((1, 2, 3))  # (B,)
            enough = objective.inner_loss(model(x_new), target) >= loss + slope * promised
            step = torch.where(enough[:, None, None, None], step, step / 2)
    return x_new


def cw_linf(model, x, y, *, eps, step_size, steps, start="gaussian"):
    """PGD on Carlini & Wagner's margin loss, the C&W-∞ attack of the field's tables  [3]. Arguments as for pgd."""
    return pgd(model, x, y, eps=eps, step_size=step_size, steps=steps, objective=Margin(), start=start)


def worst_of(attacks):
    """One attack made of several: of the points x' that they reach, each image's with the largest margin loss, which is
    above 0 where the model errs. So an image survives if it survives them all; its cross-entropy may be higher elsewhere."""
    def attack(model, x, y):
        worst, highest = x, torch.full_like(y, -math.inf, dtype=x.dtype)
        for one in attacks:
            x_adv = one(model, x, y)
            with eval_mode(model), torch.no_grad():
                margin = Margin().inner_loss(model(x_adv), y)  # (B,)
            better = ~(margin <= highest) & ~highest.isnan()  # NaN is taken and kept, for `outcome` to refuse
            worst = torch.where(better[:, None, None, None], x_adv, worst)
            highest = torch.where(better, margin, highest)
        return worst
    return attack


# ---- 4. Evaluation --------------------------------------------------------------------------------------------------

def evaluate(model, x, y, attacks, batch_size=256, worst_only=False, label="", losses=False):
    """Accuracies in [0, 1]: {"natural": …, each attack's name: …, "worst": …}.

    x: (N, C, H, W) in [0, 1]; y: (N,); attacks: {name: callable(model, x, y) → x_adv}. "worst" counts the images that
    are classified correctly as they are and under every attack; it is at most the lowest column, and the number to quote.
    worst_only: an image once broken is not attacked again, and only "natural" and "worst" are returned.
    losses: return a second dictionary too, the mean cross-entropy at x' of the same columns, which ranks the attacks as
    maximisers. Raises InputError.
    """
    check_images(x, y)
    if not (isinstance(batch_size, Integral) and batch_size >= 1):
        raise InputError(f"batch_size must be a positive whole number, not {batch_size!r}")
    survives, natural_loss = outcome(model, x, y, None, batch_size, f"{label} natural")
    accuracy, loss = {"natural": survives.double().mean().item()}, {"natural": natural_loss.mean().item()}
    for name, attack in attacks.items():
        tried = survives if worst_only else torch.ones_like(survives)
        right = torch.zeros_like(survives)
        right[tried], reached = outcome(model, x[tried], y[tried], attack, batch_size, f"{label} {name}")
        survives = survives & right
        if not worst_only:
            accuracy[name], loss[name] = right.double().mean().item(), reached.mean().item()
    accuracy["worst"] = survives.double().mean().item()
    return (accuracy, loss) if losses else accuracy


def outcome(model, x, y, attack, batch_size=256, label=""):
    """Which images the model gets right after `attack` (None: as they are), and their cross-entropy there; (N,) each. An
    attack that returns anything but images in [0, 1] is refused: NaN would pass for a perfect attack. Raises InputError
    and, if the model's answers are not finite, NotFinite."""
    right, loss = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y, dtype=x.dtype)
    with eval_mode(model):
        for i in progress(range(0, len(x), batch_size), label):
            xb, yb = x[i:i + batch_size], y[i:i + batch_size]
            x_adv = xb if attack is None else attack(model, xb, yb)
            if x_adv.shape != xb.shape or not (x_adv.min() >= 0 and x_adv.max() <= 1):
                raise InputError(f"the attack{label} returned something other than images in [0, 1]")
            with torch.no_grad():
                logits = model(x_adv)
            if not logits.isfinite().all():
                raise NotFinite("the model's logits are not finite")
            right[i:i + batch_size] = logits.argmax(1) == yb
            loss[i:i + batch_size] = F.cross_entropy(logits, yb, reduction="none")
    return right, loss


def progress(items, label):
    """Yield the items; on a terminal, and only there, with a bar and the time left on stderr."""
    items, start = list(items), time.time()
    try:
        for done, item in enumerate(items):
            if sys.stderr.isatty():
                left = (time.time() - start) / max(done, 1) * (len(items) - done)
                bar = "#" * (20 * done // len(items))
                print(f"\r{label} [{bar:20}] {done}/{len(items)}, {left:.0f} s left\033[K" if done else f"\r{label}\033[K",
                      end="", file=sys.stderr, flush=True)
            yield item
    finally:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- 5. Classifiers: images in [0, 1], (B, C, H, W) → logits (B, classes) -------------------------------------------

class Classifier(nn.Module):
    """A network behind its own normalisation, so that eps means the same for every model and attack. The buffers `mean`
    and `std` travel in the state_dict; `normalize_like` sets them from training images. bf16: run the layers in that
    precision (weights, logits and the input's gradient stay fp32); for training, never for evaluation."""

    bf16 = False

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
        x = (x - self.mean) / self.std
        if not self.bf16:
            return self.layers(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.layers(x).float()


def conv_bn(in_channels, out_channels, kernel=3, stride=1):
    """A convolution that keeps the size (but for the stride), and batch norm."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
                         nn.BatchNorm2d(out_channels))


class SmallCNN(Classifier):
    """Four convolutions, no batch norm, 0.3 M weights: for MNIST and the synthetic task. Any input of 4×4 or more."""

    def __init__(self, in_channels=1, num_classes=10):
        super().__init__(
            in_channels,
            nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 4, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, 200), nn.ReLU(), nn.Linear(200, num_classes))
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
        with torch.no_grad():  # logits near 0 at first: with large ones the attack wins at once, and training never starts
            self.layers[-1].weight.mul_(0.1)


class VGG16(Classifier):
    """VGG-16 with batch norm for 32×32 images (Simonyan & Zisserman 2015), 14.7 M weights: the paper's first model."""

    def __init__(self, in_channels=3, num_classes=10):
        layers, last = [], in_channels
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            layers += [conv_bn(last, width), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            last = width or last
        super().__init__(in_channels, *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


class ResNetBlock(nn.Module):
    """Two convolutions, batch norm after each, and the shortcut (He et al. 2016)."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.first = conv_bn(in_channels, out_channels, 3, stride)
        self.second = conv_bn(out_channels, out_channels, 3, 1)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv_bn(in_channels, out_channels, 1, stride)

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(Classifier):
    """ResNet-18 for 32×32 images (3×3 stem, no first pooling), 11.2 M weights: the one the field reports most."""

    def __init__(self, in_channels=3, num_classes=10):
        widths = (64, 64, 128, 128, 256, 256, 512, 512)
        blocks = [ResNetBlock(widths[max(i - 1, 0)], w, 2 if i in (2, 4, 6) else 1) for i, w in enumerate(widths)]
        super().__init__(in_channels, conv_bn(in_channels, 64), nn.ReLU(), *blocks,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


class WideBlock(nn.Module):
    """Two convolutions, batch norm and ReLU before each, and the shortcut (Zagoruyko & Komodakis 2016)."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        z = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(z)
        return self.conv2(F.relu(self.bn2(self.conv1(z)))) + shortcut


class WideResNet(Classifier):
    """WideResNet-34-10 by default, 46.2 M weights: the paper's second model."""

    def __init__(self, in_channels=3, num_classes=10, depth=34, width=10):
        blocks, last = [], 16
        for group, channels in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range((depth - 4) // 6):
                blocks.append(WideBlock(last, channels, 2 if group > 0 and i == 0 else 1))
                last = channels
        super().__init__(in_channels, nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False), *blocks,
                         nn.BatchNorm2d(last), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(last, num_classes))


MODELS = {"small": SmallCNN, "vgg16": VGG16, "resnet18": ResNet18, "wrn34": WideResNet}


# ---- 6. Data: uint8 on disk and on the device, float in [0, 1] batch by batch ---------------------------------------

class Dataset(NamedTuple):
    """Images uint8 (N, C, H, W), labels int64 (N,) in 0 … 9."""
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def load_dataset(name, data_dir=None):
    """Read "synthetic", "mnist" or "cifar10" → Dataset. Files are looked for in data_dir, else in $MNIST_DIR or
    $CIFAR10_DIR, else in data/. Raises InputError if a file is missing, truncated or not what its name says."""
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    if name == "synthetic":
        return synthetic()
    folder = find_dataset(name, data_dir)
    if folder is None:
        root, (_, marker, homes) = data_root(name, data_dir), DATASETS[name]
        raise InputError(f"no {name} in {root}: put {marker[0]} and its companions into {root / homes[0]}, or say where "
                         f"they are by --data-dir or {name.upper()}_DIR; --dataset synthetic needs no files")
    return DATASETS[name][0](folder)


def data_root(name, data_dir=None):
    """Where the files of "mnist" or "cifar10" are looked for."""
    return Path(data_dir or os.environ.get(f"{name.upper()}_DIR") or "data")


def find_dataset(name, data_dir=None):
    """The folder that holds the files of "mnist" or "cifar10", or None."""
    root, (_, marker, homes) = data_root(name, data_dir), DATASETS[name]
    folders = (root, *(root / home for home in homes))
    return next((folder for folder in folders if any((folder / file).exists() for file in marker)), None)


def synthetic(n_train=4000, n_test=1000, size=16):
    """Small colour images with two patterns per class, after [4]. A coarse one (4×4 blocks) survives eps = 8/255 but
    is drawn from all classes once in ten images; a fine one (single pixels, amplitude 6/255) is always right, but
    weaker than the attack. So a plain model leans on the fine one, and falls."""
    rng = np.random.default_rng(0)
    coarse = rng.choice([-1.0, 1.0], (10, 3, size // 4, size // 4)).repeat(4, 2).repeat(4, 3)  # (10, 3, size, size)
    fine = np.tile(rng.choice([-1.0, 1.0], (10, 3, 4, 4)), (1, 1, size // 4, size // 4))
    y = rng.integers(0, 10, n_train + n_test)
    seen = np.where(rng.random(len(y)) < 0.9, y, rng.integers(0, 10, len(y)))
    strength = rng.uniform(0, 0.3, (len(y), 1, 1, 1))
    x = 0.5 + strength * coarse[seen] + 6 / 255 * fine[y] + 0.04 * rng.standard_normal((len(y), 3, size, size))
    x = torch.from_numpy((x.clip(0, 1) * 255).round().astype(np.uint8))
    y = torch.from_numpy(y)
    return Dataset(x[:n_train], y[:n_train], x[n_train:], y[n_train:])


def read_bytes(path):
    """The file's bytes, unpacked if its name ends in .gz."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            return file.read(2 ** 30)  # far more than either data set has: a file that unpacks to more is not one of them
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from None


def read_idx(path, dims):
    """One file of MNIST's format: 0, 0, type 8 (uint8), number of dimensions, their sizes (big-endian), the values."""
    path = path if path.exists() else path.with_name(path.name + ".gz")
    raw = read_bytes(path)
    header = 4 + 4 * dims
    shape = [int.from_bytes(raw[i:i + 4], "big") for i in range(4, header, 4)]
    if raw[:4] != bytes((0, 0, 8, dims)) or len(raw) != header + math.prod(shape):
        raise InputError(f"{path} is not an idx file of {dims} dimension(s), or is truncated: fetch it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def read_mnist(folder):
    """The four idx files, gzipped or not → Dataset."""
    def part(name):
        x = read_idx(folder / f"{name}-images-idx3-ubyte", 3)[:, None]  # (N, 1, 28, 28)
        return check_records(x, read_idx(folder / f"{name}-labels-idx1-ubyte", 1).long(), folder)
    return Dataset(*part("train"), *part("t10k"))


def read_cifar10(folder):
    """The binary version (data_batch_1.bin …) or, where only that is there, the pickled one (data_batch_1 …)."""
    suffix, reader = (".bin", read_binary) if (folder / "data_batch_1.bin").exists() else ("", read_pickle)
    batches = [reader(folder / f"{name}{suffix}") for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    if len({len(x) for x, _ in batches}) > 1:
        raise InputError(f"the batches in {folder} differ in size, so one is truncated: fetch them again")
    xs, ys = zip(*batches)
    return Dataset(torch.cat(xs[:5]), torch.cat(ys[:5]), xs[5], ys[5])


def read_binary(path):
    """CIFAR-10's binary records: 1 label byte, then 1,024 red, 1,024 green and 1,024 blue bytes, row by row."""
    raw = read_bytes(path)
    if not raw or len(raw) % 3073:
        raise InputError(f"{path} is empty or truncated ({len(raw)} bytes, records have 3073): fetch it again")
    records = torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, 3073).copy())
    return check_records(records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].long(), path)


class Inert:
    """Stands for whatever a pickle names: remembers what it is given and does nothing."""

    def __init__(self, *args):
        self.args = self.state = args

    def __setstate__(self, state):
        self.state = state


class InertUnpickler(pickle._Unpickler):  # the one in Python: that in C prints lines of its own for some damaged files
    """Reads CIFAR-10's batches without importing or running anything: an array becomes an Inert that holds its bytes."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "_frombuffer", "ndarray", "dtype"):
            return Inert
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, _: text.encode("latin1")
        raise InputError(f"refused: it asks for {module}.{name}, which CIFAR-10 does not need")


def read_pickle(path):
    """One file of cifar-10-batches-py: a dictionary with b"data", uint8 (N, 3072), and b"labels", a list."""
    try:
        with open(path, "rb") as file:
            batch = InertUnpickler(file, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        array, labels = batch["data"], torch.tensor([int(label) for label in batch["labels"]])
        raw = array.state[-1] if isinstance(array.state[-1], bytes) else array.args[0]
        pixels = torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(len(labels), 3, 32, 32).copy())
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"cannot read {path} as a batch of CIFAR-10: {one_line(error)}") from None
    return check_records(pixels, labels.long(), path)


def check_records(x, y, path):
    """Return images and labels if they are as many as each other and every label is in 0 … 9."""
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"{path} holds {len(x)} images but {len(y)} labels")
    if y.min() < 0 or y.max() > 9:
        raise InputError(f"{path} holds a label {y.max() if y.max() > 9 else y.min()}, outside 0 to 9: it is damaged")
    return x, y


DATASETS = {  # name: (reader, a file that shows that the folder is the one, where it may lie under the data folder)
    "synthetic": None,
    "mnist": (read_mnist, ("train-images-idx3-ubyte.gz", "train-images-idx3-ubyte"), ("mnist", "MNIST/raw")),
    "cifar10": (read_cifar10, ("data_batch_1.bin", "data_batch_1"), ("cifar-10-batches-bin", "cifar-10-batches-py")),
}


def hold_out(data, limit=None):
    """Split the training images into training (at most `limit`) and held-out ones: 1,000, or a fifth of a small set.
    Always the same split, whatever the run's seed. Returns (x_train, y_train), (x_held_out, y_held_out)."""
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    n = min(1000, len(order) // 5)
    train, held_out = order[n:][:limit], order[:n]
    return (data.x_train[train], data.y_train[train]), (data.x_train[held_out], data.y_train[held_out])


def to_unit(x):
    """uint8 images → float in [0, 1]."""
    return x.float() / 255


def augment(x, padding=4):
    """Random crop after padding with black, and random flip; the whole batch at once, on its device. (B, C, H, W)"""
    B, _, H, W = x.shape
    shift = torch.randint(0, 2 * padding + 1, (2, B, 1), device=x.device)
    rows = torch.arange(H, device=x.device) + shift[0]  # (B, H)
    cols = torch.arange(W, device=x.device) + shift[1]  # (B, W)
    cols = torch.where(torch.rand(B, 1, device=x.device) < 0.5, cols, cols.flip(1))
    padded = F.pad(x, [padding] * 4).permute(0, 2, 3, 1)  # (B, H+2p, W+2p, C)
    image = torch.arange(B, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)  # (B, C, H, W), channels last
