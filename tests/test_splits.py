"""The split: it is tested against loops that follow its docstring, and it is pinned, since every
later number depends on it.
"""

import hashlib
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from taxa.data.splits import (
    SPLITS,
    copies,
    find_ids,
    read_ids,
    shares,
    split_by_genus,
    stratified_subset,
    write_ids,
)
from taxa.errors import InputError

TRAIN, VALIDATION, TEST = range(3)
PINNED_SMALL = [2, 2, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]
PINNED_LARGE = "af0676d4779391c0c5819f09dffbb31a8059f04e95330cc1034928ad9c127bf7"
FRACTIONS = [
    (0.02, 0.10), (0.1, 0.1), (0.25, 0.25), (0.0, 0.0),
    (0.0, 0.5), (0.4, 0.1), (0.5, 0.3), (0.9, 0.05),
]


def random_genera(seed, most=200):
    """Class numbers of sequences in random order.

    There are a few large genera, and many of one, two and three sequences.
    """
    rng = np.random.RandomState(seed)
    few = rng.randint(1, 5, rng.randint(1, 30))
    many = rng.randint(1, most, rng.randint(1, 10))
    sizes = np.concatenate((few, many))
    return rng.permutation(np.repeat(rng.permutation(1000)[:len(sizes)], sizes))


def naive_shares(counts, fraction, minimum):
    """Largest remainders, one at a time, in exact arithmetic where `fraction` is exact."""
    exact = [fraction * count for count in counts]
    taken = [max(int(share), least) for share, least in zip(exact, minimum)]
    target = int(fraction * sum(counts) + Fraction(1, 2))
    while sum(taken) < target:
        open_to_more = [i for i, count in enumerate(counts) if count > 2 and exact[i] > taken[i]]
        if not open_to_more:
            break
        best = max(open_to_more, key=lambda i: (exact[i] - taken[i], -i))
        taken[best] += 1
    return taken


def naive_split(genus, seed, test, validation):
    """The docstring of split_by_genus, genus by genus, with its shares."""
    key = np.random.RandomState(seed).permutation(len(genus)).tolist()
    groups = sorted(set(genus.tolist()))
    members = []
    for group in groups:
        mine = [i for i, g in enumerate(genus.tolist()) if g == group]
        members.append(sorted(mine, key=key.__getitem__))
    counts = [len(group) for group in members]
    n_test = naive_shares(counts, test, [int(count >= 2) for count in counts])
    n_validation = naive_shares(counts, validation, [int(count >= 3) for count in counts])
    split = [TRAIN] * len(genus)
    for group, t, v in zip(members, n_test, n_validation):
        v = 0 if len(group) <= 2 else min(v, len(group) - t - 1)
        for i in group[:t]:
            split[i] = TEST
        for i in group[t:t + v]:
            split[i] = VALIDATION
    return split


def counts_of(genus, split):
    """{genus: (train, validation, test)}."""
    groups = np.unique(genus).tolist()
    return {
        group: tuple(np.bincount(split[genus == group], minlength=3).tolist()) for group in groups
    }


def test_order_of_the_names():
    assert SPLITS == ("train", "validation", "test")


@pytest.mark.parametrize("fraction", [
    Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(0), Fraction(3, 4)])
@pytest.mark.parametrize("least", [0, 1])
def test_shares_equal_naive_largest_remainders(fraction, least):
    rng = np.random.RandomState(0)
    for _ in range(100):
        counts = rng.randint(1, rng.choice([4, 20, 500]), rng.randint(1, 30))
        minimum = np.where(counts >= 3, least, 0)
        got = shares(counts, float(fraction), minimum)
        assert got.tolist() == naive_shares(counts.tolist(), fraction, minimum.tolist())


@pytest.mark.parametrize("counts, fraction, minimum, expected", [
    ([10, 10, 10, 10], 0.25, 0, [3, 3, 2, 2]),  # ties go to the earlier group
    ([10, 11, 10, 9], 0.25, 0, [3, 3, 2, 2]),  # 2.5 2.75 2.5 2.25
    ([100, 50, 3], 0.10, 1, [10, 5, 1]),  # a minimum above the share
    ([3, 3, 3, 3], 0.02, 1, [1, 1, 1, 1]),
    ([2, 1000], 0.0625, 0, [0, 63]),  # genera of one and two take no remainder
    ([7], 0.5, 0, [4]),  # 3.5 rounds up
])
def test_shares_of_small_examples(counts, fraction, minimum, expected):
    counts = np.array(counts)
    assert shares(counts, fraction, np.full(len(counts), minimum)).tolist() == expected


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.25, 0.3])
def test_sums_are_exact_where_the_minima_allow(fraction):
    rng = np.random.RandomState(1)
    exact = 0
    for _ in range(200):
        counts = rng.randint(3, 400, rng.randint(1, 60))
        least = np.ones(len(counts), dtype=int)
        got = shares(counts, fraction, least)
        target = int(np.floor(fraction * counts.sum() + 0.5))
        floors = np.maximum(np.floor(fraction * counts), 1).sum()
        assert got.sum() == max(target, floors)
        assert ((got >= 1) & (got <= np.maximum(np.ceil(fraction * counts), 1))).all()
        exact += got.sum() == target
    assert exact > 100


