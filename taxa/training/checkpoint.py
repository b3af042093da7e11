"""ckpt.pt: what training changed, and everything needed to rebuild the rest.

A full or random run stores the whole network. lora, ia3 and freeze75 store their own parameters and
the heads, and name the base weights by source, revision and digest. sealed_file.py is the file.
"""

import hashlib
from pathlib import Path

import torch

from taxa.backbones import FAMILIES, checked_config, get_model, load_backbone
from taxa.data.tokens import TOKENIZERS, get_tokenizer
from taxa.errors import InputError
from taxa.model import TaxonClassifier
from taxa.random_init import reinitialize
from taxa.runtime.files import check_finite
from taxa.strategies import classifier_on_meta, inject_adapters, trainable_names
from taxa.training import peft_format, sealed_file

CHECKPOINT = "taxa checkpoint"  # the format of ckpt.pt
RESUME_STATE = "taxa resume state"  # of last.pt
VERSION = 2  # of both; version 1 was written by taxa before 1.0.0
SEED_OF_UNPUBLISHED = 0  # of the random base weights where a model has no published ones


def base_source(model, strategy, weights=None, revision=None):
    """Where a run's base weights come from: {"source": none, folder, hub, package or seed, ...}."""
    row = get_model(model)
    if strategy == "random":
        return {"source": "none", "config": str(Path(weights).resolve()) if weights else None}
    if weights:
        return {"source": "folder", "folder": str(Path(weights).resolve())}
    if row.hub:
        return {"source": "hub", "hub": row.hub, "revision": revision or row.revision}
    if row.packaged:
        return {"source": "package"}
    return {"source": "seed", "seed": SEED_OF_UNPUBLISHED}


