"""Pictures of what benchmarks/intervals.py wrote, with its 95% intervals.

  python benchmarks/interval_figures.py docs/results/converged.json --share docs/figures/share.png --classes docs/figures/classes.png
  python benchmarks/interval_figures.py docs/results/few_labels.json --labels docs/figures/labels.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taxa.errors import InputError  # noqa: E402
from taxa.results.arm_figures import against_classes, against_labels, against_share  # noqa: E402
from taxa.results.groups import Arm  # noqa: E402
from taxa.runtime.cli import Parser, run  # noqa: E402
from taxa.runtime.files import read_json, replacing  # noqa: E402

PICTURES = {"share": against_share, "classes": against_classes, "labels": against_labels}


def read_arms(path):
    """(arms of a file of intervals.py, ranks). Raises InputError for another file, and for one of several data sets or models."""
    try:
        found = read_json(path)["arms"]
        arms = [Arm(a["strategy"], a["r"], a["heads"], a["row"], a["trainable_fraction"], a["training_sequences"],
                    {rank: (v["mean"], v["low"], v["high"]) for rank, v in a["reached"].items()}, a["classes"]) for a in found]
        places = {(a["data"], a["model"]) for a in found}
    except (KeyError, TypeError):
        raise InputError(f"{path} is not a file of benchmarks/intervals.py --out") from None
    if len(places) != 1:
        raise InputError(f"{path} holds {len(places)} data sets or models: a picture is of one")
    return arms, list(arms[0].reached)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("intervals", metavar="FILE.json", help="of benchmarks/intervals.py")
    for name, draw in PICTURES.items():
        parser.add_argument(f"--{name}", metavar="FILE.png", help=draw.__doc__)
    args = parser.parse_args(argv)
    arms, ranks = read_arms(args.intervals)
    for name, draw in PICTURES.items():
        if path := getattr(args, name):
            with replacing(path) as temporary:
                draw(arms, ranks).savefig(temporary, dpi=150, format="png")


if __name__ == "__main__":
    run(main)
