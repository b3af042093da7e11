"""Masked-token pretraining of a backbone on a prepared dataset or FASTA files -> a hub-format folder, which train.py --weights loads.

  python pretrain.py --model tiny-nt --data data/demo --epochs 5 --out runs/pretrain-tiny-nt
  torchrun --nproc_per_node 4 pretrain.py --model nt50m --data data/bertax --epochs 1 --precision bf16 --out runs/pretrain-nt50m
  python pretrain.py --model tiny-nt --fasta genomes.fa.gz --tied --epochs 1 --out runs/pretrain-genomes
  python train.py --model tiny-nt --strategy lora --r 4 --data data/demo --weights runs/pretrain-tiny-nt

15% of the tokens are chosen (80% of them become the mask token, 10% a random one, 10% stay); the labels are not read. Each epoch ends with
the perplexity on the validation split, beside that of the token frequencies alone (the unigram) at the same positions.

--fasta cuts records into windows of 1500 letters, as predict.py does; every 50th is the validation split. Each process keeps the tokens
of all of them in memory: a third of a byte per letter for nt.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from taxa.backbones import MODELS, get_model, load_backbone, read_config, table_name
from taxa.backbones.masked_lm import MASKING, MaskedLM, generator_for, load_head, mask_tokens, save_hub_folder, unigram_losses
from taxa.data.dataset import micro_batches
from taxa.data.reads import check_files, records, tokenized_windows
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError
from taxa.results.metrics import perplexity
from taxa.runtime.cli import Parser, fraction, non_negative_float, non_negative_int, positive_float, positive_int, run, seed
from taxa.runtime.distributed import barrier, main_first, sum_over_ranks, world
from taxa.runtime.files import sha256, write_json
from taxa.runtime.precision import PRECISIONS, autocast, set_precision
from taxa.runtime.progress import print_line, progress
from taxa.training import checkpoint, resume
from taxa.training.optim import adamw, cosine_rate, load_adamw
from train import environment, open_data

RUN_FILES = ("args.json", "environment.json", "log.jsonl", "last.pt", "config.json", "model.safetensors", "metrics.json")
RESUME_IGNORES = ("resume", "overwrite", "out", "workers", "log_every", "save_every", "device", "float16")
WINDOW, HELD_OUT = 1500, 50  # of --fasta: letters, and every which window validates
TRAIN, VALIDATION = 0, 1  # streams of random masks
DTYPES = {True: torch.float16, False: torch.float32}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.group("what is trained")
    add("--model", required=True, type=table_name, metavar="NAME", help=f"one of {' '.join(MODELS)}; it starts from random weights")
    add("--weights", metavar="DIR", help="go on from this folder in the hub's format instead, its language-model head included where it "
        "has one")
    add("--mask-fraction", type=fraction, default=0.15, metavar="F", help="of the tokens (default 0.15)")
    add("--tied", action=argparse.BooleanOptionalAction, help="the decoder's weight is the embedding table (default: as --weights DIR has "
        "it, else as published: NT no, DNABERT yes)")
    add = parser.group("data")
    add("--data", metavar="DIR", help="prepared dataset, or demo")
    add("--fasta", nargs="+", metavar="FILE", help="instead: FASTA or FASTQ files, plain or gzip; the headers are not read")
    add("--tokenizer-file", metavar="FILE", help="--fasta: tokenizer.json of a DNABERT (default: DNABERT-2's, from the hub)")
    add("--workers", type=non_negative_int, default=0, metavar="N", help="processes that load batches, per rank (default 0: in the loop)")
    add = parser.group("optimisation")
    add("--epochs", type=non_negative_int, default=5, metavar="N", help="default 5; 0 only measures the perplexity")
    add("--max-steps", type=positive_int, metavar="N", help="stop after this many optimizer steps")
    add("--batch-size", type=positive_int, metavar="B", help="sequences per process and micro-batch (default: that of the model's row)")
    add("--accumulate", type=positive_int, default=1, metavar="N", help="micro-batches per optimizer step (default 1)")
    add("--lr", type=positive_float, metavar="LR", help="peak learning rate (default: that of the model's row)")
    add("--weight-decay", type=non_negative_float, default=0.01, metavar="W", help="AdamW's (default 0.01)")
    add("--warmup-steps", type=non_negative_int, default=100, metavar="N", help="linear warm-up before the cosine (default 100)")
    add("--max-grad-norm", type=positive_float, default=1.0, metavar="G", help="clip the gradient's norm to this (default 1.0)")
    add("--seed", type=seed, default=42, metavar="N", help="of initial weights, order, masks and dropout (default 42)")
    add = parser.group("machine")
    add("--precision", choices=PRECISIONS, default="fp32", help="of matrix products (default fp32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto: CUDA where there is one")
    add = parser.group("output")
    add("--out", required=True, metavar="DIR", help="run folder, and the folder for --weights")
    add("--float16", action="store_true", help="write the weights in half precision, half as large")
    add("--overwrite", action="store_true", help="replace a run folder that exists")
    add("--resume", action="store_true", help="go on from the last saved step of --out")
    add("--save-every", type=positive_int, metavar="STEPS", help="save within an epoch too, every so many steps (default: at its end)")
    add("--log-every", type=positive_int, default=20, metavar="STEPS", help="steps between log lines (default 20)")
    args = parser.parse_args(argv)
    row = get_model(args.model)
    if args.mask_fraction == 0:
        parser.error("--mask-fraction 0 hides nothing: there is nothing to predict")
    if args.overwrite and args.resume:
        parser.error("--overwrite starts anew and --resume goes on: give one of them")
    if (args.data is None) == (args.fasta is None):
        parser.error("give either --data or --fasta")
    if args.tokenizer_file and args.data:
        parser.error("--tokenizer-file goes with --fasta: --data has its tokens")
    args.lr = args.lr or row.learning_rate
    args.batch_size = args.batch_size or row.batch_size
    return args


def main(argv=None):
    args = parse_args(argv)
    with world(args.device) as w:
        return pretrain(w, args)


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
        raise InputError(f"{', '.join(args.fasta)}: {len(train)} windows of {WINDOW} letters, but every {HELD_OUT}th validates: "
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


def pretrain(w, args):
    """Run the whole of it on this process; returns the last validation's metrics."""
    set_precision(args.precision, w.device)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give another --out")
    if out.exists() and any(out.iterdir()) and not (args.overwrite or args.resume):
        raise InputError(f"{out} exists: give another --out, --overwrite to replace it, or --resume to go on")
    if args.overwrite and out.exists() and any(out.iterdir()) and not (out / "args.json").is_file():
        raise InputError(f"{out} is not a run folder, so --overwrite does not replace it: give another --out")
    if args.weights and out.exists() and out.resolve() == Path(args.weights).resolve():
        raise InputError("--out is the folder of --weights: give another --out")
    barrier(w)  # everyone has looked before rank 0 writes
    row = get_model(args.model)
    if args.fasta:
        splits, vocabulary, digest = open_fasta(w, args, row)
    else:
        data = open_data(w, args, row)
        splits = {name: data.split(name, row.tokenizer) for name in ("train", "validation")}
        vocabulary, digest = data.manifest["tokenizers"][row.tokenizer]["vocab_size"], data.digest

    # load or draw -> add the head -> optimizer -> DDP
    torch.manual_seed(args.seed)
    with main_first(w):
        backbone = load_backbone(args.model, args.weights, pretrained=args.weights is not None)
    if vocabulary > backbone.config.vocab_size:
        raise InputError(f"the tokenizer {row.tokenizer} has {vocabulary} ids, but the backbone only {backbone.config.vocab_size}")
    if args.tied is None:
        published = MASKING[row.family].tied
        args.tied = read_config(args.weights).get("tie_word_embeddings", published) if args.weights else published
    model = MaskedLM(row.family, backbone, args.tied)
    head = "from its folder" if args.weights and load_head(model, args.weights) else "random"
    model.to(w.device)
    parameters = list(model.parameters())
    optimizer = adamw(model, args.lr, args.weight_decay)
    ddp = DistributedDataParallel(model, device_ids=[w.device.index] if w.device.type == "cuda" else None) if w.size > 1 else model

    per_step = args.batch_size * args.accumulate * w.size
    steps_per_epoch = math.ceil(len(splits["train"]) / per_step)
    total_steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    if args.warmup_steps >= total_steps > 0:
        raise InputError(f"--warmup-steps {args.warmup_steps} leaves nothing of the {total_steps} steps of this run")
    step = 0
    if args.resume:
        last = checkpoint.read(out / "last.pt", checkpoint.RESUME_STATE)
        differ = [f"--{name.replace('_', '-')}" for name, value in last["args"].items()
                  if name not in RESUME_IGNORES and value != getattr(args, name)]
        differ += [name for name, value in (("processes", w.size), ("dataset", digest)) if last[name] != value]
        if differ:
            raise InputError(f"{out / 'last.pt'} is of a run with other {', '.join(differ)}: give the same to resume it")
        model.load_state_dict(last["state"])
        load_adamw(optimizer, last["optimizer"], model)
        step = last["step"]

    unigram = unigram_losses(splits["train"], model.masking, model.config.vocab_size)
    if w.is_main:
        out.mkdir(parents=True, exist_ok=True)
        if args.resume:
            resume.cut_logs(out, {"logs": {}, **last})
        else:
            for name in RUN_FILES:
                (out / name).unlink(missing_ok=True)
        write_json(out / "args.json", vars(args))
        write_json(out / "environment.json", environment(w) | {"dataset": digest})
        print(f"{args.model} {'from ' + args.weights if args.weights else 'from random weights'}, language-model head {head}: "
              f"{sum(p.numel() for p in parameters):,} parameters; {len(splits['train']):,} sequences, {total_steps:,} steps of "
              f"{per_step}; folder {out}", flush=True)
    barrier(w)

    def log(entry):
        """Print the entry and append it to log.jsonl: the line printed is the line logged."""
        if w.is_main:
            line = json.dumps(entry)
            with open(out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
            print_line(line)

    def save():
        """The folder for --weights, and the state for --resume."""
        if w.is_main:
            save_hub_folder(model, out, DTYPES[args.float16])
            checkpoint.save(out / "last.pt", {"args": vars(args), "processes": w.size, "dataset": digest, "state": model.state_dict(),
                                              "optimizer": optimizer.state_dict(), "step": step, "logs": resume.log_sizes(out)},
                            checkpoint.RESUME_STATE)

    def measure():
        metrics = validate(w, model, splits["validation"], args, unigram)
        log({"epoch": math.ceil(step / steps_per_epoch), "step": step, "validation_loss": metrics["loss"],
             "perplexity": round(metrics["perplexity"], 2), "unigram_perplexity": round(metrics["unigram_perplexity"], 2)})
        if not math.isfinite(metrics["loss"]):
            raise InputError(f"the validation loss is {metrics['loss']} at step {step}: try a lower --lr than {args.lr}")
        return metrics

    if not args.resume or step == total_steps:
        metrics = measure()
    while step < total_steps:
        model.train()
        epoch, done = divmod(step, steps_per_epoch)
        plan = micro_batches(len(splits["train"]), args.seed, epoch, args.batch_size, args.accumulate, w.rank, w.size)
        plan = plan[done: done + total_steps - step]
        loader = iter(DataLoader(splits["train"], batch_size=None, sampler=[rows for micros, _ in plan for rows, _ in micros],
                                 num_workers=args.workers, pin_memory=w.device.type == "cuda"))
        since, sums, seen = time.perf_counter(), torch.zeros(2, dtype=torch.float64), 0
        for micros, count in progress(plan, f"epoch {epoch + 1}/{args.epochs}", unit="seq", unit_scale=per_step):
            # ---------------------------------------------------------------- a single training step
            rate = cosine_rate(step, total_steps, args.lr, args.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + w.rank)  # dropout: another stream per step and process
            masks = generator_for(args.seed, TRAIN, step, w.rank)
            batches = []
            for _, weight in micros:
                batch = next(loader)
                input_ids, chosen = mask_tokens(batch["input_ids"], model.masking, model.config.vocab_size, args.mask_fraction, masks)
                batches.append((input_ids, batch["attention_mask"], chosen & bool(weight), batch["input_ids"]))
            positions = sum_over_ranks(w, torch.tensor(float(sum(chosen.sum() for _, _, chosen, _ in batches))))
            for i, (input_ids, attention_mask, chosen, original) in enumerate(batches):
                last_micro = i == len(batches) - 1
                with contextlib.nullcontext() if last_micro or w.size == 1 else ddp.no_sync():
                    with autocast(w.device, args.precision):
                        logits = ddp(*(tensor.to(w.device, non_blocking=True) for tensor in (input_ids, attention_mask, chosen)))
                    loss = F.cross_entropy(logits.float(), original[chosen].to(w.device), reduction="sum")
                    (loss * w.size / max(float(positions), 1)).backward()  # DDP averages: the gradient is that of the mean over positions
                sums += torch.tensor([float(loss.detach()), int(chosen.sum())], dtype=torch.float64)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # -----------------------------------------------------------------------------------------
            step, seen = step + 1, seen + count
            if step % args.log_every == 0 or step == total_steps:
                loss, positions = sum_over_ranks(w, sums).tolist()
                now = time.perf_counter()
                log({"epoch": epoch + 1, "step": step, "steps": total_steps, "loss": round(loss / max(positions, 1), 5), "lr": rate,
                     "grad_norm": round(float(norm), 4), "sequences_per_s": round(seen / (now - since), 2)})
                since, sums, seen = now, torch.zeros_like(sums), 0
            if args.save_every and step % args.save_every == 0:
                save()
        metrics = measure()
        save()
    if not args.epochs:
        save()
    if w.is_main:
        write_json(out / "metrics.json", {"split": "validation", **metrics})
        print(f"perplexity {metrics['perplexity']:.1f} at {metrics['positions']:,} masked positions of the validation split "
              f"(unigram {metrics['unigram_perplexity']:.1f}); {out / 'model.safetensors'}", flush=True)
    return metrics


if __name__ == "__main__":
    run(main)
