"""taxid -> superkingdom, phylum, genus, or any other ranks, from an NCBI taxonomy dump.

ete3 is used for one thing: it gives the lineage of each taxid and the rank of each of its nodes.

The user names the dump. ete3 holds a whole tree as Python objects (over 2.5 million nodes), and
downloads a dump when it has none. So it is handed an excerpt: the lines of the dump that lie on
the way from the taxids asked for to the root. It works in a scratch folder, from that file alone,
and never reaches the network. ete3 is GPL-3 and is imported only here.

The superkingdom is told by taxid, not by rank: since March 2025 NCBI calls the rank "domain" or,
for viruses, "acellular root". So a dump must name those four taxids as NCBI does before
superkingdom is read from it.
"""

import collections
import contextlib
import hashlib
import io
import os
import re
import sqlite3
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from taxa import RANKS
from taxa.errors import InputError, choose
from taxa.runtime.files import sha256

SUPERKINGDOMS = {2157: "Archaea", 2: "Bacteria", 2759: "Eukaryota", 10239: "Viruses"}
# NCBI's scientific names, now and before, and synonyms that it may come back to; in lower case
SUPERKINGDOM_NAMES = {
    2: ("bacteria", "eubacteria"),
    2157: ("archaea", "archaebacteria"),
    2759: ("eukaryota", "eukarya", "eucarya", "eukaryotae"),
    10239: ("viruses", "vira"),
}
MEMBERS = ("nodes.dmp", "names.dmp", "merged.dmp", "delnodes.dmp")
# NCBI's ranks that occur at most once in a lineage, from coarse to fine
# ("domain" and "acellular root" since March 2025).
NCBI_RANKS = (
    "superkingdom", "domain", "acellular root", "realm", "subrealm",
    "kingdom", "subkingdom",
    "superphylum", "phylum", "subphylum", "infraphylum",
    "superclass", "class", "subclass", "infraclass",
    "cohort", "subcohort",
    "superorder", "order", "suborder", "infraorder", "parvorder",
    "superfamily", "family", "subfamily",
    "tribe", "subtribe",
    "genus", "subgenus", "section", "subsection", "series", "subseries",
    "species group", "species subgroup", "species", "subspecies",
    "varietas", "subvariety", "forma", "strain",
)
MOST_RANKS = 8


class Label(NamedTuple):
    """The taxid at each rank asked for, None where the lineage has none.

    And why the sequence is dropped, None where it is kept.
    """

    taxids: tuple  # (R,)
    reason: str | None = None


class Labelled(NamedTuple):
    """What label_taxids found."""

    labels: dict  # {taxid: Label}
    names: dict  # {taxid of a class: scientific name}
    date: str | None  # of the dump
    digest: str  # SHA-256 of the dump
    notes: list  # lines for the user: what was read otherwise than it stands in the dump


# ---------------------------------------------------------------- names, classes and ranks


def one_line(name):
    """A name in which each tab or line break of any kind is a blank: names stand in lines and
    columns.
    """
    return " ".join(name.replace("\t", "\n").splitlines())


def class_id(row):
    """What tells a class {"taxid", "name"} from others: its taxid, or, where the labels are a
    table's own, its name.
    """
    return row["name"] if row["taxid"] is None else row["taxid"]


def keep_classes(labels, classes, names=None):
    """{taxid: Label} with a reason to be dropped wherever a taxon is no class of `classes`.

    classes: class tables {rank: [{"taxid", "name"}, ...]}. names: {rank: {number: name}} where
    the labels are a table's own. Raises InputError when one is of taxids and the other of names.
    """
    if any((row["taxid"] is None) != (names is not None)
           for table in classes.values() for row in table):
        raise InputError("--classes-of: " + (
            "its classes are NCBI's taxa, which the labels of --table are not: give --fasta and "
            "--taxdump" if names else
            "its classes are labels of a table, without taxids: give --table"))
    known = [{class_id(row) for row in table} for table in classes.values()]
    outside = {}
    for taxid, label in labels.items():
        if label.reason is not None:
            continue
        if names is None:
            ids = label.taxids
        else:
            ids = [names[rank][number] for rank, number in zip(classes, label.taxids)]
        unknown = (rank for rank, some, of_rank in zip(classes, ids, known) if some not in of_rank)
        rank = next(unknown, None)
        outside[taxid] = label._replace(reason=rank and f"{rank} not of --classes-of")
    return labels | outside


