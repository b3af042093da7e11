"""FASTA in: an index by pyfaidx, letters by offset.

A BERTax record is `>TAXID INDEX` (older files: `>TAXID`). The first word is the NCBI taxid, and it is not unique, so records are told
by their position in the file, never by name. pyfaidx builds the index (and checks that lines are of one length); its dictionary of
names, about 600 bytes a record and keyed on that first word, is not built.
"""

import array
import gzip
import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyfaidx

from taxa.cli import InputError


class Index(NamedTuple):
    """One FASTA file. Arrays of length N, in file order."""

    path: Path  # of the plain file: a gzip source is unpacked first
    taxid: np.ndarray  # (N,) int64
    length: np.ndarray  # (N,) int64, letters
    offset: np.ndarray  # (N,) int64, byte of the first letter
    size: np.ndarray  # (N,) int64, bytes from the first letter to the last, line ends between them included


class _IndexFile(pyfaidx.Faidx):
    """pyfaidx's index file without its dictionary of names."""

    def read_fai(self):
        pass


def index_fasta(path, scratch):
    """Index one FASTA file, plain or gzip (bgzip is gzip too), leaving all it writes in the folder `scratch`.

    Raises InputError, naming the file and the record, for a missing or empty file, text that is not FASTA, lines of unequal length
    within a record, and a header whose first word is not a taxid.
    """
    source, scratch = Path(path), Path(scratch)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    plain = _unpacked(source, scratch)
    if plain.stat().st_size == 0:
        raise InputError(f"{source}: the file is empty")
    index_path = scratch / f"{source.name}.fai"
    index_path.unlink(missing_ok=True)
    try:
        _IndexFile(plain, indexname=index_path, rebuild=True).close()
    except (pyfaidx.FastaIndexingError, pyfaidx.UnsupportedCompressionFormat, ImportError, RuntimeError, UnicodeDecodeError) as error:
        # ImportError: a name that ends in .gz over text that is not gzip makes pyfaidx ask for Biopython
        raise InputError(f"{source}: not a FASTA file: {str(error).replace(str(plain), source.name)}") from None
    columns = [array.array("q") for _ in range(5)]
    with open(index_path) as file:
        for record, line in enumerate(file, start=1):
            name, *numbers = line.split("\t")
            if not (name.isascii() and name.isdecimal()) or int(name) == 0 or len(name) > 10:
                raise InputError(f"{source}: record {record} '>{name}': the first word of a header must be an NCBI taxid, as in "
                                 "'>9606 0'")
            for column, value in zip(columns, (name, *numbers)):
                column.append(int(value))
    taxid, length, offset, line_letters, line_bytes = (np.frombuffer(column, dtype=np.int64) for column in columns)
    blank_first = (length > 0) & (line_bytes < line_letters)  # pyfaidx takes line lengths from a blank line after a CRLF header
    if blank_first.any():
        record = int(np.argmax(blank_first))
        raise InputError(f"{source}: record {record + 1} '>{taxid[record]}': a blank line, or lines of unequal length")
    ends = np.maximum(length - 1, 0) // np.maximum(line_letters, 1) * (line_bytes - line_letters)
    return Index(plain, taxid, length, offset, length + ends)


def _unpacked(source, scratch):
    """`source` itself, or, where it is gzip by its first two bytes, a plain copy in `scratch`: gzip cannot be read at random."""
    with open(source, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return source
    plain = scratch / (source.name + ".unpacked")
    try:
        with gzip.open(source, "rb") as packed, open(plain, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{source}: the gzip file is damaged ({error})") from None
    return plain


def read_sequences(index, records, batch=4096, span=1 << 26):
    """Yield (some of `records`, their letters joined as bytes), as written in the file but without line ends.

    At a time at most `batch` records, and no more of them than lie within `span` bytes of the file (one that is longer goes alone).

    records: increasing record numbers. Opens its own handle, so that forked processes never share one.
    """
    with open(index.path, "rb") as file:
        ends_at = index.offset[records] + index.size[records]
        start = 0
        while start < len(records):
            within = np.searchsorted(ends_at, index.offset[records[start]] + span, side="right")
            stop = min(start + batch, max(start + 1, int(within)))
            some = records[start:stop]
            start = stop
            first, last = some[0], some[-1]
            base = index.offset[first]
            file.seek(base)
            block = file.read(index.offset[last] + index.size[last] - base)
            begins = (index.offset[some] - base).tolist()
            ends = (index.offset[some] - base + index.size[some]).tolist()
            letters = b"".join([block[begin:end] for begin, end in zip(begins, ends)])
            if (index.size[some] != index.length[some]).any():
                letters = letters.translate(None, b"\r\n")
            yield some, letters


_TO_ACGTN = bytes(ord(chr(i).upper()) if chr(i) in "ACGTNacgtn" else ord("N") for i in range(256))
_OTHER = np.array([chr(i) not in "ACGTNacgtn" for i in range(256)])
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
    counts = np.bincount(raw, minlength=256)
    if counts[_PROTEIN].any():
        starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        share = np.add.reduceat(_PROTEIN[raw], starts, dtype=np.int64) / np.asarray(lengths)
        if (share > PROTEIN_SHARE).any():
            i = int(np.argmax(share > PROTEIN_SHARE))
            found = "".join(sorted({chr(letter).upper() for letter in raw[starts[i]:starts[i] + lengths[i]] if _PROTEIN[letter]}))
            raise InputError(f"{where(i)}: letters {found} are in no DNA alphabet: is this protein?")
    return letters.translate(_TO_ACGTN), int(counts[_OTHER].sum())
