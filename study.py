"""The whole study as one queue: every published run, in both protocols, with seeds.

It also runs a grid of your own.

  # the plan: commands, published numbers, hours; it needs no data and no GPU
  python study.py --dry-run --card h100
  # run it, one run per GPU; the same command goes on where it was stopped
  python study.py --data data/bertax --out runs/study
  # how far each run is
  python study.py --data data/bertax --out runs/study --status
  # for a cluster; then: sbatch study.sbatch
  python study.py --data data/bertax --out runs/study --slurm study.sbatch
  # some of the published runs, with three seeds and more flags
  python study.py --strategies lora ia3 --seeds 3 --set '--precision bf16 --compile'
  # a sweep: a line per run, columns are flags of train.py
  python study.py --grid mine.csv --out runs/mine

A run that fails does not stop the others, and the next call tries it again. Ctrl-C lets all runs
save and leave. What a run prints is in OUT/NAME.txt, and its folder is OUT/NAME. Tables and
pictures are made at any time by python report.py OUT --out report.
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
    add("--grid", metavar="FILE.csv",
        help="your own runs: columns are flags of train.py (default: the 33 published runs)")
    add("--rows", nargs="+", metavar="N",
        help="only these rows of the published table, or runs of --grid by order")
    add("--models", nargs="+", metavar="NAME", help="only these models")
    add("--strategies", nargs="+", metavar="NAME", help="only these strategies")
    add("--protocol", choices=(*PROTOCOLS, "both"),
        help="of the published runs (default both: each row once in each)")
    add("--seeds", type=positive_int, default=1, metavar="N",
        help=f"runs of each, of seeds {STUDY_SEED}, {STUDY_SEED + 1}, ... (default 1)")
    add("--set", metavar="'FLAGS'", default="",
        help="flags of train.py that all runs get, in the place of a row's (default: none)")
    add = parser.group("folders")
    add("--data", metavar="DIR",
        help="prepared dataset, where --grid has no column data (default data/bertax)")
    add("--out", default="runs/study", metavar="DIR",
        help="run folders go here (default runs/study)")
    add = parser.group("machine")
    add("--gpus-per-run", type=positive_int, default=1, metavar="N",
        help="processes of a run, by torchrun (default 1); "
             "a published run keeps its sequences per step")
    add("--jobs", type=positive_int, metavar="N",
        help="at most so many runs at a time (default: as many as there are GPUs for; on a CPU 1)")
    add("--card", metavar="NAME",
        help="estimate hours on this card, as h100 (default: the one that is here)")
    add = parser.group("instead of running")
    add("--dry-run", action="store_true", help="print the plan")
    add("--status", action="store_true", help="print how far each run is")
    add("--slurm", metavar="FILE", help="write an sbatch script with one array task per run")
    add("--num-classes", type=positive_int, nargs="+", metavar="N",
        help="--dry-run: the commands print what would train with so many classes per rank, "
             "as 4 57 1884, and need no data")
    # "--set VALUE" becomes one word, since the value itself begins with "--".
    words = iter(sys.argv[1:] if argv is None else argv)
    words = [f"--set={next(words, '')}" if word == "--set" else word for word in words]
    args = parser.parse_args(words)
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
            runs = [without(each, "batch-size", "accumulate") for each in runs]
    for kind, wanted in (("model", args.models), ("strategy", args.strategies)):
        for name in wanted or ():
            choose(kind, name, list(dict.fromkeys(each.flags[kind] for each in runs)))
        runs = [each for each in runs if not wanted or each.flags[kind] in wanted]
    if args.rows:
        numbers = [
            str(each.published.row) if each.published else str(place)
            for place, each in enumerate(runs, start=1)
        ]
        for row in args.rows:
            choose("row", row, list(dict.fromkeys(numbers)))
        runs = [each for each, number in zip(runs, numbers) if number in args.rows]
    out = Path(args.out)
    plan = []
    for each in runs:
        flags = each.flags | common
        flags["data"] = each.flags.get("data") or args.data or "data/bertax"
        flags["resume"] = "yes"
        flags["out"] = str(out / each.name)
        plan.append(each._replace(flags=flags))
    return plan


def without(each, *names):
    """A planned run without some of its flags."""
    return each._replace(flags={f: text for f, text in each.flags.items() if f not in names})


def command(each, processes, here=True):
    """The words that start a run. here: as this process starts it; otherwise as it is typed."""
    script = str(TRAIN) if here or Path.cwd() != ROOT else TRAIN.name
    words = [script, *grid.words_of(each.flags)]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run"] if here else ["torchrun"]
        return [*torchrun, "--standalone", "--nproc_per_node", str(processes), "--", *words]
    return [sys.executable if here else "python", *words]


def manifests(plan):
    """{data folder: its manifest, {} where it is not here}."""
    folders = {each.flags["data"] for each in plan}
    return {folder: grid.document(Path(folder) / "manifest.json") for folder in folders}


# ---------------------------------------------------------------- the plan, and where it stands

def print_plan(args, plan, data):
    """Print a line per run: its command as it is typed, and behind it what is known.

    That is its state, the published numbers, and an estimate of its hours.
    """
    card = args.card or gpus()[1]
    rates = read_rates()
    total = 0.0  # estimated hours of all runs
    known = 0  # runs that have an estimate
    published = 0.0  # published hours of all runs
    for each in plan:
        typed, processes = each, args.gpus_per_run
        if args.num_classes:
            typed, processes = without(each, "data", "resume", "out"), 1
            typed.flags["dry-run"] = "yes"
            typed.flags["num-classes"] = " ".join(map(str, args.num_classes))
        splits = data[each.flags["data"]].get("splits", {})
        sequences = splits.get("train", STUDY_TRAINING_SEQUENCES)
        took = hours(each.flags, sequences, card, rates, args.gpus_per_run)
        told = [grid.state(Path(each.flags["out"]))[0]]
        if each.published:
            theirs = each.published.epoch_seconds * each.published.epochs / 3600
            published += theirs
            reached = " ".join(f"{rank} {getattr(each.published, rank)}" for rank in RANKS)
            told.append(f"published {reached} in {theirs:.2f} h")
        if took is None:
            told.append("no estimate")
        else:
            told.append(f"estimate {took:.2f} h")
            total += took
            known += 1
        print(shlex.join(command(typed, processes, here=False)), " # " + "; ".join(told))

    summary = [f"{len(plan)} runs"]
    if published:
        summary.append(f"published {published:,.0f} h")
    if known:
        summary.append(
            f"estimate on {card} {total:,.0f} GPU hours for {known} of them, "
            f"no estimate for {len(plan) - known}"
        )
    else:
        where = f"these runs on {card}" if card else "this machine"
        summary.append(f"no estimate: no rate of {where} was measured")
    print("# " + "; ".join(summary))


def print_status(plan):
    """Print a table of the runs, and what the failed ones said.

    Its columns are state, epoch, best validation loss, and hours of training so far and left.
    """
    width = max(len(each.name) for each in plan)
    counts = {}  # state -> number of runs
    failed = []
    print(f"{'run':<{width}}  state    epoch  validation loss  hours so far  left")
    for each in plan:
        folder = Path(each.flags["out"])
        state, said = grid.state(folder)
        counts[state] = counts.get(state, 0) + 1
        if state == "failed":
            failed.append(f"{each.name}: {said}")
        epoch, loss, so_far, left = progress_of(folder)
        print(f"{each.name:<{width}}  {state:<7}{epoch:>7}{loss:>17}{so_far:>14}{left:>6}")
    print("; ".join(f"{count} {state}" for state, count in counts.items()))
    print("\n".join(failed), end="\n" * bool(failed))


def progress_of(folder):
    """(epoch, best validation loss, hours so far, hours left) of a run as text; "-" if unknown."""
    epoch = loss = so_far = left = "-"
    if (folder / "args.json").is_file():
        found = read_run(folder)
        epoch = str(max((line["epoch"] for line in found.log), default="-"))
        best = min((line["validation_loss"] for line in found.validations), default=None)
        loss = "-" if best is None else f"{best:.4f}"
        if found.rate:
            hours_per_step = found.batch / found.rate / 3600
            steps_left = 0 if found.metrics else found.steps[-1]["steps"] - found.last_step
            so_far = f"{found.last_step * hours_per_step:.2f}"
            left = f"{steps_left * hours_per_step:.2f}"
    return epoch, loss, so_far, left


# ---------------------------------------------------------------- running it

def check_flags(args, plan):
    """Raise InputError for a flag that train.py does not have, before anything starts."""
    page = subprocess.run(
        [sys.executable, str(TRAIN), "--help"], capture_output=True, text=True, check=False
    )
    known = set(re.findall(r"--([a-z][a-z0-9-]*)", page.stdout))
    if page.returncode:
        raise InputError(f"{TRAIN} --help failed: {page.stderr.strip().splitlines()[-1:]}")
    from_set = grid.set_flags(args.set)
    for each in plan:
        for flag in each.flags:
            if flag not in known:
                where = "--set" if flag in from_set else each.where
                hint = nearest(flag, sorted(known))
                raise InputError(f"{where}: train.py has no flag --{flag}{hint}")


def slots_of(args, plan):
    """The slots of the queue: [environment of the runs of a slot].

    There is one per GPU, or per group of --gpus-per-run. On a CPU there are --jobs, with equal
    shares of the cores.
    """
    on_cpu = all(each.flags.get("device") == "cpu" for each in plan)
    found = [] if on_cpu else gpus()[0]
    per = args.gpus_per_run
    if found:
        if len(found) < per:
            there = "is 1 GPU" if len(found) == 1 else f"are {len(found)} GPUs"
            raise InputError(f"--gpus-per-run {per}: there {there} here")
        groups = [found[i:i + per] for i in range(0, len(found) - per + 1, per)][:args.jobs]
        return [
            {"CUDA_VISIBLE_DEVICES": ",".join(group), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            for group in groups
        ]
    jobs = args.jobs or 1
    cores = max(1, available_cores() // (jobs * per))
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}] * jobs


class ProgressLine:
    """Prints one line: how many runs are done, running and failed, and the time left.

    It is called with what runs and what has ended. On a terminal the line is written over itself.
    """

    def __init__(self, plan, finished, weights):
        """finished: how many runs were done before; weights: {name of another run: its cost}.

        The cost is relative to that of the others: published seconds, where there are such.
        """
        self.plan = {each.name: Path(each.flags["out"]) for each in plan}
        self.finished = finished
        self.weights = weights
        self.at_start = {name: grid.share_done(self.plan[name]) for name in weights}
        self.began = time.monotonic()
        self.before = None  # what the last line said
        self.looked = -10.0

    def __call__(self, running, statuses):
        on_terminal = sys.stdout.isatty()
        failed = sum(status not in (0, grid.STOPPED) for status in statuses.values())
        done = self.finished + sum(status == 0 for status in statuses.values())
        state = (done, len(running), failed)
        if state == self.before and (not on_terminal or time.monotonic() - self.looked < 2):
            return
        self.before = state
        self.looked = time.monotonic()
        text = f"{done}/{len(self.plan)} done, {len(running)} running, {failed} failed"
        text += self.left(running, statuses)
        if on_terminal:
            print(f"\r{text}\x1b[K", end="", flush=True)
        else:
            print(text, flush=True)

    def left(self, running, statuses):
        """", about 3.2 h left": the cost that is left over the cost that was done per second."""
        share = dict(self.at_start)
        for name in {*running, *statuses}:
            share[name] = 1.0 if statuses.get(name) == 0 else grid.share_done(self.plan[name])
        taken = 0.0
        rest = 0.0
        for name, weight in self.weights.items():
            taken += weight * (share[name] - self.at_start[name])
            if name in running or name not in statuses:
                rest += weight * (1 - share[name])
        if not taken or not rest:
            return ""
        seconds = rest / taken * (time.monotonic() - self.began)
        time_left = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
        return f", about {time_left} left"


def unfinished(plan):
    """The runs without metrics.json, which train.py writes last."""
    return [each for each in plan if not (Path(each.flags["out"]) / "metrics.json").is_file()]


def run_plan(args, plan):
    """Run what is not done. Raises Stop when a run failed, Saved when a signal stopped it all."""
    out = Path(args.out)
    remaining = unfinished(plan)
    if remaining:
        if out.is_dir():
            hold(out).close()  # refuse at once when another study.py is at work there
        check_flags(args, remaining)
    with Signals() as signals, hold(out) as held:
        remaining = unfinished(remaining)  # runs of a killed queue may have ended in the meantime
        signals.defer()
        slots = slots_of(args, remaining) if remaining else []
        jobs = []
        weights = {}
        for each in remaining:
            log = grid.output(Path(each.flags["out"]))
            jobs.append(Job(each.name, command(each, args.gpus_per_run), log))
            weights[each.name] = each.published.epoch_seconds if each.published else 1.0
        line = ProgressLine(plan, len(plan) - len(remaining), weights)
        statuses = run_jobs(jobs, slots, signals, held, line)
        print("\n" * sys.stdout.isatty(), end="")

    failed = [name for name in weights if statuses.get(name, 0) not in (0, grid.STOPPED)]
    for name in failed:
        folder = line.plan[name]
        _, why = grid.last_words(folder)
        print(f"failed: {name}: {why} ({grid.output(folder)})")
    if signals.received is not None:
        raise Saved(
            f"{signals.name}: all runs have left and saved what they had; the same command goes on"
        )
    if failed:
        raise Stop(
            f"{len(failed)} of {len(plan)} runs failed, as said above; "
            "the same command tries them again"
        )
    print(f"all {len(plan)} runs are done: python report.py {args.out} --out report")


def write_script(args, plan):
    """Write the sbatch script of the runs that are not finished."""
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
    print(
        f"{args.slurm}: an array of {len(remaining)} tasks; fill in its marked places, "
        f"then: sbatch {args.slurm}"
    )


def main(argv=None):
    args = parse_args(argv)
    plan = make_plan(args)
    if args.status:
        return print_status(plan)
    data = manifests(plan)
    for each in plan:
        digest = data[each.flags["data"]].get("digest")
        grid.check_same(each, Path(each.flags["out"]), args.gpus_per_run, digest)
    if args.dry_run:
        return print_plan(args, plan, data)
    missing = next((folder for folder, manifest in data.items() if not manifest), None)
    if missing:
        raise InputError(
            f"{missing}: not a prepared dataset; make it with prepare.py --out {missing}, "
            "or give another --data"
        )
    return write_script(args, plan) if args.slurm else run_plan(args, plan)


if __name__ == "__main__":
    run(main)
