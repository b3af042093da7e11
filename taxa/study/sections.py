"""The sections of report.py that have a picture. Needs matplotlib.

SECTIONS says for each what it is, what it needs and what draws it.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from taxa.study import arm_figures, figures
from taxa.study.groups import ADAPTERS, arm_of
from taxa.study.tables import best_groups, group_rank, ranks_of, summed_confusion


class Material(NamedTuple):
    """What a report is made of."""

    groups: list  # of fine-tuning runs
    published: list  # groups of the supplement
    probes: list  # groups of probe_batch.py
    limits: dict  # {id(group of probes): the largest batch, in sequences}
    pretraining: list  # runs of pretrain.py

    @property
    def done(self):
        """The groups in which a run was tested."""
        return [g for g in self.groups if g.values(group_rank(g))]


class Section(NamedTuple):
    """A picture with its title and caption.

    found: what the picture is drawn of; it is falsy where there is nothing to draw.
    """

    name: str  # of figure_NAME.png
    title: str
    caption: str
    find: Callable  # material -> found
    draw: Callable  # (material, found) -> Figure
    without: str | None = None  # why nothing is drawn; with None the section is then left out
    sentences: Callable | None = None  # (material, found) -> the sentences behind the caption


class Drawn(NamedTuple):
    """A section of the page."""

    name: str
    title: str
    caption: str
    figure: Any  # None where nothing is drawn; the caption then says why


def drawn_sections(material):
    """[Drawn], in the order of the page."""
    parts = []
    for section in (*SECTIONS, *arm_sections(material), *confusion_sections(material)):
        found = section.find(material)
        if found:
            caption = section.caption
            if section.sentences:
                caption += " " + " ".join(section.sentences(material, found))
            picture = section.draw(material, found)
            parts.append(Drawn(section.name, section.title, caption, picture))
        elif section.without:
            caption = f"Not drawn: {section.without}."
            parts.append(Drawn(section.name, section.title, caption, None))
    return parts


def phylum_gains(m):
    """The groups of random initialisation and of full fine-tuning of pretrained weights.

    Those of m.done that were tested at rank phylum.
    """
    found = [g for g in m.done if g.values("phylum")]
    return [g for g in found if g.strategy == "random" or (g.strategy == "full" and g.pretrained)]


def timed(m):
    """The groups whose time per epoch is known, where two strategies can be compared; else []."""
    groups = [g for g in m.groups if g.epoch_seconds()]
    several = len({g.strategy for g in groups}) > 1
    return groups if several and figures.relative_seconds(groups) else []


def both_heads(m):
    """The groups of m.done whose adapter was run with trained and with frozen heads."""
    def adapter(g):
        return g.data, g.model, g.strategy, g.r

    trained = {adapter(g) for g in m.done if g.heads == "train"}
    frozen = {adapter(g) for g in m.done if g.heads == "frozen"}
    return [g for g in m.done if adapter(g) in trained & frozen]


def tested_ranks(groups):
    """The ranks at which the runs of some groups were tested."""
    return ranks_of([run for g in groups for run in g.runs])


def seeds_sentence(groups, of_rank, one, other):
    """Sentences that compare the seeds of two strategies.

    There is one for each data set and model that has both.

    of_rank: the rank to compare at, None for the finest; one: group -> whether it is of the first
    strategy; other: (group, group of the first strategy) -> whether it is of the second.
    """
    sentences = []
    for a in groups:
        if not one(a):
            continue
        rank = of_rank or group_rank(a)
        for b in groups:
            if not other(b, a) or (b.data, b.model) != (a.data, a.model):
                continue
            x, y = a.values(rank), b.values(rank)
            if not x or not y:
                continue
            if len(x) == len(y) == 1:
                apart = "one run each"
            elif min(x) > max(y) or min(y) > max(x):
                apart = "every seed of one lies above every seed of the other"
            else:
                apart = "the seeds overlap"
            sentences.append(
                f"{a.model} on {a.data}, {rank}: "
                f"{a.label} {statistics.mean(x):.3f}, {b.label} {statistics.mean(y):.3f} "
                f"({len(x)} and {len(y)} runs; {apart})."
            )
    return sentences


SECTIONS = (
    Section(
        name="1a",
        title="Figure 1a: phylum, pretrained against random initialisation",
        caption="The same backbone, fine-tuned whole, from pretrained and from random weights.",
        find=phylum_gains,
        draw=lambda m, _: figures.pretraining_gain(m.done + m.published),
        without="no finished run at rank phylum is full fine-tuning of pretrained weights, "
                "or random initialisation",
        sentences=lambda m, gains: seeds_sentence(
            gains, "phylum", lambda g: g.strategy == "full", lambda g, _: g.strategy == "random"
        ),
    ),
    Section(
        name="1b",
        title="Figure 1b: superkingdom by strategy",
        caption="Every strategy; hollow marks are adapters whose heads were frozen, "
                "as in all published LoRA and (IA)³ runs.",
        find=lambda m: any(g.values("superkingdom") for g in m.done),
        draw=lambda m, _: figures.superkingdom(m.done + m.published),
        without="no finished run has the rank superkingdom",
        sentences=lambda m, _: seeds_sentence(
            m.done,
            "superkingdom",
            lambda g: g.strategy == "full",
            lambda g, _: g.strategy == "freeze75",
        ),
    ),
    Section(
        name="1c",
        title="Figure 1c: genus against LoRA's r",
        caption="Solid: heads trained; dashed and hollow: heads frozen. "
                "At the right, full fine-tuning of the same model.",
        find=lambda m: any(g.strategy == "lora" and g.values("genus") for g in m.done),
        draw=lambda m, _: figures.genus_by_r(m.done + m.published),
        without="no finished run of LoRA has the rank genus",
    ),
    Section(
        name="1d_time",
        title="Figure 1d: time per epoch by strategy",
        caption="Seconds per epoch, from the speed that the run logged, over the mean of full "
                "fine-tuning (where there is none: random initialisation, which trains the same) "
                "of the same model on the same data. Runs that shared their machine with others "
                "are slower than they would be alone. Seconds are in the table.",
        find=timed,
        draw=lambda m, groups: figures.epoch_time(groups + m.published),
        without="no two strategies, one of them full or random, logged their speed "
                "and the number of their training sequences",
    ),
    Section(
        name="1d_batch",
        title="Figure 1d: largest batch by strategy",
        caption="The largest batch that fits the memory limit, by probe_batch.py. The paper "
                "reports only that the largest power of two was the same for all strategies.",
        find=lambda m: m.probes,
        draw=lambda m, groups: figures.ceilings(groups, m.limits),
        without="no --probe FILE of probe_batch.py was given",
    ),
    Section(
        name="heads",
        title="Adapters with trained and with frozen heads",
        caption="Filled: the heads train with the adapter, the default here. "
                "Hollow: they stay random, as in the published code.",
        find=both_heads,
        draw=lambda m, groups: figures.heads(m.done, tested_ranks(groups)),
        without="no adapter was run with its heads trained and with them frozen "
                "and all else the same",
        sentences=lambda m, _: seeds_sentence(
            m.done,
            None,
            lambda g: g.strategy in ADAPTERS and g.heads == "train",
            lambda g, a: g.heads == "frozen" and g.row == a.row,
        ),
    ),
    Section(
        name="curves",
        title="Training curves",
        caption="One line a run; pale: heads frozen; "
                "of LoRA's lines dotted is r=1, solid r=4, dash-dotted r=20.",
        find=lambda m: any(run.steps for g in m.groups for run in g.runs),
        draw=lambda m, _: figures.curves(m.groups),
        without="no run has logged a step",
    ),
    Section(
        name="pretraining",
        title="Masked language modelling",
        caption="Perplexity of masked tokens: "
                "dots on the validation split, thin lines in training.",
        find=lambda m: [
            run for run in m.pretraining
            if sum("perplexity" in line for line in run.validations) > 1
        ],
        draw=lambda m, runs: figures.pretraining(runs),
    ),
)


def arm_sections(m):
    """The Sections that compare the arms of one model on one data set.

    The arms stand against what trains, the number of classes, and the number of labels.
    """
    for data, model in figures.unique((g.data, g.model) for g in m.done):
        groups = [g for g in m.done if (g.data, g.model) == (data, model)]
        ranks = tested_ranks(groups)
        arms = [arm_of(g, ranks) for g in groups]
        arms = [a for a in arms if a.reached.keys() == {*ranks} and a.share and a.sequences]
        sizes = {arm.sequences for arm in arms}
        whole = [arm for arm in arms if arm.sequences == max(sizes)]  # of all labels
        name = f"{slug(model)}_{slug(data)}"
        place = f"{model}, {data}"
        if len({arm.share for arm in whole}) > 3:
            yield arm_section(
                "share_" + name,
                f"Accuracy against the parameters that train: {place}",
                "Balanced accuracy on the test split; lines join LoRA's r, "
                "a percentage is the share that is frozen.",
                arm_figures.against_share,
                whole,
                ranks,
            )
        trained = {(arm.strategy, arm.r) for arm in whole if arm.heads == "train"}
        frozen = {(arm.strategy, arm.r) for arm in whole if arm.heads == "frozen"}
        above_chance = arm_figures.ranks_above_chance(whole, ranks)
        if trained & frozen and len(above_chance) > 1:
            yield arm_section(
                "classes_" + name,
                f"Heads trained and frozen, by the number of classes: {place}",
                "What an adapter reaches of full fine-tuning's mean balanced accuracy, "
                "chance (1 / classes) taken off both.",
                arm_figures.against_classes,
                whole,
                above_chance,
            )
        kinds = [(arm.kind, arm.sequences) for arm in arms]
        if len(sizes) > 1 and len(set(kinds)) == len(kinds):  # one arm at a point
            yield arm_section(
                "labels_" + name,
                f"Accuracy against the number of labels: {place}",
                "Balanced accuracy on the test split; dashed and hollow: heads frozen.",
                arm_figures.against_labels,
                arms,
                ranks,
            )


def arm_section(name, title, caption, draw, arms, ranks):
    """The Section of a picture of arm_figures."""
    return Section(
        name,
        title,
        caption + " Whiskers: the lowest and the highest seed.",
        find=lambda m: arms,
        draw=lambda m, arms: draw(arms, ranks),
    )


def confusion_sections(m):
    """The Sections of confusion matrices.

    They are the superkingdoms of each model and data set, by strategy, and the phyla of the best
    strategy of each.
    """
    for data, model in figures.unique((g.data, g.model) for g in m.done):
        yield confusion_section(
            "superkingdom",
            data,
            model,
            [g for g in m.done if (g.data, g.model) == (data, model)],
            f"Superkingdoms confused: {model}, {data}",
            "Rows are the truth; counts of all seeds are added, then each row is made shares.",
        )
    for best in best_groups(m.done):
        yield confusion_section(
            "phylum",
            best.data,
            best.model,
            [best],
            f"Phyla confused: {best.model}, {best.data}",
            f"The strategy with the best {group_rank(best)} of this model on this data: "
            f"{best.label}.",
        )


def confusion_section(rank, data, model, groups, title, caption):
    """The Section of one picture: a matrix for each group that has one."""
    found = [(g.label, summed_confusion(g, rank)) for g in groups]
    cells = [(label, *confusion[1:]) for label, confusion in found if confusion]
    plural = {"superkingdom": "superkingdoms", "phylum": "phyla"}[rank]
    return Section(
        f"{plural}_{slug(model)}_{slug(data)}",
        title,
        caption,
        find=lambda m: cells,
        draw=lambda m, cells: figures.confusions(cells, rank),
    )


def slug(text):
    """Letters, digits and hyphens: a part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in text)
