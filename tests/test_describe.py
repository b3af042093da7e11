"""prepare.py --describe: every number is counted again from the records.

The folder is left as it is.
"""

import subprocess
import sys

import numpy as np
import pytest

import prepare
from taxa.data.dataset import PreparedDataset
from taxa.data.splits import SPLITS
from taxa.errors import InputError


def table(text, head):
    """{first words: the other words as numbers} of the lines below one that starts with `head`.

    The lines end at the next blank one.
    """
    lines = next(part for part in text.split("\n\n") if part.startswith(head)).splitlines()
    numbers = len(lines[-1].split()) - 1
    rows = [line.rsplit(None, numbers) for line in lines[1:]]
    return {row[0]: [float(cell.replace(",", "")) for cell in row[1:]] for row in rows}


def test_every_number(demo, capsys):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    prepare.main(["--describe", str(demo)])
    text = capsys.readouterr().out
    data = PreparedDataset(demo)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before
    assert text.startswith(f"{demo}: 400 sequences, digest {data.digest[:16]}\n")
    splits = [data.split(name, "nt") for name in SPLITS]
    found = table(text, "superkingdom ")
    for number, row in enumerate(data.classes["superkingdom"]):
        counts = [int((split.labels[:, 0] == number).sum()) for split in splits]
        assert found[row["name"]] == [sum(counts), *counts]
    assert found["all"] == [400, *map(len, splits)]
    labels = np.concatenate([split.labels for split in splits])
    found = table(text, "sequences per class of")
    for column, rank in enumerate(data.classes):
        sizes = sorted(np.bincount(labels[:, column]).tolist())
        n, least, *_, most, not_in_test = found[rank]
        assert (n, least, most) == (len(sizes), sizes[0], sizes[-1])
        assert found[rank][4] == sizes[(len(sizes) - 1) // 2]  # the median, the lower one of two
        assert not_in_test == len(sizes) - len(set(splits[2].labels[:, column].tolist()))
    found = table(text, "tokens per sequence")
    for name in ("nt", "tiny-dnabert"):
        with_tokens = [data.split(part, name) for part in SPLITS]
        lengths = sorted(len(split.tokens(i)) for split in with_tokens for i in range(len(split)))
        assert found[name][0] == pytest.approx(np.mean(lengths), abs=0.05)
        assert found[name][1::6] == [lengths[0], lengths[-1]]


def test_picture(demo, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra [report], is not installed")
    prepare.main(["--describe", str(demo), "--picture", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="--picture .*a.text: Format 'text' is not supported"):
        prepare.main(["--describe", str(demo), "--picture", str(tmp_path / "a.text")])
    with pytest.raises(InputError, match="--picture .*b.png: no such folder"):
        prepare.main(["--describe", str(demo), "--picture", str(tmp_path / "nowhere" / "b.png")])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_picture_without_matplotlib_says_what_to_install(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"--picture needs matplotlib: pip install '\.\[report\]'"):
        prepare.main(["--describe", str(demo), "--picture", "x.png"])


@pytest.mark.parametrize("arguments, words", [
    ("--describe missing", "missing: no such folder"),
    ("--describe {demo} --out x", "--describe writes nothing: leave out --out"),
    ("--describe {demo} --seed 1", "--seed does nothing here"),
    ("--demo --out x --picture x.png", "--picture does nothing here"),
    ("--describe {demo} --demo", "give either"),
])
def test_wrong_input(demo, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        prepare.main(arguments.format(demo=demo).split())
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_imported_for_a_picture_only():
    code = "import sys, prepare; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
