"""Freezing: the first part of the network stays as pretrained, the rest trains.

Parameters are taken in registration order (embeddings first, heads last) and frozen one whole
tensor at a time until at least `fraction` of all elements are frozen. Example, nt50m with 4, 57 and
1884 classes and fraction 0.75: the word embeddings and layers 0 to 8 are frozen, and layer 9 in
part.
"""


def frozen_names(sizes, fraction=0.75):
    """Return the names to freeze, in order. sizes: {name: elements} in registration order.

    The caller says by `sizes` what counts as "all": the published code also counts tensors that
    the loss never uses.
    """
    total = sum(sizes.values())
    frozen = 0
    names = []
    for name, size in sizes.items():
        if frozen >= fraction * total:
            break
        names.append(name)
        frozen += size
    return names
