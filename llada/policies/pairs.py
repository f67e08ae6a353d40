"""What the stages that learn from pairs of answers share: everything but the formula of the loss.

A stage is three things, and a file of some 60 lines (docs/preference_optimization.md has one in full):

    its flags     a dataclass on top of `PairConfig` (and of `ReferenceFlags` if its loss has a reference)
    its formula   a `PairLoss`: both bounds of each pair in, each pair's loss and both rewards out
    a call        train_on_pairs(config, loss)

Both answers of a pair have masks of their own, new ones in every epoch; policy and reference share them.

Shapes: P pairs of this rank's share of a batch, K draws; column 0 is the chosen answer, 1 the rejected one.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llada.data.answers import Encoding, Tokens, load_pairs
from llada.data.reading import BAD, describe_losses
from llada.diffusion.bound_gradient import differentiate, draw_values, gradient_parts, plan_draws
from llada.diffusion.likelihood import Request
from llada.diffusion.losses import LossParts
from llada.diffusion.settings import MaskSettings
from llada.policies.answer_stream import AnswerBatch, AnswerStream, RecordAnswers, sums_of
from llada.policies.config import PairConfig
from llada.policies.reference_model import Reference, make_reference, precompute_reference
from llada.policies.stage import PolicyStage
from llada.run import Sums, autocast, sum_over_ranks
from llada.training.dry_run import DataSize

Pairs = list[tuple[Tokens, Tokens]]


class PairBounds(NamedTuple):
    """What a loss is computed from."""

    policy: Tensor  # [P, 2] float64, B of both answers in nats; the loss is differentiated with respect to it
    reference: Tensor  # [P, 2] of the reference, without a gradient; nan where the stage has none
    lengths: Tensor  # [P, 2] tokens of the answers


PairLoss = Callable[[PairBounds], tuple[Tensor, Tensor]]
"""-> ([P] losses, [P, 2] rewards, only logged: what the loss wants higher for the chosen answer)."""


@dataclass(frozen=True)
class PairStage:
    """A pair-wise loss and where its reference is found: nowhere, in `reference`, or in the batches."""

    config: PairConfig
    loss: PairLoss
    reference: Reference | None = None

    def evaluate(self, model: torch.nn.Module, batch: AnswerBatch) -> tuple[Tensor, Tensor, Sums]:
        """([P] losses, the leaf [P, 2] that they were computed from, sums to log)."""
        drawn = draw_values(model, batch.chunks)
        policy = drawn.sum(0).view(-1, 2).requires_grad_()  # a leaf: the model's own graph is walked later
        reference = batch.numbers.get("b_ref", torch.full(drawn.shape[1:], torch.nan)).view(-1, 2)
        if self.reference is not None:
            with self.reference(model) as frozen:
                reference = draw_values(frozen, batch.chunks).sum(0).view(-1, 2)
        losses, rewards = self.loss(PairBounds(policy, reference, batch.lengths.view(-1, 2)))
        rewards = rewards.detach()
        # the standard error of a sum of K draws; one draw says nothing of it
        spread = drawn.std(0) * len(drawn) ** 0.5 if len(drawn) > 1 else torch.zeros(drawn.shape[1])
        per_pair = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).double(),
            "rewards/margins": rewards[:, 0] - rewards[:, 1],
            "logps/chosen": policy[:, 0].detach(),
            "logps/rejected": policy[:, 1].detach(),
            "elbo/std": spread.view(-1, 2).mean(1),
        }
        return losses, policy, sums_of(per_pair)

    def step_loss(self, model: torch.nn.Module, batch: AnswerBatch, total_units: float) -> LossParts:
        """The loss of a step, in as many parts as it has forwards."""
        losses, policy, sums = self.evaluate(model, batch)
        # the mean over masks is inside the loss: a mean of losses of single masks is another objective
        value = losses.sum() / total_units
        coefficients = differentiate(value, policy).flatten()
        return LossParts(value.detach(), gradient_parts(model, batch.chunks, coefficients), sums)

    @torch.no_grad()
    def validate(self, stream: AnswerStream, model: torch.nn.Module) -> dict[str, float]:
        """Loss, accuracy and margins over the held-out pairs, under masks that never change."""
        sums: Counter = Counter()
        for batch, ids in stream.all_records(self.config.eval_limit):
            with autocast(stream.run.device, self.config.dtype):
                losses, _, found = self.evaluate(model, batch.to(stream.run.device))
            if ids:  # else a rank without records of its own, which only forwards in step with the others
                sums.update({name: total for name, (total, _) in found.items()})
                sums.update({"loss": float(losses.sum()), "pairs": len(ids)})
        names = ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"]
        count, *totals = sum_over_ranks([sums["pairs"], *(sums[name] for name in names)])
        return {f"eval_{name}": total / count for name, total in zip(names, totals, strict=True)}


def answers_of(
    config: PairConfig,
    purpose: str,
    pairs: Pairs,
    b_ref: np.ndarray | None,
    record_id: int,
    epoch: int,
    _: int,
) -> RecordAnswers:
    """Both answers of a pair with their masks. Where B_ref is known it is that of epoch 0's masks."""
    requests = [
        Request(tokens.context, tokens.answer, f"{record_id} {side}")
        for tokens, side in zip(pairs[record_id], ("chosen", "rejected"), strict=True)
    ]
    # keyed by side: masks that both answers share did not lower the noise of their difference
    masks = MaskSettings(config.num_masks, config.mask_plan, config.size_law)
    key = (purpose, epoch if b_ref is None else 0)
    plans = plan_draws(requests, masks, config.seed, *key, block_size=config.block_size)
    return RecordAnswers(requests, plans, {} if b_ref is None else {"b_ref": b_ref[record_id].tolist()})


