"""DNA bases -> token ids. There is one tokenizer for each family of models.

Each of them takes bases ACGTN and gives uint16 ids.

  nt                     Nucleotide Transformer's 6-mers, in numpy
  dnabert, tiny-dnabert  byte-pair encoding, by the `tokenizers` library
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

# bpe: any tokenizer.json; its tokens go by the vocabulary's digest
TOKENIZERS = ("nt", "dnabert", "tiny-dnabert", "bpe")
TINY_BPE = ASSETS / "tiny_dnabert_tokenizer.json"
# DNABERT-S has the same vocabulary and merges.
DNABERT_HUB = ("zhihan1996/DNABERT-2-117M", "7bce263b15377fc15361f52cfab88f8b586abda0")
# of that vocabulary and its merges
DNABERT_DIGEST = "4216c74a6b68b79740eb6d4948395c1cdaaa09c9ea859c943ff62b36d14c3b81"
# Keys that versions of the tokenizers library added to the model of a tokenizer.json, with the
# values that change nothing. The first one is in DNABERT-2's file.
ADDED_KEYS = (("byte_fallback", False), ("ignore_merges", False))


# ---------------------------------------------------------------- 6-mers


def nt_vocabulary():
    """The 4,107 entries of the hub's vocab.txt, in order.

    They are the specials, all 6-mers over A T C G (last base fastest), and the single bases.
    """
    kmers = ("".join(bases) for bases in itertools.product("ATCG", repeat=6))
    return ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>", *kmers, *"ATCGN"]


class NTTokenizer:
    """<cls>, then from left to right 6-mers and single bases; no <eos>.

    A 6-mer stands where the next six bases are all A/C/G/T, a single base elsewhere. 1500 bases
    without N are 250 6-mers, 251 tokens.
    """

    name = "nt"
    pad_token_id = 1
    cls_token_id = 3
    first_kmer = 6
    first_letter = first_kmer + 4**6

    def __init__(self):
        self.vocabulary = nt_vocabulary()
        self.vocab_size = len(self.vocabulary)
        # of the hub's vocab.txt
        self.digest = hashlib.sha256("\n".join(self.vocabulary).encode()).hexdigest()
        self._code = np.zeros(256, dtype=np.uint8)
        for code, base in enumerate("ATCGN"):
            self._code[ord(base)] = code
        # bases, then zeros; special tokens spell nothing
        self._spelling = np.zeros((self.vocab_size, 6), dtype=np.uint8)
        for i, entry in enumerate(self.vocabulary[self.first_kmer:], start=self.first_kmer):
            self._spelling[i, :len(entry)] = np.frombuffer(entry.encode(), dtype=np.uint8)
        self._spelled = (self._spelling > 0).sum(axis=1)  # bases per token

    def encode(self, bases, lengths):
        """bases: bytes in ACGTN, sequences of `lengths` joined.

        Returns (ids joined, uint16; ids per sequence, int64).
        """
        codes = self._code[np.frombuffer(bases, dtype=np.uint8)]
        lengths = np.asarray(lengths, dtype=np.int64)
        n = len(lengths)
        L = int(lengths[0]) if n else 0
        if L == 0 or (lengths != L).any():
            return self._encode_any(codes, lengths)
        # All have one length: quick where a sequence has no N.
        codes = codes.reshape(n, L)
        has_n = codes.max(axis=1) == 4
        clean = self._encode_clean(codes[~has_n])
        ids_n, counts_n = self._encode_any(codes[has_n].reshape(-1), lengths[has_n])
        counts = np.full(n, clean.shape[1], dtype=np.int64)
        counts[has_n] = counts_n
        ids = np.empty(counts.sum(), dtype=np.uint16)
        of_n = np.repeat(has_n, counts)
        ids[~of_n] = clean.reshape(-1)
        ids[of_n] = ids_n
        return ids, counts

    def _encode_clean(self, codes):
        """codes (n, L), no N -> ids (n, 1 + L // 6 + L % 6).

        They are 6-mers while six bases are left, then single bases.
        """
        n, L = codes.shape
        ids = np.full((n, 1 + L // 6 + L % 6), self.cls_token_id, dtype=np.uint16)
        kmers = ids[:, 1:1 + L // 6]
        whole = L - L % 6
        kmers[:] = codes[:, 0:whole:6]
        for base in range(1, 6):
            kmers *= 4
            kmers += codes[:, base:whole:6]
        kmers += self.first_kmer
        ids[:, 1 + L // 6:] = codes[:, whole:] + np.uint16(self.first_letter)
        return ids

    def _encode_any(self, codes, lengths):
        """As encode: codes (bases,) of sequences of any `lengths`, with Ns anywhere.

        An N touches only the 6-mers that it is in.
        """
        codes = codes.astype(np.uint16)
        twos = codes[:-1] * 4 + codes[1:]
        fours = twos[:-2] * 16 + twos[2:]
        sixes = fours[:-2] * 16 + twos[4:]  # the 6-mer from each base on, wrong where there is an N
        ends = np.cumsum(lengths)
        n_at = np.flatnonzero(codes == 4)
        # stretches without an N: their starts and ends, both in order
        start = np.sort(np.concatenate((ends - lengths, n_at + 1)))
        length = np.sort(np.concatenate((ends, n_at))) - start
        kmer_at = np.repeat(start, length // 6) + 6 * _count_up(length // 6)
        letter_at = np.repeat(start + length // 6 * 6, length % 6) + _count_up(length % 6)
        value = codes + np.uint16(self.first_letter)
        value[kmer_at] = sixes[kmer_at] + np.uint16(self.first_kmer)
        is_token = np.zeros(len(codes), dtype=bool)
        is_token[kmer_at] = is_token[letter_at] = is_token[n_at] = True
        at = np.flatnonzero(is_token)
        counts = 1 + np.searchsorted(at, ends) - np.searchsorted(at, ends - lengths)
        ids = np.full(len(at) + len(lengths), self.cls_token_id, dtype=np.uint16)
        not_cls = np.ones(len(ids), dtype=bool)
        not_cls[np.cumsum(counts) - counts] = False
        ids[not_cls] = value[at]
        return ids, counts

    def decode(self, ids):
        """ids (n,) -> the bases they spell, bytes.

        It is exact: 6-mers and bases spell the sequence, special tokens spell nothing.
        """
        return self._spelling[ids].tobytes().translate(None, b"\0")

    def bases(self, ids):
        """ids (n,) -> how many bases each spells, (n,) int64."""
        return self._spelled[ids]


nt_tokenizer = functools.cache(NTTokenizer)  # one in each process


def _count_up(counts):
    """0, 1, .. counts[0] - 1, 0, 1, .. counts[1] - 1, and so on."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


# ---------------------------------------------------------------- byte-pair encoding


class BPETokenizer:
    """A hub tokenizer.json: [CLS], the merges, [SEP].

    The file's own padding and truncation are switched off (DNABERT-S pads all to 2000). N, like
    any base outside ACGT, is [UNK], as the hub's files have it.
    """

    def __init__(self, name, path):
        """Raises InputError for a file that is missing or not a tokenizer, or that lacks [PAD],
        [CLS] or [SEP].
        """
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
        # The library raises bare Exception, and nothing else, for a file that it cannot use.
        except Exception as error:  # noqa: BLE001
            raise InputError(
                f"{path}: not a tokenizer.json of the tokenizers library ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.name = name
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.pad_token_id = self._tokenizer.token_to_id("[PAD]")
        cls, sep = self._tokenizer.token_to_id("[CLS]"), self._tokenizer.token_to_id("[SEP]")
        if None in (self.pad_token_id, cls, sep):
            raise InputError(f"{path}: the vocabulary lacks [PAD], [CLS] or [SEP]")
        try:
            ids = self._tokenizer.encode("ACGTN").ids
        except Exception as error:  # noqa: BLE001 (the library's, as above)
            raise InputError(f"{path}: the tokenizer cannot encode N ({error})") from None
        if len(ids) < 3 or ids[0] != cls or ids[-1] != sep:
            raise InputError(f"{path}: sequences do not come between [CLS] and [SEP]")
        if max(self._tokenizer.get_vocab().values()) >= 2**16:
            raise InputError(f"{path}: token ids do not fit in 16 bits")
        read = json.loads(self._tokenizer.to_str())["model"]  # as the library spells what it read
        if isinstance(read["vocab"], dict):
            # special tokens too, wherever the file has them
            read["vocab"] = self._tokenizer.get_vocab()
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if key in model:
                read[key] = read.get(key) or None
        self.digest = _digest(read)

    def encode(self, bases, lengths):
        """bases: bytes in ACGTN, sequences of `lengths` joined.

        Returns (ids joined, uint16; ids per sequence, int64).
        """
        text = bases.decode("ascii")
        ends = np.cumsum(lengths).tolist()
        sequences = [text[end - length:end] for end, length in zip(ends, lengths)]
        encodings = self._tokenizer.encode_batch_fast(sequences)
        rows = [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]
        ids = np.concatenate([np.empty(0, np.uint16), *rows])
        return ids, np.array([len(row) for row in rows], dtype=np.int64)


def _digest(model):
    """SHA-256 of the "model" of a tokenizer.json: the vocabulary, the merges and how they apply.

    It tells tokenizers apart. Versions of the library write one meaning in several spellings:
    merges as "A B" or as ["A", "B"], with or without the keys that were added since. The digest
    is of the spelling of DNABERT-2's file, so that it is the same for all of them.
    """
    spelled = {key: value for key, value in model.items()
               if key != "merges" and (key, value) not in ADDED_KEYS}
    if model.get("type") == "BPE":
        spelled = dict(ADDED_KEYS[:1]) | spelled
    if model.get("merges"):
        spelled["merges"] = [merge if isinstance(merge, str) else " ".join(merge)
                             for merge in model["merges"]]
    return hashlib.sha256(json.dumps(spelled, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- by name


def get_tokenizer(name, file=None):
    """The tokenizer of a name in TOKENIZERS.

    file: a tokenizer.json, for dnabert instead of the hub's, for bpe the one to use. Raises
    InputError for an unknown name, a bad file, or when the hub cannot be reached.
    """
    choose("tokenizer", name, TOKENIZERS)
    if file is not None and name not in ("dnabert", "bpe"):
        raise InputError("--tokenizer-file is for the tokenizers dnabert and bpe; "
                         f"{name} comes with this package")
    if name == "nt":
        return NTTokenizer()
    if name == "tiny-dnabert":
        return BPETokenizer(name, TINY_BPE)
    if name == "bpe":
        if file is None:
            raise InputError(
                "the tokenizer bpe needs --tokenizer-file PATH: the tokenizer.json of a model")
        tokenizer = BPETokenizer(name, file)
        is_dnabert = tokenizer.digest == DNABERT_DIGEST
        tokenizer.name = "dnabert" if is_dnabert else f"bpe-{tokenizer.digest[:8]}"
        return tokenizer
    return BPETokenizer(name, file or _hub_tokenizer_file())


def _hub_tokenizer_file():
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, revision = DNABERT_HUB
    try:
        return hf_hub_download(repository, "tokenizer.json", revision=revision,
                               local_files_only=cache_only())
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        raise InputError(
            f"cannot fetch tokenizer.json of {repository} from the hub; with no network, copy that "
            "file here: --tokenizer-file PATH "
            "(train.py: prepare.py --add-tokens dnabert --tokenizer-file PATH --out DATA)"
        ) from None
