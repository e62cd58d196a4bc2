"""Improved Adversarial Training via Learned Optimizer (Xiong & Hsieh, ECCV 2020, arXiv 2004.12227), in one file.

Adversarial training solves min_θ E max_x' L(f_θ(x'), y) over ‖x' − x‖∞ ≤ eps. PGD climbs the inner problem with
hand-made steps; here a small recurrent network m_φ, the same for every pixel, learns to climb it while f_θ trains:

    for each mini-batch (x, y):                                                      where
      h_0 = 0, x'_0 = x + 0.001·N(0, I)                                              unroll
      for t = 0 … T−1:
        g_t = ∇_x' L(f_θ(x'_t), y)                                                   baselines.input_gradient
        δ_t, h_{t+1} = m_φ(g_t, h_t)                                                 LearnedOptimizer.forward
        x'_{t+1} = Π(x'_t + δ_t)                                                     baselines.project
      φ ascends Σ_{t=1..T} w_t L(f_θ(x'_t), y), w_t = t                              meta_objective, ascend
      θ descends L(f_θ(x'_T), y)                                                     descend

RNN-Adv takes cross-entropy for L; RNN-TRADES takes KL(f(x) ‖ f(x')) inside and CE(f(x), y) + β·KL outside
(baselines.AdvTrain, baselines.Trades). What was there before the paper is in baselines.py. Sections 1 to 3 are the
paper; 4 is the training loop around it with its checkpoints, 5 the command line. results/ has what `eval` and `bench` do.

    python l2l_adv.py train --method rnn-adv --dataset synthetic --model small --out runs/rnn-adv
    python l2l_adv.py eval runs/*
    python l2l_adv.py bench --model vgg16
"""
import argparse
import copy
import ctypes
import io
import json
import math
import os
import signal
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from threading import current_thread, main_thread
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows: two trainings in one folder would go unnoticed
    fcntl = None

import torch
from torch import nn

from baselines import (DATASETS, MODELS, AdvTrain, InputError, NotFinite, Trades, augment, check_budget, check_images, cw_linf,
                       eval_mode, hold_out, input_gradient, load_dataset, one_line, outcome, pgd, processes, progress, project,
                       sign_ascent, start_point, to_unit, worst_of)


# ---- 1. The learned optimizer m_φ -----------------------------------------------------------------------------------

def tanh(z):
    """torch.tanh at less than half its cost on a CPU, where the sigmoid is vectorised (measured with PyTorch 2.13)."""
    return 2 * torch.sigmoid(2 * z) - 1


class LearnedOptimizer(nn.Module):
    """m_φ: (g_t, h_t) → (δ_t, h_{t+1}), one recurrent cell shared by all coordinates, one state per coordinate.

    cell="lstm": 450 weights at hidden size 10; cell="rnn": the paper's 120 (10 + 100 + 10). No biases in either.
    The paper leaves scaling open. Ours, chosen on MNIST: the input is g divided by the image's mean |g|, since gradients
    shrink by orders of magnitude as the classifier grows sure; the output is tanh, so no step is longer than eps.
    results/mnist.md says what else was tried.
    """

    def __init__(self, hidden_size=10, cell="lstm"):
        super().__init__()
        if cell not in ("lstm", "rnn"):
            raise InputError(f"unknown cell {cell!r}: choose lstm or rnn")
        if not (isinstance(hidden_size, Integral) and hidden_size >= 1):
            raise InputError(f"hidden_size must be a positive whole number, not {hidden_size!r}")
        self.cell, self.hidden_size = cell, hidden_size
        gates = 4 if cell == "lstm" else 1
        bound = hidden_size ** -0.5
        self.W = nn.Parameter(torch.empty(gates * hidden_size, 1 + hidden_size).uniform_(-bound, bound))  # [W_g | W_h]
        self.W_out = nn.Parameter(torch.empty(1, hidden_size).uniform_(-0.1 * bound, 0.1 * bound))

    def forward(self, g, state=None):
        """g: gradients (B, C, H, W); state: what the last call returned, None for h_0 = 0.
        Returns the update δ in units of eps, in (−1, 1), like g, and the next state (h, c)."""
        scale = g.abs().flatten(1).mean(1).clamp(min=torch.finfo(g.dtype).tiny)  # (B,)
        u = (g / scale.view(-1, *[1] * (g.dim() - 1))).reshape(1, -1)  # (1, N), N = B·C·H·W coordinates
        h, c = state or [u.new_zeros(self.hidden_size, u.shape[1])] * 2  # (H, N) each
        # The hidden axis comes first: each gate is a block of whole rows, and the product is one (4H, 1+H) × (1+H, N).
        z = self.W @ torch.cat([u, h])  # (4H, N); (H, N) in the RNN, which leaves c alone
        if self.cell == "rnn":
            h = tanh(z)
        else:
            i, f, o, candidate = torch.sigmoid(z).split(self.hidden_size)  # (H, N) each. One call for all four: the
            c = f * c + i * (2 * candidate - 1)  # candidate's tanh(z) is 2σ(2z) − 1, and its rows of W hold the inner 2
            h = o * tanh(c)
        return tanh(self.W_out @ h).reshape(g.shape), (h, c)


