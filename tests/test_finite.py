"""Numbers that are not finite are refused by name where they are read.

They are never a table, a temperature or a JSON document.
"""

import json
import re

import pytest
import torch
from helpers import command
from safetensors.torch import load_file, save_file

import evaluate
import export
import predict
import pretrain
import train
from taxa.backbones import load_backbone
from taxa.errors import InputError
from taxa.evaluation.evaluation import split_temperature
from taxa.model import TaxonClassifier
from taxa.runtime.distributed import World
from taxa.runtime.files import check_finite, save_tensors, write_json
from taxa.training import checkpoint

BAD = [float("nan"), float("inf"), -float("inf")]
ONE_STEP = ("--max-steps", "1", "--batch-size", "32")


def test_the_first_tensor_that_is_not_finite_is_named():
    good = {
        "a": torch.zeros(3),
        "whole numbers": torch.arange(3),
        "none": torch.zeros(0),
        "largest": torch.tensor([3.4e38] * 9),  # whose sum is infinite
    }
    check_finite("here", good)
    for bad in BAD:
        spoilt = {**good, "b.weight": torch.tensor([1, 2, 3, bad]), "c": torch.tensor([bad])}
        with pytest.raises(InputError, match="^here: b.weight is not finite: 1 of its 4 numbers"):
            check_finite("here", spoilt)


@pytest.fixture(scope="module")
def runs(short, weights, tmp_path_factory):
    """{strategy: run folder} of a step each."""
    root = tmp_path_factory.mktemp("runs")
    for strategy in ("lora", "full"):
        train.main(command("tiny-nt", strategy, short, weights, root / strategy, *ONE_STEP))
    return {strategy: root / strategy for strategy in ("lora", "full")}


