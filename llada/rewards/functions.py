"""Rewards that a program can check: functions of a completion's text and of the record's fields they name.

`of_each` gives them TRL's signature, one value a completion, None where a reward has nothing to say:

    def reward(prompts, completions, **columns) -> list[float | None]

To add one, write it here and add it to BUILT_IN. What each accepts: docs/grpo.md.
"""

import ast
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from llada.data.final_answer import (
    code_blocks,
    final_answer,
    last_tag,
    said_last,
    undressed,
    without_thoughts,
)
from llada.rewards import verifiers
from llada.rewards.mathematics import canonical, compare, is_comparable
from llada.rewards.sandbox import ConfinedModule, on_all_cores, runs_through
from llada.rewards.verifiers import cells, has_format

RewardFunction = Callable[..., Any]
Values = list[float | None]

SECONDS = 5.0  # for one answer

# One process a rank for all rewards: its imports take seconds, and it stands still while nobody asks.
_libraries = ConfinedModule("llada.rewards.verifiers", prepare="import_libraries")


def text_of(completion: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a completion, given as text or as messages."""
    return completion if isinstance(completion, str) else "".join(m["content"] for m in completion)


def of_each(reward: Callable[..., float | None], **settings: Any) -> RewardFunction:
    """The reward of many completions, of TRL's signature, from `reward(text, *, field, ...)` of one.

    A field is the record's own, else that of its `metadata`. A record that lacks one has no reward, unless
    the field has a default; ValueError if no record has it. `settings` replace fields for every record.
    """
    fields = [f for f in list(inspect.signature(reward).parameters.values())[1:] if f.name not in settings]

    @functools.wraps(reward)
    def of_all(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Values:
        for field in fields:
            if field.default is field.empty and not {field.name, "metadata"} & columns.keys():
                raise ValueError(
                    f"--reward_funcs {reward.__name__}: the records have no field {field.name!r} "
                    f"(nor 'metadata'); fields are {sorted(columns)}"
                )

        def of_one(i: int) -> float | None:
            values = dict(settings)
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
    # some puzzles are answered in many lines, or sentences
    given = {final_answer(text), undressed(said_last(without_thoughts(text)))}
    if canonical(str(answer)) in map(canonical, given) and str(answer).strip():
        return 1.0
    entry = {"answer": answer, "metadata": metadata}
    ask = functools.partial(_libraries.call, "reasoning_gym", task, seconds=SECONDS, failed=0.0)
    return max(ask(text, entry) for text in given)


@of_each
def reasoning_gym(text: str, *, task: str, answer: Any, metadata: Any) -> bool:
    """Whether the final answer solves the puzzle: full marks of reasoning-gym's own verifier of `task`."""
    # of_each keeps the reward of one text as `__wrapped__`
    return reasoning_gym_partial.__wrapped__(text, task=task, answer=answer, metadata=metadata) >= 1.0


def puzzle_solved(completion: str, record: Mapping[str, Any]) -> float:
    """`reasoning_gym` of one completion: what held-out accuracy counts, in the pipeline and in lm_eval.

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
    return has_format(text, "think")


@of_each
def reasoning_format(text: str) -> bool:
    """Whether it is `<reasoning>`, a text, `</reasoning>`, `<answer>`, an answer, `</answer>`, as d1 asks."""
    return has_format(text, "reasoning", "answer")


@of_each
def sudoku(text: str, *, puzzle: Any, was_cut: bool | None = None) -> bool:
    """Whether the final answer fills `puzzle`, digits or rows, by the rules."""
    return verifiers.sudoku_solved(final_answer(text, was_cut=was_cut), cells(puzzle))


@of_each
def sudoku_cells(text: str, *, puzzle: Any, solution: Any, was_cut: bool | None = None) -> float:
    """Share of the empty cells of `puzzle` that the final answer fills as `solution` does: d1's score."""
    return verifiers.sudoku_cells(text, cells(puzzle), cells(solution), was_cut=was_cut)


@of_each
def countdown(text: str, *, numbers: Sequence[Any], target: Any, was_cut: bool | None = None) -> bool:
    """Whether the final answer makes `target` of all `numbers`, each once."""
    answer = final_answer(text, was_cut=was_cut)
    return verifiers.countdown_solved(answer, [int(n) for n in numbers], int(target))


@of_each
def countdown_graded(text: str, *, numbers: Sequence[Any], target: Any) -> float:
    """As `countdown`, but any other answer in `<answer>` tags is worth 0.1: d1's reward."""
    if countdown.__wrapped__(text, numbers=numbers, target=target):
        return 1.0
    return 0.1 if last_tag(without_thoughts(text)) is not None else 0.0


@of_each
def math(text: str, *, answer: Any, was_cut: bool | None = None, allow_expressions: bool = False) -> bool:
    """Whether the final answer is `answer`: its text, its number, or the same mathematics.

    `answer` is GSM8K's text with `####`, a solution with a box, LaTeX, a number, or a few words.
    """
    given, gold = final_answer(text, was_cut=was_cut), str(answer)
    if not is_comparable(gold):
        raise ValueError(f"'answer' {gold!r:.80} is no number, mathematics, or a few words")
    found = compare(given, gold, allow_expressions=allow_expressions)
    if found is None:
        found = _libraries.call("same_value", given, gold, seconds=SECONDS, failed=False)
    return found


@of_each
def code(text: str, *, test: str, entry_point: str | None = None) -> bool:
    """Whether the program in the completion passes `test`, run in a process of its own with limits.

    With `entry_point`, `test` defines check(candidate), as in HumanEval.
    """
    check = f"check({entry_point})\n" if entry_point else ""
    return runs_through(f"{program_of(text, entry_point)}\n\n{test}\n{check}", seconds=SECONDS)


def program_of(completion: str, entry_point: str | None) -> str:
    """The fenced block that defines `entry_point`, else the last one, else what else is a program."""
    text = without_thoughts(completion)
    # a program without a fence, dressed or behind "The answer is", begins with one of these
    starts = islice(re.finditer(r"\b(?:from|import|def|class)\s|@\w", text), 20)
    bare = [undressed(text), *(text[start.start() :].strip("*$`. \n") for start in starts)]
    # by preference: a block that defines it, the last block, the answer, all of the text
    found = [*code_blocks(text)[::-1], final_answer(completion), *bare]
    programs = [program for program in found if _is_program(program)]
    defining = [program for program in programs if entry_point and f"def {entry_point}" in program]
    return [*defining, *programs, *found][0]


def _is_program(text: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # of strange escapes in what a model wrote
            return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


@of_each
def speed(text: str, *, completion_ids: Sequence[int], num_forwards: int) -> float:
    """Tokens per forward, to be weighed below the reward that it serves. Source: LightningRL rl_reward.py."""
    return len(completion_ids) / max(1, num_forwards)


BUILT_IN: dict[str, RewardFunction] = {
    reward.__name__: reward
    for reward in (
        *(reasoning_gym, reasoning_gym_partial, math, sudoku, sudoku_cells, countdown, countdown_graded),
        *(code, format, reasoning_format, speed),
    )
}
# Of these an empty completion tells whether a record can be scored at all.
CHECKED = ("math", "sudoku", "sudoku_cells", "countdown", "countdown_graded")
