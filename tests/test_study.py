"""study.py: the plan, the queue with all that can happen to it, SLURM's script.

train.py is a stand-in except where its numbers matter.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

import study
import train
from taxa.backbones import MODELS
from taxa.errors import InputError, Stop
from taxa.study import grid, queue, rates
from taxa.study.published_runs import published_rows
from taxa.study.run_folders import read_run

# A stand-in for train.py. It takes STEPS steps, each slow enough to be hit, saves after each, and
# ends with numbers that depend on its settings and on every step.
TRAIN = '''
import fcntl, json, os, signal, sys, time
if "--help" in sys.argv:
    sys.exit(print("--model --strategy --r --protocol --lr --epochs --batch-size --accumulate "
                   "--data-fraction --data --seed --resume --out "
                   "--compile --precision --heads --device --max-steps --weights"))
flags = {}
for word in sys.argv[1:]:
    if word.startswith("--"):
        flags[word[2:]] = True
        last = word[2:]
    else:
        flags[last] = word
out = flags["out"]
os.makedirs(out, exist_ok=True)
lock = open(out + "/.lock", "w")
try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit("train.py: error: in use")
if flags["model"] == "full-disk":
    print("train.py: error: ckpt.pt: No space left on device", file=sys.stderr)
    print("and a report behind it", file=sys.stderr)
    sys.exit(2)
if flags["model"] == "taken":
    sys.exit("torch.OutOfMemoryError: CUDA out of memory.")
if flags["model"] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(out + "/log.jsonl", "w").close()
    time.sleep(60)
if flags["model"] == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
signal.signal(signal.SIGUSR1, lambda *_: stopping.append(1))
names = {"lr": float, "epochs": int, "batch-size": int, "seed": int, "r": int,
         "data-fraction": float, "accumulate": int}
args = {"batch_size": 4, "accumulate": 1, "lr": 0.1}
for name, value in flags.items():
    args[name.replace("-", "_")] = value if value is True else names.get(name, str)(value)
args["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES")
environment = {"command": sys.argv, "processes": 1, "dataset": "d1"}
for name, content in (("args", args), ("environment", environment)):
    with open(f"{out}/{name}.json", "w") as file:
        json.dump(content, file)
step, value = 0, 1.0
total = int(os.environ.get("STEPS", 3))
if os.path.exists(out + "/last.json"):
    step, value = json.load(open(out + "/last.json"))
while step < total:
    time.sleep(float(os.environ.get("PAUSE", 0.02)))
    value *= 1 + float(flags.get("lr", 1)) * (step + int(flags["seed"]))
    step += 1
    with open(out + "/last.tmp", "w") as file:
        json.dump([step, value], file)
    os.replace(out + "/last.tmp", out + "/last.json")
    line = {"epoch": 1, "step": step, "steps": total, "loss": 1.0, "sequences_per_s": 8.0}
    with open(out + "/log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\\n")
    if stopping:
        print("train.py: saved", file=sys.stderr)
        sys.exit(75)
with open(out + "/metrics.tmp", "w") as file:
    json.dump({"ranks": {"genus": {"balanced_accuracy": value}}}, file)
os.replace(out + "/metrics.tmp", out + "/metrics.json")
'''
STUDY = ("import pathlib, sys, study; from taxa.runtime.cli import run; "
         "study.TRAIN = pathlib.Path(sys.argv.pop(1)); run(study.main)")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a stand-in for train.py and for prepared data.

    study.main() in it runs the stand-in.
    """
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "data").mkdir()
    manifest = {"digest": "d1", "splits": {"train": 1000}}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(study, "gpus", lambda: ([], None))
    return tmp_path


def write_grid(*lines, header="model,strategy,lr"):
    Path("grid.csv").write_text("\n".join([header, *lines]) + "\n")


def main(*words):
    study.main(["--grid", "grid.csv", "--data", "data", "--out", "runs", *words])


@contextlib.contextmanager
def start(*words, **environment):
    """study.py in a process of its own, with the stand-in of the working directory.

    It is killed at the end of the block if it still runs.
    """
    command = [sys.executable, "-c", STUDY, str(Path("train.py").resolve()),
               "--grid", "grid.csv", "--data", "data", "--out", "runs", *words]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | environment) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition, seconds=30):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "nothing happened"
        time.sleep(0.02)


