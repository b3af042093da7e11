"""Sequences and their labels -> a prepared dataset folder, in five steps: index, label, split, tokenize, write. prepare() calls them.

The input is a FastaSource or a TableSource (taxa.data.sources): the steps see no difference.

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
LENGTH, TEST, VALIDATION, DEMO_SEQUENCES = 1500, 0.02, 0.10, 4000  # defaults: the study's, but for the demo's size


class Records(NamedTuple):
    """Which records of the indexed files are meant: all N, or the K that are kept. In the order of the files."""

    indexes: list  # of Index: one for each file, whole
    source: np.ndarray  # (N,) number of the file
    record: np.ndarray  # (N,) number of the record in it, from 0 on

    def of_file(self, number):
        """(n,) numbers of the records in one file."""
        return self.record[slice(*np.searchsorted(self.source, (number, number + 1)))]

    def column(self, name):
        """(N,) a column of the indexes."""
        return np.concatenate([getattr(index, name)[self.of_file(number)] for number, index in enumerate(self.indexes)])


class Labels(NamedTuple):
    """What is kept, and of which class it is."""

    records: Records  # K of them
    y: np.ndarray  # (K, R) uint16: place in the class table of each rank
    classes: dict  # {rank: class table [{"taxid", "name"}, ...]}
    dropped: list  # [{"file", "reason", "sequences", "taxids"}, ...]
    taxdump: dict  # {"file", "date", "sha256"}, or None


def prepare(source, out, mapped=map, length=LENGTH, test=TEST, validation=VALIDATION, seed=STUDY_SEED, group=None, test_ids=None,
            held_share=None, drop_duplicates=False):
    """Write labels, records, nt tokens and the manifest of a source into the empty folder `out`. Returns the manifest.

    mapped: maps a function over jobs (taxa.runtime.workers); what is written does not depend on it. length: bases of the sequences that
    are kept, None for any but 0. test, validation: shares of each class of the last rank. group: a compiled regular expression; sequences
    of a class whose headers agree in what it finds stay in one split. test_ids: a test_ids.txt; the test split is these sequences.
    held_share: share of the classes of the last rank that go whole into a fourth split, "unseen". drop_duplicates: leave out of training
    what, on either strand, is in another split too. A source that says which split a sequence is in is followed.
    Raises InputError for input that is wrong, of which nothing is left, or that leaves a split of groups empty.
    """
    ids = read_ids(test_ids) if test_ids else None
    with tempfile.TemporaryDirectory(dir=out, prefix=".scratch-") as scratch:
        records = index(source, Path(scratch), mapped, group)
        labels, held = label(source, records, length, Path(scratch)), None
        if held_share:
            labels, held, which = hold_out_classes(labels, held_share, seed)
        pinned = find_pinned(source, labels.records, mapped, test_ids, ids) if test_ids else None
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
    shares = {} if given else {"test": test, "validation": validation}
    settings = {"length": length, **shares, "seed": seed, **({"drop_duplicates": True} if drop_duplicates else {}),
                **({"group": group.pattern} if group else {}), **({"hold_out": held_share} if held_share else {}), **source.settings}
    found = {"test_ids": {"file": Path(test_ids).name, "sha256": sha256(test_ids), "sequences": len(ids),
                          "found": int(pinned.sum())}} if test_ids else {}
    found |= {"held_out": held} if held_share else {}
    return write(source, labels, part, (digest, either), changed, settings, found, out, mapped)


def prepare_demo(out):
    """Simulate the demo corpus and prepare it in a new folder `out`, to the byte as `prepare.py --demo --out OUT` does.

    Returns the manifest. Raises InputError where `out` exists and is not empty.
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
    return Records(indexes, np.repeat(np.arange(len(indexes)), [len(each.taxid) for each in indexes]),
                   np.concatenate([np.arange(len(each.taxid)) for each in indexes]))


# ---------------------------------------------------------------- label

