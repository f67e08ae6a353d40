"""What a policy gradient sums over: the log-likelihoods of completions in terms, with gradients.

    elbo        one term a completion: the any-order bound B, all tokens at once (sequence level; ESPO)
    trajectory  one term a denoising step: the sampler's own likelihood of it (sampler_likelihood.py)
    diffu       one term a token: log p of it from one copy with the whole answer masked (diffu-GRPO)

Only `trajectory` is the likelihood of the sampler that made the completions, and its policy gradient exact.
`elbo` is that of random order as far as the model's predictions agree with each other; `diffu` is cheap.

Shapes: N completions, T terms, S states.

Source: ESPO (arXiv 2512.03759); d1 (arXiv 2504.12216); for a subset of steps with inverse-probability weights
AGRPO (arXiv 2510.04019).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llada.diffusion.batches import Example, MaskedBatch, Noised, collate
from llada.diffusion.bound_estimator import MaskSettings
from llada.diffusion.bound_gradient import (
    MaskedCopies,
    differentiate,
    draw_values,
    gradient_parts,
    make_draws,
    plan_draws,
)
from llada.diffusion.likelihood import Request
from llada.diffusion.masking import generator
from llada.diffusion.sampler_likelihood import StateBatch, batch_log_probs, collate_states, replay
from llada.models.tokens import SpecialIds
from llada.policies.config import LikelihoodFlags
from llada.run import max_over_ranks
from modelling_final import LLaDAGenerationConfig

LossOf = Callable[[Tensor, slice], Tensor]
"""(log-likelihoods of some terms, which ones) -> their share of the loss; also notes what is logged."""


class ElboTerms:
    """The any-order bound of every completion, always under the same K masks."""

    def __init__(self, chunks: Sequence[MaskedCopies], lengths: Sequence[int]) -> None:
        self.chunks = list(chunks)
        self.owners = torch.arange(len(lengths))
        self.sizes = torch.tensor(lengths, dtype=torch.float64)
        self.shares = self.sizes

    @property
    def num_tokens(self) -> int:
        """Tokens that one pass reads."""
        return sum(draws.num_tokens for draws in self.chunks)

    def to(self, device: torch.device) -> "ElboTerms":
        """Its inputs go to `device`."""
        self.chunks = [draws.to(device) for draws in self.chunks]
        return self

    def values(self, model: torch.nn.Module) -> Tensor:
        """[T] float64, without gradients."""
        return draw_values(model, self.chunks).sum(0)

    def parts(
        self, model: torch.nn.Module, loss_of: LossOf, *, on_policy: bool
    ) -> tuple[Tensor, list[Callable[[], Tensor]]]:
        """(value of the loss, the functions whose gradients are its gradient).

        On policy every ratio is 1 whatever the values, so they need not be known.
        """
        values = torch.zeros(len(self.owners), dtype=torch.float64) if on_policy else self.values(model)
        values.requires_grad_()
        loss = loss_of(values, slice(None))
        return loss.detach(), self.gradient(model, differentiate(loss, values))

    def gradient(self, model: torch.nn.Module, coefficients: Tensor) -> list[Callable[[], Tensor]]:
        """Functions that add up to sum_t coefficients_t values_t, one forward each."""
        return gradient_parts(model, self.chunks, coefficients)


class TokenTerms(ElboTerms):
    """Every token of every completion, predicted from one masked copy of it; chunks are micro-batches."""

    def __init__(self, chunks: Sequence[MaskedBatch], lengths: Sequence[int]) -> None:
        self.chunks = list(chunks)
        self.owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self.sizes = torch.ones(len(self.owners), dtype=torch.float64)
        self.shares = self.sizes

    @torch.no_grad()
    def values(self, model: torch.nn.Module) -> Tensor:
        return torch.cat([-self._score(model, batch).nll.cpu().double() for batch in self.chunks])

    def gradient(self, model: torch.nn.Module, coefficients: Tensor) -> list[Callable[[], Tensor]]:
        parts, start = [], 0
        for batch in self.chunks:
            own = -coefficients[start : start + len(batch.rows)]
            start += len(batch.rows)
            parts.append(lambda batch=batch, own=own: self._score(model, batch, own).loss)
        return parts

    def _score(self, model: torch.nn.Module, batch: MaskedBatch, weights: Tensor | None = None) -> object:
        if weights is not None:
            weights = weights.float().to(batch.rows.device)
        return model(**batch.inputs, weights=weights)


class StepTerms:
    """Denoising steps of every completion, each with the sampler's likelihood of it."""

    def __init__(
        self,
        chunks: Sequence[StateBatch],
        owners: Sequence[int],
        shares: Sequence[float],
        settings: LLaDAGenerationConfig,
        *,
        mask_id: int,
        order: bool,
    ) -> None:
        """`shares`: how many steps of its completion a term stands for, where not all are scored."""
        self.chunks = list(chunks)
        self.owners = torch.tensor(owners, dtype=torch.long)
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.sizes = torch.ones_like(self.shares)
        self._settings, self._mask_id, self._order = settings, mask_id, order

    @property
    def num_tokens(self) -> int:
        """Tokens that one pass reads."""
        return sum(
            batch.input_ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())
            for batch in self.chunks
        )

    def to(self, device: torch.device) -> "StepTerms":
        """Its inputs go to `device`."""
        self.chunks = [batch.to(device) for batch in self.chunks]
        return self

    def _log_probs(self, model: torch.nn.Module, batch: StateBatch) -> Tensor:
        return batch_log_probs(model, batch, self._settings, mask_id=self._mask_id, order=self._order)

    @torch.no_grad()
    def values(self, model: torch.nn.Module) -> Tensor:
        """[T] float64, without gradients."""
        return torch.cat([self._log_probs(model, batch).cpu().double() for batch in self.chunks])

    def parts(
        self, model: torch.nn.Module, loss_of: LossOf, *, on_policy: bool
    ) -> tuple[Tensor, list[Callable[[], Tensor]]]:
        """(value of the loss, filled while the parts are called; the functions that give its gradient)."""
        value = torch.zeros((), dtype=torch.float64)

        def part(batch: StateBatch, which: slice) -> Tensor:
            loss = loss_of(self._log_probs(model, batch).cpu().double(), which)
            value.add_(loss.detach())
            return loss

        parts, start = [], 0
        for batch in self.chunks:
            which = slice(start, start + batch.num_states)
            start += batch.num_states
            parts.append(lambda batch=batch, which=which: part(batch, which))
        return value, parts


