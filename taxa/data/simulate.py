"""A corpus in BERTax's layout, simulated: no genome of a living thing.

It is for demos, tests and timings without a download.

    python -m taxa.data.simulate --out simulated --sequences 8000
    python -m taxa.data.simulate --out simulated --study      # the study's size and shape, 7.8 GB

The first writes Archaea_db.fa, Bacteria_db.fa, Eukaryota_db.fa, Viruses_db.fa and
taxdmp_simulated.zip. A FASTA record is `>TAXID INDEX` and one line of 1500 upper-case bases. INDEX
restarts at 0 in every file. The taxa of a file are interleaved at random.

The taxonomy is TREE below: real NCBI taxa, one species to a genus, with no ranks between
superkingdom, phylum, genus and species.

The genomes are not real. Each species is one Markov chain over A, C, G, T: the next base depends on
the ORDER bases before it. ORDER = 1 gives each species its own dinucleotide composition and nothing
else, the "genomic signature" of Karlin & Burge 1995, which a small network finds in minutes. The
chains evolve down the tree,

    logits(species) = root + superkingdom + phylum + genus

each term a table (CONTEXTS, 4) of N(0, SCALE[rank]) noise. So relatives are alike, and the rank
with more and closer classes is the harder one. There are no genes, strands or repeats, and every
fragment is an independent draw: a random split is a fair one here, and no biology follows from the
results.

How hard it is: balanced accuracy on 12% held out of 8000 sequences (seed 0), from the counts of
their 250 non-overlapping 6-mers:

                                      superkingdom  phylum  genus
    multinomial naive Bayes                   0.997   0.891  0.755
    multinomial logistic regression           1.000   0.879  0.724

(naive Bayes with alpha = 0.5 and a uniform prior; regression on (count - mean) / sqrt(mean + 0.01),
C = 0.001, balanced class weights).

--study is for timing: 5,181,880 sequences in the study's proportions, 1,884 genera in 57 phyla, the
taxa of TREE and as many invented ones ("simulated genus 55") as that takes, genus sizes in
proportion to 1 / (rank + 20). It is written some ten times as fast: a fragment is six-letter words
drawn from its species' chain, each on its own, cut at a random place in the first. Two fragments in
a hundred have a run of Ns.

The bytes depend on the arguments alone, not on the machine or the versions of Python and numpy.
numpy has frozen the streams of RandomState, and probabilities are rounded to 16-bit integers before
a letter is chosen, so the last bits of exp do not matter.
"""

import functools
import itertools
import os
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np

from taxa.errors import InputError
from taxa.runtime.cli import Parser, non_negative_int, positive_int, run
from taxa.runtime.files import replacing
from taxa.runtime.progress import progress as progress_bar

