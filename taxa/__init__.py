"""taxa: fine-tune genomic language models to name the superkingdom, phylum and genus of a piece of DNA."""

from pathlib import Path

__version__ = "0.1.0"
ASSETS = Path(__file__).resolve().parent / "assets"  # small files that come with the package
RANKS = ("superkingdom", "phylum", "genus")