# ---- 2. The learned inner maximiser, and the gradient of φ for free -------------------------------------------------

@torch.no_grad()
def unroll(model, optimizer, x, y, *, eps, steps, objective, start="gaussian"):
    """T steps of the learned optimizer from a fresh state. Returns x'_0, [g_0 … g_{T−1}] and x'_T, each (B, C, H, W)."""
    with eval_mode(model):
        target = objective.target(model, x, y)
        x_0 = x_adv = start_point(x, eps, start)
        state, gradients = None, []
        for _ in range(steps):
            g, _ = input_gradient(model, x_adv, objective, target)
            delta, state = optimizer(g, state)
            x_adv = project(x_adv + eps * delta, x, eps)
            gradients.append(g)
    return x_0, gradients, x_adv


def learned_attack(model, optimizer, x, y, *, eps, steps=10, objective=AdvTrain(), start="gaussian"):
    """The learned optimizer as an attack, a drop-in for pgd: `steps` gradients of `model`, none of its own.

    x: (B, C, H, W) in [0, 1]; y: (B,); eps in [0, 1] pixel scale. Returns x' like x, within eps of it. Raises InputError.
    """
    if not isinstance(optimizer, nn.Module):
        raise InputError(f"the learned attack needs a LearnedOptimizer, not {optimizer!r}: take it from an rnn- run")
    check_images(x, y)
    check_budget(eps, steps)
    return unroll(model, optimizer, x, y, eps=eps, steps=steps, objective=objective, start=start)[2]


def sharpened(optimizer, factor=10):
    """A copy of the LearnedOptimizer with W_out times `factor`: δ keeps its signs and comes nearer to ±eps. For attacks
    alone: φ cannot learn such steps, since neither tanh nor projection has a gradient there. On MNIST ten of them reach a
    higher loss than 100 of PGD on all models trained with a learned optimizer; on `synthetic` they gain nothing
    (results/mnist.md). So it is an attack of its own. Raises InputError.
    """
    if not isinstance(optimizer, LearnedOptimizer):
        raise InputError(f"only a LearnedOptimizer can be sharpened, not {optimizer!r}")
    sharp = copy.deepcopy(optimizer)
    vars(sharp).pop("forward", None)  # one that is compiled would go on to use the original's weights
    with torch.no_grad():
        sharp.W_out.mul_(factor)
    return sharp


def meta_objective(optimizer, x, x_0, gradients, eps):
    """Σ_{t=1..T} w_t ⟨g_t, x'_t(φ)⟩, w_t = t, per image and over Σ w_t. gradients: g_0 … g_T, each (B, C, H, W).

    The g_t are data to the optimizer (second derivatives are dropped), so by the chain rule
        ∂/∂φ Σ_t w_t L(f(x'_t), y)  =  Σ_t w_t ⟨∇_x' L(f(x'_t), y), ∂x'_t/∂φ⟩  =  ∂/∂φ Σ_t w_t ⟨g_t, x'_t⟩.
    Every g_t on the right is there already: the attack needed g_0 … g_{T−1}, θ's update computes g_T. So φ's gradient
    costs no pass through the classifier, whose graph is never kept; only the cell is unrolled once more.
    """
    x_adv, state, total = x_0, None, 0.0
    for t in range(1, len(gradients)):
        delta, state = optimizer(gradients[t - 1], state)
        x_adv = project(x_adv + eps * delta, x, eps)
        total = total + t * (gradients[t] * x_adv).sum()
    return total / (len(x) * sum(range(len(gradients))))


# ---- 3. One alternating update --------------------------------------------------------------------------------------

