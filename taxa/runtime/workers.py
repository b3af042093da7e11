"""Several processes for one list of jobs.

The results come in the order of the jobs, so the number of processes changes nothing in the output.
"""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading

from taxa.errors import InputError


def available_cores():
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def in_order(workers):
    """Yield a `map(function, jobs)` on `workers` processes.

    At most three jobs for each process are in work at a time, so memory does not grow with the
    number of jobs. One worker is this process itself. An exception of a job is raised here, the
    earliest job's first. Raises InputError when a process was killed from outside.
    """
    if workers == 1:
        yield map
        return
    # Spawned, not forked: a fork copies the locks of this process's other threads (NumPy's,
    # torch's, a progress bar's) in the state that they are in, and nobody releases the copies.
    # A spawned worker imports the script anew, so the scripts that come here import little,
    # and no torch.
    spawn = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(workers, spawn, _start)

    def ordered_map(function, jobs):
        running = collections.deque()
        try:
            for job in jobs:
                running.append(executor.submit(function, job))
                if len(running) >= 3 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                "a worker process was killed (out of memory?): --workers 1 needs the least"
            ) from None

    try:
        yield ordered_map
    finally:
        executor.shutdown(cancel_futures=True)


def _start():
    """In each worker: leave Ctrl-C to the parent, use one thread, end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()


def end_with_parent():
    """In a process that multiprocessing started: end when its parent ends.

    A parent that is ended by kill -9 has no time to tell its children.
    """

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
