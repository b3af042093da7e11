"""One training run: a backbone, a strategy, a prepared dataset -> a run folder with ckpt.pt and metrics.json.

  python train.py --model tiny-nt --strategy random --data demo --epochs 2
  torchrun --nproc_per_node 4 -- train.py --model dnabert2 --strategy lora --r 4 --data data/bertax
  python train.py --model nt50m --strategy freeze75 --dry-run      # what would train; builds and downloads nothing

The "--" keeps torchrun from reading --r as a short form of its own --rdzv-id or --role (pytorch issue 120601); --lora-r needs none.
"""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import prepare
from taxa import __version__
from taxa.backbones import FAMILIES, MODELS, backbone_config, find_model
from taxa.data.augment import AugmentedSplit
from taxa.data.dataset import PreparedDataset, micro_batches
from taxa.data.splits import SPLITS
from taxa.data.tokens import get_tokenizer
from taxa.errors import InputError, Saved
from taxa.model import TaxonClassifier, sequence_losses
from taxa.random_init import reinitialize
from taxa.results.evaluation import run_split, summarize, table, write_tables
from taxa.runtime.cli import (Parser, interval, interval_of, non_negative_float, non_negative_int, positive_float, positive_int, run, seed,
                              share)
from taxa.runtime.distributed import any_process, barrier, copy_from_main, from_main, leave, main_first, same_on_all, sum_over_ranks, world
from taxa.runtime.files import write_json
from taxa.runtime.precision import PRECISIONS, autocast, compile_in_place, set_precision
from taxa.runtime.progress import print_line, progress
from taxa.runtime.signals import Signals
from taxa.strategies import (STRATEGY_FLAGS, inject, published_fraction, settings_from_flags, train_only,
                             trainable_names)
from taxa.training import checkpoint, peft_format, resume
from taxa.training.flags import add_classes, add_model, add_strategy, check_strategy, classes_of
from taxa.training.optim import adamw, cosine_rate

DEMO = "data/demo"
RUN_FILES = ("args.json", "environment.json", "log.jsonl", "bad_steps.jsonl", "ckpt.pt", "last.pt", "last.prev.pt", "metrics*.json",
             "per_class*.csv", "confusion_*.csv", "temperature.json")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_model(parser)
    add = add_strategy(parser)
    add("--adapters", metavar="DIR", help="lora, ia3: start from a PEFT folder (export.py --adapters, or the library's)")
    add = parser.group("data")
    add("--data", metavar="DIR", help=f"prepared dataset, or 'demo': simulated, made in {DEMO} when it is not there")
    add("--augment", action="store_true",
        help="read every training sequence from a random strand and in a random frame, anew in every epoch (default: as it is)")
    add("--data-fraction", type=share, metavar="F",
        help="train on this share of the training split, stratified by its last rank, the same for all runs of a seed (default: all of it)")
    add("--workers", type=non_negative_int, default=0, metavar="N", help="processes that load batches, per rank (default 0: in the loop)")
    add = parser.group("optimisation")
    add("--epochs", type=positive_int, default=5, metavar="N", help="at most this many (default 5)")
    add("--max-steps", type=positive_int, metavar="N", help="stop after this many optimizer steps (default: when the epochs are over)")
    add("--batch-size", type=positive_int, metavar="B", help="sequences per process and micro-batch (default: the published one)")
    add("--accumulate", type=positive_int, default=1, metavar="N", help="micro-batches per optimizer step (default 1)")
    add("--lr", type=positive_float, metavar="LR", help="initial learning rate (default: the published one of the model)")
    add("--weight-decay", type=non_negative_float, default=0.0, metavar="W", help="AdamW's (default 0)")
    add("--warmup-steps", type=non_negative_int, default=0, metavar="N", help="linear warm-up before the cosine (default 0)")
    add("--max-grad-norm", type=positive_float, default=1.0, metavar="G", help="clip the gradient's norm to this (default 1.0)")
    add("--patience", type=positive_int, default=3, metavar="EPOCHS",
        help="stop after this many without a better validation loss (default 3)")
    add("--max-bad-steps", type=positive_int, default=3, metavar="N",
        help="stop at the N-th step whose loss or gradient is not finite; such a step is not applied (default 3)")
    add("--seed", type=seed, default=42, metavar="N", help="of heads, adapters, order and dropout (default 42)")
    add = parser.group("machine")
    add("--precision", choices=PRECISIONS, default="fp32", help="of matrix products (default fp32, as published)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto: CUDA where there is one")
    add("--recompute", action="store_true", help="keep only each layer's input for the backward, and run the layer again there")
    add("--compile", action="store_true", help="torch.compile the model; takes minutes at the start")
    add = parser.group("output")
    add("--out", metavar="DIR", help="run folder (default runs/MODEL-STRATEGY...)")
    add("--overwrite", action="store_true", help="replace a run folder that exists")
    add("--resume", action="store_true", help="go on from last.pt of --out (torchrun's restarts and SLURM's requeues do so unasked)")
    add("--save-every", type=interval, default="10m", metavar="N", help="write last.pt every N steps, or, as 10m, minutes (default 10m)")
    add("--log-every", type=positive_int, default=20, metavar="STEPS",
        help="steps between log lines; tail -f RUN/log.jsonl follows them (default 20)")
    add("--dry-run", action="store_true", help="print as one JSON line what would train, and stop")
    add_classes(parser, "--dry-run: ")
    args = parser.parse_args(argv)

    check_strategy(args)
    if args.num_classes and (args.data or not args.dry_run):
        parser.error("--num-classes stands in for data: it goes with --dry-run, without --data")
    classes_of(args)
    if not args.data and not args.dry_run:
        parser.error("--data is missing: a folder made by prepare.py, or demo")
    if args.overwrite and args.resume:
        parser.error("--overwrite starts anew and --resume goes on: give one of them")
    if args.max_steps and args.warmup_steps >= args.max_steps:
        parser.error(f"--warmup-steps {args.warmup_steps} leaves nothing of --max-steps {args.max_steps}")
    row = find_model(args.model, args.weights, args.revision)
    if args.model not in MODELS:
        args.revision = row.revision  # the commit that "main" is now
    args.lr = args.lr or row.learning_rate
    args.batch_size = args.batch_size or row.batch_size
    return args