def renumber(y, found, classes):
    """Class numbers y (N, R) of the tables `found` -> (N, R) of the tables `classes`.

    `classes` hold the same classes as `found` and may hold more.
    """
    columns = []
    for column, (rank, table) in enumerate(classes.items()):
        place = {class_id(row): i for i, row in enumerate(table)}
        new = np.array([place[class_id(row)] for row in found[rank]], dtype=y.dtype)
        columns.append(new[y[:, column]])
    return np.stack(columns, axis=1)


def check_ranks(ranks, known=NCBI_RANKS):
    """Return `ranks` as a tuple.

    Raises InputError unless they are one to eight different names of `known`, from coarse to
    fine. known=None: any names, in any order (the columns of a table).
    """
    if not 1 <= len(ranks) <= MOST_RANKS:
        raise InputError(f"--ranks: {len(ranks)} ranks; give from one to {MOST_RANKS}")
    twice = next((rank for rank in ranks if ranks.count(rank) > 1), None)
    if twice:
        raise InputError(f"--ranks: {twice} is given twice")
    if known is not None:
        ordered = sorted((choose("rank", rank, known) for rank in ranks), key=known.index)
        if ordered != list(ranks):
            raise InputError("--ranks: give them from coarse to fine (the split is by the last): "
                             f"--ranks {' '.join(ordered)}")
    return tuple(ranks)


# ---------------------------------------------------------------- the dump


