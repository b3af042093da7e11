"""taxid -> superkingdom, phylum, genus: small dumps in NCBI's layout, as they are and as they
should not be.
"""

import contextlib
import gzip
import hashlib
import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from inputs import DELETED, MERGED, NODES, archive_bytes, dump_texts, row

from taxa.data.taxonomy import Dump, check_ranks, keep_classes, label_taxids, renumber
from taxa.data.taxonomy import Label as LabelAt
from taxa.errors import InputError


def Label(superkingdom=None, phylum=None, genus=None, reason=None):
    """What label_taxids gives at the default ranks."""
    return LabelAt((superkingdom, phylum, genus), reason)


ASKED = [
    83333, 562, 561, 2209, 9606, 138950, 12059,
    7002, 7004, 7005, 7007,
    1224, 2, 131567, 1, 9999,
    *(old for old, _ in MERGED),
    *DELETED,
]
SUPERKINGDOMS = {2: "Bacteria", 2157: "Archaea", 2759: "Eukaryota", 10239: "Viruses"}


def labelled_with_notes(
        folder, texts, taxids=ASKED, kind="zip", name=None, prefix="", **more):
    """What label_taxids says of a dump written for the occasion."""
    path = folder / (name or f"dump.{kind}")
    path.write_bytes(texts if isinstance(texts, bytes) else archive_bytes(texts, kind, prefix))
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return label_taxids(path, taxids, scratch, **more)


def label(*args, **more):
    """(labels, names, date) of a dump of which there is nothing to note."""
    found = labelled_with_notes(*args, **more)
    assert found.notes == []
    return found[:3]


def naive_label(taxid, nodes=NODES, merged=MERGED, deleted=DELETED,
                asked=("superkingdom", "phylum", "genus")):
    parents = {child: parent for child, parent, _, _ in nodes}
    ranks = {child: rank for child, _, rank, _ in nodes}
    merges = dict(merged)
    now = taxid
    found = dict.fromkeys(asked)
    for _ in range(100):
        now = merges.get(now, now) if now not in parents else now
    if now not in parents:
        reason = "deleted taxid" if taxid in deleted else "unknown taxid"
        return LabelAt(tuple(found.values()), reason)
    while True:
        if now in SUPERKINGDOMS and "superkingdom" in asked:
            found["superkingdom"] = now
        elif ranks[now] in asked and ranks[now] != "superkingdom":
            found[ranks[now]] = now
        if now == 1:
            break
        now = parents[now]
    missing = [rank for rank, node in found.items() if node is None]
    return LabelAt(tuple(found.values()), f"no {missing[0]}" if missing else None)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """What label_taxids gives for the dump above."""
    return label(tmp_path_factory.mktemp("labelled"), dump_texts())


def test_labels_equal_a_walk_up_the_tree(labelled):
    labels, names, date = labelled
    assert labels == {taxid: naive_label(taxid) for taxid in ASKED}
    used = {node for found in labels.values() if found.reason is None for node in found.taxids}
    assert names == {taxid: name for taxid, _, _, name in NODES if taxid in used}
    assert date == "2023-05-06"


@pytest.mark.parametrize("taxid, expected", [
    (562, Label(2, 1224, 561)),
    (83333, Label(2, 1224, 561)),
    (561, Label(2, 1224, 561)),  # a genus is in itself
    (2209, Label(2157, 28890, 2207)),
    (9606, Label(2759, 7711, 9605)),  # a node, though merged.dmp has the id too
    (138950, Label(10239, 2732408, 12059)),  # viruses: not under cellular organisms
    (8001, Label(2, 1224, 561)),
    (8002, Label(2759, 7711, 9605)),
    (8006, Label(reason="unknown taxid")),  # merged into an id that is nowhere
    (8007, Label(reason="unknown taxid")),  # a cycle of merges
    (8009, Label(reason="unknown taxid")),
    (9001, Label(reason="deleted taxid")),
    (9999, Label(reason="unknown taxid")),
    (7002, Label(2, None, 7001, "no phylum")),
    (7004, Label(2, 1224, None, "no genus")),
    (7005, Label(None, None, 7005, "no superkingdom")),
    (7007, Label(None, 7006, 7007, "no superkingdom")),
    (2, Label(2, None, None, "no phylum")),
    (1, Label(None, None, None, "no superkingdom")),
])
def test_each_kind_of_taxid(labelled, taxid, expected):
    assert labelled[0][taxid] == naive_label(taxid) == expected


