"""What a flag that names a file or folder promises, checked before anything is loaded."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llada.flags.declaration import said_of, shown

given: dict[str, str] = {}
"""Path -> flag of the last command line, by which an OSError is told."""


def check_paths(config: Any) -> None:
    """ValueError for an input that is not there, an output that cannot be, or one that is an input."""
    inputs, outputs = [], []
    for field in dataclasses.fields(config):
        said, value = said_of(type(config), field.name), getattr(config, field.name)
        kind = said.get("reads", said.get("writes"))
        if kind is None or value is None:
            continue
        for path in value if isinstance(value, list) else [value]:
            try:
                problem = _PROBLEM[kind](path) if path else "an empty path"
            except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
                problem = f"not a path ({getattr(error, 'strerror', error)})"
            if problem is not None:
                raise ValueError(f"--{field.name} {shown(path)}: {problem}")
            (inputs if "reads" in said else outputs).append((field.name, path))
    for name, path in outputs:
        for other, read in inputs:
            if Path(path).resolve() == Path(read).resolve():
                raise ValueError(f"--{name} {path}: is what --{other} reads; give another place")
    given.clear()
    given.update({path: name for name, path in inputs + outputs})


def _of_input(path: str) -> str | None:
    return None if Path(path).exists() else "no such file or folder"


def _of_model(path: str) -> str | None:
    """A folder, or what may be a name on the hub: two words of which the first is no folder here."""
    folder = Path(path)
    if folder.exists() or folder.name in ("best_model.pt", "best_sft_model.pt"):
        return None
    if path.count("/") == 1 and path[0] not in "./~" and not folder.parent.exists():
        return None
    return "no checkpoint there"


def _of_file(path: str) -> str | None:
    if Path(path).is_dir():
        return "is a folder; give the name of a file"
    return _of_folder(str(Path(path).parent))


def _of_folder(path: str) -> str | None:
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is a file, so no folder can be there"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written to"


def _of_new_folder(path: str) -> str | None:
    if Path(path).is_dir() and any(Path(path).iterdir()):
        return "exists and is not empty; give a new folder"
    return _of_folder(path)


_PROBLEM: dict[str, Callable[[str], str | None]] = {
    "path": _of_input,
    "model": _of_model,
    "file": _of_file,
    "folder": _of_folder,
    "new folder": _of_new_folder,
}
