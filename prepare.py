"""FASTA files and an NCBI taxonomy dump, or a table -> a prepared dataset folder.

The five steps are in taxa/data/prepare.py.

  python prepare.py --fasta db/*.fa --taxdump taxdmp_2024-12-01.zip --out data/bertax

  # labels of your own
  python prepare.py --table mine.csv --ranks family species --any-length --out data/mine

  # a small simulated corpus, no input needed
  python prepare.py --demo --out data/demo

  # tokens for another family of models, from what is prepared
  python prepare.py --add-tokens tiny-dnabert --out data/demo

  # what is in a prepared folder
  python prepare.py --describe data/demo --picture demo.png
"""

import argparse
import os
import re
import shutil
import signal
from pathlib import Path

from taxa import RANKS, STUDY_SEED
from taxa.data.dataset import PreparedDataset
from taxa.data.describe import describe, picture
from taxa.data.grammar import is_packed
from taxa.data.prepare import (
    ACROSS,
    DEMO_SEQUENCES,
    LENGTH,
    TEST,
    VALIDATION,
    prepare,
    simulated_source,
)
from taxa.data.sources import FastaSource, TableSource
from taxa.data.table import check_columns
from taxa.data.taxonomy import check_ranks
from taxa.data.tokens import TOKENIZERS, get_tokenizer
from taxa.errors import InputError
from taxa.runtime.cli import Parser, fraction, positive_int, run, seed
from taxa.runtime.files import locked, new_folder
from taxa.runtime.progress import progress
from taxa.runtime.workers import available_cores, in_order

# Bytes on disk per base, for tokens, labels and offsets of sequences of 1500 bases
# (measured: nt 0.35, dnabert 0.42, tiny-dnabert 0.49).
NT_BYTES, BPE_BYTES = 0.36, 0.5
GZIP_RATIO = 4  # bases to bytes of gzip, about


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_flags(parser)
    args = parser.parse_args(argv)
    given_splits(parser, args)
    check_flags(parser, args)
    set_defaults(args)

    names = args.add_tokens or args.tokenizers
    if args.tokenizer_file and sum(name in ("dnabert", "bpe") for name in names) != 1:
        parser.error("--tokenizer-file is for one of the tokenizers dnabert and bpe: "
                     "ask for it with --tokenizers or --add-tokens")
    args.classes = read_classes(args.classes_of) if args.classes_of else None
    args.ranks = tuple(args.classes or args.ranks)
    args.ranks = check_columns(args.ranks) if args.table else check_ranks(args.ranks)
    if not args.train:
        check_shares(parser, args)
    return args


