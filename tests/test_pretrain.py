"""Masked language modelling: what is masked, the loss, the heads against transformers', the folder
it writes, resuming, two processes.
"""

import fcntl
import gzip
import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, forked
from runs import dies, in_step
from safetensors.torch import load_file, save_file

import prepare
import pretrain
import train
from taxa.backbones import MODELS, load_backbone
from taxa.backbones.masked_lm import (
    MASKING,
    MaskedLM,
    generator_for,
    load_head,
    mask_tokens,
    save_hub_folder,
    unigram_losses,
)
from taxa.data.batches import micro_batches
from taxa.data.dataset import PreparedDataset
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError
from taxa.prediction.reads import records, tokenized_windows
from taxa.runtime import cli
from taxa.training import checkpoint
from taxa.training.optim import adamw, cosine_lr
from taxa.training.run import read_last

# The hub's names of everything but the layers, written by hand.
KEYS = {
    "tiny-nt": {
        "esm.embeddings.word_embeddings.weight",
        "esm.encoder.emb_layer_norm_after.weight", "esm.encoder.emb_layer_norm_after.bias",
        "lm_head.bias",
        "lm_head.dense.weight", "lm_head.dense.bias",
        "lm_head.layer_norm.weight", "lm_head.layer_norm.bias",
        "lm_head.decoder.weight",
    },
    "tiny-dnabert": {
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias",
        "cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias",
        "cls.predictions.decoder.bias",
    },
}


def make(name, weights, tied=None):
    torch.manual_seed(3)
    family = MODELS[name].family
    tied = MASKING[family].tied if tied is None else tied
    model = MaskedLM(family, load_backbone(name, weights[name]), tied)
    for parameter in model.parameters():  # so that a bias that is left out shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def command(name, data, weights, out, *more):
    return [
        "--model", name, "--data", str(data), "--weights", str(weights[name]), "--out", str(out),
        "--batch-size", "8", "--lr", "0.01", "--warmup-steps", "1", "--device", "cpu",
        *(["--no-tied"] if name == "tiny-nt" else []),
        *more,
    ]


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def log_of(folder):
    """The lines of the log without the speed, which differs from run to run."""
    return [{key: value for key, value in line.items() if key != "sequences_per_s"}
            for line in log_lines(folder)]


def interrupted_at(call, monkeypatch, arguments):
    """Run pretrain.main(arguments) with Ctrl-C at the given call of cosine_lr.

    Returns the steps that asked for a learning rate.
    """
    calls = []

    def interrupting(step, *more):
        calls.append(step)
        if len(calls) == call:
            raise KeyboardInterrupt
        return cosine_lr(step, *more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pretrain, "cosine_lr", interrupting)
        pretrain.main(arguments)
    return calls


