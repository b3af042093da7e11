"""The optimizer and its schedule, against transformers and by hand.

The learning rate is compared with transformers' scheduler, AdamW with its formula, and the groups
of weight decay with the HF Trainer's.
"""

import math

import pytest
import torch
from helpers import TINY
from torch import nn
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup
from transformers.trainer_pt_utils import get_parameter_names

from taxa.backbones import MODELS, load_backbone
from taxa.backbones.masked_lm import MASKING, MaskedLM
from taxa.model import TaxonClassifier
from taxa.runtime.precision import precision_note
from taxa.strategies import STRATEGIES, inject_adapters, train_only, trainable_names
from taxa.training.optim import (
    adamw,
    cosine_lr,
    decayed_names,
    set_lr,
    warmup_steps_of,
)
from taxa.training.settings import settings_from_flags


class One(nn.Module):
    """A model of one parameter."""

    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values))


def rates_of_transformers(lr, warmup, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for _ in range(total + 1):
        yield scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "total, warmup",
    [(1, 0), (2, 0), (7, 0), (100, 0), (100, 10), (50, 50), (13, 1), (20, 19)],
)
@pytest.mark.parametrize("lr", [2e-4, 1.0])
def test_cosine_equals_transformers(total, warmup, lr):
    for step, expected in enumerate(rates_of_transformers(lr, warmup, total)):
        found = cosine_lr(step, total, lr, warmup)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-18), step


@pytest.mark.parametrize(
    "total, ratio, steps",
    [(100, 0.05, 5), (101, 0.05, 6), (7, 0.1, 1), (30, 0.1, 3), (1000, 0.0, 0)],
)
def test_warmup_by_ratio_equals_transformers(total, ratio, steps, tmp_path):
    """The number of steps is the one that the Trainer of this transformers takes.

    The rate is its scheduler's at every one of them.
    """
    of_old = "warmup_ratio" in TrainingArguments.__dataclass_fields__
    # transformers 5: a warmup_steps below 1 is a ratio
    flag = "warmup_ratio" if of_old else "warmup_steps"
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{flag: ratio})
    by_trainer = arguments.get_warmup_steps(total)
    assert warmup_steps_of(ratio, total) == by_trainer == steps
    for step, expected in enumerate(rates_of_transformers(5e-4, by_trainer, total)):
        found = cosine_lr(step, total, 5e-4, steps)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-18), step


def test_cosine_by_hand():
    expected = [8.0, 4 * (1 + math.sqrt(0.5)), 4.0, 4 * (1 - math.sqrt(0.5)), 0.0]
    assert [cosine_lr(step, 4, 8.0) for step in range(5)] == pytest.approx(expected, abs=1e-12)
    assert [cosine_lr(step, 10, 8.0, 4) for step in range(5)] == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_every_group_gets_the_rate_of_the_step():
    optimizer = adamw(One([0.0]), 1.0, weight_decay=0.1)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_adamw_defaults_are_the_published_ones():
    model = One([0.0, 0.0])
    optimizer = adamw(model, 2e-4)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert group["lr"] == 2e-4 and group["weight_decay"] == 0.0
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    assert not group["amsgrad"] and not group["maximize"]
    assert group["params"] == [model.weight]
    groups = adamw(model, 1e-3, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_by_hand(weight_decay):
    """Three steps of Loshchilov and Hutter 2019, algorithm 2, on one number."""
    model = One([0.7]).double()
    model.weight.data.fill_(0.7)
    optimizer = adamw(model, 0.01, weight_decay)
    x, m, v = 0.7, 0.0, 0.0
    for t in range(1, 4):
        gradient = math.cos(t) + x
        model.weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        x -= 0.01 * weight_decay * x
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x -= 0.01 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert model.weight.item() == pytest.approx(x, rel=1e-12)


# ------------------------------------------------------------------ what weight decay shrinks


def classifier_of(name, strategy, protocol="corrected"):
    torch.manual_seed(0)
    model = TaxonClassifier(load_backbone(name, pretrained=False), (4, 5, 6))
    settings = settings_from_flags(name, strategy, protocol)
    inject_adapters(model, settings)
    train_only(model, trainable_names(model, settings))
    return model


def names_of_groups(model, optimizer):
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = [group["params"] for group in optimizer.param_groups]
    return [[name_of[id(p)] for p in group] for group in groups]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("protocol", ["corrected", "published"])
def test_decay_groups_are_the_trainers(name, strategy, protocol, tmp_path):
    """Those of this transformers' Trainer, and those of version 4.46.1, names and order.

    The study ran on 4.46.1 (trainer.py:1131-1140).
    """
    model = classifier_of(name, strategy, protocol)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, weight_decay=0.1, report_to=[]
    )
    trainer = Trainer(model=model, args=arguments)
    then = [each for each in get_parameter_names(model, [nn.LayerNorm]) if "bias" not in each]
    assert decayed_names(model) == set(trainer.get_decay_parameter_names(model)) == set(then)
    groups = adamw(model, 1e-3, 0.1).param_groups
    theirs = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [group["weight_decay"] for group in theirs] == [0.1, 0.0]
    for ours, expected in zip(groups, theirs):
        assert {id(p) for p in ours["params"]} == {id(p) for p in expected["params"]}


