"""A checkpoint -> balanced accuracy per rank on the held-out test split.

Each head is scored by itself, and all heads decoded jointly.

  python evaluate.py runs/demo/ckpt.pt
  python evaluate.py runs/demo/ckpt.pt --data data/bertax --out elsewhere
  torchrun --standalone --nproc_per_node 2 -- evaluate.py runs/demo/ckpt.pt --split validation
  python evaluate.py runs/demo/ckpt.pt --temperature        # for predict.py --temperature
  python evaluate.py runs/held-out/ckpt.pt --split unseen   # genera that nobody trained on

--temperature writes temperature.json. --split unseen needs data of prepare.py --hold-out.
"""

import os
from pathlib import Path

from taxa.data.augment import other_strands
from taxa.data.dataset import PreparedDataset
from taxa.data.splits import SPLITS, UNSEEN
from taxa.data.taxonomy import class_id
from taxa.errors import InputError
from taxa.evaluation.evaluation import (
    details,
    run_split,
    split_temperature,
    summarize,
    table,
    write_tables,
)
from taxa.evaluation.unseen import confidence, unseen_metrics, write_held_out
from taxa.evaluation.unseen import table as unseen_table
from taxa.runtime.cli import Parser, non_negative_int, positive_int, run
from taxa.runtime.distributed import main_first, world
from taxa.runtime.files import write_json
from taxa.runtime.precision import PRECISIONS, set_precision
from taxa.runtime.progress import progress
from taxa.training import checkpoint

SHOWN = 5  # classes in a message


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT",
        help="ckpt.pt of a run folder, or a folder of export.py --adapters")
    add = parser.group("data and weights")
    add("--data", metavar="DIR",
        help="prepared dataset (default: the one that the run was trained on)")
    add("--weights", metavar="DIR",
        help="folder with the base weights (default: where the run took them from)")
    add("--split", choices=(*SPLITS, UNSEEN), default="test",
        help="default test; unseen: the ranks above the last, and how well confidence tells unseen "
        "from seen")
    add("--both-strands", action="store_true",
        help="average the logits of a sequence and of its reverse complement (twice the time)")
    add("--tokenizer-file", metavar="PATH",
        help="--both-strands: tokenizer.json of the model (default for DNABERT: the hub's)")
    add = parser.group("machine")
    add("--batch-size", type=positive_int, metavar="B",
        help="sequences per batch (default: the run's)")
    add("--precision", choices=PRECISIONS, help="of matrix products (default: the run's)")
    add("--workers", type=non_negative_int, default=0, metavar="N",
        help="processes that load batches, per rank (default 0: in the loop)")
    add("--temperature", action="store_true",
        help="fit one temperature per rank on the validation split, report the probabilities with "
        "and without it, and write temperature.json")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="default auto: CUDA where there is one")
    add = parser.group("output")
    add("--out", metavar="DIR",
        help="where metrics.json, per_class.csv and confusion_*.csv go (default: the run folder; "
        "for a folder DIR of export.py runs/DIR-evaluated)")
    args = parser.parse_args(argv)
    args.temperature |= args.split == UNSEEN
    return args


def main(argv=None):
    args = parse_args(argv)
    content = checkpoint.read(args.checkpoint)
    data, tokenizer = open_data(args, content)
    used_splits = splits_needed(args)
    out = Path(args.out or default_out(args.checkpoint))
    how = {
        "batch_size": args.batch_size or content["batch_size"],
        "precision": args.precision or content["precision"],
        "workers": args.workers,
    }
    with world(args.device) as w:
        # Read the data once per machine, before any process uses them.
        with main_first(w):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                # Other strands are made from the bases, which the nt tokens spell.
                for tokens in {tokenizer, "nt"} if args.both_strands else {tokenizer}:
                    data.verify(tokens, sorted(used_splits), progress)

        # Build the model.
        set_precision(how["precision"], w.device)
        model = checkpoint.rebuild(content, args.weights).to(w.device)
        out.mkdir(parents=True, exist_ok=True)

        # Open each split: [the split, and its other strands where they are averaged with it].
        views = {name: [data.split(name, tokenizer)] for name in used_splits}
        if args.both_strands:
            reader = checkpoint.tokenizer_of(content, args.checkpoint, args.tokenizer_file)
            for name in used_splits:
                views[name].append(other_strands(data.split(name, "nt"), reader))

        # Fit the temperatures on the validation split.
        temperature = None
        if args.temperature:
            split, *others = views["validation"]
            temperature, used = split_temperature(w, model, split, **how, others=others)
            fitted = {
                "temperature": temperature,
                "state_digest": checkpoint.state_digest(content["state"]),
                "split": "validation",
                "sequences": used,
                "dataset_digest": data.digest,
            }

        # Genera that nobody trained on have numbers of their own.
        if args.split == UNSEEN:
            return evaluate_unseen(w, model, data, views, how=how, fitted=fitted, out=out)

        # Predict the split.
        split, *others = views[args.split]
        outcome = run_split(
            w, model, split, **how,
            lineages=content["lineages"], temperature=temperature, others=others,
        )
        metrics = summarize(
            args.split, outcome, data.num_classes, content["lineages"], data.digest, temperature
        )

        # Print and write the numbers.
        if w.is_main:
            print(table(metrics))
            print(details(metrics), flush=True)
            if data.digest != content["data"]["digest"]:
                print(
                    f"note: {data.folder} is not the dataset of the run: its {args.split} split "
                    "may hold sequences trained on"
                )
                note_length(args.checkpoint, content, data, args.split)
            write_tables(out, metrics, outcome, data.classes)
            if temperature:
                write_json(out / "temperature.json", fitted)
    return metrics


