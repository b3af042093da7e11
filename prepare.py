"""FASTA files and an NCBI taxonomy dump -> a prepared dataset folder: index, label, split, tokenize, in that order.

  python prepare.py --fasta Archaea_db.fa Bacteria_db.fa Eukaryota_db.fa Viruses_db.fa --taxdump taxdmp_2024-12-01.zip --out data/bertax
  python prepare.py --table mine.csv.gz --sequence-column dna --ranks family species --any-length --out data/mine   # labels of your own
  python prepare.py --demo --out data/demo                      # a small simulated corpus, no input needed
  python prepare.py --add-tokens tiny-dnabert --out data/demo   # tokens for another family of models, from what is prepared
  python prepare.py --describe data/demo --picture demo.png     # what is in a prepared folder
"""

import argparse
import functools
import hashlib
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np

from taxa import RANKS
from taxa.data import simulate
from taxa.data.dataset import RECORD, PreparedDataset, TokenWriter, write_manifest
from taxa.data.describe import describe, picture
from taxa.data.fasta import batches, index_fasta, is_gzip, normalize, read_sequences
from taxa.data.splits import SPLITS, copies, find_ids, read_ids, split_by_genus, write_ids
from taxa.data.table import check_columns, read_table
from taxa.data.taxonomy import SUPERKINGDOMS, check_ranks, keep_classes, label_taxids, renumber
from taxa.data.tokens import TOKENIZERS, get_tokenizer, nt_tokenizer
from taxa.errors import InputError
from taxa.runtime.cli import Parser, fraction, positive_int, run, seed
from taxa.runtime.files import locked, new_folder, save_array, sha256
from taxa.runtime.progress import progress
from taxa.runtime.workers import available_cores, in_order

