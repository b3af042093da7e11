"""A picture of the memory of training steps at its peak: stacked bars of parts, one a strategy."""

from taxa.runtime.files import replacing

# label -> parts, colour (Okabe and Ito's palette, told apart with any colour vision).
CHART = {
    "parameters": (("parameters",), "#000000"),
    "gradients": (("gradients",), "#D55E00"),
    "optimizer state": (("optimizer state",), "#999999"),
    "saved: attention": (("attention",), "#0072B2"),
    "saved: feed-forward": (("feed-forward",), "#56B4E9"),
    "saved: LayerNorm": (("LayerNorm",), "#009E73"),
    "saved: adapters": (("adapters",), "#F0E442"),
    "saved: embedding, heads, loss": (("embedding", "heads", "loss"), "#CC79A7"),
    "saved: checkpointed": (("checkpointed",), "#8C510A"),
    "working tensors": (("working",), "#E69F00"),
}


def draw_memory(bars, title, path):
    """Write the picture to `path` (PNG, PDF or SVG). Needs matplotlib.

    bars: {label: {part: bytes}}, the first on top.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(bars)[::-1]
    figure = Figure(figsize=(9, 1.9 + 0.55 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    largest = max(sum(parts.values()) for parts in bars.values())
    unit, size = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    left = [0.0] * len(labels)
    for name, (parts, colour) in CHART.items():
        widths = [sum(bars[label][part] for part in parts) / size for label in labels]
        axes.barh(
            labels,
            widths,
            left=left,
            color=colour,
            label=name,
            height=0.65,
            edgecolor="white",
            linewidth=0.6,
        )
        left = [a + b for a, b in zip(left, widths)]
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.3g} {unit}", va="center")
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel(f"memory at the peak of a training step ({unit})")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format=str(path).rpartition(".")[2])
