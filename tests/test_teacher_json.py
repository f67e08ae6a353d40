"""Teacher files of the predecessors: what their records become, and every way in which one can be wrong."""

import json
import math

import numpy as np
import pytest

from conftest import ROOT
from llada.autoregressive.teacher_files import TeacherFile, read_teacher_records
from llada.autoregressive.teacher_rows import Student
from llada.autoregressive.vocabulary import OTHER
from llada.models.tokens import load_tokenizer

SAMPLES = ROOT / "data/samples"
PROMPT = "<BOS><start_id>user<end_id>\nWhich?<eot_id><start_id>assistant<end_id>\n"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(str(tokenizer_dir), chat=True)


@pytest.fixture(scope="module")
def student(tokenizer):
    return Student(tokenizer)


def answers(path, student, teacher_tokenizer=None, top_k=5):
    file = TeacherFile(student, teacher_tokenizer, top_k=top_k)
    return [file.answer(record, where) for where, record in read_teacher_records(path, lambda _: None)]


def written(tokenizer, ids):
    return tokenizer.decode(ids)


def spoken(tokenizer, answer):
    """[(token that stands there, {candidate: probability}, probability of the rest)] of an answer."""
    found = []
    for k, position in enumerate(answer.positions):
        d = answer.distributions
        pairs = zip(d.ids[k].tolist(), np.exp(d.log_probs[k]).tolist(), strict=True)
        candidates = {tokenizer.decode([i]): p for i, p in pairs if i != OTHER}
        found.append((tokenizer.decode([answer.answer_ids[position]]), candidates, math.exp(d.log_rest[k])))
    return found


def test_records_of_number_rows(student, tokenizer):
    first, second, third = answers(SAMPLES / "teacher_logits.json", student)
    # special tokens by role, and the two that close every answer
    assert written(tokenizer, first.prompt_ids) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\nWhich metal is liquid at room temperature?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
    )
    assert written(tokenizer, first.answer_ids) == "Mercury.<|eot_id|><|endoftext|>"
    # the file has no row for the end of this answer; 'Mercury' is no token here and counts as rest
    assert [token for token, _, _ in spoken(tokenizer, first)] == ["M", "."]
    _, candidates, rest = spoken(tokenizer, first)[1]
    p = np.exp([11.0, 7.5, 4.25, 2.0])
    wanted = dict(zip([".", ",", "!", "<|eot_id|>"], p / p.sum(), strict=True))
    assert candidates == pytest.approx(wanted, rel=1e-5) and rest == pytest.approx(0, abs=1e-9)
    # of several ways to cut the response the one that comes out even is taken: se-v-en, not se-ven
    assert [row[0] for row in spoken(tokenizer, second)] == ["s", "v", "e", "<|eot_id|>"]
    assert max(spoken(tokenizer, second)[-1][1].items(), key=lambda pair: pair[1])[0] == "<|eot_id|>"
    # a prompt without special tokens goes through the chat template; spaces that the file lost come back
    assert written(tokenizer, third.prompt_ids).startswith("<|startoftext|><|start_header_id|>user")
    assert written(tokenizer, third.answer_ids) == "8 + 15 = 23"
    one = next(row for row in spoken(tokenizer, third) if row[0] == " 1")
    assert " 1" in one[1] and "1" not in one[1]


def test_records_of_positions(student, tokenizer):
    file = TeacherFile(student, None, top_k=5)
    records = list(read_teacher_records(SAMPLES / "teacher_positions.json", lambda _: None))
    first, second = (file.answer(record, where) for where, record in records)
    assert file.num_ignored == 3  # full_logits as wide as no vocabulary
    assert [row[0] for row in spoken(tokenizer, first)] == ["M", ".", "<|eot_id|>"]
    closing = spoken(tokenizer, first)[-1][1]
    assert closing["<|eot_id|>"] == pytest.approx(
        math.exp(14.5) / sum(math.exp(x) for x in (14.5, 11.75, 11.0, 9.25, 9.0))
    )
    assert written(tokenizer, second.answer_ids) == "Goethe wrote it.<|eot_id|><|endoftext|>"


def write(path, record):
    path.write_text(json.dumps([{"prompt": "p", "response": "ok", "logits": [[1.0]]}, record], indent=1))
    return path


