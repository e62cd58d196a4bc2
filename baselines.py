"""Everything that adversarial training needs besides the learned optimizer of l2l_adv.py.

Images are floats in [0, 1] of shape (B, C, H, W). eps and step sizes have the same scale: 8/255.

[1] Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018
[2] Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019
[3] Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017
[4] Tsipras et al., Robustness May Be at Odds with Accuracy, ICLR 2019
SPDX-License-Identifier: MIT
"""
import gzip
import http.client
import io
import os
import pickle
import shutil
import sys
import tempfile
import warnings
import zlib
from collections import namedtuple
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

if [int(part) for part in torch.__version__.split(".")[:2]] < [2, 1]:
    print(f"torch {torch.__version__} is older than 2.1, the oldest we tested", file=sys.stderr)


# ---- 1. Threat model -----------------------------------------------------------------------------

SLACK = 1e-6  # for rounding, at the edges of the ball and of [0, 1]


class InputError(ValueError):
    """A mistake of the user, said in one line. The command line prints it and exits with 2."""


def project(x_adv, x, eps):
    """Π of the paper: the nearest point of the l∞ ball around x and of [0, 1]."""
    return torch.clamp(x_adv, (x - eps).clamp(min=0), (x + eps).clamp(max=1))


def random_start(x, eps, start):
    """x'_0: "gaussian" is x + 0.001·N(0, I), as in the paper; "uniform" is anywhere in the ball."""
    if start == "gaussian":
        noise = 0.001 * torch.randn_like(x)
    elif start == "uniform":
        noise = eps * (2 * torch.rand_like(x) - 1)
    else:
        raise InputError(f"start must be 'gaussian' or 'uniform', not {start!r}")
    return project(x + noise, x, eps)


def check_batch(x, y, eps=0.5, steps=1, step_size=0.5):
    """Check images (B, C, H, W) in [0, 1], labels (B,) and the settings of an attack. Returns x,
    clipped to [0, 1], and y, both as new tensors. Raises InputError."""
    if not torch.is_tensor(x) or x.dim() != 4 or not x.is_floating_point() or not len(x):
        raise InputError("images must be a float tensor (B, C, H, W)")
    if not (x.min() >= -SLACK and x.max() <= 1 + SLACK):  # NaN is refused too
        raise InputError("images must lie in [0, 1]: divide by 255, and normalize in the model")
    if not torch.is_tensor(y) or y.shape != x.shape[:1] or y.dtype != torch.int64 or y.min() < 0:
        raise InputError("labels must be an int64 tensor (B,), one class number from 0 per image")
    if not (isinstance(steps, Integral) and steps >= 1):
        raise InputError(f"steps must be a positive whole number, not {steps!r}")
    for name, size in (("eps", eps), ("step_size", step_size)):
        if not (isinstance(size, Real) and 0 < size <= 1):
            raise InputError(f"{name} must be above 0 and at most 1, like 8/255, not {size!r}")
    return x.clamp(0, 1), y.clone()


# ---- 2. Objectives -------------------------------------------------------------------------------
# The attack ascends the inner loss, the classifier descends the outer one.

class AdvTrain:
    """min_θ max_x' CE(f(x'), y)  [1]. Other objectives inherit from it."""

    beta = 1.0  # the weight of the inner loss in the outer one

    def target(self, model, x, y):
        """What the inner loss compares with, computed once per attack. Here: y, (B,)."""
        return y

    def inner_loss(self, logits, target):
        """The loss of each image, (B,), from the logits at x'."""
        return F.cross_entropy(logits, target, reduction="none")

    def outer_loss(self, model, x, x_adv, y):
        """The mean loss over the batch, a scalar."""
        return F.cross_entropy(model(x_adv), y)


