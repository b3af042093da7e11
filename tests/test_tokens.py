"""Letters -> token ids: against loops over single letters, the hub's files, and the merges applied
one at a time.
"""

import hashlib
import itertools
import json

import numpy as np
import pytest
from helpers import SHARED
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from taxa.data import simulate
from taxa.data.grammar import normalize
from taxa.data.tokens import (
    DNABERT_DIGEST,
    TINY_BPE,
    TOKENIZERS,
    BPETokenizer,
    NTTokenizer,
    get_tokenizer,
    nt_vocabulary,
)
from taxa.errors import InputError

# of the hub's vocab.txt
VOCABULARY_SHA256 = "c00e0ad166d6ab3f7540ebc92270392e581bb3106763412f29034b49323e1052"
NT = NTTokenizer()


@pytest.fixture(scope="module")
def tiny():
    return get_tokenizer("tiny-dnabert")


def random_letters(n, seed, alphabet="ACGT", p=None):
    return "".join(np.random.RandomState(seed).choice(list(alphabet), n, p=p))


def encode_all(tokenizer, sequences):
    """One list of ids per sequence, all encoded in one call."""
    lengths = [len(sequence) for sequence in sequences]
    ids, counts = tokenizer.encode("".join(sequences).encode(), lengths)
    assert ids.dtype == np.uint16 and len(counts) == len(sequences) and counts.sum() == len(ids)
    ends = np.cumsum(counts).tolist()
    return [ids[end - count:end].tolist() for end, count in zip(ends, counts.tolist())]


def naive_nt(sequence):
    """<cls>, then the 6-mer where the next six letters are A, C, G, T, else one letter."""
    ids = [3]
    i = 0
    while i < len(sequence):
        six = sequence[i:i + 6]
        step = 6 if len(six) == 6 and set(six) <= set("ACGT") else 1
        ids.append(VOCABULARY[sequence[i:i + step]])
        i += step
    return ids


