"""Record formats of conversations and preferences: a record -> messages, or an error that names file:line."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Message = dict[str, str]
Text = str | list[Message]
"""A plain text, or messages for the chat template."""


class Pair(NamedTuple):
    """Two answers to one prompt, the first preferred. All three are texts, or all three are messages."""

    prompt: Text
    chosen: Text
    rejected: Text


class Labelled(NamedTuple):
    """One answer to a prompt and whether it is desirable."""

    prompt: Text
    completion: Text
    label: bool


PAIR_KEYS: Mapping[str, str] = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
MESSAGE_FIELDS = ("conversations", "messages")
# A question's field and its answer's. `prompt` and `completion` may also be lists of messages.
PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("user", "assistant"),
    ("question", "answer"),
)
ACCEPTED = "conversations, messages, " + ", ".join(f"{prompt} + {answer}" for prompt, answer in PAIRS)


def to_messages(record: dict[str, Any], where: str) -> list[Message]:
    """The conversation of a record as [{"role", "content"}], with at least one non-empty assistant turn.

    Accepted: `conversations` or `messages` (role/content, or ShareGPT's from/value), `prompt` + `completion`
    (texts or lists of messages), `instruction` (+ `input`) + `output`, `user` + `assistant`, `question` +
    `answer`; the pairs may come with a `system` text.

    Raises:
        ValueError: `where` and what is wrong: no such field, unknown role, no or an empty answer.
    """
    messages = _messages_of(record, where, needs_answer=True)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{where}: the conversation has no assistant turn, so there is nothing to learn")
    if not all(answer.strip() for answer in answers):
        raise ValueError(f"{where}: empty answer: every assistant turn needs text")
    return messages


def to_prompt(record: dict[str, Any], where: str) -> list[Message]:
    """The messages of a record up to its last user turn: what a model is asked, without any answer to it.

    Accepts what `to_messages` accepts, and the question's field of a pair alone, for example `prompt`.
    """
    messages = _messages_of(record, where, needs_answer=False)
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise ValueError(f"{where}: the conversation has no user turn")
    return messages


def to_pair(record: dict[str, Any], where: str, keys: Mapping[str, str] = PAIR_KEYS) -> Pair:
    """The two answers of a record `prompt`, `chosen`, `rejected` (TRL's preference format).

    Texts, or lists of messages. Without a prompt it is what chosen and rejected begin with: equal messages,
    or equal text up to the last space. Lists that repeat the prompt's turns are taken the same way.

    Args:
        keys: the fields' names in this data, by ours.

    Raises:
        ValueError: `where` and what is wrong.
    """
    prompt, chosen, rejected = (record.get(keys[name]) for name in PAIR_KEYS)
    if chosen is None or rejected is None:
        raise ValueError(
            f"{where}: a preference needs {keys['chosen']!r} and {keys['rejected']!r}; fields are "
            f"{sorted(record)}"
        )
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            start = _common_text(chosen, rejected)
            return Pair(chosen[:start], chosen[start:], rejected[start:])
        if isinstance(prompt, str):
            return Pair(prompt, chosen, rejected)
        turns = _turns(prompt, where, keys["prompt"])
        return Pair(turns, _answer_turn(chosen), _answer_turn(rejected))
    sides = [_turns(value, where, keys[name]) for name, value in (("chosen", chosen), ("rejected", rejected))]
    if sides[0][0]["role"] != "assistant":  # whole conversations
        shared = 0
        while shared < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
            shared += 1
        # equal answers share their last turn too, and it still is an answer
        shared = min(shared, len(sides[0]) - 1, len(sides[1]) - 1)
        turns, sides = sides[0][:shared], [side[shared:] for side in sides]
    elif prompt is None:
        raise ValueError(f"{where}: no {keys['prompt']!r}, and the answers begin with an assistant turn")
    else:
        turns = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else _turns(prompt, where, keys["prompt"])
        )
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        _single_answer(side, where, keys[name])
    return Pair(_ordered(turns, where), *sides)


def to_labelled(record: dict[str, Any], where: str) -> list[Labelled]:
    """The answers of a record `prompt`, `completion`, `label` (TRL's unpaired format); a pair gives two.

    Raises:
        ValueError: `where` and what is wrong.
    """
    if record.get("completion") is None and record.get("chosen") is not None:
        pair = to_pair(record, where)
        return [Labelled(pair.prompt, pair.chosen, True), Labelled(pair.prompt, pair.rejected, False)]
    missing = [name for name in ("prompt", "completion", "label") if record.get(name) is None]
    if missing:
        raise ValueError(f"{where}: no {missing[0]!r} (or 'chosen' and 'rejected') in {sorted(record)}")
    prompt, completion, label = record["prompt"], record["completion"], record["label"]
    if label not in (True, False):  # also 1 and 0
        raise ValueError(f"{where}: 'label' must be true (desirable) or false, got {label!r:.60}")
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Labelled(prompt, completion, bool(label))]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = _answer_turn(completion) if isinstance(completion, str) else completion
    answer = _single_answer(_turns(answer, where, "completion"), where, "completion")
    return [Labelled(_ordered(_turns(turns, where, "prompt"), where), answer, bool(label))]


def _answer_turn(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _turns(value: Any, where: str, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {field!r} must be a string or a list of messages, got {value!r:.60}")
    return [_message(item, where, field) for item in value]


def _single_answer(turns: list[Message], where: str, field: str) -> list[Message]:
    if [turn["role"] for turn in turns] != ["assistant"]:
        roles = [turn["role"] for turn in turns]
        raise ValueError(f"{where}: {field!r} must be one assistant turn after the prompt, has roles {roles}")
    return turns


def _common_text(one: str, other: str) -> int:
    """Length of the prefix that two texts share, without the space that ends it."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length - 1 if length and one[length - 1] == " " else length


def _messages_of(record: dict[str, Any], where: str, *, needs_answer: bool) -> list[Message]:
    for field in MESSAGE_FIELDS:
        if record.get(field) is not None:
            return _checked(record[field], where, field)
    for prompt, answer in PAIRS:
        if record.get(prompt) is None:
            continue
        if record.get(answer) is None and needs_answer:
            raise ValueError(f"{where}: {prompt!r} needs {answer!r} beside it; fields are {sorted(record)}")
        messages = _side(record, prompt, "user", where)
        if prompt == "instruction" and record.get("input"):
            messages[0]["content"] += "\n\n" + _text(record["input"], where, "input")
        if record.get("system"):
            messages.insert(0, {"role": "system", "content": _text(record["system"], where, "system")})
        if record.get(answer) is not None:
            messages += _side(record, answer, "assistant", where)
        return _ordered(messages, where)
    raise ValueError(f"{where}: no conversation in fields {sorted(record)}; accepted: {ACCEPTED}")


def _side(record: dict[str, Any], field: str, role: str, where: str) -> list[Message]:
    value = record[field]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if field not in ("prompt", "completion"):
        raise ValueError(f"{where}: {field!r} must be a string, got {value!r:.60}")
    if not isinstance(value, list):
        raise ValueError(f"{where}: {field!r} must be a string or a list of messages, got {value!r:.60}")
    messages = [_message(item, where, field) for item in value]
    if field == "completion" and any(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{where}: 'completion' must hold assistant messages only, got {value!r:.60}")
    return messages


def _checked(value: Any, where: str, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {field!r} must be a non-empty list of messages, got {value!r:.60}")
    return _ordered([_message(item, where, field) for item in value], where)


def _ordered(messages: list[Message], where: str) -> list[Message]:
    first = next((message["role"] for message in messages if message["role"] != "system"), None)
    if first != "user":
        raise ValueError(f"{where}: a conversation must begin with a user turn (after any system message)")
    return messages


def _message(item: Any, where: str, field: str) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: {field!r} must hold {{'role', 'content'}} messages, got {item!r:.60}")
    role_field, text_field = ("role", "content") if "role" in item else ("from", "value")
    if item.get(role_field) is None or item.get(text_field) is None:
        raise ValueError(
            f"{where}: a message needs 'role' and 'content' (or 'from' and 'value'), got {item!r:.60}"
        )
    role = item[role_field]
    if role not in ROLES:
        raise ValueError(f"{where}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _text(item[text_field], where, text_field)}


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} must be a string, got {value!r:.60}")
    return value
