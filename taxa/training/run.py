"""The bookkeeping of a training run: what stands beside the mechanism in train.py and pretrain.py.

A Run owns the run folder, its lock, the logs, last.pt, the signals, and the count of steps that are not finite. It owns no model and calls
nothing back: a script tells it what happened and asks it what is due. In the order of a run:

    with Run(w, args, out) as run:      looks at the folder, and writes nothing yet
        last = run.begin(facts)         all processes agree; the folder is locked; last.pt, when the run is resumed
        run.announce(...)               args.json, environment.json, the first lines on the screen
        run.signals.defer()
        each step: run.meet()           one process got a signal, a save is due, or a process died: now all know
            run.add(...) or run.bad_step(...), run.log_step(...), run.save_due(...), run.save(...), run.leave_if_asked(...)
        each epoch: run.log_validation(...)

No random state is stored, because none is carried from step to step: the order of an epoch follows from (seed, epoch), and dropout is
seeded anew at every step from (seed, step, rank). So weights, optimizer and a few numbers are all that a run needs to go on bit for bit.
"""

import fcntl
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from taxa import __version__
from taxa.errors import InputError, Saved
from taxa.runtime.cli import interval_of
from taxa.runtime.distributed import any_process, barrier, exit_together, from_main, same_on_all
from taxa.runtime.files import NO_LOCKS, read_json, to_disk, write_json
from taxa.runtime.progress import print_line
from taxa.runtime.signals import Signals
from taxa.training import checkpoint
from taxa.training.flags import MAY_CHANGE, PATHS
from taxa.training.optim import warmup_steps_of

LAST, PREVIOUS, LOCK = "last.pt", "last.prev.pt", ".lock"
LOGS = ("log.jsonl", "bad_steps.jsonl")  # appended to, so cut back on resuming to what they were when last.pt was written
RUN_FILES = ("args.json", "environment.json", *LOGS, LAST, PREVIOUS, "ckpt.pt", "config.json", "model.safetensors", "metrics*.json",
             "per_class*.csv", "confusion_*.csv", "temperature.json")  # what --overwrite removes
COUNTS = ("bad_steps", "loss_sum", "seen", "seconds")  # what a Run counts and last.pt holds


