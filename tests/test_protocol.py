"""docs/PROTOCOL.md against the code: its lines exist, its commands run, its settings are the defaults, its numbers are recomputed."""

import json
import re
import shlex
from pathlib import Path

import pytest

import train
from taxa import STUDY_TRAINING_SEQUENCES
from taxa.backbones import MODELS
from taxa.strategies import STRATEGIES, settings_from_flags
from taxa.study.published_fractions import published_fraction

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
LINES = sorted(set(re.findall(r"`([\w/]+\.py): ([^`]+)`", PAGE)))  # `file: a line in it`
COMMANDS = re.findall(r"^python train\.py (.+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("file, text", LINES)
def test_every_line_named_is_there(file, text):
    assert text in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no line with: {text}"


def test_the_page_names_every_mechanism():
    assert len(LINES) >= 35 and len(COMMANDS) == 17
    for file in ("lora", "freeze", "random_init", "model", "training/optim", "runtime/precision", "strategies", "data/splits",
                 "data/taxonomy"):
        assert f"taxa/{file}.py" in {name for name, _ in LINES}
    for link in re.findall(r"\]\(#([^)]+)\)", PAGE):
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.+)$", PAGE, re.MULTILINE)}
        assert link in anchors, link


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, capsys):
    train.main(shlex.split(command))
    printed = json.loads(capsys.readouterr().out)
    adapters = printed["strategy"] in ("lora", "ia3")
    assert printed["heads"] == ("frozen" if adapters else "train")
    assert any(name.startswith("heads.") for name in printed["names"]) is not adapters


def test_the_protocol_is_asked_for_in_three_lines():
    """Where it decides anything, the lines that read it are those of the page's differences 1 to 3."""
    code = (ROOT / "taxa" / "strategies.py").read_text(encoding="utf-8")
    reads = re.compile(r'\bpublished and row.inject else|\[protocol\]|settings\["protocol"\]')
    asks = [line.strip() for line in code.splitlines() if reads.search(line)]
    numbered = PAGE[PAGE.index("## Differences"):PAGE.index("Differences that stay in both protocols")]
    quoted = [text for file, text in LINES if file == "taxa/strategies.py" and text in numbered]
    assert asks and all(any(text in line for text in quoted) for line in asks)
    assert len(asks) == len(re.findall(r"^\d\. ", numbered, re.MULTILINE)) == 3
    for file in ("lora", "ia3", "inject", "freeze", "random_init", "model", "training/optim", "training/checkpoint", "data/splits",
                 "data/dataset", "data/batches", "evaluation/evaluation"):
        assert not re.search(r'"protocol"|protocol ==|"published"', (ROOT / "taxa" / f"{file}.py").read_text(encoding="utf-8")), file


@pytest.mark.parametrize("model", [name for name, row in MODELS.items() if row.hub])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("protocol", ["published", "corrected"])
def test_published_settings_of_every_run(model, strategy, protocol):
    """Rates, batches, schedule, clipping, patience: the published ones under either protocol. Heads, alpha, dropout, targets, boundary."""
    args = train.parse_args(["--model", model, "--strategy", strategy, "--protocol", protocol, "--data", "x"])
    rate, batch = {"nt50m": (2e-4, 128), "nt100m": (1e-4, 64), "nt250m": (1e-4, 64)}.get(model, (2.5e-5, 16))
    assert (args.lr, args.batch_size, args.accumulate) == (rate, batch, 1)
    assert (args.epochs, args.patience, args.max_grad_norm, args.weight_decay, args.warmup_steps, args.warmup_ratio, args.seed,
            args.precision, args.max_steps) == (5, 3, 1.0, 0.0, 0, 0.0, 42, "fp32", None)
    nt, published = model.startswith("nt"), protocol == "published"
    settings = settings_from_flags(model, strategy, protocol)
    expected = {"strategy": strategy, "protocol": protocol, "heads": "frozen" if published and strategy in ("lora", "ia3") else "train"}
    if strategy == "lora":
        expected |= {"r": 4, "lora_alpha": 32.0, "lora_dropout": 0.1, "rslora": False,
                     "targets": ["attention.self.query", "attention.self.value"] if nt else ["attention.self.Wqkv"]}
    if strategy == "ia3" and published:
        expected |= {"targets": ["attention.self.query", "attention.self.value"] if nt else ["attention.self.Wqkv"],
                     "feedforward_targets": ["attention.output.dense"]}
    if strategy == "ia3" and not published:
        expected |= {"targets": ["attention.self.key", "attention.self.value"] if nt else ["attention.self.Wqkv[key,value]"],
                     "feedforward_targets": ["layer.*.output.dense"] if nt else ["mlp.wo"]}
    if strategy == "freeze75":
        expected |= {"freeze_fraction": 0.75}
    assert settings == expected


def test_numbers_of_the_slips():
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| (19|20|21|22|25) ", line)]
    runs = {"19": ("dnabert2", 1), "20": ("dnaberts", 1), "21": ("nt100m", 1), "22": ("nt250m", 1), "25": ("nt50m", 20)}
    assert [row[0] for row in table] == list(runs)
    for number, run, printed, ours, _ in table:
        model, r = runs[number]
        assert run == f"{model} LoRA r={r}"
        assert f"{published_fraction(model, 'lora', (4, 57, 1884), r):.{len(ours) - 2}f}" == ours != printed


def test_numbers_of_the_data():
    """The page's sequences, as scikit-learn splits them; the speeds and the size of the "3%" rows that follow from them."""
    from sklearn.model_selection import train_test_split

    everything = 5_181_880
    rest, test = train_test_split(range(everything), test_size=0.02, random_state=42)
    train_rows, validation = train_test_split(rest, test_size=0.1, random_state=42)
    assert (len(test), len(validation), len(train_rows)) == (103_638, 507_825, STUDY_TRAINING_SEQUENCES)
    for number in (everything, len(test), len(validation), len(train_rows)):
        assert f"{number:,}" in PAGE
    for model, batch, seconds in (("nt50m", 128, 7527.8), ("nt100m", 64, 13292.0), ("nt250m", 64, 20258.2)):
        assert f"| {model}, batch {batch} | {len(train_rows) / seconds:.0f} |" in PAGE
    part = re.findall(r"([\d.]+) s × (\d+)/s = ([\d,]+) \((?:row )?(\d+)\)", " ".join(PAGE.split()))
    seconds = {"5": 7527.8, "11": 5084.4, "18": 6800.0, "23": 6991.4, "32": 7528.8}  # of the run on all data with the same strategy
    assert sorted(row for *_, row in part) == sorted(seconds)
    for own, speed, product, row in part:
        assert f"{len(train_rows) / seconds[row]:.0f}" == speed
        assert f"{float(own) * len(train_rows) / seconds[row]:,.0f}".replace(",", "") == product.replace(",", "")


def test_the_differences_are_numbered_in_order():
    """Differences 1 to 13, and every reference to one on this page is to a number that is there."""
    listed = PAGE[PAGE.index("## Differences"):PAGE.index("## The 33 rows")]
    numbers = [int(number) for number in re.findall(r"^(\d+)\. \*\*", listed, re.MULTILINE)]
    assert numbers == list(range(1, 14))
    assert {int(number) for number in re.findall(r"\[(\d+)\]\(#differences\)", PAGE)} <= set(numbers)
