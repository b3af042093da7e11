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
        return self.args["batch_size"] * self.args["accumulate"] * self.environment.get("processes", 1)

    @property
    def steps(self):
        """The lines of the log that tell of training steps: {"epoch", "step", "steps", "loss", "sequences_per_s", ...}."""
        return [line for line in self.log if "steps" in line]

    @property
    def validations(self):
        """The lines of the log that tell of a validation: {"epoch", "step", "validation_loss", ...}."""
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
                sequences += self.batch * (line["step"] - before)
                seconds += self.batch * (line["step"] - before) / line["sequences_per_s"]
            before = line["step"]
        return sequences / seconds if seconds else None

    @property
    def epoch_seconds(self):
        """Mean seconds per epoch of training, validation not counted, or None."""
        rate, sequences = self.rate, self.environment.get("training_sequences")
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
        return self.environment["trainable"] / self.environment["parameters"] if "trainable" in self.environment else None

    def balanced_accuracy(self, rank):
        """On the test split, or None."""
        return ((self.metrics or {}).get("ranks", {}).get(rank) or {}).get("balanced_accuracy")

    def confusion(self, rank):
        """(class ids, matrix as lists; rows are the truth) of the test split, or None."""
        path = self.folder / f"confusion_{rank}.csv"
        if not path.is_file():
            return None
        try:
            with open(path, newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            matrix = [[int(count) for count in row[1:]] for row in rows]
        except (ValueError, csv.Error):
            raise InputError(f"{path} is not a table of counts") from None
        if [row[:1] for row in rows] != [[name] for name in header[1:]] or any(len(row) != len(header) - 1 for row in matrix):
            raise InputError(f"{path} is not a square table: the same classes as rows and as columns")
        return header[1:], matrix

    def class_names(self, rank):
        """{class id: name} of per_class.csv; empty where that is missing."""
        path = self.folder / "per_class.csv"
        if not path.is_file():
            return {}
        try:
            with open(path, newline="", encoding="utf-8") as file:
                return {row["taxid"] or row["name"]: row["name"] for row in csv.DictReader(file) if row["rank"] == rank}
        except (KeyError, UnicodeDecodeError, csv.Error):
            raise InputError(f"{path} is not the table of classes that evaluate.py writes") from None


def find_runs(paths):
    """The run folders among `paths` and in them, in natural order. Raises InputError for a path that is none and holds none."""
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path} is not a folder: give run folders of train.py, or folders that contain them")
        inside = []
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if "args.json" in files:
                inside.append(Path(folder))
        if not inside:
            raise InputError(f"no run in {path}: there is no args.json in it or below it")
        found += inside
    unique = {folder.resolve(): folder if folder.name else folder.resolve() for folder in found}  # "." has a name too
    return sorted(unique.values(), key=lambda folder: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(folder))])


def read_run(folder):
    """Run of a folder. Raises InputError that names a damaged file. A last line that is being written is left out of the log."""
    args = read_json(folder / "args.json")
    if not isinstance(args, dict) or not {"model", "batch_size", "accumulate", "seed", "lr"} <= args.keys():
        raise InputError(f"{folder / 'args.json'} is not of a run of train.py or pretrain.py")
    log, path = [], folder / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n"):
            try:
                entry = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise InputError(f"{path}, line {number}: not JSON") from None
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int) or not isinstance(entry.get("epoch"), int):
                raise InputError(f"{path}, line {number}: not a line of train.py's log")
            log.append(entry)
    environment, metrics = (read_json(path) if path.is_file() else missing for path, missing in (
        (folder / "environment.json", {}), (folder / "metrics.json", None)))
    if not isinstance(environment, dict):
        raise InputError(f"{folder / 'environment.json'} is not of a run of train.py or pretrain.py")
    if metrics is not None and (not isinstance(metrics, dict) or not isinstance(metrics.get("ranks", {}), dict)
                                or ("settings" in args and "ranks" not in metrics)):
        raise InputError(f"{folder / 'metrics.json'} is not of train.py or evaluate.py")
    return Run(folder, args, environment, log, metrics)


def data_names(runs):
    """{--data as given: a short name}: the folder's last name, or all of it where two folders end alike."""
    folders = {run.args["data"] for run in runs}
    last = [Path(folder).name for folder in folders]
    return {folder: Path(folder).name if last.count(Path(folder).name) == 1 else folder for folder in folders}
