"""Streams for alignment: which positions of an answer are asked for, and what the teacher says about each.

Three rules (what is masked, what is scored):
    masked    a random part of the answer, as in SFT; the masked tokens, each weighted with 1 / p
    answer    the same noise; all tokens of the answer, masked or visible, each alike
    windows   [prompt, answer[:s], G masks] for a random s; the G tokens of the window: what a drafter does

Prompts and padding are never masked and never scored, nor is what a window has beyond the answer's end.
Everything is a function of (seed, step), as in llada/diffusion/stream.py.

B sequences, L positions, M scored rows, G masks of a window, n places where a window can begin.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from llada.autoregressive.teacher_rows import TeacherChunks, TeacherTable
from llada.data.shards import row_lengths
from llada.diffusion.batches import Example, Noised
from llada.diffusion.masking import Stratum
from llada.diffusion.stream import MaskedStream
from llada.models.tokens import SpecialIds
from llada.run import Run
from llada.training.config import TrainConfig


@dataclass
class AlignedBatch:
    """A micro-batch with a teacher."""

    input_ids: torch.Tensor  # [B, L] with masks
    attention_mask: torch.Tensor | None  # [B, L]
    rows: torch.Tensor  # [M] flat positions b * L + i that are scored, in order
    targets: torch.Tensor  # [M] their tokens
    weights: torch.Tensor  # [M] float32 of the cross-entropy
    teacher_weights: torch.Tensor  # [M] of the distance to the teacher
    has_teacher: torch.Tensor  # [M] bool
    places: torch.Tensor  # [M] place in the window, from 1; always 1 without windows
    teacher: TeacherChunks  # the distributions of those rows
    num_units: float  # of its records; see `Example`
    record_ids: list[int]
    num_tokens: int  # that the model reads, padding excluded
    # where several windows share a text; see `Windows`
    position_ids: torch.Tensor | None = None
    attention_bias: torch.Tensor | None = None
    num_visited: int | None = None  # states of the student's own; those without a teacher are left out

    @property
    def inputs(self) -> dict[str, torch.Tensor | None]:
        """What the model's forward takes, beside a score of `rows`."""
        names = ("input_ids", "attention_mask", "rows", "position_ids", "attention_bias")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> "AlignedBatch":
        """The same batch with its tensors on `device`; distributions follow chunk by chunk."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()})


@dataclass(frozen=True)
class Windows:
    """Draft windows.

    One window a record and step, or (`keep_rate`) one from every place of the answer, all in one forward:

        [prompt, answer, masks of window 1, masks of window 2, ...]

    The masks of window s have the positions s, s + 1, ... and see the text before s and themselves, which is
    what a causal drafter sees of them: the text is read once. A share max(keep_rate^(k-1), keep_min) of the
    windows keeps its k-th mask, and the k-th losses count for those left out.
    """

    length: int  # G
    # weight exp(-(k - 1) / decay) of the k-th place; infinite: all alike. Source: DFlash, arXiv 2602.06036
    decay: float = float("inf")
    # None: one window; else of the conditional drop of PARD, arXiv 2504.18583; 1 keeps all
    keep_rate: float | None = None
    keep_min: float = 0.2

    def weights(self) -> np.ndarray:
        """[G] float32, sum 1."""
        weights = np.exp(-np.arange(self.length) / self.decay)
        return (weights / weights.sum()).astype(np.float32)

    def shares(self) -> np.ndarray:
        """[G] of the windows that keep their k-th mask, falling from 1."""
        rate = 1.0 if self.keep_rate is None else self.keep_rate
        return np.maximum(rate ** np.arange(self.length), min(self.keep_min, 1.0))


_COLUMNS = {
    "rows": np.int64, "targets": np.int64, "places": np.int64, "has_teacher": bool,
    "weights": np.float32, "teacher_weights": np.float32,
}  # fmt: skip
_NOWHERE = 1 << 30  # where a window begins that no text belongs to


def joined(scored: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """The scored rows of all records as tensors of a batch; also of none."""
    empty = {name: np.empty(0, dtype) for name, dtype in _COLUMNS.items()}
    return {name: torch.from_numpy(np.concatenate([r[name] for r in [empty, *scored]])) for name in empty}


@dataclass
class _Rows:
    """What is scored of one record: positions of its canvas, the tokens that stand there, their weights."""

    positions: np.ndarray
    tokens: np.ndarray  # positions in the record, of which targets and teacher are taken
    weights: np.ndarray
    places: np.ndarray


@dataclass
class _Shared(Noised):
    """A canvas of several windows: [L] the place where each column's window begins, and its position."""

    begins: np.ndarray
    positions: np.ndarray
    rows: _Rows