def label(source, records, length, scratch):
    """Look up each distinct label once, drop what has no class at some rank or is of another length, number the classes. Returns Labels."""
    given, lengths = records.column("taxid"), records.column("length")
    distinct, which = np.unique(given, return_inverse=True)
    found, rows, taxdump = source.labels(distinct.tolist(), scratch)
    reasons = ["", "no bases" if length is None else f"length is not {length}",
               *sorted({each.reason for each in found.values() if each.reason})]
    reason = np.array([reasons.index(found[t].reason or "") for t in distinct.tolist()])[which]
    reason[lengths == 0 if length is None else lengths != length] = 1
    dropped = drop_report(source.files, records.source, given, reason, reasons)
    kept = np.flatnonzero(reason == 0)
    if not len(kept):
        why = ", ".join(f"{row['sequences']} in {row['file']}: {row['reason']}" for row in dropped)
        raise InputError(f"no sequence is left of {len(given)} ({why})")
    y, classes = np.empty((len(kept), len(source.ranks)), dtype="<u2"), {}
    for column, rank in enumerate(source.ranks):
        of_distinct = np.array([found[t].taxids[column] or 0 for t in distinct.tolist()])
        present, y[:, column] = np.unique(of_distinct[which[kept]], return_inverse=True)
        classes[rank] = [rows[rank][t] for t in present.tolist()]
        if len(present) > np.iinfo(y.dtype).max:
            raise InputError(f"{len(present)} classes of rank {rank}: labels are 16-bit, at most {np.iinfo(y.dtype).max}")
    if source.classes:
        y, classes = renumber(y, classes, source.classes), source.classes
    return Labels(Records(records.indexes, records.source[kept], records.record[kept]), y, classes, dropped, taxdump)


def drop_report(files, source, label, reason, reasons):
    """Rows {"file", "reason", "sequences", "taxids"} for everything that was not kept. source, label, reason: (N,)."""
    rows = []
    for number, path in enumerate(files):
        for code in range(1, len(reasons)):
            where = (source == number) & (reason == code)
            if where.any():
                rows.append({"file": path.name, "reason": reasons[code], "sequences": int(where.sum()),
                             "taxids": len(np.unique(label[where]))})
    return rows


# ---------------------------------------------------------------- split

def hold_out_classes(labels, share, seed):
    """Take whole classes of the last rank out of the table. Returns (Labels, in which their sequences are NO_CLASS; the rows of these
    classes; (M,) uint16: which of them each of their sequences is).

    Raises InputError where there is no rank above the last, and where no class of it has two classes of the last.
    """
    ranks = list(labels.classes)
    if len(ranks) < 2:
        raise InputError(f"--hold-out leaves each class of the rank above at least one {ranks[-1]}: it needs two ranks")
    held = hold_out(labels.y[:, -2], labels.y[:, -1], share, seed)
    if not held.any():
        raise InputError(f"--hold-out {share}: no {ranks[-2]} has two {ranks[-1]} classes, and the last one is never held out")
    kept, y = np.unique(labels.y[~held, -1]), labels.y.copy()
    y[:, -1] = np.where(held, NO_CLASS, np.searchsorted(kept, y[:, -1]))
    table = labels.classes[ranks[-1]]
    taken, which = np.unique(labels.y[held, -1], return_inverse=True)
    return (labels._replace(y=y, classes={**labels.classes, ranks[-1]: [table[c] for c in kept.tolist()]}),
            [table[c] for c in taken.tolist()], which.astype("<u2"))


def split(labels, test, validation, seed, group, pinned):
    """Assign each kept sequence to a split (taxa.data.splits). Returns (K,) uint8, an index into SPLITS, after them "unseen".

    pinned: (K,) bool, the test split, or None. Raises InputError for a `group` that leaves a split empty.
    """
    groups, seen = labels.records.column("group") if group else None, labels.y[:, -1] != NO_CLASS
    part = np.full(len(seen), len(SPLITS), dtype=np.uint8)
    keep = [each if each is None else each[seen] for each in (groups, pinned)]
    part[seen] = split_by_genus(labels.y[seen, -1], seed, test, validation, *keep)
    empty = [name for number, name in enumerate(SPLITS) if not (part == number).any()]
    if group and empty:
        pairs = np.unique(np.stack((labels.y[seen, -1], np.unique(groups[seen], return_inverse=True)[1])), axis=1)  # (2, P) class, group
        rank, most = list(labels.classes)[-1], np.bincount(pairs[0]).max()
        raise InputError(f"--group '{group.pattern}' leaves nothing for {' and '.join(empty)}: no {rank} has more than {most} "
                         f"group{'s' if most > 1 else ''}; a group is never divided, so a {rank} takes part in the test split from two "
                         "groups on, in validation from three on: give a REGEX that finds smaller groups, or leave out --group")
    return part