class Run:
    """One run in one folder. A context manager: afterwards signals act as before it, and the folder is free.

    bad_steps: how many steps were not applied. loss_sum, seen, seconds: of the next log line, the summed loss of the sequences, their
    number, and the time they took. last: the content of last.pt of a resumed run, else None.
    """

    def __init__(self, w, args, out):
        """w: World; args: parsed flags. Raises InputError for a folder that is neither to be resumed, to be replaced, nor new."""
        self.w, self.args, self.out = w, args, Path(out)
        self.signals, self.stopping, self.last = Signals(), False, None
        self.bad_steps, self.loss_sum, self.seen, self.seconds = 0, 0.0, 0, 0.0
        self._save_steps, self._save_seconds = interval_of(args.save_every)
        self._saved_at, self._clock_due, self._lock = time.perf_counter(), False, None
        if w.is_main:  # only rank 0 looks into the run folder and writes there
            self._resumes()

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, *exception):
        self.signals.__exit__(*exception)
        if self._lock:
            self._lock.close()

    def begin(self, facts):
        """Lock the folder. Returns, on every process, the content of the last.pt to go on from, or None for a run from the beginning.

        facts: {what: value} beside the flags that must be the same on all processes and when resumed. Nothing else in the folder is
        changed. Raises InputError for processes that differ, a folder that is in use, and a last.pt of another run.
        """
        flags = {name: value for name, value in vars(self.args).items() if name not in PATHS}
        same_on_all(self.w, {**flags, **facts, "taxa": __version__, "torch": torch.__version__})
        self._facts = {"args": vars(self.args), **facts}
        if self.w.is_main:
            self._lock = lock(self.out)
            if self._resumes():  # asked again: another run may have come in between
                self.last = read_last(self.out)
                check_same(self.out / LAST, self.last, self._facts)
                if self.last.get("best", math.inf) < math.inf:  # the best epoch was written
                    if not (self.out / "ckpt.pt").exists():
                        raise InputError(f"{self.out / 'ckpt.pt'} is gone, so the run cannot be resumed: --overwrite starts it anew")
                    checkpoint.check_seal(self.out / "ckpt.pt")
            elif not self.args.overwrite:
                self._check_unsaved()
        self.last = from_main(self.w, self.last)
        if self.last:
            self.bad_steps, self.loss_sum, self.seen, self.seconds = (self.last.get(name, 0) for name in COUNTS)
        return self.last

    def announce(self, lines, args, environment):
        """Make the folder this run's, and print the lines. args, environment: {what: value} to add to args.json and environment.json.

        A resumed run's logs are cut back to last.pt: the steps after it are taken again. Else what an earlier run left is removed.
        """
        if self.w.is_main:
            if self.last:
                cut_logs(self.out, self.last)
            else:
                for path in [path for pattern in RUN_FILES for path in self.out.glob(pattern)]:
                    path.unlink()
            write_json(self.out / "args.json", vars(self.args) | args)
            write_json(self.out / "environment.json", environment_of(self.w) | environment)
            if self.last:
                longer = self.args.epochs != self.last["args"]["epochs"]
                lines = [*lines, f"resumed after step {self.last['step']:,}, epoch {self.last.get('epoch', 0) + 1}"
                         + f"; the cosine is now that of {self.args.epochs} epochs" * longer]
            elif self.args.resume or restarted(self.w):
                lines = [*lines, f"nothing was saved in {self.out} yet: starting from the beginning"]
            print(*lines, sep="\n", flush=True)
        barrier(self.w)
        self._saved_at = self._since = time.perf_counter()

    def meet(self):
        """Wait for the other processes, and agree with them whether one got a signal and whether a save is due by the clock. A process
        that died shows here as an error, whatever the device."""
        late = self.w.is_main and self._save_seconds and time.perf_counter() - self._saved_at > self._save_seconds
        self.stopping, self._clock_due = any_process(self.w, self.signals.received is not None, late)

    def add(self, loss_sum, count):
        """Count an applied step for the next log line: the summed loss of its sequences, and their number."""
        self.loss_sum, self.seen = self.loss_sum + loss_sum, self.seen + count

    def bad_step(self, epoch, step, loss, norm, records):
        """Append to bad_steps.jsonl a step that was not applied, since its loss or gradient is not finite. epoch, step: from 1.

        Raises InputError, on all processes, at the --max-bad-steps-th.
        """
        self.bad_steps += 1
        if self.w.is_main:
            self._append("bad_steps.jsonl", {"epoch": epoch, "step": step, "loss": str(loss), "grad_norm": str(norm), "records": records})
        if self.bad_steps == self.args.max_bad_steps:
            exit_together(self.w, InputError(
                f"{self.bad_steps} step(s) had a loss or gradient that is not finite, the last one step {step}; their records stand in "
                f"{self.out / 'bad_steps.jsonl'}: look at those, or try a lower --lr than {self.args.lr}"))

    def log(self, entry):
        """Print the entry and append it to log.jsonl: the line printed is the line logged."""
        if self.w.is_main:
            print_line(self._append("log.jsonl", entry))

    def log_step(self, epoch, step, total_steps, lr, norm):
        """End a step (epoch, step: from 1); every --log-every steps, and at the last, log what was counted since the last line."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        if step % self.args.log_every == 0 or step == total_steps:
            self.log({"epoch": epoch, "step": step, "steps": total_steps,
                      "loss": round(self.loss_sum / self.seen, 5) if self.seen else None, "lr": lr,
                      "grad_norm": round(norm, 4) if math.isfinite(norm) else None,
                      "sequences_per_s": round(self.seen / self.seconds, 2)})
            self.loss_sum, self.seen, self.seconds = 0.0, 0, 0.0

    def log_validation(self, entry):
        """Log a validation; the next log line begins anew. Raises InputError, on all processes, unless "validation_loss" is finite."""
        if not math.isfinite(entry["validation_loss"]):
            exit_together(self.w, InputError(f"the validation loss is {entry['validation_loss']} after step {entry['step']}: try a lower "
                                             f"--lr than {self.args.lr}"))
        self.log(entry)
        self.loss_sum, self.seen, self.seconds, self._since = 0.0, 0, 0.0, time.perf_counter()

    def save_due(self, step):
        """Is last.pt to be written after this step: --save-every says so, or the run is about to stop?"""
        return self.stopping or self._clock_due or bool(self._save_steps and step % self._save_steps == 0)

    def save(self, content):
        """Write last.pt, on rank 0: what the script needs to go on ("step" and "epoch", the finished ones, among it), and what is counted
        here."""
        counts = {name: getattr(self, name) for name in COUNTS}
        save_last(self.out, {**self._facts, **content, **counts})
        self._saved_at = time.perf_counter()

    def leave_if_asked(self, saved):
        """End the run on all processes if a signal came before meet(). saved: what last.pt holds, in words."""
        if self.stopping:
            exit_together(self.w, Saved(f"{self.signals.name}: saved {saved} in {self.out / LAST}; --resume goes on from there"))

    def _append(self, name, entry):
        line = json.dumps(entry)
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        return line

    def _resumes(self):
        """True to go on from last.pt, False to begin. Raises InputError for a folder that holds something else."""
        out, resume, overwrite = self.out, self.args.resume or restarted(self.w), self.args.overwrite
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file: give another --out")
        there = {path.name for path in out.iterdir() if path.name != LOCK and path.suffix != ".tmp"} if out.is_dir() else set()
        if not there:
            return False
        if resume and there & {LAST, PREVIOUS}:
            return True
        if not (resume or overwrite):
            raise InputError(f"{out} exists: give another --out, --overwrite to replace it, or --resume to go on")
        if "args.json" not in there:
            raise InputError(f"{out} is not a run folder, so --{'overwrite does not replace' if overwrite else 'resume does not use'} it: "
                             "give another --out")
        if there & {"ckpt.pt", "metrics.json"} and not overwrite:
            raise InputError(f"{out} holds a run whose {LAST} is gone, so it cannot be resumed: give another --out, or --overwrite")
        return False

    def _check_unsaved(self):
        """Raise InputError if the folder holds the settings of another run, stopped before its first save."""
        path = self.out / "args.json"
        if path.exists():
            written = read_json(path)
            if not isinstance(written, dict):
                raise InputError(f"{path}: not written by a run: give another --out, or --overwrite")
            check_same(path, {"args": {name: written[name] for name in vars(self.args) if name in written}}, {"args": vars(self.args)})


def restarted(w):
    """Did torchrun (--max-restarts) or SLURM (requeue) start this command before? Then it resumes unasked."""
    counts = (os.environ.get(name) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return w.again or any(int(count or 0) > 0 for count in counts)


def lock(out):
    """Hold a run folder until this process ends, however it ends; returns the open file. Raises InputError when another one holds it.

    A record lock of the operating system (fcntl): it goes with the process, is not inherited by loader workers, and works over NFS. Where
    the file system has no locks a warning says so. Also removes what a killed process left half written.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            holder = file.read().strip() or "another process"
        raise InputError(f"{out} is in use by {holder}: wait for it, or give another --out") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise
        print(f"warning: {out} cannot be locked ({error.strerror}): start no second run there", file=sys.stderr, flush=True)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    for left in out.glob(".*.tmp"):
        left.unlink()
    return file


