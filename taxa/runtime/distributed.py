"""One process or many: torchrun's environment, and the few collectives that the loop needs. Gloo on CPU, NCCL on GPU."""

import contextlib
import datetime
import ipaddress
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    _set_pg_timeout,  # torch's own, without which a group joins as slowly as it waits
)

from taxa.errors import InputError, Stop

# Peers wait this long for each other within a step, and for rank 0, which may tokenize millions of sequences. A process that dies is
# noticed at once, since its connections close; the limits are for one that hangs.
STEP_LIMIT, PATIENCE = datetime.timedelta(minutes=10), datetime.timedelta(hours=12)
JOIN_LIMIT = datetime.timedelta(minutes=1)  # to connect, once all are known to be there
# Whether gloo heeds a limit that is set after connecting: not in torch 2.6 and 2.8, but in 2.13; between them nothing was tried.
LATER_LIMITS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
INTERFACES = ("set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME for GPUs, to the network interface that the machines reach each other by "
              "(ip addr lists them, eth0 say), or mend the machine's name in /etc/hosts")
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

    Raises InputError for --device cuda without CUDA, for two processes that share a GPU, and, like Stop, for processes that cannot connect.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = _own_gpu() if device == "cuda" else torch.device(device)
    joins, again, patient = size > 1 and not dist.is_initialized(), False, None
    try:
        if joins:
            store, again = _own_store(rank, size)
            address = _check_addresses(store, rank, size)
        if size > 1:
            patient = _connect(rank, size, device, store, address) if joins else dist.new_group(backend="gloo", timeout=PATIENCE)
        w = World(rank, size, device, patient, again)
        if joins and device.type == "cuda":
            _check_gpus(w)
        yield w
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


def _own_gpu():
    """The GPU of this process: number LOCAL_RANK, or the only one that it sees, as SLURM's --gpus-per-task=1 has it."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    device = torch.device("cuda", 0 if count == 1 else local)
    if device.index >= count:
        raise InputError(f"process {local} of this machine has no GPU of its own: it has {count}; start as many processes as GPUs, or use "
                         "--device cpu")
    torch.cuda.set_device(device)
    return device


def _host():
    """What tells this machine from others, which may have the same name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else uuid.getnode()}"


def _check_gpus(w):
    """Raise InputError, on all processes, when two of a host compute on one physical GPU, by whatever number each knows it."""
    of_ranks, seen = [None] * w.size, {}
    dist.all_gather_object(of_ranks, (_host(), str(torch.cuda.get_device_properties(w.device).uuid)), group=w.patient)
    for rank, gpu in enumerate(of_ranks):
        if gpu in seen:
            exit_together(w, InputError(f"ranks {seen[gpu]} and {rank} share one GPU, {gpu[1]} of {gpu[0].split()[0]}: start "
                                        "as many processes as GPUs, or use --device cpu"))
        seen[gpu] = rank


def _address():
    """Where gloo lets the other processes find this one: at GLOO_SOCKET_IFNAME, else at the first address of the host's name that is its
    own, else at loopback."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return os.environ["GLOO_SOCKET_IFNAME"]
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as here:
                here.bind(address)
                return address[0]
    return "127.0.0.1"


def _check_addresses(store, rank, size):
    """Returns _address(). Raises InputError, on every process, when one of several hosts advertises its loopback address, as where
    /etc/hosts gives its name 127.0.1.1: the others would look for it on themselves, and wait."""
    mine = _address()
    store.set(f"address/{rank}", json.dumps([_host(), mine]))
    told = [json.loads(store.get(f"address/{other}")) for other in range(size)]
    if len({host for host, _ in told}) > 1:
        for other, (host, address) in enumerate(told):
            if _is_loopback(address):
                store.set(f"address/read/{rank}", "")
                if rank == 0:  # in whose process the store may be
                    store.wait([f"address/read/{reader}" for reader in range(size)])
                raise InputError(f"rank {rank} advertises the address {mine}, and rank {other} on {host.split()[0]} {address}, where no "
                                 f"other machine finds it: {INTERFACES}")
    return mine


def _is_loopback(address):
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # the name of an interface
        return False


def _connect(rank, size, device, store, address):
    """Make the default group and return the patient one. Raises Stop, with the address that this process is known by, after a minute."""
    limit = JOIN_LIMIT if LATER_LIMITS and device.type != "cuda" else STEP_LIMIT  # NCCL connects at the first collective
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=limit)
        patient = dist.new_group(backend="gloo", timeout=JOIN_LIMIT if LATER_LIMITS else PATIENCE)
    except RuntimeError as error:
        raise Stop(f"rank {rank}, known to the others as {address}, could not connect to them within {JOIN_LIMIT.seconds} s "
                   f"({str(error).splitlines()[0]}): if no process ended before it, {INTERFACES}") from None
    _set_pg_timeout(STEP_LIMIT)
    _set_pg_timeout(PATIENCE, patient)
    return patient


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
