"""The server over real HTTP, on a tiny model: OpenAI's client, streams, batches, refusals, signals."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from conftest import ROOT, load_script
from llada.data.chat import render_prompt
from llada.models.building import load_for_inference
from llada.serving import engine as engine_module
from llada.serving.app import MAX_BODY
from llada.serving.engine import Row
from serving import BLOCK, LENGTH, serve, wait_for

KEY = "sesame"


@pytest.fixture(scope="module")
def model(model_dir):
    return load_for_inference(str(model_dir), chat=True)[0]


@pytest.fixture(scope="module")
def server(model, model_dir):
    server = serve(model, model_dir, api_key=KEY)
    yield server
    server.close()


@pytest.fixture
def client(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture
def openai_client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def expected(server, text, gen_length=LENGTH, **settings):
    """What the model's own `generate` answers to a user's message."""
    service = server.service
    prompt = render_prompt([{"role": "user", "content": text}], service.tokenizer, chat=True)
    output = service.engine.model.generate(
        [prompt], generation_config=service.settings, gen_length=gen_length, record_ids=[0],
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return service.tokenizer.decode(output.completions[0], skip_special_tokens=True)


def ask(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def test_openais_client_gets_the_models_answer(server, openai_client):
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    assert openai_client.models.retrieve("tiny").id == "tiny"
    reply = openai_client.chat.completions.create(model="tiny", **ask("hello"))
    assert reply.choices[0].message.content == expected(server, "hello")
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    chunks = list(openai_client.chat.completions.create(
        model="tiny", stream=True, stream_options={"include_usage": True}, **ask("hello")
    ))  # fmt: skip
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == reply.choices[0].message.content
    assert chunks[-1].usage == reply.usage
    assert chunks[-2].choices[0].finish_reason == reply.choices[0].finish_reason


def test_lm_evals_chat_model_gets_the_models_answers(server, monkeypatch):
    """`lm_eval --model local-chat-completions --apply_chat_template`."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    url = f"{server.url}/v1/chat/completions"
    lm = get_model("local-chat-completions")(base_url=url, model="tiny", num_concurrent=4, max_retries=1)
    texts = ["hello", "What is 2 + 2?", "two words", "x" * 40]
    chats = [lm.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
    settings = {"max_gen_toks": LENGTH, "until": ["\n\n\n\n"], "do_sample": False, "temperature": 0.0}
    requests = [
        Instance("generate_until", {}, (chat, dict(settings)), index) for index, chat in enumerate(chats)
    ]
    assert lm.generate_until(requests, disable_tqdm=True) == [expected(server, text) for text in texts]


def test_completions_take_texts_token_ids_and_a_suffix(server, openai_client):
    service = server.service
    ids = render_prompt("one two", service.tokenizer, chat=False)
    replies = openai_client.completions.create(model="tiny", prompt=["one two", "three"], max_tokens=LENGTH)
    alone = openai_client.completions.create(model="tiny", prompt=ids, max_tokens=LENGTH)
    assert replies.choices[0].text == alone.choices[0].text
    assert [choice.index for choice in replies.choices] == [0, 1]
    hole = openai_client.completions.create(model="tiny", prompt="one", suffix=" three", max_tokens=8)
    suffix = render_prompt(" three", service.tokenizer, chat=False)
    output = service.engine.model.generate(
        [render_prompt("one", service.tokenizer, chat=False)], generation_config=service.settings,
        gen_length=[8], suffixes=[suffix], early_stop=False, logits_eos_inf=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert hole.choices[0].text == service.tokenizer.decode(output.completions[0], skip_special_tokens=True)


def test_an_answer_does_not_depend_on_who_else_asks(server):
    texts = [f"{'word ' * (i % 7)}question {i}" for i in range(24)]
    lengths = [(8, 16, 24)[i % 3] for i in range(24)]

    async def everybody():
        async with httpx.AsyncClient(
            base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}
        ) as client:
            posts = [
                client.post("/v1/chat/completions", json=ask(t, max_tokens=n, stream=False), timeout=60)
                for t, n in zip(texts, lengths, strict=True)
            ]
            return await asyncio.gather(*posts)

    forwards = server.service.engine.num_forwards
    replies = asyncio.run(everybody())
    assert server.service.engine.num_forwards - forwards < 24 * 8  # they went in batches
    for text, length, reply in zip(texts, lengths, replies, strict=True):
        assert reply.json()["choices"][0]["message"]["content"] == expected(server, text, length)


def test_seeds_and_several_answers(server, client):
    body = ask("hello", temperature=1.0, seed=7, n=3)
    first, second = (client.post("/v1/chat/completions", json=body).json()["choices"] for _ in range(2))
    assert first == second
    assert len({choice["message"]["content"] for choice in first}) > 1
    body.pop("seed")
    unseeded = [client.post("/v1/chat/completions", json=body).json()["choices"] for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    seeded = client.post("/v1/chat/completions", json=ask("hello", temperature=1.0, seed=7)).json()
    assert seeded["choices"][0]["message"]["content"] == expected(server, "hello", temperature=1.0, seed=7)


def test_stop_strings_and_lengths_cut_alike_whole_and_streamed(server, client):
    whole = expected(server, "hello")
    stop = whole[4:7]
    body = ask("hello", stop=[stop, "never there"])
    reply = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert reply["message"]["content"] == whole[: whole.find(stop)]
    assert reply["finish_reason"] == "stop"
    assert streamed(client, body) == (whole[: whole.find(stop)], "stop")
    short = client.post("/v1/chat/completions", json=ask("hello", max_tokens=3)).json()
    assert short["usage"]["completion_tokens"] <= 3
    assert short["choices"][0]["finish_reason"] == "length"


def events(client, body, path="/v1/chat/completions"):
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def streamed(client, body):
    choices = [chunk["choices"][0] for chunk in events(client, body)]
    return "".join(c["delta"].get("content", "") for c in choices), choices[-1]["finish_reason"]


def test_every_denoising_step_is_sent_on_request(server, client):
    chunks = events(client, ask("hello", stream_steps=True))
    steps = [chunk["llada"] for chunk in chunks if "llada" in chunk]
    row = Row([None] * LENGTH, frozenset(server.service.engine.model.config.end_ids))
    for step in steps:
        row.note(step)
        assert len(step["texts"]) == len(step["positions"]) == len(step["confidences"])
    text = server.service.tokenizer.decode(row.canvas[: row.end], skip_special_tokens=True)
    assert text == expected(server, "hello")
    blocks = [chunk["choices"][0]["delta"].get("content") for chunk in chunks if "llada" not in chunk]
    assert (
        len([text for text in blocks if text]) > 1 or len(steps) <= BLOCK
    )  # block by block, not all at the end


# ruff: noqa: E501 - tables of requests
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GOOD = ask("hello")
REFUSED = [
    # field values that the two endpoints share
    *[(path, base | {name: value}, 400, name) for path, base in ((CHAT, GOOD), (COMPLETIONS, {"prompt": "a"}))
      for name, value in (
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "8"), ("max_tokens", 1.5), ("max_tokens", True),
        ("max_tokens", 10**7), ("max_tokens", [8]), ("temperature", -0.1), ("temperature", 2.1),
        ("temperature", "hot"), ("temperature", [1]), ("n", 0), ("n", -1), ("n", 17), ("n", 2), ("n", "2"),
        ("stop", ""), ("stop", [""]), ("stop", ["a"] * 5), ("stop", 1), ("stop", [1]), ("stop", {"a": 1}),
        ("seed", "x"), ("seed", 1.5), ("seed", [1]), ("stream", "yes"), ("stream", 1), ("stream_options", 3),
        ("stream_steps", "on"), ("frequency_penalty", 0.5), ("presence_penalty", -1), ("logit_bias", {"5": 1}),
        ("logprobs", 3), ("top_logprobs", 2), ("echo", True), ("best_of", 4), ("top_p", 0.5), ("foo", 1),
        ("temprature", 1), ("block_length", 0), ("block_length", -8), ("block_length", 1.5), ("steps", 0),
        ("steps", -1), ("steps", "8"), ("remasking", "alphabetical"), ("remasking", 3), ("cache", "all"),
        ("parallel_decoding", "yes"), ("threshold", -1), ("threshold", "x"), ("factor", -1),
        ("cfg_scale", -1), ("repetition_penalty", 0), ("remdm", "x"), ("method", "x"), ("klass_steps", 0),
        ("model", 5), ("gen_length", 8), ("record_ids", [1]), ("cuda_graphs", True),
    )],
    # what only a conversation has
    *[(CHAT, body, 400, param) for body, param in (
        ({}, "messages"), ({"messages": []}, "messages"), ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages"), ({"messages": [{}]}, "messages"), ({"messages": None}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"), ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"), ({"messages": {"role": "user"}}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages"),
        (ask("x") | {"tools": [{"type": "function"}]}, "tools"), (ask("x") | {"functions": [{}]}, "functions"),
        (ask("x") | {"response_format": {"type": "json_object"}}, "response_format"),
        (ask("x") | {"tool_choice": "required"}, "tool_choice"), (ask("x") | {"prompt": "y"}, "prompt"),
        (ask("x") | {"suffix": "y"}, "suffix"), (ask("x") | {"max_completion_tokens": 0}, "max_completion_tokens"),
        (ask("word " * 400), None), (ask("<|mdm_mask|>"), "messages"),
    )],
    # what only a completion has
    *[(COMPLETIONS, body, 400, param) for body, param in (
        ({}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": 5}, "prompt"),
        ({"prompt": [[]]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [10**6]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": None}, "prompt"),
        ({"prompt": "a", "suffix": 5}, "suffix"), ({"prompt": "<|mdm_mask|>"}, "prompt"),
        ({"prompt": "a", "suffix": "<|mdm_mask|>"}, "suffix"), ({"prompt": [1.5]}, "prompt"),
        ({"prompt": "a", "suffix": "b", "method": "semi_autoregressive_origin"}, None),
        ({"prompt": "a", "messages": []}, "messages"), ({"prompt": "a", "max_tokens": 250}, "max_tokens"),
    )],
    (CHAT, GOOD | {"model": "gpt-5"}, 404, "model"),
    (COMPLETIONS, {"prompt": "a", "model": "../../etc/passwd"}, 404, "model"),
]  # fmt: skip
BODIES = [
    b"", b"{", b"[]", b"null", b"5", b'"text"', b"{}x", b"\xff\xfe", b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b"[" * 100_000, b'{"messages":' * 50_000, b'{"temperature": NaN, "prompt": "a"}', b'{"temperature": Infinity, "prompt": "a"}',
    b"{'prompt': 'a'}", b'{"prompt": "a",}', b'{"seed": ' + b"9" * 5000 + b', "prompt": "a"}', b"\x00", b"prompt=a",
]  # fmt: skip


def test_bad_requests_are_refused_by_name_and_the_server_lives(server, client):
    assert len(REFUSED) + len(BODIES) > 150
    for path, body, status, param in REFUSED:
        reply = client.post(path, json=body)
        assert reply.status_code == status, (path, body, reply.text)
        error = reply.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]
        assert param is None or error["param"] == param, (body, error)
    for raw in BODIES:
        for path in (CHAT, COMPLETIONS):
            reply = client.post(path, content=raw)
            assert reply.status_code == 400, raw[:40]
            assert reply.json()["error"]["message"]
    assert client.post(CHAT, content=b" " * (MAX_BODY + 1)).status_code == 413
    for method, path, status in (
        ("GET", CHAT, 405), ("PUT", COMPLETIONS, 405), ("POST", "/v1/models", 405), ("GET", "/v1/engines", 404),
        ("GET", "/page/../app.py", 404), ("GET", "/..%2f..%2fetc/passwd", 404), ("GET", "/app.py", 404),
        ("GET", "/v1/models/other", 404), ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
    ):  # fmt: skip
        reply = client.request(method, path)
        assert reply.status_code == status, path
        assert reply.json()["error"]["message"]
    assert client.post(CHAT, json=GOOD).status_code == 200
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("key", [None, "wrong", "Bearer", "ключ".encode().decode("latin-1")])
def test_the_key_is_asked_for_and_never_told(server, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode("latin-1")}
    reply = httpx.post(server.url + CHAT, json=GOOD, headers=headers)
    assert reply.status_code == 401
    assert reply.json()["error"]["type"] == "authentication_error"
    assert KEY not in reply.text
    assert httpx.get(server.url + "/health").status_code == 200


class SlowModel:
    """A model that waits at a gate before each answer."""

    def __init__(self, model):
        self.model, self.config, self.gate, self.started = model, model.config, threading.Event(), 0

    def generate(self, *arguments, **options):
        self.started += 1
        self.gate.wait(20)
        return self.model.generate(*arguments, **options)


def test_a_full_queue_says_so_and_an_abandoned_request_is_dropped(model, model_dir):
    slow = SlowModel(model)
    server = serve(slow, model_dir, max_queue=2, max_batch_size=1)
    try:
        replies = []
        threads = []
        for i in range(3):  # one is being answered, two wait
            post = lambda i=i: replies.append(httpx.post(server.url + CHAT, json=ask(f"{i}"), timeout=60))  # noqa: E731
            threads.append(threading.Thread(target=post))
            threads[-1].start()
            wait_for(lambda i=i: slow.started == 1 and server.service.engine.num_waiting == i)
        refused = httpx.post(server.url + CHAT, json=GOOD)
        assert refused.status_code == 429
        assert refused.headers["Retry-After"]
        assert refused.json()["error"]["type"] == "rate_limit_error"
        slow.gate.set()
        for thread in threads:
            thread.join()
        assert [reply.status_code for reply in replies] == [200] * 3
        # a client that goes leaves the queue
        slow.gate.clear()
        first = threading.Thread(target=lambda: httpx.post(server.url + CHAT, json=GOOD, timeout=60))
        first.start()
        wait_for(lambda: slow.started == 4)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + CHAT, json=ask("gone"), timeout=0.3)
        wait_for(lambda: all(job.is_cancelled for job in server.service.engine._waiting))
        slow.gate.set()
        first.join()
        wait_for(lambda: server.service.engine.num_running == server.service.engine.num_waiting == 0)
        assert slow.started == 4
    finally:
        slow.gate.set()
        server.close()


