"""The any-order bound of answers with gradients, K masks for the memory of one; for DPO, KTO and GRPO.

    B(y | x) is estimated by  sum_k w_k sum_{i in M_k} log p(y_i | x, y_notM_k),   (M_k, w_k) a plan

A loss that is not linear in B (a sigmoid of it, a ratio) needs B before it has a gradient. So there are two
passes: `draw_values` gives B without gradients, the loss of it is differentiated on its own, c_n = dL / dB_n,
and `gradient_parts` walks the same masks again, one draw at a time, with the gradient of sum_n c_n B_n. That
is the gradient of L exactly (no dropout), for 4/3 of the compute.

By blocks one forward scores all blocks of an answer, each noised and with the clean ones before it in sight:
rows hold the sequence twice, as in training (`two_streams` in modelling_final/attention_llada.py).

Policy and reference are given the same `MaskedCopies`, so what is common to both cancels: with equal weights
their difference is 0.0 to the last bit.

Shapes: N sequences, K draws, M masked rows of one forward, L positions.

Source: VRPO (arXiv 2505.19223) for the shared masks; ELBO-KTO (arXiv 2510.23658) for the l-form.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from llada.diffusion.batches import Example, MaskedBatch, Noised, collate
from llada.diffusion.bound_estimator import MaskPlan, plan_answer
from llada.diffusion.likelihood import Request
from llada.diffusion.masking import generator
from llada.diffusion.settings import MaskSettings


@dataclass
class MaskedCopies:
    """K masked copies of a few sequences: K forwards."""

    batches: list[MaskedBatch]  # K noised batches of the same N sequences
    weights: Tensor  # [K, N] float64, w_k of each sequence; by blocks ones, and each token's in the batch

    @property
    def num_sequences(self) -> int:
        return self.weights.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens that one pass over all draws reads, padding excluded."""
        return sum(batch.num_tokens for batch in self.batches)

    def to(self, device: torch.device) -> "MaskedCopies":
        """The same draws with the inputs on `device`; the weights stay on the CPU."""
        return MaskedCopies([batch.to(device) for batch in self.batches], self.weights)


def plan_draws(
    requests: Sequence[Request],
    masks: MaskSettings,
    seed: int,
    *key: int | str,
    block_size: int | None = None,
) -> list[MaskPlan]:
    """The masks of each request, a pure function of (seed, key, the request's key).

    `key`: whose draws these are, for example ("preference", epoch); a string names the purpose.
    """
    masks = replace(masks, exact_tokens=0)  # a step has the forwards that it asked for
    plans = []
    for context, answer, name in requests:
        random = generator(seed, *key, name)
        plans.append(plan_answer(len(context), len(answer), random, masks, block_size=block_size))
    return plans


def make_draws(
    requests: Sequence[Request],
    plans: Sequence[MaskPlan],
    num_draws: int,
    *,
    mask_id: int,
    pad_id: int,
    fill: tuple[int, int] | None = None,
    block_size: int | None = None,
) -> MaskedCopies:
    """The masked copies of `requests` that their plans ask for; the masks cover answers only.

    Args:
        plans: of each request, with at most `num_draws` masks (short answers have fewer distinct ones).
        fill: (token id, length): rows are filled up to this length with a token that is attended and never
            masked, as ELBO-KTO does with EOS. By default rows are padded and padding is not attended.
        block_size: of the blocks that the plans were made for.
    """
    # what a plan lacks is filled up with empty masks of weight 0: every rank has as many forwards
    weights = np.zeros((num_draws, len(requests)))
    masks: list[np.ndarray] = []
    token_weights: list[np.ndarray] = []
    examples: list[Example] = []
    for n, (request, plan) in enumerate(zip(requests, plans, strict=True)):
        num_masks, num_tokens = plan.masks.shape
        tokens = np.concatenate([request.context, request.answer]).astype(np.int64)
        if fill is not None:
            tokens = np.pad(tokens, (0, max(0, fill[1] - len(tokens))), constant_values=fill[0])
        answer = slice(len(request.context), len(request.context) + num_tokens)
        is_masked = np.zeros((num_draws, len(tokens)), dtype=bool)
        is_masked[:num_masks, answer] = plan.masks
        by_token = np.ones(is_masked.shape)
        if plan.weights.ndim == 2:
            weights[:, n], by_token[:num_masks, answer] = 1.0, plan.weights
        else:
            weights[:num_masks, n] = plan.weights
        masks.append(is_masked)
        token_weights.append(by_token)
        examples.append(Example(tokens, is_masked.any(axis=0), weight=1.0, num_units=1.0))
    batches = []
    for k in range(num_draws):
        triples = zip(examples, masks, token_weights, strict=True)
        rows = [[Noised(example, mask[k], own[k], n)] for n, (example, mask, own) in enumerate(triples)]
        batches.append(collate(rows, mask_id=mask_id, pad_id=pad_id, block_size=block_size))
    return MaskedCopies(batches, torch.from_numpy(weights))


@torch.no_grad()
def draw_values(model: torch.nn.Module, chunks: Sequence[MaskedCopies]) -> Tensor:
    """[K, N] float64 on the CPU, in nats: what each draw adds to the estimate; the sum over K is B."""
    return torch.cat([_chunk_values(model, draws) for draws in chunks], dim=1)


def _chunk_values(model: torch.nn.Module, draws: MaskedCopies) -> Tensor:
    nll = [model(**batch.inputs).nll for batch in draws.batches]
    # a fixed order of sums: equal inputs give equal bits, and policy = reference a difference of 0.0
    sums = [
        torch.zeros(draws.num_sequences, dtype=torch.float64).index_add_(
            0, _owners(batch).cpu(), values.cpu().double() * batch.weights.cpu()
        )
        for batch, values in zip(draws.batches, nll, strict=True)
    ]
    return -draws.weights * torch.stack(sums)


def _owners(batch: MaskedBatch) -> Tensor:
    """[M] the sequence that each masked row belongs to."""
    return batch.rows // batch.input_ids.shape[1]


def gradient_parts(
    model: torch.nn.Module, chunks: Sequence[MaskedCopies], coefficients: Tensor
) -> list[Callable[[], Tensor]]:
    """Functions that each run one forward; the sum of what they give is sum_n coefficients_n B_n.

    Call each and walk its graph backward before the next one, and the memory is that of one draw.
    `coefficients`: [N] on the CPU, dL / dB_n.
    """
    parts: list[Callable[[], Tensor]] = []
    start = 0
    for draws in chunks:
        factors = -draws.weights * coefficients[start : start + draws.num_sequences]
        parts += [
            partial(_draw_loss, model, batch, row) for batch, row in zip(draws.batches, factors, strict=True)
        ]
        start += draws.num_sequences
    return parts


def _draw_loss(model: torch.nn.Module, batch: MaskedBatch, factors: Tensor) -> Tensor:
    """sum_n factors_n * (weighted sum of the nll of sequence n's masked tokens), with its gradient."""
    factors = factors.to(batch.rows.device)[_owners(batch)]
    return model(**batch.inputs, weights=factors * batch.weights).loss


def differentiate(loss: Tensor, values: Tensor) -> Tensor:
    """dL / d values, for `gradient_parts`: `values` is a leaf that `loss` was computed from."""
    return torch.autograd.grad(loss, values)[0]


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout to 0: the two passes, and policy and reference, must see the same network."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "attention_dropout", 0.0):
        config.attention_dropout = 0.0
