"""Flags that every training stage shares, and the learning-rate schedule."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada.flags.declaration import flag

if TYPE_CHECKING:
    from llada.run import Run  # imports torch


@dataclass(kw_only=True)
class TrainConfig:
    """Flags that every training stage has."""

    packing = False  # a flag of the stages that can; see MaskedStream.row_length

    # Flags that change what a step computes: a resumed run must have the same. Stages add theirs.
    fixed = (
        "seed", "batch_size", "max_steps", "max_length", "learning_rate", "min_learning_rate",
        "lr_scheduler_type", "warmup_steps", "warmup_ratio", "decay_ratio", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "dtype", "use_lora", "lora_r",
        "lora_alpha", "lora_dropout", "lora_target_modules", "t_sampling", "mask_count",
    )  # fmt: skip

    output_dir: str = flag(
        help="Folder of the run: step-N states, final/, best/, metrics.jsonl, results.json."
    )
    tokenizer_name: str | None = flag(None, help="Tokenizer folder; default that of the model.")
    max_length: int = flag(4096, help="Longest sequence in tokens.")
    max_steps: int = flag(-1, help="Optimizer steps; -1 = as many as --num_train_epochs give.")
    num_train_epochs: float = flag(1.0, help="Passes over the data when --max_steps is not given.")
    batch_size: int = flag(
        4,
        help="Sequences per optimizer step, over all ranks and micro-batches.",
    )
    micro_batch_size: int | None = flag(
        None,
        help="Sequences per forward on a device, rest accumulated; default --batch_size / ranks, or one "
        "packed row.",
    )
    learning_rate: float = flag(4e-4, help="Peak learning rate.")
    min_learning_rate: float = flag(0.0, help="Learning rate at the end of linear, cosine and wsd schedules.")
    lr_scheduler_type: str = flag(
        "cosine", help="Shape after the warm-up.", choices=["constant", "linear", "cosine", "wsd"]
    )
    warmup_steps: int = flag(0, help="Steps of linear warm-up from 0.")
    warmup_ratio: float = flag(0.0, help="Warm-up as a share of all steps, when --warmup_steps is 0.")
    decay_ratio: float = flag(0.1, help="wsd: share of all steps that decays linearly at the end.")
    weight_decay: float = flag(0.01, help="AdamW weight decay, on matrices only.")
    adam_beta1: float = flag(0.9, help="AdamW beta1.")
    adam_beta2: float = flag(0.95, help="AdamW beta2.")
    adam_epsilon: float = flag(1e-8, help="AdamW epsilon.")
    max_grad_norm: float = flag(
        1.0,
        help="Gradients are clipped to this global norm; 0 = never.",
    )
    dtype: str = flag(
        "float32",
        help="Precision of the matrix products; parameters and sums stay float32.",
        choices=["float32", "bfloat16"],
    )
    activation_checkpointing: str = flag(
        "none",
        help="Recompute in the backward: nothing; every second matrix product and the cheap operations of "
        "each block (selective); or whole blocks (full). Less memory, more time.",
        choices=["none", "selective", "full"],
    )
    gradient_checkpointing: bool = flag(False, help="The same as --activation_checkpointing full.")
    compile: bool = flag(False, help="torch.compile each block: faster steps after minutes of compiling.")
    shard: str = flag(
        "none",
        help="Replicate the model on all ranks, shard it over all (FSDP2), or within each node (HSDP).",
        choices=["none", "full", "hybrid"],
    )
    cpu_offload: bool = flag(False, help="With --shard: keep the shards in CPU memory between uses.")
    reduce_always: bool = flag(
        False,
        help="With --shard and several micro-batches: reduce gradients after each, which keeps 1 / ranks of "
        "them in memory instead of all, for more communication.",
    )
    attn_implementation: str | None = flag(None, help="transformers' attention kernel; default sdpa.")
    use_lora: bool = flag(False, help="Train LoRA adapters instead of all weights.")
    lora_r: int = flag(128, help="LoRA rank.")
    lora_alpha: float = flag(256.0, help="LoRA scale numerator: the update is (alpha / r) B A.")
    lora_dropout: float = flag(0.0, help="Dropout before the adapters.")
    lora_target_modules: list[str] = flag(
        ["all-linear"],
        help="Linear layers of the blocks by name (q_proj, attn_out, ff_out, ...), or all-linear.",
    )
    t_sampling: str = flag(
        "iid",
        help="Times t of a batch: iid, or one in each of batch_size equal parts of (0, 1).",
        choices=["iid", "stratified"],
    )
    mask_count: str = flag(
        "bernoulli",
        help="Tokens masked given t: each with probability p, or exactly ceil(t n).",
        choices=["bernoulli", "exact"],
    )
    on_nonfinite: str = flag(
        "stop",
        help="A step whose loss or gradient is not finite: stop and name its records, or skip it and count.",
        choices=["stop", "skip"],
    )
    spike_sigmas: float = flag(
        6.0, help="Log steps whose loss is this many standard deviations above the running mean; 0 = never."
    )
    seed: int = flag(42, help="Key of every random draw.")
    log_interval: int = flag(10, help="Log every N steps.")
    eval_interval: int = flag(
        0,
        help="Validate every N steps; 0 = only before and after training.",
    )
    eval_limit: int | None = flag(None, help="Validate on the first N records only.")
    save_interval: int = flag(
        0,
        help="Save the training state every N steps; 0 = only when stopped.",
    )
    save_total_limit: int = flag(2, help="States kept.")
    save_best: bool = flag(False, help="Keep the weights with the lowest validation loss in best/.")
    resume_from_checkpoint: str = flag(
        "auto", help="auto = continue --output_dir if it holds a state; none; or a folder."
    )
    num_workers: int = flag(1, help="Batches prepared ahead in background threads; 0 = in the loop.")
    device: str | None = flag(None, help="cpu, cuda, ...; default the GPU if there is one.")
    dry_run: bool = flag(
        False, help="Only check the files, and print size, memory per rank and hours; writes nothing."
    )
    report_to: str = flag(
        "none",
        help="Send metrics there besides metrics.jsonl; WANDB_MODE=offline works.",
        choices=["none", "wandb", "tensorboard", "trackio"],
    )
    wandb_project: str = flag("llada", help="W&B project.")
    run_name: str | None = flag(None, help="W&B run name; default the folder's.")
    wandb_run_id: str | None = flag(None, help="W&B run to continue.")

    def __post_init__(self) -> None:
        # Now, since stages fill in what a command leaves open.
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        self.given = hashlib.sha256(text.encode()).hexdigest()  # a hash: a flag may hold a key

    @property
    def recompute(self) -> str:
        """none, selective or full: what of a block its backward computes again."""
        return "full" if self.gradient_checkpointing else self.activation_checkpointing

    def agreed(self) -> dict[str, Any]:
        """The `fixed` flags with their values."""
        return {name: getattr(self, name) for name in self.fixed}

    def stream(self, run: "Run", mask_id: int, pad_id: int) -> dict[str, Any]:
        """What a `MaskedStream` takes from the flags."""
        return {
            **{name: getattr(self, name) for name in ("batch_size", "micro_batch_size", "seed")},
            **{name: getattr(self, name) for name in ("t_sampling", "mask_count")},
            **{"run": run, "mask_id": mask_id, "pad_id": pad_id},
            "row_length": self.max_length if self.packing else 0,
        }

    def resolve(self, run: "Run", num_records: int) -> None:
        """Fills --micro_batch_size and --max_steps, and checks the numbers against each other."""
        if self.micro_batch_size is None:
            self.micro_batch_size = 1 if self.packing else max(1, self.batch_size // run.world_size)
        unit = self.micro_batch_size * run.world_size
        if self.batch_size <= 0 or (self.batch_size % unit and not self.packing):
            raise ValueError(
                f"--batch_size {self.batch_size} must be a multiple of --micro_batch_size "
                f"{self.micro_batch_size} "
                f"x {run.world_size} ranks = {unit}"
            )
        if num_records == 0:
            raise ValueError("--train_data_path: no usable record")
        if self.max_steps < 0:
            self.max_steps = max(1, round(self.num_train_epochs * num_records / self.batch_size))
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"--min_learning_rate {self.min_learning_rate} exceeds --learning_rate {self.learning_rate}"
            )


def finished_before(config: TrainConfig) -> str | None:
    """What to tell a user whose command has run to its end already; None where there is something to do."""
    done = Path(config.output_dir, "DONE")
    if config.dry_run or not done.is_file() or done.read_text() != config.given:
        return None
    return f"{config.output_dir}: this command has finished before; results.json has its numbers"


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then the schedule down to
    --min_learning_rate."""
    warmup = config.warmup_steps or int(config.warmup_ratio * config.max_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    low, span = config.min_learning_rate, config.learning_rate - config.min_learning_rate
    if config.lr_scheduler_type == "wsd":
        num_decay = max(1, int(config.decay_ratio * config.max_steps))
        return low + span * min(1.0, (config.max_steps - step) / num_decay)
    progress = (step - warmup) / max(1, config.max_steps - warmup)
    shape = 1 - progress if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return low + span * shape