# (NCBI taxid, scientific name) as of December 2024. A row is a genus and its species. In each
# superkingdom the genera go from the most to the fewest sequences.
TREE = {
    (2157, "Archaea"): {
        (28890, "Methanobacteriota"): [
            ((2207, "Methanosarcina"), (2209, "Methanosarcina mazei")),
            ((2233, "Archaeoglobus"), (2234, "Archaeoglobus fulgidus")),
            ((2239, "Halobacterium"), (2242, "Halobacterium salinarum")),
        ],
        (28889, "Thermoproteota"): [
            ((12914, "Acidianus"), (2283, "Acidianus ambivalens")),
            ((2100760, "Saccharolobus"), (43080, "Saccharolobus islandicus")),
            ((2284, "Sulfolobus"), (2285, "Sulfolobus acidocaldarius")),
        ],
        (651137, "Nitrososphaerota"): [
            ((338191, "Nitrosopumilus"), (338192, "Nitrosopumilus maritimus")),
            ((497726, "Nitrososphaera"), (1034015, "Nitrososphaera viennensis")),
            ((46769, "Cenarchaeum"), (46770, "Cenarchaeum symbiosum")),
        ],
    },
    (2, "Bacteria"): {
        (1224, "Pseudomonadota"): [
            ((561, "Escherichia"), (562, "Escherichia coli")),
            ((286, "Pseudomonas"), (287, "Pseudomonas aeruginosa")),
            ((662, "Vibrio"), (666, "Vibrio cholerae")),
        ],
        (1239, "Bacillota"): [
            ((1279, "Staphylococcus"), (1280, "Staphylococcus aureus")),
            ((1301, "Streptococcus"), (1314, "Streptococcus pyogenes")),
            ((1485, "Clostridium"), (1502, "Clostridium perfringens")),
        ],
        (201174, "Actinomycetota"): [
            ((1763, "Mycobacterium"), (1773, "Mycobacterium tuberculosis")),
            ((1883, "Streptomyces"), (1902, "Streptomyces coelicolor")),
            ((1716, "Corynebacterium"), (1717, "Corynebacterium diphtheriae")),
        ],
        (976, "Bacteroidota"): [
            ((816, "Bacteroides"), (817, "Bacteroides fragilis")),
            ((836, "Porphyromonas"), (837, "Porphyromonas gingivalis")),
            ((237, "Flavobacterium"), (986, "Flavobacterium johnsoniae")),
        ],
        (203691, "Spirochaetota"): [
            ((157, "Treponema"), (160, "Treponema pallidum")),
            ((171, "Leptospira"), (173, "Leptospira interrogans")),
            ((64895, "Borreliella"), (139, "Borreliella burgdorferi")),
        ],
    },
    (2759, "Eukaryota"): {
        (7711, "Chordata"): [
            ((9605, "Homo"), (9606, "Homo sapiens")),
            ((10088, "Mus"), (10090, "Mus musculus")),
            ((9030, "Gallus"), (9031, "Gallus gallus")),
        ],
        (35493, "Streptophyta"): [
            ((3701, "Arabidopsis"), (3702, "Arabidopsis thaliana")),
            ((4527, "Oryza"), (4530, "Oryza sativa")),
            ((4575, "Zea"), (4577, "Zea mays")),
        ],
        (6656, "Arthropoda"): [
            ((7215, "Drosophila"), (7227, "Drosophila melanogaster")),
            ((7459, "Apis"), (7460, "Apis mellifera")),
            ((13685, "Solenopsis"), (13686, "Solenopsis invicta")),
        ],
        (4890, "Ascomycota"): [
            ((4930, "Saccharomyces"), (4932, "Saccharomyces cerevisiae")),
            ((5052, "Aspergillus"), (46472, "Aspergillus versicolor")),
            ((5140, "Neurospora"), (5141, "Neurospora crassa")),
        ],
        (6231, "Nematoda"): [
            ((6237, "Caenorhabditis"), (6239, "Caenorhabditis elegans")),
            ((6278, "Brugia"), (6279, "Brugia malayi")),
            ((6333, "Trichinella"), (6334, "Trichinella spiralis")),
        ],
        (5794, "Apicomplexa"): [
            ((5820, "Plasmodium"), (5833, "Plasmodium falciparum")),
            ((5810, "Toxoplasma"), (5811, "Toxoplasma gondii")),
            ((5806, "Cryptosporidium"), (5807, "Cryptosporidium parvum")),
        ],
        (33682, "Euglenozoa"): [
            ((5690, "Trypanosoma"), (5691, "Trypanosoma brucei")),
            ((5658, "Leishmania"), (5661, "Leishmania donovani")),
            ((5655, "Crithidia"), (5656, "Crithidia fasciculata")),
        ],
    },
    (10239, "Viruses"): {
        (2732408, "Pisuviricota"): [
            (
                (694002, "Betacoronavirus"),
                (694009, "Severe acute respiratory syndrome-related coronavirus"),
            ),
            ((12059, "Enterovirus"), (138950, "Enterovirus C")),
            ((142786, "Norovirus"), (11983, "Norwalk virus")),
        ],
        (2732409, "Artverviricota"): [
            ((11646, "Lentivirus"), (11676, "Human immunodeficiency virus 1")),
            ((10405, "Orthohepadnavirus"), (10407, "Hepatitis B virus")),
            ((10639, "Caulimovirus"), (10641, "Cauliflower mosaic virus")),
        ],
        (2732007, "Nucleocytoviricota"): [
            ((10242, "Orthopoxvirus"), (10244, "Monkeypox virus")),
            ((39743, "Asfivirus"), (10497, "African swine fever virus")),
            ((10492, "Ranavirus"), (10493, "Frog virus 3")),
        ],
    },
}
ROOT, CELLULAR = (1, "root"), (131567, "cellular organisms")
MERGED = [(31968, 1239), (325213, 1280)]  # (old taxid, the taxid it was merged into)
# Percent of the sequences, as in the study.
SHARE = {"Archaea": 10, "Bacteria": 35, "Eukaryota": 50, "Viruses": 5}
# NCBI's (division, genetic code, mitochondrial genetic code); one triple per superkingdom here,
# finer in NCBI's dump.
CODES = {
    "root": (8, 1, 0),
    "cellular organisms": (8, 1, 0),
    "Archaea": (0, 11, 0),
    "Bacteria": (0, 11, 0),
    "Eukaryota": (1, 1, 1),
    "Viruses": (9, 1, 0),
}

