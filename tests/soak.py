"""Kill a run by two processes again and again, at random moments, and see that it ends as one that nobody touched. `make soak`.

  python tests/soak.py --kills 20 --seed 0

Three runs of the same command under torchrun: one is left alone; one is killed (SIGKILL to all of its processes, or to one of them, or
SIGTERM to torchrun) at moments drawn from the seed, now and then has a byte of its last.pt flipped, and is resumed each time; one is by
two torchrun agents that meet by a rendezvous, as two machines would. All three must end with the same bits. Prints one JSON line, and
writes it to --out.
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

import numpy as np  # noqa: E402
import prepare  # noqa: E402
from taxa import checkpoint, resume  # noqa: E402
from taxa.cli import InputError, Parser, positive_int, run  # noqa: E402
from taxa.cli import seed as seed_type  # noqa: E402
from taxa.dataset import micro_batches  # noqa: E402
from taxa.files import write_json  # noqa: E402
from test_reliability import free_port  # noqa: E402
from test_resume import assert_same_end  # noqa: E402

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
KINDS = ("SIGKILL to all", "SIGKILL to rank 0", "SIGKILL to rank 1", "SIGTERM to torchrun")


def start(arguments, folder, launcher):
    """torchrun in a session of its own, so that its whole group can be killed. Its output goes to a file beside the run."""
    with open(folder.with_suffix(".txt"), "ab") as file:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "train.py"), *arguments, "--out",
                                 str(folder)], cwd=folder.parent, stdout=file, stderr=file, start_new_session=True, env=ENVIRONMENT)


def workers(torchrun):
    """The process ids of the training processes of a torchrun, in the order they were started: by rank."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun.pid)], capture_output=True, text=True)
    return sorted(map(int, done.stdout.split()))


def strike(torchrun, kind):
    """End a run as `kind` says, and wait until all of it is gone."""
    ids = workers(torchrun)
    if kind == "SIGTERM to torchrun":
        torchrun.terminate()
    elif kind == "SIGKILL to all" or len(ids) < 2:
        os.killpg(torchrun.pid, signal.SIGKILL)
        for worker in ids:  # torchrun gives each a session of its own
            kill(worker)
    else:
        kill(ids[int(kind[-1])])
    begun = time.time()
    torchrun.wait(timeout=60)
    for worker in ids:
        while Path(f"/proc/{worker}").exists() and time.time() - begun < 60:
            time.sleep(0.01)
        if Path(f"/proc/{worker}").exists():
            raise InputError(f"{kind}: process {worker} lives on a minute later")
    return time.time() - begun


def kill(process):
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass


def last_step(folder):
    """The step that a resumed run would go on from; 0 when nothing is saved."""
    for name in (resume.LAST, resume.PREVIOUS):
        if (folder / name).exists():
            try:
                return checkpoint.read(folder / name, checkpoint.RESUME_STATE)["step"]
            except InputError:
                pass
    return 0


def until_it_trains(torchrun, folder):
    """Wait for the first line of the log; seconds since the call."""
    begun = time.time()
    while torchrun.poll() is None and not (folder / "log.jsonl").exists():
        time.sleep(0.01)
    return time.time() - begun


