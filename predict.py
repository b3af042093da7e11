"""A checkpoint and reads of any length -> the taxa of every read.

There is one line per read, in the order of the input.

  python predict.py runs/demo/ckpt.pt data/demo/source/Viruses_db.fa --out lineages.tsv
  zcat reads.fq.gz | python predict.py ckpt.pt - --format kraken --min-probability 0.5 > kraken.txt
  torchrun --standalone --nproc_per_node 4 -- predict.py ckpt.pt 1.fa.gz 2.fa.gz --out lineages.tsv
"""

import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch

from taxa.data.batches import read_ahead
from taxa.errors import InputError
from taxa.evaluation.decode import JointDecoder, log_probabilities
from taxa.prediction.kraken import report
from taxa.prediction.reads import check_files, pairs, records, slices
from taxa.prediction.writers import FORMATS, LineWriter, VectorWriter
from taxa.runtime.cli import Parser, fraction, positive_int, run
from taxa.runtime.distributed import exit_together, sum_over_ranks, world
from taxa.runtime.files import replacing
from taxa.runtime.precision import PRECISIONS, autocast, set_precision
from taxa.runtime.progress import progress
from taxa.training import checkpoint

# Windows are sorted by length within so many batches. So much is also read ahead, twice.
BATCHES_PER_SLICE = 8

MANUAL = """
Input. FASTA (sequences over any number of lines) or FASTQ (four lines a record), told by the first
  character; plain, gzip, bgzip, bzip2 or xz, told by the first bytes. docs/DATA.md says what is
  read as what, here as in prepare.py: U is T, white space and gaps are nothing, anything else
  outside ACGTN becomes N and is counted. A read of up to --window bases (as many as the longest
  sequence trained on) is one sequence for the network. A longer one is cut into windows every
  --window bases, the last moved back to end with the read, and the logits of its windows are
  averaged. The network sees a read as it is written; with --both-strands its reverse complement
  too, and averages the logits of both (twice the time). With --mates the windows of both reads of
  a pair are averaged as those of one. A window without a single A, C, G or T is left out, and a
  read that has no other is unclassified.

Decoding. Each rank's head gives its own probabilities; its best classes are the columns
  RANK_taxid, RANK_name and RANK_probability. The lineage is decoded jointly: of the lineages seen
  in training, the one whose classes have the highest sum of log-probabilities; its probability is
  the softmax over these sums. Both are given that the read comes from one of the classes trained
  on: a network says a genus of anything, foreign DNA too. --temperature FILE takes what
  evaluate.py --temperature fitted.

--min-probability P. A class with less is written as taxid 0, "unclassified"; a lineage is cut back
  to the deepest rank at which the lineages that share it have P together.

--format tsv     a header line, then id, length, three columns per rank (with --top-k K also
                 RANK_taxid_2 ... and so on), lineage_taxids, lineage and lineage_probability:
                 names and taxids joined by ";" from the root down.
--format jsonl   one JSON object per line: id, length, windows, ranks: {RANK: [{taxid, name,
                 probability}, ...]}, lineage: {taxids, names, probability}. Classes below
                 --min-probability are left out.
--format kraken  Kraken's per-read lines: C or U, id, taxid of the deepest rank of the lineage,
                 length, and taxid:windows where Kraken has taxid:k-mers.
With --mates there is one line per pair; its length is that of both mates (in kraken "150|150"),
its id is without /1 or /2. The id is the first word of the header, or all of it with
--whole-header (line breaks of every kind become spaces, and tabs, but not in jsonl). All that is
written is UTF-8.

--report FILE    how many reads each taxon got, in the six columns of Kraken 2's report: percent,
                 reads in the clade, reads at the taxon itself, rank code, taxid, name. A lineage
                 that --min-probability cut back counts at its deepest rank.

Files appear when they are complete, and replace older ones; standard output is written as reads
are done. Memory does not grow with the number of reads. The same reads give the same bytes with
any number of processes. Exit status: 0, or 2 after wrong input (one line says which).
"""


