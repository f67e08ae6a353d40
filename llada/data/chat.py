"""Conversations as tokens: which of them are the answers.

A conversation is tokenised in segments: the prompt up to an assistant turn, that turn's answer, what follows
up to the next one, ... A sampler sees the same segments (`render_prompt`), so no token straddles the border
of prompt and answer. An answer is what the template writes of the turn's content, and the special token that
ends the turn.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llada.data.messages import Message, Text
from llada.data.template import (
    Span,
    encode_texts,
    fit_messages,
    hold_text,
    spans_of,
    spells_special,
    style_of,
    uses_tools,
)

Row = dict[str, list]
Segment = tuple[str, bool]
"""(text, is it learned)."""

TURNS = ("all", "last", "split")
LONG = ("error", "drop", "truncate")
SYSTEM_LOST = "conversations whose system message the chat template does not write"
TOOLS = "conversations with tools, written as text: the chat template has no place for them"
SPELLED = "records that spell special tokens, kept as text (--parse_special_tokens makes them tokens)"


def split_conversation(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    turns: str = "all",
    parse_special: bool = False,
) -> list[list[Segment]]:
    """The rows of a conversation as lists of (text, is it learned).

    Args:
        messages: as from `to_messages`; an answer whose `learn` is False is context.
        turns: "all": one row, every assistant turn is learned. "last": one row, only the last one.
            "split": a row for each assistant turn with its history as the prompt (LLaDA GUIDELINES.md, SFT).
        parse_special: special tokens that the contents spell are these tokens, instead of text.

    ValueError: the contents spell the mask token, or the template cannot be used this way.
    """
    if turns not in TURNS:
        raise ValueError(f"--turns {turns!r}: use one of {', '.join(TURNS)}")
    messages = fit_messages(messages, tokenizer, parse_special=parse_special)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("learn", True)]
    if turns == "split":
        return [_segments(messages[: i + 1], {i}, tokenizer) for i in answers]
    learned = set(answers) if turns == "all" else {answers[-1]}
    return [_segments(messages[: answers[-1] + 1], learned, tokenizer)]


def _segments(
    messages: Sequence[Message], learned: set[int], tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """The segments of a row that ends with an answer."""
    whole, spans = spans_of(messages, tokenizer)
    last = len(messages) - 1
    if any(spans[i] is None for i in learned - {last}):
        raise ValueError(
            "the chat template rewrites earlier turns when a turn is added, so they cannot be learned in "
            "one row: use --turns split"
        )
    if spans[last] is None:
        return _behind_prompt(messages, tokenizer)
    return _cut(whole, spans, messages, learned, tokenizer)[:-1]  # nothing behind the last answer


def _cut(
    whole: str,
    spans: Sequence[Span | None],
    messages: Sequence[Message],
    learned: set[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Segment]:
    """What the template writes, cut at the borders of answers: prompt, answer, prompt, ..., the rest."""
    style = style_of(tokenizer)
    segments: list[Segment] = []
    done = 0
    for i, span in enumerate(spans):
        if span is None or messages[i]["role"] != "assistant":
            continue
        start, end = span
        start -= len(style.gap) if whole[done:start].endswith(style.gap) else 0
        # what a generation prompt has already is never generated
        start += len(style.opens_thought) if whole[start:end].startswith(style.opens_thought) else 0
        rest = whole[end:].lstrip()
        if style.closing and rest.startswith(style.closing):
            end = len(whole) - len(rest) + len(style.closing)
        segments += [(whole[done:start], False), (whole[start:end], i in learned)]
        done = end
    return [*segments, (whole[done:], False)]


def _behind_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The row of an answer that the template does not show: an empty one, or one whose thought it leaves out.

    It stands behind the generation prompt, as the model wrote it there.
    """
    style, content = style_of(tokenizer), messages[-1]["content"]
    if not content.strip() and not messages[-1].get("tool_calls"):
        return [*_prompt_segments(messages[:-1], tokenizer), (style.closing or "", True)]
    _, closing, answer = content.partition("</think>")
    shorter = {**messages[-1], "content": answer.strip()}
    if not closing or not style.has_header or spans_of([*messages[:-1], shorter], tokenizer)[1][-1] is None:
        raise ValueError("the chat template does not render the answer unchanged after its prompt")
    content = content.lstrip()
    if style.opens_thought and content.startswith("<think>"):
        content = content.removeprefix("<think>").removeprefix(style.opens_thought.removeprefix("<think>"))
    return [*_prompt_segments(messages[:-1], tokenizer), (content + (style.closing or ""), True)]


