"""Speed and memory on one GPU, in one command: no network, no data, under ten minutes, one JSON document.

  python benchmarks/gpu.py --out benchmarks/results/gpu.json            # one H100 or H200: eight or nine minutes
  python benchmarks/gpu.py --device cpu --tiny --out tiny.json     # every path at tiny sizes on a CPU: a few minutes

Cells, most wanted first: sequences/s of a whole training step (forward, backward, clip, AdamW) for each model, strategy and precision; the
largest batch under --memory-limit, to 2%; the same with benchmarks/peer.py, which does what the published code does; the same compiled.
Weights and tokens are random, the batch is the published one. The document is written again after every cell; what --minutes did not
allow (it limits when a cell begins: the last may end later), what ran out of memory and what failed is said in its place. Median of the
steps that fit into --seconds, at least 5, after 3 that do not count.

vs_published: our sequences/s by the published ones of full fine-tuning, per GPU (one H100, float32; DNABERT-2: 42 on four GPUs). mfu: model
FLOP utilisation, the operations of our own step (no unused head, no gradient that nothing needs) per second by the card's dense peak; the
same operations count for the peer. Its optimizer is ours too (fused AdamW), so that the two differ in the model alone;
benchmarks/step.py gives the peer torch.optim.AdamW as the HF Trainer had it.
"""

import gc
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import probe_batch  # noqa: E402
from taxa.backbones import get_model  # noqa: E402
from taxa.errors import InputError
from taxa.runtime.cli import Parser, byte_size, positive_float, run  # noqa: E402
from taxa.runtime.files import write_json  # noqa: E402
from taxa.runtime.precision import compile_in_place, set_precision  # noqa: E402
from taxa.strategies import settings_from_flags  # noqa: E402
from taxa.training.optim import adamw  # noqa: E402

STRATEGIES = ("full", "lora", "ia3", "freeze75")  # lora with its default r = 4
PUBLISHED = {"nt50m": 606.0, "nt100m": 343.0, "nt250m": 225.0, "dnabert2": 42.0 / 4}  # sequences/s per GPU, full (4.56 million / epoch_s)
AIMS = {("nt50m", "fp32"): 1.15, ("nt50m", "tf32"): 3, ("nt50m", "bf16"): 6, ("dnabert2", "fp32"): 20, ("dnabert2", "bf16"): 100}
# Dense peaks in FLOP/s of NVIDIA's data sheets (SXM): by a word of the card's name.
PEAKS = {"H100": {"fp32": 67e12, "tf32": 494e12, "bf16": 989e12}, "H200": {"fp32": 67e12, "tf32": 494e12, "bf16": 989e12},
         "A100": {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}}