def spoilt(run, path, name, value):
    content = checkpoint.read(run / "ckpt.pt")
    content["state"][name].view(-1)[1] = value
    checkpoint.save(path, content)
    return str(path)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "name", ["backbone.encoder.layer.1.attention.self.query.lora_B", "heads.phylum.bias"]
)
def test_an_adapter_or_a_head_of_a_checkpoint(name, value, runs, tmp_path):
    path = spoilt(runs["lora"], tmp_path / "ckpt.pt", name, value)
    (tmp_path / "reads.fa").write_text(">a\nACGTACGTACGT\n")
    message = f"ckpt.pt: {re.escape(name)} is not finite: 1 of its "
    scripts = [
        (evaluate, []),
        (export, []),
        (export, ["--adapters"]),
        (predict, [str(tmp_path / "reads.fa")]),
    ]
    for script, words in scripts:
        with pytest.raises(InputError, match=message):
            script.main([path, *words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_adapters_and_heads_of_a_folder(runs, short, weights, tmp_path):
    of_files = {
        "adapter_model.safetensors": "layer.0.attention.self.value.lora_A.weight",
        "heads.safetensors": "genus.weight",
    }
    for file, name in of_files.items():
        folder = tmp_path / file
        export.main([str(runs["lora"] / "ckpt.pt"), "--adapters", "--out", str(folder)])
        tensors = load_file(folder / file)
        key, = (key for key in tensors if key.endswith(name))
        tensors[key].view(-1)[0] = float("nan")
        save_tensors(folder / file, tensors)
        starts = ("--adapters", str(folder))
        arguments = command("tiny-nt", "lora", short, weights, tmp_path / "run", *starts)
        decided = ("--r", "4", "--lora-dropout", "0")  # by the folder
        arguments = [word for word in arguments if word not in decided]
        for script, words in ((train, arguments), (evaluate, [str(folder)])):
            with pytest.raises(InputError, match=f"{file}: {re.escape(key)} is not finite"):
                script.main(words)
    assert not (tmp_path / "run").exists()


def test_base_weights(short, weights, tmp_path):
    spoilt, out = tmp_path / "w", tmp_path / "run"
    spoilt.mkdir()
    tensors = load_file(weights["tiny-nt"] / "model.safetensors")
    tensors["esm.encoder.layer.1.output.dense.weight"][3, 5] = float("inf")
    save_file(tensors, spoilt / "model.safetensors")
    (spoilt / "config.json").write_text((weights["tiny-nt"] / "config.json").read_text())
    message = "weights from .*w: encoder.layer.1.output.dense.weight is not finite"
    with pytest.raises(InputError, match=message):
        load_backbone("tiny-nt", spoilt)
    with pytest.raises(InputError, match=message):
        train.main(command("tiny-nt", "ia3", short, {"tiny-nt": spoilt}, out))
    words = ["--model", "tiny-nt", "--data", str(short), "--weights", str(spoilt)]
    with pytest.raises(InputError, match=message):
        pretrain.main([*words, "--warmup-steps", "1", "--out", str(out)])
    assert not out.exists()


# ------------------------------------------------------------------ finite weights that overflow


def overflow(state):
    """Change the tensors of a classifier in place.

    The pooled vector becomes all ones, and each logit their sum times 3e38.
    """
    for name, tensor in state.items():
        if name.startswith("heads.") and name.endswith("weight"):
            tensor.fill_(3e38)
        if "emb_layer_norm_after" in name:
            tensor.fill_(name.endswith("bias"))


@pytest.fixture
def overflowing(runs, tmp_path):
    """A checkpoint of finite numbers whose logits are not: the path."""
    content = checkpoint.read(runs["full"] / "ckpt.pt")
    overflow(content["state"])
    checkpoint.save(tmp_path / "ckpt.pt", content)
    return tmp_path / "ckpt.pt"


@pytest.mark.parametrize(
    "flags, what",
    [([], "loss"), (["--temperature"], "logit"), (["--split", "validation"], "loss")],
)
def test_no_table_and_no_temperature_of_them(flags, what, overflowing, capsys):
    sequences = r"\d+ of \d+ sequences of the (test|validation) split"
    out = overflowing.parent / "out"
    with pytest.raises(InputError, match=f"{sequences} have a {what} that is not finite"):
        evaluate.main([str(overflowing), *flags, "--out", str(out)])
    assert "balanced accuracy" not in capsys.readouterr().out
    assert not list(out.glob("*"))


@pytest.mark.parametrize("format", ["tsv", "jsonl", "kraken"])
def test_no_prediction_of_them(format, overflowing):
    reads, out = overflowing.parent / "reads.fa", overflowing.parent / "out"
    reads.write_text(">n\nNNN\n>first read\nACGTACGTACGT\n>b\nACGT\n")
    message = "^2 reads get probabilities that are not finite, the first 'first read'"
    with pytest.raises(InputError, match=message):
        predict.main([str(overflowing), str(reads), "--format", format, "--out", str(out)])
    assert not out.exists()


def test_no_folder_to_publish_of_them(overflowing):
    with pytest.raises(InputError, match="logits of random sequences are not finite"):
        export.main([str(overflowing), "--out", str(overflowing.parent / "out")])
    assert [path.name for path in overflowing.parent.iterdir()] == ["ckpt.pt"]


def test_a_temperature_that_has_a_minimum_is_still_found(runs, short):
    """The check takes nothing from networks that are in order."""
    found = evaluate.main([str(runs["full"] / "ckpt.pt"), "--temperature"])
    assert all(0.05 < T < 20 for T in found["scaled"]["temperature"].values())


def test_split_temperature_does_not_end_at_its_lower_bound_for_nan(short):
    class Split:
        name, labels = "validation", torch.zeros(4, 1).long().numpy()

        def __len__(self):
            return 4

        def __getitem__(self, rows):
            return {
                "input_ids": torch.zeros(len(rows), 2).long(),
                "attention_mask": torch.ones(len(rows), 2).long(),
                "labels": torch.zeros(len(rows), 1).long(),
            }

    class Model(torch.nn.Module):
        heads = {"genus": torch.nn.Linear(2, 3)}

        def forward(self, ids, mask):
            return {"genus": torch.tensor([[0.0, 1.0, float("nan")]]).expand(len(ids), 3)}

    message = "4 of 4 sequences of the validation split have a logit that is not finite"
    with pytest.raises(InputError, match=message):
        split_temperature(World(0, 1, torch.device("cpu")), Model(), Split(), 2)


@pytest.mark.parametrize("when", ["validation", "test"])
def test_a_run_whose_loss_is_not_finite_ends_with_2_and_no_metrics(
    when, short, weights, tmp_path, monkeypatch
):
    """In the validation no checkpoint is written; in the test no table."""
    run_split = train.run_split

    def spoil(w, model, split, *arguments, **more):
        if split.name == when:
            overflow(model.state_dict())
        return run_split(w, model, split, *arguments, **more)

    monkeypatch.setattr(train, "run_split", spoil)
    out = tmp_path / "run"
    message = f"of the {when} split have a loss that is not finite.*--lr"
    with pytest.raises(InputError, match=message):
        train.main(command("tiny-nt", "full", short, weights, out, *ONE_STEP))
    assert (out / "ckpt.pt").exists() == (when == "test")
    assert not (out / "metrics.json").exists()
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} in {line}"))


# ------------------------------------------------------------------ documents


@pytest.mark.parametrize("value", BAD)
def test_no_json_document_holds_them(value, tmp_path):
    write_json(tmp_path / "metrics.json", {"loss": 1.0})
    message = "metrics.json is not written: a number in it is NaN or infinite"
    with pytest.raises(InputError, match=message):
        write_json(tmp_path / "metrics.json", {"ranks": [{"loss": value}]})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"loss": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("precision, low, high", [("fp32", 0, 1e-4), ("bf16", 1e-4, 1)])
def test_the_card_says_how_far_merging_moves_the_logits(precision, low, high, runs, tmp_path):
    """Against the exported folder as a user loads it.

    On the same sequences, in the precision of the run.
    """
    content = checkpoint.read(runs["lora"] / "ckpt.pt") | {"precision": precision}
    torch.manual_seed(0)
    for name in content["state"]:
        if name.endswith("lora_B"):
            content["state"][name].normal_(std=0.3)
    checkpoint.save(tmp_path / "ckpt.pt", content)
    export.main([str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "out")])
    ids = export.random_tokens(content)
    assert ids.shape == (4, 16)  # 90 bases: 15 6-mers and <cls>
    assert len(set(ids.flatten().tolist())) > 50
    num_classes = {rank: len(table) for rank, table in content["classes"].items()}
    exported = TaxonClassifier(load_backbone("tiny-nt", tmp_path / "out"), num_classes)
    exported.heads.load_state_dict(load_file(tmp_path / "out" / "heads.safetensors"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        pairs = zip(exported.eval()(ids).values(), checkpoint.rebuild(content)(ids).values())
        expected = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
    where = f"on 4 random sequences of 16 tokens, in {precision} on a CPU"
    card = (tmp_path / "out" / "README.md").read_text()
    found = re.search(rf"{where}, .* is ([-0-9.e]+) \(logits up to", card)
    assert float(found[1]) == pytest.approx(expected, rel=1e-2)
    assert low < expected < high


def test_a_file_of_tensors_is_never_written_in_place(tmp_path):
    """Tensors loaded from a file may be mapped from it.

    The old bytes stay what they were under another name.
    """
    path, other = tmp_path / "a.safetensors", tmp_path / "link"
    save_tensors(path, {"a": torch.zeros(1000)})
    other.hardlink_to(path)
    before, loaded = other.read_bytes(), load_file(path)
    save_tensors(path, {"a": torch.ones(1000)})
    assert other.read_bytes() == before
    assert (loaded["a"] == 0).all() and (load_file(path)["a"] == 1).all()
