"""Several processes for one list of jobs, results in the order of the jobs: how many processes there are never shows in what is written."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading

from taxa.errors import InputError


def available_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def in_order(workers):
    """Yield a `map(function, jobs)` on `workers` processes, three jobs for each at a time: memory does not grow with their number.

    One worker is this process itself. An exception of a job is raised here, the earliest job's first. Raises InputError when a process
    was killed from outside.
    """
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    executor = concurrent.futures.ProcessPoolExecutor(workers, context, _start)

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
            raise InputError("a worker process was killed (out of memory?): --workers 1 needs the least") from None

    try:
        yield ordered_map
    finally:
        executor.shutdown(cancel_futures=True)


def _start():
    """In each worker: Ctrl-C is the parent's business; one thread; no life after the parent's, which kill -9 gives no time to say so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
