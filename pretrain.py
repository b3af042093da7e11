"""Masked language modelling: a backbone and sequences -> a folder that train.py --weights loads.

  python pretrain.py --model tiny-nt --data data/demo --epochs 5 --out runs/pretrain-tiny-nt
  python pretrain.py --model tiny-nt --fasta genomes.fa.gz --tied --out runs/pretrain-genomes
  torchrun --standalone --nproc_per_node 4 -- pretrain.py --model nt50m --out runs/pretrain-nt50m
  python train.py --model tiny-nt --strategy lora --r 4 --weights runs/pretrain-tiny-nt

15% of the tokens are chosen: 80% of them become the mask token, 10% a random one, 10% stay. The
labels are not read. Each epoch ends with the perplexity on the validation split, beside that of
the token frequencies alone (the unigram) at the same positions.

--fasta cuts records into windows of 1500 bases, as predict.py does; every 50th is the validation
split. Each process keeps the tokens of all of them in memory: a third of a byte per base for nt.
"""

import argparse
import contextlib
import hashlib
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from taxa.backbones import MODELS, get_model, load_backbone, read_config, table_name
from taxa.backbones.masked_lm import (
    MASKING,
    MaskedLM,
    generator_for,
    load_head,
    mask_tokens,
    save_hub_folder,
    unigram_losses,
)
from taxa.data.batches import load
from taxa.data.opening import check_vocabulary, epoch_split, open_data
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError
from taxa.evaluation.metrics import perplexity
from taxa.prediction.reads import check_files, records, tokenized_windows
from taxa.runtime import cli
from taxa.runtime.cli import fraction
from taxa.runtime.distributed import main_first, sum_over_ranks, world
from taxa.runtime.files import sha256, write_json
from taxa.runtime.precision import autocast, set_precision
from taxa.runtime.progress import progress
from taxa.training import checkpoint
from taxa.training.activation_checkpointing import checkpoint_layers
from taxa.training.flags import add_data, add_machine, add_optimisation, add_output, check_run
from taxa.training.optim import adamw, cosine_lr, set_lr
from taxa.training.run import Run, dropout_seed

WINDOW = 1500  # of --fasta: bases
HELD_OUT = 50  # of --fasta: every which window validates
TRAIN, VALIDATION = 0, 1  # streams of random masks
DTYPES = {True: torch.float16, False: torch.float32}


class Source(NamedTuple):
    """What is trained on."""

    splits: dict  # {"train", "validation"}, each indexed by a list of numbers
    vocabulary: int  # ids of the tokenizer
    digest: str  # of the data
    data: object = None  # PreparedDataset, None for --fasta


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    model = parser.group("what is trained")
    model(
        "--model",
        required=True,
        type=table_name,
        metavar="NAME",
        help=f"one of {' '.join(MODELS)}; it starts from random weights",
    )
    model(
        "--weights",
        metavar="DIR",
        help="start from this folder in the hub's format instead, its language-model head "
        "included where it has one",
    )
    model(
        "--mask-fraction",
        type=fraction,
        default=0.15,
        metavar="F",
        help="of the tokens (default 0.15)",
    )
    model(
        "--tied",
        action=argparse.BooleanOptionalAction,
        help="the decoder's weight is the embedding table (default: as --weights DIR has it, "
        "else as published: NT no, DNABERT yes)",
    )
    data = add_data(parser)
    data(
        "--fasta",
        nargs="+",
        metavar="FILE",
        help="instead: FASTA or FASTQ files, plain or gzip; the headers are not read",
    )
    data(
        "--tokenizer-file",
        metavar="FILE",
        help="--fasta: tokenizer.json of a DNABERT (default: DNABERT-2's, from the hub)",
    )
    add_optimisation(parser, weight_decay=0.01, warmup_steps=100, least_epochs=0)
    add_machine(parser)
    output = add_output(parser, required=True, help="run folder, and the folder for --weights")
    output(
        "--float16",
        action="store_true",
        help="write the weights in half precision, half as large",
    )
    args = parser.parse_args(argv)

    if args.mask_fraction == 0:
        parser.error("--mask-fraction 0 hides nothing: there is nothing to predict")
    if args.data and args.fasta:
        parser.error("give either --data or --fasta")
    if args.augment and args.fasta:
        parser.error("--augment goes with --data")
    if args.tokenizer_file and not args.fasta:
        parser.error("--tokenizer-file goes with --fasta: --data has its tokens")
    if args.weights and Path(args.out).resolve() == Path(args.weights).resolve():
        parser.error("--out is the folder of --weights: give another --out")
    check_run(args, get_model(args.model))
    return args


def main(argv=None):
    args = parse_args(argv)
    with world(args.device) as w, Run(w, args, args.out) as run:
        return pretrain(w, run, args, get_model(args.model))


