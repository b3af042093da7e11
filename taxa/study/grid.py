"""The grid of a study: which runs, by which flags of train.py, and what has become of each.

A run is its flags, {flag: text} without the leading "--"; the text of a flag that takes no value is
"yes". The published grid comes from the package's table of the 33 published runs, any other from a
CSV file whose columns are flags. Nothing here imports torch, so that a plan takes no time.
"""

import csv
import re
import shlex
import signal
import time
from pathlib import Path
from typing import NamedTuple

from taxa import STUDY_BATCH, STUDY_SEED
from taxa.errors import InputError, Saved
from taxa.runtime.files import read_json
from taxa.study.published_runs import PublishedRow, published_rows
from taxa.training.flag_effects import NOTHING, PATH, PRODUCT, flags_that_change

# The flags that study.py gives to every run itself.
OF_THE_STUDY = ("data", "resume", "overwrite", "dry-run", "num-classes", "out")
PATHS = ("data", "weights", "adapters", "out")  # their values may hold spaces
# Flags that may differ between a run that is there and the plan. The data are compared by checksum,
# and the product of batch-size, accumulate and the number of processes is compared.
FREE = flags_that_change(PATH, NOTHING, PRODUCT)
MAY_DIFFER = tuple(name.replace("_", "-") for name in FREE)
STOPPED = Saved.status
FRESH = 600  # seconds: a run that wrote a line within this time is running


class Planned(NamedTuple):
    """One run."""

    name: str  # of its folder in --out
    flags: dict
    where: str  # what a message calls it
    published: PublishedRow | None = None  # its row of the published table


def flags_of(words):
    """{flag: text} of a command line's words.

    What stands before the first flag (the script) is left out.
    """
    flags = {}
    flag = None
    for word in words:
        if word.startswith("--") and word != "--":
            flag, _, value = word[2:].partition("=")
            flag = {"lora-r": "r"}.get(flag, flag)
            flags[flag] = value
        elif flag:
            flags[flag] = f"{flags[flag]} {word}".strip()
    return {flag: text or "yes" for flag, text in flags.items()}


def words_of(flags):
    """The words of a command line that flags_of() reads as these flags."""
    words = []
    for flag, text in flags.items():
        words.append(f"--{flag}")
        if text != "yes":
            words += [text] if flag in PATHS else text.split()
    return words


def set_flags(text):
    """The flags of --set.

    Raises InputError for text that is no flags, and for flags that the grid or study.py decides.
    """
    words = shlex.split(text)
    if words and not words[0].startswith("--"):
        raise InputError(
            f"--set '{text}' begins with no flag: "
            "write it like --set '--precision bf16 --compile'"
        )
    flags = flags_of(words)
    for flag in flags:
        if flag in (*OF_THE_STUDY, "model", "strategy", "protocol", "seed"):
            raise InputError(
                f"--set: --{flag} is not for all runs alike: "
                "that is what the grid, --protocol, --seeds, --data and --out say"
            )
    return flags


# ---------------------------------------------------------------- which runs

def published_grid(protocols, seeds, processes):
    """The 33 published runs in each protocol, for `seeds` seeds from the published one on.

    It is a list of Planned. processes: per run; a step holds the published number of sequences
    for any number of processes. Raises InputError where that number does not divide them.
    """
    rows = published_rows()
    runs = []
    # Seed by seed: the table of a study that is done in part then holds all rows.
    for seed in range(STUDY_SEED, STUDY_SEED + seeds):
        for protocol in protocols:
            for row in rows:
                flags = {"model": row.model, "strategy": row.strategy}
                flags |= {"r": str(row.r)} if row.r else {}
                flags |= {"protocol": protocol}
                flags |= {"lr": str(row.learning_rate), "epochs": str(row.epochs)}
                flags |= {"data-fraction": str(row.data_fraction)} if row.data_fraction != 1 else {}
                flags |= _batch(row.model, processes)
                flags |= {"seed": str(seed)}
                parts = [f"row{row.row:02d}", row.model, row.strategy]
                parts += [f"r{row.r}"] if row.r else []
                parts += [protocol, f"seed{seed}"]
                runs.append(Planned("-".join(parts), flags, f"row {row.row}", row))
    return runs


