"""Swap Linears of a model for adapted ones, in place, by name.

A target names the tail of a module's dotted name: "attention.self.query" matches
encoder.layer.0.attention.self.query and its brothers. "*" stands for exactly one part, so
"layer.*.output.dense" is not "layer.0.attention.output.dense".
"""

from fnmatch import fnmatchcase

from torch import nn

from taxa.errors import InputError


def matches(name, target):
    """Does the dotted module name end in `target`, part by part?"""
    parts, wanted = name.split("."), target.split(".")
    tail = parts[-len(wanted):]
    return len(parts) >= len(wanted) and all(map(fnmatchcase, tail, wanted))


def replace_linears(model, target, make):
    """Replace each nn.Linear whose name matches `target` by make(linear).

    The names of all parameters stay as they were. Raises InputError when nothing matches, or when
    the match is not a plain Linear (already adapted, say).
    """
    names = [name for name, _ in model.named_modules() if matches(name, target)]
    if not names:
        raise InputError(f"target '{target}' matches no module of the backbone")
    for name in names:
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise InputError(
                f"target '{target}' matches {name}, a {type(linear).__name__}: "
                "adapters go on plain Linear layers"
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(linear))


def merge_adapters(model):
    """Fold every adapter into the weight it sits on, once and for good. Returns the model.

    The adapted modules become plain nn.Linear again. Works on any adapted module that has
    merge() -> nn.Linear. A model without adapters is left as it is.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and hasattr(module, "merge"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.merge())
    return model


def adapter_names(model):
    """The names of the adapters' parameters: each adapted module lists its `adapter_parameters`."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key in getattr(module, "adapter_parameters", ())
    ]


def share_linear(adapted, linear):
    """Give `adapted`, a bare nn.Linear subclass, the Parameter objects and names of `linear`."""
    # nn.Linear.__init__ would allocate and initialise a second weight.
    nn.Module.__init__(adapted)
    adapted.in_features, adapted.out_features = linear.in_features, linear.out_features
    adapted.weight, adapted.bias = linear.weight, linear.bias


def plain_linear(adapted):
    """A plain nn.Linear with the weight and the bias of `adapted`, the same Parameter objects."""
    has_bias = adapted.bias is not None
    linear = nn.Linear(adapted.in_features, adapted.out_features, bias=has_bias, device="meta")
    linear.weight, linear.bias = adapted.weight, adapted.bias
    return linear
