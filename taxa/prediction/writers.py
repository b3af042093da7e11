"""What predict.py writes: a line per read, in one of three formats, and vectors as .npy.

Nothing is held back: both are streams.
"""

import collections
import json

import numpy as np

from taxa.prediction.kraken import check_taxids

FORMATS = ("tsv", "jsonl", "kraken")


class LineWriter:
    """Lines of one format.

    classes: {rank: [{"taxid", "name"}, ...]}. lineages: (L, R) class numbers.
    """

    def __init__(self, args, classes, lineages):
        """args: of predict.py: format, top_k, min_probability, whole_header, report."""
        self.args = args
        self.classes = classes
        self.lineages = lineages
        # {class numbers of a lineage, as far down as it was given: reads}
        self.counts = collections.Counter()
        if args.format == "kraken" or args.report:
            check_taxids(classes, "--report" if args.report else "--format kraken")
        formats = {"tsv": self.tsv, "jsonl": self.jsonl, "kraken": self.kraken}
        self.line = formats[args.format]

    def header(self):
        """What stands above the first read."""
        if self.args.format != "tsv":
            return ""
        columns = ["id", "length"]
        for rank, table in self.classes.items():
            for k in range(min(self.args.top_k, len(table))):
                suffix = f"_{k + 1}" if k else ""
                columns += [f"{rank}_{what}{suffix}" for what in ("taxid", "name", "probability")]
        columns += ["lineage_taxids", "lineage", "lineage_probability"]
        return "\t".join(columns) + "\n"

    def lines(self, reads, found):
        """The text of some reads. found: {name: a tensor with a row for each of them}."""
        found = {name: tensor.tolist() for name, tensor in found.items() if name != "pooled"}
        text = []
        for i, read in enumerate(reads):
            tops = {
                rank: list(zip(found[f"{rank}_class"][i], found[f"{rank}_probability"][i]))
                for rank in self.classes
            }
            shared = found["lineage_probability"][i]
            least = self.args.min_probability or 0.0
            if read.windows == 0:  # nothing that the network could see
                tops = {rank: [(0, 0.0)] * len(top) for rank, top in tops.items()}
                shared = [0.0] * len(shared)
                least = 1.0
            depth = sum(p >= least for p in shared)  # falls from the root down
            numbers = self.lineages[found["lineage"][i]][:depth]
            self.counts[tuple(numbers)] += 1
            lineage = [table[c] for table, c in zip(self.classes.values(), numbers)]
            probability = shared[max(depth - 1, 0)]
            identifier = self._identifier(read.header)
            text.append(self.line(identifier, read, tops, least, lineage, probability))
        return "".join(text)

    def _identifier(self, header):
        if self.args.whole_header:
            return " ".join(header.splitlines())
        return header.split(None, 1)[0]

    def tsv(self, identifier, read, tops, least, lineage, probability):
        cells = [identifier, str(sum(read.lengths))]
        unclassified = {"taxid": 0, "name": "unclassified"}
        for rank, top in tops.items():
            for c, p in top:
                row = self.classes[rank][c] if p >= least else unclassified
                cells += [_taxid(row), row["name"], f"{p:.6f}"]
        cells.append(";".join(_taxid(row) for row in lineage) or "0")
        cells.append(";".join(row["name"] for row in lineage) or "unclassified")
        cells.append(f"{probability:.6f}")
        return "\t".join(_cell(cell) for cell in cells) + "\n"

    def jsonl(self, identifier, read, tops, least, lineage, probability):
        ranks = {}
        for rank, top in tops.items():
            ranks[rank] = [
                {**self.classes[rank][c], "probability": round(p, 6)}
                for c, p in top if p >= least
            ]
        document = {
            "id": identifier,
            "length": sum(read.lengths),
            "windows": read.windows,
            "ranks": ranks,
            "lineage": {
                "taxids": [row["taxid"] for row in lineage],
                "names": [row["name"] for row in lineage],
                "probability": round(probability, 6),
            },
        }
        return json.dumps(document) + "\n"

    def kraken(self, identifier, read, tops, least, lineage, probability):
        status = "C" if lineage else "U"
        taxid = lineage[-1]["taxid"] if lineage else 0
        length = "|".join(map(str, read.lengths))
        return f"{status}\t{_cell(identifier)}\t{taxid}\t{length}\t{taxid}:{read.windows}\n"


def _cell(text):
    """Text on one line and in one column: every kind of line break, and tabs, become spaces."""
    return " ".join(text.splitlines()).replace("\t", " ")


def _taxid(row):
    # Labels that come from a user's table have no taxid.
    return "" if row["taxid"] is None else str(row["taxid"])


class VectorWriter:
    """A .npy file of float vectors (N, H), written as they come.

    The header is written anew at the end, when N is known.
    """

    def __init__(self, path, H, dtype):
        self.file = open(path, "wb")
        self.H = H
        self.N = 0
        self.dtype = np.dtype(dtype).newbyteorder("<")
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
        described = {
            "descr": self.dtype.str,
            "fortran_order": False,
            "shape": (self.N, self.H),
        }
        np.lib.format.write_array_header_1_0(self.file, described)
