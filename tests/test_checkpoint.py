"""Checkpoints: what comes back is what was saved, bit for bit, on the right base.

Else it is refused in one line.
"""

import hashlib
import os
import pickle
import shutil

import pytest
import torch
from helpers import TINY, Touch, batch, hub_folder, logits, random_state
from torch import nn

from taxa import RANKS
from taxa.backbones import MODELS, load_backbone
from taxa.errors import InputError
from taxa.model import TaxonClassifier, sequence_losses
from taxa.random_init import reinitialize
from taxa.strategies import STRATEGIES, inject_adapters, train_only, trainable_names
from taxa.training import checkpoint, peft_format, sealed_file
from taxa.training.checkpoint import (
    base_source,
    changed_state,
    load_base,
    load_state,
    read,
    rebuild,
    save,
    weights_digest,
)
from taxa.training.optim import adamw
from taxa.training.settings import settings_from_flags

UNPUBLISHED = {"tiny-nt": {"source": "package"}, "tiny-dnabert": {"source": "seed", "seed": 0}}
NUM_CLASSES = {"superkingdom": 4, "phylum": 5, "genus": 6}
CLASSES = {
    rank: [{"taxid": 100 * C + i, "name": f"{rank} {i}"} for i in range(C)]
    for rank, C in NUM_CLASSES.items()
}
LABELS = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 0, 3]])
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
both_families = pytest.mark.parametrize("name", TINY)
needs_base = pytest.mark.parametrize("strategy", ["lora", "ia3", "freeze75"])


def trained(name, strategy, folder=None, protocol="corrected", heads=None, **flags):
    """One step of training as train.py takes it: (classifier, content of its checkpoint)."""
    base = base_source(name, strategy, folder)
    torch.manual_seed(0)
    backbone = load_base(name, base)
    if base["source"] != "none":
        base["digest"] = weights_digest(backbone)
    torch.manual_seed(42)
    classifier = TaxonClassifier(backbone, NUM_CLASSES)
    settings = settings_from_flags(name, strategy, protocol, heads, **flags)
    if strategy == "random":
        reinitialize(classifier, backbone.config.initializer_range)
    inject_adapters(classifier, settings)
    names = trainable_names(classifier, settings)
    train_only(classifier, names)
    with torch.no_grad():
        for key, p in classifier.named_parameters():
            if key.endswith("lora_B"):
                p.normal_(std=0.1)
    optimizer = adamw(classifier, 1e-2)
    sequence_losses(classifier.train()(*batch()), LABELS).sum().backward()
    optimizer.step()
    content = {
        "model": name,
        "config": backbone.config.to_dict(),
        "base": base,
        "settings": settings,
        "state": changed_state(classifier, names),
        "classes": CLASSES,
        "epoch": 1,
        "metrics": {"loss": 0.5},
    }
    return classifier.eval(), content


def assert_same(found, expected):
    assert torch.equal(logits(found), logits(expected))
    found, expected = dict(found.named_parameters()), dict(expected.named_parameters())
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# ------------------------------------------------------------------ round trip


@both_families
@every_strategy
@pytest.mark.parametrize("protocol", ["corrected", "published"])
def test_round_trip_is_bit_equal(tmp_path, name, strategy, protocol):
    classifier, content = trained(name, strategy, hub_folder(tmp_path / "base", name), protocol)
    save(tmp_path / "ckpt.pt", content)
    torch.manual_seed(99)
    back = read(tmp_path / "ckpt.pt")
    rebuilt = rebuild(back)
    assert not rebuilt.training
    assert_same(rebuilt, classifier)
    for key in content.keys() - {"state"}:
        assert back[key] == content[key], key


@both_families
@pytest.mark.parametrize("strategy", ["lora", "ia3"])
def test_round_trip_with_frozen_heads_and_chosen_targets(tmp_path, name, strategy):
    target = {"tiny-nt": "attention.self.key", "tiny-dnabert": "attention.output.dense"}[name]
    folder = hub_folder(tmp_path / "base", name)
    classifier, content = trained(name, strategy, folder, heads="frozen", targets=[target])
    save(tmp_path / "ckpt.pt", content)
    assert_same(rebuild(read(tmp_path / "ckpt.pt")), classifier)


