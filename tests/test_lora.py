"""LoRA against its formula and against the PEFT library; what is shared, what merges, what a target
matches.
"""

import copy
import math

import pytest
import torch
from helpers import assert_equals_peft, logits, scrambled
from torch import nn

from taxa.backbones import FAMILIES, backbone_config, dnabert2, get_model, nucleotide_transformer
from taxa.errors import InputError
from taxa.inject import matches, merge_adapters
from taxa.lora import LoRALinear, inject_lora
from taxa.model import TaxonClassifier

TARGETS = {
    "tiny-nt": nucleotide_transformer.LORA_TARGETS,
    "tiny-dnabert": dnabert2.LORA_TARGETS,
}
ADAPTED = {  # modules of two layers, written by hand
    "tiny-nt": [
        "backbone.encoder.layer.0.attention.self.query",
        "backbone.encoder.layer.0.attention.self.value",
        "backbone.encoder.layer.1.attention.self.query",
        "backbone.encoder.layer.1.attention.self.value",
    ],
    "tiny-dnabert": [
        "backbone.encoder.layer.0.attention.self.Wqkv",
        "backbone.encoder.layer.1.attention.self.Wqkv",
    ],
}
both_families = pytest.mark.parametrize("name", TARGETS)


def make_classifier(name):
    """Two layers, no dropout, no parameter at 0 or 1."""
    dropout = {"hidden_dropout_prob": 0.0} if name == "tiny-dnabert" else {}
    backbone = scrambled(name, **dropout)
    return TaxonClassifier(backbone, (4, 5, 6)).eval()


def with_lora(classifier, name, r=4, lora_alpha=32.0, lora_dropout=0.0, random=True):
    """A copy with adapters; random: B is no longer zero."""
    adapted = copy.deepcopy(classifier)
    torch.manual_seed(11)
    inject_lora(adapted.backbone, TARGETS[name], r, lora_alpha, lora_dropout)
    if random:
        for module in lora_modules(adapted).values():
            nn.init.normal_(module.lora_A, std=0.2)
            nn.init.normal_(module.lora_B, std=0.05)
    return adapted


def lora_modules(model):
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


@both_families
def test_weight_and_bias_are_the_same_tensors_under_the_same_names(name):
    classifier = make_classifier(name)
    before = dict(classifier.named_parameters())
    inject_lora(classifier.backbone, TARGETS[name], 4, 32.0)
    after = dict(classifier.named_parameters())
    assert all(after[key] is p for key, p in before.items())
    added = {f"{module}.{key}" for module in ADAPTED[name] for key in ("lora_A", "lora_B")}
    assert set(after) - set(before) == added
    assert list(lora_modules(classifier)) == ADAPTED[name]


def test_a_layer_shares_weight_and_bias_and_adds_A_and_B():
    linear = nn.Linear(6, 5)
    adapted = LoRALinear(linear, 2, 8)
    assert adapted.weight.data_ptr() == linear.weight.data_ptr()
    assert adapted.bias.data_ptr() == linear.bias.data_ptr()
    assert (adapted.lora_A.shape, adapted.lora_B.shape, adapted.scaling) == ((2, 6), (5, 2), 4.0)


@both_families
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
def test_logits_at_initialisation_are_bit_equal(name, training, lora_dropout):
    """B is zero, so the adapter adds an exact 0, whatever its dropout does."""
    classifier = make_classifier(name)
    adapted = with_lora(classifier, name, lora_dropout=lora_dropout, random=False)
    for module in lora_modules(adapted).values():
        assert module.lora_A.abs().min() > 0 and not module.lora_B.any()
    assert torch.equal(logits(adapted.train(training)), logits(classifier.train(training)))


def test_initial_A_is_uniform_in_one_over_root_in():
    torch.manual_seed(0)
    adapted = LoRALinear(nn.Linear(400, 7), 50, 32)
    bound = 1 / math.sqrt(400)
    assert adapted.lora_A.abs().max() <= bound
    assert adapted.lora_A.abs().max() > 0.999 * bound
    assert adapted.lora_A.mean().item() == pytest.approx(0, abs=0.02 * bound)
    # of a uniform distribution
    assert adapted.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r, lora_alpha", [(1, 32.0), (3, 8.0)])
def test_formula(r, lora_alpha, bias):
    """Hu et al. 2022, equation 3, number by number."""
    torch.manual_seed(1)
    linear = nn.Linear(5, 4, bias=bias)
    adapted = LoRALinear(linear, r, lora_alpha)
    nn.init.normal_(adapted.lora_B)
    x = torch.randn(2, 3, 5)
    found = adapted(x)
    W, A, B = (t.tolist() for t in (linear.weight, adapted.lora_A, adapted.lora_B))
    b = linear.bias.tolist() if bias else [0.0] * 4
    for i in range(2):
        for j in range(3):
            row = x[i, j].tolist()
            Ax = [sum(A[s][k] * row[k] for k in range(5)) for s in range(r)]
            for o in range(4):
                y = b[o] + sum(W[o][k] * row[k] for k in range(5))
                y += lora_alpha / r * sum(B[o][s] * Ax[s] for s in range(r))
                assert found[i, j, o].item() == pytest.approx(y, abs=1e-4)


