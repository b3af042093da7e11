"""The simulated corpus: its layout is NCBI's and BERTax's, its bytes are fixed, its levels are
graded.
"""

import hashlib
import itertools
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from taxa.data import simulate
from taxa.errors import InputError

NAMES = ["Archaea_db.fa", "Bacteria_db.fa", "Eukaryota_db.fa", "Viruses_db.fa"]
SPECIES = simulate.species()
# of simulate(sequences=200, seed=0): the four FASTA files and the dump, one after the other
PINNED = "aa7336fc6d32b720918813a46198c696d6dbbba019c2f527d2b52c38f7d50178"
# of simulate(12000, length=60, study=True, unused=5)
PINNED_STUDY = "891867f6a0e3606298767b87b78a3743b5edd44d3e755a6c1a5fb17a17dbf45a"


def read_bytes(paths):
    return b"".join(path.read_bytes() for path in (*paths["fasta"], paths["taxdump"]))


def read_dump(path):
    """{member: [[field, ...], ...]} of a dump, by the separators NCBI documents."""
    with zipfile.ZipFile(path) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert all(line.endswith("\t|") for text in texts.values() for line in text.splitlines())
    return {
        name: [line[:-2].split("\t|\t") for line in text.splitlines()]
        for name, text in texts.items()
    }


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "taxa.data.simulate", *arguments],
                          capture_output=True, text=True, cwd=Path(__file__).parents[1],
                          check=False)


def test_tree_has_the_promised_size_and_unique_ids():
    assert len(simulate.TREE) == 4
    assert len({phylum for _, phylum, _, _ in SPECIES}) >= 16
    assert len({genus for _, _, genus, _ in SPECIES}) == len(SPECIES) >= 48
    nodes = {simulate.ROOT, simulate.CELLULAR}.union(*SPECIES)
    assert len({taxid for taxid, _ in nodes}) == len({name for _, name in nodes}) == len(nodes)
    assert {new for _, new in simulate.MERGED} <= {taxid for taxid, _ in nodes}
    assert not {old for old, _ in simulate.MERGED} & {taxid for taxid, _ in nodes}


def test_dump_reads_as_ncbi_and_every_species_reaches_the_three_ranks(tmp_path):
    simulate.write_taxdump(tmp_path / "dump.zip", SPECIES)
    dump = read_dump(tmp_path / "dump.zip")
    assert list(dump) == ["nodes.dmp", "names.dmp", "merged.dmp", "delnodes.dmp"]
    assert {len(row) for row in dump["nodes.dmp"]} == {13}
    assert {len(row) for row in dump["names.dmp"]} == {4}
    assert dump["merged.dmp"] == [["31968", "1239"], ["325213", "1280"]]
    assert dump["delnodes.dmp"] == []
    parent = {int(row[0]): int(row[1]) for row in dump["nodes.dmp"]}
    rank = {int(row[0]): row[2] for row in dump["nodes.dmp"]}
    name = {int(row[0]): row[1] for row in dump["names.dmp"] if row[3] == "scientific name"}
    assert parent.keys() == rank.keys() == name.keys()
    for lineage in SPECIES:
        taxid = lineage[-1][0]
        found = {}
        while taxid != 1:
            found[rank[taxid]] = (taxid, name[taxid])
            taxid = parent[taxid]
        found.pop("no rank", None)
        assert found == dict(zip(("superkingdom", "phylum", "genus", "species"), lineage))


@pytest.mark.parametrize("sequences", [len(SPECIES), 199, 2000, 8000, 5_180_000])
def test_counts_sum_and_leave_no_genus_out(sequences):
    counts = simulate.counts(sequences)
    assert sum(counts) == sequences and len(counts) == len(SPECIES)
    assert min(counts) >= (20 if sequences >= 2000 else 1)
    if sequences > 10 ** 6:
        for superkingdom in simulate.TREE:
            sizes = [count for count, lineage in zip(counts, SPECIES) if lineage[0] == superkingdom]
            share = simulate.SHARE[superkingdom[1]] / 100
            assert sum(sizes) / sequences == pytest.approx(share, abs=0.001)