# bytes on disk for sequences of 1500 letters (measured: nt 0.35, dnabert 0.42, tiny-dnabert 0.49)
NT_BYTES, BPE_BYTES = 0.36, 0.5  # tokens, labels and offsets, per letter
GZIP_RATIO = 4  # letters to bytes of gzip, about


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.group("input")
    add("--fasta", nargs="+", metavar="FILE", help="FASTA files, plain or gzip; headers '>TAXID INDEX' or '>TAXID'")
    add("--taxdump", metavar="FILE", help="NCBI taxonomy dump: taxdmp_YYYY-MM-DD.zip, taxdump.tar.gz, or a folder of its files")
    add("--table", metavar="FILE", help="instead of the two: a .csv or .tsv file (or .gz of it) with a header, a column of sequences and "
        "one of labels per rank")
    add("--sequence-column", metavar="NAME", help="--table: the column of sequences (default sequence)")
    add("--demo", action="store_true", help="simulate a small corpus instead of reading one")
    add("--demo-sequences", type=positive_int, metavar="N", help="sequences to simulate (default 4000)")
    add = parser.group("what is kept and how it is divided")
    add("--length", type=positive_int, metavar="BP", help="keep sequences of exactly this length (default 1500)")
    add("--ranks", nargs="+", metavar="RANK",
        help="ranks to label, one to eight of NCBI's, from coarse to fine, or columns of --table; one head each "
             f"(default {' '.join(RANKS)})")
    add("--classes-of", metavar="CKPT",
        help="an external test set: label by the classes of a ckpt.pt (or of a folder of export.py), drop and count what is of none of "
             "them, and put all the rest into the test split, for evaluate.py --data")
    add("--any-length", action="store_true", help="keep sequences of every length but 0")
    add("--test", type=fraction, metavar="F",
        help="share of each genus (class of the last rank) for the test split, above 0 (default 0.02)")
    add("--validation", type=fraction, metavar="F", help="share of each genus for the validation split, above 0 (default 0.10)")
    add("--test-ids", metavar="FILE",
        help="the test split is exactly these: test_ids.txt of a folder prepared before (default: chosen by --seed)")
    add("--group", type=pattern, metavar="REGEX",
        help="sequences of a genus whose headers agree in what REGEX finds are all in one split, e.g. '^[0-9]+' for the taxid (default: "
             "each sequence on its own)")
    add("--seed", type=seed, metavar="N", help="of the split, and of the simulation (default 42)")
    add = parser.group("tokens")
    add("--tokenizers", nargs="+", metavar="NAME",
        help=f"which tokens to write, of {' '.join(TOKENIZERS)}; nt is always written (default nt)")
    add("--add-tokens", nargs="+", metavar="NAME", help="add tokens to a folder that is prepared already")
    add("--tokenizer-file", metavar="FILE", help="tokenizer.json, for dnabert (default: DNABERT-2's, from the hub) or for bpe")
    add = parser.group("a look at what is there")
    add("--describe", metavar="DIR", help="print what is in a prepared folder, and write nothing")
    add("--picture", metavar="FILE",
        help="with --describe: histograms of class sizes and token lengths, a file .png, .pdf or .svg; needs matplotlib")
    add = parser.group("output")
    add("--out", metavar="DIR", help="the folder to write")
    add("--workers", type=positive_int, default=available_cores(), metavar="N",
        help="processes; what is written does not depend on it (default: the CPU cores, here %(default)s)")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    args = parser.parse_args(argv)
    if sum(bool(way) for way in (args.fasta, args.table, args.demo, args.add_tokens, args.describe)) != 1:
        parser.error("give either --fasta and --taxdump, or --table, or --demo, or --add-tokens, or --describe")
    if (args.out is None) != (args.describe is not None):
        parser.error("--describe writes nothing: leave out --out" if args.describe else "the following arguments are required: --out")
    if (args.fasta is None) != (args.taxdump is None):
        parser.error("--fasta and --taxdump go together")
    useless = ["fasta", "taxdump", "length", "any_length", "test", "validation", "test_ids", "group", "seed",
               "tokenizers", "ranks", "classes_of"] if args.add_tokens or args.describe else []
    useless += ["tokenizer_file", "overwrite"] if args.describe else ["picture"]
    useless += [] if args.demo else ["demo_sequences"]
    useless += ["group"] if args.table else ["sequence_column"]
    useless += ["length"] if args.any_length else []
    useless += ["test", "group"] if args.test_ids else []
    useless += ["ranks", "test", "validation", "test_ids", "group"] if args.classes_of else []
    for flag in useless:
        if getattr(args, flag) not in (None, False):
            parser.error(f"--{flag.replace('_', '-')} does nothing here: leave it out")
    if "nt" in (args.add_tokens or []):
        parser.error("--add-tokens nt: nt tokens are always there")
    for flag, default in (("demo_sequences", 4000), ("length", 1500), ("test", 0.02), ("validation", 0.10), ("seed", 42),
                          ("tokenizers", ["nt"]), ("ranks", RANKS), ("sequence_column", "sequence")):
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    if args.tokenizer_file and sum(name in ("dnabert", "bpe") for name in args.add_tokens or args.tokenizers) != 1:
        parser.error("--tokenizer-file is for one of the tokenizers dnabert and bpe: ask for it with --tokenizers or --add-tokens")
    args.classes = read_classes(args.classes_of) if args.classes_of else None
    args.ranks = tuple(args.classes or args.ranks)
    args.ranks = check_columns(args.ranks) if args.table else check_ranks(args.ranks)
    if args.test == 0 or args.validation == 0:
        parser.error("--test and --validation are above 0: every genus of three or more sequences is in all three splits")
    if args.test + args.validation >= 1:
        parser.error(f"--test {args.test} and --validation {args.validation} leave nothing to train on")
    return args


def read_classes(path):
    """{rank: [{"taxid", "name"}, ...]} of a checkpoint, or of a folder of export.py."""
    from taxa.training import checkpoint, peft_format  # they import transformers, which takes seconds

    return peft_format.read_labels(path) if Path(path).is_dir() else checkpoint.read(path)["classes"]


