"""examples/train.sbatch, run as SLURM would, with stand-ins for srun and scontrol: the early
signal, the requeue, the end.
"""

import json
import os
import signal
import subprocess
import sys
import time

from helpers import ROOT, command
from runs import free_port

from taxa.training.run import read_last

SRUN = """#!/bin/bash
# Starts two tasks of everything after the options, passes SIGUSR1 on to them, and leaves with the
# highest status of a task.
shift
tasks=()
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
echo $$ > "$STATE/srun.pid"
status=0
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    # The signal ends a wait, not the task.
    while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
    [ $code -gt $status ] && status=$code
done
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$STATE/requeued"; fi
"""


def sbatch(state, arguments, restarts):
    environment = os.environ | {
        "PATH": f"{state}:{os.environ['PATH']}",
        "STATE": str(state),
        "PYTHON": sys.executable,
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    return subprocess.Popen(
        [ROOT / "examples" / "train.sbatch", *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def test_the_sbatch_file(short, weights, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    arguments = command(
        "tiny-nt", "ia3", short, weights, tmp_path / "run",
        "--batch-size", "4", "--max-steps", "60", "--log-every", "1", "--epochs", "10",
    )
    log = tmp_path / "run" / "log.jsonl"

    def three_lines_logged():
        return log.exists() and len(log.read_text().splitlines()) >= 3

    job = sbatch(tmp_path, arguments, 0)
    deadline = time.time() + 120
    while time.time() < deadline and not three_lines_logged():
        time.sleep(0.05)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, out + err
    assert (tmp_path / "requeued").read_text().startswith("requeue "), out + err
    assert "SIGUSR1: saved step" in err and err.count("saved step") == 1
    stopped = read_last(tmp_path / "run")["step"]
    assert 3 <= stopped < 60

    job = sbatch(tmp_path, arguments, 1)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, out + err
    assert f"resumed after step {stopped}" in out, out + err
    entries = map(json.loads, log.read_text().splitlines())
    steps = [entry["step"] for entry in entries if "loss" in entry]
    assert steps == list(range(1, 61))
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1