def test_zip_and_tar_give_the_same(tmp_path, labelled):
    for kind, prefix in (("tar.gz", ""), ("tar.gz", "./"), ("tar", ""), ("stored.zip", ""),
                         ("zip", "taxdump/"), ("tar.gz", "./new taxdump/")):
        folder = tmp_path / (kind + prefix.replace("/", "-"))
        folder.mkdir()
        assert label(folder, dump_texts(), kind=kind, prefix=prefix) == labelled


@pytest.mark.parametrize("subfolder", ["", "taxdump"])
def test_a_folder_of_extracted_files_gives_the_same(tmp_path, labelled, subfolder):
    folder = tmp_path / "extracted" / subfolder
    folder.mkdir(parents=True)
    for name, text in dump_texts().items():
        (folder / name).write_text(text, encoding="utf-8")
    found = label_taxids(tmp_path / "extracted", ASKED, tmp_path)
    assert found[:2] == labelled[:2] and found.notes == []
    assert found.date is None  # the times of its files are those of the copy
    (tmp_path / "extracted").rename(tmp_path / "taxdmp_2024-12-01")
    dump = Dump(tmp_path / "taxdmp_2024-12-01")
    before = dump.digest()
    assert dump.date == "2024-12-01" and re.fullmatch("[0-9a-f]{64}", before)
    next(dump.path.rglob("readme.txt")).write_text("not of the taxonomy")
    assert Dump(dump.path).digest() == before
    next(dump.path.rglob("names.dmp")).write_text("another")
    assert Dump(dump.path).digest() != before


def test_the_digest_of_an_archive_is_its_sha256(tmp_path):
    data = archive_bytes(dump_texts(), "zip")
    (tmp_path / "dump.zip").write_bytes(data)
    assert Dump(tmp_path / "dump.zip").digest() == hashlib.sha256(data).hexdigest()


def test_names_of_archives_do_not_matter(tmp_path, labelled):
    for kind, name in (("tar.gz", "dump.zip"), ("zip", "dump.tar.gz"), ("zip", "dump")):
        assert label(tmp_path, dump_texts(), kind=kind, name=name) == labelled


def test_date_is_that_of_the_name_or_else_of_the_nodes(tmp_path):
    dates = {
        "taxdmp_2024-12-01.zip": "2024-12-01",
        "new_2025-03-01.tar.gz": "2025-03-01",
        "taxdump.zip": "2023-05-06",
        "taxdump.tar.gz": "2023-05-06",
    }
    for name, date in dates.items():
        kind = "zip" if name.endswith("zip") else "tar.gz"
        (tmp_path / name).write_bytes(archive_bytes(dump_texts(), kind))
        with contextlib.closing(Dump(tmp_path / name)) as dump:
            assert dump.date == date


RENAMED = {
    "domain": {2: "domain", 2157: "domain", 2759: "domain", 10239: "acellular root",
               131567: "cellular root"},
    "realm": {2: "domain", 2157: "domain", 2759: "domain", 10239: "acellular root",
              2559587: "realm"},
    "no rank": dict.fromkeys((2, 2157, 2759, 10239), "no rank"),
}


@pytest.mark.parametrize("case", RENAMED)
def test_names_of_the_highest_ranks_do_not_matter(tmp_path, case):
    renamed = [(taxid, parent, RENAMED[case].get(taxid, rank), name)
               for taxid, parent, rank, name in NODES]
    assert renamed != NODES
    assert label(tmp_path, dump_texts(renamed))[0] == {taxid: naive_label(taxid) for taxid in ASKED}


def with_name(taxid, name):
    """NODES with another name for one taxid."""
    return [(node, parent, rank, name if node == taxid else other)
            for node, parent, rank, other in NODES]


