"""From token log-probabilities under a plan's masks to one log-likelihood and its error, in nats.

`stratified` plans are read with control variates. How well a token is predicted depends, above all, on which
token it is, on how many tokens are masked, and on whether its near neighbours are. A small regression of log
p_i on those features has an expectation under the design that is known exactly, so only what it leaves
unexplained is left to chance:

    B  =  expectation of the fit  +  sum_n w_n sum_{i in M_n} (log p_i - fit_i(M_n))

The fit of token i is phi . (shared + own_i), own_i shrunk towards 0, phi = (1, l/T, is i-1 masked, ...),
each feature centred for its mask size. Fitted on the masks it corrects, the estimate has a small
bias, measured as a tenth to a quarter of its standard error: docs/evaluation.md.

Shapes: N masks, T answer tokens, F features, P = sum of |M_n| observations (a masked token under a mask).

Source: regression estimators of survey sampling (Cochran, Sampling Techniques, ch. 7); HC2 residuals for the
error (MacKinnon and White 1985).
"""

import math

import numpy as np

from llada.mask_plan import MaskPlan

# Neighbours by offset; a feature is whether all of them are masked.
NEIGHBOURS = ((-1,), (1,), (-2,), (2,), (-1, 1), (-2, -1), (1, 2))
SHRINKAGE = 1.0  # of the tokens' own coefficients: one observation's worth
SMALL_SAMPLE = 5  # draws spent on the fit, by which the error of few masks would be too small; measured
MIN_DRAWS = 8  # fewer masks cannot carry a regression


def estimate(plan: MaskPlan, log_probs: np.ndarray) -> tuple[float, float]:
    """(log-likelihood, standard error), in nats.

    Args:
        plan: its N masks.
        log_probs: [N, T], log p_i of the masked tokens; what stands elsewhere is not read.

    The error is 0 for an exact plan and nan where too few masks leave nothing to compare.
    """
    sums = np.where(plan.masks, log_probs, 0.0).sum(axis=1)
    value = float(plan.weights @ sums)
    if plan.design == "exact":
        return value, 0.0
    if plan.design == "stratified" and len(sums) >= MIN_DRAWS:
        return _regression_estimate(plan, log_probs)
    draws = plan.weights * sums
    if plan.design == "complementary":  # the two masks of a pair are one draw
        full = plan.masks.all(axis=1)
        pairs = np.cumsum(np.where(full, 2, 1)) - 1
        draws = np.bincount(pairs // 2, draws)
    num_draws = len(draws)
    if num_draws < 2:
        return value, math.nan
    return value, float(np.sqrt(num_draws * draws.var(ddof=1)))


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
    """Weighted ridge regression, solved token by token: F x F systems only, so long answers stay cheap.

    With G_t = sum of q phi phi^T over token t's observations (q the draw's relative weight) and D_t = (G_t +
    s)^-1, the shared coefficients solve sum_t s D_t G_t b = sum_t s D_t c_t, and token t's own are D_t (c_t
    - G_t b). The hat matrix is q (u_i C u_j + [i = j] phi_i D_i phi_i) with u = s D phi and C the inverse of
    the shared system.
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
        # the residuals of draw n had it been left out of the fit: (1 - H) r = residual, by Woodbury's
        # identity
        rows = draw == n
        scale = 1.0 / (1.0 - leverage[rows])
        scaled = scale[:, None] * u[rows]
        q = relative[rows][0]
        core = np.linalg.inv(np.linalg.inv(q * shared_inverse) - u[rows].T @ scaled)
        left_out = scale * residual[rows] + scaled @ (core @ (scaled.T @ residual[rows]))
        variance += max(0.0, error[n] * plan.weights[n] * left_out.sum())
    return value, math.sqrt(variance * num_draws / (num_draws - SMALL_SAMPLE))
