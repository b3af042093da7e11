"""The training loop against a plain one: what it logs, and the step that the benchmarks take.

The plain loop knows nothing of the plan, the loader or the Run. It shuffles, cuts, and adds.
"""

import json
import math

import numpy as np
import pytest
import torch
from helpers import TINY, parser_of

import train
from taxa.backbones import MODELS, get_model, load_backbone
from taxa.data.dataset import PreparedDataset
from taxa.errors import InputError
from taxa.measure.step import batch_loss, training_step
from taxa.model import TaxonClassifier
from taxa.runtime.distributed import World
from taxa.strategies import inject_adapters, train_only, trainable_names
from taxa.training import checkpoint
from taxa.training.flag_effects import EFFECTS
from taxa.training.optim import adamw
from taxa.training.run import Run
from taxa.training.settings import settings_from_flags

SEED, LR, BATCH = 42, 3e-3, 8


def command(name, strategy, data, weights, out, *more):
    return [
        "--model", name, "--strategy", strategy, "--data", str(data), "--weights",
        str(weights[name]), "--out", str(out), "--batch-size", str(BATCH), "--lr", str(LR), *more,
    ]  # fmt: skip


def built(name, strategy, data, weights, **flags):
    """(classifier, names that train) as a run of seed 42 begins, without train.py."""
    torch.manual_seed(SEED)
    classifier = TaxonClassifier(load_backbone(name, weights[name]), data.num_classes)
    settings = settings_from_flags(name, strategy, **flags)
    inject_adapters(classifier, settings)
    names = trainable_names(classifier, settings)
    train_only(classifier, names)
    return classifier.train(), names


def sequences(data, name, rows):
    """One batch with a mask: input_ids (B, T), attention_mask (B, T), labels (B, R)."""
    batch = data.split("train", MODELS[name].tokenizer)[rows]
    return batch["input_ids"], batch["attention_mask"], batch["labels"]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("strategy", ["full", "ia3"])
def test_one_step_of_the_benchmarks_is_one_step_of_train(tmp_path, short, weights, name, strategy):
    train.main(command(name, strategy, short, weights, tmp_path / "run", "--max-steps", "1"))
    saved = checkpoint.read(tmp_path / "run" / "last.pt", checkpoint.RESUME_STATE)

    data = PreparedDataset(short)
    classifier, names = built(name, strategy, data, weights)
    before = checkpoint.changed_state(classifier, names)
    order = np.random.RandomState([SEED, 0]).permutation(data.manifest["splits"]["train"])
    batch = sequences(data, name, order[:BATCH])
    training_step(classifier, adamw(classifier, LR), batch)
    after = checkpoint.changed_state(classifier, names)

    assert after.keys() == saved["state"].keys()
    for key, tensor in saved["state"].items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-6, atol=1e-7)
    assert sum(not torch.equal(before[key], after[key]) for key in names) > len(names) / 2


def plain_run(name, data, weights, epochs, accumulate, log_every):
    """The lines that a run shall log: [{"epoch", "step", "loss", "lr", "grad_norm"}, ...]."""
    classifier, _ = built(name, "full", data, weights)
    trains = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=LR, weight_decay=0.0)
    N = data.manifest["splits"]["train"]
    per_step = BATCH * accumulate
    total = epochs * math.ceil(N / per_step)
    lines, losses, seen, step = [], 0.0, 0, 0
    for epoch in range(epochs):
        order = np.random.RandomState([SEED, epoch]).permutation(N)
        for start in range(0, N, per_step):
            rows = order[start:start + per_step]
            lr = LR * (1 + math.cos(math.pi * step / total)) / 2
            optimizer.param_groups[0]["lr"] = lr
            loss = batch_loss(classifier, sequences(data, name, rows))  # in one piece
            loss.backward()
            norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in trains))
            for p in trains:
                p.grad *= min(1.0, 1.0 / norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses += float(loss.detach()) * len(rows)
            seen += len(rows)
            if step % log_every == 0 or step == total:
                mean = losses / seen
                line = {"epoch": epoch + 1, "step": step, "steps": total, "loss": mean}
                lines.append(line | {"lr": lr, "grad_norm": norm})
                losses, seen = 0.0, 0
        losses, seen = 0.0, 0  # a validation begins the next line anew
    return lines


@pytest.mark.parametrize("log_every", [1, 2])
def test_a_logged_run_is_that_of_a_plain_loop(tmp_path, short, weights, log_every):
    """Two epochs with --accumulate 3, the last step of each of them short."""
    name = "tiny-nt"
    flags = ["--epochs", "2", "--accumulate", "3", "--log-every", str(log_every)]
    train.main(command(name, "full", short, weights, tmp_path / "run", *flags))
    written = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, written) if "loss" in line]

    data = PreparedDataset(short)
    assert data.manifest["splits"]["train"] % (3 * BATCH) != 0
    expected = plain_run(name, data, weights, 2, 3, log_every)
    assert len(logged) == len(expected)
    for line, plain in zip(logged, expected):
        for key in ("epoch", "step", "steps"):
            assert line[key] == plain[key]
        assert line["lr"] == pytest.approx(plain["lr"], rel=1e-12)
        assert line["loss"] == pytest.approx(plain["loss"], abs=2e-4)
        assert line["grad_norm"] == pytest.approx(plain["grad_norm"], rel=5e-3, abs=1e-4)


@pytest.mark.parametrize("script", ["train", "pretrain"])
def test_every_flag_is_in_the_table_of_effects(script, monkeypatch):
    flags = {action.dest for action in parser_of(script, monkeypatch)._actions} - {"help"}
    assert flags <= EFFECTS.keys()


def test_the_table_has_no_flag_that_is_gone(monkeypatch):
    flags = {
        action.dest
        for script in ("train", "pretrain")
        for action in parser_of(script, monkeypatch)._actions
    }
    assert EFFECTS.keys() <= flags


def test_published_batches_are_those_of_the_models():
    from taxa import STUDY_BATCH

    of_the_hub = {name: row.batch_size for name, row in MODELS.items() if row.hub}
    assert of_the_hub == {name: size for name, (size, _) in STUDY_BATCH.items()}
    assert get_model("dnabert2").batch_size == 16


def test_a_resumed_run_with_a_lower_limit_of_bad_steps_ends_at_the_next_one(tmp_path, short):
    arguments = ["--model", "tiny-nt", "--strategy", "full", "--max-bad-steps", "2"]
    args = train.parse_args(arguments)
    data = PreparedDataset(short)
    run = Run(World(0, 1, torch.device("cpu")), args, tmp_path / "run")
    run.out.mkdir()
    run.plan(data.split("train", "nt"), data.manifest["sources"])
    run.bad_steps = 2  # of a run that allowed three
    run._since = 0.0
    with pytest.raises(InputError, match="3 step.s. had a loss or gradient that is not finite"):
        run.end_step(0, lr=1e-3, loss=math.nan, grad_norm=1.0, count=8, state=dict)
