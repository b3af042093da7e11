"""The pictures of report.py; each function draws on a Figure of its own and returns it.

In every picture a colour is a strategy (Okabe and Ito's palette, which any colour vision can
distinguish), and a marker is a model. Hollow and dashed is an adapter whose heads were frozen.
Small marks are runs (seeds), large ones their mean.
"""

import math
import statistics

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from taxa.evaluation.metrics import perplexity
from taxa.strategies import STRATEGIES
from taxa.study.groups import ADAPTERS, strategy_place, strategy_row

COLOURS = {name: row.colour for name, row in STRATEGIES.items()}
# Of the same palette; no strategy has them.
PRETRAINING_COLOURS = ("#000000", "#E69F00", "#56B4E9")
MARKERS = {
    "tiny-nt": "o",
    "tiny-dnabert": "s",
    "nt50m": "^",
    "nt100m": "v",
    "nt250m": "D",
    "dnabert2": "P",
    "dnaberts": "X",
}
OTHER_MARKERS = "<>phd*"
FONT = 10
WIDTH = 8  # inches
STYLES = {1: ":", 4: "-", 20: "-."}  # of LoRA's curves, by r


def figure(height, rows=1, columns=1, width=WIDTH, **options):
    """(Figure, [[Axes]])."""
    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=FONT)
    return made, axes


def marker(model, models):
    """The marker of a model: its own, or one of the others by its place among `models`."""
    others = sorted(set(models) - MARKERS.keys())
    return MARKERS.get(model) or OTHER_MARKERS[others.index(model) % len(OTHER_MARKERS)]


def unique(items):
    return list(dict.fromkeys(items))


def panels(groups):
    """[(title, groups)]: one panel for each data set, the published numbers last."""
    sources = unique(_source(g) for g in groups)
    parts = [[g for g in groups if _source(g) == source] for source in sources]
    return [(_title(part[0]), part) for part in parts]


def _source(group):
    return group.data, bool(group.published)


def _title(group):
    return short(f"our runs: {group.data}" if group.runs else group.data)


def short(text, letters=44):
    """The end of a text that is too long for a title."""
    return text if len(text) <= letters else "…" + text[1 - letters:]


def mark(axes, values, y, group, shape, vertical=False, large=8):
    """Draw runs as small marks and their mean as a large one.

    They stand at height y, or, when vertical, at the place y of the x axis. large: the size.
    """
    color = COLOURS.get(group.strategy, "#000000")
    face = "white" if group.heads == "frozen" else color
    marks = [(large, [statistics.mean(values)], 1)]  # (size, points, alpha)
    if len(values) > 1:
        marks.insert(0, (large / 2, values, 0.55))
    for size, points, alpha in marks:
        places = [y] * len(points)
        axes.plot(
            *((places, points) if vertical else (points, places)),
            linestyle="none",
            marker=shape,
            markersize=size,
            color=color,
            markerfacecolor=face,
            markeredgewidth=size / 6,
            alpha=alpha,
            clip_on=False,
            zorder=3 if size == large else 4,
        )


def legend_mark(label, shape="o", color="#444444", size=8, **more):
    """A handle of a legend: one mark without a line."""
    return Line2D(
        [], [],
        linestyle="none", marker=shape, color=color, markersize=size, label=label, **more,
    )


def legend(made, models, hollow, several, strategies=()):
    """A legend below the picture.

    It shows strategies by colour, models by marker, and what hollow and small marks are.
    """
    handles = [legend_mark(label, color=COLOURS[name]) for name, label in strategies]
    handles += [legend_mark(model, marker(model, models)) for model in models]
    if hollow:
        label = "adapter with frozen heads"
        handles.append(legend_mark(label, markerfacecolor="white", markeredgewidth=1.4))
    if several:
        handles.append(legend_mark("one seed (large: mean)", size=4, alpha=0.55))
    if len(handles) > 1:
        made.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(len(handles), 4),
            frameon=False,
            fontsize=FONT,
            columnspacing=1.2,
            handletextpad=0.3,
        )


def several_seeds(groups):
    return any(len(group.runs) > 1 for group in groups)


