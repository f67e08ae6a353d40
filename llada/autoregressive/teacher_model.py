"""An autoregressive teacher: its answers to prompts, and its distributions along answers.

B answers of a batch, L positions, n tokens of an answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from llada.autoregressive.causal_lm import prompt_ids
from llada.autoregressive.teacher_rows import Student, TeacherAnswer, align_answer, from_logits
from llada.autoregressive.vocabulary import OTHER, VocabMap, text_of
from llada.data.chat import render_prompt
from llada.data.messages import Message
from llada.data.template import encode_texts
from llada.diffusion.masking import generator
from llada.models.tokens import end_ids

NO_NUMBERS = "%s: the teacher's logits for this answer hold NaN or inf"


@dataclass(frozen=True)
class Question:
    """A prompt, and the answer to it where one is given."""

    where: str
    messages: list[Message]
    response: str | None


@dataclass(frozen=True)
class _Spoken:
    """An answer in both models' tokens; `index[i]` is the teacher's token that begins at answer token i."""

    prompt_ids: list[int]
    answer_ids: list[int]
    teacher_prompt: list[int]
    teacher_answer: list[int]
    index: np.ndarray


@dataclass(frozen=True)
class _RefuseNoNumbers(LogitsProcessor):
    """Stops a generation whose logits cannot be sampled from; names the first of its questions."""

    where_of: dict[int, str]  # place among the questions -> "file:line", in the order of the rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_bad = (scores.isnan() | scores.isposinf()).any(-1).tolist()
        if any(is_bad):
            first = min(place for place, bad in zip(self.where_of, is_bad, strict=True) if bad)
            raise ValueError(NO_NUMBERS % self.where_of[first])
        return scores


@dataclass
class TeacherModel:
    """A teacher and how it is asked.

    Attributes:
        top_k: tokens kept of each distribution, 0 = all.
        temperature, max_new_tokens, seed: of the answers it writes itself; distributions are stored at 1.
        batch_size: answers in one forward.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    student: Student
    top_k: int
    temperature: float = 1.0
    max_new_tokens: int = 256
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        self.vocabulary = VocabMap.between(self.tokenizer, self.student.tokenizer)
        width = self.model.config.get_text_config().vocab_size
        if width < self.vocabulary.source_size:
            raise ValueError(
                f"--teacher: the tokenizer has {self.vocabulary.source_size} ids and the model only {width} "
                "outputs; they do not belong together"
            )

    def answers(self, questions: Sequence[Question]) -> list[TeacherAnswer | None]:
        """A row for each question, in their order; None where the teacher wrote no text.

        Raises:
            ValueError: a question whose answer the two tokenizers spell differently, or for which the
                teacher's logits are NaN or inf while it writes.
        """
        asked = [(question, self._prompt(question.messages)) for question in questions]
        unanswered = [(prompt, question.where) for question, prompt in asked if question.response is None]
        generated = self._generate(unanswered)
        return self._scored([
            self._spoken(question, prompt, next(generated) if question.response is None else None)
            for question, prompt in asked
        ])  # fmt: skip

    def judge(
        self, questions: Sequence[Question], answers: Sequence[list[int]]
    ) -> list[TeacherAnswer | None]:
        """Distributions along answers that the student wrote, in its tokens; None where they are no text."""
        return self._scored(list(map(self._of_student, questions, answers)))

    def _of_student(self, question: Question, answer: list[int]) -> _Spoken | None:
        table, text = self.student.table, None
        if not self.vocabulary.is_identity:
            text = text_of(table.decode(answer))
            if text is None or any(table.texts[i] is None for i in answer[:-1]):
                return None  # half a character, or a special token within the answer
        is_closed = table.texts[answer[-1]] is None
        return self._pair(question, self._prompt(question.messages), answer, text, is_closed)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        """The teacher's tokens of a prompt, in its own chat format if it has one."""
        if self.tokenizer.chat_template is not None:
            return prompt_ids(messages, self.tokenizer)
        text = "".join(message["content"] + "\n" for message in messages)
        return encode_texts([text], self.tokenizer)[0]

    @torch.inference_mode()
    def _generate(self, asked: list[tuple[list[int], str]]) -> Iterator[tuple[list[int], bool]]:
        """(tokens of the answer without its end, did it end by itself) for each (prompt, where), in order."""
        ends = end_ids(self.model, self.tokenizer, self.vocabulary.source.closing)
        found: dict[int, tuple[list[int], bool]] = {}
        for places in _by_length({i: len(prompt) for i, (prompt, _) in enumerate(asked)}, self.batch_size):
            rows = [asked[i][0] for i in places]
            width = max(map(len, rows))
            input_ids = torch.tensor([[ends[0]] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            with torch.random.fork_rng():
                # keyed by the rows: the same batch has the same answers after a resume
                torch.manual_seed(int(generator(self.seed, "teacher", repr(rows)).integers(2**31)))
                sequences = self.model.generate(
                    input_ids=input_ids.to(self.model.device), attention_mask=mask.to(self.model.device),
                    do_sample=self.temperature > 0, temperature=self.temperature or None, top_k=0, top_p=1.0,
                    max_new_tokens=self.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0],
                    logits_processor=[_RefuseNoNumbers({i: asked[i][1] for i in places})],
                )  # fmt: skip
            for i, row in zip(places, sequences[:, width:].tolist(), strict=True):
                end = next((j for j, token in enumerate(row) if token in ends), None)
                found[i] = (row[:end], end is not None)
        return (found[i] for i in range(len(asked)))

    def _spoken(
        self, question: Question, prompt: list[int], generated: tuple[list[int], bool] | None
    ) -> _Spoken | None:
        """A question's answer in both models' tokens."""
        table, text, ids, is_closed = self.vocabulary.source, question.response, None, True
        if generated is not None:
            ids, is_closed = generated
            if not ids or any(table.texts[i] is None for i in ids):
                return None  # nothing, or a special token within the answer
            text = text_of(table.decode(ids))
        # the teacher's own ids, not its text tokenised again, which can give other ones
        if self.vocabulary.is_identity and ids is not None:
            answer_ids = ids + (self.student.closing_ids() if is_closed else [])
        elif text is not None:
            answer_ids = self.student.encode_answer(text, is_closed=is_closed, where=question.where)
        else:
            return None
        return self._pair(question, prompt, answer_ids, text, is_closed, ids)

    def _pair(
        self, question: Question, prompt: list[int], answer_ids: list[int], text: str | None, is_closed: bool,
        ids: list[int] | None = None,
    ) -> _Spoken:  # fmt: skip
        """An answer in the student's tokens beside the teacher's: `ids`, or its text's."""
        prompt_ids = render_prompt(question.messages, self.student.tokenizer, chat=True)
        if self.vocabulary.is_identity:
            return _Spoken(prompt_ids, answer_ids, prompt, answer_ids, np.arange(len(answer_ids)))
        table = self.vocabulary.source
        ours = encode_texts([text], self.tokenizer)[0] if ids is None else ids
        ours = [*ours, *([table.closing] if is_closed and table.closing is not None else [])]
        index = align_answer(
            answer_ids, [table.texts[i] for i in ours], self.student,
            drops_first_space=table.drops_first_space, where=question.where,
        )  # fmt: skip
        return _Spoken(prompt_ids, answer_ids, prompt, ours, index)

    @torch.inference_mode()
    def _scored(self, spoken: list[_Spoken | None]) -> list[TeacherAnswer | None]:
        """The rows of these answers, in order: one forward a batch of similar length."""
        there = {i: answer for i, answer in enumerate(spoken) if answer is not None}
        lengths = {i: len(a.teacher_prompt) + len(a.teacher_answer) for i, a in there.items()}
        found: dict[int, TeacherAnswer] = {}
        for places in _by_length(lengths, self.batch_size):
            batch = {i: there[i] for i in places}
            width = max(lengths[i] for i in batch)
            rows = [a.teacher_prompt + a.teacher_answer for a in batch.values()]
            input_ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
            # padding on the right: causal rows do not see it
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            # [B, L, V] logits are most of the memory
            first = min(len(a.teacher_prompt) for a in batch.values()) - 1  # logits before are of no use
            logits = self.model(
                input_ids=input_ids.to(self.model.device), attention_mask=mask.to(self.model.device),
                use_cache=False, logits_to_keep=width - first,
            ).logits  # fmt: skip
            for row, (i, answer) in zip(logits, batch.items(), strict=True):
                positions = np.flatnonzero(answer.index != OTHER)
                # row j predicts token j + 1
                places = torch.from_numpy(answer.index[positions]) + len(answer.teacher_prompt) - 1 - first
                wanted = row[places.to(row.device)].cpu()
                distributions = from_logits(wanted, self.vocabulary, top_k=self.top_k)
                found[i] = TeacherAnswer(answer.prompt_ids, answer.answer_ids, positions, distributions)
        return [found.get(i) for i in range(len(spoken))]


def _by_length(lengths: Mapping[int, int], batch_size: int) -> Iterator[list[int]]:
    """Batches of places, those of like length together: little padding in each."""
    order = sorted(lengths, key=lengths.__getitem__)
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))
