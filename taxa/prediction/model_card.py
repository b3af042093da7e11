"""The model card that export.py writes: what the network was trained on, how well it did, and under which licence it may go on."""

from pathlib import Path

from taxa.backbones import FAMILIES, MODELS, get_model
from taxa.evaluation.evaluation import table
from taxa.evaluation.unseen import table as unseen_table
from taxa.runtime.files import read_json
from taxa.training import checkpoint

LICENCES = {  # of published weights: what it asks of a model that is made from them
    "cc-by-nc-sa-4.0": "CC BY-NC-SA 4.0 binds what is made from them, so this model too: name the source, no commercial use, and the same "
                       "licence for whatever is made from this in turn.",
    "apache-2.0": "Apache 2.0 lets this model go on under any terms that keep its notices: say that the weights were changed.",
}

LOAD_MERGED = '''```python
import json
from pathlib import Path

from safetensors.torch import load_file
from taxa.backbones import load_backbone
from taxa.model import TaxonClassifier

labels = json.loads(Path("labels.json").read_text(encoding="utf-8"))
model = TaxonClassifier(load_backbone("{model}", "."), {{rank: len(classes) for rank, classes in labels.items()}}).eval()
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
logits = {{rank: pooled @ heads[f"{{rank}}.weight"].T + heads[f"{{rank}}.bias"] for rank in {ranks}}}
```

or `python evaluate.py DIR`, `python train.py --adapters DIR ...`.'''


def base_of(content):
    """(lines of the card's header, one sentence) on the weights that the run began with and their licence."""
    row, base = get_model(content["model"], content["config"]), content["base"]
    licence = FAMILIES[row.family].module.LICENSE
    header = [f"license: {licence}", f"base_model: {row.hub}"]
    if content["model"] not in MODELS and base["source"] != "none":
        return header[1:], (f"Base weights: {row.hub}, from {base.get('revision') or 'a local folder'}, digest {base['digest'][:16]}. "
                            "Their licence is not known to the program that wrote this card: see theirs.")
    if base["source"] == "hub":
        return header, (f"Base weights: [{row.hub}](https://huggingface.co/{row.hub}), revision {base['revision']}, digest "
                        f"{base['digest'][:16]}. {LICENCES[licence]}")
    if base["source"] == "folder":
        sentence = f"Base weights: a local folder, digest {base['digest'][:16]}."
        if row.hub is None:
            return [], f"{sentence} Their licence is not known to the program that wrote this card."
        return header, f"{sentence} If it held those of {row.hub}: {LICENCES[licence]} Change the licence above if it held others."
    if base["source"] == "package":
        return ["license: mit"], (f"Base weights: those that come with taxa for {content['model']}, digest {base['digest'][:16]}, "
                                  "licence MIT.")
    what = "no pretrained weights" if base["source"] == "none" else f"random weights of seed {base['seed']}, nothing pretrained"
    return [], f"Trained from scratch: {what}, so no base licence applies."


def data_lines(data):
    """Lines on the prepared data of a run, its "data" in the checkpoint: files, checksums and counts, where the folder is still there."""
    manifest = Path(data["folder"]) / "manifest.json"
    found = read_json(manifest) if manifest.is_file() else {}
    lines = [f"- data: digest {data['digest']}"]
    if found.get("digest") != data["digest"]:
        return lines + ["- its folder was not there when this card was written, so its files are not named here"]
    lines += [f"- {source['file']}: {source['sequences']:,} sequences, SHA-256 {source['sha256']}" for source in found["sources"]]
    if found["taxdump"]:
        lines.append(f"- taxonomy: {found['taxdump']['file']}, of {found['taxdump']['date'] or 'unknown date'}, SHA-256 "
                     f"{found['taxdump']['sha256']}")
    lines.append("- " + ", ".join(f"{name} {count:,}" for name, count in found["splits"].items()))
    return lines


def model_card(content, beside, adapters, difference=None):
    """README.md: a header as the hub reads it, and what a user must know before trusting the weights.

    content: of the checkpoint; beside: {"metrics", "unseen"}: metrics.json and metrics_unseen.json of its run, where there are; difference:
    a line on merging.
    """
    header, base = base_of(content)
    settings, classes = content["settings"], content["classes"]
    known = content["base"] if content["base"]["source"] != "folder" else {"source": "folder", "folder": "DIR of the base weights"}
    load = (LOAD_ADAPTERS if adapters else LOAD_MERGED).format(
        model=content["model"], ranks=list(classes), backbone=f'load_base("{content["model"]}", {known})  # the base weights')
    if adapters:
        what = "The adapters alone, in PEFT's format."
        note = "(IA)3 on a part of a fused projection stands here as a vector of the whole output, ones elsewhere: the same function."
        note = note if any("[" in target for target in settings["targets"]) else ""
    else:
        what = "Adapters, if any, are merged into the weights."
        note = ("Transformers' own EsmModel and BertModel are other architectures of the same model_type: they do not fit. What the loss "
                "never uses of the published checkpoint (LM head, position table, pooler) is not in the file.")
    return "\n".join([
        "---", *header, *(["library_name: peft"] if adapters else []), "tags: [biology, dna, taxonomy]", "---", "",
        f"# {content['model']}, {settings['strategy']}: {', '.join(classes)} of a piece of DNA", "",
        f"Classes: {', '.join(f'{len(rows)} {rank}' for rank, rows in classes.items())}. {what} Written by export.py of taxa.", "",
        "## Base and licence", "", base, "",
        "## Training", "",
        *data_lines(content["data"]),
        f"- tokenizer: {content['tokenizer']['name']}, digest {content['tokenizer']['digest']}",
        f"- sequences of {checkpoint.window_text(checkpoint.window_of(content))}",
        *(f"- {name}: {' '.join(value) if isinstance(value, list) else value}" for name, value in settings.items()),
        f"- precision {content['precision']}, best epoch {content['epoch']}",
        *([f"- exported: {difference}"] if difference else []), "",
        "## Metrics", "",
        *("\n".join(["```", table(metrics), "```", ""]) for metrics in (content["metrics"], beside.get("metrics")) if metrics),
        *(["Genera that nobody trained on:", "", "```", unseen_table(beside["unseen"]), "```", ""] if "unseen" in beside else []),
        "## Use", "", load, "", *([note, ""] if note else []),
        "## Publish", "", "`hf upload ORGANISATION/NAME THIS_FOLDER` puts the folder on the Hugging Face hub."]).rstrip() + "\n"
