"""The sections of report.py that have a picture: SECTIONS says of each what it is, what it needs and what draws it. Needs matplotlib."""

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
    """A picture with its title and caption. found: what it is drawn of, falsy where there is nothing to draw."""

    name: str  # of figure_NAME.png
    title: str
    caption: str
    find: Callable  # material -> found
    draw: Callable  # (material, found) -> Figure
    without: str | None = None  # why nothing is drawn; None: then the section is left out
    sentences: Callable | None = None  # (material, found) -> what follows the caption


class Drawn(NamedTuple):
    """A section of the page. figure: None where nothing is drawn, and the caption says why."""

    name: str
    title: str
    caption: str
    figure: Any


def drawn_sections(material):
    """[Drawn], in the order of the page."""
    parts = []
    for section in (*SECTIONS, *arm_sections(material), *confusion_sections(material)):
        found = section.find(material)
        if found:
            words = [section.caption] + ([" ".join(section.sentences(material, found))] if section.sentences else [])
            parts.append(Drawn(section.name, section.title, " ".join(words), section.draw(material, found)))
        elif section.without:
            parts.append(Drawn(section.name, section.title, f"Not drawn: {section.without}.", None))
    return parts


def phylum_gains(m):
    return [g for g in m.done if g.values("phylum") and (g.strategy == "random" or (g.strategy == "full" and g.pretrained))]


def timed(m):
    groups = [g for g in m.groups if g.epoch_seconds()]
    return groups if len({g.strategy for g in groups}) > 1 and figures.relative_seconds(groups) else []


def both_heads(m):
    """The groups of m.done whose adapter was run with trained and with frozen heads."""
    cells = [{(g.data, g.model, g.strategy, g.r) for g in m.done if g.heads == heads} for heads in ("train", "frozen")]
    return [g for g in m.done if (g.data, g.model, g.strategy, g.r) in set.intersection(*cells)]


def seeds_sentence(groups, of_rank, one, other):
    """What the seeds say of one strategy against another, for each data set and model that has both. of_rank: None for the finest."""
    sentences = []
    for a in (g for g in groups if one(g)):
        rank = of_rank or group_rank(a)
        for b in (g for g in groups if other(g, a) and (g.data, g.model) == (a.data, a.model)):
            x, y = a.values(rank), b.values(rank)
            if not x or not y:
                continue
            apart = "every seed of one lies above every seed of the other" if min(x) > max(y) or min(y) > max(x) else "the seeds overlap"
            apart = "one run each" if len(x) == len(y) == 1 else apart
            sentences.append(f"{a.model} on {a.data}, {rank}: {a.label} {statistics.mean(x):.3f}, {b.label} {statistics.mean(y):.3f} "
                             f"({len(x)} and {len(y)} runs; {apart}).")
    return sentences


SECTIONS = (
    Section("1a", "Figure 1a: phylum, pretrained against random initialisation",
            "The same backbone, fine-tuned whole, from pretrained and from random weights.",
            phylum_gains, lambda m, _: figures.pretraining_gain(m.done + m.published),
            "no finished run at rank phylum is full fine-tuning of pretrained weights, or random initialisation",
            lambda m, gains: seeds_sentence(gains, "phylum", lambda g: g.strategy == "full", lambda g, _: g.strategy == "random")),
    Section("1b", "Figure 1b: superkingdom by strategy",
            "Every strategy; hollow marks are adapters whose heads were frozen, as in all published LoRA and (IA)³ runs.",
            lambda m: any(g.values("superkingdom") for g in m.done), lambda m, _: figures.superkingdom(m.done + m.published),
            "no finished run has the rank superkingdom",
            lambda m, _: seeds_sentence(m.done, "superkingdom", lambda g: g.strategy == "full", lambda g, _: g.strategy == "freeze75")),
    Section("1c", "Figure 1c: genus against LoRA's r",
            "Solid: heads trained; dashed and hollow: heads frozen. At the right, full fine-tuning of the same model.",
            lambda m: any(g.strategy == "lora" and g.values("genus") for g in m.done),
            lambda m, _: figures.genus_by_r(m.done + m.published), "no finished run of LoRA has the rank genus"),
    Section("1d_time", "Figure 1d: time per epoch by strategy",
            "Seconds per epoch, from the speed that the run logged, over the mean of full fine-tuning (where there is none: random "
            "initialisation, which trains the same) of the same model on the same data. Runs that shared their machine with others are "
            "slower than they would be alone. Seconds are in the table.",
            timed, lambda m, groups: figures.epoch_time(groups + m.published),
            "no two strategies, one of them full or random, logged their speed and the number of their training sequences"),
    Section("1d_batch", "Figure 1d: largest batch by strategy",
            "The largest batch that fits the memory limit, by probe_batch.py. The paper reports only that the largest power of two was the "
            "same for all strategies.",
            lambda m: m.probes, lambda m, groups: figures.ceilings(groups, m.limits), "no --probe FILE of probe_batch.py was given"),
    Section("heads", "Adapters with trained and with frozen heads",
            "Filled: the heads train with the adapter, the default here. Hollow: they stay random, as in the published code.",
            both_heads, lambda m, groups: figures.heads(m.done, ranks_of([run for g in groups for run in g.runs])),
            "no adapter was run with its heads trained and with them frozen and all else the same",
            lambda m, _: seeds_sentence(m.done, None, lambda g: g.strategy in ADAPTERS and g.heads == "train",
                                        lambda g, a: g.heads == "frozen" and g.row == a.row)),
    Section("curves", "Training curves",
            "One line a run; pale: heads frozen; of LoRA's lines dotted is r=1, solid r=4, dash-dotted r=20.",
            lambda m: any(run.steps for g in m.groups for run in g.runs), lambda m, _: figures.curves(m.groups),
            "no run has logged a step"),
    Section("pretraining", "Masked language modelling",
            "Perplexity of masked tokens: dots on the validation split, thin lines in training.",
            lambda m: [run for run in m.pretraining if sum("perplexity" in line for line in run.validations) > 1],
            lambda m, runs: figures.pretraining(runs)),
)


