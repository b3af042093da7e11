"""train.py and evaluate.py as a user runs them: every strategy, one process and two,
interrupted and resumed.
"""

import functools
import json
import re

import numpy as np
import pytest
import torch
from helpers import ROOT, STRATEGIES, command, forked, python
from torch.distributed.run import get_args_parser

import evaluate
import prepare
import train
from taxa.backbones import load_backbone
from taxa.data.dataset import PreparedDataset
from taxa.model import TaxonClassifier, sequence_losses
from taxa.training import checkpoint
from taxa.training.optim import cosine_lr

MODELS = ("tiny-nt", "tiny-dnabert")
# The same with transformers 4.51 and 5.23.
PINNED = {"tiny-nt": "f2acb37a9c3b2149", "tiny-dnabert": "b30ce78a7d9fbf7c"}
FILES = {
    ".lock", "args.json", "environment.json", "log.jsonl",
    "ckpt.pt", "last.pt", "last.prev.pt",
    "metrics.json", "per_class.csv",
    "confusion_superkingdom.csv", "confusion_phylum.csv", "confusion_genus.csv",
}


@pytest.fixture(scope="module")
def two_processes(demo, weights, tmp_path_factory):
    """{(model, strategy): run folder} of 3 steps by two gloo processes, which also evaluate one of
    the checkpoints.
    """
    root = tmp_path_factory.mktemp("ddp")
    folders = {(model, strategy): root / f"{model}-{strategy}"
               for model in MODELS for strategy in STRATEGIES}
    runs = [["train", *command(model, strategy, demo, weights, out, "--max-steps", "3")]
            for (model, strategy), out in folders.items()]
    runs.append(["evaluate", str(root / "tiny-nt-lora" / "ckpt.pt"), "--temperature",
                 "--out", str(root / "evaluated")])
    for rank in forked(*[[ROOT / "tests" / "runs.py", json.dumps(runs)]] * 2, cwd=root):
        assert rank.returncode == 0, rank.stderr
    return folders


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_and_is_evaluated(model, strategy, short, weights, tmp_path, capsys):
    out = tmp_path / "run"
    tested = train.main(command(model, strategy, short, weights, out, "--max-steps", "3"))
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "metrics.json").read_text()) == tested
    assert tested["split"] == "test"
    assert tested["sequences"] == PreparedDataset(short).manifest["splits"]["test"]

    content = checkpoint.read(out / "ckpt.pt")
    base = dict(load_backbone(model, weights[model]).named_parameters())
    rebuilt = dict(checkpoint.rebuild(content).backbone.named_parameters())
    frozen = {name for name in rebuilt if f"backbone.{name}" not in content["state"]}
    assert all(torch.equal(rebuilt[name], base[name]) for name in frozen)
    if strategy in ("full", "random"):
        assert not frozen
    else:
        assert frozen
    assert any(not torch.equal(p, base.get(name, torch.zeros(0)))
               for name, p in rebuilt.items() if name not in frozen)

    capsys.readouterr()
    (out / "metrics.json").unlink()
    assert evaluate.main([str(out / "ckpt.pt")]) == tested
    assert json.loads((out / "metrics.json").read_text()) == tested
    assert f"{tested['ranks']['genus']['balanced_accuracy']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one_with_accumulation(
    model, strategy, demo, weights, two_processes, tmp_path
):
    train.main(command(model, strategy, demo, weights, tmp_path / "run",
                       "--max-steps", "3", "--accumulate", "2"))
    one = checkpoint.read(tmp_path / "run" / "ckpt.pt")["state"]
    two = checkpoint.read(two_processes[model, strategy] / "ckpt.pt")["state"]
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("Wqkv.bias"):
            # A key's bias shifts all scores of a query alike: its gradient is noise, which Adam
            # scales up.
            third = len(one[name]) // 3
            one[name][third:2 * third] = two[name][third:2 * third]
        # Adam scales up the rounding of a gradient near zero; three steps of rate 0.01 move a
        # weight by up to 0.03.
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4,
                                   msg=lambda text, name=name: f"{name}: {text}")


def test_two_processes_evaluate_as_one(two_processes):
    folder = two_processes["tiny-nt", "lora"]
    evaluated = folder.parent / "evaluated"
    one = evaluate.main([str(folder / "ckpt.pt"), "--temperature"])
    temperature = (folder / "temperature.json").read_bytes()
    assert temperature == (evaluated / "temperature.json").read_bytes()
    assert json.loads((evaluated / "metrics.json").read_text()) == one


