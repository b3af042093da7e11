"""--help of every script is a page of a manual, with groups, defaults, and examples that parse.

A wrong name is answered with the nearest right one.
"""

import importlib
import re
import shlex

import pytest
from helpers import ROOT, parser_of

import prepare
import train
from taxa.errors import InputError

SCRIPTS = sorted(
    path.stem for path in ROOT.glob("*.py") if "def parse_args(" in path.read_text(encoding="utf-8")
)
SCRIPTS.append("taxa.measure.tree")


def examples(script):
    """(module, arguments) of each command line in a script's docstring.

    Python 3.13 takes the indentation out of a docstring.
    """
    for line in importlib.import_module(script).__doc__.replace("\\\n", " ").splitlines():
        line = line.partition("  #")[0]
        found = re.match(r"\s*(?:torchrun .*?|python) (?:-- )?(\S+\.py|-m \S+)(.*)", line)
        if found:
            yield found[1].removesuffix(".py").removeprefix("-m "), shlex.split(found[2])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_says_what_each_flag_does_and_its_default(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    page = parser.format_help()
    assert page.startswith(f"usage: {parser.prog} ") and len(page.splitlines()[0]) < 100
    assert parser.description.strip().splitlines()[0] in page
    for action in parser._actions:
        assert action.help, f"{action.dest} has no help"
        if action.option_strings and action.default not in (None, False, "==SUPPRESS=="):
            flag = action.option_strings[0]
            assert "default" in action.help, f"{flag}: help does not say its default"
    flags = [action for action in parser._actions
             if action.option_strings and action.dest != "help"]
    titled = [group for group in parser._action_groups[2:] if group._group_actions]
    assert titled or len(flags) <= 6, "more than six flags and no groups"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_examples_parse(script):
    seen = list(examples(script))
    assert script in dict(seen), "no example in the docstring"
    for module, arguments in seen:
        importlib.import_module(module).parse_args(arguments)


@pytest.mark.parametrize("script, arguments, message", [
    (train, "--modle nt50m --strategy full", "no flag --modle; did you mean --model"),
    (train, "--model=nt50m --strateg=full", "no flag --strateg; did you mean --strategy"),
    (train, "--model nt50mm --strategy full --dry-run", "did you mean nt50m"),
    (train, "--model nt50m --strategy frezee75 --dry-run", "did you mean freeze75"),
    (train, "--model nt50m --strategy full --dry-run --precision bf61",
     "'bf61' is not one of fp32 tf32 bf16; did you mean bf16"),
    (prepare, "--demo --out x --ranks phylum genuss", "unknown rank 'genuss'.*did you mean genus"),
    (prepare, "--demo --out x --tokenizer nt", "no flag --tokenizer; did you mean --tokenizers"),
    (prepare, "--demo --out x --tokenizers tiny-dnabret", "did you mean tiny-dnabert"),
    (importlib.import_module("evaluate"), "ckpt.pt --split vaildation", "did you mean validation"),
    (train, "--model nt50m --strategy full --zzzzzz 1", "there is no flag --zzzzzz [(]see"),
])
def test_wrong_names_are_answered_with_the_nearest(
        script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        script.main(arguments.split())
    assert not list(tmp_path.iterdir())
