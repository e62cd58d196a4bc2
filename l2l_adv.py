"""Improved Adversarial Training via Learned Optimizer (Xiong & Hsieh, ECCV 2020, arXiv 2004.12227).

Adversarial training solves min_θ E max_x' L(f_θ(x'), y) over ‖x' − x‖∞ ≤ eps. PGD climbs the inner
problem with a step size chosen by hand. Here a small recurrent network m_φ, shared by all pixels,
learns to climb it while the classifier f_θ trains. RNN-Adv takes cross-entropy for L. RNN-TRADES
takes KL(f(x) ‖ f(x')) in the attack and for φ, and CE(f(x), y) + β·KL for θ. Π projects onto the
ball around x and onto [0, 1].

    for each mini-batch (x, y):                           train
      h_0 = 0,  x'_0 = x + 0.001·N(0, I)                  baselines.random_start
      for t = 0 … T−1:                                    learned_attack
        g_t = ∇_x' L(f_θ(x'_t), y)                        baselines.input_gradient
        δ_t, h_{t+1} = m_φ(g_t, h_t)                      normalize_gradient, LearnedOptimizer
        x'_{t+1} = Π(x'_t + δ_t)                          baselines.project
      φ ascends Σ_{t=1..T} w_t L(f_θ(x'_t), y), w_t = t   phi_gradient, update
      θ descends L(f_θ(x'_T), y)                          theta_gradient, update

We know the paper's abstract and its algorithm, not its full text. The cell, the images that φ
learns from, g_T and the batches of small classifiers are not the paper's. The other choices are
ours where we do not know the paper's:

                        here                                                 instead
    cell                an LSTM of 450 weights; the paper's RNN has 120      --cell rnn
    start in training   x + 0.001·N(0, I) for PGD as well                    --start uniform
    input of m_φ        each image's g over its mean absolute value
    size of a step      δ_t = eps·delta, delta = tanh(·): no step exceeds eps
    second derivatives  dropped: g_t is a constant in φ's gradient
    first weights of φ  such that the first step follows the sign of g
    φ learns from       a sixteenth of the images in the batch               --phi-share 1
    g_T                 comes from θ's backward pass, at no cost
    batch norm          attacks use its running statistics; θ's update, and so
                        g_T, those of the batch (TRADES: x and x' together)
    optimizers          SGD with momentum for θ, Adam for φ, one-cycle       --lr, --phi-lr
    clipping            θ's gradient to norm 10, φ's to norm 1               --clip inf (θ)
    small classifiers   batches of 64; eps grows in the first quarter        --eps-warmup 0
SPDX-License-Identifier: MIT
"""
import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn

from baselines import (DATASETS, MODELS, AdvTrain, InputError, Margin, Trades, augment, check_batch,
                       check_model, eval_mode, evaluate, hold_out, input_gradient, load_dataset,
                       pgd, progress, project, random_start, reading)


CLIP = 10.0  # the largest norm of θ's gradient
PHI_CLIP = 1.0  # the largest norm of φ's gradient


# ---- 1. The learned optimizer --------------------------------------------------------------------

