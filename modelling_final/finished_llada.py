"""Keys and values of finished blocks, for models that attend by blocks: there a cache changes no token.

In such a model a finished block is not seen from by any later one: its keys and values are what they are. So
they are computed once, and a step's forward takes in the current block alone.

A sequences of a group, L canvas columns, b positions of an attention block.
"""

from copy import copy

import torch
from torch import nn

from .cache_llada import WindowCache
from .canvas_llada import Canvas


class FinishedBlocks:
    """A cache of the canvas columns [0, `num_columns`) of some sequences, which grows block by block."""

    def __init__(self, model: nn.Module, canvas: Canvas, names: list[int]) -> None:
        if model.config.attention_pattern != "block_causal":
            raise ValueError("cache blocks needs a model that attends by blocks; here it is prefix or dual")
        self.model, self.canvas, self.names = model, canvas, list(names)
        self.cache, self.num_columns = WindowCache(model.config), 0

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The columns that a forward for [start, end) needs: whole attention blocks of every sequence.

        Attention blocks are counted from each sequence's first token, sampling blocks from the answer's.
        """
        size = self.model.config.attention_block_size
        offsets = [self.canvas.prompt_lengths[name] - self.canvas.num_prompt for name in self.names]
        return (
            min(start - (start + offset) % size for offset in offsets),
            max(end + -(end + offset) % size for offset in offsets),
        )

    @torch.no_grad()
    def grow(self, names: list[int], num_columns: int, num_decided: int) -> None:
        """Takes in the columns up to `num_columns` of the sequences that are still at work.

        Those up to `num_decided` are read: where sequences' blocks begin at other columns, `num_columns` lies
        within a finished block of some of them, which must be seen whole.
        """
        if names != self.names:
            stays = torch.tensor([self.names.index(name) for name in names], device=self.model.device)
            if self.num_columns:
                self.cache.batch_select_indices(stays)
            self.names = names
        if num_columns <= self.num_columns:
            return
        rows, columns = torch.tensor(names, device=self.model.device), slice(self.num_columns, num_decided)
        tokens, keep, positions = self.canvas.tokens, self.canvas.keep, self.canvas.positions
        self.model(
            tokens[rows, columns],
            attention_mask=None if keep is None else keep[rows, :num_decided],
            past_key_values=self.cache,
            position_ids=None if positions is None else positions[rows, columns],
            logits_to_keep=1,
        )
        if num_decided > num_columns:
            self.cache.crop(num_columns - num_decided)
        self.num_columns = num_columns

    def continued(self) -> WindowCache:
        """A cache that begins with these columns and can be appended to; this one stays as it is."""
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in self.cache.layers]  # appending makes new tensors
        return cache
