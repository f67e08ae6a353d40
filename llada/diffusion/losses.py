"""Losses of the suite: a model and a batch in, a float32 scalar out.

Shapes: B sequences, L positions, M masked tokens of a micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from llada.diffusion.batches import MaskedBatch
from llada.run import Sums


def masked_diffusion_loss(model: torch.nn.Module, batch: MaskedBatch, total_units: float) -> torch.Tensor:
    """Monte Carlo estimate of the negative ELBO, in nats per token (SFT: mean over records of nats per
    answer token).

        L = sum_j weight_j * nll_j / total_units,   weight_j = w_b / p_mask_b  for every masked token j of
        sequence b

    with w_b = 1 in pretraining and 1 / answer length in SFT.

    Args:
        model: gives the nll at the masked rows only, and their gradient, inside its own forward.
        batch: the noised micro-batch.
        total_units: `num_units` of the whole global batch, so micro-batches and ranks add up.

    Returns: scalar. With no masked token it is 0 with a zero gradient, so every rank still runs backward.

    Source: LLaDA GUIDELINES.md, Pre-training and SFT.
    """
    return model(**batch.inputs, weights=batch.weights / total_units).loss


@dataclass
class LossParts:
    """A micro-batch's share of a loss whose gradient comes in several forward and backward passes.

    Attributes:
        value: the share of the loss itself, to be logged; without a graph.
        parts: each is called once, in order, and gives a scalar; the gradients of all together are the
            gradient of `value`. Every rank must have as many.
        sums: to be logged as means over micro-batches and ranks, which must all name the same ones.
    """

    value: torch.Tensor
    parts: Sequence[Callable[[], torch.Tensor]]
    sums: Sums = field(default_factory=dict)
