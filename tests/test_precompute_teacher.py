"""Teacher rows from a checkpoint, from files and from a server: stored, read in chunks, resumed, refused."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import ROOT, load_script
from llada.autoregressive.causal_lm import load_causal_lm
from llada.autoregressive.teacher_rows import (
    Distributions,
    Student,
    TeacherAnswer,
    TeacherChunks,
    TeacherTable,
    as_columns,
    fit_length,
)
from llada.data.reading import to_messages
from llada.data.shards import load_rows, read_manifest
from llada.models.tokens import load_tokenizer
from test_vocabulary import bytes_only

precompute = load_script("alignment/precompute_teacher.py")
SAMPLES = ROOT / "data/samples"


def save_teacher(folder, tokenizer, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=len(tokenizer) + 3, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.lm_head.weight)  # distributions that differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher_dir(tokenizer_dir, tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("ar"), load_tokenizer(str(tokenizer_dir), chat=True))


def flags(folder, tokenizer_dir, *more, source="sft.jsonl"):
    return [
        "--input",
        str(SAMPLES / source),
        "--tokenizer",
        str(tokenizer_dir),
        "--output_dir",
        str(folder),
        *more,
    ]


def run(folder, tokenizer_dir, *more, **options):
    precompute.main(flags(folder, tokenizer_dir, *more, **options))
    rows = load_rows(folder)
    return rows, TeacherTable(rows)


@torch.no_grad()
def expected_log_probs(teacher_dir, row, positions):
    """The teacher's log-probabilities of what stands at these positions, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    logits = model(torch.tensor([row["input_ids"]])).logits[0]
    return logits[torch.tensor(positions) - 1].log_softmax(-1)


def test_a_checkpoint_scores_given_answers(teacher_dir, tokenizer_dir, tmp_path):
    rows, table = run(tmp_path / "full", tokenizer_dir, "--teacher", str(teacher_dir), "--top_k", "0")
    size = len(load_tokenizer(str(tokenizer_dir), chat=True))
    for i in (0, 3):
        positions = table.positions(i)
        # one vocabulary: a distribution for every token of the answer and of its end
        assert positions.tolist() == np.flatnonzero(rows[i]["in_answer"]).tolist()
        expected = expected_log_probs(teacher_dir, rows[i], positions)
        found = table.distributions(i)
        np.testing.assert_allclose(found.log_probs, expected[:, :size], rtol=1e-4, atol=1e-5)
        # outputs without a token are the rest
        np.testing.assert_allclose(found.log_rest, expected[:, size:].logsumexp(-1), rtol=1e-4, atol=1e-5)
    topped, top_table = run(tmp_path / "top", tokenizer_dir, "--teacher", str(teacher_dir), "--top_k", "4")
    assert topped[0]["input_ids"] == rows[0]["input_ids"]
    best = top_table.distributions(0)
    full = np.exp(table.distributions(0).log_probs)
    np.testing.assert_allclose(np.exp(best.log_probs), np.sort(full)[:, :-5:-1], rtol=1e-4)
    np.testing.assert_allclose(np.exp(best.log_probs).sum(-1) + np.exp(best.log_rest), 1, rtol=1e-5)


def test_rows_are_those_of_sft(teacher_dir, tokenizer_dir, tmp_path):
    rows, _ = run(tmp_path / "rows", tokenizer_dir, "--teacher", str(teacher_dir))
    prepare = load_script("sft_training/prepare_sft.py")
    prepare.main([
        "--input", str(SAMPLES / "sft.jsonl"), "--tokenizer", str(tokenizer_dir),
        "--output_dir", str(tmp_path / "sft"),
    ])  # fmt: skip
    for ours, theirs in zip(rows, load_rows(tmp_path / "sft/train"), strict=True):
        assert ours["input_ids"] == theirs["input_ids"] and ours["in_answer"] == theirs["in_answer"]


