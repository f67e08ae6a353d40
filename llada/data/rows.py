"""From records to rows of tokens: corpora, conversations, prompts, mixtures. What is public is here.

Rows are HF `datasets` in Arrow files (see `llada.data.shards`):
    corpus         input_ids: documents, each closed by EOS, joined and cut every `max_length` tokens
    conversations  input_ids; in_answer: the tokens that are learned (answers, end-of-turn tokens, one EOS)
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llada.data.chat import (
    Row,
    drops_system,
    encode_conversation,
    encode_rows,
    encode_texts,
    refuse_mask_token,
    render_prompt,
    split_conversation,
)
from llada.data.messages import Message, to_messages, to_prompt
from llada.data.records import OnBytes, files_of, read_records
from llada.data.shards import (
    Columns,
    Encoder,
    Item,
    describe_inputs,
    describe_tokenizer,
    is_prepared,
    load_rows,
    read_manifest,
    write_shards,
)
from llada.run import Run, first_rank_first

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


__all__ = [
    "encode_conversation",
    "interleave",
    "is_prepared",
    "load_conversations",
    "load_corpus",
    "load_rows",
    "read_manifest",
    "read_records",
    "render_prompt",
    "to_messages",
    "to_prompt",
    "tokenize_conversations",
    "tokenize_corpus",
]

ROWS = ("joined", "documents")
LONG = ("error", "drop", "truncate")
SHARD_SIZE = 10_000
EVERYTHING = (0.0, 1.0)


def tokenize_corpus(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    max_length: int,
    rows: str = "joined",
    text_documents: str = "blank_line",
    hash_range: tuple[float, float] = EVERYTHING,
    shard_size: int = SHARD_SIZE,
    num_proc: int = 1,
    overwrite: bool = False,
) -> Dataset:
    """Rows of `{"text"}` documents, prepared in `output_dir`; what is there already is not made again.

    Args:
        paths: files and folders, as in `read_records`; also `text_documents`.
        max_length: tokens a row; of joined rows only the last of a shard is shorter.
        rows: see `encode_documents`.
        hash_range: keep the documents whose hash in [0, 1) lies in this range. It depends on the text alone,
            so a document and its copies are on the same side of a split.
        shard_size, num_proc, overwrite: see `write_shards`.

    The manifest's statistics hold the counts and `unigram_entropy` in nats per token: what a model reaches
    that knows the frequencies of the tokens and nothing else.
    """
    return _tokenize(
        partial(_documents, paths, text_documents, hash_range),
        partial(encode_documents, tokenizer=tokenizer, max_length=max_length, rows=rows),
        paths,
        output_dir,
        settings={
            "kind": "corpus",
            "tokenizer": describe_tokenizer(tokenizer, with_template=False),
            "max_length": max_length,
            "text_documents": text_documents,
            "hash_range": list(hash_range),
            **({"rows": rows} if rows != "joined" else {}),
        },
        shard_size=shard_size,
        num_proc=num_proc,
        overwrite=overwrite,
        summarise=lambda rows: {"unigram_entropy": unigram_entropy(rows)},
    )


def tokenize_conversations(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    max_length: int,
    turns: str = "all",
    long: str = "error",
    hash_range: tuple[float, float] = EVERYTHING,
    shard_size: int = SHARD_SIZE,
    num_proc: int = 1,
    overwrite: bool = False,
) -> Dataset:
    """Rows of conversations, prepared in `output_dir`; what is there already is not made again.

    Args:
        paths: files and folders of records that `to_messages` accepts.
        max_length: longest row in tokens.
        turns: "all", "last" or "split": see `encode_conversation`.
        long: what to do with a longer row. "error" stops, "drop" leaves it out, "truncate" cuts its end and
            leaves it out if no token of an answer remains. Both are counted in the manifest.
        hash_range: as in `tokenize_corpus`; the hash is that of the messages before the first answer, so
            one question never stands on both sides of a split.
        shard_size, num_proc, overwrite: see `write_shards`.
    """
    if long not in LONG:
        raise ValueError(f"--long {long!r}: use one of {', '.join(LONG)}")
    return _tokenize(
        partial(_conversations, paths, hash_range),
        partial(encode_conversations, tokenizer=tokenizer, max_length=max_length, turns=turns, long=long),
        paths,
        output_dir,
        settings={
            "kind": "conversations",
            "tokenizer": describe_tokenizer(tokenizer, with_template=True),
            "max_length": max_length,
            "turns": turns,
            "long": long,
            "hash_range": list(hash_range),
        },
        shard_size=shard_size,
        num_proc=num_proc,
        overwrite=overwrite,
        summarise=lambda _: {},
    )


def load_corpus(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepared: str | Path,
    max_length: int,
    run: Run,
    rows: str = "joined",
) -> Dataset:
    """Corpus rows of `path`: made by prepare_corpus.py, or raw text, which rank 0 prepares in `prepared`.

    Args:
        rows: how to cut raw text, see `encode_documents`; prepared rows stay as they are.

    Raises: ValueError when prepared rows come from another tokenizer or are longer than `max_length`.
    """
    if _is_usable(path, tokenizer, kind="corpus", max_length=max_length):
        return load_rows(path)
    with first_rank_first(run):
        return tokenize_corpus([path], tokenizer, prepared, max_length=max_length, rows=rows)


def load_conversations(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepared: str | Path,
    max_length: int,
    run: Run,
    turns: str = "all",
    long: str = "error",
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Dataset:
    """Conversation rows of several data sets: made by prepare_sft.py, or raw records, prepared by rank 0.

    Args:
        prepared: folder for what has to be prepared; data set i goes to `prepared/i`.
        weights: share of each data set, see `interleave`; None takes every row of each once.
        turns, long: for raw records; prepared rows keep theirs.
    """
    parts = []
    for i, path in enumerate(paths):
        if _is_usable(path, tokenizer, kind="conversations", max_length=max_length):
            parts.append(load_rows(path))
            continue
        with first_rank_first(run):
            folder = Path(prepared, str(i))
            parts.append(
                tokenize_conversations(
                    [path], tokenizer, folder, max_length=max_length, turns=turns, long=long
                )
            )
    return interleave(parts, weights, seed) if weights else datasets.concatenate_datasets(parts)


def interleave(parts: Sequence[Dataset], weights: Sequence[float], seed: int) -> Dataset:
    """One data set in which part i makes up weights[i] / sum(weights) of the rows.

    Rows are drawn until each part has been seen in full, so small parts with large weights are repeated.
    """
    if len(weights) != len(parts):
        raise ValueError(f"--data_weights has {len(weights)} numbers for {len(parts)} data sets")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"--data_weights {list(weights)}: every weight must be a positive number")
    if len(parts) == 1:
        return parts[0]
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(
        list(parts), probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
    )


def _is_usable(path: str, tokenizer: PreTrainedTokenizerBase, *, kind: str, max_length: int) -> bool:
    """True for prepared rows that fit this run, False for raw files; ValueError for rows that do not fit."""
    if not is_prepared(path):
        if is_prepared(Path(path, "train")):
            raise ValueError(f"{path} holds prepared splits; name one, for example {Path(path, 'train')}")
        return False
    found = read_manifest(path)["fingerprint"]
    if found["kind"] != kind:
        raise ValueError(f"{path} holds rows of kind {found['kind']!r}, this stage needs {kind!r}")
    if found["max_length"] > max_length:
        raise ValueError(f"{path} has rows of {found['max_length']} tokens, --max_length is {max_length}")
    own = describe_tokenizer(tokenizer, with_template=kind == "conversations")
    if found["tokenizer"] != own:
        raise ValueError(
            f"{path} was prepared with tokenizer {found['tokenizer']}, this model's is {own}: prepare it "
            "again with --tokenizer set to this model"
        )
    return True


def _in_range(text: str, hash_range: tuple[float, float]) -> bool:
    """Whether the text's hash, a number in [0, 1), lies in the half-open range."""
    if hash_range == EVERYTHING:
        return True
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=b"held out").digest()
    return hash_range[0] <= int.from_bytes(digest, "big") / 2**64 < hash_range[1]


