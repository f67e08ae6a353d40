"""How blocks are run in training: what their backward recomputes, and whether they are compiled.

Both wrap each block by itself, never the whole model: a block is compiled once and its code serves all of
them, and the units are those that sharded training gathers and frees.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

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
