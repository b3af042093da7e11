"""--model ORG/NAME: checkpoints outside the table, from a folder and from a hub's cache as a
machine without a network has it.
"""

import json
import shutil

import pytest
import torch
from helpers import GOLDEN, ROOT, SHARED, TINY, python
from safetensors.torch import load_file

import evaluate
import export
import prepare
import pretrain
import probe_batch
import train
from taxa.backbones import MODELS, find_model, load_backbone
from taxa.data.dataset import PreparedDataset
from taxa.data.tokens import DNABERT_DIGEST, TINY_BPE, NTTokenizer, get_tokenizer
from taxa.errors import InputError
from taxa.measure import tree
from taxa.training import checkpoint

SIGNS = {"tiny-nt": {"add_bias_fnn": False}, "tiny-dnabert": {"alibi_starting_size": 512}}
NAMES = {"tiny-nt": "Some-Lab/nt-v2.x", "tiny-dnabert": "Some-Lab/dna_bert"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(params=TINY)
def like(request):
    return request.param


def foreign(folder, weights, like):
    """A copy of a small folder as a repository outside the table would have it: with its sign and
    its vocabulary.
    """
    shutil.copytree(weights[like], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SIGNS[like]))
    if like == "tiny-nt":
        (folder / "vocab.txt").write_text("\n".join(NTTokenizer().vocabulary) + "\n")
    else:
        shutil.copy(TINY_BPE, folder / "tokenizer.json")
    return folder


def flags(like, data, out, *more):
    return [
        "--model", NAMES[like], "--strategy", "lora",
        "--data", str(data), "--out", str(out), "--max-steps", "2", *map(str, more),
    ]


@pytest.fixture
def data(demo, tmp_path):
    return shutil.copytree(demo, tmp_path / "demo")


def test_a_folder_trains_and_its_checkpoint_is_rebuilt(like, weights, data, tmp_path, capsys):
    folder = foreign(tmp_path / "foreign", weights, like)
    tested = train.main(flags(like, data, tmp_path / "run", "--weights", folder))
    tokens = "nt" if like == "tiny-nt" else f"bpe-{get_tokenizer('tiny-dnabert').digest[:8]}"
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    defaults = (1e-4, 64) if like == "tiny-nt" else (2.5e-5, 16)
    assert (args["lr"], args["batch_size"]) == defaults
    content = checkpoint.read(tmp_path / "run" / "ckpt.pt")
    assert content["model"] == NAMES[like] and content["tokenizer"]["name"] == tokens
    assert evaluate.main([str(tmp_path / "run" / "ckpt.pt")]) == tested
    family = checkpoint.rebuild(content).backbone
    assert type(family) is type(load_backbone(like, pretrained=False))
    assert family.config.hidden_size == 32 and PreparedDataset(data).has_tokens(tokens)

    exported = tmp_path / "exported"
    export.main([str(tmp_path / "run" / "ckpt.pt"), "--out", str(exported)])
    modes = {path.stat().st_mode for path in exported.iterdir()}
    assert len(modes) == 1, "a file is readable by its owner alone"
    assert "licence is not known" in (exported / "README.md").read_text(encoding="utf-8")
    # The export is such a folder again.
    assert find_model(NAMES[like], exported).family == MODELS[like].family


def test_a_dry_run_counts_the_sizes_of_the_config(like, weights, tmp_path, capsys):
    folder = foreign(tmp_path / "foreign", weights, like)
    lines = []
    for name in (NAMES[like], like):  # by its own name, and as other sizes of a model in the table
        train.main(["--model", name, "--weights", str(folder), "--strategy", "ia3", "--dry-run"])
        lines.append(json.loads(capsys.readouterr().out))
    assert lines[0].pop("model") == NAMES[like] and lines[1].pop("model") == like
    assert lines[0] == lines[1] and lines[0]["published_fraction"] is None


def test_the_tokens_of_another_vocabulary_have_its_digest_for_a_name(tmp_path, data):
    prepare.main([
        "--add-tokens", "bpe", "--tokenizer-file", str(TINY_BPE), "--out", str(data),
    ])
    name = f"bpe-{get_tokenizer('tiny-dnabert').digest[:8]}"
    whole = PreparedDataset(data)
    ours, theirs = (whole.split("train", tokens) for tokens in (name, "tiny-dnabert"))
    assert all((ours.tokens(i) == theirs.tokens(i)).all() for i in range(len(ours)))
    with pytest.raises(InputError, match="--add-tokens bpe --tokenizer-file"):
        PreparedDataset(data).split("train", "bpe-00000000")
    with pytest.raises(InputError, match="bpe needs --tokenizer-file"):
        prepare.main(["--add-tokens", "bpe", "--out", str(data)])


def test_dnaberts_own_vocabulary_shares_the_tokens_of_the_table():
    file = SHARED / "hub" / "dnaberts" / "tokenizer.json"
    if not file.is_file():
        pytest.skip("no ../shared/hub: the hub's files are not here")
    assert get_tokenizer("bpe", file).name == "dnabert"
    assert get_tokenizer("dnabert", file).digest == DNABERT_DIGEST


