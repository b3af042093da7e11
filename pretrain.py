"""Masked language modelling: a backbone, and a prepared dataset or FASTA files -> a folder that train.py --weights loads.

  python pretrain.py --model tiny-nt --data data/demo --epochs 5 --out runs/pretrain-tiny-nt
  torchrun --standalone --nproc_per_node 4 -- pretrain.py --model nt50m --data data/bertax --epochs 1 --out runs/pretrain-nt50m
  python pretrain.py --model tiny-nt --fasta genomes.fa.gz --tied --epochs 1 --out runs/pretrain-genomes
  python train.py --model tiny-nt --strategy lora --r 4 --data data/demo --weights runs/pretrain-tiny-nt

15% of the tokens are chosen (80% of them become the mask token, 10% a random one, 10% stay); the labels are not read. Each epoch ends with
the perplexity on the validation split, beside that of the token frequencies alone (the unigram) at the same positions.

--fasta cuts records into windows of 1500 bases, as predict.py does; every 50th is the validation split. Each process keeps the tokens
of all of them in memory: a third of a byte per base for nt.
"""

import argparse
import contextlib
import hashlib
import itertools
import math
from pathlib import Path

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
from taxa.data.augment import augmented
from taxa.data.batches import load, micro_batches, step_records
from taxa.data.opening import check_vocabulary, open_data, row_tokenizer
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError
from taxa.evaluation.metrics import perplexity
from taxa.prediction.reads import check_files, records, tokenized_windows
from taxa.runtime import cli
from taxa.runtime.cli import fraction
from taxa.runtime.distributed import barrier, main_first, sum_over_ranks, world
from taxa.runtime.files import sha256, write_json
from taxa.runtime.precision import autocast, set_precision
from taxa.runtime.progress import progress
from taxa.training import checkpoint
from taxa.training.activation_checkpointing import checkpoint_layers
from taxa.training.flags import add_data, add_machine, add_optimisation, add_output, check_run
from taxa.training.optim import adamw, cosine_lr, load_adamw
from taxa.training.run import Run, planned_steps

WINDOW, HELD_OUT = 1500, 50  # of --fasta: bases, and every which window validates
TRAIN, VALIDATION = 0, 1  # streams of random masks
DTYPES = {True: torch.float16, False: torch.float32}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.group("what is trained")
    add("--model", required=True, type=table_name, metavar="NAME", help=f"one of {' '.join(MODELS)}; it starts from random weights")
    add("--weights", metavar="DIR", help="start from this folder in the hub's format instead, its language-model head included where it "
        "has one")
    add("--mask-fraction", type=fraction, default=0.15, metavar="F", help="of the tokens (default 0.15)")
    add("--tied", action=argparse.BooleanOptionalAction, help="the decoder's weight is the embedding table (default: as --weights DIR has "
        "it, else as published: NT no, DNABERT yes)")
    add = add_data(parser)
    add("--fasta", nargs="+", metavar="FILE", help="instead: FASTA or FASTQ files, plain or gzip; the headers are not read")
    add("--tokenizer-file", metavar="FILE", help="--fasta: tokenizer.json of a DNABERT (default: DNABERT-2's, from the hub)")
    add_optimisation(parser, weight_decay=0.01, warmup_steps=100, least_epochs=0)
    add_machine(parser)
    add = add_output(parser, required=True, help="run folder, and the folder for --weights")
    add("--float16", action="store_true", help="write the weights in half precision, half as large")
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


def open_fasta(w, args, row):
    """({"train", "validation": Windows}, vocabulary size, digest of files and tokenizer) of --fasta."""
    with main_first(w):
        for path in args.fasta:
            if not Path(path).is_file():
                raise InputError(f"--fasta {path}: no such file (it takes no folders, pipes or standard input)")
        check_files(args.fasta)
        tokenizer = get_tokenizer(row.tokenizer, args.tokenizer_file)
    stream = itertools.chain.from_iterable(records(path) for path in args.fasta)
    train, validation = tokenized_windows(progress(stream, f"{tokenizer.name} tokens", unit="record"), tokenizer, WINDOW, HELD_OUT)
    if not len(validation):
        raise InputError(f"{', '.join(args.fasta)}: {len(train)} windows of {WINDOW} bases, but every {HELD_OUT}th validates: "
                         "give more sequences")
    digest = hashlib.sha256("".join([tokenizer.digest, *map(sha256, args.fasta)]).encode()).hexdigest()
    return {"train": train, "validation": validation}, tokenizer.vocab_size, digest


