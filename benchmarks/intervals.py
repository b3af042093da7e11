"""Balanced accuracy of finished runs with 95% intervals, and what training the heads is worth, by a bootstrap over sequences and seeds.

  python benchmarks/intervals.py runs/converged --out docs/results/converged.json

Every ckpt.pt predicts its test split. A replicate draws the test sequences of every class of the last rank anew, with replacement, the
same ones for all runs on that data set, and of every arm (runs that differ only in the seed) as many seeds as it has, with replacement.
An interval is from the 2.5th to the 97.5th percentile of the replicates; a gain is a difference in the same replicate. The share is
(trained - frozen) / (full - frozen): how much of the distance from an adapter with frozen heads to full fine-tuning its heads make up.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taxa.data.dataset import PreparedDataset  # noqa: E402
from taxa.errors import InputError  # noqa: E402
from taxa.results.evaluation import run_split  # noqa: E402
from taxa.results.groups import group_runs  # noqa: E402
from taxa.results.run_folders import find_runs, read_run  # noqa: E402
from taxa.runtime.cli import Parser, positive_int, run, seed  # noqa: E402
from taxa.runtime.distributed import world  # noqa: E402
from taxa.runtime.files import write_json  # noqa: E402
from taxa.training import checkpoint  # noqa: E402


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="run folders of train.py, or folders that contain them")
    add("--out", required=True, metavar="FILE.json", help="where every number goes")
    add("--replicates", type=positive_int, default=2000, metavar="N", help="of the bootstrap (default 2000)")
    add("--seed", type=seed, default=0, metavar="N", help="of the bootstrap (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto: CUDA where there is one")
    return parser.parse_args(argv)


def right(w, each):
    """(truth (N, R), is the prediction right (N, R)) of a run's test split."""
    content = checkpoint.read(each.folder / "ckpt.pt")
    split = PreparedDataset(content["data"]["folder"]).split("test", content["tokenizer"]["name"])
    model = checkpoint.rebuild(content).to(w.device)
    outcome = run_split(w, model, split, content["batch_size"], content["precision"], lineages=content["lineages"])
    return outcome.truth, outcome.predicted == outcome.truth


def draws(strata, replicates, rng):
    """(B, N) how often each sequence is in each replicate: within every stratum, as many as it has, with replacement."""
    counts = np.zeros((replicates, len(strata)))
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        counts[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=replicates)
    return counts


def balanced(counts, truth, correct):
    """Balanced accuracy (B, M) of M runs in B replicates. counts (B, N), truth (N,), correct (N, M)."""
    recalls = []
    for one in np.unique(truth):
        of_class = truth == one
        recalls.append(counts[:, of_class] @ correct[of_class] / counts[:, of_class].sum(axis=1, keepdims=True))
    return np.mean(recalls, axis=0)


def interval(values):
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def arms_of(groups, found, ranks, args):
    """{label: {rank: (mean over the seeds, replicates (B,))}} of the groups of one data set. found: {folder: right()}."""
    truth = found[groups[0].runs[0].folder][0]
    rng = np.random.default_rng(args.seed)
    counts = np.concatenate([np.ones((1, len(truth))), draws(truth[:, -1], args.replicates, rng)])  # the first: as it is
    arms = {}
    for group in groups:
        correct = np.stack([found[each.folder][1] for each in group.runs], axis=2)  # (N, R, seeds)
        seeds = rng.integers(len(group.runs), size=(args.replicates, len(group.runs)))
        arms[group.label] = {}
        for i, rank in enumerate(ranks):
            of_seeds = balanced(counts, truth[:, i], correct[:, i].astype(float))
            arms[group.label][rank] = of_seeds[0].mean(), np.take_along_axis(of_seeds[1:], seeds, axis=1).mean(axis=1)
    return arms


def gain(trained, frozen, full):
    """What training the heads adds, and the share of the distance from frozen heads to full fine-tuning that it makes up."""
    added = {"gain": float(trained[0] - frozen[0]), **interval(trained[1] - frozen[1])}
    if full:
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = (trained[1] - frozen[1]) / (full[1] - frozen[1])
        added["share"] = {"share": float((trained[0] - frozen[0]) / (full[0] - frozen[0])), **interval(shares)}
    return added


def main(argv=None):
    args = parse_args(argv)
    runs = [each for each in map(read_run, find_runs(args.runs)) if each.fine_tuned and each.metrics]
    if not runs:
        raise InputError(f"{', '.join(args.runs)}: no finished run of train.py")
    with world(args.device) as w:
        found = {each.folder: right(w, each) for each in runs}
    document = {"replicates": args.replicates, "arms": [], "heads": []}
    groups = group_runs(runs)
    for data, model in dict.fromkeys((group.data, group.model) for group in groups):
        here = [group for group in groups if (group.data, group.model) == (data, model)]
        ranks = list(here[0].runs[0].metrics["ranks"])
        arms = arms_of(here, found, ranks, args)
        print(f"\n| {model}, {data} | seeds | trains | " + " | ".join(ranks) + " |\n|" + "---|" * (len(ranks) + 3))
        for group in here:
            cells = {rank: {"mean": float(mean), **interval(values)} for rank, (mean, values) in arms[group.label].items()}
            document["arms"].append({"data": data, "model": model, "arm": group.label, "seeds": len(group.runs),
                                     "trainable_fraction": group.runs[0].trainable_fraction, **cells})
            print(f"| {group.label} | {len(group.runs)} | {group.runs[0].trainable_fraction:.2%} | "
                  + " | ".join(f"{c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})" for c in cells.values()) + " |")
        full = next((arms[group.label] for group in here if group.strategy == "full"), {})
        for trained in (group for group in here if group.heads == "train"):
            frozen = next((g for g in here if g.heads == "frozen" and (g.strategy, g.r) == (trained.strategy, trained.r)), None)
            if frozen:
                gains = {rank: gain(arms[trained.label][rank], arms[frozen.label][rank], full.get(rank)) for rank in ranks}
                document["heads"].append({"data": data, "model": model, "arm": trained.label, **gains})
                print(f"{trained.label}, heads trained less frozen: " + "; ".join(
                    f"{rank} {g['gain']:+.3f} ({g['low']:+.3f} to {g['high']:+.3f})"
                    + (f", {g['share']['share']:.0%} ({g['share']['low']:.0%} to {g['share']['high']:.0%}) of the distance to full"
                       if "share" in g else "") for rank, g in gains.items()))
    write_json(args.out, document)


if __name__ == "__main__":
    run(main)