def parse_args(argv=None):
    parser = Parser(__doc__, epilog=MANUAL)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT",
        help="ckpt.pt of a run folder, or a folder of export.py --adapters")
    add("reads", metavar="READS", nargs="+",
        help="FASTA or FASTQ files, plain, gzip, bzip2 or xz, or - for standard input")
    add("--mates", metavar="READS", nargs="+",
        help="the other reads of pairs, in the same order: as many files; one line per pair")
    add = parser.group("output")
    add("--out", metavar="FILE", default="-",
        help="where the predictions go (default -: standard output)")
    add("--format", choices=FORMATS, default="tsv", help="default tsv; see below")
    add("--top-k", type=positive_int, metavar="K", default=1,
        help="classes per rank, likeliest first (default 1; not in kraken)")
    add("--min-probability", type=fraction, metavar="P",
        help="below it a rank is unclassified (0 to 1, default 0; evaluate.py --split "
        "unseen finds a value for a genus that nobody trained on, which --temperature FILE "
        "then names)")
    add("--report", metavar="FILE",
        help="write also how many reads each taxon got, as Kraken 2's --report does")
    add("--whole-header", action="store_true",
        help="the id is the whole header line (default: its first word)")
    add("--embeddings", metavar="FILE.npy",
        help="write also the pooled vectors (reads, hidden size), in input order; a read of "
        "several windows has their mean, an unclassifiable one (see below) NaN")
    add("--dtype", choices=("float32", "float16"), default="float32",
        help="of --embeddings (default float32)")
    add = parser.group("model")
    add("--weights", metavar="DIR",
        help="folder with the base weights (default: where the run took them from)")
    add("--tokenizer-file", metavar="PATH",
        help="tokenizer.json of the model (default for DNABERT: the hub's)")
    add("--temperature", metavar="FILE",
        help="temperature.json of this checkpoint (default: probabilities as the heads give them)")
    add("--both-strands", action="store_true",
        help="average the logits of a read and of its reverse complement (twice the time)")
    add("--window", type=positive_int, metavar="BP",
        help="bases that the network sees at a time (default: the longest trained on)")
    add = parser.group("machine")
    add("--batch-size", type=positive_int, metavar="B",
        help="windows per batch (default: the run's)")
    add("--precision", choices=PRECISIONS, help="of matrix products (default: the run's)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="default auto: CUDA where there is one")
    args = parser.parse_args(argv)

    if args.top_k > 1 and args.format == "kraken":
        parser.error("--top-k: a line of --format kraken has one taxid; use tsv or jsonl")
    outputs = {"--out": args.out, "--embeddings": args.embeddings, "--report": args.report}
    named = [flag for flag, path in outputs.items() if path not in (None, os.devnull)]
    for one, other in itertools.combinations(named, 2):
        if os.path.abspath(outputs[one]) == os.path.abspath(outputs[other]):
            parser.error(f"{one} and {other} name the same file")
    if args.mates and (len(args.mates) != len(args.reads) or "-" in args.reads + args.mates):
        parser.error(
            f"--mates: {len(args.reads)} files of reads and {len(args.mates)} of mates: "
            "give as many, none of them standard input"
        )
    return args


def check_output(path, inputs):
    """Raise InputError for an output in a missing folder, a folder, and one of the inputs."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise InputError(f"{path}: there is no folder {folder}; make it first")
    if Path(path).is_dir():
        raise InputError(f"{path}: a folder; give a file")
    for source in inputs:
        if os.path.exists(source) and os.path.exists(path) and os.path.samefile(path, source):
            raise InputError(f"{path} is also an input: give another file")


def read_temperature(path, checkpoint_path, trained):
    """A temperature.json -> ({rank: temperature}, the --min-probability that it suggests or None).

    trained: the checkpoint's content. Raises InputError when the file is no temperature.json, or
    one of another checkpoint.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        temperature = {rank: float(content["temperature"][rank]) for rank in trained["classes"]}
        fitted_for = content["state_digest"]
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; evaluate.py {checkpoint_path} --temperature writes it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a temperature.json of evaluate.py ({type(error).__name__}: {error})"
        ) from None
    if fitted_for != checkpoint.state_digest(trained["state"]):
        raise InputError(
            f"{path} was fitted for another checkpoint: "
            f"make it with evaluate.py {checkpoint_path} --temperature"
        )
    return temperature, content.get("min_probability")


