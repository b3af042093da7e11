"""Joint decoding, calibration and temperature, each against a loop or a library that knows nothing
of ours.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from taxa.evaluation.decode import (
    HIGHEST,
    LOWEST,
    JointDecoder,
    fit_temperature,
    log_probabilities,
    prefixes,
)
from taxa.evaluation.evaluation import Outcome, Probabilities, inconsistent_share, summarize
from taxa.evaluation.metrics import expected_calibration_error

SIZES = {"superkingdom": 3, "phylum": 7, "genus": 20}


def tree(seed, sizes=(3, 7, 20)):
    """(L, R) lineages of a random tree: every class has one parent. sizes: classes of each rank."""
    rng = np.random.default_rng(seed)
    parents = [None]  # of the classes of each rank but the first
    for above, here in itertools.pairwise(sizes):
        drawn = rng.integers(0, above, here - above)
        parents.append(np.concatenate([np.arange(above), drawn]))
    rows = []
    for leaf in range(sizes[-1]):
        row = [leaf]
        for rank in range(len(sizes) - 1, 0, -1):
            row.insert(0, int(parents[rank][row[0]]))
        rows.append(row)
    return np.array(rows)


def some_logits(seed, B=40, spread=3.0, sizes=SIZES):
    torch.manual_seed(seed)
    return {rank: spread * torch.randn(B, C) for rank, C in sizes.items()}


def naive(logits, lineages, temperature=None):
    """Per sequence: (best lineage, probability of each of its prefixes).

    In float64, one term at a time.
    """
    found = []
    for b in range(len(next(iter(logits.values())))):
        log_p = []
        for rank, z in logits.items():
            z = [float(value) / (temperature[rank] if temperature else 1.0) for value in z[b]]
            log_sum = math.log(sum(math.exp(value) for value in z))
            log_p.append([value - log_sum for value in z])
        weights = [math.exp(sum(log_p[i][c] for i, c in enumerate(lineage)))
                   for lineage in lineages]
        best = max(range(len(lineages)), key=weights.__getitem__)
        shares = []
        for depth in range(1, len(lineages[best]) + 1):
            prefix = list(lineages[best][:depth])
            shares.append(sum(weight for weight, lineage in zip(weights, lineages)
                              if list(lineage[:depth]) == prefix))
        found.append((best, [share / sum(weights) for share in shares]))
    return found


@pytest.mark.parametrize("temperature", [None, {"superkingdom": 0.5, "phylum": 1.7, "genus": 3.0}])
@pytest.mark.parametrize("seed", [0, 1])
def test_best_lineage_equals_a_loop(seed, temperature):
    logits, lineages = some_logits(seed), tree(seed)
    decoded = JointDecoder(lineages.tolist()).best(log_probabilities(logits, temperature))
    for b, (best, shares) in enumerate(naive(logits, lineages, temperature)):
        assert decoded.lineage[b] == best
        np.testing.assert_allclose(decoded.probability[b], shares, rtol=1e-5)
    assert (decoded.probability.diff(dim=1) <= 1e-6).all()  # falls from the root down


def test_scores_are_the_matrix_product_with_the_incidence():
    lineages = tree(3)
    log_probs = log_probabilities(some_logits(3))
    incidence = torch.zeros(sum(SIZES.values()), len(lineages))
    for column, lineage in enumerate(lineages.tolist()):
        for offset, c in zip((0, 3, 10), lineage):
            incidence[offset + c, column] = 1
    product = torch.cat(list(log_probs.values()), dim=1) @ incidence
    scores = JointDecoder(lineages).scores(log_probs)
    torch.testing.assert_close(scores, product, rtol=1e-5, atol=1e-5)


def test_one_rank_and_eight():
    one = {"genus": torch.tensor([[0.0, 2.0, 1.0]])}
    decoded = JointDecoder([[0], [1], [2]]).best(log_probabilities(one))
    assert decoded.lineage.tolist() == [1]
    torch.testing.assert_close(decoded.probability, one["genus"].softmax(dim=1)[:, 1:2])
    sizes = {f"rank{i}": 2 + i for i in range(8)}
    logits = some_logits(5, B=10, sizes=sizes)
    lineages = tree(5, tuple(sizes.values()))
    decoded = JointDecoder(lineages).best(log_probabilities(logits))
    assert decoded.lineage.tolist() == [best for best, _ in naive(logits, lineages)]


def test_prefixes_tell_same_names_under_different_parents_apart():
    """Class 0 of rank 1 under two parents is two prefixes."""
    found = prefixes(np.array([[0, 0], [1, 0], [1, 1]]))
    assert found[:, 0].tolist() == [0, 1, 1] and len(set(found[:, 1].tolist())) == 3


def test_joint_decoding_overrules_a_wrong_head():
    """The phylum's head prefers, narrowly, a class that belongs to another superkingdom."""
    logits = {"superkingdom": torch.tensor([[5.0, 0.0]]), "phylum": torch.tensor([[1.0, 1.1]])}
    decoded = JointDecoder([[0, 0], [1, 1]]).best(log_probabilities(logits))
    assert decoded.lineage.tolist() == [0]
    assert logits["phylum"].argmax() == 1