class Trades(AdvTrain):
    """min_θ CE(f(x), y) + β·max_x' KL(f(x) ‖ f(x'))  [2]."""

    def __init__(self, beta=6.0):
        if not (isinstance(beta, Real) and beta > 0):
            raise InputError(f"beta must be above 0, not {beta!r}")
        self.beta = beta

    def target(self, model, x, y):
        with torch.no_grad():
            return model(x).log_softmax(1)  # log f(x), (B, classes)

    def inner_loss(self, logits, target):
        return F.kl_div(logits.log_softmax(1), target, reduction="none", log_target=True).sum(1)

    def outer_loss(self, model, x, x_adv, y):
        """One pass for x and x', so that batch norm has the same statistics for both."""
        logits, logits_adv = model(torch.cat([x, x_adv])).chunk(2)  # (B, classes) each
        robust = self.inner_loss(logits_adv, logits.log_softmax(1)).mean()
        return F.cross_entropy(logits, y) + self.beta * robust


class Margin(AdvTrain):
    """The inner loss of C&W [3]: the best wrong logit minus the true one."""

    def inner_loss(self, logits, target):
        true = logits.gather(1, target[:, None])[:, 0]
        wrong = logits.scatter(1, target[:, None], float("-inf")).amax(1)
        return wrong - true


# ---- 3. Attacks ----------------------------------------------------------------------------------

@contextmanager
def eval_mode(model):
    """Put the model into evaluation mode, then restore the mode of every submodule."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_model(model, x, y):
    """Try the model on two images: it has to return logits with a class for every label in y.
    Raises InputError."""
    with torch.no_grad():
        logits = model(x[:2])  # (2, classes)
    classes = max(2, y.max().item() + 1)
    if not torch.is_tensor(logits) or logits.dim() != 2 or logits.shape[1] < classes:
        raise InputError(f"the model must return logits (B, {classes} or more), not "
                         f"{getattr(logits, 'shape', type(logits))}")
    if logits.min() >= 0 and ((logits.sum(1) - 1).abs() < 1e-3).all():
        raise InputError("the model must return logits, not probabilities: leave out its softmax")


def input_gradient(model, x_adv, objective, target):
    """g_t = ∇_x' of the inner loss of each image, (B, C, H, W), and the losses, (B,)."""
    with torch.enable_grad():
        x_adv = x_adv.detach().requires_grad_()
        loss = objective.inner_loss(model(x_adv), target)
        g, = torch.autograd.grad(loss.sum(), x_adv)  # leaves no gradient on the weights
    return g, loss.detach()


@torch.inference_mode(False)  # so that it works inside the caller's torch.inference_mode() as well
@torch.no_grad()
def pgd(model, x, y, *, eps, step_size, steps, objective=AdvTrain(), start="gaussian",
        decay=False, line_search=False):
    """Projected gradient ascent on the inner loss, x' ← Π(x' + step_size·sign(g))  [1].

    x: (B, C, H, W) in [0, 1]; y: (B,) labels; eps, step_size: in [0, 1] pixel scale. decay: step t
    has size step_size·(1 − t/steps). line_search: each image halves its step, three times at most,
    until the loss gains a tenth of what its linear model promises. Returns x'. Raises InputError.
    """
    x, y = check_batch(x, y, eps, steps, step_size)
    with eval_mode(model):
        check_model(model, x, y)
        target = objective.target(model, x, y)
        x_adv = random_start(x, eps, start)
        for t in range(steps):
            g, loss = input_gradient(model, x_adv, objective, target)
            # torch.sign turns NaN into 0. PGD would stand still: the model would look robust.
            direction = torch.where(g.isnan(), g, g.sign())
            step = step_size * (1 - t / steps) if decay else step_size
            if line_search:
                step = torch.full_like(loss, step)[:, None, None, None]  # (B, 1, 1, 1)
                for _ in range(3):
                    x_new = project(x_adv + step * direction, x, eps)
                    promised = (g * (x_new - x_adv)).sum((1, 2, 3))  # (B,)
                    enough = objective.inner_loss(model(x_new), target) >= loss + 0.1 * promised
                    step = torch.where(enough[:, None, None, None], step, step / 2)
            x_adv = project(x_adv + step * direction, x, eps)
    return x_adv