def save_last(out, content):
    """Write last.pt; the one before it stays as last.prev.pt."""
    written = out / f".next.{LAST}.tmp"
    checkpoint.save(written, {**content, "logs": {name: _size(out / name) for name in LOGS}}, checkpoint.RESUME_STATE)
    if (out / LAST).exists():
        os.replace(out / LAST, out / PREVIOUS)
    os.replace(written, out / LAST)
    to_disk(out)


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
    """Raise InputError, with the difference, unless a run may go on from `then` (the content of `path`) as `now` (the same keys) asks.

    Other process counts, batch sizes and accumulations are the same run while their product is: the steps hold the same sequences. More
    epochs are allowed too, and the cosine is then that of the new number from this step on.
    """
    compared = [name for name in then["args"] if name not in (*MAY_CHANGE, "batch_size", "accumulate", "epochs")]
    differ = [f"--{name.replace('_', '-')}: {then['args'][name]} then, {now['args'].get(name)} now" for name in compared
              if (then["args"][name] or None) != (now["args"].get(name) or None)]  # not given: False, None or 0, as the version had it
    differ += [f"{what}: {then[what]} then, {value} now" for what, value in now.items()
               if what != "args" and then.get(what, value) != value]
    if now["args"]["epochs"] < then["args"].get("epochs", 0):
        differ.append(f"--epochs: {then['args']['epochs']} then, {now['args']['epochs']} now (more are allowed, fewer are not)")
    if differ:
        raise InputError(f"{path} is of a run with other settings: {'; '.join(differ)}")


def cut_logs(out, then):
    """Take from the logs what was written after last.pt: those steps are about to be taken again."""
    for name, size in then.get("logs", {}).items():
        if _size(out / name) > size:
            os.truncate(out / name, size)


def planned_steps(args, sequences, processes):
    """(sequences per optimizer step, steps per epoch, steps of the run, steps of warm-up). Raises InputError when the warm-up takes all."""
    per_step = args.batch_size * args.accumulate * processes
    steps_per_epoch = math.ceil(sequences / per_step)
    total_steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    warmup_steps = warmup_steps_of(args.warmup_ratio, total_steps) if args.warmup_ratio else args.warmup_steps
    if warmup_steps >= total_steps > 0:
        raise InputError(f"a warm-up of {warmup_steps} steps leaves nothing of the {total_steps} steps of this run")
    return per_step, steps_per_epoch, total_steps, warmup_steps


def dropout_seed(seed, step, rank):
    """The seed of everything drawn in optimizer step `step` by process `rank`."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def environment_of(w):
    """Versions, device and command line of this run."""
    try:
        git = ["git", "-C", str(Path(__file__).resolve().parents[2]), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:  # no git on this machine
        commit = None
    device = torch.cuda.get_device_name(w.device) if w.device.type == "cuda" else platform.processor() or platform.machine()
    return {"taxa": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__, "platform": platform.platform(), "device": device,
            "processes": w.size, "threads": torch.get_num_threads(), "git_commit": commit,
            "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