def check_given(part):
    """Raise InputError unless each of the three splits that were given has a sequence that is kept."""
    empty = [name for number, name in enumerate(SPLITS) if not (part == number).any()]
    if empty:
        raise InputError(f"no sequence that is kept is given for {' and '.join(empty)}")


def without_duplicates(source, labels, part, mapped):
    """(Labels, part) without the sequences of the training split that, on either strand, are in another split too."""
    either = np.concatenate([strands for _, strands in mapped(digest_batch, jobs(source, labels.records))])
    twice = (part == 0) & np.isin(either, either[part > 0])
    if twice.all() or not (part[~twice] == 0).any():
        raise InputError("--drop-duplicates leaves nothing to train on: every training sequence is in another split too")
    dropped = drop_report(source.files, labels.records.source, labels.records.column("taxid"), twice.astype(int),
                          ["", "training sequence that is in another split too"])
    records = labels.records._replace(source=labels.records.source[~twice], record=labels.records.record[~twice])
    return labels._replace(records=records, y=labels.y[~twice], dropped=labels.dropped + dropped), part[~twice]


def find_pinned(source, records, mapped, test_ids, ids):
    """(K,) bool: which records are among the `ids` of the file test_ids. Raises InputError if none is."""
    taxid, digest = source.taxids(records.column("taxid")), np.concatenate(
        [digest for digest, _ in mapped(digest_batch, jobs(source, records))])
    pinned = find_ids(ids, taxid, digest, copies(taxid, digest))
    if not pinned.any():
        raise InputError(f"--test-ids {test_ids}: none of its {len(ids)} sequences is among the {len(digest)} kept")
    return pinned


# ---------------------------------------------------------------- tokenize

def tokenize(source, records, part, out, mapped):
    """Write the nt tokens of each split in one pass over the bases. Returns (digest of each sequence's bases (K,) uint64, the same of
    whichever of its strands is the smaller, how many bases of each file became N, a list). records: K of them; part: (K,)."""
    changed, digest, either, at = [0] * len(source.files), *np.empty((2, len(part)), dtype=np.uint64), 0
    names = names_of(part)
    for name in names:
        (out / name).mkdir()
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(TokenWriter(out, name, nt_tokenizer().name)) for name in names]
        bar = stack.enter_context(progress(None, "nt tokens", len(part), "sequences", True))
        for number, became_n, digests, strands, ids, counts in mapped(encode_batch, jobs(source, records)):
            changed[number] += became_n
            here = slice(at, at := at + len(counts))
            digest[here], either[here] = digests, strands
            for split_number, writer in enumerate(writers):
                mine = part[here] == split_number
                writer.append(ids[np.repeat(mine, counts)], counts[mine])
            bar.update(len(counts))
    return digest, either, changed


def names_of(part):
    """The splits that a folder has: the three, and "unseen" where anything is held out."""
    return (*SPLITS, UNSEEN) if (part == len(SPLITS)).any() else SPLITS


def jobs(source, records):
    """Yield (number of the file, Index of some records, what names them in an error): what one call of encode_batch reads."""
    for number, whole in enumerate(records.indexes):
        numbers = records.of_file(number)
        kept = whole.take(numbers)
        for some in batches(kept):
            yield number, kept.take(some), source.where(number, numbers[some], kept.taxid[some])


