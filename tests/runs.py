"""Run a list of train.py and evaluate.py command lines in one process (or, under torchrun, in each of several).

  torchrun --nproc_per_node 2 tests/runs.py '[["train", "--model", ...], ["evaluate", "ckpt.pt"], ["dies", 5, "--model", ...]]'

["dies", N, ...] is a training run that ends in the middle of its N-th step, as if killed: nothing is saved or tidied up.
"""

import contextlib
import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
import train  # noqa: E402
from taxa.distributed import world  # noqa: E402


class Killed(BaseException):
    """Caught by nothing in the project."""


@contextlib.contextmanager
def in_step(n, act):
    """Within the block, call act() in the middle of the n-th optimizer step that train.py takes, between gradient and update."""
    any_process, calls = train.any_process, []

    def counts(*arguments):
        calls.append(1)
        if len(calls) == n:
            act()
        return any_process(*arguments)

    train.any_process = counts
    try:
        yield
    finally:
        train.any_process = any_process


def killed():
    raise Killed


def dies(n, arguments):
    """Train, and end in the middle of step n of this call."""
    with in_step(n, killed):
        try:
            train.main(arguments)
        except Killed:
            return gc.collect()  # frames of the exception hold the lock's file, which a process that is killed does not
    raise AssertionError(f"the run ended before step {n}")


if __name__ == "__main__":
    with world("cpu"):  # one process group for all of them
        for script, *arguments in json.loads(sys.argv[1]):
            if script == "dies":
                dies(arguments[0], arguments[1:])
            else:
                {"train": train, "evaluate": evaluate}[script].main(arguments)
