"""One turn of a conversation, from every public spelling of it.

A message is {"role": system | user | assistant | tool, "content": text}, and where there is something to say

    tool_calls   of an assistant's turn: [{"type", "function": {"name", "arguments"}}], as templates take them
    learn        False: an assistant's turn that is context only (`weight: 0`)
    tools        on the first message: the conversation's tools, which the chat template renders

A thought is a part of the content: <think>, the thought, </think>, a blank line, the answer.
"""

import json
import re
from typing import Any

Message = dict[str, Any]
Text = str | list[Message]
"""A plain text, or messages for the chat template."""

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # roles, and types of a content part, whose text is a call
THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought")
WEIGHTS = ("weight", "loss_weight")


def read_messages(value: Any, where: str, field: str) -> list[Message]:
    """The messages of a field: a list of them, a single one, or JSON text of a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a column of a CSV or Parquet file
        value = _from_json(value, where, field)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {field!r} must be a non-empty list of messages, got {value!r:.60}")
    return [_message(item, where, field) for item in value]


def with_thought(thought: str, answer: str, where: str) -> str:
    """An answer with its thought in front. ValueError if the answer tells another one itself."""
    if answer.lstrip().startswith("<think>"):
        written = answer.partition("</think>")[0].lstrip().removeprefix("<think>")
        if written.strip() != thought.strip():
            raise ValueError(f"{where}: the answer has a thought of its own beside {thought!r:.60}")
        return answer
    stripped = thought.strip("\n")
    return f"<think>\n{stripped}\n</think>\n\n{answer}" if stripped.strip() else answer


def read_weight(record: dict[str, Any], where: str) -> bool | None:
    """Whether something is to be learned, by its `weight`; None if it does not say."""
    for name in WEIGHTS:
        if record.get(name) is not None:
            if record[name] not in (0, 1):
                raise ValueError(f"{where}: {name!r} must be 0 or 1, got {record[name]!r:.60}")
            return bool(record[name])
    return None


def read_tools(value: Any, where: str) -> list[Any]:
    """A record's `tools`: a list, or JSON text of one; empty where there are none."""
    if isinstance(value, str) and value.strip():
        value = _from_json(value, where, "tools")
    if value and not isinstance(value, list):
        raise ValueError(f"{where}: 'tools' must be a list, got {value!r:.60}")
    return value or []


def valid(text: str, where: str) -> str:
    """`text`, if it can be written as UTF-8 (JSON can spell half a character) and holds no mark of ours."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text[error.start]!r} is half a character (surrogate)") from error
    # the marks of llada/data/template.py are among these noncharacters
    if found := re.search("[\ufdd0-\ufdef]", text):
        raise ValueError(f"{where}: U+{ord(found[0]):04X} is no character; remove it")
    return text


def _message(item: Any, where: str, field: str) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: {field!r} must hold {{'role', 'content'}} messages, got {item!r:.60}")
    given = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    calls = [_call(call, where) for call in item.get("tool_calls") or []]
    if isinstance(item.get("function_call"), dict):  # OpenAI's older spelling
        calls.append(_call(item["function_call"], where))
    if given is None or (content is None and not calls):
        raise ValueError(
            f"{where}: a message needs 'role' and 'content' (or 'from' and 'value'), got {item!r:.60}"
        )
    if not isinstance(given, str) or given.lower() not in ROLES:
        raise ValueError(f"{where}: unknown role {given!r:.60}; use one of {', '.join(ROLES)}")
    role = ROLES[given.lower()]
    text, thoughts = _parts(content, calls, role, where)
    if given.lower() in CALLS:
        calls, text = [*calls, *_calls(text, where)], ""
    thoughts += [item[name] for name in THOUGHTS if item.get(name)]
    message: Message = {"role": role, "content": valid(text, where)}
    if thoughts:
        if role != "assistant" or not all(isinstance(thought, str) for thought in thoughts):
            raise ValueError(f"{where}: a thought must be a text of an assistant's turn, got {item!r:.60}")
        # dict: one thought may stand in two fields
        message["content"] = with_thought("\n".join(dict.fromkeys(thoughts)), text, where)
    if calls:
        message["tool_calls"] = calls
    is_learned = False if item.get("learn") is False else read_weight(item, where)
    if is_learned is False and role == "assistant":
        message["learn"] = False
    if is_learned and role != "assistant":
        raise ValueError(f"{where}: a {given} turn has weight 1, and only an assistant's turns are learned")
    if role == "tool":  # some templates name the tool that answers
        message |= {name: item[name] for name in ("name", "tool_call_id") if item.get(name)}
    if item.get("tools"):
        message["tools"] = read_tools(item["tools"], where)
    return message


def _parts(content: Any, calls: list[Any], role: str, where: str) -> tuple[str, list[str]]:
    """(the text, the thoughts) of a content: a text or a list of parts; its calls go to `calls`."""
    if isinstance(content, str) or content is None:
        return content or "", []
    if isinstance(content, dict) and role == "tool":  # what a tool gave back
        return json.dumps(content, ensure_ascii=False), []
    texts, thoughts = [], []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"{where}: 'content' must be a string or a list of parts, got {content!r:.60}")
    for part in content:
        kind = part.get("type")
        values = [part[name] for name in ("text", "value", kind) if isinstance(part.get(name), str)]
        if not values or kind not in ("text", "input_text", "output_text", *THOUGHTS, *CALLS):
            raise ValueError(f"{where}: a content part of type {kind!r} cannot be read: {part!r:.60}")
        if kind in CALLS:
            calls += _calls(values[0], where)
        else:
            (thoughts if kind in THOUGHTS else texts).append(values[0])
    return "".join(texts), thoughts


def _calls(text: str, where: str) -> list[dict[str, Any]]:
    value = _from_json(text, where, "function_call")
    return [_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _call(value: Any, where: str) -> dict[str, Any]:
    """A tool call as chat templates take it; its arguments as an object."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: a tool call needs 'name' and 'arguments', got {value!r:.60}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _from_json(arguments or "{}", where, "arguments")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return call | ({"id": value["id"]} if value.get("id") else {})


def _from_json(text: str, where: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: {field!r} is not JSON: {error}") from error
