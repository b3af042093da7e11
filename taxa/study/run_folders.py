"""Read run folders: what was run, how far it came, what came out."""

import csv
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from taxa.errors import InputError
from taxa.runtime.files import read_json


class Run(NamedTuple):
    """One run folder. Values that a run does not have (yet) are None."""

    folder: Path
    args: dict
    environment: dict
    log: list
    metrics: dict | None

    @property
    def fine_tuned(self):
        return "settings" in self.args

    @property
    def settings(self):
        return self.args["settings"]

    @property
    def batch(self):
        """Sequences per optimizer step."""
        processes = self.environment.get("processes", 1)
        return self.args["batch_size"] * self.args["accumulate"] * processes

    @property
    def steps(self):
        """The lines of the log about training steps.

        Each is {"epoch", "step", "steps", "loss", "sequences_per_s", ...}.
        """
        return [line for line in self.log if "steps" in line]

    @property
    def validations(self):
        """The lines of the log about a validation: {"epoch", "step", "validation_loss", ...}."""
        return [line for line in self.log if "validation_loss" in line]

    @property
    def last_step(self):
        return max((line["step"] for line in self.log), default=0)

    @property
    def rate(self):
        """Mean training sequences per second over the whole log, or None."""
        sequences = seconds = before = 0
        for line in self.log:
            if line.get("sequences_per_s"):
                passed = self.batch * (line["step"] - before)
                sequences += passed
                seconds += passed / line["sequences_per_s"]
            before = line["step"]
        return sequences / seconds if seconds else None

    @property
    def epoch_seconds(self):
        """Mean seconds per epoch of training, validation not counted, or None."""
        rate = self.rate
        sequences = self.environment.get("training_sequences")
        return sequences / rate if rate and sequences else None

    @property
    def epochs(self):
        """Epochs trained: part of one when --max-steps ended it."""
        sequences = self.environment.get("training_sequences")
        if sequences:
            per_epoch = -(-sequences // self.batch)
            return self.last_step / per_epoch
        return max((line["epoch"] for line in self.log), default=0)

    @property
    def trainable_fraction(self):
        """Parameters that train over those held, or None."""
        if "trainable" not in self.environment:
            return None
        return self.environment["trainable"] / self.environment["parameters"]

    def balanced_accuracy(self, rank):
        """On the test split, or None."""
        return ((self.metrics or {}).get("ranks", {}).get(rank) or {}).get("balanced_accuracy")

    def confusion(self, rank):
        """(class ids, matrix as lists) of the test split, or None. The rows are the truth."""
        path = self.folder / f"confusion_{rank}.csv"
        if not path.is_file():
            return None
        try:
            with open(path, newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            matrix = [[int(count) for count in row[1:]] for row in rows]
        except (ValueError, csv.Error):
            raise InputError(f"{path} is not a table of counts") from None
        classes = header[1:]
        same_classes = [row[:1] for row in rows] == [[name] for name in classes]
        if not same_classes or any(len(row) != len(classes) for row in matrix):
            raise InputError(
                f"{path} is not a square table: the same classes as rows and as columns"
            )
        return classes, matrix

    def class_names(self, rank):
        """{class id: name} of per_class.csv; empty where that is missing."""
        path = self.folder / "per_class.csv"
        if not path.is_file():
            return {}
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["rank"] == rank]
                return {row["taxid"] or row["name"]: row["name"] for row in rows}
        except (KeyError, UnicodeDecodeError, csv.Error):
            raise InputError(
                f"{path} is not the table of classes that evaluate.py writes"
            ) from None


def find_runs(paths):
    """The run folders among `paths` and in them, in natural order.

    Raises InputError for a path that is no run folder and holds none.
    """
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(
                f"{path} is not a folder: "
                "give run folders of train.py, or folders that contain them"
            )
        inside = []
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if "args.json" in files:
                inside.append(Path(folder))
        if not inside:
            raise InputError(f"no run in {path}: there is no args.json in it or below it")
        found += inside
    # The current folder, ".", is given its name.
    unique = {folder.resolve(): folder if folder.name else folder.resolve() for folder in found}
    return sorted(unique.values(), key=_natural_order)


def _natural_order(folder):
    """A key for sorting that puts run2 before run10."""
    parts = re.split(r"(\d+)", str(folder))
    return [int(part) if part.isdigit() else part for part in parts]


def read_run(folder):
    """The Run of a folder.

    A last line that is being written is left out of the log. Raises InputError that names a
    damaged file.
    """
    args = read_json(folder / "args.json")
    needed = {"model", "batch_size", "accumulate", "seed", "lr"}
    if not isinstance(args, dict) or not needed <= args.keys():
        raise InputError(f"{folder / 'args.json'} is not of a run of train.py or pretrain.py")
    log = _read_log(folder / "log.jsonl")
    path = folder / "environment.json"
    environment = read_json(path) if path.is_file() else {}
    path = folder / "metrics.json"
    metrics = read_json(path) if path.is_file() else None
    if not isinstance(environment, dict):
        raise InputError(
            f"{folder / 'environment.json'} is not of a run of train.py or pretrain.py"
        )
    if metrics is not None and (
        not isinstance(metrics, dict)
        or not isinstance(metrics.get("ranks", {}), dict)
        or ("settings" in args and "ranks" not in metrics)
    ):
        raise InputError(f"{folder / 'metrics.json'} is not of train.py or evaluate.py")
    return Run(folder, args, environment, log, metrics)


def _read_log(path):
    """The entries of a log.jsonl; [] where there is none."""
    log = []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise InputError(f"{path}, line {number}: not JSON") from None
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("step"), int)
            or not isinstance(entry.get("epoch"), int)
        ):
            raise InputError(f"{path}, line {number}: not a line of train.py's log")
        log.append(entry)
    return log


def data_names(runs):
    """{--data as given: a short name}.

    The short name is the last name of the folder, or all of it where two folders end alike.
    """
    folders = {run.args["data"] for run in runs}
    last = [Path(folder).name for folder in folders]
    return {
        folder: Path(folder).name if last.count(Path(folder).name) == 1 else folder
        for folder in folders
    }
