"""The published training loss and a peer's, written out plainly: what ours is compared with.

All of them take one noised batch and give the same number, so that a test or a benchmark can hold them side
by side; nothing here is used in training.

Shapes: B sequences, L positions, M masked positions, V head outputs.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llada.diffusion.masking import EPS, exact_mask


@dataclass(frozen=True)
class NoisedBatch:
    """One noised batch in the form that each loss wants; every token may be masked."""

    x_0: Tensor  # [B, L]
    x_t: Tensor  # [B, L]
    is_masked: Tensor  # [B, L]
    p_mask: Tensor  # [B, L] float32
    rows: Tensor  # [M]
    targets: Tensor  # [M]
    weights: Tensor  # [M] float32, 1 / (p_mask B L)

    def to(self, device: torch.device) -> "NoisedBatch":
        """The same batch on `device`."""
        return NoisedBatch(**{name: value.to(device) for name, value in vars(self).items()})


def noise(x_0: Tensor, mask_id: int, mask_ratio: float, random: np.random.Generator) -> NoisedBatch:
    """A batch with `mask_ratio` of the tokens x_0 [B, L] masked, at times spread evenly around it.

    How many are masked does not depend on the draw, so neither does a step's work.
    """
    num_sequences, length = x_0.shape
    p_mask, is_masked = torch.empty(x_0.shape), torch.zeros(x_0.shape, dtype=torch.bool)
    for b in range(num_sequences):
        t = mask_ratio + min(mask_ratio, 1 - mask_ratio) * ((2 * b + 1) / num_sequences - 1)
        p_mask[b] = max(t, EPS)
        masked = exact_mask(np.ones(length, dtype=bool), max(1, round(t * length)), random)
        is_masked[b] = torch.from_numpy(masked)
    return NoisedBatch(
        x_0=x_0,
        x_t=torch.where(is_masked, mask_id, x_0),
        is_masked=is_masked,
        p_mask=p_mask,
        rows=is_masked.flatten().nonzero()[:, 0],
        targets=x_0[is_masked],
        weights=1 / (p_mask[is_masked] * x_0.numel()),
    )


Loss = Callable[[torch.nn.Module, NoisedBatch], Tensor]


def published_loss(model: torch.nn.Module, batch: NoisedBatch) -> Tensor:
    """Source: LLaDA GUIDELINES.md, Pre-training; written anew."""
    logits = model(input_ids=batch.x_t).logits
    nll = F.cross_entropy(logits[batch.is_masked], batch.x_0[batch.is_masked], reduction="none")
    return (nll / batch.p_mask[batch.is_masked]).sum() / batch.x_0.numel()


def dllm_loss(model: torch.nn.Module, batch: NoisedBatch) -> Tensor:
    """Every position is scored, and the unmasked ones weigh 0.

    The check of inputs against labels (two waits for a GPU) belongs to that step, as does the float32 copy of
    the logits that transformers' Trainer makes under mixed precision.

    Source: dllm, core/trainers/mdlm.py, MDLMTrainer.compute_loss; written anew.
    """
    is_maskable = torch.ones_like(batch.is_masked)
    logits = model(input_ids=batch.x_t).logits.float()
    assert (batch.x_0[is_maskable] == batch.x_0[is_maskable]).all()
    nll = F.cross_entropy(logits.transpose(1, 2), batch.x_0, reduction="none")
    nll = nll * (1 / batch.p_mask) * batch.is_masked.to(nll.dtype)
    return (nll / is_maskable.sum().clamp_min(1)).sum()


def our_loss(model: torch.nn.Module, batch: NoisedBatch) -> Tensor:
    """As in llada.diffusion.losses: the model forms the loss and its gradients at the masked rows."""
    return model(input_ids=batch.x_t, rows=batch.rows, targets=batch.targets, weights=batch.weights).loss


def all_rows_loss(model: torch.nn.Module, batch: NoisedBatch) -> Tensor:
    """Ours with the head at every position."""
    rows = torch.arange(batch.x_0.numel(), device=batch.x_0.device)
    weights = torch.zeros(rows.shape, device=rows.device).index_copy_(0, batch.rows, batch.weights)
    return model(input_ids=batch.x_t, rows=rows, targets=batch.x_0.flatten(), weights=weights).loss


def unchunked_loss(model: torch.nn.Module, batch: NoisedBatch) -> Tensor:
    """Ours with the logits of all masked rows at once, and autograd's gradients."""
    logits = model(input_ids=batch.x_t, rows=batch.rows).logits.float()
    return (F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()


def peer_loss(peer_path: str, mask_id: int) -> Loss:
    """dllm's own compute_loss over our model, made to draw the noise of our batch.

    Raises:
        ValueError: no checkout there, or one that cannot be imported in this environment.
    """
    if not Path(peer_path, "dllm/core/trainers/mdlm.py").is_file():
        raise ValueError(
            f"--peer_path {peer_path}: no dllm/core/trainers/mdlm.py there; give a checkout of dllm"
        )
    # Packages without their __init__, which would import every pipeline and with them transformers 4.
    for name in ("dllm", "dllm.core", "dllm.core.trainers", "dllm.utils"):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(Path(peer_path, *name.split(".")))]
    try:
        module = importlib.import_module("dllm.core.trainers.mdlm")
    except ImportError as error:
        raise ValueError(f"--peer_path {peer_path}: dllm's trainer cannot be imported: {error}") from error
    trainer = object.__new__(module.MDLMTrainer)  # its constructor wants data, folders and callbacks
    vars(trainer).update(
        processing_class=SimpleNamespace(padding_side="right", mask_token_id=mask_id), meter=mock.Mock(),
        scheduler=module.LinearAlphaScheduler(), time_epsilon=EPS, loss_weight_type="scheduler",
        loss_norm_type="token", right_shift_logits=False,
    )  # fmt: skip

    def loss(model: torch.nn.Module, batch: NoisedBatch) -> Tensor:
        uniform = [(batch.p_mask[:, 0] - EPS) / (1 - EPS), 1 - batch.is_masked.float()]
        with mock.patch("torch.rand", side_effect=uniform):
            return trainer.compute_loss(model, {"input_ids": batch.x_0, "labels": batch.x_0.clone()})

    return loss
