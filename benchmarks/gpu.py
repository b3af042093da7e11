"""Speed and memory on one GPU, in one command: no network, no data, one JSON document.

  python benchmarks/gpu.py --out benchmarks/results/gpu.json      # one H100 or H200: six minutes
  python benchmarks/gpu.py --device cpu --tiny --out tiny.json    # every path on a CPU: minutes

The cells, most wanted first, have random weights and tokens at the published batch, no padding:

  product    what a lone matrix multiplication, and a lone attention, of the model's own shapes
             reach, forward and backward
  speed      sequences/s of a whole training step (forward, backward, clip, AdamW), eager or
             compiled, with or without activation checkpointing; impl peer is benchmarks/peer.py,
             what the published code does, and peer-sdpa the same with transformers' sdpa
  forward    sequences/s of the forward alone, as evaluate.py and predict.py have it
  ceiling    the largest batch under --memory-limit, predicted from the peaks of two sizes and
             tried on either side

The document is written again after every cell. Where --minutes did not allow a cell, where it ran
out of memory and where it failed, the document says so in its place. Times are the median of the
steps that fit into --seconds, at least 5, after 3 that do not count (first_step_s: the first of
them, with what compiling took).

product_share is the time that the step's products and attention would need at the lone rates, by
the time that the step took. vs_published is our sequences/s by the published ones of full
fine-tuning, per GPU (one H100, most likely in TF32: docs/PROTOCOL.md; DNABERT-2: 42 on four).
"""

import functools
import gc
import itertools
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn

from taxa import STUDY_CLASSES
from taxa.backbones import FAMILIES, get_model
from taxa.errors import InputError
from taxa.measure import flops
from taxa.measure.isolation import is_out_of_memory, limit_memory, on_cuda
from taxa.measure.step import build, random_batch, synchronize, training_step
from taxa.runtime.cli import Parser, byte_size, positive_float, run
from taxa.runtime.files import write_json
from taxa.runtime.precision import autocast, compile_in_place, set_precision
from taxa.strategies import trainable_names
from taxa.training.optim import adamw
from taxa.training.settings import settings_from_flags

STRATEGIES = ("full", "lora", "ia3", "freeze75")  # lora with its default r = 4
# sequences/s per GPU of full fine-tuning (the supplement)
PUBLISHED = {"nt50m": 606.0, "nt100m": 343.0, "nt250m": 225.0, "dnabert2": 42.0 / 4}
# No cell begins with less time left.
EXPECTED_SECONDS = {"product": 3, "speed": 6, "forward": 4, "ceiling": 12, "compiled": 30}
WARM_UP = 3  # steps


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="the JSON document")
    add("--minutes", type=positive_float, default=6.5,
        help="no cell begins that is expected to end later (default 6.5)")
    add("--seconds", type=positive_float, default=1.0,
        help="time for the timed steps of a cell (default 1)")
    add("--memory-limit", type=byte_size, metavar="SIZE", help="for the ceilings (default 80GiB)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    add("--tiny", action="store_true",
        help="the tiny models on short sequences: does everything run?")
    return parser.parse_args(argv)


