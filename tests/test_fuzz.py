"""Anything at all as input: a reader gives what was written, or one InputError.

It never raises another exception, and never takes more memory than the file has. Every property is
small here, to be quick; MORE=50 in the environment multiplies the number of examples.

Each property has its unedited input as an example, which must be accepted. A reader that refuses
everything would pass otherwise.
"""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from inputs import archive_bytes, dump_texts, index_bytes, naive_normal, naive_records

from taxa.data.dataset import PreparedDataset, manifest_digest
from taxa.data.fasta import batches, read_sequences
from taxa.data.grammar import normalize
from taxa.data.splits import SPLITS
from taxa.data.taxonomy import Label, label_taxids
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError
from taxa.prediction.reads import records
from taxa.training import checkpoint, sealed_file

MORE = int(os.environ.get("MORE", "1"))


def examples(n):
    return settings(max_examples=n * MORE, deadline=None, derandomize=MORE == 1,
                    suppress_health_check=list(HealthCheck))


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@contextmanager
def refused_or_fine():
    """The block may raise InputError, in one line, and nothing else.

    Gives a list, which holds the words of the refusal after the block, if there was one.
    """
    refused = []
    try:
        yield refused
    except InputError as error:
        refused.append(str(error))
        assert refused[0] and "\n" not in refused[0]


def mutated(data, edits):
    """Bytes with edits [(where in [0, 1), kind, bytes), ...].

    A kind is to overwrite, to insert, to cut out, or to cut off.
    """
    for where, kind, new in edits:
        at = int(where * (len(data) + 1))
        data = {
            "overwrite": data[:at] + new + data[at + len(new):],
            "insert": data[:at] + new + data[at:],
            "cut out": data[:at] + data[at + len(new) + 1:],
            "cut off": data[:at],
        }[kind]
    return data


KINDS = ["overwrite", "insert", "cut out", "cut off"]
EDIT = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(KINDS),
                 st.binary(min_size=1, max_size=12))
EDITS = st.lists(EDIT, min_size=1, max_size=4)
LINE = st.one_of(
    st.from_regex(rb"\A>[1-9][0-9]{0,9}( [0-9]{1,3})?\Z"),
    st.from_regex(rb"\A[ACGTNacgt]{0,20}\Z"),
    st.from_regex(rb"\A[ACGTU 0-9;*.>@+\t\r-]{0,8}\Z"),
    st.binary(max_size=12),
)


@examples(400)
@given(lines=st.lists(LINE, max_size=12), end=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_fasta(lines, end):
    """Anything at all, by pyfaidx's index and as a stream: the same bases, or the same words.

    Where nothing is odd, they are a naive parser's.
    """
    data = end.join(lines)
    with folder() as path:
        said = []
        found = []
        place = lambda i: f"{path / 'x.fa'}: record {i + 1}"
        try:
            index = index_bytes(path, data)
            for some in batches(index, batch=2):
                part = index.take(some)
                text, _ = normalize(read_sequences(part), part.length, place)
                ends = np.cumsum(part.length).tolist()
                lengths = part.length.tolist()
                for taxid, length, stop in zip(part.taxid.tolist(), lengths, ends):
                    found.append((taxid, text[stop - length:stop]))
        except InputError as error:
            said.append(str(error))
        try:
            streamed = [(record.header.split()[0], record.bases)
                        for record in records(str(path / "x.fa"))]
        except InputError as error:
            said.append(str(error))
        assert not any("\n" in text for text in said)
        if len(said) == 2:
            assert said[0] == said[1] or "protein" in said[1] or "taxid" in said[0]
        elif said:
            assert "taxid" in said[0]
        else:
            assert found == [(int(name), text) for name, text in streamed]
            plain = all(line[:1] == b">" or line.isalpha() or not line for line in lines)
            if plain and end != b"\r":
                assert found == [(taxid, naive_normal(letters))
                                 for taxid, letters in naive_records(data)]


MEMBERS = ["nodes.dmp", "names.dmp", "merged.dmp", "delnodes.dmp"]


@examples(40)
@given(member=st.sampled_from(MEMBERS), edits=EDITS, kind=st.sampled_from(["zip", "tar.gz"]))
@example(member="nodes.dmp", edits=[], kind="zip")
@example(member="nodes.dmp", edits=[], kind="tar.gz")
def test_taxonomy_members(member, edits, kind):
    texts = dump_texts()
    texts[member] = mutated(texts[member].encode(), edits)
    with folder() as path, refused_or_fine() as refused:
        (path / "dump").write_bytes(archive_bytes(texts, kind))
        labels = label_taxids(path / "dump", [562, 9606, 8001, 9001], path)[0]
        assert set(labels) == {562, 9606, 8001, 9001}
        assert all(isinstance(label, Label) for label in labels.values())
    assert edits or not refused


@examples(40)
@given(edits=EDITS, kind=st.sampled_from(["zip", "tar", "tar.gz"]))
@example(edits=[], kind="zip")
@example(edits=[], kind="tar")
@example(edits=[], kind="tar.gz")
def test_taxonomy_archives(edits, kind):
    with folder() as path, refused_or_fine() as refused:
        (path / "dump").write_bytes(mutated(archive_bytes(dump_texts(), kind), edits))
        label_taxids(path / "dump", [562, 9606], path)
    assert edits or not refused


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", [
    "../outside.txt", "{tmp_path}/outside.txt", "a/../../outside.txt"])
def test_an_archive_cannot_write_outside_its_folder(name, kind, tmp_path):
    (tmp_path / "in").mkdir()
    texts = {**dump_texts(), name.format(tmp_path=tmp_path): "written"}
    (tmp_path / "in" / "dump").write_bytes(archive_bytes(texts, kind))
    labels = label_taxids(tmp_path / "in" / "dump", [562], tmp_path / "in")[0]
    assert labels[562].taxids[-1] == 561
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
JSON = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=5,
)