@torch.no_grad()
def validate(w, model, split, args, unigram):
    """Mean loss at the chosen positions of a split, and the unigram's at the same ones. The same positions every time, on any number of
    processes: batch k has its own stream of masks and goes to process k modulo their number."""
    model.eval()
    starts = list(range(0, len(split), args.batch_size))
    sums = torch.zeros(3, dtype=torch.float64)
    for k in progress(starts[w.rank::w.size], "validation", unit="batch"):
        batch = split[list(range(k, min(k + args.batch_size, len(split))))]
        input_ids, chosen = mask_tokens(batch["input_ids"], model.masking, model.config.vocab_size, args.mask_fraction,
                                        generator_for(args.seed, VALIDATION, k))
        targets = batch["input_ids"][chosen]
        with autocast(w.device, args.precision):
            logits = model(input_ids.to(w.device), batch["attention_mask"].to(w.device), chosen.to(w.device))
        loss = F.cross_entropy(logits.float(), targets.to(w.device), reduction="sum")
        sums += torch.tensor([float(loss), float(unigram[targets].sum()), len(targets)], dtype=torch.float64)
    loss, of_unigram, count = sum_over_ranks(w, sums).tolist()
    if not count:
        raise InputError(f"{args.data or args.fasta[0]}: not one token of the validation split is masked; give more sequences")
    return {"loss": loss / count, "perplexity": perplexity(loss / count), "unigram_loss": of_unigram / count,
            "unigram_perplexity": perplexity(of_unigram / count), "positions": int(count)}