def test_a_client_that_goes_ends_its_batch(server, client, monkeypatch):
    ended = []
    answer = engine_module.Engine._answer

    def note(self, batch):
        try:
            answer(self, batch)
        except engine_module._NobodyWaits:
            ended.append(len(batch))
            raise

    monkeypatch.setattr(engine_module.Engine, "_answer", note)
    generate = server.service.engine.model.generate

    def slowly(*arguments, on_step, **options):
        return generate(*arguments, on_step=lambda entry: (time.sleep(0.05), on_step(entry)), **options)

    monkeypatch.setattr(server.service.engine.model, "generate", slowly)
    body = ask("hello", max_tokens=100, block_length=100, stream=True, stream_steps=True)
    with client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200
        next(line for line in response.iter_lines() if "llada" in line)  # it has begun
    wait_for(lambda: ended == [1])


def test_a_failing_batch_is_an_error_of_its_own_clients(server, client, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory: secret path")

    monkeypatch.setattr(server.service.engine.model, "generate", fail)
    reply = client.post(CHAT, json=GOOD)
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert "secret" not in reply.text
    lines = client.post(CHAT, json=GOOD | {"stream": True}).text
    assert "server_error" in lines
    assert "[DONE]" not in lines
    monkeypatch.undo()
    assert client.post(CHAT, json=GOOD).status_code == 200


def test_metrics_and_page(server, client):
    client.post(CHAT, json=GOOD)
    text = client.get("/metrics").text
    assert re.search(r'llada_requests_total\{endpoint="chat",status="200"\} \d', text)
    assert "llada_waiting 0.0" in text
    page = client.get("/")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    for name in re.findall(r'(?:src|href)="([\w.]+)"', page.text):
        assert client.get(f"/{name}").status_code == 200


def test_sigterm_answers_what_was_accepted(model_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "inference/serve.py"), "--model_name_or_path", str(model_dir)]
    command += ["--port", str(port), "--gen_length", "128", "--block_length", "8"]
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "LLADA_API_KEY": KEY}
    )
    url = f"http://127.0.0.1:{port}"

    def is_up():
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(is_up, seconds=90)
        replies = []
        headers = {"Authorization": f"Bearer {KEY}"}
        body = ask("hello", logits_eos_inf=True)
        post = lambda: replies.append(httpx.post(url + CHAT, json=body, headers=headers, timeout=60))  # noqa: E731
        threads = [threading.Thread(target=post) for _ in range(8)]
        for thread in threads:
            thread.start()
        metrics = lambda: httpx.get(f"{url}/metrics").text  # noqa: E731
        wait_for(lambda: "llada_running 0.0" not in metrics() or len(replies) == 8)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert [reply.status_code for reply in replies] == [200] * 8
        assert server.wait(30) in (0, -signal.SIGTERM)
        assert KEY not in server.stderr.read()
    finally:
        server.kill()
        server.wait()


def test_the_script_refuses_several_processes(model_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="is one process"):
        load_script("inference/serve.py").main(["--model_name_or_path", str(model_dir)])


def test_a_trace_becomes_a_page_of_its_own(model_dir, tmp_path):
    trace, page = tmp_path / "steps.jsonl", tmp_path / "replay.html"
    load_script("inference/generate.py").main([
        "--model_name_or_path", str(model_dir), "--is_instruct", "--prompt", "</script>hello",
        "--gen_length", "8", "--trace", str(trace),
    ])  # fmt: skip
    replay = load_script("scripts/replay.py").main
    replay(["--trace", str(trace), "--tokenizer", str(model_dir), "--output", str(page)])
    text = page.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="replays">(.*?)</script>', text, re.DOTALL)[1]
    (one,) = json.loads(data)
    assert one["length"] == 8
    assert sorted(p for step in one["steps"] for p in step["positions"]) == list(range(8))
    page.unlink()
    trace.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match=r"steps\.jsonl:1: no 'positions'"):
        replay(["--trace", str(trace), "--tokenizer", str(model_dir), "--output", str(page)])
