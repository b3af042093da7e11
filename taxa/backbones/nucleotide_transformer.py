"""Nucleotide Transformer v2: ESM's encoder with rotary attention, pre-LayerNorm, bias-free SwiGLU.

Source: Dalla-Torre et al. 2024, "The Nucleotide Transformer" (v2 models); hub files
`modeling_esm.py` and `config.json` of InstaDeepAI/nucleotide-transformer-v2-*. The names and the
registration order of the modules are those of the hub's checkpoints.

Shapes: B sequences, T tokens, H hidden_size, nh attention heads, hs = H / nh head size,
I intermediate_size, V vocab_size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from taxa.runtime.precision import product_dtype

LICENSE = "cc-by-nc-sa-4.0"  # of the published weights
TOKENS_OF_1500_BP = 251  # <cls> and 250 6-mers; a few more where there is an N
LORA_TARGETS = ("attention.self.query", "attention.self.value")
IA3_TARGETS = {  # protocol: (Linears whose output is scaled, Linears whose input is scaled)
    # Liu et al. 2022, section 3.3
    "corrected": (("attention.self.key", "attention.self.value"), ("layer.*.output.dense",)),
    "published": (("attention.self.query", "attention.self.value"), ("attention.output.dense",)),
}
LAYER_ORDER = (
    "attention.LayerNorm",
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.self", "attention.output.dense",
    "LayerNorm", "intermediate.dense", "output.dense",
)


class NucleotideTransformerConfig(PretrainedConfig):
    """Sizes of one checkpoint, under the names of the hub's config.json."""

    model_type = "esm"

    def __init__(
        self, *, vocab_size=4107, hidden_size=512, num_hidden_layers=12, num_attention_heads=16,
        intermediate_size=2048, max_position_embeddings=2050, layer_norm_eps=1e-12,
        initializer_range=0.02, pad_token_id=1, **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        # Only sizes the position table of the checkpoints, which is not used.
        self.max_position_embeddings = max_position_embeddings
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, **kwargs)


# A key of this architecture's config.json that other ESM models' do not have.
MARKER_KEY = "add_bias_fnn"
MARKER_REASON = (
    "only Nucleotide Transformer v2's has that: its feed-forward is a SwiGLU, "
    "ESM's and v1's is not"
)
# A config.json may ask for another architecture (ESM-2, NT v1): key -> the only value we compute.
REQUIRED_VALUES = {
    "position_embedding_type": "rotary",
    "add_bias_fnn": False,
    "emb_layer_norm_before": False,
    "token_dropout": False,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def rotary_table(T, hs, device):
    """cos and sin, each (T, hs), of the angles t * 10000^(-2i/hs).

    The two halves of the head size share their angles.
    """
    two_i = torch.arange(0, hs, 2, device=device, dtype=torch.float32)  # (hs/2,)
    inv_freq = 10000.0 ** (-two_i / hs)  # (hs/2,)
    t = torch.arange(T, device=device, dtype=torch.float32)  # (T,)
    angles = torch.outer(t, inv_freq)  # (T, hs/2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, hs)
    return angles.cos(), angles.sin()


def apply_rotary(x, cos, sin):
    """Turn each pair (x[i], x[i + hs/2]) of x (B, nh, T, hs) by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(H, H)
        self.key = nn.Linear(H, H)
        self.value = nn.Linear(H, H)

    def forward(self, x, mask, cos, sin):
        B, T, H = x.shape
        # (B, T, H) -> (B, T, nh, hs) -> (B, nh, T, hs)
        q = self.query(x).view(B, T, self.num_heads, -1).transpose(1, 2)
        k = self.key(x).view(B, T, self.num_heads, -1).transpose(1, 2)
        v = self.value(x).view(B, T, self.num_heads, -1).transpose(1, 2)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, nh, T, hs)
        return y.transpose(1, 2).reshape(B, T, H)


class Dense(nn.Module):
    """One Linear under the name `dense`, as the checkpoints have it."""

    def __init__(self, in_features, out_features, bias):
        super().__init__()
        self.dense = nn.Linear(in_features, out_features, bias=bias)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.self = SelfAttention(config)
        self.output = Dense(H, H, bias=True)
        self.LayerNorm = nn.LayerNorm(H, eps=config.layer_norm_eps)

    def forward(self, x, mask, cos, sin):
        y = self.LayerNorm(x)
        # One cast under autocast, where query, key and value would each make their own.
        y = y.to(product_dtype(y))
        return x + self.output.dense(self.self(y, mask, cos, sin))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.attention = Attention(config)
        # The gate and the value of SwiGLU in one multiplication.
        self.intermediate = Dense(H, 2 * I, bias=False)
        self.output = Dense(I, H, bias=False)
        self.LayerNorm = nn.LayerNorm(H, eps=config.layer_norm_eps)

    def forward(self, x, mask, cos, sin):
        x = self.attention(x, mask, cos, sin)
        gate, value = self.intermediate.dense(self.LayerNorm(x)).chunk(2, dim=-1)  # each (B, T, I)
        return x + self.output.dense(F.silu(gate) * value)  # SwiGLU


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.emb_layer_norm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class NucleotideTransformer(PreTrainedModel):
    """The encoder alone: no LM head, no contact head, no position table (rotary never reads it)."""

    config_class = NucleotideTransformerConfig
    base_model_prefix = "esm"
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def forward(self, input_ids, attention_mask=None):
        """input_ids (B, T), attention_mask (B, T) -> last_hidden_state (B, T, H).

        The mask is 1 at real tokens. Without one (None) all are real.
        """
        mask = None
        if attention_mask is not None:  # (B, 1, 1, T): no query looks at padding
            mask = attention_mask.bool()[:, None, None, :]
        x = self.embeddings.word_embeddings(input_ids)
        hs = self.config.hidden_size // self.config.num_attention_heads
        table = rotary_table(input_ids.shape[1], hs, input_ids.device)
        cos, sin = (angles.to(product_dtype(x)) for angles in table)
        for layer in self.encoder.layer:
            x = layer(x, mask, cos, sin)
        return self.encoder.emb_layer_norm_after(x)


def dropped_keys(config):
    """Keys of a hub checkpoint, less `esm.`, that we do not load: buffers, and unused tensors."""
    inv_freq = "attention.self.rotary_embeddings.inv_freq"
    return {
        "embeddings.position_embeddings.weight", "embeddings.position_ids",
        "contact_head.regression.weight", "contact_head.regression.bias",
        "lm_head.bias", "lm_head.dense.weight", "lm_head.dense.bias",
        "lm_head.layer_norm.weight", "lm_head.layer_norm.bias",
        "lm_head.decoder.weight", "lm_head.decoder.bias",
    } | {f"encoder.layer.{i}.{inv_freq}" for i in range(config.num_hidden_layers)}
