"""Of runs that differ only in the learning rate, the one with the lowest validation loss: a table
of all, and the grid of the chosen ones.

  python study.py --grid experiments/rates.csv --out runs/rates
  python experiments/choose_rates.py runs/rates --epochs 12 --seeds 1 2 3 --out runs/chosen.csv
  python study.py --grid runs/chosen.csv --out runs/converged

The first command runs every arm at five rates with one seed, the last one every arm at its own
rate with three seeds.

The same rule holds for every arm, and the test split plays no part in it. An arm whose best rate is
the lowest or the highest that was tried is marked "edge": a wider search could help it.
"""

import csv
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_int, run, seed
from taxa.runtime.files import replacing
from taxa.study.grid import flags_of
from taxa.study.run_folders import find_runs, read_run

NOT_OF_AN_ARM = ("lr", "seed", "out", "resume")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS",
        help="run folders of train.py, or folders that contain them")
    add("--out", required=True, metavar="FILE.csv", help="the grid to write, for study.py --grid")
    add("--seeds", type=seed, nargs="+", default=[1, 2, 3], metavar="N",
        help="of the grid (default 1 2 3)")
    add("--epochs", type=positive_int, metavar="N",
        help="of the grid's runs (default: as those here)")
    return parser.parse_args(argv)


def best_loss(folder):
    """(learning rate, lowest validation loss, arm) of a run, None where it has not validated.

    arm: {flag: text} of all else that the run was given.
    """
    found = read_run(folder)
    losses = [line["validation_loss"] for line in found.validations]
    if not losses:
        return None
    flags = flags_of(found.environment.get("command", []))
    arm = {flag: text for flag, text in flags.items() if flag not in NOT_OF_AN_ARM}
    return found.args["lr"], min(losses), arm


def choose(folders):
    """[({flag: text} of an arm, {rate: validation loss})], arms in the order of their folders.

    Raises InputError for two runs of a rate.
    """
    arms = {}
    for folder in folders:
        found = best_loss(folder)
        if found is None:
            continue
        rate, loss, arm = found
        _, rates = arms.setdefault(tuple(sorted(arm.items())), (arm, {}))
        if rate in rates:
            raise InputError(f"{folder}: another run here has the same flags and --lr {rate:g}: "
                             "rates are compared on one seed")
        rates[rate] = loss
    if not arms:
        raise InputError("not one of these runs has validated")
    return list(arms.values())


def print_row(cells):
    print(f"| {' | '.join(cells)} |")


def main(argv=None):
    args = parse_args(argv)
    arms = choose(find_runs(args.runs))
    rates = sorted({rate for _, losses in arms for rate in losses})
    flags = dict.fromkeys(flag for arm, _ in arms for flag in arm)
    varying = [flag for flag in flags if len({arm.get(flag) for arm, _ in arms}) > 1]
    print_row([*varying, *(f"{rate:g}" for rate in rates), "chosen"])
    print("|" + "---|" * (len(varying) + len(rates) + 1))
    lines = []
    for arm, losses in arms:
        best = min(losses, key=losses.get)
        edge = " (edge)" if len(losses) > 1 and best in (min(losses), max(losses)) else ""
        print_row([
            *(arm.get(flag, "") for flag in varying),
            *(f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates),
            f"{best:g}{edge}",
        ])
        line = arm | {"lr": f"{best:g}", "seed": " ".join(map(str, args.seeds))}
        if args.epochs:
            line["epochs"] = str(args.epochs)
        lines.append(line)
    text = io.StringIO()
    columns = list(dict.fromkeys(flag for line in lines for flag in line))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    with replacing(args.out) as partial:
        Path(partial).write_text(text.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    run(main)
