"""Improved Adversarial Training via Learned Optimizer (Xiong & Hsieh, ECCV 2020, arXiv 2004.12227).

Adversarial training solves min_θ E max_x' L(f_θ(x'), y) over ‖x' − x‖∞ ≤ eps. PGD climbs the inner problem with
hand-made steps. Here a small recurrent network m_φ, the same for every pixel, learns to climb it while f_θ trains:

    for each mini-batch (x, y):                                                      where
      h_0 = 0, x'_0 = x + 0.001·N(0, I), or uniform in the ball                      ascend
      for t = 0 … T−1:
        g_t = ∇_x' L(f_θ(x'_t), y)                                                   baselines.input_gradient
        δ_t, h_{t+1} = m_φ(g_t, h_t), δ_t in (−1, 1)                                 scaled, LearnedOptimizer.forward
        x'_{t+1} = Π(x'_t + eps·(1 − t/T)·δ_t), where 1 − t/T is ours                baselines.project
      φ ascends Σ_{t=1..T} w_t L(f_θ(x'_t), y), w_t = t                              phi_gradient
      θ descends L(f_θ(x'_T), y), where x'_T is of a sharp attack (ours: SHARP)      theta_gradient

RNN-Adv takes cross-entropy for L. RNN-TRADES takes KL(f(x) ‖ f(x')) inside and CE(f(x), y) + β·KL outside (see
baselines.AdvTrain and baselines.Trades). Sections 1 to 3 are the method, 4 is the training loop with its
checkpoints, 5 the command line:

    python l2l_adv.py train --method rnn-adv --dataset synthetic --out runs/rnn-adv
    python l2l_adv.py eval runs/*
    torchrun --nproc-per-node 4 l2l_adv.py train --method rnn-adv --dataset cifar10 --out runs/rnn-adv
"""
import argparse
import io
import json
import math
import os
import re
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed, nn

from baselines import (DATASETS, MODELS, AdvTrain, InputError, NotFinite, Trades, as_input_error, augment, check,
                       cw_linf, eval_mode, evaluate, hold_out, input_gradient, load_dataset, one_line, pgd, progress,
                       project, start_point, to_unit)


# ---- 1. The learned optimizer m_φ -----------------------------------------------------------------------------------

def tanh(z):
    """torch.tanh at half its cost on a CPU with AVX2 (results/cost.md)."""
    return 2 * torch.sigmoid(2 * z) - 1


class LearnedOptimizer(nn.Module):
    """m_φ: (u_t, h_t) → (δ_t, h_{t+1}), one recurrent cell shared by all coordinates, one state per coordinate.

    cell="lstm": 450 weights at hidden size 10; cell="rnn": the paper's 120 (10 + 100 + 10). No biases in either.
    W is [weight_ih | weight_hh] of nn.LSTMCell(1, hidden_size, bias=False) or nn.RNNCell, its gates in torch's order.
    """

    def __init__(self, hidden_size=10, cell="lstm"):
        super().__init__()
        if cell not in ("lstm", "rnn") or hidden_size < 1:
            raise InputError(f"unknown cell {cell!r} or hidden size {hidden_size}: choose lstm or rnn, and 1 or more")
        self.cell, self.hidden_size = cell, hidden_size
        gates, bound = (4 if cell == "lstm" else 1), hidden_size ** -0.5
        self.W = nn.Parameter(torch.empty(gates * hidden_size, 1 + hidden_size).uniform_(-bound, bound))
        self.W_out = nn.Parameter(torch.empty(1, hidden_size).uniform_(0, bound))
        # Positive weights from u to the candidate and on to δ: the first steps follow sign(u), as PGD's do. They are
        # larger in the LSTM, whose gates let about a quarter through.
        candidate, scale = (self.W[2 * hidden_size:3 * hidden_size], 5) if cell == "lstm" else (self.W, 1)
        nn.init.uniform_(candidate[:, 0], 0, scale * bound)

    def forward(self, u, state=None, gain=1.0):
        """u: the scaled gradient at N coordinates, (N,); state: what the last call returned, None for h_0 = 0.
        Returns δ (N,) in (−1, 1) and the next state. gain: multiplies the read-out, for attacks by longer steps than φ
        learns."""
        if state is None:
            state = u.new_zeros(self.hidden_size, len(u)), u.new_zeros(self.hidden_size, len(u))
        h, c = state  # (H, N) each: the hidden axis comes first
        v = torch.cat([u[None], h])  # (1+H, N)
        if self.cell == "lstm":
            W_i, W_f, W_g, W_o = self.W.split(self.hidden_size)  # (H, 1+H) each
            c = torch.sigmoid(W_f @ v) * c + torch.sigmoid(W_i @ v) * tanh(W_g @ v)
            h = torch.sigmoid(W_o @ v) * tanh(c)
        else:
            h = tanh(self.W @ v)
        return tanh(gain * (self.W_out @ h)[0]), (h, c)


