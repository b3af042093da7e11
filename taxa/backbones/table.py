"""The table of models: which backbones there are, and what each needs to be built.

Facts per row: hub id, pinned revision, sizes (the hub's config.json), learning rate and batch size
per device (supplement of Berman et al. 2025 and the configs of its published code). Any other
checkpoint of the two architectures goes by its hub id, ORG/NAME: loading.find_model() makes its row
from its config.json.

A new architecture is a file beside this one, a row in FAMILIES and a row in MODELS (docs/READING.md
adds one, step by step). The file has a PretrainedConfig with a model_type, and a PreTrainedModel
with a base_model_prefix, `embeddings`, `encoder.layer` and
forward(input_ids (B, T), attention_mask (B, T)) -> (B, T, H). Its parameters have the names of the
hub's checkpoints. The file defines

    LICENSE             of the published weights
    TOKENS_OF_1500_BP   about how many tokens 1500 bases make
    LORA_TARGETS        Linears that LoRA adapts by default
    IA3_TARGETS         {protocol: (Linears whose output (IA)3 scales, those whose input it scales)}
    LAYER_ORDER         what runs in a layer, in order; "attention.self" is the attention itself,
                        and names that begin with it and a dot are its projections
    MARKER_KEY          a key of config.json that other models of the same model_type lack
    MARKER_REASON       what that key means, for the error about a config.json without it
    REQUIRED_VALUES     {key of config.json: the only value that is computed}
    dropped_keys(config)   keys of the hub's checkpoints that are not loaded

pretrain.py also needs a row in masked_lm.MASKING.
"""

from pathlib import Path
from typing import NamedTuple

from taxa import ASSETS, STUDY_BATCH
from taxa.backbones import dnabert2, nucleotide_transformer
from taxa.errors import InputError, choose

# A config.json asks for memory before a byte of weights is read. The limit is 40 GB, 40 times the
# largest model of the table.
MAX_PARAMETERS = 10**10
# A layer of any width takes memory and time of its own, here counted as that of so many parameters.
LAYER_OVERHEAD = 10**6


class Family(NamedTuple):
    """One architecture: its classes, and the module with its targets and its key surgery."""

    model: type
    config: type
    module: object


class Model(NamedTuple):
    """One row of the table."""

    # None: nothing is published under this name. Its weights are then those of `packaged`, of
    # --weights, or of a seeded random backbone.
    hub: str | None
    revision: str | None
    family: str
    # Tokens are prepared once per tokenizer and shared by all models that use it. None: none found.
    tokenizer: str | None
    sizes: dict
    learning_rate: float
    batch_size: int  # sequences per device and step
    tokenizer_file: str | None = None  # of a model outside the table
    packaged: Path | None = None  # folder in the hub's format that comes with this package


FAMILIES = {
    "nt": Family(
        nucleotide_transformer.NucleotideTransformer,
        nucleotide_transformer.NucleotideTransformerConfig,
        nucleotide_transformer,
    ),
    "dnabert": Family(dnabert2.DNABert2, dnabert2.DNABert2Config, dnabert2),
}


def _sizes(H, layers, heads, I, **more):
    return {
        "hidden_size": H,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": I,
        **more,
    }


MODELS = {
    "nt50m": Model(
        hub="InstaDeepAI/nucleotide-transformer-v2-50m-multi-species",
        revision="81b29e5786726d891dbf929404ef20adca5b36f1",
        family="nt",
        tokenizer="nt",
        sizes=_sizes(512, 12, 16, 2048),
        learning_rate=2e-4,
        batch_size=STUDY_BATCH["nt50m"][0],
    ),
    "nt100m": Model(
        hub="InstaDeepAI/nucleotide-transformer-v2-100m-multi-species",
        revision="f34324c6fde36a4f635f0f1f06cac5d25acd6798",
        family="nt",
        tokenizer="nt",
        sizes=_sizes(512, 22, 16, 2048),
        learning_rate=1e-4,
        batch_size=STUDY_BATCH["nt100m"][0],
    ),
    "nt250m": Model(
        hub="InstaDeepAI/nucleotide-transformer-v2-250m-multi-species",
        revision="c0f0359229f36ff6bc3a021247eefe0a9c344bd1",
        family="nt",
        tokenizer="nt",
        sizes=_sizes(768, 24, 16, 3072),
        learning_rate=1e-4,
        batch_size=STUDY_BATCH["nt250m"][0],
    ),
    "dnabert2": Model(
        hub="zhihan1996/DNABERT-2-117M",
        revision="7bce263b15377fc15361f52cfab88f8b586abda0",
        family="dnabert",
        tokenizer="dnabert",
        sizes=_sizes(768, 12, 12, 3072),
        learning_rate=2.5e-5,
        batch_size=STUDY_BATCH["dnabert2"][0],
    ),
    "dnaberts": Model(
        hub="zhihan1996/DNABERT-S",
        revision="00e47f96cdea35e4b6f5df89e5419cbe47d490c6",
        family="dnabert",
        tokenizer="dnabert",
        sizes=_sizes(768, 12, 12, 3072),
        learning_rate=2.5e-5,
        batch_size=STUDY_BATCH["dnaberts"][0],
    ),
    # Small sizes of the same code, for demos and tests. An initializer_range of 0.02 suits widths
    # of 512 and more; at a width of 128 the model learns far more slowly with it.
    "tiny-nt": Model(
        hub=None,
        revision=None,
        family="nt",
        tokenizer="nt",
        sizes=_sizes(128, 2, 4, 256, initializer_range=0.1),
        learning_rate=3e-3,
        batch_size=32,
        packaged=ASSETS / "tiny_nt",
    ),
    "tiny-dnabert": Model(
        hub=None,
        revision=None,
        family="dnabert",
        tokenizer="tiny-dnabert",
        sizes=_sizes(128, 2, 4, 256, initializer_range=0.1, vocab_size=1024),
        learning_rate=3e-3,
        batch_size=32,
    ),
}


