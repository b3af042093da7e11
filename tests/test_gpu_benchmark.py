"""benchmarks/gpu.py at tiny sizes on the CPU: one cell of each sort, and the document."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu  # noqa: E402

from taxa.runtime.cli import InputError  # noqa: E402


def test_one_cell_of_each_sort(tmp_path, monkeypatch):
    keys = ("kind", "impl", "model", "strategy", "precision", "compile")
    wanted = [dict(zip(keys, values)) for values in (
        ("speed", "taxa", "tiny-nt", "lora", "fp32", False), ("speed", "taxa", "tiny-dnabert", "freeze75", "bf16", False),
        ("speed", "peer", "tiny-nt", "ia3", "fp32", False), ("speed", "taxa", "tiny-nt", "full", "fp32", True),
        ("speed", "taxa", "tiny-nt", "full", "tf32", False), ("ceiling", "taxa", "tiny-nt", "full", "fp32", False),
        ("ceiling", "peer", "tiny-nt", "full", "fp32", False))]
    assert all(cell in gpu.cells(tiny=True) for cell in wanted)
    monkeypatch.setattr(gpu, "cells", lambda tiny: wanted)
    flags = ["--device", "cpu", "--tiny", "--seconds", "0.01", "--memory-limit", "120MiB", "--out", str(tmp_path / "gpu.json")]
    gpu.main(flags)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    document = json.loads((tmp_path / "gpu.json").read_text())
    status = {tuple(cell[key] for key in keys): cell["status"] for cell in document["cells"]}
    assert {value for key, value in status.items() if key[4] == "tf32"} == {"not run: tf32 needs a CUDA device"}
    assert {value for key, value in status.items() if key[4] != "tf32"} == {"done"}
    assert all(cell["sequences_per_s"] > 0 for cell in document["cells"] if cell["status"] == "done" and cell["kind"] == "speed")
    ceilings = {cell["impl"]: cell["ceiling"] for cell in document["cells"] if cell["kind"] == "ceiling"}
    assert ceilings["taxa"] > ceilings["peer"] > 0

    late = [cell["status"] for cell in gpu.main([*flags, "--minutes", "1e-9"])["cells"] if cell["precision"] != "tf32"]
    assert set(late) == {"not run: no time left"}


def test_the_cells_of_the_issue_are_all_there():
    cells = gpu.cells(tiny=False)
    speed = {tuple(cell[key] for key in ("impl", "model", "strategy", "precision", "compile")) for cell in cells if cell["kind"] == "speed"}
    wanted = {("taxa", model, strategy, precision, compiled) for model in ("nt50m", "nt100m", "nt250m", "dnabert2")
              for strategy in gpu.STRATEGIES for precision in ("fp32", "tf32", "bf16") for compiled in (False, True)}
    assert wanted <= speed and len(cells) == len({tuple(cell.items()) for cell in cells})


def test_wrong_input_is_one_line(tmp_path):
    with pytest.raises(InputError, match="add --tiny"):
        gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(InputError, match="no such folder"):
        gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "there" / "gpu.json")])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cpu --tiny"):
            gpu.main(["--out", str(tmp_path / "gpu.json")])
