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
    """{split: file} of the records of all four, dealt out in turn; training holds copies of others, one of them of the other strand."""
    records = [match for path in simulated[0] for match in re.findall(r">(.*)\n(.*)\n", path.read_text())]
    dealt = {"train": records[::3], "validation": records[1::3], "test": records[2::3]}
    copied, turned = dealt["validation"][4], dealt["test"][7]
    dealt["train"] += [copied, (turned[0], reverse_complement(turned[1].encode()).decode())]
    for name, some in dealt.items():
        (tmp_path / f"{name}.fa").write_text("".join(f">{header}\n{bases}\n" for header, bases in some))
    return {name: tmp_path / f"{name}.fa" for name in dealt}


def arguments(files, simulated):
    return [word for name, path in files.items() for word in (f"--{name}", str(path))] + ["--taxdump", str(simulated[1]), *FLAGS]


def sequences(data, name):
    split = data.split(name, "nt")
    return [get_tokenizer("nt").decode(split.tokens(i)).decode() for i in range(len(split))]


def test_files_of_each_split(files, simulated, tmp_path, capsys):
    prepare.main([*arguments(files, simulated), "--out", str(tmp_path / "out")])
    data = PreparedDataset(tmp_path / "out")
    for name, path in files.items():
        assert sequences(data, name) == re.findall(r"^[ACGTN]+$", path.read_text(), re.MULTILINE)
    assert data.manifest["settings"] == {"length": 90, "seed": 42, "split_by": "file"}
    assert data.manifest["repeated"]["across_splits"] == {"validation in train": 1, "test in train": 1}
    assert data.manifest["repeated"]["test_in_train"] == 0  # the same letters, that is
    with open(tmp_path / "out" / "across_splits.tsv", newline="") as table:
        found = [(row["split"], row["also in"], row["file"], row["record"]) for row in csv.DictReader(table, delimiter="\t")]
    assert found == [("validation", "train", "validation.fa", "5"), ("test", "train", "test.fa", "8")]
    assert "on either strand: 1 of validation in train, 1 of test in train" in capsys.readouterr().out


def test_duplicates_leave_training(files, simulated, tmp_path, capsys):
    prepare.main([*arguments(files, simulated), "--drop-duplicates", "--out", str(tmp_path / "out")])
    data, path = PreparedDataset(tmp_path / "out"), files["train"]
    assert sequences(data, "train") == re.findall(r"^[ACGTN]+$", path.read_text(), re.MULTILINE)[:-2]
    for name in ("validation", "test"):
        assert sequences(data, name) == re.findall(r"^[ACGTN]+$", files[name].read_text(), re.MULTILINE)
    assert data.manifest["repeated"]["across_splits"] == {} and not (tmp_path / "out" / "across_splits.tsv").exists()
    assert data.manifest["dropped"] == [{"file": "train.fa", "reason": "training sequence that is in another split too", "sequences": 2,
                                         "taxids": len({line.split()[0] for line in path.read_text().splitlines() if line[0] == ">"
                                                        } & {">" + str(t) for t in dropped_taxids(files)})}]
    assert "training sequence that is in another split too, train.fa" in capsys.readouterr().out


def dropped_taxids(files):
    return {re.match(r">(\d+)", line)[1] for line in [files["train"].read_text().splitlines()[i] for i in (-4, -2)]}


def test_a_column_of_the_table(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for i in range(40):
        rows.append(["".join(rng.choice(list("ACGT"), 90)), "ab"[i % 2], "pqrs"[i % 4], SPLITS[i % 5 % 3]])
    with open(tmp_path / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["sequence", "family", "species", "part"], *rows])
    flags = ["--table", str(tmp_path / "table.csv"), "--ranks", "family", "species", *FLAGS, "--split-column", "part"]
    prepare.main([*flags, "--out", str(tmp_path / "out")])
    data = PreparedDataset(tmp_path / "out")
    for name in SPLITS:
        assert sequences(data, name) == [row[0] for row in rows if row[3] == name]
    assert data.manifest["settings"]["split_column"] == "part" and "test" not in data.manifest["settings"]


@pytest.mark.parametrize("change, flags, message", [
    ("", ["--split-column", "prt"], "column of .*table.csv.*prt.*did you mean part"),
    ("dev", ["--split-column", "part"], "line 3: column part: 'dev' is none of train validation test"),
    ("train", ["--split-column", "part"], "no sequence that is kept is given for validation"),
    ("", ["--split-column", "part", "--test", "0.1"], "--test does nothing here"),
    ("", ["--split-column", "part", "--hold-out", "0.1"], "--hold-out does nothing here"),
])
def test_wrong_columns(change, flags, message, tmp_path):
    parts = ["train", change or "validation", "test"]
    (tmp_path / "table.csv").write_text("sequence,family,part\n" + "".join(f"{'ACG' * 30},a,{part}\n" for part in parts))
    with pytest.raises(InputError, match=message):
        prepare.main(["--table", str(tmp_path / "table.csv"), "--ranks", "family", *FLAGS, *flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--train", "a.fa", "--test", "b.fa"], "--train goes with --validation FILE ... and --test FILE ..."),
    (["--train", "a.fa", "--validation", "a.fa", "--test", "b.fa"], "a.fa is given for two splits"),
    (["--train", "a.fa", "--validation", "c.fa", "--test", "b.fa", "--group", "x"], "--group does nothing here"),
    (["--fasta", "a.fa", "--test", "b.fa"], "--test: b.fa is no share of each genus, such as 0.1; files go with --train"),
    (["--fasta", "a.fa", "--test", "1.5"], "--test: 1.5 is no share of each genus"),
    (["--train", "a.fa", "--validation", "c.fa", "--test", "b.fa", "--fasta", "d.fa"], "in the place of --fasta"),
])
def test_wrong_files(flags, message, simulated, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        prepare.main([*flags, "--taxdump", str(simulated[1]), *FLAGS, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_classes_without_training_are_said(tmp_path, capsys):
    rows = [("train", "a"), ("train", "b"), ("validation", "a"), ("test", "c"), ("test", "b")]
    letters = ["".join(np.random.default_rng(i).choice(list("ACGT"), 90)) for i in range(len(rows))]
    (tmp_path / "table.csv").write_text("sequence,family,part\n" + "".join(f"{bases},{family},{part}\n"
                                                                          for bases, (part, family) in zip(letters, rows)))
    prepare.main(["--table", str(tmp_path / "table.csv"), "--ranks", "family", *FLAGS, "--split-column", "part", "--out",
                  str(tmp_path / "out")])
    assert PreparedDataset(tmp_path / "out").manifest["without_training"] == {"family": 1}
    assert "note: no training sequence of 1 family classes" in capsys.readouterr().out


def test_nothing_left_to_train_on(simulated, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.fa").write_text("\n".join(simulated[0][0].read_text().splitlines()[:2]) + "\n")
    flags = ["--train", str(tmp_path / "a.fa"), "--validation", str(tmp_path / "b.fa"), "--test", str(tmp_path / "c.fa")]
    with pytest.raises(InputError, match="--drop-duplicates leaves nothing to train on"):
        prepare.main([*flags, "--taxdump", str(simulated[1]), *FLAGS, "--drop-duplicates", "--out", str(tmp_path / "out")])