def naive_ece(confidence, correct):
    """Guo et al. 2017, equation 3, bin by bin."""
    total = 0.0
    for m in range(1, 16):
        inside = [i for i, p in enumerate(confidence) if (m - 1) / 15 < p <= m / 15]
        if inside:
            accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


@pytest.mark.parametrize("seed", range(4))
def test_calibration_error_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    power = (0.3, 1.0, 3.0, 0.0)[seed]  # mostly high, even, mostly low, all 1
    confidence = rng.random(300) ** power
    correct = rng.random(300) < confidence * 0.8
    expected = naive_ece(confidence, correct)
    found = expected_calibration_error(confidence, correct)
    assert found == pytest.approx(expected, rel=0, abs=1e-12)


def test_calibration_error_of_the_extremes():
    assert expected_calibration_error(np.ones(5), np.ones(5, bool)) == 0
    assert expected_calibration_error(np.ones(5), np.zeros(5, bool)) == 1


def test_fitted_temperature_is_the_minimum():
    """Labels drawn from softmax(z / 2.5): the fit finds what LBFGS finds, which lies near 2.5."""
    torch.manual_seed(0)
    logits = 6 * torch.randn(3000, 12)
    labels = torch.multinomial((logits / 2.5).softmax(dim=1), 1)[:, 0]
    found = fit_temperature(logits, labels)
    log_t = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(logits.double() / log_t.exp(), labels)
        loss.backward()
        return loss

    lbfgs.step(closure)
    assert found == pytest.approx(log_t.exp().item(), rel=1e-4)
    assert found == pytest.approx(2.5, rel=0.1)


def test_temperature_stays_in_bounds():
    logits = torch.eye(4) * 5
    right = torch.arange(4)
    wrong = (right + 1) % 4
    # Always right: sharper is always better. Always wrong: the contrary.
    assert fit_temperature(logits, right) == pytest.approx(LOWEST, rel=1e-6)
    assert fit_temperature(logits, wrong) == pytest.approx(HIGHEST, rel=1e-6)


def test_summary_has_both_decodings():
    """Two sequences, one inconsistent; by hand."""
    truth = np.array([[0, 0], [1, 1]])
    predicted = np.array([[0, 1], [1, 1]])
    joint = np.array([[0, 0], [1, 1]])
    confidence = np.array([[1.0, 0.6], [1.0, 1.0]])
    plain = Probabilities(confidence, np.array([[0.1, 0.9], [0.3, 0.1]]), joint)
    sizes = {"superkingdom": 2, "genus": 2}
    lineages = [[0, 0], [1, 1]]
    found = summarize("test", Outcome(0.7, truth, predicted, plain), sizes, lineages, "d1")
    assert found["inconsistent_lineages"] == inconsistent_share(predicted, lineages) == 0.5
    assert found["dataset_digest"] == "d1" and "scaled" not in found
    assert found["ranks"]["genus"]["accuracy"] == 0.5
    assert found["joint"]["ranks"]["genus"]["accuracy"] == 1.0
    assert found["calibration"]["genus"]["nll"] == pytest.approx(0.5)
    error = found["calibration"]["genus"]["expected_calibration_error"]
    assert error == pytest.approx(0.3)  # bins of 0.6 (wrong) and of 1.0 (right)
