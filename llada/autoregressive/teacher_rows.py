"""Answers with a teacher's distributions beside them: how they are made, stored, and read back in chunks.

A row of the prepared data (see `llada.data.shards`) is one answer behind its prompt, in the student's tokens:

    input_ids, in_answer      as in SFT: prompt, answer, its closing tokens
    teacher_positions         n positions of the row whose token the teacher has a distribution for
    teacher_ids               n K ids of the student, -1 = none; empty: K = all, column v is token v
    teacher_log_probs         n K log-probabilities, -inf = not known
    teacher_log_rest          n log-probabilities of everything else together

The teacher's number for a position is that of the token that stands there: AR logits, one place to the right.

L positions of a row, n of them with a distribution, K tokens known of each.
"""

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llada.autoregressive.vocabulary import OTHER, TokenBytes, VocabMap, align_texts
from llada.data.shards import Columns
from llada.data.template import encode_texts, hold_text
from llada.diffusion.distillation_losses import TeacherRows

KIND = "teacher"
_CHUNK = 256  # rows projected at once: bounds memory, large enough for the arithmetic


@dataclass(frozen=True)
class Distributions:
    """A teacher's distributions in the student's vocabulary."""

    ids: np.ndarray | None  # [n, K] int32 as in `teacher_ids`; None: column v is token v
    log_probs: np.ndarray  # [n, K] float32
    log_rest: np.ndarray  # [n] float32

    def take(self, index: np.ndarray) -> "Distributions":
        """The distributions at these places."""
        ids = None if self.ids is None else self.ids[index]
        return Distributions(ids, self.log_probs[index], self.log_rest[index])


@dataclass(frozen=True)
class TeacherAnswer:
    """One answer in the student's tokens, and the distributions at some of its positions."""

    prompt_ids: list[int]
    answer_ids: list[int]
    positions: np.ndarray  # [n] places in the answer, ascending
    distributions: Distributions