def metrics(folder="runs"):
    return {path.parent.name: path.read_text() for path in Path(folder).glob("*/metrics.json")}


# ---------------------------------------------------------------- the plan

def plan_of(*words):
    return study.make_plan(study.parse_args(list(words)))


def test_the_published_grid_is_the_table_in_two_protocols_and_seeds():
    plan = plan_of("--seeds", "3")
    assert len(plan) == 33 * 2 * 3 == len({each.name for each in plan})
    table = published_rows()
    for each in plan:
        args = train.parse_args(grid.words_of(each.flags))  # a command that train.py takes
        row = table[each.published.row - 1]
        assert (args.model, args.strategy, args.r) == (row.model, row.strategy, row.r)
        assert (args.lr, args.epochs) == (row.learning_rate, row.epochs) and args.resume
        assert (args.data_fraction or 1) == row.data_fraction
        assert args.batch_size == MODELS[args.model].batch_size
        assert args.accumulate == (4 if "dnabert" in args.model else 1)
    assert [(each.flags["protocol"], each.flags["seed"]) for each in plan[::33]] == [
        (protocol, seed) for seed in ("42", "43", "44") for protocol in ("corrected", "published")]


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_a_step_holds_as_many_sequences_on_any_number_of_gpus(gpus):
    for each in plan_of("--gpus-per-run", str(gpus)):
        expected = 128 if each.flags["model"] == "nt50m" else 64
        flags = each.flags
        assert int(flags["batch-size"]) * int(flags.get("accumulate", 1)) * gpus == expected


def test_filters_and_flags_for_all():
    common = "--precision bf16 --compile --epochs 1"
    plan = plan_of("--protocol", "corrected", "--models", "nt50m", "--strategies", "lora", "ia3",
                   "--set", common)
    assert [each.published.row for each in plan] == [17, 18, 23, 24, 25, 26, 27]
    for each in plan:
        assert [each.flags[name] for name in ("precision", "compile", "epochs")] == [
            "bf16", "yes", "1"]
    two = plan_of("--rows", "5", "32", "--protocol", "published")
    assert [each.published.row for each in two] == [5, 32]
    own = plan_of("--models", "nt50m", "--set", "--batch-size 32")[0].flags
    assert own["batch-size"] == "32" and "accumulate" not in own
    words = study.command(plan[0], 4, here=False)
    assert words[:5] == ["torchrun", "--standalone", "--nproc_per_node", "4", "--"]
    assert words[-2:] == ["--out", f"runs/study/{plan[0].name}"]


def test_the_plan_needs_no_torch_no_data_and_three_seconds(tmp_path):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    code = "import sys, study; study.main(sys.argv[1:]); assert 'torch' not in sys.modules"

    def dry_run(*words):
        return subprocess.run([sys.executable, "-c", code, "--dry-run", *words], cwd=tmp_path,
                              env=environment, capture_output=True, text=True)

    began = time.time()
    done = dry_run("--seeds", "3", "--card", "h100")
    assert done.returncode == 0 and time.time() - began < 3, done.stderr
    *lines, total = done.stdout.splitlines()
    assert len(lines) == 198 and not list(tmp_path.iterdir())
    row26 = next(line for line in lines if "/row26-nt50m-lora-r4-corrected-seed42" in line)
    assert "python " in row26
    assert ("published superkingdom 0.8869 phylum 0.4859 genus 0.0329 in 11.08 h; "
            "estimate 11.40 h") in row26
    assert "  # waiting; " in row26
    assert train.parse_args(shlex.split(row26.partition("#")[0])[2:]).r == 4
    said = (r"# 198 runs; published 9,917 h; estimate on h100 2,\d+ GPU hours for 138 of them, "
            "no estimate for 60")
    assert re.fullmatch(said, total)
    done = dry_run("--rows", "6", "--num-classes", "4", "57", "1884")
    args = train.parse_args(shlex.split(done.stdout.splitlines()[0].partition("#")[0])[2:])
    assert args.dry_run and args.num_classes == [4, 57, 1884] and "no estimate" in done.stdout


