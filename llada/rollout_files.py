"""Completions of GRPO on disk: a log to read, and what a run stopped within a rollout goes on with."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llada.checkpoint import write_atomically
from llada.data.prompts import Prompt
from llada.run import Run


@dataclass
class Completion:
    """An answer, what it earned, and what is remembered of the policy that gave it."""

    place: int  # of its group in the global batch
    prompt: int  # index of the prompt in its file
    candidate: int
    answer: list[int]  # token ids, the closing EOS or EoT included
    text: str
    has_ended: bool
    steps: int  # forwards
    trace: list[dict[str, Any]] | None
    reward: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    advantage: float = 0.0
    old: list[float] | None = None  # log-likelihood of each of its terms under the policy that gave it
    ref: list[float] | None = None


class RolloutFiles:
    """`completions.jsonl` and `rollouts/` of a run; every rank has files of its own."""

    def __init__(self, folder: Path, run: Run) -> None:
        self._folder, self._run = folder, run
        self._log_is_cut = False

    def log(self, completions: Sequence[Completion], step: int, prompts: Mapping[int, Prompt]) -> None:
        """Appends a line for each completion; a resumed run repeats none."""
        name = "completions.jsonl" if self._run.is_main else f"completions.rank{self._run.rank}.jsonl"
        path = self._folder / name
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._log_is_cut:
            self._log_is_cut = True
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                write_atomically(path, "".join(line + "\n" for line in lines if _step_of(line) < step))
        with open(path, "a", encoding="utf-8") as file:
            for c in completions:
                line = {
                    "step": step,
                    "id": prompts[c.prompt].record.get("id", c.prompt),
                    "candidate": c.candidate,
                    "completion": c.text,
                    "rewards": c.rewards,
                    "reward": c.reward,
                    "advantage": c.advantage,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def save(self, completions: Sequence[Completion], rollout: int, *, num_iterations: int) -> None:
        """Keeps a rollout that so many steps learn from, and drops those before every saved state."""
        folder = self._folder / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(completion) for completion in completions])
        write_atomically(folder / f"{rollout}-rank{self._run.rank}.json", text)
        states = [int(path.name.removeprefix("step-")) for path in self._folder.glob("step-*[0-9]")]
        oldest = min([*states, rollout * num_iterations]) // num_iterations
        for path in folder.glob(f"*-rank{self._run.rank}.json"):
            if int(path.name.partition("-")[0]) < oldest:
                path.unlink()

    def load(self, rollout: int, places: Sequence[int], num_generations: int) -> list[Completion]:
        """The completions at these places of a rollout, made on any number of ranks.

        Raises:
            ValueError: some are not there.
        """
        files = sorted((self._folder / "rollouts").glob(f"{rollout}-rank*.json"))
        found = [Completion(**values) for file in files for values in json.loads(file.read_text())]
        unique = {(c.place, c.candidate): c for c in found}
        wanted = [(place, candidate) for place in places for candidate in range(num_generations)]
        missing = [key for key in wanted if key not in unique]
        if missing:
            raise ValueError(
                f"{self._folder}/rollouts: {len(missing)} completions of rollout {rollout} are not there, "
                "which the saved state is in the midst of; resume from a state at the end of one, or anew"
            )
        return [unique[key] for key in wanted]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf  # the half-written last line of a killed run
