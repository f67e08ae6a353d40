"""Losses of preferences: log-likelihoods of answers in, one number per record out. DPO and ELBO-KTO.

All log-likelihoods are any-order bounds B in nats, averaged over masks before they come here: the average is
inside the sigmoid, where VRPO and ELBO-KTO want it (outside it is another objective, biased by Jensen).

Shapes: P pairs, N records.

Source: DPO (arXiv 2305.18290) eq. 7; IPO (arXiv 2310.12036) eq. 17; VRPO (arXiv 2505.19223) eq. 10;
ELBO-KTO (arXiv 2510.23658); names as in TRL 1.16.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llada.diffusion.settings import DPO_LOSSES, Z0_MODES


def dpo_losses(
    policy: Tensor,
    reference: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    loss_types: Sequence[str] = ("sigmoid",),
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """[P] the loss of each pair; log 2 (sigmoid), 1 (hinge), 1 / (4 beta^2) (ipo) where policy = reference.

        h = (B - B_ref)(chosen) - (B - B_ref)(rejected)
        sigmoid   -(1 - label_smoothing) log sigma(beta h) - label_smoothing log sigma(-beta h)
        hinge     max(0, 1 - beta h)
        ipo       (h' - 1 / (2 beta))^2, h' from log-ratios per token
        sft       -B(chosen) / length: the masked-diffusion SFT loss of the chosen answer, nats per token

    [P, 2] policy and reference: B of chosen and rejected; [P, 2] lengths: their tokens. ValueError: an
    unknown loss, or not one weight for each loss.
    """
    weights = [1.0] * len(loss_types) if loss_weights is None else list(loss_weights)
    if len(weights) != len(loss_types):
        raise ValueError(f"--loss_weights {weights}: give one for each of --loss_type {list(loss_types)}")
    ratios = policy - reference
    h = ratios[:, 0] - ratios[:, 1]
    total = torch.zeros_like(h)
    for name, weight in zip(loss_types, weights, strict=True):
        if name == "sigmoid":
            term = -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)
        elif name == "hinge":
            term = torch.relu(1 - beta * h)
        elif name == "ipo":
            per_token = ratios / lengths
            term = (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)).square()
        elif name == "sft":
            term = -policy[:, 0] / lengths[:, 0]
        else:
            raise ValueError(f"--loss_type {name!r} is not one of {', '.join(DPO_LOSSES)}")
        total = total + weight * term
    return total


def kto_losses(
    ratios: Tensor, is_desirable: Tensor, z0: Tensor, *, beta: float, lambda_d: float, lambda_u: float
) -> Tensor:
    """[N] the loss of each record from r = B - B_ref [N]; lambda / 2 where policy = reference.

    s = beta (r - z0),   lambda_D (1 - sigma(s)) where desirable, else lambda_U (1 - sigma(-s))
    """
    s = beta * (ratios - z0.detach())  # the baseline gets no gradient
    return torch.where(is_desirable, lambda_d * (1 - torch.sigmoid(s)), lambda_u * (1 - torch.sigmoid(-s)))


def kto_baseline(ratios: Tensor, *, mode: str, total: float, count: float, previous: float | None) -> Tensor:
    """z0 of each of this rank's records, without a gradient.

        zero           0
        global_mean    mean of r over the global batch (ELBO-KTO)
        loo_mean       that mean without the record itself, so that no record is its own baseline
        ema            0.9 * previous + 0.1 * mean: of the steps before and this one; the first has its mean
        kl_mismatched  max(0, mean), of the r of mismatched answers (KTO); `total` and `count` are theirs

    `total`, `count`: sum and number of r over the global batch; `previous`: z0 of the step before, or None.
    """
    mean = total / max(count, 1.0)
    if mode == "zero":
        return torch.zeros_like(ratios)
    if mode == "loo_mean":
        return (total - ratios.detach()) / (count - 1)
    if mode == "ema":
        mean = mean if previous is None else 0.9 * previous + 0.1 * mean
    elif mode == "kl_mismatched":
        mean = max(0.0, mean)
    elif mode != "global_mean":
        raise ValueError(f"--z0_mode {mode!r} is not one of {', '.join(Z0_MODES)}")
    return torch.full_like(ratios, mean)
