"""Run folders -> tables and pictures, beside the numbers that Berman et al. 2025 published.

  python report.py runs/paper-mini --out report                     # report/report.html, PNGs, table.md, table.csv
  python report.py runs/paper-mini --probe probe.json --out report  # with the batch ceilings of probe_batch.py --out probe.json
  python report.py runs                                             # a table of where each run stands
  python report.py runs --watch                                     # the same, again every few seconds, until Ctrl-C

Runs that are not finished are in the table and the curves, and the report says so. report.html holds its pictures and needs no network.
"""

import base64
import csv
import html
import importlib.util
import io
import json
import statistics
import sys
import time
from pathlib import Path

from taxa.errors import InputError
from taxa.results.run_folders import Group, find_runs, group_runs, data_names, published_groups, published_rows, read_run, strategy_row
from taxa.runtime.cli import Parser, positive_float, run
from taxa.runtime.files import new_folder

# The columns of the paper's supplement, in its order, among what tells our runs apart.
COLUMNS = ("run", "data", "model", "strategy", "r", "heads", "seed", "data_fraction", "learning_rate", "epochs", "superkingdom", "phylum",
           "genus", "trainable_fraction", "epoch_seconds")
RANKS = ("superkingdom", "phylum", "genus")
FILES = ("report.html", "table.md", "table.csv", "summary.csv", "confused_genera.csv")  # and figure_*.png
PAIRS = 15  # most confused pairs of genera listed for each data set and model
DPI = 150

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto } figcaption { color: #444 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums }"""


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="run folders of train.py (and pretrain.py), or folders that contain them")
    add("--out", metavar="DIR", help="write the report there; an older report in DIR is replaced (default: print where each run stands)")
    add("--probe", nargs="+", default=[], metavar="FILE", help="documents of probe_batch.py --out, for the batch ceilings (default: none)")
    add("--watch", action="store_true", help="print where each run stands again and again, until Ctrl-C")
    add("--every", type=positive_float, default=5.0, metavar="SECONDS", help="between two prints of --watch (default 5)")
    args = parser.parse_args(argv)
    if args.watch and args.out:
        parser.error("--watch prints and --out writes: give one of them")
    if args.probe and not args.out:
        parser.error("--probe is for the pictures of --out DIR")
    return args


# ---------------------------------------------------------------- where each run stands

def status(runs, now):
    """A fixed-width table: progress, last loss, best validation, speed, and how long ago the last line was written."""
    width = max(len(run.folder.name) for run in runs)
    lines = [f"{'run':<{width}}{'step':>16}{'epoch':>7}{'loss':>9}{'best validation':>17}{'genus':>7}{'seq/s':>8}{'last line':>11}  state"]
    for each in runs:
        steps, checks = each.steps, each.validations
        best = min(checks, key=lambda line: line["validation_loss"], default=None)
        genus = best and best.get("balanced_accuracy", {}).get("genus")
        log = each.folder / "log.jsonl"
        age = now - log.stat().st_mtime if log.is_file() else None
        last = steps[-1] if steps else {}
        progress = f"{each.last_step:,}/{last['steps']:,}" if steps else "-"
        state = "finished" if each.metrics else "running" if age is not None and age < 600 else "not finished"
        lines.append(f"{each.folder.name:<{width}}{progress:>16}{last.get('epoch', '-'):>7}{_number(last.get('loss'), '.4f'):>9}"
                     f"{_number(best and best['validation_loss'], '.4f'):>17}{_number(genus, '.3f'):>7}"
                     f"{_number(last.get('sequences_per_s'), '.1f'):>8}{_ago(age):>11}  {state}")
    return "\n".join(lines)


def _number(value, form):
    return "-" if value is None else format(value, form)


def _ago(seconds):
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s ago" if seconds < 100 else f"{seconds / 60:.0f} min ago" if seconds < 6000 else f"{seconds / 3600:.0f} h ago"


def watch(args):
    """Print status() every --every seconds; on a terminal over the last one. Ends with Ctrl-C."""
    while True:
        text = status([read_run(folder) for folder in find_runs(args.runs)], time.time())
        print("\x1b[H\x1b[J" * sys.stdout.isatty() + text, flush=True)
        time.sleep(args.every)


