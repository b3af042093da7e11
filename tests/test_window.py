"""A checkpoint carries the length of the sequences that it was trained on, and predict.py, evaluate.py and the exported folders obey it."""

import json
import shutil

import numpy as np
import pytest
from helpers import command

import evaluate
import export
import predict
import prepare
import train
from taxa.data.dataset import PreparedDataset, manifest_digest
from taxa.errors import InputError
from taxa.training import checkpoint


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """(prepared folder of sequences of 40 to 171 bases, {split: their lengths})."""
    root, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACGT"), n)) for n in rng.integers(40, 171, 119)] + ["ACGTN" * 34 + "A"]
    rows = [f"{i % 2},{text}" for i, text in enumerate(sequences)]
    (root / "mine.csv").write_text("genus,sequence\n" + "\n".join(rows) + "\n")
    prepare.main(["--table", str(root / "mine.csv"), "--ranks", "genus", "--any-length", "--workers", "1", "--test", "0.2", "--out",
                  str(root / "data")])
    lengths = {split: [len(sequences[record["record"]]) for record in np.load(root / "data" / split / "records.npy")]
               for split in ("train", "validation", "test")}
    return root / "data", lengths


@pytest.fixture(scope="module")
def runs(short, mixed, weights, tmp_path_factory):
    """{"short": a run on sequences of 90 bases, "mixed": of any length, "old": the first, as it was before it said so}: ckpt.pt."""
    root = tmp_path_factory.mktemp("runs")
    for name, data in (("short", short), ("mixed", mixed[0])):
        train.main(command("tiny-nt", "lora", data, weights, root / name, "--max-steps", "1", "--batch-size", "32"))
    (root / "old").mkdir()
    content = checkpoint.read(root / "short" / "ckpt.pt")
    del content["window"]
    checkpoint.save(root / "old" / "ckpt.pt", content)
    return {name: root / name / "ckpt.pt" for name in ("short", "mixed", "old")}


def test_the_window_of_data(short, mixed, monkeypatch):
    assert PreparedDataset(short).window("train") == {"length": 90, "varied": False}
    data, lengths = mixed
    monkeypatch.setattr("taxa.data.dataset.JOB", 7)  # several parts, the last one shorter
    for split, of_split in lengths.items():
        assert PreparedDataset(data).window(split) == {"length": max(of_split), "varied": True}


def test_data_that_keep_any_length_and_have_one(mixed, tmp_path):
    (tmp_path / "mine.csv").write_text("genus,sequence\n" + "\n".join(f"{i % 2},{'ACGTA' * 5}" for i in range(60)) + "\n")
    prepare.main(["--table", str(tmp_path / "mine.csv"), "--ranks", "genus", "--any-length", "--workers", "1", "--out",
                  str(tmp_path / "d")])
    assert PreparedDataset(tmp_path / "d").window("train") == {"length": 25, "varied": False}


def test_a_checkpoint_says_it(runs, mixed):
    assert checkpoint.read(runs["short"])["window"] == {"length": 90, "varied": False}
    assert checkpoint.read(runs["mixed"])["window"] == {"length": max(mixed[1]["train"]), "varied": True}


@pytest.mark.parametrize("name, flags, expected", [
    ("short", [], 90), ("mixed", [], None), ("old", [], 1500), ("short", ["--window", "50"], 50), ("old", ["--window", "50"], 50)])
