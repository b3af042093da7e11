"""One process or many: torchrun's environment, and the few collectives that the loop needs. Gloo on CPU, NCCL on GPU."""

import contextlib
import datetime
import os
from typing import NamedTuple

import torch
import torch.distributed as dist

from taxa.cli import InputError


class World(NamedTuple):
    """This process among all: rank of size, on device."""

    rank: int
    size: int
    device: torch.device

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
    if joins:
        patience = datetime.timedelta(hours=12)  # rank 0 may tokenize millions of sequences while the others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield World(rank, size, device)
    finally:
        if joins:
            dist.destroy_process_group()


def barrier(w):
    """Wait until every process is here."""
    if w.size > 1:
        dist.barrier()


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
