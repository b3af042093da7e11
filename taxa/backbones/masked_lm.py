"""Masked language modelling: the masking, the two heads, and a folder in the hub's format.

Devlin et al. 2019, section 3.1: 15% of the tokens are chosen. Of these 80% become the mask token,
10% become a random token, and 10% stay as they are. The loss is the cross-entropy of the true token
at the chosen positions alone. Special tokens are never chosen.

The heads are those of the published models. NT has `lm_head` (ESM's: dense, GELU, LayerNorm,
decoder, bias); its decoder has weights of its own. DNABERT-2 has `cls.predictions` (BERT's); its
decoder is the embedding table, as in the hub's bert_layers.py.

Shapes: B sequences, T tokens, H hidden_size, V vocab_size, M chosen positions of a batch.
"""

import inspect
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from taxa.backbones import FAMILIES
from taxa.errors import InputError
from taxa.random_init import reinitialize
from taxa.runtime.files import UNREADABLE, check_finite, save_tensors, write_json


class NTHead(nn.Module):
    """`lm_head`: decoder(LayerNorm(gelu(dense x))) + bias.

    tied: the decoder's weight is the embedding table itself.
    """

    def __init__(self, config, embeddings, tied):
        super().__init__()
        H, V = config.hidden_size, config.vocab_size
        self.dense = nn.Linear(H, H)
        self.layer_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(H, V, bias=False)
        for part in self.children():
            reinitialize(part, config.initializer_range)
        if tied:
            self.decoder.weight = embeddings.weight
        self.bias = nn.Parameter(torch.zeros(V))

    def forward(self, x):
        return self.decoder(self.layer_norm(F.gelu(self.dense(x)))) + self.bias


class DNABertHead(nn.Module):
    """`cls`: predictions.decoder(LayerNorm(gelu(dense x))).

    tied: the decoder's weight is the embedding table itself.
    """

    def __init__(self, config, embeddings, tied):
        super().__init__()
        H = config.hidden_size
        transform = nn.ModuleDict({
            "dense": nn.Linear(H, H),
            "LayerNorm": nn.LayerNorm(H, eps=config.layer_norm_eps),
        })
        decoder = nn.Linear(H, config.vocab_size)
        predictions = nn.ModuleDict({"transform": transform, "decoder": decoder})
        self.predictions = reinitialize(predictions, config.initializer_range)
        if tied:
            self.predictions.decoder.weight = embeddings.weight

    def forward(self, x):
        transform = self.predictions.transform
        return self.predictions.decoder(transform.LayerNorm(F.gelu(transform.dense(x))))


class Masking(NamedTuple):
    """What a family's masking and its files need: the ids below `first_ordinary` are special."""

    head: type
    head_name: str  # of the head in the checkpoints
    architecture: str
    mask_token_id: int
    first_ordinary: int
    tied: bool  # as published


MASKING = {
    "nt": Masking(
        head=NTHead,
        head_name="lm_head",
        architecture="EsmForMaskedLM",
        mask_token_id=2,
        first_ordinary=6,  # after <unk> <pad> <mask> <cls> <eos> <bos>
        tied=False,
    ),
    "dnabert": Masking(
        head=DNABertHead,
        head_name="cls",
        architecture="BertForMaskedLM",
        mask_token_id=4,
        first_ordinary=5,  # after [UNK] [CLS] [SEP] [PAD] [MASK]
        tied=True,
    ),
}


class MaskedLM(nn.Module):
    """A backbone and its head, under the names of the hub's checkpoints.

    These are esm.* and lm_head.*, or bert.* and cls.predictions.*
    """

    def __init__(self, family, backbone, tied):
        super().__init__()
        self.family = family
        self.masking = MASKING[family]
        self.config = backbone.config
        self.tied = tied
        head = self.masking.head(backbone.config, backbone.get_input_embeddings(), tied)
        self.add_module(backbone.base_model_prefix, backbone)
        self.add_module(self.masking.head_name, head)

    @property
    def backbone(self):
        return getattr(self, FAMILIES[self.family].model.base_model_prefix)

    @property
    def head(self):
        return getattr(self, self.masking.head_name)

    def forward(self, input_ids, attention_mask, chosen):
        """input_ids, attention_mask, chosen (B, T) -> logits (M, V) of the chosen positions alone.

        They go row by row.
        """
        hidden = self.backbone(input_ids, attention_mask)  # (B, T, H)
        return self.head(hidden[chosen])


