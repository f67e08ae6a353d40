"""From the command line and `--config file.yaml` to a checked dataclass, and the frame around every `main`.

The YAML file is turned into flags that stand before the command line: one parser, one set of conversions
(`4e-4` is a number), one kind of error, and the command line wins.

A script's first screen is its manual, its `Config` and `check_command_line`; what is slow to import comes
after: torch, datasets and transformers take six CPU seconds, which nobody should wait for to read `--help`.
So modules that declare flags import none of them, and the parser is argparse itself: HfArgumentParser takes
0.6 seconds to import.
"""

import argparse
import dataclasses
import difflib
import os
import runpy
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from llada.flags import paths
from llada.flags.declaration import (
    REQUIRED,
    check_needs,
    check_value,
    default_of,
    flag,
    own_names,
    said_of,
    shown,
)
from llada.flags.older import RENAMED, is_older, todays_words
from llada.flags.yaml_files import read_yaml

__all__ = ["OneLineParser", "check_command_line", "flag", "parse", "run_as", "run_main"]

T = TypeVar("T")
DEBUG = "LLADA_DEBUG"  # environment variable; --debug sets it, so that child processes inherit it
METAVARS = {int: "N", float: "X", bool: "BOOL"}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are some, and keeps the line breaks of the script's manual."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if action.nargs == 0 or default in (None, argparse.SUPPRESS, []):
            return action.help
        text = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{action.help} (default: {text.replace('%', '%%')})"


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong, for `run_main` to tell, instead of argparse's usage of all flags."""

    def error(self, message: str) -> typing.NoReturn:
        """ValueError with argparse's message."""
        message = message.removeprefix("argument ")
        raise ValueError(
            message if len(message) <= 200 else f"{message[:150]}... ({len(message)} characters)"
        )


class _Parser(OneLineParser):
    """Refuses abbreviations, and answers an unknown flag with the nearest known one."""

    def __init__(self, config_class: type, description: str | None) -> None:
        super().__init__(
            usage="%(prog)s [--config FILE.yaml] [--FLAG VALUE ...]",
            description=description,
            allow_abbrev=False,
            formatter_class=_Help,
        )
        hints = typing.get_type_hints(config_class)
        self.fields = {field.name: field for field in dataclasses.fields(config_class)}
        self.defaults = {name: default_of(field) for name, field in self.fields.items()}
        required = [name for name, default in self.defaults.items() if default is REQUIRED]
        sections = {"required": required}
        for base in config_class.__mro__:  # the script's own flags first, those of all stages last
            placed = {name for names in sections.values() for name in names}
            title = (base.__doc__ or "").partition("\n")[0].removesuffix(".")
            sections[title] = [n for n in own_names(base) if n in self.fields and n not in placed]
        for title, names in sections.items():
            section = self.add_argument_group(title)
            for name in names:
                self._add(section, name, _value_type(hints[name]), said_of(config_class, name))
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file of flags; the command line wins")
        self.add_argument("--debug", action="store_true", help="show where an error was raised")
        if "overwrite" not in self.fields:
            self.add_argument("--overwrite", action="store_true", help="replace outputs that are there")

    def _add(self, section: Any, name: str, kind: Any, said: dict[str, Any]) -> None:
        default = self.defaults[name]
        settings: dict[str, Any] = {
            "help": said.get("help", "").replace("%", "%%"),
            # a required flag is looked for after parsing, so that a YAML file and an older spelling count
            "default": argparse.SUPPRESS if default is REQUIRED else default,
        }
        if kind is bool:
            settings |= {"type": _to_bool, "nargs": "?", "const": True}
        elif typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0]
            settings |= {"type": kind, "nargs": "+"}
        else:
            settings["type"] = kind
        if "choices" in said:
            settings["metavar"] = "{" + ",".join(said["choices"]) + "}"
        else:
            settings["metavar"] = METAVARS.get(kind, "PATH" if said.keys() & {"reads", "writes"} else "TEXT")
        section.add_argument(f"--{name}", **settings)
        if kind is bool and default is True:
            section.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)

    def known(self, name: str) -> bool:
        return f"--{name}" in self._option_string_actions or is_older(name, self.fields)

    def suggest(self, name: str) -> str:
        """The part of an error message that names the nearest flag, or points at --help."""
        older = [name for name in RENAMED if is_older(name, self.fields)]
        near = difflib.get_close_matches(name, [*self.fields, *older], n=1, cutoff=0.5)
        return f"did you mean {near[0]!r}?" if near else "see --help for the list"


