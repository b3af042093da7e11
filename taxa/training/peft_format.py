"""Adapters in the folder format of the PEFT library.

adapter_config.json says what they are. adapter_model.safetensors holds the tensors:

    base_model.model.encoder.layer.0.attention.self.query.lora_A.weight   (r, in)
    base_model.model.encoder.layer.0.attention.self.query.lora_B.weight   (out, r)
    base_model.model.encoder.layer.0.attention.self.key.ia3_l             (out, 1)  on an output
    base_model.model.encoder.layer.0.output.dense.ia3_l                   (1, in)   on an input

The names are those of the encoder alone, so PeftModel.from_pretrained(backbone, DIR) fits. PEFT's
(IA)3 scales whole outputs: our "Wqkv[key,value]" is written with ones in the query third, which is
the same function. (PEFT, training on, would train that third too.) Beside the two files export.py
puts heads.safetensors, labels.json and taxa.json: with them the folder is a whole checkpoint again.
"""

import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from taxa.data.taxonomy import class_id
from taxa.errors import InputError
from taxa.ia3 import IA3Linear, rows_of, split_target
from taxa.inject import matches
from taxa.lora import LoRALinear
from taxa.runtime.files import UNREADABLE, check_finite, read_json, save_tensors, write_json

CONFIG, ADAPTERS = "adapter_config.json", "adapter_model.safetensors"
HEADS, LABELS, REST = "heads.safetensors", "labels.json", "taxa.json"
PREFIX = "base_model.model."
OUR_HEAD = re.compile(r"base_model\.model\.(heads\.[^.]+\.(?:weight|bias))")
# The heads of transformers' classes, which PEFT saves beside the adapters when its task_type asks
# for them, under any wrapper.
OTHER_HEAD = re.compile(
    r"base_model\.model\.(?:\w+\.)??"
    r"((?:classifier|score|qa_outputs)(?:\.[\w.]+)?)\.(?:weight|bias)"
)
# Any wrapper's prefix may stand before the encoder: base_model.model.esm.encoder...,
# base_model.model.backbone.encoder...
ADAPTER = re.compile(
    r"base_model\.model\.(?:.+?\.)??"
    r"(encoder\..+)\.(lora_[AB](?=\.weight)|ia3_l)(?:\.weight)?"
)

# What follows says which keys of adapter_config.json are computed here. Every other key must say
# what PEFT takes for "not asked for": null, false or nothing.
TOLD_BY_TENSORS = {
    "target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save",
}
NO_MATTER = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode",
}


def _is_number(value):
    return type(value) in (int, float)


def _is_bool(value):
    return type(value) is bool


COMPUTED = {  # key -> (PEFT's default, what it may be)
    "lora": {
        "r": (8, lambda r: type(r) is int and r > 0),
        "lora_alpha": (8, lambda alpha: _is_number(alpha) and math.isfinite(alpha)),
        "lora_dropout": (0.0, lambda p: _is_number(p) and 0 <= p < 1),
        "use_rslora": (False, _is_bool),
        "bias": ("none", lambda value: value == "none"),
        # How A and B began, from base weights that stay as they were. PiSSA, OLoRA, CorDA, LoftQ
        # and others change those.
        "init_lora_weights": (
            True, lambda value: _is_bool(value) or value in ("gaussian", "eva", "orthogonal")
        ),
    },
    "ia3": {"init_ia3_weights": (True, _is_bool)},
}
# Keys that say how something works that is not asked for. PEFT's defaults are not "nothing" here.
UNUSED = {"megatron_core": "megatron.core", "qalora_group_size": 16}


def write_adapters(folder, backbone, settings, base):
    """Write the two files of PEFT's format.

    backbone: with its adapters. base: the checkpoint's record of the base weights.
    """
    tensors = {}
    names = []
    inputs = []  # the names of modules whose input (IA)3 scales
    for name, module in backbone.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
        elif isinstance(module, IA3Linear):
            if module.feedforward:
                inputs.append(name)
                vector = module.ia3_l[None]
            else:
                vector = module.output_scale()[:, None]
            tensors[f"{PREFIX}{name}.ia3_l"] = vector
        else:
            continue
        names.append(name)
    config = {
        "peft_type": settings["strategy"].upper(),
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": base.get("hub"),
        "revision": base.get("revision"),
        "target_modules": names,
    }
    if settings["strategy"] == "lora":
        config |= {
            "r": settings["r"],
            "lora_alpha": settings["lora_alpha"],
            "lora_dropout": settings["lora_dropout"],
            "bias": "none",
            "use_rslora": settings["rslora"],
        }
    else:
        config["feedforward_modules"] = inputs
    write_json(folder / CONFIG, config)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_tensors(folder / ADAPTERS, tensors)


