"""Random initialisation: the same network with nothing learned, the control that says what pretraining is worth.

Every Linear and Embedding weight ~ N(0, initializer_range), every Linear bias 0, every LayerNorm weight 1 and bias 0. That is the
distribution the backbones were themselves started from before pretraining (BERT's), and what the published code applies, the
heads included.
"""

from torch import nn


def reinitialize(model, initializer_range=0.02):
    """Overwrite every parameter of `model` in place from torch's random state and return the model.

    Raises TypeError for a module with parameters of its own that is none of Linear, Embedding, LayerNorm: a weight that silently
    kept its pretrained value would spoil the control.
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