def open_source(w, args, model_row):
    """The Source of --data or --fasta."""
    if args.fasta:
        return open_fasta(w, args, model_row)
    data = open_data(w, args, model_row)
    splits = {name: data.split(name, model_row.tokenizer) for name in ("train", "validation")}
    vocabulary = data.manifest["tokenizers"][model_row.tokenizer]["vocab_size"]
    return Source(splits, vocabulary, data.digest, data)


def open_fasta(w, args, model_row):
    """The Source of --fasta; its digest is of the files and the tokenizer."""
    with main_first(w):
        for path in args.fasta:
            if not Path(path).is_file():
                raise InputError(
                    f"--fasta {path}: no such file (it takes no folders, pipes or standard input)"
                )
        check_files(args.fasta)
        tokenizer = get_tokenizer(model_row.tokenizer, args.tokenizer_file)
    stream = itertools.chain.from_iterable(records(path) for path in args.fasta)
    stream = progress(stream, f"{tokenizer.name} tokens", unit="record")
    train, validation = tokenized_windows(stream, tokenizer, WINDOW, HELD_OUT)
    if not len(validation):
        raise InputError(
            f"{', '.join(args.fasta)}: {len(train)} windows of {WINDOW} bases, but every "
            f"{HELD_OUT}th validates: give more sequences"
        )
    digests = "".join([tokenizer.digest, *map(sha256, args.fasta)])
    digest = hashlib.sha256(digests.encode()).hexdigest()
    return Source({"train": train, "validation": validation}, tokenizer.vocab_size, digest)


def pretrain(w, run, args, model_row):
    """Train, validate before the first epoch and after each.

    Returns the last validation's metrics.
    """
    # data: the splits, and how many steps the training split makes
    set_precision(args.precision, w.device)
    splits, vocabulary, digest, data = open_source(w, args, model_row)
    schedule = run.plan(splits["train"], data.manifest["sources"] if data else None)

    # model: load or draw -> add the head
    torch.manual_seed(args.seed)
    with main_first(w):
        backbone = load_backbone(args.model, args.weights, pretrained=args.weights is not None)
    check_vocabulary(model_row.tokenizer, vocabulary, backbone.config.vocab_size)
    if args.tied is None:
        args.tied = MASKING[model_row.family].tied
        if args.weights:
            args.tied = read_config(args.weights).get("tie_word_embeddings", args.tied)
    model = MaskedLM(model_row.family, backbone, args.tied)
    head = "from its folder" if args.weights and load_head(model, args.weights) else "random"
    base = checkpoint.weights_digest(model) if args.weights else None
    checkpoint_layers(backbone, args.activation_checkpointing)
    model.to(w.device)

    # optimizer: over everything
    parameters = list(model.parameters())
    optimizer = adamw(model, args.lr, args.weight_decay)

    # resume: from last.pt, if there is one
    run.begin({"dataset": digest, "base weights": base})
    metrics = None
    if run.last:
        model.load_state_dict(run.last["state"])
        optimizer.load_state_dict(run.last["optimizer"])
        metrics = run.last["metrics"]
    ddp = model
    if w.size > 1:
        ddp = DistributedDataParallel(model, w.device_ids, gradient_as_bucket_view=True)
    unigram = unigram_losses(splits["train"], model.masking, model.config.vocab_size)
    start = f"from {args.weights}" if args.weights else "from random weights"
    line = (
        f"{args.model} {start}, language-model head {head}: "
        f"{sum(p.numel() for p in parameters):,} parameters; {len(splits['train']):,} sequences, "
        f"{schedule.total_steps:,} steps of {schedule.per_step}; run folder {run.out}"
    )
    run.announce([line], {}, {"dataset": digest})

    def resume_state():
        """What last.pt holds of the model. Writes the folder for --weights, too."""
        save_hub_folder(model, run.out, DTYPES[args.float16])
        optimizer_state = optimizer.state_dict()
        return {"state": model.state_dict(), "optimizer": optimizer_state, "metrics": metrics}

    # validation before the first step: what the network can before it has learnt anything here
    if metrics is None:
        metrics = validate(w, model, splits["validation"], args, unigram)
        run.log_validation(validation_entry(run.first_epoch, run.step, metrics))

    # from here on a signal waits for the end of the step, and the run is saved before it ends
    run.signals.defer()
    for epoch in range(run.first_epoch, schedule.epochs):
        # epoch: the order of its sequences, without the steps that were taken before a resume
        model.train()
        plan = run.steps_left(epoch)
        views = epoch_split(splits["train"], data, args, model_row, epoch)
        batches = load(views, plan, args.workers, w.device)
        title = f"epoch {epoch + 1}/{args.epochs}"
        for micros, count in progress(plan, title, unit="seq", unit_scale=schedule.per_step):
            # ------------------------------------------------------ a single training step
            torch.manual_seed(dropout_seed(args.seed, run.step, w.rank))
            lr = cosine_lr(run.step, schedule.total_steps, args.lr, schedule.warmup_steps)
            set_lr(optimizer, lr)
            generator = generator_for(args.seed, TRAIN, run.step, w.rank)
            masked = [mask(model, args, next(batches), weight, generator) for _, weight in micros]
            positions = torch.tensor(float(sum(chosen.sum() for _, _, chosen, _ in masked)))
            positions = max(float(sum_over_ranks(w, positions)), 1)
            step_loss = torch.zeros((), dtype=torch.float64, device=w.device)
            for i, (*inputs, targets) in enumerate(masked):
                inputs = [tensor.to(w.device, non_blocking=True) for tensor in inputs]
                # processes exchange gradients once a step, in the last micro-batch
                exchange = w.size == 1 or i == len(masked) - 1
                with contextlib.nullcontext() if exchange else ddp.no_sync():
                    with autocast(w.device, args.precision):
                        logits = ddp(*inputs)
                    loss = F.cross_entropy(logits.float(), targets.to(w.device), reduction="sum")
                    # DDP averages over processes: this makes it the gradient of the mean over
                    # the masked positions of the step, however they are shared out
                    (loss * w.size / positions).backward()
                step_loss += loss.detach().double()
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            run.agree_on_signals()
            # of all processes, so that all decide alike
            step_loss = float(sum_over_ranks(w, step_loss))
            norm = float(norm)
            if math.isfinite(step_loss) and math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # ------------------------------------------------------------------------------
            loss = step_loss / positions * count  # logged is the mean over positions
            run.end_step(epoch, lr=lr, loss=loss, grad_norm=norm, count=count, state=resume_state)

        # validation
        metrics = validate(w, model, splits["validation"], args, unigram)
        run.log_validation(validation_entry(epoch + 1, run.step, metrics))
        run.end_epoch(epoch, resume_state)
    run.signals.release()

    # the end: metrics.json says that the run is finished
    if not args.epochs:
        run.save(0, resume_state)
    if w.is_main:
        write_json(run.out / "metrics.json", {"split": "validation", **metrics})
        print(
            f"perplexity {metrics['perplexity']:.1f} at {metrics['positions']:,} masked positions "
            f"of the validation split (unigram {metrics['unigram_perplexity']:.1f}); "
            f"{run.out / 'model.safetensors'}",
            flush=True,
        )
    return metrics


