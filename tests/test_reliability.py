"""Disks that fill, bytes that change, ranks that die or differ, numbers that are not finite.

Each ends in one line, and nothing is lost.
"""

import datetime
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from helpers import ROOT, command, forked
from runs import free_port, in_step

import evaluate
import train
from taxa.backbones import load_backbone
from taxa.data.dataset import PreparedDataset, manifest_digest
from taxa.runtime import cli, rendezvous
from taxa.training import checkpoint, sealed_file
from taxa.training.run import read_last, save_last

SHORT = ("--max-steps", "4", "--batch-size", "32")


def flip(path, at):
    """Change one bit of a file; returns what undoes it."""
    whole = path.read_bytes()
    at %= len(whole)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1:])
    return lambda: path.write_bytes(whole)


# ------------------------------------------------------------------ data that changed


@pytest.fixture(scope="module")
def trained(short, weights, tmp_path_factory):
    """(arguments, run folder) of a short run that ended well."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = command("tiny-nt", "ia3", short, weights, folder, *SHORT)
    train.main(arguments)
    return arguments, folder


@pytest.mark.parametrize(
    "name",
    [
        "train/nt.bin",
        "train/nt.npy",
        "train/labels.npy",
        "train/records.npy",
        "validation/nt.bin",
        "test/nt.bin",
    ],
)
def test_a_flipped_bit_of_the_data_is_seen_before_training(
    name, trained, short, weights, tmp_path
):
    data = shutil.copytree(short, tmp_path / "data")
    flip(data / name, -3)
    with pytest.raises(cli.InputError, match=f"{name}: (damaged|labels up to)"):
        train.main(command("tiny-nt", "ia3", data, weights, tmp_path / "run", *SHORT))
    assert not (tmp_path / "run").exists()
    if name.startswith("test"):
        words = [str(trained[1] / "ckpt.pt"), "--data", str(data), "--out", str(tmp_path / "out")]
        with pytest.raises(cli.InputError, match="damaged"):
            evaluate.main(words)


def test_a_flipped_bit_anywhere_in_the_manifest_is_seen(short, tmp_path):
    data = shutil.copytree(short, tmp_path / "data")
    path = data / "manifest.json"
    PreparedDataset(data)
    values = [i for i, byte in enumerate(path.read_bytes()) if byte not in b" \n"]
    for at in np.random.RandomState(0).choice(values, 60, replace=False):
        undo = flip(path, int(at))
        with pytest.raises(cli.InputError, match="manifest"):
            PreparedDataset(data)
        undo()


def test_an_id_beyond_the_vocabulary_is_refused(short, tmp_path):
    """A folder whose digests are right, but which no prepare.py wrote."""
    data = PreparedDataset(shutil.copytree(short, tmp_path / "data"))
    path = tmp_path / "data" / "test" / "nt.bin"
    ids = np.fromfile(path, dtype="<u2")
    ids[7] = 4107
    ids.tofile(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    data.manifest["files"]["test/nt.bin"]["sha256"] = digest
    with pytest.raises(cli.InputError, match="id 4107, but the vocabulary has 4107 entries"):
        data.verify("nt", ["test"], lambda items, *_, **__: items)


@pytest.mark.parametrize("header", [b"(10000000000, 3)", b"(3,)", b"(-1, 3)"])
def test_a_hostile_array_header_asks_for_nothing(header, short, tmp_path):
    data = shutil.copytree(short, tmp_path / "data")
    path = data / "train" / "labels.npy"
    whole = path.read_bytes()
    text = b"{'descr': '<u2', 'fortran_order': False, 'shape': " + header + b", }"
    path.write_bytes(whole[:10] + text.ljust(117) + b"\n" + whole[128:])
    with pytest.raises(cli.InputError, match="labels.npy: not an array"):
        PreparedDataset(data).split("train", "nt")


# ------------------------------------------------------------------ numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_not_applied_and_names_its_records(
    value, short, weights, tmp_path, monkeypatch
):
    losses, calls = train.sequence_losses, []

    def bad_in_steps_2_and_4(logits, labels):
        calls.append(1)
        return losses(logits, labels) + (value if len(calls) in (2, 4) else 0)

    monkeypatch.setattr(train, "sequence_losses", bad_in_steps_2_and_4)
    out = tmp_path / "run"
    flags = ("--batch-size", "32", "--save-every", "1")
    arguments = command("tiny-nt", "ia3", short, weights, out, *flags)
    message = "2 step.s. had a loss or gradient that is not finite, the last one step 4"
    with pytest.raises(cli.InputError, match=f"{message}; .*bad_steps.jsonl"):
        train.main([*arguments, "--max-bad-steps", "2"])
    first, second = map(json.loads, (out / "bad_steps.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (2, 4) and first["loss"] == str(value)

    order = np.random.RandomState([42, 0]).permutation(292)
    assert [record["row"] for record in second["records"]] == order[96:128].tolist()
    at = second["records"][5]
    lines = (short / "source" / at["file"]).read_text().splitlines()
    headers = [line[1:] for line in lines if line.startswith(">")]
    assert int(headers[at["record"] - 1].split()[0]) == at["taxid"]

    # the step before is saved, and those that were not applied left the weights as they were
    calls.clear()
    last = checkpoint.read(out / "last.pt", checkpoint.RESUME_STATE)
    assert last["step"] == 3 and last["bad_steps"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in last["state"].values())
    assert all(entry["step"] == 2 for entry in last["optimizer"]["state"].values())
    monkeypatch.setattr(train, "sequence_losses", losses)
    train.main([*arguments, "--resume"])
    lines = (out / "bad_steps.jsonl").read_text().splitlines()
    assert len(lines) == 1  # step 4 was taken again, and was good


# ------------------------------------------------------------------ disks


def test_a_full_disk_ends_in_one_line_and_the_old_checkpoint_stays(tmp_path, capsys):
    content = {"step": 1, "state": torch.zeros(100)}
    save_last(tmp_path, content)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # as a quota: no file may grow beyond it
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: save_last(tmp_path, content | {"state": torch.zeros(100_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line, = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and "last.pt" in line and "File too large" in line
    assert os.listdir(tmp_path) == ["last.pt"] and read_last(tmp_path)["step"] == 1


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 600 kB; only root can make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", folder]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_folder_without_permission_ends_in_one_line_and_the_old_state_stays(tmp_path, capsys):
    if not os.geteuid():
        pytest.skip("root may write anywhere: the read-only mount below is for it")
    save_last(tmp_path, {"step": 1})
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: save_last(tmp_path, {"step": 2}))
    finally:
        tmp_path.chmod(0o755)
    line, = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and "last.pt: Permission denied" in line
    assert os.listdir(tmp_path) == ["last.pt"] and read_last(tmp_path)["step"] == 1


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_fills_or_becomes_read_only_in_a_run(fault, tmpfs, short, weights, capsys):
    run = tmpfs / "run"
    flags = ("--batch-size", "32", "--save-every", "1", "--epochs", "1")
    arguments = command("tiny-nt", "ia3", short, weights, run, *flags)

    def strike():
        if fault == "full":
            with pytest.raises(OSError), open(tmpfs / "filler", "wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
        else:
            subprocess.run(["mount", "--bind", run, run], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)

    with in_step(5, strike), pytest.raises(SystemExit) as left:
        cli.run(lambda: train.main(arguments))
    line, = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and str(tmpfs) in line
    assert {"full": "No space left", "read-only": "Read-only"}[fault] in line
    assert read_last(run)["step"] in (4, 5)
    if fault == "full":
        (tmpfs / "filler").unlink()
    else:
        subprocess.run(["umount", run], check=True)
    train.main([*arguments, "--resume"])


# ------------------------------------------------------------------ checkpoints that mean harm


def sealed(path, write):
    with zipfile.ZipFile(path, "w") as archive:
        write(archive)
    sealed_file.seal(path)


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"

    def bomb(archive):
        zeros = bytes(10**8)
        archive.writestr("archive/data.pkl", zeros, compress_type=zipfile.ZIP_DEFLATED)

    sealed(path, bomb)
    assert path.stat().st_size < 200_000
    with pytest.raises(cli.InputError, match="unpacks to more"):
        checkpoint.read(path)


def claiming(path, numbers):
    """A sealed checkpoint whose pickle says `numbers`, an instruction, of a storage of 10."""
    honest = path.with_name("honest.pt")
    checkpoint.save(honest, {"state": {"a": torch.arange(10.0)}})
    with zipfile.ZipFile(honest) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled, = (name for name in members if name.endswith("data.pkl"))
    before, after = members[pickled].split(b"K\x0at", 1)  # the storage's numbers end its tuple
    members[pickled] = before + numbers + b"t" + after

    def write(archive):
        for name, data in members.items():
            archive.writestr(name, data)

    sealed(path, write)


CLAIMS = {
    "one too many": b"K\x0b",
    "255": b"K\xff",
    "2**40": b"\x8a\x06" + (2**40).to_bytes(6, "little"),
    "less than none": b"J\xff\xff\xff\xff",
    "true": b"\x88",
    "none": b"N",
    "text": b"X\x02\x00\x00\x0010",
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_checkpoint_that_claims_more_numbers_than_it_holds_is_refused(claim, tmp_path):
    """torch refuses it by itself, and asks for no memory; ours is the one line."""
    path = tmp_path / "ckpt.pt"
    claiming(path, b"K\x0a")
    assert torch.equal(checkpoint.read(path)["state"]["a"], torch.arange(10.0))

    claiming(path, claim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((RuntimeError, TypeError)):
        torch.load(path, weights_only=True)
    with pytest.raises(cli.InputError, match="ckpt.pt: not a checkpoint of train.py") as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


HOSTILE = {
    "wide": {"hidden_size": 4 * 10**6},
    "deep": {"num_hidden_layers": 10**9},
    "wordy": {"vocab_size": 10**12},
    "inner": {"intermediate_size": 10**11},
}


@pytest.mark.parametrize("sizes", HOSTILE.values(), ids=HOSTILE)
def test_a_config_that_asks_for_a_huge_model_is_refused_at_once(sizes, trained, weights, tmp_path):
    folder = shutil.copytree(weights["tiny-nt"], tmp_path / "w")
    values = json.loads((folder / "config.json").read_text()) | sizes
    (folder / "config.json").write_text(json.dumps(values))
    for pretrained in (True, False):
        with pytest.raises(cli.InputError, match="config.json: asks for .* parameters"):
            load_backbone("tiny-nt", folder, pretrained=pretrained)
    content = checkpoint.read(trained[1] / "ckpt.pt")
    checkpoint.save(tmp_path / "ckpt.pt", content | {"config": values})
    with pytest.raises(cli.InputError, match="asks for .* parameters"):
        evaluate.main([str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("strategy", ["random", "lora"])
def test_a_checkpoint_whose_settings_ask_for_more_than_it_holds_is_refused(
    strategy, short, weights, tmp_path
):
    flags = ("--max-steps", "1", "--batch-size", "64")
    train.main(command("tiny-nt", strategy, short, weights, tmp_path / "run", *flags))
    content = checkpoint.read(tmp_path / "run" / "ckpt.pt")
    if strategy == "lora":
        content["settings"]["r"] = 10**12
    else:
        content["config"] |= {"hidden_size": 16384, "intermediate_size": 65536}  # 26 GB
    checkpoint.save(tmp_path / "ckpt.pt", content)
    with pytest.raises(cli.InputError, match="does not fit its model"):
        checkpoint.rebuild(checkpoint.read(tmp_path / "ckpt.pt"))


def test_nothing_is_unpickled_or_run_anywhere():
    patterns = ("*.py", "taxa/**/*.py", "benchmarks/*.py", "experiments/*.py")
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert len(paths) > 40
    runs = re.compile(
        r"pickle\.loads?\(|Unpickler|allow_pickle=True|weights_only=False|\beval\(|\bexec\("
    )
    load = re.compile(r"torch\.load\(([^()]|\([^()]*\))*\)")  # with calls among its arguments
    for path in paths:
        text = path.read_text(encoding="utf-8")
        loads = [found[0] for found in load.finditer(text)]
        assert text.count("torch.load(") == len(loads), path
        assert all("weights_only=True" in call for call in loads), path
        assert not runs.search(text.replace(".eval(", "")), path


# ------------------------------------------------------------------ several processes


def pair(arguments, of_the_second, cwd):
    """Start two ranks by hand, as srun does; the second with other arguments.

    Returns [(status, stdout, stderr), ...].
    """
    words = [ROOT / "train.py", *arguments]
    ranks = forked(words, [*words, *of_the_second], cwd=cwd)
    return [(rank.returncode, rank.stdout, rank.stderr) for rank in ranks]


def test_ranks_with_other_arguments_or_data_are_told_apart(short, weights, tmp_path):
    data = shutil.copytree(short, tmp_path / "data")
    manifest = PreparedDataset(data).manifest
    manifest["digest"] = "0" * 64  # the second rank's copy was prepared otherwise
    manifest["sha256"] = manifest_digest(manifest)
    (data / "manifest.json").write_text(json.dumps(manifest))
    arguments = command("tiny-nt", "ia3", short, weights, tmp_path / "run", *SHORT)
    of_the_second = ["--lr", "0.5", "--data", str(data)]
    (status, _, err), (other, _, silent) = pair(arguments, of_the_second, tmp_path)
    line, = [text for text in err.splitlines() if "train.py" in text]
    assert status == other == 2
    assert "Traceback" not in err + silent and "train.py" not in silent
    assert "rank 1 on " in line
    assert "lr: 0.5 there, 0.01 on rank 0" in line and "dataset: 0000" in line
    assert not (tmp_path / "run").exists()


def test_a_rank_that_dies_takes_the_others_down_and_torchrun_resumes(short, weights, tmp_path):
    """Rank 0 is killed twice.

    --max-restarts 1 resumes after the first kill. The second ends the run with a report that names
    the rank.
    """
    often = ("--log-every", "1", "--save-every", "1")
    long = ("--batch-size", "4", "--epochs", "200", "--patience", "200")
    arguments = command("tiny-nt", "ia3", short, weights, tmp_path / "run", *long, *often)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher = [*torchrun, "--nproc_per_node", "2", "--max-restarts", "1"]
    printed, reported = tmp_path / "out.txt", tmp_path / "err.txt"
    with open(printed, "w") as out, open(reported, "w") as err:
        running = subprocess.Popen(
            [*launcher, str(ROOT / "train.py"), *arguments],
            cwd=tmp_path,
            stdout=out,
            stderr=err,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def strike_after(words):
        """Kill rank 0, whose id stands in the lock, three log lines after it printed `words`."""
        deadline = time.time() + 240
        while printed.read_text().partition(words)[2].count('"loss"') < 3:
            assert time.time() < deadline and running.poll() is None, reported.read_text()
            time.sleep(0.05)
        process = int((tmp_path / "run" / ".lock").read_text().split()[1])
        os.kill(process, signal.SIGKILL)
        return time.time()

    try:
        strike_after("parameters train")
        struck = strike_after("resumed after step")
        assert running.wait(timeout=120) == 1 and time.time() - struck < 60
    finally:
        running.kill()
    report = reported.read_text()
    assert "rank      : 0" in report and "Signal 9" in report
    assert "failed to connect" not in report
    of_ours = f'Traceback (most recent call last):\n  File "{ROOT / "train.py"}'
    assert of_ours not in report
    assert read_last(tmp_path / "run")["step"] >= 3


def test_a_restarted_process_never_meets_the_addresses_of_the_dead(monkeypatch):
    """torchrun keeps its store over a restart. Three starts of two ranks, either the first."""
    shared, found = torch.distributed.HashStore(), {}
    meeting = (shared, None, None)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([meeting]))
    monkeypatch.setattr(rendezvous, "STEP_LIMIT", datetime.timedelta(seconds=20))

    def begin(start, rank):
        def join():
            store, _ = found[start, rank] = rendezvous.own_store(rank, 2)
            store.set(f"address of {rank}", f"of start {start}")

        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        return thread

    for start, ranks in enumerate([(0, 1), (1, 0), (1, 0)]):
        threads = [begin(start, ranks[0])]
        threads[0].join(0.3)  # as when one process starts much earlier: on a busy machine
        assert threads[0].is_alive()
        threads.append(begin(start, ranks[1]))
        for thread in threads:
            thread.join(20)
        stores = [found[start, rank][0] for rank in (0, 1)]
        assert found[start, 0][1] == (start > 0)
        for store in stores:
            addresses = [store.get(f"address of {rank}").decode() for rank in (0, 1)]
            assert addresses == [f"of start {start}"] * 2


def test_two_agents_that_meet_by_a_rendezvous_train_one_model(short, weights, tmp_path):
    """As two machines do, each with a copy of the data; only rank 0 writes.

    The end is that of one process with batches twice as large.
    """
    flags = ("--batch-size", "16", "--max-steps", "4")
    arguments = command("tiny-nt", "ia3", short, weights, tmp_path / "run", *flags)
    meeting = [
        "--nnodes", "2", "--nproc_per_node", "1", "--local_addr", "127.0.0.1",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}",
        "--rdzv_id", "test",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, str(ROOT / "train.py")]
    copy = shutil.copytree(short, tmp_path / "data of the other")
    agents = [
        subprocess.Popen(
            [*launcher, *arguments, *data],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for data in ([], ["--data", str(copy)])
    ]
    ends = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    said = sorted("best epoch 1" in out for out, _ in ends)
    assert said == [False, True]  # one of the two is rank 0
    train.main([*arguments, "--batch-size", "32", "--out", str(tmp_path / "one")])
    one, two = read_last(tmp_path / "one"), read_last(tmp_path / "run")
    assert one["step"] == two["step"] == 4 and two["sequences per step"] == 32
    for name in one["state"]:
        torch.testing.assert_close(two["state"][name], one["state"][name], rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def several(trained, short, weights, tmp_path_factory):
    """By three processes: an epoch of a step of 291 sequences and a step of one.

    By two and by three: an evaluation.
    """
    root = tmp_path_factory.mktemp("several")
    evaluation = ["evaluate", str(trained[1] / "ckpt.pt"), "--batch-size", "8", "--out"]
    flags = ("--epochs", "1", "--batch-size", "97")
    training = ["train", *command("tiny-nt", "ia3", short, weights, root / "run", *flags)]
    of_sizes = {2: [[*evaluation, str(root / "2")]], 3: [training, [*evaluation, str(root / "3")]]}
    for size, runs in of_sizes.items():
        for rank in forked(*[[ROOT / "tests" / "runs.py", json.dumps(runs)]] * size, cwd=root):
            assert rank.returncode == 0, rank.stderr
    return root


def test_one_two_and_three_processes_evaluate_to_the_last_bit(trained, several, tmp_path):
    words = [str(trained[1] / "ckpt.pt"), "--batch-size", "8", "--out", str(tmp_path)]
    found = evaluate.main(words)
    for size in "23":
        assert json.loads((several / size / "metrics.json").read_text()) == found
        for name in ("metrics.json", "per_class.csv", "confusion_genus.csv"):
            assert (several / size / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_last_step_with_fewer_sequences_than_processes(several, short, weights, tmp_path):
    flags = ("--epochs", "1", "--batch-size", "291")
    train.main(command("tiny-nt", "ia3", short, weights, tmp_path / "run", *flags))
    one, of_three = read_last(tmp_path / "run"), read_last(several / "run")
    assert one["step"] == of_three["step"] == 2
    for name, tensor in one["state"].items():
        torch.testing.assert_close(of_three["state"][name], tensor, rtol=1e-4, atol=2e-5)


# ------------------------------------------------------------------ no network


def test_training_from_local_weights_needs_no_network(short, weights, tmp_path):
    """In a network namespace without even a loopback address."""
    if os.geteuid() or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted here")
    arguments = command("tiny-dnabert", "lora", short, weights, tmp_path / "run", *SHORT)
    done = subprocess.run(
        ["unshare", "-n", sys.executable, ROOT / "train.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if not name.startswith("HF_")},
    )
    assert done.returncode == 0, done.stderr


def test_the_page_of_promises_names_tests_that_there_are():
    page = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    written = set()
    for path in ROOT.glob("tests/test_*.py"):
        written |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    assert len(named) > 40 and named <= written, named - written
