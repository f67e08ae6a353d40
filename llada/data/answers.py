"""Preferences from files to token ids: pairs for DPO, labelled answers for KTO.

Where an answer ends is a policy, because the likelihood of an answer depends on it (`EOS`):

    one     the answer, its end-of-turn token and one EOS, as SFT learns it; padding is not attended
    filled  the same, and EOS that count up to --max_length: for models trained with --eos_padding
    none    the answer's own tokens only
    padded  ELBO-KTO's published recipe: prompt and answer tokenised as one text, no end-of-turn token, cut at
            --max_length and filled up to it with EOS that is attended and never masked
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from llada.data.chat import (
    Row,
    Segment,
    encode_rows,
    fit,
    notes_of,
    refuse_mask_token,
    render_opened,
    split_conversation,
)
from llada.data.fields import Reader, as_turns
from llada.data.messages import Text
from llada.data.reading import BAD, Labelled, Record, note_bad, read
from llada.data.records import Located
from llada.data.template import encode_texts, fit_messages, hold_text

EOS = ("one", "filled", "none", "padded")
PLAIN = "plain texts among conversations, continued as they stand (--apply_chat_template makes them turns)"
_BATCH = 256


@dataclass(frozen=True)
class Encoding:
    """How answers become tokens."""

    tokenizer: PreTrainedTokenizerBase
    eos: str  # one of `EOS`
    chat: bool  # plain texts become a user's and an assistant's turn; messages always use the chat template
    max_length: int  # of prompt and answer together, in tokens
    long: str  # what to do with a longer answer: stop, leave it out, or cut its end
    parse_special: bool = False  # special tokens that a text spells are these tokens, instead of text
    drops_bad: bool = False  # what cannot be encoded is left out and counted, instead of ending the run


@dataclass(frozen=True)
class Tokens:
    """Token ids of a prompt and of an answer to it, int32."""

    context: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.context) + len(self.answer)


class Encoded(NamedTuple):
    """A prompt and an answer as the length limit left them."""

    tokens: Tokens | None  # None where nothing of the answer is left
    outcome: str  # kept, truncated, dropped, or bad
    prompt_length: int  # tokens
    text_length: int  # tokens of both together, before any cut


def encode_answers(
    items: Sequence[tuple[str, Text, Text]], encoding: Encoding, counts: Counter | None = None
) -> list[Encoded]:
    """The tokens of each ("file:line", prompt, answer); `counts` gets, in words, what a user should know."""
    counts = Counter() if counts is None else counts
    found: list[Encoded] = []
    num_plain = sum(isinstance(prompt, str) for _, prompt, _ in items)
    if not encoding.chat and 0 < num_plain < len(items):
        counts[PLAIN] += num_plain
    for start in range(0, len(items), _BATCH):
        batch = [
            (where, _usable(where, prompt, answer, encoding, counts))
            for where, prompt, answer in items[start : start + _BATCH]
        ]
        encode = _encode_joined if encoding.eos == "padded" else encode_rows
        rows = iter(encode([segments for _, segments in batch if segments], encoding.tokenizer))
        for where, segments in batch:
            if segments is None:
                found.append(Encoded(None, "bad", 0, 0))
                continue
            row = next(rows)
            refuse_mask_token(row["input_ids"], encoding.tokenizer, where)
            found.append(_fitted(_ended(row, encoding), where, encoding))
    return found


def _usable(
    where: str, prompt: Text, answer: Text, encoding: Encoding, counts: Counter
) -> list[Segment] | None:
    try:
        segments = _segments(prompt, answer, encoding)
    except ValueError as error:
        if not encoding.drops_bad:
            raise ValueError(f"{where}: {error}") from error
        note_bad(counts, f"{where}: {error}")
        return None
    counts.update(notes_of(prompt, encoding.tokenizer, parse_special=encoding.parse_special))
    return segments


def _segments(prompt: Text, answer: Text, encoding: Encoding) -> list[Segment]:
    """Pieces of the prompt and then the answer, each tokenised on its own unless joined later."""
    tokenizer = encoding.tokenizer
    if isinstance(prompt, str) and not encoding.chat:
        texts = [prompt, answer]
        if not encoding.parse_special:
            texts = [hold_text(text, tokenizer) for text in texts]
        return [(texts[0], False), (texts[1], True)]
    prompt, answer = as_turns(prompt, "user"), as_turns(answer, "assistant")
    if encoding.eos != "padded":
        (row,) = split_conversation(
            [*prompt, *answer], tokenizer, turns="last", parse_special=encoding.parse_special
        )
        return row
    turns = fit_messages([*prompt, *answer], tokenizer, parse_special=encoding.parse_special)
    return [(render_opened(turns[:-1], tokenizer), False), (turns[-1]["content"], True)]


def _encode_joined(rows: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Prompt and answer tokenised as one text; the published program counts the prompt's tokens apart."""
    found = []
    prompts = [row[0][0] for row in rows]
    texts = ["".join(text for text, _ in row) for row in rows]
    ids_of = zip(encode_texts(prompts, tokenizer), encode_texts(texts, tokenizer), strict=True)
    for prompt, ids in ids_of:
        found.append({"input_ids": ids, "in_answer": [i >= len(prompt) for i in range(len(ids))]})
    return found


