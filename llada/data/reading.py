"""What a record says to each entry point: a conversation, a prompt, a pair of answers, labelled answers.

data/README.md has every form with an example; llada/data/fields.py says which field is what.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llada.data.fields import CHOSEN, LABELS, QUESTIONS, REJECTED, TURN, Fields, Reader, as_turns
from llada.data.files import OnBytes, left_out
from llada.data.messages import Message, Text, read_weight, valid
from llada.data.records import Located, read_records

T = TypeVar("T")


class Pair(NamedTuple):
    """Two answers to one prompt, the first preferred. All three are texts, or all three are messages."""

    prompt: Text
    chosen: Text
    rejected: Text


class Labelled(NamedTuple):
    """One answer to a prompt and whether it is desirable."""

    prompt: Text
    completion: Text
    label: bool


class LeftOut(ValueError):
    """A record that says itself that it is not to be learned."""


class Record(Fields):
    """A record, as each entry point reads it."""

    def messages(self) -> list[Message]:
        """A conversation to learn from, with at least one assistant's turn that has text."""
        self._refuse_unlearnable()
        turns = self._conversation_with_answer()
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        if not answers:
            raise self.error("the conversation has no assistant turn, so there is nothing to learn")
        if not any(turn.get("learn", True) for turn in answers):
            raise LeftOut("records of weight 0, left out")
        if not all(turn["content"].strip() or turn.get("tool_calls") for turn in answers):
            raise self.error("empty answer: every assistant turn needs text")
        return turns

    def document(self) -> str:
        """A text to pretrain on."""
        name = self.named("text_key") or "text"
        if not isinstance(self.fields.get(name), str):
            hint = "" if name in self.fields else "; conversations go through prepare_sft.py"
            raise self.error(
                f"a document needs a string field {name!r}, fields are {sorted(self.fields)}{hint}"
            )
        return valid(self.fields[name], self.where)

    def prompt(self) -> Text:
        """What a model is asked, without any answer to it: a text where the record has one, or messages."""
        if question := self.question():
            return self._asked(self.opened_text(question))
        if turns := self.conversation():
            return self._asked(turns)
        if isinstance(self.fields.get("text"), str):
            return self._text_or_turns("text")
        if self.sides():
            return self.pair().prompt
        raise self.error(f"no prompt in fields {sorted(self.fields)}; name its field with --prompt_key")

    def pair(self) -> Pair:
        """Two answers to one prompt."""
        self._refuse_unlearnable(may_be_undesirable=True)
        sides = self.sides()
        if not sides:
            names = [self.reader.chosen_key or CHOSEN[0], self.reader.rejected_key or REJECTED[0]]
            raise self.error(
                f"a preference needs {names[0]!r} and {names[1]!r}; fields are {sorted(self.fields)}"
            )
        values = [self._text_or_turns(name) for name in sides]
        question = self.question()
        prompt = self.opened_text(question) if question else self.conversation()
        if all(isinstance(value, str) for value in values):
            if prompt is None:
                return self._implicit_text(*values)
            if isinstance(prompt, str):
                return Pair(prompt, *values)
        chosen, rejected = (as_turns(value, "assistant") for value in values)
        if chosen[0]["role"] != "assistant":
            prompt, chosen, rejected = self._without_shared_turns(prompt, chosen, rejected)
        elif prompt is None:
            raise self.error(
                f"no {self.reader.prompt_key or 'prompt'!r}, and the answers begin with an assistant turn; "
                f"fields are {sorted(self.fields)}; name the prompt's with --prompt_key"
            )
        answers = [self._single(turns, name) for turns, name in zip((chosen, rejected), sides, strict=True)]
        return Pair(self._unanswered(as_turns(prompt, "user")), *answers)

    def labelled(self) -> list[Labelled]:
        """An answer and whether it is desirable; of a pair two, the chosen one first."""
        if self.sides() and "completion" not in self.fields and self.reader.label_key is None:
            pair = self.pair()
            return [Labelled(pair.prompt, pair.chosen, True), Labelled(pair.prompt, pair.rejected, False)]
        label = self.label()
        if label is None:
            name = self.reader.label_key or LABELS[0]
            raise self.error(f"no {name!r} (or 'chosen' and 'rejected') in {sorted(self.fields)}")
        self._refuse_unlearnable(may_be_undesirable=True)
        question = self.question()
        answer = self.answer(question and question[0])
        if question and isinstance(answer, str) and isinstance(prompt := self.opened_text(question), str):
            return [Labelled(prompt, answer, label)]
        own = as_turns(answer or [], "assistant")
        is_whole = bool(own) and own[0]["role"] != "assistant" and self.reader.answer_key is not None
        if question and own and not is_whole:
            own = self._single(own, "completion")
            turns = self._unanswered(as_turns(self.opened_text(question), "user"))
            return [Labelled(turns, own, label)]
        turns = self._conversation_with_answer()
        own = self._single(turns[-1:], "messages")
        return [Labelled(self._unanswered(turns[:-1]), own, label)]

    def _refuse_unlearnable(self, *, may_be_undesirable: bool = False) -> None:
        if read_weight(self.fields, self.where) is False:
            raise LeftOut("records of weight 0, left out")
        if not may_be_undesirable and self.label(strict=False) is False:
            raise self.error(
                "an answer labelled undesirable cannot be learned; give it to precompute_bref.py, or leave "
                "such records out with --bad_records drop"
            )

    def _conversation_with_answer(self) -> list[Message]:
        question = self.question()
        answer = self.answer(question and question[0])
        if answer is not None and not isinstance(answer, str) and answer[0]["role"] != "assistant":
            if self.reader.answer_key is None:
                raise self.error(f"'completion' must hold assistant messages only, got {answer!r:.60}")
            return self.opened(answer)  # a whole conversation that the user named
        if question is None and self.reader.answer_key and (turns := self.conversation()):
            question = "messages", self._asked(turns)
        if question and answer is not None:
            return self.opened(
                [*as_turns(self.opened_text(question), "user"), *as_turns(answer, "assistant")]
            )
        turns = self.conversation()
        if question and turns:
            asked = [turn["content"].strip() for turn in turns if turn["role"] == "user"]
            if not all(turn["content"].strip() in asked for turn in as_turns(question[1], "user")[-1:]):
                raise self.error(
                    f"{question[0]!r} is not what the conversation asks, and has no answer beside it"
                )
        if self.sides() and (not turns or turns[-1]["role"] != "assistant"):
            raise self.error(
                "a preference pair has two answers; name the one to learn with --answer_key chosen"
            )
        if turns:
            return turns
        if question and not isinstance(question[1], str):  # a list of messages with its answers
            return self.opened(question[1])
        if question:
            own = QUESTIONS.get(question[0], "completion")
            raise self.error(f"{question[0]!r} needs {own!r} beside it; fields are {sorted(self.fields)}")
        raise self.error(f"no conversation in fields {sorted(self.fields)}; accepted: {ACCEPTED}")

    def _asked(self, turns: Text) -> Text:
        """The turns up to the last one that wants an answer: a user's, or what a tool gave back."""
        if isinstance(turns, str):
            return turns
        # `opened` has seen to it that there is one
        last = max(i for i, turn in enumerate(turns) if turn["role"] in ("user", "tool"))
        return turns[: last + 1]

    def _unanswered(self, turns: list[Message]) -> list[Message]:
        """A prompt's turns. ValueError if they end with an answer: there would be two in a row."""
        if not turns or turns[-1]["role"] == "assistant":
            raise self.error("the prompt must end with a user turn, before the answer")
        return self.opened(turns)

    def _single(self, turns: list[Message], field: str) -> list[Message]:
        roles = [turn["role"] for turn in turns]
        if roles != ["assistant"]:
            raise self.error(f"{field!r} must be one assistant turn after the prompt, has roles {roles}")
        if turns[0].get("learn") is False:
            raise LeftOut("records of weight 0, left out")
        return turns

    def _implicit_text(self, chosen: str, rejected: str) -> Pair:
        """A pair whose prompt is what both texts begin with, up to a turn's or else a word's border."""
        length = 0
        while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
            length += 1
        borders = [match.end() for match in TURN.finditer(chosen, 0, length) if match[1] == "Assistant"]
        words = [i for i in range(length + 1) if chosen[i : i + 1].isspace() or rejected[i : i + 1].isspace()]
        start = max(borders or ([] if TURN.search(chosen) else words), default=0)
        if not chosen[:start].strip():
            raise self.error(
                "no question: no prompt beside 'chosen' and 'rejected', which have no beginning in common; "
                f"fields are {sorted(self.fields)}; name the prompt's with --prompt_key"
            )
        self.notes.append("pairs whose prompt is what both answers begin with")
        return Pair(chosen[:start], chosen[start:], rejected[start:])

    def _without_shared_turns(
        self, prompt: Text | None, chosen: list[Message], rejected: list[Message]
    ) -> tuple[list[Message], list[Message], list[Message]]:
        """(prompt, chosen, rejected) of whole conversations; a prompt beside them must be theirs."""
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        # equal answers share their last turn too, and it still is an answer
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        turns = self.opened(chosen[:shared]) if shared else []
        said = [(turn["role"], turn["content"].strip()) for turn in turns]
        asked = [(turn["role"], turn["content"].strip()) for turn in as_turns(prompt or [], "user")]
        if isinstance(prompt, str):  # the first question of several turns, or the last
            fits = asked[0] in said
        else:
            fits = said[len(said) - len(asked) :] == asked or asked[len(asked) - len(said) :] == said
        if not fits:
            raise self.error("the prompt is not what 'chosen' and 'rejected' begin with")
        if len(asked) > len(said):  # it alone has the system message
            turns = as_turns(prompt, "user")
        return turns, chosen[shared:], rejected[shared:]


