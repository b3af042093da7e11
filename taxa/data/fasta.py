"""FASTA in: an index by pyfaidx, bases by offset.

A BERTax record is `>TAXID INDEX` (older files: `>TAXID`). The first word is the NCBI taxid. It is
not unique, so records are identified by their position in the file, never by name.

pyfaidx is used for the index alone: where each record's bases start, and how many there are. Its
dictionary of names, about 600 bytes a record and keyed on that first word, is not built. It indexes
what is regular: lines of letters, of one length within a record. Any other file is first written
anew, as taxa.data.grammar reads it: one regular line of bases a record.
"""

import array
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyfaidx

from taxa.data.grammar import LETTERS, is_packed, records, unpacked
from taxa.errors import InputError


class Index(NamedTuple):
    """One FASTA file. Arrays of length N, in file order."""

    path: Path  # of the plain file; a packed source is unpacked first, an irregular one rewritten
    taxid: np.ndarray  # (N,) int64
    length: np.ndarray  # (N,) int64, bases
    offset: np.ndarray  # (N,) int64, byte of the first base
    size: np.ndarray  # (N,) int64, bytes from the first base to the last, line ends included
    group: np.ndarray  # (N,) uint64, digest of what a pattern finds in the header, or 0

    def take(self, records):
        """The index of some records only: a slice, or record numbers."""
        return Index(self.path, *(column[records] for column in self[1:]))


RANGE = 1 << 26  # bytes of a file that one job indexes


class _Irregular(Exception):
    """Something that offsets into the file cannot say, or that is refused.

    taxa.data.grammar tells which, and where.
    """


class _IndexFile(pyfaidx.Faidx):
    """pyfaidx's index file of the records that start in bytes start .. stop of a FASTA file.

    It goes without pyfaidx's dictionary of names.
    """

    def __init__(self, path, index_path, start, stop, pattern):
        self.first = start
        self.stop = stop
        self.pattern = pattern
        self.groups = array.array("Q")
        super().__init__(path, indexname=index_path, rebuild=True)

    def build_index(self):
        self.file.seek(max(self.first - 1, 0))
        if self.first:
            self.file.readline()  # the rest of a line, or the line end just before
            line = self.file.readline()
            while line and not line.startswith(b">"):
                line = self.file.readline()
            self.first = self.file.tell() - len(line)
        self.file = _Lines(self.file, self.first, self.stop, self.see_header)
        if self.first < self.stop:
            super().build_index()

    def see_header(self, line):
        if b"\r" in line[:-2] or b"\0" in line:
            raise _Irregular
        group = 0
        if self.pattern:
            group = _group(line[1:].decode().rstrip("\r\n"), self.pattern)
        if group is None:
            raise _Irregular
        self.groups.append(group)

    def read_fai(self):
        pass


def _group(header, pattern):
    """Digest of what a pattern finds in a header; None where it finds nothing.

    Of a pattern with parentheses it is the first pair that counts.
    """
    found = pattern.search(header)
    if not found:
        return None
    text = found[1 if found.re.groups else 0] or ""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _Lines:
    """A binary file as pyfaidx iterates over it.

    It ends before the first record that starts at byte `stop` or later.
    """

    def __init__(self, file, first, stop, see_header):
        self.file = file
        self.first = first
        self.stop = stop
        self.see_header = see_header
        self.ends = array.array("q")  # of each record: the byte after its last base

    def __iter__(self):
        self.file.seek(self.first)
        at = self.first
        ends = self.ends
        for line in self.file:
            if line.startswith(b">"):
                if at >= self.stop:
                    break
                self.see_header(line)
                at += len(line)
                ends.append(at)
            else:
                end = line.translate(None, LETTERS)
                regular = end == b"\n" or (end in (b"\r\n", b"") and line.endswith(end))
                if not regular or not ends:
                    raise _Irregular
                at += len(line)
                if end != line:
                    ends[-1] = at - len(end)
            yield line

    def tell(self):
        return 0

    def seek(self, offset):
        pass

    def close(self):
        self.file.close()


def index_fasta(path, scratch, in_order=map, pattern=None):
    """Index one file of sequences.

    All that it writes lies in the folder `scratch`: a packed file is unpacked there, and one that
    pyfaidx cannot index as it stands is written anew. in_order: what maps a function over its
    ranges (taxa.runtime.workers). pattern: a compiled regular expression; records with the same
    text in its first pair of parentheses (without any: in all of the match) in the header are of
    one group.

    Raises InputError, naming the file and the record, for a missing or empty file, what
    taxa.data.grammar refuses, a header whose first word is not a taxid, and one in which the
    pattern finds nothing.
    """
    source = Path(path)
    scratch = Path(scratch)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    plain = source
    if is_packed(source):
        plain = scratch / (source.name + ".unpacked")
        with open(source, "rb") as packed, open(plain, "wb") as file:
            file.writelines(unpacked(packed, source))
    try:
        parts = _index(source, plain, scratch, in_order, pattern)
    except _Irregular:
        regular = scratch / (source.name + ".regular")
        _write_regular(source, plain, regular, pattern)
        if plain != source:
            plain.unlink()
        plain = regular
        parts = _index(source, plain, scratch, in_order, pattern)
    return Index(plain, *(np.concatenate(columns) for columns in zip(*parts)))