Terms = ElboTerms | TokenTerms | StepTerms


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
        return self._elbo(answers) if self.flags.estimator == "elbo" else self._tokens(answers)

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

    def _elbo(self, answers: Sequence[Answer]) -> ElboTerms:
        flags = self.flags
        requests = [Request(tuple(a.prompt), self._filled(a.answer), a.key) for a in answers]
        masks = MaskSettings(flags.n_mc_samples, flags.mask_plan, flags.l_sampling)
        plans = plan_draws(requests, masks, self.seed, "grpo")
        tokens = {"mask_id": self.ids.mask, "pad_id": self.ids.pad}
        chunks = [
            make_draws(own, own_plans, flags.n_mc_samples, **tokens)
            for own, own_plans in zip(self._chunks(requests), self._chunks(plans), strict=True)
        ]
        return ElboTerms(chunks, [len(request.answer) for request in requests])

    def _tokens(self, answers: Sequence[Answer]) -> TokenTerms:
        rows = []
        for n, answer in enumerate(answers):
            prompt, filled = np.asarray(answer.prompt, dtype=np.int64), self._filled(answer.answer)
            chance = generator(self.seed, "prompt mask", answer.key).random(len(prompt))
            hidden = np.where(chance < self.flags.p_mask_prompt, self.ids.mask, prompt)
            tokens = np.concatenate([hidden, filled]).astype(np.int64)
            is_answer = np.arange(len(tokens)) >= len(prompt)
            rows.append([Noised(Example(tokens, is_answer, weight=1.0, num_units=1.0), is_answer, 1.0, n)])
        chunks = [collate(own, mask_id=self.ids.mask, pad_id=self.ids.pad) for own in self._chunks(rows)]
        return TokenTerms(chunks, [int(item.is_masked.sum()) for (item,) in rows])

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
        order = self.flags.order_term
        return StepTerms(chunks, owners, shares, self.settings, mask_id=self.ids.mask, order=order)
