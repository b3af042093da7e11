"""predict.py as a user runs it: what evaluate.py says of the same fragments, every kind of file,
reads of every length, wrong input.
"""

import gzip
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, forked

import evaluate
import predict
import train
from taxa.data.batches import read_ahead
from taxa.data.dataset import PreparedDataset
from taxa.data.tokens import NTTokenizer, get_tokenizer
from taxa.errors import InputError
from taxa.evaluation.decode import JointDecoder, log_probabilities
from taxa.evaluation.evaluation import run_split
from taxa.prediction.reads import Record, slices, window_starts
from taxa.prediction.writers import LineWriter
from taxa.runtime.distributed import world
from taxa.training import checkpoint


@pytest.fixture(scope="module")
def checkpoints(demo, weights, tmp_path_factory):
    """{model: ckpt.pt} of six steps of full fine-tuning, batches of 4; one of them in bf16."""
    root = tmp_path_factory.mktemp("runs")
    for model, precision in (("tiny-nt", "fp32"), ("tiny-dnabert", "bf16")):
        train.main(["--model", model, "--strategy", "full", "--data", str(demo),
                    "--weights", str(weights[model]), "--lr", "0.01", "--out", str(root / model),
                    "--batch-size", "4", "--max-steps", "6", "--precision", precision])
    return {model: root / model / "ckpt.pt" for model in ("tiny-nt", "tiny-dnabert")}


def fragments(data, name):
    """[(header, letters)] of a split, in its order, from the FASTA files it was prepared from."""
    texts = [(data.folder / "source" / source["file"]).read_text().split(">")[1:]
             for source in data.manifest["sources"]]
    found = []
    for source, record, _ in np.load(data.folder / name / "records.npy").tolist():
        header, *lines = texts[source][record].splitlines()
        found.append((header, "".join(lines)))
    return found


def fasta(path, reads, width=70):
    lines = []
    for header, letters in reads:
        lines.append(f">{header}")
        lines += [letters[i:i + width] for i in range(0, len(letters), width)]
    Path(path).write_text("\n".join(lines) + "\n")
    return str(path)


def fastq(reads):
    return "".join(f"@{header}\n{letters}\n+\n{'I' * len(letters)}\n"
                   for header, letters in reads)


def random_read(rng, length, letters="ACGT"):
    return "".join(rng.choice(list(letters), length))


def rows(path):
    """A tsv as a list of {column: text}."""
    header, *lines = Path(path).read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


@pytest.mark.parametrize("model", ["tiny-nt", "tiny-dnabert"])
def test_says_what_evaluate_says(model, demo, checkpoints, tmp_path, monkeypatch):
    """On the validation split: every class, every bit of every probability, every joint lineage.

    So every metric is the same too.
    """
    data = PreparedDataset(demo)
    content = checkpoint.read(checkpoints[model])
    exact = []
    lines = LineWriter.lines

    def recorded(writer, reads, found):
        exact.append(found)
        return lines(writer, reads, found)

    monkeypatch.setattr(LineWriter, "lines", recorded)
    reads = fasta(tmp_path / "reads.fa", fragments(data, "validation"))
    predict.main([str(checkpoints[model]), reads, "--out", str(tmp_path / "lineages.tsv"),
                  "--whole-header"])
    found = rows(tmp_path / "lineages.tsv")
    assert [row["id"] for row in found] == [header for header, _ in fragments(data, "validation")]
    split = data.split("validation", content["tokenizer"]["name"])
    with world("cpu") as w:
        outcome = run_split(w, checkpoint.rebuild(content), split, content["batch_size"],
                            content["precision"], lineages=content["lineages"])
    for r, rank in enumerate(data.classes):
        probability = [found[f"{rank}_probability"][:, 0] for found in exact]
        # Batches, precision and windows are evaluate.py's.
        np.testing.assert_array_equal(torch.cat(probability).double().numpy(),
                                      outcome.plain.confidence[:, r])
    for i, row in enumerate(found):
        joint = []
        for r, (rank, table) in enumerate(data.classes.items()):
            assert row[f"{rank}_taxid"] == str(table[outcome.predicted[i, r]]["taxid"])
            assert row[f"{rank}_name"] == table[outcome.predicted[i, r]]["name"]
            assert row[f"{rank}_probability"] == f"{outcome.plain.confidence[i, r]:.6f}"
            joint.append(str(table[outcome.plain.joint[i, r]]["taxid"]))
        assert row["lineage_taxids"] == ";".join(joint)
    metrics = evaluate.main([str(checkpoints[model]), "--split", "validation",
                             "--out", str(tmp_path)])
    for r, (rank, table) in enumerate(data.classes.items()):
        truth = [str(table[label]["taxid"]) for label in split.labels[:, r]]
        right = sum(row[f"{rank}_taxid"] == taxid for row, taxid in zip(found, truth))
        assert right / len(found) == metrics["ranks"][rank]["accuracy"]
        right = sum(row["lineage_taxids"].split(";")[r] == taxid
                    for row, taxid in zip(found, truth))
        assert right / len(found) == metrics["joint"]["ranks"][rank]["accuracy"]


