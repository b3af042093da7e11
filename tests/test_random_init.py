"""Random initialisation: its distribution, what it covers, and that it leaves nothing pretrained
behind.
"""

import json
import math

import pytest
import torch
from helpers import TINY, scrambled
from torch import nn

from taxa.backbones import FAMILIES, get_model, load_backbone
from taxa.model import TaxonClassifier
from taxa.random_init import reinitialize


def pretrained_like(name, **sizes):
    return TaxonClassifier(scrambled(name, **sizes), (40, 50, 60))


def is_layer_norm(name):
    return name.split(".")[-2].lower() in ("layernorm", "emb_layer_norm_after")


def counted(model, initializer_range):
    """Check every parameter; {"layer_norm", "bias", "normal"}: how many there were of each kind."""
    seen = {"layer_norm": 0, "bias": 0, "normal": 0}
    for key, p in model.named_parameters():
        if is_layer_norm(key):
            expected = torch.ones_like(p) if key.endswith("weight") else torch.zeros_like(p)
            assert torch.equal(p, expected), key
            seen["layer_norm"] += 1
        elif key.endswith("bias"):
            assert not p.any(), key
            seen["bias"] += 1
        else:
            n = p.numel()
            assert abs(p.mean().item()) < 5 * initializer_range / math.sqrt(n), key
            spread = 5 / math.sqrt(2 * n)
            assert p.std().item() == pytest.approx(initializer_range, rel=spread), key
            seen["normal"] += 1
    return seen


# Two layers, counted by hand. A layer of the NT has two LayerNorms, four biases and six matrices;
# one of DNABERT two, three and four. The rest is outside the layers.
BACKBONE = {
    "tiny-nt": {"layer_norm": 2 * 4 + 2, "bias": 2 * 4, "normal": 2 * 6 + 1},
    "tiny-dnabert": {"layer_norm": 2 * 4 + 2, "bias": 2 * 3, "normal": 2 * 4 + 2},
}
HEADS = {"layer_norm": 0, "bias": 3, "normal": 3}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("initializer_range", [0.02, 0.5])
def test_every_parameter(name, initializer_range):
    classifier = pretrained_like(name, vocab_size=600, hidden_size=96)
    torch.manual_seed(0)
    assert reinitialize(classifier, initializer_range) is classifier
    expected = {kind: n + HEADS[kind] for kind, n in BACKBONE[name].items()}
    assert counted(classifier, initializer_range) == expected


@pytest.mark.parametrize("name", TINY)
def test_load_backbone_without_weights_uses_the_range_of_the_config(name, tmp_path):
    torch.manual_seed(1)
    assert counted(load_backbone(name, pretrained=False), 0.1) == BACKBONE[name]
    row = get_model(name)
    config = FAMILIES[row.family].config(**(row.sizes | {"initializer_range": 0.3}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert counted(load_backbone(name, tmp_path, pretrained=False), 0.3) == BACKBONE[name]


def test_distribution_is_normal_and_not_truncated_or_uniform():
    torch.manual_seed(0)
    z = reinitialize(nn.Embedding(4107, 64), 0.02).weight.detach() / 0.02
    for bound, share in ((1, 0.3173), (2, 0.0455), (3, 0.0027)):
        found = (z.abs() > bound).float().mean().item()
        assert found == pytest.approx(share, abs=4 * math.sqrt(share / z.numel()))
    assert (z > 0).float().mean().item() == pytest.approx(0.5, abs=0.005)


def test_default_range_is_the_published_one():
    torch.manual_seed(0)
    assert reinitialize(nn.Linear(300, 300)).weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("name", TINY)
def test_heads_and_backbone_are_included(name):
    classifier = pretrained_like(name)
    before = {key: p.clone() for key, p in classifier.named_parameters()}
    reinitialize(classifier)
    unchanged = [key for key, p in classifier.named_parameters() if torch.equal(p, before[key])]
    assert unchanged == []


@pytest.mark.parametrize("name", TINY)
def test_same_seed_same_weights(name):
    first, again = {}, {}
    for store in (first, again):
        classifier = pretrained_like(name)  # it seeds for itself
        torch.manual_seed(5)
        store.update({key: p.clone() for key, p in reinitialize(classifier).named_parameters()})
    assert all(torch.equal(first[key], again[key]) for key in first)
    classifier = pretrained_like(name)
    torch.manual_seed(6)
    other = dict(reinitialize(classifier).named_parameters())
    assert not torch.equal(first["heads.genus.weight"], other["heads.genus.weight"])


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 7.0))


@pytest.mark.parametrize("module", [Scale(), nn.Conv1d(2, 3, 1), nn.PReLU(), nn.BatchNorm1d(3)])
def test_module_without_a_rule_is_refused(module):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(module))
    with pytest.raises(TypeError, match=type(module).__name__):
        reinitialize(model)


def test_modules_without_parameters_and_linears_without_bias_are_fine():
    model = nn.Sequential(
        nn.Linear(3, 3, bias=False), nn.Dropout(0.1), nn.ReLU(), nn.Embedding(4, 3),
    )
    assert reinitialize(model) is model