ACCEPTED = (
    "messages, conversations, "
    + ", ".join(f"{question} + {answer}" for question, answer in QUESTIONS.items())
    + "; or name the fields with --prompt_key and --answer_key"
)


def read(
    source: str | Path | Iterable[Located],
    reader: Reader,
    convert: Callable[[Record], T],
    counts: Counter,
    *,
    split: str = "train",
    text_documents: str = "blank_line",
    on_bytes: OnBytes | None = None,
) -> Iterator[tuple[str, dict[str, Any], T]]:
    """("file:line", record, what `convert` makes of it) of a file or folder, or of located records.

    `counts` gets what was skipped, left out or dropped, see `note_bad`; the rest: see `read_records`.
    """
    on_bad = partial(note_bad, counts) if reader.drops_bad else None
    if isinstance(source, str | Path):
        counts.update(left_out(source, split))
        source = read_records(
            source, split=split, text_documents=text_documents, on_bytes=on_bytes, on_bad=on_bad
        )
    for where, fields in source:
        try:
            record = Record(fields, where, reader)
            found = convert(record)
        except LeftOut as error:
            counts[str(error)] += 1
        except ValueError as error:
            if on_bad is None:
                raise
            on_bad(str(error))
        else:
            counts.update(record.notes)
            yield where, fields, found


