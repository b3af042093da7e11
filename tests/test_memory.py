"""The memory of a step by part, against the allocator's own record, a naive count of saved tensors,
and what shapes say.
"""

import pytest
import torch

from taxa.measure.memory import (
    ACTIVATIONS,
    PARTS,
    activation_parts,
    allocator_peak,
    bytes_kept,
    step_memory,
)
from taxa.measure.step import batch_loss, build, random_batch, training_step
from taxa.training.activation_checkpointing import MODES
from taxa.training.settings import settings_from_flags

CLASSES = (4, 5, 6)
CPU = torch.device("cpu")


class Run:
    """A model in training, a batch and a step() that has run twice."""

    def __init__(self, name, strategy, B=8, T=64, mode="none"):
        settings = settings_from_flags(name, strategy)
        self.model, self.optimizer = build(name, settings, CLASSES, CPU, 1e-4, mode)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.batch = random_batch(1000, CLASSES, B, T, CPU)
        self.step()
        self.step()

    def step(self):
        training_step(self.model, self.optimizer, self.batch)

    def memory(self):
        return step_memory(self.model, self.optimizer, self.batch, self.step)


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name, strategy, B, T, mode", [
    *(("tiny-nt", strategy, 16, 128, mode) for strategy in ("full", "lora") for mode in MODES),
    *(("tiny-dnabert", "ia3", 8, 128, mode) for mode in MODES),
    ("tiny-nt", "full", 1, 16, "none"),
    ("tiny-nt", "freeze75", 16, 128, "selective"),
    ("nt50m", "freeze75", 1, 64, "none"),
])
def test_the_parts_add_up_to_the_allocators_own_peak(name, strategy, B, T, mode):
    run = Run(name, strategy, B, T, mode)
    found = run.memory()
    assert sum(found["parts"].values()) == found["peak"]
    own = allocator_peak(CPU, found["resident"], run.step)
    assert found["peak"] == pytest.approx(own, rel=0.1)
    assert found["parts"]["parameters"] == nbytes(run.model.parameters())
    states = run.optimizer.state.values()
    moments = nbytes(tensor for state in states for tensor in state.values())
    assert found["parts"]["optimizer state"] == moments
    assert found["most"]["gradients"] == nbytes(run.parameters)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", ["full", "lora", "ia3", "freeze75"])
def test_saved_bytes_are_what_the_allocator_keeps_after_the_forward(strategy, mode):
    run = Run("tiny-nt", strategy, mode=mode)
    kept = bytes_kept(CPU, lambda: batch_loss(run.model, run.batch))
    found = run.memory()
    # To 2%: the state of the random generator that checkpointing keeps is no tensor of the step;
    # the backward saves nothing, and frees.
    assert found["saved"] == pytest.approx(kept, rel=0.02, abs=3 * 5056 if mode != "none" else 0)
    most = found["most"]
    assert (most["adapters"] > 0) == (strategy in ("lora", "ia3") and mode == "none")
    assert (most["checkpointed"] > 0) == (mode != "none")
    # Of layers, all of which are checkpointed.
    inside = sum(most[part] for part in ("attention", "feed-forward", "adapters"))
    assert (inside > 1000) == (mode == "none")


def test_what_checkpointing_keeps_is_its_own_part():
    """In units of one (B, T, H) tensor, two layers: full keeps each layer's input; selective six
    more and twice I / H more of each.
    """
    B, T, H = 8, 64, 128
    unit = B * T * H * 4  # bytes
    for mode, units in (("full", 2), ("selective", 2 * (7 + 2 * 2))):
        most = Run("tiny-nt", "full", B, T, mode).memory()["most"]
        assert units <= most["checkpointed"] / unit <= 1.07 * units  # cos and sin besides
        # The last one is in no layer: its input.
        assert most["LayerNorm"] / unit == pytest.approx(1, rel=0.02)


def test_a_saved_tensor_belongs_to_the_module_that_saved_it():
    run = Run("tiny-nt", "lora")
    parts = activation_parts(run.model)
    layer = "backbone.encoder.layer.1"
    expected = {
        "": "heads",
        "backbone": "attention",
        "backbone.embeddings.word_embeddings": "embedding",
        layer: "feed-forward",
        f"{layer}.attention.self": "attention",
        f"{layer}.attention.self.key": "attention",
        f"{layer}.attention.self.query": "adapters",
        f"{layer}.attention.LayerNorm": "LayerNorm",
        f"{layer}.attention.output.dense": "attention",
        f"{layer}.output.dense": "feed-forward",
        f"{layer}.LayerNorm": "LayerNorm",
        "heads.genus": "heads",
    }
    assert {name: parts[name] for name in expected} == expected
    B, T = run.batch[0].shape
    assert Run("tiny-nt", "full").memory()["most"]["embedding"] == B * T * 8  # the ids
    assert Run("tiny-nt", "freeze75").memory()["most"]["embedding"] == 0


def test_nothing_is_left_behind():
    run = Run("tiny-nt", "lora")
    first = run.memory()
    assert run.memory() == first
    modules = run.model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert set(PARTS) > set(ACTIVATIONS)
