"""(IA)3: a frozen network whose activations are rescaled by trained vectors (Liu et al. 2022, section 3.3).

    on an output:   y = l * (W x + b)        l (out,)
    on an input:    y = W (l * x) + b        l (in,)

Every l starts at one, so training starts from exactly the pretrained network. The authors scale keys, values, and the hidden layer of the
feed-forward (the input of its second projection). Of a fused projection of queries, keys and values, Wqkv (3H, H), l covers two thirds of
the output: the target is written "Wqkv[key,value]". Example, nt50m: 512 + 512 + 2048 numbers in each of 12 layers, 36,864 in all.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from taxa.errors import InputError
from taxa.inject import plain_linear, replace_linears, share_linear

THIRDS = ("query", "key", "value")  # of the rows of a fused Wqkv


class IA3Linear(nn.Linear):
    """An nn.Linear that keeps its weight and bias (the same tensors, under the same names) and adds ia3_l, on its input
    (feedforward=True) or on the features `rows` = (start, stop) of its output, by default all."""

    adapter_parameters = ("ia3_l",)

    def __init__(self, linear, feedforward=False, rows=None):
        share_linear(self, linear)
        self.feedforward, self.rows = feedforward, rows or (0, linear.out_features)
        self.ia3_l = nn.Parameter(linear.weight.new_ones(linear.in_features if feedforward else self.rows[1] - self.rows[0]))

    def output_scale(self):
        """(out,): ia3_l at the scaled rows, one elsewhere."""
        return F.pad(self.ia3_l, (self.rows[0], self.out_features - self.rows[1]), value=1.0)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if self.feedforward:
            return F.linear(self.ia3_l * x, self.weight, self.bias)
        y = F.linear(x, self.weight, self.bias)
        return (self.output_scale() * y).to(y.dtype)  # under bf16 autocast l stays float32: the product is rounded, not the vector

    @torch.no_grad()
    def merge(self):
        """Fold ia3_l into the weight (and, on an output, the bias), in place, and return it as a plain nn.Linear. One way: do it once."""
        self.weight *= self.ia3_l if self.feedforward else self.output_scale()[:, None]  # scales columns, or rows
        if self.bias is not None and not self.feedforward:
            self.bias *= self.output_scale()
        return plain_linear(self)


def split_target(target):
    """Return (module, parts): "layer.Wqkv[key,value]" -> ("layer.Wqkv", ("key", "value")); without brackets -> (target, None)."""
    found = re.fullmatch(r"(.+)\[([a-z,]+)\]", target)
    module, parts = (found[1], tuple(found[2].split(","))) if found else (target, None)
    if parts and parts not in {THIRDS[i:j] for i in range(3) for j in range(i + 1, 4)}:
        raise InputError(f"target '{target}': the brackets take neighbouring parts of {','.join(THIRDS)}, in that order")
    return module, parts


def rows_of(parts, out_features):
    """(start, stop): the rows of a fused Wqkv with out_features = 3H that ("key", "value"), say, are."""
    return THIRDS.index(parts[0]) * out_features // 3, (THIRDS.index(parts[-1]) + 1) * out_features // 3


def inject_ia3(model, targets, feedforward_targets):
    """Put (IA)3 on the outputs of `targets` and the inputs of `feedforward_targets`. Raises InputError for a target without a match."""
    for target in targets:
        name, parts = split_target(target)

        def on_output(linear):
            if parts and linear.out_features != 3 * linear.in_features:
                raise InputError(f"target '{target}': brackets are for a fused Wqkv")
            return IA3Linear(linear, rows=parts and rows_of(parts, linear.out_features))

        replace_linears(model, name, on_output)
    for target in feedforward_targets:
        replace_linears(model, target, lambda linear: IA3Linear(linear, feedforward=True))
