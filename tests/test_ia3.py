"""(IA)3 against its formula and against the PEFT library: on outputs, on inputs, on two thirds of a
fused projection.
"""

import copy

import pytest
import torch
from helpers import INNER, H, assert_equals_peft, logits, scrambled
from torch import nn

from taxa.backbones import FAMILIES, backbone_config, dnabert2, get_model, nucleotide_transformer
from taxa.errors import InputError
from taxa.ia3 import IA3Linear, inject_ia3, split_target
from taxa.inject import merge_adapters
from taxa.lora import inject_lora
from taxa.model import TaxonClassifier

MODULES = {"tiny-nt": nucleotide_transformer, "tiny-dnabert": dnabert2}
# Part of a layer -> (on the input?, length of the vector), by hand from Liu et al. 2022, 3.3, and
# from the published code.
EXPECTED = {
    ("tiny-nt", "corrected"): {
        "attention.self.key": (False, H),
        "attention.self.value": (False, H),
        "output.dense": (True, INNER),
    },
    ("tiny-nt", "published"): {
        "attention.self.query": (False, H),
        "attention.self.value": (False, H),
        "attention.output.dense": (True, H),
    },
    ("tiny-dnabert", "corrected"): {
        "attention.self.Wqkv": (False, 2 * H),
        "mlp.wo": (True, INNER),
    },
    ("tiny-dnabert", "published"): {
        "attention.self.Wqkv": (False, 3 * H),
        "attention.output.dense": (True, H),
    },
}
every_placement = pytest.mark.parametrize("name, placement", EXPECTED)


def make_classifier(name):
    """Two layers, no dropout, no parameter at 0 or 1."""
    dropout = {"hidden_dropout_prob": 0.0} if name == "tiny-dnabert" else {}
    return TaxonClassifier(scrambled(name, **dropout), (4, 5, 6)).eval()


def with_ia3(classifier, name, placement, random=True):
    """A copy with (IA)3; random: the vectors are no longer one."""
    adapted = copy.deepcopy(classifier)
    inject_ia3(adapted.backbone, *MODULES[name].IA3_TARGETS[placement])
    if random:
        torch.manual_seed(12)
        for module in ia3_modules(adapted).values():
            nn.init.normal_(module.ia3_l, mean=1.0, std=0.3)
    return adapted


def ia3_modules(model):
    return {name: module for name, module in model.named_modules()
            if isinstance(module, IA3Linear)}


@every_placement
def test_placement_names_and_lengths(name, placement):
    classifier = make_classifier(name)
    before = dict(classifier.named_parameters())
    inject_ia3(classifier.backbone, *MODULES[name].IA3_TARGETS[placement])
    after = dict(classifier.named_parameters())
    assert all(after[key] is p for key, p in before.items())
    parts = EXPECTED[name, placement].items()
    expected = {f"backbone.encoder.layer.{i}.{part}": value
                for i in range(2) for part, value in parts}
    found = {key: (module.feedforward, module.ia3_l.numel())
             for key, module in ia3_modules(classifier).items()}
    assert found == expected
    assert set(after) - set(before) == {f"{key}.ia3_l" for key in expected}


@every_placement
@pytest.mark.parametrize("training", [False, True])
def test_logits_at_initialisation_are_bit_equal(name, placement, training):
    classifier = make_classifier(name)
    adapted = with_ia3(classifier, name, placement, random=False)
    for module in ia3_modules(adapted).values():
        assert torch.equal(module.ia3_l, torch.ones_like(module.ia3_l))
    assert torch.equal(logits(adapted.train(training)), logits(classifier.train(training)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("feedforward, rows", [
    (True, None), (False, None), (False, (2, 6)), (False, (0, 2)), (False, (4, 6)),
])
def test_formula_and_merge(feedforward, rows, bias):
    """Number by number: every feature of the input, or the features of the output at `rows`, bias
    included.
    """
    torch.manual_seed(1)
    linear = nn.Linear(5, 6, bias=bias)
    W = linear.weight.tolist()
    b = linear.bias.tolist() if bias else [0.0] * 6
    adapted = IA3Linear(linear, feedforward, rows)
    assert adapted.weight is linear.weight and adapted.bias is linear.bias
    nn.init.normal_(adapted.ia3_l)
    vector = adapted.ia3_l.tolist()
    start, stop = rows or (0, 6)
    assert len(vector) == (5 if feedforward else stop - start)
    x = torch.randn(2, 3, 5)
    expected = torch.empty(2, 3, 6)
    for i in range(2):
        for j in range(3):
            row = x[i, j].tolist()
            for o in range(6):
                if feedforward:
                    expected[i, j, o] = sum(W[o][k] * vector[k] * row[k] for k in range(5)) + b[o]
                else:
                    scale = vector[o - start] if start <= o < stop else 1.0
                    expected[i, j, o] = scale * (sum(W[o][k] * row[k] for k in range(5)) + b[o])
    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-5)
    merged = adapted.merge()
    assert type(merged) is nn.Linear
    assert merged.weight is linear.weight and merged.bias is linear.bias
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-5)


