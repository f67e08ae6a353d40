"""How a flag is declared, and what its declaration refuses, before anything is loaded.

One dataclass field = one flag = one YAML key = one logged name.
"""

import dataclasses
import inspect
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

REQUIRED = dataclasses.MISSING
OFF = (None, False, 0, -1, "", "none", [])  # what a flag is where it does nothing


def flag(
    default: Any = REQUIRED,
    help: str = "",
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    needs: str = "",
    mild: bool = False,
    reads: str = "",
    writes: str = "",
    fixed: bool = False,
) -> Any:
    """A dataclass field with what is said of its flag.

    A subclass that only changes a default writes `learning_rate: float = 1e-6`: the rest is inherited.

    Args:
        default: value when the flag is absent; without it the flag is required. Lists are copied.
        at_least, above, at_most, below: the range of the value, or of every value of a list.
        needs: the flag without which this one has no effect and is refused: "shard" (set to anything), or
            "report_to=wandb|trackio" (set to one of these), "teacher=None" (absent); or several, parted by
            " or ".
        mild: without what it needs it is told to have no effect, and not refused: no result depends on it.
        reads: what must be there, a kind of `llada.flags.paths.READ`.
        writes: what the script makes, a kind of `WRITTEN` there; never what it reads, and not what is there.
        fixed: a resumed run must have the same value.
    """
    # first of all: names that come later would be in it too
    said = {name: value for name, value in locals().items() if name != "default"}
    said = {name: value for name, value in said.items() if value not in (None, "") and value is not False}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=said)
    return dataclasses.field(default=default, metadata=said)


@cache
def said_of(config_class: type, name: str) -> Mapping[str, Any]:
    """What `flag` was told of a field: the class's own words over those of its bases."""
    said: dict[str, Any] = {}
    for base in reversed(config_class.__mro__):
        if name in own_names(base):
            own = base.__dataclass_fields__[name].metadata
            for bounds in (("at_least", "above"), ("at_most", "below")):  # a new one takes an old one's place
                if own.keys() & set(bounds):
                    said = {key: value for key, value in said.items() if key not in bounds}
            said |= own
    return said


@cache
def own_names(config_class: type) -> list[str]:
    """The fields that a class declares itself, in order."""
    fields = config_class.__dict__.get("__dataclass_fields__", {})
    return [name for name in inspect.get_annotations(config_class) if name in fields]


def default_of(field: dataclasses.Field) -> Any:
    """The value when the flag is absent; REQUIRED if it must not be."""
    return field.default if field.default_factory is REQUIRED else field.default_factory()


def shown(value: Any) -> str:
    """A value in an error message: short, and printable whatever bytes it was typed with."""
    text = ascii(value) if has_lone_surrogate(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def first_line(error: Exception) -> str:
    """What an error says, in an error message; its kind where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def has_lone_surrogate(value: Any) -> bool:
    """Whether a text holds what bytes that are not UTF-8 become on a command line."""
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def check_value(name: str, value: Any, said: Mapping[str, Any]) -> None:
    """ValueError with the flag and what would be right, if a value (or one of a list) is out of range."""
    for item in value if isinstance(value, list) else [value]:
        if has_lone_surrogate(item):
            raise ValueError(f"--{name} {shown(item)}: not valid UTF-8")
        if item is not None and "choices" in said and item not in said["choices"]:
            raise ValueError(f"--{name} {shown(item)}: choose from {', '.join(said['choices'])}")
        if isinstance(item, bool) or not isinstance(item, int | float):
            continue
        if not math.isfinite(item) or abs(item) >= 2**63:
            raise ValueError(f"--{name} {shown(item)}: must be a finite number of at most 64 bits")
        limits = {
            "at_least": item >= said.get("at_least", item),
            "above": item > said.get("above", -math.inf),
            "at_most": item <= said.get("at_most", item),
            "below": item < said.get("below", math.inf),
        }
        if not all(limits.values()):
            span = " and ".join(f"{key.replace('_', ' ')} {said[key]:g}" for key in limits if key in said)
            raise ValueError(f"--{name} {item}: must be {span}")


def check_needs(config: Any, *, layer_of: Mapping[str, int]) -> None:
    """ValueError for a flag that was changed and could have no effect.

    It is told instead where it is mild, or where a later layer (recipe, YAML file, command line) set what it
    needs: who overrides a file's flag need not name those that then do nothing.
    """
    for field in dataclasses.fields(config):
        needs, value = said_of(type(config), field.name).get("needs", ""), getattr(config, field.name)
        if value not in (*OFF, default_of(field)) and not is_met(config, needs):
            without = re.sub(r"(\w+)=?(\S*)", r"--\1 \2", needs.replace(" or ", " , ")).replace("|", " or ")
            without = " ".join(without.split()).replace(" , --", " or --")
            without = f"beside --{needs[:-5]}" if needs.endswith("=None") else f"without {without}"
            text = f"--{field.name} {shown(value)}: has no effect {without}"
            layer = layer_of.get(field.name, 0)
            is_overruled = any(layer_of.get(partner, 0) > layer for partner in re.findall(r"\w+", needs))
            if not is_overruled and not said_of(type(config), field.name).get("mild"):
                raise ValueError(text)
            tell(text)


@cache
def tell(text: str) -> None:
    """Says it on stderr, once: a command line is read before the slow imports and again after them."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def is_met(config: Any, needs: str, seen: tuple[str, ...] = ()) -> bool:
    """Whether a flag's `needs` hold, and those of the flag that is needed; two flags may need each other."""
    if not needs or needs in seen:
        return True
    if " or " in needs:
        return any(is_met(config, part, seen) for part in needs.split(" or "))
    partner, _, wanted = needs.partition("=")
    value = getattr(config, partner)
    values = value if isinstance(value, list) else [value]
    holds = any(str(item) in wanted.split("|") for item in values) if wanted else value not in OFF
    return holds and is_met(config, said_of(type(config), partner).get("needs", ""), (*seen, needs))
