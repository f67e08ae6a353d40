"""Record formats: every accepted one is the same conversation, every bad one is named."""

import pytest

from chat_samples import PARIS, TWO_TURNS
from llada.data.reading import to_messages, to_prompt


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": PARIS},
        {"messages": PARIS, "id": 7},
        {
            "conversations": [
                {"from": "human", "value": PARIS[0]["content"]},
                {"from": "gpt", "value": "Paris."},
            ]
        },
        {
            "conversations": [
                {"from": "user", "value": PARIS[0]["content"]},
                {"from": "assistant", "value": "Paris."},
            ]
        },
        {"prompt": PARIS[0]["content"], "completion": "Paris."},
        {"prompt": PARIS[:1], "completion": PARIS[1:], "label": True},
        {"instruction": PARIS[0]["content"], "output": "Paris."},
        {"instruction": PARIS[0]["content"], "input": "", "output": "Paris."},
        {"user": PARIS[0]["content"], "assistant": "Paris."},
        {"question": PARIS[0]["content"], "answer": "Paris."},
    ],
)
def test_every_accepted_record_is_the_same_conversation(record):
    assert to_messages(record, "f:1") == PARIS
    assert to_prompt(record, "f:1") == PARIS[:1]


def test_input_system_and_prompts_without_answers():
    record = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    assert [message["content"] for message in to_messages(record, "f:1")] == [
        "Be brief.",
        "Add.\n\n2, 2",
        "4",
    ]
    assert to_prompt({"prompt": "2 + 2?"}, "f:1") == [{"role": "user", "content": "2 + 2?"}]
    assert to_prompt({"messages": TWO_TURNS}, "f:1") == TWO_TURNS[:3]


EMPTY = "empty answer: every assistant turn needs text"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a"},
            "no conversation in fields ['text']; accepted: messages, conversations, prompt + completion, "
            "instruction + output, question + answer, query + response, problem + solution, "
            "user + assistant, input + output, inputs + targets; or name the fields with --prompt_key and "
            "--answer_key",
        ),
        ({"prompt": "a"}, "'prompt' needs 'completion' beside it; fields are ['prompt']"),
        ({"prompt": "a", "completion": ""}, EMPTY),
        ({"messages": [PARIS[0], {"role": "assistant", "content": " \n"}]}, EMPTY),
        (
            {"messages": PARIS[:1]},
            "the conversation has no assistant turn, so there is nothing to learn",
        ),
        ({"messages": []}, "'messages' must be a non-empty list of messages, got []"),
        (
            {"messages": PARIS[1:]},
            "a conversation must begin with a user turn (after any system message)",
        ),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            "unknown role 'robot'; use one of system, developer, user, human, prompter, assistant, gpt, ",
        ),
        (
            {"messages": [{"role": "user"}]},
            "a message needs 'role' and 'content' (or 'from' and 'value'), got {'role': 'user'}",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "'content' must be a string or a list of parts, got ['a']",
        ),
        ({"messages": ["a"]}, "'messages' must hold {'role', 'content'} messages, got 'a'"),
        ({"prompt": "a", "completion": 4}, "'completion' must be a string or a list of messages, got 4"),
        ({"prompt": "a", "completion": PARIS[:1]}, "'completion' must hold assistant messages only, got "),
        ({"question": "a", "answer": True}, "'answer' must be a string, got True"),
    ],
)
def test_bad_records_are_named(record, message):
    with pytest.raises(ValueError) as error:
        to_messages(record, "f:1")
    assert str(error.value).startswith(f"f:1: {message}")


def test_prompt_without_a_user_turn():
    with pytest.raises(ValueError, match="f:1: a conversation must begin with a user turn"):
        to_prompt({"messages": [{"role": "system", "content": "a"}]}, "f:1")
