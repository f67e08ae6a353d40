"""The exact likelihood of what the sampler did in one step, differentiable.

In a step with low-confidence remasking every masked position j of the block draws v_j from
q_j = softmax(logits_j / T), has the confidence c_j = p_j(v_j) with p_j = softmax(logits_j), and the k surest
ones are kept. What the others drew is forgotten. So for the kept set K, with c* its smallest confidence,

    log pi(K, v_K | state) = sum_{i in K} log q_i(v_i)  +  sum_{j not in K} log F_j(c*)
    F_j(c) = sum_{u: p_j(u) < c} q_j(u)                              what j drew was less sure than all of K

The first sum is the token term, the second the order term. Of equal confidences the first position wins, so
for a j behind the last of K the sum is over p_j(u) <= c. Orders that do not look at the draw have the first
sum alone. A trajectory's log-likelihood is the sum over its steps: a score function of the sampler itself.

Source: derived from LLaDA generate.py; tests/test_step_likelihood.py checks it against all possible draws.

Shapes: S states (steps of some sequences), M masked rows of their blocks, at most R of one state, E head
outputs, L positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelling_final import LLaDAGenerationConfig
from modelling_final.orders_llada import LOOKS_AT_DRAW

MIN_LOG_F = -20.0  # of an order term: below, its gradient is all noise

UNSCORED = {
    "top_k": 0,
    "top_p": 1.0,
    "cfg_scale": 0.0,
    "repetition_penalty": 1.0,
    "logits_eos_inf": False,
    "confidence_eos_eot_inf": False,
    "parallel_decoding": "none",
    "cache": "none",
    "remdm": "none",
}


def check_settings(settings: LLaDAGenerationConfig, *, order: bool = True) -> None:
    """ValueError unless the steps of a sampler with these settings have the likelihood above.

    Without `order` tokens alone are scored, however many a step decides.
    """
    for name, value in UNSCORED.items():
        if name == "parallel_decoding" and not order:
            continue
        if getattr(settings, name) != value:
            raise ValueError(
                f"--likelihood trajectory: {name} {getattr(settings, name)!r} has no exact step likelihood; "
                f"leave it at {value!r}"
            )
    if settings.temperature == 0:
        raise ValueError(
            "--likelihood trajectory: --temperature 0 has no likelihood; sample, for example at 1"
        )
    if settings.remasking in LOOKS_AT_DRAW - {"low_confidence"}:  # whose share is a formula of its own
        raise ValueError(f"--likelihood trajectory: --remasking {settings.remasking} has no likelihood here")


@dataclass(frozen=True)
class State:
    """A canvas before one step, and what the step decided."""

    token_ids: np.ndarray  # [L] prompt and answer, masks where nothing is decided yet
    # [R] masked positions of the block, in order; with random order those of the step alone
    positions: np.ndarray
    tokens: np.ndarray  # [R] what was written; read where `is_chosen`
    is_chosen: np.ndarray  # [R] bool


def replay(
    prompt: Sequence[int],
    trace: Sequence[dict[str, Any]],
    settings: LLaDAGenerationConfig,
    *,
    mask_id: int,
) -> list[State]:
    """The states of one sequence, in order, from its entries in the trace of `generate`."""
    length = settings.gen_length
    width = settings.block_of(length)
    answer = np.full(length, mask_id, dtype=np.int64)
    states = []
    for entry in trace:
        start = entry["block"] * width
        visible = start + width if settings.method == "semi_autoregressive_origin" else length
        masked = start + np.flatnonzero(answer[start : start + width] == mask_id)
        chosen = np.asarray(entry["positions"], dtype=np.int64)
        if settings.remasking not in LOOKS_AT_DRAW:  # whose turn it was does not depend on what was drawn
            masked = chosen
        tokens = answer.copy()
        tokens[chosen] = entry["token_ids"]
        states.append(
            State(
                token_ids=np.concatenate([np.asarray(prompt, dtype=np.int64), answer[:visible]]),
                positions=len(prompt) + masked,
                tokens=tokens[masked],
                is_chosen=np.isin(masked, chosen),
            )
        )
        answer = tokens
    return states


def merge_steps(states: Sequence[State], shrink: int) -> list[State]:
    """Every `shrink` neighbouring steps of a sequence as one: what they decided, from the first's state."""
    if shrink == 1:
        return list(states)
    merged = []
    for start in range(0, len(states), shrink):
        group = states[start : start + shrink]
        positions = np.concatenate([state.positions[state.is_chosen] for state in group])
        tokens = np.concatenate([state.tokens[state.is_chosen] for state in group])
        order = np.argsort(positions)
        # which positions stayed open is forgotten: merged steps have token terms only. Source: TraceRL
        is_chosen = np.ones(len(positions), dtype=bool)
        merged.append(State(group[0].token_ids, positions[order], tokens[order], is_chosen))
    return merged