@pytest.mark.parametrize("name", [
    "'Nostoc azollae'",
    "d'Herelle's phage",
    'the "odd" one',
    "Ångströmia ß 分類 🧬",
    "Candidatus (Ca.) [x]; 100% & <y>",
    "\\t \\n",
    "root",
    '"Odd" at the start',
    "A|B",
    "A | B |",
    "|",
])
def test_names_come_through_as_they_are(tmp_path, name):
    names = label(tmp_path, dump_texts(with_name(561, name)), [562])[1]
    assert names == {2: "Bacteria", 1224: "Pseudomonadota", 561: name}

@pytest.mark.parametrize("name, read", [
    ("A\tB", "A B"), ("\tA |\tB", "A | B"), ("A\u2028B\x85C\x0bD", "A B C D")])
def test_a_name_is_one_line_and_one_column_and_what_was_changed_is_said(tmp_path, name, read):
    found = labelled_with_notes(tmp_path, dump_texts(with_name(561, name)), [562])
    assert found.names == {2: "Bacteria", 1224: "Pseudomonadota", 561: read}
    assert found.notes == [
        (f"{tmp_path / 'dump.zip'}: the name of taxid 561 holds a tab or a line break, "
         f"which becomes a blank: {read!r}")]


def test_a_byte_order_mark_is_no_part_of_the_first_taxid(tmp_path, labelled):
    marked = {name: b"\xef\xbb\xbf" + text.encode() for name, text in dump_texts().items()}
    assert label(tmp_path, marked) == labelled


def test_capitals_of_ranks_do_not_matter_and_are_said(tmp_path, labelled):
    capitals = {"genus": "Genus", "phylum": "PHYLUM"}
    nodes = [(taxid, parent, capitals.get(rank, rank), name)
             for taxid, parent, rank, name in NODES]
    found = labelled_with_notes(tmp_path, dump_texts(nodes))
    assert found[:3] == labelled
    assert found.notes == [
        f"{tmp_path / 'dump.zip'}: rank {rank!r} is read as {rank.lower()!r}"
        for rank in ("Genus", "PHYLUM")]


def test_a_dump_without_tabs_between_its_fields_is_read(tmp_path, labelled):
    bare = {name: text.replace("\t", "") for name, text in dump_texts().items()}
    assert label(tmp_path, bare) == labelled


def test_a_lineage_with_two_taxa_of_a_rank_is_dropped(tmp_path):
    nodes = [(taxid, parent, "phylum" if taxid == 1236 else rank, name)
             for taxid, parent, rank, name in NODES]
    labels, _, _ = label(tmp_path, dump_texts(nodes), [562, 9606])
    assert labels == {
        562: Label(2, None, 561, "two taxa of rank phylum"),
        9606: Label(2759, 7711, 9605),
    }
    labels, _, _ = label(tmp_path, dump_texts(nodes), [562], ranks=("superkingdom", "genus"))
    assert labels == {562: LabelAt((2, 561))}
    nested = [(taxid, 2 if taxid == 2157 else parent, rank, name)
              for taxid, parent, rank, name in NODES]
    labels, _, _ = label(tmp_path, dump_texts(nested), [2209])
    assert labels[2209] == Label(None, 28890, 2207, "two taxa of rank superkingdom")


# superkingdom: NCBI's taxids, and no others

def named(**names):
    """The dump with other names for some taxids, taxid_N=name."""
    names = {int(taxid.removeprefix("taxid_")): name for taxid, name in names.items()}
    return dump_texts([(taxid, parent, rank, names.get(taxid, name))
                       for taxid, parent, rank, name in NODES])


@pytest.mark.parametrize("names", [
    {"taxid_2759": "Eukarya"}, {"taxid_2": "BACTERIA", "taxid_2157": "Archaebacteria"}])
def test_old_and_new_names_of_superkingdoms_are_known(tmp_path, labelled, names):
    assert label(tmp_path, named(**names))[0] == labelled[0]


