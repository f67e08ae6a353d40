"""Flags that training stages share, in groups: a stage mixes in those that it reads."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada.flags.declaration import flag, said_of
from llada.models.flags import EXPERTS, LINEAR_LAYERS, HubFlags, MaskTokenFlag

if TYPE_CHECKING:
    from llada.run import Run  # imports torch

DEFAULT_LORA = {"lora_r": 128, "lora_alpha": 256.0, "lora_target_modules": ["all-linear"]}


@dataclass(kw_only=True)
class NoiseFlags:
    """How tokens are masked."""

    t_sampling: str = flag(
        "iid",
        "Times t of a batch: iid, or one in each of batch_size equal parts of (0, 1).",
        choices=["iid", "stratified"],
        fixed=True,
    )
    mask_count: str = flag(
        "bernoulli",
        "Tokens masked given t: each with probability p, or exactly ceil(t n).",
        choices=["bernoulli", "exact"],
        fixed=True,
    )


@dataclass(kw_only=True)
class BlockFlags:
    """Blocks from left to right, each denoised with all that stands before it."""

    objective: str = flag(
        "masked_diffusion",
        "What a token is predicted from: all tokens that are not masked, or those of its block and the clean "
        "blocks before it (BD3LM, SDAR, LLaDA2).",
        choices=["masked_diffusion", "block_diffusion"],
        fixed=True,
    )
    block_size: int | None = flag(
        None, "Tokens of a block; default the model's.", at_least=1, needs="objective=block_diffusion",
        fixed=True,
    )  # fmt: skip


@dataclass(kw_only=True)
class BlockNoiseFlags(BlockFlags):
    """And the noise that they are trained under."""

    t_range: list[float] = flag(
        [0.0, 1.0],
        "Times of training are drawn from here, one a block; LLaDA2's SFT: 0.3 0.8. Validation takes all.",
        at_least=0,
        at_most=1,
        needs="objective=block_diffusion",
        fixed=True,
    )

    def check_flags(self) -> None:
        """The order of --t_range."""
        if len(self.t_range) != 2 or self.t_range[0] >= self.t_range[1]:
            raise ValueError(f"--t_range {self.t_range}: give two numbers, the lower first")


@dataclass(kw_only=True)
class LoraFlags:
    """LoRA."""

    use_lora: bool | None = flag(
        None, "Train LoRA adapters instead of all weights; so does every other --lora_ flag.", fixed=True
    )
    lora_r: int | None = flag(None, "Rank; 0: no LoRA. Default 128.", at_least=0, fixed=True)
    lora_alpha: float | None = flag(
        None, "Scale numerator: the update is (alpha / r) B A. Default 256.", above=0, fixed=True
    )
    lora_target_modules: list[str] | None = flag(
        None,
        "Linear layers of the blocks, by LLaDA's name or Llama's, and `experts`; default all-linear, which "
        "leaves experts alone.",
        choices=["all-linear", *dict.fromkeys((*LINEAR_LAYERS, *LINEAR_LAYERS.values())), EXPERTS],
        fixed=True,
    )

    def check_flags(self) -> None:
        """Settles --use_lora, and the other flags where it is on."""
        given = [name for name in self.__dict__ if name.startswith("lora_") and getattr(self, name)]
        self.given_of_lora = given  # what an adapter that training continues must agree with
        if self.use_lora and self.lora_r == 0:
            raise ValueError("--use_lora: --lora_r 0 is no adapter")
        if given and (self.use_lora is False or self.lora_r == 0):
            raise ValueError(f"--{given[0]} {getattr(self, given[0])}: without effect, LoRA is turned off")
        self.use_lora = bool(self.use_lora or given or getattr(self, "sft_adapter_path", None))
        for name, default in DEFAULT_LORA.items():
            value = getattr(self, name) or default
            setattr(self, name, value if self.use_lora else None)


@dataclass(kw_only=True)
class LoraDropoutFlags(LoraFlags):
    """LoRA, with dropout."""

    lora_dropout: float = flag(0.0, "Dropout before the adapters.", at_least=0, below=1, fixed=True)


@dataclass(kw_only=True)
class ScaleFlags:
    """Memory and speed."""

    activation_checkpointing: str = flag(
        "none",
        "Recompute in the backward: nothing; every second matrix product and the cheap operations of each "
        "block (selective); or whole blocks (full). Less memory, more time.",
        choices=["none", "selective", "full"],
    )
    compile: bool = flag(False, "torch.compile each block: faster steps after minutes of compiling.")
    shard: str = flag(
        "none",
        "Replicate the model on all ranks, shard it over all (FSDP2), or within each node (HSDP).",
        choices=["none", "full", "hybrid"],
    )
    cpu_offload: bool = flag(False, "Keep the shards in CPU memory between uses.", needs="shard")
    reduce_always: bool = flag(
        False,
        "Reduce gradients after each micro-batch, which keeps 1 / ranks of them in memory instead of all, "
        "for more communication.",
        needs="shard",
    )
    reduce_dtype: str = flag(
        "float32",
        "Of sharded gradients while they are added up over micro-batches and ranks: bfloat16 takes half the "
        "communication, and rounds.",
        choices=["float32", "bfloat16"],
        needs="shard",
    )
    attn_implementation: str | None = flag(None, "transformers' attention kernel; default sdpa.")


@dataclass(kw_only=True)
class PrefetchFlags:
    """Preparing batches."""

    num_workers: int = flag(
        1, "Batches prepared ahead in a background thread; 0 = none, each in the loop.", at_least=0
    )


@dataclass(kw_only=True)
class OptimizerFlags:
    """AdamW and its learning rate."""

    learning_rate: float = flag(4e-4, "Peak learning rate.", at_least=0, fixed=True)
    min_learning_rate: float = flag(
        0.0,
        "Learning rate at the end of the schedule; cosine_with_min_lr: a tenth of the peak where it is 0.",
        at_least=0,
        needs="lr_scheduler_type=linear|cosine|cosine_with_min_lr|wsd",
        fixed=True,
    )
    lr_scheduler_type: str = flag(
        "cosine",
        "Shape after the warm-up.",
        choices=["constant", "linear", "cosine", "cosine_with_min_lr", "wsd"],
        fixed=True,
    )
    warmup_steps: int = flag(0, "Steps of linear warm-up from 0.", at_least=0, fixed=True)
    warmup_ratio: float = flag(
        0.0, "Warm-up as a share of all steps, when --warmup_steps is 0.", at_least=0, below=1, fixed=True
    )
    decay_ratio: float = flag(
        0.1,
        "Share of all steps that decays linearly at the end.",
        above=0,
        at_most=1,
        needs="lr_scheduler_type=wsd",
        fixed=True,
    )
    weight_decay: float = flag(0.01, "AdamW weight decay, on matrices only.", at_least=0, fixed=True)
    adam_beta1: float = flag(0.9, "AdamW beta1.", at_least=0, below=1, fixed=True)
    adam_beta2: float = flag(0.95, "AdamW beta2.", at_least=0, below=1, fixed=True)
    adam_epsilon: float = flag(1e-8, "AdamW epsilon.", above=0, fixed=True)
    max_grad_norm: float = flag(
        1.0, "Gradients are clipped to this global norm; 0 = never.", at_least=0, fixed=True
    )

    def check_flags(self) -> None:
        """The end of the schedule."""
        if self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_type = "cosine"
            self.min_learning_rate = self.min_learning_rate or 0.1 * self.learning_rate
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"--min_learning_rate {self.min_learning_rate} exceeds --learning_rate {self.learning_rate}"
            )


@dataclass(kw_only=True)
class LoggingFlags:
    """Logging, validation and saving."""

    log_interval: int = flag(10, "Log every N steps.", at_least=1)
    eval_interval: int = flag(
        0,
        "Validate every N steps; 0 or -1 = only before and after training.",
        at_least=-1,
        needs="eval_data_path",
    )
    eval_limit: int | None = flag(
        None, "Validate on the first N records only.", at_least=1, needs="eval_data_path"
    )
    save_interval: int = flag(
        0, "Save the training state every N steps; 0 or -1 = only when stopped.", at_least=-1
    )
    save_total_limit: int = flag(2, "States kept; -1 = all.", at_least=-1)
    save_best: bool = flag(
        False, "Keep the weights with the lowest validation loss in best/.", needs="eval_data_path"
    )
    resume_from_checkpoint: str = flag(
        "auto", "auto = continue --output_dir if it holds a state; none; or a folder.", reads="state"
    )
    on_nonfinite: str = flag(
        "stop",
        "A step whose loss or gradient is not finite: stop and name its records, or skip it and count.",
        choices=["stop", "skip"],
    )
    spike_sigmas: float = flag(
        6.0,
        "Log steps whose loss is this many standard deviations above the running mean; 0 = never.",
        at_least=0,
    )
    profile: int = flag(
        0, "Write a profiler's trace of N steps to profile/ in --output_dir, after three.", at_least=0
    )
    report_to: str = flag(
        "none",
        "Send metrics there besides metrics.jsonl; with wandb, WANDB_MODE=offline works.",
        choices=["none", "wandb", "tensorboard", "trackio"],
    )
    wandb_project: str = flag("llada", "Project of the run.", needs="report_to=wandb|trackio", mild=True)
    run_name: str | None = flag(
        None, "Name of the run; default the folder's.", needs="report_to=wandb|trackio", mild=True
    )
    wandb_run_id: str | None = flag(None, "W&B run to continue.", needs="report_to=wandb")

    def check_flags(self) -> None:
        """-1 is never, as the systems before this one write it."""
        if self.save_total_limit == 0:
            raise ValueError("--save_total_limit 0: would delete every state; use 1 or more, or -1 for all")
        self.save_interval, self.eval_interval = max(0, self.save_interval), max(0, self.eval_interval)


@dataclass(kw_only=True)
class TrainConfig(OptimizerFlags, LoggingFlags, HubFlags):
    """A training run."""

    # What the loop asks for where a stage has no such flags.
    packing = use_lora = compile = cpu_offload = reduce_always = float8 = False
    shard = activation_checkpointing = "none"
    reduce_dtype = "float32"
    objective = "masked_diffusion"
    num_workers = 0
    default_batch_size = 4

    output_dir: str = flag(
        help="Folder of the run: step-N states, final/, best/, metrics.jsonl, results.json.", writes="run"
    )
    tokenizer_name: str | None = flag(None, "Tokenizer folder; default that of the model.", reads="model")
    max_length: int = flag(4096, "Longest sequence in tokens.", at_least=1, fixed=True)
    max_steps: int = flag(
        -1, "Optimizer steps; -1 = as many as --num_train_epochs give.", at_least=-1, fixed=True
    )
    num_train_epochs: float = flag(
        1.0, "Passes over the data; --max_steps overrides it.", above=0, needs="max_steps=-1", mild=True
    )
    batch_size: int | None = flag(
        None, "Sequences per optimizer step, over all ranks and micro-batches; default 4.", at_least=1,
        fixed=True,
    )  # fmt: skip
    micro_batch_size: int | None = flag(
        None,
        "Sequences per forward on a device, rest accumulated; default --batch_size / ranks, or one packed "
        "row.",
        at_least=1,
    )
    gradient_accumulation_steps: int | None = flag(
        None, "Micro-batches per step and rank; follows from --batch_size, or gives it.", at_least=1
    )
    dtype: str = flag(
        "auto",
        "Precision of the matrix products; parameters and sums stay float32. auto: bfloat16 on a GPU.",
        choices=["auto", "float32", "bfloat16"],
        fixed=True,
    )
    seed: int = flag(42, "Key of every random draw.", at_least=0, fixed=True)
    device: str | None = flag(None, "cpu, cuda, ...; default the GPU if there is one.")
    dry_run: bool = flag(
        False, "Only check the files, and print size, memory per rank and hours; writes nothing."
    )
    gpu_memory_gb: float | None = flag(
        None, "Memory of a GPU to judge for, in 1e9 bytes; default this one's.", above=0, needs="dry_run"
    )

    def __post_init__(self) -> None:
        # Now, since stages fill in what a command leaves open.
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        self.given = hashlib.sha256(text.encode()).hexdigest()  # a hash: a flag may hold a key

    def check_flags(self) -> None:
        """Steps to take."""
        if self.max_steps == 0:
            raise ValueError("--max_steps 0: nothing to do; -1 = as many as --num_train_epochs give")

    def settle_dtype(self, device_type: str) -> None:
        """Decides --dtype auto; a dry run may judge for a GPU that is not here."""
        if self.dtype == "auto":
            is_gpu = device_type == "cuda" or (self.dry_run and self.gpu_memory_gb is not None)
            self.dtype = "bfloat16" if is_gpu else "float32"

    def agreed(self) -> dict[str, Any]:
        """The flags that change what a step computes: a resumed run must have the same."""
        names = [field.name for field in fields(self) if said_of(type(self), field.name).get("fixed")]
        return {name: getattr(self, name) for name in names}

    def stream(self, run: "Run", mask_id: int, pad_id: int) -> dict[str, Any]:
        """What a `MaskedStream` takes from the flags."""
        names = ["batch_size", "micro_batch_size", "seed"]
        names += [name for name in ("t_sampling", "mask_count") if hasattr(self, name)]
        if self.objective == "block_diffusion":
            names += ["block_size", "t_range"]
        named = {name: getattr(self, name) for name in names}
        row_length = self.max_length if self.packing else 0
        return {**named, "run": run, "mask_id": mask_id, "pad_id": pad_id, "row_length": row_length}

    def resolve(self, run: "Run", num_records: int) -> None:
        """Fills the batch sizes and --max_steps, and checks the numbers against each other."""
        self._resolve_batch(run.world_size)
        if num_records == 0:
            raise ValueError("--train_data_path: no usable record")
        if self.max_steps < 0:
            self.max_steps = max(1, round(self.num_train_epochs * num_records / self.batch_size))

    def _resolve_batch(self, num_ranks: int) -> None:
        accumulation = self.gradient_accumulation_steps
        if self.batch_size is None and self.default_batch_size is None:
            accumulation = accumulation or 1
        if self.micro_batch_size is None:
            whole = self.batch_size or (num_ranks if accumulation else self.default_batch_size)
            self.micro_batch_size = 1 if self.packing else max(1, whole // num_ranks // (accumulation or 1))
        unit = self.micro_batch_size * num_ranks
        if self.batch_size is None:
            self.batch_size = unit * accumulation if accumulation else self.default_batch_size
        if self.batch_size % unit and not self.packing:
            raise ValueError(
                f"--batch_size {self.batch_size} must be a multiple of --micro_batch_size "
                f"{self.micro_batch_size} x {num_ranks} ranks = {unit}"
            )
        if accumulation and self.batch_size != unit * accumulation:
            raise ValueError(
                f"--batch_size {self.batch_size} is not --micro_batch_size {self.micro_batch_size} x "
                f"--gradient_accumulation_steps {accumulation} x {num_ranks} ranks; leave one of them out"
            )
        self.gradient_accumulation_steps = None  # so that config.yaml holds for any number of ranks


@dataclass(kw_only=True)
class RowsConfig(
    BlockNoiseFlags, NoiseFlags, LoraDropoutFlags, ScaleFlags, PrefetchFlags, TrainConfig, MaskTokenFlag
):
    """A run on rows of tokens that are masked."""

    float8: bool = flag(
        False, "Products of the blocks in float8: with torchao, and a GPU of compute capability 8.9 or newer."
    )


def finished_before(config: TrainConfig) -> str | None:
    """What to tell a user whose command has run to its end already; None where there is something to do."""
    done = Path(config.output_dir, "DONE")
    if config.dry_run or not done.is_file() or done.read_text() != config.given:
        return None
    return f"{config.output_dir}: this command has finished before; results.json has its numbers"
