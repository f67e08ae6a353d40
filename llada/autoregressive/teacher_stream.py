"""Streams for alignment: which positions of an answer are asked for, and what the teacher says about each.

Three rules (what is masked, what is scored):
    masked    a random part of the answer, as in SFT; the masked tokens, each weighted with 1 / p
    answer    the same noise; all tokens of the answer, masked or visible, each alike
    windows   [prompt, answer[:s], G masks] for a random s; the G tokens of the window: what a drafter does

Prompts and padding are never masked and never scored, nor is what a window has beyond the answer's end.
Everything is a function of (seed, step), as in llada/diffusion/stream.py.

B sequences, L positions, M scored rows, G masks of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from datasets import Dataset

from llada.autoregressive.teacher_rows import TeacherChunks, TeacherTable
from llada.data.shards import row_lengths
from llada.diffusion.batches import Example, MaskedBatch, Noised
from llada.diffusion.masking import Stratum
from llada.diffusion.stream import MaskedStream
from llada.models.tokens import SpecialIds
from llada.run import Run
from llada.training.config import TrainConfig

RULES = ("masked", "answer", "windows")


@dataclass
class AlignedBatch:
    """A micro-batch with a teacher.

    Attributes:
        input_ids: [B, L] with masks; attention_mask: [B, L] or None.
        rows: [M] flat positions b * L + i that are scored, in order; targets: [M] their tokens.
        weights: [M] float32 of the cross-entropy; teacher_weights: [M] of the distance to the teacher.
        has_teacher: [M] bool; teacher: the distributions of those rows.
        places: [M] place in the window, from 1; always 1 without windows.
        num_units: of its records; see `Example`.
        num_tokens: tokens the model reads, padding excluded.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    rows: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    teacher_weights: torch.Tensor
    has_teacher: torch.Tensor
    places: torch.Tensor
    teacher: TeacherChunks
    num_units: float
    record_ids: list[int]
    num_tokens: int

    def to(self, device: torch.device) -> "AlignedBatch":
        """The same batch with its tensors on `device`; distributions follow chunk by chunk."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()})


_NO_ROWS = {
    "rows": np.empty(0, dtype=np.int64),
    "targets": np.empty(0, dtype=np.int64),
    "weights": np.empty(0, dtype=np.float32),
    "teacher_weights": np.empty(0, dtype=np.float32),
    "has_teacher": np.empty(0, dtype=bool),
    "places": np.empty(0, dtype=np.int64),
}


@dataclass(frozen=True)
class Windows:
    """Draft windows.

    Attributes:
        length: G.
        decay: weight exp(-(k - 1) / decay) of the k-th place; infinite: all alike.
            Source: DFlash, arXiv 2602.06036.
    """

    length: int
    decay: float = float("inf")

    def weights(self) -> np.ndarray:
        """[G] float32, sum 1."""
        weights = np.exp(-np.arange(self.length) / self.decay)
        return (weights / weights.sum()).astype(np.float32)


@dataclass
class _WindowStream(MaskedStream):
    """A masked stream whose noise is a window of masks behind a prefix of the answer."""

    window_length: int = 0
    purpose: ClassVar[str] = "window"

    def hide(
        self, example: Example, record_id: int, random: np.random.Generator, stratum: Stratum, *_: object,
        **__: object,
    ) -> Noised:  # fmt: skip
        """The canvas whose window begins at a random place of the answer."""
        scored = np.flatnonzero(example.maskable)
        first = int(scored[int(stratum.time(random.random()) * len(scored))])
        canvas = np.full(first + self.window_length, self.pad_id, dtype=np.int64)
        known = example.input_ids[: len(canvas)]
        canvas[: len(known)] = known
        is_masked = np.arange(len(canvas)) >= first
        return Noised(
            Example(canvas, is_masked, example.weight, example.num_units), is_masked, 1.0, record_id
        )


class AlignmentStream:
    """Micro-batches of prepared rows under one of the rules; rows without teacher columns have none."""

    def __init__(
        self, rows: Dataset, config: TrainConfig, run: Run, ids: SpecialIds, *, rule: str, windows: Windows
    ) -> None:
        self._rows, self._rule, self._windows = rows.with_format("numpy"), rule, windows
        self._table = TeacherTable(rows) if "teacher_positions" in rows.column_names else None
        self.has_teacher = self._table is not None
        self._rows = self._rows.select_columns(["input_ids", "in_answer"])
        kind = partial(_WindowStream, window_length=windows.length) if rule == "windows" else MaskedStream
        settings = config.stream(run, ids.mask, ids.pad)
        self._stream = kind(self._example, row_lengths(self._rows), **settings)

    @property
    def num_tokens(self) -> int:
        return int(row_lengths(self._rows).sum())

    def __call__(self, step: int) -> list[AlignedBatch]:
        """This rank's micro-batches of one step."""
        return [self._align(batch) for batch in self._stream(step)]

    def validation(self, limit: int | None) -> Iterator[AlignedBatch]:
        """This rank's share of the data under noise that never changes."""
        return map(self._align, self._stream.validation(limit))

    def _example(self, record_id: int, _: int, __: int) -> Example:
        """A record; its maskable tokens are those of the answer, for windows those that have a teacher."""
        row = self._rows[record_id]
        in_answer = row["in_answer"].astype(bool)
        if self._rule == "masked":
            return Example(row["input_ids"], in_answer, weight=1.0 / in_answer.sum(), num_units=1.0)
        if self._rule == "answer":
            return Example(row["input_ids"], in_answer, weight=1.0, num_units=float(in_answer.sum()))
        visible = np.flatnonzero(~in_answer)
        in_answer[: visible[-1] + 1 if len(visible) else 0] = False  # earlier turns are part of the prompt
        if self._table is not None:
            in_answer[self._table.positions(record_id)[-1] + 1 :] = False
        return Example(row["input_ids"], in_answer, weight=1.0, num_units=1.0)

    def _align(self, batch: MaskedBatch) -> AlignedBatch:
        """The batch with the rows that the rule scores, and their distributions."""
        width = batch.input_ids.shape[1]
        scored, parts = [_NO_ROWS], []
        for b, record_id in enumerate(batch.record_ids):  # none where a rank has run out of records
            inside = (batch.rows >= b * width) & (batch.rows < (b + 1) * width)
            masked = (batch.rows[inside] - b * width).numpy()
            rows, index = self._scored(record_id, masked, batch.weights[inside].numpy())
            scored.append({**rows, "rows": rows["rows"] + b * width})
            if len(index):
                parts.append((self._table.distributions(record_id), index))
        tensors = {name: torch.from_numpy(np.concatenate([r[name] for r in scored])) for name in _NO_ROWS}
        return AlignedBatch(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **tensors,
            teacher=TeacherChunks(parts), num_units=batch.num_units, record_ids=batch.record_ids,
            num_tokens=batch.num_tokens,
        )  # fmt: skip

    def _scored(
        self, record_id: int, masked: np.ndarray, drawn: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The scored rows of one record, and the places of their distributions in the record's.

        Args:
            masked: positions that the noise masked; drawn: their weights.
        """
        example = self._example(record_id, 0, 0)
        answer = np.flatnonzero(example.maskable)
        known = self._table.positions(record_id) if self._table is not None else np.empty(0, dtype=np.int32)
        # the cross-entropy is a mean over the answer, the distance one over what of it has a teacher
        share = len(answer) / max(1, len(known))
        positions, weights, places = masked, drawn, np.ones(len(masked), dtype=np.int64)
        if self._rule == "answer":
            positions, weights = answer, np.ones(len(answer), dtype=np.float32)
            places = np.ones(len(answer), dtype=np.int64)
        elif self._rule == "windows":
            positions, share = masked[masked <= answer[-1]], 1.0
            weights, places = self._windows.weights()[: len(positions)], np.arange(1, len(positions) + 1)
        index = np.searchsorted(known, positions)
        has_teacher = np.isin(positions, known)
        rows = {
            "rows": positions.astype(np.int64),
            "targets": example.input_ids[positions].astype(np.int64),
            "weights": weights,
            "teacher_weights": (weights * share * has_teacher).astype(np.float32),
            "has_teacher": has_teacher,
            "places": places,
        }
        return rows, index[has_teacher]
