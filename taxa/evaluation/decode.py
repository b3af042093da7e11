"""Joint decoding: of the lineages seen in training, the one that all heads together find likeliest.

The heads are independent, so their best classes need not belong together (a genus of viruses
under Bacteria). The score of a lineage is the sum of the log-probabilities of its classes, one
from each head,

    score(l) = sum over ranks of log p_rank(class of l at that rank),

and the best lineage has the highest score. That is the product of the log-probabilities
(B, all classes) with the 0/1 incidence matrix (all classes, L) of the lineages. Here the R columns
are gathered and added instead: this is the same sum without the zeros, and it does not depend on
how a matrix product rounds. There is no training and no prior: every lineage seen counts the same,
however often it was seen. The softmax over the L scores is the probability of a lineage, given
that it is one of them.

Also here: the temperatures that calibrate the probabilities (Guo et al. 2017, "On Calibration of
Modern Neural Networks", section 4.2).

Shapes: B sequences, C classes of a rank, R ranks (from the root down), L lineages seen in training.
"""

import math
from typing import NamedTuple

import numpy as np
import torch


class Decoded(NamedTuple):
    """The best lineage of each of B sequences."""

    lineage: torch.Tensor  # (B,) its row among the lineages
    # (B, R) column i: of all lineages that agree with it down to rank i; falls from the root down
    probability: torch.Tensor


def log_probabilities(logits, temperature=None):
    """{rank: logits (B, C)} -> {rank: log-probabilities (B, C)}, float32.

    temperature: {rank: divisor of the logits}, or None for 1.
    """
    return {
        rank: torch.log_softmax(z.float() / (temperature[rank] if temperature else 1.0), dim=1)
        for rank, z in logits.items()
    }


def prefixes(lineages):
    """Class numbers (L, R) -> (L, R): equal numbers in column i agree in all ranks from 0 to i."""
    columns = []
    for i in range(lineages.shape[1]):
        _, numbers = np.unique(lineages[:, :i + 1], axis=0, return_inverse=True)
        columns.append(numbers.reshape(-1))
    return np.stack(columns, axis=1)


class JointDecoder:
    """Decodes over a fixed set of lineages.

    lineages: (L, R) class numbers, as a checkpoint's "lineages" holds them.
    """

    def __init__(self, lineages, device="cpu"):
        lineages = np.asarray(lineages, dtype=np.int64)
        self.lineages = torch.from_numpy(lineages).to(device)  # (L, R)
        self._prefixes = torch.from_numpy(prefixes(lineages)).to(device)  # (L, R)

    def scores(self, log_probs):
        """{rank: log-probabilities (B, C)} -> (B, L)."""
        return sum(log_p[:, self.lineages[:, i]] for i, log_p in enumerate(log_probs.values()))

    def best(self, log_probs):
        """{rank: log-probabilities (B, C)} -> Decoded. Of lineages with equal scores, the first."""
        scores = self.scores(log_probs)
        best = scores.argmax(dim=1)  # (B,)
        posterior = scores.softmax(dim=1)  # (B, L)
        shared = [  # R times (B,)
            (posterior * (column == column[best, None])).sum(dim=1)
            for column in self._prefixes.T
        ]
        return Decoded(best, torch.stack(shared, dim=1).clamp(max=1.0))


# A temperature outside does not come from a model that was trained on what it is now asked.
LOWEST, HIGHEST = 0.05, 20.0


def fit_temperature(logits, labels):
    """The temperature T that minimises the mean cross-entropy of logits / T, a float.

    logits: (N, C), finite; labels: (N,). In 1/T the cross-entropy is convex, with the slope
    mean(E_p[z] - z_label), so bisection finds the zero of the slope. Without a minimum between
    0.05 and 20 (every label is the argmax, say) the nearer end is returned.
    """
    def slope(T):
        z = logits.float()
        expected = ((z / T).softmax(dim=1) * z).sum(dim=1)
        of_label = z.gather(1, labels[:, None])[:, 0]
        return float(expected.sub(of_label).double().mean())

    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(30):  # down to a relative width of 6e-9
        middle = (low + high) / 2
        if slope(math.exp(middle)) > 0:  # too sharp: more 1/T would cost
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
