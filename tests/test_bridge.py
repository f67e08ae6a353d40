"""Drafts across tokenizers: the same answers, and texts that become the right tokens."""

import copy

import pytest
import torch

from conftest import ROOT, load_script
from llada.autoregressive.vocabulary import TokenBytes
from llada.models.tokens import load_tokenizer
from llada.speculative.acceptance import KeyedDraws
from llada.speculative.bridge import Bridge, GrowingText
from llada.speculative.decoder import SpeculativeDecoder, SpeculativeStats, ends_with
from llada.speculative.generate import Speculation
from llada.speculative.settings import SpeculativeSettings
from modelling_final import LLaDAConfig, LLaDAModelLM
from speculation import make_verifier
from test_vocabulary import sentencepiece

TEXT = (ROOT / "README.md").read_text()[:3000] + "\n  € für “zwei” 😀\n\n\tEnde 1234 + 99.5 = x"
PROMPTS = ["What is the capital of France?", "😀 3 + 4 =", "Name"]


@pytest.fixture(scope="module")
def ours(tokenizer_dir):
    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture(scope="module")
def theirs():
    """A byte-level tokenizer with other merges, so other ids and other tokens."""
    return load_script("scripts/train_tokenizer.py").train_tokenizer([TEXT], vocab_size=360)


@pytest.fixture(scope="module")
def drafter(ours):
    shape = {"d_model": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 48}
    ids = {"mask_token_id": ours.mask_token_id, "eos_token_id": ours.eos_token_id}
    config = LLaDAConfig(
        vocab_size=len(ours), embedding_size=384, max_sequence_length=128, pad_token_id=ours.pad_token_id,
        **shape, **ids,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LLaDAModelLM(config).double().eval()


@pytest.fixture(scope="module")
def verifier(theirs):
    return make_verifier(len(theirs) + 5, eos_id=theirs.eos_token_id)  # five spare columns


def make_bridge(kind, drafter, ours, theirs, verifier):
    return Bridge(kind, drafter.config, ours, theirs, num_outputs=verifier.config.vocab_size)


@pytest.mark.parametrize("kind", ["vocabulary", "text"])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"draft": "confidence", "draft_steps": 3},
        {"num_chains": 2, "draft_temperature": 1.0},
        {"temperature": 1.0, "acceptance": "match"},
        {"temperature": 1.0, "acceptance": "match", "draft": "left_to_right"},
    ],
    ids=str,
)
def test_answers_are_those_of_plain_decoding(kind, mode, drafter, verifier, ours, theirs):
    bridge = make_bridge(kind, drafter, ours, theirs, verifier)
    decoder = SpeculativeDecoder(
        drafter, verifier, bridge, SpeculativeSettings(max_new_tokens=20, draft_length=5, **mode)
    )
    total = SpeculativeStats()
    for i, text in enumerate(PROMPTS):
        prompt = theirs(text).input_ids
        done = {"record_id": i, "is_done": ends_with([theirs.eos_token_id])}
        answer, stats = decoder.decode(prompt, ours(text).input_ids, **done)
        assert answer == decoder.decode_plain(prompt, **done)[0]
        total += stats
    assert total.draft_forwards > 0 and sum(total.reached) > 0
    if kind == "vocabulary" and "temperature" in mode:  # drawn with the noise of the verifier
        assert sum(total.accepted) > 0