def scaled(g):
    """u_t, what m_φ sees of g_t (B, C, H, W): each image's gradient over its mean |g|, as one vector (N,), N = B·C·H·W.
    The paper leaves scaling open. Gradients shrink by orders of magnitude as the classifier grows sure of an image."""
    mean = g.abs().mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)  # (B, 1, 1, 1)
    return (g / mean).flatten()


# ---- 2. The learned inner maximiser, and φ's gradient without a pass through the classifier -------------------------

SHARP = 10.0  # gain of the attack that θ trains on, and of sharp-N; φ learns at 1, as a saturated tanh has no gradient


class Trace(NamedTuple):
    """What an attack leaves for φ, at K of its N coordinates, drawn from all images before it starts."""
    drawn: torch.Tensor  # (K,), which ones
    x: torch.Tensor  # (K,), like all that follows
    x_0: torch.Tensor
    inputs: list  # u_0 … u_{T−1}
    gradients: list  # g_0 … g_{T−1}


@torch.no_grad()
def ascend(model, optimizer, x, y, eps, steps, objective, start, gain=1.0, share=0.0):
    """T steps of the learned optimizer from a fresh state; the longest they can be shrinks from eps, as 1 − t/T (ours,
    not the paper's). Returns x'_T (B, C, H, W), and the Trace at a `share` of the coordinates."""
    with eval_mode(model):
        target = objective.target(model, x, y)
        x_adv = start_point(x, eps, start)
        drawn = torch.randperm(x.numel() if share else 0, device=x.device)[:math.ceil(share * x.numel())]  # (K,)
        trace = Trace(drawn, x.flatten()[drawn], x_adv.flatten()[drawn], [], [])
        state = None  # h_0 = 0
        for t in range(steps):
            g, _ = input_gradient(model, x_adv, objective, target)
            u = scaled(g)
            delta, state = optimizer(u, state, gain)
            x_adv = project(x_adv + eps * (1 - t / steps) * delta.view(x.shape), x, eps)  # (B, C, H, W)
            trace.inputs.append(u[drawn])
            trace.gradients.append(g.flatten()[drawn])
    return x_adv, trace


def learned_attack(model, optimizer, x, y, *, eps, steps=10, objective=AdvTrain(), start="gaussian", gain=1.0):
    """The learned optimizer as an attack, a drop-in for pgd: it takes `steps` gradients of `model`.

    x: (B, C, H, W) in [0, 1]; y: (B,); eps in [0, 1] pixel scale; gain: see LearnedOptimizer.forward. Returns x' like
    x, within eps of it. Raises InputError.
    """
    if not isinstance(optimizer, nn.Module):
        raise InputError(f"the learned attack needs a LearnedOptimizer, not {optimizer!r}: take it from an rnn- run")
    check(x, y, eps, steps)
    return ascend(model, optimizer, x, y, eps, steps, objective, start, gain)[0]


def phi_gradient(optimizer, opt_phi, trace, g_T, eps):
    """Sets φ's gradient, so that opt_phi ascends Σ_{t=1..T} w_t L(f(x'_t), y) / Σ_t w_t, w_t = t, in the mean over the
    images; clipped to norm 1.

    The g_t are data to the optimizer (second derivatives are dropped), so by the chain rule
        ∂/∂φ Σ_t w_t L(f(x'_t), y)  =  Σ_t w_t ⟨∇_x' L(f(x'_t), y), ∂x'_t/∂φ⟩  =  ∂/∂φ Σ_t w_t ⟨g_t, x'_t⟩.
    Every g_t on the right is there already: the attack needed g_0 … g_{T−1}, θ's update computes g_T. So φ's gradient
    costs no pass through the classifier; only the cell is unrolled once more, at gain 1. After a sharper attack the g_t
    are those of its points, not of this unroll's: an approximation. ⟨·,·⟩ is a sum over coordinates, so the drawn ones
    give an unbiased estimate of it. g_T: (B, C, H, W).
    """
    opt_phi.zero_grad()
    x_adv, state, total = trace.x_0, None, 0.0  # (K,)
    gradients = [*trace.gradients[1:], g_T.flatten()[trace.drawn]]  # g_1 … g_T
    T = len(gradients)
    for t, (u, g) in enumerate(zip(trace.inputs, gradients)):
        delta, state = optimizer(u, state)
        x_adv = project(x_adv + eps * (1 - t / T) * delta, trace.x, eps)  # x'_{t+1}, at which g is g_{t+1}
        total = total + (t + 1) * (g * x_adv).mean()  # w_{t+1} ⟨g_{t+1}, x'_{t+1}⟩, mean over the coordinates
    per_image = g_T[0].numel() / sum(range(1, T + 1))  # C·H·W coordinates each, over Σ w_t
    (-per_image * total).backward()
    nn.utils.clip_grad_norm_(optimizer.parameters(), 1.0)