def _prompt_segments(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """What stands in front of an answer to these messages, cut at the borders of earlier answers."""
    if style_of(tokenizer).has_header:
        whole, spans = spans_of(messages, tokenizer, header=True)
        return _cut(whole, spans, messages, set(), tokenizer)
    # Without a generation prompt the header is what the template writes in front of a given answer.
    messages = [*messages, {"role": "assistant", "content": "It is."}]
    whole, spans = spans_of(messages, tokenizer)
    return _cut(whole, spans, messages, set(), tokenizer)[:-2]


def render_opened(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands in front of an answer to these messages, as one text."""
    return "".join(text for text, _ in _prompt_segments(messages, tokenizer))


def encode_rows(rows: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """`{"input_ids", "in_answer"}` of each row of segments; one EOS, to be learned, closes each row."""
    texts = [text for row in rows for text, _ in row]
    encoded = iter(encode_texts(texts, tokenizer))
    result = []
    for row in rows:
        input_ids: list[int] = []
        in_answer: list[bool] = []
        for _, is_learned in row:
            ids = next(encoded)
            input_ids += ids
            in_answer += [is_learned] * len(ids)
        if input_ids[-1] != tokenizer.eos_token_id:  # some templates close a turn with EOS itself
            input_ids.append(tokenizer.eos_token_id)
            in_answer.append(True)
        result.append({"input_ids": input_ids, "in_answer": in_answer})
    return result


def fit(row: Row, where: str, max_length: int, long: str) -> tuple[str, Row | None]:
    """("kept" | "truncated" | "dropped", the row as --long leaves it in `max_length` tokens).

    A longer row is an error, dropped, or cut at its end; dropped, too, if no token of an answer remains.
    """
    length = len(row["input_ids"])
    if length <= max_length:
        return "kept", row
    if long == "error":
        before = [*row["in_answer"], True].index(True)
        raise ValueError(
            f"{where}: {length} tokens ({before} before the first answer) do not fit in "
            f"--max_length {max_length}; raise it, or use --long drop or --long truncate"
        )
    cut = {name: values[:max_length] for name, values in row.items()}
    if long == "truncate" and any(cut["in_answer"]):
        return "truncated", cut
    return "dropped", None


def refuse_mask_token(input_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """ValueError if the mask token stands in data: the model would be asked to predict noise."""
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token; load it with llada.models.tokens.load_tokenizer")
    if tokenizer.mask_token_id in input_ids:
        raise ValueError(
            f"{where}: the text contains the mask token {tokenizer.mask_token!r}; remove or rewrite it"
        )


def render_prompt(
    prompt: str | Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool,
    parse_special: bool = False,
) -> list[int]:
    """Token ids to put in front of the answer, exactly those that training puts there.

    Args:
        prompt: a text, or messages ending with the user's turn.
        chat: render with the chat template, header of the answer included (a text becomes a user turn).
            Without it the text is continued as it stands.
        parse_special: special tokens that the prompt spells are these tokens, instead of text.

    ValueError: messages without `chat`, a tokenizer without template, or the mask token in the prompt.
    """
    if not chat and not isinstance(prompt, str):
        raise ValueError(
            f"messages need the chat template; a plain prompt must be a string, got {prompt!r:.60}"
        )
    try:
        if chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = fit_messages(messages, tokenizer, parse_special=parse_special)
            pieces = [text for text, _ in _prompt_segments(messages, tokenizer)]
        else:
            pieces = [prompt if parse_special else hold_text(prompt, tokenizer)]
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from error
    input_ids = [token_id for ids in encode_texts(pieces, tokenizer) for token_id in ids]
    refuse_mask_token(input_ids, tokenizer, "prompt")
    return input_ids


def notes_of(text: Text, tokenizer: PreTrainedTokenizerBase, *, parse_special: bool) -> list[str]:
    """What a user should know of a prompt, in words to be counted."""
    turns = [{"role": "user", "content": text}] if isinstance(text, str) else text
    notes = []
    if not parse_special and any(spells_special(turn["content"], tokenizer) for turn in turns):
        notes.append(SPELLED)
    if turns and turns[0]["role"] == "system" and style_of(tokenizer).drops_system:
        notes.append(SYSTEM_LOST)
    if uses_tools(turns) and not style_of(tokenizer).renders_tools:
        notes.append(TOOLS)
    return notes


def drops_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template leaves system messages out."""
    return style_of(tokenizer).drops_system
