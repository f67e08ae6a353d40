"""Preference records: every accepted form, what is refused, and where an answer ends."""

import json
from collections import Counter

import numpy as np
import pytest

from llada.data.answers import Encoding, encode_answers, labelled_answers, load_pairs
from llada.data.fields import Reader
from llada.data.reading import to_labelled, to_pair
from llada.models.tokens import load_tokenizer

USER = [{"role": "user", "content": "2 + 2?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(str(tokenizer_dir), chat=True)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": USER, "chosen": said("4"), "rejected": said("5")},
        {"chosen": USER + said("4"), "rejected": USER + said("5")},
        {"prompt": "2 + 2?", "chosen": USER + said("4"), "rejected": USER + said("5")},
        {"prompt": USER, "chosen": USER + said("4"), "rejected": USER + said("5")},
        {"prompt": "2 + 2?", "chosen": said("4"), "rejected": said("5")},
        {"prompt": USER, "chosen": "4", "rejected": "5"},
    ],
    ids=["messages", "implicit", "ultrafeedback", "repeated", "text prompt", "text answers"],
)
def test_conversational_pairs(record):
    assert to_pair(record, "f:1") == (USER, said("4"), said("5"))


def test_plain_pairs():
    assert to_pair({"prompt": "a", "chosen": "b", "rejected": "c"}, "f:1") == ("a", "b", "c")
    found = to_pair({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "f:1")
    assert found == ("The sky is", " blue.", " green.")
    keys = Reader(prompt_key="question", chosen_key="yes", rejected_key="no")
    assert to_pair({"question": "a", "yes": "b", "no": "c"}, "f:1", keys) == ("a", "b", "c")


def test_implicit_prompts_keep_shared_turns_and_one_answer():
    shared = USER + said("4") + [{"role": "user", "content": "And 3 more?"}]
    pair = to_pair({"chosen": shared + said("7"), "rejected": shared + said("43")}, "f:1")
    assert pair == (shared, said("7"), said("43"))
    same = to_pair({"chosen": USER + said("4"), "rejected": USER + said("4")}, "f:1")
    assert same == (USER, said("4"), said("4"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"f:1: a preference needs 'chosen' and 'rejected'"),
        ({"chosen": said("4"), "rejected": said("5")}, "no 'prompt'"),
        ({"prompt": USER, "chosen": said("4") + USER, "rejected": said("5")}, "one assistant turn"),
        ({"prompt": USER, "chosen": 4, "rejected": 5}, "must be a string or a list of messages, got 4"),
        ({"prompt": said("x"), "chosen": said("4"), "rejected": said("5")}, "must begin with a user turn"),
    ],
)
def test_pairs_that_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        to_pair(record, "f:1")


def test_labelled_answers():
    record = {"prompt": USER, "completion": said("4"), "label": True}
    assert to_labelled(record, "f:1") == [(USER, said("4"), True)]
    assert to_labelled({"prompt": "a", "completion": "b", "label": 0}, "f:1") == [("a", "b", False)]
    assert to_labelled({"prompt": "2 + 2?", "completion": said("4"), "label": 1}, "f:1") == [
        (USER, said("4"), True)
    ]
    both = to_labelled({"prompt": USER, "chosen": said("4"), "rejected": said("5")}, "f:1")
    assert both == [(USER, said("4"), True), (USER, said("5"), False)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "f:1: no 'label'"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "'label' must be true"),
        ({"prompt": USER, "completion": USER, "label": True}, "one assistant turn"),
    ],
)
def test_labelled_answers_that_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        to_labelled(record, "f:1")


def encoding(tokenizer, **changes):
    options = {"eos": "one", "chat": False, "max_length": 64, "long": "error"}
    return Encoding(tokenizer, **{**options, **changes})


def test_where_an_answer_ends(tokenizer):
    found = {
        eos: encode_answers([("f:1", USER, said("4"))], encoding(tokenizer, eos=eos))[0].tokens
        for eos in ("one", "filled", "none", "padded")
    }
    header = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False)
    texts = {eos: tokenizer.decode(tokens.answer) for eos, tokens in found.items()}
    assert texts["none"] == texts["padded"] == "4"
    assert texts["one"] == "4<|eot_id|><|endoftext|>"
    filling = 64 - len(found["one"])
    assert texts["filled"] == texts["one"] + "<|endoftext|>" * filling and len(found["filled"]) == 64
    assert all(tokenizer.decode(tokens.context) == header for tokens in found.values())


def test_plain_texts_are_continued_or_become_turns(tokenizer):
    item = [("f:1", "2 + 2?", "4")]
    (plain,) = encode_answers(item, encoding(tokenizer))
    assert tokenizer.decode(plain.tokens.context) == "2 + 2?"
    assert tokenizer.decode(plain.tokens.answer) == "4<|endoftext|>"
    for eos in ("one", "padded"):
        (turns,) = encode_answers(item, encoding(tokenizer, chat=True, eos=eos))
        (messages,) = encode_answers([("f:1", USER, said("4"))], encoding(tokenizer, eos=eos))
        assert np.array_equal(turns.tokens.context, messages.tokens.context)
        assert np.array_equal(turns.tokens.answer, messages.tokens.answer)


def test_long_answers(tokenizer):
    item = [("f:1", "abcdefgh", "12345678901234567890")]
    (whole,) = encode_answers(item, encoding(tokenizer, eos="none"))
    prompt = whole.prompt_length
    assert (whole.outcome, whole.text_length) == ("kept", len(whole.tokens))
    short = encoding(tokenizer, eos="none", max_length=prompt + 3)
    with pytest.raises(ValueError, match=r"f:1: \d+ tokens \(\d+ before the first answer\) do not fit"):
        encode_answers(item, short)
    (cut,) = encode_answers(item, encoding(tokenizer, eos="none", max_length=prompt + 3, long="truncate"))
    assert cut.outcome == "truncated" and np.array_equal(cut.tokens.answer, whole.tokens.answer[:3])
    assert cut.text_length == whole.text_length
    for long, length in (("drop", prompt + 3), ("truncate", prompt)):
        (gone,) = encode_answers(item, encoding(tokenizer, eos="none", max_length=length, long=long))
        assert (gone.tokens, gone.outcome, gone.prompt_length) == (None, "dropped", prompt)


def test_the_mask_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="f:1: the text contains the mask token"):
        encode_answers([("f:1", "a", tokenizer.mask_token)], encoding(tokenizer))


def test_files_of_pairs_are_counted(tokenizer, tmp_path):
    records = [
        {"prompt": USER, "chosen": said("4"), "rejected": said("5")},
        {"prompt": USER, "chosen": said("4"), "rejected": said("4")},
        {"prompt": USER, "chosen": said("4"), "rejected": said("5" * 60)},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs, counts = load_pairs([str(file)], encoding(tokenizer, long="drop"), Reader())
    assert dict(counts) == {"kept": 1, "truncated": 0, "dropped": 1, "equal": 1}
    assert len(pairs) == 1
    _, counts = load_pairs([str(file)], encoding(tokenizer, long="drop"), Reader(), max_samples=1)
    assert counts["kept"] == 1 and counts["equal"] == 0
    found = labelled_answers(str(file), Reader(), Counter(), max_samples=3)
    assert [item.label for _, item in found] == [True, False, True]