# ---- 4. Evaluation -------------------------------------------------------------------------------

@torch.inference_mode(False)  # as for pgd; attacks of other libraries may need gradients
def evaluate(model, x, y, attacks, *, batch_size=256, eps=None, seed=0):
    """Attack every image with every attack, each from the same random seed of torch.

    x: (N, C, H, W) in [0, 1]; y: (N,); attacks: {name: callable(model, x, y) → x_adv}; eps: the
    radius of a ball that no attack may leave. Returns two dictionaries of tensors (N,), with the
    keys "natural" and the attacks: whether each image is classified correctly, and its
    cross-entropy. The first has "worst" too: correct under all of them. Warns if over a tenth of
    the images have a zero gradient. Raises InputError, and FloatingPointError for NaN.
    """
    radius = 1.0 if eps is None else eps
    x, y = check_batch(x, y, radius)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    if "natural" in attacks or "worst" in attacks:
        raise InputError("an attack cannot be called 'natural' or 'worst': choose another name")
    correct = {}
    loss = {}
    zero = 0
    for name, attack in {"natural": lambda model, x, y: x, **attacks}.items():
        correct[name] = torch.zeros_like(y, dtype=torch.bool)
        loss[name] = torch.zeros_like(y, dtype=x.dtype)
        with eval_mode(model), torch.random.fork_rng([x.device] if x.is_cuda else []):
            if name == "natural":
                check_model(model, x, y)
            torch.manual_seed(seed)
            for batch in progress(torch.arange(len(x), device=x.device).split(batch_size), name):
                logits = attacked_logits(name, attack, model, x[batch], y[batch], radius)
                correct[name][batch] = logits.argmax(1) == y[batch]
                loss[name][batch] = F.cross_entropy(logits, y[batch], reduction="none")
                if name == "natural" and attacks:
                    zero += count_zero_gradients(model, x[batch], y[batch])
    if zero > 0.1 * len(x):
        warnings.warn(f"{zero} of {len(x)} images have a zero gradient: attacks that follow it may "
                      "not move them, and the model may be less robust than it looks")
    correct["worst"] = torch.stack(list(correct.values())).all(0)
    return correct, loss


def attacked_logits(name, attack, model, x, y, radius):
    """Attack a batch, check what the attack returns, and return the logits there, (B, classes)."""
    x_adv = attack(model, x.clone(), y)  # the attack may change its own copy
    if getattr(x_adv, "shape", None) != x.shape:
        raise InputError(f"the attack {name!r} must return images {tuple(x.shape)}, not "
                         f"{getattr(x_adv, 'shape', type(x_adv))}")
    if x_adv.isnan().any():
        raise FloatingPointError(f"the attack {name!r} returned NaN")
    if (x_adv - project(x_adv, x, radius)).abs().max() > SLACK:
        raise InputError(f"the attack {name!r} left [0, 1] or the ball of radius eps")
    with eval_mode(model), torch.no_grad():  # the attack may have changed the mode
        logits = model(x_adv.clamp(0, 1))
    if not logits.isfinite().all():
        raise FloatingPointError(f"{name}: the model's logits are NaN or infinite")
    return logits


def count_zero_gradients(model, x, y):
    """The number of images, (B, C, H, W), where the cross-entropy has an all-zero gradient."""
    with torch.enable_grad():
        loss = F.cross_entropy(model(x.requires_grad_()), y, reduction="sum")
    if not loss.requires_grad:
        return len(x)
    g, = torch.autograd.grad(loss, x, materialize_grads=True)
    return (g == 0).flatten(1).all(1).sum().item()


