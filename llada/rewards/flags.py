"""Which rewards a script pays, and the judge behind `--reward_funcs judge`, as flags."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llada.flags.declaration import flag

if TYPE_CHECKING:
    from llada.data.prompts import Prompt
    from llada.rewards.judge import Judge  # imports an HTTP client, which flags do without
    from llada.rewards.scoring import Reward


@dataclass(kw_only=True)
class RewardFlags:
    """Rewards."""

    reward_funcs: list[str] = flag(
        ["judge"],
        "What a completion is scored by: reasoning_gym, reasoning_gym_partial, math, sudoku, sudoku_cells, "
        "countdown, countdown_graded, code, format, reasoning_format, speed, judge, package.module:function "
        "or file.py:function (TRL's signature).",
        fixed=True,
    )
    reward_weights: list[float] | None = flag(None, "Weight of each; default 1.", fixed=True)
    math_allow_expressions: bool = flag(
        False,
        "2 * 9 is an answer where 18 is asked for; else a sum left undone is none.",
        needs="reward_funcs=math",
        fixed=True,
    )
    judge_base_url: str = flag(
        "http://127.0.0.1:11435/v1",
        "OpenAI-compatible server: Ollama, vLLM, llama.cpp, ...",
        needs="reward_funcs=judge",
    )
    judge_model: str = flag(
        "qwen3:30b-a3b-fp16", "The judge, by the server's name.", needs="reward_funcs=judge"
    )
    judge_mode: str = flag(
        "listwise",
        "Ask about a whole group, each completion, or every pair.",
        choices=["listwise", "pointwise", "pairwise"],
        needs="reward_funcs=judge",
    )
    judge_rubric: str | None = flag(
        None, "What is judged: a text, or a file that holds one.", needs="reward_funcs=judge"
    )
    judge_orders: int = flag(
        1,
        "2 asks again in reverse order and averages.",
        at_least=1,
        at_most=2,
        needs="judge_mode=listwise",
    )
    judge_api_key_env: str = flag(
        "OPENAI_API_KEY", "Environment variable that holds the server's key.", needs="reward_funcs=judge"
    )
    judge_max_tokens: int = flag(1024, "Longest reply.", at_least=1, needs="reward_funcs=judge")
    judge_timeout: float = flag(120.0, "Seconds for a reply.", above=0, needs="reward_funcs=judge")
    judge_retries: int = flag(3, "Further tries of a question.", at_least=0, needs="reward_funcs=judge")
    judge_concurrency: int = flag(4, "Questions at a time.", at_least=1, needs="reward_funcs=judge")
    judge_structured: bool = flag(
        True, "Let the server force replies into the schema (json_schema).", needs="reward_funcs=judge"
    )
    judge_cache: str | None = flag(
        None,
        "SQLite file of judgements, so that none is paid for twice.",
        writes="store",
        needs="reward_funcs=judge",
    )

    def check_flags(self) -> None:
        """One weight a function."""
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"--reward_weights {self.reward_weights}: give one for each of --reward_funcs "
                f"{self.reward_funcs}"
            )

    def make_judge(self) -> "Judge | None":
        """The judge, if a reward needs one; ValueError if its server does not answer."""
        if "judge" not in self.reward_funcs:
            return None
        from llada.chat_client import ChatClient
        from llada.rewards.judge import RUBRIC, Judge

        client = ChatClient(
            base_url=self.judge_base_url,
            model=self.judge_model,
            api_key_env=self.judge_api_key_env,
            max_tokens=self.judge_max_tokens,
            structured=self.judge_structured,
            timeout=self.judge_timeout,
            max_retries=self.judge_retries,
            cache_path=self.judge_cache,
        )
        client.check_server()
        rubric = self.judge_rubric or RUBRIC
        if len(rubric.split()) == 1:  # a path
            if not Path(rubric).is_file():
                raise ValueError(f"--judge_rubric {rubric}: no such file, and too short for a rubric")
            rubric = Path(rubric).read_text(encoding="utf-8")
        return Judge(
            client=client,
            mode=self.judge_mode,
            rubric=rubric,
            num_orders=self.judge_orders,
            max_concurrency=self.judge_concurrency,
        )

    def load_rewards(self) -> "list[Reward]":
        """The reward functions that these flags name."""
        from llada.rewards.functions import BUILT_IN, of_each
        from llada.rewards.scoring import load_rewards

        own = {"judge": judge} if (judge := self.make_judge()) else {}
        if self.math_allow_expressions:
            own["math"] = of_each(BUILT_IN["math"].__wrapped__, allow_expressions=True)
        return load_rewards(self.reward_funcs, self.reward_weights, own=own)

    def check_records(self, prompts: "Sequence[Prompt]") -> None:
        """ValueError for a record that one of these rewards cannot score, whatever is answered."""
        from llada.rewards.functions import CHECKED
        from llada.rewards.scoring import compute_rewards, load_rewards

        if rewards := load_rewards([name for name in self.reward_funcs if name in CHECKED]):
            records, where = [prompt.record for prompt in prompts], [prompt.where for prompt in prompts]
            empty = [""] * len(prompts)
            compute_rewards(rewards, empty, empty, records, where=where)
