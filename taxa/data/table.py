"""A CSV or TSV file of sequences and their labels -> a FASTA file and the label of each record.

That is what the rest of the preparation reads. The table has a header row, one column of sequences
and one column of labels per rank; other columns are ignored. Labels are any text. There is no
taxonomy behind them, but the columns are ranks: a label is what its name and those of the ranks
before it say. So a genus Morus in two phyla is two classes, "Morus (Chordata)" and
"Morus (Streptophyta)".

RFC 4180 by Python's csv module; gzip by the first two bytes; read once, row by row.
"""

import array
import collections
import csv
import gzip
import io
import re
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from taxa.data.grammar import bases
from taxa.data.splits import SPLITS
from taxa.data.taxonomy import Label, check_ranks, one_line
from taxa.errors import InputError, choose

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
# Labels that are none, as R and pandas write them.
MISSING = frozenset(("", "-", "NA", "N/A", "NaN", "nan", "<NA>"))
SHOWN = 5  # names in a line for the user


class Table(NamedTuple):
    """What a table holds, row by row, as FASTA records `>ID`.

    Rows of equal labels share their ID, from 1 on.
    """

    fasta: Path
    lines: np.ndarray  # (N,) int64: where each record ends in the table
    # {ID: Label}, whose taxids are numbers from 1 on in the order of the names, a series a rank
    labels: dict
    names: dict  # {rank: {number: name}}
    notes: list  # lines for the user: labels that look alike, and names in more than one place
    # (N,) uint8: which of SPLITS each record is in, where a column says so
    parts: np.ndarray | None = None


def delimiter(path):
    """What separates the columns, by the file's name.

    Raises InputError for a name that does not say it.
    """
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    if ending not in DELIMITERS:
        raise InputError(
            f"{path}: the name must end in .csv, .tsv or .tab (then .gz): "
            "it says what separates the columns"
        )
    return DELIMITERS[ending]


def check_columns(ranks):
    """check_ranks() for columns of a table: any different names, each fit to name a head."""
    from torch import nn  # late: it takes seconds, and prepare.py needs it for nothing else

    names_of_modules = frozenset(dir(nn.ModuleDict()))  # a rank names its head in the network
    for rank in check_ranks(ranks, known=None):
        if not re.fullmatch(r"\w[\w -]*", rank) or rank in names_of_modules:
            raise InputError(
                f"--ranks: a column named '{rank}' cannot name a head (letters, digits, _, - and "
                "spaces can, but no name that torch.nn.ModuleDict has): rename it in the table"
            )
    return tuple(ranks)


def read_table(path, sequence_column, ranks, scratch, *, classes=None, split_column=None):
    """Read a table, writing its sequences as a FASTA file into the folder `scratch`.

    classes: {rank: [{"taxid", "name"}, ...]} whose names are kept to where the same label can be
    written in two ways (keep_classes). split_column: the column that says train, validation or
    test. Returns a Table.

    Raises InputError, naming the file and the line, for a file that is missing, empty or no such
    table, a column that is not there, a row with more or fewer fields than the header, and a
    sequence that is no letters.
    """
    path = Path(path)
    fasta = Path(scratch) / "table.fa"
    separator = delimiter(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    csv.field_size_limit(1 << 30)  # the module's own limit is 131,072 letters
    ids = {}  # labels of a row -> its ID
    lines = array.array("q")
    parts = array.array("B")
    split_columns = [split_column] if split_column else []
    wanted = (sequence_column, *split_columns, *ranks)
    with (
        gzip.open(path) if packed else open(path, "rb") as raw,
        open(fasta, "w", encoding="ascii") as out,
        io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text,
    ):
        rows = csv.reader(text, delimiter=separator, strict=True)
        try:
            header = next(rows, None)
            check_header(path, header)
            columns = [header.index(choose(f"column of {path}", name, header)) for name in wanted]
            for row in rows:
                if not row:
                    continue  # a blank line
                where = f"{path}: line {rows.line_num}"
                if len(row) != len(header):
                    raise InputError(
                        f"{where}: {len(row)} fields, but the header has {len(header)}"
                    )
                sequence, *label = (row[column] for column in columns)
                for name in split_columns:
                    part = label.pop(0).strip()
                    if part not in SPLITS:
                        raise InputError(
                            f"{where}: column {name}: '{part}' is none of {' '.join(SPLITS)}"
                        )
                    parts.append(SPLITS.index(part))
                sequence = bases(sequence.encode(), f"{where}: column {sequence_column}").decode()
                names = tuple(one_line(name).strip() for name in label)
                identity = ids.setdefault(names, len(ids) + 1)
                out.write(f">{identity}\n{sequence}\n")
                lines.append(rows.line_num)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: line {rows.line_num}: not {path.suffix} in UTF-8 ({error})"
            ) from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{path}: the gzip file is damaged ({error})") from None
    if not lines:
        raise InputError(f"{path}: no row below the header")
    try:
        labels, names, notes = label_rows(ids, ranks, classes or {})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Table(
        fasta=fasta,
        lines=np.frombuffer(lines, dtype=np.int64),
        labels=labels,
        names=names,
        notes=[f"{path}: {note}" for note in notes],
        parts=np.frombuffer(parts, dtype=np.uint8) if split_column else None,
    )


