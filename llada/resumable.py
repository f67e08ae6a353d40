"""Finished requests of a long job, on disk as they finish, so that a killed run can continue."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class RequestLog:
    """Finished requests in a folder of JSONL files, one file per rank, so that a killed run can continue.

    Every line is {"key", "result", ...}; all files are read whatever the number of ranks that wrote them.
    """

    def __init__(self, folder: str | None, settings: dict[str, Any], rank: int) -> None:
        self._settings = json.dumps(settings, sort_keys=True)
        self.folder = folder
        self._results: dict[str, Any] = {}
        self._file = None
        if folder is None:
            return
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        num_broken = 0
        for file in sorted(path.glob("requests_*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    self._results[entry["key"]] = entry["result"]
                except (ValueError, KeyError, TypeError):
                    num_broken += 1
        if num_broken:
            log.warning("%s: %d broken lines of a killed run are computed again", folder, num_broken)
        own = path / f"requests_rank{rank}.jsonl"
        ends_mid_line = own.exists() and own.stat().st_size > 0 and own.read_bytes()[-1:] != b"\n"
        self._file = open(own, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the evaluation
        if ends_mid_line:
            self._file.write("\n")

    def key(self, kind: str, arguments: Any) -> str:
        """The name of a request under these settings."""
        text = json.dumps([self._settings, kind, arguments], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, key: str) -> Any | None:
        """Its result, or None while it is not finished."""
        return self._results.get(key)

    def learn(self, results: dict[str, Any]) -> None:
        """Takes over results that another rank has noted."""
        self._results.update(results)

    def put(self, key: str, result: Any, **details: Any) -> None:
        """Notes a finished request; `details` are for the reader of the file."""
        self._results[key] = result
        if self._file is not None:
            line = json.dumps({"key": key, "result": result, **details}, ensure_ascii=False)
            self._file.write(line + "\n")
            self._file.flush()
