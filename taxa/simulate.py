"""A small corpus in BERTax's layout, simulated: real taxa, invented genomes. For demos and tests without a download.

    python -m taxa.simulate --out simulated --sequences 8000

writes Archaea_db.fa, Bacteria_db.fa, Eukaryota_db.fa, Viruses_db.fa and taxdmp_simulated.zip. A FASTA record is `>TAXID INDEX`
and one line of `length` upper-case letters; INDEX restarts at 0 in every file; the taxa of a file are interleaved at random.

The taxonomy is TREE below: real NCBI taxa, one species to a genus, of the ranks superkingdom, phylum, genus and species only.

The genomes are not real. Each species is one Markov chain over A, C, G, T: the next letter depends on the ORDER letters before
it. The chains evolve down the tree,

    logits(species) = root + superkingdom + phylum + genus,     each term a table (CONTEXTS, 4) of N(0, SCALE[rank]) noise,

so relatives have similar k-mer spectra and a lower rank, whose noise is smaller, is harder to tell. There are no genes, strands
or repeats, and every fragment is an independent draw: a random split is a fair one, and no biology follows from the results.

With 8000 sequences, 12% of them held out, multinomial logistic regression on the counts of the 4096 overlapping 6-mers reaches
a balanced accuracy of 0.99 for the superkingdom, 0.90 for the phylum and 0.70 for the genus (seed 0).

The bytes depend on the arguments alone, not on the machine or the version of Python or numpy: numpy has frozen the streams of
RandomState, and everything drawn from them is rounded to integers before a letter is chosen.
"""

import contextlib
import os
import zipfile

import numpy as np
from tqdm import tqdm

from taxa.cli import InputError, Parser, non_negative_int, positive_int, run

# The tree, (NCBI taxid, scientific name) as of December 2024. A row is a genus and its species; rows go from common to rare.
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
            ((694002, "Betacoronavirus"), (694009, "Severe acute respiratory syndrome-related coronavirus")),
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
SHARE = {"Archaea": 0.10, "Bacteria": 0.35, "Eukaryota": 0.50, "Viruses": 0.05}  # of the sequences, as in the study
# NCBI's (division, genetic code, mitochondrial genetic code); one for a superkingdom here, finer in NCBI's dump
CODES = {"root": (8, 1, 0), "cellular organisms": (8, 1, 0),
         "Archaea": (0, 11, 0), "Bacteria": (0, 11, 0), "Eukaryota": (1, 1, 1), "Viruses": (9, 1, 0)}

ORDER = 3  # letters that the next one depends on
CONTEXTS = 4 ** ORDER
SCALE = {"root": 0.3, "superkingdom": 0.25, "phylum": 0.15, "genus": 0.12}  # standard deviation of each rank's logits
LETTERS = np.frombuffer(b"ACGT", dtype=np.uint8)
CHUNK = 4096  # records simulated at a time, some 30 kB of memory for each; the output does not depend on it


def species():
    """Return the species of TREE as tuples ((taxid, name) of superkingdom, phylum, genus, species), in the order of TREE."""
    return [(superkingdom, phylum, genus, leaf)
            for superkingdom, phyla in TREE.items() for phylum, genera in phyla.items() for genus, leaf in genera]


