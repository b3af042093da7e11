"""One grammar: the same bytes give the same bases, or the same refusal, in prepare.py, predict.py
and pretrain.py.

FILES and CELLS are the grammar of docs/DATA.md as a table. They list what stands in a file, or in a
cell of a table, and what it means.
"""

import bz2
import gzip
import itertools
import lzma
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from inputs import write_dump

import predict
import prepare
import pretrain
import train
from taxa.data.dataset import PreparedDataset
from taxa.data.fasta import batches, index_fasta, read_sequences
from taxa.data.grammar import bases, normalize
from taxa.data.splits import SPLITS
from taxa.data.table import read_table
from taxa.data.tokens import NTTokenizer
from taxa.errors import InputError
from taxa.prediction.reads import Record, records, slices, tokenized_windows
from taxa.runtime import cli

NT = NTTokenizer()

CELLS = {  # a sequence as it is written, and its bases in a list, or what the refusal says
    "one line": (b"ACGTN", ["ACGTN"]),
    "lower case": (b"acgtnACGTN", ["ACGTNACGTN"]),
    "U is T": (b"ACGUacgu", ["ACGTACGT"]),
    "IUPAC codes": (b"ARYKMSWBDHVA", ["A" + "N" * 10 + "A"]),
    "other signs": (b"AC?GT~A!#C", ["ACNGTNANNC"]),
    "lines of unequal length": (b"ACG\nACGTACGT\nA\nCC", ["ACGACGTACGTACC"]),
    "a blank line within": (b"ACGT\n\n\nGGA", ["ACGTGGA"]),
    "blanks and tabs": (b" AC GT\tAC\x0bG\x0cT ", ["ACGTACGT"]),
    "blocks of ten": (b"ACGTACGTAC GGTTGGTTAA\nCCCC", ["ACGTACGTACGGTTGGTTAACCCC"]),
    "GenBank's positions": (b"        1 acgtacgtac ggttggttaa\n       21 cccc",
                            ["ACGTACGTACGGTTGGTTAACCCC"]),
    "EMBL's positions": (b"     acgtacgtac ggttggttaa        20\n     cccc     24",
                         ["ACGTACGTACGGTTGGTTAACCCC"]),
    "positions on both sides": (b"1 ACGT 4\n5 GG 6", ["ACGTGG"]),
    "CRLF": (b"ACGT\r\nGGA\r\n", ["ACGTGGA"]),
    "CRLF and positions": (b"1 ACGT 4\r\n5 GGA 7\r\n", ["ACGTGGA"]),
    "gaps of an alignment": (b"..AC--GT\n--A-..", ["ACGTA"]),
    "* at the end": (b"ACGT\nACG*", ["ACGTACG"]),
    "* at the end, twice, before gaps": (b"ACGT**--", ["ACGT"]),
    "* within": (b"ACG*ACG", ["ACGNACG"]),
    "nothing but N": (b"NNNN", ["NNNN"]),
    "nothing but gaps": (b"--..\n--", [""]),
    "a digit among the bases": (b"ACGT3ACGT", "a digit among the bases"),
    "a position without a blank": (b"1ACGT", "a digit among the bases"),
    "colour space": (b"T0120312", "a digit among the bases"),
    "quality values": (b"40 40 38 12", "a digit among the bases"),
    "a number alone": (b"ACGT\n40\nACGT", "a digit among the bases"),
    "NUL": (b"AC\0GT", "a NUL byte|contains NUL"),  # the latter is what csv of Python 3.10 says
    "another control byte": (b"ACGT\x1a", "byte 0x1A"),
    "not ASCII": ("AC\u00a0GT".encode(), "byte 0xC2"),
    "> within": (b"ACGT>2 1", "a > within a line"),
    "; within": (b"ACGT ; made by hand", "a ; within a line"),
    "@ within": (b"ACGT\n@read", "an @ among the bases"),
    "+ within": (b"ACGT\n+\nIIII", r"a \+ among the bases"),
    "protein": (b"MKTAYIAKQRQISFVK", "letters FIQ are in no DNA alphabet: is this protein"),
    # and not in its last window alone
    "protein, by the whole length": (b"ACGT" * 600 + b"E" * 16, ["ACGT" * 600 + "N" * 16]),
}
FILES = {  # a file, and the bases of its records, or what the refusal says
    "one line a record": (b">22 0\nACGT\n>31 1\nGGA\n", ["ACGT", "GGA"]),
    "no line end at the end": (b">22 0\nACGT\n>31 1\nGGA", ["ACGT", "GGA"]),
    "CRLF": (b">22 0\r\nACGT\r\nAC\r\n>31 1\r\nGGA\r\n", ["ACGTAC", "GGA"]),
    "CR alone": (b">22 0\rACGT\rAC\r>31 1\rGGA\r", ["ACGTAC", "GGA"]),
    "CR in some lines": (b">22 0\nACGT\rAC\n>31 1\rGGA\n", ["ACGTAC", "GGA"]),
    "every line end": (b">22 0\nACG\r\nACGT\nAC\r>31 1\r\nGGA\n", ["ACGACGTAC", "GGA"]),
    "two line ends that look like one": (b">22 0\nAC\r\nACG\nAC\r\n>31 1\nGGA\n",
                                         ["ACACGAC", "GGA"]),
    "a byte-order mark": (b"\xef\xbb\xbf>22 0\nACGT\n", ["ACGT"]),
    "a byte-order mark within": (b">22 0\nACGT\n\xef\xbb\xbf>31 1\nGGA\n",
                                 "record 1 '>22': byte 0xEF"),
    "blank lines": (b"\n\n>22 0\n\nACGT\n\n\n>31 1\n\nGGA\n\n\n\n", ["ACGT", "GGA"]),
    "two blank lines after a record": (b">22 0\nACGT\nACGT\nAC\n\n\n>31 1\nGGA\n\n\n",
                                       ["ACGTACGTAC", "GGA"]),
    "a blank line after a CRLF header": (b">22 0\r\n\r\nACGT\r\n>31 1\r\nGGA\r\n", ["ACGT", "GGA"]),
    "lines of blanks": (b">22 0\nACGT\n   \n>31 1\n \t\nGGA\n", ["ACGT", "GGA"]),
    "a last line that is longer": (b">22 0\nACGT\nACGTACGTAC\n>31 1\nGGA\n",
                                   ["ACGTACGTACGTAC", "GGA"]),
    "a short line in the middle": (b">22 0\nACGT\nA\nACGT\n>31 1\nGGA\n", ["ACGTAACGT", "GGA"]),
    "; before the first record": (b"; made by hand\n\n;>\n>22 0\nACGT\n", ["ACGT"]),
    "; within and after a record": (b">22 0\nACGT\n; half of it\nACGT\n;\n>31 1\n;x\nGGA\n; end",
                                    ["ACGTACGT", "GGA"]),
    "empty records": (b">22 0\n>31 1\nACGT\n>22 2\n\n>22 3\n", ["", "ACGT", "", ""]),
    "a > in a header": (b">22 0 a>b ;c\nACGT\n", ["ACGT"]),
    "blanks before the name": (b"> 22 0\nACGT\n>\t31\nGGA\n", ["ACGT", "GGA"]),
    "a Latin-1 header": (b">22 Gr\xfc\xdfe\nACGT\n>31 Gr\xc3\xbc\xc3\x9fe\nGGA\n", ["ACGT", "GGA"]),
    "a header with line breaks of Unicode": (">22 a\x0bb\u2028c\x85d\nACGT\n".encode(), ["ACGT"]),
    "a header of control A": (b">22 a\x01gi|2|b\nACGT\n", ["ACGT"]),
    "no name": (b">22 0\nACGT\n>\nGGA\n", "record 2 has no name: write one after its >"),
    "no name but blanks": (b">22 0\nACGT\n> \t\nGGA\n",
                           "record 2 has no name: write one after its >"),
    "NUL in a header": (b">22 0\0\nACGT\n", "record 1 '>22': its header has a NUL byte"),
    "a header that is not at the start of its line": (b">22 0\nACGT\n >31 1\nGGA\n",
                                                      "record 1 '>22': a > within a line"),
    "files joined without a line end": (b">22 0\nACGT>31 1\nGGA\n",
                                        "record 1 '>22': a > within a line"),
    "the third record": (b">22 0\nACGT\n>22 1\nACGT\n>31 2\nAC0T\n", "record 3 '>31': a digit"),
    "empty": (b"", "the file is empty"),
    "blank": (b"\n \r\n\t\n", "the file is empty"),
    "comments alone": (b"; nothing\n", "the file is empty"),
    "text before the first record": (b"\nACGT\n>22 0\nACGT\n",
                                     "neither FASTA nor FASTQ: line 2 begins with 'ACGT'"),
    "a blank before the first >": (b" >22 0\nACGT\n",
                                   "neither FASTA nor FASTQ: line 1 begins with ' >22 0'"),
    "prose": (b"Dear all,\n", "neither FASTA nor FASTQ: line 1 begins with 'Dear all,'"),
    "GenBank": (b"LOCUS       22\nORIGIN\n        1 acgt\n//\n",
                "neither FASTA nor FASTQ: line 1 begins with 'LOCUS"),
    "FASTQ after FASTA": (b">22 0\nACGT\n@31 1\nACGT\n+\nIIII\n",
                          "record 1 '>22': an @ among the bases: is this FASTQ within FASTA"),
    # FASTQ
    "FASTQ": (b"@22 0\nACGT\n+\nIIII\n@31 1\nGGA\n+31 1\n@>;\n", ["ACGT", "GGA"]),
    "FASTQ, CRLF and blank lines": (
        b"\r\n@22 0\r\nACGT\r\n+\r\nIIII\r\n\r\n@31 1\r\nGGA\r\n+\r\nIII\r\n", ["ACGT", "GGA"]),
    "FASTQ, CR alone": (b"@22 0\rACGT\r+\rIIII\r@31 1\rGGA\r+\rIII", ["ACGT", "GGA"]),
    "FASTQ, lower case, U, blanks": (b"@22 0\n acGU \n+\nIIII\n", ["ACGT"]),
    "FASTQ, no-calls": (b"@22 0\nAC.-*\n+\nIIIII\n", ["ACNNN"]),  # each has its quality
    "FASTQ, no bases": (b"@22 0\n\n+\n\n@31 1\nGGA\n+\nIII\n", ["", "GGA"]),
    "FASTQ, a byte-order mark": (b"\xef\xbb\xbf@22 0\nACGT\n+\nIIII\n", ["ACGT"]),
    "FASTQ, a digit": (b"@22 0\nT012\n+\nIIII\n", "record 1 '@22': a digit among the bases"),
    "FASTQ, no name": (b"@22 0\nACGT\n+\nIIII\n@\nGGA\n+\nIII\n",
                       "record 2 has no name: write one after its @"),
    "FASTQ, short quality": (
        b"@22 0\nACGT\n+\nIII\n",
        "record 1 '@22': 3 quality values for 4 bases: is the file cut short"),
    "FASTQ, wrapped": (b"@22 0\nACGT\nACGT\n+\nIIII\nIIII\n",
                       r"record 1 '@22': its third line does not begin with \+ .*four lines"),
    "FASTQ, cut short": (b"@22 0\nACGT\n+\nIIII\n@31 1\nACGT\n",
                         "record 2 '@31': the file ends within it"),
    "FASTQ, then no FASTQ": (b"@22 0\nACGT\n+\nIIII\n31 1\nACGT\n",
                             "record 2 '31 1': its first line does not begin with @"),
}

