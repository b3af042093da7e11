"""Wrong input to every script: exit status 2, one line on stderr, no traceback, nothing written.

{name} in a command stands for a path: files below are made once, and the whole folder is compared
before and after.
"""
import gzip
import hashlib
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from helpers import command

import evaluate
import export
import predict
import prepare
import pretrain
import probe_batch
import train
from taxa.runtime import cli
from taxa.training import checkpoint

SCRIPTS = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "pretrain": pretrain,
    "probe_batch": probe_batch,
}
TRAIN = (
    "--model tiny-nt --strategy full --data {data} --weights {weights} --out {out} --max-steps 1 "
)
LORA = TRAIN.replace("full", "lora")
PREPARE = "--taxdump {dump} --any-length --out {out} --fasta "
PRETRAIN = "--model tiny-nt --data {data} --out {out} --max-steps 1 --warmup-steps 0 "

WRONG = [
    # flags
    ("train", "", "--model"),
    ("train", TRAIN + "--epochs 0", "--epochs"),
    ("train", TRAIN + "--epochs two", "--epochs"),
    ("train", TRAIN + "--batch-size -1", "--batch-size"),
    ("train", TRAIN + "--lr 0", "--lr"),
    ("train", TRAIN + "--lr inf", "--lr"),
    ("train", TRAIN + "--weight-decay nan", "--weight-decay"),
    ("train", TRAIN + "--save-every 0", "--save-every"),
    ("train", TRAIN + "--save-every 0m", "--save-every"),
    ("train", TRAIN + "--save-every m", "--save-every"),
    ("train", TRAIN + "--save-every nanm", "--save-every"),
    ("train", TRAIN + "--save-every 5h", "--save-every"),
    ("train", TRAIN + "--max-bad-steps 0", "--max-bad-steps"),
    ("train", TRAIN + "--precision fp8", "--precision"),
    ("train", TRAIN + "--device tpu", "--device"),
    ("train", TRAIN + "--seed -1", "--seed"),
    ("train", TRAIN + "--r 4", "--r is for --strategy lora"),
    ("train", LORA + "--lora-dropout 1", "--lora-dropout"),
    ("train", LORA + "--targets nothing.here", "matches no module"),
    ("train", TRAIN + "--resume --overwrite", "give one of them"),
    ("train", TRAIN.replace("{out}", "{full}") + "--resume", "not a run folder"),
    ("train", TRAIN + "--warmup-steps 7", "--warmup-steps"),
    ("train", TRAIN.replace("{out}", "{text}"), "is a file"),
    ("train", TRAIN.replace("{out}", "{full}") + "--overwrite", "not a run folder"),
    ("train", TRAIN.replace("tiny-nt", "tiny-tn"), "tiny-nt"),
    # data and weights
    ("train", TRAIN.replace("{data}", "{text}"), "no such folder"),
    ("train", TRAIN.replace("{data}", "{full}"), "no manifest.json"),
    ("train", TRAIN.replace("{data}", "{cut_manifest}"), "not the manifest"),
    ("train", TRAIN.replace("{data}", "{list_manifest}"), "not the manifest"),
    ("train", TRAIN.replace("{data}", "{flipped_manifest}"), "damaged"),
    ("train", TRAIN.replace("{data}", "{cut_tokens}"), "bytes, but the manifest says"),
    ("train", TRAIN.replace("{data}", "{flipped_tokens}"), "damaged"),
    ("train", TRAIN.replace("{data}", "{no_labels}"), "labels.npy: missing"),
    ("train", TRAIN.replace("{weights}", "{full}"), "no config.json"),
    ("train", TRAIN.replace("{weights}", "{cut_weights}"), "cannot load weights"),
    ("train", TRAIN.replace("{weights}", "{huge_header}"), "cannot load weights"),
    ("train", TRAIN.replace("{weights}", "{foreign_weights}"), "do not fit"),
    ("train", LORA + "--adapters {full}", "adapter"),
    # checkpoints
    ("evaluate", "{missing}", "no such file"),
    ("evaluate", "{full}", "folder"),
    ("evaluate", "{text}", "not a checkpoint"),
    ("evaluate", "{cut_ckpt}", "cut short"),
    ("evaluate", "{flipped_ckpt}", "damaged"),
    ("evaluate", "{unsealed_ckpt}", "does not end in its digest"),
    ("evaluate", "{last}", "state for --resume"),
    ("evaluate", "{ckpt} --data {missing} --out {out}", "no such folder"),
    ("evaluate", "{ckpt} --split all --out {out}", "--split"),
    ("evaluate", "{ckpt} --weights {full} --out {out}", ""),
    ("predict", "{flipped_ckpt} {fasta} --out {out}", "damaged"),
    ("predict", "{ckpt} {missing} --out {out}", "no such file"),
    ("predict", "{ckpt} {cut_gzip} --out {out}", "gzip"),
    ("predict", "{ckpt} {text} --out {out}", ""),
    ("predict", "{ckpt} {fasta} --top-k 0 --out {out}", "--top-k"),
    ("export", "{flipped_ckpt} --out {out}", "damaged"),
    ("export", "{ckpt} --out {full}", "exists"),
    ("pretrain", PRETRAIN + "--mask-fraction 2", "--mask-fraction"),
    ("pretrain", PRETRAIN + "--save-every 0", "--save-every"),
    ("pretrain", PRETRAIN.replace("{out}", "{full}") + "--resume", "not a run folder"),
    ("pretrain", PRETRAIN.replace("{data}", "{flipped_tokens}"), "damaged"),
    ("probe_batch", "--model tiny-nt --strategy fulll", "full"),
    ("probe_batch", "--model tiny-nt --strategy full --memory-limit 1XB", "--memory-limit"),
    # preparation
    ("prepare", PREPARE + "{missing}", "no such file"),
    ("prepare", PREPARE + "{text}", "neither FASTA nor FASTQ"),
    ("prepare", PREPARE + "{empty}", "empty"),
    ("prepare", PREPARE + "{cut_gzip}", "gzip"),
    ("prepare", PREPARE + "{protein}", "protein"),
    ("prepare", PREPARE + "{no_taxid}", "taxid"),
    ("prepare", PREPARE.replace("{dump}", "{text}") + "{fasta}", "archive"),
    ("prepare", PREPARE.replace("{dump}", "{cut_dump}") + "{fasta}", "archive"),
    ("prepare", PREPARE.replace("{out}", "{full}") + "{fasta}", "exists"),
    ("prepare", PREPARE + "{fasta} --test 1", "--test"),
    ("prepare", "--add-tokens tiny-dnabert --out {full}", "not a prepared dataset"),
]


