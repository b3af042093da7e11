"""docs/PROTOCOL.md against the code: its lines exist, its commands run, its settings are the
defaults, its numbers are recomputed.
"""

import ast
import json
import re
import shlex

import pytest
from helpers import ROOT

import train
from taxa import STUDY_TRAINING_SEQUENCES
from taxa.backbones import MODELS
from taxa.strategies import STRATEGIES
from taxa.study.published_fractions import published_fraction
from taxa.training.settings import settings_from_flags

PAGE = (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
LINES = sorted(set(re.findall(r"`([\w/]+\.py): ([^`]+)`", PAGE)))  # `file: a line in it`
COMMANDS = re.findall(r"^python train\.py (.+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("file, text", LINES)
def test_every_line_named_is_there(file, text):
    assert text in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no line with: {text}"


def test_the_page_names_every_mechanism():
    assert len(LINES) >= 35 and len(COMMANDS) == 17
    named = {name for name, _ in LINES}
    for file in (
        "lora", "freeze", "random_init", "model", "strategies",
        "training/optim", "training/settings", "runtime/precision",
        "data/splits", "data/taxonomy",
    ):
        assert f"taxa/{file}.py" in named
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(#([^)]+)\)", PAGE):
        assert link in anchors, link


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, capsys):
    train.main(shlex.split(command))
    printed = json.loads(capsys.readouterr().out)
    adapters = printed["strategy"] in ("lora", "ia3")
    assert printed["heads"] == ("frozen" if adapters else "train")
    assert any(name.startswith("heads.") for name in printed["names"]) is not adapters


def lines_that_read_the_protocol(path):
    """The lines of a file whose code reads the protocol, or a name that was made from it."""
    source = path.read_text(encoding="utf-8")
    numbers = set()
    for node in ast.walk(ast.parse(source)):
        is_read = isinstance(getattr(node, "ctx", None), ast.Load)
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        of_a_name = is_read and name in ("protocol", "published", "corrected")
        of_a_key = isinstance(node, ast.Constant) and node.value == "protocol"
        if of_a_name or of_a_key:
            numbers.add(node.lineno)
    lines = source.splitlines()
    return [lines[number - 1].strip() for number in sorted(numbers)]


def test_the_protocol_is_asked_for_in_three_lines():
    """Differences 1 to 3 of the page are the only lines that decide by the protocol."""
    start = PAGE.index("## Differences")
    numbered = PAGE[start:PAGE.index("Differences that stay in both protocols")]
    quoted = re.findall(r"^\d\. .*?`([\w/]+\.py): ([^`]+)`", numbered, re.MULTILINE)
    assert len(quoted) == len(re.findall(r"^\d\. ", numbered, re.MULTILINE)) == 3

    # Every other line that reads it passes it on, names it for one of the three, or refuses flags.
    others = {
        "taxa/strategies.py": ["counted = sizes if corrected else published_sizes(classifier)"],
        "taxa/training/settings.py": [
            (
                "settings = settings_from_flags("
                "model_row, args.strategy, args.protocol, args.heads, **typed)"
            ),
            'settings = {"strategy": strategy, "protocol": protocol, **row.flags, **given}',
            'published = protocol == "published"',
            'if heads == "train" and published and row.inject:',
        ],
    }
    for file, lines in others.items():
        expected = lines + [text for of_file, text in quoted if of_file == file]
        assert sorted(lines_that_read_the_protocol(ROOT / file)) == sorted(expected), file
    assert [file for file, _ in quoted].count("taxa/training/settings.py") == 2
    assert [file for file, _ in quoted].count("taxa/strategies.py") == 1

    # In all other files it is compared only in order to print something.
    prints = ["taxa/measure/tree.py", "taxa/runtime/precision.py", "train.py"]
    compares = re.compile(r'protocol("\])? (==|!=) |\[protocol\]')
    found = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "taxa").rglob("*.py")]:
        file = path.relative_to(ROOT).as_posix()
        if file not in others:
            found += [file] * len(compares.findall(path.read_text(encoding="utf-8")))
    assert sorted(found) == prints
    for file in (
        "lora", "ia3", "inject", "freeze", "random_init", "model",
        "training/optim", "training/checkpoint",
        "data/splits", "data/dataset", "data/batches", "evaluation/evaluation",
    ):
        text = (ROOT / "taxa" / f"{file}.py").read_text(encoding="utf-8")
        assert not re.search(r'"protocol"|protocol ==|"published"', text), file


# the published learning rate and batch size
RATES = {
    "nt50m": (2e-4, 128),
    "nt100m": (1e-4, 64),
    "nt250m": (1e-4, 64),
    "dnabert2": (2.5e-5, 16),
    "dnaberts": (2.5e-5, 16),
}