def _documents(
    paths: Sequence[str | Path], text_documents: str, hash_range: tuple[float, float], on_bytes: OnBytes
) -> Iterator[Item]:
    for path in paths:
        for where, record in read_records(path, text_documents=text_documents, on_bytes=on_bytes):
            text = record.get("text")
            if not isinstance(text, str):
                raise ValueError(
                    f"{where}: a document needs a string field 'text', fields are {sorted(record)}"
                    + ("; conversations go through prepare_sft.py" if "text" not in record else "")
                )
            if _in_range(text, hash_range):
                yield where, text


def _conversations(
    paths: Sequence[str | Path], hash_range: tuple[float, float], on_bytes: OnBytes
) -> Iterator[Item]:
    for path in paths:
        for where, record in read_records(path, on_bytes=on_bytes):
            messages = to_messages(record, where)
            if _in_range(repr(_opening(messages)), hash_range):
                yield where, messages


def _opening(messages: list[Message]) -> list[str]:
    roles = [message["role"] for message in messages]
    return [message["content"] for message in messages[: roles.index("assistant")]]


def _tokenize(
    read: Callable[[OnBytes], Iterator[Item]],
    encode: Encoder,
    paths: Sequence[str | Path],
    output_dir: str | Path,
    *,
    settings: dict[str, Any],
    shard_size: int,
    num_proc: int,
    overwrite: bool,
    summarise: Callable[[Dataset], dict[str, float]],
) -> Dataset:
    """`write_shards` with a fingerprint of settings and inputs, and a progress bar over the bytes read."""
    for name, value in {**settings, "shard_size": shard_size, "num_proc": num_proc}.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    size = sum(file.stat().st_size for path in paths for file in files_of(path))
    # delay: what is already there opens in less than a second and needs no bar
    with tqdm(total=size, unit="B", unit_scale=True, desc=Path(output_dir).name, delay=1) as bar:
        return write_shards(
            read(bar.update),
            encode,
            output_dir,
            fingerprint={**settings, "shard_size": shard_size, "inputs": describe_inputs(paths)},
            shard_size=shard_size,
            num_proc=num_proc,
            overwrite=overwrite,
            on_shard=lambda counts: bar.set_postfix(
                records=counts["records"], tokens=counts["tokens"], refresh=False
            ),
            summarise=summarise,
        )
