"""The bookkeeping of a training run: what stands beside the mechanism in train.py and pretrain.py.

A Run owns the run folder, its lock, the logs, last.pt, the signals, and the count of steps. It
owns no model. A script tells it what happened. In the order of a run:

    with Run(w, args, out) as run:      looks at the folder, and writes nothing yet
        run.plan(split, sources)        how many steps the training split makes
        run.begin(facts)                all processes agree; the folder is locked; last.pt is read
        run.announce(...)               args.json, environment.json, the first lines on the screen
        run.signals.defer()             from here on a signal waits for the end of a step
        for each epoch:
            run.steps_left(epoch)       which sequences the steps take that are still to do
            for each step:
                run.agree_on_signals()  did a process get a signal, is a save due, did one die?
                run.end_step(...)       counts, logs, saves, stops
            run.log_validation(...)
            run.end_epoch(...)          saves, stops

No random state is stored, because none is carried from step to step. The order of an epoch
follows from (seed, epoch). Dropout is seeded anew at every step from (seed, step, rank). So
weights, optimizer and a few numbers are all that a run needs to go on bit for bit.
"""

import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers

from taxa import __version__
from taxa.data.batches import micro_batches, step_records
from taxa.errors import InputError, Saved
from taxa.runtime.cli import interval_of
from taxa.runtime.distributed import any_process, barrier, exit_together, from_main, same_on_all
from taxa.runtime.files import lock, read_json, to_disk, write_json
from taxa.runtime.progress import print_line
from taxa.runtime.signals import Signals
from taxa.training import checkpoint, sealed_file
from taxa.training.flag_effects import NOTHING, PATH, PRODUCT, flags_that_change
from taxa.training.optim import warmup_steps_of

LAST, PREVIOUS, LOCK = "last.pt", "last.prev.pt", ".lock"
# Appended to, so cut back on resuming to what they were when last.pt was written.
LOGS = ("log.jsonl", "bad_steps.jsonl")
# What --overwrite removes.
RUN_FILES = (
    "args.json",
    "environment.json",
    *LOGS,
    LAST,
    PREVIOUS,
    "ckpt.pt",
    "config.json",
    "model.safetensors",
    "metrics*.json",
    "per_class*.csv",
    "confusion_*.csv",
    "temperature.json",
)
# What a Run counts and last.pt holds.
COUNTS = ("step", "best", "bad_epochs", "bad_steps", "loss_sum", "seen", "seconds")


