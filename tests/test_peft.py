"""Our adapters beside the PEFT library's: merged weights, three AdamW steps, and the library's
folder format, read and written.
"""

import copy
import json
import re

import numpy as np
import pytest
import torch
from helpers import batch, logits, scrambled
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from safetensors.torch import load_file, save_file
from torch import nn

import evaluate
import export
import prepare
import train
from taxa.backbones import load_backbone
from taxa.data.dataset import PreparedDataset
from taxa.errors import InputError
from taxa.ia3 import IA3Linear
from taxa.inject import merge_adapters
from taxa.lora import LoRALinear
from taxa.model import TaxonClassifier, masked_mean, sequence_losses
from taxa.runtime.files import save_tensors
from taxa.strategies import inject_adapters, train_only, trainable_names
from taxa.training import checkpoint, peft_format
from taxa.training.optim import adamw
from taxa.training.settings import settings_from_flags

peft = pytest.importorskip("peft")

# As a user of PEFT writes them: (all targets, those on the input).
# "Wqkv[key,value]" is the whole Wqkv to PEFT.
TARGETS = {
    ("tiny-nt", "lora", "corrected"): (["query", "value"], None),
    ("tiny-dnabert", "lora", "corrected"): (["Wqkv"], None),
    ("tiny-nt", "ia3", "corrected"):
        (r".*\.(key|value|layer\.\d+\.output\.dense)", r".*\.layer\.\d+\.output\.dense"),
    ("tiny-nt", "ia3", "published"):
        (["query", "value", "attention.output.dense"], ["attention.output.dense"]),
    ("tiny-dnabert", "ia3", "corrected"): (["Wqkv", "mlp.wo"], ["mlp.wo"]),
    ("tiny-dnabert", "ia3", "published"):
        (["Wqkv", "attention.output.dense"], ["attention.output.dense"]),
}


def library_config(name, strategy, protocol, **lora):
    """The library's configuration of one row of TARGETS; lora: its options of LoRA."""
    targets, inputs = TARGETS[name, strategy, protocol]
    if strategy == "lora":
        return peft.LoraConfig(target_modules=targets, **lora)
    return peft.IA3Config(target_modules=targets, feedforward_modules=inputs)


CASES = [(*case, r) for case in TARGETS for r in ((1, 4, 20) if case[1] == "lora" else (None,))]
every_case = pytest.mark.parametrize("name, strategy, protocol, r", CASES)
LABELS = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 0, 3]])


def pair(name, strategy, protocol, r, dropout=0.0):
    """(ours, theirs, settings, names that train).

    One classifier has our adapters and one PEFT's, with the same random values in both.
    """
    sizes = {"hidden_dropout_prob": dropout} if name == "tiny-dnabert" else {}
    classifier = TaxonClassifier(scrambled(name, **sizes), (4, 5, 6))
    flags = {"r": r, "lora_dropout": dropout} if strategy == "lora" else {}
    settings = settings_from_flags(name, strategy, protocol, None, **flags)
    ours = copy.deepcopy(classifier)
    theirs = copy.deepcopy(classifier)
    inject_adapters(ours, settings)
    names = trainable_names(ours, settings)
    train_only(ours, names)
    torch.manual_seed(3)
    for key, p in ours.named_parameters():
        if "lora_" in key or "ia3_l" in key:
            nn.init.normal_(p, mean=1.0 if "ia3" in key else 0.0, std=0.2)
    config = library_config(name, strategy, protocol, r=r, lora_alpha=32, lora_dropout=dropout)
    theirs.backbone = peft.inject_adapter_in_model(config, theirs.backbone)
    for p in theirs.heads.parameters():
        p.requires_grad_(settings["heads"] == "train")
    with torch.no_grad():
        for mine, other in pairs(ours, theirs):
            other.copy_(mine)
    return ours.eval(), theirs.eval(), settings, names


def pairs(ours, theirs):
    """[(our adapter tensor, PEFT's)], ours in PEFT's shape.

    (IA)3 on a part of an output has ones elsewhere.
    """
    found = []
    for key, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            other = theirs.get_submodule(key)
            found.append((module.lora_A, other.lora_A["default"].weight))
            found.append((module.lora_B, other.lora_B["default"].weight))
        elif isinstance(module, IA3Linear):
            mine = module.ia3_l[None] if module.feedforward else module.output_scale()[:, None]
            found.append((mine, theirs.get_submodule(key).ia3_l["default"]))
    adapters = [key for key, _ in theirs.named_parameters() if "lora_" in key or "ia3_l" in key]
    assert len(found) == len(adapters) > 0
    return found