def progress(items, label):
    """Yield the items of a sequence. On a terminal, show a bar on stderr."""
    shown = sys.stderr is not None and sys.stderr.isatty()
    for done, item in enumerate(items):
        if shown:
            bar = "#" * (20 * done // len(items))
            line = f"\r{label} [{bar:20}] {done}/{len(items)}\033[K"
            print(line, end="", file=sys.stderr, flush=True)
        yield item
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- 5. Classifiers: images in [0, 1], (B, C, H, W) → logits (B, classes) ------------------------

class Classifier(nn.Module):
    """Layers behind their own normalization, so that eps means the same for every model."""

    def __init__(self, in_channels, *layers):
        super().__init__()
        self.register_buffer("mean", torch.full((1, in_channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((1, in_channels, 1, 1), 0.25))
        self.layers = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)  # convolutions are faster in this layout

    def normalize_like(self, x):
        """Take the mean and std of each channel from uint8 images x, (N, C, H, W)."""
        std, mean = torch.std_mean(x.float() / 255, dim=(0, 2, 3), keepdim=True)  # (1, C, 1, 1)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-3))

    def forward(self, x):
        C = self.mean.shape[1]
        if x.dim() != 4 or x.shape[1] != C:
            raise InputError(f"this model takes images (B, {C}, H, W), not {tuple(x.shape)}")
        return self.layers((x - self.mean) / self.std)


def conv(inputs, outputs, kernel=3, stride=1):
    """A convolution before batch norm, so without a bias. It keeps H and W if the stride is 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False)


def bn_relu(channels):
    """Batch norm and ReLU."""
    return nn.BatchNorm2d(channels), nn.ReLU()


def SmallCNN(in_channels=1, num_classes=10):
    """Three convolutions with batch norm, 0.13 M weights, quick to train on a CPU."""
    return Classifier(
        in_channels, conv(in_channels, 32, kernel=4, stride=2), *bn_relu(32),
        conv(32, 64, kernel=4, stride=2), *bn_relu(64), conv(64, 128), *bn_relu(128),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128 * 16, num_classes))


def CNN4(in_channels=1, num_classes=10):
    """Four convolutions without batch norm, 0.31 M weights, close to the MNIST model of [2]."""
    model = Classifier(
        in_channels, nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 4, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(64 * 16, 200), nn.ReLU(), nn.Linear(200, num_classes))
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
    model.layers[-1].weight.data.mul_(0.1)  # with large logits, training never gets started
    return model


def VGG16(in_channels=3, num_classes=10):
    """VGG-16 with batch norm for 32×32 images, 14.7 M weights (Simonyan & Zisserman 2015)."""
    layers = []
    last = in_channels
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [conv(last, width), *bn_relu(width)]
            last = width
    layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)]
    return Classifier(in_channels, *layers)


class Residual(nn.Module):
    """body(x) + shortcut(x). An empty shortcut is the identity."""

    def __init__(self, body, shortcut=()):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


def ResNet18(in_channels=3, num_classes=10):
    """ResNet-18 with a stem for 32×32 images, 11.2 M weights (He et al. 2016)."""
    layers = [conv(in_channels, 64), *bn_relu(64)]
    last = 64
    for width in (64, 64, 128, 128, 256, 256, 512, 512):
        stride = width // last
        body = [conv(last, width, 3, stride), *bn_relu(width), conv(width, width)]
        shortcut = [conv(last, width, 1, stride), nn.BatchNorm2d(width)] if stride > 1 else []
        layers += [Residual([*body, nn.BatchNorm2d(width)], shortcut), nn.ReLU()]
        last = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)]
    return Classifier(in_channels, *layers)


def WideResNet(in_channels=3, num_classes=10, depth=34, width=10):
    """WideResNet-34-10 by default, 46.2 M weights (Zagoruyko & Komodakis 2016)."""
    layers = [conv(in_channels, 16)]
    last = 16
    for C, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        # The first block of each group shares its batch norm and ReLU with the shortcut.
        body = [conv(last, C, 3, stride), *bn_relu(C), conv(C, C)]
        layers += [*bn_relu(last), Residual(body, [conv(last, C, 1, stride)])]
        for _ in range((depth - 4) // 6 - 1):
            layers.append(Residual([*bn_relu(C), conv(C, C), *bn_relu(C), conv(C, C)]))
        last = C
    layers += [*bn_relu(last), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, num_classes)]
    return Classifier(in_channels, *layers)


MODELS = {"small": SmallCNN, "cnn4": CNN4, "vgg16": VGG16, "resnet18": ResNet18,
          "wrn34": WideResNet}


# ---- 6. Data -------------------------------------------------------------------------------------

# Images uint8 (N, C, H, W) and labels int64 (N,).
Dataset = namedtuple("Dataset", "x_train y_train x_test y_test")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
DATASETS = {  # the first file, and the suffixes and folders that it may have
    "synthetic": (),
    "mnist": ("train-images-idx3-ubyte", ("", ".gz"), (".", "mnist", "MNIST/raw")),
    "cifar10": ("data_batch_1", (".bin", ""), (".", "cifar-10-batches-bin", "cifar-10-batches-py"))}


def load_dataset(name, data_dir=None):
    """Load "synthetic", "mnist" or "cifar10" from data_dir, else $MNIST_DIR or $CIFAR10_DIR, else
    data/. If data/ has no CIFAR-10, it is downloaded. Returns a Dataset. Raises InputError."""
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    if name == "synthetic":
        return synthetic()
    read = read_mnist if name == "mnist" else read_cifar10
    variable = f"{name.upper()}_DIR"
    named = data_dir or os.environ.get(variable)
    root = Path(named or "data")
    first, suffixes, folders = DATASETS[name]
    for path in [root / folder / (first + suffix) for folder in folders for suffix in suffixes]:
        if path.exists():
            return read(path.parent, path.suffix)
    if named or name == "mnist":
        raise InputError(f"no {name} in {root}: put {first}{suffixes[0]} and the others there, or "
                         f"name their folder with --data-dir or {variable}")
    return read(download_cifar10(root / "cifar-10-batches-bin"), ".bin")


def download_cifar10(folder):
    """Download the binary version into `folder`, which appears only when it is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            archive = Path(part, "cifar-10-binary.tar.gz")
            print("downloading CIFAR-10 (162 MB)", flush=True)
            torch.hub.download_url_to_file(CIFAR10_URL, archive, CIFAR10_SHA256, progress=False)
            shutil.unpack_archive(archive, part)
            Path(part, folder.name).rename(folder)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if not folder.exists():  # else another process was faster
            raise InputError(f"CIFAR-10 could not be downloaded ({error}): unpack "
                             f"cifar-10-binary.tar.gz into {folder.parent}") from None
    return folder


@contextmanager
def reading(path):
    """Turn what a missing or damaged file raises into an InputError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:  # a RuntimeError, but not the fault of the file
        raise
    except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
            RuntimeError, pickle.UnpicklingError, zlib.error) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(f"cannot use {path}: missing, damaged or unsuitable ({message})") from None


def read_mnist(folder, suffix):
    """The four idx files: 0, 0, 8 for uint8, the number of dimensions, their sizes, the values."""
    arrays = []
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = folder / f"{name}-ubyte{suffix}"
        dims = int(name[-1])
        with reading(path):
            raw = gzip.decompress(path.read_bytes()) if suffix else path.read_bytes()
            if raw[:4] != bytes([0, 0, 8, dims]):
                raise ValueError("not an idx file")
            shape = np.frombuffer(raw, ">u4", dims, offset=4)
            arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape))
    x_train, y_train, x_test, y_test = arrays
    return to_dataset(folder, x_train[:, None], y_train, x_test[:, None], y_test)  # (N, 1, 28, 28)


def read_cifar10(folder, suffix):
    """The six batches of the binary (".bin") or of the Python version."""
    images = []
    labels = []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        path = folder / f"{name}{suffix}"
        with reading(path):
            if suffix == ".bin":  # 1 label byte, then 1,024 red, green and blue bytes each
                records = np.fromfile(path, np.uint8).reshape(-1, 3073)
                x = records[:, 1:]
                y = records[:, 0]
            else:
                batch = ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
                x = np.asarray(batch.get("data", batch.get(b"data")), np.uint8)
                y = np.asarray(batch.get("labels", batch.get(b"labels")), np.uint8)
            images.append(x.reshape(len(y), 3, 32, 32))
            labels.append(y)
            if len(y) != len(labels[0]):
                raise ValueError("it is not as long as data_batch_1")
    return to_dataset(folder, np.concatenate(images[:5]), np.concatenate(labels[:5]), images[5],
                      labels[5])


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and plain values. Anything else is refused, so no code is run."""

    allowed = {"_reconstruct": np.empty(0).__reduce_ex__(2)[0],
               "_frombuffer": np.empty(0).__reduce_ex__(5)[0],
               "ndarray": np.ndarray, "dtype": np.dtype,
               "encode": lambda text, encoding: text.encode("latin1")}

    def find_class(self, module, name):
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.allowed:
            return self.allowed[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a data set")


def to_dataset(folder, *arrays):
    """Make a Dataset of uint8 arrays."""
    x_train, y_train, x_test, y_test = map(torch.tensor, arrays)
    for x, y in ((x_train, y_train), (x_test, y_test)):
        if len(x) != len(y) or len(y) == 0 or y.max() > 9:
            raise InputError(f"{folder} is damaged: its images and labels do not fit")
    return Dataset(x_train, y_train.long(), x_test, y_test.long())


def synthetic():
    """Color images of ten classes, each with a coarse pattern that survives eps = 8/255 but is
    wrong once in ten images, and a fine one that is always right but can be erased, after [4]."""
    rng = np.random.default_rng(0)
    coarse = rng.choice([-1.0, 1.0], (10, 3, 4, 4)).repeat(4, 2).repeat(4, 3)  # (10, 3, 16, 16)
    fine = np.tile(rng.choice([-1.0, 1.0], (10, 3, 4, 4)), (4, 4))  # (10, 3, 16, 16)
    y = rng.integers(0, 10, 5000)
    shown = np.where(rng.random(5000) < 0.9, y, rng.integers(0, 10, 5000))
    contrast = rng.uniform(0, 0.3, (5000, 1, 1, 1))
    noise = 0.04 * rng.standard_normal((5000, 3, 16, 16))
    x = 0.5 + contrast * coarse[shown] + 6 / 255 * fine[y] + noise
    x = (x.clip(0, 1) * 255).round().astype(np.uint8)
    return to_dataset("synthetic", x[:4000], y[:4000], x[4000:], y[4000:])


def hold_out(data, limit=None):
    """Hold out a fifth of the training images, at most 1,000, and train on the rest. With a limit,
    train on so many of the rest, and hold out a fifth of the limit. The order is always the same.
    Returns x, y to train on, and x, y held out."""
    x, y, _, _ = data
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] > x.shape[3] or len(x) < 5:
        raise InputError("a Dataset needs five or more uint8 images, channels before height and "
                         f"width, (N, C, H, W), not {x.dtype} {tuple(x.shape)}")
    if len(x) != len(y):
        raise InputError(f"a Dataset needs as many labels as images, not {len(y)} and {len(x)}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    most = min(1000, len(x) // 5)
    train = order[most:][:limit]
    held_out = order[:min(most, max(1, (limit or len(x)) // 5))]
    return x[train], y[train], x[held_out], y[held_out]


def augment(x, padding):
    """Random flip, and random crop after padding with black. x: (B, C, H, W), any dtype."""
    B, _, H, W = x.shape
    shift = torch.randint(0, 2 * padding + 1, (2, B), device=x.device)
    crops = F.pad(x, [padding] * 4).unfold(2, H, 1).unfold(3, W, 1)  # (B, C, 2p+1, 2p+1, H, W)
    crop = crops[torch.arange(B, device=x.device), :, shift[0], shift[1]]  # (B, C, H, W)
    keep = torch.rand(B, 1, 1, 1, device=x.device) < 0.5
    return torch.where(keep, crop, crop.flip(3))
