"""The step likelihood is that of the sampler: all draws enumerated, all answers summed, replay bit by bit."""

import itertools

import numpy as np
import pytest
import torch

from llada.diffusion.sampler_likelihood import (
    State,
    batch_log_probs,
    check_settings,
    collate_states,
    log_odds,
    replay,
    step_log_probs,
)
from modelling_final import LLaDAGenerationConfig
from modelling_final.orders_llada import confidence, low_confidence
from modelling_final.remasking_llada import order_scores, pick_top
from peaked_llada import PROMPTS, peaked_model

V, MASK = 4, 3  # tokens 0, 1, 2, and the mask, which has probability but is never drawn


def settings_of(**changes):
    return LLaDAGenerationConfig(**{"gen_length": 6, "temperature": 1.0} | changes)


def all_outcomes(logits, num_picks, temperature):
    """{(kept positions, their tokens): probability} by the sampler's own functions, over all draws."""
    shown = logits.clone()
    shown[:, MASK] = -torch.inf
    q = (shown / temperature).softmax(-1)
    outcomes = {}
    for drawn in itertools.product(range(MASK), repeat=len(logits)):
        tokens = torch.tensor([drawn])
        scores = order_scores(low_confidence, logits[None], tokens, None)
        picks = pick_top(scores, torch.ones_like(tokens, dtype=torch.bool), num_picks)[0]
        probability = float(q.gather(1, tokens.T).prod())
        key = (tuple(picks.nonzero()[:, 0].tolist()), tuple(tokens[0, picks].tolist()))
        outcomes[key] = outcomes.get(key, 0.0) + probability
    return outcomes


