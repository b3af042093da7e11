"""Sequences and their labels -> a prepared dataset folder.

There are five steps, which prepare() calls: index, label, split, tokenize, write. The input is a
FastaSource or a TableSource (taxa.data.sources): the steps see no difference.

Shapes: N records of the input, K of them kept, R ranks.
"""

import contextlib
import hashlib
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from taxa import RANKS, STUDY_SEED
from taxa.data.dataset import RECORD, TokenWriter, write_manifest
from taxa.data.fasta import batches, read_sequences
from taxa.data.grammar import normalize, reverse_complement
from taxa.data.simulate import simulate
from taxa.data.sources import FastaSource
from taxa.data.splits import (
    HELD_OUT,
    NO_CLASS,
    SPLITS,
    UNSEEN,
    copies,
    find_ids,
    hold_out,
    read_ids,
    split_by_genus,
    write_ids,
)
from taxa.data.taxonomy import renumber
from taxa.data.tokens import nt_tokenizer
from taxa.errors import InputError
from taxa.runtime.files import new_folder, save_array, sha256
from taxa.runtime.progress import progress

ACROSS = "across_splits.tsv"
# The defaults are the study's, but for the demo's size.
LENGTH = 1500
TEST, VALIDATION = 0.02, 0.10
DEMO_SEQUENCES = 4000


class Records(NamedTuple):
    """Which records of the indexed files are meant: all N, or the K that are kept.

    They are in the order of the files.
    """

    indexes: list  # of Index: one for each file, whole
    source: np.ndarray  # (N,) number of the file
    record: np.ndarray  # (N,) number of the record in it, from 0 on

    def of_file(self, number):
        """(n,) numbers of the records in one file."""
        return self.record[slice(*np.searchsorted(self.source, (number, number + 1)))]

    def column(self, name):
        """(N,) a column of the indexes."""
        return np.concatenate([getattr(index, name)[self.of_file(number)]
                               for number, index in enumerate(self.indexes)])


class Labels(NamedTuple):
    """What is kept, and of which class it is."""

    records: Records  # K of them
    y: np.ndarray  # (K, R) uint16: place in the class table of each rank
    classes: dict  # {rank: class table [{"taxid", "name"}, ...]}
    dropped: list  # [{"file", "reason", "sequences", "taxids"}, ...]
    taxdump: dict  # {"file", "date", "sha256"}, or None


def prepare(source, out, mapped=map, *, length=LENGTH, test=TEST, validation=VALIDATION,
            seed=STUDY_SEED, group=None, test_ids=None, held_share=None, drop_duplicates=False):
    """Write labels, records, nt tokens and the manifest of a source into the empty folder `out`.

    Returns the manifest. A source that says which split a sequence is in is followed. Raises
    InputError for input that is wrong, of which nothing is left, or that leaves a split of groups
    empty.

    mapped: maps a function over jobs (taxa.runtime.workers); what is written does not depend on
        it.
    length: bases of the sequences that are kept, None for any but 0.
    test, validation: shares of each class of the last rank.
    group: a compiled regular expression; sequences of a class whose headers agree in what it finds
        stay in one split.
    test_ids: a test_ids.txt; the test split is these sequences.
    held_share: share of the classes of the last rank that go whole into a fourth split, "unseen".
    drop_duplicates: leave out of training what, on either strand, is in another split too.
    """
    ids = read_ids(test_ids) if test_ids else None
    with tempfile.TemporaryDirectory(dir=out, prefix=".scratch-") as scratch:
        records = index(source, Path(scratch), mapped, group)
        labels = label(source, records, length, Path(scratch))
        if held_share:
            labels, held, which = hold_out_classes(labels, held_share, seed)
        pinned = None
        if test_ids:
            pinned = find_pinned(source, labels.records, mapped, test_ids, ids)
        if source.classes:  # an external test set: all of it
            pinned = np.ones(len(labels.y), dtype=bool)
        part = source.parts(labels.records)
        given = part is not None
        if given:
            check_given(part)
        else:
            part = split(labels, test, validation, seed, group, pinned)
        if drop_duplicates:
            labels, part = without_duplicates(source, labels, part, mapped)
        digest, either, changed = tokenize(source, labels.records, part, out, mapped)
        if held_share:
            save_array(out / UNSEEN / HELD_OUT, which)

    settings = {"length": length}
    if not given:
        settings |= {"test": test, "validation": validation}
    settings["seed"] = seed
    if drop_duplicates:
        settings["drop_duplicates"] = True
    if group:
        settings["group"] = group.pattern
    if held_share:
        settings["hold_out"] = held_share
    settings |= source.settings

    found = {}
    if test_ids:
        found["test_ids"] = {
            "file": Path(test_ids).name,
            "sha256": sha256(test_ids),
            "sequences": len(ids),
            "found": int(pinned.sum()),
        }
    if held_share:
        found["held_out"] = held
    return write(source, labels, part, out, mapped, digests=(digest, either), changed=changed,
                 settings=settings, found=found)


