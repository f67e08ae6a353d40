"""Corpora and conversations as rows on disk, and what the training stages load."""

import math

import numpy as np
import pytest
import torch

from chat_samples import PARIS, WITHOUT_SYSTEM, learned, small_tokenizer, write_jsonl
from conftest import load_script
from llada.data.chat import render_prompt
from llada.data.prepared import interleave, load, prepare
from llada.data.rows import ConversationRows, CorpusRows
from llada.data.shards import load_rows, read_manifest
from llada.models.tokens import CHAT_TEMPLATE, load_tokenizer
from llada.run import Run


@pytest.fixture
def plain():
    return small_tokenizer()


@pytest.fixture
def with_template(plain):
    def make(template):
        plain.chat_template = template
        return plain

    yield make
    plain.chat_template = CHAT_TEMPLATE


def test_corpus_rows_are_the_documents_joined_by_eos(plain, tmp_path):
    texts = ["one two", "", "three " * 9, "été 12"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    rows = prepare([path], CorpusRows(8), plain, tmp_path / "rows")
    tokens = [token_id for row in rows for token_id in row["input_ids"]]
    expected = [i for text in texts if text for i in [*plain(text)["input_ids"], plain.eos_token_id]]
    assert tokens == expected
    lengths = [len(row["input_ids"]) for row in rows]
    assert set(lengths[:-1]) == {8} and 0 < lengths[-1] <= 8
    statistics = read_manifest(tmp_path / "rows")["statistics"]
    shares = np.bincount(tokens)[np.bincount(tokens) > 0] / len(tokens)
    entropy = -sum(share * math.log(share) for share in shares)
    assert statistics == {
        "records": 4, "empty": 1, "rows": len(rows), "tokens": len(tokens),
        "unigram_entropy": pytest.approx(entropy, rel=1e-12),
    }  # fmt: skip


def test_unigram_entropy_of_a_uniform_corpus(plain, tmp_path):
    # three documents "a", each with its EOS: two tokens, equally often
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}] * 3)
    prepare([path], CorpusRows(4), plain, tmp_path / "rows")
    assert read_manifest(tmp_path / "rows")["statistics"]["unigram_entropy"] == pytest.approx(math.log(2))


def test_held_out_documents_do_not_depend_on_order_or_copies(plain, tmp_path):
    texts = [f"document {i}" for i in range(200)]
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in reversed(texts * 2)])

    def documents(path, hash_range, name):
        rows = prepare([path], CorpusRows(10**6), plain, tmp_path / name, hash_range=hash_range)
        return plain.decode(rows[0]["input_ids"]).split(plain.eos_token)[:-1]

    held_out = documents(first, (0.0, 0.25), "held_out")
    kept = documents(first, (0.25, 1.0), "kept")
    assert sorted(held_out + kept) == sorted(texts)
    assert abs(len(held_out) - 50) < 3 * math.sqrt(200 * 0.25 * 0.75)  # three standard errors
    assert set(documents(second, (0.0, 0.25), "copies")) == set(held_out)


def test_one_question_is_never_on_both_sides(plain, tmp_path):
    rows = [{"prompt": f"question {i}", "completion": f"answer {j}"} for i in range(30) for j in range(2)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    sides = []
    for hash_range in ((0.0, 0.4), (0.4, 1.0)):
        folder = tmp_path / str(hash_range)
        found = prepare([path], ConversationRows(99), plain, folder, hash_range=hash_range)
        sides.append({plain.decode(row["input_ids"]).split("answer")[0] for row in found})
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"body": "a"}',
            "a.jsonl:1: a document needs a string field 'text', fields are ['body']; "
            "conversations go through prepare_sft.py",
        ),
        ('{"text": 4}', "a.jsonl:1: a document needs a string field 'text', fields are ['text']"),
        (
            '{"text": "a"}\n{"text": "b <|mdm_mask|>"}',
            "a.jsonl:2: the text contains the mask token '<|mdm_mask|>'; remove or rewrite it",
        ),
        ('{"text": "\\ud800"}', "a.jsonl:1: '\\ud800' is half a character (surrogate)"),
        ("", "a.jsonl: holds no records; is it a failed download or export?"),
    ],
)
def test_bad_corpora(plain, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError) as error:
        prepare([tmp_path / "a.jsonl"], CorpusRows(8), plain, tmp_path / "rows")
    assert str(error.value) == f"{tmp_path}/{message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}', "a.jsonl:1: no conversation in fields ['text']; accepted: messages, conv"),
        ('{"prompt": "a", "completion": ""}', "a.jsonl:1: empty answer: every assistant turn needs text"),
        ('{"prompt": "a", "completion": "<|mdm_mask|>"}', "a.jsonl:1: the text contains the mask token"),
        ('{"prompt": "a", "completion": "\\ud800"}', "a.jsonl:1: '\\ud800' is half a character (surrogate)"),
    ],
)
def test_bad_conversations(plain, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError) as error:
        prepare([tmp_path / "a.jsonl"], ConversationRows(99), plain, tmp_path / "rows")
    assert str(error.value).startswith(f"{tmp_path}/{message}")