def test_hours_are_of_what_was_measured_alone():
    measured = {"model": "nt50m", "strategy": "full", "precision": "fp32", "compile": None}
    table = [{"device": "NVIDIA H100 80GB", **measured, "sequences_per_s": 100.0}]
    flags = {"model": "nt50m", "strategy": "full", "epochs": "2"}
    assert rates.hours(flags, 360_000, "h100", table) == 2.0
    assert rates.hours(flags | {"strategy": "random"}, 360_000, "H100", table) == 2.0
    assert rates.hours(flags | {"data-fraction": "0.5"}, 360_000, "h100", table) == 1.0
    for other in ({"strategy": "lora"}, {"model": "nt100m"}, {"precision": "bf16"},
                  {"compile": "yes"}, {"max-steps": "5"}, {"activation-checkpointing": "full"}):
        assert rates.hours(flags | other, 360_000, "h100", table) is None
    assert rates.hours(flags, 360_000, "a100", table) is None
    assert rates.hours(flags, 360_000, None, table) is None
    assert rates.hours(flags, 1, "h100", table, 4) is None
    cell = {"kind": "speed", "impl": "taxa", **measured, "sequences_per_s": 9.99, "status": "done"}
    others = [{"impl": "peer"}, {"kind": "ceiling"}, {"status": "out of memory"}]
    document = {"device": "X", "cells": [cell, *(cell | other for other in others)]}
    assert [row["sequences_per_s"] for row in rates.table_of(document, "2026-01-01")] == [10.0]
    shipped = rates.read_rates()
    assert shipped and all(row["sequences_per_s"] > 0 for row in shipped)


def test_a_grid_of_ones_own(here):
    write_grid("few,tiny-nt,full,0.003,,,1 2",
               "few,tiny-nt,lora,0.01,4,frozen,1",
               "sub dir/few,ORG/NAME,ia3,1e-2,,,",
               "",
               header="data,model,strategy,lr,r,heads,seed")
    names = [each.name for each in plan_of("--grid", "grid.csv", "--seeds", "2")]
    assert names == [
        "few-tiny-nt-full-lr0.003-seed1",
        "few-tiny-nt-lora-lr0.01-r4-heads-frozen-seed1",
        "few-NAME-ia3-lr1e-2-seed42",
        "few-tiny-nt-full-lr0.003-seed2",
        "few-NAME-ia3-lr1e-2-seed43",
    ]
    write_grid("a,tiny-nt,full,yes", "b,tiny-nt,full,", header="name,model,strategy,compile")
    plan = plan_of("--grid", "grid.csv", "--data", "data")
    assert [each.name for each in plan] == ["a-seed42", "b-seed42"]
    assert "--compile" in grid.words_of(plan[0].flags)
    assert grid.flags_of(study.command(plan[0], 1)) == plan[0].flags


@pytest.mark.parametrize("header, lines, message", [
    ("model,lr", ["tiny-nt,1"], "no column strategy"),
    ("model,strategy,lr", ["tiny-nt,full"], "line 2: 2 cells, but the first line has 3"),
    ("model,strategy", ["tiny-nt,full", "tiny-nt,full"],
     "line 3: tiny-nt-full-seed42 is line 2 as well"),
    ("model,strategy,out", ["tiny-nt,full,x"], "--out is study.py's own"),
    ("model,strategy,model", ["a,b,c"], "two columns"),
    ("model,strategy,seed", ["a,b,x"], "line 2: seed 'x' is not a number"),
    ("name,model,strategy", ["../x,a,b"], "line 2: '../x' cannot name a folder"),
    ("model,strategy", [",full"], "line 2: model and strategy must be given"),
    ("model,strategy", [], "no run below"),
    ("model,strategy,learnin-rate", ["tiny-nt,full,1"],
     "line 2: train.py has no flag --learnin-rate"),
])
def test_a_wrong_grid_is_one_line_and_nothing_is_written(header, lines, message, here):
    write_grid(*lines, header=header)
    with pytest.raises(InputError, match=message):
        main()
    assert not (here / "runs").exists()