def prepare_demo(out):
    """Simulate the demo corpus and prepare it in a new folder `out`.

    The folder is to the byte what `prepare.py --demo --out OUT` writes. Returns the manifest.
    Raises InputError where `out` exists and is not empty.
    """
    with new_folder(out) as folder:
        return prepare(simulated_source(folder), folder, map)


def simulated_source(out, sequences=DEMO_SEQUENCES, seed=STUDY_SEED, length=LENGTH, ranks=RANKS):
    """The FastaSource of a small corpus that is simulated in out/source."""
    paths = simulate(Path(out) / "source", sequences, seed, length)
    return FastaSource(paths["fasta"], paths["taxdump"], ranks)


# ---------------------------------------------------------------- index


def index(source, scratch, mapped, group):
    """Find where each record is, its label and its length. Returns Records, N of them."""
    indexes = source.index(scratch, mapped, group)
    sizes = [len(each.taxid) for each in indexes]
    return Records(
        indexes,
        source=np.repeat(np.arange(len(indexes)), sizes),
        record=np.concatenate([np.arange(size) for size in sizes]),
    )


# ---------------------------------------------------------------- label


def label(source, records, length, scratch):
    """Look up each distinct label once, drop what is not kept, number the classes. Returns Labels.

    What has no class at some rank, or is of another length, is dropped.
    """
    given = records.column("taxid")
    lengths = records.column("length")
    distinct, which = np.unique(given, return_inverse=True)
    distinct = distinct.tolist()
    found, rows, taxdump = source.labels(distinct, scratch)

    reasons = [
        "",
        "no bases" if length is None else f"length is not {length}",
        *sorted({each.reason for each in found.values() if each.reason}),
    ]
    reason = np.array([reasons.index(found[t].reason or "") for t in distinct])[which]
    reason[lengths == 0 if length is None else lengths != length] = 1
    dropped = drop_report(source.files, records.source, given, reason, reasons)
    kept = np.flatnonzero(reason == 0)
    if not len(kept):
        why = ", ".join(f"{row['sequences']} in {row['file']}: {row['reason']}" for row in dropped)
        raise InputError(f"no sequence is left of {len(given)} ({why})")

    y = np.empty((len(kept), len(source.ranks)), dtype="<u2")
    most = np.iinfo(y.dtype).max
    classes = {}
    for column, rank in enumerate(source.ranks):
        of_distinct = np.array([found[t].taxids[column] or 0 for t in distinct])
        present, y[:, column] = np.unique(of_distinct[which[kept]], return_inverse=True)
        classes[rank] = [rows[rank][t] for t in present.tolist()]
        if len(present) > most:
            raise InputError(
                f"{len(present)} classes of rank {rank}: labels are 16-bit, at most {most}")
    if source.classes:
        y, classes = renumber(y, classes, source.classes), source.classes
    some = Records(records.indexes, records.source[kept], records.record[kept])
    return Labels(some, y, classes, dropped, taxdump)