def test_another_vocabulary_is_aligned_by_bytes(tokenizer_dir, tmp_path):
    tokenizer = bytes_only("<|im_start|>", "<|im_end|>", bos_token="<|im_start|>", eos_token="<|im_end|>")
    teacher_dir = save_teacher(tmp_path / "bytes", tokenizer)
    rows, table = run(tmp_path / "rows", tokenizer_dir, "--teacher", str(teacher_dir), "--top_k", "0")
    student = Student(load_tokenizer(str(tokenizer_dir), chat=True))
    for i in (0, 5):
        positions = table.positions(i)
        tokens = [rows[i]["input_ids"][p] for p in positions]
        # every token of the student starts at some byte; its second closing token has no counterpart
        assert positions.tolist() == np.flatnonzero(rows[i]["in_answer"])[:-1].tolist()
        assert tokens[-1] == student.table.closing
        # probability of a token of one byte = the teacher's of that byte after the answer's bytes so far
        model = AutoModelForCausalLM.from_pretrained(teacher_dir)
        answer = student.table.decode(tokens)
        record = [json.loads(line) for line in (SAMPLES / "sft.jsonl").read_text().splitlines()][i]
        question = to_messages(record, "x")
        prompt = "\n".join(m["content"] for m in question[:-1]) + "\n"
        ids = tokenizer(prompt + answer.decode(), add_special_tokens=False).input_ids
        first = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        space = student.table.id_of_text[b" "]
        offsets = student.table.starts(tokens)[:-1]
        their_space = tokenizer(" ", add_special_tokens=False).input_ids[0]
        wanted = log_probs[first - 1 + torch.from_numpy(offsets), their_space]
        np.testing.assert_allclose(table.distributions(i).log_probs[:, space], wanted, rtol=1e-3, atol=1e-4)


def test_generated_answers_are_the_teachers_own(teacher_dir, tokenizer_dir, tmp_path):
    options = (
        "--teacher",
        str(teacher_dir),
        "--responses",
        "generate",
        "--max_new_tokens",
        "12",
        "--limit",
        "5",
    )
    rows, table = run(tmp_path / "a", tokenizer_dir, *options, source="prompts.jsonl")
    again, _ = run(tmp_path / "b", tokenizer_dir, *options, source="prompts.jsonl")
    assert rows["input_ids"] == again["input_ids"]
    assert read_manifest(tmp_path / "a")["statistics"]["answer_tokens"] <= 5 * 14
    expected = expected_log_probs(teacher_dir, rows[0], table.positions(0))
    np.testing.assert_allclose(
        table.distributions(0).log_probs[:, 0], expected.topk(1).values[:, 0], rtol=1e-3, atol=1e-4
    )


def test_a_stopped_run_goes_on(teacher_dir, tokenizer_dir, tmp_path, monkeypatch, capsys):
    options = ("--teacher", str(teacher_dir), "--shard_size", "2")
    whole, _ = run(tmp_path / "whole", tokenizer_dir, *options)
    encode, calls = precompute.encode, []

    def fails(items, answers, config):
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(items, answers, config)

    monkeypatch.setattr(precompute, "encode", fails)
    with pytest.raises(KeyboardInterrupt):
        precompute.main(flags(tmp_path / "cut", tokenizer_dir, *options))
    with pytest.raises(ValueError, match="preparation was interrupted"):
        load_rows(tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("*.tmp/*.arrow"))
    rows, _ = run(tmp_path / "cut", tokenizer_dir, *options)
    assert calls[3:] == calls[:1] * (len(calls) - 3)  # the two shards that were there were not made again
    for name in rows.column_names:
        assert rows[name] == whole[name]
    assert not [file for file in (tmp_path / "cut").rglob("*") if file.suffix in (".pt", ".pkl", ".bin")]
    with pytest.raises(ValueError, match="was prepared differently: top_k was 32, is 8"):
        run(tmp_path / "cut", tokenizer_dir, *options, "--top_k", "8")


def test_a_teacher_in_a_gguf_file(teacher_dir, tokenizer_dir, tmp_path, monkeypatch):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/model.gguf").write_bytes(b"GGUF")

    def load(path, *, gguf_file, **options):  # reading such a file is transformers' affair
        return load_causal_lm(teacher_dir, **options)

    monkeypatch.setattr(precompute, "load_causal_lm", load)
    options = ("--teacher", str(tmp_path / "gguf"), "--teacher_gguf_file", "model.gguf")
    rows, _ = run(tmp_path / "rows", tokenizer_dir, *options)
    assert len(rows) > 0
    (tmp_path / "gguf/model.gguf").write_bytes(b"GGUF, another one")
    with pytest.raises(ValueError, match="was prepared differently: teacher was"):
        run(tmp_path / "rows", tokenizer_dir, *options)


def test_validation_rows(teacher_dir, tokenizer_dir, tmp_path):
    precompute.main(
        flags(tmp_path, tokenizer_dir, "--teacher", str(teacher_dir), "--validation_input",
              str(SAMPLES / "sft_multiturn.jsonl"))
    )  # fmt: skip
    assert len(load_rows(tmp_path / "train")) > 0
    lengths = [sum(row["in_answer"]) for row in load_rows(tmp_path / "validation")]
    assert all(n > 0 for n in lengths)