def _index(source, plain, scratch, in_order, pattern):
    """[(taxid, length, offset, size, group) of a range of bytes] of a plain file.

    Raises _Irregular.
    """
    with open(plain, "rb") as file:
        head = file.read(1 << 16).replace(b"\r\n", b"")
    # CR alone: to pyfaidx all of the file would be one line, in memory
    if not head or b"\r" in head:
        raise _Irregular
    size = plain.stat().st_size
    jobs = [
        (source.name, plain, scratch, pattern, start, min(start + RANGE, size))
        for start in range(0, size, RANGE)
    ]
    return list(in_order(_index_range, jobs))


def _index_range(job):
    """(taxid, length, offset, size, group) of the records that start in a range of bytes.

    They are as in Index. Raises _Irregular.
    """
    name, plain, scratch, pattern, start, stop = job
    index_path = scratch / f"{name}.{start}.fai"
    index_path.unlink(missing_ok=True)
    columns = [array.array("q") for _ in range(3)]  # pyfaidx's lengths of lines are not needed
    try:
        indexed = _IndexFile(plain, index_path, start, stop, pattern)
        indexed.close()
        if indexed.first >= stop:
            return [np.empty(0, dtype=np.int64)] * 4 + [np.empty(0, dtype=np.uint64)]
        with open(index_path) as file:
            for line in file:
                values = line.split("\t")
                if not _is_taxid(values[0]):
                    raise _Irregular
                for column, value in zip(columns, values):
                    column.append(int(value))
    except _OF_PYFAIDX:
        raise _Irregular from None
    except OSError as error:
        # pyfaidx hides a full disk behind an error without a number
        raise (error if error.errno else error.__context__) from None
    finally:
        index_path.unlink(missing_ok=True)
    columns.append(indexed.file.ends)
    taxid, length, offset, ends = (np.frombuffer(column, dtype=np.int64) for column in columns)
    offset = offset + indexed.first
    return taxid, length, offset, ends - offset, np.frombuffer(indexed.groups, dtype=np.uint64)


# ImportError: a name that ends in .gz over text that is not gzip makes pyfaidx ask for Biopython
_OF_PYFAIDX = (
    pyfaidx.FastaIndexingError,
    pyfaidx.UnsupportedCompressionFormat,
    ImportError,
    RuntimeError,
    UnicodeError,
)


def _is_taxid(name):
    return len(name) <= 10 and name.isascii() and name.isdecimal() and int(name) > 0


def _write_regular(source, plain, regular, pattern):
    """Write the records of a file as a FASTA file of one line of letters a record.

    Raises InputError as index_fasta() does.
    """
    with open(regular, "wb") as file:
        for record in records(plain, source):
            if not _is_taxid(record.header.split(None, 1)[0]):
                raise InputError(
                    f"{record.where}: the first word of a header must be an NCBI taxid, "
                    "as in '>9606 0'"
                )
            if pattern and _group(record.header, pattern) is None:
                raise InputError(
                    f"{record.where}: --group finds nothing in its header '{record.header}'"
                )
            letters = record.bases.translate(_TO_LETTERS)
            line = letters + b"\n" if letters else b""
            file.write(b">" + record.header.encode() + b"\n" + line)


# A symbol that is none is N in the end, and counted, as X is.
_TO_LETTERS = bytes(i if i in LETTERS else ord("X") for i in range(256))


def batches(index, batch=2048, span=1 << 24):
    """Yield slices of the records of `index` that are read at a time.

    They are at most `batch`, and no more than lie within `span` bytes of the file. A record that is
    longer goes alone.
    """
    ends_at = index.offset + index.size
    start = 0
    while start < len(ends_at):
        within = np.searchsorted(ends_at, index.offset[start] + span, side="right")
        stop = min(start + batch, max(start + 1, int(within)))
        yield slice(start, stop)
        start = stop


def read_sequences(index):
    """The bases of all records of `index` (one of the batches, say) joined, as bytes.

    They are as written in the file, but without line ends. The function opens its own handle: one
    that forked processes share gives wrong bases without an error.
    """
    base = index.offset[0]
    with open(index.path, "rb") as file:
        file.seek(base)
        block = file.read(index.offset[-1] + index.size[-1] - base)
    begins = (index.offset - base).tolist()
    ends = (index.offset - base + index.size).tolist()
    bases = b"".join([block[begin:end] for begin, end in zip(begins, ends)])
    if (index.size != index.length).any():
        return bases.translate(None, b"\r\n")
    return bases
