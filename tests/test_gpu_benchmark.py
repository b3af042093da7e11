"""benchmarks/gpu.py at tiny sizes on the CPU: one cell of each sort, and the document."""

import json
import sys

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu

from taxa.errors import InputError

KEYS = ("kind", "impl", "model", "strategy", "precision", "compile", "activation_checkpointing")
TINY_NT, TINY_DNABERT = "tiny-nt", "tiny-dnabert"
WANTED = [
    dict(zip(KEYS, values)) for values in (
        ("product", "taxa", TINY_NT, "full", "fp32", None, "none"),
        ("speed", "taxa", TINY_NT, "full", "fp32", None, "none"),
        ("speed", "taxa", TINY_NT, "lora", "bf16", None, "selective"),
        ("speed", "taxa", TINY_DNABERT, "lora", "fp32", None, "none"),
        ("speed", "peer", TINY_NT, "full", "fp32", None, "none"),
        ("speed", "peer-sdpa", TINY_NT, "full", "fp32", None, "none"),
        ("forward", "taxa", TINY_NT, "full", "bf16", None, "none"),
        ("speed", "taxa", TINY_NT, "full", "tf32", None, "none"),
        ("speed", "taxa", TINY_DNABERT, "full", "bf16", "cudagraphs", "none"),
        ("ceiling", "taxa", TINY_NT, "full", "bf16", None, "none"),
    )
]


def test_one_cell_of_each_sort(tmp_path, monkeypatch):
    assert all(cell in gpu.cells(tiny=True) for cell in WANTED)
    monkeypatch.setattr(gpu, "cells", lambda tiny: WANTED)
    flags = ["--device", "cpu", "--tiny", "--seconds", "0.01", "--out", str(tmp_path / "gpu.json")]
    gpu.main(flags)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    cells = json.loads((tmp_path / "gpu.json").read_text())["cells"]
    for cell in cells:
        refused = cell["precision"] == "tf32" or cell["compile"] == "cudagraphs"
        if refused or cell["kind"] == "ceiling":
            assert cell["status"].startswith("not run: "), cell
        # An older transformers has no SDPA for this model.
        elif cell["impl"] != "peer-sdpa" or "does not support" not in cell["status"]:
            assert cell["status"] == "done", cell
    assert all(cell["sequences_per_s"] > 0 for cell in cells if "sequences_per_s" in cell)
    assert cells[1]["product_share"] > 0
    assert cells[3]["product_share"] is None  # no lone products of tiny-dnabert were measured
    late = gpu.main([*flags, "--minutes", "1e-9"])["cells"]
    statuses = {
        cell["status"] for cell in late
        if cell["precision"] != "tf32" and cell["compile"] is None
    }
    assert statuses == {"not run: no time left"}


def test_no_cell_twice_and_the_issue_of_each_table():
    cells = gpu.cells(tiny=False)
    assert len(cells) == len({tuple(cell.items()) for cell in cells})
    speed = {tuple(cell[key] for key in KEYS[1:]) for cell in cells if cell["kind"] == "speed"}
    for strategy in gpu.STRATEGIES:
        for how, mode in ((None, "none"), ("layers", "none"), (None, "selective"), (None, "full")):
            assert ("taxa", "nt50m", strategy, "bf16", how, mode) in speed
    peers = {
        ("peer-sdpa", "nt50m", "full", precision, None, "none")
        for precision in ("fp32", "tf32", "bf16")
    }
    assert peers <= speed


def test_wrong_input_is_one_line(tmp_path):
    with pytest.raises(InputError, match="add --tiny"):
        gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(InputError, match="no such folder"):
        missing = tmp_path / "there" / "gpu.json"
        gpu.main(["--device", "cpu", "--tiny", "--out", str(missing)])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cpu --tiny"):
            gpu.main(["--out", str(tmp_path / "gpu.json")])
