"""Run a list of train.py and evaluate.py command lines in one process, or, under torchrun, in each
of several.

  torchrun --nproc_per_node 2 tests/runs.py '[["train", "--model", ...], ["dies", 5, ...]]'

["dies", N, ...] is a training run that ends in the middle of its N-th step, as if it were killed:
nothing is saved or tidied up.

  python tests/runs.py '{"2": [["train", ...]], "3": [["evaluate", ...]]}'

runs one list by two processes, then another by three. The processes are forked from this one, so
that what they import is imported once.
"""

import contextlib
import json
import os
import random
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import evaluate
import pretrain
import train
from taxa.runtime import cli
from taxa.runtime.distributed import world
from taxa.training import checkpoint


class Killed(BaseException):
    """Caught by nothing in the project."""


@contextlib.contextmanager
def in_step(n, act):
    """Within the block, call act() in the middle of the n-th optimizer step, between gradient and
    update.
    """
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def counts(*arguments):
        calls.append(1)
        if len(calls) == n:
            act()
        return clip(*arguments)

    torch.nn.utils.clip_grad_norm_ = counts
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = clip


def killed():
    raise Killed


def dies(n, arguments, script=train):
    """Train, and end in the middle of step n of this call."""
    with in_step(n, killed):
        try:
            script.main(arguments)
        except Killed:
            return
    raise AssertionError(f"the run ended before step {n}")


def free_port():
    """A port that nobody listens on.

    It is below those that the system gives to connections, so that none takes it in the meantime.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("", port))
            return port


def ranks(size, main, output=None):
    """Fork `size` ranks that call main() as a script does, as srun starts them.

    output: an open file for what they print. Returns their process ids. To be called only from a
    process that has not run a backward pass: autograd's threads do not survive a fork.
    """
    port = str(free_port())
    ids = []
    for rank in range(size):
        ids.append(os.fork())
        if ids[-1] == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            if output:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
            status = 1
            try:
                cli.run(main)
                status = 0
            except SystemExit as left:
                status = left.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
    return ids


def same(a, b, path=""):
    """Assert that two nested values are equal, tensors bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def log_of(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key != "sequences_per_s"} for line in lines
    ]


def assert_same_end(one, other):
    """Assert that two run folders hold the same weights, optimizer, best epoch, log and metrics."""

    def last(folder):
        state = checkpoint.read(folder / "last.pt", checkpoint.RESUME_STATE)
        timing = ("args", "seconds", "logs")
        return {key: value for key, value in state.items() if key not in timing}

    same(last(one), last(other))
    same(checkpoint.read(one / "ckpt.pt"), checkpoint.read(other / "ckpt.pt"))
    assert (one / "metrics.json").read_bytes() == (other / "metrics.json").read_bytes()
    assert log_of(one) == log_of(other)


SCRIPTS = {"train": train, "evaluate": evaluate, "pretrain": pretrain}


def run_all(runs):
    with world("cpu"):  # one process group for all of them
        for script, *arguments in runs:
            if script == "dies":
                dies(arguments[0], arguments[1:])
            else:
                SCRIPTS[script].main(arguments)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if isinstance(given, list):
        run_all(given)
    else:
        for size, runs in given.items():
            for rank in ranks(int(size), lambda runs=runs: run_all(runs)):
                if os.waitpid(rank, 0)[1] != 0:
                    sys.exit(f"one of {size} processes failed")
