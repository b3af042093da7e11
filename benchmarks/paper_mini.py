"""The paper in miniature: prepare, pretrain what is not shipped, then every strategy on several seeds, each run one train.py command line.

  python benchmarks/paper_mini.py                  # make paper-mini: two backbones, all strategies, heads trained and frozen
  python benchmarks/paper_mini.py --quick          # make paper-mini QUICK=1: on fewer sequences and seeds, less of r = 1 and 20
  python benchmarks/paper_mini.py --grid heads --real REALDATA     # what training the heads is worth: few and many genera, and real DNA
  python benchmarks/paper_mini.py --list           # only print the commands

A run that is finished (metrics.json) is skipped, unless it is of other settings, which is an error; one that was cut short starts again.
Runs go --jobs at a time with one thread each. All runs on a data set pass the same number of sequences, whatever their strategy: they
are compared at equal sequences, not at equal seconds. At the end: a table of mean and standard deviation over the seeds, batch
ceilings of tiny-nt (the whole paper grid alone, on Linux: probe.json in --out, made once), and report.py's.
"""

import concurrent.futures
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pretrain  # noqa: E402
import train  # noqa: E402
from taxa.data.dataset import PreparedDataset  # noqa: E402
from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_int, run  # noqa: E402
from taxa.training.flags import MAY_CHANGE  # noqa: E402

# data set -> (genera, sequences, seed) of benchmarks/genomes.py; the pretraining genomes have seed 1, so no genus is the same
GENOMES = {"few": (40, 4000, 11), "many": (320, 4800, 12), "few-quick": (20, 640, 11), "many-quick": (106, 1600, 12)}
SPLIT = ["--test", "0.2", "--validation", "0.05"]
REAL_SPLIT, REAL_STEPS = ["--test", "0.05", "--validation", "0.01"], 200  # real DNA: as many training sequences as the others, of 19,000
BATCH = 16
RATES = {"tiny-nt": {"full": 3e-3, "random": 3e-3, "freeze75": 3e-3, "lora": 1e-2, "ia3": 3e-2},  # how they were chosen: docs/LOG.md
         "tiny-dnabert": {"full": 1e-3, "random": 1e-3, "freeze75": 3e-3, "lora": 3e-3, "ia3": 3e-2}}
TRAINED = [("full", []), ("random", []), ("freeze75", []), *(("lora", ["--r", r]) for r in ("1", "4", "20")), ("ia3", [])]
FROZEN = [(strategy, [*flags, "--heads", "frozen"]) for strategy, flags in TRAINED if strategy in ("lora", "ia3")]
PROBE = ["--memory-limit", "200MiB", "--steps", "1"]  # of tiny-nt: ceilings of some 27 sequences (freeze75: 51); 2 minutes on busy cores
PRETRAINING = {"full": (400, 6000, 1), "quick": (40, 1500, 1)}  # as GENOMES, for tiny-dnabert; a genus needs three sequences to validate


IGNORED = (*MAY_CHANGE, "dry_run", "tied")  # may differ in a finished run; pretrain.py fills in --tied


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--grid", choices=("paper", "heads"), default="paper", help="paper: two backbones on few genera; heads: tiny-nt on few and many")
    add("--quick", action="store_true", help="fewer sequences, seeds and cells")
    add("--seeds", type=positive_int, metavar="N", help="runs per cell (default 3; quick: 2)")
    add("--real", metavar="DIR", help="--grid heads: also on real FASTA files, DIR/*_db.fa with DIR/taxdmp*.zip")
    add("--jobs", type=positive_int, default=os.cpu_count(), help="runs at a time, one thread each (default: one per core)")
    add("--data", default="data/paper-mini", metavar="DIR", help="prepared data goes here (default data/paper-mini)")
    add("--out", default="runs/paper-mini", metavar="DIR", help="run folders go here (default runs/paper-mini)")
    add("--list", action="store_true", help="print the commands of the runs, and stop")
    args = parser.parse_args(argv)
    if args.real and args.grid != "heads":
        parser.error("--real goes with --grid heads")
    args.seeds = args.seeds or (2 if args.quick else 3)
    return args


