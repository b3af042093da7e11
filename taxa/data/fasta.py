"""FASTA in: an index by pyfaidx, letters by offset.

A BERTax record is `>TAXID INDEX` (older files: `>TAXID`). The first word is the NCBI taxid, and it is not unique, so records are told
by their position in the file, never by name. pyfaidx builds the index (and checks that lines are of one length); its dictionary of
names, about 600 bytes a record and keyed on that first word, is not built.
"""

import array
import gzip
import hashlib
import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyfaidx

from taxa.errors import InputError


class Index(NamedTuple):
    """One FASTA file. Arrays of length N, in file order."""

    path: Path  # of the plain file: a gzip source is unpacked first
    taxid: np.ndarray  # (N,) int64
    length: np.ndarray  # (N,) int64, letters
    offset: np.ndarray  # (N,) int64, byte of the first letter
    size: np.ndarray  # (N,) int64, bytes from the first letter to the last, line ends between them included
    group: np.ndarray  # (N,) uint64, digest of what a pattern finds in the header; 0 without a pattern

    def take(self, records):
        """The index of some records only: a slice, or record numbers."""
        return Index(self.path, *(column[records] for column in self[1:]))


RANGE = 1 << 26  # bytes of a file that one job indexes


class _IndexFile(pyfaidx.Faidx):
    """pyfaidx's index file of the records that start in bytes start .. stop of a FASTA file, without its dictionary of names."""

    def __init__(self, path, index_path, start, stop, pattern):
        self.first, self.stop, self.pattern, self.groups = start, stop, pattern, array.array("Q")
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
        found = self.pattern and self.pattern.search(line[1:].decode().rstrip("\r\n"))
        if self.pattern and not found:
            raise InputError(f"{self.filename}: record {len(self.groups) + 1} '{line.decode().strip()}': --group finds nothing in it")
        text = found[found.re.groups and 1] or "" if found else ""
        self.groups.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") if found else 0)

    def read_fai(self):
        pass


class _Lines:
    """A binary file as pyfaidx iterates over it, that ends before the first record that starts at byte `stop` or later."""

    def __init__(self, file, first, stop, see_header):
        self.file, self.first, self.stop, self.see_header = file, first, stop, see_header

    def __iter__(self):
        self.file.seek(self.first)
        at = self.first
        for line in self.file:
            if line.startswith(b">"):
                if at >= self.stop:
                    return
                self.see_header(line)
            at += len(line)
            yield line

    def tell(self):
        return 0

    def seek(self, offset):
        pass

    def close(self):
        self.file.close()


def index_fasta(path, scratch, in_order=map, pattern=None):
    """Index one FASTA file, plain or gzip (bgzip is gzip too), leaving all it writes in the folder `scratch`.

    in_order: what maps a function over its ranges (taxa.runtime.workers). pattern: a compiled regular expression; records with the same
    text in its first pair of parentheses (without any: in all of the match) in the header are of one group. Raises InputError, naming
    the file and the record, for a missing or empty file, text that is not FASTA, lines of unequal length within a record, a header whose
    first word is not a taxid, and one in which the pattern finds nothing.
    """
    source, scratch = Path(path), Path(scratch)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    plain = _unpacked(source, scratch)
    size = plain.stat().st_size
    if size == 0:
        raise InputError(f"{source}: the file is empty")
    try:
        parts = list(in_order(_index_range, [(source, plain, scratch, pattern, start, min(start + RANGE, size))
                                             for start in range(0, size, RANGE)]))
    except InputError:  # a range cannot tell the number of a line or record, and may hold nothing but comments: the whole file can
        parts = [_index_range((source, plain, scratch, pattern, 0, size))]
    return Index(plain, *(np.concatenate(columns) for columns in zip(*parts)))


