"""The memory of a step by part, against the allocator's own record, a naive count of saved tensors, and what shapes say."""

import pytest
import torch

from taxa.backbones import load_backbone
from taxa.measure.memory import ACTIVATIONS, PARTS, activation_parts, allocator_peak, step_memory
from taxa.model import TaxonClassifier, sequence_losses
from taxa.strategies import inject_adapters, settings_from_flags, train_only, trainable_names
from taxa.training.optim import adamw

CLASSES = (4, 5, 6)


class Run:
    """A model in training, a batch and a step() that has run twice."""

    def __init__(self, name, strategy, B=8, T=64):
        torch.manual_seed(0)
        self.model = TaxonClassifier(load_backbone(name, pretrained=False), CLASSES).train()
        settings = settings_from_flags(name, strategy)
        inject_adapters(self.model, settings)
        train_only(self.model, trainable_names(self.model, settings))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.model, 1e-4)
        ids = torch.randint(5, 1000, (B, T))
        self.batch = ids, torch.ones_like(ids), torch.randint(0, 4, (B, 3))
        self.step()
        self.step()

    def loss(self):
        return sequence_losses(self.model(*self.batch[:2]), self.batch[2]).mean()

    def step(self):
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def memory(self):
        return step_memory(self.model, self.optimizer, self.batch, self.step)


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name, strategy, B, T", [
    ("tiny-nt", "full", 32, 128), ("tiny-nt", "full", 1, 16), ("tiny-nt", "lora", 32, 128), ("tiny-nt", "freeze75", 32, 128),
    ("tiny-dnabert", "ia3", 8, 128), ("nt50m", "freeze75", 1, 64)])
def test_the_parts_add_up_to_the_allocators_own_peak(name, strategy, B, T):
    run = Run(name, strategy, B, T)
    found = run.memory()
    assert sum(found["parts"].values()) == found["peak"]
    own = allocator_peak(torch.device("cpu"), found["resident"], run.step)
    assert found["peak"] == pytest.approx(own, rel=0.1)
    assert found["parts"]["parameters"] == nbytes(run.model.parameters())
    assert found["parts"]["optimizer state"] == nbytes(t for state in run.optimizer.state.values() for t in state.values())
    assert found["most"]["gradients"] == nbytes(run.parameters)


@pytest.mark.parametrize("strategy", ["full", "lora", "ia3", "freeze75"])
def test_saved_bytes_equal_a_naive_count(strategy):
    run = Run("tiny-nt", strategy)
    parameters, saved = {p.untyped_storage().data_ptr() for p in run.model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.loss()
    naive = sum(saved.values())
    del loss
    found = run.memory()
    assert found["saved"] == pytest.approx(naive, rel=0.01)  # the backward saves nothing, and frees as it goes
    assert found["most"]["adapters"] == 0  # what adapters save inside recomputed() is the attention's
    assert found["most"]["attention"] > 0 or strategy == "freeze75"


def test_a_saved_tensor_belongs_to_the_module_that_saved_it():
    run = Run("tiny-nt", "lora")
    parts = activation_parts(run.model)
    layer = "backbone.encoder.layer.1"
    assert {name: parts[name] for name in (
        "", "backbone", "backbone.embeddings.word_embeddings", layer, f"{layer}.attention.self", f"{layer}.attention.self.key",
        f"{layer}.attention.self.query", f"{layer}.attention.LayerNorm",
        f"{layer}.attention.output.dense", f"{layer}.output.dense", f"{layer}.LayerNorm", "heads.genus")} == {
        "": "heads", "backbone": "attention", "backbone.embeddings.word_embeddings": "embedding", layer: "feed-forward",
        f"{layer}.attention.self": "attention", f"{layer}.attention.self.key": "attention", f"{layer}.attention.self.query": "adapters",
        f"{layer}.attention.LayerNorm": "LayerNorm",
        f"{layer}.attention.output.dense": "attention", f"{layer}.output.dense": "feed-forward", f"{layer}.LayerNorm": "LayerNorm",
        "heads.genus": "heads"}
    B, T = run.batch[0].shape
    assert Run("tiny-nt", "full").memory()["most"]["embedding"] == B * T * 8  # the ids
    assert Run("tiny-nt", "freeze75").memory()["most"]["embedding"] == 0


def test_nothing_is_left_behind():
    run = Run("tiny-nt", "lora")
    first = run.memory()
    assert run.memory() == first
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())
    assert set(PARTS) > set(ACTIVATIONS)
