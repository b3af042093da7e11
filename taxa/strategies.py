"""Strategy name -> what goes into the model and what trains: one row per strategy, and the functions that read the row.

Two protocols. `corrected`, the default: the heads train in every strategy, (IA)3 sits where its authors put it, and freezing counts the
parameters that the model uses. `published`: what the published code does: for LoRA and (IA)3 the heads stay at their random
initialisation, (IA)3 sits elsewhere, and freezing also counts tensors that the loss never uses.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from taxa.backbones import FAMILIES, backbone_config, get_model
from taxa.backbones.unused_tensors import published_sizes
from taxa.errors import InputError
from taxa.freeze import frozen_names
from taxa.ia3 import inject_ia3
from taxa.inject import adapter_names
from taxa.lora import inject_lora
from taxa.model import TaxonClassifier

PROTOCOLS = ("corrected", "published")


def everything(classifier, settings):
    return [name for name, _ in classifier.named_parameters()]


def all_but_the_frozen(classifier, settings):
    sizes = {name: p.numel() for name, p in classifier.named_parameters()}
    frozen = frozen_names(sizes if settings["protocol"] == "corrected" else published_sizes(classifier), settings["freeze_fraction"])
    return [name for name in sizes if name not in set(frozen)]


def adapters_and_heads(classifier, settings):
    adapters = set(adapter_names(classifier))
    return [name for name, _ in classifier.named_parameters()
            if name in adapters or (name.startswith("heads.") and settings["heads"] == "train")]


def lora(backbone, settings):
    inject_lora(backbone, settings["targets"], settings["r"], settings["lora_alpha"], settings["lora_dropout"],
                settings.get("rslora", False))  # older checkpoints lack it


def ia3(backbone, settings):
    inject_ia3(backbone, settings["targets"], settings["feedforward_targets"])


class Strategy(NamedTuple):
    """One way to train. A new one is its file, a row here, and a test; docs/READING.md adds one, step by step."""

    label: str  # in tables and pictures
    colour: str  # in pictures: Okabe and Ito's palette, told apart with any colour vision
    trains: Callable  # (classifier, settings) -> names of the parameters that train
    flags: dict = {}  # {flag of its own: default}; training/flags.py has their help, and with another strategy they are refused
    inject: Callable | None = None  # (backbone, settings) -> None: puts the adapters in


LORA_FLAGS = {"r": 4, "lora_alpha": 32.0, "lora_dropout": 0.1, "rslora": False, "targets": None}
STRATEGIES = {
    "full": Strategy("full", "#0072B2", everything),
    "random": Strategy("random", "#777777", everything),  # train.py re-initialises the classifier first
    "lora": Strategy("LoRA", "#D55E00", adapters_and_heads, LORA_FLAGS, lora),
    "ia3": Strategy("(IA)³", "#CC79A7", adapters_and_heads, {"targets": None, "feedforward_targets": None}, ia3),
    "freeze75": Strategy("75% frozen", "#009E73", all_but_the_frozen, {"freeze_fraction": 0.75}),
}
STRATEGY_FLAGS = tuple(dict.fromkeys(flag for row in STRATEGIES.values() for flag in row.flags))


def settings_from_flags(model, strategy, protocol="corrected", heads=None, **flags):
    """Check a combination of flags and fill in the defaults. Returns a plain dict, which is what the checkpoint stores.

    model: a name in the table, or a row. A flag that is None was not given. Raises InputError for a combination that makes no sense.
    """
    module, row, published = FAMILIES[get_model(model).family].module, STRATEGIES[strategy], protocol == "published"
    for flag, value in flags.items():
        if value is not None and flag not in row.flags:
            others = [name for name, other in STRATEGIES.items() if flag in other.flags]
            if not others:
                raise TypeError(f"unknown setting: {flag}")
            raise InputError(f"--{flag.replace('_', '-')} is for --strategy {' or '.join(others)}; with --strategy {strategy} "
                             "it would do nothing: leave it out")
    given = {flag: value for flag, value in flags.items() if value is not None}
    settings = {"strategy": strategy, "protocol": protocol, **row.flags, **given}
    if settings.get("freeze_fraction") == 0:
        raise InputError("--freeze-fraction 0 freezes nothing: that is --strategy full")

    if "feedforward_targets" in row.flags:  # targets that were given replace both of the family's lists
        defaults = ((), ()) if given.keys() & {"targets", "feedforward_targets"} else module.IA3_TARGETS[protocol]
        settings["targets"], settings["feedforward_targets"] = (
            list(settings[flag] or default) for flag, default in zip(("targets", "feedforward_targets"), defaults))
    elif "targets" in row.flags:
        settings["targets"] = list(settings["targets"] or module.LORA_TARGETS)

    if heads == "frozen" and not row.inject:
        raise InputError(f"--heads frozen is what the published code did to lora and ia3; --strategy {strategy} trains its heads")
    if heads == "train" and published and row.inject:
        raise InputError("--protocol published leaves the heads of lora and ia3 frozen: leave out --heads train, or the protocol")
    settings["heads"] = heads or ("frozen" if published and row.inject else "train")
    return settings


def inject_adapters(classifier, settings):
    """Put the strategy's adapters into the classifier's backbone, in place. Nothing to do for full, random and freeze75."""
    if inject := STRATEGIES[settings["strategy"]].inject:
        inject(classifier.backbone, settings)


def trainable_names(classifier, settings):
    """The names of the parameters that train, heads included or not by settings["heads"]. The one place that decides it."""
    names = STRATEGIES[settings["strategy"]].trains(classifier, settings)
    if not names:
        raise InputError(f"--strategy {settings['strategy']} with these flags freezes every parameter: nothing is left to train")
    return names


def train_only(classifier, names):
    """Set requires_grad on exactly these parameters. Raises ValueError for a name that is not a parameter."""
    parameters, names = dict(classifier.named_parameters()), set(names)
    if unknown := names - parameters.keys():
        raise ValueError(f"not parameters: {sorted(unknown)}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)


def classifier_on_meta(row, num_classes, settings, config=None):
    """The classifier with its adapters on torch's meta device: names and shapes, no memory. config: default that of the row's sizes."""
    with torch.device("meta"):
        classifier = TaxonClassifier(FAMILIES[row.family].model(config or backbone_config(row)), num_classes)
        inject_adapters(classifier, settings)
    return classifier
