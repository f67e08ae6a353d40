"""Flags of LLada-Reasoning's training scripts that mean something else here, for scripts under its names."""

import os
import sys
from collections.abc import Sequence

from llada.flags.parser import OneLineParser

# What its scripts always do, or do in one way here: other values are refused.
FIXED = {"val_mc_runs": 1, "eps": 1e-3, "answer_weight": 1.0}


def todays_arguments(argv: Sequence[str] | None) -> list[str]:
    """The command line in this suite's flags.

    --use-wandb is --report_to wandb, --activation-checkpointing is --activation_checkpointing full,
    --min-lr-ratio counts from --lr, --val-limit-batches in batches of --local-batch, and --sft-lora-weights
    names an adapter that training continues.

    Raises:
        ValueError: a value of `FIXED` that is another here, or adapters that have to be merged first.
    """
    parser = OneLineParser(allow_abbrev=False, add_help=False)
    for name in ("use-wandb", "activation-checkpointing"):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", action="store_true")
    kinds = {"min-lr-ratio": float, "val-limit-batches": int, "wandb-entity": str, "sft-lora-weights": str,
             "pretraining-lora-weights": str, "lr": float, "local-batch": int, "resume-from-checkpoint": str,
             **{name.replace("_", "-"): float for name in FIXED}}  # fmt: skip
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", type=kind)
    known, words = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    for name, only in FIXED.items():
        if getattr(known, name) not in (None, only):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(known, name)}: here it is always {only}")
    if known.pretraining_lora_weights:
        raise ValueError(
            f"--pretraining-lora-weights {known.pretraining_lora_weights}: fold them in first: "
            "python scripts/merge_lora.py --base_model BASE --adapter_path ADAPTER --output_path MERGED"
        )
    if known.wandb_entity:
        os.environ["WANDB_ENTITY"] = known.wandb_entity  # W&B reads it itself
    learning_rate, local_batch = known.lr or 1e-5, known.local_batch or 8
    flags = {
        "report_to": "wandb" if known.use_wandb else None,
        "activation_checkpointing": "full" if known.activation_checkpointing else None,
        "learning_rate": known.lr,
        "min_learning_rate": None if known.min_lr_ratio is None else known.min_lr_ratio * learning_rate,
        "micro_batch_size": known.local_batch,
        "eval_limit": known.val_limit_batches and known.val_limit_batches * local_batch,
        "model_name_or_path": known.sft_lora_weights,
        "resume_from_checkpoint": known.resume_from_checkpoint or None,
    }
    return [*words, *(f"--{name}={value}" for name, value in flags.items() if value is not None)]