def pretrain(w, run, args, row):
    """Train, validate before the first epoch and after each; returns the last validation's metrics."""
    set_precision(args.precision, w.device)
    if args.fasta:
        (splits, vocabulary, digest), sources = open_fasta(w, args, row), None
    else:
        data = open_data(w, args, row)
        splits = {name: data.split(name, row.tokenizer) for name in ("train", "validation")}
        vocabulary, digest = data.manifest["tokenizers"][row.tokenizer]["vocab_size"], data.digest
        sources = data.manifest["sources"]
    per_step, steps_per_epoch, total_steps, warmup_steps = planned_steps(args, len(splits["train"]), w.size)

    # load or draw -> add the head -> optimizer -> DDP
    torch.manual_seed(args.seed)
    with main_first(w):
        backbone = load_backbone(args.model, args.weights, pretrained=args.weights is not None)
    check_vocabulary(row.tokenizer, vocabulary, backbone.config.vocab_size)
    if args.tied is None:
        published = MASKING[row.family].tied
        args.tied = read_config(args.weights).get("tie_word_embeddings", published) if args.weights else published
    model = MaskedLM(row.family, backbone, args.tied)
    head = "from its folder" if args.weights and load_head(model, args.weights) else "random"
    base = checkpoint.weights_digest(model) if args.weights else None
    checkpoint_layers(backbone, args.activation_checkpointing)
    model.to(w.device)
    parameters = list(model.parameters())
    optimizer = adamw(model, args.lr, args.weight_decay)

    last = run.begin({"sequences per step": per_step, "dataset": digest, "base weights": base})  # last.pt of a resumed run, else None
    step, first_epoch, metrics = 0, 0, None
    if last:
        model.load_state_dict(last["state"])
        load_adamw(optimizer, last["optimizer"], model)
        step, metrics = last["step"], last.get("metrics")
        first_epoch = last.get("epoch", step // steps_per_epoch)  # older files have no "epoch" and no "metrics"
    ddp = DistributedDataParallel(model, w.device_ids, gradient_as_bucket_view=True) if w.size > 1 else model
    unigram = unigram_losses(splits["train"], model.masking, model.config.vocab_size)
    run.announce([f"{args.model} {'from ' + args.weights if args.weights else 'from random weights'}, language-model head {head}: "
                  f"{sum(p.numel() for p in parameters):,} parameters; {len(splits['train']):,} sequences, {total_steps:,} steps of "
                  f"{per_step}; run folder {run.out}"], {}, {"dataset": digest})

    def measure(epoch):
        metrics = validate(w, model, splits["validation"], args, unigram)
        run.log_validation({"epoch": epoch, "step": step, "validation_loss": metrics["loss"],
                            "perplexity": round(metrics["perplexity"], 2), "unigram_perplexity": round(metrics["unigram_perplexity"], 2)})
        return metrics

    def save(epochs):  # after so many whole epochs: the folder for --weights, and last.pt for --resume
        if w.is_main:
            save_hub_folder(model, run.out, DTYPES[args.float16])
            run.save({"state": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "epoch": epochs, "metrics": metrics})
        barrier(w)

    metrics = metrics or measure(first_epoch)
    run.signals.defer()  # from here on a signal waits for the end of the step, and the run is saved before it ends
    for epoch in range(first_epoch, args.epochs):
        done, end = epoch * steps_per_epoch, min((epoch + 1) * steps_per_epoch, total_steps)
        if done >= total_steps:
            break
        model.train()
        plan = micro_batches(len(splits["train"]), args.seed, epoch, args.batch_size, args.accumulate, rank=w.rank, size=w.size)
        plan = plan[step - done:end - done]  # optimizer steps
        source = augmented(data.split("train", "nt"), row_tokenizer(row), args.seed, epoch) if args.augment else splits["train"]
        loader = load(source, plan, args.workers, w.device)
        for micros, count in progress(plan, f"epoch {epoch + 1}/{args.epochs}", unit="seq", unit_scale=per_step):
            # ---------------------------------------------------------------- a single training step
            torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + w.rank)  # dropout: another stream per step and process
            lr = cosine_lr(step, total_steps, args.lr, warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            masks, batches = generator_for(args.seed, TRAIN, step, w.rank), []
            for _, weight in micros:
                batch = next(loader)
                input_ids, chosen = mask_tokens(batch["input_ids"], model.masking, model.config.vocab_size, args.mask_fraction, masks)
                batches.append((input_ids, batch["attention_mask"], chosen & bool(weight), batch["input_ids"]))
            positions = max(float(sum_over_ranks(w, torch.tensor(float(sum(chosen.sum() for _, _, chosen, _ in batches))))), 1)
            step_loss = torch.zeros((), dtype=torch.float64, device=w.device)
            for i, (input_ids, attention_mask, chosen, original) in enumerate(batches):
                with contextlib.nullcontext() if w.size == 1 or i == len(batches) - 1 else ddp.no_sync():
                    with autocast(w.device, args.precision):
                        logits = ddp(*(tensor.to(w.device, non_blocking=True) for tensor in (input_ids, attention_mask, chosen)))
                    loss = F.cross_entropy(logits.float(), original[chosen].to(w.device), reduction="sum")
                    (loss * w.size / positions).backward()  # DDP averages: the gradient is that of the mean over positions
                step_loss += loss.detach().double()
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            run.meet()
            step_loss, norm = float(sum_over_ranks(w, step_loss)), float(norm)  # of all processes, so that all decide alike
            finite = math.isfinite(step_loss) and math.isfinite(norm)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # -----------------------------------------------------------------------------------------
            step += 1
            if finite:
                run.add(step_loss / positions * count, count)
            else:
                run.bad_step(epoch + 1, step, step_loss, norm,
                             step_records(splits["train"], args.seed, epoch, step - 1 - done, per_step, sources))
            run.log_step(epoch + 1, step, total_steps, lr, norm)
            if run.save_due(step) or step == end:  # before the validation, too: whatever happens in it, no step is taken twice
                save(epoch)
            run.leave_if_asked(f"step {step} of {total_steps}")
        metrics = measure(epoch + 1)
        save(epoch + 1)
        run.meet()
        run.leave_if_asked(f"epoch {epoch + 1}")
    run.signals.release()
    if not args.epochs:
        save(0)
    if w.is_main:
        write_json(run.out / "metrics.json", {"split": "validation", **metrics})
        print(f"perplexity {metrics['perplexity']:.1f} at {metrics['positions']:,} masked positions of the validation split "
              f"(unigram {metrics['unigram_perplexity']:.1f}); {run.out / 'model.safetensors'}", flush=True)
    return metrics


if __name__ == "__main__":
    cli.run(main)
