"""Which tokens are learned under the templates of public models: the content and its end of turn, no more."""

import copy

import pytest

from chat_samples import encode_conversation, learned, small_tokenizer
from llada.data.answers import Encoding, encode_answers
from llada.data.chat import TOOLS, notes_of, render_prompt, split_conversation
from llada.data.template import added_tokens, style_of
from real_templates import TEMPLATES

USER = {"role": "user", "content": "Which one is it?"}
ANSWERS = ["A", "a", "i", "4", "assistant", "user", "Paris.", "It is.", "é 漢字 😀", "one:\n\n- two\n- three"]
THOUGHT = "<think>\n2 + 2\n</think>\n\n4"
SYSTEMS = {"no system": [], "empty system": [{"role": "system", "content": ""}],
           "system": [{"role": "system", "content": "Be brief."}]}  # fmt: skip
# An empty thought, which the template writes itself, stands between the prompt and the answer.
WRITES_THOUGHT = {"Qwen3", "SDAR", "Qwen3-Thinking"}
CLOSINGS = {
    "LLaDA": "<|eot_id|>", "Llama 3": "<|eot_id|>", "R1-Distill": "<|end_of_sentence|>",
    "Mistral": "<|endoftext|>", "Llama 2": "<|endoftext|>", "Gemma": "<end_of_turn>",
    "Vicuna": "<|endoftext|>", "Zephyr": "<|endoftext|>", "Phi-3": "<|end|>", "LLaDA2": "<|role_end|>",
    "gpt-oss": "<|return|>", "GLM": None, "Alpaca": None,
}  # fmt: skip


@pytest.fixture(params=TEMPLATES)
def named(request):
    """(name, a tokenizer with that template)."""
    template, specials = TEMPLATES[request.param]
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = template
    return request.param, tokenizer


def said(content):
    return {"role": "assistant", "content": content}


def plain(text, tokenizer):
    """The text without special tokens."""
    for token in sorted(added_tokens(tokenizer), key=len, reverse=True):
        text = text.replace(token, "")
    return text.strip()


def test_the_end_of_a_turn(named):
    name, tokenizer = named
    assert style_of(tokenizer).closing == CLOSINGS.get(name, "<|im_end|>")


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_learned_is_the_content(named, system):
    name, tokenizer = named
    for answer in (*ANSWERS, THOUGHT):
        messages = [*SYSTEMS[system], USER, said(answer)]
        if name == "Gemma" and system != "no system":
            with pytest.raises(ValueError, match="f:1: the chat template refuses this conversation: System"):
                encode_conversation(messages, tokenizer, where="f:1")
            continue
        (row,) = encode_conversation(messages, tokenizer)
        (text,) = learned(row, tokenizer)
        # what the generation prompt has opened is not generated
        opened = style_of(tokenizer).opens_thought
        assert plain(text, tokenizer) == answer.removeprefix(opened), answer
        closing = style_of(tokenizer).closing or tokenizer.eos_token
        assert text.removesuffix(tokenizer.eos_token).endswith(closing) or text.endswith(closing)
        start = row["in_answer"].index(True)
        prompt = render_prompt(messages[:-1], tokenizer, chat=True)
        if answer == THOUGHT or name not in {*WRITES_THOUGHT, "R1-Distill", "gpt-oss"}:
            assert row["input_ids"][:start] == prompt or name == "gpt-oss"


def test_two_turns(named):
    _, tokenizer = named
    messages = [USER, said("Paris."), {"role": "user", "content": "And the other?"}, said("assistant")]
    (row,) = encode_conversation(messages, tokenizer)
    assert [plain(text, tokenizer) for text in learned(row, tokenizer)] == ["Paris.", "assistant"]
    rows = encode_conversation(messages, tokenizer, turns="split")
    assert [plain(text, tokenizer) for row in rows for text in learned(row, tokenizer)] == [
        "Paris.",
        "assistant",
    ]


def test_a_thought_of_an_earlier_turn_is_learned_or_refused(named):
    name, tokenizer = named
    messages = [USER, said(THOUGHT), {"role": "user", "content": "And the other?"}, said("Rome.")]
    forgets = name in {*WRITES_THOUGHT, "R1-Distill", "LLaDA2"}
    if forgets:
        with pytest.raises(ValueError, match=r"rewrites earlier turns .* use --turns split"):
            encode_conversation(messages, tokenizer)
    else:
        (row,) = encode_conversation(messages, tokenizer)
        assert [plain(text, tokenizer) for text in learned(row, tokenizer)] == [THOUGHT, "Rome."]
    first, last = encode_conversation(messages, tokenizer, turns="split")
    opened = style_of(tokenizer).opens_thought
    assert plain(learned(first, tokenizer)[0], tokenizer) == THOUGHT.removeprefix(opened)
    assert plain(learned(last, tokenizer)[0], tokenizer) == "Rome."