def python(*arguments, threads=1):
    """Run a script of the project; returns its output. Raises InputError with the script's last line when it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise InputError(f"{shlex.join(map(str, arguments))} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def prepare_genomes(folder, genera, sequences, seed, *more):
    """Simulate and prepare a data set, unless it is there. InputError when what is there has another size."""
    if (folder / "manifest.json").is_file():
        had = PreparedDataset(folder).manifest["sequences"]
        if had != sequences:
            raise InputError(f"{folder} holds {had:,} sequences, not {sequences:,}: remove it to prepare it again, or give another --data")
        return
    fasta = folder.with_name(folder.name + "-fasta")
    python("benchmarks/genomes.py", "--genera", genera, "--sequences", sequences, "--seed", seed, "--out", fasta)
    print(python("prepare.py", "--fasta", *sorted(fasta.glob("*_db.fa")), "--taxdump", fasta / "taxdmp_simulated.zip", "--out", folder,
                 *more), end="")


def prepare_all(args):
    """The prepared data sets, {name: folder}."""
    root = Path(args.data).resolve()
    dump = sorted(Path(args.real).resolve().glob("taxdmp*.zip")) if args.real else []
    if args.real and not dump:
        raise InputError(f"--real {args.real}: no taxdmp*.zip in it")
    both = ["--tokenizers", "nt", "tiny-dnabert"]
    names = ["few"] if args.grid == "paper" else ["few", "many"]
    data = {name: root / (name + "-quick" * args.quick) for name in names}
    for folder in data.values():
        prepare_genomes(folder, *GENOMES[folder.name], *SPLIT, *both)
    if args.real:
        data["real"] = root / "real"
        if not (data["real"] / "manifest.json").is_file():
            print(python("prepare.py", "--fasta", *sorted(Path(args.real).resolve().glob("*_db.fa")), "--taxdump", dump[0],
                         "--out", data["real"], *REAL_SPLIT), end="")
    return data


def pretrain_tiny_dnabert(args):
    """Nothing ships for tiny-dnabert: pretrain it here, alone and so with all the threads, minutes."""
    out = Path(args.out).resolve() / f"pretrain-tiny-dnabert{'-quick' * args.quick}"
    folder = Path(args.data).resolve() / f"pretraining{'-quick' * args.quick}"
    prepare_genomes(folder, *PRETRAINING["quick" if args.quick else "full"], "--test", "0.01", "--validation", "0.01",
                    "--tokenizers", "nt", "tiny-dnabert")
    arguments = ["--model", "tiny-dnabert", "--data", str(folder), "--epochs", "1", "--batch-size", str(BATCH), "--lr", "2e-3",
                 "--warmup-steps", "40", "--out", str(out)]
    if (out / "metrics.json").is_file():
        check_same(out, pretrain.parse_args(arguments))
        return out
    started = time.time()
    again = "--resume" if (out / "last.pt").is_file() else "--overwrite"
    print(python("pretrain.py", *arguments, again, threads=args.jobs).splitlines()[-1], f"({time.time() - started:.0f} s)", flush=True)
    return out


def commands(args, data, weights):
    """[(name of the run folder, arguments of train.py)], seed by seed, so that a table of part of the runs is balanced.

    --quick leaves out r = 1 and 20 with frozen heads, and for tiny-dnabert altogether.
    """
    models = ("tiny-nt", "tiny-dnabert") if args.grid == "paper" else ("tiny-nt",)
    cells = TRAINED + FROZEN if args.grid == "paper" else [cell for cell in TRAINED if cell[0] != "random"] + FROZEN
    runs = []
    for seed in range(1, args.seeds + 1):
        for name, folder in data.items():
            for model in models:
                if model == "tiny-dnabert" and seed > 1:  # twice as slow: one seed
                    continue
                for strategy, flags in cells:
                    if args.quick and {"1", "20"} & set(flags) and ("frozen" in flags or model == "tiny-dnabert"):
                        continue
                    parts = [folder.name, model, strategy] + ([f"r{flags[1]}"] if strategy == "lora" else [])
                    parts += ["frozen-heads"] if "frozen" in flags else []
                    out = Path(args.out).resolve() / "-".join([*parts, f"seed{seed}"])
                    arguments = ["--model", model, "--strategy", strategy, *flags, "--data", folder, "--batch-size", BATCH,
                                 "--lr", f"{RATES[model][strategy]:g}", "--epochs", 1, "--seed", seed, "--out", out]
                    arguments += ["--max-steps", REAL_STEPS] if name == "real" else []
                    arguments += ["--weights", weights] if model == "tiny-dnabert" and strategy != "random" else []
                    runs.append((out, [str(argument) for argument in arguments]))
    return runs


def check_same(out, args):
    """InputError when the finished run in `out` had other arguments than args, or another data set."""
    had = json.loads((out / "args.json").read_text(encoding="utf-8"))
    for name, value in vars(args).items():
        if name not in IGNORED and had.get(name, value) != value:
            raise InputError(f"{out} was run with --{name.replace('_', '-')} {had[name]}, not {value}: remove it to run it again, or give "
                             "another --out")
    environment, digest = json.loads((out / "environment.json").read_text(encoding="utf-8")), PreparedDataset(args.data).digest
    if environment.get("dataset", digest) != digest:
        raise InputError(f"{out} was run on other data than {args.data} holds now: remove it to run it again, or give another --out")


def one_run(out, arguments):
    """Run train.py unless it is finished. Returns seconds, or None for a run that was there. InputError when that has other settings."""
    if (out / "metrics.json").is_file():
        check_same(out, train.parse_args(arguments))
        return None
    started = time.time()
    python("train.py", *arguments, *(["--overwrite"] if out.is_dir() else []))
    return time.time() - started


def table(runs):
    """Markdown: a line per data set, model and strategy; mean and standard deviation of the balanced accuracy over the seeds."""
    cells = {}
    for out, _ in runs:
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        cells.setdefault(out.name.rsplit("-seed", 1)[0], []).append([m["balanced_accuracy"] for m in metrics["ranks"].values()])
        ranks = list(metrics["ranks"])
    lines = [f"| run | seeds | {' | '.join(ranks)} |", "|---|---|" + "---|" * len(ranks)]
    for name, values in cells.items():
        means = [f"{statistics.mean(column):.3f}" + (f" ± {statistics.stdev(column):.3f}" if len(values) > 1 else "")
                 for column in zip(*values)]
        lines.append(f"| {name} | {len(values)} | {' | '.join(means)} |")
    return "\n".join(lines)


def probe_ceilings(args):
    """The document of probe_batch.py for figure 1d; probed unless it is there."""
    path = Path(args.out).resolve() / "probe.json"
    if not path.is_file():
        python("probe_batch.py", "--model", "tiny-nt", "--strategies", "all", *PROBE, "--device", "cpu", "--out", path)
    return path


def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    if args.list:
        names = [*(["few"] if args.grid == "paper" else ["few", "many"]), *["real"] * bool(args.real)]
        root = Path(args.data)
        data = {name: root / (name + "-quick" * (args.quick and name != "real")) for name in names}
        for _, arguments in commands(args, data, "WEIGHTS"):
            print("python train.py " + shlex.join(arguments))
        return
    data = prepare_all(args)
    weights = pretrain_tiny_dnabert(args) if args.grid == "paper" else None
    runs = commands(args, data, weights)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(one_run, *each): each for each in runs}
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                seconds = future.result()
                if seconds is not None:
                    print(f"{number}/{len(runs)} {seconds:.0f} s: python train.py {shlex.join(futures[future][1])}", flush=True)
        except BaseException:  # Ctrl-C too: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    (Path(args.out) / f"{args.grid}{'-quick' * args.quick}.md").write_text(table(runs) + "\n", encoding="utf-8")
    print(table(runs))
    print(f"{len(runs)} runs in {args.out}; {(time.time() - started) / 60:.1f} minutes")
    folders = [out for out, _ in runs] + [weights] * bool(weights)
    can_probe = args.grid == "paper" and not args.quick and sys.platform == "linux"  # which enforces the limit
    probe = ["--probe", probe_ceilings(args)] if can_probe else []
    print(python("report.py", *folders, *probe, "--out", Path(args.out).resolve() / "report"), end="")


if __name__ == "__main__":
    run(main)
