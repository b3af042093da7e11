"""The trainable fractions that the published code reports, from shapes alone."""

from taxa.backbones import get_model
from taxa.backbones.unused_tensors import published_sizes
from taxa.freeze import frozen_names
from taxa.inject import adapter_names
from taxa.strategies import classifier_on_meta
from taxa.study.published_runs import published_rows
from taxa.training.settings import settings_from_flags


def published_fraction(model, strategy, num_classes, r=None):
    """The trainable fraction that the published code reports for a row of the supplement's table.

    LoRA and (IA)3: adapters over everything, since the heads do not train there. "Everything"
    counts the tensors that the loss never uses. None for a strategy that the study did not run.
    """
    if strategy not in {row.strategy for row in published_rows()}:
        return None
    if strategy in ("full", "random"):
        return 1.0
    settings = settings_from_flags(model, strategy, protocol="published", r=r)
    classifier = classifier_on_meta(get_model(model), num_classes, settings)
    sizes = published_sizes(classifier)
    parameters = dict(classifier.named_parameters())
    adapters = sum(parameters[name].numel() for name in adapter_names(classifier))
    total = sum(sizes.values()) + adapters
    if strategy == "freeze75":
        return 1 - sum(sizes[name] for name in frozen_names(sizes)) / total
    return adapters / total
