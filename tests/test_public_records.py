"""Every public shape of a record, and what it says to each entry point: the same everywhere, or refused.

Entry points: SFT (and teachers that score given answers), DPO, KTO, prompts (GRPO, generation, teachers that
answer, make_preferences).
"""

import copy
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from chat_samples import small_tokenizer, write_jsonl
from llada.data.answers import Encoding, labelled_answers, load_pairs
from llada.data.fields import Reader, as_turns
from llada.data.prompts import read_prompts
from llada.data.reading import Record, to_labelled, to_messages, to_pair, to_prompt
from llada.data.rows import ConversationRows

Q, A, B = "What is 2 + 2?", "4", "5"
PROMPT = [{"role": "user", "content": Q}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
THOUGHT = "<think>\n2 and 2\n</think>\n\n4"


def said(text: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text, **more}]


def share(*turns: str, names: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    """ShareGPT's turns, one side after the other."""
    return [{"from": names[i % 2], "value": text} for i, text in enumerate(turns)]


def part(text: str, kind: str = "text", field: str = "text") -> list[dict[str, str]]:
    return [{"type": kind, field: text}]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
OTHER = [*PROMPT, *said("3"), {"role": "user", "content": "Sure?"}]  # a question with history

# name -> (record, conversation for SFT)
CONVERSATIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "prompt + completion": ({"prompt": Q, "completion": A}, PROMPT + said(A)),
    "prompt + response": ({"prompt": Q, "response": A}, PROMPT + said(A)),
    "prompt + completion as messages": ({"prompt": PROMPT, "completion": said(A)}, PROMPT + said(A)),
    "query + response": ({"query": Q, "response": A}, PROMPT + said(A)),
    "problem + solution, answer is gold": (
        {"problem": Q, "solution": "2 + 2 = 4", "answer": "4"}, PROMPT + said("2 + 2 = 4"),
    ),
    "question + answer": ({"question": Q, "answer": A}, PROMPT + said(A)),
    "question + answer as a number": ({"question": Q, "answer": 4}, PROMPT + said("4")),
    "question + answer as a whole float": ({"question": Q, "answer": 60.0}, PROMPT + said("60")),
    "question + answer as a float": ({"question": Q, "answer": 0.5}, PROMPT + said("0.5")),
    "user + assistant": ({"user": Q, "assistant": A}, PROMPT + said(A)),
    "input + output": ({"input": Q, "output": A}, PROMPT + said(A)),
    "inputs + targets": ({"inputs": Q, "targets": A}, PROMPT + said(A)),
    "capitals, as CSV headers have them": ({"Question": Q, "Answer": A}, PROMPT + said(A)),
    "alpaca": ({"instruction": "Add.", "input": "2, 2", "output": A},
               [{"role": "user", "content": "Add.\n\n2, 2"}, *said(A)]),
    "alpaca without input": ({"instruction": Q, "input": "", "output": A}, PROMPT + said(A)),
    "dolly": ({"instruction": "Add.", "context": "2, 2", "response": A, "category": "maths"},
              [{"role": "user", "content": "Add.\n\n2, 2"}, *said(A)]),
    "OpenOrca": ({"id": "x", "system_prompt": "Be brief.", "question": Q, "response": A},
                 SYSTEM + PROMPT + said(A)),
    "OpenOrca with an empty system prompt": ({"system_prompt": "", "question": Q, "response": A},
                                             PROMPT + said(A)),
    "system beside a pair": ({"system": "Be brief.", "user": Q, "assistant": A}, SYSTEM + PROMPT + said(A)),
    "nulls of other records' columns": (
        {"prompt": Q, "completion": A, "messages": None, "system": None, "tools": None}, PROMPT + said(A),
    ),
    "history of pairs": ({"instruction": "Sure?", "output": A, "history": [[Q, "3"]]}, OTHER + said(A)),
    "a thought in a field": ({"question": Q, "thinking": "2 and 2", "answer": A}, PROMPT + said(THOUGHT)),
    "reasoning_content in a field": ({"prompt": Q, "reasoning_content": "2 and 2", "response": A},
                                     PROMPT + said(THOUGHT)),
    "reasoning: on is a mode": ({"input": PROMPT, "output": A, "reasoning": "on"}, PROMPT + said(A)),
    "messages": ({"messages": PROMPT + said(A)}, PROMPT + said(A)),
    "conversations": ({"conversations": PROMPT + said(A)}, PROMPT + said(A)),
    "conversation": ({"conversation": PROMPT + said(A)}, PROMPT + said(A)),
    "messages as JSON text": ({"messages": json.dumps(PROMPT + said(A))}, PROMPT + said(A)),
    "ShareGPT": ({"conversations": share(Q, A)}, PROMPT + said(A)),
    "ShareGPT with a system field": ({"system": "Be brief.", "conversations": share(Q, A)},
                                     SYSTEM + PROMPT + said(A)),
    "ShareGPT with a system turn": ({"conversations": [{"from": "system", "value": "Be brief."},
                                                       *share(Q, A)]}, SYSTEM + PROMPT + said(A)),
    "ShareGPT that begins with gpt": ({"conversations": share("Hello!", Q, A, names=("gpt", "human"))[:1]
                                       + share(Q, A)}, PROMPT + said(A)),
    "ShareGPT, chatgpt": ({"conversations": share(Q, A, names=("user", "chatgpt"))}, PROMPT + said(A)),
    "ShareGPT, bing": ({"conversations": share(Q, A, names=("human", "bing"))}, PROMPT + said(A)),
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, *PROMPT, *said(A)]},
                  SYSTEM + PROMPT + said(A)),
    "content parts": ({"messages": [{"role": "user", "content": part(Q)},
                                    {"role": "assistant", "content": part(A)}]}, PROMPT + said(A)),
    "LLaMA-Factory v1 SFT": (
        {"messages": [{"role": "user", "content": part(Q, field="value"), "loss_weight": 0.0},
                      {"role": "assistant", "content": part(A, field="value"), "loss_weight": 1.0}]},
        PROMPT + said(A),
    ),
    "LLaMA-Factory v1 reasoning part": (
        {"messages": [*PROMPT, {"role": "assistant", "content": part("2 and 2", "reasoning", "value")
                                + part(A, field="value")}]}, PROMPT + said(THOUGHT),
    ),
    "reasoning_content of a message": ({"messages": PROMPT + said(A, reasoning_content="2 and 2")},
                                       PROMPT + said(THOUGHT)),
    "thinking of a message": ({"messages": PROMPT + said(A, thinking="2 and 2")}, PROMPT + said(THOUGHT)),
    "a thought given twice": ({"messages": PROMPT + said(THOUGHT, reasoning_content="2 and 2")},
                              PROMPT + said(THOUGHT)),
    "OpenAI's weight 0": ({"messages": [*PROMPT, *said("3", weight=0), OTHER[2], *said(A, weight=1)]},
                          [*PROMPT, *said("3", learn=False), OTHER[2], *said(A)]),
    "tool calls with null content": (
        {"messages": [*PROMPT, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "4"}, *said(A)]},
        [*PROMPT, *said("", tool_calls=[{**CALL, "id": "c1"}]),
         {"role": "tool", "content": "4", "tool_call_id": "c1"}, *said(A)],
    ),
    "function_call and observation, tools as JSON text": (
        {"conversations": [*share(Q), {"from": "function_call", "value": json.dumps(CALL["function"])},
                           {"from": "observation", "value": "4"}, {"from": "gpt", "value": A}],
         "tools": json.dumps([TOOL])},
        [{**PROMPT[0], "tools": [TOOL]}, *said("", tool_calls=[CALL]), {"role": "tool", "content": "4"},
         *said(A)],
    ),
    "no tools": ({"conversations": share(Q, A), "tools": "[]"}, PROMPT + said(A)),
    "most specific wins: prompt before messages": (
        {"prompt": Q, "completion": A, "messages": [{"role": "user", "content": "else"}, *said("x")]},
        PROMPT + said(A),
    ),
    "most specific wins: question before text": ({"text": "else", "question": Q, "answer": A},
                                                 PROMPT + said(A)),
    "ultrachat: prompt repeats the first turn": ({"prompt": Q, "messages": PROMPT + said(A)},
                                                 PROMPT + said(A)),
    "KTO data that is desirable": ({"prompt": Q, "completion": A, "label": True}, PROMPT + said(A)),
    "a label of something else": ({"prompt": Q, "completion": A, "label": "positive"}, PROMPT + said(A)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_and_its_prompt(name):
    record, expected = CONVERSATIONS[name]
    assert to_messages(record, "f:1") == expected
    last = max(i for i, turn in enumerate(expected) if turn["role"] in ("user", "tool"))
    asked = [turn for turn in expected[: last + 1]]
    assert to_prompt(record, "f:1") == asked
    # the same answer, labelled, and against another one
    if not record.get("label"):
        labelled = {**record, "label": False}
        with pytest.raises(ValueError, match="f:1: an answer labelled undesirable cannot be learned"):
            to_messages(labelled, "f:1")
        (found,) = to_labelled(labelled, "f:1")
        turns, answer = as_turns(found.prompt, "user"), as_turns(found.completion, "assistant")
        assert (turns, answer, found.label) == (asked, expected[-1:], False)


TWO = {"chosen": A, "rejected": B}
# name -> (record, (prompt, chosen, rejected))
PAIRS: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any]]] = {
    "texts": ({"prompt": Q, **TWO}, (Q, A, B)),
    "question": ({"question": Q, **TWO}, (Q, A, B)),
    "instruction + input": ({"instruction": "Add.", "input": "2, 2", **TWO}, ("Add.\n\n2, 2", A, B)),
    "orca": ({"system": "Be brief.", "question": Q, **TWO}, (SYSTEM + PROMPT, said(A), said(B))),
    "orca with an empty system": ({"system": "", "question": Q, **TWO}, (PROMPT, said(A), said(B))),
    "messages beside texts": ({"messages": PROMPT, **TWO}, (PROMPT, said(A), said(B))),
    "LLaMA-Factory": ({"conversations": share(Q), "chosen": {"from": "gpt", "value": A},
                       "rejected": {"from": "gpt", "value": B}}, (PROMPT, said(A), said(B))),
    "LLaMA-Factory v1": (
        {f"{side}_messages": [{"role": "user", "content": part(Q, field="value"), "loss_weight": 0.0},
                              {"role": "assistant", "content": part(text, field="value"), "loss_weight": 1.0}]
         for side, text in TWO.items()}, (PROMPT, said(A), said(B)),
    ),
    "TRL conversational": ({"prompt": PROMPT, "chosen": said(A), "rejected": said(B)},
                           (PROMPT, said(A), said(B))),
    "TRL implicit": ({"chosen": PROMPT + said(A), "rejected": PROMPT + said(B)}, (PROMPT, said(A), said(B))),
    "UltraFeedback": ({"prompt": Q, "chosen": PROMPT + said(A), "rejected": PROMPT + said(B),
                       "messages": PROMPT + said(A), "score_chosen": 8.0}, (PROMPT, said(A), said(B))),
    "prompt with a system that the answers lack": (
        {"prompt": SYSTEM + PROMPT, "chosen": PROMPT + said(A), "rejected": PROMPT + said(B)},
        (SYSTEM + PROMPT, said(A), said(B)),
    ),
    "several turns": ({"chosen": OTHER + said(A), "rejected": OTHER + said(B)}, (OTHER, said(A), said(B))),
    "hh-rlhf as text": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello there",
         "rejected": "\n\nHuman: Hi\n\nAssistant: Hell no"},
        ("\n\nHuman: Hi\n\nAssistant:", " Hello there", " Hell no"),
    ),
    "implicit text, at a word's border": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        ("The sky is", " blue.", " black."),
    ),
    "Stanford Human Preferences": ({"history": Q, "human_ref_A": B, "human_ref_B": A, "labels": 0},
                                   (Q, A, B)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair(name):
    record, expected = PAIRS[name]
    assert to_pair(record, "f:1") == expected
    prompt, chosen, rejected = expected
    assert to_labelled(record, "f:1") == [(prompt, chosen, True), (prompt, rejected, False)]
    assert to_prompt(record, "f:1") == as_turns(prompt, "user")
    if name not in ("hh-rlhf as text", "implicit text, at a word's border"):  # the other answer shows theirs
        key = next(key for key in ("chosen", "chosen_messages", "human_ref_B") if key in record)
        learned = to_messages(record, "f:1", Reader(answer_key=key))
        assert learned[-1:] == as_turns(chosen, "assistant")


NAMED = [
    (Reader(prompt_key="ctx"), {"ctx": Q, "prompt": "else", "completion": A}, PROMPT + said(A)),
    (Reader(prompt_key="ctx", answer_key="gold"), {"ctx": Q, "gold": A, "completion": "else"},
     PROMPT + said(A)),
    (Reader(answer_key="gold"), {"messages": PROMPT, "gold": A}, PROMPT + said(A)),
    (Reader(messages_key="turns"), {"turns": PROMPT + said(A), "prompt": "else", "completion": "x"},
     PROMPT + said(A)),
    (Reader(prompt_key="instruction"), {"instruction": Q, "input": "else", "output": A}, PROMPT + said(A)),
    (Reader(system_key="role_play"), {"role_play": "Be brief.", "question": Q, "answer": A},
     SYSTEM + PROMPT + said(A)),
    (Reader(answer_key="chosen"), {"prompt": Q, "chosen": A, "rejected": B}, PROMPT + said(A)),
    (Reader(answer_key="chosen"), {"chosen": PROMPT + said(A), "rejected": PROMPT + said(B)},
     PROMPT + said(A)),
    (Reader(transcript=True), {"text": f"\n\nHuman: {Q}\n\nAssistant: {A}"}, PROMPT + said(A)),
    (Reader(transcript=True), {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "completion": A},
     PROMPT + said(A)),
]  # fmt: skip


@pytest.mark.parametrize(("reader", "record", "expected"), NAMED)
def test_a_named_field_decides_alone(reader, record, expected):
    assert to_messages(record, "f:1", reader) == expected
    if "chosen" not in record:
        assert to_prompt(record, "f:1", reader) == expected[:-1]


def test_transcripts_become_turns_in_pairs():
    record = {
        "chosen": f"\n\nHuman: {Q}\n\nAssistant: 3\n\nHuman: Sure?\n\nAssistant: {A}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: 3\n\nHuman: Sure?\n\nAssistant: {B}",
    }
    assert to_pair(record, "f:1", Reader(transcript=True)) == (OTHER, said(A), said(B))


REFUSED = [
    ("sft", {"prompt": Q}, "'prompt' needs 'completion' beside it"),
    ("sft", {"text": Q}, "no conversation in fields ['text']; accepted"),
    ("sft", {"prompt": Q, **TWO}, "two answers; name the one to learn with --answer_key chosen"),
    ("sft", {"conversations": share(Q), "chosen": {"from": "gpt", "value": A},
             "rejected": {"from": "gpt", "value": B}}, "a preference pair has two answers"),
    ("sft", {"prompt": "else", "messages": PROMPT + said(A)}, "'prompt' is not what the conversation asks"),
    ("sft", {"messages": PROMPT + said(A), "images": ["a.png"]}, "'images' cannot be read"),
    ("sft", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, *said(A)]},
     "a content part of type 'image_url' cannot be read"),
    ("sft", {"messages": [{"role": "robot", "content": Q}]}, "unknown role 'robot'"),
    ("sft", {"messages": [*PROMPT, {"role": "assistant", "content": None}]}, "needs 'role' and 'content'"),
    ("sft", {"messages": said(A)}, "a conversation must begin with a user turn"),
    ("sft", {"messages": PROMPT + said(A, weight=0.5)}, "'weight' must be 0 or 1, got 0.5"),
    ("sft", {"messages": [{**PROMPT[0], "weight": 1}, *said(A)]}, "only an assistant's turns are learned"),
    ("sft", {"messages": PROMPT + said(THOUGHT, reasoning_content="other")}, "a thought of its own"),
    ("sft", {"system": "Else.", "messages": SYSTEM + PROMPT + said(A)}, "own system message differ"),
    ("sft", {"question": Q, "answer": ""}, "empty answer"),
    ("sft", {"question": Q, "answer": ["4"]}, "must hold {'role', 'content'} messages"),
    ("sft", {"prompt": Q, "completion": A, "label": False}, "labelled undesirable"),
    ("sft", {"messages": PROMPT + said(A), "tools": "nonsense"}, "'tools' is not JSON"),
    ("sft", {"conversations": [*share(Q), {"from": "function_call", "value": "add"}]}, "is not JSON"),
    ("sft", {"instruction": Q, "output": A, "history": ["a", "b"]}, "must hold [question, answer] pairs"),
    ("dpo", {"chosen": A}, "a preference needs 'chosen' and 'rejected'"),
    ("dpo", {"task": Q, **TWO}, "no question"),
    ("dpo", {"chosen": said(A), "rejected": said(B)}, "no 'prompt'"),
    ("dpo", {"prompt": "else", "chosen": PROMPT + said(A), "rejected": PROMPT + said(B)},
     "the prompt is not what 'chosen' and 'rejected' begin with"),
    ("dpo", {"prompt": PROMPT + said("x"), "chosen": said(A), "rejected": said(B)},
     "the prompt must end with a user turn"),
    ("dpo", {"prompt": PROMPT, "chosen": said(A) + PROMPT, "rejected": said(B)}, "one assistant turn"),
    ("dpo", {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
     "no question"),
    ("kto", {"prompt": Q, "completion": A}, "no 'label'"),
    ("kto", {"prompt": Q, "completion": A, "label": "good"}, "'label' must be true (desirable) or false"),
    ("kto", {"messages": PROMPT, "label": True}, "one assistant turn"),
    ("prompt", {"nothing": Q}, "no prompt in fields ['nothing']; name its field with --prompt_key"),
    ("prompt", {"messages": [{"role": "system", "content": "x"}]}, "must begin with a user turn"),
]  # fmt: skip
VIEWS = {"sft": to_messages, "dpo": to_pair, "kto": to_labelled, "prompt": to_prompt}


