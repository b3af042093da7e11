"""The layout of the package and the scripts.

No room imports a higher one, and no script imports another script. The mechanisms import nothing
but torch and each other.
"""

import ast

import pytest
from helpers import ROOT

# From low to high; what stands in one set may import each other and everything before it.
FLOORS = [
    {"", "__main__", "errors"},
    {"runtime"},
    {"data"},
    {"inject", "lora", "ia3", "freeze", "random_init", "model"},
    {"backbones"},
    {"strategies"},
    {"training"},
    {"measure", "evaluation"},
    {"prediction"},
    {"study"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted((ROOT / "taxa").rglob("*.py"))
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "setup.py")


def imported(path):
    """Dotted names of everything that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted):
    """ "taxa.data.fasta" -> "data"; "taxa.RANKS" -> "": what stands in taxa/__init__.py."""
    part = dotted.split(".")[1] if "." in dotted else ""
    is_room = (ROOT / "taxa" / part).is_dir() or (ROOT / "taxa" / f"{part}.py").is_file()
    return part if is_room else ""


def test_every_room_has_its_floor():
    paths = [path.relative_to(ROOT / "taxa").with_suffix("") for path in MODULES]
    dotted = [".".join(("taxa", *path.parts)) for path in paths]
    assert {room(name) for name in dotted} - {"__init__"} <= FLOOR.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_imports_a_higher_one(path):
    parts = path.relative_to(ROOT / "taxa").with_suffix("").parts
    mine = FLOOR["" if parts == ("__init__",) else parts[0]]
    ours = [name for name in imported(path) if name.split(".")[0] == "taxa"]
    higher = [name for name in ours if FLOOR[room(name)] > mine]
    assert not higher


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_imports_another(path):
    assert not {name.split(".")[0] for name in imported(path)} & {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("name", ["lora", "ia3", "freeze", "random_init", "inject", "model"])
def test_mechanisms_need_no_data_and_no_command_line(name):
    path = ROOT / "taxa" / f"{name}.py"
    own = {other for other in imported(path) if other.split(".")[0] == "taxa"}
    assert {room(other) for other in own} <= {"", "errors", "inject"}