def _batch(model, processes):
    """The flags with which a step on `processes` processes holds the published number of sequences.

    They are --batch-size and, where it is more than 1, --accumulate.
    """
    per_device, devices = STUDY_BATCH[model]
    sequences = per_device * devices
    each, rest = divmod(sequences, processes)
    if rest:
        raise InputError(
            f"--gpus-per-run {processes} does not divide the {sequences} sequences "
            f"of a published step of {model}: "
            "give a power of two, or a --grid with batch sizes of your own"
        )
    size = min(per_device, each)
    return {"batch-size": str(size)} | ({"accumulate": str(each // size)} if each > size else {})


def read_grid(path, seeds):
    """The runs of a CSV file, one or more a line: a list of Planned.

    Columns are flags of train.py, model and strategy among them. An empty cell is a flag that is
    not given, "yes" is a flag without a value. The column seed may hold several, as "1 2 3";
    without it a line has `seeds` of them from 42 on. The column name, if there is one, begins the
    name of the run folder; otherwise all flags make the name. Raises InputError that names the
    line.
    """
    header, lines = _read_lines(path)
    default_seeds = " ".join(str(STUDY_SEED + i) for i in range(seeds))
    runs = []  # (place of the seed in its line, Planned)
    seen = {}  # name of a run -> number of its line
    for number, cells in lines:
        where = f"--grid {path}, line {number}"
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} cells, but the first line has {len(header)}")
        flags = {flag: cell for flag, cell in zip(header, cells) if cell}
        if not {"model", "strategy"} <= flags.keys():
            raise InputError(f"{where}: model and strategy must be given")
        name = flags.pop("name", None)
        seeds_of_line = flags.pop("seed", default_seeds).split()
        name = name or _name(flags)
        if not re.fullmatch(r"[\w.+=-]+", name) or name.startswith("."):
            raise InputError(
                f"{where}: '{name}' cannot name a folder: "
                "give a name of letters, digits, - _ . + = in a column 'name'"
            )
        for seed in seeds_of_line:
            if not seed.isdigit():
                raise InputError(f"{where}: seed '{seed}' is not a number")
            run = Planned(f"{name}-seed{seed}", flags | {"seed": seed}, where)
            if run.name in seen:
                raise InputError(
                    f"{where}: {run.name} is line {seen[run.name]} as well; "
                    "a column 'name' tells them apart"
                )
            seen[run.name] = number
            runs.append((seeds_of_line.index(seed), run))
    # Seed by seed, as the published grid.
    return [run for _, run in sorted(runs, key=lambda each: each[0])]


def _read_lines(path):
    """([flag], [(line number, cells)]) of the CSV file of a grid, checked but for the lines."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [
                column.strip().removeprefix("--").replace("_", "-") for column in next(reader, [])
            ]
            lines = []
            for row in reader:
                cells = [cell.strip() for cell in row]
                if any(cells):
                    lines.append((reader.line_num, cells))
    except FileNotFoundError:
        raise InputError(f"--grid {path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--grid {path}: not CSV in UTF-8 ({error})") from None
    for needed in ("model", "strategy"):
        if needed not in header:
            raise InputError(
                f"--grid {path}: its first line has no column {needed}; "
                "columns are flags of train.py"
            )
    own = [column for column in header if column in OF_THE_STUDY and column != "data"]
    if own:
        raise InputError(f"--grid {path}: --{own[0]} is study.py's own, not a column")
    if len(set(header)) < len(header):
        raise InputError(f"--grid {path}: two columns have the same name")
    if not lines:
        raise InputError(f"--grid {path}: no run below the first line")
    return header, lines


def _name(flags):
    """The flags of a line as a name: "few-tiny-nt-lora-r4-heads-frozen-lr0.01"."""
    parts = [Path(flags["data"]).name] if "data" in flags else []
    parts += [flags["model"].rpartition("/")[2], flags["strategy"]]
    for flag, text in flags.items():
        if flag in ("data", "model", "strategy"):
            continue
        value = Path(text).name if flag in PATHS else text.replace(" ", "_")
        if text == "yes":
            parts.append(flag)
        else:
            parts.append(f"{flag}{value}" if value[0].isdigit() else f"{flag}-{value}")
    return "-".join(parts)


# ---------------------------------------------------------------- what has become of a run

def document(path):
    """The JSON document in a file, {} where there is no such file.

    Raises InputError that names a damaged file.
    """
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise InputError(
            f"{path} is not a document of train.py: remove the run's folder to run it again"
        )
    return found


def check_same(run, folder, processes, digest):
    """Raise InputError, naming the setting, unless what was run in `folder` is what is planned.

    A folder in which nothing was begun is accepted. processes: of the planned run; digest: of its
    data, None when they are not here.
    """
    args = document(folder / "args.json")
    environment = document(folder / "environment.json")
    if not args:
        return

    def differs(what):
        raise InputError(
            f"{folder} was run {what}: remove it to run it again, or give another --out"
        )

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
            differs(
                f"with {had} sequences per step (--batch-size by --accumulate by processes), "
                f"and now there are {planned}"
            )
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
    """The file beside a run's folder.

    It holds for every start a line "$ COMMAND", what that command printed, and, once it has ended,
    a line "exit status N".
    """
    return folder.with_name(folder.name + ".txt")


def state(folder):
    """(state, what a failed run said last).

    The state is "done", "running", "failed", "stopped" or "waiting".
    """
    if (folder / "metrics.json").is_file():
        return "done", ""
    status, said = last_words(folder)
    if status not in (None, 0, STOPPED):
        return "failed", said
    files = [folder / "args.json", folder / "log.jsonl", output(folder)]
    files = [path for path in files if path.is_file()]
    if not files:
        return "waiting", ""
    last_written = max(path.stat().st_mtime for path in files)
    fresh = time.time() - last_written < FRESH
    return "running" if fresh and status is None else "stopped", ""


def last_words(folder):
    """(exit status of a run's last start, why it ended).

    The exit status is None when the run has not ended. Why: the line of its last error, else its
    last three lines.
    """
    try:
        with open(output(folder), "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 20_000))
            last_bytes = file.read()
    except FileNotFoundError:
        return None, ""
    last_start = last_bytes.decode(errors="replace").rpartition("\n$ ")[2]
    lines = [line.strip() for line in last_start.splitlines() if line.strip()]
    status = re.fullmatch(r"exit status (-?\d+)", lines.pop()) if lines else None
    if not status:
        return None, ""
    status = int(status[1])
    if status < 0:
        hint = " (out of memory?)" if status == -signal.SIGKILL else ""
        return status, f"ended by {signal.Signals(-status).name}{hint}"
    own_error = r"train\.py( \(rank \d+\))?: error: "
    exception = r"(\[rank\d+\]: )?[\w.]*(Error|Exception): ."
    for pattern in (own_error, exception):
        errors = [line for line in lines if re.match(pattern, line)]
        if errors:
            return status, errors[-1]
    return status, " / ".join(lines[1:][-3:]) or "it printed nothing"


def share_done(folder):
    """Steps taken over all steps of a run, by the last lines of its log.

    It is 0 when the run has logged no step.
    """
    try:
        with open(folder / "log.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            found = re.findall(rb'"step": (\d+), "steps": (\d+)', file.read())
    except FileNotFoundError:
        return 0.0
    return int(found[-1][0]) / int(found[-1][1]) if found else 0.0
