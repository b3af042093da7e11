"""A run's settings: what the flags of a strategy say, checked, with the defaults filled in."""

from taxa.backbones import FAMILIES, get_model
from taxa.errors import InputError
from taxa.strategies import STRATEGIES
from taxa.training import peft_format

TARGETS = ("targets", "feedforward_targets")
# The settings that only some strategies have. Their flags have the same names.
OWN_FLAGS = tuple(dict.fromkeys(flag for row in STRATEGIES.values() for flag in row.flags))


def run_settings(args, model_row):
    """(settings, adapter_state) of parsed arguments, those of flags.add_strategy().

    adapter_state: {name: tensor} of --adapters, whose folder then decides the settings, else None.
    Raises InputError for flags that do not go together, and for a folder of another strategy.
    """
    typed = {flag: getattr(args, flag) for flag in OWN_FLAGS}
    adapter_state = None
    if getattr(args, "adapters", None):  # of train.py alone
        typed, adapter_state = peft_format.start_flags(args.adapters, args.strategy, typed)
    settings = settings_from_flags(model_row, args.strategy, args.protocol, args.heads, **typed)
    return settings, adapter_state


def settings_from_flags(model, strategy, protocol="corrected", heads=None, **flags):
    """Check a combination of flags and fill in the defaults.

    model: a name in the table, or a row. A flag that is None was not given. Returns a plain dict,
    which is what the checkpoint stores. Raises InputError for a combination without a meaning.
    """
    module = FAMILIES[get_model(model).family].module
    row = STRATEGIES[strategy]
    given = {flag: value for flag, value in flags.items() if value is not None}
    for flag in given:
        check_belongs(flag, strategy)

    settings = {"strategy": strategy, "protocol": protocol, **row.flags, **given}
    if settings.get("freeze_fraction") == 0:
        raise InputError("--freeze-fraction 0 freezes nothing: that is --strategy full")

    # where the adapters go: what was given, else the family's own targets
    if "feedforward_targets" in row.flags:
        targets = module.IA3_TARGETS[protocol]
        if given.keys() & set(TARGETS):  # one that was given replaces both
            targets = ((), ())
        for flag, default in zip(TARGETS, targets):
            settings[flag] = list(settings[flag] or default)
    elif "targets" in row.flags:
        settings["targets"] = list(settings["targets"] or module.LORA_TARGETS)

    # whether the heads train
    published = protocol == "published"
    if heads == "frozen" and not row.inject:
        raise InputError(
            "--heads frozen is what the published code did to lora and ia3; "
            f"--strategy {strategy} trains its heads"
        )
    if heads == "train" and published and row.inject:
        raise InputError(
            "--protocol published leaves the heads of lora and ia3 frozen: "
            "leave out --heads train, or the protocol"
        )
    settings["heads"] = heads or ("frozen" if published and row.inject else "train")
    return settings


def check_belongs(flag, strategy):
    """Raise InputError for a flag of other strategies, TypeError for one of none."""
    if flag in STRATEGIES[strategy].flags:
        return
    others = [name for name, row in STRATEGIES.items() if flag in row.flags]
    if not others:
        raise TypeError(f"unknown setting: {flag}")
    raise InputError(
        f"--{flag.replace('_', '-')} is for --strategy {' or '.join(others)}; "
        f"with --strategy {strategy} it would do nothing: leave it out"
    )
