"""What a long job keeps on disk so that a killed run continues: its settings, and its finished items.

    folder/settings.json    what the results depend on; a run with other settings is refused
    folder/rank-N.jsonl     {"key", "result", ...} for each finished item, written by rank N

Generation, evaluation, preferences and reference values keep their items so. Prepared rows, too large for
JSON, are kept as Arrow shards (llada/data/shards.py) under the same check of settings.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class ResumableJob:
    """Finished items of a job, by key; those of all ranks are read, however many wrote them."""

    def __init__(
        self, folder: str | Path | None, settings: Mapping[str, Any], *, rank: int = 0, world_size: int = 1
    ) -> None:
        """Opens the job, or begins it; ValueError if the folder holds items of other settings.

        Args:
            folder: None keeps everything in memory.
            settings: all that decides a result besides the item; JSON values.
        """
        self.folder = None if folder is None else Path(folder)
        self._rank, self._world_size = rank, world_size
        self._results: dict[str, Any] = {}
        self._file = None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.read()
        self._claim(json.loads(json.dumps(settings, default=str)))
        # a line cut by a kill must not swallow the next one
        own = self.folder / f"rank-{rank}.jsonl"
        ends_mid_line = own.exists() and own.stat().st_size > 0 and own.read_bytes()[-1:] != b"\n"
        self._file = open(own, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the job
        if ends_mid_line:
            self._file.write("\n")

    def _claim(self, settings: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        if self._results and path.is_file():  # a run that finished nothing binds nobody
            refuse_changes(
                read_object(path), settings,
                f"{self.folder} holds finished items of other settings",
                "Give the same ones to continue, or delete the folder to start again",
            )  # fmt: skip
        else:
            write_atomically(path, json.dumps(settings, indent=1) + "\n")

    def read(self) -> None:
        """Takes in what is in the folder by now, from all ranks."""
        num_broken = 0
        for file in sorted(self.folder.glob("rank-*.jsonl")) if self.folder else ():
            for line in filter(None, file.read_bytes().splitlines()):
                try:
                    entry = json.loads(line)
                    self._results[entry["key"]] = entry["result"]
                except (ValueError, KeyError, TypeError):  # a kill can cut a line
                    num_broken += 1
        if num_broken:
            log.warning("%s: %d broken lines of a killed run are computed again", self.folder, num_broken)

    @staticmethod
    def key(*item: Any) -> str:
        """The name of an item: a hash of what it asks."""
        return hashlib.sha256(json.dumps(item, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def share(self, keys: Sequence[str]) -> list[int]:
        """Places of the items that are left for this rank; no item is in two ranks' shares."""
        return [n for n in range(self._rank, len(keys), self._world_size) if keys[n] not in self._results]

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Any:
        """The result of a finished item."""
        return self._results[key]

    def put(self, key: str, result: Any, **details: Any) -> None:
        """Notes a finished item; `details` are for the reader of the file."""
        self._results[key] = result
        if self._file is not None:
            line = json.dumps({"key": key, "result": result, **details}, ensure_ascii=False)
            self._file.write(line + "\n")
            self._file.flush()

    def learn(self, results: Mapping[str, Any]) -> None:
        """Takes over results that another rank has noted."""
        self._results.update(results)


def refuse_changes(made: Mapping[str, Any], wanted: Mapping[str, Any], what: str, remedy: str) -> None:
    """ValueError naming each setting in which what is on disk differs from what is wanted."""
    changed = [
        f"{name} was {made.get(name)!r:.200}, is {wanted.get(name)!r:.200}"
        for name in sorted(made.keys() | wanted.keys())
        if made.get(name) != wanted.get(name)
    ]
    if changed:
        raise ValueError(f"{what}: {'; '.join(changed)}. {remedy}")


def read_object(path: Path, *names: str) -> dict[str, Any]:
    """The JSON object that this suite wrote, with these names in it; ValueError naming a damaged file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found | {name: found[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); delete its folder to start again") from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder of the same name, which takes the place of `folder` when the body ends without error."""
    outer, old = (folder.with_name(folder.name + ending) for ending in (".tmp", ".old"))
    shutil.rmtree(outer, ignore_errors=True)
    partial = outer / folder.name
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    outer.rmdir()
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, text: str | bytes) -> None:
    """Replaces the file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # ranks may write the same file
    with open(partial, "wb") as file:
        file.write(text.encode() if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())  # else the new name can outlive a power cut and the text not
    os.replace(partial, path)