class Dump:
    """An NCBI taxonomy dump, in one folder of any name.

    It has nodes.dmp and names.dmp, and may have merged.dmp and delnodes.dmp. It is a .zip, a
    .tar.gz or a folder of extracted files. Its files are UTF-8, with or without a byte-order mark.
    """

    def __init__(self, path):
        """Raises InputError for a missing or damaged archive, and for one without nodes.dmp or
        names.dmp, or with two of them.
        """
        self.path = Path(path)
        self._archive = None
        if not self.path.exists():
            raise InputError(
                f"{self.path}: no such file; give NCBI's taxdmp_YYYY-MM-DD.zip or taxdump.tar.gz, "
                "or a folder of its files")
        try:
            self._open()
        except InputError:
            self.close()
            raise

    def close(self):
        """Close the archive."""
        if self._archive is not None:
            self._archive.close()

    def _open(self):
        """Find the members and the date."""
        with self._errors():
            if self.path.is_dir():
                files = [*self.path.glob("*.dmp"), *self.path.glob("*/*.dmp")]
                names = {str(file.relative_to(self.path)): file for file in files}
                times = {}  # a copied file has the time of the copy
            elif zipfile.is_zipfile(self.path):
                self._archive = zipfile.ZipFile(self.path)
                names = {info.filename: info for info in self._archive.infolist()}
                times = {name: time.struct_time((*info.date_time, 0, 0, -1))
                         for name, info in names.items()}
            else:
                self._archive = tarfile.open(self.path)
                names = {member.name.removeprefix("./"): member
                         for member in self._archive.getmembers() if member.isfile()}
                times = {name: time.gmtime(member.mtime) for name, member in names.items()}
                # to the end: only there does gzip compare its checksum
                while self._archive.fileobj.read(1 << 20):
                    pass
        folders = sorted({name.removesuffix("nodes.dmp")
                          for name in names if name.split("/")[-1] == "nodes.dmp"})
        if len(folders) > 1:
            some = ", ".join(f"{folder}nodes.dmp" for folder in folders[:3])
            raise InputError(
                f"{self.path}: nodes.dmp is in it more than once ({some}): give one dump")
        self._members = {name: names[folder + name]
                         for folder in folders for name in MEMBERS if folder + name in names}
        for name in ("nodes.dmp", "names.dmp"):
            if name not in self._members:
                raise InputError(f"{self.path}: no {name} in it: not an NCBI taxonomy dump")
        named = re.search(r"\d{4}-\d{2}-\d{2}", self.path.name)
        with self._errors():  # the date of the name, else of nodes.dmp in an archive
            self.date = None
            if named:
                self.date = named[0]
            elif times:
                self.date = time.strftime("%Y-%m-%d", times[f"{folders[0]}nodes.dmp"])

    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error,
                EOFError, OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path}: the archive is damaged or not a .zip or .tar.gz "
                             f"({' '.join(str(error).split())})") from None

    def _open_member(self, name):
        """A file of the bytes of one member."""
        member = self._members[name]
        if self._archive is None:
            return open(member, "rb")
        if isinstance(self._archive, zipfile.ZipFile):
            return self._archive.open(member)
        return self._archive.extractfile(member)

    def lines(self, name):
        """Yield the lines of one member; nothing when the dump lacks it.

        Raises InputError for one that is not UTF-8.
        """
        if name not in self._members:
            return
        number = 0
        with self._errors():
            file = self._open_member(name)
            with file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
                try:
                    for number, line in enumerate(text, start=1):
                        yield line
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{self.path}: {name} is not UTF-8 after line {number} "
                        f"(byte {error.object[error.start]:#04x}): "
                        "iconv -f LATIN1 -t UTF-8 makes it so if it is Latin-1") from None

    def integers(self, name, count):
        """Yield (line number, line, its first `count` fields as integers) of one member.

        Raises InputError, which names the line, for one without them or without '|' at its end.
        """
        # There are millions of lines: no more is parsed than is needed.
        for number, line in enumerate(self.lines(name), start=1):
            fields = line.split("|", count)
            try:
                numbers = [int(field) for field in fields[:count]]
                if len(fields) <= count or not line.rstrip().endswith("|"):
                    raise ValueError
            except ValueError:
                raise InputError(f"{self.path}: {name} line {number} does not start with "
                                 f"{count} taxid(s)") from None
            yield number, line, numbers

    def pairs(self, name):
        """{first: second taxid} of every line of one member.

        Raises InputError for a first that stands there twice.
        """
        found = {}
        for number, _, (first, second) in self.integers(name, 2):
            if first in found:
                raise InputError(
                    f"{self.path}: {name} line {number}: taxid {first} is listed twice "
                    f"(first with {found[first]}, then with {second}): leave one")
            found[first] = second
        return found

    def scientific_names(self, taxids):
        """{taxid: scientific name} of a set of taxids.

        Raises InputError where one has none, or two.
        """
        found = {}
        for number, line, (taxid,) in self.integers("names.dmp", 1):
            if taxid not in taxids:
                continue
            fields = [field.strip() for field in _fields(line)]
            if len(fields) != 4:
                raise InputError(
                    f"{self.path}: names.dmp line {number}: {len(fields)} fields, not 4; "
                    "they are separated by tab, |, tab")
            if fields[3] == "scientific name":
                if taxid in found:
                    raise InputError(
                        f"{self.path}: names.dmp line {number}: taxid {taxid} has two scientific "
                        f"names, {found[taxid]!r} and {fields[1]!r}: leave one")
                found[taxid] = fields[1]
        missing = taxids - found.keys()
        if missing:
            raise InputError(
                f"{self.path}: names.dmp has no scientific name for taxid {min(missing)}")
        return found

    def excerpt(self, taxids, out, superkingdoms=True):
        """Write a dump of only the lineages of `taxids` as a tar file `out`, in the spelling that
        ete3 reads.

        Returns ({taxid: current id}, {unknown id: reason}, {taxid of a node: scientific name},
        ranks in another spelling than NCBI's). superkingdoms: raise InputError unless the dump
        names the four superkingdoms' taxids as NCBI does.
        """
        parents = self.pairs("nodes.dmp")
        if 1 not in parents:
            raise InputError(f"{self.path}: nodes.dmp has no root (taxid 1)")
        current, unknown = self._current(taxids, parents)
        needed = self._climb(current.values(), parents)
        known = SUPERKINGDOMS.keys() & parents.keys() if superkingdoms else set()
        names = self.scientific_names(needed | known)
        if superkingdoms:
            self._check_superkingdoms(known, names)
        nodes, respelled = self._nodes(needed)
        lines = {
            "nodes.dmp": nodes,
            # ete3 needs some name
            "names.dmp": [f"{taxid}\t|\t{taxid}\t|\t\t|\tscientific name\t|\n"
                          for taxid in sorted(needed)],
            "merged.dmp": [f"{old}\t|\t{new}\t|\n"
                           for old, new in sorted(current.items()) if old != new],
        }
        with tarfile.open(out, "w") as tar:
            for name, text in lines.items():
                data = "".join(text).encode()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return current, unknown, names, respelled

    def _current(self, taxids, parents):
        """({taxid: its id now, after merges}, {unknown taxid: reason})."""
        merges = self.pairs("merged.dmp")
        current, unknown = {}, {}
        for taxid in taxids:
            now, seen = taxid, set()
            while now not in parents and now in merges and now not in seen:
                seen.add(now)  # merges can follow on merges
                now = merges[now]
            if now in parents:
                current[taxid] = now
            else:
                unknown[taxid] = "unknown taxid"
        for _, _, (taxid,) in self.integers("delnodes.dmp", 1):
            if taxid in unknown:
                unknown[taxid] = "deleted taxid"
        return current, unknown

    def _climb(self, taxids, parents):
        """The set of all nodes from `taxids` up to the root."""
        needed = {1}
        for now in taxids:
            climbed = set()
            while now not in needed:
                climbed.add(now)
                parent = parents.get(now)
                if parent is None or parent in climbed:
                    raise InputError(
                        f"{self.path}: nodes.dmp: the lineage of {now} never reaches the root")
                now = parent
            needed |= climbed
        return needed

    def _check_superkingdoms(self, known, names):
        """Raise InputError unless some of the four are there, each under a name of NCBI's.

        known: the taxids of superkingdoms that the dump has; names: {taxid: scientific name}.
        """
        other = [f"taxid {taxid} is {names[taxid]!r}, not {SUPERKINGDOMS[taxid]}"
                 for taxid in sorted(known)
                 if names[taxid].casefold() not in SUPERKINGDOM_NAMES[taxid]]
        if other or not known:
            raise InputError(
                f"{self.path}: {'; '.join(other) or 'no taxid 2, 2157, 2759 or 10239'}: "
                "superkingdom is told by NCBI's taxids, which this dump does not have; "
                "--ranks phylum genus works without")

    def _nodes(self, needed):
        """(lines of nodes.dmp for these taxids, the set of ranks that have capitals)."""
        nodes, respelled = [], set()
        for number, line, (taxid, parent) in self.integers("nodes.dmp", 2):
            if taxid not in needed:
                continue
            rank = "".join(_fields(line)[2:3]).strip()
            if not rank:
                raise InputError(f"{self.path}: nodes.dmp line {number}: no rank in the third "
                                 "field ('no rank' is one)")
            respelled |= {rank} - {rank.lower()}
            nodes.append(f"{taxid}\t|\t{parent}\t|\t{rank.lower()}\t|\n")
        return nodes, respelled

    def digest(self):
        """Hex SHA-256 of the archive, or of a folder's members: their names and own digests."""
        if self._archive is not None:
            return sha256(self.path)
        lines = [f"{sha256(file)}  {name}\n" for name, file in sorted(self._members.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _fields(line):
    """The fields of a line of a dump.

    They are between tab, |, tab, as NCBI writes them, so that a name may hold a |; else between |.
    """
    line = line.rstrip().removesuffix("|")
    if "\t|\t" in line:
        return line.removesuffix("\t").split("\t|\t")
    return line.split("|")


# ---------------------------------------------------------------- labels


def label_taxids(dump_path, taxids, scratch, ranks=RANKS):
    """Label distinct taxids at `ranks` by a dump. Returns a Labelled.

    A lineage with two taxa of a rank asked for is dropped, as one without is. The capitals of a
    rank do not matter. A tab in a name becomes a blank. scratch: an existing folder for the
    excerpt and ete3's database. Raises InputError for a dump that cannot be read, or, where
    superkingdom is asked for, whose taxids are not NCBI's.
    """
    excerpt = Path(scratch).resolve() / "excerpt.tar"
    with contextlib.closing(Dump(dump_path)) as dump:
        current, unknown, names, respelled = dump.excerpt(
            sorted(set(taxids)), excerpt, "superkingdom" in ranks)
    labels = {taxid: Label((None,) * len(ranks), reason) for taxid, reason in unknown.items()}
    if not current:
        return Labelled(labels, {}, dump.date, dump.digest(), [])
    with _ete3(excerpt) as ncbi:
        lineages = {taxid: ncbi.get_lineage(taxid) for taxid in current}
        nodes = sorted({node for lineage in lineages.values() for node in lineage})
        rank_of = ncbi.get_rank(nodes)
    for taxid, lineage in lineages.items():
        at = collections.defaultdict(list)  # rank -> its taxa: one, in a tree like NCBI's
        for node in lineage:
            at[rank_of[node]].append(node)
        at["superkingdom"] = [node for node in lineage if node in SUPERKINGDOMS]
        found = tuple(at[rank][0] if len(at[rank]) == 1 else None for rank in ranks)
        missing = next((rank for rank, node in zip(ranks, found) if node is None), None)
        reason = None
        if missing:
            reason = f"two taxa of rank {missing}" if at[missing] else f"no {missing}"
        labels[taxid] = Label(found, reason)
    kept = [label for label in labels.values() if label.reason is None]
    classes = sorted({node for label in kept for node in label.taxids})
    notes = [f"{dump.path}: rank {rank!r} is read as {rank.lower()!r}"
             for rank in sorted(respelled)]
    notes += [f"{dump.path}: the name of taxid {node} holds a tab or a line break, which becomes "
              f"a blank: {one_line(names[node])!r}"
              for node in classes if one_line(names[node]) != names[node]]
    of_classes = {node: one_line(names[node]) for node in classes}
    return Labelled(labels, of_classes, dump.date, dump.digest(), notes)


@contextlib.contextmanager
def _ete3(excerpt):
    """ete3's NCBITaxa over one tar file, built beside it.

    ete3 prints, and writes into the working directory: both are held off.
    """
    from ete3 import NCBITaxa

    before = os.getcwd()
    with (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()),
          warnings.catch_warnings()):
        # one warning per merged id; the excerpt followed them already
        warnings.simplefilter("ignore")
        try:
            os.chdir(excerpt.parent)
            ncbi = NCBITaxa(dbfile=str(excerpt.with_suffix(".sqlite")), taxdump_file=str(excerpt))
        except sqlite3.OperationalError as error:  # SQLite's words for a full disk
            raise InputError(f"{excerpt.with_suffix('.sqlite')}: cannot be written ({error}): "
                             "is the disk full?") from None
        finally:
            os.chdir(before)
        try:
            yield ncbi
        finally:
            ncbi.db.close()