def read_pairs(
    config: PairConfig, tokenizer: PreTrainedTokenizerBase, paths: list[str], limit: int | None = None
) -> tuple[Pairs, Counter]:
    """The pairs of some files as tokens, and counts."""
    encoding = Encoding(
        tokenizer, config.eos, config.apply_chat_template, config.max_length, config.long,
        config.parse_special_tokens, drops_bad=config.bad_records == "drop",
    )  # fmt: skip
    return load_pairs(paths, encoding, config.reader(), max_samples=limit)


def pair_rows(config: PairConfig, path: str, tokenizer: PreTrainedTokenizerBase) -> DataSize:
    """What a dry run needs to know of a file; a row is a pair."""
    pairs, _ = read_pairs(config, tokenizer, [path])
    answers = sum(len(tokens.answer) for pair in pairs for tokens in pair)
    return DataSize(len(pairs), sum(len(tokens) for pair in pairs for tokens in pair), answers, is_exact=True)


def train_on_pairs(config: PairConfig, loss: PairLoss, *, reference: str = "none") -> None:
    """Reads the pairs, trains the policy with the loss, validates, saves, and resumes an earlier run.

    `reference`: `none`; `live`: it answers beside the policy in every step; `stored`: it scores the data
    once, under masks that all epochs share, and is dropped.
    """
    stage = PolicyStage.start(
        config, partial(pair_rows, config), train=config.train_data_path, held_out=config.eval_data_path
    )
    if stage is None:
        return
    pairs, counts = read_pairs(config, stage.tokenizer, config.train_data_path, config.max_samples)
    if stage.run.is_main:
        known = {name: counts.pop(name) for name in ("kept", "truncated", "dropped", "equal")}
        total = sum(known.values()) + counts[BAD]
        losses = describe_losses(counts, total, lost=known["dropped"] + known["equal"])
        print(f"training pairs: {known}{losses}", flush=True)
    data = {"preference": pairs}
    if config.eval_data_path is not None:
        data["validation"], _ = read_pairs(config, stage.tokenizer, config.eval_data_path)
    stage.load(len(pairs))  # after the data: a bad record is told before a large checkpoint is read

    streams = {}
    for purpose, records in data.items():
        make = partial(answers_of, config, purpose, records)
        streams[purpose] = stage.answers(partial(make, None), [max(map(len, pair)) for pair in records])
        if reference == "stored":
            folder = Path(config.output_dir, f"reference_{purpose}")
            b_ref = precompute_reference(streams[purpose], config, stage.run, stage.model, folder)
            streams[purpose].answers_of = partial(make, b_ref)
    of_step = PairStage(config, loss, make_reference(config, stage.run) if reference == "live" else None)
    stage.train(
        streams["preference"],
        of_step.step_loss,
        validate=partial(of_step.validate, streams["validation"]) if "validation" in streams else None,
        data=f"{len(pairs)} pairs, {sum(len(tokens) for pair in pairs for tokens in pair)} tokens",
    )