@dataclass(kw_only=True)
class AlignmentStream(MaskedStream):
    """Micro-batches of prepared rows under one of the rules; rows without teacher columns have none."""

    rows: Dataset
    table: TeacherTable | None
    rule: str
    windows: Windows
    # record ids -> the places of each answer where windows begin, in training; None: anywhere
    starts_of: Callable[[Sequence[int]], dict[int, np.ndarray]] | None = None

    @classmethod
    def over(
        cls, rows: Dataset, config: TrainConfig, run: Run, ids: SpecialIds, *, rule: str, windows: Windows
    ) -> "AlignmentStream":
        """The stream of these rows."""
        table = TeacherTable(rows) if "teacher_positions" in rows.column_names else None
        rows = rows.with_format("numpy").select_columns(["input_ids", "in_answer"])
        return cls(
            partial(_example, rows, table, rule), row_lengths(rows), rows=rows, table=table, rule=rule,
            windows=windows, **config.stream(run, ids.mask, ids.pad),
        )  # fmt: skip

    def __post_init__(self) -> None:
        self.purpose = "window" if self.rule == "windows" else "mask"
        self._starts: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> list[AlignedBatch]:
        """This rank's micro-batches of one step."""
        # before the batches are made, for all of them together
        if self.starts_of is not None:
            self._starts = self.starts_of([record_id for record_id, _ in self.records_of(step)])
        batches = super().__call__(step)
        self._starts = {}
        return batches

    def hide(
        self,
        example: Example,
        record_id: int,
        random: np.random.Generator,
        stratum: Stratum,
        *noise: Any,
        **more_noise: Any,
    ) -> Noised:
        """One record after noise, or the canvas of its windows."""
        if self.rule != "windows":
            return super().hide(example, record_id, random, stratum, *noise, **more_noise)
        scored = np.flatnonzero(example.maskable)
        starts = scored[self._starts[record_id]] if record_id in self._starts else scored
        if self.windows.keep_rate is not None:
            return self._all_windows(example, record_id, random, starts, int(scored[-1]))
        first = int(starts[int(stratum.time(random.random()) * len(starts))])
        canvas = np.full(first + self.windows.length, self.pad_id, dtype=np.int64)
        known = example.input_ids[: len(canvas)]
        canvas[: len(known)] = known
        # a window may reach beyond the answer: a drafter does not know where that ends
        is_masked = np.arange(len(canvas)) >= first
        return Noised(replace(example, input_ids=canvas, maskable=is_masked), is_masked, 1.0, record_id)

    def _all_windows(
        self, example: Example, record_id: int, random: np.random.Generator, starts: np.ndarray, last: int
    ) -> _Shared:
        """The text, and behind it the masks of a window from each of these positions, up to the last one."""
        num, shares = len(starts), self.windows.shares()
        # One number for each window, spread evenly: the k-th masks kept are those of the k-1-th, thinned out.
        drawn = (random.permutation(num) + random.random()) / num
        lengths = np.minimum((shares[None] > drawn[:, None]).sum(1), last + 1 - starts)
        window = np.repeat(np.arange(num), lengths)  # of each scored row, which is one of its places
        place = np.arange(len(window)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        # Row i of a shifted model predicts token i + 1: the text gives the first place, a mask the next one.
        is_mask = place < lengths[window] - 1
        # masks stand behind the text in the order of their windows
        columns = len(example.input_ids) + np.cumsum(is_mask) - is_mask
        read = np.where(place == 0, starts[window], np.roll(columns, 1) + 1)
        tokens = starts[window] + place
        text = np.arange(len(example.input_ids))
        num_masks = int(is_mask.sum()) + 1  # and one column that only stands behind the last of them
        canvas = np.concatenate([example.input_ids, np.full(num_masks, self.pad_id)])
        begins = np.concatenate([np.full(len(text), -1), starts[window][is_mask], [_NOWHERE]])
        positions = np.concatenate([text, tokens[is_mask], [0]])
        weights = (self.windows.weights() / shares)[place] / num
        rows = _Rows(read, tokens, weights.astype(np.float32), place + 1)
        is_masked = np.arange(len(canvas)) >= len(text)
        changed = replace(example, input_ids=canvas, maskable=is_masked)
        return _Shared(changed, is_masked, 1.0, record_id, begins, positions, rows)

    def _collate(self, rows: list[list[Noised]]) -> AlignedBatch:
        """The batch with the rows that the rule scores, and their distributions."""
        # a rank that has run out of records still gets a batch, of no rows
        batch = super()._collate(rows)
        width, items = batch.input_ids.shape[1], [row[0] for row in rows]
        scored, parts = [], []
        for b, item in enumerate(items):
            own, known = self._scored(item), self._known(item.record_id)
            is_known = np.isin(own.tokens, known)
            share = 1.0
            if self.rule != "windows":
                # the cross-entropy is a mean over the answer, the distance one over what of it has a teacher
                num_answer = int(self.example_of(item.record_id, 0, 0).maskable.sum())
                share = num_answer / max(1, len(known))
            scored.append({
                "rows": own.positions + b * width,
                "targets": self.rows[item.record_id]["input_ids"][own.tokens].astype(np.int64),
                "weights": own.weights,
                "teacher_weights": (own.weights * share * is_known).astype(np.float32),
                "has_teacher": is_known, "places": own.places,
            })  # fmt: skip
            if is_known.any():
                index = np.searchsorted(known, own.tokens[is_known])
                parts.append((self.table.distributions(item.record_id), index))
        return AlignedBatch(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **joined(scored),
            teacher=TeacherChunks(parts), num_units=batch.num_units, record_ids=batch.record_ids,
            num_tokens=batch.num_tokens, **_shared_columns(items, width),
        )  # fmt: skip

    def _known(self, record_id: int) -> np.ndarray:
        return np.empty(0, np.int64) if self.table is None else self.table.positions(record_id)

    def _scored(self, item: Noised) -> _Rows:
        """The scored rows of one record, and the places of their distributions in the record's."""
        if isinstance(item, _Shared):
            return item.rows
        masked = np.flatnonzero(item.is_masked)
        if self.rule == "windows":
            last = np.flatnonzero(self.example_of(item.record_id, 0, 0).maskable)[-1]
            inside = masked[masked <= last]
            places = np.arange(1, len(inside) + 1)
            return _Rows(inside, inside, self.windows.weights()[: len(inside)], places)
        if self.rule == "answer":
            masked = np.flatnonzero(item.example.maskable)
        weight = 1.0 if self.rule == "answer" else item.weight
        ones = np.ones(len(masked), dtype=np.int64)
        return _Rows(masked, masked, (ones * weight).astype(np.float32), ones)

    @property
    def has_teacher(self) -> bool:
        return self.table is not None


def _example(
    rows: Dataset, table: TeacherTable | None, rule: str, record_id: int, _: int, __: int
) -> Example:
    """A record; its maskable tokens are those of the answer, for windows those that have a teacher."""
    row = rows[record_id]
    in_answer = row["in_answer"].astype(bool)
    if rule == "masked":
        return Example(row["input_ids"], in_answer, weight=1.0 / in_answer.sum(), num_units=1.0)
    if rule == "answer":
        return Example(row["input_ids"], in_answer, weight=1.0, num_units=float(in_answer.sum()))
    # no window may look at a later turn
    visible = np.flatnonzero(~in_answer)
    in_answer[: visible[-1] + 1 if len(visible) else 0] = False  # earlier turns are part of the prompt
    if table is not None:
        in_answer[table.positions(record_id)[-1] + 1 :] = False
    return Example(row["input_ids"], in_answer, weight=1.0, num_units=1.0)


def _shared_columns(items: list[Noised], width: int) -> dict[str, torch.Tensor]:
    """Positions and attention of canvases that hold several windows."""
    if not all(isinstance(item, _Shared) for item in items) or not items:
        return {}
    positions = np.zeros((len(items), width), dtype=np.int64)
    begins = np.full((len(items), width), _NOWHERE)  # padding
    for b, item in enumerate(items):
        positions[b, : len(item.positions)] = item.positions
        begins[b, : len(item.begins)] = item.begins
    begins, positions = torch.from_numpy(begins), torch.from_numpy(positions)
    is_text, own = begins < 0, begins[:, :, None] == begins[:, None]
    before = is_text[:, None] & (positions[:, None] < begins[:, :, None])
    return {"position_ids": positions, "attention_bias": (own | before)[:, None]}
