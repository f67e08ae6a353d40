"""The loop over blocks and steps: forwards, which columns they are asked for, and when a sequence is done.

N sequences, A of them at work on the current block, L canvas columns, P prompt columns, W columns of the
block, R columns wanted of a forward, E head outputs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cache_llada import WindowCache
from .canvas_llada import Block, Canvas
from .finished_llada import FinishedBlocks
from .generation_config_llada import LLaDAGenerationConfig
from .graphs_llada import Recorder
from .lean_llada import LeanForward, has_adapter_of_each_row
from .orders_llada import ORDERS, PROBABILITIES, confidence, entropy
from .remasking_llada import (
    ORDER_DRAW,
    TOKEN_DRAW,
    by_rows,
    choose_tokens,
    first_columns,
    guide,
    kl_divergence,
    order_scores,
    penalise_repetition,
    pick_entropy_bounded,
    pick_factor,
    pick_klass,
    pick_threshold,
    pick_top,
    remdm_sigma,
    remdm_unmask_probability,
    transfer_schedule,
    uniform,
)

OnStep = Callable[[dict[str, Any]], None]

# Looking for a finished answer waits for the device. On a GPU that is done every so many steps: what is
# decided in between lies behind the answer's end and is cut off.
CHECK_EVERY = 8
# Steps in which a block without masks may still be edited, as in LLaDA2.1's program: two tokens could replace
# each other for ever.
EDITING_STEPS = 16


Stop = Callable[[Tensor, int, int], int | None]
"""(prompt and answer so far [n], answer tokens among them, how many of these were looked at before) -> how
many of them stay, or None to go on."""


class Decoding:
    """One call of `generate`: the canvas, and the loop over it."""

    def __init__(
        self,
        model: nn.Module,
        settings: LLaDAGenerationConfig,
        canvas: Canvas,
        keys: list[np.ndarray],
        *,
        end_ids: list[int],
        on_step: OnStep | None = None,
        stop: Stop | None = None,
    ) -> None:
        self.model, self.settings, self.canvas, self.keys = model, settings, canvas, keys
        self.on_step, self.stop, self.device = on_step, stop, canvas.tokens.device
        self.mask_id, self.eos_id = model.config.mask_token_id, model.config.eos_token_id
        self.end_ids = torch.tensor(end_ids, dtype=torch.long, device=self.device)
        self.can_stop = settings.early_stop and bool(end_ids)
        self.may_leave = self.can_stop and not has_adapter_of_each_row(model)
        self.last_ids = self.end_ids if settings.confidence_eos_eot_inf and end_ids else None
        self.exempt_ids = torch.tensor([*end_ids, self.mask_id], device=self.device)
        self.steps = torch.zeros(len(keys), dtype=torch.long, device=self.device)
        self.recorder = Recorder(model) if settings.cuda_graphs else None
        self.lean = LeanForward(model, canvas.tokens.shape[1]) if LeanForward.fits(model) else None
        self.is_running = [True] * len(keys)
        self.cuts = list(canvas.gen_lengths)  # of each answer, what a stop lets stay
        self.finished: dict[tuple[int, int], FinishedBlocks] = {}  # by width and steps of a block
        self.scores: Tensor | None = None  # [N, G, E] the logits each token was decided from, if asked for
        self.forwards = 0

    def run(self) -> None:
        """Decides the canvas, block by block; sequences with equal work in a block go together."""
        lengths = self.canvas.gen_lengths
        widths = [self.settings.block_of(length) for length in lengths]
        steps = [self.settings.steps_per_block(length) for length in lengths]
        for index in range(max(length // width for length, width in zip(lengths, widths, strict=True))):
            groups: dict[tuple[int, int], list[int]] = {}
            for name, running in enumerate(self.is_running):
                if running and index * widths[name] < lengths[name]:
                    groups.setdefault((widths[name], steps[name]), []).append(name)
            for (width, num_steps), names in groups.items():
                self._decode_block(index, width, num_steps, names)
                if self.stop is not None:
                    self._look_for_stops(names, index * width, (index + 1) * width)

    def _look_for_stops(self, names: list[int], first: int, last: int) -> None:
        """Lets sequences leave whose answer columns [first, last) fulfil a criterion of the caller's."""
        canvas = self.canvas
        for name in names:
            row = canvas.tokens[name, : canvas.num_prompt + last]
            if canvas.keep is not None:
                row = row[canvas.keep[name, : canvas.num_prompt + last] == 1]
            kept = self.stop(row, last, first)
            if kept is not None:
                self.is_running[name], self.cuts[name] = False, kept

    def _decode_block(self, index: int, width: int, num_steps: int, names: list[int]) -> None:
        start = self.canvas.num_prompt + index * width
        visible = start + width
        if self.settings.method != "semi_autoregressive_origin":
            visible = self.canvas.num_prompt + max(self.canvas.ends[name] for name in names)
        rows = torch.tensor(names, device=self.device)
        block = Block(index=index, start=start, end=start + width, visible=visible, rows=rows, names=names)
        if self.settings.cache == "blocks":
            self._continue_blocks(block, num_steps)
        if self.settings.remdm != "none":
            self._decode_remdm(block, num_steps)
        elif self.settings.editing_threshold is not None:
            self._decode_editing(block)
        elif self.settings.parallel_decoding != "none":
            self._decode_parallel(block)
        else:
            self._decode_scheduled(block, num_steps)

    def _continue_blocks(self, block: Block, num_steps: int) -> None:
        key = (block.width, num_steps)
        if key not in self.finished:
            self.finished[key] = FinishedBlocks(self.model, self.canvas, block.names)
        finished = self.finished[key]
        first, last = finished.span(block.start, block.end)
        finished.grow(list(block.names), first, block.start)
        block.window = (first, min(last, block.visible))
        block.visible = block.window[1]  # nothing behind it can be seen
        block.cache = finished.continued()

    def _decode_scheduled(self, block: Block, num_steps: int) -> None:
        """The published schedule: every step decides a number of tokens known in advance."""
        num_masked, score = block.width, ORDERS[self.settings.remasking]
        for step, num_picks in enumerate(transfer_schedule(num_masked, num_steps)):
            if num_picks == 0 or not block.names:
                return  # the schedule never grows, so all later steps decide nothing too
            columns, valid = self._candidates(block, num_masked)
            if score is None:
                columns, valid = columns[:, :num_masked], valid[:, :num_masked]
                order = self._uniform(block, step, ORDER_DRAW).gather(1, columns)
                order = order.argsort(dim=1, descending=True, stable=True)[:, :num_picks]
                columns, valid = columns.gather(1, order), valid[:, :num_picks]
            logits, tokens = self._predict(block, columns, step)
            picks = valid
            if score is not None:
                picks = pick_top(order_scores(score, logits, tokens, self.last_ids), valid, num_picks)
            self._write(block, step, columns, tokens, picks, logits)
            del logits  # before the next forward has its own
            num_masked -= num_picks
            looks = num_masked == 0 or self.device.type == "cpu" or (step + 1) % CHECK_EVERY == 0
            if self.may_leave and looks:
                self._let_leave(block)

    def _decode_parallel(self, block: Block) -> None:
        """Approximate: each step decides as many tokens as the model is sure of, at least one."""
        counts = [block.width] * len(block.names)  # masked columns of each sequence
        for step in range(block.width):
            columns, valid = self._candidates(block, max(counts))
            logits, tokens = self._predict(block, columns, step)
            scores = order_scores(PROBABILITIES[self.settings.remasking], logits, tokens, self.last_ids)
            picks = self._parallel_picks(block, logits, columns, scores, valid)
            self._write(block, step, columns, tokens, picks, logits)
            del logits  # before the next forward has its own
            counts = self._let_leave(block)
            if not counts:
                return

    def _decode_editing(self, block: Block) -> None:
        """Approximate: as threshold, and decided tokens of the block give way to ones the model is sure of.

        Source: LLaDA2.1's published generate().
        """
        num_finished = torch.zeros(len(block.names), dtype=torch.long, device=self.device)
        for step in range(block.width + EDITING_STEPS):
            columns = torch.arange(block.width, device=self.device).expand(len(block.names), -1)
            masked = self._masked(block)
            logits, tokens = self._predict(block, columns, step)
            scores = order_scores(PROBABILITIES[self.settings.remasking], logits, tokens, self.last_ids)
            picks = pick_threshold(scores, masked, self.settings.threshold)
            is_other = tokens != self.canvas.tokens[block.rows, block.start : block.end]
            is_sure = by_rows(confidence, logits, tokens) > self.settings.editing_threshold
            edits = ~masked & is_other & is_sure
            self._write(block, step, columns, tokens, picks | edits, logits)
            del logits  # before the next forward has its own
            num_finished += ~masked.any(dim=1)
            names = block.names
            if not self._let_leave(block, edits.any(dim=1) & (num_finished < EDITING_STEPS)):
                return
            num_finished = num_finished[[name in block.names for name in names]]

    def _parallel_picks(
        self, block: Block, logits: Tensor, columns: Tensor, scores: Tensor, valid: Tensor
    ) -> Tensor:
        rule, settings = self.settings.parallel_decoding, self.settings
        if rule == "threshold":
            return pick_threshold(scores, valid, settings.threshold)
        if rule == "factor":
            return pick_factor(scores, valid, settings.factor)
        if rule == "entropy":
            entropies = -by_rows(entropy, logits, columns)
            return pick_entropy_bounded(scores, entropies, valid, settings.entropy_bound)
        log_p = logits.log_softmax(dim=-1)
        wide = columns[..., None].expand_as(log_p)
        if block.log_p is None:  # the first step has nothing to compare with
            block.log_p = log_p.new_zeros(len(block.names), block.width, log_p.shape[-1])
            block.num_stable = columns.new_zeros(len(block.names), block.width)
        else:
            is_near = kl_divergence(log_p, block.log_p.gather(1, wide)) < settings.klass_kl
            num_stable = (block.num_stable.gather(1, columns) + 1) * is_near
            block.num_stable.scatter_(1, columns, num_stable)
        block.log_p.scatter_(1, wide, log_p)
        num_stable = block.num_stable.gather(1, columns)
        return pick_klass(scores, num_stable, valid, settings.threshold, settings.klass_steps)

    def _decode_remdm(self, block: Block, num_steps: int) -> None:
        """Approximate: the block's own diffusion, in which decided tokens may become masks again."""
        shape = (len(block.names), block.width)
        block.waits = torch.full(shape, torch.inf, dtype=torch.float64, device=self.device)
        for step in range(num_steps):
            masked = self._masked(block)
            sigma = remdm_sigma(self.settings.remdm, self.settings.remdm_eta, step, num_steps, block.waits)
            draw = self._uniform(block, step, ORDER_DRAW)
            unmask = masked & (draw < remdm_unmask_probability(sigma, step, num_steps))
            remask = ~masked & (draw < sigma)
            counts = unmask.sum(dim=1)
            num_columns = int(counts.max())
            if num_columns > 0 or self.settings.cache != "none":
                columns = first_columns(unmask, max(1, num_columns))
                picks = torch.arange(columns.shape[1], device=self.device) < counts[:, None]
                logits, tokens = self._predict(block, columns, step)
                seen = by_rows(confidence, logits, tokens).double()
                waits = torch.where(picks, seen, block.waits.gather(1, columns))
                block.waits.scatter_(1, columns, waits)
                self._write(block, step, columns, tokens, picks, logits, remask)
                del logits  # before the next forward has its own
            block.waits.masked_fill_(remask, torch.inf)
            span = self.canvas.tokens[block.rows, block.start : block.end]
            self.canvas.tokens[block.rows, block.start : block.end] = span.masked_fill(remask, self.mask_id)
        self._let_leave(block)  # only now: within the block an EOS could still be taken back

    def _masked(self, block: Block) -> Tensor:
        """[A, W] bool."""
        return self.canvas.tokens[block.rows, block.start : block.end] == self.mask_id

    def _candidates(self, block: Block, num_masked: int) -> tuple[Tensor, Tensor]:
        """Columns [A, R] of the block, masked ones first, and which of them are masked; R = `num_masked`."""
        # a recorded forward is always asked for the whole block: one shape for all steps
        num_columns = num_masked if self.recorder is None else block.width
        masked = self._masked(block)
        columns = first_columns(masked, num_columns)
        return columns, masked.gather(1, columns)

    def _uniform(self, block: Block, step: int, draw: int) -> Tensor:
        keys = [self.keys[name] for name in block.names]
        return uniform(keys, block=block.index, step=step, draw=draw, width=block.width).to(self.device)

    def _logits(self, block: Block, columns: Tensor, step: int) -> Tensor:
        """Logits [A, R, E] of the block's columns, float32 or float64, with all that changes them applied."""
        settings = self.settings
        raw = self._forward(block, columns, step)
        logits = raw if raw.dtype == torch.float64 else raw.float()
        if settings.cfg_scale > 0:
            logits = guide(*logits.chunk(2), settings.cfg_scale)
        if settings.repetition_penalty != 1:
            present = self._present(block, logits.shape[-1])
            logits = penalise_repetition(logits, present, settings.repetition_penalty)
        if settings.logits_eos_inf and self.eos_id is not None:
            logits[..., self.eos_id] = -torch.inf
        self.forwards += 1
        self.steps.index_add_(0, block.rows, torch.ones_like(block.rows))
        return logits

    def _forward(self, block: Block, columns: Tensor, step: int) -> Tensor:
        """The model's logits [A or 2A, R, E]: all visible columns go in, or the cache's window of them."""
        num_branches = 2 if self.settings.cfg_scale > 0 else 1
        tokens, keep, positions = (
            None if table is None else table[block.rows, : block.visible].repeat(num_branches, 1)
            for table in (self.canvas.tokens, self.canvas.keep, self.canvas.positions)
        )
        if num_branches == 2:
            tokens[len(block.names) :, : self.canvas.num_prompt] = self.mask_id
        first, last = block.window or (0, None)
        if block.window is not None:
            if block.cache.get_seq_length() > first:  # else the first forward of the block, which appends
                block.cache.window = block.window
        elif self.settings.cache != "none":
            interval = self.settings.cache_refresh_interval
            if block.cache is None or (interval and step % interval == 0):
                block.cache = WindowCache(self.model.config)
            else:
                first, last = block.start, block.end if self.settings.cache == "dual" else block.visible
                block.cache.window = (first, last)
        if last is not None:
            if positions is None:
                positions = torch.arange(block.visible, device=self.device)[None]
            tokens, positions = tokens[:, first:last], positions[:, first:last]
        inputs = {
            "input_ids": tokens,
            "attention_mask": keep,
            "position_ids": positions,
            "query_positions": (columns + block.start - first).repeat(num_branches, 1),
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        fills_cache = block.cache is not None and block.cache.window is None
        if self.recorder is not None and not fills_cache:
            return self.recorder(inputs, block.cache)
        if self.lean is not None:
            return self.lean(**inputs, past_key_values=block.cache)
        return self.model(**inputs, past_key_values=block.cache).logits

    def _present(self, block: Block, num_outputs: int) -> Tensor:
        """[A, E] bool: tokens of prompt and answer so far, without EOS, EoT and the mask."""
        tokens = self.canvas.tokens[block.rows]
        if self.canvas.keep is not None:
            tokens = tokens.masked_fill(self.canvas.keep[block.rows] == 0, self.mask_id)
        present = torch.zeros(len(block.names), num_outputs, dtype=torch.bool, device=self.device)
        return present.scatter_(1, tokens, True).index_fill_(1, self.exempt_ids, False)

    def _predict(self, block: Block, columns: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Logits [A, R, E] of the block's columns, and a token [A, R] for each."""
        logits, draws = self._logits(block, columns, step), None
        if self.settings.temperature > 0:
            draws = self._uniform(block, step, TOKEN_DRAW).gather(1, columns)
        return logits, choose_tokens(
            logits,
            draws,
            temperature=self.settings.temperature,
            mask_id=self.mask_id,
            top_k=self.settings.top_k,
            top_p=self.settings.top_p,
        )

    def _let_leave(self, block: Block, is_edited: Tensor | None = None) -> list[int]:
        """Sequences at their end leave the run, those without masks the block; the others' masks are counted.

        A sequence is at its end when an EOS or EoT has no mask before it. Those edited [A] stay for a look.
        """
        answer = self.canvas.tokens[block.rows, self.canvas.num_prompt : block.end]
        is_masked = answer == self.mask_id
        num_left = is_masked[:, -block.width :].sum(dim=1)
        has_ended = (torch.isin(answer, self.end_ids) & (is_masked.cumsum(dim=1) == 0)).any(dim=1)
        # the step's one wait for the device
        is_edited = torch.zeros_like(has_ended) if is_edited is None else is_edited
        num_left, has_ended, is_edited = torch.stack([num_left, has_ended, is_edited]).tolist()
        stays = []
        for name, count, ended, edited in zip(block.names, num_left, has_ended, is_edited, strict=True):
            self.is_running[name] = bool(edited) or not (ended and self.may_leave)
            stays.append((count > 0 or edited) and self.is_running[name])
        block.select(stays)
        return [count for count, stay in zip(num_left, stays, strict=True) if stay]

    def _write(
        self,
        block: Block,
        step: int,
        columns: Tensor,
        tokens: Tensor,
        picks: Tensor,
        logits: Tensor,
        remasked: Tensor | None = None,
    ) -> None:
        """Puts the picked tokens into the canvas, and reports them."""
        at = (block.rows[:, None], columns + block.start)
        self.canvas.tokens[at] = torch.where(picks, tokens, self.canvas.tokens[at])
        if self.settings.output_scores:
            if self.scores is None:
                shape = (len(self.keys), max(self.canvas.gen_lengths), logits.shape[-1])
                self.scores = logits.new_zeros(shape)
            sequence, place = picks.nonzero(as_tuple=True)
            columns_picked = columns[sequence, place] + block.start - self.canvas.num_prompt
            self.scores[block.rows[sequence], columns_picked] = logits[sequence, place]
        if self.on_step is None:
            return
        offset = block.start - self.canvas.num_prompt
        # whole tables at once: a tensor operation for each row costs more than a small model's step
        shown = (columns + offset, tokens, by_rows(confidence, logits, tokens), picks)
        places, ids, confidences, chosen = (table.tolist() for table in shown)
        back = torch.zeros_like(picks).tolist() if remasked is None else remasked.tolist()
        for i, name in enumerate(block.names):
            at = [column for column, is_picked in enumerate(chosen[i]) if is_picked]
            entry = {"row": name, "block": block.index, "step": step}
            entry |= {
                "positions": [places[i][column] for column in at],
                "token_ids": [ids[i][column] for column in at],
                "confidences": [confidences[i][column] for column in at],
                "remasked": [n + offset for n, is_back in enumerate(back[i]) if is_back],
            }
            self.on_step(entry)