def test_first_steps_equal_a_naive_loop(short, weights, tmp_path):
    """Three steps of full fine-tuning, against a loop that knows nothing of our sampler's slicing,
    clipping helper or schedule code.
    """
    train.main(command("tiny-nt", "full", short, weights, tmp_path / "run",
                       "--max-steps", "3", "--accumulate", "2"))
    data = PreparedDataset(short)
    split = data.split("train", "nt")
    backbone = load_backbone("tiny-nt", weights["tiny-nt"])
    torch.manual_seed(42)
    model = TaxonClassifier(backbone, data.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    order = np.random.RandomState([42, 0]).permutation(len(split))
    for step in range(3):
        optimizer.param_groups[0]["lr"] = cosine_lr(step, 3, 0.01)
        batch = split[order[16 * step:16 * (step + 1)]]
        logits = model(batch["input_ids"], batch["attention_mask"])
        loss = sequence_losses(logits, batch["labels"]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad ** 2).sum() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        optimizer.step()
    state = checkpoint.read(tmp_path / "run" / "ckpt.pt")["state"]
    for name, p in model.named_parameters():
        torch.testing.assert_close(state[name], p.detach(), rtol=1e-4, atol=2e-5)


def test_early_stopping_restores_the_best_epoch(short, weights, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.2, 1.0, 1.0])
    run_split = train.run_split
    states = []

    def with_these_losses(w, model, split, *rest, **more):
        outcome = run_split(w, model, split, *rest, **more)
        states.append((split.name, {name: p.clone() for name, p in model.state_dict().items()}))
        return outcome._replace(loss=next(losses)) if split.name == "validation" else outcome

    monkeypatch.setattr(train, "run_split", with_these_losses)
    train.main(command("tiny-nt", "full", short, weights, tmp_path / "run",
                       "--epochs", "7", "--patience", "3", "--batch-size", "64"))
    # The best is epoch 2: an equal loss is not better.
    assert [name for name, _ in states] == ["validation"] * 5 + ["test"]
    assert all(torch.equal(states[1][1][name], states[-1][1][name]) for name in states[-1][1])
    assert checkpoint.read(tmp_path / "run" / "ckpt.pt")["epoch"] == 2


def test_precision_bf16_trains(short, weights, tmp_path):
    more = ("--max-steps", "2")
    train.main(command("tiny-nt", "lora", short, weights, tmp_path / "bf16", *more,
                       "--precision", "bf16"))
    train.main(command("tiny-nt", "lora", short, weights, tmp_path / "fp32", *more))
    bf16, fp32 = (checkpoint.read(tmp_path / name / "ckpt.pt") for name in ("bf16", "fp32"))
    assert all(tensor.dtype == torch.float32 for tensor in bf16["state"].values())
    assert any(not torch.equal(bf16["state"][name], fp32["state"][name]) for name in fp32["state"])
    assert bf16["metrics"]["loss"] == pytest.approx(fp32["metrics"]["loss"], rel=0.02)


