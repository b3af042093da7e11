"""Commands side by side, each on GPUs of its own or as one of several on the CPU, until all have ended: study.py's queue."""

import collections
import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from taxa.errors import InputError, Saved

LOCK = ".queue.lock"
LEFT_BEHIND = 300  # seconds that the commands of a killed queue get to save and leave
POLL = 0.1
STOPPED = Saved.status


class Job(NamedTuple):
    """A command. log: the file to which a line "$ COMMAND" is appended, what it prints, and when it has ended the line "exit status N"."""

    name: str
    command: list
    log: Path


def gpus():
    """([index, ...], name of the first) of the GPUs that this process may use; ([], None) where nvidia-smi finds none.

    CUDA_VISIBLE_DEVICES, where it is set, says which.
    """
    try:
        query = ["nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return [], None
    found = [line.split(", ", 1) for line in asked.stdout.splitlines() if asked.returncode == 0]
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        visible = [each.strip() for each in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if each.strip()]
        return visible, found[0][1] if found and visible else None
    return [index for index, _ in found], found[0][1] if found else None


def hold(folder):
    """Lock a folder against another queue; returns the open file, whose lock the commands of this one share.

    Two locks on one file, both of which end with the process: lockf's is this process's alone, flock's is shared by what it starts. Raises
    InputError at once when another queue is at work there; waits while commands of a queue that was killed save and leave.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(f"{folder}: another study.py is at work there: wait for it, or give another --out") from None
    deadline = time.monotonic() + LEFT_BEHIND
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise InputError(f"{folder}: runs that a killed study.py left behind are still at work there: wait for them, or end "
                                 "them") from None
            time.sleep(POLL)


def run_jobs(jobs, slots, signals, held, watch):
    """Run all jobs, one at a time on each slot; returns {name: exit status} of those that ran, 75 of those that a signal to us ended.

    slots: for each, the environment variables that its jobs get; signals: a Signals, whose first signal passes SIGTERM on to what runs and
    begins nothing more, and whose second Ctrl-C kills; held: the file of hold(); watch(running names, statuses) is called some times a
    second. A job that fails does not stop the others. None of them outlives this process (Linux): they are told by SIGTERM.
    """
    waiting, running, statuses, told = collections.deque(jobs), {}, {}, False
    try:
        while running or (waiting and signals.received is None):
            for number, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[number]
                    statuses[job.name] = STOPPED if told and process.returncode else process.returncode
                    note(job.log, f"exit status {statuses[job.name]}\n")
            for number, slot in enumerate(slots):
                if number not in running and waiting and signals.received is None:
                    job = waiting.popleft()
                    try:
                        running[number] = job, start(job, slot, held)
                    except OSError as error:  # a disk so full that not even the log can be opened
                        statuses[job.name] = 2
                        print(f"{job.name}: {error.filename or job.command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            if signals.received is not None and not told:
                told = True
                for _, process in running.values():
                    process.terminate()
            watch([job.name for job, _ in running.values()], statuses)
            time.sleep(POLL if running else 0)
    except BaseException:  # a second Ctrl-C, or an error of our own
        for _, process in running.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise
    return statuses


def start(job, slot, held):
    """Start a job in a session of its own, so that Ctrl-C reaches it through run_jobs() alone; returns the process."""
    parent, libc = os.getpid(), ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_the_queue():
        if libc:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    note(job.log, f"$ {shlex.join(job.command)}\n")
    with open(job.log, "ab") as log:
        return subprocess.Popen(job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | slot,
                                start_new_session=True, pass_fds=[held.fileno()], preexec_fn=end_with_the_queue)


def note(path, text):
    """Append to a log; a full disk, which the run has said itself, is no reason to stop the others."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr, flush=True)
