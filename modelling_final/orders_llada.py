"""The orders in which masked positions are decided: one table from an order's name to its score.

Flags, configs and checks take their choices from here, so a new order is one function and one line of ORDERS.
Nothing here imports torch at run time: flags are read before torch is loaded.

A sequences, R masked positions, E head outputs.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Order = Callable[["Tensor", "Tensor"], "Tensor"]
"""(logits [A, R, E], chosen tokens [A, R]) -> scores [A, R]; a step decides the positions that score best."""


def confidence(logits: "Tensor", tokens: "Tensor") -> "Tensor":
    """Probability of the chosen token, at temperature 1."""
    return logits.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]


def low_confidence(logits: "Tensor", tokens: "Tensor") -> "Tensor":
    """log p / (1 - p) of the chosen token: orders as its probability does. Source: LLaDA generate.py."""
    index = tokens[..., None]
    chosen = logits.gather(-1, index)
    # Probabilities of a trained model tie at 1.0 in float32, and rounding would decide; log-odds do not.
    others = logits.scatter(-1, index, float("-inf")).logsumexp(dim=-1)
    return chosen[..., 0] - others


def max_probability(logits: "Tensor", tokens: "Tensor") -> "Tensor":
    """Probability of the most likely token, whichever was drawn: one token a step samples the model."""
    return logits.softmax(dim=-1).amax(dim=-1)


def margin(logits: "Tensor", tokens: "Tensor") -> "Tensor":
    """Probability of the most likely token less that of the second. Source: arXiv 2502.06768."""
    first, second = logits.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return first - second


def entropy(logits: "Tensor", tokens: "Tensor") -> "Tensor":
    """The negative entropy, in nats: the position with the least is decided first."""
    log_p = logits.log_softmax(dim=-1)
    return log_p.exp().mul_(log_p.masked_fill_(log_p.isneginf(), 0.0)).sum(dim=-1)


ORDERS: dict[str, Order | None] = {
    "low_confidence": low_confidence,
    "random": None,  # known before the forward, so only the rows whose turn it is are computed
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
}
LOOKS_AT_DRAW = {"low_confidence"}  # whose choice of positions depends on what was drawn there
# Under these orders a rule for many tokens a step has a probability to read.
PROBABILITIES: dict[str, Order] = {"low_confidence": confidence, "max_probability": max_probability}
