"""Several processes give what one gives, in order; none outlives its parent; what they read is what
a naive parser reads.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from taxa.data import fasta
from taxa.data.fasta import batches, index_fasta, read_sequences
from taxa.data.grammar import normalize
from taxa.errors import InputError
from taxa.runtime.workers import in_order

# Not from helpers.py: every worker imports this file, and helpers.py imports torch.
ROOT = Path(__file__).resolve().parents[1]


def square(number):
    time.sleep(0.01 * (number % 3))  # later jobs finish first
    if number == 13:
        raise InputError("thirteen")
    return number, number ** 2, os.getpid()


def end_it(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_order_and_jobs_are_taken_as_needed(workers):
    taken = []

    def jobs():
        for number in range(13):
            taken.append(number)
            yield number

    with in_order(workers) as mapped:
        results = []
        for result in mapped(square, jobs()):
            results.append(result)
            assert len(taken) <= len(results) + 3 * workers
    expected = [(number, number ** 2) for number in range(13)]
    assert [result[:2] for result in results] == expected
    assert (os.getpid() in {result[2] for result in results}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_job_is_raised_here(workers):
    with pytest.raises(InputError, match="thirteen"), in_order(workers) as mapped:
        list(mapped(square, range(100)))


def test_a_killed_worker_is_said_in_one_line():
    message = "a worker process was killed.*--workers 1"
    with pytest.raises(InputError, match=message), in_order(2) as mapped:
        list(mapped(end_it, range(4)))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1]); "
        "from taxa.runtime.workers import in_order\n"
        "def job(n):\n open(str(os.getpid()), 'w').close(); time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        " with in_order(2) as mapped: list(mapped(job, range(9)))\n"
    )
    (tmp_path / "script.py").write_text(code)
    parent = subprocess.Popen([sys.executable, "script.py", str(ROOT)], cwd=tmp_path)
    for _ in range(200):
        children = [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]
        if len(children) == 2:
            break
        time.sleep(0.1)
    assert len(children) == 2
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{child}").exists() for child in children):
            break
        time.sleep(0.1)
    left = [child for child in children if Path(f"/proc/{child}").exists() and running(child)]
    assert left == []


def running(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


# reading in parallel

def naive_records(data):
    """[(taxid, letters ACGTN)] of the bytes of a FASTA file, by splitting lines."""
    records = []
    for line in data.split(b"\n"):
        line = line.removesuffix(b"\r")
        if line.startswith(b">"):
            records.append((int(line[1:].split()[0]), []))
        elif records:
            records[-1][1].append(line.upper())
    return [(taxid, b"".join(lines).translate(TO_ACGTN)) for taxid, lines in records]


TO_ACGTN = bytes(x if chr(x) in "ACGT" else ord("N") for x in range(256))


def mixed_fasta(records, seed):
    """Records of one to 400 letters: duplicate first words, wrapped or not, CRLF or LF, lower case,
    Ns, no line end at the end.
    """
    rng = np.random.RandomState(seed)
    alphabet = np.frombuffer(b"ACGTACGTacgtNnRy", dtype=np.uint8)
    text = []
    for i in range(records):
        letters = rng.choice(alphabet, rng.randint(1, 400)).tobytes()
        end = (b"\n", b"\r\n")[i % 2]
        width = (60, 400, 7)[i % 3]
        lines = [letters[k:k + width] for k in range(0, len(letters), width)]
        text.append(b">%d %d%s" % (9606 + i % 5, i, end) + end.join(lines) + end)
    return b"".join(text).rstrip(b"\r\n")


def read_job(job):
    index, numbers = job
    letters, *_ = normalize(read_sequences(index), index.length, str)
    return numbers.tolist(), index.taxid.tolist(), index.length.tolist(), letters


@pytest.mark.parametrize(
    "workers, bytes_of_a_range", [(1, 1 << 26), (1, 700), (2, 5000), (4, 333), (4, 60)],
)
def test_every_sequence_of_the_parallel_reader_is_the_naive_parsers(
    tmp_path, monkeypatch, workers, bytes_of_a_range,
):
    data = mixed_fasta(400, seed=workers)
    (tmp_path / "x.fa").write_bytes(data)
    monkeypatch.setattr(fasta, "RANGE", bytes_of_a_range)
    with in_order(workers) as mapped:
        index = index_fasta(tmp_path / "x.fa", tmp_path, mapped)
        read_sequences(index)  # a handle opened in the parent; the workers have their own
        found = []
        parts = batches(index, batch=23, span=9000)
        jobs = ((index.take(some), np.arange(400)[some]) for some in parts)
        for numbers, taxids, lengths, letters in mapped(read_job, jobs):
            ends = np.cumsum(lengths).tolist()
            assert numbers == list(range(len(found), len(found) + len(numbers)))
            found += [
                (taxid, letters[end - length:end])
                for taxid, length, end in zip(taxids, lengths, ends)
            ]
    assert found == naive_records(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.fa"]


@pytest.mark.parametrize("data", [
    # ranges of nothing but comments: written anew
    b"; a comment\n" * 30 + b">1 0\nACGT\n>2 1\nGG\n",
    b">1 0\n" + b"ACGT\n" * 100 + b">2 1\nGG",  # ranges within a record
    b">1 0\nACGT\n" * 20 + b"\n",
])
def test_ranges_without_a_record(tmp_path, monkeypatch, data):
    (tmp_path / "x.fa").write_bytes(data)
    whole = index_fasta(tmp_path / "x.fa", tmp_path)
    for size in range(1, 40):
        monkeypatch.setattr(fasta, "RANGE", size)
        again = index_fasta(tmp_path / "x.fa", tmp_path)
        for one, other in zip(again[1:], whole[1:]):
            assert one.tolist() == other.tolist() and one.dtype == other.dtype


@pytest.mark.parametrize("bad, words", [
    (b">1 0\nACGT\nA>\nACGT\n", "record 401 '>1': a > within"),
    (b">x 0\nA\n", "record 401 '>x'"),
    (b">\nA\n", "record 401 has no name"),
])
def test_an_error_in_a_range_counts_from_the_start_of_the_file(
    tmp_path, monkeypatch, bad, words,
):
    (tmp_path / "x.fa").write_bytes(b">1 0\nACGT\n" * 400 + bad + b">1 0\nACGT\n" * 400)
    monkeypatch.setattr(fasta, "RANGE", 500)
    with in_order(2) as mapped, pytest.raises(InputError, match=words) as caught:
        index_fasta(tmp_path / "x.fa", tmp_path, mapped)
    assert str(caught.value).startswith(f"{tmp_path / 'x.fa'}: ")
    assert "\n" not in str(caught.value)
