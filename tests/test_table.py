"""prepare.py --table: sequences and labels of one's own, from CSV and TSV, to a trained and
evaluated run.
"""

import csv
import gzip
import tracemalloc

import numpy as np
import pytest

import evaluate
import predict
import prepare
import train
from taxa.data.dataset import PreparedDataset
from taxa.data.splits import SPLITS, split_by_genus
from taxa.data.table import read_table
from taxa.data.taxonomy import keep_classes
from taxa.data.tokens import NTTokenizer
from taxa.errors import InputError

NT = NTTokenizer()
RANKS = ("phylum", "sub family")
NAMES = [
    ("Größe, die", "β \"x\""),
    ("Größe, die", "alpha"),
    ("Other", "gamma"),
    ("Third", "1234"),
]


def rows(n=60, seed=0):
    """[(id, sequence, phylum, sub family)]: lengths from 30 to 90, some lower case, some Ns."""
    random = np.random.RandomState(seed)
    letters = np.array(list("ACGTacgtN"))
    found = []
    for i in range(n):
        sequence = "".join(letters[random.randint(0, 9, random.randint(30, 91))])
        found.append((f"s{i}", sequence, *NAMES[random.randint(4)]))
    return found


def write(path, table, delimiter=",", header=("id", "dna", "phylum", "sub family"),
          newline="\r\n", bom=False):
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        out = csv.writer(file, delimiter=delimiter, lineterminator=newline)
        out.writerow(header)
        out.writerows(table)
    return path


def prepared(path, out, *more, ranks=RANKS):
    flags = ["--ranks", *ranks] if ranks else []
    prepare.main(["--table", str(path), "--sequence-column", "dna", *flags, "--any-length",
                  "--out", str(out), "--workers", "1", *map(str, more)])
    return PreparedDataset(out)


@pytest.mark.parametrize("name, delimiter, newline, bom", [
    ("t.csv", ",", "\r\n", False),
    ("t.csv.gz", ",", "\n", True),
    ("t.tsv", "\t", "\n", False),
    ("t.TSV.gz", "\t", "\r\n", False),
])
def test_every_row_is_there_with_its_labels(name, delimiter, newline, bom, tmp_path, capsys):
    table = rows()
    path = write(tmp_path / name, table, delimiter, newline=newline, bom=bom)
    data = prepared(path, tmp_path / "out")
    assert list(data.classes) == list(RANKS)
    for column, rank in enumerate(RANKS):
        labels = sorted({label[column] for label in NAMES})
        assert data.classes[rank] == [{"taxid": None, "name": label} for label in labels]
    families = sorted({label[1] for label in NAMES})
    expected = split_by_genus([families.index(row[3]) for row in table], 42)
    for number, split_name in enumerate(SPLITS):
        split = data.split(split_name, "nt")
        records = np.load(tmp_path / "out" / split_name / "records.npy")
        assert records["record"].tolist() == np.flatnonzero(expected == number).tolist()
        for i, record in enumerate(records):
            _, sequence, *label = table[int(record["record"])]
            assert NT.decode(split.tokens(i)).decode() == sequence.upper()
            assert record["taxid"] == 0
            found = zip(RANKS, split.labels[i].tolist())
            assert [data.classes[rank][n]["name"] for rank, n in found] == label
    assert data.manifest["taxdump"] is None
    assert data.manifest["settings"]["sequence_column"] == "dna"
    assert f"labels of {name}" in capsys.readouterr().out


def test_the_same_rows_in_another_format_give_the_same_tokens(tmp_path):
    one = prepared(write(tmp_path / "a.csv", rows()), tmp_path / "a")
    table = [(*row, "more") for row in rows()]
    path = write(tmp_path / "b.tsv.gz", table, "\t", ("id", "dna", *RANKS, "note"))
    other = prepared(path, tmp_path / "b")
    assert one.digest == other.digest


MORUS = [
    ("Chordata", "Morus", "bassanus"),
    ("Streptophyta", "Morus", "alba"),
    ("Chordata", "Homo", "sapiens"),
    ("Chordata", "Pan", "sapiens"),
]


def labelled_rows(tmp_path, labels, ranks, name="t.csv", times=12):
    """Prepare a table with each of these labels a few times. Returns the PreparedDataset."""
    random = np.random.RandomState(1)
    table = [("".join(random.choice(list("ACGT"), 40)), *label[:len(ranks)])
             for _ in range(times) for label in labels]
    path = write(tmp_path / name, table, header=("dna", *ranks))
    return prepared(path, tmp_path / f"out-{name}", ranks=ranks)