def test_q_is_renormalised_on_common_tokens(drafter, verifier, ours, theirs):
    bridge = make_bridge("vocabulary", drafter, ours, theirs, verifier)
    settings = SpeculativeSettings(temperature=1.0, draft_length=3)
    decoder = SpeculativeDecoder(drafter, verifier, bridge, settings)
    assert decoder.rule == "block"
    prompt = ours("capital").input_ids
    decoder.drafter.start(prompt)
    chains, q = decoder.drafter.draft([], 3, KeyedDraws(0, 0, "draft"))
    logits = drafter(torch.tensor([prompt + [ours.mask_token_id] * 3])).logits[0, len(prompt) :]
    table = bridge.vocabulary
    expected = torch.zeros(3, verifier.config.vocab_size, dtype=torch.float64)
    for i, probability in enumerate(logits.softmax(-1).T):
        text = table.source.texts[i] if i < len(ours) else None
        same = [v for v, other in enumerate(table.target.texts) if text and other == text]
        if i == ours.eos_token_id:
            same = [theirs.eos_token_id]
        if i == ours.get_vocab()["<|eot_id|>"]:
            same = [theirs.get_vocab()["<|eot_id|>"]]
        for v in same[:1]:
            expected[:, v] += probability
    headers = [theirs.get_vocab()[f"<|{side}_header_id|>"] for side in ("start", "end")]
    expected[:, headers] = q[0][:, headers]  # specials with the same role; their share is checked by the sum
    torch.testing.assert_close(q[0].sum(-1), torch.ones(3, dtype=torch.float64))
    share = expected[:, :256] / expected[:, :256].sum(-1, keepdim=True)
    torch.testing.assert_close(q[0][:, :256] / q[0][:, :256].sum(-1, keepdim=True), share)
    assert (q[0][:, theirs.mask_token_id] == 0).all() and (q[0][:, theirs.bos_token_id] == 0).all()
    assert all(q[0, k, token] > 0 for k, token in enumerate(chains[0]))


def test_drafted_text_becomes_the_verifiers_tokens(drafter, verifier, ours, theirs):
    bridge = make_bridge("text", drafter, ours, theirs, verifier)
    text = " the model für 😀"
    assert bridge.chain(ours(text).input_ids, []) == theirs(text).input_ids
    ends = [*ours(text).input_ids, ours.eos_token_id, *ours("more").input_ids]
    closing = bridge.chain(ends, [])
    assert closing[:-1] == theirs(text).input_ids
    assert closing[-1] in (theirs.eos_token_id, theirs.get_vocab()["<|eot_id|>"])
    half = ours("😀").input_ids[:-1]  # bytes of half a character wait
    assert bridge.chain([*ours("a").input_ids, *half], []) == theirs("a").input_ids


def test_a_sentencepiece_verifier_gets_no_space_within_an_answer(drafter, ours):
    pieces = sentencepiece()
    bridge = Bridge("text", drafter.config, ours, pieces, num_outputs=len(pieces))
    answer = pieces("Der P", add_special_tokens=False).input_ids
    more = bridge.chain(ours("reis").input_ids, answer)
    assert bridge.vocabulary.target.decode([*answer, *more]).decode().strip() == "Der Preis"


def test_the_answer_so_far_in_the_drafters_tokens(drafter, verifier, ours, theirs):
    for kind in ("vocabulary", "text"):
        bridge = make_bridge(kind, drafter, ours, theirs, verifier)
        answer = theirs(TEXT).input_ids
        for end in range(1, len(answer), 7):
            data = bridge.vocabulary.target.decode(answer[:end])
            whole = data.decode(errors="ignore")  # half characters stand only at the end
            assert bridge.canvas_answer(answer[:end]) == ours(whole).input_ids


def test_growing_text_equals_tokenising_all_of_it(ours):
    table = TokenBytes.of(ours)
    data = (TEXT + "    def f(x):\n        return  x\n" * 5).encode()
    text = GrowingText(ours, table)
    for end in [*range(0, 400, 3), *range(400, len(data), 41), 300, 500]:
        assert text.encode(data[:end]) == ours(data[:end].decode(errors="ignore")).input_ids


def test_growing_text_tokenises_only_the_end(ours, monkeypatch):
    import llada.speculative.bridge as module

    sizes, encode = [], module.encode_texts
    monkeypatch.setattr(
        module, "encode_texts", lambda texts, t: (sizes.append(len(texts[0])), encode(texts, t))[1]
    )
    text, data = GrowingText(ours, TokenBytes.of(ours)), ("several ordinary words " * 200).encode()
    for end in range(4000, 4500, 20):
        text.encode(data[:end])
    assert max(sizes[1:]) < 3 * 64


def test_prompts_keep_special_tokens_by_role(drafter, verifier, ours, theirs):
    bridge = make_bridge("vocabulary", drafter, ours, theirs, verifier)
    chat = [{"role": "user", "content": "Guten Tag für alle"}]
    prompts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for tokenizer in (theirs, ours)
    ]
    assert bridge.canvas_prompt(theirs(prompts[0]).input_ids) == ours(prompts[1]).input_ids


