"""The published results of the study: the 33 runs of the supplement of Berman et al. 2025, read from taxa/assets/published_results.csv."""

import csv

from taxa import ASSETS


def published_seconds(model):
    """{label: (mean seconds per epoch, ...)} of a model's published runs on all data, labels such as "full" and "lora r=4"; {} if none.

    One H100 for nt, four for DNABERT. nt50m with r = 4 was run at two learning rates.
    """
    seconds = {}
    with open(ASSETS / "published_results.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["model"] == model and float(row["data_fraction"]) == 1:
                label = f"{row['strategy']} r={row['r']}" if row["r"] else row["strategy"]
                seconds[label] = (*seconds.get(label, ()), float(row["epoch_seconds"]))
    return seconds
