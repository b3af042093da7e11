"""--activation-checkpointing: none, selective and full give the same numbers.

What they keep is counted here by hand, and how many graphs they compile to.
"""

import copy
import functools

import pytest
import torch
from helpers import batch, scrambled
from torch import nn
from torch.autograd import gradcheck

from taxa.backbones import MODELS
from taxa.ia3 import IA3Linear
from taxa.lora import LoRALinear
from taxa.measure.memory import bytes_kept
from taxa.model import TaxonClassifier, sequence_losses
from taxa.runtime.precision import compile_in_place
from taxa.strategies import STRATEGIES, inject_adapters, train_only, trainable_names
from taxa.training.activation_checkpointing import MODES, checkpoint_layers
from taxa.training.settings import settings_from_flags

CHECKPOINTED = ("selective", "full")
LABELS = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 0, 3]])
# wide enough for selective to keep the products
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
both_families = pytest.mark.parametrize("name", ["tiny-nt", "tiny-dnabert"])
every_strategy = pytest.mark.parametrize(
    "strategy", [name for name in STRATEGIES if name != "random"]  # which trains as full
)
modes = pytest.mark.parametrize("mode", CHECKPOINTED)


def make(name, strategy, mode="none", vocab_size=30, **sizes):
    """A classifier in train mode.

    LoRA's dropout is 0.1, and so is DNABERT's hidden and attention dropout. Adapters are away from
    where they start.
    """
    dropout = {}
    if name == "tiny-dnabert":
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    sizes = {**WIDE, **dropout, "vocab_size": vocab_size, **sizes}
    model = TaxonClassifier(scrambled(name, **sizes), (4, 5, 6))
    settings = settings_from_flags(name, strategy)
    assert strategy != "lora" or settings["lora_dropout"] == 0.1
    torch.manual_seed(5)
    inject_adapters(model, settings)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key or "ia3_" in key:
                p.add_(torch.randn_like(p) * 0.1)
    train_only(model, trainable_names(model, settings))
    checkpoint_layers(model.backbone, mode)
    return model.train()


def results(model, seed=9, bf16=False):
    """({rank: logits}, {name: gradient}) of one batch, the dropout masks drawn from `seed`."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    ids, mask = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(ids, mask)
    sequence_losses(logits, LABELS).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {rank: z.detach() for rank, z in logits.items()}, gradients


def assert_equal(found, expected):
    for one, other in zip(found, expected):
        assert one.keys() == other.keys() and len(one) >= 3
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert not different


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@modes
@both_families
@every_strategy
def test_logits_and_gradients_are_the_same_to_the_last_bit(name, strategy, mode, bf16):
    """Dropout is on: another mask in the second pass, or another order, would change gradients."""
    expected = results(make(name, strategy), bf16=bf16)
    model = make(name, strategy, mode)
    assert_equal(results(model, bf16=bf16), expected)
    assert_equal(results(model, bf16=bf16), expected)  # and again with the same seed
    if name == "tiny-dnabert" or strategy == "lora":  # else no mask would be drawn at all
        other, _ = results(model, seed=10, bf16=bf16)
        assert not torch.equal(other["genus"], expected[0]["genus"])


@modes
@both_families
def test_the_second_pass_leaves_the_random_state_alone(name, mode):
    """What is drawn after the backward is what would have been drawn without checkpointing."""
    drawn = []
    for model in (make(name, "lora"), make(name, "lora", mode)):
        results(model)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@modes
@both_families
@every_strategy
def test_names_stay_and_without_gradients_nothing_is_kept(name, strategy, mode):
    plain, model = make(name, strategy).eval(), make(name, strategy, mode).eval()
    assert list(model.state_dict()) == list(plain.state_dict())
    names = [key for key, _ in model.named_parameters()]
    assert names == [key for key, _ in plain.named_parameters()]
    ids, mask = batch()
    with torch.no_grad():
        logits = model(ids, mask)
        for rank, z in plain(ids, mask).items():
            assert torch.equal(z, logits[rank])
        # the logits themselves, each rounded up to 64 bytes
        small = sum(z.numel() for z in logits.values()) * 4 + 64 * len(logits)
        assert bytes_kept(torch.device("cpu"), lambda: model(ids, mask)) <= small


# ------------------------------------------------------------------ what is kept, counted by hand

B, T, H = 4, 100, 64
RATIO = 2  # I / H; selective keeps products over 64 terms or more
# In tensors of one (B, T, H), of one layer of nt:
FULL = 1  # the layer's input
# Input, query key value, attention, output projection, gate and value, second projection.
SELECTIVE = 1 + 3 + 1 + 1 + 2 * RATIO + 1
# Left to autograd: the input of the first LayerNorm and its result, rotated query and key, value,
# attention, the input of the second LayerNorm and its result, gate and value, silu(gate), the
# product of the two.
NONE = 2 + 3 + 1 + 2 + 4 * RATIO
PLAIN = {
    "full": NONE,
    # no results of LayerNorm (2) and no product (RATIO), which only weights' gradients need; two
    # masks, and two dropped-out inputs of A
    "lora": NONE - 2 - RATIO + 4,
    # no results of LayerNorm; unscaled key and value for the gradient of their l (the product is
    # kept for that of its own)
    "ia3": NONE - 2 + 2,
}


def bytes_of_a_step(model):
    """Those that the forward and the loss of B sequences of T tokens keep for the backward."""
    ids = torch.randint(5, 4107, (B, T))
    mask = torch.ones_like(ids)
    labels = LABELS[:1].expand(B, 3)
    return bytes_kept(torch.device("cpu"), lambda: sequence_losses(model(ids, mask), labels).mean())


@pytest.mark.parametrize("mode", MODES)
@every_strategy
def test_the_bytes_that_a_layer_keeps(strategy, mode):
    """By torch's allocator.

    It fails when a frozen Linear keeps its input, or when something that is computed again is also
    kept. Networks of 3 and 2 layers, so that what is before, between and after the layers cancels
    out. In freeze75 the layers that train.
    """
    kept = []
    for layers in (2, 3):
        model = make("tiny-nt", strategy, vocab_size=4107, layers=layers, num_attention_heads=1)
        if strategy == "freeze75":
            frozen = ("backbone.embeddings.", "backbone.encoder.layer.0.")
            names = [name for name, _ in model.named_parameters() if not name.startswith(frozen)]
            train_only(model, names)
        checkpoint_layers(model.backbone, mode)
        kept.append(bytes_of_a_step(model))
    found = (kept[1] - kept[0]) / (B * T * H * 4)
    expected = {"none": PLAIN.get(strategy, NONE), "selective": SELECTIVE, "full": FULL}[mode]
    # sums of LayerNorm and attention, the random state; A x twice
    small = 0.11 + 0.13 * (strategy == "lora" and mode != "full")
    assert expected <= found <= expected + small


def test_layers_below_all_that_trains_keep_nothing():
    for mode in MODES:
        model = make("tiny-nt", "full", mode, vocab_size=4107)
        train_only(model, ["heads.genus.weight"])
        assert bytes_of_a_step(model) < 0.25 * B * T * H * 4, mode


@pytest.mark.parametrize("trains", [True, False])
def test_a_frozen_linear_keeps_no_input(trains):
    linear = nn.Linear(64, 32)
    linear.requires_grad_(trains)
    x = torch.randn(100, 64, requires_grad=True)
    kept = bytes_kept(torch.device("cpu"), lambda: linear(x.clone()))
    y = 100 * 32 * 4  # the result itself
    assert kept == y + trains * x.nbytes


# ------------------------------------------------------------------ compiled

LENGTHS = [(9, 4, 1), (7, 3), (12, 5, 2, 1), (5, 5)]  # of the sequences of each step's batch


@pytest.fixture
def dynamo(monkeypatch):
    """torch's counter of graphs, from 0. The backend, which gets each graph, only runs it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", MODES)
