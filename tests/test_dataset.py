"""The prepared folder: what goes in comes out, in any process, and nothing is ever half written."""

import itertools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from taxa import RANKS
from taxa.data.batches import load_batches, micro_batches
from taxa.data.dataset import PreparedDataset, TokenWriter, manifest_digest, write_manifest
from taxa.data.splits import SPLITS, stratified_subset
from taxa.data.tokens import NTTokenizer, get_tokenizer
from taxa.errors import InputError
from taxa.runtime.files import new_folder, replacing, sha256, write_json

CLASSES = (2, 3, 5)


def write_dataset(folder, sizes=(23, 6, 4), **settings):
    """A small prepared folder of random letters. Returns {split: (sequences, labels (N, R))}."""
    rng = np.random.RandomState(0)
    contents = {}
    for split, size in zip(SPLITS, sizes):
        (folder / split).mkdir(parents=True)
        lengths = rng.randint(1, 60, size)
        sequences = ["".join(rng.choice(list("ACGTN"), length, p=[.24] * 4 + [.04]))
                     for length in lengths]
        labels = np.stack([rng.randint(0, count, size) for count in CLASSES], axis=1).astype("<u2")
        np.save(folder / split / "labels.npy", labels)
        np.save(folder / split / "records.npy", np.arange(size))
        with TokenWriter(folder, split, "nt") as writer:
            for start in range(0, size, 10):
                some = sequences[start:start + 10]
                letters = "".join(some).encode()
                writer.append(*NTTokenizer().encode(letters, [len(sequence) for sequence in some]))
        contents[split] = (sequences, labels)

    classes = {rank: [{"taxid": 10 * i + 1, "name": f"{rank} {i}"} for i in range(count)]
               for rank, count in zip(RANKS, CLASSES)}
    manifest = {
        "sequences": sum(sizes),
        "splits": dict(zip(SPLITS, sizes)),
        "settings": {"length": None, **settings},
        "classes": classes,
    }
    write_manifest(folder, manifest, NTTokenizer())
    return contents


@pytest.fixture
def dataset(tmp_path):
    """(the folder, what was written into it)."""
    return tmp_path / "data", write_dataset(tmp_path / "data")


def encode_one(sequence, tokenizer=None):
    return (tokenizer or NTTokenizer()).encode(sequence.encode(), [len(sequence)])[0].tolist()


def tree(folder):
    """{relative path: bytes of a file, None of a folder} of everything in a folder, hidden files
    too.
    """
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in Path(folder).rglob("*")}


class Constant:
    """A tokenizer that gives `count` ids for every sequence and fails at call number `fails`."""

    name = "constant"
    digest = "0" * 64
    vocab_size = 100
    pad_token_id = 9

    def __init__(self, count, fails=None):
        self.count = count
        self.fails = fails
        self.calls = 0

    def encode(self, letters, lengths):
        self.calls += 1
        if self.calls == self.fails:
            raise RuntimeError("the disk is full, say")
        ids = np.full(len(lengths) * self.count, self.count, np.uint16)
        return ids, np.full(len(lengths), self.count, np.int64)


def silent(items, description):
    return items


# ------------------------------------------------------------------ what is in it


def test_tokens_and_labels_come_out_as_they_went_in(dataset):
    folder, contents = dataset
    data = PreparedDataset(folder)
    assert data.num_classes == dict(zip(RANKS, CLASSES))
    for name, (sequences, labels) in contents.items():
        split = data.split(name, "nt")
        assert len(split) == len(sequences)
        expected = [encode_one(sequence) for sequence in sequences]
        assert [split.tokens(i).tolist() for i in range(len(split))] == expected
        assert split.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("rows", [[0], [3, 1, 2], [5, 5, 0], list(range(23))])
@pytest.mark.parametrize("kind", [list, np.array])
def test_a_batch_is_padded_right_and_masked(dataset, rows, kind):
    folder, contents = dataset
    sequences, labels = contents["train"]
    batch = PreparedDataset(folder).split("train", "nt")[kind(rows)]
    ids = [encode_one(sequences[i]) for i in rows]
    T = max(map(len, ids))
    assert batch["input_ids"].tolist() == [row + [1] * (T - len(row)) for row in ids]
    masks = [[1] * len(row) + [0] * (T - len(row)) for row in ids]
    assert batch["attention_mask"].tolist() == masks
    assert batch["labels"].tolist() == labels[rows].tolist()
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert len(batch) == 3


