"""The runner of the miniature: what it runs, that it goes on where it stopped, its table. Training itself is replaced by a stand-in."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import pretrain
import probe_batch
import train
from taxa.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import paper_mini  # noqa: E402

RANKS = ("superkingdom", "phylum", "genus")


def value_of(flag, arguments):
    return arguments[arguments.index(flag) + 1]


@pytest.fixture
def calls(monkeypatch):
    """Scripts that the runner starts, each standing in for its output file; balanced accuracy is the seed over 10."""
    made, sizes = [], []

    def python(script, *arguments, threads=1):
        arguments = [str(argument) for argument in arguments]
        made.append((script, arguments))
        if script == "report.py":
            return ""
        out = Path(value_of("--out", arguments))
        if script == "probe_batch.py":
            out.write_text("{}")
            return ""
        out.mkdir(parents=True, exist_ok=True)
        if script == "benchmarks/genomes.py":
            sizes.append(int(value_of("--sequences", arguments)))
        if script == "prepare.py":
            (out / "manifest.json").write_text(json.dumps({"sequences": sizes[-1]}))
            return "done\n"
        seed = int(value_of("--seed", arguments)) if script == "train.py" else 0
        metrics = {"ranks": {rank: {"balanced_accuracy": seed / 10} for rank in RANKS}}
        (out / "metrics.json").write_text(json.dumps(metrics))
        if script in ("train.py", "pretrain.py"):
            parse_args = {"train.py": train, "pretrain.py": pretrain}[script].parse_args
            (out / "args.json").write_text(json.dumps(vars(parse_args(arguments)) | {"resume": True}))
            (out / "environment.json").write_text(json.dumps({"dataset": "as it was"}))
        return "done\n"

    def opened(folder):
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        return SimpleNamespace(manifest=manifest, digest=manifest.get("digest", "as it was"))

    monkeypatch.setattr(paper_mini, "python", python)
    monkeypatch.setattr(paper_mini, "PreparedDataset", opened)
    return made


def test_every_cell_once_then_nothing_and_what_was_cut_short_again(calls, tmp_path, monkeypatch):
    flags = ["--quick", "--jobs", "2", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")]
    paper_mini.main(flags)
    runs = [arguments for script, arguments in calls if script == "train.py"]
    folders = {value_of("--out", arguments) for arguments in runs}
    assert len(folders) == len(runs) == 9 * 2 + 7  # tiny-nt on two seeds, tiny-dnabert on one, with r = 4 alone
    for arguments in runs:  # each is a command line that train.py takes
        assert train.parse_args(arguments).batch_size == paper_mini.BATCH
        assert ("--weights" in arguments) == ("tiny-dnabert" in arguments and "random" not in arguments)
    table = (tmp_path / "runs" / "paper-quick.md").read_text()
    assert "| few-quick-tiny-nt-lora-r4-frozen-heads | 2 | 0.150 ± 0.071 | 0.150 ± 0.071 | 0.150 ± 0.071 |" in table
    assert "| few-quick-tiny-dnabert-random | 1 | 0.100 | 0.100 | 0.100 |" in table

    calls.clear()
    cut = Path(sorted(folders)[3])
    (cut / "metrics.json").unlink()
    paper_mini.main(flags)
    again = [(script, arguments) for script, arguments in calls if script != "report.py"]
    assert [script for script, _ in again] == ["train.py"] and value_of("--out", again[0][1]) == str(cut) and "--overwrite" in again[0][1]

    monkeypatch.setitem(paper_mini.RATES["tiny-nt"], "ia3", 1e-2)
    with pytest.raises(InputError, match="ia3.* was run with --lr 0.03, not 0.01: remove it"):
        paper_mini.main(flags)
    monkeypatch.setitem(paper_mini.RATES["tiny-nt"], "ia3", 3e-2)
    moved = tmp_path / "moved"
    tmp_path.joinpath("runs").rename(moved)  # a folder may move
    calls.clear()
    paper_mini.main([*flags[:-1], str(moved)])
    assert not any(script == "train.py" for script, _ in calls)
    manifest = tmp_path / "data" / "few-quick" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "digest": "another"}))
    with pytest.raises(InputError, match="was run on other data than"):
        paper_mini.main([*flags[:-1], str(moved)])
    manifest.write_text('{"sequences": 7}')
    with pytest.raises(InputError, match="few-quick holds 7 sequences, not 640: remove it"):
        paper_mini.main(flags)


def test_the_whole_grid_probes_the_batch_ceilings_once(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_mini.sys, "platform", "linux")
    flags = ["--seeds", "1", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")]
    paper_mini.main(flags)
    assert [script for script, _ in calls][-2:] == ["probe_batch.py", "report.py"]
    probed = calls[-2][1]
    assert probe_batch.parse_args(probed).strategy == ["full", "lora", "ia3", "freeze75"]
    assert value_of("--probe", calls[-1][1]) == value_of("--out", probed) == str(tmp_path / "runs" / "probe.json")
    calls.clear()
    paper_mini.main(flags)
    assert [script for script, _ in calls] == ["report.py"] and "--probe" in calls[0][1]
    calls.clear()
    for more in (["--quick"], ["--grid", "heads"]):
        paper_mini.main([*flags, *more])
    assert not any(script == "probe_batch.py" or "--probe" in arguments for script, arguments in calls)


def test_the_heads_grid_has_few_and_many_genera_and_real_fragments(capsys):
    paper_mini.main(["--grid", "heads", "--real", "somewhere", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 3 * 10 and len(set(lines)) == len(lines)
    assert sum("--max-steps" in line for line in lines) == 30 and not any("--strategy random" in line for line in lines)


def test_the_pretraining_genomes_fill_all_splits():
    """Of a genus of two sequences one trains and one tests: three are needed for validation to have any."""
    for genera, sequences, seed in [*paper_mini.PRETRAINING.values(), *paper_mini.GENOMES.values()]:
        assert sequences / genera >= 3
    for genera, sequences, seed in paper_mini.PRETRAINING.values():
        assert seed not in [other for _, _, other in paper_mini.GENOMES.values()]


def test_a_run_that_fails_is_named(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="no-such-flag"):
        paper_mini.python("train.py", "--no-such-flag")
    with pytest.raises(InputError, match="--grid heads"):
        paper_mini.main(["--real", "x"])
    with pytest.raises(InputError, match="--real .*: no taxdmp"):  # before anything is made
        paper_mini.main(["--grid", "heads", "--real", str(tmp_path), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")])
    assert not list(tmp_path.iterdir())


def test_ctrl_c_begins_nothing_more(calls, tmp_path, monkeypatch):
    def interrupted(futures):
        yield next(as_completed(futures))
        raise KeyboardInterrupt

    as_completed = paper_mini.concurrent.futures.as_completed
    monkeypatch.setattr(paper_mini.concurrent.futures, "as_completed", interrupted)
    stand_in = paper_mini.python

    def python(script, *arguments, threads=1):
        time.sleep(0.2 * (script == "train.py"))
        return stand_in(script, *arguments)

    monkeypatch.setattr(paper_mini, "python", python)
    with pytest.raises(KeyboardInterrupt):
        paper_mini.main(["--quick", "--jobs", "1", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")])
    assert sum(script == "train.py" for script, _ in calls) <= 3 and not (tmp_path / "runs" / "paper-quick.md").exists()
