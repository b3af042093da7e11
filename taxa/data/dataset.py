"""A prepared dataset: a folder with one manifest and, for each split, arrays.

The arrays are memory-mapped, never read whole.

    manifest.json                what is in it, from what, what was dropped, digests
    {split}/labels.npy           (N, R) uint16, class numbers in the order of the manifest's class
                                 tables
    {split}/records.npy          (N,) source file, record number in it, taxid: where each sequence
                                 came from
    {split}/{tokenizer}.bin      uint16 ids of all sequences, joined
    {split}/{tokenizer}.npy      (N + 1,) int64, where each sequence starts in it

The nt tokens are always there and spell the bases exactly, so tokens for another tokenizer are
made from them, without the FASTA.

Shapes: N sequences of a split, B of a batch, T tokens of the longest sequence in it, R ranks.
"""

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from taxa.data.batches import gathered, labelled
from taxa.data.splits import HELD_OUT, SPLITS, UNSEEN, stratified_subset
from taxa.data.tokens import nt_tokenizer
from taxa.errors import InputError
from taxa.runtime.files import read_text, replacing, save_array, sha256, write_json

FORMAT, VERSION = "taxa dataset", 2
JOB = 4096  # sequences: the tokenizer goes to a worker with every job, so that small ones cost
RECORD = np.dtype([("source", "<u2"), ("record", "<u4"), ("taxid", "<u4")])


# ---------------------------------------------------------------- the files of a folder


