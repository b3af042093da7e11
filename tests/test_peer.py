"""The benchmarks' peer computes what our classifier does: same weights, logits, gradients,
parameters that train. Both benchmarks run.
"""

import copy
import json
import sys

import pytest
import torch
from helpers import ROOT, scrambled

from taxa.model import TaxonClassifier, sequence_losses
from taxa.strategies import inject_adapters, train_only, trainable_names
from taxa.training.settings import settings_from_flags

pytest.importorskip("peft")
sys.path.insert(0, str(ROOT / "benchmarks"))
import loader
import step
from peer import make_peer


@pytest.mark.parametrize("strategy", ["full", "lora", "ia3", "freeze75"])
def test_the_peer_computes_the_same(strategy):
    backbone = scrambled("tiny-nt")
    classifier = TaxonClassifier(backbone, (4, 5, 6))
    no_dropout = {"lora_dropout": 0.0} if strategy == "lora" else {}
    settings = settings_from_flags("tiny-nt", strategy, **no_dropout)
    peer = make_peer(classifier, settings)
    ours = copy.deepcopy(classifier).train()
    inject_adapters(ours, settings)
    train_only(ours, trainable_names(ours, settings))

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, backbone.config.vocab_size, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    labels = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 0, 3]])
    for model in (ours, peer):
        sequence_losses(model(ids, mask), labels).mean().backward()
    grads, theirs = (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for model in (ours, peer)
    )
    assert len(grads) == len(theirs)
    assert sum(g.numel() for g in grads.values()) == sum(g.numel() for g in theirs.values())
    for name, grad in grads.items():
        # The two draw A differently; tests/test_lora.py compares LoRA with PEFT.
        if "lora_" not in name:
            name = name.replace("backbone.", "esm.esm.", 1).replace("ia3_l", "ia3_l.default")
            names = (name, name.replace(".weight", ".base_layer.weight"))
            other = next(theirs[n] for n in names if n in theirs)
            torch.testing.assert_close(grad, other.view_as(grad), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for z, other in zip(ours(ids, mask).values(), peer(ids, mask).values()):
            torch.testing.assert_close(z, other, rtol=0, atol=1e-5)


def test_step_benchmark(tmp_path, capsys, monkeypatch):
    rows = step.main([
        "--model", "tiny-nt", "--batch-size", "2", "--tokens", "20", "--rounds", "1",
        "--out", str(tmp_path / "step.json"),
    ])
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["rows"] == rows
    assert {"machine", "versions", "date", "rounds"} < written.keys()
    by = {
        (row["impl"], row["strategy"], row["r"], row["activation_checkpointing"]): row
        for row in rows
    }
    assert tuple(by) == step.VARIANTS and len(by) == len(rows)
    assert by["peer", "full", None, "none"]["vs_peer_full"] == 1
    assert by["ours", "full", None, "none"]["vs_own_full"] == 1
    # 1 / seconds that the products need
    limit = {key: row["over_product_limit"] / row["median_s"] for key, row in by.items()}
    for strategy, r in step.STRATEGIES:
        ours = limit["ours", strategy, r, "none"]
        assert limit["peer", strategy, r, "none"] == pytest.approx(ours, rel=0.02)
    freeze75, ia3, full = (
        limit["ours", strategy, None, "none"] for strategy in ("freeze75", "ia3", "full")
    )
    assert freeze75 > ia3 > full
    for strategy, r in (("full", None), ("lora", 4), ("ia3", None)):
        none, selective, full = (
            by["ours", strategy, r, mode]["saved_mb_per_sequence"] for mode in step.MODES
        )
        assert none > selective > full
    assert "saved MB/seq" in capsys.readouterr().out
    monkeypatch.setattr(step, "RESULTS", tmp_path / "committed.json")
    step.main(["--model", "tiny-nt", "--batch-size", "1", "--tokens", "5", "--rounds", "1"])
    # Other sizes than the committed ones are written only where --out says.
    assert not step.RESULTS.exists()
    with pytest.raises(step.InputError, match="Nucleotide Transformer"):
        step.main(["--model", "tiny-dnabert"])


def test_memory_alone_is_measured_as_beside_the_time(tmp_path):
    flags = ["--model", "tiny-nt", "--batch-size", "2", "--tokens", "20"]
    rows = step.main([*flags, "--memory"])
    timed = step.main([*flags, "--rounds", "1"])
    for row, other in zip(rows, timed, strict=True):
        assert row.items() <= other.items() and "median_s" not in row


def test_loader_benchmark(capsys):
    rows = loader.main(["--sequences", "300", "--rounds", "2", "--batch-size", "32"])
    assert len(rows) == 2
    assert json.loads(capsys.readouterr().out)["sequences"] == 300