# ---- 3. One alternating update --------------------------------------------------------------------------------------

def theta_gradient(model, opt_theta, objective, x, x_adv, y):
    """θ's gradient: of the outer loss at x' (B, C, H, W), in the model's own mode. Returns the loss, a scalar."""
    opt_theta.zero_grad()
    loss = objective.outer_loss(model, x, x_adv, y)
    loss.backward()
    return loss.detach()


def update(loss, *torch_optimizers):
    """Each moves its weights along their gradient; or none does, and NotFinite is raised, if a number is not finite."""
    weights = [[p for group in each.param_groups for p in group["params"]] for each in torch_optimizers]
    norms = [nn.utils.clip_grad_norm_(each, math.inf) for each in weights]  # measures them, and clips nothing
    sizes = torch.stack([loss, *norms]).tolist()
    if not all(map(math.isfinite, sizes)):
        raise NotFinite(f"the loss or a gradient is not finite (loss and gradient norms: {sizes})")
    for each in torch_optimizers:
        each.step()


def train_step_pgd(model, opt_theta, x, y, *, objective=AdvTrain(), start="uniform", **budget):
    """PGD finds x', θ descends on it: AdvTrain or TRADES. budget: eps, step_size, steps and what else pgd takes;
    opt_theta: the torch optimizer of the weights of `model`. Returns the outer loss, a scalar tensor. Raises
    InputError, NotFinite."""
    x_adv = pgd(model, x, y, objective=objective, start=start, **budget)
    loss = theta_gradient(model, opt_theta, objective, x, x_adv, y)
    update(loss, opt_theta)
    return loss


def train_step_learned(model, optimizer, opt_theta, opt_phi, x, y, *, eps, steps, objective=AdvTrain(), start="uniform",
                       gain=SHARP, share=1 / 16):
    """The learned optimizer finds x', θ descends on it, φ ascends by the gradients on the way: RNN-Adv or RNN-TRADES.

    opt_theta, opt_phi: the torch optimizers of the weights of `model` and of `optimizer`. x: (B, C, H, W) in [0, 1]; y:
    (B,); eps in [0, 1] pixel scale; start: "gaussian" is near x, as in the paper, but may make a less robust classifier
    (results/mnist.md), as may gain=1, see SHARP; share: of the coordinates, those that φ learns from. Returns the outer
    loss, a scalar tensor. Raises InputError, NotFinite.
    """
    check(x, y, eps, steps)
    x_adv, trace = ascend(model, optimizer, x, y, eps, steps, objective, start, gain, share)
    if type(objective) in (AdvTrain, Trades):
        # Their outer loss is, in x', beta times the batch mean of the inner one, so g_T comes with θ's backward pass.
        # That runs in the model's training mode: with batch norm, g_T and TRADES' f(x) use the batch's statistics,
        # where g_0 … g_{T−1} use the running ones, and g_T holds x'_T's effect on the batch's other images too.
        loss = theta_gradient(model, opt_theta, objective, x, x_adv.requires_grad_(), y)
        g_T = x_adv.grad * (len(x) / objective.beta)
    else:  # nothing is known of another objective
        g_T, _ = last_gradient(model, x, x_adv, y, objective)
        loss = theta_gradient(model, opt_theta, objective, x, x_adv, y)
    phi_gradient(optimizer, opt_phi, trace, g_T, eps)
    update(loss, opt_theta, opt_phi)
    return loss


def last_gradient(model, x, x_adv, y, objective):
    """g_T (B, C, H, W) by a pass of its own, like g_0 … g_{T−1}, and the inner losses (B,)."""
    with eval_mode(model):
        return input_gradient(model, x_adv, objective, objective.target(model, x, y))


def train_optimizer(model, batches, *, eps, steps=10, objective=AdvTrain(), optimizer=None, lr=0.01, share=1.0):
    """Train φ alone, against a classifier that stays as it is: a learned attack on any model.

    batches: an iterable of x (B, C, H, W) in [0, 1], y (B,), such as a DataLoader: one update of φ each. optimizer:
    the LearnedOptimizer to go on with; default a new one. lr: Adam's. share: of the coordinates, those that φ learns
    from; memory grows with them. Returns the optimizer, in eval mode. Raises InputError, NotFinite.
    """
    optimizer = optimizer or LearnedOptimizer()
    opt_phi = torch.optim.Adam(optimizer.parameters(), lr)
    for x, y in batches:
        check(x, y, eps, steps)
        x_adv, trace = ascend(model, optimizer.to(x.device), x, y, eps, steps, objective, "gaussian", share=share)
        g_T, losses = last_gradient(model, x, x_adv, y, objective)
        phi_gradient(optimizer, opt_phi, trace, g_T, eps)
        update(losses.mean(), opt_phi)  # the losses only have to be finite
    if not opt_phi.state:
        raise InputError("there was no batch: is it a generator that was used before?")
    return optimizer.eval()


