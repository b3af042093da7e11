"""The benchmarks behind docs/RESULTS.md: intervals and gains against plain arithmetic, chosen
rates, pictures, sets of genera.
"""

import csv
import json
import sys

import numpy as np
import pytest
from helpers import ROOT
from made_runs import make_grid, make_run
from sklearn.metrics import balanced_accuracy_score

import prepare
from taxa import RANKS
from taxa.data.dataset import PreparedDataset
from taxa.data.simulate import simulate
from taxa.errors import InputError
from taxa.study.grid import read_grid
from taxa.study.groups import Arm

sys.path.insert(0, str(ROOT / "experiments"))
import choose_rates
import intervals
import some_genera
import unseen

CONFUSION = np.array([[30, 10, 0], [5, 15, 0], [0, 0, 0]])  # no sequence of the third class


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())["ranks"]


def test_replicates_of_a_run_vary_as_a_bootstrap_of_its_sequences():
    truth = np.repeat([0, 1], [40, 20])
    predicted = np.repeat([0, 1, 0, 1], [30, 10, 5, 15])
    drawn = intervals.resampled(CONFUSION, 20_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(balanced_accuracy_score(truth, predicted), abs=0.002)
    rng = np.random.default_rng(1)
    plain = []
    of_class = [np.flatnonzero(truth == c) for c in (0, 1)]
    for _ in range(4000):
        places = np.concatenate([rng.choice(members, len(members)) for members in of_class])
        plain.append(balanced_accuracy_score(truth[places], predicted[places]))
    assert drawn.std() == pytest.approx(np.std(plain), rel=0.05)
    found, expected = (np.percentile(values, [2.5, 97.5]) for values in (drawn, plain))
    assert found == pytest.approx(expected, abs=0.02)


def test_arms_gains_and_shares(tmp_path, capsys):
    make_grid(tmp_path / "runs", seeds=(1, 2, 3))
    intervals.main([str(tmp_path / "runs"), "--out", str(tmp_path / "found.json"),
                    "--replicates", "500"])
    found = json.loads((tmp_path / "found.json").read_text())
    arms = {arm["arm"]: arm for arm in found["arms"]}
    mean = {}
    for name, folder in (("full", "full-train"), ("(IA)³", "ia3-train"),
                         ("(IA)³, heads frozen", "ia3-frozen")):
        seeds = [metrics_of(tmp_path / "runs" / f"few-tiny-nt-{folder}-seed{seed}")
                 for seed in (1, 2, 3)]
        mean[name] = {rank: np.mean([ranks[rank]["balanced_accuracy"] for ranks in seeds])
                      for rank in RANKS}
    for name, means in mean.items():
        assert arms[name]["seeds"] == [1, 2, 3]
        assert arms[name]["training_sequences"] == 320
        for rank in RANKS:
            reached = arms[name]["reached"][rank]
            assert reached["mean"] == pytest.approx(means[rank])
            assert reached["low"] < reached["mean"] < reached["high"]
    assert [each["arm"] for each in found["heads"]] == ["LoRA r=4", "LoRA r=20", "(IA)³"]
    genus = found["heads"][-1]["genus"]
    trained = mean["(IA)³"]["genus"]
    frozen = mean["(IA)³, heads frozen"]["genus"]
    full = mean["full"]["genus"]
    assert genus["gain"] == pytest.approx(trained - frozen)
    assert genus["low"] < genus["gain"] < genus["high"]
    assert genus["share"]["share"] == pytest.approx((trained - frozen) / (full - frozen))
    said = capsys.readouterr().out
    superkingdom = arms["(IA)³"]["reached"]["superkingdom"]["mean"]
    assert f"| (IA)³ | 3 | 98.60% | {superkingdom:.3f} (" in said
    assert "of the distance to full" in said


def test_no_share_of_a_distance_that_may_be_none():
    values = np.array([0.8, 0.9])
    found = intervals.gain((0.85, values), (0.85, values), (0.86, values + [0.01, 0.0]))
    assert found == {"gain": 0.0, "low": 0.0, "high": 0.0}
    share = intervals.gain((0.9, values), (0.5, values / 2), (0.9, values))["share"]
    assert share == {"share": 1.0, "low": 1.0, "high": 1.0}


def test_arms_are_compared_at_equal_labels_and_never_with_one_of_two(tmp_path):
    few = {"data_fraction": 0.1, "training_sequences": 32}
    for name, heads, more in (("a", "train", {}), ("b", "frozen", {}), ("c", "frozen", few)):
        skill = 0.5 if heads == "train" else 0.2
        make_run(tmp_path / "runs" / name, "ia3", heads=heads, skill=skill, **more)
    arguments = [str(tmp_path / "runs"), "--out", str(tmp_path / "found.json"),
                 "--replicates", "20"]
    intervals.main(arguments)
    (found,) = json.loads((tmp_path / "found.json").read_text())["heads"]
    genus = [metrics_of(tmp_path / "runs" / name)["genus"]["balanced_accuracy"] for name in "ab"]
    assert found["genus"]["gain"] == pytest.approx(genus[0] - genus[1])
    make_run(tmp_path / "runs" / "d", "ia3", heads="frozen", lr=0.1)
    with pytest.raises(InputError, match="could both be compared with"):
        intervals.main(arguments)


def test_what_has_no_interval_is_said(tmp_path):
    make_run(tmp_path / "run", finished=False)
    with pytest.raises(InputError, match="no finished run of train.py"):
        intervals.main([str(tmp_path), "--out", str(tmp_path / "x.json")])
    (make_run(tmp_path / "done") / "confusion_genus.csv").unlink()
    with pytest.raises(InputError, match="done has no confusion_RANK.csv: evaluate.py writes them"):
        intervals.main([str(tmp_path), "--out", str(tmp_path / "x.json")])
    assert not (tmp_path / "x.json").exists()


def test_pictures_of_intervals(tmp_path):
    pytest.importorskip("matplotlib")
    import interval_figures
    make_grid(tmp_path / "runs")
    make_run(tmp_path / "runs" / "few-labels", data_fraction=0.1, training_sequences=32)
    intervals.main([str(tmp_path / "runs"), "--out", str(tmp_path / "found.json"),
                    "--replicates", "50"])
    arguments = [str(tmp_path / "found.json")]
    for name in interval_figures.PICTURES:
        arguments += [f"--{name}", str(tmp_path / f"{name}.png")]
    interval_figures.main(arguments)
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
               for name in interval_figures.PICTURES)
    arms, names = interval_figures.joined({
        "b": [Arm("ia3", None, "train", "", 1, 9, {"genus": (0.3, 0.2, 0.4)}, {"genus": 40})],
        "a": [Arm("ia3", None, "train", "", 1, 9, {"genus": (0.7, 0.6, 0.8)}, {"genus": 4})],
    })
    assert names == ["a", "b"]
    assert [(arm.reached, arm.classes) for arm in arms] == [
        ({"a": (0.7, 0.6, 0.8), "b": (0.3, 0.2, 0.4)}, {"a": 4, "b": 40})]
    found = json.loads((tmp_path / "found.json").read_text())
    without_full = [arm for arm in found["arms"] if arm["strategy"] != "full"]
    of_two = [*found["arms"], found["arms"][0] | {"data": "other"}]
    for arms, message in ((without_full, "needs one arm of full fine-tuning"),
                          (of_two, "several data sets: --classes alone")):
        (tmp_path / "less.json").write_text(json.dumps({"arms": arms}))
        with pytest.raises(InputError, match=message):
            interval_figures.main([str(tmp_path / "less.json"),
                                   "--share", str(tmp_path / "x.png"),
                                   "--classes", str(tmp_path / "y.png")])
    (tmp_path / "other.json").write_text("[]")
    message = "other.json is not a file of experiments/intervals.py --out"
    with pytest.raises(InputError, match=message):
        interval_figures.main(
            [str(tmp_path / "other.json"), "--share", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "y.png").exists()


def make_unseen(folder, shares, **kind):
    """A run with three held-out genera, 7, 8 and 9.

    shares: of the fragments of each genus, those in the right phylum. In the right superkingdom
    there is .5 of them.
    """
    header = ("taxid,name,support,superkingdom_name,superkingdom_accuracy,superkingdom_known,"
              "phylum_name,phylum_accuracy,phylum_known,false_calls")
    rows = [f"{taxid},Genus{taxid},10,Archaea,0.5,0.9,Phylum <{taxid}>,{share},{known},0.6"
            for taxid, share, known in zip((7, 8, 9), shares, (0.6, 0.8, ""))]
    (make_run(folder, **kind) / unseen.TABLE).write_text("\n".join([header, *rows]) + "\n")


def test_unseen_genera_are_drawn_alike_for_every_arm(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for strategy, heads, *seeds in (
            ("full", "train", (0.1, 0.5, 0.9), (0.1, 0.5, 0.9)),
            ("ia3", "train", (0.2, 0.6, 1.0)),
            ("ia3", "frozen", (0.0, 0.0, 0.3), (0.2, 0.2, 0.5))):
        for seed, shares in enumerate(seeds, start=1):
            make_unseen(tmp_path / "runs" / f"{strategy}-{heads}-{seed}", shares,
                        strategy=strategy, heads=heads, seed=seed)
    unseen.main([str(tmp_path / "runs"), "--out", str(tmp_path / "found.json"),
                 "--figure", str(tmp_path / "unseen.png")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["held_out"] == [
        {"taxid": str(t), "name": f"Genus{t}", "sequences": 10} for t in (7, 8, 9)]
    full, trained, frozen = (arm["ranks"]["phylum"] for arm in found["arms"])
    assert [arm["arm"] for arm in found["arms"]] == ["full", "(IA)³", "(IA)³, heads frozen"]
    assert found["arms"][0]["seeds"] == [1, 2]
    assert full["known"] == pytest.approx(0.7) and full["mean"] == pytest.approx(0.5)
    assert (full["low"], full["high"]) == pytest.approx((0.1, 0.9))
    assert full["genera"] == pytest.approx([0.1, 0.5, 0.9])
    # Drawn apart the interval would be wide.
    assert trained["less_full"] == pytest.approx({"difference": 0.1, "low": 0.1, "high": 0.1})
    assert "heads" not in frozen and "less_full" not in full
    assert frozen["genera"] == pytest.approx([0.1, 0.1, 0.4])
    heads = trained["heads"]
    assert heads["difference"] == pytest.approx(0.4)
    assert heads["low"] < 0.35 and heads["high"] > 0.45
    superkingdom = found["arms"][0]["ranks"]["superkingdom"]
    assert superkingdom["low"] == superkingdom["high"] == 0.5
    assert "(IA)³, heads trained less frozen: superkingdom +0.000" in capsys.readouterr().out
    assert (tmp_path / "unseen.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_of_unseen_genera_is_said(tmp_path):
    make_unseen(tmp_path / "runs" / "a", (0.1, 0.5, 0.9))
    make_run(tmp_path / "runs" / "b", seed=2)
    given = [str(tmp_path / "runs"), "--out", str(tmp_path / "x.json")]
    message = (r"b has no per_class_unseen.csv: python evaluate.py .*b/ckpt.pt "
               "--split unseen writes it")
    with pytest.raises(InputError, match=message):
        unseen.main(given)
    table = (tmp_path / "runs" / "a" / unseen.TABLE).read_text()
    (tmp_path / "runs" / "b" / unseen.TABLE).write_text(table)
    metrics = tmp_path / "runs" / "b" / "metrics.json"
    right = metrics.read_text()
    metrics.write_text(json.dumps(json.loads(right) | {"dataset_digest": "another"}))
    with pytest.raises(InputError, match="are of two data sets or two models"):
        unseen.main(given)
    metrics.write_text(right)
    for text, message in (("", "is not the table that"),
                          (table.replace("0.5", "half"), "is not the table that"),
                          (table.replace("Genus8", "G"), "are of two data sets")):
        (tmp_path / "runs" / "b" / unseen.TABLE).write_text(text)
        with pytest.raises(InputError, match=message):
            unseen.main(given)
    assert not (tmp_path / "x.json").exists()


def test_some_genera_are_nested_and_of_one_size(tmp_path):
    made = simulate(tmp_path / "sim", 800, seed=2)
    words = ["--fasta", *map(str, made["fasta"]), "--taxdump", str(made["taxdump"]),
             "--each", "5", "--out", str(tmp_path / "some")]
    some_genera.main([*words, "--genera", "3", "8"])
    genera = {}
    for number in (3, 8):
        prepare.main(["--fasta", str(tmp_path / "some" / f"{number}.fa"),
                      "--taxdump", str(made["taxdump"]), "--ranks", "genus",
                      "--test", "0.2", "--out", str(tmp_path / f"data-{number}")])
        data = PreparedDataset(tmp_path / f"data-{number}")
        genera[number] = {row["taxid"] for row in data.classes["genus"]}
        labels = [data.split(name, "nt").labels[:, 0] for name in data.splits]
        assert data.num_classes == {"genus": number}
        assert np.bincount(np.concatenate(labels)).tolist() == [5] * number
    assert genera[3] < genera[8]
    with pytest.raises(InputError, match=r"--genera 500: \d+ genera have 5 sequences or more"):
        some_genera.main([*words, "--genera", "500"])
    (tmp_path / "bad.fa").write_text(">NC_1 x\nACGT\n")
    message = "bad.fa: not a plain FASTA file with a taxid at the start of each header"
    with pytest.raises(InputError, match=message):
        some_genera.main(["--fasta", str(tmp_path / "bad.fa"), *words[-6:], "--genera", "3"])


def make_rate(folder, lr, losses, strategy="full"):
    run = make_run(folder, strategy, lr=lr, finished=False)
    environment = json.loads((run / "environment.json").read_text())
    words = ["train.py", "--model", "tiny-nt", "--strategy", strategy, "--epochs", "2",
             "--lr", str(lr), "--seed", "1", "--out", str(run)]
    (run / "environment.json").write_text(json.dumps(environment | {"command": words}))
    lines = [json.dumps({"epoch": i, "step": i, "validation_loss": loss}) + "\n"
             for i, loss in enumerate(losses, start=1)]
    (run / "log.jsonl").write_text("".join(lines))


def test_the_rate_with_the_lowest_validation_loss(tmp_path, capsys):
    # The second is the lowest at its best, not at its end.
    for lr, losses in ((0.001, [3.0, 2.5]), (0.01, [2.0, 2.2]), (0.1, [2.4, 2.1])):
        make_rate(tmp_path / "runs" / f"full{lr}", lr, losses)
    for lr, losses in ((0.001, [3.0]), (0.01, [2.0])):
        make_rate(tmp_path / "runs" / f"ia3{lr}", lr, losses, "ia3")
    choose_rates.main([str(tmp_path / "runs"), "--seeds", "1", "2", "--epochs", "5",
                       "--out", str(tmp_path / "chosen.csv")])
    rows = list(csv.DictReader((tmp_path / "chosen.csv").read_text().splitlines()))
    assert [(row["strategy"], row["lr"], row["seed"], row["epochs"]) for row in rows] == [
        ("full", "0.01", "1 2", "5"), ("ia3", "0.01", "1 2", "5")]
    grid = read_grid(tmp_path / "chosen.csv", 1)
    assert [(each.flags["strategy"], each.flags["seed"]) for each in grid] == [
        ("full", "1"), ("ia3", "1"), ("full", "2"), ("ia3", "2")]  # all of a seed first
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "| full | 2.500 | 2.000 | 2.100 | 0.01 |"
    assert said[3] == "| ia3 | 3.000 | 2.000 |  | 0.01 (edge) |"
    make_rate(tmp_path / "runs" / "again", 0.1, [1.0])
    with pytest.raises(InputError, match="another run here has the same flags and --lr 0.1"):
        choose_rates.main([str(tmp_path / "runs"), "--out", str(tmp_path / "again.csv")])
