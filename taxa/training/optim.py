"""AdamW, and the cosine schedule of the learning rate, as Berman et al. 2025 trained.

AdamW's settings are the defaults of the HF Trainer, as is the clipping of gradients at norm 1. The
Trainer's default schedule is linear; the configuration class of the published code sets the cosine.
"""

import math

import torch
from torch import nn


def adamw(model, lr, weight_decay=0.0):
    """AdamW over the parameters of `model` that train: betas (0.9, 0.999), eps 1e-8.

    With weight decay there are two groups, decayed_names() and the rest; without it there is one,
    in the model's order. Fused: one pass over memory per parameter.
    """
    trains = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for _, p in trains]}]
    if weight_decay:
        decayed = decayed_names(model)
        groups = [
            {"params": [p for name, p in trains if name in decayed]},
            {"params": [p for name, p in trains if name not in decayed], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(
        groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True
    )


def decayed_names(model):
    """The names of the parameters that weight decay shrinks, as in the HF Trainer.

    Those are all but biases and the parameters of LayerNorms.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    of_norms = {id(p) for norm in norms for p in norm.parameters()}
    return {
        name
        for name, p in model.named_parameters()
        if id(p) not in of_norms and "bias" not in name.rpartition(".")[2]
    }


def warmup_steps_of(ratio, total_steps):
    """Optimizer steps of warm-up that are `ratio` of all, rounded up as the HF Trainer does."""
    return math.ceil(total_steps * ratio)


def cosine_lr(step, total_steps, lr, warmup_steps=0):
    """Learning rate of optimizer step `step`, which counts from 0.

    It rises from 0 in a line over the warm-up, then falls by half a cosine from lr to 0 at
    total_steps.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer, lr):
    """Give every group of parameters the learning rate of the step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
