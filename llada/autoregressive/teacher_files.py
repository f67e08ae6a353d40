"""Teacher files of the systems we succeed: JSON records with a prompt, a response, and logits for each token.

    {"prompt", "response", "logits": [[number, ...], ...],
                           "token": [[text, ...], ...], "tokenID": [[id, ...], ...]}
    {"prompt", "response", "logits": [{"position", "chosen_token", "chosen_token_id",
                                       "top_5": [{"token", "token_id", "logit"}, ...],
                                       "full_logits": [number, ...]}, ...]}

Row j of `logits` is the distribution of token j of the response. Rows as wide as the teacher's vocabulary are
full distributions; narrower ones need `token` (or `tokenID` and the teacher's tokenizer) to say what their
numbers belong to, and count as all there is: the files do not tell what is left for other tokens.

T rows of a record.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llada.autoregressive.teacher_rows import (
    Distributions,
    Student,
    TeacherAnswer,
    align_answer,
    from_candidates,
    from_logits,
)
from llada.autoregressive.vocabulary import OTHER, ROLE_OF_SPELLING, TokenBytes, VocabMap
from llada.data.chat import render_prompt
from llada.data.files import OnBytes, input_files, kind_of
from llada.data.reading import to_prompt
from llada.data.records import JsonStream, read_records
from llada.data.template import encode_texts

MAX_SPARE = 512  # output columns that models have beyond their tokenizer's ids (LLaDA 115, Qwen2.5 271)
_SPELLED = re.compile("|".join(map(re.escape, sorted(ROLE_OF_SPELLING, key=len, reverse=True))))
_CLOSING = re.compile(
    r"(?:(?:{})\s*)+$".format(
        "|".join(re.escape(text) for text, role in ROLE_OF_SPELLING.items() if role in ("eos", "eot"))
    )
)
# How byte-level and sentencepiece vocabularies spell white space, where a file has such spellings.
_SPACES = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})


@dataclass(frozen=True)
class _Row:
    """One position: its candidates' texts, ids and logits; without both it is as wide as the vocabulary."""

    texts: list[str] | None
    ids: list[int] | None
    logits: np.ndarray
    chosen: list[str] | None  # texts that the token itself can have