class TokenWriter:
    """Appends the sequences of one split for one tokenizer.

    It is a context manager: both files are whole after it, or absent.
    """

    def __init__(self, folder, split, tokenizer):
        self.base = Path(folder) / split / tokenizer
        self._lengths = []
        self._finished = False
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._offsets_path = stack.enter_context(replacing(self.base.with_suffix(".npy")))
            path = stack.enter_context(replacing(self.base.with_suffix(".bin")))
            self._file = stack.enter_context(open(path, "wb"))
            self._stack = stack.pop_all()
        return self

    def append(self, ids, counts):
        """ids: sequences joined, uint16; counts: ids per sequence."""
        self._file.write(ids.astype("<u2", copy=False).tobytes())
        self._lengths.append(counts)

    def finish(self):
        """Put all of it on the disk, under the temporary names: after it only renames are left."""
        lengths = np.concatenate(self._lengths or [np.empty(0, np.int64)])
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        save_array(self._offsets_path, offsets.astype("<i8"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._finished = True

    def __exit__(self, kind, value, traceback):
        if kind is not None or self._finished:
            return self._stack.__exit__(kind, value, traceback)
        with self._stack:  # which cleans up when finish() fails, too
            self.finish()


def file_digests(folder, names):
    """{name: {"bytes", "sha256"}} of files in a folder."""
    paths = {name: Path(folder) / name for name in names}
    return {name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for name, path in paths.items()}


def token_files(tokenizer, splits=SPLITS):
    return [f"{split}/{tokenizer}.{ending}" for split in splits for ending in ("bin", "npy")]


def write_manifest(folder, manifest, tokenizer):
    """Complete a manifest with the digests of the files just written, and write it.

    `tokenizer` must be the nt one. Returns the whole manifest. Its "digest" covers what a sequence
    is and how it is labelled and split; it stays the same when tokens are added. HELD_OUT is not
    in it: it only names classes that no label has.
    """
    splits = manifest["splits"]
    names = [f"{split}/{name}.npy" for split in splits for name in ("labels", "records")]
    files = file_digests(folder, names + token_files(tokenizer.name, splits))
    core = {"classes": manifest["classes"],
            "files": {name: file["sha256"] for name, file in files.items()}}
    digest = hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()
    if UNSEEN in splits:
        files |= file_digests(folder, [f"{UNSEEN}/{HELD_OUT}"])
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "digest": digest,
        **manifest,
        "tokenizers": {tokenizer.name: _describe(tokenizer)},
        "files": files,
    }
    _write(folder, manifest)
    return manifest


def _write(folder, manifest):
    """Write manifest.json, its own digest included, so that a byte that changes later is seen."""
    manifest["sha256"] = manifest_digest(manifest)
    write_json(Path(folder) / "manifest.json", manifest)


def manifest_digest(manifest):
    """SHA-256 of a manifest, its own entry "sha256" left out."""
    others = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _describe(tokenizer):
    return {
        "digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _check_kinds(manifest):
    """Raise ValueError unless what is read of a manifest is of the kind expected of it."""
    files = manifest["files"].values()
    tokenizers = manifest["tokenizers"].values()
    rows = [row for table in manifest["classes"].values() for row in table]
    splits = manifest["splits"]
    length = manifest["settings"]["length"]
    texts = [
        manifest["digest"],
        *(file["sha256"] for file in files),
        *(tokenizer["digest"] for tokenizer in tokenizers),
        *(row["name"] for row in rows),
    ]
    numbers = [
        *splits.values(),
        *(file["bytes"] for file in files),
        *(row["taxid"] for row in rows if row["taxid"] is not None),
        *([] if length is None else [length]),
        *(tokenizer["vocab_size"] for tokenizer in tokenizers),
        *(tokenizer["pad_token_id"] for tokenizer in tokenizers),
    ]
    if (any(type(text) is not str for text in texts)
            or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers)):
        raise ValueError("a text or a number is something else")
    if tuple(splits) not in (SPLITS, (*SPLITS, UNSEEN)):
        raise ValueError(f"its splits are {', '.join(splits)}")
    needed = {f"{split}/{name}" for split in splits for name in ("labels.npy", "records.npy")}
    for tokenizer in manifest["tokenizers"]:
        needed |= set(token_files(tokenizer, splits))
    if UNSEEN in splits:
        needed.add(f"{UNSEEN}/{HELD_OUT}")
    if ("nt" not in manifest["tokenizers"] or not needed <= manifest["files"].keys()
            or not manifest["classes"]):
        raise ValueError("it lacks the nt tokens, the ranks, or a file")


# ---------------------------------------------------------------- an opened folder


class PreparedDataset:
    """An opened folder: .manifest, .classes {rank: [{"taxid", "name"}, ...]} and
    .split(name, tokenizer) -> TokenSplit.
    """

    def __init__(self, folder):
        """Raises InputError for a folder that is missing, empty or of another version, or whose
        files are not of the size that the manifest says.
        """
        self.folder = Path(folder)
        self._part = None
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder; make it with prepare.py --out {folder}")
        self.manifest = self._read_manifest()
        self.classes = self.manifest["classes"]
        self.digest = self.manifest["digest"]
        for name, file in self.manifest["files"].items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != file["bytes"]:
                raise InputError(
                    f"{path}: {'missing' if found is None else f'{found} bytes'}, but the manifest "
                    f"says {file['bytes']} bytes: prepare the folder again")

    def _read_manifest(self):
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(read_text(path))
            found = manifest["format"], manifest["version"]
            if found == (FORMAT, 1):
                raise InputError(f"{self.folder}: written by a version of taxa before 1.0.0: "
                                 "prepare the folder again")
            if found != (FORMAT, VERSION):
                raise ValueError(f"format {found[0]} {found[1]}, not {FORMAT} {VERSION}")
            _check_kinds(manifest)
            if manifest["sha256"] != manifest_digest(manifest):
                raise ValueError("damaged: its bytes are not those that were written")
        except FileNotFoundError:
            raise InputError(f"{self.folder}: no manifest.json: not a prepared dataset; "
                             "make it with prepare.py") from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputError(f"{path}: not the manifest of a prepared dataset "
                             f"({type(error).__name__}: {error})") from None
        return manifest

    @property
    def num_classes(self):
        """{rank: number of classes}."""
        return {rank: len(table) for rank, table in self.classes.items()}

    @property
    def splits(self):
        """The names of its splits: the three, and "unseen" where genera were held out."""
        return tuple(self.manifest["splits"])

    def held_out(self):
        """(rows of the classes that were held out, (N,) which of them each sequence of the unseen
        split is), or None where nothing was held out.

        Raises InputError for a file that does not fit them.
        """
        if UNSEEN not in self.splits:
            return None
        path = self.folder / UNSEEN / HELD_OUT
        rows = self.manifest["held_out"]
        which = _mapped(path, ndim=1)
        if len(which) != self.manifest["splits"][UNSEEN] or which.max(initial=0) >= len(rows):
            raise InputError(f"{path}: does not fit the manifest: prepare the folder again")
        return rows, which

    def verify(self, tokenizer, splits, progress):
        """Read the files of these splits once, at the speed of SHA-256.

        progress: wraps an iterable. Raises InputError for a byte that is not the one written, and
        for ids or offsets that no tokenizer of this vocabulary writes.
        """
        files = self.manifest["files"]
        entries = self.manifest["tokenizers"][tokenizer]["vocab_size"]
        endings = ("labels.npy", "records.npy", f"{tokenizer}.npy", f"{tokenizer}.bin", HELD_OUT)
        for split in progress(splits, "checking the data", unit="split"):
            of_split = {f"{split}/{ending}" for ending in endings}
            for name in sorted(of_split & files.keys()):
                if sha256(self.folder / name) != files[name]["sha256"]:
                    raise InputError(
                        f"{self.folder / name}: damaged: its bytes are not those that were "
                        "written; prepare the folder again")
            tokens = self.split(split, tokenizer)
            offsets, ids = tokens.arrays()
            if (len(offsets) != len(tokens) + 1 or offsets[0] != 0 or offsets[-1] != len(ids)
                    or (np.diff(offsets) < 0).any()):
                raise InputError(f"{self.folder}/{split}/{tokenizer}.npy: does not fit "
                                 f"{tokenizer}.bin: prepare the folder again")
            highest = int(ids.max()) if len(ids) else 0
            if highest >= entries:
                raise InputError(f"{self.folder}/{split}/{tokenizer}.bin: id {highest}, but the "
                                 f"vocabulary has {entries} entries: prepare the folder again")

    def keep_part(self, fraction, seed):
        """From now on split("train", ...) is the same seeded part of the training split,
        stratified by its last rank.
        """
        labels = _mapped(self.folder / "train" / "labels.npy", ndim=2)[:, -1]
        self._part = stratified_subset(labels, fraction, seed)

    def window(self, split):
        """{"length": bases of the longest sequence of a split, "varied": whether others have
        another length}.

        The manifest says one length for all; where it keeps any, the nt tokens are read, which
        spell the bases.
        """
        length = self.manifest["settings"]["length"]
        if length is not None:
            return {"length": length, "varied": False}
        nt = nt_tokenizer()
        longest, shortest = 0, 2**63
        tokens = TokenSplit(self.folder, split, "nt", nt.pad_token_id, self.num_classes)
        offsets, ids = tokens.arrays()
        for start in range(0, len(offsets) - 1, JOB):
            part = offsets[start:start + JOB + 1]
            lengths = np.add.reduceat(nt.bases(ids[part[0]:part[-1]]), part[:-1] - part[0])
            longest = max(longest, int(lengths.max()))
            shortest = min(shortest, int(lengths.min()))
        return {"length": longest, "varied": shortest < longest}

    def has_tokens(self, tokenizer):
        return tokenizer in self.manifest["tokenizers"]

    def split(self, name, tokenizer):
        """The TokenSplit of a split; InputError when its tokens are not there."""
        if not self.has_tokens(tokenizer):
            flags = tokenizer
            if tokenizer.startswith("bpe-"):
                flags = "bpe --tokenizer-file TOKENIZER_JSON_OF_THE_MODEL"
            raise InputError(f"{self.folder} has no tokens of '{tokenizer}': "
                             f"python prepare.py --add-tokens {flags} --out {self.folder}")
        pad_token_id = self.manifest["tokenizers"][tokenizer]["pad_token_id"]
        split = TokenSplit(self.folder, name, tokenizer, pad_token_id, self.num_classes)
        expected = self.manifest["splits"][name]
        if len(split) != expected:
            raise InputError(
                f"{self.folder / name / 'labels.npy'}: {len(split)} sequences, but the manifest "
                f"says {expected}: prepare the folder again")
        return split if name != "train" or self._part is None else SubsetSplit(split, self._part)

    def add_tokens(self, tokenizer, progress, in_order=map):
        """Write the tokens of another tokenizer, made from the bases that the nt tokens spell.

        progress: wraps an iterable. in_order: what maps a function over parts
        (taxa.runtime.workers). Killed at any moment, the folder has its old tokens of that name,
        or none, or the new ones: never a mixture.
        """
        names = token_files(tokenizer.name, self.splits)
        encode = functools.partial(_encode_spelled, tokenizer)
        writers = []
        with contextlib.ExitStack() as stack:
            for split in self.splits:
                path = self.folder / split / "nt.bin"
                offsets = np.load(path.with_suffix(".npy"), mmap_mode="r")
                writer = stack.enter_context(TokenWriter(self.folder, split, tokenizer.name))
                starts = progress(range(0, len(offsets) - 1, JOB),
                                  f"{tokenizer.name} tokens, {split}")
                jobs = ((path, offsets[start:start + JOB + 1]) for start in starts)
                for ids, counts in in_order(encode, jobs):
                    writer.append(ids, counts)
                writers.append(writer)
            for writer in writers:
                writer.finish()
            # The old files go one by one now, so the manifest names none of them.
            if self.manifest["tokenizers"].pop(tokenizer.name, None):
                for name in names:
                    del self.manifest["files"][name]
                _write(self.folder, self.manifest)
        self.manifest["tokenizers"][tokenizer.name] = _describe(tokenizer)
        self.manifest["files"].update(file_digests(self.folder, names))
        _write(self.folder, self.manifest)


def _encode_spelled(tokenizer, job):
    """Encode the sequences that nt tokens spell.

    A job is their file, and where they start in it and the last one ends, (n + 1,).
    """
    path, offsets = job
    first, last = int(offsets[0]), int(offsets[-1])
    ids = np.fromfile(path, dtype="<u2", count=last - first, offset=2 * first)
    nt = nt_tokenizer()
    lengths = np.add.reduceat(nt.bases(ids), offsets[:-1] - offsets[0])
    return tokenizer.encode(nt.decode(ids), lengths)


# ---------------------------------------------------------------- one split


class TokenSplit:
    """One split for one tokenizer. Indexed by a list of sequence numbers, it gives their batch.

    The arrays are opened on first use, so each worker process maps the files itself; the pages
    are shared.
    """

    def __init__(self, folder, split, tokenizer, pad_token_id, num_classes):
        self.folder = Path(folder) / split
        self.name = split
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        path = self.folder / "labels.npy"
        self.labels = _mapped(path, ndim=2)
        self._offsets = self._ids = None
        if self.labels.shape[1] != len(num_classes):
            raise InputError(
                f"{path}: {self.labels.shape[1]} labels per sequence, but the manifest has "
                f"{len(num_classes)} ranks: prepare the folder again")
        known = self.labels[:, :-1] if split == UNSEEN else self.labels
        highest = known.max(axis=0, initial=0).tolist()
        if any(label >= count for label, count in zip(highest, num_classes.values())):
            raise InputError(
                f"{path}: labels up to {highest}, but the manifest has "
                f"{list(num_classes.values())} classes: prepare the folder again")

    def __len__(self):
        return len(self.labels)

    def __getstate__(self):
        return {**self.__dict__, "_offsets": None, "_ids": None}

    def _open(self):
        self._offsets = np.asarray(_mapped(self.folder / f"{self.tokenizer}.npy", ndim=1))
        path = self.folder / f"{self.tokenizer}.bin"
        if path.stat().st_size:
            # a plain array over the map: slicing a np.memmap costs more than reading a sequence
            self._ids = np.asarray(np.memmap(path, dtype="<u2", mode="r"))
        else:
            self._ids = np.empty(0, dtype="<u2")

    def arrays(self):
        """Where each sequence starts (N + 1,), and the ids of all of them joined, both mapped."""
        if self._offsets is None:
            self._open()
        return self._offsets, self._ids

    def tokens(self, i):
        """ids (T_i,) of sequence i, uint16, without copying."""
        if self._offsets is None:
            self._open()
        return self._ids[self._offsets[i]:self._offsets[i + 1]]

    def records(self, indices):
        """Where sequences came from: (B,) of source file, record number in it, taxid."""
        return np.load(self.folder / "records.npy", mmap_mode="r")[indices]

    def __getitem__(self, indices):
        """A list of B numbers -> their batch, padded right.

        {"input_ids" (B, T) int64, "attention_mask" (B, T) int64, "labels" (B, R) int64}
        """
        if self._offsets is None:
            self._open()
        indices = np.asarray(indices)
        starts = self._offsets[indices]
        lengths = self._offsets[indices + 1] - starts
        batch = gathered(self._ids, starts, lengths, self.pad_token_id)
        return labelled(batch, self.labels[indices])


class SubsetSplit:
    """Some sequences of a TokenSplit, which are asked for by their place among these.

    rows: (M,) their numbers in the split.
    """

    def __init__(self, split, rows):
        self.split = split
        self.rows = rows
        self.name = split.name
        self.labels = split.labels[rows]

    def __len__(self):
        return len(self.rows)

    def tokens(self, i):
        return self.split.tokens(self.rows[i])

    def records(self, indices):
        return self.split.records(self.rows[indices])

    def __getitem__(self, indices):
        return self.split[self.rows[indices]]


def _mapped(path, ndim):
    """An .npy file of integers, memory-mapped.

    Its header is checked against the file, so it cannot ask for more memory than that.
    """
    try:
        array = np.load(path, mmap_mode="r")
        if array.ndim != ndim or array.dtype.kind not in "iu":
            raise ValueError(f"{array.ndim} dimensions of {array.dtype}")
    except (ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path}: not an array that prepare.py wrote ({' '.join(str(error).split())}): "
            "prepare the folder again") from None
    return array
