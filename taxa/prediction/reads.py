"""Reads in, as a stream, from files or standard input, in slices of bounded size.

FASTA and FASTQ are read as taxa.data.grammar reads them. A long read is cut into windows. Windows,
in the order of the input, make slices of a fixed number, and a slice makes batches of windows of
similar length. Nothing but the record being read and a few slices is ever in memory.

Shapes: W windows of a slice, B of a batch, T tokens of the longest window in it.
"""

import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from taxa.data import grammar
from taxa.data.batches import padded
from taxa.data.grammar import reverse_complement
from taxa.errors import InputError


class Record(NamedTuple):
    """One record of a file."""

    where: str  # file and record, for an error
    header: str  # the line without its > or @
    bases: bytes  # of ACGTN
    changed: int = 0  # how many of them became N
    mate: bytes | None = None  # the bases of the other read of a pair


class Read(NamedTuple):
    """What is left of a record after its bases became tokens."""

    header: str
    lengths: tuple  # bases of the read, or of each mate of a pair
    windows: int  # with an A, C, G or T: without one, a read cannot be classified
    views: int  # windows that the network sees: with both strands, the reverse complement's too
    changed: int


class Slice(NamedTuple):
    """W windows and the reads they come from.

    A read whose windows do not end here is the last one, and the first of the next slice.
    """

    reads: list  # of Read
    complete: bool  # whether the last read's windows end here
    owner: np.ndarray  # (W,) which of the reads a window comes from, in the order of `batches`
    # Of (start, stop, {"input_ids" (B, T), "attention_mask" (B, T)}): windows start to stop. These
    # are the batches of this process.
    batches: list


def check_files(paths):
    """Raise InputError for a path that cannot be read as FASTA or FASTQ.

    That is one that is missing, empty, a folder, unreadable, or does not begin as either.
    Standard input ("-") and pipes are not looked into: what is read from them is gone.
    """
    for path in paths:
        if path == "-":
            continue
        if not os.path.exists(path):
            raise InputError(
                f"{path}: no such file; give FASTA or FASTQ files, or - for standard input"
            )
        if os.path.isdir(path):
            raise InputError(f"{path}: a folder; give the files in it")
        if Path(path).is_file():
            next(records(path))


def records(path):
    """Yield the Records of a file, or of standard input for "-".

    Raises InputError, naming file and record, for what taxa.data.grammar refuses, and for protein.
    """
    for where, header, bases in grammar.records(path):
        yield Record(where, header, *grammar.normalize(bases, [len(bases)], lambda _: where))


def window_starts(length, window):
    """Where the windows of a read of `length` bases start.

    They start every `window` bases; the last one is moved back to end with the read. So all windows
    of a long read have `window` bases, and the last may overlap the one before. A shorter read is
    one window, an empty one none.
    """
    if length <= window:
        return [0] if length else []
    return [*range(0, length - window, window), length - window]


def pairs(first, second):
    """Yield a Record for each two Records of two streams, the mates of one pair.

    It has an id without /1 or /2, and the bases of both. Raises InputError that names the record
    where the ids differ or one stream ends before the other.
    """
    for number, (one, two) in enumerate(itertools.zip_longest(first, second), start=1):
        if one is None or two is None:
            raise InputError(
                f"{(one or two).where}: no mate for it: the other side of --mates ends after "
                f"{number - 1:,} records"
            )
        ids = [re.sub(r"/[12]$", "", each.header.split(None, 1)[0]) for each in (one, two)]
        if ids[0] != ids[1]:
            raise InputError(
                f"{two.where} is no mate of {one.where}: "
                "mates stand in the same order in both files"
            )
        header = " ".join([ids[0], *one.header.split(None, 1)[1:]])
        yield Record(one.where, header, one.bases, one.changed + two.changed, two.bases)