def test_nothing_left(plain, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    with pytest.raises(
        ValueError, match=r"rows: no row is left to write; counts: \{'records': 1, 'empty': 1"
    ):
        prepare([path], CorpusRows(8), plain, tmp_path / "rows")
    with pytest.raises(ValueError, match="--max_length 0 must be at least 1"):
        prepare([path], CorpusRows(0), plain, tmp_path / "other")


def long_file(tmp_path, plain):
    """A conversation that fits, one with a long answer, one with a long prompt; and the prompt's length."""
    pairs = [("a", "b"), ("a", "b" * 50), ("a" * 50, "b")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    return path, len(render_prompt("a", plain, chat=True))


def test_long_rows_stop_by_default(plain, tmp_path):
    path, prompt = long_file(tmp_path, plain)
    with pytest.raises(ValueError) as error:
        prepare([path], ConversationRows(prompt + 5), plain, tmp_path / "rows")
    assert str(error.value) == (
        f"{path}:2: {prompt + 52} tokens ({prompt} before the first answer) do not fit in --max_length "
        f"{prompt + 5}; raise it, or use --long drop or --long truncate"
    )
    with pytest.raises(ValueError, match="--long 'cut': use one of error, drop, truncate"):
        prepare([path], ConversationRows(8, long="cut"), plain, tmp_path / "rows")


def test_long_rows_dropped_or_truncated_and_counted(plain, tmp_path):
    path, prompt = long_file(tmp_path, plain)
    length, options = prompt + 5, {"shard_size": 1}  # two shards without rows
    rows = prepare([path], ConversationRows(length, long="drop"), plain, tmp_path / "drop", **options)
    statistics = read_manifest(tmp_path / "drop")["statistics"]
    assert (len(rows), statistics["dropped"], statistics["truncated"]) == (1, 2, 0)
    rows = prepare([path], ConversationRows(length, long="truncate"), plain, tmp_path / "truncate", **options)
    statistics = read_manifest(tmp_path / "truncate")["statistics"]
    assert (len(rows), statistics["dropped"], statistics["truncated"]) == (2, 1, 1)
    assert learned(rows[1], plain) == ["bbbbb"]
    assert statistics["answer_tokens"] == 3 + 5


def test_lost_system_messages_are_counted(with_template, tmp_path):
    tokenizer = with_template(WITHOUT_SYSTEM)
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"system": "s", "user": "a", "assistant": "b"}, {"messages": PARIS}]
    )
    prepare([path], ConversationRows(99), tokenizer, tmp_path / "rows")
    assert read_manifest(tmp_path / "rows")["statistics"]["system_left_out"] == 1


@pytest.fixture
def run():
    return Run(rank=0, world_size=1, device=torch.device("cpu"))


def test_load_corpus_takes_prepared_rows_or_raw_text(plain, tmp_path, run):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one two three"}] * 5)
    raw = load([str(path)], CorpusRows(8), plain, prepared=tmp_path / "p" / "train", run=run)
    assert raw[:] == load([str(tmp_path / "p" / "train")], CorpusRows(8), plain, prepared="", run=run)[:]
    with pytest.raises(ValueError, match=r"holds prepared splits; name one, for example .*p/train"):
        load([str(tmp_path / "p")], CorpusRows(8), plain, prepared="", run=run)
    with pytest.raises(ValueError, match="p/train has rows of 8 tokens, --max_length is 4"):
        load([str(tmp_path / "p" / "train")], CorpusRows(4), plain, prepared="", run=run)
    with pytest.raises(ValueError, match="holds rows of kind 'corpus', this stage needs 'conversations'"):
        load([str(tmp_path / "p" / "train")], ConversationRows(8), plain, prepared="", run=run)
    other = load_script("scripts/train_tokenizer.py").train_tokenizer(["other"], vocab_size=270)
    with pytest.raises(ValueError, match=r"p/train was prepared with tokenizer \w+, this model's is \w+"):
        load([str(tmp_path / "p" / "train")], CorpusRows(8), other, prepared="", run=run)


def test_saving_a_tokenizer_again_does_not_make_it_another(plain, tmp_path, run):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": PARIS}])
    prepare([path], ConversationRows(99), plain, tmp_path / "rows")
    tokenizer = plain
    for name in ("first", "second"):
        tokenizer.save_pretrained(tmp_path / name)
        tokenizer = load_tokenizer(str(tmp_path / name), chat=True)
        tokenizer(["a", "b c"], padding=True)  # leaves its mark in the tokenizer's state
        rows = load([str(tmp_path / "rows")], ConversationRows(99), tokenizer, prepared="", run=run)
        assert len(rows) == 1


def test_mixing_data_sets(plain, tmp_path, run):
    paths = []
    for name, size in (("a", 300), ("b", 20)):
        pairs = [{"prompt": f"{name}{i}", "completion": name} for i in range(size)]
        paths.append(str(write_jsonl(tmp_path / f"{name}.jsonl", pairs)))
    options = {"rows": ConversationRows(99), "tokenizer": plain, "prepared": tmp_path / "p", "run": run}
    assert len(load(paths, **options)) == 320
    mixed = load(paths, weights=[3, 1], seed=1, **options)
    share = np.mean([learned(row, plain)[0].startswith("b") for row in mixed])
    assert abs(share - 0.25) < 3 * math.sqrt(0.25 * 0.75 / len(mixed))  # three standard errors
    assert len({tuple(row["input_ids"]) for row in mixed}) == 320  # every row is there
    parts = [load_rows(tmp_path / "p" / str(i)) for i in range(2)]
    assert interleave(parts, [3, 1], seed=1)[:] == mixed[:]
    assert interleave(parts, [3, 1], seed=2)[:] != mixed[:]
    with pytest.raises(ValueError, match="--data_weights has 1 numbers for 2 data sets"):
        interleave(parts, [1.0], seed=0)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="every weight must be a positive number"):
            interleave(parts, [1.0, bad], seed=0)