def _value_type(hint: Any) -> Any:
    """The type of a field's value: `int` of `int | None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _to_bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse(config_class: type[T], argv: Sequence[str] | None = None, *, description: str | None = None) -> T:
    """The filled and checked dataclass, from `--recipe`, `--config` and the command line; the later wins.

    `config_class`: a dataclass whose fields were made by `flag`. Where it or a base has a method
    `check_flags`, this is called last, and raises for flags that do not go together. ValueError: whatever a
    user can mend.
    """
    parser = _Parser(config_class, description)
    layers = [[_with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]]
    path = _last_value(layers[0], "config")
    if path is not None:
        layers.insert(0, _words_of(parser, path, read_yaml(path)))
    words = list(chain.from_iterable(layers))
    recipe = _last_value(words, "recipe") if "recipe" in parser.fields else None
    if recipe is not None:
        with_lora = (_last_value(words, "use_lora") or "true").lower() != "false"
        found = config_class.flags_of_recipe(recipe, with_lora=with_lora)
        layers.insert(0, _words_of(parser, f"recipe {recipe}", found))
    # after YAML and recipe, which may use older spellings too
    layers = [todays_words(words, parser.fields) for words in layers]
    words = list(chain.from_iterable(layers))
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0]
        raise ValueError(f"unknown argument {shown(unknown[0])}: {parser.suggest(name)}")
    if namespace.debug:
        os.environ[DEBUG] = "1"
    values = {name: value for name, value in vars(namespace).items() if name in parser.fields}
    missing = [f"--{name}" for name in parser.fields if name not in values]
    if missing:
        raise ValueError(f"required: {', '.join(missing)}")
    config = config_class(**values)
    for name, value in values.items():
        check_value(name, value, said_of(config_class, name))
    flags = [
        (word[2:].partition("=")[0], i)
        for i, found in enumerate(layers)
        for word in found
        if word[:2] == "--"
    ]
    check_needs(config, layer_of=dict(flags))
    for base in reversed(config_class.__mro__):
        if "check_flags" in base.__dict__:
            base.check_flags(config)
    paths.check_paths(config, overwrites=namespace.overwrite)
    return config


def _with_underscores(word: str) -> str:
    """`--max-steps=5` as `--max_steps=5`: every flag is accepted with hyphens, too."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _last_value(words: list[str], name: str) -> str | None:
    value = None
    for i, word in enumerate(words):
        if word == f"--{name}" and i + 1 < len(words):
            value = words[i + 1]
        elif word.startswith(f"--{name}="):
            value = word.removeprefix(f"--{name}=")
    return value


def _words_of(parser: _Parser, path: str, values: Mapping[str, Any]) -> list[str]:
    """Flags in a YAML file, as words of a command line."""
    found: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if not parser.known(name):
            raise ValueError(f"{path}: unknown key {shown(key)}: {parser.suggest(name)}")
        default = parser.defaults.get(name)
        if isinstance(value, dict):
            raise ValueError(f"{path}: {key} holds names of its own; give one value, or a list")
        if value is None or value == []:
            if default not in (None, [], REQUIRED):
                what = "has no value" if value is None else "is an empty list"
                raise ValueError(f"{path}: {key} {what}; remove the line to keep its default, {default!r}")
        elif isinstance(value, list):
            found += [f"--{name}", *map(str, value)]
        else:
            found.append(f"--{name}={value}")
    return found


def check_command_line(
    config_class: type[T], description: str | None, *, answer: Callable[[T], str | None] | None = None
) -> None:
    """Answers `--help` and a wrong command line before the slow imports of the script.

    `answer`: what a command that has nothing to do is told, None if it has; by default one is that made all
    its outputs before.
    """

    def check() -> None:
        config = parse(config_class, description=description)
        text = f"{', '.join(paths.finished)}: this command has finished before" if paths.finished else None
        text = text if answer is None else answer(config)
        if text is not None:
            if os.environ.get("RANK", "0") == "0":
                print(text)
            raise SystemExit(0)

    _run(check)
    # Ctrl-C during the imports ends the program without a traceback; run_main gives it back its meaning.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_as(script: Path, defaults: Mapping[str, str], argv: Sequence[str] | None) -> None:
    """Runs another entry point with these defaults, for a name that users of an older system know."""
    words = [f"--{name}={value}" for name, value in defaults.items()]
    sys.argv = [str(script), *words, *(sys.argv[1:] if argv is None else argv)]
    runpy.run_path(str(script), run_name="__main__")


def run_main(main: Callable[[], Any]) -> None:
    """Runs the program; what a user can mend ends in one line on stderr and exit status 2.

    `--debug` or the environment variable LLADA_DEBUG shows the traceback.
    """
    _run(main)
    if os.environ.get("RANK", "0") == "0":
        paths.note_outputs(is_finished=True)


def _run(main: Callable[[], Any]) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # a background job's SIG_IGN stays
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a pipeline may pass on the same signal
        _end("interrupted", 128 + signal.SIGINT)
    # a ValueError is written for users everywhere in this suite, an OSError names its file
    except (ValueError, OSError) as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        _end(f"error: {_told(error)}", 2)


def _told(error: ValueError | OSError) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        path = str(error.filename)
        name = next((f"--{name} " for given, name in paths.given.items() if path.startswith(given)), "")
        text = f"{name}{path}: {error.strerror}"
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def _end(message: str, status: int) -> typing.NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        # The launcher ends all ranks with the first that fails; who is still there has a reason of its own.
        time.sleep(2)
        message = f"rank {rank}: {message}"
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)
