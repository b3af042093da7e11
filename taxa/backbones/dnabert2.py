"""DNABERT-2 and DNABERT-S: MosaicBERT with ALiBi, fused Wqkv, GELU-gated MLP and post-LayerNorm.

Source: Zhou et al. 2023, "DNABERT-2" and Zhou et al. 2024, "DNABERT-S"; hub files `bert_layers.py`
and `config.json` of zhihan1996/DNABERT-2-117M. ALiBi: Press et al. 2022, here symmetric as
MosaicBERT has it. The names and the registration order of the modules are those of the hub's
checkpoints.

Shapes: B sequences, T tokens, H hidden_size, nh attention heads, hs = H / nh head size,
I intermediate_size, V vocab_size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from taxa.runtime.precision import product_dtype

LICENSE = "apache-2.0"  # of the published weights
TOKENS_OF_1500_BP = 312  # about: measured on bacterial DNA
LORA_TARGETS = ("attention.self.Wqkv",)
IA3_TARGETS = {  # protocol: (Linears whose output is scaled, Linears whose input is scaled)
    # Liu et al. 2022, section 3.3
    "corrected": (("attention.self.Wqkv[key,value]",), ("mlp.wo",)),
    "published": (("attention.self.Wqkv",), ("attention.output.dense",)),
}
LAYER_ORDER = (
    "attention.self.Wqkv", "attention.self",
    "attention.output.dense", "attention.output.LayerNorm",
    "mlp.gated_layers", "mlp.wo", "mlp.layernorm",
)


class DNABert2Config(PretrainedConfig):
    """Sizes of one checkpoint, under the names of the hub's config.json."""

    model_type = "bert"

    def __init__(
        self, *, vocab_size=4096, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, type_vocab_size=2, layer_norm_eps=1e-12, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0, initializer_range=0.02, pad_token_id=3, **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.type_vocab_size = type_vocab_size
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, **kwargs)


# A key of this architecture's config.json that other BERTs' do not have.
MARKER_KEY = "alibi_starting_size"
MARKER_REASON = "only DNABERT-2's has that: its positions are ALiBi, BERT's are learned"
# A config.json may ask for another activation: key -> the only value we compute.
REQUIRED_VALUES = {"hidden_act": "gelu"}


def alibi_slopes(nh, device="cpu"):
    """One slope per head, (nh,): 2^(-8i/nh), i = 1 .. nh, where nh is a power of two.

    Else the slopes of the power of two below, then every second one of the power above.
    """
    below = 2 ** math.floor(math.log2(nh))
    i = torch.arange(1, below + 1, device=device, dtype=torch.float32)
    exponents = torch.cat((8 / below * i, 4 / below * (2 * i - 1)))
    return torch.exp2(-exponents[:nh])


def alibi_bias(T, nh, device):
    """-slope * |i - j| for query i and key j: (1, nh, T, T), float32.

    It is made on the device: nothing is copied to it.
    """
    position = torch.arange(T, device=device, dtype=torch.float32)
    distance = (position[None, :] - position[:, None]).abs()  # (T, T)
    slopes = alibi_slopes(nh, device)[:, None, None]  # (nh, 1, 1)
    return -(slopes * distance)[None]


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.Wqkv = nn.Linear(H, 3 * H)  # rows: queries, keys, values

    def forward(self, x, bias):
        B, T, H = x.shape
        qkv = self.Wqkv(x).view(B, T, 3, self.num_heads, -1)  # (B, T, 3, nh, hs)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        dropout_p = self.dropout_p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)
        return y.transpose(1, 2).reshape(B, T, H)


class SelfOutput(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, y, x):
        return self.LayerNorm(x + self.dropout(self.dense(y)))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = SelfOutput(config)

    def forward(self, x, bias):
        return self.output(self.self(x, bias), x)


class GatedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        # The gate and the value in one multiplication.
        self.gated_layers = nn.Linear(H, 2 * I, bias=False)
        self.wo = nn.Linear(I, H)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = nn.LayerNorm(H, eps=config.layer_norm_eps)

    def forward(self, x):
        gate, value = self.gated_layers(x).chunk(2, dim=-1)  # each (B, T, I)
        return self.layernorm(x + self.wo(self.dropout(F.gelu(gate) * value)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = GatedMLP(config)

    def forward(self, x, bias):
        return self.mlp(self.attention(x, bias))


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        # Only row 0 is ever used.
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids):
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class DNABert2(PreTrainedModel):
    """The encoder alone: no pooler, no masked-LM head."""

    config_class = DNABert2Config
    base_model_prefix = "bert"
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
        bias = alibi_bias(input_ids.shape[1], self.config.num_attention_heads, input_ids.device)
        if attention_mask is not None:  # bias becomes (B, nh, T, T): no query looks at padding
            padding = ~attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
            bias = bias.masked_fill(padding, float("-inf"))
        x = self.embeddings(input_ids)
        bias = bias.to(product_dtype(x))
        for layer in self.encoder.layer:
            x = layer(x, bias)
        return x


def dropped_keys(config):
    """Keys of a hub checkpoint, less `bert.`, that we do not load: the forward never uses them."""
    head = (
        "bias", "decoder.weight", "decoder.bias",
        "transform.dense.weight", "transform.dense.bias",
        "transform.LayerNorm.weight", "transform.LayerNorm.bias",
    )
    encoder = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}
    return encoder | {f"cls.predictions.{name}" for name in head}
