"""Records before and after noise, and micro-batches of them.

Shapes: B sequences of a micro-batch, L positions (the longest of them), M masked tokens of the micro-batch.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llada.run import Run


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of record numbers whose lengths add up to at most `row_length`, the fullest rows first.

    Best fit, longest record first: within 22 % of the fewest rows possible, in practice within one row.
    ValueError: a record is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), in order
    for record in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = int(lengths[record])
        if length > row_length:
            raise ValueError(f"a record of {length} tokens does not fit into rows of {row_length}")
        place = bisect_left(free, (length, -1))
        left, row = free.pop(place) if place < len(free) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(record)
        insort(free, (left - length, row))
    left_of = {row: left for left, row in free}
    return [rows[row] for row in sorted(range(len(rows)), key=lambda row: (left_of[row], row))]


def deal(rows: list[list[int]], run: Run, micro_batch_size: int) -> list[list[list[int]]]:
    """This rank's micro-batches of at most `micro_batch_size` rows, as many on every rank, of even size."""
    # one may be empty: ranks of a sharded model go through their micro-batches in step
    num_micro_batches = max(1, -(-len(rows) // (run.world_size * micro_batch_size)))
    num_slots = num_micro_batches * run.world_size
    return [rows[i * run.world_size + run.rank :: num_slots] for i in range(num_micro_batches)]


@dataclass
class Example:
    """One record before noise."""

    input_ids: np.ndarray  # [L] the clean tokens x_0
    maskable: np.ndarray  # [L] bool, the tokens that may be masked and are scored
    weight: float  # factor on every token's loss: 1 for pretraining, 1 / answer length for SFT
    num_units: float  # of what the loss is a mean over: its tokens in pretraining, 1 (the record) in SFT

    def part(self, start: int, end: int) -> "Example":
        """Some of its tokens, with their share of the units."""
        input_ids = self.input_ids[start:end]
        if len(input_ids) == len(self.input_ids):
            return self
        num_units = self.num_units * len(input_ids) / len(self.input_ids)
        return Example(input_ids, self.maskable[start:end], self.weight, num_units)


@dataclass
class MaskedBatch:
    """A micro-batch after noise, ready for `LLaDAModelLM.forward`."""

    input_ids: torch.Tensor  # [B, L] noised tokens x_t, padded on the right
    attention_mask: torch.Tensor | None  # [B, L] 1 = token, 0 = padding; None when all rows are full
    rows: torch.Tensor  # [M] flat positions b * L + i of the masked tokens
    targets: torch.Tensor  # [M] their clean tokens
    weights: torch.Tensor  # [M] float32, before the division by the global number of units
    num_units: float  # of its records
    record_ids: list[int]  # for messages
    num_tokens: int  # that the model reads, padding excluded
    num_pairs: int  # (query, key) pairs of its attention: the squared lengths of its records, added up
    # [D + 1] where rows hold several records: the flat positions where each begins, and B * L
    document_borders: torch.Tensor | None = None
    # [B, L] of two streams: see `modelling_final.attention_llada.two_streams`
    position_ids: torch.Tensor | None = None
    clean_columns: torch.Tensor | None = None

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model's forward takes: its nll comes out at `rows`, for `targets`."""
        inputs = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "rows", "targets")}
        layout = {name: getattr(self, name) for name in ("document_borders", "position_ids", "clean_columns")}
        return inputs | {name: value for name, value in layout.items() if value is not None}

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
    """One record after noise."""

    example: Example
    is_masked: np.ndarray
    weight: float | np.ndarray  # holds the 1 / p_mask (or n / l) of this draw; [L] where tokens differ
    record_id: int


def collate(
    rows: list[list[Noised]],
    *,
    mask_id: int,
    pad_id: int,
    packed: bool = False,
    block_size: int | None = None,
) -> MaskedBatch:
    """Stacks rows of noised records, padded on the right to the longest row.

    Args:
        packed: rows may hold several records, which do not see one another.
        block_size: None, or each record stands there twice, noised and then clean: two streams.
    """
    items = [item for row in rows for item in row]
    num_copies = 1 if block_size is None else 2
    lengths = [[num_copies * len(item.example.input_ids) for item in row] for row in rows]
    longest = max(map(sum, lengths))
    # rows, and borders below, in multiples of 64: kernels meet few different shapes
    length = -(-longest // 64) * 64 if packed else longest
    x_0 = np.full((len(rows), length), pad_id, dtype=np.int64)
    is_masked = np.zeros((len(rows), length), dtype=bool)
    attended = np.zeros((len(rows), length), dtype=np.int64)
    weights = np.zeros((len(rows), length), dtype=np.float32)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    clean_columns = np.tile(np.arange(length), (len(rows), 1))
    borders = []
    for b, row in enumerate(rows):
        start = 0
        for item, size in zip(row, lengths[b], strict=True):
            whole, num = (b, slice(start, start + size)), size // num_copies
            x_0[whole], attended[whole] = np.tile(item.example.input_ids, num_copies), 1
            positions[whole] = np.tile(np.arange(num), num_copies)
            place = (b, slice(start, start + num))
            is_masked[place], weights[place] = item.is_masked, item.weight
            clean_columns[place] += size - num
            borders.append(b * length + start)
            start += size
        if start < length:
            borders.append(b * length + start)  # padding sees itself only
    sizes = [len(item.example.input_ids) for item in items if item.record_id >= 0]
    if packed:
        borders += [len(rows) * length] * (64 - len(borders) % 64)
    return MaskedBatch(
        input_ids=torch.from_numpy(np.where(is_masked, mask_id, x_0)),
        attention_mask=None if packed or attended.all() else torch.from_numpy(attended),
        rows=torch.from_numpy(np.flatnonzero(is_masked)),
        targets=torch.from_numpy(x_0[is_masked]),
        weights=torch.from_numpy(weights[is_masked]),
        num_units=float(sum(item.example.num_units for item in items)),
        record_ids=[item.record_id for item in items if item.record_id >= 0],
        num_tokens=num_copies * sum(sizes),
        # two streams: half of the pairs of clean blocks, half of noised with clean ones, and noised blocks
        num_pairs=sum(size**2 if block_size is None else size * (size + block_size) for size in sizes),
        document_borders=torch.tensor(borders, dtype=torch.int32) if packed else None,
        position_ids=None if block_size is None else torch.from_numpy(positions),
        clean_columns=None if block_size is None else torch.from_numpy(clean_columns),
    )
