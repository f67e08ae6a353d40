"""The terminal view of an answer while it is decided, and text that is safe to print."""

import shutil
import sys
import time
import unicodedata
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

STYLES = {"plain": "", "dim": "\x1b[2m", "red": "\x1b[31m", "yellow": "\x1b[33m", "green": "\x1b[32m"}
SECONDS_PER_FRAME = 0.03  # a terminal over ssh cannot follow every step of a small model


def clean(text: str) -> str:
    """The text without control characters: an answer must not be able to steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def spell(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text of each token; of a character split over several tokens, the last one gets it."""
    pieces, pending = [], []
    for token_id in token_ids:
        pending.append(token_id)
        text = tokenizer.decode(pending)
        is_cut = text.endswith("\ufffd") and len(pending) < 4  # UTF-8 takes at most four bytes
        pieces.append("" if is_cut else clean(text))
        if not is_cut:
            pending = []
    return pieces


def wrap(cells: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Lines of at most `width` columns from (text, style) cells, with the escape codes of the styles."""
    lines, line, column = [], "", 0
    for text, style in cells:
        line += STYLES[style]
        for character in text.replace("\t", "    "):
            size = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if character == "\n" or column + size > width:
                reset = "\x1b[0m" if STYLES[style] else ""
                lines.append(line + reset)
                line, column = STYLES[style], 0
            if character != "\n":
                line, column = line + character, column + size
        line += "\x1b[0m" if STYLES[style] else ""
    return [*lines, line]


class DenoisingView:
    """The canvas of an answer while it is decided; call it with every entry of `generate`'s trace."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, gen_length: int, end_ids: set[int], *, is_live: bool
    ) -> None:
        self.tokenizer, self.end_ids, self.is_live = tokenizer, end_ids, is_live
        self.canvas: list[int | None] = [None] * gen_length
        self.fresh: dict[int, float] = {}  # position -> confidence, since the last frame
        self.num_lines = self.num_steps = 0
        self.drawn_at = 0.0
        encoding = sys.stdout.encoding or "ascii"
        is_unicode = encoding.lower().startswith("utf")
        self.mask, self.end, self.newline = ("·", "∎", "⏎") if is_unicode else (".", "#", " ")

    def __call__(self, entry: dict[str, Any]) -> None:
        """Takes in one step and shows it."""
        # a log has no frames: each line shows what is new in its own step
        if not self.is_live:
            self.fresh = {}
        for position in entry["remasked"]:
            self.canvas[position] = None
        for position, token_id, confidence in zip(
            entry["positions"], entry["token_ids"], entry["confidences"], strict=True
        ):
            self.canvas[position], self.fresh[position] = token_id, confidence
        self.num_steps += 1
        if not self.is_live:
            line = "".join(text for text, _ in self.cells()).replace("\n", self.newline)
            print(f"{self.num_steps:4d} {line}", flush=True)
        elif time.monotonic() - self.drawn_at > SECONDS_PER_FRAME:
            self._draw()

    def cells(self) -> list[tuple[str, str]]:
        """(text, style) of every position of the canvas."""
        cells: list[tuple[str, str]] = []
        start = 0
        # the None behind the last position closes the last run
        for i, token_id in enumerate([*self.canvas, None]):
            if token_id is not None and token_id not in self.end_ids:
                continue
            run = self.canvas[start:i]  # neighbours are spelled together: a character may span them
            pieces = spell(self.tokenizer, run)
            cells += [(piece, self._style(start + k)) for k, piece in enumerate(pieces)]
            if i < len(self.canvas):
                cells.append((self.mask, "dim") if token_id is None else (self.end, "dim"))
            start = i + 1
        return cells

    def _style(self, position: int) -> str:
        confidence = self.fresh.get(position)
        if confidence is None:
            return "plain"
        return "red" if confidence < 0.3 else "yellow" if confidence < 0.7 else "green"

    def _draw(self) -> None:
        size = shutil.get_terminal_size()
        # what has scrolled off the screen cannot be drawn over, so no more than a screen is drawn
        lines = wrap(self.cells(), size.columns - 1)[: size.lines - 1]
        sys.stdout.write(self._up() + "\n".join(lines))
        sys.stdout.flush()
        self.num_lines, self.fresh, self.drawn_at = len(lines), {}, time.monotonic()

    def _up(self) -> str:
        """Goes to the start of what was drawn, and clears it."""
        up = f"\x1b[{self.num_lines - 1}A" if self.num_lines > 1 else ""
        return up + "\r\x1b[J" if self.num_lines else ""

    def close(self) -> None:
        """Takes the view away, so that the answer can stand in its place."""
        sys.stdout.write(self._up())
        sys.stdout.flush()
        self.num_lines = 0
