"""The table of models: which backbones there are, and what each needs to be built.

Facts per row: hub id, pinned revision, sizes (the hub's config.json), learning rate and batch size per device (supplement of
Berman et al. 2025 and the configs of its published code). Any other checkpoint of the two architectures goes by its hub id, ORG/NAME:
loading.find_model() makes its row from its config.json.

A new architecture is a file beside this one, a row in FAMILIES and a row in MODELS (docs/READING.md adds one, step by step). The file has a
PretrainedConfig with a model_type, a PreTrainedModel with a base_model_prefix, `embeddings`, `encoder.layer` and
forward(input_ids (B, T), attention_mask (B, T)) -> (B, T, H), parameter names as the hub's checkpoints have them, and defines

    LICENSE             of the published weights
    TOKENS_OF_1500_BP   about how many tokens 1500 bases make
    LORA_TARGETS        Linears that LoRA adapts by default
    IA3_TARGETS         {protocol: (Linears whose output (IA)3 scales, Linears whose input it scales)}
    LAYER_ORDER         what runs in a layer, in order; "attention.self" is the attention itself, what begins so are its projections
    SIGN, SIGN_MEANS    a key of config.json that other models of the same model_type lack, and what it means
    FIXED               {key of config.json: the only value that is computed}
    dropped_keys(config)   keys of the hub's checkpoints that are not loaded

pretrain.py also needs a row in masked_lm.MASKING.
"""

from pathlib import Path
from typing import NamedTuple

from taxa import ASSETS
from taxa.backbones import dnabert2, nucleotide_transformer
from taxa.errors import InputError, choose

# A config.json asks for memory before a byte of weights is read: 40 GB at most, 40 times the largest model of the table. A layer of any
# width takes memory and time of its own, here as that of so many parameters.
MAX_PARAMETERS, LAYER_OVERHEAD = 10**10, 10**6

class Family(NamedTuple):
    """One architecture: its classes, and the module that holds its adapter targets and its key surgery."""

    model: type
    config: type
    module: object


class Model(NamedTuple):
    """One row of the table."""

    hub: str | None  # None: nothing is published under this name; `packaged`, --weights, or a seeded random backbone
    revision: str | None
    family: str
    tokenizer: str | None  # tokens are prepared once per tokenizer and shared by all models that use it; None: none was found
    sizes: dict
    learning_rate: float
    batch_size: int  # sequences per device and step
    tokenizer_file: str | None = None  # of a model outside the table
    packaged: Path | None = None  # folder in the hub's format that comes with this package


FAMILIES = {
    "nt": Family(nucleotide_transformer.NucleotideTransformer, nucleotide_transformer.NucleotideTransformerConfig,
                 nucleotide_transformer),
    "dnabert": Family(dnabert2.DNABert2, dnabert2.DNABert2Config, dnabert2),
}


def _sizes(H, layers, heads, I, **more):
    return dict(hidden_size=H, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=I, **more)


MODELS = {
    "nt50m": Model("InstaDeepAI/nucleotide-transformer-v2-50m-multi-species", "81b29e5786726d891dbf929404ef20adca5b36f1",
                   "nt", "nt", _sizes(512, 12, 16, 2048), 2e-4, 128),
    "nt100m": Model("InstaDeepAI/nucleotide-transformer-v2-100m-multi-species", "f34324c6fde36a4f635f0f1f06cac5d25acd6798",
                    "nt", "nt", _sizes(512, 22, 16, 2048), 1e-4, 64),
    "nt250m": Model("InstaDeepAI/nucleotide-transformer-v2-250m-multi-species", "c0f0359229f36ff6bc3a021247eefe0a9c344bd1",
                    "nt", "nt", _sizes(768, 24, 16, 3072), 1e-4, 64),
    "dnabert2": Model("zhihan1996/DNABERT-2-117M", "7bce263b15377fc15361f52cfab88f8b586abda0",
                      "dnabert", "dnabert", _sizes(768, 12, 12, 3072), 2.5e-5, 16),
    "dnaberts": Model("zhihan1996/DNABERT-S", "00e47f96cdea35e4b6f5df89e5419cbe47d490c6",
                      "dnabert", "dnabert", _sizes(768, 12, 12, 3072), 2.5e-5, 16),
    # small sizes of the same code, for demos and tests; 0.02 suits widths of 512 and more, at 128 it learns far more slowly
    "tiny-nt": Model(None, None, "nt", "nt", _sizes(128, 2, 4, 256, initializer_range=0.1), 3e-3, 32, packaged=ASSETS / "tiny_nt"),
    "tiny-dnabert": Model(None, None, "dnabert", "tiny-dnabert", _sizes(128, 2, 4, 256, initializer_range=0.1, vocab_size=1024), 3e-3, 32),
}


def table_name(name):
    """The table's name of a model given by the hub id of its row; any other name as it is."""
    return next((key for key, row in MODELS.items() if row.hub == name), name)


def get_model(name, values=None):
    """The row of a name in the table, or the row of ORG/NAME made from the values of its config.json; a row is returned as it is.

    Learning rate and batch size of ORG/NAME are those of the family's last model in the table. Raises InputError for a name that is
    not in the table, and for values of an architecture that is neither family's.
    """
    if isinstance(name, Model):
        return name
    if values is None or name in MODELS:
        return MODELS[choose("model", name, MODELS)]
    source = f"{name} config.json"
    found = values.get("model_type") if isinstance(values, dict) else None
    key = next((key for key, family in FAMILIES.items() if family.config.model_type == found), None)
    if key is None:
        raise InputError(f"{source}: model_type is {found!r}: only Nucleotide Transformer v2 ('esm') and DNABERT-2 ('bert') go by a hub id")
    family, like = FAMILIES[key], [row for row in MODELS.values() if row.hub and row.family == key][-1:]
    if not like:
        raise InputError(f"{source}: model_type is {found!r}, of which the table has no published model: give the name of its row")
    checked_config(family, values, source)
    if family.module.SIGN not in values:
        raise InputError(f"{source}: no {family.module.SIGN} in it: {family.module.SIGN_MEANS}")
    return Model(name, None, key, "nt" if key == "nt" else None, values, like[0].learning_rate, like[0].batch_size)


def checked_config(family, values, source):
    """Build the family's config from a config.json's values, refusing what this architecture does not compute."""
    if not isinstance(values, dict) or values.get("model_type") != family.config.model_type:
        found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise InputError(f"{source}: model_type is {found!r}, but this family reads {family.config.model_type!r}")
    for key, only in family.module.FIXED.items():
        if values.get(key, only) != only:
            raise InputError(f"{source}: {key} is {values[key]!r}; this architecture computes only {only!r}")
    config = family.config(**values)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        size = getattr(config, key)
        if type(size) is not int or size < 1:
            raise InputError(f"{source}: {key} is {size!r}, not a positive integer")
    per_layer = config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)  # about: attention, gated feed-forward
    parameters = config.vocab_size * config.hidden_size + config.num_hidden_layers * (per_layer + LAYER_OVERHEAD)
    if parameters > MAX_PARAMETERS:
        raise InputError(f"{source}: asks for {parameters:.1e} parameters; more than {MAX_PARAMETERS:.0e} is no model of this kind")
    if config.hidden_size % config.num_attention_heads:
        raise InputError(f"{source}: hidden_size {config.hidden_size} is no multiple of {config.num_attention_heads} attention heads")
    return config
