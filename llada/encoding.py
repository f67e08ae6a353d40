"""Records to Arrow columns of tokens, one shard at a time: what `write_shards` spreads over processes."""

from collections import Counter

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llada.chat import Row, drops_system, encode_rows, encode_texts, refuse_mask_token, split_conversation
from llada.shards import Columns, Item

_BATCH = 256  # texts a tokenizer call: enough for its threads, little enough memory for long documents


def encode_documents(
    items: list[Item], *, tokenizer: PreTrainedTokenizerBase, max_length: int, rows: str = "joined"
) -> tuple[Columns, Counter]:
    """Corpus rows of one shard, and its counts of records, empty documents, rows and tokens.

    Args:
        rows: "joined" = all documents one after the other, cut every `max_length` tokens; "documents" = each
            in a row of its own, and a longer one in several.
    """
    pieces: list[np.ndarray] = []
    counts = Counter(records=len(items), empty=0)
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        texts = [_valid(text, where) for where, text in batch]
        for (where, _), ids in zip(batch, encode_texts(texts, tokenizer), strict=True):
            if not ids:
                counts["empty"] += 1
                continue
            refuse_mask_token(ids, tokenizer, where)
            pieces.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32))
    tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    sizes = [len(tokens)] if rows == "joined" else [len(piece) for piece in pieces]
    ends = np.cumsum(sizes, dtype=np.int64)
    cuts = [np.arange(end - size, end, max_length) for size, end in zip(sizes, ends, strict=True)]
    borders = np.append(np.concatenate(cuts) if cuts else [], len(tokens))
    counts.update(rows=len(borders) - 1, tokens=len(tokens))
    return {"input_ids": _lists(borders, tokens)}, counts


def encode_conversations(
    items: list[Item], *, tokenizer: PreTrainedTokenizerBase, max_length: int, turns: str, long: str
) -> tuple[Columns, Counter]:
    """Conversation rows of one shard, and its counts of records, rows, tokens, dropped, truncated, ..."""
    kept: list[Row] = []
    counts = Counter(records=len(items), dropped=0, truncated=0, system_left_out=0)
    with_system = sum(messages[0]["role"] == "system" for _, messages in items)
    if with_system and drops_system(tokenizer):
        counts["system_left_out"] = with_system
    for start in range(0, len(items), _BATCH):
        segments, wheres = [], []
        for where, messages in items[start : start + _BATCH]:
            for message in messages:
                _valid(message["content"], where)
            try:
                found = split_conversation(messages, tokenizer, turns=turns)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            segments += found
            wheres += [where] * len(found)
        for where, row in zip(wheres, encode_rows(segments, tokenizer), strict=True):
            refuse_mask_token(row["input_ids"], tokenizer, where)
            outcome, fitted = _fit(row, where, max_length, long)
            counts[outcome] += outcome != "kept"
            kept += [fitted] if fitted else []
    borders = np.cumsum([0, *(len(row["input_ids"]) for row in kept)])
    input_ids = np.array([i for row in kept for i in row["input_ids"]], dtype=np.int32)
    in_answer = np.array([a for row in kept for a in row["in_answer"]], dtype=bool)
    counts.update(rows=len(kept), tokens=len(input_ids), answer_tokens=int(in_answer.sum()))
    return {"input_ids": _lists(borders, input_ids), "in_answer": _lists(borders, in_answer)}, counts


def _fit(row: Row, where: str, max_length: int, long: str) -> tuple[str, Row | None]:
    """("kept" | "truncated" | "dropped", the row as the policy leaves it)."""
    length = len(row["input_ids"])
    if length <= max_length:
        return "kept", row
    if long == "error":
        prompt = row["in_answer"].index(True)
        raise ValueError(
            f"{where}: {length} tokens ({prompt} before the first answer) do not fit in --max_length "
            f"{max_length}; raise it, or use --long drop or --long truncate"
        )
    cut = {name: values[:max_length] for name, values in row.items()}
    if long == "truncate" and any(cut["in_answer"]):
        return "truncated", cut
    return "dropped", None


def _lists(borders: np.ndarray, values: np.ndarray) -> pa.Array:
    """Arrow lists values[borders[i] : borders[i + 1]]."""
    return pa.ListArray.from_arrays(pa.array(borders, pa.int32()), pa.array(values))


def _valid(text: str, where: str) -> str:
    """`text`, if it can be written as UTF-8: JSON can spell half a character (\\ud800)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text[error.start]!r} is half a character (surrogate)") from error
    return text


def unigram_entropy(rows: Dataset) -> float:
    """-sum_v f_v log f_v in nats per token, f_v the share of token v in `input_ids`."""
    counts = np.zeros(0, dtype=np.int64)
    for chunk in rows.data.column("input_ids").chunks:
        found = np.bincount(chunk.flatten().to_numpy())
        counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
        counts[: len(found)] += found
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
