"""Pictures of what several arms of an experiment reached, with its spread.

It stands against what trains, the number of classes, and the number of labels. Marks are as in
figures.py: a colour is a strategy, hollow marks are frozen heads. Whiskers are the lowest and the
highest seed (report.py), or intervals (experiments/interval_figures.py).
"""

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from taxa.study.figures import COLOURS, FONT, STYLES, figure, unique
from taxa.study.groups import strategy_row


def _mark(ax, arm, x, values):
    """Draw the mean and the whisker of an arm at x. values: (mean, low, high)."""
    mean, low, high = values
    color = COLOURS.get(arm.strategy, "#000000")
    face = "white" if arm.heads == "frozen" else color
    ax.plot([x, x], [low, high], color=color, linewidth=1.6, alpha=0.6, zorder=2, clip_on=False)
    ax.plot(
        [x],
        [mean],
        marker="o",
        markersize=7,
        color=color,
        markerfacecolor=face,
        markeredgewidth=1.3,
        zorder=3,
        clip_on=False,
    )


def _join(ax, arm, xs, ys):
    """Draw the line between the means of arms of the same kind."""
    style = "--" if arm.heads == "frozen" else STYLES.get(arm.r, "-")
    color = COLOURS.get(arm.strategy, "#000000")
    ax.plot(xs, ys, color=color, linewidth=1.3, zorder=1, linestyle=style)


def _text(ax, text, place, offset, ha="left", va="center"):
    ax.annotate(
        text,
        place,
        offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=FONT - 2,
        color="#444444",
    )


def _panels(ranks, label):
    """(Figure, [Axes]): one for each rank, x on a logarithmic scale."""
    made, axes = figure(3.6, 1, len(ranks), sharey=True)
    for ax, rank in zip(axes[0], ranks):
        ax.set_title(rank, fontsize=FONT + 1, loc="left")
        ax.set_xlabel(label, fontsize=FONT)
        ax.set_xscale("log")
        ax.grid(color="#eeeeee")
        ax.set_axisbelow(True)
        ax.xaxis.set_major_locator(LogLocator(numticks=5))
        ax.xaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("balanced accuracy", fontsize=FONT)
    return made, list(axes[0])


def _legend(made, arms):
    """Below the picture: strategies by colour, hollow for frozen heads."""
    def handle(label, color="#444444", **more):
        return Line2D(
            [], [],
            linestyle="none", marker="o", markersize=7, color=color, label=label, **more,
        )

    handles = []
    for name in unique(arm.strategy for arm in arms):
        label = "frozen in part" if name == "freeze75" else strategy_row(name)
        handles.append(handle(label, COLOURS.get(name, "#000000")))
    if any(arm.heads == "frozen" for arm in arms):
        handles.append(handle("heads frozen", markerfacecolor="white", markeredgewidth=1.3))
    made.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 6),
        frameon=False,
        fontsize=FONT,
        handletextpad=0.2,
        columnspacing=1.2,
    )


def against_share(arms, ranks):
    """Balanced accuracy against the share of the parameters that train.

    Lines join LoRA's r; a percentage is the share that is frozen.
    """
    made, axes = _panels(ranks, "parameters that train")
    for ax, rank in zip(axes, ranks):
        here = [arm for arm in arms if rank in arm.reached and arm.share]
        for heads in ("train", "frozen"):
            line = [a for a in here if (a.strategy, a.heads) == ("lora", heads)]
            line.sort(key=lambda a: a.share)
            if line:
                shares = [a.share for a in line]
                _join(ax, line[0]._replace(r=None), shares, [a.reached[rank][0] for a in line])
        for arm in here:
            mean, low, _ = arm.reached[rank]
            _mark(ax, arm, arm.share, arm.reached[rank])
            if arm.strategy == "freeze75":
                share_frozen = arm.row.partition(" ")[0]
                _text(ax, share_frozen, (arm.share, low), (0, -4), ha="center", va="top")
            # Trained ones lie close together: the line shows their order, and they have no text.
            elif arm.r and arm.heads == "frozen":
                _text(ax, f"r={arm.r}", (arm.share, mean), (6, -8))
        ax.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x:.2g}" if x < 0.001 else f"{100 * x:g}%")
        )
        ax.set_ylim(0, 1)
    _legend(made, arms)
    return made


def beyond_chance(value, full, classes):
    """(value - chance) / (full - chance): 0 is guessing, 1 is full fine-tuning.

    value and full are balanced accuracies; chance is 1 / classes.
    """
    return (value - 1 / classes) / (full - 1 / classes)


def ranks_above_chance(arms, ranks):
    """The ranks that against_classes() can draw.

    There every arm was tested, and the one arm of full fine-tuning is above chance.
    """
    full = [arm for arm in arms if arm.strategy == "full"]
    if len(full) != 1:
        return []
    full = full[0]
    tested = [
        rank for rank in ranks
        if all(rank in arm.reached and rank in arm.classes for arm in arms)
    ]
    return [rank for rank in tested if full.reached[rank][0] > 1 / full.classes[rank]]


