"""One dataclass field = one flag = one YAML key = one logged name.

A script declares its flags as a dataclass and calls `parse`. The parser is transformers' HfArgumentParser, so
every flag is also accepted with hyphens. `--config file.yaml` is turned into flags that stand before the
command
line: one parser, one set of conversions (`4e-4` is a number), one kind of error, and the command line wins.
"""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

T = TypeVar("T")
REQUIRED = dataclasses.MISSING
RANGE = ("at_least", "above", "at_most")


def flag(
    default: Any = REQUIRED,
    *,
    help: str,
    aliases: Sequence[str] = (),
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field with its help text.

    Args:
        default: value when the flag is absent; without it the flag is required. Lists are copied.
        help: what the flag means, with its unit.
        aliases: other accepted spellings without dashes, for example those of the systems we succeed.
        choices: the accepted values.
    """
    metadata: dict[str, Any] = {"help": help.replace("%", "%%")}
    spellings = {spelling for name in aliases for spelling in (name, name.replace("_", "-"))}
    if spellings:
        metadata["aliases"] = sorted(f"--{spelling}" for spelling in spellings)
    if choices is not None:
        metadata["choices"] = list(choices)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the script's manual."""


class _Parser(HfArgumentParser):
    """Refuses abbreviations, and answers an unknown flag with the nearest known one."""

    def __init__(self, config_class: type, description: str | None) -> None:
        super().__init__(config_class, description=description, allow_abbrev=False, formatter_class=_Help)
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file of flags; the command line wins")

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        metadata = {k: v for k, v in field.metadata.items() if k not in RANGE}
        plain = dataclasses.field(default=field.default, default_factory=field.default_factory)
        plain.name, plain.type, plain.metadata = field.name, field.type, metadata
        HfArgumentParser._parse_dataclass_field(parser, plain)

    def known(self, name: str) -> bool:
        return f"--{name}" in self._option_string_actions

    def suggest(self, name: str) -> str:
        """The part of an error message that names the nearest flag, or points at --help."""
        names = [
            option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")
        ]
        near = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.5)
        return f"did you mean {near[0]!r}?" if near else "see --help for the list"


def parse(config_class: type[T], argv: Sequence[str] | None = None, *, description: str | None = None) -> T:
    """The filled dataclass, from `--config` and the command line.

    Args:
        config_class: a dataclass whose fields were made by `flag`.
        argv: arguments without the program name; default `sys.argv[1:]`.
        description: the script's docstring, shown by `--help`.

    Exits with status 2 and one line of explanation for an unknown flag or YAML key, a missing required flag,
    or a value of the wrong type.
    """
    parser = _Parser(config_class, description)
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = _flags_of_config_file(parser, config_class, argv) + argv
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0]
        parser.error(f"unknown argument {unknown[0]!r}: {parser.suggest(name)}")
    values = vars(namespace)
    return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})


def _flags_of_config_file(parser: _Parser, config_class: type, argv: list[str]) -> list[str]:
    path = None
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            path = argv[i + 1]
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
    if path is None:
        return []
    values = read_yaml(path)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    flags: list[str] = []
    for key, value in values.items():
        if not parser.known(key):
            parser.error(f"{path}: unknown key {key!r}: {parser.suggest(key)}")
        if value is None:
            if defaults.get(key) is not None:
                parser.error(
                    f"{path}: {key} has no value; remove the line to keep its default, {defaults[key]!r}"
                )
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)] if value else []
        else:
            flags.append(f"--{key}={value}")
    return flags


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
