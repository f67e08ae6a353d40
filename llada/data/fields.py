"""The fields of a record: which of them is the question, the answer, the conversation, the label.

A field that the user names decides alone. Without one the most specific form wins: a question's own field
before a conversation, and `text` where nothing else fits.
"""

import re
from dataclasses import dataclass
from typing import Any

from llada.data.messages import (
    THOUGHTS,
    Message,
    Text,
    read_messages,
    read_tools,
    valid,
    with_thought,
)

# A question's field, and the answers that may stand beside it, its own first.
ANSWERS = ("completion", "output", "response", "answer", "solution", "assistant", "target", "targets")
QUESTIONS = {
    "prompt": "completion",
    "instruction": "output",
    "question": "answer",
    "query": "response",
    "problem": "solution",
    "user": "assistant",
    "input": "output",
    "inputs": "targets",
}
CONTEXTS = ("input", "context")  # belong below an instruction or a question
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
CHOSEN, REJECTED = ("chosen", "chosen_messages"), ("rejected", "rejected_messages")
LABELS = ("label", "kto_tag")
MEDIA = ("images", "videos", "audios")
MAY_BE_MESSAGES = ("prompt", "completion", "chosen", "rejected")  # TRL's conversational formats
KNOWN = {*QUESTIONS, *ANSWERS, *CONTEXTS, *CONVERSATIONS, *SYSTEMS, *LABELS, *THOUGHTS, "text", "history"}
TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Reader:
    """How the records of a run are read; the fields that the user named, None = found by the rules above."""

    prompt_key: str | None = None
    answer_key: str | None = None
    chosen_key: str | None = None
    rejected_key: str | None = None
    label_key: str | None = None
    messages_key: str | None = None
    system_key: str | None = None
    text_key: str | None = None
    transcript: bool = False  # texts of the form "\n\nHuman: ...\n\nAssistant: ..." are conversations
    drops_bad: bool = False  # a record that cannot be used is left out and counted, instead of ending the run