def add_flags(parser):
    add = parser.group("input")
    add("--fasta", nargs="+", metavar="FILE",
        help="FASTA files, plain or gzip; headers '>TAXID INDEX' or '>TAXID'")
    add("--taxdump", metavar="FILE",
        help="NCBI taxonomy dump: taxdmp_YYYY-MM-DD.zip, taxdump.tar.gz, or a folder of its files")
    add("--table", metavar="FILE",
        help="instead of the two: a .csv or .tsv file (or .gz of it) with a header, a column of "
             "sequences and one of labels per rank")
    add("--train", nargs="+", metavar="FILE",
        help="instead of --fasta, splits that are given: FASTA files to train on, with "
             "--validation FILE ... and --test FILE ...")
    add("--split-column", metavar="NAME",
        help="--table: the column that says train, validation or test "
             "(default: chosen by --seed)")
    add("--sequence-column", metavar="NAME",
        help="--table: the column of sequences (default sequence)")
    add("--demo", action="store_true", help="simulate a small corpus instead of reading one")
    add("--demo-sequences", type=positive_int, metavar="N",
        help=f"sequences to simulate (default {DEMO_SEQUENCES})")

    add = parser.group("what is kept and how it is divided")
    add("--length", type=positive_int, metavar="BP",
        help=f"keep sequences of exactly this length (default {LENGTH})")
    add("--ranks", nargs="+", metavar="RANK",
        help="ranks to label, one to eight of NCBI's, from coarse to fine, or columns of --table; "
             f"one head each (default {' '.join(RANKS)})")
    add("--classes-of", metavar="CKPT",
        help="an external test set: label by the classes of a ckpt.pt (or of a folder of "
             "export.py), drop and count what is of none of them, and put all the rest into the "
             "test split, for evaluate.py --data")
    add("--any-length", action="store_true", help="keep sequences of every length but 0")
    add("--test", nargs="+", metavar="F",
        help="share of each genus (class of the last rank) for the test split, above 0 "
             f"(default {TEST:.2f}); with --train its files")
    add("--validation", nargs="+", metavar="F",
        help="share of each genus for the validation split, above 0 "
             f"(default {VALIDATION:.2f}); with --train its files")
    add("--drop-duplicates", action="store_true",
        help="leave out of training what is in another split too, on either strand "
             "(default: count it, and name it in across_splits.tsv)")
    add("--test-ids", metavar="FILE",
        help="the test split is exactly these: test_ids.txt of a folder prepared before "
             "(default: chosen by --seed)")
    add("--group", type=pattern, metavar="REGEX",
        help="sequences of a genus whose headers agree in what REGEX finds are all in one split, "
             "e.g. '^[0-9]+' for the taxid (default: each sequence on its own)")
    add("--hold-out", type=fraction, metavar="F",
        help="share of the genera that go whole into a fourth split, unseen, for "
             "evaluate.py --split unseen; never the last of its phylum")
    add("--seed", type=seed, metavar="N",
        help=f"of the split, and of the simulation (default {STUDY_SEED})")

    add = parser.group("tokens")
    add("--tokenizers", nargs="+", metavar="NAME",
        help=f"which tokens to write, of {' '.join(TOKENIZERS)}; "
             "nt is always written (default nt)")
    add("--add-tokens", nargs="+", metavar="NAME",
        help="add tokens to a folder that is prepared already")
    add("--tokenizer-file", metavar="FILE",
        help="tokenizer.json, for dnabert (default: DNABERT-2's, from the hub) or for bpe")

    add = parser.group("a look at what is there")
    add("--describe", metavar="DIR", help="print what is in a prepared folder, and write nothing")
    add("--picture", metavar="FILE",
        help="with --describe: histograms of class sizes and token lengths, "
             "a file .png, .pdf or .svg; needs matplotlib")

    add = parser.group("output")
    add("--out", metavar="DIR", help="the folder to write")
    add("--workers", type=positive_int, default=available_cores(), metavar="N",
        help="processes; what is written does not depend on it "
             "(default: the CPU cores, here %(default)s)")
    add("--overwrite", action="store_true", help="replace --out if it exists")


def check_flags(parser, args):
    """Flags that must be there, that go together, and that mean nothing beside others."""
    ways = (args.fasta, args.table, args.demo, args.add_tokens, args.describe)
    if sum(bool(way) for way in ways) != 1:
        parser.error("give either --fasta and --taxdump, or --table, or --demo, or --add-tokens, "
                     "or --describe")
    if args.describe and args.out is not None:
        parser.error("--describe writes nothing: leave out --out")
    if not args.describe and args.out is None:
        parser.error("the following arguments are required: --out")
    if (args.fasta is None) != (args.taxdump is None):
        parser.error("--fasta and --taxdump go together")
    if args.hold_out == 0:
        parser.error("--hold-out 0 holds nothing out: leave it out")
    for flag in without_effect(args):
        if getattr(args, flag) not in (None, False):
            parser.error(f"--{flag.replace('_', '-')} does nothing here: leave it out")
    if "nt" in (args.add_tokens or []):
        parser.error("--add-tokens nt: nt tokens are always there")


def without_effect(args):
    """Names of the arguments that mean nothing beside those that are given."""
    made_before = [
        "fasta", "taxdump", "length", "any_length", "test", "validation", "test_ids", "group",
        "seed", "tokenizers", "ranks", "classes_of", "hold_out", "drop_duplicates",
    ]
    of_the_split = ["test", "validation", "test_ids", "group", "hold_out"]
    rules = (
        (args.add_tokens or args.describe, made_before),
        (args.describe, ["tokenizer_file", "overwrite"]),
        (not args.describe, ["picture"]),
        (not args.demo, ["demo_sequences"]),
        (args.table, ["group"]),
        (not args.table, ["sequence_column", "split_column"]),
        (args.split_column, of_the_split),
        (args.train, ["test_ids", "group", "hold_out"]),
        (args.any_length, ["length"]),
        (args.test_ids, ["test", "group", "hold_out"]),
        (args.classes_of,
         ["ranks", *of_the_split, "train", "split_column", "drop_duplicates"]),
    )
    return [flag for given, flags in rules if given for flag in flags]


def set_defaults(args):
    """The values of flags that were not given: only now, so that it is known which were."""
    defaults = {
        "demo_sequences": DEMO_SEQUENCES,
        "length": LENGTH,
        "test": TEST,
        "validation": VALIDATION,
        "seed": STUDY_SEED,
        "tokenizers": ["nt"],
        "ranks": RANKS,
        "sequence_column": "sequence",
    }
    for flag, default in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)


