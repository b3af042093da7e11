"""The pool, the heads and the loss against plain loops; and what the published wrapping does to the
heads.
"""

import math

import pytest
import torch
from helpers import TINY, H, batch, scrambled
from torch import nn

from taxa import RANKS
from taxa.data.batches import on_device
from taxa.model import TaxonClassifier, masked_mean, sequence_losses


def make_classifier(name, num_classes=(4, 5, 6)):
    torch.manual_seed(0)
    return TaxonClassifier(scrambled(name), num_classes).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.uint8])
def test_masked_mean_equals_a_loop(dtype, mask_dtype):
    torch.manual_seed(0)
    hidden = torch.randn(4, 6, 5).to(dtype)
    mask = torch.tensor([
        [1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 0],
    ]).to(mask_dtype)
    found = masked_mean(hidden, mask)
    assert found.dtype == torch.float32 and found.shape == (4, 5)
    for b in range(4):
        tokens = [hidden[b, t].double().tolist() for t in range(6) if mask[b, t]]
        for h in range(5):
            expected = sum(token[h] for token in tokens) / len(tokens)
            assert found[b, h].item() == pytest.approx(expected, abs=1e-6)


def test_masked_mean_ignores_what_is_masked():
    hidden = torch.ones(1, 3, 2)
    hidden[0, 2] = 1e30
    assert masked_mean(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("num_classes", [
    (4, 5, 6),
    [4, 5, 6],
    {"superkingdom": 4, "phylum": 5, "genus": 6},
])
def test_logits_are_three_linear_maps_of_the_mean(name, num_classes):
    classifier = make_classifier(name, num_classes)
    ids, mask = batch()
    with torch.no_grad():
        found = classifier(ids, mask)
        hidden = classifier.backbone(ids, mask)
    assert list(found) == list(RANKS) == ["superkingdom", "phylum", "genus"]
    assert [tuple(z.shape) for z in found.values()] == [(3, 4), (3, 5), (3, 6)]
    for rank, z in found.items():
        head = classifier.heads[rank]
        for row, length in enumerate((9, 4, 1)):
            pooled = hidden[row, :length].mean(dim=0)
            torch.testing.assert_close(z[row], head.weight @ pooled + head.bias, rtol=0, atol=1e-5)


def test_names_of_the_heads():
    every = [key for key, _ in make_classifier("tiny-nt").named_parameters()]
    assert [key for key in every if not key.startswith("backbone.")] == [
        "heads.superkingdom.weight", "heads.superkingdom.bias",
        "heads.phylum.weight", "heads.phylum.bias",
        "heads.genus.weight", "heads.genus.bias",
    ]


@pytest.mark.parametrize("num_classes", [(4, 5), (4, 5, 6, 7), ()])
def test_another_number_of_ranks_is_refused(num_classes):
    with pytest.raises(ValueError):
        make_classifier("tiny-nt", num_classes)


@pytest.mark.parametrize("name", TINY)
def test_logits_of_a_sequence_do_not_depend_on_its_batch(name):
    classifier = make_classifier(name)
    ids, mask = batch()
    with torch.no_grad():
        together = classifier(ids, mask)
        for row, length in enumerate((9, 4, 1)):
            alone = classifier(ids[row: row + 1, :length], mask[row: row + 1, :length])
            for rank in RANKS:
                torch.testing.assert_close(together[rank][row], alone[rank][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_sum_of_the_ranks_cross_entropies(dtype):
    torch.manual_seed(1)
    logits = {rank: (3 * torch.randn(5, C)).to(dtype) for rank, C in zip(RANKS, (4, 5, 6))}
    labels = torch.tensor([[0, 4, 5], [3, 0, 0], [1, 2, 3], [2, 1, 4], [0, 3, 1]])
    found = sequence_losses(logits, labels)
    assert found.shape == (5,) and found.dtype == torch.float32
    for b in range(5):
        expected = 0.0
        for i, z in enumerate(logits.values()):
            row = z[b].double().tolist()
            expected += math.log(sum(math.exp(value) for value in row)) - row[labels[b, i]]
        assert found[b].item() == pytest.approx(expected, abs=1e-5)


def test_loss_of_uniform_logits_is_the_sum_of_the_logarithms():
    logits = {rank: torch.zeros(2, C) for rank, C in zip(RANKS, (4, 57, 1884))}
    expected = math.log(4) + math.log(57) + math.log(1884)
    found = sequence_losses(logits, torch.tensor([[0, 0, 0], [3, 56, 1883]]))
    assert found.tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_every_head_gets_the_gradient_of_its_own_rank(name):
    classifier = make_classifier(name)
    labels = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 0, 3]])
    logits = classifier(*batch())
    sequence_losses(logits, labels).sum().backward()
    for i, (rank, z) in enumerate(logits.items()):
        expected = torch.softmax(z.detach(), dim=1)
        expected[torch.arange(3), labels[:, i]] -= 1.0  # of cross-entropy by its logits
        found = classifier.heads[rank].bias.grad
        torch.testing.assert_close(found, expected.sum(dim=0), rtol=0, atol=1e-5)