def read_adapters(folder):
    """A PEFT folder, ours or PEFT's own, -> (settings, state).

    settings: what inject_adapters() takes. Targets are full module names, told from the tensors.
    state: {our parameter name: tensor}. It has the heads too where the folder has ours;
    other_heads() names those of other classes. Raises InputError for a folder that is none, and for
    whatever it asks for that is not computed here (COMPUTED).
    """
    folder = Path(folder)
    config = _json(folder / CONFIG)
    tensors = _tensors(folder / ADAPTERS)
    kind, config = read_config(folder / CONFIG, config)
    heads = {}
    found = {}  # {module name: {"lora_A", "lora_B" or "ia3_l": tensor}}
    for key, tensor in tensors.items():
        adapter = ADAPTER.fullmatch(key)
        head = OUR_HEAD.fullmatch(key)
        if head:
            heads[head[1]] = tensor
        elif adapter and (adapter[2] == "ia3_l") == (kind == "ia3") and tensor.dim() == 2:
            found.setdefault(adapter[1], {})[adapter[2]] = tensor
        elif not OTHER_HEAD.fullmatch(key):
            raise InputError(
                f"{folder / ADAPTERS}: {key} is no {kind} adapter on a Linear of the encoder"
            )
    if not found:
        raise InputError(f"{folder / ADAPTERS}: no adapters in it")
    if (folder / HEADS).exists():
        heads = {f"heads.{name}": tensor for name, tensor in _tensors(folder / HEADS).items()}
    settings, state = (_lora if kind == "lora" else _ia3)(folder, config, found)
    return settings, heads | state


def _lora(folder, config, found):
    """(settings, state) of read_adapters(), without heads, for LoRA."""
    settings = {
        "strategy": "lora",
        "r": config["r"],
        "lora_alpha": float(config["lora_alpha"]),
        "lora_dropout": float(config["lora_dropout"]),
        "rslora": config["use_rslora"],
        "targets": list(found),
    }
    r = settings["r"]
    state = {}
    for name, pair in found.items():
        whole = pair.keys() == {"lora_A", "lora_B"}
        if not whole or not len(pair["lora_A"]) == pair["lora_B"].shape[1] == r:
            raise InputError(
                f"{folder / ADAPTERS}: {name} is no pair lora_A (r, in), lora_B (out, r) of r = {r}"
            )
        for key, tensor in pair.items():
            state[f"backbone.{name}.{key}"] = tensor
    return settings, state


def _ia3(folder, config, found):
    """(settings, state) of read_adapters(), without heads, for (IA)3."""
    settings = {"strategy": "ia3", "targets": [], "feedforward_targets": []}
    ours = []
    if (folder / REST).exists():
        ours = _json(folder / REST)["settings"]["targets"]
    state = {}
    for name, of_module in found.items():
        vector = of_module["ia3_l"]
        on_input = vector.shape[0] == 1
        vector = vector.flatten()
        if on_input:
            settings["feedforward_targets"].append(name)
        else:
            name, vector = _without_ones(name, vector, ours)
            settings["targets"].append(name)
        module, _ = split_target(name)
        state[f"backbone.{module}.ia3_l"] = vector
    return settings, state


def read_config(path, config):
    """adapter_config.json, as read -> ("lora" or "ia3", {key of COMPUTED: value}).

    Raises InputError, by name, for what is not computed.
    """
    kind = str(config.get("peft_type") if isinstance(config, dict) else None).lower()
    if kind not in COMPUTED:
        raise InputError(f"{path}: peft_type is {kind}; only LORA and IA3 can be read")
    computed = COMPUTED[kind]
    for key, value in config.items():
        if key in TOLD_BY_TENSORS | NO_MATTER or (key in UNUSED and value == UNUSED[key]):
            continue
        if key in computed:
            _, may_be = computed[key]
            known = may_be(value)
        else:
            known = value in (None, False, {}, [], "")
        if not known:
            raise InputError(f"{path}: {key} is {value!r}, which is not computed here")
    return kind, {key: config.get(key, default) for key, (default, _) in computed.items()}


def other_heads(folder):
    """The names of other classifiers than ours that are saved beside the adapters, sorted."""
    found = map(OTHER_HEAD.fullmatch, _tensors(Path(folder) / ADAPTERS))
    return sorted({head[1] for head in found if head})


def _without_ones(name, vector, ours):
    """Undo the ones that write_adapters() put beside a bracketed target.

    A vector that PEFT has trained there stays whole.
    """
    for module, parts in map(split_target, ours):
        if parts and matches(name, module):
            start, stop = rows_of(parts, len(vector))
            if (vector[:start] == 1).all() and (vector[stop:] == 1).all():
                return f"{name}[{','.join(parts)}]", vector[start:stop]
    return name, vector


