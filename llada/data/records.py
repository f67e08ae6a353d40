"""Read records from files, each with where it stands: JSONL, JSON, text, Parquet, HF dataset folders.

Everything is streamed: memory does not grow with the file. Every error names file and line.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

_CHUNK = 1 << 20  # characters read at once; a longer value is read until it is whole
_BOM = b"\xef\xbb\xbf"  # written by some editors in front of UTF-8
# How far from the end of what was read an error can be that more text would mend: \uD83D, -Infinity, ...
_NEAR_END = 16

Convert = Callable[[Any, str], Any]
"""(element, "file:line") -> what to keep of it."""


class JsonStream:
    """A cursor over a UTF-8 JSON file. Every error names file and line.

    Attributes:
        line: the line of the cursor, from 1.
    """

    def __init__(self, file: Path, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        self._file, self._on_bytes = file, on_bytes
        self._raw = file.open("rb")
        self._pending = b""  # the first bytes of a character whose last ones are not read yet
        self._offset = 0  # of `_pending` in the file
        self._text, self._place, self._is_at_end = "", 0, False
        self._column = 0  # characters of the cursor's line that are gone from `_text`
        self.line = 1
        self._decoder = json.JSONDecoder()
        self._grow(max(_CHUNK, len(_BOM)))
        self._text = self._text.removeprefix(_BOM.decode())

    def __enter__(self) -> "JsonStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

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
                yield self.where, read()
            if rest := self.peek():
                raise ValueError(f"{self.where}: malformed JSON: {rest!r} after the end of the array")
            return
        while self.peek():
            yield self.where, read()

    def _grow(self, num_characters: int) -> None:
        """Reads on, and lets go of what has been used."""
        raw = self._raw.read(num_characters)
        self._on_bytes(len(raw))
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
        self._text, self._place = self._text[self._place :] + text, 0

    def _malformed(self, message: str, place: int) -> ValueError:
        line = self.line + self._text.count("\n", self._place, place)
        line_start = self._text.rfind("\n", 0, place) + 1
        column = place - line_start + 1 + (0 if line_start else self._column)
        if place >= len(self._text) and self._is_at_end:
            message += ", but the file ends there,"
        return ValueError(f"{self._file}:{line}: malformed JSON: {message} at column {column}")


Record = dict[str, Any]
Located = tuple[str, Record]
OnBytes = Callable[[int], None]

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
TEXT_DOCUMENTS = ("blank_line", "line", "file")
_BATCH = 1000  # Parquet and Arrow rows turned into Python at a time


def read_records(
    path: str | Path, *, text_documents: str = "blank_line", on_bytes: OnBytes | None = None
) -> Iterator[Located]:
    """("file:line", record) of one file, of every data file below a folder (sorted), or of a dataset folder.

    Args:
        path: .jsonl (one object a line), .json (an array, or objects one after the other), .txt, .parquet, a
            folder written by `datasets.save_to_disk`, or a folder of such files. Of a DatasetDict the split
            `train` is read; name another one by its own folder, `path/test`.
        text_documents: what a document is in a .txt file: text between blank lines, one line, or the file.
        on_bytes: told how many bytes of the file have been used since the last call, for a progress bar.

    Raises:
        ValueError: no such file, unknown kind of file, empty file, malformed JSON, bytes that are not UTF-8.
    """
    if text_documents not in TEXT_DOCUMENTS:
        raise ValueError(f"--text_documents {text_documents!r}: use one of {', '.join(TEXT_DOCUMENTS)}")
    report = on_bytes or (lambda _: None)
    for file in input_files(path):
        is_empty = True
        for located in _read_one(file, text_documents, report):
            is_empty = False
            yield located
        if is_empty:
            raise ValueError(f"{file}: holds no records; is it a failed download or export?")


def input_files(path: str | Path) -> list[Path]:
    """The data files (or dataset folders) that `path` stands for, sorted. ValueError if there are none."""
    path = Path(path)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: cannot read {path.suffix or 'this kind of'} files; use {_kinds()}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    if (path / "state.json").is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        if (path / "train").is_dir():
            return [path / "train"]
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise ValueError(f"{path}: has no split 'train'; name one of {splits} by its folder, {path}/SPLIT")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"{path}: no data files in this folder; expected {_kinds()}")
    return files


def files_of(path: str | Path) -> list[Path]:
    """The files on disk that `read_records(path)` reads, a dataset folder taken apart."""
    return [part for file in input_files(path) for part in _parts(file)]


def _kinds() -> str:
    return ", ".join(SUFFIXES) + " or a folder written by datasets.save_to_disk"


def _parts(file: Path) -> list[Path]:
    return sorted(file.glob("*.arrow")) if file.is_dir() else [file]


def _read_one(file: Path, text_documents: str, report: OnBytes) -> Iterator[Located]:
    if file.is_dir():
        return _read_dataset(file, report)
    if file.suffix == ".jsonl":
        return _read_jsonl(file, report)
    if file.suffix == ".json":
        return _read_json(file, report)
    if file.suffix == ".parquet":
        return _read_parquet(file, report)
    return _read_text(file, text_documents, report)


def _decode(raw: bytes, file: Path, line: int, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw[: error.start].count(b"\n")
        raise ValueError(
            f"{file}:{line}: byte 0x{raw[error.start]:02x} at offset {offset + error.start} of the file is "
            "not UTF-8; convert the file, for example with iconv"
        ) from error


def _lines(file: Path, report: OnBytes) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file."""
    offset = 0
    with file.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            text = raw.removeprefix(_BOM) if line == 1 else raw
            yield line, _decode(text, file, line, offset + len(raw) - len(text)).rstrip("\r\n")
            offset += len(raw)
            report(len(raw))


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object {{...}}, got {json.dumps(value)[:60]}")
    return value


