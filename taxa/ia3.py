"""(IA)3: a frozen network whose activations trained vectors rescale (Liu et al. 2022, section 3.3).

    on an output:   y = l * (W x + b)        l (out,)
    on an input:    y = W (l * x) + b        l (in,)

Every l starts at one, so training starts from exactly the pretrained network. The authors scale
the keys, the values, and the hidden layer of the feed-forward (the input of its second projection).
A fused projection of queries, keys and values, Wqkv (3H, H), is scaled in two thirds of its output:
the target is written "Wqkv[key,value]". Example, nt50m: 512 + 512 + 2048 numbers in each of the
12 layers, 36,864 in all.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from taxa.errors import InputError
from taxa.inject import plain_linear, replace_linears, share_linear

THIRDS = ("query", "key", "value")  # of the rows of a fused Wqkv
NEIGHBOURS = {THIRDS[i:j] for i in range(3) for j in range(i + 1, 4)}  # what brackets may name


class IA3Linear(nn.Linear):
    """An nn.Linear with one more parameter, the vector ia3_l.

    The vector scales the input (feedforward=True), or the features `rows` = (start, stop) of the
    output, by default all. The weight and the bias stay the same tensors, under the same names.
    """

    adapter_parameters = ("ia3_l",)

    def __init__(self, linear, feedforward=False, rows=None):
        share_linear(self, linear)
        self.feedforward = feedforward
        self.rows = rows or (0, linear.out_features)
        start, stop = self.rows
        scaled = linear.in_features if feedforward else stop - start
        self.ia3_l = nn.Parameter(linear.weight.new_ones(scaled))

    def output_scale(self):
        """(out,): ia3_l at the scaled rows, one elsewhere."""
        start, stop = self.rows
        return F.pad(self.ia3_l, (start, self.out_features - stop), value=1.0)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if self.feedforward:
            return F.linear(self.ia3_l * x, self.weight, self.bias)
        y = F.linear(x, self.weight, self.bias)
        # Under bf16 autocast l stays float32: the product is rounded, not the vector.
        return (self.output_scale() * y).to(y.dtype)

    @torch.no_grad()
    def merge(self):
        """Fold ia3_l into the weight, in place, and return the layer as a plain nn.Linear.

        A vector on the output also goes into the bias. There is no way back: call it once.
        """
        if self.feedforward:
            self.weight *= self.ia3_l  # scales the columns
        else:
            self.weight *= self.output_scale()[:, None]  # scales the rows
            if self.bias is not None:
                self.bias *= self.output_scale()
        return plain_linear(self)


def split_target(target):
    """Return (module, parts): "layer.Wqkv[key,value]" -> ("layer.Wqkv", ("key", "value")).

    A target without brackets gives (target, None). Raises InputError for brackets that name
    anything but neighbouring thirds.
    """
    found = re.fullmatch(r"(.+)\[([a-z,]+)\]", target)
    if not found:
        return target, None
    module, parts = found[1], tuple(found[2].split(","))
    if parts not in NEIGHBOURS:
        raise InputError(
            f"target '{target}': the brackets take neighbouring parts of {','.join(THIRDS)}, "
            "in that order"
        )
    return module, parts


def rows_of(parts, out_features):
    """(start, stop): the rows of a fused Wqkv (out_features = 3H) that `parts` name."""
    first, last = THIRDS.index(parts[0]), THIRDS.index(parts[-1])
    return first * out_features // 3, (last + 1) * out_features // 3


def inject_ia3(model, targets, feedforward_targets):
    """Put (IA)3 on the outputs of `targets` and on the inputs of `feedforward_targets`.

    Raises InputError for a target that matches nothing, and for brackets on a Linear that is not
    fused.
    """
    for target in targets:
        name, parts = split_target(target)

        def on_output(linear):
            if parts and linear.out_features != 3 * linear.in_features:
                raise InputError(f"target '{target}': brackets are for a fused Wqkv")
            return IA3Linear(linear, rows=parts and rows_of(parts, linear.out_features))

        replace_linears(model, name, on_output)
    for target in feedforward_targets:
        replace_linears(model, target, lambda linear: IA3Linear(linear, feedforward=True))