@both_families
@pytest.mark.parametrize("r", [1, 4])
def test_formula_in_the_whole_network(name, r):
    classifier = make_classifier(name)
    adapted = with_lora(classifier, name, r)
    plain = copy.deepcopy(classifier)
    with torch.no_grad():
        for key, module in lora_modules(adapted).items():
            BA = sum(torch.outer(module.lora_B[:, k], module.lora_A[k]) for k in range(r))
            plain.get_submodule(key).weight.add_(BA * (32.0 / r))
    assert not torch.allclose(logits(adapted), logits(classifier), atol=1e-2)
    torch.testing.assert_close(logits(adapted), logits(plain), rtol=0, atol=1e-5)


def test_dropout_is_on_the_adapters_input_alone():
    """With A and B the identity, the adapter adds scaling * dropout(x): each element 0 or
    x / (1 - p).
    """
    torch.manual_seed(2)
    adapted = LoRALinear(nn.Linear(50, 50), 50, 100.0, lora_dropout=0.25)
    with torch.no_grad():
        adapted.lora_A.copy_(torch.eye(50))
        adapted.lora_B.copy_(torch.eye(50))
    x = torch.randn(400, 50, requires_grad=True)
    base = x @ adapted.weight.T + adapted.bias
    dropped = (adapted.train()(x) - base) / 2.0
    kept = dropped.abs() > 1e-3 * x.abs()
    torch.testing.assert_close(dropped, x * kept / 0.75, rtol=0, atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    # another mask each time
    assert not torch.equal(kept, (adapted(x) - base).abs() > 2e-3 * x.abs())
    torch.testing.assert_close(adapted.eval()(x), base + 2.0 * x, rtol=0, atol=1e-5)

    torch.manual_seed(3)
    y = adapted.train()(x)
    torch.manual_seed(3)
    dropped = ((adapted(x) - base) / 2.0).detach()
    # of the forward's own mask
    grad_A, grad_x = torch.autograd.grad(y.sum(), (adapted.lora_A, x))
    expected = 2.0 * dropped.sum(dim=0).expand(50, 50)
    torch.testing.assert_close(grad_A, expected, rtol=0, atol=2e-3)
    expected = adapted.weight.sum(dim=0) + 2.0 * (dropped != 0) / 0.75
    torch.testing.assert_close(grad_x, expected, rtol=0, atol=1e-3)


@both_families
@pytest.mark.parametrize("r", [1, 4, 20])
def test_merged_equals_unmerged(name, r):
    adapted = with_lora(make_classifier(name), name, r)
    unmerged = logits(adapted)
    weights = {key: module.weight for key, module in lora_modules(adapted).items()}
    names = [key for key, _ in make_classifier(name).named_parameters()]
    assert merge_adapters(adapted) is adapted
    torch.testing.assert_close(logits(adapted), unmerged, rtol=0, atol=1e-5)
    for key in ADAPTED[name]:
        assert type(adapted.get_submodule(key)) is nn.Linear
        assert adapted.get_submodule(key).weight is weights[key]
    assert [key for key, _ in adapted.named_parameters()] == names
    assert not lora_modules(adapted)


@both_families
def test_merging_again_does_nothing(name):
    adapted = merge_adapters(with_lora(make_classifier(name), name))
    before = {key: p.clone() for key, p in adapted.named_parameters()}
    merge_adapters(adapted)
    assert all(torch.equal(before[key], p) for key, p in adapted.named_parameters())


def test_merge_without_bias_and_its_return():
    torch.manual_seed(4)
    linear = nn.Linear(6, 5, bias=False)
    adapted = LoRALinear(linear, 2, 8)
    nn.init.normal_(adapted.lora_B)
    x = torch.randn(3, 6)
    expected = adapted(x)
    merged = adapted.merge()
    assert type(merged) is nn.Linear
    assert merged.bias is None and merged.weight is linear.weight
    assert (merged.in_features, merged.out_features) == (6, 5)
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-5)


@both_families
def test_injection_and_merging_leave_requires_grad_alone(name):
    classifier = make_classifier(name)
    key = ADAPTED[name][0]
    classifier.get_submodule(key).weight.requires_grad_(False)
    inject_lora(classifier.backbone, TARGETS[name], 1, 32.0)
    adapted = classifier.get_submodule(key)
    assert not adapted.weight.requires_grad
    assert adapted.lora_A.requires_grad and adapted.bias.requires_grad
    merge_adapters(classifier)
    frozen = [k for k, p in classifier.named_parameters() if not p.requires_grad]
    assert frozen == [f"{key}.weight"]


