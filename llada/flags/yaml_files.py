"""YAML files of flags."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Also reads `4e-4` as a number, as YAML 1.2 and everybody who writes one expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. ValueError names the file if it is missing, malformed, or not a mapping."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected 'key: value' lines, got {type(values).__name__}")
    return values


def write_yaml(config: Any, path: str | Path) -> None:
    """Writes the config so that `--config path` reproduces the run."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def new_folder(flag_name: str, path: str | Path) -> Path:
    """The folder that a script is to make; ValueError where there already is something."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{flag_name} {folder}: exists and is not empty; give a new folder")
    return folder