class Student:
    """The student's tokenizer: how it writes an answer, and which of its tokens a text is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.table = tokenizer, TokenBytes.of(tokenizer)

    def closing_ids(self) -> list[int]:
        """What ends an answer, as in SFT rows: end of turn, end of text; one token if they are the same."""
        return list(dict.fromkeys([self.table.closing, self.tokenizer.eos_token_id]))

    def encode_answer(self, text: str, *, is_closed: bool, where: str) -> list[int]:
        """Token ids of an answer; `is_closed`: it ended by itself, so closing tokens follow."""
        try:
            held = hold_text(text, self.tokenizer)  # a special token that the answer spells is text
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return encode_texts([held], self.tokenizer)[0] + (self.closing_ids() if is_closed else [])


def align_answer(
    answer_ids: list[int],
    teacher_texts: Sequence[bytes | None],
    student: Student,
    *,
    drops_first_space: bool,
    where: str,
) -> np.ndarray:
    """[answer tokens] which teacher token begins where each begins, -1 = none; see `align_texts`."""
    ours = [student.table.texts[i] for i in answer_ids]
    try:
        return align_texts(teacher_texts, ours, (drops_first_space, student.table.drops_first_space))
    except ValueError as error:
        raise ValueError(f"{where}: the teacher's tokens do not spell the response: {error}") from error


def from_logits(logits: Tensor, vocabulary: VocabMap, *, top_k: int) -> Distributions:
    """The student's view of a teacher's logits [n, V]: its top k tokens, or with top_k = 0 all of them.

    What is below the k-th, and the tokens that the student does not have, make up the rest.
    """
    parts = []
    for start in range(0, len(logits), _CHUNK):
        log_probs = logits[start : start + _CHUNK].float().log_softmax(-1)
        log_probs, log_other = vocabulary.project(log_probs)
        parts.append(_keep(log_probs, log_other, top_k))
    return _join(parts)


def from_candidates(
    candidates: Sequence[Sequence[tuple[int, float]]], log_rest: Sequence[float], *, top_k: int
) -> Distributions:
    """The same from (student id or -1, log-probability) pairs of each position; equal ids are added up."""
    n = len(candidates)
    ids = np.full((n, top_k), OTHER, dtype=np.int32)
    log_probs = np.full((n, top_k), -np.inf, dtype=np.float32)
    # float64: candidates of one position are added up one by one
    rest = np.array(log_rest, dtype=np.float64)
    for i, row in enumerate(candidates):
        total: dict[int, float] = {}
        for token, value in row:
            total[token] = np.logaddexp(total.get(token, -np.inf), value)
        rest[i] = np.logaddexp(rest[i], total.pop(OTHER, -np.inf))
        best = sorted(total.items(), key=lambda pair: -pair[1])
        for _, value in best[top_k:]:
            rest[i] = np.logaddexp(rest[i], value)
        for k, (token, value) in enumerate(best[:top_k]):
            ids[i, k], log_probs[i, k] = token, value
    return Distributions(ids, log_probs, rest.astype(np.float32))


def _keep(log_probs: Tensor, log_other: Tensor, top_k: int) -> Distributions:
    if not top_k:
        return Distributions(None, log_probs.numpy(), log_other.numpy())
    best, ids = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)
    # the rest as a sum, not as 1 - p: in float32 that would be 0 or negative
    tail = log_probs.scatter(-1, ids, -torch.inf)
    rest = torch.cat([tail, log_other[:, None]], dim=-1).logsumexp(-1)
    ids = ids.where(best > -torch.inf, OTHER)
    return Distributions(ids.int().numpy(), best.numpy(), rest.numpy())


def _join(parts: list[Distributions]) -> Distributions:
    if len(parts) == 1:
        return parts[0]
    ids = None if parts[0].ids is None else np.concatenate([part.ids for part in parts])
    log_probs, log_rest = (np.concatenate([getattr(p, n) for p in parts]) for n in ("log_probs", "log_rest"))
    return Distributions(ids, log_probs, log_rest)


def fit_length(answer: TeacherAnswer, where: str, *, max_length: int, long: str) -> TeacherAnswer | None:
    """The answer as --long leaves it in `max_length` tokens; None if it is dropped."""
    num_prompt, length = len(answer.prompt_ids), len(answer.prompt_ids) + len(answer.answer_ids)
    if length <= max_length:
        return answer
    if long == "error":
        raise ValueError(
            f"{where}: {length} tokens ({num_prompt} of them prompt) do not fit in --max_length "
            f"{max_length}; raise it, or use --long drop or --long truncate"
        )
    room = max_length - num_prompt
    # a row without any distribution teaches nothing
    kept = answer.positions < room
    if long == "drop" or not kept.any():
        return None
    return TeacherAnswer(
        answer.prompt_ids, answer.answer_ids[:room], answer.positions[kept], answer.distributions.take(kept)
    )


def as_columns(answers: Sequence[TeacherAnswer]) -> Columns:
    """Arrow columns of a shard."""
    rows = [np.array([*a.prompt_ids, *a.answer_ids], dtype=np.int32) for a in answers]
    in_answer = [np.arange(len(row)) >= len(a.prompt_ids) for row, a in zip(rows, answers, strict=True)]
    found = [a.distributions for a in answers]
    # full distributions need no ids: column v is token v
    none = np.empty(0, dtype=np.int32)
    return {
        "input_ids": _lists(rows),
        "in_answer": _lists(in_answer),
        "teacher_positions": _lists([(a.positions + len(a.prompt_ids)).astype(np.int32) for a in answers]),
        "teacher_ids": _lists([none if d.ids is None else d.ids.ravel() for d in found], large=True),
        "teacher_log_probs": _lists([d.log_probs.ravel() for d in found], large=True),
        "teacher_log_rest": _lists([d.log_rest for d in found]),
    }


def _lists(arrays: list[np.ndarray], *, large: bool = False) -> pa.Array:
    """Arrow lists; `large` ones may hold more than 2^31 values together."""
    borders = np.cumsum([0, *map(len, arrays)])
    values = pa.array(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
    if large:
        return pa.LargeListArray.from_arrays(pa.array(borders, pa.int64()), values)
    return pa.ListArray.from_arrays(pa.array(borders, pa.int32()), values)


def count(answers: Sequence[TeacherAnswer]) -> Counter:
    """Rows, tokens, answer tokens, and how many of these have a distribution."""
    return Counter(
        rows=len(answers),
        tokens=sum(len(a.prompt_ids) + len(a.answer_ids) for a in answers),
        answer_tokens=sum(len(a.answer_ids) for a in answers),
        teacher_positions=sum(len(a.positions) for a in answers),
    )


class TeacherTable:
    """The distributions of prepared rows, left on disk until a chunk of them is asked for."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows.select_columns(
            ["teacher_positions", "teacher_ids", "teacher_log_probs", "teacher_log_rest"]
        ).with_format("arrow")

    def positions(self, record_id: int) -> np.ndarray:
        """[n] positions of the row that have a distribution."""
        return self._column(record_id, "teacher_positions")

    def distributions(self, record_id: int) -> Distributions:
        """All distributions of a row, as views of the memory-mapped file."""
        log_rest = self._column(record_id, "teacher_log_rest")
        ids, log_probs = (self._column(record_id, f"teacher_{name}") for name in ("ids", "log_probs"))
        shape = (len(log_rest), -1)
        return Distributions(ids.reshape(shape) if len(ids) else None, log_probs.reshape(shape), log_rest)

    def _column(self, record_id: int, name: str) -> np.ndarray:
        # flatten of a slice is a slice, and without nulls numpy reads it where it lies
        return self._rows[record_id].column(name).chunk(0).flatten().to_numpy(zero_copy_only=True)


class TeacherChunks:
    """The distributions of a micro-batch's rows, in their order; any slice of them as tensors."""

    def __init__(self, parts: Sequence[tuple[Distributions, np.ndarray]]) -> None:
        """Args: parts: (the distributions of a record, places wanted of them), one after the other."""
        self._parts = [part for part in parts if len(part[1])]
        self._borders = np.cumsum([0, *(len(index) for _, index in self._parts)])

    def __len__(self) -> int:
        return int(self._borders[-1])

    def take(self, start: int, stop: int, device: torch.device) -> TeacherRows:
        """Rows start to stop; only these are read."""
        found = []
        for i in range(max(0, bisect.bisect_right(self._borders, start) - 1), len(self._parts)):
            first = int(self._borders[i])
            if first >= stop:
                break
            distributions, index = self._parts[i]
            found.append(distributions.take(index[max(0, start - first) : stop - first]))
        joined = _join(found)
        ids = None if joined.ids is None else torch.from_numpy(joined.ids).long().to(device)
        return TeacherRows(
            ids, torch.from_numpy(joined.log_probs).to(device), torch.from_numpy(joined.log_rest).to(device)
        )
