"""Strategy name -> what is injected and what trains. Everything that decides which parameter gets a gradient is in this file.

Two protocols. `corrected`, the default: the heads train in every strategy, (IA)3 sits where its authors put it, and freezing counts the
parameters that the model uses. `published`: what the published code does: for LoRA and (IA)3 the heads stay at their random
initialisation, (IA)3 sits elsewhere, and freezing also counts tensors that the loss never uses.
"""

import torch

from taxa.backbones import FAMILIES, backbone_config, get_model
from taxa.errors import InputError
from taxa.freeze import frozen_names
from taxa.ia3 import IA3Linear, inject_ia3
from taxa.lora import LoRALinear, inject_lora
from taxa.model import TaxonClassifier

STRATEGIES = ("full", "random", "lora", "ia3", "freeze75")
PROTOCOLS = ("corrected", "published")

# Flags that only some strategies read: flag -> (default, strategies). Given with another strategy they are refused.
STRATEGY_FLAGS = {
    "r": (4, ("lora",)),
    "lora_alpha": (32.0, ("lora",)),
    "lora_dropout": (0.1, ("lora",)),
    "rslora": (False, ("lora",)),
    "targets": (None, ("lora", "ia3")),
    "feedforward_targets": (None, ("ia3",)),
    "freeze_fraction": (0.75, ("freeze75",)),
}


def settings_from_flags(model, strategy, protocol="corrected", heads=None, **flags):
    """Check a combination of flags and fill in the defaults. Returns a plain dict, which is what the checkpoint stores.

    model: a name in the table, or a row. A flag that is None was not given. Raises InputError for a combination that makes no sense.
    """
    module = FAMILIES[get_model(model).family].module
    settings = {"strategy": strategy, "protocol": protocol}
    for flag, (default, strategies) in STRATEGY_FLAGS.items():
        value = flags.pop(flag, None)
        if value is not None and strategy not in strategies:
            raise InputError(f"--{flag.replace('_', '-')} is for --strategy {' or '.join(strategies)}; with --strategy {strategy} "
                             "it would do nothing: leave it out")
        if strategy in strategies:
            settings[flag] = default if value is None else value
    if settings.get("freeze_fraction") == 0:
        raise InputError("--freeze-fraction 0 freezes nothing: that is --strategy full")
    if flags:
        raise TypeError(f"unknown settings: {', '.join(flags)}")

    published = protocol == "published"
    if strategy == "lora":
        settings["targets"] = list(settings["targets"] or module.LORA_TARGETS)
    if strategy == "ia3":
        outputs, inputs = module.IA3[protocol]
        given = settings["targets"] is not None or settings["feedforward_targets"] is not None
        settings["targets"] = list(settings["targets"] or (() if given else outputs))
        settings["feedforward_targets"] = list(settings["feedforward_targets"] or (() if given else inputs))

    adapters = strategy in ("lora", "ia3")
    if heads == "frozen" and not adapters:
        raise InputError(f"--heads frozen is what the published code did to lora and ia3; --strategy {strategy} trains its heads")
    if heads == "train" and published and adapters:
        raise InputError("--protocol published leaves the heads of lora and ia3 frozen: leave out --heads train, or the protocol")
    settings["heads"] = heads or ("frozen" if published and adapters else "train")
    return settings


def inject(classifier, settings):
    """Put the strategy's adapters into the classifier's backbone, in place. Nothing to do for full, random and freeze75."""
    if settings["strategy"] == "lora":
        inject_lora(classifier.backbone, settings["targets"], settings["r"], settings["lora_alpha"], settings["lora_dropout"],
                    settings.get("rslora", False))  # older checkpoints lack it
    elif settings["strategy"] == "ia3":
        inject_ia3(classifier.backbone, settings["targets"], settings["feedforward_targets"])


def trainable_names(classifier, settings):
    """The names of the parameters that train, heads included or not by settings["heads"]. The one place that decides it."""
    strategy = settings["strategy"]
    every = {name: p.numel() for name, p in classifier.named_parameters()}
    heads = [name for name in every if name.startswith("heads.")] if settings["heads"] == "train" else []
    if strategy in ("full", "random"):
        return list(every)
    if strategy == "freeze75":
        sizes = every if settings["protocol"] == "corrected" else published_sizes(classifier)
        frozen = set(frozen_names(sizes, settings["freeze_fraction"]))
        names = [name for name in every if name not in frozen]
        if not names:
            raise InputError(f"--freeze-fraction {settings['freeze_fraction']} freezes every parameter: nothing is left to train")
        return names
    return [name for name in every if name in _adapter_names(classifier)] + heads


def _adapter_names(classifier):
    """The adapters' own parameters, told by the type of the module that holds them."""
    own = {LoRALinear: ("lora_A", "lora_B"), IA3Linear: ("ia3_l",)}
    return {f"{name}.{key}" for name, module in classifier.named_modules() for key in own.get(type(module), ())}


def train_only(classifier, names):
    """Set requires_grad on exactly these parameters. Raises ValueError for a name that is not a parameter."""
    parameters = dict(classifier.named_parameters())
    if set(names) - set(parameters):
        raise ValueError(f"not parameters: {sorted(set(names) - set(parameters))}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in set(names))


def published_sizes(classifier):
    """{name: elements} of the published model in its registration order, under our names: unused tensors counted, adapters not."""
    adapters = _adapter_names(classifier)
    every = {name: p.numel() for name, p in classifier.named_parameters() if name not in adapters}
    held = {name.removeprefix("backbone."): n for name, n in every.items() if name.startswith("backbone.")}
    sizes = {f"backbone.{name}": n for name, n in classifier.backbone.published_parameters(held)}
    return sizes | {name: n for name, n in every.items() if name.startswith("heads.")}


def published_fraction(model, strategy, num_classes, r=None):
    """The trainable fraction that the published code reports for a row of the table, from shapes alone (meta device).

    LoRA and (IA)3: adapters over everything, since the heads do not train there. "Everything" counts the unused tensors.
    """
    if strategy in ("full", "random"):
        return 1.0
    settings = settings_from_flags(model, strategy, protocol="published", r=r)
    with torch.device("meta"):
        classifier = TaxonClassifier(FAMILIES[get_model(model).family].model(backbone_config(model)), num_classes)
        inject(classifier, settings)
    sizes = published_sizes(classifier)
    adapters = sum(p.numel() for name, p in classifier.named_parameters() if name in _adapter_names(classifier))
    total = sum(sizes.values()) + adapters
    if strategy == "freeze75":
        return 1 - sum(sizes[name] for name in frozen_names(sizes)) / total
    return adapters / total
