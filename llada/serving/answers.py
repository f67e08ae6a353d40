"""What a client is sent of an answer, and what the server counts."""

from dataclasses import dataclass
from typing import Any

import prometheus_client as prometheus
from transformers import PreTrainedTokenizerBase

from llada.serving.engine import Engine
from llada.serving.protocol import Ask


@dataclass
class Candidate:
    """The text of one answer: what has been sent of it, and where it ends."""

    tokenizer: PreTrainedTokenizerBase
    ask: Ask
    sent: str = ""
    reason: str | None = None
    num_tokens: int = 0  # sent or to be sent, as `usage` counts them

    def text_of(self, token_ids: list[int], *, is_final: bool, has_ended: bool = False) -> str:
        """The text of an answer's beginning, as far as it may be shown; sets `reason` where it ends."""
        self.num_tokens = min(len(token_ids), self.ask.max_tokens)
        text = self.tokenizer.decode(token_ids[: self.ask.max_tokens], skip_special_tokens=True)
        found = [place for stop in self.ask.stops if (place := text.find(stop)) >= 0]
        if found:
            self.reason = "stop"
            return text[: min(found)]
        if is_final:
            self.reason = "stop" if has_ended and len(token_ids) <= self.ask.max_tokens else "length"
            return text
        text = text.rstrip("\ufffd")  # a character whose other bytes are still masks
        # what may be the beginning of a stop string waits for the tokens behind it
        held = max(
            (n for stop in self.ask.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        return text[: len(text) - held]

    def delta(self, token_ids: list[int], **options: Any) -> str:
        """What is new since the last call."""
        if self.reason is not None:
            return ""
        text = self.text_of(token_ids, **options)
        new, self.sent = text[len(self.sent) :], max(text, self.sent, key=len)
        return new


class ServerMetrics:
    """What /metrics tells, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        self.requests = prometheus.Counter(
            "llada_requests",
            "Requests by endpoint and status.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.tokens = prometheus.Counter("llada_tokens", "Tokens by kind.", ["kind"], registry=self.registry)
        self.seconds = prometheus.Histogram(
            "llada_request_seconds", "Time of answered requests.", ["endpoint"], registry=self.registry
        )
        for name, text, read in (
            ("llada_waiting", "Requests in the queue.", lambda: engine.num_waiting),
            ("llada_running", "Requests in the running batch.", lambda: engine.num_running),
            ("llada_forwards", "Calls of the model.", lambda: engine.num_forwards),
        ):
            prometheus.Gauge(name, text, registry=self.registry).set_function(read)
