"""What several test files share: small networks and folders of weights, batches, naive loops, runs
as a user types them.
"""

import functools
import importlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import free_port
from safetensors.torch import save_file

from taxa.backbones import FAMILIES, get_model
from taxa.backbones.unused_tensors import published_sizes
from taxa.errors import InputError
from taxa.model import sequence_losses
from taxa.runtime import cli
from taxa.strategies import classifier_on_meta
from taxa.training.settings import settings_from_flags

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # facts and files that are not part of the repository
TINY = ["tiny-nt", "tiny-dnabert"]
STRATEGIES = {
    "full": [],
    "random": [],
    "lora": ["--r", "4", "--lora-dropout", "0"],
    "ia3": [],
    "freeze75": [],
}
GOLDEN_FOLDER = ROOT / "tests" / "golden"
GOLDEN = {
    "tiny-nt": GOLDEN_FOLDER / "nt_tiny",
    "tiny-dnabert": GOLDEN_FOLDER / "dnabert_tiny",
}

# Sizes for everything that is made here: V = 30, H = 24, 3 heads (no power of two: ALiBi treats it
# apart), I = 20.
V, H, HEADS, INNER = 30, 24, 3, 20
SIZES = {
    "vocab_size": V, "hidden_size": H, "num_attention_heads": HEADS, "intermediate_size": INNER,
}
CONFIG = {  # as the hub's config.json, extra keys included
    "tiny-nt": {
        "model_type": "esm", "architectures": ["EsmForMaskedLM"],
        "position_embedding_type": "rotary", "max_position_embeddings": 10,
        "add_bias_fnn": False, "emb_layer_norm_before": False, "token_dropout": False,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "is_folding_model": False, "tie_word_embeddings": False,
        "layer_norm_eps": 1e-12, "num_hidden_layers": 1, **SIZES,
    },
    "tiny-dnabert": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_act": "gelu",
        "max_position_embeddings": 512, "alibi_starting_size": 512, "type_vocab_size": 2,
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12, "num_hidden_layers": 1, **SIZES,
    },
}
PREFIX = {"tiny-nt": "esm.", "tiny-dnabert": "bert."}
# The hub's names of a network of one layer, written by hand, with the shapes at the sizes above.
KEYS = {
    "tiny-nt": {
        "embeddings.word_embeddings.weight": (30, 24),
        "encoder.layer.0.attention.self.query.weight": (24, 24),
        "encoder.layer.0.attention.self.query.bias": (24,),
        "encoder.layer.0.attention.self.key.weight": (24, 24),
        "encoder.layer.0.attention.self.key.bias": (24,),
        "encoder.layer.0.attention.self.value.weight": (24, 24),
        "encoder.layer.0.attention.self.value.bias": (24,),
        "encoder.layer.0.attention.output.dense.weight": (24, 24),
        "encoder.layer.0.attention.output.dense.bias": (24,),
        "encoder.layer.0.attention.LayerNorm.weight": (24,),
        "encoder.layer.0.attention.LayerNorm.bias": (24,),
        "encoder.layer.0.intermediate.dense.weight": (40, 24),
        "encoder.layer.0.output.dense.weight": (24, 20),
        "encoder.layer.0.LayerNorm.weight": (24,),
        "encoder.layer.0.LayerNorm.bias": (24,),
        "encoder.emb_layer_norm_after.weight": (24,),
        "encoder.emb_layer_norm_after.bias": (24,),
    },
    "tiny-dnabert": {
        "embeddings.word_embeddings.weight": (30, 24),
        "embeddings.token_type_embeddings.weight": (2, 24),
        "embeddings.LayerNorm.weight": (24,),
        "embeddings.LayerNorm.bias": (24,),
        "encoder.layer.0.attention.self.Wqkv.weight": (72, 24),
        "encoder.layer.0.attention.self.Wqkv.bias": (72,),
        "encoder.layer.0.attention.output.dense.weight": (24, 24),
        "encoder.layer.0.attention.output.dense.bias": (24,),
        "encoder.layer.0.attention.output.LayerNorm.weight": (24,),
        "encoder.layer.0.attention.output.LayerNorm.bias": (24,),
        "encoder.layer.0.mlp.gated_layers.weight": (40, 24),
        "encoder.layer.0.mlp.wo.weight": (24, 20),
        "encoder.layer.0.mlp.wo.bias": (24,),
        "encoder.layer.0.mlp.layernorm.weight": (24,),
        "encoder.layer.0.mlp.layernorm.bias": (24,),
    },
}
# What a hub checkpoint holds besides: full names, as they stand in the files (the heads have no
# prefix of the encoder).
DROPPED = {
    "tiny-nt": {
        "esm.embeddings.position_embeddings.weight": (10, 24),
        "esm.embeddings.position_ids": (1, 10),
        "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq": (4,),
        "esm.contact_head.regression.weight": (1, 3),
        "esm.contact_head.regression.bias": (1,),
        "lm_head.bias": (30,),
        "lm_head.dense.weight": (24, 24),
        "lm_head.dense.bias": (24,),
        "lm_head.layer_norm.weight": (24,),
        "lm_head.layer_norm.bias": (24,),
        "lm_head.decoder.weight": (30, 24),
        "lm_head.decoder.bias": (30,),
    },
    "tiny-dnabert": {
        "bert.embeddings.position_ids": (1, 512),
        "bert.pooler.dense.weight": (24, 24),
        "bert.pooler.dense.bias": (24,),
        "cls.predictions.bias": (30,),
        "cls.predictions.decoder.weight": (30, 24),
        "cls.predictions.decoder.bias": (30,),
        "cls.predictions.transform.dense.weight": (24, 24),
        "cls.predictions.transform.dense.bias": (24,),
        "cls.predictions.transform.LayerNorm.weight": (24,),
        "cls.predictions.transform.LayerNorm.bias": (24,),
    },
}
WEIGHT_IN_LAYER = {
    "tiny-nt": "encoder.layer.0.output.dense.weight",
    "tiny-dnabert": "encoder.layer.0.mlp.wo.weight",
}