def some_reads():
    rng = np.random.default_rng(0)
    # 31,007 bases are 21 windows, more than a slice.
    lengths = [1500, 20, 0, 1501, 700, 3000, 31_007, 1, 1500, 4000, 0, 90, 1500, 1499]
    return [(f"read{i} of {length}", random_read(rng, length, "ACGTN" if i % 3 else "ACGT"))
            for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def mixed(checkpoints, tmp_path_factory):
    """some_reads() in four kinds of output, slices of 16 windows."""
    folder = tmp_path_factory.mktemp("mixed")
    command = [str(checkpoints["tiny-nt"]), fasta(folder / "reads.fa", some_reads()),
               "--batch-size", "2"]
    predict.main([*command, "--out", str(folder / "all.tsv"),
                  "--embeddings", str(folder / "all.npy")])
    predict.main([*command, "--out", str(folder / "all.jsonl"), "--format", "jsonl",
                  "--top-k", "3", "--whole-header"])
    return folder


def test_long_reads_are_averaged_over_their_windows(mixed, checkpoints):
    """Against one window at a time through the network, without batches or padding."""
    content = checkpoint.read(checkpoints["tiny-nt"])
    model = checkpoint.rebuild(content)
    decoder = JointDecoder(content["lineages"])
    tokenizer = NTTokenizer()
    vectors = np.load(mixed / "all.npy")
    lines = [json.loads(line) for line in (mixed / "all.jsonl").read_text().splitlines()]
    table = rows(mixed / "all.tsv")
    assert vectors.dtype == np.float32
    assert len(vectors) == len(lines) == len(table) == len(some_reads())
    for (header, letters), vector, line, row in zip(some_reads(), vectors, lines, table):
        starts = window_starts(len(letters), 1500)
        assert (line["id"], row["id"]) == (header, header.split()[0])
        assert (line["length"], line["windows"]) == (len(letters), len(starts))
        if not letters:
            assert np.isnan(vector).all()
            assert row["genus_name"] == row["lineage"] == "unclassified"
            assert row["genus_taxid"] == "0"
            assert not any(line["ranks"].values()) and line["lineage"]["taxids"] == []
            continue
        pooled = []
        logits = []
        for start in starts:
            window = letters[start:start + 1500].encode()
            ids, _ = tokenizer.encode(window, [min(1500, len(letters))])
            ids = torch.from_numpy(ids.astype(np.int64))
            with torch.no_grad():
                pooled.append(model.pool(ids[None], torch.ones(1, len(ids), dtype=torch.int64)))
                logits.append(model.classify(pooled[-1]))
        np.testing.assert_allclose(vector, torch.cat(pooled).mean(dim=0), rtol=1e-4, atol=1e-5)
        mean = {rank: torch.cat([z[rank] for z in logits]).mean(dim=0, keepdim=True)
                for rank in logits[0]}
        for rank, z in mean.items():
            top = z.softmax(dim=1).topk(3)
            classes = content["classes"][rank]
            found = line["ranks"][rank]
            assert [c["taxid"] for c in found] == [
                classes[c]["taxid"] for c in top.indices[0].tolist()]
            np.testing.assert_allclose([c["probability"] for c in found], top.values[0], atol=1e-5)
            assert row[f"{rank}_taxid"] == str(line["ranks"][rank][0]["taxid"])
        best = decoder.best(log_probabilities(mean))
        lineage = content["lineages"][best.lineage]
        names = [t[c]["name"] for t, c in zip(content["classes"].values(), lineage)]
        assert line["lineage"]["names"] == names and row["lineage"] == ";".join(names)
        probability = float(best.probability[0, -1])
        assert float(row["lineage_probability"]) == pytest.approx(probability, abs=1e-5)


def test_every_kind_of_file_gives_the_same(mixed, checkpoints, tmp_path, monkeypatch):
    reads = some_reads()
    one_line = "".join(f">{header}\r\n{letters.lower()}\r\n" for header, letters in reads)
    packed = fastq(reads).encode()
    half = len(fastq(reads[:5]))
    files = {
        "plain.fq": fastq(reads).replace("\n", " \r\n").encode(),
        "one.fa": one_line.encode(),
        "packed.fa.gz": gzip.compress(one_line.encode()),
        # two gzip members, as bgzip has many
        "blocks.fq.gz":
            gzip.compress(packed[:half]) + gzip.compress(packed[half:]) + gzip.compress(b""),
    }
    command = [str(checkpoints["tiny-nt"]), "--batch-size", "2", "--out", str(tmp_path / "out.tsv")]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        predict.main([*command, str(tmp_path / name)])
        assert (tmp_path / "out.tsv").read_bytes() == (mixed / "all.tsv").read_bytes(), name
    first = "".join(f">{header}\n{letters}\n" for header, letters in reads[:6])
    (tmp_path / "first.fa").write_text(first)
    (tmp_path / "rest.fq").write_text(fastq(reads[6:]) + "\n")
    predict.main([*command, str(tmp_path / "first.fa"), str(tmp_path / "rest.fq")])
    assert (tmp_path / "out.tsv").read_bytes() == (mixed / "all.tsv").read_bytes()


def test_standard_input_and_output(mixed, checkpoints, tmp_path, monkeypatch, capsys):
    (tmp_path / "packed").write_bytes(gzip.compress((mixed / "reads.fa").read_bytes()))
    with open(tmp_path / "packed") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        predict.main([str(checkpoints["tiny-nt"]), "-", "--batch-size", "2"])
    printed = capsys.readouterr()
    assert printed.out == (mixed / "all.tsv").read_text()
    assert printed.err.startswith("14 reads, 36 windows in ")
    assert printed.err.splitlines()[1:] == [
        "2 reads without a single A, C, G or T are unclassified"]
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_two_processes_write_the_same_bytes(mixed, checkpoints, tmp_path):
    words = [ROOT / "predict.py", checkpoints["tiny-nt"], mixed / "reads.fa", "--batch-size", "2",
             "--out", "all.tsv", "--embeddings", "all.npy"]
    for rank in forked(words, words, cwd=tmp_path):
        assert rank.returncode == 0, rank.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"all.tsv", "all.npy"}
    for name in ("all.tsv", "all.npy"):
        assert (tmp_path / name).read_bytes() == (mixed / name).read_bytes()


