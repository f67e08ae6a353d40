"""How a drafter's tokens become a verifier's, and the verifier's answer the drafter's.

S tokens that the drafter may draw, D ids of the space it draws in (the width of q), n tokens of a text.

Three kinds, all exact, since acceptance asks only what the draft was drawn from:
    none: one vocabulary; ids carry over.
    vocabulary: the drafter draws only tokens that both have (by their bytes), with q renormalised on them.
    text: the drafter draws freely, and its text is tokenised again. Its q is of other tokens than the
        verifier's, so these drafts can only be accepted by match.
The drafter's canvas is [its own prompt, the answer so far in its own tokens, masks].

Source: Timor et al., arXiv 2502.05202: TLI (vocabulary intersection), SLEM (exact match of strings).
"""

import codecs
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llada.autoregressive.vocabulary import OTHER, TokenBytes, VocabMap
from llada.data.template import encode_texts
from modelling_final import LLaDAConfig

BRIDGES = ("none", "vocabulary", "text")
LOOK_BEHIND = 64  # bytes before the end of an answer that are tokenised again when it grows
_SPACES = b" \t\r\n"


class Bridge:
    """Tables between a drafter's outputs, the ids it draws, and the tokens of its canvas."""

    def __init__(
        self,
        kind: str,
        config: LLaDAConfig,
        drafter_tokenizer: PreTrainedTokenizerBase,
        verifier_tokenizer: PreTrainedTokenizerBase,
        *,
        num_outputs: int,
    ) -> None:
        """The bridge between two tokenizers; `config` is the drafter's, `num_outputs` the verifier's width.

        ValueError: kind "none" although the vocabularies differ, or "vocabulary" with nothing in common.
        """
        if kind not in BRIDGES:
            raise ValueError(f"--bridge {kind!r}: use one of {', '.join(BRIDGES)}")
        self.kind, self.mask_id = kind, config.mask_token_id
        self.vocabulary = VocabMap.between(drafter_tokenizer, verifier_tokenizer)
        self._verifier_tokenizer = verifier_tokenizer
        self._drafter_tokenizer = drafter_tokenizer
        self._canvas_text = GrowingText(drafter_tokenizer, self.vocabulary.source)
        target_of = self.vocabulary.target_of[: config.embedding_size].clone()
        if kind == "none" and not self.vocabulary.is_identity:
            raise ValueError(
                f"--bridge none: the drafter and the verifier have different vocabularies "
                f"({self.vocabulary.coverage:.0%} of the drafter's tokens are also the verifier's); use "
                "--bridge vocabulary (drafts of common tokens) or --bridge text (text tokenised again)"
            )
        ends = {*config.end_ids, self.vocabulary.source.closing}
        # a drafter that pads with EOS must still be able to draft EOS
        never = {config.mask_token_id, config.pad_token_id, drafter_tokenizer.bos_token_id} - ends
        target_of[[i for i in never if i is not None and i < len(target_of)]] = OTHER
        # a verifier's head can be narrower than its tokenizer
        target_of[target_of >= num_outputs] = OTHER
        if kind == "text":
            texts = self.vocabulary.source.texts[: config.embedding_size]
            draws = [i for i, text in enumerate(texts) if text or target_of[i] != OTHER]
            self.allowed = self.drawn_as = torch.tensor(draws)
            self.size = config.embedding_size
        else:
            # [S] drafter ids that may be drawn: never masks, padding, or the beginning of a text
            self.allowed = (target_of != OTHER).nonzero()[:, 0]
            # [S] the id that each of them counts as; several may share one
            self.drawn_as = target_of[self.allowed]
            self.size = num_outputs
        if not self.allowed.numel():
            raise ValueError("--bridge vocabulary: the two tokenizers have no token in common; use text")
        # [D] the drafter id that stands for a drawn id in the canvas
        # flipped: of several drafter tokens with one meaning the first stands for it
        self.feeds = torch.full((self.size,), self.mask_id)
        self.feeds[self.drawn_as.flip(0)] = self.allowed.flip(0)
        self._carried = range(min(num_outputs, config.embedding_size))

    def move(self, device: torch.device) -> None:
        """Puts the tables where the drafter is."""
        self.allowed, self.drawn_as = self.allowed.to(device), self.drawn_as.to(device)
        self.feeds = self.feeds.to(device)

    def canvas_prompt(self, prompt: Sequence[int]) -> list[int]:
        """The verifier's prompt in the drafter's tokens, special tokens by their role."""
        if self.kind == "none":
            return self.canvas_answer(prompt)
        # a chat prompt keeps the verifier's format; a drafter trained on another one knows its own better
        target, source, pieces, ids = self.vocabulary.target, self.vocabulary.source, [], []
        role_of = {i: role for role, i in target.ids_of_role.items()}
        for i in prompt:
            if i < len(target.texts) and target.texts[i] is not None:
                pieces.append(i)
                continue
            ids += self._encoded(pieces)
            pieces = []
            ids += [j for j in [source.ids_of_role.get(role_of.get(i))] if j is not None]
        return ids + self._encoded(pieces)

    def canvas_answer(self, answer: Sequence[int]) -> list[int]:
        """The verifier's answer so far in the drafter's tokens; bytes of half a character at its end wait."""
        if self.kind == "none":
            return [i for i in answer if i in self._carried and i != self.mask_id]
        return self._canvas_text.encode(self._written(answer))

    def weights(self, probabilities: Tensor) -> Tensor:
        """q [..., D] from probabilities [..., S] of the allowed tokens."""
        q = probabilities.new_zeros(*probabilities.shape[:-1], self.size)
        return q.index_add_(-1, self.drawn_as, probabilities)

    def chain(self, drawn: list[int], answer: Sequence[int]) -> list[int]:
        """Drawn ids as the verifier's tokens that go on after `answer`."""
        if self.kind != "text":
            return drawn
        source, closing = self.vocabulary.source, []
        for place, i in enumerate(drawn):
            if source.texts[i] is None:  # the end of the answer; other special tokens have no text to match
                closing, drawn = [int(self.vocabulary.target_of[i])], drawn[:place]
                break
        text = _whole_characters(source.decode(drawn))
        return self._continuation(text, answer) + closing

    def _written(self, ids: Sequence[int]) -> bytes:
        """The bytes of the verifier's tokens; spare columns of its head write nothing."""
        target = self.vocabulary.target
        return target.decode([i for i in ids if i < len(target.texts)])

    def _encoded(self, ids: Sequence[int]) -> list[int]:
        return encode_texts([_whole_characters(self._written(ids))], self._drafter_tokenizer)[0]

    def _continuation(self, text: str, answer: Sequence[int]) -> list[int]:
        """Tokens of `text` behind an answer whose own tokens stay as they are."""
        target, tokenizer = self.vocabulary.target, self._verifier_tokenizer
        if target.drops_first_space and answer:  # it would put a space in front of text that stands alone
            before = _whole_characters(self._written(answer[-4:]))
            known, whole = encode_texts([before, before + text], tokenizer)
            if whole[: len(known)] == known:
                return whole[len(known) :]
        return encode_texts([text], tokenizer)[0]


