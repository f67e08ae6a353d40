"""The rewards that `--reward_funcs` names, and what they give for completions.

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

from llada.chat_client import ServerFailure
from llada.rewards.functions import BUILT_IN, RewardFunction
from llada.run import Sums


@dataclass(frozen=True)
class Reward:
    """A reward function under its metric's name, and what it counts."""

    name: str
    function: RewardFunction
    weight: float = 1.0


def load_rewards(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    own: Mapping[str, RewardFunction] | None = None,
) -> list[Reward]:
    """The rewards that `--reward_funcs` names; ValueError for an unknown name, or not one weight for each.

    Args:
        names: built-in names, `judge`, `package.module:function`, or `path/to/file.py:function`.
        own: functions that other flags have made, by name.
    """
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"--reward_weights {list(weights)}: give one for each of {list(names)}")
    known = BUILT_IN | dict(own or {})
    rewards = []
    for place, name in enumerate(names):
        function = known.get(name)
        if function is None and ":" in name:
            function = _imported(name)
        if function is None:
            hint = f"use {', '.join([*BUILT_IN, 'judge'])}, or module:function"
            raise ValueError(f"--reward_funcs {name}: {'set --judge_model' if name == 'judge' else hint}")
        short = name.rpartition(":")[2]
        rewards.append(Reward(short, function, 1.0 if weights is None else weights[place]))
    return rewards


def _imported(name: str) -> RewardFunction:
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            sys.modules[Path(place).stem] = module  # where dataclasses and pickles of the file look for it
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
    where: Sequence[str] | None = None,
    **columns: Sequence[Any],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Weighted sum of the rewards [N] float64, and each reward [N]; nan where there is none.

    Args:
        records: the record that each completion answers; its fields reach the functions as columns.
        where: how errors name the records; default their ids.
        columns: more of each completion: `completion_ids`, `was_cut`, `num_forwards`.

    ValueError: a function failed, or did not give one finite number or None for each completion.
    """
    names = sorted({name for record in records for name in record} - {"prompt", "prompts", "completions"})
    fields = {name: [record.get(name) for record in records] for name in names}
    arguments = {"prompts": prompts, "completions": completions, **fields, **columns}
    where = where or [f"record {record.get('id', n)!r}" for n, record in enumerate(records)]
    table = {reward.name: _values_of(reward, arguments, where) for reward in rewards}
    values = np.stack([table[reward.name] * reward.weight for reward in rewards])  # [F, N]
    # one reward of None leaves the others, all of them leave none: 0 would be a judgement
    totals = np.where(np.isnan(values).all(axis=0), np.nan, np.nansum(values, axis=0))
    return totals, table


def sums_of_rewards(rewards: Sequence[Reward]) -> Sums:
    """What reward functions with a `sums()` of their own, such as the judge, have to log since last time."""
    found = {reward.name: reward.function.sums() for reward in rewards if hasattr(reward.function, "sums")}
    return {f"{name}/{key}": pair for name, sums in found.items() for key, pair in sums.items()}


def _values_of(reward: Reward, arguments: Mapping[str, Sequence[Any]], where: Sequence[str]) -> np.ndarray:
    """[N] the function's values, nan for None; its errors name it and the record."""

    def values_of(places: Sequence[int]) -> np.ndarray:
        values = reward.function(**{name: [column[i] for i in places] for name, column in arguments.items()})
        if inspect.isawaitable(values):  # TRL allows coroutines
            values = asyncio.run(_awaited(values))
        if len(values) != len(places):
            raise ValueError(f"gave {len(values)} values for {len(places)} completions")
        found = np.array([math.nan if value is None else float(value) for value in values])
        if np.isinf(found).any():
            raise ValueError("gave an infinite value")
        return found

    places = range(len(where))
    try:
        return values_of(places)
    except ServerFailure:
        raise
    except Exception as error:
        if str(error).startswith("--"):  # names its flag already
            raise
        hint = f"; fields are {sorted({*arguments} - {'prompts', 'completions'})}" * isinstance(
            error, TypeError
        )
        # one completion at a time says which it was, unless they only fail together
        failing = next((f" ({where[i]})" for i in places if _fails(values_of, i)), "")
        raise ValueError(f"--reward_funcs {reward.name}: {_told(error)}{hint}{failing}") from error


def _fails(values_of: Callable[[Sequence[int]], np.ndarray], place: int) -> bool:
    try:
        values_of([place])
    except Exception:
        return True
    return False


def _told(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


async def _awaited(values: Any) -> Any:
    return await values