def mask_tokens(input_ids, masking, vocab_size, fraction, generator):
    """Choose positions and hide them.

    input_ids (B, T) -> (input_ids with 80/10/10 in place, chosen (B, T) bool). Every ordinary token
    is chosen with probability `fraction`, each on its own. A random token is any ordinary one, the
    true one included. The original input_ids hold the targets: input_ids[chosen] (M,).
    """
    draw = torch.rand(input_ids.shape, generator=generator)
    chosen = (draw < fraction) & (input_ids >= masking.first_ordinary)
    kind = torch.rand(input_ids.shape, generator=generator)
    random_ids = torch.randint(
        masking.first_ordinary, vocab_size, input_ids.shape, generator=generator
    )
    hidden = torch.where(chosen & (kind < 0.8), masking.mask_token_id, input_ids)
    return torch.where(chosen & (kind >= 0.9), random_ids, hidden), chosen


def generator_for(*numbers):
    """A torch.Generator on the CPU for these whole numbers alone (seed, step, process).

    With it a resumed run masks as before.
    """
    low, high = np.random.SeedSequence(numbers).generate_state(2)
    return torch.Generator().manual_seed(int(low) << 31 | int(high) >> 1)


def unigram_losses(split, masking, vocab_size):
    """-log of each token's share among the ordinary tokens of a split: float64 (V,).

    Every count is raised by 1. Special tokens have inf.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for i in range(len(split)):
        counts += np.bincount(split.tokens(i), minlength=vocab_size)
    counts = torch.from_numpy(counts + 1).double()
    counts[: masking.first_ordinary] = 0
    return math.log(counts.sum()) - counts.log()


def save_hub_folder(model, folder, dtype=torch.float32):
    """Write config.json and model.safetensors of a MaskedLM into `folder`, as the hub has them.

    load_backbone(weights=folder) reads them. A tied decoder is not written a second time. Tensors
    that these models register and never use (NT's position table and contact head, DNABERT-2's
    pooler) are not written.
    """
    config, masking = model.config, model.masking
    arguments = inspect.signature(type(config).__init__).parameters
    sizes = [name for name in arguments if name not in ("self", "kwargs")]
    write_json(Path(folder) / "config.json", {
        "model_type": config.model_type,
        "architectures": [masking.architecture],
        **FAMILIES[model.family].module.REQUIRED_VALUES,
        **{name: getattr(config, name) for name in sizes},
        "mask_token_id": masking.mask_token_id,
        "tie_word_embeddings": model.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    })
    state = {
        name: tensor.detach().to("cpu", dtype, copy=True).contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.tied and name.endswith("decoder.weight"))
    }
    save_tensors(Path(folder) / "model.safetensors", state)


def load_head(model, folder):
    """Load the language-model head from a folder in the hub's format, in place.

    Returns False, and loads nothing, when the folder holds none. Raises InputError for a head that
    does not fit.
    """
    try:
        path = Path(folder) / "model.safetensors"
        if path.is_file():
            whole = load_file(path)
        else:
            path = Path(folder) / "pytorch_model.bin"
            whole = torch.load(path, map_location="cpu", weights_only=True)
        prefix = model.masking.head_name + "."
        state = {
            name.removeprefix(prefix): tensor.float()
            for name, tensor in whole.items()
            if name.startswith(prefix)
        }
        if not any(name.endswith("dense.weight") for name in state):
            return False
        if model.tied:
            names = model.head.state_dict()
            tied = next(name for name in names if name.endswith("decoder.weight"))
            state[tied] = model.backbone.get_input_embeddings().weight.detach()
        model.head.load_state_dict(state)
    except UNREADABLE as error:
        message = " ".join(str(error).split())
        raise InputError(
            f"the language-model head in {folder} does not fit: {message}"
        ) from None
    check_finite(folder, state)
    return True
