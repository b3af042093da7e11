"""study.py's queue: commands side by side until all have ended.

Each has GPUs of its own, or is one of several on the CPU.
"""

import collections
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from taxa.errors import InputError, Saved
from taxa.runtime.files import lock

LOCK = ".queue.lock"
LEFT_BEHIND = 300  # seconds that the commands of a killed queue get to save and leave
POLL = 0.1
STOPPED = Saved.status


class Job(NamedTuple):
    """A command.

    log: the file to which are appended a line "$ COMMAND", what the command prints, and, when it
    has ended, the line "exit status N".
    """

    name: str
    command: list
    log: Path


def gpus():
    """([index, ...], name of the first) of the GPUs that this process may use.

    It is ([], None) where nvidia-smi finds none. CUDA_VISIBLE_DEVICES, where it is set, says which
    GPUs these are.
    """
    try:
        query = ["nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return [], None
    lines = asked.stdout.splitlines() if asked.returncode == 0 else []
    found = [line.split(", ", 1) for line in lines]
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        visible = [each.strip() for each in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        visible = [each for each in visible if each]
        return visible, found[0][1] if found and visible else None
    return [index for index, _ in found], found[0][1] if found else None


def hold(folder):
    """Lock a folder against another queue; returns the open file.

    There are two locks on one file, and both end with the process. lockf's belongs to this process
    alone; flock's is shared by the commands that it starts. Raises InputError at once when another
    queue is at work there. Waits while commands of a queue that was killed save and leave. Where
    the file system has no locks, a warning is printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+", encoding="utf-8")
    advice = "start no second study.py there"
    try:
        if not lock(file, folder, advice=advice):
            return file
    except OSError:
        file.close()
        raise InputError(
            f"{folder}: another study.py is at work there: wait for it, or give another --out"
        ) from None
    deadline = time.monotonic() + LEFT_BEHIND
    while True:
        try:
            lock(file, folder, advice=advice, inherited=True)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise InputError(
                    f"{folder}: runs that a killed study.py left behind are still at work there: "
                    "wait for them, or end them"
                ) from None
            time.sleep(POLL)


def run_jobs(jobs, slots, signals, held, watch):
    """Run all jobs, one at a time on each slot; returns {name: exit status} of those that ran.

    The status is 75 for those that a signal to this process ended.

    slots: for each, the environment variables that its jobs get.
    signals: a Signals. After its first signal, SIGTERM is passed on to what runs, and nothing more
    is begun; a second Ctrl-C kills.
    held: the file of hold().
    watch(running names, statuses) is called several times a second.

    A job that fails does not stop the others. No job outlives this process (on Linux): when it
    ends, they get SIGTERM.
    """
    waiting = collections.deque(jobs)
    running = {}  # number of the slot -> (job, process)
    statuses = {}
    told = False  # the jobs that run to leave
    try:
        while running or (waiting and signals.received is None):
            for number, (job, process) in list(running.items()):
                status = process.poll()
                if status is not None:
                    del running[number]
                    statuses[job.name] = STOPPED if told and status else status
                    note(job.log, f"exit status {statuses[job.name]}\n")
            for number, slot in enumerate(slots):
                if number not in running and waiting and signals.received is None:
                    job = waiting.popleft()
                    try:
                        running[number] = job, start(job, slot, held)
                    except OSError as error:  # a disk so full that not even the log can be opened
                        statuses[job.name] = 2
                        what = error.filename or job.command[0]
                        print(f"{job.name}: {what}: {error.strerror}", file=sys.stderr, flush=True)
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
    """Start a job; returns the process.

    The job has a session of its own, so that Ctrl-C reaches it only through run_jobs().
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_the_queue():
        if libc:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    note(job.log, f"$ {shlex.join(job.command)}\n")
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | slot,
            start_new_session=True,
            pass_fds=[held.fileno()],
            preexec_fn=end_with_the_queue,  # noqa: PLW1509, this process starts no threads
        )


def note(path, text):
    """Append to a log.

    An error of the disk, which the run reports itself, does not stop the other runs.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr, flush=True)
