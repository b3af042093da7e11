"""taxa: fine-tune genomic language models to name the superkingdom, phylum and genus of a piece of DNA."""

__version__ = "0.1.0"
RANKS = ("superkingdom", "phylum", "genus")
