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
from llada.data.chat import encode_texts, render_prompt, render_template
from llada.data.messages import Message
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
    """Stops a generation whose logits cannot be sampled from; names the first of its questions, by place."""

    places: list[int]
    wheres: list[str]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_bad = (scores.isnan() | scores.isposinf()).any(-1).tolist()
        if any(is_bad):
            first = min(place for place, bad in zip(self.places, is_bad, strict=True) if bad)
            raise ValueError(NO_NUMBERS % self.wheres[first])
        return scores


class TeacherModel:
    """A teacher and how it is asked.

    Attributes:
        top_k: tokens kept of each distribution, 0 = all.
        temperature, max_new_tokens: of the answers it writes itself; distributions are stored at 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        student: Student,
        *,
        top_k: int,
        temperature: float,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.student, self.top_k = model, tokenizer, student, top_k
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.batch_size, self.seed = batch_size, seed
        self.vocabulary = VocabMap.between(tokenizer, student.tokenizer)
        width = model.config.get_text_config().vocab_size
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
        prompts = [self._prompt(question.messages) for question in questions]
        unanswered = [i for i, question in enumerate(questions) if question.response is None]
        generated = self._generate([prompts[i] for i in unanswered], [questions[i].where for i in unanswered])
        spoken = [
            self._spoken(question, prompt, next(generated) if question.response is None else None)
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        usable = [answer for answer in spoken if answer is not None]
        found = dict(zip(map(id, usable), self._scored(usable), strict=True))
        for answer in spoken:
            yield None if answer is None else found[id(answer)]

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        """The teacher's tokens of a prompt, in its own chat format if it has one."""
        if self.tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in messages) + "\n"
        else:
            text = render_template(messages, self.tokenizer, header=True)
        return encode_texts([text], self.tokenizer)[0]

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], wheres: list[str]) -> Iterator[tuple[list[int], bool]]:
        """(tokens of the answer without its end, did it end by itself) for each prompt, in order."""
        ends = end_ids(self.model, self.tokenizer, self.vocabulary.source.closing)
        order = np.argsort([len(p) for p in prompts], kind="stable")
        found: dict[int, tuple[list[int], bool]] = {}
        for start in range(0, len(prompts), self.batch_size):
            places = order[start : start + self.batch_size].tolist()
            rows = [prompts[i] for i in places]
            width = max(map(len, rows))
            input_ids = torch.tensor([[ends[0]] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            with torch.random.fork_rng():
                torch.manual_seed(int(generator(self.seed, "teacher", repr(rows)).integers(2**31)))
                sequences = self.model.generate(
                    input_ids=input_ids.to(self.model.device), attention_mask=mask.to(self.model.device),
                    do_sample=self.temperature > 0, temperature=self.temperature or None, top_k=0, top_p=1.0,
                    max_new_tokens=self.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0],
                    logits_processor=[_RefuseNoNumbers(places, wheres)],
                )  # fmt: skip
            for i, row in zip(places, sequences[:, width:].tolist(), strict=True):
                end = next((j for j, token in enumerate(row) if token in ends), None)
                found[i] = (row[:end], end is not None)
        for i in range(len(prompts)):
            yield found[i]

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
        order, found = np.argsort(lengths, kind="stable"), {}
        for start in range(0, len(spoken), self.batch_size):
            batch = {i: spoken[i] for i in order[start : start + self.batch_size].tolist()}
            width = max(lengths[i] for i in batch)
            rows = [a.teacher_prompt + a.teacher_answer for a in batch.values()]
            input_ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
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
        for i in range(len(spoken)):
            yield found[i]


def _text(data: bytes) -> str | None:
    """The text of these bytes; None if they are none."""
    try:
        return data.decode() or None
    except UnicodeDecodeError:
        return None
