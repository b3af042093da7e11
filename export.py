"""A checkpoint -> a folder to publish: the fine-tuned network in the hub's format, its heads, its labels and a model card.

  python export.py runs/demo/ckpt.pt --out exported                         # after make demo
  python export.py runs/tiny-dnabert-lora-r4/ckpt.pt --adapters --out adapters   # LoRA or (IA)3 alone, in PEFT's format

Without --adapters the adapters are merged into the weights, for good. The folder then holds

  config.json, model.safetensors   the backbone, under the names of the hub's checkpoints; train.py --weights reads it again
  heads.safetensors                RANK.weight (classes, hidden size), RANK.bias (classes)
  labels.json                      {rank: [{"taxid", "name"}, ...]}: row i of a head is entry i
  taxa.json                        model, settings, tokenizer, precision, length of the training sequences ("window")
  README.md                        model card: data, strategy, settings, metrics, licence of the base weights

With --adapters it holds, in place of the first two,

  adapter_config.json, adapter_model.safetensors   what PeftModel.from_pretrained(backbone, DIR) reads
  taxa.json                                        the rest of the checkpoint: evaluate.py DIR takes the folder as it takes ckpt.pt

and train.py --adapters DIR trains on from it, as it does from a folder that the PEFT library saved.
"""

from pathlib import Path

import torch
from transformers import PretrainedConfig

from taxa.backbones import FAMILIES, get_model
from taxa.errors import InputError
from taxa.inject import merge_adapters
from taxa.prediction.model_card import model_card
from taxa.runtime.cli import Parser, run
from taxa.runtime.files import new_folder, read_json, save_tensors, write_json
from taxa.runtime.precision import autocast
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
    difference = None
    with new_folder(args.out, args.overwrite) as folder:
        if args.adapters:
            peft_format.write_adapters(folder, checkpoint.skeleton(content).backbone, content["settings"], content["base"])
            peft_format.write_rest(folder, content)
        else:
            classifier = checkpoint.rebuild(content, args.weights)
            difference = largest_difference(classifier, content)
            write_backbone(folder, classifier.backbone, FAMILIES[get_model(content["model"], content["config"]).family])
            write_json(folder / peft_format.REST, {name: content[name] for name in ("model", "settings", "tokenizer", "precision")}
                       | {"window": checkpoint.window_of(content)})
        peft_format.write_heads(folder, content)
        (folder / "README.md").write_text(model_card(content, beside(args.checkpoint), args.adapters, difference), encoding="utf-8")
        files = sorted(f"{path.name} ({path.stat().st_size:,} bytes)" for path in folder.iterdir())
    print(f"{args.out}: {', '.join(files)}")


def random_tokens(content):
    """(4, T) token ids drawn at random, with T as for a training sequence in 6-mers, at most 512."""
    T = min(checkpoint.window_of(content)["length"] // 6 + 1, 512)
    return torch.randint(content["config"]["vocab_size"], (4, T), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def largest_difference(classifier, content):
    """Merge a classifier's adapters, and say in a line of the card how far its logits move, in the precision of the run.

    Raises InputError when they are not finite.
    """
    ids = random_tokens(content)
    logits = []
    for change in (lambda model: model, merge_adapters):
        change(classifier)
        with autocast(ids.device, content["precision"]):
            logits.append(torch.cat([z.float() for z in classifier(ids).values()], dim=1))
    before, after = logits
    if not (before.isfinite().all() and after.isfinite().all()):
        raise InputError("the checkpoint's logits of random sequences are not finite: there is nothing to publish in it")
    return (f"on {ids.shape[0]} random sequences of {ids.shape[1]} tokens, in {content['precision']} on a CPU, the largest difference of a "
            f"logit of this model from the checkpoint's is {float((after - before).abs().max()):.3g} (logits up to "
            f"{float(before.abs().max()):.3g})")


def write_backbone(folder, backbone, family):
    """config.json and model.safetensors as the hub has them: every size, what the architecture fixes, keys with the encoder's prefix."""
    noise = PretrainedConfig().to_dict()  # what transformers writes for any model
    config = {key: value for key, value in backbone.config.to_dict().items() if key not in noise or value != noise[key]}
    if not all("--" in str(value) for value in config.get("auto_map", {}).values()):
        del config["auto_map"]  # it names files of a folder, not REPOSITORY--FILE: they are not here
    write_json(folder / "config.json", family.module.FIXED | config | {"model_type": family.config.model_type})
    state = {f"{backbone.base_model_prefix}.{name}": tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    save_tensors(folder / "model.safetensors", state)


def beside(path):
    """{"metrics": what the run's own test wrote beside its checkpoint, "unseen": what evaluate.py --split unseen did}, of what there is."""
    names = {"metrics": "metrics.json", "unseen": "metrics_unseen.json"} if Path(path).is_file() else {}
    return {key: read_json(Path(path).parent / name) for key, name in names.items() if (Path(path).parent / name).is_file()}


if __name__ == "__main__":
    run(main)