class Schedule(NamedTuple):
    """How many steps a run takes."""

    per_step: int  # sequences of an optimizer step, over all processes and micro-batches
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @property
    def epochs(self):
        """Of these the last one may be cut short by --max-steps."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def start(self, epoch):
        """Steps taken before this epoch, from 0."""
        return epoch * self.steps_per_epoch

    def end(self, epoch):
        """Steps taken after it."""
        return min(self.start(epoch + 1), self.total_steps)


class Run:
    """One run in one folder. A context manager: afterwards signals act as before it, and the
    folder is free.

    step: optimizer steps taken, over all epochs; first_epoch: the one to begin with, from 0.
    best, bad_epochs: the best validation loss, and how many epochs ago it was.
    bad_steps: how many steps were not applied.
    loss_sum, seen, seconds: of the next log line, the summed loss of the sequences, their number,
    and the time they took.
    last: the content of last.pt of a resumed run, else None.
    """

    def __init__(self, w, args, out):
        """w: World; args: parsed flags.

        Raises InputError for a folder that is neither to be resumed, to be replaced, nor new.
        """
        self.w = w
        self.args = args
        self.out = Path(out)
        self.signals = Signals()
        self.stopping = False
        self.last = None
        self.first_epoch = 0
        self.step = 0
        self.best = math.inf
        self.bad_epochs = 0
        self.bad_steps = 0
        self._count_anew()
        self._save_steps, self._save_seconds = interval_of(args.save_every)
        self._saved_at = time.perf_counter()
        self._clock_due = False
        self._lock = None
        if w.is_main:  # only rank 0 looks into the run folder and writes there
            self._resumes()

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, *exception):
        self.signals.__exit__(*exception)
        if self._lock:
            self._lock.close()

    def plan(self, split, sources=None):
        """The Schedule of a training split. sources: of the manifest, to name records by.

        Raises InputError when the warm-up takes all steps.
        """
        self._split = split
        self._sources = sources
        self.schedule = planned_steps(self.args, len(split), self.w.size)
        return self.schedule

    def begin(self, facts):
        """Lock the folder, and read the last.pt to go on from into .last, on every process.

        facts: {what: value} beside the flags that must be the same on all processes and when
        resumed. Nothing else in the folder is changed. Raises InputError for processes that
        differ, a folder that is in use, and a last.pt of another run.
        """
        paths = flags_that_change(PATH)
        flags = {name: value for name, value in vars(self.args).items() if name not in paths}
        facts = {"sequences per step": self.schedule.per_step, **facts}
        same_on_all(self.w, {**flags, **facts, "taxa": __version__, "torch": torch.__version__})
        self._facts = {"args": vars(self.args), **facts}
        if self.w.is_main:
            self._lock = lock_run(self.out)
            if self._resumes():  # asked again: another run may have come in between
                self.last = read_last(self.out)
                check_same(self.out / LAST, self.last, self._facts)
                self._check_best()
            elif not self.args.overwrite:
                self._check_unsaved()
        self.last = from_main(self.w, self.last)
        if self.last:
            self.first_epoch = self.last["epoch"]
            for name in COUNTS:
                setattr(self, name, self.last[name])

    def announce(self, lines, args, environment):
        """Make the folder this run's, and print the lines.

        args, environment: {what: value} to add to args.json and environment.json. A resumed run's
        logs are cut back to last.pt: the steps after it are taken again. Else what an earlier run
        left is removed.
        """
        if self.w.is_main:
            if self.last:
                cut_logs(self.out, self.last)
            else:
                for pattern in RUN_FILES:
                    for path in list(self.out.glob(pattern)):
                        path.unlink()
            write_json(self.out / "args.json", vars(self.args) | args)
            write_json(self.out / "environment.json", environment_of(self.w) | environment)
            print(*lines, *self._how_it_starts(), sep="\n", flush=True)
        barrier(self.w)
        self._saved_at = self._since = time.perf_counter()

    def _how_it_starts(self):
        """A line for a resumed run, and for one that was to be resumed."""
        if self.last:
            line = f"resumed after step {self.last['step']:,}, epoch {self.last['epoch'] + 1}"
            if self.args.epochs != self.last["args"]["epochs"]:
                line += f"; the cosine is now that of {self.args.epochs} epochs"
            return [line]
        if self.args.resume or restarted(self.w):
            return [f"nothing was saved in {self.out} yet: starting from the beginning"]
        return []

    def steps_left(self, epoch):
        """The optimizer steps of an epoch that are still to be taken: a list of batches.Step."""
        args = self.args
        plan = micro_batches(
            len(self._split),
            args.seed,
            epoch,
            args.batch_size,
            args.accumulate,
            rank=self.w.rank,
            size=self.w.size,
        )
        start = self.schedule.start(epoch)
        return plan[self.step - start:self.schedule.end(epoch) - start]

    def agree_on_signals(self):
        """Agree with the other processes whether one got a signal, and whether a save is due by
        the clock. A process that died shows here as an error, whatever the device.
        """
        late = False
        if self.w.is_main and self._save_seconds:
            late = time.perf_counter() - self._saved_at > self._save_seconds
        signalled = self.signals.received is not None
        self.stopping, self._clock_due = any_process(self.w, signalled, late)

    def end_step(self, epoch, *, lr, loss, grad_norm, count, state):
        """Count a step, log it, write last.pt where that is due, and end the run after a signal.

        epoch: from 0. loss: summed over the `count` sequences of the step, of all processes.
        A step is bad when loss or gradient norm is not finite: the script has not applied it.
        state: a function that gives what last.pt is to hold of the model.
        Raises InputError, on all processes, at the --max-bad-steps-th bad step.
        """
        self.step += 1
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.loss_sum += loss
            self.seen += count
        else:
            self._bad_step(epoch, loss, grad_norm)
        self._log_step(epoch, lr, grad_norm)
        by_steps = self._save_steps and self.step % self._save_steps == 0
        # At the end of an epoch, too, before the validation: whatever happens in that, no step
        # is taken twice.
        end_of_epoch = self.step == self.schedule.end(epoch)
        if by_steps or self._clock_due or self.stopping or end_of_epoch:
            self.save(epoch, state)
        self.stop_if_signalled(f"step {self.step} of {self.schedule.total_steps}")

    def end_epoch(self, epoch, state):
        """After the validation of an epoch (from 0): write last.pt, end the run after a signal."""
        self.save(epoch + 1, state)
        self.agree_on_signals()
        self.stop_if_signalled(f"epoch {epoch + 1}")

    def _bad_step(self, epoch, loss, grad_norm):
        """Write down which records a step held that was not applied."""
        self.bad_steps += 1
        if self.w.is_main:
            position = self.step - 1 - self.schedule.start(epoch)
            records = step_records(
                self._split,
                self.args.seed,
                epoch,
                position,
                self.schedule.per_step,
                self._sources,
            )
            entry = {
                "epoch": epoch + 1,
                "step": self.step,
                "loss": str(loss),
                "grad_norm": str(grad_norm),
                "records": records,
            }
            self._append("bad_steps.jsonl", entry)
        if self.bad_steps >= self.args.max_bad_steps:  # a resumed run may have a lower limit
            stop = InputError(
                f"{self.bad_steps} step(s) had a loss or gradient that is not finite, the last "
                f"one step {self.step}; their records stand in {self.out / 'bad_steps.jsonl'}: "
                f"look at those, or try a lower --lr than {self.args.lr}"
            )
            exit_together(self.w, stop)

    def _log_step(self, epoch, lr, grad_norm):
        """Every --log-every steps, and at the last, log what was counted since the last line."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        total_steps = self.schedule.total_steps
        if self.step % self.args.log_every == 0 or self.step == total_steps:
            entry = {
                "epoch": epoch + 1,
                "step": self.step,
                "steps": total_steps,
                "loss": round(self.loss_sum / self.seen, 5) if self.seen else None,
                "lr": lr,
                "grad_norm": round(grad_norm, 4) if math.isfinite(grad_norm) else None,
                "sequences_per_s": round(self.seen / self.seconds, 2),
            }
            self._log(entry)
            self._count_anew()

    def log_validation(self, entry):
        """Log a validation; the next log line begins anew.

        Raises InputError, on all processes, unless "validation_loss" is finite.
        """
        loss = entry["validation_loss"]
        if not math.isfinite(loss):
            stop = InputError(
                f"the validation loss is {loss} after step {entry['step']}: "
                f"try a lower --lr than {self.args.lr}"
            )
            exit_together(self.w, stop)
        self._log(entry)
        self._count_anew()
        self._since = time.perf_counter()

    def is_best(self, loss):
        """Take note of an epoch's validation loss. Is it the best one so far?"""
        if loss < self.best:
            self.best = loss
            self.bad_epochs = 0
            return True
        self.bad_epochs += 1
        return False

    def save(self, epochs, state):
        """Write last.pt, on rank 0, after so many whole epochs. state: as in end_step()."""
        if self.w.is_main:
            counts = {name: getattr(self, name) for name in COUNTS}
            save_last(self.out, {**self._facts, **state(), "epoch": epochs, **counts})
            self._saved_at = time.perf_counter()
        barrier(self.w)

    def stop_if_signalled(self, position):
        """End the run on all processes if a signal came before agree_on_signals().

        position: how far the run is, in words.
        """
        if self.stopping:
            where = self.out / LAST
            name = self.signals.name
            stop = Saved(f"{name}: saved {position} in {where}; --resume goes on from there")
            exit_together(self.w, stop)

    def _count_anew(self):
        self.loss_sum = 0.0
        self.seen = 0
        self.seconds = 0.0

    def _log(self, entry):
        """Print the entry and append it to log.jsonl: the line printed is the line logged."""
        if self.w.is_main:
            print_line(self._append("log.jsonl", entry))

    def _append(self, name, entry):
        line = json.dumps(entry)
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        return line

    def _resumes(self):
        """True to go on from last.pt, False to begin.

        Raises InputError for a folder that holds something else.
        """
        out = self.out
        overwrite = self.args.overwrite
        resume = self.args.resume or restarted(self.w)
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file: give another --out")
        there = set()
        if out.is_dir():
            there = {path.name for path in out.iterdir() if path.suffix != ".tmp"} - {LOCK}
        if not there:
            return False
        if resume and there & {LAST, PREVIOUS}:
            return True
        if not (resume or overwrite):
            raise InputError(
                f"{out} exists: give another --out, --overwrite to replace it, "
                "or --resume to go on"
            )
        if "args.json" not in there:
            refusal = "overwrite does not replace" if overwrite else "resume does not use"
            raise InputError(
                f"{out} is not a run folder, so --{refusal} it: give another --out"
            )
        if there & {"ckpt.pt", "metrics.json"} and not overwrite:
            raise InputError(
                f"{out} holds a run whose {LAST} is gone, so it cannot be resumed: "
                "give another --out, or --overwrite"
            )
        return False

    def _check_best(self):
        """Raise InputError unless the checkpoint of the best epoch so far is there and whole."""
        if self.last["best"] == math.inf:
            return
        path = self.out / "ckpt.pt"
        if not path.exists():
            raise InputError(
                f"{path} is gone, so the run cannot be resumed: --overwrite starts it anew"
            )
        sealed_file.check_seal(path)

    def _check_unsaved(self):
        """Raise InputError if the folder is of another run, stopped before its first save."""
        path = self.out / "args.json"
        if path.exists():
            written = read_json(path)
            if not isinstance(written, dict):
                raise InputError(
                    f"{path}: not written by a run: give another --out, or --overwrite"
                )
            then = {name: written[name] for name in vars(self.args) if name in written}
            check_same(path, {"args": then}, {"args": vars(self.args)})