def dot_rows(axes, groups, rows, models, values_of):
    """One line of the axes for each row, in it the groups of that row, model under model.

    models: of all axes, for their markers.
    """
    here = [model for model in models if any(group.model == model for group in groups)]
    step = 0.72 / max(len(here), 1)
    large = 8 if len(here) < 3 else 6
    for group in groups:
        values = values_of(group)
        if values:
            offset = (here.index(group.model) - (len(here) - 1) / 2) * step
            y = rows.index(group.row) + offset
            mark(axes, values, y, group, marker(group.model, models), large=large)
    axes.set_yticks(range(len(rows)), rows, fontsize=FONT)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    for line in range(1, len(rows)):
        axes.axhline(line - 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    axes.set_axisbelow(True)


def by_strategy(groups, values_of, label, right):
    """Figure 1b and similar pictures.

    There is a row for each strategy, a panel for each data set, and one for the published numbers.
    """
    groups = [group for group in groups if values_of(group)]
    place = {g.row: (strategy_place(g.strategy), g.r or 0) for g in groups}
    rows = sorted(place, key=lambda row: (place[row], row))
    parts = panels(groups)
    columns = len(parts) if len(parts) < 4 else 2
    lines = math.ceil(len(parts) / columns)
    most = max(len(unique(g.model for g in members)) for _, members in parts)
    models = unique(g.model for g in groups)
    height = 1.45 + lines * (0.6 + len(rows) * max(0.27, 0.1 * most))
    made, axes = figure(height, lines, columns, sharex=True, sharey=True)
    for ax, (title, members) in zip(axes.flat, parts):
        dot_rows(ax, members, rows, models, values_of)
        ax.set_title(title, fontsize=FONT + 1, loc="left")
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(label, fontsize=FONT)
    axes[0, 0].set_xlim(0, right)
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(5 if columns < 3 else 4))
    for ax in list(axes.flat)[len(parts):]:
        ax.set_visible(False)
    legend(made, models, any(g.heads == "frozen" for g in groups), several_seeds(groups))
    return made


def superkingdom(groups):
    """Figure 1b."""
    label = "superkingdom\nbalanced accuracy"
    return by_strategy(groups, lambda g: g.values("superkingdom"), label, 1)


def pretraining_gain(groups):
    """Figure 1a: phylum, pretrained weights against random initialisation.

    Both are the same backbone, fine-tuned whole. There is a row for each model.
    """
    groups_used = [
        g for g in groups
        if (g.strategy == "random" or (g.strategy == "full" and g.pretrained))
        and g.values("phylum")
    ]
    parts = panels(groups_used)
    rows = [unique(g.model for g in members) for _, members in parts]
    all_models = unique(model for models in rows for model in models)
    height = 1.3 + sum(0.5 + 0.36 * len(models) for models in rows)
    ratios = [len(models) + 0.4 for models in rows]
    made, axes = figure(height, len(parts), 1, sharex=True, height_ratios=ratios)
    for ax, (title, members), models in zip(axes.flat, parts, rows):
        for y, model in enumerate(models):
            found = [g for g in members if g.model == model]
            for group in found:
                mark(ax, group.values("phylum"), y, group, marker(model, all_models))
            if sorted(g.strategy for g in found) == ["full", "random"]:
                means = {g.strategy: statistics.mean(g.values("phylum")) for g in found}
                gain = means["full"] - means["random"]
                ax.plot(list(means.values()), [y, y], color="#bbbbbb", linewidth=3, zorder=1)
                ax.annotate(
                    f"{gain:+.3f}",
                    (1.01, y),
                    xycoords=("axes fraction", "data"),
                    fontsize=FONT,
                    va="center",
                )
        ax.set_yticks(range(len(models)), models, fontsize=FONT)
        ax.set_ylim(len(models) - 0.4, -0.6)
        ax.set_xlim(0, 1)
        ax.grid(axis="x", color="#eeeeee")
        ax.set_axisbelow(True)
        ax.set_title(title, fontsize=FONT + 1, loc="left")
    axes[-1, 0].set_xlabel(
        "phylum balanced accuracy (at the right: pretrained minus random)", fontsize=FONT
    )
    strategies = (("full", "pretrained, fine-tuned whole"), ("random", "random initialisation"))
    legend(made, [], False, several_seeds(groups), strategies)
    return made