def adapted(model):
    """[(name, layer)] of the layers of PEFT that have an adapter."""
    return [(key, module) for key, module in model.named_modules()
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]


@every_case
def test_merged_weights(name, strategy, protocol, r):
    ours, theirs, _, _ = pair(name, strategy, protocol, r)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    before = {key: p.clone() for key, p in ours.backbone.state_dict().items()}
    merge_adapters(ours)
    changed = 0
    for key, module in adapted(theirs.backbone):
        module.merge()
        mine = ours.backbone.get_submodule(key)
        other = module.get_base_layer()
        torch.testing.assert_close(mine.weight, other.weight, rtol=0, atol=1e-6)
        if mine.bias is not None:
            torch.testing.assert_close(mine.bias, other.bias, rtol=0, atol=1e-6)
        changed += not torch.allclose(mine.weight, before[f"{key}.weight"], rtol=0, atol=1e-2)
    assert changed == len(adapted(theirs.backbone))


@every_case
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_three_adamw_steps(name, strategy, protocol, r, dropout):
    """From the same batches and the same dropout masks come the same adapters and heads.

    Both draw one mask per adapter, in the order of the layers.
    """
    ours, theirs, settings, names = pair(name, strategy, protocol, r, dropout)
    if (name, strategy, protocol) == ("tiny-dnabert", "ia3", "corrected"):
        # PEFT would train the queries' third too.
        for module in theirs.backbone.modules():
            if hasattr(module, "ia3_l") and not module.is_feedforward:
                of_key_and_value = (torch.arange(72) >= 24)[:, None]
                module.ia3_l["default"].register_hook(lambda grad: grad * of_key_and_value)
    start = [mine.detach().clone() for mine, _ in pairs(ours, theirs)]
    for model in (ours, theirs):
        model.train()
        optimizer = adamw(model, 1e-3)
        for step in range(3):
            torch.manual_seed(step)
            sequence_losses(model(*batch(step)), LABELS).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for (mine, other), before in zip(pairs(ours, theirs), start):
        assert not torch.equal(mine, before)
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    for mine, other in zip(ours.heads.parameters(), theirs.heads.parameters()):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert {key for key in names if key.startswith("heads.")} == {
        f"heads.{key}" for key, p in theirs.heads.named_parameters() if p.requires_grad}


# -------------------------------------------------- the folder format, in both directions


MODELS = ("tiny-nt", "tiny-dnabert")
RUNS = {
    "lora": ["--r", "2", "--lora-dropout", "0"],
    "ia3": [],
    "published": ["--protocol", "published"],
    "full": [],
    "random": [],
}
MADE = [
    *((model, run) for model in MODELS for run in ("lora", "ia3", "published")),
    ("tiny-nt", "full"),
    ("tiny-dnabert", "random"),
]


@pytest.fixture(scope="module")
def runs(demo, weights, tmp_path_factory):
    """{(model, run): run folder} of two steps each.

    lora and ia3 have the defaults; published is (IA)3 under --protocol published.
    """
    root = tmp_path_factory.mktemp("runs")
    folders = {}
    for model, run in MADE:
        folders[model, run] = root / f"{model}-{run}"
        strategy = "ia3" if run == "published" else run
        train.main(["--model", model, "--strategy", strategy, "--data", str(demo),
                    "--weights", str(weights[model]), "--max-steps", "2", "--batch-size", "8",
                    "--lr", "0.05", "--out", str(folders[model, run]), *RUNS[run]])
    return folders


def exported(run, out, *flags):
    export.main([str(run / "ckpt.pt"), "--out", str(out), *flags])
    return out


def small_batch(demo, model):
    tokenizer = {"tiny-nt": "nt", "tiny-dnabert": "tiny-dnabert"}[model]
    batch = PreparedDataset(demo).split("test", tokenizer)[[0, 1, 2]]
    return batch["input_ids"], batch["attention_mask"]


def through_peft(folder, backbone, ids, mask):
    """Logits by nothing of ours but the backbone: PEFT's adapters, the pool, matrix products."""
    theirs = peft.PeftModel.from_pretrained(backbone, str(folder)).eval()
    with torch.no_grad():
        pooled = masked_mean(theirs(ids, mask), mask)
    heads = load_file(folder / "heads.safetensors")
    ranks = json.loads((folder / "labels.json").read_text())
    return {rank: pooled @ heads[f"{rank}.weight"].T + heads[f"{rank}.bias"] for rank in ranks}


