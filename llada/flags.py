"""One dataclass field = one flag = one YAML key = one logged name.

A script declares its flags as a dataclass and calls `parse`. Every flag is also accepted with hyphens.
`--config file.yaml` is turned into flags that stand before the command line: one parser, one set of
conversions (`4e-4` is a number), one kind of error, and the command line wins.

A script's first screen is its manual, its `Config` and `check_command_line`; what is slow to import comes
after: torch, datasets and transformers take six CPU seconds, which nobody should wait for to read `--help` or
to be told of a wrong flag. So modules that declare flags import none of them, and the parser is argparse
itself: HfArgumentParser takes 0.6 seconds to import, and we need forty lines of it.
"""

import argparse
import dataclasses
import difflib
import os
import re
import runpy
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
REQUIRED = dataclasses.MISSING
DEBUG = "LLADA_DEBUG"  # environment variable; --debug sets it, so that child processes inherit it


def flag(
    default: Any = REQUIRED,
    *,
    help: str,
    aliases: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    is_input: bool = False,
) -> Any:
    """A dataclass field with its help text.

    Args:
        default: value when the flag is absent; without it the flag is required. Lists are copied.
        help: what the flag means, with its unit.
        aliases: other accepted spellings without dashes, for example those of the systems we succeed.
        choices: the accepted values.
        is_input: the value names a file or folder that must exist.
    """
    metadata = {"help": help, "aliases": aliases, "choices": choices, "is_input": is_input}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _to_bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _value_type(hint: Any) -> Any:
    """The type of a field's value: `int` of `int | None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are some, and keeps the line breaks of the script's manual."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:
            return action.help
        if action.default is argparse.SUPPRESS and action.dest != "help":
            return f"{action.help} (required)"
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Refuses abbreviations, and answers an unknown flag with the nearest known one."""

    def __init__(self, config_class: type, description: str | None) -> None:
        super().__init__(
            usage="%(prog)s [--config FILE.yaml] [--FLAG VALUE ...]",
            description=description,
            allow_abbrev=False,
            formatter_class=_Help,
        )
        hints = typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            self._add_field(field, _value_type(hints[field.name]))
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file of flags; the command line wins")
        self.add_argument("--debug", action="store_true", help="show where an error was raised")

    def _add_field(self, field: dataclasses.Field, kind: Any) -> None:
        settings: dict[str, Any] = {
            "help": field.metadata["help"].replace("%", "%%"),
            "choices": field.metadata.get("choices"),
        }
        if field.default_factory is not REQUIRED:
            settings["default"] = field.default_factory()
        else:  # a required flag is looked for after parsing, so that a YAML file and an alias count
            settings["default"] = argparse.SUPPRESS if field.default is REQUIRED else field.default
        if kind is bool:
            settings |= {"type": _to_bool, "nargs": "?", "const": True}
        elif typing.get_origin(kind) is list:
            settings |= {"type": typing.get_args(kind)[0], "nargs": "+"}
        else:
            settings["type"] = kind
        self.add_argument(
            *(f"--{name}" for name in (field.name, *field.metadata.get("aliases", ()))), **settings
        )
        if kind is bool and field.default is True:
            self.add_argument(
                f"--no_{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS
            )

    def error(self, message: str) -> typing.NoReturn:
        """One line that names the flag once, instead of argparse's usage of a hundred flags."""
        raise ValueError(re.sub(r"^argument (--\w+)[^:]*:", r"\1:", message))

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

    Raises:
        ValueError: an unknown flag or YAML key, a missing required flag, a value of the wrong type, an input
            that does not exist.
    """
    parser = _Parser(config_class, description)
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [_with_underscores(word) for word in argv]
    argv = _flags_of_config_file(parser, config_class, argv) + argv
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0]
        raise ValueError(f"unknown argument {unknown[0]!r}: {parser.suggest(name)}")
    if namespace.debug:
        os.environ[DEBUG] = "1"
    values = vars(namespace)
    fields = dataclasses.fields(config_class)
    missing = [field.name for field in fields if field.name not in values]
    if missing:
        raise ValueError(f"required: {', '.join(f'--{name}' for name in missing)}")
    for field in fields:
        if field.metadata.get("is_input") and values[field.name] is not None:
            _check_inputs(field.name, values[field.name])
    return config_class(**{field.name: values[field.name] for field in fields})


def _with_underscores(word: str) -> str:
    """`--max-steps=5` as `--max_steps=5`: every flag is accepted with hyphens, too."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _check_inputs(name: str, value: str | list[str]) -> None:
    for path in [value] if isinstance(value, str) else value:
        if not Path(path).exists():
            raise ValueError(f"--{name} {path}: no such file or folder")


def check_command_line(config_class: type, description: str | None) -> None:
    """Answers `--help` and a wrong command line before the slow imports of the script."""
    run_main(lambda: parse(config_class, description=description))
    # Ctrl-C during the imports ends the program without a traceback; run_main gives it back its meaning.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_as(script: Path, defaults: Mapping[str, str], argv: Sequence[str] | None) -> None:
    """Runs another entry point with these defaults, for a name that users of an older system know."""
    flags = [f"--{name}={value}" for name, value in defaults.items()]
    sys.argv = [str(script), *flags, *(sys.argv[1:] if argv is None else argv)]
    runpy.run_path(str(script), run_name="__main__")


def run_main(main: Callable[[], Any]) -> None:
    """Runs the program; what a user can mend ends in one line on stderr and exit status 2.

    A ValueError is written for users everywhere in this suite, an OSError names its file. `--debug` or the
    environment variable LLADA_DEBUG shows the traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # a background job's SIG_IGN stays
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        _end("interrupted", 128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        _end("error: " + " ".join(str(error).split()), 2)


def _end(message: str, status: int) -> typing.NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        # The launcher ends all ranks with the first that fails; who is still there has a reason of its own.
        time.sleep(2)
        message = f"rank {rank}: {message}"
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


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
        key = str(key).replace("-", "_")
        if not parser.known(key):
            raise ValueError(f"{path}: unknown key {key!r}: {parser.suggest(key)}")
        if value is None:
            if defaults.get(key) is not None:
                raise ValueError(
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
