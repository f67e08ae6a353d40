"""Rows of tokens on disk, made once: preparing scripts write them, training stages load or make them."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import datasets
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llada.data.files import files_of
from llada.data.flags import SHARD_SIZE, PrepareFlags
from llada.data.rows import CHUNK_SIZE, EVERYTHING, Rows
from llada.data.shards import (
    describe_inputs,
    describe_tokenizer,
    is_prepared,
    load_rows,
    read_manifest,
    write_shards,
)
from llada.run import Run, first_rank_first


def write_splits(flags: PrepareFlags, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the splits, and prints what they hold."""
    for split, hash_range in flags.splits().items():
        folder = f"{flags.output_dir}/{split}"
        prepare(
            flags.input, rows, tokenizer, folder,
            hash_range=hash_range, shard_size=flags.shard_size, num_proc=flags.num_proc,
            overwrite=flags.overwrite,
        )  # fmt: skip
        print(f"{folder}: {rows.describe(read_manifest(folder)['statistics'])}")


def prepare(
    paths: Sequence[str | Path],
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    hash_range: tuple[float, float] = EVERYTHING,
    shard_size: int = SHARD_SIZE,
    num_proc: int = 1,
    overwrite: bool = False,
    if_changed: bool = False,
) -> Dataset:
    """The rows of these files, prepared in `output_dir`; what is there already is not made again.

    Only records whose hash in [0, 1) lies in `hash_range`; the other settings: see `write_shards`.
    """
    settings = {
        "kind": rows.kind,
        "tokenizer": describe_tokenizer(tokenizer, with_template=rows.with_template),
        **rows.settings(),
        "hash_range": list(hash_range),
        "shard_size": shard_size,
    }
    for name, value in {**settings, "num_proc": num_proc}.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    size = sum(file.stat().st_size for path in paths for file in files_of(path))
    read_counts: Counter = Counter()
    # delay: what is already there opens in less than a second and needs no bar
    with tqdm(total=size, unit="B", unit_scale=True, desc=Path(output_dir).name, delay=1) as bar:
        return write_shards(
            rows.items(paths, read_counts, hash_range=hash_range, on_bytes=bar.update),
            partial(rows.encode, tokenizer=tokenizer),
            output_dir,
            fingerprint={**settings, "inputs": describe_inputs(paths, output_dir)},
            shard_size=shard_size,
            join=rows.join,
            chunk_size=CHUNK_SIZE,
            num_proc=num_proc,
            overwrite=overwrite,
            if_changed=if_changed,
            on_shard=lambda counts: bar.set_postfix(
                records=counts["records"], tokens=counts["tokens"], refresh=False
            ),
            summarise=rows.summarise,
            read_counts=read_counts,
        )


def load(
    paths: Sequence[str],
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepared: str | Path,
    run: Run,
    run_folder: str | Path | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Dataset:
    """The rows of several data sets: prepared ones as they are, or raw records, which rank 0 prepares.

    Args:
        prepared: folder for what has to be prepared; of several data sets, number i goes to `prepared/i`.
        run_folder: of a training: as long as it holds no state, its rows are made anew for corrected records.
        weights: share of each data set, see `interleave`; None takes every row of each once.

    ValueError: prepared rows come from another tokenizer or are longer than `max_length`.
    """
    states = ("latest", "final", "best")
    has_state = run_folder is None or any(Path(run_folder, name).exists() for name in states)
    parts = []
    for i, path in enumerate(paths):
        if is_usable(path, rows, tokenizer):
            parts.append(load_rows(path))
            continue
        with first_rank_first(run):
            folder = Path(prepared, str(i)) if rows.kind == "conversations" else prepared
            parts.append(prepare([path], rows, tokenizer, folder, if_changed=not has_state))
        if run.is_main:  # what was dropped is told at every start
            print(f"{path}: {rows.describe(read_manifest(folder)['statistics'])}", flush=True)
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


def is_usable(path: str | Path, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> bool:
    """True for prepared rows that fit this run, False for raw files; ValueError for rows that do not fit."""
    if not is_prepared(path):
        if is_prepared(Path(path, "train")):
            raise ValueError(f"{path} holds prepared splits; name one, for example {Path(path, 'train')}")
        return False
    found = read_manifest(path)["fingerprint"]
    if found["kind"] != rows.kind:
        raise ValueError(f"{path} holds rows of kind {found['kind']!r}, this stage needs {rows.kind!r}")
    if found["max_length"] > rows.max_length:
        raise ValueError(
            f"{path} has rows of {found['max_length']} tokens, --max_length is {rows.max_length}"
        )
    own = describe_tokenizer(tokenizer, with_template=rows.with_template)
    if found["tokenizer"] != own:
        raise ValueError(
            f"{path} was prepared with tokenizer {found['tokenizer']}, this model's is {own}: prepare it "
            "again with --tokenizer set to this model"
        )
    return True