# ---- 4. The training loop -------------------------------------------------------------------------------------------

METHODS = {  # an objective, and who maximises its inner loss: the paper's grid; shrinking steps are ours
    "plain": (AdvTrain, None), "advtrain": (AdvTrain, "pgd"), "advtrain-decay": (AdvTrain, "shrinking steps"),
    "advtrain-bls": (AdvTrain, "line search"), "trades": (Trades, "pgd"), "trades-decay": (Trades, "shrinking steps"),
    "rnn-adv": (AdvTrain, "learned"), "rnn-trades": (Trades, "learned")}
DEFAULTS = {  # of the settings that are left at None: by data set, then by model
    "synthetic": {"model": "small", "eps": 8 / 255, "epochs": 3},
    "mnist": {"model": "cnn4", "eps": 0.3, "epochs": 3, "lr": 0.05},
    "cifar10": {"model": "vgg16", "eps": 8 / 255, "epochs": 30},
    "small": {"batch_size": 64, "lr": 0.2, "eps_warmup": 0.25, "padding": 0},
    "cnn4": {"batch_size": 64, "lr": 0.05, "eps_warmup": 0.25, "padding": 0},
    "vgg16": {"batch_size": 128, "lr": 0.05, "eps_warmup": 0.0, "padding": 4},
    "resnet18": {"batch_size": 128, "lr": 0.1, "eps_warmup": 0.0, "padding": 4},
    "wrn34": {"batch_size": 128, "lr": 0.1, "eps_warmup": 0.0, "padding": 4}}


def number(low, high, whole=False):
    """A parser for argparse: of a number of at least `low` and below `high`."""
    def parse(text):
        numerator, _, denominator = text.partition("/")
        with suppress(ValueError, ArithmeticError):
            value = int(text) if whole else float(numerator) / float(denominator or 1)
            if low <= value < high:
                return value
        kind = "whole number" if whole else "number, such as 0.031 or 8/255,"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {kind} of at least {low:g} and below {high:g}")
    return parse


OWN = "own"  # what the settings of a run call a model or data set of the caller's
COUNT, SEED = number(1, 1e9, whole=True), number(0, 1e9, whole=True)
POSITIVE, PIXELS = number(1e-9, 1e9), number(1e-9, 1)


def setting(default, help, parse=str, choices=None):
    """A field of Settings, and its flag of `train`."""
    return field(default=default, metadata={"help": help, "type": parse, "choices": choices})


@dataclass
class Settings:
    """Everything that decides a run; `train --help` lists the same, and checks numbers. What is None here is set by
    DEFAULTS, or by the device. Raises InputError for a name that it does not know."""
    out: str = setting(None, "folder of the run, made by it: last.pt, best.pt, log.jsonl; later eval.json")
    method: str = setting("rnn-adv", "the objective, and who maximises its inner loss", choices=METHODS)
    dataset: str = setting("synthetic", "what is classified", choices=DATASETS)
    model: str = setting(None, "the classifier; default small, mnist cnn4, cifar10 vgg16", choices=MODELS)
    data_dir: str = setting(None, "where the data lies; default $MNIST_DIR or $CIFAR10_DIR, else data/")
    limit: int = setting(None, "train on so many images; default all but the held-out ones", COUNT)
    padding: int = setting(None, "cifar10: random crops so far beyond the edge; default 4, small and cnn4 0 (flips)",
                           number(0, 33, whole=True))
    eps: float = setting(None, "radius of the attack, in [0, 1] pixels; default 8/255, mnist 0.3", PIXELS)
    eps_warmup: float = setting(None, "share of the training in which eps grows; default 0, small and cnn4 0.25",
                              number(0, 1))
    steps: int = setting(10, "T, the inner steps", COUNT)
    step_size: float = setting(None, "PGD's step, or its longest; default eps/4, mnist eps/3; bls and decay eps",
                               PIXELS)
    beta: float = setting(6.0, "weight of TRADES' robust term", POSITIVE)
    cell: str = setting("lstm", "the learned optimizer's recurrent cell", choices=("lstm", "rnn"))
    phi_lr: float = setting(0.01, "peak learning rate of the learned optimizer (Adam, one-cycle)", POSITIVE)
    epochs: int = setting(None, "passes over the training images; default 3, cifar10 30", COUNT)
    batch_size: int = setting(None, "images per step; default 64 for small and cnn4, else 128", COUNT)
    lr: float = setting(None, "peak learning rate of the classifier (SGD, one-cycle); by model and data", POSITIVE)
    precision: str = setting(None, "in training; default bf16 on CUDA, else fp32", choices=("fp32", "bf16"))
    compile: str = setting("no", "torch.compile classifier and learned optimizer", choices=("no", "yes"))
    seed: int = setting(0, "of everything random", SEED)
    device: str = setting("auto", "auto (cuda where there is one), cpu, cuda, cuda:1")

    def __post_init__(self):
        if not self.out:
            raise InputError("give the run a folder: --out runs/NAME")
        self.out, self.data_dir = str(self.out), self.data_dir and str(self.data_dir)  # a checkpoint takes no Path
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in (None, OWN, *choices):
                raise InputError(f"unknown {f.name} {value!r}: choose from {', '.join(choices)}")
        for key in ("dataset", "model"):  # in this order: the data set may choose the model
            for name, value in DEFAULTS.get(getattr(self, key), {}).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        if self.step_size is None:
            usual = self.eps / (3 if self.dataset == "mnist" else 4)  # chosen in results/mnist.md
            self.step_size = usual if METHODS[self.method][1] == "pgd" else self.eps


