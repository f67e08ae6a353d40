"""Data parallelism on PyTorch's own engine: replicated (DDP), sharded (FSDP2), or within a node (HSDP).

The loss of a micro-batch is already divided by the units of the global batch, and all three average gradients
over ranks, so the loop multiplies by the number of ranks and the sum comes out.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from llada.run import Run

_aten = torch.ops.aten
_MATRIX_PRODUCTS = {_aten.mm.default, _aten.addmm.default}
# Attention is never run again: of all operations it takes the most time for what it leaves in memory.
_ATTENTION = {
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}


def wrap_blocks(model: nn.Module, *, activation_checkpointing: str, compile: bool) -> None:
    """Makes every block of the model (a PeftModel too) recompute and compile as the flags say, in place.

    Args:
        activation_checkpointing: "none" keeps all that a block's backward reads; "selective" keeps its input,
            attention and every second matrix product, and computes the rest again; "full" keeps its input.
        compile: torch.compile, one block at a time.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    for block in base.model.transformer.blocks:
        if activation_checkpointing != "none":
            # Non-reentrant, so that it also works when the embedding is frozen. Inside the compiled part, so
            # that the compiler sees what is kept.
            options: dict[str, Any] = {"use_reentrant": False}
            if activation_checkpointing == "selective":
                options["context_fn"] = _selective_contexts
            block.forward = _recomputed(block.forward, options)
        if compile:
            block.compile()


def _recomputed(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    # A function of this file, not a partial: the compiler starts at ours and passes torch's own by.
    def with_checkpoint(*inputs: Any, **named_inputs: Any) -> Tensor:
        return checkpoint(forward, *inputs, **options, **named_inputs)

    return with_checkpoint


def _selective_contexts() -> tuple[Any, Any]:
    """Contexts of the forward and of the second forward, each with its own count of matrix products."""
    counts = {False: 0, True: 0}

    def policy(context: SelectiveCheckpointContext, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operation in _MATRIX_PRODUCTS:
            counts[context.is_recompute] += 1
            keep = counts[context.is_recompute] % 2 == 1
        else:
            keep = operation in _ATTENTION or "varlen_attn" in str(operation)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def parallelize(
    model: torch.nn.Module, run: Run, *, shard: str, dtype: str, cpu_offload: bool = False
) -> torch.nn.Module:
    """The model, spread over the ranks.

    Args:
        model: on the CPU; what this rank keeps of it is moved to `run.device`.
        shard: "none" replicates; "full" shards weights, gradients and optimizer over all ranks; "hybrid"
        shards
            them within a node (LOCAL_WORLD_SIZE ranks) and replicates over nodes.
        dtype: of the gathered parameters; the shards, and the reduction of gradients, stay float32.
        cpu_offload: keep the shards in CPU memory between uses.
    """
    if shard == "none":
        model.to(run.device)
        return DistributedDataParallel(model) if run.world_size > 1 else model
    if run.world_size == 1:
        raise ValueError(f"--shard {shard} needs several processes: start the script with torchrun")
    if shard == "hybrid":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", run.world_size))
        mesh = init_device_mesh(
            run.device.type, (run.world_size // local, local), mesh_dim_names=("replicate", "shard")
        )
    else:
        mesh = init_device_mesh(run.device.type, (run.world_size,))
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    transformer = (
        model.get_base_model().model.transformer if hasattr(model, "peft_config") else model.model.transformer
    )
    fully_shard(transformer.wte, **options)
    for block in transformer.blocks:
        fully_shard(block, **options)
    # The tail is used last in the forward and first in the backward, so it is not resharded in between.
    fully_shard([transformer.ln_f, transformer.ff_out], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    return model


def gradient_sync(model: torch.nn.Module, *, last: bool) -> AbstractContextManager:
    """Within the body, gradients are averaged over ranks only for the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def whole(value: torch.Tensor) -> float:
    """The number in a scalar that may be sharded, such as a gradient norm."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def full_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """All weights of a sharded model, on the CPU of rank 0; None where every rank holds them anyway.

    Every rank must call it.
    """
    if not isinstance(model, FSDPModule):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
