"""Nucleotide Transformer v2: the ESM encoder with rotary attention, pre-LayerNorm and a SwiGLU feed-forward without biases.

Source: Dalla-Torre et al. 2024, "The Nucleotide Transformer" (v2 models); hub files `modeling_esm.py` and `config.json` of
InstaDeepAI/nucleotide-transformer-v2-*. Module names and registration order are the hub checkpoints' own.

Shapes: B sequences, T tokens, H hidden_size, nh attention heads, hs = H / nh head size, I intermediate_size, V vocab_size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from taxa.recompute import gated, recomputed, run_layers
from taxa.runtime.precision import product_dtype

LICENSE = "cc-by-nc-sa-4.0"  # of the published weights
LORA_TARGETS = ("attention.self.query", "attention.self.value")
# (IA)3 as its authors place it (Liu et al. 2022, section 3.3): keys, values, and the input of the feed-forward's second projection.
IA3_OUTPUTS = ("attention.self.key", "attention.self.value")
IA3_INPUTS = ("layer.*.output.dense",)
# (IA)3 as the published code places it.
IA3_OUTPUTS_PUBLISHED = ("attention.self.query", "attention.self.value")
IA3_INPUTS_PUBLISHED = ("attention.output.dense",)
IA3 = {"corrected": (IA3_OUTPUTS, IA3_INPUTS), "published": (IA3_OUTPUTS_PUBLISHED, IA3_INPUTS_PUBLISHED)}  # --protocol


class NucleotideTransformerConfig(PretrainedConfig):
    """Sizes of one checkpoint, under the names of the hub's config.json."""

    model_type = "esm"

    def __init__(self, vocab_size=4107, hidden_size=512, num_hidden_layers=12, num_attention_heads=16, intermediate_size=2048,
                 max_position_embeddings=2050, layer_norm_eps=1e-12, initializer_range=0.02, pad_token_id=1, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings  # only sizes the unused position table of the checkpoints
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, **kwargs)


# What a config.json of this architecture has and other ESM models' do not.
SIGN, SIGN_MEANS = "add_bias_fnn", "only Nucleotide Transformer v2's has that: its feed-forward is a SwiGLU, ESM's and v1's is not"

# What a config.json may ask for that is not this architecture (ESM-2, NT v1): name -> the only value we compute.
FIXED = {
    "position_embedding_type": "rotary", "add_bias_fnn": False, "emb_layer_norm_before": False, "token_dropout": False,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}


def rotary_table(T, hs, device):
    """cos and sin, each (T, hs), of the angles t * 10000^(-2i/hs); the two halves of the head size share their angles."""
    inv_freq = 10000.0 ** (-torch.arange(0, hs, 2, device=device, dtype=torch.float32) / hs)  # (hs/2,)
    angles = torch.outer(torch.arange(T, device=device, dtype=torch.float32), inv_freq)  # (T, hs/2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, hs)
    return angles.cos(), angles.sin()


def turn(x, cos, sin):
    """Each pair (x[i], x[i + hs/2]) of x (B, nh, T, hs) turned by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    sin, half = sin[..., :first.shape[-1]], first.shape[-1]
    y = x * cos
    y[..., :half].addcmul_(second, sin, value=-1)
    y[..., half:].addcmul_(first, sin)
    return y


class Rotate(torch.autograd.Function):
    """turn(); its gradient is the turn back, where autograd alone would join and split the halves."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return turn(dy, cos, -sin), None, None


def rotate(x, cos, sin):
    """Rotary embedding of x (B, nh, T, hs)."""
    return turn(x, cos, sin) if torch.compiler.is_compiling() else Rotate.apply(x, cos, sin)


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
        q, k, v = (proj(x).view(B, T, self.num_heads, -1).transpose(1, 2) for proj in (self.query, self.key, self.value))
        q = rotate(q, cos, sin)
        # k is kept as projected, which (IA)3 on keys needs too, and rotated again in the backward
        y = recomputed(lambda k: rotate(k, cos, sin), k,
                       then=lambda k: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))  # (B, nh, T, hs)
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
        return x + self.output.dense(recomputed(self.LayerNorm, x, then=lambda y: self.self(y, mask, cos, sin)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.attention = Attention(config)
        self.intermediate = Dense(H, 2 * I, bias=False)  # the gate and the value of SwiGLU in one product
        self.output = Dense(I, H, bias=False)
        self.LayerNorm = nn.LayerNorm(H, eps=config.layer_norm_eps)

    def forward(self, x, mask, cos, sin):
        x = self.attention(x, mask, cos, sin)
        h = recomputed(self.LayerNorm, x, then=self.intermediate.dense)  # (B, T, 2I): gate, value
        return x + recomputed(swiglu, h, then=self.output.dense)


def swiglu(h):
    """silu(gate) * value of h (B, T, 2I) = (gate, value) -> (B, T, I)."""
    return gated("silu", h)


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
    """The encoder alone: no masked-LM head, no contact head, no position table (rotary attention never reads it)."""

    config_class = NucleotideTransformerConfig
    base_model_prefix = "esm"
    main_input_name = "input_ids"
    recompute = False  # True: keep only each layer's input for the backward

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def forward(self, input_ids, attention_mask):
        """input_ids (B, T), attention_mask (B, T) with 1 at real tokens -> last_hidden_state (B, T, H)."""
        T, config = input_ids.shape[1], self.config
        mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T): no query looks at padding
        x = self.embeddings.word_embeddings(input_ids)
        table = rotary_table(T, config.hidden_size // config.num_attention_heads, input_ids.device)
        cos, sin = (angles.to(product_dtype(x)) for angles in table)
        x = run_layers(self.encoder.layer, x, mask, cos, sin, whole=self.recompute)
        return self.encoder.emb_layer_norm_after(x)

    def published_parameters(self, held):
        """Yield (name, elements) of every parameter of the published model (the masked-LM class), in its registration order.

        `held` gives ours, {name: elements}; the checkpoint also registers a position table, a contact head and an untied LM head,
        which the loss never uses but which `freeze75` of the published code counts.
        """
        config = self.config
        H, V = config.hidden_size, config.vocab_size
        for name, size in held.items():
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


def dropped_keys(config):
    """Keys of a hub checkpoint that we do not load, without the `esm.` prefix: what the forward never uses, and buffers."""
    return {
        "embeddings.position_embeddings.weight", "embeddings.position_ids",
        "contact_head.regression.weight", "contact_head.regression.bias",
        "lm_head.bias", "lm_head.dense.weight", "lm_head.dense.bias", "lm_head.layer_norm.weight", "lm_head.layer_norm.bias",
        "lm_head.decoder.weight", "lm_head.decoder.bias",
    } | {f"encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq" for i in range(config.num_hidden_layers)}