def make_objective(settings):
    """The objective of settings.method; TRADES and its kind with their beta."""
    objective = METHODS[settings.method][0]
    return objective(settings.beta) if issubclass(objective, Trades) else objective()


class InBf16(nn.Module):
    """A classifier with its layers in bf16, weights and logits in fp32. For training alone: its input gradients are
    rounded, and near x, where TRADES' KL is almost flat, rounding is much of them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.model(x).float()


class Training:
    """A run under way: the data, both players, the torch optimizers that move them, and the rows of its log."""

    def __init__(self, settings, model=None, data=None):
        self.device, self.rows = pick_device(settings.device), []
        settings = self.settings = replace(
            settings, model=settings.model if model is None else OWN, dataset=settings.dataset if data is None else OWN,
            precision=settings.precision or ("bf16" if self.device.type == "cuda" else "fp32"))
        data = hold_out(data or load_dataset(settings.dataset, settings.data_dir), settings.limit)
        (self.x, self.y), (x, y) = ([part.to(self.device) for part in each] for each in data)
        self.held_out = to_unit(x), y
        (_, world), self.batch_size = processes(), min(settings.batch_size, len(self.x))
        if self.batch_size % world or self.batch_size < 2 * world:
            raise InputError(f"{self.batch_size} images do not give {world} process(es) the same number, two or more")
        torch.manual_seed(settings.seed)
        if model is None:
            model = MODELS[settings.model](in_channels=self.x.shape[1])
            model.normalize_like(data[0][0])
        self.objective, self.maximiser = make_objective(settings), METHODS[settings.method][1]
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.opt_theta = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=5e-4)
        self.optimizer = self.opt_phi = None
        if self.maximiser == "learned":
            self.optimizer = LearnedOptimizer(cell=settings.cell).to(self.device)
            self.opt_phi = torch.optim.Adam(self.optimizer.parameters(), settings.phi_lr)
        parts = {"model": self.model, "opt_theta": self.opt_theta, "optimizer": self.optimizer, "opt_phi": self.opt_phi}
        self.parts = {name: part for name, part in parts.items() if part}  # what a checkpoint holds
        self.trained_model = InBf16(model) if settings.precision == "bf16" else model  # evaluation takes self.model
        if settings.compile == "yes":
            self.trained_model.compile()
            if self.optimizer:
                self.optimizer.compile()

    def step(self, x, y, ramp=1.0):
        """One update by settings.method, with eps times `ramp`, on x (B, C, H, W), y (B,). Returns the outer loss."""
        settings, model, objective = self.settings, self.trained_model, self.objective
        if self.maximiser is None:
            loss = theta_gradient(model, self.opt_theta, objective, x, x, y)
            update(loss, self.opt_theta)
            return loss
        budget = {"eps": ramp * settings.eps, "steps": settings.steps, "objective": objective}
        if self.maximiser == "learned":
            return train_step_learned(model, self.optimizer, self.opt_theta, self.opt_phi, x, y, **budget)
        return train_step_pgd(model, self.opt_theta, x, y, step_size=ramp * settings.step_size, **budget,
                              line_search=self.maximiser == "line search",
                              decay=self.maximiser == "shrinking steps")

    def epoch(self):
        """One pass over the training images in whole batches. Returns the mean outer loss."""
        settings, epoch, (rank, world) = self.settings, len(self.rows), processes()
        rng = np.random.default_rng((settings.seed, epoch))  # an epoch's randomness comes from seed, epoch and rank
        order = torch.from_numpy(rng.permutation(len(self.x))).to(self.device)  # (N,), the same in all processes
        torch.manual_seed(int(rng.integers(2 ** 60)) + rank)
        self.trained_model.train()
        steps, total = len(self.x) // self.batch_size, 0.0
        for step in progress(range(steps), f"epoch {epoch + 1}"):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size][rank::world]
            x = augment(self.x[batch], settings.padding) if settings.dataset == "cifar10" else self.x[batch]
            done = (epoch + (step + 0.5) / steps) / settings.epochs  # of the whole training, in (0, 1)
            one_cycle = min(3 * done, 1.5 * (1 - done))  # of the peak rates: up within a third, and down to 0
            self.opt_theta.param_groups[0]["lr"] = settings.lr * one_cycle
            if self.opt_phi:
                self.opt_phi.param_groups[0]["lr"] = settings.phi_lr * one_cycle
            ramp = min(1.0, done / settings.eps_warmup) if settings.eps_warmup else 1.0
            total = total + self.step(to_unit(x), self.y[batch], ramp)
        return (total / steps).item()

    def save(self):
        """Write best.pt if the last row is the best so far, log.jsonl, and, last, last.pt: what a kill leaves undone is
        done again."""
        out, score = Path(self.settings.out), "natural" if self.maximiser is None else "pgd-10"
        checkpoint = io.BytesIO()
        torch.save({"settings": asdict(self.settings), "rows": self.rows,
                    **{name: part.state_dict() for name, part in self.parts.items()}}, checkpoint)
        scores = [row["accuracy"][score] for row in self.rows]
        if scores[-1] > max(scores[:-1], default=-1):
            write_whole(out / "best.pt", checkpoint.getbuffer())
        write_whole(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        write_whole(out / "last.pt", checkpoint.getbuffer())

    def restore(self, path):
        """Take the state that `save` wrote to last.pt, `path`. Raises InputError if it is of other settings."""
        checkpoint = read_checkpoint(path)
        before, now = asdict(checkpoint["settings"]), asdict(self.settings)
        differing = [f"{name} was {before[name]} and is {now[name]}" for name in now
                     if before[name] != now[name] and name not in ("out", "data_dir", "device")]
        if differing:
            raise InputError(f"{path} cannot be resumed with other settings: {'; '.join(differing)}")
        with as_input_error(path):
            self.rows = checkpoint["rows"]
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])


def train(settings, model=None, data=None, resume=False):
    """Train by settings.method; a row per epoch on stdout and, as JSON, in the run's folder. Returns the rows.

    model, data: a classifier and a baselines.Dataset (not augmented) of your own, in place of those that the settings
    name. best.pt is chosen by accuracy under PGD-10 (for `plain`, without an attack) on held-out training images.
    resume: go on after the last finished epoch, if there is one. On a CPU, in one process with as many threads, this
    ends in the same weights, bit for bit, as a training that was never interrupted. Raises InputError before anything
    is written; NotFinite.
    """
    if processes()[1] > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if pick_device(settings.device).type == "cuda" else "gloo")
    last = Path(settings.out, "last.pt")
    if last.exists() and not resume:
        raise InputError(f"{last.parent} holds a run already: go on with it by --resume, or choose another --out")
    run = Training(settings, model, data)
    if last.exists():
        run.restore(last)
    settings, (rank, world) = run.settings, processes()
    if world > 1:
        share_gradients(run.model, run.optimizer)
    if rank == 0:
        print(f"{settings.method}, {settings.dataset} ({len(run.x)} images), {settings.model}, eps = "
              f"{settings.eps * 255:g}/255, T = {settings.steps}, seed {settings.seed}, {run.device}; accuracy in % "
              f"and loss\n{'epoch':>5}{'loss':>9}{'natural':>16}{'pgd-10':>16}{'learned-10':>16}{'seconds':>9}")
    attacks = named_attacks(("pgd-10", "learned-10"), settings.eps, run.optimizer)
    last.parent.mkdir(parents=True, exist_ok=True)
    for epoch in range(len(run.rows) + 1, settings.epochs + 1):
        start = time.time()
        try:
            loss = run.epoch()
            accuracy, losses, _ = evaluate(run.model, *run.held_out, attacks, details=True)
        except NotFinite as error:
            raise NotFinite(f"{settings.method}, epoch {epoch}: {error}; the epoch before is saved, if any") from None
        seconds = round(time.time() - start, 1)
        run.rows.append({"epoch": epoch, "loss": loss, "accuracy": accuracy, "losses": losses, "seconds": seconds})
        if rank == 0:
            scores = (f"{100 * accuracy[name]:8.2f}{losses[name]:8.4f}" for name in losses)
            print(f"{epoch:5}{loss:9.4f}{''.join(scores):48}{seconds:9}", flush=True)
            run.save()
    return run.rows


def processes():
    """(rank, number of processes), as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share_gradients(*players):
    """Give modules (None is left out) the weights of the first process, and from now on every gradient its mean over
    the processes, as soon as it is computed."""
    def average(weight):
        distributed.all_reduce(weight.grad)
        weight.grad /= distributed.get_world_size()

    for player in filter(None, players):
        for tensor in player.state_dict().values():
            distributed.broadcast(tensor, 0)
        for weight in player.parameters():
            weight.register_post_accumulate_grad_hook(average)


