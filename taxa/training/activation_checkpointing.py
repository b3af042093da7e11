"""--activation-checkpointing: which activations are kept for the backward pass, and which are computed again there."""

from taxa.errors import InputError

MODES = ("none", "selective", "full")


def checkpoint_layers(backbone, mode):
    """Set how the layers of a backbone keep their activations."""
    if mode == "selective":
        raise InputError("--activation-checkpointing selective is not there yet: use none or full")
    backbone.recompute = mode == "full"
