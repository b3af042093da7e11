"""Strategy name -> what goes into the model and what trains: one row a strategy, one function.

Two protocols. `corrected` is the default: the heads train in every strategy, (IA)3 sits where its
authors put it, and freezing counts the parameters that the model uses. `published` does what the
published code does: for LoRA and (IA)3 the heads stay at their random initialisation, (IA)3 sits
elsewhere, and freezing also counts tensors that the loss never uses.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from taxa.backbones import FAMILIES, backbone_config
from taxa.backbones.unused_tensors import published_sizes
from taxa.errors import InputError
from taxa.freeze import frozen_names
from taxa.ia3 import inject_ia3
from taxa.inject import adapter_names
from taxa.lora import inject_lora
from taxa.model import TaxonClassifier


def everything(classifier, settings):
    return [name for name, _ in classifier.named_parameters()]


def all_but_the_frozen(classifier, settings):
    sizes = {name: p.numel() for name, p in classifier.named_parameters()}
    # what counts as "all" is all that the protocols differ in here (freeze.py)
    corrected = settings["protocol"] == "corrected"
    counted = sizes if corrected else published_sizes(classifier)
    frozen = set(frozen_names(counted, settings["freeze_fraction"]))
    return [name for name in sizes if name not in frozen]


def adapters_and_heads(classifier, settings):
    trains = set(adapter_names(classifier))
    if settings["heads"] == "train":
        trains |= {f"heads.{name}" for name, _ in classifier.heads.named_parameters()}
    return [name for name, _ in classifier.named_parameters() if name in trains]


def put_lora(backbone, settings):
    of_lora = ("targets", "r", "lora_alpha", "lora_dropout", "rslora")
    inject_lora(backbone, **{name: settings[name] for name in of_lora})


def put_ia3(backbone, settings):
    inject_ia3(backbone, settings["targets"], settings["feedforward_targets"])


class Strategy(NamedTuple):
    """One way to train. A new one is its file, a row here, and a test: docs/READING.md adds one."""

    label: str  # in tables and pictures
    colour: str  # in pictures: of Okabe and Ito's palette, told apart with any colour vision
    trains: Callable  # (classifier, settings) -> names of the parameters that train
    flags: dict = {}  # {setting of its own: default}  # noqa: RUF012 (nobody changes it)
    inject: Callable | None = None  # (backbone, settings) -> None: puts the adapters in


LORA = {"r": 4, "lora_alpha": 32.0, "lora_dropout": 0.1, "rslora": False, "targets": None}
IA3 = {"targets": None, "feedforward_targets": None}  # None: the family's, for this protocol
FREEZE = {"freeze_fraction": 0.75}

STRATEGIES = {
    "full": Strategy("full", "#0072B2", everything),
    "random": Strategy("random", "#777777", everything),  # train.py re-initialises it first
    "lora": Strategy("LoRA", "#D55E00", adapters_and_heads, LORA, put_lora),
    "ia3": Strategy("(IA)³", "#CC79A7", adapters_and_heads, IA3, put_ia3),
    "freeze75": Strategy("75% frozen", "#009E73", all_but_the_frozen, FREEZE),
}


def inject_adapters(classifier, settings):
    """Put the strategy's adapters into the classifier's backbone, in place, if it has any."""
    if inject := STRATEGIES[settings["strategy"]].inject:
        inject(classifier.backbone, settings)


def trainable_names(classifier, settings):
    """The names of the parameters that train. This is the one place that decides it."""
    strategy = settings["strategy"]
    names = STRATEGIES[strategy].trains(classifier, settings)
    if not names:
        what = f"--strategy {strategy} with these flags"
        raise InputError(f"{what} freezes every parameter: nothing is left to train")
    return names


def train_only(classifier, names):
    """Set requires_grad on exactly these parameters. Raises ValueError for an unknown name."""
    parameters, names = dict(classifier.named_parameters()), set(names)
    if unknown := names - parameters.keys():
        raise ValueError(f"not parameters: {sorted(unknown)}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)


def classifier_on_meta(row, num_classes, settings, config=None):
    """The classifier with its adapters on torch's meta device: names and shapes, no memory.

    row: the model's, of taxa.backbones. config: default that of the row's sizes.
    """
    with torch.device("meta"):
        backbone = FAMILIES[row.family].model(config or backbone_config(row))
        classifier = TaxonClassifier(backbone, num_classes)
        inject_adapters(classifier, settings)
    return classifier
