"""ckpt.pt: what training changed, and everything needed to rebuild the rest.

A full or random run stores the whole network; lora, ia3 and freeze75 store their own parameters and the heads, and name the base
weights by source, revision and digest. Files hold tensors, numbers, strings, lists and dicts only, and are read with weights_only.

A file is the zip that torch.save writes, ended by a comment, as zip files may be: the SHA-256 of all that stands before it. So one file
carries its own proof, torch.load still reads it, and a byte that changed on a disk or a copy cut short is seen before anything is used.
"""

import hashlib
import os
import pickletools
import sys
import zipfile
from pathlib import Path

import torch

from taxa.backbones import FAMILIES, checked_config, get_model, load_backbone
from taxa.data.tokens import TOKENIZERS, get_tokenizer
from taxa.errors import InputError
from taxa.model import TaxonClassifier
from taxa.random_init import reinitialize
from taxa.runtime.files import UNREADABLE, check_finite, replacing
from taxa.strategies import classifier_on_meta, inject_adapters, trainable_names
from taxa.training import peft_format

CHECKPOINT, RESUME_STATE, VERSION = "taxa checkpoint", "taxa resume state", 1
SEAL, SEAL_BYTES = b"taxa sha256 ", 12 + 64  # the comment: these letters, then the digest in hex
ITEM_BYTES = {f"torch {kind}Storage": size for kind, size in {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4,
                                                              "Short": 2, "Char": 1, "Byte": 1, "Bool": 1}.items()}
OLD_WINDOW = {"length": 1500, "varied": False}  # of checkpoints that do not say it: what was then predict.py's default
SEED_OF_UNPUBLISHED = 0  # of the random base weights that stand in where a model has no published ones


def base_source(model, strategy, weights=None, revision=None):
    """Where the base weights of a run come from: {"source": "none" | "folder" | "hub" | "package" | "seed", ...}, as the
    checkpoint stores it."""
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
    if base["source"] == "hub":
        return load_backbone(model, revision=base["revision"])
    if base["source"] == "package":
        return load_backbone(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base["seed"])
        return load_backbone(model, pretrained=False)


def weights_digest(backbone):
    """Hex SHA-256 over names, shapes and float32 bytes of all parameters, in the order of the names."""
    return state_digest(backbone.state_dict())


def state_digest(state):
    """The same of {name: tensor}, as a checkpoint's "state" holds what training changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def changed_state(classifier, names):
    """{name: tensor on the CPU} of the parameters in `names` and of the heads, which no base weights hold."""
    return {name: p.detach().cpu().clone() for name, p in _changed(classifier, names).items()}


def _changed(classifier, names):
    names = set(names)
    return {name: p for name, p in classifier.named_parameters() if name in names or name.startswith("heads.")}


def load_state(classifier, state, names):
    """Copy `state` into the classifier: exactly the parameters that changed_state() takes for `names`.

    Raises InputError when one is missing, unknown or of another shape.
    """
    check_state(classifier, state, names)
    classifier.load_state_dict(state, strict=False)


def check_state(classifier, state, names):
    """Raise InputError unless load_state() would do. The classifier may be on the meta device."""
    expected = _changed(classifier, names)
    differ = [f"no {name}" for name in sorted(expected.keys() - state.keys())]
    differ += [f"unknown {name}" for name in sorted(state.keys() - expected.keys())]
    shapes = {name: (tuple(state[name].shape), tuple(p.shape)) for name, p in expected.items() if name in state}
    differ += [f"{name} is {found}, not {shape}" for name, (found, shape) in shapes.items() if found != shape]
    if differ:
        raise InputError(f"the checkpoint does not fit its model: {', '.join(differ)}")


def save(path, content, format=CHECKPOINT):
    """Write a checkpoint (or, with format=RESUME_STATE, last.pt) under a temporary name, seal it, and rename it."""
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            try:
                torch.save({"format": format, "version": VERSION, **content}, file)
            except RuntimeError as error:  # torch's own, of a stream that lost count; what the disk said is behind it
                raise error.__context__ if isinstance(error.__context__, OSError) else error
        seal(temporary)


def seal(path):
    """End a zip file that has no comment with one: the SHA-256 of every byte before it."""
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(SEAL_BYTES.to_bytes(2, "little"))  # a zip file's last field: how long its comment is
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        file.write(SEAL + digest.hexdigest().encode())


def check_seal(path):
    """Raise InputError when a file is not sealed, when a byte of it has changed, or when it would unpack to more than its own size."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - SEAL_BYTES
        file.seek(max(size, 0))
        found = file.read()
        if not found.startswith(SEAL) or size < 0:
            raise InputError(f"{path}: not a checkpoint of train.py, or cut short (it does not end in its digest)")
        file.seek(0)
        digest = hashlib.sha256()
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
        if found != SEAL + digest.hexdigest().encode():
            raise InputError(f"{path}: damaged: its bytes are not those that were written (SHA-256)")
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > os.path.getsize(path):
                raise InputError(f"{path}: not a checkpoint of train.py: it unpacks to more than its own size")


