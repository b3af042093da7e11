"""--precision: what the matrix products compute in. Weights, gradients and the optimizer stay float32."""

import contextlib

import torch

from taxa.cli import InputError

PRECISIONS = ("fp32", "tf32", "bf16")


def set_precision(precision, device):
    """fp32: products in full float32, as published. tf32: CUDA's 19-bit products. Raises InputError for tf32 without CUDA."""
    if precision == "tf32" and device.type != "cuda":
        raise InputError("--precision tf32 needs a CUDA device; on the CPU use fp32 or bf16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def autocast(device, precision):
    """The context in which the forward runs: bfloat16 autocast for bf16, nothing otherwise."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
