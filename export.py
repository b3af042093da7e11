"""A checkpoint -> a folder to publish: the network in the hub's format, its heads, labels and card.

  python export.py runs/demo/ckpt.pt --out exported                             # after make demo
  python export.py runs/tiny-dnabert-lora-r4/ckpt.pt --adapters --out adapters  # in PEFT's format

Without --adapters the adapters are merged into the weights, for good. The folder then holds

  config.json, model.safetensors   the backbone, under the names of the hub's checkpoints;
                                   train.py --weights reads it again
  heads.safetensors                RANK.weight (classes, hidden size), RANK.bias (classes)
  labels.json                      {rank: [{"taxid", "name"}, ...]}: row i of a head is entry i
  taxa.json                        model, settings, tokenizer, precision, length of the training
                                   sequences ("window")
  README.md                        model card: data, strategy, settings, metrics, licence of the
                                   base weights

With --adapters, for LoRA and (IA)3, it holds in place of the first two

  adapter_config.json,
  adapter_model.safetensors        what PeftModel.from_pretrained(backbone, DIR) reads
  taxa.json                        the rest of the checkpoint: evaluate.py DIR takes the folder as
                                   it takes ckpt.pt

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
    add("checkpoint", metavar="CKPT",
        help="ckpt.pt of a run folder, or a folder of export.py --adapters")
    add("--out", metavar="DIR", required=True, help="the folder to make")
    add("--adapters", action="store_true",
        help="lora, ia3: the adapters alone, in PEFT's format; needs no base weights")
    add("--weights", metavar="DIR",
        help="folder with the base weights (default: where the run took them from)")
    add("--overwrite", action="store_true", help="replace an exported folder that exists")
    args = parser.parse_args(argv)
    if args.adapters and args.weights:
        parser.error("--adapters writes no base weights: leave out --weights")
    return args


def main(argv=None):
    args = parse_args(argv)
    content = checkpoint.read(args.checkpoint)
    strategy = content["settings"]["strategy"]
    if args.adapters and strategy not in ("lora", "ia3"):
        raise InputError(
            f"{args.checkpoint}: --strategy {strategy} has no adapters: leave out --adapters"
        )
    if args.overwrite and not is_ours(Path(args.out)):
        raise InputError(
            f"{args.out} is no folder of export.py, so --overwrite does not replace it: "
            "give another --out"
        )
    with new_folder(args.out, args.overwrite) as folder:
        difference = None
        if args.adapters:
            backbone = checkpoint.skeleton(content).backbone
            peft_format.write_adapters(folder, backbone, content["settings"], content["base"])
            peft_format.write_rest(folder, content)
        else:
            classifier = checkpoint.rebuild(content, args.weights)
            difference = largest_difference(classifier, content)
            family = FAMILIES[get_model(content["model"], content["config"]).family]
            write_backbone(folder, classifier.backbone, family)
            names = ("model", "settings", "tokenizer", "precision")
            rest = {name: content[name] for name in names}
            rest["window"] = checkpoint.window_of(content)
            write_json(folder / peft_format.REST, rest)
        peft_format.write_heads(folder, content)
        card = model_card(content, beside(args.checkpoint), args.adapters, difference)
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = sorted(f"{path.name} ({path.stat().st_size:,} bytes)" for path in folder.iterdir())
    print(f"{args.out}: {', '.join(files)}")


def is_ours(folder):
    """Whether --overwrite may replace a folder: it is missing or empty, or export.py wrote it."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return True
    return (folder / peft_format.LABELS).exists()


def random_tokens(content):
    """Random token ids (4, T), with T as for a training sequence in 6-mers, at most 512."""
    T = min(checkpoint.window_of(content)["length"] // 6 + 1, 512)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(content["config"]["vocab_size"], (4, T), generator=generator)


@torch.no_grad()
def largest_difference(classifier, content):
    """Merge a classifier's adapters. Returns a line of the card: how far its logits move.

    They are computed in the precision of the run. Raises InputError when they are not finite.
    """
    ids = random_tokens(content)
    logits = []
    for change in (lambda model: model, merge_adapters):
        change(classifier)
        with autocast(ids.device, content["precision"]):
            found = classifier(ids)
            logits.append(torch.cat([z.float() for z in found.values()], dim=1))
    before, after = logits
    if not (before.isfinite().all() and after.isfinite().all()):
        raise InputError(
            "the checkpoint's logits of random sequences are not finite: "
            "there is nothing to publish in it"
        )
    difference = float((after - before).abs().max())
    largest = float(before.abs().max())
    return (
        f"on {ids.shape[0]} random sequences of {ids.shape[1]} tokens, in {content['precision']} "
        "on a CPU, the largest difference of a logit of this model from the checkpoint's is "
        f"{difference:.3g} (logits up to {largest:.3g})"
    )


def write_backbone(folder, backbone, family):
    """Write config.json and model.safetensors as the hub has them.

    The first has every size and what the architecture fixes. The keys of the second have the
    encoder's prefix.
    """
    noise = PretrainedConfig().to_dict()  # what transformers writes for any model
    config = {
        key: value
        for key, value in backbone.config.to_dict().items()
        if key not in noise or value != noise[key]
    }
    # auto_map may name files of a folder, not REPOSITORY--FILE: they are not here.
    if not all("--" in str(value) for value in config.get("auto_map", {}).values()):
        del config["auto_map"]
    config = family.module.REQUIRED_VALUES | config | {"model_type": family.config.model_type}
    write_json(folder / "config.json", config)
    prefix = backbone.base_model_prefix
    state = {
        f"{prefix}.{name}": tensor.contiguous()
        for name, tensor in backbone.state_dict().items()
    }
    save_tensors(folder / "model.safetensors", state)


def beside(path):
    """What was measured beside a checkpoint, of what there is: {"metrics", "unseen"}.

    "metrics" is what the run's own test wrote, "unseen" what evaluate.py --split unseen wrote.
    """
    path = Path(path)
    found = {}
    if path.is_file():
        for key, name in (("metrics", "metrics.json"), ("unseen", "metrics_unseen.json")):
            if (path.parent / name).is_file():
                found[key] = read_json(path.parent / name)
    return found


if __name__ == "__main__":
    run(main)
