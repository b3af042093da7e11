"""The tables of report.py, as CSV, Markdown and HTML.

They are: every run, means over seeds, and the pairs of classes most often confused.
"""

import csv
import html
import io
import statistics

from taxa import RANKS
from taxa.study.published_runs import published_rows
from taxa.study.run_folders import data_names

# The columns of the paper's supplement, in its order, and columns that distinguish our runs.
COLUMNS = (
    "run",
    "data",
    "model",
    "strategy",
    "r",
    "heads",
    "seed",
    "data_fraction",
    "learning_rate",
    "epochs",
    *RANKS,
    "trainable_fraction",
    "epoch_seconds",
)
# How a float is shown, by its column; the others, the metrics, have four digits.
FORMATS = {
    "trainable_fraction": ".5f",
    "epoch_seconds": ".1f",
    "learning_rate": "g",
    "data_fraction": "g",
    "epochs": "g",
}
PAIRS = 15  # most confused pairs of classes listed for each data set and model


def ranks_of(runs):
    """The ranks that runs were tested at, each run's in its order.

    They are the paper's ranks where no run was tested yet.
    """
    merged = []
    for each in runs:
        at = len(merged)
        for rank in reversed((each.metrics or {}).get("ranks", {})):
            if rank in merged:
                at = merged.index(rank)
            else:
                merged.insert(at, rank)
    return tuple(merged) or RANKS


def columns_of(runs):
    """COLUMNS with the runs' own ranks in place of the paper's."""
    first = COLUMNS.index(RANKS[0])
    return COLUMNS[:first] + ranks_of(runs) + COLUMNS[first + len(RANKS):]


def table_rows(runs):
    """One dict with columns_of(runs) for each fine-tuning run.

    A value is None where the run does not say it (yet).
    """
    names = data_names(runs)
    ranks = ranks_of(runs)
    rows = []
    for each in runs:
        rows.append({
            "run": each.folder.name,
            "data": names[each.args["data"]],
            "model": each.args["model"],
            "strategy": each.settings["strategy"],
            "r": each.settings.get("r"),
            "heads": each.settings["heads"],
            "seed": each.args["seed"],
            "data_fraction": _data_fraction(each),
            "learning_rate": each.args["lr"],
            "epochs": round(each.epochs, 2),
            **{rank: each.balanced_accuracy(rank) for rank in ranks},
            "trainable_fraction": each.trainable_fraction,
            "epoch_seconds": each.epoch_seconds,
        })
    return rows


def _data_fraction(run):
    """The share of the training split that a run has seen, or None."""
    sequences = run.environment.get("training_sequences")
    if not sequences:
        return None
    seen = min(1, run.last_step * run.batch / sequences)
    return round(seen * (run.args.get("data_fraction") or 1), 4)


def summary_rows(groups):
    """One dict for each group.

    It holds the number of seeds n; per rank the mean, standard deviation, lowest and highest
    balanced accuracy on the test split, and the published one of the same model, strategy, r, data
    fraction and learning rate; and the mean and standard deviation of the loss.
    """
    ranks = ranks_of([each for group in groups for each in group.runs])
    rows = []
    for group in groups:
        row = {
            "data": group.data,
            "model": group.model,
            "strategy": group.label,
            "n": len(group.values(group_rank(group))),
        }
        published = published_row(group)
        for rank in ranks:
            values = group.values(rank)
            row |= spread(rank, values)
            row[f"{rank} lowest"] = min(values, default=None)
            row[f"{rank} highest"] = max(values, default=None)
            row[f"{rank} published"] = getattr(published, rank, None)
        tested = [each.metrics for each in group.runs if each.metrics]
        row |= spread("loss", [metrics["loss"] for metrics in tested if "loss" in metrics])
        rows.append(row)
    return rows


def spread(name, values):
    """Mean and standard deviation (n - 1; None for fewer than two values), under the name."""
    return {
        f"{name} mean": statistics.mean(values) if values else None,
        f"{name} sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def published_row(group):
    """The PublishedRow that a group of runs repeats, or None.

    LoRA and (IA)3 had frozen heads there.
    """
    args = group.runs[0].args
    same = (group.model, group.strategy, group.r, args.get("data_fraction") or 1, args["lr"])
    for row in published_rows():
        if same == (row.model, row.strategy, row.r, row.data_fraction, row.learning_rate):
            return row
    return None


def group_rank(group):
    """The finest rank that the group was tested at."""
    ranks = ranks_of(group.runs)
    return next((rank for rank in reversed(ranks) if group.values(rank)), ranks[-1])


def summed_confusion(group, rank):
    """(class ids, names, matrix) of a group, or None.

    The matrix is the sum over the runs that have the same classes.
    """
    found = [(each, each.confusion(rank)) for each in group.runs]
    found = [(each, confusion) for each, confusion in found if confusion]
    if not found:
        return None
    first, (ids, _) = found[0]
    same = [matrix for _, (classes, matrix) in found if classes == ids]
    names = first.class_names(rank)
    total = [[sum(counts) for counts in zip(*rows)] for rows in zip(*same)]
    return ids, [names.get(each, each) for each in ids], total


def best_groups(groups):
    """Of each data set and model, the group with the best mean at its finest rank.

    The mean is of the balanced accuracies.
    """
    best = {}
    for group in groups:
        values = group.values(group_rank(group))
        if not values:
            continue
        score = statistics.mean(values)
        if score > best.get((group.data, group.model), (-1, None))[0]:
            best[group.data, group.model] = (score, group)
    return [group for _, group in best.values()]


def confused_pairs(group):
    """The PAIRS pairs of classes of the finest rank that are most often confused with each other.

    Both directions are added. Returns a list of dicts, the most confused pair first.
    """
    rank = group_rank(group)
    found = summed_confusion(group, rank)
    if not found:
        return []
    _, names, matrix = found
    pairs = [(matrix[i][j] + matrix[j][i], i, j) for i in range(len(names)) for j in range(i)]
    pairs = [pair for pair in pairs if pair[0]]
    pairs.sort(key=lambda pair: (-pair[0], names[pair[1]], names[pair[2]]))
    return [
        {
            "data": group.data,
            "model": group.model,
            "strategy": group.label,
            "rank": rank,
            "A": names[j],
            "B": names[i],
            "A as B": matrix[j][i],
            "B as A": matrix[i][j],
            "A tested": sum(matrix[j]),
            "B tested": sum(matrix[i]),
        }
        for _, i, j in pairs[:PAIRS]
    ]


def shown(column, value):
    """A cell for people: four digits of a metric, five of a fraction, one of seconds."""
    if value is None:
        return "–"
    return format(value, FORMATS.get(column, ".4f")) if isinstance(value, float) else str(value)


def csv_text(rows, columns):
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown(rows, columns):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [shown(column, row[column]).replace("|", "\\|") for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def html_table(rows, columns):
    def cell(column, value):
        number = isinstance(value, (int, float))
        return f'<td{" class=number" * number}>{html.escape(shown(column, value))}</td>'

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ["".join(cell(column, row[column]) for column in columns) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