@pytest.mark.parametrize("names, said", [
    ({"taxid_2": "Archaea", "taxid_2157": "Bacteria"},
     "taxid 2 is 'Archaea', not Bacteria; taxid 2157 is 'Bacteria', not Archaea"),
    ({"taxid_2": "d__Bacteria"}, "taxid 2 is 'd__Bacteria', not Bacteria"),
    # 562 is no virus, but no taxid of this dump is to be trusted
    ({"taxid_10239": "a bird"}, "taxid 10239 is 'a bird', not Viruses"),
])
def test_a_dump_whose_taxids_are_not_ncbis_has_no_superkingdom(tmp_path, names, said):
    message = (f"{re.escape(said)}: superkingdom .*NCBI's taxids.*"
               "--ranks phylum genus works without")
    with pytest.raises(InputError, match=message):
        label(tmp_path, named(**names), [562])
    labels, _, _ = label(tmp_path, named(**names), [562], ranks=("phylum", "genus"))
    assert labels == {562: LabelAt((1224, 561))}


def test_a_dump_without_any_of_the_four_taxids_has_no_superkingdom(tmp_path):
    nodes = [(1, 1, "no rank", "root"), (101, 1, "phylum", "P"), (102, 101, "genus", "G")]
    with pytest.raises(InputError, match="no taxid 2, 2157, 2759 or 10239: superkingdom"):
        label(tmp_path, dump_texts(nodes, [], []), [102])
    labels, names, _ = label(tmp_path, dump_texts(nodes, [], []), [102], ranks=("phylum", "genus"))
    assert labels == {102: LabelAt((101, 102))}
    assert names == {101: "P", 102: "G"}


def test_optional_members_and_orders(tmp_path, labelled):
    texts = dump_texts()
    for name in ("merged.dmp", "delnodes.dmp", "division.dmp", "readme.txt"):
        texts.pop(name)
    labels, _, _ = label(tmp_path, texts)
    assert labels == {taxid: naive_label(taxid, merged=[], deleted=[]) for taxid in ASKED}
    labels, _, _ = label(tmp_path, dump_texts(NODES[::-1], MERGED[::-1]))
    assert labels == {taxid: naive_label(taxid) for taxid in ASKED}
    windows = {name: text.replace("\n", "\r\n") for name, text in dump_texts().items()}
    assert label(tmp_path, windows) == labelled


def test_no_taxid_in_the_dump(tmp_path):
    unknown = {9999: Label(reason="unknown taxid"), 9001: Label(reason="deleted taxid")}
    assert label(tmp_path, dump_texts(), [9999, 9001]) == (unknown, {}, "2023-05-06")


def test_more_taxids_than_sqlite_takes_variables(tmp_path):
    genera = [(taxid, 1224, "genus", f"genus {taxid}") for taxid in range(200000, 201500)]
    taxids = [taxid for taxid, _, _, _ in genera]
    labels, names, _ = label(tmp_path, dump_texts(NODES + genera), taxids)
    assert labels == {taxid: Label(2, 1224, taxid) for taxid in taxids}
    assert len(names) == 1502


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_nothing_is_written_elsewhere_and_no_network_is_used(tmp_path, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    for target, name in ((socket, "socket"), (urllib.request, "urlopen"),
                         (urllib.request, "urlretrieve")):
        monkeypatch.setattr(target, name, refuse)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "dump.zip").write_bytes(archive_bytes(dump_texts(), "zip"))
    # ete3 writes files of these names, and removes them
    for name in ("taxa.tab", "syn.tab", "merged.tab"):
        Path(name).write_text("the user's own")
    os.mkdir("scratch")
    before = listing(tmp_path)
    labels = label_taxids(Path("../dump.zip"), ASKED, Path("scratch")).labels  # both relative
    assert labels[562] == Label(2, 1224, 561)
    assert Path.cwd() == tmp_path / "work"
    assert {path.read_text() for path in Path().glob("*.tab")} == {"the user's own"}
    listed = [name for name in listing(tmp_path) if not name.startswith("work/scratch/")]
    assert listed == before
    assert capfd.readouterr() == ("", "")  # ete3 prints