@every_placement
def test_formula_in_the_whole_network(name, placement):
    """Plain Linears with rows (and biases) or columns scaled by hand give the same logits."""
    classifier = make_classifier(name)
    adapted = with_ia3(classifier, name, placement)
    plain = copy.deepcopy(classifier)
    with torch.no_grad():
        for key, module in ia3_modules(adapted).items():
            linear = plain.get_submodule(key)
            part = key.split(".", 4)[-1]
            on_input, _ = EXPECTED[name, placement][part]
            if on_input:
                linear.weight.copy_(linear.weight @ torch.diag(module.ia3_l))
            else:
                # The queries stand first.
                ones = torch.ones(len(linear.weight) - len(module.ia3_l))
                scale = torch.cat((ones, module.ia3_l))
                linear.weight.copy_(torch.diag(scale) @ linear.weight)
                linear.bias.copy_(scale * linear.bias)
    assert not torch.allclose(logits(adapted), logits(classifier), atol=1e-2)
    torch.testing.assert_close(logits(adapted), logits(plain), rtol=0, atol=1e-5)


def test_fused_target_scales_keys_and_values_and_not_queries():
    adapted = with_ia3(make_classifier("tiny-dnabert"), "tiny-dnabert", "corrected")
    plain = make_classifier("tiny-dnabert")
    key = "backbone.encoder.layer.1.attention.self.Wqkv"
    x = torch.randn(2, 7, H, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        after = adapted.get_submodule(key)(x)
        before = plain.get_submodule(key)(x)
    assert torch.equal(after[..., :H], before[..., :H])
    # Every feature of the keys and the values moved.
    assert (after[..., H:] - before[..., H:]).abs().amax(dim=(0, 1)).min() > 1e-4


@pytest.mark.parametrize("target, rows", [
    ("attention.self.Wqkv", (0, 72)),
    ("attention.self.Wqkv[query]", (0, 24)),
    ("attention.self.Wqkv[key]", (24, 48)),
    ("attention.self.Wqkv[value]", (48, 72)),
    ("attention.self.Wqkv[query,key]", (0, 48)),
    ("attention.self.Wqkv[key,value]", (24, 72)),
    ("attention.self.Wqkv[query,key,value]", (0, 72)),
])
def test_brackets_choose_the_rows(target, rows):
    classifier = make_classifier("tiny-dnabert")
    inject_ia3(classifier.backbone, [target], [])
    assert [module.rows for module in ia3_modules(classifier).values()] == [rows, rows]


def test_split_target():
    assert split_target("attention.self.query") == ("attention.self.query", None)
    target = "attention.self.Wqkv[key,value]"
    assert split_target(target) == ("attention.self.Wqkv", ("key", "value"))


@pytest.mark.parametrize("target", [
    "Wqkv[keys]", "Wqkv[value,key]", "Wqkv[query,value]", "Wqkv[key,key]", "Wqkv[v]", "Wqkv[,]",
    "Wqkv[key,]",
])
def test_bad_brackets(target):
    with pytest.raises(InputError, match="neighbouring parts of query,key,value"):
        inject_ia3(make_classifier("tiny-dnabert").backbone, [target], [])


@pytest.mark.parametrize("target", [
    "Wqkv[]", "Wqkv[Key]", "Wqkv[key", "Wqkv[key, value]", "nothing", "nothing[key]",
])
def test_target_without_a_match(target):
    with pytest.raises(InputError, match="matches no module"):
        inject_ia3(make_classifier("tiny-dnabert").backbone, [target], [])
    with pytest.raises(InputError, match="matches no module"):
        inject_ia3(make_classifier("tiny-dnabert").backbone, [], [target])


@pytest.mark.parametrize("name, target", [
    ("tiny-nt", "attention.self.query[key]"),
    ("tiny-dnabert", "attention.output.dense[key]"),
])
def test_brackets_on_a_linear_that_is_not_fused(name, target):
    """A square projection has no thirds: scaling a third of its rows would mean nothing."""
    with pytest.raises(InputError):
        inject_ia3(make_classifier(name).backbone, [target], [])


@pytest.mark.parametrize("outputs, inputs", [
    (["attention.self.key", "attention.self.key"], []),
    (["attention.self.key", "key"], []),
    (["output.dense"], ["output.dense"]),
    ([], ["layer.*.output.dense", "output.dense"]),
])
def test_target_twice(outputs, inputs):
    with pytest.raises(InputError, match="IA3Linear"):
        inject_ia3(make_classifier("tiny-nt").backbone, outputs, inputs)


@every_placement
def test_merged_equals_unmerged_and_merging_is_one_way(name, placement):
    classifier = make_classifier(name)
    adapted = with_ia3(classifier, name, placement)
    unmerged = logits(adapted)
    assert merge_adapters(adapted) is adapted
    torch.testing.assert_close(logits(adapted), unmerged, rtol=0, atol=1e-5)
    assert not ia3_modules(adapted)
    assert {type(m) for m in adapted.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    names = [key for key, _ in classifier.named_parameters()]
    assert [key for key, _ in adapted.named_parameters()] == names
    before = {key: p.clone() for key, p in adapted.named_parameters()}
    merge_adapters(adapted)
    assert all(torch.equal(before[key], p) for key, p in adapted.named_parameters())


def test_merging_lora_and_ia3_together():
    classifier = make_classifier("tiny-nt")
    inject_lora(classifier.backbone, ["attention.self.query"], 2, 4.0)
    inject_ia3(classifier.backbone, ["attention.self.key"], ["layer.*.output.dense"])
    torch.manual_seed(6)
    for key, p in classifier.named_parameters():
        if "lora_" in key or "ia3_" in key:
            nn.init.normal_(p, mean=0.5, std=0.2)
    unmerged = logits(classifier)
    merged = merge_adapters(classifier)
    torch.testing.assert_close(logits(merged), unmerged, rtol=0, atol=1e-5)
    names = [key for key, _ in classifier.named_parameters()]
    assert not [key for key in names if "lora_" in key or "ia3_" in key]


@pytest.mark.parametrize("model, corrected, published", [
    # per layer: key + value + inner; query + value + attention output
    ("nt50m", 12 * (512 + 512 + 2048), 12 * 3 * 512),
    ("nt100m", 22 * (512 + 512 + 2048), 22 * 3 * 512),
    ("nt250m", 24 * (768 + 768 + 3072), 24 * 3 * 768),
    ("dnabert2", 12 * (2 * 768 + 3072), 12 * (3 * 768 + 768)),
])
def test_numbers_of_adapter_parameters(model, corrected, published):
    family = FAMILIES[get_model(model).family]
    for placement, expected in (("corrected", corrected), ("published", published)):
        with torch.device("meta"):
            backbone = family.model(backbone_config(model))
            inject_ia3(backbone, *family.module.IA3_TARGETS[placement])
        vectors = [p for name, p in backbone.named_parameters() if name.endswith("ia3_l")]
        assert sum(p.numel() for p in vectors) == expected


# ------------------------------------------------------------------ the PEFT library


# (all targets, those on the input), as PEFT writes them. It cannot say "Wqkv[key,value]".
PEFT_TARGETS = {
    ("tiny-nt", "published"): (
        ["query", "value", "attention.output.dense"],
        ["attention.output.dense"],
    ),
    ("tiny-nt", "corrected"): (
        r".*\.(key|value|layer\.\d+\.output\.dense)",
        r".*\.layer\.\d+\.output\.dense",
    ),
    ("tiny-dnabert", "published"): (
        ["Wqkv", "attention.output.dense"],
        ["attention.output.dense"],
    ),
}


@pytest.mark.parametrize("name, placement", PEFT_TARGETS)
def test_parity_with_peft(name, placement):
    """The same base, the same vectors."""
    peft = pytest.importorskip("peft")
    classifier = make_classifier(name)
    ours = with_ia3(classifier, name, placement)
    theirs = copy.deepcopy(classifier)
    targets, feedforward = PEFT_TARGETS[name, placement]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    theirs.backbone = peft.inject_adapter_in_model(config, theirs.backbone).eval()
    pairs = {}
    for key, module in ia3_modules(ours).items():
        other = theirs.get_submodule(key)
        assert other.is_feedforward == module.feedforward
        with torch.no_grad():
            other.ia3_l["default"].copy_(module.ia3_l.view_as(other.ia3_l["default"]))
        pairs[key] = (module.ia3_l, other.ia3_l["default"])
    added = [key for key, _ in theirs.named_parameters() if "ia3_l" in key]
    assert len(pairs) == len(added)
    assert_equals_peft(ours, theirs, pairs)
