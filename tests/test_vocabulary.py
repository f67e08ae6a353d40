"""Vocabularies by bytes: three kinds of tokenizer, special tokens by role, projection, alignment of texts."""

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llada.autoregressive.vocabulary import OTHER, TokenBytes, VocabMap, align_texts
from llada.models.tokens import load_tokenizer

TEXT = "Der Preis: 17 € für “zwei” 😀\n\n Ende"


def sentencepiece(*, byte_fallback=True, strip=True):
    """A small sentencepiece-like tokenizer, as Llama-2's files describe theirs."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁DerPisEnd:17fü", "▁D", "▁P", "En", "en"]
    vocabulary = {}
    for piece in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("▁", "D"), ("▁", "P"), ("E", "n"), ("e", "n")]
    merges = [pair for pair in merges if set(pair) <= set(vocabulary)]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=byte_fallback)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if strip else "never")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bytes_only(*specials, **roles):
    """A byte-level tokenizer without any merge, with the given special tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@pytest.fixture
def llada(tokenizer_dir):
    return load_tokenizer(str(tokenizer_dir), chat=True)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("make", [sentencepiece, lambda: sentencepiece(strip=False), bytes_only])
def test_tokens_read_as_bytes_spell_the_text(make, llada):
    for tokenizer in (make(), llada):
        table = TokenBytes.of(tokenizer)
        ids = encode(tokenizer, TEXT)
        written = table.decode(ids)
        assert written.removeprefix(b" " if table.drops_first_space else b"") == TEXT.encode()
        assert table.starts(ids)[-1] == len(written)


def test_every_byte_has_its_token(llada):
    table = TokenBytes.of(llada)
    assert {text for text in table.texts if text and len(text) == 1} == {bytes([b]) for b in range(256)}


