"""Questions to one model of an OpenAI-compatible server (vLLM, llama.cpp, Ollama, OpenAI).

The official `openai` package does connections, keys, errors, and retries with the server's Retry-After. Here
is what it does not do: a reply that does not fit is asked for again, answers are kept on disk so that each is
paid for once, and a run stops when most questions fail.
"""

import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

BREAKER_WINDOW, BREAKER_MIN = 20, 10  # calls looked back on; and from how many on
CHARACTERS_PER_TOKEN = 8  # no tokenizer packs text more tightly, so fewer tokens mean a cut-off prompt
NUDGE = "This reply is not valid: {reason}. Reply again, exactly in the form that was asked for."

Messages = list[dict[str, str]]
Found = TypeVar("Found")


class ServerFailure(RuntimeError):
    """More than half of the last calls failed: nothing should be learned from what is left."""


class NoAnswer(RuntimeError):
    """A question without a fitting reply after all tries; says what the last one lacked."""


@dataclass(kw_only=True)
class ChatClient:
    """Questions to one model of one server; several threads may ask."""

    base_url: str  # up to and including /v1
    model: str
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key, where the server wants one
    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0
    structured: bool = True  # ask the server to keep to the schema (response_format json_schema)
    timeout: float = 120.0  # seconds for an answer
    max_retries: int = 3  # further tries of a question, whatever went wrong with the last
    cache_path: str | None = None  # SQLite file of answers; several processes may share it
    # by which a user set them; named in errors
    url_flag: str = "--judge_base_url"
    model_flag: str = "--judge_model"

    def __post_init__(self) -> None:
        import openai  # half a second that a command without a server need not pay

        url = urllib.parse.urlsplit(self.base_url)
        if url.scheme not in ("http", "https"):
            raise ValueError(f"{self.url_flag} {self.base_url}: give a URL such as http://127.0.0.1:11435/v1")
        # A proxy from the environment does not know this machine's own servers.
        is_local = url.hostname in ("localhost", "127.0.0.1", "::1")
        self._client = openai.OpenAI(
            base_url=self.base_url,
            api_key=os.environ.get(self.api_key_env) or "none",  # the package refuses an empty one
            timeout=self.timeout,
            max_retries=self.max_retries,
            http_client=openai.DefaultHttpxClient(trust_env=not is_local),
        )
        self._lock = threading.Lock()
        self._recent: deque[bool] = deque(maxlen=BREAKER_WINDOW)
        self._counts: Counter[str] = Counter()
        self._cache: sqlite3.Connection | None = None
        if self.cache_path is not None:
            Path(self.cache_path).parent.mkdir(parents=True, exist_ok=True)
            # threads share the connection under our lock; processes share the file, which WAL allows
            self._cache = sqlite3.connect(self.cache_path, timeout=60, check_same_thread=False)
            self._cache.execute("PRAGMA journal_mode=WAL")
            self._cache.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT)")
            self._cache.commit()

    def check_server(self) -> None:
        """ValueError if there is no such server or it does not know the model; loads nothing."""
        from openai import OpenAIError

        client = self._client.with_options(timeout=min(10.0, self.timeout), max_retries=0)
        try:
            names = [model.id for model in client.models.list().data or []]
        except (OpenAIError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.url_flag} {self.base_url}: no server answers there ({error}); start one "
                "(scripts/launch/server_ollama.sh), or choose other --reward_funcs"
            ) from error
        if names and self.model not in names:
            raise ValueError(
                f"{self.model_flag} {self.model}: {self.base_url} has only {', '.join(map(str, names))}"
            )

    def ask(self, messages: Messages, schema: dict[str, Any], read: Callable[[str], Found]) -> Found | None:
        """What `read` makes of the reply's text, or None when every try failed.

        Args:
            schema: JSON schema that the server is asked to keep to.
            read: gives the result, or raises ValueError with what is wrong with the reply.

        ValueError: the server refuses such calls altogether (unknown model, no permission). ServerFailure:
        more than half of the last calls failed.
        """
        key = self._key(messages, schema)
        if (text := self._remembered(key)) is not None:
            self._count("cache_hits")
            return read(text)
        options: dict[str, Any] = {}
        if self.structured:  # some servers refuse the field, others ignore it: `read` checks in any case
            form = {"name": "reply", "strict": True, "schema": schema}
            options["response_format"] = {"type": "json_schema", "json_schema": form}
        self._count("calls")
        started = time.monotonic()
        try:
            text, found = self.complete(
                messages, lambda choice: (_text(choice), read(_text(choice))), **options
            )
        except NoAnswer as error:
            log.warning("judge: gave up after %d tries: %s", self.max_retries + 1, error)
            self._note(False)
            return None
        self._count("seconds", time.monotonic() - started)
        self._note(True)
        self._remember(key, text)
        return found

    def complete(self, messages: Messages, read: Callable[[dict[str, Any]], Found], **options: Any) -> Found:
        """What `read` makes of the first choice of a chat completion, as the server sent it.

        Args:
            read: as of `ask`, of the choice.
            options: further fields of the request, as the API names them.

        ValueError: the server refuses such calls altogether. NoAnswer: no fitting reply in all tries.
        """
        asked, tries, reason = messages, 0, ""
        # failed requests and replies that do not fit are paid from one budget, else their product would be
        while tries <= self.max_retries:
            settings = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}
            # the same seed would give the same bad reply
            body = {**settings, "seed": self.seed + tries, **options, "messages": asked}
            data, taken = self._post(body, self.max_retries - tries)
            self._count("retries", taken + (tries > 0))
            tries += taken + 1
            choice: dict[str, Any] = {}
            try:
                reply = json.loads(data)
                choice = dict(reply["choices"][0])
                _refuse_cut_prompt(asked, (reply.get("usage") or {}).get("prompt_tokens"))
                return read(choice)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                reason = str(error) if choice else f"not a chat completion: {data[:100]!r}"
                if isinstance(text := (choice.get("message") or {}).get("content"), str) and text:
                    nudge = {"role": "user", "content": NUDGE.format(reason=reason)}
                    asked = [*messages, {"role": "assistant", "content": text}, nudge]
        raise NoAnswer(reason)

    def metrics(self) -> dict[str, float]:
        """Counts since the last call: calls, failures, retries, cache_hits, and seconds of good answers."""
        names = ("calls", "failures", "retries", "cache_hits", "seconds")
        with self._lock:
            counts = {name: float(self._counts[name]) for name in names}
            self._counts.clear()
        return counts

    def _post(self, body: dict[str, Any], retries: int) -> tuple[str, int]:
        """(the reply's text, how many further tries that took)."""
        import openai

        create = self._client.with_options(max_retries=retries).chat.completions.with_raw_response.create
        try:
            response = create(**body)
            return response.text, response.retries_taken
        except openai.APIStatusError as error:
            reason = f"HTTP {error.status_code}: {error.response.text[:300]}"
            # these three pass by themselves; any other refusal of a client comes again
            if error.status_code < 500 and error.status_code not in (408, 409, 429):
                raise ValueError(
                    f"{self.url_flag} {self.base_url}, {self.model_flag} {self.model}: {reason}"
                ) from error
        except openai.OpenAIError as error:
            reason = f"{type(error).__name__}: {error.__cause__ or error}"
        self._count("retries", retries)
        raise NoAnswer(reason)

    def _note(self, is_good: bool) -> None:
        """Keeps count of failures, and breaks the circuit."""
        with self._lock:
            self._counts["failures"] += not is_good
            self._recent.append(is_good)
            failed, seen = self._recent.count(False), len(self._recent)
        if not is_good and seen >= BREAKER_MIN and failed * 2 > seen:
            raise ServerFailure(
                f"{self.url_flag} {self.base_url}: {failed} of the last {seen} questions failed; see the "
                "server's log. The same command resumes from the last checkpoint"
            )

    def _count(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counts[name] += amount

    def _key(self, messages: Messages, schema: dict[str, Any]) -> str:
        # all that decides an answer; 2 is the version of this key
        settings = [self.model, self.temperature, self.max_tokens, self.seed, self.structured]
        known = [2, *settings, messages, schema]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def _remembered(self, key: str) -> str | None:
        if self._cache is None:
            return None
        with self._lock:
            row = self._cache.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def _remember(self, key: str, value: str) -> None:
        if self._cache is not None:
            with self._lock:
                self._cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, value))
                self._cache.commit()


def _text(choice: dict[str, Any]) -> str:
    return choice["message"]["content"] or ""


def _refuse_cut_prompt(messages: Messages, num_tokens: int | None) -> None:
    """ValueError where the server read fewer tokens than the question can have."""
    size = sum(len(message["content"]) for message in messages)
    if num_tokens and num_tokens * CHARACTERS_PER_TOKEN < size:
        raise ValueError(
            f"only {num_tokens} tokens of {size} characters were read: raise the server's context "
            "(OLLAMA_CONTEXT_LENGTH)"
        )
