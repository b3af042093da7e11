"""Splits that a table's column or the user's files give, and sequences that are in two splits."""

import csv
import re

import numpy as np
import pytest

import prepare
from taxa.data.dataset import PreparedDataset
from taxa.data.grammar import reverse_complement
from taxa.data.simulate import simulate
from taxa.data.splits import SPLITS
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError

FLAGS = ["--length", "90", "--workers", "1"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """(files of the four superkingdoms, taxdump)."""
    folder = tmp_path_factory.mktemp("simulated")
    simulate(folder, 300, 1, 90)
    return sorted(folder.glob("*_db.fa")), folder / "taxdmp_simulated.zip"


@pytest.fixture
def files(simulated, tmp_path):
    """{split: file} of the records of all four, dealt out in turn.

    Training holds copies of two others; one of them is of the other strand.
    """
    records = [match for path in simulated[0]
               for match in re.findall(r">(.*)\n(.*)\n", path.read_text())]
    dealt = {"train": records[::3], "validation": records[1::3], "test": records[2::3]}
    copied = dealt["validation"][4]
    turned = dealt["test"][7]
    dealt["train"] += [copied, (turned[0], reverse_complement(turned[1].encode()).decode())]
    for name, some in dealt.items():
        text = "".join(f">{header}\n{bases}\n" for header, bases in some)
        (tmp_path / f"{name}.fa").write_text(text)
    return {name: tmp_path / f"{name}.fa" for name in dealt}


def arguments(files, simulated):
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return [*words, "--taxdump", str(simulated[1]), *FLAGS]


def sequences_of(path):
    return re.findall(r"^[ACGTN]+$", path.read_text(), re.MULTILINE)


def sequences(data, name):
    split = data.split(name, "nt")
    return [get_tokenizer("nt").decode(split.tokens(i)).decode() for i in range(len(split))]


def test_files_of_each_split(files, simulated, tmp_path, capsys):
    prepare.main([*arguments(files, simulated), "--out", str(tmp_path / "out")])
    data = PreparedDataset(tmp_path / "out")
    for name, path in files.items():
        assert sequences(data, name) == sequences_of(path)
    assert data.manifest["settings"] == {"length": 90, "seed": 42, "split_by": "file"}
    across = data.manifest["repeated"]["across_splits"]
    assert across == {"validation in train": 1, "test in train": 1}
    assert data.manifest["repeated"]["test_in_train"] == 0  # the same letters, that is
    with open(tmp_path / "out" / "across_splits.tsv", newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    assert [(row["split"], row["also in"], row["file"], row["record"]) for row in rows] == [
        ("validation", "train", "validation.fa", "5"),
        ("test", "train", "test.fa", "8"),
    ]
    said = capsys.readouterr().out
    assert "on either strand: 1 of validation in train, 1 of test in train" in said


def test_duplicates_leave_training(files, simulated, tmp_path, capsys):
    more = ["--drop-duplicates", "--out", str(tmp_path / "out")]
    prepare.main([*arguments(files, simulated), *more])
    data = PreparedDataset(tmp_path / "out")
    assert sequences(data, "train") == sequences_of(files["train"])[:-2]
    for name in ("validation", "test"):
        assert sequences(data, name) == sequences_of(files[name])
    assert data.manifest["repeated"]["across_splits"] == {}
    assert not (tmp_path / "out" / "across_splits.tsv").exists()
    headers = [line for line in files["train"].read_text().splitlines() if line[0] == ">"]
    taxids = {line.split()[0] for line in headers}
    assert data.manifest["dropped"] == [{
        "file": "train.fa",
        "reason": "training sequence that is in another split too",
        "sequences": 2,
        "taxids": len(taxids & {">" + str(t) for t in dropped_taxids(files)}),
    }]
    assert "training sequence that is in another split too, train.fa" in capsys.readouterr().out


def dropped_taxids(files):
    lines = files["train"].read_text().splitlines()
    return {re.match(r">(\d+)", lines[i])[1] for i in (-4, -2)}


def test_a_column_of_the_table(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        bases = "".join(rng.choice(list("ACGT"), 90))
        rows.append([bases, "ab"[i % 2], "pqrs"[i % 4], SPLITS[i % 5 % 3]])
    with open(tmp_path / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["sequence", "family", "species", "part"], *rows])
    flags = ["--table", str(tmp_path / "table.csv"), "--ranks", "family", "species", *FLAGS,
             "--split-column", "part"]
    prepare.main([*flags, "--out", str(tmp_path / "out")])
    data = PreparedDataset(tmp_path / "out")
    for name in SPLITS:
        assert sequences(data, name) == [row[0] for row in rows if row[3] == name]
    assert data.manifest["settings"]["split_column"] == "part"
    assert "test" not in data.manifest["settings"]


@pytest.mark.parametrize("change, flags, message", [
    ("", ["--split-column", "prt"], "column of .*table.csv.*prt.*did you mean part"),
    ("dev", ["--split-column", "part"],
     "line 3: column part: 'dev' is none of train validation test"),
    ("train", ["--split-column", "part"], "no sequence that is kept is given for validation"),
    ("", ["--split-column", "part", "--test", "0.1"], "--test does nothing here"),
    ("", ["--split-column", "part", "--hold-out", "0.1"], "--hold-out does nothing here"),
])
def test_wrong_columns(change, flags, message, tmp_path):
    parts = ["train", change or "validation", "test"]
    rows = "".join(f"{'ACG' * 30},a,{part}\n" for part in parts)
    (tmp_path / "table.csv").write_text("sequence,family,part\n" + rows)
    with pytest.raises(InputError, match=message):
        prepare.main(["--table", str(tmp_path / "table.csv"), "--ranks", "family", *FLAGS, *flags,
                      "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--train", "a.fa", "--test", "b.fa"],
     "--train goes with --validation FILE ... and --test FILE ..."),
    (["--train", "a.fa", "--validation", "a.fa", "--test", "b.fa"], "a.fa is given for two splits"),
    (["--train", "a.fa", "--validation", "c.fa", "--test", "b.fa", "--group", "x"],
     "--group does nothing here"),
    (["--fasta", "a.fa", "--test", "b.fa"],
     "--test: b.fa is no share of each genus, such as 0.1; files go with --train"),
    (["--fasta", "a.fa", "--test", "1.5"], "--test: 1.5 is no share of each genus"),
    (["--train", "a.fa", "--validation", "c.fa", "--test", "b.fa", "--fasta", "d.fa"],
     "in the place of --fasta"),
])
def test_wrong_files(flags, message, simulated, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        prepare.main([*flags, "--taxdump", str(simulated[1]), *FLAGS,
                      "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_classes_without_training_are_said(tmp_path, capsys):
    given = [("train", "a"), ("train", "b"), ("validation", "a"), ("test", "c"), ("test", "b")]
    rows = ["sequence,family,part\n"]
    for i, (part, family) in enumerate(given):
        bases = "".join(np.random.default_rng(i).choice(list("ACGT"), 90))
        rows.append(f"{bases},{family},{part}\n")
    (tmp_path / "table.csv").write_text("".join(rows))
    prepare.main(["--table", str(tmp_path / "table.csv"), "--ranks", "family", *FLAGS,
                  "--split-column", "part", "--out", str(tmp_path / "out")])
    assert PreparedDataset(tmp_path / "out").manifest["without_training"] == {"family": 1}
    assert "note: no training sequence of 1 family classes" in capsys.readouterr().out


def test_nothing_left_to_train_on(simulated, tmp_path):
    first = simulated[0][0].read_text().splitlines()[:2]
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.fa").write_text("\n".join(first) + "\n")
    flags = ["--train", str(tmp_path / "a.fa"), "--validation", str(tmp_path / "b.fa"),
             "--test", str(tmp_path / "c.fa"), "--taxdump", str(simulated[1]), *FLAGS]
    with pytest.raises(InputError, match="--drop-duplicates leaves nothing to train on"):
        prepare.main([*flags, "--drop-duplicates", "--out", str(tmp_path / "out")])
