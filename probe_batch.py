"""The largest batch that a strategy can train with, the time per epoch, and where the memory goes.

  python probe_batch.py --model tiny-nt --strategy lora --r 4 --memory-limit 200MiB --steps 2
  python probe_batch.py --model nt50m --strategies all --memory-limit 80GiB --out probe.json
  python probe_batch.py --model nt50m --strategies all --batch-sizes 8 16 32      # no search
  python probe_batch.py --model nt50m --strategy full --activation-checkpointing none selective

The first is done in about a minute on two cores. The paper's procedure (Berman et al. 2025): start
at a batch of 4 and double until out of memory, with the learning rate scaled linearly with the
batch. Then follows what the paper did not do: bisection to the exact largest batch, to 2%. Every
size starts in a clean state (on the CPU a process of its own, on CUDA an emptied cache) with a
fresh model. It takes two whole optimizer steps before any is timed, so that AdamW's state is
allocated. A step is train.py's: forward, backward, clip, AdamW.

Memory and time do not depend on the values of the weights, so the backbone is random and nothing
is downloaded. The tokens are random too, or those of --data. --strategy random trains exactly what
full trains, so `all` leaves it out. Of several modes of --activation-checkpointing each strategy
is probed in each, and compared with full in the same mode: what a strategy saves differs.

--memory-limit: on CUDA, the share of the card that torch's allocator may use (the CUDA context
comes on top). On the CPU, what the process may allocate beyond Python and torch themselves; Linux
enforces it, so that the machine survives.

The table's columns: batch in sequences; lr; s/step, the median of --steps; s/epoch for --sequences;
peak GiB, on CUDA torch's own, on the CPU the growth of the resident memory; verdict.
"""

import functools
import importlib.util
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from taxa import PROTOCOLS, STUDY_CLASSES, STUDY_TRAINING_SEQUENCES
from taxa.backbones import FAMILIES, MODELS, get_model, table_name
from taxa.data.dataset import PreparedDataset
from taxa.errors import InputError, choose
from taxa.measure import memory
from taxa.measure.chart import draw_memory
from taxa.measure.isolation import GiB, in_child, limit_memory, on_cuda, peak_since, resident
from taxa.measure.step import build, random_batch, synchronize, training_step
from taxa.runtime.cli import Parser, byte_size, positive_int, run
from taxa.runtime.files import write_json
from taxa.runtime.precision import PRECISIONS, set_precision
from taxa.strategies import STRATEGIES
from taxa.study.published_runs import published_seconds
from taxa.training.activation_checkpointing import MODES
from taxa.training.settings import settings_from_flags

