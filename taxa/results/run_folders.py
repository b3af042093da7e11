"""Read run folders: what was run, how far it came, what came out. Runs that differ in nothing but the seed make one group."""

import csv
import json
import os
import re
from pathlib import Path
from typing import NamedTuple, Optional

from taxa import ASSETS
from taxa.errors import InputError

# Arguments that change nothing in what comes out, or that a group's other fields tell: data, model, strategy, r, heads, base weights.
SAME = {"seed", "out", "workers", "device", "save_every", "log_every", "max_bad_steps", "overwrite", "resume", "dry_run", "num_classes",
        "ranks", "data", "model", "weights", "revision", "settings", "base", "batch_size", "accumulate"}
FORMATS = {"protocol": "{}", "lr": "lr {:g}", "lora_alpha": "alpha {:g}", "max_steps": "steps {}"}  # in a label; the others: "name value"
STRATEGY_LABELS = {"full": "full", "random": "random", "freeze75": "75% frozen", "lora": "LoRA", "ia3": "(IA)³"}
PUBLISHED = ASSETS / "published_results.csv"  # supplement of Berman et al. 2025, all 33 runs


class Run(NamedTuple):
    """One run folder. Values that a run does not have (yet) are None."""

    folder: Path
    args: dict
    environment: dict
    log: list
    metrics: Optional[dict]

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


class Group(NamedTuple):
    """Runs that differ in nothing but the seed, or rows of the published table. heads: "train" or "frozen"."""

    data: str
    model: str
    strategy: str
    r: Optional[int]
    heads: str
    row: str  # what stands beside it in a picture: strategy, r, and what sets it apart from the others
    pretrained: bool
    runs: tuple = ()
    published: tuple = ()

    @property
    def label(self):
        return self.row + (", heads frozen" if self.heads == "frozen" else "")

    def values(self, rank):
        """Balanced accuracies on the test split, one per finished run."""
        found = [run.balanced_accuracy(rank) for run in self.runs] + [float(row[rank]) for row in self.published]
        return [value for value in found if value is not None]

    def epoch_seconds(self):
        found = [run.epoch_seconds for run in self.runs] + [float(row["epoch_seconds"]) for row in self.published]
        return [value for value in found if value is not None]


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
    args = _json(folder / "args.json")
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
    environment, metrics = _json(folder / "environment.json", {}), _json(folder / "metrics.json", None)
    if not isinstance(environment, dict):
        raise InputError(f"{folder / 'environment.json'} is not of a run of train.py or pretrain.py")
    if metrics is not None and (not isinstance(metrics, dict) or not isinstance(metrics.get("ranks", {}), dict)
                                or ("settings" in args and "ranks" not in metrics)):
        raise InputError(f"{folder / 'metrics.json'} is not of train.py or evaluate.py")
    return Run(folder, args, environment, log, metrics)


def _json(path, *missing):
    """The document in a file; where there is no such file, what `missing` holds."""
    if missing and not path.is_file():
        return missing[0]
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def strategy_row(strategy, r=None, freeze_fraction=None):
    """ "LoRA r=4": a strategy as pictures and tables call it."""
    name = f"{freeze_fraction:.0%} frozen" if freeze_fraction else STRATEGY_LABELS.get(strategy, strategy)
    return name + (f" r={r}" if r else "")


def data_names(runs):
    """{--data as given: a short name}: the folder's last name, or all of it where two folders end alike."""
    folders = {run.args["data"] for run in runs}
    last = [Path(folder).name for folder in folders]
    return {folder: Path(folder).name if last.count(Path(folder).name) == 1 else folder for folder in folders}


def _details(run):
    """What must be equal for two runs of one data set, model, strategy, r and heads to differ only in their seed: {name: value}."""
    base = run.args["base"]
    arguments = {name: value for name, value in run.args.items() if name not in SAME} | run.settings
    arguments |= {"protocol": None} if run.settings["strategy"] == "lora" else {}  # published LoRA differs in its heads alone
    found = {name: arguments[name] or None for name in sorted(arguments.keys() - {"strategy", "r", "heads"})}
    weights = Path(base["folder"]).name if base.get("folder") else base.get("revision")
    dataset = run.environment.get("dataset") or (run.metrics or {}).get("dataset_digest")
    return found | {"batch": run.batch, "weights": weights, "base": (base.get("digest") or "")[:8] or None,
                    "dataset": dataset[:8] if dataset else None}


def _label(name, value):
    if isinstance(value, list):
        value = ",".join(value)
    return name.replace("_", " ") if value is True else FORMATS.get(name, name.replace("_", " ") + " {}").format(value)


def _values(details, names):
    return tuple(json.dumps(details.get(name)) for name in names)


def _apart(members):
    """The names in which some details differ, without those that the others tell: weights of another name, the protocol's targets."""
    def variants(names):
        return len({_values(details, names) for details in members})

    apart = [name for name in dict.fromkeys(name for details in members for name in details) if variants([name]) > 1]
    for name in ("base", "targets", "feedforward_targets"):
        rest = [other for other in apart if other != name]
        apart = rest if variants(rest) == variants(apart) else apart
    return apart


def group_runs(runs):
    """Groups of the fine-tuning runs, in the order data, model, strategy, r, heads."""
    names = data_names(runs)
    cells = {}
    for run in runs:  # trained and frozen heads share a cell, so that what stands in one's label stands in the other's
        key = (names[run.args["data"]], run.args["model"], run.settings["strategy"], run.settings.get("r"))
        cells.setdefault(key, []).append((run, _details(run)))
    groups = []
    for (data, model, strategy, r), members in cells.items():
        if len({details["dataset"] for _, details in members} - {None}) == 1:  # a run that does not say is of the same
            members = [(run, details | {"dataset": None}) for run, details in members]
        apart = _apart([details for _, details in members])
        variants = {}
        for run, details in members:
            variants.setdefault((run.settings["heads"], *_values(details, apart)), []).append((run, details))
        for (heads, *_), same in variants.items():
            first, details = same[0]
            base = first.args["base"]["source"]
            words = [strategy_row(strategy, r, first.settings.get("freeze_fraction"))]
            words += ["random base"] if base == "seed" else []  # a model without published weights starts from a fixed seed
            words += [_label(name, details[name]) for name in apart if details.get(name) is not None and name != "freeze_fraction"]
            groups.append(Group(data, model, strategy, r, heads, ", ".join(words), base not in ("none", "seed"),
                                tuple(run for run, _ in same)))
    order = list(STRATEGY_LABELS)
    return sorted(groups, key=lambda g: (g.data, g.model, order.index(g.strategy), g.r or 0, g.heads == "frozen", g.row))


def published_rows():
    """The 33 rows of the published table, {column: text}."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def published_groups():
    """Groups of the published runs on all data. Their LoRA and (IA)3 heads were frozen (docs/PROTOCOL.md)."""
    rows = [row for row in published_rows() if row["data_fraction"] == "1"]
    cells = {}
    for row in rows:
        cells.setdefault((row["model"], row["strategy"], int(row["r"]) if row["r"] else None), []).append(row)
    order, models = list(STRATEGY_LABELS), ["nt50m", "nt100m", "nt250m", "dnabert2", "dnaberts"]
    groups = [Group("published", model, strategy, r, "frozen" if strategy in ("lora", "ia3") else "train", strategy_row(strategy, r),
                    strategy != "random", (), tuple(members)) for (model, strategy, r), members in cells.items()]
    return sorted(groups, key=lambda g: (models.index(g.model), order.index(g.strategy), g.r or 0))
