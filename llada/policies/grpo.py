"""Group-relative policy optimisation: advantages, the clipped surrogate, and what it sums over.

The surrogate is a sum over terms (likelihood_terms.py). With ratio = exp((log pi - log pi_old) / size) and
the completion's advantage A

    clip     -sum_terms w min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) + beta w KL / size
    linear   -sum_terms w A log pi / size
    squared   sum_terms w (clamp(log pi - log pi_old) / size - psi A)^2
    with --nll_weight also -sum_terms nll_weight w log pi / size of right completions

where size is the number of tokens for terms that hold many (so ratios of long answers stay near 1), else 1.

Shapes: N completions in groups of G, T terms.

Source: DeepSeekMath (arXiv 2402.03300) for GRPO; ESPO (arXiv 2512.03759) for the sequence ratio and KL2;
options are named as in TRL.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llada.diffusion.losses import LossParts
from llada.policies.grpo_config import SurrogateFlags
from llada.policies.likelihood_terms import Terms
from llada.run import Sums, add_sums, sum_over_ranks

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
    """
    groups = rewards.reshape(-1, num_generations)
    known = ~np.isnan(groups)
    count = known.sum(axis=1, keepdims=True)
    total = np.where(known, groups, 0.0).sum(axis=1, keepdims=True)
    # a completion alone in its group has nothing to be compared with
    centred = np.where(known & (count > 1), groups - total / np.maximum(count, 1), 0.0)
    if scale == "group":
        # before the baseline below changes what is centred
        std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    else:
        std = batch_std
    if baseline == "leave_one_out":
        centred = centred * count / np.maximum(count - 1, 1)
    return (centred if scale == "none" else centred / (std + STD_EPSILON)).reshape(-1)


def summed_scores(rewards: np.ndarray, reward_weights: np.ndarray, num_generations: int) -> np.ndarray:
    """[N] weighted sum of each reward's z-scores in its group; [F, N] rewards, [F] weights; nan = none.

    Source: TRL's multi_objective_aggregation="normalize_then_sum", from GDPO of NVIDIA (arXiv 2601.05242).
    """
    scores = [group_advantages(row, num_generations, baseline="group_mean", scale="group") for row in rewards]
    return np.where(np.isnan(rewards).all(axis=0), np.nan, reward_weights @ np.stack(scores))


def softmax_advantages(rewards: np.ndarray, num_generations: int) -> np.ndarray:
    """[N] G (softmax(A) - softmax(-A)) within each group, A the centred rewards; nan has 0.

    Source: wd1 (arXiv 2507.08838), rev_grpo_trainer.py; its sum over a group is here a mean, hence G.
    """
    groups = rewards.reshape(-1, num_generations)
    known = ~np.isnan(groups)
    filled = np.where(known, groups, 0.0)

    def softmax(values: np.ndarray) -> np.ndarray:
        # centring, which wd1 does first, changes no softmax
        powers = np.where(known, np.exp(values - values.max(axis=1, keepdims=True)), 0.0)
        return powers / np.maximum(powers.sum(axis=1, keepdims=True), 1e-300)

    return (num_generations * (softmax(filled) - softmax(-filled))).reshape(-1)


def term_weights(loss_type: str, counts: Tensor, shares: Tensor, *, longest: int) -> tuple[Tensor, Tensor]:
    """([N] weight of a completion's every term, [N] what it adds to the units); [N] counts, shares in.

    grpo: mean over completions of the mean over terms. dapo, bnpo: mean over all terms of the global batch.
    dr_grpo: sum over terms / (completions x longest). sequence, token, sum: as grpo, dapo, and the plain sum,
    by tokens instead of terms.
    """
    ones = torch.ones_like(counts)
    return {
        "grpo": (1.0 / counts, ones),
        "dr_grpo": (ones / longest, ones),
        "sequence": (1.0 / shares, ones),
        "token": (ones, shares),
        "sum": (ones, ones),
    }.get(loss_type, (ones, counts))


