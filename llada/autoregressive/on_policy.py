"""Alignment on the student's own tracks: states that its sampler visits, and drafts that it makes.

    answers   the student answers a prompt; a state on the way is drawn; the teacher scores what came out by
              its causal prefixes; KL at the masks of that state (OPDLM, arXiv 2606.06712)
    self      the same, but the teacher is the student itself, which sees more of a verified answer of its
              own: all of one behind the state, or part of what the state led to in later blocks (d-OPSD,
              arXiv 2606.18195)
    drafts    windows begin where drafts of the student would, behind what the verifier has accepted

A step's states follow from the weights and (seed, step), so a resumed run is the same.

B prompts of a micro-batch, N answers, L positions, G answer tokens.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llada.autoregressive.causal_lm import load_causal_lm
from llada.autoregressive.teacher_model import Question, TeacherModel
from llada.autoregressive.teacher_rows import Distributions, Student, TeacherChunks, from_logits
from llada.autoregressive.teacher_stream import AlignedBatch, AlignmentStream, joined
from llada.autoregressive.vocabulary import VocabMap
from llada.data.prompts import Prompt, read_prompts
from llada.diffusion.masking import generator
from llada.diffusion.stream import records_of
from llada.models.adapters import Reference, without_adapter
from llada.models.building import has_fresh_adapter
from llada.models.tokens import SpecialIds
from llada.rewards.scoring import Reward, compute_rewards, load_rewards
from llada.run import Run, autocast, gather_over_ranks
from llada.training.parallel import spread
from modelling_final import LLaDAGenerationConfig
from modelling_final.generation_llada import generate


@dataclass(frozen=True)
class VisitedState:
    """A state of a trajectory, and the answer that came of it."""

    prompt: Prompt
    canvas: np.ndarray  # [G] tokens, masks among them
    answer: list[int]  # with the token that ended it
    is_scored: np.ndarray  # [len(answer)] bool
    later: int  # first place behind the block that is being decided
    key: tuple[int, int]  # of its draws


SAMPLER_FLAGS = ("gen_length", "steps", "remasking", "seed")
Guide = Callable[[Sequence[VisitedState]], list[tuple[np.ndarray, Distributions] | None]]
"""The teacher at each state: (places in the answer, their distributions); None: it has nothing to say."""


@dataclass
class OwnStates:
    """Stream of states that the student's sampler visits.

    Attributes:
        model: the student, as it is while the stream is asked.
        settings: of its sampler; `num_return_sequences` answers to each prompt.
        guide: what a teacher says of them; at `max_positions` of each, where it is surest, or 0 = all.
        batch_size: prompts per step over all ranks; micro_batch_size: prompts per forward.
    """

    model: torch.nn.Module
    prompts: Sequence[Prompt]
    settings: LLaDAGenerationConfig
    guide: Guide
    batch_size: int
    micro_batch_size: int
    seed: int
    run: Run
    mask_id: int
    pad_id: int
    dtype: str = "float32"
    max_positions: int = 0

    has_teacher = True

    def __call__(self, step: int) -> list[AlignedBatch]:
        """This rank's micro-batches of one step."""
        ids = [i for i, _ in records_of(step, self.batch_size, num_records=len(self.prompts), seed=self.seed)]
        size = self.micro_batch_size
        starts = range(self.run.rank * size, self.batch_size, self.run.world_size * size)
        with autocast(self.run.device, self.dtype):
            return [
                self._batch(step, range(start, start + size), ids[start : start + size]) for start in starts
            ]

    def _batch(self, step: int, places: Sequence[int], ids: Sequence[int]) -> AlignedBatch:
        states = self.visit([self.prompts[i] for i in ids], [step * self.batch_size + p for p in places])
        scored, rows, parts = [], [], []
        for state, found in zip(states, self.guide(states), strict=True):
            if found is None:
                continue
            known, distributions = found
            index = np.flatnonzero(state.is_scored[known])
            if self.max_positions:
                surest = np.argsort(-distributions.log_probs[index].max(axis=1), kind="stable")
                index = np.sort(index[surest[: self.max_positions]])
            if not len(index):
                continue
            positions = len(state.prompt.token_ids) + known[index]
            weights = np.full(len(index), 1 / len(index), dtype=np.float32)
            scored.append({
                "rows": positions, "targets": np.array(state.answer)[known[index]], "weights": weights,
                "teacher_weights": weights, "has_teacher": np.ones(len(index), bool),
                "places": np.ones(len(index), np.int64),
            })  # fmt: skip
            rows.append(np.concatenate([state.prompt.token_ids, state.canvas]))
            parts.append((distributions, index))
        input_ids, mask = padded(rows or [np.array([self.pad_id])], self.pad_id)
        for b, values in enumerate(scored):
            values["rows"] = values["rows"] + b * input_ids.shape[1]
        return AlignedBatch(
            input_ids=input_ids, attention_mask=mask, **joined(scored), teacher=TeacherChunks(parts),
            num_units=float(len(parts)), record_ids=list(ids), num_tokens=sum(map(len, rows)),
            num_visited=len(states),
        )  # fmt: skip

    def visit(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[VisitedState]:
        """One state of each trajectory that the student takes from these prompts.

        Args:
            keys: of the draws, one for each prompt.
        """
        output = generate(
            self.model, [prompt.token_ids for prompt in prompts], generation_config=self.settings,
            record_ids=keys, return_trace=True,
        )  # fmt: skip
        length, num = self.settings.gen_length, self.settings.num_return_sequences
        traces: list[list[dict[str, Any]]] = [[] for _ in output.completions]
        for entry in output.trace:
            traces[entry["row"]].append(entry)
        states = []
        for row, (tokens, trace) in enumerate(zip(output.sequences.tolist(), traces, strict=True)):
            # with the end token: whether to stop is what the teacher knows best
            answer = tokens[-length:][: len(output.completions[row]) + 1]
            # before its step number `stop`: step 0 is the canvas of masks only
            key = (keys[row // num], row % num)
            stop = int(generator(self.seed, "state", *key).integers(len(trace)))
            canvas = np.full(length, self.mask_id)
            for entry in trace[:stop]:
                canvas[entry["positions"]] = entry["token_ids"]
            block = self.settings.block_length or length
            later = (trace[stop]["block"] + 1) * block  # not looked at yet
            is_scored = ((canvas == self.mask_id) & (np.arange(length) < later))[: len(answer)]
            states.append(VisitedState(prompts[row // num], canvas, answer, is_scored, later, key))
        return states


def padded(rows: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """([B, L] tokens, [B, L] 1 = token, or None where all rows are full)."""
    width = max(map(len, rows))
    tokens = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row)], mask[b, : len(row)] = row, 1
    return torch.from_numpy(tokens), None if mask.all() else torch.from_numpy(mask)


@torch.no_grad()
def logits_at(
    model: torch.nn.Module, rows: Sequence[np.ndarray], starts: Sequence[int], length: int, pad_id: int
) -> torch.Tensor:
    """[B, length, V] the model's logits, as it answers, at each row's positions from its start on."""
    input_ids, mask = padded(rows, pad_id)
    columns = torch.tensor(starts)[:, None] + torch.arange(length)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    logits = model(
        input_ids=input_ids.to(device),
        attention_mask=None if mask is None else mask.to(device),
        query_positions=columns.to(device),
    ).logits
    model.train(was_training)
    return logits


@dataclass(frozen=True)
class AutoregressiveGuide:
    """An autoregressive teacher, by the causal prefixes of the student's answers."""

    teacher: TeacherModel

    def __call__(self, states: Sequence[VisitedState]) -> list[tuple[np.ndarray, Distributions] | None]:
        questions = [Question(state.prompt.where, state.prompt.prompt, None) for state in states]
        answers = self.teacher.judge(questions, [state.answer for state in states])
        return [None if found is None else (found.positions, found.distributions) for found in answers]


@dataclass(frozen=True)
class OwnGuide:
    """The student, which sees a verified answer of its own behind the state, or part of it in its place."""

    model: torch.nn.Module
    vocabulary: VocabMap  # of the student's tokenizer onto itself
    verify: Callable[[Sequence[VisitedState]], np.ndarray]  # [N] bool, whether the answer is right
    top_k: int
    pad_id: int
    shown_share: float = 0.0  # of the state's own answer in later blocks; 0: an answer behind the state
    seed: int = 0
    reference: Reference = nullcontext  # of the student's weights; by default as they are

    def __call__(self, states: Sequence[VisitedState]) -> list[tuple[np.ndarray, Distributions] | None]:
        right: dict[int, list[VisitedState]] = {}
        for state, is_right in zip(states, self.verify(states), strict=True):
            if is_right:
                right.setdefault(state.prompt.index, []).append(state)
        see = self._with_future if self.shown_share else self._with_another
        shown = [see(state, right.get(state.prompt.index, [])) for state in states]
        told = [n for n, canvas in enumerate(shown) if canvas is not None]
        found: list[tuple[np.ndarray, Distributions] | None] = [None] * len(states)
        if not told:
            return found
        rows = [np.concatenate([states[n].prompt.token_ids, shown[n]]) for n in told]
        starts = [len(states[n].prompt.token_ids) for n in told]
        with self.reference(self.model) as teacher:
            logits = logits_at(teacher, rows, starts, len(states[told[0]].canvas), self.pad_id)
        for n, row in zip(told, logits, strict=True):
            places = np.flatnonzero(states[n].is_scored)
            found[n] = (places, from_logits(row[places].cpu(), self.vocabulary, top_k=self.top_k))
        return found

    @staticmethod
    def _with_another(state: VisitedState, right: list[VisitedState]) -> np.ndarray | None:
        """The canvas, and behind it a right answer to the prompt, by another trajectory if there is one."""
        others = [other for other in right if other is not state]
        return np.concatenate([state.canvas, (others or right)[0].answer]) if right else None

    def _with_future(self, state: VisitedState, right: list[VisitedState]) -> np.ndarray | None:
        """The canvas with a share of what its own right answer has in later blocks."""
        if not any(state is other for other in right):
            return None
        canvas, places = state.canvas.copy(), np.arange(state.later, len(state.answer))
        random = generator(self.seed, "shown", *state.key)
        shown = random.permutation(places)[: int(len(places) * self.shown_share)]
        canvas[shown] = np.array(state.answer)[shown]
        return canvas


def verified_by(rewards: list[Reward], decode: Callable[[list[int]], str]) -> Callable[..., np.ndarray]:
    """Whether the answers of states earn more than 0.5."""

    def verify(states: Sequence[VisitedState]) -> np.ndarray:
        # rewards read completions as messages, as in GRPO
        texts = [[{"role": "assistant", "content": decode(state.answer)}] for state in states]
        prompts, records = ([getattr(s.prompt, name) for s in states] for name in ("prompt", "record"))
        totals, _ = compute_rewards(rewards, prompts, texts, records)
        return np.nan_to_num(totals) > 0.5

    return verify


def draft_starts(
    model: torch.nn.Module, stream: AlignmentStream, record_ids: Sequence[int]
) -> dict[int, np.ndarray]:
    """Places of each record's answer at which the student begins to draft where the verifier says the answer.

    A draft of G most likely tokens stays as far as the answer says the same; the next begins behind the token
    that the verifier adds.
    """
    length = stream.windows.length
    texts = {i: stream.example_of(i, 0, 0) for i in sorted(set(record_ids))}
    answers = {i: np.flatnonzero(text.maskable) for i, text in texts.items()}
    starts: dict[int, list[int]] = {i: [0] for i in texts}
    active, masks = list(texts), np.full(length, stream.mask_id)
    while active:
        firsts = [int(answers[i][starts[i][-1]]) for i in active]
        canvases = [
            np.append(texts[i].input_ids[:first], masks) for i, first in zip(active, firsts, strict=True)
        ]
        logits = logits_at(model, canvases, firsts, length, stream.pad_id)
        # as in the decoder, which never drafts a mask
        logits[..., stream.mask_id] = -torch.inf
        for i, first, draft in zip(active, firsts, logits.argmax(-1).cpu().numpy(), strict=True):
            tokens = texts[i].input_ids[first : first + length]
            # False: what the answer has no token for is not accepted
            agrees = np.append(draft[: len(tokens)] == tokens, False)
            starts[i].append(starts[i][-1] + int(np.argmin(agrees)) + 1)
        active = [i for i in active if starts[i][-1] < len(answers[i])]
    return {i: np.array(found[:-1]) for i, found in starts.items()}


def starts_over_ranks(
    model: torch.nn.Module, stream: AlignmentStream, config: Any, run: Run, record_ids: list[int]
) -> dict[int, np.ndarray]:
    """`draft_starts` of a step's records, shared out over the ranks."""
    # Ranks of a sharded model go through every forward in step, so there each asks for all records.
    shares = run.world_size > 1 and config.shard == "none"
    with autocast(run.device, config.dtype):
        mine = draft_starts(model, stream, record_ids[run.rank :: run.world_size] if shares else record_ids)
    parts = gather_over_ranks(mine) if shares else [mine]
    return {record_id: starts for part in parts for record_id, starts in part.items()}


def _as_it_started(config: Any, model: torch.nn.Module, run: Run) -> Reference:
    """What gives the model as it started; called before a resumed run takes its weights back."""
    if has_fresh_adapter(config):
        return without_adapter
    kept = copy.deepcopy(model).eval().requires_grad_(False)
    spread(kept, run)  # other ranks than the first have no weights yet
    return lambda _: nullcontext(kept)


def prompts_of(config: Any, path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], Counter]:
    """Prompts to answer in the model's context."""
    return read_prompts(path, tokenizer, chat=True, context=config.max_length, gen_length=config.gen_length)


def own_states(
    config: Any, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, run: Run, ids: SpecialIds
) -> tuple[OwnStates, str]:
    """The stream of states that the student visits when it answers prompts, and what it holds."""
    # a model whose attention goes by blocks answers in them
    block_length = config.block_length or LLaDAGenerationConfig.from_model_config(model.config).block_length
    settings = LLaDAGenerationConfig(
        method="semi_autoregressive_padding" if block_length else "fixed_length",
        block_length=block_length,
        **{name: getattr(config, name) for name in SAMPLER_FLAGS},
        temperature=config.sampling_temperature,
        num_return_sequences=config.num_generations if config.on_policy == "self" else 1,
    )
    prompts, _ = prompts_of(config, config.train_data_path, tokenizer)
    config.resolve(run, len(prompts))
    student = Student(tokenizer)
    if config.on_policy == "answers":
        judge, own = load_causal_lm(
            config.teacher, flag="--teacher", dtype=config.teacher_dtype, device=run.device
        )
        guide = AutoregressiveGuide(TeacherModel(judge, own, student, top_k=config.teacher_top_k))
    elif model.config.attention_pattern != "full":
        raise ValueError("--on_policy self: a block-causal model cannot see an answer behind the state")
    else:
        verify = verified_by(
            load_rewards(config.reward_funcs, None), partial(tokenizer.decode, skip_special_tokens=True)
        )
        vocabulary = VocabMap.between(tokenizer, tokenizer)
        share = config.teacher_share if config.teacher_sees == "future" else 0.0
        reference = _as_it_started(config, model, run) if config.fixed_teacher else nullcontext
        guide = OwnGuide(
            model, vocabulary, verify, config.teacher_top_k, ids.pad, share, config.seed, reference
        )
    stream = OwnStates(
        model, prompts, settings, guide, config.batch_size, config.micro_batch_size, config.seed, run,
        ids.mask, ids.pad, config.dtype, config.teacher_positions,
    )  # fmt: skip
    return stream, f"{len(prompts)} prompts"
