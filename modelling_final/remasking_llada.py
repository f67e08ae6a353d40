"""Which tokens a denoising step decides, and as what: functions of tensors, no model and no global state.

A sequences that still run, R masked positions of the current block (one row of logits each), E head outputs.
`valid` [A, R] marks the entries that are real: sequences may have different numbers of masked positions.

Randomness: every uniform number is a function of (seed, record id, candidate, block, step, position), so a
sequence draws the same ones in any batch, under any padding, and on any device.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .orders_llada import Order

# Which number of a position: its token, or whether it is its turn (two independent streams).
TOKEN_DRAW, ORDER_DRAW = 0, 1
# Of logits looked at together: on a CPU what stays in its cache, elsewhere what fills the device.
CHUNK_ELEMENTS = {"cpu": 2**20}


def transfer_schedule(num_masked: int, num_steps: int) -> list[int]:
    """How many tokens each of `num_steps` steps decides: M // S, and one more in the first M % S steps.

    Source: LLaDA generate.py, get_num_transfer_tokens.
    """
    # with S > M the last entries are 0: the model has no time input, so those forwards can be left out
    base, more = divmod(num_masked, num_steps)
    return [base + 1] * more + [base] * (num_steps - more)


def random_key(seed: int, record_id: int, candidate: int) -> np.ndarray:
    """The key of one candidate's stream, [2] uint64."""
    digest = hashlib.blake2b(repr((seed, "generate", record_id, candidate)).encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint64)


def uniform(keys: list[np.ndarray], *, block: int, step: int, draw: int, width: int) -> Tensor:
    """One number in [0, 1) for every position of a block: [A, width] float64, on the CPU.

    `keys`: A keys made by `random_key`; `draw`: TOKEN_DRAW or ORDER_DRAW.
    """
    rows = []
    for key in keys:
        # word 0 of the counter runs within the draw
        stream = np.random.Philox(key=key, counter=[0, draw, step, block])
        rows.append(np.random.Generator(stream).random(width))
    return torch.from_numpy(np.stack(rows))


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: l_u + (1 + w)(l_c - l_u). Source: LLaDA generate.py; arXiv 2410.18514."""
    return unconditional + (scale + 1) * (conditional - unconditional)


def penalise_repetition(logits: Tensor, present: Tensor, penalty: float) -> Tensor:
    """Makes tokens that are `present` [A, E] less likely: l / penalty above 0, l * penalty below.

    Source: CTRL, arXiv 1909.05858, section 4.1; with the sign rule of transformers.
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(present[:, None], penalised, logits)