def check_shares(parser, args):
    """The shares of the test and validation splits leave something for every split."""
    if args.test == 0 or args.validation == 0:
        parser.error("--test and --validation are above 0: "
                     "every genus of three or more sequences is in all three splits")
    if args.test + args.validation >= 1:
        parser.error(f"--test {args.test} and --validation {args.validation} leave nothing to "
                     "train on")


def given_splits(parser, args):
    """Read --test and --validation, which are shares, or with --train files.

    Then --fasta is all files and args.parts the split of each.
    """
    args.parts = None
    if args.train:
        if args.fasta or not (args.test and args.validation):
            parser.error("--train goes with --validation FILE ... and --test FILE ..., "
                         "in the place of --fasta")
        splits = (args.train, args.validation, args.test)
        args.fasta = [path for files in splits for path in files]
        args.parts = [number for number, files in enumerate(splits) for _ in files]
        first = {}  # absolute path: its first split
        for path, number in zip(args.fasta, args.parts):
            if first.setdefault(os.path.abspath(path), number) != number:
                parser.error(f"{path} is given for two splits")
        args.test = args.validation = None
        return
    for flag in ("test", "validation"):
        words = getattr(args, flag)
        if not words:
            continue
        try:
            share, = map(fraction, words)
        except (ValueError, argparse.ArgumentTypeError) as error:
            reason = "files go with --train FILE ..."
            if len(words) == 1 and words[0].replace(".", "").isdigit():
                reason = error
            parser.error(f"argument --{flag}: {' '.join(words)} is no share of each genus, "
                         f"such as 0.1; {reason}")
        setattr(args, flag, share)


def read_classes(path):
    """{rank: [{"taxid", "name"}, ...]} of a checkpoint, or of a folder of export.py."""
    # they import transformers, which takes seconds
    from taxa.training import checkpoint, peft_format

    if Path(path).is_dir():
        return peft_format.read_labels(path)
    return checkpoint.read(path)["classes"]


def pattern(text):
    """argparse type: a regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression ({error})") from None


def main(argv=None):
    args = parse_args(argv)
    if args.describe:
        data = PreparedDataset(args.describe)
        print("\n".join(describe(data)))
        if args.picture:
            picture(data, args.picture)
        return
    names = [name for name in args.add_tokens or args.tokenizers if name != "nt"]
    tokenizers = []
    for name in names:
        file = args.tokenizer_file if name in ("dnabert", "bpe") else None
        tokenizers.append(get_tokenizer(name, file))
    if args.add_tokens:
        add_tokens(args, tokenizers)
    else:
        new_dataset(args, tokenizers)


def new_dataset(args, tokenizers):
    """Prepare the folder --out and report what is in it."""
    if args.overwrite:
        check_what_is_overwritten(Path(args.out), input_files(args))
    with new_folder(args.out, args.overwrite) as out, in_order(args.workers) as mapped:
        source = source_of(args, out)
        if args.classes:
            source.settings = source.settings | {"classes_of": Path(args.classes_of).name}
        if not args.demo:
            check_disk(out, disk_need(source.files, len(tokenizers), bool(args.table)))
        manifest = prepare(
            source,
            out,
            mapped,
            length=None if args.any_length else args.length,
            test=args.test,
            validation=args.validation,
            seed=args.seed,
            group=args.group,
            test_ids=args.test_ids,
            held_share=args.hold_out,
            drop_duplicates=args.drop_duplicates,
        )
        for tokenizer in tokenizers:
            PreparedDataset(out).add_tokens(tokenizer, progress, mapped)
    report(manifest, args.out)


def input_files(args):
    """The files that are to be read."""
    if args.demo:
        return []
    if args.table:
        return [args.table]
    return [*args.fasta, args.taxdump]


def source_of(args, out):
    """The sequences and labels that the flags name; those of --demo are simulated into `out`."""
    if args.demo:
        return simulated_source(out, args.demo_sequences, args.seed, args.length, args.ranks)
    if args.table:
        return TableSource(
            args.table, args.sequence_column, args.ranks, args.classes, args.split_column)
    return FastaSource(args.fasta, args.taxdump, args.ranks, args.classes, args.parts)


def add_tokens(args, tokenizers):
    """Add tokens to the folder --out, made from its nt tokens."""
    data = PreparedDataset(args.out)
    for tokenizer in tokenizers:
        if data.has_tokens(tokenizer.name) and not args.overwrite:
            raise InputError(f"{args.out} has tokens of {tokenizer.name} already; "
                             "--overwrite makes them again")
    with locked(data.folder), in_order(args.workers) as mapped:
        for leftover in data.folder.glob("*/.*.tmp"):  # of a killed run
            leftover.unlink()
        bases = 3 * sum((data.folder / split / "nt.bin").stat().st_size for split in data.splits)
        check_disk(data.folder, len(tokenizers) * BPE_BYTES * bases)
        for tokenizer in tokenizers:
            data.add_tokens(tokenizer, progress, mapped)
            print(f"{args.out}: added tokens of {tokenizer.name}")


def disk_need(paths, bpe, copied=False):
    """Bytes that preparing files takes, about, if every sequence is kept.

    bpe: how many tokenizers besides nt. copied: the bases of the files are written beside the
    output first, as gzip's always are.
    """
    packed = {path: is_packed(path) for path in paths if os.path.isfile(path)}
    bases = {path: os.path.getsize(path) * (GZIP_RATIO if packed[path] else 1) for path in packed}
    beside = sum(bases[path] for path in packed if packed[path] or copied)
    return beside + sum(bases.values()) * (NT_BYTES + bpe * BPE_BYTES)


def check_disk(folder, need):
    """Say how much disk is needed; InputError when there is less."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(f"--out needs about {need / 1e9:,.2f} GB, "
                         f"and {free / 1e9:,.2f} GB are free on its disk")
    print(f"needs about {need / 1e9:,.2f} GB of disk, {free / 1e9:,.2f} GB are free")


