"""Rewards that a program can check, as functions of TRL's signature.

    def reward(prompts, completions, **columns) -> list[float | None]

`columns` holds the other fields of the records, a list each; None means that the reward has nothing to say
about a completion. Ours give 1.0 or 0.0, read the part of a completion behind its `<think>`, and stay
harmless whatever the text is: see llada/rewards/sandbox.py.

`score` is what the held-out accuracy of the pipeline and of lm_eval both use.

N completions, F reward functions.
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llada.rewards.sandbox import ConfinedModule, all_run_through
from llada.rewards.verifiers import (
    cells,
    code_blocks,
    countdown_solved,
    final_answer,
    is_thought_format,
    sudoku_solved,
)

RewardFunction = Callable[..., Any]
Values = list[float | None]

SECONDS = 5.0  # for one answer

_worker = ConfinedModule("llada.rewards.verifiers", prepare="import_libraries")


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
    return float(library_score(completion, record["task"], record["answer"], record["metadata"]) >= 1.0)


def library_score(completion: str, task: str, answer: str, metadata: Any) -> float:
    """What reasoning-gym's verifier of `task` gives for the final answer, from 0 to 1."""
    entry = {"answer": answer, "metadata": metadata}
    given = final_answer(completion)
    return float(_worker.call("reasoning_gym", task, given, entry, seconds=SECONDS, failed=0.0))


def text_of(completion: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a completion, given as text or as messages."""
    return completion if isinstance(completion, str) else "".join(m["content"] for m in completion)


def reasoning_gym(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    task: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[Any],
    **columns: Any,
) -> Values:
    """Whether the final answer solves the puzzle, by reasoning-gym's own verifier of `task`."""
    records = zip(task, answer, metadata, strict=True)
    return [
        score(text_of(text), {"task": name, "answer": gold, "metadata": data})
        for text, (name, gold, data) in zip(completions, records, strict=True)
    ]


def reasoning_gym_partial(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    task: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[Any],
    **columns: Any,
) -> Values:
    """reasoning-gym's own score, from 0 to 1: most tasks give some credit for a nearly right answer."""
    records = zip(task, answer, metadata, strict=True)
    return [
        library_score(text_of(text), name, gold, data)
        for text, (name, gold, data) in zip(completions, records, strict=True)
    ]


def format(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Values:
    """Whether the completion is `<think>`, a thought, `</think>`, an answer."""
    return [float(is_thought_format(text_of(text))) for text in completions]


def sudoku(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    puzzle: Sequence[Any] | None = None,
    metadata: Sequence[Any] | None = None,
    **columns: Any,
) -> Values:
    """Whether the final answer fills `puzzle` (or `metadata["puzzle"]`), digits or rows, by the rules."""
    puzzles = _column("sudoku", "puzzle", puzzle, metadata)
    return [
        None if grid is None else float(sudoku_solved(final_answer(text_of(text)), cells(grid)))
        for text, grid in zip(completions, puzzles, strict=True)
    ]


def countdown(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    numbers: Sequence[Any] | None = None,
    target: Sequence[Any] | None = None,
    metadata: Sequence[Any] | None = None,
    **columns: Any,
) -> Values:
    """Whether the final answer makes `target` of all `numbers`, each once (or those of `metadata`)."""
    available = _column("countdown", "numbers", numbers, metadata)
    targets = _column("countdown", "target", target, metadata)
    return [
        None
        if goal is None or given is None
        else float(countdown_solved(final_answer(text_of(text)), [int(n) for n in given], int(goal)))
        for text, given, goal in zip(completions, available, targets, strict=True)
    ]


def math_answer(
    prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[str], **columns: Any
) -> Values:
    """Whether the final answer has the value of `answer` (GSM8K's text with `####`, LaTeX, or a number).

    None where `answer` is no mathematics.
    """
    values: Values = []
    for text, gold in zip(completions, answer, strict=True):
        equal = _worker.call(
            "math_equal", final_answer(text_of(text)), str(gold), seconds=SECONDS, failed=False
        )
        values.append(None if equal is None else float(equal))
    return values


def code(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    test: Sequence[str],
    entry_point: Sequence[str] | None = None,
    **columns: Any,
) -> Values:
    """Whether the program in the completion passes `test`, run in a process of its own with limits.

    With `entry_point`, `test` defines check(candidate), as in HumanEval.
    """
    names = entry_point or [None] * len(test)
    programs = [
        f"{program_of(final_answer(text_of(text)), name)}\n\n{tests}\n" + (f"check({name})\n" if name else "")
        for text, tests, name in zip(completions, test, names, strict=True)
    ]
    return [float(passed) for passed in all_run_through(programs, seconds=SECONDS)]


def program_of(answer: str, entry_point: str | None) -> str:
    """The fenced block that defines `entry_point`, else the last one, else all of the answer."""
    blocks = code_blocks(answer)
    defining = [block for block in blocks if entry_point and f"def {entry_point}" in block]
    return [answer, *blocks, *defining[:1]][-1]


def _column(reward: str, name: str, column: Sequence[Any] | None, metadata: Sequence[Any] | None) -> list:
    """A record's own field, else that of its `metadata`; None for a record with neither."""
    if column is None and metadata is None:
        raise ValueError(f"--reward_funcs {reward}: the records have no field {name!r} (nor 'metadata')")
    own = column if column is not None else [None] * len(metadata)
    other = metadata if metadata is not None else [None] * len(own)
    return [
        value if value is not None else (data or {}).get(name) for value, data in zip(own, other, strict=True)
    ]


BUILT_IN: dict[str, RewardFunction] = {
    "reasoning_gym": reasoning_gym,
    "reasoning_gym_partial": reasoning_gym_partial,
    "format": format,
    "math": math_answer,
    "sudoku": sudoku,
    "countdown": countdown,
    "code": code,
}


@dataclass(frozen=True)
class Reward:
    """A reward function under its metric's name, and what it counts."""

    name: str
    function: RewardFunction
    weight: float = 1.0


def load_rewards(
    names: Sequence[str], weights: Sequence[float] | None = None, *, judge: RewardFunction | None = None
) -> list[Reward]:
    """The rewards that `--reward_funcs` names.

    Args:
        names: built-in names, `judge`, `package.module:function`, or `path/to/file.py:function`.
        weights: one each; default 1.

    Raises:
        ValueError: an unknown name, or not one weight for each.
    """
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"--reward_weights {list(weights)}: give one for each of {list(names)}")
    rewards = []
    for place, name in enumerate(names):
        function = judge if name == "judge" else BUILT_IN.get(name)
        if function is None and ":" in name:
            function = _imported(name)
        if function is None:
            known = ", ".join([*BUILT_IN, "judge"])
            hint = "set --judge_model" if name == "judge" else f"use {known}, or module:function"
            raise ValueError(f"--reward_funcs {name}: {hint}")
        short = name.rpartition(":")[2]
        rewards.append(Reward(short, function, 1.0 if weights is None else weights[place]))
    return rewards


def _imported(name: str) -> RewardFunction:
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            sys.modules[Path(place).stem] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, attribute)
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(f"--reward_funcs {name}: cannot be loaded: {error}") from error


