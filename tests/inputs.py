"""FASTA files and taxonomy dumps that several test files write, and a naive reader of the first."""

import gzip
import io
import tarfile
import zipfile

from taxa.data.fasta import index_fasta


def naive_records(data):
    """[(taxid, letters)] of the bytes of a FASTA file."""
    records = []
    for line in data.splitlines():
        if line.startswith(b">"):
            records.append((int(line[1:].split()[0]), []))
        elif records:
            records[-1][1].append(line)
    return [(taxid, b"".join(lines)) for taxid, lines in records]


def naive_normal(letters):
    """Upper-case letters; U is a T, and what is not one of ACGTU is an N."""
    normal = {ord(letter): ord(letter.upper()) for letter in "ACGTNacgtn"}
    normal |= {ord("U"): ord("T"), ord("u"): ord("T")}
    return bytes(normal.get(x, ord("N")) for x in letters)


def index_bytes(folder, data, name="x.fa"):
    (folder / name).write_bytes(data)
    (folder / "scratch").mkdir(exist_ok=True)
    return index_fasta(folder / name, folder / "scratch")


# (taxid, parent, rank, scientific name). 70xx: taxa in which something is missing
NODES = [
    (1, 1, "no rank", "root"),
    (131567, 1, "no rank", "cellular organisms"),
    (2, 131567, "superkingdom", "Bacteria"),
    (2157, 131567, "superkingdom", "Archaea"),
    (2759, 131567, "superkingdom", "Eukaryota"),
    (10239, 1, "superkingdom", "Viruses"),
    (1224, 2, "phylum", "Pseudomonadota"),
    (1236, 1224, "class", "Gammaproteobacteria"),
    (561, 1236, "genus", "Escherichia"),
    (562, 561, "species", "Escherichia coli"),
    (83333, 562, "strain", "Escherichia coli K-12"),
    (28890, 2157, "phylum", "Methanobacteriota"),
    (2207, 28890, "genus", "Methanosarcina"),
    (2209, 2207, "species", "Methanosarcina mazei"),
    (33208, 2759, "kingdom", "Metazoa"),
    (7711, 33208, "phylum", "Chordata"),
    (89593, 7711, "subphylum", "Craniata"),
    (9605, 89593, "genus", "Homo"),
    (9606, 9605, "species", "Homo sapiens"),
    (2559587, 10239, "clade", "Riboviria"),
    (2732408, 2559587, "phylum", "Pisuviricota"),
    (12059, 2732408, "genus", "Enterovirus"),
    (138950, 12059, "species", "Enterovirus C"),
    (7001, 2, "genus", "a genus in no phylum"),
    (7002, 7001, "species", "its species"),
    (7003, 1236, "family", "a family without genera"),
    (7004, 7003, "species", "its species"),
    (28384, 1, "no rank", "other sequences"),
    (7005, 28384, "genus", "a genus in no superkingdom"),
    (7006, 131567, "phylum", "a phylum in no superkingdom"),
    (7007, 7006, "genus", "its genus"),
]
MERGED = [  # (old, new)
    (8001, 562),  # one step
    (8002, 8003), (8003, 8004), (8004, 9606),  # three steps
    (8005, 561),  # into a node that is labelled anyway
    (8006, 7999),  # onto nothing
    (8007, 8008), (8008, 8007),  # a cycle of two
    (8009, 8009),  # a cycle of one
    (9606, 562),  # an id that is still a node
]
DELETED = [9001, 9002]
# Another, whose top has the newer names of ranks.
FEW = [
    (1, 1, "no rank", "root"),
    (2, 1, "domain", "Bacteria"),
    (10239, 1, "acellular root", "Viruses"),
    (20, 2, "phylum", "P"),
    (21, 20, "genus", "'G one'"),
    (22, 21, "species", "s"),
    (23, 20, "genus", "G two"),
    (30, 10239, "phylum", "V"),
    (31, 30, "genus", "W"),
    (40, 2, "genus", "no phylum"),
    (50, 20, "family", "no genus"),
    (60, 1, "no rank", "no superkingdom"),
]


def row(*fields):
    return "\t|\t".join(map(str, fields)) + "\t|\n"


def dump_texts(nodes=NODES, merged=MERGED, deleted=DELETED):
    """{member: text} of a dump as NCBI writes it: 13 columns of nodes, several names of a taxon."""
    names = []
    for taxid, _, _, name in nodes:
        names += [
            row(taxid, f"{name} of old", "", "synonym"),
            row(taxid, name, "", "scientific name"),
            row(taxid, f"common {taxid}", "", "genbank common name"),
            row(taxid, f"{name} Linnaeus, 1758", "", "authority"),
        ]
    return {
        "nodes.dmp": "".join(row(*node[:3], "", 0, 0, 1, 0, 0, 0, 0, 0, "") for node in nodes),
        "names.dmp": "".join(names),
        "merged.dmp": "".join(row(old, new) for old, new in merged),
        "delnodes.dmp": "".join(row(taxid) for taxid in deleted),
        "division.dmp": row(0, "BCT", "Bacteria", ""),
        "readme.txt": "not a table\n",
    }


def archive_bytes(texts, kind, prefix=""):
    """The bytes of an archive. kind: zip, stored.zip, tar.gz or tar. texts: str or bytes."""
    datas = {
        prefix + name: text.encode() if isinstance(text, str) else text
        for name, text in texts.items()
    }
    out = io.BytesIO()
    if kind.endswith("zip"):
        how = zipfile.ZIP_STORED if kind == "stored.zip" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(out, "w", how) as archive:
            for name, data in datas.items():
                member = zipfile.ZipInfo(name, date_time=(2023, 5, 6, 7, 8, 10))
                archive.writestr(member, data, how)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in datas.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1683356890  # 2023-05-06
            archive.addfile(info, io.BytesIO(data))
    return gzip.compress(out.getvalue(), mtime=0) if kind == "tar.gz" else out.getvalue()


def write_dump(path):
    """The few nodes as a zip; 99 is now 23, and 98 was deleted."""
    path.write_bytes(archive_bytes(dump_texts(FEW, [(99, 23)], [98]), "zip"))
    return path
