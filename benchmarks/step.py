"""Seconds of a training step and bytes saved for its backward: our implementation beside the peer (benchmarks/peer.py).

  python benchmarks/step.py                                 # make bench: nt50m, batch 8, 251 tokens, float32, the CPU, 7 rounds
  python benchmarks/step.py --layers 2 --rounds 3           # a quick look, written nowhere

A step is what train.py does: forward, loss, backward, clip, AdamW. All variants live in one process and take turns: every round runs
each of them once, in an order that rotates, so that a busy machine slows all alike; a first round is not counted. Ratios are those of
medians. Each classifier and its peer begin with the same weights, the settings are train.py's defaults (LoRA's dropout of 0.1
included), and the tokens are random: their values do not change the work.
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

from peer import make_peer  # noqa: E402

from taxa.backbones import FAMILIES, backbone_config, get_model  # noqa: E402
from taxa.errors import InputError
from taxa.model import TaxonClassifier, sequence_losses  # noqa: E402
from taxa.random_init import reinitialize  # noqa: E402
from taxa.runtime.cli import Parser, positive_int, run  # noqa: E402
from taxa.runtime.files import write_json  # noqa: E402
from taxa.strategies import inject_adapters, settings_from_flags, train_only, trainable_names  # noqa: E402
from taxa.training.optim import adamw  # noqa: E402

VARIANTS = (("full", None), ("lora", 1), ("lora", 4), ("lora", 20), ("ia3", None), ("freeze75", None))
NUM_CLASSES = (4, 57, 1884)  # the study's
RESULTS = Path(__file__).parent / "results" / "step.json"  # committed: of the default sizes alone


class Variant:
    """One implementation with one strategy: model, optimizer, and a step."""

    def __init__(self, impl, model_name, classifier, strategy, r):
        self.impl, self.strategy, self.r, self.seconds = impl, strategy, r, []
        settings = settings_from_flags(model_name, strategy, r=r)
        if impl == "ours":
            inject_adapters(classifier, settings)
            train_only(classifier, trainable_names(classifier, settings))
            self.model = classifier.train()
        else:
            self.model = make_peer(classifier, settings)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        rate = get_model(model_name).learning_rate
        # the peer's is what the HF Trainer calls adamw_torch, its default when the study ran
        self.optimizer = adamw(self.model, rate) if impl == "ours" else torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)

    def loss(self, input_ids, attention_mask, labels):
        return sequence_losses(self.model(input_ids, attention_mask), labels).sum() / len(labels)

    def step(self, *batch):
        self.loss(*batch).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def saved_bytes(self, *batch):
        """Bytes that the forward saves for the backward, as saved-tensor hooks see them: each storage once, parameters and batch not."""
        seen = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers(), *batch)}
        total, alive = 0, []

        def pack(tensor):
            nonlocal total
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                alive.append(storage)  # so that no address is used again
                total += storage.nbytes()
            return tensor.detach()  # a node that saves its own result would else hold itself, and the graph never be freed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.loss(*batch)
        return total


def build(model_name, layers):
    """All variants of a model, each with its own copy of the same random weights."""
    config = backbone_config(model_name)
    config.num_hidden_layers = layers or config.num_hidden_layers
    variants = []
    for strategy, r in VARIANTS:
        for impl in ("peer", "ours"):
            torch.manual_seed(0)
            with torch.device("meta"):
                classifier = TaxonClassifier(FAMILIES["nt"].model(config), NUM_CLASSES)
            classifier = reinitialize(classifier.to_empty(device="cpu"))
            variants.append(Variant(impl, model_name, classifier, strategy, r))
    return variants


def rows_of(variants, saved, batch_size):
    """One dict per variant, ratios of medians included."""
    medians = [statistics.median(v.seconds) for v in variants]
    full = {v.impl: median for v, median in zip(variants, medians) if v.strategy == "full"}
    return [{"impl": v.impl, "strategy": v.strategy, "r": v.r, "median_s": round(median, 4),
             "vs_peer_full": round(median / full["peer"], 4), "vs_own_full": round(median / full[v.impl], 4),
             "saved_mb_per_sequence": round(n / batch_size / 1e6, 2),
             "fastest_s": round(min(v.seconds), 4), "slowest_s": round(max(v.seconds), 4)}
            for v, median, n in zip(variants, medians, saved)]


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default="nt50m", metavar="NAME", help="a Nucleotide Transformer of the table (default nt50m)")
    add("--layers", type=positive_int, metavar="N", help="cut the network to this many layers (default: all)")
    add("--batch-size", type=positive_int, default=8, metavar="B", help="sequences per step (default 8)")
    add("--tokens", type=positive_int, default=251, metavar="T", help="tokens per sequence (default 251: 1500 bp)")
    add("--rounds", type=positive_int, default=7, help="steps of each variant that count (default 7)")
    add("--threads", type=positive_int, help="of torch (default: its own choice)")
    add("--out", metavar="FILE", help="JSON to write, - for none (default: results/step.json beside this script; - where a flag above but "
        "--threads is not at its default)")
    args = parser.parse_args(argv)
    as_committed = all(getattr(args, flag) == parser.get_default(flag) for flag in ("model", "layers", "batch_size", "tokens", "rounds"))
    args.out = args.out or (str(RESULTS) if as_committed else "-")
    if get_model(args.model).family != "nt":
        raise InputError(f"--model {args.model}: the peer is a Nucleotide Transformer; choose nt50m nt100m nt250m tiny-nt")
    if args.threads:
        torch.set_num_threads(args.threads)

    variants = build(args.model, args.layers)
    random = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, backbone_config(args.model).vocab_size, (args.batch_size, args.tokens), generator=random)
    labels = torch.stack([torch.randint(C, (args.batch_size,), generator=random) for C in NUM_CLASSES], dim=1)
    batch = (input_ids, torch.ones_like(input_ids), labels)
    saved = [variant.saved_bytes(*batch) for variant in variants]
    for n in range(args.rounds + 1):
        for variant in variants[n % len(variants):] + variants[:n % len(variants)]:
            start = time.perf_counter()
            variant.step(*batch)
            if n > 0:  # the first makes the optimizer's state
                variant.seconds.append(time.perf_counter() - start)

    rows = rows_of(variants, saved, args.batch_size)
    print(f"{'impl':<6}{'strategy':<10}{'r':>3}{'median s':>10}{'range s':>16}{'/ peer full':>13}{'/ own full':>12}{'saved MB/seq':>14}")
    for row in rows:
        spread = f"{row['fastest_s']:.2f} - {row['slowest_s']:.2f}"
        print(f"{row['impl']:<6}{row['strategy']:<10}{row['r'] or '':>3}{row['median_s']:>10.3f}{spread:>16}"
              f"{row['vs_peer_full']:>13.3f}{row['vs_own_full']:>12.3f}{row['saved_mb_per_sequence']:>14.1f}")
    if args.out != "-":
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out), {
            "rows": rows, "model": args.model, "layers": args.layers, "batch_size": args.batch_size, "tokens": args.tokens,
            "precision": "fp32", "rounds": args.rounds, "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used", "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                         "peft": peft.__version__}})
        print(f"wrote {args.out}")
    return rows


if __name__ == "__main__":
    run(main)
