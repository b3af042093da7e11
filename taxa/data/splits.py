"""Which sequence is for training, validation, test: stratified by genus.

The shares are those of Berman et al. 2025: test 2%, validation 10%. Their code stratifies the test
split alone.
"""

import re
from pathlib import Path

import numpy as np

from taxa.errors import InputError

SPLITS = ("train", "validation", "test")
UNSEEN = "unseen"  # a fourth split: whole genera that are in none of the three (hold_out)
# Of that split: (N,) which row of the manifest's "held_out" each sequence is.
HELD_OUT = "held_out.npy"
NO_CLASS = 2**16 - 1  # the label of a held-out genus, which no head has


def shares(counts, fraction, minimum):
    """How many of each group go to one part: largest remainders, at least `minimum` each.

    counts, minimum: (G,) integers. The sum is round(fraction * sum(counts)) unless the minima alone
    exceed it. Ties go to the earlier group. Returns (G,) int64.
    """
    exact = fraction * counts
    taken = np.maximum(np.floor(exact).astype(np.int64), minimum)
    missing = int(np.floor(fraction * counts.sum() + 0.5)) - taken.sum()
    remainder = np.where(counts > 2, exact - taken, -1.0)  # below zero: already over its share
    order = np.argsort(-remainder, kind="stable")
    order = order[remainder[order] > 0]
    taken[order[:max(missing, 0)]] += 1
    return taken


def split_by_genus(genus, seed, test=0.02, validation=0.10, group=None, pinned=None):
    """Assign every sequence to a split. genus: (N,) class ids. Returns (N,) uint8, into SPLITS.

    Within a genus of n sequences the first of a seeded shuffle go to test, the next to validation,
    the rest to training. A genus of one trains; of two: one trains, one tests; of three or more: at
    least one in each split. The same seed gives the same split on every machine: numpy keeps
    RandomState's stream as it is.

    group: (N,) ids; sequences of one genus and group stay on one side (split_groups). pinned: (N,)
    bool; these are the test split and no others. Validation takes its share of the rest, and leaves
    a genus at least one for training.
    """
    genus = np.asarray(genus)
    groups, which, counts = np.unique(genus, return_inverse=True, return_counts=True)
    n_test = shares(counts, test, minimum=np.where(counts >= 2, 1, 0))
    n_test = np.where(counts >= 3, np.minimum(n_test, counts - 2), n_test)
    if pinned is not None:
        n_test = np.bincount(which[pinned], minlength=len(groups))
    n_validation = shares(counts, validation, minimum=np.where(counts >= 3, 1, 0))
    most = np.maximum(counts - n_test - 1, 0)
    n_validation = np.where(counts <= 2, 0, np.clip(n_validation, 0, most))
    if group is not None:
        targets = np.stack((counts - n_test - n_validation, n_validation, n_test), axis=1)
        return split_groups(which, group, targets, seed)
    key = np.random.RandomState(seed).permutation(len(genus))
    # genus by genus, shuffled within
    order = np.lexsort((key, which) if pinned is None else (key, ~pinned, which))
    place = np.empty(len(genus), dtype=np.int64)  # of each sequence within its genus
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    place[order] = np.arange(len(genus)) - np.repeat(starts, counts)
    in_test = place < n_test[which]
    in_validation = ~in_test & (place < (n_test + n_validation)[which])
    return (in_validation + 2 * in_test).astype(np.uint8)