def test_word_level_tokenizers_are_refused():
    backend = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"cannot be read as bytes.*WordPiece"):
        TokenBytes.of(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_the_same_tokenizer_is_the_identity(llada):
    same = VocabMap.between(llada, llada)
    assert same.is_identity
    assert same.coverage == 1.0
    assert torch.equal(same.target_of, torch.arange(len(llada)))


def test_a_grown_tokenizer_keeps_its_ids(llada, tokenizer_dir):
    grown = load_tokenizer(str(tokenizer_dir))
    grown.add_tokens(["<extra>"], special_tokens=True)
    both_ways = VocabMap.between(grown, llada), VocabMap.between(llada, grown)
    assert all(found.is_identity for found in both_ways)
    assert both_ways[0].target_of[-1] == OTHER
    assert both_ways[0].target_of[:-1].tolist() == both_ways[1].target_of.tolist() == list(range(len(llada)))


@pytest.mark.parametrize("make", [sentencepiece, bytes_only])
def test_mapped_tokens_have_equal_bytes(make, llada):
    found = VocabMap.between(make(), llada)
    for i, j in enumerate(found.target_of.tolist()):
        if found.source.texts[i] is not None:
            texts = [text for text in found.target.texts if text is not None]
            assert (found.target.texts[j] if j != OTHER else None) == (
                found.source.texts[i] if found.source.texts[i] in texts else None
            )
    # a vocabulary of bytes alone is the first part of any larger one
    assert found.is_identity == (make is bytes_only)


def test_real_tokens_come_before_byte_fallback(llada):
    found = VocabMap.between(llada, sentencepiece())
    target = sentencepiece().get_vocab()
    assert found.target_of[encode(llada, ":")[0]] == target[":"]
    assert found.target_of[encode(llada, "!")[0]] == target["<0x21>"]


def test_special_tokens_by_role(llada):
    to_llada = VocabMap.between(
        bytes_only("<BOS>", "<start_id>", "<end_id>", "<eot_id>", "<EOS>", "<tool>"), llada
    )
    ours = llada.get_vocab()
    wanted = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>"]
    assert to_llada.target_of[:6].tolist() == [*(ours[token] for token in wanted), OTHER]
    # LLaDA's end of text has no place of its own where there is only one closing token; the mask has none
    chat = bytes_only("<|im_start|>", "<|im_end|>", bos_token="<|im_start|>", eos_token="<|im_end|>")
    back = VocabMap.between(llada, chat).target_of
    assert back[ours["<|eot_id|>"]] == back[ours["<|endoftext|>"]] == 1
    assert back[llada.mask_token_id] == OTHER
    assert VocabMap.between(chat, llada).target_of[:2].tolist() == [
        ours["<|startoftext|>"],
        ours["<|eot_id|>"],
    ]
    # an end of text that also ends answers becomes the end of turn
    assert VocabMap.between(sentencepiece(), llada).target_of[2] == ours["<|eot_id|>"]


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_projection_keeps_all_mass(scale, llada):
    found = VocabMap.between(sentencepiece(), llada)
    logits = torch.randn(7, found.source_size + 5, generator=torch.Generator().manual_seed(0)) * scale
    exact = logits.double().log_softmax(-1)
    log_probs, log_other = found.project(logits.float().log_softmax(-1))
    assert log_probs.shape == (7, len(llada))
    columns = [*found.target_of.tolist(), *[OTHER] * 5]
    for v in [*range(len(llada)), OTHER]:
        inside = exact[:, [u for u, bucket in enumerate(columns) if bucket == v]].logsumexp(-1)
        result = log_other if v == OTHER else log_probs[:, v]
        torch.testing.assert_close(result.double(), inside, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="fewer than the source tokenizer's"):
        found.project(logits[:, :9])


def test_projection_of_the_identity_changes_nothing(llada):
    found = VocabMap.between(llada, llada)
    log_probs = torch.randn(3, len(llada)).log_softmax(-1)
    projected, other = found.project(log_probs)
    torch.testing.assert_close(projected, log_probs)
    assert torch.equal(other, torch.full((3,), -torch.inf))


def align(found, source_ids, target_ids):
    dropped = found.source.drops_first_space, found.target.drops_first_space
    source, target = found.source.texts, found.target.texts
    return align_texts([source[i] for i in source_ids], [target[i] for i in target_ids], dropped)


def check_alignment(found, source_ids, target_ids):
    index = align(found, source_ids, target_ids)
    assert index.shape == (len(target_ids),)
    starts = found.source.starts(source_ids), found.target.starts(target_ids)
    kept = index != OTHER
    shift = starts[0][-1] - starts[1][-1]  # the space that sentencepiece puts in front
    assert np.array_equal(starts[0][index[kept]][1:], (starts[1][:-1][kept] + shift)[1:])
    return index


@pytest.mark.parametrize("make", [sentencepiece, bytes_only])
def test_texts_are_aligned_by_bytes(make, llada):
    other = make()
    pairs = [(other, llada), (llada, other)]
    for source, target in pairs:
        found = VocabMap.between(source, target)
        index = check_alignment(found, encode(source, TEXT), encode(target, TEXT))
        assert index[0] == 0
        assert (index != OTHER).any()
    if make is bytes_only:  # every token of the larger vocabulary starts at some byte
        found = VocabMap.between(other, llada)
        assert (align(found, encode(other, TEXT), encode(llada, TEXT)) != OTHER).all()


def test_special_tokens_are_aligned_in_their_order(llada):
    source = bytes_only("<eot_id>", "<EOS>")
    found = VocabMap.between(source, llada)
    ours = llada.get_vocab()
    target_ids = [*encode(llada, "Paris."), ours["<|eot_id|>"], ours["<|endoftext|>"]]
    with_both = [*encode(source, "Paris."), 0, 1]
    assert align(found, with_both, target_ids)[-2:].tolist() == [6, 7]
    assert align(found, with_both[:-1], target_ids)[-2:].tolist() == [6, OTHER]


def test_texts_that_differ_are_refused(llada):
    found = VocabMap.between(bytes_only(), llada)
    with pytest.raises(ValueError, match=r"differ from byte 5 on: b'!' in the source's tokens, b'.' in"):
        align(found, encode(bytes_only(), "Paris!"), encode(llada, "Paris."))