def test_a_batch_of_another_tokenizer_has_its_padding(dataset):
    folder, contents = dataset
    tiny = get_tokenizer("tiny-dnabert")
    PreparedDataset(folder).add_tokens(tiny, silent)
    batch = PreparedDataset(folder).split("validation", "tiny-dnabert")[[0, 1, 2, 3, 4, 5]]
    ids = [encode_one(sequence, tiny) for sequence in contents["validation"][0]]
    T = max(map(len, ids))
    assert batch["input_ids"].tolist() == [row + [3] * (T - len(row)) for row in ids]
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in ids]


def test_a_split_without_sequences(tmp_path):
    write_dataset(tmp_path / "data", sizes=(3, 0, 1))
    data = PreparedDataset(tmp_path / "data")
    data.add_tokens(get_tokenizer("tiny-dnabert"), silent)
    assert [len(data.split(split, "nt")) for split in SPLITS] == [3, 0, 1]
    assert len(data.split("validation", "tiny-dnabert")) == 0
    assert data.split("test", "tiny-dnabert")[[0]]["input_ids"].shape[0] == 1


def test_a_split_is_pickled_without_its_arrays(dataset):
    split = PreparedDataset(dataset[0]).split("train", "nt")
    before = split[[0, 1, 2]]
    copy = pickle.loads(pickle.dumps(split))
    assert copy._ids is None and copy._offsets is None
    assert split._ids is not None  # pickling leaves the original as it is
    assert all(torch.equal(before[key], copy[[0, 1, 2]][key]) for key in before)


@pytest.mark.parametrize("opened", [False, True])
def test_worker_processes_give_the_same_batches(dataset, opened):
    split = PreparedDataset(dataset[0]).split("train", "nt")
    batches = [[4, 2, 0], [1], [22, 21, 20, 19, 3]]
    if opened:
        split.tokens(0)
    loader = torch.utils.data.DataLoader(split, sampler=batches, batch_size=None, num_workers=1)
    loaded = list(loader)
    assert len(loaded) == 3
    for rows, got in zip(batches, loaded):
        assert all(torch.equal(got[key], value) for key, value in split[rows].items())


# ------------------------------------------------------------------ tokens of another family


