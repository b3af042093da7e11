"""Sequences per second from the memory map to the step: shuffled batches as train.py asks for them.

  python benchmarks/loader.py                      # a simulated split: 500,000 of 251 tokens
  python benchmarks/loader.py --data data/bertax   # the train split of a prepared dataset
  python benchmarks/loader.py --workers 2          # batches made by two processes beside the loop

One round is an epoch in train.py's own order (taxa.data.batches.micro_batches) through the same
DataLoader. A step takes the batch and does nothing. The script prints the median over the rounds
and their range as one JSON line.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taxa import RANKS
from taxa.data.batches import micro_batches
from taxa.data.dataset import PreparedDataset, TokenSplit, TokenWriter
from taxa.runtime.cli import Parser, non_negative_int, positive_int, run

CLASSES = {rank: 1000 for rank in RANKS}


def simulate(folder, sequences, tokens):
    """A train split of random ids, written as prepare.py writes one."""
    (folder / "train").mkdir(parents=True)
    random = np.random.RandomState(0)
    with TokenWriter(folder, "train", "nt") as writer:
        for start in range(0, sequences, 10_000):
            n = min(10_000, sequences - start)
            writer.append(random.randint(5, 4107, n * tokens).astype("<u2"), np.full(n, tokens))
    labels = random.randint(0, 1000, (sequences, len(RANKS))).astype("<u2")
    np.save(folder / "train" / "labels.npy", labels)
    return TokenSplit(folder, "train", "nt", 1, CLASSES)


def epoch(split, batch_size, workers, seed):
    """Sequences per second of one shuffled pass.

    The order is made before the clock starts, as it is once per epoch in train.py.
    """
    plan = micro_batches(len(split), seed, 0, batch_size, 1, rank=0, size=1)
    batches = [rows for micros, _ in plan for rows, _ in micros]
    loader = iter(DataLoader(split, batch_size=None, sampler=batches, num_workers=workers))
    start = time.perf_counter()
    seen = 0
    for batch in loader:
        seen += len(batch["input_ids"])
    return seen / (time.perf_counter() - start)


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="prepared dataset (default: a simulated split)")
    add("--tokenizer", default="nt", metavar="NAME", help="tokens of --data to read (default nt)")
    add("--sequences", type=positive_int, default=500_000, metavar="N",
        help="of the simulated split (default 500000: 250 MB)")
    add("--batch-size", type=positive_int, default=128, metavar="B",
        help="sequences per batch (default 128)")
    add("--workers", type=non_negative_int, default=0,
        help="processes that load (default 0: in the loop)")
    add("--rounds", type=positive_int, default=5, help="epochs (default 5)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        if args.data:
            split = PreparedDataset(args.data).split("train", args.tokenizer)
        else:
            split = simulate(Path(scratch), args.sequences, tokens=251)
        rates = [epoch(split, args.batch_size, args.workers, seed) for seed in range(args.rounds)]
    print(json.dumps({
        "sequences": len(split),
        "batch_size": args.batch_size,
        "workers": args.workers,
        "sequences_per_s": round(statistics.median(rates)),
        "lowest": round(min(rates)),
        "highest": round(max(rates)),
    }))
    return rates


if __name__ == "__main__":
    run(main)
