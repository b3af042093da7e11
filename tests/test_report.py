"""report.py on small run folders that hold what train.py leaves: args, environment, log, and the
tables of taxa.evaluation.evaluation.
"""

import base64
import csv
import html.parser
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT
from made_runs import GRID, make_grid, make_run

import report
from taxa import RANKS
from taxa.errors import InputError
from taxa.strategies import STRATEGIES
from taxa.study.groups import arm_of, group_runs, published_groups
from taxa.study.published_runs import published_rows, published_seconds
from taxa.study.run_folders import find_runs, read_run
from taxa.study.tables import COLUMNS, published_row, ranks_of


def grouped(folder):
    """The groups of all runs in a folder."""
    return group_runs([read_run(run) for run in find_runs([folder])])


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())["ranks"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Twenty finished runs, one that is not, and one of pretrain.py."""
    folder = make_grid(tmp_path_factory.mktemp("report") / "runs")
    make_run(folder / "unfinished", seed=9, steps=10, finished=False)
    pretraining = folder / "pretrain"
    pretraining.mkdir()
    args = {"model": "tiny-nt", "batch_size": 16, "accumulate": 1, "seed": 1, "lr": 1e-3}
    (pretraining / "args.json").write_text(json.dumps(args))
    with open(pretraining / "log.jsonl", "w") as log:
        for step in (0, 50, 100):
            line = {"epoch": step // 50, "step": step, "validation_loss": 8.0,
                    "perplexity": 3000 - step, "unigram_perplexity": 2950}
            log.write(json.dumps(line) + "\n")
    return folder


@pytest.fixture(scope="session")
def written(runs, tmp_path_factory):
    """The report of `runs`, with a probe's ceilings."""
    reason = "the report's pictures need matplotlib: pip install '.[report]'"
    pytest.importorskip("matplotlib", reason=reason)
    folder = tmp_path_factory.mktemp("out")
    entry = [{"strategy": s, "r": r, "settings": {"heads": "train"}, "ceiling": n,
              "smallest_that_fails": n + 1} for s, r, n in (("full", None, 16), ("lora", 4, 20))]
    document = {"model": "tiny-nt", "device": "CPU", "memory_limit_bytes": 2**28, "runs": entry}
    (folder / "probe.json").write_text(json.dumps(document))
    report.main([str(runs), "--out", str(folder / "report"), "--probe", str(folder / "probe.json")])
    return folder / "report"


def test_table_says_what_the_runs_say(runs, written):
    with open(written / "table.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert len(rows) == 2 * len(GRID) + 1
    assert tuple(next(iter(rows.values()))) == COLUMNS
    for name, row in rows.items():
        args = json.loads((runs / name / "args.json").read_text())
        assert (row["model"], row["strategy"], row["heads"], int(row["seed"])) == (
            args["model"], args["strategy"], args["settings"]["heads"], args["seed"])
        assert row["r"] == str(args["r"] or "") and float(row["learning_rate"]) == args["lr"]
        if name != "unfinished":
            ranks = metrics_of(runs / name)
            assert all(float(row[rank]) == ranks[rank]["balanced_accuracy"] for rank in ranks)
            assert float(row["epochs"]) == 2 and float(row["data_fraction"]) == 1
            assert float(row["trainable_fraction"]) == 17 * (args["r"] or 58) / 1000
            log = (runs / name / "log.jsonl").read_text()
            speeds = [json.loads(line).get("sequences_per_s") for line in log.splitlines()]
            # Every line is of five steps.
            slowness = np.mean([1 / speed for speed in speeds if speed])
            assert float(row["epoch_seconds"]) == pytest.approx(320 * slowness, rel=1e-12)
    unfinished = rows["unfinished"]
    assert unfinished["genus"] == ""
    assert (unfinished["epochs"], unfinished["data_fraction"]) == ("0.5", "0.5")
    lines = (written / "table.md").read_text().splitlines()
    assert len(lines) == len(rows) + 2
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    genus = float(rows["few-tiny-nt-full-train-seed1"]["genus"])
    line = next(line for line in lines if "few-tiny-nt-full-train-seed1" in line)
    assert f" {genus:.4f} " in line


def test_summary_is_over_seeds(runs, written):
    with open(written / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if row["strategy"] == "LoRA r=4, heads frozen")
    values = [metrics_of(runs / f"few-tiny-nt-lora-r4-frozen-seed{seed}")["genus"]
              ["balanced_accuracy"] for seed in (1, 2)]
    said = [float(row[f"genus {what}"]) for what in ("mean", "sd", "lowest", "highest")]
    expected = [np.mean(values), np.std(values, ddof=1), min(values), max(values)]
    assert said == pytest.approx(expected)
    assert row["n"] == "2" and row["genus published"] == ""


def test_summary_has_the_published_row_of_the_same_settings_beside_it(tmp_path):
    """Rows 26 and 27 differ in the learning rate alone, row 23 in the share of the data."""
    def row(**args):
        given = {"data": "d", "model": "nt50m", "base": {"source": "hub"}, "seed": 42,
                 "settings": {"strategy": "lora", "r": 4, "heads": "train"}, "lr": 0.0005} | args
        run = SimpleNamespace(args=given, settings=given["settings"], environment={},
                              metrics=None, batch=128)
        return getattr(published_row(group_runs([run])[0]), "row", None)

    assert (row(), row(lr=0.0002), row(lr=0.001)) == (27, 26, None)
    part = {"settings": {"strategy": "lora", "r": 1, "heads": "frozen"}, "lr": 0.0002}
    assert (row(**part), row(**part, data_fraction=0.03)) == (24, 23)


def test_confused_pairs_against_a_plain_count(runs, written):
    with open(written / "confused_genera.csv", newline="") as file:
        first = next(csv.DictReader(file))
    of_seeds = [read_run(folder) for folder in find_runs([runs]) if "seed" in folder.name]
    best = next(group for group in group_runs(of_seeds) if group.label == first["strategy"])
    total = sum(np.array(each.confusion("genus")[1]) for each in best.runs)
    both = np.triu(total + total.T, 1)
    assert int(first["A as B"]) + int(first["B as A"]) == both.max()
    a = int(first["A"].removeprefix("Genus"))
    b = int(first["B"].removeprefix("Genus"))
    assert (int(first["A as B"]), int(first["B as A"])) == (total[a, b], total[b, a])
    assert (int(first["A tested"]), int(first["B tested"])) == (total[a].sum(), total[b].sum())


class Images(html.parser.HTMLParser):
    """Collects the sources of images, and the tags that are open."""

    def __init__(self, text):
        super().__init__()
        self.sources = []
        self.open = []
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.sources.append(attributes["src"])
        else:
            self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag not in ("img", "meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_pictures_and_page(written):
    names = {path.name for path in written.glob("figure_*.png")}
    assert names == {f"figure_{name}.png" for name in (
        "1a", "1b", "1c", "1d_time", "1d_batch", "heads", "curves", "pretraining",
        "share_tiny-nt_few", "classes_tiny-nt_few", "superkingdoms_tiny-nt_few",
        "phyla_tiny-nt_few")}
    for name in names:
        data = (written / name).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000, name
        assert 600 < width < 1700 and 350 < height < 1700, name
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Images(text)
    assert page.open == [] and page.links == []
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,"))
                for source in page.sources}
    assert embedded == {(written / name).read_bytes() for name in names}
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert "unfinished is not finished (its log ends at step 10 of 40)" in text
    assert "Genus" in text


@pytest.mark.parametrize("rank, one, other", [
    ("phylum", "full-train", "random-train"),
    ("superkingdom", "full-train", "freeze75-train"),
    ("genus", "lora-r4-train", "lora-r4-frozen"),
    ("genus", "ia3-train", "ia3-frozen"),
])
def test_sentences_under_the_pictures(runs, written, rank, one, other):
    values = [[metrics_of(runs / f"few-tiny-nt-{name}-seed{seed}")[rank]["balanced_accuracy"]
               for seed in (1, 2)] for name in (one, other)]
    above = all(a > b for a in values[0] for b in values[1])
    below = all(a < b for a in values[0] for b in values[1])
    apart = "every seed of one lies above every seed of the other"
    said = apart if above or below else "the seeds overlap"
    sentence = (rf"tiny-nt on few, {rank}: ([^;.]+) ([.\d]+), ([^;.]+) ([.\d]+) "
                r"\(2 and 2 runs; ([^)]+)\)")
    found = re.findall(sentence, (written / "report.html").read_text(encoding="utf-8"))
    means = [f"{sum(pair) / 2:.3f}" for pair in values]
    assert any((a, b, c) == (*means, said) for _, a, _, b, c in found), (means, said, found)


def test_groups_keep_apart_what_is_not_a_seed(tmp_path):
    for name, more in {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"seed": 1, "lr": 0.003},
                       "d": {"seed": 1, "source": "seed", "data": "x/few"}}.items():
        make_run(tmp_path / name, **more)
    found = [(group.data, group.label, len(group.runs), group.pretrained)
             for group in grouped(tmp_path)]
    assert sorted(found) == [
        ("data/few", "full, lr 0.001", 2, True),
        ("data/few", "full, lr 0.003", 1, True),
        ("x/few", "full, random base", 1, False),
    ]


@pytest.mark.parametrize("one, other, labels", [
    ({"weight_decay": 0.0}, {"weight_decay": 0.1}, ["full", "full, weight decay 0.1"]),
    ({"precision": "fp32"}, {"precision": "bf16"},
     ["full, precision bf16", "full, precision fp32"]),
    ({"augment": False}, {"augment": True}, ["full", "full, augment"]),
    ({}, {"augment": False, "max_steps": None}, ["full"]),  # an older run, which had no such flag
    ({"workers": 0, "out": "x"},
     {"workers": 2, "out": "y", "max_bad_steps": 3, "activation_checkpointing": "full"}, ["full"]),
    ({"base": {"source": "folder", "folder": "a/pre", "digest": "0123456789"}},
     {"base": {"source": "folder", "folder": "b/pre", "digest": "abcdefghij"}},
     ["full, base 01234567", "full, base abcdefgh"]),
    ({"base": {"source": "folder", "folder": "a/one", "digest": "0123456789"}},
     {"base": {"source": "folder", "folder": "a/two", "digest": "abcdefghij"}},
     ["full, weights one", "full, weights two"]),
])
def test_what_sets_groups_apart_stands_in_their_labels(tmp_path, one, other, labels):
    for seed, more in enumerate((one, other), start=1):
        make_run(tmp_path / str(seed), seed=seed, **more)
    assert sorted(group.label for group in grouped(tmp_path)) == labels


def test_another_fraction_frozen_and_another_dataset_of_the_same_folder(tmp_path):
    made = (("a", 0.5, "1" * 16), ("b", 0.75, "1" * 16), ("c", 0.75, "2" * 16))
    for name, fraction, digest in made:
        settings = {"strategy": "freeze75", "heads": "train", "freeze_fraction": fraction}
        run = make_run(tmp_path / name, "freeze75", settings=settings)
        (run / "environment.json").write_text(json.dumps({"dataset": digest}))
    labels = {group.label for group in grouped(tmp_path)}
    assert len(labels) == 3 and {label.split(" ")[0] for label in labels} == {"50%", "75%"}
    assert sum("dataset 11111111" in label for label in labels) == 2
    # an older run, which does not say
    (tmp_path / "c" / "environment.json").write_text("{}")
    labels = [group.label for group in grouped(tmp_path)]
    assert labels == ["50% frozen", "75% frozen"]


def test_ranks_of_runs_that_differ_in_them():
    ranks = [
        ("phylum", "genus"),
        ("superkingdom", "phylum", "genus"),
        ("order", "genus", "species"),
        (),
    ]
    runs = [SimpleNamespace(metrics={"ranks": dict.fromkeys(each)} if each else None)
            for each in ranks]
    assert ranks_of(runs) == ("superkingdom", "phylum", "order", "genus", "species")
    assert ranks_of(runs[3:]) == RANKS


def test_the_published_protocol_beside_ours(tmp_path):
    ours = {"targets": ["key", "value"], "feedforward_targets": ["dense"]}
    published = {"targets": ["query", "value"], "feedforward_targets": ["output"]}
    for strategy, r in (("lora", 4), ("ia3", None)):
        more = [{}, {}] if r else [ours, published]
        both = zip(("corrected", "published"), ("train", "frozen"), more)
        for protocol, heads, extra in both:
            settings = {"strategy": strategy, "protocol": protocol, "heads": heads, **extra}
            if r:
                settings["r"] = r
            make_run(tmp_path / f"{strategy}{protocol}", strategy, r, heads, settings=settings)
    labels = [group.label for group in grouped(tmp_path)]
    assert labels == [
        "LoRA r=4",
        "LoRA r=4, heads frozen",
        "(IA)³, corrected",
        "(IA)³, published, heads frozen",
    ]


def test_heads_are_compared_at_one_rate_whatever_else_was_run(tmp_path):
    for name, heads, lr in (("a", "train", 1e-3), ("b", "train", 1e-2), ("c", "frozen", 1e-2)):
        make_run(tmp_path / name, "lora", 4, heads, lr=lr)
    rows = {(group.row, group.heads) for group in grouped(tmp_path)}
    assert rows == {
        ("LoRA r=4, lr 0.001", "train"),
        ("LoRA r=4, lr 0.01", "train"),
        ("LoRA r=4, lr 0.01", "frozen"),
    }


def test_runs_on_other_ranks_are_in_the_tables(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run")
    text = (run / "metrics.json").read_text()
    for mine, other in (("superkingdom", "order"), ("phylum", "family"), ("genus", "species")):
        text = text.replace(f'"{mine}"', f'"{other}"')
        (run / f"confusion_{mine}.csv").rename(run / f"confusion_{other}.csv")
    (run / "metrics.json").write_text(text)
    monkeypatch.chdir(run)
    report.main([".", "--out", str(tmp_path / "report")])
    (row,) = csv.DictReader((tmp_path / "report" / "table.csv").read_text().splitlines())
    species = metrics_of(run)["species"]["balanced_accuracy"]
    assert row["run"] == "run" and float(row["species"]) == species and "genus" not in row
    (summary,) = csv.DictReader((tmp_path / "report" / "summary.csv").read_text().splitlines())
    assert float(summary["species mean"]) == species
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "run was tested at order, family, species" in page


def test_a_model_has_one_marker_in_all_axes(tmp_path):
    pytest.importorskip("matplotlib")
    from taxa.study import figures
    for model, data in (("org/b", "x"), ("org/a", "y"), ("org/b", "y")):
        make_run(tmp_path / f"{model[-1]}{data}", model=model, data=data)
    groups = grouped(tmp_path)
    made = figures.superkingdom(groups)
    drawn = []
    for axes in made.axes:
        markers = {line.get_marker() for line in axes.lines}
        drawn.append(markers & set(figures.OTHER_MARKERS))
    handles = made.legends[0].legend_handles
    by_label = {handle.get_label(): handle.get_marker() for handle in handles}
    assert drawn == [{by_label["org/b"]}, {by_label["org/a"], by_label["org/b"]}]


def test_every_mark_is_inside_its_axes(tmp_path):
    """Two models far apart in one picture: axes that share a scale must hold both."""
    pytest.importorskip("matplotlib")
    from taxa.study import figures
    weak = [(s, r, heads, skill / 4) for s, r, heads, skill in GRID]
    make_grid(tmp_path, models=("tiny-dnabert",), grid=weak)
    make_grid(tmp_path, data=("data/few", "data/many"))
    groups = grouped(tmp_path)
    for made in (figures.heads(groups, RANKS), figures.superkingdom(groups),
                 figures.pretraining_gain(groups), figures.genus_by_r(groups),
                 figures.epoch_time(groups)):
        for axes in made.axes:
            marks = [line for line in axes.lines if line.get_marker() not in ("None", "")]
            assert marks
            x_low, x_high = sorted(axes.get_xlim())
            y_low, y_high = sorted(axes.get_ylim())
            for line in marks:
                assert all(x_low <= value <= x_high for value in line.get_xdata())
                assert all(y_low <= value <= y_high for value in line.get_ydata())


def test_published_numbers():
    groups = published_groups()
    assert sum(len(group.published) for group in groups) == 28  # of 33: five are of 3% of the data
    nt50m = {group.label: group.values("genus") for group in groups if group.model == "nt50m"}
    assert nt50m["full"] == [0.7164]
    assert nt50m["LoRA r=4, heads frozen"] == [0.0329, 0.0386]
    assert nt50m["LoRA r=20, heads frozen"] == [0.0881]
    rows = published_rows()
    assert [row.row for row in rows] == list(range(1, 34))
    assert {row.strategy for row in rows} == set(STRATEGIES)
    assert rows[4][1:] == ("nt50m", "full", None, 0.03, 2e-05, 5, 0.7622, 0.147, 0.0066, 1.0, 21.49)
    assert published_seconds("nt50m") == {
        "full": (7527.8,),
        "random": (7528.8,),
        "freeze75": (5084.4,),
        "ia3": (6800.0,),
        "lora r=1": (6991.4,),
        "lora r=4": (7980.8, 9140.0),
        "lora r=20": (9211.6,),
    }
    assert published_seconds("tiny-nt") == {}


def test_a_strategy_looks_in_pictures_as_its_row_says(tmp_path):
    pytest.importorskip("matplotlib")
    from taxa.study import figures
    rows = [(strategy, 4 if strategy == "lora" else None, "train", 0.5) for strategy in STRATEGIES]
    make_grid(tmp_path, seeds=(1,), grid=rows)
    (axes, *_) = figures.superkingdom(grouped(tmp_path)).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    # whole models, then adapters
    assert labels == ["full", "random", "75% frozen", "LoRA r=4", "(IA)³"]
    marks = {round(line.get_ydata()[0]): line.get_color() for line in axes.lines
             if line.get_marker() == "o"}
    colours = {row.label: row.colour for row in STRATEGIES.values()}
    assert [marks[i] for i in range(5)] == [colours[label.split(" r=")[0]] for label in labels]


def test_the_legend_of_curves_fits_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from taxa.study import figures
    for fraction in (0.03, 0.1, 0.3):  # a long label each
        make_run(tmp_path / str(fraction), data_fraction=fraction, weight_decay=fraction,
                 lr=fraction)
    made = figures.curves(grouped(tmp_path))
    made.draw_without_rendering()
    box = made.legends[0].get_window_extent()
    assert 0 <= box.x0 and box.x1 <= made.bbox.x1


def test_arms_against_what_trains_classes_and_labels(tmp_path):
    pytest.importorskip("matplotlib")
    from taxa.study import arm_figures
    make_grid(tmp_path)
    for seed in (1, 2):
        make_run(tmp_path / f"few-labels-{seed}", seed=seed, skill=0.3, data_fraction=0.1,
                 training_sequences=32)
    groups = grouped(tmp_path)
    arms = [arm_of(group, RANKS) for group in groups]
    for group, arm in zip(groups, arms):
        values = {rank: [run.balanced_accuracy(rank) for run in group.runs] for rank in RANKS}
        assert arm.reached == {rank: (sum(v) / 2, min(v), max(v)) for rank, v in values.items()}
        assert arm.classes == {"superkingdom": 4, "phylum": 12, "genus": 36}
    whole = [arm for arm in arms if arm.sequences == 320]
    few = [arm for arm in arms if arm.sequences == 32]
    assert [(arm.kind, arm.row) for arm in few] == [
        (("full", None, "train"), "full, data fraction 0.1")]
    assert len(whole) == len(GRID)

    def marks(ax):
        return {(x, y) for line in ax.lines if line.get_marker() == "o"
                for x, y in zip(line.get_xdata(), line.get_ydata())}

    for ax, rank in zip(arm_figures.against_share(whole, RANKS).axes, RANKS):
        assert marks(ax) == {(arm.share, arm.reached[rank][0]) for arm in whole}
    for ax, rank in zip(arm_figures.against_labels(arms, RANKS).axes, RANKS):
        assert marks(ax) == {(arm.sequences, arm.reached[rank][0]) for arm in arms}
    full = next(arm for arm in whole if arm.strategy == "full")
    # r=1 was run with trained heads alone
    both = [arm for arm in whole if arm.strategy == "ia3" or arm.r in (4, 20)]
    expected = set()
    for rank, n in full.classes.items():
        of_full = full.reached[rank][0] - 1 / n
        expected |= {(n, (arm.reached[rank][0] - 1 / n) / of_full) for arm in both}
    assert marks(arm_figures.against_classes(whole, RANKS).axes[0]) == expected
    one_class = [arm._replace(classes=arm.classes | {"phylum": 1},
                              reached=arm.reached | {"phylum": (1.0, 1.0, 1.0)}) for arm in whole]
    above_chance = arm_figures.ranks_above_chance
    assert above_chance(whole, RANKS) == list(RANKS)
    # With one class nothing is above chance.
    assert above_chance(one_class, RANKS) == ["superkingdom", "genus"]
    assert above_chance(both, RANKS) == []  # no full fine-tuning
    report.main([str(tmp_path), "--out", str(tmp_path / "report")])
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {f"figure_{name}_tiny-nt_few.png" for name in ("share", "classes", "labels")} < names


def test_one_unfinished_run_gives_a_report_that_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    make_run(tmp_path / "run", steps=10, finished=False)
    report.main([str(tmp_path / "run"), "--out", str(tmp_path / "report")])
    assert [path.name for path in (tmp_path / "report").glob("*.png")] == ["figure_curves.png"]
    text = (tmp_path / "report" / "report.html").read_text()
    assert "run is not finished" in text and text.count("Not drawn: ") == 6


def test_what_stands_in_out_is_kept_unless_it_is_a_report(runs, written, tmp_path):
    make_run(tmp_path / "run")
    before = (written / "report.html").read_bytes()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds notes.txt"):
        report.main([str(tmp_path / "run"), "--out", str(tmp_path / "report")])
    shutil.copytree(written, tmp_path / "again")
    report.main([str(tmp_path / "run"), "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again" / "figure_heads.png").exists()
    assert (tmp_path / "again" / "report.html").read_bytes() != before
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"


def damaged(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize("spoil, message", [
    (lambda run: shutil.rmtree(run), "is not a folder"),
    (lambda run: (run / "args.json").unlink(), "no run in"),
    (lambda run: damaged(run, "args.json", "{"), r"args.json: not readable as JSON"),
    (lambda run: damaged(run, "args.json", "{}"), r"args.json is not of a run"),
    (lambda run: damaged(run, "metrics.json", "nonsense"), r"metrics.json: not readable as JSON"),
    (lambda run: damaged(run, "log.jsonl", '{"epoch": 1, "step": 1}\n?\n'),
     r"log.jsonl, line 2: not JSON"),
    (lambda run: damaged(run, "confusion_phylum.csv", "truth,1,2\n1,3,4\n"),
     r"confusion_phylum.csv is not a square table"),
    (lambda run: damaged(run, "confusion_phylum.csv", "truth,1\n1,3\n\n"),
     r"confusion_phylum.csv is not a square table"),
    (lambda run: damaged(run, "confusion_phylum.csv", ""),
     r"confusion_phylum.csv is not a table of counts"),
    (lambda run: damaged(run, "metrics.json", '{"a": 1}'),
     r"metrics.json is not of train.py or evaluate.py"),
    (lambda run: damaged(run, "environment.json", "[]"), r"environment.json is not of a run"),
    (lambda run: damaged(run, "per_class.csv", "a,b\n1,2\n"),
     r"per_class.csv is not the table of classes"),
    (lambda run: (run / "log.jsonl").write_bytes(b"\xff\xfe\n"), r"log.jsonl, line 1: not JSON"),
])
def test_wrong_input_is_one_line_and_nothing_is_written(tmp_path, spoil, message):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run")
    spoil(run)
    with pytest.raises(InputError, match=message):
        report.main([str(run), "--out", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("flags, message", [
    (["--watch", "--out", "x"], "give one of them"),
    (["--probe", "x"], "--out DIR"),
    (["--out", "x", "--probe", "args.json"], "not a document of probe_batch.py"),
    (["--out", "x", "--probe", "none"], "no such file"),
])
def test_wrong_flags(tmp_path, monkeypatch, flags, message):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(make_run(tmp_path / "run"))
    with pytest.raises(InputError, match=message):
        report.main([".", *flags])
    assert not Path("x").exists()


def test_a_probe_of_given_sizes_has_no_ceiling(tmp_path):
    pytest.importorskip("matplotlib")
    entry = {"strategy": "lora", "r": 4, "settings": {"heads": "train"}, "ceiling": 8,
             "smallest_that_fails": None}
    document = {"model": "tiny-nt", "device": "CPU", "memory_limit_bytes": 2**28, "runs": [entry]}
    (tmp_path / "probe.json").write_text(json.dumps(document))
    run = make_run(tmp_path / "run")
    message = "nothing above 8 was tried for LoRA r=4, so the largest batch is not known"
    with pytest.raises(InputError, match=message):
        report.main([str(run), "--out", str(tmp_path / "report"),
                     "--probe", str(tmp_path / "probe.json")])
    assert not (tmp_path / "report").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install '.\[report\]'"):
        report.main([str(tmp_path / "run"), "--out", str(tmp_path / "report")])


def test_status(runs, tmp_path, capsys):
    report.main([str(runs)])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert len(lines) == 2 * len(GRID) + 3
    assert "10/40" in lines["unfinished"] and lines["unfinished"].endswith("running")
    finished = lines["few-tiny-nt-full-train-seed1"]
    log = (runs / "few-tiny-nt-full-train-seed1" / "log.jsonl").read_text()
    best = min(json.loads(line).get("validation_loss", 99) for line in log.splitlines())
    assert "40/40" in finished and f"{best:.4f}" in finished and finished.endswith("finished")
    half = make_run(tmp_path / "half", steps=10, finished=False)
    with open(half / "log.jsonl", "a") as file:
        file.write('{"epoch": 1, "st')  # a line that is being written
    report.main([str(half)])
    assert "10/40" in capsys.readouterr().out


def test_watch_goes_on_until_interrupted(tmp_path):
    make_run(tmp_path / "run", steps=10, finished=False)
    words = [sys.executable, str(ROOT / "report.py"), "run", "--watch", "--every", "0.1"]
    # Ctrl-C is heard also where pytest itself runs in the background.
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(words, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, preexec_fn=hear) as process:
        seen = [process.stdout.readline() for _ in range(4)]  # two tables of two lines
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert sum(line.endswith("state\n") for line in seen) == 2
    assert sum("10/40" in line for line in seen) == 2
    assert process.returncode == 130 and said == "report.py: interrupted\n"


CHROMIUMS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, CHROMIUMS), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium, "
                                             "to see the report rendered")
def test_chromium_renders_every_picture(written, tmp_path):
    text = (written / "report.html").read_text(encoding="utf-8")
    check = """<script>addEventListener("load", () => {
      const images = [...document.images];
      const small = i => i.naturalWidth < 300 || i.clientWidth < 300;
      const broken = images.filter(i => !i.complete || small(i));
      const found = `${images.length} images, ${broken.length} broken`;
      document.body.innerHTML = `<p id="found">${found}</p>` })</script>"""
    page = text.replace("</body>", check + "</body>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, (tmp_path / "page.html").as_uri()],
                          capture_output=True, text=True, timeout=90,
                          env=os.environ | {"HOME": str(tmp_path)})
    pictures = len(list(written.glob("figure_*.png")))
    assert f"{pictures} images, 0 broken" in done.stdout, done.stderr[-2000:]