def run_name(args, settings):
    """Default run folder: what sets this run apart from the table's defaults."""
    parts = [args.model.rpartition("/")[2], args.strategy]
    parts += [f"r{settings['r']}"] if args.strategy == "lora" else []
    parts += ["published"] if args.protocol == "published" else []
    parts += ["frozen-heads"] if args.heads == "frozen" else []
    parts += [f"data{args.data_fraction:g}"] if args.data_fraction else []
    parts += ["augment"] if args.augment else []
    parts += [f"seed{args.seed}"] if args.seed != 42 else []
    return Path("runs") / "-".join(parts)


def dry_run(args, row, settings):
    """Print one JSON line: what would train. Builds on the meta device; reads no weights and downloads nothing."""
    num_classes = PreparedDataset(DEMO if args.data == "demo" else args.data).num_classes if args.data else classes_of(args)
    with torch.device("meta"):
        model = FAMILIES[row.family].model(backbone_config(row, args.weights))
        classifier = TaxonClassifier(model, num_classes)
        inject(classifier, settings)
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


def environment(w):
    """Versions, device and command line of this run."""
    try:
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:  # no git on this machine
        commit = None
    device = torch.cuda.get_device_name(w.device) if w.device.type == "cuda" else platform.processor() or platform.machine()
    return {"taxa": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__, "platform": platform.platform(), "device": device,
            "processes": w.size, "threads": torch.get_num_threads(), "git_commit": commit,
            "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def row_tokenizer(row):
    """The tokenizer of a model: one of the package's, or the tokenizer.json that came with its weights."""
    return get_tokenizer("bpe" if row.tokenizer_file else row.tokenizer, row.tokenizer_file)


def open_data(w, args, row):
    """The prepared dataset, with the tokens of the model's tokenizer; the demo and missing tokens are made, by rank 0."""
    tokenizer = row.tokenizer
    if tokenizer is None:
        raise InputError(f"{args.model}: no tokenizer.json {'in ' + args.weights if args.weights else 'on the hub'}: it says which letters "
                         "make a token")
    with main_first(w):
        if args.data == "demo":
            args.data = DEMO
            if w.is_main and not Path(DEMO).exists():
                prepare.main(["--demo", "--out", DEMO])
        data = PreparedDataset(args.data)
        if w.is_main and not data.has_tokens(tokenizer):
            print(f"{args.data}: adding tokens of {tokenizer}", flush=True)
            data.add_tokens(row_tokenizer(row), progress)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine, each may have its own copy
            data.verify(tokenizer, SPLITS, progress)
    for name in SPLITS:
        if data.manifest["splits"][name] == 0:
            raise InputError(f"{args.data}: the {name} split is empty; prepare more sequences")
    return data


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
    with world(args.device) as w, Signals() as signals:
        return train(w, args, row, settings, signals, start)


def train(w, args, row, settings, signals, start=None):
    """Run the whole of it on this process; returns the test metrics. start: {name: tensor} of --adapters."""
    set_precision(args.precision, w.device)
    out = Path(args.out or run_name(args, settings))
    if w.is_main:  # only rank 0 looks into the run folder and writes there
        resume.begin(out, args.resume, args.overwrite, w.again)
    data = open_data(w, args, row)
    if args.data_fraction:
        data.keep_part(args.data_fraction, args.seed)
    tokenizer = row.tokenizer
    splits = {name: data.split(name, tokenizer) for name in SPLITS}
    retokenize = row_tokenizer(row) if args.augment else None

    # load -> re-initialise if asked -> inject -> freeze -> optimizer -> DDP
    base = checkpoint.base_source(row, args.strategy, args.weights, args.revision)
    with main_first(w):
        backbone = checkpoint.load_base(row, base)
    vocabulary = data.manifest["tokenizers"][tokenizer]["vocab_size"]
    if vocabulary > backbone.config.vocab_size:
        raise InputError(f"the tokenizer {tokenizer} has {vocabulary} ids, but the backbone only {backbone.config.vocab_size}")
    if base["source"] != "none":
        base["digest"] = checkpoint.weights_digest(backbone)
    flags = {name: value for name, value in vars(args).items() if name not in ("data", "weights", "out")}  # paths may differ
    same_on_all(w, {**flags, "dataset": data.digest, "tokenizer": data.manifest["tokenizers"][tokenizer],
                    "base weights": base.get("digest"), "taxa": __version__, "torch": torch.__version__})
    torch.manual_seed(args.seed)
    model = TaxonClassifier(backbone, data.num_classes)
    if args.strategy == "random":
        reinitialize(model, backbone.config.initializer_range)
    inject(model, settings)
    started = peft_format.start_from(model, args.adapters, start, base, data.classes) if start else None
    names = trainable_names(model, settings)
    train_only(model, names)
    backbone.recompute = args.recompute
    model.to(w.device)
    if args.compile:
        compile_in_place(model, w.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, args.lr, args.weight_decay)
    ddp = DistributedDataParallel(model, device_ids=[w.device.index] if w.device.type == "cuda" else None) if w.size > 1 else model

    per_step = args.batch_size * args.accumulate * w.size
    steps_per_epoch = math.ceil(len(splits["train"]) / per_step)
    total_steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    if args.warmup_steps >= total_steps:
        raise InputError(f"--warmup-steps {args.warmup_steps} leaves nothing of the {total_steps} steps of this run")
    facts = {"args": vars(args), "sequences per step": per_step, "dataset": data.digest, "base weights": base.get("digest")}
    last = None
    if w.is_main:
        held = resume.lock(out)
        if resume.begin(out, args.resume, args.overwrite, w.again):  # asked again: another run may have come in between
            last = resume.read_last(out)
            resume.check_same(out / "last.pt", last, facts)
            if last["best"] < math.inf:
                checkpoint.check_seal(out / "ckpt.pt")
    last = from_main(w, last)
    step, first_epoch, best, bad_epochs, bad_steps = 0, 0, math.inf, 0, 0
    loss_sum, seen, seconds = 0.0, 0, 0.0  # since the last log line: loss and number of sequences, time
    if last:
        checkpoint.load_state(model, last["state"], names)
        optimizer.load_state_dict(last["optimizer"])
        step, first_epoch, best, bad_epochs, bad_steps = (last[name] for name in ("step", "epoch", "best", "bad_epochs", "bad_steps"))
        loss_sum, seen, seconds = last["loss_sum"], last["seen"], last["seconds"]

    lineages = np.unique(splits["train"].labels, axis=0).tolist()  # class numbers, one per rank, that occur together
    trainable, total = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    if w.is_main:
        if last:
            resume.cut_logs(out, last)
        else:
            for old in (path for pattern in RUN_FILES for path in out.glob(pattern)):
                old.unlink()
        write_json(out / "args.json", vars(args) | {"settings": settings, "base": base})
        write_json(out / "environment.json", environment(w) | {
            "parameters": total, "trainable": trainable, "training_sequences": len(splits["train"]), "dataset": data.digest})
        if base["source"] == "package":
            print(f"{args.model} starts from the weights that come with this package, pretrained on simulated genomes "
                  "(taxa/assets/tiny_nt/README.md); --weights DIR loads others")
        if base["source"] == "seed":
            print(f"{args.model} has no published weights: the backbone starts from random weights of seed {base['seed']}; "
                  "--weights DIR loads others")
        if started:
            print(started)
        print(f"{args.model} {args.strategy}: {trainable:,} of {total:,} parameters train ({trainable / total:.2%}), heads "
              f"{settings['heads']}; {len(splits['train']):,} sequences, {total_steps:,} steps of {per_step}; run folder {out}", flush=True)
        if last:
            print(f"resumed after step {step:,}, epoch {first_epoch + 1}"
                  + f"; the cosine is now that of {args.epochs} epochs" * (args.epochs != last["args"]["epochs"]), flush=True)
    barrier(w)

    def log(entry):
        """Print the entry and append it to log.jsonl: the line printed is the line logged."""
        if w.is_main:
            line = json.dumps(entry)
            with open(out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
            print_line(line)

    def save_last(epochs):
        """last.pt, after `epochs` finished epochs and `step` steps: with it --resume goes on from here, bit for bit."""
        if w.is_main:
            resume.save_last(out, {
                **facts, "state": checkpoint.changed_state(model, names), "optimizer": optimizer.state_dict(), "step": step,
                "epoch": epochs, "best": best, "bad_epochs": bad_epochs, "bad_steps": bad_steps, "loss_sum": loss_sum, "seen": seen,
                "seconds": seconds})
        barrier(w)

    save_steps, save_seconds = interval_of(args.save_every)
    saved_at = time.perf_counter()
    signals.defer()  # from here on a signal waits for the end of the step, and the run is saved before it leaves
    for epoch in range(first_epoch, args.epochs):
        done = epoch * steps_per_epoch
        if bad_epochs == args.patience or done >= total_steps:
            break
        model.train()
        plan = micro_batches(len(splits["train"]), args.seed, epoch, args.batch_size, args.accumulate, w.rank, w.size)
        plan = plan[step - done:total_steps - done]
        end = step + len(plan)
        source = AugmentedSplit(data.split("train", "nt"), retokenize, args.seed, epoch) if args.augment else splits["train"]
        loader = iter(DataLoader(source, batch_size=None, sampler=[rows for micros, _ in plan for rows, _ in micros],
                                 num_workers=args.workers, pin_memory=w.device.type == "cuda"))
        since = time.perf_counter() - seconds
        for micros, count in progress(plan, f"epoch {epoch + 1}/{args.epochs}", unit="seq", unit_scale=per_step):
            # ---------------------------------------------------------------- a single training step
            torch.manual_seed(resume.dropout_seed(args.seed, step, w.rank))
            rate = cosine_rate(step, total_steps, args.lr, args.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            step_loss = torch.zeros((), dtype=torch.float64, device=w.device)
            for i, (_, weight) in enumerate(micros):
                batch = {name: tensor.to(w.device, non_blocking=True) for name, tensor in next(loader).items()}
                last_micro = i == len(micros) - 1
                with contextlib.nullcontext() if last_micro or w.size == 1 else ddp.no_sync():
                    with autocast(w.device, args.precision):
                        logits = ddp(batch["input_ids"], batch["attention_mask"])
                    loss = sequence_losses(logits, batch["labels"]).sum() * weight
                    (loss * w.size / count).backward()  # DDP averages over processes: the gradient is that of the mean over `count`
                step_loss += loss.detach().double()
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            stopping, saving = any_process(w, signals.received is not None, save_seconds and time.perf_counter() - saved_at > save_seconds)
            step_loss, norm = float(sum_over_ranks(w, step_loss)), float(norm)  # of all processes, so that all decide alike
            finite = math.isfinite(step_loss) and math.isfinite(norm)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # -----------------------------------------------------------------------------------------
            step += 1
            if finite:
                loss_sum, seen = loss_sum + step_loss, seen + count
            else:
                bad_steps += 1
                if w.is_main:
                    resume.note_bad_step(out, data, splits["train"], args.seed, epoch, step, step - 1 - done, per_step, step_loss, norm)
                if bad_steps == args.max_bad_steps:
                    leave(w, InputError(f"{bad_steps} step(s) had a loss or gradient that is not finite, the last one step {step}; their "
                                        f"records stand in {out / 'bad_steps.jsonl'}: look at those, or try a lower --lr than {args.lr}"))
            seconds = time.perf_counter() - since
            if step % args.log_every == 0 or step == total_steps:
                log({"epoch": epoch + 1, "step": step, "steps": total_steps, "loss": round(loss_sum / seen, 5) if seen else None,
                     "lr": rate, "grad_norm": round(norm, 4) if finite else None, "sequences_per_s": round(seen / seconds, 2)})
                since, loss_sum, seen, seconds = time.perf_counter(), 0.0, 0, 0.0
            # before the validation, too: so that whatever happens in it, no step is taken twice
            if stopping or saving or (save_steps and step % save_steps == 0) or step == end:
                save_last(epoch)
                saved_at = time.perf_counter()
            if stopping:
                leave(w, Saved(f"{signals.name}: saved step {step} of {total_steps} in {out / 'last.pt'}; --resume goes on from there"))

        outcome = run_split(w, model, splits["validation"], args.batch_size, args.precision, args.workers, lineages=lineages)
        metrics = summarize("validation", outcome, data.num_classes, lineages, data.digest)
        log({"epoch": epoch + 1, "step": step, "validation_loss": metrics["loss"],
             "balanced_accuracy": {rank: round(m["balanced_accuracy"], 4) for rank, m in metrics["ranks"].items()}})
        if not math.isfinite(metrics["loss"]):
            leave(w, InputError(f"the validation loss is {metrics['loss']} after epoch {epoch + 1}: try a lower --lr than {args.lr}"))
        best, bad_epochs = (metrics["loss"], 0) if metrics["loss"] < best else (best, bad_epochs + 1)
        loss_sum, seen, seconds = 0.0, 0, 0.0
        if w.is_main and bad_epochs == 0:
            checkpoint.save(out / "ckpt.pt", {
                "model": args.model, "config": backbone.config.to_dict(), "base": base, "settings": settings,
                "state": checkpoint.changed_state(model, names), "classes": data.classes, "lineages": lineages,
                "data": {"folder": str(data.folder.resolve()), "digest": data.digest},
                "tokenizer": {"name": tokenizer, **data.manifest["tokenizers"][tokenizer]},
                "precision": args.precision, "batch_size": args.batch_size, "epoch": epoch + 1, "metrics": metrics})
        save_last(epoch + 1)
        if any_process(w, signals.received is not None)[0]:
            leave(w, Saved(f"{signals.name}: saved epoch {epoch + 1} in {out / 'last.pt'}; --resume goes on from there"))
    signals.release()

    # the best checkpoint, restored and tested; only rank 0 reads it, since other machines may not see its disk
    if w.is_main:
        content = checkpoint.read(out / "ckpt.pt")
        checkpoint.load_state(model, content["state"], names)
    copy_from_main(w, model.state_dict().values())
    outcome = run_split(w, model, splits["test"], args.batch_size, args.precision, args.workers, lineages=lineages)
    metrics = summarize("test", outcome, data.num_classes, lineages, data.digest)
    if w.is_main:
        write_tables(out, metrics, outcome, data.classes)
        print(f"best epoch {content['epoch']}, validation loss {content['metrics']['loss']:.4f}; {out / 'ckpt.pt'}")
        print(table(metrics), flush=True)
        held.close()  # the lock of the run folder
    return metrics


if __name__ == "__main__":
    run(main)
