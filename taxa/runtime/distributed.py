"""One process or many: torchrun's environment, and the few collectives that the loop needs. Gloo on CPU, NCCL on GPU."""

import contextlib
import datetime
import os
import socket
import time
import uuid
from typing import NamedTuple

import torch
import torch.distributed as dist

from taxa.errors import InputError, Stop


# Peers wait this long for each other within a step, and for rank 0, which may tokenize millions of sequences. A process that dies is
# noticed at once, since its connections close; the limits are for one that hangs.
STEP_LIMIT, PATIENCE = datetime.timedelta(minutes=10), datetime.timedelta(hours=12)
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Timed out waiting", "Socket Timeout")


class World(NamedTuple):
    """This process among all: rank of size, on device. patient: the gloo group for words between them and for long waits.

    again: known to rank 0: did this torchrun start processes before these? Any of its agents' restarts counts, not this one's alone.
    """

    rank: int
    size: int
    device: torch.device
    patient: object = None
    again: bool = False

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def device_ids(self):
        """What DistributedDataParallel takes: the one CUDA device, or None on a CPU."""
        return [self.device.index] if self.device.type == "cuda" else None


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
    joins, again = size > 1 and not dist.is_initialized(), False
    try:
        if joins:
            store, again = _own_store(rank, size)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_LIMIT)
        yield World(rank, size, device, dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None, again)
    except RuntimeError as error:
        if size == 1 or not any(sign in str(error) for sign in LOST):
            raise
        raise Stop(f"rank {rank} lost its connection to another process and stops too; the report of torchrun or srun names the one "
                   "that ended first") from None
    if joins:  # not after an error: it would wait for those that are gone
        dist.destroy_process_group()


def _own_store(rank, size):
    """(key-value store for this start of the processes alone, on rank 0: was there a start before it in the same store?)

    torchrun keeps one store over its restarts (--max-restarts), and in it lie the addresses of the processes that are gone, to which gloo
    and NCCL would connect if the new process has not written its own yet: "Connection refused". The number of restarts does not tell
    the starts apart, since each agent has a count of its own. So rank 0 draws a name, which goes before every key; each of the others
    waits until rank 0 has read the name that it drew, which a dead rank 0 does not.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=STEP_LIMIT))
    mine, deadline = uuid.uuid4().hex, time.monotonic() + STEP_LIMIT.total_seconds()
    if rank == 0:
        again = store.check(["start"])
        store.set("start", mine)
        for other in range(1, size):
            store.set(f"{mine}/seen/{other}", store.get(f"{mine}/{other}"))
        return dist.PrefixStore(mine, store), again
    while time.monotonic() < deadline:
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", mine)
        if store.check([f"{start}/seen/{rank}"]) and store.get(f"{start}/seen/{rank}").decode() == mine:
            return dist.PrefixStore(start, store), False
        time.sleep(0.05)
    raise RuntimeError("Timed out waiting for rank 0")


def exit_together(w, stop):
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
            exit_together(w, InputError(f"rank {rank} on {theirs['host']} differs from rank 0 in {'; '.join(differ)}: start all alike"))


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