def test_generate_across_tokenizers(drafter, verifier, ours, theirs):
    inputs = theirs(PROMPTS[:1], return_tensors="pt")
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    for kind in ("vocabulary", "text"):
        bridge = make_bridge(kind, drafter, ours, theirs, verifier)
        speculation = Speculation(drafter, bridge, SpeculativeSettings())
        output = verifier.generate(**inputs, max_new_tokens=12, custom_generate=speculation)
        assert torch.equal(output, verifier.generate(**inputs, max_new_tokens=12))


def decoder_of(drafter, verifier, ours, theirs, kind="vocabulary", **settings):
    bridge = make_bridge(kind, drafter, ours, theirs, verifier)
    return SpeculativeDecoder(drafter, verifier, bridge, SpeculativeSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "none"}, "--bridge none: the drafter and the verifier have different vocabularies"),
        ({"kind": "bytes"}, "--bridge 'bytes': use one of none, vocabulary, text"),
        ({"draft_length": 0}, "--draft_length 0: must be at least 1"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"temperature": -1.0}, "--temperature -1.0: must be at least 0"),
        ({"top_p": 0.0}, "--top_p 0.0: must be above 0"),
        ({"min_confidence": 2.0}, "--min_confidence 2.0"),
        ({"draft": "random"}, "--draft 'random': choose from one_pass"),
        ({"draft_steps": 3}, "--draft_steps 3: has no effect without --draft"),
        ({"num_chains": 2}, "--num_chains 2 would be the same chain"),
        ({"num_chains": 2, "temperature": 1.0, "acceptance": "block"}, "not --num_chains 2"),
        ({"acceptance": "token"}, "--acceptance token: temperature 0 leaves nothing to draw"),
        ({"acceptance": "block", "temperature": 1.0, "draft": "confidence"}, "on tokens to their right"),
        ({"acceptance": "block", "temperature": 1.0, "kind": "text"}, "no probabilities of the verifier"),
        ({"acceptance": "token", "temperature": 1.0, "draft_temperature": 0.0}, "--draft_temperature 0"),
    ],
)  # fmt: skip
def test_bad_settings(settings, message, drafter, verifier, ours, theirs):
    with pytest.raises(ValueError) as error:
        decoder_of(drafter, verifier, ours, theirs, **settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("num_prompt", "num_drafter", "message"),
    [
        (0, 3, "the prompt is empty"),
        (120, 3, "exceed the verifier's context of 128 tokens"),
        (3, 128, "exceed the drafter's context of 128 tokens"),
    ],
)
def test_prompts_beyond_a_context(num_prompt, num_drafter, message, drafter, verifier, ours, theirs):
    decoder = decoder_of(drafter, verifier, ours, theirs, max_new_tokens=10)
    with pytest.raises(ValueError, match=message):
        decoder.decode([1] * num_prompt, [1] * num_drafter, record_id=0, is_done=ends_with([0]))


def test_a_full_canvas_ends_the_drafts_not_the_answer(drafter, verifier, ours, theirs):
    decoder = decoder_of(drafter, verifier, ours, theirs, max_new_tokens=20)
    prompt, done = theirs("one").input_ids, {"record_id": 0, "is_done": ends_with([])}
    answer, stats = decoder.decode(prompt, [1] * 124, **done)
    assert answer == decoder.decode_plain(prompt, **done)[0]
    assert stats.draft_forwards < stats.rounds


def test_models_that_cannot_verify(drafter, ours, theirs, verifier):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=len(theirs), hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="--verifier: MambaForCausalLM cannot verify drafts"):
        SpeculativeDecoder(
            drafter,
            MambaForCausalLM(config),
            make_bridge("vocabulary", drafter, ours, theirs, verifier),
            SpeculativeSettings(),
        )


def test_one_vocabulary_of_two_sizes(drafter, ours):
    longer = copy.deepcopy(ours)
    longer.add_tokens(["<extra>"])  # ids that both have mean the same
    bridge = Bridge("none", drafter.config, ours, longer, num_outputs=len(longer))
    assert len(ours) not in bridge.allowed and bridge.size == len(longer)
    assert bridge.canvas_answer([5, ours.mask_token_id, 6]) == [5, 6]
