"""A LLaDA model that drafts the next tokens: masks behind the answer so far, filled in one or more forwards.

K chains drafted side by side, G masks (tokens of a draft), L canvas columns before them, R columns wanted of
a forward, S tokens that may be drawn, D width of q, E head outputs.

What a draft was drawn from decides how it may be accepted (see acceptance.py), and never whether the
output is right: keys and values of an earlier forward, an unsuitable model, or a shortened canvas only cost
acceptance.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from llada.speculative.acceptance import Draws
from llada.speculative.bridge import Bridge
from llada.speculative.settings import SpeculativeSettings
from llada.speculative.verifier import shared_length
from modelling_final import WindowCache
from modelling_final.remasking_llada import pick_top, transfer_schedule


class Draft(NamedTuple):
    """Chains in the verifier's tokens, and where acceptance needs it what each token was drawn from."""

    chains: list[list[int]]
    q: Tensor | None  # [K, G, D]


class Drafter:
    """Drafts for one prompt at a time; keeps the keys and values of the canvas from draft to draft."""

    def __init__(
        self,
        model: nn.Module,
        bridge: Bridge,
        settings: SpeculativeSettings,
        *,
        warpers: LogitsProcessorList,
        keeps_q: bool,
    ) -> None:
        """A drafter; `warpers` apply to its logits; `keeps_q`: hand out what tokens were drawn from."""
        self.model, self.bridge, self.settings, self.warpers = model.eval(), bridge, settings, warpers
        self.keeps_q = keeps_q
        self.device = next(model.parameters()).device
        bridge.move(self.device)
        self.forwards = 0
        self.start([])

    def start(self, prompt: list[int]) -> None:
        """Forgets what was; the canvas now begins with these drafter ids."""
        self._prompt, self._held, self._cache = list(prompt), [], None

    @torch.no_grad()
    def draft(self, answer: Sequence[int], length: int, draws: Draws, lead: Draws | None = None) -> Draft:
        """At most `length` tokens to follow the verifier's `answer`; fewer if q is flat or the canvas full.

        `draws` chooses the tokens; `lead` those of the first chain, by output position, for acceptance by
        match.
        """
        canvas = self._prompt + self.bridge.canvas_answer(answer)
        length = min(length, self.model.config.max_sequence_length - len(canvas))
        num_chains = self.settings.num_chains
        if length < 1:
            return Draft([[]] * num_chains, torch.empty(num_chains, 0, self.bridge.size, device=self.device))
        # [1, then K, G] drafter ids
        window = torch.full((1, length), self.bridge.mask_id, device=self.device)
        drawn = torch.zeros(num_chains, length, dtype=torch.long, device=self.device)
        peaks = torch.ones(num_chains, length, device=self.device)  # largest probability of each token's q
        rows_of_q, num_before, num_done = [], 0, 0
        for step, count in enumerate(transfer_schedule(length, self.settings.steps_of(length))):
            # the first masks that are left, or with draft "confidence" those with the most probable tokens
            columns = self._columns(window, num_done, count)
            logits = self._logits(canvas, window, columns, num_known=num_before, is_first=step == 0)
            q = self._weights(logits).expand(num_chains, -1, -1)  # [K, R, D]
            window, columns = window.expand(num_chains, -1).clone(), columns.expand(num_chains, -1)
            tokens = self._draw(q, columns, len(answer), draws, lead)
            if self.keeps_q:
                rows_of_q.append(q)
            peak = q.amax(dim=-1).to(peaks.dtype)
            # the surest of all masks that are left, by the probability of the token that was drawn
            if columns.shape[1] > count:
                scores = q.gather(-1, tokens[..., None])[..., 0]
                best = pick_top(scores, torch.ones_like(scores, dtype=torch.bool), count)
                best = best.logical_not().long().argsort(dim=1, stable=True)[:, :count]
                columns, tokens, peak = (x.gather(1, best) for x in (columns, tokens, peak))
            drawn.scatter_(1, columns, tokens)
            peaks.scatter_(1, columns, peak)
            window.scatter_(1, columns, self.bridge.feeds[tokens])
            num_before, num_done = num_done, num_done + count
            if self.settings.draft == "left_to_right" and self._all_end(peaks[:, :num_done]):
                break
        # keys of masks would be seen by the next draft as if they were text
        self._forget_window(canvas, length)
        chains = self._chains(drawn[:, :num_done], peaks[:, :num_done], answer)
        return Draft(chains, torch.cat(rows_of_q, dim=1) if self.keeps_q else None)

    def _columns(self, window: Tensor, num_done: int, count: int) -> Tensor:
        """Columns [1 or K, R] of the masks that the coming step looks at."""
        if self.settings.draft != "confidence":
            return torch.arange(num_done, num_done + count, device=self.device).expand(len(window), -1)
        is_known = (window != self.bridge.mask_id).long()
        return is_known.argsort(dim=1, stable=True)[:, : window.shape[1] - num_done]

    def _logits(
        self, canvas: list[int], window: Tensor, columns: Tensor, *, num_known: int, is_first: bool
    ) -> Tensor:
        """Logits [1 or K, R, E] of the window's columns, `num_known` of which are as at the last forward."""
        if not self.settings.draft_cache:
            rows = torch.tensor(canvas, device=self.device).expand(len(window), -1)
            rows, offset, cache = torch.cat([rows, window], dim=1), len(canvas), None
        elif is_first:
            cache = self._cached(canvas)
            rows = torch.tensor(canvas[cache.get_seq_length() :], device=self.device)[None]
            rows, offset = torch.cat([rows.long(), window], dim=1), rows.shape[1]
        else:
            # left to right, what stood at the last forward is not computed again; otherwise masks lie between
            cache, first = self._cache, 0 if self.settings.draft == "confidence" else num_known
            if cache.layers[0].keys.shape[0] < len(window):
                cache.batch_repeat_interleave(len(window))
            cache.window = (len(canvas) + first, len(canvas) + window.shape[1])
            rows, offset = window[:, first:], -first
        self.forwards += 1
        return self.model(input_ids=rows, past_key_values=cache, query_positions=columns + offset).logits

    def _cached(self, canvas: list[int]) -> WindowCache:
        """The cache, cut back to what it shares with this canvas."""
        if self._cache is None:
            self._cache = WindowCache(self.model.config)
        num_shared = shared_length(self._held, canvas)
        self._cache.crop(num_shared - len(self._held))
        return self._cache

    def _forget_window(self, canvas: list[int], length: int) -> None:
        """Takes the masks, and what was drafted for them, out of the cache."""
        if self._cache is not None:
            self._cache.window = None
            if self._cache.layers[0].keys.shape[0] > 1:
                self._cache.batch_select_indices(torch.zeros(1, dtype=torch.long, device=self.device))
            self._cache.crop(-length)
            self._held = canvas

    def _weights(self, logits: Tensor) -> Tensor:
        """q [1 or K, R, D] of logits [1 or K, R, E], float32 or float64."""
        scores = logits[..., self.bridge.allowed]
        # q decides what is accepted: half precision would make ratios wrong
        scores = scores if scores.dtype == torch.float64 else scores.float()
        scores = self.warpers(None, scores.flatten(0, 1)).unflatten(0, scores.shape[:2])
        return self.bridge.weights(scores.softmax(dim=-1))

    def _draw(self, q: Tensor, columns: Tensor, position: int, draws: Draws, lead: Draws | None) -> Tensor:
        """Tokens [K, R]; `position` is the output position of column 0."""
        chosen = [draws.choose(rows) for rows in (q if lead is None else q[1:])]
        if lead is not None:
            positions = [position + column for column in columns[0].tolist()]
            chosen = [lead.choose_at(positions, q[0]), *chosen]
        return torch.tensor(chosen, device=self.device)

    def _all_end(self, peaks: Tensor) -> bool:
        return self.settings.min_confidence > 0 and all(
            (peaks[:, 1:] < self.settings.min_confidence).any(dim=1).tolist()
        )

    def _chains(self, drawn: Tensor, peaks: Tensor, answer: Sequence[int]) -> list[list[int]]:
        """Each chain up to its first token, after token 0, whose q is flat."""
        # Only q may decide this: to drop a token for its own probability changes what it was drawn from.
        is_flat = peaks < self.settings.min_confidence
        is_flat[:, 0] = False
        lengths = (is_flat.cumsum(dim=1) == 0).sum(dim=1).tolist()
        return [
            self.bridge.chain(chain[:length], answer)
            for chain, length in zip(drawn.tolist(), lengths, strict=True)
        ]