def against_classes(arms, ranks):
    """What adapters reach of full fine-tuning, against the number of classes of a head.

    Chance is taken off. The arms are those of adapters with trained and with frozen heads.
    """
    full = next(arm for arm in arms if arm.strategy == "full")
    with_frozen_heads = {(arm.strategy, arm.r) for arm in arms if arm.heads == "frozen"}
    adapters = [arm for arm in arms if (arm.strategy, arm.r) in with_frozen_heads]
    made, ((ax,),) = figure(3.9, width=6)
    classes = [full.classes[rank] for rank in ranks]
    for arm in adapters:
        reached = []  # for each rank: (mean, low, high)
        for rank, count in zip(ranks, classes):
            best = full.reached[rank][0]
            reached.append([beyond_chance(value, best, count) for value in arm.reached[rank]])
        means = [mean for mean, *_ in reached]
        _join(ax, arm, classes, means)
        for x, values in zip(classes, reached):
            _mark(ax, arm, x, values)
        if arm.r and arm.heads == "frozen":
            _text(ax, f"r={arm.r}", (classes[-1], means[-1]), (8, 0), ha="left")
        elif arm.r:
            _text(ax, f"r={arm.r}", (classes[0], means[0]), (-8, 0), ha="right")
    ax.axhline(1, color=COLOURS["full"], linestyle=":", linewidth=1.3)
    _text(ax, "full fine-tuning", (classes[0], 1), (0, 4), ha="left", va="bottom")
    ax.set_xscale("log")
    labels = [f"{count}\n{rank}" for count, rank in zip(classes, ranks)]
    ax.set_xticks(classes, labels, fontsize=FONT)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(x=0.12)
    ax.set_xlabel("classes of the head", fontsize=FONT)
    ax.set_ylabel("of full fine-tuning's accuracy\nbeyond chance", fontsize=FONT)
    ax.set_ylim(0, 1.08)
    ax.grid(axis="y", color="#eeeeee")
    _legend(made, adapters)
    return made


def against_labels(arms, ranks):
    """Balanced accuracy against the number of labelled training sequences.

    There is a line for each strategy, r and heads.
    """
    made, axes = _panels(ranks, "labelled training sequences")
    for ax, rank in zip(axes, ranks):
        here = [arm for arm in arms if rank in arm.reached and arm.sequences]
        here.sort(key=lambda arm: arm.sequences)
        for kind in unique(arm.kind for arm in here):
            line = [arm for arm in here if arm.kind == kind]
            _join(ax, line[0], [a.sequences for a in line], [a.reached[rank][0] for a in line])
            for arm in line:
                _mark(ax, arm, arm.sequences, arm.reached[rank])
        places = sorted({arm.sequences for arm in here})
        ax.set_xticks(places, [f"{x:,}" for x in places], fontsize=FONT)
        ax.margins(x=0.1)
        ax.set_ylim(0, 1)
    _legend(made, arms)
    return made


def on_unseen(arms, ranks):
    """The ranks above genus, for genera that no model was trained on.

    A small dot is a genus, a large one their mean with its interval, a bar the known genera that
    are like them. arms: of the file of experiments/unseen.py.
    """
    made, axes = figure(1.2 + 0.42 * len(arms), 1, len(ranks), sharey=True)
    for ax, rank in zip(axes[0], ranks):
        for y, arm in enumerate(arms):
            found = arm["ranks"][rank]
            genera = found["genera"]
            color = COLOURS.get(arm["strategy"], "#000000")
            face = "white" if arm["heads"] == "frozen" else color
            ax.plot(
                genera, [y + 0.22] * len(genera), "o",
                markersize=3, color=color, alpha=0.5, markeredgewidth=0, clip_on=False,
            )
            ax.plot(
                [found["low"], found["high"]], [y, y],
                color=color, linewidth=1.6, alpha=0.6, zorder=2,
            )
            ax.plot(
                [found["mean"]], [y], "o",
                markersize=8, color=color, markerfacecolor=face, markeredgewidth=1.3, zorder=3,
            )
            ax.plot(
                [found["known"]], [y], "|",
                markersize=15, color="#000000", markeredgewidth=1.6, zorder=4,
            )
        ax.set_title(rank, fontsize=FONT + 1, loc="left")
        ax.set_xlabel("share of the fragments that is right", fontsize=FONT)
        ax.set_xlim(0, 1)
        ax.grid(axis="x", color="#eeeeee")
        ax.set_axisbelow(True)
    axes[0, 0].set_yticks(range(len(arms)), [arm["arm"] for arm in arms], fontsize=FONT)
    axes[0, 0].set_ylim(len(arms) - 0.5, -0.5)

    def handle(shape, size, label):
        return Line2D(
            [], [],
            linestyle="none", marker=shape, markersize=size, color="#444444", label=label,
        )

    handles = [
        handle("o", 8, "unseen genera, mean"),
        handle("o", 3, "one unseen genus"),
        handle("|", 13, "known relatives (test split)"),
    ]
    made.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=FONT
    )
    return made