# ---------------------------------------------------------------- tables

def ranks_of(runs):
    """The ranks that runs were tested at, each run's in its order; the paper's where none was tested yet."""
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
    """One dict with columns_of(runs) for each fine-tuning run; None where the run does not say (yet)."""
    names = data_names(runs)
    ranks, rows = ranks_of(runs), []
    for each in runs:
        sequences = each.environment.get("training_sequences")
        rows.append({
            "run": each.folder.name, "data": names[each.args["data"]], "model": each.args["model"], "strategy": each.settings["strategy"],
            "r": each.settings.get("r"), "heads": each.settings["heads"], "seed": each.args["seed"],
            "data_fraction": round(min(1, each.last_step * each.batch / sequences) * (each.args.get("data_fraction") or 1), 4)
            if sequences else None,
            "learning_rate": each.args["lr"], "epochs": round(each.epochs, 2), **{rank: each.balanced_accuracy(rank) for rank in ranks},
            "trainable_fraction": each.trainable_fraction, "epoch_seconds": each.epoch_seconds})
    return rows


def shown(column, value):
    """A cell for people: four digits of a metric, five of a fraction, one of seconds."""
    if value is None:
        return "–"
    forms = {"trainable_fraction": ".5f", "epoch_seconds": ".1f", "learning_rate": "g", "data_fraction": "g", "epochs": "g"}
    return format(value, forms.get(column, ".4f")) if isinstance(value, float) else str(value)


def summary_rows(groups):
    """One dict for each group: the number of seeds n; per rank, mean, standard deviation, lowest and highest balanced accuracy on the test
    split, and the published one of the same model, strategy, r, data fraction and learning rate; mean and deviation of the loss.
    """
    ranks, rows = ranks_of([each for group in groups for each in group.runs]), []
    for group in groups:
        row = {"data": group.data, "model": group.model, "strategy": group.label, "n": len(group.values(group_rank(group)))}
        published = published_row(group)
        for rank in ranks:
            values = group.values(rank)
            row |= spread(rank, values) | {f"{rank} lowest": min(values, default=None), f"{rank} highest": max(values, default=None),
                                           f"{rank} published": float(published[rank]) if rank in published else None}
        rows.append(row | spread("loss", [each.metrics["loss"] for each in group.runs if each.metrics and "loss" in each.metrics]))
    return rows


def spread(name, values):
    """Mean and standard deviation (n - 1; None of fewer than two), under the name."""
    return {f"{name} mean": statistics.mean(values) if values else None,
            f"{name} sd": statistics.stdev(values) if len(values) > 1 else None}


def published_row(group):
    """The row of the published table that a group of runs repeats, {} where there is none. LoRA and (IA)3 had frozen heads there."""
    args = group.runs[0].args
    for row in published_rows():
        same = (row["model"], row["strategy"], row["r"]) == (group.model, group.strategy, str(group.r or ""))
        if same and float(row["learning_rate"]) == args["lr"] and float(row["data_fraction"]) == (args.get("data_fraction") or 1):
            return row
    return {}


def group_rank(group):
    """The finest rank that the group was tested at."""
    ranks = ranks_of(group.runs)
    return next((rank for rank in reversed(ranks) if group.values(rank)), ranks[-1])


def csv_text(rows, columns):
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown(rows, columns):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(column, row[column]).replace("|", "\\|") for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def html_table(rows, columns):
    def cell(column, value):
        number = isinstance(value, (int, float))
        return f'<td{" class=number" * number}>{html.escape(shown(column, value))}</td>'

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(cell(column, row[column]) for column in columns) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


# ---------------------------------------------------------------- confusion

def summed_confusion(group, rank):
    """(class ids, names, matrix) summed over the runs of a group that have the same classes, or None."""
    found = [(each, each.confusion(rank)) for each in group.runs]
    found = [(each, matrix) for each, matrix in found if matrix]
    if not found:
        return None
    ids = found[0][1][0]
    same = [matrix for _, (classes, matrix) in found if classes == ids]
    names = found[0][0].class_names(rank)
    total = [[sum(counts) for counts in zip(*rows)] for rows in zip(*same)]
    return ids, [names.get(each, each) for each in ids], total


