"""Speculative decoding with real, tiny models: equal outputs, caches that change nothing, `generate`."""

import pytest
import torch

from llada.speculative.acceptance import KeyedDraws
from llada.speculative.decoder import SpeculativeDecoder, SpeculativeStats, ends_with
from llada.speculative.generate import Speculation
from llada.speculative.settings import SpeculativeSettings
from llada.speculative.verifier import Verifier, warpers
from speculation import IdsOnly, make_drafter, make_verifier

V = 48
EOS = 0
PROMPTS = [[7, 3, 9], [1], list(range(1, 30))]
LENGTH = 12


class Tokenizer:
    """As much of a tokenizer as convert_ar asks for: ids 0 ... V - 1, then the mask."""

    chat_template, eos_token_id, eos_token, pad_token, pad_token_id = None, EOS, "0", "0", EOS
    mask_token_id, mask_token = V, None

    def get_vocab(self):
        return {str(i): i for i in range(V + (self is not None and getattr(self, "has_mask", False)))}

    def add_special_tokens(self, tokens):
        self.has_mask = True


@pytest.fixture(scope="module")
def verifier():
    return make_verifier(V, eos_id=EOS)


@pytest.fixture(scope="module")
def drafter(verifier):
    """Right about half of the time, and causal, so that keys kept from before are the right ones."""
    return make_drafter(verifier, Tokenizer(), noise=0.15)


@pytest.fixture(scope="module")
def bidirectional(verifier):
    return make_drafter(verifier, Tokenizer(), noise=0.15, causal=False)


def make_decoder(drafter, verifier, **settings):
    settings = SpeculativeSettings(**{"max_new_tokens": LENGTH, "draft_length": 4, **settings})
    bridge = IdsOnly(V, drafter.config.mask_token_id)
    return SpeculativeDecoder(drafter, verifier, bridge, settings)


def answers(decoder, prompts=PROMPTS):
    done, total = ends_with([EOS]), SpeculativeStats()
    found = []
    for i, prompt in enumerate(prompts):
        answer, stats = decoder.decode(prompt, prompt, record_id=i, is_done=done)
        total += stats
        found.append(answer)
    return found, total


