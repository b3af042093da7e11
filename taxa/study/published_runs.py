"""The 33 runs of the supplement of Berman et al. 2025, read from taxa/assets/published_results.csv."""

import csv
from typing import NamedTuple

from taxa import ASSETS


class PublishedRow(NamedTuple):
    """One run of the supplement. Its LoRA and (IA)3 heads were frozen (docs/PROTOCOL.md)."""

    row: int  # of the supplement's table
    model: str
    strategy: str
    r: int | None
    data_fraction: float  # of 4.57 million training sequences
    learning_rate: float
    epochs: int
    superkingdom: float  # balanced accuracy on the test split, as are the next two
    phylum: float
    genus: float
    trainable_fraction: float
    epoch_seconds: float  # mean; one H100 for nt, four for DNABERT

    @property
    def label(self):
        """ "full", "lora r=4"."""
        return f"{self.strategy} r={self.r}" if self.r else self.strategy


def published_rows():
    """The PublishedRows, in the order of the supplement."""
    with open(ASSETS / "published_results.csv", newline="", encoding="utf-8") as file:
        return [PublishedRow(int(row["row"]), row["model"], row["strategy"], int(row["r"]) if row["r"] else None,
                             float(row["data_fraction"]), float(row["learning_rate"]), int(row["epochs"]),
                             *(float(row[name]) for name in PublishedRow._fields[7:])) for row in csv.DictReader(file)]


def published_seconds(model):
    """{label: (mean seconds per epoch, ...)} of a model's published runs on all data; {} where there are none.

    Two values: nt50m with r = 4 was run at two learning rates.
    """
    seconds = {}
    for row in published_rows():
        if row.model == model and row.data_fraction == 1:
            seconds[row.label] = (*seconds.get(row.label, ()), row.epoch_seconds)
    return seconds