def check_what_is_overwritten(out, inputs):
    """--overwrite replaces prepared datasets only, and never the files that it is to read."""
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise InputError(f"--out {out} is not a prepared dataset, "
                         "so --overwrite does not replace it: give another --out")
    for path in inputs:
        if Path(path).resolve().is_relative_to(out.resolve()):
            raise InputError(f"{path} lies in --out {out}, which --overwrite would replace: "
                             "give another --out")


def report(manifest, out):
    """Print what was kept and what was dropped."""
    total = sum(source["sequences"] for source in manifest["sources"])
    splits = ", ".join(f"{name} {count:,}" for name, count in manifest["splits"].items())
    print(f"{out}: kept {manifest['sequences']:,} of {total:,} sequences; {splits}")
    classes = ", ".join(f"{len(table)} {rank}" for rank, table in manifest["classes"].items())
    counts = ", ".join(f"{name} {count:,}" for name, count in manifest["superkingdoms"].items())
    print(f"classes: {classes}" + (f"; sequences: {counts}" if counts else ""))

    if manifest["dropped"]:
        label = "taxids" if manifest["taxdump"] else "labels"
        print(f"dropped:\n{'sequences':>12}  {label:>9}  reason, file")
        for row in manifest["dropped"]:
            print(f"{row['sequences']:>12,}  {row['taxids']:>9,}  {row['reason']}, {row['file']}")
    for source in manifest["sources"]:
        if source["letters_changed_to_N"]:
            print(f"{source['file']}: {source['letters_changed_to_N']:,} bases outside ACGTN "
                  "became N")

    repeated = manifest["repeated"]
    if repeated["sequences"]:
        print(f"{repeated['sequences']:,} sequences have the bases of an earlier one; "
              f"{repeated['test_in_train']:,} of the test split are in train too")
    if across := repeated["across_splits"]:
        pairs = ", ".join(f"{count:,} of {which}" for which, count in across.items())
        print(f"on either strand: {pairs}: {Path(out) / ACROSS} names them; "
              "--drop-duplicates leaves them out of training")
    if "without_training" in manifest:
        lacking = manifest["without_training"].items()
        lacking = ", ".join(f"{count:,} {rank} classes" for rank, count in lacking)
        print(f"note: no training sequence of {lacking}: nothing of them can be right")
    if "held_out" in manifest:
        rank = list(manifest["classes"])[-1]
        held = manifest["held_out"]
        names = ", ".join(row["name"] for row in held[:8]) + (", ..." if len(held) > 8 else "")
        print(f"held out, in the split unseen: {len(held)} {rank} classes ({names})")
    if "test_ids" in manifest:
        print("test split: {found:,} of the {sequences:,} sequences of {file}"
              .format_map(manifest["test_ids"]))

    dump = manifest["taxdump"]
    if dump:
        origin = f"taxonomy of {dump['date'] or 'unknown date'}"
    else:
        origin = f"labels of {manifest['sources'][0]['file']}"
    print(f"digest {manifest['digest'][:16]}, {origin}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill cleans up as Ctrl-C does
    run(main)