def best_groups(groups):
    """Of each data set and model, the group with the best mean balanced accuracy at its finest rank."""
    best = {}
    for group in (g for g in groups if g.values(group_rank(g))):
        score = statistics.mean(group.values(group_rank(group)))
        if score > best.get((group.data, group.model), (-1, None))[0]:
            best[group.data, group.model] = (score, group)
    return [group for _, group in best.values()]


def confused_pairs(group):
    """The PAIRS pairs of the finest rank most often taken for each other, both ways added: dicts, the most confused first."""
    rank = group_rank(group)
    found = summed_confusion(group, rank)
    if not found:
        return []
    _, names, matrix = found
    pairs = [(matrix[i][j] + matrix[j][i], i, j) for i in range(len(names)) for j in range(i)]
    pairs = sorted((pair for pair in pairs if pair[0]), key=lambda pair: (-pair[0], names[pair[1]], names[pair[2]]))[:PAIRS]
    return [{"data": group.data, "model": group.model, "strategy": group.label, "rank": rank, "A": names[j], "B": names[i],
             "A as B": matrix[j][i], "B as A": matrix[i][j], "A tested": sum(matrix[j]), "B tested": sum(matrix[i])} for _, i, j in pairs]


# ---------------------------------------------------------------- probe_batch.py

def read_probes(paths):
    """Of probe_batch.py's documents: a list of Groups, and {id(group): the largest batch, in sequences}."""
    groups, limits = [], {}
    for path in map(Path, paths):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            title = f"{document['model']}, {document['memory_limit_bytes'] / 2**30:.3g} GiB, {document['device']}"
            for found in document["runs"]:
                group = Group(title, document["model"], found["strategy"], found["r"],
                              found["settings"]["heads"], strategy_row(found["strategy"], found["r"]), False)
                groups.append(group)
                limits[id(group)] = found["ceiling"]
                if found["smallest_that_fails"] is None:  # the sizes of --batch-sizes or --max-batch ended before the memory did
                    raise InputError(f"--probe {path}: nothing above {found['ceiling']} was tried for {group.label}, so that is no "
                                     "ceiling: run probe_batch.py without --batch-sizes and --max-batch")
        except FileNotFoundError:
            raise InputError(f"--probe {path}: no such file") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise InputError(f"--probe {path} is not a document of probe_batch.py --out") from None
    return groups, limits


# ---------------------------------------------------------------- the report

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


