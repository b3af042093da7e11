"""The metrics against scikit-learn, on what runs meet: absent classes, classes never predicted, one
class alone.
"""

import numpy as np
import pytest

from taxa.evaluation.metrics import (
    accuracy,
    balanced_accuracy,
    confusion_matrix,
    macro_f1,
    per_class,
    rank_metrics,
)

sklearn = pytest.importorskip("sklearn.metrics")
# The warnings are scikit-learn's, of classes that only the truth lacks.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CASES = [
    "plain",
    "absent from the truth",
    "never predicted",
    "absent from both",
    "one class",
    "one class, all wrong",
    "perfect",
    "all wrong",
    "skewed",
    "one sequence",
]


def case(what, seed):
    """truth (N,), predicted (N,), number of classes."""
    rng = np.random.default_rng(seed)
    C, N = 12, 500
    truth, predicted = rng.integers(0, C, N), rng.integers(0, C, N)
    predicted = np.where(rng.random(N) < 0.5, truth, predicted)
    if what == "absent from the truth":
        truth = np.where(truth < 4, truth + 5, truth)
    elif what == "never predicted":
        predicted = np.where(predicted > 7, 0, predicted)
    elif what == "absent from both":
        truth, predicted = truth // 3 * 3, predicted // 3 * 3
    elif what == "one class":
        truth = np.full(N, 5)
    elif what == "one class, all wrong":
        truth, predicted = np.full(N, 5), np.full(N, 6)
    elif what == "perfect":
        predicted = truth.copy()
    elif what == "all wrong":
        predicted = (truth + 1) % C
    elif what == "skewed":
        truth = np.minimum(rng.geometric(0.5, N) - 1, C - 1)
    elif what == "one sequence":
        truth, predicted = truth[:1], predicted[:1]
    return truth, predicted, C


@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_scikit_learn(what, seed):
    truth, predicted, C = case(what, seed)
    confusion = confusion_matrix(truth, predicted, C)
    theirs = sklearn.confusion_matrix(truth, predicted, labels=range(C))
    np.testing.assert_array_equal(confusion, theirs)
    expected = {
        "balanced_accuracy": sklearn.balanced_accuracy_score(truth, predicted),
        "accuracy": sklearn.accuracy_score(truth, predicted),
        "macro_f1": sklearn.f1_score(truth, predicted, average="macro", zero_division=0),
    }
    found = rank_metrics(confusion)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=0, abs=1e-9), key
        assert type(found[key]) is float
    precision, recall, f1, support = sklearn.precision_recall_fscore_support(
        truth, predicted, labels=range(C), zero_division=0,
    )
    by_class = {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "support": support,
        "predicted": np.bincount(predicted, minlength=C),
    }
    table = per_class(confusion)
    for key, value in by_class.items():
        np.testing.assert_allclose(table[key], value, rtol=0, atol=1e-9, err_msg=key)


def test_many_classes_of_unequal_size():
    """The published size, 1884 genera, most of them absent from a small test set."""
    rng = np.random.default_rng(3)
    weights = rng.pareto(1.0, 1884)
    truth = rng.choice(1884, 3000, p=weights / weights.sum())
    predicted = np.where(rng.random(3000) < 0.6, truth, rng.integers(0, 1884, 3000))
    confusion = confusion_matrix(truth, predicted, 1884)
    expected_f1 = sklearn.f1_score(truth, predicted, average="macro", zero_division=0)
    for found, expected in (
        (balanced_accuracy, sklearn.balanced_accuracy_score(truth, predicted)),
        (macro_f1, expected_f1),
        (accuracy, sklearn.accuracy_score(truth, predicted)),
    ):
        assert found(confusion) == pytest.approx(expected, rel=0, abs=1e-9)


def test_rows_are_the_truth_and_cells_are_whole_numbers():
    confusion = confusion_matrix(np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2]), 4)
    assert confusion.dtype == np.int64
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    # recalls 1/2, 1, 2/3; class 3 does not occur
    assert balanced_accuracy(confusion) == pytest.approx((1 / 2 + 1 + 2 / 3) / 3, rel=0, abs=1e-12)
    assert accuracy(confusion) == pytest.approx(4 / 6, rel=0, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_narrow_class_numbers_do_not_overflow(dtype):
    """Labels are stored as small integers; 250 * 251 + 250 does not fit in 8 bits, nor
    1883 * 1884 in 16.
    """
    C = 251 if dtype == np.uint8 else 1884
    truth = np.array([C - 1, C - 1, 0], dtype=dtype)
    predicted = np.array([C - 1, 0, C - 1], dtype=dtype)
    confusion = confusion_matrix(truth, predicted, C)
    assert confusion.sum() == 3
    assert (confusion[C - 1, C - 1], confusion[C - 1, 0], confusion[0, C - 1]) == (1, 1, 1)


def test_confusions_of_parts_add_up():
    truth, predicted, C = case("plain", 4)
    whole = confusion_matrix(truth, predicted, C)
    parts = sum(confusion_matrix(truth[i::3], predicted[i::3], C) for i in range(3))
    assert rank_metrics(whole) == rank_metrics(parts)