VOCABULARY = {"<unk>": 0, "<pad>": 1, "<mask>": 2, "<cls>": 3, "<eos>": 4, "<bos>": 5}
for number in range(4 ** 6):
    word = "".join("ATCG"[number // 4 ** place % 4] for place in (5, 4, 3, 2, 1, 0))
    VOCABULARY[word] = 6 + number
VOCABULARY.update({letter: 4102 + i for i, letter in enumerate("ATCGN")})


def test_vocabulary_is_the_hubs():
    assert hashlib.sha256("\n".join(nt_vocabulary()).encode()).hexdigest() == VOCABULARY_SHA256
    assert NT.digest == VOCABULARY_SHA256
    assert nt_vocabulary() == sorted(VOCABULARY, key=VOCABULARY.get)
    assert NT.vocab_size == 4107
    assert nt_vocabulary()[NT.pad_token_id] == "<pad>"
    assert nt_vocabulary()[NT.cls_token_id] == "<cls>"


def test_probe_of_the_hub():
    assert encode_all(NT, ["ATTCCGATTCCGATTCCG"]) == [[3, 369, 369, 369]]  # facts/backbones.json
    assert encode_all(NT, ["AAAAAA", "AAAAAT", "GGGGGG", "TAAAAA"]) == [
        [3, 6], [3, 7], [3, 4101], [3, 1030]]
    assert encode_all(NT, ["A", "T", "C", "G", "N"]) == [
        [3, 4102], [3, 4103], [3, 4104], [3, 4105], [3, 4106]]
    assert [len(ids) for ids in encode_all(NT, [random_letters(1500, 0)])] == [251]


@pytest.mark.parametrize("length", range(14))
@pytest.mark.parametrize("alphabet", ["ACGT", "ACGTN", "N", "ACGTNNNN"])
def test_nt_equals_the_loop_at_every_small_length(length, alphabet):
    sequences = [random_letters(length, seed, alphabet) for seed in range(20)]
    assert encode_all(NT, sequences) == [naive_nt(sequence) for sequence in sequences]
    assert encode_all(NT, sequences[:1]) == [naive_nt(sequences[0])]


def test_nt_equals_the_loop_wherever_one_n_stands():
    for length in (12, 13, 17, 18):
        clean = random_letters(length, length)
        sequences = [clean[:i] + "N" + clean[i + 1:] for i in range(length)]
        assert encode_all(NT, sequences) == [naive_nt(sequence) for sequence in sequences]


@pytest.mark.parametrize("share_of_n", [0.0, 0.001, 0.05, 0.5])
def test_nt_equals_the_loop_on_mixed_lengths(share_of_n):
    rng = np.random.RandomState(0)
    p = [(1 - share_of_n) / 4] * 4 + [share_of_n]
    lengths = [0, 0, 1500, 7, 0, *rng.randint(0, 2000, 60).tolist(), 0]
    sequences = [random_letters(length, i, "ACGTN", p) for i, length in enumerate(lengths)]
    assert encode_all(NT, sequences) == [naive_nt(sequence) for sequence in sequences]


def test_nt_of_one_length_with_and_without_n_in_the_batch():
    clean = [random_letters(100, seed) for seed in range(8)]
    mixed = [*clean, "N" * 100, *clean]
    expected = [naive_nt(sequence) for sequence in clean]
    assert encode_all(NT, mixed)[:8] == encode_all(NT, clean) == expected


def test_nt_after_normalize_of_lower_case_and_other_letters():
    sequences = [random_letters(200, seed, "ACGTNacgtnRYk-") for seed in range(10)]
    letters, changed = normalize("".join(sequences).encode(), [200] * 10, str)
    expected = ["".join(x if x in "ACGTN" else "N" for x in sequence.upper())
                for sequence in sequences]
    assert changed == sum(x.upper() not in "ACGTN" for sequence in sequences for x in sequence)
    ids, counts = NT.encode(letters, [200] * 10)
    assert ids.tolist() == list(itertools.chain.from_iterable(map(naive_nt, expected)))


def test_nothing_to_encode(tiny):
    for tokenizer in (NT, tiny):
        ids, counts = tokenizer.encode(b"", [])
        assert (ids.dtype, len(ids), len(counts)) == (np.uint16, 0, 0)
    assert encode_all(NT, ["", ""]) == [[3], [3]]
    assert encode_all(tiny, ["", ""]) == [[1, 2], [1, 2]]


def test_decode_inverts_encode():
    for length in [*range(14), 1500, 1501]:
        for alphabet in ("ACGT", "ACGTN"):
            sequence = random_letters(length, length, alphabet)
            ids, _ = NT.encode(sequence.encode(), [length])
            assert NT.decode(ids) == sequence.encode()
    assert NT.decode(np.arange(6, dtype=np.uint16)) == b""  # special tokens spell nothing
    assert NT.decode(np.array([3, 6, 4106, 1, 1], dtype=np.uint16)) == b"AAAAAAN"


def naive_bpe(sequence, model):
    """[CLS], the letters merged pair by pair in the order of the merges, [SEP].

    What has no token is [UNK] (0).
    """
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    ranks = {tuple(pair): i for i, pair in enumerate(merges)}
    rank_of = lambda pair: ranks.get(pair, len(ranks))
    parts = list(sequence)
    while True:
        best = min(itertools.pairwise(parts), key=rank_of, default=None)
        if best not in ranks:
            return [1, *(model["vocab"].get(part, 0) for part in parts), 2]
        merged = []
        i = 0
        while i < len(parts):
            joined = tuple(parts[i:i + 2]) == best
            merged.append("".join(best) if joined else parts[i])
            i += 1 + joined
        parts = merged


def hub_file():
    path = SHARED / "hub" / "dnaberts" / "tokenizer.json"
    if not path.is_file():
        pytest.skip("no ../shared/hub/dnaberts: DNABERT-S's real tokenizer.json is not here")
    return path


def dnabert_file(name):
    return TINY_BPE if name == "tiny" else hub_file()


BPE_SEQUENCES = [
    *(random_letters(n, n) for n in (1, 2, 3, 10, 100, 600)),
    "N",
    "NNNN",
    "A" * 50,
    *(random_letters(n, n, "ACGTN") for n in (1, 5, 60, 300)),
]


@pytest.mark.parametrize("name", ["tiny", "hub"])
def test_bpe_equals_merges_one_at_a_time(name):
    model = json.loads(dnabert_file(name).read_text())["model"]
    assert [model["vocab"][token] for token in ("[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2]
    tokenizer = BPETokenizer(name, dnabert_file(name))
    expected = [naive_bpe(sequence, model) for sequence in BPE_SEQUENCES]
    assert encode_all(tokenizer, BPE_SEQUENCES) == expected


@pytest.mark.parametrize("name", ["tiny", "hub"])
def test_bpe_does_not_pad_or_truncate_and_spells_the_letters(name):
    vocabulary = json.loads(dnabert_file(name).read_text())["model"]["vocab"]
    spelling = {i: token for token, i in vocabulary.items()}
    sequences = [random_letters(n, n) for n in (1500, 12, 1500, 20000)]
    encoded = encode_all(BPETokenizer(name, dnabert_file(name)), sequences)
    for sequence, ids in zip(sequences, encoded):
        assert (ids[0], ids[-1]) == (1, 2)
        assert "".join(spelling[i] for i in ids[1:-1]) == sequence
        assert len(sequence) / 10 < len(ids) < len(sequence) / 2 or len(sequence) == 12


def test_hub_tokenizer_gives_the_probes():
    path = SHARED / "facts" / "backbones.json"
    tokenizer = get_tokenizer("dnabert", hub_file())
    probes = json.loads(path.read_text())["models"]["dnaberts"]["probes"]
    assert len(probes) == 2
    expected = [probe["input_ids"] for probe in probes]
    assert encode_all(tokenizer, [probe["sequence"] for probe in probes]) == expected
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.pad_token_id) == ("dnabert", 4096, 3)


def test_shipped_tokenizer(tiny):
    assert (tiny.name, tiny.vocab_size, tiny.pad_token_id) == ("tiny-dnabert", 1024, 3)
    vocabulary = json.loads(TINY_BPE.read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(1024))
    others = {token for token in vocabulary if not set(token) <= set("ACGT")}
    assert others == {"[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"}


def test_shipped_tokenizer_is_what_training_gives_on_the_simulated_corpus(tmp_path):
    paths = simulate.simulate(tmp_path, 1000, seed=1)["fasta"]
    lines = [line for path in paths for line in path.read_text().splitlines()]
    sequences = [line for line in lines if not line.startswith(">")]
    assert len(sequences) == 1000
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=specials,
                                  initial_alphabet=list("ACGT"), show_progress=False)
    tokenizer.train_from_iterator(sequences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    assert TINY_BPE.read_bytes() == tokenizer.to_str().encode() + b"\n"


def test_digest_is_of_vocabulary_and_merges_alone(tmp_path, tiny):
    document = json.loads(TINY_BPE.read_text())
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    same = {**document, "truncation": truncation}
    (tmp_path / "same.json").write_text(json.dumps(same, indent=1))
    again = BPETokenizer("dnabert", tmp_path / "same.json")
    assert again.digest == tiny.digest
    assert encode_all(again, BPE_SEQUENCES) == encode_all(tiny, BPE_SEQUENCES)
    document["model"]["merges"].pop()
    (tmp_path / "other.json").write_text(json.dumps(document))
    assert BPETokenizer("dnabert", tmp_path / "other.json").digest != tiny.digest


def respelled(document, change):
    """A tokenizer.json's document with the same meaning, or with a little of another."""
    document = json.loads(json.dumps(document))
    model = document["model"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    model["merges"] = [" ".join(pair) for pair in pairs] if change == "strings" else pairs
    if change in ("ignore_merges", "pairs and new keys"):
        model["ignore_merges"] = change == "ignore_merges"
    if change == "of 2023":
        newer = ("byte_fallback", "ignore_merges")
        old = {key: value for key, value in model.items() if key not in newer}
        document["model"] = {**old, "merges": [" ".join(pair) for pair in pairs]}
    if change == "empty prefix":
        model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    if change == "two merges swapped":
        model["merges"][5], model["merges"][6] = pairs[6], pairs[5]
    if change == "two ids swapped":
        model["vocab"]["AA"], model["vocab"]["CT"] = model["vocab"]["CT"], model["vocab"]["AA"]
    if change == "another [UNK]":
        model["unk_token"] = "[MASK]"
    if change == "dropout":
        model["dropout"] = 0.1
    return document


@pytest.mark.parametrize("name", ["tiny", "hub"])
@pytest.mark.parametrize("change", [
    "strings", "pairs", "pairs and new keys", "of 2023", "empty prefix"])
def test_one_meaning_has_one_digest_however_it_is_spelled(name, change, tmp_path):
    first = BPETokenizer(name, dnabert_file(name))
    other = respelled(json.loads(dnabert_file(name).read_text()), change)
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    again = BPETokenizer(name, tmp_path / "tokenizer.json")
    assert again.digest == first.digest
    assert encode_all(again, BPE_SEQUENCES) == encode_all(first, BPE_SEQUENCES)


@pytest.mark.parametrize("change", [
    "two merges swapped", "two ids swapped", "another [UNK]", "dropout", "ignore_merges"])
def test_another_meaning_has_another_digest(change, tiny, tmp_path):
    document = respelled(json.loads(TINY_BPE.read_text()), change)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    other = BPETokenizer("tiny", tmp_path / "tokenizer.json")
    assert other.digest != tiny.digest


@pytest.mark.parametrize("name", ["tiny", "hub"])
def test_what_tokenizers_and_transformers_save_again_is_the_same_tokenizer(name, tmp_path):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    first = BPETokenizer(name, dnabert_file(name))
    Tokenizer.from_file(str(dnabert_file(name))).save(str(tmp_path / "saved.json"))
    PreTrainedTokenizerFast(tokenizer_file=str(dnabert_file(name))).save_pretrained(tmp_path)
    for path in (tmp_path / "saved.json", tmp_path / "tokenizer.json"):
        assert BPETokenizer(name, path).digest == first.digest
    if name == "hub":
        model = json.loads(hub_file().read_text())["model"]  # the digest is of this spelling
        spelled = json.dumps(model, sort_keys=True).encode()
        assert first.digest == DNABERT_DIGEST == hashlib.sha256(spelled).hexdigest()
        for path in (hub_file(), tmp_path / "saved.json", tmp_path / "tokenizer.json"):
            assert get_tokenizer("bpe", path).name == "dnabert"


BAD_FILES = {  # bytes, or a change to the shipped file's document
    "empty": (b"", "not a tokenizer.json"),
    "prose": (b"hello", "not a tokenizer.json"),
    "binary": (b"\xff\xfe\x00", "not a tokenizer.json"),
    "cut short": (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"A',
                  "not a tokenizer.json"),
    "a list": (b"[]", "not a tokenizer.json"),
    "a number": (b"5", "not a tokenizer.json"),
    "null": (b"null", "not a tokenizer.json"),
    "config.json": (b'{"model_type": "bert"}', "not a tokenizer.json"),
    "no model": (b'{"model": null}', "not a tokenizer.json"),
    "a merge of unknown tokens": (lambda d: d["model"]["merges"].insert(0, ["Q", "Q"]),
                                  "not a tokenizer.json"),
    "another version": (lambda d: d.update(version="9.0"), "not a tokenizer.json"),
    "no [PAD]": (lambda d: (d.update(added_tokens=[]), d["model"]["vocab"].pop("[PAD]")),
                 "lacks"),
    "[UNK] is not in it": (lambda d: d["model"].update(unk_token="[NOPE]"), "tokenizer|UNK|NOPE"),
    "ids above 16 bits": (lambda d: d["model"]["vocab"].update(A=70000), "tokenizer|16|65"),
    "no [CLS] and [SEP] are added": (lambda d: d.update(post_processor=None), "CLS"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_tokenizer_files_are_refused_when_they_are_opened(tmp_path, case):
    bad, words = BAD_FILES[case]
    document = json.loads(TINY_BPE.read_text())
    if callable(bad):
        bad(document)
        bad = json.dumps(document).encode()
    (tmp_path / "tokenizer.json").write_bytes(bad)
    with pytest.raises(InputError, match=words) as caught:
        get_tokenizer("dnabert", tmp_path / "tokenizer.json")
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))


def test_missing_tokenizer_file_and_folder_are_refused(tmp_path):
    for path, words in ((tmp_path / "missing.json", "no such tokenizer file"),
                        (tmp_path, "not a tokenizer.json")):
        with pytest.raises(InputError, match=words):
            get_tokenizer("dnabert", path)


@pytest.mark.parametrize("name, words", [
    ("nt2", "did you mean nt"),
    ("dnabert2", "did you mean dnabert"),
    ("", "choose from"),
    ("NT", "choose from nt dnabert tiny-dnabert"),
    ("tiny-dnabret", "did you mean tiny-dnabert"),
])
def test_unknown_names_are_refused_with_the_nearest(name, words):
    with pytest.raises(InputError, match=words):
        get_tokenizer(name)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("dnabert", "bpe")])
def test_a_tokenizer_file_is_for_dnabert_only(name):
    with pytest.raises(InputError, match="--tokenizer-file is for the tokenizers dnabert and bpe"):
        get_tokenizer(name, TINY_BPE)


def test_without_a_network_the_message_names_the_flag(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match="--tokenizer-file PATH"):
        get_tokenizer("dnabert")
