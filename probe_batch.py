"""The largest batch that a strategy can train with, the time per epoch at each size, and where the memory goes.

  python probe_batch.py --model tiny-nt --strategy lora --r 4 --memory-limit 200MiB --steps 2
  python probe_batch.py --model nt50m --strategies all --memory-limit 80GiB --out probe.json --plot memory.png
  python probe_batch.py --model nt50m --strategies all --batch-sizes 8 --plot memory.png      # these sizes only, no search

The first is done in about a minute on two cores. The paper's procedure (Berman et al. 2025): start at a batch of 4 and double until out of
memory, with the learning rate scaled linearly with the batch. Then, which the paper did not do: bisection to the exact ceiling, to
2%. Every size starts in a clean state (on the CPU a process of its own, on CUDA an emptied cache) with a fresh model, and takes two
whole optimizer steps before any is timed, so that AdamW's state is allocated. A step is train.py's: forward, backward, clip, AdamW.

Memory and time do not depend on the values of the weights, so the backbone is random and nothing is downloaded; the tokens are random
too, or those of --data. --strategy random trains exactly what full trains, so `all` leaves it out.

--memory-limit: on CUDA the share of the card that torch's allocator may use (the CUDA context comes on top); on the CPU what the process
may allocate beyond Python and torch themselves, enforced by Linux, so that the machine survives.

The table's columns: batch in sequences; lr; s/step, the median of --steps; s/epoch for --sequences; peak GiB, on CUDA torch's own, on the
CPU the growth of the resident memory; verdict.
"""

import gc
import importlib.util
import json
import math
import multiprocessing
import platform
import resource
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch

from taxa import STUDY_CLASSES, STUDY_TRAINING_SEQUENCES
from taxa.backbones import MODELS, get_model, load_backbone, table_name
from taxa.data.dataset import PreparedDataset
from taxa.errors import InputError, choose
from taxa.measure.memory import ACTIVATIONS, PARTS, allocator_peak, step_memory
from taxa.model import TaxonClassifier, sequence_losses
from taxa.runtime.cli import Parser, byte_size, positive_int, run
from taxa.runtime.files import replacing, write_json
from taxa.runtime.precision import PRECISIONS, autocast, set_precision
from taxa.strategies import PROTOCOLS, STRATEGIES, inject, settings_from_flags, train_only, trainable_names
from taxa.training.optim import adamw

FIRST_BATCH = 4  # the paper's
TOLERANCE = 0.02  # of the ceiling
WARM_UP = 2  # steps: the first allocates the optimizer's state, the second is the first whole one with it
LENGTH = {"nt": 251, "dnabert": 300}  # tokens of 1500 bp: 250 6-mers and CLS; about 300 byte pairs
GiB = 2**30
PROFILER = 2**29  # bytes that torch's profiler may take on the CPU, where it counts what the allocator hands out

