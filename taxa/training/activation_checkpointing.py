"""--activation-checkpointing: which activations a layer keeps for the backward, and which it computes again (torch's own machinery).

    none        all that autograd keeps
    selective   what matrix multiplications and attention give; the rest (LayerNorm, GELU, rotary, dropout, ...) is computed again
    full        the layer's input alone; the whole layer is computed again

Same numbers, dropout masks included: only memory and time change (docs/PERFORMANCE.md). The names follow torchtitan's.
"""

import functools

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

MODES = ("none", "selective", "full")
THIN = 64  # a product over fewer terms than this (LoRA's B) costs less to compute again than to keep
aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.linear.default: 0}  # which argument is the left factor
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
             "_scaled_dot_product_efficient_attention")


def policy(context, op, *args, **kwargs):
    """Keep what this operator gives, or compute it again? Called by torch for every operator in a layer's forward."""
    product = op in PRODUCTS and args[PRODUCTS[op]].shape[-1] >= THIN
    attention = op.name().removeprefix("aten::").partition(".")[0] in ATTENTION
    return CheckpointPolicy.MUST_SAVE if product or attention else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_layers(backbone, mode):
    """Make the layers of a backbone keep what `mode` says, in place. No parameter changes its name."""
    if mode == "none":
        return
    how = {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)} if mode == "selective" else {}
    for layer in backbone.encoder.layer:
        layer.forward = functools.partial(_forward, layer.forward, how)


def _forward(forward, how, *args):
    return checkpoint(forward, *args, use_reentrant=False, **how) if torch.is_grad_enabled() else forward(*args)