def read_teacher_records(path: str | Path, on_bytes: OnBytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", record) with `logits` as arrays; a JSON file is streamed, number row by number row."""
    for file in input_files(path):
        if kind_of(file) != ".json":
            for where, record in read_records(file, on_bytes=on_bytes):
                if isinstance(record.get("logits"), list):
                    record["logits"] = [_as_row(element, where) for element in record["logits"]]
                yield where, record
            continue
        with JsonStream(file, on_bytes) as stream:
            yield from stream.records(lambda stream=stream: stream.record({"logits": _as_row}))


def _as_row(element: Any, where: str) -> np.ndarray | dict[str, Any]:
    """An element of `logits`, with its long lists as float32 arrays."""
    if isinstance(element, list):
        return _numbers(element, where, "logits")
    if isinstance(element, dict):
        if element.get("full_logits") is not None:
            element["full_logits"] = _numbers(element["full_logits"], where, "full_logits")
        return element
    raise ValueError(f"{where}: 'logits' must hold lists of numbers or objects, got {element!r:.60}")


def _numbers(values: Any, where: str, field: str) -> np.ndarray:
    try:
        found = np.array(values, dtype=np.float32)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.ndim != 1 or not found.size:
        raise ValueError(f"{where}: {field!r} must be a list of numbers, got {values!r:.60}")
    if not np.isfinite(found).all():
        at = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ValueError(f"{where}: {field!r} holds {found[at]} at place {at}; logits must be finite numbers")
    return found


class TeacherFile:
    """Turns records of a teacher file into rows of the student."""

    def __init__(
        self, student: Student, teacher_tokenizer: PreTrainedTokenizerBase | None, *, top_k: int
    ) -> None:
        """`teacher_tokenizer`: of the model that made the file; default the student's, for full rows."""
        self._student, self._top_k = student, top_k
        self._knows_teacher = teacher_tokenizer is not None
        self._teacher = teacher_tokenizer or student.tokenizer
        self._vocabulary = VocabMap.between(self._teacher, student.tokenizer)
        # positions whose `full_logits` are not as wide as the vocabulary and were left out
        self.num_ignored = 0

    def answer(self, record: dict[str, Any], where: str) -> TeacherAnswer:
        """The row of one record; ValueError: `where`, and what does not fit: lengths, ids, texts, numbers."""
        response = _text(record, "response", where)
        rows = [self._row(record, j, where) for j in range(self._num_rows(record, where))]
        spoken = _CLOSING.sub("", response)
        is_closed = spoken != response
        # the file's own texts before any tokenizer: they are what the numbers belong to
        if all(row.chosen is not None for row in rows):
            texts = self._segment(response, len(spoken), rows, where)
        else:
            texts = self._tokenise(spoken, len(rows), is_closed, where)
        answer_ids = self._student.encode_answer(spoken, is_closed=is_closed, where=where)
        index = align_answer(
            answer_ids, texts, self._student,
            drops_first_space=self._vocabulary.source.drops_first_space, where=where,
        )  # fmt: skip
        positions = np.flatnonzero(index != OTHER)
        distributions = self._take(rows, index[positions], texts, where)
        return TeacherAnswer(self._prompt(record, where), answer_ids, positions, distributions)

    def _prompt(self, record: dict[str, Any], where: str) -> list[int]:
        """Token ids of the prompt: special tokens by role where it spells some, else through the template."""
        prompt, table = record.get("prompt"), self._student.table
        if isinstance(prompt, str) and _SPELLED.search(prompt):

            def ours(match: re.Match[str]) -> str:
                i = table.ids_of_role.get(ROLE_OF_SPELLING[match[0]])
                return match[0] if i is None else table.tokens[i]

            text = _SPELLED.sub(ours, prompt)
            return render_prompt(text, self._student.tokenizer, chat=False, parse_special=True)
        return render_prompt(to_prompt({"prompt": prompt}, where), self._student.tokenizer, chat=True)

    def _num_rows(self, record: dict[str, Any], where: str) -> int:
        logits = record.get("logits")
        if not isinstance(logits, list) or not logits:
            raise ValueError(f"{where}: needs 'logits', a list with a row for each token of the response")
        for field in ("token", "tokenID"):
            values = record.get(field)
            if values is not None and (not isinstance(values, list) or len(values) != len(logits)):
                length = len(values) if isinstance(values, list) else repr(values)
                raise ValueError(f"{where}: 'logits' has {len(logits)} rows and {field!r} {length}")
        return len(logits)

    def _row(self, record: dict[str, Any], j: int, where: str) -> _Row:
        element = record["logits"][j]
        if isinstance(element, dict):
            return self._position(element, f"{where}: logits[{j}]")
        texts, ids = ((record.get(name) or [None] * (j + 1))[j] for name in ("token", "tokenID"))
        for name, values in (("token", texts), ("tokenID", ids)):
            if values is not None and (not isinstance(values, list) or len(values) != len(element)):
                raise ValueError(
                    f"{where}: logits[{j}] has {len(element)} numbers, {name}[{j}] is {values!r:.60}"
                )
        if texts is None and (ids is None or len(element) >= self._vocabulary.source_size):
            return _Row(None, None, self._full(element, f"{where}: logits[{j}]"), None)
        self._check_ids(ids, texts, f"{where}: tokenID[{j}]")
        return _Row(texts, ids, element, texts if texts is not None else None)

    def _position(self, element: dict[str, Any], where: str) -> _Row:
        if not isinstance(element.get("chosen_token"), str):
            raise ValueError(f"{where}: needs a text 'chosen_token'; fields are {sorted(element)}")
        chosen, full = [element["chosen_token"]], element.get("full_logits")
        if full is not None and self._is_full(full):
            return _Row(None, None, full, chosen)
        self.num_ignored += full is not None
        top = element.get("top_5")
        if not isinstance(top, list) or not top:
            width = "no" if full is None else f"{len(full)}"
            raise ValueError(
                f"{where}: needs 'top_5', or 'full_logits' with one number for each of the "
                f"{self._vocabulary.source_size} tokens of the teacher (it has {width})"
            )
        if not all(isinstance(entry, dict) and isinstance(entry.get("token"), str) for entry in top):
            raise ValueError(f"{where}: 'top_5' must hold {{'token', 'token_id', 'logit'}} objects")
        texts, ids = ([entry.get(name) for entry in top] for name in ("token", "token_id"))
        ids = None if any(i is None for i in ids) else ids
        self._check_ids(ids, texts, f"{where}: top_5")
        return _Row(texts, ids, _numbers([e.get("logit") for e in top], where, "logit"), chosen)

    def _is_full(self, logits: np.ndarray) -> bool:
        return 0 <= len(logits) - self._vocabulary.source_size <= MAX_SPARE

    def _full(self, logits: np.ndarray, where: str) -> np.ndarray:
        if self._is_full(logits):
            return logits
        whose = "--teacher_tokenizer" if self._knows_teacher else "the student's tokenizer"
        raise ValueError(
            f"{where} has {len(logits)} numbers, {whose} {self._vocabulary.source_size} tokens: "
            "name the tokenizer of the model that made this file with --teacher_tokenizer, or store 'token' "
            "with the numbers"
        )

    def _check_ids(self, ids: list[Any] | None, texts: list[str] | None, where: str) -> None:
        """ValueError for ids that the teacher's tokenizer does not have, or has for another text."""
        if ids is None:
            return
        if not self._knows_teacher:
            if texts is None:
                raise ValueError(f"{where}: ids without 'token' texts need --teacher_tokenizer")
            return  # the texts decide; whose ids these are is not known
        table = self._vocabulary.source
        for k, i in enumerate(ids):
            if not isinstance(i, int) or not 0 <= i < len(table.tokens) or table.tokens[i] is None:
                raise ValueError(f"{where}: unknown token id {i!r}; --teacher_tokenizer has none like it")
            if texts is None:
                continue
            if not _writes(table, i, texts[k]):
                raise ValueError(
                    f"{where}: says that token {i} is {texts[k]!r}, --teacher_tokenizer has "
                    f"{table.tokens[i]!r} there; the file was made with another tokenizer"
                )

    def _tokenise(self, spoken: str, num_rows: int, is_closed: bool, where: str) -> list[bytes | None]:
        """The teacher's tokens of a response, where the file does not spell them out."""
        table = self._vocabulary.source
        texts = [table.texts[i] for i in encode_texts([spoken], self._teacher)[0]]
        if num_rows == len(texts) + 1 and is_closed:
            texts.append(None)
        if num_rows != len(texts):
            raise ValueError(
                f"{where}: 'logits' has {num_rows} rows, the response {len(texts)} tokens of "
                f"{self._teacher.name_or_path!r}{' and its end' if is_closed else ''}"
            )
        return texts

    def _segment(self, response: str, end: int, rows: list[_Row], where: str) -> list[bytes | None]:
        """What each row's token writes: the rows' candidates, one of each, that spell the response.

        A space may be missing in front of a candidate. Special tokens at the end (from `end` on) may have no
        row.
        """
        steps: list[dict[int, list[int]]] = []  # row -> offset -> offsets it can reach, best first
        offsets = {0}
        for j, row in enumerate(rows):
            reach = {o: _matches(response, o, row.chosen) for o in offsets}
            steps.append(reach)
            offsets = {after for found in reach.values() for after in found}
            if not offsets:
                at = max(reach)
                what = "is longer than the response" if at >= end else "does not spell the response"
                raise ValueError(
                    f"{where}: 'logits' {what}: row {j} of {len(rows)} has {row.chosen!r:.60} where the "
                    f"response goes on with {response[at : at + 20]!r}"
                )
        # white space and closing tokens at the end may have no rows
        goals = {o for o in offsets if o >= end or not response[o:end].strip()}
        if not goals:
            at = max(offsets)
            raise ValueError(
                f"{where}: 'logits' is shorter than the response: its {len(rows)} rows end before "
                f"{response[at : at + 20]!r}"
            )
        alive = [goals]  # offsets from which the goals can be reached, last row first
        for reach in reversed(steps):
            alive.append({o for o, found in reach.items() if alive[-1].intersection(found)})
        alive.reverse()
        offset, texts = 0, []
        for j, reach in enumerate(steps):
            # the first candidate that can be carried on
            after = next(o for o in reach[offset] if o in alive[j + 1])
            text = response[offset:after]
            texts.append(None if text.strip() in ROLE_OF_SPELLING else text.encode())
            offset = after
        if texts and offset < end and texts[-1] is not None:  # white space before the closing tokens
            texts[-1] += response[offset:end].encode()
        return texts

    def _take(
        self, rows: list[_Row], index: np.ndarray, texts: Sequence[bytes | None], where: str
    ) -> Distributions:
        """The distributions of the rows that an answer's tokens stand at."""
        wanted = [rows[j] for j in index]
        if all(row.texts is None and row.ids is None for row in wanted):
            logits = torch.from_numpy(np.stack([row.logits for row in wanted]))
            return from_logits(logits, self._vocabulary, top_k=self._top_k)
        if not self._top_k:
            raise ValueError(
                f"{where}: --top_k 0 stores full distributions, and this record has {len(rows[0].logits)} "
                "numbers a row"
            )
        candidates = []
        for row, j in zip(wanted, index, strict=True):
            log_probs = torch.from_numpy(row.logits).double().log_softmax(-1).tolist()
            if row.texts is None and row.ids is None:
                raise ValueError(f"{where}: logits[{j}] is a full distribution, others are not")
            candidates.append(list(zip(self._ids_of(row, texts[j]), log_probs, strict=True)))
        return from_candidates(candidates, [-np.inf] * len(candidates), top_k=self._top_k)

    def _ids_of(self, row: _Row, written: bytes | None) -> list[int]:
        """The student's id of each candidate."""
        if self._knows_teacher and row.ids is not None:
            return self._vocabulary.target_of[torch.tensor(row.ids)].tolist()
        table = self._student.table
        plain = [text.translate(_SPACES) for text in row.texts]
        # a file that strips the space of the token that stands there strips those of the others too
        lacks_space = written is not None and written.startswith(b" ") and written.decode() not in plain
        ids = []
        for text, spelled in zip(plain, row.texts, strict=True):
            if spelled in table.id_of_special or spelled in ROLE_OF_SPELLING:
                found = table.id_of_foreign(spelled)
                ids.append(OTHER if found is None else found)
            else:
                ids.append(table.id_of_text.get((" " * lacks_space + text).encode(), OTHER))
        return ids


def _matches(response: str, offset: int, candidates: Sequence[str]) -> list[int]:
    """Where a token that is one of the candidates can end, best first."""
    found: list[int] = []
    for candidate in candidates:
        for text in (candidate, candidate.translate(_SPACES), " " + candidate.translate(_SPACES)):
            end = offset + len(text)
            if text and response.startswith(text, offset):
                if end not in found:
                    found.append(end)
                break
    return found


def _writes(table: TokenBytes, token_id: int, said: str) -> bool:
    """Whether a token is the one that a file spells so; white space around it may have been lost."""
    text = table.texts[token_id]
    if text is None:
        return table.id_of_special.get(said) == token_id
    if "\ufffd" in said:  # part of a character, which a JSON text cannot hold
        return True
    return said.translate(_SPACES).strip().encode() == text.strip()


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: needs a text {field!r}; fields are {sorted(record)}")
    return value