def sections(groups, published, probes, pretraining_runs):
    """[(file, title, caption, Figure or None)]; a picture that there is nothing for is None and its caption says why."""
    from taxa.results import figures

    done = [g for g in groups if g.values(group_rank(g))]
    found = []

    def section(name, title, caption, possible, draw, *arguments):
        found.append((name, title, caption if possible else f"Not drawn: {possible_reason[name]}.", draw(*arguments) if possible else None))

    possible_reason = {
        "1a": "no finished run at rank phylum is full fine-tuning of pretrained weights, or random initialisation",
        "1b": "no finished run has the rank superkingdom", "1c": "no finished run of LoRA has the rank genus",
        "1d_time": "no two strategies, one of them full or random, logged their speed and the number of their training sequences",
        "1d_batch": "no --probe FILE of probe_batch.py was given",
        "heads": "no adapter was run with its heads trained and with them frozen and all else the same",
        "curves": "no run has logged a step", "pretraining": "no run of pretrain.py is among the folders"}

    gains = [g for g in done if g.values("phylum") and (g.strategy == "random" or (g.strategy == "full" and g.pretrained))]
    text = seeds_sentence(gains, "phylum", lambda g: g.strategy == "full", lambda g, _: g.strategy == "random")
    section("1a", "Figure 1a: phylum, pretrained against random initialisation",
            "The same backbone, fine-tuned whole, from pretrained and from random weights. " + " ".join(text), gains,
            figures.pretraining_gain, done + published)
    text = seeds_sentence(done, "superkingdom", lambda g: g.strategy == "full", lambda g, _: g.strategy == "freeze75")
    section("1b", "Figure 1b: superkingdom by strategy",
            "Every strategy; hollow marks are adapters whose heads were frozen, as in all published LoRA and (IA)³ runs. "
            + " ".join(text),
            any(g.values("superkingdom") for g in done), figures.superkingdom, done + published)
    section("1c", "Figure 1c: genus against LoRA's r",
            "Solid: heads trained; dashed and hollow: heads frozen. At the right, full fine-tuning of the same model.",
            any(g.strategy == "lora" and g.values("genus") for g in done), figures.genus_by_r, done + published)
    timed = [g for g in groups if g.epoch_seconds()]
    section("1d_time", "Figure 1d: time per epoch by strategy",
            "Seconds per epoch, from the speed that the run logged, over the mean of full fine-tuning (where there is none: random "
            "initialisation, which trains the same) of the same model on the same data. Runs that shared their machine with others are "
            "slower than they would be alone. Seconds are in the table.",
            len({g.strategy for g in timed}) > 1 and figures.relative_seconds(timed), figures.epoch_time, timed + published)
    section("1d_batch", "Figure 1d: batch ceiling by strategy",
            "The largest batch that fits the memory limit, by probe_batch.py. The paper reports only that the largest power of two was the "
            "same for all strategies.", probes[0], figures.ceilings, *probes)
    pairs = {(g.data, g.model, g.row) for g in done if g.heads == "frozen"} & {(g.data, g.model, g.row) for g in done if g.heads == "train"}
    ranks = ranks_of([each for g in done if (g.data, g.model, g.row) in pairs for each in g.runs])
    text = seeds_sentence(done, None, lambda g: g.strategy in ("lora", "ia3") and g.heads == "train",
                          lambda g, a: g.heads == "frozen" and g.row == a.row)
    section("heads", "Adapters with trained and with frozen heads",
            "Filled: the heads train with the adapter, the default here. Hollow: they stay random, as in the published code. "
            + " ".join(text),
            pairs, figures.heads, done, ranks)
    section("curves", "Training curves",
            "One line a run; pale: heads frozen; of LoRA's lines dotted is r=1, solid r=4, dash-dotted r=20.",
            any(each.steps for g in groups for each in g.runs), figures.curves, groups)
    checked = [each for each in pretraining_runs if sum("perplexity" in line for line in each.validations) > 1]
    if checked:
        section("pretraining", "Masked-token pretraining",
                "Perplexity of masked tokens: dots on the validation split, thin lines in training.", True, figures.pretraining, checked)

    for data, model in figures.unique((g.data, g.model) for g in done):
        cells = [(g.label, summed_confusion(g, "superkingdom")) for g in done if (g.data, g.model) == (data, model)]
        cells = [(label, names, matrix) for label, (_, names, matrix) in ((label, cell) for label, cell in cells if cell)]
        if cells:
            found.append((f"superkingdoms_{slug(model)}_{slug(data)}", f"Superkingdoms confused: {model}, {data}",
                          "Rows are the truth; counts of all seeds are added, then each row is made shares.",
                          figures.confusions(cells, "superkingdom")))
    for group in best_groups(done):
        cell = summed_confusion(group, "phylum")
        if cell:
            found.append((f"phyla_{slug(group.model)}_{slug(group.data)}", f"Phyla confused: {group.model}, {group.data}",
                          f"The strategy with the best {group_rank(group)} of this model on this data: {group.label}.",
                          figures.confusions([(group.label, *cell[1:])], "phylum")))
    return found


