"""A run that is killed, stopped or restarted ends as if nothing had happened; what cannot go on is
refused in one line.
"""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from helpers import ROOT, STRATEGIES, command, forked
from runs import Killed, assert_same_end, dies, in_step, log_of

import train
from taxa.runtime import cli
from taxa.training import checkpoint
from taxa.training.run import lock_run, read_last, save_last

# 292 sequences: 10 steps an epoch, 5 by two processes.
MORE = ("--epochs", "2", "--batch-size", "32", "--log-every", "3", "--save-every", "4")


# ------------------------------------------------------------------ helpers


def files_of(folder):
    """{name: bytes} of all files of a run folder but its lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def last_of(folder):
    """What last.pt holds, whether or not last.prev.pt could stand in for it."""
    return checkpoint.read(folder / "last.pt", checkpoint.RESUME_STATE)


# ------------------------------------------------------------------ killed and resumed


@pytest.fixture(scope="module")
def two(short, weights, tmp_path_factory):
    """Runs by two processes, a whole one and one killed in the middle of step 7, per strategy; and
    one begun by one process.
    """
    root = tmp_path_factory.mktemp("two")
    runs = []
    for strategy in STRATEGIES:
        killed = command("tiny-dnabert", strategy, short, weights, root / f"{strategy}-killed",
                         *MORE)
        whole = command("tiny-dnabert", strategy, short, weights, root / strategy, *MORE)
        runs += [
            ["dies", 7, *killed],
            ["train", *killed, "--resume"],
            ["train", *whole],
        ]
    one = command("tiny-nt", "full", short, weights, root / "one", *MORE)
    dies(6, [*one, "--batch-size", "16", "--accumulate", "4"])
    runs.append(["train", *one, "--resume"])
    for rank in forked(*[[ROOT / "tests" / "runs.py", json.dumps(runs)]] * 2, cwd=root):
        assert rank.returncode == 0, rank.stderr
    return root


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_killed_and_resumed_ends_bit_for_bit_the_same(
    strategy, short, weights, tmp_path
):
    dropout = ["--lora-dropout", "0.1"] if strategy == "lora" else []
    arguments = command("tiny-nt", strategy, short, weights, tmp_path / "killed", *MORE, *dropout)
    whole = command("tiny-nt", strategy, short, weights, tmp_path / "whole", *MORE, *dropout)
    dies(3, arguments)  # before the first save: it begins anew
    dies(6, [*arguments, "--resume"])  # from the start; saved at step 4
    # From step 4 to the middle of 14, in the second epoch; saved at 12, in the middle of a log
    # line.
    dies(10, [*arguments, "--resume"])
    train.main([*arguments, "--resume"])
    train.main(whole)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_killed_and_resumed_end_bit_for_bit_the_same(strategy, two):
    assert_same_end(two / f"{strategy}-killed", two / strategy)


def test_begun_by_one_process_and_ended_by_two(two, short, weights, tmp_path):
    """16 sequences in 4 micro-batches by one process, then 32 by each of two: the same steps, so
    the same weights but for rounding.
    """
    train.main(command("tiny-nt", "full", short, weights, tmp_path / "whole", *MORE,
                       "--batch-size", "64"))
    whole = last_of(tmp_path / "whole")
    both = last_of(two / "one")
    assert whole["step"] == both["step"] == 10
    for name in whole["state"]:
        torch.testing.assert_close(both["state"][name], whole["state"][name], rtol=1e-3, atol=2e-4)


def test_killed_before_any_file_gets_its_name(short, weights, tmp_path, monkeypatch):
    """Once before each rename of a run of two steps, whatever is renamed: states, checkpoint,
    settings, tables.
    """
    def arguments(name):
        return command("tiny-nt", "ia3", short, weights, tmp_path / name, *MORE,
                       "--batch-size", "160", "--epochs", "1", "--save-every", "1")

    replace = os.replace
    renamed = []

    def counts(source, target):
        renamed.append(os.path.basename(target))
        if len(renamed) == die_at:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", counts)
    die_at = 0
    train.main(arguments("whole"))
    names, moments = set(renamed), len(renamed)
    assert {"args.json", "last.pt", "last.prev.pt", "ckpt.pt",
            "metrics.json", "per_class.csv"} <= names
    assert moments >= 13
    for moment in range(1, moments + 1):
        die_at = moment
        renamed.clear()
        with pytest.raises(Killed):
            train.main(arguments(str(moment)))
        die_at = 0
        train.main([*arguments(str(moment)), "--resume"])
        assert_same_end(tmp_path / str(moment), tmp_path / "whole")


def test_killed_in_the_validation(short, weights, tmp_path, monkeypatch):
    """All steps of the epoch are saved before it, so none is taken again."""
    arguments = command("tiny-nt", "lora", short, weights, tmp_path / "run", *MORE)
    run_split = train.run_split

    def dies_there(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_split", dies_there)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments)
    last = last_of(tmp_path / "run")
    assert last["step"] == 10 and last["epoch"] == 0
    assert not (tmp_path / "run" / "ckpt.pt").exists()
    monkeypatch.setattr(train, "run_split", run_split)
    train.main([*arguments, "--resume"])
    train.main(command("tiny-nt", "lora", short, weights, tmp_path / "whole", *MORE))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_75(number, short, weights, tmp_path, capsys):
    arguments = command("tiny-nt", "ia3", short, weights, tmp_path / "run", *MORE,
                        "--save-every", "1000")
    before = signal.getsignal(number)
    with in_step(3, lambda: os.kill(os.getpid(), number)), pytest.raises(SystemExit) as left:
        cli.run(lambda: train.main(arguments))
    line, = capsys.readouterr().err.splitlines()
    assert left.value.code == 75
    assert signal.Signals(number).name in line and "--resume" in line
    assert signal.getsignal(number) == before
    assert last_of(tmp_path / "run")["step"] in (3, 4)
    train.main([*arguments, "--resume"])
    train.main(command("tiny-nt", "ia3", short, weights, tmp_path / "whole", *MORE))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_command_resumes_unasked(
    variable, short, weights, tmp_path, monkeypatch, capsys
):
    arguments = command("tiny-nt", "ia3", short, weights, tmp_path / "run", *MORE, "--overwrite")
    monkeypatch.setenv(variable, "0")
    dies(7, arguments)
    monkeypatch.setenv(variable, "1")
    dies(3, arguments)
    assert "resumed after step 4, epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize("state", [
    "no folder", "empty folder", "killed before the first save", "killed before any file",
])
def test_resume_where_nothing_was_saved_starts_from_the_beginning(
    state, short, weights, tmp_path, capsys
):
    more = (*MORE, "--max-steps", "2")
    arguments = command("tiny-nt", "ia3", short, weights, tmp_path / "run", *more)
    if state == "empty folder":
        (tmp_path / "run").mkdir()
    elif state == "killed before the first save":
        dies(2, arguments)
        assert not (tmp_path / "run" / "last.pt").exists()
    elif state == "killed before any file":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").write_text("process 1 on a machine\n")
        (tmp_path / "run" / ".args.json.1.tmp").write_text("{")
    capsys.readouterr()
    train.main([*arguments, "--resume"])
    printed = capsys.readouterr().out.splitlines()
    line, = [line for line in printed if "starting from the beginning" in line]
    assert str(tmp_path / "run") in line
    train.main(command("tiny-nt", "ia3", short, weights, tmp_path / "whole", *more))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("holds, message", [
    ("another run that saved nothing",
     "args.json is of a run with other settings: --lr: 0.01 then, 0.5 now"),
    ("a run without last.pt", "last.pt is gone"),
    ("a run without ckpt.pt", "ckpt.pt is gone"),
    ("a thesis", "not a run folder"),
    ("broken settings", "args.json: not "),
])
def test_resume_refuses_a_folder_that_holds_something_else(
    holds, message, short, weights, tmp_path
):
    folder = tmp_path / "run"
    arguments = command("tiny-nt", "ia3", short, weights, folder, *MORE, "--max-steps", "2")
    if holds == "another run that saved nothing":
        dies(2, arguments)
        arguments += ["--lr", "0.5"]
    elif holds.startswith("a run without"):
        train.main(arguments)
        gone = ("last.pt", "last.prev.pt") if holds.endswith("last.pt") else ("ckpt.pt",)
        for name in gone:
            (folder / name).unlink()
    else:
        folder.mkdir()
        (folder / ("thesis.tex" if holds == "a thesis" else "args.json")).write_text("years")
    before = files_of(folder)
    with pytest.raises(cli.InputError, match=message):
        train.main([*arguments, "--resume"])
    assert files_of(folder) == before


def test_minutes_between_saves(short, weights, tmp_path):
    arguments = command("tiny-nt", "ia3", short, weights, tmp_path / "run", *MORE,
                        "--save-every", "0.000001m")
    dies(8, arguments)
    assert last_of(tmp_path / "run")["step"] == 7


# ---------------------------------------------------------------- what may differ, and what may not


@pytest.fixture(scope="module")
def stopped(short, weights, tmp_path_factory):
    """(arguments, folder) of a run killed in step 7 of 10 of its first epoch, saved at 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    arguments = command("tiny-nt", "lora", short, weights, folder, *MORE)
    dies(7, arguments)
    return arguments, folder


