"""One process or many: torchrun's environment, and the few collectives that the loop needs.

The processes meet in rendezvous.py. They talk by gloo on CPU, and by NCCL on GPU.
"""

import contextlib
import os
import socket
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from taxa.errors import InputError
from taxa.runtime import rendezvous


class World(NamedTuple):
    """This process among all: rank of size, on device."""

    rank: int
    size: int
    device: torch.device
    gloo: object = None  # the group for words between the processes, and for long waits
    restarted: bool = False  # rank 0 knows: torchrun has started this job before

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def device_ids(self):
        """What DistributedDataParallel takes: the one CUDA device, or None on a CPU."""
        return [self.device.index] if self.device.type == "cuda" else None


@contextlib.contextmanager
def world(device="auto"):
    """Join the process group when torchrun started us, and leave it at the end.

    device: auto, cpu or cuda. Inside another world() this one shares its processes.
    Raises InputError for --device cuda without CUDA, for two processes that share a GPU, and, like
    Stop, for processes that cannot connect.
    """
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = rendezvous.own_device(device)
    joins = size > 1 and not dist.is_initialized()
    with rendezvous.one_line_if_lost(rank, size):
        gloo, restarted = rendezvous.join(rank, size, device) if size > 1 else (None, False)
        w = World(rank, size, device, gloo, restarted)
        if joins and (shared := rendezvous.shared_gpu(w)):
            exit_together(w, InputError(shared))
        yield w
    if joins:  # not after an error: it would wait for those that are gone
        dist.destroy_process_group()


def exit_together(w, stop):
    """Where all find the same: raise `stop` on rank 0, and on the others without words."""
    barrier(w)
    if w.is_main and w.size > 1:
        time.sleep(1)  # the others leave first: they would report a closed connection
    raise stop if w.is_main else type(stop)()


def barrier(w):
    """Wait until every process is here."""
    if w.size > 1:
        dist.barrier(group=w.gloo)


@contextlib.contextmanager
def main_first(w):
    """Rank 0 runs the block first, then the others: for files that one writes and all read."""
    if not w.is_main:
        barrier(w)
    yield
    if w.is_main:
        barrier(w)


def any_process(w, *flags):
    """For each flag: is it set on any process? A dead process shows here as an error."""
    if w.size == 1:
        return flags
    flags = torch.tensor([bool(flag) for flag in flags], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=w.gloo)
    return tuple(map(bool, flags.tolist()))


def from_main(w, value):
    """Rank 0's value of anything that can be pickled, on every process."""
    box = [value]
    if w.size > 1:
        dist.broadcast_object_list(box, 0, group=w.gloo)
    return box[0]


def same_on_all(w, facts):
    """Raise InputError where a process has other facts, {what: value}, than rank 0: which, what."""
    of_ranks = [(facts, None)] * w.size
    if w.size > 1:
        dist.all_gather_object(of_ranks, (facts, socket.gethostname()), group=w.gloo)
    for rank, (theirs, host) in enumerate(of_ranks[1:], start=1):
        differ = [
            f"{what}: {theirs.get(what)} there, {value} on rank 0"
            for what, value in of_ranks[0][0].items()
            if theirs.get(what) != value
        ]
        if differ:
            message = f"rank {rank} on {host} differs from rank 0 in {'; '.join(differ)}"
            exit_together(w, InputError(f"{message}: start all alike"))


def sum_over_ranks(w, tensor):
    """The element-wise sum of `tensor` over all processes, on the CPU."""
    if w.size > 1:
        tensor = tensor.to(w.device)
        dist.all_reduce(tensor)
    return tensor.cpu()


def copy_from_main(w, tensors):
    """Give every process rank 0's values of these tensors, in place."""
    if w.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
