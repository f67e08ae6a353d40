"""Losses that pull a student towards a teacher's distributions: tensors in, float32 numbers out.

The teacher's distribution at a position is known for some tokens (the top k, or all of them); everything else
is one bucket, "rest": the teacher's tail, and its tokens that the student does not have. The student's
distribution is cut into the same categories. So no loss asks how the rest is shared out inside, a top-k KL is
a lower bound of the full one, and the two are equal with k = all.

R rows (positions), K known tokens a row, E columns of the student's head.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import torch
from torch import Tensor

LK_DECAY = 3.0  # lambda = exp(-3 alpha). Source: LK losses, arXiv 2602.23881


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's distribution at R positions, in the student's vocabulary."""

    # [R, K] long, the student's ids of the known tokens, -1 = none; None: column v is token v
    ids: Tensor | None
    log_probs: Tensor  # [R, K] float32; -inf for what is not known
    log_rest: Tensor  # [R] float32, log-probability of all other tokens together


class TeacherSource(Protocol):
    """The teacher's distributions of a micro-batch, read when they are needed."""

    def take(self, start: int, stop: int, device: torch.device) -> TeacherRows:
        """Rows start to stop of those that have a distribution."""


def categories(logits: Tensor, teacher: TeacherRows) -> tuple[Tensor, Tensor]:
    """(log p, log q), each [R, K + 1]: the known tokens, then the rest; both normalised, in float32.

    `logits`: [R, E] of the student, any floating type; -inf rules a token out. A token that the teacher does
    not know is in the student's rest, one that the student cannot say in the teacher's.
    """
    log_q = logits.float().log_softmax(-1)
    num_columns = log_q.shape[-1]
    ids = teacher.ids
    if ids is None:
        ids = torch.arange(teacher.log_probs.shape[-1], device=logits.device).expand_as(teacher.log_probs)
    known = log_q.gather(1, ids.clamp(0, num_columns - 1))
    has_id = (ids >= 0) & (ids < num_columns)
    is_known = has_id & (teacher.log_probs > -torch.inf) & (known > -torch.inf)
    in_rest = torch.ones(log_q.shape[0], num_columns + 1, dtype=torch.bool, device=logits.device)
    # unknown ids go to one column more, which belongs to no token
    in_rest = in_rest.scatter_(1, ids.where(is_known, num_columns), False)[:, :-1]
    rest, has_rest = _log_sum(log_q.masked_fill(~in_rest, -torch.inf))
    log_q = torch.cat([known.masked_fill(~is_known, -torch.inf), rest[:, None]], dim=1)

    log_p = teacher.log_probs.float()
    impossible, _ = _log_sum(log_p.masked_fill(is_known, -torch.inf))
    # where the student has nothing left for a rest, the teacher's is dropped: it cannot be learned
    log_rest = torch.logaddexp(teacher.log_rest.float(), impossible).masked_fill(~has_rest, -torch.inf)
    log_p = torch.cat([log_p.masked_fill(~is_known, -torch.inf), log_rest[:, None]], dim=1)
    return log_p - log_p.logsumexp(-1, keepdim=True), log_q


def _log_sum(log_x: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp over the last dimension, is there anything to sum); without it -inf, and no NaN gradient."""
    has_any = (log_x > -torch.inf).any(-1)
    total = log_x.masked_fill(~has_any[:, None], 0.0).logsumexp(-1)
    return total.masked_fill(~has_any, -torch.inf), has_any


def temper(log_probs: Tensor, temperature: float) -> Tensor:
    """log of p^(1/T) / sum p^(1/T): a softmax at temperature T, from its log-probabilities at 1."""
    if temperature == 1.0:
        return log_probs
    scaled = log_probs / temperature
    return scaled - scaled.logsumexp(-1, keepdim=True)


def kl_divergence(log_p: Tensor, log_q: Tensor, *, clip: float = math.inf) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of each row, in nats; 0 log 0 = 0.

    `clip`: no summand counts for more, and those that would have no gradient. Source: d-OPSD, 2606.18195.
    """
    has_mass = log_p > -torch.inf
    difference = log_p.masked_fill(~has_mass, 0.0) - log_q.masked_fill(~has_mass, 0.0)
    return (log_p.exp() * difference).clamp(max=clip).sum(-1)


def acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """alpha = sum_v min(p_v, q_v) over the known tokens: the probability that a draft from q is accepted.

    With a top-k teacher a lower bound. Source: Leviathan et al., arXiv 2211.17192.
    """
    return torch.minimum(log_p, log_q)[..., :-1].exp().sum(-1)  # what happens inside the rest is not known


def lk_loss(log_p: Tensor, log_q: Tensor) -> Tensor:
    """lambda KL(p || q) + (1 - lambda) (1 - alpha), lambda = exp(-3 alpha): KL first, acceptance in the end.

    1 - alpha is the total variation distance. Source: LK losses, arXiv 2602.23881.
    """
    alpha = acceptance(log_p, log_q)
    share = torch.exp(-LK_DECAY * alpha.detach())
    return share * kl_divergence(log_p, log_q) + (1 - share) * (1 - alpha)


