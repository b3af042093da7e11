"""Run folders -> tables and pictures, beside the numbers that Berman et al. 2025 published.

  python report.py runs/paper-mini --out report                     # report/report.html, PNGs, table.md, table.csv
  python report.py runs/paper-mini --probe probe.json --out report  # with the largest batches of probe_batch.py --out probe.json
  python report.py runs                                             # a table of where each run stands
  python report.py runs --watch                                     # the same, again every few seconds, until Ctrl-C

Runs that are not finished are in the table and the curves, and the report says so. report.html holds its pictures and needs no network.
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

FILES = ("report.html", "table.md", "table.csv", "summary.csv", "confused_genera.csv")  # and figure_*.png
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
    add("--probe", nargs="+", default=[], metavar="FILE", help="documents of probe_batch.py --out, for the largest batches (default: none)")
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


# ---------------------------------------------------------------- the report

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
            "bioRxiv 10.1101/2025.08.21.671544, supplement, runs on all of its data (4.57 million training sequences). Other models, "
            "other data and other hardware are other experiments: compare orders, not digits. "
            "In all published LoRA and (IA)³ runs the heads were frozen.</p>"]
    if remarks:
        body += ["<h2>What is missing</h2>", "<ul>", *(f"<li>{html.escape(remark)}</li>" for remark in remarks), "</ul>"]
    for part in parts:
        body.append(f"<h2>{html.escape(part.title)}</h2>\n<figure>")
        if part.figure:
            data = base64.b64encode(pngs[part.name]).decode()
            body.append(f'<img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}">')
        body.append(f"<figcaption>{html.escape(part.caption)}</figcaption>\n</figure>")
    if pairs:
        body += ["<h2>Pairs most often confused</h2>",
                 "<p>Of the best strategy of each model and data set, on the test split, seeds added.</p>",
                 html_table(pairs, tuple(pairs[0]))]
    body += ["<h2>Means over seeds</h2>", html_table(summary, tuple(summary[0]))] if summary else []
    body += ["<h2>Every run</h2>", "<p>The columns of the paper's supplement; – where the run does not say. Metrics are balanced "
             "accuracy on the test split, trainable_fraction is of the parameters held, epoch_seconds is training without validation.</p>",
             html_table(rows, columns)]
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>taxa: report</title>\n'
            f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n")


def write_report(args, runs):
    """The whole folder --out, or nothing of it."""
    from taxa.study.groups import (  # late: it loads torch, which --watch has no need of
        group_runs,
        published_groups,
        read_probes,
    )
    from taxa.study.sections import Material, drawn_sections  # late: it needs matplotlib

    out = Path(args.out)
    if out.is_dir():
        foreign = sorted(p.name for p in out.iterdir() if p.name not in FILES and not (p.name.startswith("figure_") and p.suffix == ".png"))
        if foreign:
            raise InputError(f"--out {out} holds {foreign[0]}, which is not of a report, and would be replaced: give another folder")
    tuned = [each for each in runs if each.fine_tuned]
    probes, limits = read_probes(args.probe)
    groups = group_runs(tuned)
    columns, rows, summary = columns_of(tuned), table_rows(tuned), summary_rows(groups)
    parts = drawn_sections(Material(groups, published_groups(), probes, limits, [each for each in runs if not each.fine_tuned]))
    pairs = [pair for group in best_groups(groups) for pair in confused_pairs(group)]
    pngs = {}
    for part in parts:
        if part.figure:
            buffer = io.BytesIO()
            part.figure.savefig(buffer, dpi=DPI, format="png")
            pngs[part.name] = buffer.getvalue()
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
