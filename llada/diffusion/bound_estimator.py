"""Which subsets of an answer to mask, and with which weights, to estimate its log-likelihood.

The quantity is the any-order evidence lower bound of an answer y of T tokens after a context x, in nats:

    B(y | x) = sum_{l=1..T} E_{|M|=l} (1/l) sum_{i in M} log p(y_i | x, y_notM)          (l-form)

A plan is N masks M_n with weights w_n; sum_n w_n sum_{i in M_n} log p(y_i | x, y_notM_n) estimates B without
bias (the `reference` plan excepted, which reproduces a published bias on purpose).

A model that attends by blocks writes them from left to right, and its bound is the sum of theirs, each given
the clean blocks before it:  log p(y | x) = sum_k log p(y_k | x, y_<k) >= sum_k B(y_k | x, y_<k).

Shapes: N masks (one forward each), T answer tokens, S strata (mask sizes l).

Source: LLaDA (arXiv 2502.09992) eq. 14; VRPO (arXiv 2505.19223); ESPO for the complementary pairs;
BD3LM (arXiv 2503.09573) eq. 8 for the blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llada.diffusion.settings import MaskSettings


@dataclass(frozen=True)
class MaskPlan:
    """N masks of a T-token answer; the plain estimate is sum_n weights_n sum_{i in masks_n} log p_i."""

    masks: np.ndarray  # [N, T] bool
    weights: np.ndarray  # [N] float64; [N, T] by blocks, whose masks differ in size
    design: str  # the estimator that drew them, or "exact" when every mask is there once


def plan_masks(num_tokens: int, random: np.random.Generator, settings: MaskSettings) -> MaskPlan:
    """The masks for one answer of T tokens, drawn from a `masking.generator`: equal keys, equal masks.

    ValueError: no token, no mask, or counts that the estimator cannot split.
    """
    num_masks, law = settings.num_masks, settings.size_law
    if num_tokens < 1 or num_masks < 1:
        raise ValueError(f"an answer needs at least 1 token and 1 mask, got {num_tokens} and {num_masks}")
    if settings.estimator == "stratified":
        if num_tokens <= settings.exact_tokens or 2 ** min(num_tokens, 62) - 1 <= num_masks:
            return enumerate_masks(num_tokens)
        return _stratified(num_tokens, num_masks, random, law)
    if settings.estimator == "iid":
        return _iid(num_tokens, num_masks, random, law)
    if settings.estimator == "complementary":
        return _complementary(num_tokens, num_masks, random)
    if settings.estimator == "gauss":
        return _gauss(num_tokens, num_masks, random)
    return _reference(num_tokens, num_masks, random, settings.reference_batch)


def block_lengths(num_before: int, num_tokens: int, block_size: int | None) -> list[int]:
    """Tokens of each block of an answer behind `num_before` others; one block where `block_size` is None."""
    if block_size is None:
        return [num_tokens]
    # attention counts blocks from the first token of all, so the answer's first one may begin before it
    first = min(num_tokens, block_size - num_before % block_size)
    num_whole, rest = divmod(num_tokens - first, block_size)
    return [first, *[block_size] * num_whole, *[rest] * (rest > 0)]


def plan_answer(
    num_before: int,
    num_tokens: int,
    random: np.random.Generator,
    settings: MaskSettings,
    *,
    block_size: int | None = None,
) -> MaskPlan:
    """`plan_masks` of an answer behind `num_before` tokens; by blocks, N masks of each side by side."""
    lengths = block_lengths(num_before, num_tokens, block_size)
    plans = [plan_masks(length, random, settings) for length in lengths]
    return plans[0] if block_size is None else _side_by_side(plans, settings.num_masks)


def _side_by_side(plans: Sequence[MaskPlan], num_masks: int) -> MaskPlan:
    """One plan of the plans of an answer's blocks: a forward shows every block under a mask of its own."""
    num_tokens = sum(plan.masks.shape[1] for plan in plans)
    masks, weights = np.zeros((num_masks, num_tokens), dtype=bool), np.zeros((num_masks, num_tokens))
    start = 0
    for plan in plans:
        block = slice(start, start + plan.masks.shape[1])
        # all masks of a short block, as often as there is room: draws then differ by what is random alone
        copies = max(1, num_masks // len(plan.masks)) if plan.design == "exact" else 1
        row = np.arange(copies * len(plan.masks))
        if plan.design == "complementary":  # one lacks its empty side; pairs of all blocks must stay together
            pair = draw_of(plan)
            row = 2 * pair + np.append(False, pair[1:] == pair[:-1])
        masks[row, block] = np.tile(plan.masks, (copies, 1))
        weights[row, block] = np.tile(plan.weights / copies, copies)[:, None]
        start = block.stop
    design = next((plan.design for plan in plans if plan.design != "exact"), "exact")
    return MaskPlan(masks, weights, design)


def enumerate_masks(num_tokens: int) -> MaskPlan:
    """All 2^T - 1 masks, each with weight 1 / (l C(T, l)): the estimate is exact."""
    codes = np.arange(1, 2**num_tokens)
    masks = (codes[:, None] >> np.arange(num_tokens)) & 1 == 1
    sizes = masks.sum(axis=1)
    weights = np.array([1.0 / (size * math.comb(num_tokens, size)) for size in sizes])
    return MaskPlan(masks, weights, "exact")


def _random_masks(sizes: np.ndarray, num_tokens: int, random: np.random.Generator) -> np.ndarray:
    """[N, T]: independent uniform masks of the given sizes."""
    ranks = np.argsort(random.random((len(sizes), num_tokens)), axis=1).argsort(axis=1)
    return ranks < sizes[:, None]


def _size_law(num_tokens: int, size_law: str) -> np.ndarray:
    """[T] the probability of each size 1..T."""
    law = np.arange(1, num_tokens + 1) ** (-0.5 if size_law == "inv_sqrt" else 0.0)
    return law / law.sum()


def _stratified(num_tokens: int, num_masks: int, random: np.random.Generator, size_law: str) -> MaskPlan:
    """One size from each of N equally likely slices of 1..T, each with weight 1 / (N q(l) l).

    Each mask alone is uniform among those of its size, so the estimate is unbiased.
    """
    slices = (np.arange(num_masks) + random.random(num_masks)) / num_masks
    law = _size_law(num_tokens, size_law)
    if size_law == "uniform":
        sizes = np.minimum((slices * num_tokens).astype(np.int64), num_tokens - 1) + 1
    else:
        sizes = np.minimum(np.searchsorted(law.cumsum(), slices, side="right"), num_tokens - 1) + 1
    # The masks, smallest first, are cut from one endless sequence of shuffled tokens: neighbours in size
    # never concentrate on the same tokens.
    masks = np.zeros((num_masks, num_tokens), dtype=bool)
    deck = random.permutation(num_tokens)
    for mask, size in zip(masks, sizes, strict=True):
        # a token must not come twice in a mask: what is left goes under the next shuffle
        if size > len(deck):
            fresh = random.permutation(num_tokens)
            deck = np.concatenate([deck, fresh[~np.isin(fresh, deck)], deck])
        mask[deck[:size]] = True
        deck = deck[size:]
    return MaskPlan(masks, 1.0 / (num_masks * law[sizes - 1] * sizes), "stratified")


def _iid(num_tokens: int, num_masks: int, random: np.random.Generator, size_law: str) -> MaskPlan:
    law = _size_law(num_tokens, size_law)
    sizes = random.choice(np.arange(1, num_tokens + 1), size=num_masks, p=law)
    weights = 1.0 / (num_masks * law[sizes - 1] * sizes)
    return MaskPlan(_random_masks(sizes, num_tokens, random), weights, "iid")


def _complementary(num_tokens: int, num_masks: int, random: np.random.Generator) -> MaskPlan:
    """Pairs (M, not M) with |M| uniform on 0..T, each side with weight (T + 1) / (2 l). Source: ESPO."""
    if num_masks % 2:
        raise ValueError(f"the complementary estimator draws pairs: num_masks {num_masks} must be even")
    sizes = random.integers(0, num_tokens + 1, size=num_masks // 2)
    half = _random_masks(sizes, num_tokens, random)
    masks = np.stack([half, ~half], axis=1).reshape(num_masks, num_tokens)
    # an empty side counts 0: E[(T + 1) / l sum_M] with l uniform on 0..T is B
    masks = masks[masks.any(axis=1)]
    return MaskPlan(masks, (num_tokens + 1) / (num_masks * masks.sum(axis=1)), "complementary")


def _reference(num_tokens: int, num_masks: int, random: np.random.Generator, batch: int) -> MaskPlan:
    """LLaDA's get_log_likelihood: rounds of b sizes, round(linspace(k, k + (b-1) T/b)) wrapped into 1..T.

    Rounding is half to even and k an integer: the sizes are not uniform unless T is 1 or a multiple of b.
    Source: ML-GSAI/LLaDA get_log_likelihood.py, forward_process.
    """
    if num_masks % batch:
        raise ValueError(f"num_masks (mc_num) {num_masks} must be a multiple of the batch size {batch}")
    sizes = np.empty((num_masks // batch, batch), dtype=np.int64)
    for row in sizes:
        k = int(random.integers(1, num_tokens + 1))
        # float32 as published: the ties that rounding meets depend on it
        points = torch.linspace(float(k), k + (batch - 1) * (num_tokens / batch), steps=batch)
        row[:] = (points.round().long().numpy() - 1) % num_tokens + 1
    sizes = sizes.reshape(-1)
    weights = num_tokens / (sizes * float(num_masks))
    return MaskPlan(_random_masks(sizes, num_tokens, random), weights, "reference")


def _gauss(num_tokens: int, num_masks: int, random: np.random.Generator) -> MaskPlan:
    """int(t T) tokens at each of N Gauss-Legendre nodes t of (0, 1), with weight w / t. Source: GDPO."""
    nodes, weights = np.polynomial.legendre.leggauss(num_masks)
    times = 0.5 + 0.5 * nodes
    sizes = (times * num_tokens).astype(np.int64)  # 0 where t T < 1
    return MaskPlan(_random_masks(sizes, num_tokens, random), 0.5 * weights / times, "gauss")


# Neighbours by offset; a feature is whether all of them are masked.
NEIGHBOURS = ((-1,), (1,), (-2,), (2,), (-1, 1), (-2, -1), (1, 2))
SHRINKAGE = 1.0  # of the tokens' own coefficients: one observation's worth
SMALL_SAMPLE = 5  # draws spent on the fit, by which the error of few masks would be too small; measured
# n / (n - 2.5) times the variance: 1.96 errors then reach as far as Student's t of n pairs. 8 masks: 4 pairs.
FEW_PAIRS = 2.5
MIN_DRAWS = 8  # fewer masks cannot carry a regression


def draw_of(plan: MaskPlan) -> np.ndarray:
    """[N] the independent draw that each mask belongs to; a complementary pair is one, as is a full mask."""
    if plan.design != "complementary":
        return np.arange(len(plan.masks))
    if plan.weights.ndim == 2:  # by blocks, with the empty masks
        return np.arange(len(plan.masks)) // 2
    return (np.cumsum(np.where(plan.masks.all(axis=1), 2, 1)) - 1) // 2


def estimate(plan: MaskPlan, log_probs: np.ndarray) -> tuple[float, float]:
    """(log-likelihood, standard error) of a plan, in nats, from [N, T] log p_i of its masked tokens.

    The error is 0 for an exact plan and nan where too few masks leave nothing to compare.
    """
    sums = np.where(plan.masks, log_probs, 0.0).sum(axis=1)  # elsewhere `log_probs` is not read
    value = float(plan.weights @ sums)
    if plan.design == "exact":
        return value, 0.0
    if plan.design == "stratified" and len(sums) >= MIN_DRAWS:
        return _regression_estimate(plan, log_probs)
    draws = plan.weights * sums
    draws = np.bincount(draw_of(plan), draws)
    num_draws = len(draws)
    if num_draws < 2 or plan.design == "gauss":  # nodes are no sample
        return value, math.nan
    variance = num_draws * draws.var(ddof=1)
    if plan.design == "complementary":
        variance *= num_draws / max(num_draws - FEW_PAIRS, 0.05)
    return value, float(np.sqrt(variance))


def _features(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(draw [P], token [P], phi [P, F]) of every masked token; all features but the first average to 0.

    Given that i is masked among l of T tokens, k other tokens are all masked with probability
    (l-1)...(l-k) / (T-1)...(T-k). Positions outside the answer are never masked, so such a feature is 0.
    """
    num_draws, num_tokens = masks.shape
    reach = max(abs(offset) for group in NEIGHBOURS for offset in group)
    padded = np.zeros((num_draws, num_tokens + 2 * reach), dtype=bool)
    padded[:, reach : reach + num_tokens] = masks
    draw, token = np.nonzero(masks)
    size = masks.sum(axis=1)[draw]
    columns = [np.ones(len(draw)), (size - (num_tokens + 1) / 2) / num_tokens]
    for group in NEIGHBOURS:
        is_masked = np.ones(len(draw), dtype=bool)
        is_inside = np.ones(len(draw), dtype=bool)
        expected = np.ones(len(draw))
        for k, offset in enumerate(group, start=1):
            is_masked &= padded[draw, token + reach + offset]
            is_inside &= (token + offset >= 0) & (token + offset < num_tokens)
            expected *= np.maximum(size - k, 0) / max(num_tokens - k, 1)
        columns.append(is_masked - np.where(is_inside, expected, 0.0))
    return draw, token, np.stack(columns, axis=1)


def _regression_estimate(plan: MaskPlan, log_probs: np.ndarray) -> tuple[float, float]:
    """(log-likelihood, standard error): the weighted sum, with a regression as its control variate.

    Why it may be used. Fit log p_i(M) by f_i(M) = phi_i(M) . (b + b_i), b shared by all tokens and b_i the
    token's own. All features but the constant average to 0 under the bound's law of masks, so the bound of f
    is known: sum_i (b + b_i)[0]. For any coefficients, then,

        B = sum_i (b + b_i)[0] + E sum_n w_n sum_{i in M_n} (log p_i(M_n) - f_i(M_n))

    and only the residuals are left to the sampling. A wrong fit costs variance, not truth; that the fit has
    seen the same masks leaves a bias, which a test of the printed error's coverage bounds.

    The fit minimises sum_n q_n sum_{i in M_n} (log p_i - f_i)^2 + s sum_i |b_i|^2 + 0.1 s |b|^2, with q the
    weights over their mean and s = SHRINKAGE. For G_t = sum q phi phi^T and c_t = sum q phi log p over token
    t's observations, setting the derivatives to 0 gives

        b_t = D_t (c_t - G_t b),  D_t = (G_t + s)^-1         sum_t (G_t (b + b_t) - c_t) + 0.1 s b = 0

    and, since G_t - G_t D_t G_t = s D_t G_t, the second is (sum_t s D_t G_t + 0.1 s) b = sum_t s D_t c_t:
    F x F systems only, so long answers stay cheap (a test solves the whole system beside it).

    The error. e_n is draw n's part of the residual sum, e'_n the same had draw n been left out of the fit:
    r' = (1 - H)^-1 r within the draw, where the hat matrix is H_ij = q (u_i C u_j + [i = j] phi_i D_i phi_i),
    u = s D phi, C the inverse of the shared system, inverted by Woodbury's identity. The variance is
    sum_n e_n e'_n (White's HC2), times N / (N - SMALL_SAMPLE).
    """
    draw, token, phi = _features(plan.masks)
    num_draws, num_tokens = plan.masks.shape
    observed = log_probs[draw, token]
    weight = plan.weights[draw]
    relative = weight / weight.mean()
    num_features = phi.shape[1]
    gram = np.zeros((num_tokens, num_features, num_features))
    moment = np.zeros((num_tokens, num_features))
    np.add.at(gram, token, relative[:, None, None] * phi[:, :, None] * phi[:, None, :])
    np.add.at(moment, token, (relative * observed)[:, None] * phi)
    inverse = np.linalg.inv(gram + SHRINKAGE * np.eye(num_features))
    # 0.1: the shared coefficients have T times the observations, and hardly need to be shrunk
    shared_inverse = np.linalg.inv(SHRINKAGE * ((inverse @ gram).sum(axis=0) + 0.1 * np.eye(num_features)))
    shared = shared_inverse @ (SHRINKAGE * np.einsum("tfg,tg->f", inverse, moment))
    own = np.einsum("tfg,tg->tf", inverse, moment - gram @ shared)
    residual = observed - np.einsum("pf,pf->p", phi, shared + own[token])
    error = np.bincount(draw, weight * residual, minlength=num_draws)
    value = float((shared[0] + own[:, 0]).sum() + error.sum())

    u = SHRINKAGE * np.einsum("pfg,pg->pf", inverse[token], phi)
    leverage = relative * np.einsum("pf,pfg,pg->p", phi, inverse[token], phi)
    variance = 0.0
    for n in range(num_draws):
        rows = draw == n
        scale = 1.0 / (1.0 - leverage[rows])
        scaled = scale[:, None] * u[rows]
        q = relative[rows][0]
        core = np.linalg.inv(np.linalg.inv(q * shared_inverse) - u[rows].T @ scaled)
        left_out = scale * residual[rows] + scaled @ (core @ (scaled.T @ residual[rows]))
        variance += max(0.0, error[n] * plan.weights[n] * left_out.sum())
    return value, math.sqrt(variance * num_draws / (num_draws - SMALL_SAMPLE))