def compute_rewards(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    records: Sequence[Mapping[str, Any]],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Weighted sum of the rewards [N] float64, and each reward [N]; nan where there is none.

    Args:
        records: the record that each completion answers; its fields reach the functions as columns.

    Raises:
        ValueError: a function did not give one finite number or None for each completion.
    """
    names = sorted({name for record in records for name in record} - {"prompt", "prompts", "completions"})
    columns: dict[str, Any] = {name: [record.get(name) for record in records] for name in names}
    if completion_ids is not None:
        columns["completion_ids"] = list(completion_ids)
    table = {}
    for reward in rewards:
        table[reward.name] = _checked(reward, prompts, completions, columns)
    values = np.stack([table[reward.name] * reward.weight for reward in rewards])  # [F, N]
    totals = np.where(np.isnan(values).all(axis=0), np.nan, np.nansum(values, axis=0))
    return totals, table


def _checked(
    reward: Reward, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
) -> np.ndarray:
    try:
        values = reward.function(prompts=list(prompts), completions=list(completions), **columns)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(f"--reward_funcs {reward.name}: {error}; fields are {sorted(columns)}") from error
    if inspect.isawaitable(values):
        values = asyncio.run(_awaited(values))
    if len(values) != len(completions):
        raise ValueError(
            f"--reward_funcs {reward.name}: gave {len(values)} values for {len(completions)} completions"
        )
    result = np.array([math.nan if value is None else float(value) for value in values])
    if np.isinf(result).any():
        raise ValueError(f"--reward_funcs {reward.name}: gave an infinite value")
    return result


async def _awaited(values: Any) -> Any:
    return await values