def test_records_are_bertax_records(tmp_path):
    done = []
    paths = simulate.simulate(tmp_path / "new" / "folder", sequences=300, progress=done.append)
    assert sum(done) == 300
    assert [path.name for path in paths["fasta"]] == NAMES
    written = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert written == [*NAMES, "taxdmp_simulated.zip"]
    found = {}
    for superkingdom, path in zip(simulate.TREE, paths["fasta"]):
        text = path.read_bytes().decode("ascii")
        assert text.endswith("\n") and "\r" not in text
        lines = text.splitlines()
        of_file = {lineage[-1][0] for lineage in SPECIES if lineage[0] == superkingdom}
        for index, (header, letters) in enumerate(zip(lines[::2], lines[1::2])):
            assert header[0] == ">"
            taxid, number = map(int, header[1:].split(" "))
            assert number == index and taxid in of_file
            assert len(letters) == 1500 and set(letters) == set("ACGT")
            found[taxid] = found.get(taxid, 0) + 1
    assert found == {lineage[-1][0]: count for lineage, count in zip(SPECIES, simulate.counts(300))}


def test_bytes_are_pinned_and_depend_on_the_seed_but_not_on_the_chunk(tmp_path, monkeypatch):
    first = read_bytes(simulate.simulate(tmp_path / "a", sequences=200, seed=0))
    assert hashlib.sha256(first).hexdigest() == PINNED
    odd = read_bytes(simulate.simulate(tmp_path / "odd", sequences=200, seed=0, length=151))
    monkeypatch.setattr(simulate, "CHUNK", 7)
    assert read_bytes(simulate.simulate(tmp_path / "b", sequences=200, seed=0)) == first
    assert read_bytes(simulate.simulate(tmp_path / "odd", sequences=200, seed=0, length=151)) == odd
    assert read_bytes(simulate.simulate(tmp_path / "c", sequences=200, seed=1)) != first


def test_fragments_follow_the_chain_of_their_species():
    chains = simulate.thresholds(0, SPECIES)
    species = 5
    length = 100_000
    which = np.array([species], dtype=np.uint8)
    letters = simulate.fragments(chains, which, length, np.random.RandomState(0))
    codes = np.searchsorted(simulate.LETTERS, letters[0])
    assert simulate.ORDER == 1
    found = np.zeros((4, 4))
    np.add.at(found, (codes[:-1], codes[1:]), 1)
    rows = np.stack(chains, axis=1)[species * 4:species * 4 + 4] / 65535
    expected = np.diff(rows, axis=1, prepend=0, append=1)
    assert found / found.sum(axis=1, keepdims=True) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_relatives_are_closer_the_lower_their_common_rank(seed):
    copies = 20
    which = np.repeat(np.arange(len(SPECIES), dtype=np.uint8), copies)
    chains = simulate.thresholds(seed, SPECIES)
    letters = simulate.fragments(chains, which, 1500, np.random.RandomState(seed))
    codes = np.searchsorted(simulate.LETTERS, letters)
    words = 16 * codes[:, :-2] + 4 * codes[:, 1:-1] + codes[:, 2:]
    spectra = np.stack([np.bincount(rows.ravel(), minlength=64) / rows.size
                        for rows in words.reshape(len(SPECIES), copies, -1)])
    # number of ranks in common: none, superkingdom, superkingdom and phylum
    distances = {0: [], 1: [], 2: []}
    for (a, one), (b, other) in itertools.combinations(enumerate(SPECIES), 2):
        common = sum(x == y for x, y in zip(one, other))
        distances[common].append(np.linalg.norm(spectra[a] - spectra[b]))
    same_phylum, same_superkingdom, apart = (np.mean(distances[common]) for common in (2, 1, 0))
    spectrum = lambda words: np.bincount(words, minlength=64) / len(words)
    halves = words.reshape(len(SPECIES), 2, -1)
    noise = np.mean([np.linalg.norm(spectrum(x) - spectrum(y)) for x, y in halves])
    assert 2 * noise < same_phylum < 0.9 * same_superkingdom < 0.81 * apart