class LearnedOptimizer(nn.Module):
    """m_φ: one recurrent cell, shared by all pixels, with a state for each pixel.

    cell="lstm" has 450 weights, cell="rnn" the paper's 120. W is [weight_ih | weight_hh] of
    nn.LSTMCell or nn.RNNCell without biases. The cell is written out because a training step of a
    small classifier takes over 1.5 times as long with nn.LSTMCell.
    """

    def __init__(self, hidden_size=10, cell="lstm"):
        super().__init__()
        if cell not in ("lstm", "rnn"):
            raise InputError(f"unknown cell {cell!r}: use lstm or rnn")
        self.cell = cell
        self.hidden_size = hidden_size
        gates = 4 if cell == "lstm" else 1
        bound = hidden_size ** -0.5
        self.W = nn.Parameter(torch.empty(gates * hidden_size, 1 + hidden_size))
        self.W_out = nn.Parameter(torch.empty(1, hidden_size))
        nn.init.uniform_(self.W, -bound, bound)
        # The weights from u to the candidate and from h to δ are positive, so that the first step
        # follows the sign of the gradient. The gates of an LSTM shrink the step, so the weights to
        # its candidate are larger.
        nn.init.uniform_(self.W_out, 0, bound)
        if cell == "lstm":
            nn.init.uniform_(self.W[2 * hidden_size:3 * hidden_size, 0], 0, 5 * bound)
        else:
            nn.init.uniform_(self.W[:, 0], 0, bound)

    def forward(self, u, state=None):
        """u: the normalized gradient, (N,); state: as the last call returned it, or None at the
        first step. Returns delta in (−1, 1), (N,), and the next state."""
        # On a CPU, blocks of pixels that fit into its cache are much faster than all at once.
        blocks = u.split(16384 if u.device.type == "cpu" else len(u))  # (n,) each
        if state is None:
            zeros = [u.new_zeros(self.hidden_size, len(block)) for block in blocks]  # h_0 = 0
            state = list(zip(zeros, zeros))
        results = [self.step_block(block, h, c) for block, (h, c) in zip(blocks, state)]
        return torch.cat([delta for delta, _, _ in results]), [(h, c) for _, h, c in results]

    def step_block(self, u, h, c):
        """One step of the cell. u: (n,); h, c: (H, n). Returns delta, (n,), and the next h and c.
        The RNN does not use c."""
        v = torch.cat([u[None], h])  # (1+H, n)
        if self.cell == "lstm":
            W_i, W_f, W_g, W_o = self.W.split(self.hidden_size)  # (H, 1+H) each
            c = torch.sigmoid(W_f @ v) * c + torch.sigmoid(W_i @ v) * tanh(W_g @ v)
            h = torch.sigmoid(W_o @ v) * tanh(c)
        else:
            h = tanh(self.W @ v)
        return tanh(self.W_out @ h)[0], h, c


def tanh(z):
    """torch.tanh, by way of torch.sigmoid, which is faster on most CPUs."""
    return 2 * torch.sigmoid(2 * z) - 1


def normalize_gradient(g):
    """Divide each image's gradient by its mean absolute value: gradients shrink by orders of
    magnitude as the classifier learns. g: (B, C, H, W). Returns one vector of pixels, (N,)."""
    mean = g.abs().mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return (g / mean.clamp(min=torch.finfo(g.dtype).tiny)).flatten()  # (N,), N = B·C·H·W


# ---- 2. Its attack, and the gradient of φ --------------------------------------------------------

@torch.inference_mode(False)  # so that it works inside the caller's torch.inference_mode() as well
@torch.no_grad()
def learned_attack(model, optimizer, x, y, *, eps, steps=10, objective=AdvTrain(),
                   start="gaussian", trace=None):
    """Attack with the learned optimizer m_φ, in place of pgd.

    x: (B, C, H, W) in [0, 1]; y: (B,) labels; eps in [0, 1] pixel scale; steps: T; trace: a list
    that receives x'_t and g_t, a pair for each t < T. Returns x'_T, shaped like x. Raises
    InputError.
    """
    if not isinstance(optimizer, nn.Module):
        raise InputError(f"the attack needs a LearnedOptimizer, not {type(optimizer).__name__}")
    x, y = check_batch(x, y, eps, steps)
    with eval_mode(model):
        check_model(model, x, y)
        target = objective.target(model, x, y)
        x_adv = random_start(x, eps, start)  # x'_0
        state = None  # h_0 = 0
        for t in range(steps):
            g, _ = input_gradient(model, x_adv, objective, target)  # g_t
            if trace is not None:
                trace.append((x_adv, g))
            delta, state = optimizer(normalize_gradient(g), state)  # δ_t, h_{t+1}
            x_adv = project(x_adv + eps * delta.view(x.shape), x, eps)  # x'_{t+1}, (B, C, H, W)
    return x_adv


def phi_gradient(optimizer, x, x_0, gradients, eps):
    """Backpropagate the meta-loss −Σ_t w_t L(f(x'_t), y) / Σ_t w_t, w_t = t, in the mean over the
    images, to the weights φ, without a pass through the classifier.

    We drop second derivatives, so g_t is a constant, and by the chain rule
        ∂/∂φ Σ_t w_t L(f(x'_t), y) = Σ_t w_t ⟨g_t, ∂x'_t/∂φ⟩ = ∂/∂φ Σ_t w_t ⟨g_t, x'_t⟩.
    The attack has computed g_0 … g_{T−1} already, and the update of θ computes g_T. All that is
    left is to unroll the cell once more, this time with a graph.

    x, x_0: (B, C, H, W); gradients: g_0 … g_T, (B, C, H, W) each; eps in [0, 1] pixel scale.
    Returns the mean |delta|, the length of a step in units of eps, for the log.
    """
    steps = len(gradients) - 1
    x_adv = x_0
    state = None
    total = 0.0
    length = 0.0
    for t in range(steps):
        delta, state = optimizer(normalize_gradient(gradients[t]), state)
        x_adv = project(x_adv + eps * delta.view(x.shape), x, eps)  # x'_{t+1}, (B, C, H, W)
        total = total + (t + 1) * (gradients[t + 1] * x_adv).sum()  # w_{t+1} ⟨g_{t+1}, x'_{t+1}⟩
        length = length + delta.detach().abs().mean()
    sum_of_w = steps * (steps + 1) / 2
    (-total / (len(x) * sum_of_w)).backward()
    return length / steps


