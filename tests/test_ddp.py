"""Two processes: how often gradients cross between them, and checkpointed layers under DDP.

The all-reduces are counted in train.py's own loop.
"""

import json

import pytest
from helpers import ROOT, forked

from taxa.training.activation_checkpointing import MODES

# Runs train.py in each process with a DistributedDataParallel that counts its all-reduces, one for
# each bucket of gradients.
COUNTING = """
import json, os, sys
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
train.main(sys.argv[2:])
if os.environ["RANK"] == "0":
    json.dump(buckets, open({out!r}, "w"))
"""


def arguments(model, strategy, data, out, *flags):
    """Those of train.py, for four steps."""
    return [
        "--model", model, "--strategy", strategy, "--data", data, "--device", "cpu",
        "--batch-size", "4", "--max-steps", "4", "--out", out, *flags,
    ]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_has_one_all_reduce_for_each_bucket(short, tmp_path, accumulate):
    """However many micro-batches a step has: those before the last add up in place (no_sync)."""
    counting = COUNTING.format(out=str(tmp_path / "buckets.json"))
    words = arguments("tiny-nt", "full", short, tmp_path / "run", "--accumulate", accumulate)
    for rank in forked(["-c", counting, *words], ["-c", counting, *words], cwd=ROOT):
        assert rank.returncode == 0, rank.stderr
    buckets = json.loads((tmp_path / "buckets.json").read_text())
    # Of the steps after the first: in that one DDP has yet to learn the order of the gradients, and
    # may have fewer buckets.
    n = len(set(buckets))
    assert buckets[-3 * n:] == list(range(n)) * 3
    assert 1 <= len(buckets) - 3 * n <= n


@pytest.mark.parametrize("model, strategy", [("tiny-nt", "full"), ("tiny-dnabert", "lora")])
def test_checkpointed_layers_give_the_same_losses_to_the_last_digit(
    model, strategy, short, tmp_path
):
    losses = {}
    for mode in MODES:
        flags = ("--log-every", "1", "--activation-checkpointing", mode)
        words = ["train.py", *arguments(model, strategy, short, tmp_path / mode, *flags)]
        for rank in forked(words, words, cwd=ROOT):
            assert rank.returncode == 0, rank.stderr
        log = map(json.loads, (tmp_path / mode / "log.jsonl").read_text().splitlines())
        losses[mode] = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses["none"]) == 4
    assert losses["none"] == losses["selective"] == losses["full"]