# ------------------------------------------------------------------ targets


@pytest.mark.parametrize("name, target, expected", [
    ("encoder.layer.0.attention.self.query", "attention.self.query", True),
    ("encoder.layer.0.attention.self.query", "query", True),
    ("encoder.layer.0.attention.self.query", "self", False),
    ("encoder.layer.0.attention.self.query", "ery", False),
    ("encoder.layer.0.attention.self.query", "attention.self", False),
    ("encoder.layer.0.output.dense", "layer.*.output.dense", True),
    ("encoder.layer.11.output.dense", "layer.*.output.dense", True),
    ("encoder.layer.0.attention.output.dense", "layer.*.output.dense", False),
    ("encoder.layer.0.attention.output.dense", "output.dense", True),
    ("output.dense", "layer.*.output.dense", False),
    ("encoder", "encoder.layer", False),
    ("encoder.layer.1.attention.self.query", "layer.0.attention.self.query", False),
    ("encoder.layer.0.attention.self.Wqkv", "attention.self.wqkv", False),
])
def test_target_names_the_tail_part_by_part(name, target, expected):
    assert matches(name, target) is expected


def test_wildcard_takes_the_feed_forward_and_not_the_attention():
    classifier = make_classifier("tiny-nt")
    inject_lora(classifier.backbone, ["layer.*.output.dense"], 2, 4.0)
    expected = [f"backbone.encoder.layer.{i}.output.dense" for i in range(2)]
    assert list(lora_modules(classifier)) == expected


@both_families
@pytest.mark.parametrize("target", [
    "attention.self.nothing", "attention.self.Wqkv[key]", "heads.genus",
])
def test_target_without_a_match(name, target):
    with pytest.raises(InputError, match="matches no module") as caught:
        inject_lora(make_classifier(name).backbone, [target], 4, 32.0)
    assert f"'{target}'" in str(caught.value)


@both_families
@pytest.mark.parametrize("target", ["attention.self", "LayerNorm", "word_embeddings", ""])
def test_target_that_is_no_linear(name, target):
    with pytest.raises(InputError, match="plain Linear"):
        inject_lora(make_classifier(name).backbone, [target], 4, 32.0)


@both_families
def test_target_twice(name):
    classifier = make_classifier(name)
    with pytest.raises(InputError, match="LoRALinear"):
        inject_lora(classifier.backbone, [*TARGETS[name], TARGETS[name][0]], 4, 32.0)
    with pytest.raises(InputError, match="LoRALinear"):
        inject_lora(with_lora(classifier, name).backbone, TARGETS[name], 4, 32.0)


@pytest.mark.parametrize("r", [1, 4, 20])
@pytest.mark.parametrize("model, per_rank", [
    ("nt50m", 24_576), ("nt100m", 45_056), ("nt250m", 73_728), ("dnabert2", 36_864),
])
def test_numbers_of_adapter_parameters(model, per_rank, r):
    family = FAMILIES[get_model(model).family]
    with torch.device("meta"):
        backbone = family.model(backbone_config(model))
        inject_lora(backbone, family.module.LORA_TARGETS, r, 32.0)
    adapters = [p for name, p in backbone.named_parameters() if "lora_" in name]
    assert sum(p.numel() for p in adapters) == per_rank * r


# ------------------------------------------------------------------ the PEFT library


@both_families
@pytest.mark.parametrize("r", [1, 4, 20])
def test_parity_with_peft(name, r):
    """The same base, the same adapters."""
    peft = pytest.importorskip("peft")
    classifier = make_classifier(name)
    ours = with_lora(classifier, name, r)
    targets = {"tiny-nt": ["query", "value"], "tiny-dnabert": ["Wqkv"]}[name]
    theirs = copy.deepcopy(classifier)
    config = peft.LoraConfig(r=r, lora_alpha=32, lora_dropout=0.0, target_modules=targets)
    theirs.backbone = peft.inject_adapter_in_model(config, theirs.backbone).eval()
    pairs = {}
    for key, module in lora_modules(ours).items():
        other = theirs.get_submodule(key)
        assert other.scaling["default"] == module.scaling
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(module.lora_A)
            other.lora_B["default"].weight.copy_(module.lora_B)
        pairs[f"{key}.lora_A"] = (module.lora_A, other.lora_A["default"].weight)
        pairs[f"{key}.lora_B"] = (module.lora_B, other.lora_B["default"].weight)
    added = [key for key, _ in theirs.named_parameters() if "lora_" in key]
    assert len(pairs) == len(added) == 2 * len(ADAPTED[name])
    assert_equals_peft(ours, theirs, pairs)
