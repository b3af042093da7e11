"""What predict.py writes: a line per read, in one of three formats, and vectors as .npy. Nothing is held back: both are streams."""

import collections
import json

import numpy as np

from taxa.prediction.kraken import check_taxids

FORMATS = ("tsv", "jsonl", "kraken")


class LineWriter:
    """Lines of one format. classes: {rank: [{"taxid", "name"}, ...]}; lineages: (L, R) class numbers."""

    def __init__(self, args, classes, lineages):
        """args: of predict.py: format, top_k, min_probability, whole_header, report."""
        self.args, self.classes, self.lineages = args, classes, lineages
        self.counts = collections.Counter()  # {class numbers of a lineage, as far down as it was given: reads}
        if args.format == "kraken" or args.report:
            check_taxids(classes, "--report" if args.report else "--format kraken")
        self.line = {"tsv": self.tsv, "jsonl": self.jsonl, "kraken": self.kraken}[args.format]

    def header(self):
        """What stands above the first read."""
        if self.args.format != "tsv":
            return ""
        columns = ["id", "length"]
        for rank, table in self.classes.items():
            for k in range(min(self.args.top_k, len(table))):
                columns += [f"{rank}_{what}{f'_{k + 1}' if k else ''}" for what in ("taxid", "name", "probability")]
        return "\t".join([*columns, "lineage_taxids", "lineage", "lineage_probability"]) + "\n"

    def lines(self, reads, found):
        """The text of some reads."""
        found = {name: tensor.tolist() for name, tensor in found.items() if name != "pooled"}
        text = []
        for i, read in enumerate(reads):
            tops = {rank: list(zip(found[f"{rank}_class"][i], found[f"{rank}_probability"][i])) for rank in self.classes}
            shared, least = found["lineage_probability"][i], self.args.min_probability or 0.0
            if read.windows == 0:  # nothing that the network could see
                tops, shared, least = {rank: [(0, 0.0)] * len(top) for rank, top in tops.items()}, [0.0] * len(shared), 1.0
            depth = sum(p >= least for p in shared)  # falls from the root down
            numbers = self.lineages[found["lineage"][i]][:depth]
            self.counts[tuple(numbers)] += 1
            lineage = [table[c] for table, c in zip(self.classes.values(), numbers)]
            identifier = " ".join(read.header.splitlines()) if self.args.whole_header else read.header.split(None, 1)[0]
            text.append(self.line(identifier, read, tops, least, lineage, shared[max(depth - 1, 0)]))
        return "".join(text)

    def tsv(self, identifier, read, tops, least, lineage, probability):
        cells = [identifier, str(sum(read.lengths))]
        for rank, top in tops.items():
            for c, p in top:
                row = self.classes[rank][c] if p >= least else {"taxid": 0, "name": "unclassified"}
                cells += [_taxid(row), row["name"], f"{p:.6f}"]
        cells += [";".join(_taxid(row) for row in lineage) or "0", ";".join(row["name"] for row in lineage) or "unclassified"]
        return "\t".join([*(_cell(cell) for cell in cells), f"{probability:.6f}"]) + "\n"

    def jsonl(self, identifier, read, tops, least, lineage, probability):
        ranks = {rank: [{**self.classes[rank][c], "probability": round(p, 6)} for c, p in top if p >= least] for rank, top in tops.items()}
        lineage = {"taxids": [row["taxid"] for row in lineage], "names": [row["name"] for row in lineage],
                   "probability": round(probability, 6)}
        return json.dumps({"id": identifier, "length": sum(read.lengths), "windows": read.windows, "ranks": ranks,
                           "lineage": lineage}) + "\n"

    def kraken(self, identifier, read, tops, least, lineage, probability):
        taxid, length = lineage[-1]["taxid"] if lineage else 0, "|".join(map(str, read.lengths))
        return f"{'C' if lineage else 'U'}\t{_cell(identifier)}\t{taxid}\t{length}\t{taxid}:{read.windows}\n"


def _cell(text):
    """Text on one line and in one column: every kind of line break, and tabs, become spaces."""
    return " ".join(text.splitlines()).replace("\t", " ")


def _taxid(row):
    return "" if row["taxid"] is None else str(row["taxid"])  # labels that come from a user's table have none


class VectorWriter:
    """A .npy file of float vectors (N, H), written as they come; the header is written anew at the end, when N is known."""

    def __init__(self, path, H, dtype):
        self.file, self.H, self.dtype, self.N = open(path, "wb"), H, np.dtype(dtype).newbyteorder("<"), 0
        self._header()

    def append(self, vectors):
        """vectors: (n, H)."""
        self.file.write(vectors.numpy().astype(self.dtype).tobytes())
        self.N += len(vectors)

    def close(self):
        self.file.seek(0)
        self._header()
        self.file.close()

    def _header(self):
        """NumPy pads it so that any N takes the same number of bytes."""
        np.lib.format.write_array_header_1_0(self.file, {"descr": self.dtype.str, "fortran_order": False, "shape": (self.N, self.H)})
