"""JSON read piece by piece: of a file of any size one value, or one element of a long array, is in memory."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_CHUNK = 1 << 20  # characters read at once; a longer value is read until it is whole
_BOM = "\ufeff"  # written by some editors in front of UTF-8
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
        self._grow(max(_CHUNK, len(_BOM.encode())))
        self._text = self._text.removeprefix(_BOM)

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
