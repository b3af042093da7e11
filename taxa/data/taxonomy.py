"""taxid -> superkingdom, phylum, genus, or any other ranks, from an NCBI taxonomy dump that the user names.

ete3 gives lineages, ranks, names and merged ids. It holds the whole tree as Python objects (over 2.5 million nodes) and downloads a
dump when it has none, so it is handed an excerpt: the lines of the dump that lie on the way from the taxids asked for to the root.
It works in a scratch folder, from that file alone, and never reaches the network. ete3 is GPL-3 and is imported only here.

The superkingdom is told by taxid, not by rank: since March 2025 NCBI calls the rank "domain" or, for viruses, "acellular root".
"""

import contextlib
import io
import os
import re
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, Optional

from taxa import RANKS
from taxa.errors import InputError, choose

SUPERKINGDOMS = {2157: "Archaea", 2: "Bacteria", 2759: "Eukaryota", 10239: "Viruses"}
MEMBERS = ("nodes.dmp", "names.dmp", "merged.dmp", "delnodes.dmp")
# NCBI's ranks that occur at most once in a lineage, from coarse to fine ("domain" and "acellular root" since March 2025).
NCBI_RANKS = (
    "superkingdom", "domain", "acellular root", "realm", "subrealm", "kingdom", "subkingdom", "superphylum", "phylum", "subphylum",
    "infraphylum", "superclass", "class", "subclass", "infraclass", "cohort", "subcohort", "superorder", "order", "suborder", "infraorder",
    "parvorder", "superfamily", "family", "subfamily", "tribe", "subtribe", "genus", "subgenus", "section", "subsection", "series",
    "subseries", "species group", "species subgroup", "species", "subspecies", "varietas", "subvariety", "forma", "strain")
MOST_RANKS = 8


class Label(NamedTuple):
    """The taxid at each rank asked for, None where the lineage has none; and why the sequence is dropped, None where it is kept."""

    taxids: tuple  # (R,)
    reason: Optional[str] = None


def class_id(row):
    """What tells a class {"taxid", "name"} from others: its taxid, or, where labels are a table's own, its name."""
    return row["name"] if row["taxid"] is None else row["taxid"]


def check_ranks(ranks, known=NCBI_RANKS):
    """Return `ranks` as a tuple. Raises InputError unless they are one to eight different names of `known`, from coarse to fine.

    known=None: any names, in any order (the columns of a table).
    """
    if not 1 <= len(ranks) <= MOST_RANKS:
        raise InputError(f"--ranks: {len(ranks)} ranks; give from one to {MOST_RANKS}")
    twice = next((rank for rank in ranks if ranks.count(rank) > 1), None)
    if twice:
        raise InputError(f"--ranks: {twice} is given twice")
    if known is not None:
        ordered = sorted((choose("rank", rank, known) for rank in ranks), key=known.index)
        if ordered != list(ranks):
            raise InputError(f"--ranks: give them from coarse to fine (the split is by the last): --ranks {' '.join(ordered)}")
    return tuple(ranks)


