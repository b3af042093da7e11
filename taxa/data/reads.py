"""Reads in, as a stream: FASTA and FASTQ, plain, gzip or bgzip, from files or standard input, in slices of bounded size.

A long read is cut into windows. Windows, in the order of the input, make slices of a fixed number, and a slice makes batches of
windows of similar length. Nothing but the record being read and a few slices is ever in memory.

Shapes: W windows of a slice, B of a batch, T tokens of the longest window in it.
"""

import collections
import concurrent.futures
import gzip
import io
import os
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from taxa.data.dataset import padded
from taxa.data.fasta import normalize
from taxa.errors import InputError


class Record(NamedTuple):
    """One record of a file."""

    where: str  # file and record, for an error
    header: str  # the line without its > or @
    letters: bytes


class Read(NamedTuple):
    """What is left of a record after its letters became tokens."""

    header: str
    length: int  # letters
    windows: int


class Slice(NamedTuple):
    """W windows and the reads they come from. A read whose windows do not end here is the last one, and the first of the next slice."""

    reads: list  # of Read
    complete: bool  # whether the last read's windows end here
    owner: np.ndarray  # (W,) which of the reads a window comes from, in the order of `batches`
    batches: list  # of (start, stop, {"input_ids" (B, T), "attention_mask" (B, T)}): windows start to stop; this process's share


def check_files(paths):
    """Raise InputError for a path that is missing, empty, a folder, unreadable, or does not begin as FASTA or FASTQ.

    Standard input ("-") and pipes are not looked into: what is read from them is gone.
    """
    for path in paths:
        if path == "-":
            continue
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file; give FASTA or FASTQ files, or - for standard input")
        if os.path.isdir(path):
            raise InputError(f"{path}: a folder; give the files in it")
        if Path(path).is_file():
            next(records(path))


def records(path):
    """Yield the Records of a file, or of standard input for "-". Raises InputError, naming file and record, for what is neither FASTA
    (sequences over any number of lines) nor FASTQ (four lines a record), and for a damaged or truncated gzip."""
    name = "standard input" if path == "-" else path
    with _open(path) as raw:
        try:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            lines = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20) if packed else raw
            first = next((line for line in lines if line.strip()), None)
            if first is None:
                raise InputError(f"{name}: the file is empty")
            if first[:1] not in b">@":
                raise InputError(f"{name}: neither FASTA nor FASTQ: it begins with {first[:1]!r}, not with > or @")
            if b"\r" in first.rstrip(b"\r\n"):
                raise InputError(f"{name}: its lines end in carriage returns alone, so all of it is one line: tr '\\r' '\\n' mends it")
            yield from (_fasta if first[:1] == b">" else _fastq)(name, first, lines)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{name}: the gzip file is damaged or cut short ({' '.join(str(error).split())})") from None


def _open(path):
    return open(path, "rb", buffering=1 << 20) if path != "-" else open(sys.stdin.fileno(), "rb", buffering=1 << 20, closefd=False)


def _text(header):
    return header[1:].rstrip(b"\r\n").decode("utf-8", errors="replace")


def _fasta(name, header, lines):
    number, parts = 1, []
    for line in lines:
        if line[:1] == b">":
            yield Record(f"{name}: record {number} '>{_text(header)}'", _text(header), b"".join(parts))
            number, header, parts = number + 1, line, []
        else:
            parts.append(line.strip())
    yield Record(f"{name}: record {number} '>{_text(header)}'", _text(header), b"".join(parts))


def _fastq(name, header, lines):
    number = 0
    while header:
        number += 1
        where = f"{name}: record {number} '{header[:80].decode('utf-8', errors='replace').rstrip()}'"
        if header[:1] != b"@":
            raise InputError(f"{where}: its first line does not begin with @; a FASTQ record has four lines: @id, letters, +, quality")
        letters, plus, quality = (next(lines, b"").strip() for _ in range(3))
        if plus[:1] != b"+":
            raise InputError(f"{where}: {'its third line does not begin with +' if plus else 'the file ends within it'}; a FASTQ record "
                             "has four lines: @id, letters, +, quality")
        if len(quality) != len(letters):
            raise InputError(f"{where}: {len(quality)} quality values for {len(letters)} letters: is the file cut short?")
        yield Record(where, _text(header), letters)
        header = next((line for line in lines if line.strip()), None)


