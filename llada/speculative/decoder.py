"""Speculative decoding: a LLaDA model drafts, an autoregressive model verifies and decides every token.

    draft:   masks behind [prompt, answer so far] become tokens   drafter.py
    verify:  one forward of the verifier over the drafted tokens   verifier.py
    accept:  the first n of them stay, one more token comes from the verifier   acceptance.py
    bridge:  between two tokenizers   bridge.py
    generate(custom_generate=...) of transformers   generate.py

The output has exactly the verifier's distribution; at temperature 0 it is its greedy output (up to rounding:
a forward over several tokens rounds otherwise than one over a single token, and equal logits can change
places). Prompts are decoded one after the other; a batch would wait for its least accepted draft.

K chains, G tokens of a draft, V outputs of the verifier.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from llada.speculative.acceptance import (
    Accepted,
    Draws,
    GreedyDraws,
    KeyedDraws,
    by_block,
    by_match,
    by_token,
)
from llada.speculative.bridge import Bridge
from llada.speculative.drafter import Draft, Drafter
from llada.speculative.settings import SpeculativeSettings
from llada.speculative.verifier import Verifier, shared_length, warpers
from modelling_final import LLaDAModelLM

IsDone = Callable[[list[int]], bool]


@dataclass
class SpeculativeStats:
    """Counts and seconds; add them up with +=."""

    rounds: int = 0
    tokens: int = 0
    # of each position k: drafts that came to it with all before accepted, and those whose token k was, too
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    draft_forwards: int = 0
    verifier_forwards: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """tau: tokens of output for each forward of the verifier."""
        return self.tokens / max(1, self.rounds)

    @property
    def acceptance_by_position(self) -> list[float]:
        """alpha_k: of the drafts whose tokens before k were accepted, the share whose k-th was too."""
        # 0 where no draft came so far
        return [a / max(1, r) for a, r in zip(self.accepted, self.reached, strict=True)]

    @property
    def seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds

    def count_round(self, num_drafted: int, num_accepted: int, num_tokens: int) -> None:
        """Notes a round whose draft had `num_drafted` tokens and gave `num_tokens` tokens of output."""
        self.rounds += 1
        self.tokens += num_tokens
        self._widen(num_drafted)
        for k in range(min(num_drafted, num_accepted + 1, num_tokens)):
            self.reached[k] += 1
            self.accepted[k] += k < num_accepted

    def __iadd__(self, other: "SpeculativeStats") -> "SpeculativeStats":
        self._widen(len(other.reached))
        for name, value in vars(other).items():
            if isinstance(value, list):
                for k, number in enumerate(value):
                    getattr(self, name)[k] += number
            else:
                setattr(self, name, getattr(self, name) + value)
        return self

    def _widen(self, num_positions: int) -> None:
        for counts in (self.reached, self.accepted):
            counts += [0] * (num_positions - len(counts))


class SpeculativeDecoder:
    """A drafter and a verifier under fixed settings; decodes one prompt at a time."""

    def __init__(
        self,
        drafter: LLaDAModelLM,
        verifier: PreTrainedModel,
        bridge: Bridge,
        settings: SpeculativeSettings,
        *,
        processors: LogitsProcessorList | None = None,
    ) -> None:
        """A decoder; `processors` turn the verifier's logits into its scores, default those of the settings.

        ValueError: settings out of range or not exact together, or a model that cannot verify.
        """
        settings.check()
        self.settings, self.rule = settings, settings.rule(bridge.kind)
        if processors is None:
            processors = warpers(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        self.verifier = Verifier(verifier, processors)
        self.drafter = Drafter(
            drafter,
            bridge,
            settings,
            warpers=warpers(temperature=settings.drafter_temperature, top_p=settings.draft_top_p),
            keeps_q=self.rule != "match",
        )

    def decode(
        self,
        prompt: Sequence[int],
        drafter_prompt: Sequence[int],
        *,
        record_id: int,
        max_new_tokens: int | None = None,
        is_done: IsDone,
    ) -> tuple[list[int], SpeculativeStats]:
        """The verifier's answer to `prompt`, and what it took.

        Args:
            drafter_prompt: the same prompt in the drafter's tokens, and in its own chat format.
            record_id: with the seed, the key of every random draw.
            max_new_tokens: default the settings'.
            is_done: whether an answer ends with its last token.

        ValueError: a prompt that is empty or, with its answer, longer than a model's context.
        """
        limit = max_new_tokens or self.settings.max_new_tokens
        self.check_lengths(len(prompt), len(drafter_prompt), limit)
        self.drafter.start(list(drafter_prompt))
        return self._decode(list(prompt), limit, record_id, is_done, drafts=True)

    def decode_plain(
        self,
        prompt: Sequence[int],
        *,
        record_id: int,
        max_new_tokens: int | None = None,
        is_done: IsDone,
    ) -> tuple[list[int], SpeculativeStats]:
        """The verifier alone, a token for each forward: at temperature 0, and by match, the same answer."""
        limit = max_new_tokens or self.settings.max_new_tokens
        self.check_lengths(len(prompt), 1, limit)
        return self._decode(list(prompt), limit, record_id, is_done, drafts=False)

    def explain_difference(
        self, prompt: Sequence[int], answer: Sequence[int], plain: Sequence[int], *, record_id: int
    ) -> dict[str, Any]:
        """Where two answers that should be equal part, and whether rounding explains it.

        `gap`: by how much the scores of the two tokens differ there (with their noise, when sampling).
        `rounding`: by how much any score differs between a forward over all of the text and one over its last
        token with the others' keys kept. `is_rounding`: the gap is at most four times that.
        """
        place = shared_length(answer, plain)
        text, both = [*prompt, *plain[:place]], [plain[place], answer[place]]
        # whole text in one forward, and last token with kept keys: the two ways that rounded differently
        self.verifier.start()
        whole = self.verifier.scores(text, [[]])[0]
        self.verifier.start()
        self.verifier.scores(text[:-1], [[]])
        last = self.verifier.scores(text, [[]])[0]
        rounding = float((whole - last).masked_fill(whole == -torch.inf, 0).abs().max())
        draws = self._draws(record_id)[0]
        noisy = (
            whole[0] if isinstance(draws, GreedyDraws) else draws.noisy([place], whole.softmax(-1)).log()[0]
        )
        gap = abs(float(noisy[both[0]] - noisy[both[1]]))
        return {"place": place, "gap": gap, "rounding": rounding, "is_rounding": gap <= 4 * rounding}

    def check_lengths(self, num_prompt: int, num_drafter_prompt: int, max_new_tokens: int) -> None:
        """ValueError unless both models have room. A canvas may fill up before the end: drafts then stop."""
        if not num_prompt or not num_drafter_prompt:
            raise ValueError("the prompt is empty; give at least one token, for example BOS")
        config = self.verifier.model.config.get_text_config(decoder=True)
        contexts = {
            "verifier": (num_prompt + max_new_tokens, getattr(config, "max_position_embeddings", None)),
            "drafter": (num_drafter_prompt + 1, self.drafter.model.config.max_sequence_length),
        }
        if self.drafter.bridge.kind == "none":
            contexts["drafter"] = (num_drafter_prompt + max_new_tokens, contexts["drafter"][1])
        for name, (needed, context) in contexts.items():
            if context is not None and needed > context:
                raise ValueError(
                    f"a prompt of {num_prompt} tokens ({num_drafter_prompt} of the drafter's) and "
                    f"--max_new_tokens {max_new_tokens} exceed the {name}'s context of {context} tokens"
                )

    def _draws(self, record_id: int) -> tuple[Draws, Draws, Draws | None]:
        """The verifier's, the drafter's, and those of the first chain of a draft accepted by match."""
        seed, greedy = self.settings.seed, GreedyDraws()
        verify = greedy if self.settings.temperature == 0 else KeyedDraws(seed, record_id, "verify")
        draft = KeyedDraws(seed, record_id, "draft")
        # with match, the first chain shares the verifier's noise, so close distributions agree more often
        if self.settings.drafter_temperature == 0:
            return verify, greedy, greedy if self.rule == "match" else None
        return verify, draft, verify if self.rule == "match" else None

    def _decode(
        self, prompt: list[int], limit: int, record_id: int, is_done: IsDone, *, drafts: bool
    ) -> tuple[list[int], SpeculativeStats]:
        verify_draws, draft_draws, lead = self._draws(record_id)
        self.verifier.start()
        before = self.drafter.forwards, self.verifier.forwards
        answer, stats, recent = [], SpeculativeStats(), float(self.settings.draft_length)
        while True:
            started, room = time.perf_counter(), limit - len(answer) - 1
            # the last token of an answer is the verifier's own, so there is nothing to draft for it
            draft = Draft([[]], None)
            if drafts and room > 0:
                draft = self.drafter.draft(answer, min(self._length(recent), room), draft_draws, lead)
                # tokenised again, a draft can be longer than its masks
                draft = draft._replace(chains=[chain[:room] for chain in draft.chains])
            drafted = time.perf_counter()
            scores = self.verifier.scores(prompt + answer, draft.chains)
            accepted = self._accept(draft, scores, verify_draws, len(answer))
            chain = draft.chains[accepted.chain]
            num_before = len(answer)
            # an end token within the draft ends the answer, whatever was accepted behind it
            for token in [*chain[: accepted.num], accepted.token]:
                answer.append(token)
                if ends := is_done(answer):
                    break
            stats.draft_seconds += drafted - started
            stats.verify_seconds += time.perf_counter() - drafted
            stats.count_round(len(chain), accepted.num, len(answer) - num_before)
            if ends or len(answer) >= limit:
                break
            if chain:
                recent += (accepted.num - recent) / 4  # remembers about the last four drafts
        stats.draft_forwards = self.drafter.forwards - before[0]
        stats.verifier_forwards = self.verifier.forwards - before[1]
        return answer, stats

    def _length(self, recent: float) -> int:
        """Masks for the next draft; the rule of DiffuSpec (arXiv 2510.02358) in its simplest form."""
        if not self.settings.adaptive_length:
            return self.settings.draft_length
        return min(self.settings.draft_length, round(1.5 * recent) + 2)

    def _accept(self, draft: Draft, scores: Tensor, draws: Draws, position: int) -> Accepted:
        if self.rule == "match":
            is_greedy = self.settings.temperature == 0
            return by_match(draft.chains, scores if is_greedy else scores.softmax(-1), draws, position)
        p = scores.softmax(dim=-1)
        # an empty draft is plain decoding; q has no rows then
        if not any(draft.chains):
            return Accepted(0, 0, draws.choose(p[0, :1])[0])
        if self.rule == "block":
            return by_block(draft.chains[0], draft.q[0].to(p), p[0], draws)
        return by_token(draft.chains, draft.q.to(p), p, draws)


def ends_with(end_ids: Sequence[int]) -> IsDone:
    """Whether an answer's last token is one of these."""
    ends = frozenset(end_ids)
    return lambda answer: answer[-1] in ends
