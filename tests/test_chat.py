"""Conversations as tokens: what is learned, and that training and sampling see the same prompts."""

import random

import pytest

from chat_samples import (
    APPENDING,
    FORGETS_THOUGHTS,
    PARIS,
    PUBLISHED,
    TWO_TURNS,
    WITHOUT_SYSTEM,
    encode_conversation,
    learned,
    small_tokenizer,
)
from llada.data.chat import drops_system, render_prompt, split_conversation
from llada.models.tokens import CHAT_TEMPLATE


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


def test_answers_are_learned_whole(with_template):
    # the predecessor counted five tokens too many into the prompt, and "Paris." was never learned
    for template in (CHAT_TEMPLATE, PUBLISHED, WITHOUT_SYSTEM):
        tokenizer = with_template(template)
        (row,) = encode_conversation(TWO_TURNS, tokenizer)
        assert learned(row, tokenizer) == [
            "Paris.<|eot_id|>",
            "<think>Not Milan.</think>\nRome.<|eot_id|><|endoftext|>",
        ]
        assert tokenizer.decode(row["input_ids"]) == (
            "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
            "What is the capital of France?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nParis.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd of Italy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n<think>Not Milan.</think>\nRome.<|eot_id|>"
            "<|endoftext|>"
        )


def test_last_turn_and_a_row_for_each_turn(with_template):
    tokenizer = with_template(PUBLISHED)
    (everything,) = encode_conversation(TWO_TURNS, tokenizer)
    (last,) = encode_conversation(TWO_TURNS, tokenizer, turns="last")
    first, second = encode_conversation(TWO_TURNS, tokenizer, turns="split")
    assert last == second and last["input_ids"] == everything["input_ids"]
    assert learned(first, tokenizer) == ["Paris.<|eot_id|><|endoftext|>"]
    assert learned(last, tokenizer) == ["<think>Not Milan.</think>\nRome.<|eot_id|><|endoftext|>"]
    with pytest.raises(ValueError, match="--turns 'first': use one of all, last, split"):
        encode_conversation(TWO_TURNS, tokenizer, turns="first")


def random_conversation(draw):
    def text():
        edge = ["", "\n", "\n\n", " ", "\t", "1"]
        words = [
            "Paris",
            "assistant",
            "é",
            "12",
            "\n\n",
            "<think>",
            "  ",
            "</think>\n",
            "a",
            "user",
            "[",
            "?",
        ]
        middle = draw.choice(words[:4]) + "".join(draw.choices(words, k=draw.randrange(6)))
        return draw.choice(edge) + middle + draw.choice(edge)

    roles = ["system"] * draw.randrange(2) + ["user", "assistant"] * draw.randrange(1, 4)
    roles += ["user"] * draw.randrange(2)  # a question that nobody answered
    return [{"role": role, "content": text()} for role in roles]


@pytest.mark.parametrize("name", APPENDING)
def test_training_puts_the_sampler_s_prompt_before_every_answer(with_template, name):
    tokenizer = with_template(APPENDING[name])
    draw = random.Random(name)
    for _ in range(60):
        messages = random_conversation(draw)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        (row,) = encode_conversation(messages, tokenizer)
        assert row["in_answer"].count(True) + row["in_answer"].count(False) == len(row["input_ids"])
        for i in answers:
            prompt = render_prompt(messages[:i], tokenizer, chat=True)
            assert row["input_ids"][: len(prompt)] == prompt
            assert row["in_answer"][len(prompt)] and not row["in_answer"][len(prompt) - 1]
        contents = [messages[i]["content"].strip() for i in answers]
        for content, text in zip(contents, learned(row, tokenizer), strict=True):
            assert text.strip().startswith(content)
            closing = text.strip()[len(content) :].strip()
            eos = tokenizer.eos_token
            assert closing in (["<|eot_id|>", "<|eot_id|>" + eos] if name != "eos" else [eos])
        assert row["input_ids"].count(tokenizer.eos_token_id) == (len(answers) if name == "eos" else 1)
        assert encode_conversation(messages, tokenizer, turns="split")[-1]["input_ids"] == row["input_ids"]


def test_single_turn_prompt_is_the_template_tokenised_whole(with_template):
    tokenizer = with_template(PUBLISHED)
    text = tokenizer.apply_chat_template(PARIS[:1], tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert render_prompt(PARIS[0]["content"], tokenizer, chat=True) == expected
    assert render_prompt(PARIS[:1], tokenizer, chat=True) == expected
    assert render_prompt("Once", tokenizer, chat=False) == tokenizer("Once")["input_ids"]


def test_template_that_rewrites_earlier_turns(with_template):
    tokenizer = with_template(FORGETS_THOUGHTS)
    messages = [*TWO_TURNS[2:], *TWO_TURNS]
    with pytest.raises(
        ValueError, match=r"f:3: the chat template rewrites earlier turns .* use --turns split"
    ):
        encode_conversation(messages, tokenizer, where="f:3")
    for row in encode_conversation(messages, tokenizer, turns="split"):
        assert len(learned(row, tokenizer)) == 1
    last = encode_conversation(messages, tokenizer, turns="last")[0]
    prompt = render_prompt(messages[:-1], tokenizer, chat=True)
    assert last["input_ids"][: len(prompt)] == prompt
    assert "Milan" not in tokenizer.decode(prompt)


def test_template_that_changes_the_answer(with_template):
    tokenizer = with_template("{% for message in messages %}{{ message['content'] | upper }}{% endfor %}")
    with pytest.raises(ValueError, match="f:1: the chat template does not render the answer unchanged"):
        encode_conversation(PARIS, tokenizer, where="f:1")


def test_templates_without_system_messages(with_template):
    assert drops_system(with_template(WITHOUT_SYSTEM))
    assert not drops_system(with_template(PUBLISHED))


def test_no_template_and_messages_without_chat(with_template):
    tokenizer = with_template(None)
    with pytest.raises(ValueError, match="has no chat template"):
        render_prompt("a", tokenizer, chat=True)
    with pytest.raises(ValueError, match="messages need the chat template"):
        render_prompt(PARIS, tokenizer, chat=False)


def test_mask_token_in_a_conversation_or_prompt(plain):
    messages = [{"role": "user", "content": "fill <|mdm_mask|>"}, PARIS[1]]
    message = r"the text contains the mask token '<\|mdm_mask\|>'; remove or rewrite it"
    with pytest.raises(ValueError, match="f:9: " + message):
        encode_conversation(messages, plain, where="f:9")
    with pytest.raises(ValueError, match="prompt: " + message):
        render_prompt("a <|mdm_mask|>", plain, chat=False)


def test_segments_of_a_conversation(plain):
    texts = split_conversation(TWO_TURNS, plain)[0]
    assert [is_learned for _, is_learned in texts] == [False, True, False, True]
    assert texts[1][0] == "Paris.<|eot_id|>"
