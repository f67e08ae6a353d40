"""The held-out bound of a model."""

from collections.abc import Callable

import torch

from llada.diffusion.batches import MaskedBatch
from llada.diffusion.losses import masked_diffusion_loss
from llada.diffusion.stream import MaskedStream
from llada.run import Run, autocast, sum_over_ranks
from llada.training.config import TrainConfig


@torch.no_grad()
def validation_loss(
    model: torch.nn.Module,
    *,
    stream: MaskedStream,
    config: TrainConfig,
    run: Run,
    loss: Callable[[torch.nn.Module, MaskedBatch, float], torch.Tensor] = masked_diffusion_loss,
) -> float:
    """The same quantity over a stream's records under masks that never change, in the same unit.

    The records are shared out over the ranks; every rank gets the result.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    count = 0.0
    for batch in stream.validation(config.eval_limit):
        with autocast(run.device, config.dtype):
            total += loss(model, batch.to(run.device), 1.0).double().cpu()
        count += batch.num_units
    model.train(was_training)
    total_sum, count_sum = sum_over_ranks([float(total), count])
    return total_sum / count_sum