def run_python(code, tmp_path, *arguments):
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_ete3_is_imported_only_where_a_dump_is_read_and_leaves_home_alone(tmp_path):
    code = ("import sys; from taxa.data.taxonomy import label_taxids; "
            "before = 'ete3' in sys.modules; "
            "label_taxids('dump.zip', [562], '.'); print(before, 'ete3' in sys.modules)")
    (tmp_path / "dump.zip").write_bytes(archive_bytes(dump_texts(), "zip"))
    assert run_python(code, tmp_path) == ["False", "True"]
    assert listing(tmp_path / "home") == []


def test_the_scripts_do_not_import_ete3(tmp_path):
    code = "import sys, prepare, train; print('ete3' in sys.modules)"
    assert run_python(code, tmp_path) == ["False"]


def with_nodes(*changes):
    """The dump with some nodes replaced, or removed where the new one is None.

    All names are there.
    """
    nodes = {node[0]: node for node in NODES} | dict(changes)
    kept = [node for node in nodes.values() if node]
    return {**dump_texts(kept), "names.dmp": dump_texts()["names.dmp"]}


def appended(member, text):
    return {name: old + text if name == member else old for name, old in dump_texts().items()}


def without(member):
    return {name: text for name, text in dump_texts().items() if name != member}


WHOLE = dump_texts()
BROKEN = {
    "no nodes.dmp": (without("nodes.dmp"), "no nodes.dmp"),
    "no names.dmp": (without("names.dmp"), "no names.dmp"),
    "two dumps": ({**WHOLE, **{"old/" + name: text for name, text in WHOLE.items()}},
                  "nodes.dmp is in it more than once .nodes.dmp, old/nodes.dmp."),
    "names in another folder": (
        {"a/nodes.dmp": WHOLE["nodes.dmp"], "b/names.dmp": WHOLE["names.dmp"]}, "no names.dmp"),
    "a node listed twice": (
        appended("nodes.dmp", row(561, 1224, "genus")),
        (f"nodes.dmp line {len(NODES) + 1}: taxid 561 is listed twice "
         ".first with 1236, then with 1224.")),
    "a merged id listed twice": (
        appended("merged.dmp", row(8001, 9606)),
        (f"merged.dmp line {len(MERGED) + 1}: taxid 8001 is listed twice "
         ".first with 562, then with 9606.")),
    "two scientific names": (
        appended("names.dmp", row(561, "Shigella", "", "scientific name")),
        (f"names.dmp line {4 * len(NODES) + 1}: taxid 561 has two scientific names, "
         "'Escherichia' and 'Shigella'")),
    "a separator in a name": (appended("names.dmp", row(561, "A\t|\tB", "", "synonym")),
                              "names.dmp line .*: 5 fields, not 4"),
    "no rank in a line": (with_nodes((561, (561, 1236, "", "G"))),
                          "nodes.dmp line .*: no rank in the third field"),
    "an empty archive": ({}, "no nodes.dmp"),
    "a parent that is missing": (with_nodes((1236, None)), "nodes.dmp.* 1236 "),
    "a root that is missing": (with_nodes((1, None)), "root"),
    "a cycle of parents": (with_nodes((1224, (1224, 561, "phylum", "P"))),
                           "never reaches the root"),
    "its own parent": (with_nodes((561, (561, 561, "genus", "G"))),
                       "the lineage of 561 never reaches the root"),
    "a garbage line of nodes": (appended("nodes.dmp", "<html>not found</html>\n"),
                                f"nodes.dmp line {len(NODES) + 1} "),
    "a blank line of nodes": (appended("nodes.dmp", "\n"), f"nodes.dmp line {len(NODES) + 1} "),
    "one field of nodes": (appended("nodes.dmp", "12\n"), f"nodes.dmp line {len(NODES) + 1} "),
    "a last line cut short": (appended("nodes.dmp", "83334\t|\t562"), "nodes.dmp"),
    "a fraction": (appended("nodes.dmp", row(3.5, 2, "genus")),
                   f"nodes.dmp line {len(NODES) + 1} "),
    "a garbage line of names": (appended("names.dmp", "garbage\n"), "names.dmp line"),
    "a garbage line of merged": (appended("merged.dmp", "garbage\n"), "merged.dmp line"),
    "one field of merged": (appended("merged.dmp", "12\n"), "merged.dmp line"),
    "a garbage line of delnodes": (appended("delnodes.dmp", "garbage\n"), "delnodes.dmp line"),
    "no scientific name": (
        {**WHOLE, "names.dmp": WHOLE["names.dmp"].replace(
            row(1224, "Pseudomonadota", "", "scientific name"), "")},
        "names.dmp has no scientific name for taxid 1224"),
    "empty names": ({**WHOLE, "names.dmp": ""}, "names.dmp has no scientific name"),
    "Latin-1 names": (
        {**WHOLE, "names.dmp": WHOLE["names.dmp"].encode() + b"1\t|\t\xe9\t|\t\t|\tsynonym\t|\n"},
        "names.dmp is not UTF-8 after line [0-9]+ .byte 0xe9.: iconv -f LATIN1 -t UTF-8"),
}


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_dumps_are_refused_in_one_line(tmp_path, case, kind):
    texts, words = BROKEN[case]
    with pytest.raises(InputError, match=words) as caught:
        label(tmp_path, texts, [*ASKED, 83334], kind)
    assert str(caught.value).startswith(str(tmp_path / f"dump.{kind}"))
    assert "\n" not in str(caught.value)