def test_decay_by_hand():
    model = classifier_of("tiny-nt", "full")
    decayed, rest = names_of_groups(model, adamw(model, 1e-3, 0.1))
    assert "heads.genus.weight" in decayed
    assert "backbone.embeddings.word_embeddings.weight" in decayed
    assert "heads.genus.bias" in rest
    assert "backbone.encoder.layer.0.attention.LayerNorm.weight" in rest
    assert len(decayed) + len(rest) == len(list(model.parameters()))

    model = classifier_of("tiny-nt", "lora")
    decayed, rest = names_of_groups(model, adamw(model, 1e-3, 0.1))
    assert {each.rpartition(".")[2] for each in decayed} == {"lora_A", "lora_B", "weight"}
    assert set(rest) == {f"heads.{rank}.bias" for rank in ("superkingdom", "phylum", "genus")}


@pytest.mark.parametrize("name", TINY)
def test_decay_groups_of_masked_lm(name, tmp_path):
    """Tied weights, as pretrain.py has them, are in one group and there once."""
    family = MODELS[name].family
    model = MaskedLM(family, load_backbone(name, pretrained=False), MASKING[family].tied)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model=model, args=arguments)
    unique = dict(model.named_parameters())
    assert decayed_names(model) == set(trainer.get_decay_parameter_names(model)) & set(unique)
    decayed, rest = names_of_groups(model, adamw(model, 1e-3, 0.1))
    assert sorted(decayed + rest) == sorted(unique)


# ------------------------------------------------------------------ saved and loaded


def steps(model, optimizer, first, last):
    """Optimizer steps with gradients that follow from the step's number."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_saved_state_comes_back(strategy, weight_decay):
    """Two steps, the state saved, two more: equal to four steps."""
    whole, half, resumed = (classifier_of("tiny-dnabert", strategy) for _ in range(3))
    steps(whole, adamw(whole, 1e-2, weight_decay), 0, 4)
    saved = adamw(half, 1e-2, weight_decay)
    steps(half, saved, 0, 2)
    resumed.load_state_dict(half.state_dict())
    optimizer = adamw(resumed, 1e-2, weight_decay)
    optimizer.load_state_dict(saved.state_dict())
    steps(resumed, optimizer, 2, 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


# ------------------------------------------------------------------ what the published times were


def test_the_published_protocol_says_what_its_times_were():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    line = precision_note("published", "fp32", cuda)
    assert "not plain float32" in line and "--precision tf32" in line and "\n" not in line
    others = [("corrected", "fp32", cuda), ("published", "tf32", cuda), ("published", "fp32", cpu)]
    for protocol, precision, device in others:
        assert precision_note(protocol, precision, device) is None
