"""Rows of tokens: documents for pretraining, conversations for SFT.

Each kind reads records, encodes them a chunk at a time, and says which of its settings decide the result:

    CorpusRows        input_ids: documents, each closed by EOS, joined and cut every `max_length` tokens
    ConversationRows  input_ids; in_answer: the tokens that are learned (answers, end-of-turn tokens, one EOS)
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llada.data.chat import (
    LONG,
    SPELLED,
    SYSTEM_LOST,
    TURNS,
    encode_rows,
    fit,
    notes_of,
    refuse_mask_token,
    split_conversation,
)
from llada.data.fields import Reader
from llada.data.files import OnBytes
from llada.data.messages import Message
from llada.data.reading import Record, describe_losses, note_bad, read
from llada.data.shards import Columns, Item, join_columns
from llada.data.template import HELD, encode_texts, hold_text, style_of

EVERYTHING = (0.0, 1.0)
CHUNK_SIZE = 256  # texts a tokenizer call: enough for its threads, little enough memory for long documents
_DESCRIBED = {
    "records", "rows", "tokens", "empty", "unigram_entropy",
    "answer_tokens", "dropped", "truncated", "system_left_out",
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """What the two kinds have in common."""

    max_length: int  # tokens
    reader: Reader = Reader()
    parse_special: bool = False
    kind: ClassVar[str]
    with_template: ClassVar[bool]

    def settings(self) -> dict[str, Any]:
        """What decides the rows, beside tokenizer and records."""
        named = {name: value for name, value in asdict(self.reader).items() if value}
        return {**named, **({"parse_special_tokens": True} if self.parse_special else {})}

    def items(
        self,
        paths: Sequence[str | Path],
        counts: Counter,
        *,
        hash_range: tuple[float, float] = EVERYTHING,
        on_bytes: OnBytes | None = None,
    ) -> Iterator[Item]:
        """("file:line", what is encoded) of the records whose hash lies in the range."""
        documents = getattr(self, "text_documents", "blank_line")
        for path in paths:
            found = read(path, self.reader, self.convert, counts, text_documents=documents, on_bytes=on_bytes)
            yield from ((where, item) for where, _, item in found if _in_range(self.key(item), hash_range))

    def usable(
        self, items: list[Item], make: Callable[[Any], Any], counts: Counter
    ) -> Iterator[tuple[str, Any]]:
        """("file:line", what is made of an item), without what cannot be used if the reader drops it."""
        for where, item in items:
            try:
                yield where, make(item)
            except ValueError as error:
                message = f"{where}: {error}"
                if not self.reader.drops_bad:
                    raise ValueError(message) from error
                note_bad(counts, message)

    def losses(self, counts: dict[str, Any]) -> str:
        """Lines about what did not come through."""
        other = {name: n for name, n in counts.items() if name not in _DESCRIBED}
        return describe_losses(other, counts["records"], lost=counts.get("dropped", 0))


@dataclass(frozen=True)
class CorpusRows(Rows):
    """Rows of documents; of joined rows only the last of a shard is shorter than `max_length`."""

    rows: str = "joined"  # one document after the other; "documents": each in rows of its own
    text_documents: str = "blank_line"  # what a document is in a .txt file, see `read_records`
    kind: ClassVar[str] = "corpus"
    with_template: ClassVar[bool] = False

    convert = staticmethod(Record.document)

    def settings(self) -> dict[str, Any]:
        cut = {"rows": self.rows} if self.rows != "joined" else {}
        own = {"max_length": self.max_length, "text_documents": self.text_documents, **cut}
        return own | super().settings()

    def key(self, text: str) -> str:
        """What decides the side of a split: the text alone, so a document and its copies stay together."""
        return text

    def encode(self, items: list[Item], *, tokenizer: PreTrainedTokenizerBase) -> tuple[Columns, Counter]:
        """The tokens of each document, and counts of records, empty documents and tokens."""
        counts = Counter(records=len(items))
        make = (lambda text: text) if self.parse_special else (lambda text: hold_text(text, tokenizer))
        found = list(self.usable(items, make, counts))
        documents: list[list[int]] = []
        for (where, _), ids in zip(found, encode_texts([text for _, text in found], tokenizer), strict=True):
            refuse_mask_token(ids, tokenizer, where)
            documents += [[*ids, tokenizer.eos_token_id]] if ids else []
        counts["empty"] = len(found) - len(documents)
        counts["tokens"] = sum(map(len, documents))
        if spelled := sum(HELD in text for _, text in found):
            counts[SPELLED] = spelled
        return {"input_ids": _lists(documents, np.int32)}, counts

    def join(self, parts: list[Columns]) -> Columns:
        """The rows of one shard from its documents."""
        documents = join_columns(parts)["input_ids"]
        tokens = documents.flatten()
        # one piece to cut, or a piece a document
        ends = [0, len(tokens)] if self.rows == "joined" else documents.offsets.to_numpy()
        cuts = [np.arange(start, end, self.max_length) for start, end in pairwise(ends)]
        borders = np.append(np.concatenate(cuts) if cuts else [], len(tokens))
        return {"input_ids": pa.ListArray.from_arrays(pa.array(borders, pa.int32()), tokens)}

    def summarise(self, rows: Dataset) -> dict[str, float]:
        """`unigram_entropy`: -sum_v f_v log f_v in nats per token, f_v the share of token v."""
        counts = np.zeros(0, dtype=np.int64)
        for chunk in rows.data.column("input_ids").chunks:
            found = np.bincount(chunk.flatten().to_numpy())
            counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
            counts[: len(found)] += found
        shares = counts[counts > 0] / counts.sum()
        return {"unigram_entropy": float(-(shares * np.log(shares)).sum())}

    def describe(self, counts: dict[str, Any]) -> str:
        """What the rows hold, in words."""
        return (
            f"{counts['records']} documents ({counts['empty']} empty), {counts['tokens']} tokens "
            f"in {counts['rows']} rows, unigram entropy {counts['unigram_entropy']:.3f} nats/token"
            f"{self.losses(counts)}"
        )


@dataclass(frozen=True)
class ConversationRows(Rows):
    """Rows of conversations; `turns` as of `split_conversation`, `long` as of `fit`."""

    turns: str = "all"
    long: str = "error"
    kind: ClassVar[str] = "conversations"
    with_template: ClassVar[bool] = True

    convert = staticmethod(Record.messages)

    def __post_init__(self) -> None:
        for name, known in (("turns", TURNS), ("long", LONG)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)!r}: use one of {', '.join(known)}")

    def settings(self) -> dict[str, Any]:
        own = {"max_length": self.max_length, "turns": self.turns, "long": self.long}
        return own | super().settings()

    def key(self, messages: list[Message]) -> str:
        """What decides the side of a split: the question, so that it never stands on both sides."""
        first = [message["role"] for message in messages].index("assistant")
        return repr([message["content"] for message in messages[:first]])

    def encode(self, items: list[Item], *, tokenizer: PreTrainedTokenizerBase) -> tuple[Columns, Counter]:
        """The rows of these conversations, and counts of records, tokens, dropped, truncated, ..."""
        counts = Counter(records=len(items), dropped=0, truncated=0, system_left_out=0)

        def split(messages: list[Message]) -> list[list[tuple[str, bool]]]:
            return split_conversation(messages, tokenizer, turns=self.turns, parse_special=self.parse_special)

        with_system = sum(messages[0]["role"] == "system" for _, messages in items)
        if with_system and style_of(tokenizer).drops_system:
            counts["system_left_out"] = with_system
        found = list(self.usable(items, split, counts))
        for _, messages in items:
            notes = notes_of(messages, tokenizer, parse_special=self.parse_special)
            counts.update(note for note in notes if note != SYSTEM_LOST)  # `system_left_out`, of old
        segments = [(where, row) for where, rows in found for row in rows]
        kept = []
        encoded = encode_rows([row for _, row in segments], tokenizer)
        for (where, _), row in zip(segments, encoded, strict=True):
            refuse_mask_token(row["input_ids"], tokenizer, where)
            outcome, fitted = fit(row, where, self.max_length, self.long)
            counts[outcome] += outcome != "kept"
            kept += [fitted] if fitted else []
        columns = {
            "input_ids": _lists([row["input_ids"] for row in kept], np.int32),
            "in_answer": _lists([row["in_answer"] for row in kept], bool),
        }
        counts["tokens"] = sum(len(row["input_ids"]) for row in kept)
        counts["answer_tokens"] = sum(sum(row["in_answer"]) for row in kept)
        return columns, counts

    def join(self, parts: list[Columns]) -> Columns:
        """The rows of one shard."""
        return join_columns(parts)

    def summarise(self, _: Dataset) -> dict[str, float]:
        """Nothing beside the counts."""
        return {}

    def describe(self, counts: dict[str, Any]) -> str:
        """What the rows hold, in words."""
        lost = (
            f"\n  the chat template leaves out system messages: {counts['system_left_out']} conversations "
            "lost theirs"
        )
        return (
            f"{counts['records']} conversations in {counts['rows']} rows ({counts['dropped']} rows "
            f"dropped, {counts['truncated']} truncated), {counts['tokens']} tokens, "
            f"{counts['answer_tokens']} of them in answers{lost if counts['system_left_out'] else ''}"
            f"{self.losses(counts)}"
        )


def _lists(values: Sequence[Sequence], dtype: type) -> pa.Array:
    """Arrow lists of these values."""
    borders = np.cumsum([0, *map(len, values)])
    flat = np.fromiter(chain.from_iterable(values), dtype=dtype, count=borders[-1])
    return pa.ListArray.from_arrays(pa.array(borders, pa.int32()), pa.array(flat))


def _in_range(text: str, hash_range: tuple[float, float]) -> bool:
    """Whether the text's hash, a number in [0, 1), lies in the half-open range."""
    if hash_range == EVERYTHING:
        return True
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=b"held out").digest()
    return hash_range[0] <= int.from_bytes(digest, "big") / 2**64 < hash_range[1]