# Mean seconds per epoch of the study's runs on all data (supplement of Berman et al. 2025): one H100 for nt, four for DNABERT.
# nt50m with r = 4 was run at two learning rates.
PUBLISHED_SECONDS = {
    "nt50m": {"full": (7527.8,), "lora r=1": (6991.4,), "lora r=4": (7980.8, 9140.0), "lora r=20": (9211.6,), "ia3": (6800.0,),
              "freeze75": (5084.4,)},
    "nt100m": {"full": (13292.0,), "lora r=1": (12370.8,), "ia3": (11972.2,), "freeze75": (7509.0,)},
    "nt250m": {"full": (20258.2,), "lora r=1": (17781.0,), "ia3": (17282.6,), "freeze75": (10383.2,)},
    "dnabert2": {"full": (107615.4,), "lora r=1": (104616.2,), "ia3": (104464.6,), "freeze75": (66250.0,)},
    "dnaberts": {"full": (107713.8,), "lora r=1": (104727.0,), "ia3": (106360.6,), "freeze75": (66264.6,)},
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.group("what is trained")
    add("--model", required=True, type=table_name, metavar="NAME", help=f"one of {' '.join(MODELS)}")
    add("--strategy", "--strategies", required=True, nargs="+", metavar="NAME", help=f"of {' '.join(STRATEGIES)}; all: all but random")
    add("--r", "--lora-r", type=positive_int, nargs="+", default=[4], help="lora: ranks, each a run of its own (default 4)")
    add("--protocol", choices=PROTOCOLS, default="corrected", help="published: all as the published code did it (default corrected)")
    add("--weights", metavar="DIR", help="take the sizes from DIR/config.json (default: the model's row)")
    add = parser.group("what a batch is")
    add("--length", type=positive_int, metavar="TOKENS", help="of each random sequence (default 251 for nt, 300 for DNABERT)")
    add("--data", metavar="DIR", help="prepared dataset: its training sequences instead of random tokens, its classes and its number")
    add("--sequences", type=positive_int, metavar="N",
        help=f"in an epoch (default {STUDY_TRAINING_SEQUENCES:,}, the study's, or --data's)")
    add = parser.group("the search")
    add("--memory-limit", type=byte_size, metavar="SIZE", help="such as 80GiB, 500MB (default: the card; on the CPU 80%% of what is free)")
    add("--batch-sizes", type=positive_int, nargs="+", metavar="B", help="measure these and search nothing")
    add("--max-batch", type=positive_int, metavar="B", help="look no further than this")
    add("--steps", type=positive_int, default=5, metavar="N", help="timed at each size, after two that are not (default 5)")
    add = parser.group("machine")
    add("--precision", choices=PRECISIONS, default="fp32", help="of matrix products (default fp32, as published)")
    add("--recompute", action="store_true", help="keep only each layer's input for the backward, as train.py's flag does")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto: CUDA where there is one")
    add = parser.group("output")
    add("--out", metavar="FILE", help="write everything as one JSON document")
    add("--plot", metavar="FILE", help="bar chart of the memory by part (PNG, PDF or SVG; needs matplotlib: pip install '.[report]')")
    args = parser.parse_args(argv)

    row = get_model(args.model)
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
    for flag, path in (("--out", args.out), ("--plot", args.plot)):  # said now, not after hours
        if path and (Path(path).is_dir() or not Path(path).resolve().parent.is_dir()):
            parser.error(f"{flag} {path}: {'that is a folder' if Path(path).is_dir() else 'no such folder'}")
    args.length = args.length or LENGTH[row.family]
    args.data = args.data and PreparedDataset(args.data)
    train = args.data and args.data.split("train", row.tokenizer)
    args.sequences = args.sequences or (len(train) if train else STUDY_TRAINING_SEQUENCES)
    return args


def strategy_runs(args):
    """[(label, settings)] in the order asked for: one per strategy, and per r for lora."""
    runs = []
    for strategy in args.strategy:
        for r in args.r if strategy == "lora" else [None]:
            runs.append((f"lora r={r}" if r else strategy, settings_from_flags(args.model, strategy, args.protocol, r=r)))
    return runs


def build(args, settings, device, lr):
    """The model in train mode and its optimizer, as train.py makes them: load, inject, freeze, optimizer."""
    torch.manual_seed(0)
    backbone = load_backbone(args.model, args.weights, pretrained=False)
    backbone.recompute = args.recompute
    model = TaxonClassifier(backbone, args.data.num_classes if args.data else STUDY_CLASSES)
    inject(model, settings)
    train_only(model, trainable_names(model, settings))
    model.to(device).train()
    return model, adamw(model, lr)


def make_batch(args, model, batch_size, device, number=0):
    """input_ids (B, T), attention_mask (B, T), labels (B, R): random, or the `number`-th batch of a shuffle of the training split."""
    if args.data:
        split = args.data.split("train", get_model(args.model).tokenizer)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        start = number * batch_size
        batch = split[order[torch.arange(start, start + batch_size) % len(split)].tolist()]
        return tuple(batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
    ids = torch.randint(5, model.backbone.config.vocab_size, (batch_size, args.length), device=device)
    labels = [torch.randint(0, head.out_features, (batch_size,), device=device) for head in model.heads.values()]
    return ids, torch.ones_like(ids), torch.stack(labels, dim=1)


def training_step(args, model, optimizer, batch):
    """One step of train.py on one process."""
    input_ids, attention_mask, labels = batch
    with autocast(input_ids.device, args.precision):
        logits = model(input_ids, attention_mask)
    (sequence_losses(logits, labels).sum() / len(labels)).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(args, settings, device, batch_size, lr):
    """Seconds of each timed step and the peak memory in bytes, at one size. Raises what torch raises when memory runs out."""
    before = resident() if device.type == "cpu" else None
    model, optimizer = build(args, settings, device, lr)
    seconds = []
    for number in range(WARM_UP + args.steps):
        batch = make_batch(args, model, batch_size, device, number)
        synchronize(device)
        start = time.perf_counter()
        training_step(args, model, optimizer, batch)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        after = resident()
        peak = after["VmHWM"] - before["VmHWM"] - (after["RssFile"] - before["RssFile"])  # less the code that was paged in
    return {"step_s": seconds[WARM_UP:], "peak_bytes": peak}


def account(args, settings, device, batch_size, lr):
    """step_memory() of a step at this size, and the allocator's own peak beside it."""
    model, optimizer = build(args, settings, device, lr)
    batch = make_batch(args, model, batch_size, device)
    for _ in range(WARM_UP):
        training_step(args, model, optimizer, batch)
    found = step_memory(model, optimizer, batch, lambda: training_step(args, model, optimizer, batch))
    own = allocator_peak(device, found["resident"], lambda: training_step(args, model, optimizer, batch))
    return {"batch": batch_size, **found, "allocator_peak": own}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident():
    """What Linux says of this process's memory, in bytes: VmData may be written, VmHWM is the most ever in RAM, RssFile is of files."""
    with open("/proc/self/status", encoding="ascii") as file:
        return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in file if line.endswith("kB\n")}


def is_out_of_memory(error):
    """Is this torch's way, or Python's, to say that memory ran out? Any other error is not ours to catch."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    told = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)


def on_cuda(work, device):
    """work() in an emptied cache. Returns its result, or None when memory ran out."""
    result = None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        result = work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return result


def in_child(work, limit):
    """work() in a forked process that may allocate `limit` bytes more. Returns its result, a plain dict, or None when memory ran out.

    Any other error of the child is raised here, with the child's traceback; it never outlives this call.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, work, limit))
    child.start()
    sender.close()
    try:
        answer = json.loads(receiver.recv_bytes())
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGKILL:
            raise InputError("the system ended the probe's process, most likely for want of memory: give a lower --memory-limit") from None
        raise RuntimeError(f"the probe's process ended with status {child.exitcode} and no answer") from None
    finally:
        child.kill()
        child.join()
    if "error" in answer:
        raise InputError(answer["error"]) if answer["input"] else RuntimeError(f"in the probe's process:\n{answer['error']}")
    return answer["result"]


def _child(sender, work, limit):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and ends us
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (resident()["VmData"] + limit, resource.RLIM_INFINITY))
        answer = {"result": work()}
    except InputError as error:
        answer = {"error": str(error), "input": True}
    except BaseException as error:  # reported whole to the parent, which raises it
        answer = {"result": None} if is_out_of_memory(error) else {"error": traceback.format_exc(), "input": False}
    sender.send_bytes(json.dumps(answer).encode())


