"""AdamW, and the cosine schedule of the learning rate (Berman et al. 2025 as its code has them: the HF Trainer's defaults)."""

import math

import torch
from torch import nn


def adamw(model, lr, weight_decay=0.0):
    """AdamW over the parameters of `model` that train: betas (0.9, 0.999), eps 1e-8. Fused: one pass over memory per parameter.

    With weight decay there are two groups, decayed_names() and the rest; without it one, in the model's order.
    """
    trains = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for _, p in trains]}]
    if weight_decay:
        decayed = decayed_names(model)
        groups = [{"params": [p for name, p in trains if name in decayed]},
                  {"params": [p for name, p in trains if name not in decayed], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True)


def decayed_names(model):
    """The names of the parameters that weight decay shrinks: all but biases and what LayerNorms hold, as in the HF Trainer."""
    of_norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) not in of_norms and "bias" not in name.rpartition(".")[2]}


def load_adamw(optimizer, saved, model):
    """Load the state_dict of an adamw() optimizer of the same model into `optimizer`.

    Saved by version 0.1.0 it has one group whatever the weight decay, which then covers every parameter: such a run goes on as it began.
    """
    if len(saved["param_groups"]) < len(optimizer.param_groups):
        optimizer.param_groups[:] = [{**optimizer.param_groups[0], "params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer.load_state_dict(saved)


def warmup_steps_of(ratio, total_steps):
    """Optimizer steps of warm-up that are `ratio` of all: rounded up, as the HF Trainer's warmup_ratio."""
    return math.ceil(total_steps * ratio)


def cosine_lr(step, total_steps, lr, warmup_steps=0):
    """Learning rate of optimizer step `step` (from 0): linear warm-up from 0, then half a cosine from lr to 0 at total_steps."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer, lr):
    """Give every group of parameters the learning rate of the step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
