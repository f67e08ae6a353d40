"""OpenAI's requests and replies: what a body may say, and the JSON of answers, chunks and errors."""

import json
import time
import uuid
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelling_final import LLaDAGenerationConfig
from modelling_final.sampler_settings_llada import SamplerSettings

MAX_CANDIDATES = 16
MAX_STOPS = 4  # OpenAI's limit

# Fields that say nothing about the answer's tokens; accepted as OpenAI's servers accept them.
INDIFFERENT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
# Fields of OpenAI's API whose neutral value asks for nothing; any other value is refused.
NEUTRAL = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "logprobs": (False, 0, None),
    "top_logprobs": (0, None),
    "echo": (False, None),
    "best_of": (1, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "function_call": ("none", "auto", None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "top_p": (1, None),
}


class ApiError(Exception):
    """A refusal in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Body(BaseModel):
    """What both endpoints share. `stream_steps` is ours: every denoising step is sent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    n: int | None = Field(None, ge=1, le=MAX_CANDIDATES)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_steps: bool = False


class ChatBody(Body):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionBody(Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None


@dataclass
class Ask:
    """A request, checked."""

    body: ChatBody | CompletionBody
    settings: LLaDAGenerationConfig  # of the sampler, for `max_tokens` tokens rounded up to whole blocks
    max_tokens: int
    stops: list[str] = field(default_factory=list)
    is_seeded: bool = False  # the client gave a seed: the same request has the same answer again


def read_json(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request. ApiError 400 if there is none."""
    try:
        # NaN becomes a float, which the fields refuse by name
        value = json.loads(raw, parse_constant=lambda name: float(name))
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error) or 'too deep'}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(value).__name__}")
    return value


def read_ask(
    raw: bytes, body_class: type[ChatBody] | type[CompletionBody], defaults: LLaDAGenerationConfig
) -> Ask:
    """A request body with the server's defaults filled in; ApiError 400, naming the field.

    `body_class` says which endpoint's fields there are; the sampler's settings may stand beside them.
    """
    values = read_json(raw)
    for name in INDIFFERENT & values.keys():
        values.pop(name)
    for name in NEUTRAL.keys() & values.keys():
        value = values.pop(name)
        # in Python True == 1, in JSON it is another value
        if not any(
            value == neutral and type(value) in (type(neutral), int, float) for neutral in NEUTRAL[name]
        ):
            raise ApiError(400, f"{name} {value!r:.80} is not supported", param=name)
    known = body_class.model_fields
    sampler = {name: values.pop(name) for name in list(values) if name not in known and name in SETTINGS}
    try:
        body = body_class(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else None
        unknown = first["type"] == "extra_forbidden"
        message = f"unknown field {name!r}" if unknown else f"{name}: {first['msg']}"
        raise ApiError(400, message, param=name) from None
    return _settle(body, sampler, defaults)


# What a body may set beside OpenAI's fields, which have names of their own for the settings left out here.
OPENAI_NAMES = {"num_return_sequences": "n", "gen_length": "max_tokens"}
OTHERS_NAMES = {"gen_length", "temperature", "seed", "early_stop", "cuda_graphs"}
SETTINGS = {setting.name for setting in fields(SamplerSettings)} - OTHERS_NAMES


def _settle(body: ChatBody | CompletionBody, sampler: dict[str, Any], defaults: LLaDAGenerationConfig) -> Ask:
    max_tokens = getattr(body, "max_completion_tokens", None) or body.max_tokens or defaults.gen_length
    if max_tokens > MAX_LENGTH:
        raise ApiError(400, f"max_tokens {max_tokens} is more than {MAX_LENGTH}", param="max_tokens")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOPS or not all(stops):
        raise ApiError(400, f"stop takes up to {MAX_STOPS} strings, none of them empty", param="stop")
    changes = {name: value for name, value in sampler.items() if value is not None}
    own = {"temperature": body.temperature, "num_return_sequences": body.n, "seed": body.seed}
    changes |= {name: value for name, value in own.items() if value is not None}
    try:
        settings = fit_length(defaults.changed(**changes), max_tokens)
    except (ValueError, TypeError) as error:
        name = next((name for name in changes if name in str(error)), None)
        raise ApiError(400, str(error), param=OPENAI_NAMES.get(name, name)) from None
    return Ask(body, settings, max_tokens, stops, is_seeded=body.seed is not None)


MAX_LENGTH = 1 << 20


def fit_length(settings: LLaDAGenerationConfig, max_tokens: int) -> LLaDAGenerationConfig:
    """The settings with room for `max_tokens` tokens, in whole blocks; steps stay in proportion.

    ValueError: the steps cannot be shared out over the blocks.
    """
    block = None if settings.method == "fixed_length" else settings.block_length
    length = max_tokens if block is None else -(-max_tokens // block) * block
    changes: dict[str, Any] = {"gen_length": length}
    if settings.steps is not None:
        blocks = 1 if block is None else length // block
        per_token = settings.steps / settings.gen_length
        changes["steps"] = max(1, round(per_token * length / blocks)) * blocks
    fitted = settings.changed(**changes)
    fitted.steps_per_block(length)
    return fitted


@dataclass
class Reply:
    """The JSON of one request's answer, whole or in chunks."""

    model: str
    is_chat: bool
    id: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        frame = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**frame, "choices": choices}

    def whole(self, texts: list[str], reasons: list[str], usage: dict[str, int]) -> dict[str, Any]:
        choices = []
        for i, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choices.append({"index": i, **content, "logprobs": None, "finish_reason": reason})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._frame(kind, choices) | {"usage": usage}

    def chunk(
        self, index: int, text: str, reason: str | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        if self.is_chat:
            delta = {"role": "assistant"} if first else {}
            content: dict[str, Any] = {"delta": delta | ({"content": text} if text or first else {})}
        else:
            content = {"text": text}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return self._frame("chat.completion.chunk" if self.is_chat else "text_completion", [choice])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._frame(kind, []) | {"usage": usage}


def usage_of(num_prompt: int, num_completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def server_sent(value: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