def test_study_has_the_published_shape():
    lineages = simulate.study_lineages()
    sizes = simulate.study_counts(5_181_880)
    at_rank = [{lineage[rank] for lineage in lineages} for rank in range(4)]
    assert [len(taxa) for taxa in at_rank] == [4, 57, 1884, 1884]
    assert set(SPECIES) < set(lineages)
    assert len({taxid for lineage in lineages for taxid, _ in lineage}) == 4 + 57 + 2 * 1884
    of_superkingdom = dict.fromkeys((name for _, name in simulate.TREE), 0)
    for size, lineage in zip(sizes, lineages):
        of_superkingdom[lineage[0][1]] += size
    assert of_superkingdom == {
        "Archaea": 524_276,
        "Bacteria": 1_828_018,
        "Eukaryota": 2_601_890,
        "Viruses": 227_696,
    }
    assert max(sizes) > 30 * min(sizes)
    assert min(simulate.study_counts(12_000)) >= 3
    assert sum(simulate.study_counts(50_001)) == 50_001


def test_study_words_are_those_of_the_chain_and_bytes_are_pinned(tmp_path):
    lineages = simulate.study_lineages()
    chains = simulate.thresholds(0, lineages)
    rows = np.stack(chains, axis=1)[5 * 4:5 * 4 + 4] / 65535
    step = np.diff(rows, axis=1, prepend=0, append=1)
    expected = []
    for word in range(4096):  # six letters of two bits, the first one highest
        steps = [step[word >> place + 2 & 3, word >> place & 3] for place in (8, 6, 4, 2, 0)]
        expected.append(step.mean(axis=0)[word >> 10] * np.prod(steps))
    words = simulate.study_words(chains)
    assert words.shape == (1884, 16384)
    assert np.abs(np.bincount(words[5], minlength=4096) / 16384 - expected).max() <= 1 / 16384
    paths = simulate.simulate(tmp_path, 12_000, length=60, study=True, unused=5)
    assert hashlib.sha256(read_bytes(paths)).hexdigest() == PINNED_STUDY
    assert len(read_dump(paths["taxdump"])["nodes.dmp"]) == 2 + 4 + 57 + 2 * 1884 + 5
    records = [line for path in paths["fasta"] for line in path.read_text().splitlines()]
    letters = records[1::2]
    assert {len(line) for line in letters} == {60}
    assert 0.005 < np.mean(["N" in line for line in letters]) < 0.03


@pytest.mark.parametrize("bad, words", [
    ({"sequences": 7_000, "study": True}, "7000 sequences are too few for --study"),
    ({"sequences": len(SPECIES) - 1}, "fewer than the 54 species"),
    ({"length": simulate.ORDER}, "too short"),
    ({"seed": -1}, "outside 0"),
    ({"seed": 2 ** 32}, "outside 0"),
])
def test_bad_values_raise_and_write_nothing(tmp_path, bad, words):
    with pytest.raises(InputError, match=words):
        simulate.simulate(tmp_path / "out", **bad)
    assert not (tmp_path / "out").exists()


def test_command(tmp_path):
    done = command("--out", str(tmp_path), "--sequences", "200", "--seed", "0")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [Path(line.split(": ")[0]).name for line in lines] == [*NAMES, "taxdmp_simulated.zip"]
    assert sum(int(line.split(": ")[1].split(" sequences")[0]) for line in lines[:4]) == 200
    written = {
        "fasta": [tmp_path / name for name in NAMES],
        "taxdump": tmp_path / "taxdmp_simulated.zip",
    }
    assert hashlib.sha256(read_bytes(written)).hexdigest() == PINNED


@pytest.mark.parametrize("arguments, words", [
    (["--sequences", "53"], "fewer than the 54 species"),
    (["--sequences", "many"], "--sequences"),
    (["--seed", "-1"], "--seed"),
    (["--out", __file__], "cannot write to --out"),
])
def test_command_reports_bad_values_in_one_line(tmp_path, arguments, words):
    done = command("--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1