def assert_same_logits(found, expected):
    assert list(found) == list(expected)
    for rank in expected:
        torch.testing.assert_close(found[rank], expected[rank], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("run", ["lora", "ia3", "published"])
def test_the_library_loads_our_folder(model, run, runs, weights, demo, tmp_path):
    folder = exported(runs[model, run], tmp_path / "out", "--adapters")
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "heads.safetensors", "labels.json",
        "taxa.json", "README.md"}
    content = checkpoint.read(runs[model, run] / "ckpt.pt")
    ids, mask = small_batch(demo, model)
    base = load_backbone(model, weights[model])
    with torch.no_grad():
        expected = checkpoint.rebuild(content)(ids, mask)
        without = masked_mean(base(ids, mask), mask)
    found = through_peft(folder, base, ids, mask)
    assert_same_logits(found, expected)
    heads = load_file(folder / "heads.safetensors")
    without = without @ heads["genus.weight"].T + heads["genus.bias"]
    assert not torch.allclose(without, expected["genus"], atol=1e-4), "the adapters do nothing"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("run", ["lora", "ia3", "published"])
def test_our_folder_is_a_checkpoint_again(model, run, runs, tmp_path):
    """Bit-equal tensors, and the same numbers from evaluate.py, whatever stands between."""
    folder = exported(runs[model, run], tmp_path / "out", "--adapters")
    first = checkpoint.read(runs[model, run] / "ckpt.pt")
    again = checkpoint.read(folder)
    of_the_file = {"format", "version"}
    assert again.keys() - of_the_file == first.keys() - of_the_file
    assert again["state"].keys() == first["state"].keys()
    assert all(torch.equal(again["state"][name], tensor) for name, tensor in first["state"].items())
    without_targets = {"targets": 0, "feedforward_targets": 0}
    assert again["settings"] | without_targets == first["settings"] | without_targets
    assert again["classes"] == first["classes"] and again["lineages"] == first["lineages"]
    evaluated = evaluate.main([str(folder), "--out", str(tmp_path / "evaluated")])
    assert evaluated == json.loads((runs[model, run] / "metrics.json").read_text())
    assert (tmp_path / "evaluated" / "metrics.json").is_file()
    assert not (folder / "metrics.json").exists()
    export.main([str(folder), "--adapters", "--out", str(tmp_path / "again")])
    tensors = "adapter_model.safetensors"
    assert (tmp_path / "again" / tensors).read_bytes() == (folder / tensors).read_bytes()


PREFIXES = ["", "backbone.", "esm."]


class Wrapped(nn.Module):
    """The encoder under another name, as the hub's masked-LM class or a classifier has it."""

    def __init__(self, backbone, name):
        super().__init__()
        self.config = backbone.config
        setattr(self, name, backbone)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name, strategy, protocol, r", [
    case for case in CASES if case[3] in (None, 4)])
