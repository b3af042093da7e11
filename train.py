"""One training run: a backbone, a strategy, a prepared dataset -> a run folder with ckpt.pt and metrics.json.

  python train.py --model tiny-nt --strategy random --data demo --epochs 2
  torchrun --standalone --nproc_per_node 4 -- train.py --model dnabert2 --strategy lora --r 4 --data data/bertax
  python train.py --model nt50m --strategy freeze75 --dry-run      # what would train; builds and downloads nothing

The "--" keeps torchrun from reading --r as a short form of its own --rdzv-id or --role (pytorch issue 120601); --lora-r needs none.
"""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from taxa import STUDY_SEED
from taxa.backbones import MODELS, backbone_config, find_model
from taxa.data.augment import augmented
from taxa.data.batches import load, micro_batches, on_device, step_records
from taxa.data.dataset import PreparedDataset
from taxa.data.opening import check_vocabulary, data_folder, open_data, row_tokenizer
from taxa.data.splits import SPLITS
from taxa.errors import InputError
from taxa.evaluation.evaluation import run_split, summarize, table, write_tables
from taxa.model import TaxonClassifier, sequence_losses
from taxa.random_init import reinitialize
from taxa.runtime import cli
from taxa.runtime.cli import positive_int, share
from taxa.runtime.distributed import barrier, copy_from_main, main_first, sum_over_ranks, world
from taxa.runtime.precision import (
    COMPILE,
    autocast,
    compile_in_place,
    precision_note,
    set_precision,
)
from taxa.runtime.progress import progress
from taxa.strategies import (
    STRATEGY_FLAGS,
    classifier_on_meta,
    inject_adapters,
    settings_from_flags,
    train_only,
    trainable_names,
)
from taxa.study.published_fractions import published_fraction
from taxa.training import checkpoint, peft_format
from taxa.training.activation_checkpointing import checkpoint_layers
from taxa.training.flags import (
    add_classes,
    add_data,
    add_machine,
    add_model,
    add_optimisation,
    add_output,
    add_strategy,
    check_run,
    check_strategy,
    classes_of,
)
from taxa.training.optim import adamw, cosine_lr, load_adamw
from taxa.training.run import Run, dropout_seed, planned_steps


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add_model(parser)
    add = add_strategy(parser)
    add("--adapters", metavar="DIR", help="lora, ia3: start from a PEFT folder (export.py --adapters, or the PEFT library's)")
    add = add_data(parser)
    add("--data-fraction", type=share, metavar="F",
        help="train on this share of the training split, stratified by its last rank, the same for all runs of a seed (default: all of it)")
    add = add_optimisation(parser, weight_decay=0.0, warmup_steps=0)
    add("--patience", type=positive_int, default=3, metavar="EPOCHS",
        help="stop after this many without a better validation loss (default 3)")
    add = add_machine(parser)
    add("--compile", nargs="?", const="layers", choices=COMPILE, metavar="HOW",
        help="torch.compile: layers (what --compile alone means; starts in seconds) or model (half a minute; faster at small batches)")
    add = add_output(parser, help="run folder (default runs/MODEL-STRATEGY...)")
    add("--dry-run", action="store_true", help="print as one JSON line what would train, and stop")
    add_classes(parser, "--dry-run: ")
    args = parser.parse_args(argv)

    check_strategy(args)
    if args.num_classes and (args.data or not args.dry_run):
        parser.error("--num-classes stands in for data: it goes with --dry-run, without --data")
    classes_of(args)
    row = find_model(args.model, args.weights, args.revision)
    if args.model not in MODELS:
        args.revision = row.revision  # the commit that "main" is now
    check_run(args, row)
    return args


def run_name(args, settings):
    """Default run folder: what sets this run apart from the table's defaults."""
    parts = [args.model.rpartition("/")[2], args.strategy]
    parts += [f"r{settings['r']}"] if args.strategy == "lora" else []
    parts += ["published"] if args.protocol == "published" else []
    parts += ["frozen-heads"] if args.heads == "frozen" else []
    parts += [f"data{args.data_fraction:g}"] if args.data_fraction else []
    parts += ["augment"] if args.augment else []
    parts += [f"seed{args.seed}"] if args.seed != STUDY_SEED else []
    return Path("runs") / "-".join(parts)


def dry_run(args, row, settings):
    """Print one JSON line: what would train. Builds on the meta device; reads no weights and downloads nothing."""
    num_classes = PreparedDataset(data_folder(args.data)).num_classes if args.data else classes_of(args)
    classifier = classifier_on_meta(row, num_classes, settings, backbone_config(row, args.weights))
    names = trainable_names(classifier, settings)
    sizes = {name: p.numel() for name, p in classifier.named_parameters()}
    trainable, total = sum(sizes[name] for name in names), sum(sizes.values())
    published = None  # nothing of the kind was published
    changed = args.weights or args.adapters or args.targets or args.feedforward_targets or args.freeze_fraction
    if row in MODELS.values() and row.hub and not changed:
        published = published_fraction(args.model, args.strategy, num_classes, settings.get("r"))
    print(json.dumps({
        "model": args.model, "strategy": args.strategy, "r": settings.get("r"), "heads": settings["heads"],
        "trainable": trainable, "total": total, "fraction": trainable / total,
        "published_fraction": published, "names": names,
    }))


