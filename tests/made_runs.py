"""Run folders as train.py leaves them, with made-up predictions, for what reads them: reports,
intervals, chosen rates.
"""

import json
from pathlib import Path

import numpy as np

from taxa.evaluation.evaluation import Outcome, summarize, write_tables

CLASSES = {
    "superkingdom": [
        {"taxid": 2, "name": "Bacteria"},
        {"taxid": 2157, "name": "Archaea"},
        {"taxid": 2759, "name": "Eukaryota"},
        {"taxid": 10239, "name": "Viruses"},
    ],
    "phylum": [{"taxid": 100 + i, "name": f"Phylum <{i}>"} for i in range(12)],
    "genus": [{"taxid": 1000 + i, "name": f"Genus{i}"} for i in range(36)],
}
SPEEDS = {"freeze75": 80, "ia3": 52, "lora": 48}  # sequences/s; 40 for the others


def make_run(folder, strategy="full", r=None, heads="train", seed=1, model="tiny-nt",
             data="data/few", *, source="folder", skill=0.6, test=400, steps=40, finished=True,
             training_sequences=320, **more):
    """A run folder as train.py leaves it.

    Predictions are right with the probability `skill`, else a class at random. test: the number of
    test sequences. more: goes into args.json. Returns the folder.
    """
    folder.mkdir(parents=True)
    settings = {"strategy": strategy, "protocol": "corrected"}
    if r:
        settings |= {"r": r, "lora_alpha": 32.0}
    settings["heads"] = heads
    if strategy == "random":
        base = {"source": "none", "config": None}
    else:
        base = {"source": source, "folder": "/w/tiny", "digest": "ab"}
    args = {
        "model": model, "strategy": strategy, "r": r, "data": data,
        "batch_size": 16, "accumulate": 1, "lr": 1e-3, "seed": seed,
        "epochs": 2, "max_steps": None, "settings": settings, "base": base,
    } | more
    environment = {
        "processes": 1, "threads": 1,
        "parameters": 1000, "trainable": 17 * (r or 58),
        "training_sequences": training_sequences,
    }
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "environment.json").write_text(json.dumps(environment))

    rng = np.random.default_rng(seed + sum(map(ord, f"{strategy}{r}{heads}{model}{data}")))
    log = log_lines(steps, skill, SPEEDS.get(strategy, 40), rng)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if finished:
        outcome = outcome_of(test, skill, rng)
        sizes = {rank: len(rows) for rank, rows in CLASSES.items()}
        write_tables(folder, summarize("test", outcome, sizes), outcome, CLASSES)
    return folder


def log_lines(steps, skill, speed, rng):
    """The lines of log.jsonl: one every 5 steps, and a validation every 20."""
    log = []
    for step in range(5, steps + 1, 5):
        loss = 7 - 4 * skill * (1 - np.exp(-step / 15)) + rng.normal(0, 0.08)
        log.append({
            "epoch": 1 + (step > 20), "step": step, "steps": 40,
            "loss": loss, "lr": 1e-3, "grad_norm": 1.0,
            "sequences_per_s": speed + rng.normal(0, 1),
        })
        if step % 20 == 0:
            log.append({
                "epoch": step // 20, "step": step, "validation_loss": loss + 0.2,
                "balanced_accuracy": {"genus": 0.25 + step / 1000},
            })
    return log


def outcome_of(test, skill, rng):
    """The Outcome of so many test sequences: the more classes a rank has, the fewer are right."""
    genus = rng.integers(0, 36, test)
    truth = np.stack([genus // 9, genus // 3, genus], 1)  # (test, 3)
    wrong = np.stack([rng.integers(0, n, test) for n in (4, 12, 36)], 1)
    chances = np.array([skill + 0.25, skill + 0.1, skill]) + rng.normal(0, 0.03)
    right = rng.random((test, 3)) < np.clip(chances, 0, 1)
    return Outcome(1.5, truth, np.where(right, truth, wrong))


GRID = [  # strategy, r, heads, skill
    ("full", None, "train", 0.6),
    ("random", None, "train", 0.5),
    ("freeze75", None, "train", 0.55),
    ("lora", 1, "train", 0.3),
    ("lora", 4, "train", 0.35),
    ("lora", 20, "train", 0.45),
    ("ia3", None, "train", 0.25),
    ("lora", 4, "frozen", 0.15),
    ("lora", 20, "frozen", 0.2),
    ("ia3", None, "frozen", 0.1),
]


def make_grid(folder, models=("tiny-nt",), data=("data/few",), seeds=(1, 2), grid=GRID):
    """A run for each model, data set, row of the grid and seed; tiny-nt has the highest skill."""
    for model in models:
        for where in data:
            for strategy, r, heads, skill in grid:
                for seed in seeds:
                    parts = (Path(where).name, model, strategy, r and f"r{r}", heads, f"seed{seed}")
                    name = "-".join(map(str, filter(None, parts)))
                    make_run(folder / name, strategy, r, heads, seed, model, where,
                             skill=skill - 0.05 * (model != "tiny-nt"))
    return folder
