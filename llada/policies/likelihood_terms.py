"""What a policy gradient sums over: the log-likelihoods of completions in terms, with gradients.

    elbo        one term a completion: the any-order bound B, all tokens at once (sequence level; ESPO)
    trajectory  one term a denoising step: the sampler's own likelihood of it (sampler_likelihood.py)
    diffu       one term a token: log p of it from one copy with the whole answer masked (diffu-GRPO)

Only `trajectory` is the likelihood of the sampler that made the completions, and its policy gradient exact.
`elbo` is that of random order as far as the model's predictions agree with each other; `diffu` is cheap.

Shapes: N completions, T terms, R masked and scored tokens of all forwards, S states, L positions.

Source: ESPO (arXiv 2512.03759); d1 (arXiv 2504.12216); for a subset of steps with inverse-probability weights
AGRPO (arXiv 2510.04019).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llada.diffusion.batches import Example, MaskedBatch, Noised, collate
from llada.diffusion.bound_estimator import plan_masks
from llada.diffusion.bound_gradient import differentiate
from llada.diffusion.masking import generator
from llada.diffusion.sampler_likelihood import StateBatch, batch_log_probs, collate_states, replay
from llada.diffusion.settings import MaskSettings
from llada.models.tokens import SpecialIds
from llada.policies.config import LikelihoodFlags
from llada.run import max_over_ranks
from modelling_final import LLaDAGenerationConfig

LossOf = Callable[[Tensor, slice], Tensor]
"""(log-likelihoods of some terms, which ones) -> their share of the loss; also notes what is logged."""
Part = Callable[[], Tensor]
"""One forward; its backward gives a share of the gradient."""


@dataclass
class Terms:
    """Terms of some completions, in their order.

    Attributes:
        chunks: what the model is asked, a forward at a time.
        owners: [T] the completion that a term belongs to.
        sizes: [T] by which a difference of log-likelihoods is divided before it becomes a ratio.
        shares: [T] how many tokens (or steps, where not all are scored) a term stands for.
    """

    chunks: Sequence[MaskedBatch | StateBatch]
    owners: Tensor
    sizes: Tensor
    shares: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that one pass reads."""
        return sum(batch.num_tokens for batch in self.chunks)

    def to(self, device: torch.device) -> "Terms":
        """Its inputs go to `device`."""
        self.chunks = [batch.to(device) for batch in self.chunks]
        return self


@dataclass
class MaskedTerms(Terms):
    """Terms that are sums of log p over masked tokens: value_t = sum over the tokens r of t of w_r log p_r.

    Attributes:
        terms: [R] the term that each scored token adds to.
        weights: [R] float64, w_r.
    """

    terms: Tensor
    weights: Tensor

    def _log_probs(self, model: torch.nn.Module) -> Tensor:
        return torch.cat([-model(**batch.inputs).nll.cpu().double() for batch in self.chunks])

    def _sums(self, log_probs: Tensor) -> Tensor:
        zeros = torch.zeros(len(self.owners), dtype=torch.float64)
        return zeros.index_add(0, self.terms, self.weights * log_probs)

    @torch.no_grad()
    def values(self, model: torch.nn.Module) -> Tensor:
        """[T] float64, without gradients."""
        return self._sums(self._log_probs(model))

    def parts(self, model: torch.nn.Module, loss_of: LossOf, *, on_policy: bool) -> tuple[Tensor, list[Part]]:
        """(value of the loss, the functions whose gradients are its gradient), in the memory of one forward.

        On policy every ratio is 1 whatever the values, so they need not be known.
        """
        with torch.no_grad():
            found = torch.zeros(len(self.terms), dtype=torch.float64) if on_policy else self._log_probs(model)
        loss = loss_of(self._sums(found.requires_grad_()), slice(None))
        slopes = differentiate(loss, found).split([len(batch.rows) for batch in self.chunks])

        def part(batch: MaskedBatch, slope: Tensor) -> Tensor:
            return model(**batch.inputs, weights=-slope.to(batch.rows.device)).loss

        return loss.detach(), [partial(part, *pair) for pair in zip(self.chunks, slopes, strict=True)]