def genus_by_r(groups):
    """Figure 1c: genus against LoRA's r, heads trained and frozen.

    Full fine-tuning is at the right.
    """
    data_with_lora = {g.data for g in groups if g.strategy == "lora"}
    parts = panels([
        g for g in groups
        if g.strategy in ("lora", "full")
        and g.values("genus")
        and (g.published or g.data in data_with_lora)
    ])
    ranks = sorted({g.r for _, members in parts for g in members if g.r})
    used = [g for _, members in parts for g in members]
    all_models = unique(g.model for g in used)
    columns = min(len(parts), 2)
    lines = math.ceil(len(parts) / columns)
    made, axes = figure(1.2 + 2.7 * lines, lines, columns, sharey=True)
    for ax, (title, members) in zip(axes.flat, parts):
        models = unique(g.model for g in members)
        large = 8 if len(models) < 3 else 6
        for i, model in enumerate(models):
            shift = (i - (len(models) - 1) / 2) * 0.5 / len(models)
            shape = marker(model, all_models)
            for heads in ("train", "frozen"):
                lora = [
                    g for g in members
                    if g.model == model and g.strategy == "lora" and g.heads == heads
                ]
                line = sorted(
                    (ranks.index(g.r) + shift, statistics.mean(g.values("genus"))) for g in lora
                )
                ax.plot(
                    *zip(*line) if line else ((), ()),
                    color=COLOURS["lora"],
                    linewidth=1.3,
                    zorder=2,
                    linestyle="--" if heads == "frozen" else "-",
                )
                for group in lora:
                    place = ranks.index(group.r) + shift
                    mark(ax, group.values("genus"), place, group, shape, True, large)
            for group in members:
                if group.model == model and group.strategy == "full":
                    place = len(ranks) + shift
                    mark(ax, group.values("genus"), place, group, shape, True, large)
        ax.axvline(len(ranks) - 0.5, color="#dddddd", linewidth=0.8)
        ax.set_xticks(range(len(ranks) + 1), [f"r={r}" for r in ranks] + ["full"], fontsize=FONT)
        ax.set_xlim(-0.5, len(ranks) + 0.5)
        ax.set_xlabel("rank r of LoRA's update", fontsize=FONT)
        ax.set_ylabel("genus balanced accuracy", fontsize=FONT)
        ax.tick_params(labelleft=True)
        ax.grid(axis="y", color="#eeeeee")
        ax.set_axisbelow(True)
        ax.set_title(title, fontsize=FONT + 1, loc="left")
    axes[0, 0].set_ylim(bottom=0)
    for ax in list(axes.flat)[len(parts):]:
        ax.set_visible(False)
    strategies = (("lora", "LoRA"), ("full", "full fine-tuning"))
    hollow = any(g.heads == "frozen" for g in used)
    legend(made, all_models, hollow, several_seeds(used), strategies)
    return made


def relative_seconds(groups):
    """Values for epoch_time(): {place of a group in groups: [relative seconds per epoch]}.

    They are relative to the mean of full fine-tuning of the same model on the same data, or of
    random initialisation where there is no full.
    """
    found = {}
    for i, group in enumerate(groups):
        for strategy in ("full", "random"):
            base = []
            for other in groups:
                if (other.data, other.model, other.strategy) == (group.data, group.model, strategy):
                    base += other.epoch_seconds()
            if base:
                found[i] = [seconds / statistics.mean(base) for seconds in group.epoch_seconds()]
                break
    return found


def epoch_time(groups):
    """Figure 1d, time: seconds per epoch over those of full fine-tuning of the same model."""
    ratios = relative_seconds(groups)
    of = {id(group): ratios.get(i, []) for i, group in enumerate(groups)}
    top = max(max(values, default=0) for values in of.values())
    label = "time per epoch\n(full fine-tuning = 1)"
    made = by_strategy(groups, lambda g: of[id(g)], label, 1.08 * top)
    for ax in made.axes:
        ax.axvline(1, color=COLOURS["full"], linewidth=1, linestyle=":", zorder=1)
    return made


def ceilings(groups, limits):
    """Figure 1d, memory: the largest batch that fits, by strategy.

    limits: {id(group): sequences} of probe_batch.py.
    """
    right = 1.08 * max(limits.values())
    label = "largest batch that fits (sequences)"
    return by_strategy(groups, lambda g: [limits[id(g)]], label, right)