def test_a_label_is_known_by_its_place_not_by_its_name_alone(tmp_path, capsys):
    data = labelled_rows(tmp_path, MORUS, ("phylum", "genus", "species"))
    named = {rank: [row["name"] for row in table] for rank, table in data.classes.items()}
    assert named == {
        "phylum": ["Chordata", "Streptophyta"],
        "genus": ["Homo", "Morus (Chordata)", "Morus (Streptophyta)", "Pan"],
        "species": ["alba", "bassanus", "sapiens (Chordata; Homo)", "sapiens (Chordata; Pan)"],
    }
    split = data.split("train", "nt")
    records = np.load(data.folder / "train" / "records.npy")["record"]
    for labels, record in zip(split.labels.tolist(), records.tolist()):
        phylum, genus, species = MORUS[record % 4]
        found = [named[rank][i] for rank, i in zip(data.classes, labels)]
        assert found[0] == phylum
        assert found[1] in (genus, f"{genus} ({phylum})")
        assert found[2].split(" (")[0] == species
    out = capsys.readouterr().out
    assert ("t.csv: genus: one name at several places is a class at each: "
            "Morus (Chordata), Morus (Streptophyta)\n") in out
    assert "species: one name" in out and "phylum: one name" not in out


def test_names_of_given_classes_are_kept_to(tmp_path):
    """The second table has one Morus only, and its class is still the one of the first table."""
    first = labelled_rows(tmp_path, MORUS, ("phylum", "genus"))
    table = [("ACGT", *label[:2]) for label in MORUS[1:]]
    path = write(tmp_path / "u.csv", table, header=("dna", "phylum", "genus"))
    found = read_table(path, "dna", ("phylum", "genus"), tmp_path, classes=first.classes)
    assert list(found.names["genus"].values()) == ["Homo", "Morus (Streptophyta)", "Pan"]
    assert found.notes == []
    kept = keep_classes(found.labels, first.classes, found.names)
    assert {label.reason for label in kept.values()} == {None}


def test_a_name_that_would_be_another_labels_is_refused(tmp_path):
    labels = [*MORUS, ("Chordata", "Morus (Chordata)", "x")]
    message = ("t.csv: column genus: 'Morus .Chordata.' is one label as it stands "
               "and another by its place")
    with pytest.raises(InputError, match=message):
        labelled_rows(tmp_path, labels, ("phylum", "genus", "species"))


@pytest.mark.parametrize("missing", ["", "-", "NA", "N/A", "NaN", "nan", "<NA>", "  ", " NA\t"])
def test_what_r_and_pandas_write_for_a_missing_label_is_none(missing, tmp_path):
    labels = [("A", "a"), ("B", "b"), ("A", missing), (missing, "b")]
    data = labelled_rows(tmp_path, labels, ("phylum", "genus"), times=5)
    assert data.classes["genus"] == [{"taxid": None, "name": name} for name in "ab"]
    assert [(row["reason"], row["sequences"]) for row in data.manifest["dropped"]] == [
        ("no genus", 5), ("no phylum", 5)]


@pytest.mark.parametrize("one, other", [
    ("Homo", "homo"),
    ("Homo sapiens", "Homo  sapiens"),
    ("Homo sapiens", "Homo\xa0sapiens"),
    ("Homosapiens", "Homo sapiens"),
    ("Gr\xf6\xdfe", "Gro\u0308\xdfe"),
])
def test_labels_that_look_alike_are_pointed_out_and_kept_apart(one, other, tmp_path, capsys):
    data = labelled_rows(tmp_path, [("A", one), ("A", other), ("A", "else")], ("phylum", "genus"))
    assert {row["name"] for row in data.classes["genus"]} == {one, other, "else"}
    out = capsys.readouterr().out
    both = ", ".join(sorted(map(repr, (one, other))))
    assert f"t.csv: genus: {both} differ only in capitals, blanks or Unicode composition" in out
    assert out.count("differ only") == 1


def test_regular_labels_are_not_remarked_upon(tmp_path, capsys):
    labelled_rows(tmp_path, NAMES, RANKS)
    assert "/t.csv:" not in capsys.readouterr().out


def test_a_label_is_one_line_and_one_column(tmp_path):
    data = labelled_rows(tmp_path, [("A\nB", "a\tb"), ("C", "c\u2028d")], ("phylum", "genus"))
    names = [[row["name"] for row in table] for table in data.classes.values()]
    assert names == [["A B", "C"], ["a b", "c d"]]