@pytest.mark.parametrize("name", ["teacher_logits.json", "teacher_positions.json"])
def test_files_of_the_predecessors_under_their_flags(name, tokenizer_dir, tmp_path, capsys):
    shutil.copytree(tokenizer_dir, tmp_path / "model")
    script = load_script("alignment/preprocess_alignment_data.py")
    script.main([
        "--input_file", str(SAMPLES / name), "--output_file", str(tmp_path / "processed_alignment.pt"),
        "--model_name", str(tmp_path / "model"), "--max_length", "256",
    ])  # fmt: skip
    assert len(load_rows(tmp_path / "processed_alignment.pt")) == (3 if "logits" in name else 2)
    assert ("3 positions have 'full_logits'" in capsys.readouterr().out) == ("positions" in name)


def test_a_bad_file_leaves_nothing_usable(tokenizer_dir, tmp_path):
    text = (SAMPLES / "teacher_logits.json").read_text()
    (tmp_path / "cut.json").write_text(text[:-30])
    with pytest.raises(ValueError, match=r"cut\.json:\d+: malformed JSON"):
        precompute.main([
            "--input", str(tmp_path / "cut.json"), "--tokenizer", str(tokenizer_dir),
            "--output_dir", str(tmp_path / "rows"),
        ])  # fmt: skip
    with pytest.raises(ValueError, match="preparation was interrupted"):
        load_rows(tmp_path / "rows")
    assert [file.name for file in (tmp_path / "rows").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--top_k", "0"),
        ("--responses", "generate", "--temperature", "0"),
        ("--responses", "generate", "--temperature", "1"),
    ],
)
def test_a_teacher_without_numbers_leaves_nothing_usable(more, value, teacher_dir, tokenizer_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    torch.nn.init.constant_(model.lm_head.weight[7], value)
    shutil.copytree(teacher_dir, tmp_path / "ar")
    model.save_pretrained(tmp_path / "ar")
    with pytest.raises(ValueError, match=r"sft\.jsonl:1: the teacher's logits for this answer hold NaN"):
        precompute.main(flags(tmp_path / "rows", tokenizer_dir, "--teacher", str(tmp_path / "ar"), *more))
    assert [file.name for file in (tmp_path / "rows").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--teacher", "owner/x", "--server", "y"), "give --teacher or --server, not both"),
        (("--server", "y", "--top_k", "0"), "a server gives the most likely tokens only"),
        (("--top_k", "-1"), "--top_k -1: must be at least 0"),
        (("--limit", "0"), "--limit 0: must be at least 1"),
        (("--teacher", "no/such"), "--teacher no/such: cannot be read"),
    ],
)
def test_wrong_flags(more, message, tokenizer_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        precompute.main(flags(tmp_path, tokenizer_dir, *more))


def test_long_rows(teacher_dir, tokenizer_dir, tmp_path):
    options = ("--teacher", str(teacher_dir), "--max_length", "64")
    with pytest.raises(ValueError, match=r"sft\.jsonl:\d+: \d+ tokens .* do not fit in --max_length 64"):
        precompute.main(flags(tmp_path / "error", tokenizer_dir, *options))
    rows, table = run(tmp_path / "cut", tokenizer_dir, *options, "--long", "truncate")
    assert max(map(len, rows["input_ids"])) <= 64
    assert all(table.positions(i)[-1] < len(rows[i]["input_ids"]) for i in range(len(rows)))
    answer = TeacherAnswer([1] * 5, [2] * 5, np.arange(5), Distributions(None, np.zeros((5, 3)), np.zeros(5)))
    assert fit_length(answer, "w", max_length=9, long="drop") is None
    assert fit_length(answer, "w", max_length=5, long="truncate") is None
    assert len(fit_length(answer, "w", max_length=7, long="truncate").positions) == 2


@pytest.mark.parametrize("is_dense", [True, False])
def test_chunks_are_slices_of_the_whole(is_dense):
    random = np.random.default_rng(0)
    parts = []
    for n in (3, 1, 4):
        ids = None if is_dense else random.integers(0, 9, (n, 2)).astype(np.int32)
        numbers = random.normal(size=(n, 7 if is_dense else 2)).astype(np.float32)
        parts.append(
            (Distributions(ids, numbers, random.normal(size=n).astype(np.float32)), np.arange(n)[::-1])
        )
    chunks = TeacherChunks([*parts[:2], (parts[0][0], np.arange(0)), parts[2]])
    whole = chunks.take(0, len(chunks), torch.device("cpu"))
    assert len(chunks) == 8 and (whole.ids is None) == is_dense
    for start in range(8):
        for stop in range(start + 1, 9):
            found = chunks.take(start, stop, torch.device("cpu"))
            assert torch.equal(found.log_probs, whole.log_probs[start:stop])
            assert torch.equal(found.log_rest, whole.log_rest[start:stop])
            assert is_dense or torch.equal(found.ids, whole.ids[start:stop])


def test_columns_are_typed_for_large_data():
    answer = TeacherAnswer(
        [1], [2], np.arange(1), Distributions(None, np.zeros((1, 3), np.float32), np.zeros(1, np.float32))
    )
    types = {name: str(column.type) for name, column in as_columns([answer, answer]).items()}
    assert types["teacher_log_probs"] == "large_list<item: float>"
    assert types["input_ids"] == "list<item: int32>"


class Server(ThreadingHTTPServer):
    """A fake server: answers "Hi €!" token by token; `script` holds what to send instead, in order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.script = [], []


def entry(text, logprob, top, token=None):
    def one(text, logprob):
        data = text if isinstance(text, bytes) else text.encode()
        return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": logprob}

    return {**one(text, logprob), "top_logprobs": [one(t, p) for t, p in top]}


EURO = "€".encode()
CONTENT = [
    entry("Hi", -0.1, [("Hi", -0.1), ("H", -3.0), ("\n", -4.0)]),
    entry(b" " + EURO[:1], -0.2, [(b" " + EURO[:1], -0.2)]),
    entry(EURO[1:], -0.3, [(EURO[1:], -0.3)]),
    entry("!", -0.4, [("!", -0.4), (".", -1.5), ("<|im_end|>", -2.5)]),
]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        status, answer = 200, {"finish_reason": "stop", "logprobs": {"content": CONTENT}}
        if self.server.script:
            status, answer = self.server.script.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [answer]} if answer is not None else {}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def ask(server, folder, tokenizer_dir, *more):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
    return run(
        folder, tokenizer_dir, "--server", url, "--top_k", "3", "--limit", "2", *more, source="prompts.jsonl"
    )


def test_a_server_answers_with_log_probabilities(server, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    server.script = [(503, None), (429, None)]  # tried again
    rows, table = ask(server, tmp_path, tokenizer_dir, "--server_concurrency", "1", "--server_model", "m")
    assert len(server.requests) == 4 and len(rows) == 2
    path, body, key = server.requests[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    assert (body["model"], body["logprobs"], body["top_logprobs"]) == ("m", True, 3)
    tokenizer = load_tokenizer(str(tokenizer_dir), chat=True)
    answer = [i for i, a in zip(rows[0]["input_ids"], rows[0]["in_answer"], strict=True) if a]
    assert tokenizer.decode(answer) == "Hi €!<|eot_id|><|endoftext|>"
    last = table.distributions(0)
    exclamation = dict(zip(last.ids[-1].tolist(), np.exp(last.log_probs[-1]).tolist(), strict=True))
    ours = tokenizer.get_vocab()
    assert exclamation == pytest.approx(
        {ours["!"]: np.exp(-0.4), ours["."]: np.exp(-1.5), ours["<|eot_id|>"]: np.exp(-2.5)}
    )
    np.testing.assert_allclose(np.exp(last.log_rest[-1]), 1 - sum(exclamation.values()), rtol=1e-4)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([(401, None)], "HTTP 401"),
        ([(200, {"finish_reason": "stop", "message": {"content": "x"}})], "without log-probabilities"),
        ([(503, None)] * 9, "no answer in 5 tries: HTTP 503"),
        ([(200, None)] * 9, "no answer in 5 tries: not a chat completion"),
        ([(200, {"logprobs": {"content": [entry("Hi", 0.0, [("Hi", float("nan"))])]}})], "sent nan as a log"),
    ],
)
def test_servers_that_do_not_help(sent, message, server, tokenizer_dir, tmp_path):
    server.script = list(sent)
    with pytest.raises(ValueError, match=rf"prompts\.jsonl:\d+: .*{message}"):
        ask(server, tmp_path, tokenizer_dir, "--server_concurrency", "1")


def test_answers_cut_within_a_character_lose_it(server, tokenizer_dir, tmp_path):
    cut = {"finish_reason": "length", "logprobs": {"content": CONTENT[:2]}}
    server.script = [(200, cut), (200, {"finish_reason": "stop", "logprobs": {"content": []}})]
    rows, _ = ask(server, tmp_path, tokenizer_dir, "--server_concurrency", "1")
    tokenizer = load_tokenizer(str(tokenizer_dir), chat=True)
    answer = [i for i, a in zip(rows[0]["input_ids"], rows[0]["in_answer"], strict=True) if a]
    assert tokenizer.decode(answer) == "Hi" and len(rows) == 1
    assert read_manifest(tmp_path)["statistics"]["no_text"] == 1
