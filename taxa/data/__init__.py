"""FASTA -> index -> labels -> splits -> tokens -> dataset. Knows nothing of models."""