# Checkpoints: tensors and plain values, nothing that needs unpickling of code

def write_whole(path, data):
    """Write bytes beside `path`, then rename: no half-written file ever stands at `path`."""
    beside = Path(f"{path}.tmp")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_checkpoint(path, device="cpu"):
    """The dictionary that Training.save wrote. Only tensors and plain values are read. Raises InputError."""
    with as_input_error(path):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums that torch.save wrote
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        return {**checkpoint, "settings": Settings(**checkpoint["settings"])}


def load_run(folder, which="best", device="cpu", model=None):
    """A run's folder (its best.pt or last.pt) or a checkpoint file → (classifier, learned optimizer or None, settings),
    the modules in eval mode. model: a classifier of your own, if the run was of such a one. Raises InputError."""
    path = Path(folder) / f"{which}.pt" if Path(folder).is_dir() else Path(folder)
    checkpoint = read_checkpoint(path, device)
    settings, weights, optimizer = checkpoint["settings"], checkpoint["model"], None
    if settings.model == OWN and model is None:
        raise InputError(f"{path} is of a model of your own: give it to load_run")
    with as_input_error(path):
        model = model or MODELS[settings.model](in_channels=weights["mean"].numel())
        model.to(device, memory_format=torch.channels_last).load_state_dict(weights)
        if "optimizer" in checkpoint:
            optimizer = LearnedOptimizer(cell=settings.cell).to(device).eval()
            optimizer.load_state_dict(checkpoint["optimizer"])
    return model.eval(), optimizer, settings