@dataclass(frozen=True)
class StateBatch:
    """States as one forward takes them."""

    input_ids: Tensor  # [S, L]
    attention_mask: Tensor | None  # [S, L]; None without padding
    columns: Tensor  # [S, R] masked positions of the block, the last one repeated where there are fewer
    rows: Tensor  # [M] flat s * R + r, the entries of `columns` that count, in order
    owners: Tensor  # [M] state of each row
    tokens: Tensor  # [M]
    is_chosen: Tensor  # [M] bool
    num_states: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads, padding excluded."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def to(self, device: torch.device) -> "StateBatch":
        """The same batch on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def collate_states(states: Sequence[State], *, pad_id: int) -> StateBatch:
    """Stacks states, padded on the right; padding is not attended."""
    width = max(len(state.token_ids) for state in states)
    counts = [len(state.positions) for state in states]
    input_ids = np.full((len(states), width), pad_id, dtype=np.int64)
    columns = np.empty((len(states), max(counts)), dtype=np.int64)
    attended = np.zeros((len(states), width), dtype=np.int64)
    for s, state in enumerate(states):
        input_ids[s, : len(state.token_ids)] = state.token_ids
        attended[s, : len(state.token_ids)] = 1
        columns[s] = state.positions[-1]
        columns[s, : len(state.positions)] = state.positions
    rows = np.concatenate([s * max(counts) + np.arange(n) for s, n in enumerate(counts)])
    return StateBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=None if attended.all() else torch.from_numpy(attended),
        columns=torch.from_numpy(columns),
        rows=torch.from_numpy(rows),
        owners=torch.from_numpy(np.repeat(np.arange(len(states)), counts)),
        tokens=torch.from_numpy(np.concatenate([state.tokens for state in states])),
        is_chosen=torch.from_numpy(np.concatenate([state.is_chosen for state in states])),
        num_states=len(states),
    )


def batch_log_probs(
    model: torch.nn.Module,
    batch: StateBatch,
    settings: LLaDAGenerationConfig,
    *,
    mask_id: int,
    order: bool,
    by_token: bool = False,
) -> Tensor:
    """[S] log pi of each step, with its graph; `by_token`: log q of every chosen token, state by state."""
    # Asked as the sampler asks: the same rows of the last block, so the same bits.
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, query_positions=batch.columns
    ).logits
    logits = logits.flatten(0, 1).index_select(0, batch.rows)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if by_token:
        return _token_log_probs(logits, batch, settings.temperature, mask_id)[1]
    return step_log_probs(
        logits,
        batch,
        temperature=settings.temperature,
        mask_id=mask_id,
        order=order and settings.remasking in LOOKS_AT_DRAW,
    )


def log_odds(logits: Tensor) -> Tensor:
    """[M, E] log p / (1 - p) of every token: what the sampler's low confidence compares."""
    # F jumps where a confidence passes another's. Probabilities near 1 are rounded to the same few numbers,
    # so there every recomputation of the logits would jump; their odds are as exact as the logits.
    best, index = logits.max(dim=-1, keepdim=True)
    others = logits.scatter(1, index, -torch.inf).logsumexp(dim=-1, keepdim=True)
    log_p = logits - torch.logaddexp(best, others)
    # 1 - p loses its digits for the most likely token alone; there the sum of the others is at hand
    return (log_p - torch.log1p(-log_p.exp())).scatter(1, index, best - others)


def _token_log_probs(
    logits: Tensor, batch: StateBatch, temperature: float, mask_id: int
) -> tuple[Tensor, Tensor]:
    """([M, E] log q, log q of the chosen tokens)."""
    is_mask = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    is_mask[mask_id] = True
    log_q = (logits / temperature).masked_fill(is_mask, -torch.inf).log_softmax(dim=-1)
    chosen = batch.is_chosen
    return log_q, log_q[chosen].gather(1, batch.tokens[chosen, None])[:, 0]


def step_log_probs(
    logits: Tensor, batch: StateBatch, *, temperature: float, mask_id: int, order: bool
) -> Tensor:
    """[S] log-likelihood of each step, in nats, from [M, E] logits, at least float32, of every masked row.

    `temperature` is that of the token draws; confidences are those of T = 1, as in the sampler.
    """
    log_q, taken = _token_log_probs(logits, batch, temperature, mask_id)
    zeros = log_q.new_zeros(batch.num_states)
    chosen = batch.is_chosen
    total = zeros.index_add(0, batch.owners[chosen], taken)
    if not order or bool(chosen.all()):
        return total

    odds = log_odds(logits.detach())
    rows = torch.arange(len(chosen), device=logits.device)
    kept = odds[chosen].gather(1, batch.tokens[chosen, None])[:, 0]
    least = torch.full_like(zeros, torch.inf).scatter_reduce(0, batch.owners[chosen], kept, "amin")
    # the position of K that would have been the first to go: of equals, the last
    is_least = kept == least[batch.owners[chosen]]
    last = torch.zeros_like(zeros, dtype=torch.long).scatter_reduce(
        0, batch.owners[chosen], torch.where(is_least, rows[chosen], -1), "amax", include_self=False
    )
    left = ~chosen
    bound = least[batch.owners[left], None]
    is_behind = (rows[left] > last[batch.owners[left]])[:, None]
    is_less = (odds[left] < bound) | (is_behind & (odds[left] == bound))
    is_less &= log_q[left] > -torch.inf  # neither the mask nor what has no probability
    nothing = ~is_less.any(dim=-1)  # logsumexp of nothing has no gradient but nan
    log_f = log_q[left].masked_fill(~is_less, -torch.inf).masked_fill(nothing[:, None], 0.0).logsumexp(dim=-1)
    log_f = log_f.masked_fill(nothing | (log_f < MIN_LOG_F), MIN_LOG_F)
    return total.index_add(0, batch.owners[left], log_f)