ORDER = 1  # bases that the next one depends on
CONTEXTS = 4 ** ORDER
# Standard deviation of each term's noise.
SCALE = {"root": 0.3, "superkingdom": 0.4, "phylum": 0.16, "genus": 0.14}
LETTERS = np.frombuffer(b"ACGT", dtype=np.uint8)
# (4096, 3): words of six bases, two to a number
WORDS = LETTERS[np.arange(4096)[:, None] >> np.arange(10, -1, -2) & 3].view(np.uint16)
# Sequences (Berman et al. 2025), phyla and genera. In all 57 and 1,884, invented per superkingdom.
STUDY = {
    "Archaea": (524_276, 8, 130),
    "Bacteria": (1_828_018, 22, 760),
    "Eukaryota": (2_601_890, 20, 820),
    "Viruses": (227_696, 7, 174),
}
STUDY_SEQUENCES = sum(sequences for sequences, _, _ in STUDY.values())
FIRST_INVENTED, FIRST_UNUSED = 900_000_001, 1_000_000_001  # taxids far above NCBI's
# Records simulated at a time, some 15 kB of memory each. The output does not depend on it.
CHUNK = 4096


def species():
    """Return each species of TREE as its lineage.

    A lineage is (taxid, name) of superkingdom, phylum, genus and species.
    """
    return [
        (superkingdom, phylum, genus, leaf)
        for superkingdom, phyla in TREE.items()
        for phylum, genera in phyla.items()
        for genus, leaf in genera
    ]


