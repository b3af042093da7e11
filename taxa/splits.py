"""Which sequence is for training, validation, test: stratified by genus (Berman et al. 2025: test 2%, validation 10%)."""

import numpy as np

SPLITS = ("train", "validation", "test")


def shares(counts, fraction, minimum):
    """How many of each group go to one part: largest remainders, at least `minimum` each.

    counts, minimum: (G,) integers. The sum is round(fraction * sum(counts)) unless the minima alone exceed it. Ties go to the
    earlier group. Returns (G,) int64.
    """
    exact = fraction * counts
    taken = np.maximum(np.floor(exact).astype(np.int64), minimum)
    missing = int(np.floor(fraction * counts.sum() + 0.5)) - taken.sum()
    remainder = np.where(counts > 2, exact - taken, -1.0)  # below zero: already over its share
    order = np.argsort(-remainder, kind="stable")
    order = order[remainder[order] > 0]
    taken[order[:max(missing, 0)]] += 1
    return taken


def split_by_genus(genus, seed, test=0.02, validation=0.10):
    """Assign every sequence to a split. genus: (N,) class ids. Returns (N,) uint8, an index into SPLITS.

    Within a genus of n sequences the first of a seeded shuffle go to test, the next to validation, the rest to training. A genus of
    one trains; of two: one trains, one tests; of three or more: at least one in each split. The same seed gives the same split on every
    machine: numpy keeps RandomState's stream as it is.
    """
    genus = np.asarray(genus)
    groups, group, counts = np.unique(genus, return_inverse=True, return_counts=True)
    n_test = shares(counts, test, minimum=np.where(counts >= 2, 1, 0))
    n_test = np.where(counts >= 3, np.minimum(n_test, counts - 2), n_test)
    n_validation = shares(counts, validation, minimum=np.where(counts >= 3, 1, 0))
    n_validation = np.where(counts <= 2, 0, np.minimum(n_validation, counts - n_test - 1))
    key = np.random.RandomState(seed).permutation(len(genus))
    order = np.lexsort((key, group))  # genus by genus, shuffled within
    place = np.empty(len(genus), dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    place[order] = np.arange(len(genus)) - np.repeat(starts, counts)  # place of each sequence within its genus
    in_test = place < n_test[group]
    in_validation = ~in_test & (place < (n_test + n_validation)[group])
    return (in_validation + 2 * in_test).astype(np.uint8)