def test_we_load_what_the_library_saves(name, strategy, protocol, r, prefix, tmp_path):
    backbone = scrambled(name)
    config = library_config(name, strategy, protocol, r=r, lora_alpha=16, lora_dropout=0.2)
    inner = copy.deepcopy(backbone)
    theirs = peft.get_peft_model(Wrapped(inner, prefix[:-1]) if prefix else inner, config)
    torch.manual_seed(4)
    for key, p in theirs.named_parameters():
        if "lora_" in key or "ia3_l" in key:
            nn.init.normal_(p, mean=1.0, std=0.2)
    theirs.save_pretrained(tmp_path)
    settings, state = peft_format.read_adapters(tmp_path)
    if strategy == "lora":
        assert (settings["r"], settings["lora_alpha"]) == (4, 16.0)
        assert settings["lora_dropout"] == 0.2
    ours = TaxonClassifier(backbone, (4, 5, 6))
    inject_adapters(ours, settings)
    ours.eval()
    adapters = {key for key, _ in ours.named_parameters() if "lora_" in key or "ia3_l" in key}
    assert set(state) == adapters
    line = peft_format.start_from(ours, tmp_path, state, {}, {})
    assert "not taken (none with a labels.json" in line
    inner = theirs.base_model.model
    inner = getattr(inner, prefix[:-1]) if prefix else inner
    ids, mask = batch()
    with torch.no_grad():
        expected = inner.eval()(ids, mask)
        torch.testing.assert_close(ours.backbone(ids, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", ["lora", "ia3"])
def test_train_starts_from_a_folder(run, runs, demo, weights, tmp_path, capsys):
    """The step is so small that nothing moves: the run starts, and ends, at what the folder holds.

    Once with the heads of the folder, and once without.
    """
    model = {"lora": "tiny-nt", "ia3": "tiny-dnabert"}[run]
    folder = exported(runs[model, run], tmp_path / "out", "--adapters")
    arguments = ["--model", model, "--strategy", run, "--data", str(demo),
                 "--weights", str(weights[model]), "--max-steps", "1", "--batch-size", "8",
                 "--lr", "1e-12", "--adapters", str(folder), "--out"]
    train.main([*arguments, str(tmp_path / "more")])
    assert "heads are taken" in capsys.readouterr().out
    first = checkpoint.read(runs[model, run] / "ckpt.pt")["state"]
    more = checkpoint.read(tmp_path / "more" / "ckpt.pt")["state"]
    assert first.keys() == more.keys()
    for name in first:
        torch.testing.assert_close(more[name], first[name], rtol=0, atol=1e-8)
    (folder / "labels.json").unlink()
    train.main([*arguments, str(tmp_path / "other")])
    assert "heads are not taken" in capsys.readouterr().out
    other = checkpoint.read(tmp_path / "other" / "ckpt.pt")["state"]
    for name in first:
        same = torch.allclose(other[name], first[name], atol=1e-8)
        assert same is not name.startswith("heads."), name


def test_a_query_third_that_peft_has_trained_is_kept(runs, tmp_path):
    """With ones beside it the vector is our [key,value]; with anything else it is all of Wqkv."""
    folder = exported(runs["tiny-dnabert", "ia3"], tmp_path / "out", "--adapters")
    settings, state = peft_format.read_adapters(folder)
    name = "encoder.layer.1.attention.self.Wqkv"
    assert f"{name}[key,value]" in settings["targets"]
    assert state[f"backbone.{name}.ia3_l"].shape == (64,)
    tensors = load_file(folder / "adapter_model.safetensors")
    vector = tensors[f"base_model.model.{name}.ia3_l"]
    assert vector.shape == (96, 1)
    assert (vector[:32] == 1).all() and not (vector[32:] == 1).all()
    vector[3] = 0.5
    # By a rename: older versions map the loaded tensors from the file.
    save_tensors(folder / "adapter_model.safetensors", tensors)
    settings, state = peft_format.read_adapters(folder)
    assert name in settings["targets"]
    assert torch.equal(state[f"backbone.{name}.ia3_l"], vector.flatten())
    checkpoint.rebuild(checkpoint.read(folder))


# -------------------------------------------------- data labelled by the classes of a run


@pytest.mark.parametrize("what", ["ckpt.pt", "adapters", "merged"])
def test_an_external_test_set_is_labelled_by_the_classes_of_a_run(what, runs, demo, tmp_path):
    run = runs["tiny-nt", "lora"]
    given = run / "ckpt.pt"
    if what != "ckpt.pt":
        given = exported(run, tmp_path / "x", *(["--adapters"] if what == "adapters" else []))
    source = demo / "source"
    prepare.main(["--fasta", str(source / "Archaea_db.fa"), str(source / "Viruses_db.fa"),
                  "--taxdump", str(source / "taxdmp_simulated.zip"), "--classes-of", str(given),
                  "--workers", "1", "--out", str(tmp_path / "data")])
    data, whole = PreparedDataset(tmp_path / "data"), PreparedDataset(demo)
    assert data.classes == whole.classes
    counts = whole.manifest["superkingdoms"]
    there = {name: counts[name] for name in ("Archaea", "Viruses")}
    assert data.manifest["superkingdoms"] == there | {"Bacteria": 0, "Eukaryota": 0}
    assert data.manifest["splits"] == {"train": 0, "validation": 0, "test": sum(there.values())}
    assert data.manifest["settings"]["classes_of"] == given.name

    def taxids_and_labels(folder):
        records = np.load(folder / "records.npy")
        return zip(records["taxid"].tolist(), np.load(folder / "labels.npy").tolist())

    of_taxid = {}
    for split in ("train", "validation", "test"):
        of_taxid.update(taxids_and_labels(demo / split))
    for taxid, row in taxids_and_labels(data.folder / "test"):
        assert row == of_taxid[taxid]
    if what == "ckpt.pt":
        found = evaluate.main([str(given), "--data", str(data.folder),
                               "--out", str(tmp_path / "found")])
        assert found["sequences"] == sum(there.values())
        assert found["averaged_over"]["superkingdom"] == {"present": 2, "classes": 4}


def test_what_is_of_no_class_of_the_run_is_dropped_and_counted(runs, demo, tmp_path):
    folder = exported(runs["tiny-nt", "lora"], tmp_path / "x", "--adapters")
    labels = json.loads((folder / "labels.json").read_text())
    virus = next(row for row in labels["superkingdom"] if row["name"] == "Viruses")
    labels["superkingdom"].remove(virus)
    (folder / "labels.json").write_text(json.dumps(labels))
    source = demo / "source"
    arguments = ["--fasta", *map(str, sorted(source.glob("*.fa"))),
                 "--taxdump", str(source / "taxdmp_simulated.zip"),
                 "--classes-of", str(folder), "--workers", "1", "--out"]
    prepare.main([*arguments, str(tmp_path / "data")])
    data = PreparedDataset(tmp_path / "data")
    assert data.classes == labels
    viruses = PreparedDataset(demo).manifest["superkingdoms"]["Viruses"]
    dropped = [(row["reason"], row["sequences"]) for row in data.manifest["dropped"]]
    assert dropped == [("superkingdom not of --classes-of", viruses)]
    for flag, value in (("--ranks", "genus"), ("--test", "0.1"), ("--group", "^.")):
        with pytest.raises(InputError, match=f"{flag} does nothing here"):
            prepare.main([*arguments, str(tmp_path / "other"), flag, value])


# ------------------------------------------------------------------ the merged network


@pytest.mark.parametrize("model, run", MADE)
def test_merged_folder(model, run, runs, demo, weights, tmp_path):
    """The hub's keys in a plain safetensors file; loaded as --weights; the same logits.

    The card's own lines run.
    """
    folder = exported(runs[model, run], tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "heads.safetensors", "labels.json", "taxa.json",
        "README.md"}
    content = checkpoint.read(runs[model, run] / "ckpt.pt")
    ids, mask = small_batch(demo, model)
    prefix = {"tiny-nt": "esm.", "tiny-dnabert": "bert."}[model]
    hub = {key for key in load_file(weights[model] / "model.safetensors") if key.startswith(prefix)}
    assert set(load_file(folder / "model.safetensors")) == hub
    with torch.no_grad():
        expected = checkpoint.rebuild(content)(ids, mask)
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.+?)```", card, re.DOTALL)[1]
    code = code.replace('"."', repr(str(folder))).replace("labels.json", f"{folder}/labels.json")
    values = {"input_ids": ids, "attention_mask": mask}
    exec(code.replace("heads.safetensors", f"{folder}/heads.safetensors"), values)
    assert_same_logits(values["logits"], expected)
    labels = json.loads((folder / "labels.json").read_text())
    assert labels == content["classes"] and set(labels["genus"][0]) == {"taxid", "name"}
    for wanted in (content["data"]["digest"], content["tokenizer"]["digest"],
                   f"strategy: {content['settings']['strategy']}",
                   f"{content['metrics']['loss']:.4f}", "validation split", "test split"):
        assert wanted in card
    assert ("from scratch" in card) == (run == "random")


def run_adapter_card(folder, ids, mask, base=None):
    """Run the lines of a folder's card. Returns their logits. base: the folder of base weights."""
    code = re.search(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("DIR of the base weights", str(base))
    code = code.replace('"."', repr(str(folder)))
    code = code.replace("heads.safetensors", f"{folder}/heads.safetensors")
    values = {"input_ids": ids, "attention_mask": mask}
    exec(code, values)
    return values["logits"]


def test_the_adapter_cards_own_lines_run(runs, demo, weights, tmp_path):
    folder = exported(runs["tiny-nt", "lora"], tmp_path / "out", "--adapters")
    ids, mask = small_batch(demo, "tiny-nt")
    found = run_adapter_card(folder, ids, mask, weights["tiny-nt"])
    with torch.no_grad():
        assert_same_logits(found, checkpoint.rebuild(checkpoint.read(folder))(ids, mask))


BASES = [  # model, base -> what the card must say
    ("nt50m", {"source": "hub", "hub": "InstaDeepAI/x", "revision": "abc", "digest": "d" * 64},
     ["license: cc-by-nc-sa-4.0", "revision abc", "no commercial use"]),
    ("dnaberts", {"source": "hub", "hub": "zhihan1996/x", "revision": "abc", "digest": "d" * 64},
     ["license: apache-2.0", "base_model: zhihan1996/DNABERT-S"]),
    ("dnabert2", {"source": "folder", "folder": "x", "digest": "d" * 64},
     ["license: apache-2.0", "a local folder"]),
    ("nt50m", {"source": "none", "config": None}, ["Trained from scratch"]),
    ("tiny-nt", {"source": "seed", "seed": 0, "digest": "d" * 64},
     ["Trained from scratch: random weights of seed 0"]),
]


def test_the_adapter_card_of_a_seeded_base_loads_it(demo, tmp_path):
    train.main(["--model", "tiny-dnabert", "--strategy", "lora", "--data", str(demo),
                "--max-steps", "1", "--out", str(tmp_path / "run")])
    folder = exported(tmp_path / "run", tmp_path / "out", "--adapters")
    ids, mask = small_batch(demo, "tiny-dnabert")
    found = run_adapter_card(folder, ids, mask)
    with torch.no_grad():
        assert_same_logits(found, checkpoint.rebuild(checkpoint.read(folder))(ids, mask))


def test_the_card_is_one_of_the_hubs_and_says_what_it_was_trained_on(runs, demo, tmp_path):
    folder = exported(runs["tiny-nt", "full"], tmp_path / "out")
    card = (folder / "README.md").read_text()
    manifest = PreparedDataset(demo).manifest
    loaded = ModelCard(card)  # the hub's own reading of the header
    assert loaded.data.tags == ["biology", "dna", "taxonomy"]
    header = loaded.data.to_dict()
    assert ModelCardData(**header).to_dict() == header == metadata_load(folder / "README.md")
    for source in manifest["sources"]:
        said = f"{source['file']}: {source['sequences']:,} sequences, SHA-256 {source['sha256']}"
        assert said in card
    assert f"train {manifest['splits']['train']:,}, " in card
    assert manifest["taxdump"]["sha256"] in card
    assert "hf upload" in card and "sequences of the test split" in card
    content = checkpoint.read(runs["tiny-nt", "full"] / "ckpt.pt")
    content["data"] = {"folder": str(tmp_path), "digest": content["data"]["digest"]}
    number = {"rank": "genus", "auroc": 0.75, "threshold": None}
    confidence = {"softmax": number, "energy": number}
    unseen = {"sequences": 7, "seen_sequences": 9, "ranks": {}, "confidence": confidence}
    card = export.model_card(content, {"unseen": unseen}, False)
    assert "its folder was not there" in card
    assert "Genera that nobody trained on" in card and "0.7500" in card


@pytest.mark.parametrize("model, base, said", BASES)
def test_licence_of_the_base(model, base, said, runs):
    content = checkpoint.read(runs["tiny-nt", "full"] / "ckpt.pt") | {"model": model, "base": base}
    card = export.model_card(content, {}, False)
    assert all(text in card for text in said), card
    assert ("license:" in card) == ("Trained from scratch" not in card)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_own_classes_do_not_fit(name, runs, tmp_path):
    """Why the card does not promise EsmModel or BertModel.

    They have the same model_type, but not the gate and the fused projections.
    """
    from transformers import BertConfig, BertModel, EsmConfig, EsmModel

    folder = exported(runs[name, "lora"], tmp_path / "out")
    classes = {"tiny-nt": (EsmConfig, EsmModel), "tiny-dnabert": (BertConfig, BertModel)}
    config, native = classes[name]
    with torch.device("meta"):
        theirs = native(config(**json.loads((folder / "config.json").read_text()))).state_dict()
    tensors = load_file(folder / "model.safetensors")
    ours = {key.split(".", 1)[1]: tensor for key, tensor in tensors.items()}
    assert [key for key in ours if key not in theirs or theirs[key].shape != ours[key].shape]


# ------------------------------------------------------------------ wrong input


def test_wrong_input_of_export(runs, tmp_path):
    run = runs["tiny-nt", "full"] / "ckpt.pt"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    for flags, message in [
        ([run, "--adapters", "--out", tmp_path / "x"], "--strategy full has no adapters"),
        ([run, "--adapters", "--weights", "x", "--out", tmp_path / "x"], "leave out --weights"),
        ([run, "--out", tmp_path / "thesis"], "exists: give another --out"),
        ([run, "--out", tmp_path / "thesis", "--overwrite"], "no folder of export.py"),
        ([tmp_path / "none.pt", "--out", tmp_path / "x"], "no such file"),
        ([tmp_path, "--out", tmp_path / "x"], "a folder; give the ckpt.pt"),
    ]:
        with pytest.raises(InputError, match=message):
            export.main([str(flag) for flag in flags])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def broken(folder, config=None, tensors=None):
    """Change adapter_config.json, or tensors by name (None removes)."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    found = load_file(folder / "adapter_model.safetensors") | (tensors or {})
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, folder / "adapter_model.safetensors")


QUERY = "base_model.model.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("config, tensors, message", [
    ({"peft_type": "PREFIX_TUNING"}, {}, "peft_type is prefix_tuning"),
    ({"use_rslora": 1}, {}, "use_rslora is 1"),
    ({"lora_alpha": None}, {}, "lora_alpha is None"),
    ({"lora_alpha": float("nan")}, {}, "lora_alpha is nan"),
    ({"lora_dropout": 1.5}, {}, "lora_dropout is 1.5"),
    ({"r": True}, {}, "r is True"),
    ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights is 'pissa_niter_4'"),
    ({"init_lora_weights": "corda"}, {}, "init_lora_weights is 'corda'"),
    ({"use_qalora": True}, {}, "use_qalora is True"),
    ({"target_parameters": ["query.weight"]}, {}, "target_parameters"),
    ({"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
    ({"a_key_of_tomorrow": True}, {}, "a_key_of_tomorrow is True, which is not computed here"),
    ({}, {"base_model.model.encoder.layer.0.LayerNorm.weight": torch.ones(32)},
     "LayerNorm.weight is no lora adapter"),
    ({}, {"base_model.model.embeddings.word_embeddings.weight": torch.ones(9, 32)},
     "word_embeddings.weight is no lora adapter"),
    ({"rank_pattern": {"query": 8}}, {}, "rank_pattern"),
    ({"bias": "all"}, {}, "bias is 'all'"),
    ({"r": 3}, {}, "of r = 3"),
    ({}, {f"{QUERY}.lora_B.weight": None}, "is no pair"),
    ({}, {f"{QUERY}.lora_magnitude_vector": torch.ones(32)}, "is no lora adapter"),
    ({}, {"base_model.model.pooler.dense.lora_A.weight": torch.ones(2, 32)},
     "is no lora adapter"),
    ({}, {f"{QUERY}.ia3_l": torch.ones(32, 1)}, "is no lora adapter"),
    ({"peft_type": "IA3"}, {}, "r is 2, which is not computed here"),
    ({"peft_type": "IA3", "r": None, "lora_alpha": None, "bias": None}, {}, "is no ia3 adapter"),
])
def test_a_folder_that_is_refused(config, tensors, message, runs, tmp_path):
    folder = exported(runs["tiny-nt", "lora"], tmp_path / "out", "--adapters")
    broken(folder, config, tensors)
    with pytest.raises(InputError, match=message):
        peft_format.read_adapters(folder)


@pytest.mark.parametrize("config", [peft.LoraConfig(), peft.IA3Config()])
def test_every_key_that_the_library_writes_is_computed_or_refused(config):
    """As the library has it: its defaults pass.

    Any key of it that is not listed as computed, or as of no matter, is refused by name.
    """
    defaults = json.loads(json.dumps(config.to_dict(), default=list))
    kind, found = peft_format.read_config("here", defaults)
    assert kind == config.peft_type.lower()
    # And so what is missing from a folder is the default.
    assert found == {key: defaults[key] for key in peft_format.COMPUTED[kind]}
    assert peft_format.read_config("here", {"peft_type": kind}) == (kind, found)
    listed = peft_format.NO_MATTER | peft_format.TOLD_BY_TENSORS
    assert not listed & found.keys()
    for key in defaults.keys() - listed:
        message = f"^here: {key} is 'something', which is not computed here$"
        with pytest.raises(InputError, match=message):
            peft_format.read_config("here", defaults | {key: "something"})


def saved_by_peft(folder, name="tiny-nt", wrapped="", train=(), **config):
    """Save adapters of random values with the library.

    Returns its network, bare of the wrapper, and the backbone as it was.
    """
    backbone = scrambled(name)
    model = Wrapped(copy.deepcopy(backbone), wrapped) if wrapped else copy.deepcopy(backbone)
    for head in train:
        setattr(model, head, nn.Linear(backbone.config.hidden_size, 3))
    config = {"r": 4, **config}
    theirs = peft.get_peft_model(model, library_config(name, "lora", "corrected", **config))
    torch.manual_seed(4)
    for key, p in theirs.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(folder)
    inner = theirs.base_model.model
    return (getattr(inner, wrapped) if wrapped else inner).eval(), backbone


def ours_of(folder, backbone):
    """(the backbone with a folder's adapters, the line for the user)."""
    settings, state = peft_format.read_adapters(folder)
    ours = TaxonClassifier(backbone, (4, 5, 6))
    inject_adapters(ours, settings)
    return ours.eval().backbone, peft_format.start_from(ours, folder, state, {}, {})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [
    {"use_rslora": True, "lora_alpha": 3},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": False},
    {"r": 8, "lora_alpha": 8},
])
def test_what_we_compute_is_what_the_library_computes(config, name, tmp_path):
    theirs, backbone = saved_by_peft(tmp_path, name, **config)
    ours, _ = ours_of(tmp_path, backbone)
    ids, mask = batch()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, mask), theirs(ids, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config, message", [
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ({"use_dora": True}, "use_dora is True"),
    ({"rank_pattern": {"query": 2}}, "rank_pattern"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"alpha_pattern": {"query": 2}}, "alpha_pattern"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
])
def test_what_the_library_saves_and_we_do_not_compute_is_refused(config, message, tmp_path):
    saved_by_peft(tmp_path, **config)
    with pytest.raises(InputError, match=f"adapter_config.json: {message}"):
        peft_format.read_adapters(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_our_rslora_is_the_librarys(name, tmp_path):
    backbone = scrambled(name)
    ours = TaxonClassifier(copy.deepcopy(backbone), (4, 5, 6))
    settings = settings_from_flags(name, "lora", r=4, lora_alpha=8.0, rslora=True)
    inject_adapters(ours, settings)
    for module in ours.modules():
        if isinstance(module, LoRALinear):
            assert module.scaling == 4.0  # 8 / sqrt(4)
            nn.init.normal_(module.lora_B, std=0.2)
    peft_format.write_adapters(tmp_path, ours.backbone, settings, {})
    assert peft_format.read_adapters(tmp_path)[0]["rslora"] is True
    theirs = peft.PeftModel.from_pretrained(backbone, str(tmp_path)).eval()
    ids, mask = batch()
    with torch.no_grad():
        expected = ours.eval().backbone(ids, mask)
        torch.testing.assert_close(theirs(ids, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrapped", ["", "esm"])
@pytest.mark.parametrize("heads", [("classifier",), ("score", "classifier")])
def test_another_classifier_beside_the_adapters_is_named_and_left(heads, wrapped, tmp_path):
    theirs, backbone = saved_by_peft(tmp_path, wrapped=wrapped, train=heads,
                                     modules_to_save=list(heads))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("classifier.weight" in key for key in saved)
    ours, line = ours_of(tmp_path, backbone)
    assert line.endswith("heads are not taken (none with a labels.json in it); "
                         f"{', '.join(sorted(heads))} in it: left")
    ids, mask = batch()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, mask), theirs(ids, mask), rtol=0, atol=1e-5)


def test_a_part_of_the_encoder_trained_whole_is_refused(tmp_path):
    saved_by_peft(tmp_path, wrapped="esm", modules_to_save=["word_embeddings"])
    message = "word_embeddings.weight is no lora adapter on a Linear of the encoder"
    with pytest.raises(InputError, match=message):
        peft_format.read_adapters(tmp_path)


def test_labels_json_is_checked(tmp_path):
    for text, message in [
        ("{}", "not the class tables"),
        ("[1]", "not the class tables"),
        ('{"genus": [{"taxid": "x", "name": "G"}]}', "not the class tables"),
        ("{", "not readable as JSON"),
        (None, "no such file"),
    ]:
        (tmp_path / "labels.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "labels.json").write_text(text)
        with pytest.raises(InputError, match=message):
            peft_format.read_labels(tmp_path)


def test_wrong_input_of_train_adapters(runs, demo, weights, tmp_path):
    folder = exported(runs["tiny-nt", "lora"], tmp_path / "out", "--adapters")
    given = ["--model", "tiny-nt", "--strategy", "lora", "--data", str(demo),
             "--out", str(tmp_path / "run"), "--adapters"]
    for flags, message in [
        ([*given, str(tmp_path / "none")], "adapter_config.json: no such file"),
        ([*given, str(folder), "--r", "4"], "decides --r: leave out"),
        ([*given, str(folder), "--strategy", "ia3"], "holds LORA adapters"),
        ([*given, str(folder), "--strategy", "full"], "holds LORA adapters"),
        ([*given, str(folder)], "trained on other base weights"),
        ([*given, str(folder), "--model", "tiny-dnabert"], "matches no module"),
    ]:
        with pytest.raises(InputError, match=message):
            train.main(flags)
    (folder / "taxa.json").unlink()
    with pytest.raises(InputError, match="do not fit this model"):  # another hidden size
        train.main([*given, str(folder)])
    with pytest.raises(InputError, match="without the heads and taxa.json"):
        evaluate.main([str(folder)])
    assert not (tmp_path / "run").exists()
