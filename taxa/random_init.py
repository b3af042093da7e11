"""Random initialisation: the same network with nothing learned.

It is the control that says what pretraining is worth. Every Linear and Embedding weight is drawn
from N(0, initializer_range); every Linear bias is 0, every LayerNorm weight 1 and bias 0. The
backbones themselves started from this distribution (BERT's) before pretraining, and the published
code applies it, the heads included.
"""

from torch import nn


def reinitialize(model, initializer_range=0.02):
    """Overwrite every parameter of `model` in place from torch's random state; return the model.

    Raises TypeError for a module that has parameters of its own and is none of Linear, Embedding
    and LayerNorm: a weight that silently kept its pretrained value would spoil the control.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"no rule to re-initialise {type(module).__name__}")
    return model
