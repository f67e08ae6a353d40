"""Completions of a model, scored: what GRPO learns from and preference data are made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from llada.data.final_answer import THINK, opens_thought
from llada.data.prompts import Prompt
from llada.rewards.scoring import Reward, compute_rewards
from llada.training.parallel import free_forwards
from modelling_final import LLaDAGenerationConfig, LLaDAModelLM

_TRACED = ("block", "positions", "token_ids")


@dataclass
class Completion:
    """An answer, what it earned, and what is remembered of the policy that gave it."""

    prompt: int  # index of the prompt in its file
    candidate: int
    answer: list[int]  # token ids, the closing EOS or EoT included
    text: str
    has_ended: bool
    steps: int  # forwards
    trace: list[dict[str, Any]] | None
    place: int = 0  # of its group in the global batch
    reward: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    advantage: float = 0.0
    canvas: list[int] = field(default_factory=list)  # all tokens sampled, where those behind the end count
    # For each set of masks the log-likelihood of its terms, under the policy that gave it and the reference.
    old: list[list[float]] | None = None
    ref: list[list[float]] | None = None


def as_messages(text: str, *, chat: bool) -> str | list[dict[str, str]]:
    """A completion in the form of the records: a text, or one assistant message."""
    return [{"role": "assistant", "content": text}] if chat else text


@dataclass
class Sampler:
    """Samples and scores completions."""

    model: LLaDAModelLM
    tokenizer: PreTrainedTokenizerBase
    rewards: list[Reward]
    settings: LLaDAGenerationConfig
    batch_size: int  # sequences generated together
    chat: bool  # rewards see messages, not texts
    keep_trace: bool = False  # note what every step decided, for the likelihood of the trajectory
    keep_canvas: bool = False  # note what was sampled behind the end

    def answer(self, prompts: Sequence[Prompt], *, seed: int, num_generations: int) -> list[Completion]:
        """`num_generations` completions of each prompt, scored; a prompt's are after one another."""
        completions: list[Completion] = []
        stride = max(1, self.batch_size // num_generations)
        with free_forwards(self.model):  # ranks have other prompts, which take other numbers of steps
            for start in range(0, len(prompts), stride):
                completions += self._sample(prompts[start : start + stride], seed, num_generations)
        owners = [prompt for prompt in prompts for _ in range(num_generations)]
        # a template may have opened the thought that a completion begins in
        opened = {p.index: THINK * opens_thought(self.tokenizer.decode(p.token_ids[-16:])) for p in prompts}
        texts = [opened[completion.prompt] + completion.text for completion in completions]
        totals, table = compute_rewards(
            self.rewards,
            [owner.prompt for owner in owners],
            [as_messages(text, chat=self.chat) for text in texts],
            [owner.record for owner in owners],
            where=[owner.where for owner in owners],
            completion_ids=[completion.answer for completion in completions],
            num_forwards=[completion.steps for completion in completions],
            was_cut=[not completion.has_ended for completion in completions],
        )
        for i, completion in enumerate(completions):
            completion.reward = _or_none(totals[i])
            completion.rewards = {name: _or_none(values[i]) for name, values in table.items()}
        return completions

    def _sample(self, prompts: Sequence[Prompt], seed: int, num_generations: int) -> list[Completion]:
        output = self.model.generate(
            [prompt.token_ids for prompt in prompts],
            generation_config=self.settings,
            return_dict_in_generate=True,
            record_ids=[prompt.index for prompt in prompts],
            return_trace=self.keep_trace,
            num_return_sequences=num_generations,
            seed=seed,
        )
        length = self.settings.gen_length
        rows, sizes = output.sequences[:, -length:].tolist(), output.lengths.tolist()
        traces: list[list[dict[str, Any]]] = [[] for _ in rows]
        for entry in output.trace or ():
            traces[entry["row"]].append({name: entry[name] for name in _TRACED})
        return [
            Completion(
                prompt=prompts[i // num_generations].index,
                candidate=i % num_generations,
                answer=row[: min(size + 1, length)],  # with the end token
                text=self.tokenizer.decode(row[:size], skip_special_tokens=True),
                has_ended=size < length,
                steps=int(output.steps[i]),
                trace=traces[i] if self.keep_trace else None,
                canvas=row if self.keep_canvas else [],
            )
            for i, (row, size) in enumerate(zip(rows, sizes, strict=True))
        ]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
