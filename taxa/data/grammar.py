"""What the bytes of a sequence file mean, for every reader.

prepare.py, predict.py and pretrain.py take records and bases from here alone. The table of
docs/DATA.md, "What a file of sequences says", is this file in words; tests/test_grammar.py is its
proof. A FASTA file whose records pyfaidx indexes as they stand (taxa.data.fasta) is one in which
every rule below changes nothing.
"""

import bz2
import contextlib
import io
import itertools
import lzma
import re
import sys
import zlib
from typing import NamedTuple

import numpy as np

from taxa.errors import InputError

PACKED = {  # first bytes: what it is, and what unpacks it
    b"\x1f\x8b": ("gzip", lambda: zlib.decompressobj(wbits=31)),  # bgzip is gzip in many members
    b"BZh": ("bzip2", bz2.BZ2Decompressor),
    b"\xfd7zXZ\0": ("xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
}
FOREIGN = {  # first bytes: what it is, and the command that makes plain text of it
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"PK\x03\x04": ("zip", "unzip -p"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
    b"LZIP": ("lzip", "lzip -dc"),
    b"\x1f\x9d": ("compress (.Z)", "gzip -dc"),
    b"7z\xbc\xaf": ("7z", "7z e -so"),
    b"BAM\1": ("BAM", "samtools fasta"),
    b"CRAM": ("CRAM", "samtools fasta"),
    b"\xff\xfe": ("UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
}
HEAD = max(map(len, [*PACKED, *FOREIGN]))
CHUNK = 1 << 16

LETTERS = bytes(range(ord("A"), ord("Z") + 1)) + bytes(range(ord("a"), ord("z") + 1))
WHITE, GAPS = b" \t\n\v\f\r", b"-."
# A position at the start of a line, as in GenBank, or at its end, as in EMBL.
_POSITION = re.compile(
    rb"^[ \t]*[0-9]+[ \t]+(?=[^\s0-9])|(?<=[^\s0-9])[ \t]+[0-9]+[ \t]*$", re.MULTILINE
)
_WRONG = re.compile(rb"[0-9>;@+]|[^ -~\t\n\v\f\r]")
_DIGIT = (
    "a digit among the bases: positions stand at an end of a line of bases, and quality values "
    "and colour space are no bases: take the numbers out"
)
_CAUSES = {
    b">": "a > within a line: is the line end before it missing, as where cat joins files? "
    "give each header a line of its own",
    b";": "a ; within a line: give a comment a line of its own that begins with it",
    b"@": "an @ among the bases: is this FASTQ within FASTA? give the formats in files of their "
    "own",
    b"+": "a + among the bases: is this FASTQ within FASTA? give the formats in files of their own",
    b"\0": "a NUL byte: the file is damaged, or UTF-16 text (iconv -f UTF-16 -t UTF-8 mends that)",
    **{b"%d" % digit: _DIGIT for digit in range(10)},
}


class Record(NamedTuple):
    """One record of a file."""

    where: str  # file, number and name of the record, for an error
    header: str  # the line without its > or @ and its line end
    bases: bytes


def is_packed(path):
    """Whether a file is compressed in a way that is read here, by its first bytes.

    Raises InputError for one that is not read.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
    _refuse_foreign(head, path)
    return head.startswith(tuple(PACKED))


def _refuse_foreign(head, name):
    for magic, (what, command) in FOREIGN.items():
        if head.startswith(magic):
            file = "FILE" if name == STANDARD_INPUT else name
            raise InputError(
                f"{name}: {what}, which is not read here: {command} {file} | python predict.py "
                f"ckpt.pt - reads it, and {command} {file} > plain.fa unpacks it"
            )


def unpacked(raw, name):
    """Yield the bytes of an open binary file in pieces, unpacked where they are gzip, bgzip, bzip2
    or xz. name: of the file, for errors.

    Raises InputError for a file that is damaged or cut short, and for a format that is not read.
    """
    head = raw.read(HEAD)
    _refuse_foreign(head, name)
    chunks = itertools.chain([head], iter(lambda: raw.read1(CHUNK), b""))
    found = (PACKED[magic] for magic in PACKED if head.startswith(magic))
    kind, new = next(found, (None, None))
    if new is None:
        yield from chunks
        return
    member = new()
    for chunk in chunks:
        while chunk:
            if member.eof:
                chunk = chunk.lstrip(b"\0")  # what pads a member
                if not chunk:
                    break
                member = new()
            try:
                plain = member.decompress(chunk)
            except (zlib.error, lzma.LZMAError, OSError) as error:
                # OSError, without a number, is bzip2's
                raise InputError(
                    f"{name}: the {kind} file is damaged or cut short ({error})"
                ) from None
            chunk = member.unused_data if member.eof else b""
            yield plain
    if not member.eof:
        raise InputError(
            f"{name}: the {kind} file is damaged or cut short (it ends within its data)"
        )


class _Pieces(io.RawIOBase):
    """A file to read, of pieces of bytes."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.rest = memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.rest:
            self.rest = memoryview(next(filter(None, self.pieces), b""))
        n = min(len(buffer), len(self.rest))
        buffer[:n] = self.rest[:n]
        self.rest = self.rest[n:]
        return n


STANDARD_INPUT = "standard input"


def records(path, name=None):
    """Yield the Records of a FASTA or FASTQ file, packed or not, or of standard input for "-".

    Only the record being read is in memory. name: of the file in errors, if not `path`. Raises
    InputError, naming file and record, cause and mend, for all that is refused.
    """
    from_stdin = path == "-"
    name = name or (STANDARD_INPUT if from_stdin else path)
    source = sys.stdin.fileno() if from_stdin else path
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(source, "rb", closefd=not from_stdin))
        binary = io.BufferedReader(_Pieces(unpacked(raw, name)), CHUNK)
        # text knows LF, CRLF and CR; in latin-1 a byte is a character
        lines = stack.enter_context(io.TextIOWrapper(binary, encoding="latin-1"))
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix("\xef\xbb\xbf")  # the byte-order mark of UTF-8
            if line.strip(WHITE.decode()) and not line.startswith(";"):
                break
        else:
            raise InputError(f"{name}: the file is empty")
        _refuse_foreign(line.encode("latin-1")[:HEAD], name)
        if line[0] not in ">@":
            raise InputError(
                f"{name}: neither FASTA nor FASTQ: line {number} begins with "
                f"{line.rstrip()[:20]!r}, not with > or @; is the first header missing?"
            )
        yield from (_fasta if line[0] == ">" else _fastq)(name, line, lines)


def _named(name, number, line):
    """(what an error calls a record, text of its header).

    Raises InputError for a header without a name.
    """
    header = line[1:].rstrip("\n").encode("latin-1")
    try:
        header = header.decode()
    except UnicodeDecodeError:
        header = header.decode("latin-1")
    first = header.split(None, 1)[:1]
    if not first:
        raise InputError(f"{name}: record {number} has no name: write one after its {line[0]}")
    where = f"{name}: record {number} '{line[0]}{first[0][:80]}'"
    if "\0" in header:
        raise InputError(f"{where}: its header has {_CAUSES[bytes(1)]}")
    return where, header


def _fasta(name, header, lines):
    number = 1
    parts = []
    for line in itertools.chain(lines, [">"]):
        if line[0] == ">":
            where, text = _named(name, number, header)
            yield Record(where, text, bases("".join(parts).encode("latin-1"), where))
            number += 1
            header = line
            parts = []
        elif line[0] != ";":
            parts.append(line)


FOUR = "a FASTQ record has four lines: @id, bases, +, quality"


def _fastq(name, header, lines):
    number = 0
    white = WHITE.decode()
    while header:
        number += 1
        if header[0] != "@":
            raise InputError(
                f"{name}: record {number} '{header[:80].strip()}': its first line does not begin "
                f"with @; {FOUR}"
            )
        where, text = _named(name, number, header)
        sequence, plus, quality = (next(lines, "").strip(white) for _ in range(3))
        if plus[:1] != "+":
            why = "the file ends within it"
            if plus:
                why = "its third line does not begin with + (seqtk seq -l0 joins wrapped lines)"
            raise InputError(f"{where}: {why}; {FOUR}")
        sequence = bases(sequence.encode("latin-1"), where, fastq=True)
        if len(quality) != len(sequence):
            raise InputError(
                f"{where}: {len(quality)} quality values for {len(sequence)} bases: "
                "is the file cut short?"
            )
        yield Record(where, text, sequence)
        header = next((line for line in lines if line.strip(white)), None)


def bases(text, where, fastq=False):
    """The bases of a sequence as it is written.

    text: bytes of one or more lines, without header and comments. Returns letters and other symbols
    that each stand for one base. White space, gaps (- and .), * at the end and positions at the
    ends of lines are nothing. With fastq, where every base has its quality, white space alone is
    nothing. where: file and record, for errors.

    Raises InputError for what cannot be bases: digits, > ; @ +, and bytes that are no ASCII text.
    """
    others = text.translate(None, LETTERS)
    if not others.strip(b"\r\n"):
        return text.translate(None, b"\r\n") if others else text
    text = text.replace(b"\r", b"\n")
    if not fastq:
        text = _POSITION.sub(b"", text)
    wrong = _WRONG.search(text)
    if wrong:
        unknown = (
            f"byte 0x{wrong[0][0]:02X} among the bases, which is no ASCII text: is the file "
            "damaged, or no plain text?"
        )
        raise InputError(f"{where}: {_CAUSES.get(wrong[0], unknown)}")
    if fastq:
        return text.translate(None, WHITE)
    return text.translate(None, WHITE + GAPS).rstrip(b"*")


def _acgtn(byte):
    """The byte that stands for a byte of a sequence: of ACGT, or N; U is T."""
    letter = chr(byte).upper()[:1].replace("U", "T")
    return ord(letter if letter in "ACGTN" else "N")


_TO_ACGTN = bytes(map(_acgtn, range(256)))
# The letters in no nucleotide code, IUPAC's included.
_PROTEIN = np.array([chr(i).upper() in "EFIJLOPQZ" for i in range(256)])
PROTEIN_SHARE = 0.01
_COMPLEMENT = bytes.maketrans(b"ACGTN", b"TGCAN")


def normalize(sequences, lengths, where):
    """Uppercase; U becomes T, anything else outside ACGTN becomes N.

    sequences: of `lengths`, joined, bytes. where(i) names sequence i in an error. Returns (bases,
    how many became N). Raises InputError for a sequence in which more than 1% of the letters stand
    for no nucleotide in any code (E F I J L O P Q Z): that is protein, or not a sequence.
    """
    raw = np.frombuffer(sequences, dtype=np.uint8)
    if len(raw) != sum(lengths):
        raise InputError(f"{where(0)}: the file changed while it was read")
    others = sequences.translate(None, b"ACGTNUacgtnu")
    if _PROTEIN[np.frombuffer(others, dtype=np.uint8)].any():
        before = np.concatenate(([0], np.cumsum(_PROTEIN[raw])))
        ends = np.cumsum(lengths)
        over = before[ends] - before[ends - lengths] > PROTEIN_SHARE * np.asarray(lengths)
        if over.any():
            i = int(np.argmax(over))
            own = raw[ends[i] - lengths[i]:ends[i]]
            found = "".join(sorted({chr(x).upper() for x in own if _PROTEIN[x]}))
            raise InputError(
                f"{where(i)}: letters {found} are in no DNA alphabet: is this protein?"
            )
    return sequences.translate(_TO_ACGTN), len(others)


def reverse_complement(bases):
    """The other strand of a sequence of ACGTN, read in its direction: bytes -> bytes."""
    return bases.translate(_COMPLEMENT)[::-1]
