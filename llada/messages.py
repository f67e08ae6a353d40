"""Record formats of conversations: a record -> [{"role", "content"}], or an error that names file:line."""

from typing import Any

Message = dict[str, str]

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
