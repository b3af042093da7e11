"""The model card that export.py writes.

It says what the network was trained on, how well it did, and under which licence it may go on.
"""

from pathlib import Path

from taxa.backbones import FAMILIES, MODELS, get_model
from taxa.evaluation.evaluation import table
from taxa.evaluation.unseen import table as unseen_table
from taxa.runtime.files import read_json
from taxa.training import checkpoint

LICENCES = {  # of published weights: what it asks of a model that is made from them
    "cc-by-nc-sa-4.0": (
        "CC BY-NC-SA 4.0 binds what is made from them, so this model too: name the source, "
        "no commercial use, and the same licence for whatever is made from this in turn."
    ),
    "apache-2.0": (
        "Apache 2.0 lets this model go on under any terms that keep its notices: "
        "say that the weights were changed."
    ),
}

LOAD_MERGED = '''```python
import json
from pathlib import Path

from safetensors.torch import load_file
from taxa.backbones import load_backbone
from taxa.model import TaxonClassifier

labels = json.loads(Path("labels.json").read_text(encoding="utf-8"))
num_classes = {{rank: len(classes) for rank, classes in labels.items()}}
model = TaxonClassifier(load_backbone("{model}", "."), num_classes).eval()
model.heads.load_state_dict(load_file("heads.safetensors"))
logits = model(input_ids, attention_mask)  # {{rank: (B, classes)}}
```'''

LOAD_ADAPTERS = '''```python
import peft
from safetensors.torch import load_file
from taxa.model import masked_mean
from taxa.training.checkpoint import load_base

backbone = {backbone}
model = peft.PeftModel.from_pretrained(backbone, ".").eval()
pooled = masked_mean(model(input_ids, attention_mask), attention_mask)  # (B, H)
heads = load_file("heads.safetensors")
logits = {{
    rank: pooled @ heads[f"{{rank}}.weight"].T + heads[f"{{rank}}.bias"] for rank in {ranks}
}}
```

or `python evaluate.py DIR`, `python train.py --adapters DIR ...`.'''


def base_of(content):
    """(lines of the card's header, one sentence) on the base weights of a run and their licence."""
    row = get_model(content["model"], content["config"])
    base = content["base"]
    licence = FAMILIES[row.family].module.LICENSE
    header = [f"license: {licence}", f"base_model: {row.hub}"]
    if base["source"] == "none":
        return [], "Trained from scratch: no pretrained weights, so no base licence applies."
    if content["model"] not in MODELS:
        return header[1:], (
            f"Base weights: {row.hub}, from {base.get('revision') or 'a local folder'}, "
            f"digest {base['digest'][:16]}. "
            "Their licence is not known to the program that wrote this card: see theirs."
        )
    if base["source"] == "hub":
        return header, (
            f"Base weights: [{row.hub}](https://huggingface.co/{row.hub}), "
            f"revision {base['revision']}, digest {base['digest'][:16]}. {LICENCES[licence]}"
        )
    if base["source"] == "folder":
        sentence = f"Base weights: a local folder, digest {base['digest'][:16]}."
        if row.hub is None:
            return [], f"{sentence} Their licence is not known to the program that wrote this card."
        return header, (
            f"{sentence} If it held those of {row.hub}: {LICENCES[licence]} "
            "Change the licence above if it held others."
        )
    if base["source"] == "package":
        return ["license: mit"], (
            f"Base weights: those that come with taxa for {content['model']}, "
            f"digest {base['digest'][:16]}, licence MIT."
        )
    return [], (
        f"Trained from scratch: random weights of seed {base['seed']}, nothing pretrained, "
        "so no base licence applies."
    )


