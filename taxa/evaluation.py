"""Run a classifier over a split, on every process, no sequence twice, and write down what came out."""

import csv
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from taxa.distributed import sum_over_ranks
from taxa.files import replacing, write_json
from taxa.metrics import confusion_matrix, per_class, rank_metrics
from taxa.model import sequence_losses
from taxa.precision import autocast
from taxa.progress import progress


class Outcome(NamedTuple):
    """Of one split, in its order; the same on every process."""

    loss: float  # mean over sequences of the summed cross-entropy
    truth: np.ndarray  # (N, R)
    predicted: np.ndarray  # (N, R)


@torch.no_grad()
def run_split(w, model, split, batch_size, precision="fp32", workers=0):
    """Predict every sequence of a split. Batch k goes to process k modulo their number, so batches do not depend on how many there are.

    model: the bare classifier, not its DDP wrapper. Leaves it in eval mode.
    """
    model.eval()
    N, R = split.labels.shape
    batches = [range(start, min(start + batch_size, N)) for start in range(0, N, batch_size)][w.rank::w.size]
    losses, predicted = torch.zeros(N, dtype=torch.float64), torch.zeros(N, R, dtype=torch.int64)
    loader = DataLoader(split, batch_size=None, sampler=[list(batch) for batch in batches], num_workers=workers,
                        pin_memory=w.device.type == "cuda")
    for rows, batch in zip(progress(batches, f"{split.name}", unit="batch"), loader):
        batch = {name: tensor.to(w.device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(w.device, precision):
            logits = model(batch["input_ids"], batch["attention_mask"])
        losses[rows.start:rows.stop] = sequence_losses(logits, batch["labels"]).double().cpu()
        predicted[rows.start:rows.stop] = torch.stack([z.argmax(dim=1) for z in logits.values()], dim=1).cpu()
    losses, predicted = sum_over_ranks(w, losses), sum_over_ranks(w, predicted)  # every row is non-zero on one process only
    return Outcome(float(losses.sum() / max(N, 1)), np.asarray(split.labels), predicted.numpy())


def confusions(outcome, num_classes):
    """{rank: (C, C) confusion matrix}."""
    return {rank: confusion_matrix(outcome.truth[:, i], outcome.predicted[:, i], C) for i, (rank, C) in enumerate(num_classes.items())}


def summarize(split_name, outcome, num_classes):
    """The document that metrics.json holds."""
    ranks = {rank: rank_metrics(confusion) for rank, confusion in confusions(outcome, num_classes).items()}
    return {"split": split_name, "sequences": len(outcome.truth), "loss": outcome.loss, "ranks": ranks}


def table(metrics):
    """metrics.json as a fixed-width table."""
    lines = [f"{'rank':<14}{'balanced accuracy':>18}{'accuracy':>10}{'macro F1':>10}"]
    lines += [f"{rank:<14}{m['balanced_accuracy']:>18.4f}{m['accuracy']:>10.4f}{m['macro_f1']:>10.4f}"
              for rank, m in metrics["ranks"].items()]
    return "\n".join([*lines, f"{metrics['sequences']:,} sequences of the {metrics['split']} split, loss {metrics['loss']:.4f}"])


def write_tables(folder, metrics, outcome, classes):
    """metrics.json, per_class.csv and confusion_{rank}.csv (rows: truth, columns: prediction, by taxid). Names carry any split but test."""
    suffix = "" if metrics["split"] == "test" else f"_{metrics['split']}"
    matrices = confusions(outcome, {rank: len(of_rank) for rank, of_rank in classes.items()})
    with replacing(folder / f"per_class{suffix}.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["rank", "taxid", "name", "support", "predicted", "recall", "precision", "f1"])
        for rank, matrix in matrices.items():
            columns = per_class(matrix)
            for i, row in enumerate(classes[rank]):
                counts = [int(columns[key][i]) for key in ("support", "predicted")]
                ratios = [f"{columns[key][i]:.6f}" for key in ("recall", "precision", "f1")]
                out.writerow([rank, row["taxid"], row["name"], *counts, *ratios])
    for rank, matrix in matrices.items():
        with replacing(folder / f"confusion_{rank}{suffix}.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["truth", *(row["taxid"] for row in classes[rank])])
            out.writerows([row["taxid"], *counts] for row, counts in zip(classes[rank], matrix.tolist()))
    write_json(folder / f"metrics{suffix}.json", metrics)
