"""--precision: what matrix multiplications compute in (weights, gradients and the optimizer stay float32); and --compile."""

import contextlib

import torch

from taxa.errors import InputError

PRECISIONS = ("fp32", "tf32", "bf16")
COMPILE = ("layers", "model")


def set_precision(precision, device):
    """fp32: full float32. tf32: inputs are rounded to 19 bits, on CUDA alone. Raises InputError for tf32 without CUDA.

    Set either way, since TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment, as in NVIDIA's images, makes torch start with tf32.
    """
    if precision == "tf32" and device.type != "cuda":
        raise InputError("--precision tf32 needs a CUDA device; on the CPU use fp32 or bf16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def precision_note(protocol, precision, device):
    """The line to print for a run in float32 on CUDA under the published protocol, whose times were not plain float32; else None."""
    if protocol != "published" or precision != "fp32" or device.type != "cuda":
        return None
    return ("--protocol published computes in float32, but the published times were not plain float32 (docs/PROTOCOL.md, Precision): "
            "compare seconds with --precision tf32")


def autocast(device, precision):
    """The context in which the forward runs: bfloat16 autocast for bf16, nothing otherwise."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def product_dtype(x):
    """The dtype in which a matrix multiplication of x computes: autocast's inside autocast, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def compile_in_place(model, layers, how, device):
    """torch.compile a model where it stands; no name changes. how, of COMPILE:

        layers      each layer by itself: equal layers share one compilation, which starts in seconds; a second shape of batch is compiled
                    for any shape, and nothing after it
        model       the whole model as one graph: fewer launches, which small batches need; starts in half a minute

    Raises InputError where there is nothing to compile with.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:  # what torch's compilers raise is derived from it
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--compile: torch.compile does not work here ({first}); it needs a C++ compiler on the CPU and Triton on "
                         "CUDA: install that, or leave out --compile") from None
    if how == "layers":
        for layer in layers:
            layer.compile(fullgraph=True)
    else:
        model.compile()
