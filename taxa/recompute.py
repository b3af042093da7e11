"""Keep less for the backward pass: what is cheap to compute again is not stored.

A Linear keeps its input for its weight's gradient. Where that input is itself a cheap function of something already kept (LayerNorm of
the residual stream, SwiGLU of the two halves of the feed-forward), the input need not be stored too:

    recomputed(swiglu, h, then=self.output.dense)      # = self.output.dense(swiglu(h)), keeping h alone

No matrix product is computed twice. Adapters need not know: where `then` saves the function's result, the backward computes it again. A
layer of nt50m so keeps 14 tensors of one (B, T, H) instead of 24; docs/PERFORMANCE.md counts them.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from taxa.runtime.precision import product_dtype


def recomputed(function, *inputs, then):
    """then(function(*inputs)), with the same gradients, but saving `inputs` for the backward in place of function's result.

    function: deterministic, tensors -> one tensor; its own gradient comes from autograd as ever. then: that tensor -> one tensor. Under
    autocast the result is cast once, before `then`. torch.compile decides itself what to compute again, so it sees the plain composition.
    """
    y = function(*inputs)
    y = y.to(product_dtype(y))
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return then(y)
    shelf = Shelf(function, y)
    with saved_tensors_hooks(shelf.pack, shelf.unpack):
        out = then(y)
    if not shelf.packed:
        return out
    kept = [tensor.detach() for tensor in (*shelf.others, *(inputs if shelf.asked else ()))]
    shelf.n, shelf.others = len(shelf.others), None
    return Keep.apply(shelf, kept, out)


def run_layers(layers, x, *args, whole):
    """Pass x through the layers, each called with (x, *args). whole: keep only a layer's input and run the layer again in the backward."""
    for layer in layers:
        x = checkpoint(layer, x, *args, use_reentrant=False) if whole and torch.is_grad_enabled() else layer(x, *args)
    return x


class Shelf:
    """What stands in for the tensors that `then` saves: a view of the function's result is noted, any other tensor numbered.

    The tensors themselves are with Keep, an ordinary autograd node, so that other saved-tensor hooks (a memory count, activation
    checkpointing) see them, and they are let go as soon as the last of them has been asked for.
    """

    def __init__(self, function, y):
        self.function, self.dtype, self.storage = function, y.dtype, y.untyped_storage().data_ptr()
        self.others, self.n, self.packed, self.asked = [], 0, 0, False

    def pack(self, tensor):
        self.packed += 1
        if tensor.untyped_storage().data_ptr() == self.storage:
            self.asked = True
            return tensor.shape, tensor.stride(), tensor.storage_offset()
        self.others.append(tensor)
        return len(self.others) - 1

    def open(self, kept):
        """kept: what Keep held, the other tensors first and then the inputs."""
        self.kept, self.y, self.left = kept, None, self.packed

    def unpack(self, packed):
        if isinstance(packed, int):
            tensor = self.kept[packed]
        else:
            if self.y is None:
                with torch.no_grad():
                    self.y = self.function(*self.kept[self.n:]).to(self.dtype)
            tensor = self.y.as_strided(*packed)
        self.left -= 1
        if self.left == 0:
            self.kept = self.y = None
        return tensor


class Keep(torch.autograd.Function):
    """The identity on `tensor`; saves `kept`, and gives it to the Shelf when the backward comes by."""

    @staticmethod
    def forward(ctx, shelf, kept, tensor):
        ctx.shelf = shelf
        ctx.save_for_backward(*kept)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        ctx.shelf.open(ctx.saved_tensors)
        return None, None, gradient


def gated(name, h):
    """act(gate) * value for h (..., 2I) = (gate, value) -> (..., I), act "silu" or "gelu"; saves h alone for the backward."""
    if torch.compiler.is_compiling():
        gate, value = h.chunk(2, dim=-1)
        return getattr(F, name)(gate) * value
    return Gated.apply(name, h)


class Gated(torch.autograd.Function):
    """Autograd alone would also save act(gate), and would join the gradients of the two halves by a copy."""

    @staticmethod
    def forward(ctx, name, h):
        ctx.name = name
        ctx.save_for_backward(h)
        gate, value = h.chunk(2, dim=-1)
        return getattr(F, name)(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (h,) = ctx.saved_tensors
        gate, value = h.chunk(2, dim=-1)
        dh = torch.empty_like(h)
        dgate, dvalue = dh.chunk(2, dim=-1)
        torch.mul(dy, getattr(F, ctx.name)(gate), out=dvalue)
        dgate.copy_(getattr(torch.ops.aten, ctx.name + "_backward")(dy * value, gate))  # one pass over act's derivative
        return None, dh


def dropout(p):
    """A function x -> dropout(x) with its mask drawn now: called again it drops the same elements, so the mask need not be kept.

    p: probability, rounded to a multiple of 2^-16. Drawn from torch's CPU generator by way of a seed, on whatever device x is. On a CPU the
    16 bits per element are far cheaper than torch's own bernoulli_ (docs/PERFORMANCE.md).
    """
    if torch.compiler.is_compiling():
        return lambda x: F.dropout(x, p)
    seed = int(torch.randint(2**62, (), device="cpu"))
    return lambda x: Dropout.apply(x, max(round(p * 2**16), 1), seed)


class Dropout(torch.autograd.Function):
    """x * mask / (1 - p) where p = dropped / 2^16; the backward draws the mask again."""

    @staticmethod
    def forward(ctx, x, dropped, seed):
        ctx.dropped, ctx.seed = dropped, seed
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)  # 4 numbers of 16 bits each
        words.random_(-2**63, None, generator=torch.Generator(x.device).manual_seed(seed))
        mask = words.view(torch.int16)[:x.numel()].view(x.shape) > dropped - 2**15 - 1
        return (x * mask).mul_(2**16 / max(2**16 - dropped, 1))

    @staticmethod
    def backward(ctx, dy):
        return Dropout.apply(dy, ctx.dropped, ctx.seed), None, None
