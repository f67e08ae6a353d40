"""What a flag that names a file or folder promises, checked before anything is loaded."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llada.flags.declaration import said_of, shown

given: dict[str, str] = {}
"""Path -> flag of the last command line, by which an OSError is told."""


def check_paths(config: Any, *, overwrites: bool) -> None:
    """ValueError for an input that is not there, and for an output that cannot be, is an input, or is made.

    Args:
        overwrites: what an earlier command has made may be replaced.
    """
    inputs: list[tuple[str, str]] = []
    outputs: list[tuple[str, str]] = []
    for field in dataclasses.fields(config):
        said, value = said_of(type(config), field.name), getattr(config, field.name)
        for path in () if value is None else value if isinstance(value, list) else [value]:
            if "reads" in said:
                _refuse(field.name, path, READ[said["reads"]])
                inputs.append((field.name, path))
            elif "writes" in said:
                _refuse(field.name, path, WRITTEN[said["writes"]])
                outputs.append((field.name, path))
    for name, path in outputs:
        for other, read in inputs:
            if Path(path).resolve() == Path(read).resolve():
                raise ValueError(f"--{name} {path}: is what --{other} reads; give another place")
    kinds = {name: said_of(type(config), name)["writes"] for name, _ in outputs}
    resumes = any(Path(f"{path}.parts").exists() for _, path in outputs)
    for name, path in outputs:
        if not overwrites and not resumes and kinds[name] in MADE and MADE[kinds[name]](Path(path)):
            raise ValueError(f"--{name} {path}: exists; give another place, or --overwrite")
    given.clear()
    given.update({path: name for name, path in inputs + outputs})


def _refuse(name: str, path: str, check: Callable[[str], str | None]) -> None:
    try:
        problem = check(path) if path and "\0" not in path else "not a path"
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        problem = f"not a path ({getattr(error, 'strerror', None) or error})"
    if problem is not None:
        raise ValueError(f"--{name} {shown(path)}: {problem}")


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


def _of_size(path: str) -> str | None:
    named = Path(__file__).parents[2] / "configs/models" / f"{path}.yaml"
    return None if named.is_file() else _of_input(path)


def _of_data(path: str) -> str | None:
    """A file or folder, or what may be a data set's name on the hub, with @ before its configuration."""
    name = path.partition("@")[0]
    has_owner = name.count("/") == 1 and not Path(name).parent.exists()
    return None if has_owner and not Path(name).suffix and name[0] not in "./~" else _of_input(path)


def _of_state(path: str) -> str | None:
    return None if path in ("auto", "none") else _of_input(path)


def _holds_something(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _holds_a_model(path: Path) -> bool:
    return any(path.glob("config.json")) or any(path.glob("*.safetensors"))


READ: dict[str, Callable[[str], str | None]] = {
    "path": _of_input,
    "model": _of_model,
    "size": _of_size,
    "data": _of_data,
    "state": _of_state,
}
WRITTEN: dict[str, Callable[[str], str | None]] = {
    "file": _of_file,
    "store": _of_file,
    "folder": _of_folder,
    "new folder": _of_folder,
    "tokenizer": _of_folder,
}
MADE: dict[str, Callable[[Path], bool]] = {
    "file": Path.exists,
    "new folder": _holds_something,
    "tokenizer": _holds_a_model,
}
"""What has been made already and would be replaced; a "folder" looks after itself, a "store" grows."""
