"""What predict.py costs beyond the network, and whether its memory grows with the reads.

  python benchmarks/predict.py --model tiny-nt --reads 512                speed against the bare forward pass on the same batches
  python benchmarks/predict.py --megabytes 50 500                         peak memory of predict.py for so many MB of reads

Weights are random, with 4, 57 and 1884 classes. Speed: both ways in turn, --rounds times, after one round of each that does not count;
predict.py's share includes reading, tokenizing, decoding and writing, not loading; ratios are (lowest, median, highest) of the rounds. On
a machine that others use too, the ratio of CPU times says more than that of wall times. Memory: one process each, with a network of one
tiny layer, so that it ends; the kernel's peak resident set of each.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # instead of this folder, whose predict.py is this file

import predict  # noqa: E402
from taxa import checkpoint  # noqa: E402
from taxa.backbones import FAMILIES, backbone_config, get_model  # noqa: E402
from taxa.cli import Parser, positive_int, run  # noqa: E402
from taxa.decode import JointDecoder  # noqa: E402
from taxa.distributed import world  # noqa: E402
from taxa.model import TaxonClassifier  # noqa: E402
from taxa.reads import read_ahead, records, slices  # noqa: E402
from taxa.strategies import settings_from_flags  # noqa: E402
from taxa.tokens import NTTokenizer  # noqa: E402
from taxa.writers import LineWriter  # noqa: E402

CLASSES = {"superkingdom": 4, "phylum": 57, "genus": 1884}
SMALLEST = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)


def write_checkpoint(path, model, batch_size, sizes):
    """A ckpt.pt of random weights."""
    config = backbone_config(model)
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    classifier = TaxonClassifier(FAMILIES[get_model(model).family].model(config), CLASSES)
    classes = {rank: [{"taxid": i + 1, "name": f"{rank} {i}"} for i in range(C)] for rank, C in CLASSES.items()}
    tokenizer = NTTokenizer()
    checkpoint.save(path, {
        "model": model, "config": config.to_dict(), "base": {"source": "none", "config": None},
        "settings": settings_from_flags(model, "random"), "state": dict(classifier.state_dict()), "classes": classes,
        "lineages": [[i % 57 % 4, i % 57, i] for i in range(CLASSES["genus"])], "precision": "fp32", "batch_size": batch_size,
        "tokenizer": {"name": "nt", "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size, "pad_token_id": 1}})


def write_reads(path, count):
    """`count` reads of 1500 letters, in lines of 80."""
    rng = np.random.default_rng(0)
    blocks = ["\n".join(text[i:i + 80] for i in range(0, 1500, 80))
              for text in ("".join(rng.choice(list("ACGT"), 1500)) for _ in range(min(count, 1000)))]
    with open(path, "w") as file:
        for i in range(count):
            file.write(f">read{i}\n{blocks[i % len(blocks)]}\n")


def speed(args, scratch):
    write_checkpoint(scratch / "ckpt.pt", args.model, args.batch_size, {})
    write_reads(scratch / "reads.fa", args.reads)
    content = checkpoint.read(scratch / "ckpt.pt")
    model, writer_args = checkpoint.rebuild(content), predict.parse_args([
        str(scratch / "ckpt.pt"), str(scratch / "reads.fa"), "--out", str(scratch / "out.tsv")])

    def pieces():
        return slices(records(str(scratch / "reads.fa")), NTTokenizer(), 1500, args.batch_size, predict.BATCHES_PER_SLICE)

    batches = [batch for piece in pieces() for _, _, batch in piece.batches]

    @torch.no_grad()
    def bare():
        started, used = time.perf_counter(), time.process_time()
        for batch in batches:
            model(**batch)
        return time.perf_counter() - started, time.process_time() - used

    def whole():
        with world("cpu") as w:
            forward = predict.Forward(w, model, JointDecoder(content["lineages"]), "fp32", None, 1, False)
            done = predict.predict(w, writer_args, forward, LineWriter(writer_args, content["classes"], content["lineages"]),
                                   read_ahead(pieces()))
        return done["seconds"], done["cpu_seconds"]

    rounds = np.array([(bare(), whole()) for _ in range(args.rounds + 1)][1:])  # (rounds, bare or whole, wall or CPU seconds)
    wall, cpu = ([round(float(q), 3) for q in np.quantile(rounds[:, 1, i] / rounds[:, 0, i], (0, 0.5, 1))] for i in (0, 1))
    rates = (args.reads / np.median(rounds[:, :, 0], axis=0)).round(2).tolist()
    return {"model": args.model, "reads": args.reads, "batch_size": args.batch_size, "threads": torch.get_num_threads(),
            "bare_reads_per_s": rates[0], "predict_reads_per_s": rates[1], "time_over_bare": wall, "cpu_time_over_bare": cpu}


def memory(args, scratch):
    write_checkpoint(scratch / "ckpt.pt", "tiny-nt", 128, SMALLEST)
    lines = []
    for megabytes in args.megabytes:
        write_reads(scratch / "reads.fa", megabytes * 10**6 // 1500)
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, ROOT / "predict.py", scratch / "ckpt.pt", scratch / "reads.fa", "--out",
                                    scratch / "out.tsv", "--device", "cpu"])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(process.returncode)
        lines.append({"megabytes": megabytes, "reads": megabytes * 10**6 // 1500, "seconds": round(time.perf_counter() - started, 1),
                      "peak_resident_MB": round(usage.ru_maxrss * 1024 / 10**6, 1)})
    return lines


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default="tiny-nt", metavar="NAME", help="of the Nucleotide Transformer family (default tiny-nt)")
    add("--reads", type=positive_int, default=512, help="of 1500 letters, for the speed (default 512)")
    add("--batch-size", type=positive_int, default=32, help="default 32")
    add("--rounds", type=positive_int, default=5, help="default 5")
    add("--megabytes", type=positive_int, nargs="+", help="measure memory instead, for so many 10^6 letters")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        found = memory(args, Path(scratch)) if args.megabytes else [speed(args, Path(scratch))]
    for line in found:
        print(json.dumps(line))
    return found


if __name__ == "__main__":
    run(main)
