"""Run a classifier over a split, on every process, no sequence twice, and write down the result."""

import contextlib
import csv
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from taxa.data.batches import load_batches, on_device
from taxa.data.taxonomy import class_id
from taxa.errors import InputError
from taxa.evaluation.decode import JointDecoder, fit_temperature, log_probabilities
from taxa.evaluation.metrics import (
    BINS,
    confusion_matrix,
    expected_calibration_error,
    per_class,
    rank_metrics,
)
from taxa.runtime.distributed import exit_together, sum_over_ranks
from taxa.runtime.files import replacing, write_json
from taxa.runtime.precision import autocast
from taxa.runtime.progress import progress

# Enough for one number per rank, and their logits fit in memory.
TEMPERATURE_SEQUENCES = 20_000


class Probabilities(NamedTuple):
    """What depends on the temperature of the heads, of one split, in its order."""

    confidence: np.ndarray  # (N, R) probability of the predicted class
    nll: np.ndarray  # (N, R) negative log-probability of the true class
    joint: np.ndarray  # (N, R) the best jointly decoded lineage


class Outcome(NamedTuple):
    """Of one split, in its order; the same on every process."""

    loss: float  # mean over sequences of the summed cross-entropy
    truth: np.ndarray  # (N, R)
    predicted: np.ndarray  # (N, R)
    # As the heads give them; None where there are only classes.
    plain: Probabilities | None = None
    # With the logits of every rank divided by its temperature, where one was given.
    scaled: Probabilities | None = None


@torch.no_grad()
def batch_logits(w, model, split, batches, precision="fp32", workers=0):
    """Yield (rows, labels (B, R), {rank: logits (B, C)}), on the device, of each batch.

    batches: those of this process, each a list of rows. model: the bare classifier, not its DDP
    wrapper; it is left in eval mode.
    """
    model.eval()
    loaded = load_batches(split, batches, workers, w.device)
    for rows, batch in zip(progress(batches, f"{split.name}", unit="batch"), loaded):
        batch = on_device(batch, w.device)
        with autocast(w.device, precision):
            logits = model(batch["input_ids"], batch["attention_mask"])
        yield rows, batch["labels"], logits


def mean_logits(w, model, splits, batches, precision, workers):
    """As batch_logits(), with the mean of the logits of several splits of the same sequences.

    splits: one split, or a split and its other strands.
    """
    passes = [batch_logits(w, model, split, batches, precision, workers) for split in splits]
    for (rows, labels, logits), *others in zip(*passes):
        for rank in logits if others else ():
            all_passes = [logits[rank], *(of_other[rank] for _, _, of_other in others)]
            logits[rank] = torch.stack(all_passes).float().mean(dim=0)
        yield rows, labels, logits


def own_batches(w, rows, batch_size):
    """The batches of this process: batch k goes to process k modulo the number of processes.

    So the batches do not depend on how many processes there are.
    """
    batches = [rows[start:start + batch_size] for start in range(0, len(rows), batch_size)]
    return batches[w.rank::w.size]


def _by_rank(values):
    """R tensors (B,) -> (B, R) on the CPU."""
    return torch.stack(values, dim=1).cpu()


@torch.no_grad()
def run_split(
    w, model, split, batch_size, precision="fp32", workers=0, *,
    lineages, temperature=None, others=(),
):
    """Predict every sequence of a split -> Outcome.

    lineages: (L, R) class numbers to decode over jointly. temperature: {rank: T} for
    Outcome.scaled. others: splits whose logits are averaged with this one's, sequence by sequence
    (its other strands). Raises InputError, on all processes, when the loss of a sequence is not
    finite.
    """
    N, R = split.labels.shape
    decoder = JointDecoder(lineages, w.device)
    settings = [None, temperature] if temperature else [None]
    predicted = torch.zeros(N, R, dtype=torch.int64)
    columns = []  # for each setting of the temperature: confidence, nll and joint, each (N, R)
    for _ in settings:
        dtypes = (torch.float64, torch.float64, torch.int64)
        columns.append([torch.zeros(N, R, dtype=dtype) for dtype in dtypes])

    batches = own_batches(w, list(range(N)), batch_size)
    found = mean_logits(w, model, (split, *others), batches, precision, workers)
    for rows, labels, logits in found:
        predicted[rows] = _by_rank([z.argmax(dim=1) for z in logits.values()])
        for (confidence, nll, joint), setting in zip(columns, settings):
            log_probs = log_probabilities(logits, setting)
            highest = [log_p.max(dim=1).values.exp() for log_p in log_probs.values()]
            losses = [
                F.nll_loss(log_p, labels[:, i], reduction="none")
                for i, log_p in enumerate(log_probs.values())
            ]
            confidence[rows] = _by_rank(highest).double()
            nll[rows] = _by_rank(losses).double()
            joint[rows] = decoder.lineages[decoder.scores(log_probs).argmax(dim=1)].cpu()

    # Every row is non-zero on one process only: the sums are exact.
    predicted = sum_over_ranks(w, predicted).numpy()
    plain, *scaled = [
        Probabilities(*(sum_over_ranks(w, column).numpy() for column in of_setting))
        for of_setting in columns
    ]
    for probabilities in (plain, *scaled):
        check_finite_rows(w, split, torch.from_numpy(probabilities.nll), "loss")
    loss = float(plain.nll.sum() / max(N, 1))
    return Outcome(loss, np.asarray(split.labels), predicted, plain, *scaled)


