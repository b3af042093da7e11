"""The two kinds of input of taxa.data.prepare.

They are FASTA files with an NCBI taxonomy dump, and a table of sequences and labels. They differ in
how a file is indexed, what a label is, and how an error names a record; what they give is the same.
A label is a number: of a taxid in FASTA headers, of a row's labels in a table. classes: the class
tables {rank: [{"taxid", "name"}, ...]} of a checkpoint, to which labels are then held
(prepare.py --classes-of).
"""

import functools
from pathlib import Path

import numpy as np

from taxa import RANKS
from taxa.data.fasta import index_fasta
from taxa.data.table import read_table
from taxa.data.taxonomy import SUPERKINGDOMS, keep_classes, label_taxids
from taxa.errors import InputError
from taxa.runtime.progress import progress


class FastaSource:
    """FASTA files whose headers begin with an NCBI taxid, and the taxonomy dump that gives its
    taxon at each rank.
    """

    def __init__(self, fastas, taxdump, ranks=RANKS, classes=None, parts=None):
        """parts: which of SPLITS each file is, where that is given.

        Raises InputError for two files of one name.
        """
        self.files = [Path(path) for path in fastas]
        self.ranks = ranks
        self.classes = classes
        self.settings = {} if parts is None else {"split_by": "file"}
        self._dump = Path(taxdump)
        self._parts = parts
        if len({path.name for path in self.files}) < len(self.files):
            raise InputError(
                "--fasta: two files have the same name; the manifest tells them apart by it")

    def index(self, scratch, mapped, group):
        """[Index] of the files; the labels, which are its taxids, name nodes of the dump."""
        return [index_fasta(path, scratch, mapped, group)
                for path in progress(self.files, "index", unit="file")]

    def labels(self, distinct, scratch):
        """({label: Label}, {rank: {taxid in a Label: row of the class table}}, what the manifest
        says of the dump). Prints what is odd.
        """
        labels, names, date, digest, notes = label_taxids(
            self._dump, distinct, scratch, self.ranks)
        if notes:
            print(*notes, sep="\n")
        if self.classes:
            labels = keep_classes(labels, self.classes)
        rows = {}
        for rank in self.ranks:
            of_rank = SUPERKINGDOMS if rank == "superkingdom" else names
            rows[rank] = {taxid: {"taxid": taxid, "name": name} for taxid, name in of_rank.items()}
        return labels, rows, {"file": self._dump.name, "date": date, "sha256": digest}

    def taxids(self, labels):
        """(n,) labels -> NCBI taxids."""
        return labels

    def parts(self, records):
        """(K,) uint8: which of SPLITS each of some Records is in, or None if that is not given."""
        if self._parts is None:
            return None
        return np.array(self._parts, dtype=np.uint8)[records.source]

    def where(self, number, records, labels):
        """A function that names the i-th of some records of a file in an error."""
        return functools.partial(_in_fasta, self.files[number], records, labels)


class TableSource:
    """A .csv or .tsv file with a column of sequences and one of labels for each rank.

    Classes are known by their names.
    """

    def __init__(self, path, sequence_column="sequence", ranks=RANKS, classes=None,
                 split_column=None):
        self.files = [Path(path)]
        self.ranks = ranks
        self.classes = classes
        self.settings = {"sequence_column": sequence_column}
        if split_column:
            self.settings["split_column"] = split_column

    def index(self, scratch, mapped, group):
        """[Index] of the table's sequences, written into `scratch` as FASTA.

        Rows with the same labels share a number there.
        """
        self._table = read_table(
            self.files[0],
            self.settings["sequence_column"],
            self.ranks,
            scratch,
            classes=self.classes,
            split_column=self.settings.get("split_column"),
        )
        return [index_fasta(self._table.fasta, scratch, mapped, group)]

    def labels(self, distinct, scratch):
        """As FastaSource.labels; there is no dump."""
        labels = self._table.labels
        names = self._table.names
        if self._table.notes:
            print(*self._table.notes, sep="\n")
        if self.classes:
            labels = keep_classes(labels, self.classes, names)
        rows = {}
        for rank, of_rank in names.items():
            rows[rank] = {i: {"taxid": None, "name": name} for i, name in of_rank.items()}
        return labels, rows, None

    def taxids(self, labels):
        return np.zeros_like(labels)

    def parts(self, records):
        if self._table.parts is None:
            return None
        return self._table.parts[records.record]

    def where(self, number, records, labels):
        return functools.partial(_in_table, self.files[number], self._table.lines[records])


def _in_fasta(path, records, taxids, i):
    return f"{path}: record {records[i] + 1} '>{taxids[i]}'"


def _in_table(path, lines, i):
    return f"{path}: line {lines[i]}"
