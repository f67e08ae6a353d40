"""What the sampler works on: prompts aligned on the right, answers of masks, and the block being decided.

B prompts, N sequences (prompts times candidates), A of them at work on a block, L canvas columns = P prompt
columns + answer columns, W columns of a block, E head outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cache_llada import WindowCache
from .generation_config_llada import LLaDAGenerationConfig

Prompts = Tensor | Sequence[Sequence[int]]


def read_prompts(input_ids: Prompts, attention_mask: Tensor | None, mask_id: int) -> list[list[int]]:
    """The prompts as lists of token ids, padding removed."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape [B, P], got {tuple(input_ids.shape)}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids "
                f"{tuple(input_ids.shape)}"
            )
        is_token = attention_mask.bool().cpu()  # what is hidden inside a prompt is as if it were not there
        prompts = [row[kept].tolist() for row, kept in zip(input_ids.cpu(), is_token, strict=True)]
    elif attention_mask is not None:
        raise ValueError("attention_mask goes with a tensor; lists of token ids need none")
    else:
        prompts = [list(prompt) for prompt in input_ids]
    if not prompts:
        raise ValueError("no prompts: input_ids is empty")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; give at least one token, for example BOS")
        if mask_id in prompt:
            raise ValueError(f"prompt {row} contains the mask token {mask_id}; only the answer is masked")
    return prompts


def check_lengths(
    prompts: list[list[int]],
    gen_length: Sequence[int] | None,
    suffixes: Sequence[Sequence[int]],
    settings: LLaDAGenerationConfig,
    max_length: int,
) -> list[int]:
    """The answers' lengths; ValueError unless each fits its prompt, its suffix and the context."""
    lengths = [settings.gen_length] * len(prompts) if gen_length is None else [int(n) for n in gen_length]
    if len(lengths) != len(prompts):
        raise ValueError(f"gen_length has {len(lengths)} entries for {len(prompts)} prompts")
    for length in set(lengths):
        if length < 1:
            raise ValueError(f"gen_length must be from 1, got {length}")
        settings.steps_per_block(length)
    if len(suffixes) != len(prompts):
        raise ValueError(f"suffixes has {len(suffixes)} entries for {len(prompts)} prompts")
    if any(suffixes) and settings.method == "semi_autoregressive_origin":
        raise ValueError("suffixes need a canvas of full length; semi_autoregressive_origin has none")
    for row, (prompt, length, suffix) in enumerate(zip(prompts, lengths, suffixes, strict=True)):
        if len(prompt) + length + len(suffix) > max_length:
            raise ValueError(
                f"prompt {row} of {len(prompt)} tokens and gen_length {length}"
                f"{f' and a suffix of {len(suffix)}' if suffix else ''} exceed the model's context of "
                f"{max_length} tokens"
            )
    return lengths


@dataclass
class Canvas:
    """Prompts aligned on the right, then the answers' masks, and behind each answer its suffix, if any."""

    tokens: Tensor  # [N, L] long
    keep: Tensor | None  # [N, L] long, 0 = padding; None without any
    positions: Tensor | None  # [N, L] long, 0 at the first token; None: the columns
    num_prompt: int  # P
    prompt_lengths: list[int]  # tokens of each prompt, padding excluded
    gen_lengths: list[int]
    ends: list[int]  # answer and suffix together
    pad_id: int

    @classmethod
    def of(
        cls,
        prompts: list[list[int]],
        gen_lengths: list[int],
        suffixes: Sequence[Sequence[int]],
        model: nn.Module,
        pad_id: int,
    ) -> "Canvas":
        ends = [length + len(suffix) for length, suffix in zip(gen_lengths, suffixes, strict=True)]
        num_prompt, num_answer = max(map(len, prompts)), max(ends)
        tokens = torch.full((len(prompts), num_prompt + num_answer), pad_id)
        keep = torch.zeros_like(tokens)
        for row, (prompt, length, suffix) in enumerate(zip(prompts, gen_lengths, suffixes, strict=True)):
            whole = torch.tensor([*prompt, *[model.config.mask_token_id] * length, *suffix])
            columns = slice(num_prompt - len(prompt), num_prompt + ends[row])
            tokens[row, columns], keep[row, columns] = whole, 1
        # true positions, so that rounding in the rotary tables does not depend on the padding either
        positions = (keep.cumsum(dim=1) - 1).clamp_min(0).to(model.device)
        is_full = bool(keep.all())
        return cls(
            tokens=tokens.to(model.device),
            keep=None if is_full else keep.to(model.device),
            positions=None if is_full else positions,
            num_prompt=num_prompt,
            prompt_lengths=[len(prompt) for prompt in prompts],
            gen_lengths=gen_lengths,
            ends=ends,
            pad_id=pad_id,
        )


@dataclass
class Block:
    """One block of the sequences that are still at it."""

    index: int
    start: int  # canvas columns [start, end)
    end: int
    visible: int  # canvas columns that the model sees
    rows: Tensor  # [A] long, canvas rows
    names: list[int]  # the same numbers on the host
    cache: WindowCache | None = None
    window: tuple[int, int] | None = None  # with `FinishedBlocks`: what a forward takes in
    log_p: Tensor | None = None  # [A, W, E] of the last step, for klass
    num_stable: Tensor | None = None  # [A, W] long, for klass
    waits: Tensor | None = None  # [A, W] float, confidence at the time of decision, for ReMDM

    @property
    def width(self) -> int:
        return self.end - self.start

    def select(self, stays: list[bool]) -> None:
        """Lets the other sequences leave."""
        if all(stays):
            return
        chosen = torch.tensor([i for i, stay in enumerate(stays) if stay], device=self.rows.device)
        self.names = [name for name, stay in zip(self.names, stays, strict=True) if stay]
        self.rows = self.rows[chosen.long()]
        if not self.names:
            return
        if self.cache is not None:
            num_branches = self.cache.layers[0].keys.shape[0] // len(stays)
            self.cache.batch_select_indices(
                torch.cat([chosen + branch * len(stays) for branch in range(num_branches)])
            )
        for name in ("log_p", "num_stable", "waits"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[chosen])