def read_batch(job):
    """(bases in ACGTN, how many became N, digest of each sequence's bases (n,) uint64, the same of the smaller strand) of a job."""
    _, some, where = job
    bases, changed = normalize(read_sequences(some), some.length, where)
    ends = np.cumsum(some.length).tolist()
    sequences = [bases[end - length:end] for end, length in zip(ends, some.length.tolist())]
    digests = [hashlib.blake2b(each, digest_size=8).digest() for each in sequences]
    others = [hashlib.blake2b(reverse_complement(each), digest_size=8).digest() for each in sequences]
    digest, other = (np.frombuffer(b"".join(each), dtype=">u8").astype(np.uint64) for each in (digests, others))
    return bases, changed, digest, np.minimum(digest, other)


def digest_batch(job):
    """As the last two of read_batch(), of a job."""
    return read_batch(job)[2:]


def encode_batch(job):
    """(number of the file, bases changed to N, the digests of read_batch(), nt ids joined, ids per sequence) of a job."""
    bases, changed, *digests = read_batch(job)
    return job[0], changed, *digests, *nt_tokenizer().encode(bases, job[1].length)


# ---------------------------------------------------------------- write

def write(source, labels, part, digests, changed, settings, found, out, mapped):
    """Write labels, where each sequence comes from, the ids of the test split and the manifest. Returns the manifest."""
    records, y, classes, (digest, either) = labels.records, labels.y, labels.classes, digests
    taxid = source.taxids(records.column("taxid"))
    names = names_of(part)
    for number, name in enumerate(names):
        rows = part == number
        save_array(out / name / "labels.npy", y[rows])
        save_array(out / name / "records.npy", np.rec.fromarrays((records.source[rows], records.record[rows], taxid[rows]), dtype=RECORD))
    in_test, in_train = part == SPLITS.index("test"), part == SPLITS.index("train")
    write_ids(out / "test_ids.txt", taxid[in_test], digest[in_test], copies(taxid, digest)[in_test])
    manifest = {
        "sequences": len(part),
        "splits": {name: int((part == number).sum()) for number, name in enumerate(names)},
        "superkingdoms": {row["name"]: int((y[:, source.ranks.index("superkingdom")] == i).sum())
                          for i, row in enumerate(classes.get("superkingdom", []))},
        "settings": settings,
        "sources": [{"file": path.name, "bytes": path.stat().st_size, "sha256": hexadecimal, "sequences": len(each.taxid),
                     "letters_changed_to_N": became_n}
                    for path, hexadecimal, each, became_n in zip(source.files, mapped(sha256, source.files), records.indexes, changed)],
        "taxdump": labels.taxdump,
        "dropped": labels.dropped,
        "repeated": {"sequences": len(part) - len(np.unique(digest)),
                     "test_in_train": int(np.isin(digest[in_test], digest[in_train]).sum()),
                     "across_splits": write_across(out / ACROSS, source.files, records, taxid, part, either)},
        **untrained(y[in_train], classes),
        **found,
        "classes": classes,
    }
    return write_manifest(out, manifest, nt_tokenizer())


def untrained(y, classes):
    """{"without_training": {rank: number of classes}} of the ranks where the training split, labels y (N, R), lacks any; else {}."""
    lacking = {rank: len(table) - len(np.unique(y[:, i])) for i, (rank, table) in enumerate(classes.items())}
    lacking = {rank: count for rank, count in lacking.items() if count}
    return {"without_training": lacking} if lacking and len(y) else {}


def write_across(path, files, records, taxid, part, either):
    """{"test in train": n, ...}: sequences that, on either strand, are in an earlier split too; where there are any, a table names them.

    either: (K,) the digest of the smaller strand.
    """
    names, counts, lines = names_of(part), {}, []
    for later in range(1, len(names)):
        for earlier in range(later):
            found = np.flatnonzero((part == later) & np.isin(either, either[part == earlier]))
            if len(found):
                counts[f"{names[later]} in {names[earlier]}"] = len(found)
            lines += [f"{names[later]}\t{names[earlier]}\t{files[records.source[i]].name}\t{records.record[i] + 1}\t{taxid[i]}\n"
                      for i in found.tolist()]
    if lines:
        path.write_text("split\talso in\tfile\trecord\ttaxid\n" + "".join(lines), encoding="utf-8")
    return counts
