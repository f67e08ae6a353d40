"""Chat templates, small conversations and a small tokenizer for the tests."""

import json
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from conftest import load_script
from llada.data.chat import Row, encode_rows, split_conversation
from llada.data.messages import Message
from llada.models.tokens import CHAT_TEMPLATE

# The template of LLaDA-8B-Base, -Instruct and LLaDA-1.5: it appends the assistant's header whatever is asked.
PUBLISHED = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
# System messages left out, and an EOS instead of a header when none is asked for.
WITHOUT_SYSTEM = (
    "{{ bos_token }}{% for message in messages if message['role'] != 'system' %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# A turn closed by EOS itself, after a blank, with the content's own white space.
CLOSED_BY_EOS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + ' ' + eos_token }}{% else %}{{ '[' + message['content'] + '] ' }}{% endif %}"
    "{% endfor %}"
)
# Thoughts of earlier turns are left out once another turn follows.
FORGETS_THOUGHTS = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
APPENDING = {
    "ours": CHAT_TEMPLATE,
    "published": PUBLISHED,
    "without_system": WITHOUT_SYSTEM,
    "eos": CLOSED_BY_EOS,
}

TEXTS = [
    "Water boils at 100 degrees.\n\n\tHere is a list:\n\n1. one\n2. two",
    "assistant user system <think>Paris is the capital of France.</think>\n",
] * 3
PARIS = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]
TWO_TURNS = [
    *PARIS,
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "<think>Not Milan.</think>\nRome."},
]


@cache
def small_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of at most 400 tokens; whoever changes its template puts it back."""
    return load_script("scripts/train_tokenizer.py").train_tokenizer(TEXTS, vocab_size=400)


def learned(row: dict, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The learned stretches of a row as texts."""
    stretches, inside = [], False
    for token_id, is_learned in zip(row["input_ids"], row["in_answer"], strict=True):
        if is_learned and not inside:
            stretches.append([])
        if is_learned:
            stretches[-1].append(token_id)
        inside = is_learned
    return [tokenizer.decode(stretch) for stretch in stretches]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """The path, after writing one JSON object a line to it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encode_conversation(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    turns: str = "all",
    where: str = "conversation",
) -> list[Row]:
    """The training rows of a conversation; `where` stands before an error."""
    try:
        return encode_rows(split_conversation(messages, tokenizer, turns=turns), tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