def data_lines(data):
    """Lines on the prepared data of a run, its "data" in the checkpoint.

    They name files, checksums and counts where the folder is still there.
    """
    manifest = Path(data["folder"]) / "manifest.json"
    found = read_json(manifest) if manifest.is_file() else {}
    lines = [f"- data: digest {data['digest']}"]
    if found.get("digest") != data["digest"]:
        lines.append(
            "- its folder was not there when this card was written, so its files are not named here"
        )
        return lines
    for source in found["sources"]:
        lines.append(
            f"- {source['file']}: {source['sequences']:,} sequences, SHA-256 {source['sha256']}"
        )
    taxdump = found["taxdump"]
    if taxdump:
        lines.append(
            f"- taxonomy: {taxdump['file']}, of {taxdump['date'] or 'unknown date'}, "
            f"SHA-256 {taxdump['sha256']}"
        )
    counts = ", ".join(f"{name} {count:,}" for name, count in found["splits"].items())
    lines.append(f"- {counts}")
    return lines


def model_card(content, beside, adapters, difference=None):
    """README.md: a header as the hub reads it, and what a user must know to trust the weights.

    content: of the checkpoint. beside: {"metrics", "unseen"}, the metrics.json and the
    metrics_unseen.json of its run, as far as they are there. difference: a line on merging.
    """
    header, base = base_of(content)
    what, note = _what_is_here(content, adapters)
    settings = content["settings"]
    classes = content["classes"]
    counts = ", ".join(f"{len(rows)} {rank}" for rank, rows in classes.items())
    tokenizer = content["tokenizer"]

    lines = ["---", *header]
    if adapters:
        lines.append("library_name: peft")
    lines += ["tags: [biology, dna, taxonomy]", "---", ""]
    lines += [
        f"# {content['model']}, {settings['strategy']}: {', '.join(classes)} of a piece of DNA",
        "",
        f"Classes: {counts}. {what} Written by export.py of taxa.",
        "",
    ]
    lines += ["## Base and licence", "", base, ""]
    lines += [
        "## Training",
        "",
        *data_lines(content["data"]),
        f"- tokenizer: {tokenizer['name']}, digest {tokenizer['digest']}",
        f"- sequences of {checkpoint.window_text(checkpoint.window_of(content))}",
    ]
    for name, value in settings.items():
        lines.append(f"- {name}: {' '.join(value) if isinstance(value, list) else value}")
    lines.append(f"- precision {content['precision']}, best epoch {content['epoch']}")
    if difference:
        lines.append(f"- exported: {difference}")
    lines += ["", "## Metrics", ""]
    for metrics in (content["metrics"], beside.get("metrics")):
        if metrics:
            lines += ["```", table(metrics), "```", ""]
    if "unseen" in beside:
        lines += ["Genera that nobody trained on:", ""]
        lines += ["```", unseen_table(beside["unseen"]), "```", ""]
    lines += ["## Use", "", _how_to_load(content, adapters), ""]
    if note:
        lines += [note, ""]
    lines += [
        "## Publish",
        "",
        "`hf upload ORGANISATION/NAME THIS_FOLDER` puts the folder on the Hugging Face hub.",
    ]
    return "\n".join(lines).rstrip() + "\n"


def _what_is_here(content, adapters):
    """(one sentence on what the folder holds, a note for who loads it or "")."""
    if not adapters:
        return "Adapters, if any, are merged into the weights.", (
            "Transformers' own EsmModel and BertModel are other architectures of the same "
            "model_type: they do not fit. What the loss never uses of the published checkpoint "
            "(LM head, position table, pooler) is not in the file."
        )
    note = ""
    if any("[" in target for target in content["settings"]["targets"]):
        note = (
            "(IA)3 on a part of a fused projection stands here as a vector of the whole output, "
            "ones elsewhere: the same function."
        )
    return "The adapters alone, in PEFT's format.", note


def _how_to_load(content, adapters):
    """The code that loads the folder."""
    if not adapters:
        return LOAD_MERGED.format(model=content["model"])
    base = content["base"]
    if base["source"] == "folder":  # one of the machine that trained
        base = {"source": "folder", "folder": "DIR of the base weights"}
    backbone = f'load_base("{content["model"]}", {base})  # the base weights'
    return LOAD_ADAPTERS.format(backbone=backbone, ranks=list(content["classes"]))