def last_gradient(model, x, x_adv, y, objective):
    """g_T, (B, C, H, W), where no update of θ computes it, and the inner losses, (B,)."""
    with eval_mode(model):
        return input_gradient(model, x_adv, objective, objective.target(model, x, y))


def train_optimizer(model, batches, *, eps, steps=10, objective=AdvTrain(), optimizer=None,
                    lr=0.01):
    """Train φ alone, with Adam, against a classifier that does not change.

    batches: an iterable of x (B, C, H, W) in [0, 1] and y (B,), such as a DataLoader. optimizer:
    the LearnedOptimizer to train further, default a new one. Returns it. Raises InputError and
    FloatingPointError.
    """
    if optimizer is None:
        optimizer = LearnedOptimizer()
    opt_phi = torch.optim.Adam(optimizer.parameters(), lr)
    for x, y in batches:
        trace = []
        x_adv = learned_attack(model, optimizer.to(x.device), x, y, eps=eps, steps=steps,
                               objective=objective, trace=trace)
        g_T, losses = last_gradient(model, x, x_adv, y, objective)
        x_0, _ = trace[0]
        opt_phi.zero_grad()
        phi_gradient(optimizer, x, x_0, [g for _, g in trace] + [g_T], eps)
        update(losses.mean(), phi=(optimizer, opt_phi, PHI_CLIP))
    if not opt_phi.state:  # Adam has made no step
        raise InputError("train_optimizer got no batch: was the generator used before?")
    return optimizer


# ---- 3. One training step ------------------------------------------------------------------------

def theta_gradient(model, x, x_adv, y, objective, opt_theta):
    """Backpropagate the outer loss to the weights θ, in the model's own mode. Returns the loss."""
    opt_theta.zero_grad()
    loss = objective.outer_loss(model, x, x_adv, y)
    loss.backward()
    return loss.detach()


def update(loss, **networks):
    """Clip the gradients of every network, then let all step, or none.

    networks: theta=(model, opt_theta, clip), phi=(optimizer, opt_phi, clip). Returns the loss and
    the norms before clipping. Raises FloatingPointError if one of these numbers is not finite (no
    weight has moved then, but the statistics of batch norm have), and InputError if an opt holds no
    weight of its network.
    """
    numbers = {"loss": loss}
    for name, (network, opt, clip) in networks.items():
        weights = [weight for group in opt.param_groups for weight in group["params"]]
        if set(weights).isdisjoint(network.parameters()):
            raise InputError(f"opt_{name} holds no weight of the {type(network).__name__} that it "
                             "should move: are opt_theta and opt_phi swapped?")
        if not clip > 0:
            raise InputError(f"clip must be above 0, not {clip!r}")
        numbers[f"{name}_norm"] = nn.utils.clip_grad_norm_(weights, clip)
    values = torch.stack([*numbers.values()]).tolist()  # one synchronization for all
    numbers = dict(zip(numbers, values))
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"a loss or gradient is not finite: {numbers}")
    for _, opt, _ in networks.values():
        opt.step()
    return numbers


def train_step_pgd(model, x, y, *, opt_theta, eps, step_size, steps=10, objective=AdvTrain(),
                   start="gaussian", decay=False, line_search=False, clip=CLIP, log=None):
    """One step of AdvTrain or TRADES: PGD finds x', θ descends on it.

    opt_theta: the torch optimizer of the model's weights; clip: the largest norm of θ's gradient;
    log: a list that receives the numbers from update; the rest as for baselines.pgd. Returns the
    outer loss, a scalar. Raises InputError and FloatingPointError.
    """
    x_adv = pgd(model, x, y, eps=eps, step_size=step_size, steps=steps, objective=objective,
                start=start, decay=decay, line_search=line_search)
    loss = theta_gradient(model, x, x_adv, y, objective, opt_theta)
    numbers = update(loss, theta=(model, opt_theta, clip))
    if log is not None:
        log.append(numbers)
    return loss