def cells(tiny):
    """Every cell, most wanted first.

    A cell is a dict of kind, impl, model, strategy, precision, compile, activation_checkpointing.
    """
    nt, dnabert, more = "nt50m", "dnabert2", ("nt100m", "nt250m")
    if tiny:
        nt, dnabert, more = "tiny-nt", "tiny-dnabert", ()

    def make(kind, models, strategies=("full",), precisions=("bf16",), *,
             impls=("taxa",), compiled=(None,), modes=("none",)):
        combinations = itertools.product(models, precisions, impls, compiled, modes, strategies)
        return [
            {
                "kind": kind,
                "impl": impl,
                "model": model,
                "strategy": strategy,
                "precision": precision,
                "compile": how,
                "activation_checkpointing": mode,
            }
            for model, precision, impl, how, mode, strategy in combinations
        ]

    speed = functools.partial(make, "speed")
    every = ("fp32", "tf32", "bf16")
    others = ("fp32", "tf32")
    adapted = STRATEGIES[1:]
    layers = {"compiled": ["layers"]}
    wanted = [
        *make("product", [nt, dnabert], precisions=every),
        *speed([nt], precisions=every),
        *speed([nt], adapted),
        *speed([dnabert], ["full", "lora"]),
        *speed([nt], STRATEGIES, **layers),
        *speed([nt], precisions=every, impls=["peer", "peer-sdpa"]),
        *speed(more),
        *speed(more, **layers),
        *speed([nt], STRATEGIES, modes=["selective", "full"]),
        *speed([nt], **layers, modes=["selective"]),
        *speed([dnabert], compiled=["layers", "model", "cudagraphs"]),
        *speed([dnabert], ["lora"], compiled=["model"]),
        *make("forward", [nt, dnabert]),
        *make("ceiling", [nt], STRATEGIES),
        *make("ceiling", [nt], ["full", "lora"], modes=["selective", "full"]),
        *speed([nt], adapted, others),
        *speed([dnabert], ["full", "lora"], others),
        *speed([nt], adapted, impls=["peer"]),
        *speed([dnabert], ["ia3", "freeze75"]),
        *speed(more, adapted),
        *speed(more, ["full"], others),
        *speed(more, impls=["peer"]),
        *speed([nt], ["full"], ["tf32"], **layers),
        *speed(more, adapted, **layers),
    ]
    # each once, where it is first wanted
    return list({tuple(cell.items()): cell for cell in wanted}.values())


def shape(cell, tiny):
    """(batch size, tokens) of a cell."""
    row = get_model(cell["model"])
    if tiny:
        return 2, 16
    return row.batch_size, FAMILIES[row.family].module.TOKENS_OF_1500_BP


def made(cell, device):
    """(model, optimizer) of a cell: ours, or the peer with the same strategy; compiled if asked."""
    settings = settings_from_flags(cell["model"], cell["strategy"])
    lr = get_model(cell["model"]).learning_rate
    mode = cell["activation_checkpointing"]
    model, optimizer = build(cell["model"], settings, STUDY_CLASSES, device, lr, mode)
    if cell["impl"] != "taxa":
        from peer import make_peer  # transformers' and PEFT's parts

        full = settings_from_flags(cell["model"], "full")
        plain, _ = build(cell["model"], full, STUDY_CLASSES, torch.device("cpu"), lr)
        attention = "sdpa" if cell["impl"] == "peer-sdpa" else "eager"
        model = make_peer(plain, settings, attention).to(device)
        optimizer = adamw(model, lr)
    if cell["compile"] == "cudagraphs":
        # One recording for each shape of batch, so train.py, whose shapes vary, does not offer it.
        model.compile(mode="reduce-overhead")
    elif cell["compile"]:
        compile_in_place(model, model.backbone.encoder.layer, cell["compile"], device)
    return model, optimizer


def batch_of(cell, batch_size, tokens, device):
    """A random batch without padding.

    Its attention_mask is None, as train.py's is where nothing is padding, but for the peer, which
    needs one.
    """
    classes = list(STUDY_CLASSES.values())
    ids, mask, labels = random_batch(1000, classes, batch_size, tokens, device)
    return ids, (None if cell["impl"] == "taxa" else mask), labels


def median_seconds(step, seconds, device):
    """Seconds of step(): median, fastest, slowest, number of calls, and seconds of the first."""

    def timed():
        start = time.perf_counter()
        step()
        synchronize(device)
        return time.perf_counter() - start

    first = timed()
    for _ in range(WARM_UP - 1):
        step()
    synchronize(device)
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        times.append(timed())
    return {
        "median_step_s": statistics.median(times),
        "fastest_s": min(times),
        "slowest_s": max(times),
        "steps": len(times),
        "first_step_s": first,
    }


