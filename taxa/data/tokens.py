"""DNA bases -> token ids. One tokenizer per family of models; both take bases ACGTN and give uint16 ids.

nt: Nucleotide Transformer's 6-mers, in numpy. dnabert, tiny-dnabert: byte-pair encoding, by the `tokenizers` library.
"""

import functools
import hashlib
import itertools
import json

import numpy as np

from taxa import ASSETS
from taxa.errors import InputError, choose
from taxa.runtime.files import read_text
from taxa.runtime.hub import cache_only

TOKENIZERS = ("nt", "dnabert", "tiny-dnabert", "bpe")  # bpe: any tokenizer.json; its tokens go by the vocabulary's digest
TINY_BPE = ASSETS / "tiny_dnabert_tokenizer.json"
DNABERT_HUB = ("zhihan1996/DNABERT-2-117M", "7bce263b15377fc15361f52cfab88f8b586abda0")  # DNABERT-S has the same vocabulary and merges
DNABERT_DIGEST = "4216c74a6b68b79740eb6d4948395c1cdaaa09c9ea859c943ff62b36d14c3b81"  # of that vocabulary and its merges
# Keys of a tokenizer.json that versions of the tokenizers library added to its model, in order, with the values that change nothing.
ADDED_KEYS = (("byte_fallback", False), ("ignore_merges", False))


def nt_vocabulary():
    """The 4,107 entries of the hub's vocab.txt, in order: specials, all 6-mers over A T C G (last base fastest), single bases."""
    kmers = ("".join(bases) for bases in itertools.product("ATCG", repeat=6))
    return ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>", *kmers, *"ATCGN"]