def train_step_learned(model, optimizer, x, y, *, opt_theta, opt_phi, eps, steps=10,
                       objective=AdvTrain(), start="gaussian", phi_share=1 / 16, clip=CLIP,
                       log=None):
    """One step of RNN-Adv or RNN-TRADES: the learned optimizer finds x', θ descends on it, and φ
    ascends, with gradients that the attack and θ's backward pass have computed already.

    optimizer: the LearnedOptimizer m_φ; opt_phi: the torch optimizer of its weights; phi_share: the
    share of the batch that φ learns from, its first images; log: also receives the "length" from
    phi_gradient. The rest is as for train_step_pgd.
    """
    if not 0 < phi_share <= 1:
        raise InputError(f"phi_share must be above 0 and at most 1, not {phi_share!r}")
    trace = []
    x_adv = learned_attack(model, optimizer, x, y, eps=eps, steps=steps, objective=objective,
                           start=start, trace=trace)
    if type(objective) in (AdvTrain, Trades):  # exactly these: a subclass may have another loss
        # As a function of x', the outer loss is beta times the batch mean of the inner one, so θ's
        # backward pass computes g_T as well. With batch norm this is the g_T of training mode,
        # where an image also acts on the others of the batch.
        loss = theta_gradient(model, x, x_adv.requires_grad_(), y, objective, opt_theta)
        g_T = x_adv.grad * (len(x) / objective.beta)
    else:
        g_T, _ = last_gradient(model, x, x_adv, y, objective)
        loss = theta_gradient(model, x, x_adv, y, objective, opt_theta)
    n = math.ceil(phi_share * len(x))
    x_0, _ = trace[0]
    gradients = [g[:n] for _, g in trace] + [g_T[:n]]
    opt_phi.zero_grad()
    length = phi_gradient(optimizer, x[:n], x_0[:n], gradients, eps)
    numbers = update(loss, theta=(model, opt_theta, clip), phi=(optimizer, opt_phi, PHI_CLIP))
    if log is not None:
        log.append({**numbers, "length": length.item()})
    return loss


# ---- 4. Training ---------------------------------------------------------------------------------

METHODS = {  # the objective, and what maximizes its inner loss
    "plain": (AdvTrain, None),
    "advtrain": (AdvTrain, "pgd"),
    "trades": (Trades, "pgd"),
    "rnn-adv": (AdvTrain, "learned"),
    "rnn-trades": (Trades, "learned")}
FORMAT = 1  # of a checkpoint
OWN = "own"  # what the settings call a model or a data set that the caller brought


