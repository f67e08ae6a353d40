"""The sampler's forward without what stands between the operations: `LLaDAModelLM.forward` to the bit.

On short inputs a CPU spends more time on module calls, hooks and configs than on arithmetic. So the blocks'
own `forward` runs on stand-ins that hold plain functions, and rotary tables are looked up.

B sequences, L input rows, R rows wanted, E head outputs.
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention_llada import LLaDAAttention, make_attention_mask, plain_attention, take_rows
from .block_llada import LLaDALlamaBlock, LLaDARMSNorm
from .cache_llada import WindowCache

VARYING_ROPE = ("dynamic", "longrope")  # their frequencies depend on the length of the input


def has_adapter_of_each_row(model: nn.Module) -> bool:
    """Whether peft's `adapter_names` are on: it counts the rows of every forward, so that none may leave."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks)


def _function(part: nn.Module, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """The part's `forward`; of plain ones, once weights are looked up, one call. dtype: of activations."""
    if "forward" in vars(part):  # put there by accelerate, which moves weights to and fro
        return part.forward
    if type(part) is nn.Linear:
        return partial(F.linear, weight=part.weight, bias=part.bias)
    if isinstance(part, LLaDARMSNorm) and part.is_fused(dtype):
        return partial(torch.rms_norm, normalized_shape=part.weight.shape, weight=part.weight, eps=part.eps)
    if isinstance(part, LLaDAAttention) and part.is_plain:
        return partial(plain_attention, scaling=part.scaling)
    return part.forward


class _Layer:
    """A block as `LLaDALlamaBlock.forward` sees it: its parts are their `forward`s, its numbers plain."""

    training = False
    q_norm = k_norm = moe = None  # a block has them or not
    forward = inspect.unwrap(LLaDALlamaBlock.forward)  # transformers wraps it for recomputing
    _heads = LLaDALlamaBlock._heads

    def __init__(self, block: LLaDALlamaBlock, dtype: torch.dtype | None) -> None:
        for name, part in block.named_children():
            setattr(self, name, _function(part, dtype))
        self.layer_idx, self.head_dim = block.layer_idx, block.head_dim
        self.full_precision, self.norms_whole = block.full_precision, block.norms_whole


class LeanForward:
    """Forwards of a model in eval mode, whose modules stay what they are while this is in use."""

    def __init__(self, model: nn.Module, num_positions: int) -> None:
        """Args: num_positions: position ids are below this."""
        self.config, transformer = model.config, model.model.transformer
        # under autocast activations are of two types, which each norm has to look at
        dtype = None if torch.is_autocast_enabled(model.device.type) else transformer.wte.weight.dtype
        self.embed, self.norm = transformer.wte.forward, _function(transformer.ln_f, dtype)
        self.head = transformer.ff_out.forward
        self.layers = [_Layer(block, dtype) for block in transformer.blocks]
        positions = torch.arange(num_positions, device=model.device)[None]
        self.cos, self.sin = (table[0] for table in model.model.rotary_emb(positions, positions))

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether a forward of the model is its modules' own `forward`s: no hooks, shards or compiling."""
        if not hasattr(getattr(model, "model", None), "transformer") or model.config.logit_shift:
            return False
        blocks = model.model.transformer.blocks
        return (
            model.config.rope_parameters["rope_type"] not in VARYING_ROPE
            and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
            and all(block._compiled_call_impl is None for block in blocks)
        )

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_positions: Tensor | None = None,
        past_key_values: WindowCache | None = None,
    ) -> Tensor:
        """Logits [B, R, E]; arguments as in `LLaDAModelLM.forward`."""
        cache, num_rows = past_key_values, input_ids.shape[1]
        if position_ids is None:
            start, end = cache.span(num_rows) if cache is not None else (0, num_rows)
            position_ids = torch.arange(start, end, device=input_ids.device)[None]
        hidden = self.embed(input_ids)
        mask = make_attention_mask(
            self.config,
            hidden,
            attention_mask=attention_mask,
            attention_bias=None,
            key_positions=position_ids if cache is None else cache.put_positions(position_ids),
            cache=cache,
        )
        rotary = self.cos[position_ids][:, :, None], self.sin[position_ids][:, :, None]
        # all rows, if in another order: the last block would save nothing
        takes_all = query_positions is not None and query_positions.shape[1] == num_rows
        last = self.layers[-1]
        for layer in self.layers:
            wanted = query_positions if layer is last and not takes_all else None
            hidden = layer.forward(hidden, mask, rotary, cache, wanted)
        if takes_all:
            (hidden,) = take_rows(query_positions, hidden)
        return self.head(self.norm(hidden))