FIRST_BATCH = 4  # the paper's
TOLERANCE = 0.02  # of the largest batch
# Steps. The first allocates the optimizer's state, the second is the first whole one with it.
WARM_UP = 2
# Bytes that torch's profiler may take on the CPU, where it counts what the allocator hands out.
PROFILER = 2**29


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.group("what is trained")
    add("--model", required=True, type=table_name, metavar="NAME",
        help=f"one of {' '.join(MODELS)}")
    add("--strategy", "--strategies", required=True, nargs="+", metavar="NAME",
        help=f"of {' '.join(STRATEGIES)}; all: all but random")
    add("--r", "--lora-r", type=positive_int, nargs="+", default=[4],
        help="lora: ranks, each a run of its own (default 4)")
    add("--protocol", choices=PROTOCOLS, default="corrected",
        help="published: all as the published code did it (default corrected)")
    add("--weights", metavar="DIR",
        help="take the sizes from DIR/config.json (default: the model's row)")
    add = parser.group("what a batch is")
    add("--length", type=positive_int, metavar="TOKENS",
        help="of each random sequence (default: as many as 1500 bases make)")
    add("--data", metavar="DIR",
        help="prepared dataset: its training sequences instead of random tokens, its classes and "
        "its number")
    add("--sequences", type=positive_int, metavar="N",
        help=f"in an epoch (default {STUDY_TRAINING_SEQUENCES:,}, the study's, or --data's)")
    add = parser.group("the search")
    add("--memory-limit", type=byte_size, metavar="SIZE",
        help="such as 80GiB, 500MB (default: the card; on the CPU 80%% of what is free)")
    add("--batch-sizes", type=positive_int, nargs="+", metavar="B",
        help="measure these and search nothing")
    add("--max-batch", type=positive_int, metavar="B", help="look no further than this")
    add("--steps", type=positive_int, default=5, metavar="N",
        help="timed at each size, after two that are not (default 5)")
    add = parser.group("machine")
    add("--precision", choices=PRECISIONS, default="fp32",
        help="of matrix multiplications (default fp32; the published seconds compare with tf32: "
        "docs/PROTOCOL.md)")
    add("--activation-checkpointing", choices=MODES, nargs="+", default=["none"],
        help="train.py's flag; of several, each strategy is probed in each (default none)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="default auto: CUDA where there is one")
    add = parser.group("output")
    add("--out", metavar="FILE", help="write everything as one JSON document")
    add("--plot", metavar="FILE",
        help="bar chart of the memory by part (PNG, PDF or SVG; needs matplotlib: "
        "pip install '.[report]')")
    args = parser.parse_args(argv)

    if args.strategy == ["all"]:
        args.strategy = [name for name in STRATEGIES if name != "random"]
    for name in args.strategy:
        choose("strategy", name, STRATEGIES)
    if args.length and args.data:
        parser.error("--length is of random tokens; --data has lengths of its own")
    if args.batch_sizes and args.max_batch:
        parser.error("--batch-sizes searches nothing, so --max-batch has no meaning with it")
    if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
        parser.error(f"--plot {args.plot}: give a name that ends in .png, .pdf or .svg")
    # A file that cannot be written is said now, not after hours.
    for flag, path in (("--out", args.out), ("--plot", args.plot)):
        if path and Path(path).is_dir():
            parser.error(f"{flag} {path}: that is a folder")
        if path and not Path(path).resolve().parent.is_dir():
            parser.error(f"{flag} {path}: no such folder")

    row = get_model(args.model)
    args.length = args.length or FAMILIES[row.family].module.TOKENS_OF_1500_BP
    args.data = args.data and PreparedDataset(args.data)
    train = args.data and args.data.split("train", row.tokenizer)
    args.sequences = args.sequences or (len(train) if train else STUDY_TRAINING_SEQUENCES)
    return args


def runs_asked(args):
    """[(label, mode, settings)] in the order asked for.

    There is one per mode of checkpointing and strategy, and per r for lora.
    """
    runs = []
    for mode in args.activation_checkpointing:
        for strategy in args.strategy:
            for r in args.r if strategy == "lora" else [None]:
                settings = settings_from_flags(args.model, strategy, args.protocol, r=r)
                runs.append((f"lora r={r}" if r else strategy, mode, settings))
    return runs


def start(args, mode, settings, device, lr):
    """(model, optimizer, batch_of).

    batch_of(size, number) makes the number-th batch, random or of a shuffle of the training split.
    """
    row = get_model(args.model)
    data = args.data
    num_classes = data.num_classes if data else STUDY_CLASSES
    model, optimizer = build(args.model, settings, num_classes, device, lr, mode, args.weights)

    def batch_of(size, number=0):
        if not data:
            vocab_size = model.backbone.config.vocab_size
            return random_batch(vocab_size, num_classes.values(), size, args.length, device)
        split = data.split("train", row.tokenizer)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(number * size, (number + 1) * size) % len(split)
        batch = split[order[positions].tolist()]
        return tuple(batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))

    return model, optimizer, batch_of


def measure(args, mode, settings, device, batch_size, lr):
    """Seconds of each timed step and the peak memory in bytes, at one size.

    Raises what torch raises when memory runs out.
    """
    before = resident()
    model, optimizer, batch_of = start(args, mode, settings, device, lr)
    seconds = []
    for number in range(WARM_UP + args.steps):
        batch = batch_of(batch_size, number)
        synchronize(device)
        began = time.perf_counter()
        training_step(model, optimizer, batch, args.precision)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return {"step_s": seconds[WARM_UP:], "peak_bytes": peak_since(before, device)}


def account(args, mode, settings, device, batch_size):
    """Where the memory of a step at this size goes, as taxa.measure.memory.account() has it."""
    lr = get_model(args.model).learning_rate
    model, optimizer, batch_of = start(args, mode, settings, device, lr)
    batch = batch_of(batch_size)
    step = functools.partial(training_step, model, optimizer, batch, args.precision)
    for _ in range(WARM_UP):
        step()
    return {"batch": batch_size, **memory.account(device, model, optimizer, batch, step)}