@pytest.mark.parametrize(("view", "record", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_with_its_place(view, record, message):
    with pytest.raises(ValueError) as error:
        VIEWS[view](record, "f:1")
    assert str(error.value).startswith("f:1: ") and message in str(error.value)


def test_a_named_field_that_is_missing_is_refused():
    for key, view in (("prompt_key", to_prompt), ("answer_key", to_messages), ("chosen_key", to_pair)):
        with pytest.raises(ValueError, match=rf"f:1: no field 'x' \(--{key}\); fields are"):
            view({"prompt": Q, "completion": A, **TWO}, "f:1", Reader(**{key: "x"}))


def test_labels_are_labels():
    for value in (True, 1, 1.0, "true", "True", "1"):
        assert to_labelled({"prompt": Q, "completion": A, "label": value}, "f:1")[0].label is True
    for value in (False, 0, "false", "0"):
        assert to_labelled({"prompt": Q, "completion": A, "kto_tag": value}, "f:1")[0].label is False
    kto = {"messages": OTHER + said(A), "label": False}  # LLaMA-Factory's
    assert to_labelled(kto, "f:1") == [(OTHER, said(A), False)]


def test_what_is_skipped_is_noted():
    record = Record({"conversations": [*said("Hi"), *PROMPT, *said(A)]}, "f:1")
    record.messages()
    assert record.notes == ["assistant turns before the first user turn, skipped"]
    record = Record({"chosen": "a b", "rejected": "a c"}, "f:1")
    record.pair()
    assert record.notes == ["pairs whose prompt is what both answers begin with"]


# --- through files, into tokens


@pytest.fixture
def tokenizer():
    return small_tokenizer()


BAD = [
    {"question": Q, "answer": A},
    {"nothing": 1},
    {"question": Q, "answer": ""},
    {"question": Q, "answer": A, "weight": 0},
]


def test_bad_records_stop_or_are_dropped_and_named(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", BAD)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"a.jsonl:2: no conversation in fields \['nothing'\]"):
        list(ConversationRows(99).items([path], Counter()))
    rows, counts = ConversationRows(99, Reader(drops_bad=True)), Counter()
    items = list(rows.items([path], counts))
    assert [where for where, _ in items] == [f"{path}:1"]
    assert counts["bad records, dropped"] == 3 and counts["records of weight 0, left out"] == 1
    columns, found = rows.encode(items, tokenizer=tokenizer)
    text = rows.describe({**counts, **found, "rows": 1})
    for part in (
        "bad records, dropped: 3",
        "a.jsonl:5: malformed JSON",
        "weight 0, left out: 1",
        "warning: 4 of",
    ):
        assert part in text
    assert len(columns["input_ids"]) == 1


def test_what_a_template_refuses_is_dropped_too(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)  # as Mistral's and others do
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    )
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"messages": PROMPT + said(A)}, {"messages": PROMPT * 2 + said(A)}]
    )
    items = list(ConversationRows(99).items([path], Counter()))
    with pytest.raises(ValueError, match=r"a.jsonl:2: the chat template refuses this .*: roles must alt"):
        ConversationRows(99).encode(items, tokenizer=tokenizer)
    _, counts = ConversationRows(99, Reader(drops_bad=True)).encode(items, tokenizer=tokenizer)
    assert counts["bad records, dropped"] == 1
    encoding = Encoding(tokenizer, "one", False, 99, "error")
    pairs = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": PROMPT * 2, "chosen": said(A), "rejected": said(B)}]
    )
    with pytest.raises(ValueError, match=r"p.jsonl:1: the chat template refuses this .*: roles must alt"):
        load_pairs([str(pairs)], encoding, Reader())
    drops = replace(encoding, drops_bad=True)
    found, counts = load_pairs([str(pairs)], drops, Reader(drops_bad=True))
    assert not found and counts["bad records, dropped"] == 1 and counts["dropped"] == 0


