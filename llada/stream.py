"""Streams of noised batches: which records a step sees, and which of their tokens are masked.

Everything is a function of (seed, step): the state of a stream is one integer, a resume needs nothing else,
and the global batch is the same however it is split into ranks and micro-batches.

Shapes: B sequences of a micro-batch, L positions (the longest of them), M masked tokens of the micro-batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset

from llada.masking import bernoulli_mask, exact_mask, generator, mask_probability, permutation
from llada.model import SpecialIds
from llada.runtime import Run
from llada.train_config import TrainConfig


@dataclass
class Example:
    """One record before noise.

    Attributes:
        input_ids: [L] the clean tokens x_0.
        maskable: [L] bool, the tokens that may be masked and are scored.
        weight: factor on every token's loss: 1 for pretraining, 1 / answer length for SFT.
        count: what the record adds to the global normaliser: its tokens in pretraining, 1 in SFT.
    """

    input_ids: np.ndarray
    maskable: np.ndarray
    weight: float
    count: float


@dataclass
class MaskedBatch:
    """A micro-batch after noise, ready for `LLaDAModelLM.forward`.

    Attributes:
        input_ids: [B, L] noised tokens x_t, padded on the right.
        attention_mask: [B, L] 1 = token, 0 = padding; None when all rows are full.
        rows: [M] flat positions b * L + i of the masked tokens.
        targets: [M] their clean tokens.
        weights: [M] float32 loss weights before the division by the global count.
        count: what this micro-batch adds to the global normaliser.
        record_ids: the records, for messages.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    rows: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    count: float
    record_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens the model reads, padding excluded."""
        return int(self.attention_mask.sum()) if self.attention_mask is not None else self.input_ids.numel()

    def to(self, device: torch.device) -> "MaskedBatch":
        """The same batch with its tensors on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return MaskedBatch(**{**vars(self), **moved})


@dataclass
class Noised:
    """One record after noise: `weight` already holds the 1 / p_mask (or L / l) of this draw."""

    example: Example
    is_masked: np.ndarray
    weight: float
    record_id: int


def collate(noised: list[Noised], *, mask_id: int, pad_id: int) -> MaskedBatch:
    """Stacks noised records, padded on the right to the longest."""
    length = max(len(item.example.input_ids) for item in noised)
    x_0 = np.full((len(noised), length), pad_id, dtype=np.int64)
    is_masked = np.zeros((len(noised), length), dtype=bool)
    attended = np.zeros((len(noised), length), dtype=np.int64)
    weights = np.zeros((len(noised), length), dtype=np.float32)
    for b, item in enumerate(noised):
        n = len(item.example.input_ids)
        x_0[b, :n], is_masked[b, :n], attended[b, :n] = item.example.input_ids, item.is_masked, 1
        weights[b, :n] = item.weight
    return MaskedBatch(
        input_ids=torch.from_numpy(np.where(is_masked, mask_id, x_0)),
        attention_mask=None if attended.all() else torch.from_numpy(attended),
        rows=torch.from_numpy(np.flatnonzero(is_masked)),
        targets=torch.from_numpy(x_0[is_masked]),
        weights=torch.from_numpy(weights[is_masked]),
        count=float(sum(item.example.count for item in noised)),
        record_ids=[item.record_id for item in noised],
    )


_order = lru_cache(maxsize=4)(permutation)


def records_of(step: int, batch_size: int, *, num_records: int, seed: int) -> list[tuple[int, int]]:
    """(record id, epoch) of the global batch of one step, in the order in which they are drawn."""
    places = [divmod(i, num_records) for i in range(step * batch_size, (step + 1) * batch_size)]
    return [(int(_order(seed, epoch, num_records)[place]), epoch) for epoch, place in places]


def row_lengths(rows: Dataset) -> np.ndarray:
    """[num_records] tokens of each row, without reading the tokens into Python."""
    tables = rows.with_format("arrow").iter(batch_size=10_000)
    lengths = [pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]
    return np.concatenate(lengths) if lengths else np.empty(0, dtype=np.int64)


ExampleOf = Callable[[int, int, int], Example]
"""(record id, epoch, length of the longest record of the global batch) -> its Example."""


