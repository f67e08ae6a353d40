"""Rows of tokens: documents for pretraining, conversations for SFT.

Each kind reads records, encodes them a shard at a time, and says which of its settings decide the result:

    CorpusRows        input_ids: documents, each closed by EOS, joined and cut every `max_length` tokens
    ConversationRows  input_ids; in_answer: the tokens that are learned (answers, end-of-turn tokens, one EOS)
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llada.data.chat import (
    LONG,
    TURNS,
    drops_system,
    encode_rows,
    encode_texts,
    fit,
    refuse_mask_token,
    split_conversation,
)
from llada.data.messages import to_messages
from llada.data.records import OnBytes, read_records
from llada.data.shards import Columns, Item, join_columns

ROWS = ("joined", "documents")
EVERYTHING = (0.0, 1.0)
CHUNK_SIZE = 256  # texts a tokenizer call: enough for its threads, little enough memory for long documents


@dataclass(frozen=True)
class CorpusRows:
    """Rows of `{"text"}` documents.

    Attributes:
        max_length: tokens a row; of joined rows only the last of a shard is shorter.
        rows: "joined" = all documents one after the other; "documents" = each in a row of its own, and a
            longer one in several.
        text_documents: what a document is in a .txt file, see `read_records`.
    """

    max_length: int
    rows: str = "joined"
    text_documents: str = "blank_line"
    kind: ClassVar[str] = "corpus"
    with_template: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """What decides the rows, beside tokenizer and records."""
        cut = {"rows": self.rows} if self.rows != "joined" else {}
        return {"max_length": self.max_length, "text_documents": self.text_documents, **cut}

    def items(
        self,
        paths: Sequence[str | Path],
        *,
        hash_range: tuple[float, float] = EVERYTHING,
        on_bytes: OnBytes | None = None,
    ) -> Iterator[Item]:
        """("file:line", text) of the documents whose hash lies in the range.

        The hash depends on the text alone, so a document and its copies are on the same side of a split.
        """
        for path in paths:
            for where, record in read_records(path, text_documents=self.text_documents, on_bytes=on_bytes):
                text = record.get("text")
                if not isinstance(text, str):
                    raise ValueError(
                        f"{where}: a document needs a string field 'text', fields are {sorted(record)}"
                        + ("; conversations go through prepare_sft.py" if "text" not in record else "")
                    )
                if _in_range(text, hash_range):
                    yield where, text

    def encode(self, items: list[Item], *, tokenizer: PreTrainedTokenizerBase) -> tuple[Columns, Counter]:
        """The tokens of each document, and counts of records, empty documents and tokens."""
        documents: list[list[int]] = []
        texts = [_valid(text, where) for where, text in items]
        for (where, _), ids in zip(items, encode_texts(texts, tokenizer), strict=True):
            refuse_mask_token(ids, tokenizer, where)
            documents += [[*ids, tokenizer.eos_token_id]] if ids else []
        columns = {"input_ids": _lists(documents, np.int32)}
        tokens = sum(map(len, documents))
        return columns, Counter(records=len(items), empty=len(items) - len(documents), tokens=tokens)

    def join(self, parts: list[Columns]) -> Columns:
        """The rows of one shard from its documents."""
        documents = join_columns(parts)["input_ids"]
        tokens = documents.flatten()
        ends = [0, len(tokens)] if self.rows == "joined" else documents.offsets.to_numpy()
        cuts = [np.arange(start, end, self.max_length) for start, end in pairwise(ends)]
        borders = np.append(np.concatenate(cuts) if cuts else [], len(tokens))
        return {"input_ids": pa.ListArray.from_arrays(pa.array(borders, pa.int32()), tokens)}

    def summarise(self, rows: Dataset) -> dict[str, float]:
        """`unigram_entropy`: -sum_v f_v log f_v in nats per token, f_v the share of token v.

        What a model reaches that knows the frequencies of the tokens and nothing else.
        """
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
        )


@dataclass(frozen=True)
class ConversationRows:
    """Rows of conversations, from records that `to_messages` accepts.

    Attributes:
        max_length: longest row in tokens.
        turns: "all", "last" or "split": see `split_conversation`.
        long: what to do with a longer row: see `fit`.
    """

    max_length: int
    turns: str = "all"
    long: str = "error"
    kind: ClassVar[str] = "conversations"
    with_template: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, known in (("turns", TURNS), ("long", LONG)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)!r}: use one of {', '.join(known)}")

    def settings(self) -> dict[str, Any]:
        """What decides the rows, beside tokenizer and records."""
        return {"max_length": self.max_length, "turns": self.turns, "long": self.long}

    def items(
        self,
        paths: Sequence[str | Path],
        *,
        hash_range: tuple[float, float] = EVERYTHING,
        on_bytes: OnBytes | None = None,
    ) -> Iterator[Item]:
        """("file:line", messages) of the conversations whose hash lies in the range.

        The hash is that of the messages before the first answer: one question is on one side of a split.
        """
        for path in paths:
            for where, record in read_records(path, on_bytes=on_bytes):
                messages = to_messages(record, where)
                first = [message["role"] for message in messages].index("assistant")
                if _in_range(repr([message["content"] for message in messages[:first]]), hash_range):
                    yield where, messages

    def encode(self, items: list[Item], *, tokenizer: PreTrainedTokenizerBase) -> tuple[Columns, Counter]:
        """The rows of these conversations, and counts of records, tokens, dropped, truncated, ..."""
        kept, segments, wheres = [], [], []
        counts = Counter(records=len(items), dropped=0, truncated=0, system_left_out=0)
        with_system = sum(messages[0]["role"] == "system" for _, messages in items)
        if with_system and drops_system(tokenizer):
            counts["system_left_out"] = with_system
        for where, messages in items:
            for message in messages:
                _valid(message["content"], where)
            try:
                found = split_conversation(messages, tokenizer, turns=self.turns)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            segments += found
            wheres += [where] * len(found)
        for where, row in zip(wheres, encode_rows(segments, tokenizer), strict=True):
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
        )


Rows = CorpusRows | ConversationRows


def _lists(values: Sequence[Sequence], dtype: type) -> pa.Array:
    """Arrow lists of these values."""
    borders = np.cumsum([0, *map(len, values)])
    flat = np.fromiter(chain.from_iterable(values), dtype=dtype, count=borders[-1])
    return pa.ListArray.from_arrays(pa.array(borders, pa.int32()), pa.array(flat))


def _valid(text: str, where: str) -> str:
    """`text`, if it can be written as UTF-8: JSON can spell half a character (\\ud800)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text[error.start]!r} is half a character (surrogate)") from error
    return text


def _in_range(text: str, hash_range: tuple[float, float]) -> bool:
    """Whether the text's hash, a number in [0, 1), lies in the half-open range."""
    if hash_range == EVERYTHING:
        return True
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=b"held out").digest()
    return hash_range[0] <= int.from_bytes(digest, "big") / 2**64 < hash_range[1]