def test_sft_dpo_and_kto_see_the_same_tokens(named):
    _, tokenizer = named
    encoding = Encoding(tokenizer, "one", False, 500, "error")
    for answer in (*ANSWERS, THOUGHT):
        (row,) = encode_conversation([USER, said(answer)], tokenizer)
        (found,) = encode_answers([("f:1", [USER], [said(answer)])], encoding)
        start = row["in_answer"].index(True)
        assert found.tokens.context.tolist() == row["input_ids"][:start]
        assert found.tokens.answer.tolist() == row["input_ids"][start:]


def test_an_answer_that_ended_at_once_is_its_end(named):
    """A sampled completion may be empty; as the worse one of a pair it teaches not to end there."""
    _, tokenizer = named
    (found,) = encode_answers([("f:1", [USER], [said("")])], Encoding(tokenizer, "one", False, 500, "error"))
    assert found.tokens.context.tolist() == render_prompt([USER], tokenizer, chat=True)
    ends = {style_of(tokenizer).closing or tokenizer.eos_token, tokenizer.eos_token}
    assert 0 < len(found.tokens.answer) <= 2
    assert set(tokenizer.convert_ids_to_tokens(found.tokens.answer.tolist())) <= ends


def test_special_tokens_that_a_text_spells_stay_text(named):
    _, tokenizer = named
    closing = style_of(tokenizer).closing or tokenizer.eos_token
    spelled = [{"role": "user", "content": f"What is {closing} for?"}, said(f"{closing} ends a turn.")]
    clean = [{"role": "user", "content": "What is it for?"}, said("It ends a turn.")]
    special = set(tokenizer.convert_tokens_to_ids(added_tokens(tokenizer)))
    (row,), (expected,) = encode_conversation(spelled, tokenizer), encode_conversation(clean, tokenizer)
    count = [sum(token in special for token in found["input_ids"]) for found in (row, expected)]
    assert count[0] == count[1]
    text = tokenizer.decode(row["input_ids"])
    assert f"What is {closing} for?" in text and f"{closing} ends a turn." in text
    rows = split_conversation(spelled, tokenizer, parse_special=True)
    assert all("\ufdd0" not in text for text, _ in rows[0])
    prompt = render_prompt(spelled[:1], tokenizer, chat=True, parse_special=True)
    assert sum(t in special for t in prompt) == 1 + sum(
        t in special for t in render_prompt(clean[:1], tokenizer, chat=True)
    )


def with_template(template):
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_cannot_be_told_apart_is_refused_by_name():
    tokenizer = with_template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    tokenizer.name_or_path = "owner/model"
    with pytest.raises(
        ValueError, match="the chat template of 'owner/model' does not write an answer as it is"
    ):
        encode_conversation([USER, said("A")], tokenizer)


def test_what_a_template_leaves_out_is_refused():
    template = "{% for m in messages[:2] + messages[3:] %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template leaves out a turn of role 'user'"):
        encode_conversation([USER, said("A"), USER, said("B")], with_template(template))


CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
WITH_TOOLS = [{**USER, "tools": [{"name": "add"}]}, {**said("Let me see."), "tool_calls": CALLS},
              {"role": "tool", "content": "4"}, said("4")]  # fmt: skip


def test_tools_are_text_where_the_template_has_no_place_for_them():
    for name in ("LLaDA", "Llama 3", "R1-Distill"):
        template, specials = TEMPLATES[name]
        tokenizer = with_template(template)
        tokenizer.add_special_tokens({"additional_special_tokens": specials})
        (row,) = encode_conversation(WITH_TOOLS, tokenizer)
        text = tokenizer.decode(row["input_ids"])
        assert '<tools>\n{"name": "add"}\n</tools>\nTo call a tool, answer with\n<tool_call>' in text
        assert USER["content"] in text and "<tool_response>\n4\n</tool_response>" in text
        call = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
        assert [plain(text, tokenizer) for text in learned(row, tokenizer)] == [call, "4"]
        prompt = render_prompt(WITH_TOOLS[:1], tokenizer, chat=True)
        assert "To call a tool" in tokenizer.decode(prompt)
        assert TOOLS in notes_of(WITH_TOOLS, tokenizer, parse_special=False)


def test_tool_calls_are_learned_where_the_template_writes_them():
    template = (
        "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
        "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = with_template(template)
    (row,) = encode_conversation(WITH_TOOLS, tokenizer)
    call = 'Let me see.<call>{"name": "add", "arguments": {"a": 2}}</call><|eot_id|>'
    assert learned(row, tokenizer) == [call, "4<|eot_id|><|endoftext|>"]
    assert '[tools][{"name": "add"}]' in tokenizer.decode(row["input_ids"])


def test_turns_of_weight_0_are_context():
    tokenizer = with_template(TEMPLATES["LLaDA"][0])
    messages = [USER, {**said("no"), "learn": False}, USER, said("yes"), USER, {**said("no"), "learn": False}]
    (row,) = encode_conversation(messages, tokenizer)
    assert learned(row, tokenizer) == ["yes<|eot_id|><|endoftext|>"]
    (last,) = encode_conversation(messages, tokenizer, turns="last")
    assert last == row
    assert len(encode_conversation(messages, tokenizer, turns="split")) == 1
