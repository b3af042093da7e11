"""Kill a run by two processes again and again, at random moments, and see that it ends as one
that nobody touched. `make soak`.

  python tests/soak.py --kills 20 --seed 0

The same command is run three times. The first run is left alone. The second is killed (SIGKILL to
both of its processes, or to one of them, or SIGTERM to both) at moments drawn from the seed, now
and then has a bit of its last.pt flipped, and is resumed each time. The third is run by two
torchrun agents that meet by a rendezvous, as two machines would. All three must end with the same
bits. The script prints one JSON line, and writes it to --out.

The processes of the first two runs are forked from this one, which has already imported what they
need: otherwise most of the time would go into the imports.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from runs import assert_same_end, free_port, ranks

import prepare
import train
from taxa.data.batches import micro_batches
from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_int, run
from taxa.runtime.cli import seed as seed_type
from taxa.runtime.files import write_json
from taxa.training import checkpoint
from taxa.training.run import LAST, PREVIOUS

KINDS = ("SIGKILL to all", "SIGKILL to rank 0", "SIGKILL to rank 1", "SIGTERM to all")
LIMIT = 60  # seconds in which all processes of a run must be gone when one is


def start(arguments, folder):
    """Start two ranks; what they print goes to a file beside the run. Returns their process ids."""
    with open(folder.with_suffix(".txt"), "ab") as file:
        return ranks(2, lambda: train.main([*arguments, "--out", str(folder)]), file)


def status_of(found):
    """The exit status in what os.waitid() found, None for nothing; a signal is negative."""
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def ends(processes, seconds):
    """Wait for processes, at most so long. Returns their exit statuses, None for the living."""
    deadline = time.time() + seconds
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT  # WNOWAIT: so that it can be asked again
    while True:
        gone = [os.waitid(os.P_PID, process, look) for process in processes]
        if None not in gone or time.time() > deadline:
            return [status_of(found) for found in gone]
        time.sleep(0.01)


def strike(processes, kind):
    """End a run as `kind` says; returns how long it took until all of it was gone."""
    number = signal.SIGTERM if kind.startswith("SIGTERM") else signal.SIGKILL
    struck = processes if kind.endswith("all") else [processes[int(kind[-1])]]
    begun = time.time()
    for process in struck:
        os.kill(process, number)
    if None in ends(processes, LIMIT):
        raise InputError(f"{kind}: a process lives on {LIMIT} seconds later")
    return time.time() - begun


def last_step(folder):
    """The step that a resumed run would go on from; 0 when nothing is saved."""
    for name in (LAST, PREVIOUS):
        if (folder / name).exists():
            try:
                return checkpoint.read(folder / name, checkpoint.RESUME_STATE)["step"]
            except InputError:
                pass
    return 0


def sequences_lost(data, batch_size, epochs, folder):
    """How many training sequences the last.pt of a finished run did not see exactly once an epoch.

    The steps of last.pt say what was seen; 0 when every sequence was.
    """
    N = json.loads((data / "manifest.json").read_text())["splits"]["train"]
    batches = []
    for epoch in range(epochs):
        for micros, _ in micro_batches(N, 42, epoch, 2 * batch_size, 1, rank=0, size=1):
            batches += [rows for rows, _ in micros]
    taken = np.concatenate(batches[:last_step(folder)])
    return int(np.abs(np.bincount(taken, minlength=N) - epochs).sum())


def end_of(folder):
    """The end of what the processes of a run printed."""
    return folder.with_suffix(".txt").read_text()[-3000:]


def times_noticed(folder):
    """How often a run went on from last.prev.pt, its last.pt being damaged."""
    return folder.with_suffix(".txt").read_text().count("going on from last.prev.pt")


def flip_a_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def run_by_agents(arguments, folder, scratch):
    """The run by two torchrun agents. Raises InputError where one of them fails."""
    rendezvous = [
        "--nnodes", "2", "--nproc_per_node", "1",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}",
        "--rdzv_id", "soak", "--local_addr", "127.0.0.1",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous,
               str(ROOT / "train.py"), *arguments, "--out", str(folder)]
    # As many threads as the others have: the last digits depend on their number.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".txt"), "ab") as file:
        agents = [
            subprocess.Popen(command, cwd=scratch, env=one_thread, stdout=file, stderr=file)
            for _ in range(2)
        ]
    if any(agent.wait() for agent in agents):
        raise InputError(f"two agents did not train one model:\n{end_of(folder)}")


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--kills", type=positive_int, default=20, help="default 20")
    add("--seed", type=seed_type, default=0,
        help="of the moments, the kinds and the damage (default 0)")
    add("--epochs", type=positive_int, default=6, help="of each run (default 6)")
    add("--strategy", default="lora", help="default lora, whose dropout is the harder to resume")
    add("--out", metavar="FILE", help="write the JSON line there, too")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="taxa-soak-") as scratch:
        scratch = Path(scratch)
        data = scratch / "data"
        prepare.main(["--demo", "--demo-sequences", "2000", "--length", "90",
                      "--tokenizers", "nt", "--out", str(data)])
        arguments = [
            "--model", "tiny-nt", "--strategy", args.strategy, "--data", str(data),
            "--epochs", str(args.epochs), "--batch-size", "8", "--patience", "100",
            "--save-every", "7", "--log-every", "5",
        ]
        # Where nothing was saved yet, --resume starts from the beginning.
        again = [*arguments, "--resume"]
        whole, killed, hosts = scratch / "whole", scratch / "killed", scratch / "hosts"

        began = time.time()
        if ends(start(arguments, whole), 600) != [0, 0]:
            raise InputError(f"the run that nobody touched failed:\n{end_of(whole)}")
        lasts = time.time() - began

        def finish(processes):
            if ends(processes, 600) != [0, 0]:
                raise InputError(f"the run did not come to its end:\n{end_of(killed)}")
            assert_same_end(whole, killed)

        done = {}  # {kind: number}
        flips = 0
        slowest = 0.0
        while sum(done.values()) < args.kills:
            processes = start(again, killed)
            before = last_step(killed)
            kind = rng.choice(KINDS)
            wait = rng.uniform(0, 2 * lasts / args.kills)
            statuses = ends(processes, wait)
            if statuses[0] == 0 or None not in statuses:
                # It came to its end before this blow: once more from the start.
                finish(processes)
                shutil.rmtree(killed)
                continue
            slowest = max(slowest, strike(processes, kind))
            done[kind] = done.get(kind, 0) + 1
            print(f"{sum(done.values())}: {kind} after {wait:.1f} s, "
                  f"step {before} -> {last_step(killed)}", flush=True)
            noticed = times_noticed(killed)
            if (killed / PREVIOUS).exists() and noticed == flips and rng.random() < 0.3:
                flip_a_bit(killed / LAST, rng)
                flips += 1
                print("   one bit of last.pt flipped", flush=True)
        finish(start(again, killed))
        noticed = times_noticed(killed)
        if noticed != flips:
            raise InputError(f"{flips} bits flipped, but last.prev.pt was used {noticed} times")

        run_by_agents(arguments, hosts, scratch)
        assert_same_end(whole, hosts)

        result = {
            "kills": done,
            "survived": sum(done.values()),
            "bits_flipped_in_last_pt": flips,
            "steps": last_step(whole),
            "seconds_until_all_were_gone": round(slowest, 1),
            "sequences_lost": sequences_lost(data, 8, args.epochs, killed),
            "bit_for_bit": True,
            "two_agents_bit_for_bit": True,
            "seconds": round(time.time() - began),
        }
        print(json.dumps(result))
        if args.out:
            write_json(args.out, result)
        shutil.rmtree(scratch / "data")
    return result


if __name__ == "__main__":
    run(main)