@pytest.mark.parametrize("name, special, vocab", [
    ("tiny-nt", {0, 1, 2, 3, 4, 5}, 4107),
    ("tiny-dnabert", {0, 1, 2, 3, 4}, 1024),
])
def test_the_proportions_and_that_special_tokens_are_never_chosen(name, special, vocab):
    masking = MASKING[MODELS[name].family]
    ids = torch.randint(0, vocab, (400, 500), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    ids[:, :50] = torch.randint(0, len(special), (400, 50), generator=generator)
    hidden, chosen = mask_tokens(ids, masking, vocab, 0.15, generator_for(7, 1))
    ordinary = ~torch.isin(ids, torch.tensor(sorted(special)))
    assert not chosen[~ordinary].any()
    assert torch.equal(hidden[~chosen], ids[~chosen])

    n, m = int(ordinary.sum()), int(chosen.sum())
    assert abs(m / n - 0.15) < 5 * math.sqrt(0.15 * 0.85 / n)
    masked = int((hidden[chosen] == masking.mask_token_id).sum())
    same = int((hidden[chosen] == ids[chosen]).sum())
    assert abs(masked / m - 0.8) < 5 * math.sqrt(0.16 / m)
    assert abs(same / m - 0.1) < 5 * math.sqrt(0.09 / m) + 1 / vocab
    randoms = hidden[chosen & (hidden != ids) & (hidden != masking.mask_token_id)]
    assert abs(len(randoms) / m - 0.1) < 5 * math.sqrt(0.09 / m) + 1 / vocab
    # They come from all over the ordinary ids.
    assert len(special) <= randoms.min() < vocab / 20
    assert vocab * 0.95 < randoms.max() < vocab

    again, other = (mask_tokens(ids, masking, vocab, 0.15, generator_for(7, step))[0]
                    for step in (1, 2))
    assert torch.equal(again, hidden) and not torch.equal(other, hidden)


def test_the_mask_tokens_are_the_tokenizers_own():
    from taxa.data.tokens import TINY_BPE, nt_vocabulary

    words = nt_vocabulary()
    assert words[2] == "<mask>"
    assert [word for word in words if word[0] == "<"] == words[:6]
    vocabulary = json.loads(TINY_BPE.read_text())["model"]["vocab"]
    assert {word: i for word, i in vocabulary.items() if word[0] == "["} == {
        "[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "[MASK]": 4,
    }


@pytest.mark.parametrize("name", TINY)
def test_the_head_is_that_of_transformers(name, weights):
    from transformers import BertConfig, EsmConfig
    from transformers.models.bert.modeling_bert import BertOnlyMLMHead
    from transformers.models.esm.modeling_esm import EsmLMHead

    model = make(name, weights, tied=False)
    config = model.config
    sizes = {
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
    }
    if name == "tiny-nt":
        theirs = EsmLMHead(EsmConfig(**sizes))
    else:
        theirs = BertOnlyMLMHead(BertConfig(**sizes, hidden_act="gelu"))
    missing, unexpected = theirs.load_state_dict(model.head.state_dict(), strict=False)
    # BERT's bias is the decoder's own, registered twice.
    assert not unexpected and set(missing) <= {"predictions.bias"}
    if missing:
        theirs.predictions.bias.data = model.head.predictions.decoder.bias.data
    x = torch.randn(5, model.config.hidden_size)
    torch.testing.assert_close(model.head(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_the_chosen_positions_and_the_loss_is_the_naive_one(
    name, weights, demo
):
    model = make(name, weights)
    batch = PreparedDataset(demo).split("train", MODELS[name].tokenizer)[[0, 1, 2]]
    hidden_ids, chosen = mask_tokens(batch["input_ids"], model.masking, model.config.vocab_size,
                                     0.15, generator_for(1))
    with torch.no_grad():
        logits = model(hidden_ids, batch["attention_mask"], chosen)
        everywhere = model.head(model.backbone(hidden_ids, batch["attention_mask"]))
    losses = []
    row = 0
    for b in range(3):
        for t in range(hidden_ids.shape[1]):
            if chosen[b, t]:
                z = everywhere[b, t].double()
                torch.testing.assert_close(logits[row].double(), z)
                losses.append(float(torch.logsumexp(z, 0) - z[batch["input_ids"][b, t]]))
                row += 1
    assert row == len(logits)
    ours = torch.nn.functional.cross_entropy(logits, batch["input_ids"][chosen])
    assert float(ours) == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_the_folder_holds_the_hubs_names_and_gives_the_same_hidden_states(name, weights, tmp_path):
    model = make(name, weights)
    save_hub_folder(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    layers = {key for key in state if ".encoder.layer." in key}
    assert set(state) - layers == KEYS[name]
    assert layers == {key for key in model.state_dict() if ".encoder.layer." in key}

    loaded = load_backbone(name, tmp_path).eval()
    ids = torch.randint(6, 1000, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    assert torch.equal(loaded(ids, mask), model.backbone(ids, mask))

    again = MaskedLM(model.family, loaded, model.tied)
    assert load_head(again, tmp_path)
    ours = model.state_dict()
    assert all(torch.equal(p, ours[key]) for key, p in again.state_dict().items())


def test_a_tied_folder_is_smaller_and_half_precision_loads_as_float32(weights, tmp_path):
    model = make("tiny-nt", weights, tied=True)
    save_hub_folder(model, tmp_path, torch.float16)
    state = load_file(tmp_path / "model.safetensors")
    assert "lm_head.decoder.weight" not in state
    assert {p.dtype for p in state.values()} == {torch.float16}
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    loaded = load_backbone("tiny-nt", tmp_path)
    ours = model.backbone.state_dict()
    for key, p in loaded.state_dict().items():
        assert p.dtype == torch.float32
        assert torch.equal(p, ours[key].half().float())


def test_a_folder_without_a_head_and_one_that_does_not_fit(weights, tmp_path):
    model = make("tiny-nt", weights)
    # Of the head it has lm_head.bias alone, as a test's folder may.
    assert not load_head(model, weights["tiny-nt"])
    save_hub_folder(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.dense.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="language-model head"):
        load_head(model, tmp_path)


@pytest.mark.parametrize("name", TINY)
def test_unigram_counts(name, demo):
    split = PreparedDataset(demo).split("train", MODELS[name].tokenizer)
    masking = MASKING[MODELS[name].family]
    vocab = {"tiny-nt": 4107, "tiny-dnabert": 1024}[name]
    counts = [1] * vocab
    for i in range(len(split)):
        for token in split.tokens(i).tolist():
            counts[token] += 1
    first = masking.first_ordinary
    total = sum(counts[first:])
    losses = unigram_losses(split, masking, vocab).tolist()
    assert losses[first:] == pytest.approx([-math.log(c / total) for c in counts[first:]])
    assert losses[:first] == [math.inf] * first


def replica(name, data, weights, steps, processes, lr=0.01):
    """The loop as one plain process that plays all of them: the same masks, one loss over all
    positions of a step.
    """
    torch.manual_seed(42)
    family = MODELS[name].family
    model = MaskedLM(family, load_backbone(name, weights[name]), MASKING[family].tied).train()
    optimizer = adamw(model, lr, 0.01)
    split = PreparedDataset(data).split("train", MODELS[name].tokenizer)
    plans = [micro_batches(len(split), 42, 0, 8, 1, rank=rank, size=processes)
             for rank in range(processes)]
    for step in range(steps):
        losses = []
        for rank, plan in enumerate(plans):
            batch = split[plan[step].micros[0][0]]
            ids, chosen = mask_tokens(batch["input_ids"], model.masking, model.config.vocab_size,
                                      0.15, generator_for(42, 0, step, rank))
            logits = model(ids, batch["attention_mask"], chosen)
            targets = batch["input_ids"][chosen]
            losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, lr, 1)
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {key: p.detach() for key, p in model.state_dict().items()}


def test_two_processes_are_one_loss_over_all_masked_positions(demo, weights, tmp_path):
    words = [ROOT / "pretrain.py",
             *command("tiny-nt", demo, weights, tmp_path / "two", "--max-steps", "3")]
    for rank in forked(words, words, cwd=tmp_path):
        assert rank.returncode == 0, rank.stderr
    expected = replica("tiny-nt", demo, weights, 3, 2)
    for key, tensor in load_file(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", TINY)
def test_it_learns_goes_on_after_an_interruption_and_train_loads_it(
    name, short, weights, tmp_path, monkeypatch, capsys
):
    # 10 steps are an epoch
    more = ("--max-steps", "13", "--batch-size", "32", "--save-every", "5", "--log-every", "1")
    folder, cut = tmp_path / "whole", tmp_path / "cut"
    whole = pretrain.main(command(name, short, weights, folder, *more))
    log = log_lines(folder)
    assert log[0]["validation_loss"] > whole["loss"] + 0.05
    assert "perplexity" in log[0] and "unigram_perplexity" in log[-1]
    assert whole["perplexity"] == pytest.approx(math.exp(whole["loss"]))

    calls = interrupted_at(13, monkeypatch, command(name, short, weights, cut, *more))
    again = pretrain.main(command(name, short, weights, cut, *more, "--resume"))
    assert again == whole
    assert len(calls) == 13  # steps 0 to 12, the last of them not taken
    assert [line["step"] for line in log_lines(cut)] == [line["step"] for line in log]
    assert (cut / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    train.main(["--model", name, "--strategy", "lora", "--data", str(short),
                "--weights", str(folder), "--max-steps", "1", "--out", str(tmp_path / "run")])
    settings = json.loads((tmp_path / "run" / "args.json").read_text())
    assert settings["base"]["source"] == "folder"
    measured = pretrain.main(["--model", name, "--data", str(short), "--weights", str(folder),
                              "--epochs", "0", "--batch-size", "32",
                              "--out", str(tmp_path / "measured")])
    assert measured["loss"] == pytest.approx(whole["loss"], abs=1e-6)


def short_command(short, weights, out, *more):
    """Ten steps an epoch, two epochs."""
    return command("tiny-dnabert", short, weights, out, "--batch-size", "32", "--epochs", "2",
                   "--log-every", "3", "--save-every", "4", *more)


def assert_same_folder(one, other):
    assert (one / "metrics.json").read_bytes() == (other / "metrics.json").read_bytes()
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert log_of(one) == log_of(other)


@pytest.fixture(scope="module")
def whole(short, weights, tmp_path_factory):
    """The folder of a run that nobody touched."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain.main(short_command(short, weights, folder))
    return folder


def test_killed_and_resumed_ends_bit_for_bit_the_same(whole, short, weights, tmp_path):
    arguments = short_command(short, weights, tmp_path / "run")
    dies(3, arguments, pretrain)  # before the first save: it begins anew
    dies(6, [*arguments, "--resume"], pretrain)  # saved at step 4
    dies(10, [*arguments, "--resume"], pretrain)  # in step 14, in the second epoch
    pretrain.main([*arguments, "--resume"])
    assert_same_folder(tmp_path / "run", whole)


def test_killed_in_the_validation_of_an_epoch(whole, short, weights, tmp_path, monkeypatch):
    arguments = short_command(short, weights, tmp_path / "run")
    validate = pretrain.validate
    calls = []

    def dies_in_the_second(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*given)

    monkeypatch.setattr(pretrain, "validate", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(arguments)
    monkeypatch.undo()
    pretrain.main([*arguments, "--resume"])
    assert_same_folder(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_75(number, whole, short, weights, tmp_path, capsys):
    arguments = short_command(short, weights, tmp_path / "run", "--save-every", "60m")
    with in_step(3, lambda: os.kill(os.getpid(), number)), pytest.raises(SystemExit) as left:
        cli.run(lambda: pretrain.main(arguments))
    line, = capsys.readouterr().err.splitlines()
    assert left.value.code == 75
    assert signal.Signals(number).name in line and "--resume" in line
    assert read_last(tmp_path / "run")["step"] in (3, 4)
    pretrain.main([*arguments, "--resume"])
    assert_same_folder(tmp_path / "run", whole)


def test_two_runs_in_one_folder_are_refused(short, weights, tmp_path, monkeypatch):
    def lockf(*_):
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(InputError, match="is in use by another process"):
        pretrain.main(short_command(short, weights, tmp_path / "run"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_is_not_applied_and_names_its_records(
    value, short, weights, tmp_path, monkeypatch
):
    cross_entropy = pretrain.F.cross_entropy
    steps = []

    def bad_in_steps_2_and_4(logits, targets, **more):
        steps.extend([1] * logits.requires_grad)
        bad = logits.requires_grad and len(steps) in (2, 4)
        return cross_entropy(logits, targets, **more) + (value if bad else 0)

    monkeypatch.setattr(pretrain.F, "cross_entropy", bad_in_steps_2_and_4)
    folder = tmp_path / "run"
    arguments = short_command(short, weights, folder, "--save-every", "1", "--max-bad-steps", "2")
    message = ("2 step.s. had a loss or gradient that is not finite, "
               "the last one step 4; .*bad_steps.jsonl")
    with pytest.raises(InputError, match=message):
        pretrain.main(arguments)

    lines = (folder / "bad_steps.jsonl").read_text().splitlines()
    second, fourth = map(json.loads, lines)
    assert (second["step"], fourth["step"]) == (2, 4)
    assert second["loss"] == str(value)
    order = np.random.RandomState([42, 0]).permutation(292)
    assert [record["row"] for record in fourth["records"]] == order[96:128].tolist()
    assert "taxid" in fourth["records"][0]

    last = read_last(folder)
    assert last["step"] == 3 and last["bad_steps"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in last["state"].values())
    assert all(entry["step"] == 2 for entry in last["optimizer"]["state"].values())


@pytest.fixture
def fasta(tmp_path):
    """(genomes, paths): five genomes made of 45 repeats, in two files, one of them packed: 104
    windows of 1500 bases and a shorter one; a sixth record has no bases.
    """
    draw = random.Random(5)
    motifs = ["".join(draw.choice("ACGT") for _ in range(60)) for _ in range(45)]
    genomes = ["".join(draw.choice(motifs) for _ in range(n // 60 + 1))[:n]
               for n in (90_000, 60_700, 1_500, 700, 2_000)]

    def text(i, genome):
        lines = [genome[at:at + 70] + "\n" for at in range(0, len(genome), 70)]
        return f">g{i}\n" + "".join(lines)

    texts = [text(i, genome) for i, genome in enumerate(genomes)]
    (tmp_path / "a.fa").write_text("".join(texts[:2]))
    packed = gzip.compress("".join([texts[2], text(9, ""), *texts[3:]]).encode())
    (tmp_path / "b.fa.gz").write_bytes(packed)
    return genomes, [str(tmp_path / "a.fa"), str(tmp_path / "b.fa.gz")]


@pytest.mark.parametrize("name", TINY)
def test_windows_of_fasta_each_on_one_side(name, fasta):
    genomes, paths = fasta
    tokenizer = get_tokenizer(MODELS[name].tokenizer)
    expected = []
    held = []  # is the window of the same place in `expected` held out for validation?
    for genome in genomes:
        for at in range(0, len(genome), 1500):
            overlaps = at and at + 1500 > len(genome)
            if overlaps:
                expected.append(genome[max(0, len(genome) - 1500):])
                held.append(held[-1])
            else:
                expected.append(genome[at:at + 1500])
                held.append(len(held) % 50 == 49)
    given = (record for path in paths for record in records(path))
    train, validation = tokenized_windows(given, tokenizer, 1500, 50)
    assert (len(train), len(validation)) == (held.count(False), held.count(True))
    assert (len(train), len(validation)) == (102, 3)  # the 101st shares bases with the 100th
    for split, side in ((train, False), (validation, True)):
        rows = [tokenizer.encode(text.encode(), [len(text)])[0].tolist()
                for text, h in zip(expected, held) if h == side]
        assert [split.tokens(i).tolist() for i in range(len(split))] == rows
        batch = split[[len(split) - 1, 0]]
        unpadded = [ids[mask.bool()].tolist()
                    for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
        assert unpadded == [rows[-1], rows[0]]


def test_fasta_instead_of_a_prepared_folder(fasta, weights, tmp_path, monkeypatch):
    paths = fasta[1]
    folder, cut = tmp_path / "whole", tmp_path / "cut"

    def fasta_command(out, *more):
        flags = command("tiny-nt", "", weights, out, "--max-steps", "15", "--save-every", "4",
                        *more)
        return [*flags[:2], "--fasta", *paths, *flags[4:]]

    whole = pretrain.main(fasta_command(folder))
    first = log_lines(folder)[0]
    assert whole["loss"] < first["validation_loss"] - 0.05
    assert round(whole["unigram_perplexity"], 2) == first["unigram_perplexity"]

    interrupted_at(15, monkeypatch, fasta_command(cut))
    assert pretrain.main(fasta_command(cut, "--resume", "--workers", "1")) == whole
    assert (cut / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    with open(paths[0], "a") as file:
        file.write("ACGT")
    message = "last.pt is of a run with other settings: dataset: .* then, .* now"
    with pytest.raises(InputError, match=message):
        pretrain.main(fasta_command(cut, "--resume"))


@pytest.mark.parametrize("text, what", [
    ("", "the file is empty"),
    (">p\nMKLVEFIPQ", "is this protein"),
    (None, "no such file"),
    (">a\nACGT\n" * 49, "every 50th validates"),
    (">a\n\n", "0 windows"),
    ("ACGT", "neither FASTA nor FASTQ"),
])
def test_wrong_fasta_is_one_line(text, what, tmp_path):
    path = tmp_path / "x.fa"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=what):
        pretrain.main(["--model", "tiny-nt", "--fasta", str(path), "--device", "cpu",
                       "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_checkpoint_that_comes_with_the_package():
    """Its card's digest is the weights', and it is small."""
    folder = MODELS["tiny-nt"].packaged
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    backbone = load_backbone("tiny-nt")
    assert checkpoint.weights_digest(backbone) in (folder / "README.md").read_text(encoding="utf-8")
    sizes = MODELS["tiny-nt"].sizes
    assert {name: getattr(backbone.config, name) for name in sizes} == sizes
    assert load_head(MaskedLM("nt", backbone, True), folder)


def test_the_checkpoint_that_comes_with_the_package_predicts(tmp_path):
    prepare.main(["--demo", "--demo-sequences", "600", "--validation", "0.05", "--seed", "5",
                  "--out", str(tmp_path / "data")])
    measured = pretrain.main(["--model", "tiny-nt", "--weights", str(MODELS["tiny-nt"].packaged),
                              "--epochs", "0", "--data", str(tmp_path / "data"),
                              "--out", str(tmp_path / "run")])
    assert measured["perplexity"] < 0.9 * measured["unigram_perplexity"]


@pytest.mark.parametrize("flags, what", [
    (["--mask-fraction", "0"], "hides nothing"),
    (["--model", "tiny-mt"], "did you mean tiny-nt"),
    (["--warmup-steps", "100", "--max-steps", "9"], "leaves nothing"),
    (["--overwrite", "--resume"], "give one of them"),
    (["--data", "nowhere"], "no such folder"),
    (["--max-bad-steps", "0"], "--max-bad-steps"),
    (["--fasta", "x.fa"], "either --data or --fasta"),
    (["--tokenizer-file", "x.json"], "goes with --fasta"),
])
def test_wrong_input_is_one_line(flags, what, demo, weights, tmp_path, capsys):
    with pytest.raises(InputError, match=what):
        pretrain.main(command("tiny-nt", demo, weights, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()
