"""Simulated genomes of any number of genera, more like real ones than the demo's: for pretraining
and for few or many classes.

  python experiments/genomes.py --out data/sim --genera 3000 --sequences 90000 --seed 1
  python prepare.py --fasta data/sim/*_db.fa --taxdump data/sim/taxdmp_simulated.zip --out data/mlm

The script writes four FASTA files in BERTax's layout and a taxonomy dump of made-up taxa; none is a
taxon of the demo. A fragment of 1,500 bases is a mosaic of genes and of what lies between them, on
both strands:

  genes           codons drawn one by one: Swiss-Prot's mean amino-acid frequencies through the
                  standard genetic code, tilted by the genome's G+C and by its own codon
                  preferences; some 300 codons long, on either strand, in any phase
  between genes   the demo's Markov chain of order 1: each genome has its own dinucleotides, and the
                  same G+C tilt

G+C tilt, codon preferences, dinucleotides and the share of genes are each a sum of root,
superkingdom, phylum and genus, with normal noise at every rank, so relatives are alike. A masked
6-mer (two codons) is predictable from the rest of the fragment, as in real DNA, by what the genome
prefers, by phase and by strand. There are no repeats, no homology and no genes in common: no
biology follows from it.
"""

import sys
import zipfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taxa.data.simulate import LETTERS, SHARE, fragments
from taxa.errors import InputError
from taxa.runtime.cli import Parser, positive_int, run, seed
from taxa.runtime.files import replacing
from taxa.runtime.progress import progress

LENGTH = 1500  # bases of a fragment
CHUNK = 2048  # fragments made at a time
SUPERKINGDOMS = {2157: "Archaea", 2: "Bacteria", 2759: "Eukaryota", 10239: "Viruses"}
FIRST_TAXID = 800_000_001  # far above NCBI's
# The standard code: codons over A C G T, the last letter fastest.
CODE = "KNKNTTTTRSRSIIMIQHQHPPPPRRRRLLLLEDEDAAAAGGGGVVVV*Y*YSSSS*CWCLFLF"
AMINO_ACIDS = {  # percent, Swiss-Prot
    "A": 8.25, "R": 5.53, "N": 4.06, "D": 5.46, "C": 1.38,
    "Q": 3.93, "E": 6.72, "G": 7.07, "H": 2.27, "I": 5.91,
    "L": 9.65, "K": 5.80, "M": 2.41, "F": 3.86, "P": 4.74,
    "S": 6.65, "T": 5.36, "W": 1.10, "Y": 2.92, "V": 6.86,
}
IS_GC = np.array([0, 1, 1, 0])  # A C G T
NOISE = {  # standard deviations of the noise at root, superkingdom, phylum, genus
    "gc": (0.1, 0.25, 0.35, 0.2),
    "codon": (0.1, 0.15, 0.25, 0.2),
    "chain": (0.15, 0.15, 0.15, 0.12),
    "genes": (0.5, 1.0, 0.8, 0.4),
}
TABLE = 4096  # a codon is drawn with one number in 0 .. TABLE - 1
GENE, GAP = 900, 250  # mean bases


def tree(genera, phyla):
    """(superkingdom number 0-3, phylum number) of each genus.

    Genera and phyla are dealt out by SHARE; every superkingdom has at least one phylum.
    """
    share = np.cumsum([0] + [SHARE[name] for name in SUPERKINGDOMS.values()]) / 100
    ends = np.rint(share * (genera - 4)).astype(int) + np.arange(5)
    of_phyla = np.rint(share * (phyla - 4)).astype(int) + np.arange(5)
    lineages = []
    for k in range(4):
        phyla_here = of_phyla[k + 1] - of_phyla[k]
        for i in range(ends[k + 1] - ends[k]):
            lineages.append((k, of_phyla[k] + i % phyla_here))
    return lineages


def genomes(lineages, rng):
    """(thresholds, codons, genes) of G genera.

    thresholds: the three arrays of the genera's chains, as in taxa.data.simulate. codons: (G,
    TABLE) uint8. genes: (G,), the share of genes.
    """
    k, p = np.array(lineages).T

    def evolve(what, *shape):
        """(G, *shape): the noise of a genus and of what it belongs to."""
        root, superkingdom, phylum, genus = NOISE[what]
        return (
            root * rng.standard_normal((1, *shape))
            + superkingdom * rng.standard_normal((4, *shape))[k]
            + phylum * rng.standard_normal((p.max() + 1, *shape))[p]
            + genus * rng.standard_normal((len(k), *shape))
        )

    tilt = evolve("gc")  # (G,): log-odds of one C or G
    chain = np.exp(evolve("chain", 4, 4) + tilt[:, None, None] * IS_GC)  # (G, context, letter)
    cumulative = np.cumsum(chain / chain.sum(axis=2, keepdims=True), axis=2).reshape(-1, 4)
    thresholds = [np.rint(cumulative[:, i] * 65535).astype(np.uint16) for i in range(3)]
    gc = np.array([IS_GC[c >> 4] + IS_GC[c >> 2 & 3] + IS_GC[c & 3] for c in range(64)])
    synonyms = np.array([CODE.count(c) for c in CODE])
    usage = np.array([AMINO_ACIDS.get(c, 0.3) for c in CODE]) / synonyms
    codon = usage * np.exp(evolve("codon", 64) + tilt[:, None] * gc)
    ends = np.rint(np.cumsum(codon / codon.sum(axis=1, keepdims=True), axis=1) * TABLE).astype(int)
    ends[:, -1] = TABLE
    every = np.arange(64, dtype=np.uint8)
    codons = np.stack([np.repeat(every, np.diff(row, prepend=0)) for row in ends])
    genes = 1 / (1 + np.exp(-0.8 - evolve("genes")))
    return thresholds, codons, genes