# ------------------------------------------------------------------ the published wrapping


class Published(nn.Module):
    """The published classifier reduced to a backbone, and beside it the heads under a name."""

    def __init__(self, backbone, name, heads):
        super().__init__()
        self.config = backbone.config
        self.backbone = backbone
        setattr(self, name, heads)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("heads, trains", [
    ("classifiers", False),
    ("classifier", True),
    ("score", True),
])
def test_published_wrapping_leaves_the_heads_without_gradient(name, adapter, heads, trains):
    """PEFT's SEQ_CLS trains the modules named `classifier` or `score`; the published heads are
    named `classifiers`.
    """
    peft = pytest.importorskip("peft")
    targets = {"tiny-nt": ["query", "value"], "tiny-dnabert": ["Wqkv"]}[name]
    if adapter == "lora":
        config = peft.LoraConfig(
            task_type="SEQ_CLS",
            r=4,
            lora_alpha=32,
            lora_dropout=0.1,
            target_modules=targets,
        )
    else:
        inputs = ["attention.output.dense"]
        config = peft.IA3Config(
            task_type="SEQ_CLS",
            target_modules=targets + inputs,
            feedforward_modules=inputs,
        )
    backbone = scrambled(name)
    one = nn.Linear(H, 15)
    three = nn.ModuleList(nn.Linear(H, C) for C in (4, 5, 6))
    model = peft.get_peft_model(Published(backbone, heads, one if trains else three), config)
    require = [key for key, p in model.named_parameters() if p.requires_grad]
    adapters = [key for key in require if "lora_" in key or "ia3_" in key]
    of_heads = [key for key in require if f".{heads}." in key]
    assert adapters and all(".backbone." in key for key in adapters)
    assert len(of_heads) == (2 if trains else 0)
    assert len(require) == len(adapters) + len(of_heads)


@pytest.mark.parametrize("name", TINY)
def test_no_mask_is_a_mask_of_ones(name):
    """attention_mask=None says that no token is padding; a batch without padding goes to the device
    with it.
    """
    model = TaxonClassifier(scrambled(name), (4, 5, 6))
    ids, ones = batch(lengths=(9, 9, 9))
    for rank, z in model(ids).items():
        torch.testing.assert_close(z, model(ids, ones)[rank], rtol=1e-5, atol=1e-5)
    moved = on_device({"input_ids": ids, "attention_mask": ones}, "cpu")
    assert moved["attention_mask"] is None
    ids, mask = batch(lengths=(9, 4, 9))
    moved = on_device({"input_ids": ids, "attention_mask": mask}, "cpu")
    assert torch.equal(moved["attention_mask"], mask)
