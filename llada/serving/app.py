"""The HTTP application: OpenAI's endpoints, health, metrics and the page, around one engine."""

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from llada.data.chat import render_prompt
from llada.data.reading import to_prompt
from llada.inference.denoising_view import spell
from llada.serving.answers import Candidate, ServerMetrics
from llada.serving.engine import Engine, Job, QueueIsFull, Row
from llada.serving.protocol import (
    SETTINGS,
    ApiError,
    Ask,
    ChatBody,
    CompletionBody,
    Reply,
    fit_length,
    read_ask,
    server_sent,
    usage_of,
)
from modelling_final import LLaDAGenerationConfig
from modelling_final.orders_llada import ORDERS

log = logging.getLogger("llada.serving")

MAX_BODY = 4 << 20  # bytes; a context of 32K tokens is some 150 KB of text
MAX_PROMPTS = 64  # texts in one completion request
PAGE = Path(__file__).with_name("page")
PAGE_FILES = {"/": "index.html", "/page.css": "page.css", "/denoise.js": "denoise.js", "/page.js": "page.js"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class Pending:
    """The jobs of one request, and their events on the way from the engine's thread to the client."""

    jobs: list[Job] = field(default_factory=list)
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    results: dict[int, list[tuple[list[int], bool]]] = field(default_factory=dict)


class Service:
    """One model behind OpenAI's API."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: LLaDAGenerationConfig,
        *,
        name: str,
        max_batch_size: int = 32,
        max_queue: int = 256,
        api_key: str | None = None,
    ) -> None:
        self.tokenizer, self.settings, self.name, self._api_key = tokenizer, settings, name, api_key
        self.context = model.config.max_sequence_length
        self.engine = Engine(model, max_batch_size=max_batch_size, max_queue=max_queue)
        self.metrics = ServerMetrics(self.engine)
        self.started = int(time.time())
        self._spelled: dict[int, str] = {}

    def app(self) -> Starlette:
        """The ASGI application; its shutdown answers what was accepted."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.engine.close)

        routes = [
            Route("/v1/chat/completions", self._counted("chat", self._chat), methods=["POST"]),
            Route("/v1/completions", self._counted("completions", self._completions), methods=["POST"]),
            Route("/v1/models", self._counted("models", self._models)),
            Route("/v1/models/{model:path}", self._counted("models", self._model)),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            *(Route(path, self._page) for path in PAGE_FILES),
        ]
        handlers = {HTTPException: self._http_error}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    def _counted(self, endpoint: str, handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            started = time.monotonic()
            try:
                self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                headers = {"Retry-After": "1"} if error.status == 429 else None
                response = JSONResponse(error.body(), status_code=error.status, headers=headers)
            except Exception:
                log.exception("a request failed")
                response = JSONResponse(
                    ApiError(500, "the server failed; its log says why").body(), status_code=500
                )
            self.metrics.requests.labels(endpoint, response.status_code).inc()
            self.metrics.seconds.labels(endpoint).observe(time.monotonic() - started)
            return response

        return handle

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        message = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not allowed here"}
        refusal = ApiError(error.status_code, message.get(error.status_code, error.detail))
        return JSONResponse(refusal.body(), status_code=error.status_code, headers=error.headers)

    def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        # in constant time: the time of a comparison must not tell how much of a key is right
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._api_key.encode()):
            raise ApiError(401, "wrong or missing API key", code="invalid_api_key")

    async def _page(self, request: Request) -> Response:
        return FileResponse(PAGE / PAGE_FILES[request.url.path], headers=PAGE_HEADERS)

    async def _health(self, _: Request) -> Response:
        is_alive = self.engine.is_alive
        return JSONResponse(
            {"status": "ok" if is_alive else "stopping"}, status_code=200 if is_alive else 503
        )

    async def _metrics(self, _: Request) -> Response:
        text = prometheus.generate_latest(self.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    def _card(self) -> dict[str, Any]:
        settings = self.settings.to_dict()
        shown = {name: settings[name] for name in sorted(SETTINGS | {"gen_length", "temperature"})}
        own = {"context": self.context, "settings": shown, "orders": list(ORDERS)}
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "llada",
            "llada": own,
        }

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_name(request.path_params["model"])
        return JSONResponse(self._card())

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise ApiError(404, f"no model {name!r:.100}; this server has {self.name!r}", param="model",
                           code="model_not_found")  # fmt: skip

    async def _read(self, request: Request, body_class: type) -> Ask:
        raw = bytearray()
        async for part in request.stream():
            raw += part
            if len(raw) > MAX_BODY:
                raise ApiError(413, f"the body is larger than {MAX_BODY} bytes")
        ask = read_ask(bytes(raw), body_class, self.settings)
        self._check_name(ask.body.model)
        return ask

    async def _chat(self, request: Request) -> Response:
        ask = await self._read(request, ChatBody)
        try:
            messages = to_prompt({"messages": ask.body.messages}, "messages")
            if ask.body.messages[-1].get("role") != "user":
                raise ValueError("messages: the last one must be the user's")
            prompt = render_prompt(messages, self.tokenizer, chat=True)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        return await self._answer(request, ask, [(prompt, [])], is_chat=True)

    async def _completions(self, request: Request) -> Response:
        ask = await self._read(request, CompletionBody)
        given = ask.body.prompt
        is_one = isinstance(given, str) or (given and isinstance(given[0], int))
        prompts = [given] if is_one else list(given)
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise ApiError(400, f"prompt: give 1 to {MAX_PROMPTS} texts, got {len(prompts)}", param="prompt")
        suffix = self._tokens(ask.body.suffix, "suffix") if ask.body.suffix else []
        if suffix and ask.settings.method == "semi_autoregressive_origin":
            raise ApiError(400, "a suffix needs a canvas of full length: another method", param="suffix")
        pairs = [(self._tokens(prompt, "prompt"), suffix) for prompt in prompts]
        return await self._answer(request, ask, pairs, is_chat=False)

    def _tokens(self, text: str | list[int], param: str) -> list[int]:
        try:
            if isinstance(text, str):
                token_ids = render_prompt(text, self.tokenizer, chat=False)
            else:
                token_ids = text
                if not all(0 <= i < len(self.tokenizer) and i != self.tokenizer.mask_token_id for i in text):
                    raise ValueError(f"token ids are from 0 to {len(self.tokenizer) - 1}, without the mask's")
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from None
        if not token_ids:
            raise ApiError(400, f"{param} is empty", param=param)
        return token_ids

    async def _answer(
        self, request: Request, ask: Ask, prompts: list[tuple[list[int], list[int]]], *, is_chat: bool
    ) -> Response:
        pending = self._submit(ask, prompts)
        reply = Reply(self.name, is_chat)
        num_prompt = sum(len(prompt) for prompt, _ in prompts)
        candidates = [Candidate(self.tokenizer, ask) for job in pending.jobs for _ in range(job.num_rows)]
        if ask.body.stream:
            chunks = self._stream(request, ask, pending, candidates, reply, num_prompt)
            return StreamingResponse(
                chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        try:
            while len(pending.results) < len(pending.jobs):
                await self._next(pending, request)
        finally:
            for job in pending.jobs:
                job.is_cancelled = True
        answers = [answer for i in range(len(pending.jobs)) for answer in pending.results[i]]
        texts = [
            candidate.text_of(token_ids, is_final=True, has_ended=has_ended)
            for candidate, (token_ids, has_ended) in zip(candidates, answers, strict=True)
        ]
        usage = self._count(num_prompt, candidates)
        return JSONResponse(reply.whole(texts, [c.reason for c in candidates], usage))

    def _count(self, num_prompt: int, candidates: list[Candidate]) -> dict[str, int]:
        num_completion = sum(candidate.num_tokens for candidate in candidates)
        self.metrics.tokens.labels("prompt").inc(num_prompt)
        self.metrics.tokens.labels("completion").inc(num_completion)
        return usage_of(num_prompt, num_completion)

    def _submit(self, ask: Ask, prompts: list[tuple[list[int], list[int]]]) -> Pending:
        """Queues a job for each prompt; ApiError 400 where one does not fit the context."""
        pending, loop = Pending(), asyncio.get_running_loop()

        def put(event: tuple) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
                loop.call_soon_threadsafe(pending.events.put_nowait, event)

        for i, (prompt, suffix) in enumerate(prompts):
            settings = self._fit(ask, len(prompt) + len(suffix))
            if suffix:  # a hole is filled to its end
                settings = settings.changed(early_stop=False, logits_eos_inf=True)
            block = settings.block_of(settings.gen_length)

            def on_step(
                candidate: int, entry: dict[str, Any], row: Row, i: int = i, block: int = block
            ) -> None:
                put(("step", i, candidate, entry, row.beginning(block)))

            pending.jobs.append(
                Job(
                    prompt_ids=prompt,
                    suffix_ids=suffix,
                    settings=settings,
                    # without a seed each request is a draw of its own
                    record_id=i if ask.is_seeded else secrets.randbits(48),
                    on_step=on_step if ask.body.stream else None,
                    on_done=lambda result, i=i: put(("done", i, result)),
                )
            )
        for job in pending.jobs:
            try:
                self.engine.submit(job)
            except QueueIsFull:
                for other in pending.jobs:
                    other.is_cancelled = True
                raise ApiError(429, "the queue is full, try again later", code="queue_full") from None
        return pending

    def _fit(self, ask: Ask, num_given: int) -> LLaDAGenerationConfig:
        room = self.context - num_given
        if ask.settings.gen_length <= room:
            return ask.settings
        body = ask.body
        asked = body.max_tokens or getattr(body, "max_completion_tokens", None)
        block = ask.settings.block_length or 1
        if asked is None and room >= block:  # the default length gives way to a long prompt
            ask.max_tokens = room // block * block
            return fit_length(ask.settings, ask.max_tokens)
        raise ApiError(
            400,
            f"{num_given} prompt tokens and {ask.settings.gen_length} of the answer exceed {self.context}",
            param="max_tokens" if room > 0 else None,
            code="context_length_exceeded",
        )

    async def _next(self, pending: Pending, request: Request) -> tuple:
        """The next event of a request; ApiError where its batch failed or its client has gone."""
        event = None
        while event is None:
            if await request.is_disconnected():
                raise ApiError(499, "the client has gone")
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(pending.events.get(), timeout=0.5)
        if event[0] == "done":
            if isinstance(event[2], Exception):
                log.error("a batch failed", exc_info=event[2])
                raise ApiError(500, "the model failed on this batch; the server's log says why")
            pending.results[event[1]] = event[2]
        return event

    async def _stream(
        self,
        request: Request,
        ask: Ask,
        pending: Pending,
        candidates: list[Candidate],
        reply: Reply,
        num_prompt: int,
    ) -> AsyncIterator[bytes]:
        num = pending.jobs[0].num_rows
        try:
            if reply.is_chat:
                for index in range(len(candidates)):
                    yield server_sent(reply.chunk(index, "", first=True))
            while len(pending.results) < len(pending.jobs):
                try:
                    event = await self._next(pending, request)
                except ApiError as error:
                    yield server_sent(error.body())
                    return
                if event[0] == "step":
                    _, i, c, entry, beginning = event
                    index = i * num + c
                    if ask.body.stream_steps:
                        yield server_sent(self._step_chunk(reply, index, entry))
                    if new := candidates[index].delta(beginning, is_final=False):
                        yield server_sent(reply.chunk(index, new))
                    continue
                for c, (token_ids, has_ended) in enumerate(event[2]):
                    index = event[1] * num + c
                    new = candidates[index].delta(token_ids, is_final=True, has_ended=has_ended)
                    yield server_sent(reply.chunk(index, new, candidates[index].reason))
            usage = self._count(num_prompt, candidates)
            if ask.body.stream_options is not None and ask.body.stream_options.include_usage:
                yield server_sent(reply.usage_chunk(usage))
            yield server_sent("[DONE]")
        finally:  # also when the client goes: its rows then hold nobody up
            for job in pending.jobs:
                job.is_cancelled = True

    def _step_chunk(self, reply: Reply, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        """A chunk without text that carries one denoising step; for other clients it is an empty delta."""
        texts = [self._spell(token_id) for token_id in entry["token_ids"]]
        names = ("block", "step", "positions", "token_ids", "confidences", "remasked")
        step = {name: entry[name] for name in names}
        return reply.chunk(index, "") | {"llada": {"index": index, **step, "texts": texts}}

    def _spell(self, token_id: int) -> str:
        if token_id not in self._spelled:
            # "·": a part of a character
            self._spelled[token_id] = spell(self.tokenizer, [token_id])[0] or "\u00b7"
        return self._spelled[token_id]