@pytest.mark.parametrize("test, validation", [pair for pair in FRACTIONS if pair[0] <= 0.25])
def test_split_equals_the_naive_one(test, validation):
    for seed in range(12):
        genus = random_genera(seed)
        split = split_by_genus(genus, seed, test, validation)
        assert split.dtype == np.uint8
        assert split.tolist() == naive_split(genus, seed, test, validation)


@pytest.mark.parametrize("test, validation", FRACTIONS)
def test_rules_for_small_genera_hold_at_every_fraction(test, validation):
    for seed in range(30):
        genus = random_genera(seed, most=20)
        split = split_by_genus(genus, seed, test, validation)
        for train, val, tested in counts_of(genus, split).values():
            n = train + val + tested
            if n == 1:
                assert (train, val, tested) == (1, 0, 0)
            elif n == 2:
                assert (train, val, tested) == (1, 0, 1)
            else:
                assert min(train, val, tested) >= 1


def test_shares_of_a_corpus_like_the_study():
    rng = np.random.RandomState(0)
    counts = np.maximum(rng.lognormal(6, 1.5, 400).astype(int), 60)
    genus = rng.permutation(np.repeat(np.arange(400), counts))
    split = split_by_genus(genus, 42)
    n = np.bincount(split)
    assert n[TEST] == np.floor(0.02 * len(genus) + 0.5)
    assert n[VALIDATION] == np.floor(0.10 * len(genus) + 0.5)
    for group, (train, validation, test) in counts_of(genus, split).items():
        assert abs(test - 0.02 * counts[group]) < 1 and abs(validation - 0.10 * counts[group]) < 1


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 3), repeat=3)))
def test_tiny_genera_at_the_default_fractions(sizes):
    genus = np.repeat([5, 0, 9], sizes)
    of_size = {1: (1, 0, 0), 2: (1, 0, 1), 3: (1, 1, 1)}
    expected = {g: of_size[n] for g, n in zip((5, 0, 9), sizes)}
    assert counts_of(genus, split_by_genus(genus, 0)) == expected


def test_fractions_of_zero_leave_the_one_that_the_rule_asks_for():
    genus = np.repeat(np.arange(4), [1, 2, 3, 500])
    got = counts_of(genus, split_by_genus(genus, 0, test=0.0, validation=0.0))
    assert got == {0: (1, 0, 0), 1: (1, 0, 1), 2: (1, 1, 1), 3: (498, 1, 1)}


def test_split_is_pinned():
    genus = np.array([3, 1, 3, 3, 2, 2, 7, 3, 1, 3, 3, 1, 3, 3, 3, 3])
    assert split_by_genus(genus, 42).tolist() == PINNED_SMALL
    large = np.arange(5000) ** 2 % 83
    assert hashlib.sha256(split_by_genus(large, 42).tobytes()).hexdigest() == PINNED_LARGE


def test_same_seed_same_split_and_other_seed_another():
    genus = random_genera(0)
    first = split_by_genus(genus, 1)
    assert (split_by_genus(genus.copy(), 1) == first).all()
    assert (split_by_genus(genus.tolist(), 1) == first).all()
    other = split_by_genus(genus, 2)
    assert (other != first).any()
    assert counts_of(genus, other) == counts_of(genus, first)


def test_numbers_of_the_genera_do_not_matter_but_their_order():
    genus = random_genera(3)
    renumbered = np.unique(genus, return_inverse=True)[1].astype(np.uint16)
    assert (split_by_genus(renumbered, 5) == split_by_genus(genus, 5)).all()


def test_any_order_of_the_input_keeps_the_counts():
    genus = np.repeat(np.arange(30), np.arange(1, 31))
    expected = counts_of(genus, split_by_genus(genus, 0))
    for seed in range(5):
        shuffled = np.random.RandomState(seed).permutation(genus)
        assert counts_of(shuffled, split_by_genus(shuffled, 0)) == expected


# a pinned test split, and groups

def test_the_study_has_its_published_test_split():
    weights = 1 / (20 + np.arange(1884))
    counts = np.maximum((5_181_880 * weights / weights.sum()).astype(int), 3)
    counts[0] += 5_181_880 - counts.sum()
    split = np.bincount(split_by_genus(np.repeat(np.arange(1884), counts), 42))
    assert split.tolist() == [4_560_054, 518_188, 103_638]


