"""Freezing: the first part of the network stays as pretrained, the rest trains.

Parameters are taken in registration order (embeddings first, heads last) and frozen one whole tensor at a time until at least
`fraction` of all elements are frozen. Example, nt50m with 4, 57 and 1884 classes, fraction 0.75: the word embeddings and layers 0 to
8 are frozen, and layer 9 in part.
"""


def frozen_names(sizes, fraction=0.75):
    """sizes: {name: number of elements} in registration order. Returns the names to freeze, in that order.

    What counts as "all" is the caller's choice of `sizes`: the published code also counts tensors that the loss never uses.
    """
    total, frozen, names = sum(sizes.values()), 0, []
    for name, size in sizes.items():
        if frozen >= fraction * total:
            break
        names.append(name)
        frozen += size
    return names
