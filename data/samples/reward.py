"""A reward function of your own, for `--reward_funcs data/samples/reward.py:digits`."""

from collections.abc import Sequence
from typing import Any


def digits(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Share of a completion's characters that are digits; None for an empty one. `columns`: other fields."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [sum(c.isdigit() for c in text) / len(text) if text else None for text in texts]
