"""What the scripts here share: the runs and test images of a call, its command line, and a classifier without batch norm.

    python3 results/runs.py train --model cnn4 --dataset mnist --out runs/rnn-adv    # l2l_adv.py, which also knows cnn4
"""
import sys
from collections import namedtuple
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import MODELS, Classifier
from l2l_adv import DEFAULTS, Parser, add_run_arguments, load_runs, main, make_objective

# A classifier, its learned optimizer or None, what it was trained with; the call's test images x (N, C, H, W), y (N,)
Run = namedtuple("Run", "folder model optimizer settings objective x y seed batch_size")


def load(args):
    """→ [Run], and a heading, which it prints. Raises InputError."""
    runs, x, y, _, heading = load_runs(args)
    print(heading)
    return [Run(folder, model, optimizer, settings, make_objective(settings), x, y, args.seed, args.batch_size)
            for folder, (model, optimizer, settings) in runs.items()], heading


def parser(name, description, command):
    result = Parser(prog=name, description=description)
    result.set_defaults(command=command)
    add_run_arguments(result, limit=256)
    return result


class CNN4(Classifier):
    """Four convolutions without batch norm, 0.32 M weights, close to TRADES' classifier on MNIST. (B, C, H, W)"""

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
        # Logits near 0 at first: with large ones the attack wins at once, and training never starts.
        with torch.no_grad():
            self.layers[-1].weight.mul_(0.1)


MODELS["cnn4"], DEFAULTS["cnn4"] = CNN4, DEFAULTS["small"]

if __name__ == "__main__":
    sys.exit(main())
