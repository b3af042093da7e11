"""What is computed again instead of kept: the same gradients as the plain formulas, and the bytes that are saved, by hand."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import batch, scrambled
from torch import nn
from torch.autograd import gradcheck

from taxa.backbones import dnabert2, nucleotide_transformer
from taxa.ia3 import IA3Linear
from taxa.lora import LoRALinear
from taxa.model import TaxonClassifier, sequence_losses
from taxa.recompute import dropout, gated, recomputed
from taxa.strategies import inject_adapters, settings_from_flags, train_only, trainable_names

STRATEGIES = ("full", "lora", "ia3", "freeze75")
both_families = pytest.mark.parametrize("name", ["tiny-nt", "tiny-dnabert"])
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def make(name, strategy, lora_dropout=0.0, **sizes):
    """A classifier in train mode, no dropout but LoRA's, adapters away from where they start."""
    dropout = {"hidden_dropout_prob": 0.0} if name == "tiny-dnabert" else {}
    model = TaxonClassifier(scrambled(name, **dropout, **sizes), (4, 5, 6))
    settings = settings_from_flags(name, strategy, **({"lora_dropout": lora_dropout} if strategy == "lora" else {}))
    torch.manual_seed(5)
    inject_adapters(model, settings)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key or "ia3_" in key:
                p.add_(torch.randn_like(p) * 0.1)
    train_only(model, trainable_names(model, settings))
    return model.train()


def gradients(model, ids, mask):
    labels = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 0, 3]])
    loss = sequence_losses(model(ids, mask), labels).mean()
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return loss.detach(), [g for g in found if g is not None]


def plain(monkeypatch):
    """The formulas as one would write them, nothing computed again, everything left to autograd."""

    def plain_gated(act, h):
        gate, value = h.chunk(2, dim=-1)
        return getattr(F, act)(gate) * value

    def plain_rotate(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    for module in (nucleotide_transformer, dnabert2):
        monkeypatch.setattr(module, "recomputed", lambda function, *inputs, then: then(function(*inputs)))
        monkeypatch.setattr(module, "gated", plain_gated)
    monkeypatch.setattr(nucleotide_transformer, "rotate", plain_rotate)
    monkeypatch.setattr("taxa.ia3.Scale.apply", lambda u, l: u * l)
    monkeypatch.setattr("taxa.lora.torch.addmm", lambda y, a, b, alpha: y + alpha * (a @ b))


@both_families
@every_strategy
def test_gradients_equal_the_plain_path(name, strategy, monkeypatch):
    model = make(name, strategy)
    model.backbone.double()  # the heads stay float32, as the pooled mean is
    loss, found = gradients(model, *batch())
    plain(monkeypatch)
    plain_loss, expected = gradients(model, *batch())
    assert len(found) == len(expected) > 3
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=1e-6)
    for g, other in zip(found, expected):
        torch.testing.assert_close(g, other, rtol=1e-6, atol=1e-7)


@both_families
@every_strategy
def test_float32_gradients_equal_the_plain_path(name, strategy, monkeypatch):
    model = make(name, strategy)
    _, found = gradients(model, *batch())
    plain(monkeypatch)
    for g, other in zip(found, gradients(model, *batch())[1]):
        torch.testing.assert_close(g, other, rtol=1e-5, atol=1e-5)


@both_families
@every_strategy
def test_recompute_of_whole_layers_changes_nothing(name, strategy):
    model = make(name, strategy, lora_dropout=0.5)
    torch.manual_seed(9)
    loss, expected = gradients(model, *batch())
    model.backbone.recompute = True
    torch.manual_seed(9)
    again, found = gradients(model, *batch())
    assert torch.equal(loss, again)
    for g, other in zip(found, expected):
        torch.testing.assert_close(g, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_gated(act):
    h = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gated(act, h), getattr(F, act)(h[..., :4]) * h[..., 4:])
    assert gradcheck(lambda h: gated(act, h), h)


def test_gradcheck_of_the_rest():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    norm, linear = nn.LayerNorm(4).double(), nn.Linear(4, 2).double()
    assert gradcheck(lambda x, *_: recomputed(norm, x, then=linear), (x, *norm.parameters(), *linear.parameters()))
    assert gradcheck(lambda x: recomputed(norm, x, then=lambda y: recomputed(torch.sin, y, then=linear) * y.sum()), x)
    cos, sin = (t.double() for t in nucleotide_transformer.rotary_table(3, 4, "cpu"))
    q = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda q: nucleotide_transformer.rotate(q, cos, sin), q)
    for adapted in (LoRALinear(linear, 2, 8), IA3Linear(linear), IA3Linear(linear, feedforward=True), IA3Linear(linear, rows=(1, 2))):
        adapted = adapted.double()
        with torch.no_grad():
            for p in adapted.parameters():
                p.add_(torch.rand_like(p))
        assert gradcheck(lambda x, *_: adapted(x), (x, *adapted.parameters()))
    drop = dropout(0.3)
    assert gradcheck(drop, x)
    assert torch.equal(drop(x), drop(x)) and not torch.equal(dropout(0.3)(torch.ones(99)), drop(torch.ones(99)))
    assert not dropout(1.0)(x).any()


