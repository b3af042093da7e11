"""The two architectures against golden tensors and plain loops, their names and sizes, every way of
loading them.
"""

import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CONFIG,
    DROPPED,
    GOLDEN,
    KEYS,
    PREFIX,
    ROOT,
    SHARED,
    SLOPES,
    TINY,
    WEIGHT_IN_LAYER,
    Touch,
    V,
    batch,
    hub_folder,
    naive_dnabert,
    naive_nt,
    parameter_counts,
    random_state,
    scrambled,
    without_dropout,
)
from safetensors.torch import load_file
from transformers import PretrainedConfig

from taxa.backbones import (
    FAMILIES,
    MODELS,
    backbone_config,
    dnabert2,
    get_model,
    load_backbone,
    loading,
)
from taxa.errors import InputError
from taxa.model import masked_mean

# ------------------------------------------------------------------ golden tensors


def golden(name):
    """(model, tensors): a checkpoint of tests/golden, and what it gives."""
    return load_backbone(name, GOLDEN[name]), load_file(GOLDEN[name] / "expected.safetensors")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("training", [False, True])
def test_golden_outputs(name, training):
    model, expected = golden(name)
    model = without_dropout(model) if training else model.eval()
    mask = expected["attention_mask"]
    with torch.no_grad():
        hidden = model(expected["input_ids"], mask)
    here = mask.bool()
    torch.testing.assert_close(hidden[here], expected["last_hidden_state"][here], rtol=0, atol=1e-4)
    torch.testing.assert_close(masked_mean(hidden, mask), expected["pooled"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_golden_gradient(name):
    """The gradient of sum(sin(pooled)) by the word embeddings, summed over the vocabulary."""
    model, expected = golden(name)
    mask = expected["attention_mask"]
    pooled = masked_mean(model.eval()(expected["input_ids"], mask), mask)
    pooled.sin().sum().backward()
    found = model.embeddings.word_embeddings.weight.grad.sum(dim=0)
    torch.testing.assert_close(found, expected["grad_word_embeddings_sum"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_from_pretrained_gives_eval_mode_and_float32(tmp_path, name):
    model = load_backbone(name, hub_folder(tmp_path / "w", name))
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------ plain loops in float64


@pytest.mark.parametrize("name, heads", [
    ("tiny-nt", 3), ("tiny-nt", 4), ("tiny-dnabert", 3), ("tiny-dnabert", 4),
])
@pytest.mark.parametrize("training", [False, True])
def test_equals_naive_loops(name, heads, training):
    model = scrambled(name, num_attention_heads=heads)
    model = without_dropout(model) if training else model
    w = {key: p.detach().double().numpy() for key, p in model.state_dict().items()}
    ids, mask = batch()
    with torch.no_grad():
        hidden = model(ids, mask)
    naive = {"tiny-nt": naive_nt, "tiny-dnabert": naive_dnabert}[name]
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        expected = naive(w, ids[row, :length].numpy(), heads, layers=2)
        np.testing.assert_allclose(hidden[row, :length].numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("nh", SLOPES)
def test_alibi_slopes_and_bias(nh):
    assert dnabert2.alibi_slopes(nh).tolist() == pytest.approx(SLOPES[nh], rel=1e-6)
    bias = dnabert2.alibi_bias(5, nh, "cpu")
    assert bias.shape == (1, nh, 5, 5)
    for h in range(nh):
        for i in range(5):
            for j in range(5):
                expected = -SLOPES[nh][h] * abs(i - j)
                assert bias[0, h, i, j].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_padding_changes_nothing(name):
    """Neither how much a batch is padded to the right nor what stands there touches the tokens that
    are not masked.
    """
    model = scrambled(name)
    ids, mask = batch(lengths=(9, 4, 1))
    with torch.no_grad():
        padded = model(ids, mask)
        longer_ids = torch.nn.functional.pad(ids, (0, 6), value=5)
        longer_mask = torch.nn.functional.pad(mask, (0, 6))
        more = model(longer_ids, longer_mask)
        junk = model(torch.where(mask.bool(), ids, torch.tensor(17)), mask)
        for row, length in enumerate((9, 4, 1)):
            alone = model(ids[row: row + 1, :length], torch.ones(1, length, dtype=torch.long))[0]
            for other in (padded, more, junk):
                torch.testing.assert_close(other[row, :length], alone, rtol=0, atol=1e-5)
    assert torch.isfinite(more).all()


@pytest.mark.parametrize("name", TINY)
def test_attention_looks_both_ways_and_position_matters(name):
    model = scrambled(name)
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        hidden = model(ids, mask)
        last_changed = model(torch.tensor([[3, 4, 5, 7]]), mask)
        swapped = model(torch.tensor([[3, 5, 4, 6]]), mask)
    assert (hidden[0, 0] - last_changed[0, 0]).abs().max() > 1e-3
    assert (hidden[0, 0] - swapped[0, 0]).abs().max() > 1e-3


def test_dropout_is_where_the_published_models_have_it():
    """NT has none; DNABERT drops with p 0.1 after the embeddings, after the attention's projection,
    in the MLP.
    """
    assert not [m for m in scrambled("tiny-nt").modules() if isinstance(m, torch.nn.Dropout)]
    model = scrambled("tiny-dnabert", layers=1)
    found = {key: m.p for key, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert found == {
        "embeddings.dropout": 0.1,
        "encoder.layer.0.attention.output.dropout": 0.1,
        "encoder.layer.0.mlp.dropout": 0.1,
    }
    ids, mask = batch()
    with torch.no_grad():
        torch.manual_seed(1)
        first = model.train()(ids, mask)
        assert not torch.equal(first, model(ids, mask))
        assert torch.equal(model.eval()(ids, mask), model(ids, mask))


# ------------------------------------------------------------------ the table, names and sizes


def test_keys_are_the_hubs():
    for name in TINY:
        family = FAMILIES[get_model(name).family]
        with torch.device("meta"):
            model = family.model(family.config(**CONFIG[name]))
        assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == KEYS[name]
        assert {key: tuple(p.shape) for key, p in model.named_parameters()} == KEYS[name]
        dropped = {key.removeprefix(PREFIX[name]) for key in DROPPED[name]}
        assert dropped == family.module.dropped_keys(model.config)


def test_parameter_counts():
    # nt50m by hand: V H + 12 (4 (H^2 + H) + 4 H + 2 I H + I H) + 2 H, with V 4107, H 512, I 2048
    held = 4107 * 512 + 12 * (4 * (512**2 + 512) + 4 * 512 + 3 * 2048 * 512) + 2 * 512
    # position table, contact head, LM head
    heads = 2050 * 512 + (12 * 16 + 1) + (4107 + 512**2 + 3 * 512 + 4107 * 512)
    assert parameter_counts("nt50m") == {"held": held, "dropped": heads}
    assert held + heads == 55_904_972
    for name in ("dnabert2", "dnaberts"):
        counts = parameter_counts(name)
        assert counts["dropped"] == 768**2 + 768  # the pooler
        assert sum(counts.values()) == 117_068_544
    assert sum(parameter_counts("nt100m").values()) == 97_889_132  # Dalla-Torre et al.: 98 M
    assert sum(parameter_counts("nt250m").values()) == 235_120_780


@pytest.mark.parametrize("name", ["nt50m", "nt100m", "nt250m"])
def test_parameter_counts_fit_the_published_files(name):
    """A file of float32 holds 4 bytes per parameter, and less than 150 kB of names and buffers
    besides.
    """
    parameters = sum(parameter_counts(name).values())
    for file, fact in facts()["models"][name]["files"].items():
        if file in ("model.safetensors", "pytorch_model.bin"):
            assert 0 <= fact["size"] - 4 * parameters < 150_000


def facts():
    path = SHARED / "facts" / "backbones.json"
    if not path.exists():
        pytest.skip("backbones.json: the facts are not part of the repository")
    return json.loads(path.read_text())


def test_rows_equal_the_facts():
    models = facts()["models"]
    assert set(models) == {name for name, row in MODELS.items() if row.hub}
    for name, fact in models.items():
        row = MODELS[name]
        config = backbone_config(name)
        assert (row.hub, row.revision) == (fact["hub"], fact["revision"])
        keys = [
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "vocab_size", "layer_norm_eps",
        ]
        keys += {
            "nt": ["max_position_embeddings", "pad_token_id"],
            "dnabert": ["type_vocab_size", "hidden_dropout_prob", "attention_probs_dropout_prob"],
        }[row.family]
        assert {key: getattr(config, key) for key in keys} == {key: fact[key] for key in keys}
        if row.family == "dnabert":
            assert config.pad_token_id == fact["special_ids"]["[PAD]"]


RATES = {
    "nt50m": (2e-4, 128),
    "nt100m": (1e-4, 64),
    "nt250m": (1e-4, 64),
    "dnabert2": (2.5e-5, 16),
    "dnaberts": (2.5e-5, 16),
}


def test_learning_rates_and_batch_sizes():
    published = {name: row for name, row in MODELS.items() if row.hub}
    found = {name: (row.learning_rate, row.batch_size) for name, row in published.items()}
    assert found == RATES


def test_learning_rates_and_batch_sizes_stand_in_the_protocol():
    path = SHARED / "facts" / "published_protocol.md"
    if not path.exists():
        pytest.skip("published_protocol.md: the facts are not part of the repository")
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {}
    for row in rows[1:]:
        for name in row[0].split(","):
            table[name.strip()] = (row[1], int(row[2]))
    assert set(table) == set(RATES)
    for name, (rates, batch_size) in table.items():
        assert MODELS[name].batch_size == batch_size
        # DNABERT has two: the paper's, then the one of the supplement and the configs.
        last = re.findall(r"[0-9.]+e-[0-9]+", rates)[-1]
        assert MODELS[name].learning_rate == float(last)


def test_tokenizers_and_families_of_the_rows():
    assert {name: (row.family, row.tokenizer) for name, row in MODELS.items()} == {
        "nt50m": ("nt", "nt"),
        "nt100m": ("nt", "nt"),
        "nt250m": ("nt", "nt"),
        "dnabert2": ("dnabert", "dnabert"),
        "dnaberts": ("dnabert", "dnabert"),
        "tiny-nt": ("nt", "nt"),
        "tiny-dnabert": ("dnabert", "tiny-dnabert"),
    }


def test_real_config_of_dnabert_s():
    folder = SHARED / "hub" / "dnaberts"
    if not folder.is_dir():
        pytest.skip("hub/dnaberts: the hub's files are not part of the repository")
    real = backbone_config("dnaberts", folder)
    table = backbone_config("dnaberts")
    keys = [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "type_vocab_size", "layer_norm_eps", "hidden_dropout_prob",
        "attention_probs_dropout_prob", "initializer_range",
    ]
    assert [getattr(real, key) for key in keys] == [getattr(table, key) for key in keys]


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("heads", [True, False])
def test_loads_bit_equal(tmp_path, name, prefixed, binary, heads):
    prefix = PREFIX[name] if prefixed else ""
    folder = hub_folder(tmp_path / "w", name, prefix=prefix, binary=binary, heads=heads)
    assert_state_equals(load_backbone(name, folder), random_state(name))


def assert_state_equals(model, state):
    found = model.state_dict()
    assert set(found) == set(state)
    for key, tensor in state.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], tensor.float()), key


@pytest.mark.parametrize("name", TINY)
def test_sizes_come_from_the_folder_and_only_the_family_from_the_name(tmp_path, name):
    full = {"tiny-nt": "nt250m", "tiny-dnabert": "dnabert2"}[name]
    model = load_backbone(full, hub_folder(tmp_path / "w", name, prefix=PREFIX[name]))
    config = model.config
    assert config.hidden_size == 24
    assert (config.num_hidden_layers, config.num_attention_heads) == (1, 3)
    assert_state_equals(model, random_state(name))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path, name, binary, dtype):
    state = random_state(name, dtype=dtype)
    config = CONFIG[name] | {"torch_dtype": str(dtype).removeprefix("torch.")}
    folder = hub_folder(tmp_path / "w", name, state, config, binary=binary)
    assert_state_equals(load_backbone(name, folder), state)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_float32_weights_are_not_rounded_by_the_dtype_of_the_config(tmp_path, name, key):
    folder = hub_folder(tmp_path / "w", name, config=CONFIG[name] | {key: "float16"})
    assert_state_equals(load_backbone(name, folder), random_state(name))


@pytest.mark.parametrize("name", TINY)
def test_float32_weights_are_not_rounded_because_another_tensor_is_half(tmp_path, name):
    state = random_state(name)
    first = min(state)
    state[first] = state[first].half()
    assert_state_equals(load_backbone(name, hub_folder(tmp_path / "w", name, state)), state)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("binary", [True, False])
def test_keys_that_do_not_fit_are_named(tmp_path, name, prefixed, binary):
    key = WEIGHT_IN_LAYER[name]
    prefix = PREFIX[name] if prefixed else ""

    def refused(state):
        folder = hub_folder(tmp_path / "w", name, state, prefix=prefix, binary=binary)
        with pytest.raises(InputError) as caught:
            load_backbone(name, folder)
        return str(caught.value).partition(" do not fit: ")[2]

    state = random_state(name)
    del state[key]
    assert refused(state) == f"missing: {key}"

    second = "encoder.layer.1" + key.removeprefix("encoder.layer.0")
    assert refused(random_state(name) | {second: torch.zeros(24, 20)}) == f"unexpected: {second}"

    message = refused(random_state(name) | {key: torch.zeros(20, 24)})
    assert message.startswith("of another shape: ") and key in message
    assert "missing" not in message and "unexpected" not in message


@pytest.mark.parametrize("name", TINY)
def test_heads_of_the_other_family_are_unexpected(tmp_path, name):
    other = {"tiny-nt": "cls.predictions.bias", "tiny-dnabert": "lm_head.bias"}[name]
    state = {PREFIX[name] + key: tensor for key, tensor in random_state(name).items()}
    state[other] = torch.zeros(V)
    with pytest.raises(InputError, match=f"unexpected: {other}"):
        load_backbone(name, hub_folder(tmp_path / "w", name, state))


@pytest.mark.parametrize("name", TINY)
def test_malicious_pickle_is_refused_and_not_run(tmp_path, name):
    trap = tmp_path / "sprung"
    folder = hub_folder(tmp_path / "w", name, binary=True)
    torch.save(random_state(name) | {"trap": Touch(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load weights"):
        load_backbone(name, folder)
    assert not trap.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trap.is_dir(), "the trap itself does not work"


@pytest.mark.parametrize("name", TINY)
def test_remote_code_in_the_folder_is_not_run(tmp_path, name):
    trap = tmp_path / "sprung"
    auto_map = {"AutoConfig": "remote.Config", "AutoModel": "remote.Model"}
    folder = hub_folder(tmp_path / "w", name, config=CONFIG[name] | {"auto_map": auto_map})
    (folder / "remote.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    assert_state_equals(load_backbone(name, folder), random_state(name))
    assert not trap.exists()


def test_no_file_of_ours_trusts_remote_code():
    word = "trust_" + "remote_code"
    patterns = ("*.py", "taxa/**/*.py", "tests/*.py", "benchmarks/**/*.py",
                "experiments/**/*.py")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert Path(__file__).resolve() in files and len(files) > 20
    assert [path.name for path in files if word in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(tmp_path, keep):
    folder = hub_folder(tmp_path / "w", "tiny-nt")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(InputError, match="cannot load weights"):
        load_backbone("tiny-nt", folder)


GARBAGE = {
    "empty": b"",
    "text": b"hello, world\n",
    "json": b'{"a": 1}',
    "zeros": bytes(100),
    "half a pickle": b"\x80\x04",
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\n"
        b"oid sha256:7ff39ec77a484dd0\n"
        b"size 468354983\n"
    ),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", [
    *GARBAGE, "truncated", "a list", "nested", "a number among tensors",
])
def test_pytorch_model_bin_that_is_none(tmp_path, what):
    folder = hub_folder(tmp_path / "w", "tiny-nt", binary=True)
    path = folder / "pytorch_model.bin"
    state = random_state("tiny-nt")
    if what in GARBAGE:
        path.write_bytes(GARBAGE[what])
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:-3000])
    else:
        others = {
            "a list": [1, 2],
            "nested": {"model": state},
            "a number among tensors": {"epoch": 1, **state},
        }
        torch.save(others[what], path)
    with pytest.raises(InputError):
        load_backbone("tiny-nt", folder)


@pytest.mark.parametrize("name", TINY)
def test_folder_without_weights(tmp_path, name):
    folder = hub_folder(tmp_path / "w", name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load weights"):
        load_backbone(name, folder)


NOT_CONFIGS = [
    ("not json {", "not readable as JSON"),
    ("", "not readable as JSON"),
    ("[1]", "model_type"),
    ("null", "model_type"),
    ("{}", "model_type"),
]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("text, message", NOT_CONFIGS)
def test_config_that_is_none(tmp_path, name, pretrained, text, message):
    folder = hub_folder(tmp_path / "w", name)
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_backbone(name, folder, pretrained=pretrained)


@pytest.mark.parametrize("pretrained", [True, False])
def test_config_missing_folder_missing_and_a_file_for_a_folder(tmp_path, pretrained):
    folder = hub_folder(tmp_path / "w", "tiny-nt")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="no config.json"):
        load_backbone("tiny-nt", folder, pretrained=pretrained)
    for path in (tmp_path / "nowhere", folder / "model.safetensors"):
        with pytest.raises(InputError, match="no such folder"):
            load_backbone("tiny-nt", path, pretrained=pretrained)


NT, DNABERT = CONFIG["tiny-nt"], CONFIG["tiny-dnabert"]
# (family read, config.json, what the message names)
FOREIGN = [
    ("tiny-nt", DNABERT, "model_type"),
    ("tiny-dnabert", NT, "model_type"),
    # NT v1
    ("tiny-nt", NT | {"position_embedding_type": "absolute", "add_bias_fnn": True},
     "position_embedding_type"),
    ("tiny-nt", NT | {"add_bias_fnn": True}, "add_bias_fnn"),
    ("tiny-nt", NT | {"emb_layer_norm_before": True}, "emb_layer_norm_before"),
    ("tiny-nt", NT | {"token_dropout": True}, "token_dropout"),
    ("tiny-nt", NT | {"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob"),
    ("tiny-dnabert", DNABERT | {"hidden_act": "gelu_new"}, "hidden_act"),
]


@pytest.mark.parametrize("name, config, named", FOREIGN)
@pytest.mark.parametrize("pretrained", [True, False])
def test_config_of_another_architecture(tmp_path, name, config, named, pretrained):
    folder = hub_folder(tmp_path / "w", name, config=config)
    with pytest.raises(InputError, match=named):
        load_backbone(name, folder, pretrained=pretrained)


@pytest.mark.parametrize("change", [
    {"hidden_size": "big"}, {"hidden_size": None}, {"num_hidden_layers": [1]},
    {"num_attention_heads": 5}, {"num_attention_heads": 0},
])
@pytest.mark.parametrize("name", TINY)
def test_config_with_impossible_sizes(tmp_path, name, change):
    with pytest.raises(InputError):
        load_backbone(name, hub_folder(tmp_path / "w", name, config=CONFIG[name] | change))


def test_nothing_is_published_or_packaged_for_tiny_dnabert():
    with pytest.raises(InputError, match="--weights DIR, or --strategy random"):
        load_backbone("tiny-dnabert")


@pytest.mark.parametrize("wrong, near", [
    ("nt50", "nt50m"), ("dnabert-2", "dnabert2"), ("tiny_nt", "tiny-nt"),
])
def test_unknown_name_suggests_the_nearest(wrong, near):
    for call in (load_backbone, get_model, backbone_config):
        with pytest.raises(InputError, match=rf"unknown model '{wrong}'.*did you mean {near}\?"):
            call(wrong)


# ------------------------------------------------------------------ without files, without network


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", MODELS)
def test_without_pretrained_weights_no_network(no_network, name):
    with torch.device("meta"):
        model = load_backbone(name, pretrained=False)
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(name)["held"]


@pytest.mark.parametrize("name", TINY)
def test_without_pretrained_weights_the_folder_gives_the_sizes_alone(no_network, tmp_path, name):
    folder = hub_folder(tmp_path / "w", name)
    (folder / "model.safetensors").write_bytes(b"not to be read")
    torch.manual_seed(3)
    model = load_backbone(name, folder, pretrained=False)
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == KEYS[name]
    (folder / "model.safetensors").unlink()
    torch.manual_seed(3)
    assert_state_equals(load_backbone(name, folder, pretrained=False), model.state_dict())


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row.hub])
@pytest.mark.parametrize("revision", [None, "some-other-revision"])
def test_hub_is_asked_for_the_pinned_revision_and_no_pickle(monkeypatch, name, revision):
    """What goes to transformers: the row's repository and revision, weights_only, and not a word of
    remote code.
    """
    row = MODELS[name]
    family = FAMILIES[row.family]
    calls = []
    values = CONFIG["tiny-nt" if row.family == "nt" else "tiny-dnabert"]

    def get_config_dict(source, **options):
        calls.append((source, options))
        return values, {}

    def from_pretrained(source, config, **options):
        calls.append((source, options))
        info = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return family.model(config), info

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", get_config_dict)
    monkeypatch.setattr(family.model, "from_pretrained", from_pretrained)
    load_backbone(name, revision=revision)
    assert [source for source, _ in calls] == [row.hub, row.hub]
    assert [options["revision"] for _, options in calls] == [revision or row.revision] * 2
    assert calls[1][1]["weights_only"] is True
    assert not any("trust" in option for _, options in calls for option in options)


def test_hub_out_of_reach_is_one_line_that_names_weights(monkeypatch):
    def offline(source, **options):
        raise OSError(f"We couldn't connect to the hub for {source}.\nCheck your connection.")

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", offline)
    with pytest.raises(InputError, match="--weights DIR") as caught:
        load_backbone("nt50m")
    assert MODELS["nt50m"].revision in str(caught.value) and "\n" not in str(caught.value)


def test_hub_config_of_another_architecture_is_refused_before_any_weights(monkeypatch):
    def get_config_dict(source, **options):
        return CONFIG["tiny-dnabert"], {}

    def from_pretrained(*args):
        pytest.fail("weights were asked for")

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", get_config_dict)
    monkeypatch.setattr(loading, "_from_pretrained", from_pretrained)
    with pytest.raises(InputError, match="model_type"):
        load_backbone("nt50m")
