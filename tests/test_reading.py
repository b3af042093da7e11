"""docs/READING.md quotes the code.

Every indented line of a section stands in a file that the section names.
"""

import re

import pytest
from helpers import ROOT

READING = (ROOT / "docs" / "READING.md").read_text(encoding="utf-8")
TOUR = READING.partition("# Adding your own")[0]
SECTIONS = re.split(r"^## ", TOUR, flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition(" (")[0])
def test_every_line_stands_in_its_file(section):
    names = re.findall(r"`([\w/]+\.py)`", section)
    files = [ROOT / name for name in names if (ROOT / name).is_file()]
    lines = {
        line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()
    }
    assert files
    for quoted in re.findall(r"^    (?!python )(\S.*)$", section, flags=re.MULTILINE):
        assert any(quoted == line or line.endswith(quoted) for line in lines), quoted


def test_every_test_that_is_named_is_there():
    for name, function in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", READING):
        assert (ROOT / name).is_file(), name
        if function:
            assert f"def {function}(" in (ROOT / name).read_text(encoding="utf-8"), function
