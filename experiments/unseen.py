"""Runs on genera that nobody trained on: the ranks above, with 95% intervals by a bootstrap over
runs and genera, and a picture.

  for run in runs/unseen/*-seed?; do python evaluate.py $run/ckpt.pt --split unseen; done
  python experiments/unseen.py runs/unseen --out unseen.json --figure unseen.png

The script reads the per_class_unseen.csv of each run. The measure is the mean over the held-out
genera of the share of their fragments for which a rank above is right. Beside it stands the same of
the test split's fragments of that phylum (superkingdom): known genera like them.

A replicate draws one of an arm's runs, and as many genera as there are, with replacement, the same
ones for every arm: a difference of two arms is of the same genera. Fragments of one genus are of
one genome or few, so the genus is the unit, not the fragment. Genera of one phylum are not
independent either, so the intervals are rather too narrow. False calls of a phylum cost nothing
here: an arm that calls much by a large phylum looks better than its balanced accuracy.
"""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from intervals import finished_runs, interval, only

from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_int, run, seed
from taxa.runtime.files import replacing, write_json
from taxa.study.groups import ADAPTERS, group_runs

TABLE = "per_class_unseen.csv"


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS",
        help="run folders of train.py on one data set, or folders that contain them")
    add("--out", required=True, metavar="FILE.json", help="where every number goes")
    add("--figure", metavar="FILE.png", help="a picture of it")
    add("--replicates", type=positive_int, default=2000, metavar="N",
        help="of the bootstrap (default 2000)")
    add("--seed", type=seed, default=0, metavar="N", help="of the bootstrap (default 0)")
    return parser.parse_args(argv)


def read_table(folder):
    """(genera, shares) of a run.

    genera: [(taxid, name, fragments)] of the held-out genera. shares: {rank: {"accuracy": (G,),
    "known": (G,)}}; a share is NaN where its cell is empty.
    """
    path = Path(folder) / TABLE
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        genera = [(row["taxid"], row["name"], int(row["support"])) for row in rows]
        shares = {}
        for name in rows[0]:
            if name.endswith("_accuracy"):
                rank = name.removesuffix("_accuracy")
                shares[rank] = {
                    key: np.array([float(row[f"{rank}_{key}"] or "nan") for row in rows])
                    for key in ("accuracy", "known")
                }
    except FileNotFoundError:
        raise InputError(f"{folder} has no {TABLE}: python evaluate.py {folder}/ckpt.pt "
                         "--split unseen writes it") from None
    except (KeyError, ValueError, TypeError, IndexError, csv.Error):
        raise InputError(
            f"{path} is not the table that evaluate.py --split unseen writes") from None
    return genera, shares


def drawn(values, genera, rng):
    """(B,) means over the drawn genera of a drawn run. values: (runs, G); genera: (B, G) places."""
    of_runs = values[rng.integers(len(values), size=len(genera))]  # (B, G)
    return np.take_along_axis(of_runs, genera, axis=1).mean(axis=1)


def difference(one, other):
    """Of two arms' ((runs, G) values, (B,) replicates): their difference with its interval."""
    return {"difference": float(one[0].mean() - other[0].mean()), **interval(one[1] - other[1])}


def check_alike(runs, tables):
    """Raises InputError for runs of two data sets or two models."""

    def kind(each):
        genera, _ = tables[each.folder]
        return each.metrics.get("dataset_digest"), each.args["model"], genera

    for each in runs:
        if kind(each) != kind(runs[0]):
            raise InputError(f"{runs[0].folder} and {each.folder} are of two data sets or "
                             "two models: give the runs of one")


def arm_entry(group, groups, tables, found):
    """The arm's entry in the document. found: {label: {rank: (values, replicates)}}."""
    full = only(groups, "full", None, "train", group)
    frozen = None
    if group.strategy in ADAPTERS and group.heads == "train":
        frozen = only(groups, group.strategy, group.r, "frozen", group)
    against = {"less_full": full if full is not group else None, "heads": frozen}
    ranks = {}
    for rank, (values, replicates) in found[group.label].items():
        known = [tables[each.folder][1][rank]["known"] for each in group.runs]
        ranks[rank] = {
            "known": float(np.nanmean(known)),
            "mean": float(values.mean()),
            **interval(replicates),
            "genera": values.mean(axis=0).tolist(),
        }
        for key, other in against.items():
            if other:
                ranks[rank][key] = difference(found[group.label][rank], found[other.label][rank])
    return {
        "arm": group.label,
        "strategy": group.strategy,
        "r": group.r,
        "heads": group.heads,
        "runs": len(group.runs),
        "seeds": [each.args["seed"] for each in group.runs],
        "ranks": ranks,
    }


def print_arms(arms, ranks):
    columns = " | ".join(f"{rank}: known genera | unseen" for rank in ranks)
    print(f"| arm | runs | {columns} |")
    print("|" + "---|" * (2 + 2 * len(ranks)))
    for arm in arms:
        cells = " | ".join(
            f"{c['known']:.3f} | {c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})"
            for c in arm["ranks"].values())
        print(f"| {arm['arm']} | {arm['runs']} | {cells} |")


def print_differences(arms, key, what):
    for arm in arms:
        found = {rank: c[key] for rank, c in arm["ranks"].items() if key in c}
        if len(found) == len(arm["ranks"]):
            parts = "; ".join(
                f"{rank} {d['difference']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"
                for rank, d in found.items())
            print(f"{arm['arm']}, {what}: {parts}")


def main(argv=None):
    args = parse_args(argv)
    runs = finished_runs(args.runs)
    tables = {each.folder: read_table(each.folder) for each in runs}
    check_alike(runs, tables)
    held, shares = tables[runs[0].folder]
    ranks = list(shares)
    groups = group_runs(runs)
    rng = np.random.default_rng(args.seed)
    genera = rng.integers(len(held), size=(args.replicates, len(held)))
    found = {}  # {label: {rank: ((runs, G) shares, (B,) replicates)}}
    for group in groups:
        found[group.label] = {}
        for rank in ranks:
            values = np.stack([tables[each.folder][1][rank]["accuracy"] for each in group.runs])
            found[group.label][rank] = (values, drawn(values, genera, rng))

    arms = [arm_entry(group, groups, tables, found) for group in groups]
    print_arms(arms, ranks)
    print_differences(arms, "less_full", "less full")
    print_differences(arms, "heads", "heads trained less frozen")
    write_json(args.out, {
        "replicates": args.replicates,
        "held_out": [{"taxid": t, "name": name, "sequences": n} for t, name, n in held],
        "arms": arms,
    })
    if args.figure:
        from taxa.study.arm_figures import on_unseen  # matplotlib, which the numbers do without

        with replacing(args.figure) as temporary:
            on_unseen(arms, ranks).savefig(temporary, dpi=150, format="png")


if __name__ == "__main__":
    run(main)