ALL = dict(FILES)
for name, (text, means) in CELLS.items():
    said = means if isinstance(means, list) else f"record 1 '>22': {means}"
    ALL[f"FASTA, {name}"] = (b">22 0\n" + text, said)
RIGHT = {name: (text, means) for name, (text, means) in ALL.items() if isinstance(means, list)}


def in_prepare(path, scratch):
    """Bases of every record, as prepare.py --fasta reads them."""
    scratch.mkdir(exist_ok=True)
    index = index_fasta(path, scratch)
    found = []
    for some in batches(index):
        part = index.take(some)
        place = lambda i: f"{path}: record {i + 1} '>{part.taxid[i]}'"
        text, _ = normalize(read_sequences(part), part.length, place)
        ends = np.cumsum(part.length).tolist()
        lengths = part.length.tolist()
        found += [text[end - length:end].decode() for end, length in zip(ends, lengths)]
    return found


def in_predict(path):
    """The same, as predict.py and pretrain.py --fasta read them."""
    return [record.bases.decode() for record in records(str(path))]


@pytest.mark.parametrize("name", ALL)
def test_every_reader_reads_the_same_or_refuses_in_the_same_words(name, tmp_path):
    content, means = ALL[name]
    (tmp_path / "x.fa").write_bytes(content)
    if isinstance(means, list):
        scratch = tmp_path / "scratch"
        assert in_prepare(tmp_path / "x.fa", scratch) == in_predict(tmp_path / "x.fa") == means
        return
    said = []
    for read in (lambda path: in_prepare(path, tmp_path / "scratch"), in_predict):
        with pytest.raises(InputError, match=f"x.fa: {means}") as refusal:
            read(tmp_path / "x.fa")
        said.append(str(refusal.value))
    assert said[0] == said[1] and "\n" not in said[0] and "pyfaidx" not in said[0]


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_of_a_table_says_what_a_record_says(name, tmp_path):
    text, means = CELLS[name]
    path = tmp_path / "t.csv"
    path.write_bytes(b'sequence,genus\nACGT,a\n"' + text + b'",b\n')
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    lines = 2 + text.count(b"\n")
    if isinstance(means, list):
        table = read_table(path, "sequence", ["genus"], scratch)
        assert in_prepare(table.fasta, scratch) == ["ACGT", *means]
        return
    if name != "protein":
        means = f"t.csv: line {lines + 1}: column sequence: {means}"
    with pytest.raises(InputError, match=means):
        in_prepare(read_table(path, "sequence", ["genus"], scratch).fasta, scratch)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What is read, one file each: ([path], [(number of the file, of the record, bases)])."""
    folder = tmp_path_factory.mktemp("files")
    paths = []
    expected = []
    for number, (content, means) in enumerate(RIGHT.values()):
        paths.append(folder / f"{number}.fa")
        paths[-1].write_bytes(content)
        expected += [(number, record, text) for record, text in enumerate(means)]
    return paths, expected


def test_prepare_from_end_to_end(files, tmp_path):
    """Tokens of all that is read spell its bases; records without any are dropped."""
    paths, expected = files
    dump = write_dump(tmp_path / "dump.zip")
    prepare.main(["--fasta", *map(str, paths), "--taxdump", str(dump), "--any-length",
                  "--workers", "1", "--out", str(tmp_path / "out")])
    data = PreparedDataset(tmp_path / "out")
    found = []
    for name in SPLITS:
        split = data.split(name, "nt")
        places = np.load(tmp_path / "out" / name / "records.npy").tolist()
        for i, (source, record, _) in enumerate(places):
            found.append((int(source), int(record), NT.decode(split.tokens(i)).decode()))
    assert sorted(found) == [(*place, text) for *place, text in expected if text]
    changed = {path.name: sum(record.changed for record in records(str(path))) for path in paths}
    assert {source["file"]: source["letters_changed_to_N"]
            for source in data.manifest["sources"]} == changed
    assert sum(changed.values()) > 30  # of all that is counted


def test_predict_from_end_to_end(files, ckpt, tmp_path, capsys):
    paths, expected = files
    predict.main([str(ckpt), *map(str, paths), "--format", "kraken",
                  "--out", str(tmp_path / "out")])
    text = (tmp_path / "out").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.split("\n")[:-1]]
    assert [int(line[3]) for line in lines] == [len(text) for *_, text in expected]
    for (status, name, taxid, length, windows), (*_, text) in zip(lines, expected):
        without_a_base = not set(text) & set("ACGT")
        assert name in ("22", "31")
        assert (status == "U") == without_a_base == (taxid == "0") == (windows == "0:0")
    said = capsys.readouterr().err
    changed = sum(record.changed for path in paths for record in records(str(path)))
    unclassified = sum(not set(text) & set("ACGT") for *_, text in expected)
    assert f"{changed} bases outside ACGTN became N" in said
    assert f"{unclassified} reads without a single A, C, G or T are unclassified" in said


def test_pretraining_from_end_to_end(files):
    paths, expected = files
    stream = (record for path in paths for record in records(str(path)))
    train, validation = tokenized_windows(stream, NT, 10_000, len(expected) + 1)
    found = [NT.decode(train.tokens(i)).decode() for i in range(len(train))]
    assert found == [text for *_, text in expected if text]
    assert len(validation) == 0


@pytest.fixture(scope="module")
def ckpt(short, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.main(["--model", "tiny-nt", "--strategy", "full", "--data", str(short),
                "--weights", str(weights["tiny-nt"]), "--lr", "0.01", "--out", str(out),
                "--batch-size", "8", "--max-steps", "2"])
    return out / "ckpt.pt"


TEXT = b">22 0\nACGT\nAC\n>31 1\nGGA\n" * 3000
PACKED = {  # what the reader calls it, and its bytes
    "gzip": ("gzip", gzip.compress(TEXT)),
    "bgzip": ("gzip", b"".join(gzip.compress(TEXT[i:i + 9000])
                               for i in range(0, len(TEXT), 9000)) + gzip.compress(b"")),
    "gzip, padded": ("gzip", gzip.compress(TEXT) + bytes(512)),
    "bzip2": ("bzip2", bz2.compress(TEXT)),
    "bzip2 in streams": ("bzip2", bz2.compress(TEXT[:5000]) + bz2.compress(TEXT[5000:])),
    "xz": ("xz", lzma.compress(TEXT)),
    "xz in streams": ("xz", lzma.compress(TEXT[:5000]) + bytes(8) + lzma.compress(TEXT[5000:])),
}


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_packed_is_told_by_its_first_bytes(kind, tmp_path):
    path = tmp_path / "reads"  # a name that says nothing
    path.write_bytes(PACKED[kind][1])
    assert in_prepare(path, tmp_path / "scratch") == in_predict(path) == ["ACGTAC", "GGA"] * 3000
    assert [file.name for file in (tmp_path / "scratch").iterdir()] == ["reads.unpacked"]


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_packed_and_damaged_is_refused(kind, tmp_path):
    """Cut short; a byte that is another; and more after the end.

    There are never fewer records without a word.
    """
    path = tmp_path / "reads"
    name, whole = PACKED[kind]
    whole = whole.rstrip(b"\0")
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1:]
    for content in (whole[:-9], whole[:7], flipped, whole + b"more"):
        path.write_bytes(content)
        for read in (lambda path: in_prepare(path, tmp_path / "scratch"), in_predict):
            with pytest.raises(InputError, match=f"reads: the {name} file is damaged or cut short"):
                read(path)


FOREIGN = {
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "zstd -dc"),
    "zip": (b"PK\x03\x04\x14\0", "unzip -p"),
    "lz4": (b"\x04\x22\x4d\x18dp", "lz4 -dc"),
    "BAM": (gzip.compress(b"BAM\1\0\0\0\0"), "samtools fasta"),
    "CRAM": (b"CRAM\3\0", "samtools fasta"),
    "UTF-16": (">22 0\nACGT\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_formats_that_are_not_read_are_named_with_the_command_that_reads_them(kind, tmp_path):
    (tmp_path / "x").write_bytes(FOREIGN[kind][0])
    said = []
    for read in (lambda path: in_prepare(path, tmp_path / "scratch"), in_predict):
        with pytest.raises(InputError) as refusal:
            read(tmp_path / "x")
        said.append(str(refusal.value))
    command = f"{FOREIGN[kind][1]} {tmp_path / 'x'}"
    assert said[0] == said[1] and said[0].startswith(f"{tmp_path / 'x'}: {kind}")
    assert f"{command} | python predict.py ckpt.pt -" in said[0]


def test_standard_input_by_single_bytes(tmp_path):
    """First bytes that come one at a time; the locale is not UTF-8, and what is written is."""
    script = (
        "import sys; from taxa.prediction.reads import records; from taxa.runtime.cli import run\n"
        "run(lambda: [print(record.header, record.bases.decode()) for record in records('-')])")
    packed = bz2.compress(">22 Gr\u00fc\u2028\u00dfe\nAC GT\n".encode())
    latin = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=latin,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for byte in packed:
            process.stdin.write(bytes([byte]))
            process.stdin.flush()
        process.stdin.close()
        assert process.stdout.read().decode() == "22 Gr\u00fc\u2028\u00dfe ACGT\n"
        assert process.wait(timeout=100) == 0


def test_a_refusal_of_each_script_is_one_line(tmp_path, ckpt, capsys, monkeypatch):
    (tmp_path / "x.fa").write_bytes(b">22 0\nACGT\n>\nACGT\n")
    dump = write_dump(tmp_path / "dump.zip")
    said = []
    before = sorted(path.name for path in tmp_path.iterdir())
    of_prepare = ["--taxdump", str(dump), "--any-length", "--workers", "1", "--fasta"]
    for script, flags in ((prepare, of_prepare), (predict, [str(ckpt)]),
                          (pretrain, ["--model", "tiny-nt", "--fasta"])):
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py"])
        words = [*flags, str(tmp_path / "x.fa"), "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: script.main(words))
        said.append(capsys.readouterr().err)
        assert left.value.code == 2 and said[-1].count("\n") == 1
    assert {line.partition(": ")[2] for line in said} == {
        f"error: {tmp_path}/x.fa: record 2 has no name: write one after its >\n"}
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_windows_without_a_base_are_left_out():
    """Of a long read the others are averaged; a read of nothing else has no window."""
    made = [
        Record("x", "a", b"N" * 10 + b"ACGTACGTAC" + b"NNNN"),
        Record("x", "b", b"N" * 25),
        Record("x", "c", b"NNNT"),
    ]
    piece, = slices(iter(made), NT, 10, batch_size=2, batches_per_slice=4)
    assert [(read.header, read.lengths, read.windows) for read in piece.reads] == [
        ("a", (24,), 2), ("b", (25,), 0), ("c", (4,), 1)]
    seen = [NT.decode(ids[mask.bool()]).decode() for *_, batch in piece.batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert seen == ["ACGTACGTAC", "ACGTACNNNN", "NNNT"] and piece.owner.tolist() == [0, 0, 2]


def test_reads_without_a_base_do_not_gather_in_memory():
    endless = (Record("x", str(i), b"NNNN") for i in itertools.count())
    stream = slices(endless, NT, 10, batch_size=2, batches_per_slice=4)
    assert [len(next(stream).reads) for _ in range(3)] == [8, 8, 8]


def test_bases_are_not_copied_where_nothing_is_to_do():
    text = b"ACGT" * 10
    assert bases(text, "") is text
