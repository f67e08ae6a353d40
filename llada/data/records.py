"""Read records from files, each with where it stands. The kinds of files: llada/data/files.py.

Everything is streamed: memory does not grow with the file. Every error names file and line.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from llada.data.files import OnBytes, input_files, kind_of, open_data, parts_of

_CHUNK = 1 << 20  # characters read at once; a longer value is read until it is whole
_BOM = b"\xef\xbb\xbf"  # written by some editors in front of UTF-8
# How far from the end of what was read an error can be that more text would mend: \uD83D, -Infinity, ...
_NEAR_END = 16

Convert = Callable[[Any, str], Any]
"""(element, "file:line") -> what to keep of it."""


class JsonStream:
    """A cursor over a UTF-8 JSON file. Every error names file and line."""

    def __init__(self, file: Path, on_bytes: OnBytes | None = None) -> None:
        self._file, self._open = file, ExitStack()
        self._raw, self._tell = self._open.enter_context(open_data(file, on_bytes))
        self._num_read = self._num_used = 0  # bytes
        self._counted = 0  # characters of `_text` that are in `_num_used`
        self._pending = b""  # the first bytes of a character whose last ones are not read yet
        self._offset = 0  # of `_pending` in the file
        self._text, self._place, self._is_at_end = "", 0, False
        self._column = 0  # characters of the cursor's line that are gone from `_text`
        self.line = 1  # of the cursor
        self._decoder = json.JSONDecoder()
        try:
            self._grow(max(_CHUNK, len(_BOM)))
        except BaseException:
            self._open.__exit__(*sys.exc_info())  # closes the file, and names a damaged one
            raise
        if self._text.startswith(_BOM.decode()):
            self._text, self._num_used = self._text[1:], len(_BOM)

    def __enter__(self) -> "JsonStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    @property
    def where(self) -> str:
        return f"{self._file}:{self.line}"

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            start = self._place
            while self._place < len(self._text) and self._text[self._place].isspace():
                self._place += 1
            self.line += self._text.count("\n", start, self._place)
            if self._place < len(self._text):
                return self._text[self._place]
            if self._is_at_end:
                self.tell_used()
                return ""
            self._grow(_CHUNK)

    def take(self, expected: str) -> None:
        """Steps over one character, which must be `expected`."""
        if self.peek() != expected:
            raise self._malformed(f"expected {expected!r}", self._place)
        self._place += 1

    def skip(self, character: str) -> bool:
        """Steps over one character if it is `character`; whether it was."""
        found = self.peek() == character
        self._place += found
        return found

    def value(self) -> Any:
        """The whole JSON value at the cursor, parsed."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - _NEAR_END or error.msg.startswith("Unterminated")
                if self._is_at_end or not is_cut:
                    raise self._malformed(error.msg, error.pos) from error
            except (RecursionError, ValueError) as error:  # ValueError: more digits than Python reads
                raise self._malformed(f"{error}", self._place) from error
            else:
                if end < len(self._text) or self._is_at_end:  # 12 at the end could go on as 123
                    self.line += self._text.count("\n", self._place, end)
                    self._place = end
                    return value
            self._grow(max(_CHUNK, len(self._text) - self._place))  # doubling: linear in the value's length

    def elements(self) -> Iterator[None]:
        """Stands the cursor before each element of the array in turn; read it before going on."""
        self.take("[")
        while not self.skip("]"):
            yield
            if not self.skip(",") and self.peek() != "]":
                raise self._malformed("expected ',' or ']'", self._place)

    def record(self, long_arrays: Mapping[str, Convert]) -> dict[str, Any]:
        """The object at the cursor; elements of `long_arrays` are converted one by one as they are read."""
        found: dict[str, Any] = {}
        self.take("{")
        while not self.skip("}"):
            if self.peek() != '"':
                raise self._malformed("expected a field name in double quotes", self._place)
            name = self.value()
            self.take(":")
            if name in long_arrays and self.peek() == "[":
                convert = long_arrays[name]
                found[name] = []
                for _ in self.elements():
                    self.peek()
                    where = self.where
                    found[name].append(convert(self.value(), where))
            else:
                found[name] = self.value()
            if not self.skip(",") and self.peek() != "}":
                raise self._malformed("expected ',' or '}'", self._place)
        return found

    def records(self, read: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
        """("file:line", read()) for each element of the file's array, or for values one after the other."""
        if self.peek() == "[":
            for _ in self.elements():
                self.peek()
                self.tell_used()
                yield self.where, read()
            if rest := self.peek():
                raise ValueError(f"{self.where}: malformed JSON: {rest!r} after the end of the array")
            return
        while self.peek():
            self.tell_used()
            yield self.where, read()

    def skip_line(self) -> None:
        """Goes to the next line, to read on behind a value that is malformed."""
        while (end := self._text.find("\n", self._place)) < 0 and not self._is_at_end:
            self._grow(_CHUNK)
        self._place = end + 1 if end >= 0 else len(self._text)
        self.line += end >= 0

    def _grow(self, num_characters: int) -> None:
        """Reads on, and lets go of what has been used."""
        self.tell_used()
        raw = self._raw.read(num_characters)
        self._num_read += len(raw)
        self._is_at_end = not raw
        data = self._pending + raw
        try:
            text, used = data.decode("utf-8"), len(data)
        except UnicodeDecodeError as error:
            if self._is_at_end or error.end < len(data) or len(data) - error.start > 3:
                line = self.line + self._text.count("\n", self._place) + data[: error.start].count(b"\n")
                raise ValueError(
                    f"{self._file}:{line}: byte 0x{data[error.start]:02x} at offset "
                    f"{self._offset + error.start} of the file is not UTF-8; convert the file, for example "
                    "with iconv"
                ) from error
            text, used = data[: error.start].decode("utf-8"), error.start
        self._pending = data[used:]
        self._offset += used
        line_start = self._text.rfind("\n", 0, self._place) + 1
        self._column = self._place - line_start + (0 if line_start else self._column)
        self._text, self._place, self._counted = self._text[self._place :] + text, 0, 0

    def tell_used(self) -> None:
        """Tells how many bytes of the file are used up to the cursor."""
        self._num_used += len(self._text[self._counted : self._place].encode())
        self._counted = self._place
        self._tell(self._num_used / max(1, self._num_read))

    def _malformed(self, message: str, place: int) -> ValueError:
        num_lines = self._text.count("\n", self._place, place)
        line_start = self._text.rfind("\n", 0, place) + 1
        column = place - line_start + 1 + (0 if line_start else self._column)
        if place >= len(self._text) and self._is_at_end:
            message += ", but the file ends there,"
        where = f"line {self.line + num_lines}, column {column}" if num_lines else f"column {column}"
        return ValueError(f"{self.where}: malformed JSON: {message} at {where}")


Located = tuple[str, dict[str, Any]]
OnBad = Callable[[str], None]
"""Told what is wrong with a record that is then left out."""

TEXT_DOCUMENTS = ("blank_line", "line", "file")
_BATCH = 1000  # Parquet and Arrow rows turned into Python at a time


def read_records(
    path: str | Path,
    *,
    split: str = "train",
    text_documents: str = "blank_line",
    on_bytes: OnBytes | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[Located]:
    """("file:line", record) of one file, of the data files below a folder (sorted), or of a dataset folder.

    Args:
        path: .jsonl or .ndjson (objects one after the other, also over several lines), .json (an array too),
            .txt, .csv and .tsv (with a header), all of them also compressed, .parquet, a folder written by
            `datasets.save_to_disk`, or a folder of such files, see `input_files`.
        text_documents: what a document is in a .txt file: text between blank lines, one line, or the file.
        on_bytes: told how many bytes of the file have been used since the last call, for a progress bar.
        on_bad: told of a malformed line of a .jsonl file, which is then left out; None: an error.

    ValueError: no such file, unknown kind of file, empty file, malformed JSON, bytes that are not UTF-8.
    """
    if text_documents not in TEXT_DOCUMENTS:
        raise ValueError(f"--text_documents {text_documents!r}: use one of {', '.join(TEXT_DOCUMENTS)}")
    for file in input_files(path, split):
        is_empty = True
        for located in _read_one(file, text_documents, on_bytes, on_bad):
            is_empty = False
            yield located
        if is_empty:
            raise ValueError(f"{file}: holds no records; is it a failed download or export?")


def _read_one(
    file: Path, text_documents: str, on_bytes: OnBytes | None, on_bad: OnBad | None
) -> Iterator[Located]:
    kind = kind_of(file)
    if file.is_dir():
        return _read_dataset(file, on_bytes)
    if kind in (".jsonl", ".ndjson"):
        return _read_jsonl(file, on_bytes, on_bad)
    if kind == ".json":
        return _read_json(file, on_bytes, on_bad)
    if kind == ".parquet":
        return _read_parquet(file, on_bytes)
    if kind in (".csv", ".tsv"):
        return _read_table(file, "," if kind == ".csv" else "\t", on_bytes)
    return _read_text(file, text_documents, on_bytes)


def _lines(file: Path, on_bytes: OnBytes | None) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a UTF-8 file."""
    offset = 0
    with open_data(file, on_bytes) as (stream, tell):
        for line, raw in enumerate(stream, start=1):
            text = raw.removeprefix(_BOM) if line == 1 else raw
            try:
                yield line, text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}:{line}: byte 0x{text[error.start]:02x} at offset "
                    f"{offset + len(raw) - len(text) + error.start} of the file is not UTF-8; convert the "
                    "file, for example with iconv"
                ) from error
            offset += len(raw)
            tell()


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object {{...}}, got {json.dumps(value)[:60]}")
    return value


def _read_jsonl(file: Path, on_bytes: OnBytes | None, on_bad: OnBad | None) -> Iterator[Located]:
    with JsonStream(file, on_bytes) as stream:
        while stream.peek():
            stream.tell_used()
            where = stream.where
            try:
                record = _record(stream.value(), where)
            except ValueError as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
                stream.skip_line()
                continue
            yield where, record


def _read_json(file: Path, on_bytes: OnBytes | None, on_bad: OnBad | None) -> Iterator[Located]:
    with JsonStream(file, on_bytes) as stream:
        for where, value in stream.records(stream.value):
            if isinstance(value, dict) or on_bad is None:
                yield where, _record(value, where)
            else:
                on_bad(f"{where}: expected a JSON object {{...}}")


def _read_table(file: Path, delimiter: str, on_bytes: OnBytes | None) -> Iterator[Located]:
    csv.field_size_limit(sys.maxsize)  # a field can be a whole document
    rows = csv.DictReader((text for _, text in _lines(file, on_bytes)), delimiter=delimiter)
    line = 1 + bool(rows.fieldnames)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"{file}:{line}: not {len(rows.fieldnames)} fields, as the header has")
            yield f"{file}:{line}", row
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}:{line}: {error}") from error


def _read_text(file: Path, text_documents: str, on_bytes: OnBytes | None) -> Iterator[Located]:
    if text_documents == "file":
        text = "".join(text for _, text in _lines(file, on_bytes))
        if text.strip():
            yield f"{file}:1", {"text": text}
        return
    first, document = 0, []
    for line, text in _lines(file, on_bytes):
        text = text.rstrip("\r\n")
        if text.strip():
            first = first if document else line
            document.append(text)
        if document and (text_documents == "line" or not text.strip()):
            yield f"{file}:{first}", {"text": "\n".join(document)}
            document = []
    if document:
        yield f"{file}:{first}", {"text": "\n".join(document)}


def _read_parquet(file: Path, on_bytes: OnBytes | None) -> Iterator[Located]:
    import pyarrow as pa  # only for these files: a bare GPU machine does without
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file: {error}") from error
    with table:
        batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=_BATCH))
        yield from _numbered(file, batches, table.metadata.num_rows, on_bytes)


def _read_dataset(folder: Path, on_bytes: OnBytes | None) -> Iterator[Located]:
    if not parts_of(folder):  # datasets 5.2 cannot load a data set of no rows
        return
    import datasets

    rows = datasets.load_from_disk(str(folder))
    batches = (table.to_pylist() for table in rows.with_format("arrow").iter(batch_size=_BATCH))
    yield from _numbered(folder, batches, len(rows), on_bytes)


def _numbered(
    file: Path, batches: Iterable[list[dict[str, Any]]], num_rows: int, on_bytes: OnBytes | None
) -> Iterator[Located]:
    """Rows with their number from 1 as the line."""
    size, line = sum(part.stat().st_size for part in parts_of(file)), 0
    for batch in batches:
        for record in batch:
            line += 1
            yield f"{file}:{line}", record
        if on_bytes is not None:
            on_bytes(size * len(batch) // num_rows)