def check_finite_rows(w, split, rows, what):
    """Raise InputError, on all processes, unless the numbers (N, any) of a split are finite.

    There is no metric of NaN. what: what the numbers are, for the message.
    """
    bad = int((~rows.isfinite().all(dim=1)).sum())
    if bad:
        exit_together(w, InputError(
            f"{bad:,} of {len(rows):,} sequences of the {split.name} split have a {what} that is "
            "not finite: this network says nothing of them; it was trained with too high a --lr, "
            "or needs --precision fp32"
        ))


@torch.no_grad()
def split_temperature(w, model, split, batch_size, precision="fp32", workers=0, others=()):
    """One temperature per rank -> ({rank: temperature}, sequences used).

    They are fitted on at most 20,000 evenly spaced sequences of a split. others: as in run_split().
    Raises InputError, on all processes, when a logit is not finite.
    """
    every = -(-len(split) // TEMPERATURE_SEQUENCES) or 1
    used = list(range(0, len(split), every))
    place = {row: i for i, row in enumerate(used)}
    found = {
        rank: torch.zeros(len(used), head.out_features)
        for rank, head in model.heads.items()
    }

    batches = own_batches(w, used, batch_size)
    for rows, _, logits in mean_logits(w, model, (split, *others), batches, precision, workers):
        for rank, z in logits.items():
            found[rank][[place[row] for row in rows]] = z.float().cpu()
    found = {rank: sum_over_ranks(w, z) for rank, z in found.items()}
    check_finite_rows(w, split, torch.cat(list(found.values()), dim=1), "logit")

    labels = torch.from_numpy(split.labels[used].astype(np.int64))
    temperature = {
        rank: fit_temperature(z, labels[:, i])
        for i, (rank, z) in enumerate(found.items())
    }
    return temperature, len(used)


def confusions(truth, predicted, num_classes):
    """{rank: (C, C) confusion matrix} of truth and predicted, both (N, R)."""
    return {
        rank: confusion_matrix(truth[:, i], predicted[:, i], C)
        for i, (rank, C) in enumerate(num_classes.items())
    }


def inconsistent_share(predicted, lineages):
    """Share of rows of predicted (N, R) that are no row of lineages (L, R).

    Such a row is, say, a genus outside the predicted phylum.
    """
    real = {tuple(row) for row in lineages}
    return sum(tuple(row) not in real for row in predicted.tolist()) / max(len(predicted), 1)


def _of_probabilities(outcome, probabilities, num_classes):
    """What metrics.json says of one setting of the temperature."""
    correct = outcome.predicted == outcome.truth
    calibration = {}
    for i, rank in enumerate(num_classes):
        error = expected_calibration_error(probabilities.confidence[:, i], correct[:, i])
        calibration[rank] = {
            "expected_calibration_error": error,
            "nll": float(probabilities.nll[:, i].mean()),
        }
    matrices = confusions(outcome.truth, probabilities.joint, num_classes)
    joint = {rank: rank_metrics(matrix) for rank, matrix in matrices.items()}
    return {"joint": {"ranks": joint}, "calibration": calibration}


def summarize(
    split_name, outcome, num_classes, lineages=None, dataset_digest=None, temperature=None
):
    """The document that metrics.json holds.

    lineages and dataset_digest go with an outcome that has probabilities, temperature with one
    that has Outcome.scaled.
    """
    matrices = confusions(outcome.truth, outcome.predicted, num_classes)
    averaged = {
        rank: {"present": len(np.unique(outcome.truth[:, i])), "classes": C}
        for i, (rank, C) in enumerate(num_classes.items())
    }
    metrics = {
        "split": split_name,
        "sequences": len(outcome.truth),
        "loss": outcome.loss,
        "ranks": {rank: rank_metrics(matrix) for rank, matrix in matrices.items()},
        "averaged_over": averaged,
    }
    if outcome.plain:
        metrics |= {
            "dataset_digest": dataset_digest,
            "inconsistent_lineages": inconsistent_share(outcome.predicted, lineages),
            **_of_probabilities(outcome, outcome.plain, num_classes),
        }
    if outcome.scaled:
        metrics["scaled"] = {
            "temperature": temperature,
            **_of_probabilities(outcome, outcome.scaled, num_classes),
        }
    return metrics


def _width(ranks):
    return max(14, *(len(rank) + 2 for rank in ranks))


def _lines(title, ranks):
    width = _width(ranks)
    lines = [f"{title:<{width}}{'balanced accuracy':>18}{'accuracy':>10}{'macro F1':>10}"]
    for rank, m in ranks.items():
        lines.append(
            f"{rank:<{width}}{m['balanced_accuracy']:>18.4f}{m['accuracy']:>10.4f}"
            f"{m['macro_f1']:>10.4f}"
        )
    return lines


def table(metrics):
    """metrics.json as a fixed-width table."""
    foot = (
        f"{metrics['sequences']:,} sequences of the {metrics['split']} split, "
        f"loss {metrics['loss']:.4f}"
    )
    return "\n".join([*_lines("rank", metrics["ranks"]), foot])


def details(metrics):
    """What metrics.json says beyond table().

    That is the classes averaged over, joint decoding and calibration, with temperatures where they
    were fitted.
    """
    temperature = metrics.get("scaled", {}).get("temperature")
    width = _width(metrics["ranks"])

    averaged = ", ".join(
        f"{n['present']:,} of {n['classes']:,} {rank}"
        for rank, n in metrics["averaged_over"].items()
    )
    inconsistent = (
        f"{metrics['inconsistent_lineages']:.1%} of the predictions are inconsistent "
        "(such as a genus outside the predicted phylum); decoded jointly:"
    )
    lines = [
        f"balanced accuracy: mean over the classes that are in the split, {averaged}",
        inconsistent,
        *_lines("rank", metrics["joint"]["ranks"]),
    ]
    if temperature:
        lines.append("decoded jointly, with the temperatures:")
        lines += _lines("rank", metrics["scaled"]["joint"]["ranks"])

    lines.append(
        "calibration: cross-entropy (NLL) and expected calibration error "
        f"(ECE, {BINS} bins)"
    )
    header = f"{'rank':<{width}}{'NLL':>8}{'ECE':>8}"
    lines.append(header + (f"{'temperature':>13}{'NLL':>8}{'ECE':>8}" if temperature else ""))
    for rank, plain in metrics["calibration"].items():
        line = f"{rank:<{width}}{plain['nll']:>8.4f}{plain['expected_calibration_error']:>8.4f}"
        if temperature:
            scaled = metrics["scaled"]["calibration"][rank]
            line += (
                f"{temperature[rank]:>13.4f}{scaled['nll']:>8.4f}"
                f"{scaled['expected_calibration_error']:>8.4f}"
            )
        lines.append(line)
    return "\n".join(lines)


def write_tables(folder, metrics, outcome, classes):
    """Write metrics.json, per_class.csv and confusion_{rank}.csv.

    The rows of a confusion matrix are the truth, its columns the predictions, by taxid. The names
    of the files carry the name of any split but test.
    """
    suffix = "" if metrics["split"] == "test" else f"_{metrics['split']}"
    num_classes = {rank: len(of_rank) for rank, of_rank in classes.items()}
    matrices = confusions(outcome.truth, outcome.predicted, num_classes)
    with _csv_writer(folder / f"per_class{suffix}.csv") as out:
        out.writerow(
            ["rank", "taxid", "name", "support", "predicted", "recall", "precision", "f1"]
        )
        for rank, matrix in matrices.items():
            columns = per_class(matrix)
            for i, row in enumerate(classes[rank]):
                counts = [int(columns[key][i]) for key in ("support", "predicted")]
                ratios = [f"{columns[key][i]:.6f}" for key in ("recall", "precision", "f1")]
                out.writerow([rank, row["taxid"], row["name"], *counts, *ratios])
    for rank, matrix in matrices.items():
        with _csv_writer(folder / f"confusion_{rank}{suffix}.csv") as out:
            ids = [class_id(row) for row in classes[rank]]
            out.writerow(["truth", *ids])
            out.writerows([one, *counts] for one, counts in zip(ids, matrix.tolist()))
    write_json(folder / f"metrics{suffix}.json", metrics)


@contextlib.contextmanager
def _csv_writer(path):
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        yield csv.writer(file)
