"""docs/PROTOCOL.md against the code: its lines exist, its commands run, its settings are the defaults, its numbers are recomputed."""

import json
import re
import shlex
from pathlib import Path

import pytest

import train
from taxa.backbones import MODELS
from taxa.strategies import STRATEGIES, published_fraction, settings_from_flags

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
LINES = sorted(set(re.findall(r"`([\w/]+\.py): ([^`]+)`", PAGE)))
COMMANDS = re.findall(r"^python train\.py (.+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("file, text", LINES)
def test_every_line_named_is_there(file, text):
    assert text in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no line with: {text}"


def test_the_page_names_every_mechanism():
    assert len(LINES) >= 40 and len(COMMANDS) == 13
    for file in ("lora", "ia3", "freeze", "random_init", "model", "optim", "strategies", "splits", "taxonomy"):
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
    reads = re.compile(r'\bpublished and adapters else|\[protocol\]|settings\["protocol"\]')
    asks = [line.strip() for line in code.splitlines() if reads.search(line)]
    numbered = PAGE[PAGE.index("## Differences"):PAGE.index("Differences that no flag undoes")]
    assert asks and all(line in numbered for line in asks) and len(asks) == len(re.findall(r"^\d\. ", numbered, re.MULTILINE)) == 3
    for file in ("lora", "ia3", "inject", "freeze", "random_init", "model", "optim", "splits", "dataset", "evaluation", "checkpoint"):
        assert not re.search(r'"protocol"|protocol ==|"published"', (ROOT / "taxa" / f"{file}.py").read_text(encoding="utf-8")), file


@pytest.mark.parametrize("model", [name for name, row in MODELS.items() if row.hub])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("protocol", ["published", "corrected"])
def test_published_settings_of_every_run(model, strategy, protocol):
    """Rates, batches, schedule, clipping, patience: the published ones under either protocol. Heads, alpha, dropout, targets, boundary."""
    args = train.parse_args(["--model", model, "--strategy", strategy, "--protocol", protocol, "--data", "x"])
    rate, batch = {"nt50m": (2e-4, 128), "nt100m": (1e-4, 64), "nt250m": (1e-4, 64)}.get(model, (2.5e-5, 16))
    assert (args.lr, args.batch_size, args.accumulate) == (rate, batch, 1)
    assert (args.epochs, args.patience, args.max_grad_norm, args.weight_decay, args.warmup_steps, args.seed, args.precision, args.max_steps
            ) == (5, 3, 1.0, 0.0, 0, 42, "fp32", None)
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
