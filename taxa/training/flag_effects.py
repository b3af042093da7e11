"""What each flag of train.py and pretrain.py may change in what a run computes.

Resuming, the processes of one run, the grid of a study and the groups of a report all compare
runs. They all ask this table which flags to compare. It imports nothing that takes time.
"""

PATH = "a path: what lies there is compared by its checksum"
NOTHING = "nothing: where and how a run computes, saves and logs"
PRODUCT = "compared by product: sequences per step, over all processes"
EVERYTHING = "everything"

EFFECTS = {
    # model
    "model": EVERYTHING,
    "weights": PATH,
    "revision": EVERYTHING,
    "tied": EVERYTHING,
    # what trains
    "strategy": EVERYTHING,
    "protocol": EVERYTHING,
    "heads": EVERYTHING,
    "r": EVERYTHING,
    "lora_alpha": EVERYTHING,
    "lora_dropout": EVERYTHING,
    "rslora": EVERYTHING,
    "targets": EVERYTHING,
    "feedforward_targets": EVERYTHING,
    "freeze_fraction": EVERYTHING,
    "adapters": EVERYTHING,  # a path, but the adapters that lie there have no checksum
    "mask_fraction": EVERYTHING,
    # data
    "data": PATH,
    "fasta": PATH,
    "tokenizer_file": PATH,
    "data_fraction": EVERYTHING,
    "augment": EVERYTHING,
    "workers": NOTHING,
    # optimisation
    "epochs": EVERYTHING,  # but a resumed run may have more of them
    "max_steps": EVERYTHING,
    "batch_size": PRODUCT,
    "accumulate": PRODUCT,
    "lr": EVERYTHING,
    "weight_decay": EVERYTHING,
    "warmup_steps": EVERYTHING,
    "warmup_ratio": EVERYTHING,
    "max_grad_norm": EVERYTHING,
    "max_bad_steps": NOTHING,
    "patience": EVERYTHING,
    "seed": EVERYTHING,
    # machine
    "precision": EVERYTHING,
    "compile": EVERYTHING,
    "device": NOTHING,
    "activation_checkpointing": NOTHING,
    # output
    "out": PATH,
    "overwrite": NOTHING,
    "resume": NOTHING,
    "save_every": NOTHING,
    "log_every": NOTHING,
    "float16": NOTHING,
    "dry_run": NOTHING,  # there is no run then
    "num_classes": NOTHING,
    "ranks": NOTHING,
}


def flags_that_change(*effects):
    """The names of the flags, as argparse has them, that have one of these effects."""
    return tuple(flag for flag, effect in EFFECTS.items() if effect in effects)