class Forward:
    """Slices of windows -> decoded reads.

    It holds the sum of the windows of a read that goes on in the next slice.
    """

    def __init__(
        self, w, model, decoder, precision, *, temperature=None, top_k=1, keep_pooled=False
    ):
        """temperature: {rank: divisor of the logits}, or None for 1."""
        self.w = w
        self.model = model
        self.decoder = decoder
        self.precision = precision
        self.temperature = temperature
        self.top_k = top_k
        self.keep_pooled = keep_pooled
        self.widths = {rank: head.out_features for rank, head in model.heads.items()}
        self.carry = None  # (1, C of all ranks + H)

    @torch.no_grad()
    def __call__(self, piece):
        """A Slice -> (reads, found, event).

        reads: those whose windows are all seen. found: {name: tensor of as many rows} on the CPU.
        event: what to wait for before reading them, or None.
        """
        w = self.w
        outputs = self._outputs(piece)
        if w.size > 1:  # every row is non-zero on one process only: the sum is exact
            outputs = sum_over_ranks(w, outputs).to(w.device)

        # The mean over the windows of each read.
        R = len(piece.reads)
        sums = torch.zeros(R, outputs.shape[1], dtype=torch.float64, device=w.device)
        sums.index_add_(0, torch.from_numpy(piece.owner).to(w.device), outputs.double())
        if self.carry is not None:
            sums[:1] += self.carry
        done = R if piece.complete else R - 1
        self.carry = None if piece.complete else sums[-1:]
        counts = torch.tensor([read.views for read in piece.reads[:done]], device=w.device)
        found = self._decode((sums[:done] / counts[:, None]).float())

        # On a GPU, the copies go on while the next slice is computed.
        found = {name: tensor.to("cpu", non_blocking=True) for name, tensor in found.items()}
        event = None
        if w.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return piece.reads[:done], found, event

    def _outputs(self, piece):
        """The logits of all ranks, then the pooled vector (none where they are not kept).

        They are (W, C of all ranks + H), zero for the windows of other processes.
        """
        hidden = 0
        if self.keep_pooled:
            hidden = next(iter(self.model.heads.values())).in_features
        columns = sum(self.widths.values()) + hidden
        outputs = torch.zeros(len(piece.owner), columns, device=self.w.device)
        for start, stop, batch in piece.batches:
            batch = {
                name: tensor.to(self.w.device, non_blocking=True)
                for name, tensor in batch.items()
            }
            with autocast(self.w.device, self.precision):
                pooled = self.model.pool(**batch)
                logits = self.model.classify(pooled)
            parts = [z.float() for z in logits.values()]
            if hidden:
                parts.append(pooled)
            outputs[start:stop] = torch.cat(parts, dim=1)
        return outputs

    def _decode(self, means):
        C = sum(self.widths.values())
        *logits, pooled = means.split([*self.widths.values(), means.shape[1] - C], dim=1)
        log_probs = log_probabilities(dict(zip(self.widths, logits)), self.temperature)
        best = self.decoder.best(log_probs)
        found = {
            "lineage": best.lineage,
            "lineage_probability": best.probability,
            "pooled": pooled,
        }
        for rank, log_p in log_probs.items():
            top = log_p.topk(min(self.top_k, log_p.shape[1]), dim=1)
            found[f"{rank}_class"] = top.indices
            found[f"{rank}_probability"] = top.values.exp()
        return found


