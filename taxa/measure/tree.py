"""A model as a tree on one screen: what is frozen, what trains, which Linear carries what,
parameters and operations per token.

  python -m taxa.measure.tree --model nt50m --strategy lora --r 4
  python -m taxa.measure.tree --model dnabert2 --strategy ia3 --protocol published

Builds on the meta device: nothing is computed, and nothing is downloaded for a model of the table.
Layers that are alike are folded.
"""

import itertools

from torch import nn

from taxa.backbones import FAMILIES, backbone_config, find_model
from taxa.ia3 import THIRDS, IA3Linear
from taxa.lora import LoRALinear
from taxa.measure.flops import parts
from taxa.runtime.cli import Parser, positive_int, run
from taxa.strategies import classifier_on_meta, trainable_names
from taxa.training.flags import add_classes, add_model, add_strategy, check_strategy, classes_of
from taxa.training.settings import run_settings

NOTES = """\
Operations: matrix products only, a multiply-add is 2. A Linear of N weights: 2N forward,
2N more for its input's gradient where something before it trains,
2N more where its weight trains."""


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_model(parser)
    add_strategy(parser)
    add_classes(parser)
    operations = parser.group("operations")
    operations(
        "--tokens",
        type=positive_int,
        metavar="T",
        help="tokens of a sequence (default: as many as 1500 bases make)",
    )
    args = parser.parse_args(argv)
    check_strategy(args)
    return args


def main(argv=None):
    args = parse_args(argv)
    model_row = find_model(args.model, args.weights, args.revision)
    settings, _ = run_settings(args, model_row)
    config = backbone_config(model_row, args.weights)
    classifier = classifier_on_meta(model_row, classes_of(args), settings, config)
    names = trainable_names(classifier, settings)
    T = args.tokens or FAMILIES[model_row.family].module.TOKENS_OF_1500_BP
    print(tree(args.model, parts(classifier, model_row.family, names, T), settings, T))


def tree(model, found, settings, T):
    """The table as text. found: taxa.measure.flops.parts() for sequences of T tokens."""
    lora = ""
    if "r" in settings:
        lora = f" r = {settings['r']}, lora_alpha = {settings['lora_alpha']:g}"
    protocol = ", protocol published" if settings["protocol"] == "published" else ""
    heads = "train" if settings["heads"] == "train" else "frozen"
    lines = [
        f"{model}, {settings['strategy']}{lora}{protocol}, heads {heads}; {T} tokens a sequence",
        "",
        f"{'':<86}{'MFLOP per token':>18}",
        _row("part", "in x out", "carries", "parameters", "train", "forward", "step"),
    ]
    for layers, members in blocks(found):
        indent = ""
        prefix = ""
        if layers:
            indent = "  "
            prefix = f"encoder.layer.{layers[0]}."
            name = f"encoder.layer.{layers[0]}"
            folded = ""
            if len(layers) > 1:
                name += f"-{layers[-1]}"
                folded = f"{len(layers)} layers, one:"
            sums = [sum(part[i] for part in members) * len(layers) for i in range(2, 6)]
            lines.append(_line(name, "", folded, sums, T))
        for part in members:
            name = part.name.removeprefix("backbone.").removeprefix(prefix)
            of_part = shape(part.module, T), carries(part.module), part[2:]
            lines.append(_line(indent + name, *of_part, T))
    totals = [sum(part[i] for part in found) for i in range(2, 6)]
    parameters, trainable, forward, step = totals
    lines += [
        _line("total", "", "", totals, T),
        "",
        f"{trainable:,} of {parameters:,} parameters train ({trainable / parameters:.2%}).",
        f"A training step takes {step / forward:.2f} times the operations of its forward.",
        NOTES,
    ]
    return "\n".join(lines)


def blocks(found):
    """Yield (layer numbers, the parts of one of them); (None, [part]) for what is in no layer.

    Neighbours that are alike go together.
    """

    def layer(part):
        in_layer = part.name.startswith("backbone.encoder.layer.")
        return int(part.name.split(".")[3]) if in_layer else None

    def signature(group):
        number, members = group
        if number is None:
            return None
        return str([
            (part.name.split(".")[4:], shape(part.module, 1), carries(part.module), *part[2:])
            for part in members
        ])

    groups = [(number, list(members)) for number, members in itertools.groupby(found, key=layer)]
    for _, alike in itertools.groupby(groups, key=signature):
        alike = list(alike)
        if alike[0][0] is None:
            yield from ((None, members) for _, members in alike)
        else:
            yield [number for number, _ in alike], alike[0][1]


def shape(module, T):
    if isinstance(module, nn.Linear):
        bias = " +b" if module.bias is not None else ""
        return f"{module.in_features}x{module.out_features}{bias}"
    if isinstance(module, nn.Embedding):
        return f"{module.num_embeddings}x{module.embedding_dim}"
    if isinstance(module, nn.LayerNorm):
        return f"{module.normalized_shape[0]}"
    return f"{T}x{T}"


def carries(module):
    """The adapter of a module in a few words; of a kind that is not known here, its class."""
    if isinstance(module, LoRALinear):
        return f"LoRA r = {module.r}"
    if isinstance(module, IA3Linear):
        if module.feedforward or module.rows == (0, module.out_features):
            return f"(IA)3 on {'input' if module.feedforward else 'output'}"
        first, last = (row * 3 // module.out_features for row in module.rows)
        return f"(IA)3 {','.join(THIRDS[first:last])}"
    return type(module).__name__ if hasattr(module, "adapter_parameters") else ""


def _line(name, shape, carries, numbers, T):
    parameters, trainable, forward, step = numbers
    held = f"{parameters:,}" if parameters else ""
    train = "" if not parameters else "frozen" if not trainable else f"{trainable:,}"
    per_token = [f"{n / T / 1e6:.3f}" if n else "" for n in (forward, step)]
    return _row(name, shape, carries, held, train, *per_token)


def _row(*columns):
    name, shape, carries, *numbers = columns
    parameters, train, forward, step = numbers
    line = f"{name:<33}{shape:<12}{carries:<18}{parameters:>11}{train:>12}{forward:>9}{step:>9}"
    return line.rstrip()


if __name__ == "__main__":
    run(main)
