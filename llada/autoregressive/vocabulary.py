"""Two tokenizers side by side: which token of one is which of the other, and where both start a token.

Tokens are compared by the bytes that they decode to, never by their spelling or number: `Ġthe`, `▁the` and a
byte-level id are one token if they all write " the". Special tokens have no bytes and are compared by role
(beginning, end of turn, end of text, headers, ...). What has no counterpart belongs to an explicit "other".

N rows, S source columns (at least the source's ids), T target ids, n tokens of a text.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

OTHER = -1  # no counterpart
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level BPE
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # sentencepiece's token of a byte that nothing else writes

# role -> the spellings it has in well-known tokenizers; the first column is LLaDA's.
ROLE_SPELLINGS = {
    "bos": ("<|startoftext|>", "<BOS>", "<bos>", "<s>", "<|begin_of_text|>"),
    "eos": ("<|endoftext|>", "<EOS>", "<eos>", "</s>", "<|end_of_text|>"),
    "eot": ("<|eot_id|>", "<eot_id>", "<|im_end|>", "<end_of_turn>", "<|end|>"),
    "start_header": ("<|start_header_id|>", "<start_id>"),
    "end_header": ("<|end_header_id|>", "<end_id>"),
}
ROLE_OF_SPELLING = {spelling: role for role, spellings in ROLE_SPELLINGS.items() for spelling in spellings}


@dataclass(frozen=True)
class TokenBytes:
    """A tokenizer as bytes."""

    texts: list[bytes | None]  # bytes of each id; None for special tokens and for ids that no token has
    tokens: list[str | None]  # spelling of each id, None for ids that no token has
    ids_of_role: dict[str, int]  # role -> id, for the special tokens whose role is known
    drops_first_space: bool  # decoding removes the space in front of a text (sentencepiece adds one)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenBytes":
        """The table of a fast tokenizer: byte-level BPE, or sentencepiece; else ValueError."""
        kind = _Decoder.of(tokenizer)
        vocabulary = tokenizer.get_vocab()
        size = max(vocabulary.values()) + 1
        # ids can have gaps, and a model more outputs than ids
        texts: list[bytes | None] = [None] * size
        tokens: list[str | None] = [None] * size
        added = tokenizer.added_tokens_decoder
        specials = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        for token, i in vocabulary.items():
            tokens[i] = token
            if i not in specials:
                texts[i] = token.encode() if i in added else kind.text_of(token)
        return cls(texts, tokens, _roles(tokenizer, vocabulary), kind.drops_first_space)

    @property
    def closing(self) -> int | None:
        """The token that ends an answer: end of turn, or end of text where there is none."""
        return self.ids_of_role.get("eot", self.ids_of_role.get("eos"))

    @cached_property
    def id_of_text(self) -> dict[bytes, int]:
        """bytes -> id: a real token before a byte-fallback one, then the lowest id."""
        known = [i for i, text in enumerate(self.texts) if text]
        known.sort(key=lambda i: (_FALLBACK.fullmatch(self.tokens[i]) is not None, i))
        return {self.texts[i]: i for i in reversed(known)}

    @cached_property
    def id_of_special(self) -> dict[str, int]:
        """spelling -> id of the special tokens, and of other tokenizers' spellings of the same roles."""
        roles = ROLE_OF_SPELLING.items()
        others = {text: self.ids_of_role[role] for text, role in roles if role in self.ids_of_role}
        own = {token: i for i, token in enumerate(self.tokens) if token and self.texts[i] is None}
        return others | own

    def id_of_foreign(self, spelling: str) -> int | None:
        """The id of a special token as some other tokenizer spells it, None if there is none here."""
        if ROLE_OF_SPELLING.get(spelling) in ("eot", "eos"):
            return self.closing  # whatever ends an answer there is what ends one here
        return self.id_of_special.get(spelling)

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of a text's tokens; special tokens write nothing."""
        return b"".join(self.texts[i] or b"" for i in ids)

    def starts(self, ids: Sequence[int]) -> np.ndarray:
        """[n + 1] where each token begins in the text's bytes, and where the text ends."""
        return _starts(self.texts[i] for i in ids)


