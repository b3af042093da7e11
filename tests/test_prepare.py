"""prepare.py end to end: every number in the folder is derived again from the FASTA; wrong input
leaves nothing.
"""

import errno
import gzip
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, SHARED
from inputs import FEW, row, write_dump

import prepare
from taxa import RANKS
from taxa.data import dataset, fasta, simulate, sources
from taxa.data import prepare as steps
from taxa.data.dataset import PreparedDataset
from taxa.data.splits import SPLITS, split_by_genus
from taxa.data.tokens import TINY_BPE, NTTokenizer, get_tokenizer
from taxa.errors import InputError
from taxa.runtime.files import new_folder, save_array, sha256

SIMULATED = {lineage[-1][0]: tuple(taxid for taxid, _ in lineage[:3])
             for lineage in simulate.species()}
SIMULATED_NAMES = {taxid: name for lineage in simulate.species() for taxid, name in lineage}
NT = NTTokenizer()
NAIVE_IDS = {entry: i for i, entry in enumerate(NT.vocabulary)}
TO_ACGTN = bytes(x if chr(x) in "ACGT" else ord("N") for x in range(256))
U_TO_T = str.maketrans("U", "T")


# what is expected, naively

def naive_records(path):
    """[(taxid, letters)] of a FASTA file."""
    records = []
    for line in path.read_text().splitlines():
        if line.startswith(">"):
            records.append((int(line[1:].split()[0]), []))
        else:
            records[-1][1].append(line)
    return [(taxid, "".join(lines)) for taxid, lines in records]


def naive_tokens(sequence):
    """Nucleotide Transformer's rule: six letters where none is N, else one."""
    ids = [3]
    i = 0
    while i < len(sequence):
        step = 6 if i + 6 <= len(sequence) and "N" not in sequence[i:i + 6] else 1
        ids.append(NAIVE_IDS[sequence[i:i + step]])
        i += step
    return ids


def naive_rows(fastas, lineages, length=1500):
    """[(file number, record number, taxid, lineage, letters)] of what is kept.

    length None: any but 0.
    """
    rows = []
    for number, path in enumerate(fastas):
        for i, (taxid, letters) in enumerate(naive_records(path)):
            right_length = len(letters) == length or (length is None and letters)
            if taxid in lineages and right_length:
                letters = letters.upper().translate(U_TO_T)
                letters = "".join(x if x in "ACGT" else "N" for x in letters)
                rows.append((number, i, taxid, lineages[taxid], letters))
    return rows


def check_folder(out, fastas, lineages, names, length=1500, *, seed=42, test=0.02, validation=0.1):
    """Everything in a prepared folder against naive_rows. Returns the manifest."""
    data = PreparedDataset(out)
    rows = naive_rows(fastas, lineages, length)
    tables = [sorted({row[3][rank] for row in rows}) for rank in range(3)]
    assert data.classes == {rank: [{"taxid": taxid, "name": names[taxid]} for taxid in table]
                            for rank, table in zip(RANKS, tables)}
    labels = [[table.index(taxid) for table, taxid in zip(tables, row[3])] for row in rows]
    split = split_by_genus([label[2] for label in labels], seed, test, validation)
    for number, name in enumerate(SPLITS):
        mine = np.flatnonzero(split == number).tolist()
        records = np.load(out / name / "records.npy")
        assert records.tolist() == [rows[i][:3] for i in mine]
        assert records.dtype.names == ("source", "record", "taxid")
        tokens = data.split(name, "nt")
        assert tokens.labels.tolist() == [labels[i] for i in mine]
        assert tokens.labels.dtype == np.uint16
        found = [tokens.tokens(i).tolist() for i in range(len(tokens))]
        assert found == [naive_tokens(rows[i][4]) for i in mine]
        assert data.manifest["splits"][name] == len(mine)
    manifest = data.manifest
    assert manifest["sequences"] == len(rows) == sum(manifest["splits"].values())
    of_superkingdom = {names[taxid]: sum(row[3][0] == taxid for row in rows) for taxid in tables[0]}
    assert manifest["superkingdoms"] == of_superkingdom
    for source, path in zip(manifest["sources"], fastas):
        assert (source["file"], source["bytes"]) == (path.name, path.stat().st_size)
        assert source["sha256"] == sha256(path)
        assert source["sequences"] == len(naive_records(path))
    return manifest


# input

def tree(folder):
    """{relative path: bytes of a file, None of a folder} of all in a folder, hidden files too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in Path(folder).rglob("*")}


def run_main(*arguments):
    prepare.main([str(argument) for argument in arguments])


LINEAGES = {
    22: (2, 20, 21),
    21: (2, 20, 21),
    23: (2, 20, 23),
    31: (10239, 30, 31),
    99: (2, 20, 23),  # 99 is now 23
}
NAMES = {taxid: name for taxid, _, _, name in FEW}


def write_fasta(path, records, width=None):
    """records: (taxid, letters)."""
    lines = []
    width = width or 10 ** 9
    for i, (taxid, letters) in enumerate(records):
        lines += [f">{taxid} {i}", *(letters[k:k + width] for k in range(0, len(letters), width))]
    path.write_text("\n".join(lines) + "\n")
    return path


def random_letters(n, seed, alphabet="ACGT"):
    return "".join(np.random.RandomState(seed).choice(list(alphabet), n))


def simulated_arguments(folder):
    names = ("Archaea", "Bacteria", "Eukaryota", "Viruses")
    return ["--fasta", *(folder / f"{name}_db.fa" for name in names),
            "--taxdump", folder / "taxdmp_simulated.zip"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A folder with 600 simulated sequences and their dump."""
    folder = tmp_path_factory.mktemp("simulated")
    simulate.simulate(folder, 600, seed=0)
    return folder