def random_state(name, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).to(dtype)
            for key, shape in KEYS[name].items()}


def hub_folder(folder, name, state=None, config=None, prefix="", binary=False, heads=False):
    """A folder as the hub has it.

    state: its keys are without the prefix; heads: with the tensors that we drop.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG[name] if config is None else config))
    state = random_state(name) if state is None else state
    state = {prefix + key: tensor for key, tensor in state.items()}
    if heads:
        for key, shape in DROPPED[name].items():
            key = key if prefix else key.removeprefix(PREFIX[name])
            state[key] = torch.randn(shape)
    if binary:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return folder


def scrambled(name, layers=2, **sizes):
    """A small network in which no parameter is a 0 or a 1 that could hide its own absence."""
    torch.manual_seed(7)
    family = FAMILIES[get_model(name).family]
    model = family.model(family.config(**(SIZES | {"num_hidden_layers": layers} | sizes)))
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(0.0, 0.3)
            if p.dim() == 1 and key.endswith("weight"):  # of a LayerNorm
                p += 1.0
    return model.eval()


def batch(seed=0, lengths=(9, 4, 1), vocabulary=V, pad=1):
    """Right-padded input_ids and attention_mask, each (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, pad), mask


def logits(model, seed=0):
    """All ranks' logits of one batch, (B, classes of all ranks)."""
    with torch.no_grad():
        return torch.cat(list(model(*batch(seed)).values()), dim=1)


def assert_equals_peft(ours, theirs, pairs):
    """Both models give the same logits, and the two of each pair get the same gradient.

    ours, theirs: the same base with our adapters and with those of the PEFT library.
    pairs: {name: (our parameter, PEFT's)}.
    """
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    labels = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 0, 3]])
    for model in (ours, theirs):
        sequence_losses(model(*batch()), labels).mean().backward()
    for key, (mine, reference) in pairs.items():
        assert mine.grad.abs().max() > 1e-3, key
        torch.testing.assert_close(mine.grad, reference.grad.view_as(mine), rtol=1e-5, atol=1e-5)


def without_dropout(model):
    """Train mode, every dropout probability 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def parameter_counts(name):
    """{"held": parameters of our backbone, "dropped": those that the published model holds
    besides}, from shapes alone.
    """
    classifier = classifier_on_meta(get_model(name), (1, 1, 1), settings_from_flags(name, "full"))
    held = sum(p.numel() for p in classifier.backbone.parameters())
    sizes = published_sizes(classifier)
    published = sum(n for name, n in sizes.items() if name.startswith("backbone."))
    return {"held": held, "dropped": published - held}


class Touch:
    """A pickle that, when unpickled, makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ---------------------------------------------------------------- the architectures as plain loops


def layer_norm(x, weight, bias, eps=1e-12):
    """One token."""
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + eps) * weight + bias


def layer_norms(x, w, prefix):
    """All tokens, x (T, H), with the weight and bias of a LayerNorm of that name."""
    weight, bias = w[prefix + "weight"], w[prefix + "bias"]
    return np.array([layer_norm(row, weight, bias) for row in x])


def attend(q, k, v, bias):
    """One head. q, k, v (T, hs); bias(i, j) is added to the scaled score -> (T, hs)."""
    T, hs = q.shape
    out = np.zeros_like(v)
    for i in range(T):
        scores = [sum(q[i, d] * k[j, d] for d in range(hs)) / math.sqrt(hs) + bias(i, j)
                  for j in range(T)]
        weights = [math.exp(s - max(scores)) for s in scores]
        for j in range(T):
            out[i] += weights[j] / sum(weights) * v[j]
    return out


