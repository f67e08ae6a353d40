"""The chat template, and which tokens are the answers.

A conversation is tokenised in segments: the prompt up to an assistant turn, that turn's answer, what follows
up to the next one, ... A sampler sees the same segments (`render_prompt` builds prompts from them), so no
token straddles the border of prompt and answer, and no answer token is lost to a wrongly counted prompt.
"""

from collections.abc import Sequence

import jinja2
from transformers import PreTrainedTokenizerBase

from llada.data.messages import Message

Row = dict[str, list]
Segment = tuple[str, bool]
"""(text, is it learned)."""

TURNS = ("all", "last", "split")
LONG = ("error", "drop", "truncate")


def render_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, header: bool) -> str:
    """What the tokenizer's chat template makes; `header` asks for the assistant's header at the end."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruct model's, or "
            "plain prompts"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=header)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def _answer(prompt: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the template renders for the last message after `prompt`, end-of-turn token included.

    Templates differ in what comes next: nothing, an EOS, or (as published for LLaDA) always another assistant
    header. So the end is found from the content: the special token behind it closes the turn. None if the
    template does not render the content unchanged after this prompt.
    """
    full = render_template(messages, tokenizer, header=False)
    content = messages[-1]["content"].strip()
    answer = full.removeprefix(prompt)
    start = 0 if answer.startswith(content) else answer.find(content)
    if start < 0 or not full.startswith(prompt):
        return None
    end = start + len(content)
    rest = answer[end:].lstrip()
    specials = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    closing = max((token for token in specials if rest.startswith(token)), key=len, default=None)
    return answer[:end] if closing is None else answer[: len(answer) - len(rest) + len(closing)]


def _prompt_pieces(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompt for the answer that follows `messages`: prompt, answer, prompt, answer, ..., prompt.

    A single text if the template rewrites earlier turns when a turn is added (some drop their thoughts).
    """
    whole = render_template(messages, tokenizer, header=True)
    pieces: list[str] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_template(messages[:i], tokenizer, header=True)
        answer = _answer(prompt, messages[: i + 1], tokenizer)
        if answer is None or not prompt.startswith(done):
            return [whole]
        pieces += [prompt[len(done) :], answer]
        done = prompt + answer
    return [*pieces, whole[len(done) :]] if whole.startswith(done) else [whole]


def split_conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, turns: str = "all"
) -> list[list[Segment]]:
    """The rows of a conversation as lists of (text, is it learned); see `encode_conversation`."""
    if turns not in TURNS:
        raise ValueError(f"--turns {turns!r}: use one of {', '.join(TURNS)}")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    rows: list[list[Segment]] = []
    for i in answers if turns == "split" else answers[-1:]:
        pieces = _prompt_pieces(messages[:i], tokenizer)
        answer = _answer("".join(pieces), messages[: i + 1], tokenizer)
        if answer is None:
            raise ValueError("the chat template does not render the answer unchanged after its prompt")
        if turns == "all" and len(pieces) < 2 * len(answers) - 1:
            raise ValueError(
                "the chat template rewrites earlier turns when a turn is added, so they cannot be learned in "
                "one row: use --turns split"
            )
        learned = [turns == "all" and place % 2 == 1 for place in range(len(pieces))]
        rows.append([*zip(pieces, learned, strict=True), (answer, True)])
    return rows


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


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, nothing added; a longer text than the model reads gives no warning."""
    backend = tokenizer.backend_tokenizer
    # Left behind by earlier calls. Only then: another thread's encoding forbids to change the tokenizer.
    if backend.padding is not None:
        backend.no_padding()
    if backend.truncation is not None:
        backend.no_truncation()
    return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    turns: str = "all",
    where: str = "conversation",
) -> list[Row]:
    """The training rows of a conversation: `{"input_ids", "in_answer"}`; tokens in an answer are learned.

    An answer is the turn's content and its end-of-turn token; one EOS follows the last answer and is learned.
    What comes after the last answer is left out.

    Args:
        messages: as from `to_messages`.
        turns: "all": one row, every assistant turn is learned. "last": one row, only the last one.
            "split": a row for each assistant turn with its history as the prompt (LLaDA GUIDELINES.md, SFT).
        where: what to call the conversation in an error.

    Raises:
        ValueError: the text holds the mask token, or the chat template cannot be used this way.
    """
    try:
        rows = encode_rows(split_conversation(messages, tokenizer, turns=turns), tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for row in rows:
        refuse_mask_token(row["input_ids"], tokenizer, where)
    return rows


def refuse_mask_token(input_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """ValueError if the mask token stands in data: the model would be asked to predict noise."""
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token; load it with llada.models.tokens.load_tokenizer")
    if tokenizer.mask_token_id in input_ids:
        raise ValueError(
            f"{where}: the text contains the mask token {tokenizer.mask_token!r}; remove or rewrite it"
        )


def render_prompt(
    prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> list[int]:
    """Token ids to put in front of the answer, exactly those that training puts there.

    Args:
        prompt: a text, or messages ending with the user's turn.
        chat: render with the chat template, header of the answer included (a text becomes a user turn).
            Without it the text is continued as it stands.

    Raises:
        ValueError: messages without `chat`, a tokenizer without template, or the mask token in the prompt.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        pieces = _prompt_pieces(messages, tokenizer)
    elif isinstance(prompt, str):
        pieces = [prompt]
    else:
        raise ValueError(
            f"messages need the chat template; a plain prompt must be a string, got {prompt!r:.60}"
        )
    input_ids = [token_id for ids in encode_texts(pieces, tokenizer) for token_id in ids]
    refuse_mask_token(input_ids, tokenizer, "prompt")
    return input_ids


def drops_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template leaves system messages out."""
    probe = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    return "be brief" not in render_template(probe, tokenizer, header=True)
