"""Rewards that a program can check.

A reward is a function of a completion's text and of the record's fields that it names; `of_each` makes of it
a function of TRL's signature, which gives one value a completion, None where it has nothing to say:

    def reward(prompts, completions, **columns) -> list[float | None]

Ours read the part of a completion behind its `<think>`, and stay harmless whatever the text is: see
llada/rewards/sandbox.py. To add one, write it here and add it to BUILT_IN.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llada.rewards import verifiers
from llada.rewards.sandbox import ConfinedModule, on_all_cores, runs_through
from llada.rewards.verifiers import cells, code_blocks, final_answer

RewardFunction = Callable[..., Any]
Values = list[float | None]

SECONDS = 5.0  # for one answer

_libraries = ConfinedModule("llada.rewards.verifiers", prepare="import_libraries")


def text_of(completion: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a completion, given as text or as messages."""
    return completion if isinstance(completion, str) else "".join(m["content"] for m in completion)


def of_each(reward: Callable[..., float | None]) -> RewardFunction:
    """The reward of many completions, of TRL's signature, from `reward(text, *, field, ...)` of one.

    A field is the record's own, else that of its `metadata`. A record that lacks one has no reward, unless
    the field has a default.

    Raises:
        ValueError: no record has such a field.
    """
    fields = list(inspect.signature(reward).parameters.values())[1:]

    @functools.wraps(reward)
    def of_all(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Values:
        for field in fields:
            if field.default is field.empty and not {field.name, "metadata"} & columns.keys():
                raise ValueError(
                    f"--reward_funcs {reward.__name__}: the records have no field {field.name!r} "
                    f"(nor 'metadata'); fields are {sorted(columns)}"
                )

        def of_one(i: int) -> float | None:
            values = {}
            for field in fields:
                value = columns[field.name][i] if field.name in columns else None
                if value is None and columns.get("metadata") is not None:
                    value = (columns["metadata"][i] or {}).get(field.name)
                if value is None and field.default is field.empty:
                    return None
                values[field.name] = field.default if value is None else value
            found = reward(text_of(completions[i]), **values)
            return None if found is None else float(found)

        return on_all_cores(of_one, range(len(completions)))

    return of_all


@of_each
def reasoning_gym_partial(text: str, *, task: str, answer: Any, metadata: Any) -> float:
    """reasoning-gym's own score of the final answer, from 0 to 1: most tasks give credit for a near miss."""
    entry = {"answer": answer, "metadata": metadata}
    given = final_answer(text)
    return _libraries.call("reasoning_gym", task, given, entry, seconds=SECONDS, failed=0.0)


@of_each
def reasoning_gym(text: str, *, task: str, answer: Any, metadata: Any) -> bool:
    """Whether the final answer solves the puzzle: full marks of reasoning-gym's own verifier of `task`."""
    return reasoning_gym_partial.__wrapped__(text, task=task, answer=answer, metadata=metadata) >= 1.0


def puzzle_solved(completion: str, record: Mapping[str, Any]) -> float:
    """`reasoning_gym` of one completion: what held-out accuracy counts, in the pipeline and in lm_eval.

    Raises:
        ValueError: the record lacks `task`, `answer` or `metadata`, or names an unknown task.
    """
    missing = [name for name in ("task", "answer", "metadata") if name not in record]
    if missing:
        raise ValueError(f"record {record.get('id')!r}: no field {missing} to check the answer with")
    return float(
        reasoning_gym.__wrapped__(completion, **{n: record[n] for n in ("task", "answer", "metadata")})
    )


@of_each
def format(text: str) -> bool:
    """Whether the completion is `<think>`, a thought, `</think>`, an answer."""
    return verifiers.is_thought_format(text)


@of_each
def sudoku(text: str, *, puzzle: Any) -> bool:
    """Whether the final answer fills `puzzle`, digits or rows, by the rules."""
    return verifiers.sudoku_solved(final_answer(text), cells(puzzle))


@of_each
def countdown(text: str, *, numbers: Sequence[Any], target: Any) -> bool:
    """Whether the final answer makes `target` of all `numbers`, each once."""
    return verifiers.countdown_solved(final_answer(text), [int(n) for n in numbers], int(target))


@of_each
def math(text: str, *, answer: Any) -> bool | None:
    """Whether the final answer has the value of `answer` (GSM8K's text with `####`, LaTeX, or a number).

    None where `answer` is no mathematics.
    """
    return _libraries.call("math_equal", final_answer(text), str(answer), seconds=SECONDS, failed=False)


@of_each
def code(text: str, *, test: str, entry_point: str | None = None) -> bool:
    """Whether the program in the completion passes `test`, run in a process of its own with limits.

    With `entry_point`, `test` defines check(candidate), as in HumanEval.
    """
    program = program_of(final_answer(text), entry_point)
    check = f"check({entry_point})\n" if entry_point else ""
    return runs_through(f"{program}\n\n{test}\n{check}", seconds=SECONDS)


def program_of(answer: str, entry_point: str | None) -> str:
    """The fenced block that defines `entry_point`, else the last one, else all of the answer."""
    blocks = code_blocks(answer)
    defining = [block for block in blocks if entry_point and f"def {entry_point}" in block]
    return [answer, *blocks, *defining[:1]][-1]


BUILT_IN: dict[str, RewardFunction] = {
    reward.__name__: reward
    for reward in (reasoning_gym, reasoning_gym_partial, format, math, sudoku, countdown, code)
}