def test_kraken_lines_and_min_probability(mixed, checkpoints, tmp_path):
    """The lineage is cut at the deepest rank that reaches the probability asked for.

    That is the probability of all lineages through it together.
    """
    content = checkpoint.read(checkpoints["tiny-nt"])
    path = tmp_path / "out"
    command = [str(checkpoints["tiny-nt"]), str(mixed / "reads.fa"), "--batch-size", "2",
               "--out", str(path)]
    predict.main([*command, "--format", "kraken"])
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    both = zip(some_reads(), lines, rows(mixed / "all.tsv"), strict=True)
    for (header, letters), line, row in both:
        taxid = row["lineage_taxids"].split(";")[-1]
        n = len(window_starts(len(letters), 1500))
        assert line == ["C" if letters else "U", header.split()[0], taxid, str(len(letters)),
                        f"{taxid}:{n}"]
    seen = set()
    for least in ("0.2", "0.4", "0.6", "0.999"):
        predict.main([*command, "--min-probability", least])
        for row in rows(path):
            taxids = row["lineage_taxids"].split(";")
            probability = float(row["lineage_probability"])
            assert (probability >= float(least)) == (taxids != ["0"])
            seen.add(0 if taxids == ["0"] else len(taxids))
            for rank in content["classes"]:
                below = float(row[f"{rank}_probability"]) < float(least)
                assert (row[f"{rank}_name"] == "unclassified") == below
    assert 0 in seen and len(seen) > 1


