"""From records to rows of tokens: corpora, conversations, prompts, mixtures. What is public is here.

Rows are HF `datasets` in Arrow files (see `llada.shards`):
    corpus         input_ids: documents, each closed by EOS, joined and cut every `max_length` tokens
    conversations  input_ids; in_answer: the tokens that are learned (answers, end-of-turn tokens, one EOS)
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llada.chat import encode_conversation, render_prompt
from llada.encoding import encode_conversations, encode_documents, unigram_entropy
from llada.messages import Message, to_messages, to_prompt
from llada.records import OnBytes, files_of, read_records
from llada.run import Run, first_rank_first
from llada.shards import (
    Encoder,
    Item,
    describe_inputs,
    describe_tokenizer,
    is_prepared,
    load_rows,
    read_manifest,
    write_shards,
)

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