@pytest.mark.parametrize("flags, message", [
    (["--lr", "0.5"], "--lr: 0.01 then, 0.5 now"),
    (["--r", "2"], "--r: 4 then, 2 now"),
    (["--seed", "1"], "--seed: 42 then, 1 now"),
    (["--epochs", "1"], "--epochs: 2 then, 1 now .more are allowed"),
    (["--batch-size", "16"], "sequences per step: 32 then, 16 now"),
    (["--strategy", "full", "DROP"], "--strategy: lora then, full now"),
])
def test_other_settings_are_refused_with_the_difference(flags, message, stopped):
    arguments, folder = stopped
    before = files_of(folder)
    if "DROP" in flags:  # the flags of LoRA
        at = arguments.index("--r")
        arguments = arguments[:at] + arguments[at + len(STRATEGIES["lora"]):]
        flags = flags[:-1]
    with pytest.raises(cli.InputError, match=message) as refused:
        train.main([*arguments, *flags, "--resume"])
    assert "\n" not in str(refused.value)
    assert files_of(folder) == before


def test_more_epochs_follow_the_cosine_of_all_of_them(short, weights, tmp_path, capsys):
    arguments = command("tiny-nt", "ia3", short, weights, tmp_path / "run", *MORE,
                        "--log-every", "1", "--batch-size", "128")
    train.main(arguments)  # 3 steps an epoch
    train.main([*arguments, "--epochs", "3", "--resume"])
    assert "the cosine is now that of 3 epochs" in capsys.readouterr().out
    lrs = [entry["lr"] for entry in log_of(tmp_path / "run") if "lr" in entry]
    first = [train.cosine_lr(step, 6, 0.01) for step in range(6)]
    then = [train.cosine_lr(step, 9, 0.01) for step in range(6, 9)]
    assert lrs == first + then


