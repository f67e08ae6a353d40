"""Which rewards a script pays, and the judge behind `--reward_funcs judge`, as flags."""

from dataclasses import dataclass

from llada.config import flag
from llada.rewards import Reward, load_rewards


@dataclass(kw_only=True)
class RewardFlags:
    """Flags of every script that scores completions; its Config inherits them."""

    reward_funcs: list[str] = flag(
        ["reasoning_gym"],
        help="What a completion is scored by: reasoning_gym, math, sudoku, countdown, code, format, judge, "
        "package.module:function or file.py:function (TRL's signature).",
    )
    reward_weights: list[float] | None = flag(None, help="Weight of each; default 1.")

    def load_rewards(self) -> list[Reward]:
        """The reward functions that these flags name."""
        return load_rewards(self.reward_funcs, self.reward_weights)
