"""The chat template: what it writes, and where in it the turns stand.

Where a turn's content begins and ends is found by rendering the conversation again with a mark in it, and
comparing: never by searching for the content, which also stands in headers. The marks are noncharacters of
Unicode, which no text holds.

A template is a program, so a few facts about it are learned from probes, once (`Style`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import jinja2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llada.data.messages import Message

HELD, START, END = "\ufdd0", "\ufdd1", "\ufdd2"
_THINK = re.compile(r"\s*<think>")
# Tags of thoughts are no control tokens, whatever the tokenizer says: an answer may write them.
_TAGS = ("<think>", "</think>")

Span = tuple[int, int]
"""Where a content begins and ends in what the template writes."""


@dataclass(frozen=True)
class Style:
    """How a template frames an answer."""

    closing: str | None  # the special token that ends an assistant's turn
    # White space between generation prompt and answer: part of the answer, for a sampler begins before it.
    gap: str
    opens_thought: str  # what of a thought the generation prompt has already, for example "<think>\n"
    has_header: bool  # it writes an assistant's header when it is asked for one
    has_markers: bool  # it says itself what an assistant generates
    drops_system: bool  # it leaves system messages out
    renders_tools: bool


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, header: bool = False) -> str:
    """What the template writes; `header` asks for that of an assistant's turn at the end.

    ValueError: no template, or it refuses this conversation.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruct model's, or "
            "plain prompts"
        )
    tools = messages[0].get("tools") if messages else None
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=header
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def style_of(tokenizer: PreTrainedTokenizerBase) -> Style:
    """How the tokenizer's template frames an answer. ValueError if that cannot be told."""
    return _style_of(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _style_of(tokenizer: PreTrainedTokenizerBase, template: str) -> Style:
    user = {"role": "user", "content": "Is it?"}
    answer = {"role": "assistant", "content": f"{START}It is.{END}"}
    whole = render([user, answer], tokenizer)
    if START not in whole or END not in whole:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} does not write an answer as it is, so its "
            "tokens cannot be told apart"
        )
    asked, bare = render([user], tokenizer, header=True), render([user], tokenizer)
    before, behind = whole[: whole.index(START)], whole[whole.index(END) + 1 :]
    written = before.removeprefix(asked) if before.startswith(asked) else before
    has_header = asked != bare or not written.strip()
    # An EOS at the very end of a conversation closes it, and not the turn: followed by a turn it is gone.
    followed = _try([user, answer, user], tokenizer) or whole
    common = behind[: _num_shared(behind, followed[followed.index(END) + 1 :])].lstrip()
    tokens = added_tokens(tokenizer)
    found = [token for token in tokens if common.startswith(token)]
    if not found:  # another token at the end of a conversation than between turns
        framed = before.partition(user["content"])[2]
        found = [token for token in tokens if behind.lstrip().startswith(token) and token not in framed]
    thought = re.search(r"<think>\s*\Z", asked)
    system, tool = {"role": "system", "content": "Be brief."}, {"name": "look_up", "description": "finds"}
    tool = {"type": "function", "function": {**tool, "parameters": {"type": "object", "properties": {}}}}
    return Style(
        closing=max(found, key=len, default=None),
        gap=written if written.isspace() else "" if has_header else re.search(" *\\Z", before)[0],
        opens_thought=thought[0] if thought else "",
        has_header=has_header,
        has_markers=bool(re.search(r"{%-?\s*generation", template)),
        drops_system="Be brief." not in (_try([system, user], tokenizer) or "Be brief."),
        renders_tools="look_up" in (_try([{**user, "tools": [tool]}], tokenizer) or ""),
    )


