"""The way of a batch: from the seeded order of an epoch, over padding and loading, to the device.

    plan = micro_batches(N, seed, epoch, ...)      which sequences each optimizer step takes
    batches = load(split, plan, workers, device)   one padded batch for each micro-batch of the plan
    batch = on_device(next(batches), device)       {"input_ids", "attention_mask", "labels"}
    step_records(split, ...)                       where the sequences of a step came from

Shapes: N sequences of a split, B of a batch, T tokens of the longest sequence in it, R ranks.

torch is imported late: it takes seconds, and neither prepare.py nor its workers need it.
"""

import collections
import concurrent.futures
import multiprocessing
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from taxa.errors import InputError

SHARED_MEMORY = "/dev/shm"
# What a RuntimeError of DataLoader says when its workers cannot hand over their batches.
NO_MEMORY_TO_SHARE = ("shared memory", "Bus error", "exited unexpectedly")


# ---------------------------------------------------------------- the order


class Step(NamedTuple):
    """One optimizer step, as one process sees it."""

    micros: list  # of (rows, weight): sequence numbers (B,) of a micro-batch, weight 1.0 or 0.0
    count: int  # sequences of the whole step, over all processes and micro-batches


def epoch_order(N, seed, epoch):
    """The seeded shuffle of an epoch: all sequence numbers (N,)."""
    return np.random.RandomState([seed, epoch]).permutation(N)


def micro_batches(N, seed, epoch, batch_size, accumulate, *, rank, size):
    """The Steps of one epoch, as seen by process `rank` of `size`.

    epoch_order() is cut into steps of batch_size * accumulate * size sequences, the last one
    shorter. A process takes every size-th sequence of a step. So the steps are the same for
    1 process with accumulate = 2n as for 2 processes with n. The last step may be too short to
    give this process a sequence. It then gets one with weight 0, since every process must take
    part in the step.
    """
    order = epoch_order(N, seed, epoch)
    per_step = batch_size * accumulate * size
    plan = []
    for start in range(0, N, per_step):
        whole = order[start:start + per_step]
        mine, weight = (whole[rank::size], 1.0) if rank < len(whole) else (whole[:1], 0.0)
        micros = [(mine[i:i + batch_size], weight) for i in range(0, len(mine), batch_size)]
        plan.append(Step(micros, len(whole)))
    return plan


def step_records(split, seed, epoch, position, per_step, sources=None):
    """Where the sequences of an optimizer step came from, over all processes.

    epoch, position: from 0, of the step in its epoch. per_step: sequences in a step.
    sources: the manifest's. Returns [{"row", "file", "record", "taxid"}, ...]; without sources
    only {"row"}.
    """
    start = position * per_step
    rows = epoch_order(len(split), seed, epoch)[start:start + per_step]
    if sources is None:
        return [{"row": int(row)} for row in rows]
    return [
        {
            "row": int(row),
            "file": sources[record["source"]]["file"],
            "record": int(record["record"]) + 1,  # from 1, as in messages
            "taxid": int(record["taxid"]),
        }
        for row, record in zip(rows, split.records(rows))
    ]


# ---------------------------------------------------------------- padding


def padded(rows, pad_token_id):
    """B rows of ids, each (T_i,), padded right to the longest.

    Returns {"input_ids" (B, T) int64, "attention_mask" (B, T) int64}.
    """
    lengths = np.array([len(row) for row in rows])
    starts = np.cumsum(lengths) - lengths
    return gathered(np.concatenate(rows), starts, lengths, pad_token_id)


def gathered(ids, starts, lengths, pad_token_id):
    """As padded(), of B sequences that lie in one array of ids: where each starts, its length."""
    position = np.arange(lengths.max())
    here = position < lengths[:, None]  # (B, T)
    # past a sequence's end stands the next one's id, which `here` replaces
    taken = ids.take(starts[:, None] + position, mode="clip")
    input_ids = np.where(here, taken.astype(np.int64), pad_token_id)
    return {"input_ids": _tensor(input_ids), "attention_mask": _tensor(here.astype(np.int64))}


def labelled(batch, labels):
    """The batch with its labels (B, R), int64."""
    return {**batch, "labels": _tensor(labels.astype(np.int64))}


def _tensor(array):
    """A tensor over the memory of an array."""
    import torch

    return torch.from_numpy(array)


# ---------------------------------------------------------------- loading


def load(split, plan, workers, device):
    """Yield the batch of every micro-batch of a plan, a list of Steps. See load_batches()."""
    batches = [rows for step in plan for rows, _ in step.micros]
    return load_batches(split, batches, workers, device)


def load_batches(split, batches, workers, device):
    """Yield split[rows] for each list of rows in `batches`.

    `workers` processes beside this one make them. With 0 they are made in this process; on CUDA
    a thread makes them a batch or two ahead, while the device computes. Nothing is drawn from
    torch's global generator, which decides dropout.

    Raises InputError when the shared memory through which workers hand over is too small.
    """
    import torch
    from torch.utils.data import DataLoader

    server = None
    if workers:
        # forked from a server: threads of this process may hold locks that no child would open
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["torch", "taxa.data.batches"])
    on_cuda = device.type == "cuda"
    loader = DataLoader(
        _Shared(split) if workers else split,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        pin_memory=on_cuda,
        generator=torch.Generator(),
        multiprocessing_context=server,
    )
    try:
        yield from read_ahead(loader) if on_cuda and not workers else loader
    except RuntimeError as error:
        if not any(sign in str(error) for sign in NO_MEMORY_TO_SHARE):
            raise
        shared = Path(SHARED_MEMORY)
        size = shutil.disk_usage(shared).total if shared.is_dir() else 0
        raise InputError(
            f"--workers {workers}: {SHARED_MEMORY}, of {size / 2**20:,.1f} MiB, is too small for "
            "their batches (or one was killed, for want of memory): give fewer, --workers 0, or "
            "a larger one (docker run --shm-size)"
        ) from None


class _Shared:
    """A split whose batches are in shared memory when the worker has made them.

    DataLoader would put them there in a thread of the worker, where an error is printed and the
    batch is lost, and the run waits for ever.
    """

    def __init__(self, split):
        self.split = split

    def __getitem__(self, rows):
        return {name: tensor.share_memory_() for name, tensor in self.split[rows].items()}


def read_ahead(items, depth=2):
    """Yield the items of an iterable, of which a thread has up to `depth` ready.

    What the iterable raises is raised here.
    """
    iterator, end = iter(items), object()
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = collections.deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, iterator, end))
            yield item


def on_device(batch, device):
    """The batch on a device.

    Its attention_mask is None where no token is padding: attention without a mask is faster on
    CUDA.
    """
    if batch["attention_mask"].all():
        batch = batch | {"attention_mask": None}
    return {
        name: tensor if tensor is None else tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
    }