NOT_ARCHIVES = {
    "text": b"this is no archive\n",
    "nothing": b"",
    "two bytes of gzip": b"\x1f\x8b",
    "gzip of text": gzip.compress(b"no tar\n"),
    "nodes.dmp itself": dump_texts()["nodes.dmp"].encode(),
    "HTML": b"<html>404</html>" * 100,
}


@pytest.mark.parametrize("name", ["dump.zip", "dump.tar.gz"])
@pytest.mark.parametrize("case", NOT_ARCHIVES)
def test_files_that_are_no_archive_are_refused(tmp_path, case, name):
    with pytest.raises(InputError, match="damaged or not a .zip or .tar.gz|no nodes.dmp"):
        label(tmp_path, NOT_ARCHIVES[case], name=name)


def test_missing_dump_and_folder_are_refused(tmp_path):
    for path, words in ((tmp_path / "missing.zip", "no such file"),
                        (tmp_path, "no nodes.dmp in it")):
        with pytest.raises(InputError, match=words):
            label_taxids(path, [562], tmp_path)


def read_all(path, data):
    """What the reader uses of a dump: the excerpt's bytes, current ids and reasons.

    None where the dump is refused.
    """
    path.write_bytes(data)
    try:
        with contextlib.closing(Dump(path)) as dump:
            current, unknown, *_ = dump.excerpt(ASKED, path.with_suffix(".excerpt"))
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
        return None
    return path.with_suffix(".excerpt").read_bytes(), current, unknown