@pytest.mark.parametrize("seed", range(5))
def test_pinned_sequences_are_the_test_split(seed):
    genus = random_genera(seed)
    pinned = split_by_genus(genus, seed) == TEST
    assert (split_by_genus(genus, seed, pinned=pinned) == split_by_genus(genus, seed)).mean() > 0.8
    other = split_by_genus(genus, seed + 100, 0.02, 0.1, pinned=pinned)
    assert ((other == TEST) == pinned).all()
    for train, validation, test in counts_of(genus, other).values():
        assert train >= 1 and (validation >= 1 or train + validation + test <= 2)
    everything = split_by_genus(genus, seed, pinned=np.ones(len(genus), dtype=bool))
    assert (everything == TEST).all()


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_whole_and_near_their_shares(seed):
    rng = np.random.RandomState(seed)
    genus = rng.randint(0, 12, 4000)
    group = 100 * genus + rng.randint(0, 1 + 8 * genus)  # genus 0 has one group
    split = split_by_genus(genus, seed, group=rng.permutation(2000)[group])
    for g in range(12):
        mine = genus == g
        sides = [set(split[mine & (group == one)].tolist()) for one in set(group[mine].tolist())]
        assert all(len(side) == 1 for side in sides)
        if len(sides) > 2:
            assert set(split[mine].tolist()) == {TRAIN, VALIDATION, TEST}
        else:
            assert set(split[mine].tolist()) == {TRAIN}
        if len(sides) > 40:
            found = np.bincount(split[mine]) / mine.sum()
            assert found == pytest.approx([0.88, 0.10, 0.02], abs=0.02)
    again = split_by_genus(genus, seed, group=rng.permutation(2000)[group])
    assert np.bincount(again).tolist() == np.bincount(split).tolist()


@pytest.mark.parametrize("sizes, expected", [
    ([5], [TRAIN]),
    ([5, 9], [TEST, TRAIN]),
    ([5, 9, 7], {TRAIN, VALIDATION, TEST}),
    ([90, 5, 5, 2, 2], [TRAIN, VALIDATION, VALIDATION, TEST, TRAIN]),
])
def test_groups_of_a_small_genus(sizes, expected):
    group = np.repeat(np.arange(len(sizes)), sizes)
    split = split_by_genus(np.zeros(len(group), dtype=int), 0, group=group)
    of_group = [int(split[group == i][0]) for i in range(len(sizes))]
    if isinstance(expected, set):
        assert set(of_group) == expected and of_group[1] == TRAIN
    elif len(sizes) == 5:
        assert sorted(of_group) == sorted(expected) and of_group[0] == TRAIN
    else:
        assert of_group == expected


def test_ids_round_trip_and_tell_copies_apart(tmp_path):
    rng = np.random.RandomState(0)
    taxid = rng.randint(1, 6, 500)
    digest = rng.randint(0, 7, 500).astype(np.uint64) + np.uint64(2 ** 64 - 10)
    copy = copies(taxid, digest)
    seen = {}
    for i, key in enumerate(zip(taxid.tolist(), digest.tolist())):
        assert copy[i] == seen.get(key, 0)
        seen[key] = copy[i] + 1
    some = rng.random_sample(500) < 0.3
    write_ids(tmp_path / "ids", taxid[some], digest[some], copy[some])
    assert (find_ids(read_ids(tmp_path / "ids"), taxid, digest, copy) == some).all()


@pytest.mark.parametrize("text, words", [
    ("", "no ids"),
    ("1 2 3\n", "line 1"),
    (f"1 {'0' * 16} 0\n\n", "line 2"),
    ("\xe9\n", "not ASCII"),
])
def test_files_that_are_not_of_ids_are_refused(tmp_path, text, words):
    (tmp_path / "ids").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"ids: .*{words}"):
        read_ids(tmp_path / "ids")


@pytest.mark.parametrize("fraction", [0.03, 0.5, 1.0])
def test_a_stratified_subset_holds_its_share_of_every_class(fraction):
    """Against a loop: of each class the floor or the ceiling of its share, at least one sequence.

    They are the first of one shuffle.
    """
    for seed in range(5):
        labels = random_genera(seed)
        rows = stratified_subset(labels, fraction, seed)
        assert np.array_equal(rows, stratified_subset(labels, fraction, seed))
        assert (np.diff(rows) > 0).all()
        shuffled = np.random.RandomState(seed).permutation(len(labels))
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            taken = rows[labels[rows] == label]
            share = fraction * len(members)
            assert max(1, math.floor(share)) <= len(taken) <= max(1, math.ceil(share))
            assert set(taken) == set(sorted(members, key=lambda row: shuffled[row])[:len(taken)])
        least = np.unique(labels, return_counts=True)[1]
        assert len(rows) >= math.floor(fraction * len(labels) + 0.5) or (least <= 2).any()
    assert len(stratified_subset(np.repeat([4, 7], [1000, 500]), 0.03, 1)) == 45
    one, other = (stratified_subset(labels, 0.5, seed) for seed in (1, 2))
    assert not np.array_equal(one, other)