def slug(text):
    """Letters, digits and hyphens: a part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in text)


def notes(runs, rows):
    """What is missing, one line each."""
    found = []
    for each in runs:
        if not each.metrics:
            steps = each.steps
            where = f"its log ends at step {each.last_step:,} of {steps[-1]['steps']:,}" if steps else "it has logged no step"
            found.append(f"{each.folder.name} is not finished ({where}); it has no test metrics.")
        elif not any(each.confusion(rank) for rank in each.metrics["ranks"]):
            found.append(f"{each.folder.name} has no confusion_RANK.csv: evaluate.py writes them.")
        if each.metrics and not set(RANKS) & set(each.metrics["ranks"]):
            found.append(f"{each.folder.name} was tested at {', '.join(each.metrics['ranks'])}: it is in the tables, and in no picture of "
                         "the paper's ranks.")
    old = [row["run"] for row in rows if row["trainable_fraction"] is None]
    if old:
        found.append(f"Without trainable_fraction, data_fraction and epoch_seconds, which their environment.json does not say: "
                     f"{', '.join(old)}.")
    return found


def page(parts, columns, rows, summary, pairs, remarks, pngs):
    """report.html."""
    body = ["<h1>Runs beside the published numbers</h1>",
            f"<p>{len(rows)} fine-tuning runs, {time.strftime('%Y-%m-%d')}. Published numbers: Berman et al. 2025, "
            "bioRxiv 10.1101/2025.08.21.671544, supplement, runs on all of its data (4.56 million training sequences). Other models, "
            "other data and other hardware are other experiments: compare orders, not digits. "
            "In all published LoRA and (IA)³ runs the heads were frozen.</p>"]
    if remarks:
        body += ["<h2>What is missing</h2>", "<ul>", *(f"<li>{html.escape(remark)}</li>" for remark in remarks), "</ul>"]
    for name, title, caption, picture in parts:
        body.append(f"<h2>{html.escape(title)}</h2>\n<figure>")
        if picture:
            data = base64.b64encode(pngs[name]).decode()
            body.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
        body.append(f"<figcaption>{html.escape(caption)}</figcaption>\n</figure>")
    if pairs:
        body += ["<h2>Pairs most often confused</h2>",
                 "<p>Of the best strategy of each model and data set, on the test split, seeds added.</p>",
                 html_table(pairs, tuple(pairs[0]))]
    body += ["<h2>Seeds put together</h2>", html_table(summary, tuple(summary[0]))] if summary else []
    body += ["<h2>Every run</h2>", "<p>The columns of the paper's supplement; – where the run does not say. Metrics are balanced "
             "accuracy on the test split, trainable_fraction is of the parameters held, epoch_seconds is training without validation.</p>",
             html_table(rows, columns)]
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>taxa: report</title>\n'
            f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n")


def write_report(args, runs):
    """The whole folder --out, or nothing of it."""
    out = Path(args.out)
    if out.is_dir():
        foreign = sorted(p.name for p in out.iterdir() if p.name not in FILES and not (p.name.startswith("figure_") and p.suffix == ".png"))
        if foreign:
            raise InputError(f"--out {out} holds {foreign[0]}, which is not of a report, and would be replaced: give another folder")
    tuned = [each for each in runs if each.fine_tuned]
    probes = read_probes(args.probe)
    groups = group_runs(tuned)
    columns, rows, summary = columns_of(tuned), table_rows(tuned), summary_rows(groups)
    parts = sections(groups, published_groups(), probes, [each for each in runs if not each.fine_tuned])
    pairs = [pair for group in best_groups(groups) for pair in confused_pairs(group)]
    pngs = {}
    for name, _, _, picture in parts:
        if picture:
            buffer = io.BytesIO()
            picture.savefig(buffer, dpi=DPI, format="png")
            pngs[name] = buffer.getvalue()
    with new_folder(out, overwrite=True) as folder:
        for name, data in pngs.items():
            (folder / f"figure_{name}.png").write_bytes(data)
        (folder / "table.csv").write_text(csv_text(rows, columns), encoding="utf-8")
        (folder / "table.md").write_text(markdown(rows, columns), encoding="utf-8")
        if summary:
            (folder / "summary.csv").write_text(csv_text(summary, tuple(summary[0])), encoding="utf-8")
        if pairs:
            (folder / "confused_genera.csv").write_text(csv_text(pairs, tuple(pairs[0])), encoding="utf-8")
        remarks = notes(tuned, rows)
        (folder / "report.html").write_text(page(parts, columns, rows, summary, pairs, remarks, pngs), encoding="utf-8")
    print(f"{out / 'report.html'}: {len(tuned)} runs, {len(pngs)} pictures"
          + (f"; {len(remarks)} remarks on what is missing" if remarks else ""))


def main(argv=None):
    args = parse_args(argv)
    if args.watch:
        return watch(args)
    runs = [read_run(folder) for folder in find_runs(args.runs)]
    if not args.out:
        return print(status(runs, time.time()))
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--out draws pictures with matplotlib: pip install '.[report]'")
    write_report(args, runs)


if __name__ == "__main__":
    run(main)
