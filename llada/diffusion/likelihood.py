"""Log-likelihoods of answers under a masked diffusion model, each with its standard error.

Three quantities, all in nats and all sums over the tokens of the answer:

    elbo    the any-order bound of bound_estimator.py; exact for short answers, else an estimate with an
            error. By blocks, if the model attends so: the sum of the blocks' bounds, each given those before
    l2r     sum_i log p(y_i | x, y_<i, the rest masked): the exact likelihood of left-to-right sampling
    policy  sum_t log p(y_pi(t) | x, y_pi(<t)): revealed in the order of the model's own confidence (DUEL),
            the exact likelihood of sampling with --remasking max_probability, one token a step, in one block

Evaluation, DPO, KTO and GRPO draw their masks from masking.generator: the same key, the same masks.

Shapes: T answer tokens, N masks, B sequences, L positions, M masked rows of a batch, E logit columns.

Source: LLaDA (arXiv 2502.09992) appendix B; DUEL (arXiv 2603.01367) for `policy`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llada.diffusion.bound_estimator import block_lengths, estimate, plan_masks
from llada.diffusion.masking import generator
from llada.diffusion.settings import LikelihoodSettings
from modelling_final import LLaDAModelLM

MAX_BATCH = 32
CPU_TOKENS = 768  # of a forward: more leave the cores' caches (1.3x slower at 32 x 84), fewer waste calls
MAX_LOGITS = 2**28  # 1 GiB of float32 logits at once, where logits have to exist at all


class Request(NamedTuple):
    """An answer to score: token ids of the context and of the answer, and the key of its random draws."""

    context: tuple[int, ...]
    answer: tuple[int, ...]
    key: str


class AnswerScore(NamedTuple):
    """log_likelihood and standard_error in nats; num_forwards counts sequences through the model."""

    log_likelihood: float
    standard_error: float
    num_forwards: int


class _Input(NamedTuple):
    """One partly masked sequence and the tokens asked of it."""

    token_ids: np.ndarray  # [L] int64
    positions: np.ndarray  # [R] where a probability is wanted
    targets: np.ndarray  # [R] the tokens whose probability is wanted
    context_length: int  # what classifier-free guidance masks in its second branch


def score_answers(
    model: LLaDAModelLM, requests: Sequence[Request], settings: LikelihoodSettings
) -> list[AnswerScore]:
    """The scores of `requests`, in their order."""
    scores = dict(iter_scores(model, requests, settings))
    return [scores[index] for index in range(len(requests))]


def iter_scores(
    model: LLaDAModelLM, requests: Sequence[Request], settings: LikelihoodSettings
) -> Iterator[tuple[int, AnswerScore]]:
    """(index of the request, its score) as scores get ready, longest sequences first.

    Masked sequences of many requests share a batch, and equal ones go through the model once. ValueError: an
    empty answer, or masks that cannot be drawn as the settings say.
    """
    for request in requests:
        if not request.answer:
            raise ValueError(f"request {request.key!r}: the answer has no token to score")
    if settings.kind == "policy":
        for index, (log_likelihood, _, num_forwards) in _reveal(model, requests, settings, stop=False):
            yield index, AnswerScore(log_likelihood, 0.0, num_forwards)
        return
    work_of = _masked_work if settings.kind == "elbo" else _left_to_right_work
    if settings.kind == "elbo" and model.config.attention_pattern == "block_causal":
        work_of = _blockwise_work
    for window in _windows(requests, 8 * (settings.batch_size or MAX_BATCH), settings.masks.num_masks):
        work = [work_of(model, requests[index], settings) for index in window]
        found = iter(_log_probs(model, [item for inputs, _ in work for item in inputs], settings))
        for index, (inputs, finish) in zip(window, work, strict=True):
            yield index, finish(list(islice(found, len(inputs))))


def iter_greedy(
    model: LLaDAModelLM, requests: Sequence[Request], settings: LikelihoodSettings
) -> Iterator[tuple[int, bool]]:
    """(index, whether greedy low-confidence decoding, one token a step in one block, gives that answer).

    A request leaves at its first token that differs, so most cost one or two forwards instead of T.
    """
    for index, (_, is_argmax, _) in _reveal(model, requests, settings, stop=True):
        yield index, is_argmax


_Work = tuple[list[_Input], Callable[[list[np.ndarray]], AnswerScore]]
"""Sequences to run, and what makes a score of the log-probabilities asked of each."""


def _masked_work(model: LLaDAModelLM, request: Request, settings: LikelihoodSettings) -> _Work:
    random = generator(settings.seed, "likelihood", request.key)
    plan = plan_masks(len(request.answer), random, settings.masks)

    def finish(found: list[np.ndarray]) -> AnswerScore:
        values = np.zeros(plan.masks.shape)
        values[plan.masks] = np.concatenate(found)  # both go row by row
        return AnswerScore(*estimate(plan, values), len(plan.masks))

    return [_masked_input(model, request, mask, mask) for mask in plan.masks], finish


def _blockwise_work(model: LLaDAModelLM, request: Request, settings: LikelihoodSettings) -> _Work:
    context, answer, key = request
    lengths = block_lengths(len(context), len(answer), model.config.attention_block_size)
    ends = np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    parts = [
        Request(context + answer[:i], answer[i:j], f"{key}/{i}") for i, j in zip(starts, ends, strict=True)
    ]
    works = [_masked_work(model, part, settings) for part in parts]

    def finish(found: list[np.ndarray]) -> AnswerScore:
        values = iter(found)
        scores = [score_of(list(islice(values, len(inputs)))) for inputs, score_of in works]
        means, errors, forwards = zip(*scores, strict=True)
        return AnswerScore(sum(means), math.hypot(*errors), sum(forwards))  # blocks' draws are independent

    # guidance masks the context alone, and no block of the answer
    return [item._replace(context_length=len(context)) for inputs, _ in works for item in inputs], finish


def _left_to_right_work(model: LLaDAModelLM, request: Request, settings: LikelihoodSettings) -> _Work:
    steps = np.arange(len(request.answer))
    inputs = [_masked_input(model, request, steps >= step, steps == step) for step in steps]
    return inputs, lambda found: AnswerScore(sum(float(part[0]) for part in found), 0.0, len(found))


def _longest_first(requests: Sequence[Request]) -> list[int]:
    """Indices sorted by length, requests with the same context beside each other."""
    return sorted(
        range(len(requests)),
        key=lambda i: (-len(requests[i].context) - len(requests[i].answer), requests[i].context, i),
    )


def _windows(requests: Sequence[Request], min_inputs: int, num_masks: int) -> Iterator[list[int]]:
    """Groups of requests scored together, longest first; equal contexts stay in one group."""
    window: list[int] = []
    num_inputs = 0
    for index in _longest_first(requests):
        if num_inputs >= min_inputs and requests[index].context != requests[window[-1]].context:
            yield window
            window, num_inputs = [], 0
        window.append(index)
        num_inputs += min(num_masks, 2 ** min(len(requests[index].answer), 30) - 1)
    if window:
        yield window


def _masked_input(model: LLaDAModelLM, request: Request, is_masked: np.ndarray, asked: np.ndarray) -> _Input:
    answer = np.asarray(request.answer, dtype=np.int64)
    token_ids = np.concatenate(
        [np.asarray(request.context, np.int64), np.where(is_masked, model.config.mask_token_id, answer)]
    )
    positions = np.flatnonzero(asked)
    return _Input(token_ids, positions + len(request.context), answer[positions], len(request.context))


class _Batch(NamedTuple):
    input_ids: Tensor  # [B, L]
    attention_mask: Tensor | None  # [B, L]; None without padding
    rows: Tensor  # [M] flat b * L + i
    targets: Tensor  # [M]
    uncond_ids: Tensor | None  # [B, L] with the contexts masked; None without guidance

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "rows": self.rows}


def _collate(model: LLaDAModelLM, inputs: Sequence[_Input], cfg_scale: float) -> _Batch:
    config = model.config
    lengths = [len(item.token_ids) for item in inputs]
    width = max(lengths)
    input_ids = torch.full((len(inputs), width), config.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(inputs), width), dtype=torch.long)
    uncond_ids = input_ids.clone() if cfg_scale else None
    for b, item in enumerate(inputs):
        input_ids[b, : lengths[b]] = torch.from_numpy(item.token_ids)
        attention_mask[b, : lengths[b]] = 1
        if uncond_ids is not None:
            uncond_ids[b, : lengths[b]] = input_ids[b, : lengths[b]]
            uncond_ids[b, : item.context_length] = config.mask_token_id
    rows = np.concatenate([b * width + item.positions for b, item in enumerate(inputs)])
    targets = np.concatenate([item.targets for item in inputs])
    device = model.device
    return _Batch(
        input_ids.to(device),
        attention_mask.to(device) if min(lengths) < width else None,
        torch.from_numpy(rows).to(device),
        torch.from_numpy(targets).to(device),
        None if uncond_ids is None else uncond_ids.to(device),
    )


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.inference_mode()
def _row_logits(model: LLaDAModelLM, batch: _Batch, cfg_scale: float) -> Tensor:
    """[M, E] logits of the asked rows, at least float32, guided when cfg_scale is not 0."""
    logits = _at_least_float32(model(**batch.inputs).logits)
    if batch.uncond_ids is None:
        return logits
    uncond = _at_least_float32(model(**batch.inputs | {"input_ids": batch.uncond_ids}).logits)
    return uncond + (1.0 + cfg_scale) * (logits - uncond)


@torch.inference_mode()
def _row_log_probs(model: LLaDAModelLM, batch: _Batch, cfg_scale: float) -> Tensor:
    """[M] log p of the targets. Without guidance no logits are kept: the model returns the nll."""
    if batch.uncond_ids is None:
        return -model(**batch.inputs, targets=batch.targets).nll
    logits = _row_logits(model, batch, cfg_scale)
    return logits.log_softmax(dim=-1).gather(1, batch.targets[:, None])[:, 0]


def _log_probs(
    model: LLaDAModelLM, inputs: Sequence[_Input], settings: LikelihoodSettings
) -> list[np.ndarray]:
    """log p of every asked token, one float64 array per input; equal sequences are computed once."""
    results: list[np.ndarray] = [np.empty(0)] * len(inputs)
    cfg_scale = settings.cfg_scale
    max_rows = max(1, MAX_LOGITS // model.config.embedding_size) if cfg_scale else None
    limit = partial(_batch_limit, model, settings)
    for batch in _split(_equal_inputs(inputs, cfg_scale), inputs, limit, max_rows):
        merged = [
            inputs[group[0]]._replace(
                positions=np.concatenate([inputs[i].positions for i in group]),
                targets=np.concatenate([inputs[i].targets for i in group]),
            )
            for group in batch
        ]
        values = _row_log_probs(model, _collate(model, merged, cfg_scale), cfg_scale)
        values = values.double().cpu().numpy()
        ends = np.cumsum([len(inputs[i].positions) for group in batch for i in group])
        members = [i for group in batch for i in group]
        for i, part in zip(members, np.split(values, ends[:-1]), strict=True):
            results[i] = part
    return results


def _equal_inputs(inputs: Sequence[_Input], cfg_scale: float) -> list[list[int]]:
    """Indices of the inputs, those with equal sequences together, longest first."""
    groups: dict[tuple[bytes, int], list[int]] = {}
    for index, item in enumerate(inputs):
        # the context's length matters only for what guidance masks
        key = (item.token_ids.tobytes(), item.context_length if cfg_scale else 0)
        groups.setdefault(key, []).append(index)
    return sorted(groups.values(), key=lambda group: -len(inputs[group[0]].token_ids))


def _batch_limit(model: LLaDAModelLM, settings: LikelihoodSettings, length: int) -> int:
    """Sequences of this length in one forward."""
    if settings.batch_size is not None:
        return settings.batch_size
    return max(1, min(MAX_BATCH, CPU_TOKENS // length)) if model.device.type == "cpu" else MAX_BATCH


def _split(
    groups: Sequence[list[int]],
    inputs: Sequence[_Input],
    limit: Callable[[int], int],
    max_rows: int | None,
) -> Iterator[list[list[int]]]:
    """Batches, longest first, of at most limit(longest) sequences and, with logits, `max_rows` rows."""
    batch: list[list[int]] = []
    num_rows = size = 0
    for group in groups:
        rows = sum(len(inputs[i].positions) for i in group)
        if batch and (len(batch) == size or (max_rows is not None and num_rows + rows > max_rows)):
            yield batch
            batch, num_rows = [], 0
        if not batch:
            size = limit(len(inputs[group[0]].token_ids))
        batch.append(group)
        num_rows += rows
    if batch:
        yield batch


def _reveal(
    model: LLaDAModelLM, requests: Sequence[Request], settings: LikelihoodSettings, *, stop: bool
) -> Iterator[tuple[int, tuple[float, bool, int]]]:
    """Reveals each answer in the order of the model's confidence max_v p(v), ties to the left.

    Yields (index, (log-likelihood, whether the last token revealed was the argmax, tokens revealed)). With
    `stop` a request leaves at its first token that is not the argmax: the boolean then speaks for all.
    """
    waiting = iter(_longest_first(requests))
    active: list[int] = []
    masked = [np.ones(len(request.answer), dtype=bool) for request in requests]
    totals = [0.0] * len(requests)
    max_rows = max(1, MAX_LOGITS // model.config.embedding_size)
    limit, cfg_scale = partial(_batch_limit, model, settings), settings.cfg_scale
    while True:
        active += islice(waiting, (settings.batch_size or MAX_BATCH) - len(active))
        if not active:
            return
        inputs = [_masked_input(model, requests[i], masked[i], masked[i]) for i in active]
        still_active = []
        for batch in _split(_equal_inputs(inputs, cfg_scale), inputs, limit, max_rows):
            collated = _collate(model, [inputs[group[0]] for group in batch], cfg_scale)
            log_probs = _row_logits(model, collated, cfg_scale).log_softmax(dim=-1)
            confidence, argmax = (values.cpu().numpy() for values in log_probs.max(dim=-1))
            start = 0
            for group in batch:
                where = inputs[group[0]].positions
                row = start + int(confidence[start : start + len(where)].argmax())
                for n in group:
                    index, target = active[n], int(inputs[n].targets[row - start])
                    totals[index] += float(log_probs[row, target])
                    masked[index][where[row - start] - len(requests[index].context)] = False
                    is_argmax = bool(argmax[row] == target)
                    if masked[index].any() and (is_argmax or not stop):
                        still_active.append(index)
                    else:
                        yield index, (totals[index], is_argmax, int((~masked[index]).sum()))
                start += len(where)
        active = still_active