def main(argv=None):
    args = parse_args(argv)

    # Look at the inputs and the outputs before anything is computed.
    inputs = [*args.reads, *(args.mates or [])]
    check_files(inputs)
    for path in (args.out if args.out != "-" else None, args.embeddings, args.report):
        if path:
            check_output(path, [*inputs, args.checkpoint])

    # Read the checkpoint, and the temperatures fitted for it.
    content = checkpoint.read(args.checkpoint)
    temperature = suggested = None
    if args.temperature:
        temperature, suggested = read_temperature(args.temperature, args.checkpoint, content)
    first = os.environ.get("RANK", "0") == "0"
    if suggested is not None and args.min_probability is None and first:
        print(
            f"{args.temperature} suggests --min-probability {suggested:.3f}, which keeps 95% of "
            "the right ones of the validation split at the last rank",
            file=sys.stderr,
        )
    tokenizer = checkpoint.tokenizer_of(content, args.checkpoint, args.tokenizer_file)

    with world(args.device) as w:
        if w.size > 1 and not all(Path(path).is_file() for path in inputs):
            raise InputError(
                "several processes each read the input: give files, not standard input or a pipe"
            )

        # Build the model.
        precision = args.precision or content["precision"]
        set_precision(precision, w.device)
        model = checkpoint.rebuild(content, args.weights).to(w.device)
        decoder = JointDecoder(content["lineages"], w.device)
        forward = Forward(
            w, model, decoder, precision,
            temperature=temperature, top_k=args.top_k, keep_pooled=bool(args.embeddings),
        )

        # Open the reads as a stream of slices; nothing is read yet.
        stream = itertools.chain.from_iterable(map(records, args.reads))
        if args.mates:
            stream = pairs(stream, itertools.chain.from_iterable(map(records, args.mates)))
        trained = checkpoint.window_of(content, args.checkpoint)
        pieces = slices(
            stream,
            tokenizer,
            args.window or trained["length"],
            args.batch_size or content["batch_size"],
            BATCHES_PER_SLICE,
            rank=w.rank,
            size=w.size,
            both_strands=args.both_strands,
        )

        # Predict and write.
        writer = LineWriter(args, content["classes"], content["lineages"])
        return predict(w, args, forward, writer, read_ahead(pieces))


def check_finite(w, reads, found):
    """Raise InputError, on all processes, for a read of which the network says NaN."""
    columns = [
        found[name].isfinite().all(dim=1) for name in found if name.endswith("probability")
    ]
    finite = torch.stack(columns).all(dim=0).tolist()
    bad = [read.header for read, good in zip(reads, finite) if read.windows and not good]
    if bad:
        exit_together(w, InputError(
            f"{len(bad):,} reads get probabilities that are not finite, the first '{bad[0]}': "
            "this network says nothing of them; try --precision fp32, or another checkpoint"
        ))


def predict(w, args, forward, writer, pieces):
    """Run the slices through the network and write what comes out.

    Returns {"reads", "windows", "seconds", "cpu_seconds"}.
    """
    started = time.perf_counter()
    used = time.process_time()
    reads_done = 0
    windows_done = 0
    changed = 0  # bases that became N
    without = 0  # reads without a window
    with contextlib.ExitStack() as stack:
        out = vectors = None
        if w.is_main:
            out = sys.stdout if args.out == "-" else open_text(stack, args.out)
            out.write(writer.header())
            if args.embeddings:
                H = forward.model.backbone.config.hidden_size
                path = stack.enter_context(replacing(args.embeddings))
                vectors = VectorWriter(path, H, args.dtype)
                stack.enter_context(contextlib.closing(vectors))
        bar = stack.enter_context(progress(None, "predict", unit="read", unit_scale=True))
        pending = None
        for piece in itertools.chain(pieces, [None]):
            # On a GPU, this one is computed while the one before is written.
            computed = forward(piece) if piece else None
            if pending:
                reads, found, event = pending
                if event:
                    event.synchronize()
                check_finite(w, reads, found)
                if w.is_main:
                    out.write(writer.lines(reads, found))
                    out.flush()
                    if vectors:
                        vectors.append(found["pooled"])
                reads_done += len(reads)
                windows_done += sum(read.windows for read in reads)
                changed += sum(read.changed for read in reads)
                without += sum(read.windows == 0 for read in reads)
                bar.update(len(reads))
            pending = computed
        if w.is_main and args.report:
            open_text(stack, args.report).write(report(writer.classes, writer.counts))
    seconds = time.perf_counter() - started
    if w.is_main:
        print(
            f"{reads_done:,} reads, {windows_done:,} windows in {seconds:.1f} s: "
            f"{reads_done / seconds:,.1f} reads/s",
            file=sys.stderr,
        )
        if changed:
            print(f"{changed:,} bases outside ACGTN became N", file=sys.stderr)
        if without:
            print(
                f"{without:,} reads without a single A, C, G or T are unclassified",
                file=sys.stderr,
            )
    return {
        "reads": reads_done,
        "windows": windows_done,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - used,
    }


def open_text(stack, path):
    """A text file that replaces `path` when the stack closes."""
    temporary = stack.enter_context(replacing(path))
    return stack.enter_context(open(temporary, "w", encoding="utf-8"))


if __name__ == "__main__":
    run(main)
