"""Runs that differ in nothing but the seed make one group; so do published runs, and strategies of probe_batch.py."""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from taxa.backbones import MODELS
from taxa.errors import InputError
from taxa.runtime.cli import NO_EFFECT
from taxa.runtime.files import read_json
from taxa.strategies import STRATEGIES
from taxa.study.published_runs import published_rows
from taxa.study.run_folders import data_names

# Arguments that change nothing in what comes out, or that a group's other fields tell: data, model, strategy, r, heads, base weights.
SAME = {*NO_EFFECT, "recompute", "seed", "out", "dry_run", "num_classes", "ranks", "data", "model", "weights", "revision", "settings",
        "base", "batch_size", "accumulate"}
FORMATS = {"protocol": "{}", "lr": "lr {:g}", "lora_alpha": "alpha {:g}", "max_steps": "steps {}"}  # in a label; the others: "name value"
ADAPTERS = tuple(name for name, row in STRATEGIES.items() if row.inject)
ORDER = [name for name in STRATEGIES if name not in ADAPTERS] + list(ADAPTERS)  # of strategies in tables and pictures


class Group(NamedTuple):
    """Runs that differ in nothing but the seed, or rows of the published table. heads: "train" or "frozen"."""

    data: str
    model: str
    strategy: str
    r: int | None
    heads: str
    row: str  # what stands beside it in a picture: strategy, r, and what sets it apart from the others
    pretrained: bool
    runs: tuple = ()
    published: tuple = ()  # of PublishedRow

    @property
    def label(self):
        return self.row + (", heads frozen" if self.heads == "frozen" else "")

    def values(self, rank):
        """Balanced accuracies on the test split, one per finished run."""
        found = [run.balanced_accuracy(rank) for run in self.runs] + [getattr(row, rank, None) for row in self.published]
        return [value for value in found if value is not None]

    def epoch_seconds(self):
        found = [run.epoch_seconds for run in self.runs] + [row.epoch_seconds for row in self.published]
        return [value for value in found if value is not None]


def strategy_row(strategy, r=None, freeze_fraction=None):
    """ "LoRA r=4": a strategy as pictures and tables call it."""
    name = f"{freeze_fraction:.0%} frozen" if freeze_fraction else STRATEGIES[strategy].label if strategy in STRATEGIES else strategy
    return name + (f" r={r}" if r else "")


def strategy_place(strategy):
    """Its place in ORDER; what is not of this version comes last."""
    return ORDER.index(strategy) if strategy in ORDER else len(ORDER)


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
    return sorted(groups, key=lambda g: (g.data, g.model, strategy_place(g.strategy), g.r or 0, g.heads == "frozen", g.row))


class Arm(NamedTuple):
    """What a group reached, for a picture or a file."""

    strategy: str
    r: int | None
    heads: str  # "train" or "frozen"
    row: str  # as tables call it
    share: float  # of the parameters that train
    sequences: int  # of the training split, or of the part of it that was used
    reached: dict  # {rank: (mean, low, high) of the balanced accuracy}
    classes: dict  # {rank: how many}

    @property
    def kind(self):
        return self.strategy, self.r, self.heads


def arm_of(group, ranks):
    """The Arm of a Group in which a run was tested."""
    first = next(run for run in group.runs if run.metrics)
    values = {rank: group.values(rank) for rank in ranks if group.values(rank)}
    confusions = {rank: first.confusion(rank) for rank in values}
    return Arm(group.strategy, group.r, group.heads, group.row, first.trainable_fraction, first.environment.get("training_sequences"),
               {rank: (statistics.mean(found), min(found), max(found)) for rank, found in values.items()},
               {rank: len(confusion[0]) for rank, confusion in confusions.items() if confusion})


def published_groups():
    """Groups of the published runs on all data. Their LoRA and (IA)3 heads were frozen (docs/PROTOCOL.md)."""
    cells = {}
    for row in published_rows():
        if row.data_fraction == 1:
            cells.setdefault((row.model, row.strategy, row.r), []).append(row)
    groups = [Group("published", model, strategy, r, "frozen" if strategy in ADAPTERS else "train", strategy_row(strategy, r),
                    strategy != "random", (), tuple(members)) for (model, strategy, r), members in cells.items()]
    return sorted(groups, key=lambda g: (list(MODELS).index(g.model), strategy_place(g.strategy), g.r or 0))


def read_probes(paths):
    """Of probe_batch.py's documents: a list of Groups, and {id(group): the largest batch, in sequences}."""
    groups, limits = [], {}
    for path in paths:
        document = read_json(path)
        try:
            title = f"{document['model']}, {document['memory_limit_bytes'] / 2**30:.3g} GiB, {document['device']}"
            for found in document["runs"]:
                group = Group(title, document["model"], found["strategy"], found["r"],
                              found["settings"]["heads"], strategy_row(found["strategy"], found["r"]), False)
                groups.append(group)
                limits[id(group)] = found["ceiling"]
                if found["smallest_that_fails"] is None:  # the sizes of --batch-sizes or --max-batch ended before the memory did
                    raise InputError(f"--probe {path}: nothing above {found['ceiling']} was tried for {group.label}, so the "
                                     "largest batch is not known: run probe_batch.py without --batch-sizes and --max-batch")
        except (KeyError, TypeError):
            raise InputError(f"--probe {path} is not a document of probe_batch.py --out") from None
    return groups, limits
