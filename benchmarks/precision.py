"""What precision costs: the same training runs in fp32, tf32 and bf16, on the same seeds.

  python benchmarks/precision.py --data data/bertax --model nt50m --strategy full --max-steps 2000
  python benchmarks/precision.py --data data/demo --model tiny-nt --strategy full --epochs 1

The second command is for a CPU: fp32 and bf16.

Each run is one train.py. Weights and their updates are float32 in all of them; what differs is
what the matrix products compute in. A seed gives the same start and the same order of batches in
every precision, so runs are compared seed by seed: the last column but one is the final validation
loss less that of fp32 with the same seed. Accuracies are those of the test split, at the best
epoch. With --jobs above 1 the runs share the device, and the steps per second are those of one run
among them. Run folders and precision.json (every number, the machine, the commands) go to --out.
"""

import concurrent.futures
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from taxa.backbones import MODELS, get_model, table_name
from taxa.data.dataset import PreparedDataset
from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_float, positive_int, run
from taxa.runtime.files import write_json
from taxa.runtime.precision import PRECISIONS
from taxa.strategies import STRATEGIES

PASSED_ON = (
    "model", "strategy", "r", "weights", "data", "epochs", "max_steps", "batch_size", "lr",
    "workers", "device", "log_every",
)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.group("runs (given to train.py)")
    add("--data", required=True, metavar="DIR", help="prepared folder that has the model's tokens")
    add("--model", required=True, type=table_name, metavar="NAME",
        help=f"one of {' '.join(MODELS)}")
    add("--strategy", required=True, choices=STRATEGIES, help="what trains")
    add("--r", type=positive_int, metavar="R", help="lora: rank (default train.py's)")
    add("--weights", metavar="DIR", help="folder in the hub's format instead of the hub")
    add("--epochs", type=positive_int, metavar="N", help="at most this many (default train.py's)")
    add("--max-steps", type=positive_int, metavar="N",
        help="stop after this many optimizer steps (default: when the epochs are over)")
    add("--batch-size", type=positive_int, metavar="B",
        help="sequences per step (default: the published one)")
    add("--lr", type=positive_float, metavar="LR",
        help="initial learning rate (default: the published one of the model)")
    add("--workers", type=positive_int, metavar="N",
        help="data-loader workers of each run (default train.py's)")
    add("--log-every", type=positive_int, default=20, metavar="STEPS",
        help="steps between log lines (default 20)")
    add("--device", choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default CUDA where there is one")
    add = parser.group("comparison")
    add("--precisions", nargs="+", choices=PRECISIONS, metavar="NAME",
        help=f"of {' '.join(PRECISIONS)} (default all; on a CPU fp32 bf16)")
    add("--seeds", type=positive_int, default=3, metavar="N", help="seeds 1 to N (default 3)")
    add("--jobs", type=positive_int, default=1, metavar="N",
        help="runs at a time on the one device (default 1)")
    add("--out", default="runs/precision", metavar="DIR",
        help="folder for the runs, which must not be there (default runs/precision)")
    args = parser.parse_args(argv)
    if not args.precisions:
        args.precisions = [
            name for name in PRECISIONS if name != "tf32" or args.device == "cuda"
        ]
    tokenizer = get_model(args.model).tokenizer
    if not PreparedDataset(args.data).has_tokens(tokenizer):
        raise InputError(f"{args.data} has no tokens of {tokenizer}: add them with "
                         f"prepare.py --add-tokens {tokenizer} --out {args.data}")
    return args


def commands(args):
    """[(precision, seed, run folder, arguments of train.py)].

    They go seed by seed, so that what has run when it is stopped is balanced.
    """
    flags = []
    for name in PASSED_ON:
        value = getattr(args, name)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    found = []
    for seed in range(1, args.seeds + 1):
        for precision in args.precisions:
            out = Path(args.out) / f"{args.model}-{args.strategy}-{precision}-seed{seed}"
            own = ["--precision", precision, "--seed", str(seed), "--out", str(out)]
            found.append((precision, seed, out, [*flags, *own]))
    return found


def train(arguments, threads):
    """One train.py with so many CPU threads. Raises InputError with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        check=False, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(f"train.py {shlex.join(arguments)} failed: {last}")


def results(out):
    """{"loss", "steps_per_s", and the balanced accuracy of each rank} of a run folder.

    loss: of the last validation. steps_per_s: the median of the log lines after the first.
    """

    def read(name):
        return (out / name).read_text(encoding="utf-8")

    log = [json.loads(line) for line in read("log.jsonl").splitlines()]
    settings = json.loads(read("args.json"))
    metrics = json.loads(read("metrics.json"))
    losses = [entry["validation_loss"] for entry in log if "validation_loss" in entry]
    speeds = [entry["sequences_per_s"] for entry in log if "sequences_per_s" in entry]
    step = settings["batch_size"] * settings["accumulate"]  # sequences
    return {
        "loss": losses[-1],
        "steps_per_s": statistics.median(speeds[1:] or speeds) / step,
        **{rank: values["balanced_accuracy"] for rank, values in metrics["ranks"].items()},
    }


def spread(values, digits=4):
    """Mean (lowest to highest)."""
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(found):
    """Markdown: a line per precision. found: {precision: {seed: results()}}."""
    first = next(iter(next(iter(found.values())).values()))
    ranks = [name for name in first if name not in ("loss", "steps_per_s")]
    header = ["precision", "seeds", "validation loss", *ranks, "loss less fp32's", "steps/s"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for precision, runs in found.items():
        cells = [spread([result[name] for result in runs.values()]) for name in ("loss", *ranks)]
        less = ""
        if "fp32" in found and precision != "fp32":
            pairs = [result["loss"] - found["fp32"][seed]["loss"] for seed, result in runs.items()]
            less = spread(pairs) if pairs else ""
        steps = spread([result["steps_per_s"] for result in runs.values()], 2)
        lines.append(f"| {precision} | {len(runs)} | {' | '.join([*cells, less, steps])} |")
    return "\n".join(lines)


def main(argv=None):
    args = parse_args(argv)
    runs = commands(args)
    found = {precision: {} for precision in args.precisions}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            pool.submit(train, arguments, threads): (precision, seed, out)
            for precision, seed, out, arguments in runs
        }
        try:
            done = concurrent.futures.as_completed(futures)
            for number, future in enumerate(done, start=1):
                future.result()
                precision, seed, out = futures[future]
                result = found[precision][seed] = results(out)
                print(f"{number}/{len(runs)} {precision} seed {seed}: {json.dumps(result)}",
                      flush=True)
        except BaseException:  # Ctrl-C too: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {threads} thread(s) a run"
    write_json(Path(args.out) / "precision.json", {
        "device": device,
        "torch": torch.__version__,
        "jobs": args.jobs,
        "results": found,
        "commands": [["train.py", *arguments] for *_, arguments in runs],
    })
    print(table(found))
    print(f"{args.model} {args.strategy} on {device}, torch {torch.__version__}, "
          f"{args.jobs} run(s) at a time; mean (lowest to highest)")


if __name__ == "__main__":
    run(main)