@both_families
def test_compiled_layers_share_few_graphs(name, mode, dynamo):
    """However many layers there are, in every mode: else a deep network meets torch's limit.

    As many as nt250m has, narrow. One graph is compile_in_place()'s own trial; the first shape of a
    batch has one, and all other shapes share one.
    """
    layers = MODELS["nt250m"].sizes["num_hidden_layers"]
    narrow = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = scrambled(name, layers, **narrow).train()
    checkpoint_layers(backbone, mode)
    compile_in_place(backbone, backbone.encoder.layer, "layers", torch.device("cpu"))
    for lengths in LENGTHS:
        backbone(*batch(lengths=lengths)).sum().backward()
    assert 2 <= dynamo["unique_graphs"] <= 4


# ------------------------------------------------------------------ the adapters' gradients

ADAPTERS = {
    "lora": lambda linear: LoRALinear(linear, 2, 8),
    "ia3 on output": IA3Linear,
    "ia3 on input": lambda linear: IA3Linear(linear, feedforward=True),
    "ia3 on rows": lambda linear: IA3Linear(linear, rows=(1, 2)),
}


@pytest.mark.parametrize("adapt", ADAPTERS.values(), ids=ADAPTERS)
def test_gradcheck_of_the_adapters(adapt):
    torch.manual_seed(0)
    adapted = adapt(nn.Linear(4, 3).double())
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(torch.rand_like(p))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, *_: adapted(x), (x, *adapted.parameters()))


@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3_at_zero_has_its_true_gradient(feedforward):
    """As in the PEFT library: the result is linear in l, so the gradient does not depend on l."""
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 4), torch.randn(5, 4)
    at_one = IA3Linear(linear, feedforward=feedforward)
    at_zero = copy.deepcopy(at_one)
    with torch.no_grad():
        at_zero.ia3_l[1] = 0.0
    for adapted in (at_one, at_zero):
        adapted(x).sum().backward()
    assert at_zero.ia3_l.grad[1] != 0
    torch.testing.assert_close(at_zero.ia3_l.grad, at_one.ia3_l.grad)