def check_header(path, header):
    """Raise InputError for a header that is missing or names a column twice."""
    if not header:
        raise InputError(f"{path}: the file is empty; its first line must name the columns")
    for name in header:
        if name and header.count(name) > 1:
            raise InputError(f"{path}: line 1: two columns are named '{name}'")


def label_rows(ids, ranks, classes):
    """({ID: Label}, {rank: {number: name}}, notes) of ids {(name at each rank): ID}.

    classes: as read_table takes them.
    """
    labels = {identity: None for identity in ids.values()}
    whole = []  # rows of ids without a missing label
    for label, identity in ids.items():
        missing = next((rank for rank, name in zip(ranks, label) if name in MISSING), None)
        if missing:
            labels[identity] = Label((None,) * len(ranks), f"no {missing}")
        else:
            whole.append(label)
    names = {}
    notes = []
    numbers = []
    for i, rank in enumerate(ranks):
        paths = collections.defaultdict(set)  # name -> the names above it, in each of its places
        for label in whole:
            paths[label[i]].add(label[:i])
        taken = {row["name"] for row in classes.get(rank, ())}
        shown = called(paths, taken)
        twice = [name for name, count in collections.Counter(shown.values()).items() if count > 1]
        if twice:
            raise InputError(
                f"column {rank}: '{twice[0]}' is one label as it stands and another by its "
                "place: rename one"
            )
        names[rank] = dict(enumerate(sorted(shown.values()), start=1))
        number_of = {name: number for number, name in names[rank].items()}
        numbers.append({path: number_of[name] for path, name in shown.items()})
        notes += [f"{rank}: {note}" for note in remarks(paths, shown)]
    for label in whole:
        path = [number[label[:i + 1]] for i, number in enumerate(numbers)]
        labels[ids[label]] = Label(tuple(path))
    return labels, names, notes


def called(paths, taken):
    """{path, name included: what the class is called}: by its name, with its place where needed.

    taken: names that are kept to.
    """
    shown = {}
    for name, above in paths.items():
        for path in above:
            full = f"{name} ({'; '.join(path)})"
            shown[(*path, name)] = full if full in taken or len(above) > 1 else name
    return shown


def remarks(paths, shown):
    """Lines for the user on the names of a rank: those at several places, those that look alike."""
    lines = []
    several = [(name, above) for name, above in paths.items() if len(above) > 1]
    split = sorted(shown[(*path, name)] for name, above in several for path in above)
    if split:
        lines.append(f"one name at several places is a class at each: {_some(split)}")
    alike = collections.defaultdict(set)
    for name in paths:
        look = unicodedata.normalize("NFC", "".join(name.split()).casefold())
        alike[look].add(name)
    for same in alike.values():
        if len(same) > 1:
            lines.append(
                f"{_some(sorted(map(repr, same)))} differ only in capitals, blanks or Unicode "
                "composition: they are taken for different labels"
            )
    return lines


def _some(names):
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