@both_families
@every_strategy
def test_round_trip_of_a_name_without_published_weights(tmp_path, name, strategy):
    """Without --weights the base comes with the package, or is made again from its seed."""
    classifier, content = trained(name, strategy)
    source = "none" if strategy == "random" else UNPUBLISHED[name]["source"]
    assert content["base"]["source"] == source
    save(tmp_path / "ckpt.pt", content)
    torch.manual_seed(99)
    assert_same(rebuild(read(tmp_path / "ckpt.pt")), classifier)


@both_families
@pytest.mark.parametrize("strategy", ["full", "random"])
def test_full_and_random_need_no_base_weights(tmp_path, name, strategy):
    folder = hub_folder(tmp_path / "base", name)
    classifier, content = trained(name, strategy, folder)
    save(tmp_path / "ckpt.pt", content)
    shutil.rmtree(folder)
    assert_same(rebuild(read(tmp_path / "ckpt.pt")), classifier)
    assert set(content["state"]) == {key for key, _ in classifier.named_parameters()}


# ------------------------------------------------------------------ what is in it


@both_families
def test_lora_holds_adapters_and_heads_and_nothing_else(tmp_path, name):
    classifier, content = trained(name, "lora", hub_folder(tmp_path / "base", name), r=2)
    of_heads = {f"heads.{rank}.{kind}" for rank in RANKS for kind in ("weight", "bias")}
    targets = {"tiny-nt": ["query", "value"], "tiny-dnabert": ["Wqkv"]}[name]
    at = "backbone.encoder.layer.0.attention.self"
    adapters = {f"{at}.{target}.{kind}" for target in targets for kind in ("lora_A", "lora_B")}
    assert set(content["state"]) == adapters | of_heads
    _, content = trained(name, "lora", tmp_path / "base", heads="frozen")
    # frozen heads are random, so they are stored too
    assert set(content["state"]) == adapters | of_heads


@both_families
def test_sizes(tmp_path, name):
    """A checkpoint of lora or ia3 is its own numbers and little more, of full it is the network."""
    size, elements = {}, {}
    for strategy in STRATEGIES:
        _, content = trained(name, strategy)
        save(tmp_path / strategy, content)
        size[strategy] = (tmp_path / strategy).stat().st_size
        elements[strategy] = sum(t.numel() for t in content["state"].values())
    total = elements["full"]
    assert elements["random"] == total > 400_000
    for strategy in STRATEGIES:
        assert 4 * elements[strategy] < size[strategy] < 4 * elements[strategy] + 40_000, strategy
    assert elements["lora"] < 0.02 * total and elements["ia3"] < 0.01 * total
    assert elements["freeze75"] <= 0.25 * total


@both_families
@every_strategy
def test_read_needs_no_more_than_weights_only(tmp_path, name, strategy):
    """Tensors, numbers, strings, lists and dicts: no class of which a version could break it."""
    _, content = trained(name, strategy, hub_folder(tmp_path / "base", name))
    save(tmp_path / "ckpt.pt", content)

    def kinds(value):
        if isinstance(value, dict):
            return {str, *(kind for part in value.values() for kind in kinds(part))}
        if isinstance(value, (list, tuple)):
            return {type(value), *(kind for part in value for kind in kinds(part))}
        return {type(value)}

    plain = {str, int, float, bool, type(None), list, tuple, torch.Tensor}
    assert kinds(read(tmp_path / "ckpt.pt")) <= plain