def free_memory():
    """Bytes that Linux says new processes may take without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) * 1024


def limit_memory(limit, device):
    """Enforce a limit in bytes on CUDA, check it on the CPU; None: its default. Returns bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if limit and limit > total:
            raise InputError(f"--memory-limit {limit / GiB:.1f} GiB is more than the card has, {total / GiB:.1f} GiB")
        torch.cuda.set_per_process_memory_fraction((limit or total) / total, device)
        return limit or total
    if platform.system() != "Linux":
        raise InputError("on the CPU the probe needs Linux, which enforces its memory limit; elsewhere use --device cuda")
    free = free_memory()
    if limit and limit > free:
        raise InputError(f"--memory-limit {limit / GiB:.1f} GiB is more than is free here, {free / GiB:.1f} GiB")
    return limit or int(0.8 * free)


def search(fits, largest=None, first=FIRST_BATCH, tolerance=TOLERANCE):
    """Double from `first` until fits(batch) is false, then bisect. Returns (largest batch that fits, smallest seen that does not or None).

    The two are 2% apart, or neighbours. None: `largest` fits, and nothing above it was tried. (0, 1): not even one sequence fits.
    """
    good, bad, batch = 0, None, min(first, largest or first)
    while bad is None:
        if fits(batch):
            good = batch
            if batch == largest:
                return good, None
            batch = min(2 * batch, largest or 2 * batch)
        else:
            bad = batch
    while bad - good > max(1, tolerance * good):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good, bad