EXPECTED_SECONDS = {"speed": 15, "ceiling": 75, "compiled": 90}  # a cell is not begun with less time left than this


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="the JSON document")
    add("--minutes", type=positive_float, default=8.0, help="no cell begins that is expected to end later (default 8)")
    add("--seconds", type=positive_float, default=2.0, help="time for the timed steps of a cell (default 2)")
    add("--memory-limit", type=byte_size, metavar="SIZE", help="for the ceilings (default 80GiB; with --tiny 100MiB)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    add("--tiny", action="store_true", help="the tiny models on short sequences: does everything run?")
    return parser.parse_args(argv)


def cells(tiny):
    """Every cell, most wanted first: dicts of kind, impl, model, strategy, precision, compile."""
    nt, more, dnabert = ("tiny-nt", (), "tiny-dnabert") if tiny else ("nt50m", ("nt100m", "nt250m"), "dnabert2")

    def make(kind, models, strategies, precisions, impls=("taxa",), compiled=False):
        return [dict(kind=kind, impl=impl, model=model, strategy=strategy, precision=precision, compile=compiled)
                for model, precision, impl, strategy in itertools.product(models, precisions, impls, strategies)]

    every, both = ("fp32", "tf32", "bf16"), ("taxa", "peer")
    wanted = (make("speed", [nt], STRATEGIES, ["fp32"]) + make("speed", [nt], ["full"], ["tf32", "bf16"])
              + make("speed", [dnabert], ["full"], ["fp32", "bf16"]) + make("speed", [nt], ["full"], ["fp32"], ["peer"])
              + make("ceiling", [nt], ["full"], ["fp32"], both) + make("ceiling", [nt], STRATEGIES[:0:-1], ["fp32"])
              + make("speed", [nt], STRATEGIES, every, both) + make("speed", [dnabert], STRATEGIES, every)
              + make("speed", more, ["full"], every, both) + make("speed", [nt, dnabert], ["full"], ["bf16", "tf32"], compiled=True)
              + make("speed", more, STRATEGIES, every, both) + make("ceiling", [nt], STRATEGIES[:0:-1], ["fp32"], ["peer"])
              + make("speed", [nt, dnabert, *more], STRATEGIES, every, compiled=True))
    return list({tuple(cell.items()): cell for cell in wanted}.values())  # each once, where it is first wanted


def operations(args, model, row, device):
    """Floating-point operations of one training step on one sequence, as torch counts them (matrix products and attention)."""
    input_ids, attention_mask, labels = random_batch(args, row, 1, device)
    with FlopCounterMode(display=False) as counter:
        probe_batch.sequence_losses(model(input_ids, attention_mask), labels).sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def build(args, cell, settings, device, lr):
    """(model, optimizer) of a cell: ours or the peer with the same strategy, compiled if asked for."""
    model, optimizer = probe_batch.build(args, settings, device, lr)
    if cell["impl"] == "peer":
        from peer import make_peer  # transformers' and PEFT's parts

        plain, _ = probe_batch.build(args, settings_from_flags(cell["model"], "full"), torch.device("cpu"), lr)
        model = make_peer(plain, settings).to(device)
        optimizer = adamw(model, lr)
    if cell["compile"]:
        model.compile(backend="eager") if args.tiny else compile_in_place(model, device)
    return model, optimizer


def speed(args, cell, settings, device):
    """{"sequences_per_s", ...} of whole training steps at the published batch."""
    row = get_model(cell["model"])
    batch_size = 2 if args.tiny else row.batch_size
    flops = operations(args, probe_batch.build(args, settings, device, row.learning_rate)[0], row, device)
    model, optimizer = build(args, cell, settings, device, row.learning_rate)
    batch = random_batch(args, row, batch_size, device)
    seconds, deadline = [], None
    while len(seconds) < 3 + 5 or time.perf_counter() < deadline:
        probe_batch.synchronize(device)
        start = time.perf_counter()
        probe_batch.training_step(args, model, optimizer, batch)
        probe_batch.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 3:
            deadline = time.perf_counter() + args.seconds
    median = statistics.median(seconds[3:])
    rate = batch_size / median
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peaks[cell["precision"]] for name, peaks in PEAKS.items() if name in card), None)
    published = PUBLISHED.get(cell["model"])
    return {"batch": batch_size, "tokens": args.length, "median_step_s": median, "fastest_s": min(seconds[3:]),
            "slowest_s": max(seconds[3:]), "steps": len(seconds) - 3, "sequences_per_s": rate,
            "vs_published": published and rate / published, "flops_per_sequence": flops, "mfu": peak and rate * flops / peak}


def random_batch(args, row, batch_size, device):
    """input_ids (B, T), attention_mask (B, T), labels (B, R) of random values, for ours and for the peer."""
    ids = torch.randint(5, 1000, (batch_size, args.length), device=device)
    return ids, torch.ones_like(ids), torch.randint(0, 4, (batch_size, 3), device=device)


def ceiling(args, cell, settings, device, limit, deadline):
    """{"ceiling", "smallest_that_fails"}: the largest batch whose whole steps fit into the limit, to 2%."""
    row = get_model(cell["model"])

    def three_steps(batch_size):
        model, optimizer = build(args, cell, settings, device, row.learning_rate)
        batch = random_batch(args, row, batch_size, device)
        for _ in range(3):
            probe_batch.training_step(args, model, optimizer, batch)
        probe_batch.synchronize(device)
        return {"done": True}

    def fits(batch_size):
        if time.perf_counter() > deadline:
            raise TimeoutError("--minutes were over before the search")
        work = lambda: three_steps(batch_size)  # noqa: E731  the two take a function of nothing
        return bool(probe_batch.on_cuda(work, device) if device.type == "cuda" else probe_batch.in_child(work, limit))

    good, bad = probe_batch.search(fits)
    return {"tokens": args.length, "limit_bytes": limit, "ceiling": good, "smallest_that_fails": bad}


