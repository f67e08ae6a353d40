"""Completions of the current policy, scored: what GRPO learns from.

A rollout is the completions of one global batch of prompts. Its prompts and random draws are keyed by (seed,
number of the rollout, prompt, candidate), so it is the same on any number of ranks and after a resume.

Shapes: N completions of this rank, G of a group, T terms.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llada.data.prompts import Prompt
from llada.diffusion.masking import generator
from llada.diffusion.stream import records_of
from llada.policies.completions import Completion, Sampler
from llada.policies.grpo import (
    STD_EPSILON,
    GroupBatch,
    group_advantages,
    nll_weights,
    softmax_advantages,
    summed_scores,
    term_weights,
)
from llada.policies.grpo_config import GrpoConfig
from llada.policies.likelihood_terms import Terms
from llada.policies.reference_model import Reference
from llada.policies.term_builder import Answer, TermBuilder
from llada.resumable import write_atomically
from llada.rewards.scoring import sums_of_rewards
from llada.run import Run, Sums, autocast, max_over_ranks, means_over_ranks, sum_over_ranks

log = logging.getLogger(__name__)


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
        if not self._log_is_cut:  # steps after the state that a run resumes from are written again
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
        # a run may resume from any saved state, and that of a step in the midst of a rollout needs it
        oldest = min([*states, rollout * num_iterations]) // num_iterations
        for path in folder.glob(f"*-rank{self._run.rank}.json"):
            if int(path.name.partition("-")[0]) < oldest:
                path.unlink()

    def load(self, rollout: int, places: Sequence[int], num_generations: int) -> list[Completion]:
        """The completions at these places of a rollout, made on any number of ranks, or ValueError."""
        # of all ranks: the resumed run may have another number of them
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


@dataclass
class RolloutStream:
    """The stream of GRPO: step -> this rank's completions, sampled from the policy as it is at that step."""

    sampler: Sampler
    prompts: list[Prompt]
    terms_of: TermBuilder
    config: GrpoConfig
    run: Run
    reference: Reference | None = None  # None without a KL term

    def __post_init__(self) -> None:
        # prompts of a global batch, a multiple of the number of ranks
        self.num_groups = self.config.batch_size // self.config.num_generations
        self._files = RolloutFiles(Path(self.config.output_dir), self.run)
        self._rollout = -1
        self._completions: list[Completion] = []
        self._metrics: dict[str, float] = {}
        self._dead_steps = 0
        self._by_index = {prompt.index: prompt for prompt in self.prompts}

    def __call__(self, step: int) -> list[GroupBatch]:
        """This rank's share of a step, as one batch."""
        rollout, iteration = divmod(step, self.config.num_iterations)
        if rollout != self._rollout:
            if iteration == 0:
                self._completions = self._make(rollout)
            else:
                _, places = self._prompts_of(rollout)
                self._completions = self._files.load(rollout, places, self.config.num_generations)
            self._rollout = rollout
            self._metrics = self._measure()
        return [self._batch(rollout, iteration)]

    def _prompts_of(self, rollout: int) -> tuple[list[Prompt], list[int]]:
        """This rank's prompts, and their places in the global batch."""
        ids = records_of(rollout, self.num_groups, num_records=len(self.prompts), seed=self.config.seed)
        places = list(range(self.run.rank, self.num_groups, self.run.world_size))
        return [self.prompts[ids[place][0]] for place in places], places

    def _make(self, rollout: int) -> list[Completion]:
        prompts, places = self._prompts_of(rollout)
        # the sampler keys its draws by prompt and candidate; another rollout of a prompt needs another seed
        seed = int(generator(self.config.seed, "rollout", rollout).integers(2**62))
        with autocast(self.run.device, self.config.dtype):
            completions = self.sampler.answer(prompts, seed=seed, num_generations=self.config.num_generations)
        for i, completion in enumerate(completions):
            completion.place = places[i // self.config.num_generations]
        self._give_advantages(completions)
        if self._needs_old or self.reference is not None:
            self._remember(completions, rollout)
        if self.config.num_iterations > 1:  # a run may be stopped between the steps that learn from it
            self._files.save(completions, rollout, num_iterations=self.config.num_iterations)
        if self.config.log_completions:
            self._files.log(completions, rollout * self.config.num_iterations, self._by_index)
        return completions

    def _give_advantages(self, completions: list[Completion]) -> None:
        config, num_generations = self.config, self.config.num_generations
        rewards = np.array([math.nan if c.reward is None else c.reward for c in completions])
        is_learned = np.repeat(self._groups_to_learn_from(completions), num_generations)
        if config.multi_objective_aggregation == "normalize_then_sum":
            columns = [[c.rewards[reward.name] for c in completions] for reward in self.sampler.rewards]
            weights = np.array([reward.weight for reward in self.sampler.rewards])
            scores = summed_scores(np.array(columns, dtype=np.float64), weights, num_generations)
            mean, std = _global_moments(np.where(is_learned, scores, math.nan))
            advantages = np.nan_to_num((scores - mean) / (std + STD_EPSILON))
        elif config.advantages == "softmax":
            advantages = softmax_advantages(rewards, num_generations)
        else:
            how = {"baseline": config.advantages, "scale": config.scale_rewards}
            batch_std = _global_moments(rewards)[1]
            advantages = group_advantages(rewards, num_generations, batch_std=batch_std, **how)
        advantages = np.where(advantages < 0, config.negative_weight * advantages, advantages)
        advantages = np.where(is_learned, advantages, 0.0)
        for completion, advantage in zip(completions, advantages.tolist(), strict=True):
            completion.advantage = advantage

    def _first_rewards(self, completions: Sequence[Completion]) -> np.ndarray:
        """[N] what accuracy is counted by, nan for None."""
        name = self.sampler.rewards[0].name
        return np.array([c.rewards[name] for c in completions], dtype=np.float64)

    def _groups_to_learn_from(self, completions: Sequence[Completion]) -> np.ndarray:
        """[groups] bool, by --group_accuracy."""
        low, high = self.config.group_accuracy
        groups = self._first_rewards(completions).reshape(-1, self.config.num_generations)
        if (low, high) == (0.0, 1.0):
            return np.ones(len(groups), dtype=bool)
        count = (~np.isnan(groups)).sum(axis=1)
        accuracy = np.nansum(groups, axis=1) / np.maximum(count, 1)
        return (count > 0) & (low <= accuracy) & (accuracy <= high)

    @property
    def _needs_old(self) -> bool:
        has_ratio = self.config.surrogate != "linear"
        return self.config.num_iterations > 1 and (has_ratio or self.config.kl_to == "old")

    def _remember(self, completions: list[Completion], rollout: int) -> None:
        """Log-likelihoods under the policy and the reference, before the policy changes, under all masks."""
        model = self.sampler.model
        for completion in completions:
            completion.old = [] if self._needs_old else None
            completion.ref = [] if self.reference else None
        for iteration in range(self.config.num_iterations if self.config.redraw_masks else 1):
            terms = self.terms_of(self._answers(completions, rollout, iteration)).to(self.run.device)
            with autocast(self.run.device, self.config.dtype):
                if self._needs_old:
                    for completion, values in _per_owner(completions, terms, terms.values(model)):
                        completion.old.append(values)
                if self.reference is not None:
                    with self.reference(model) as reference:
                        for completion, values in _per_owner(completions, terms, terms.values(reference)):
                            completion.ref.append(values)

    def _answers(self, completions: Sequence[Completion], rollout: int, iteration: int) -> list[Answer]:
        config = self.config
        return [
            Answer(
                self._by_index[c.prompt].token_ids,
                c.answer,
                # A group that shares its masks: what its completions have in common cancels.
                f"{rollout}/{c.prompt}"
                + ("" if config.group_masks else f"/{c.candidate}")
                + (f"@{iteration}" if config.redraw_masks else ""),
                c.trace,
                canvas=c.canvas,
                iteration=iteration,
                is_negative=c.advantage < 0,
            )
            for c in completions
        ]

    def _batch(self, rollout: int, iteration: int) -> GroupBatch:
        config, completions = self.config, self._completions
        answers = self._answers(completions, rollout, iteration)
        longest = self.sampler.settings.gen_length
        weights, units = term_weights(config.loss_type, *self.terms_of.counts(answers), longest=longest)
        advantages = [c.advantage for c in completions]
        if not config.count_zero_advantages:
            units = units * torch.tensor([advantage != 0 for advantage in advantages])
        nll = None
        if config.nll_weight:
            is_right = torch.from_numpy(self._first_rewards(completions) >= 1)
            nll = nll_weights(config.nll_weight, is_right, units)
        chosen = list(range(len(completions)))
        if nll is None and not completions[0].old and not completions[0].ref:
            chosen, advantages = self._needed()
        completions = [completions[i] for i in chosen]
        terms = self.terms_of([answers[i] for i in chosen])
        drawn = iteration if config.redraw_masks else 0
        old = _flat([c.old and c.old[drawn] for c in completions], terms)
        return GroupBatch(
            terms=terms,
            advantages=torch.tensor(advantages, dtype=torch.float64),
            weights=weights[chosen],
            old=None if config.surrogate == "linear" else old,  # a KL may need it where the loss does not
            ref=old if config.kl_to == "old" else _flat([c.ref and c.ref[drawn] for c in completions], terms),
            nll=nll,
            num_units=max(float(units.sum()), 1e-9),  # else nothing would be divided by nothing
            record_ids=[c.prompt for c in completions],
            sums={name: (value, 1.0) for name, value in self._metrics.items()},
        )

    def _needed(self) -> tuple[list[int], list[float]]:
        """(completions without which the gradient on policy would be another, their advantages).

        One with advantage 0 is not needed. Every rank gets as many.
        """
        config = self.config
        # of equal completions under equal masks one stands for all, with the sum of their advantages, where
        # the loss is linear in these
        merges = config.group_masks and config.surrogate != "squared" and not config.eubo_weight
        sums: dict[object, float] = {}
        first: dict[object, int] = {}
        for i, c in enumerate(self._completions):
            name = (c.prompt, *c.answer, *c.canvas) if merges and c.trace is None else i
            sums[name] = sums.get(name, 0.0) + c.advantage
            first.setdefault(name, i)
        needed = {first[name]: total for name, total in sums.items() if total != 0}
        # at least one, with an advantage of 0: a step without any forward would have no gradient to average
        missing = max(1, int(max_over_ranks(len(needed)))) - len(needed)
        return [*needed, *[0] * missing], [*needed.values(), *[0.0] * missing]

    def _measure(self) -> dict[str, float]:
        """What is logged of a rollout, the same on every rank; names as in TRL."""
        completions = self._completions
        rewards = np.array([math.nan if c.reward is None else c.reward for c in completions])
        groups = rewards.reshape(-1, self.config.num_generations)
        columns = {
            "reward": [c.reward for c in completions],
            "frac_reward_zero_std": [float(len(set(group[~np.isnan(group)])) < 2) for group in groups],
            "completions/mean_length": [float(len(c.answer)) for c in completions],
            "completions/clipped_ratio": [float(not c.has_ended) for c in completions],
            "nfe/mean": [float(c.steps) for c in completions],
        }
        for name in completions[0].rewards:
            columns[f"rewards/{name}/mean"] = [c.rewards[name] for c in completions]
        found = means_over_ranks(sums_of_known(columns) | sums_of_rewards(self.sampler.rewards))
        self._watch(found)
        return found | {"reward_std": _global_moments(rewards)[1]}

    def _watch(self, found: Mapping[str, float]) -> None:
        """Warns of reward functions without a value in a whole step; ValueError after too many such steps."""
        names = [r.name for r in self.sampler.rewards if f"rewards/{r.name}/mean" not in found]
        if names and self.run.is_main:
            log.warning("--reward_funcs %s: None or NaN for every completion of a step", ", ".join(names))
        self._dead_steps = 0 if "reward" in found else self._dead_steps + 1
        if 0 < self.config.max_dead_steps <= self._dead_steps:
            raise ValueError(
                f"--reward_funcs {' '.join(names)}: no reward in {self._dead_steps} steps in a row, so "
                "nothing is learned; --max_dead_steps 0 goes on"
            )


def sums_of_known(columns: Mapping[str, Sequence[float | None]]) -> Sums:
    """Sum and number of the values in each column; None is none: a judge that failed."""
    known = {name: [v for v in values if v is not None] for name, values in columns.items()}
    return {name: (math.fsum(values), len(values)) for name, values in known.items()}


def _global_moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1) over all ranks; nan values do not count."""
    known = values[~np.isnan(values)]
    count, total = sum_over_ranks([float(len(known)), float(known.sum())])
    mean = total / max(count, 1.0)
    (squares,) = sum_over_ranks([float(((known - mean) ** 2).sum())])
    return mean, math.sqrt(squares / max(count - 1.0, 1.0))


def _per_owner(
    completions: list[Completion], terms: Terms, values: Tensor
) -> Iterator[tuple[Completion, list[float]]]:
    """Each completion with the values of its terms."""
    # Terms without a share only fill up a rank's forwards, and stand behind all others.
    real = terms.shares > 0
    values, counts = values[real], torch.bincount(terms.owners[real], minlength=len(completions)).tolist()
    return ((c, part.tolist()) for c, part in zip(completions, values.split(counts), strict=True))


def _flat(values: list[list[float] | None], terms: Terms) -> Tensor | None:
    """[T], 0 for terms without a share."""
    if values[0] is None:
        return None
    flat = torch.zeros_like(terms.shares)
    flat[terms.shares > 0] = torch.tensor([x for part in values for x in part], dtype=torch.float64)
    return flat
