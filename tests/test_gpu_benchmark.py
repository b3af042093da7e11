"""benchmarks/gpu.py at tiny sizes on the CPU: its arithmetic against a counter of operations, and its document."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from taxa.backbones import load_backbone
from taxa.model import TaxonClassifier, sequence_losses
from taxa.strategies import inject, settings_from_flags, train_only, trainable_names

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402


@pytest.mark.parametrize("name", ["tiny-nt", "tiny-dnabert"])
@pytest.mark.parametrize("strategy", ["full", "freeze75", "ia3"])
def test_model_flops_are_those_that_torch_counts(name, strategy):
    T = 64
    model = TaxonClassifier(load_backbone(name, pretrained=False), (4, 57, 1884)).train()
    settings = settings_from_flags(name, strategy)
    inject(model, settings)
    train_only(model, trainable_names(model, settings))
    ids = torch.randint(5, 1000, (1, T))
    with FlopCounterMode(display=False) as counter:
        sequence_losses(model(ids, torch.ones_like(ids)), torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    ours = gpu.model_flops(model, T) - (0 if attention else 4 * T * T * 128 * 2 * 3)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.06)  # ours leaves out the heads


def test_every_kind_of_cell_runs(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--tiny", "--seconds", "0.01", "--minutes", "0.5"]
    done = subprocess.run([*map(str, command), "--out", str(tmp_path / "gpu.json")], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    cells = json.loads((tmp_path / "gpu.json").read_text())["cells"]
    assert len(cells) == len(gpu.cells(tiny=True)) and not [cell for cell in cells if cell["status"].startswith("failed")]
    reached = [cell for cell in cells if cell["status"] == "done"]
    assert {(cell["kind"], cell["impl"]) for cell in reached} >= {("ceiling", "taxa"), ("speed", "taxa")}
    assert all(cell["sequences_per_s"] > 0 for cell in reached if cell["kind"] == "speed")
    ceilings = {cell["strategy"]: cell["ceiling"] for cell in reached if cell["kind"] == "ceiling" and cell["impl"] == "taxa"}
    assert ceilings["freeze75"] > ceilings["full"] > 0
    assert all(cell["status"].startswith("not run") for cell in cells if cell not in reached)


def test_the_cells_of_the_issue_are_all_there():
    cells = gpu.cells(tiny=False)
    speed = {tuple(cell[key] for key in ("impl", "model", "strategy", "precision", "compile")) for cell in cells if cell["kind"] == "speed"}
    wanted = {("taxa", model, strategy, precision, compiled) for model in ("nt50m", "nt100m", "nt250m", "dnabert2")
              for strategy in gpu.STRATEGIES for precision in ("fp32", "tf32", "bf16") for compiled in (False, True)}
    assert wanted <= speed and len(cells) == len({tuple(cell.items()) for cell in cells})
