"""The learning rate against transformers' scheduler, AdamW against its formula."""

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from taxa.training.optim import adamw, cosine_lr


@pytest.mark.parametrize("total, warmup", [(1, 0), (2, 0), (7, 0), (100, 0), (100, 10), (50, 50), (13, 1), (20, 19)])
@pytest.mark.parametrize("lr", [2e-4, 1.0])
def test_cosine_equals_transformers(total, warmup, lr):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total + 1):
        expected = scheduler.get_last_lr()[0]
        assert cosine_lr(step, total, lr, warmup) == pytest.approx(expected, rel=1e-9, abs=1e-18), step
        optimizer.step()
        scheduler.step()


def test_cosine_by_hand():
    assert [cosine_lr(step, 4, 8.0) for step in range(5)] == pytest.approx(
        [8.0, 4 * (1 + math.sqrt(0.5)), 4.0, 4 * (1 - math.sqrt(0.5)), 0.0], abs=1e-12)
    assert [cosine_lr(step, 10, 8.0, 4) for step in range(5)] == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_adamw_defaults_are_the_published_ones():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = adamw([p], 2e-4)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2e-4, (0.9, 0.999), 1e-8, 0.0)
    assert not group["amsgrad"] and not group["maximize"]
    assert group["params"] == [p]
    assert adamw([p], 1e-3, weight_decay=0.1).param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_by_hand(weight_decay):
    """Three steps of Loshchilov and Hutter 2019, algorithm 2, on one number."""
    p = torch.nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = adamw([p], 0.01, weight_decay)
    x, m, v = 0.7, 0.0, 0.0
    for t in range(1, 4):
        gradient = math.cos(t) + x
        p.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        x -= 0.01 * weight_decay * x
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x -= 0.01 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert p.item() == pytest.approx(x, rel=1e-12)