@pytest.fixture(scope="module")
def prepared(simulated, tmp_path_factory):
    """The folder that prepare.py makes of them. For reading only."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    run_main(*simulated_arguments(simulated), "--out", out)
    return out


@pytest.fixture
def small(tmp_path):
    """Two FASTA files of 30 letters a record and a dump.

    Every reason to drop a record is in them.
    """
    taxids = [22] * 9 + [21] * 3 + [23] * 2 + [99] * 3 + [31]
    good = [(taxid, random_letters(30, 100 + i)) for i, taxid in enumerate(taxids)]
    bad = [(40, "A" * 30), (50, "C" * 30), (60, "G" * 30), (98, "T" * 30), (98, "A" * 30),
           (97, "C" * 30), (22, "A" * 29), (97, "ACGT"), (22, "A" * 31), (50, "A" * 30), (22, "")]
    mixed = []
    for i in range(max(len(good), len(bad))):
        mixed += [*bad[i:i + 1], *good[i:i + 1]]
    more = [(31, random_letters(30, 1, "ACGTacgtNnRYk")), (31, "ACGTN" * 6), (40, "A" * 30),
            (31, "acgtu" * 6)]
    fastas = [write_fasta(tmp_path / "one.fa", mixed), write_fasta(tmp_path / "two.fa", more)]
    return fastas, write_dump(tmp_path / "dump.zip")


def small_arguments(small, *more):
    return ["--fasta", *small[0], "--taxdump", small[1], "--length", 30, *more]


# the folder

def test_every_number_of_the_simulated_corpus(simulated, prepared):
    fastas = simulated_arguments(simulated)[1:5]
    manifest = check_folder(prepared, fastas, SIMULATED, SIMULATED_NAMES)
    assert manifest["sequences"] == 600 and manifest["dropped"] == []
    assert [len(manifest["classes"][rank]) for rank in RANKS] == [4, 18, 54]
    assert manifest["settings"] == {"length": 1500, "test": 0.02, "validation": 0.1, "seed": 42}
    dump = simulated / "taxdmp_simulated.zip"
    assert manifest["taxdump"] == {"file": dump.name, "date": "2024-12-01", "sha256": sha256(dump)}


def test_two_runs_give_identical_bytes_wherever_the_input_lies(
        simulated, prepared, tmp_path, monkeypatch):
    expected = tree(prepared)
    names = ("labels.npy", "records.npy", "nt.npy", "nt.bin")
    in_splits = [f"{split}/{name}" for split in SPLITS for name in names]
    assert sorted(expected) == sorted(["manifest.json", *SPLITS, *in_splits, "test_ids.txt"])
    monkeypatch.setattr(fasta, "RANGE", 50_000)  # else these files are too small to be shared out
    for workers in (1, 3):
        run_main(*simulated_arguments(simulated), "--out", tmp_path / "again",
                 "--workers", workers, "--overwrite")
        assert tree(tmp_path / "again") == expected
    for path in simulated.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    run_main(*simulated_arguments(Path()), "--out", "relative/deep")
    assert tree(tmp_path / "relative" / "deep") == expected


def test_another_seed_splits_otherwise_and_changes_the_digest(simulated, prepared, tmp_path):
    arguments = simulated_arguments(simulated)
    run_main(*arguments, "--out", tmp_path / "out", "--seed", 7, "--test", 0.1, "--validation", 0.2)
    manifest = check_folder(tmp_path / "out", arguments[1:5], SIMULATED, SIMULATED_NAMES,
                            seed=7, test=0.1, validation=0.2)
    assert manifest["digest"] != PreparedDataset(prepared).digest
    assert manifest["settings"] == {"length": 1500, "test": 0.1, "validation": 0.2, "seed": 7}


def test_zip_and_tar_of_a_dump_differ_in_the_manifests_taxdump_only(simulated, prepared, tmp_path):
    dump = tmp_path / "dump.tar.gz"
    source = simulated / "taxdmp_simulated.zip"
    with zipfile.ZipFile(source) as archive, tarfile.open(dump, "w:gz") as tar:
        for name in archive.namelist():
            info = tarfile.TarInfo(name)
            info.size = archive.getinfo(name).file_size
            info.mtime = 1733000000
            tar.addfile(info, io.BytesIO(archive.read(name)))
    run_main(*simulated_arguments(simulated)[:-1], dump, "--out", tmp_path / "out")
    one, other = tree(prepared), tree(tmp_path / "out")
    manifests = [json.loads(files.pop("manifest.json")) for files in (one, other)]
    assert one == other
    assert manifests[1].pop("taxdump") == {
        "file": "dump.tar.gz", "date": "2024-11-30", "sha256": sha256(dump)}
    del manifests[0]["taxdump"]
    assert manifests[0].pop("sha256") != manifests[1].pop("sha256")  # of the manifest itself
    assert manifests[0] == manifests[1]


def test_layout_of_the_fasta_does_not_change_the_digest(simulated, prepared, tmp_path):
    for i, path in enumerate(simulated_arguments(simulated)[1:5]):
        records = naive_records(path)
        records = [(taxid, letters.lower()) for taxid, letters in records]
        out = write_fasta(tmp_path / path.name, records, width=60 + i)
        if i % 2:
            out.write_bytes(gzip.compress(out.read_bytes().replace(b"\n", b"\r\n")))
    fastas = [tmp_path / path.name for path in simulated_arguments(simulated)[1:5]]
    run_main("--fasta", *fastas, "--taxdump", simulated / "taxdmp_simulated.zip",
             "--out", tmp_path / "out")
    data = PreparedDataset(tmp_path / "out")
    assert data.digest == PreparedDataset(prepared).digest
    digests = [source["sha256"] for source in data.manifest["sources"]]
    assert digests == [sha256(path) for path in fastas]


def test_demo_is_the_simulated_corpus_prepared(tmp_path):
    for name, workers in (("a", 1), ("b", 2)):
        run_main("--demo", "--demo-sequences", 120, "--seed", 3, "--out", tmp_path / name,
                 "--workers", workers)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    simulate.simulate(tmp_path / "source", 120, seed=3)
    assert tree(tmp_path / "a" / "source") == tree(tmp_path / "source")
    fastas = simulated_arguments(tmp_path / "source")[1:5]
    check_folder(tmp_path / "a", fastas, SIMULATED, SIMULATED_NAMES, seed=3)


def test_prepare_demo_writes_what_the_command_does(tmp_path):
    manifest = steps.prepare_demo(tmp_path / "a")
    run_main("--demo", "--out", tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b") and manifest["sequences"] == 4000
    with pytest.raises(InputError, match="a exists"):
        steps.prepare_demo(tmp_path / "a")


def naive_drops(fastas, length):
    """The drop report, one record at a time. length None: any but 0."""
    reasons = {
        40: "no phylum",
        50: "no genus",
        60: "no superkingdom",
        98: "deleted taxid",
        97: "unknown taxid",
    }
    found = {}
    for path in fastas:
        for taxid, letters in naive_records(path):
            if (not letters) if length is None else len(letters) != length:
                reason = "no bases" if length is None else f"length is not {length}"
            elif taxid in reasons:
                reason = reasons[taxid]
            else:
                continue
            found.setdefault((path.name, reason), []).append(taxid)
    return [{"file": file, "reason": reason, "sequences": len(taxids), "taxids": len(set(taxids))}
            for (file, reason), taxids in found.items()]


def by_file_and_reason(rows):
    return sorted(rows, key=lambda row: (row["file"], row["reason"]))


@pytest.mark.parametrize("any_length", [False, True])
def test_what_is_dropped_is_counted_by_file_and_reason(small, tmp_path, capsys, any_length):
    length = None if any_length else 30
    arguments = small_arguments(small, "--out", tmp_path / "out")
    if any_length:
        at = arguments.index("--length")
        arguments[at:at + 2] = ["--any-length"]
    run_main(*arguments)
    manifest = check_folder(tmp_path / "out", small[0], LINEAGES, NAMES, length)
    expected = naive_drops(small[0], length)
    assert len(expected) == 7
    assert by_file_and_reason(manifest["dropped"]) == by_file_and_reason(expected)
    assert manifest["settings"]["length"] == length
    total = sum(len(naive_records(path)) for path in small[0])
    assert manifest["sequences"] + sum(row["sequences"] for row in expected) == total
    printed = capsys.readouterr().out
    assert f"kept {manifest['sequences']} of {total} sequences" in printed
    for line in expected:
        pattern = f" {line['sequences']} {line['taxids']} {line['reason']}, {line['file']}"
        assert pattern in " ".join(printed.split())


def test_other_letters_are_counted_by_file(small, tmp_path, capsys):
    run_main(*small_arguments(small, "--out", tmp_path / "out"))
    sources = PreparedDataset(tmp_path / "out").manifest["sources"]
    counted = [source["letters_changed_to_N"] for source in sources]
    wrong = [x for _, letters in naive_records(small[0][1]) for x in letters
             if x.upper() not in "ACGTUN"]
    assert counted == [0, len(wrong)] and set("RYk") <= set(wrong)
    assert f"two.fa: {len(wrong)} bases outside ACGTN became N" in capsys.readouterr().out


def test_a_single_sequence_is_a_dataset(tmp_path):
    fasta = write_fasta(tmp_path / "x.fa", [(22, "ACGTN")])
    run_main("--fasta", fasta, "--taxdump", write_dump(tmp_path / "d.zip"), "--any-length",
             "--out", tmp_path / "out", "--tokenizers", "tiny-dnabert")
    check_folder(tmp_path / "out", [fasta], LINEAGES, NAMES, None)
    data = PreparedDataset(tmp_path / "out")
    assert data.split("train", "tiny-dnabert")[[0]]["labels"].tolist() == [[0, 0, 0]]
    assert [len(data.split(split, "nt")) for split in SPLITS] == [1, 0, 0]


def test_more_files_than_a_byte_can_count(tmp_path):
    fastas = [write_fasta(tmp_path / f"{i}.fa", [(22 if i % 2 else 31, random_letters(12, i))])
              for i in range(258)]
    dump = write_dump(tmp_path / "d.zip")
    try:
        run_main("--fasta", *fastas, "--taxdump", dump, "--any-length", "--out", tmp_path / "out")
    except InputError as refused:
        assert "files" in str(refused)
    else:
        check_folder(tmp_path / "out", fastas, LINEAGES, NAMES, None)


def test_tokens_made_at_once_and_added_later_are_the_same(simulated, prepared, tmp_path):
    run_main(*simulated_arguments(simulated), "--out", tmp_path / "once",
             "--tokenizers", "nt", "tiny-dnabert")
    run_main(*simulated_arguments(simulated), "--out", tmp_path / "later")
    run_main("--add-tokens", "tiny-dnabert", "--out", tmp_path / "later", "--workers", 3)
    assert tree(tmp_path / "once") == tree(tmp_path / "later")
    data = PreparedDataset(tmp_path / "once")
    assert data.digest == PreparedDataset(prepared).digest
    tokenizer = get_tokenizer("tiny-dnabert")
    fastas = simulated_arguments(simulated)[1:5]
    for split in SPLITS:
        tokens = data.split(split, "tiny-dnabert")
        records = np.load(tmp_path / "once" / split / "records.npy").tolist()
        for i, (source, record, _) in enumerate(records[:20]):
            letters = fastas[source].read_bytes().splitlines()[2 * record + 1]
            expected = tokenizer.encode(letters, [len(letters)])[0].tolist()
            assert tokens.tokens(i).tolist() == expected


def test_adding_tokens_again_needs_overwrite(small, tmp_path):
    run_main(*small_arguments(small, "--out", tmp_path / "out", "--tokenizers", "tiny-dnabert"))
    before = tree(tmp_path)
    with pytest.raises(InputError, match="out has tokens of tiny-dnabert already; --overwrite"):
        run_main("--add-tokens", "tiny-dnabert", "--out", tmp_path / "out")
    assert tree(tmp_path) == before
    run_main("--add-tokens", "tiny-dnabert", "--out", tmp_path / "out", "--overwrite")
    assert tree(tmp_path) == before


def test_tokenizer_file_is_used_for_dnabert(small, tmp_path):
    out = tmp_path / "out"
    run_main(*small_arguments(small, "--out", out), "--tokenizers", "dnabert",
             "--tokenizer-file", TINY_BPE)
    data = PreparedDataset(out)
    tiny = get_tokenizer("tiny-dnabert")
    assert data.manifest["tokenizers"]["dnabert"]["digest"] == tiny.digest
    letters = NT.decode(data.split("train", "nt").tokens(0))
    expected = tiny.encode(letters, [30])[0].tolist()
    assert data.split("train", "dnabert").tokens(0).tolist() == expected


# a pinned test split, and groups

def test_ids_name_the_test_split_by_letters(small, tmp_path):
    run_main(*small_arguments(small, "--out", tmp_path / "out"))
    test = PreparedDataset(tmp_path / "out").split("test", "nt")
    letters = [NT.decode(test.tokens(i)) for i in range(len(test))]
    taxids = np.load(tmp_path / "out" / "test" / "records.npy")["taxid"].tolist()
    lines = (tmp_path / "out" / "test_ids.txt").read_text().splitlines()
    expected = [f"{taxid} {hashlib.blake2b(text, digest_size=8).hexdigest()}"
                for taxid, text in zip(taxids, letters)]
    assert [line.rsplit(" ", 1)[0] for line in lines] == expected
    # Two of the letters are there twice, once as U and once as N.
    assert {line.rsplit(" ", 1)[1] for line in lines} <= {"0", "1"}


def test_a_pinned_test_split_is_the_same_from_other_files_seeds_and_orders(
        simulated, prepared, tmp_path):
    (tmp_path / "all").mkdir()
    records = [pair for path in simulated_arguments(simulated)[1:5] for pair in naive_records(path)]
    copied = records[::7]  # some sequences twice
    order = np.random.RandomState(0).permutation(len(records))
    shuffled = [*(records[i] for i in order), *copied]
    fasta = write_fasta(tmp_path / "all" / "x.fa", shuffled, width=70)
    arguments = ["--fasta", fasta, "--taxdump", simulated / "taxdmp_simulated.zip", "--seed", 5]
    lines_of = lambda folder: sorted((folder / "test_ids.txt").read_text().split("\n"))
    # of the first preparation, then of this one, which has copies
    for pinned in (prepared, tmp_path / "one"):
        for name, workers in (("one", 1), ("two", 2)):
            run_main(*arguments, "--test-ids", pinned / "test_ids.txt",
                     "--out", tmp_path / name, "--workers", workers, "--overwrite")
        assert tree(tmp_path / "one") == tree(tmp_path / "two")
        assert lines_of(tmp_path / "one") == lines_of(prepared)
        splits = []
        for folder in (prepared, tmp_path / "one"):
            test = PreparedDataset(folder).split("test", "nt")
            splits.append({NT.decode(test.tokens(i)) for i in range(len(test))})
        assert splits[0] == splits[1]
    manifest = PreparedDataset(tmp_path / "one").manifest
    n = manifest["splits"]["test"]
    assert manifest["test_ids"].pop("sha256")
    assert manifest["test_ids"] == {"file": "test_ids.txt", "sequences": n, "found": n}
    assert manifest["repeated"]["sequences"] == len(copied)
    assert manifest["splits"]["validation"] > 54


def test_repeated_sequences_are_counted(tmp_path, capsys):
    records = [(22, random_letters(30, i % 40)) for i in range(100)]
    fasta = write_fasta(tmp_path / "x.fa", records)
    run_main("--fasta", fasta, "--taxdump", write_dump(tmp_path / "d.zip"), "--length", 30,
             "--out", tmp_path / "out", "--test", 0.2)
    data = PreparedDataset(tmp_path / "out")
    letters = {}
    for name in SPLITS:
        split = data.split(name, "nt")
        letters[name] = [NT.decode(split.tokens(i)) for i in range(len(split))]
    in_train = sum(text in letters["train"] for text in letters["test"])
    repeated = data.manifest["repeated"]
    assert (repeated["sequences"], repeated["test_in_train"]) == (60, in_train)
    assert repeated["across_splits"]["test in train"] == in_train
    said = capsys.readouterr().out
    assert (f"60 sequences have the bases of an earlier one; "
            f"{in_train} of the test split are in train too") in said


def genomes_fasta(path, n=300):
    """n records of 30 bases in four genera, G{0-4}_{0-5} their genomes.

    Returns (path, [(taxid, genome)]).
    """
    keys = [((22, 21, 23, 99, 31)[i % 5], f"G{i % 5}_{i // 5 % 6}") for i in range(n)]
    records = [f">{taxid} {i} genome={genome} x\n{random_letters(30, i)}\n"
               for i, (taxid, genome) in enumerate(keys)]
    path.write_text("".join(records))
    return path, keys


def test_groups_stay_on_one_side(tmp_path):
    path, keys = genomes_fasta(tmp_path / "x.fa")
    run_main("--fasta", path, "--taxdump", write_dump(tmp_path / "d.zip"), "--length", 30,
             "--out", tmp_path / "out", "--group", r"genome=(\S+)")
    sides = {}
    for split in SPLITS:
        for record in np.load(tmp_path / "out" / split / "records.npy")["record"].tolist():
            sides.setdefault(keys[record][1], set()).add(split)
    assert {len(splits) for splits in sides.values()} == {1} and len(sides) == 30
    assert set.union(*sides.values()) == set(SPLITS)
    assert PreparedDataset(tmp_path / "out").manifest["settings"]["group"] == r"genome=(\S+)"


@pytest.mark.parametrize("regex, words", [
    # one group per genus
    ("x$", "leaves nothing for validation and test: no genus has more than 1 group;"),
    # two taxids in two of the genera
    ("^[0-9]+", "leaves nothing for validation: no genus has more than 2 groups;"),
])
def test_groups_too_few_for_a_split_are_refused(tmp_path, regex, words):
    path, _ = genomes_fasta(tmp_path / "x.fa", 60)
    dump = write_dump(tmp_path / "d.zip")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        run_main("--fasta", path, "--taxdump", dump, "--length", 30, "--out", tmp_path / "out",
                 "--group", regex)
    assert str(caught.value).startswith(f"--group '{regex}' ") and tree(tmp_path) == before


# nothing half written

@pytest.mark.parametrize("step", [
    (sources, "index_fasta"),
    (sources, "label_taxids"),
    (steps, "split_by_genus"),
    (steps, "normalize"),
    (steps, "write_manifest"),
], ids=lambda step: step[1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_run_that_fails_leaves_nothing_and_keeps_the_old_folder(
        small, tmp_path, monkeypatch, step, error):
    run_main(*small_arguments(small, "--out", tmp_path / "old"))
    before = tree(tmp_path)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(*step, fail)
    for arguments in (["--out", tmp_path / "new"], ["--out", tmp_path / "old", "--overwrite"]):
        # With one worker, what fails, fails in here.
        more = ["--tokenizers", "tiny-dnabert", "--workers", 1]
        with pytest.raises((KeyboardInterrupt, OSError, InputError)):
            run_main(*small_arguments(small, *arguments, *more))
        assert tree(tmp_path) == before


def test_overwrite_replaces_all_of_the_old_folder(small, tmp_path):
    run_main(*small_arguments(small, "--out", tmp_path / "out", "--tokenizers", "tiny-dnabert"))
    run_main(*small_arguments(small, "--out", tmp_path / "fresh", "--seed", 1))
    run_main(*small_arguments(small, "--out", tmp_path / "out", "--seed", 1, "--overwrite"))
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["dump.zip", "fresh", "one.fa", "out", "two.fa"]


# wrong input: {path} is the folder of the input below

GOOD = "--fasta {path}/good.fa --taxdump {path}/dump.zip --any-length --out {path}/out"
OLD = "--fasta {path}/good.fa --taxdump {path}/dump.zip --any-length --out {path}/old"
FILE = " --tokenizer-file {path}/"
WRONG = {
    "no arguments": ("", "give either"),
    "only --out": ("--out {path}/out",
                   "give either --fasta and --taxdump, or --table, or --demo, or --add-tokens"),
    "--demo and --fasta": (GOOD + " --demo", "give either"),
    "no dump": ("--fasta {path}/good.fa --out {path}/out", "--fasta and --taxdump go together"),
    "--demo and --taxdump": ("--demo --taxdump {path}/dump.zip --out {path}/out",
                             "--fasta and --taxdump go together"),
    "a flag that is not one": (GOOD + " --tokeniser nt", "--tokeniser"),
    "an abbreviation": (GOOD + " --any", "--any"),
    "a missing FASTA": (GOOD + " --fasta {path}/good.fa {path}/missing.fa",
                        "missing.fa: no such file"),
    "a folder as FASTA": (GOOD + " --fasta {path}/old", "old: no such file"),
    "an empty FASTA": (GOOD + " --fasta {path}/good.fa {path}/empty.fa",
                       "empty.fa: the file is empty"),
    "prose as FASTA": (GOOD + " --fasta {path}/prose.fa", "prose.fa: neither FASTA nor FASTQ"),
    "bzip2 that is cut short": (GOOD + " --fasta {path}/x.fa.bz2",
                                "x.fa.bz2: the bzip2 file is damaged or cut short"),
    "truncated gzip": (GOOD + " --fasta {path}/cut.fa.gz", "cut.fa.gz: the gzip file is damaged"),
    "an accession for a taxid": (GOOD + " --fasta {path}/accession.fa",
                                 "accession.fa: record 2 '>NC_1'.*taxid"),
    "a zero taxid": (GOOD + " --fasta {path}/zero.fa", "zero.fa: record 2 '>0'"),
    "protein": (GOOD + " --fasta {path}/good.fa {path}/protein.fa",
                "protein.fa: record 3 '>31'.*protein"),
    "a record without a name": (GOOD + " --fasta {path}/nameless.fa",
                                "nameless.fa: record 2 has no name"),
    "two files of one name": (GOOD + " --fasta {path}/good.fa {path}/same/good.fa",
                              "two files have the same name"),
    "a missing dump": (GOOD + " --taxdump {path}/missing.zip", "missing.zip: no such file"),
    "a folder as dump": (GOOD + " --taxdump {path}/old", "old: no nodes.dmp in it"),
    "text named .zip": (GOOD + " --taxdump {path}/text.zip", "text.zip: the archive is damaged"),
    "a zip cut short": (GOOD + " --taxdump {path}/cut.zip", "cut.zip: the archive is damaged"),
    "a dump without nodes": (GOOD + " --taxdump {path}/nonodes.zip", "nonodes.zip: no nodes.dmp"),
    "a FASTA as dump": (GOOD + " --taxdump {path}/good.fa", "good.fa: the archive is damaged"),
    "nothing of that length": (GOOD.replace("--any-length", "--length 31"),
                               "no sequence is left of 4 "),
    "no taxid known": (GOOD + " --fasta {path}/unknown.fa",
                       "no sequence is left of 1 .*unknown taxid"),
    "a length of 0": (GOOD + " --length 0", "--length.*not a positive integer"),
    "a length in words": (GOOD + " --length long", "--length"),
    "all for the test": (GOOD + " --test 1", r"--test.*\[0, 1\)"),
    "a negative share": (GOOD + " --validation -0.1", "--validation"),
    "no number for a share": (GOOD + " --test nan", "--test"),
    "nothing to train on": (GOOD + " --test 0.6 --validation 0.4",
                            "leave nothing to train on"),
    "--overwrite of another folder": (GOOD + " --out {path}/other --overwrite",
                                      "other is not a prepared dataset"),
    "--overwrite of the input's folder": (OLD.replace("good.fa", "old/note") + " --overwrite",
                                          "note lies in --out"),
    "a test share of 0": (GOOD + " --test 0", "above 0"),
    "a length with --any-length": (GOOD + " --length 5", "--length does nothing"),
    "the demo's size without it": (GOOD + " --demo-sequences 60",
                                   "--demo-sequences does nothing"),
    "a split with --add-tokens": ("--add-tokens tiny-dnabert --test 0.5 --out {path}/old",
                                  "--test does nothing"),
    "a negative seed": (GOOD + " --seed -1", "--seed: -1 is not from 0"),
    "a seed too large": (GOOD + " --seed 4294967296", "seed"),
    "a demo seed too large": ("--demo --seed 4294967296 --out {path}/out", "seed"),
    "a demo too small": ("--demo --demo-sequences 53 --out {path}/out",
                         "53 sequences are fewer than the 54 species"),
    "an unknown tokenizer": (GOOD + " --tokenizers nt tiny-dnabret",
                             "'tiny-dnabret'.*did you mean tiny-dnabert"),
    "no tokenizer": (GOOD + " --tokenizers", "--tokenizers"),
    "a missing tokenizer file": (GOOD + " --tokenizers dnabert" + FILE + "missing.json",
                                 "missing.json: no such token"),
    "a bad tokenizer file": (GOOD + " --tokenizers dnabert" + FILE + "text.zip",
                             "text.zip: not a tokenizer.json"),
    "a tokenizer file for another": (GOOD + " --tokenizers tiny-dnabert" + FILE + "t.json",
                                     "--tokenizer-file"),
    "a tokenizer file for none": (GOOD + FILE + "t.json", "--tokenizer-file"),
    "a pattern that is none": (GOOD + " --group (",
                               "--group: '\\(' is not a regular expression"),
    "a pattern that finds nothing": (
        GOOD + " --group genome=.",
        "good.fa: record 1 '>22': --group finds nothing in its header '22 0'"),
    "missing ids": (GOOD + " --test-ids {path}/missing.txt",
                    "missing.txt: cannot be read .No such file"),
    "ids that are none": (GOOD + " --test-ids {path}/good.fa",
                          "good.fa: line 1 is not 'TAXID DIGEST COPY'"),
    "empty ids": (GOOD + " --test-ids {path}/empty.fa", "empty.fa: no ids in it"),
    "ids of other sequences": (GOOD + " --test-ids {path}/ids.txt",
                               "ids.txt: none of its 1 sequences is among the 4 kept"),
    "ids and a share": (GOOD + " --test-ids {path}/ids.txt --test 0.1",
                        "--test does nothing here"),
    "ids and groups": (GOOD + " --test-ids {path}/ids.txt --group x",
                       "--group does nothing here"),
    "an old folder": (OLD, "old exists: give another --out, or --overwrite"),
    "a file as --out": (GOOD + " --out {path}/good.fa", "good.fa exists"),
    "a file as --out, --overwrite": (GOOD + " --out {path}/text.zip --overwrite", "text.zip"),
    "--out below a file": (GOOD + " --out {path}/good.fa/out", "cannot write beside"),
    "tokens for a missing folder": ("--add-tokens tiny-dnabert --out {path}/missing",
                                    "missing: no such folder"),
    "nt tokens for a missing folder": ("--add-tokens nt --out {path}/missing", "--add-tokens nt"),
    "tokens for an empty folder": ("--add-tokens tiny-dnabert --out {path}/empty",
                                   "empty: no manifest.json"),
    "unknown tokens for a folder": ("--add-tokens x --out {path}/old", "unknown tokenizer 'x'"),
    "--add-tokens and --demo": ("--add-tokens tiny-dnabert --demo --out {path}/old",
                                "give either|--demo"),
    "--add-tokens and --fasta": (OLD + " --add-tokens tiny-dnabert", "give either|--fasta"),
    "--overwrite that fails": (OLD + " --overwrite --fasta {path}/accession.fa",
                               "accession.fa: record 2"),
    "--overwrite of a wrong length": (OLD.replace("--any-length", "--length 31 --overwrite"),
                                      "no sequence is left"),
}


def write_wrong_input(folder):
    records = [(22, random_letters(30, 0)), (22, "ACGTN"), (31, "GGGTTT"), (23, "AC")]
    good = write_fasta(folder / "good.fa", records)
    dump = write_dump(folder / "dump.zip")
    letters = good.read_text()
    texts = {
        "empty.fa": "",
        "prose.fa": "Dear all,\n",
        "zero.fa": ">22 0\nACGT\n>0 1\nACGT\n",
        "text.zip": "text\n",
        "accession.fa": ">22 0\nACGT\n>NC_1 1\nACGT\n",
        "nameless.fa": ">22 0\nACGT\n>\nACGT\n",
        "protein.fa": ">22 0\nACGT\n>22 1\nACGT\n>31 2\nMKTAYIAKQRQISFVK\n",
        "unknown.fa": ">97 0\nACGT\n",
        "ids.txt": "22 0123456789abcdef 0\n",
        "x.fa.bz2": "BZh9",
        "same/good.fa": letters,
        "old/note": "keep me",
        "old/manifest.json": "{}",
        "other/note": "keep me",
    }
    for name in ("same", "old", "other", "empty"):
        (folder / name).mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "cut.fa.gz").write_bytes(gzip.compress(letters.encode())[:-12])
    (folder / "cut.zip").write_bytes(dump.read_bytes()[:-100])
    (folder / "t.json").write_bytes(TINY_BPE.read_bytes())
    with zipfile.ZipFile(folder / "nonodes.zip", "w") as archive:
        archive.writestr("names.dmp", row(1, "root", "", "scientific name"))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, case):
    write_wrong_input(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = tree(tmp_path)
    command, words = WRONG[case]
    with pytest.raises(InputError, match=words) as caught:
        prepare.main(command.format(path=tmp_path).split())
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_the_input_of_the_table_above_is_otherwise_right(tmp_path):
    write_wrong_input(tmp_path)
    prepare.main(GOOD.format(path=tmp_path).split())
    check_folder(tmp_path / "out", [tmp_path / "good.fa"], LINEAGES, NAMES, None)
    prepare.main((OLD + " --overwrite").format(path=tmp_path).split())
    assert tree(tmp_path / "old") == tree(tmp_path / "out")


@pytest.mark.parametrize("case", ["an accession for a taxid", "a zip cut short"])
def test_the_script_exits_with_2_and_one_line(tmp_path, case):
    write_wrong_input(tmp_path)
    before = tree(tmp_path)
    command, words = WRONG[case]
    arguments = command.format(path=tmp_path).split()
    done = subprocess.run([sys.executable, str(ROOT / "prepare.py"), *arguments], cwd=tmp_path,
                          capture_output=True, text=True, check=False,
                          env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 2 and done.stdout.count("\n") == 1
    assert done.stdout.startswith("needs about 0.00 GB of disk, ")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("prepare.py: error: ")
    assert words.split(":")[0] in done.stderr
    assert tree(tmp_path) == before


# the real corpus

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """{kind of archive: the prepared folder} of ../shared/realdata."""
    source = SHARED / "realdata"
    if not source.is_dir():
        pytest.skip("no ../shared/realdata: the real corpus is not here")
    folder = tmp_path_factory.mktemp("real")
    fastas = simulated_arguments(source)[1:5]
    for kind, dump, workers in (("zip", "taxdmp_2024-12-01.zip", 1),
                                ("tar", "taxdump.tar.gz", 2)):
        run_main("--fasta", *fastas, "--taxdump", source / dump, "--out", folder / kind,
                 "--workers", workers)
    return {kind: folder / kind for kind in ("zip", "tar")}


def test_real_corpus_is_kept_whole(real):
    manifest = PreparedDataset(real["zip"]).manifest
    assert manifest["sequences"] == 20540
    assert sum(source["sequences"] for source in manifest["sources"]) == 20540
    assert manifest["dropped"] == []
    assert [len(manifest["classes"][rank]) for rank in RANKS] == [4, 31, 75]
    assert manifest["superkingdoms"] == {
        "Bacteria": 11866, "Archaea": 3071, "Eukaryota": 4955, "Viruses": 648}
    assert manifest["splits"] == {"train": 18075, "validation": 2054, "test": 411}
    assert manifest["taxdump"]["date"] == "2024-12-01"


def test_real_corpus_has_the_counts_of_its_table(real):
    data = PreparedDataset(real["zip"])
    names = [[row["name"] for row in data.classes[rank]] for rank in RANKS]
    labels = np.concatenate([data.split(split, "nt").labels for split in SPLITS])
    rows, counts = np.unique(labels, axis=0, return_counts=True)
    found = {tuple(table[i] for table, i in zip(names, row)): count
             for row, count in zip(rows.tolist(), counts.tolist())}
    lines = (SHARED / "realdata" / "counts.tsv").read_text().splitlines()[1:]
    assert found == {tuple(line.split("\t")[:3]): int(line.split("\t")[3]) for line in lines}


def test_real_corpus_spells_the_letters_of_its_files(real):
    data = PreparedDataset(real["zip"])
    fastas = simulated_arguments(SHARED / "realdata")[1:5]
    lines = [path.read_bytes().splitlines() for path in fastas]
    seen = set()
    for split in SPLITS:
        tokens = data.split(split, "nt")
        records = np.load(real["zip"] / split / "records.npy")
        for i, (source, record, taxid) in enumerate(records.tolist()):
            seen.add((source, record))
            assert lines[source][2 * record].split()[0] == b">%d" % taxid
            letters = lines[source][2 * record + 1].upper()
            assert NT.decode(tokens.tokens(i)) == letters.translate(TO_ACGTN)
    assert len(seen) == 20540


def test_real_corpus_is_the_same_from_either_archive(real):
    one, other = tree(real["zip"]), tree(real["tar"])
    manifests = [json.loads(files.pop("manifest.json")) for files in (one, other)]
    assert one == other
    assert manifests[0].pop("taxdump") != manifests[1].pop("taxdump")
    assert manifests[0].pop("sha256") != manifests[1].pop("sha256")
    assert manifests[0] == manifests[1]


# runs that are killed, and full disks

def start(tmp_path, *arguments, **options):
    """prepare.py as a process of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / "prepare.py"), *map(str, arguments)],
                            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


