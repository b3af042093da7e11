"""The table of models, and load_backbone().

Facts per row: hub id, pinned revision, sizes (the hub's config.json), learning rate and batch size per device (supplement of
Berman et al. 2025 and the configs of its published code). Adapter targets stand in the family's own file.
Any other checkpoint of the two architectures goes by its hub id, ORG/NAME: find_model() makes its row from its config.json.
"""

import contextlib
import json
import logging
import re
import sys
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from taxa import ASSETS
from taxa.backbones import dnabert2, nucleotide_transformer
from taxa.data.tokens import NTTokenizer, get_tokenizer
from taxa.errors import InputError, choose
from taxa.random_init import reinitialize
from taxa.runtime.files import UNREADABLE, read_text

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

    hub: Optional[str]  # None: nothing is published under this name; `packaged`, --weights, or a seeded random backbone
    revision: Optional[str]
    family: str
    tokenizer: Optional[str]  # tokens are prepared once per tokenizer and shared by all models that use it; None: none was found
    sizes: dict
    learning_rate: float
    batch_size: int  # sequences per device and step
    tokenizer_file: Optional[str] = None  # of a model outside the table
    packaged: Optional[Path] = None  # folder in the hub's format that comes with this package


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
        raise InputError(f"{source}: model_type is {found!r}: only Nucleotide Transformer v2 ('esm') and DNABERT-2 ('bert') can be built")
    family = FAMILIES[key]
    checked_config(family, values, source)
    if family.module.SIGN not in values:
        raise InputError(f"{source}: no {family.module.SIGN} in it: {family.module.SIGN_MEANS}")
    like = [row for row in MODELS.values() if row.hub and row.family == key][-1]
    return Model(name, None, key, "nt" if key == "nt" else None, values, like.learning_rate, like.batch_size)


