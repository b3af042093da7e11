"""Runs on genera that nobody trained on: the ranks above, with 95% intervals by a bootstrap over runs and genera, and a picture.

  for run in runs/unseen/*-seed?; do python evaluate.py $run/ckpt.pt --split unseen; done
  python experiments/unseen.py runs/unseen --out experiments/results/unseen.json --figure docs/figures/unseen.png

From per_class_unseen.csv of each run. The measure is the mean over the held-out genera of the share of their fragments for which a rank
above is right; beside it, the same of the test split's fragments of that phylum (superkingdom): known genera like them. A replicate draws
one of an arm's runs, and as many genera as there are, with replacement, the same ones for every arm: a difference of two arms is of the
same genera. Fragments of one genus are of one genome or few, so the genus is the unit, not the fragment; genera of one phylum are not
independent either, so the intervals are rather too narrow. False calls of a phylum cost nothing here: an arm that calls much by a large
phylum looks better than its balanced accuracy.
"""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from intervals import interval, only

from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_int, run, seed
from taxa.runtime.files import replacing, write_json
from taxa.study.groups import ADAPTERS, group_runs
from taxa.study.run_folders import find_runs, read_run

TABLE = "per_class_unseen.csv"


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="run folders of train.py on one data set, or folders that contain them")
    add("--out", required=True, metavar="FILE.json", help="where every number goes")
    add("--figure", metavar="FILE.png", help="a picture of it")
    add("--replicates", type=positive_int, default=2000, metavar="N", help="of the bootstrap (default 2000)")
    add("--seed", type=seed, default=0, metavar="N", help="of the bootstrap (default 0)")
    return parser.parse_args(argv)


def read_table(folder):
    """([(taxid, name, fragments)] of the held-out genera, {rank: {"accuracy", "known": (G,) shares}}) of a run.

    A share is NaN where its cell is empty.
    """
    path = Path(folder) / TABLE
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        ranks = [name.removesuffix("_accuracy") for name in rows[0] if name.endswith("_accuracy")]
        return ([(row["taxid"], row["name"], int(row["support"])) for row in rows],
                {rank: {key: np.array([float(row[f"{rank}_{key}"] or "nan") for row in rows]) for key in ("accuracy", "known")}
                 for rank in ranks})
    except FileNotFoundError:
        raise InputError(f"{folder} has no {TABLE}: python evaluate.py {folder}/ckpt.pt --split unseen writes it") from None
    except (KeyError, ValueError, TypeError, IndexError, csv.Error):
        raise InputError(f"{path} is not the table that evaluate.py --split unseen writes") from None


def drawn(values, genera, rng):
    """(B,) means over the drawn genera of a drawn run. values: (runs, G); genera: (B, G) places."""
    return np.take_along_axis(values[rng.integers(len(values), size=len(genera))], genera, axis=1).mean(axis=1)


def difference(one, other):
    """Of two arms' ((runs, G) values, (B,) replicates): their difference with its interval."""
    return {"difference": float(one[0].mean() - other[0].mean()), **interval(one[1] - other[1])}


def main(argv=None):
    args = parse_args(argv)
    runs = [each for each in map(read_run, find_runs(args.runs)) if each.fine_tuned and each.metrics]
    if not runs:
        raise InputError(f"{', '.join(args.runs)}: no finished run of train.py")
    tables = {each.folder: read_table(each.folder) for each in runs}
    held, ranks = tables[runs[0].folder]
    kinds = [(each.metrics.get("dataset_digest"), each.args["model"], tables[each.folder][0]) for each in runs]
    for each, kind in zip(runs, kinds):
        if kind != kinds[0]:
            raise InputError(f"{runs[0].folder} and {each.folder} are of two data sets or two models: give the runs of one")
    groups, rng = group_runs(runs), np.random.default_rng(args.seed)
    genera = rng.integers(len(held), size=(args.replicates, len(held)))
    found = {}  # {label: {rank: ((runs, G) shares, (B,) replicates)}}
    for group in groups:
        of_ranks = {rank: np.stack([tables[each.folder][1][rank]["accuracy"] for each in group.runs]) for rank in ranks}
        found[group.label] = {rank: (values, drawn(values, genera, rng)) for rank, values in of_ranks.items()}
    document = {"replicates": args.replicates, "held_out": [{"taxid": t, "name": name, "sequences": n} for t, name, n in held], "arms": []}
    print("| arm | runs | " + " | ".join(f"{rank}: known genera | unseen" for rank in ranks) + " |\n|" + "---|" * (2 + 2 * len(ranks)))
    for group in groups:
        full = only(groups, "full", None, "train", group)
        frozen = only(groups, group.strategy, group.r, "frozen", group) if group.strategy in ADAPTERS and group.heads == "train" else None
        against = {"less_full": full if full is not group else None, "heads": frozen}
        arm = {"arm": group.label, "strategy": group.strategy, "r": group.r, "heads": group.heads, "runs": len(group.runs),
               "seeds": [each.args["seed"] for each in group.runs], "ranks": {}}
        for rank, (of_runs, replicates) in found[group.label].items():
            arm["ranks"][rank] = {
                "known": float(np.nanmean([tables[each.folder][1][rank]["known"] for each in group.runs])),
                "mean": float(of_runs.mean()), **interval(replicates), "genera": of_runs.mean(axis=0).tolist(),
                **{key: difference(found[group.label][rank], found[other.label][rank]) for key, other in against.items() if other}}
        document["arms"].append(arm)
        print(f"| {group.label} | {len(group.runs)} | " + " | ".join(
            f"{c['known']:.3f} | {c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})" for c in arm["ranks"].values()) + " |")
    for key, what in (("less_full", "less full"), ("heads", "heads trained less frozen")):
        for arm in document["arms"]:
            if all(key in c for c in arm["ranks"].values()):
                print(f"{arm['arm']}, {what}: " + "; ".join(
                    f"{rank} {c[key]['difference']:+.3f} ({c[key]['low']:+.3f} to {c[key]['high']:+.3f})"
                    for rank, c in arm["ranks"].items()))
    write_json(args.out, document)
    if args.figure:
        from taxa.study.arm_figures import on_unseen  # matplotlib, which the numbers do without
        with replacing(args.figure) as temporary:
            on_unseen(document["arms"], list(ranks)).savefig(temporary, dpi=150, format="png")


if __name__ == "__main__":
    run(main)
