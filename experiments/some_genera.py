"""FASTA of some genera, equally many sequences of each: to vary the number of classes.

  python experiments/some_genera.py --fasta real/*_db.fa --taxdump real/taxdmp.zip \\
      --genera 4 12 40 --each 400 --out data/some
  python prepare.py --fasta data/some/4.fa --taxdump real/taxdmp.zip --ranks genus --out data/four

The genera with at least --each sequences are shuffled once, and N of them are the first N: smaller
sets are parts of larger ones. Of a genus the first --each sequences are taken. Headers are
`>TAXID ...` as prepare.py wants them, with one line of bases a record.
"""

import collections
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taxa.data.taxonomy import label_taxids
from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_int, run, seed
from taxa.runtime.files import replacing


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--fasta", nargs="+", required=True, metavar="FILE")
    add("--taxdump", required=True, metavar="FILE")
    add("--genera", nargs="+", type=positive_int, required=True, metavar="N",
        help="how many genera; one file for each number")
    add("--each", type=positive_int, default=400, metavar="N",
        help="sequences of a genus (default 400)")
    add("--seed", type=seed, default=1, metavar="N",
        help="of the shuffle of genera (default 1)")
    add("--out", required=True, metavar="DIR", help="N.fa for each number of genera")
    return parser.parse_args(argv)


def read_records(paths):
    """{taxid: [record]} of FASTA files; a record is its header and one line of bases, as text."""
    records = collections.defaultdict(list)
    for path in paths:
        try:
            for record in Path(path).read_text(encoding="ascii").split(">")[1:]:
                header, _, lines = record.partition("\n")
                bases = lines.replace("\n", "")
                records[int(header.split()[0])].append(f">{header}\n{bases}\n")
        except (OSError, ValueError, IndexError) as error:
            raise InputError(f"--fasta {path}: not a plain FASTA file with a taxid "
                             f"at the start of each header ({error})") from None
    return records


def main(argv=None):
    args = parse_args(argv)
    records = read_records(args.fasta)
    with tempfile.TemporaryDirectory() as scratch:
        labels = label_taxids(args.taxdump, sorted(records), Path(scratch), ["genus"]).labels
    genera = collections.defaultdict(list)  # {genus: [record]}
    for taxid in sorted(records):
        genus = labels[taxid].taxids[0]
        if genus is not None:
            genera[genus] += records[taxid]
    large = sorted(genus for genus, members in genera.items() if len(members) >= args.each)
    random.Random(args.seed).shuffle(large)
    if max(args.genera) > len(large):
        raise InputError(f"--genera {max(args.genera)}: {len(large)} genera have "
                         f"{args.each} sequences or more")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for number in args.genera:
        with replacing(Path(args.out) / f"{number}.fa") as partial, \
                open(partial, "w", encoding="ascii") as file:
            for genus in large[:number]:
                file.writelines(genera[genus][:args.each])
    taken = " ".join(map(str, large[:max(args.genera)]))
    print(f"{len(large)} genera have {args.each} sequences or more; taken: {taken}")


if __name__ == "__main__":
    run(main)
