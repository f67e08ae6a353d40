"""What a policy gradient sums over: the log-likelihoods of completions in terms, with gradients.

    elbo        the any-order bound B, one term a completion (ESPO), a mask (GDSD) or a masked token (UniGRPO)
    trajectory  the sampler's own likelihood (sampler_likelihood.py), one term a denoising step, or a token
    diffu       log p of each token from one copy with the whole answer masked (diffu-GRPO)
    coupled     the mean of that and of log p from a mask or its complement (DiffuCoder)

Only `trajectory` is the likelihood of the sampler that made the completions, and its policy gradient exact.
`elbo` is that of random order as far as the model's predictions agree with each other; `diffu` is cheap, and
`coupled` no log-likelihood at all: its weights do not sum to 1.

Shapes: N completions, T terms, R masked and scored tokens of all forwards, S states, L positions.

Source: ESPO (arXiv 2512.03759); d1 (arXiv 2504.12216); for a subset of steps with inverse-probability weights
AGRPO (arXiv 2510.04019).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from llada.diffusion.batches import MaskedBatch
from llada.diffusion.bound_gradient import differentiate
from llada.diffusion.sampler_likelihood import StateBatch, batch_log_probs
from modelling_final import LLaDAGenerationConfig

LossOf = Callable[[Tensor, slice], Tensor]
"""(log-likelihoods of some terms, which ones) -> their share of the loss; also notes what is logged."""
Part = Callable[[], Tensor]
"""One forward; its backward gives a share of the gradient."""


@dataclass
class Terms:
    """Terms of some completions, in their order."""

    chunks: Sequence[MaskedBatch | StateBatch]  # what the model is asked, a forward at a time
    owners: Tensor  # [T] the completion that a term belongs to
    sizes: Tensor  # [T] by which a difference of log-likelihoods is divided before it becomes a ratio
    # [T] tokens (or steps, where not all are scored) a term stands for; with 0 it only keeps ranks in step
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
    """Terms that are sums of log p over masked tokens: value_t = sum over its tokens r of w_r log p_r."""

    terms: Tensor  # [R] the term that each scored token adds to
    weights: Tensor  # [R] float64, w_r
    is_linear = True  # in log p, so its slopes can be had without its values

    def _log_probs(self, model: torch.nn.Module) -> Tensor:
        # float64: a ratio is a small difference of sums of a thousand nats
        return torch.cat([-model(**batch.inputs).nll.cpu().double() for batch in self.chunks])

    def _of(self, log_probs: Tensor) -> Tensor:
        """[T] the terms, given [R] log p."""
        zeros = torch.zeros(len(self.owners), dtype=torch.float64)
        return zeros.index_add(0, self.terms, self.weights * log_probs)

    @torch.no_grad()
    def values(self, model: torch.nn.Module) -> Tensor:
        """[T] float64, without gradients."""
        return self._of(self._log_probs(model))

    def parts(
        self, model: torch.nn.Module, loss_of: LossOf, *, on_policy: bool, is_linear: bool = False
    ) -> tuple[Tensor, list[Part]]:
        """(value of the loss, the functions whose gradients are its gradient), in the memory of one forward.

        Args:
            on_policy: the loss depends on differences to what the terms are now, so they need not be known.
            is_linear: the loss is linear in the terms: then its value comes while the parts are called.
        """
        # Slopes of a linear loss are the same everywhere, and so are those of a ratio at 1: no first pass.
        known = not self.is_linear or not (on_policy or is_linear)
        with torch.no_grad():
            found = self._log_probs(model) if known else torch.zeros(len(self.terms), dtype=torch.float64)
        loss = loss_of(self._of(found.requires_grad_()), slice(None))
        slopes = differentiate(loss, found).split([len(batch.rows) for batch in self.chunks])
        value = loss.detach()

        def part(batch: MaskedBatch, slope: Tensor) -> Tensor:
            loss = model(**batch.inputs, weights=-slope.to(batch.rows.device)).loss
            if is_linear and not known:
                value.add_(loss.detach().cpu())
            return loss

        return value, [partial(part, *pair) for pair in zip(self.chunks, slopes, strict=True)]


@dataclass
class EuboTerms(MaskedTerms):
    """Completions, those with an advantage below 0 by a mixture with an upper bound (SPG), in nats.

        L [weight / b mean_k log mean_n(1(k in S_n) p_k^b / t_n) + (1 - weight) B / L],   t_n = |S_n| / L

    over the tokens k that some mask S_n covers. The constant that makes it a bound is left out, as published.
    """

    places: Tensor  # [R] which token of all completions a row is
    rates: Tensor  # [R] t_n times the number of masks
    is_negative: Tensor  # [T] bool
    weight: float
    exponent: float
    is_linear = False

    def _of(self, log_probs: Tensor) -> Tensor:
        lower = super()._of(log_probs)
        tokens, place = torch.unique(self.places, return_inverse=True)
        owner = torch.zeros(len(tokens), dtype=torch.long).index_copy(0, place, self.terms)
        # in logarithms: a token that the model finds impossible is where this term matters
        logs = self.exponent * log_probs - self.rates.log()
        # -inf where no mask covers a token cannot happen: `tokens` holds the covered ones alone
        most = torch.full((len(tokens),), -torch.inf, dtype=torch.float64)
        most = most.scatter_reduce(0, place, logs.detach(), "amax")
        total = torch.zeros_like(most).index_add(0, place, (logs - most[place]).exp())
        upper = torch.zeros_like(lower).index_add(0, owner, (total.log() + most) / self.exponent)
        count = torch.bincount(owner, minlength=len(lower)).clamp(min=1)
        mixed = self.weight * self.sizes * upper / count + (1 - self.weight) * lower
        # where, not a product: what is not chosen may be infinite
        return torch.where(self.is_negative, mixed, lower)


@dataclass
class StepTerms(Terms):
    """Denoising steps of every completion, or their tokens, each with the sampler's likelihood of it."""

    settings: LLaDAGenerationConfig
    mask_id: int
    order: bool
    by_token: bool = False

    def _log_probs(self, model: torch.nn.Module, batch: StateBatch) -> Tensor:
        how = {"mask_id": self.mask_id, "order": self.order, "by_token": self.by_token}
        return batch_log_probs(model, batch, self.settings, **how).cpu().double()

    @torch.no_grad()
    def values(self, model: torch.nn.Module) -> Tensor:
        """[T] float64, without gradients."""
        return torch.cat([self._log_probs(model, batch) for batch in self.chunks])

    def parts(
        self, model: torch.nn.Module, loss_of: LossOf, *, on_policy: bool, is_linear: bool = False
    ) -> tuple[Tensor, list[Part]]:
        """(value of the loss, filled while the parts are called; the functions that give its gradient)."""
        value = torch.zeros((), dtype=torch.float64)

        def part(batch: StateBatch, which: slice) -> Tensor:
            loss = loss_of(self._log_probs(model, batch), which)
            value.add_(loss.detach())
            return loss

        sizes = [int(batch.is_chosen.sum()) if self.by_token else batch.num_states for batch in self.chunks]
        ends = np.cumsum(sizes).tolist()
        bounds = zip(self.chunks, [0, *ends[:-1]], ends, strict=True)
        return value, [partial(part, batch, slice(start, end)) for batch, start, end in bounds]
