"""FASTA in: whatever the layout of a file, index and read give what a naive parser gives, or say
what is wrong with the file.
"""

import bz2
import gzip
import itertools
import multiprocessing

import numpy as np
import pytest
from inputs import index_bytes, naive_normal, naive_records

from taxa.data.fasta import batches, index_fasta, read_sequences
from taxa.data.grammar import normalize
from taxa.errors import InputError


def random_letters(n, seed, alphabet=b"ACGT"):
    return np.random.RandomState(seed).choice(np.frombuffer(alphabet, dtype=np.uint8), n).tobytes()


def fasta(lengths, width=None, end=b"\n", header=b">%d %d", alphabet=b"ACGT", last_end=True):
    """A FASTA file of random letters, every taxid on two records; `width`: letters per line."""
    lines = []
    for i, length in enumerate(lengths):
        letters = random_letters(length, i, alphabet)
        lines.append(header % ((9606 + i // 2, i) if header.count(b"%") == 2 else 9606 + i // 2))
        width_here = width or length
        starts = range(0, length, width_here)
        lines += [letters[start:start + width_here] for start in starts]
    return end.join(lines) + (end if last_end else b"")


def cut(index, records, letters):
    """[(taxid, letters)] of one batch."""
    ends = np.cumsum(index.length[records]).tolist()
    return [(int(index.taxid[i]), letters[end - index.length[i]:end])
            for i, end in zip(records, ends)]


def read_batches(index, records=None, batch=4096):
    """[(record numbers, their letters joined)] of all records, or of some."""
    records = np.arange(len(index.taxid)) if records is None else records
    chosen = index.take(records)
    return [(records[some], read_sequences(chosen.take(some))) for some in batches(chosen, batch)]


def read_records(index, records=None, batch=4096):
    read = read_batches(index, records, batch)
    return [pair for some, letters in read for pair in cut(index, some, letters)]


LAYOUTS = {
    "one line, >TAXID INDEX": fasta([1500, 1500, 1500]),
    "headers of a taxid only": fasta([30, 30, 30], header=b">%d"),
    "headers with more words and tabs": fasta([30, 31, 32], header=b">%d\t%d of a genome"),
    "wrapped at 60": fasta([1500, 90, 61, 59], width=60),
    "wrapped, last line full": fasta([120, 60, 180], width=60),
    "one letter to a line": fasta([7, 1, 2], width=1),
    "CRLF": fasta([100, 100, 30], end=b"\r\n"),
    "CRLF, wrapped at 60": fasta([1500, 90, 61, 120], width=60, end=b"\r\n"),
    "no line end at the end": fasta([100, 70], width=60, last_end=False),
    "no line end at the end, one line": fasta([100, 70], last_end=False),
    "no line end at the end, CRLF": fasta([100, 70], width=60, end=b"\r\n", last_end=False),
    "lower case and N": fasta([200, 100, 100], alphabet=b"ACGTNacgtn"),
    "other letters": fasta([200, 100, 100], width=60, alphabet=b"ACGTRYKMSWBDHVx"),
    "lengths differ": fasta([1, 2, 3, 1500, 5, 6]),
    "widths differ between records": fasta([100, 100], width=60) + fasta([100, 70], width=50),
    "line ends differ between records":
        fasta([100, 100], width=60) + fasta([100, 70], width=50, end=b"\r\n"),
    "records without letters": b">1 0\n>2 1\nACGT\n>3 2\n>4 3\n",
    "records without letters at the end of a wrapped file": fasta([100, 70], width=60) + b">3 2\n",
    "a blank line between records": b">1 0\nACGT\n\n>2 1\nGGTT\nCC\n\n>3 2\nTT\n\n",
    "lines of the same number of bytes that hold more and fewer letters":
        b">1 0\nAC\r\nACG\nAC\r\nT\n>2 1\nGG\n",
    "a last line that is longer": b">1 0\nACGT\nACGTACGTAC\n>2 1\nGGCC\n",
}


@pytest.mark.parametrize("batch", [1, 2, 4096])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_index_and_read_equal_a_naive_parser(tmp_path, layout, batch):
    expected = naive_records(LAYOUTS[layout])
    index = index_bytes(tmp_path, LAYOUTS[layout])
    assert index.taxid.tolist() == [taxid for taxid, _ in expected]
    assert index.length.tolist() == [len(letters) for _, letters in expected]
    assert read_records(index, batch=batch) == expected
    blocks = [LAYOUTS[layout][start:start + size]
              for start, size in zip(index.offset, index.size)]
    joined = [b"".join(block.splitlines()) for block in blocks]
    assert joined == [letters for _, letters in expected]
    assert all(block.strip(b"\r\n") == block for block in blocks)  # not a byte more


def test_the_folder_of_the_source_is_left_alone(tmp_path):
    index = index_bytes(tmp_path, fasta([100, 100]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "x.fa"]
    assert index.path == tmp_path / "x.fa"


@pytest.mark.parametrize("name", ["x.fa.gz", "x.fa.bgz", "x.fa", "x.gz"])
@pytest.mark.parametrize("members", [1, 2, 5])
def test_gzip_of_any_name_and_number_of_members(tmp_path, name, members):
    data = fasta([1500, 700, 80], width=60)
    steps = np.linspace(0, len(data), members + 1).astype(int)
    packed = [gzip.compress(data[a:b]) for a, b in itertools.pairwise(steps)]
    packed = b"".join(packed) + gzip.compress(b"")  # as bgzip ends
    index = index_bytes(tmp_path, packed, name)
    assert read_records(index) == naive_records(data)
    assert (tmp_path / name).read_bytes() == packed
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["scratch", name])


def test_two_gzip_files_whose_plain_names_are_the_same(tmp_path):
    one = fasta([100, 100])
    other = fasta([100, 100], alphabet=b"AC")
    indexes = [index_bytes(tmp_path, gzip.compress(data), name)
               for data, name in ((one, "x.fa"), (other, "x.fa.gz"))]
    assert [read_records(index) for index in indexes] == [naive_records(one), naive_records(other)]


def test_two_files_of_one_name_in_two_folders(tmp_path):
    for folder, data in (("a", b">1\nACGT\n"), ("b", b">2\nGGTTCC\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.fa").write_bytes(data)
    indexes = [index_fasta(tmp_path / folder / "x.fa", tmp_path) for folder in "ab"]
    assert [read_records(index) for index in indexes] == [[(1, b"ACGT")], [(2, b"GGTTCC")]]


def test_batches_and_subsets_of_many_records(tmp_path):
    rng = np.random.RandomState(0)
    data = fasta(rng.randint(0, 30, 9000).tolist(), width=10)
    expected = naive_records(data)
    index = index_bytes(tmp_path, data)
    sizes = [len(some) for some, _ in read_batches(index)]
    assert sizes == [4096, 4096, 808]
    assert read_records(index) == expected
    for share in (0.001, 0.1, 0.9):
        records = np.flatnonzero(rng.random_sample(9000) < share)
        assert read_records(index, records, batch=100) == [expected[i] for i in records]
    assert read_records(index, np.arange(0)) == []


def _read_share(job):
    index, start = job
    return [read_records(index, np.arange(start, len(index.taxid), 4), batch=7) for _ in range(5)]


def test_forked_processes_read_what_one_does(tmp_path):
    data = fasta([300 + i % 50 for i in range(800)], width=60)
    expected = naive_records(data)
    index = index_bytes(tmp_path, data)
    # This opens the file here first: what the children inherit must not matter.
    assert read_records(index) == expected
    with multiprocessing.get_context("fork").Pool(4) as pool:
        shares = pool.map(_read_share, [(index, start) for start in range(4)], chunksize=1)
    for start, repeats in enumerate(shares):
        assert repeats == [expected[start::4]] * 5


def normal(letters, lengths):
    return normalize(letters, lengths, "record {}".format)


def test_normalize_keeps_acgtn_and_counts_the_rest():
    letters = bytes(set(range(256)) - set(b"EFIJLOPQZefijlopqz"))
    assert normal(letters, [len(letters)]) == (naive_normal(letters), len(letters) - 12)
    assert normal(b"acgtnACGTN" * 3, [10, 15, 5]) == (b"ACGTNACGTN" * 3, 0)
    assert normal(b"ARYKMSWBDHVUuN?", [15]) == (b"ANNNNNNNNNNTTNN", 11)
    assert normal(b"", []) == (b"", 0)


@pytest.mark.parametrize("letter", list("EFIJLOPQZefijlopqz"))
def test_letters_of_protein_alone_are_refused_above_one_percent(letter):
    rare = b"A" * 1485 + letter.encode() * 15
    assert normal(rare, [1500]) == (b"A" * 1485 + b"N" * 15, 15)
    with pytest.raises(InputError, match=f"^record 2: letters {letter.upper()} "):
        normal(rare * 2 + b"A" * 1484 + letter.encode() * 16 + rare, [1500] * 4)


def test_protein_is_refused_wherever_it_stands():
    protein = b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
    for place in range(3):
        parts = [b"ACGT" * 9, b"ACGTN", b"TTT"]
        parts.insert(place, protein)
        parts.insert(1, b"")
        number = place + (place > 0)
        with pytest.raises(InputError, match=f"^record {number}: letters EFILQ .*protein"):
            normal(b"".join(parts), [len(part) for part in parts])


MALFORMED = {
    "empty": (b"", "x.fa: the file is empty"),
    "empty gzip": (gzip.compress(b""), "x.fa: the file is empty"),
    "FASTQ of accessions": (b"@1 0\nACGT\n+\nIIII\n@SRR1.2\nACGT\n+\nIIII\n",
                            "x.fa: record 2 '@SRR1.2': the first word .*taxid"),
    "UTF-16 without its mark": (">1 0\nACGT\n".encode("utf-16-be"),
                                "x.fa: neither FASTA nor FASTQ"),
    "a name of many digits": (b">" + b"9" * 5000 + b"\nACGT\n", "x.fa: record 1 '>9+': .*taxid"),
    "an accession": (b">1 0\nACGT\n>NC_000913.3 E. coli\nACGT\n",
                     r"x.fa: record 2 '>NC_000913.3'.*taxid"),
    "a fraction": (b">9606.0 0\nACGT\n", r"x.fa: record 1 '>9606.0'"),
    "a negative taxid": (b">-9606 0\nACGT\n", "x.fa: record 1 '>-9606'"),
    "digits of another script": (">1 0\nA\n>2 1\nA\n>٣ 2\nA\n".encode(), "x.fa: record 3 '>٣'"),
    "a zero taxid": (b">1 0\nACGT\n>0 1\nACGT\n", "x.fa: record 2 '>0'"),
    "eleven digits": (b">12345678901 0\nACGT\n", "x.fa: record 1 '>12345678901'"),
    "truncated gzip": (gzip.compress(fasta([1000]))[:-20], "x.fa: the gzip file is damaged"),
    "gzip without its checksum": (gzip.compress(fasta([1000]))[:-3],
                                  "x.fa: the gzip file is damaged"),
    "gzip and then junk": (gzip.compress(fasta([1000])) + b"junk",
                           "x.fa: the gzip file is damaged"),
    "two bytes of gzip": (b"\x1f\x8b", "x.fa: the gzip file is damaged"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_in_one_line_that_names_them(tmp_path, case):
    data, words = MALFORMED[case]
    with pytest.raises(InputError, match=words) as caught:
        index_bytes(tmp_path, data)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "x.fa"))


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "missing.fa", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            index_fasta(path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_in_gzip_is_seen(tmp_path):
    packed = gzip.compress(fasta([40]), mtime=0)
    for byte in range(10, len(packed)):
        damaged = bytearray(packed)
        damaged[byte] ^= 1 << byte % 8
        with pytest.raises(InputError, match="damaged"):
            index_bytes(tmp_path, bytes(damaged))


def reads_right(folder, data, name="x.fa", expected=None):
    """Assert that a file is read as the naive parser reads it."""
    index = index_bytes(folder, data, name)
    letters = [normalize(letters, index.length[some], lambda i: folder / name)[0]
               for some, letters in read_batches(index)]
    expected = naive_records(data if expected is None else expected)
    assert index.taxid.tolist() == [taxid for taxid, _ in expected], data
    assert b"".join(letters) == naive_normal(b"".join(letters for _, letters in expected)), data


@pytest.mark.parametrize("name", ["x.fa.gz", "x.fa.bgz", "x.fa.bz2", "x.zip"])
def test_a_name_that_promises_another_format(tmp_path, name):
    plain = b">1 0\nACGT\n>2 1\nGG\n"
    reads_right(tmp_path, plain, name)
    reads_right(tmp_path, bz2.compress(plain), name, plain)
    with pytest.raises(InputError, match="the file is empty"):
        index_bytes(tmp_path, b"", name)


def test_only_what_is_irregular_is_written_anew(tmp_path):
    for data, path in (
            (b">1 0\nACGT\nAC\n\n>2\r\nGGRyk\r\n", "x.fa"),
            (b">1 0\nACGT\nACG\nA\n", "scratch/x.fa.regular"),
            (gzip.compress(b">1 0\nAC GT\n"), "scratch/x.fa.regular"),
            (b">1 0\nAC\n>2\n-\n", "scratch/x.fa.regular")):
        assert index_bytes(tmp_path, data).path == tmp_path / path
        assert not (tmp_path / "scratch" / "x.fa.unpacked").exists()


@pytest.mark.parametrize("seed", range(4))
def test_random_lines_are_read_right(tmp_path, seed):
    rng = np.random.RandomState(seed)
    lines = [b">1 0", b">2", b">3 1", b"ACGT", b"ACGT", b"ACGT", b"GGA", b"TTACG", b"", b"N"]
    anew = 0
    for trial in range(150):
        ends = [b"\n"] if trial % 3 else [b"\n", b"\r\n"] if trial % 2 else [b"\r\n"]
        count = rng.randint(1, 8)
        pieces = [b">9 9" if i == 0 else lines[rng.randint(len(lines))] for i in range(count)]
        data = b"".join(piece + ends[rng.randint(len(ends))] for piece in pieces)
        (tmp_path / str(trial)).mkdir()
        reads_right(tmp_path / str(trial), data)
        anew += (tmp_path / str(trial) / "scratch" / "x.fa.regular").exists()
    assert 10 < anew < 140  # both happen