def find_model(name, weights=None, revision=None):
    """The row of a model as a user names it. ORG/NAME is looked up in the folder `weights`, else on the hub at `revision` (or main):
    config.json tells the family and the sizes, tokenizer.json the tokens of a DNABERT; the row's revision is the commit found.

    Fetches those small files and nothing else, and none for a model of the table. Raises InputError as get_model and load_backbone do,
    and for a vocabulary that is not the Nucleotide Transformer's 6-mers.
    """
    name = name if isinstance(name, Model) else table_name(name)
    if isinstance(name, Model) or name in MODELS:
        return get_model(name)
    if Path(name).is_dir():
        raise InputError(f"--model {name} is a folder: give the model's name or hub id ORG/NAME, and the folder as --weights {name}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return get_model(name)  # says which names there are
    if weights:
        read_config(weights)  # says what is wrong with the folder
    config = _model_file(name, revision, weights, "config.json")
    if config is None:
        raise InputError(f"--model {name}: cannot fetch its config.json from the hub; with no network, give --weights DIR with its files")
    revision = None if weights else config.parent.name  # the hub's cache has a folder per commit
    row = get_model(name, _read_json(config))._replace(revision=revision)
    if row.family == "nt":
        vocabulary = _model_file(name, revision, weights, "vocab.txt")
        entries = vocabulary.read_text(encoding="utf-8").split() if vocabulary else NTTokenizer().vocabulary
        if row.sizes.get("vocab_size", 4107) != len(entries) or entries != NTTokenizer().vocabulary:
            raise InputError(f"{name}: its vocabulary is not the Nucleotide Transformer v2's 4,107 entries, and no other is built here")
        return row
    file = _model_file(name, revision, weights, "tokenizer.json")
    return row._replace(tokenizer=get_tokenizer("bpe", file).name, tokenizer_file=str(file)) if file else row


def _model_file(hub, revision, weights, name):
    """The path of a small file of a model outside the table, in the folder or fetched from the hub; None when there is none."""
    if weights:
        return Path(weights) / name if (Path(weights) / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

    try:
        with _quiet_transformers():
            return Path(hf_hub_download(hub, name, revision=revision))
    except EntryNotFoundError:  # not in the repository, or not in the cache of a machine without a network
        return None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise InputError(f"cannot fetch {name} of {hub} from the hub ({_first_line(error)}); with no network, give --weights DIR") from None


def backbone_config(name, weights=None):
    """The config of a model: the table's sizes, or those of DIR/config.json when weights=DIR."""
    row = find_model(name, weights)
    family = FAMILIES[row.family]
    if weights is None:
        return family.config(**row.sizes)
    return checked_config(family, read_config(weights), Path(weights) / "config.json")


def read_config(weights):
    """The values of DIR/config.json. Raises InputError when it is not there or no JSON."""
    if not Path(weights).is_dir():
        raise InputError(f"--weights {weights}: no such folder; give a folder with config.json and model.safetensors or pytorch_model.bin")
    if not (Path(weights) / "config.json").is_file():
        raise InputError(f"--weights {weights}: no config.json in it")
    return _read_json(Path(weights) / "config.json")


def _read_json(path):
    try:
        return json.loads(read_text(path))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


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


def load_backbone(name, weights=None, revision=None, pretrained=True):
    """Build one backbone, float32, on the CPU (or the default device).

    name: a name in MODELS, ORG/NAME, or a row. weights: a folder in the hub's format, which then decides the sizes (only the family
    comes from the name). revision: another revision of the hub's repository than the pinned one. pretrained=False: no file of weights
    is read and nothing is downloaded; weights ~ N(0, initializer_range) from torch's random state.
    Returns a PreTrainedModel: (input_ids (B, T), attention_mask (B, T)) -> last_hidden_state (B, T, H).
    Raises InputError for an unknown name, a missing or foreign folder, and keys that are missing or unexpected.
    """
    row = find_model(name, weights, revision)
    family = FAMILIES[row.family]
    if not pretrained:
        config = backbone_config(row, weights)
        with torch.device("meta"):  # so that nothing but reinitialize() draws: the same seed, the same weights in any transformers
            backbone = family.model(config)
        return reinitialize(backbone.to_empty(device="cpu"), config.initializer_range)
    if weights is not None:
        source, arguments, config = str(weights), {"local_files_only": True}, backbone_config(row, weights)
    elif row.hub is not None:
        source, arguments = row.hub, {"revision": revision or row.revision}
        config = checked_config(family, _hub_config(source, **arguments), f"{source} config.json")
    elif row.packaged is not None:
        source, arguments, config = str(row.packaged), {"local_files_only": True}, backbone_config(row, row.packaged)
    else:
        raise InputError(f"{name} has no published weights: give --weights DIR, or --strategy random")
    return _from_pretrained(family, source, arguments, config)


def _hub_config(source, revision):
    try:
        with _quiet_transformers():
            values, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    except OSError as error:
        raise InputError(f"cannot fetch {source} at revision {revision} from the hub ({_first_line(error)}); "
                         "with no network, give --weights DIR with its files") from None
    return values


def _from_pretrained(family, source, arguments, config):
    """transformers' from_pretrained, with every missing and every unexpected key accounted for by name."""
    try:
        with _quiet_transformers():
            model, info = family.model.from_pretrained(
                source, config=config, output_loading_info=True, weights_only=True, ignore_mismatched_sizes=True,
                torch_dtype=torch.float32, **arguments)  # transformers 5 would take the dtype of the file and round the rest to it
    except UNREADABLE as error:
        raise InputError(f"cannot load weights from {source}: {_first_line(error)}") from None
    prefix = family.model.base_model_prefix + "."
    unexpected = {key.removeprefix(prefix) for key in info["unexpected_keys"]} - family.module.dropped_keys(config)
    problems = {"missing": info["missing_keys"], "unexpected": unexpected, "of another shape": info["mismatched_keys"]}
    problems = [f"{kind}: {', '.join(sorted(map(str, keys)))}" for kind, keys in problems.items() if keys]
    if problems:
        raise InputError(f"weights from {source} do not fit: {'; '.join(problems)}")
    return model.float()  # transformers 4 keeps half-precision tensors of the file as they are


@contextlib.contextmanager
def _quiet_transformers():
    """No load report and no retry warnings: we say ourselves, by name, what does not fit. Bars only where someone watches."""
    hub_logger = logging.getLogger("huggingface_hub")
    before = transformers_logging.get_verbosity(), hub_logger.level, transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before[0])
        hub_logger.setLevel(before[1])
        if before[2]:
            transformers_logging.enable_progress_bar()


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parameter_counts(name):
    """What we hold and what we drop of the published checkpoint, from shapes alone (meta device): {"held": n, "dropped": n}."""
    row = get_model(name)
    family, config = FAMILIES[row.family], backbone_config(name)
    with torch.device("meta"):
        model = family.model(config)
    held = {key: p.numel() for key, p in model.named_parameters()}
    published = dict(model.published_parameters(held))
    return {"held": sum(held.values()), "dropped": sum(published.values()) - sum(held.values())}