def wait_for(folder, pattern, process):
    """Until a file of that pattern is there."""
    for _ in range(60_000):
        if any(folder.glob(pattern)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """({command, the folder it makes}) of 12,000 sequences, so that there is time to kill it."""
    folder = tmp_path_factory.mktemp("larger")
    simulate.simulate(folder, 12_000, length=150, study=True)
    arguments = [*simulated_arguments(folder), "--length", 150]
    run_main(*arguments, "--out", folder / "whole", "--tokenizers", "tiny-dnabert")
    return arguments, folder / "whole"


@pytest.mark.parametrize("when, how", [
    (".out.*.tmp/train/.nt.bin*", signal.SIGKILL),
    (".out.*.tmp/train/.nt.bin*", signal.SIGTERM),
    (".out.*.tmp/train/.tiny*.bin*", signal.SIGKILL),
])
def test_a_killed_run_keeps_the_old_folder_and_the_next_starts_clean(larger, tmp_path, when, how):
    arguments, whole = larger
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("old")
    before = tree(tmp_path)
    arguments = [*arguments, "--out", tmp_path / "out", "--overwrite",
                 "--tokenizers", "tiny-dnabert", "--workers", 2]
    killed = start(tmp_path, *arguments)
    wait_for(tmp_path, when, killed)
    killed.send_signal(how)
    errors = killed.communicate()[1]
    after = tree(tmp_path)
    assert {name: after.get(name) for name in before} == before
    if how == signal.SIGTERM:
        assert after == before and killed.returncode == 130
        assert errors == "prepare.py: interrupted\n"
    run_main(*arguments)
    assert tree(tmp_path / "out") == tree(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_tokens_are_added(larger, tmp_path):
    _, whole = larger
    shutil.copytree(whole, tmp_path / "out")
    before = tree(tmp_path)
    arguments = ["--add-tokens", "tiny-dnabert", "--out", tmp_path / "out", "--overwrite"]
    killed = start(tmp_path, *arguments)
    wait_for(tmp_path, "out/train/.tiny-dnabert.bin.*", killed)
    with pytest.raises(InputError, match="out: another process is writing it"):
        run_main(*arguments)
    killed.kill()
    killed.communicate()
    assert {name: content for name, content in tree(tmp_path).items() if name in before} == before
    run_main(*arguments)
    assert tree(tmp_path) == before


def test_killed_between_the_old_folder_and_the_new_the_old_one_comes_back(small, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("old")
    before = tree(tmp_path)
    (tmp_path / "out").rename(tmp_path / ".out.abc.old")
    (tmp_path / ".out.abc.tmp" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="out exists"):
        run_main(*small_arguments(small, "--out", tmp_path / "out"))
    assert tree(tmp_path) == before


def test_a_running_preparation_is_left_alone(small, tmp_path):
    with new_folder(tmp_path / "out") as running:
        (running / "x").write_text("x")
        run_main(*small_arguments(small, "--out", tmp_path / "out"))
        assert (running / "x").read_text() == "x"
        shutil.rmtree(tmp_path / "out")


# The disk is full in the index, in nt tokens, in other tokens.
@pytest.mark.parametrize("limit, adding", [(20_000, False), (400_000, False), (400_000, True)])
def test_a_full_disk_ends_in_one_line_and_keeps_what_was_there(larger, tmp_path, limit, adding):
    arguments, whole = larger
    shutil.copytree(whole, tmp_path / "out")
    before = tree(tmp_path)
    arguments = ["--add-tokens", "tiny-dnabert"] if adding else [*arguments, "--workers", 2]

    def small_disk():  # no file may grow beyond it: to the program, a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = start(tmp_path, *arguments, "--out", tmp_path / "out", "--overwrite",
                 preexec_fn=small_disk)
    _, errors = done.communicate()
    assert done.returncode == 2, errors
    assert errors.startswith("prepare.py: error: ") and errors.count("\n") == 1, errors
    assert tree(tmp_path) == before


def test_a_disk_that_fills_up_with_the_last_bytes_of_other_tokens_keeps_the_old_ones(
        small, tmp_path, monkeypatch):
    run_main(*small_arguments(small, "--out", tmp_path / "out",
                              "--tokenizers", "nt", "tiny-dnabert"))
    before = tree(tmp_path)
    calls = []

    def full_at_the_third(path, array):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save_array(path, array)

    monkeypatch.setattr(dataset, "save_array", full_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        run_main("--add-tokens", "tiny-dnabert", "--out", tmp_path / "out", "--overwrite",
                 "--workers", "1")
    assert len(calls) == 3 and tree(tmp_path) == before


def test_disk_need_is_said_and_compared(small, tmp_path, monkeypatch, capsys):
    run_main(*small_arguments(small, "--out", tmp_path / "out"))
    assert capsys.readouterr().out.startswith("needs about 0.00 GB of disk, ")
    before = tree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300))
    for arguments in (small_arguments(small, "--out", tmp_path / "new"),
                      ["--add-tokens", "tiny-dnabert", "--out", tmp_path / "out"]):
        with pytest.raises(InputError, match="--out needs about 0.00 GB, and 0.00 GB are free"):
            run_main(*arguments)
        assert tree(tmp_path) == before


def test_each_distinct_taxid_is_labelled_once(small, tmp_path, monkeypatch):
    asked = []
    label = sources.label_taxids

    def record(dump, taxids, *rest):
        asked.append(taxids)
        return label(dump, taxids, *rest)

    monkeypatch.setattr(sources, "label_taxids", record)
    run_main(*small_arguments(small, "--out", tmp_path / "out"))
    taxids = {taxid for path in small[0] for taxid, _ in naive_records(path)}
    assert asked == [sorted(taxids)]