def probe(args, label, settings, device, isolated):
    """Measure one strategy; prints a line per size. Returns its part of the JSON document. isolated(work) -> result or None."""
    row = get_model(args.model)
    sizes = {}

    def fits(batch):
        lr = row.learning_rate * batch / row.batch_size
        found = isolated(lambda: measure(args, settings, device, batch, lr))
        entry = {"batch": batch, "lr": lr, "verdict": "fits" if found else "out of memory"}
        if found:
            step = statistics.median(found["step_s"])
            entry |= {"median_step_s": step, "sequences_per_s": batch / step, "epoch_s": step * math.ceil(args.sequences / batch), **found}
        sizes[batch] = entry
        print(size_line(entry), flush=True)
        return bool(found)

    print(f"\n{args.model} {label}\n{'batch':>7}{'lr':>11}{'s/step':>11}{'sequences/s':>13}{'s/epoch':>14}{'peak GiB':>10}  verdict",
          flush=True)
    if args.batch_sizes:
        ceiling, above = max((batch for batch in args.batch_sizes if fits(batch)), default=0), None
    else:
        ceiling, above = search(fits, args.max_batch)
        print(f"largest batch {ceiling}" + (f"; {above} does not fit" if above else "; nothing larger was tried"), flush=True)
    powers = [b for b, entry in sizes.items() if entry["verdict"] == "fits" and b & (b - 1) == 0]
    return {"label": label, "strategy": settings["strategy"], "r": settings.get("r"), "settings": settings, "ceiling": ceiling,
            "smallest_that_fails": above, "power_of_two": max(powers, default=None), "sizes": [sizes[batch] for batch in sorted(sizes)]}


def size_line(entry):
    if entry["verdict"] != "fits":
        return f"{entry['batch']:7d}{entry['lr']:11.3g}{'':>11}{'':>13}{'':>14}{'':>10}  {entry['verdict']}"
    return (f"{entry['batch']:7d}{entry['lr']:11.3g}{entry['median_step_s']:11.4f}{entry['sequences_per_s']:13.2f}{entry['epoch_s']:14,.0f}"
            f"{entry['peak_bytes'] / GiB:10.3f}  {entry['verdict']}")


def published_ratio(model, label):
    """Published seconds per epoch as ratios to full: "0.93", "1.06 to 1.21", or "" where there is none."""
    seconds = PUBLISHED_SECONDS.get(model, {})
    return " to ".join(f"{s / seconds['full'][0]:.2f}" for s in seconds.get(label, ()))


def summary(args, runs):
    """One line per strategy: ceiling (or largest size tried), largest power of two and the time of an epoch there, ratios to full's."""
    full = next((found for found in runs if found["strategy"] in ("full", "random")), None)
    searched = all(found["smallest_that_fails"] for found in runs)  # else --batch-sizes or --max-batch ended before the memory did
    name = "ceiling" if searched else "largest"
    lines = [f"{'strategy':<12}{name:>9}{'to full':>9}{'2^n':>7}{'s/epoch':>14}{'to full':>9}  published s/epoch to full"]
    for found in runs:
        seconds = epoch_seconds(found)
        base = full and epoch_seconds(full)
        lines.append(f"{found['label']:<12}{found['ceiling']:>9}{_ratio(found['ceiling'], full and full['ceiling']):>9}"
                     f"{found['power_of_two'] or '-':>7}{f'{seconds:,.0f}' if seconds else '-':>14}{_ratio(seconds, base):>9}"
                     f"  {published_ratio(args.model, found['label']) or '-'}")
    if not searched:
        lines.append("largest: of the sizes that were tried; more may fit")
    return "\n".join(lines)


def epoch_seconds(found):
    """Seconds per epoch at the largest power of two, as the paper has them; at the largest size that fits where no power was tried."""
    at = found["power_of_two"] or found["ceiling"]
    return next((entry["epoch_s"] for entry in found["sizes"] if entry["batch"] == at and entry["verdict"] == "fits"), None)


def _ratio(value, base):
    return f"{value / base:.2f}" if value and base else "-"


def memory_table(runs):
    """MB by part at the moment of the peak, one column per strategy."""
    lines = ["".join([f"{'MB at the peak':<18}"] + [f"{found['label']:>12}" for found in runs])]
    for part in PARTS:
        lines.append("".join([f"{part:<18}"] + [f"{found['memory']['parts'][part] / 1e6:12.1f}" for found in runs]))
    for name, key in (("sum", "peak"), ("allocator's peak", "allocator_peak"), ("saved, at most", "saved")):
        lines.append("".join([f"{name:<18}"] + [f"{found['memory'][key] / 1e6:12.1f}" for found in runs]))
    return "\n".join(lines)


