"""Two processes: how often gradients cross between them, counted in train.py's own loop."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Runs train.py in each process with a DistributedDataParallel that counts its all-reduces, one for each bucket of gradients.
COUNTING = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import train

buckets = []

class Counting(train.DistributedDataParallel):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_comm_hook(None, self.count)

    @staticmethod
    def count(state, bucket):
        buckets.append(bucket.index())
        return allreduce_hook(state, bucket)

train.DistributedDataParallel = Counting
train.main(sys.argv[1:])
if os.environ["RANK"] == "0":
    json.dump(buckets, open({out!r}, "w"))
"""


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_has_one_all_reduce_for_each_bucket(short, tmp_path, accumulate):
    """However many micro-batches a step has: those before the last add up where they are (no_sync)."""
    script = tmp_path / "counting.py"
    script.write_text(COUNTING.format(root=str(ROOT), out=str(tmp_path / "buckets.json")))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
                    "--model", "tiny-nt", "--strategy", "full", "--data", str(short), "--device", "cpu", "--batch-size", "4",
                    "--accumulate", str(accumulate), "--max-steps", "4", "--out", str(tmp_path / "run")], check=True, timeout=300)
    buckets = json.loads((tmp_path / "buckets.json").read_text())
    n = len(set(buckets))  # of the steps after the first, in which DDP has yet to learn the order of the gradients and may have fewer
    assert buckets[-3 * n:] == list(range(n)) * 3 and 1 <= len(buckets) - 3 * n <= n
