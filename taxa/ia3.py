"""(IA)3: a frozen network whose activations are rescaled by trained vectors (Liu et al. 2022, section 3.3).

    on an output:   y = l * (W x + b)        l (out,)
    on an input:    y = W (l * x) + b        l (in,)

Every l starts at one, so training starts from exactly the pretrained network. The authors scale keys, values, and the hidden layer of
the feed-forward (the input of its second projection). Where keys and values share one fused projection, Wqkv (3H, H), l covers only
their two thirds of its output: the target is written "Wqkv[key,value]". Example, nt50m: 512 + 512 + 2048 numbers in each of 12
layers, 36,864 in all.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from taxa.errors import InputError
from taxa.inject import plain_linear, replace_linears, share_linear

THIRDS = ("query", "key", "value")  # of the rows of a fused Wqkv


class Scale(torch.autograd.Function):
    """y = l * u. The gradient of l needs u; it is taken as y / l, since attention keeps y anyway, so that u need not be kept too.

    (An l of exactly 0 gets no gradient. They start at 1.)
    """

    @staticmethod
    def forward(ctx, u, l):
        y = (u * l).to(u.dtype)  # under bf16 autocast l stays float32: the product is rounded, not the vector
        ctx.save_for_backward(y, l)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y, l = ctx.saved_tensors
        du = (dy * l).to(dy.dtype) if ctx.needs_input_grad[0] else None
        dl = (dy * y).sum(dim=tuple(range(dy.dim() - 1)), dtype=l.dtype)
        return du, torch.where(l == 0, 0.0, dl / l)


class IA3Linear(nn.Linear):
    """An nn.Linear that keeps its weight and bias (the same tensors, under the same names) and adds ia3_l.

    feedforward=True scales the input, else the output; `rows` = (start, stop) limits the output's scaling to those features.
    """

    def __init__(self, linear, feedforward=False, rows=None):
        share_linear(self, linear)
        self.feedforward = feedforward
        self.rows = rows or (0, linear.out_features)
        size = linear.in_features if feedforward else self.rows[1] - self.rows[0]
        self.ia3_l = nn.Parameter(linear.weight.new_ones(size))

    def output_scale(self):
        """(out,): ia3_l at the scaled rows, one elsewhere."""
        start, stop = self.rows
        return F.pad(self.ia3_l, (start, self.out_features - stop), value=1.0)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if self.feedforward:
            return F.linear(x * self.ia3_l, self.weight, self.bias)
        return Scale.apply(F.linear(x, self.weight, self.bias), self.output_scale())

    @torch.no_grad()
    def merge(self):
        """Fold ia3_l into the weight (and, on an output, the bias), in place, and return it as a plain nn.Linear. One way: do it once."""
        if self.feedforward:
            self.weight *= self.ia3_l  # scales columns
        else:
            self.weight *= self.output_scale()[:, None]  # scales rows
            if self.bias is not None:
                self.bias *= self.output_scale()
        return plain_linear(self)

    def extra_repr(self):
        where = "input" if self.feedforward else f"output[{self.rows[0]}:{self.rows[1]}]"
        return f"{super().extra_repr()}, ia3_l on {where}"


def split_target(target):
    """"attention.self.Wqkv[key,value]" -> ("attention.self.Wqkv", ("key", "value")); without brackets -> (target, None)."""
    found = re.fullmatch(r"(.+)\[([a-z,]+)\]", target)
    if not found:
        return target, None
    names = tuple(found[2].split(","))
    if names not in {THIRDS[i:j] for i in range(3) for j in range(i + 1, 4)}:
        raise InputError(f"target '{target}': the brackets take neighbouring parts of {','.join(THIRDS)}, in that order")
    return found[1], names


def rows_of(parts, out_features):
    """(start, stop): the rows of a fused Wqkv with out_features = 3H that ("key", "value"), say, are."""
    third = out_features // 3
    return THIRDS.index(parts[0]) * third, (THIRDS.index(parts[-1]) + 1) * third


def inject_ia3(model, targets, feedforward_targets):
    """Put (IA)3 on the outputs of `targets` and the inputs of `feedforward_targets`. Raises InputError for a target without a match."""
    for target in targets:
        name, parts = split_target(target)

        def on_output(linear, parts=parts):
            if parts is None:
                return IA3Linear(linear)
            if linear.out_features != 3 * linear.in_features:
                raise InputError(f"target '{target}': brackets are for a fused Wqkv")
            return IA3Linear(linear, rows=rows_of(parts, linear.out_features))

        replace_linears(model, name, on_output)
    for target in feedforward_targets:
        replace_linears(model, target, lambda linear: IA3Linear(linear, feedforward=True))