# What the chart shows: label -> parts, color (Okabe and Ito's palette, told apart with any color vision).
CHART = {
    "parameters": (("parameters",), "#000000"), "gradients": (("gradients",), "#D55E00"),
    "optimizer state": (("optimizer state",), "#999999"), "saved: attention": (("attention",), "#0072B2"),
    "saved: feed-forward": (("feed-forward",), "#56B4E9"), "saved: LayerNorm": (("LayerNorm",), "#009E73"),
    "saved: adapters": (("adapters",), "#F0E442"), "saved: embedding, heads, loss": (("embedding", "heads", "loss"), "#CC79A7"),
    "working tensors": (("working",), "#E69F00"),
}


def plot(args, runs, path):
    """Stacked bars, one per strategy: memory by part at the moment of the step's peak."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = runs[::-1]  # the first on top
    figure = Figure(figsize=(9, 1.9 + 0.55 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit, size = ("GB", 1e9) if max(found["memory"]["peak"] for found in runs) >= 1e9 else ("MB", 1e6)
    left = [0.0] * len(runs)
    for label, (parts, color) in CHART.items():
        widths = [sum(found["memory"]["parts"][part] for part in parts) / size for found in runs]
        axes.barh([found["label"] for found in runs], widths, left=left, color=color, label=label, height=0.65, edgecolor="white",
                  linewidth=0.6)
        left = [a + b for a, b in zip(left, widths)]
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.3g} {unit}", va="center")
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel(f"memory at the peak of a training step ({unit})")
    length = "" if args.data else f", {args.length} tokens"
    axes.set_title(f"{args.model}, batch {runs[0]['memory']['batch']}{length}, {args.precision}{', recomputed' if args.recompute else ''}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format=str(path).rpartition(".")[2])


def main(argv=None):
    args = parse_args(argv)
    asked = strategy_runs(args)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install '.[report]'")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    device = torch.device("cuda", 0) if args.device != "cpu" and torch.cuda.is_available() else torch.device("cpu")
    set_precision(args.precision, device)
    limit = limit_memory(args.memory_limit, device)

    def isolated(work, more=0):
        return on_cuda(work, device) if device.type == "cuda" else in_child(work, limit + more)

    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {threads}"
    tokens = f"tokens of {args.data.folder}" if args.data else f"{args.length} random tokens"
    print(f"{args.model} on {name}, torch {torch.__version__}, {args.precision}, {tokens}, limit {limit / GiB:.2f} GiB, "
          f"{args.sequences:,} sequences per epoch")
    runs = [probe(args, label, settings, device, isolated) for label, settings in asked]

    # memory by part, at one size for all: the largest that every strategy was seen to fit
    common = set.intersection(*({entry["batch"] for entry in found["sizes"] if entry["verdict"] == "fits"} for found in runs))
    batch, rate = max(common, default=None), get_model(args.model).learning_rate
    for (_, settings), found in zip(asked, runs):
        found["memory"] = isolated(lambda settings=settings: account(args, settings, device, batch, rate), PROFILER) if batch else None
    why = "" if all(found["memory"] for found in runs) else \
        f"counting the parts at batch {batch} takes more than the limit" if batch else "no batch that was tried fits every strategy"
    print(f"\n{summary(args, runs)}")
    print(f"\nno memory by part: {why}" if why else f"\nbatch {batch}\n{memory_table(runs)}", flush=True)
    if args.out:
        write_json(args.out, {
            "model": args.model, "device": name, "torch": torch.__version__, "precision": args.precision, "recompute": args.recompute,
            "date": time.strftime("%Y-%m-%d"),
            "command": ["probe_batch.py", *(sys.argv[1:] if argv is None else argv)], "length": None if args.data else args.length,
            "data": args.data and str(args.data.folder), "sequences": args.sequences, "memory_limit_bytes": limit,
            "activations": ACTIVATIONS, "published_epoch_s": PUBLISHED_SECONDS.get(args.model), "runs": runs})
    if args.plot:
        if why:
            raise InputError(f"--plot {args.plot}: {why}: nothing to draw")
        plot(args, runs, args.plot)
    return runs


if __name__ == "__main__":
    run(main)