def load_classifier(checkpoint):
    """The classifier of a checkpoint file or run folder, for any attack library: an eval-mode module on the CPU that
    takes images in [0, 1], (B, C, H, W), and returns logits."""
    return load_run(checkpoint)[0]


# ---- 5. The command line: train, eval -------------------------------------------------------------------------------

def named_attacks(names, eps, optimizer):
    """pgd-N, cw-N (with steps of eps/4), learned-N, sharp-N → {name: callable(model, x, y) → x'}, after N steps each;
    without those that need a learned optimizer, if there is none. On cross-entropy or margins, whatever φ was trained
    on: those are the stronger attacks. Raises InputError."""
    def attack(family, steps):
        budget = {"eps": eps, "steps": int(steps)}
        if family == "pgd":
            return lambda model, x, y: pgd(model, x, y, **budget, step_size=eps / 4)
        if family == "cw":
            return lambda model, x, y: cw_linf(model, x, y, **budget, step_size=eps / 4)
        gain = SHARP if family == "sharp" else 1.0
        return lambda model, x, y: learned_attack(model, optimizer, x, y, **budget, gain=gain)

    for name in names:
        if not re.fullmatch(r"(pgd|cw|learned|sharp)-[1-9]\d{0,5}", name):
            raise InputError(f"unknown attack {name!r}: write pgd-10, cw-100, learned-10 or sharp-10, or other steps")
    return {name: attack(*name.split("-")) for name in names if optimizer or name.startswith(("pgd", "cw"))}


def load_runs(args, eps=None):
    """What add_run_arguments asks for → {folder: what load_run returns, or the learned optimizer that is lent}, test
    images x (N, C, H, W) and y (N,), eps (of the runs, unless it is given), a heading. Raises InputError."""
    device = pick_device(args.device)
    for folder in args.runs:
        if not Path(folder).is_dir():
            raise InputError(f"{folder} is not a run's folder")
    runs = {folder: load_run(folder, args.checkpoint, device) for folder in args.runs}
    if args.lend:
        lent = load_run(args.lend, args.checkpoint, device)[1]
        if not lent:
            raise InputError(f"{args.lend} has no learned optimizer to lend: take an rnn- run")
        runs = {folder: (model, optimizer or lent, each) for folder, (model, optimizer, each) in runs.items()}
    settings = runs[args.runs[0]][2]
    if len({(each.dataset, eps or each.eps) for _, _, each in runs.values()}) > 1:
        raise InputError("these runs differ in data set or eps: make separate tables of them")
    data, eps = load_dataset(settings.dataset, args.data_dir or settings.data_dir), eps or settings.eps
    x, y = to_unit(data.x_test[:args.limit]).to(device), data.y_test[:args.limit].to(device)
    return runs, x, y, eps, (f"{settings.dataset}, eps = {eps * 255:g}/255, the first {len(x)} test images, "
                             f"{args.checkpoint} checkpoint, attack seed {args.seed}")