def test_ia3_at_zero_has_a_finite_gradient():
    adapted = IA3Linear(nn.Linear(4, 3))
    with torch.no_grad():
        adapted.ia3_l[1] = 0.0
    adapted(torch.randn(5, 4)).sum().backward()
    assert torch.isfinite(adapted.ia3_l.grad).all() and adapted.ia3_l.grad[1] == 0 and adapted.ia3_l.grad[0] != 0


def test_twice_backward_through_one_graph():
    x, linear = torch.randn(3, 4, requires_grad=True), nn.Linear(4, 2)
    y = recomputed(torch.sin, x, then=lambda s: linear(s) * s.sum()).sum()
    first = torch.autograd.grad(y, (x, linear.weight), retain_graph=True)
    for g, other in zip(first, torch.autograd.grad(y, (x, linear.weight))):
        assert torch.equal(g, other)


def test_nothing_is_held_after_the_backward():
    """The loss is still there, as in train.py until the next step."""
    x, linear = torch.randn(3, 4, requires_grad=True), nn.Linear(4, 2)
    h = x * 2
    kept = weakref.ref(h.untyped_storage())
    loss = recomputed(torch.sin, h, then=linear).sum()
    del h
    gc.collect()
    assert kept() is not None
    loss.backward()
    gc.collect()
    assert kept() is None and linear.weight.grad is not None


@both_families
def test_bf16_autocast(name):
    model = make(name, "full")
    _, expected = gradients(model, *batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = gradients(model, *batch())
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (found, expected))
    assert F.cosine_similarity(a, b, dim=0) > 0.99


# ------------------------------------------------------------------ saved bytes, counted by hand


def saved_bytes(model, ids, mask):
    """Storages that saved-tensor hooks see, parameters and batch left out, in units of one (B, T, H) float32 tensor."""
    seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), ids, mask)}
    sizes, alive = [], []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(storage)
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sequence_losses(model(ids, mask), torch.zeros(len(ids), 3, dtype=torch.long)).mean()
    return sum(sizes) / (ids.numel() * model.backbone.config.hidden_size * 4)


# A layer of tiny-nt keeps x, q, k, v, the attention's result and x again, one unit each, and gate and value, 2 I / H = 4 units together.
LAYER = 6 + 4
UNITS = {  # of two layers, and the last LayerNorm's input
    "full": 2 * LAYER + 1,
    "lora": 2 * LAYER + 1,  # the frozen Linears keep nothing, but gradients pass through all that makes up a layer
    "ia3": 2 * LAYER,  # the first layer's input is no longer needed: nothing below the first l trains
    "freeze75": LAYER + 1,  # layer 1 alone
}


@every_strategy
def test_saved_bytes_by_hand(strategy):
    """Fails when a frozen Linear saves its input again, or when something that is computed again is also kept."""
    sizes = dict(hidden_size=64, num_attention_heads=4, intermediate_size=128, vocab_size=4107)
    model = make("tiny-nt", strategy, lora_dropout=0.1, **sizes)
    if strategy == "freeze75":
        names = {f"backbone.encoder.layer.1.{n}" for n, _ in model.backbone.encoder.layer[1].named_parameters()}
        train_only(model, names | {n for n, _ in model.named_parameters() if n.startswith(("heads", "backbone.encoder.emb_"))})
    ids = torch.randint(5, 4107, (4, 100))
    found = saved_bytes(model, ids, torch.ones_like(ids))
    small = 0.05 * UNITS[strategy]  # means and deviations of LayerNorm, the attention's log-sums, LoRA's down (B, T, r), the masks
    assert UNITS[strategy] < found < UNITS[strategy] + small
    model.backbone.recompute = True
    assert saved_bytes(model, ids, torch.ones_like(ids)) < 0.5 * found


@every_strategy
def test_frozen_linears_save_no_input(strategy):
    """One Linear alone: only a weight that trains, or an adapter, keeps its input."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    linear.requires_grad_(strategy == "full")
    model = {"lora": lambda: LoRALinear(linear, 2, 8), "ia3": lambda: IA3Linear(linear)}.get(strategy, lambda: linear)()
    x = torch.randn(100, 64, requires_grad=True) * 1.0
    seen = {t.untyped_storage().data_ptr() for t in model.parameters()}
    saved = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in seen:
            saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert (x.shape in saved) == (strategy in ("full", "lora")), saved
    assert (y.shape in saved) == (strategy == "ia3"), saved  # which attention keeps anyway