def plain(decoder, prompts=PROMPTS):
    done = ends_with([EOS])
    return [decoder.decode_plain(prompt, record_id=i, is_done=done)[0] for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def wanted(drafter, verifier):
    found = greedy(verifier)
    assert plain(make_decoder(drafter, verifier)) == found
    return found


def greedy(verifier, prompts=PROMPTS):
    """transformers' own greedy output."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = verifier.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


MODES = [
    {},
    {"draft": "left_to_right"},
    {"draft": "left_to_right", "draft_steps": 2},
    {"draft": "confidence"},
    {"draft": "confidence", "draft_steps": 2},
    {"draft_cache": False},
    {"draft": "left_to_right", "draft_cache": False},
    {"adaptive_length": True, "draft_length": 9},
    {"min_confidence": 0.3},
    {"num_chains": 3, "draft_temperature": 1.0},
    {"num_chains": 3, "draft_temperature": 1.0, "draft": "left_to_right"},
    {"num_chains": 2, "draft_temperature": 1.0, "draft": "confidence", "draft_steps": 2},
    {"draft_length": 1},
    {"draft_length": 40},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_temperature_0_gives_transformers_greedy_output(drafter, bidirectional, verifier, wanted, mode):
    for model in (drafter, bidirectional):
        found, stats = answers(make_decoder(model, verifier, **mode))
        assert found == wanted
        assert stats.tokens == sum(map(len, found)) and stats.verifier_forwards == stats.rounds
        assert stats.accepted[0] > 0 or model is bidirectional


@pytest.mark.parametrize("mode", MODES[1:4] + MODES[10:11], ids=str)
def test_match_gives_the_samples_of_plain_decoding(drafter, verifier, mode):
    decoder = make_decoder(
        drafter, verifier, **{"temperature": 0.9, "top_p": 0.95, **mode}, acceptance="match"
    )
    found, stats = answers(decoder)
    assert found == plain(decoder)
    assert stats.accepted[0] > 0
    decoder.settings.seed = 1
    assert answers(decoder)[0] == plain(decoder) != found


@pytest.mark.parametrize("rule", ["block", "token", "match"])
def test_a_drafter_that_says_what_the_verifier_says_is_always_accepted(verifier, rule):
    twin = make_drafter(verifier, Tokenizer())
    settings = {"temperature": 1.0, "acceptance": rule, "draft": "left_to_right"}
    decoder = make_decoder(twin, verifier, **settings)
    _, stats = answers(decoder)
    assert stats.acceptance_by_position == [1.0] * 4
    assert stats.acceptance_length > 3  # 5, but for the last round of each answer
    # a forward for each drafted token, and none more (an answer's end leaves some of its draft unread)
    assert sum(stats.reached) <= stats.draft_forwards <= sum(stats.reached) + 3 * len(PROMPTS)


@pytest.mark.parametrize("mode", MODES[:2] + MODES[4:5] + MODES[10:12], ids=str)
def test_the_caches_change_nothing(drafter, verifier, mode):
    # with a causal drafter keys do not depend on what came later, so cached and uncached drafts are equal
    settings = {"temperature": 0.9, "seed": 3, **mode}
    with_cache, stats = answers(make_decoder(drafter, verifier, **settings))
    decoder = make_decoder(drafter, verifier, **settings, draft_cache=False)
    decoder.verifier.uses_cache = False
    without, bare = answers(decoder)
    assert with_cache == without
    assert (stats.reached, stats.accepted) == (bare.reached, bare.accepted)


def test_200_prompts_with_the_causal_drafter_are_greedy(drafter, verifier):
    prompts = torch.randint(1, V, (200, 5), generator=torch.Generator().manual_seed(0))
    given = torch.ones_like(prompts)
    wanted = verifier.generate(prompts, attention_mask=given, do_sample=False, max_new_tokens=6)
    rows = [row[: row.index(EOS) + 1] if EOS in row else row for row in wanted[:, 5:].tolist()]
    found, stats = answers(make_decoder(drafter, verifier, max_new_tokens=6), prompts.tolist())
    assert found == rows and len({tuple(row) for row in rows}) > 100
    assert 1.2 < stats.acceptance_length < 4  # drafts of both kinds: accepted and rejected


def test_the_first_draft_of_a_bidirectional_drafter_is_a_plain_forward(bidirectional, verifier):
    decoder = make_decoder(bidirectional, verifier, temperature=1.0)
    decoder.drafter.start([7, 3, 9])
    draft = decoder.drafter.draft([4], 4, KeyedDraws(0, 0, "draft"))
    mask = bidirectional.config.mask_token_id
    logits = bidirectional(torch.tensor([[7, 3, 9, 4, *[mask] * 4]])).logits[0, 4:, :V]
    torch.testing.assert_close(draft.q[0], logits.softmax(-1))
    assert decoder.drafter._cache.get_seq_length() == 4  # the masks are gone


def test_the_drafter_reads_only_its_masks_through_the_head(drafter, verifier, monkeypatch):
    rows = []
    head = drafter.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:2]))
    try:
        _, stats = answers(make_decoder(drafter, verifier), PROMPTS[:1])
    finally:
        hook.remove()
    assert len(rows) == stats.draft_forwards and max(rows) == (1, 4)


def test_the_verifier_forwards_nothing_twice(drafter, verifier):
    widths = []
    hook = verifier.model.embed_tokens.register_forward_hook(
        lambda module, args, output: widths.append(tuple(args[0].shape))
    )
    try:
        _, stats = answers(make_decoder(drafter, verifier), PROMPTS[2:])
    finally:
        hook.remove()
    assert len(widths) == stats.rounds == stats.verifier_forwards
    # the prompt goes through with the first draft; then one token, the last round's own, and the draft
    assert widths[0] == (1, len(PROMPTS[2]) + 4) and max(widths[1:]) == (1, 5)


def test_verifier_scores_equal_those_without_a_cache(verifier):
    cached, bare = (
        Verifier(verifier, warpers(temperature=1)),
        Verifier(verifier, warpers(temperature=1), uses_cache=False),
    )
    text = [3, 4, 5]
    for chains, grows in (
        ([[6, 7], [6, 8], [9, 9]], [6, 8, 1]),
        ([[2, 2, 2]], [2]),
        ([[1], [1, 3, 3], []], [1, 3, 3, 4]),
        ([[5, 5], [5, 5]], [8]),
        ([[]], [1]),
    ):
        one, other = cached.scores(text, chains), bare.scores(text, chains)
        for row, chain in enumerate(chains):
            torch.testing.assert_close(one[row, : len(chain) + 1], other[row, : len(chain) + 1])
        text = text + grows
    cached.scores([9, 9], [[1]])  # another text altogether
    torch.testing.assert_close(cached.scores([3, 4], [[1]]), bare.scores([3, 4], [[1]]))


def test_a_sliding_window_verifier(drafter):
    from transformers import MistralConfig, MistralForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 6}
        ids = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
        config = MistralConfig(vocab_size=V, **shape, **ids)
        model = MistralForCausalLM(config).double().eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.35)
    found, _ = answers(make_decoder(drafter, model))
    assert found == greedy(model)


def generate(model, prompts, drafter, settings, **flags):
    width = max(map(len, prompts))
    ids = torch.tensor([[EOS] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    if drafter is not None:
        speculation = Speculation(drafter, IdsOnly(V, drafter.config.mask_token_id), settings)
        flags["custom_generate"] = speculation
    output = model.generate(ids, attention_mask=mask, max_new_tokens=LENGTH, **flags)
    assert drafter is None or speculation.statistics.rounds > 0
    return output


def test_as_the_way_of_decoding_of_generate(drafter, verifier):
    settings = SpeculativeSettings(draft_length=4)
    for flags in ({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}):
        wanted = generate(verifier, PROMPTS, None, None, do_sample=False, **flags)
        assert torch.equal(generate(verifier, PROMPTS, drafter, settings, do_sample=False, **flags), wanted)
    output = generate(verifier, PROMPTS, drafter, settings, return_dict_in_generate=True)
    assert torch.equal(output.sequences, generate(verifier, PROMPTS, None, None))
    with pytest.raises(ValueError, match="num_beams 2"):
        generate(verifier, PROMPTS, drafter, settings, num_beams=2)


def test_sampling_through_generate(drafter, verifier):
    flags = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    matched = SpeculativeSettings(draft_length=4, acceptance="match")
    one = generate(verifier, PROMPTS, drafter, matched, **flags)
    other = SpeculativeSettings(draft_length=2, acceptance="match", draft="confidence")
    assert torch.equal(one, generate(verifier, PROMPTS, drafter, other, **flags))
    blocks = generate(verifier, PROMPTS, drafter, SpeculativeSettings(draft_length=4), **flags)
    assert not torch.equal(one[:, :36], blocks[:, :36])