def train(settings, model=None, data=None):
    """Train a classifier by settings.method. Prints a row per epoch, and returns the rows.

    settings: from get_args; model, data: your own nn.Module and Dataset (then set eps, epochs and
    lr, whose defaults are for the small CNN; your images are not augmented). best.pt has the best
    accuracy under PGD-10 (`plain`: natural) on held-out training images. With settings.resume, the
    training goes on after its last finished epoch, and ends in the same weights, bit for bit (in
    one process, on the same kind of CPU with as many threads). Raises InputError before anything
    is written, and FloatingPointError.
    """
    settings = check_settings(settings)
    rank, world, device = start_process(settings.device)

    # ---- Data
    if data is None:
        data = load_dataset(settings.dataset, settings.data_dir)
    else:
        settings.dataset = OWN
    x_train, y_train, x_held, y_held = (part.to(device) for part in hold_out(data, settings.limit))
    batch_size = min(settings.batch_size, len(x_train)) // world * world
    if batch_size < 2 * world:
        raise InputError(f"{batch_size} images per step are too few for {world} process(es)")
    steps_per_epoch = len(x_train) // batch_size

    # ---- The classifier f_θ and the learned optimizer m_φ
    torch.manual_seed(settings.seed)
    if model is None:
        model = MODELS[settings.model](in_channels=x_train.shape[1])
        model.normalize_like(data.x_train[:10_000])
    else:
        settings.model = OWN
    model.to(device)
    i = data.y_train.argmax()  # an image of the highest class: does the model know so many?
    evaluate(model, data.x_train[i, None].to(device) / 255, data.y_train[i, None].to(device), {})
    objective_class, maximizer = METHODS[settings.method]
    objective = Trades(settings.beta) if objective_class is Trades else AdvTrain()
    opt_theta = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=5e-4)
    # A model from torch.compile has the plain one inside, whose weights are saved.
    parts = {"model": getattr(model, "_orig_mod", model), "opt_theta": opt_theta}
    optimizer = None
    if maximizer == "learned":
        optimizer = LearnedOptimizer(cell=settings.cell).to(device)
        opt_phi = torch.optim.Adam(optimizer.parameters(), settings.phi_lr)
        parts.update(optimizer=optimizer, opt_phi=opt_phi)
    attacks = make_attacks(["pgd-10", "learned-10"], settings.eps, optimizer)

    # ---- A new folder, or a training to go on with
    folder = Path(settings.out)
    rows = restore(folder, settings, parts)
    if world > 1:
        share_gradients(*(part for part in parts.values() if isinstance(part, nn.Module)))
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # can we write there?
        print(f"{settings.method}, {settings.dataset} ({len(x_train)} images), {settings.model}, "
              f"eps = {255 * settings.eps:g}/255, T = {settings.steps}, seed {settings.seed}, "
              f"{device}; accuracy in % on {len(x_held)} held-out images")

    for epoch in range(len(rows) + 1, settings.epochs + 1):
        begin = time.time()
        # The randomness of an epoch comes from seed, epoch and rank alone, so it can be repeated.
        rng = np.random.default_rng((settings.seed, epoch))
        order = torch.from_numpy(rng.permutation(len(x_train))).to(device)
        torch.manual_seed(int(rng.integers(2 ** 60)) + rank)
        model.train()
        log = []
        try:
            for step in progress(range(steps_per_epoch), f"epoch {epoch}"):
                batch = order[step * batch_size:(step + 1) * batch_size][rank::world]
                x = x_train[batch]
                y = y_train[batch]
                if settings.dataset == "cifar10":
                    x = augment(x, settings.padding)
                x = x.float() / 255
                done = (epoch - 1 + (step + 0.5) / steps_per_epoch) / settings.epochs
                # One cycle: the learning rates rise for a third of the training, then fall to 0.
                cycle = min(3 * done, 1.5 * (1 - done))
                # eps grows during eps_warmup, a share of the training.
                ramp = min(1.0, done / settings.eps_warmup) if settings.eps_warmup else 1.0
                opt_theta.param_groups[0]["lr"] = settings.lr * cycle
                common = {"opt_theta": opt_theta, "eps": ramp * settings.eps, "log": log,
                          "steps": settings.steps, "objective": objective,
                          "start": settings.start, "clip": settings.clip}
                if maximizer is None:
                    loss = theta_gradient(model, x, x, y, objective, opt_theta)
                    log.append(update(loss, theta=(model, opt_theta, settings.clip)))
                elif maximizer == "pgd":
                    train_step_pgd(model, x, y, step_size=ramp * settings.step_size,
                                   decay=settings.decay, line_search=settings.line_search, **common)
                else:
                    opt_phi.param_groups[0]["lr"] = settings.phi_lr * cycle
                    train_step_learned(model, optimizer, x, y, opt_phi=opt_phi,
                                       phi_share=settings.phi_share, **common)
            correct, _ = evaluate(model, x_held.float() / 255, y_held, attacks, eps=settings.eps)
        except FloatingPointError as error:
            raise FloatingPointError(f"epoch {epoch}, step {step + 1}: {error}") from None

        row = {key: np.mean([entry[key] for entry in log]).item() for key in log[0]}
        row["clipped"] = np.mean([entry["theta_norm"] > settings.clip for entry in log]).item()
        row.update(epoch=epoch, accuracy=means(correct), seconds=round(time.time() - begin, 1))
        rows.append(row)
        if rank == 0:
            scores = [f"{name} {100 * value:5.2f}" for name, value in row["accuracy"].items()]
            print(f"epoch {epoch:2}  loss {row['loss']:.4f}  {'  '.join(scores)}  "
                  f"{row['seconds']} s", flush=True)
            save(folder, settings, parts, rows)
    if world > 1:
        distributed.destroy_process_group()
    return rows


def means(tensors):
    """The mean of each tensor in a dictionary. NumPy takes it, as some devices lack float64."""
    return {name: np.mean(tensor.tolist()).item() for name, tensor in tensors.items()}


