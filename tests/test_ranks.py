"""Other ranks than superkingdom, phylum, genus: from the dump to the tables of a run."""

import csv
import json

import numpy as np
import pytest
import torch

import evaluate
import prepare
import train
from taxa.backbones import load_backbone
from taxa.data import simulate
from taxa.data.dataset import PreparedDataset
from taxa.data.splits import SPLITS, split_by_genus
from taxa.errors import InputError
from taxa.model import TaxonClassifier, sequence_losses
from taxa.training import checkpoint

FOUR = ["superkingdom", "phylum", "genus", "species"]
LINEAGES = {lineage[-1][0]: [taxid for taxid, _ in lineage] for lineage in simulate.species()}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The arguments of prepare.py for 400 simulated sequences."""
    paths = simulate.simulate(tmp_path_factory.mktemp("simulated"), 400, 42)
    return ["--fasta", *map(str, paths["fasta"]), "--taxdump", str(paths["taxdump"])]


@pytest.fixture(scope="module")
def prepared(simulated, tmp_path_factory):
    """{number of ranks: prepared folder}."""
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in (FOUR, ["phylum"]):
        prepare.main([*simulated, "--ranks", *ranks, "--out", str(folder / str(len(ranks)))])
    return {4: folder / "4", 1: folder / "1"}


@pytest.mark.parametrize("ranks", [FOUR, ["phylum"]], ids=["four", "one"])
def test_labels_are_those_of_the_lineage_and_the_split_is_by_the_last(ranks, prepared):
    data = PreparedDataset(prepared[len(ranks)])
    assert list(data.classes) == ranks and data.manifest["sequences"] == 400
    taxids, labels, splits = [], [], []
    for number, name in enumerate(SPLITS):
        records = np.load(data.folder / name / "records.npy")
        split = data.split(name, "nt")
        assert split.labels.shape == (len(records), len(ranks))
        for record, row in zip(records, split.labels.tolist()):
            expected = [LINEAGES[int(record["taxid"])][FOUR.index(rank)] for rank in ranks]
            assert [data.classes[rank][i]["taxid"] for rank, i in zip(ranks, row)] == expected
        labels += split.labels.tolist()
        splits += [number] * len(records)
        taxids += [(int(r["source"]), int(r["record"])) for r in records]
    order = sorted(range(400), key=taxids.__getitem__)
    last = [labels[i][-1] for i in order]
    assert split_by_genus(last, 42).tolist() == [splits[i] for i in order]


def test_the_default_ranks_given_in_full_change_no_byte(simulated, tmp_path):
    prepare.main([*simulated, "--out", str(tmp_path / "a")])
    prepare.main([
        *simulated, "--ranks", "superkingdom", "phylum", "genus", "--out", str(tmp_path / "b"),
    ])
    default = (tmp_path / "a" / "manifest.json").read_bytes()
    assert default == (tmp_path / "b" / "manifest.json").read_bytes()


def test_a_sequence_without_one_of_the_ranks_is_dropped_with_its_reason(simulated, tmp_path):
    with pytest.raises(InputError, match="no sequence is left of 400 .*: no family"):
        prepare.main([
            *simulated, "--ranks", "phylum", "family", "--out", str(tmp_path / "out"),
        ])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ranks", [4, 1])
def test_train_and_evaluate_follow_the_folder(ranks, prepared, weights, tmp_path, capsys):
    out = tmp_path / "run"
    names = FOUR if ranks == 4 else ["phylum"]
    tested = train.main([
        "--model", "tiny-nt", "--strategy", "lora",
        "--data", str(prepared[ranks]), "--weights", str(weights["tiny-nt"]),
        "--out", str(out), "--max-steps", "2", "--batch-size", "8",
    ])
    assert list(tested["ranks"]) == names
    assert list(checkpoint.read(out / "ckpt.pt")["classes"]) == names
    tables = sorted(path.name for path in out.glob("confusion_*.csv"))
    assert tables == sorted(f"confusion_{rank}.csv" for rank in names)
    lines = (out / "per_class.csv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines))
    assert list(dict.fromkeys(row["rank"] for row in rows)) == names
    assert evaluate.main([str(out / "ckpt.pt")]) == tested
    other = prepared[5 - ranks]
    capsys.readouterr()
    message = f"has heads for {' '.join(names)}, but .* evaluate on data prepared with --ranks"
    with pytest.raises(InputError, match=message):
        evaluate.main([
            str(out / "ckpt.pt"), "--data", str(other), "--out", str(tmp_path / "other"),
        ])


def test_loss_is_the_sum_over_all_heads(prepared):
    data = PreparedDataset(prepared[4])
    torch.manual_seed(0)
    backbone = load_backbone("tiny-nt", pretrained=False)
    model = TaxonClassifier(backbone, data.num_classes).eval()
    batch = data.split("test", "nt")[[0, 1, 2]]
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"])
    expected = sum(
        torch.nn.functional.nll_loss(
            logits[rank].log_softmax(1), batch["labels"][:, i], reduction="none",
        )
        for i, rank in enumerate(FOUR)
    )
    torch.testing.assert_close(sequence_losses(logits, batch["labels"]), expected)


def dry(capsys, *arguments):
    capsys.readouterr()
    train.main(["--model", "nt50m", "--strategy", "full", "--dry-run", *map(str, arguments)])
    return json.loads(capsys.readouterr().out)


def test_dry_run_counts_the_heads_of_the_ranks(prepared, capsys):
    counted = dry(capsys, "--num-classes", 4, 18, 54, 54, "--ranks", *FOUR)
    heads = [f"heads.{rank}.{kind}" for rank in FOUR for kind in ("weight", "bias")]
    assert counted["names"][-8:] == heads
    assert counted["total"] == 52_484_608 + (4 + 18 + 54 + 54) * 513
    assert dry(capsys, "--data", prepared[4]) == counted
    assert dry(capsys, "--num-classes", 9, "--ranks", "family")["total"] == 52_484_608 + 9 * 513


@pytest.mark.parametrize("flags, message", [
    (["--num-classes", "4", "18"], "2 numbers for 3 ranks .superkingdom phylum genus"),
    (["--num-classes", "4", "--ranks", "genus", "species"], "1 numbers for 2 ranks"),
    (["--ranks", "genus"], "--ranks names what --num-classes counts"),
    (["--num-classes", "4", "5", "--ranks", "genus", "genus"], "genus is given twice"),
])
def test_dry_run_refuses_ranks_that_do_not_fit(flags, message):
    with pytest.raises(InputError, match=message):
        train.main(["--model", "nt50m", "--strategy", "full", "--dry-run", *flags])