def restarted(w):
    """Did torchrun (--max-restarts) or SLURM (requeue) start this command before?

    Then it resumes unasked.
    """
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return w.restarted or any(int(os.environ.get(name) or 0) > 0 for name in names)


def lock_run(out):
    """Hold a run folder until this process ends, however it ends; returns the open file.

    The lock is this process's alone: loader workers do not inherit it. Raises InputError when
    another process holds it. Also removes what a killed process left half written.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / LOCK, "a+", encoding="utf-8")
    try:
        lock(file, out, advice="start no second run there")
    except BlockingIOError:
        with file:
            file.seek(0)
            holder = file.read().strip() or "another process"
        raise InputError(
            f"{out} is in use by {holder}: wait for it, or give another --out"
        ) from None
    except OSError:
        file.close()
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    for left in out.glob(".*.tmp"):
        left.unlink()
    return file


def save_last(out, content):
    """Write last.pt; the one before it stays as last.prev.pt."""
    written = out / f".next.{LAST}.tmp"
    logs = {name: _size(out / name) for name in LOGS}
    checkpoint.save(written, {**content, "logs": logs}, checkpoint.RESUME_STATE)
    if (out / LAST).exists():
        os.replace(out / LAST, out / PREVIOUS)
    os.replace(written, out / LAST)
    to_disk(out)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def read_last(out):
    """The content of last.pt.

    Where that is damaged or gone, the content of last.prev.pt, which then takes its place, with a
    warning on stderr.
    """
    try:
        return checkpoint.read(out / LAST, checkpoint.RESUME_STATE)
    except InputError as error:
        if not (out / PREVIOUS).exists():
            raise
        content = checkpoint.read(out / PREVIOUS, checkpoint.RESUME_STATE)
        # else the next save would move the damaged one over the good one
        os.replace(out / PREVIOUS, out / LAST)
        going_on = f"going on from {PREVIOUS}, step {content['step']}"
        print(f"warning: {error}; {going_on}", file=sys.stderr, flush=True)
        return content


def check_same(path, then, now):
    """Raise InputError, with the difference, unless a run may go on.

    then: the content of `path`; now: what is asked for, with the same keys. Other process counts,
    batch sizes and accumulations are the same run while their product is: the steps hold the same
    sequences. More epochs are allowed too, and the cosine is then that of the new number from
    this step on.
    """
    free = {*flags_that_change(PATH, NOTHING, PRODUCT), "epochs"}
    differ = []
    for name, had in then["args"].items():
        has = now["args"].get(name)
        # a flag that was not given is None, False or 0
        if name not in free and (had or None) != (has or None):
            differ.append(f"--{name.replace('_', '-')}: {had} then, {has} now")
    for what, value in now.items():
        if what != "args" and then.get(what, value) != value:
            differ.append(f"{what}: {then[what]} then, {value} now")
    epochs_then = then["args"].get("epochs", 0)
    epochs_now = now["args"]["epochs"]
    if epochs_now < epochs_then:
        differ.append(
            f"--epochs: {epochs_then} then, {epochs_now} now (more are allowed, fewer are not)"
        )
    if differ:
        raise InputError(f"{path} is of a run with other settings: {'; '.join(differ)}")


def cut_logs(out, then):
    """Take from the logs what was written after last.pt: those steps are about to be taken again.
    """
    for name, size in then["logs"].items():
        if _size(out / name) > size:
            os.truncate(out / name, size)


def planned_steps(args, sequences, processes):
    """The Schedule of a run over so many sequences.

    Raises InputError when the warm-up takes all steps.
    """
    per_step = args.batch_size * args.accumulate * processes
    steps_per_epoch = math.ceil(sequences / per_step)
    total_steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    warmup_steps = args.warmup_steps
    if args.warmup_ratio:
        warmup_steps = warmup_steps_of(args.warmup_ratio, total_steps)
    if warmup_steps >= total_steps > 0:
        raise InputError(
            f"a warm-up of {warmup_steps} steps leaves nothing of the {total_steps} steps "
            "of this run"
        )
    return Schedule(per_step, steps_per_epoch, total_steps, warmup_steps)


def dropout_seed(seed, step, rank):
    """The seed of everything drawn in optimizer step `step` by process `rank`."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def environment_of(w):
    """Versions, device and command line of this run."""
    try:
        git = ["git", "-C", str(Path(__file__).resolve().parents[2]), "rev-parse", "HEAD"]
        found = subprocess.run(git, capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or None
    except FileNotFoundError:  # no git on this machine
        commit = None
    device = platform.processor() or platform.machine()
    if w.device.type == "cuda":
        device = torch.cuda.get_device_name(w.device)
    return {
        "taxa": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": device,
        "processes": w.size,
        "threads": torch.get_num_threads(),
        "git_commit": commit,
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