def sequences_lost(data, batch_size, epochs, folder):
    """How many training sequences the last.pt of a finished run did not see exactly once an epoch: by its steps, 0 when all were taken."""
    N = json.loads((data / "manifest.json").read_text())["splits"]["train"]
    plans = [micro_batches(N, 42, epoch, 2 * batch_size, 1, 0, 1) for epoch in range(epochs)]
    taken = np.concatenate([rows for plan in plans for micros, _ in plan for rows, _ in micros][:last_step(folder)])
    return int(np.abs(np.bincount(taken, minlength=N) - epochs).sum())


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--kills", type=positive_int, default=20, help="default 20")
    add("--seed", type=seed_type, default=0, help="of the moments, the kinds and the damage (default 0)")
    add("--epochs", type=positive_int, default=6, help="of each run (default 6)")
    add("--strategy", default="lora", help="default lora, whose dropout is the harder to resume")
    add("--out", metavar="FILE", help="write the JSON line there, too")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="taxa-soak-") as scratch:
        scratch = Path(scratch)
        data = scratch / "data"
        prepare.main(["--demo", "--demo-sequences", "2000", "--length", "90", "--tokenizers", "nt", "--out", str(data)])
        arguments = ["--model", "tiny-nt", "--strategy", args.strategy, "--data", str(data), "--epochs", str(args.epochs),
                     "--batch-size", "8", "--patience", "100", "--save-every", "7", "--log-every", "5"]
        whole, killed, hosts = scratch / "whole", scratch / "killed", scratch / "hosts"
        began = time.time()
        torchrun = start(arguments, whole, ["--standalone", "--nproc_per_node", "2"])
        starting = until_it_trains(torchrun, whole)
        if torchrun.wait() != 0:
            raise InputError(f"the run that nobody touched failed:\n{whole.with_suffix('.txt').read_text()[-3000:]}")
        training = time.time() - began - starting

        done, flips, steps, slowest = {}, 0, [], 0.0
        while sum(done.values()) < args.kills:
            torchrun = start([*arguments, *["--resume"] * killed.exists()], killed, ["--standalone", "--nproc_per_node", "2"])
            before, kind = last_step(killed), rng.choice(KINDS)
            wait = rng.uniform(0.5 * starting, 1.2 * starting + 1.5 * training / args.kills)  # now and then while it is still starting
            try:
                torchrun.wait(timeout=wait)
                break  # it came to its end before this blow
            except subprocess.TimeoutExpired:
                slowest = max(slowest, strike(torchrun, kind))
            done[kind] = done.get(kind, 0) + 1
            steps.append(last_step(killed))
            print(f"{sum(done.values())}: {kind} after {wait:.1f} s, step {before} -> {steps[-1]}", flush=True)
            noticed = killed.with_suffix(".txt").read_text().count("going on from last.prev.pt")
            if (killed / "last.prev.pt").exists() and noticed == flips and rng.random() < 0.3:
                content = bytearray((killed / "last.pt").read_bytes())
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                (killed / "last.pt").write_bytes(content)
                flips += 1
                print("   one bit of last.pt flipped", flush=True)
        if torchrun.poll() != 0 and start([*arguments, "--resume"], killed, ["--standalone", "--nproc_per_node", "2"]).wait() != 0:
            raise InputError(f"the run did not come to its end:\n{killed.with_suffix('.txt').read_text()[-3000:]}")
        noticed = killed.with_suffix(".txt").read_text().count("going on from last.prev.pt")
        if noticed != flips:
            raise InputError(f"{flips} bits flipped, but last.prev.pt was used {noticed} times")
        assert_same_end(whole, killed)

        rendezvous = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}",
                      "--rdzv_id", "soak"]
        agents = [start(arguments, hosts, [*rendezvous, "--local_addr", "127.0.0.1"]) for _ in range(2)]
        if any(agent.wait() for agent in agents):
            raise InputError(f"two agents did not train one model:\n{hosts.with_suffix('.txt').read_text()[-3000:]}")
        assert_same_end(whole, hosts)

        result = {"kills": done, "survived": sum(done.values()), "bits_flipped_in_last_pt": flips, "steps": last_step(whole),
                  "seconds_until_all_were_gone": round(slowest, 1), "sequences_lost": sequences_lost(data, 8, args.epochs, killed),
                  "bit_for_bit": True, "two_agents_bit_for_bit": True, "seconds": round(time.time() - began)}
        print(json.dumps(result))
        if args.out:
            write_json(args.out, result)
        shutil.rmtree(scratch / "data")
    return result


if __name__ == "__main__":
    run(main)