def nll_weights(nll_weight: float, is_right: Tensor, units: Tensor) -> Tensor:
    """[N] --nll_weight for right completions, so that their mean is among themselves; [N] bool, units."""
    total, right = sum_over_ranks([float(units.sum()), float(units[is_right].sum())])
    return is_right.double() * (nll_weight * total / max(right, 1e-9))


def term_losses(
    flags: SurrogateFlags, new: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, sizes: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """([T] loss of each term before its weight, [T] values to log)."""
    low, high = flags.epsilon, flags.epsilon if flags.epsilon_high is None else flags.epsilon_high
    logged = {}
    if flags.surrogate == "linear":
        losses = -advantages * new / sizes
    elif flags.surrogate == "squared":
        # no gradient outside: with GDSD's 4e-4 nats of a whole answer about one inner update counts
        moved = (new - old).clamp(math.log(max(1 - low, 1e-300)), math.log(1 + high))
        losses = (moved / sizes - flags.squared_target * advantages) ** 2
    else:
        ratio = ((new - old) / sizes).exp()
        # the minimum lets a ratio far above 1 through where A < 0, as PPO does
        losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        seen = ratio.detach()
        low_clip, high_clip = (seen < 1 - low) & (advantages < 0), (seen > 1 + high) & (advantages > 0)
        logged = {
            "ratio/mean": seen,
            "clip_ratio/low_mean": low_clip.double(),
            "clip_ratio/high_mean": high_clip.double(),
            "clip_ratio/region_mean": (low_clip | high_clip).double(),
        }
    if ref is not None:
        kl = kl_terms(new - ref, flags.kl_estimator) / sizes
        losses = losses + flags.beta * kl
        logged["kl"] = kl.detach()
    return losses, logged


def kl_terms(difference: Tensor, estimator: str) -> Tensor:
    """Of d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.

    On policy the means of k1 and k3 are the KL. The expected gradient of k2 is the KL's, that of k1 is 0, and
    that of k3 is that of KL(pi_ref || pi). Source: Schulman, http://joschu.net/blog/kl-approx.html
    """
    if estimator == "k1":
        return difference
    # expm1: near d = 0 the three terms of k3 cancel to d^2 / 2
    return difference**2 / 2 if estimator == "k2" else torch.expm1(-difference) + difference


@dataclass
class GroupBatch:
    """This rank's completions of a step, ready for `fit`."""

    terms: Terms
    advantages: Tensor
    weights: Tensor  # [N] of every term of a completion
    old: Tensor | None  # [T] log-likelihoods under the sampling policy; None: this is it
    ref: Tensor | None  # [T] under the reference
    num_units: float
    record_ids: list[int]
    nll: Tensor | None = None  # [N] weight of a completion's own negative log-likelihood
    sums: Sums = field(default_factory=dict)  # to log beside those of the loss

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
        # on policy the ratio is 1, its gradient not 0
        old = new.detach() if batch.old is None else batch.old[which]
        ref = None if batch.ref is None else batch.ref[which]
        losses, logged = term_losses(flags, new, old, ref, advantages[which], terms.sizes[which])
        shares = terms.shares[which]
        add_sums(sums, {n: (float((v * shares).sum()), float(shares.sum())) for n, v in logged.items()})
        if batch.nll is not None:
            nll, weight = -new / terms.sizes[which], batch.nll[owners[which]]
            losses = losses + weight * nll
            right = shares * (weight > 0)
            add_sums(sums, {"nll": (float((nll.detach() * right).sum()), float(right.sum()))})
        return (losses * weights[which]).sum()

    value, parts = terms.parts(
        model,
        loss_of,
        on_policy=batch.old is None
        and batch.ref is None
        and batch.nll is None
        and flags.surrogate != "linear",
        is_linear=batch.ref is None and flags.surrogate == "linear",
    )
    return LossParts(value, parts, sums)
