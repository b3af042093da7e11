"""Machines as they come.

One GPU is visible per process, a name means loopback, there are no locks, no shared memory, no
fcntl.
"""

import datetime
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, command, forked

import train
from taxa.data.batches import load_batches
from taxa.data.dataset import PreparedDataset
from taxa.errors import InputError
from taxa.runtime import files, rendezvous
from taxa.runtime.progress import progress

# A rank that prints what world() gives it, with stand-ins for torch's functions.
RANK = """
import sys, os, json, datetime, time
import torch
from taxa.runtime import cli, distributed, rendezvous
case = json.loads(sys.argv[2])
real = torch.distributed.init_process_group

def main():
    rank = int(os.environ["RANK"])
    if "uuids" in case:
        torch.cuda.is_available, torch.cuda.set_device = lambda: True, lambda device: None
        torch.cuda.device_count = lambda: case["visible"]
        properties = type("P", (), {"uuid": case["uuids"][rank]})
        torch.cuda.get_device_properties = lambda device: properties
        torch.distributed.init_process_group = lambda backend, **more: real("gloo", **more)
    if "names" in case:
        rendezvous.host = lambda: case["names"][rank]
        rendezvous.own_address = lambda: case["addresses"][rank]
    if case.get("absent") == rank:
        rendezvous.connect = lambda *_: (time.sleep(6), os._exit(0))
    if "seconds" in case:
        rendezvous.JOIN_LIMIT = datetime.timedelta(seconds=case["seconds"])
    with distributed.world("cuda" if "uuids" in case else "cpu") as w:
        if "wait" in case and rank == 1:
            time.sleep(case["wait"])
        distributed.barrier(w)
        print("on", w.device, flush=True)

cli.run(main)
"""


def two_ranks(**case):
    """What two ranks print, a line of ours each: where they compute, or why they end."""
    words = ["-c", RANK, json.dumps(case)]
    told = []
    for rank in forked(words, words, cwd=ROOT):
        lines = (rank.stdout + rank.stderr).splitlines()
        assert not any("Traceback" in line for line in lines), lines
        told.append("".join(line for line in lines if line.startswith(("-c", "on "))))
    return told


# ------------------------------------------------------------------ GPUs


@pytest.mark.parametrize(
    "visible, local, expected",
    [(1, 0, 0), (1, 1, 0), (1, 7, 0), (4, 0, 0), (4, 3, 3), (2, 2, None), (0, 0, None)],
)
def test_which_gpu_is_a_process_own(visible, local, expected, monkeypatch):
    """One that is visible is taken whatever the process's number: SLURM's --gpus-per-task=1."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    if expected is None:
        message = f"process {local} of this machine has no GPU of its own: it has {visible}"
        with pytest.raises(InputError, match=message):
            rendezvous.own_gpu()
        assert not chosen
    else:
        assert rendezvous.own_gpu() == torch.device("cuda", expected) == chosen[0]


def test_one_visible_gpu_each():
    assert two_ranks(visible=1, uuids=["GPU-a", "GPU-b"]) == ["on cuda:0", "on cuda:0"]
    assert two_ranks(visible=2, uuids=["GPU-a", "GPU-b"]) == ["on cuda:0", "on cuda:1"]


def test_two_processes_that_share_a_gpu_are_found():
    first, second = two_ranks(visible=1, uuids=["GPU-a", "GPU-a"])
    assert "error: ranks 0 and 1 share one GPU, GPU-a of " in first
    assert "as many processes as GPUs" in first and not second
    of_two = {"names": ["one 1", "two 2"], "addresses": ["10.0.0.1", "10.0.0.2"]}  # machines
    told = two_ranks(visible=1, uuids=["GPU-a", "GPU-a"], **of_two)
    assert told == ["on cuda:0", "on cuda:0"]


# ------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    "addresses",
    [
        ["10.0.0.1", "127.0.1.1"],
        ["127.0.1.1", "10.0.0.2"],
        ["::1", "10.0.0.2"],
        ["127.0.0.1", "127.0.0.1"],
    ],
)
def test_a_name_that_means_loopback_is_told_at_once_on_every_rank(addresses):
    at = next(i for i, address in enumerate(addresses) if address.startswith(("127", "::")))
    name = ["one", "two"][at]
    for rank, line in enumerate(two_ranks(names=["one 1", "two 2"], addresses=addresses)):
        assert f"rank {rank} advertises the address {addresses[rank]}, and rank {at}" in line
        assert f"rank {at} on {name} {addresses[at]}, where no other machine finds it" in line
        assert "GLOO_SOCKET_IFNAME" in line and "NCCL_SOCKET_IFNAME" in line


def test_loopback_is_no_matter_on_one_machine_nor_where_an_interface_is_named():
    on_one = two_ranks(names=["one 1", "one 1"], addresses=["127.0.1.1", "127.0.1.1"])
    named = two_ranks(names=["one 1", "two 2"], addresses=["10.0.0.1", "eth0"])
    assert on_one == named == ["on cpu", "on cpu"]


def test_which_address_is_advertised(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    of_name = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
        for address in ("203.0.113.9", "127.0.1.1", "127.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: of_name)
    # the first is of another machine: nothing here can listen at it
    assert rendezvous.own_address() == "127.0.1.1"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: of_name[:1])
    assert rendezvous.own_address() == "127.0.0.1"

    def unknown(*_, **__):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert rendezvous.own_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert rendezvous.own_address() == "eth7"


@pytest.mark.skipif(
    not rendezvous.LATER_LIMITS,
    reason="gloo of this torch has one limit, for connecting and for waiting",
)
def test_a_process_that_cannot_connect_says_so_after_the_limit():
    """The other one is there, but never connects."""
    here = {"names": ["one", "one"], "addresses": ["10.0.0.1", "10.0.0.2"]}
    line, _ = two_ranks(absent=1, seconds=2, **here)
    assert "rank 0, known to the others as 10.0.0.1, could not connect to them within 2 s" in line
    assert "GLOO_SOCKET_IFNAME" in line


def test_the_limit_for_joining_is_none_for_waiting():
    """Once joined, rank 0 may work for long while the others wait."""
    assert rendezvous.JOIN_LIMIT <= datetime.timedelta(minutes=1)
    assert two_ranks(seconds=2, wait=5) == ["on cpu", "on cpu"]


# ------------------------------------------------------------------ locks


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_folder_without_locks_is_written_with_a_warning(number, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.locked(tmp_path):
        (tmp_path / "file").write_text("a")
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert f"cannot be locked ({os.strerror(number)})" in line
    number = errno.EIO
    with pytest.raises(OSError), files.locked(tmp_path):
        pass


def test_a_python_without_fcntl_names_the_platforms():
    code = "import sys; sys.modules['fcntl'] = None; sys.argv = ['train.py', '--help']"
    words = [sys.executable, "-c", f"{code}; import train"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and not done.stdout
    line, = done.stderr.splitlines()
    assert "runs on Linux" in line and "Windows" in line
    readme = (ROOT / "README.md").read_text()
    assert "Linux" in readme and "Windows" in readme


def test_no_bar_is_made_where_nobody_watches(capsys):
    """A signal that falls into tqdm's constructor prints a traceback of its finalizer."""
    items = [1, 2]
    assert progress(items, "x") is items
    with progress(None, "x", 3) as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------ shared memory


