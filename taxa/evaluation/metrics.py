"""Metrics from confusion matrices of whole numbers: exact, whatever the number of processes.

Shapes: N sequences, C classes of a rank. confusion[t, p] counts the sequences of true class t that
were predicted as p.
"""

import math

import numpy as np

BINS = 15  # of the expected calibration error


def perplexity(loss):
    """exp of a mean loss in nats.

    A loss above 700 counts as 700: a float cannot hold the exp of a much larger one.
    """
    return math.exp(min(loss, 700.0))


def confusion_matrix(truth, predicted, num_classes):
    """truth (N,), predicted (N,) class numbers -> (C, C) int64."""
    cell = truth.astype(np.int64) * num_classes + predicted
    counts = np.bincount(cell, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes)


def balanced_accuracy(confusion):
    """Mean recall over the classes that occur in the truth."""
    support = confusion.sum(axis=1)
    present = support > 0
    return float((np.diag(confusion)[present] / support[present]).mean())


def accuracy(confusion):
    """Share of sequences predicted right."""
    return float(np.trace(confusion) / confusion.sum())


def per_class(confusion):
    """{"support", "predicted", "recall", "precision", "f1"}, each (C,).

    A ratio with nothing below the line is 0.
    """
    def ratio(above, below):
        return np.divide(above, below, out=np.zeros(len(hit)), where=below > 0)

    hit = np.diag(confusion)
    support = confusion.sum(axis=1)
    predicted = confusion.sum(axis=0)
    return {
        "support": support,
        "predicted": predicted,
        "recall": ratio(hit, support),
        "precision": ratio(hit, predicted),
        "f1": ratio(2 * hit, support + predicted),
    }


def macro_f1(confusion):
    """Mean F1 over the classes that occur in the truth or in the predictions (as scikit-learn)."""
    table = per_class(confusion)
    occurs = (table["support"] > 0) | (table["predicted"] > 0)
    return float(table["f1"][occurs].mean())


def expected_calibration_error(confidence, correct):
    """Mean over sequences of |accuracy - mean confidence| of the bin that a sequence falls in.

    There are 15 bins ((m-1)/15, m/15]. confidence (N,): the probability of the predicted class, in
    (0, 1]. correct (N,): whether that class is the true one. Source: Guo et al. 2017, "On
    Calibration of Modern Neural Networks", equation 3.
    """
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    hits = np.bincount(bins, weights=correct, minlength=BINS)
    expected = np.bincount(bins, weights=confidence, minlength=BINS)
    return float(np.abs(hits - expected).sum() / len(confidence))


def rank_metrics(confusion):
    """The three numbers of one rank."""
    return {
        "balanced_accuracy": balanced_accuracy(confusion),
        "accuracy": accuracy(confusion),
        "macro_f1": macro_f1(confusion),
    }


def auroc(positive, negative):
    """The area under the ROC curve: how often a `positive` (P,) is above a `negative` (N,).

    A tie counts half.
    """
    values = np.concatenate([positive, negative])
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]  # from 1 on, ties share their mean
    P, N = len(positive), len(negative)
    return float((ranks[:P].sum() - P * (P + 1) / 2) / (P * N))
