"""The flags that several scripts share, in the groups that --help shows."""

from taxa import PROTOCOLS, RANKS, STUDY_CLASSES, STUDY_SEED
from taxa.backbones import MODELS, table_name
from taxa.data.opening import BERTAX, DEMO
from taxa.data.taxonomy import check_ranks
from taxa.errors import InputError, choose
from taxa.runtime.cli import (
    fraction,
    interval,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed,
)
from taxa.runtime.precision import PRECISIONS
from taxa.strategies import FREEZE, LORA, STRATEGIES
from taxa.training import activation_checkpointing


def add_model(parser):
    """--model, --weights, --revision: which backbone, and where its weights come from."""
    model = parser.group("model")
    model(
        "--model",
        required=True,
        type=table_name,
        metavar="NAME",
        help=f"one of {' '.join(MODELS)}; or the hub id ORG/NAME of another Nucleotide "
        "Transformer v2 or DNABERT-2, which takes learning rate and batch size from nt250m or "
        "dnaberts",
    )
    model(
        "--weights",
        metavar="DIR",
        help="folder in the hub's format instead of the hub: config.json and "
        "model.safetensors or .bin",
    )
    model(
        "--revision",
        metavar="SHA",
        help="of the hub's repository (default: the pinned one; of ORG/NAME: main)",
    )


def add_strategy(parser):
    """--strategy and its settings: what trains. Parsed arguments then go through check_strategy().

    Returns what adds a flag to this group, as the functions below do.
    """
    strategy = parser.group("what trains")
    strategy(
        "--strategy", required=True, metavar="NAME", help=f"one of {' '.join(STRATEGIES)}"
    )
    strategy(
        "--protocol",
        choices=PROTOCOLS,
        default="corrected",
        help="published: all as the published code did it (default corrected)",
    )
    strategy(
        "--heads",
        choices=("train", "frozen"),
        help="of lora and ia3; the published code froze them (default train)",
    )
    strategy(
        "--r",
        "--lora-r",
        type=positive_int,
        metavar="R",
        help=f"lora: rank (default {LORA['r']})",
    )
    strategy(
        "--lora-alpha",
        type=positive_float,
        metavar="A",
        help=f"lora: scaling is alpha / r (default {LORA['lora_alpha']:g})",
    )
    strategy(
        "--lora-dropout",
        type=fraction,
        metavar="P",
        help=f"lora: dropout on the adapter's input (default {LORA['lora_dropout']:g})",
    )
    strategy(
        "--rslora",
        action="store_true",
        default=None,
        help="lora: scaling is alpha / sqrt(r) (rsLoRA)",
    )
    strategy(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="lora: Linears to adapt; ia3: Linears whose output is scaled "
        "(default: the family's)",
    )
    strategy(
        "--feedforward-targets",
        nargs="+",
        metavar="NAME",
        help="ia3: Linears whose input is scaled (default: the family's)",
    )
    strategy(
        "--freeze-fraction",
        type=fraction,
        metavar="F",
        help="freeze75: freeze at least this share of the parameters "
        f"(default {FREEZE['freeze_fraction']:g})",
    )
    return strategy


def add_data(parser):
    """--data, --workers and --augment."""
    data = parser.group("data")
    data(
        "--data",
        metavar="DIR",
        help=f"prepared dataset, or 'demo': simulated, made in {DEMO} when it is not there "
        f"(default {BERTAX} if it is there, else the demo)",
    )
    data(
        "--workers",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="data-loader workers per process (default 0: load in the main process)",
    )
    data(
        "--augment",
        action="store_true",
        help="read every training sequence from a random strand, starting at a random base 0-5 "
        "(6-mer phase), anew in every epoch (default: as it is)",
    )
    return data


def add_optimisation(parser, weight_decay, warmup_steps, least_epochs=1):
    """Epochs, batches, optimizer, seed. Parsed arguments then go through check_run()."""
    optimisation = parser.group("optimisation")
    optimisation(
        "--epochs",
        type=non_negative_int if least_epochs == 0 else positive_int,
        default=5,
        metavar="N",
        help="at most this many (default 5)" + "; 0 only validates" * (least_epochs == 0),
    )
    optimisation(
        "--max-steps",
        type=positive_int,
        metavar="N",
        help="stop after this many optimizer steps (default: when the epochs are over)",
    )
    optimisation(
        "--batch-size",
        type=positive_int,
        metavar="B",
        help="sequences per process and micro-batch (default: as published)",
    )
    optimisation(
        "--accumulate",
        type=positive_int,
        default=1,
        metavar="N",
        help="micro-batches per optimizer step (default 1)",
    )
    optimisation(
        "--lr",
        type=positive_float,
        metavar="LR",
        help="highest learning rate (default: the published one of the model)",
    )
    optimisation(
        "--weight-decay",
        type=non_negative_float,
        default=weight_decay,
        metavar="W",
        help=f"AdamW's (default {weight_decay:g})",
    )
    optimisation(
        "--warmup-steps",
        type=non_negative_int,
        metavar="N",
        help=f"linear warm-up before the cosine (default {warmup_steps})",
    )
    optimisation(
        "--warmup-ratio",
        type=fraction,
        default=0.0,
        metavar="F",
        help="the same as a share of all steps, rounded up (default 0)",
    )
    parser.set_defaults(default_warmup_steps=warmup_steps)
    optimisation(
        "--max-grad-norm",
        type=positive_float,
        default=1.0,
        metavar="G",
        help="clip the gradient's norm to this (default 1.0)",
    )
    optimisation(
        "--max-bad-steps",
        type=positive_int,
        default=3,
        metavar="N",
        help="stop at the N-th step whose loss or gradient is not finite; such a step is not "
        "applied (default 3)",
    )
    optimisation(
        "--seed",
        type=seed,
        default=STUDY_SEED,
        metavar="N",
        help=f"of initial weights, order, masks and dropout (default {STUDY_SEED})",
    )
    return optimisation