def heads(groups, ranks):
    """Adapters with trained and frozen heads, side by side.

    There is a column for each rank, and a row of axes for each data set and model. An adapter whose
    two arms have learning rates of their own is one line, unless there are more than these two.
    """
    arms = [(g.data, g.model, g.strategy, g.r, g.heads) for g in groups]
    groups = [
        g._replace(row=strategy_row(g.strategy, g.r))
        if g.strategy in ADAPTERS and arms.count(arm) == 1
        else g
        for g, arm in zip(groups, arms)
    ]
    frozen = {(g.data, g.model, g.row) for g in groups if g.heads == "frozen"}
    trained = {(g.data, g.model, g.row) for g in groups if g.heads == "train"}
    paired = [g for g in groups if (g.data, g.model, g.row) in frozen & trained]
    places = unique((g.data, g.model) for g in paired)
    models = unique(model for _, model in places)
    rows_of = {
        place: unique(g.row for g in paired if (g.data, g.model) == place) for place in places
    }
    made, axes = figure(
        1.1 + sum(0.75 + 0.32 * len(rows) for rows in rows_of.values()),
        len(places),
        len(ranks),
        sharey="row",
        sharex="col",
        height_ratios=[len(rows_of[place]) + 1 for place in places],
    )
    for line, place in zip(axes, places):
        rows = rows_of[place]
        members = [g for g in groups if (g.data, g.model) == place]
        for ax, rank in zip(line, ranks):
            tested = [g for g in members if g.values(rank)]
            for group in tested:
                values = group.values(rank)
                if group.row in rows:
                    mark(ax, values, rows.index(group.row), group, marker(group.model, models))
                elif group.strategy == "full":
                    mean = statistics.mean(values)
                    ax.axvline(
                        mean, color=COLOURS["full"], linewidth=1.3, linestyle=":", zorder=1
                    )
            for y, row in enumerate(rows):
                means = [statistics.mean(g.values(rank)) for g in tested if g.row == row]
                ax.plot(means, [y] * len(means), color="#bbbbbb", linewidth=3, zorder=1)
            ax.set_yticks(range(len(rows)), rows, fontsize=FONT)
            ax.set_ylim(len(rows) - 0.5, -0.5)
            # The largest value of all groups, since all rows of axes share x.
            largest = max(value for group in groups for value in group.values(rank))
            ax.set_xlim(0, 1.08 * largest)
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.grid(axis="x", color="#eeeeee")
            ax.set_axisbelow(True)
        line[0].set_title(f"{place[1]}, {place[0]}", fontsize=FONT + 1, loc="left")
    for ax, rank in zip(axes[-1], ranks):
        ax.set_xlabel(f"{rank}\nbalanced accuracy", fontsize=FONT)
    handles = [
        legend_mark("heads trained"),
        legend_mark("heads frozen", markerfacecolor="white", markeredgewidth=1.4),
        Line2D([], [], linestyle=":", color=COLOURS["full"], label="full fine-tuning, mean"),
    ]
    made.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=FONT
    )
    return made


