"""A prepared dataset as a run needs it: which folder, the demo and missing tokens, its batches, and where a step's sequences came from."""

import multiprocessing
import os
import shutil
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from taxa.data.dataset import PreparedDataset, micro_batches
from taxa.data.reads import read_ahead
from taxa.data.splits import SPLITS
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError
from taxa.runtime.distributed import main_first
from taxa.runtime.progress import progress

BERTAX, DEMO = "data/bertax", "data/demo"
SHARED_MEMORY = "/dev/shm"


def data_folder(data):
    """The folder that --data means: itself; DEMO for "demo"; for None BERTAX if it is there, else DEMO."""
    if data is None:
        return BERTAX if Path(BERTAX).exists() else DEMO
    return DEMO if data == "demo" else data


def open_data(w, args, row):
    """The prepared dataset of --data, with the tokens of a model's tokenizer; args.data becomes its folder.

    row: the model's, of taxa.backbones. Rank 0 makes the demo and missing tokens first. Raises InputError for data that is damaged, and
    for an empty split.
    """
    given, args.data = args.data, data_folder(args.data)
    folder = args.data
    with main_first(w):
        if w.is_main and given is None:
            print(f"no --data given: {folder}" + f", simulated (there is no {BERTAX})" * (folder == DEMO), flush=True)
        if w.is_main and folder == DEMO and not Path(DEMO).exists():
            from taxa.data.prepare import prepare_demo  # late: it needs readers that no other run does
            prepare_demo(DEMO)
        dataset = PreparedDataset(folder)
        if w.is_main and not dataset.has_tokens(row.tokenizer):
            print(f"{folder}: adding tokens of {row.tokenizer}", flush=True)
            dataset.add_tokens(row_tokenizer(row), progress)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine, each may have its own copy
            dataset.verify(row.tokenizer, SPLITS, progress)
    if getattr(args, "data_fraction", None):  # train.py's
        dataset.keep_part(args.data_fraction, args.seed)
    for name in SPLITS:
        if dataset.manifest["splits"][name] == 0:
            raise InputError(f"{folder}: the {name} split is empty; prepare more sequences")
    return dataset


def row_tokenizer(row):
    """The tokenizer of a model: one of the package's, or the tokenizer.json that came with its weights."""
    return get_tokenizer("bpe" if row.tokenizer_file else row.tokenizer, row.tokenizer_file)


def check_vocabulary(tokenizer, ids, entries):
    """Raises InputError unless an embedding table of `entries` holds all `ids` of a tokenizer."""
    if ids > entries:
        raise InputError(f"the tokenizer {tokenizer} has {ids} ids, but the backbone only {entries}")


def load(split, plan, workers, device):
    """Iterate over the batches of micro_batches()' plan, one per micro-batch, made by `workers` processes beside this one (0: in it)."""
    return load_batches(split, [rows for micros, _ in plan for rows, _ in micros], workers, device)


def load_batches(split, batches, workers, device):
    """Yield split[rows] for each list of rows in `batches`, made by `workers` processes beside this one (0: in it; on CUDA by a thread, a
    batch or two ahead, while the device computes).

    Draws nothing from torch's global generator, on which dropout hangs. Raises InputError when the shared memory through which they hand
    them over is too small.
    """
    server = None
    if workers:  # forked from a server, not from this process, whose threads may hold locks that no child would ever open
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["taxa.data.opening"])
    loader = DataLoader(_Shared(split) if workers else split, batch_size=None, sampler=batches, num_workers=workers,
                        pin_memory=device.type == "cuda", generator=torch.Generator(), multiprocessing_context=server)
    try:
        yield from read_ahead(loader) if device.type == "cuda" and not workers else loader
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("shared memory", "Bus error", "exited unexpectedly")):
            raise
        size = shutil.disk_usage(SHARED_MEMORY).total if Path(SHARED_MEMORY).is_dir() else 0
        raise InputError(f"--workers {workers}: {SHARED_MEMORY}, of {size / 2**20:,.1f} MiB, is too small for their batches (or one "
                         "was killed, for want of memory): give fewer, --workers 0, or a larger one (docker run --shm-size)") from None


class _Shared(Dataset):
    """A split whose batches are in shared memory when the worker has made them.

    DataLoader would put them there in a thread of the worker, where an error is printed and the batch lost, and the run waits for ever.
    """

    def __init__(self, split):
        self.split = split

    def __getitem__(self, rows):
        return {name: tensor.share_memory_() for name, tensor in self.split[rows].items()}


def step_records(split, seed, epoch, position, per_step, sources=None):
    """Where the sequences of an optimizer step came from, over all processes: [{"row", "file", "record", "taxid"}, ...].

    epoch, position: from 0, of the step in its epoch; per_step: sequences in a step. sources: the manifest's; without them only rows.
    """
    rows = micro_batches(len(split), seed, epoch, per_step, 1, 0, 1)[position][0][0][0]
    if sources is None:
        return [{"row": int(row)} for row in rows]
    records = split.records(rows)
    return [{"row": int(row), "file": sources[record["source"]]["file"], "record": int(record["record"]) + 1,  # from 1, as in messages
             "taxid": int(record["taxid"])} for row, record in zip(rows, records)]