def _read_jsonl(file: Path, report: OnBytes) -> Iterator[Located]:
    for line, text in _lines(file, report):
        if not text.strip():
            continue
        where = f"{file}:{line}"
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: malformed JSON: {error.msg} at column {error.colno}; a .jsonl file holds one JSON "
                "object a line"
            ) from error
        yield where, _record(value, where)


def _read_json(file: Path, report: OnBytes) -> Iterator[Located]:
    with JsonStream(file, report) as stream:
        for where, value in stream.records(stream.value):
            yield where, _record(value, where)


def _read_text(file: Path, text_documents: str, report: OnBytes) -> Iterator[Located]:
    if text_documents == "file":
        raw = file.read_bytes().removeprefix(_BOM)
        text = _decode(raw, file, 1, 0)
        report(len(raw))
        if text.strip():
            yield f"{file}:1", {"text": text}
        return
    if text_documents == "line":
        for line, text in _lines(file, report):
            if text.strip():
                yield f"{file}:{line}", {"text": text}
        return
    first, document = 0, []
    for line, text in _lines(file, report):
        if text.strip():
            first = first if document else line
            document.append(text)
        elif document:
            yield f"{file}:{first}", {"text": "\n".join(document)}
            document = []
    if document:
        yield f"{file}:{first}", {"text": "\n".join(document)}


def _read_parquet(file: Path, report: OnBytes) -> Iterator[Located]:
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file: {error}") from error
    with table:
        batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=_BATCH))
        yield from _numbered(file, batches, table.metadata.num_rows, report)


def _read_dataset(folder: Path, report: OnBytes) -> Iterator[Located]:
    if not _parts(folder):  # datasets 5.2 cannot load a data set of no rows
        return
    rows = datasets.load_from_disk(str(folder))
    batches = (table.to_pylist() for table in rows.with_format("arrow").iter(batch_size=_BATCH))
    yield from _numbered(folder, batches, len(rows), report)


def _numbered(
    file: Path, batches: Iterable[list[Record]], num_rows: int, report: OnBytes
) -> Iterator[Located]:
    """Rows with their number from 1 as the line."""
    size, line = sum(part.stat().st_size for part in _parts(file)), 0
    for batch in batches:
        for record in batch:
            line += 1
            yield f"{file}:{line}", record
        report(size * len(batch) // num_rows)