class NTTokenizer:
    """<cls>, then left to right the 6-mer where the next six bases are all A/C/G/T, else the single base; no <eos>.

    1500 bases without N: 250 6-mers, 251 tokens.
    """

    name = "nt"
    pad_token_id = 1
    cls_token_id = 3
    first_kmer, first_letter = 6, 6 + 4**6

    def __init__(self):
        self.vocabulary = nt_vocabulary()
        self.vocab_size = len(self.vocabulary)
        self.digest = hashlib.sha256("\n".join(self.vocabulary).encode()).hexdigest()  # of the hub's vocab.txt
        self.old_digests = ()
        self._code = np.zeros(256, dtype=np.uint8)
        for code, base in enumerate("ATCGN"):
            self._code[ord(base)] = code
        self._spelling = np.zeros((self.vocab_size, 6), dtype=np.uint8)  # bases, then zeros; special tokens spell nothing
        for i, entry in enumerate(self.vocabulary[self.first_kmer:], start=self.first_kmer):
            self._spelling[i, :len(entry)] = np.frombuffer(entry.encode(), dtype=np.uint8)
        self._spelled = (self._spelling > 0).sum(axis=1)  # bases per token

    def encode(self, bases, lengths):
        """bases: bytes in ACGTN, sequences of `lengths` joined. Returns (ids joined, uint16; ids per sequence, int64)."""
        codes, lengths = self._code[np.frombuffer(bases, dtype=np.uint8)], np.asarray(lengths, dtype=np.int64)
        n, L = len(lengths), int(lengths[0]) if len(lengths) else 0
        if L == 0 or (lengths != L).any():
            return self._encode_any(codes, lengths)
        codes = codes.reshape(n, L)  # one length: quick where a sequence has no N
        has_n = codes.max(axis=1) == 4
        clean, (ids_n, counts_n) = self._encode_clean(codes[~has_n]), self._encode_any(codes[has_n].reshape(-1), lengths[has_n])
        counts = np.full(n, clean.shape[1], dtype=np.int64)
        counts[has_n] = counts_n
        ids, of_n = np.empty(counts.sum(), dtype=np.uint16), np.repeat(has_n, counts)
        ids[~of_n], ids[of_n] = clean.reshape(-1), ids_n
        return ids, counts

    def _encode_clean(self, codes):
        """codes (n, L), no N -> ids (n, 1 + L // 6 + L % 6): 6-mers while six bases are left, then single bases."""
        n, L = codes.shape
        ids = np.full((n, 1 + L // 6 + L % 6), self.cls_token_id, dtype=np.uint16)
        kmers, whole = ids[:, 1:1 + L // 6], L - L % 6
        kmers[:] = codes[:, 0:whole:6]
        for base in range(1, 6):
            kmers *= 4
            kmers += codes[:, base:whole:6]
        kmers += self.first_kmer
        ids[:, 1 + L // 6:] = codes[:, whole:] + np.uint16(self.first_letter)
        return ids

    def _encode_any(self, codes, lengths):
        """As encode: codes (bases,) of sequences of any `lengths` with Ns anywhere. An N touches only the 6-mers that it is in."""
        codes = codes.astype(np.uint16)
        twos = codes[:-1] * 4 + codes[1:]
        fours = twos[:-2] * 16 + twos[2:]
        sixes = fours[:-2] * 16 + twos[4:]  # the 6-mer from each base on, wrong where there is an N
        ends, n_at = np.cumsum(lengths), np.flatnonzero(codes == 4)
        # stretches without an N: their starts and ends, both in order
        start = np.sort(np.concatenate((ends - lengths, n_at + 1)))
        length = np.sort(np.concatenate((ends, n_at))) - start
        kmer_at = np.repeat(start, length // 6) + 6 * _count_up(length // 6)
        letter_at = np.repeat(start + length // 6 * 6, length % 6) + _count_up(length % 6)
        value, is_token = codes + np.uint16(self.first_letter), np.zeros(len(codes), dtype=bool)
        value[kmer_at] = sixes[kmer_at] + np.uint16(self.first_kmer)
        is_token[kmer_at] = is_token[letter_at] = is_token[n_at] = True
        at = np.flatnonzero(is_token)
        counts = 1 + np.searchsorted(at, ends) - np.searchsorted(at, ends - lengths)
        ids = np.full(len(at) + len(lengths), self.cls_token_id, dtype=np.uint16)
        not_cls = np.ones(len(ids), dtype=bool)
        not_cls[np.cumsum(counts) - counts] = False
        ids[not_cls] = value[at]
        return ids, counts

    def decode(self, ids):
        """ids (n,) -> the bases they spell, bytes. Exact: 6-mers and bases spell the sequence, special tokens spell nothing."""
        return self._spelling[ids].tobytes().translate(None, b"\0")

    def bases(self, ids):
        """ids (n,) -> how many bases each spells, (n,) int64."""
        return self._spelled[ids]


nt_tokenizer = functools.cache(NTTokenizer)  # one in each process


def _count_up(counts):
    """0, 1, .. counts[0] - 1, 0, 1, .. counts[1] - 1, and so on."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


class BPETokenizer:
    """A hub tokenizer.json: [CLS], the merges, [SEP]; built-in padding and truncation switched off (DNABERT-S pads all to 2000).

    N, like any base outside ACGT, is [UNK], as the hub's files have it.
    """

    def __init__(self, name, path):
        """Raises InputError for a file that is missing, not a tokenizer, or lacks [PAD], [CLS] or [SEP]."""
        from tokenizers import Tokenizer

        try:
            text = read_text(path)
            model = json.loads(text)["model"]
        except FileNotFoundError:
            raise InputError(f"{path}: no such tokenizer file") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a tokenizer.json ({error})") from None
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception, and nothing else, for a file that it cannot use
            raise InputError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.name = name
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.pad_token_id = self._tokenizer.token_to_id("[PAD]")
        if None in (self.pad_token_id, self._tokenizer.token_to_id("[CLS]"), self._tokenizer.token_to_id("[SEP]")):
            raise InputError(f"{path}: the vocabulary lacks [PAD], [CLS] or [SEP]")
        cls, sep = self._tokenizer.token_to_id("[CLS]"), self._tokenizer.token_to_id("[SEP]")
        try:
            ids = self._tokenizer.encode("ACGTN").ids
        except Exception as error:
            raise InputError(f"{path}: the tokenizer cannot encode N ({error})") from None
        if len(ids) < 3 or ids[0] != cls or ids[-1] != sep:
            raise InputError(f"{path}: sequences do not come between [CLS] and [SEP]")
        if max(self._tokenizer.get_vocab().values()) >= 2**16:
            raise InputError(f"{path}: token ids do not fit in 16 bits")
        read = json.loads(self._tokenizer.to_str())["model"]  # as the library spells what it read
        if isinstance(read["vocab"], dict):
            read["vocab"] = self._tokenizer.get_vocab()  # special tokens too, wherever the file has them
        read |= {key: read.get(key) or None for key in ("continuing_subword_prefix", "end_of_word_suffix") if key in model}
        self.digest, *spellings = _digests(read)
        self.old_digests = tuple(sorted({*spellings, *_digests(model), _digest(model)} - {self.digest}))

    def encode(self, bases, lengths):
        """bases: bytes in ACGTN, sequences of `lengths` joined. Returns (ids joined, uint16; ids per sequence, int64)."""
        text, ends = bases.decode("ascii"), np.cumsum(lengths)
        encodings = self._tokenizer.encode_batch_fast([text[end - length:end] for end, length in zip(ends.tolist(), lengths)])
        rows = [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]
        return np.concatenate([np.empty(0, np.uint16), *rows]), np.array([len(row) for row in rows], dtype=np.int64)


def _digest(model):
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def _digests(model):
    """SHA-256 of the "model" of a tokenizer.json in each spelling of one meaning that versions of the library write; DNABERT-2's first.

    The first is what tells tokenizers apart: the vocabulary, the merges and how they apply. At first the spelling of the file did, so that
    any of them may stand in a checkpoint or a prepared folder: merges as "A B" or ["A", "B"], with or without the keys added since.
    """
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges", ())]
    base = {key: value for key, value in model.items() if key != "merges" and (key, value) not in ADDED_KEYS}
    more = [dict(ADDED_KEYS[:n]) for n in (1, 0, 2)] if model.get("type") == "BPE" else [{}]
    spelled = [[" ".join(pair) for pair in pairs], [list(pair) for pair in pairs]]
    return [_digest({**keys, **base, "merges": merges} if pairs else {**keys, **base}) for merges in spelled for keys in more]


def digests(record):
    """Every digest by which a tokenizer is known: of what a manifest or a checkpoint says of it, {"digest", "old_digests" if any}."""
    return {record["digest"], *record.get("old_digests", ())}


def get_tokenizer(name, file=None):
    """The tokenizer of a name in TOKENIZERS. file: a tokenizer.json, for dnabert instead of the hub's, for bpe the one to use.

    Raises InputError for an unknown name, a bad file, or when the hub cannot be reached.
    """
    choose("tokenizer", name, TOKENIZERS)
    if file is not None and name not in ("dnabert", "bpe"):
        raise InputError(f"--tokenizer-file is for the tokenizers dnabert and bpe; {name} comes with this package")
    if name == "nt":
        return NTTokenizer()
    if name == "tiny-dnabert":
        return BPETokenizer(name, TINY_BPE)
    if name == "bpe":
        if file is None:
            raise InputError("the tokenizer bpe needs --tokenizer-file PATH: the tokenizer.json of a model")
        tokenizer = BPETokenizer(name, file)
        tokenizer.name = "dnabert" if tokenizer.digest == DNABERT_DIGEST else f"bpe-{tokenizer.digest[:8]}"
        return tokenizer
    return BPETokenizer(name, file or _hub_tokenizer_file())


def _hub_tokenizer_file():
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, revision = DNABERT_HUB
    try:
        return hf_hub_download(repository, "tokenizer.json", revision=revision, local_files_only=cache_only())
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        raise InputError(f"cannot fetch tokenizer.json of {repository} from the hub; with no network, copy that file here: "
                         "--tokenizer-file PATH (train.py: prepare.py --add-tokens dnabert --tokenizer-file PATH --out DATA)") from None
