"""What a flag that names a file or folder promises, checked before anything is loaded."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llada.flags.declaration import said_of, shown

given: dict[str, str] = {}
"""Path -> flag of the last command line, by which an OSError is told."""
finished: list[str] = []
"""The outputs of the last command line, if it has run to its end before, on the same inputs."""
_notes: dict[str, dict[str, str]] = {}
"""Output -> what is noted of it when the command has run to its end."""


def check_paths(config: Any, *, overwrites: bool) -> None:
    """ValueError for an input that is not there, and for an output that cannot be, is an input, or is there.

    The command that made an output may make it again, and one that finds finished parts of it goes on.

    Args:
        overwrites: what another command has made may be replaced.
    """
    inputs: list[tuple[str, str]] = []
    outputs: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(config):
        said, value = said_of(type(config), field.name), getattr(config, field.name)
        for path in () if value is None else value if isinstance(value, list) else [value]:
            if "reads" in said:
                _refuse(field.name, path, READ[said["reads"]])
                inputs.append((field.name, path))
            elif "writes" in said:
                _refuse(field.name, path, WRITTEN[said["writes"]])
                outputs.append((field.name, path, said["writes"]))
    for name, path, _ in outputs:
        for other, read in inputs:
            if Path(path).resolve() == Path(read).resolve():
                raise ValueError(f"--{name} {path}: is what --{other} reads; give another place")
    resumes = any(Path(f"{path}.parts").exists() for _, path, _ in outputs)
    note = _command_of(config)
    for name, path, kind in outputs:
        if resumes or kind not in MADE or not MADE[kind](Path(path)):
            continue
        if not overwrites and not _is_noted(path, note):
            raise ValueError(f"--{name} {path}: exists; give another place, or --overwrite")
        if kind == "new folder" and any(file.is_dir() for file in Path(path).iterdir()):
            raise ValueError(f"--{name} {path}: folders in it would be lost; give another place")
    given.clear()
    given.update({path: name for name, path, *_ in inputs + outputs})
    _notes.clear()
    noted = [path for _, path, kind in outputs if kind not in ("run", "store")]
    if noted:
        note["inputs"] = _hash([_state_of(Path(path)) for _, path in inputs])
        _notes.update(dict.fromkeys(noted, note))
    finished.clear()
    finished.extend(noted if not overwrites and all(_is_noted(path, note) for path in noted) else [])


def note_outputs(*, is_finished: bool) -> None:
    """Notes beside each output, in .NAME.made, which command made it and, if it is finished, from what."""
    for path, note in _notes.items():
        if Path(path).exists():
            kept = note if is_finished else {name: note[name] for name in note if name != "inputs"}
            text = json.dumps(kept | {"output": _hash(_state_of(Path(path)))}, indent=1)
            _note_file(Path(path)).write_text(text + "\n", encoding="utf-8")


def _command_of(config: Any) -> dict[str, str]:
    program = Path(sys.modules[type(config).__module__].__file__).name
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name != "overwrite"}
    return {"program": program, "flags": _hash(flags)}  # a hash: a flag may hold a key


def _is_noted(path: str, note: Mapping[str, str]) -> bool:
    """Whether all this was noted of an output, and the output is still as it was then."""
    try:
        found = json.loads(_note_file(Path(path)).read_text(encoding="utf-8"))
        return {**found, **note, "output": _hash(_state_of(Path(path)))} == found
    except (OSError, ValueError, TypeError):  # no note, or none of ours
        return False


def _note_file(path: Path) -> Path:
    return path.absolute().with_name(f".{path.absolute().name}.made")


def _state_of(path: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of each file."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), file.stat()) for file in files if file.exists()]
    return [(name, found.st_size, found.st_mtime_ns) for name, found in stats]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _refuse(name: str, path: str, check: Callable[[str], str | None]) -> None:
    try:
        problem = check(path) if path and "\0" not in path else "not a path"
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        problem = f"not a path ({getattr(error, 'strerror', None) or error})"
    if problem is not None:
        whole = path if path.isprintable() and 0 < len(path) < 1000 else shown(path)
        raise ValueError(f"--{name} {whole}: {problem}")


def _of_input(path: str) -> str | None:
    return None if Path(path).exists() else "no such file or folder"


def _of_model(path: str) -> str | None:
    """A folder, or what may be a name on the hub: two words of which the first is no folder here."""
    folder = Path(path)
    if folder.exists() or folder.name in ("best_model.pt", "best_sft_model.pt"):
        return None
    if path.count("/") == 1 and path[0] not in "./~" and not folder.parent.exists():
        return None
    hub = "" if "/" in path else "; on the hub a name is owner/model, as HuggingFaceTB/SmolLM2-135M"
    return f"no checkpoint there{hub}"


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
    "run": _of_folder,
}
MADE: dict[str, Callable[[Path], bool]] = {
    "file": Path.exists,
    "new folder": _holds_something,
}
"""What has been made already and would be replaced; a "run" or "folder" checks itself, a "store" grows."""
