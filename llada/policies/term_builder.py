"""From completions to terms: what is masked in each forward, and which term each token's log p adds to.

Shapes: N completions, K forwards of each, T terms, L positions, A tokens of an answer.

Source: ESPO (arXiv 2512.03759); d1 (arXiv 2504.12216); DiffuCoder (arXiv 2506.20639); SPG (arXiv 2510.09541);
UniGRPO (arXiv 2505.15809); for a subset of steps with inverse-probability weights AGRPO (arXiv 2510.04019).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llada.diffusion.batches import Example, Noised, collate
from llada.diffusion.bound_estimator import draw_of, plan_answer
from llada.diffusion.masking import generator
from llada.diffusion.sampler_likelihood import State, collate_states, merge_steps, replay
from llada.diffusion.settings import MaskSettings
from llada.models.tokens import SpecialIds
from llada.policies.grpo_config import GrpoConfig
from llada.policies.likelihood_terms import EuboTerms, MaskedTerms, StepTerms, Terms
from llada.run import max_over_ranks
from modelling_final import LLaDAGenerationConfig

COUPLED_TIMES = (0.2, 0.8)  # DiffuCoder coupled_grpo.py, forward_process


@dataclass(frozen=True)
class Answer:
    """A completion as the terms see it."""

    prompt: Sequence[int]
    answer: Sequence[int]  # up to and with the end token
    key: str  # names its random draws
    trace: Sequence[dict[str, Any]] | None = None
    canvas: Sequence[int] = ()  # all tokens that were sampled, for --eos canvas
    iteration: int = 0  # of the steps that learn from it
    is_negative: bool = False  # decides which bound SPG pushes


class Masks(NamedTuple):
    """The K forwards of a completion whose log p is asked at its A scored tokens."""

    is_masked: np.ndarray  # [K, A] bool, masked and scored
    weights: np.ndarray  # [K], or [K, A] by blocks: of log p in the sum over all masks
    draws: np.ndarray  # [K] the independent draw that a mask belongs to
    is_hidden: np.ndarray  # [K, P] bool: of the prompt, masked and not scored


@dataclass(frozen=True)
class TermBuilder:
    """Makes the terms of completions; their masks and subsets are keyed by (seed, the completion's key)."""

    config: GrpoConfig
    settings: LLaDAGenerationConfig
    ids: SpecialIds

    def __call__(self, answers: Sequence[Answer]) -> Terms:
        """The terms of these completions, those of one after another."""
        return self._steps(answers) if self.config.likelihood == "trajectory" else self._masked(answers)

    def counts(self, answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
        """([N] terms of each completion, [N] what their shares add up to), float64."""
        config = self.config
        # steps that --trajectory_steps leaves out count as if they were scored
        if config.likelihood == "trajectory":
            sizes = [[int(state.is_chosen.sum()) for state in self._states(answer)] for answer in answers]
            shares = [len(steps) for steps in sizes]
            terms = [sum(steps) for steps in sizes] if config.level == "token" else shares
        else:
            shares = [len(self._scored(answer)) for answer in answers]
            terms = {"completion": [1] * len(answers), "token": shares}.get(config.level, shares)
            if config.likelihood == "elbo" and config.level != "completion":
                masks = [self._masks(answer) for answer in answers]
                terms = [len(set(m.draws)) if config.level == "mask" else m.is_masked.sum() for m in masks]
                if config.level == "token":
                    shares = [n / config.num_masks for n in terms]
        return torch.tensor(terms, dtype=torch.float64), torch.tensor(shares, dtype=torch.float64)

    def _chunks(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        size = self.config.micro_batch_size
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _scored(self, answer: Answer) -> Sequence[int]:
        """The tokens that count."""
        if self.config.eos == "canvas":
            return answer.canvas
        padding = self.settings.gen_length - len(answer.answer) if self.config.eos == "filled" else 0
        return (*answer.answer, *[self.ids.eos] * padding)

    def _masks(self, answer: Answer) -> Masks:
        config, size = self.config, len(self._scored(answer))
        random = generator(config.seed, "grpo", answer.key)
        is_hidden = np.zeros((1, len(answer.prompt)), dtype=bool)
        if config.likelihood == "diffu":
            chance = generator(config.seed, "prompt mask", answer.key).random(len(answer.prompt))
            everything = np.ones((1, size), dtype=bool)
            return Masks(everything, np.ones(1), np.zeros(1, int), chance[None] < config.p_mask_prompt)
        if config.likelihood == "coupled":
            time = random.uniform(*COUPLED_TIMES)
            half = random.random(size) < time  # each token on its own, as published, not a fixed number
            masks = np.stack([np.ones(size, dtype=bool), half, ~half])
            return Masks(masks, np.array([0.5, 0.5 / time, 0.5 / (1 - time)]), np.arange(3), is_hidden)
        if config.mask_plan == "block":
            return self._block(answer, size, random)
        if config.mask_plan == "ratio":
            # the same first ratio at every iteration, from which it grows evenly to 1
            first = generator(config.seed, "first ratio", answer.key.partition("@")[0]).random()
            time = first + (1 - first) * answer.iteration / max(1, config.num_iterations - 1)
            masks = random.random((config.num_masks, size)) < time
            plan, draws = (masks, np.full(len(masks), 1 / (time * len(masks)))), np.arange(len(masks))
        else:
            law = config.size_law if config.mask_plan in ("stratified", "iid") else "uniform"
            num = config.num_masks
            settings = MaskSettings(num, config.mask_plan, law, 0, reference_batch=num)
            before = len(answer.prompt)
            found = plan_answer(before, size, random, settings, block_size=config.block_size)
            plan, draws = (found.masks, found.weights), draw_of(found)
        return self._padded(Masks(*plan, draws, is_hidden))

    def _padded(self, masks: Masks) -> Masks:
        """With as many forwards as every completion has, or ranks would not forward in step."""
        missing = self.config.num_masks - len(masks.weights)  # short answers have fewer distinct masks
        if not missing:
            return masks
        return masks._replace(
            is_masked=np.pad(masks.is_masked, ((0, missing), (0, 0))),
            weights=np.pad(masks.weights, (0, missing)),
            draws=np.pad(masks.draws, (0, missing), mode="edge"),
        )

    def _block(self, answer: Answer, size: int, random: np.random.Generator) -> Masks:
        """SPG's masks: earlier blocks clean but for a share, one block partly masked, all behind it masked.

        Source: SPG spg_trainer.py, forward_process, block_random.
        """
        config, width = self.config, self.settings.block_of(self.settings.gen_length)
        num_blocks, used = -(-self.settings.gen_length // width), -(-size // width)
        # of the whole canvas, then folded: a short answer's blocks may come twice, as published
        blocks = random.permutation(num_blocks)[: config.num_masks] % used
        masks = np.zeros((config.num_masks, size), dtype=bool)
        hidden = random.random((config.num_masks, len(answer.prompt))) < config.p_mask_prompt
        for mask, block in zip(masks, blocks, strict=False):
            start, end = block * width, min((block + 1) * width, size)
            mask[:start] = random.random(start) < config.p_mask_prompt
            mask[start + random.permutation(end - start)[: random.integers(1, end - start + 1)]] = True
            mask[end:] = True
        # L / |S| where the bound has a weight of the size law: the published mean over masked tokens
        weights = size / (config.num_masks * np.maximum(1, masks.sum(axis=1)))
        return Masks(masks, weights, np.arange(len(masks)), hidden)

    def _rows(self, answer: Answer, masks: Masks) -> list[Noised]:
        """The forwards of a completion, its hidden tokens already replaced by the mask."""
        prompt, scored = np.asarray(answer.prompt, np.int64), np.asarray(self._scored(answer), np.int64)
        tail = self.settings.gen_length - len(scored) if self.config.eos == "tail" else 0
        rows = []
        for k, is_masked in enumerate(masks.is_masked):
            hidden = masks.is_hidden[min(k, len(masks.is_hidden) - 1)]  # one for all forwards, or one each
            start = np.where(hidden, self.ids.mask, prompt)
            tokens = np.concatenate([start, scored, np.full(tail, self.ids.mask)])
            is_scored = np.pad(is_masked, (len(prompt), tail))
            rows.append(Noised(Example(tokens, is_scored, 1.0, 1.0), is_scored, 1.0, k))
        return rows

    def _terms_of(self, masks: Masks) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """(of each forward the term of every scored token, and its weight; the share of each term)."""
        config, (num_masks, size) = self.config, masks.is_masked.shape
        places = [np.flatnonzero(is_masked) for is_masked in masks.is_masked]
        weights = masks.weights
        if config.mask_weights == "none":  # a pair's two halves count one half each, an empty one too
            weights = np.full(num_masks, 0.5 if config.mask_plan == "complementary" else 1.0)
        if config.likelihood != "elbo":
            terms, shares = places, np.ones(size)
        elif config.level == "completion":
            terms, shares = [np.zeros_like(place) for place in places], np.full(1, float(size))
        elif config.level == "mask":
            num_draws = masks.draws.max() + 1
            terms = [np.full_like(place, draw) for place, draw in zip(places, masks.draws, strict=True)]
            shares = np.full(num_draws, size / num_draws)
            # each draw estimates the whole bound alone, so the weights of a mean over draws do not apply
            weights = weights * (num_draws if config.mask_weights == "bound" else 1)
        else:
            ends = np.cumsum([len(place) for place in places])
            terms = [np.arange(end - len(p), end) for p, end in zip(places, ends, strict=True)]
            shares, weights = np.full(ends[-1], 1 / num_masks), np.ones(num_masks)
        own = [np.broadcast_to(w, size)[p] for p, w in zip(places, weights, strict=True)]
        return terms, own, shares

    def _masked(self, answers: Sequence[Answer]) -> MaskedTerms:
        """Micro-batches of first forwards, then of second ones, ..."""
        masks = [self._masks(answer) for answer in answers]
        found = [self._terms_of(own) for own in masks]
        starts = np.cumsum([0, *(len(shares) for _, _, shares in found)])
        first_place = np.cumsum([0, *(own.is_masked.shape[1] for own in masks)])
        batches, terms, weights, places, rates = [], [], [], [], []
        for own in self._chunks(range(len(answers))):
            rows = [self._rows(answers[n], masks[n]) for n in own]
            for k, forward in enumerate(zip(*rows, strict=True)):
                batch = [[row] for row in forward]
                ids = {"mask_id": self.ids.mask, "pad_id": self.ids.pad}
                batches.append(collate(batch, **ids, block_size=self.config.block_size))
                for n in own:
                    terms.append(starts[n] + found[n][0][k])
                    weights.append(found[n][1][k])
                    places.append(first_place[n] + np.flatnonzero(masks[n].is_masked[k]))
                    rate = masks[n].is_masked[k].mean() * len(masks[n].weights)
                    rates.append(np.full(len(places[-1]), rate))
        shares = torch.from_numpy(np.concatenate([shares for _, _, shares in found]))
        owners = torch.repeat_interleave(torch.arange(len(answers)), torch.from_numpy(np.diff(starts)))
        lengths = torch.tensor([own.is_masked.shape[1] for own in masks], dtype=torch.float64)
        parts = {
            "chunks": batches,
            "owners": owners,
            "sizes": torch.ones_like(shares) if self.config.level == "token" else lengths[owners],
            "shares": shares,
            "terms": torch.from_numpy(np.concatenate(terms)),
            "weights": torch.from_numpy(np.concatenate(weights)),
        }
        if not self.config.eubo_weight:
            return MaskedTerms(**parts)
        return EuboTerms(
            **parts,
            places=torch.from_numpy(np.concatenate(places)),
            rates=torch.from_numpy(np.concatenate(rates)),
            is_negative=torch.tensor([answer.is_negative for answer in answers]),
            weight=self.config.eubo_weight,
            exponent=self.config.eubo_beta,
        )

    def _states(self, answer: Answer) -> list[State]:
        states = replay(answer.prompt, answer.trace, self.settings, mask_id=self.ids.mask)
        return merge_steps(states, self.config.trajectory_shrink)

    def _steps(self, answers: Sequence[Answer]) -> StepTerms:
        config = self.config
        states, owners, shares = [], [], []
        for n, answer in enumerate(answers):
            found = self._states(answer)
            chosen = np.arange(len(found))
            if 0 < config.trajectory_steps < len(found):
                random = generator(config.seed, "steps", answer.key)
                # without replacement: the share below is then the inverse of a step's probability
                chosen = np.sort(random.choice(chosen, config.trajectory_steps, replace=False))
            states += [found[i] for i in chosen]
            owners += [n] * len(chosen)
            shares += [len(found) / len(chosen)] * len(chosen)
        own = len(self._chunks(states))
        most = int(max_over_ranks(own))
        # every rank takes part in as many forwards, or sharded ones would wait for ever
        padding = config.micro_batch_size * most - len(states) if most > own else 0
        states += states[:1] * padding
        owners += owners[:1] * padding
        shares += [0.0] * padding
        by_token = config.level == "token"
        if by_token:  # a step's tokens share what the step counts
            sizes = [int(state.is_chosen.sum()) for state in states]
            owners, shares = np.repeat(owners, sizes), np.repeat(np.divide(shares, sizes), sizes)
        shares = torch.tensor(shares, dtype=torch.float64)
        return StepTerms(
            [collate_states(part, pad_id=self.ids.pad) for part in self._chunks(states)],
            owners=torch.tensor(owners, dtype=torch.long),
            sizes=torch.ones_like(shares),
            shares=shares,
            settings=self.settings,
            mask_id=self.ids.mask,
            order=config.order_term,
            by_token=by_token,
        )