def test_golden_checkpoints_load_by_their_config_alone(like):
    folder = GOLDEN[like]
    assert find_model("Some-Lab/golden", folder).family == MODELS[like].family
    backbone = load_backbone("Some-Lab/golden", folder).eval()
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        found = backbone(expected["input_ids"], expected["attention_mask"])
    mask = expected["attention_mask"].bool()  # what stands at padding is nobody's business
    torch.testing.assert_close(
        found[mask], expected["last_hidden_state"][mask], rtol=0, atol=2e-5,
    )


def test_a_dnabert_without_its_tokenizer_is_refused_before_anything_is_written(demo, tmp_path):
    folder = GOLDEN["tiny-dnabert"]
    with pytest.raises(InputError, match="no tokenizer.json in"):
        train.main(flags("tiny-dnabert", demo, tmp_path / "run", "--weights", folder))
    assert not (tmp_path / "run").exists()


CHANGES = {  # name: (like, change of config.json, what the line says)
    "nt v1": (
        "tiny-nt",
        {"position_embedding_type": "absolute", "add_bias_fnn": True},
        "position_embedding_type is 'absolute'",
    ),
    "esm-2": (
        "tiny-nt",
        {"add_bias_fnn": None, "token_dropout": True},
        "token_dropout is True",
    ),
    "another esm": (
        "tiny-nt",
        {"add_bias_fnn": None},
        "no add_bias_fnn in it: .*SwiGLU",
    ),
    "bert": (
        "tiny-dnabert",
        {"alibi_starting_size": None},
        "no alibi_starting_size in it: .*ALiBi",
    ),
    "another architecture": (
        "tiny-dnabert",
        {"model_type": "gpt2"},
        "model_type is 'gpt2': only Nucleotide Transformer v2",
    ),
    "another activation": (
        "tiny-dnabert",
        {"hidden_act": "relu"},
        "hidden_act is 'relu'",
    ),
    "another vocabulary": (
        "tiny-nt",
        {"vocab_size": 4105},
        "not the Nucleotide Transformer v2's 4,107 entries",
    ),
    "no sizes": (
        "tiny-nt",
        {"hidden_size": "big"},
        "hidden_size is 'big'",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_outside_says_so(case, weights, tmp_path):
    like, change, message = CHANGES[case]
    folder = foreign(tmp_path / "foreign", weights, like)
    config = json.loads((folder / "config.json").read_text()) | change
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    arguments = ["--model", NAMES[like], "--weights", str(folder), "--strategy", "lora"]
    with pytest.raises(InputError, match=message):
        train.main([*arguments, "--dry-run"])


def test_another_vocabulary_file_says_so(weights, tmp_path):
    folder = foreign(tmp_path / "foreign", weights, "tiny-nt")
    (folder / "vocab.txt").write_text("\n".join(reversed(NTTokenizer().vocabulary)))
    with pytest.raises(InputError, match="4,107 entries"):
        find_model(NAMES["tiny-nt"], folder)


def test_a_folder_in_the_place_of_the_name_says_where_it_goes(weights, tmp_path, monkeypatch):
    foreign(tmp_path / "my" / "model", weights, "tiny-nt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--model my/model is a folder: .* --weights my/model"):
        find_model("my/model")


def test_the_hub_by_its_cache_without_a_network(weights, data, tmp_path):
    """A subprocess, since huggingface_hub reads its settings when it is imported. The cache is laid
    out as the library lays out main.
    """
    repository = f"models--{NAMES['tiny-dnabert'].replace('/', '--')}"
    snapshot = tmp_path / "home" / "hub" / repository / "snapshots" / COMMIT
    shutil.copytree(foreign(tmp_path / "foreign", weights, "tiny-dnabert"), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    runs = [["train", *flags("tiny-dnabert", data, "run")], ["evaluate", "run/ckpt.pt"]]
    done = python(
        ROOT / "tests" / "runs.py", json.dumps(runs), cwd=tmp_path,
        HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr
    base = checkpoint.read(tmp_path / "run" / "ckpt.pt")["base"]
    found = (base["source"], base["hub"], base["revision"])
    assert found == ("hub", NAMES["tiny-dnabert"], COMMIT)  # the commit, not "main"


@pytest.mark.parametrize("error", ["LocalEntryNotFoundError", "OfflineModeIsEnabled", "OSError"])
def test_a_name_that_the_hub_does_not_give_is_one_line(error, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*args, **kwargs):
        raise getattr(errors, error, OSError)("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(InputError, match="Some-Lab/none.*--weights DIR"):
        train.main(["--model", "Some-Lab/none", "--strategy", "full", "--dry-run"])


@pytest.mark.parametrize("name", ["nt50m", "dnaberts"])
def test_the_hub_id_of_a_row_of_the_table_is_that_row(name, capsys):
    assert find_model(MODELS[name].hub) is MODELS[name]
    lines = []
    for model in (name, MODELS[name].hub):
        train.main(["--model", model, "--strategy", "lora", "--dry-run"])
        lines.append(capsys.readouterr().out)
        tree.main(["--model", model, "--strategy", "lora"])
        lines.append(capsys.readouterr().out)
    assert lines[:2] == lines[2:]
    hub = MODELS[name].hub
    assert pretrain.parse_args(["--model", hub, "--data", "x", "--out", "y"]).model == name
    assert probe_batch.parse_args(["--model", hub, "--strategy", "full"]).model == name