def counts(sequences):
    """Return how many sequences each species has, in the order of species(); their sum is `sequences`.

    Every species has a hundredth of the sequences, at most 20 and at least 1. The rest goes to the superkingdoms by SHARE, and
    within one to its species in proportion to 1/4, 1/5, 1/6 ... Raises ValueError for fewer sequences than species.
    """
    lineages = species()
    if sequences < len(lineages):
        raise ValueError(f"{sequences} sequences are fewer than the {len(lineages)} species: each has at least one")
    weights = []
    for superkingdom, phyla in TREE.items():
        zipf = [1 / (4 + i) for i in range(sum(len(genera) for genera in phyla.values()))]
        weights += [SHARE[superkingdom[1]] * weight / sum(zipf) for weight in zipf]
    least = max(1, min(20, sequences // 100))
    rest = sequences - least * len(lineages)
    ends = [round(rest * sum(weights[:i]) / sum(weights)) for i in range(len(weights) + 1)]
    return [least + end - start for start, end in zip(ends, ends[1:])]


def thresholds(seed):
    """Return the chains as cumulative probabilities, three uint16 arrays (species * CONTEXTS,), row species * CONTEXTS + context.

    With u uniform in 0 .. 65535, the next letter is the number of the three thresholds that are <= u. A context is a number in
    base 4, its last letter the lowest digit.
    """
    rng = np.random.RandomState([seed, 0])
    noise = {}  # taxid -> (CONTEXTS, 4)
    rows = []
    for lineage in species():
        for rank, (taxid, _) in zip(SCALE, (ROOT, *lineage)):
            if taxid not in noise:
                noise[taxid] = SCALE[rank] * rng.standard_normal((CONTEXTS, 4))
        rows.append(sum(noise[taxid] for taxid, _ in (ROOT, *lineage[:3])))
    odds = np.exp(np.concatenate(rows))  # (species * CONTEXTS, 4)
    cumulative = np.cumsum(odds / odds.sum(axis=1, keepdims=True), axis=1)
    return [np.rint(cumulative[:, i] * 65535).astype(np.uint16) for i in range(3)]


def fragments(chains, which, length, rng):
    """Simulate one fragment for each entry of `which` (n,), an index of species(): uint8 letters (n, length).

    `chains` is what thresholds() returns. The first ORDER letters are uniform. A fragment takes the next `length` 16-bit numbers
    of the RandomState `rng`, and one more if `length` is odd, so that the result does not depend on how records are chunked.
    """
    even = length + length % 2
    draws = np.frombuffer(rng.bytes(2 * even * len(which)), dtype="<u2").reshape(len(which), even)
    draws = np.ascontiguousarray(draws.T, dtype=np.uint16)  # (even, n): a row is one step of all fragments
    codes = np.empty((length, len(which)), dtype=np.uint8)
    codes[:ORDER] = draws[:ORDER] >> 14
    first = which.astype(np.intp) * CONTEXTS
    context = np.zeros(len(which), dtype=np.intp)
    for step in range(length):
        if step >= ORDER:
            row = first + context
            codes[step] = sum((draws[step] >= chain[row]).view(np.uint8) for chain in chains)
        context = (context * 4 + codes[step]) % CONTEXTS
    return LETTERS[codes.T]


@contextlib.contextmanager
def replacing(path):
    """Open `path` for writing bytes under a temporary name; it takes its own name at the end, or none if an error occurs."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as handle:
            yield handle
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def write_taxdump(path):
    """Write TREE to the zip file `path` in NCBI's format: nodes.dmp, names.dmp, merged.dmp and an empty delnodes.dmp."""
    nodes = {ROOT: (ROOT, "no rank", "root"), CELLULAR: (ROOT, "no rank", "cellular organisms")}  # -> parent, rank, codes
    for superkingdom, phylum, genus, leaf in species():
        group = superkingdom[1]
        nodes[superkingdom] = (ROOT if group == "Viruses" else CELLULAR, "superkingdom", group)
        nodes[phylum] = (superkingdom, "phylum", group)
        nodes[genus] = (phylum, "genus", group)
        nodes[leaf] = (genus, "species", group)
    rows = {"nodes.dmp": [], "names.dmp": [], "merged.dmp": MERGED, "delnodes.dmp": []}
    for (taxid, name), (parent, rank, group) in sorted(nodes.items()):
        division, code, mitochondrial = CODES[group]
        inherited = int(rank not in ("no rank", "superkingdom"))  # from the parent: the three codes are set at the top
        rows["nodes.dmp"].append((taxid, parent[0], rank, "", division, inherited, code, inherited, mitochondrial, inherited,
                                  0, 0, ""))
        rows["names.dmp"].append((taxid, name, "", "scientific name"))
    with replacing(path) as handle, zipfile.ZipFile(handle, "w") as archive:  # stored: compressed bytes vary with zlib
        for member, fields in rows.items():
            text = "".join("\t|\t".join(map(str, row)) + "\t|\n" for row in fields)
            info = zipfile.ZipInfo(member, date_time=(2024, 12, 1, 0, 0, 0))
            info.create_system = 3  # Unix, whatever system writes it
            archive.writestr(info, text.encode("ascii"))


def simulate(out, sequences=8000, seed=0, length=1500, progress=None):
    """Write the four FASTA files and taxdmp_simulated.zip into the folder `out`, which is created.

    Returns {"fasta": [4 paths], "taxdump": path}. `length` is in letters. `progress(n)` is called each time n more records are
    written. Memory is some 120 MB and one byte for each sequence of a file. Raises ValueError for fewer sequences than species,
    a length not above ORDER, or a seed outside 0 .. 2**32 - 1.
    """
    if length <= ORDER:
        raise ValueError(f"a length of {length} is too short: at least {ORDER + 1} letters")
    if not 0 <= seed < 2 ** 32:
        raise ValueError(f"seed {seed} is outside 0 .. 2**32 - 1")
    lineages, sizes = species(), counts(sequences)
    chains = thresholds(seed)
    os.makedirs(out, exist_ok=True)
    paths = {"fasta": [], "taxdump": os.path.join(out, "taxdmp_simulated.zip")}
    write_taxdump(paths["taxdump"])
    for number, superkingdom in enumerate(TREE, start=1):
        rng = np.random.RandomState([seed, number])
        members = [i for i, lineage in enumerate(lineages) if lineage[0] == superkingdom]
        order = np.repeat(np.array(members, dtype=np.uint8), [sizes[i] for i in members])
        rng.shuffle(order)
        path = os.path.join(out, f"{superkingdom[1]}_db.fa")
        with replacing(path) as handle:
            for start in range(0, len(order), CHUNK):
                which = order[start:start + CHUNK]
                letters = fragments(chains, which, length, rng)
                handle.writelines(b">%d %d\n%b\n" % (lineages[i][3][0], index, row.tobytes())
                                  for index, (i, row) in enumerate(zip(which, letters), start=start))
                if progress is not None:
                    progress(len(which))
        paths["fasta"].append(path)
    return paths