def mosaic(genome, which, rng):
    """Fragments of the genera `which` (n,) -> ASCII (n, LENGTH)."""
    thresholds, codons, genes = genome
    n = len(which)
    letters = fragments(thresholds, which, LENGTH, rng)  # all between genes; genes are laid over it
    drawn = codons[which[:, None], rng.randint(0, TABLE, (n, LENGTH // 3 + 2))]  # (n, codons)
    bases = drawn >> 4, drawn >> 2 & 3, drawn & 3  # of each codon, 0 .. 3
    coding = LETTERS[np.stack(bases, axis=2).reshape(n, -1)]
    reverse = LETTERS[3 - np.stack(bases[::-1], axis=2).reshape(n, -1)]  # 3 - base: A<->T, C<->G
    for i, share in enumerate(genes[which].tolist()):
        if share > 0.5:
            gap = max(20, GENE * (1 - share) / share)
        else:
            gap = GAP / max(share, 0.05)
        position = 0
        in_gene = rng.random_sample() < share
        while position < LENGTH:
            stop = position + 1 + int(rng.exponential(GENE if in_gene else gap))
            if in_gene:
                phase = rng.randint(3)
                source = coding if rng.randint(2) else reverse
                letters[i, position:stop] = source[i, position + phase:min(stop, LENGTH) + phase]
            position = stop
            in_gene = not in_gene
    return letters


def write_taxdump(path, lineages):
    """The made-up taxa in NCBI's format. Returns the taxid of each genus's species."""
    superkingdoms = list(SUPERKINGDOMS)
    n_phyla = max(p for _, p in lineages) + 1
    # (taxid, parent, rank, name)
    rows = [(1, 1, "no rank", "root"), (131567, 1, "no rank", "cellular organisms")]
    for taxid, name in SUPERKINGDOMS.items():
        rows.append((taxid, 1 if name == "Viruses" else 131567, "superkingdom", name))
    for k, p in sorted(set(lineages)):
        name = f"simulated phylum {p + 1}"
        rows.append((FIRST_TAXID + p, superkingdoms[k], "phylum", name))
    for g, (_, p) in enumerate(lineages):
        taxid = FIRST_TAXID + n_phyla + 2 * g
        rows += [
            (taxid, FIRST_TAXID + p, "genus", f"Simulated genus {g + 1}"),
            (taxid + 1, taxid, "species", f"Simulated genus {g + 1} sp."),
        ]
    other_columns = ("", 8, 0, 1, 0, 0, 0, 0, 0, "")
    members = {
        "nodes.dmp": "".join(row(t, up, rank, *other_columns) for t, up, rank, _ in rows),
        "names.dmp": "".join(row(t, name, "", "scientific name") for t, _, _, name in rows),
        "merged.dmp": "",
        "delnodes.dmp": "",
    }
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        for member, text in members.items():
            archive.writestr(zipfile.ZipInfo(member, date_time=(2024, 12, 1, 0, 0, 0)), text)
    return [FIRST_TAXID + n_phyla + 2 * g + 1 for g in range(len(lineages))]


def row(*fields):
    """A line of a table of NCBI's dump."""
    return "\t|\t".join(map(str, fields)) + "\t|\n"


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR",
        help="folder to write four FASTA files and the taxdump to")
    add("--genera", type=positive_int, required=True, help="how many, at least 8")
    add("--phyla", type=positive_int,
        help="how many (default a sixth of the genera, at most 60)")
    add("--sequences", type=positive_int, required=True,
        help="in all, the same number for every genus up to rounding")
    add("--seed", type=seed, default=0, help="other genomes (default 0)")
    args = parser.parse_args(argv)
    args.phyla = args.phyla or min(60, max(4, args.genera // 6))
    if args.genera < 8 or args.phyla < 4 or args.genera < 2 * args.phyla:
        parser.error("at least 8 genera, 4 phyla, and twice as many genera as phyla")
    return args


def main(argv=None):
    args = parse_args(argv)
    rng = np.random.RandomState([args.seed, 2])
    lineages = tree(args.genera, args.phyla)
    genome = genomes(lineages, rng)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out {out}: {error.strerror}") from None
    taxids = np.array(write_taxdump(out / "taxdmp_simulated.zip", lineages))
    order = np.arange(args.sequences) * args.genera // args.sequences  # the genus of each sequence
    rng.shuffle(order)
    superkingdom = np.array(lineages)[order, 0]
    with progress(None, "genomes", args.sequences, "sequences", True) as bar:
        for number, name in enumerate(SUPERKINGDOMS.values()):
            mine = order[superkingdom == number]
            with replacing(out / f"{name}_db.fa") as temporary, open(temporary, "wb") as file:
                for start in range(0, len(mine), CHUNK):
                    which = mine[start:start + CHUNK]
                    records = zip(taxids[which].tolist(), mosaic(genome, which, rng))
                    file.writelines(
                        b">%d %d\n%b\n" % (taxid, i, letters.tobytes())
                        for i, (taxid, letters) in enumerate(records, start=start)
                    )
                    bar.update(len(which))
    print(f"{out}: {args.sequences:,} sequences of {args.genera:,} genera "
          f"in {args.phyla} phyla, seed {args.seed}")


if __name__ == "__main__":
    run(main)