def mask(model, args, batch, weight, generator):
    """input_ids (B, T) with masks, attention_mask (B, T), chosen (B, T), and the ids (K,) that
    stood at the K chosen positions; none is chosen in a batch of weight 0.
    """
    original = batch["input_ids"]
    vocabulary = model.config.vocab_size
    input_ids, chosen = mask_tokens(
        original, model.masking, vocabulary, args.mask_fraction, generator
    )
    chosen = chosen & bool(weight)
    return input_ids, batch["attention_mask"], chosen, original[chosen]


@torch.no_grad()
def validate(w, model, split, args, unigram):
    """Mean loss at the chosen positions of a split, and the unigram's at the same ones.

    The positions are the same every time, on any number of processes: batch k has its own stream
    of masks and goes to process k modulo their number.
    """
    model.eval()
    starts = list(range(0, len(split), args.batch_size))
    sums = torch.zeros(3, dtype=torch.float64)
    for k in progress(starts[w.rank::w.size], "validation", unit="batch"):
        batch = split[list(range(k, min(k + args.batch_size, len(split))))]
        generator = generator_for(args.seed, VALIDATION, k)
        input_ids, attention_mask, chosen, targets = mask(model, args, batch, 1, generator)
        inputs = [tensor.to(w.device) for tensor in (input_ids, attention_mask, chosen)]
        with autocast(w.device, args.precision):
            logits = model(*inputs)
        loss = F.cross_entropy(logits.float(), targets.to(w.device), reduction="sum")
        of_batch = [float(loss), float(unigram[targets].sum()), len(targets)]
        sums += torch.tensor(of_batch, dtype=torch.float64)
    loss, of_unigram, count = sum_over_ranks(w, sums).tolist()
    if not count:
        raise InputError(
            f"{args.data or args.fasta[0]}: not one token of the validation split is masked; "
            "give more sequences"
        )
    return {
        "loss": loss / count,
        "perplexity": perplexity(loss / count),
        "unigram_loss": of_unigram / count,
        "unigram_perplexity": perplexity(of_unigram / count),
        "positions": int(count),
    }


def validation_entry(epochs, step, metrics):
    """The line of log.jsonl for a validation after so many epochs."""
    return {
        "epoch": epochs,
        "step": step,
        "validation_loss": metrics["loss"],
        "perplexity": round(metrics["perplexity"], 2),
        "unigram_perplexity": round(metrics["unigram_perplexity"], 2),
    }


if __name__ == "__main__":
    cli.run(main)