def check_storages(path):
    """Raise InputError when the pickle in a checkpoint asks for a storage of more bytes than the member of the zip behind it has.

    Nothing is built: the pickle's instructions are followed with its own strings, numbers and tuples, None in the place of all else, up to
    each persistent id, ("storage", class, key, location, numbers), as torch.save writes it. (torch 2.6 believes the pickle, and reads on
    behind what it has.)
    """
    with zipfile.ZipFile(path) as archive:
        sizes = {member.filename.lower(): member.file_size for member in archive.infolist()}  # as torch looks them up
        pickled, = (member for member in archive.namelist() if member.endswith("/data.pkl"))
        if len(sizes) < len(archive.namelist()):
            raise InputError(f"{path}: not a checkpoint of train.py: two of its members have one name")
        instructions = pickletools.genops(archive.read(pickled))
    stack, memo = [], {}
    for operation, argument, _ in instructions:
        name, taken, given = operation.name, operation.stack_before, operation.stack_after
        below = taken.index(pickletools.markobject) if pickletools.markobject in taken else None  # of the objects under the mark
        start = len(stack) - len(taken) if below is None else len(stack) - 1 - stack[::-1].index(pickletools.markobject)
        values = stack[start:] if below is None else stack[start + 1:]
        del stack[start - (below or 0):]
        if name == "BINPERSID":
            kind, storage, key, _, numbers = values[0]
            size = numbers * ITEM_BYTES[storage]
            member = f"{pickled.removesuffix('data.pkl')}data/{key}".lower()
            if kind != "storage" or not 0 <= size <= sizes[member]:
                raise InputError(f"{path}: not a checkpoint of train.py: it claims a tensor of {size:,} bytes, and holds "
                                 f"{sizes[member]:,} of them")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(pickletools.markobject)
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(values))
        else:
            stack += [argument if type(argument) in (str, int) else None] * len(given)


def read(path, format=CHECKPOINT):
    """The content of a checkpoint (or of last.pt, or of a folder of export.py --adapters).

    Raises InputError for a file that is missing, damaged, or none of them.
    """
    if format == CHECKPOINT and peft_format.is_adapter_folder(path):
        return peft_format.read_checkpoint(path)
    try:
        check_seal(path)
        check_storages(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        hint = "train.py writes ckpt.pt into its run folder" if format == CHECKPOINT else "nothing to resume: leave out --resume"
        raise InputError(f"{path}: no such file; {hint}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; give the ckpt.pt of a run, or a folder of export.py --adapters") from None
    except (zipfile.BadZipFile, *UNREADABLE) as error:
        raise InputError(f"{path}: not a checkpoint of train.py (reading it: {type(error).__name__})") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != format:
        hint = ": it is the state for --resume; give the ckpt.pt beside it" if found == RESUME_STATE else ""
        raise InputError(f"{path}: not a checkpoint of train.py{hint}")
    if content.get("version") != VERSION:
        raise InputError(f"{path}: checkpoint version {content.get('version')}, but this code reads version {VERSION}")
    state = content.get("state")
    if isinstance(state, dict):
        check_finite(path, {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)})
    return content


