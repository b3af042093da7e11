"""Genera that nobody trained on: which are held out, what the folder holds, and evaluate.py --split
unseen against scikit-learn.
"""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import command
from sklearn.metrics import roc_auc_score, roc_curve

import evaluate
import predict
import prepare
import train
from taxa.data.dataset import PreparedDataset
from taxa.data.simulate import simulate
from taxa.data.splits import NO_CLASS, hold_out
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError
from taxa.evaluation.metrics import auroc
from taxa.evaluation.unseen import Confidence, write_held_out
from taxa.training import checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    simulate(folder, 400, 1, 90)
    return ["--fasta", *map(str, sorted(folder.glob("*_db.fa"))),
            "--taxdump", str(folder / "taxdmp_simulated.zip"), "--length", "90",
            "--workers", "1", "--test", "0.2", "--validation", "0.2"]


@pytest.fixture(scope="module")
def held(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held") / "data"
    prepare.main([*source, "--hold-out", "0.3", "--tokenizers", "nt", "tiny-dnabert",
                  "--out", str(folder)])
    return folder


# ------------------------------------------------------------------ which genera


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_whole_genera_are_held_out_and_never_the_last_of_a_phylum(fraction):
    rng = np.random.default_rng(0)
    phylum_of = np.repeat(np.arange(20), rng.integers(1, 9, 20))
    genus = rng.permutation(np.repeat(np.arange(len(phylum_of)), 3))
    held = hold_out(phylum_of[genus], genus, fraction, seed=1)
    out = np.unique(genus[held])
    assert not np.isin(genus[~held], out).any() and len(out)
    assert set(phylum_of[np.setdiff1d(genus, out)]) == set(phylum_of)
    several = np.bincount(phylum_of)[np.bincount(phylum_of) > 1]
    wanted = fraction * several.sum()
    assert abs(len(out) - wanted) <= 1 or len(out) == (several - 1).sum() or fraction == 0.99
    assert (hold_out(phylum_of[genus], genus, fraction, seed=1) == held).all()
    other = hold_out(phylum_of[genus], genus, fraction, seed=2)
    assert fraction in (0.01, 0.99) or (other != held).any()


def test_phyla_of_one_genus_keep_it():
    assert not hold_out(np.arange(5), np.arange(5), 0.5, seed=1).any()


# ------------------------------------------------------------------ the folder


def test_a_fourth_split_and_a_table_without_its_genera(source, held, tmp_path, capsys):
    data = PreparedDataset(held)
    prepare.main([*source, "--out", str(tmp_path / "all")])
    whole = PreparedDataset(tmp_path / "all")
    assert data.splits == ("train", "validation", "test", "unseen")
    assert whole.splits == ("train", "validation", "test")
    assert "hold_out" not in whole.manifest["settings"] and "held_out" not in whole.manifest
    assert not (tmp_path / "all" / "unseen").exists()
    out = [row["taxid"] for row in data.manifest["held_out"]]
    kept = [row["taxid"] for row in data.classes["genus"]]
    assert sorted(out + kept) == [row["taxid"] for row in whole.classes["genus"]]
    assert len(out) >= 5
    for rank in ("superkingdom", "phylum"):
        assert data.classes[rank] == whole.classes[rank]
    assert sum(data.manifest["splits"].values()) == sum(whole.manifest["splits"].values()) == 400
    seen = {}  # record -> labels by taxid
    for name in whole.splits:
        split = whole.split(name, "nt")
        records = split.records(np.arange(len(split))).tolist()
        for record, labels in zip(records, split.labels.tolist()):
            seen[record] = [table[c]["taxid"] for table, c in zip(whole.classes.values(), labels)]
    for name in data.splits:
        split = data.split(name, "nt")
        records = split.records(np.arange(len(split))).tolist()
        for record, labels in zip(records, split.labels.tolist()):
            above = [data.classes[rank][label]["taxid"]
                     for rank, label in zip(("superkingdom", "phylum"), labels)]
            assert above == seen[record][:2]
            if name == "unseen":
                assert labels[2] == NO_CLASS and seen[record][2] in out
            else:
                assert data.classes["genus"][labels[2]]["taxid"] == seen[record][2]
    rows, which = data.held_out()
    unseen = data.split("unseen", "nt")
    records = unseen.records(np.arange(len(unseen))).tolist()
    held_taxids = [rows[c]["taxid"] for c in which.tolist()]
    assert held_taxids == [seen[record][2] for record in records]
    assert whole.held_out() is None
    data.verify("tiny-dnabert", data.splits, lambda items, *_, **__: items)
    prepare.main(["--describe", str(held)])
    assert "unseen" in capsys.readouterr().out


def test_a_changed_table_of_held_out_genera_is_seen(held, tmp_path):
    shutil.copytree(held, tmp_path / "damaged")
    path = tmp_path / "damaged" / "unseen" / "held_out.npy"
    np.save(path, np.load(path)[::-1])
    damaged = PreparedDataset(tmp_path / "damaged")
    with pytest.raises(InputError, match=r"unseen/held_out.npy: damaged"):
        damaged.verify("nt", ["unseen"], lambda items, *_, **__: items)
    np.save(path, np.load(path) + np.uint16(999))
    with pytest.raises(InputError, match=r"held_out.npy: does not fit the manifest"):
        PreparedDataset(tmp_path / "damaged").held_out()


@pytest.mark.parametrize("flags, message", [
    (["--hold-out", "0"], "holds nothing out"),
    (["--hold-out", "1"], r"1 is not in \[0, 1\)"),
    (["--hold-out", "0.2", "--ranks", "genus"], "it needs two ranks"),
    (["--hold-out", "0.2", "--test-ids", "x"], "--hold-out does nothing here"),
    (["--hold-out", "0.2", "--ranks", "genus", "species"], "no genus has two species"),
])
def test_wrong_hold_out(flags, message, source, tmp_path):
    given = source[:-4] if "--test-ids" in flags else source
    with pytest.raises(InputError, match=message):
        prepare.main([*given, *flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ the evaluation


def test_auroc_is_scikit_learns():
    rng = np.random.default_rng(0)
    for _ in range(5):
        seen = rng.integers(0, 9, 40).astype(float)  # with ties
        unseen = rng.integers(0, 7, 30).astype(float)
        expected = roc_auc_score([1] * 40 + [0] * 30, np.concatenate([seen, unseen]))
        assert auroc(seen, unseen) == pytest.approx(expected)


def test_unseen_genera_against_scikit_learn(held, weights, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(command("tiny-nt", "full", held, weights, out, "--max-steps", "40", "--epochs", "2"))
    found = evaluate.main([str(out / "ckpt.pt"), "--split", "unseen"])
    assert found == json.loads((out / "metrics_unseen.json").read_text())
    fitted = json.loads((out / "temperature.json").read_text())
    data = PreparedDataset(held)
    model = checkpoint.rebuild(checkpoint.read(out / "ckpt.pt")).eval()
    values = {}
    right = {}
    for name in ("validation", "test", "unseen"):
        split = data.split(name, "nt")
        batch = split[list(range(len(split)))]
        with torch.no_grad():
            logits = model(**{key: value for key, value in batch.items() if key != "labels"})
        z = logits["genus"] / fitted["temperature"]["genus"]
        values[name] = {
            "softmax": z.softmax(1).max(1).values.numpy(),
            "energy": z.logsumexp(1).numpy(),
        }
        right[name] = z.argmax(1).numpy() == split.labels[:, -1]
        if name == "unseen":
            for i, rank in enumerate(("superkingdom", "phylum")):
                accuracy = (logits[rank].argmax(1).numpy() == split.labels[:, i]).mean()
                assert found["ranks"][rank]["accuracy"] == pytest.approx(accuracy)
    assert list(found["ranks"]) == ["superkingdom", "phylum"] and not right["unseen"].any()
    for name, numbers in found["confidence"].items():
        seen, unseen = values["test"][name], values["unseen"][name]
        truth = np.repeat([1, 0], [len(seen), len(unseen)])
        scores = np.concatenate([seen, unseen])
        assert numbers["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-4)
        threshold = numbers["threshold"]
        of_right = values["validation"][name][right["validation"]]
        assert (of_right >= threshold - 1e-6).mean() >= 0.95
        assert (of_right > threshold + 1e-6).mean() <= 0.95 + 1 / len(of_right)
        false_rate, _, thresholds = roc_curve(truth, scores, drop_intermediate=False)
        fewest = false_rate[thresholds >= threshold + 1e-4][-1]  # rounding
        most = false_rate[thresholds >= threshold - 1e-4][-1]
        assert fewest <= numbers["false_calls"] <= most
        kept = (seen[right["test"]] >= threshold - 1e-6).mean()
        assert numbers["right_kept"] == pytest.approx(kept)
    assert fitted["min_probability"] == found["confidence"]["softmax"]["threshold"]
    lines = (out / "per_class_unseen.csv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines))
    support = np.array([int(row["support"]) for row in rows])
    genera = {row["taxid"] for row in data.manifest["held_out"]}
    assert {int(row["taxid"]) for row in rows} == genera and support.min() > 0
    assert support.sum() == found["sequences"]
    which = data.held_out()[1]
    labels = data.split("unseen", "nt").labels
    above = ("superkingdom", "phylum")
    for c, row in enumerate(rows):
        expected = [data.classes[rank][label]["name"]
                    for rank, label in zip(above, labels[which == c][-1])]
        assert [row[f"{rank}_name"] for rank in above] == expected
    for column, whole in (
            ("superkingdom_accuracy", found["ranks"]["superkingdom"]["accuracy"]),
            ("phylum_accuracy", found["ranks"]["phylum"]["accuracy"]),
            ("false_calls", found["confidence"]["softmax"]["false_calls"])):
        total = (support * [float(row[column]) for row in rows]).sum()
        assert total / support.sum() == pytest.approx(whole, abs=1e-5)

    both = evaluate.main([str(out / "ckpt.pt"), "--split", "unseen", "--both-strands",
                          "--out", str(tmp_path / "both")])
    assert both["confidence"] != found["confidence"] and both["sequences"] == found["sequences"]
    bases = get_tokenizer("nt").decode(data.split("test", "nt").tokens(0)).decode()
    (tmp_path / "read.fa").write_text(f">a\n{bases}\n")
    read = [str(out / "ckpt.pt"), str(tmp_path / "read.fa"),
            "--temperature", str(out / "temperature.json"), "--out", "/dev/null"]
    capsys.readouterr()
    predict.main(read)
    assert f"suggests --min-probability {fitted['min_probability']:.3f}" in capsys.readouterr().err
    predict.main([*read, "--min-probability", "0.2"])
    assert "suggests" not in capsys.readouterr().err


@pytest.mark.parametrize("threshold", [0.5, None])
def test_the_table_of_held_out_genera_against_a_naive_count(threshold, tmp_path):
    rng = np.random.default_rng(0)
    classes = {"phylum": [{"taxid": 10 + i, "name": f"P{i}"} for i in range(4)], "genus": []}
    rows = [{"taxid": None, "name": "H0"}, {"taxid": 31, "name": "H1"}]
    phylum_of = np.array([1, 3])
    which = rng.integers(0, 2, 40)
    drawn = lambda truth: Confidence(
        truth, rng.integers(0, 3, truth.shape), rng.random((len(truth), 2)))
    # nothing of the phylum of H1
    test = drawn(np.stack([rng.integers(0, 3, 60), rng.integers(0, 9, 60)], axis=1))
    unseen = drawn(np.stack([phylum_of[which], np.full(40, NO_CLASS)], axis=1))
    write_held_out(tmp_path / "table.csv", (rows, which), classes, test, unseen, threshold)
    found = list(csv.DictReader((tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["taxid"], row["name"], row["phylum_name"]) for row in found] == [
        ("", "H0", "P1"), ("31", "H1", "P3")]
    for c, row in enumerate(found):
        members = [i for i in range(40) if which[i] == c]
        assert int(row["support"]) == len(members)
        right = sum(unseen.predicted[i, 0] == phylum_of[c] for i in members)
        assert float(row["phylum_accuracy"]) == pytest.approx(right / len(members), abs=1e-6)
        called = ""
        if threshold is not None:
            above = sum(unseen.values[i, 0] >= threshold for i in members)
            called = f"{above / len(members):.6f}"
        assert row["false_calls"] == called
    relatives = [i for i in range(60) if test.truth[i, 0] == 1]
    right = sum(test.predicted[i, 0] == 1 for i in relatives)
    assert found[0]["phylum_known"] == f"{right / len(relatives):.6f}"
    assert found[1]["phylum_known"] == ""


def test_a_folder_without_unseen_genera_is_one_line(short, weights, tmp_path):
    train.main(command("tiny-nt", "full", short, weights, tmp_path / "run", "--max-steps", "1"))
    with pytest.raises(InputError, match="has no split unseen: prepare it with --hold-out"):
        evaluate.main([str(tmp_path / "run" / "ckpt.pt"), "--split", "unseen"])
