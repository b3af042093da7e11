"""Augmentation: the views against letters that are handled by hand, and the order of the views as a
function of the seed and the epoch alone.
"""

import json

import numpy as np
import pytest
import torch

import pretrain
import train
from taxa.data.augment import PHASES, VIEWS, augmented, view
from taxa.data.dataset import PreparedDataset
from taxa.data.tokens import NTTokenizer, get_tokenizer
from taxa.errors import InputError
from taxa.training import checkpoint


def test_the_views_of_a_sequence_by_hand():
    letters = b"AACGTNCCA"
    assert [view(letters, v) for v in (0, 1, 5)] == [b"AACGTNCCA", b"ACGTNCCA", b"NCCA"]
    assert [view(letters, v) for v in (6, 7, 11)] == [b"TGGNACGTT", b"GGNACGTT", b"CGTT"]
    assert len({view(b"ACCGGGTTTTACGATC", v) for v in range(VIEWS)}) == VIEWS


@pytest.mark.parametrize("name", ["nt", "tiny-dnabert"])
def test_a_batch_holds_the_tokens_of_a_view_of_each_sequence_and_its_labels(name, demo):
    data, nt, tokenizer = PreparedDataset(demo), NTTokenizer(), get_tokenizer(name)
    split = data.split("train", "nt")
    viewed = augmented(split, tokenizer, seed=1, epoch=0)
    rows = [5, 3, 250, 3]
    batch = viewed[rows]
    assert torch.equal(batch["labels"], split[rows]["labels"]) and len(viewed) == len(split)
    for b, i in enumerate(rows):
        ids = batch["input_ids"][b][batch["attention_mask"][b] == 1].numpy()
        letters = nt.decode(split.tokens(i))
        pairs = dict(zip("ACGTN", "TGCAN"))
        strand = letters.decode()
        if viewed.views[i] >= PHASES:
            strand = "".join(pairs[c] for c in reversed(strand))
        shift = viewed.views[i] % PHASES
        expected, _ = tokenizer.encode(strand[shift:].encode(), [len(strand) - shift])
        assert ids.tolist() == expected.tolist()
        padding = batch["input_ids"][b][batch["attention_mask"][b] == 0]
        assert (padding == tokenizer.pad_token_id).all()


def test_seed_and_epoch_decide_the_views(demo):
    split, nt = PreparedDataset(demo).split("train", "nt"), NTTokenizer()
    first, again, later, other = (
        augmented(split, nt, *key).views for key in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert (first == again).all()
    assert (first != later).any() and (first != other).any()
    assert set(first) == set(range(VIEWS))


def test_a_part_of_the_training_split_in_views(demo, weights, tmp_path):
    """--data-fraction with --augment: the part's own sequences, bases and labels."""
    data, nt = PreparedDataset(demo), NTTokenizer()
    whole = data.split("train", "nt")
    data.keep_part(0.3, seed=1)
    part = data.split("train", "nt")
    viewed = augmented(part, nt, seed=1, epoch=0)
    rows = [4, 0, 7]
    assert (viewed.name, len(viewed)) == ("train", len(part))
    assert len(part) < len(whole) / 2
    assert torch.equal(viewed[rows]["labels"], whole[part.rows[rows]]["labels"])
    for ids, i in zip(viewed[rows]["input_ids"], rows):
        bases = nt.decode(whole.tokens(part.rows[i]))
        letters = nt.decode(ids[ids != nt.pad_token_id].numpy().astype("uint16"))
        assert letters == view(bases, viewed.views[i])
    metrics = train.main([
        "--model", "tiny-nt", "--strategy", "full",
        "--data", str(demo), "--weights", str(weights["tiny-nt"]),
        "--augment", "--data-fraction", "0.3",
        "--batch-size", "8", "--max-steps", "2", "--out", str(tmp_path / "run"),
    ])
    assert np.isfinite(metrics["loss"])


def test_a_run_trains_on_views_and_is_tested_on_the_sequences(demo, weights, tmp_path):
    def state(name, *flags):
        metrics = train.main([
            "--model", "tiny-nt", "--strategy", "full",
            "--data", str(demo), "--weights", str(weights["tiny-nt"]),
            "--batch-size", "8", "--max-steps", "3", "--out", str(tmp_path / name), *flags,
        ])
        content = checkpoint.read(tmp_path / name / "ckpt.pt")
        return content["state"]["heads.genus.weight"], metrics

    plain = state("plain")
    augmented = state("augmented", "--augment")
    workers = state("workers", "--augment", "--workers", "2")
    assert not torch.equal(plain[0], augmented[0])
    assert torch.equal(augmented[0], workers[0]) and augmented[1] == workers[1]
    assert np.isfinite(augmented[1]["loss"])
    assert augmented[1]["sequences"] == plain[1]["sequences"]


def test_pretraining_reads_the_views(short, tmp_path):
    def loss(name, *flags):
        pretrain.main([
            "--model", "tiny-nt", "--data", str(short),
            "--batch-size", "8", "--max-steps", "2", "--warmup-steps", "0",
            "--log-every", "1", "--out", str(tmp_path / name), *flags,
        ])
        log = (tmp_path / name / "log.jsonl").read_text()
        return [json.loads(line).get("loss") for line in log.splitlines()]

    plain = loss("plain")
    augmented = loss("augmented", "--augment")
    again = loss("again", "--augment")
    assert plain != augmented == again


def test_pretraining_on_fasta_has_no_views(tmp_path):
    with pytest.raises(InputError, match="--augment goes with --data"):
        pretrain.main([
            "--model", "tiny-nt", "--fasta", "genomes.fa", "--augment",
            "--out", str(tmp_path / "run"),
        ])
