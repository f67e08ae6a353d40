"""A key/value cache whose entries can be overwritten: one (start, end) window covers prefix and dual reuse.

B sequences, L keys held, H key/value heads, D model width.

In a masked diffusion model every step may change any key, so a cache holds values of an earlier step.
Within one forward over unchanged tokens it is exact; across steps it is the approximation that Fast-dLLM
and dInfer make.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# What transformers calls a cache: past_key_values until 5.23, cache since, with a warning for the older name.
CACHE = fields(BaseModelOutputWithPast)[1].name


class WindowLayer(DynamicLayer):
    """One layer's rotated keys and values, [B, H, L, head_dim]; `window` says where the next ones go."""

    window: tuple[int, int] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends, or overwrites the window in place; returns all keys and values."""
        if self.window is None:
            return super().update(key_states, value_states)
        start, end = self.window
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, offset of the first) that the coming forward attends to."""
        return (self.get_seq_length() + (query_length if self.window is None else 0), 0)


class WindowCache(Cache):
    """Keys and values of every layer, reused between denoising steps; for inference only.

        cache = WindowCache(model.config)
        model(x, past_key_values=cache)                 # fills it
        cache.window = (start, end)
        model(x[:, start:end], past_key_values=cache)   # recomputes the window, attends to all of x

    Dual cache: window = (block start, block end). Prefix cache: (block start, L). Give `position_ids` of the
    input rows wherever they are not the column numbers.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(layers=[WindowLayer() for _ in range(config.num_hidden_layers)])
        self.positions: Tensor | None = None  # [B or 1, L] position ids of the keys, for block-causal models
        self.hidden: Tensor | None = None  # [B, L, D] final hidden states, for models with shifted logits

    @property
    def window(self) -> tuple[int, int] | None:
        """Columns [start, end) that the next forward recomputes; None: it appends."""
        return self.layers[0].window

    @window.setter
    def window(self, window: tuple[int, int] | None) -> None:
        if window is not None:
            window, num_keys = (int(window[0]), int(window[1])), self.get_seq_length()
            if not 0 <= window[0] < window[1] <= num_keys:
                raise ValueError(f"window {window} must lie within the {num_keys} keys in the cache")
        for layer in self.layers:
            layer.window = window

    @contextmanager
    def replacing(self, replace_position: Tensor | tuple[int, int]) -> Iterator[None]:
        """Sets the window within a `with` block; takes Fast-dLLM's and dInfer's arguments (`window_of`)."""
        before, self.window = self.window, window_of(replace_position)
        try:
            yield
        finally:
            self.window = before

    def span(self, num_rows: int) -> tuple[int, int]:
        """Columns that a forward over `num_rows` rows fills; ValueError if the window is not as wide."""
        start, end = self.window or (self.get_seq_length(), self.get_seq_length() + num_rows)
        if end - start != num_rows:
            raise ValueError(
                f"the input has {num_rows} rows and cache.window {self.window} has {end - start}"
            )
        return start, end

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the coming forward's first input row."""
        return self.window[0] if self.window else self.get_seq_length(layer_idx)

    def put_positions(self, position_ids: Tensor) -> Tensor:
        """Records the coming forward's position ids [B or 1, rows]; returns those of all keys [B or 1, L]."""
        self.positions = _put(self.positions, position_ids, self.span(position_ids.shape[1]))
        return self.positions

    def put_hidden(self, hidden: Tensor) -> Tensor:
        """Records final hidden states [B, rows, D] of the last forward; returns their left neighbours."""
        num_keys = self.get_seq_length()
        span = self.window or (num_keys - hidden.shape[1], num_keys)
        self.hidden = _put(self.hidden, hidden, span)
        columns = torch.arange(*span, device=hidden.device) - 1
        return self.hidden[:, columns.clamp_min(0)]  # column 0 has nothing to its left and gets itself

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` columns (transformers' convention: a negative count)."""
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self._change_tables(lambda table: table[:, :tokens_to_remove])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences of the batch, in this order (indices, or a boolean mask)."""
        super().batch_select_indices(indices)
        self._change_tables(lambda table: table[indices] if len(table) > 1 else table)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence of the batch `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._change_tables(lambda table: table.repeat_interleave(repeats, 0) if len(table) > 1 else table)

    def reset(self) -> None:
        """Empties the cache and takes the window away."""
        super().reset()
        self.window = self.positions = self.hidden = None

    def _change_tables(self, change: Callable[[Tensor], Tensor]) -> None:
        self.positions = None if self.positions is None else change(self.positions)
        self.hidden = None if self.hidden is None else change(self.hidden)


def window_of(replace_position: Tensor | tuple[int, int]) -> tuple[int, int]:
    """The (start, end) window that Fast-dLLM's boolean mask [B, L] or dInfer's pair means, or ValueError."""
    if not isinstance(replace_position, Tensor):
        return replace_position
    mask = replace_position.bool()
    columns = mask[0].nonzero()[:, 0]
    start, end = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
    if not (len(columns) == end - start > 0 and bool((mask == mask[:1]).all())):
        raise ValueError(
            "replace_position must mark one contiguous span, the same in every sequence of the batch"
        )
    return start, end


def _put(table: Tensor | None, values: Tensor, span: tuple[int, int]) -> Tensor:
    """`table` with columns `span` set to `values`, lengthened if the span starts at its end."""
    if table is None:
        return values
    batch = max(len(table), len(values))
    table = table.expand(batch, *table.shape[1:])
    if span[0] == table.shape[1]:
        return torch.cat([table, values.expand(batch, *values.shape[1:])], dim=1)
    table = table.clone()  # the caller may still hold the one before
    table[:, span[0] : span[1]] = values
    return table
