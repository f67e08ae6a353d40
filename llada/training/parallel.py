"""Data parallelism on PyTorch's own engine: replicated (DDP), sharded (FSDP2), or within a node (HSDP).

The loss of a micro-batch is already divided by the units of the global batch, and all three average gradients
over ranks, so the loop multiplies by the number of ranks and the sum comes out.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import psutil
import torch
import torch.distributed as dist
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

from llada.flags.declaration import tell
from llada.run import Run, barrier, max_over_ranks, sum_over_ranks

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


def use_float8(model: nn.Module, *, is_run: bool) -> None:
    """Makes the blocks' products float8, in place; weights, their names and what is saved stay as they are.

    Each product scales both of its factors by their largest value. The head, norms and attention stay.

    ValueError: adapters, no torchao, or for a run a device that has no float8 products.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("--float8: adapters are trained on weights that stay as they are; leave it out")
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise ValueError("--float8: pip install torchao") from error
    if is_run and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        raise ValueError("--float8: needs a GPU of compute capability 8.9 or newer (H100, L40S, ...)")
    # the kernels take sizes in multiples of 16
    convert_to_float8_training(
        model.model.transformer.blocks,
        module_filter_fn=lambda part, _: part.in_features % 16 == part.out_features % 16 == 0,
    )


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


def spread(model: nn.Module, run: Run) -> nn.Module:
    """The model on this rank's device with the values of rank 0, in place. Every rank must call it.

    Other ranks may have built it on the meta device: so a node's memory holds one copy of what was read, at
    most.
    """
    barrier()  # what follows has a limit, and rank 0 may have read a large checkpoint
    _take_values([*model.parameters(), *model.buffers()], run)
    return model


def _take_values(tensors: Iterable[Tensor], run: Run) -> None:
    for tensor in tensors:
        if tensor.is_meta:
            room = torch.empty_like(tensor, device=run.device)
            if isinstance(tensor, nn.Parameter):
                room = nn.Parameter(room, tensor.requires_grad)
            torch.utils.swap_tensors(tensor, room)  # a tied weight stays one
        else:
            tensor.data = tensor.data.to(run.device)
        if run.world_size > 1:
            dist.broadcast(tensor.detach(), src=0)


def parallelize(
    model: torch.nn.Module,
    run: Run,
    *,
    shard: str,
    dtype: str,
    cpu_offload: bool = False,
    reduce_dtype: str = "float32",
) -> torch.nn.Module:
    """The model, spread over the ranks; its products are to run under autocast in `dtype`.

    Sharded and replicated training compute the same: matrices are gathered in `dtype`, which autocast would
    cast them to, and what autocast leaves in float32 stays so.

    Args:
        model: as `spread` takes it; what this rank keeps of it goes to `run.device`.
        shard: "none" replicates; "full" shards weights, gradients and optimizer over all ranks; "hybrid"
            shards them within a node (LOCAL_WORLD_SIZE ranks) and replicates over nodes.
        dtype: of the gathered matrices; the shards stay float32.
        cpu_offload: keep the shards in CPU memory between uses.
        reduce_dtype: in which gradients of the shards are added up, over micro-batches and ranks.
    """
    if shard == "none":
        spread(model, run)
        is_trained = any(parameter.requires_grad for parameter in model.parameters())
        return DistributedDataParallel(model, init_sync=False) if run.world_size > 1 and is_trained else model
    if not dist.is_initialized():
        raise ValueError(f"--shard {shard} needs several processes: start the script with torchrun")
    sizes, names = (run.world_size,), None
    if shard == "hybrid":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", run.world_size))
        sizes, names = (run.world_size // local, local), ("replicate", "shard")
    mesh = init_device_mesh(run.device.type, sizes, mesh_dim_names=names)
    # Norms and biases are small, and rounding the norms' weights would show: they stay whole, in float32.
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    barrier()  # as in `spread`
    _take_values([*vectors, *model.buffers()], run)

    def shard_module(module: nn.Module | list[nn.Module], dtype: torch.dtype | None, **more: bool) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=getattr(torch, reduce_dtype),
            cast_forward_inputs=False,  # it would round rotary tables, loss weights and coefficients
        )
        offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
        # One group after the other is whole on a rank's device, and then a shard.
        groups = module if isinstance(module, list) else [module]
        whole_ones = [p for group in groups for p in group.parameters() if not isinstance(p, DTensor)]
        _take_values([p for p in whole_ones if p.ndim > 1], run)
        fully_shard(
            module, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=set(vectors), **more
        )

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    transformer = base.model.transformer
    if not base.config.weight_tying:  # tied, the embedding is also the head: the root's, gathered throughout
        shard_module(transformer.wte, None)
    for block in transformer.blocks:
        if block.moe is not None:
            shard_module(block.moe.router, None)  # a rounded router sends tokens elsewhere
        shard_module(block, getattr(torch, dtype))
    if not base.config.weight_tying:
        # The head's weight is read, its forward is not called: ln_f's is, just before. Used last in the
        # forward and first in the backward, so not resharded in between.
        tail = [transformer.ln_f, transformer.ff_out]
        shard_module(tail, getattr(torch, dtype), reshard_after_forward=False)
    shard_module(model, None)
    return model


