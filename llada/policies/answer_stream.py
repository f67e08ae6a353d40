"""Streams of answers to score: which records a step sees, under which masks. For DPO and KTO.

A step is one batch, however many forwards it takes: losses here are not linear in the log-likelihoods, and
some need a mean over the whole batch before there is any gradient. So the micro-batches are inside the batch.

Everything is a function of (seed, step), as in llada/diffusion/stream.py.

Shapes: N answers of this rank's share of a batch, K draws.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from llada.diffusion.bound_estimator import MaskPlan
from llada.diffusion.bound_gradient import MaskedCopies, make_draws
from llada.diffusion.likelihood import Request
from llada.diffusion.stream import records_of
from llada.run import Run, Sums


@dataclass
class RecordAnswers:
    """The answers of one record (two of a pair), their masks, and numbers that go with each of them."""

    requests: list[Request]
    plans: list[MaskPlan]
    numbers: dict[str, list[float]] = field(default_factory=dict)
    others: list[tuple[Request, MaskPlan]] = field(default_factory=list)


@dataclass
class AnswerBatch:
    """This rank's share of a step."""

    chunks: list[MaskedCopies]  # the answers, a micro-batch of records at a time
    others: list[MaskedCopies]  # answers that are scored but not learned from (mismatched ones)
    lengths: Tensor  # [N] tokens of each answer
    numbers: dict[str, Tensor]  # name -> [N] float64
    num_units: float  # records
    record_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of all masked copies of the answers and their prompts, read once."""
        return sum(draws.num_tokens for draws in self.chunks)

    def to(self, device: torch.device) -> "AnswerBatch":
        """The same batch with the inputs on `device`; what is one number a record stays on the CPU."""
        return replace(
            self,
            chunks=[draws.to(device) for draws in self.chunks],
            others=[draws.to(device) for draws in self.others],
        )


def sums_of(columns: Mapping[str, Tensor]) -> Sums:
    """Sum and number of the values in each column."""
    return {name: (float(values.sum()), len(values)) for name, values in columns.items()}


AnswersOf = Callable[[int, int, int], RecordAnswers]
"""(record id, epoch, id of the next record of the global batch) -> its RecordAnswers."""


@dataclass
class AnswerStream:
    """Global batches of records, and this rank's share of them."""

    answers_of: AnswersOf  # builds one record
    lengths: np.ndarray  # [num_records] tokens of each record, by which a batch is sorted
    batch_size: int
    micro_batch_size: int
    num_draws: int  # K
    seed: int
    run: Run
    mask_id: int
    pad_id: int
    fill: tuple[int, int] | None = None  # as in `make_draws`
    block_size: int | None = None  # as there

    def __call__(self, step: int) -> list[AnswerBatch]:
        """This rank's share of the global batch, sorted by length and dealt to the ranks in turn."""
        records = records_of(step, self.batch_size, num_records=len(self.lengths), seed=self.seed)
        # sorted first, dealt after: ranks get rows of like length, which pad less and end together
        by_length = np.argsort(self.lengths[[record_id for record_id, _ in records]], kind="stable")
        micro_batches = []
        for start in range(0, self.batch_size, self.run.world_size * self.micro_batch_size):
            start += self.run.rank * self.micro_batch_size
            places = by_length[start : start + self.micro_batch_size]
            # the next record of the whole batch, so that mismatched answers do not depend on ranks
            micro_batches.append(
                [(*records[place], records[(place + 1) % self.batch_size][0]) for place in places]
            )
        return [self._batch(micro_batches)]

    def all_records(self, limit: int | None = None) -> Iterator[tuple[AnswerBatch, list[int]]]:
        """(batch, ids of its records that count) of this rank's share of the data, as in epoch 0."""
        num_records = min(limit or len(self.lengths), len(self.lengths))
        stride = self.run.world_size * self.micro_batch_size
        for start in range(0, num_records, stride):
            first = start + self.run.rank * self.micro_batch_size
            ids = list(range(first, min(first + self.micro_batch_size, num_records)))
            # a rank out of records takes the last one again: sharded models forward in step
            yield self.batch_of(ids or [num_records - 1]), ids

    def batch_of(self, ids: Sequence[int]) -> AnswerBatch:
        """These records in one micro-batch, as in epoch 0."""
        return self._batch([[(i, 0, (i + 1) % len(self.lengths)) for i in ids]])

    def _batch(self, micro_batches: list[list[tuple[int, int, int]]]) -> AnswerBatch:
        built = [[self.answers_of(*record) for record in records] for records in micro_batches]
        flat = [answers for micro in built for answers in micro]
        scored = [[pair for a in micro for pair in zip(a.requests, a.plans, strict=True)] for micro in built]
        others = [[pair for a in micro for pair in a.others] for micro in built]
        numbers = {name: [value for a in flat for value in a.numbers[name]] for name in flat[0].numbers}
        return AnswerBatch(
            chunks=[self._draws(pairs) for pairs in scored],
            others=[self._draws(pairs) for pairs in others if pairs],  # empty but for --z0_mode kl_mismatched
            lengths=torch.tensor([len(request.answer) for a in flat for request in a.requests]),
            numbers={name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()},
            num_units=float(len(flat)),
            record_ids=[record_id for records in micro_batches for record_id, _, _ in records],
        )

    def _draws(self, scored: list[tuple[Request, MaskPlan]]) -> MaskedCopies:
        requests, plans = zip(*scored, strict=True)
        ids = {"mask_id": self.mask_id, "pad_id": self.pad_id}
        return make_draws(requests, plans, self.num_draws, **ids, fill=self.fill, block_size=self.block_size)
