"""Groups: runs that differ in nothing but the seed.

Published runs and the strategies of probe_batch.py make groups too.
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from taxa.backbones import MODELS
from taxa.errors import InputError
from taxa.runtime.files import read_json
from taxa.strategies import STRATEGIES
from taxa.study.published_runs import published_rows
from taxa.study.run_folders import data_names
from taxa.training.flag_effects import NOTHING, PATH, PRODUCT, flags_that_change

# Arguments that change nothing in the results, or that a group's other fields hold: data, model,
# strategy, r, heads, base weights, the product of the batch.
SAME = {
    *flags_that_change(PATH, NOTHING, PRODUCT),
    "model",
    "seed",
    "revision",
    "settings",
    "base",
}
# How an argument is written in a label; the others are "name value".
FORMATS = {
    "protocol": "{}",
    "lr": "lr {:g}",
    "lora_alpha": "alpha {:g}",
    "max_steps": "steps {}",
}
ADAPTERS = tuple(name for name, row in STRATEGIES.items() if row.inject)
# The order of strategies in tables and pictures.
ORDER = [name for name in STRATEGIES if name not in ADAPTERS] + list(ADAPTERS)


class Group(NamedTuple):
    """Runs that differ in nothing but the seed, or rows of the published table."""

    data: str
    model: str
    strategy: str
    r: int | None
    heads: str  # "train" or "frozen"
    row: str  # its label in a picture: strategy, r, and what distinguishes it from the others
    pretrained: bool
    runs: tuple = ()
    published: tuple = ()  # of PublishedRow

    @property
    def label(self):
        return self.row + (", heads frozen" if self.heads == "frozen" else "")

    def values(self, rank):
        """Balanced accuracies on the test split, one per finished run."""
        found = [run.balanced_accuracy(rank) for run in self.runs]
        found += [getattr(row, rank, None) for row in self.published]
        return [value for value in found if value is not None]

    def epoch_seconds(self):
        """Mean seconds per epoch, one value per run that has it."""
        found = [run.epoch_seconds for run in self.runs]
        found += [row.epoch_seconds for row in self.published]
        return [value for value in found if value is not None]


def strategy_row(strategy, r=None, freeze_fraction=None):
    """The name of a strategy in pictures and tables, as "LoRA r=4"."""
    if freeze_fraction:
        name = f"{freeze_fraction:.0%} frozen"
    elif strategy in STRATEGIES:
        name = STRATEGIES[strategy].label
    else:
        name = strategy
    return name + (f" r={r}" if r else "")


def strategy_place(strategy):
    """Its place in ORDER; a strategy that this version does not have comes last."""
    return ORDER.index(strategy) if strategy in ORDER else len(ORDER)


def _details(run):
    """{name: value} of what must be equal for two runs to differ only in their seed.

    The two runs have the same data set, model, strategy, r and heads.
    """
    base = run.args["base"]
    arguments = {name: value for name, value in run.args.items() if name not in SAME}
    arguments |= run.settings
    if run.settings["strategy"] == "lora":
        arguments |= {"protocol": None}  # published LoRA differs in its heads alone
    names = sorted(arguments.keys() - {"strategy", "r", "heads"})
    weights = Path(base["folder"]).name if base.get("folder") else base.get("revision")
    dataset = run.environment.get("dataset") or (run.metrics or {}).get("dataset_digest")
    return {name: arguments[name] or None for name in names} | {
        "batch": run.batch,
        "weights": weights,
        "base": (base.get("digest") or "")[:8] or None,
        "dataset": dataset[:8] if dataset else None,
    }


def _label(name, value):
    words = name.replace("_", " ")
    if value is True:
        return words
    if isinstance(value, list):
        value = ",".join(value)
    return FORMATS.get(name, words + " {}").format(value)


def _values(details, names):
    return tuple(json.dumps(details.get(name)) for name in names)


def _apart(members):
    """The names in which some details differ, without those that follow from the others.

    Such are weights of another name, and the targets of a protocol.
    """
    def variants(names):
        return len({_values(details, names) for details in members})

    names = dict.fromkeys(name for details in members for name in details)
    apart = [name for name in names if variants([name]) > 1]
    for name in ("base", "targets", "feedforward_targets"):
        rest = [other for other in apart if other != name]
        apart = rest if variants(rest) == variants(apart) else apart
    return apart


def group_runs(runs):
    """Groups of the fine-tuning runs, in the order data, model, strategy, r, heads."""
    names = data_names(runs)
    cells = {}
    # Trained and frozen heads share a cell, so that their labels name the same things.
    for run in runs:
        settings = run.settings
        data, model = names[run.args["data"]], run.args["model"]
        key = (data, model, settings["strategy"], settings.get("r"))
        cells.setdefault(key, []).append((run, _details(run)))
    groups = []
    for (data, model, strategy, r), members in cells.items():
        digests = {details["dataset"] for _, details in members} - {None}
        if len(digests) == 1:  # a run that does not say its data has the same
            members = [(run, details | {"dataset": None}) for run, details in members]
        apart = _apart([details for _, details in members])
        variants = {}
        for run, details in members:
            key = (run.settings["heads"], *_values(details, apart))
            variants.setdefault(key, []).append((run, details))
        for (heads, *_), same in variants.items():
            first, details = same[0]
            base = first.args["base"]["source"]
            words = [strategy_row(strategy, r, first.settings.get("freeze_fraction"))]
            if base == "seed":  # a model without published weights starts from a fixed seed
                words.append("random base")
            for name in apart:
                if details.get(name) is not None and name != "freeze_fraction":
                    words.append(_label(name, details[name]))
            groups.append(
                Group(
                    data=data,
                    model=model,
                    strategy=strategy,
                    r=r,
                    heads=heads,
                    row=", ".join(words),
                    pretrained=base not in ("none", "seed"),
                    runs=tuple(run for run, _ in same),
                )
            )
    return sorted(groups, key=_order)


def _order(group):
    """A key for sorting groups."""
    place = strategy_place(group.strategy)
    frozen = group.heads == "frozen"
    return group.data, group.model, place, group.r or 0, frozen, group.row


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
    return Arm(
        strategy=group.strategy,
        r=group.r,
        heads=group.heads,
        row=group.row,
        share=first.trainable_fraction,
        sequences=first.environment.get("training_sequences"),
        reached={
            rank: (statistics.mean(found), min(found), max(found)) for rank, found in values.items()
        },
        classes={rank: len(confusion[0]) for rank, confusion in confusions.items() if confusion},
    )


def published_groups():
    """Groups of the published runs on all data.

    Their LoRA and (IA)3 heads were frozen (docs/PROTOCOL.md).
    """
    cells = {}
    for row in published_rows():
        if row.data_fraction == 1:
            cells.setdefault((row.model, row.strategy, row.r), []).append(row)
    groups = [
        Group(
            data="published",
            model=model,
            strategy=strategy,
            r=r,
            heads="frozen" if strategy in ADAPTERS else "train",
            row=strategy_row(strategy, r),
            pretrained=strategy != "random",
            published=tuple(members),
        )
        for (model, strategy, r), members in cells.items()
    ]
    models = list(MODELS)
    return sorted(
        groups, key=lambda g: (models.index(g.model), strategy_place(g.strategy), g.r or 0)
    )


def read_probes(paths):
    """A list of Groups, and {id(group): the largest batch, in sequences}, of probe documents.

    paths: of the files that probe_batch.py --out wrote.
    """
    groups = []
    limits = {}
    for path in paths:
        document = read_json(path)
        try:
            gib = document["memory_limit_bytes"] / 2**30
            title = f"{document['model']}, {gib:.3g} GiB, {document['device']}"
            for found in document["runs"]:
                group = Group(
                    data=title,
                    model=document["model"],
                    strategy=found["strategy"],
                    r=found["r"],
                    heads=found["settings"]["heads"],
                    row=strategy_row(found["strategy"], found["r"]),
                    pretrained=False,
                )
                groups.append(group)
                limits[id(group)] = found["ceiling"]
                # The sizes of --batch-sizes or --max-batch ended before the memory did.
                if found["smallest_that_fails"] is None:
                    raise InputError(
                        f"--probe {path}: nothing above {found['ceiling']} was tried for "
                        f"{group.label}, so the largest batch is not known: "
                        "run probe_batch.py without --batch-sizes and --max-batch"
                    )
        except (KeyError, TypeError):
            raise InputError(
                f"--probe {path} is not a document of probe_batch.py --out"
            ) from None
    return groups, limits