@pytest.mark.parametrize("kind", ["zip", "stored.zip", "tar.gz"])
def test_an_archive_cut_short_is_refused(tmp_path, kind):
    data = archive_bytes(dump_texts(), kind)
    whole = read_all(tmp_path / "dump", data)
    assert whole is not None
    cuts = [*range(0, len(data), max(1, len(data) // 50)), *range(len(data) - 30, len(data))]
    results = [read_all(tmp_path / "dump", data[:cut]) for cut in cuts]
    assert all(result in (None, whole) for result in results)
    # else only the padding after the last member is lost
    assert results.count(None) > 0.9 * len(results)


@pytest.mark.parametrize("kind", ["zip", "stored.zip", "tar.gz"])
def test_a_flipped_bit_is_refused_or_does_no_harm(tmp_path, kind):
    texts = dump_texts()  # without the optional members, whose names in a zip no checksum guards
    data = archive_bytes({name: texts[name] for name in ("nodes.dmp", "names.dmp")}, kind)
    whole = read_all(tmp_path / "dump", data)
    wrong = []
    places = [*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 100, len(data))]
    for byte in places:
        damaged = bytearray(data)
        damaged[byte] ^= 1 << byte % 8
        if read_all(tmp_path / "dump", bytes(damaged)) not in (None, whole):
            wrong.append(byte)
    assert wrong == []


# other ranks than the default

@pytest.mark.parametrize("ranks", [
    ("genus",),
    ("phylum", "species"),
    ("superkingdom",),
    ("family", "genus"),
    ("class", "strain"),
    ("superkingdom", "kingdom", "phylum", "subphylum", "genus", "species"),
])
def test_labels_at_any_ranks_equal_a_walk_up_the_tree(ranks, tmp_path):
    labels, names, _ = label(tmp_path, dump_texts(), ranks=ranks)
    assert labels == {taxid: naive_label(taxid, asked=ranks) for taxid in ASKED}
    used = {node for found in labels.values() if found.reason is None for node in found.taxids}
    assert names == {taxid: name for taxid, _, _, name in NODES if taxid in used}


def test_superkingdom_is_told_by_taxid_whatever_its_rank_is_called(tmp_path):
    new = {2: "domain", 2157: "domain", 2759: "domain", 10239: "acellular root"}
    renamed = dump_texts([(t, parent, new.get(t, rank), name) for t, parent, rank, name in NODES])
    (tmp_path / "new").mkdir()
    for ranks in (("superkingdom", "genus"), ("superkingdom",)):
        expected = label(tmp_path, dump_texts(), ranks=ranks)[:2]
        assert label(tmp_path / "new", renamed, ranks=ranks)[:2] == expected
    labels, _, _ = label(tmp_path / "new", renamed, [562, 12059], ranks=("domain",))
    assert labels == {562: LabelAt((2,)), 12059: LabelAt((None,), "no domain")}


CLASSES = {
    "phylum": [
        {"taxid": 1224, "name": "P"}, {"taxid": 28890, "name": "M"}, {"taxid": 7711, "name": "C"}],
    "genus": [{"taxid": 561, "name": "E"}, {"taxid": 9605, "name": "H"}],
}


def test_labels_outside_given_classes_are_dropped_by_the_first_rank_that_is_not_among_them(
        tmp_path):
    taxids = [562, 8001, 2209, 138950, 9606, 9999]
    labels, _, _ = label(tmp_path, dump_texts(), taxids, ranks=("phylum", "genus"))
    found = keep_classes(labels, CLASSES)
    assert {taxid: found[taxid].reason for taxid in labels} == {
        562: None,
        8001: None,
        2209: "genus not of --classes-of",
        138950: "phylum not of --classes-of",
        9606: None,
        9999: "unknown taxid",
    }
    assert all(found[taxid].taxids == labels[taxid].taxids for taxid in labels)


def test_classes_of_taxa_and_of_names_do_not_mix():
    names = {"phylum": [{"taxid": None, "name": "P"}]}
    of_a_table = "--classes-of: its classes are labels of a table, without taxids: give --table"
    of_ncbi = "--classes-of: its classes are NCBI's taxa, .*: give --fasta and --taxdump"
    with pytest.raises(InputError, match=of_a_table):
        keep_classes({1: LabelAt((1,))}, names)
    with pytest.raises(InputError, match=of_ncbi):
        keep_classes({1: LabelAt((1,))}, {"phylum": CLASSES["phylum"]}, {"phylum": {1: "P"}})


def test_class_numbers_of_some_tables_in_others_that_hold_more():
    found = {"phylum": CLASSES["phylum"][1:], "genus": CLASSES["genus"][::-1]}
    y = np.array([[0, 1], [1, 0], [1, 1]], dtype="<u2")
    again = renumber(y, found, CLASSES)
    assert again.dtype == y.dtype and again.tolist() == [[1, 0], [2, 1], [2, 0]]


@pytest.mark.parametrize("ranks, message", [
    ((), "0 ranks; give from one to 8"),
    (("superkingdom", "kingdom", "phylum", "class", "order", "family", "genus", "species",
      "strain"), "9 ranks; give from one to 8"),
    (("genus", "genus"), "genus is given twice"),
    (("phylum", "famly"), "unknown rank 'famly'.*did you mean family"),
    (("no rank",), "unknown rank 'no rank'"),
    (("genus", "phylum"), "from coarse to fine .*--ranks phylum genus"),
])
def test_ranks_that_make_no_sense_are_refused(ranks, message):
    with pytest.raises(InputError, match=message):
        check_ranks(ranks)
