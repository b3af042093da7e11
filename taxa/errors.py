"""What ends a script by one clear line: wrong input (exit status 2), or a saved stop (75)."""

import difflib


class Stop(Exception):
    """Ends a script with an exit status and one line on stderr.

    There is no line when the message is empty: one process of many speaks.
    """

    status = 1
    kind = "error: "


class InputError(Stop):
    """The user's input is wrong.

    The message is one line that names the file, record or flag, and says what to do.
    """

    status = 2


class Saved(Stop):
    """Stopped by a signal with everything saved: the same command with --resume goes on.

    75 is sysexits' EX_TEMPFAIL, "try again".
    """

    status = 75
    kind = ""


def choose(kind, name, choices):
    """Return `name` if it is one of `choices`, else raise InputError with the nearest of them."""
    if name in choices:
        return name
    hint = nearest(name, choices)
    raise InputError(f"unknown {kind} '{name}': choose from {' '.join(choices)}{hint}")


def nearest(name, choices):
    """"; did you mean X?" of the choice most like `name`, or nothing."""
    near = difflib.get_close_matches(str(name), list(map(str, choices)), n=1)
    return f"; did you mean {near[0]}?" if near else ""
