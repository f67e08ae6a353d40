"""Which flags a program reads: its parsed config notes every field that is asked for."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from llada.flags.declaration import is_met, said_of

# Reading a field to write it down, or to compare it with that of an earlier run, gives it no effect.
NOTED_BY = ("agreed",)


@contextmanager
def watch(module: ModuleType, file: Path) -> Iterator[None]:
    """Meanwhile `module.parse` gives configs that write to `file` which fields nobody has read so far."""
    parse = module.parse

    def parse_and_watch(*arguments: Any, **options: Any) -> Any:
        return _watched(parse(*arguments, **options), file)

    module.parse = parse_and_watch
    try:
        yield
    finally:
        module.parse = parse  # modules are shared: the next run, say a dry one, would write to `file` too


def _watched(config: Any, file: Path) -> Any:
    config_class = type(config)
    # What could not be given here, because its partner is off, cannot be read either.
    unread = {
        field.name
        for field in dataclasses.fields(config)
        if is_met(config, said_of(config_class, field.name).get("needs", ""))
    } - {"recipe"}  # parse itself turns it into other flags

    def read(self: Any, name: str) -> Any:
        caller = sys._getframe(1).f_code
        if name in unread and caller.co_filename != dataclasses.__file__ and caller.co_name not in NOTED_BY:
            unread.discard(name)
            file.write_text(json.dumps(sorted(unread)))
        return object.__getattribute__(self, name)

    namespace = {"__getattribute__": read, "__module__": config_class.__module__}
    config.__class__ = type(config_class.__name__, (config_class,), namespace)
    return config
