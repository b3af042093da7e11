"""python -m taxa.measure.tree: parameters as --dry-run counts them, operations as torch counts them
and as computed by hand.
"""

import json
import re
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from taxa.backbones import FAMILIES, MODELS, backbone_config, get_model
from taxa.errors import InputError
from taxa.measure.flops import parts
from taxa.measure.tree import main
from taxa.model import TaxonClassifier, sequence_losses
from taxa.strategies import inject_adapters, train_only, trainable_names
from taxa.training.settings import settings_from_flags

CLASSES = {"superkingdom": 4, "phylum": 5, "genus": 6}
CASES = [
    (strategy, protocol)
    for strategy in ("full", "random", "lora", "ia3", "freeze75")
    for protocol in ("corrected", "published")
]


def built(name, strategy, protocol, device="cpu", **flags):
    family = FAMILIES[get_model(name).family]
    settings = settings_from_flags(name, strategy, protocol, **flags)
    with torch.device(device):
        classifier = TaxonClassifier(family.model(backbone_config(name)), CLASSES)
        inject_adapters(classifier, settings)
    return classifier, settings, trainable_names(classifier, settings)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("strategy, protocol", CASES)
def test_operations_are_those_that_torch_counts(name, strategy, protocol):
    flags = {}
    if (strategy, protocol) == ("freeze75", "published"):  # a boundary elsewhere
        flags = {"freeze_fraction": 0.9}
    if (strategy, protocol) == ("ia3", "published"):  # the first that trains stands on an input
        flags = {"feedforward_targets": ["layer.*.output.dense" if name == "tiny-nt" else "mlp.wo"]}
    classifier, _, names = built(name, strategy, protocol, **flags)
    train_only(classifier, names)
    T = 17
    expected = parts(classifier, get_model(name).family, names, T)
    ids = torch.randint(6, 100, (1, T))
    mask = torch.ones(1, T, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH):  # the one whose products torch counts on every device
        with FlopCounterMode(display=False) as forward:
            logits = classifier(ids, mask)
        with FlopCounterMode(display=False) as backward:
            sequence_losses(logits, torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    assert forward.get_total_flops() == sum(part.forward for part in expected)
    assert backward.get_total_flops() == sum(part.step - part.forward for part in expected)


def test_nt50m_with_lora_by_hand():
    """512 wide, 12 layers, 2048 in the feed-forward, 251 tokens; r = 4. Every product written
    out.
    """
    H, I, T, r = 512, 2048, 251, 4
    classifier, _, names = built("nt50m", "lora", "corrected", device="meta")
    found = {part.name: part for part in parts(classifier, "nt", names, T)}
    first, sixth = (f"backbone.encoder.layer.{i}.attention.self" for i in (0, 5))

    # A frozen Linear: what comes before the sixth trains, before the first nothing does.
    key = found[f"{sixth}.key"]
    assert key.forward == 2 * H * H * T
    assert key.step == 4 * H * H * T
    key = found[f"{first}.key"]
    assert key.step == key.forward == 2 * H * H * T

    query = found[f"{sixth}.query"]
    assert query.forward == (2 * H * H + 4 * r * H) * T
    assert query.step == (4 * H * H + 12 * r * H) * T

    # The two products of the attention; the first keys need no gradient.
    assert found[sixth].forward == 4 * T * T * H
    assert found[sixth].step == 12 * T * T * H
    assert found[first].step == 10 * T * T * H

    heads = 2 * H * (4 + 5 + 6)
    assert found["heads.genus"].forward == 2 * H * 6
    assert found["heads.genus"].step == 6 * H * 6
    layer = 4 * H * H + H * 2 * I + I * H
    forward = 12 * T * (2 * layer + 2 * 4 * r * H + 4 * T * H) + heads
    assert sum(part.forward for part in found.values()) == forward


def test_the_rules_of_thumb():
    """6N, 4N, 3N of the forward's 2N: the ratios of the paper's operation counts, to a few
    percent.
    """
    ratio = {}
    for strategy in ("full", "lora", "ia3", "freeze75"):
        classifier, _, names = built("nt50m", strategy, "corrected", device="meta")
        found = parts(classifier, "nt", names, 251)
        ratio[strategy] = sum(part.step for part in found) / sum(part.forward for part in found)
    assert ratio["full"] == 3
    assert ratio["lora"] == pytest.approx(2, abs=0.06)
    assert ratio["ia3"] == pytest.approx(2, abs=0.06)
    assert 1.4 < ratio["freeze75"] < 1.6


@pytest.mark.parametrize("name, strategy, protocol", [
    *((name, *case) for name in TINY for case in CASES),
    *((name, "lora", "published") for name in MODELS if not name.startswith("tiny")),
    ("nt50m", "freeze75", "corrected"),
    ("dnabert2", "ia3", "corrected"),
])
def test_totals_are_those_of_the_dry_run_on_one_screen(name, strategy, protocol, capsys):
    flags = ["--model", name, "--strategy", strategy, "--protocol", protocol,
             "--num-classes", "4", "31", "75"]
    train.main([*flags, "--dry-run"])
    counted = json.loads(capsys.readouterr().out)
    main(flags)
    text = capsys.readouterr().out
    assert f"\n{counted['trainable']:,} of {counted['total']:,} parameters train" in text
    rows = text.splitlines()
    assert len(rows) <= 50 and max(map(len, rows)) <= 104
    # Every number once: the blocks of layers and what is in no layer add up to the total.
    line = re.compile(r"^(\S+) .*\s([\d,]+)\s+(frozen|[\d,]+)(?:\s+[\d.]+\s+[\d.]+)?$")
    total = trainable = 0
    for row in rows[4:]:
        found = line.match(row)
        if found and found[1] != "total" and "parameters train" not in row:
            total += int(found[2].replace(",", ""))
            trainable += 0 if found[3] == "frozen" else int(found[3].replace(",", ""))
    assert (total, trainable) == (counted["total"], counted["trainable"])


def test_what_a_reader_sees(capsys):
    main(["--model", "nt50m", "--strategy", "lora", "--r", "4"])
    text = capsys.readouterr().out
    assert "encoder.layer.1-11" in text
    assert "LoRA r = 4" in text and "attention.self.key" in text
    main(["--model", "dnabert2", "--strategy", "ia3"])
    text = capsys.readouterr().out
    assert "(IA)3 key,value" in text and "(IA)3 on input" in text
    main(["--model", "nt50m", "--strategy", "freeze75", "--protocol", "published"])
    assert re.search(r"encoder.layer.0-8 .*frozen", capsys.readouterr().out)


def test_other_ranks_and_another_length(capsys):
    main(["--model", "tiny-nt", "--strategy", "full", "--num-classes", "3", "9",
          "--ranks", "family", "species", "--tokens", "101"])
    text = capsys.readouterr().out
    assert "heads.family" in text and "heads.species" in text
    assert "101 tokens a sequence" in text


@pytest.mark.parametrize("flags, message", [
    (["--model", "nt50", "--strategy", "lora"], "did you mean nt50m"),
    (["--model", "nt50m", "--strategy", "lroa"], "did you mean lora"),
    (["--model", "nt50m", "--stratgy", "lora"], "no flag --stratgy; did you mean --strategy"),
    (["--model", "nt50m", "--strategy", "full", "--r", "4"], "--r is for --strategy lora"),
    (["--model", "nt50m", "--strategy", "lora", "--tokens", "0"], "0 is not a positive integer"),
    (["--model", "nt50m", "--strategy", "lora", "--targets", "nowhere"], "matches no module"),
    (["--model", "nt50m", "--strategy", "lora", "--num-classes", "4"], "1 numbers for 3 ranks"),
    (["--model", "nt50m", "--strategy", "random", "--revision", "abc"],
     "--strategy random uses none"),
])
def test_wrong_flags(flags, message):
    with pytest.raises(InputError, match=message):
        main(flags)


def test_the_standard_librarys_inspect_is_not_shadowed():
    """A Python started in taxa/ imports by that folder first."""
    code = "import inspect; print(inspect.__file__); print(inspect.signature(len))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "taxa",
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout.startswith(str(ROOT)), done.stderr


def test_python_dash_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-", "--model", "tiny-nt", "--strategy", "full"])
    # or runpy would warn that it is there already
    monkeypatch.delitem(sys.modules, "taxa.measure.tree")
    runpy.run_module("taxa.measure.tree", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.startswith("tiny-nt, full")
