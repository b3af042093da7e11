"""docs/READING.md quotes the code: every indented line of it stands in a file that the section names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "READING.md").read_text(encoding="utf-8").partition("# Adding your own")[0], flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition(" (")[0])
def test_every_line_stands_in_its_file(section):
    files = [ROOT / name for name in re.findall(r"`([\w/]+\.py)`", section) if (ROOT / name).is_file()]
    lines = {line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()}
    assert files
    for quoted in re.findall(r"^    (?!python )(\S.*)$", section, flags=re.MULTILINE):
        assert any(quoted == line or line.endswith(quoted) for line in lines), quoted


def test_every_test_that_is_named_is_there():
    text = (ROOT / "docs" / "READING.md").read_text(encoding="utf-8")
    for name, function in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text):
        assert (ROOT / name).is_file() and (not function or f"def {function}(" in (ROOT / name).read_text(encoding="utf-8")), name