def announce(run, args, settings, base, model, digest, sequences, steps, started):
    """Write what describes the run into its folder, and say what is about to happen. digest: of the data; sequences: to
    train on; steps: (steps, sequences per step); started: the line of --adapters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trainable = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    lines = {"package": [f"{args.model} starts from the weights that come with this package, pretrained on simulated genomes "
                         "(taxa/assets/tiny_nt/README.md); --weights DIR loads others"],
             "seed": [f"{args.model} has no published weights: the backbone starts from random weights of seed {base.get('seed')}; "
                      "--weights DIR loads others"]}.get(base["source"], [])
    lines += [line for line in (precision_note(args.protocol, args.precision, run.w.device), started) if line]
    lines.append(f"{args.model} {args.strategy}: {trainable:,} of {total:,} parameters train ({trainable / total:.2%}), heads "
                 f"{settings['heads']}; {sequences:,} sequences, {steps[0]:,} steps of {steps[1]}; run folder {run.out}")
    run.announce(lines, {"settings": settings, "base": base},
                 {"parameters": total, "trainable": trainable, "training_sequences": sequences, "dataset": digest})


def checkpoint_of(model, names, args, row, settings, base, data, lineages, epoch, metrics):
    """The content of ckpt.pt: what training changed, and everything needed to rebuild the rest."""
    return {"model": args.model, "config": model.backbone.config.to_dict(), "base": base, "settings": settings,
            "state": checkpoint.changed_state(model, names), "classes": data.classes, "lineages": lineages,
            "data": {"folder": str(data.folder.resolve()), "digest": data.digest}, "window": data.window("train"),
            "tokenizer": {"name": row.tokenizer, **data.manifest["tokenizers"][row.tokenizer]},
            "precision": args.precision, "batch_size": args.batch_size, "epoch": epoch, "metrics": metrics}


def evaluate_split(w, model, split, args, data, lineages):
    """(predictions, metrics) of a split."""
    outcome = run_split(w, model, split, args.batch_size, args.precision, args.workers, lineages=lineages)
    return outcome, summarize(split.name, outcome, data.num_classes, lineages, data.digest)


def main(argv=None):
    args = parse_args(argv)
    row = find_model(args.model, args.weights, args.revision)
    flags = {name: getattr(args, name) for name in STRATEGY_FLAGS}
    start = None
    if args.adapters:
        flags, start = peft_format.start_flags(args.adapters, args.strategy, flags)
    settings = settings_from_flags(row, args.strategy, args.protocol, args.heads, **flags)
    if args.dry_run:
        return dry_run(args, row, settings)
    if row.tokenizer is None:
        raise InputError(f"{args.model}: no tokenizer.json {'in ' + args.weights if args.weights else 'on the hub'}: it says which bases "
                         "make a token")
    with world(args.device) as w, Run(w, args, args.out or run_name(args, settings)) as run:
        return train(w, run, args, row, settings, start)


def train(w, run, args, row, settings, start=None):
    """Train, validate after every epoch, stop, test; returns the test metrics. start: {name: tensor} of --adapters."""
    set_precision(args.precision, w.device)
    data = open_data(w, args, row)
    splits = {name: data.split(name, row.tokenizer) for name in SPLITS}
    per_step, steps_per_epoch, total_steps, warmup_steps = planned_steps(args, len(splits["train"]), w.size)

    # load -> re-initialise if asked -> inject -> decide what trains -> optimizer -> DDP
    base = checkpoint.base_source(row, args.strategy, args.weights, args.revision)
    with main_first(w):
        backbone = checkpoint.load_base(row, base)
    check_vocabulary(row.tokenizer, data.manifest["tokenizers"][row.tokenizer]["vocab_size"], backbone.config.vocab_size)
    base |= {"digest": checkpoint.weights_digest(backbone)} if base["source"] != "none" else {}
    torch.manual_seed(args.seed)
    model = TaxonClassifier(backbone, data.num_classes)
    if args.strategy == "random":
        reinitialize(model, backbone.config.initializer_range)
    inject_adapters(model, settings)
    started = peft_format.start_from(model, args.adapters, start, base, data.classes) if start else None
    names = trainable_names(model, settings)
    train_only(model, names)
    checkpoint_layers(backbone, args.activation_checkpointing)
    model.to(w.device)
    if args.compile:
        compile_in_place(model, backbone.encoder.layer, args.compile, w.device)
    clipped = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model, args.lr, args.weight_decay)

    last = run.begin({"sequences per step": per_step, "dataset": data.digest, "base weights": base.get("digest"),
                      "tokenizer": data.manifest["tokenizers"][row.tokenizer]["digest"]})  # last.pt of a resumed run, else None
    step, first_epoch, best, bad_epochs = (last[name] for name in ("step", "epoch", "best", "bad_epochs")) if last else (0, 0, math.inf, 0)
    if last:
        checkpoint.load_state(model, last["state"], names)
        load_adamw(optimizer, last["optimizer"], model)
    ddp = DistributedDataParallel(model, w.device_ids, gradient_as_bucket_view=True) if w.size > 1 else model
    lineages = np.unique(splits["train"].labels, axis=0).tolist()  # class numbers, one per taxonomic level, that occur together
    announce(run, args, settings, base, model, data.digest, len(splits["train"]), (total_steps, per_step), started)

    def save(epochs):  # last.pt, after so many whole epochs: with it --resume goes on from here, bit for bit
        if w.is_main:
            run.save({"state": checkpoint.changed_state(model, names), "optimizer": optimizer.state_dict(), "step": step, "epoch": epochs,
                      "best": best, "bad_epochs": bad_epochs})
        barrier(w)

    run.signals.defer()  # from here on a signal waits for the end of the step, and the run is saved before it ends
    for epoch in range(first_epoch, args.epochs):
        done, end = epoch * steps_per_epoch, min((epoch + 1) * steps_per_epoch, total_steps)
        if bad_epochs == args.patience or done >= total_steps:
            break
        model.train()
        plan = micro_batches(len(splits["train"]), args.seed, epoch, args.batch_size, args.accumulate, rank=w.rank, size=w.size)
        plan = plan[step - done:end - done]  # optimizer steps
        source = augmented(data.split("train", "nt"), row_tokenizer(row), args.seed, epoch) if args.augment else splits["train"]
        batches = load(source, plan, args.workers, w.device)
        for micros, count in progress(plan, f"epoch {epoch + 1}/{args.epochs}", unit="seq", unit_scale=per_step):
            # ---------------------------------------------------------------- a single training step
            torch.manual_seed(dropout_seed(args.seed, step, w.rank))
            lr = cosine_lr(step, total_steps, args.lr, warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            step_loss = torch.zeros((), dtype=torch.float64, device=w.device)
            for i, (_, weight) in enumerate(micros):
                batch = on_device(next(batches), w.device)
                with contextlib.nullcontext() if w.size == 1 or i == len(micros) - 1 else ddp.no_sync():
                    with autocast(w.device, args.precision):
                        logits = ddp(batch["input_ids"], batch["attention_mask"])
                    loss = sequence_losses(logits, batch["labels"]).sum() * weight
                    (loss * w.size / count).backward()  # DDP averages over processes: the gradient is that of the mean over `count`
                step_loss += loss.detach().double()
            norm = torch.nn.utils.clip_grad_norm_(clipped, args.max_grad_norm)
            run.meet()
            step_loss, norm = float(sum_over_ranks(w, step_loss)), float(norm)  # of all processes, so that all decide alike
            finite = math.isfinite(step_loss) and math.isfinite(norm)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # -----------------------------------------------------------------------------------------
            step += 1
            if finite:
                run.add(step_loss, count)
            else:
                run.bad_step(epoch + 1, step, step_loss, norm,
                             step_records(splits["train"], args.seed, epoch, step - 1 - done, per_step, data.manifest["sources"]))
            run.log_step(epoch + 1, step, total_steps, lr, norm)
            if run.save_due(step) or step == end:  # before the validation, too: whatever happens in it, no step is taken twice
                save(epoch)
            run.leave_if_asked(f"step {step} of {total_steps}")

        _, metrics = evaluate_split(w, model, splits["validation"], args, data, lineages)
        run.log_validation({"epoch": epoch + 1, "step": step, "validation_loss": metrics["loss"],
                            "balanced_accuracy": {rank: round(m["balanced_accuracy"], 4) for rank, m in metrics["ranks"].items()}})
        best, bad_epochs = (metrics["loss"], 0) if metrics["loss"] < best else (best, bad_epochs + 1)
        if w.is_main and bad_epochs == 0:
            checkpoint.save(run.out / "ckpt.pt", checkpoint_of(model, names, args, row, settings, base, data, lineages, epoch + 1, metrics))
        save(epoch + 1)
        run.meet()
        run.leave_if_asked(f"epoch {epoch + 1}")
    run.signals.release()

    # the best checkpoint, restored and tested; only rank 0 reads it, since other machines may not see its disk
    if w.is_main:
        content = checkpoint.read(run.out / "ckpt.pt")
        checkpoint.load_state(model, content["state"], names)
    copy_from_main(w, model.state_dict().values())
    outcome, metrics = evaluate_split(w, model, splits["test"], args, data, lineages)
    if w.is_main:
        write_tables(run.out, metrics, outcome, data.classes)
        print(f"best epoch {content['epoch']}, validation loss {content['metrics']['loss']:.4f}; {run.out / 'ckpt.pt'}")
        print(table(metrics), flush=True)
    return metrics


if __name__ == "__main__":
    cli.run(main)