def turn(x):
    """Rotary embedding of one head, x (T, hs): the pair (i, i + hs/2) of token t is turned by
    t / 10000^(2i/hs).
    """
    T, hs = x.shape
    out = np.zeros_like(x)
    for t in range(T):
        for i in range(hs // 2):
            angle = t / 10000 ** (2 * i / hs)
            a, b = x[t, i], x[t, i + hs // 2]
            out[t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, i + hs // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def silu(x):
    return x / (1 + math.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def gated(hidden, act):
    """The first half through the activation, times the second."""
    half = len(hidden) // 2
    return np.array([act(hidden[i]) * hidden[half + i] for i in range(half)])


def naive_nt(w, ids, heads, layers):
    x = w["embeddings.word_embeddings.weight"][ids]  # (T, H)
    hs = x.shape[1] // heads
    for n in range(layers):
        a, at = f"encoder.layer.{n}.", f"encoder.layer.{n}.attention."
        normed = layer_norms(x, w, at + "LayerNorm.")
        q, k, v = (normed @ w[f"{at}self.{p}.weight"].T + w[f"{at}self.{p}.bias"]
                   for p in ("query", "key", "value"))
        outs = []
        for h in range(heads):
            c = slice(h * hs, (h + 1) * hs)
            outs.append(attend(turn(q[:, c]), turn(k[:, c]), v[:, c], lambda i, j: 0.0))
        y = np.concatenate(outs, axis=1)
        x = x + y @ w[at + "output.dense.weight"].T + w[at + "output.dense.bias"]
        normed = layer_norms(x, w, a + "LayerNorm.")
        inner = normed @ w[a + "intermediate.dense.weight"].T
        x = x + np.array([gated(row, silu) for row in inner]) @ w[a + "output.dense.weight"].T
    return layer_norms(x, w, "encoder.emb_layer_norm_after.")


# Press et al. 2022; for 3 and 12 heads as MosaicBERT continues the list: every second slope of
# twice as many heads.
SLOPES = {
    3: [1 / 16, 1 / 256, 1 / 4],
    4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
    8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
    12: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256,
         2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
}


def naive_dnabert(w, ids, heads, layers):
    x = w["embeddings.word_embeddings.weight"][ids]  # (T, H)
    x = layer_norms(x + w["embeddings.token_type_embeddings.weight"][0], w, "embeddings.LayerNorm.")
    size = x.shape[1]
    hs = size // heads
    for n in range(layers):
        at, mlp = f"encoder.layer.{n}.attention.", f"encoder.layer.{n}.mlp."
        qkv = x @ w[at + "self.Wqkv.weight"].T + w[at + "self.Wqkv.bias"]
        outs = []
        for h in range(heads):
            q, k, v = (qkv[:, part * size + h * hs: part * size + (h + 1) * hs]
                       for part in range(3))
            outs.append(attend(q, k, v, lambda i, j, h=h: -SLOPES[heads][h] * abs(i - j)))
        y = np.concatenate(outs, axis=1)
        x = x + y @ w[at + "output.dense.weight"].T + w[at + "output.dense.bias"]
        x = layer_norms(x, w, at + "output.LayerNorm.")
        inner = x @ w[mlp + "gated_layers.weight"].T
        x = x + np.array([gated(row, gelu) for row in inner]) @ w[mlp + "wo.weight"].T
        x = layer_norms(x + w[mlp + "wo.bias"], w, mlp + "layernorm.")
    return x


# ------------------------------------------------------------------ runs as a user types them


def command(model, strategy, data, weights, out, *more):
    return [
        "--model", model, "--strategy", strategy, "--data", str(data),
        "--weights", str(weights[model]), "--out", str(out),
        "--batch-size", "8", "--lr", "0.01", *STRATEGIES[strategy], *more,
    ]


def parser_of(script, monkeypatch):
    """The parser that a script's parse_args() builds."""
    built = []

    def stop(parser, args=None, namespace=None):
        built.append(parser)
        raise InputError("built")

    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    with pytest.raises(InputError, match="built"):
        importlib.import_module(script).parse_args([])
    monkeypatch.undo()
    return built[0]


def python(*arguments, cwd, **environment):
    """Run a script with this interpreter; returns the finished process."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=150,
    )


@functools.cache
def fork_server():
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "forks.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )


def forked(*ranks, cwd, **environment):
    """Run a script by one process, or by several as srun starts them: one list of words a rank.

    Returns the finished processes. As python(), but each is forked from one that has imported torch
    and the scripts already (forks.py), which saves seconds. So it is not for what an import reads
    from the environment.
    """
    environments = [environment] * len(ranks)
    if len(ranks) > 1:
        meet = {
            "WORLD_SIZE": str(len(ranks)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        environments = [environment | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                        for rank in range(len(ranks))]
    server = fork_server()
    words = [list(map(str, each)) for each in ranks]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[f"{folder}/{rank}.out", f"{folder}/{rank}.err"] for rank in range(len(ranks))]
        asked = {
            "words": words, "cwd": str(cwd), "environments": environments, "outputs": outputs,
        }
        print(json.dumps(asked), file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], 150)[0]:
            server.kill()
            raise TimeoutError(f"{words} did not end within 150 s")
        answer = server.stdout.readline()
        if not answer:
            raise ChildProcessError("forks.py has ended")
        texts = [[Path(path).read_text() for path in each] for each in outputs]
    return [subprocess.CompletedProcess(each, status, out, err)
            for each, status, (out, err) in zip(words, json.loads(answer), texts)]
