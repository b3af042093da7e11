"""The flags that several scripts share: which model, what trains, and how many classes stand in for data."""

from taxa import RANKS
from taxa.backbones import MODELS, table_name
from taxa.data.taxonomy import check_ranks
from taxa.errors import InputError, choose
from taxa.runtime.cli import fraction, positive_float, positive_int
from taxa.strategies import PROTOCOLS, STRATEGIES, STRATEGY_FLAGS, settings_from_flags


def add_model(parser):
    """--model, --weights, --revision: which backbone, and where its weights come from."""
    add = parser.group("model")
    add("--model", required=True, type=table_name, metavar="NAME",
        help=f"one of {' '.join(MODELS)}; or the hub id ORG/NAME of another Nucleotide Transformer v2 or DNABERT-2, which takes "
             "learning rate and batch size from nt250m or dnaberts")
    add("--weights", metavar="DIR", help="folder in the hub's format instead of the hub: config.json and model.safetensors or .bin")
    add("--revision", metavar="SHA", help="of the hub's repository (default: the pinned one; of ORG/NAME: main)")


def add_strategy(parser):
    """--strategy and what goes with it: what trains. check_strategy() goes with it."""
    add = parser.group("what trains")
    add("--strategy", required=True, metavar="NAME", help=f"one of {' '.join(STRATEGIES)}")
    add("--protocol", choices=PROTOCOLS, default="corrected", help="published: all as the published code did it (default corrected)")
    add("--heads", choices=("train", "frozen"), help="of lora and ia3; the published code froze them (default train)")
    add("--r", "--lora-r", type=positive_int, metavar="R", help="lora: rank (default 4)")
    add("--lora-alpha", type=positive_float, metavar="A", help="lora: scaling is alpha / r (default 32)")
    add("--lora-dropout", type=fraction, metavar="P", help="lora: dropout on the adapter's input (default 0.1)")
    add("--rslora", action="store_true", default=None, help="lora: scaling is alpha / sqrt(r) (rsLoRA)")
    add("--targets", nargs="+", metavar="NAME", help="lora: Linears to adapt; ia3: Linears whose output is scaled (default: the family's)")
    add("--feedforward-targets", nargs="+", metavar="NAME", help="ia3: Linears whose input is scaled (default: the family's)")
    add("--freeze-fraction", type=fraction, metavar="F", help="freeze75: freeze at least this share of the parameters (default 0.75)")
    return add


def add_classes(parser, when=""):
    """--num-classes and --ranks: what stands in for data."""
    add = parser.group("classes, in the place of data")
    add("--num-classes", type=positive_int, nargs="+", metavar="N", help=f"{when}classes per rank (default 4 57 1884, the study's)")
    add("--ranks", nargs="+", metavar="RANK", help=f"{when}the ranks that --num-classes counts (default {' '.join(RANKS)})")


def check_strategy(args):
    """Raises InputError for an unknown strategy, and for flags on weights that say nothing together."""
    choose("strategy", args.strategy, STRATEGIES)
    if args.strategy == "random" and args.revision:
        raise InputError("--revision names pretrained weights; --strategy random uses none")
    if args.weights and args.revision:
        raise InputError("--revision is of the hub's repository; --weights DIR does not come from there")


def classes_of(args):
    """{rank: number of classes} of --num-classes and --ranks."""
    ranks = check_ranks(args.ranks or RANKS, known=None)
    if args.ranks and not args.num_classes:
        raise InputError("--ranks names what --num-classes counts: give both (a prepared folder has its own)")
    numbers = args.num_classes or (4, 57, 1884)
    if len(numbers) != len(ranks):
        raise InputError(f"--num-classes has {len(numbers)} numbers for {len(ranks)} ranks ({' '.join(ranks)}): --ranks names others")
    return dict(zip(ranks, numbers))


def strategy_settings(args, row):
    """settings_from_flags() of parsed arguments. row: the model's."""
    return settings_from_flags(row, args.strategy, args.protocol, args.heads, **{name: getattr(args, name) for name in STRATEGY_FLAGS})