def counts(sequences):
    """Return how many sequences each species has, in the order of species().

    Their sum is `sequences`. Every species has a hundredth of the sequences, at least 1 and at most
    20. The rest goes to the superkingdoms by SHARE, and within one to its species in proportion to
    1/4, 1/5, 1/6, ... Raises InputError for fewer sequences than species.
    """
    lineages = species()
    if sequences < len(lineages):
        raise InputError(
            f"{sequences} sequences are fewer than the {len(lineages)} species, and each has at "
            "least one"
        )
    percent = []  # exact fractions: floating-point sums differ between versions of Python
    for superkingdom, phyla in TREE.items():
        weights = [Fraction(1, 4 + i) for i in range(sum(map(len, phyla.values())))]
        percent += [SHARE[superkingdom[1]] * weight / sum(weights) for weight in weights]
    least = max(1, min(20, sequences // 100))
    rest = sequences - least * len(lineages)
    ends = [round(rest * sum(percent[:i]) / 100) for i in range(len(percent) + 1)]
    return [least + end - start for start, end in itertools.pairwise(ends)]


def thresholds(seed, lineages):
    """Return the chains of all species as three uint16 arrays (species * CONTEXTS,).

    A row is species * CONTEXTS + context. The three are the cumulative probabilities of A, C and G
    in units of 1/65535: the next letter is the number of thresholds of its row that are <= u, with
    u uniform in 0 .. 65535. A context is the ORDER bases before, read as a number in base 4.
    """
    rng = np.random.RandomState([seed, 0])
    noise = {}  # taxid -> (CONTEXTS, 4)
    rows = []
    for lineage in lineages:
        for rank, (taxid, _) in zip(SCALE, (ROOT, *lineage)):
            if taxid not in noise:
                noise[taxid] = SCALE[rank] * rng.standard_normal((CONTEXTS, 4))
        rows.append(sum(noise[taxid] for taxid, _ in (ROOT, *lineage[:3])))
    odds = np.exp(np.concatenate(rows))  # (species * CONTEXTS, 4)
    cumulative = np.cumsum(odds / odds.sum(axis=1, keepdims=True), axis=1)
    return [np.rint(cumulative[:, i] * 65535).astype(np.uint16) for i in range(3)]


def fragments(chains, which, length, rng):
    """Simulate one fragment for each entry of `which` (n,), an index of species().

    `chains` is what thresholds() returns. The first ORDER bases are uniform. Each fragment in turn
    takes the next `length` 16-bit numbers of the RandomState `rng`, rounded up to an even number:
    how records are chunked does not show. Returns ASCII, uint8 (n, length).
    """
    even = length + length % 2
    draws = np.frombuffer(rng.bytes(2 * even * len(which)), dtype="<u2").reshape(len(which), even)
    draws = np.ascontiguousarray(draws.T)  # (even, n): a row is one step of all fragments
    codes = np.empty((length, len(which)), dtype=np.uint8)
    first_row = which.astype(np.intp) * CONTEXTS
    context = np.zeros(len(which), dtype=np.intp)
    for step in range(length):
        if step < ORDER:
            codes[step] = draws[step] >> 14
        else:
            row = first_row + context
            codes[step] = sum(chain[row] <= draws[step] for chain in chains)
        context = (context * 4 + codes[step]) % CONTEXTS
    return LETTERS[np.ascontiguousarray(codes.T)]


def study_lineages():
    """The lineages of --study, as species() gives them.

    TREE's taxa come first, then invented ones, genera dealt out to the phyla in turn.
    """
    lineages = []
    taxid = FIRST_INVENTED
    phyla = 0
    genera = 0
    for superkingdom, known in TREE.items():
        _, n_phyla, n_genera = STUDY[superkingdom[1]]
        tables = list(known.items())
        for _ in range(n_phyla - len(tables)):
            phyla += 1
            tables.append(((taxid, f"simulated phylum {phyla}"), []))
            taxid += 1
        for phylum, members in tables:
            lineages += [(superkingdom, phylum, genus, leaf) for genus, leaf in members]
        for i in range(n_genera - sum(len(members) for _, members in tables)):
            genera += 1
            phylum = tables[-1 - i % n_phyla][0]
            genus = (taxid, f"Simulated genus {genera}")
            leaf = (taxid + 1, f"Simulated genus {genera} sp.")
            lineages.append((superkingdom, phylum, genus, leaf))
            taxid += 2
    return lineages


def study_counts(sequences):
    """Sequences of each of study_lineages().

    They are the study's shares of the superkingdoms, Zipf-like within, at least 3 each; exact
    integers.
    """
    sizes = []
    end = 0
    for name, (share, _, genera) in STUDY.items():
        end += share
        before = sequences * (end - share) // STUDY_SEQUENCES
        total = sequences * end // STUDY_SEQUENCES - before
        rest = total - 3 * genera
        if rest < 0:
            raise InputError(
                f"{sequences} sequences are too few for --study: {genera} genera of {name} have "
                "at least 3 each"
            )
        weights = [10**9 // (20 + i) for i in range(genera)]
        ends = [rest * sum(weights[:i]) // sum(weights) for i in range(genera + 1)]
        sizes += [3 + stop - start for start, stop in itertools.pairwise(ends)]
    return sizes


def study_words(chains):
    """For each species its 16,384 six-letter words: a word as often as its chain gives it.

    Returns (species, 16384) uint16, numbers in base 4.
    """
    # (species, context, 3)
    cumulative = np.stack([chain.reshape(-1, CONTEXTS) for chain in chains], axis=-1) / 65535
    step = np.diff(cumulative, axis=-1, prepend=0, append=1)  # (species, context, next letter)
    words = step.mean(axis=1)  # the first letter
    for _ in range(5):
        context = np.arange(words.shape[1]) % CONTEXTS
        words = (words[:, :, None] * step[:, context]).reshape(len(step), -1)
    ends = np.rint(np.cumsum(words, axis=1) * 16384).astype(np.int64)
    ends[:, -1] = 16384
    numbers = np.arange(4096, dtype=np.uint16)
    return np.stack([np.repeat(numbers, np.diff(row, prepend=0)) for row in ends])


def study_fragments(words, which, length, rng):
    """As fragments(), from study_words(): quicker, since a draw gives six bases."""
    n = -(-length // 6) + 1
    draws = np.frombuffer(rng.bytes(2 * n * len(which)), dtype="<u2").reshape(len(which), n)
    drawn = which.astype(np.intp)[:, None] * 16384 + (draws >> 2)
    numbers = words.reshape(-1).take(drawn)  # (B, n)
    letters = WORDS.take(numbers.reshape(-1), axis=0).view(np.uint8).reshape(len(which), 6 * n)
    cut = rng.randint(0, 6, len(which))
    runs = np.flatnonzero(rng.random_sample(len(which)) < 0.02)
    begins, ends = rng.randint(0, length, (2, len(runs)))
    for i, begin, end in zip(runs.tolist(), begins.tolist(), ends.tolist()):
        letters[i, cut[i] + begin:cut[i] + min(end, begin + 50)] = ord("N")
    return [row[start:start + length] for row, start in zip(letters, cut.tolist())]


def write_taxdump(path, lineages, unused=0):
    """Write lineages to the zip `path` in NCBI's format.

    It holds nodes.dmp, names.dmp, merged.dmp and an empty delnodes.dmp. unused: so many species
    more, which no sequence has (NCBI's dump has over 2.5 million nodes).
    """
    # parent, rank, codes
    nodes = {
        ROOT: (ROOT, "no rank", "root"),
        CELLULAR: (ROOT, "no rank", "cellular organisms"),
    }
    for superkingdom, phylum, genus, leaf in lineages:
        group = superkingdom[1]
        nodes[superkingdom] = (ROOT if group == "Viruses" else CELLULAR, "superkingdom", group)
        nodes[phylum] = (superkingdom, "phylum", group)
        nodes[genus] = (phylum, "genus", group)
        nodes[leaf] = (genus, "species", group)
    for i in range(unused):
        superkingdom, _, genus, _ = lineages[i % len(lineages)]
        leaf = (FIRST_UNUSED + i, f"simulated species {i + 1}, unused")
        nodes[leaf] = (genus, "species", superkingdom[1])
    rows = {"nodes.dmp": [], "names.dmp": [], "merged.dmp": MERGED, "delnodes.dmp": []}
    for (taxid, name), (parent, rank, group) in sorted(nodes.items()):
        division, code, mitochondrial = CODES[group]
        # 1: the three codes are the parent's
        inherited = int(rank not in ("no rank", "superkingdom"))
        codes = (division, inherited, code, inherited, mitochondrial, inherited)
        rows["nodes.dmp"].append((taxid, parent[0], rank, "", *codes, 0, 0, ""))
        rows["names.dmp"].append((taxid, name, "", "scientific name"))
    # stored, because what deflate gives depends on the version of zlib
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        for member, fields in rows.items():
            text = "".join("\t|\t".join(map(str, row)) + "\t|\n" for row in fields)
            info = zipfile.ZipInfo(member, date_time=(2024, 12, 1, 0, 0, 0))
            info.create_system = 3  # Unix, whatever system writes it
            archive.writestr(info, text)


def simulate(out, sequences=8000, seed=0, length=1500, progress=None, study=False, unused=0):
    """Write the four FASTA files and taxdmp_simulated.zip into the folder `out`, made if it is new.

    length: bases of a record. progress(n) is called when n more records are written. study: the
    study's taxa and proportions. unused: taxa in the dump without a sequence. Returns
    {"fasta": [4 paths], "taxdump": path}. Memory: about 100 MB (study: 200 MB), plus two bytes for
    each sequence.

    Raises InputError for fewer sequences than species, a length not above ORDER, or a seed outside
    0 .. 2**32 - 1; OSError where it cannot write.
    """
    if length <= ORDER:
        raise InputError(f"a length of {length} is too short: at least {ORDER + 1} bases")
    if not 0 <= seed < 2 ** 32:
        raise InputError(f"seed {seed} is outside 0 .. {2 ** 32 - 1}")
    lineages = study_lineages() if study else species()
    sizes = study_counts(sequences) if study else counts(sequences)
    chains = thresholds(seed, lineages)
    draw = functools.partial(fragments, chains)
    if study:
        draw = functools.partial(study_fragments, study_words(chains))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = {
        "fasta": [out / f"{name}_db.fa" for _, name in TREE],
        "taxdump": out / "taxdmp_simulated.zip",
    }
    write_taxdump(paths["taxdump"], lineages, unused)
    for number, (superkingdom, path) in enumerate(zip(TREE, paths["fasta"]), start=1):
        rng = np.random.RandomState([seed, number])
        members = [i for i, lineage in enumerate(lineages) if lineage[0] == superkingdom]
        # the species of each record
        order = np.repeat(np.array(members, dtype=np.uint16), [sizes[i] for i in members])
        rng.shuffle(order)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            for start in range(0, len(order), CHUNK):
                which = order[start:start + CHUNK]
                letters = draw(which, length, rng)
                records = enumerate(zip(which.tolist(), letters), start=start)
                file.writelines(
                    b">%d %d\n%b\n" % (lineages[i][-1][0], index, row.tobytes())
                    for index, (i, row) in records
                )
                if progress is not None:
                    progress(len(which))
    return paths


def main(argv=None):
    parser = Parser(
        "Simulate a small corpus in BERTax's layout: real taxa, simulated genomes (how: see the "
        "module)."
    )
    add = parser.add_argument
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to write four FASTA files and the taxdump to",
    )
    add(
        "--sequences",
        type=positive_int,
        metavar="N",
        help=f"sequences of 1500 bases in all, at least {len(species())} (default 8000; "
        f"--study: {STUDY_SEQUENCES})",
    )
    add(
        "--study",
        action="store_true",
        help="the study's proportions, 1,884 genera and 57 phyla, for timing",
    )
    add(
        "--unused-taxa",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="taxa in the dump that no sequence has (default 0; NCBI's dump has over 2.5 million)",
    )
    add(
        "--seed",
        type=non_negative_int,
        default=0,
        metavar="S",
        help="other genomes (default 0)",
    )
    args = parser.parse_args(argv)
    sequences = args.sequences or (STUDY_SEQUENCES if args.study else 8000)
    try:
        with progress_bar(None, "simulate", sequences, "sequences", True) as bar:
            paths = simulate(
                args.out,
                sequences,
                args.seed,
                progress=bar.update,
                study=args.study,
                unused=args.unused_taxa,
            )
    except OSError as error:
        raise InputError(f"cannot write to --out {args.out}: {error.strerror}") from None
    lineages = study_lineages() if args.study else species()
    sizes = study_counts(sequences) if args.study else counts(sequences)
    for superkingdom, path in zip(TREE, paths["fasta"]):
        of_file = (size for size, of in zip(sizes, lineages) if of[0] == superkingdom)
        print(f"{path}: {sum(of_file):,} sequences, {megabytes(path)} MB")
    taxa = len({ROOT, CELLULAR}.union(*lineages)) + args.unused_taxa
    print(f"{paths['taxdump']}: {taxa} taxa, {megabytes(paths['taxdump'])} MB")


def megabytes(path):
    """The size of a file in words."""
    return f"{os.path.getsize(path) / 1e6:,.3f}"


if __name__ == "__main__":
    run(main)