def test_missing_labels_and_wrong_lengths_are_dropped_with_their_reason(tmp_path, capsys):
    table = rows(40)
    table[3] = (*table[3][:2], "", "alpha")
    table[4] = (*table[4][:3], "  ")
    table[5] = ("s5", "", "Other", "alpha")
    data = prepared(write(tmp_path / "t.csv", table), tmp_path / "out")
    assert data.manifest["sequences"] == 37
    assert {(row["reason"], row["sequences"]) for row in data.manifest["dropped"]} == {
        ("no phylum", 1), ("no sub family", 1), ("no bases", 1)}
    assert "1  no phylum, t.csv" in capsys.readouterr().out


def test_long_sequences_and_fields_over_several_lines(tmp_path):
    table = rows(20)
    table[0] = ("s0", "ACGT" * 50_000, *NAMES[0])  # above the csv module's own limit
    table[1] = ("s1", "ACGT\nACGT ACGT", *NAMES[0])
    data = prepared(write(tmp_path / "t.csv", table), tmp_path / "out")
    letters = {}
    for name in SPLITS:
        split = data.split(name, "nt")
        for i, record in enumerate(np.load(tmp_path / "out" / name / "records.npy")):
            letters[int(record["record"])] = NT.decode(split.tokens(i)).decode()
    assert letters[0] == table[0][1] and letters[1] == "ACGT" * 3


def test_the_test_split_can_be_pinned_as_that_of_a_fasta(tmp_path):
    first = prepared(write(tmp_path / "t.csv", rows()), tmp_path / "out")
    again = prepared(write(tmp_path / "u.csv", rows()[::-1]), tmp_path / "again",
                     "--test-ids", tmp_path / "out" / "test_ids.txt")
    letters = []
    for data in (first, again):
        test = data.split("test", "nt")
        letters.append({NT.decode(test.tokens(i)) for i in range(len(test))})
    assert letters[0] == letters[1] and len(letters[0]) == 4