def average(tensors):
    """Under torchrun, replace each tensor by its mean over all processes, in one message; else do nothing."""
    _, world = processes()
    if world > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, mean in zip(tensors, (flat / world).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def update(loss, theta=None, phi=None):
    """Each player moves along its gradient, φ's clipped to norm 1; or, where anything is not finite, none: NotFinite."""
    players = [(name, player, longest) for name, player, longest in (("theta", theta, math.inf), ("phi", phi, 1.0)) if player]
    sizes = {"the loss": loss}
    for name, player, longest in players:
        weights = [p for group in player.param_groups for p in group["params"]]
        sizes[f"the gradient of {name}"] = nn.utils.clip_grad_norm_(weights, longest)
    for name, value in zip(sizes, torch.stack(list(sizes.values())).tolist()):  # a step's only wait for the GPU, at its end
        if not math.isfinite(value):
            raise NotFinite(f"{name} is not finite ({value})")
    for _, player, _ in players:
        player.step()


def descend(model, theta, objective, x, x_adv, y):
    """θ's gradient: of the outer loss at x' (B, C, H, W), in the model's own mode. theta: θ's torch optimizer. Returns the
    loss, a scalar; and if x' asks for its gradient, x'.grad is beta / B times that of the inner loss."""
    theta.zero_grad()
    loss = objective.outer_loss(model, x, x_adv, y)
    loss.backward()
    average([loss := loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return loss


def train_step_pgd(model, theta, x, y, *, eps, step_size, steps, objective=AdvTrain(), line_search=False):
    """PGD finds x', θ descends on it: AdvTrain or TRADES. Arguments as for pgd; theta: the torch optimizer of the weights
    of `model`. Returns the outer loss, a scalar tensor. Raises InputError, NotFinite."""
    check_images(x, y, values=not x.is_cuda)  # no synchronisation within a training step
    check_budget(eps, steps, step_size)
    x_adv = sign_ascent(model, x, y, eps, step_size, steps, objective, line_search=line_search)
    loss = descend(model, theta, objective, x, x_adv, y)
    update(loss, theta)
    return loss


# φ's graph is built for a few images at a time. On a CPU larger blocks of memory would be mapped anew at every operation:
# 32 images of CIFAR-10 at once took three times as long as 16 and 16. On a GPU a batch of 128 fits in one piece.
COORDINATES_AT_ONCE = 2 ** 16, 2 ** 19  # CPU, GPU


def ascend(optimizer, phi, x, x_0, gradients, eps, meta_images=None):
    """φ's gradient, upwards: of the meta-objective of one unroll. phi: φ's torch optimizer; meta_images: estimate it from
    so many images of the batch, drawn at random (None: all): unbiased before clipping, and cheaper."""
    phi.zero_grad()
    few = meta_images is not None and meta_images < len(x)
    some = (torch.randperm if few else torch.arange)(len(x), device=x.device)[:meta_images]
    for part in some.split(max(1, COORDINATES_AT_ONCE[x.is_cuda] // x[0].numel())):
        gain = meta_objective(optimizer, x[part], x_0[part], [g[part] for g in gradients], eps)
        (-gain * len(part) / len(some)).backward()
    average([p.grad for p in optimizer.parameters()])


def train_step_learned(model, optimizer, theta, phi, x, y, *, eps, steps, objective=AdvTrain(),
                       meta_images=None):
    """The learned optimizer finds x'; from the same unroll φ ascends and θ descends: RNN-Adv or RNN-TRADES.

    theta, phi: torch optimizers of the weights of `model` and of `optimizer`; meta_images: see `ascend`. x: (B, C, H, W)
    in [0, 1]; y: (B,). Returns the outer loss, a scalar tensor. Raises InputError, NotFinite.
    """
    check_images(x, y, values=not x.is_cuda)
    check_budget(eps, steps)
    x_0, gradients, x_adv = unroll(model, optimizer, x, y, eps=eps, steps=steps, objective=objective)
    loss = descend(model, theta, objective, x, x_adv.requires_grad_(), y)
    # g_T comes with θ's own backward pass, for nothing. It is taken in the model's training mode, g_0 … g_{T−1} in eval
    # mode: where there is batch norm, g_T uses the batch's statistics, and so holds x'_T's effect on the other images.
    g_T = x_adv.grad * (len(x) / objective.beta)
    ascend(optimizer, phi, x, x_0, [*gradients, g_T], eps, meta_images)
    update(loss, theta, phi)
    return loss


def train_optimizer(model, data, *, eps, steps=10, objective=AdvTrain(), optimizer=None, lr=0.01):
    """Train φ alone, against a classifier that stays as it is: a learned attack on any model.

    data: an iterable of batches x (B, C, H, W) in [0, 1], y (B,), such as a DataLoader: one update of φ each. optimizer:
    the LearnedOptimizer to go on with; default a new one. lr: Adam's. Returns it, in eval mode. Raises InputError, NotFinite.
    """
    check_budget(eps, steps)
    if not (isinstance(lr, Real) and 0 < lr < math.inf):
        raise InputError(f"lr must be above 0, not {lr!r}")
    x, optimizer = None, optimizer or LearnedOptimizer()
    phi = torch.optim.Adam(optimizer.parameters(), lr)
    for x, y in data:
        check_images(x, y)
        optimizer.to(x.device)
        x_0, gradients, x_adv = unroll(model, optimizer, x, y, eps=eps, steps=steps, objective=objective)
        with eval_mode(model):
            g_T, loss = input_gradient(model, x_adv, objective, objective.target(model, x, y))
        ascend(optimizer, phi, x, x_0, [*gradients, g_T], eps)
        update(loss.mean(), phi=phi)
    if x is None:
        raise InputError("data holds no batch: is it a generator that was used before?")
    return optimizer.eval()


# ---- 4. The training loop -------------------------------------------------------------------------------------------

METHODS = {  # the paper's grid: an objective, and who maximises its inner loss
    "plain": (AdvTrain, None), "advtrain": (AdvTrain, "pgd"), "advtrain-bls": (AdvTrain, "line search"),
    "trades": (Trades, "pgd"), "rnn-adv": (AdvTrain, "learned"), "rnn-trades": (Trades, "learned")}
DEFAULTS = {  # of the settings that are left at None: by data set, then by model
    "synthetic": {"model": "small", "eps": 8 / 255, "epochs": 3},
    "mnist": {"model": "small", "eps": 0.3, "epochs": 3, "lr": 0.05, "eps_warmup": 0.25},
    "cifar10": {"model": "vgg16", "eps": 8 / 255, "epochs": 30},
    "small": {"batch_size": 64, "meta_images": 16, "lr": 0.02, "eps_warmup": 0.5},
    "vgg16": {"batch_size": 128, "meta_images": 32, "lr": 0.05, "eps_warmup": 0.0},
    "resnet18": {"batch_size": 128, "meta_images": 32, "lr": 0.1, "eps_warmup": 0.0},
    "wrn34": {"batch_size": 128, "meta_images": 32, "lr": 0.1, "eps_warmup": 0.0}}


def size(text):
    """A number, or a fraction such as 8/255."""
    numerator, _, denominator = text.partition("/")
    if float(denominator or 1) == 0:
        raise ValueError("division by zero")
    return float(numerator) / float(denominator or 1)


def setting(default, kind, help, choices=None, zero=False, most=None):
    """A field of Settings: its type, its line in `train --help` and what it may be: from 0 (`zero`) or above it, to `most`."""
    most = most or (10 ** 9 if kind is int else 1e30)
    return field(default=default, metadata=dict(kind=kind, help=help, choices=choices, zero=zero, most=most))


@dataclass
class Settings:
    """Everything that decides a run; `train --help` lists the same. Raises InputError for what makes no sense."""
    out: str = setting(None, str, "folder of the run, made by it: last.pt, best.pt, log.jsonl; later eval.json")
    method: str = setting("rnn-adv", str, "who plays against whom", METHODS)
    dataset: str = setting("synthetic", str, "what is classified", DATASETS)
    model: str = setting(None, str, "the classifier; default small, for cifar10 vgg16", MODELS)
    data_dir: str = setting(None, str, "where the data lies; default $MNIST_DIR or $CIFAR10_DIR, then data/")
    limit: int = setting(None, int, "train on so many images; default all but the 1,000 held out")
    eps: float = setting(None, size, "radius of the attack in [0, 1] pixels, 8/255 or 0.031; default 8/255, mnist 0.3")
    eps_warmup: float = setting(None, float, "share of the training in which eps grows from 0; default mnist 0.25, else 0.5 for "
                                "small, 0", zero=True, most=1)
    steps: int = setting(10, int, "T, the inner steps")
    step_size: float = setting(None, size, "PGD's step; default eps/4, with line search its longest step, eps")
    beta: float = setting(6.0, float, "weight of TRADES' robust term")
    cell: str = setting("lstm", str, "the learned optimizer's recurrent cell", ("lstm", "rnn"))
    hidden_size: int = setting(10, int, "its state per coordinate", most=1000)
    meta_lr: float = setting(0.01, float, "learning rate of the learned optimizer (Adam)")
    meta_images: int = setting(None, int, "images of each batch that it learns from; default 16 for small, else 32")
    epochs: int = setting(None, int, "passes over the training images; default 3, cifar10 30")
    batch_size: int = setting(None, int, "images per step; default 64 for small, else 128")
    lr: float = setting(None, float, "peak learning rate of the classifier (SGD); default 0.02 for small, 0.05 mnist and vgg16, "
                        "else 0.1")
    schedule: str = setting("one-cycle", str, "of the classifier's learning rate; piecewise is the classic one for 100 epochs",
                            ("one-cycle", "piecewise"))
    precision: str = setting(None, str, "of the classifier in training; default bf16 on CUDA, else fp32", ("fp32", "bf16"))
    compile: str = setting(None, str, "what torch.compile fuses; all is cell and classifier; default cell on CUDA, else no",
                           ("no", "cell", "all"))
    seed: int = setting(0, int, "of everything random", zero=True, most=2 ** 63 - 1)
    device: str = setting("auto", str, "auto (cuda where there is one), cpu, cuda, cuda:1")

    def __post_init__(self):
        for f in fields(self):
            value, kind, choices, most = getattr(self, f.name), *(f.metadata[k] for k in ("kind", "choices", "most"))
            if value is None and f.default is None:
                continue
            if choices and value not in choices:
                raise InputError(f"unknown {f.name} {value!r}: choose from {', '.join(choices)}")
            number = isinstance(value, Integral if kind is int else Real) and 0 <= value <= most
            if kind is not str and not (number and (value > 0 or f.metadata["zero"])):
                raise InputError(f"{f.name} must be a {'whole ' * (kind is int)}number "
                                 f"{'of at least' if f.metadata['zero'] else 'above'} 0 and at most {most}, not {value!r}")
            setattr(self, f.name, (float if kind is size else kind)(value))  # a checkpoint takes no Path, no numpy number
        if not self.out:
            raise InputError("give the run a folder: --out runs/NAME")
        for key in ("dataset", "model"):  # in this order: the data set may choose the model
            for name, value in DEFAULTS[getattr(self, key)].items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        if self.step_size is None:
            self.step_size = self.eps if METHODS[self.method][1] == "line search" else self.eps / 4
        check_budget(self.eps, self.steps, self.step_size)


def pick_device(name):
    """The torch device called `name`; "auto" is CUDA where there is one, and under torchrun each process's own."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, above all in evaluation
    try:
        if torch.device(name).type in ("cpu", "cuda"):
            return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError):
        pass
    raise InputError(f"no device {name!r} here: auto, cpu, cuda or cuda:N")


def learning_rate(peak, done, schedule):
    """one-cycle: up to the peak within the first third and down to 0; piecewise: a tenth at 3/4, a hundredth at 9/10."""
    if schedule == "one-cycle":
        return peak * min(3 * done, 1.5 * (1 - done))
    return peak * (1 if done < 0.75 else 0.1 if done < 0.9 else 0.01)


class Players(NamedTuple):
    """What the two play for, both players, and the torch optimizers of their weights."""
    objective: AdvTrain
    model: nn.Module
    theta: torch.optim.Optimizer
    optimizer: LearnedOptimizer = None
    phi: torch.optim.Optimizer = None


def fused(function):
    """torch.compile(function); where that does not work, one line of warning and the function as it is."""
    compiled = torch.compile(function)

    def call(*args):
        nonlocal compiled
        try:
            return compiled(*args)
        except Exception as error:  # no compiler, no Triton …; what is the function's own fault is raised again below
            if compiled is not function:
                print(f"l2l_adv.py: torch.compile does not work here ({type(error).__name__}): going on without, slower",
                      file=sys.stderr)
            compiled = function
            return function(*args)

    return call


def make_objective(settings):
    """What settings.method plays for: AdvTrain, or Trades with its beta."""
    kind = METHODS[settings.method][0]
    return Trades(settings.beta) if kind is Trades else kind()


def make_players(settings, x_train, device):
    """Players of settings.method on the device, normalised like the uint8 images x_train (N, C, H, W)."""
    objective = make_objective(settings)
    model = MODELS[settings.model](in_channels=x_train.shape[1])
    model.normalize_like(x_train)
    model.to(device, memory_format=torch.channels_last)
    theta = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=5e-4)
    compile = settings.compile or ("cell" if device.type == "cuda" else "no")
    if compile == "all":
        model.forward = fused(model.forward)
    if METHODS[settings.method][1] != "learned":
        return Players(objective, model, theta)
    optimizer = LearnedOptimizer(settings.hidden_size, settings.cell).to(device)
    if compile != "no":  # on a GPU the cell's elementwise passes cost more than the classifier, unless they are fused
        optimizer.forward = fused(optimizer.forward)
    return Players(objective, model, theta, optimizer, torch.optim.Adam(optimizer.parameters(), settings.meta_lr))


def train_step(players, settings, x, y, strength=1.0):
    """One update of settings.method, at `strength` of its eps, on x (B, C, H, W) and y (B,). Returns the outer loss."""
    objective, model, theta, optimizer, phi = players
    maximiser, eps = METHODS[settings.method][1], strength * settings.eps
    if maximiser is None:
        loss = descend(model, theta, objective, x, x, y)
        update(loss, theta)
        return loss
    if maximiser == "learned":
        return train_step_learned(model, optimizer, theta, phi, x, y, eps=eps, steps=settings.steps,
                                  objective=objective, meta_images=max(1, settings.meta_images // processes()[1]))
    return train_step_pgd(model, theta, x, y, eps=eps, step_size=strength * settings.step_size, steps=settings.steps,
                          objective=objective, line_search=maximiser == "line search")


@dataclass
class RunState:
    """How far a training is: with settings, players and random state all that it takes to go on."""
    rows: list = field(default_factory=list)  # of the log, one per finished epoch
    step: int = 0  # steps done of the epoch under way
    order: torch.Tensor = None  # its order of the images, (N,)
    total: torch.Tensor = None  # the sum of its losses
    seconds: float = 0.0  # the time it took


def train(settings, resume=False, checkpoint_every=10.0):
    """Train by settings.method; a row per epoch on stdout and, as JSON, in the run's folder. Returns the rows.

    best.pt is chosen by accuracy under PGD-10 (for `plain`, natural accuracy) on held-out training images, never on
    test images. resume: go on from last.pt if there is one; on a CPU this ends in the same weights, bit for bit, as
    a training in one process that was never interrupted, given as many threads. checkpoint_every: minutes between
    savings within an epoch. Raises InputError before anything is written; NotFinite; KeyboardInterrupt once last.pt is
    saved.
    """
    device, out = pick_device(settings.device), Path(settings.out)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and processes() == (0, 1):  # started by torchrun
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = processes()  # rank 0 is the only one that prints the table and writes
    if settings.batch_size % world:
        raise InputError(f"batch_size {settings.batch_size} does not split into {world} equal parts")
    if not (isinstance(checkpoint_every, Real) and checkpoint_every > 0):
        raise InputError(f"checkpoint_every must be a number of minutes above 0, not {checkpoint_every!r}")
    saved = earlier_training(settings, resume, device)
    if saved and len(saved["training"]["run"]["rows"]) == settings.epochs:
        print(f"{out} is finished: {settings.epochs} epochs of {settings.method}")
        return saved["training"]["run"]["rows"]
    data = hold_out(load_dataset(settings.dataset, settings.data_dir), settings.limit)
    (x, y), held_out = ([images.to(device), labels.to(device)] for images, labels in data)
    torch.manual_seed(settings.seed)  # the same in every process: each makes the same players and draws the same batches
    players = make_players(settings, x, device)
    batch = min(settings.batch_size, len(x)) // world
    if batch < 1 + any(isinstance(module, nn.BatchNorm2d) for module in players.model.modules()):
        raise InputError(f"{batch} image(s) per step and process are too few for {settings.model}")
    with locked(out) if rank == 0 else nullcontext():
        saved = earlier_training(settings, resume, device)  # again: from here on nobody else writes
        run = restore(saved, players, settings) if saved else RunState()
        keep = partial(save_last, out, settings, players) if rank == 0 else lambda run: None
        if rank == 0:
            print(f"{settings.method}, {settings.dataset} ({len(x)} images), {settings.model}, eps = {settings.eps * 255:g}"
                  f"/255, T = {settings.steps}, seed {settings.seed}, {device}; accuracy in % on {len(held_out[0])} held-out "
                  f"images\n{'epoch':>5} {'loss':>9} {'natural':>9} {'pgd-10':>9} {'seconds':>9}", flush=True)
        while len(run.rows) < settings.epochs:
            try:
                loss = train_epoch(players, settings, x, y, run, keep, 60 * checkpoint_every)
                start = time.time()
                scores = held_out_scores(players, *held_out, settings.eps)
            except NotFinite as error:
                last = f"{out / 'last.pt'} is from before" if (out / "last.pt").exists() else "nothing was saved before"
                raise NotFinite(f"{settings.method}, epoch {len(run.rows) + 1}, after {run.step} steps: {error}; {last}") from None
            seconds = round(run.seconds + time.time() - start, 1)
            run = RunState([*run.rows, {"epoch": len(run.rows) + 1, "loss": loss, **scores, "seconds": seconds}])
            if rank == 0:
                record(out, settings, players, run)
    return run.rows


LEARNED = "learned", "sharp"  # the named attacks that need a learned optimizer


def named_attack(name, eps, optimizer=None, restarts=1):
    """pgd-N, cw-N (both with steps of eps/4), learned-N, sharp-N (learned-N, its optimizer `sharpened`) → callable(model,
    x, y) → x', after N steps, as `evaluate` takes it. Its first start is the paper's, further ones are uniform in the
    ball. On cross-entropy whatever φ was trained on: that is the stronger attack. Raises InputError."""
    kind, _, steps = name.partition("-")
    if kind not in ("pgd", "cw", *LEARNED) or not (steps.isdecimal() and len(steps) < 10 and int(steps)):
        raise InputError(f"unknown attack {name!r}: write pgd-10, cw-100, learned-10 or sharp-10, with any number of steps")
    budget = {"eps": eps, "steps": int(steps)}
    if kind == "sharp" and optimizer is not None:
        optimizer = sharpened(optimizer)

    def attack(start):
        if kind in LEARNED:
            return lambda model, x, y: learned_attack(model, optimizer, x, y, **budget, start=start)
        by_hand = {"pgd": pgd, "cw": cw_linf}[kind]
        return lambda model, x, y: by_hand(model, x, y, **budget, step_size=eps / 4, start=start)

    return worst_of([attack("gaussian"), *[attack("uniform")] * (restarts - 1)]) if restarts > 1 else attack("gaussian")


def held_out_scores(players, x, y, eps):
    """Accuracies on the held-out images, uint8 (N, C, H, W), and the mean cross-entropy that PGD-10 and, where there is
    one, the learned optimizer reach on the first 256."""
    x, few = to_unit(x), slice(256)
    natural, _ = outcome(players.model, x, y, None, label="held out: natural")
    robust, loss = outcome(players.model, x, y, named_attack("pgd-10", eps), label="held out: pgd-10")
    scores = {"natural": natural.double().mean().item(), "pgd-10": robust.double().mean().item(),
              "pgd-10 loss": loss[few].mean().item()}
    if players.optimizer:
        learned = named_attack("learned-10", eps, players.optimizer)
        scores["learned-10 loss"] = outcome(players.model, x[few], y[few], learned)[1].mean().item()
    return scores


def record(out, settings, players, run):
    """Print and log the last row; save last.pt, and best.pt if that row is the best so far."""
    row, score = run.rows[-1], "natural" if settings.method == "plain" else "pgd-10"
    print("{epoch:5} {loss:9.4f} {0:9.2f} {1:9.2f} {seconds:9.1f}".format(
        100 * row["natural"], 100 * row["pgd-10"], **row), flush=True)
    weaker = [row.get("learned-10 loss", math.inf) < 0.99 * row["pgd-10 loss"] for row in run.rows[-2:]]
    if all(weaker) and len(weaker) == 2:  # at an epoch's start and at its end
        print("      warning: phi stalls, its 10 steps reach a loss of {learned-10 loss:.4f} and PGD's {pgd-10 loss:.4f}"
              .format(**row), flush=True)
    if all(row[score] > earlier[score] for earlier in run.rows[:-1]):
        save(out / "best.pt", settings, players, run)
    write_whole(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in run.rows).encode())
    save_last(out, settings, players, run)  # comes last: what is done again after a kill is all of this


def training_mode(model, settings):
    """Batch statistics, and bf16 if that is set or the device is CUDA. `train_epoch` goes back to fp32 at its end."""
    model.train()
    model.bf16 = (settings.precision or ("bf16" if model.mean.is_cuda else "fp32")) == "bf16"


def train_epoch(players, settings, x, y, run, keep, keep_every):
    """The rest of an epoch over uint8 images x and labels y on the device, in whole batches, each split among the
    processes; keep(run) every so many seconds, at Ctrl-C and at the end. Returns the mean outer loss."""
    training_mode(players.model, settings)
    rank, world = processes()
    batch_size = min(settings.batch_size, len(x)) // world * world
    steps, epoch = len(x) // batch_size, len(run.rows)
    if run.step == 0:
        run.order, run.total = torch.randperm(len(x), device=x.device), torch.zeros((), device=x.device)
    start, kept = time.time() - run.seconds, run.seconds
    with ctrl_c_asks() as asked:
        for step in progress(range(run.step, steps), f"epoch {epoch + 1}"):
            batch = run.order[step * batch_size:(step + 1) * batch_size]
            images = augment(x[batch]) if settings.dataset == "cifar10" else x[batch]
            images, labels = to_unit(images.chunk(world)[rank]), y[batch].chunk(world)[rank]
            done = (epoch + (step + 0.5) / steps) / settings.epochs  # of the whole training, in (0, 1)
            for group in players.theta.param_groups:
                group["lr"] = learning_rate(settings.lr, done, settings.schedule)
            strength = min(1.0, done / settings.eps_warmup) if settings.eps_warmup else 1.0
            run.total += train_step(players, settings, images, labels, strength)
            run.step, run.seconds = step + 1, time.time() - start
            if asked or run.seconds - kept >= keep_every:
                keep(run)
                kept = run.seconds
            if asked:
                raise KeyboardInterrupt
    players.model.bf16 = False
    average([run.total, *(buffer for buffer in players.model.buffers() if buffer.is_floating_point())])  # batch norm's
    keep(run)
    return (run.total / steps).item()


@contextmanager
def ctrl_c_asks():
    """Inside, the first Ctrl-C does not interrupt: it makes the list that is yielded true. The second one does."""
    asked = []

    def ask(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread()
    if ours:
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


# Checkpoints: tensors and plain values, nothing that needs unpickling of code

def save(path, settings, players, run, **more):
    """Write the checkpoint of both players, and more."""
    checkpoint = {"state_dict": players.model.state_dict(),
                  "learned_optimizer": players.optimizer and players.optimizer.state_dict(),
                  "settings": asdict(settings), "held_out": run.rows[-1] if run.rows else None, **more}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_whole(path, buffer.getbuffer())


def save_last(out, settings, players, run):
    """Write last.pt: the players, and all that it takes to go on."""
    cuda = players.model.mean.is_cuda
    save(out / "last.pt", settings, players, run, training={
        "run": vars(run), "theta": players.theta.state_dict(), "phi": players.phi and players.phi.state_dict(),
        "device": players.model.mean.device.type, "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(players.model.mean.device) if cuda else None})


RUN_FILES = "last.pt", "best.pt", "log.jsonl"


def earlier_training(settings, resume, device):
    """The checkpoint to go on from, None where there is none. Raises InputError if there is one and `resume` is false, or
    if it is of other settings."""
    last = Path(settings.out, "last.pt")
    if not resume and any(last.with_name(name).exists() for name in RUN_FILES):
        raise InputError(f"{last.parent} holds a run already: go on with it by --resume, or choose another --out")
    if not last.exists():
        if any(last.with_name(name).exists() for name in RUN_FILES):  # it is written before these
            raise InputError(f"{last.parent} holds a run that cannot be resumed, without last.pt: choose another --out")
        return None
    with reading(last):
        saved = read_checkpoint(last, "cpu")
        before = {**saved["settings"], "device": saved["training"]["device"]}
        now, _ = {**asdict(settings), "device": device.type}, RunState(**saved["training"]["run"])
        differing = [f"{key} was {before[key]} and is {now[key]}" for key in now
                     if key not in ("out", "data_dir") and before[key] != now[key]]
    if differing:
        raise InputError(f"{last.parent} cannot be resumed with other settings: {'; '.join(differing)}")
    return saved


def restore(saved, players, settings):
    """Give the players and the random generators the state that save_last wrote. Returns the RunState."""
    training, model = saved["training"], players.model
    with reading(Path(settings.out) / "last.pt"):
        model.load_state_dict(saved["state_dict"])
        players.theta.load_state_dict(training["theta"])
        if players.optimizer:
            players.optimizer.load_state_dict(saved["learned_optimizer"])
            players.phi.load_state_dict(training["phi"])
        torch.set_rng_state(training["random"])
        if model.mean.is_cuda:
            torch.cuda.set_rng_state(training["random_cuda"], model.mean.device)
        run = RunState(**training["run"])
        if run.step:
            run.order, run.total = run.order.to(model.mean.device), run.total.to(model.mean.device)
    return run


@contextmanager
def reading(file):
    """Whatever goes wrong inside is the checkpoint's fault: a foreign or damaged file can raise anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise InputError(f"{file} is not a checkpoint of l2l_adv, or is damaged ({one_line(error)})") from None


def read_checkpoint(file, device):
    """The dictionary that `save` wrote. Raises whatever torch.load does; ValueError for a wrong checksum."""
    damaged = zipfile.ZipFile(file).testzip()  # torch.load does not look at the checksums that torch.save wrote
    if damaged:
        raise ValueError(f"wrong checksum of {damaged}")
    return dict(torch.load(file, map_location=device, weights_only=True))


@contextmanager
def locked(folder):
    """Make the folder, and keep other trainings out of it while this process is in here, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"another training is at work in {folder}: wait for its end, or choose another --out") from None
    except OSError:
        pass  # a file system without locks
    try:
        for name in RUN_FILES:  # what a training that was killed had begun to write
            Path(folder, f"{name}.tmp").unlink(missing_ok=True)
        yield
    finally:
        if fcntl:
            os.close(handle)


def write_whole(path, data):
    """Write bytes beside `path`, then rename: no half-written file ever stands at `path`, even if the machine dies."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def load_run(path, which="best", device="cpu"):
    """A run's folder (its `which`.pt, best or last) or a checkpoint file → (classifier, learned optimizer or None,
    settings), both modules in eval mode. Only tensors and plain values are read. Raises InputError if it is neither."""
    path = Path(path)
    file = path / f"{which}.pt" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} is not a run: {file} is missing")
    with reading(file):
        checkpoint = read_checkpoint(file, device)
        settings, weights = Settings(**checkpoint["settings"]), checkpoint["state_dict"]
        model = MODELS[settings.model](in_channels=weights["mean"].numel()).to(device, memory_format=torch.channels_last)
        model.load_state_dict(weights)
        optimizer = None
        if checkpoint["learned_optimizer"]:
            optimizer = LearnedOptimizer(settings.hidden_size, settings.cell).to(device)
            optimizer.load_state_dict(checkpoint["learned_optimizer"])
    return model.eval(), optimizer and optimizer.eval(), settings


def load_classifier(checkpoint):
    """The classifier of a checkpoint file or run folder, for any attack library: an eval-mode module on the CPU that
    takes images in [0, 1], (B, C, H, W), and returns logits."""
    return load_run(checkpoint)[0]


# ---- 5. The command line --------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake, without the usage before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text):  # argparse names these two in its message: "invalid positive value"
    if not 1 <= int(text) <= 10 ** 9:
        raise ValueError
    return int(text)


def seed(text):
    if not 0 <= int(text) < 2 ** 63:
        raise ValueError
    return int(text)


def keep_freed_memory():
    """Tell glibc not to hand freed blocks back to the system, which would map them anew, page by page, at the next
    operation: on 2 CPU cores a learned attack's cell ran 2.5 times slower that way. Elsewhere, do nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-3, 2 ** 30)  # M_MMAP_THRESHOLD


def as_program(prog, work, *args, hint=""):
    """work(*args), and the exit status: after one clear line 2 for a user's mistake, 1 for numbers that are not finite, 130
    for Ctrl-C; else None."""
    try:
        work(*args)
    except (InputError, OSError, NotFinite) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1 if isinstance(error, NotFinite) else 2
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted{hint}", file=sys.stderr)
        return 130


def main(argv=None):
    """python l2l_adv.py train … here; eval … and bench … are in results/. Returns the exit status."""
    keep_freed_memory()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["eval"]:
        from results.evaluate import main
        return main(argv[1:])
    if argv[:1] == ["bench"]:
        from results.bench import main
        return main(argv[1:])
    parser = Parser(prog="l2l_adv.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("train", help="train one classifier by one method")
    commands.add_parser("eval", help="one table, a row per run")
    commands.add_parser("bench", help="what one training step of each method costs")
    for f in fields(Settings):
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        default = "" if f.default is None else f"; default {f.default}"
        sub.add_argument("--" + f.name.replace("_", "-"), type=f.metadata["kind"], default=f.default, metavar="X",
                         help=f.metadata["help"] + choices + default)
    sub.add_argument("--resume", action="store_true", help="go on where a training with the same settings stopped; or begin")
    sub.add_argument("--checkpoint-every", type=float, default=10.0, metavar="X", help="minutes; default 10")
    return as_program("l2l_adv.py", train_by, parser.parse_args(argv), hint="; the same command with --resume goes on")


def train_by(args):
    """The command `train`."""
    train(Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)}), args.resume, args.checkpoint_every)
    if processes()[1] > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
