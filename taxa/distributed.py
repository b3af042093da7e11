"""One process or many: torchrun's environment, and the few collectives that the loop needs. Gloo on CPU, NCCL on GPU."""

import contextlib
import datetime
import os
import socket
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from taxa.cli import InputError, Stop


# Peers wait this long for each other within a step, and for rank 0, which may tokenize millions of sequences. A process that dies is
# noticed at once, since its connections close; the limits are for one that hangs.
STEP_LIMIT, PATIENCE = datetime.timedelta(minutes=10), datetime.timedelta(hours=12)
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Timed out waiting", "Socket Timeout")


class World(NamedTuple):
    """This process among all: rank of size, on device. patient: the gloo group for words between them and for long waits."""

    rank: int
    size: int
    device: torch.device
    patient: object = None

    @property
    def is_main(self):
        return self.rank == 0


@contextlib.contextmanager
def world(device="auto"):
    """Join the process group when torchrun started us, and leave it at the end; inside another world(), share that one's group.

    device: auto, cpu or cuda.

    Raises InputError for --device cuda without CUDA.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise InputError(f"process {device.index} of this machine has no GPU of its own: it has {torch.cuda.device_count()}; start "
                             "as many processes as GPUs, or use --device cpu")
        torch.cuda.set_device(device)
    joins = size > 1 and not dist.is_initialized()
    try:
        if joins:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=STEP_LIMIT)
        yield World(rank, size, device, dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None)
    except RuntimeError as error:
        if size == 1 or not any(sign in str(error) for sign in LOST):
            raise
        raise Stop(f"rank {rank} lost its connection to another process and stops too; the report of torchrun or srun names the one "
                   "that ended first") from None
    if joins:  # not after an error: it would wait for those that are gone
        dist.destroy_process_group()


def leave(w, stop):
    """Raise `stop` on rank 0 and the same, without words, on the others: for what all of them find at the same moment."""
    barrier(w)
    if w.is_main and w.size > 1:
        time.sleep(1)  # until the others have left: a connection that closes under them would be news of its own
    raise stop if w.is_main else type(stop)()


def barrier(w):
    """Wait until every process is here."""
    if w.size > 1:
        dist.barrier(group=w.patient)


def any_process(w, *flags):
    """For each flag: is it set on any process? A dead process shows here as an error, whatever the device."""
    if w.size == 1:
        return flags
    flags = torch.tensor([bool(flag) for flag in flags], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=w.patient)
    return tuple(map(bool, flags.tolist()))


def from_main(w, value):
    """Rank 0's value of anything that can be pickled, on every process."""
    box = [value]
    if w.size > 1:
        dist.broadcast_object_list(box, 0, group=w.patient)
    return box[0]


def same_on_all(w, facts):
    """Compare {what: value} over all processes. Raises InputError that names the first process that differs from rank 0, and in what."""
    of_ranks = [None] * w.size
    if w.size > 1:
        dist.all_gather_object(of_ranks, {**facts, "host": socket.gethostname()}, group=w.patient)
    for rank, theirs in enumerate(of_ranks[1:], start=1):
        differ = [f"{what}: {theirs.get(what)} there, {value} on rank 0" for what, value in of_ranks[0].items()
                  if what != "host" and theirs.get(what) != value]
        if differ:
            leave(w, InputError(f"rank {rank} on {theirs['host']} differs from rank 0 in {'; '.join(differ)}: start all alike"))


def sum_over_ranks(w, tensor):
    """The element-wise sum of `tensor` over all processes, on the CPU; the tensor itself for one process."""
    if w.size > 1:
        tensor = tensor.to(w.device)
        dist.all_reduce(tensor)
    return tensor.cpu()


def copy_from_main(w, tensors):
    """Give every process rank 0's values of these tensors, in place."""
    if w.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@contextlib.contextmanager
def main_first(w):
    """Rank 0 runs the block first, then the others: for what one process fetches or writes and all then read."""
    if not w.is_main:
        barrier(w)
    yield
    if w.is_main:
        barrier(w)