def search(fits, largest=None):
    """Double from 4 until fits(batch) is false, then bisect.

    Returns (largest batch that fits, smallest seen that does not or None). The two are 2% apart, or
    neighbours. None: `largest` fits, and nothing above it was tried. (0, 1): not even one sequence
    fits.
    """
    good = 0
    bad = None
    batch = min(FIRST_BATCH, largest or FIRST_BATCH)
    while bad is None:
        if fits(batch):
            good = batch
            if batch == largest:
                return good, None
            batch = min(2 * batch, largest or 2 * batch)
        else:
            bad = batch
    while bad - good > max(1, TOLERANCE * good):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good, bad


def probe(args, label, mode, settings, device, isolated):
    """Measure one strategy; prints a line per size. Returns its part of the JSON document.

    isolated(work) -> result, or None when memory ran out.
    """
    row = get_model(args.model)
    sizes = {}

    def fits(batch):
        lr = row.learning_rate * batch / row.batch_size
        found = isolated(functools.partial(measure, args, mode, settings, device, batch, lr))
        entry = {"batch": batch, "lr": lr, "verdict": "fits" if found else "out of memory"}
        if found:
            step = statistics.median(found["step_s"])
            entry |= {
                "median_step_s": step,
                "sequences_per_s": batch / step,
                "epoch_s": step * math.ceil(args.sequences / batch),
                **found,
            }
        sizes[batch] = entry
        print(size_line(entry), flush=True)
        return bool(found)

    print(
        f"\n{args.model} {label}{with_mode(mode)}\n"
        f"{'batch':>7}{'lr':>11}{'s/step':>11}{'sequences/s':>13}{'s/epoch':>14}{'peak GiB':>10}"
        "  verdict",
        flush=True,
    )
    if args.batch_sizes:
        ceiling = max((batch for batch in args.batch_sizes if fits(batch)), default=0)
        above = None
    else:
        ceiling, above = search(fits, args.max_batch)
        tried = f"{above} does not fit" if above else "nothing larger was tried"
        print(f"largest batch {ceiling}; {tried}", flush=True)
    powers = [
        batch for batch, entry in sizes.items()
        if entry["verdict"] == "fits" and batch & (batch - 1) == 0
    ]
    return {
        "label": label,
        "strategy": settings["strategy"],
        "r": settings.get("r"),
        "activation_checkpointing": mode,
        "settings": settings,
        "ceiling": ceiling,
        "smallest_that_fails": above,
        "power_of_two": max(powers, default=None),
        "sizes": [sizes[batch] for batch in sorted(sizes)],
    }


def with_mode(mode):
    return "" if mode == "none" else f", {mode} checkpointing"


def size_line(entry):
    line = f"{entry['batch']:7d}{entry['lr']:11.3g}"
    if entry["verdict"] == "fits":
        line += (
            f"{entry['median_step_s']:11.4f}{entry['sequences_per_s']:13.2f}"
            f"{entry['epoch_s']:14,.0f}{entry['peak_bytes'] / GiB:10.3f}"
        )
    else:
        line += f"{'':>11}{'':>13}{'':>14}{'':>10}"
    return f"{line}  {entry['verdict']}"


def published_ratio(model, label):
    """Published seconds per epoch as ratios to full: "0.93", "1.06 to 1.21"; "-" without any."""
    seconds = published_seconds(model)
    return " to ".join(f"{s / seconds['full'][0]:.2f}" for s in seconds.get(label, ())) or "-"


def summary(args, runs):
    """A line per run: the largest batch, the largest power of two, and the time of an epoch there.

    The largest batch is the one that fits, or of those that were tried. Ratios are to full in the
    same mode.
    """
    fulls = {}  # {mode: its first run of full}
    for found in runs:
        if found["strategy"] in ("full", "random"):
            fulls.setdefault(found["activation_checkpointing"], found)
    header = (
        f"{'strategy':<12}{'checkpoints':<12}{'largest':>9}{'to full':>9}{'2^n':>7}{'s/epoch':>14}"
        f"{'to full':>9}  published to full"
    )
    lines = [header]
    for found in runs:
        mode = found["activation_checkpointing"]
        largest = found["ceiling"]
        seconds = epoch_seconds(found)
        full = fulls.get(mode)
        largest_ratio = _ratio(largest, full and full["ceiling"])
        seconds_ratio = _ratio(seconds, full and epoch_seconds(full))
        published = published_ratio(args.model, found["label"]) if mode == "none" else "-"
        lines.append(
            f"{found['label']:<12}{mode:<12}{largest:>9}{largest_ratio:>9}"
            f"{found['power_of_two'] or '-':>7}{f'{seconds:,.0f}' if seconds else '-':>14}"
            f"{seconds_ratio:>9}  {published}"
        )
    # --batch-sizes or --max-batch may have ended before the memory did.
    if not all(found["smallest_that_fails"] for found in runs):
        lines.append("largest: of the sizes that were tried; more may fit")
    return "\n".join(lines)