def start_flags(folder, strategy, given):
    """read_adapters() for train.py --adapters -> ({flag: value}, state).

    given: {flag: value or None} as typed. Raises InputError when the folder holds another strategy,
    or a flag was typed that the folder decides (only the dropout stays free).
    """
    settings, state = read_adapters(folder)
    if settings.pop("strategy") != strategy:
        held = _json(Path(folder) / CONFIG)["peft_type"]
        raise InputError(
            f"--adapters {folder} holds {held} adapters, not those of --strategy {strategy}"
        )
    typed = [
        f"--{flag.replace('_', '-')}"
        for flag, value in given.items() if value is not None and flag != "lora_dropout"
    ]
    if typed:
        raise InputError(f"--adapters {folder} decides {' '.join(typed)}: leave out")
    if given["lora_dropout"] is not None:
        settings["lora_dropout"] = given["lora_dropout"]
    return settings, state


def is_adapter_folder(path):
    return (Path(path) / CONFIG).is_file()


def write_heads(folder, content):
    """Write heads.safetensors and labels.json.

    The first has RANK.weight (C, H) and RANK.bias (C,), the second the taxid and name of each row.
    """
    heads = {
        key.removeprefix("heads."): tensor
        for key, tensor in content["state"].items() if key.startswith("heads.")
    }
    save_tensors(folder / HEADS, heads)
    write_json(folder / LABELS, content["classes"])


def write_rest(folder, content):
    """Write taxa.json: what a checkpoint holds besides tensors and labels."""
    rest = {key: value for key, value in content.items() if key not in ("state", "classes")}
    write_json(folder / REST, rest)


def read_labels(folder):
    """{rank: [{"taxid", "name"}, ...]} of a folder of export.py.

    Raises InputError for a folder without labels.json, or with another labels.json.
    """
    path = Path(folder) / LABELS
    classes = _json(path)
    try:
        rows = [(row["taxid"], row["name"]) for table in classes.values() for row in table]
    except (AttributeError, KeyError, TypeError):
        rows = []
    good = all(
        type(name) is str and (taxid is None or type(taxid) is int) for taxid, name in rows
    )
    if not rows or not good:
        raise InputError(f"{path}: not the class tables that export.py writes")
    return classes


def read_checkpoint(folder):
    """The content of a checkpoint that export.py --adapters wrote into `folder`.

    It is as checkpoint.read() gives it.
    """
    folder = Path(folder)
    if not (folder / REST).exists() or not (folder / HEADS).exists():
        raise InputError(
            f"{folder}: adapters without the heads and taxa.json of export.py; "
            f"train heads: train.py --adapters {folder}"
        )
    content = _json(folder / REST)
    content["classes"] = _json(folder / LABELS)
    settings, state = read_adapters(folder)
    return content | {"settings": content["settings"] | settings, "state": state}


def start_from(classifier, folder, state, base, classes):
    """Copy the state of read_adapters(folder) into a classifier with those adapters.

    The heads are taken only where the folder's class tables are `classes`, taxid by taxid. Returns
    a line for the user: what heads are taken. Raises InputError for adapters of another shape, or
    trained on other base weights than `base` where the folder names them.
    """
    folder = Path(folder)
    rest = _json(folder / REST) if (folder / REST).exists() else {}
    theirs = rest.get("base", {}).get("digest")
    if theirs and theirs != base.get("digest"):
        raise InputError(
            f"{folder}: its adapters were trained on other base weights "
            f"(digest {theirs[:12]}, not {base['digest'][:12]})"
        )

    heads = {name for name in state if name.startswith("heads.")}
    why = None  # why the heads are not taken
    if not heads or not (folder / LABELS).exists():
        why = "none with a labels.json in it"
    elif _class_ids(_json(folder / LABELS)) != _class_ids(classes):
        why = "other classes"
    if why:
        state = {name: tensor for name, tensor in state.items() if name not in heads}
    try:
        classifier.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: its adapters do not fit this model: {reason}") from None

    taken = f"not taken ({why})" if why else "taken: the classes are the same"
    others = other_heads(folder)
    left = f"; {', '.join(others)} in it: left" if others else ""
    return f"starts from the adapters of {folder}; heads are {taken}{left}"


def _class_ids(classes):
    return {rank: [class_id(row) for row in table] for rank, table in classes.items()}


def _json(path):
    return read_json(path, f"a PEFT folder holds {CONFIG} and {ADAPTERS}")


def _tensors(path):
    try:
        tensors = {name: tensor.to(torch.float32) for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; a PEFT folder holds {CONFIG} and {ADAPTERS}, "
            "saved as safetensors"
        ) from None
    except UNREADABLE as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from None
    check_finite(path, tensors)
    return tensors
