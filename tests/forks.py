"""Run command lines in processes forked from one that has imported what the scripts import: an
import takes seconds, a fork none.

A line of standard input is a JSON object with these keys:

  words         a list for each rank: a script's path (or "-c" and code) and its arguments
  cwd           the working directory
  environments  for each rank, variables to add to its environment
  outputs       for each rank, the files of its standard output and error

When all ranks have ended, a line of standard output has their exit statuses. Nothing here runs a
thread, whose locks a fork would copy. helpers.forked() is the other end.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: F401
import predict  # noqa: F401
import pretrain  # noqa: F401
import train  # noqa: F401


def run(words):
    """Run a script as `python WORDS` does; returns its exit status."""
    sys.argv = words
    try:
        if words[0] == "-c":
            exec(compile(words[1], "-c", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(words, cwd, environment, outputs):
    """Fork a process that runs the words; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(cwd)
            os.environ |= environment
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream, path in enumerate(outputs, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            status = run(words)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return child


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        ranks = zip(asked["words"], asked["environments"], asked["outputs"])
        children = [
            fork(words, asked["cwd"], environment, outputs)
            for words, environment, outputs in ranks
        ]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)
