"""A progress bar with rate and time left, on rank 0 and on a terminal only."""

import contextlib
import os
import sys
from types import SimpleNamespace

from tqdm import tqdm


def progress(items, description, total=None, unit="it", unit_scale=False):
    """Wrap an iterable in a tqdm bar (stderr). It is silent off a terminal and on every rank but 0.

    items: the iterable, or None for a bar with update().

    Where it is silent no tqdm is made: a signal that falls into its constructor would print a
    traceback of its finalizer.
    """
    quiet = int(os.environ.get("RANK", "0")) != 0 or not sys.stderr.isatty()
    if quiet:
        silent_bar = contextlib.nullcontext(SimpleNamespace(update=lambda n: None))
        return silent_bar if items is None else items
    return tqdm(
        items, desc=description, total=total, unit=unit, unit_scale=unit_scale, leave=False
    )


def print_line(text):
    """Print a line to stdout, above the bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()