def _ended(row: Row, encoding: Encoding) -> Row:
    """The row with the end that `encoding.eos` asks for; an answer is the last part of its row."""
    tokenizer = encoding.tokenizer
    input_ids, in_answer = list(row["input_ids"]), list(row["in_answer"])
    if encoding.eos == "none":
        added = tokenizer.added_tokens_decoder
        specials = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        while in_answer and in_answer[-1] and input_ids[-1] in specials:
            input_ids.pop()
            in_answer.pop()
    if encoding.eos == "filled":
        missing = max(0, encoding.max_length - len(input_ids))
        input_ids += [tokenizer.eos_token_id] * missing
        in_answer += [True] * missing
    return {"input_ids": input_ids, "in_answer": in_answer}


def _fitted(row: Row, where: str, encoding: Encoding) -> Encoded:
    start, length = row["in_answer"].count(False), len(row["input_ids"])
    outcome, cut = fit(row, where, encoding.max_length, encoding.long)
    if cut is None or start == length:  # no answer, or nothing left of it
        return Encoded(None, "dropped", start, length)
    ids = np.array(cut["input_ids"], dtype=np.int32)
    return Encoded(Tokens(ids[:start], ids[start:]), outcome, start, length)


def load_pairs(
    paths: Sequence[str], encoding: Encoding, reader: Reader, *, max_samples: int | None = None
) -> tuple[list[tuple[Tokens, Tokens]], Counter]:
    """(chosen, rejected) of every usable pair in order, and counts of kept, truncated, dropped and equal.

    A pair is dropped if one of its answers is, or if both are the same tokens.
    """
    counts: Counter = Counter(kept=0, truncated=0, dropped=0, equal=0)
    located = chain.from_iterable(read(path, reader, Record.pair, counts) for path in paths)
    located = list(islice(((where, pair) for where, _, pair in located), max_samples))
    both = encode_answers(
        [(where, pair.prompt, side) for where, pair in located for side in (pair.chosen, pair.rejected)],
        encoding,
        counts,
    )
    pairs = []
    for chosen, rejected in zip(both[::2], both[1::2], strict=True):
        if "bad" in (chosen.outcome, rejected.outcome):
            counts[BAD] -= chosen.outcome == rejected.outcome  # one record, however many answers
            continue
        if chosen.tokens is None or rejected.tokens is None:
            counts["dropped"] += 1
        elif np.array_equal(chosen.tokens.answer, rejected.tokens.answer):
            counts["equal"] += 1
        else:
            counts["kept" if chosen.outcome == rejected.outcome == "kept" else "truncated"] += 1
            pairs.append((chosen.tokens, rejected.tokens))
    return pairs, counts


def labelled_answers(
    source: str | Iterable[Located],
    reader: Reader,
    counts: Counter,
    *,
    split: str = "train",
    max_samples: int | None = None,
) -> list[tuple[str, Labelled]]:
    """("file:line", answer) of the records in order; a pair gives two, the chosen one first."""
    records = read(source, reader, Record.labelled, counts, split=split)
    answers = ((where, labelled) for where, _, found in records for labelled in found)
    return list(islice(answers, max_samples))
