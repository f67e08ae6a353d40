"""An autoregressive teacher: its answers to prompts, and its distributions along answers.

B answers of a batch, L positions, n tokens of an answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from llada.autoregressive.teacher_rows import Student, TeacherAnswer, align_answer, from_logits
from llada.autoregressive.vocabulary import OTHER, VocabMap
from llada.data.chat import render_prompt
from llada.data.messages import Message
from llada.data.template import encode_texts, fit_messages, render
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

    def answers(self, questions: Sequence[Question]) -> Iterator[TeacherAnswer | None]:
        """A row for each question, in their order; None where the teacher wrote no text.

        Raises:
            ValueError: a question whose answer the two tokenizers spell differently, or for which the
                teacher's logits are NaN or inf while it writes.
        """
        asked = [(question, self._prompt(question.messages)) for question in questions]
        unanswered = [(prompt, question.where) for question, prompt in asked if question.response is None]
        generated = self._generate(unanswered)
        spoken = [
            self._spoken(question, prompt, next(generated) if question.response is None else None)
            for question, prompt in asked
        ]
        scored = self._scored([answer for answer in spoken if answer is not None])
        for answer in spoken:
            yield None if answer is None else next(scored)

    def judge(
        self, questions: Sequence[Question], answers: Sequence[list[int]]
    ) -> list[TeacherAnswer | None]:
        """Distributions along answers that the student wrote, in its tokens; None where they are no text."""
        spoken = [
            self._of_student(question, answer) for question, answer in zip(questions, answers, strict=True)
        ]
        scored = self._scored([found for found in spoken if found is not None])
        return [None if found is None else next(scored) for found in spoken]

    def _of_student(self, question: Question, answer: list[int]) -> _Spoken | None:
        prompt_ids = render_prompt(question.messages, self.student.tokenizer, chat=True)
        prompt = self._prompt(question.messages)
        if self.vocabulary.is_identity:
            return _Spoken(prompt_ids, answer, prompt, answer, np.arange(len(answer)))
        table = self.student.table
        text = _text(table.decode(answer))
        if text is None or any(table.texts[i] is None for i in answer[:-1]):
            return None  # half a character, or a special token within the answer
        ours = encode_texts([text], self.tokenizer)[0]
        closing = self.vocabulary.source.closing
        is_closed = table.texts[answer[-1]] is None and closing is not None
        teacher_answer = [*ours, *([closing] if is_closed else [])]
        source = self.vocabulary.source
        index = align_answer(
            answer, [source.texts[i] for i in teacher_answer], self.student,
            drops_first_space=source.drops_first_space, where=question.where,
        )  # fmt: skip
        return _Spoken(prompt_ids, answer, prompt, teacher_answer, index)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        """The teacher's tokens of a prompt, in its own chat format if it has one."""
        if self.tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in messages) + "\n"
        else:
            text = render(fit_messages(messages, self.tokenizer), self.tokenizer, header=True)
        return encode_texts([text], self.tokenizer)[0]

    @torch.inference_mode()
    def _generate(self, asked: list[tuple[list[int], str]]) -> Iterator[tuple[list[int], bool]]:
        """(tokens of the answer without its end, did it end by itself) for each (prompt, where), in order."""
        ends = end_ids(self.model, self.tokenizer, self.vocabulary.source.closing)
        found: dict[int, tuple[list[int], bool]] = {}
        for places in _by_length([len(prompt) for prompt, _ in asked], self.batch_size):
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
        student, where = self.student, question.where
        table, is_identity = self.vocabulary.source, self.vocabulary.is_identity
        prompt_ids = render_prompt(question.messages, student.tokenizer, chat=True)
        text, ids, is_closed = question.response, [], True
        if generated is not None:
            ids, is_closed = generated
            if not ids or any(table.texts[i] is None for i in ids):
                return None  # nothing, or a special token within the answer
            text = _text(table.decode(ids))
        # the teacher's own ids, not its text tokenised again, which can give other ones
        if is_identity and generated is not None:
            answer_ids = ids + (student.closing_ids() if is_closed else [])
        elif text is not None:
            answer_ids = student.encode_answer(text, is_closed=is_closed, where=where)
        else:
            return None
        if is_identity:
            return _Spoken(prompt_ids, answer_ids, prompt, answer_ids, np.arange(len(answer_ids)))
        ours = ids if generated is not None else encode_texts([text], self.tokenizer)[0]
        closing = self.vocabulary.source.closing
        teacher_answer = [*ours, *([closing] if is_closed and closing is not None else [])]
        index = align_answer(
            answer_ids, [table.texts[i] for i in teacher_answer], student,
            drops_first_space=table.drops_first_space, where=where,
        )  # fmt: skip
        return _Spoken(prompt_ids, answer_ids, prompt, teacher_answer, index)

    @torch.inference_mode()
    def _scored(self, spoken: list[_Spoken]) -> Iterator[TeacherAnswer]:
        """The rows of these answers, in order: one forward a batch of similar length."""
        lengths = [len(a.teacher_prompt) + len(a.teacher_answer) for a in spoken]
        found: dict[int, TeacherAnswer] = {}
        for places in _by_length(lengths, self.batch_size):
            batch = {i: spoken[i] for i in places}
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
        return (found[i] for i in range(len(spoken)))


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of places, those of like length together: little padding in each."""
    order = np.argsort(lengths, kind="stable")
    return (order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size))


def _text(data: bytes) -> str | None:
    """The text of these bytes; None if they are none."""
    try:
        return data.decode() or None
    except UnicodeDecodeError:
        return None
