"""Group-relative policy optimisation: advantages, the clipped surrogate, and what it sums over.

The surrogate is a sum over terms. What a term is, and its log-likelihood, is the estimator's choice:

    elbo        one term a completion: the any-order bound B, all tokens at once (sequence level; ESPO)
    trajectory  one term a denoising step: the sampler's own likelihood of it
    diffu       one term a token: log p of it with the whole answer masked

(likelihood_terms.py). With ratio = exp((log pi - log pi_old) / size) and the completion's advantage A

    loss = -sum_terms w min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) + beta w KL2 / size
    KL2  = (log pi - log pi_ref)^2 / 2,   whose expected gradient under the policy is that of KL(pi || pi_ref)

where size is the number of tokens for `elbo` (so ratios of long answers stay near 1) and 1 otherwise.

Shapes: N completions in groups of G, T terms.

Source: DeepSeekMath (arXiv 2402.03300) for GRPO; ESPO (arXiv 2512.03759) for the sequence ratio and KL2;
options are named as in TRL.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llada.policies.config import SurrogateFlags
from llada.policies.likelihood_terms import Terms
from llada.run import Sums
from llada.training.loop import LossParts

STD_EPSILON = 1e-4  # TRL's


def group_advantages(
    rewards: np.ndarray, num_generations: int, *, baseline: str, scale: str, batch_std: float = math.nan
) -> np.ndarray:
    """[N] by how much each reward exceeds its group's; 0 where there is none, or no other one to compare.

    Args:
        rewards: [N], groups of `num_generations` after one another; nan = none.
        baseline: `group_mean` counts a completion's own reward in its baseline, which shrinks the gradient by
            (G - 1) / G; `leave_one_out` does not, and is unbiased.
        scale: divide by the standard deviation (ddof 1) of the group, or of the batch, or not at all.
        batch_std: that of the global batch.
    """
    groups = rewards.reshape(-1, num_generations)
    known = ~np.isnan(groups)
    count = known.sum(axis=1, keepdims=True)
    total = np.where(known, groups, 0.0).sum(axis=1, keepdims=True)
    centred = np.where(known & (count > 1), groups - total / np.maximum(count, 1), 0.0)
    if scale == "group":
        std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    else:
        std = batch_std
    if baseline == "leave_one_out":
        centred = centred * count / np.maximum(count - 1, 1)
    return (centred if scale == "none" else centred / (std + STD_EPSILON)).reshape(-1)


def term_weights(loss_type: str, lengths: Tensor, *, longest: int) -> tuple[Tensor, float]:
    """([N] weight of a completion's every term, what this rank adds to the units).

    grpo: mean over completions of the mean over terms. dapo, bnpo: mean over all terms of the global batch.
    dr_grpo: sum over terms / (completions x longest).
    """
    if loss_type == "grpo":
        return 1.0 / lengths, float(len(lengths))
    if loss_type == "dr_grpo":
        return torch.full_like(lengths, 1.0 / longest), float(len(lengths))
    return torch.ones_like(lengths), float(lengths.sum())


def term_losses(
    flags: SurrogateFlags, new: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, sizes: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """([T] loss of each term before its weight, [T] values to log)."""
    high = flags.epsilon if flags.epsilon_high is None else flags.epsilon_high
    ratio = ((new - old) / sizes).exp()
    clipped = ratio.clamp(1 - flags.epsilon, 1 + high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    seen = ratio.detach()
    low_clip = (seen < 1 - flags.epsilon) & (advantages < 0)
    high_clip = (seen > 1 + high) & (advantages > 0)
    logged = {
        "ratio/mean": seen,
        "clip_ratio/low_mean": low_clip.double(),
        "clip_ratio/high_mean": high_clip.double(),
        "clip_ratio/region_mean": (low_clip | high_clip).double(),
    }
    if ref is not None:
        kl = (new - ref) ** 2 / (2 * sizes)
        losses = losses + flags.beta * kl
        logged["kl"] = kl.detach()
    return losses, logged


@dataclass
class GroupBatch:
    """This rank's completions of a step, ready for `fit`.

    Attributes:
        weights: [N] of every term of a completion.
        old, ref: [T] log-likelihoods under the sampling policy (None: this is it) and the reference.
        sums: to log beside those of the loss.
    """

    terms: Terms
    advantages: Tensor
    weights: Tensor
    old: Tensor | None
    ref: Tensor | None
    num_units: float
    record_ids: list[int]
    sums: Sums = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens that one pass over the terms reads."""
        return self.terms.num_tokens

    def to(self, device: torch.device) -> "GroupBatch":
        """The same batch with its inputs on `device`."""
        self.terms = self.terms.to(device)
        return self


def grpo_loss(
    model: torch.nn.Module, batch: GroupBatch, total_units: float, *, flags: SurrogateFlags
) -> LossParts:
    """This rank's share of the surrogate, of a global batch of `total_units` units."""
    terms = batch.terms
    sums = dict(batch.sums)
    owners = terms.owners
    weights = terms.shares * batch.weights[owners] / total_units
    advantages = batch.advantages[owners]

    def loss_of(new: Tensor, which: slice) -> Tensor:
        old = new.detach() if batch.old is None else batch.old[which]
        ref = None if batch.ref is None else batch.ref[which]
        losses, logged = term_losses(flags, new, old, ref, advantages[which], terms.sizes[which])
        for name, values in logged.items():
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = (
                total + float((values * terms.shares[which]).sum()),
                count + float(terms.shares[which].sum()),
            )
        return (losses * weights[which]).sum()

    value, parts = terms.parts(model, loss_of, on_policy=batch.old is None and batch.ref is None)
    return LossParts(value, parts, sums)
