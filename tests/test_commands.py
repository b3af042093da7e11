"""The commands of README.md and docs/: each flag is one that its script has, and the blocks marked
with <!-- run --> run as pasted, in order.

A mark stands on a line of its own above a block. The block after a line that ends in "should
give:" or "should end with:" is what the marked block prints. The numbers of a training run depend
on the machine; its mark is <!-- run: other numbers -->.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT, forked

import train

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
    ROOT / "experiments" / "README.md",
]
# The first is a diary; the second one quotes.
PAGES = [page for page in PAGES if page.name not in ("LOG.md", "PROTOCOL.md")]
SCRIPTS = {path.name for path in ROOT.glob("*.py")} - {"setup.py"}


class Block(NamedTuple):
    page: Path
    line: int
    mark: str  # "run", "run: other numbers", or ""
    text: str
    gives: str  # what it prints, or ""


BLOCK = re.compile(r"(?:^<!-- (run.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        text = match.string[:match.start()]
        before = " ".join(text.rstrip().splitlines()[-2:])
        if re.search(r"should (give|end with)\b.*:$", before) and found:
            found[-1] = found[-1]._replace(gives=match[3])
        else:
            found.append(Block(page, text.count("\n") + 1, match[1] or "", match[3], ""))
    return found


def commands(block):
    """[words] of each line of a block that starts a Python script of ours.

    Comments and what is behind a pipe are left out.
    """
    text = re.sub(r"\\\n\s*", " ", block.text)
    for line in text.splitlines():
        for part in re.split(r"\s[|&;]+\s", line.partition(" #")[0].strip()):
            with contextlib.suppress(ValueError):
                words = shlex.split(part)
                if words[:1] == ["torchrun"] and "--" in words:
                    words = words[words.index("--") + 1:]
                words = words[1:] if words[:1] in (["python"], ["python3"]) else words
                if words and (words[0] in SCRIPTS or words[0] == "-m"
                              or words[0].startswith(("benchmarks/", "experiments/"))):
                    yield words


ALL = [block for page in PAGES for block in blocks(page)]
TYPED = [(f"{block.page.name}:{block.line}", words) for block in ALL for words in commands(block)]


def help_of(script):
    module = importlib.import_module(script)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        module.parse_args(["--help"])
    return text.getvalue()


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_every_flag_in_the_pages_is_one_of_the_script(script):
    known = set(re.findall(r"--[a-z0-9][a-z0-9-]*", help_of(script.removesuffix(".py"))))
    for where, words in TYPED:
        if words[0] == script:
            flags = [word for word in words if re.match(r"--[a-z0-9-]+(=|$)", word)]
            unknown = {flag.partition("=")[0] for flag in flags} - known - {"--r"}
            assert not unknown, f"{where}: {script} has no {unknown}"
    assert any(words[0] == script for _, words in TYPED), f"no page shows {script}"


def test_torchrun_is_typed_in_the_one_form_that_works_everywhere():
    form = re.compile(r"torchrun --standalone --nproc_per_node \S+ (-- \w+\.py|\d?`?)")
    for page in [*PAGES, *ROOT.glob("*.py")]:
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.search(r"torchrun --(?!max-restarts)", line):
                assert form.search(line), f"{page.name}: {line}"


@pytest.fixture(scope="module")
def clone(demo, tmp_path_factory):
    """A copy of what a clone has.

    Small data and runs take the place of `make demo` and of the page's training run.
    """
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("examples", "experiments", "docs"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    (folder / "taxa").symlink_to(ROOT / "taxa")
    shutil.copytree(demo, folder / "data" / "demo")
    with working_in(folder):
        train.main(["--model", "tiny-nt", "--strategy", "random", "--data", "demo",
                    "--max-steps", "4", "--out", "runs/demo"])
        train.main(["--model", "tiny-dnabert", "--strategy", "lora", "--r", "4", "--data", "demo",
                    "--max-steps", "4"])
    return folder


@contextlib.contextmanager
def working_in(folder):
    """contextlib.chdir, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def pasted(words, folder):
    """words with the files that * and ? stand for, as a shell gives them."""
    for word in words:
        matches = []
        if set(word) & set("*?"):
            matches = sorted(str(path.relative_to(folder)) for path in folder.glob(word))
        yield from matches or [word]


def test_the_marked_blocks_run_as_pasted(clone):
    marked = [block for block in ALL if block.mark]
    assert len(marked) >= 7
    for block in marked:
        output = ""
        where = f"{block.page.name}:{block.line}"
        for words in commands(block):
            if words[0] == "-m":
                code = ("import runpy, sys; sys.argv[1:3] = []; "
                        f"runpy.run_module({words[1]!r}, run_name='__main__')")
                words = ["-c", code, *words[1:]]
            else:
                words = [str(clone / words[0]), *pasted(words[1:], clone)]
            done, = forked(words, cwd=clone)
            assert done.returncode == 0, f"{where}: {words}\n{done.stdout}{done.stderr}"
            output += done.stdout
        for line in filter(None, block.gives.splitlines()):
            if "other numbers" in block.mark:
                line, output = (re.sub(r"[\d.,]+", "#", re.sub(" +", " ", text))
                                for text in (line, output))
            assert line in output, f"{where}: '{line}' is not printed\n{output}"


def test_the_python_page_runs(clone):
    text = (ROOT / "docs" / "PYTHON.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    done, = forked(["-c", code], cwd=clone)
    assert done.returncode == 0 and "superkingdom" in done.stdout, done.stderr
