"""The search against known ceilings, the memory limit of a child process, and the script as a user
runs it.
"""

import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

import probe_batch
from taxa import STUDY_TRAINING_SEQUENCES
from taxa.errors import InputError
from taxa.measure.isolation import in_child, is_out_of_memory
from taxa.runtime.cli import byte_size
from taxa.study.published_runs import published_seconds


def script(*arguments):
    """probe_batch.py on one thread, as a user runs it."""
    return subprocess.run(
        [sys.executable, ROOT / "probe_batch.py", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("ceiling", [0, 1, 2, 3, 4, 5, 7, 8, 63, 64, 100, 331, 1000, 5000])
def test_search_finds_the_ceiling_to_two_percent(ceiling):
    tried = []
    good, bad = probe_batch.search(lambda batch: tried.append(batch) or batch <= ceiling)
    assert good <= ceiling < bad <= math.ceil(1.02 * good) + 1
    assert tried[:3] == ([4, 8, 16] if ceiling >= 8 else tried[:3])
    assert len(set(tried)) == len(tried)
    found = probe_batch.search(lambda batch: batch <= ceiling, largest=6)
    assert found == ((6, None) if ceiling >= 6 else (good, bad))


@pytest.mark.parametrize("text, value", [
    ("80GiB", 80 * 2**30),
    ("500MB", 500 * 10**6),
    ("1.5 gib", 3 * 2**29),
    ("2000", 2000),
])
def test_byte_size(text, value):
    assert byte_size(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "-3GB", "3 parsecs", "0", "1.2.3GB"])
def test_byte_size_refuses(text):
    with pytest.raises(Exception, match="not a size"):
        byte_size(text)


def take(megabytes):
    return {"sum": float(torch.ones(megabytes * 250_000).sum())}


def wrong():
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def refused():
    raise InputError("say it in one line")


def test_a_child_runs_out_of_memory_and_the_parent_does_not():
    assert in_child(functools.partial(take, 20), 64 * 2**20) == {"sum": 5e6}
    assert in_child(functools.partial(take, 100), 64 * 2**20) is None


def test_only_out_of_memory_is_caught():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        in_child(wrong, 2**28)
    with pytest.raises(InputError, match="^say it in one line$"):
        in_child(refused, 2**28)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: out of luck"))


FULL = ["--model", "tiny-nt", "--strategy", "full"]


@pytest.mark.parametrize("flags, says", [
    (["--model", "nt5m", "--strategy", "full"], "did you mean nt50m"),
    (["--model", "tiny-nt", "--strategy", "fulll"], "did you mean full"),
    ([*FULL, "--memory-limit", "much"], "not a size"),
    ([*FULL, "--memory-limit", "900TB", "--device", "cpu"], "more than is free"),
    ([*FULL, "--plot", "memory.gif"], "ends in .png"),
    ([*FULL, "--data", "nowhere"], "no such folder"),
    ([*FULL, "--out", "nowhere/probe.json"], "--out nowhere/probe.json: no such folder"),
    ([*FULL, "--out", "."], "--out .: that is a folder"),
    ([*FULL, "--plot", "nowhere/memory.png"], "--plot nowhere/memory.png: no such folder"),
])
def test_wrong_input_is_one_line(flags, says):
    with pytest.raises(InputError, match=says):
        probe_batch.main(flags)


@pytest.mark.parametrize("fits, says", [
    (True, "counting the parts at batch 2 takes more than the limit"),
    (False, "no batch that was tried fits every strategy"),
])
def test_a_missing_table_of_parts_is_said(monkeypatch, capsys, fits, says):
    monkeypatch.setattr(probe_batch, "in_child", lambda work, limit: work())
    measured = {"step_s": [1.0], "peak_bytes": 1} if fits else None
    monkeypatch.setattr(probe_batch, "measure", lambda *_: measured)
    monkeypatch.setattr(probe_batch, "account", lambda *_: None)
    probe_batch.main([*FULL, "--batch-sizes", "2", "--device", "cpu", "--memory-limit", "1MiB"])
    assert f"no memory by part: {says}" in capsys.readouterr().out


def probed(tmp_path, *flags):
    """The script's output and its JSON document."""
    out = tmp_path / "probe.json"
    done = script("--model", "tiny-nt", "--device", "cpu", "--steps", 1, "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_the_ceiling_fits_and_two_percent_more_does_not(tmp_path):
    """Every size is a process of its own, under a limit that its kernel enforces."""
    tokens = 400  # a sequence takes about 5 MB, more than what a process may find left over
    limit = "90MiB"
    stdout, document = probed(
        tmp_path, "--strategy", "full", "--length", tokens, "--memory-limit", limit,
    )
    (found,) = document["runs"]
    verdicts = {entry["batch"]: entry["verdict"] for entry in found["sizes"]}
    ceiling, failing = found["ceiling"], found["smallest_that_fails"]
    assert verdicts[ceiling] == "fits" and verdicts[failing] == "out of memory"
    assert failing <= math.floor(1.02 * ceiling) + 1
    assert f"largest batch {ceiling}; {failing} does not fit" in stdout
    for entry in found["sizes"]:
        assert entry["lr"] == pytest.approx(3e-3 * entry["batch"] / 32)
        assert (entry["verdict"] == "fits") == ("step_s" in entry) == (entry["batch"] <= ceiling)


def test_all_strategies_in_every_mode_as_a_user_runs_them(tmp_path):
    modes = ["none", "selective", "full"]
    stdout, document = probed(
        tmp_path, "--strategies", "all", "--activation-checkpointing", *modes,
        "--length", 32, "--batch-sizes", 2, 4, "--plot", tmp_path / "memory.png",
    )
    assert "published to full" in stdout and stdout.count("allocator's peak") == 3
    assert "batch 4, selective checkpointing" in stdout
    assert "checkpoints   largest" in stdout
    assert "largest: of the sizes that were tried; more may fit" in stdout
    runs = [(found["activation_checkpointing"], found["label"]) for found in document["runs"]]
    assert runs == [
        (mode, label) for mode in modes for label in ("full", "lora r=4", "ia3", "freeze75")
    ]
    for found in document["runs"]:
        memory = found["memory"]
        assert found["ceiling"] == 4 and memory["batch"] == 4
        assert memory["peak"] == pytest.approx(memory["allocator_peak"], rel=0.1)
        checkpointed = found["activation_checkpointing"] != "none"
        assert (memory["most"]["checkpointed"] > 0) == checkpointed
        for entry in found["sizes"]:
            assert len(entry["step_s"]) == 1
            steps = math.ceil(STUDY_TRAINING_SEQUENCES / entry["batch"])
            assert entry["epoch_s"] == pytest.approx(entry["median_step_s"] * steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "probe.json"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_to_full_in_the_same_mode():
    def found(label, mode, ceiling, seconds):
        return {
            "label": label, "strategy": label, "activation_checkpointing": mode,
            "ceiling": ceiling, "power_of_two": ceiling, "smallest_that_fails": ceiling + 1,
            "sizes": [{"batch": ceiling, "verdict": "fits", "epoch_s": seconds}],
        }

    runs = [
        found("full", "none", 8, 100.0),
        found("ia3", "none", 8, 50.0),
        found("full", "full", 64, 200.0),
        found("ia3", "full", 128, 50.0),
    ]
    args = probe_batch.parse_args(["--model", "nt50m", "--strategy", "full"])
    lines = probe_batch.summary(args, runs).splitlines()
    assert lines[2].split() == ["ia3", "none", "8", "1.00", "8", "50", "0.50", "0.90"]
    assert lines[4].split() == ["ia3", "full", "128", "2.00", "128", "50", "0.25", "-"]


def test_published_seconds_are_the_supplements():
    assert published_seconds("nt50m") == {
        "full": (7527.8,),
        "lora r=1": (6991.4,),
        "lora r=4": (7980.8, 9140.0),
        "lora r=20": (9211.6,),
        "ia3": (6800.0,),
        "freeze75": (5084.4,),
        "random": (7528.8,),
    }
    assert published_seconds("tiny-nt") == {}
    assert probe_batch.published_ratio("nt50m", "lora r=4") == "1.06 to 1.21"
    assert probe_batch.published_ratio("tiny-nt", "full") == "-"
