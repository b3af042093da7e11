"""Time and memory of preparing a corpus of the study's shape.

  python benchmarks/prepare.py --sequences 50000 500000 --scratch corpora
  python benchmarks/prepare.py --sequences 5181880 --scratch corpora --workers 2
  python benchmarks/prepare.py --scratch corpora --tokens dnabert --tokenizer-file PATH

For each size it simulates a corpus with `python -m taxa.data.simulate --study` in --scratch, unless
it is there, runs prepare.py on it, and prints a JSON line: wall time (s), sequences/s, CPU time (s,
all processes), and the peak of the memory of all its processes together, sampled about once a
second. "pss" counts a page that processes share once, "rss" once for each of them. It reads /proc,
so it runs on Linux only.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_int, run
from taxa.runtime.workers import available_cores

NCBI_TAXA = 2_600_000  # about what NCBI's dump has


def tree(pid):
    """`pid` and all its descendants, as /proc has them now."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    family = {pid}
    size = 0
    while len(family) > size:
        size = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    return family


def memory(pids):
    """{"pss": kB, "rss": kB} of several processes together."""
    total = {"pss": 0, "rss": 0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in lines:
            name = line.split(":")[0].lower()
            if name in total:
                total[name] += int(line.split()[1])
    return total


def measure(command):
    """Run a command; its output goes to ours.

    Returns {"seconds", "cpu_seconds", "peak_pss_gb", "peak_rss_gb", "samples"}.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    peak = {"pss": 0, "rss": 0}
    samples = 0
    while process.poll() is None:
        looked = time.perf_counter()
        now = memory(tree(process.pid))
        peak = {name: max(peak[name], now[name]) for name in peak}
        samples += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Adding up pages takes the kernel some 30 ms.
            process.wait(max(0.1, 20 * (time.perf_counter() - looked)))
    seconds = time.perf_counter() - start
    if process.returncode:
        raise InputError(f"{' '.join(command)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_pss_gb": round(peak["pss"] / 1e6, 3),
        "peak_rss_gb": round(peak["rss"] / 1e6, 3),
        "samples": samples,
    }


def simulate(corpus, sequences):
    """Write a corpus of the study's shape, unless it is there."""
    if (corpus / "Viruses_db.fa").is_file():
        return
    command = [
        sys.executable, "-m", "taxa.data.simulate", "--study", "--sequences", str(sequences),
        "--out", str(corpus), "--unused-taxa", str(NCBI_TAXA),
    ]
    subprocess.run(command, cwd=ROOT, check=True)


def prepare_command(args, corpus, out):
    """The words of prepare.py for one corpus."""
    command = [sys.executable, "prepare.py", "--out", str(out), "--overwrite",
               "--workers", str(args.workers)]
    if args.tokens == "nt":
        fasta = map(str, sorted(corpus.glob("*_db.fa")))
        return [*command, "--fasta", *fasta, "--taxdump", str(corpus / "taxdmp_simulated.zip")]
    command += ["--add-tokens", args.tokens]
    if args.tokenizer_file:
        command += ["--tokenizer-file", str(Path(args.tokenizer_file).resolve())]
    return command


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--sequences", type=positive_int, nargs="+", default=[50_000, 500_000],
        help="sizes (default 50000 500000)")
    add("--scratch", required=True, metavar="DIR",
        help="corpora and prepared folders: 2.1 kB a sequence, and 0.4 GB a size")
    add("--workers", type=positive_int, default=available_cores(),
        help="processes (default: the CPU cores)")
    add("--tokens", default="nt",
        help="nt: the whole preparation; another name: those tokens, added to it (default nt)")
    add("--tokenizer-file", metavar="FILE", help="tokenizer.json for dnabert")
    args = parser.parse_args(argv)
    for sequences in args.sequences:
        corpus = Path(args.scratch) / f"study{sequences}"
        out = Path(args.scratch) / f"prepared{sequences}"
        simulate(corpus, sequences)
        row = measure(prepare_command(args, corpus, out))
        print(json.dumps({
            "sequences": sequences,
            "tokens": args.tokens,
            "workers": args.workers,
            "cores": os.cpu_count(),
            "sequences_per_second": round(sequences / row["seconds"]),
            **row,
        }), flush=True)


if __name__ == "__main__":
    run(main)
