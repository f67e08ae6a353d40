"""Streams of noised batches: which records a step sees, and which of their tokens are masked.

Everything is a function of (seed, step): the state of a stream is one integer, a resume needs nothing else,
and the global batch is the same however it is split into ranks and micro-batches.

Shapes: B sequences of a micro-batch, L positions (the longest of them), M masked tokens of the micro-batch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from llada.diffusion.batches import Example, MaskedBatch, Noised, collate, deal, pack
from llada.diffusion.masking import Stratum, draw_block_noise, draw_noise, generator, permutation
from llada.run import Run


@dataclass(frozen=True)
class Curriculum:
    """What a step may see, as a function of the step alone."""

    # longest document of the first steps, in tokens; it doubles until it is full_length
    start_length: int = 0
    full_length: int = 0
    length_steps: int = 0  # steps until documents are whole; 0 = whole from the start
    start_mask_ratio: float = 1.0  # the largest time t of the first step; t is uniform in (0, largest)
    mask_steps: int = 0  # steps in which the largest t rises linearly to 1; 0 = 1 from the start

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
        """Upper end of the times of this step, as a share of the whole range."""
        if step >= self.mask_steps:
            return 1.0
        return self.start_mask_ratio + (1.0 - self.start_mask_ratio) * step / self.mask_steps


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next; of 1e8 records an order takes 0.4 GB
def _order(seed: int, epoch: int, num_records: int) -> np.ndarray:
    return permutation(seed, epoch, num_records).astype(np.min_scalar_type(num_records))


def records_of(step: int, batch_size: int, *, num_records: int, seed: int) -> list[tuple[int, int]]:
    """(record id, epoch) of the global batch of one step, in the order in which they are drawn."""
    places = [divmod(i, num_records) for i in range(step * batch_size, (step + 1) * batch_size)]
    return [(int(_order(seed, epoch, num_records)[place]), epoch) for epoch, place in places]


_RECORDS_A_ROW = 64  # packed together in validation; the more, the fuller the rows

ExampleOf = Callable[[int, int, int], Example]
"""(record id, epoch, length of the longest record of the global batch) -> its Example."""


@dataclass
class MaskedStream:
    """Global batches of noised records, and this rank's share of them."""

    example_of: ExampleOf  # builds one record
    lengths: np.ndarray  # [num_records] tokens of each record
    batch_size: int  # records per step over all ranks
    micro_batch_size: int  # records per forward; rows of packed ones
    seed: int
    run: Run
    mask_id: int
    pad_id: int
    t_sampling: str = "iid"  # or "stratified": one t in each of batch_size equal parts of (0, 1)
    mask_count: str = "bernoulli"  # or "exact", see `draw_noise`
    row_length: int = 0  # 0, or records are packed into rows of so many tokens; their masks stay the same
    fills_rows: bool = False  # `example_of` fills every record up to the longest
    # None, or block diffusion: rows hold each record noised and clean, see `modelling_final.two_streams`
    block_size: int | None = None
    t_range: tuple[float, float] = (0.0, 1.0)  # of training; the bound of validation takes all times
    # cuts the records of early steps, with noise of their own, and bounds t
    curriculum: Curriculum = Curriculum()
    full_length: int = 0  # tokens of a row that, in stages that fill rows up to the longest, is added to
    # this share of the global batches
    full_length_probability: float = 0.0

    purpose: ClassVar[str] = "mask"  # names the draws of a step

    def records_of(self, step: int) -> list[tuple[int, int]]:
        """(record id, epoch) of the global batch of one step, in the order in which they are drawn."""
        return records_of(step, self.batch_size, num_records=len(self.lengths), seed=self.seed)

    def __call__(self, step: int) -> list[MaskedBatch]:
        """This rank's micro-batches of one step."""
        records = self.records_of(step)
        lengths = self.lengths[[record_id for record_id, _ in records]]
        longest = int(lengths.max())
        if generator(self.seed, "full length", step).random() < self.full_length_probability:
            longest = max(longest, self.full_length)
        # packed, or sorted by length and dealt to the ranks in turn: little padding, and equal work
        if self.row_length:
            lengths = np.full(len(records), longest) if self.fills_rows else lengths
            parts = deal(pack(lengths, self.row_length), self.run, self.micro_batch_size)
        else:
            size = self.micro_batch_size
            starts = range(self.run.rank * size, self.batch_size, self.run.world_size * size)
            by_length = [[int(place)] for place in np.argsort(lengths, kind="stable")]
            parts = [by_length[start : start + size] for start in starts]

        def noised(row: list[int]) -> list[Noised]:
            pieces = [self.noise(*records[place], longest=longest, step=step, place=place) for place in row]
            return [item for record in pieces for item in record]

        return [self._collate([noised(row) for row in part]) for part in parts]

    def _collate(self, rows: list[list[Noised]]) -> MaskedBatch:
        return collate(
            rows or [[self._nothing()]],
            mask_id=self.mask_id,
            pad_id=self.pad_id,
            packed=self.row_length > 0 or any(len(row) > 1 for row in rows),
            block_size=self.block_size,
        )

    def noise(self, record_id: int, epoch: int, *, longest: int, step: int, place: int) -> list[Noised]:
        """The noised record, or its pieces where the curriculum cuts it; `place`: in the global batch."""
        example = self.example_of(record_id, epoch, longest)
        length = self.curriculum.length(step) or len(example.input_ids)
        stratum = Stratum()
        if self.t_sampling == "stratified":
            stratum = Stratum(place, self.batch_size, generator(self.seed, "t", step).random())
        noised = []
        for piece, start in enumerate(range(0, len(example.input_ids), length)):
            # a whole record's key has no piece: what the curriculum leaves whole keeps its draws
            random = generator(self.seed, self.purpose, record_id, epoch, *([piece] if piece else []))
            part = example.part(start, start + length)
            low, high = self.t_range
            t_range = low, low + (high - low) * self.curriculum.largest_t(step)
            noised.append(self.hide(part, record_id, random, stratum, t_range))
        return noised

    def hide(
        self,
        example: Example,
        record_id: int,
        random: np.random.Generator,
        stratum: Stratum,
        t_range: tuple[float, float] = (0.0, 1.0),
        mask_count: str | None = None,
    ) -> Noised:
        """One record after noise; streams that mask by another rule override this."""
        law = {"stratum": stratum, "t_range": t_range, "mask_count": mask_count or self.mask_count}
        record = (example.maskable, example.weight, random)
        if self.block_size is None:
            is_masked, weight = draw_noise(*record, **law)
        else:
            is_masked, weight = draw_block_noise(*record, block_size=self.block_size, **law)
        return Noised(example, is_masked, weight, record_id)

    def validation(self, limit: int | None = None) -> Iterator[MaskedBatch]:
        """This rank's share of the data with masks that never change, for a bound that can be compared."""
        num_records = min(limit or len(self.lengths), len(self.lengths))
        # t stratified over the records, and exactly l_i of n_i tokens masked: the bound's low-variance form
        strata = permutation(self.seed, -1, num_records)
        size = self.run.world_size * self.micro_batch_size * (_RECORDS_A_ROW if self.row_length else 1)
        for start in range(0, num_records, size):
            ids = range(start, min(start + size, num_records))
            rows = [[i] for i in range(len(ids))]
            if self.row_length:
                rows = pack(self.lengths[ids], self.row_length)
            for part in deal(rows, self.run, self.micro_batch_size):
                yield self._collate([[self._fixed(ids[i], strata) for i in row] for row in part])

    def _nothing(self) -> Noised:
        """A record that counts for nothing, for a rank that has run out of records."""
        nothing = np.zeros(1, dtype=bool)
        return Noised(Example(np.array([self.pad_id]), nothing, 0.0, 0.0), nothing, 0.0, -1)

    def _fixed(self, record_id: int, strata: np.ndarray) -> Noised:
        example = self.example_of(record_id, 0, int(self.lengths[record_id]))
        random = generator(self.seed, "validation", record_id)
        stratum = Stratum(int(strata[record_id]), len(strata))
        return self.hide(example, record_id, random, stratum, mask_count="exact")
