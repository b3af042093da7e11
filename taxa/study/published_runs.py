"""The 33 runs of the supplement of Berman et al. 2025.

They are read from taxa/assets/published_results.csv.
"""

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
        return [_row_of(cells) for cells in csv.DictReader(file)]


def _row_of(cells):
    """The PublishedRow of a line of the table, {column: text}."""
    return PublishedRow(
        row=int(cells["row"]),
        model=cells["model"],
        strategy=cells["strategy"],
        r=int(cells["r"]) if cells["r"] else None,
        data_fraction=float(cells["data_fraction"]),
        learning_rate=float(cells["learning_rate"]),
        epochs=int(cells["epochs"]),
        superkingdom=float(cells["superkingdom"]),
        phylum=float(cells["phylum"]),
        genus=float(cells["genus"]),
        trainable_fraction=float(cells["trainable_fraction"]),
        epoch_seconds=float(cells["epoch_seconds"]),
    )


def published_seconds(model):
    """{label: (mean seconds per epoch, ...)} of a model's published runs on all data.

    It is {} where there are none. nt50m with r = 4 has two values, since it was run at two learning
    rates.
    """
    seconds = {}
    for row in published_rows():
        if row.model == model and row.data_fraction == 1:
            seconds[row.label] = (*seconds.get(row.label, ()), row.epoch_seconds)
    return seconds