def epoch_seconds(found):
    """Seconds per epoch at the largest power of two, as the paper has them.

    Where no power of two was tried, they are those at the largest size that fits.
    """
    at = found["power_of_two"] or found["ceiling"]
    for entry in found["sizes"]:
        if entry["batch"] == at and entry["verdict"] == "fits":
            return entry["epoch_s"]
    return None


def _ratio(value, base):
    return f"{value / base:.2f}" if value and base else "-"


def common_batch(runs):
    """The largest batch that every strategy was seen to fit, or None."""
    sizes = [
        {entry["batch"] for entry in found["sizes"] if entry["verdict"] == "fits"}
        for found in runs
    ]
    return max(set.intersection(*sizes), default=None)


def main(argv=None):
    args = parse_args(argv)
    asked = runs_asked(args)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install '.[report]'")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")

    # Set the machine: device, precision, memory limit.
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    set_precision(args.precision, device)
    limit = limit_memory(args.memory_limit, device)

    def isolated(work, more=0):
        return on_cuda(work, device) if cuda else in_child(work, limit + more)

    if cuda:
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"
    if args.data:
        tokens = f"tokens of {args.data.folder}"
    else:
        tokens = f"{args.length} random tokens"
    print(
        f"{args.model} on {name}, torch {torch.__version__}, {args.precision}, {tokens}, "
        f"limit {limit / GiB:.2f} GiB, {args.sequences:,} sequences per epoch"
    )

    # Find the largest batch of each run, and time it.
    runs = [
        probe(args, label, mode, settings, device, isolated)
        for label, mode, settings in asked
    ]

    # Count the memory by part, at one size for all.
    batch = common_batch(runs)
    for (_, mode, settings), found in zip(asked, runs):
        work = functools.partial(account, args, mode, settings, device, batch)
        found["memory"] = batch and isolated(work, PROFILER)
    why = ""  # why there is no memory by part
    if not batch:
        why = "no batch that was tried fits every strategy"
    elif not all(found["memory"] for found in runs):
        why = f"counting the parts at batch {batch} takes more than the limit"

    # Print the tables.
    print(f"\n{summary(args, runs)}")
    if why:
        print(f"\nno memory by part: {why}", flush=True)
    else:
        for mode in args.activation_checkpointing:
            accounts = {
                found["label"]: found["memory"]
                for found in runs if found["activation_checkpointing"] == mode
            }
            print(f"\nbatch {batch}{with_mode(mode)}\n{memory.table(accounts)}", flush=True)

    # Write the document.
    if args.out:
        write_json(args.out, {
            "model": args.model,
            "device": name,
            "torch": torch.__version__,
            "precision": args.precision,
            "activation_checkpointing": args.activation_checkpointing,
            "date": time.strftime("%Y-%m-%d"),
            "command": ["probe_batch.py", *(sys.argv[1:] if argv is None else argv)],
            "length": None if args.data else args.length,
            "data": args.data and str(args.data.folder),
            "sequences": args.sequences,
            "memory_limit_bytes": limit,
            "activations": memory.ACTIVATIONS,
            "published_epoch_s": published_seconds(args.model),
            "runs": runs,
        })

    # Draw the chart.
    if args.plot:
        if why:
            raise InputError(f"--plot {args.plot}: {why}: nothing to draw")
        bars = {
            label + with_mode(mode): found["memory"]["parts"]
            for (label, mode, _), found in zip(asked, runs)
        }
        length = "" if args.data else f", {args.length} tokens"
        title = f"{args.model}, batch {batch}{length}, {args.precision}"
        draw_memory(bars, title, args.plot)
    return runs


if __name__ == "__main__":
    run(main)
