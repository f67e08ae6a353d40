"""Losses of the suite: a model and a batch in, a float32 scalar out.

Shapes: B sequences, L positions, M masked tokens of a micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from llada.diffusion.batches import MaskedBatch
from llada.run import Sums


def masked_diffusion_loss(model: torch.nn.Module, batch: MaskedBatch, total_units: float) -> torch.Tensor:
    """Monte Carlo estimate of the negative ELBO, in nats per token (SFT: of the answer, mean over records).

        L = sum_j weight_j * nll_j / total_units,   weight_j = w_b / p_mask_b   (masked token j of sequence b)

    with w_b = 1 in pretraining and 1 / answer length in SFT. `total_units` are those of the whole global
    batch, so micro-batches and ranks add up.

    Source: LLaDA GUIDELINES.md, Pre-training and SFT.
    """
    # the model gives the nll at the masked rows only; without any it is 0, and every rank still runs backward
    return model(**batch.inputs, weights=batch.weights / total_units).loss


@dataclass
class LossParts:
    """A micro-batch's share of a loss whose gradient comes in several forward and backward passes."""

    value: torch.Tensor  # of the share itself, to be logged; without a graph
    # Called once each, in order; the gradients of all together are that of `value`. As many on every rank.
    parts: Sequence[Callable[[], torch.Tensor]]
    # means over micro-batches and ranks, which must all name the same ones
    sums: Sums = field(default_factory=dict)