def test_ten_bad_records_are_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"n": i} for i in range(25)])
    counts = Counter()
    assert not list(ConversationRows(99, Reader(drops_bad=True)).items([path], counts))
    named = [name for name in counts if name.startswith("bad records, dropped: ")]
    assert len(named) == 10 and counts["bad records, dropped"] == 25


def test_the_same_tokens_for_sft_dpo_kto_and_prompts(tokenizer, tmp_path):
    """One question and answer in five dresses: SFT's row, both preference stages', the sampler's prompt."""
    encoding = Encoding(tokenizer, "one", True, 99, "error")
    forms = {
        "alpaca": {"instruction": Q, "output": A},
        "messages": {"messages": PROMPT + said(A)},
        "sharegpt": {"conversations": share(Q, A)},
        "parts": {"messages": [{"role": "user", "content": part(Q)}, *said(A)]},
        "trl": {"prompt": PROMPT, "completion": said(A)},
    }
    rows = set()
    for name, record in forms.items():
        path = str(write_jsonl(tmp_path / f"{name}.jsonl", [record]))
        kind = ConversationRows(99)
        columns, _ = kind.encode(list(kind.items([path], Counter())), tokenizer=tokenizer)
        learned = columns["in_answer"][0].as_py()
        rows.add((tuple(columns["input_ids"][0].as_py()), learned.index(True)))
        (prompt,), _ = read_prompts(path, tokenizer, chat=True)
        rows.add((tuple(columns["input_ids"][0].as_py()), len(prompt.token_ids)))
        labelled = str(write_jsonl(tmp_path / f"{name}_kto.jsonl", [{**record, "label": True}]))
        ((_, item),) = labelled_answers(labelled, Reader(), Counter())
        pair = {
            "prompt": item.prompt,
            "chosen": item.completion,
            "rejected": said(B) if isinstance(item.completion, list) else B,
        }
        paired = str(write_jsonl(tmp_path / f"{name}_dpo.jsonl", [pair]))
        ((chosen, _),), _ = load_pairs([paired], encoding, Reader())
        rows.add(((*chosen.context.tolist(), *chosen.answer.tolist()), len(chosen.context)))
    assert len(rows) == 1
