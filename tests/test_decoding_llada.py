"""A sequence does not depend on its batch in any mode, and the approximate modes do what their papers say."""

import pytest
import torch

from modelling_final.generation_llada import generate
from modelling_final.remasking_llada import (
    penalise_repetition,
    pick_entropy_bounded,
    pick_factor,
    pick_threshold,
)
from peaked_llada import EOS, EOT, PAD, PROMPTS, Spy, answers, peaked_model


@pytest.fixture(scope="module")
def model():
    return peaked_model().double()


# --- a sequence does not depend on its batch

MODES = {
    "exact": {},
    "sampled": {"temperature": 1.0},
    "random": {"remasking": "random", "temperature": 0.5},
    "guided": {"cfg_scale": 1.0},
    "penalised": {"repetition_penalty": 1.3},
    "origin": {"method": "semi_autoregressive_origin"},
    "threshold": {"parallel_decoding": "threshold", "threshold": 0.4},
    "factor": {"parallel_decoding": "factor", "factor": 2.0},
    "entropy": {"parallel_decoding": "entropy", "entropy_bound": 2.0},
    "klass": {"parallel_decoding": "klass", "threshold": 0.2, "klass_kl": 0.5, "klass_steps": 1},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "refreshed": {"cache": "dual", "cache_refresh_interval": 2},
    "dual factor": {"cache": "dual", "parallel_decoding": "factor", "factor": 2.0},
    "dual guided klass": {"cache": "dual", "cfg_scale": 0.5, "parallel_decoding": "klass", "threshold": 0.2},
    "prefix threshold": {"cache": "prefix", "parallel_decoding": "threshold", "threshold": 0.3},
    "cap": {"remdm": "cap", "remdm_eta": 0.3, "temperature": 1.0},
    "rescale": {"remdm": "rescale", "remdm_eta": 0.3, "steps": 32},
    "conf": {"remdm": "conf", "cache": "dual"},
}


def padded(prompts, side, width):
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        columns = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("mode", MODES)
def test_batch_size_order_and_padding_change_nothing(model, mode):
    settings = {"gen_length": 16, "block_length": 8, **MODES[mode]}
    together = generate(model, PROMPTS, **settings)
    assert together.is_approximate == any(
        name in settings for name in ("parallel_decoding", "cache", "remdm")
    )
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], record_ids=[row], **settings)
        assert answers(alone, 16)[0] == answers(together, 16)[row]
        assert int(alone.steps[0]) == int(together.steps[row]) or settings.get("remdm")
    order = [2, 0, 1]
    for side in ("left", "right"):
        batch = padded([PROMPTS[row] for row in order], side, width=9)
        output = generate(model, **batch, record_ids=order, **settings)
        assert output.sequences.shape == (3, 9 + 16)
        assert answers(output, 16) == [answers(together, 16)[row] for row in order]
        assert output.sequences[0, 9 - len(PROMPTS[2]) : 9].tolist() == PROMPTS[2]


@pytest.mark.parametrize("mode", MODES)
def test_every_sequence_may_have_its_own_length(model, mode):
    settings = {"block_length": 4, **MODES[mode]}
    settings.pop("steps", None)
    lengths = [8, 16, 4]
    output = generate(model, PROMPTS, gen_length=lengths, **settings)
    assert output.sequences.shape == (3, 7 + 16)
    for row, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        alone = generate(model, [prompt], record_ids=[row], gen_length=length, **settings)
        assert output.sequences[row, 7 : 7 + length].tolist() == answers(alone, length)[0]
    whole = generate(model, PROMPTS, gen_length=lengths, method="fixed_length")
    assert (
        whole.sequences[2, 7:11].tolist()
        == answers(generate(model, [PROMPTS[2]], gen_length=4, method="fixed_length"), 4)[0]
    )


# --- rules


def test_parallel_rules_on_numbers_by_hand():
    scores = torch.tensor([[0.95, 0.6, 0.99, 0.9], [0.2, 0.1, 0.15, 0.0]])
    valid = torch.tensor([[True, True, True, True], [True, True, True, False]])
    assert pick_threshold(scores, valid, 0.9).tolist() == [
        [True, False, True, True],
        [True, False, False, False],
    ]
    # n = 1: 2 x .01 < 1; n = 2: 3 x .05; n = 3: 4 x .1 = .4; n = 4: 5 x .4 = 2
    assert pick_factor(scores, valid, 1.0).tolist() == [
        [True, False, True, True],
        [True, False, False, False],
    ]
    assert pick_factor(scores, valid, 0.3).tolist()[0] == [True, False, True, False]
    entropies = torch.tensor([[0.2, 1.0, 0.1, 0.3], [2.0, 2.0, 2.0, 0.0]])
    # order 2, 0, 3, 1: sum - max is 0, .1, .3, .6
    assert pick_entropy_bounded(scores, entropies, valid, 0.3).tolist()[0] == [True, False, True, True]
    assert pick_entropy_bounded(scores, entropies, valid, 0.0).tolist()[1] == [True, False, False, False]