def arm_sections(m):
    """The Sections that set the arms of one model on one data set against what trains, the classes, and the labels."""
    for data, model in figures.unique((g.data, g.model) for g in m.done):
        groups = [g for g in m.done if (g.data, g.model) == (data, model)]
        ranks = ranks_of([run for g in groups for run in g.runs])
        arms = [arm for arm in (arm_of(g, ranks) for g in groups) if arm.reached.keys() == {*ranks} and arm.share and arm.sequences]
        sizes = {arm.sequences for arm in arms}
        whole = [arm for arm in arms if arm.sequences == max(sizes)]
        name, place = f"{slug(model)}_{slug(data)}", f"{model}, {data}"
        if len({arm.share for arm in whole}) > 3:
            yield arm_section("share_" + name, f"Accuracy against the parameters that train: {place}",
                              "Balanced accuracy on the test split; lines join LoRA's r, a percentage is the share that is frozen.",
                              arm_figures.against_share, whole, ranks)
        trained, frozen = ({(arm.strategy, arm.r) for arm in whole if arm.heads == heads} for heads in ("train", "frozen"))
        drawn = arm_figures.ranks_above_chance(whole, ranks)
        if trained & frozen and len(drawn) > 1:
            yield arm_section("classes_" + name, f"Heads trained and frozen, by the number of classes: {place}",
                              "What an adapter reaches of full fine-tuning's mean balanced accuracy, chance (1 / classes) taken off both.",
                              arm_figures.against_classes, whole, drawn)
        kinds = [(arm.kind, arm.sequences) for arm in arms]
        if len(sizes) > 1 and len(set(kinds)) == len(kinds):  # one arm at a point
            yield arm_section("labels_" + name, f"Accuracy against the number of labels: {place}",
                              "Balanced accuracy on the test split; dashed and hollow: heads frozen.",
                              arm_figures.against_labels, arms, ranks)


def arm_section(name, title, caption, draw, arms, ranks):
    return Section(name, title, caption + " Whiskers: the lowest and the highest seed.", lambda m: arms, lambda m, arms: draw(arms, ranks))


def confusion_sections(m):
    """The Sections of confusion matrices: superkingdoms of each model and data set by strategy, phyla of the best strategy of each."""
    for data, model in figures.unique((g.data, g.model) for g in m.done):
        yield confusion_section("superkingdom", data, model, [g for g in m.done if (g.data, g.model) == (data, model)],
                                f"Superkingdoms confused: {model}, {data}",
                                "Rows are the truth; counts of all seeds are added, then each row is made shares.")
    for best in best_groups(m.done):
        yield confusion_section("phylum", best.data, best.model, [best], f"Phyla confused: {best.model}, {best.data}",
                                f"The strategy with the best {group_rank(best)} of this model on this data: {best.label}.")


def confusion_section(rank, data, model, groups, title, caption):
    """The Section of one picture: a matrix for each group that has one."""
    found = [(g.label, summed_confusion(g, rank)) for g in groups]
    cells = [(label, *confusion[1:]) for label, confusion in found if confusion]
    name = "_".join(({"superkingdom": "superkingdoms", "phylum": "phyla"}[rank], slug(model), slug(data)))
    return Section(name, title, caption, lambda m: cells, lambda m, cells: figures.confusions(cells, rank))


def slug(text):
    """Letters, digits and hyphens: a part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in text)
