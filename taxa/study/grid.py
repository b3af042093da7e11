"""The grid of a study: which runs, by which flags of train.py, and what has become of each.

A run is its flags, {flag: text} without the leading "--"; the text of a flag that takes no value is "yes". The published grid comes from
the package's table of the 33 published runs, any other from a CSV file whose columns are flags. Nothing here imports torch, so that a plan
takes no time.
"""

import csv
import re
import shlex
import signal
import time
from pathlib import Path
from typing import NamedTuple

from taxa import STUDY_SEED
from taxa.errors import InputError, Saved
from taxa.runtime.cli import NO_EFFECT
from taxa.runtime.files import read_json
from taxa.study.published_runs import PublishedRow, published_rows

PROTOCOLS = ("corrected", "published")
# Sequences per device and step, and devices, of the published runs (docs/PROTOCOL.md). A step holds their product on any number of GPUs.
PUBLISHED_BATCH = {"nt50m": (128, 1), "nt100m": (64, 1), "nt250m": (64, 1), "dnabert2": (16, 4), "dnaberts": (16, 4)}
OF_THE_STUDY = ("data", "resume", "overwrite", "dry-run", "num-classes", "out")  # flags that study.py gives to every run itself
PATHS = ("data", "weights", "adapters", "out")  # their values may hold spaces
# Flags that may differ between a run that is there and the plan: paths (the data are compared by checksum), what changes no number, and
# batch-size and accumulate, whose product with the number of processes is compared.
MAY_DIFFER = (*OF_THE_STUDY, "weights", "batch-size", "accumulate", *(name.replace("_", "-") for name in NO_EFFECT))
STOPPED = Saved.status
FRESH = 600  # seconds: what wrote a line since then is running


class Planned(NamedTuple):
    """One run. name: of its folder in --out; where: what a message calls it; published: its row of the published table, or None."""

    name: str
    flags: dict
    where: str
    published: PublishedRow | None = None


def flags_of(words):
    """{flag: text} of a command line's words; what stands before the first flag (the script) is left out."""
    flags, flag = {}, None
    for word in words:
        if word.startswith("--") and word != "--":
            flag, equals, value = word[2:].partition("=")
            flag = {"lora-r": "r"}.get(flag, flag)
            flags[flag] = value
        elif flag:
            flags[flag] = f"{flags[flag]} {word}".strip()
    return {flag: text or "yes" for flag, text in flags.items()}


def words_of(flags):
    """The words of a command line that flags_of() reads as these flags."""
    words = []
    for flag, text in flags.items():
        words += [f"--{flag}", *([] if text == "yes" else [text] if flag in PATHS else text.split())]
    return words


def set_flags(text):
    """The flags of --set. Raises InputError for text that is no flags, and for flags that the grid or study.py decides."""
    words = shlex.split(text)
    if words and not words[0].startswith("--"):
        raise InputError(f"--set '{text}' begins with no flag: write it like --set '--precision bf16 --compile'")
    flags = flags_of(words)
    for flag in flags:
        if flag in (*OF_THE_STUDY, "model", "strategy", "protocol", "seed"):
            raise InputError(f"--set: --{flag} is not for all runs alike: that is what the grid, --protocol, --seeds, --data and --out say")
    return flags


# ---------------------------------------------------------------- which runs

def published_grid(protocols, seeds, processes):
    """The 33 published runs in each protocol, for `seeds` seeds from the published one on; a list of Planned.

    processes: per run; a step holds the published number of sequences whatever that is. Raises InputError where it does not divide them.
    """
    rows, runs = published_rows(), []
    for seed in range(STUDY_SEED, STUDY_SEED + seeds):  # a table of part of the runs is then of all rows
        for protocol in protocols:
            for row in rows:
                flags = {"model": row.model, "strategy": row.strategy} | ({"r": str(row.r)} if row.r else {})
                flags |= {"protocol": protocol, "lr": str(row.learning_rate), "epochs": str(row.epochs)}
                flags |= {"data-fraction": str(row.data_fraction)} if row.data_fraction != 1 else {}
                flags |= _batch(row.model, processes) | {"seed": str(seed)}
                parts = [f"row{row.row:02d}", row.model, row.strategy, *([f"r{row.r}"] if row.r else []), protocol]
                runs.append(Planned("-".join([*parts, f"seed{seed}"]), flags, f"row {row.row}", row))
    return runs