@both_families
def test_state_is_a_copy_that_training_on_does_not_touch(tmp_path, name):
    classifier, content = trained(name, "full", hub_folder(tmp_path / "base", name))
    before = content["state"]["heads.genus.weight"].clone()
    nn.init.zeros_(classifier.heads["genus"].weight)
    assert torch.equal(content["state"]["heads.genus.weight"], before)
    assert not content["state"]["heads.genus.weight"].requires_grad


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "ckpt.pt"
    save(path, {"epoch": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save(path, {"epoch": 2, "not to be pickled": lambda: None})
    assert read(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["ckpt.pt"]


# ------------------------------------------------------------------ base weights


@both_families
def test_base_source(tmp_path, name):
    family = MODELS[name].family
    hub = {"nt": "nt50m", "dnabert": "dnabert2"}[family]
    row = MODELS[hub]
    folder = str((tmp_path / "w").resolve())
    of_hub = {"source": "hub", "hub": row.hub}
    assert base_source(hub, "lora") == {**of_hub, "revision": row.revision}
    assert base_source(hub, "full", revision="abc") == {**of_hub, "revision": "abc"}
    assert base_source(hub, "freeze75", tmp_path / "w") == {"source": "folder", "folder": folder}
    assert base_source(name, "ia3") == UNPUBLISHED[name]
    for model in (hub, name):
        assert base_source(model, "random") == {"source": "none", "config": None}
        assert base_source(model, "random", tmp_path / "w") == {"source": "none", "config": folder}


def test_hub_weights_are_loaded_at_the_revision_of_the_run(monkeypatch):
    calls = []

    def load_backbone(*args, **options):
        calls.append((args, options))

    monkeypatch.setattr(checkpoint, "load_backbone", load_backbone)
    load_base("nt50m", {"source": "hub", "hub": MODELS["nt50m"].hub, "revision": "abc"})
    assert calls == [(("nt50m",), {"revision": "abc"})]


@both_families
def test_seeded_base_is_always_the_same_and_leaves_the_random_state_alone(name):
    torch.manual_seed(1)
    first, state = load_base(name, base_source(name, "lora")), torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(3)
    second = load_base(name, base_source(name, "lora"))
    assert weights_digest(first) == weights_digest(second)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@both_families
def test_digest_is_that_of_names_shapes_and_bytes(tmp_path, name):
    backbone = load_backbone(name, hub_folder(tmp_path / "w", name))
    expected = hashlib.sha256()
    state = random_state(name)
    for key in sorted(state):
        expected.update(f"{key} {tuple(state[key].shape)}\n".encode())
        expected.update(state[key].numpy().tobytes())
    assert weights_digest(backbone) == expected.hexdigest()
    for key, p in backbone.named_parameters():  # one element of any tensor shows
        with torch.no_grad():
            before = p.view(-1)[-1].clone()
            p.view(-1)[-1] += 1e-3
            assert weights_digest(backbone) != expected.hexdigest(), key
            p.view(-1)[-1] = before
    assert weights_digest(backbone) == expected.hexdigest()


@both_families
@needs_base
def test_other_base_weights_are_refused_by_digest(tmp_path, name, strategy):
    folder = hub_folder(tmp_path / "base", name)
    _, content = trained(name, strategy, folder)
    state = random_state(name)
    next(iter(state.values())).view(-1)[0] += 1e-3
    hub_folder(folder, name, state)
    with pytest.raises(InputError, match="digest"):
        rebuild(content)
    other = hub_folder(tmp_path / "other", name, random_state(name, seed=1))
    with pytest.raises(InputError, match="digest"):
        rebuild(content, weights=str(other))


@both_families
@needs_base
def test_moved_base_weights_are_found_by_weights_and_missed_by_name(tmp_path, name, strategy):
    folder = hub_folder(tmp_path / "base", name)
    classifier, content = trained(name, strategy, folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="no such folder"):
        rebuild(content)
    prefix = {"tiny-nt": "esm.", "tiny-dnabert": "bert."}[name]
    # another format, the same numbers
    moved = hub_folder(tmp_path / "elsewhere", name, prefix=prefix, binary=True)
    assert_same(rebuild(content, weights=str(moved)), classifier)


# ------------------------------------------------------------------ state that does not fit


@both_families
@every_strategy
def test_state_with_a_tensor_missing_is_refused(tmp_path, name, strategy):
    """Else that tensor would silently keep the random or pretrained value it was built with."""
    _, content = trained(name, strategy, hub_folder(tmp_path / "base", name))
    for key in (next(iter(content["state"])), "heads.genus.bias"):
        state = dict(content["state"])
        del state[key]
        with pytest.raises(InputError, match=key):
            rebuild(content | {"state": state})


@both_families
@every_strategy
def test_state_with_a_foreign_or_misshapen_tensor_is_refused(tmp_path, name, strategy):
    _, content = trained(name, strategy, hub_folder(tmp_path / "base", name))
    for key in ("heads.species.weight", "heads.genus.weight"):
        state = content["state"] | {key: torch.zeros(2, 2)}
        with pytest.raises(InputError, match=key) as caught:
            rebuild(content | {"state": state})
        assert "\n" not in str(caught.value)


def test_classes_of_another_number_are_refused(tmp_path):
    _, content = trained("tiny-nt", "lora", hub_folder(tmp_path / "base", "tiny-nt"))
    with pytest.raises(InputError, match="heads.genus"):
        rebuild(content | {"classes": CLASSES | {"genus": CLASSES["genus"][:-1]}})


@both_families
def test_load_state_restores_what_changed(tmp_path, name):
    classifier, content = trained(name, "freeze75", hub_folder(tmp_path / "base", name))
    expected = logits(classifier)
    with torch.no_grad():
        for key in content["state"]:
            classifier.get_parameter(key).zero_()
    assert not torch.equal(logits(classifier), expected)
    load_state(classifier, content["state"], content["state"])
    assert torch.equal(logits(classifier), expected)


# ------------------------------------------------------------------ files that are no checkpoints


GARBAGE = {
    "empty": b"",
    "text": b"hello\n",
    "python": b"import os\n",
    "json": b'{"format": "taxa checkpoint", "version": 2}',
    "an empty zip": b"PK\x05\x06" + bytes(18),
    "a zip's first bytes": b"PK\x03\x04",
    "zeros": bytes(1000),
    "a pickle of None": b"\x80\x02N.",
    "half a pickle": b"\x80\x02}q",
    "gzip": b"\x1f\x8b\x08\x00",
    "all bytes": bytes(range(256)),
    "utf-8": "é".encode(),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage(tmp_path, what):
    (tmp_path / "ckpt.pt").write_bytes(GARBAGE[what])
    with pytest.raises(InputError, match="not a checkpoint of train.py") as caught:
        read(tmp_path / "ckpt.pt")
    assert "\n" not in str(caught.value) and "ckpt.pt" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        3,
        None,
        "taxa checkpoint",
        torch.ones(2),
        {},
        {"format": "other"},
        {"state": {}},
        {"format": "taxa checkpoint of another kind", "version": checkpoint.VERSION},
    ],
)
def test_files_of_torch_that_are_no_checkpoints(tmp_path, content):
    torch.save(content, tmp_path / "ckpt.pt")
    sealed_file.seal(tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="not a checkpoint of train.py"):
        read(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_anywhere(tmp_path, legacy):
    path = tmp_path / "ckpt.pt"
    format = {"format": checkpoint.CHECKPOINT, "version": checkpoint.VERSION}
    content = {**format, "state": {"a": torch.arange(300.0)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if legacy:  # no zip file, so it cannot be sealed
        with pytest.raises(InputError, match="not a checkpoint"):
            read(path)
        return
    sealed_file.seal(path)
    whole = path.read_bytes()
    assert torch.equal(read(path)["state"]["a"], torch.arange(300.0))
    for length in [*range(200), *range(200, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="a folder; give the ckpt.pt of a run"):
        read(tmp_path)


@pytest.mark.parametrize("where", ["in the state", "alone"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, where):
    trap, path = tmp_path / "sprung", tmp_path / "ckpt.pt"
    if where == "alone":
        torch.save(Touch(trap), path)
        sealed_file.seal(path)  # a digest proves nothing about who wrote it
    else:
        save(path, {"state": {"heads.genus.bias": Touch(trap)}})
    with pytest.raises(InputError, match="not a checkpoint of train.py"):
        read(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.is_dir(), "the trap itself does not work"


@pytest.mark.parametrize("format", [checkpoint.CHECKPOINT, checkpoint.RESUME_STATE])
@pytest.mark.parametrize("version", [checkpoint.VERSION + 1, None])
def test_another_version(version, format, tmp_path):
    path = tmp_path / "a.pt"
    save(path, {"version": version}, format)
    message = f"a.pt: checkpoint version {version}, but this code reads version 2"
    with pytest.raises(InputError, match=message):
        read(path, format)


@pytest.mark.parametrize("format", [checkpoint.CHECKPOINT, checkpoint.RESUME_STATE])
def test_a_file_of_before_1_0_0_is_refused_in_one_line(format, tmp_path):
    """Those have version 1, and lack fields that are now always there."""
    path = tmp_path / "a.pt"
    save(path, {"version": 1, "state": {}}, format)
    with pytest.raises(InputError) as caught:
        read(path, format)
    assert str(caught.value) == (
        f"{path}: written by a version of taxa before 1.0.0, which this one does not read"
    )


def test_a_folder_of_adapters_of_before_1_0_0_is_refused_in_one_line(tmp_path):
    _, content = trained("tiny-nt", "lora")
    backbone = checkpoint.skeleton(content).backbone
    peft_format.write_adapters(tmp_path, backbone, content["settings"], content["base"])
    peft_format.write_heads(tmp_path, content)
    peft_format.write_rest(tmp_path, content | {"version": checkpoint.VERSION})
    assert read(tmp_path)["version"] == checkpoint.VERSION
    peft_format.write_rest(tmp_path, content | {"version": 1})
    with pytest.raises(InputError, match="before 1.0.0, which this one does not read"):
        read(tmp_path)
