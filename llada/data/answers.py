"""Preferences from files to token ids: pairs for DPO, labelled answers for KTO.

Where an answer ends is a policy, because the likelihood of an answer depends on it (`EOS`):

    one     the answer, its end-of-turn token and one EOS, as SFT learns it; padding is not attended
    filled  the same, and EOS that count up to --max_length: for models trained with --eos_padding
    none    the answer's own tokens only
    padded  ELBO-KTO's published recipe: prompt and answer tokenised as one text, no end-of-turn token, cut at
            --max_length and filled up to it with EOS that is attended and never masked
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from llada.data.chat import (
    Row,
    Segment,
    encode_rows,
    encode_texts,
    fit,
    refuse_mask_token,
    render_template,
    split_conversation,
)
from llada.data.messages import Labelled, Pair, Text, to_labelled, to_pair
from llada.data.records import Located, read_records

EOS = ("one", "filled", "none", "padded")
_BATCH = 256


@dataclass(frozen=True)
class Encoding:
    """How answers become tokens.

    Attributes:
        eos: one of `EOS`.
        chat: plain texts become a user's and an assistant's turn; messages always use the chat template.
        max_length: of prompt and answer together.
        long: what to do with a longer answer: stop, leave it out, or cut its end.
    """

    tokenizer: PreTrainedTokenizerBase
    eos: str
    chat: bool
    max_length: int
    long: str


@dataclass(frozen=True)
class Tokens:
    """Token ids of a prompt and of an answer to it, int32."""

    context: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.context) + len(self.answer)


class Encoded(NamedTuple):
    """A prompt and an answer as the length limit left them.

    tokens: None where nothing of the answer is left. outcome: kept, truncated or dropped.
    prompt_length, text_length: tokens of the prompt, and of both together before any cut.
    """

    tokens: Tokens | None
    outcome: str
    prompt_length: int
    text_length: int


def encode_answers(items: Sequence[tuple[str, Text, Text]], encoding: Encoding) -> list[Encoded]:
    """The tokens of each ("file:line", prompt, answer)."""
    found: list[Encoded] = []
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        encode = _encode_joined if encoding.eos == "padded" else encode_rows
        rows = encode([_segments(*item, encoding) for item in batch], encoding.tokenizer)
        for (where, _, _), row in zip(batch, rows, strict=True):
            refuse_mask_token(row["input_ids"], encoding.tokenizer, where)
            found.append(_fitted(_ended(row, encoding), where, encoding))
    return found


def _segments(where: str, prompt: Text, answer: Text, encoding: Encoding) -> list[Segment]:
    """Pieces of the prompt and then the answer, each tokenised on its own unless joined later."""
    if isinstance(prompt, str) and not encoding.chat:
        return [(prompt, False), (answer, True)]
    if isinstance(prompt, str):
        prompt, answer = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    if encoding.eos == "padded":
        header = render_template(prompt, encoding.tokenizer, header=True)
        return [(header, False), (answer[0]["content"], True)]
    try:
        (row,) = split_conversation([*prompt, *answer], encoding.tokenizer, turns="last")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return row


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
            input_ids.pop(), in_answer.pop()
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
    paths: Sequence[str], encoding: Encoding, *, keys: Mapping[str, str], max_samples: int | None = None
) -> tuple[list[tuple[Tokens, Tokens]], Counter]:
    """(chosen, rejected) of every usable pair in order, and counts of kept, truncated, dropped and equal.

    A pair is dropped if one of its answers is, or if both are the same tokens.
    """
    located: list[tuple[str, Pair]] = []
    for path in paths:
        for where, record in read_records(path):
            if max_samples is not None and len(located) == max_samples:
                break
            located.append((where, to_pair(record, where, keys)))
    sides = [
        encode_answers([(where, pair.prompt, answer(pair)) for where, pair in located], encoding)
        for answer in (lambda pair: pair.chosen, lambda pair: pair.rejected)
    ]
    counts: Counter = Counter(kept=0, truncated=0, dropped=0, equal=0)
    pairs = []
    for chosen, rejected in zip(*sides, strict=True):
        if chosen.tokens is None or rejected.tokens is None:
            counts["dropped"] += 1
        elif np.array_equal(chosen.tokens.answer, rejected.tokens.answer):
            counts["equal"] += 1
        else:
            counts["kept" if chosen.outcome == rejected.outcome == "kept" else "truncated"] += 1
            pairs.append((chosen.tokens, rejected.tokens))
    return pairs, counts


def labelled_answers(
    records: Iterable[Located], *, max_samples: int | None = None
) -> list[tuple[str, Labelled]]:
    """("file:line", answer) of located records in order; a pair gives two, the chosen one first."""
    found: list[tuple[str, Labelled]] = []
    for where, record in records:
        found += [(where, labelled) for labelled in to_labelled(record, where)]
        if max_samples is not None and len(found) >= max_samples:
            return found[:max_samples]
    return found
