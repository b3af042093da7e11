"""LoRA: a frozen weight W plus a trained product of two thin matrices (Hu et al. 2022, equation 3).

    y = W x + b + scaling * B A dropout(x),    scaling = lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)

A is (r, in), B is (out, r) and starts at zero, so training starts from exactly the pretrained network. Example, nt50m, r = 4: a query
projection holds W of 512 x 512 = 262,144 frozen weights; A (4, 512) and B (512, 4) add 4,096 that train. Two projections in each
of 12 layers: 98,304 in all, 24,576 r.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from taxa.inject import plain_linear, replace_linears, share_linear
from taxa.recompute import dropout, recomputed


class LoRALinear(nn.Linear):
    """An nn.Linear that keeps its weight and bias (the same tensors, under the same names) and adds lora_A and lora_B."""

    def __init__(self, linear, r, lora_alpha, lora_dropout=0.0, rslora=False):
        share_linear(self, linear)
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / r if not rslora else lora_alpha / math.sqrt(r)
        self.lora_dropout = lora_dropout
        self.lora_A = nn.Parameter(linear.weight.new_empty(r, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as microsoft/LoRA and PEFT: uniform in +-1/sqrt(in)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        y = F.linear(x, self.weight, self.bias)
        if self.training and self.lora_dropout > 0:  # the dropped x is not kept for A's gradient but dropped again
            down = recomputed(dropout(self.lora_dropout), x, then=lambda dropped: F.linear(dropped, self.lora_A))
        else:
            down = F.linear(x, self.lora_A)  # (..., r)
        # y + scaling * down B^T in one pass over y
        return torch.addmm(y.flatten(0, -2), down.flatten(0, -2), self.lora_B.t(), alpha=self.scaling).view(y.shape)

    @torch.no_grad()
    def merge(self):
        """Add scaling * B A to the weight, in place, and return it as a plain nn.Linear. One way: do it once, after training."""
        self.weight += self.scaling * (self.lora_B @ self.lora_A)
        return plain_linear(self)

    def extra_repr(self):
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"


def inject_lora(model, targets, r, lora_alpha, lora_dropout=0.0, rslora=False):
    """Put LoRA on every Linear that a target names. Raises InputError for a target that matches nothing."""
    for target in targets:
        replace_linears(model, target, lambda linear: LoRALinear(linear, r, lora_alpha, lora_dropout, rslora))
