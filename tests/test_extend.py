"""docs/READING.md's two worked examples, added as a user would add them: a strategy (BitFit) and a
toy backbone of one layer.

The code is what stands on that page between ```python and ```, in this order: BitFit's function and
row, the backbone's file, its import and its two rows.
"""

import importlib.util
import re
import sys

import pytest
import torch
from helpers import ROOT
from runs import dies

import evaluate
import export
import train
from taxa import strategies
from taxa.backbones import load_backbone, table
from taxa.errors import InputError
from taxa.model import TaxonClassifier
from taxa.strategies import STRATEGIES, inject_adapters, train_only, trainable_names
from taxa.study.published_fractions import published_fraction
from taxa.training.settings import settings_from_flags

READING = (ROOT / "docs" / "READING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", READING, flags=re.MULTILINE | re.DOTALL)
FUNCTION, STRATEGY_ROW, BACKBONE, IMPORT, FAMILY_ROW, MODEL_ROW = BLOCKS


def row(code, names):
    """The value of a table's row, `"key": value,`. names: what its file knows."""
    ((_, value),) = eval("{" + code + "}", names).items()
    return value


@pytest.fixture
def bitfit(monkeypatch):
    names = dict(vars(strategies))
    exec(FUNCTION, names)
    monkeypatch.setitem(STRATEGIES, "bitfit", row(STRATEGY_ROW, names))


def test_a_strategy_is_one_row(bitfit, short, tmp_path, capsys, monkeypatch):
    """The whole of train.py runs with it, and what trains is what the row says."""
    settings = settings_from_flags("tiny-nt", "bitfit")
    assert settings == {"strategy": "bitfit", "protocol": "corrected", "heads": "train"}
    classifier = TaxonClassifier(load_backbone("tiny-nt", pretrained=False), (4, 5, 6))
    inject_adapters(classifier, settings)
    train_only(classifier, trainable_names(classifier, settings))
    trains = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trains if name.startswith("backbone.")} == {"bias"}
    assert {name for name, _ in classifier.named_parameters() if name.startswith("heads.")} < trains
    assert published_fraction("nt50m", "bitfit", (4, 57, 1884)) is None
    monkeypatch.setitem(STRATEGIES, "another-lora", STRATEGIES["lora"])
    assert published_fraction("nt50m", "another-lora", (4, 57, 1884), 4) is None
    arguments = ["--model", "tiny-nt", "--strategy", "bitfit", "--data", str(short),
                 "--max-steps", "4", "--save-every", "1", "--batch-size", "4",
                 "--device", "cpu", "--out", str(tmp_path / "run")]
    dies(3, arguments)
    metrics = train.main([*arguments, "--resume"])
    assert "resumed after step 2" in capsys.readouterr().out
    again = evaluate.main([str(tmp_path / "run" / "ckpt.pt"), "--device", "cpu"])
    assert metrics["sequences"] > 0 and again["loss"] == metrics["loss"]
    export.main([str(tmp_path / "run" / "ckpt.pt"), "--out", str(tmp_path / "exported")])
    assert "bitfit" in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8").lower()


@pytest.fixture
def toy(monkeypatch, tmp_path):
    (tmp_path / "toy.py").write_text(BACKBONE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("taxa.backbones.toy", tmp_path / "toy.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    names = dict(vars(table))
    exec(IMPORT, names)
    monkeypatch.setitem(table.FAMILIES, "toy", row(FAMILY_ROW, names))
    monkeypatch.setitem(table.MODELS, "toy", row(MODEL_ROW, names))


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_backbone_is_a_file_and_its_rows(toy, short, tmp_path, strategy):
    metrics = train.main(["--model", "toy", "--strategy", strategy, "--data", str(short),
                          "--max-steps", "2", "--batch-size", "4", "--device", "cpu",
                          "--activation-checkpointing", "selective",
                          "--out", str(tmp_path / "run")])
    assert metrics["sequences"] > 0
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["model"] == "toy"


def test_a_hub_id_of_a_family_without_a_published_model_is_refused(toy):
    message = "model_type is 'toy', of which the table has no published model"
    with pytest.raises(InputError, match=message):
        table.get_model("org/name", {"model_type": "toy"})


def test_a_backbone_that_nothing_is_published_of_has_no_published_boundary(toy, short, tmp_path):
    with pytest.raises(InputError, match="--protocol published .* none is known of 'toy'"):
        train.main(["--model", "toy", "--strategy", "freeze75", "--protocol", "published",
                    "--data", str(short), "--device", "cpu", "--out", str(tmp_path / "run")])