def drop_report(files, source, label, reason, reasons):
    """Rows {"file", "reason", "sequences", "taxids"} for everything that was not kept.

    source, label, reason: (N,).
    """
    rows = []
    for number, path in enumerate(files):
        for code in range(1, len(reasons)):
            where = (source == number) & (reason == code)
            if where.any():
                rows.append({
                    "file": path.name,
                    "reason": reasons[code],
                    "sequences": int(where.sum()),
                    "taxids": len(np.unique(label[where])),
                })
    return rows


# ---------------------------------------------------------------- split


def hold_out_classes(labels, share, seed):
    """Take whole classes of the last rank out of the table.

    Returns (Labels, in which their sequences are NO_CLASS; the rows of these classes; (M,) uint16:
    which of them each of their sequences is). Raises InputError where there is no rank above the
    last, and where no class of it has two classes of the last.
    """
    ranks = list(labels.classes)
    if len(ranks) < 2:
        raise InputError("--hold-out leaves each class of the rank above "
                         f"at least one {ranks[-1]}: it needs two ranks")
    held = hold_out(labels.y[:, -2], labels.y[:, -1], share, seed)
    if not held.any():
        raise InputError(f"--hold-out {share}: no {ranks[-2]} has two {ranks[-1]} classes, "
                         "and the last one is never held out")
    kept = np.unique(labels.y[~held, -1])
    taken, which = np.unique(labels.y[held, -1], return_inverse=True)
    y = labels.y.copy()
    y[:, -1] = np.where(held, NO_CLASS, np.searchsorted(kept, y[:, -1]))
    table = labels.classes[ranks[-1]]
    classes = labels.classes | {ranks[-1]: [table[c] for c in kept.tolist()]}
    rows = [table[c] for c in taken.tolist()]
    return labels._replace(y=y, classes=classes), rows, which.astype("<u2")


def split(labels, test, validation, seed, group, pinned):
    """Assign each kept sequence to a split (taxa.data.splits).

    Returns (K,) uint8, an index into SPLITS, after them "unseen". pinned: (K,) bool, the test
    split, or None. Raises InputError for a `group` that leaves a split empty.
    """
    seen = labels.y[:, -1] != NO_CLASS
    y = labels.y[seen, -1]
    groups = labels.records.column("group")[seen] if group else None
    if pinned is not None:
        pinned = pinned[seen]
    part = np.full(len(seen), len(SPLITS), dtype=np.uint8)
    part[seen] = split_by_genus(y, seed, test, validation, groups, pinned)
    empty = empty_splits(part)
    if group and empty:
        of_group = np.unique(groups, return_inverse=True)[1]
        pairs = np.unique(np.stack((y, of_group)), axis=1)  # (2, P) class, group
        most = np.bincount(pairs[0]).max()
        rank = list(labels.classes)[-1]
        raise InputError(
            f"--group '{group.pattern}' leaves nothing for {' and '.join(empty)}: "
            f"no {rank} has more than {most} group{'s' if most > 1 else ''}; "
            f"a group is never divided, so a {rank} takes part in the test split from two groups "
            "on, in validation from three on: give a REGEX that finds smaller groups, "
            "or leave out --group")
    return part


def empty_splits(part):
    """Names of those of the three splits that have no sequence."""
    return [name for number, name in enumerate(SPLITS) if not (part == number).any()]


def check_given(part):
    """Raise InputError unless each of the three splits that were given has a sequence that is
    kept.
    """
    empty = empty_splits(part)
    if empty:
        raise InputError(f"no sequence that is kept is given for {' and '.join(empty)}")