def load_base(model, base):
    """The backbone that base_source() describes. Raises InputError as load_backbone does."""
    if base["source"] == "none":
        return load_backbone(model, base["config"], pretrained=False)
    if base["source"] == "folder":
        return load_backbone(model, base["folder"])
    if base["source"] in ("hub", "package"):
        return load_backbone(model, revision=base.get("revision"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base["seed"])
        return load_backbone(model, pretrained=False)


def weights_digest(backbone):
    """Hex SHA-256 over names, shapes and float32 bytes of all parameters, sorted by name."""
    return state_digest(backbone.state_dict())


def state_digest(state):
    """The same of {name: tensor}, as a checkpoint's "state" holds what training changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def changed_state(classifier, names):
    """{name: tensor on the CPU} of the parameters in `names`, and of the heads, which are new."""
    return {name: p.detach().cpu().clone() for name, p in _changed(classifier, names).items()}


def _changed(classifier, names):
    names = set(names)
    every = classifier.named_parameters()
    return {name: p for name, p in every if name in names or name.startswith("heads.")}


def load_state(classifier, state, names):
    """Copy a state of changed_state() into the classifier. Raises InputError as check_state()."""
    check_state(classifier, state, names)
    classifier.load_state_dict(state, strict=False)


def check_state(classifier, state, names):
    """Raise InputError when a parameter of changed_state() is missing, unknown or misshapen.

    The classifier may be on the meta device.
    """
    expected = _changed(classifier, names)
    differ = [f"no {name}" for name in sorted(expected.keys() - state.keys())]
    differ += [f"unknown {name}" for name in sorted(state.keys() - expected.keys())]
    for name, p in expected.items():
        if name in state and state[name].shape != p.shape:
            differ.append(f"{name} is {tuple(state[name].shape)}, not {tuple(p.shape)}")
    if differ:
        raise InputError(f"the checkpoint does not fit its model: {', '.join(differ)}")


def save(path, content, format=CHECKPOINT):
    """Write a checkpoint (or, with format=RESUME_STATE, last.pt)."""
    sealed_file.write(path, {"format": format, "version": VERSION, **content})


def read(path, format=CHECKPOINT):
    """The content of a checkpoint (or of last.pt, or of a folder of export.py --adapters).

    Raises InputError for a file that is missing, damaged, of another version, or none of them.
    """
    is_adapters = format == CHECKPOINT and peft_format.is_adapter_folder(path)
    content = peft_format.read_checkpoint(path) if is_adapters else _read_file(path, format)
    version = content.get("version")
    if version != VERSION:
        why = f"checkpoint version {version}, but this code reads version {VERSION}"
        if version == 1:
            why = "written by a version of taxa before 1.0.0, which this one does not read"
        raise InputError(f"{path}: {why}")
    state = content.get("state")
    if isinstance(state, dict):
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        check_finite(path, tensors)
    return content


def _read_file(path, format):
    try:
        content = sealed_file.read(path)
    except FileNotFoundError:
        hint = "train.py writes ckpt.pt into its run folder"
        if format == RESUME_STATE:
            hint = "nothing to resume: leave out --resume"
        raise InputError(f"{path}: no such file; {hint}") from None
    except IsADirectoryError:
        hint = "give the ckpt.pt of a run, or a folder of export.py --adapters"
        raise InputError(f"{path}: a folder; {hint}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != format:
        hint = ": it is the state for --resume; give the ckpt.pt beside it"
        raise InputError(f"{path}: not a checkpoint of train.py{hint * (found == RESUME_STATE)}")
    return content


def tokenizer_of(content, path, file=None):
    """The tokenizer that a checkpoint was trained with.

    file: its tokenizer.json, where the package and the hub have none. Raises InputError, which
    names the checkpoint by its path, for a tokenizer of another vocabulary.
    """
    name = content["tokenizer"]["name"]
    tokenizer = get_tokenizer(name if name in TOKENIZERS else "bpe", file)
    if content["tokenizer"]["digest"] != tokenizer.digest:
        raise InputError(
            f"the vocabulary of the tokenizer {name} is not the one that {path} was trained with; "
            "--tokenizer-file PATH gives another"
        )
    return tokenizer


def window_of(content, path="the checkpoint"):
    """{"length": bases of the longest training sequence, "varied": whether others were shorter}.

    Raises InputError, which names the checkpoint by its path, for what is no length.
    """
    window = content.get("window")
    length = window.get("length") if isinstance(window, dict) else None
    if type(length) is not int or length < 1:
        what = "which is no length of training sequences"
        raise InputError(f"{path}: its window is {window}, {what}")
    return window


def window_text(window):
    """window_of() in words."""
    return f"{'up to ' * window['varied']}{window['length']:,} bases"


def skeleton(content):
    """The trained classifier with what the checkpoint holds; the rest is on the meta device.

    Raises InputError when what the checkpoint holds is not of the sizes that it names, before any
    memory of those sizes is asked for.
    """
    row = get_model(content["model"], content["config"])
    num_classes = {rank: len(table) for rank, table in content["classes"].items()}
    source = f"the checkpoint's {content['model']} config.json"
    config = checked_config(FAMILIES[row.family], content["config"], source)
    classifier = classifier_on_meta(row, num_classes, content["settings"], config)
    check_state(classifier, content["state"], trainable_names(classifier, content["settings"]))
    classifier.load_state_dict(content["state"], strict=False, assign=True)
    return classifier


def rebuild(content, weights=None):
    """The trained classifier of a checkpoint, adapters in place, in eval mode.

    weights: a folder to take the base weights from instead. Raises InputError when the base weights
    cannot be found or are not, by digest, those that the run began with.
    """
    skeleton(content)  # checks it
    row = get_model(content["model"], content["config"])
    family = FAMILIES[row.family]
    num_classes = {rank: len(table) for rank, table in content["classes"].items()}
    if content["base"]["source"] == "none" or content["settings"]["strategy"] == "full":
        if weights:
            why = "this checkpoint holds every weight of its model"
            raise InputError(f"--weights does nothing here: {why}; leave it out")
        with torch.device("meta"):
            backbone = family.model(family.config(**content["config"]))
        backbone = reinitialize(backbone.to_empty(device="cpu"))
    else:
        base = {"source": "folder", "folder": weights} if weights else content["base"]
        backbone = load_base(row, base)
        found, expected = weights_digest(backbone), content["base"]["digest"]
        if found != expected:
            source = base.get("folder") or base.get("hub") or "the seed"
            raise InputError(
                f"the base weights from {source} are not those of the run: "
                f"digest {found[:12]}, the checkpoint says {expected[:12]}"
            )
    classifier = TaxonClassifier(backbone, num_classes)
    inject_adapters(classifier, content["settings"])
    load_state(classifier, content["state"], trainable_names(classifier, content["settings"]))
    return classifier.eval()
