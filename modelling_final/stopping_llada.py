"""What transformers' callers hang on a generation: criteria that stop it, and streamers that show it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from .decoding_llada import Stop
from .generation_config_llada import LLaDAGenerationConfig


def stop_of(
    criteria: Sequence[StoppingCriteria] | None,
    stop_strings: str | list[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Stop | None:
    """A sequence is asked after each of its answer's tokens, as if they had come one by one."""
    criteria = StoppingCriteriaList(criteria or [])
    if stop_strings:
        if tokenizer is None:
            raise ValueError("stop_strings are found in text: give generate() the tokenizer too")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    if not criteria:
        return None

    def stop(row: Tensor, num_answer: int, num_seen: int) -> int | None:
        num_prompt = len(row) - num_answer
        for kept in range(num_seen + 1, num_answer + 1):
            if torch.as_tensor(criteria(row[None, : num_prompt + kept], None)).all():
                return kept
        return None

    return stop


class Stream:
    """Hands a streamer the answer from left to right as it is decided, its end token included."""

    def __init__(
        self,
        streamer: BaseStreamer,
        prompts: list[list[int]],
        settings: LLaDAGenerationConfig,
        end_ids: list[int],
    ) -> None:
        if len(prompts) != 1:
            raise ValueError(f"a streamer shows one answer, and {len(prompts)} are asked for")
        self._streamer, self._end_ids, self._num_sent = streamer, end_ids, 0
        self._tokens: dict[int, int] = {}
        # What may be taken back (ReMDM) or cut off again (criteria) waits for the end.
        self._waits = settings.remdm != "none" or bool(settings.stop_strings)
        streamer.put(torch.tensor(prompts))

    def note(self, entry: dict[str, Any]) -> None:
        """A step's decisions: see `on_step` of `generate`."""
        self._tokens |= dict(zip(entry["positions"], entry["token_ids"], strict=True))
        if not self._waits:
            self._send()

    def end(self, answer: list[int]) -> None:
        """The whole answer [G]; what has not been sent of it is."""
        self._tokens = dict(enumerate(answer))
        self._send()
        self._streamer.end()

    def _send(self) -> None:
        while self._num_sent in self._tokens:
            token = self._tokens[self._num_sent]
            self._streamer.put(torch.tensor([token]))
            self._num_sent += 1
            if token in self._end_ids:
                self._tokens, self._num_sent = {}, -1  # nothing behind the end is shown