@pytest.mark.parametrize("model", [name for name, row in MODELS.items() if row.hub])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("protocol", ["published", "corrected"])
def test_published_settings_of_every_run(model, strategy, protocol):
    """Learning rate, batch size, schedule, clipping, patience: the published ones under either
    protocol. Heads, alpha, dropout, targets, boundary: those of the protocol.
    """
    args = train.parse_args(["--model", model, "--strategy", strategy, "--protocol", protocol,
                             "--data", "x"])
    assert (args.lr, args.batch_size) == RATES[model]
    expected = {
        "accumulate": 1, "epochs": 5, "max_steps": None, "patience": 3,
        "max_grad_norm": 1.0, "weight_decay": 0.0, "warmup_steps": 0, "warmup_ratio": 0.0,
        "seed": 42, "precision": "fp32",
    }
    assert {name: getattr(args, name) for name in expected} == expected

    nt = model.startswith("nt")
    published = protocol == "published"
    adapters = strategy in ("lora", "ia3")
    query_value = ["attention.self.query", "attention.self.value"]
    expected = {
        "strategy": strategy,
        "protocol": protocol,
        "heads": "frozen" if published and adapters else "train",
    }
    if strategy == "lora":
        expected |= {
            "r": 4, "lora_alpha": 32.0, "lora_dropout": 0.1, "rslora": False,
            "targets": query_value if nt else ["attention.self.Wqkv"],
        }
    if strategy == "ia3" and published:
        expected |= {
            "targets": query_value if nt else ["attention.self.Wqkv"],
            "feedforward_targets": ["attention.output.dense"],
        }
    if strategy == "ia3" and not published:
        key_value = ["attention.self.key", "attention.self.value"]
        expected |= {
            "targets": key_value if nt else ["attention.self.Wqkv[key,value]"],
            "feedforward_targets": ["layer.*.output.dense" if nt else "mlp.wo"],
        }
    if strategy == "freeze75":
        expected |= {"freeze_fraction": 0.75}
    settings = settings_from_flags(model, strategy, protocol)
    assert settings == expected


def test_numbers_of_the_slips():
    lines = [line for line in PAGE.splitlines() if re.match(r"\| (19|20|21|22|25) ", line)]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    runs = {
        "19": ("dnabert2", 1), "20": ("dnaberts", 1), "21": ("nt100m", 1), "22": ("nt250m", 1),
        "25": ("nt50m", 20),
    }
    assert [row[0] for row in table] == list(runs)
    for number, run, printed, ours, _ in table:
        model, r = runs[number]
        assert run == f"{model} LoRA r={r}"
        fraction = published_fraction(model, "lora", (4, 57, 1884), r)
        assert f"{fraction:.{len(ours) - 2}f}" == ours != printed


def test_numbers_of_the_data():
    """The page's sequences, as scikit-learn splits them; the speeds and the size of the "3%" rows
    that follow from them.
    """
    from sklearn.model_selection import train_test_split

    everything = 5_181_880
    rest, test = train_test_split(range(everything), test_size=0.02, random_state=42)
    train_rows, validation = train_test_split(rest, test_size=0.1, random_state=42)
    assert (len(test), len(validation)) == (103_638, 507_825)
    assert len(train_rows) == STUDY_TRAINING_SEQUENCES
    for number in (everything, len(test), len(validation), len(train_rows)):
        assert f"{number:,}" in PAGE
    for model, batch, seconds in (
        ("nt50m", 128, 7527.8), ("nt100m", 64, 13292.0), ("nt250m", 64, 20258.2),
    ):
        assert f"| {model}, batch {batch} | {len(train_rows) / seconds:.0f} |" in PAGE

    # row -> seconds of the run on all data with the same strategy
    seconds = {"5": 7527.8, "11": 5084.4, "18": 6800.0, "23": 6991.4, "32": 7528.8}
    text = " ".join(PAGE.split())
    part = re.findall(r"([\d.]+) s × (\d+)/s = ([\d,]+) \((?:row )?(\d+)\)", text)
    assert sorted(row for *_, row in part) == sorted(seconds)
    for own, speed, product, row in part:
        per_second = len(train_rows) / seconds[row]
        assert f"{per_second:.0f}" == speed
        assert f"{float(own) * per_second:.0f}" == product.replace(",", "")


def test_the_differences_are_numbered_in_order():
    """Differences 1 to 13, and every reference to one on this page is to a number that is there."""
    listed = PAGE[PAGE.index("## Differences"):PAGE.index("## The 33 rows")]
    numbers = [int(number) for number in re.findall(r"^(\d+)\. \*\*", listed, re.MULTILINE)]
    assert numbers == list(range(1, 14))
    references = re.findall(r"\[(\d+)\]\(#differences\)", PAGE)
    assert {int(number) for number in references} <= set(numbers)
