"""The preflight that `--dry_run` runs: is everything there, does it fit together, and what will it cost?

Reads configs, the tokenizer, the headers of weight files and a sample of the data; builds the model on the
meta device, where tensors have shapes and no values; writes nothing. `torchrun` and SLURM variables say how
many ranks there are, so a large job can be tried in one process:

    WORLD_SIZE=64 LOCAL_WORLD_SIZE=8 python pretraining/pretrain.py ... --shard hybrid --dry_run
"""

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llada.data.files import files_of
from llada.data.prepared import is_usable
from llada.data.rows import Rows
from llada.data.shards import read_manifest
from llada.flags.recipes import RecipeFlags
from llada.models.building import run_tokenizer
from llada.models.checkpoints import base_and_adapter, check_weight_files, load_config
from llada.run import described_run
from llada.training.checkpoint import check_meta, find_resume, read_meta
from llada.training.config import TrainConfig
from llada.training.cost import (
    ADAMW_BYTES,
    FLOAT32,
    GB,
    Parameters,
    Ranks,
    count_parameters,
    flops_per_token,
    memory,
)
from llada.training.loop import Load, load_with_ids
from llada.training.monitor import peak_flops
from modelling_final import LLaDAConfig, LLaDAModelLM

SAMPLE_RECORDS = 256  # of raw files; enough for lengths within a few per cent
MFU = 0.4  # a usual share of a GPU's peak
GAPS, CONTEXT = 1.1, 1e9  # what the allocator and CUDA take on top
STATE = ("weights", "experts", "gradients", "AdamW")  # what --cpu_offload moves


@dataclass(frozen=True)
class DataSize:
    """How much data there is; estimated from its first records where `is_exact` is False."""

    num_rows: float
    num_tokens: float
    num_maskable: float
    is_exact: bool

    def times(self, factor: float) -> "DataSize":
        return DataSize(factor * self.num_rows, factor * self.num_tokens, factor * self.num_maskable, False)


DataSizeOf = Callable[[str, PreTrainedTokenizerBase], DataSize]
"""(path, tokenizer) -> its rows; ValueError where the stage could not read it."""


def data_rows(path: str, tokenizer: PreTrainedTokenizerBase, *, kind: Rows) -> DataSize:
    """The rows that a stage gets from `path`: counted where it is prepared, else estimated."""
    if is_usable(path, kind, tokenizer):
        counts = read_manifest(path)["statistics"]
        return DataSize(counts["rows"], counts["tokens"], counts.get("answer_tokens", counts["tokens"]), True)
    used = 0

    def on_bytes(count: int) -> None:
        nonlocal used
        used += count

    records = kind.items([path], Counter(), on_bytes=on_bytes)
    items = list(islice(records, SAMPLE_RECORDS))
    columns, counts = kind.encode(items, tokenizer=tokenizer)
    counts["rows"] = len(kind.join([columns])["input_ids"])
    if not counts["rows"]:
        raise ValueError(f"{path}: no usable row in its first {len(items)} records; counts: {dict(counts)}")
    found = DataSize(counts["rows"], counts["tokens"], counts.get("answer_tokens", counts["tokens"]), True)
    num_read = len(items)
    while next(records, None) is not None:
        if used:  # bytes are told for whole lines or batches, when the record after them is asked for
            size = sum(file.stat().st_size for file in files_of(path))
            return found.times(size / used * num_read / len(items))
        num_read += 1
    return found


def _mixture(parts: list[DataSize], weights: Sequence[float] | None) -> DataSize:
    """All parts once, or as `llada.data.prepared.interleave` mixes them: until each has been seen in full."""
    if weights:
        if len(weights) != len(parts):
            raise ValueError(f"--data_weights has {len(weights)} numbers for {len(parts)} data sets")
        shares = [weight / sum(weights) for weight in weights]
        total = max(part.num_rows / share for part, share in zip(parts, shares, strict=True))
        parts = [p.times(total * share / p.num_rows) for p, share in zip(parts, shares, strict=True)]
    sums = [sum(getattr(part, name) for part in parts) for name in ("num_rows", "num_tokens", "num_maskable")]
    return DataSize(*sums, is_exact=all(part.is_exact for part in parts))


