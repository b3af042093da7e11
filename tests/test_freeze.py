"""Freezing by hand-worked examples, and at the boundaries that the published fractions show."""

import random

import pytest
import torch

from taxa.backbones import FAMILIES, backbone_config, get_model
from taxa.backbones.unused_tensors import published_sizes
from taxa.freeze import frozen_names
from taxa.model import TaxonClassifier
from taxa.strategies import trainable_names
from taxa.training.settings import settings_from_flags

ABCD = {"a": 10, "b": 20, "c": 30, "d": 40}


@pytest.mark.parametrize("fraction, frozen", [
    (0.0, ""),
    (0.01, "a"), (0.1, "a"),
    (0.100001, "ab"), (0.29, "ab"), (0.3, "ab"),
    (0.31, "abc"), (0.6, "abc"),
    (0.61, "abcd"), (0.75, "abcd"), (0.99, "abcd"), (1.0, "abcd"),
])
def test_whole_tensors_until_at_least_the_fraction(fraction, frozen):
    assert frozen_names(ABCD, fraction) == list(frozen)


@pytest.mark.parametrize("sizes, frozen", [
    ([75, 25], 1), ([74, 26], 2), ([25, 25, 25, 25], 3), ([3, 1], 1), ([1, 3], 2), ([100], 1),
    ([0, 3, 0, 1], 2), ([30, 45, 0, 25], 2),
])
def test_three_quarters_is_the_default_and_its_boundary_is_exact(sizes, frozen):
    """Once exactly 75% are frozen nothing more is, not even a tensor without elements."""
    names = [f"p{i}" for i in range(len(sizes))]
    assert frozen_names(dict(zip(names, sizes))) == names[:frozen]


def test_order_is_that_of_registration_and_not_of_name_or_size():
    assert frozen_names({"z": 1, "m": 70, "a": 9, "k": 20}) == ["z", "m", "a"]
    assert frozen_names({"k": 20, "a": 9, "m": 70, "z": 1}) == ["k", "a", "m"]


def test_least_number_of_tensors_on_random_sizes():
    rng = random.Random(0)
    for _ in range(300):
        sizes = {f"p{i}": rng.randint(1, 50) for i in range(rng.randint(1, 30))}
        fraction = rng.choice([0.25, 0.5, 0.75, 0.875])
        frozen = frozen_names(sizes, fraction)
        assert frozen == list(sizes)[: len(frozen)]
        held = sum(sizes[name] for name in frozen)
        assert held >= fraction * sum(sizes.values()) > held - sizes[frozen[-1]]


# ---------------------------------------------- the boundaries of facts/published_protocol.md


RANKS = ("superkingdom", "phylum", "genus")
HEADS = [f"heads.{rank}.{kind}" for rank in RANKS for kind in ("weight", "bias")]
BOUNDARIES = [  # model, last frozen tensor, first that trains, trainable fraction of the supplement
    (
        "nt50m",
        "encoder.layer.9.intermediate.dense.weight",
        "encoder.layer.9.output.dense.weight",
        0.2252,
    ),
    (
        "nt100m",
        "encoder.layer.16.output.dense.weight",
        "encoder.layer.16.LayerNorm.weight",
        0.2464,
    ),
    (
        "nt250m",
        "encoder.layer.18.intermediate.dense.weight",
        "encoder.layer.18.output.dense.weight",
        0.2317,
    ),
    (
        "dnabert2",
        "encoder.layer.9.attention.self.Wqkv.weight",
        "encoder.layer.9.attention.self.Wqkv.bias",
        0.2416,
    ),
    (
        "dnaberts",
        "encoder.layer.9.attention.self.Wqkv.weight",
        "encoder.layer.9.attention.self.Wqkv.bias",
        0.2416,
    ),
]


def meta_classifier(model):
    family = FAMILIES[get_model(model).family]
    with torch.device("meta"):
        backbone = family.model(backbone_config(model))
        return TaxonClassifier(backbone, (4, 57, 1884))


@pytest.mark.parametrize("model, last, first, fraction", BOUNDARIES)
def test_published_boundary(model, last, first, fraction):
    classifier = meta_classifier(model)
    sizes = published_sizes(classifier)
    frozen = frozen_names(sizes)
    assert frozen[-1] == f"backbone.{last}"
    settings = settings_from_flags(model, "freeze75", protocol="published")
    trainable = trainable_names(classifier, settings)
    assert trainable[0] == f"backbone.{first}"
    assert trainable[-6:] == HEADS
    every = [name for name, _ in classifier.named_parameters()]
    assert trainable == every[every.index(f"backbone.{first}"):]
    assert round(1 - sum(sizes[name] for name in frozen) / sum(sizes.values()), 4) == fraction


# Without the tensors that the loss never uses, three quarters end sooner.
@pytest.mark.parametrize("model, first", [
    ("nt50m", "encoder.layer.9.attention.self.query.bias"),
    ("nt100m", "encoder.layer.16.output.dense.weight"),
    ("nt250m", "encoder.layer.18.attention.self.query.bias"),
    ("dnabert2", "encoder.layer.9.attention.self.Wqkv.bias"),
])
def test_corrected_boundary(model, first):
    classifier = meta_classifier(model)
    sizes = {name: p.numel() for name, p in classifier.named_parameters()}
    trainable = trainable_names(classifier, settings_from_flags(model, "freeze75"))
    assert trainable[0] == f"backbone.{first}"
    assert trainable == list(sizes)[-len(trainable):]
    frozen = sum(sizes.values()) - sum(sizes[name] for name in trainable)
    last = list(sizes)[-len(trainable) - 1]
    assert frozen >= 0.75 * sum(sizes.values()) > frozen - sizes[last]


def test_published_sizes_stand_in_the_published_order():
    names = list(published_sizes(meta_classifier("nt50m")))
    assert names[:3] == [
        "backbone.embeddings.word_embeddings.weight",
        "backbone.embeddings.position_embeddings.weight",
        "backbone.encoder.layer.0.attention.self.query.weight",
    ]
    after = names[names.index("backbone.encoder.emb_layer_norm_after.bias") + 1:]
    assert after == [
        "backbone.contact_head.regression.weight",
        "backbone.contact_head.regression.bias",
        "backbone.lm_head.bias",
        "backbone.lm_head.dense.weight",
        "backbone.lm_head.dense.bias",
        "backbone.lm_head.layer_norm.weight",
        "backbone.lm_head.layer_norm.bias",
        "backbone.lm_head.decoder.weight",
        *HEADS,
    ]
    names = list(published_sizes(meta_classifier("dnabert2")))
    assert names[-8:-6] == ["backbone.pooler.dense.weight", "backbone.pooler.dense.bias"]
