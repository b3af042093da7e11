"""Kill a queue of tiny runs again and again, at random moments, and see that every run ends as in
one that nobody touched. `make soak`.

  python tests/soak_study.py --kills 5 --seed 0

The same study.py is called twice. One call is left alone; the other is ended by SIGKILL at moments
drawn from the seed, and started again at once. Every metrics.json must be the same to the last
byte. The script prints one JSON line.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare
from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_int, run
from taxa.runtime.cli import seed as seed_type

GRID = "model,strategy,lr\n" + "".join(
    f"tiny-nt,{strategy},{lr}\n"
    for strategy in ("lora", "ia3", "freeze75")
    for lr in (0.01, 0.003)
)
RUNS = 12


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--kills", type=positive_int, default=5, help="default 5")
    add("--seed", type=seed_type, default=0, help="of the moments (default 0)")
    add("--jobs", type=positive_int, default=2,
        help="runs at a time, one thread each (default 2)")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="taxa-soak-") as scratch:
        scratch = Path(scratch)
        prepare.main(["--demo", "--demo-sequences", "800", "--length", "90",
                      "--tokenizers", "nt", "--out", str(scratch / "data")])
        (scratch / "grid.csv").write_text(GRID)
        common = "--device cpu --epochs 4 --batch-size 8 --save-every 7 --log-every 5"
        words = [
            sys.executable, str(ROOT / "study.py"),
            "--grid", str(scratch / "grid.csv"), "--data", str(scratch / "data"),
            "--seeds", "2", "--jobs", str(args.jobs), "--set", common,
        ]

        def start(folder):
            with open(scratch / f"{folder}.txt", "ab") as output:
                return subprocess.Popen(
                    [*words, "--out", str(scratch / folder)], stdout=output, stderr=output,
                    env=os.environ | {"OMP_NUM_THREADS": "1"})

        def finish(folder, process):
            if process.wait():
                printed = (scratch / f"{folder}.txt").read_text()
                raise InputError(f"the queue {folder} did not end well:\n{printed[-3000:]}")
            files = (scratch / folder).glob("*/metrics.json")
            found = {path.parent.name: path.read_bytes() for path in files}
            if len(found) != RUNS:
                raise InputError(f"{len(found)} of {RUNS} runs of the queue {folder} are done")
            return found

        started = time.time()
        whole = finish("whole", start("whole"))
        lasts = time.time() - started
        done = []  # at each kill, the number of finished runs
        while len(done) < args.kills:
            process = start("killed")
            try:
                process.wait(rng.uniform(0, 2 * lasts / args.kills))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done.append(len(list((scratch / "killed").glob("*/metrics.json"))))
                print(f"kill {len(done)}: {done[-1]} of {RUNS} runs are done", flush=True)
            else:  # it came to its end before this blow: once more from the start
                if finish("killed", process) != whole:
                    raise InputError(
                        "the numbers are not those of the queue that nobody touched")
                (scratch / "killed").rename(scratch / f"ended-{len(done)}-{time.time()}")
        if finish("killed", start("killed")) != whole:
            raise InputError("the numbers are not those of the queue that nobody touched")
        print(json.dumps({
            "runs": RUNS,
            "kills": args.kills,
            "done_at_each": done,
            "metrics_equal": True,
            "seconds": round(time.time() - began),
        }))


if __name__ == "__main__":
    run(main)