def add_machine(parser):
    """Precision, device, activation checkpointing."""
    machine = parser.group("machine")
    machine(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of matrix multiplications (default fp32, as the paper says; bf16 is the fastest "
        "on a GPU: docs/PERFORMANCE.md)",
    )
    machine(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default auto: CUDA where there is one",
    )
    machine(
        "--activation-checkpointing",
        choices=activation_checkpointing.MODES,
        default="none",
        help="compute activations again in the backward pass instead of keeping them: selective "
        "keeps the results of matrix multiplications, full only each layer's input "
        "(default none)",
    )
    return machine


def add_output(parser, **out):
    """The run folder, resuming, saves and log lines. out: what add_argument() takes for --out."""
    output = parser.group("output")
    output("--out", metavar="DIR", **out)
    output("--overwrite", action="store_true", help="replace a run folder that exists")
    output(
        "--resume",
        action="store_true",
        help="continue from last.pt of --out, or start where nothing was saved yet "
        "(torchrun's restarts and SLURM's requeues do so unasked)",
    )
    output(
        "--save-every",
        type=interval,
        default="10m",
        metavar="N",
        help="write last.pt every N steps, or, as 10m, minutes (default 10m)",
    )
    output(
        "--log-every",
        type=positive_int,
        default=20,
        metavar="STEPS",
        help="steps between log lines; tail -f RUN/log.jsonl follows them (default 20)",
    )
    return output


def add_classes(parser, when=""):
    """--num-classes and --ranks: what stands in for data."""
    classes = parser.group("classes, in the place of data")
    classes(
        "--num-classes",
        type=positive_int,
        nargs="+",
        metavar="N",
        help=f"{when}classes per rank (default 4 57 1884, the study's)",
    )
    classes(
        "--ranks",
        nargs="+",
        metavar="RANK",
        help=f"{when}the ranks that --num-classes counts (default {' '.join(RANKS)})",
    )


def check_strategy(args):
    """Raises InputError for an unknown strategy, and for weights that contradict each other."""
    choose("strategy", args.strategy, STRATEGIES)
    if args.strategy == "random" and args.revision:
        raise InputError("--revision names pretrained weights; --strategy random uses none")
    if args.weights and args.revision:
        raise InputError(
            "--revision is of the hub's repository; --weights DIR does not come from there"
        )


def check_run(args, model_row):
    """Fill in the model's published learning rate and batch size.

    Raises InputError for flags that contradict each other.
    """
    if args.overwrite and args.resume:
        raise InputError("--overwrite starts anew and --resume goes on: give one of them")
    if args.warmup_ratio and args.warmup_steps:
        raise InputError(
            "--warmup-ratio and --warmup-steps say the same thing: give one of them"
        )
    default = args.__dict__.pop("default_warmup_steps")
    if args.warmup_steps is None:
        args.warmup_steps = 0 if args.warmup_ratio else default
    if args.max_steps and args.warmup_steps >= args.max_steps:
        raise InputError(
            f"--warmup-steps {args.warmup_steps} leaves nothing of --max-steps {args.max_steps}"
        )
    args.lr = args.lr or model_row.learning_rate
    args.batch_size = args.batch_size or model_row.batch_size


def classes_of(args):
    """{rank: number of classes} of --num-classes and --ranks."""
    ranks = check_ranks(args.ranks or RANKS, known=None)
    if args.ranks and not args.num_classes:
        raise InputError(
            "--ranks names what --num-classes counts: give both (a prepared folder has its own)"
        )
    numbers = args.num_classes or tuple(STUDY_CLASSES.values())
    if len(numbers) != len(ranks):
        raise InputError(
            f"--num-classes has {len(numbers)} numbers for {len(ranks)} ranks "
            f"({' '.join(ranks)}): --ranks names others"
        )
    return dict(zip(ranks, numbers))
