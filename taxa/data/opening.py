"""A prepared dataset as a run needs it: which folder, the demo, and missing tokens."""

import os
from pathlib import Path

from taxa.data.augment import augmented
from taxa.data.dataset import PreparedDataset
from taxa.data.splits import SPLITS
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError
from taxa.runtime.distributed import main_first
from taxa.runtime.progress import progress

BERTAX, DEMO = "data/bertax", "data/demo"


def data_folder(data):
    """The folder that --data means: itself, or DEMO for "demo".

    For None it is BERTAX if that is there, else DEMO.
    """
    if data is None:
        return BERTAX if Path(BERTAX).exists() else DEMO
    return DEMO if data == "demo" else data


def open_data(w, args, row):
    """The prepared dataset of --data, with the tokens of a model's tokenizer.

    args.data becomes its folder. row: the model's, of taxa.backbones. Rank 0 makes the demo and
    missing tokens first. Raises InputError for data that is damaged, and for an empty split.
    """
    given = args.data
    folder = args.data = data_folder(given)
    with main_first(w):
        if w.is_main and given is None:
            simulated = f", simulated (there is no {BERTAX})" if folder == DEMO else ""
            print(f"no --data given: {folder}{simulated}", flush=True)
        if w.is_main and folder == DEMO and not Path(DEMO).exists():
            # late: it needs readers that no other run does
            from taxa.data.prepare import prepare_demo

            prepare_demo(DEMO)
        dataset = PreparedDataset(folder)
        if w.is_main and not dataset.has_tokens(row.tokenizer):
            print(f"{folder}: adding tokens of {row.tokenizer}", flush=True)
            dataset.add_tokens(row_tokenizer(row), progress)
        # once on each machine, which may have its own copy
        if os.environ.get("LOCAL_RANK", "0") == "0":
            dataset.verify(row.tokenizer, SPLITS, progress)
    if getattr(args, "data_fraction", None):  # train.py's
        dataset.keep_part(args.data_fraction, args.seed)
    for name in SPLITS:
        if dataset.manifest["splits"][name] == 0:
            raise InputError(f"{folder}: the {name} split is empty; prepare more sequences")
    return dataset


def row_tokenizer(row):
    """The tokenizer of a model: one of the package's, or the tokenizer.json that came with its
    weights.
    """
    return get_tokenizer("bpe" if row.tokenizer_file else row.tokenizer, row.tokenizer_file)


def check_vocabulary(tokenizer, ids, entries):
    """Raises InputError unless an embedding table of `entries` holds all `ids` of a tokenizer."""
    if ids > entries:
        raise InputError(
            f"the tokenizer {tokenizer} has {ids} ids, but the backbone only {entries}")


def epoch_split(split, data, args, model_row, epoch):
    """The training split as an epoch reads it: as it is, or with --augment in random views."""
    if not args.augment:
        return split
    return augmented(data.split("train", "nt"), row_tokenizer(model_row), args.seed, epoch)