def tokenizer_of(content, path, file=None):
    """The tokenizer that a checkpoint was trained with. file: its tokenizer.json, where the package and the hub have none.

    Raises InputError, which names the checkpoint by its path, for one of another vocabulary.
    """
    name = content["tokenizer"]["name"]
    tokenizer = get_tokenizer(name if name in TOKENIZERS else "bpe", file)
    if content["tokenizer"]["digest"] != tokenizer.digest:
        raise InputError(f"the vocabulary of the tokenizer {name} is not the one that {path} was trained with; "
                         "--tokenizer-file PATH gives another")
    return tokenizer


def window_of(content, source=None):
    """{"length": bases of the longest training sequence, "varied": whether others were shorter} of a checkpoint.

    Older ones do not say: OLD_WINDOW, with a line on stderr where `source`, the file, is given. Raises InputError for what is no length.
    """
    window = content.get("window")
    if window is None:
        if source:
            print(f"note: {source} is older and does not say how long its training sequences were: taken to be {window_text(OLD_WINDOW)}",
                  file=sys.stderr, flush=True)
        return OLD_WINDOW
    if not isinstance(window, dict) or type(window.get("length")) is not int or window["length"] < 1:
        raise InputError(f"{source or 'the checkpoint'}: its window is {window}, which is no length of training sequences")
    return window


def window_text(window):
    """window_of() in words."""
    return f"{'up to ' * window['varied']}{window['length']:,} bases"


def skeleton(content):
    """The trained classifier of a checkpoint with what the checkpoint itself holds; every other weight is on the meta device.

    Raises InputError when what it holds is not of the sizes that it names, before any memory of those sizes is asked for.
    """
    row = get_model(content["model"], content["config"])
    num_classes = {rank: len(table) for rank, table in content["classes"].items()}
    config = checked_config(FAMILIES[row.family], content["config"], f"the checkpoint's {content['model']} config.json")
    classifier = classifier_on_meta(row, num_classes, content["settings"], config)
    check_state(classifier, content["state"], trainable_names(classifier, content["settings"]))
    classifier.load_state_dict(content["state"], strict=False, assign=True)
    return classifier


def rebuild(content, weights=None):
    """The trained classifier of a checkpoint, adapters in place, in eval mode. weights: a folder to take the base weights from instead.

    Raises InputError when the base weights cannot be found or are not, by digest, those that the run began with.
    """
    skeleton(content)  # checks it
    num_classes = {rank: len(table) for rank, table in content["classes"].items()}
    row = get_model(content["model"], content["config"])
    family = FAMILIES[row.family]
    if content["base"]["source"] == "none" or content["settings"]["strategy"] == "full":
        if weights:
            raise InputError("--weights does nothing here: this checkpoint holds every weight of its model; leave it out")
        with torch.device("meta"):
            backbone = family.model(family.config(**content["config"]))
        backbone = reinitialize(backbone.to_empty(device="cpu"))
    else:
        base = {"source": "folder", "folder": weights} if weights else content["base"]
        backbone = load_base(row, base)
        found = weights_digest(backbone)
        if found != content["base"]["digest"]:
            raise InputError(f"the base weights from {base.get('folder') or base.get('hub') or 'the seed'} are not those of the run: "
                             f"digest {found[:12]}, the checkpoint says {content['base']['digest'][:12]}")
    classifier = TaxonClassifier(backbone, num_classes)
    inject_adapters(classifier, content["settings"])
    load_state(classifier, content["state"], trainable_names(classifier, content["settings"]))
    return classifier.eval()