class Broken(torch.utils.data.Dataset):
    """A split that its worker cannot read."""

    def __init__(self, message):
        self.message = message

    def __getitem__(self, rows):
        raise RuntimeError(self.message)


@pytest.mark.parametrize(
    "message",
    [
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that",
    ],
)
def test_shared_memory_that_is_too_small_is_one_line(message):
    told = r"^--workers 2: /dev/shm, of [0-9,.]+ MiB, is too small.*--workers 0"
    with pytest.raises(InputError, match=told):
        list(load_batches(Broken(message), [[0]], 2, torch.device("cpu")))


class Parents(torch.utils.data.Dataset):
    """Batches that hold the id of the process which started the one that made them."""

    def __getitem__(self, rows):
        return {"parent": torch.tensor(os.getppid())}


def test_a_worker_is_not_forked_from_this_process_whose_threads_may_hold_locks():
    batches = load_batches(Parents(), [[0], [1]], 2, torch.device("cpu"))
    parents = {int(batch["parent"]) for batch in batches}
    assert len(parents) == 1 and os.getpid() not in parents


def test_another_error_of_a_worker_stays_what_it_is():
    with pytest.raises(RuntimeError, match="of another kind"):
        list(load_batches(Broken("of another kind"), [[0]], 1, torch.device("cpu")))


def test_a_shared_memory_that_fills_ends_the_run(demo, weights, tmp_path):
    """For true, on a /dev/shm of 64 kB in a namespace of its own; a batch has 128 kB."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    train.main(command("tiny-nt", "ia3", demo, weights, tmp_path / "run", "--max-steps", "1"))
    flags = ["--workers", "2", "--batch-size", "32"]
    ckpt = str(tmp_path / "run" / "ckpt.pt")
    runs = {
        "train.py": command("tiny-nt", "ia3", demo, weights, tmp_path / "other", *flags),
        "evaluate.py": [ckpt, *flags, "--out", str(tmp_path / "out")],
    }
    in_small = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    for script, arguments in runs.items():
        words = ["unshare", "-m", "sh", "-c", in_small, "sh", sys.executable, ROOT / script]
        done = subprocess.run(
            [*words, *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        # torch's own line before it may end in a NUL
        line, = [line for line in done.stderr.splitlines() if f"{script}: error: " in line]
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "--workers 2: /dev/shm, of 0.1 MiB, is too small" in line


def test_batches_of_workers_are_those_of_the_process_itself(short):
    split = PreparedDataset(short).split("train", "nt")
    rows = [[0, 5, 2], [7], [1, 3]]
    by_none = load_batches(split, rows, 0, torch.device("cpu"))
    by_two = load_batches(split, rows, 2, torch.device("cpu"))
    for one, other in zip(by_none, by_two, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
