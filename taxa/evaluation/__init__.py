"""From predictions to numbers: what train.py and evaluate.py need to measure a classifier."""
