"""What predict.py costs beyond the network, and whether its memory grows with the reads.

  python benchmarks/predict.py                      # speed beside the bare forward: four minutes
  python benchmarks/predict.py --megabytes 50 500   # peak memory for so many MB: four minutes

Weights are random, with 4, 57 and 1884 classes; reads have 1500 bases.

Speed: predict.py and the bare forward pass on the same batches run in turn, --rounds times, after
one batch that does not count. predict.py's share includes reading, tokenizing, decoding and
writing, not loading. Rates are medians of the rounds; ratios are median (lowest to highest) of the
rounds. On a machine that others use too, the ratio of CPU times says more than that of wall times.

Memory: each size is one process, with a network of one tiny layer, so that it ends; the number is
the kernel's peak resident set of that process.

Each row of the table is printed when it is measured. predict.py says on standard error how far it
is.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, whose predict.py is this file

import predict
from taxa.backbones import FAMILIES, backbone_config, get_model
from taxa.data.batches import read_ahead
from taxa.data.tokens import NTTokenizer
from taxa.evaluation.decode import JointDecoder
from taxa.model import TaxonClassifier
from taxa.prediction.reads import records, slices
from taxa.prediction.writers import LineWriter
from taxa.runtime.cli import Parser, positive_int, run
from taxa.runtime.distributed import world
from taxa.training import checkpoint
from taxa.training.settings import settings_from_flags

CLASSES = {"superkingdom": 4, "phylum": 57, "genus": 1884}
SIZES = {"tiny-nt": (256, 32)}  # reads, batch size
OTHERS = (16, 8)  # a read of nt50m takes about half a second
SMALLEST = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
}


def write_checkpoint(path, model, batch_size, sizes):
    """A ckpt.pt of random weights."""
    config = backbone_config(model)
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    classifier = TaxonClassifier(FAMILIES[get_model(model).family].model(config), CLASSES)
    classes = {
        rank: [{"taxid": i + 1, "name": f"{rank} {i}"} for i in range(C)]
        for rank, C in CLASSES.items()
    }
    tokenizer = NTTokenizer()
    checkpoint.save(path, {
        "model": model,
        "config": config.to_dict(),
        "base": {"source": "none", "config": None},
        "settings": settings_from_flags(model, "random"),
        "state": dict(classifier.state_dict()),
        "classes": classes,
        "lineages": [[i % 57 % 4, i % 57, i] for i in range(CLASSES["genus"])],
        "precision": "fp32",
        "batch_size": batch_size,
        "window": {"length": 1500, "varied": False},
        "tokenizer": {
            "name": "nt",
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "pad_token_id": 1,
        },
    })


def write_reads(path, count):
    """`count` reads of 1500 bases, in lines of 80."""
    rng = np.random.default_rng(0)
    blocks = []  # at most 1000 different reads
    for _ in range(min(count, 1000)):
        bases = "".join(rng.choice(list("ACGT"), 1500))
        blocks.append("\n".join(bases[i:i + 80] for i in range(0, 1500, 80)))
    with open(path, "w") as file:
        file.writelines(f">read{i}\n{blocks[i % len(blocks)]}\n" for i in range(count))


def speed(model_name, threads, reads, batch_size, rounds, scratch):
    """One row: reads/s of the bare forward and of predict.py, and the ratios of their wall and CPU
    times, median (lowest to highest).
    """
    torch.set_num_threads(threads)
    ckpt, fasta, out = scratch / "ckpt.pt", scratch / "reads.fa", scratch / "out.tsv"
    write_checkpoint(ckpt, model_name, batch_size, {})
    write_reads(fasta, reads)
    content = checkpoint.read(ckpt)
    model = checkpoint.rebuild(content)
    classes, lineages = content["classes"], content["lineages"]
    args = predict.parse_args([str(ckpt), str(fasta), "--out", str(out)])

    def pieces():
        stream = records(str(fasta))
        return slices(stream, NTTokenizer(), 1500, batch_size, predict.BATCHES_PER_SLICE)

    batches = [batch for piece in pieces() for _, _, batch in piece.batches]

    @torch.no_grad()
    def bare(batches):
        started = time.perf_counter()
        used = time.process_time()
        for batch in batches:
            model(**batch)
        return time.perf_counter() - started, time.process_time() - used

    def whole():
        with world("cpu") as w:
            forward = predict.Forward(w, model, JointDecoder(lineages), "fp32")
            writer = LineWriter(args, classes, lineages)
            done = predict.predict(w, args, forward, writer, read_ahead(pieces()))
        return done["seconds"], done["cpu_seconds"]

    bare(batches[:1])
    # (rounds, bare or whole, wall or CPU seconds)
    times = np.array([(bare(batches), whole()) for _ in range(rounds)])
    rates = reads / np.median(times[:, :, 0], axis=0)
    return {
        "model": model_name,
        "threads": threads,
        "reads": reads,
        "batch size": batch_size,
        "rounds": rounds,
        "bare reads/s": f"{rates[0]:.2f}",
        "predict.py reads/s": f"{rates[1]:.2f}",
        "time over bare": _quantiles(times[:, 1, 0] / times[:, 0, 0]),
        "CPU time over bare": _quantiles(times[:, 1, 1] / times[:, 0, 1]),
    }


def _quantiles(ratios):
    return "{1:.3f} ({0:.3f} to {2:.3f})".format(*np.quantile(ratios, (0, 0.5, 1)))


def memory(megabytes, scratch):
    """One row: the peak resident set of predict.py for so many 10^6 bases."""
    reads = megabytes * 10**6 // 1500
    ckpt, fasta, out = scratch / "ckpt.pt", scratch / "reads.fa", scratch / "out.tsv"
    write_checkpoint(ckpt, "tiny-nt", 128, SMALLEST)
    write_reads(fasta, reads)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, ROOT / "predict.py", ckpt, fasta, "--out", out, "--device", "cpu"])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {
        "MB of reads": megabytes,
        "reads": reads,
        "seconds": f"{time.perf_counter() - started:.1f}",
        "peak resident MB": f"{usage.ru_maxrss * 1024 / 10**6:.1f}",
    }


def rows(args, scratch):
    """Yield the rows, each when it is measured."""
    if args.megabytes:
        yield from (memory(megabytes, scratch) for megabytes in args.megabytes)
        return
    for model in args.models:
        reads, batch_size = SIZES.get(model, OTHERS)
        reads = args.reads or reads
        batch_size = args.batch_size or batch_size
        for threads in args.threads:
            print(f"{model}, {threads} thread{'s' if threads > 1 else ''}, {args.rounds} rounds:",
                  file=sys.stderr)
            yield speed(model, threads, reads, batch_size, args.rounds, scratch)


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=["tiny-nt", "nt50m"], metavar="NAME",
        help="Nucleotide Transformers (default tiny-nt nt50m)")
    add("--threads", type=positive_int, nargs="+", default=sorted({1, os.cpu_count()}),
        metavar="N", help="default 1 and all cores")
    add("--reads", type=positive_int, metavar="N",
        help="of 1500 bases, for the speed (default 256 for tiny-nt, 16 for others)")
    add("--batch-size", type=positive_int, metavar="B",
        help="default 32 for tiny-nt, 8 for others")
    add("--rounds", type=positive_int, default=5, help="default 5")
    add("--megabytes", type=positive_int, nargs="+", metavar="MB",
        help="measure memory instead, for so many 10^6 bases")
    args = parser.parse_args(argv)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(args, Path(scratch)):
            if not found:
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
            found.append(row)
    return found


if __name__ == "__main__":
    run(main)