def test_predict_cuts_reads_as_long_as_those_trained_on(name, flags, expected, runs, mixed, tmp_path, capsys):
    expected = expected or max(mixed[1]["train"])
    read = "".join(np.random.default_rng(1).choice(list("ACGT"), 2000))
    (tmp_path / "reads.fa").write_text(f">a\n{read}\n>b\n{read[:expected]}\n>c\n{read[:expected + 1]}\n")
    predict.main([str(runs[name]), str(tmp_path / "reads.fa"), "--format", "jsonl", "--out", str(tmp_path / "out"), *flags])
    windows = [json.loads(line)["windows"] for line in (tmp_path / "out").read_text().splitlines()]
    assert windows == [-(-2000 // expected), 1, 2]
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    told = f"note: {runs['old']} is older and does not say how long its training sequences were: taken to be 1,500 bases"
    assert notes == ([told] if name == "old" and not flags else [])


def evaluated(path, data, out, capsys):
    """The notes of evaluate.py."""
    evaluate.main([str(path), *(["--data", str(data), "--out", str(out)] if data else [])])
    printed = capsys.readouterr()
    return [line for line in (printed.out + printed.err).splitlines() if line.startswith("note:")]


def test_evaluate_says_when_the_data_have_another_length(runs, short, tmp_path, capsys):
    fasta = [str(path) for path in sorted((short / "source").glob("*.fa"))]
    of_120 = tmp_path / "of 120"
    prepare.main(["--demo", "--demo-sequences", "400", "--length", "120", "--seed", "3", "--out", str(tmp_path / "demo 120")])
    fasta = [str(path) for path in sorted((tmp_path / "demo 120" / "source").glob("*.fa"))]
    dump = str(tmp_path / "demo 120" / "source" / "taxdmp_simulated.zip")
    prepare.main(["--fasta", *fasta, "--taxdump", dump, "--length", "120", "--classes-of", str(runs["short"]), "--out", str(of_120)])
    capsys.readouterr()
    assert evaluated(runs["short"], None, None, capsys) == []
    _, note = evaluated(runs["short"], of_120, tmp_path / "out", capsys)
    assert note == f"note: {runs['short']} was trained on sequences of 90 bases; those of the test split of {of_120} have 120 bases"
    same = shutil.copytree(short, tmp_path / "same length")
    manifest = json.loads((same / "manifest.json").read_text()) | {"digest": "0" * 64}
    manifest["sha256"] = manifest_digest(manifest)
    (same / "manifest.json").write_text(json.dumps(manifest))
    note, = evaluated(runs["short"], same, tmp_path / "out", capsys)
    assert note.startswith("note: ") and "is not the dataset of the run" in note


@pytest.mark.parametrize("trained, here, said", [
    ((90, False), (90, False), False), ((90, False), (60, False), True), ((90, False), (90, True), True), ((90, True), (60, True), False),
    ((90, True), (60, False), False), ((90, True), (91, False), True)])
def test_which_lengths_are_others(trained, here, said, capsys):
    content, data = {"window": dict(zip(("length", "varied"), trained))}, lambda: None
    data.folder, data.window = "D", lambda split: dict(zip(("length", "varied"), here))
    evaluate.note_length("ckpt.pt", content, data, "test")
    assert bool(capsys.readouterr().out) == said


@pytest.mark.parametrize("flags", [[], ["--adapters"]])
@pytest.mark.parametrize("name, words", [("short", "sequences of 90 bases"), ("mixed", "sequences of up to 1"), ("old", "of 1,500 bases")])
def test_exported_folders_carry_it(name, words, flags, runs, tmp_path):
    export.main([str(runs[name]), "--out", str(tmp_path / "out"), *flags])
    assert words in (tmp_path / "out" / "README.md").read_text()
    content = checkpoint.read(runs[name])
    found = json.loads((tmp_path / "out" / "taxa.json").read_text())
    assert found.get("window", checkpoint.OLD_WINDOW) == checkpoint.window_of(content)
    if flags:  # and predict.py takes it from there
        (tmp_path / "reads.fa").write_text(f">a\n{'ACGTTGCA' * 50}\n")
        predict.main([str(tmp_path / "out"), str(tmp_path / "reads.fa"), "--format", "jsonl", "--out", str(tmp_path / "lines")])
        assert json.loads((tmp_path / "lines").read_text())["windows"] == -(-400 // checkpoint.window_of(content)["length"])


@pytest.mark.parametrize("window", [3, {"length": 0}, {"length": "90"}, {}])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(InputError, match="ckpt.pt: its window is .*, which is no length"):
        checkpoint.window_of({"window": window}, "ckpt.pt")
