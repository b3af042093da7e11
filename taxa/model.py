"""The classifier: backbone, masked mean pool, one linear head per rank, and the loss.

Source: Berman et al. 2025, methods.

Shapes: B sequences, T tokens, H hidden_size, C classes of a rank, R ranks.
"""

import torch
import torch.nn.functional as F
from torch import nn

from taxa import RANKS


def masked_mean(hidden, attention_mask):
    """Mean of hidden (B, T, H) over the tokens with attention_mask (B, T) = 1 -> (B, H), float32.

    Special tokens count too. Without a mask (None) the mean is over all tokens.
    """
    if attention_mask is None:
        return hidden.float().mean(dim=1)
    mask = attention_mask.unsqueeze(-1).float()  # (B, T, 1)
    return (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1)


class TaxonClassifier(nn.Module):
    """Three independent linear heads on the mean of the backbone's last hidden state.

    num_classes: {rank: number of classes}, or the numbers alone in the order superkingdom, phylum,
    genus.
    """

    def __init__(self, backbone, num_classes):
        super().__init__()
        if not isinstance(num_classes, dict):
            num_classes = dict(zip(RANKS, num_classes, strict=True))
        H = backbone.config.hidden_size
        self.backbone = backbone
        self.heads = nn.ModuleDict({rank: nn.Linear(H, C) for rank, C in num_classes.items()})

    def forward(self, input_ids, attention_mask=None):
        """input_ids (B, T), attention_mask (B, T) -> {rank: logits (B, C)}."""
        return self.classify(self.pool(input_ids, attention_mask))

    def pool(self, input_ids, attention_mask=None):
        """input_ids (B, T), attention_mask (B, T) -> (B, H): one vector per sequence."""
        return masked_mean(self.backbone(input_ids, attention_mask), attention_mask)

    def classify(self, pooled):
        """pooled (B, H) -> {rank: logits (B, C)}."""
        return {rank: head(pooled) for rank, head in self.heads.items()}


def sequence_losses(logits, labels):
    """Sum over the ranks of the cross-entropy, without class weights -> (B,), float32.

    logits: {rank: (B, C)}; labels: (B, R), in the order of the ranks.
    """
    losses = [
        F.cross_entropy(z.float(), labels[:, i], reduction="none")  # (B,)
        for i, z in enumerate(logits.values())
    ]
    return torch.stack(losses).sum(dim=0)
