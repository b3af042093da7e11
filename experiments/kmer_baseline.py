"""What a bag of 6-mers reaches: the baseline for a trained network.

  python experiments/kmer_baseline.py --data data/bertax --epochs 5
  python experiments/kmer_baseline.py --data data/bertax --epochs 5 --overlapping

One linear layer per rank reads the 6-mer counts of a sequence (square root, unit length). It is
trained by AdamW with a cosine rate for the given epochs on the train split; the learning rate with
the best validation loss is tested. The 6-mers are the tokens that the network reads, one every six
bases. With --overlapping there is one at every base: six times as many, and in all six phases,
which the network never sees. The script prints the same table as evaluate.py and one JSON line.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taxa.data.dataset import PreparedDataset
from taxa.data.tokens import NTTokenizer
from taxa.evaluation.evaluation import Outcome, summarize, table
from taxa.model import sequence_losses
from taxa.runtime.cli import Parser, positive_float, positive_int, run
from taxa.training.optim import adamw, cosine_lr


def kmer_counts(split, overlapping):
    """(N, 4096) float32: 6-mer counts of every sequence, square root, scaled to length 1.

    A 6-mer with an N is left out.
    """
    nt = NTTokenizer()
    features = np.zeros((len(split), 4**6), dtype=np.float32)
    code = np.full(256, -1, dtype=np.int64)
    code[np.frombuffer(b"ATCG", dtype=np.uint8)] = range(4)
    for i in range(len(split)):
        if not overlapping:
            ids = split.tokens(i).astype(np.int64) - nt.first_kmer
            features[i] = np.bincount(ids[(ids >= 0) & (ids < 4**6)], minlength=4**6)
            continue
        letters = code[np.frombuffer(nt.decode(split.tokens(i)), dtype=np.uint8)]
        windows = np.lib.stride_tricks.sliding_window_view(letters, 6)
        windows = windows[(windows >= 0).all(axis=1)]
        features[i] = np.bincount(windows @ 4 ** np.arange(5, -1, -1), minlength=4**6)
    features = np.sqrt(features)
    return torch.from_numpy(features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-9))


def fit(data, features, labels, epochs, lr, batch_size=32, seed=42):
    """Train one linear layer per rank; returns it as a ModuleDict."""
    torch.manual_seed(seed)
    heads = torch.nn.ModuleDict({
        rank: torch.nn.Linear(4**6, C) for rank, C in data.num_classes.items()
    })
    optimizer = adamw(heads, lr)
    step = 0
    total = epochs * -(-len(features) // batch_size)
    for _ in range(epochs):
        for rows in torch.randperm(len(features)).split(batch_size):
            optimizer.param_groups[0]["lr"] = cosine_lr(step, total, lr)
            logits = {rank: head(features[rows]) for rank, head in heads.items()}
            loss = sequence_losses(logits, labels[rows]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return heads


@torch.no_grad()
def score(heads, features, labels):
    """The Outcome of the heads on one split."""
    logits = {rank: head(features) for rank, head in heads.items()}
    predicted = torch.stack([z.argmax(dim=1) for z in logits.values()], dim=1)
    return Outcome(float(sequence_losses(logits, labels).mean()), labels.numpy(), predicted.numpy())


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="prepared dataset")
    add("--epochs", type=positive_int, default=5, help="passes over the train split (default 5)")
    add("--lr", type=positive_float, nargs="+", default=[0.01, 0.03, 0.1],
        help="tried, best validation loss wins")
    add("--overlapping", action="store_true", help="count a 6-mer at every base, not every six")
    args = parser.parse_args(argv)
    data = PreparedDataset(args.data)
    features, labels = {}, {}
    for name in ("train", "validation", "test"):
        split = data.split(name, "nt")
        features[name] = kmer_counts(split, args.overlapping)
        labels[name] = torch.from_numpy(split.labels.astype(np.int64))
    tried = {}  # {learning rate: (validation loss, heads)}
    for lr in args.lr:
        heads = fit(data, features["train"], labels["train"], args.epochs, lr)
        tried[lr] = (score(heads, features["validation"], labels["validation"]).loss, heads)
    lr = min(tried, key=lambda lr: tried[lr][0])
    _, heads = tried[lr]
    outcome = score(heads, features["test"], labels["test"])
    metrics = summarize("test", outcome, data.num_classes)
    print(table(metrics))
    print(json.dumps({
        "baseline": "bag of 6-mers",
        "overlapping": args.overlapping,
        "epochs": args.epochs,
        "lr": lr,
        **metrics,
    }))
    return metrics


if __name__ == "__main__":
    run(main)