def dense(tokenizer, text, *, width=None, closed=False):
    """A record with full distributions of its own tokenizer; row j says token j with logit 20 + j."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    logits = np.zeros((len(ids) + closed, width or len(tokenizer)))
    for j, i in enumerate([*ids, tokenizer.convert_tokens_to_ids("<|eot_id|>")][: len(logits)]):
        logits[j, i] = 20 + j
    return {"prompt": PROMPT, "response": text + ("<EOS>" if closed else ""), "logits": logits.tolist()}


def test_full_distributions_of_the_same_vocabulary(student, tokenizer, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([dense(tokenizer, "Water boils at 100.", closed=True)]))
    (answer,) = answers(path, student, top_k=0)
    ids = tokenizer("Water boils at 100.", add_special_tokens=False).input_ids
    # the second closing token has no row in the file
    assert answer.positions.tolist() == list(range(len(ids) + 1))
    assert answer.distributions.ids is None and answer.distributions.log_probs.shape[1] == len(tokenizer)
    assert answer.distributions.log_probs.argmax(-1).tolist() == answer.answer_ids[:-1]
    (topped,) = answers(path, student, top_k=3)
    assert topped.distributions.ids[:, 0].tolist() == answer.answer_ids[:-1]
    total = np.exp(topped.distributions.log_probs).sum(-1) + np.exp(topped.distributions.log_rest)
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_full_logits_are_used_where_they_are_full(student, tokenizer, tmp_path):
    record = dense(tokenizer, ".", closed=True)
    record["logits"] = [
        {"position": j, "chosen_token": text, "chosen_token_id": 0, "top_5": [], "full_logits": row}
        for j, (text, row) in enumerate(zip([".", "<EOS>"], record["logits"], strict=True))
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record]))
    (answer,) = answers(path, student, top_k=2)
    assert answer.distributions.ids[:, 0].tolist() == answer.answer_ids[:2]


def test_a_file_of_another_tokenizer_is_mapped_with_it(student, tokenizer_dir, tmp_path):
    from test_vocabulary import bytes_only

    teacher = bytes_only("<EOS>", "<|eot_id|>")
    path = tmp_path / "a.json"
    path.write_text(json.dumps([dense(teacher, "Hi", closed=True)]))
    with pytest.raises(
        ValueError, match=r"a\.json:1: logits\[0\] has 258 numbers, the student's tokenizer 32"
    ):
        answers(path, student)
    (answer,) = answers(path, student, teacher, top_k=2)
    # "<EOS>" closes the answers of a teacher without end of turn: there both have their closing token
    assert answer.distributions.ids[:, 0].tolist() == answer.answer_ids[:3]


BAD = {
    "no response": ({"prompt": "p", "logits": [[1.0]]}, "needs a text 'response'"),
    "no logits": ({"prompt": "p", "response": "ok"}, "needs 'logits'"),
    "not rows": ({"logits": [3.0]}, "'logits' must hold lists of numbers or objects, got 3.0"),
    "not numbers": ({"logits": [["x"]], "token": [["ok"]]}, "'logits' must be a list of numbers, got"),
    "NaN": ({"logits": [[math.nan]], "token": [["ok"]]}, "'logits' holds nan at place 0; logits must be"),
    "infinite": ({"logits": [[1.0, math.inf]], "token": [["ok", "no"]]}, "'logits' holds inf at place 1"),
    "longer": (
        {"logits": [[1.0], [1.0]], "token": [["ok"], ["."]]},
        r"'logits' is longer than the response: row 1 of 2 has \['\.'\] where the response goes on with ''",
    ),
    "shorter": (
        {"logits": [[1.0]], "token": [["o"]]},
        "'logits' is shorter than the response: its 1 rows end before 'k'",
    ),
    "other text": (
        {"logits": [[1.0]], "token": [["no"]]},
        r"'logits' does not spell the response: row 0 of 1 has \['no'\] where the response goes on with 'ok'",
    ),
    "fewer tokens than rows": (
        {"logits": [[1.0], [1.0]], "token": [["ok"]]}, "'logits' has 2 rows and 'token' 1"
    ),
    "fewer tokens than numbers": (
        {"logits": [[1.0, 2.0]], "token": [["ok"]]}, r"logits\[0\] has 2 numbers, token\[0\] is \['ok'\]"
    ),
    "ids alone": (
        {"logits": [[1.0]], "tokenID": [[5]]},
        r"tokenID\[0\]: ids without 'token' texts need --teacher_tokenizer",
    ),
    "narrow": ({"logits": [[1.0, 2.0]]}, "has 2 numbers, the student's tokenizer 32. tokens: name the token"),
    "no top_5": (
        {"logits": [{"position": 0, "chosen_token": "ok"}]},
        r"logits\[0\]: needs 'top_5', or 'full_logits' with one number for each of the 32. tokens",
    ),
    "no chosen token": ({"logits": [{"position": 0, "top_5": []}]}, "needs a text 'chosen_token'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named_with_their_line(name, student, tmp_path):
    record, message = BAD[name]
    filled = record if "prompt" in record else {"prompt": "p", "response": "ok", **record}
    path = tmp_path / "bad.json"
    good = {"prompt": "p", "response": "ok", "logits": [[1.0]], "token": [["ok"]]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(filled))
    with pytest.raises(ValueError, match=rf"bad\.json:2: .*{message}|bad\.json:2: {message}"):
        answers(path, student)


def test_ids_must_be_those_of_the_named_tokenizer(student, tokenizer, tmp_path):
    dot = tokenizer(".", add_special_tokens=False).input_ids[0]
    record = {"prompt": "p", "response": ".", "logits": [[2.0, 1.0]], "token": [[".", "x"]]}
    for ids, message in (
        (
            [dot, len(tokenizer) + 7],
            rf"tokenID\[0\]: unknown token id {len(tokenizer) + 7}; --teacher_tokenizer",
        ),
        ([dot, -1], r"unknown token id -1"),
        ([dot, "7"], r"unknown token id '7'"),
        (
            [dot, dot],
            rf"says that token {dot} is 'x', --teacher_tokenizer has '\.' there; the file was made with",
        ),
    ):
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{**record, "tokenID": [ids]}]))
        with pytest.raises(ValueError, match=message):
            answers(path, student, tokenizer)


@pytest.mark.parametrize("end", [10, 200, 400])
def test_a_truncated_file_is_an_error(end, student, tmp_path):
    text = (SAMPLES / "teacher_logits.json").read_text()
    path = tmp_path / "cut.json"
    path.write_text(text[: len(text) - end])
    with pytest.raises(ValueError, match=r"cut\.json:\d+: malformed JSON: .*the file ends there"):
        answers(path, student)
