"""One training run: a backbone, a strategy, a prepared dataset -> a run folder with ckpt.pt and
metrics.json.

  python train.py --model tiny-nt --strategy random --data demo --epochs 2
  torchrun --standalone --nproc_per_node 4 -- train.py --model dnabert2 --strategy lora --r 4
  python train.py --model nt50m --strategy freeze75 --dry-run

With --dry-run it prints what would train, and builds and downloads nothing. The "--" keeps
torchrun from reading --r as a short form of its own --rdzv-id or --role (pytorch issue 120601);
--lora-r needs none.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from taxa import STUDY_SEED
from taxa.backbones import MODELS, backbone_config, find_model
from taxa.backbones.table import Model
from taxa.data.batches import load, on_device
from taxa.data.dataset import PreparedDataset
from taxa.data.opening import check_vocabulary, data_folder, epoch_split, open_data
from taxa.data.splits import SPLITS
from taxa.errors import InputError
from taxa.evaluation.evaluation import run_split, summarize, table, write_tables
from taxa.model import TaxonClassifier, sequence_losses
from taxa.random_init import reinitialize
from taxa.runtime import cli
from taxa.runtime.cli import positive_int, share
from taxa.runtime.distributed import copy_from_main, main_first, sum_over_ranks, world
from taxa.runtime.precision import (
    COMPILE,
    autocast,
    compile_in_place,
    precision_note,
    set_precision,
)
from taxa.runtime.progress import progress
from taxa.strategies import classifier_on_meta, inject_adapters, train_only, trainable_names
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
from taxa.training.optim import adamw, cosine_lr, set_lr
from taxa.training.run import Run, dropout_seed
from taxa.training.settings import run_settings

# Where the weights of a model come from that the hub does not have: a line for the user.
NOT_FROM_THE_HUB = {
    "package": "{model} starts from the weights that come with this package, pretrained on "
    "simulated genomes (taxa/assets/tiny_nt/README.md); --weights DIR loads others",
    "seed": "{model} has no published weights: the backbone starts from random weights of seed "
    "{seed}; --weights DIR loads others",
}


class Trained(NamedTuple):
    """What train() built, for the functions that describe, save and measure it."""

    args: object
    model_row: Model  # of the table of backbones
    settings: dict  # of the strategy
    base: dict  # where the base weights came from
    data: PreparedDataset
    lineages: list  # of class numbers, one per taxonomic level, that occur together in training
    model: TaxonClassifier
    names: list  # of the parameters that train


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add_model(parser)
    strategy = add_strategy(parser)
    strategy(
        "--adapters",
        metavar="DIR",
        help="lora, ia3: start from a PEFT folder (export.py --adapters, or the PEFT library's)",
    )
    data = add_data(parser)
    data(
        "--data-fraction",
        type=share,
        metavar="F",
        help="train on this share of the training split, stratified by its last rank, the same "
        "for all runs of a seed (default: all of it)",
    )
    optimisation = add_optimisation(parser, weight_decay=0.0, warmup_steps=0)
    optimisation(
        "--patience",
        type=positive_int,
        default=3,
        metavar="EPOCHS",
        help="stop after this many without a better validation loss (default 3)",
    )
    machine = add_machine(parser)
    machine(
        "--compile",
        nargs="?",
        const="layers",
        choices=COMPILE,
        metavar="HOW",
        help="torch.compile: layers (what --compile alone means; starts in seconds) or model "
        "(half a minute; faster at small batches)",
    )
    output = add_output(parser, help="run folder (default runs/MODEL-STRATEGY...)")
    output(
        "--dry-run", action="store_true", help="print as one JSON line what would train, and stop"
    )
    add_classes(parser, "--dry-run: ")
    args = parser.parse_args(argv)

    check_strategy(args)
    if args.num_classes and (args.data or not args.dry_run):
        parser.error("--num-classes stands in for data: it goes with --dry-run, without --data")
    classes_of(args)
    model_row = find_model(args.model, args.weights, args.revision)
    if args.model not in MODELS:
        args.revision = model_row.revision  # the commit that "main" is now
    check_run(args, model_row)
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


def main(argv=None):
    args = parse_args(argv)
    model_row = find_model(args.model, args.weights, args.revision)
    settings, adapter_state = run_settings(args, model_row)
    if args.dry_run:
        return dry_run(args, model_row, settings)
    if model_row.tokenizer is None:
        where = "in " + args.weights if args.weights else "on the hub"
        raise InputError(
            f"{args.model}: no tokenizer.json {where}: it says which bases make a token"
        )
    with world(args.device) as w, Run(w, args, args.out or run_name(args, settings)) as run:
        return train(w, run, args, model_row, settings, adapter_state)


def train(w, run, args, model_row, settings, adapter_state=None):
    """Train, validate after every epoch, stop, test; returns the test metrics.

    w: World; settings, adapter_state: of run_settings().
    """
    # data: the splits, and how many steps the training split makes
    set_precision(args.precision, w.device)
    data = open_data(w, args, model_row)
    splits = {name: data.split(name, model_row.tokenizer) for name in SPLITS}
    schedule = run.plan(splits["train"], data.manifest["sources"])

    # model: load -> re-initialise if asked -> inject -> decide what trains
    backbone, base = load_pretrained(w, args, model_row, data)
    torch.manual_seed(args.seed)
    model = TaxonClassifier(backbone, data.num_classes)
    if args.strategy == "random":
        reinitialize(model, backbone.config.initializer_range)
    inject_adapters(model, settings)
    adapters_note = None
    if adapter_state:
        adapters_note = peft_format.start_from(
            model, args.adapters, adapter_state, base, data.classes
        )
    names = trainable_names(model, settings)
    train_only(model, names)
    checkpoint_layers(backbone, args.activation_checkpointing)
    model.to(w.device)
    if args.compile:
        compile_in_place(model, backbone.encoder.layer, args.compile, w.device)

    # optimizer: over what trains
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model, args.lr, args.weight_decay)

    # resume: from last.pt, if there is one
    run.begin(
        {
            "dataset": data.digest,
            "base weights": base.get("digest"),
            "tokenizer": data.manifest["tokenizers"][model_row.tokenizer]["digest"],
        }
    )
    if run.last:
        checkpoint.load_state(model, run.last["state"], names)
        optimizer.load_state_dict(run.last["optimizer"])
    ddp = model
    if w.size > 1:
        ddp = DistributedDataParallel(model, w.device_ids, gradient_as_bucket_view=True)
    trained = Trained(
        args=args,
        model_row=model_row,
        settings=settings,
        base=base,
        data=data,
        lineages=np.unique(splits["train"].labels, axis=0).tolist(),
        model=model,
        names=names,
    )
    announce(run, trained, len(splits["train"]), adapters_note)

    def resume_state():
        """What last.pt holds of the model: with it --resume goes on from here, bit for bit."""
        state = checkpoint.changed_state(model, names)
        return {"state": state, "optimizer": optimizer.state_dict()}

    # from here on a signal waits for the end of the step, and the run is saved before it ends
    run.signals.defer()
    for epoch in range(run.first_epoch, schedule.epochs):
        if run.bad_epochs == args.patience:
            break
        # epoch: the order of its sequences, without the steps that were taken before a resume
        model.train()
        plan = run.steps_left(epoch)
        batches = load(
            epoch_split(splits["train"], data, args, model_row, epoch),
            plan,
            args.workers,
            w.device,
        )
        for micros, count in progress(
            plan, f"epoch {epoch + 1}/{args.epochs}", unit="seq", unit_scale=schedule.per_step
        ):
            # ------------------------------------------------------ a single training step
            torch.manual_seed(dropout_seed(args.seed, run.step, w.rank))
            lr = cosine_lr(run.step, schedule.total_steps, args.lr, schedule.warmup_steps)
            set_lr(optimizer, lr)
            step_loss = torch.zeros((), dtype=torch.float64, device=w.device)
            for i, (_, weight) in enumerate(micros):
                batch = on_device(next(batches), w.device)
                # processes exchange gradients once a step, in the last micro-batch
                exchange = w.size == 1 or i == len(micros) - 1
                with contextlib.nullcontext() if exchange else ddp.no_sync():
                    with autocast(w.device, args.precision):
                        logits = ddp(batch["input_ids"], batch["attention_mask"])
                    loss = sequence_losses(logits, batch["labels"]).sum() * weight
                    # DDP averages over processes: this makes it the gradient of the mean over
                    # the `count` sequences of the step, however they are shared out
                    (loss * w.size / count).backward()
                step_loss += loss.detach().double()
            norm = torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm)
            run.agree_on_signals()
            # of all processes, so that all decide alike
            step_loss = float(sum_over_ranks(w, step_loss))
            norm = float(norm)
            if math.isfinite(step_loss) and math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # ------------------------------------------------------------------------------
            run.end_step(
                epoch, lr=lr, loss=step_loss, grad_norm=norm, count=count, state=resume_state
            )

        # validation: the checkpoint is that of the epoch with the lowest loss
        _, metrics = evaluate_split(w, trained, splits["validation"])
        run.log_validation(validation_entry(epoch, run.step, metrics))
        if run.is_best(metrics["loss"]) and w.is_main:
            checkpoint.save(run.out / "ckpt.pt", checkpoint_of(trained, epoch, metrics))
        run.end_epoch(epoch, resume_state)
    run.signals.release()

    # test: of the best checkpoint
    return test_best_epoch(w, run, trained, splits["test"])


def load_pretrained(w, args, model_row, data):
    """(backbone, where its weights came from). Raises InputError unless it knows every token."""
    base = checkpoint.base_source(model_row, args.strategy, args.weights, args.revision)
    with main_first(w):
        backbone = checkpoint.load_base(model_row, base)
    ids = data.manifest["tokenizers"][model_row.tokenizer]["vocab_size"]
    check_vocabulary(model_row.tokenizer, ids, backbone.config.vocab_size)
    if base["source"] != "none":
        base["digest"] = checkpoint.weights_digest(backbone)
    return backbone, base


def evaluate_split(w, trained, split):
    """(predictions, metrics) of a split."""
    args = trained.args
    outcome = run_split(
        w,
        trained.model,
        split,
        args.batch_size,
        args.precision,
        args.workers,
        lineages=trained.lineages,
    )
    metrics = summarize(
        split.name, outcome, trained.data.num_classes, trained.lineages, trained.data.digest
    )
    return outcome, metrics


def validation_entry(epoch, step, metrics):
    """The line of log.jsonl for a validation. epoch: from 0."""
    ranks = metrics["ranks"].items()
    accuracies = {rank: round(found["balanced_accuracy"], 4) for rank, found in ranks}
    return {
        "epoch": epoch + 1,
        "step": step,
        "validation_loss": metrics["loss"],
        "balanced_accuracy": accuracies,
    }


def checkpoint_of(trained, epoch, metrics):
    """The content of ckpt.pt: what training changed, and everything to rebuild the rest."""
    args = trained.args
    data = trained.data
    tokenizer = trained.model_row.tokenizer
    return {
        "model": args.model,
        "config": trained.model.backbone.config.to_dict(),
        "base": trained.base,
        "settings": trained.settings,
        "state": checkpoint.changed_state(trained.model, trained.names),
        "classes": data.classes,
        "lineages": trained.lineages,
        "data": {"folder": str(data.folder.resolve()), "digest": data.digest},
        "window": data.window("train"),
        "tokenizer": {"name": tokenizer, **data.manifest["tokenizers"][tokenizer]},
        "precision": args.precision,
        "batch_size": args.batch_size,
        "epoch": epoch + 1,
        "metrics": metrics,
    }


def test_best_epoch(w, run, trained, split):
    """Restore the best checkpoint, test it, write its tables; returns the metrics."""
    # only rank 0 reads the file, since other machines may not see its disk
    if w.is_main:
        content = checkpoint.read(run.out / "ckpt.pt")
        checkpoint.load_state(trained.model, content["state"], trained.names)
    copy_from_main(w, trained.model.state_dict().values())
    outcome, metrics = evaluate_split(w, trained, split)
    if w.is_main:
        write_tables(run.out, metrics, outcome, trained.data.classes)
        loss = content["metrics"]["loss"]
        path = run.out / "ckpt.pt"
        print(f"best epoch {content['epoch']}, validation loss {loss:.4f}; {path}")
        print(table(metrics), flush=True)
    return metrics


def announce(run, trained, sequences, adapters_note):
    """Write what describes the run into its folder, and say what is about to happen.

    sequences: to train on; adapters_note: a line on --adapters, or None.
    """
    args = trained.args
    base = trained.base
    settings = trained.settings
    sizes = [(p.numel(), p.requires_grad) for p in trained.model.parameters()]
    total = sum(n for n, _ in sizes)
    trainable = sum(n for n, trains in sizes if trains)
    lines = []
    if base["source"] in NOT_FROM_THE_HUB:
        line = NOT_FROM_THE_HUB[base["source"]]
        lines.append(line.format(model=args.model, seed=base.get("seed")))
    precision = precision_note(args.protocol, args.precision, run.w.device)
    lines += [line for line in (precision, adapters_note) if line]
    lines.append(
        f"{args.model} {args.strategy}: {trainable:,} of {total:,} parameters train "
        f"({trainable / total:.2%}), heads {settings['heads']}; {sequences:,} sequences, "
        f"{run.schedule.total_steps:,} steps of {run.schedule.per_step}; run folder {run.out}"
    )
    environment = {
        "parameters": total,
        "trainable": trainable,
        "training_sequences": sequences,
        "dataset": trained.data.digest,
    }
    run.announce(lines, {"settings": settings, "base": base}, environment)


def dry_run(args, model_row, settings):
    """Print one JSON line: what would train.

    Builds on the meta device; reads no weights and downloads nothing.
    """
    num_classes = classes_of(args)
    if args.data:
        num_classes = PreparedDataset(data_folder(args.data)).num_classes
    config = backbone_config(model_row, args.weights)
    classifier = classifier_on_meta(model_row, num_classes, settings, config)
    names = trainable_names(classifier, settings)
    sizes = {name: p.numel() for name, p in classifier.named_parameters()}
    trainable = sum(sizes[name] for name in names)
    total = sum(sizes.values())
    published = None
    changed = (
        args.weights,
        args.adapters,
        args.targets,
        args.feedforward_targets,
        args.freeze_fraction,
    )
    of_the_study = model_row in MODELS.values() and model_row.hub and not any(changed)
    if of_the_study:
        r = settings.get("r")
        published = published_fraction(args.model, args.strategy, num_classes, r)
    line = {
        "model": args.model,
        "strategy": args.strategy,
        "r": settings.get("r"),
        "heads": settings["heads"],
        "trainable": trainable,
        "total": total,
        "fraction": trainable / total,
        "published_fraction": published,
        "names": names,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    cli.run(main)