@pytest.mark.parametrize("words, message", [
    ("--grid no.csv", "no.csv: no such file"),
    ("--grid grid.csv --protocol both", "has a column for it"),
    ("--num-classes 4", "goes with --dry-run"),
    ("--dry-run --status", "give one of them"),
    ("--models nt50mm", "did you mean nt50m"),
    ("--strategies lroa", "did you mean lora"),
    ("--rows 34", "unknown row '34'"),
    ("--gpus-per-run 3", "does not divide the 64 sequences"),
    ("--set bf16", "begins with no flag"),
    ("--set=--seed=3", "--seed is not for all runs alike"),
    ("--data data --set=--lrr=3", "--set: train.py has no flag --lrr; did you mean lr"),
    ("", "data/bertax: not a prepared dataset"),
    ("--models nt50m --strategies lora --rows 1", "unknown row '1': choose from 23 24 25 26 27"),
    ("--grid grid.csv --models tiny-nt --strategies ia3",
     "unknown strategy 'ia3': choose from full"),
])
def test_wrong_flags(words, message, here):
    write_grid("tiny-nt,full,1", "nt50m,ia3,1")
    with pytest.raises(InputError, match=message):
        study.main(words.split())
    assert not (here / "runs").exists()


@pytest.mark.parametrize("name, runs", [
    ("paper_mini", 44), ("paper_mini_quick", 25), ("heads", 90), ("slurm_trial", 3)])
def test_the_grids_that_come_with_the_project(name, runs):
    path = ROOT / "experiments" / f"{name}.csv"
    plan = plan_of("--grid", str(path), "--set", "--epochs 1 --batch-size 16")
    assert len(plan) == runs
    for each in plan:
        args = train.parse_args(grid.words_of(each.flags))
        of_weights = args.model == "tiny-dnabert" and args.strategy != "random"
        assert args.batch_size == 16 and (args.weights is not None) == of_weights
    if name == "heads":
        assert sum(each.flags.get("max-steps") == "200" for each in plan) == 30
        assert sum("/real" in each.flags["data"] for each in plan) == 30


def test_the_miniature_pretrains_on_genomes_of_its_own():
    """The Makefile's simulated data.

    A genus needs three sequences to be in all splits, and no seed of the pretraining is one of the
    study.
    """
    made = re.findall(r"call genomes,data/paper-mini/([\w-]+),(\d+),(\d+),(\d+)",
                      (ROOT / "Makefile").read_text())
    assert [name for name, *_ in made] == [
        "few", "many", "few-quick", "pretraining", "pretraining-quick"]
    assert all(int(sequences) / int(genera) >= 3 for _, genera, sequences, _ in made)
    of_pretraining = {seed for name, *_, seed in made if "pretraining" in name}
    assert of_pretraining.isdisjoint(seed for name, *_, seed in made if "few" in name)


# ---------------------------------------------------------------- the queue

def test_it_goes_on_where_it_stopped_and_names_other_settings(here, capsys):
    write_grid("tiny-nt,full,0.1", "tiny-nt,ia3,0.2")
    main("--seeds", "2", "--jobs", "2")
    printed = capsys.readouterr().out
    assert "0/4 done, 2 running, 0 failed" in printed
    assert "4/4 done, 0 running, 0 failed" in printed
    assert "all 4 runs are done: python report.py runs" in printed
    before = metrics()
    assert len(before) == 4
    log = here / "runs" / "tiny-nt-ia3-lr0.2-seed43.txt"
    assert re.fullmatch(r"\$ .*train.py --model .*\nexit status 0\n", log.read_text())
    (here / "runs" / "tiny-nt-ia3-lr0.2-seed43" / "metrics.json").unlink()
    main("--seeds", "2")
    # That one alone ran again.
    assert metrics() == before and log.read_text().count("exit status 0\n") == 2

    message = "tiny-nt-full-lr0.1-seed42 was run with --epochs None, and now it is 3"
    with pytest.raises(InputError, match=message):
        main("--set", "--epochs 3")
    write_grid("a,tiny-nt,full,0.1", header="name,model,strategy,lr")
    main()
    for changed, message in (
            ("a,tiny-nt,full,0.3", "a-seed42 was run with --lr 0.1, and now it is 0.3"),
            ("a,tiny-nt,ia3,0.1", "was run with --strategy full, and now it is ia3"),
            ("a,tiny-nt,full,", "was run with --lr 0.1, and now without")):
        write_grid(changed, header="name,model,strategy,lr")
        for words in ([], ["--dry-run"]):
            with pytest.raises(InputError, match=message):
                main(*words)
    write_grid("a,tiny-nt,full,0.1", header="name,model,strategy,lr")
    main("--set", "--device cpu")  # changes no number
    (here / "data" / "manifest.json").write_text(json.dumps({"digest": "d2"}))
    with pytest.raises(InputError, match="was run on other data"):
        main()


