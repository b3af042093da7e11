"""What several test files share: a small prepared corpus, and small backbones saved in the hub's
format.
"""

import gc
import json

import pytest
import torch
from helpers import TINY
from safetensors.torch import save_file

import prepare
from taxa.backbones import FAMILIES, MODELS

# Tensors here are too small to share, and another busy process would make sharing them far slower.
torch.set_num_threads(1)
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "initializer_range": 0.1,
}
# Of the networks in `weights`: sizes of their own, and the bias of the head, which is not used.
SIZES = {
    "tiny-nt": {},
    "tiny-dnabert": {"vocab_size": 1024, "hidden_dropout_prob": 0.0},
}
UNUSED = {
    "tiny-nt": {"lm_head.bias": torch.zeros(4107)},
    "tiny-dnabert": {"cls.predictions.bias": torch.zeros(1024)},
}


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look through it again and again
    (0.3 s of each full collection).
    """
    gc.freeze()


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A prepared folder of 400 simulated sequences with nt and tiny-dnabert tokens."""
    out = tmp_path_factory.mktemp("data") / "demo"
    prepare.main(["--demo", "--demo-sequences", "400",
                  "--tokenizers", "nt", "tiny-dnabert", "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    """As `demo`, but of 90 bases: for tests in which what is learnt does not matter, and runs are
    many.
    """
    out = tmp_path_factory.mktemp("short") / "demo"
    prepare.main(["--demo", "--demo-sequences", "400", "--length", "90",
                  "--tokenizers", "nt", "tiny-dnabert", "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """{"tiny-nt": folder, "tiny-dnabert": folder}: random backbones without dropout, as the hub
    lays them out (prefix, unused heads).
    """
    folders = {}
    for name in TINY:
        family = FAMILIES[MODELS[name].family]
        torch.manual_seed(7)
        backbone = family.model(family.config(**SMALL, **SIZES[name]))
        state = {
            f"{backbone.base_model_prefix}.{key}": torch.randn_like(p) * 0.1
            for key, p in backbone.state_dict().items()
        }
        config = backbone.config.to_dict() | {"model_type": family.config.model_type}
        folder = tmp_path_factory.mktemp(name)
        save_file(state | UNUSED[name], folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        folders[name] = folder
    return folders