def test_temperature_divides_the_logits(mixed, checkpoints, tmp_path):
    evaluate.main([str(checkpoints["tiny-nt"]), "--temperature", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "temperature.json").read_text())
    command = [str(checkpoints["tiny-nt"]), str(mixed / "reads.fa"), "--batch-size", "2",
               "--top-k", "1000", "--format", "jsonl"]
    predict.main([*command, "--out", str(tmp_path / "plain")])
    predict.main([*command, "--out", str(tmp_path / "scaled"),
                  "--temperature", str(tmp_path / "temperature.json")])
    plain, scaled = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
                     for name in ("plain", "scaled"))
    for before, after in zip(plain, scaled):
        for rank, T in content["temperature"].items():
            p = np.array([c["probability"] for c in before["ranks"][rank]]) ** (1 / T)
            expected = p / p.sum() if len(p) else p
            found = [c["probability"] for c in after["ranks"][rank]]
            np.testing.assert_allclose(found, expected, atol=2e-4)
    with pytest.raises(InputError, match="fitted for another checkpoint"):
        predict.main([str(checkpoints["tiny-dnabert"]), str(mixed / "reads.fa"),
                      "--temperature", str(tmp_path / "temperature.json")])
    with pytest.raises(InputError, match="not a temperature.json"):
        predict.main([str(checkpoints["tiny-nt"]), str(mixed / "reads.fa"),
                      "--temperature", str(tmp_path / "metrics.json")])


def test_headers_with_blanks_and_tabs(checkpoints, tmp_path):
    records = ">a b\tc\nACGT\n>b\u2028c\x0bd\x85e\x1df\u2029\nACGT\n".encode()
    (tmp_path / "reads.fa").write_bytes(records + b">\xff\xe9 x\nACGT\n")
    out = tmp_path / "out"
    command = [str(checkpoints["tiny-nt"]), str(tmp_path / "reads.fa"), "--out", str(out)]
    for flags, ids in (([], ["a", "b", "\xff\xe9"]),
                       (["--whole-header"], ["a b c", "b c d e f", "\xff\xe9 x"])):
        predict.main([*command, *flags])
        assert [row["id"] for row in rows(out)] == ids
        predict.main([*command, *flags, "--format", "kraken"])
        lines = out.read_text(encoding="utf-8").splitlines()
        assert [line.split("\t")[1] for line in lines] == ids
    predict.main([*command, "--format", "jsonl", "--whole-header"])
    assert json.loads(out.read_text().splitlines()[0])["id"] == "a b\tc"


