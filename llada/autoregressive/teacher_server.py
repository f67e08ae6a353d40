"""A teacher behind an OpenAI-compatible server: answers with the log-probabilities of their tokens.

Only what `POST {base_url}/chat/completions` with `logprobs` gives is used, as vLLM, llama.cpp and OpenAI
serve it: for each token of the answer its text, and texts and log-probabilities of the most likely ones.
Tokens are told apart by their bytes; the server's tokenizer is not needed. Ollama's /v1 has no logprobs.
"""

import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llada.autoregressive.teacher_rows import Student, TeacherAnswer, align_answer, from_candidates
from llada.autoregressive.vocabulary import OTHER, ROLE_OF_SPELLING, TokenBytes
from llada.data.chat import render_prompt
from llada.data.messages import Message

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
MAX_RETRIES = 4
FIRST_WAIT = 0.5  # seconds, doubled at each retry


@dataclass(frozen=True)
class ServerTeacher:
    """A model on a server.

    Attributes:
        base_url: up to and including /v1.
        api_key_env: environment variable with the key; unset or empty where the server wants none.
        top_k: log-probabilities asked for at each position (OpenAI allows 20).
        timeout: seconds for one answer.
    """

    base_url: str
    model: str
    api_key_env: str
    top_k: int
    temperature: float
    max_new_tokens: int
    seed: int
    timeout: float

    def answer(self, messages: Sequence[Message], student: Student, where: str) -> TeacherAnswer | None:
        """The server's answer as a row of the student; None if it wrote nothing.

        Raises:
            ValueError: the server refuses, is not there, or does not give log-probabilities.
        """
        choice = self._ask(messages, where)
        content = (choice.get("logprobs") or {}).get("content")
        if content is None:
            raise ValueError(
                f"{where}: {self.base_url} sent an answer without log-probabilities; use a server that gives "
                "'logprobs' for chat completions (vLLM, llama.cpp)"
            )
        tokens = [_written(entry, student.table) for entry in content]
        is_closed = choice.get("finish_reason") == "stop"
        while tokens and not _is_text(b"".join(text or b"" for text in tokens)):
            tokens.pop()  # cut within a character
        text = b"".join(text or b"" for text in tokens).decode()
        if not text:
            return None
        answer_ids = student.encode_answer(text, is_closed=is_closed, where=where)
        index = align_answer(answer_ids, tokens, student, drops_first_space=False, where=where)
        positions = np.flatnonzero(index != OTHER)
        candidates, log_rest = [], []
        for j in index[positions]:
            pairs = [self._candidate(entry, student.table, where) for entry in content[j]["top_logprobs"]]
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

    def _ask(self, messages: Sequence[Message], where: str) -> dict[str, Any]:
        body = {
            "model": self.model, "messages": list(messages), "temperature": self.temperature,
            "max_tokens": self.max_new_tokens, "seed": self.seed,
            "logprobs": True, "top_logprobs": self.top_k,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        for attempt in range(MAX_RETRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)["choices"][0]
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {error.read()[:200].decode(errors='replace')}"
                if error.code not in RETRIED:
                    raise ValueError(f"{where}: {self.base_url} refuses: {reason}") from error
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                reason = str(getattr(error, "reason", error))
            except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
                reason = f"not a chat completion: {error!r}"
            if attempt < MAX_RETRIES:
                time.sleep(FIRST_WAIT * 2**attempt)
        raise ValueError(f"{where}: {self.base_url} gave no answer in {MAX_RETRIES + 1} tries: {reason}")


def _written(entry: dict[str, Any], table: TokenBytes) -> bytes | None:
    """What a token of the server writes; None for special tokens."""
    token = entry["token"]
    if token in ROLE_OF_SPELLING or token in table.id_of_special:
        return None
    return bytes(entry["bytes"]) if entry.get("bytes") else token.encode()


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
