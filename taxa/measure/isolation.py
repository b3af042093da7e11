"""Work that may run out of memory, kept apart.

It runs in a process of its own under a limit that Linux enforces, or on CUDA in an emptied cache.
"""

import gc
import json
import multiprocessing
import platform
import resource
import signal
import traceback

import torch

from taxa.errors import InputError
from taxa.runtime.workers import end_with_parent

GiB = 2**30


def resident():
    """What Linux says of this process's memory, in bytes.

    VmData may be written, VmHWM is the most ever in RAM, RssFile is of files.
    """
    with open("/proc/self/status", encoding="ascii") as file:
        lines = [line for line in file if line.endswith("kB\n")]
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}


def peak_since(before, device):
    """The most bytes that were taken since `before`, less the code that was paged in.

    before: a resident(); on CUDA it is since on_cuda() began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    after = resident()
    return after["VmHWM"] - before["VmHWM"] - (after["RssFile"] - before["RssFile"])


def is_out_of_memory(error):
    """Is this torch's way, or Python's, to say that memory ran out?

    Any other error is not ours to catch.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    told = (
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "std::bad_alloc",
    )
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)


def on_cuda(work, device):
    """work() in an emptied cache. Returns its result, or None when memory ran out."""
    result = None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        result = work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return result


def in_child(work, limit):
    """work() in a process of its own that may allocate `limit` bytes more.

    work: something that can be pickled. Returns its result, a plain dict, or None when memory ran
    out. Any other error of the child is raised here, with the child's traceback. The child never
    outlives this call. It is not forked from this process, whose threads would leave it locks that
    nobody opens. It is forked from a server that has imported what a step needs and run nothing,
    so a child starts in no time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["taxa.measure.step"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, work, limit))
    child.start()
    sender.close()
    try:
        answer = json.loads(receiver.recv_bytes())
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGKILL:
            raise InputError(
                "the system ended the probe's process, most likely for want of memory: "
                "give a lower --memory-limit"
            ) from None
        raise RuntimeError(
            f"the probe's process ended with status {child.exitcode} and no answer"
        ) from None
    finally:
        child.kill()
        child.join()
    if "error" in answer:
        if answer["input"]:
            raise InputError(answer["error"])
        raise RuntimeError(f"in the probe's process:\n{answer['error']}")
    return answer["result"]


def _child(sender, work, limit):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and ends us
    end_with_parent()
    try:
        most = resident()["VmData"] + limit
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
        answer = {"result": work()}
    except InputError as error:
        answer = {"error": str(error), "input": True}
    except BaseException as error:  # noqa: BLE001 (reported whole to the parent, which raises it)
        answer = {"error": traceback.format_exc(), "input": False}
        if is_out_of_memory(error):
            answer = {"result": None}
    sender.send_bytes(json.dumps(answer).encode())


def free_memory():
    """Bytes that Linux says new processes may take without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def limit_memory(limit, device):
    """Enforce a limit in bytes on CUDA, check it on the CPU; None: its default. Returns bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if limit and limit > total:
            raise InputError(
                f"--memory-limit {limit / GiB:.1f} GiB is more than the card has, "
                f"{total / GiB:.1f} GiB"
            )
        torch.cuda.set_per_process_memory_fraction((limit or total) / total, device)
        return limit or total
    if platform.system() != "Linux":
        raise InputError(
            "on the CPU the probe needs Linux, which enforces its memory limit; "
            "elsewhere use --device cuda"
        )
    free = free_memory()
    if limit and limit > free:
        raise InputError(
            f"--memory-limit {limit / GiB:.1f} GiB is more than is free here, {free / GiB:.1f} GiB"
        )
    return limit or int(0.8 * free)