def _try(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return render(messages, tokenizer, header=True)
    except ValueError:
        return None  # it says so when it meets such a conversation


def fit_messages(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, parse_special: bool = False
) -> list[Message]:
    """The messages as they are rendered: tools as text where the template has no place for them.

    Without `parse_special` every special token that a content spells gets a mark, so that it stays text.
    ValueError: a content spells the mask token.
    """
    if uses_tools(messages) and not style_of(tokenizer).renders_tools:
        messages = _with_tools_as_text(messages, in_user=style_of(tokenizer).drops_system)
    if parse_special:
        return list(messages)
    return [{**m, "content": hold_text(m["content"], tokenizer)} for m in messages]


def uses_tools(messages: Sequence[Message]) -> bool:
    """Whether a conversation has tools, or calls of them."""
    return any(m.get("tools") or m.get("tool_calls") or m["role"] == "tool" for m in messages)


def _with_tools_as_text(messages: Sequence[Message], *, in_user: bool) -> list[Message]:
    """Tools described in the system message, calls in the answer, what they gave back in a user's turn."""
    found = []
    for m in messages:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in m.get("tool_calls", [])]
        parts = [m["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
        text = "\n".join(part for part in parts if part)
        if m["role"] == "tool":
            found.append({"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"})
        else:
            kept = {name: value for name, value in m.items() if name not in ("tools", "tool_calls")}
            found.append({**kept, "content": text})
    if tools := messages[0].get("tools"):
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = f"<tools>\n{lines}\n</tools>\nTo call a tool, answer with\n<tool_call>\n"
        text += '{"name": ..., "arguments": {...}}\n</tool_call>'
        place = next(i for i, m in enumerate(found) if m["role"] == "user") if in_user else 0
        if in_user or found[0]["role"] == "system":
            found[place] = {**found[place], "content": "\n\n".join([found[place]["content"], text])}
        else:
            found.insert(0, {"role": "system", "content": text})
    return found


def hold_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with a mark in every special token that it spells. ValueError for the mask token."""
    if tokenizer.mask_token is not None and tokenizer.mask_token in text:  # it would be taken for noise
        raise ValueError(f"the text contains the mask token {tokenizer.mask_token!r}; remove or rewrite it")
    return _specials(tokenizer).sub(lambda found: found[0][0] + HELD + found[0][1:], text)


def spells_special(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text spells a special token."""
    return _specials(tokenizer).search(text) is not None


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the special tokens."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [text for text in dict.fromkeys([*added, *tokenizer.all_special_tokens]) if text.strip()]


@lru_cache(maxsize=8)
def _specials(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    texts = sorted(set(added_tokens(tokenizer)) - {*_TAGS}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


@lru_cache(maxsize=4)
def _without_specials(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    # A copy: to switch the one in use would change what another thread is encoding.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return backend


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, nothing added; special tokens with a mark in them are tokenised as text."""
    backend = tokenizer.backend_tokenizer
    # Left behind by earlier calls. Only then: another thread's encoding forbids to change the tokenizer.
    if backend.padding is not None:
        backend.no_padding()
    if backend.truncation is not None:
        backend.no_truncation()
    plain = [text for text in texts if HELD not in text]
    found = iter(backend.encode_batch_fast(plain, add_special_tokens=False))
    return [next(found).ids if HELD not in text else _encode_held(text, tokenizer) for text in texts]


def _encode_held(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text between whose special tokens there is one that is only written."""
    ids: list[int] = []
    for piece in re.split(f"({_specials(tokenizer).pattern})", text):
        backend = _without_specials(tokenizer) if HELD in piece else tokenizer.backend_tokenizer
        ids += backend.encode(piece.replace(HELD, ""), add_special_tokens=False).ids
    return ids


def spans_of(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, header: bool = False
) -> tuple[str, list[Span | None]]:
    """(what the template writes, where in it each message's content stands).

    A span is None where the content is blank, or not written as it is: a system message that is left out, the
    thought of an earlier turn. ValueError: the template leaves out something that has a meaning.
    """
    whole = render(messages, tokenizer, header=header)
    is_marked = [bool(m["content"].strip()) and not m.get("tool_calls") for m in messages]
    marked = render(
        [_mark(m, START, END) if has else m for m, has in zip(messages, is_marked, strict=True)],
        tokenizer, header=header,
    )  # fmt: skip
    pieces = re.split(f"([{START}{END}])", marked)
    if "".join(pieces[::2]) == whole and pieces[1::2] == [START, END] * sum(is_marked):
        borders = iter(list(accumulate(map(len, pieces[::2])))[:-1])
        spans = [(next(borders), next(borders)) if has else None for has in is_marked]
    else:  # the template does something about white space or thoughts at the borders: one by one
        spans = [None] * len(messages)
    for i, message in enumerate(messages):
        if spans[i] and message["role"] == "assistant" and not _is_written(message, whole[slice(*spans[i])]):
            spans[i] = None
        if spans[i] is None and (message["content"].strip() or message.get("tool_calls")):
            spans[i] = _span_of(i, messages, tokenizer, whole, header)
            if spans[i] is None and message["role"] in ("user", "tool"):
                raise ValueError(f"the chat template leaves out a turn of role {message['role']!r}")
    if style_of(tokenizer).has_markers:
        spans = _marked_by_template(messages, tokenizer, whole, spans)
    return whole, spans


def _span_of(
    i: int, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, whole: str, header: bool
) -> Span | None:
    """Where message i stands: rendered with a mark at its start, and at its end, it first differs there."""

    def differs(changed: Message, mark: str) -> int | None:
        variant = render([*messages[:i], changed, *messages[i + 1 :]], tokenizer, header=header)
        return _num_shared(whole, variant) if mark in variant else None

    message = messages[i]
    content = message["content"]
    start = differs(_mark(message, START), START)
    if start is None and _THINK.match(content):  # the template takes the thought apart
        inside = {**message, "content": content.replace("<think>", f"<think>{START}", 1)}
        if (found := differs(inside, START)) is not None and whole[:found].rstrip().endswith("<think>"):
            start = len(whole[:found].rstrip()) - len("<think>")
    if calls := message.get("tool_calls"):
        another = {"type": "function", "function": {"name": END, "arguments": {}}}
        end = differs({**message, "tool_calls": [*calls, another]}, END)
        if end is None:
            raise ValueError("the chat template leaves out tool calls")
        # another call may begin as the end of the turn does, for example with "<"
        closing = style_of(tokenizer).closing or ""
        overlap = (k for k in range(1, len(closing)) if whole.startswith(closing, end - k))
        end -= next(overlap, 0)
    else:
        end = differs(_mark(message, "", END), END)
    if start is None or end is None:
        return None
    before = _try(messages[:i], tokenizer) or ""
    if whole.startswith(before) and not whole[len(before) : start].strip():  # as `Style.gap`
        start = len(before)
    return (start, end) if _is_written(message, whole[start:end]) else None


def _is_written(message: Message, text: str) -> bool:
    """Whether a text is a message's content (then its tool calls), white space apart."""
    written, said = ("".join(part.split()) for part in (text, message["content"]))
    return written == said or (bool(message.get("tool_calls")) and written.startswith(said))


def _num_shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _mark(message: Message, before: str, behind: str = "") -> Message:
    return {**message, "content": before + message["content"] + behind}


def _marked_by_template(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, whole: str, spans: list[Span | None]
) -> list[Span | None]:
    """The spans, those of assistant's turns as the template's own `{% generation %}` has them."""
    tools = messages[0].get("tools")
    _, found = render_jinja_template(
        [list(messages)], tools=tools, chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True, **tokenizer.special_tokens_map,
    )  # fmt: skip
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    joined: list[list[int]] = []
    for start, end in found[0]:
        if joined and joined[-1][1] == start:  # the end of the turn in a block of its own
            joined[-1][1] = end
        else:
            joined.append([start, end])
    if len(joined) != len(places):
        raise ValueError(f"the chat template marks {len(joined)} of {len(places)} answers as generated")
    for i, (start, end) in zip(places, joined, strict=True):
        prompt = render(messages[:i], tokenizer, header=True)
        if whole.startswith(prompt) and len(prompt) < end:
            start = max(start, len(prompt))  # what the prompt has is never generated
        spans[i] = None if spans[i] is None else (start, end)
    return spans