def _batch(model, processes):
    """--batch-size and --accumulate with which a step on `processes` processes holds the published number of sequences."""
    per_device, devices = PUBLISHED_BATCH[model]
    each, rest = divmod(per_device * devices, processes)
    if rest:
        raise InputError(f"--gpus-per-run {processes} does not divide the {per_device * devices} sequences of a published step of {model}: "
                         "give a power of two, or a --grid with batch sizes of your own")
    size = min(per_device, each)
    return {"batch-size": str(size)} | ({"accumulate": str(each // size)} if each > size else {})


def read_grid(path, seeds):
    """The runs of a CSV file, one or more a line: a list of Planned.

    Columns are flags of train.py, model and strategy among them; an empty cell is a flag that is not given, "yes" one without a value. The
    column seed may hold several, as "1 2 3"; without it a line has `seeds` of them from 42 on. The column name, if there is one, begins the
    name of the run folder; else all flags make it. Raises InputError that names the line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [column.strip().removeprefix("--").replace("_", "-") for column in next(reader, [])]
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise InputError(f"--grid {path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--grid {path}: not CSV in UTF-8 ({error})") from None
    for needed in ("model", "strategy"):
        if needed not in header:
            raise InputError(f"--grid {path}: its first line has no column {needed}; columns are flags of train.py")
    own = [column for column in header if column in OF_THE_STUDY and column != "data"]
    if own or len(set(header)) < len(header):
        raise InputError(f"--grid {path}: " + (f"--{own[0]} is study.py's own, not a column" if own else "two columns have the same name"))
    if not lines:
        raise InputError(f"--grid {path}: no run below the first line")
    runs, seen = [], {}
    for number, cells in lines:
        where = f"--grid {path}, line {number}"
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} cells, but the first line has {len(header)}")
        flags = {flag: cell for flag, cell in zip(header, cells) if cell}
        if not {"model", "strategy"} <= flags.keys():
            raise InputError(f"{where}: model and strategy must be given")
        name, of_line = flags.pop("name", None), flags.pop("seed", " ".join(str(STUDY_SEED + i) for i in range(seeds))).split()
        name = name or _name(flags)
        if not re.fullmatch(r"[\w.+=-]+", name) or name.startswith("."):
            raise InputError(f"{where}: '{name}' cannot name a folder: give a name of letters, digits, - _ . + = in a column 'name'")
        for seed in of_line:
            if not seed.isdigit():
                raise InputError(f"{where}: seed '{seed}' is not a number")
            run = Planned(f"{name}-seed{seed}", flags | {"seed": seed}, where)
            if run.name in seen:
                raise InputError(f"{where}: {run.name} is line {seen[run.name]} as well; a column 'name' tells them apart")
            seen[run.name] = number
            runs.append((of_line.index(seed), run))
    return [run for _, run in sorted(runs, key=lambda each: each[0])]  # seed by seed, as the published grid


def _name(flags):
    """ "few-tiny-nt-lora-r4-heads-frozen-lr0.01": what a line gives."""
    parts = [Path(flags["data"]).name] if "data" in flags else []
    parts += [flags["model"].rpartition("/")[2], flags["strategy"]]
    for flag, text in flags.items():
        if flag not in ("data", "model", "strategy"):
            value = Path(text).name if flag in PATHS else text.replace(" ", "_")
            parts.append(flag if text == "yes" else f"{flag}{value}" if value[0].isdigit() else f"{flag}-{value}")
    return "-".join(parts)


# ---------------------------------------------------------------- what has become of a run

def document(path):
    """The JSON document in a file, {} where there is no such file. Raises InputError that names a damaged one."""
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a document of train.py: remove the run's folder to run it again")
    return found


def check_same(run, folder, processes, digest):
    """Raise InputError, naming the setting, unless what was run in `folder` is what is planned. Nothing begun there is the same.

    processes: of the planned run; digest: of its data, None when they are not here.
    """
    args, environment = document(folder / "args.json"), document(folder / "environment.json")
    if not args:
        return

    def differs(what):
        raise InputError(f"{folder} was run {what}: remove it to run it again, or give another --out")

    for flag, text in run.flags.items():
        had = args.get(flag.replace("-", "_"))
        if flag not in MAY_DIFFER and not _same(text, had):
            differs(f"with --{flag} {had}, and now it is {text}")
    for flag, text in flags_of(environment.get("command", [])).items():
        if flag not in MAY_DIFFER and flag not in run.flags:
            differs(f"with --{flag}{'' if text == 'yes' else ' ' + text}, and now without")
    if "batch-size" in run.flags:
        planned = int(run.flags["batch-size"]) * int(run.flags.get("accumulate", 1)) * processes
        had = args["batch_size"] * args["accumulate"] * environment.get("processes", 1)
        if planned != had:
            differs(f"with {had} sequences per step (--batch-size by --accumulate by processes), and now there are {planned}")
    if digest and environment.get("dataset", digest) != digest:
        differs("on other data than are there now (their checksums differ)")


def _same(text, value):
    """Is the text of a flag what args.json holds of it?"""
    if value is None or isinstance(value, bool):
        return text == "yes" and bool(value)
    if isinstance(value, list):
        return text.split() == [str(each) for each in value]
    if isinstance(value, (int, float)):
        try:
            return float(text) == value
        except ValueError:
            return False
    return text == str(value)


def output(folder):
    """The file beside a run's folder: for every start a line "$ COMMAND", what that printed, and, once it has ended, "exit status N"."""
    return folder.with_name(folder.name + ".txt")


def state(folder):
    """("done" | "running" | "failed" | "stopped" | "waiting", what a failed run said last)."""
    if (folder / "metrics.json").is_file():
        return "done", ""
    status, said = last_words(folder)
    if status not in (None, 0, STOPPED):
        return "failed", said
    files = [path for path in (folder / "args.json", folder / "log.jsonl", output(folder)) if path.is_file()]
    if not files:
        return "waiting", ""
    fresh = time.time() - max(path.stat().st_mtime for path in files) < FRESH
    return "running" if fresh and status is None else "stopped", ""


def last_words(folder):
    """(exit status of a run's last start, None when it has not ended; why: the line of its last error, else its last three lines)."""
    try:
        with open(output(folder), "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 20_000))
            lines = [line.strip() for line in file.read().decode(errors="replace").rpartition("\n$ ")[2].splitlines() if line.strip()]
    except FileNotFoundError:
        return None, ""
    status = re.fullmatch(r"exit status (-?\d+)", lines.pop()) if lines else None
    if not status:
        return None, ""
    status = int(status[1])
    if status < 0:
        return status, f"ended by {signal.Signals(-status).name}" + " (out of memory?)" * (status == -signal.SIGKILL)
    for pattern in (r"train\.py( \(rank \d+\))?: error: ", r"(\[rank\d+\]: )?[\w.]*(Error|Exception): ."):
        errors = [line for line in lines if re.match(pattern, line)]
        if errors:
            return status, errors[-1]
    return status, " / ".join(lines[1:][-3:]) or "it printed nothing"


def share_done(folder):
    """Steps taken over all steps of a run, by the last lines of its log; 0 when it has logged none."""
    try:
        with open(folder / "log.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            found = re.findall(rb'"step": (\d+), "steps": (\d+)', file.read())
    except FileNotFoundError:
        return 0.0
    return int(found[-1][0]) / int(found[-1][1]) if found else 0.0