def product(args, cell, device):
    """FLOP/s of the Linears of one layer, and of its attention, each alone, forward and backward.

    The Linears' products count by their work.
    """
    full = settings_from_flags(cell["model"], "full")
    model, _ = build(cell["model"], full, STUDY_CLASSES, torch.device("cpu"), 1e-4)
    backbone = model.backbone
    linears = Counter(
        (module.in_features, module.out_features)
        for module in backbone.encoder.layer[0].modules()
        if isinstance(module, nn.Linear)
    )
    B, T = shape(cell, args.tiny)
    rows = B * T
    dtype = torch.bfloat16 if cell["precision"] == "bf16" else torch.float32

    def draw(*size, **more):
        return torch.randn(size, device=device, dtype=dtype, **more)

    work = 0
    seconds = 0.0
    for (n, m), count in linears.items():
        x, w, dy = draw(rows, n), draw(m, n), draw(rows, m)
        products = (
            lambda: x @ w.t(),  # forward
            lambda: dy @ w,  # gradient of the input
            lambda: dy.t() @ x,  # gradient of the weight
        )
        for multiply in products:
            found = median_seconds(multiply, args.seconds / 20, device)
            seconds += count * found["median_step_s"]
            work += count * 2 * rows * n * m

    heads = backbone.config.num_attention_heads
    H = backbone.config.hidden_size
    q, k, v = (draw(B, heads, T, H // heads, requires_grad=True) for _ in range(3))
    dy = torch.randn_like(q)

    def attention():
        F.scaled_dot_product_attention(q, k, v).backward(dy)

    found = median_seconds(attention, args.seconds / 10, device)
    return {
        "batch": B,
        "tokens": T,
        "flops_per_s": work / seconds,
        "shapes": [list(pair) for pair in linears],
        "attention_flops_per_s": 12 * B * T * T * H / found["median_step_s"],
    }


def seconds_at_lone_rates(cell, model, tokens, lone):
    """Seconds that the products and the attention of one sequence would need. lone: product()."""
    names = trainable_names(model, settings_from_flags(cell["model"], cell["strategy"]))
    parts = flops.parts(model, get_model(cell["model"]).family, names, tokens)
    attention = sum(part.step for part in parts if part.name.endswith("attention.self"))
    products = sum(part.step for part in parts) - attention
    return attention / lone["attention_flops_per_s"] + products / lone["flops_per_s"]


def speed(args, cell, device, rates):
    """{"sequences_per_s", ...} of whole training steps at the published batch.

    rates: {(model, precision): product()}.
    """
    batch_size, T = shape(cell, args.tiny)
    model, optimizer = made(cell, device)
    batch = batch_of(cell, batch_size, T, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = functools.partial(training_step, model, optimizer, batch, cell["precision"])
    found = median_seconds(step, args.seconds, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    rate = batch_size / found["median_step_s"]
    measured = cell["model"] in ("dnabert2", "tiny-dnabert", "tiny-nt")  # else nt50m stands for it
    lone = rates.get((cell["model"] if measured else "nt50m", cell["precision"]))
    share = None
    if cell["impl"] == "taxa" and lone:
        share = seconds_at_lone_rates(cell, model, T, lone) * rate
    published = PUBLISHED.get(cell["model"])
    return {
        "batch": batch_size,
        "tokens": T,
        **found,
        "sequences_per_s": rate,
        "vs_published": published and rate / published,
        "product_share": share,
        "peak_bytes": peak,
    }


def forward(args, cell, device):
    """{"sequences_per_s"} of the forward alone at four times the training batch, no graph."""
    batch_size, T = shape(cell, args.tiny)
    batch_size *= 4
    model, _ = made(cell, device)
    ids, mask, _ = batch_of(cell, batch_size, T, device)

    @torch.no_grad()
    def step():
        with autocast(device, cell["precision"]):
            model.eval()(ids, mask)

    found = median_seconds(step, args.seconds, device)
    rate = batch_size / found["median_step_s"]
    return {"batch": batch_size, "tokens": T, **found, "sequences_per_s": rate}


def ceiling(args, cell, device, limit):
    """{"ceiling", "smallest_that_fails"}: predicted from the peaks of two sizes, then tried.

    The two are 3% of the prediction apart. "ceiling" is None where the size below the prediction
    does not fit, "smallest_that_fails" where the size above it fits.
    """
    if device.type != "cuda":
        raise NotImplementedError("ceilings need torch's own count of CUDA memory; "
                                  "probe_batch.py measures them on a CPU")
    T = shape(cell, args.tiny)[1]

    def peak(batch_size):
        def work():
            model, optimizer = made(cell, device)
            batch = batch_of(cell, batch_size, T, device)
            for _ in range(2):
                training_step(model, optimizer, batch, cell["precision"])
            synchronize(device)
            return torch.cuda.max_memory_allocated(device)

        return on_cuda(work, device)

    small = peak(64)
    bytes_per_sequence = (peak(128) - small) / 64
    predicted = int((limit - small) / bytes_per_sequence + 64)
    fits = int(predicted * 0.985)
    fails = int(predicted * 1.015)
    return {
        "tokens": T,
        "limit_bytes": limit,
        "predicted": predicted,
        "bytes_per_sequence": bytes_per_sequence,
        "ceiling": fits if peak(fits) else None,
        "smallest_that_fails": None if peak(fails) else fails,
    }


def run_cell(args, cell, device, limit, deadline, rates):
    """The cell with its result: "done" and numbers, or why there are none."""
    if device.type != "cuda" and (cell["precision"] == "tf32" or cell["compile"] == "cudagraphs"):
        return cell | {"status": "not run: needs a CUDA device"}
    slow = cell["compile"] in ("model", "cudagraphs")
    expected = EXPECTED_SECONDS["compiled" if slow else cell["kind"]]
    if time.perf_counter() + (0 if args.tiny else expected) > deadline:
        return cell | {"status": "not run: no time left"}
    set_precision(cell["precision"], device)
    try:
        if cell["kind"] == "product":
            found = rates[cell["model"], cell["precision"]] = product(args, cell, device)
        elif cell["kind"] == "ceiling":
            found = ceiling(args, cell, device, limit)
        elif cell["kind"] == "forward":
            found = forward(args, cell, device)
        else:
            found = speed(args, cell, device, rates)
    except ImportError as error:
        return cell | {"status": f"not run: {error.name} is not installed"}
    except NotImplementedError as error:
        return cell | {"status": f"not run: {error}"}
    except (InputError, RuntimeError, ValueError) as error:
        # A cell that breaks, in a compiler say, leaves the others their turn.
        if is_out_of_memory(error):
            return cell | {"status": "out of memory"}
        return cell | {"status": f"failed: {type(error).__name__}: {error}"}
    return cell | {"status": "done", **found}


def line(cell):
    """One cell as one line of the table."""
    how = f"compile {cell['compile']}" if cell["compile"] else ""
    mode = cell["activation_checkpointing"]
    mode = "" if mode == "none" else f"{mode} checkpointing"
    what = (f"{cell['kind']:<8}{cell['impl']:<10}{cell['model']:<13}{cell['strategy']:<10}"
            f"{cell['precision']:<6}{how:<20}{mode:<24}")
    if cell["status"] != "done":
        return what + cell["status"].splitlines()[0]
    if cell["kind"] == "product":
        return (f"{what}{cell['flops_per_s'] / 1e12:8.1f} TFLOP/s in products, "
                f"{cell['attention_flops_per_s'] / 1e12:.1f} in attention")
    if cell["kind"] == "ceiling":
        return (f"{what}largest batch {cell['ceiling']}, "
                f"{cell['smallest_that_fails']} does not fit")
    rate = f"{cell['sequences_per_s']:9.1f} sequences/s"
    if cell.get("vs_published"):
        rate += f" ({cell['vs_published']:.2f} x published full)"
    if cell.get("product_share"):
        rate += f", products alone {cell['product_share']:.0%}"
    if cell.get("peak_bytes"):
        rate += f", peak {cell['peak_bytes'] / 1e9:.1f} GB"
    return f"{what}{rate}, first step {cell['first_step_s']:.1f} s"


def main(argv=None):
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no CUDA device here; --device cpu --tiny tries every path")
    if args.device == "cpu" and not args.tiny:
        raise InputError("on the CPU the full sizes take hours: add --tiny")
    if not Path(args.out).resolve().parent.is_dir():
        raise InputError(f"--out {args.out}: no such folder")
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    deadline = time.perf_counter() + 60 * args.minutes
    limit = None
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        limit = args.memory_limit or min(80 * 2**30, total)
        limit_memory(limit, device)
    wanted = cells(args.tiny)
    document = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": ["benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)],
        "published_sequences_per_s_per_gpu": PUBLISHED,
        "cells": [cell | {"status": "not run: not reached"} for cell in wanted],
    }
    rates = {}  # {(model, precision): product()}
    for i, cell in enumerate(wanted):
        document["cells"][i] = run_cell(args, cell, device, limit, deadline, rates)
        write_json(args.out, document)
        print(line(document["cells"][i]), flush=True)
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return document


if __name__ == "__main__":
    run(main)
