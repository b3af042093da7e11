"""Floating-point operations of a classifier, part by part, from shapes and from what trains.

Nothing runs. One multiply-add is 2 operations, and only matrix products count. Embeddings, norms,
activations, softmax, biases and (IA)3's scaling are left out: they are under 1% at these sizes.
A Linear of N weights takes, for one token,

    2N   forward
    2N   gradient of its input     where something before it trains, or (IA)3 scales its input
    2N   gradient of its weight    where the weight trains

so 6N in full fine-tuning, 4N where the weight is frozen and something before it trains, 2N where
nothing before it does. LoRA adds the same for A (r * in) and B (out * r), a chain: B's input needs
its gradient where A trains. Attention over T tokens multiplies queries by keys and probabilities by
values, 2TH each. Its backward takes 2TH for each of queries, keys, values and probabilities that
needs a gradient.

Shapes: T tokens of a sequence, H hidden_size, C classes of a rank.
"""

from typing import NamedTuple

from torch import nn

from taxa.backbones import FAMILIES


class Part(NamedTuple):
    """One module that holds parameters, or the attention of a layer (which holds none)."""

    name: str
    module: nn.Module
    parameters: int
    trainable: int
    forward: int  # operations for one sequence of T tokens
    step: int  # forward and backward


def parts(classifier, family, names, T):
    """[Part] of a TaxonClassifier in the order in which they run.

    family: nt or dnabert; names: what trains; T: tokens. Raises ValueError for a module of a layer
    that the family's LAYER_ORDER lacks.
    """
    modules = dict(classifier.named_modules())
    trains = set(names)
    layers = [
        name
        for name in modules
        if name.startswith("backbone.encoder.layer.") and name.count(".") == 3
    ]
    layers.sort(key=lambda name: int(name.rpartition(".")[2]))
    order = FAMILIES[family].module.LAYER_ORDER
    inside = [f"{layer}.{name}" for layer in layers for name in order]
    holders = [
        name
        for name, module in modules.items()
        if next(module.parameters(recurse=False), None) is not None
    ]
    before = [name for name in holders if name.startswith("backbone.embeddings.")]
    after = [name for name in holders if name not in inside and name not in before]
    if missing := [name for name in after if name.startswith(tuple(layers))]:
        raise ValueError(f"not in LAYER_ORDER: {missing}")

    found = []
    upstream = False  # does something that has run train?
    projections = {}
    for name in (*before, *inside, *after):
        module = modules[name]
        own = module.named_parameters(recurse=False)
        sizes = {f"{name}.{key}": p.numel() for key, p in own}
        mine = sum(size for key, size in sizes.items() if key in trains)
        if name.endswith("attention.self"):
            upstream = upstream or any(projections.values())
            H = classifier.backbone.config.hidden_size
            forward, backward = _attention(H, T, projections)
            projections = {}
        elif isinstance(module, nn.Linear):
            forward, backward = _linear(name, module, trains, upstream)
            once = name.startswith("heads.")  # on the mean of a sequence, not on every token
            forward, backward = (n if once else n * T for n in (forward, backward))
        else:
            forward = backward = 0
        if ".attention.self." in name:
            projections[name.rpartition(".")[2]] = upstream or mine > 0
        elif not name.startswith("heads."):
            upstream = upstream or mine > 0
        found.append(Part(name, module, sum(sizes.values()), mine, forward, forward + backward))
    return found


def _linear(name, module, trains, upstream):
    """(forward, backward) for one token."""
    N = module.in_features * module.out_features
    adapters = getattr(module, "adapter_parameters", ())
    # (IA)3's l
    scales_input = getattr(module, "feedforward", False)
    scales_input = scales_input and any(f"{name}.{key}" in trains for key in adapters)
    forward = 2 * N
    backward = 2 * N * (upstream or scales_input) + 2 * N * (f"{name}.weight" in trains)
    needs_gradient = upstream  # of what goes into an adapter's matrix; a vector only scales
    for key in (key for key in adapters if getattr(module, key).dim() == 2):
        size = getattr(module, key).numel()
        train = f"{name}.{key}" in trains
        forward += 2 * size
        backward += 2 * size * (needs_gradient + train)
        needs_gradient = needs_gradient or train
    return forward, backward


def _attention(H, T, projections):
    """(forward, backward) for a sequence of T tokens.

    projections: {name of a Linear: does its output need a gradient?}.
    """
    fused = projections.get("Wqkv")
    q, k, v = (projections.get(name, fused) for name in ("query", "key", "value"))
    return 4 * T * T * H, 2 * T * T * H * (q + k + v + (q or k))