def splits_needed(args):
    """The names of the splits that are read."""
    names = {args.split}
    if args.temperature:
        names.add("validation")
    if args.split == UNSEEN:
        names.add("test")
    return names


def default_out(path):
    """The folder of a run, for its checkpoint; a folder of its own for one of export.py.

    What export.py writes is to be published, so what is measured goes elsewhere.
    """
    path = Path(path)
    return Path("runs") / f"{path.resolve().name}-evaluated" if path.is_dir() else path.parent


def open_data(args, content):
    """(PreparedDataset, name of its tokens) for a checkpoint's content.

    Raises InputError where the two do not go together, and where a split that is needed is missing
    or empty.
    """
    trained_on = content["data"]
    if not args.data and not Path(trained_on["folder"]).is_dir():
        raise InputError(
            f"{args.checkpoint} was trained on {trained_on['folder']}, which is not there: "
            "give --data DIR"
        )
    data = PreparedDataset(args.data or trained_on["folder"])
    if data.digest != trained_on["digest"] and not args.out:
        raise InputError(
            f"{data.folder} is not the dataset that {args.checkpoint} was trained on "
            f"(digest {data.digest[:12]}, then {trained_on['digest'][:12]}): "
            "to evaluate on it all the same, say with --out where the numbers go"
        )
    check_classes(args.checkpoint, content, data)
    tokenizer = tokens_of(content["tokenizer"], data)
    if args.split not in data.splits:
        raise InputError(
            f"{data.folder} has no split {args.split}: prepare it with --hold-out F, "
            "and train on it"
        )
    if len(data.split(args.split, tokenizer)) == 0:
        raise InputError(f"{data.folder}: the {args.split} split is empty")
    if args.temperature and len(data.split("validation", tokenizer)) == 0:
        raise InputError(
            f"{data.folder}: the temperature is fitted on the validation split, which is empty"
        )
    return data, tokenizer


def evaluate_unseen(w, model, data, views, *, how, fitted, out):
    """Genera that nobody trained on, told from the test split's. Returns the metrics.

    Writes metrics_unseen.json, per_class_unseen.csv, and temperature.json with the least genus
    probability to ask of predict.py.
    """
    held = data.held_out()
    validation, test, unseen = (
        confidence(w, model, views[name], **how, temperature=fitted["temperature"])
        for name in ("validation", "test", UNSEEN)
    )
    metrics = unseen_metrics(data.classes, validation, test, unseen)
    metrics |= {"dataset_digest": data.digest, "temperature": fitted["temperature"]}
    if w.is_main:
        print(unseen_table(metrics), flush=True)
        threshold = metrics["confidence"]["softmax"]["threshold"]
        write_json(out / "metrics_unseen.json", metrics)
        per_class = out / "per_class_unseen.csv"
        write_held_out(per_class, held, data.classes, test, unseen, threshold)
        write_json(out / "temperature.json", fitted | {"min_probability": threshold})
    return metrics


def note_length(path, content, data, split):
    """Say so in one line when a split's sequences have another length than those trained on."""
    trained = checkpoint.window_of(content, path)
    here = data.window(split)
    if here["length"] > trained["length"] or (here != trained and not trained["varied"]):
        print(
            f"note: {path} was trained on sequences of {checkpoint.window_text(trained)}; "
            f"those of the {split} split of {data.folder} have {checkpoint.window_text(here)}"
        )


def tokens_of(trained, data):
    """The name that the data have for a checkpoint's tokenizer, {"name", "digest", ...}.

    It is the checkpoint's own name where the data lack these tokens. Raises InputError where the
    data's tokens of that name are of another vocabulary.
    """
    for name, record in data.manifest["tokenizers"].items():
        if record["digest"] == trained["digest"]:
            return name
    if data.has_tokens(trained["name"]):
        raise InputError(
            f"{data.folder}: its {trained['name']} tokens are of another vocabulary than "
            "the checkpoint's"
        )
    return trained["name"]


def check_classes(path, content, data):
    """Raise InputError when the data's classes are not those that the heads were trained for.

    They are compared by taxid (or name), and in order.
    """
    if list(data.classes) != list(content["classes"]):
        ranks = " ".join(content["classes"])
        raise InputError(
            f"{path} has heads for {ranks}, but {data.folder} is labelled at "
            f"{' '.join(data.classes)}: evaluate on data prepared with --ranks {ranks}"
        )
    for rank, trained in content["classes"].items():
        then = [class_id(row) for row in trained]
        now = [class_id(row) for row in data.classes[rank]]
        if then == now:
            continue
        there, here = set(then), set(now)
        sides = {
            "the checkpoint": [i for i in then if i not in here],
            "the data": [i for i in now if i not in there],
        }
        differ = "; ".join(
            f"{len(ids)} in {side} only ({some(ids)})" for side, ids in sides.items() if ids
        )
        raise InputError(
            f"{path} and {data.folder} have different classes: {rank} has {len(then)} in the "
            f"checkpoint and {len(now)} in the data, {differ or 'in another order'}: "
            f"prepare.py --classes-of {path} labels data by the checkpoint's"
        )


def some(ids):
    """The first few of a list of taxids or names."""
    return ", ".join(map(str, ids[:SHOWN])) + (" ..." if len(ids) > SHOWN else "")


if __name__ == "__main__":
    run(main)