def slices(
    stream, tokenizer, window, batch_size, batches_per_slice, *, rank=0, size=1, both_strands=False
):
    """Records -> Slices of batch_size * batches_per_slice windows, the last one smaller.

    A window of nothing but N says nothing of where it comes from: it is left out. The windows of a
    pair are those of both mates. With both strands there are also those of the reverse complement,
    cut from its own beginning, so a read and its reverse complement have the same windows.

    Within a slice, windows are ordered by length, longest first, windows of one length in the order
    of the input. Batch k is tokenized by process k modulo `size`.
    """
    W = batch_size * batches_per_slice
    reads = []
    pieces = []  # (number of the read, bases) of each window
    for record in stream:
        texts = [record.bases] if record.mate is None else [record.bases, record.mate]
        strands = [*texts, *map(reverse_complement, texts)] if both_strands else texts
        starts = [_informative(bases, window) for bases in strands]
        views = sum(map(len, starts))
        read = Read(
            header=record.header,
            lengths=tuple(map(len, texts)),
            windows=sum(map(len, starts[:len(texts)])),
            views=views,
            changed=record.changed,
        )
        reads.append(read)
        seen = 0
        for bases, starts_here in zip(strands, starts):
            for start in starts_here:
                pieces.append((len(reads) - 1, bases[start:start + window]))
                seen += 1
                if len(pieces) == W:
                    complete = seen == views
                    yield _slice(reads, complete, pieces, tokenizer, batch_size, rank, size)
                    reads = [] if complete else [read]
                    pieces = []
        if len(reads) == W:  # most of them without a window
            yield _slice(reads, True, pieces, tokenizer, batch_size, rank, size)
            reads = []
            pieces = []
    if reads:
        yield _slice(reads, True, pieces, tokenizer, batch_size, rank, size)


def _informative(bases, window):
    """Where the windows of a read start that are not nothing but N."""
    whole = min(window, len(bases))
    return [
        start for start in window_starts(len(bases), window)
        if bases.count(b"N", start, start + window) < whole
    ]


def _slice(reads, complete, pieces, tokenizer, batch_size, rank, size):
    pieces = sorted(pieces, key=lambda piece: -len(piece[1]))  # stable
    lengths = [len(bases) for _, bases in pieces]
    joined = b"".join([bases for _, bases in pieces])
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).tolist()
    batches = []
    for start in list(range(0, len(pieces), batch_size))[rank::size]:
        stop = min(start + batch_size, len(pieces))
        ids, counts = tokenizer.encode(joined[ends[start]:ends[stop]], lengths[start:stop])
        rows = np.split(ids, np.cumsum(counts)[:-1])
        batches.append((start, stop, padded(rows, tokenizer.pad_token_id)))
    owner = np.array([owner for owner, _ in pieces], dtype=np.int64)
    return Slice(reads, complete, owner, batches)


class Windows(torch.utils.data.Dataset):
    """Some of the windows whose tokens are in memory.

    Indexed by a list of B numbers, it gives their batch (taxa.data.batches.padded).
    """

    def __init__(self, ids, offsets, windows, pad_token_id):
        """ids: of all windows, joined, uint16. offsets: where each starts and the last ends.

        windows: (N,) the numbers of these.
        """
        self.ids = ids
        self.offsets = offsets
        self.windows = windows
        self.pad_token_id = pad_token_id

    def __len__(self):
        return len(self.windows)

    def tokens(self, i):
        """ids (T_i,) of window i, uint16, without copying."""
        number = self.windows[i]
        return self.ids[self.offsets[number]:self.offsets[number + 1]]

    def __getitem__(self, indices):
        return padded([self.tokens(i) for i in indices], self.pad_token_id)


def tokenized_windows(stream, tokenizer, window, held_out):
    """Records -> (Windows to train on, Windows to validate on).

    Of the windows, in the order of the input, every `held_out`-th is to validate on. A last window
    that overlaps the one before goes where that goes, so no base is on both sides.
    """
    ids = bytearray()  # uint16, of all windows
    counts = []  # of tokens, for each window
    held = []  # whether a window is to validate on
    pieces = []  # the bases of windows that are not tokens yet

    def encode():
        of_these, how_many = tokenizer.encode(b"".join(pieces), [len(bases) for bases in pieces])
        ids.extend(of_these.tobytes())
        counts.extend(how_many.tolist())
        pieces.clear()

    for record in stream:
        starts = window_starts(len(record.bases), window)
        for before, start in zip([-window, *starts], starts):
            overlaps = start - before < window
            held.append(held[-1] if overlaps else len(held) % held_out == held_out - 1)
            pieces.append(record.bases[start:start + window])
            if len(pieces) == 1024:
                encode()
    if pieces:
        encode()

    tokens = np.frombuffer(ids, dtype=np.uint16)
    offsets = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    held = np.array(held, dtype=bool)
    sides = (np.flatnonzero(~held), np.flatnonzero(held))
    return tuple(Windows(tokens, offsets, side, tokenizer.pad_token_id) for side in sides)