def test_what_may_differ_from_a_plan():
    """By hand: paths, what changes no number, and what is compared by its product."""
    assert set(grid.MAY_DIFFER) == {
        "data", "weights", "fasta", "tokenizer-file", "out",
        "workers", "device", "activation-checkpointing", "max-bad-steps",
        "resume", "overwrite", "save-every", "log-every", "float16",
        "dry-run", "num-classes", "ranks",
        "batch-size", "accumulate",
    }  # fmt: skip


def test_sequences_per_step_are_compared_as_a_product(here):
    write_grid("a,tiny-nt,full,8,", header="name,model,strategy,batch-size,accumulate")
    main()
    write_grid("a,tiny-nt,full,4,2", header="name,model,strategy,batch-size,accumulate")
    main()
    write_grid("a,tiny-nt,full,4,1", header="name,model,strategy,batch-size,accumulate")
    message = "was run with 8 sequences per step .*, and now there are 4"
    with pytest.raises(InputError, match=message):
        main()


def test_a_run_that_fails_stops_no_other(here, capsys):
    write_grid("full-disk,full,1", "taken,full,1", "crash,full,1", "tiny-nt,full,1")
    with pytest.raises(Stop, match="3 of 4 runs failed") as stop:
        main()
    assert stop.value.status == 1
    printed = capsys.readouterr().out
    assert ("failed: full-disk-full-lr1-seed42: train.py: error: ckpt.pt: "
            "No space left on device (runs/full-disk") in printed
    assert ("failed: taken-full-lr1-seed42: torch.OutOfMemoryError: "
            "CUDA out of memory.") in printed
    assert "failed: crash-full-lr1-seed42: ended by SIGKILL (out of memory?)" in printed
    assert "1/4 done, 0 running, 3 failed" in printed
    assert list(metrics()) == ["tiny-nt-full-lr1-seed42"]
    with open("runs/taken-full-lr1-seed42.txt", "a") as log:
        log.write("$ python train.py, started again\n")
    assert grid.state(Path("runs/taken-full-lr1-seed42")) == ("running", "")
    with open("runs/taken-full-lr1-seed42.txt", "a") as log:
        log.write("exit status 1\n")
    assert grid.state(Path("runs/taken-full-lr1-seed42")) == ("failed", "it printed nothing")
    main("--status")
    table = capsys.readouterr().out
    assert "1 done" in table and "3 failed" in table
    assert "No space left on device" in table


def test_ctrl_c_saves_and_a_second_study_is_refused(here, capsys):
    write_grid("tiny-nt,full,0.1", "tiny-nt,ia3,0.2", "tiny-nt,random,0.3")
    with start("--jobs", "2", STEPS="400") as first:
        wait_for(lambda: len(list(Path("runs").glob("*/log.jsonl"))) == 2)
        began = time.time()
        with pytest.raises(InputError, match="runs: another study.py is at work there"):
            main()
        assert time.time() - began < 1
        main("--status")
        table = capsys.readouterr().out
        assert "2 running; 1 waiting" in table
        assert re.search(r"tiny-nt-full-lr0.1-seed42 +running +1 +- +0.00", table)
        first.send_signal(signal.SIGINT)
        out, err = first.communicate(timeout=30)
        assert first.returncode == 75, out + err
        assert "SIGINT: all runs have left and saved" in err, out + err
        assert "failed:" not in out, out + err
    main("--status")
    assert "2 stopped; 1 waiting" in capsys.readouterr().out
    steps = [json.loads(path.read_text())[0] for path in Path("runs").glob("*/last.json")]
    assert len(steps) == 2 and all(0 < step < 400 for step in steps)
    main()
    assert len(metrics()) == 3