def report(
    config: TrainConfig,
    rows_of: DataSizeOf,
    *,
    train: Sequence[str],
    held_out: str | Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    chat: bool = False,
    load: Load = load_with_ids,
) -> None:
    """Checks the files of a training stage and prints what the run will be. Rank 0 alone does it.

    Args:
        rows_of: how the stage reads its data.
        train, held_out, weights: the data and the share of each.
        load: the stage's model and its special tokens.

    ValueError: whatever would stop the run itself, or a GPU that is too small.
    """
    run = described_run(config.device)
    if not run.is_main:
        return
    if isinstance(config, RecipeFlags):
        config.tell_recipe(None)
    config.settle_dtype(run.device.type)
    ranks = Ranks.of(config.shard, run.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", run.world_size)))
    tokenizer = run_tokenizer(config, chat=chat)
    model, ids = load(config, tokenizer, device="meta")
    shape = (model.get_base_model() if hasattr(model, "peft_config") else model).config
    files = _check_files(config, shape)
    parameters = count_parameters(model)
    rows = _mixture([rows_of(path, tokenizer) for path in train], weights)
    config.resolve(run, int(rows.num_rows))
    parts = memory(shape, config, parameters, ranks, length=config.max_length)
    on_device = sum(size for kind, size in parts.items() if not (config.cpu_offload and kind in STATE))
    needed, available = GAPS * on_device + CONTEXT, _gpu_memory(config)
    share = parameters.trainable / parameters.total
    lines = [
        ("checkpoint", files),
        ("parameters", f"{parameters.total:,}, trainable {parameters.trainable:,} ({share:.2%})"),
        (
            "vocabulary",
            f"{len(tokenizer)} tokens, {getattr(shape, 'embedding_size', shape.vocab_size)} rows; "
            f"mask {ids.mask}, eos {ids.eos}, pad {ids.pad}, eot {ids.eot}",
        ),
        ("data", _describe_rows(rows)),
    ]
    for path in [held_out] if isinstance(held_out, str) else held_out or []:
        lines.append(("held out", _describe_rows(rows_of(path, tokenizer))))
    lines += _describe_steps(config, rows, ranks)
    if isinstance(shape, LLaDAConfig):
        lines += _describe_cost(config, shape, parameters, rows, ranks)
    lines += _describe_memory(parts, config, needed, available)
    lines += _describe_output(config, parameters)
    for name, text in lines:
        print(f"{name:>15}  {text}")
    print("dry run: nothing was loaded, nothing was written", flush=True)
    if available is not None and needed > available:
        raise ValueError(
            f"--micro_batch_size {config.micro_batch_size}: a rank needs {needed / GB:.1f} GB and has "
            f"{available / GB:.1f}. --gradient_checkpointing, --dtype bfloat16, --shard full, --use_lora or "
            "smaller micro-batches need less"
        )


def _check_files(config: TrainConfig, shape: PretrainedConfig) -> str:
    """What the run starts from, after a look at its weight files."""
    if getattr(config, "config_name", None) is not None:
        return f"{config.config_name}, new weights"
    base, _ = base_and_adapter(config.model_name_or_path)
    model = None
    if isinstance(shape, LLaDAConfig):
        with torch.device("meta"):
            mask_token_id = getattr(config, "mask_token_id", None)
            model = LLaDAModelLM(load_config(base, mask_token_id=mask_token_id))
    size = check_weight_files(base, model)
    if not size and Path(base).is_dir() and not list(Path(base).glob("*.bin")):
        raise ValueError(f"--model_name_or_path {base}: no weights there, only a configuration")
    note = f"{size / GB:.2f} GB of weights" if size else "weights not looked at (no safetensors here)"
    return f"{config.model_name_or_path}, {note}"


def _describe_rows(rows: DataSize) -> str:
    about = "" if rows.is_exact else "about "
    share = rows.num_maskable / max(1, rows.num_tokens)
    return f"{about}{rows.num_rows:,.0f} rows, {rows.num_tokens:,.0f} tokens, {share:.0%} of them maskable"


def _describe_steps(config: TrainConfig, rows: DataSize, ranks: Ranks) -> list[tuple[str, str]]:
    epochs = config.max_steps * config.batch_size / rows.num_rows
    tokens = config.batch_size * rows.num_tokens / rows.num_rows
    at_once = config.micro_batch_size * ranks.world_size
    accumulation = config.batch_size // at_once
    batch = f"{config.batch_size} rows"
    if config.packing:
        accumulation = max(1, math.ceil(tokens / config.max_length / at_once))
        batch = f"{config.batch_size} records in about {tokens / config.max_length:.1f} packed rows"
    return [
        ("batch", f"{batch} = {ranks.world_size} ranks x {config.micro_batch_size} x "
         f"{accumulation} micro-batches"),
        ("steps", f"{config.max_steps:,} = {epochs:.2f} epochs; {tokens:,.0f} tokens a step"),
    ]  # fmt: skip


def _describe_cost(
    config: TrainConfig, shape: LLaDAConfig, parameters: Parameters, rows: DataSize, ranks: Ranks
) -> list[tuple[str, str]]:
    tokens = config.batch_size * rows.num_tokens / rows.num_rows
    settings = {
        "length": min(config.max_length, round(rows.num_tokens / rows.num_rows)),
        # t is uniform on (0, 1): half of what can be masked is
        "masked_share": 0.5 * rows.num_maskable / rows.num_tokens,
    }
    useful = tokens * flops_per_token(shape, parameters, **settings)
    seconds = useful / (ranks.world_size * peak_flops("H100", config.dtype) * MFU)
    text = f"{useful:.3g} FLOPs a step; {seconds:.3g} s at {MFU:.0%} MFU of an H100 per rank"
    return [("compute", text), ("time", f"{seconds * config.max_steps / 3600:.3g} hours at that rate")]


def _gpu_memory(config: TrainConfig) -> float | None:
    """Bytes of the GPU to judge for: the flag's, else this machine's."""
    if config.gpu_memory_gb is not None:
        return config.gpu_memory_gb * GB
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _describe_memory(
    parts: Mapping[str, float], config: TrainConfig, needed: float, available: float | None
) -> list[tuple[str, str]]:
    lines = [
        (kind, f"{size / GB:9.3f} GB{' (CPU)' * (config.cpu_offload and kind in STATE)}")
        for kind, size in parts.items()
    ]
    verdict = "--gpu_memory_gb 80 judges for a GPU of that size"
    if available is not None:
        verdict = f"{'fits' if needed <= available else 'DOES NOT FIT'} into {available / GB:.1f} GB"
    at = f"a rank with context and gaps, at micro-batches of {config.micro_batch_size} x {config.max_length}"
    return [*lines, ("memory", f"{needed / GB:9.3f} GB {at}; {verdict}")]


def _describe_output(config: TrainConfig, parameters: Parameters) -> list[tuple[str, str]]:
    """Where the run goes, whether it continues another, and whether its states fit on the disk."""
    folder = Path(config.output_dir)
    state = find_resume(folder, config.resume_from_checkpoint)
    begins = "a new run"
    if state is not None:
        check_meta(state, config.agreed())
        begins = f"continues {state} at step {read_meta(state)['step']}"
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    size = (FLOAT32 + ADAMW_BYTES) * parameters.trainable / GB
    free = shutil.disk_usage(existing).free / GB
    needed = (config.save_total_limit + 1) * size  # the newest is complete before the oldest goes
    text = f"{size:.3f} GB a state, {needed:.3f} GB with --save_total_limit, {free:.1f} GB free"
    return [("output", f"{folder}: {begins}"), ("disk", text + (": TOO LITTLE" if needed > free else ""))]
