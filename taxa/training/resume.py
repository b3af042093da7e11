"""Going on after a stop: last.pt and the one before it, what may differ between then and now, and the lock of a run folder.

No random state is stored, because none is carried from step to step: the order of an epoch follows from (seed, epoch), and dropout is
seeded anew at every step from (seed, step, rank). So weights, optimizer and a few numbers are all that a run needs to go on bit for bit.
"""

import fcntl
import json
import os
import socket
import sys

import numpy as np

from taxa.data.dataset import micro_batches
from taxa.errors import InputError
from taxa.runtime.files import to_disk
from taxa.training import checkpoint

LAST, PREVIOUS, LOCK = "last.pt", "last.prev.pt", ".lock"
LOGS = ("log.jsonl", "bad_steps.jsonl")  # appended to, so cut back on resuming to what they were when last.pt was written
# Flags that do not change what is computed, or whose effect is compared by digest or by product.
IGNORES = ("resume", "overwrite", "out", "workers", "log_every", "save_every", "max_bad_steps", "device", "data", "weights",
           "batch_size", "accumulate", "epochs")


def restarted():
    """Has torchrun (--max-restarts) or SLURM (requeue) started this command before? Then it resumes unasked."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def begin(out, resume, overwrite, again=False):
    """Look at a run folder before anything is written: True to resume from its last.pt, False to begin anew. For rank 0.

    again: the command was started before, which counts as restarted() does.

    Raises InputError for a folder that holds something else, or a run that is neither to be resumed nor to be replaced.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give another --out")
    empty = not out.is_dir() or all(path.name == LOCK for path in out.iterdir())
    is_run, again = (out / "args.json").is_file() or empty and (out / LOCK).exists(), again or restarted()
    if (resume or again) and ((out / LAST).exists() or (out / PREVIOUS).exists()):
        return True
    if resume and not is_run and not empty:
        raise InputError(f"{out / LAST}: no such file; nothing to resume: leave out --resume")
    if empty or is_run and (resume or again):  # a run that was stopped before its first save begins anew
        return False
    if overwrite and not is_run:
        raise InputError(f"{out} is not a run folder, so --overwrite does not replace it: give another --out")
    if not overwrite:
        raise InputError(f"{out} exists: give another --out, --overwrite to replace it, or --resume to go on")
    return False


def lock(out):
    """Hold a run folder until this process ends, however it ends; returns the open file. Raises InputError when another one holds it.

    A record lock of the operating system (fcntl): it goes with the process, is not inherited by loader workers, and works over NFS.
    Also removes what a killed process left half written.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{out} is in use by {holder}: wait for it, or give another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    for left in out.glob(".*.tmp"):
        left.unlink()
    return file


def save_last(out, content):
    """Write last.pt; the one before it stays as last.prev.pt."""
    written = out / f".next.{LAST}.tmp"
    checkpoint.save(written, {**content, "logs": log_sizes(out)}, checkpoint.RESUME_STATE)
    if (out / LAST).exists():
        os.replace(out / LAST, out / PREVIOUS)
    os.replace(written, out / LAST)
    to_disk(out)


def log_sizes(out):
    """{log: bytes}, for cut_logs()."""
    return {name: _size(out / name) for name in LOGS}


def _size(path):
    return path.stat().st_size if path.exists() else 0


def read_last(out):
    """The content of last.pt, or, with a warning on stderr, of last.prev.pt, which then takes its place, when it is damaged or gone."""
    try:
        return checkpoint.read(out / LAST, checkpoint.RESUME_STATE)
    except InputError as error:
        if not (out / PREVIOUS).exists():
            raise
        content = checkpoint.read(out / PREVIOUS, checkpoint.RESUME_STATE)
        os.replace(out / PREVIOUS, out / LAST)  # else the next save would move the damaged one over the good one
        print(f"warning: {error}; going on from {PREVIOUS}, step {content['step']}", file=sys.stderr, flush=True)
        return content


def check_same(path, then, now):
    """Raise InputError, with the difference, unless a run may go on from `then` (the content of last.pt) as `now` (the same keys) asks.

    Other process counts, batch sizes and accumulations are the same run while their product is: the steps hold the same sequences. More
    epochs are allowed too, and the cosine is then that of the new number from this step on.
    """
    differ = [f"--{name.replace('_', '-')}: {value} then, {now['args'].get(name)} now" for name, value in then["args"].items()
              if name not in IGNORES and value != now["args"].get(name)]
    differ += [f"{what}: {then[what]} then, {now[what]} now" for what in ("sequences per step", "dataset", "base weights")
               if then[what] != now[what]]
    if now["args"]["epochs"] < then["args"]["epochs"]:
        differ.append(f"--epochs: {then['args']['epochs']} then, {now['args']['epochs']} now (more are allowed, fewer are not)")
    if differ:
        raise InputError(f"{path} is of a run with other settings: {'; '.join(differ)}")


def cut_logs(out, then):
    """Take from the logs what was written after last.pt: those steps are about to be taken again."""
    for name, size in then["logs"].items():
        if _size(out / name) > size:
            os.truncate(out / name, size)


def dropout_seed(seed, step, rank):
    """The seed of everything drawn in optimizer step `step` by process `rank`."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def note_bad_step(out, data, split, seed, epoch, step, position, per_step, loss, norm):
    """Append to bad_steps.jsonl a step that was not applied, and where its sequences came from, over all processes.

    epoch: from 0; step: from 1; position: of the step in its epoch, from 0; per_step: sequences in a step.
    """
    rows = micro_batches(len(split), seed, epoch, per_step, 1, 0, 1)[position][0][0][0]
    records = split.records(rows)
    files = [source["file"] for source in data.manifest["sources"]]
    entry = {"epoch": epoch + 1, "step": step, "loss": str(loss), "grad_norm": str(norm),
             "records": [{"row": int(row), "file": files[record["source"]], "record": int(record["record"]) + 1,  # from 1, as in messages
                          "taxid": int(record["taxid"])} for row, record in zip(rows, records)]}
    with open(out / "bad_steps.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