def one_state(kept, tokens, size):
    chosen = np.isin(np.arange(size), kept)
    written = np.zeros(size, dtype=np.int64)
    written[list(kept)] = tokens
    return collate_states([State(np.zeros(size, np.int64), np.arange(size), written, chosen)], pad_id=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("num_picks", [1, 2, 3])
def test_a_step_has_the_probability_of_all_draws_that_lead_to_it(num_picks, temperature):
    random = torch.Generator().manual_seed(num_picks)
    logits = torch.randn(4, V, generator=random, dtype=torch.float64) * 2
    logits[1] = logits[3]  # equal confidences: the first position wins
    outcomes = all_outcomes(logits, num_picks, temperature)
    assert sum(outcomes.values()) == pytest.approx(1.0, abs=1e-12)
    for (kept, tokens), probability in outcomes.items():
        batch = one_state(kept, tokens, 4)
        found = step_log_probs(logits, batch, temperature=temperature, mask_id=MASK, order=True)
        assert float(found.exp()) == pytest.approx(probability, rel=1e-9, abs=3e-9), (kept, tokens)


def test_without_order_term_only_the_tokens_count():
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = one_state((1,), (2,), 3)
    found = step_log_probs(logits, batch, temperature=1.0, mask_id=MASK, order=False)
    assert float(found) == pytest.approx(float(logits[1, :MASK].log_softmax(-1)[2]))


def test_an_impossible_step_has_a_finite_gradient():
    logits = torch.tensor([[5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -9.0]], requires_grad=True)
    batch = one_state((1,), (0,), 2)  # position 0 can only draw less than 1/3 by a token of small probability
    found = step_log_probs(logits, batch, temperature=0.01, mask_id=MASK, order=True)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.isfinite(found).all() and torch.isfinite(gradient).all()


def sure_logits(gaps, dtype=torch.float32):
    """One row a gap: token 0 leads by it, so that its probability is 1 - 2 exp(-gap) and rounds to 1.0."""
    logits = torch.zeros(len(gaps), V, dtype=dtype)
    logits[:, 0] = torch.tensor(gaps, dtype=dtype)
    logits[:, MASK] = -30.0
    return logits


@pytest.mark.parametrize("gaps", [(20.0, 22.0, 18.0), (24.0, 17.5, 17.6), (30.0, 18.0, 29.0)])
def test_rounding_does_not_make_a_sure_step_jump(gaps):
    logits, tokens = sure_logits(gaps), torch.zeros(1, 3, dtype=torch.long)
    assert confidence(logits, tokens[0]).min() > 1 - 1e-7  # float32 probabilities tie here, or nearly
    picks = pick_top(order_scores(low_confidence, logits[None], tokens, None), tokens == 0, 1)[0]
    assert picks.tolist() == [gap == max(gaps) for gap in gaps]
    batch = one_state(tuple(picks.nonzero()[:, 0].tolist()), (0,), 3)
    values = []
    for seed in range(20):  # what another batch or machine changes: the last digits of the logits
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
        recomputed = logits * (1 + 1e-6 * noise)
        values.append(float(step_log_probs(recomputed, batch, temperature=1.0, mask_id=MASK, order=True)))
    exact = step_log_probs(logits.double(), batch, temperature=1.0, mask_id=MASK, order=True)
    assert max(values) - min(values) < 1e-6 and values[0] == pytest.approx(float(exact), abs=1e-6)


def test_log_odds_are_those_of_the_probabilities():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    torch.testing.assert_close(log_odds(logits), logits.softmax(-1).logit(), rtol=1e-9, atol=1e-9)
    tokens = torch.arange(50) % 7
    torch.testing.assert_close(low_confidence(logits, tokens), log_odds(logits)[torch.arange(50), tokens])


SAMPLERS = {
    "one block": {},
    "two at a time": {"steps": 3},
    "blocks": {"block_length": 3, "method": "semi_autoregressive_padding"},
    "growing canvas": {"block_length": 3, "method": "semi_autoregressive_origin"},
    "left to right": {"block_length": 1, "method": "semi_autoregressive_padding"},
    "random order": {"remasking": "random"},
    "cold": {"temperature": 0.5},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_replay_gives_the_sampled_confidences_and_answers_bit_by_bit(name):
    model, settings = peaked_model(), settings_of(**SAMPLERS[name])
    mask_id = model.config.mask_token_id
    for prompt in PROMPTS:
        output = model.generate(
            [prompt], generation_config=settings, return_trace=True, return_dict_in_generate=True
        )
        states = replay(prompt, output.trace, settings, mask_id=mask_id)
        assert len(states) == len(output.trace) == int(output.steps)
        answer = np.full(6, mask_id)
        for state, entry in zip(states, output.trace, strict=True):
            visible = len(state.token_ids) - len(prompt)
            assert (state.token_ids[len(prompt) :] == answer[:visible]).all()
            batch = collate_states([state], pad_id=0)
            with torch.no_grad():
                logits = model(input_ids=batch.input_ids, query_positions=batch.columns).logits[0]
            chosen = batch.is_chosen
            seen = logits.softmax(-1)[chosen].gather(1, batch.tokens[chosen, None])[:, 0]
            assert sorted(seen.tolist()) == sorted(entry["confidences"])
            answer[entry["positions"]] = entry["token_ids"]
        decided = answer[: int(output.lengths)]
        assert decided.tolist() == output.completions[0]


def test_batched_states_score_as_they_do_alone():
    model, settings = peaked_model().double(), settings_of(steps=3)
    mask_id = model.config.mask_token_id
    output = model.generate(
        PROMPTS, generation_config=settings, return_trace=True, return_dict_in_generate=True
    )
    states = []
    for row, prompt in enumerate(PROMPTS):
        trace = [entry for entry in output.trace if entry["row"] == row]
        states += replay(prompt, trace, settings, mask_id=mask_id)

    def score(some):
        batch = collate_states(some, pad_id=0)
        return batch_log_probs(model, batch, settings, mask_id=mask_id, order=True)

    together, alone = score(states), torch.cat([score([state]) for state in states])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert (together < 0).all()


@pytest.mark.parametrize(
    "change",
    [{"cfg_scale": 1.0}, {"repetition_penalty": 1.2}, {"parallel_decoding": "threshold"}, {"cache": "dual"},
     {"logits_eos_inf": True}, {"temperature": 0.0}],
)  # fmt: skip
def test_settings_without_an_exact_likelihood_are_refused(change):
    with pytest.raises(ValueError, match="--likelihood trajectory"):
        check_settings(settings_of(**change))
    check_settings(settings_of())