def window_starts(length, window):
    """Where the windows of a read of `length` letters start: every `window` letters, the last one moved back to end with the read.

    So all windows of a long read have `window` letters, and the last may overlap the one before. A shorter read is one window, an empty
    one none.
    """
    if length <= window:
        return [0] if length else []
    return [*range(0, length - window, window), length - window]


def slices(stream, tokenizer, window, batch_size, batches_per_slice, rank=0, size=1):
    """Records -> Slices of batch_size * batches_per_slice windows, the last one smaller.

    Within a slice, windows are ordered by length, longest first, windows of one length in the order of the input. Batch k is tokenized by
    process k modulo `size`. Raises InputError for letters that are not DNA, as prepare.py does.
    """
    reads, pieces, W = [], [], batch_size * batches_per_slice
    for record in stream:
        length = len(record.letters)
        starts = window_starts(length, window)
        read = Read(record.header, length, len(starts))
        reads.append(read)
        for start in starts:
            pieces.append((len(reads) - 1, record.letters[start:start + window], record.where))
            if len(pieces) == W:
                complete = start == starts[-1]
                yield _slice(reads, complete, pieces, tokenizer, batch_size, rank, size)
                reads, pieces = [] if complete else [read], []
    if reads:
        yield _slice(reads, True, pieces, tokenizer, batch_size, rank, size)


def _slice(reads, complete, pieces, tokenizer, batch_size, rank, size):
    pieces = sorted(pieces, key=lambda piece: -len(piece[1]))  # stable
    lengths = [len(letters) for _, letters, _ in pieces]
    letters, _ = normalize(b"".join([letters for _, letters, _ in pieces]), lengths, lambda i: pieces[i][2]) if pieces else (b"", 0)
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).tolist()
    batches = []
    for start in list(range(0, len(pieces), batch_size))[rank::size]:
        stop = min(start + batch_size, len(pieces))
        ids, counts = tokenizer.encode(letters[ends[start]:ends[stop]], lengths[start:stop])
        batches.append((start, stop, padded(np.split(ids, np.cumsum(counts)[:-1]), tokenizer.pad_token_id)))
    return Slice(reads, complete, np.array([owner for owner, _, _ in pieces], dtype=np.int64), batches)


class Windows(torch.utils.data.Dataset):
    """Some of the windows whose tokens are in memory. Indexed by a list of B numbers, it gives their batch (taxa.data.dataset.padded)."""

    def __init__(self, ids, offsets, windows, pad_token_id):
        """ids: of all windows, joined, uint16; offsets: where each starts and the last ends; windows: (N,) the numbers of these."""
        self.ids, self.offsets, self.windows, self.pad_token_id = ids, offsets, windows, pad_token_id

    def __len__(self):
        return len(self.windows)

    def tokens(self, i):
        """ids (T_i,) of window i, uint16, without copying."""
        return self.ids[self.offsets[self.windows[i]]:self.offsets[self.windows[i] + 1]]

    def __getitem__(self, indices):
        return padded([self.tokens(i) for i in indices], self.pad_token_id)


def tokenized_windows(stream, tokenizer, window, held_out):
    """Records -> (Windows to train on, Windows to validate on): of their windows, in the order of the input, every `held_out`-th.

    A last window that overlaps the one before goes where that goes, so no letter is on both sides. Raises InputError as slices() does.
    """
    ids, counts, held, pieces = bytearray(), [], [], []

    def encode():
        lengths = [len(letters) for letters, _ in pieces]
        letters, _ = normalize(b"".join([letters for letters, _ in pieces]), lengths, lambda i: pieces[i][1])
        of_these, how_many = tokenizer.encode(letters, lengths)
        ids.extend(of_these.tobytes())
        counts.extend(how_many.tolist())
        pieces.clear()

    for record in stream:
        starts = window_starts(len(record.letters), window)
        for before, start in zip([-window, *starts], starts):
            held.append(held[-1] if start - before < window else len(held) % held_out == held_out - 1)
            pieces.append((record.letters[start:start + window], record.where))
            if len(pieces) == 1024:
                encode()
    if pieces:
        encode()
    offsets = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    sides = (np.flatnonzero(np.array(held, dtype=bool) == side) for side in (False, True))
    return tuple(Windows(np.frombuffer(ids, dtype=np.uint16), offsets, side, tokenizer.pad_token_id) for side in sides)


def read_ahead(items, depth=2):
    """Yield the items of an iterable, of which a thread has up to `depth` ready. What it raises is raised here."""
    iterator, end = iter(items), object()
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = collections.deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, iterator, end))
            yield item
