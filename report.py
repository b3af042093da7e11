"""Run folders -> tables and pictures, beside the numbers that Berman et al. 2025 published.

  python report.py runs --out report        # report/report.html, PNGs, table.md, table.csv
  python report.py runs --out report --probe probe.json      # with the largest batches of
                                            # probe_batch.py --out probe.json
  python report.py runs                     # a table of where each run stands
  python report.py runs --watch             # the same, again every few seconds, until Ctrl-C

Runs that are not finished are in the table and the curves, and the report says so. report.html
holds its pictures and needs no network.
"""

import base64
import html
import importlib.util
import io
import sys
import time
from pathlib import Path

from taxa import RANKS
from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_float, run
from taxa.runtime.files import new_folder
from taxa.study.run_folders import find_runs, read_run
from taxa.study.tables import (
    best_groups,
    columns_of,
    confused_pairs,
    csv_text,
    html_table,
    markdown,
    summary_rows,
    table_rows,
)

# The files of a report, besides figure_*.png.
FILES = ("report.html", "table.md", "table.csv", "summary.csv", "confused_genera.csv")
DPI = 150
RUNNING = 600  # seconds: a run that wrote a line within this time is running

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto } figcaption { color: #444 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd }
th, td { text-align: left; white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums }"""


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS",
        help="run folders of train.py (and pretrain.py), or folders that contain them")
    add("--out", metavar="DIR",
        help="write the report there; an older report in DIR is replaced "
             "(default: print where each run stands)")
    add("--probe", nargs="+", default=[], metavar="FILE",
        help="documents of probe_batch.py --out, for the largest batches (default: none)")
    add("--watch", action="store_true",
        help="print where each run stands again and again, until Ctrl-C")
    add("--every", type=positive_float, default=5.0, metavar="SECONDS",
        help="between two prints of --watch (default 5)")
    args = parser.parse_args(argv)
    if args.watch and args.out:
        parser.error("--watch prints and --out writes: give one of them")
    if args.probe and not args.out:
        parser.error("--probe is for the pictures of --out DIR")
    return args


# ---------------------------------------------------------------- where each run stands

def status(runs, now):
    """A fixed-width table, a line for each run.

    It shows progress, last loss, best validation, speed, and how long ago the last line of the log
    was written.
    """
    width = max(len(run.folder.name) for run in runs)
    heading = (
        f"{'run':<{width}}{'step':>16}{'epoch':>7}{'loss':>9}{'best validation':>17}{'genus':>7}"
        f"{'seq/s':>8}{'last line':>11}  state"
    )
    lines = [heading]
    for each in runs:
        steps = each.steps
        last = steps[-1] if steps else {}
        progress = f"{each.last_step:,}/{last['steps']:,}" if steps else "-"
        epoch = last.get("epoch", "-")
        loss = _number(last.get("loss"), ".4f")
        speed = _number(last.get("sequences_per_s"), ".1f")

        best = min(each.validations, key=lambda line: line["validation_loss"], default=None)
        best_loss = _number(best and best["validation_loss"], ".4f")
        genus = _number(best and best.get("balanced_accuracy", {}).get("genus"), ".3f")

        log = each.folder / "log.jsonl"
        age = now - log.stat().st_mtime if log.is_file() else None
        if each.metrics:
            state = "finished"
        elif age is not None and age < RUNNING:
            state = "running"
        else:
            state = "not finished"
        lines.append(
            f"{each.folder.name:<{width}}{progress:>16}{epoch:>7}{loss:>9}{best_loss:>17}{genus:>7}"
            f"{speed:>8}{_ago(age):>11}  {state}"
        )
    return "\n".join(lines)


def _number(value, form):
    return "-" if value is None else format(value, form)


def _ago(seconds):
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s ago"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min ago"
    return f"{seconds / 3600:.0f} h ago"


def watch(args):
    """Print status() every --every seconds; on a terminal over the last one. Ends with Ctrl-C."""
    clear = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
    while True:
        text = status([read_run(folder) for folder in find_runs(args.runs)], time.time())
        print(clear + text, flush=True)
        time.sleep(args.every)


# ---------------------------------------------------------------- the report

def notes(runs, rows):
    """What is missing, one line each."""
    found = []
    for each in runs:
        if not each.metrics:
            steps = each.steps
            if steps:
                total = steps[-1]["steps"]
                where = f"its log ends at step {each.last_step:,} of {total:,}"
            else:
                where = "it has logged no step"
            found.append(f"{each.folder.name} is not finished ({where}); it has no test metrics.")
        elif not any(each.confusion(rank) for rank in each.metrics["ranks"]):
            found.append(f"{each.folder.name} has no confusion_RANK.csv: evaluate.py writes them.")
        if each.metrics and not set(RANKS) & set(each.metrics["ranks"]):
            ranks = ", ".join(each.metrics["ranks"])
            found.append(
                f"{each.folder.name} was tested at {ranks}: "
                "it is in the tables, and in no picture of the paper's ranks."
            )
    old = [row["run"] for row in rows if row["trainable_fraction"] is None]
    if old:
        found.append(
            "Without trainable_fraction, data_fraction and epoch_seconds, "
            f"which their environment.json does not say: {', '.join(old)}."
        )
    return found


def page(parts, columns, rows, summary, pairs, remarks, pngs):
    """The text of report.html."""
    about = (
        f"<p>{len(rows)} fine-tuning runs, {time.strftime('%Y-%m-%d')}. "
        "Published numbers: Berman et al. 2025, bioRxiv 10.1101/2025.08.21.671544, supplement, "
        "runs on all of its data (4.57 million training sequences). Other models, other data and "
        "other hardware are other experiments: compare orders, not digits. "
        "In all published LoRA and (IA)³ runs the heads were frozen.</p>"
    )
    body = ["<h1>Runs beside the published numbers</h1>", about]
    if remarks:
        items = [f"<li>{html.escape(remark)}</li>" for remark in remarks]
        body += ["<h2>What is missing</h2>", "<ul>", *items, "</ul>"]
    for part in parts:
        title = html.escape(part.title)
        body.append(f"<h2>{title}</h2>\n<figure>")
        if part.figure:
            data = base64.b64encode(pngs[part.name]).decode()
            body.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
        body.append(f"<figcaption>{html.escape(part.caption)}</figcaption>\n</figure>")
    if pairs:
        of_which = (
            "<p>Of the best strategy of each model and data set, on the test split, "
            "seeds added.</p>"
        )
        body += [
            "<h2>Pairs most often confused</h2>",
            of_which,
            html_table(pairs, tuple(pairs[0])),
        ]
    if summary:
        body += ["<h2>Means over seeds</h2>", html_table(summary, tuple(summary[0]))]
    meaning = (
        "<p>The columns of the paper's supplement; – where the run does not say. Metrics are "
        "balanced accuracy on the test split, trainable_fraction is of the parameters held, "
        "epoch_seconds is training without validation.</p>"
    )
    body += ["<h2>Every run</h2>", meaning, html_table(rows, columns)]
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        "<title>taxa: report</title>",
        f"<style>\n{STYLE}\n</style>",
        "</head>",
        "<body>",
        *body,
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def check_replaceable(out):
    """Raise InputError for a folder that holds a file that is not of a report."""
    for name in sorted(path.name for path in out.iterdir()):
        is_figure = name.startswith("figure_") and Path(name).suffix == ".png"
        if name not in FILES and not is_figure:
            raise InputError(
                f"--out {out} holds {name}, which is not of a report, and would be replaced: "
                "give another folder"
            )


def write_report(args, runs):
    """Write the whole folder --out, or nothing of it."""
    # Imported late: groups loads torch, which --watch does not need, and sections needs matplotlib.
    from taxa.study.groups import group_runs, published_groups, read_probes
    from taxa.study.sections import Material, drawn_sections

    out = Path(args.out)
    if out.is_dir():
        check_replaceable(out)

    # The tables.
    tuned = [each for each in runs if each.fine_tuned]
    probes, limits = read_probes(args.probe)
    groups = group_runs(tuned)
    columns = columns_of(tuned)
    rows = table_rows(tuned)
    summary = summary_rows(groups)
    pairs = [pair for group in best_groups(groups) for pair in confused_pairs(group)]
    remarks = notes(tuned, rows)

    # The pictures.
    pretraining = [each for each in runs if not each.fine_tuned]
    parts = drawn_sections(Material(groups, published_groups(), probes, limits, pretraining))
    pngs = {}
    for part in parts:
        if part.figure:
            buffer = io.BytesIO()
            part.figure.savefig(buffer, dpi=DPI, format="png")
            pngs[part.name] = buffer.getvalue()

    texts = {
        "table.csv": csv_text(rows, columns),
        "table.md": markdown(rows, columns),
        "report.html": page(parts, columns, rows, summary, pairs, remarks, pngs),
    }
    if summary:
        texts["summary.csv"] = csv_text(summary, tuple(summary[0]))
    if pairs:
        texts["confused_genera.csv"] = csv_text(pairs, tuple(pairs[0]))
    with new_folder(out, overwrite=True) as folder:
        for name, data in pngs.items():
            (folder / f"figure_{name}.png").write_bytes(data)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    missing = f"; {len(remarks)} remarks on what is missing" if remarks else ""
    print(f"{out / 'report.html'}: {len(tuned)} runs, {len(pngs)} pictures{missing}")


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