def without_duplicates(source, labels, part, mapped):
    """(Labels, part) without the sequences of the training split that, on either strand, are in
    another split too.
    """
    records = labels.records
    found = mapped(digest_batch, jobs(source, records))
    either = np.concatenate([strands for _, strands in found])
    twice = (part == 0) & np.isin(either, either[part > 0])
    if twice.all() or not (part[~twice] == 0).any():
        raise InputError("--drop-duplicates leaves nothing to train on: "
                         "every training sequence is in another split too")
    reasons = ["", "training sequence that is in another split too"]
    dropped = drop_report(
        source.files, records.source, records.column("taxid"), twice.astype(int), reasons)
    labels = labels._replace(
        records=records._replace(source=records.source[~twice], record=records.record[~twice]),
        y=labels.y[~twice],
        dropped=labels.dropped + dropped,
    )
    return labels, part[~twice]


def find_pinned(source, records, mapped, test_ids, ids):
    """(K,) bool: which records are among the `ids` of the file test_ids.

    Raises InputError if none is.
    """
    taxid = source.taxids(records.column("taxid"))
    found = mapped(digest_batch, jobs(source, records))
    digest = np.concatenate([digest for digest, _ in found])
    pinned = find_ids(ids, taxid, digest, copies(taxid, digest))
    if not pinned.any():
        raise InputError(f"--test-ids {test_ids}: none of its {len(ids)} sequences is among "
                         f"the {len(digest)} kept")
    return pinned


# ---------------------------------------------------------------- tokenize


def tokenize(source, records, part, out, mapped):
    """Write the nt tokens of each split in one pass over the bases.

    Returns (digest of each sequence's bases (K,) uint64, the same of whichever of its strands is
    the smaller, how many bases of each file became N, a list). records: K of them; part: (K,).
    """
    changed = [0] * len(source.files)
    digest, either = np.empty((2, len(part)), dtype=np.uint64)
    at = 0
    names = names_of(part)
    for name in names:
        (out / name).mkdir()
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(TokenWriter(out, name, nt_tokenizer().name))
                   for name in names]
        bar = stack.enter_context(progress(None, "nt tokens", len(part), "sequences", True))
        found = mapped(encode_batch, jobs(source, records))
        for number, became_n, digests, strands, ids, counts in found:
            changed[number] += became_n
            here = slice(at, at + len(counts))
            at += len(counts)
            digest[here] = digests
            either[here] = strands
            for split_number, writer in enumerate(writers):
                mine = part[here] == split_number
                writer.append(ids[np.repeat(mine, counts)], counts[mine])
            bar.update(len(counts))
    return digest, either, changed


def names_of(part):
    """The splits that a folder has: the three, and "unseen" where anything is held out."""
    return (*SPLITS, UNSEEN) if (part == len(SPLITS)).any() else SPLITS


def jobs(source, records):
    """Yield what one call of encode_batch reads.

    It is (number of the file, Index of some records, what names them in an error).
    """
    for number, whole in enumerate(records.indexes):
        numbers = records.of_file(number)
        kept = whole.take(numbers)
        for some in batches(kept):
            where = source.where(number, numbers[some], kept.taxid[some])
            yield number, kept.take(some), where


def read_batch(job):
    """(bases in ACGTN, how many became N, digest of each sequence's bases (n,) uint64, the same of
    the smaller strand) of a job.
    """
    _, some, where = job
    bases, changed = normalize(read_sequences(some), some.length, where)
    ends = np.cumsum(some.length).tolist()
    sequences = [bases[end - length:end] for end, length in zip(ends, some.length.tolist())]
    digest = bases_digests(sequences)
    other = bases_digests([reverse_complement(each) for each in sequences])
    return bases, changed, digest, np.minimum(digest, other)


def bases_digests(sequences):
    """(n,) uint64: BLAKE2b, 64 bits, of each of some sequences (bytes)."""
    digests = [hashlib.blake2b(each, digest_size=8).digest() for each in sequences]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def digest_batch(job):
    """As the last two of read_batch(), of a job."""
    return read_batch(job)[2:]


