"""AdamW, and the cosine schedule of the learning rate (Berman et al. 2025 as its code has them: the HF Trainer's defaults)."""

import math

import torch


def adamw(parameters, lr, weight_decay=0.0):
    """AdamW over the parameters that train: betas (0.9, 0.999), eps 1e-8. Fused: one pass over memory per parameter."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True)


def cosine_lr(step, total_steps, lr, warmup_steps=0):
    """Learning rate of optimizer step `step` (from 0): linear warm-up from 0, then half a cosine from lr to 0 at total_steps."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress))
