"""The peer that the benchmarks compare with: what the published code runs for the Nucleotide
Transformer, built from public parts.

It is transformers' EsmForMaskedLM with the SwiGLU feed-forward put in, eager attention, and its
masked-LM head, whose output the loss never reads. LoRA and (IA)3 are those of the PEFT library;
freezing is by requires_grad. The peer takes the settings of taxa/strategies.py, so it trains the
same parameters, and its weights can be those of one of our classifiers: then it computes the same
logits (tests/test_peer.py).
"""

import torch.nn.functional as F
from peft import IA3Config, LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import EsmConfig, EsmForMaskedLM

from taxa.model import masked_mean
from taxa.strategies import trainable_names


class SwiGLU(nn.Module):
    """The feed-forward's first half as the hub's modeling_esm.py has it.

    It takes the place of transformers' EsmIntermediate.
    """

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)

    def forward(self, hidden):
        gate, value = self.dense(hidden).chunk(2, dim=-1)
        return F.silu(gate) * value


class PeerClassifier(nn.Module):
    """EsmForMaskedLM, masked mean of its last hidden state, three heads."""

    def __init__(self, config, num_classes):
        super().__init__()
        self.esm = EsmForMaskedLM(config)
        for layer in self.esm.esm.encoder.layer:
            layer.intermediate = SwiGLU(config)
            layer.output.dense = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.heads = nn.ModuleDict({
            rank: nn.Linear(config.hidden_size, C) for rank, C in num_classes.items()
        })

    def forward(self, input_ids, attention_mask):
        """input_ids (B, T), attention_mask (B, T) -> {rank: logits (B, C)}."""
        output = self.esm(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        pooled = masked_mean(output.hidden_states[-1], attention_mask)
        return {rank: head(pooled) for rank, head in self.heads.items()}


def peer_config(ours, attention="eager"):
    """transformers' EsmConfig with the sizes of one of our NucleotideTransformerConfig."""
    return EsmConfig(
        vocab_size=ours.vocab_size,
        pad_token_id=ours.pad_token_id,
        mask_token_id=2,
        hidden_size=ours.hidden_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        intermediate_size=ours.intermediate_size,
        max_position_embeddings=ours.max_position_embeddings,
        position_embedding_type="rotary",
        layer_norm_eps=ours.layer_norm_eps,
        emb_layer_norm_before=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        token_dropout=False,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )


def make_peer(classifier, settings, attention="eager"):
    """The peer of one of our classifiers that has no adapters yet.

    It is in train mode, has the classifier's weights, and is adapted and frozen by `settings`.
    Raises ValueError when a weight of the classifier has no counterpart.
    """

    def its_name(name):
        """The peer's name of one of our parameters."""
        if name.startswith("backbone."):
            return "esm.esm." + name.removeprefix("backbone.")
        return name

    num_classes = {rank: head.out_features for rank, head in classifier.heads.items()}
    peer = PeerClassifier(peer_config(classifier.backbone.config, attention), num_classes)
    state = {its_name(name): p for name, p in classifier.state_dict().items()}
    unknown = peer.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"no counterpart of {', '.join(unknown)}")
    if settings["strategy"] in ("lora", "ia3"):
        peer.requires_grad_(False)
        peer.esm = inject_adapter_in_model(peft_config(settings), peer.esm)
        peer.heads.requires_grad_(settings["heads"] == "train")
    else:
        names = {its_name(name) for name in trainable_names(classifier, settings)}
        full = settings["strategy"] == "full"
        for name, p in peer.named_parameters():
            p.requires_grad_(name in names or full and name.startswith("esm.lm_head."))
    return peer.train()


def peft_config(settings):
    """Our targets as the PEFT library writes them: a regular expression over the whole name."""

    def pattern(targets):
        escaped = (target.replace(".", r"\.").replace("*", r"\d+") for target in targets)
        return f".*({'|'.join(escaped)})"

    targets = settings["targets"]
    if settings["strategy"] == "lora":
        return LoraConfig(
            r=settings["r"],
            lora_alpha=settings["lora_alpha"],
            lora_dropout=settings["lora_dropout"],
            target_modules=pattern(targets),
        )
    feedforward = settings["feedforward_targets"]
    return IA3Config(
        target_modules=pattern(targets + feedforward),
        feedforward_modules=pattern(feedforward),
    )
