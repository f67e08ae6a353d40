"""Several records in one row: which go together, and which rows each rank gets."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from llada.run import Run


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of record numbers whose lengths add up to at most `row_length`, the fullest rows first.

    Best fit, longest record first: within 22 % of the fewest rows possible, in practice within one row.

    Raises:
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
    """This rank's micro-batches of at most `micro_batch_size` rows.

    All ranks get the same number of micro-batches, of as equal a number of rows as possible; one may be
    empty, since ranks of a sharded model go through it in step.
    """
    num_micro_batches = max(1, -(-len(rows) // (run.world_size * micro_batch_size)))
    num_slots = num_micro_batches * run.world_size
    return [rows[i * run.world_size + run.rank :: num_slots] for i in range(num_micro_batches)]
