"""Seconds of a training step and bytes kept for its backward: every strategy in every mode of
activation checkpointing, beside the peer.

  python benchmarks/step.py                            # make bench: the published step on the CPU
  python benchmarks/step.py --memory --batch-size 2    # the bytes alone: a minute
  python benchmarks/step.py --layers 2 --rounds 3      # a quick look, written nowhere

The default sizes are nt50m, batch 8, 251 tokens, float32, on the CPU, 7 rounds.

The peer is benchmarks/peer.py. A step is what train.py does: forward, loss, backward, clip, AdamW.
All variants live in one process and take turns: every round runs each of them once, in an order
that rotates, so that a busy machine slows all alike; a first round is not counted. Ratios are
those of medians. Each classifier and its peer begin with the same weights, the settings are
train.py's defaults (LoRA's dropout of 0.1 included), and the tokens are random: their values do
not change the work.

"/ limit" is the step's median by the time that its matrix products and attention need at the rate
of lone products, which take their turn in the same rounds. The lone products are those of one
layer's Linears at the same number of tokens, forward and backward. The operations are those of our
own step without checkpointing (taxa/measure/flops.py). The peer's extra operations, and what is
computed twice, are not counted, so that every row has one measure. "saved MB/seq" is what torch's
allocator has not got back when the forward is over.
"""

import datetime
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peer import make_peer

from taxa import STUDY_CLASSES
from taxa.backbones import FAMILIES, backbone_config, get_model
from taxa.errors import InputError
from taxa.measure.flops import parts
from taxa.measure.memory import bytes_kept
from taxa.measure.step import batch_loss, random_batch, training_step
from taxa.model import TaxonClassifier
from taxa.random_init import reinitialize
from taxa.runtime.cli import Parser, positive_int, run
from taxa.runtime.files import write_json
from taxa.strategies import inject_adapters, train_only, trainable_names
from taxa.training.activation_checkpointing import MODES, checkpoint_layers
from taxa.training.optim import adamw
from taxa.training.settings import settings_from_flags

# (strategy, r)
STRATEGIES = (
    ("full", None), ("lora", 1), ("lora", 4), ("lora", 20), ("ia3", None), ("freeze75", None),
)
# (impl, strategy, r, mode): the peer, and ours without checkpointing; then ours checkpointed,
# where r = 4 stands for LoRA.
VARIANTS = (
    *((impl, *each, "none") for each in STRATEGIES for impl in ("peer", "ours")),
    *(("ours", *each, mode) for mode in MODES[1:] for each in STRATEGIES if each[1] in (None, 4)),
)
CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results" / "step.json"  # committed: of the default sizes alone


class Variant:
    """One implementation with one strategy in one mode: model, optimizer, and a step."""

    def __init__(self, impl, strategy, r, mode, *, model_name, classifier, tokens):
        self.impl = impl
        self.strategy = strategy
        self.r = r
        self.mode = mode
        self.seconds = []  # of the steps that count
        settings = settings_from_flags(model_name, strategy, r=r)
        lr = get_model(model_name).learning_rate
        if impl == "peer":
            self.model = make_peer(classifier, settings)
        inject_adapters(classifier, settings)  # of the peer too: its operations are counted as ours
        names = trainable_names(classifier, settings)
        # of one sequence
        self.operations = sum(part.step for part in parts(classifier, "nt", names, tokens))
        if impl == "ours":
            train_only(classifier, names)
            checkpoint_layers(classifier.backbone, mode)
            self.model = classifier.train()
            self.optimizer = adamw(self.model, lr)
        else:
            # What the HF Trainer calls adamw_torch, its default when the study ran.
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    def step(self, batch):
        training_step(self.model, self.optimizer, batch)


class LoneProducts:
    """The matrix products of the Linears of one layer, forward and backward, and nothing else.

    step() takes its turn like a Variant's.
    """

    def __init__(self, classifier, tokens):
        self.seconds = []
        self.products = []
        layer = classifier.backbone.encoder.layer[0]
        for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            x = torch.randn(tokens, linear.in_features)
            y = torch.randn(tokens, linear.out_features)
            w = torch.randn(linear.out_features, linear.in_features)
            self.products += [
                (x, w.T),  # the result
                (y, w),  # the gradient of the input
                (y.T, x),  # the gradient of the weight
            ]
        self.operations = sum(
            2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in self.products)

    def step(self, batch):
        for a, b in self.products:
            torch.mm(a, b)

    def rate(self):
        """Operations per second, by the median."""
        return self.operations / statistics.median(self.seconds)


def build(model_name, layers, variant, tokens):
    """One of VARIANTS with its own copy of the same random weights."""
    config = backbone_config(model_name)
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device("meta"):
        classifier = TaxonClassifier(FAMILIES["nt"].model(config), STUDY_CLASSES)
    classifier = reinitialize(classifier.to_empty(device=CPU))
    return Variant(*variant, model_name=model_name, classifier=classifier, tokens=tokens)


def saved_mb(variant, batch):
    """MB per sequence that the forward keeps for the backward."""
    kept = bytes_kept(CPU, lambda: batch_loss(variant.model, batch))
    return round(kept / len(batch[0]) / 1e6, 2)