class GrowingText:
    """The tokens of a text that mostly grows: only its end is tokenised again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, table: TokenBytes) -> None:
        self._tokenizer, self._table = tokenizer, table
        self._text, self._ids = b"", []

    def encode(self, data: bytes) -> list[int]:
        """Token ids of a UTF-8 text; bytes of half a character at its end are left out."""
        data = _whole_characters(data).encode()
        num_kept, first = self._border(data)
        rest = encode_texts([data[first:].decode()], self._tokenizer)[0]
        self._text, self._ids = data, self._ids[:num_kept] + rest
        return list(self._ids)

    def _border(self, data: bytes) -> tuple[int, int]:
        """(number of tokens to keep, bytes that they write)."""
        if self._table.drops_first_space or not data.startswith(self._text):
            return 0, 0
        starts = self._table.starts(self._ids)[:-1]
        for num_kept in range(len(starts) - 1, 0, -1):
            first = int(starts[num_kept])
            if first > len(self._text) - LOOK_BEHIND:
                continue
            # where a word begins, which is a border for the tokenizers' own splitting too
            around = data[first - 1 : first + 2]
            if around[1:2] == b" " and around[0] not in _SPACES and around[2] not in _SPACES:
                return num_kept, first
        return 0, 0


def _whole_characters(data: bytes) -> str:
    """The text of bytes that may end within a character."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)