def start_process(device):
    """Join torchrun's other processes, if any. Returns rank, number of processes, torch device."""
    rank = 0
    world = 1
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.is_available() and distributed.is_torchelastic_launched():
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        rank = distributed.get_rank()
        world = distributed.get_world_size()
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    try:
        return rank, world, torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError):
        raise InputError(f"cannot use the device {device!r}: try auto, cpu, cuda, cuda:1") from None


def share_gradients(*modules):
    """Give every process the weights of the first, and the mean of all gradients from now on."""
    def average(weight):
        if distributed.is_initialized():  # during the training, not afterwards
            distributed.all_reduce(weight.grad)
            weight.grad /= distributed.get_world_size()

    for module in modules:
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, 0)
        for weight in module.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(average)


def save(folder, settings, parts, rows):
    """Write best.pt if the last row is the best one, then log.jsonl, then last.pt. If the process
    dies before last.pt is written, the epoch is repeated."""
    settings = {name: value for name, value in vars(settings).items()
                if name not in ("command", "resume", "data_dir")}
    states = {name: part.state_dict() for name, part in parts.items()}
    checkpoint = {"format": FORMAT, "settings": settings, "rows": rows, **states}
    score = "natural" if settings["method"] == "plain" else "pgd-10"
    *before, last = [row["accuracy"][score] for row in rows]
    if last > max(before, default=-1):
        best = {key: checkpoint[key] for key in checkpoint if key not in ("opt_theta", "opt_phi")}
        write(folder / "best.pt", best)
    write(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "last.pt", checkpoint)


def write(path, content):
    """Write a text or a checkpoint beside `path`, then rename it: no file is ever half-written."""
    beside = Path(f"{path}.tmp")
    if isinstance(content, str):
        beside.write_text(content)
    else:
        torch.save(content, beside)
    os.replace(beside, path)


def read_checkpoint(path):
    """Load a checkpoint without unpickling code. Raises InputError."""
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint.get("format") == FORMAT:
            return checkpoint
    raise InputError(f"{path} is not of this edition: try commit d36af19 of this repository")


def restore(folder, settings, parts):
    """Load last.pt, if there is one, into the parts of a training. Returns its rows."""
    path = folder / "last.pt"
    if not path.exists():
        return []
    if not settings.resume:
        raise InputError(f"{folder} already contains a run: use --resume, or choose another --out")
    checkpoint = read_checkpoint(path)
    for name, before in checkpoint["settings"].items():
        if before != getattr(settings, name, None) and name not in ("out", "device"):
            raise InputError(f"{folder} was trained with {name} = {before}: use the same to resume")
    with reading(path):
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    return checkpoint["rows"]


def load_run(folder, which="best", device="cpu", model=None):
    """Load best.pt or last.pt of a run. model: your own nn.Module, if the run trained such a one.

    Returns the classifier, the learned optimizer or None, and the settings. Raises InputError.
    """
    path = Path(folder) / f"{which}.pt"
    checkpoint = read_checkpoint(path)
    optimizer = None
    with reading(path):
        settings = argparse.Namespace(**checkpoint["settings"])
        weights = checkpoint["model"]
        if model is None and settings.model != OWN:
            model = MODELS[settings.model](in_channels=weights["mean"].numel())
        if model is not None:
            getattr(model, "_orig_mod", model).load_state_dict(weights)
        if "optimizer" in checkpoint:
            optimizer = LearnedOptimizer(cell=settings.cell)
            optimizer.load_state_dict(checkpoint["optimizer"])
    if model is None:
        raise InputError(f"{path} holds a model of your own: use load_run(…, model=…) in Python")
    if optimizer is not None:
        optimizer.to(device)
    return model.to(device).eval(), optimizer, settings


# ---- 5. Command line -----------------------------------------------------------------------------

def make_attacks(names, eps, optimizer):
    """pgd-N, cw-N and learned-N, with N steps each → {name: callable(model, x, y) → x_adv}.

    All start near x. PGD takes steps of eps/4. They ascend the cross-entropy, or C&W's margin:
    both are stronger attacks than TRADES' KL. Without an optimizer, there is no learned attack.
    """
    attacks = {}
    for name in names:
        kind, _, steps = name.partition("-")
        if kind not in ("pgd", "cw", "learned") or not re.fullmatch(r"[1-9]\d{0,4}", steps):
            raise InputError(f"unknown attack {name!r}: use for example pgd-10, cw-100, learned-10")
        settings = {"eps": eps, "steps": int(steps)}
        if kind != "learned":
            objective = Margin() if kind == "cw" else AdvTrain()
            attacks[name] = partial(pgd, step_size=eps / 4, objective=objective, **settings)
        elif optimizer is not None:
            attacks[name] = lambda model, x, y, settings=settings: learned_attack(
                model, optimizer, x, y, **settings)
    return attacks


