"""A teacher behind an OpenAI-compatible server: answers with the log-probabilities of their tokens.

Only what `POST {base_url}/chat/completions` with `logprobs` gives is used, as vLLM, llama.cpp and OpenAI
serve it: for each token of the answer its text, and texts and log-probabilities of the most likely ones.
Tokens are told apart by their bytes; the server's tokenizer is not needed. Ollama's /v1 has no logprobs.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llada.autoregressive.teacher_rows import Student, TeacherAnswer, align_answer, from_candidates
from llada.autoregressive.vocabulary import OTHER, ROLE_OF_SPELLING, TokenBytes, text_of
from llada.chat_client import ChatClient, NoAnswer
from llada.data.chat import render_prompt
from llada.data.messages import Message


class ServerTeacher:
    """A model on a server, asked for `top_k` log-probabilities at each position (OpenAI allows 20)."""

    def __init__(self, client: ChatClient, *, top_k: int) -> None:
        self.client, self.top_k = client, top_k

    def answer(self, messages: Sequence[Message], student: Student, where: str) -> TeacherAnswer | None:
        """The server's answer as a row of the student; None if it wrote nothing.

        ValueError: the server refuses, is not there, or does not give log-probabilities.
        """
        try:
            choice = self.client.complete(messages, dict, logprobs=True, top_logprobs=self.top_k)
        except NoAnswer as error:
            tries = self.client.max_retries + 1
            raise ValueError(
                f"{where}: {self.client.base_url}: no answer in {tries} tries: {error}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        content = (choice.get("logprobs") or {}).get("content")
        if content is None:
            raise ValueError(
                f"{where}: {self.client.base_url} sent an answer without log-probabilities; use a server "
                "that gives 'logprobs' for chat completions (vLLM, llama.cpp)"
            )
        tokens = [_written(entry, student.table) for entry in content]
        is_closed = choice.get("finish_reason") == "stop"
        text = None
        while tokens and (text := text_of(b"".join(part or b"" for part in tokens))) is None:
            tokens.pop()  # cut within a character
        if text is None:
            return None
        answer_ids = student.encode_answer(text, is_closed=is_closed, where=where)
        index = align_answer(answer_ids, tokens, student, drops_first_space=False, where=where)
        positions = np.flatnonzero(index != OTHER)
        candidates, log_rest = [], []
        for j in index[positions]:
            pairs = [self._candidate(entry, student.table, where) for entry in content[j]["top_logprobs"]]
            # what the server does not name is the rest; rounding can leave less than nothing of it
            candidates.append(pairs)
            log_rest.append(math.log(max(1.0 - sum(math.exp(value) for _, value in pairs), 1e-12)))
        return TeacherAnswer(
            render_prompt(list(messages), student.tokenizer, chat=True),
            answer_ids,
            positions,
            from_candidates(candidates, log_rest, top_k=self.top_k),
        )

    def _candidate(self, entry: dict[str, Any], table: TokenBytes, where: str) -> tuple[int, float]:
        value = entry.get("logprob")
        if not isinstance(value, (int, float)) or math.isnan(value) or value > 1e-3:
            raise ValueError(f"{where}: the server sent {value!r} as a log-probability")
        text = _written(entry, table)
        if text is None:
            found = table.id_of_foreign(entry["token"])
            return (OTHER if found is None else found), float(value)
        return table.id_of_text.get(text, OTHER), float(value)


def _written(entry: dict[str, Any], table: TokenBytes) -> bytes | None:
    """What a token of the server writes; None for special tokens."""
    token = entry["token"]
    # servers give special tokens their text as bytes, too
    if token in ROLE_OF_SPELLING or token in table.id_of_special:
        return None
    return bytes(entry["bytes"]) if entry.get("bytes") else token.encode()