@dataclass
class StepTerms(Terms):
    """Denoising steps of every completion, each with the sampler's likelihood of it."""

    settings: LLaDAGenerationConfig
    mask_id: int
    order: bool

    def _log_probs(self, model: torch.nn.Module, batch: StateBatch) -> Tensor:
        return batch_log_probs(model, batch, self.settings, mask_id=self.mask_id, order=self.order)

    @torch.no_grad()
    def values(self, model: torch.nn.Module) -> Tensor:
        """[T] float64, without gradients."""
        return torch.cat([self._log_probs(model, batch).cpu().double() for batch in self.chunks])

    def parts(self, model: torch.nn.Module, loss_of: LossOf, *, on_policy: bool) -> tuple[Tensor, list[Part]]:
        """(value of the loss, filled while the parts are called; the functions that give its gradient)."""
        value = torch.zeros((), dtype=torch.float64)

        def part(batch: StateBatch, which: slice) -> Tensor:
            loss = loss_of(self._log_probs(model, batch).cpu().double(), which)
            value.add_(loss.detach())
            return loss

        ends = np.cumsum([batch.num_states for batch in self.chunks]).tolist()
        starts = [0, *ends[:-1]]
        return value, [
            partial(part, batch, slice(start, end))
            for batch, start, end in zip(self.chunks, starts, ends, strict=True)
        ]


class View(NamedTuple):
    """A completion as one forward sees it.

    tokens: [L] prompt and answer; what is hidden and not scored is the mask already.
    is_scored: [L] bool, masked and scored.
    terms: [L] int64, the completion's term that log p of a scored token adds to.
    weight: of each.
    """

    tokens: np.ndarray
    is_scored: np.ndarray
    terms: np.ndarray
    weight: float


@dataclass(frozen=True)
class Answer:
    """A completion as the terms see it: token ids of prompt and answer, the name of its random draws."""

    prompt: Sequence[int]
    answer: Sequence[int]
    key: str
    trace: Sequence[dict[str, Any]] | None = None


