"""The arithmetic of one training step: accumulate, clip, check, update; and its learning rate."""

import math
from collections.abc import Callable
from typing import Protocol

import torch

from llada.diffusion.losses import LossParts
from llada.run import Run, Sums, add_sums, autocast, means_over_ranks, sum_over_ranks
from llada.training.config import TrainConfig
from llada.training.monitor import MAX_SKIPPED_IN_A_ROW, Progress, gather_records
from llada.training.parallel import clip_gradients, gradient_sync, reduce_vectors


class Batch(Protocol):
    """What the loop needs of a micro-batch. Its loss is a mean over units: tokens, records or completions."""

    num_units: float
    record_ids: list[int]

    @property
    def num_tokens(self) -> int: ...

    def to(self, device: torch.device) -> "Batch": ...


Loss = Callable[[torch.nn.Module, Batch, float], torch.Tensor | LossParts]
"""(model, micro-batch, units of the global batch) -> this micro-batch's share of the loss."""


class Trainer:
    """The arithmetic of one step."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        run: Run,
        loss: Loss,
        state: Progress,
    ) -> None:
        self._config, self._run, self._loss, self._optimizer = config, run, loss, optimizer
        self._state, self._num_skipped_in_a_row = state, 0
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._model = model
        self._skips_nonfinite = config.on_nonfinite == "skip"

    def step(self, step: int, batches: list[Batch], total_units: float) -> dict[str, float]:
        """Forward, backward and update for this rank's part of a global batch of `total_units` units."""
        rate = learning_rate(step, self._config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        losses: list[torch.Tensor] = []
        sums: Sums = {}
        for i, batch in enumerate(batches):
            loss, more = self._forward_backward(batch, total_units, last=i == len(batches) - 1)
            losses.append(loss)
            add_sums(sums, more)
        reduce_vectors(self._model)  # before the norm: it is that of whole gradients
        grad_norm = clip_gradients(self._parameters, self._config.max_grad_norm or math.inf)
        (loss_value,) = sum_over_ranks([float(sum(losses))])
        self._state.phases.mark("forward_backward")
        if math.isfinite(loss_value) and math.isfinite(grad_norm):
            self._optimizer.step()
            self._num_skipped_in_a_row = 0
        else:
            self._skip_or_stop(step, batches, losses, f"loss {loss_value}, gradient norm {grad_norm}")
        self._optimizer.zero_grad(set_to_none=True)
        self._state.phases.mark("optimizer")
        step_values = {"loss": loss_value, "grad_norm": grad_norm, "learning_rate": rate}
        return step_values | means_over_ranks(sums)

    def _forward_backward(self, batch: Batch, total_units: float, *, last: bool) -> tuple[torch.Tensor, Sums]:
        """The micro-batch's share of the loss, its gradients added, and its sums to log."""
        # DDP and FSDP average gradients over ranks, and the loss is already divided by the units of all of
        # them: hence times the number of ranks.
        always = self._config.reduce_always
        with gradient_sync(self._model, last=last or always):
            with autocast(self._run.device, self._config.dtype):
                loss = self._loss(self._model, batch.to(self._run.device), total_units)
            if isinstance(loss, torch.Tensor):
                (loss * self._run.world_size).backward()
                return loss.detach(), {}
        for k, part in enumerate(loss.parts):
            with gradient_sync(self._model, last=always or (last and k == len(loss.parts) - 1)):
                with autocast(self._run.device, self._config.dtype):
                    value = part()
                (value * self._run.world_size).backward()
        return loss.value, loss.sums

    def _skip_or_stop(self, step: int, batches: list[Batch], losses: list[torch.Tensor], found: str) -> None:
        """What --on_nonfinite asks for. Loss and norm are those of all ranks, so all of them come here."""
        broken = [batch for batch, loss in zip(batches, losses, strict=True) if not loss.isfinite()]
        suspects = gather_records([record for batch in broken for record in batch.record_ids])
        if not suspects:  # the losses are finite, a gradient is not
            suspects = gather_records([record for batch in batches for record in batch.record_ids])
        message = f"step {step}: {found}; nothing was updated; records: {suspects}"
        self._num_skipped_in_a_row += 1
        if not self._skips_nonfinite or self._num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{message}. Lower --learning_rate, look at the records, or leave such steps out with "
                f"--on_nonfinite skip (at most {MAX_SKIPPED_IN_A_ROW} in a row)"
            )
        self._state.note_skipped()
        if self._run.is_main:
            print(f"{message}; skipped ({self._state.results['num_skipped_steps']} so far)", flush=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then down to --min_learning_rate."""
    warmup = config.warmup_steps or int(config.warmup_ratio * config.max_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    low, span = config.min_learning_rate, config.learning_rate - config.min_learning_rate
    if config.lr_scheduler_type == "wsd":
        num_decay = max(1, int(config.decay_ratio * config.max_steps))
        return low + span * min(1.0, (config.max_steps - step) / num_decay)
    progress = (step - warmup) / max(1, config.max_steps - warmup)
    shape = 1 - progress if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return low + span * shape