def places(value, path=()):
    """The keys that lead to every value in a JSON document, lists cut short."""
    found = [path]
    if isinstance(value, dict):
        found += [place for key in value for place in places(value[key], (*path, key))]
    elif isinstance(value, list):
        for i in range(min(2, len(value))):
            found += places(value[i], (*path, i))
    return found


@examples(80)
@given(where=st.floats(0, 1, exclude_max=True), value=JSON)
@example(where=None, value=None)
def test_manifest(where, value, short):
    """Any value replaced by any other, in a manifest whose own digest does not give it away.

    where: the place in [0, 1) among all places; None: nothing is replaced.
    """
    manifest = json.loads((short / "manifest.json").read_text(encoding="utf-8"))
    del manifest["sha256"]
    if where is not None:
        found = places(manifest)
        place = found[int(where * len(found))]
        if place:
            inner = manifest
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
        else:
            manifest = value
    if isinstance(manifest, dict):
        manifest["sha256"] = manifest_digest(manifest)
    with folder() as path:
        for name in SPLITS:
            (path / name).symlink_to(short / name)
        (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with refused_or_fine() as refused:
            opened = PreparedDataset(path)
            opened.verify("nt", SPLITS, lambda items, *_, **__: items)
            opened.split("test", "nt")[[0]]
        assert where is not None or not refused


@examples(60)
@given(edits=EDITS)
@example(edits=[])
def test_manifest_bytes(edits, short):
    whole = (short / "manifest.json").read_bytes()
    changed = mutated(whole, edits)
    with folder() as path:
        for name in SPLITS:
            (path / name).symlink_to(short / name)
        (path / "manifest.json").write_bytes(changed)
        with refused_or_fine() as refused:
            assert PreparedDataset(path).manifest == json.loads(whole)
        assert edits or not refused


CONTENT = {
    "state": {"heads.genus.bias": torch.arange(40.0)},
    "epoch": 3,
    "classes": {"genus": [{"taxid": 561, "name": "Escherichia"}]},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "ckpt.pt"
    checkpoint.save(path, CONTENT)
    return path.read_bytes()


@examples(150)
@given(edits=EDITS)
@example(edits=[])
def test_checkpoint_bytes(edits, written):
    """A checkpoint whose bytes are changed in any way is refused, and only then."""
    changed = mutated(written, edits)
    with folder() as path:
        (path / "ckpt.pt").write_bytes(changed)
        with refused_or_fine() as refused:
            checkpoint.read(path / "ckpt.pt")
        assert bool(refused) == (changed != written)


@examples(150)
@given(edits=EDITS)
@example(edits=[])
def test_checkpoint_bytes_by_someone_who_seals_them(edits, written):
    body = written[:-sealed_file.SEAL_BYTES - 2]  # without the comment and its length
    with folder() as path:
        (path / "ckpt.pt").write_bytes(mutated(body, edits) + bytes(2))
        sealed_file.seal(path / "ckpt.pt")
        assert edits or (path / "ckpt.pt").read_bytes() == written
        with refused_or_fine() as refused:
            assert checkpoint.read(path / "ckpt.pt")["format"] == checkpoint.CHECKPOINT
        assert edits or not refused


SEQUENCES = st.lists(st.text("ACGTN", min_size=1, max_size=40), min_size=1, max_size=5)


@examples(100)
@given(sequences=SEQUENCES)
def test_nt_tokens_spell_the_letters(sequences):
    nt = get_tokenizer("nt")
    ids, counts = nt.encode("".join(sequences).encode(), [len(text) for text in sequences])
    for part, text in zip(np.split(ids, np.cumsum(counts)[:-1]), sequences):
        assert nt.decode(part).decode() == text
        assert part[0] == nt.cls_token_id and part.max() < nt.vocab_size


@examples(60)
@given(sequences=SEQUENCES)
def test_bpe_tokens_spell_the_letters(sequences):
    bpe = get_tokenizer("tiny-dnabert")
    ids, counts = bpe.encode("".join(sequences).encode(), [len(text) for text in sequences])
    alone = [bpe.encode(text.encode(), [len(text)])[0].tolist() for text in sequences]
    assert [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] == alone
    spelling = {i: text for text, i in bpe._tokenizer.get_vocab().items()}
    for part, text in zip(alone, sequences):
        words = [spelling[i] for i in part]
        assert words[0] == "[CLS]" and words[-1] == "[SEP]"
        if "N" not in text:
            assert "".join(words[1:-1]) == text


@examples(60)
@given(edits=EDITS)
@example(edits=[])
def test_tokenizer_files(edits):
    whole = (ROOT / "taxa" / "assets" / "tiny_dnabert_tokenizer.json").read_bytes()
    with folder() as path, refused_or_fine() as refused:
        (path / "tokenizer.json").write_bytes(mutated(whole, edits))
        get_tokenizer("dnabert", path / "tokenizer.json").encode(b"ACGTN", [5])
    assert edits or not refused


@examples(60)
@given(edits=EDITS, name=st.sampled_from(["config.json", "model.safetensors"]))
@example(edits=[], name="config.json")
def test_weights_folders(edits, name, weights):
    with folder() as path, refused_or_fine() as refused:
        shutil.copytree(weights["tiny-nt"], path / "w")
        (path / "w" / name).write_bytes(mutated((path / "w" / name).read_bytes(), edits))
        checkpoint.load_base("tiny-nt", {"source": "folder", "folder": str(path / "w")})
    assert edits or not refused
