"""A checkpoint -> a folder to publish: the fine-tuned network in the hub's format, its heads, its labels and a model card.

  python export.py runs/demo/ckpt.pt --out exported                         # after make demo
  python export.py runs/tiny-dnabert-lora-r4/ckpt.pt --adapters --out adapters   # LoRA or (IA)3 alone, in PEFT's format

Without --adapters the adapters are merged into the weights, for good. The folder then holds

  config.json, model.safetensors   the backbone, under the names of the hub's checkpoints; train.py --weights reads it again
  heads.safetensors                RANK.weight (classes, hidden size), RANK.bias (classes)
  labels.json                      {rank: [{"taxid", "name"}, ...]}: row i of a head is entry i
  README.md                        model card: data, strategy, settings, metrics, licence of the base weights

With --adapters it holds, in place of the first two,

  adapter_config.json, adapter_model.safetensors   what PeftModel.from_pretrained(backbone, DIR) reads
  taxa.json                                        the rest of the checkpoint: evaluate.py DIR takes the folder as it takes ckpt.pt

and train.py --adapters DIR trains on from it, as it does from a folder that the PEFT library saved.
"""

import json
from pathlib import Path

from transformers import PretrainedConfig

from taxa.backbones import FAMILIES, MODELS, get_model
from taxa.errors import InputError
from taxa.inject import merge_adapters
from taxa.results.evaluation import table
from taxa.runtime.cli import Parser, run
from taxa.runtime.files import new_folder, save_tensors, write_json
from taxa.training import checkpoint, peft_format


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="ckpt.pt of a run folder, or a folder of export.py --adapters")
    add("--out", metavar="DIR", required=True, help="the folder to make")
    add("--adapters", action="store_true", help="lora, ia3: the adapters alone, in PEFT's format; needs no base weights")
    add("--weights", metavar="DIR", help="folder with the base weights (default: where the run took them from)")
    add("--overwrite", action="store_true", help="replace an exported folder that exists")
    args = parser.parse_args(argv)
    if args.adapters and args.weights:
        parser.error("--adapters writes no base weights: leave out --weights")
    return args


def main(argv=None):
    args = parse_args(argv)
    content = checkpoint.read(args.checkpoint)
    if args.adapters and content["settings"]["strategy"] not in ("lora", "ia3"):
        raise InputError(f"{args.checkpoint}: --strategy {content['settings']['strategy']} has no adapters: leave out --adapters")
    if args.overwrite and Path(args.out).is_dir() and any(Path(args.out).iterdir()) and not (Path(args.out) / peft_format.LABELS).exists():
        raise InputError(f"{args.out} is no folder of export.py, so --overwrite does not replace it: give another --out")
    with new_folder(args.out, args.overwrite) as folder:
        if args.adapters:
            peft_format.write_adapters(folder, checkpoint.skeleton(content).backbone, content["settings"], content["base"])
            peft_format.write_rest(folder, content)
        else:
            backbone = merge_adapters(checkpoint.rebuild(content, args.weights)).backbone
            write_backbone(folder, backbone, FAMILIES[get_model(content["model"], content["config"]).family])
        peft_format.write_heads(folder, content)
        (folder / "README.md").write_text(model_card(content, metrics_beside(args.checkpoint), args.adapters), encoding="utf-8")
        files = sorted(f"{path.name} ({path.stat().st_size:,} bytes)" for path in folder.iterdir())
    print(f"{args.out}: {', '.join(files)}")


def write_backbone(folder, backbone, family):
    """config.json and model.safetensors as the hub has them: every size, what the architecture fixes, keys with the encoder's prefix."""
    noise = PretrainedConfig().to_dict()  # what transformers writes for any model
    config = {key: value for key, value in backbone.config.to_dict().items() if key not in noise or value != noise[key]}
    if not all("--" in str(value) for value in config.get("auto_map", {}).values()):
        del config["auto_map"]  # it names files of a folder, not REPOSITORY--FILE: they are not here
    write_json(folder / "config.json", family.module.FIXED | config | {"model_type": family.config.model_type})
    state = {f"{backbone.base_model_prefix}.{name}": tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    save_tensors(folder / "model.safetensors", state)


def metrics_beside(path):
    """What the run's own test wrote beside its checkpoint, or None."""
    beside = Path(path).parent / "metrics.json"
    return json.loads(beside.read_text(encoding="utf-8")) if Path(path).is_file() and beside.exists() else None


# ---------------------------------------------------------------- the model card


LOAD_MERGED = '''```python
import json
from safetensors.torch import load_file
from taxa.backbones import load_backbone
from taxa.model import TaxonClassifier

labels = json.load(open("labels.json"))
model = TaxonClassifier(load_backbone("{model}", "."), {{rank: len(classes) for rank, classes in labels.items()}}).eval()
model.heads.load_state_dict(load_file("heads.safetensors"))
logits = model(input_ids, attention_mask)  # {{rank: (B, classes)}}
```'''

LOAD_ADAPTERS = '''```python
import peft
from safetensors.torch import load_file
from taxa.model import masked_mean

model = peft.PeftModel.from_pretrained(backbone, ".").eval()  # backbone: the base weights, taxa.backbones.load_backbone("{model}")
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
                        f"{base['digest'][:16]}, licence {licence}, which binds what is made from them.")
    if base["source"] == "folder":
        sentence = f"Base weights: a local folder, digest {base['digest'][:16]}."
        if row.hub is None:
            return [], f"{sentence} Their licence is not known to the program that wrote this card."
        return header, f"{sentence} The licence is that of {row.hub}, {licence}: change it if the folder held other weights."
    if base["source"] == "package":
        return ["license: mit"], (f"Base weights: those that come with taxa for {content['model']}, digest {base['digest'][:16]}, "
                                  "licence MIT.")
    what = "no pretrained weights" if base["source"] == "none" else f"random weights of seed {base['seed']}, nothing pretrained"
    return [], f"Trained from scratch: {what}, so no base licence applies."


def model_card(content, tested, adapters):
    """README.md: a header as the hub reads it, and what a user must know before trusting the weights."""
    header, base = base_of(content)
    settings, classes = content["settings"], content["classes"]
    load = (LOAD_ADAPTERS if adapters else LOAD_MERGED).format(model=content["model"], ranks=list(classes))
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
        f"- data: digest {content['data']['digest']}",
        f"- tokenizer: {content['tokenizer']['name']}, digest {content['tokenizer']['digest']}",
        *(f"- {name}: {' '.join(value) if isinstance(value, list) else value}" for name, value in settings.items()),
        f"- precision {content['precision']}, best epoch {content['epoch']}", "",
        "## Metrics", "",
        *("\n".join(["```", table(metrics), "```", ""]) for metrics in (content["metrics"], tested) if metrics),
        "## Use", "", load, "", note]).rstrip() + "\n"


if __name__ == "__main__":
    run(main)