def curves(groups):
    """Training and validation loss of every run against training sequences passed.

    There is a row for each data set and model.
    """
    places = unique((g.data, g.model) for g in groups)
    made, axes = figure(0.9 + 2.5 * len(places), len(places), 2, sharey="row")
    handles = {}
    for line, place in zip(axes, places):
        training, validation = line
        for group in (g for g in groups if (g.data, g.model) == place):
            color = COLOURS.get(group.strategy, "#000000")
            look = {
                "color": color,
                "linestyle": STYLES.get(group.r, "-"),
                "linewidth": 1.3,
                "alpha": 0.9 if group.heads == "train" else 0.4,
            }
            face = "white" if group.heads == "frozen" else color
            for run in group.runs:
                steps = [entry for entry in run.steps if entry["loss"] is not None]
                passed = [entry["step"] * run.batch / 1e3 for entry in steps]
                training.plot(passed, [entry["loss"] for entry in steps], **look)
                checks = run.validations
                passed = [entry["step"] * run.batch / 1e3 for entry in checks]
                losses = [entry["validation_loss"] for entry in checks]
                validation.plot(
                    passed, losses, marker="o", markersize=5, markerfacecolor=face, **look
                )
            handle = Line2D([], [], **look | {"linewidth": 1.8}, label=group.label)
            handles.setdefault(group.label, handle)
        for ax, what in zip(line, ("training", "validation")):
            ax.set_xlim(left=0)
            ax.set_xlabel("training sequences passed (thousands)", fontsize=FONT)
            ax.set_title(f"{what}: {place[1]}, {place[0]}", fontsize=FONT, loc="left")
            ax.grid(color="#eeeeee")
            ax.set_axisbelow(True)
        training.set_ylabel("loss (nats)", fontsize=FONT)
        validation.tick_params(labelleft=True)
    # The page is some 75 letters wide, besides the lines of the legend.
    columns = max(1, min(3, len(handles), 75 // max(map(len, handles))))
    made.legend(
        handles=list(handles.values()),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=FONT,
        handlelength=3,
    )
    return made


def pretraining(runs):
    """Perplexity of masked tokens against steps of pretrain.py.

    Lines are training, dots are validation, and dotted lines are the perplexity of the unigram.
    """
    made, axes = figure(3.2)
    ax = axes[0, 0]
    for color, run in zip(PRETRAINING_COLOURS * len(runs), runs):
        steps = run.steps
        checks = [line for line in run.validations if "perplexity" in line]
        ax.plot(
            [line["step"] for line in steps],
            [perplexity(line["loss"]) for line in steps],
            linewidth=1,
            color=color,
        )
        ax.plot(
            [line["step"] for line in checks],
            [line["perplexity"] for line in checks],
            "o",
            markersize=5,
            color=color,
            label=run.folder.name,
        )
        ax.axhline(checks[-1]["unigram_perplexity"], color=color, linestyle=":")
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.set_xlabel("optimizer step", fontsize=FONT)
    ax.set_ylabel("perplexity of masked tokens", fontsize=FONT)
    ax.plot([], [], color="#444444", linewidth=1, label="in training, masks of its own")
    ax.plot([], [], color="#444444", linestyle=":", label="the unigram's")
    ax.legend(frameon=False, fontsize=FONT)
    return made


def confusions(cells, rank):
    """Confusion matrices, rows made shares of the truth.

    cells: [(title, names of the classes, matrix as lists of counts)].
    """
    most = max(len(names) for _, names, _ in cells)
    numbers = most <= 12  # that many fit as numbers in the cells
    columns = min(4, len(cells))
    lines = math.ceil(len(cells) / columns)
    side = max(1.7 if len(cells) > 1 else 2.4, (0.37 if numbers else 0.21) * most)
    height = lines * (side + 0.7) + 1.5 + 0.4 * (most > 4)
    width = columns * (side + 0.15) + 2.6
    made, axes = figure(height, lines, columns, width=width)
    font = FONT - 1 if most <= 30 else FONT - 2
    for i, (ax, (title, names, matrix)) in enumerate(zip(axes.flat, cells)):
        shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
        image = ax.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        if numbers:
            for y, row in enumerate(shares):
                for x, share in enumerate(row):
                    color = "black" if share > 0.5 else "white"
                    ax.text(
                        x, y, f"{share:.0%}",
                        ha="center", va="center", fontsize=FONT - 2, color=color,
                    )
        labels = [name.replace("Candidatus ", "Ca. ") for name in names]
        labels = [name if len(name) <= 22 else name[:21] + "…" for name in labels]
        none = [""] * len(names)
        lowest = i + columns >= len(cells)
        leftmost = i % columns == 0
        places = range(len(names))
        ax.set_xticks(places, labels if lowest else none, rotation=90, fontsize=font)
        ax.set_yticks(places, labels if leftmost else none, fontsize=font)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_title(title.replace(", ", "\n"), fontsize=FONT, loc="left")
    made.supxlabel(f"predicted {rank}", fontsize=FONT)
    made.supylabel(f"true {rank}", fontsize=FONT)
    for ax in list(axes.flat)[len(cells):]:
        ax.set_visible(False)
    bar = made.colorbar(image, ax=axes, shrink=0.6, aspect=25, format=PercentFormatter(1))
    bar.set_label(f"share of the true {rank}", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    bar.ax.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    return made