def test_a_run_on_labels_of_ones_own(tmp_path, weights, capsys):
    data = prepared(write(tmp_path / "t.csv", rows(120)), tmp_path / "data")
    checkpoint = tmp_path / "run" / "ckpt.pt"
    tested = train.main(["--model", "tiny-nt", "--strategy", "lora", "--data", str(data.folder),
                         "--weights", str(weights["tiny-nt"]), "--out", str(tmp_path / "run"),
                         "--max-steps", "2", "--batch-size", "8"])
    assert list(tested["ranks"]) == list(RANKS)
    with open(tmp_path / "run" / "confusion_phylum.csv", encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["truth", "Größe, die", "Other", "Third"]
    evaluated = evaluate.main([str(checkpoint)])
    assert evaluated["ranks"] == tested["ranks"]
    (tmp_path / "reads.fa").write_text(">a\n" + "ACGT" * 20 + "\n")
    given = [str(checkpoint), str(tmp_path / "reads.fa")]
    predict.main([*given, "--out", str(tmp_path / "found.tsv")])
    lines = (tmp_path / "found.tsv").read_text(encoding="utf-8").splitlines()
    header, line = (text.split("\t") for text in lines)
    assert line[header.index("phylum_taxid")] == ""
    assert line[header.index("phylum_name")] in {label for label, _ in NAMES}
    with pytest.raises(InputError, match="--format kraken .*have none"):
        predict.main([*given, "--format", "kraken", "--out", str(tmp_path / "found.txt")])
    renamed = [(*row[:2], row[2].replace("Other", "Another"), row[3]) for row in rows(120)]
    other = prepared(write(tmp_path / "u.csv", renamed), tmp_path / "other")
    message = ("different classes: phylum has 3 in the checkpoint and 3 in the data, "
               "1 in the checkpoint only .Other.; 1 in the data only .Another.: "
               "prepare.py --classes-of")
    with pytest.raises(InputError, match=message):
        evaluate.main([str(checkpoint), "--data", str(other.folder),
                       "--out", str(tmp_path / "else")])
    external = prepared(tmp_path / "u.csv", tmp_path / "external", "--classes-of", checkpoint,
                        ranks=None)
    assert external.classes == data.classes
    outside = sum(row[2] == "Another" for row in renamed)
    dropped = [(row["reason"], row["sequences"]) for row in external.manifest["dropped"]]
    assert dropped == [("phylum not of --classes-of", outside)]
    assert external.manifest["splits"] == {"train": 0, "validation": 0, "test": 120 - outside}
    found = evaluate.main([str(checkpoint), "--data", str(external.folder),
                           "--out", str(tmp_path / "else")])
    assert found["sequences"] == 120 - outside
    assert found["averaged_over"] == {
        "phylum": {"present": 2, "classes": 3},
        "sub family": {"present": 3, "classes": 4},
    }
    assert ("mean over the classes that are in the split, 2 of 3 phylum, 3 of 4 sub family"
            in capsys.readouterr().out)


HEADER = "id,dna,phylum,sub family\n"
BAD = {  # content of t.csv (None: no file), further flags, what the line says
    "no file": (None, [], "t.csv: no such file"),
    "empty": (b"", [], "t.csv: the file is empty"),
    "header alone": (HEADER.encode(), [], "no row below the header"),
    "no such column": (b"id,dnq,phylum,sub family\na,ACGT,x,y\n", [],
                       "unknown column of .*t.csv 'dna': .*did you mean dnq"),
    "no such rank": (b"id,dna,phyla,sub family\na,ACGT,x,y\n", [],
                     "unknown column of .*t.csv 'phylum': .*did you mean phyla"),
    "two columns of a name": (b"dna,dna,phylum,sub family\nACGT,ACGT,x,y\n", [],
                              "line 1: two columns are named 'dna'"),
    "a short row": ((HEADER + "a,ACGT,x,y\nb,ACGT,x\n").encode(), [],
                    "t.csv: line 3: 3 fields, but the header has 4"),
    "a long row": ((HEADER + "a,ACGT,x,y,z\n").encode(), [],
                   "t.csv: line 2: 5 fields, but the header has 4"),
    "an open quote": ((HEADER + 'a,"ACGT,x,y\n').encode(), [], "t.csv: line 2: not .csv in UTF-8"),
    "latin-1": ((HEADER + "a,ACGT,\xfc,y\n").encode("latin-1"), [], "in UTF-8"),
    "a header in a cell": ((HEADER + "a,ACGT,x,y\nb,>9606,x,y\n").encode(), [],
                           "t.csv: line 3: column dna: a > within a line"),
    "a protein": ((HEADER + "a,ACGT,x,y\n\nb,MEEPQSDPSVEPPLSQETFSDLWK,x,y\n").encode(), [],
                  "t.csv: line 4: letters .*is this protein"),
    "cut gzip": (gzip.compress((HEADER + "a,ACGT,x,y\n" * 99).encode())[:-9], [],
                 "the gzip file is damaged"),
    "all labels empty": ((HEADER + "a,ACGT,,y\n").encode(), [],
                         "no sequence is left of 1 .*no phylum"),
    "with a dump": ((HEADER + "a,ACGT,x,y\n").encode(), ["--taxdump", "x.zip"],
                    "--fasta and --taxdump go together"),
    "with --demo": ((HEADER + "a,ACGT,x,y\n").encode(), ["--demo"],
                    "either --fasta and --taxdump, or --table"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_one_line_and_leave_nothing(case, tmp_path):
    content, more, message = BAD[case]
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepared(tmp_path / "t.csv", tmp_path / "out", *more)
    assert {path.name for path in tmp_path.iterdir()} <= {"t.csv"}


@pytest.mark.parametrize("ranks, message", [
    (["type"], "a column named 'type' cannot name a head"),
    (["a.b"], "a column named 'a.b' cannot name a head"),
    (["phylum", "phylum"], "phylum is given twice"),
    (list("abcdefghi"), "9 ranks; give from one to 8"),
])
def test_columns_that_cannot_name_heads(ranks, message, tmp_path):
    with pytest.raises(InputError, match=message):
        prepared(write(tmp_path / "t.csv", rows(5)), tmp_path / "out", ranks=ranks)


def test_the_files_name_says_what_separates_the_columns(tmp_path):
    with pytest.raises(InputError, match="must end in .csv, .tsv or .tab"):
        prepared(write(tmp_path / "t.txt", rows(5)), tmp_path / "out")
    with pytest.raises(InputError, match="--sequence-column does nothing here"):
        prepare.main(["--demo", "--sequence-column", "dna", "--out", str(tmp_path / "out")])


def test_memory_does_not_hold_the_table(tmp_path):
    """Row by row: what is kept of a row is its line's number."""
    labels = rows(1)[0][2:]
    table = ((f"s{i}", "ACGT" * 5000, *labels) for i in range(500))  # 10 MB
    write(tmp_path / "t.csv", table)
    tracemalloc.start()
    found = read_table(tmp_path / "t.csv", "dna", RANKS, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    assert len(found.lines) == 500 and found.lines.tolist()[:3] == [2, 3, 4]