def pattern(text):
    """argparse type: a regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression ({error})") from None


def main(argv=None):
    args = parse_args(argv)
    if args.describe:
        data = PreparedDataset(args.describe)
        print("\n".join(describe(data)))
        if args.picture:
            picture(data, args.picture)
        return
    names = [name for name in args.add_tokens or args.tokenizers if name != "nt"]
    tokenizers = [get_tokenizer(name, args.tokenizer_file if name in ("dnabert", "bpe") else None) for name in names]
    if args.add_tokens is None:
        if args.overwrite:
            check_what_is_overwritten(Path(args.out), [] if args.demo else [args.table] if args.table else [*args.fasta, args.taxdump])
        with new_folder(args.out, args.overwrite) as out, in_order(args.workers) as mapped:
            if not args.demo:
                check_disk(out, disk_need(args.fasta or [args.table], len(names), bool(args.table)))
            else:
                paths = simulate.simulate(out / "source", args.demo_sequences, args.seed, args.length)
                args.fasta, args.taxdump = paths["fasta"], paths["taxdump"]
            with tempfile.TemporaryDirectory(dir=out, prefix=".scratch-") as scratch:
                manifest = prepare(args, out, Path(scratch), mapped)
            for tokenizer in tokenizers:
                PreparedDataset(out).add_tokens(tokenizer, progress, mapped)
        report(manifest, args.out)
        return
    data = PreparedDataset(args.out)
    for tokenizer in tokenizers:
        if data.has_tokens(tokenizer.name) and not args.overwrite:
            raise InputError(f"{args.out} has tokens of {tokenizer.name} already; --overwrite makes them again")
    with locked(data.folder), in_order(args.workers) as mapped:
        for leftover in data.folder.glob("*/.*.tmp"):  # of a killed run
            leftover.unlink()
        letters = 3 * sum((data.folder / split / "nt.bin").stat().st_size for split in SPLITS)
        check_disk(data.folder, len(names) * BPE_BYTES * letters)
        for tokenizer in tokenizers:
            data.add_tokens(tokenizer, progress, mapped)
            print(f"{args.out}: added tokens of {tokenizer.name}")


def disk_need(paths, bpe, copied=False):
    """Bytes that preparing files takes, about, if every sequence is kept; bpe: how many tokenizers besides nt.

    copied: the letters of the files are written beside the output first, as gzip's always are.
    """
    packed = {path: is_gzip(path) for path in paths if os.path.isfile(path)}
    letters = {path: os.path.getsize(path) * (GZIP_RATIO if packed[path] else 1) for path in packed}
    return sum(letters[path] for path in packed if packed[path] or copied) + sum(letters.values()) * (NT_BYTES + bpe * BPE_BYTES)


def check_disk(folder, need):
    """Say how much disk is needed; InputError when there is less."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(f"--out needs about {need / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free on its disk")
    print(f"needs about {need / 1e9:,.2f} GB of disk, {free / 1e9:,.2f} GB are free")


def check_what_is_overwritten(out, inputs):
    """--overwrite replaces prepared datasets only, and never the files that it is to read."""
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise InputError(f"--out {out} is not a prepared dataset, so --overwrite does not replace it: give another --out")
    for path in inputs:
        if Path(path).resolve().is_relative_to(out.resolve()):
            raise InputError(f"{path} lies in --out {out}, which --overwrite would replace: give another --out")


def prepare(args, out, scratch, mapped):
    """Write labels, records, nt tokens and the manifest of `args` into the empty folder `out`. Returns the manifest.

    mapped: what maps a function over jobs (taxa.runtime.workers).
    """
    sources = [Path(path) for path in ([args.table] if args.table else args.fasta)]
    if len({source.name for source in sources}) < len(sources):
        raise InputError("--fasta: two files have the same name; the manifest tells them apart by it")

    # index: where each record is, its taxid and length
    pinned_ids = read_ids(args.test_ids) if args.test_ids else None
    table = read_table(args.table, args.sequence_column, args.ranks, scratch, args.classes) if args.table else None
    fastas = [table.fasta] if table else sources
    indexes = [index_fasta(fasta, scratch, mapped, args.group) for fasta in progress(fastas, "index", unit="file")]
    source = np.repeat(np.arange(len(indexes)), [len(index.taxid) for index in indexes])  # (N,)
    record = np.concatenate([np.arange(len(index.taxid)) for index in indexes])
    taxid = np.concatenate([index.taxid for index in indexes])
    length = np.concatenate([index.length for index in indexes])

    # label: each distinct taxid once
    distinct, which = np.unique(taxid, return_inverse=True)
    if table:
        labels, names, notes = table.labels, table.names, table.notes
    else:
        labels, class_names, dump_date, dump_digest, notes = label_taxids(args.taxdump, distinct.tolist(), scratch, args.ranks)
        names = {rank: SUPERKINGDOMS if rank == "superkingdom" else class_names for rank in args.ranks}
    for note in notes:
        print(note)
    if args.classes:
        labels = keep_classes(labels, args.classes, table and table.names)
    wrong_length = (length == 0) if args.any_length else (length != args.length)
    length_reason = "no letters" if args.any_length else f"length is not {args.length}"
    reasons = ["", length_reason, *sorted({label.reason for label in labels.values() if label.reason})]
    reason = np.array([reasons.index(labels[t].reason or "") for t in distinct.tolist()])[which]
    reason[wrong_length] = 1
    dropped = drop_report(sources, source, taxid, reason, reasons)
    kept = np.flatnonzero(reason == 0)
    if not len(kept):
        why = ", ".join(f"{row['sequences']} in {row['file']}: {row['reason']}" for row in dropped)
        raise InputError(f"no sequence is left of {len(taxid)} ({why})")
    classes = {}
    y = np.empty((len(kept), len(args.ranks)), dtype="<u2")
    for column, rank in enumerate(args.ranks):
        of_distinct = np.array([labels[t].taxids[column] or 0 for t in distinct.tolist()])
        present, y[:, column] = np.unique(of_distinct[which[kept]], return_inverse=True)
        classes[rank] = [{"taxid": None if table else t, "name": names[rank][t]} for t in present.tolist()]
        if len(present) > np.iinfo(y.dtype).max:
            raise InputError(f"{len(present)} classes of rank {rank}: labels are 16-bit, at most {np.iinfo(y.dtype).max}")
    if args.classes:
        y, classes = renumber(y, classes, args.classes), args.classes

    # split
    taxid = np.zeros_like(taxid) if table else taxid  # the numbers of a table's labels mean nothing outside
    group, pinned, jobs = None, None, functools.partial(batches_of, sources, indexes, source[kept], record[kept], table)
    if args.group:
        group = np.concatenate([index.group for index in indexes])[kept]
    if args.test_ids:
        digest = np.concatenate(list(mapped(digest_batch, jobs())))
        pinned = find_ids(pinned_ids, taxid[kept], digest, copies(taxid[kept], digest))
        if not pinned.any():
            raise InputError(f"--test-ids {args.test_ids}: none of its {len(pinned_ids)} sequences is among the {len(kept)} kept")
    if args.classes:
        pinned = np.ones(len(kept), dtype=bool)
    split = split_by_genus(y[:, -1], args.seed, args.test, args.validation, group, pinned)
    for number, name in enumerate(SPLITS):
        (out / name).mkdir()
        rows = split == number
        records = np.rec.fromarrays((source[kept[rows]], record[kept[rows]], taxid[kept[rows]]), dtype=RECORD)
        save_array(out / name / "labels.npy", y[rows])
        save_array(out / name / "records.npy", records)

    # tokens: one pass over the letters, in input order within each split
    other_letters, digest, at = np.zeros(len(sources), dtype=np.int64), np.empty(len(kept), dtype=np.uint64), 0
    writers = [TokenWriter(out, name, nt_tokenizer().name) for name in SPLITS]
    with writers[0], writers[1], writers[2], progress(None, "nt tokens", len(kept), "sequences", True) as bar:
        for number, changed, some, ids, counts in mapped(encode_batch, jobs()):
            other_letters[number] += changed
            here = slice(at, at := at + len(counts))
            digest[here] = some
            for part, writer in enumerate(writers):
                mine = split[here] == part
                writer.append(ids[np.repeat(mine, counts)], counts[mine])
            bar.update(len(counts))
    in_test = split == SPLITS.index("test")
    write_ids(out / "test_ids.txt", taxid[kept][in_test], digest[in_test], copies(taxid[kept], digest)[in_test])
    digests = dict(zip(sources, mapped(sha256, sources)))

    manifest = {
        "sequences": len(kept),
        "splits": {name: int((split == number).sum()) for number, name in enumerate(SPLITS)},
        "superkingdoms": {row["name"]: int((y[:, args.ranks.index("superkingdom")] == i).sum())
                          for i, row in enumerate(classes.get("superkingdom", []))},
        "settings": {"length": None if args.any_length else args.length, "test": args.test, "validation": args.validation,
                     "seed": args.seed, **({"group": args.group.pattern} if args.group else {}),
                     **({"sequence_column": args.sequence_column} if table else {}),
                     **({"classes_of": Path(args.classes_of).name} if args.classes else {})},
        "sources": [{"file": path.name, "bytes": path.stat().st_size, "sha256": digests[path], "sequences": len(index.taxid),
                     "letters_changed_to_N": int(changed)} for path, index, changed in zip(sources, indexes, other_letters)],
        "taxdump": None if table else {"file": Path(args.taxdump).name, "date": dump_date, "sha256": dump_digest},
        "dropped": dropped,
        "repeated": {"sequences": len(kept) - len(np.unique(digest)),
                     "test_in_train": int(np.isin(digest[in_test], digest[split == SPLITS.index("train")]).sum())},
        **({"test_ids": {"file": Path(args.test_ids).name, "sha256": sha256(args.test_ids), "sequences": len(pinned_ids),
                         "found": int(in_test.sum())}} if args.test_ids else {}),
        "classes": classes,
    }
    return write_manifest(out, manifest, nt_tokenizer())


def batches_of(sources, indexes, source, record, table=None):
    """Yield jobs (number of the file, its path, Index of some records, their numbers, their lines or None) for what is kept.

    source, record: (N,), in order. table: what the records are rows of, if they are.
    """
    for number, index in enumerate(indexes):
        records = record[slice(*np.searchsorted(source, (number, number + 1)))]
        index = index.take(records)
        for some in batches(index):
            yield number, sources[number], index.take(some), records[some], table.lines[records[some]] if table else None


def read_batch(job):
    """(letters in ACGTN, how many became N, digest of each sequence's letters (n,) uint64) of a job of batches_of."""
    _, path, index, records, lines = job
    letters, changed = normalize(read_sequences(index), index.length, lambda i: (
        f"{path}: record {records[i] + 1} '>{index.taxid[i]}'" if lines is None else f"{path}: line {lines[i]}"))
    ends = np.cumsum(index.length).tolist()
    digests = b"".join([hashlib.blake2b(letters[end - length:end], digest_size=8).digest()
                        for end, length in zip(ends, index.length.tolist())])
    return letters, changed, np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def digest_batch(job):
    return read_batch(job)[2]


def encode_batch(job):
    """(number of the file, letters changed to N, digests, nt ids joined, ids per sequence) of a job of batches_of."""
    letters, changed, digests = read_batch(job)
    return job[0], changed, digests, *nt_tokenizer().encode(letters, job[2].length)


def drop_report(sources, source, taxid, reason, reasons):
    """Rows {"file", "reason", "sequences", "taxids"} for everything that was not kept."""
    rows = []
    for number, path in enumerate(sources):
        for code in range(1, len(reasons)):
            where = (source == number) & (reason == code)
            if where.any():
                rows.append({"file": path.name, "reason": reasons[code], "sequences": int(where.sum()),
                             "taxids": len(np.unique(taxid[where]))})
    return rows


def report(manifest, out):
    """Print what was kept and what was dropped."""
    total = sum(source["sequences"] for source in manifest["sources"])
    print(f"{out}: kept {manifest['sequences']:,} of {total:,} sequences; "
          + ", ".join(f"{name} {count:,}" for name, count in manifest["splits"].items()))
    print("classes: " + ", ".join(f"{len(table)} {rank}" for rank, table in manifest["classes"].items())
          + ("; sequences: " if manifest["superkingdoms"] else "")
          + ", ".join(f"{name} {count:,}" for name, count in manifest["superkingdoms"].items()))
    if manifest["dropped"]:
        print(f"dropped:\n{'sequences':>12}  {'taxids' if manifest['taxdump'] else 'labels':>9}  reason, file")
        for row in manifest["dropped"]:
            print(f"{row['sequences']:>12,}  {row['taxids']:>9,}  {row['reason']}, {row['file']}")
    for source in manifest["sources"]:
        if source["letters_changed_to_N"]:
            print(f"{source['file']}: {source['letters_changed_to_N']:,} letters outside ACGTN became N")
    if manifest["repeated"]["sequences"]:
        print("{sequences:,} sequences have the letters of an earlier one; {test_in_train:,} of the test split are in train too"
              .format_map(manifest["repeated"]))
    if "test_ids" in manifest:
        print("test split: {found:,} of the {sequences:,} sequences of {file}".format_map(manifest["test_ids"]))
    dump = manifest["taxdump"]
    origin = f"taxonomy of {dump['date'] or 'unknown date'}" if dump else f"labels of {manifest['sources'][0]['file']}"
    print(f"digest {manifest['digest'][:16]}, {origin}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill cleans up as Ctrl-C does
    run(main)