@contextmanager
def free_forwards(model: nn.Module) -> Iterator[None]:
    """Within its body every rank runs as many forwards of a sharded model as it likes, without gradients.

    Weights are gathered once where they fit into what memory is free on every rank. Elsewhere all ranks go
    through each forward together, those that are done with empty ones.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    device = next(parameter.device for parameter in model.parameters() if not isinstance(parameter, DTensor))
    nothing = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        model(input_ids=nothing)  # FSDP finds its root in the first forward
    model.unshard()  # generate() goes past the hooks of a PeftModel, which may be the root
    needed = sum(parameter.numel() * 2 for parameter in base.parameters() if parameter.ndim > 1)
    is_gathered = max_over_ranks(needed - _ROLLOUT_SHARE * _free_memory(device)) <= 0
    how = "weights gathered once a rollout" if is_gathered else "all ranks go through each forward together"
    tell(f"--shard: {how} ({needed / 1e9:.2f} GB in bfloat16)")
    if is_gathered:
        for shard in shards:
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
    else:
        hook = base.register_forward_pre_hook(_join)
    yield
    if not is_gathered:
        hook.remove()
        with torch.no_grad():
            while sum_over_ranks([0.0])[0]:
                base(input_ids=nothing)
    tail = (model, base.model.transformer.ln_f, base.model.transformer.ff_out)
    for shard in shards:
        shard.set_reshard_after_forward(shard not in tail, recurse=False)
        shard.reshard()


def _join(*_: object) -> None:
    """This rank goes into a forward, for which the others then wait."""
    sum_over_ranks([1.0])


_ROLLOUT_SHARE = 0.6  # of the free memory; the rest is for logits and caches of the rollout


def _free_memory(device: torch.device) -> float:
    """Bytes that this rank may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def reduce_vectors(model: nn.Module) -> None:
    """Averages over ranks the gradients of what a sharded model keeps whole."""
    if not isinstance(model, FSDPModule):
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scales the gradients down to this norm over all of them, if it is larger; the norm before."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) == is_sharded] for is_sharded in (True, False)]
    if not all(kinds):
        return whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    # torch does not add up norms of sharded and of whole tensors
    found = [[p.grad for p in kind if p.grad is not None] for kind in kinds]
    norm = math.hypot(*(whole(torch.nn.utils.get_total_norm(gradients)) for gradients in found))
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, torch.tensor(norm))
    return norm


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
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Gathered, a tied head is a tensor of its own: it would be saved beside the embedding, under a name that
    # a family's layout gives to something else.
    for tied in getattr(model, "all_tied_weights_keys", ()):
        state.pop(tied, None)
    return state
