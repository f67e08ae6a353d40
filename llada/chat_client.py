"""A client of OpenAI-compatible servers (Ollama, vLLM, llama.cpp) that survives bad days of theirs.

A question is a list of messages and a JSON schema; its result is the JSON value that a check of the caller's
accepts, or None after all retries. Answers are kept on disk, so a question is paid for once.

Only the standard library is used: no client package follows all of these servers.
"""

import contextlib
import hashlib
import http.client
import json
import logging
import os
import random
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

RETRIED = {408, 409, 425, 429, *range(500, 600)}
BREAKER_WINDOW, BREAKER_MIN = 20, 10  # calls looked back on; and from how many on
CHARACTERS_PER_TOKEN = 8  # no tokenizer packs text more tightly, so fewer tokens mean a cut-off prompt
NUDGE = "Your last reply was not valid. Reply with the JSON object alone, exactly as the schema asks."

Messages = list[dict[str, str]]


class ServerFailure(RuntimeError):
    """More than half of the last calls failed: nothing should be learned from what is left."""


class _Retry(Exception):
    """A call that may go better next time."""

    def __init__(self, reason: str, *, after: float = 0.0, nudge: bool = False) -> None:
        super().__init__(reason)
        self.after, self.nudge = after, nudge


@dataclass(kw_only=True)
class ChatClient:
    """Questions to one model of one server.

    Attributes:
        base_url: ends in /v1 for all three servers.
        api_key_env: environment variable with the key, where the server wants one.
        structured: ask the server to keep to the schema (response_format json_schema).
        timeout: seconds for a whole answer; `connect_timeout` for reaching the server.
        max_retries: further tries of a question, after backoff * 2^k seconds and a little chance.
        cache_path: SQLite file of answers, or None; several processes may share it.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0
    structured: bool = True
    timeout: float = 120.0
    max_retries: int = 3
    backoff: float = 0.5
    cache_path: str | None = None

    def __post_init__(self) -> None:
        scheme = urllib.parse.urlsplit(self.base_url).scheme
        if scheme not in ("http", "https"):
            raise ValueError(
                f"--judge_base_url {self.base_url}: give a URL such as http://127.0.0.1:11435/v1"
            )
        host = urllib.parse.urlsplit(self.base_url).hostname
        is_local = host in ("localhost", "127.0.0.1", "::1")
        handlers = [urllib.request.ProxyHandler({})] if is_local else []
        self._opener = urllib.request.build_opener(*handlers)
        self._lock = threading.Lock()
        self._recent: deque[bool] = deque(maxlen=BREAKER_WINDOW)
        self._counts: Counter = Counter()
        self._cache: sqlite3.Connection | None = None
        if self.cache_path is not None:
            Path(self.cache_path).parent.mkdir(parents=True, exist_ok=True)
            self._cache = sqlite3.connect(self.cache_path, timeout=60, check_same_thread=False)
            self._cache.execute("PRAGMA journal_mode=WAL")
            self._cache.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT)")
            self._cache.commit()

    def check_server(self) -> None:
        """ValueError if there is no such server or it does not know the model; loads nothing."""
        try:
            with self._opener.open(self._request("models", None), timeout=min(10.0, self.timeout)) as reply:
                names = [entry.get("id") for entry in json.loads(reply.read()).get("data", [])]
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValueError(
                f"--judge_base_url {self.base_url}: no server answers there ({error}); start one "
                "(scripts/launch/server_ollama.sh), or choose other --reward_funcs"
            ) from error
        if names and self.model not in names:
            raise ValueError(
                f"--judge_model {self.model}: {self.base_url} has only {', '.join(map(str, names))}"
            )

    def ask(self, messages: Messages, schema: dict[str, Any], check: Callable[[Any], Any]) -> Any | None:
        """What `check` makes of the reply's JSON, or None when every try failed.

        Args:
            schema: JSON schema of the reply.
            check: gives the result, or raises ValueError with what is wrong with the reply.

        Raises:
            ValueError: the server refuses such calls altogether (unknown model, no permission).
            ServerFailure: more than half of the last calls failed.
        """
        key = self._key(messages, schema)
        if (text := self._remembered(key)) is not None:
            self._count("cache_hits")
            return check(json.loads(text))
        wants_nudge, last = False, None
        for attempt in range(self.max_retries + 1):
            self._count("calls" if attempt == 0 else "retries")
            started = time.monotonic()
            try:
                value = self._call(messages, schema, attempt, nudge=wants_nudge)
                try:
                    result = check(value)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise _Retry(f"reply does not fit: {error}", nudge=True) from error
            except _Retry as error:
                wants_nudge, last = error.nudge, error
                if attempt < self.max_retries:
                    pause = self.backoff * 2**attempt * (1 + 0.25 * random.random())
                    time.sleep(max(error.after, pause))
                continue
            with self._lock:
                self._counts["seconds"] += time.monotonic() - started
            self._note(True)
            self._remember(key, json.dumps(value))
            return result
        log.warning("judge: gave up after %d tries: %s", self.max_retries + 1, last)
        self._note(False)
        return None

    def metrics(self) -> dict[str, float]:
        """Counts since the last call: calls, failures, retries, cache_hits, and seconds of good answers."""
        with self._lock:
            counts = {
                name: float(self._counts[name])
                for name in ("calls", "failures", "retries", "cache_hits", "seconds")
            }
            self._counts.clear()
        return counts

    def _call(self, messages: Messages, schema: dict[str, Any], attempt: int, *, nudge: bool) -> Any:
        """The reply's JSON value."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": NUDGE}] if nudge else messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed + attempt,  # the same seed would give the same bad reply
        }
        if self.structured:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "reply", "strict": True, "schema": schema},
            }
        reply = self._post(json.dumps(body).encode())
        try:
            text = reply["choices"][0]["message"]["content"]
            tokens = (reply.get("usage") or {}).get("prompt_tokens")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Retry(f"not a chat completion: {str(reply)[:100]}") from error
        size = sum(len(message["content"]) for message in messages)
        if tokens and tokens * CHARACTERS_PER_TOKEN < size:
            raise _Retry(
                f"only {tokens} tokens of {size} characters were read: raise the server's context "
                "(OLLAMA_CONTEXT_LENGTH)"
            )
        return find_json(text or "")

    def _post(self, body: bytes) -> Any:
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(self._request("chat/completions", body), timeout=self.timeout) as reply:
                data = b""
                while chunk := reply.read1(65536):
                    data += chunk
                    if time.monotonic() > deadline:
                        raise _Retry(f"no answer within {self.timeout} s")
                return json.loads(data)
        except urllib.error.HTTPError as error:
            detail = error.read(300).decode("utf-8", "replace")
            if error.code in RETRIED:
                raise _Retry(f"HTTP {error.code}: {detail}", after=_seconds(error.headers)) from error
            raise ValueError(
                f"--judge_base_url {self.base_url}, --judge_model {self.model}: HTTP {error.code}: {detail}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(f"{type(error).__name__}: {error}") from error
        except ValueError as error:
            raise _Retry(f"reply is not JSON: {error}") from error

    def _request(self, path: str, body: bytes | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(f"{self.base_url.rstrip('/')}/{path}", data=body, headers=headers)

    def _note(self, is_good: bool) -> None:
        """Keeps count of failures, and breaks the circuit."""
        with self._lock:
            self._counts["failures"] += not is_good
            self._recent.append(is_good)
            failed, seen = self._recent.count(False), len(self._recent)
        if not is_good and seen >= BREAKER_MIN and failed * 2 > seen:
            raise ServerFailure(
                f"--judge_base_url {self.base_url}: {failed} of the last {seen} judgements failed; see the "
                "server's log. The same command goes on from the last checkpoint"
            )

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _key(self, messages: Messages, schema: dict[str, Any]) -> str:
        parts = [
            1,
            self.model,
            self.temperature,
            self.max_tokens,
            self.seed,
            self.structured,
            messages,
            schema,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _remembered(self, key: str) -> str | None:
        if self._cache is None:
            return None
        with self._lock:
            row = self._cache.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def _remember(self, key: str, value: str) -> None:
        if self._cache is None:
            return
        with self._lock:
            self._cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, value))
            self._cache.commit()


def _seconds(headers: Any) -> float:
    """The server's Retry-After, at most a minute."""
    with contextlib.suppress(TypeError, ValueError):
        return min(60.0, max(0.0, float(headers.get("Retry-After"))))
    return 0.0


def find_json(text: str) -> Any:
    """The first JSON object in a reply, thoughts and prose around it left out.

    Raises:
        _Retry: there is none.
    """
    text = text.rpartition("</think>")[2]
    decoder = json.JSONDecoder()
    start = text.find("{")
    for _ in range(20):  # prose may hold braces too
        if start < 0:
            break
        with contextlib.suppress(ValueError, RecursionError):
            return decoder.raw_decode(text, start)[0]
        start = text.find("{", start + 1)
    raise _Retry(f"no JSON in the reply: {text[:80]!r}", nudge=True)