def test_parallel_decoding_needs_fewer_steps_and_agrees_where_it_is_sure(model):
    exact = generate(model, PROMPTS, gen_length=16, early_stop=False)
    strict = generate(
        model, PROMPTS, gen_length=16, early_stop=False, parallel_decoding="threshold", threshold=1.0
    )
    assert answers(strict, 16) == answers(exact, 16) and strict.forwards == 16
    loose = generate(
        model, PROMPTS, gen_length=16, early_stop=False, parallel_decoding="threshold", threshold=0.0
    )
    assert loose.forwards == 1 and loose.tokens_per_forward == 16.0


def test_a_cache_refreshed_at_every_step_is_exact(model):
    exact = generate(model, PROMPTS, gen_length=16, block_length=8)
    for cache in ("prefix", "dual"):
        output = generate(
            model, PROMPTS, gen_length=16, block_length=8, cache=cache, cache_refresh_interval=1
        )
        assert answers(output, 16) == answers(exact, 16)


def test_a_cached_step_only_feeds_the_window(model):
    for cache, widths in (("dual", [23, 4, 4, 4]), ("prefix", [23, 16, 16, 16])):
        spy = Spy(model)
        generate(spy, PROMPTS, gen_length=16, block_length=4, cache=cache, early_stop=False)
        assert spy.columns[:4] == widths


def test_block_causal_models_have_an_exact_prefix_cache():
    model = peaked_model(attention_pattern="block_causal", attention_block_size=4).double()
    settings = {"gen_length": 16, "block_length": 4, "early_stop": False}
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16]]
    exact = generate(model, prompts, **settings)
    for cache in ("prefix", "dual"):
        assert torch.equal(generate(model, prompts, cache=cache, **settings).sequences, exact.sequences)


@pytest.mark.parametrize("rule", ["cap", "rescale", "conf"])
def test_remdm_takes_tokens_back_and_ends_without_masks(model, rule):
    output = generate(
        model,
        PROMPTS, gen_length=8, steps=24, remdm=rule, remdm_eta=0.5, temperature=1.0, early_stop=False,
        return_trace=True,
    )  # fmt: skip
    assert any(entry["remasked"] for entry in output.trace)
    assert model.config.mask_token_id not in output.sequences
    assert all(len(completion) <= 8 for completion in output.completions)


def test_repetition_penalty_makes_repetition_less_likely(model):
    logits = torch.tensor([[[2.0, 2.0, -2.0, -2.0]]])
    present = torch.tensor([[True, False, True, False]])
    assert penalise_repetition(logits, present, 2.0).tolist() == [[[1.0, 2.0, -4.0, -2.0]]]
    for row in range(3):
        penalised = generate(model, [PROMPTS[row]], gen_length=6, repetition_penalty=1e6, early_stop=False)
        tokens = [token for token in answers(penalised, 6)[0] if token not in (EOS, EOT)]
        assert len(set(tokens)) == len(tokens) and not set(tokens) & set(PROMPTS[row])
        favoured = generate(model, [PROMPTS[row]], gen_length=6, repetition_penalty=1e-6, early_stop=False)
        assert set(answers(favoured, 6)[0]) <= set(PROMPTS[row])


def test_eos_flags(model):
    plain = generate(model, PROMPTS, gen_length=16, early_stop=False)
    assert EOS in plain.sequences[:, -16:]
    assert EOS not in generate(model, PROMPTS, gen_length=16, logits_eos_inf=True).sequences[:, -16:]
    mask_id = model.config.mask_token_id
    settings = {"gen_length": 16, "confidence_eos_eot_inf": True, "early_stop": False}
    trace = generate(model, PROMPTS[:1], return_trace=True, **settings).trace
    answer, num_last = torch.full((16,), mask_id), 0
    for entry in trace:
        logits = model(torch.cat([torch.tensor(PROMPTS[0]), answer])[None]).logits[0, -16:]
        best = logits.index_fill(-1, torch.tensor([mask_id]), -torch.inf).argmax(-1)[answer == mask_id]
        # an EOS is only decided where a step has nothing else to offer
        is_last = entry["token_ids"][0] in (EOS, EOT)
        assert is_last == all(token in (EOS, EOT) for token in best.tolist())
        answer[entry["positions"]], num_last = torch.tensor(entry["token_ids"]), num_last + is_last
    assert 0 < num_last < 16
