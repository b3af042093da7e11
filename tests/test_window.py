"""A checkpoint carries the length of the sequences that it was trained on.

predict.py, evaluate.py and the exported folders obey it.
"""

import json
import shutil
from types import SimpleNamespace

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


def prepare_table(out, sequences, *flags):
    """Prepare a table of sequences of any length, of two genera in turn."""
    table = out.with_suffix(".csv")
    rows = [f"{i % 2},{text}" for i, text in enumerate(sequences)]
    table.write_text("genus,sequence\n" + "\n".join(rows) + "\n")
    words = ["--table", str(table), "--ranks", "genus", "--any-length", "--workers", "1"]
    prepare.main([*words, *flags, "--out", str(out)])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """(prepared folder of sequences of 40 to 171 bases, {split: their lengths})."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACGT"), n)) for n in rng.integers(40, 171, 119)]
    sequences.append("ACGTN" * 34 + "A")
    prepare_table(root / "data", sequences, "--test", "0.2")
    lengths = {}
    for split in ("train", "validation", "test"):
        records = np.load(root / "data" / split / "records.npy")
        lengths[split] = [len(sequences[record["record"]]) for record in records]
    return root / "data", lengths


@pytest.fixture(scope="module")
def runs(short, mixed, weights, tmp_path_factory):
    """{"short": a run on sequences of 90 bases, "mixed": of any length}: ckpt.pt."""
    root = tmp_path_factory.mktemp("runs")
    flags = ("--max-steps", "1", "--batch-size", "32")
    for name, data in (("short", short), ("mixed", mixed[0])):
        train.main(command("tiny-nt", "lora", data, weights, root / name, *flags))
    return {name: root / name / "ckpt.pt" for name in ("short", "mixed")}


def test_the_window_of_data(short, mixed, monkeypatch):
    assert PreparedDataset(short).window("train") == {"length": 90, "varied": False}
    data, lengths = mixed
    monkeypatch.setattr("taxa.data.dataset.JOB", 7)  # several parts, the last one shorter
    for split, of_split in lengths.items():
        assert PreparedDataset(data).window(split) == {"length": max(of_split), "varied": True}


def test_data_that_keep_any_length_and_have_one(tmp_path):
    prepare_table(tmp_path / "d", ["ACGTA" * 5] * 60)
    assert PreparedDataset(tmp_path / "d").window("train") == {"length": 25, "varied": False}


def test_a_checkpoint_says_it(runs, mixed):
    assert checkpoint.read(runs["short"])["window"] == {"length": 90, "varied": False}
    longest = max(mixed[1]["train"])
    assert checkpoint.read(runs["mixed"])["window"] == {"length": longest, "varied": True}


def windows_of(checkpoint_path, reads, out, *flags):
    """How many windows predict.py cuts each read into."""
    words = [str(checkpoint_path), str(reads), "--format", "jsonl", "--out", str(out)]
    predict.main([*words, *flags])
    return [json.loads(line)["windows"] for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    "name, flags, expected",
    [("short", [], 90), ("mixed", [], None), ("short", ["--window", "50"], 50)],
)
def test_predict_cuts_reads_as_long_as_those_trained_on(
    name, flags, expected, runs, mixed, tmp_path, capsys
):
    expected = expected or max(mixed[1]["train"])
    read = "".join(np.random.default_rng(1).choice(list("ACGT"), 2000))
    reads = tmp_path / "reads.fa"
    reads.write_text(f">a\n{read}\n>b\n{read[:expected]}\n>c\n{read[:expected + 1]}\n")
    windows = windows_of(runs[name], reads, tmp_path / "out", *flags)
    assert windows == [-(-2000 // expected), 1, 2]
    assert "note:" not in capsys.readouterr().err


def evaluated(path, data, out, capsys):
    """The notes of evaluate.py."""
    evaluate.main([str(path), *(["--data", str(data), "--out", str(out)] if data else [])])
    printed = capsys.readouterr()
    return [line for line in (printed.out + printed.err).splitlines() if line.startswith("note:")]


def test_evaluate_says_when_the_data_have_another_length(runs, short, tmp_path, capsys):
    demo, of_120 = tmp_path / "demo 120", tmp_path / "of 120"
    length = ["--length", "120"]
    words = ["--demo", "--demo-sequences", "400", *length, "--seed", "3"]
    prepare.main([*words, "--out", str(demo)])
    fasta = [str(path) for path in sorted((demo / "source").glob("*.fa"))]
    dump = str(demo / "source" / "taxdmp_simulated.zip")
    words = ["--fasta", *fasta, "--taxdump", dump, *length, "--classes-of", str(runs["short"])]
    prepare.main([*words, "--out", str(of_120)])
    capsys.readouterr()
    assert evaluated(runs["short"], None, None, capsys) == []
    _, note = evaluated(runs["short"], of_120, tmp_path / "out", capsys)
    assert note == (
        f"note: {runs['short']} was trained on sequences of 90 bases; "
        f"those of the test split of {of_120} have 120 bases"
    )
    same = shutil.copytree(short, tmp_path / "same length")
    manifest = json.loads((same / "manifest.json").read_text()) | {"digest": "0" * 64}
    manifest["sha256"] = manifest_digest(manifest)
    (same / "manifest.json").write_text(json.dumps(manifest))
    note, = evaluated(runs["short"], same, tmp_path / "out", capsys)
    assert note.startswith("note: ") and "is not the dataset of the run" in note


@pytest.mark.parametrize(
    "trained, here, said",
    [
        ((90, False), (90, False), False),
        ((90, False), (60, False), True),
        ((90, False), (90, True), True),
        ((90, True), (60, True), False),
        ((90, True), (60, False), False),
        ((90, True), (91, False), True),
    ],
)
def test_which_lengths_are_others(trained, here, said, capsys):
    trained, here = ({"length": length, "varied": varied} for length, varied in (trained, here))
    content = {"window": trained}
    data = SimpleNamespace(folder="D", window=lambda split: here)
    evaluate.note_length("ckpt.pt", content, data, "test")
    assert bool(capsys.readouterr().out) == said


@pytest.mark.parametrize("flags", [[], ["--adapters"]])
@pytest.mark.parametrize(
    "name, words", [("short", "sequences of 90 bases"), ("mixed", "sequences of up to 1")]
)
def test_exported_folders_carry_it(name, words, flags, runs, tmp_path):
    export.main([str(runs[name]), "--out", str(tmp_path / "out"), *flags])
    assert words in (tmp_path / "out" / "README.md").read_text()
    window = checkpoint.window_of(checkpoint.read(runs[name]))
    assert json.loads((tmp_path / "out" / "taxa.json").read_text())["window"] == window
    if flags:  # and predict.py takes it from there
        reads = tmp_path / "reads.fa"
        reads.write_text(f">a\n{'ACGTTGCA' * 50}\n")
        windows = windows_of(tmp_path / "out", reads, tmp_path / "lines")
        assert windows == [-(-400 // window["length"])]


@pytest.mark.parametrize("window", [None, 3, {"length": 0}, {"length": "90"}, {}])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(InputError, match="ckpt.pt: its window is .*, which is no length"):
        checkpoint.window_of({"window": window}, "ckpt.pt")
