"""--precision and --compile.

--precision is the number format in which matrix multiplications compute; weights, gradients and the
optimizer stay float32.
"""

import contextlib

import torch

from taxa.errors import InputError

PRECISIONS = ("fp32", "tf32", "bf16")
COMPILE = ("layers", "model")


def set_precision(precision, device):
    """Switch tf32 on or off for matrix multiplications and convolutions.

    fp32: full float32. tf32: inputs are rounded to 19 bits, on CUDA only. Raises InputError for
    tf32 without CUDA.

    It is set either way, since TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment, as in
    NVIDIA's images, makes torch start with tf32.
    """
    if precision == "tf32" and device.type != "cuda":
        raise InputError("--precision tf32 needs a CUDA device; on the CPU use fp32 or bf16")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def precision_note(protocol, precision, device):
    """The line to print for a run in float32 on CUDA under the published protocol; else None.

    The published times were not those of plain float32.
    """
    if protocol != "published" or precision != "fp32" or device.type != "cuda":
        return None
    return (
        "--protocol published computes in float32, but the published times were not plain float32 "
        "(docs/PROTOCOL.md, Precision): compare seconds with --precision tf32"
    )


def autocast(device, precision):
    """The context in which the forward pass runs: bfloat16 autocast for bf16, else nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def product_dtype(x):
    """The dtype in which a matrix multiplication of x computes.

    It is autocast's inside autocast, else that of x.
    """
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def compile_in_place(model, layers, how, device):
    """torch.compile a model in place; no name changes. how, one of COMPILE:

        layers      Each layer by itself. Equal layers share one compilation, which starts in
                    seconds. A second batch shape is compiled for any shape, and nothing after it.
        model       The whole model as one graph. There are fewer launches, which small batches
                    need. It starts in half a minute.

    Raises InputError where there is nothing to compile with.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:  # what torch's compilers raise is derived from it
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"--compile: torch.compile does not work here ({first_line}); it needs a C++ compiler "
            "on the CPU and Triton on CUDA: install that, or leave out --compile"
        ) from None
    if how == "layers":
        for layer in layers:
            layer.compile(fullgraph=True)
    else:
        model.compile()
