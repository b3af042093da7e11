"""How the processes of one run find each other: own store, addresses, own GPU, connections."""

import contextlib
import datetime
import ipaddress
import json
import os
import socket
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

# torch's own; without it a group would have one limit, for connecting and for waiting.
from torch.distributed.distributed_c10d import _set_pg_timeout

from taxa.errors import InputError, Stop

# Processes wait this long for each other within a step, and for rank 0, which may
# tokenize millions of sequences. A process that dies is noticed at once, since its connections
# close; the limits are for one that hangs.
STEP_LIMIT = datetime.timedelta(minutes=10)
PATIENCE = datetime.timedelta(hours=12)
JOIN_LIMIT = datetime.timedelta(minutes=1)  # to connect, once all are known to be there

# Does gloo heed a limit that is set after connecting? It does in torch 2.13, and it does not in
# torch 2.8. Nobody has tried the versions between them.
LATER_LIMITS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

INTERFACES = (
    "set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME for GPUs, to the network interface that the "
    "machines reach each other by (ip addr lists them, eth0 say), or mend the machine's name in "
    "/etc/hosts"
)

# What torch says in an error when another process is gone.
LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "Timed out waiting",
    "Socket Timeout",
)


def join(rank, size, device):
    """Make the process groups. Returns (the gloo group, was there a start before this one?).

    Inside another world() there is a default group, and gloo's is made anew. Raises InputError and
    Stop where the processes cannot connect.
    """
    if dist.is_initialized():
        return dist.new_group(backend="gloo", timeout=PATIENCE), False
    store, restarted = own_store(rank, size)
    address = check_addresses(store, rank, size)
    return connect(rank, size, device, store, address), restarted


@contextlib.contextmanager
def one_line_if_lost(rank, size):
    """Raise Stop in the place of torch's error when a block loses its connection to a process."""
    try:
        yield
    except RuntimeError as error:
        if size == 1 or not any(sign in str(error) for sign in LOST):
            raise
        raise Stop(
            f"rank {rank} lost its connection to another process and stops too; the report of "
            "torchrun or srun names the one that ended first"
        ) from None


def own_store(rank, size):
    """(key-value store for this start of the processes alone, on rank 0: was there one before?)

    torchrun keeps one store over its restarts (--max-restarts). In it lie the addresses of the
    processes that are gone, to which gloo and NCCL would connect if the new process has not written
    its own yet: "Connection refused". The number of restarts does not tell the starts apart, since
    each agent has a count of its own. So rank 0 draws a name, which goes before every key; each of
    the others waits until rank 0 has read the name that it drew, which a dead rank 0 does not.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=STEP_LIMIT))
    mine = uuid.uuid4().hex
    if rank == 0:
        restarted = store.check(["start"])
        store.set("start", mine)
        for other in range(1, size):
            store.set(f"{mine}/seen/{other}", store.get(f"{mine}/{other}"))
        return dist.PrefixStore(mine, store), restarted

    deadline = time.monotonic() + STEP_LIMIT.total_seconds()
    while time.monotonic() < deadline:
        start = store.get("start").decode()  # of a dead rank 0, until the new one has written
        store.set(f"{start}/{rank}", mine)
        seen = f"{start}/seen/{rank}"
        if store.check([seen]) and store.get(seen).decode() == mine:
            return dist.PrefixStore(start, store), False
        time.sleep(0.05)
    raise RuntimeError("Timed out waiting for rank 0")


# ------------------------------------------------------------------ GPUs


def own_device(asked):
    """The torch.device of this process. asked: auto, cpu or cuda.

    Raises InputError for cuda without CUDA, and for a process without a GPU of its own.
    """
    has_cuda = torch.cuda.is_available()
    if asked == "cuda" and not has_cuda:
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if asked == "cuda" or (asked == "auto" and has_cuda):
        return own_gpu()
    return torch.device("cpu")


def own_gpu():
    """The GPU of this process: number LOCAL_RANK, or the only one that it sees.

    SLURM's --gpus-per-task=1 shows each process one GPU.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    device = torch.device("cuda", 0 if count == 1 else local)
    if device.index >= count:
        raise InputError(
            f"process {local} of this machine has no GPU of its own: it has {count}; start as many "
            "processes as GPUs, or use --device cpu"
        )
    torch.cuda.set_device(device)
    return device


def shared_gpu(w):
    """A message when two processes of a host compute on one physical GPU, else None.

    w: a World. Every process gets the same answer, by whatever number each knows its GPU.
    """
    if w.device.type != "cuda":
        return None
    mine = (host(), str(torch.cuda.get_device_properties(w.device).uuid))
    of_ranks = [None] * w.size
    dist.all_gather_object(of_ranks, mine, group=w.gloo)
    seen = {}
    for rank, gpu in enumerate(of_ranks):
        if gpu in seen:
            name = gpu[0].split()[0]
            return (
                f"ranks {seen[gpu]} and {rank} share one GPU, {gpu[1]} of {name}: start as many "
                "processes as GPUs, or use --device cpu"
            )
        seen[gpu] = rank
    return None


# ------------------------------------------------------------------ addresses


def host():
    """The machine's name, and what tells it from others of the same name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else uuid.getnode()}"


def own_address():
    """Where gloo lets the other processes find this one.

    That is GLOO_SOCKET_IFNAME, else the first address of the host's name that is the host's own,
    else loopback.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return os.environ["GLOO_SOCKET_IFNAME"]
    with contextlib.suppress(OSError):
        of_name = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in of_name:
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as here:
                here.bind(address)
                return address[0]
    return "127.0.0.1"


def check_addresses(store, rank, size):
    """Returns own_address().

    Raises InputError, on every process, when one of several hosts advertises its loopback address,
    as where /etc/hosts gives its name 127.0.1.1: the others would look for it on themselves, and
    wait.
    """
    mine = own_address()
    store.set(f"address/{rank}", json.dumps([host(), mine]))
    told = [json.loads(store.get(f"address/{other}")) for other in range(size)]
    if len({where for where, _ in told}) == 1:
        return mine
    for other, (where, address) in enumerate(told):
        if is_loopback(address):
            store.set(f"address/read/{rank}", "")
            if rank == 0:  # in whose process the store may be
                store.wait([f"address/read/{reader}" for reader in range(size)])
            raise InputError(
                f"rank {rank} advertises the address {mine}, and rank {other} on "
                f"{where.split()[0]} {address}, where no other machine finds it: {INTERFACES}"
            )
    return mine


def is_loopback(address):
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # the name of an interface
        return False


def connect(rank, size, device, store, address):
    """Make the default group (NCCL on CUDA, else gloo), and return a gloo group for long waits.

    Raises Stop, with the address that this process is known by, after JOIN_LIMIT.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    join_limit = JOIN_LIMIT if LATER_LIMITS else None  # None: as long as the group waits later
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            # NCCL connects at the first collective, so its limit is that of a step.
            timeout=STEP_LIMIT if backend == "nccl" else join_limit or STEP_LIMIT,
        )
        gloo = dist.new_group(backend="gloo", timeout=join_limit or PATIENCE)
    except RuntimeError as error:
        raise Stop(
            f"rank {rank}, known to the others as {address}, could not connect to them within "
            f"{JOIN_LIMIT.seconds} s ({str(error).splitlines()[0]}): if no process ended before "
            f"it, {INTERFACES}"
        ) from None
    _set_pg_timeout(STEP_LIMIT)
    _set_pg_timeout(PATIENCE, gloo)
    return gloo