@dataclass(frozen=True)
class VocabMap:
    """The tokens of a source vocabulary in a target vocabulary."""

    target_of: Tensor  # [source ids] long, target id of each, -1 = other; several may share one
    source: TokenBytes
    target: TokenBytes
    is_identity: bool  # every id that both have means the same in both, so ids carry over

    @classmethod
    def between(cls, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> "VocabMap":
        """The map from one tokenizer's ids to another's; ValueError where tokens do not stand for bytes.

        In this order: the same spelling under the same id; the token that ends an answer to the one that
        does; the same bytes; among special tokens the same spelling, then the same role.
        """
        ours = TokenBytes.of(source)
        theirs = ours if target is source else TokenBytes.of(target)
        role_of = {i: role for role, i in ours.ids_of_role.items()}
        target_of, is_identity = [OTHER] * len(ours.tokens), True
        for i, (token, text) in enumerate(zip(ours.tokens, ours.texts, strict=True)):
            if token is None:
                continue
            there = (theirs.tokens[i], theirs.texts[i]) if i < len(theirs.tokens) else (None, None)
            if there == (token, text):
                target_of[i] = i
                continue
            is_identity &= there[0] is None
            if text is not None:
                found = theirs.id_of_text.get(text)
            elif i == ours.closing and theirs.closing is not None:
                found = theirs.closing
            else:
                role = role_of.get(i)
                found = theirs.id_of_special.get(token, theirs.ids_of_role.get(role))
                if found is None and role in ("eot", "eos"):
                    found = theirs.closing
            target_of[i] = OTHER if found is None else found
        return cls(torch.tensor(target_of), ours, theirs, is_identity)

    @property
    def source_size(self) -> int:
        """Source ids; a model's logits may have more columns, which belong to other."""
        return self.target_of.numel()

    @property
    def target_size(self) -> int:
        """Target ids T."""
        return len(self.target.tokens)

    @cached_property
    def is_mapped(self) -> Tensor:
        """[source ids] bool, the source ids that have a counterpart."""
        return self.target_of != OTHER

    @property
    def coverage(self) -> float:
        """The share of the source's tokens that have a counterpart."""
        known = sum(token is not None for token in self.source.tokens)
        return int(self.is_mapped.sum()) / known

    def project(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Source log-probabilities as target log-probabilities and that of "other", in float32.

            log p'(v) = log sum_{u: target_of(u) = v} p(u),   log p'(other) likewise over the rest

        `log_probs`: [..., S], normalised. Returns [..., T] (-inf where no source token lands) and [...].
        """
        log_probs = log_probs.float()
        num_spare = log_probs.shape[-1] - self.source_size  # columns past the source's ids are other
        if num_spare < 0:
            raise ValueError(
                f"{log_probs.shape[-1]} columns are fewer than the source tokenizer's {self.source_size} ids"
            )
        # one bucket for each target id, and the last for all that has none
        bucket = torch.where(self.is_mapped, self.target_of, self.target_size)
        bucket = torch.nn.functional.pad(bucket, (0, num_spare), value=self.target_size).to(log_probs.device)
        shape = (*log_probs.shape[:-1], self.target_size + 1)
        index = bucket.expand(log_probs.shape)
        # logsumexp by bucket: exponentials relative to each bucket's own maximum neither over- nor underflow
        top = log_probs.new_full(shape, -torch.inf).scatter_reduce(-1, index, log_probs, "amax")
        shift = top.masked_fill(top == -torch.inf, 0.0)
        scaled = (log_probs - shift.gather(-1, index)).exp()
        projected = torch.zeros(shape, device=log_probs.device).scatter_add(-1, index, scaled).log() + shift
        return projected[..., :-1], projected[..., -1]


def align_texts(
    source: Sequence[bytes | None],
    target: Sequence[bytes | None],
    drops_first_space: tuple[bool, bool] = (False, False),
) -> np.ndarray:
    """[target tokens] which source token begins where each target token begins, -1 = none.

    `source`, `target`: what each token writes, together the same bytes, or ValueError; None is a special
    token, which belongs to a special token at the same place. `drops_first_space`: of the two tokenizers.
    """
    ours, theirs = (b"".join(text or b"" for text in texts) for texts in (source, target))
    # sentencepiece puts a space in front of a text that the other tokenizer has not
    shift = 0
    if ours != theirs and drops_first_space[0] != drops_first_space[1]:
        shift = int(ours.startswith(b" ")) - int(theirs.startswith(b" "))
        ours, theirs = ours[max(shift, 0) :], theirs[max(-shift, 0) :]
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        at = min(len(ours), len(theirs)) if at is None else at
        raise ValueError(
            f"the two texts differ from byte {at} on: {ours[at : at + 20]!r} in the source's tokens, "
            f"{theirs[at : at + 20]!r} in the target's"
        )
    index_of = {place: i for i, place in enumerate(_places(source, max(shift, 0)))}
    return np.array([index_of.get(place, OTHER) for place in _places(target, max(-shift, 0))], dtype=np.int64)


def text_of(data: bytes) -> str | None:
    """The text of these bytes; None if there is none, or only a part of its last character."""
    try:
        return data.decode() or None
    except UnicodeDecodeError:
        return None


def _starts(texts: Iterable[bytes | None]) -> np.ndarray:
    return np.cumsum([0, *(len(text or b"") for text in texts)])


def _places(texts: Sequence[bytes | None], dropped: int) -> list[tuple[int, int]]:
    """(first byte, 0 for text else index among the special tokens at this place, from 1) of each token."""
    places, num_special = [], 0
    for text, start in zip(texts, _starts(texts), strict=False):
        num_special = num_special + 1 if text is None else 0
        places.append((max(0, int(start) - dropped), num_special))
    return places


def _roles(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int]) -> dict[str, int]:
    """role -> id. A known spelling decides; the tokenizer's own attribute fills in what is left."""
    roles: dict[str, int] = {}
    for spelling, role in ROLE_OF_SPELLING.items():
        if spelling in vocabulary:
            roles.setdefault(role, vocabulary[spelling])
    for role in ("bos", "eos"):
        i = getattr(tokenizer, f"{role}_token_id")
        # SmolLM2 calls its <|im_end|> eos: that is a known end of turn, and stays one
        if i is not None and i not in roles.values():
            roles[role] = i
    return roles


@dataclass(frozen=True)
class _Decoder:
    """How a tokenizer's spellings become bytes, read from its decoder."""

    is_byte_level: bool
    space: str
    has_byte_fallback: bool
    drops_first_space: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "_Decoder":
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
        decoder = state.get("decoder") or {}
        parts = {part["type"]: part for part in decoder.get("decoders", [decoder]) if part}
        if "ByteLevel" in parts:
            return cls(True, "", False, False)
        fallback = "ByteFallback" in parts or bool(state.get("model", {}).get("byte_fallback"))
        if "Metaspace" in parts:
            scheme = parts["Metaspace"].get("prepend_scheme", "always")
            return cls(False, parts["Metaspace"]["replacement"], fallback, scheme != "never")
        if parts.get("Replace", {}).get("content") == " ":
            space = parts["Replace"]["pattern"]["String"]
            return cls(False, space, fallback, parts.get("Strip", {}).get("start", 0) > 0)
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r}: its tokens cannot be read as bytes (decoder "
            f"{sorted(parts) or 'missing'}); byte-level BPE and sentencepiece tokenizers can"
        )

    def text_of(self, token: str) -> bytes:
        """The bytes of an ordinary token."""
        if self.is_byte_level:
            codes = [_BYTE_OF.get(character) for character in token]
            # as the decoder does: a spelling with a foreign character stands for itself
            return token.encode() if None in codes else bytes(codes)
        if self.has_byte_fallback and (found := _FALLBACK.fullmatch(token)):
            return bytes([int(found[1], 16)])
        return token.replace(self.space, " ").encode()
