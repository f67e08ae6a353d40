"""Tokenised rows on disk: shards of HF `datasets` Arrow rows, made one by one; a stopped run continues.

    output_dir/manifest.json             what was asked for (the fingerprint), and statistics once finished
    output_dir/shard-00000/              a `datasets.save_to_disk` folder of the rows of `shard_size` records
    output_dir/shard-00000/statistics.json

A shard appears under its name only when it is complete.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llada.data.files import files_of
from llada.resumable import read_object, refuse_changes, write_atomically

Item = tuple[str, Any]
"""("file:line", what the encoder takes)."""
Columns = dict[str, pa.Array]
Encoder = Callable[[list[Item]], tuple[Columns, Counter]]
"""Records -> their columns and counts."""
Join = Callable[[list[Columns]], Columns]

MANIFEST = "manifest.json"
_encode_here: Encoder  # of a worker


def is_prepared(folder: str | Path) -> bool:
    """Whether `folder` holds rows made by `write_shards`, finished or not."""
    return Path(folder, MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """{"fingerprint", "finished", "shards", "statistics"} of finished rows; ValueError if there are none."""
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise ValueError(f"{folder}: no prepared rows there ({MANIFEST} is missing)")
    manifest = read_object(path, "fingerprint", "finished")
    if not manifest["finished"]:
        raise ValueError(f"{folder}: preparation was interrupted; run the same command again to finish it")
    return manifest


def load_rows(folder: str | Path) -> Dataset:
    """All prepared rows of `folder`, memory-mapped. ValueError if there are none or they are unfinished."""
    return _load(Path(folder), read_manifest(folder)["shards"])


def row_lengths(rows: Dataset) -> np.ndarray:
    """[num_records] tokens of each row, without reading the tokens into Python."""
    tables = rows.with_format("arrow").iter(batch_size=10_000)
    lengths = [pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]
    return np.concatenate(lengths) if lengths else np.empty(0, dtype=np.int64)


def describe_inputs(paths: Iterable[str | Path], folder: str | Path) -> list[dict[str, Any]]:
    """Name, bytes and a hash of each input file, and when it was last changed.

    A file that has not been changed since `folder` was prepared from it is not read again.
    """
    path = Path(folder, MANIFEST)
    before = read_object(path, "fingerprint")["fingerprint"].get("inputs", []) if path.is_file() else []
    known = {(old["file"], old["bytes"], *old.get("changed", [])): old.get("hash") for old in before}
    described = []
    for file in (file for path in paths for file in files_of(path)):
        found = file.stat()
        changed = [found.st_mtime_ns, found.st_ctime_ns]  # ctime: a copy can be given the old mtime
        digest = known.get((file.name, found.st_size, *changed))
        if digest is None:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        described.append({"file": file.name, "bytes": found.st_size, "hash": digest, "changed": changed})
    return described


def _without_times(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint whose inputs are told by their content alone."""
    if "inputs" not in fingerprint:
        return fingerprint
    inputs = [
        {name: value for name, value in file.items() if name != "changed"} for file in fingerprint["inputs"]
    ]
    return {**fingerprint, "inputs": inputs}


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, *, with_template: bool) -> str:
    """A hash of everything that decides token ids, and of the chat template where it is used."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("padding", "truncation"):  # left behind by earlier calls; no say in the ids
        state.pop(name, None)
    template = tokenizer.chat_template if with_template else None
    parts = [state, template, tokenizer.bos_token, tokenizer.eos_token, tokenizer.mask_token]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_shards(
    items: Iterable[Item],
    encode: Encoder,
    output_dir: str | Path,
    *,
    fingerprint: dict[str, Any],
    shard_size: int,
    join: Join | None = None,
    chunk_size: int | None = None,
    num_proc: int = 1,
    overwrite: bool = False,
    if_changed: bool = False,
    on_shard: Callable[[Counter], None] = lambda _: None,
    summarise: Callable[[Dataset], dict[str, float]] = lambda _: {},
    read_counts: Mapping[str, int] = MappingProxyType({}),
) -> Dataset:
    """The rows of all items, written shard by shard; shards that a stopped run left are kept.

    Args:
        items: the records in order; a rerun must yield the same ones.
        join: makes the rows of a shard from those of its chunks; default: one after the other.
        chunk_size: records a chunk; default a whole shard.
        fingerprint: all that decides the rows. A folder with another one is refused.
        shard_size: records a shard.
        num_proc: processes that encode; 1 encodes here.
        overwrite: start again, removing the folder's shards.
        if_changed: start again if the folder has another fingerprint, instead of refusing it.
        on_shard: told the counts so far after each shard.
        summarise: statistics of the finished rows to add to the manifest.
        read_counts: what `items` counts while it is read, to add to those of the shards.

    ValueError: the folder has another fingerprint or foreign files, or no row is left at the end.
    """
    folder = Path(output_dir)
    if _open(folder, fingerprint, overwrite=overwrite, if_changed=if_changed):
        return load_rows(folder)
    total: Counter = Counter()
    num_shards = 0
    work = (encode, join or join_columns, folder, shard_size, chunk_size or shard_size, num_proc)
    for counts in _write_all(items, *work):
        num_shards += 1
        total.update(counts)
        on_shard(total)
    total.update(read_counts)
    if not total["rows"]:
        raise ValueError(f"{folder}: no row is left to write; counts: {dict(total)}")
    rows = _load(folder, num_shards)
    statistics = {**total, **summarise(rows)}
    manifest = {"fingerprint": fingerprint, "finished": True, "shards": num_shards, "statistics": statistics}
    _write_json(folder / MANIFEST, manifest)
    return rows


def _open(folder: Path, fingerprint: dict[str, Any], *, overwrite: bool, if_changed: bool) -> bool:
    """Makes the folder ready for shards; True if all of them are there already."""
    path = folder / MANIFEST
    if path.is_file() and overwrite:
        path.unlink()
        for shard in folder.glob("shard-*"):
            shutil.rmtree(shard)
    if path.is_file():
        manifest = read_object(path, "fingerprint", "finished")
        old, new = _without_times(manifest["fingerprint"]), _without_times(fingerprint)
        if old != new and if_changed:
            return _open(folder, fingerprint, overwrite=True, if_changed=False)
        refuse_changes(old, new, f"{folder} was prepared differently", "Use another folder, or --overwrite")
        _write_json(path, {**manifest, "fingerprint": fingerprint})  # the same files, seen at other times
        return manifest["finished"]
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no prepared rows; choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(path, {"fingerprint": fingerprint, "finished": False})
    return False


def _write_all(
    items: Iterable[Item],
    encode: Encoder,
    join: Join,
    folder: Path,
    shard_size: int,
    chunk_size: int,
    num_proc: int,
) -> Iterator[Counter]:
    """The counts of each shard in order, old or new."""

    def finish(index: int, done: Counter | None, results: list[Callable[[], Any]]) -> Counter:
        return done or _write_shard(join, folder, index, results)

    stream = iter(items)
    batches = enumerate(iter(lambda: list(islice(stream, shard_size)), []))
    with _workers(encode, num_proc) as submit:
        waiting: deque = deque()  # (shard, its counts or the results that make them up)
        for index, batch in batches:
            done = _counts(folder, index)
            chunks = [] if done else [batch[i : i + chunk_size] for i in range(0, len(batch), chunk_size)]
            waiting.append((index, done, [submit(chunk) for chunk in chunks]))
            # no more records in memory than keep the workers busy
            while len(waiting) > 1 and sum(len(results) for _, _, results in waiting) > 2 * num_proc:
                yield finish(*waiting.popleft())
        while waiting:
            yield finish(*waiting.popleft())


@contextmanager
def _workers(encode: Encoder, num_proc: int) -> Iterator[Callable[[list[Item]], Callable[[], Any]]]:
    """A function that gives work to `num_proc` processes, or does it here, and a function for its result."""
    if num_proc == 1:
        yield lambda chunk: partial(encode, chunk)
        return
    # A fork has what this process imported; a spawned worker would import it again, for longer than it works.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_proc, context, initializer=_start_worker, initargs=(encode,)) as pool:
        try:
            yield lambda chunk: pool.submit(_encode_in_worker, chunk).result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(encode: Encoder) -> None:
    global _encode_here
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker
    _encode_here = encode
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed: it would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(chunk: list[Item]) -> tuple[Columns, Counter]:
    return _encode_here(chunk)


def _write_shard(join: Join, folder: Path, index: int, results: list[Callable[[], Any]]) -> Counter:
    parts, counts = [], Counter()
    for result in results:
        columns, found = result()
        counts.update(found)
        parts += [columns] if columns else []
    columns = join(parts) if parts else {}
    counts["rows"] = max(map(len, columns.values()), default=0)
    shard = _shard(folder, index)
    unfinished = shard.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    shows_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # there is a bar over all shards; one inside each is noise
    try:
        if counts["rows"]:  # datasets 5.2 cannot load a data set of no rows
            Dataset.from_dict(columns).save_to_disk(str(unfinished))
    finally:
        if shows_bars:
            datasets.enable_progress_bars()
    _write_json(unfinished / "statistics.json", counts)
    os.replace(unfinished, shard)  # at once: a shard under its name is complete
    return counts


def join_columns(parts: list[Columns]) -> Columns:
    """The rows of all parts, one after the other."""
    return {name: pa.concat_arrays([part[name] for part in parts]) for name in parts[0]}


def _counts(folder: Path, index: int) -> Counter | None:
    """The counts of a finished shard, None if it is not there."""
    path = _shard(folder, index) / "statistics.json"
    return Counter(read_object(path, "rows")) if path.is_file() else None


def _load(folder: Path, num_shards: int) -> Dataset:
    shards = [_shard(folder, index) for index in range(num_shards) if _counts(folder, index)["rows"]]
    return datasets.concatenate_datasets([datasets.load_from_disk(str(shard)) for shard in shards])


def _shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}"


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")
