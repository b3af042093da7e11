"""Measured training rates of cards -> the hours of a run.

  # a document of benchmarks/gpu.py goes into taxa/assets/measured_rates.json
  python -m taxa.study.rates gpu.json --date 2026-11-25

A rate is that of one model, strategy and precision at the published batch size, without activation
checkpointing, on one GPU. LoRA's was measured with r = 4 and serves any r. No other rate is used
for what was not measured, except where the step is the same: random initialisation trains as full
does, and DNABERT-S has DNABERT-2's network.
"""

import json

from taxa import ASSETS
from taxa.errors import InputError
from taxa.runtime.cli import Parser, run
from taxa.runtime.files import read_json

RATES = ASSETS / "measured_rates.json"
SAME_STEP = {"random": "full", "dnaberts": "dnabert2"}
COLUMNS = ("model", "strategy", "precision", "compile", "sequences_per_s")


def read_rates():
    """The rows of the package's table.

    They are dicts of device, date, model, strategy, precision, compile and sequences_per_s.
    """
    return read_json(RATES)


def hours(flags, sequences, card, rates, processes=1):
    """Hours that the training steps of a run take on a card, or None where nothing was measured.

    flags: of train.py, {flag: text}; sequences: in the training split; card: a word of the device's
    name, in upper or lower case; rates: of read_rates(). The validations and the test, some 5%
    more, are not counted.
    """
    recomputes = flags.get("activation-checkpointing", "none") != "none"
    if not card or processes > 1 or "max-steps" in flags or recomputes:
        return None
    how = flags.get("compile")
    wanted = {
        "precision": flags.get("precision", "fp32"),
        "compile": "layers" if how == "yes" else how,  # --compile alone: layers
        "model": SAME_STEP.get(flags["model"], flags["model"]),
        "strategy": SAME_STEP.get(flags["strategy"], flags["strategy"]),
    }
    found = [
        row for row in rates
        if card.lower() in row["device"].lower() and wanted.items() <= row.items()
    ]
    if not found:
        return None
    passed = int(flags.get("epochs", 5)) * sequences * float(flags.get("data-fraction", 1))
    return passed / found[0]["sequences_per_s"] / 3600


def table_of(document, date):
    """The rows that read_rates() gives, made of a document of benchmarks/gpu.py."""
    rows = []
    for cell in document.get("cells") or document["rows"]:
        plain = (
            cell.get("impl") in ("plain", "taxa")
            and cell.get("activation_checkpointing") in (None, "none")
        )
        if cell["kind"] == "speed" and plain and cell.get("status") == "done":
            # Older documents hold true or false, and true was the whole model.
            how = {False: None, True: "model"}.get(cell["compile"], cell["compile"])
            cell = {
                **cell,
                "compile": how,
                "sequences_per_s": round(cell["sequences_per_s"], 1),
            }
            row = {"device": document["device"], "date": date}
            rows.append(row | {name: cell[name] for name in COLUMNS})
    return rows


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("document", metavar="FILE", help="what benchmarks/gpu.py --out wrote")
    add("--date", required=True, metavar="YYYY-MM-DD", help="when it was measured")
    args = parser.parse_args(argv)
    try:
        rows = table_of(read_json(args.document), args.date)
        devices = {row["device"] for row in rows}
        rows = [row for row in read_rates() if row["device"] not in devices] + rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{args.document} is not a document of benchmarks/gpu.py --out"
        ) from None
    RATES.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    devices = sorted({row["device"] for row in rows})
    print(f"{RATES}: {len(rows)} rates of {', '.join(devices)}")


if __name__ == "__main__":
    run(main)
