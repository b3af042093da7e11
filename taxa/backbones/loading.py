"""load_backbone(): the two architectures with weights.

The weights come from the hub, from a folder in the hub's format, or from a seed.
"""

import contextlib
import logging
import re
import sys
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from taxa.backbones.table import FAMILIES, MODELS, Model, checked_config, get_model, table_name
from taxa.data.tokens import NTTokenizer, get_tokenizer
from taxa.errors import InputError
from taxa.random_init import reinitialize
from taxa.runtime.files import UNREADABLE, check_finite, read_json
from taxa.runtime.hub import cache_only

# The name of from_pretrained's argument for the dtype.
DTYPE = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"


def find_model(name, weights=None, revision=None):
    """The row of a model as a user names it.

    ORG/NAME is looked up in the folder `weights`, else on the hub at `revision` (or main).
    config.json tells the family and the sizes, tokenizer.json the tokens of a DNABERT. The row's
    revision is the commit that was found.

    Fetches those small files and nothing else, and none for a model of the table. Raises InputError
    as get_model and load_backbone do, and for a vocabulary that is not the Nucleotide Transformer's
    6-mers.
    """
    name = name if isinstance(name, Model) else table_name(name)
    if isinstance(name, Model) or name in MODELS:
        return get_model(name)
    if Path(name).is_dir():
        raise InputError(
            f"--model {name} is a folder: give the model's name or hub id ORG/NAME, "
            f"and the folder as --weights {name}"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return get_model(name)  # says which names there are
    if weights:
        read_config(weights)  # says what is wrong with the folder
    config = _model_file(name, revision, weights, "config.json")
    if config is None:
        raise InputError(
            f"--model {name}: cannot fetch its config.json from the hub; "
            "with no network, give --weights DIR with its files"
        )
    revision = None if weights else config.parent.name  # the hub's cache has a folder per commit
    row = get_model(name, read_json(config))._replace(revision=revision)
    if row.family == "nt":
        vocabulary = _model_file(name, revision, weights, "vocab.txt")
        expected = NTTokenizer().vocabulary
        entries = vocabulary.read_text(encoding="utf-8").split() if vocabulary else expected
        if row.sizes.get("vocab_size", 4107) != len(entries) or entries != expected:
            raise InputError(
                f"{name}: its vocabulary is not the Nucleotide Transformer v2's 4,107 entries, "
                "and no other is built here"
            )
        return row
    file = _model_file(name, revision, weights, "tokenizer.json")
    if not file:
        return row
    return row._replace(tokenizer=get_tokenizer("bpe", file).name, tokenizer_file=str(file))


def _model_file(hub, revision, weights, name):
    """The path of a small file of a model outside the table, or None when there is none.

    The file is in the folder `weights`, or is fetched from the hub.
    """
    if weights:
        path = Path(weights) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

    try:
        with _quiet_transformers():
            path = hf_hub_download(hub, name, revision=revision, local_files_only=cache_only())
            return Path(path)
    except EntryNotFoundError:
        # Not in the repository, or not in the cache of a machine without a network.
        return None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise InputError(
            f"cannot fetch {name} of {hub} from the hub ({_first_line(error)}); "
            "with no network, give --weights DIR"
        ) from None


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
        raise InputError(
            f"--weights {weights}: no such folder; give a folder with config.json and "
            "model.safetensors or pytorch_model.bin"
        )
    if not (Path(weights) / "config.json").is_file():
        raise InputError(f"--weights {weights}: no config.json in it")
    return read_json(Path(weights) / "config.json")


def load_backbone(name, weights=None, revision=None, pretrained=True):
    """Build one backbone, float32, on the CPU (or the default device).

    name: a name in MODELS, ORG/NAME, or a row.
    weights: a folder in the hub's format. It then decides the sizes; only the family comes from the
    name.
    revision: another revision of the hub's repository than the pinned one.
    pretrained=False: no file of weights is read and nothing is downloaded. The weights are drawn
    from N(0, initializer_range) with torch's random state.

    Returns a PreTrainedModel:
    (input_ids (B, T), attention_mask (B, T)) -> last_hidden_state (B, T, H).
    Raises InputError for an unknown name, a missing or foreign folder, and keys that are missing or
    unexpected.
    """
    row = find_model(name, weights, revision)
    family = FAMILIES[row.family]
    if not pretrained:
        config = backbone_config(row, weights)
        # On the meta device nothing but reinitialize() draws: the same seed gives the same weights
        # in any transformers.
        with torch.device("meta"):
            backbone = family.model(config)
        return reinitialize(backbone.to_empty(device="cpu"), config.initializer_range)
    if weights is not None:
        source = str(weights)
        arguments = {"local_files_only": True}
        config = backbone_config(row, weights)
    elif row.hub is not None:
        source = row.hub
        arguments = {"revision": revision or row.revision, "local_files_only": cache_only()}
        values = _hub_config(source, **arguments)
        config = checked_config(family, values, f"{source} config.json")
    elif row.packaged is not None:
        source = str(row.packaged)
        arguments = {"local_files_only": True}
        config = backbone_config(row, row.packaged)
    else:
        raise InputError(
            f"{name} has no published weights: give --weights DIR, or --strategy random"
        )
    return _from_pretrained(family, source, arguments, config)


def _hub_config(source, revision, local_files_only):
    try:
        with _quiet_transformers():
            values, _ = PretrainedConfig.get_config_dict(
                source, revision=revision, local_files_only=local_files_only
            )
    except OSError as error:
        raise InputError(
            f"cannot fetch {source} at revision {revision} from the hub ({_first_line(error)}); "
            "with no network, give --weights DIR with its files, or have them in the hub's cache "
            "(HF_HUB_OFFLINE=1 looks there alone)"
        ) from None
    return values


def _from_pretrained(family, source, arguments, config):
    """transformers' from_pretrained; an error names every missing and every unexpected key."""
    try:
        with _quiet_transformers():
            model, info = family.model.from_pretrained(
                source,
                config=config,
                output_loading_info=True,
                weights_only=True,
                ignore_mismatched_sizes=True,
                # transformers 5 would take the dtype of the file and round the rest to it.
                **{DTYPE: torch.float32},
                **arguments,
            )
    except UNREADABLE as error:
        raise InputError(f"cannot load weights from {source}: {_first_line(error)}") from None
    prefix = family.model.base_model_prefix + "."
    unexpected = {key.removeprefix(prefix) for key in info["unexpected_keys"]}
    kinds = {
        "missing": info["missing_keys"],
        "unexpected": unexpected - family.module.dropped_keys(config),
        "of another shape": info["mismatched_keys"],
    }
    problems = [
        f"{kind}: {', '.join(sorted(map(str, keys)))}" for kind, keys in kinds.items() if keys
    ]
    if problems:
        raise InputError(f"weights from {source} do not fit: {'; '.join(problems)}")
    check_finite(f"weights from {source}", model.state_dict())
    return model.float()  # transformers 4 keeps half-precision tensors of the file as they are


@contextlib.contextmanager
def _quiet_transformers():
    """No load report and no retry warnings: we say ourselves, by name, what does not fit.

    Progress bars are shown only where someone watches.
    """
    hub_logger = logging.getLogger("huggingface_hub")
    verbosity = transformers_logging.get_verbosity()
    hub_level = hub_logger.level
    with_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logger.setLevel(hub_level)
        if with_bars:
            transformers_logging.enable_progress_bar()


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