class Dump:
    """An NCBI taxonomy dump, .zip or .tar.gz, with nodes.dmp and names.dmp (merged.dmp and delnodes.dmp where present)."""

    def __init__(self, path):
        """Raises InputError for a missing or damaged archive, or one without nodes.dmp or names.dmp."""
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file; give NCBI's taxdmp_YYYY-MM-DD.zip or taxdump.tar.gz")
        with self._errors():
            if zipfile.is_zipfile(self.path):
                self._archive = zipfile.ZipFile(self.path)
                names = {info.filename: info for info in self._archive.infolist()}
                times = {name: time.struct_time((*info.date_time, 0, 0, -1)) for name, info in names.items()}
            else:
                self._archive = tarfile.open(self.path)
                names = {member.name.removeprefix("./"): member for member in self._archive.getmembers() if member.isfile()}
                times = {name: time.gmtime(member.mtime) for name, member in names.items()}
                while self._archive.fileobj.read(1 << 20):  # to the end: only there does gzip compare its checksum
                    pass
        self._members = {name: names[name] for name in MEMBERS if name in names}
        for name in ("nodes.dmp", "names.dmp"):
            if name not in self._members:
                raise InputError(f"{self.path}: no {name} at the top level: not an NCBI taxonomy dump")
        named = re.search(r"\d{4}-\d{2}-\d{2}", self.path.name)
        with self._errors():
            self.date = named[0] if named else time.strftime("%Y-%m-%d", times["nodes.dmp"])  # of the name, else of nodes.dmp

    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path}: the archive is damaged or not a .zip or .tar.gz ({' '.join(str(error).split())})") from None

    def lines(self, name):
        """Yield the lines of one member; nothing when the dump lacks it."""
        if name not in self._members:
            return
        with self._errors():
            member = self._members[name]
            file = self._archive.open(member) if isinstance(self._archive, zipfile.ZipFile) else self._archive.extractfile(member)
            with file, io.TextIOWrapper(file, encoding="utf-8") as text:
                yield from text

    def integers(self, name, count):
        """Yield (line, its first `count` fields as integers); InputError names a line that has none, or does not end in '|'."""
        for number, line in enumerate(self.lines(name), start=1):  # millions of them: no more is parsed than is needed
            fields = line.split("|", count)
            try:
                numbers = [int(field) for field in fields[:count]]
                if len(fields) <= count or not line.rstrip().endswith("|"):
                    raise ValueError
            except ValueError:
                raise InputError(f"{self.path}: {name} line {number} does not start with {count} taxid(s)") from None
            yield line, numbers

    def excerpt(self, taxids, out):
        """Write a dump of only the lineages of `taxids` as a tar file `out`.

        Returns ({taxid: current id}, {unknown id: reason}, {taxid of a node: scientific name, as ete3 would not keep its quotes}).
        """
        parents = {child: parent for _, (child, parent) in self.integers("nodes.dmp", 2)}
        if 1 not in parents:
            raise InputError(f"{self.path}: nodes.dmp has no root (taxid 1)")
        merges = {old: new for _, (old, new) in self.integers("merged.dmp", 2)}
        current, unknown = {}, {}
        for taxid in taxids:
            now, seen = taxid, set()
            while now not in parents and now in merges and now not in seen:  # merges can follow on merges
                seen.add(now)
                now = merges[now]
            if now in parents:
                current[taxid] = now
            else:
                unknown[taxid] = "unknown taxid"
        for _, (taxid,) in self.integers("delnodes.dmp", 1):
            if taxid in unknown:
                unknown[taxid] = "deleted taxid"
        needed = {1}
        for now in current.values():
            climbed = set()
            while now not in needed:
                climbed.add(now)
                parent = parents.get(now)
                if parent is None or parent in climbed:
                    raise InputError(f"{self.path}: nodes.dmp: the lineage of {now} never reaches the root")
                now = parent
            needed |= climbed
        lines = {
            "nodes.dmp": [line for line, (taxid, _) in self.integers("nodes.dmp", 2) if taxid in needed],
            "names.dmp": [line for line, (taxid,) in self.integers("names.dmp", 1)
                          if taxid in needed and [field.strip() for field in line.split("|")[3:4]] == ["scientific name"]],
            "merged.dmp": [f"{old}\t|\t{new}\t|\n" for old, new in sorted(current.items()) if old != new],
        }
        unnamed = needed - {int(line.split("|")[0]) for line in lines["names.dmp"]}
        if unnamed:
            raise InputError(f"{self.path}: names.dmp has no scientific name for taxid {min(unnamed)}")
        with tarfile.open(out, "w") as tar:
            for name, text in lines.items():
                data = "".join(text).encode()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        names = {int(line.split("|")[0]): line.split("|")[1].strip() for line in lines["names.dmp"]}
        return current, unknown, names


def label_taxids(dump_path, taxids, scratch, ranks=RANKS):
    """Labels of distinct taxids at `ranks`. Returns ({taxid: Label}, {taxid of a class: scientific name}, the dump's date).

    scratch: an existing folder for the excerpt and ete3's database. Raises InputError for a dump that cannot be read.
    """
    dump = Dump(dump_path)
    excerpt = Path(scratch).resolve() / "excerpt.tar"
    current, unknown, names = dump.excerpt(sorted(set(taxids)), excerpt)
    labels = {taxid: Label((None,) * len(ranks), reason) for taxid, reason in unknown.items()}
    if not current:
        return labels, {}, dump.date
    with _ete3(excerpt) as ncbi:
        lineages = {taxid: ncbi.get_lineage(taxid) for taxid in current}
        nodes = sorted({node for lineage in lineages.values() for node in lineage})
        rank_of = ncbi.get_rank(nodes)
    for taxid, lineage in lineages.items():
        at = {rank_of[node]: node for node in lineage}
        at["superkingdom"] = next((node for node in lineage if node in SUPERKINGDOMS), None)
        found = tuple(at.get(rank) for rank in ranks)
        missing = next((rank for rank, node in zip(ranks, found) if node is None), None)
        labels[taxid] = Label(found, missing and f"no {missing}")
    classes = {node for label in labels.values() if label.reason is None for node in label.taxids}
    return labels, {node: names[node] for node in classes}, dump.date


@contextlib.contextmanager
def _ete3(excerpt):
    """ete3's NCBITaxa over one tar file, built beside it. ete3 prints, and writes into the working directory: both are held off."""
    from ete3 import NCBITaxa

    before = os.getcwd()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one warning per merged id; the excerpt followed them already
        try:
            os.chdir(excerpt.parent)
            ncbi = NCBITaxa(dbfile=str(excerpt.with_suffix(".sqlite")), taxdump_file=str(excerpt))
        finally:
            os.chdir(before)
        try:
            yield ncbi
        finally:
            ncbi.db.close()