@dataclass(frozen=True)
class TermBuilder:
    """Makes the terms of completions; their masks and subsets are keyed by (seed, the completion's key).

    Attributes:
        micro_batch_size: sequences a forward.
    """

    flags: LikelihoodFlags
    settings: LLaDAGenerationConfig
    ids: SpecialIds
    seed: int
    micro_batch_size: int

    def __call__(self, answers: Sequence[Answer]) -> Terms:
        """The terms of these completions, those of one after another."""
        if self.flags.estimator == "trajectory":
            return self._steps(answers)
        return self._masked(answers)

    def lengths(self, answers: Sequence[Answer]) -> Tensor:
        """[N] float64: terms of each completion, those that --trajectory_steps leaves out included."""
        count = {
            "elbo": lambda answer: 1,
            "trajectory": lambda answer: len(answer.trace),
            "diffu": lambda answer: len(self._filled(answer.answer)),
        }[self.flags.estimator]
        return torch.tensor([count(answer) for answer in answers], dtype=torch.float64)

    def _filled(self, answer: Sequence[int]) -> tuple[int, ...]:
        padding = self.settings.gen_length - len(answer) if self.flags.eos == "filled" else 0
        return (*answer, *[self.ids.eos] * padding)

    def _chunks(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        size = self.micro_batch_size
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _views(self, answer: Answer) -> Iterator[View]:
        """As many for every completion, or ranks would not forward in step."""
        prompt = np.asarray(answer.prompt, dtype=np.int64)
        filled = np.asarray(self._filled(answer.answer), dtype=np.int64)
        size, flags = len(filled), self.flags
        if flags.estimator == "diffu":
            chance = generator(self.seed, "prompt mask", answer.key).random(len(prompt))
            prompt = np.where(chance < flags.p_mask_prompt, self.ids.mask, prompt)
            masks, weights = np.ones((1, size), dtype=bool), np.ones(1)
        else:
            settings = MaskSettings(flags.n_mc_samples, flags.mask_plan, flags.l_sampling, exact_tokens=0)
            plan = plan_masks(size, generator(self.seed, "grpo", answer.key), settings)
            missing = flags.n_mc_samples - len(plan.masks)  # short answers have fewer distinct masks
            masks = np.pad(plan.masks, ((0, missing), (0, 0)))
            weights = np.pad(plan.weights, (0, missing))
        tokens = np.concatenate([prompt, filled])
        place = np.arange(len(tokens)) - len(prompt)
        terms = place if flags.estimator == "diffu" else np.zeros_like(place)
        for mask, weight in zip(masks, weights, strict=True):
            yield View(tokens, np.concatenate([np.zeros(len(prompt), dtype=bool), mask]), terms, weight)

    def _masked(self, answers: Sequence[Answer]) -> MaskedTerms:
        """Every completion's views: micro-batches of first views, then of second ones, ..."""
        by_token = self.flags.estimator == "diffu"
        lengths = [len(self._filled(answer.answer)) for answer in answers]
        counts = lengths if by_token else [1] * len(answers)
        starts = np.cumsum([0, *counts])
        batches, terms, weights = [], [], []
        for own in self._chunks(range(len(answers))):
            for views in zip(*(self._views(answers[n]) for n in own), strict=True):
                rows = [
                    [Noised(Example(view.tokens, view.is_scored, 1.0, 1.0), view.is_scored, 1.0, n)]
                    for n, view in zip(own, views, strict=True)
                ]
                batches.append(collate(rows, mask_id=self.ids.mask, pad_id=self.ids.pad))
                for n, view in zip(own, views, strict=True):
                    found = starts[n] + view.terms[view.is_scored]
                    terms.append(found)
                    weights.append(np.full(len(found), view.weight))
        sizes = torch.tensor([1] * sum(lengths) if by_token else lengths, dtype=torch.float64)
        return MaskedTerms(
            batches,
            owners=torch.repeat_interleave(torch.arange(len(answers)), torch.tensor(counts)),
            sizes=sizes,
            shares=sizes,
            terms=torch.from_numpy(np.concatenate(terms)),
            weights=torch.from_numpy(np.concatenate(weights)),
        )

    def _steps(self, answers: Sequence[Answer]) -> StepTerms:
        states, owners, shares = [], [], []
        for n, answer in enumerate(answers):
            found = replay(answer.prompt, answer.trace, self.settings, mask_id=self.ids.mask)
            chosen = np.arange(len(found))
            if 0 < self.flags.trajectory_steps < len(found):
                random = generator(self.seed, "steps", answer.key)
                chosen = np.sort(random.choice(chosen, self.flags.trajectory_steps, replace=False))
            states += [found[i] for i in chosen]
            owners += [n] * len(chosen)
            shares += [len(found) / len(chosen)] * len(chosen)
        own = len(self._chunks(states))
        most = int(max_over_ranks(own))
        # every rank takes part in as many forwards, or sharded ones would wait for ever
        padding = self.micro_batch_size * most - len(states) if most > own else 0
        states += states[:1] * padding
        owners += owners[:1] * padding
        shares += [0.0] * padding
        chunks = [collate_states(part, pad_id=self.ids.pad) for part in self._chunks(states)]
        shares = torch.tensor(shares, dtype=torch.float64)
        return StepTerms(
            chunks,
            owners=torch.tensor(owners, dtype=torch.long),
            sizes=torch.ones_like(shares),
            shares=shares,
            settings=self.settings,
            mask_id=self.ids.mask,
            order=self.flags.order_term,
        )
