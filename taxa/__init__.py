"""taxa: fine-tune genomic language models to classify DNA fragments.

Each fragment gets a superkingdom, a phylum and a genus.
"""

import sys
from pathlib import Path

try:
    import fcntl  # noqa: F401
except ImportError:
    sys.exit(
        "taxa runs on Linux (on Windows: in WSL): this Python has no fcntl, which locks the "
        "folders that are written"
    )

__version__ = "1.0.0"
ASSETS = Path(__file__).resolve().parent / "assets"  # small files that come with the package
RANKS = ("superkingdom", "phylum", "genus")
PROTOCOLS = ("corrected", "published")  # ours, and what the published code does

# The data of Berman et al. 2025, in the place of data in the batch probe. Classes: the paper's
# text, and what the supplement's trainable fractions fit (the methods section has 4, 55 and 1878).
# Training sequences: of 5,181,880, less 2% test (103,638), less 10% of the rest for validation
# (507,825), each rounded up as scikit-learn's train_test_split does (docs/PROTOCOL.md, Data).
STUDY_CLASSES = {"superkingdom": 4, "phylum": 57, "genus": 1884}
STUDY_TRAINING_SEQUENCES = 4_570_417
# Sequences per device and step, and devices, of the published runs (docs/PROTOCOL.md). A step holds
# their product on any number of GPUs.
STUDY_BATCH = {
    "nt50m": (128, 1),
    "nt100m": (64, 1),
    "nt250m": (64, 1),
    "dnabert2": (16, 4),
    "dnaberts": (16, 4),
}
STUDY_SEED = 42  # of the published split and runs, and our default