def eval_runs(args):
    """Print one table, with a row per run, and write eval.json into the folder of each run."""
    _, _, device = start_process(args.device)
    runs = {folder: load_run(folder, args.checkpoint, device) for folder in args.runs}
    lent = load_run(args.lend, args.checkpoint, device)[1] if args.lend else None
    if args.lend and lent is None:
        raise InputError(f"{args.lend} has no learned optimizer to lend: choose an rnn- run")
    kinds = {(settings.dataset, args.eps or settings.eps) for _, _, settings in runs.values()}
    if len(kinds) > 1:
        raise InputError("these runs differ in data set or eps: evaluate them separately")
    (dataset, eps), = kinds
    if dataset == OWN:
        raise InputError("these runs are of data of your own: use load_run and evaluate in Python")
    names = args.attacks.split(",")
    make_attacks(names, eps, None)  # so that an unknown name is noticed before the first attack
    data = load_dataset(dataset, args.data_dir)
    limit = args.limit or (None if device.type == "cuda" else 1000)
    x = data.x_test[:limit].to(device).float() / 255
    y = data.y_test[:limit].to(device)

    columns = ["natural", *names, "worst"]
    width = max(map(len, ["run", *args.runs]))
    print(f"{dataset}, eps = {255 * eps:g}/255, {len(x)} test images, {args.checkpoint} "
          f"checkpoint, attack seed {args.seed}; accuracy in %, worst: all attacks of the row")
    print(f"{'run':{width}}" + "".join(f"{name:>12}" for name in columns))
    problems = []
    for folder, (model, optimizer, settings) in runs.items():
        attacks = make_attacks(names, eps, optimizer or lent)
        correct, loss = evaluate(model, x, y, attacks, eps=eps, seed=args.seed)
        accuracy = means(correct)
        cells = [f"{100 * accuracy[name]:.2f}" if name in accuracy else "-" for name in columns]
        print(f"{folder:{width}}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
        result = {"settings": vars(settings), "eps": eps, "images": len(x), "seed": args.seed,
                  "checkpoint": args.checkpoint, "lent_by": None if optimizer else args.lend,
                  "accuracy": accuracy, "loss": means(loss)}
        try:
            write(Path(folder, "eval.json"), json.dumps(result, indent=1) + "\n")
        except OSError as error:
            problems.append(str(error))
    if problems:
        raise InputError(f"the table is complete, but not every eval.json: {'; '.join(problems)}")


PRESETS = {  # defaults that depend on the data set, and then on the model
    "synthetic": {"model": "small", "eps": 8 / 255, "epochs": 3},
    "mnist": {"model": "cnn4", "eps": 0.3, "epochs": 3, "lr": 0.05},
    "cifar10": {"model": "vgg16", "eps": 8 / 255, "epochs": 30},
    "small": {"batch_size": 64, "lr": 0.1, "eps_warmup": 0.25, "padding": 0},
    "cnn4": {"batch_size": 64, "lr": 0.05, "eps_warmup": 0.25, "padding": 0},
    "vgg16": {"batch_size": 128, "lr": 0.05, "eps_warmup": 0.0, "padding": 4},
    "resnet18": {"batch_size": 128, "lr": 0.1, "eps_warmup": 0.0, "padding": 4},
    "wrn34": {"batch_size": 128, "lr": 0.1, "eps_warmup": 0.0, "padding": 4}}


def number(low, high, kind=float):
    """A type for argparse: a number from low to high, such as 3, 0.031 or 8/255."""
    def parse(text):
        numerator, _, denominator = text.partition("/")
        try:
            value = kind(numerator) / kind(denominator or 1)
        except (ValueError, ArithmeticError):
            value = math.nan
        if low <= value <= high and value == kind(value):  # 4/2 is a whole number, 3/2 is not
            return kind(value)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
    return parse


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, and an InputError when it is called from Python."""

    def error(self, message):
        raise InputError(message)


def get_args(argv=None):
    """Parse the command line. Returns a namespace: the settings of train, or of eval_runs."""
    count = number(1, 10 ** 9, int)
    pixels = number(1e-9, 1)
    positive = number(1e-9, 1e9)
    parser = Parser(prog="l2l_adv.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    trainer = commands.add_parser("train", help="train one classifier")
    add = trainer.add_argument
    add("--out", required=True, help="folder of the run")
    add("--method", choices=METHODS, default="rnn-adv", help="default %(default)s")
    add("--dataset", choices=DATASETS, default="synthetic", help="default %(default)s")
    add("--model", choices=MODELS, help="default: small; mnist cnn4; cifar10 vgg16")
    add("--padding", type=number(0, 32, int), help="of crops (cifar10); default 4; small, cnn4 0")
    add("--start", choices=("gaussian", "uniform"), default="gaussian", help="default gaussian")
    add("--steps", type=count, default=10, help="T, steps of the attack; default 10")
    add("--eps-warmup", type=number(0, 1), help="share of the training in which eps grows")
    add("--step-size", type=pixels, help="of PGD; default eps/4; with --decay, --line-search eps")
    add("--decay", action="store_true", help="PGD with a decaying step size (advtrain, trades)")
    add("--line-search", action="store_true", help="PGD with a line search (advtrain, trades)")
    add("--beta", type=positive, default=6.0, help="weight of the KL in TRADES; default 6")
    add("--cell", choices=("lstm", "rnn"), default="lstm", help="of m_φ; default lstm")
    add("--phi-lr", type=positive, default=0.01, help="peak learning rate of φ; default 0.01")
    add("--phi-share", type=number(1e-9, 1), default=1 / 16,
        help="share of each batch that φ learns from; default 1/16")
    add("--clip", type=number(1e-9, math.inf), default=CLIP,
        help="largest norm of θ's gradient; default 10")
    add("--epochs", type=count, help="default 3; cifar10 30")
    add("--batch-size", type=count, help="default 64 for small and cnn4, else 128")
    add("--lr", type=positive, help="peak learning rate of θ; default 0.05 or 0.1, by model")
    add("--resume", action="store_true", help="go on after the last finished epoch, or begin")
    evaluator = commands.add_parser("eval", help="attack trained classifiers")
    add = evaluator.add_argument
    add("runs", nargs="+", help="folders of runs with the same data set and eps")
    add("--attacks", default="pgd-10,pgd-100,cw-100,learned-10",
        help="pgd-N, cw-N and learned-N take N steps; default %(default)s")
    add("--checkpoint", choices=("best", "last"), default="best", help="default %(default)s")
    add("--lend", metavar="RUN", help="let the optimizer of RUN attack the runs that have none")
    for add in (trainer.add_argument, evaluator.add_argument):
        add("--eps", type=pixels, help="radius; default 8/255, mnist 0.3; eval: as in training")
        add("--limit", type=count, help="number of images; default all, eval without CUDA 1000")
        add("--data-dir", help="default: $MNIST_DIR or $CIFAR10_DIR, else data/")
        add("--seed", type=number(0, 10 ** 9, int), default=0, help="default 0")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    return parser.parse_args(argv)


def set_defaults(args):
    """Fill in the settings that depend on others, and refuse those that contradict each other."""
    for key in ("dataset", "model"):  # in this order, because the data set may choose the model
        for name, value in PRESETS[getattr(args, key)].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    _, maximizer = METHODS[args.method]
    if maximizer == "pgd" and args.step_size is None:
        args.step_size = args.eps if args.decay or args.line_search else args.eps / 4
    elif maximizer != "pgd" and (args.decay or args.line_search or args.step_size):
        raise InputError(f"--method {args.method} does not use PGD: leave out --decay, "
                         "--line-search and --step-size")


NOT_PARSED = (("command", "train"), ("model", OWN), ("dataset", OWN))


def check_settings(settings):
    """Parse the settings again, because a caller may have changed them in Python, and fill in the
    defaults. Returns new settings, which have plain values only. Raises InputError."""
    argv = ["train"]
    for name, value in vars(settings).items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            argv.append(flag)
        elif value is not None and value is not False and (name, value) not in NOT_PARSED:
            argv.append(f"{flag}={value}")
    args = get_args(argv)
    set_defaults(args)
    return args


def main(argv=None):
    """Run a command. Returns the exit status: 2 for a user's mistake, 1 for NaN in a training."""
    try:
        args = get_args(argv)
        if args.command == "train":
            train(args)
        else:
            eval_runs(args)
    except (InputError, OSError, FloatingPointError) as error:
        print(f"l2l_adv.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