def test_added_tokens_equal_encoding_the_letters(dataset):
    folder, contents = dataset
    before = tree(folder)
    digest = PreparedDataset(folder).digest
    tiny = get_tokenizer("tiny-dnabert")
    PreparedDataset(folder).add_tokens(tiny, silent)
    data = PreparedDataset(folder)
    assert data.digest == digest
    assert data.has_tokens("nt") and data.has_tokens("tiny-dnabert")
    assert not data.has_tokens("dnabert")
    assert data.manifest["tokenizers"]["tiny-dnabert"] == {
        "digest": tiny.digest, "vocab_size": 1024, "pad_token_id": 3,
    }
    for name, (sequences, _) in contents.items():
        split = data.split(name, "tiny-dnabert")
        expected = [encode_one(sequence, tiny) for sequence in sequences]
        assert [split.tokens(i).tolist() for i in range(len(split))] == expected
    after = tree(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    files = {f"{split}/tiny-dnabert.{ending}" for split in SPLITS for ending in ("bin", "npy")}
    assert changed - {"manifest.json"} == files
    PreparedDataset(folder).add_tokens(tiny, silent)
    assert tree(folder) == after


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_tokens_that_fail_leave_the_folder_as_good_as_it_was(dataset, fails):
    folder, _ = dataset
    manifest = (folder / "manifest.json").read_bytes()
    with pytest.raises(RuntimeError):
        PreparedDataset(folder).add_tokens(Constant(2, fails), silent)
    assert (folder / "manifest.json").read_bytes() == manifest
    assert not [name for name in tree(folder) if ".tmp" in name]
    assert not PreparedDataset(folder).has_tokens("constant")
    PreparedDataset(folder).add_tokens(Constant(2), silent)
    assert PreparedDataset(folder).split("test", "constant").tokens(0).tolist() == [2, 2]


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_tokens_that_fail_leave_the_old_ones_in_place(dataset, fails):
    folder, _ = dataset
    PreparedDataset(folder).add_tokens(Constant(2), silent)
    before = tree(folder)
    with pytest.raises(RuntimeError):
        PreparedDataset(folder).add_tokens(Constant(3, fails), silent)
    assert tree(folder) == before


@pytest.mark.parametrize("renames", range(8))
def test_tokens_made_again_and_stopped_before_any_rename(dataset, monkeypatch, renames):
    folder, _ = dataset
    PreparedDataset(folder).add_tokens(Constant(2), silent)
    replace = os.replace
    done = []

    def stops(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("os.replace", stops)
        PreparedDataset(folder).add_tokens(Constant(3), silent)
    data = PreparedDataset(folder)
    # The first rename is the manifest's, which takes the old ones off its list.
    assert data.has_tokens("constant") == (renames == 0)
    if renames == 0:
        assert data.split("test", "constant").tokens(0).tolist() == [2, 2]
    data.add_tokens(Constant(3), silent)
    assert PreparedDataset(folder).split("test", "constant").tokens(0).tolist() == [3, 3, 3]


def test_token_writer_writes_both_files_or_none(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(RuntimeError), TokenWriter(tmp_path, "train", "nt") as writer:
        writer.append(np.arange(5, dtype=np.uint16), np.array([2, 3]))
        raise RuntimeError
    assert list((tmp_path / "train").iterdir()) == []
    with TokenWriter(tmp_path, "train", "nt") as writer:
        writer.append(np.arange(5, dtype=np.uint16), np.array([2, 3]))
        writer.append(np.arange(0, dtype=np.uint16), np.array([], dtype=np.int64))
        writer.append(np.array([65535, 258], dtype=np.uint16), np.array([0, 2]))
    written = (tmp_path / "train" / "nt.bin").read_bytes()
    assert written == bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 255, 255, 2, 1])
    offsets = np.load(tmp_path / "train" / "nt.npy")
    assert offsets.tolist() == [0, 2, 5, 5, 7] and offsets.dtype == np.dtype("<i8")


def test_digest_covers_sequences_labels_splits_and_classes_only(tmp_path):
    write_dataset(tmp_path / "a")
    first = PreparedDataset(tmp_path / "a").digest
    write_dataset(tmp_path / "b", seed=5, length=1500)
    assert PreparedDataset(tmp_path / "b").digest == first
    written = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest = {key: written[key] for key in ("splits", "classes")}
    for name in ("train/labels.npy", "test/records.npy", "validation/nt.bin"):
        write_dataset(tmp_path / name)
        path = tmp_path / name / name
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")
        assert write_manifest(tmp_path / name, manifest, NTTokenizer())["digest"] != first
    manifest["classes"]["genus"][0]["name"] += "?"
    assert write_manifest(tmp_path / "b", manifest, NTTokenizer())["digest"] != first
    for name, entry in written["files"].items():
        path = tmp_path / "a" / name
        assert entry == {"bytes": path.stat().st_size, "sha256": sha256(path)}


# ------------------------------------------------------------------ folders that are not one


def manifest_of(folder):
    return folder / "manifest.json"


def rewritten(change, sealed=False):
    """Damage to a folder that changes its manifest; sealed: and the manifest's digest of itself."""
    def damage(folder):
        manifest = json.loads(manifest_of(folder).read_text())
        change(manifest)
        if sealed:
            manifest["sha256"] = manifest_digest(manifest)
        manifest_of(folder).write_text(json.dumps(manifest))

    return damage


def edited(change):
    """Damage that the manifest's digest of itself does not give away."""
    return rewritten(change, sealed=True)


def a_folder_for_a_manifest(folder):
    manifest_of(folder).unlink()
    manifest_of(folder).mkdir()


def cut(path, count=1):
    path.write_bytes(path.read_bytes()[:-count])


BROKEN = {  # case: (what happens to the folder, words of the message)
    # the manifest
    "no manifest": (lambda f: manifest_of(f).unlink(),
                    "no manifest.json: not a prepared dataset"),
    "an empty manifest": (lambda f: manifest_of(f).write_text(""), "not the manifest"),
    "broken JSON": (lambda f: cut(manifest_of(f), 30), "not the manifest"),
    "binary": (lambda f: manifest_of(f).write_bytes(b"\xff\xfe{}"), "not the manifest"),
    "a list": (lambda f: manifest_of(f).write_text("[]"), "not the manifest"),
    "another JSON": (lambda f: manifest_of(f).write_text('{"name": "x"}'), "not the manifest"),
    "a folder of that name": (a_folder_for_a_manifest, "not the manifest"),
    # what is in it
    "another format": (edited(lambda m: m.update(format="x")), "format x 2, not taxa dataset 2"),
    "a version before": (
        edited(lambda m: m.update(version=1)),
        "data: written by a version of taxa before 1.0.0: prepare the folder again"),
    "a later version": (edited(lambda m: m.update(version=3)), "dataset 3, not taxa dataset 2"),
    "no digest of its own": (rewritten(lambda m: m.pop("sha256")), "KeyError: 'sha256'"),
    "another digest of its own": (rewritten(lambda m: m.update(sha256="0")), "damaged"),
    "no splits": (edited(lambda m: m.pop("splits")), "KeyError: 'splits'"),
    "two splits": (edited(lambda m: m["splits"].pop("test")), "its splits are train, validation"),
    "no classes": (edited(lambda m: m.pop("classes")), "KeyError: 'classes'"),
    "no digest": (edited(lambda m: m.pop("digest")), "KeyError: 'digest'"),
    "files of no kind": (edited(lambda m: m.update(files=[1])), "not the manifest"),
    # the files beside it
    "tokens cut short": (lambda f: cut(f / "train" / "nt.bin"),
                         "train/nt.bin: [0-9]+ bytes, but the manifest says"),
    "tokens empty": (lambda f: (f / "test" / "nt.bin").write_bytes(b""),
                     "test/nt.bin: 0 bytes, but the manifest says"),
    "tokens too long": (lambda f: (f / "test" / "nt.bin").write_bytes(bytes(99999)),
                        "test/nt.bin: 99999 bytes"),
    "offsets cut short": (lambda f: cut(f / "validation" / "nt.npy", 8),
                          "validation/nt.npy: [0-9]+ bytes"),
    "labels cut short": (lambda f: cut(f / "train" / "labels.npy"),
                         "train/labels.npy: [0-9]+ bytes"),
    "no labels": (lambda f: (f / "test" / "labels.npy").unlink(), "test/labels.npy: missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_line(dataset, case):
    folder, _ = dataset
    damage, words = BROKEN[case]
    damage(folder)
    with pytest.raises(InputError, match=words) as caught:
        PreparedDataset(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_missing_and_empty_folders_and_files_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, words in (
        ("missing", "no such folder; make it with prepare.py"),
        ("empty", "no manifest.json"),
        ("file", "no such folder"),
    ):
        with pytest.raises(InputError, match=f"{name}: {words}"):
            PreparedDataset(tmp_path / name)
    assert sorted(tree(tmp_path)) == ["empty", "file"]


def test_tokens_that_are_not_there_name_the_command(dataset):
    message = "no tokens of 'dnabert': python prepare.py --add-tokens dnabert --out .*data"
    with pytest.raises(InputError, match=message):
        PreparedDataset(dataset[0]).split("train", "dnabert")


@pytest.mark.parametrize("column", range(3))
def test_labels_beyond_the_classes_are_refused(dataset, column):
    folder, contents = dataset
    labels = contents["test"][1].copy()
    labels[2, column] = CLASSES[column] - 1
    np.save(folder / "test" / "labels.npy", labels)
    assert len(PreparedDataset(folder).split("test", "nt")) == 4
    labels[2, column] += 1
    np.save(folder / "test" / "labels.npy", labels)
    data = PreparedDataset(folder)
    message = "test/labels.npy: labels up to .* but the manifest has .* classes"
    with pytest.raises(InputError, match=message):
        data.split("test", "nt")
    assert len(data.split("train", "nt")) == 23


# ------------------------------------------------------------------ files that are whole or absent


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
@pytest.mark.parametrize("old", [None, "old"])
def test_replacing_keeps_the_old_file_or_none_after_an_error(tmp_path, error, old):
    if old:
        (tmp_path / "x").write_text(old)
    before = tree(tmp_path)
    with pytest.raises(error), replacing(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise error
    assert tree(tmp_path) == before
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
        assert tree(tmp_path).get("x") == before.get("x")
    assert tree(tmp_path) == {"x": b"new"}


def test_write_json_replaces_whole_files_only(tmp_path):
    content = {"name": "Ångström", "rows": [1]}
    write_json(tmp_path / "x.json", content)
    before = tree(tmp_path)
    assert json.loads(before["x.json"]) == content
    assert "Å".encode() in before["x.json"]
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert tree(tmp_path) == before


def write_new(path, overwrite=False, error=None):
    with new_folder(path, overwrite) as out:
        (out / "inner").mkdir()
        (out / "inner" / "new").write_text("new")
        if error:
            raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_new_folder_leaves_nothing_after_an_error(tmp_path, error):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("a")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for name, overwrite in (("fresh", False), ("empty", False), ("fresh", True), ("old", True)):
        with pytest.raises(error):
            write_new(tmp_path / name, overwrite, error)
        assert tree(tmp_path) == before


def test_new_folder_appears_whole(tmp_path):
    whole = {"inner": None, "inner/new": b"new"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("a")
    for name, overwrite in (
        ("deep/er/fresh", False), ("empty", False), ("old", True), ("fresh", True),
    ):
        with new_folder(tmp_path / name, overwrite) as out:
            assert out.parent == (tmp_path / name).parent and out != tmp_path / name
            (out / "inner").mkdir()
            (out / "inner" / "new").write_text("new")
        assert tree(tmp_path / name) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "fresh", "old"]
    os.mkdir(tmp_path / "plain")
    assert (tmp_path / "fresh").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("old", ["old", "old/a"])
def test_new_folder_does_not_touch_what_exists(tmp_path, old):
    (tmp_path / old).parent.mkdir(exist_ok=True)
    (tmp_path / old).write_text("a file, or a file in a folder")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="old exists: give another --out, or --overwrite"):
        write_new(tmp_path / "old")
    assert tree(tmp_path) == before


def test_new_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("a")
    with pytest.raises(InputError, match="cannot write beside"):
        write_new(tmp_path / "file" / "new")
    assert tree(tmp_path) == {"file": b"a"}


def link(folder):
    (folder / "place").symlink_to(folder / "target", target_is_directory=True)
    (folder / "target").mkdir()


def link_to_a_full_folder(folder):
    link(folder)
    (folder / "target" / "old").write_text("old")


# how the place is made, what of it is there before, its name as given from within tmp_path/here
ODD_PLACES = {
    "an empty working folder": (lambda f: None, None, "."),
    "a working folder to overwrite": (
        lambda f: (f / "here" / "old").write_text("old"), "here/old", "."),
    "a folder by way of its child": (
        lambda f: (f / "here" / "child").mkdir(), None, "../here/child/.."),
    "a link to an empty folder": (link, None, "../place"),
    "a link to a folder to overwrite": (link_to_a_full_folder, "target/old", "../place"),
    "a file to overwrite": (lambda f: (f / "place").write_text("old"), "place", "../place"),
}


@pytest.mark.parametrize("case", ODD_PLACES)
def test_new_folder_in_odd_places_works_or_refuses_and_loses_nothing(tmp_path, monkeypatch, case):
    make, old, name = ODD_PLACES[case]
    (tmp_path / "here").mkdir()
    make(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    place = Path(os.path.abspath(name))
    try:
        write_new(name, overwrite=True)
    except InputError:
        assert old is None or (tmp_path / old).read_text() == "old"
    else:
        assert (place / "inner" / "new").read_text() == "new"
    assert not [path for path in tree(tmp_path) if ".tmp" in path]


# ------------------------------------------------------------------ the order of an epoch


def plans(N, batch_size, accumulate, size, seed=3, epoch=1):
    return [micro_batches(N, seed, epoch, batch_size, accumulate, rank=rank, size=size)
            for rank in range(size)]


def steps_of(of_ranks):
    """The sequences of each optimizer step over all processes, in the order of the shuffle, padding
    left out.
    """
    steps = []
    for step in zip(*of_ranks):
        rows = []
        for micro, _ in step:
            rows.append([i for some, weight in micro for i in some.tolist() if weight])
        longest = max(map(len, rows))
        steps.append([row[i] for i in range(longest) for row in rows if i < len(row)])
    return steps


@pytest.mark.parametrize("N", [1, 2, 7, 16, 33, 100])
@pytest.mark.parametrize("batch_size, accumulate", list(itertools.product((1, 4), (1, 2, 3))))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_sequence_once_an_epoch_over_all_processes(N, batch_size, accumulate, size):
    of_ranks = plans(N, batch_size, accumulate, size)
    per_step = batch_size * accumulate * size
    assert {len(plan) for plan in of_ranks} == {-(-N // per_step)}
    steps = steps_of(of_ranks)
    assert sorted(sum(steps, [])) == list(range(N))
    lengths = [min(per_step, N - start) for start in range(0, N, per_step)]
    assert [len(step) for step in steps] == lengths
    for plan in of_ranks:
        for (micro, count), step in zip(plan, steps):
            assert count == len(step)
            assert 1 <= len(micro) <= accumulate
            for rows, weight in micro:
                assert 1 <= len(rows) <= batch_size
                assert weight in (0.0, 1.0)


def test_same_steps_however_they_are_shared_out():
    for N in (5, 64, 77):
        expected = steps_of(plans(N, 2, 8, 1))
        for batch_size, accumulate, size in (
            (2, 4, 2), (2, 2, 4), (2, 1, 8), (4, 1, 4), (1, 8, 2), (16, 1, 1),
        ):
            assert steps_of(plans(N, batch_size, accumulate, size)) == expected


def test_a_process_without_a_sequence_takes_part_with_weight_zero():
    N, batch_size, size = 9, 2, 4  # a step of 8 and a step of 1
    of_ranks = plans(N, batch_size, 1, size)
    only = steps_of(of_ranks)[1]
    for rank, plan in enumerate(of_ranks):
        micro, count = plan[1]
        assert count == 1
        assert [(rows.tolist(), weight) for rows, weight in micro] == [(only, float(rank == 0))]
        assert [weight for _, weight in plan[0][0]] == [1.0]


def test_order_depends_on_seed_and_epoch_alone():
    def flat(**changes):
        return sum(steps_of(plans(50, 4, 1, 2, **changes)), [])

    assert flat() == flat()
    orders = {tuple(flat(seed=seed, epoch=epoch)) for seed in (3, 4, 2 ** 31) for epoch in (1, 2)}
    assert len(orders) == 6
    assert flat(seed=7, epoch=0) == np.random.RandomState([7, 0]).permutation(50).tolist()
    assert micro_batches(0, 0, 0, 4, 1, rank=0, size=1) == []


def test_a_part_of_the_training_split_is_its_sequences(dataset):
    """Tokens, batches and records of the part are those of the whole at the same sequences, and the
    other splits are whole.
    """
    folder, contents = dataset
    data = PreparedDataset(folder)
    whole = PreparedDataset(folder).split("train", "nt")
    data.keep_part(0.5, seed=3)
    part = data.split("train", "nt")
    rows = stratified_subset(whole.labels[:, -1], 0.5, 3)
    assert 0 < len(part) == len(rows) < len(whole)
    assert np.array_equal(part.labels, whole.labels[rows])
    assert all(np.array_equal(part.tokens(i), whole.tokens(row)) for i, row in enumerate(rows))
    for name, tensor in part[[2, 0, 1]].items():
        assert torch.equal(tensor, whole[rows[[2, 0, 1]]][name])
    records = np.load(folder / "train" / "records.npy")
    assert np.array_equal(part.records([1, 4]), records[rows[[1, 4]]])
    for name in ("validation", "test"):
        assert len(data.split(name, "nt")) == len(contents[name][0])


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_on_cuda_a_thread_loads_ahead_the_same_batches(short):
    split = PreparedDataset(short).split("train", "nt")
    batches = [[0, 5, 3], [7], [1, 2]]
    loaded = load_batches(split, batches, 0, torch.device("cuda"))
    for ahead, rows in zip(loaded, batches, strict=True):
        plain = split[rows]
        assert ahead.keys() == plain.keys()
        assert all(torch.equal(ahead[name], plain[name]) for name in plain)
