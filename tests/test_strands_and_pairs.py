"""predict.py's report, both strands and pairs, and evaluate.py's both strands."""

import collections
import csv
import json

import numpy as np
import pytest
import torch
from helpers import command

import evaluate
import predict
import train
from taxa.data.augment import other_strands
from taxa.data.dataset import PreparedDataset
from taxa.data.grammar import reverse_complement
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError
from taxa.prediction.kraken import check_taxids, report
from taxa.training import checkpoint

PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}


@pytest.fixture(scope="module")
def trained(short, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train.main(command("tiny-nt", "full", short, weights, out, "--max-steps", "3"))
    return out / "ckpt.pt"


def reads_of(seed, lengths):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGTN"), n, p=[.24] * 4 + [.04])) for n in lengths]


def fasta(path, sequences, suffix=""):
    records = [f">read{i}{suffix} more\n{bases}\n" for i, bases in enumerate(sequences)]
    path.write_text("".join(records))
    return str(path)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


# ------------------------------------------------------------------ the report


CLASSES = {
    "superkingdom": [{"taxid": 2, "name": "Bacteria"}, {"taxid": 2157, "name": "Archaea"}],
    "phylum": [{"taxid": 10, "name": "P"}, {"taxid": 11, "name": "Q"}],
    "genus": [{"taxid": 100, "name": "G"}, {"taxid": 101, "name": "H"}],
}


def test_a_report_by_hand():
    counts = collections.Counter({
        (0, 0, 0): 3,
        (0, 0, 1): 4,
        (0, 0): 2,
        (1,): 1,
        (1, 1, 1): 5,
        (): 5,
    })
    assert report(CLASSES, counts).splitlines() == [
        " 25.00\t5\t5\tU\t0\tunclassified",
        " 75.00\t15\t0\tR\t1\troot",
        " 45.00\t9\t0\tD\t2\t  Bacteria",
        " 45.00\t9\t2\tP\t10\t    P",
        " 20.00\t4\t4\tG\t101\t      H",
        " 15.00\t3\t3\tG\t100\t      G",
        " 30.00\t6\t1\tD\t2157\t  Archaea",
        " 25.00\t5\t0\tP\t11\t    Q",
        " 25.00\t5\t5\tG\t101\t      H",
    ]


@pytest.mark.parametrize("least", ["0", "0.3", "0.9"])
def test_the_report_counts_what_the_lines_say(least, trained, tmp_path):
    reads = fasta(tmp_path / "reads.fa", [*reads_of(1, [90] * 40), "NNN"])
    flags = [str(trained), reads, "--format", "kraken", "--min-probability", least,
             "--report", str(tmp_path / "report.txt")]
    predict.main([*flags, "--out", str(tmp_path / "lines.txt")])
    text = (tmp_path / "report.txt").read_text()
    lines = (tmp_path / "lines.txt").read_text().splitlines()
    own = collections.Counter(int(line.split("\t")[2]) for line in lines)
    rows = [line.split("\t") for line in text.splitlines()]
    assert {int(taxid): int(reads) for _, _, reads, _, taxid, _ in rows if int(reads)} == own
    assert rows[0][3:] == ["U", "0", "unclassified"] and rows[1][3:] == ["R", "1", "root"]
    assert int(rows[0][1]) + int(rows[1][1]) == 41 == sum(own.values())
    depth = [(len(name) - len(name.lstrip())) // 2 for *_, name in rows]
    # A clade is its own reads and its children's clades.
    for i, (percent, clade, reads, *_) in enumerate(rows):
        below = list(zip(depth, rows))[i + 1:]
        end = next((k for k, (deep, _) in enumerate(below) if deep <= depth[i]), len(below))
        inside = below[:end] if i else []
        children = sum(int(row[1]) for deep, row in inside if deep == depth[i] + 1)
        assert int(clade) == int(reads) + children
        assert float(percent) == pytest.approx(100 * int(clade) / 41, abs=0.005)
    predict.main([*flags, "--out", "/dev/null"])
    assert (tmp_path / "report.txt").read_text() == text


# ------------------------------------------------------------------ both strands


def test_both_strands_do_not_depend_on_the_strand(trained, tmp_path):
    sequences = reads_of(2, [90, 30, 91, 200, 1000, 7]) + ["N" * 95 + "ACGTAC"]
    others = ["".join(PAIRS[c] for c in reversed(bases)) for bases in sequences]
    found = []
    for name, reads in (("one", sequences), ("other", others)):
        predict.main([str(trained), fasta(tmp_path / f"{name}.fa", reads), "--both-strands",
                      "--out", str(tmp_path / name),
                      "--embeddings", str(tmp_path / f"{name}.npy")])
        found.append(table(tmp_path / name))
    one, other = (np.load(tmp_path / f"{name}.npy") for name in ("one", "other"))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for row, other in zip(*found, strict=True):
        for column in row:
            if column.endswith("probability"):
                assert float(row[column]) == pytest.approx(float(other[column]), abs=2e-6)
            else:
                assert row[column] == other[column]
    predict.main([str(trained), str(tmp_path / "one.fa"), "--out", str(tmp_path / "single")])
    single = table(tmp_path / "single")
    assert any(row["genus_probability"] != other["genus_probability"]
               for row, other in zip(single, found[0]))


def test_evaluate_averages_the_logits_of_both_strands(trained, short, tmp_path):
    metrics = evaluate.main(
        [str(trained), "--both-strands", "--temperature", "--out", str(tmp_path)])
    model = checkpoint.rebuild(checkpoint.read(trained)).eval()
    data = PreparedDataset(short)
    split = data.split("test", "nt")
    right = collections.Counter()
    for i in range(len(split)):
        bases = get_tokenizer("nt").decode(split.tokens(i))
        logits = []
        for strand in (bases, reverse_complement(bases)):
            ids, _ = get_tokenizer("nt").encode(strand, [len(strand)])
            with torch.no_grad():
                logits.append(model(torch.from_numpy(ids.astype(np.int64))[None], None))
        for r, rank in enumerate(data.classes):
            right[rank] += int((logits[0][rank] + logits[1][rank]).argmax()) == split.labels[i, r]
    found = {rank: round(numbers["accuracy"] * len(split))
             for rank, numbers in metrics["ranks"].items()}
    assert found == dict(right)
    assert json.loads((tmp_path / "temperature.json").read_text())["temperature"]
    batch = other_strands(split, get_tokenizer("nt"))[[0, 1]]
    bases = get_tokenizer("nt").decode(split.tokens(1))
    assert get_tokenizer("nt").decode(batch["input_ids"][1]) == reverse_complement(bases)


# ------------------------------------------------------------------ pairs


def test_a_pair_is_the_mean_of_its_windows(trained, tmp_path):
    first = reads_of(3, [90, 60, 200])
    second = reads_of(4, [80, 90, 33])
    one = fasta(tmp_path / "1.fa", first, "/1")
    two = fasta(tmp_path / "2.fa", second, "/2")
    predict.main([str(trained), one, "--mates", two, "--out", str(tmp_path / "pairs"),
                  "--embeddings", str(tmp_path / "pairs.npy")])
    rows = table(tmp_path / "pairs")
    assert [(row["id"], row["length"]) for row in rows] == [
        ("read0", "170"), ("read1", "150"), ("read2", "233")]
    for path, name in ((one, "1"), (two, "2")):
        predict.main([str(trained), path, "--out", "/dev/null",
                      "--embeddings", str(tmp_path / f"{name}.npy")])
    vectors, alone, mates = (np.load(tmp_path / f"{name}.npy") for name in ("pairs", "1", "2"))
    # Windows of 90 bases in reads of 90, 60 and 200; every mate has one.
    weight = np.array([1, 1, 3])[:, None]
    expected = (alone * weight + mates) / (weight + 1)
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    predict.main([str(trained), one, "--mates", two, "--format", "kraken",
                  "--out", str(tmp_path / "kraken")])
    lines = (tmp_path / "kraken").read_text().splitlines()
    assert [line.split("\t")[3] for line in lines] == ["90|80", "60|90", "200|33"]


@pytest.mark.parametrize("second, message", [
    ([">read0/2\nACGT\n", ">read2/2\nACGT\n", ">read1/2\nACGT\n"],
     r"2\.fa: record 2 '>read2/2' is no mate of .*1\.fa: record 2 '>read1/1': "),
    ([">read0/2\nACGT\n", ">read1/2\nACGT\n"],
     r"1\.fa: record 3 .*: no mate for it: the other side of --mates ends after 2 records"),
    ([f">read{i}\nACGT\n" for i in range(4)],
     r"2\.fa: record 4 .*: no mate for it: the other side of --mates ends after 3 records"),
])
def test_mates_that_do_not_belong_together(second, message, trained, tmp_path):
    one = fasta(tmp_path / "1.fa", reads_of(3, [90, 60, 20]), "/1")
    (tmp_path / "2.fa").write_text("".join(second))
    with pytest.raises(InputError, match=message):
        predict.main([str(trained), one, "--mates", str(tmp_path / "2.fa"),
                      "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--mates", "a.fa", "b.fa"], "1 files of reads and 2 of mates"),
    (["--mates", "-"], "none of them standard input"),
    (["--mates", "nowhere.fa"], "nowhere.fa: no such file"),
    (["--report", "nowhere/report.txt"], "there is no folder nowhere"),
    (["--report", "reads.fa"], "reads.fa is also an input"),
    (["--report", "out.tsv", "--out", "out.tsv"], "--out and --report name the same file"),
])
def test_wrong_flags(flags, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fasta(tmp_path / "reads.fa", ["ACGT"])
    with pytest.raises(InputError, match=message):
        predict.main([str(trained), "reads.fa", *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["reads.fa"]


def test_a_report_needs_taxids():
    with pytest.raises(InputError, match="--report tells taxa by NCBI's taxids"):
        check_taxids({"family": [{"taxid": None, "name": "x"}]}, "--report")
