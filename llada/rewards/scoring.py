"""The rewards that `--reward_funcs` names, and what they give for completions.

N completions, F reward functions.
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llada.rewards.functions import BUILT_IN, RewardFunction


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