def hold_out(parent, genus, fraction, seed):
    """(N,) bool: the sequences of the held-out genera.

    They are `fraction` of all genera, seeded, but never the last one of its phylum. parent, genus:
    (N,) class ids. Phyla of one genus keep it; the others give their share by largest remainders.
    None is held out when every phylum has one genus only.
    """
    genera, first = np.unique(genus, return_index=True)
    of_genus, sizes = np.unique(parent[first], return_inverse=True, return_counts=True)[1:]
    sharing = np.where(sizes > 1, sizes, 0)
    take = shares(sharing, fraction, minimum=np.zeros_like(sharing))
    take = np.minimum(take, np.maximum(sharing - 1, 0))
    if not take.any() and sharing.any():
        take[np.argmax(sharing)] = 1
    order = np.lexsort((np.random.RandomState(seed).permutation(len(genera)), of_genus))
    place = np.empty(len(genera), dtype=np.int64)  # of each genus within its phylum, shuffled
    place[order] = np.arange(len(genera)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.isin(genus, genera[place < take[of_genus]])


def split_groups(genus, group, targets, seed):
    """As split_by_genus, but whole groups.

    genus: (N,) 0 .. G - 1; group: (N,) ids; targets: (G, 3) sequences wanted in each split. In each
    genus the groups go from the largest to the smallest, equal ones in a seeded order, each to the
    split that lacks the most sequences. A genus of one group trains; of two: the larger trains, the
    smaller tests; of three or more: at least one in each split.
    """
    _, which = np.unique(group, return_inverse=True)
    pairs = np.stack((genus, which), axis=1)
    units, unit, sizes = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    key = np.random.RandomState(seed).permutation(len(units))
    order = np.lexsort((key, -sizes, units[:, 0]))
    of_unit = np.zeros(len(units), dtype=np.uint8)
    ends = np.searchsorted(units[order, 0], np.arange(len(targets) + 1))
    for lacking, start, end in zip(targets.tolist(), ends.tolist(), ends[1:].tolist()):
        empty = {1: [0], 2: [0, 2]}.get(end - start, [0, 1, 2])
        splits = set(empty)
        for left, i in zip(range(end - start, 0, -1), order[start:end].tolist()):
            among = empty if left <= len(empty) else splits
            best = max(among, key=lambda part: (lacking[part], -part))
            empty = [part for part in empty if part != best]
            lacking[best] -= int(sizes[i])
            of_unit[i] = best
    return of_unit[unit.reshape(-1)]


def stratified_subset(labels, fraction, seed):
    """The places, in ascending order, of a seeded subset that holds `fraction` of every class, and
    of a class at least one.

    labels: (N,) class ids; 0 < fraction <= 1. Parts of a sequence go to the classes with the
    largest remainders (shares). The subset follows from labels, fraction and seed alone, on every
    machine.
    """
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    taken = np.minimum(shares(counts, fraction, minimum=np.ones_like(counts)), counts)
    # class by class, shuffled within
    order = np.lexsort((np.random.RandomState(seed).permutation(len(which)), which))
    place = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[place < taken[which[order]]])


def copies(taxid, digest):
    """(N,) int64: how many earlier sequences have this taxid and these bases.

    taxid: (N,); digest: (N,) of the bases.
    """
    order = np.lexsort((digest, taxid))  # stable: equal ones stay in input order
    taxids = taxid[order]
    digests = digest[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (taxids[1:] != taxids[:-1]) | (digests[1:] != digests[:-1])
    starts = np.flatnonzero(new)
    sizes = np.diff(np.append(starts, len(order)))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order)) - np.repeat(starts, sizes)
    return place


def write_ids(path, taxid, digest, copy):
    """One line a sequence: taxid, digest of the bases, number of the copy.

    It names the sequence wherever it stands in whatever file.
    """
    rows = zip(taxid.tolist(), digest.tolist(), copy.tolist())
    lines = [f"{t} {d:016x} {c}\n" for t, d, c in rows]
    Path(path).write_text("".join(lines), encoding="ascii")


def read_ids(path):
    """{(taxid, digest, copy)} of a file of write_ids. Raises InputError for anything else."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not ASCII text"
        raise InputError(f"--test-ids {path}: cannot be read ({why})") from None
    ids = set()
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(r"[0-9]+ [0-9a-f]{16} [0-9]+", line):
            raise InputError(
                f"--test-ids {path}: line {number} is not 'TAXID DIGEST COPY', as in "
                "test_ids.txt of a prepared folder"
            )
        taxid, digest, copy = line.split()
        ids.add((int(taxid), int(digest, 16), int(copy)))
    if not ids:
        raise InputError(f"--test-ids {path}: no ids in it")
    return ids


def find_ids(ids, taxid, digest, copy):
    """(N,) bool: which sequences are among `ids`."""
    wanted = np.array([d for _, d, _ in ids], dtype=np.uint64)
    found = np.zeros(len(digest), dtype=bool)
    for i in np.flatnonzero(np.isin(digest, wanted)).tolist():
        found[i] = (int(taxid[i]), int(digest[i]), int(copy[i])) in ids
    return found