def _index_range(job):
    """(taxid, length, offset, size, group) of the records that start in a range of bytes, as in Index."""
    source, plain, scratch, pattern, start, stop = job
    index_path = scratch / f"{source.name}.{start}.fai"
    index_path.unlink(missing_ok=True)
    columns = [array.array("q") for _ in range(5)]
    try:
        indexed = _IndexFile(plain, index_path, start, stop, pattern)
        indexed.close()
        if indexed.first >= stop:
            return [np.empty(0, dtype=np.int64)] * 4 + [np.empty(0, dtype=np.uint64)]
        with open(index_path) as file:
            for record, line in enumerate(file, start=1):
                name, *numbers = line.split("\t")
                if not (name.isascii() and name.isdecimal()) or int(name) == 0 or len(name) > 10:
                    raise InputError(f"{source}: record {record} '>{name}': the first word of a header must be an NCBI taxid, as in "
                                     "'>9606 0'")
                for column, value in zip(columns, (name, *numbers)):
                    column.append(int(value))
    except (pyfaidx.FastaIndexingError, pyfaidx.UnsupportedCompressionFormat, ImportError, RuntimeError, UnicodeDecodeError) as error:
        # ImportError: a name that ends in .gz over text that is not gzip makes pyfaidx ask for Biopython
        raise InputError(f"{source}: not a FASTA file: {str(error).replace(str(plain), source.name)}") from None
    except OSError as error:
        raise (error if error.errno else error.__context__) from None  # pyfaidx hides a full disk behind an error without a number
    finally:
        index_path.unlink(missing_ok=True)
    taxid, length, offset, line_letters, line_bytes = (np.frombuffer(column, dtype=np.int64) for column in columns)
    blank_first = (length > 0) & (line_bytes < line_letters)  # pyfaidx takes line lengths from a blank line after a CRLF header
    if blank_first.any():
        record = int(np.argmax(blank_first))
        raise InputError(f"{source}: record {record + 1} '>{taxid[record]}': a blank line, or lines of unequal length")
    ends = np.maximum(length - 1, 0) // np.maximum(line_letters, 1) * (line_bytes - line_letters)
    return taxid, length, offset + indexed.first, length + ends, np.frombuffer(indexed.groups, dtype=np.uint64)


def is_gzip(path):
    """Whether a file is gzip, by its first two bytes."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _unpacked(source, scratch):
    """`source` itself, or, where it is gzip, a plain copy in `scratch`: gzip cannot be read at random."""
    if not is_gzip(source):
        return source
    plain = scratch / (source.name + ".unpacked")
    try:
        with gzip.open(source, "rb") as packed, open(plain, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{source}: the gzip file is damaged ({error})") from None
    return plain


def batches(index, batch=2048, span=1 << 24):
    """Yield slices of the records of `index` that are read at a time: at most `batch`, and no more than lie within `span` bytes of the file
    (a record that is longer goes alone)."""
    ends_at, start = index.offset + index.size, 0
    while start < len(ends_at):
        within = np.searchsorted(ends_at, index.offset[start] + span, side="right")
        stop = min(start + batch, max(start + 1, int(within)))
        yield slice(start, stop)
        start = stop


def read_sequences(index):
    """The letters of all records of `index` (one of the batches, say) joined, bytes, as written in the file but without line ends.

    Opens its own handle: one that forked processes share gives wrong letters without an error.
    """
    base = index.offset[0]
    with open(index.path, "rb") as file:
        file.seek(base)
        block = file.read(index.offset[-1] + index.size[-1] - base)
    begins = (index.offset - base).tolist()
    ends = (index.offset - base + index.size).tolist()
    letters = b"".join([block[begin:end] for begin, end in zip(begins, ends)])
    return letters.translate(None, b"\r\n") if (index.size != index.length).any() else letters


_TO_ACGTN = bytes(ord(chr(i).upper()) if chr(i) in "ACGTNacgtn" else ord("N") for i in range(256))
_PROTEIN = np.array([chr(i).upper() in "EFIJLOPQZ" for i in range(256)])  # in no nucleotide code, IUPAC's included
PROTEIN_SHARE = 0.01


def normalize(letters, lengths, where):
    """Uppercase; anything outside ACGTN becomes N. Returns (letters, how many became N).

    letters: sequences of `lengths` joined, bytes. where(i) names sequence i in an error. Raises InputError for a sequence in which
    more than 1% of the letters stand for no nucleotide in any code (E F I J L O P Q Z): that is protein, or not a sequence.
    """
    raw = np.frombuffer(letters, dtype=np.uint8)
    if len(raw) != sum(lengths):
        raise InputError(f"{where(0)}: the file changed while it was read, or its lines are of unequal length")
    others = letters.translate(None, b"ACGTNacgtn")
    if _PROTEIN[np.frombuffer(others, dtype=np.uint8)].any():
        starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        share = np.add.reduceat(_PROTEIN[raw], starts, dtype=np.int64) / np.asarray(lengths)
        if (share > PROTEIN_SHARE).any():
            i = int(np.argmax(share > PROTEIN_SHARE))
            found = "".join(sorted({chr(letter).upper() for letter in raw[starts[i]:starts[i] + lengths[i]] if _PROTEIN[letter]}))
            raise InputError(f"{where(i)}: letters {found} are in no DNA alphabet: is this protein?")
    return letters.translate(_TO_ACGTN), len(others)
