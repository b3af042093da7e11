"""docs/READING.md's two worked examples, as a user would add them: a fifth strategy (BitFit) and a toy backbone of one layer."""

import sys
import types

import pytest
import torch
from runs import dies
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import evaluate
import export
import train
from taxa.backbones import load_backbone, table
from taxa.errors import InputError
from taxa.model import TaxonClassifier
from taxa.strategies import STRATEGIES, Strategy, inject_adapters, settings_from_flags, train_only, trainable_names


def biases_and_heads(classifier, settings):
    """BitFit (Ben Zaken et al. 2022): the biases train, everything else stays as pretrained; here the heads train with them."""
    return [name for name, _ in classifier.named_parameters() if name.endswith(".bias") or name.startswith("heads.")]


@pytest.fixture
def bitfit(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "bitfit", Strategy("BitFit", "#E69F00", biases_and_heads))


def test_a_strategy_is_one_row(bitfit, short, tmp_path, capsys):
    """The whole of train.py runs with it, and what trains is what the row says."""
    settings = settings_from_flags("tiny-nt", "bitfit")
    assert settings == {"strategy": "bitfit", "protocol": "corrected", "heads": "train"}
    classifier = TaxonClassifier(load_backbone("tiny-nt", pretrained=False), (4, 5, 6))
    inject_adapters(classifier, settings)
    train_only(classifier, trainable_names(classifier, settings))
    trains = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trains if name.startswith("backbone.")} == {"bias"}
    assert {name for name, _ in classifier.named_parameters() if name.startswith("heads.")} < trains
    arguments = ["--model", "tiny-nt", "--strategy", "bitfit", "--data", str(short), "--max-steps", "4", "--save-every", "1", "--batch-size",
                 "4", "--device", "cpu", "--out", str(tmp_path / "run")]
    dies(3, arguments)
    metrics = train.main([*arguments, "--resume"])
    assert "resumed after step 2" in capsys.readouterr().out
    again = evaluate.main([str(tmp_path / "run" / "ckpt.pt"), "--device", "cpu"])
    assert metrics["sequences"] > 0 and again["loss"] == metrics["loss"]
    export.main([str(tmp_path / "run" / "ckpt.pt"), "--out", str(tmp_path / "exported")])
    assert "bitfit" in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8").lower()


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, vocab_size=4107, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
                 initializer_range=0.1, pad_token_id=1, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size, self.initializer_range = num_attention_heads, intermediate_size, initializer_range
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class ToyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        return x + self.dense(x).relu()


class Toy(PreTrainedModel):
    config_class, base_model_prefix, main_input_name = ToyConfig, "toy", "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.ModuleDict({"word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(ToyLayer(config) for _ in range(config.num_hidden_layers))})
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.embeddings.word_embeddings(input_ids)
        for layer in self.encoder.layer:
            x = layer(x)
        return x


@pytest.fixture
def toy(monkeypatch):
    module = types.ModuleType("toy")
    module.LICENSE, module.TOKENS_OF_1500_BP, module.LORA_TARGETS, module.LAYER_ORDER = "mit", 251, ("layer.*.dense",), ("dense",)
    module.IA3_TARGETS = {"corrected": (("layer.*.dense",), ()), "published": (("layer.*.dense",), ())}
    module.SIGN, module.SIGN_MEANS, module.FIXED, module.dropped_keys = "toy", "only this one has that", {}, lambda config: set()
    sys.modules["toy"] = module
    monkeypatch.setitem(table.FAMILIES, "toy", table.Family(Toy, ToyConfig, module))
    monkeypatch.setitem(table.MODELS, "toy", table.Model(None, None, "toy", "nt", dict(initializer_range=0.1), 1e-2, 8))
    yield
    del sys.modules["toy"]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_backbone_is_a_file_and_its_rows(toy, short, tmp_path, strategy):
    metrics = train.main(["--model", "toy", "--strategy", strategy, "--data", str(short), "--max-steps", "2", "--batch-size", "4",
                          "--device", "cpu", "--activation-checkpointing", "selective", "--out", str(tmp_path / "run")])
    assert metrics["sequences"] > 0
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["model"] == "toy"


def test_a_backbone_that_nothing_is_published_of_has_no_published_boundary(toy, short, tmp_path):
    with pytest.raises(InputError, match="--protocol published .* none is known of 'toy'"):
        train.main(["--model", "toy", "--strategy", "freeze75", "--protocol", "published", "--data", str(short), "--device", "cpu",
                    "--out", str(tmp_path / "run")])
