"""benchmarks/precision.py: a run per precision and seed, and its table, read from the run
folders.
"""

import importlib.util
import json

import pytest
from helpers import ROOT, forked

from taxa.errors import InputError

SPEC = importlib.util.spec_from_file_location("precision", ROOT / "benchmarks" / "precision.py")
precision = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(precision)


def test_two_precisions_on_a_cpu(short, weights, tmp_path, monkeypatch, capsys):
    def run(words, **_):
        return forked(words[1:], cwd=tmp_path)[0]

    monkeypatch.setattr(precision.subprocess, "run", run)
    flags = [
        "--data", str(short), "--model", "tiny-nt", "--strategy", "ia3",
        "--max-steps", "2", "--batch-size", "8", "--log-every", "1", "--seeds", "1",
        "--device", "cpu", "--weights", str(weights["tiny-nt"]), "--out", str(tmp_path / "runs"),
    ]
    precision.main(flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| fp32", "| bf16"]
    written = json.loads((tmp_path / "runs" / "precision.json").read_text())
    assert set(written["results"]) == {"fp32", "bf16"} and len(written["commands"]) == 2
    for name, by_seed in written["results"].items():
        folder = tmp_path / "runs" / f"tiny-nt-ia3-{name}-seed1"
        assert json.loads((folder / "args.json").read_text())["precision"] == name
        metrics = json.loads((folder / "metrics.json").read_text())
        assert by_seed["1"]["genus"] == metrics["ranks"]["genus"]["balanced_accuracy"]
        assert by_seed["1"]["steps_per_s"] > 0
    with pytest.raises(InputError, match="exists"):
        precision.main(flags)


def test_table_compares_seed_by_seed():
    found = {
        "fp32": {
            1: {"loss": 2.0, "steps_per_s": 1.0, "genus": 0.5},
            2: {"loss": 3.0, "steps_per_s": 2.0, "genus": 0.75},
        },
        "bf16": {
            2: {"loss": 3.5, "steps_per_s": 4.0, "genus": 0.5},
            1: {"loss": 2.25, "steps_per_s": 5.0, "genus": 0.25},
        },
    }
    *_, fp32, bf16 = precision.table(found).splitlines()
    assert fp32 == (
        "| fp32 | 2 | 2.5000 (2.0000 to 3.0000) | 0.6250 (0.5000 to 0.7500) |  "
        "| 1.50 (1.00 to 2.00) |"
    )
    assert bf16 == (
        "| bf16 | 2 | 2.8750 (2.2500 to 3.5000) | 0.3750 (0.2500 to 0.5000) "
        "| 0.3750 (0.2500 to 0.5000) | 4.50 (4.00 to 5.00) |"
    )


def test_tokens_must_be_there(short, tmp_path):
    with pytest.raises(InputError, match="has no tokens of dnabert"):
        precision.main([
            "--data", str(short), "--model", "dnabert2", "--strategy", "full",
            "--out", str(tmp_path / "runs"),
        ])
