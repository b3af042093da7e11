"""What is in a prepared folder, for a reader.

It is told by tables in text, and by a picture of class sizes and token lengths.
"""

from pathlib import Path

import numpy as np

from taxa.data.splits import NO_CLASS
from taxa.errors import InputError
from taxa.runtime.files import replacing

QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent


def class_sizes(data):
    """{rank: (C,) sequences of each class in all splits, {split: (C,) of that split}}."""
    sizes = {}
    for column, (rank, table) in enumerate(data.classes.items()):
        of_split = {}
        for split in data.splits:
            labels = np.load(data.folder / split / "labels.npy", mmap_mode="r")[:, column]
            of_split[split] = np.bincount(labels[labels != NO_CLASS], minlength=len(table))
        sizes[rank] = sum(of_split.values()), of_split
    return sizes


def token_lengths(data, tokenizer):
    """(N,) tokens of each sequence, special ones included, of all splits."""
    offsets = [np.load(data.folder / split / f"{tokenizer}.npy", mmap_mode="r")
               for split in data.splits]
    return np.concatenate([np.diff(of_split) for of_split in offsets])


def describe(data):
    """The lines of `prepare.py --describe`."""
    sizes = class_sizes(data)
    quantiles = "".join(f"{name:>10}" for name in quantile_names())

    lines = [
        f"{data.folder}: {data.manifest['sequences']:,} sequences, digest {data.digest[:16]}",
        "",
        *describe_largest(data, sizes),
        "",
        f"{'sequences per class of':<24} {'classes':>8}{quantiles}{'not in test':>13}",
    ]
    for rank, (total, of_split) in sizes.items():
        absent = int((of_split["test"] == 0).sum())
        lines.append(f"{rank:<24} {len(total):>8,}{quantile_cells(total)}{absent:>13,}")

    lines += ["", f"{'tokens per sequence':<24} {'mean':>8}{quantiles}"]
    for tokenizer in data.manifest["tokenizers"]:
        lengths = token_lengths(data, tokenizer)
        lines.append(f"{tokenizer:<24} {lengths.mean():>8.1f}{quantile_cells(lengths)}")
    return lines


def describe_largest(data, sizes):
    """Lines: the ten largest classes of the first rank, the others, and all of them, by split."""
    rank = next(iter(sizes))
    total, of_split = sizes[rank]

    def row(name, classes):
        counts = [total[classes].sum()]
        counts += [of_split[split][classes].sum() for split in data.splits]
        return f"{name:<24} " + "".join(f"{count:>12,}" for count in counts)

    lines = [f"{rank:<24} {'all':>12}" + "".join(f"{split:>12}" for split in data.splits)]
    every = np.arange(len(total))
    largest = np.argsort(-total, kind="stable")[:10].tolist()
    lines += [row(data.classes[rank][i]["name"], [i]) for i in largest]
    if len(total) > 10:
        rest = np.setdiff1d(every, largest)
        lines.append(row(f"{len(rest):,} others", rest))
    return [*lines, row("all", every)]


def quantile_names():
    return ["least", *(f"{q}%" for q in QUANTILES[1:-1]), "most"]


def quantile_cells(values):
    quantiles = np.percentile(values, QUANTILES, method="lower")
    return "".join(f"{int(value):>10,}" for value in quantiles)


def picture(data, path):
    """Draw sequences per class of every rank but the first, and tokens per sequence.

    path: the image file. Needs matplotlib ([report]).
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("--picture needs matplotlib: pip install '.[report]'") from None
    if not Path(path).resolve().parent.is_dir():
        raise InputError(f"--picture {path}: no such folder")
    matplotlib.use("agg")
    from matplotlib import pyplot

    ranks = list(data.classes)[1:] or list(data.classes)
    figure, axes = pyplot.subplots(
        1, len(ranks) + 1, figsize=(4 * len(ranks) + 4, 3.2), layout="constrained")

    sizes = class_sizes(data)
    for axis, rank in zip(axes, ranks):
        total = sizes[rank][0]
        edges = np.unique(np.rint(np.geomspace(1, total.max() + 1, 25)))
        axis.hist(total, bins=edges, color="tab:blue")
        axis.set(
            xscale="log",
            xlabel=f"sequences per {rank}",
            ylabel="classes",
            title=f"{len(total):,} of rank {rank}",
        )

    lengths = {name: token_lengths(data, name) for name in data.manifest["tokenizers"]}
    longest = max(values.max() for values in lengths.values())
    edges = np.linspace(0, longest * 1.05 + 1, 80)
    for tokenizer, values in lengths.items():
        axes[-1].hist(values, bins=edges, histtype="step", label=tokenizer)
    axes[-1].set(
        yscale="log",
        xlabel="tokens per sequence",
        ylabel="sequences",
        title=f"{data.manifest['sequences']:,} sequences",
    )
    axes[-1].legend(loc="upper left")

    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format=Path(path).suffix[1:])
    except ValueError as error:
        raise InputError(f"--picture {path}: {error}") from None
    finally:
        pyplot.close(figure)
