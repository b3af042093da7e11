"""What the published models hold besides ours: tensors that the loss never uses.

The published code counts them when it freezes. This is audit code, for --protocol published. The
sizes are those of the hub's checkpoints, which the supplement's trainable fractions confirm.
"""

from taxa.errors import InputError
from taxa.inject import adapter_names


def _nucleotide_transformer(config, held):
    """The masked-LM class: also a position table, a contact head, and an LM head.

    The decoder of the LM head is not tied to the embeddings.
    """
    H, V = config.hidden_size, config.vocab_size
    for name, size in held:
        yield name, size
        if name == "embeddings.word_embeddings.weight":
            yield "embeddings.position_embeddings.weight", config.max_position_embeddings * H
    yield "contact_head.regression.weight", config.num_hidden_layers * config.num_attention_heads
    yield "contact_head.regression.bias", 1
    yield "lm_head.bias", V
    yield "lm_head.dense.weight", H * H
    yield "lm_head.dense.bias", H
    yield "lm_head.layer_norm.weight", H
    yield "lm_head.layer_norm.bias", H
    yield "lm_head.decoder.weight", V * H


def _dnabert2(config, held):
    """BertModel with its pooler."""
    yield from held
    yield "pooler.dense.weight", config.hidden_size ** 2
    yield "pooler.dense.bias", config.hidden_size


PUBLISHED = {"esm": _nucleotide_transformer, "bert": _dnabert2}  # by the config's model_type


def published_sizes(classifier):
    """{name: elements} of the published model in its registration order, under our names.

    Tensors that are not used are counted, adapters are not.
    """
    adapters = set(adapter_names(classifier))
    sizes = {name: p.numel() for name, p in classifier.named_parameters() if name not in adapters}
    heads = {name: size for name, size in sizes.items() if name.startswith("heads.")}
    held = [
        (name.removeprefix("backbone."), size)
        for name, size in sizes.items()
        if name.startswith("backbone.")
    ]
    config = classifier.backbone.config
    if config.model_type not in PUBLISHED:
        raise InputError(
            "--protocol published counts the tensors of a published checkpoint, "
            f"and none is known of '{config.model_type}'"
        )
    whole = PUBLISHED[config.model_type](config, held)
    return {f"backbone.{name}": size for name, size in whole} | heads