def eval_command(args):
    """A table on stdout, a row per run; the same numbers, and the mean cross-entropies, in each run's eval.json."""
    runs, x, y, eps, heading = load_runs(args, args.eps)
    attacks = {folder: named_attacks(args.attacks.split(","), eps, optimizer)
               for folder, (_, optimizer, _) in runs.items()}
    columns = ["natural", *args.attacks.split(","), "worst"]
    width = max(map(len, runs)) + 2
    print(f"{heading}; accuracy in %{', after each attack and those before it' if args.quick else ''}")
    print(f"{'run':{width}}{'model':9}{'seed':>4}" + "".join(f"{name:>12}" for name in columns))
    for folder, (model, optimizer, settings) in runs.items():
        torch.manual_seed(args.seed)
        accuracy, loss, _ = evaluate(model, x, y, attacks[folder], args.batch_size, details=True, quick=args.quick)
        cells = (f"{100 * accuracy[name]:12.2f}" if name in accuracy else f"{'-':>12}" for name in columns)
        print(f"{folder:{width}}{settings.model:9}{settings.seed:4}{''.join(cells)}", flush=True)
        result = {"run": Path(folder).name, "method": settings.method, "dataset": settings.dataset,
                  "model": settings.model, "eps": eps, "images": len(x), "checkpoint": args.checkpoint,
                  "training_seed": settings.seed, "seed": args.seed, "batch_size": args.batch_size,
                  "lender": None if METHODS[settings.method][1] == "learned" else args.lend, "quick": args.quick,
                  "accuracy": accuracy, "loss": None if args.quick else loss}
        write_whole(Path(folder) / "eval.json", (json.dumps(result, indent=1) + "\n").encode())


def train_command(args):
    """The command `train`."""
    train(Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)}), resume=args.resume)
    if processes()[1] > 1:
        distributed.destroy_process_group()


def pick_device(name):
    """The torch device called `name`; "auto" is CUDA where there is one; under torchrun each process has its own card.
    Turns TF32 off where torch has it on, in convolutions: fp32 means fp32, above all in evaluation."""
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the device `meta` makes tensors, but has no numbers
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {name!r} here ({one_line(error)}): auto, cpu, cuda or cuda:1") from None


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake, without the usage before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def as_program(args):
    """The exit status of args.command(args), after one clear line: 2 for a user's mistake, 1 for numbers that are not
    finite, 130 for Ctrl-C; else 0."""
    try:
        args.command(args)
        return 0
    except (InputError, OSError, NotFinite, KeyboardInterrupt) as error:
        message = "interrupted; a training goes on by --resume" if isinstance(error, KeyboardInterrupt) else error
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        return {NotFinite: 1, KeyboardInterrupt: 130}.get(type(error), 2)


def add_run_arguments(command, limit=None):
    """What `eval` and the scripts in results/ ask: which runs meet which images. limit: the default."""
    command.add_argument("runs", nargs="+", help="run folders, all of one data set and eps")
    command.add_argument("--checkpoint", choices=("best", "last"), default="best")
    command.add_argument("--limit", type=COUNT, default=limit,
                         help=f"the first so many test images; default {limit or 'all'}")
    command.add_argument("--batch-size", type=COUNT, default=256)
    command.add_argument("--data-dir", help="where the data lies; default as in training")
    command.add_argument("--device", default="auto")
    command.add_argument("--seed", type=SEED, default=0, help="of the attacks")
    command.add_argument("--lend", metavar="RUN", help="its learned optimizer attacks the runs that have none")


def main(argv=None):
    """python l2l_adv.py train … or eval …; returns the exit status."""
    parser = Parser(prog="l2l_adv.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train one classifier by one method")
    command.set_defaults(command=train_command)
    for f in fields(Settings):
        default = "" if f.default is None else "; default %(default)s"
        command.add_argument(f"--{f.name.replace('_', '-')}", default=f.default,
                             **{**f.metadata, "help": f.metadata["help"] + default})
    command.add_argument("--resume", action="store_true", help="go on after the last finished epoch, or begin")
    command = commands.add_parser("eval", help="one table, a row per run; also eval.json in each run's folder")
    command.set_defaults(command=eval_command)
    add_run_arguments(command)
    command.add_argument("--eps", type=PIXELS, help="default: the one trained with")
    command.add_argument("--attacks", default="pgd-10,pgd-100,cw-100,learned-10", metavar="NAME,NAME",
                         help="pgd-N, cw-N, learned-N, sharp-N (learned-N with longer steps); default %(default)s")
    command.add_argument("--quick", action="store_true", help="attack no image again that one attack broke")
    return as_program(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