def run_cell(args, cell, device, limit, deadline):
    """The cell with its result: "done" and numbers, or why there are none."""
    if cell["precision"] == "tf32" and device.type != "cuda":
        return cell | {"status": "not run: tf32 needs a CUDA device"}
    if time.perf_counter() + (0 if args.tiny else EXPECTED_SECONDS["compiled" if cell["compile"] else cell["kind"]]) > deadline:
        return cell | {"status": "not run: no time left"}
    family = get_model(cell["model"]).family
    args.length = 16 if args.tiny else probe_batch.LENGTH[family]
    if cell["kind"] == "ceiling" and args.tiny:
        args.length = 400  # so long that a few sequences fill the limit
    args.model, args.precision = cell["model"], cell["precision"]
    set_precision(cell["precision"], device)
    settings = settings_from_flags(cell["model"], cell["strategy"])
    try:
        if cell["kind"] == "ceiling":
            found = ceiling(args, cell, settings, device, limit, deadline)
        else:
            found = speed(args, cell, settings, device)
    except ImportError as error:
        return cell | {"status": f"not run: {error.name} is not installed"}
    except TimeoutError as error:
        return cell | {"status": f"not run: {error}"}
    except (InputError, RuntimeError) as error:  # a cell that breaks (a kernel that does not compile, say) leaves the others their turn
        return cell | {"status": "out of memory" if probe_batch.is_out_of_memory(error) else f"failed: {type(error).__name__}: {error}"}
    return cell | {"status": "done", **found}


def line(cell):
    """One cell as one line of the table."""
    what = (f"{cell['kind']:<8}{cell['impl']:<6}{cell['model']:<13}{cell['strategy']:<10}{cell['precision']:<6}"
            f"{'compiled' if cell['compile'] else '':<10}")
    if cell["status"] != "done":
        return what + cell["status"].splitlines()[0]
    if cell["kind"] == "ceiling":
        return what + f"largest batch {cell['ceiling']}, {cell['smallest_that_fails']} does not fit"
    aim = AIMS.get((cell["model"], cell["precision"])) if cell["strategy"] == "full" and cell["impl"] == "taxa" else None
    ratio = f"{cell['vs_published']:8.2f} x published full" if cell["vs_published"] else ""
    return (what + f"{cell['sequences_per_s']:9.1f} sequences/s{ratio}" + (f" (aim {aim})" if aim else "")
            + (f", {cell['mfu']:.0%} of peak" if cell["mfu"] else ""))


def main(argv=None):
    args = parse_args(argv)
    args.data = args.weights = args.recompute = None  # what probe_batch.build() reads besides
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no CUDA device here; --device cpu --tiny tries every path")
    if args.device == "cpu" and not args.tiny:
        raise InputError("on the CPU the full sizes take hours: add --tiny")
    if not Path(args.out).resolve().parent.is_dir():
        raise InputError(f"--out {args.out}: no such folder")
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    deadline = time.perf_counter() + 60 * args.minutes
    limit = args.memory_limit or (100 * 2**20 if args.tiny else 80 * 2**30)
    if device.type == "cuda" and not args.memory_limit:
        limit = min(limit, torch.cuda.get_device_properties(device).total_memory)
    probe_batch.limit_memory(limit, device)
    wanted = cells(args.tiny)
    # Ceilings of the CPU run in forked processes, which must come before this one has computed anything: they go first there.
    wanted = sorted(wanted, key=lambda cell: cell["kind"] != "ceiling") if device.type == "cpu" else wanted
    document = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "command": ["benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)],
        "minutes": args.minutes, "published_sequences_per_s_per_gpu": PUBLISHED,
        "aims": [{"model": model, "precision": precision, "vs_published": aim} for (model, precision), aim in AIMS.items()],
        "cells": [cell | {"status": "not run: not reached"} for cell in wanted]}
    for i, cell in enumerate(wanted):
        document["cells"][i] = run_cell(args, cell, device, limit, deadline)
        write_json(args.out, document)
        print(line(document["cells"][i]), flush=True)
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return document


if __name__ == "__main__":
    run(main)