# ------------------------------------------------------------------ damaged files, locked folders


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_last_pt_gives_way_to_the_one_before(damage, stopped, tmp_path, capsys):
    content = {"step": 1, "epoch": 0}
    save_last(tmp_path, content)
    save_last(tmp_path, content | {"step": 2})
    assert read_last(tmp_path)["step"] == 2 and capsys.readouterr().err == ""
    whole = (tmp_path / "last.pt").read_bytes()
    flipped = whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]
    damaged = {"cut": whole[:-100], "flipped": flipped, "gone": b""}[damage]
    (tmp_path / "last.pt").write_bytes(damaged)
    if damage == "gone":
        (tmp_path / "last.pt").unlink()
    assert read_last(tmp_path)["step"] == 1
    line, = capsys.readouterr().err.splitlines()
    assert "last.pt" in line and "going on from last.prev.pt, step 1" in line
    save_last(tmp_path, content | {"step": 3})
    assert read_last(tmp_path)["step"] == 3
    # The damaged one did not come to lie over it.
    assert checkpoint.read(tmp_path / "last.prev.pt", checkpoint.RESUME_STATE)["step"] == 1
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "last.prev.pt").write_bytes(b"")
    with pytest.raises(cli.InputError, match="last.prev.pt"):
        read_last(tmp_path)


def test_a_damaged_ckpt_pt_is_seen_before_training_goes_on(short, weights, tmp_path):
    arguments = command("tiny-nt", "ia3", short, weights, tmp_path / "run", *MORE)
    dies(12, arguments)
    path = tmp_path / "run" / "ckpt.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 4]) + whole[201:])
    with pytest.raises(cli.InputError, match="ckpt.pt: damaged"):
        train.main([*arguments, "--resume"])


def test_two_runs_in_one_folder_are_refused(stopped):
    arguments, folder = stopped
    ours, theirs = multiprocessing.Pipe()

    def hold():
        held = lock_run(folder)
        theirs.send(os.getpid())
        time.sleep(600)
        held.close()

    other = multiprocessing.get_context("fork").Process(target=hold, daemon=True)
    other.start()
    try:
        assert ours.poll(60) and ours.recv() == other.pid
        for flag in ("--resume", "--overwrite"):
            with pytest.raises(cli.InputError, match=f"in use by process {other.pid} on "):
                train.main([*arguments, flag])
        assert (folder / "last.pt").exists()
    finally:
        other.kill()
        other.join()
    (folder / ".last.pt.1.tmp").write_text("left by a process that was killed")
    lock_run(folder).close()  # the dead process holds nothing
    assert not (folder / ".last.pt.1.tmp").exists()


@pytest.mark.parametrize("number", [
    errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL,
])
def test_a_file_system_without_locks_gives_a_warning(number, tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock_run(tmp_path / "run").close()
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "cannot be locked" in line and os.strerror(number) in line
    number = errno.EIO
    with pytest.raises(OSError):
        lock_run(tmp_path / "run")
