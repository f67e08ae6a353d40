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

from llada.data.chat import encode_rows, encode_texts, refuse_mask_token, render_template, split_conversation
from llada.data.messages import Labelled, Pair, Text, to_labelled, to_pair
from llada.data.records import read_records

EOS = ("one", "filled", "none", "padded")
LONG = ("error", "drop", "truncate")
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
    tokenizer = encoding.tokenizer
    found: list[Encoded] = []
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        encode = _joint_rows if encoding.eos == "padded" else _segmented_rows
        rows = encode([_segments(*item, encoding) for item in batch], encoding)
        for (where, _, _), (context, answer) in zip(batch, rows, strict=True):
            refuse_mask_token([*context, *answer], tokenizer, where)
            found.append(_fit(context, answer, where, encoding))
    return found


def _segments(where: str, prompt: Text, answer: Text, encoding: Encoding) -> tuple[list[str], str]:
    """(pieces of the prompt, the answer) as texts, each tokenised on its own unless joined later."""
    if isinstance(prompt, str) and not encoding.chat:
        return [prompt], answer
    if isinstance(prompt, str):
        prompt, answer = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    if encoding.eos == "padded":
        return [render_template(prompt, encoding.tokenizer, header=True)], answer[0]["content"]
    try:
        (row,) = split_conversation([*prompt, *answer], encoding.tokenizer, turns="last")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return [text for text, _ in row[:-1]], row[-1][0]


def _segmented_rows(
    segments: Sequence[tuple[list[str], str]], encoding: Encoding
) -> Iterable[tuple[list[int], list[int]]]:
    tokenizer = encoding.tokenizer
    rows = encode_rows(
        [[*((piece, False) for piece in pieces), (answer, True)] for pieces, answer in segments], tokenizer
    )
    specials = set(tokenizer.all_special_ids) | {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for row in rows:
        start = row["in_answer"].index(True)
        context, answer = row["input_ids"][:start], row["input_ids"][start:]
        while encoding.eos == "none" and answer and answer[-1] in specials:
            answer.pop()
        if encoding.eos == "filled":
            answer += [tokenizer.eos_token_id] * (encoding.max_length - len(context) - len(answer))
        yield context, answer


def _joint_rows(
    segments: Sequence[tuple[list[str], str]], encoding: Encoding
) -> Iterable[tuple[list[int], list[int]]]:
    texts = ["".join(pieces) for pieces, _ in segments]
    whole = encode_texts([text + answer for text, (_, answer) in zip(texts, segments, strict=True)],
                         encoding.tokenizer)  # fmt: skip
    for prompt, ids in zip(encode_texts(texts, encoding.tokenizer), whole, strict=True):
        yield ids[: len(prompt)], ids[len(prompt) :]


def _fit(context: list[int], answer: list[int], where: str, encoding: Encoding) -> Encoded:
    room, length = encoding.max_length - len(context), len(context) + len(answer)
    outcome = "kept" if len(answer) <= room else "truncated"
    if outcome != "kept" and encoding.long == "error":
        raise ValueError(
            f"{where}: {length} tokens ({len(context)} of the prompt) do not fit in --max_length "
            f"{encoding.max_length}; raise it, or use --long drop or --long truncate"
        )
    if not answer or room <= 0 or (outcome != "kept" and encoding.long == "drop"):
        return Encoded(None, "dropped", len(context), length)
    tokens = Tokens(np.array(context, dtype=np.int32), np.array(answer[:room], dtype=np.int32))
    return Encoded(tokens, outcome, len(context), length)


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


def read_labelled(path: str, *, max_samples: int | None = None) -> list[tuple[str, Labelled]]:
    """("file:line", answer) of every record in order; a pair gives two, the chosen one first."""
    found: list[tuple[str, Labelled]] = []
    for where, record in read_records(path):
        found += [(where, labelled) for labelled in to_labelled(record, where)]
        if max_samples is not None and len(found) >= max_samples:
            return found[:max_samples]
    return found