def rows_of(variants, saved, batch_size, rate):
    """One dict per variant, ratios of medians included. rate: of LoneProducts."""
    medians = [statistics.median(v.seconds) for v in variants]
    full = {
        v.impl: median for v, median in zip(variants, medians)
        if v.strategy == "full" and v.mode == "none"
    }
    rows = []
    for v, median, kept in zip(variants, medians, saved):
        limit = batch_size * v.operations / rate
        rows.append({
            "impl": v.impl,
            "strategy": v.strategy,
            "r": v.r,
            "activation_checkpointing": v.mode,
            "median_s": round(median, 4),
            "vs_peer_full": round(median / full["peer"], 4),
            "vs_own_full": round(median / full[v.impl], 4),
            "over_product_limit": round(median / limit, 4),
            "saved_mb_per_sequence": kept,
            "fastest_s": round(min(v.seconds), 4),
            "slowest_s": round(max(v.seconds), 4),
        })
    return rows


def memory_table(args, batch):
    """Build one variant after the other, print the MB that its forward keeps, and return them as
    rows. No step is timed.
    """
    rows = []
    print(f"{'impl':<6}{'strategy':<10}{'r':>3}  {'checkpointing':<14}{'saved MB/seq':>12}")
    for impl, strategy, r, mode in VARIANTS:
        variant = build(args.model, args.layers, (impl, strategy, r, mode), args.tokens)
        saved = saved_mb(variant, batch)
        rows.append({
            "impl": impl,
            "strategy": strategy,
            "r": r,
            "activation_checkpointing": mode,
            "saved_mb_per_sequence": saved,
        })
        print(f"{impl:<6}{strategy:<10}{r or '':>3}  {mode:<14}{saved:>12.1f}", flush=True)
    return rows


def print_table(rows):
    print(f"{'impl':<6}{'strategy':<10}{'r':>3}  {'checkpointing':<14}"
          f"{'median s':>9}{'range s':>16}{'/ peer full':>13}{'/ own full':>12}"
          f"{'/ limit':>9}{'saved MB/seq':>14}")
    for row in rows:
        mode = row["activation_checkpointing"]
        spread = f"{row['fastest_s']:.2f} - {row['slowest_s']:.2f}"
        print(f"{row['impl']:<6}{row['strategy']:<10}{row['r'] or '':>3}  {mode:<14}"
              f"{row['median_s']:>9.3f}{spread:>16}"
              f"{row['vs_peer_full']:>13.3f}{row['vs_own_full']:>12.3f}"
              f"{row['over_product_limit']:>9.2f}{row['saved_mb_per_sequence']:>14.1f}")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default="nt50m", metavar="NAME",
        help="a Nucleotide Transformer of the table (default nt50m)")
    add("--layers", type=positive_int, metavar="N",
        help="cut the network to this many layers (default: all)")
    add("--batch-size", type=positive_int, default=8, metavar="B",
        help="sequences per step (default 8)")
    add("--tokens", type=positive_int, default=251, metavar="T",
        help="tokens per sequence (default 251: 1500 bp)")
    add("--rounds", type=positive_int, default=7,
        help="steps of each variant that count (default 7)")
    add("--memory", action="store_true",
        help="the bytes that the forward keeps, and no time; written nowhere")
    add("--threads", type=positive_int, help="of torch (default: its own choice)")
    add("--out", metavar="FILE",
        help="JSON to write, - for none (default: results/step.json beside this script; - where a "
             "flag above but --threads is not at its default)")
    args = parser.parse_args(argv)
    sizes = ("model", "layers", "batch_size", "tokens", "rounds")
    as_committed = all(getattr(args, flag) == parser.get_default(flag) for flag in sizes)
    args.out = args.out or (str(RESULTS) if as_committed else "-")
    if get_model(args.model).family != "nt":
        raise InputError(f"--model {args.model}: the peer is a Nucleotide Transformer; choose "
                         "nt50m nt100m nt250m tiny-nt")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    torch.manual_seed(1)
    vocabulary = backbone_config(args.model).vocab_size
    batch = random_batch(
        vocabulary, STUDY_CLASSES.values(), args.batch_size, args.tokens, CPU)
    if args.memory:
        return memory_table(args, batch)
    variants = [build(args.model, args.layers, variant, args.tokens) for variant in VARIANTS]
    saved = [saved_mb(variant, batch) for variant in variants]
    ours = next(v.model for v in variants if v.impl == "ours")
    lone = LoneProducts(ours, args.batch_size * args.tokens)
    turns = [lone, *variants]
    for n in range(args.rounds + 1):
        first = n % len(turns)
        for each in turns[first:] + turns[:first]:
            start = time.perf_counter()
            each.step(batch)
            if n > 0:  # the first makes the optimizer's state
                each.seconds.append(time.perf_counter() - start)

    rows = rows_of(variants, saved, args.batch_size, lone.rate())
    print(f"lone products of one layer: {lone.rate() / 1e9:.1f} GFLOP/s")
    print_table(rows)
    if args.out != "-":
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out), {
            "rows": rows,
            "lone_product_gflops": round(lone.rate() / 1e9, 1),
            "model": args.model,
            "layers": args.layers,
            "batch_size": args.batch_size,
            "tokens": args.tokens,
            "precision": "fp32",
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
            "date": datetime.date.today().isoformat(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
        })
        print(f"wrote {args.out}")
    return rows


if __name__ == "__main__":
    run(main)
