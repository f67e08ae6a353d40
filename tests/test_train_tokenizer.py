"""The tokenizer that the pipeline trains: lossless, deterministic, LLaDA's special tokens."""

import random

import pytest
from transformers import AutoTokenizer

from chat_samples import TEXTS, small_tokenizer, write_jsonl
from conftest import load_script
from llada.models.tokens import SPECIAL_TOKENS

script = load_script("scripts/train_tokenizer.py")


def test_tokenizer_is_lossless_deterministic_and_splits_digits():
    plain = small_tokenizer()
    again = script.train_tokenizer(iter(TEXTS), vocab_size=400)
    assert again.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    draw = random.Random(0)
    alphabet = [*range(0, 0x250), *range(0x4E00, 0x4E40), 0x1F600, 0x200D, 0xFEFF, 0xE000, 0x10FFFF]
    for _ in range(300):
        text = "".join(map(chr, draw.choices(alphabet, k=30)))
        assert plain.decode(plain(text)["input_ids"]) == text
    assert plain.convert_ids_to_tokens(plain("2026")["input_ids"]) == ["2", "0", "2", "6"]
    assert plain.mask_token == SPECIAL_TOKENS["mask"] and plain.pad_token_id == plain.eos_token_id
    assert len(plain("<think>")["input_ids"]) > 1
    assert len(plain) <= 400
    specials = [plain.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS.values()]
    assert specials == list(range(len(plain) - len(specials), len(plain)))


def test_tokenizer_vocabulary_too_small():
    with pytest.raises(
        ValueError, match="--vocab_size 256 is too small: 256 bytes and 6 special tokens need at least 262"
    ):
        script.train_tokenizer(TEXTS, vocab_size=256)


def test_script_reads_documents_and_conversations(tmp_path, capsys):
    documents = write_jsonl(tmp_path / "a.jsonl", [{"text": "harbour harbour harbour"}])
    chats = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "lantern lantern", "completion": "river river"}])
    flags = ["--data", str(documents), str(chats), "--vocab_size", "300", "--output_dir", str(tmp_path / "t")]
    script.main(flags)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert f"{len(tokenizer)} tokens" in capsys.readouterr().out
    for word in (" harbour", " lantern", " river"):
        assert len(tokenizer(word)["input_ids"]) == 1