def encode_batch(job):
    """(number of the file, bases changed to N, the two digests of read_batch(), nt ids joined, ids
    per sequence) of a job.
    """
    number, some, _ = job
    bases, changed, *digests = read_batch(job)
    return number, changed, *digests, *nt_tokenizer().encode(bases, some.length)


# ---------------------------------------------------------------- write


def write(source, labels, part, out, mapped, *, digests, changed, settings, found):
    """Write labels, where each sequence comes from, the ids of the test split and the manifest.

    digests, changed: what tokenize() returns. settings: of the manifest. found: more entries for
    it. Returns the manifest.
    """
    records, y, classes = labels.records, labels.y, labels.classes
    digest, either = digests
    taxid = source.taxids(records.column("taxid"))
    names = names_of(part)
    for number, name in enumerate(names):
        rows = part == number
        origin = (records.source[rows], records.record[rows], taxid[rows])
        save_array(out / name / "labels.npy", y[rows])
        save_array(out / name / "records.npy", np.rec.fromarrays(origin, dtype=RECORD))
    in_train = part == SPLITS.index("train")
    in_test = part == SPLITS.index("test")
    copy = copies(taxid, digest)
    write_ids(out / "test_ids.txt", taxid[in_test], digest[in_test], copy[in_test])
    manifest = {
        "sequences": len(part),
        "splits": {name: int((part == number).sum()) for number, name in enumerate(names)},
        "superkingdoms": superkingdom_counts(y, classes),
        "settings": settings,
        "sources": [
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": hexadecimal,
                "sequences": len(each.taxid),
                "letters_changed_to_N": became_n,
            }
            for path, hexadecimal, each, became_n in zip(
                source.files, mapped(sha256, source.files), records.indexes, changed)
        ],
        "taxdump": labels.taxdump,
        "dropped": labels.dropped,
        "repeated": {
            "sequences": len(part) - len(np.unique(digest)),
            "test_in_train": int(np.isin(digest[in_test], digest[in_train]).sum()),
            "across_splits": write_across(
                out / ACROSS, source.files, records, taxid, part, either),
        },
        **untrained(y[in_train], classes),
        **found,
        "classes": classes,
    }
    return write_manifest(out, manifest, nt_tokenizer())


def superkingdom_counts(y, classes):
    """{name of a superkingdom: its sequences}; nothing where that rank is not labelled."""
    if "superkingdom" not in classes:
        return {}
    column = y[:, list(classes).index("superkingdom")]
    return {row["name"]: int((column == i).sum()) for i, row in enumerate(classes["superkingdom"])}


def untrained(y, classes):
    """{"without_training": {rank: number of classes}} of the ranks of which the training split
    lacks a class; else {}.

    y: (N, R) labels of the training split.
    """
    lacking = {}
    for i, (rank, table) in enumerate(classes.items()):
        count = len(table) - len(np.unique(y[:, i]))
        if count:
            lacking[rank] = count
    return {"without_training": lacking} if lacking and len(y) else {}


def write_across(path, files, records, taxid, part, either):
    """{"test in train": n, ...}: sequences that, on either strand, are in an earlier split too.

    Where there are any, a table at `path` names them. either: (K,) the digest of the smaller
    strand.
    """
    names = names_of(part)
    counts, lines = {}, []
    for later in range(1, len(names)):
        for earlier in range(later):
            found = np.flatnonzero((part == later) & np.isin(either, either[part == earlier]))
            if len(found):
                counts[f"{names[later]} in {names[earlier]}"] = len(found)
            for i in found.tolist():
                file = files[records.source[i]].name
                record = records.record[i] + 1
                lines.append(f"{names[later]}\t{names[earlier]}\t{file}\t{record}\t{taxid[i]}\n")
    if lines:
        header = "split\talso in\tfile\trecord\ttaxid\n"
        path.write_text(header + "".join(lines), encoding="utf-8")
    return counts
