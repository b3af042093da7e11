"""What every script shares at its edge: one clear line and exit status 2 for bad input."""

import argparse
import errno
import itertools
import os
import re
import sys

from taxa.errors import InputError, Stop, nearest

# What a full disk, a missing permission or a file in a folder's place says. Any other OSError is a
# bug and keeps its traceback.
OF_THE_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line without the usage, and the description keeps its layout.

    Flags are never abbreviated.
    """

    def __init__(self, description, epilog=None):
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=30
            ),
        )

    def format_usage(self):
        """What must be given, and no more: the rest of the page says what can be."""
        needed = [action for action in self._actions if action.required]
        words = [
            " ".join([*action.option_strings[:1], action.metavar or action.dest])
            for action in needed
        ]
        return f"usage: {' '.join([self.prog, *words, '[flags]'])}\n"

    def format_help(self):
        self.usage = self.format_usage().removeprefix("usage: ").strip().replace("%", "%%")
        return super().format_help()

    def group(self, title):
        """Begin a group of flags in --help; returns what adds a flag to it."""
        return self.add_argument_group(title).add_argument

    def parse_args(self, args=None, namespace=None):
        """As argparse, but a flag that does not exist is said first, with the nearest that does."""
        args = sys.argv[1:] if args is None else list(args)
        for word in itertools.takewhile(lambda word: word != "--", args):
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                self.error(f"there is no flag {flag}{nearest(flag, self._option_string_actions)}")
        return super().parse_args(args, namespace)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            choices = " ".join(map(str, action.choices))
            meant = nearest(value, action.choices)
            raise argparse.ArgumentError(action, f"'{value}' is not one of {choices}{meant}")

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def positive_int(text):
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def non_negative_int(text):
    """argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def seed(text):
    """argparse type: an integer from 0 to 2**32 - 1, which every random generator takes."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2**32 - 1")
    return value


def interval(text):
    """argparse type: '500' is every 500 steps, '10m' every 10 minutes.

    Returns the text; see interval_of().
    """
    steps, seconds = interval_of(text)
    if not 0 < (steps or seconds) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is neither steps, as 500, nor minutes, as 10m")
    return text


def interval_of(text):
    """'500' -> (500, None) steps; '10m' -> (None, 600.0) seconds."""
    return (None, 60 * float(text[:-1])) if text.endswith("m") else (int(text), None)


def positive_float(text):
    """argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def non_negative_float(text):
    """argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def fraction(text):
    """argparse type: a number from 0 up to, but not including, 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def share(text):
    """argparse type: a number above 0, up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def byte_size(text):
    """argparse type: "80GiB", "500 MB", "1e9" -> bytes.

    KB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB of 1024.
    """
    form = r"([0-9.]+(?:e[0-9]+)?)\s*(?:([KMGT])(i?))?B?"
    found = re.fullmatch(form, text.strip(), re.IGNORECASE)
    try:
        base = 1024 if found[3] else 1000
        power = " KMGT".index((found[2] or " ").upper())
        value = int(float(found[1]) * base**power)
    except (TypeError, ValueError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a size: write it like 80GiB or 500MB")
    return value


def run(main):
    """Call main() as a script.

    A Stop becomes one line on stderr and its exit status. A full disk and a folder without
    permission become one line and exit status 2, and Ctrl-C one line and 130.
    """
    rank = int(os.environ.get("RANK", "0"))
    who = os.path.basename(sys.argv[0]) + (f" (rank {rank})" if rank else "")
    for stream in (sys.stdout, sys.stderr):
        # whatever the locale: names of files and taxa hold any character
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main()
    except Stop as stop:
        if str(stop):
            line = " ".join(str(stop).split())
            print(f"{who}: {stop.kind}{line}", file=sys.stderr, flush=True)
        sys.exit(stop.status)
    except BrokenPipeError:  # whoever read our standard output has enough, as head has
        # or flushing at exit would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        what = error.filename or "writing"
        print(f"{who}: error: {what}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{who}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
