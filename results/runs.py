"""What analyse.py and sanity.py share: the runs and test images of a call, and its command line."""
from collections import namedtuple

from l2l_adv import Parser, add_run_arguments, load_runs, make_objective

# A classifier, its learned optimizer (else the one lent, or None), what it was trained with; the call's test images x
# (N, C, H, W), y (N,)
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