def test_float16_vectors(mixed, checkpoints, tmp_path):
    predict.main([str(checkpoints["tiny-nt"]), str(mixed / "reads.fa"), "--batch-size", "2",
                  "--out", str(tmp_path / "x"),
                  "--embeddings", str(tmp_path / "half.npy"), "--dtype", "float16"])
    half = np.load(tmp_path / "half.npy", mmap_mode="r")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, np.load(mixed / "all.npy").astype(np.float16))


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 19, 20, 21, 30, 101])
def test_windows_cover_every_letter(length):
    starts = window_starts(length, 10)
    covered = sorted({i for start in starts for i in range(start, min(start + 10, length))})
    assert covered == list(range(length))
    assert len(starts) == -(-length // 10)  # no more than needed
    assert all(0 <= start <= max(length - 10, 0) for start in starts)
    assert starts == sorted(set(starts))


def test_reading_does_not_run_ahead():
    """From an endless stream: what is taken is what is asked for, and two slices more."""
    taken = itertools.count()
    endless = (Record("x", str(next(taken)), b"ACGTAC") for _ in itertools.count())
    pieces = slices(endless, NTTokenizer(), 1500, batch_size=2, batches_per_slice=4)
    stream = read_ahead(pieces, depth=2)
    first = next(stream)
    assert [read.header for read in first.reads] == [str(i) for i in range(8)]
    stream.close()
    assert next(taken) <= 8 * 4


def test_batches_hold_windows_of_like_length():
    rng = np.random.default_rng(1)
    made = [Record("x", str(i), random_read(rng, int(n)).encode())
            for i, n in enumerate(rng.integers(1, 400, 60))]
    tokenizer = get_tokenizer("nt")
    for piece in slices(iter(made), tokenizer, 1500, batch_size=4, batches_per_slice=15):
        lengths = [sum(piece.reads[owner].lengths) for owner in piece.owner]
        assert lengths == sorted(lengths, reverse=True)
        for start, stop, batch in piece.batches:
            of_batch = zip(piece.owner[start:stop], batch["input_ids"], batch["attention_mask"])
            for owner, ids, mask in of_batch:
                assert tokenizer.decode(ids[mask.bool()]) == made[owner].bases


GOOD = ">a\nACGT\n"


WRONG_READS = {
    "empty": (b"", "reads: the file is empty"),
    "empty gzip": (gzip.compress(b""), "reads: the file is empty"),
    "no format": (b"ACGT\n", "neither FASTA nor FASTQ: line 1 begins with 'ACGT'"),
    "cut gzip": (gzip.compress(GOOD.encode() * 9)[:-12],
                 "reads: the gzip file is damaged or cut short"),
    "not gzip": (b"\x1f\x8b but no gzip", "reads: the gzip file is damaged or cut short"),
    "protein": (b">a\nACGT\n>b\nMKVLAAGIVELPQRST\n",
                "record 2 '>b': letters EILPQ are in no DNA alphabet"),
    "short quality": (b"@a\nACGT\n+\nIIII\n@b\nACGT\n+\nIII\n",
                      "record 2 '@b': 3 quality values for 4 bases"),
    "letters twice": (b"@a\nACGT\nACGT\n+\nIIII\nIIII\n",
                      "record 1 '@a': its third line does not begin with"),
    "cut record": (b"@a\nACGT\n", "record 1 '@a': the file ends within it"),
    "no @": (b"@a\nACGT\n+\nIIII\nb\nACGT\n+\nIIII\n",
             "record 2 'b': its first line does not begin with @"),
}


@pytest.mark.parametrize("content, message", WRONG_READS.values(), ids=WRONG_READS)
def test_wrong_reads(content, message, checkpoints, tmp_path):
    (tmp_path / "reads").write_bytes(content)
    with pytest.raises(InputError, match=message):
        predict.main([str(checkpoints["tiny-nt"]), str(tmp_path / "reads"),
                      "--out", str(tmp_path / "out"),
                      "--embeddings", str(tmp_path / "out.npy")])
    assert [path.name for path in tmp_path.iterdir()] == ["reads"]


@pytest.mark.parametrize("flags, message", [
    (["missing.fq"], "missing.fq: no such file"),
    (["."], r"\.: a folder"),
    (["reads.fa", "--out", "nowhere/x.tsv"], "there is no folder nowhere"),
    (["reads.fa", "--out", "."], "a folder; give a file"),
    (["reads.fa", "--out", "reads.fa"], "reads.fa is also an input"),
    (["reads.fa", "--out", "x", "--embeddings", "x"], "name the same file"),
    (["reads.fa", "--format", "kraken", "--top-k", "2"], "--top-k"),
    (["reads.fa", "--min-probability", "2"], "--min-probability"),
    (["reads.fa", "--format", "xml"], "--format"),
    (["reads.fa", "--temperature", "none.json"], "none.json: no such file; evaluate.py"),
    (["reads.fa", "--weights", "."], "--weights does nothing here"),
    (["reads.fa", "--tokenizer-file", "reads.fa"], "--tokenizer-file"),
])
def test_wrong_flags(flags, message, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reads.fa").write_text(GOOD)
    with pytest.raises(InputError, match=message):
        predict.main([str(checkpoints["tiny-nt"]), *flags])
    with pytest.raises(InputError, match="reads.fa: not a checkpoint"):
        predict.main(["reads.fa", "reads.fa", "--out", "x"])
    assert [path.name for path in tmp_path.iterdir()] == ["reads.fa"]


def test_a_reader_that_has_enough_is_no_error(mixed, checkpoints):
    """As in zcat reads.fa.gz | predict.py ckpt.pt - | head -1, with real processes and pipes."""
    command = [sys.executable, str(ROOT / "predict.py"), str(checkpoints["tiny-nt"]), "-",
               "--batch-size", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        process.stdout.close()
        process.stdin.write((mixed / "reads.fa").read_bytes())
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait(timeout=100) == 141


def test_the_benchmark_runs(tmp_path, capsys):
    path = ROOT / "benchmarks" / "predict.py"
    spec = importlib.util.spec_from_file_location("predict_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.main(["--models", "tiny-nt", "--threads", "1", "--reads", "5",
                            "--batch-size", "2", "--rounds", "2"])
    assert [row["model"] for row in found] == ["tiny-nt"]
    assert float(found[0]["CPU time over bare"].split()[0]) > 0.5
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith("| tiny-nt | 1 | 5 | 2 | 2 | ") and line.count("|") == 10
