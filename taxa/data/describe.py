"""What is in a prepared folder, for a reader: tables in text, and a picture of class sizes and token lengths."""

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
    return np.concatenate([np.diff(np.load(data.folder / split / f"{tokenizer}.npy", mmap_mode="r")) for split in data.splits])


def describe(data):
    """The lines of `prepare.py --describe`."""
    manifest, sizes = data.manifest, class_sizes(data)
    lines = [f"{data.folder}: {manifest['sequences']:,} sequences, digest {data.digest[:16]}", ""]
    first = next(iter(sizes))
    lines.append(f"{first:<24} {'all':>12}" + "".join(f"{split:>12}" for split in data.splits))
    total, of_split = sizes[first]
    order = np.argsort(-total, kind="stable")[:10].tolist()
    rows = [(data.classes[first][i]["name"], total[i], [of_split[split][i] for split in data.splits]) for i in order]
    if len(total) > 10:
        rest = np.setdiff1d(np.arange(len(total)), order)
        rows.append((f"{len(rest):,} others", total[rest].sum(), [of_split[split][rest].sum() for split in data.splits]))
    rows.append(("all", total.sum(), [of_split[split].sum() for split in data.splits]))
    lines += [f"{name:<24} {n:>12,}" + "".join(f"{count:>12,}" for count in counts) for name, n, counts in rows]
    lines += ["", f"{'sequences per class of':<24} {'classes':>8}" + "".join(f"{name:>10}" for name in quantile_names())
              + f"{'not in test':>13}"]
    for rank, (total, of_split) in sizes.items():
        lines.append(f"{rank:<24} {len(total):>8,}" + quantile_cells(total) + f"{int((of_split['test'] == 0).sum()):>13,}")
    lines += ["", f"{'tokens per sequence':<24} {'mean':>8}" + "".join(f"{name:>10}" for name in quantile_names())]
    for tokenizer in manifest["tokenizers"]:
        lengths = token_lengths(data, tokenizer)
        lines.append(f"{tokenizer:<24} {lengths.mean():>8.1f}" + quantile_cells(lengths))
    return lines


def quantile_names():
    return ["least", *(f"{q}%" for q in QUANTILES[1:-1]), "most"]


def quantile_cells(values):
    return "".join(f"{int(value):>10,}" for value in np.percentile(values, QUANTILES, method="lower"))


def picture(data, path):
    """Draw sequences per class of every rank but the first, and tokens per sequence, to an image file. Needs matplotlib ([report])."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--picture needs matplotlib: pip install '.[report]'") from None
    if not Path(path).resolve().parent.is_dir():
        raise InputError(f"--picture {path}: no such folder")
    matplotlib.use("agg")
    from matplotlib import pyplot

    ranks, tokenizers = list(data.classes)[1:] or list(data.classes), list(data.manifest["tokenizers"])
    figure, axes = pyplot.subplots(1, len(ranks) + 1, figsize=(4 * len(ranks) + 4, 3.2), layout="constrained")
    sizes = class_sizes(data)
    for axis, rank in zip(axes, ranks):
        total = sizes[rank][0]
        edges = np.unique(np.rint(np.geomspace(1, total.max() + 1, 25)))
        axis.hist(total, bins=edges, color="tab:blue")
        axis.set(xscale="log", xlabel=f"sequences per {rank}", ylabel="classes", title=f"{len(total):,} of rank {rank}")
    lengths = {tokenizer: token_lengths(data, tokenizer) for tokenizer in tokenizers}
    edges = np.linspace(0, max(values.max() for values in lengths.values()) * 1.05 + 1, 80)
    for tokenizer, values in lengths.items():
        axes[-1].hist(values, bins=edges, histtype="step", label=tokenizer)
    axes[-1].set(yscale="log", xlabel="tokens per sequence", ylabel="sequences", title=f"{data.manifest['sequences']:,} sequences")
    axes[-1].legend(loc="upper left")
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format=Path(path).suffix[1:])
    except ValueError as error:
        raise InputError(f"--picture {path}: {error}") from None
    finally:
        pyplot.close(figure)