class Fields:
    """A record's fields. Every error names file and line."""

    def __init__(self, fields: dict[str, Any], where: str, reader: Reader | None = None) -> None:
        # a missing column of a Parquet file is a null
        self.fields = {name: value for name, value in fields.items() if value is not None}
        for name in fields.keys() - KNOWN:  # `Question`, as headers of CSV files have it
            if name.lower() in KNOWN:
                self.fields.setdefault(name.lower(), fields[name])
        self.columns, self.where, self.reader = self.fields.keys() | fields.keys(), where, reader or Reader()
        self.notes: list[str] = []  # what was skipped in the record, in words
        if found := next((name for name in MEDIA if self.fields.get(name)), None):
            raise self.error(f"{found!r} cannot be read: the model takes text only")

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.where}: {message}")

    def named(self, flag: str) -> str | None:
        """The field that the user named with a flag. ValueError if the record lacks it."""
        name = getattr(self.reader, flag)
        if name is not None and name not in self.fields:
            raise self.error(f"no field {name!r} (--{flag}); fields are {sorted(self.fields)}")
        return name

    def question(self) -> tuple[str, Text] | None:
        """(field, text or messages) of the question's own field, with what stands below it."""
        if name := self.named("prompt_key"):
            return name, self._text_or_turns(name)
        if self.reader.messages_key:
            return None
        taken = {self.reader.answer_key, self.reader.chosen_key, self.reader.rejected_key}
        has_conversation = any(name in self.fields for name in CONVERSATIONS)
        for name, own_answer in QUESTIONS.items():
            if name not in self.fields or name in taken:
                continue
            # a column `user` may hold somebody's name
            if has_conversation and name in ("user", "input", "inputs") and own_answer not in self.fields:
                continue
            value = self._text_or_turns(name)
            if isinstance(value, str) and name in ("instruction", "question", "query", "problem"):
                below = [self.fields[context] for context in CONTEXTS if self.fields.get(context)]
                value = "\n\n".join([value, *(self._text(text, "input") for text in below)])
            return name, value
        if isinstance(self.fields.get("history"), str):  # Stanford Human Preferences; else a list of turns
            return "history", self.fields["history"]
        return None

    def answer(self, question: str | None) -> Text | None:
        """The answer to a question of this field, its thought in front."""
        name = self.named("answer_key")
        if name is None:
            names = (QUESTIONS.get(question), *ANSWERS)
            name = next((name for name in names if name in self.fields and name != question), None)
        if name is None:
            return None
        return self._thought_through(self._text_or_turns(name))

    def conversation(self) -> list[Message] | None:
        """The turns of the conversation's own field, with system message and tools."""
        fields = (*CONVERSATIONS, *(["text"] if self.reader.transcript else []))
        name = self.named("messages_key") or next((name for name in fields if name in self.fields), None)
        return None if name is None else self._thought_through(self.opened(self._turns_of(name)))

    def _thought_through(self, answer: Text) -> Text:
        """An answer, or turns that end with one, with the record's thought in front of it."""
        for field in THOUGHTS:
            thought = self.fields.get(field)
            if not isinstance(thought, str) or field == "reasoning":  # `reasoning: on` names a mode
                continue
            if isinstance(answer, str):
                answer = with_thought(thought, answer, self.where)
            elif answer[-1]["role"] == "assistant":
                told = with_thought(thought, answer[-1]["content"], self.where)
                answer = [*answer[:-1], {**answer[-1], "content": told}]
        return answer

    def sides(self) -> tuple[str, str] | None:
        """The fields of the preferred and of the other answer."""
        chosen, rejected = self.named("chosen_key"), self.named("rejected_key")
        chosen = chosen or next((name for name in CHOSEN if name in self.fields), None)
        rejected = rejected or next((name for name in REJECTED if name in self.fields), None)
        if chosen is None and rejected is None and {"human_ref_A", "human_ref_B"} <= self.fields.keys():
            # Stanford Human Preferences: `labels` 1 = A is preferred
            sides = ("human_ref_A", "human_ref_B")
            return sides if self.fields.get("labels") == 1 else sides[::-1]
        return None if chosen is None or rejected is None else (chosen, rejected)

    def label(self, *, strict: bool = True) -> bool | None:
        name = self.named("label_key") or next((name for name in LABELS if name in self.fields), None)
        value = self.fields.get(name)
        # as JSON, CSV and Parquet have them: True, "true", 1, 1.0
        known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
        found = known.get(str(value).lower()) if name else None
        if name and found is None and strict:
            raise self.error(f"{name!r} must be true (desirable) or false, got {value!r:.60}")
        return found

    def opened_text(self, question: tuple[str, Text]) -> Text:
        """A question with all that goes before it: a text where nothing does."""
        field, asked = question
        before = {"history", "tools", *([self.reader.system_key] if self.reader.system_key else SYSTEMS)}
        # Where a file has a column for it, all its records are conversations, also those that leave it empty.
        if isinstance(asked, str) and not self.columns & before - {field}:
            return asked
        turns = as_turns(asked, "user")
        if field != "history" and self.fields.get("history"):
            turns = [*self._history(self.fields["history"]), *turns]
        return self.opened(turns)

    def opened(self, turns: list[Message]) -> list[Message]:
        """The turns with the record's system message and tools; they begin with a user turn."""
        name = self.named("system_key") or next((name for name in SYSTEMS if self.fields.get(name)), None)
        if name and (system := self._text(self.fields[name], name)).strip():
            if turns[0]["role"] != "system":
                turns = [{"role": "system", "content": system}, *turns]
            elif turns[0]["content"].strip() != system.strip():
                raise self.error(f"{name!r} and the conversation's own system message differ")
        # both borders: several system messages may open it, and a tool cannot answer before it is called
        num_system = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
        if first == len(turns) or any(turn["role"] == "tool" for turn in turns[num_system:first]):
            raise self.error("a conversation must begin with a user turn (after any system message)")
        if first > num_system:  # ShareGPT's exports can begin in the middle
            self.notes.append("assistant turns before the first user turn, skipped")
            turns = [*turns[:num_system], *turns[first:]]
        if tools := read_tools(self.fields.get("tools"), self.where):
            turns = [{**turns[0], "tools": tools}, *turns[1:]]
        return turns

    def _history(self, history: list[Any]) -> list[Message]:
        """Earlier turns: messages, or LLaMA-Factory's [question, answer] pairs."""
        if all(isinstance(item, dict) for item in history):
            return read_messages(history, self.where, "history")
        if not all(isinstance(item, list | tuple) and len(item) == 2 for item in history):
            raise self.error(f"'history' must hold [question, answer] pairs, got {history!r:.60}")
        return [
            {"role": role, "content": self._text(text, "history")}
            for pair in history
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]

    def _text(self, value: Any, field: str) -> str:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return number_text(value)
        if not isinstance(value, str):
            raise self.error(f"{field!r} must be a string, got {value!r:.60}")
        return valid(value, self.where)

    def _text_or_turns(self, field: str) -> Text:
        """A field that holds a text, a message, or a list of messages."""
        value = self.fields[field]
        if isinstance(value, str) and self.reader.transcript and TURN.match(value):
            return self._turns_of(field)
        if isinstance(value, list | dict):
            return read_messages(value, self.where, field)
        if not isinstance(value, str) and field in MAY_BE_MESSAGES:
            raise self.error(f"{field!r} must be a string or a list of messages, got {value!r:.60}")
        return self._text(value, field)

    def _turns_of(self, field: str) -> list[Message]:
        value = self.fields[field]
        if not (isinstance(value, str) and self.reader.transcript):
            return read_messages(value, self.where, field)
        before, *rest = TURN.split(value if value.startswith("\n\n") else "\n\n" + value)
        if before.strip() or not rest:
            raise self.error(f"{field!r} is no transcript: it must begin with 'Human:', got {value!r:.60}")
        turns = [
            {"role": "user" if name == "Human" else "assistant", "content": text.strip()}
            for name, text in zip(rest[::2], rest[1::2], strict=True)
        ]
        return turns if turns[-1]["content"] else turns[:-1]  # a prompt ends with "Assistant:"


def number_text(value: float) -> str:
    """A number as one writes it: 60.0 is 60."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def as_turns(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text
