"""What analyse.py and sanity.py share: the runs and test images of a call, and its command line."""
from collections import namedtuple

from baselines import AdvTrain, InputError, Trades, load_dataset, to_unit
from l2l_adv import COUNT, METHODS, SEED, Parser, load_run, pick_device

# A classifier, its learned optimizer or None, what it was trained with; the call's test images x (N, C, H, W), y (N,)
Run = namedtuple("Run", "folder model optimizer settings objective x y seed batch_size")


def load(args):
    """→ [Run], and a heading, which it prints. Raises InputError."""
    device, runs = pick_device(args.device), []
    loaded = {folder: load_run(folder, args.checkpoint, device) for folder in args.runs}
    settings = loaded[args.runs[0]][2]
    data = load_dataset(settings.dataset, args.data_dir or settings.data_dir)
    x, y = to_unit(data.x_test[:args.limit]).to(device), data.y_test[:args.limit].to(device)
    for folder, (model, optimizer, each) in loaded.items():
        if (each.dataset, each.eps) != (settings.dataset, settings.eps):
            raise InputError("these runs differ in data set or eps: make separate tables of them")
        objective = Trades(each.beta) if METHODS[each.method][0] is Trades else AdvTrain()
        runs.append(Run(folder, model, optimizer, each, objective, x, y, args.seed, args.batch_size))
    print(about := f"{settings.dataset}, eps = {settings.eps * 255:g}/255, the first {len(x)} test images, "
                   f"{args.checkpoint} checkpoint, seed {args.seed}")
    return runs, about


def parser(name, description, command):
    result = Parser(prog=name, description=description)
    result.set_defaults(command=command)
    result.add_argument("runs", nargs="+", help="run folders, all of one data set and eps")
    result.add_argument("--limit", type=COUNT, default=256, help="the first so many test images; default 256")
    result.add_argument("--checkpoint", choices=("best", "last"), default="best")
    result.add_argument("--batch-size", type=COUNT, default=256)
    result.add_argument("--data-dir", help="where the data lies; default as in training")
    result.add_argument("--device", default="auto")
    result.add_argument("--seed", type=SEED, default=0, help="of the attacks")
    return result