def test_a_second_ctrl_c_does_not_wait(here):
    write_grid("deaf,full,1")
    with start() as queue_of_one:
        wait_for(lambda: Path("runs/deaf-full-lr1-seed42/log.jsonl").exists())
        queue_of_one.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            queue_of_one.wait(1)
        queue_of_one.send_signal(signal.SIGINT)
        assert queue_of_one.wait(10) == 130
    with open("runs/deaf-full-lr1-seed42/.lock") as lock:
        # Nobody holds it: the run is gone.
        fcntl.lockf(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_killed_twice_it_ends_as_one_that_was_not(here):
    strategies = ("full", "ia3", "lora")
    write_grid(*(f"tiny-nt,{strategy},{lr}" for strategy in strategies for lr in (0.1, 0.2)))
    main("--seeds", "2", "--jobs", "4")
    Path("runs").rename("undisturbed")
    rng = np.random.RandomState(0)
    for _ in range(2):
        logs = len(list(Path("runs").glob("*/log.jsonl")))
        # A step is longer than it takes to start again.
        with start("--seeds", "2", "--jobs", "2", PAUSE="0.7") as killed:
            wait_for(lambda: len(list(Path("runs").glob("*/log.jsonl"))) > logs)
            time.sleep(rng.uniform(0, 0.3))
            killed.kill()
        assert len(metrics()) < 12
    main("--seeds", "2", "--jobs", "2")
    assert len(metrics()) == 12 and metrics() == metrics("undisturbed")
    logs = "".join(path.read_text() for path in Path("runs").glob("*.txt"))
    assert "in use" not in logs  # nothing was left behind


def test_real_runs_through_a_kill_end_as_train_does(short, weights, tmp_path, monkeypatch):
    """The real train.py on part of the training split, killed in the middle.

    Its numbers are those of an undisturbed run.
    """
    monkeypatch.chdir(tmp_path)
    common = ("--data-fraction 0.25 --epochs 3 --batch-size 8 --save-every 2 --log-every 1 "
              f"--weights {weights['tiny-nt']}")
    write_grid("tiny-nt,lora,0.01", "tiny-nt,ia3,0.03")
    words = [sys.executable, str(ROOT / "study.py"), "--grid", "grid.csv", "--data", str(short),
             "--out", "runs", "--jobs", "2", "--set", common]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: list(Path("runs").glob("*/log.jsonl")), 300)
    finally:
        killed.kill()
        killed.wait()
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 2 runs are done" in done.stdout, done.stdout + done.stderr
    whole = json.loads((short / "manifest.json").read_text())["splits"]["train"]
    for each in study.make_plan(study.parse_args(words[2:])):
        train.main(grid.words_of(each.flags | {"out": "alone"}))
        out = Path(each.flags["out"])
        assert Path("alone/metrics.json").read_bytes() == (out / "metrics.json").read_bytes()
        assert read_run(out).environment["training_sequences"] < 0.3 * whole
        subprocess.run(["rm", "-r", "alone"], check=True)