@dataclass(frozen=True)
class RowObjective:
    """What is minimised at a row: alpha * cross-entropy + beta * (KL, reverse KL or LK loss)."""

    alpha: float
    beta: float
    temperature: float = 1.0  # both distributions are tempered with it before the KL
    times_t2: bool = False  # multiply the KL with T^2, which keeps its gradient's size. Source: 1503.02531
    # the LK loss instead of the KL; always at temperature 1, for drafts are accepted at 1
    is_lk: bool = False
    is_reverse: bool = False  # KL(student || teacher)
    clip: float = math.inf  # of each token's part of a KL

    def distance(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """[R] how far the student is from the teacher."""
        if self.is_lk:
            return lk_loss(log_p, log_q)
        scale = self.temperature**2 if self.times_t2 else 1.0
        pair = temper(log_p, self.temperature), temper(log_q, self.temperature)
        return scale * kl_divergence(*(reversed(pair) if self.is_reverse else pair), clip=self.clip)


def streak_weights(alpha: Tensor, starts_window: Tensor, carried: float) -> tuple[Tensor, float]:
    """w_k = prod_{i<k} alpha_i within each window: the probability that position k of a draft matters at all.

    Args:
        alpha: [R] acceptance of consecutive rows.
        starts_window: [R] bool, rows that are the first of their window.
        carried: the product at the end of the rows before these; the one to carry on is returned too.
    """
    weights, product = [], carried
    for value, first in zip(alpha.detach().tolist(), starts_window.tolist(), strict=True):
        product = 1.0 if first else product
        weights.append(product)
        product *= value
    return torch.tensor(weights, device=alpha.device), product


def accepted_length(alpha: Tensor, starts_window: Tensor) -> Tensor:
    """[windows] tau = 1 + sum_k prod_{i<=k} alpha_i: tokens a step of speculative decoding, predicted."""
    if not alpha.numel():
        return alpha.new_zeros(0)
    before, _ = streak_weights(alpha, starts_window, 1.0)
    window = starts_window.long().cumsum(0) - 1
    # 1: the verifier's own token
    return alpha.new_ones(int(window[-1]) + 1).index_add(0, window, before * alpha)


@dataclass
class RowScore:
    """The losses of M rows in order, chunk by chunk: a `score` of `LLaDAModelLM.forward`.

    `alpha` [M], acceptance of each row, 0 without a teacher, and `matches` [M] bool, whether both models'
    most likely token is the same, are filled as the chunks come.
    """

    objective: RowObjective
    _: KW_ONLY
    targets: Tensor  # [M] long
    weights: Tensor  # [M] float32, of the cross-entropy
    teacher: TeacherSource  # gives the distributions of the rows that have one
    has_teacher: Tensor  # [M] bool
    teacher_weights: Tensor  # [M] float32, of the KL or LK loss, 0 without a teacher
    starts_window: Tensor  # [M] bool, rows that are the first of their window
    forbidden_ids: Tensor  # columns that are never an answer: the mask, and those of no token
    uses_streaks: bool  # also multiply every row's weights with `streak_weights`

    def __post_init__(self) -> None:
        self.alpha = torch.zeros(self.targets.shape, device=self.targets.device)
        self.matches = torch.zeros(self.targets.shape, dtype=torch.bool, device=self.targets.device)
        # the teacher's rows before each row: it is asked for its own by their numbers
        self._num_before = [0, *self.has_teacher.long().cumsum(0).tolist()]
        self._streak = 1.0

    def __call__(self, logits: Tensor, chunk: slice) -> Tensor:
        logits = logits.index_fill(-1, self.forbidden_ids, -torch.inf)
        losses = logits.new_zeros(logits.shape[0])
        if self.objective.alpha:
            nll = torch.nn.functional.cross_entropy(logits, self.targets[chunk], reduction="none")
            losses = losses + self.objective.alpha * self.weights[chunk] * nll
        first, last = self._num_before[chunk.start], self._num_before[chunk.stop]
        if last > first:
            distance = self._distance(logits, chunk, self.teacher.take(first, last, logits.device))
            losses = losses + self.objective.beta * self.teacher_weights[chunk] * distance
        if self.uses_streaks:
            weights, self._streak = streak_weights(self.alpha[chunk], self.starts_window[chunk], self._streak)
            losses = losses * weights
        return losses

    def _distance(self, logits: Tensor, chunk: slice, teacher: TeacherRows) -> Tensor:
        """[rows of the chunk] distance to the teacher, 0 for rows without; notes acceptance and matches."""
        rows = self.has_teacher[chunk].nonzero()[:, 0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.objective.beta != 0):
            log_p, log_q = categories(logits[rows], teacher)
            distance = log_p.new_zeros(rows.shape)
            if self.objective.beta:
                distance = self.objective.distance(log_p, log_q)
        best = log_p[:, :-1].argmax(-1)
        best = best if teacher.ids is None else teacher.ids.gather(1, best[:, None])[:, 0]
        self.alpha[chunk.start + rows] = acceptance(log_p, log_q).detach()
        self.matches[chunk.start + rows] = logits[rows].argmax(-1) == best
        return logits.new_zeros(logits.shape[0]).index_add(0, rows, distance)