@pytest.fixture(scope="module")
def paths(short, weights, tmp_path_factory):
    """{name: path} of things that are right, and of things that are not."""
    root = tmp_path_factory.mktemp("wrong")
    at = {name: root / name for name in ("out", "missing")}

    def file(name, content):
        at[name] = root / name
        at[name].write_bytes(content)

    def damaged(name, of, inside, change):
        at[name] = shutil.copytree(of, root / name)
        path = at[name] / inside
        content = change(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    def flip(content):
        return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]

    (root / "full").mkdir()
    (root / "full" / "thesis.tex").write_text("years")
    one_step = ["--max-steps", "1", "--batch-size", "32"]
    train.main(command("tiny-nt", "lora", short, weights, root / "run", *one_step))
    at |= {
        "full": root / "full",
        "data": short,
        "weights": weights["tiny-nt"],
        "ckpt": root / "run" / "ckpt.pt",
        "last": root / "run" / "last.pt",
        "dump": short / "source" / "taxdmp_simulated.zip",
        "fasta": short / "source" / "Bacteria_db.fa",
    }
    file("text", b"Dear reader,\n")
    file("empty", b"")
    file("protein", b">9606 0\nMEFILPQEFILPQMEFILPQ\n")
    file("no_taxid", b">chr1\nACGT\n")
    file("cut_gzip", gzip.compress(at["fasta"].read_bytes())[:-200])
    file("cut_dump", at["dump"].read_bytes()[:-200])
    file("cut_ckpt", at["ckpt"].read_bytes()[:-200])
    content = at["ckpt"].read_bytes()
    file("flipped_ckpt", flip(content[:-200]) + content[-200:])
    torch.save({"format": checkpoint.CHECKPOINT, "version": 1}, root / "unsealed_ckpt")
    at["unsealed_ckpt"] = root / "unsealed_ckpt"

    def one_sequence_more(content):
        return content.replace(b'"sequences": 400', b'"sequences": 401')

    def huge_header(content):
        return np.uint64(2**62).tobytes() + content[8:]

    def foreign(content):
        return (weights["tiny-dnabert"] / "model.safetensors").read_bytes()

    damaged("cut_manifest", short, "manifest.json", lambda content: content[:-200])
    damaged("list_manifest", short, "manifest.json", lambda content: b"[]")
    damaged("flipped_manifest", short, "manifest.json", one_sequence_more)
    damaged("cut_tokens", short, "train/nt.bin", lambda content: content[:-200])
    damaged("flipped_tokens", short, "train/nt.bin", flip)
    damaged("no_labels", short, "test/labels.npy", lambda content: None)
    of, inside = weights["tiny-nt"], "model.safetensors"
    damaged("cut_weights", of, inside, lambda content: content[:-200])
    damaged("huge_header", of, inside, huge_header)
    damaged("foreign_weights", of, inside, foreign)
    return root, at


def digests(root):
    """{path: digest} of every file below a folder but locks, and of every folder."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
    }


IDS = [f"{script} {arguments}"[-60:] for script, arguments, _ in WRONG]


@pytest.mark.parametrize("script, arguments, words", WRONG, ids=IDS)
def test_one_line_status_2_and_nothing_written(
    script, arguments, words, paths, capsys, monkeypatch,
):
    root, at = paths
    monkeypatch.chdir(root)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.argv", [f"{script}.py"])
    before = digests(root)
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: SCRIPTS[script].main(shlex.split(arguments.format(**at))))
    out, err = capsys.readouterr()
    line, = err.splitlines()
    assert left.value.code == 2
    assert line.startswith(f"{script}.py: error: ") and words in line
    # What a preparation needs it says before it starts.
    assert out == "" or script == "prepare" and out.startswith("needs about ")
    assert "Traceback" not in err
    assert digests(root) == before


def test_there_are_forty_and_the_input_is_otherwise_right(paths):
    assert len(WRONG) >= 40
    assert len({(script, arguments) for script, arguments, _ in WRONG}) == len(WRONG)
    root, at = paths
    train.main(shlex.split(TRAIN.format(**at)))
    assert json.loads((root / "out" / "metrics.json").read_text())["sequences"] == 54
    shutil.rmtree(root / "out")
    prepare.main(shlex.split((PREPARE + "{fasta}").format(**at)))
    shutil.rmtree(root / "out")
    evaluate.main([str(at["ckpt"]), "--out", str(root / "out")])
    shutil.rmtree(root / "out")
