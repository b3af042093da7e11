"""From reads to classes, and from a trained model to one that others can use."""