BAD = "bad records, dropped"
_NAMED = 10  # bad records that are named
_MANY = 0.1  # share of the records from which on losing them is worth a warning


def note_bad(counts: Counter, message: str) -> None:
    """Counts a record that cannot be used, and keeps what is wrong with the first ten."""
    counts[BAD] += 1
    if sum(name.startswith(f"{BAD}: ") for name in counts) < _NAMED:
        counts[f"{BAD}: {message}"] = 1


def describe_losses(counts: Mapping[str, Any], total: int, *, lost: int = 0) -> str:
    """Lines about what did not come through: what, how often, and a warning if it is much.

    Args:
        counts: by words; those about bad records as `note_bad` keeps them, one line a record.
        lost: of the `total` records for another reason, which has been told.
    """
    named = [name.removeprefix(f"{BAD}: ") for name in counts if name.startswith(f"{BAD}: ")][:_NAMED]
    counts = {name: n for name, n in counts.items() if n and not name.startswith(f"{BAD}: ")}
    lines = [name if name.startswith("files") else f"{name}: {n}" for name, n in counts.items()]
    words = ("drop", "left out")
    lost += sum(n for name, n in counts.items() if any(w in name for w in words) and "files" not in name)
    if lost > _MANY * total:
        lines.append(f"warning: {lost} of {total} are not used")
    return "".join(f"\n  {line}" for line in [*lines, *(f"  {message}" for message in named)])


def to_messages(fields: dict[str, Any], where: str, reader: Reader | None = None) -> list[Message]:
    """The conversation of a record, see `Record.messages`. ValueError: `where` and what is wrong."""
    return Record(fields, where, reader).messages()


def to_prompt(fields: dict[str, Any], where: str, reader: Reader | None = None) -> list[Message]:
    """What a record asks, as messages, see `Record.prompt`."""
    return as_turns(Record(fields, where, reader).prompt(), "user")


def to_pair(fields: dict[str, Any], where: str, reader: Reader | None = None) -> Pair:
    """The two answers of a record, see `Record.pair`."""
    return Record(fields, where, reader).pair()


def to_labelled(fields: dict[str, Any], where: str, reader: Reader | None = None) -> list[Labelled]:
    """The answers of a record with their labels, see `Record.labelled`."""
    return Record(fields, where, reader).labelled()
