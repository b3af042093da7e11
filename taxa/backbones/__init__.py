"""The backbones: a table of models, loading, the two architectures, and their masked-LM heads."""

from taxa.backbones.loading import backbone_config, find_model, load_backbone, read_config
from taxa.backbones.table import FAMILIES, MODELS, checked_config, get_model, table_name

__all__ = [
    "FAMILIES",
    "MODELS",
    "backbone_config",
    "checked_config",
    "find_model",
    "get_model",
    "load_backbone",
    "read_config",
    "table_name",
]
