"""--activation-checkpointing: which activations a layer keeps, and which it computes again.

    none        all that autograd keeps
    selective   what matrix multiplications and attention give; the rest (LayerNorm, GELU, rotary,
                dropout, ...) is computed again
    full        the layer's input alone; the whole layer is computed again

The machinery is torch's own. The numbers are the same, dropout masks included: only memory and
time change (docs/PERFORMANCE.md). The names follow torchtitan's.
"""

import functools

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

MODES = ("none", "selective", "full")
# A product over fewer terms than this (LoRA's B) costs less to compute again than to keep.
THIN = 64

aten = torch.ops.aten
PRODUCTS = {  # operator -> which of its arguments is the left factor
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.bmm.default: 0,
    aten.linear.default: 0,
}
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
)


def policy(context, op, *args, **kwargs):
    """Keep what this operator gives, or compute it again?

    torch calls this for every operator in the forward of a layer.
    """
    product = op in PRODUCTS and args[PRODUCTS[op]].shape[-1] >= THIN
    attention = op.name().removeprefix("aten::").partition(".")[0] in ATTENTION
    keep = product or attention
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_layers(backbone, mode):
    """Make the layers of a backbone keep what `mode` says, in place.

    No parameter changes its name.
    """
    if mode == "none":
        return
    how = {}
    if mode == "selective":
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    for layer in backbone.encoder.layer:
        layer.forward = functools.partial(_forward, layer.forward, how)


def _forward(forward, how, *args):
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, **how)
