"""Kraken's report: how many reads each taxon got.

It is the format that Kraken 2 writes with --report, for Pavian, KrakenTools, Bracken and the like.
"""

import collections

from taxa.errors import InputError

CODES = {
    "superkingdom": "D",
    "domain": "D",
    "kingdom": "K",
    "phylum": "P",
    "class": "C",
    "order": "O",
    "family": "F",
    "genus": "G",
    "species": "S",
}


def check_taxids(classes, flag):
    """Raise InputError unless all classes have NCBI's taxids.

    classes: {rank: [{"taxid", "name"}, ...]}.
    """
    if any(row["taxid"] is None for table in classes.values() for row in table):
        raise InputError(
            f"{flag} tells taxa by NCBI's taxids, and this checkpoint's classes have none: "
            "use --format tsv or jsonl"
        )


def report(classes, counts):
    """The text of a report.

    classes: {rank: [{"taxid", "name"}, ...]}, from the root down. counts: {lineage: reads}, where a
    lineage is a tuple of class numbers, cut at the deepest rank that a read was given; () stands
    for the unclassified reads.

    There are six columns: percent of all reads, reads in the clade, reads at the taxon itself, rank
    code, taxid, and name, indented by two spaces a rank. "unclassified" comes first. Siblings are
    ordered by their reads, most first.
    """
    ranks = list(classes)
    total = max(sum(counts.values()), 1)
    clades = collections.Counter()
    children = collections.defaultdict(set)
    for lineage, reads in counts.items():
        for depth in range(len(lineage) + 1):
            clades[lineage[:depth]] += reads
            if depth:
                children[lineage[:depth - 1]].add(lineage[:depth])
    unclassified = counts.get((), 0)

    def line(clade, own, code, taxid, depth, name):
        percent = 100 * clade / total
        return f"{percent:6.2f}\t{clade}\t{own}\t{code}\t{taxid}\t{'  ' * depth}{name}\n"

    def below(lineage):
        for child in sorted(children[lineage], key=lambda each: (-clades[each], each)):
            depth = len(child)
            rank = ranks[depth - 1]
            row = classes[rank][child[-1]]
            own = counts.get(child, 0)
            code = CODES.get(rank, "-")
            yield line(clades[child], own, code, row["taxid"], depth, row["name"])
            yield from below(child)

    return "".join([
        line(unclassified, unclassified, "U", 0, 0, "unclassified"),
        line(clades[()] - unclassified, 0, "R", 1, 0, "root"),
        *below(()),
    ])