def table_name(name):
    """The table's name of a model given by the hub id of its row; any other name as it is."""
    return next((key for key, row in MODELS.items() if row.hub == name), name)


def get_model(name, values=None):
    """The row of a name in the table, or of ORG/NAME, made from the values of its config.json.

    A row is returned as it is. The learning rate and the batch size of ORG/NAME are those of the
    family's last model in the table. Raises InputError for a name that is not in the table, and for
    values of an architecture that is no family's.
    """
    if isinstance(name, Model):
        return name
    if values is None or name in MODELS:
        return MODELS[choose("model", name, MODELS)]
    source = f"{name} config.json"
    found = values.get("model_type") if isinstance(values, dict) else None
    matching = (key for key, family in FAMILIES.items() if family.config.model_type == found)
    key = next(matching, None)
    if key is None:
        raise InputError(
            f"{source}: model_type is {found!r}: only Nucleotide Transformer v2 ('esm') and "
            "DNABERT-2 ('bert') go by a hub id"
        )
    family = FAMILIES[key]
    published = [row for row in MODELS.values() if row.hub and row.family == key]
    if not published:
        raise InputError(
            f"{source}: model_type is {found!r}, of which the table has no published model: "
            "give the name of its row"
        )
    checked_config(family, values, source)
    marker = family.module.MARKER_KEY
    if marker not in values:
        raise InputError(f"{source}: no {marker} in it: {family.module.MARKER_REASON}")
    return Model(
        hub=name,
        revision=None,
        family=key,
        tokenizer="nt" if key == "nt" else None,
        sizes=values,
        learning_rate=published[-1].learning_rate,
        batch_size=published[-1].batch_size,
    )


def checked_config(family, values, source):
    """Build the family's config from the values of a config.json.

    Raises InputError for what this architecture does not compute.
    """
    expected = family.config.model_type
    if not isinstance(values, dict) or values.get("model_type") != expected:
        found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise InputError(
            f"{source}: model_type is {found!r}, but this family reads {expected!r}"
        )
    for key, only in family.module.REQUIRED_VALUES.items():
        if values.get(key, only) != only:
            raise InputError(
                f"{source}: {key} is {values[key]!r}; this architecture computes only {only!r}"
            )
    config = family.config(**values)
    for key in (
        "vocab_size", "hidden_size", "num_hidden_layers",
        "num_attention_heads", "intermediate_size",
    ):
        size = getattr(config, key)
        if type(size) is not int or size < 1:
            raise InputError(f"{source}: {key} is {size!r}, not a positive integer")
    H, I = config.hidden_size, config.intermediate_size
    per_layer = H * (4 * H + 3 * I)  # about: attention, gated feed-forward
    layers = config.num_hidden_layers * (per_layer + LAYER_OVERHEAD)
    parameters = config.vocab_size * H + layers
    if parameters > MAX_PARAMETERS:
        raise InputError(
            f"{source}: asks for {parameters:.1e} parameters; "
            f"more than {MAX_PARAMETERS:.0e} is no model of this kind"
        )
    if H % config.num_attention_heads:
        raise InputError(
            f"{source}: hidden_size {H} is no multiple of "
            f"{config.num_attention_heads} attention heads"
        )
    return config
