"""Anything at all as input: a reader gives what was written, or one InputError; never another exception, never more memory than the file.

Every property is small here, to be quick; MORE=50 in the environment multiplies the number of examples.
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
from hypothesis import HealthCheck, given, settings
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
    return settings(max_examples=n * MORE, deadline=None, derandomize=MORE == 1, suppress_health_check=list(HealthCheck))


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@contextmanager
def refused_or_fine():
    """The block may raise InputError, in one line, and nothing else."""
    try:
        yield
    except InputError as error:
        assert str(error) and "\n" not in str(error)


def mutated(data, edits):
    """Bytes with edits [(where in [0, 1), kind, bytes), ...]: overwritten, inserted, cut out, or cut off."""
    for where, kind, new in edits:
        at = int(where * (len(data) + 1))
        data = {"overwrite": data[:at] + new + data[at + len(new):], "insert": data[:at] + new + data[at:],
                "cut out": data[:at] + data[at + len(new) + 1:], "cut off": data[:at]}[kind]
    return data


EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["overwrite", "insert", "cut out", "cut off"]),
                           st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)
LINE = st.one_of(st.from_regex(rb"\A>[1-9][0-9]{0,9}( [0-9]{1,3})?\Z"), st.from_regex(rb"\A[ACGTNacgt]{0,20}\Z"),
                 st.from_regex(rb"\A[ACGTU 0-9;*.>@+\t\r-]{0,8}\Z"), st.binary(max_size=12))


@examples(400)
@given(lines=st.lists(LINE, max_size=12), end=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_fasta(lines, end):
    """Anything at all, by pyfaidx's index and as a stream: the same bases, or the same words. Where nothing is odd, a naive parser's."""
    data = end.join(lines)
    with folder() as path:
        said, found = [], []
        try:
            index = index_bytes(path, data)
            for some in batches(index, batch=2):
                part = index.take(some)
                text, _ = normalize(read_sequences(part), part.length, lambda i: f"{path / 'x.fa'}: record {i + 1}")
                ends = np.cumsum(part.length).tolist()
                found += [(taxid, text[stop - length:stop]) for taxid, length, stop in zip(part.taxid.tolist(), part.length.tolist(), ends)]
        except InputError as error:
            said.append(str(error))
        try:
            streamed = [(record.header.split()[0], record.bases) for record in records(str(path / "x.fa"))]
        except InputError as error:
            said.append(str(error))
        assert not any("\n" in text for text in said)
        if len(said) == 2:
            assert said[0] == said[1] or "protein" in said[1] or "taxid" in said[0]
        elif said:
            assert "taxid" in said[0]
        else:
            assert found == [(int(name), text) for name, text in streamed]
            if all(line[:1] == b">" or line.isalpha() or not line for line in lines) and end != b"\r":
                assert found == [(taxid, naive_normal(letters)) for taxid, letters in naive_records(data)]


@examples(40)
@given(member=st.sampled_from(["nodes.dmp", "names.dmp", "merged.dmp", "delnodes.dmp"]), edits=EDITS,
       kind=st.sampled_from(["zip", "tar.gz"]))
def test_taxonomy_members(member, edits, kind):
    texts = dump_texts()
    texts[member] = mutated(texts[member].encode(), edits)
    with folder() as path, refused_or_fine():
        (path / "dump").write_bytes(archive_bytes(texts, kind))
        labels = label_taxids(path / "dump", [562, 9606, 8001, 9001], path)[0]
        assert set(labels) == {562, 9606, 8001, 9001} and all(isinstance(label, Label) for label in labels.values())


@examples(40)
@given(edits=EDITS, kind=st.sampled_from(["zip", "tar", "tar.gz"]))
def test_taxonomy_archives(edits, kind):
    with folder() as path, refused_or_fine():
        (path / "dump").write_bytes(mutated(archive_bytes(dump_texts(), kind), edits))
        label_taxids(path / "dump", [562, 9606], path)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", ["../outside.txt", "{tmp_path}/outside.txt", "a/../../outside.txt"])
def test_an_archive_cannot_write_outside_its_folder(name, kind, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "dump").write_bytes(archive_bytes({**dump_texts(), name.format(tmp_path=tmp_path): "written"}, kind))
    assert label_taxids(tmp_path / "in" / "dump", [562], tmp_path / "in")[0][562].taxids[-1] == 561
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
                    max_leaves=5)


def places(value, path=()):
    """The keys that lead to every value in a JSON document, lists cut short."""
    found = [path]
    if isinstance(value, dict):
        found += [place for key in value for place in places(value[key], (*path, key))]
    elif isinstance(value, list):
        found += [place for i in range(min(2, len(value))) for place in places(value[i], (*path, i))]
    return found


@examples(80)
@given(data=st.data(), value=JSON)
def test_manifest(data, value, short):
    """Any value replaced by any other, in a manifest whose own digest does not give it away."""
    manifest = json.loads((short / "manifest.json").read_text(encoding="utf-8"))
    del manifest["sha256"]
    place = data.draw(st.sampled_from(places(manifest)))
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
        with refused_or_fine():
            opened = PreparedDataset(path)
            opened.verify("nt", SPLITS, lambda items, *_, **__: items)
            opened.split("test", "nt")[[0]]


@examples(60)
@given(edits=EDITS)
def test_manifest_bytes(edits, short):
    whole = (short / "manifest.json").read_bytes()
    changed = mutated(whole, edits)
    with folder() as path:
        for name in SPLITS:
            (path / name).symlink_to(short / name)
        (path / "manifest.json").write_bytes(changed)
        with refused_or_fine():
            assert PreparedDataset(path).manifest == json.loads(whole)


CONTENT = {"state": {"heads.genus.bias": torch.arange(40.0)}, "epoch": 3, "classes": {"genus": [{"taxid": 561, "name": "Escherichia"}]}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "ckpt.pt"
    checkpoint.save(path, CONTENT)
    return path.read_bytes()


@examples(150)
@given(edits=EDITS)
def test_checkpoint_bytes(edits, written):
    """Whatever is done to the bytes of a checkpoint: unless they are the same ones, it is refused."""
    changed = mutated(written, edits)
    with folder() as path:
        (path / "ckpt.pt").write_bytes(changed)
        try:
            checkpoint.read(path / "ckpt.pt")
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert changed == written


@examples(150)
@given(edits=EDITS)
def test_checkpoint_bytes_by_someone_who_seals_them(edits, written):
    body = written[:-sealed_file.SEAL_BYTES - 2] + b"\0\0"
    with folder() as path:
        (path / "ckpt.pt").write_bytes(mutated(body, edits) + bytes(2))
        sealed_file.seal(path / "ckpt.pt")
        with refused_or_fine():
            assert checkpoint.read(path / "ckpt.pt")["format"] == checkpoint.CHECKPOINT


SEQUENCES = st.lists(st.text("ACGTN", min_size=1, max_size=40), min_size=1, max_size=5)


@examples(100)
@given(sequences=SEQUENCES)
def test_nt_tokens_spell_the_letters(sequences):
    nt = get_tokenizer("nt")
    ids, counts = nt.encode("".join(sequences).encode(), [len(text) for text in sequences])
    for part, text in zip(np.split(ids, np.cumsum(counts)[:-1]), sequences):
        assert nt.decode(part).decode() == text and part[0] == nt.cls_token_id and part.max() < nt.vocab_size


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
def test_tokenizer_files(edits):
    whole = (Path(__file__).parents[1] / "taxa" / "assets" / "tiny_dnabert_tokenizer.json").read_bytes()
    with folder() as path, refused_or_fine():
        (path / "tokenizer.json").write_bytes(mutated(whole, edits))
        get_tokenizer("dnabert", path / "tokenizer.json").encode(b"ACGTN", [5])


@examples(60)
@given(edits=EDITS, name=st.sampled_from(["config.json", "model.safetensors"]))
def test_weights_folders(edits, name, weights):
    with folder() as path, refused_or_fine():
        shutil.copytree(weights["tiny-nt"], path / "w")
        (path / "w" / name).write_bytes(mutated((path / "w" / name).read_bytes(), edits))
        checkpoint.load_base("tiny-nt", {"source": "folder", "folder": str(path / "w")})