def test_198_finished_runs_take_less_than_five_seconds(here):
    for each in plan_of("--seeds", "3"):
        folder = here / "runs" / each.name
        folder.mkdir(parents=True)
        words = grid.words_of(each.flags)
        args = vars(train.parse_args(words))
        (folder / "args.json").write_text(json.dumps(args))
        environment = {"command": ["train.py", *words], "processes": 1, "dataset": "d1"}
        (folder / "environment.json").write_text(json.dumps(environment))
        (folder / "metrics.json").write_text("{}")
    words = [sys.executable, str(ROOT / "study.py"), "--seeds", "3", "--data", "data",
             "--out", "runs"]
    began = time.time()
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "all 198 runs are done" in done.stdout, done.stderr
    assert time.time() - began < 5
    done = subprocess.run([*words, "--gpus-per-run", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # the same sequences per step
    done = subprocess.run([*words, "--set", "--precision bf16"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "was run with --precision fp32, and now it is bf16" in done.stderr


def test_each_run_gets_its_gpus(here, monkeypatch):
    monkeypatch.setattr(study, "gpus", lambda: (["0", "1", "2", "5", "7"], "H100"))
    args = study.parse_args(["--gpus-per-run", "2"])
    plan = study.make_plan(args)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in study.slots_of(args, plan)] == [
        "0,1", "2,5"]
    with pytest.raises(InputError, match="--gpus-per-run 8: there are 5 GPUs here"):
        study.slots_of(study.parse_args(["--gpus-per-run", "8"]), plan)
    write_grid("tiny-nt,full,1", "tiny-nt,ia3,1", "tiny-nt,lora,1")
    main("--jobs", "2")
    used = {json.loads(path.read_text())["gpu"] for path in Path("runs").glob("*/args.json")}
    assert used == {"0", "1"}
    smi = here / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3'\necho '1, NVIDIA H100 80GB HBM3'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert queue.gpus() == (["0", "1"], "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert queue.gpus() == (["1"], "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert queue.gpus() == ([], None)


# ---------------------------------------------------------------- SLURM

SRUN = """#!/bin/bash
shift
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & done
echo $! > task.pid
trap 'kill -USR1 $(cat task.pid)' USR1
echo $$ > srun.pid
wait $!; status=$?
while kill -0 "$(cat task.pid)" 2>/dev/null; do wait "$(cat task.pid)"; status=$?; done
exit $status
"""


def test_the_array_script(here):
    """Its tasks by a stand-in for sbatch: one is stopped by SIGUSR1 and requeued.

    The end is the local queue's.
    """
    write_grid("tiny-nt,full,0.1", "tiny-nt,ia3,0.2", "full-disk,full,1")
    with pytest.raises(Stop):
        main()
    Path("runs").rename("local")
    main("--slurm", "study.sbatch")
    script = Path("study.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", script, re.MULTILINE))
    assert options["array"] == "1-3" and "requeue" in options
    assert options["signal"] == "USR1@600" and options["gpus-per-node"] == "1"
    assert "##SBATCH --account=" in script and "# module load" in script
    for name, text in (
            ("srun", SRUN),
            ("scontrol", '#!/bin/bash\necho "$@" >> requeued\n'),
            ("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')):
        Path(name).write_text(text)
        Path(name).chmod(0o755)

    def task(number, **more):
        slurm = {
            "PATH": f"{here}:{os.environ['PATH']}",
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_JOB_ID": str(7 + number),
            "SLURM_NTASKS": "1",
            "SLURM_CPUS_PER_TASK": "1",
        }
        return subprocess.Popen(["bash", "study.sbatch"], env=os.environ | slurm | more)

    stopped = task(1, STEPS="3", PAUSE="0.4")
    wait_for(lambda: Path("runs/tiny-nt-full-lr0.1-seed42/log.jsonl").exists())
    os.kill(int(Path("srun.pid").read_text()), signal.SIGUSR1)
    assert stopped.wait(20) == 0 and not metrics()
    assert Path("requeued").read_text() == "requeue 7_1\n"
    assert [task(number).wait(20) for number in (1, 2, 3)] == [0, 0, 2]
    assert metrics() == metrics("local") and len(metrics()) == 2
    assert Path("runs/full-disk-full-lr1-seed42.txt").read_text().endswith("exit status 2\n")
    log = Path("runs/tiny-nt-full-lr0.1-seed42/log.jsonl")
    done = log.read_text()
    assert task(1).wait(20) == 0 and log.read_text() == done  # finished: ends at once
    main("--slurm", "again.sbatch")
    assert "--array=1-1\n" in Path("again.sbatch").read_text()


def test_a_run_of_several_gpus_is_several_tasks_of_one_step(here):
    write_grid("tiny-nt,full,0.1")
    main("--slurm", "study.sbatch", "--gpus-per-run", "4")
    script = Path("study.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=4" in script and "#SBATCH --gpus-per-node=4" in script
    assert "WORLD_SIZE=\\$SLURM_NTASKS" in script
