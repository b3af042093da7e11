"""LoRA: a frozen weight W plus a trained low-rank update B A (Hu et al. 2022, equation 3).

    y = W x + b + scaling * B A dropout(x),    scaling = lora_alpha / r

A is (r, in). B is (out, r) and starts at zero, so training starts from exactly the pretrained
network. Example, nt50m with r = 4: a query projection holds W of 512 x 512 = 262,144 frozen
weights, and A (4, 512) and B (512, 4) add 4,096 that train. LoRA adapts two projections in each of
the 12 layers: 98,304 weights in all, 24,576 r.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from taxa.inject import plain_linear, replace_linears, share_linear


class LoRALinear(nn.Linear):
    """An nn.Linear that keeps its weight and bias, tensors and names, and adds lora_A, lora_B."""

    adapter_parameters = ("lora_A", "lora_B")

    def __init__(self, linear, r, lora_alpha, lora_dropout=0.0, rslora=False):
        share_linear(self, linear)
        self.r = r
        self.scaling = lora_alpha / (math.sqrt(r) if rslora else r)  # rslora: Kalajdzievski 2023
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.lora_A = nn.Parameter(linear.weight.new_empty(r, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, r))
        # As microsoft/LoRA and PEFT do it: uniform in +-1/sqrt(in).
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        y = F.linear(x, self.weight, self.bias)
        low = F.linear(self.lora_dropout(x), self.lora_A)  # (..., r)
        return y + self.scaling * F.linear(low, self.lora_B)

    @torch.no_grad()
    def merge(self):
        """Add scaling * B A to the weight, in place, and return the layer as a plain nn.Linear.

        There is no way back: call it once, after training.
        """
        self.weight += self.scaling * (self.lora_B @ self.lora_A)
        return plain_linear(self)


def inject_lora(model, targets, r, lora_alpha, lora_dropout=0.0, rslora=False):
    """Put LoRA on every Linear that a target names. Raises InputError for one without a match."""
    for target in targets:
        replace_linears(
            model, target, lambda linear: LoRALinear(linear, r, lora_alpha, lora_dropout, rslora)
        )
