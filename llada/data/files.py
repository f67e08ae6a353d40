"""Which files a path stands for, how they are opened, and what of a folder is left out."""

import bz2
import gzip
import io
import lzma
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

KINDS = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".tsv", ".parquet")
OnBytes = Callable[[int], None]

# Words that name a split, as the first or last word of a file's name or the name of a folder.
_SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_NOT_DATA = re.compile(
    r"(readme|licen[cs]e|notice|copying|citation|changelog|authors|contributing|requirements|dataset_infos?)\b",
    re.IGNORECASE,
)
_NAMED = 5  # files left out that a message names


def _open_zst(raw: BinaryIO) -> BinaryIO:
    import pyarrow as pa  # only here: the other kinds do without

    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))


_OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


def kind_of(file: Path) -> str | None:
    """The ending that says how a file is read, below that of a compression; None: it cannot be read."""
    endings = [ending.lower() for ending in file.suffixes]
    if endings and endings[-1] in _OPENERS:
        # Parquet is read from its end, which a compressed stream does not have at hand
        return endings[-2] if len(endings) > 1 and endings[-2] in KINDS[:-1] else None
    return endings[-1] if endings and endings[-1] in KINDS else None


@contextmanager
def open_data(file: Path, on_bytes: OnBytes | None = None) -> Iterator[tuple[BinaryIO, Callable[..., None]]]:
    """(the bytes of a file, unpacked; a function that tells `on_bytes` how much of the file they took).

    The function takes the share of what was read that has been used, where that is not all. ValueError: a
    compressed file is damaged.
    """
    told = 0

    def tell(share: float = 1.0) -> None:
        nonlocal told
        # of the packed file: the size that a progress bar counts to
        place = max(told, round(share * raw.tell()))
        if on_bytes is not None and place > told:
            on_bytes(place - told)
        told = place

    opener = _OPENERS.get(file.suffix.lower())
    with file.open("rb") as raw:
        try:
            yield (raw if opener is None else opener(raw)), tell
        except (EOFError, gzip.zlib.error, lzma.LZMAError, OSError) as error:
            if opener is None:
                raise
            raise ValueError(f"{file}: damaged {file.suffix} file: {error}") from error


def input_files(path: str | Path, split: str = "train") -> list[Path]:
    """The data files, or dataset folders, of a path, sorted. ValueError if there are none.

    Of a folder it is those of the split: all that do not name another one, or, if it is not `train`, those
    that name it. What is no data (licences, readmes, hidden files) is left out, see `left_out`.
    """
    path = Path(path)
    if path.is_file():
        if kind_of(path) is None:
            raise ValueError(f"{path}: cannot read {path.suffix or 'this kind of'} files; use {_accepted()}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    if (path / "state.json").is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        if (path / split).is_dir():
            return [path / split]
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise ValueError(f"{path}: has no split {split!r}; name one of {splits} by its folder, {path}/SPLIT")
    files = [file for file in _files_below(path) if _is_data(file, path)]
    wanted = {split, None} if split == "train" else {split}
    found = [file for file in files if _split_of(file, path) in wanted]
    if found:
        return found
    if files:
        others = sorted({_split_of(file, path) or "none" for file in files})
        raise ValueError(f"{path}: no files of the split {split!r}, only of {', '.join(others)}; name a file")
    raise ValueError(f"{path}: no data files in this folder; expected {_accepted()}")


def left_out(path: str | Path, split: str = "train") -> dict[str, int]:
    """{"files left out: their names": how many} of a folder; empty where all are read."""
    path = Path(path)
    if not path.is_dir() or (path / "state.json").is_file():
        return {}
    read = {part for file in input_files(path, split) for part in (file, *parts_of(file))}
    names = [str(file.relative_to(path)) for file in _files_below(path) if not read & {file, *file.parents}]
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return {f"files left out: {', '.join(names[:_NAMED] + more)}": len(names)} if names else {}


def files_of(path: str | Path) -> list[Path]:
    """The files on disk that `read_records(path)` reads, a dataset folder taken apart."""
    return [part for file in input_files(path) for part in parts_of(file)]


def parts_of(file: Path) -> list[Path]:
    """A file, or the Arrow files of a dataset folder."""
    return sorted(file.glob("*.arrow")) if file.is_dir() else [file]


def _files_below(folder: Path) -> list[Path]:
    return sorted(Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)


def _is_data(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return kind_of(file) is not None and not is_hidden and not _NOT_DATA.match(file.name)


def _split_of(file: Path, folder: Path) -> str | None:
    """The split that a file's name or a folder above it names: test-00000-of-00001.parquet, dev/a.json."""
    *folders, name = file.relative_to(folder).parts
    words = [word for word in re.split(r"[-_. ]+", name.split(".")[0].lower()) if not word.isdigit()]
    # "test-00000-of-00001": without its numbers "of" would be the last word
    words = words[:-1] if words[1:] and words[-1] == "of" else words
    found = [*(part.lower() for part in folders), *words[:1], *words[-1:]]
    return next((_SPLITS[word] for word in found if word in _SPLITS), None)


def _accepted() -> str:
    return f"{', '.join(KINDS)} (also {', '.join(_OPENERS)}) or a folder written by datasets.save_to_disk"
