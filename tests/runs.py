"""Run a list of train.py and evaluate.py command lines in one process (or, under torchrun, in each of several).

  torchrun --nproc_per_node 2 tests/runs.py '[["train", "--model", ...], ["evaluate", "ckpt.pt"]]'
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
import train  # noqa: E402
from taxa.distributed import world  # noqa: E402

if __name__ == "__main__":
    with world("cpu"):  # one process group for all of them
        for script, *arguments in json.loads(sys.argv[1]):
            {"train": train, "evaluate": evaluate}[script].main(arguments)
