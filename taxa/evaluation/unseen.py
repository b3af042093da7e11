"""Sequences of genera that nobody trained on: are the ranks above right, and does confidence tell?

Two confidences of the last rank's head are compared, its logits divided by the temperature. One is
the maximum softmax probability (Hendrycks and Gimpel 2017). The other is the energy, here the
logsumexp of the logits, which is high for what is known (Liu et al. 2020, "Energy-based
Out-of-distribution Detection"). A threshold keeps 95% of the right genera of the validation split.
A sequence of the unseen split that still has as much is a false genus call.

Shapes: N sequences of a split, R ranks.
"""

import csv
from typing import NamedTuple

import numpy as np
import torch

from taxa.evaluation.evaluation import check_finite_rows, mean_logits, own_batches
from taxa.evaluation.metrics import auroc, confusion_matrix, rank_metrics
from taxa.runtime.distributed import sum_over_ranks
from taxa.runtime.files import replacing

KEEP = 0.95
CONFIDENCES = ("softmax", "energy")


class Confidence(NamedTuple):
    """Of one split, in its order; the same on every process."""

    truth: np.ndarray  # (N, R)
    predicted: np.ndarray  # (N, R)
    values: np.ndarray  # (N, 2): maximum softmax and energy of the last rank

    @property
    def right(self):
        """(N,) whether the last rank is right."""
        return self.predicted[:, -1] == self.truth[:, -1]


@torch.no_grad()
def confidence(w, model, splits, batch_size, precision, workers, temperature):
    """The Confidence of a split: the first of `splits`; the others are its other strands.

    temperature: {rank: divisor of the logits}. Raises InputError, on all processes, when a
    confidence is not finite.
    """
    split = splits[0]
    N, R = split.labels.shape
    predicted = torch.zeros(N, R, dtype=torch.int64)
    values = torch.zeros(N, len(CONFIDENCES), dtype=torch.float64)
    batches = own_batches(w, list(range(N)), batch_size)
    for rows, _, logits in mean_logits(w, model, splits, batches, precision, workers):
        best = torch.stack([z.argmax(dim=1) for z in logits.values()], dim=1)
        predicted[rows] = best.cpu()
        rank, z = list(logits.items())[-1]
        z = z.float() / temperature[rank]
        both = torch.stack([z.softmax(dim=1).max(dim=1).values, z.logsumexp(dim=1)], dim=1)
        values[rows] = both.double().cpu()
    predicted = sum_over_ranks(w, predicted).numpy()
    values = sum_over_ranks(w, values)
    check_finite_rows(w, split, values, "confidence")
    return Confidence(np.asarray(split.labels), predicted, values.numpy())


def unseen_metrics(classes, validation, test, unseen):
    """The document of metrics_unseen.json.

    classes: {rank: class table}. validation, test, unseen: the Confidence of each split.
    """
    *above, last = classes
    ranks = {}
    for i, rank in enumerate(above):
        matrix = confusion_matrix(unseen.truth[:, i], unseen.predicted[:, i], len(classes[rank]))
        ranks[rank] = rank_metrics(matrix)
    return {
        "split": "unseen",
        "sequences": len(unseen.truth),
        "seen_sequences": len(test.truth),
        "ranks": ranks,
        "confidence": {
            name: {"rank": last, **_told_apart(validation, test, unseen, i)}
            for i, name in enumerate(CONFIDENCES)
        },
    }


def _told_apart(validation, test, unseen, i):
    """How well confidence i tells the unseen split from the test split.

    The threshold is None, and what follows from it is left out, where no last rank of the
    validation split is right.
    """
    found = {"auroc": auroc(test.values[:, i], unseen.values[:, i]), "threshold": None}
    if validation.right.any():
        of_right = validation.values[validation.right, i]
        threshold = float(np.quantile(of_right, 1 - KEEP, method="lower"))
        kept = test.values[test.right, i] >= threshold
        found |= {
            "threshold": threshold,
            "right_kept": float(kept.mean()) if test.right.any() else None,
            "false_calls": float((unseen.values[:, i] >= threshold).mean()),
        }
    return found


def write_held_out(path, held, classes, test, unseen, threshold):
    """Write per_class_unseen.csv: a row for each class that was held out.

    Of each rank above, a row has the class there, the share of the held-out class's sequences for
    which that class is predicted, and the same share of the test split's sequences of the class
    above (empty where there are none). false_calls is the share that is called a known class.

    held: PreparedDataset.held_out(). classes: {rank: class table}. test, unseen: Confidence.
    threshold: of the maximum softmax probability, or None.
    """
    above = list(classes)[:-1]
    ranks = [f"{rank}_{column}" for rank in above for column in ("name", "accuracy", "known")]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["taxid", "name", "support", *ranks, "false_calls"])
        for c, row in enumerate(held[0]):
            here = held[1] == c
            cells = []
            for i, rank in enumerate(above):
                label = unseen.truth[here, i][0]
                known = test.predicted[test.truth[:, i] == label, i]
                cells.append(classes[rank][label]["name"])
                cells.append(_share(unseen.predicted[here, i] == label))
                cells.append(_share(known == label))
            called = [] if threshold is None else unseen.values[here, 0] >= threshold
            out.writerow([row["taxid"], row["name"], here.sum(), *cells, _share(called)])


def _share(right):
    return f"{np.mean(right):.6f}" if len(right) else ""


def table(document):
    """metrics_unseen.json as text."""
    width = max(14, *(len(rank) + 2 for rank in [*document["ranks"], ""]))
    lines = [f"{'rank':<{width}}{'balanced accuracy':>18}{'accuracy':>10}"]
    for rank, m in document["ranks"].items():
        lines.append(f"{rank:<{width}}{m['balanced_accuracy']:>18.4f}{m['accuracy']:>10.4f}")

    rank = document["confidence"]["softmax"]["rank"]
    lines.append(
        f"{document['sequences']:,} sequences of classes of rank {rank} that are in no other split"
    )
    lines.append(
        f"told from the {document['seen_sequences']:,} of the test split by the confidence in a "
        f"{rank}; the threshold keeps {KEEP:.0%} of the right ones of the validation split:"
    )
    lines.append(
        f"{'confidence':<{width}}{'AUROC':>8}{'threshold':>11}{'right kept (test)':>19}"
        f"{'called a ' + rank:>18}"
    )
    for name, found in document["confidence"].items():
        cells = [found.get(key) for key in ("auroc", "threshold", "right_kept", "false_calls")]
        texts = ["-" if value is None else f"{value:.4f}" for value in cells]
        lines.append(
            f"{name:<{width}}{texts[0]:>8}{texts[1]:>11}{texts[2]:>19}{texts[3]:>18}"
        )
    return "\n".join(lines)
