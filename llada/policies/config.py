"""Flags that DPO, KTO and GRPO share: the policy, its reference, the estimator, and older spellings."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from llada.data.flags import PairFlags
from llada.diffusion.settings import ESTIMATORS, SIZE_LAWS
from llada.flags.declaration import flag
from llada.models.flags import MaskTokenFlag
from llada.training.config import TrainConfig

if TYPE_CHECKING:
    from llada.run import Run  # imports torch

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


DEFAULT_LORA_RANK = 128


@dataclass(kw_only=True)
class ReferenceFlags:
    """Flags of the stages whose loss compares the policy with a reference."""

    ref_model_name_or_path: str | None = flag(
        None,
        help="Checkpoint of the reference; default the policy as it starts (with fresh LoRA adapters these "
        "are switched off, otherwise a second copy is loaded).",
    )


@dataclass(kw_only=True)
class PolicyConfig(TrainConfig, MaskTokenFlag):
    """Flags of every stage that trains a policy."""

    output_dir: str = flag(
        help="Folder of the run: step-N states, final/, best/, metrics.jsonl, results.json.",
    )
    model_name_or_path: str = flag(help="Checkpoint that the policy starts from.")
    sft_adapter_path: str | None = flag(None, help="LoRA adapter on it; training continues this adapter.")
    n_mc_samples: int = flag(8, help="Masks per answer and step (K).")
    learning_rate: float = flag(1e-6, help="Peak learning rate.")
    dtype: str = flag(
        "auto",
        help="Precision of the matrix products; parameters and sums stay float32. auto: bfloat16 on a GPU.",
        choices=["auto", "float32", "bfloat16"],
    )
    apply_chat_template: bool = flag(
        False, help="Prompts and answers that are plain texts become turns; messages always use the template."
    )
    max_samples: int | None = flag(None, help="Only the first so many training records.")
    batch_size: int = flag(
        8,
        help="Records per optimizer step, over all ranks and micro-batches.",
    )
    micro_batch_size: int | None = flag(
        None,
        help="Records per forward on a device, rest accumulated; default --batch_size / ranks.",
    )
    warmup_ratio: float = flag(0.0, help="Warm-up as a share of all steps, when --warmup_steps is 0.")
    lr_scheduler_type: str = flag(
        "cosine",
        help="Shape after the warm-up; cosine_with_min_lr ends at a tenth of the peak.",
        choices=["constant", "linear", "cosine", "wsd", "cosine_with_min_lr"],
    )
    lora_r: int = flag(0, help="LoRA rank; 0 trains all weights, or is 128 with --use_lora.")
    adam_betas: list[float] | None = flag(None, help="Both AdamW betas at once.")
    bf16: bool = flag(False, help="The same as --dtype bfloat16.")
    flash_attn: bool = flag(False, help="Accepted; PyTorch's own attention uses flash kernels by itself.")
    zero_stage: int = flag(0, help="2 or 3, under torchrun: the same as --shard full.")
    use_wandb: str | None = flag(
        None,
        help="Anything but false: the same as --report_to wandb. A key given here is not used; log in with "
        "`wandb login` or WANDB_API_KEY, where no script shows it.",
    )

    def settle(self, run: "Run") -> None:
        """Turns the older spellings into the flags that the loop reads."""
        if self.adam_betas is not None:
            if len(self.adam_betas) != 2:
                raise ValueError(f"--adam_betas {self.adam_betas}: give two numbers")
            self.adam_beta1, self.adam_beta2 = self.adam_betas
        if self.bf16:
            self.dtype = "bfloat16"
        elif self.dtype == "auto":
            self.dtype = "bfloat16" if run.device.type == "cuda" else "float32"
        if self.zero_stage >= 2 and run.world_size > 1 and self.shard == "none":
            self.shard = "full"
        if self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_type = "cosine"
            self.min_learning_rate = self.min_learning_rate or 0.1 * self.learning_rate
        if self.use_wandb is not None and self.use_wandb.lower() != "false":
            self.report_to = "wandb"
        self.use_wandb = None  # it may be a key, and the flags are written to config.yaml
        # -1 meant never
        self.save_interval, self.eval_interval = max(0, self.save_interval), max(0, self.eval_interval)
        self.use_lora = self.use_lora or self.lora_r > 0 or self.sft_adapter_path is not None
        if self.use_lora and self.lora_r == 0:
            self.lora_r = DEFAULT_LORA_RANK


@dataclass(kw_only=True)
class PairConfig(PairFlags, PolicyConfig):
    """Flags of every stage that learns from pairs of answers; see llada/policies/pairs.py."""

    # Other masks, or another end of the answer, are another loss.
    fixed = (*PolicyConfig.fixed, "n_mc_samples", "estimator", "l_sampling", "eos")

    train_data_path: list[str] = flag(help="Files of preference pairs.")
    eval_data_path: list[str] | None = flag(None, help="Pairs for validation: loss, accuracy and margin.")
    eos: str = flag(
        "one",
        help="What ends an answer: its end-of-turn token and one EOS, these and EOS that count up to "
        "--max_length, nothing, or ELBO-KTO's attended EOS padding up to --max_length.",
        choices=["one", "filled", "none", "padded"],
    )
    long: str = flag(
        "error",
        help="Answers beyond --max_length: stop, drop and count, or cut and count.",
        choices=["error", "drop", "truncate"],
    )
    estimator: str = flag(
        "stratified",
        help="How masks are drawn: sizes spread evenly, independently (VRPO), or in complementary pairs.",
        choices=ESTIMATORS[:3],
    )
    l_sampling: str = flag(
        "auto",
        help="Law of the mask sizes: uniform, or small ones more often (inv_sqrt), with less noise, which is "
        "the default of --estimator stratified.",
        choices=["auto", *SIZE_LAWS],
    )
    dataset_probs: float = flag(1.0, help="Accepted; several files are read one after the other.")

    def settle(self, run: "Run") -> None:
        super().settle(run)
        if self.l_sampling == "auto":
            self.l_sampling = "inv_sqrt" if self.estimator == "stratified" else "uniform"

    def agreed(self) -> dict[str, Any]:
        """With the flags that a stage declares itself: they are its loss."""
        shared = {field.name for field in fields(PairConfig)}
        own = [field.name for field in fields(self) if field.name not in shared]
        return super().agreed() | {name: getattr(self, name) for name in own}
