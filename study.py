"""The whole study as one queue: every published run, in both protocols, with seeds; or a grid of your own.

  python study.py --dry-run --card h100                          # the plan: commands, published numbers, hours; needs no data and no GPU
  python study.py --data data/bertax --out runs/study            # run it, one run per GPU; the same command goes on where it was stopped
  python study.py --data data/bertax --out runs/study --status   # how far each run is
  python study.py --data data/bertax --out runs/study --slurm study.sbatch      # for a cluster: then  sbatch study.sbatch
  python study.py --protocol corrected --strategies lora ia3 --seeds 3 --set '--precision bf16 --compile'
  python study.py --grid mine.csv --out runs/mine                # a line per run, columns are flags of train.py: a sweep

A run that fails does not stop the others, and is tried again by the next call. Ctrl-C lets all save and leave. What a run prints is in
OUT/NAME.txt, its folder is OUT/NAME; python report.py OUT --out report makes tables and pictures, at any time.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from taxa import PROTOCOLS, RANKS, STUDY_SEED, STUDY_TRAINING_SEQUENCES
from taxa.errors import InputError, Saved, Stop, choose, nearest
from taxa.runtime.cli import Parser, positive_int, run
from taxa.runtime.files import replacing
from taxa.runtime.signals import Signals
from taxa.runtime.workers import available_cores
from taxa.study import grid
from taxa.study.queue import Job, gpus, hold, run_jobs
from taxa.study.rates import hours, read_rates
from taxa.study.run_folders import read_run
from taxa.study.slurm import array_script

ROOT = Path(__file__).resolve().parent
TRAIN = ROOT / "train.py"


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.group("which runs")
    add("--grid", metavar="FILE.csv", help="your own runs: columns are flags of train.py (default: the 33 published runs)")
    add("--rows", nargs="+", metavar="N", help="only these rows of the published table, or runs of --grid by order")
    add("--models", nargs="+", metavar="NAME", help="only these models")
    add("--strategies", nargs="+", metavar="NAME", help="only these strategies")
    add("--protocol", choices=(*PROTOCOLS, "both"), help="of the published runs (default both: each row once in each)")
    add("--seeds", type=positive_int, default=1, metavar="N", 
        help=f"runs of each, of seeds {STUDY_SEED}, {STUDY_SEED + 1}, ... (default 1)")
    add("--set", metavar="'FLAGS'", default="", help="flags of train.py that all runs get, in the place of a row's (default: none)")
    add = parser.group("folders")
    add("--data", metavar="DIR", help="prepared dataset, where --grid has no column data (default data/bertax)")
    add("--out", default="runs/study", metavar="DIR", help="run folders go here (default runs/study)")
    add = parser.group("machine")
    add("--gpus-per-run", type=positive_int, default=1, metavar="N",
        help="processes of a run, by torchrun (default 1); a published run keeps its sequences per step")
    add("--jobs", type=positive_int, metavar="N",
        help="at most so many runs at a time (default: as many as there are GPUs for; on a CPU 1)")
    add("--card", metavar="NAME", help="estimate hours on this card, as h100 (default: the one that is here)")
    add = parser.group("instead of running")
    add("--dry-run", action="store_true", help="print the plan")
    add("--status", action="store_true", help="print how far each run is")
    add("--slurm", metavar="FILE", help="write an sbatch script with one array task per run")
    add("--num-classes", type=positive_int, nargs="+", metavar="N",
        help="--dry-run: the commands print what would train with so many classes per rank, as 4 57 1884, and need no data")
    words = iter(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args([f"--set={next(words, '')}" if word == "--set" else word for word in words])  # its value begins with "--"
    if args.grid and args.protocol:
        parser.error("--protocol is of the published runs; a --grid has a column for it")
    if args.num_classes and not args.dry_run:
        parser.error("--num-classes stands in for data: it goes with --dry-run")
    if args.dry_run + args.status + bool(args.slurm) > 1:
        parser.error("--dry-run, --status and --slurm: give one of them")
    return args


def make_plan(args):
    """The runs that are asked for, each with all of its flags."""
    common = grid.set_flags(args.set)
    if args.grid:
        runs = grid.read_grid(args.grid, args.seeds)
    else:
        protocols = PROTOCOLS if args.protocol in (None, "both") else (args.protocol,)
        runs = grid.published_grid(protocols, args.seeds, args.gpus_per_run)
        if common.keys() & {"batch-size", "accumulate"}:
            runs = [each._replace(flags={f: t for f, t in each.flags.items() if f not in ("batch-size", "accumulate")}) for each in runs]
    for kind, wanted in (("model", args.models), ("strategy", args.strategies)):
        for name in wanted or ():
            choose(kind, name, list(dict.fromkeys(each.flags[kind] for each in runs)))
        runs = [each for each in runs if not wanted or each.flags[kind] in wanted]
    if args.rows:
        numbers = [str(each.published.row) if each.published else str(i) for i, each in enumerate(runs, start=1)]
        for row in args.rows:
            choose("row", row, list(dict.fromkeys(numbers)))
        runs = [each for each, number in zip(runs, numbers) if number in args.rows]
    out = Path(args.out)
    plan = []
    for each in runs:
        data = each.flags.get("data") or args.data or "data/bertax"
        plan.append(each._replace(flags={**each.flags, **common, "data": data, "resume": "yes", "out": str(out / each.name)}))
    return plan


def command(each, processes, here=True):
    """The words that start a run. here: as this process starts it; otherwise as it would be typed."""
    script = str(TRAIN) if here or Path.cwd() != ROOT else TRAIN.name
    words = [script, *grid.words_of(each.flags)]
    if processes > 1:
        launch = ["--standalone", "--nproc_per_node", str(processes), "--"]
        return [sys.executable, "-m", "torch.distributed.run", *launch, *words] if here else ["torchrun", *launch, *words]
    return [sys.executable if here else "python", *words]


def manifests(plan):
    """{data folder: its manifest, {} where it is not here}."""
    return {data: grid.document(Path(data) / "manifest.json") for data in {each.flags["data"] for each in plan}}


# ---------------------------------------------------------------- the plan, and where it stands

def print_plan(args, plan, data):
    """A line per run: its command as it would be typed; behind it what is done, what was published, and an estimate of its hours."""
    card, rates, total, known, published = args.card or gpus()[1], read_rates(), 0.0, 0, 0.0
    for each in plan:
        typed = each
        if args.num_classes:
            stand_in = {"dry-run": "yes", "num-classes": " ".join(map(str, args.num_classes))}
            typed = each._replace(flags={f: t for f, t in each.flags.items() if f not in ("data", "resume", "out")} | stand_in)
        sequences = data[each.flags["data"]].get("splits", {}).get("train", STUDY_TRAINING_SEQUENCES)
        took = hours(each.flags, sequences, card, rates, args.gpus_per_run)
        told = [grid.state(Path(each.flags["out"]))[0]]
        if each.published:
            theirs = each.published.epoch_seconds * each.published.epochs / 3600
            published += theirs
            told.append(f"published {' '.join(f'{rank} {getattr(each.published, rank)}' for rank in RANKS)} in {theirs:.2f} h")
        told.append("no estimate" if took is None else f"estimate {took:.2f} h")
        total, known = total + (took or 0), known + (took is not None)
        print(shlex.join(command(typed, 1 if args.num_classes else args.gpus_per_run, here=False)), " # " + "; ".join(told))
    print(f"# {len(plan)} runs; " + (f"published {published:,.0f} h; " if published else "")
          + (f"estimate on {card} {total:,.0f} GPU hours for {known} of them, no estimate for {len(plan) - known}" if known else
             f"no estimate: no rate of {'these runs on ' + card if card else 'this machine'} was measured"))


def print_status(plan):
    """A table: state, epoch, best validation loss, hours of training so far and left of each run; what the failed ones said."""
    width, counts, failed = max(len(each.name) for each in plan), {}, []
    print(f"{'run':<{width}}  state    epoch  validation loss  hours so far  left")
    for each in plan:
        folder = Path(each.flags["out"])
        state, said = grid.state(folder)
        counts[state] = counts.get(state, 0) + 1
        failed += [f"{each.name}: {said}"] if state == "failed" else []
        cells = ["-", "-", "-", "-"]
        if (folder / "args.json").is_file():
            found = read_run(folder)
            best = min((line["validation_loss"] for line in found.validations), default=None)
            cells[0] = str(max((line["epoch"] for line in found.log), default="-"))
            cells[1] = "-" if best is None else f"{best:.4f}"
            if found.rate:
                per_step = found.batch / found.rate / 3600
                cells[2] = f"{found.last_step * per_step:.2f}"
                cells[3] = "0.00" if found.metrics else f"{(found.steps[-1]['steps'] - found.last_step) * per_step:.2f}"
        print(f"{each.name:<{width}}  {state:<7}{cells[0]:>7}{cells[1]:>17}{cells[2]:>14}{cells[3]:>6}")
    print("; ".join(f"{count} {state}" for state, count in counts.items()))
    print("\n".join(failed), end="\n" * bool(failed))


# ---------------------------------------------------------------- running it

def check_flags(args, plan):
    """Raise InputError for a flag that train.py does not have, before anything starts."""
    page = subprocess.run([sys.executable, str(TRAIN), "--help"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"--([a-z][a-z0-9-]*)", page.stdout))
    if page.returncode:
        raise InputError(f"{TRAIN} --help failed: {page.stderr.strip().splitlines()[-1:]}")
    for each in plan:
        for flag in each.flags:
            if flag not in known:
                where = "--set" if flag in grid.set_flags(args.set) else each.where
                raise InputError(f"{where}: train.py has no flag --{flag}{nearest(flag, sorted(known))}")


def slots_of(args, plan):
    """[environment of the runs of a slot]: one per GPU, or per group of --gpus-per-run; on a CPU --jobs with equal shares of the cores."""
    found = [] if all(each.flags.get("device") == "cpu" for each in plan) else gpus()[0]
    per = args.gpus_per_run
    if found:
        if len(found) < per:
            raise InputError(f"--gpus-per-run {per}: there {'is 1 GPU' if len(found) == 1 else f'are {len(found)} GPUs'} here")
        groups = [found[i:i + per] for i in range(0, len(found) - per + 1, per)][:args.jobs]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} for group in groups]
    jobs = args.jobs or 1
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // (jobs * per))))}] * jobs


class ProgressLine:
    """Called with what runs and what has ended: one line, done, running, failed, time left. On a terminal it is written over itself."""

    def __init__(self, plan, finished, weights):
        self.plan, self.finished, self.weights = {each.name: Path(each.flags["out"]) for each in plan}, finished, weights
        self.at_start = {name: grid.share_done(self.plan[name]) for name in weights}
        self.began, self.before, self.looked = time.monotonic(), None, -10.0

    def __call__(self, running, statuses):
        failed = sum(status not in (0, grid.STOPPED) for status in statuses.values())
        done = self.finished + sum(status == 0 for status in statuses.values())
        state = (done, len(running), failed)
        if state == self.before and (not sys.stdout.isatty() or time.monotonic() - self.looked < 2):
            return
        self.before, self.looked = state, time.monotonic()
        text = f"{done}/{len(self.plan)} done, {len(running)} running, {failed} failed" + self.left(running, statuses)
        print(f"\r{text}\x1b[K" if sys.stdout.isatty() else text, end="" if sys.stdout.isatty() else "\n", flush=True)

    def left(self, running, statuses):
        """", about 3.2 h left": what is left to do by what was done per second, in published hours where there are such."""
        share = {name: 1.0 if statuses.get(name) == 0 else grid.share_done(self.plan[name]) for name in {*running, *statuses}}
        taken = sum(weight * (share.get(name, self.at_start[name]) - self.at_start[name]) for name, weight in self.weights.items())
        open_ones = {name: weight for name, weight in self.weights.items() if name in running or name not in statuses}
        rest = sum(weight * (1 - share.get(name, self.at_start[name])) for name, weight in open_ones.items())
        if not taken or not rest:
            return ""
        seconds = rest / taken * (time.monotonic() - self.began)
        return f", about {f'{seconds / 3600:.1f} h' if seconds > 5400 else f'{seconds / 60:.0f} min'} left"


def unfinished(plan):
    """The runs without metrics.json, which train.py writes last."""
    return [each for each in plan if not (Path(each.flags["out"]) / "metrics.json").is_file()]


def run_plan(args, plan):
    """Run what is not done. Raises Stop when a run failed, Saved when a signal stopped it all."""
    remaining = unfinished(plan)
    if remaining:
        if Path(args.out).is_dir():
            hold(Path(args.out)).close()  # another study.py that is at work there is heard of at once
        check_flags(args, remaining)
    with Signals() as signals, hold(Path(args.out)) as held:
        remaining = unfinished(remaining)  # runs of a killed queue may have ended in the meantime
        signals.defer()
        slots = slots_of(args, remaining) if remaining else []
        jobs = [Job(each.name, command(each, args.gpus_per_run), grid.output(Path(each.flags["out"]))) for each in remaining]
        weights = {each.name: each.published.epoch_seconds if each.published else 1.0 for each in remaining}
        line = ProgressLine(plan, len(plan) - len(remaining), weights)
        statuses = run_jobs(jobs, slots, signals, held, line)
        print("\n" * sys.stdout.isatty(), end="")
    failed = [each.name for each in remaining if statuses.get(each.name, 0) not in (0, grid.STOPPED)]
    for name in failed:
        print(f"failed: {name}: {grid.last_words(line.plan[name])[1]} ({grid.output(line.plan[name])})")
    if signals.received is not None:
        raise Saved(f"{signals.name}: all runs have left and saved what they had; the same command goes on")
    if failed:
        raise Stop(f"{len(failed)} of {len(plan)} runs failed, as said above; the same command tries them again")
    print(f"all {len(plan)} runs are done: python report.py {args.out} --out report")


def write_script(args, plan):
    """The sbatch script of the runs that are not finished."""
    check_flags(args, plan)
    remaining = unfinished(plan)
    if not remaining:
        raise InputError(f"all {len(plan)} runs are done: nothing is left for a script")
    commands = [shlex.join(command(each, 1, here=False)) for each in remaining]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    on_gpus = any(each.flags.get("device") != "cpu" for each in remaining)
    text = array_script(
        f"{len(remaining)} runs of {args.out}, written by study.py",
        args.slurm,
        commands,
        folder=Path(args.out).resolve(),
        here=shlex.quote(str(Path.cwd())),
        processes=args.gpus_per_run,
        gpus=on_gpus,
    )
    with replacing(args.slurm) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{args.slurm}: an array of {len(remaining)} tasks; fill in its marked places, then: sbatch {args.slurm}")


def main(argv=None):
    args = parse_args(argv)
    plan = make_plan(args)
    if args.status:
        return print_status(plan)
    data = manifests(plan)
    for each in plan:
        grid.check_same(each, Path(each.flags["out"]), args.gpus_per_run, data[each.flags["data"]].get("digest"))
    if args.dry_run:
        return print_plan(args, plan, data)
    missing = next((folder for folder, manifest in data.items() if not manifest), None)
    if missing:
        raise InputError(f"{missing}: not a prepared dataset; make it with prepare.py --out {missing}, or give another --data")
    return write_script(args, plan) if args.slurm else run_plan(args, plan)


if __name__ == "__main__":
    run(main)
