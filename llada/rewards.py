"""Rewards that a program can check. `score` is what the held-out accuracy of the pipeline and of lm_eval
both use."""

import re
from collections.abc import Mapping
from typing import Any

from reasoning_gym import get_score_answer_fn

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)


def final_answer(completion: str) -> str:
    """The completion without its `<think>` part; an unfinished `<think>` leaves no answer at all."""
    answer = _THINK.sub("", completion)
    return answer.partition("<think>")[0].strip()


def score(completion: str, record: Mapping[str, Any]) -> float:
    """1.0 if the completion's final answer solves the record's reasoning-gym puzzle, else 0.0.

    The library's verifiers also give partial credit for wrong answers; only full credit counts here.

    Args:
        completion: generated text, special tokens removed.
        record: `task` (the reasoning-gym data set), `answer` and `metadata` of the puzzle.

    Raises:
        ValueError: the record lacks one of these fields, or names an unknown task.
    """
    missing = [name for name in ("task", "answer", "metadata") if name not in record]
    if missing:
        raise ValueError(f"record {record.get('id')!r}: no field {missing} to check the answer with")
    entry = {"answer": record["answer"], "metadata": record["metadata"]}
    return float(get_score_answer_fn(record["task"])(final_answer(completion), entry) >= 1.0)
