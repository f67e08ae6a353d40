"""Flags of the RLHF scripts that came before this suite which have no work left to do: accepted, and said so.

What does have a meaning here is an alias of the flag that means it; see llada/policy_config.py.
"""

from dataclasses import dataclass

from llada.flags import flag

_DONE = "Accepted; "
_OWN = _DONE + "this suite shards, saves and resumes by itself."


@dataclass(kw_only=True)
class OlderFlags:
    """Accepted without effect."""

    ckpt_path: str | None = flag(None, help=_DONE + "states are saved in --output_dir.")
    save_hf_ckpt: bool = flag(False, help=_DONE + "final/ always is a plain checkpoint.")
    disable_ds_ckpt: bool = flag(False, help=_OWN)
    max_ckpt_mem: float = flag(0.0, help=_DONE + "see --save_total_limit.")
    local_rank: int = flag(-1, help=_DONE + "torchrun says it in the environment.")
    ref_offload: bool = flag(False, help=_OWN)
    gradient_checkpointing_use_reentrant: bool = flag(False, help=_DONE + "it never is.")
    input_template: str | None = flag(None, help=_DONE + "prompts go through the chat template.")
    dataset_probs: float = flag(1.0, help=_DONE + "there is one data set.")
    use_ms: bool = flag(False, help=_DONE + "there is one data set.")
    wandb_org: str | None = flag(None, help=_DONE + "W&B reads WANDB_ENTITY.")
    wandb_group: str | None = flag(None, help=_DONE + "W&B reads WANDB_RUN_GROUP.")
    use_tensorboard: str | None = flag(None, help=_DONE + "curves: scripts/plot_metrics.py on metrics.jsonl.")