def by_rows(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, values: Tensor) -> Tensor:
    """[A, R] of a function of logits [A, R, E] and values [A, R], some rows at a time."""
    # a vocabulary of 126,464 in float64 takes 1 MB a row, for all rows several times the logits themselves
    num_elements = CHUNK_ELEMENTS.get(logits.device.type, 2**24)
    if logits.device.type == "cpu":  # a 16th of the logits, or 1 MB: with less, calls cost more than rows
        num_elements = min(num_elements, max(logits.nbytes // 128, 2**17))
    num_rows = max(1, num_elements // logits.shape[-1])
    if values.numel() <= num_rows:
        return function(logits, values)
    chunks = zip(logits.flatten(0, 1).split(num_rows), values.flatten().split(num_rows), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks]).view(values.shape)


def choose_tokens(
    logits: Tensor,
    uniforms: Tensor | None,
    *,
    temperature: float,
    mask_id: int,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Token ids [A, R]: the most likely ones, or draws from softmax(logits / temperature) in float64.

    Args:
        logits: [A, R, E] float; left as they are. The mask token is never chosen.
        uniforms: [A, R] float64 in [0, 1); None at temperature 0.
        top_k, top_p: cut the distribution as transformers does: first to k tokens, then to probability p.
    """
    before = logits[..., mask_id].clone()
    logits[..., mask_id] = -torch.inf

    # A draw inverts the cumulative distribution at one number: the distribution of the published Gumbel-max,
    # argmax(l / T + g), with one number for a position instead of E.
    def invert(logits: Tensor, uniforms: Tensor) -> Tensor:
        scaled = logits.to(torch.float64, copy=True).div_(temperature)  # a copy of float64 logits too
        if top_k or top_p < 1:
            scaled = keep_likeliest(scaled, top_k, top_p)
        # in place: one table of float64 instead of four
        cumulative = torch.softmax(scaled, dim=-1, out=scaled).cumsum_(dim=-1)
        total = cumulative[..., -1:].contiguous()
        tokens = torch.searchsorted(cumulative, uniforms[..., None] * total, right=True)
        last = torch.searchsorted(cumulative, total)  # nothing beyond it has any probability
        return torch.minimum(tokens, last)[..., 0]

    tokens = logits.argmax(dim=-1) if temperature == 0 else by_rows(invert, logits, uniforms)
    logits[..., mask_id] = before
    return tokens


def keep_likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[..., E] with -inf for all but the k likeliest tokens, and of these all but the fewest that reach p."""
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[..., top_k:] = -torch.inf
    shares = ordered.softmax(dim=-1)
    ordered = ordered.masked_fill(shares.cumsum(dim=-1) - shares >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, tokens, ordered)


def order_scores(score: Order, logits: Tensor, tokens: Tensor, last_ids: Tensor | None) -> Tensor:
    """How early each position goes, [A, R]: the best score first.

    `last_ids`: [n] long or None, tokens to decide only when nothing else is left (EOS, EoT).

    Source: LLaDA generate.py, low_confidence and confidence_eos_eot_inf.
    """
    if last_ids is None:
        return by_rows(score, logits, tokens)

    # they count as impossible in the distribution of the others, and rank below every score
    def among_others(logits: Tensor, tokens: Tensor) -> Tensor:
        return score(logits.index_fill(-1, last_ids, -torch.inf), tokens)

    scores = by_rows(among_others, logits, tokens)
    # not -inf: what is no candidate at all ranks lower still
    return scores.masked_fill(torch.isin(tokens, last_ids), torch.finfo(scores.dtype).min)


def rank(scores: Tensor, valid: Tensor) -> Tensor:
    """Rank of each entry among the valid ones of its row, [A, R]: 0 is the best, and of equals the first."""
    order = scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def pick_top(scores: Tensor, valid: Tensor, num_picks: int) -> Tensor:
    """The `num_picks` best entries of each row, [A, R] bool."""
    return valid & (rank(scores, valid) < num_picks)


def pick_threshold(scores: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """All tokens with confidence >= threshold, at least the best one. Source: Fast-dLLM, arXiv 2505.22618."""
    return valid & ((scores >= threshold) | (rank(scores, valid) == 0))


def pick_factor(scores: Tensor, valid: Tensor, factor: float) -> Tensor:
    """The n best tokens for the largest n with (n + 1)(1 - c_(n)) < factor, at least the best one.

    Source: Fast-dLLM, arXiv 2505.22618, section 3.3; with factor <= 1 its theorem 1: as greedy sequential
    decoding.
    """
    # ranks count from 0: n is rank + 1
    ranks = rank(scores, valid)
    return valid & (((ranks + 2) * (1 - scores) < factor) | (ranks == 0))


def pick_entropy_bounded(scores: Tensor, entropies: Tensor, valid: Tensor, bound: float) -> Tensor:
    """The longest prefix U, best confidence first, with sum_U H - max_U H <= bound; at least the best one.

    Source: EB-Sampler, arXiv 2505.24857, section 4.
    """
    order = scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    sorted_h = entropies.masked_fill(~valid, 0.0).gather(1, order)
    excess = sorted_h.cumsum(dim=1) - sorted_h.cummax(dim=1).values
    fits = (excess <= bound).cumprod(dim=1).bool()
    fits[:, 0] = True  # the first token's excess is 0 up to rounding
    return valid & fits.gather(1, order.argsort(dim=1))


def pick_klass(
    scores: Tensor, stable_steps: Tensor, valid: Tensor, threshold: float, num_stable: int
) -> Tensor:
    """Tokens with confidence >= threshold whose distribution stayed put for `num_stable` steps, or the best.

    `stable_steps`: [A, R], for how many steps in a row KL(p^t || p^(t-1)) was below epsilon. Source: KLASS,
    arXiv 2511.05664.
    """
    ready = valid & (scores >= threshold) & (stable_steps >= num_stable)
    best = rank(scores, valid) == 0
    return torch.where(ready.any(dim=1, keepdim=True), ready, best & valid)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, in nats; infinite where q is not a distribution (all -inf)."""
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p == -torch.inf, 0.0).sum(dim=-1)  # 0 log 0 = 0


def remdm_sigma(rule: str, eta: float, step: int, num_steps: int, waits: Tensor) -> Tensor:
    """sigma [A, W]: probability that a decided token becomes a mask again in step `step` of `num_steps`.

    With alpha_t = 1 - t at t = 1 - step / num_steps and s one step later:
    sigma_max = min(1, (1 - alpha_s) / alpha_t), which is 0 in the last step;
    cap: min(eta, sigma_max); rescale: eta * sigma_max; conf: softmax(-psi) * sigma_max.

    `waits`: psi, the confidence each token had when it was decided; inf where it is a mask. Source: ReMDM,
    arXiv 2503.00307, section 4.
    """
    alpha_t, alpha_s = step / num_steps, (step + 1) / num_steps
    sigma_max = 1.0 if step == 0 else min(1.0, (1 - alpha_s) / alpha_t)
    if rule == "conf":
        share = (-waits).softmax(dim=1)
        return sigma_max * share.nan_to_num(0.0)  # a block that is all masks has no token to lose
    sigma = min(eta, sigma_max) if rule == "cap" else eta * sigma_max
    return torch.full_like(waits, sigma)


def remdm_unmask_probability(sigma: Tensor, step: int, num_steps: int) -> Tensor:
    """(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), what a mask becomes a token with. ReMDM, eq. 5."""
    alpha_t, alpha_s = step / num_steps, (step + 1) / num_steps
    return (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)


def first_columns(wanted: Tensor, num_columns: int) -> Tensor:
    """[A, num_columns] column numbers of `wanted` [A, W] bool: those that are, from the left, then others."""
    return wanted.logical_not().long().argsort(dim=1, stable=True)[:, :num_columns]