def first_losses(folder):
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("model, strategy, flags", [
    ("tiny-nt", "lora", ["--activation-checkpointing=full"]),
    ("tiny-dnabert", "ia3", ["--activation-checkpointing=full"]),
    ("tiny-nt", "full", ["--compile"]),
    ("tiny-nt", "ia3", ["--activation-checkpointing=selective", "--compile"]),
    ("tiny-dnabert", "full", ["--activation-checkpointing=selective", "--compile"]),
])
def test_checkpointing_and_compile_give_the_same_losses(
    model, strategy, flags, short, weights, tmp_path, monkeypatch
):
    """Compiled as far as the graph; making machine code of it would take minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    more = ("--max-steps", "2", "--log-every", "1")
    train.main(command(model, strategy, short, weights, tmp_path / "plain", *more))
    train.main(command(model, strategy, short, weights, tmp_path / "flags", *more, *flags))
    plain = first_losses(tmp_path / "plain")
    assert first_losses(tmp_path / "flags") == pytest.approx(plain, abs=2e-5)
    settings = json.loads((tmp_path / "flags" / "args.json").read_text())
    for flag in flags:
        name, _, value = flag.strip("-").partition("=")
        assert settings[name.replace("-", "_")] == (value or "layers")


def test_compile_without_a_compiler_is_one_line(short, weights, tmp_path, monkeypatch):
    def broken(function):
        raise RuntimeError("no C++ compiler found\nand more lines")

    monkeypatch.setattr(torch, "compile", broken)
    message = r"^--compile: .*\(no C\+\+ compiler found\).*leave out --compile$"
    with pytest.raises(train.InputError, match=message):
        train.main(command("tiny-nt", "full", short, weights, tmp_path / "run", "--compile"))


def test_workers_give_the_same_run(short, weights, tmp_path):
    for workers in ("0", "2"):
        train.main(command("tiny-nt", "full", short, weights, tmp_path / workers,
                           "--max-steps", "2", "--workers", workers))
    none, two = (checkpoint.read(tmp_path / workers / "ckpt.pt")["state"]
                 for workers in ("0", "2"))
    assert all(torch.equal(none[name], two[name]) for name in none)


@pytest.mark.parametrize("there", [False, True])
def test_without_data_it_is_bertax_if_it_is_there_else_the_demo(
    there, short, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(short)  # as if made before
    if there:
        (tmp_path / "data" / "bertax").symlink_to(short)
    arguments = command("tiny-nt", "full", None, weights, "run", "--max-steps", "1")
    at = arguments.index("--data")
    train.main(arguments[:at] + arguments[at + 2:])
    line, = [line for line in capsys.readouterr().out.splitlines() if "--data" in line]
    if there:
        assert line == "no --data given: data/bertax"
    else:
        assert line == "no --data given: data/demo, simulated (there is no data/bertax)"
    settings = json.loads((tmp_path / "run" / "args.json").read_text())
    assert settings["data"] == ("data/bertax" if there else "data/demo")


def test_torchrun_leaves_our_flags_alone():
    """torchrun takes an unambiguous prefix for its own option and refuses an ambiguous one: only
    --r needs the "--".
    """
    parser = get_args_parser()
    sources = (ROOT / "train.py").read_text()
    sources += (ROOT / "taxa" / "training" / "flags.py").read_text()
    flags = set(re.findall(r'\w+\(\s*"(--[a-z-]+)"', sources)) - {"--r"} | {"--lora-r"}
    assert len(flags) > 20
    for flag in flags:
        read = parser.parse_args(["--nproc_per_node", "2", "train.py", flag, "1"])
        assert read.training_script_args == [flag, "1"]
    read = parser.parse_args(["--nproc_per_node", "2", "--", "train.py", "--r", "4"])
    assert read.training_script_args == ["--r", "4"]


def test_dry_run_prints_one_json_line_and_needs_no_network(tmp_path):
    done = python(ROOT / "train.py", "--model", "nt50m", "--strategy", "lora", "--r", "4",
                  "--dry-run", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    line, = done.stdout.splitlines()
    printed = json.loads(line)
    assert printed["trainable"] == 24_576 * 4 + 512 * (4 + 57 + 1884) + (4 + 57 + 1884)
    assert round(printed["published_fraction"], 4) == 0.0017
    assert set(printed) == {"model", "strategy", "r", "heads",
                            "trainable", "total", "fraction", "published_fraction", "names"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [
    (["--model", "nt51m"], "unknown model 'nt51m'.*nt50m"),
    (["--strategy", "lorra"], "unknown strategy 'lorra'.*lora"),
    (["--strategy", "full", "--r", "4"], "--r is for --strategy lora"),
    (["--strategy", "freeze75", "--lora-alpha", "8"], "--lora-alpha is for --strategy lora"),
    (["--strategy", "full", "--heads", "frozen"], "--heads frozen"),
    (["--strategy", "lora", "--protocol", "published", "--heads", "train"], "--protocol published"),
    (["--strategy", "lora", "--targets", "nothing.here"],
     "target 'nothing.here' matches no module"),
    (["--r", "0", "--strategy", "lora"], "--r"),
    (["--lr", "nan"], "--lr"),
    (["--data", "nowhere"], "nowhere: no such folder"),
    (["--weights", "nowhere"], "--weights .*nowhere: no such folder"),
    (["--precision", "tf32", "--device", "cpu"], "tf32 needs a CUDA device"),
    (["--revision", "main"], "--revision"),
    (["--num-classes", "4", "5", "6"], "--num-classes"),
    (["--resume", "--overwrite"], "give one of them"),
    (["--warmup-steps", "9", "--max-steps", "9"], "--warmup-steps"),
    (["--seed", "4294967296"], "--seed"),
    (["--bogus"], "--bogus"),
])
def test_wrong_input_of_train(flags, message, short, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {
        "--model": "tiny-nt", "--strategy": "full",
        "--data": str(short), "--weights": str(weights["tiny-nt"]),
    }
    arguments = []
    for flag, value in given.items():
        if flag not in flags:
            arguments += [flag, value]
    with pytest.raises(train.InputError, match=message):
        train.main([*arguments, *flags])
    assert not list(tmp_path.iterdir())


def test_wrong_input_is_one_line_and_exit_status_2(short, tmp_path):
    """By a process of its own; tests/test_wrong_input.py has the kinds."""
    done = python(ROOT / "evaluate.py", short / "manifest.json", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    line, = done.stderr.splitlines()
    assert line.startswith("evaluate.py: error: ")
    assert not list(tmp_path.iterdir())


def test_a_run_folder_is_not_overwritten_unasked(short, weights, tmp_path):
    arguments = command("tiny-nt", "full", short, weights, tmp_path / "run", "--max-steps", "1")
    train.main(arguments)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    with pytest.raises(train.InputError, match="exists"):
        train.main(arguments)
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    train.main([*arguments, "--overwrite"])
    with pytest.raises(train.InputError, match="other settings: --lr: 0.01 then, 0.5 now"):
        train.main([*arguments, "--lr", "0.5", "--resume"])


def test_resume_of_a_stopped_run_only_tests_again(short, weights, tmp_path, monkeypatch):
    """Stopped by patience after epoch 2: --resume must not train on."""
    arguments = command("tiny-nt", "full", short, weights, tmp_path / "run",
                        "--epochs", "5", "--patience", "1", "--batch-size", "64")
    losses = iter([1.0, 2.0, 0.5, 0.4])
    run_split = train.run_split

    def with_these_losses(w, model, split, *rest, **more):
        outcome = run_split(w, model, split, *rest, **more)
        return outcome._replace(loss=next(losses)) if split.name == "validation" else outcome

    monkeypatch.setattr(train, "run_split", with_these_losses)
    first = train.main(arguments)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert train.main([*arguments, "--resume"]) == first
    assert (tmp_path / "run" / "log.jsonl").read_text() == log
    with pytest.raises(train.InputError, match="resume state|state for --resume"):
        evaluate.main([str(tmp_path / "run" / "last.pt")])


def test_overwrite_spares_what_is_not_a_run(short, weights, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    with pytest.raises(train.InputError, match="not a run folder"):
        train.main(command("tiny-nt", "full", short, weights, tmp_path / "thesis", "--overwrite"))
    arguments = command("tiny-nt", "full", short, weights, tmp_path / "run", "--max-steps", "1")
    train.main(arguments)
    (tmp_path / "run" / "note").write_text("mine")
    train.main([*arguments, "--overwrite"])
    assert (tmp_path / "run" / "note").read_text() == "mine"
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years"


def test_seeded_base_weights_do_not_depend_on_who_builds_them():
    """They are pinned, so that another version of transformers or torch that draws differently is
    seen.
    """
    for model, digest in PINNED.items():
        base = checkpoint.load_base(model, {"source": "seed", "seed": 0})
        assert checkpoint.weights_digest(base)[:16] == digest


def test_evaluate_refuses_other_classes(short, weights, tmp_path):
    train.main(command("tiny-nt", "lora", short, weights, tmp_path / "run", "--max-steps", "1"))
    path = str(tmp_path / "run" / "ckpt.pt")
    other = tmp_path / "other"
    fasta = tmp_path / "two.fa"
    dump = short / "source" / "taxdmp_simulated.zip"
    records = (short / "source" / "Bacteria_db.fa").read_text().split(">")[1:]
    fasta.write_text("".join(f">{record}" for record in records))
    prepare.main(["--fasta", str(fasta), "--taxdump", str(dump), "--any-length",
                  "--out", str(other)])
    with pytest.raises(train.InputError, match="different classes"):
        evaluate.main([path, "--data", str(other), "--out", str(tmp_path / "out")])
    with pytest.raises(train.InputError, match="is not the dataset"):
        evaluate.main([path, "--data", str(other)])
    with pytest.raises(train.InputError, match="not those of the run"):
        torch.manual_seed(1)
        folder = tmp_path / "weights"
        load_backbone("tiny-nt", weights["tiny-nt"], pretrained=False).save_pretrained(folder)
        evaluate.main([path, "--weights", str(folder)])
