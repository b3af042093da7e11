"""Balanced accuracy of finished runs with 95% intervals, and what training the heads is worth, by a
bootstrap over runs and sequences.

  python experiments/intervals.py runs/converged --out experiments/results/converged.json

The script reads the confusion_RANK.csv of each run. A replicate draws one of an arm's runs (which
differ only in the seed), and the test sequences of every class anew, with replacement. An interval
is from the 2.5th to the 97.5th percentile of the replicates: where one run with another seed and
other test sequences would lie. It is wider than an interval of the mean. A gain is the difference
of two arms, drawn independently. The share is (trained - frozen) / (full - frozen): how much of the
distance from an adapter with frozen heads to full fine-tuning its heads make up. It is left out
where a replicate of full is not above that of frozen heads.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_int, run, seed
from taxa.runtime.files import write_json
from taxa.study.groups import ADAPTERS, arm_of, group_runs
from taxa.study.run_folders import find_runs, read_run


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS",
        help="run folders of train.py, or folders that contain them")
    add("--out", required=True, metavar="FILE.json", help="where every number goes")
    add("--replicates", type=positive_int, default=2000, metavar="N",
        help="of the bootstrap (default 2000)")
    add("--seed", type=seed, default=0, metavar="N", help="of the bootstrap (default 0)")
    return parser.parse_args(argv)


def finished_runs(paths):
    """The fine-tuning runs that have ended. Raises InputError where there is none."""
    runs = [each for each in map(read_run, find_runs(paths)) if each.fine_tuned and each.metrics]
    if not runs:
        raise InputError(f"{', '.join(paths)}: no finished run of train.py")
    return runs


def resampled(confusion, replicates, rng):
    """(B,) balanced accuracies of one run, its test sequences drawn anew within every class.

    confusion: (C, C), rows the truth.
    """
    confusion = np.asarray(confusion)
    counts = confusion.sum(axis=1)
    present = counts > 0
    counts = counts[present]
    recall = np.diagonal(confusion)[present] / counts
    right = rng.binomial(counts, recall, size=(replicates, len(counts)))
    return (right / counts).mean(axis=1)


def replicates_of(group, rank, replicates, rng):
    """(mean over the runs, (B,) replicates) of an arm."""
    of_runs = np.stack([
        resampled(each.confusion(rank)[1], replicates, rng) for each in group.runs
    ])
    drawn = rng.integers(len(of_runs), size=replicates)  # a run for each replicate
    return np.mean(group.values(rank)), of_runs[drawn, np.arange(replicates)]


def interval(values):
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def gain(trained, frozen, full):
    """What training the heads adds, and which share of the distance from frozen heads to full
    fine-tuning it makes up.

    trained, frozen, full: replicates_of() an arm; full may be None.
    """
    added = {"gain": float(trained[0] - frozen[0]), **interval(trained[1] - frozen[1])}
    if full and (full[1] > frozen[1]).all():  # else there is no distance to have a share of
        added["share"] = {
            "share": float((trained[0] - frozen[0]) / (full[0] - frozen[0])),
            **interval((trained[1] - frozen[1]) / (full[1] - frozen[1])),
        }
    return added


def only(groups, strategy, r, heads, like):
    """The one group of this kind with as many training sequences as `like`, or None.

    Raises InputError for two.
    """

    def kind(group):
        size = group.runs[0].environment.get("training_sequences")
        return group.strategy, group.r, group.heads, size

    wanted = (strategy, r, heads, kind(like)[-1])
    found = [group for group in groups if kind(group) == wanted]
    if len(found) > 1:
        raise InputError(f"{found[0].label} and {found[1].label} could both be compared with "
                         f"{like.label}: give the runs of one of them")
    return found[0] if found else None


def arm_entry(group, ranks, reached):
    """The arm's entry in the document. reached: {rank: {"mean", "low", "high"}}."""
    arm = arm_of(group, ranks)
    return {
        "data": group.data,
        "model": group.model,
        "arm": group.label,
        "strategy": arm.strategy,
        "r": arm.r,
        "heads": arm.heads,
        "row": arm.row,
        "runs": len(group.runs),
        "seeds": [each.args["seed"] for each in group.runs],
        "trainable_fraction": arm.share,
        "training_sequences": arm.sequences,
        "classes": arm.classes,
        "reached": reached,
    }


def gains_of(trained, groups, arms, ranks):
    """{rank: gain()} of an adapter with trained heads, None where it was not run with frozen ones.

    arms: {label: {rank: replicates_of()}}.
    """
    frozen = only(groups, trained.strategy, trained.r, "frozen", trained)
    whole = only(groups, "full", None, "train", trained)
    if not frozen:
        return None
    full = arms[whole.label] if whole else {}
    return {
        rank: gain(arms[trained.label][rank], arms[frozen.label][rank], full.get(rank))
        for rank in ranks
    }


def gain_text(rank, found):
    """One gain as a part of a printed line."""
    text = f"{rank} {found['gain']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
    if "share" in found:
        share = found["share"]
        text += (f", {share['share']:.0%} ({share['low']:.0%} to {share['high']:.0%}) "
                 "of the distance to full")
    return text


def main(argv=None):
    args = parse_args(argv)
    runs = finished_runs(args.runs)
    for each in runs:
        if any(each.confusion(rank) is None for rank in each.metrics["ranks"]):
            raise InputError(f"{each.folder} has no confusion_RANK.csv: evaluate.py writes them")
    document = {"replicates": args.replicates, "arms": [], "heads": []}
    rng = np.random.default_rng(args.seed)
    groups = group_runs(runs)
    for data, model in dict.fromkeys((group.data, group.model) for group in groups):
        here = [group for group in groups if (group.data, group.model) == (data, model)]
        ranks = list(here[0].runs[0].metrics["ranks"])
        arms = {}  # {label: {rank: replicates_of()}}
        for group in here:
            arms[group.label] = {
                rank: replicates_of(group, rank, args.replicates, rng) for rank in ranks
            }

        print(f"\n| {model}, {data} | runs | trains | {' | '.join(ranks)} |")
        print("|" + "---|" * (len(ranks) + 3))
        for group in here:
            reached = {
                rank: {"mean": float(mean), **interval(values)}
                for rank, (mean, values) in arms[group.label].items()
            }
            arm = arm_entry(group, ranks, reached)
            document["arms"].append(arm)
            cells = " | ".join(
                f"{c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})" for c in reached.values())
            share = arm["trainable_fraction"]
            print(f"| {group.label} | {len(group.runs)} | {share:.2%} | {cells} |")

        for group in here:
            if group.strategy not in ADAPTERS or group.heads != "train":
                continue
            gains = gains_of(group, here, arms, ranks)
            if gains:
                entry = {"data": data, "model": model, "arm": group.label, **gains}
                document["heads"].append(entry)
                parts = "; ".join(gain_text(rank, found) for rank, found in gains.items())
                print(f"{group.label}, heads trained less frozen: {parts}")
    write_json(args.out, document)


if __name__ == "__main__":
    run(main)
