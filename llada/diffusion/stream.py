"""Streams of noised batches: which records a step sees, and which of their tokens are masked.

Everything is a function of (seed, step): the state of a stream is one integer, a resume needs nothing else,
and the global batch is the same however it is split into ranks and micro-batches.

Shapes: B sequences of a micro-batch, L positions (the longest of them), M masked tokens of the micro-batch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from llada.diffusion.batches import Example, MaskedBatch, Noised, collate, deal, pack
from llada.diffusion.masking import bernoulli_mask, exact_mask, generator, mask_probability, permutation
from llada.models import SpecialIds
from llada.run import Run
from llada.training.config import TrainConfig


@dataclass(frozen=True)
class Curriculum:
    """What a step may see, as a function of the step alone.

    Attributes:
        start_length: longest document of the first steps, in tokens; it doubles until it is `full_length`.
        length_steps: steps until documents are whole; 0 = whole from the start.
        start_mask_ratio: the largest time t of the first step; t is uniform in (0, largest).
        mask_steps: steps in which the largest t rises linearly to 1; 0 = 1 from the start.
    """

    start_length: int = 0
    full_length: int = 0
    length_steps: int = 0
    start_mask_ratio: float = 1.0
    mask_steps: int = 0

    def __post_init__(self) -> None:
        if self.length_steps and not 0 < self.start_length <= self.full_length:
            raise ValueError(
                f"--start_length {self.start_length} must be between 1 and --max_length {self.full_length}"
            )
        if not 0.0 < self.start_mask_ratio <= 1.0:
            raise ValueError(f"--start_mask_ratio {self.start_mask_ratio} must be in (0, 1]")

    def length(self, step: int) -> int | None:
        """Tokens after which documents are cut in this step; None = not at all."""
        if step >= self.length_steps or self.start_length == self.full_length:
            return None
        doublings = math.ceil(math.log2(self.full_length / self.start_length))
        return self.start_length * 2 ** (step * doublings // self.length_steps)

    def largest_t(self, step: int) -> float:
        """Upper end of the times of this step."""
        if step >= self.mask_steps:
            return 1.0
        return self.start_mask_ratio + (1.0 - self.start_mask_ratio) * step / self.mask_steps


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


_RECORDS_A_ROW = 64  # packed together in validation; the more, the fuller the rows

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
        row_length: 0, or records are packed into rows of at most so many tokens, and `micro_batch_size`
            counts rows; the records of a step and their masks stay the same.
        fills_rows: whether `example_of` fills every record up to the longest.
        curriculum: cuts the records of early steps into documents with noise of their own, and bounds t.
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
    row_length: int = 0
    fills_rows: bool = False
    curriculum: Curriculum = Curriculum()
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
            row_length=config.max_length if config.packing else 0,
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
        padding in each, and ranks with equal work. Or, with `row_length`, it is packed into rows first.
        """
        records = self.records_of(step)
        lengths = self.lengths[[record_id for record_id, _ in records]]
        longest = int(lengths.max())
        if generator(self.seed, "full length", step).random() < self.full_length_probability:
            longest = max(longest, self.full_length)
        if self.row_length:
            lengths = np.full(len(records), longest) if self.fills_rows else lengths
            parts = deal(pack(lengths, self.row_length), self.run, self.micro_batch_size)
        else:
            size = self.micro_batch_size
            starts = range(self.run.rank * size, self.batch_size, self.run.world_size * size)
            by_length = [[int(place)] for place in np.argsort(lengths, kind="stable")]
            parts = [by_length[start : start + size] for start in starts]
        noise = partial(self.noise, longest=longest, step=step)
        return [
            self._collate(
                [[item for place in row for item in noise(*records[place], place=place)] for row in part]
            )
            for part in parts
        ]

    def _collate(self, rows: list[list[Noised]]) -> MaskedBatch:
        return collate(
            rows or [[self._nothing()]],
            mask_id=self.mask_id,
            pad_id=self.pad_id,
            packed=self.row_length > 0 or any(len(row) > 1 for row in rows),
        )

    def noise(self, record_id: int, epoch: int, *, longest: int, step: int, place: int) -> list[Noised]:
        """The noised record, or its pieces where the curriculum cuts it."""
        example = self.example_of(record_id, epoch, longest)
        length = self.curriculum.length(step) or len(example.input_ids)
        noised = []
        for piece, start in enumerate(range(0, len(example.input_ids), length)):
            random = generator(self.seed, "mask", record_id, epoch, *([piece] if piece else []))
            t = random.random()
            if self.t_sampling == "stratified":
                offset = generator(self.seed, "t", step).random()
                t = (offset + (place + t) / self.batch_size) % 1.0
            t *= self.curriculum.largest_t(step)
            noised.append(self._masked(example.part(start, start + length), record_id, t, random))
        return noised

    def _masked(self, example: Example, record_id: int, t: float, random: np.random.Generator) -> Noised:
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
        size = self.run.world_size * self.micro_batch_size * (_RECORDS_A_ROW if self.row_length else 1)
        for start in range(0, num_records, size):
            ids = range(start, min(start + size, num_records))
            rows = [[i] for i in range(len(ids))]
            if self.row_length:
                rows = pack(self.lengths[ids], self.row_length)
            for part in deal(rows, self.run, self.micro_batch_size):
                rows_of_ids = [[ids[i] for i in row] for row in part]
                yield self._collate(
                    [[self._fixed_noise(i, int(strata[i]), num_records) for i in row] for row in rows_of_ids]
                )

    def _nothing(self) -> Noised:
        """A record that counts for nothing, for a rank that has run out of records."""
        nothing = np.zeros(1, dtype=bool)
        return Noised(Example(np.array([self.pad_id]), nothing, 0.0, 0.0), nothing, 0.0, -1)

    def _fixed_noise(self, record_id: int, stratum: int, num_records: int) -> Noised:
        example = self.example_of(record_id, 0, int(self.lengths[record_id]))
        random = generator(self.seed, "validation", record_id)
        num_maskable = int(example.maskable.sum())
        num_masked = 1 + int((stratum + random.random()) / num_records * num_maskable)
        is_masked = exact_mask(example.maskable, num_masked, random)
        return Noised(example, is_masked, example.weight * num_maskable / num_masked, record_id)