@dataclass
class MaskedStream:
    """Global batches of noised records, and this rank's share of them.

    Attributes:
        example_of: builds one record.
        lengths: [num_records] tokens of each record.
        batch_size: records per step over all ranks; micro_batch_size: records per forward.
        t_sampling: "iid", or "stratified" = one t in each of `batch_size` equal parts of (0, 1).
        mask_count: "bernoulli" = LLaDA's recipe with weight 1 / p_mask; "exact" = l = ceil(t n) of the n
            maskable tokens with weight n / l, the same expectation with less variance.
        full_length, full_length_probability: this share of the global batches counts as having a row of
            `full_length` tokens, for stages that fill rows up to the longest.
    """

    example_of: ExampleOf
    lengths: np.ndarray
    batch_size: int
    micro_batch_size: int
    seed: int
    run: Run
    mask_id: int
    pad_id: int
    t_sampling: str = "iid"
    mask_count: str = "bernoulli"
    full_length: int = 0
    full_length_probability: float = 0.0

    @classmethod
    def over(
        cls, rows: Dataset, example_of: ExampleOf, config: TrainConfig, run: Run, ids: SpecialIds
    ) -> "MaskedStream":
        """The stream over prepared rows that a stage's flags describe."""
        return cls(
            example_of,
            row_lengths(rows),
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            run=run,
            mask_id=ids.mask,
            pad_id=ids.pad,
            t_sampling=config.t_sampling,
            mask_count=config.mask_count,
        )

    def epoch(self, step: int) -> float:
        """How often the data has been seen after `step` steps."""
        return step * self.batch_size / len(self.lengths)

    def records_of(self, step: int) -> list[tuple[int, int]]:
        """(record id, epoch) of the global batch of one step, in the order in which they are drawn."""
        return records_of(step, self.batch_size, num_records=len(self.lengths), seed=self.seed)

    def __call__(self, step: int) -> list[MaskedBatch]:
        """This rank's micro-batches of one step.

        The global batch is sorted by length and cut into micro-batches, dealt to the ranks in turn: little
        padding
        in each, and ranks with equal work.
        """
        records = self.records_of(step)
        lengths = self.lengths[[record_id for record_id, _ in records]]
        by_length = np.argsort(lengths, kind="stable")
        longest = int(lengths.max())
        if generator(self.seed, "full length", step).random() < self.full_length_probability:
            longest = max(longest, self.full_length)
        batches = []
        for start in range(0, self.batch_size, self.run.world_size * self.micro_batch_size):
            start += self.run.rank * self.micro_batch_size
            places = by_length[start : start + self.micro_batch_size]
            noised = [self._noise(*records[place], longest, step, int(place)) for place in places]
            batches.append(collate(noised, mask_id=self.mask_id, pad_id=self.pad_id))
        return batches

    def _noise(self, record_id: int, epoch: int, longest: int, step: int, place: int) -> Noised:
        example = self.example_of(record_id, epoch, longest)
        random = generator(self.seed, "mask", record_id, epoch)
        t = random.random()
        if self.t_sampling == "stratified":
            offset = generator(self.seed, "t", step).random()
            t = (offset + (place + t) / self.batch_size) % 1.0
        if self.mask_count == "exact":
            num_maskable = int(example.maskable.sum())
            num_masked = max(1, int(np.ceil(t * num_maskable)))
            is_masked = exact_mask(example.maskable, num_masked, random)
            return Noised(example, is_masked, example.weight * num_maskable / num_masked, record_id)
        p_mask = mask_probability(t)
        is_masked = bernoulli_mask(example.maskable, p_mask, random)
        return Noised(example, is_masked, example.weight / p_mask, record_id)

    def validation(self, limit: int | None = None) -> Iterator[MaskedBatch]:
        """This rank's share of the data with masks that never change, for a bound that can be compared.

        Record i gets l_i of its n_i maskable tokens masked, l stratified over the records, with weight n_i /
        l_i:
        the low-variance form of the bound (LLaDA, arXiv 2502.09992, eq. 6).
        """
        num_records = min(limit or len(self.lengths), len(self.lengths))
        strata = permutation(self.seed, -1, num_records)
        mine = range(self.run.rank, num_records, self.run.world_size)
        most = -(-num_records // self.run.world_size)  # records of rank 0; sharded models forward in step
        for start in range(0, most, self.micro_batch_size):
            ids = mine[start : start + self.micro_batch_size]
            items = [self._fixed_noise(i, int(strata[i]), num_records) for i in ids]
            yield collate(items or [self._nothing()], mask_id=self.mask_id, pad_id=self.pad_id)

    def _nothing(self) -> Noised:
        """A record that counts for nothing, for a rank that has run out of records."""
        example = self.example_of(0, 0, int(self.lengths[0]))
        example.count = 0.0
        return Noised(example, np.zeros_like(example.maskable), 0.0, 0)

    def _fixed_noise(self, record_id: int, stratum: int, num_records: int) -> Noised:
        example = self.example_of(record_id, 0, int(self.lengths[record_id]))
        random = generator(self.seed, "validation", record_id)
        num_maskable = int(example.maskable.sum())
        num_masked = 1 + int((stratum + random.random()) / num_records * num_maskable)
        is_masked = exact_mask(example.maskable, num_masked, random)
        return Noised(example, is_masked, example.weight * num_maskable / num_masked, record_id)
