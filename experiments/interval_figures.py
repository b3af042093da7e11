"""Pictures of what experiments/intervals.py wrote, with its 95% intervals.

  python experiments/interval_figures.py converged.json --share share.png --classes classes.png
  python experiments/interval_figures.py few_labels.json --labels labels.png
  python experiments/interval_figures.py classes.json --classes classes_alone.png

The files lie in experiments/results/, the pictures in docs/figures/. The last file has a data set
for each number of classes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taxa.errors import InputError
from taxa.runtime.cli import Parser, run
from taxa.runtime.files import read_json, replacing
from taxa.study.arm_figures import (
    against_classes,
    against_labels,
    against_share,
    ranks_above_chance,
)
from taxa.study.groups import Arm

PICTURES = {"share": against_share, "classes": against_classes, "labels": against_labels}


def read_arms(path):
    """{data set: [Arm]} of a file of intervals.py.

    Raises InputError for another file, and for one of several models.
    """
    data_sets = {}
    try:
        found = read_json(path)["arms"]
        for a in found:
            arm = Arm(
                strategy=a["strategy"],
                r=a["r"],
                heads=a["heads"],
                row=a["row"],
                share=a["trainable_fraction"],
                sequences=int(a["training_sequences"]),
                reached={r: (v["mean"], v["low"], v["high"]) for r, v in a["reached"].items()},
                classes=a["classes"],
            )
            data_sets.setdefault(a["data"], []).append(arm)
        models = {a["model"] for a in found}
    except (KeyError, TypeError):
        raise InputError(f"{path} is not a file of experiments/intervals.py --out") from None
    if len(models) != 1:
        raise InputError(f"{path} holds {len(models)} models: a picture is of one")
    return data_sets


def joined(data_sets):
    """(arms, [name]) of data sets of one rank each.

    An arm has the data sets in the place of ranks, from few classes to many. Raises InputError for
    several ranks, and for two arms of one kind on a data set.
    """
    if any(len(arm.reached) > 1 for arms in data_sets.values() for arm in arms):
        raise InputError("several data sets of several ranks: a picture is of one data set, "
                         "or of one rank of several")
    classes = {data: next(iter(arms[0].classes.values())) for data, arms in data_sets.items()}
    names = sorted(classes, key=classes.get)
    arms = {}
    for data in names:
        for arm in data_sets[data]:
            if arm.kind in arms and data in arms[arm.kind].reached:
                raise InputError(
                    f"{data} has two arms of {arm.row}: which one is meant cannot be told")
            whole = arms.setdefault(arm.kind, arm._replace(reached={}, classes=classes))
            whole.reached[data] = next(iter(arm.reached.values()))
    return list(arms.values()), names


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("intervals", metavar="FILE.json", help="of experiments/intervals.py")
    for name, draw in PICTURES.items():
        parser.add_argument(f"--{name}", metavar="FILE.png", help=draw.__doc__)
    args = parser.parse_args(argv)
    if not any(getattr(args, name) for name in PICTURES):
        parser.error(f"give one of {' '.join(f'--{name}' for name in PICTURES)}")
    data_sets = read_arms(args.intervals)
    (first, *others) = data_sets.values()
    if others and (args.share or args.labels):
        raise InputError(
            f"{args.intervals} holds several data sets: --classes alone can draw those")
    if others:
        arms, ranks = joined(data_sets)
        whole = arms
    else:
        arms, ranks = first, list(first[0].reached)
        most = max(arm.sequences for arm in arms)
        whole = [arm for arm in arms if arm.sequences == most]  # not those of a part of the labels
    if args.classes and ranks_above_chance(whole, ranks) != ranks:
        raise InputError(f"{args.intervals}: --classes needs one arm of full fine-tuning, "
                         f"above chance, and every arm on {', '.join(ranks)}")
    for name, draw in PICTURES.items():
        if path := getattr(args, name):
            figure = draw(arms if name == "labels" else whole, ranks)
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=150, format="png")


if __name__ == "__main__":
    run(main)
