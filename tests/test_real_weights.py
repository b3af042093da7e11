"""The published weights: the tokens and the pooled vectors of the official code, from
tests/probes.json, for each of the five backbones.

  pytest -m hub tests/test_real_weights.py     # downloads 2.5 GB at the pinned revisions

What runs without a network is the same check, on a folder in the hub's layout with the golden
weights: that it passes, and that it fails.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, SHARED, naive_dnabert, naive_nt
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from taxa.backbones import MODELS, load_backbone
from taxa.data.tokens import get_tokenizer
from taxa.model import masked_mean
from taxa.training import checkpoint

# The probes were made by the hub's own code, in float32 on a CPU.
PROBES = json.loads((Path(__file__).parent / "probes.json").read_text())
WEIGHT_FILES = {  # else model.safetensors
    "dnabert2": "pytorch_model.bin",
    "dnaberts": "pytorch_model.bin",
    "nt250m": "pytorch_model.bin",
}


def check_folder(name, folder, probes):
    """AssertionError unless the folder's tokenizer gives exactly the ids and its weights the first
    eight pooled values, to 1e-4.
    """
    folder = Path(folder)
    kind = MODELS[name].tokenizer
    tokenizer = get_tokenizer(kind, folder / "tokenizer.json" if kind == "dnabert" else None)
    if kind == "nt":
        digest = hashlib.sha256((folder / "vocab.txt").read_bytes()).hexdigest()
        assert digest == tokenizer.digest, "another vocab.txt"
    backbone = load_backbone(name, folder).eval()
    for probe in probes:
        ids, _ = tokenizer.encode(probe["sequence"].encode(), [len(probe["sequence"])])
        same = ids.tolist() == probe["input_ids"]
        assert same, f"{name}: other tokens of {probe['sequence']}"
        input_ids = torch.tensor(probe["input_ids"])[None]
        mask = torch.ones_like(input_ids)
        with torch.no_grad():
            hidden = backbone(input_ids, mask)  # (1, T, H)
        pooled = masked_mean(hidden, mask)[0] if probe["pooling"] == "mean" else hidden[0, 0]
        difference = (pooled[:8] - torch.tensor(probe["first_8"])).abs().max().item()
        assert difference <= 1e-4, (
            f"{name}: pooled values of {probe['sequence']} differ by up to {difference:.2g}"
        )


@pytest.mark.hub
@pytest.mark.parametrize("name", PROBES)
def test_published_weights(name):
    row = MODELS[name]
    weight_file = WEIGHT_FILES.get(name, "model.safetensors")
    files = ["config.json", "vocab.txt", "tokenizer.json", weight_file]
    problem = None
    try:
        folder = snapshot_download(row.hub, revision=row.revision, allow_patterns=files)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        problem = type(error).__name__
    if problem:
        pytest.fail(
            f"{row.hub} at {row.revision} was not downloaded, "
            f"so nothing was checked ({problem}): is there a network?",
            pytrace=False,
        )
    check_folder(name, folder, PROBES[name])
    by_name = checkpoint.weights_digest(load_backbone(name))
    assert by_name == checkpoint.weights_digest(load_backbone(name, folder)), "by its name alone"


# ------------------------------------------------------------------ the check itself


STAND_IN = {"nt50m": "tiny-nt", "dnabert2": "tiny-dnabert", "dnaberts": "tiny-dnabert"}


@pytest.fixture(params=STAND_IN)
def local(request, tmp_path):
    """(name, folder, probes): golden weights and the real tokenizer as the hub lays them out, and
    what plain loops compute from them.
    """
    name = request.param
    golden = GOLDEN[STAND_IN[name]]
    folder = tmp_path / "hub"
    folder.mkdir()
    config = json.loads((golden / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(golden / "model.safetensors")
    if name == "nt50m":
        (folder / "vocab.txt").write_text("\n".join(get_tokenizer("nt").vocabulary))
        save_file(tensors, folder / "model.safetensors")
    else:
        tokenizer = SHARED / "hub" / "dnaberts" / "tokenizer.json"  # DNABERT-2's too
        if not tokenizer.exists():
            pytest.skip("hub/dnaberts: the hub's files are not part of the repository")
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        prefix = "bert." if name == "dnaberts" else ""
        renamed = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        torch.save(renamed, folder / "pytorch_model.bin")
    naive = naive_nt if name == "nt50m" else naive_dnabert
    weights = {
        key.split(".", 1)[1]: tensor.double().numpy()
        for key, tensor in tensors.items() if key.split(".")[0] in ("esm", "bert")
    }
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    probes = []
    for probe in PROBES[name]:
        hidden = naive(weights, probe["input_ids"], heads, layers)  # (T, H)
        pooled = hidden.mean(axis=0) if probe["pooling"] == "mean" else hidden[0]
        probes.append(probe | {"first_8": pooled[:8].tolist()})
    return name, folder, probes


def test_the_check_passes(local):
    check_folder(*local)


def test_the_check_fails_on_another_id(local):
    name, folder, probes = local
    changed = [probe | {"input_ids": [*probe["input_ids"][:-1], 7]} for probe in probes]
    with pytest.raises(AssertionError, match="other tokens"):
        check_folder(name, folder, changed)


def test_the_check_fails_on_another_value(local):
    name, folder, probes = local
    for i in range(8):
        changed = [
            probe | {"first_8": [v + 2e-4 * (i == j) for j, v in enumerate(probe["first_8"])]}
            for probe in probes
        ]
        with pytest.raises(AssertionError, match="pooled values"):
            check_folder(name, folder, changed)


def test_the_check_fails_on_another_pooling(local):
    name, folder, probes = local
    changed = [
        probe | {"pooling": "cls" if probe["pooling"] == "mean" else "mean"} for probe in probes
    ]
    with pytest.raises(AssertionError, match="pooled values"):
        check_folder(name, folder, changed)


def test_the_check_fails_on_another_weight(local):
    """One matrix of the first layer, two percent larger."""
    name, folder, probes = local
    path = next(folder.glob("*model.*"))
    safe = path.suffix == ".safetensors"
    tensors = load_file(path) if safe else torch.load(path, weights_only=True)
    ends = ("encoder.layer.0.output.dense.weight", "encoder.layer.0.mlp.wo.weight")
    key = next(key for key in tensors if key.endswith(ends))
    tensors[key] *= 1.02
    save_file(tensors, path) if safe else torch.save(tensors, path)
    with pytest.raises(AssertionError, match="pooled values"):
        check_folder(name, folder, probes)


def test_the_check_fails_on_another_vocabulary(local):
    name, folder, probes = local
    if name == "nt50m":
        text = (folder / "vocab.txt").read_text()
        (folder / "vocab.txt").write_text(text.replace("AAAAAA\nAAAAAT", "AAAAAT\nAAAAAA"))
    else:
        text = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = text["model"]["vocab"]
        a, b = (entry for entry, number in vocabulary.items() if number in (134, 194))
        vocabulary |= {a: vocabulary[b], b: vocabulary[a]}
        (folder / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(AssertionError, match="other"):
        check_folder(name, folder, probes)


def test_probes_are_the_facts():
    path = SHARED / "facts" / "backbones.json"
    if not path.exists():
        pytest.skip("backbones.json: the facts are not part of the repository")
    facts = json.loads(path.read_text())["models"]
    assert set(PROBES) == set(facts) == {name for name, row in MODELS.items() if row.hub}
    for name, fact in facts.items():
        assert PROBES[name] == fact.get("probes", [fact.get("probe")])
        assert (WEIGHT_FILES.get(name, "model.safetensors")) in fact["files"]
