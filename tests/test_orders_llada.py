"""The orders of decisions: their scores, what they sample, and that the sampler follows them."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modelling_final import LLaDAGenerationConfig
from modelling_final.generation_llada import generate
from modelling_final.orders_llada import LOOKS_AT_DRAW, ORDERS, PROBABILITIES
from modelling_final.remasking_llada import order_scores, pick_top
from peaked_llada import EOS, PROMPTS, peaked_model

MASK = 39
ROOT = Path(__file__).resolve().parent.parent

SCORED = [name for name, score in ORDERS.items() if score is not None]
BLIND = [name for name in SCORED if name not in LOOKS_AT_DRAW]


@pytest.mark.parametrize("name", SCORED)
def test_an_order_says_whether_it_looks_at_the_draw(name):
    logits = torch.tensor([[[0.0, 1.0, 3.0]]])
    scores = [float(ORDERS[name](logits, torch.tensor([[token]]))) for token in range(3)]
    assert (len(set(scores)) > 1) == (name in LOOKS_AT_DRAW)


def test_scores_by_hand():
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    tokens = torch.tensor([[1, 2, 0]])
    expected = {
        "low_confidence": [math.log(0.3 / 0.7), 0.0, math.inf],
        "max_probability": [0.5, 0.5, 1.0],
        "margin": [0.2, 0.25, 1.0],
        "entropy": [0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2), -1.5 * math.log(2), 0.0],
    }
    assert set(expected) == set(SCORED)
    for name, values in expected.items():
        scores = order_scores(ORDERS[name], p.log(), tokens, None)
        assert scores[0].tolist() == pytest.approx(values, abs=1e-12), name


@pytest.mark.parametrize("name", SCORED)
def test_what_has_to_wait_ranks_below_everything(name):
    logits = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 1, 4, 2, 5]])
    scores = order_scores(ORDERS[name], logits, tokens, torch.tensor([4, 5]))
    assert scores[0, [2, 4]].max() < scores[0, [0, 1, 3]].min()
    assert pick_top(scores, torch.tensor([[False, False, True, False, True]]), 1)[0].tolist()[2]
    without = logits.index_fill(-1, torch.tensor([4, 5]), -torch.inf)
    assert torch.equal(scores[0, [0, 1, 3]], ORDERS[name](without, tokens)[0, [0, 1, 3]])


# --- what an order samples: a Markov chain's exact posterior is the model

LENGTH, STATES = 4, 3
START = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
CHAIN = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.45, 0.05, 0.5]], dtype=torch.float64)
WORDS = list(itertools.product(range(STATES), repeat=LENGTH))


def chain_probability(word):
    return float(START[word[0]] * math.prod(CHAIN[a, b] for a, b in itertools.pairwise(word)))


def posterior(state):
    """[L, V] the distribution of each masked position given the others; None = masked."""
    total = torch.zeros(LENGTH, STATES, dtype=torch.float64)
    for word in WORDS:
        if all(seen in (None, token) for seen, token in zip(state, word, strict=True)):
            total[torch.arange(LENGTH), torch.tensor(word)] += chain_probability(word)
    return total / total.sum(dim=1, keepdim=True)


def sampled(order):
    """{word: probability} of decoding one token a step, summed over all that could be drawn."""
    states = {(None,) * LENGTH: 1.0}
    for _ in range(LENGTH):
        after = {}
        for state, weight in states.items():
            masked = [i for i, token in enumerate(state) if token is None]
            p = posterior(state)[masked]
            for drawn in itertools.product(range(STATES), repeat=len(masked)):
                tokens = torch.tensor([drawn])
                scores = order_scores(ORDERS[order], p.log()[None], tokens, None)
                pick = int(pick_top(scores, torch.ones_like(tokens, dtype=torch.bool), 1)[0].nonzero())
                word = (*state[: masked[pick]], drawn[pick], *state[masked[pick] + 1 :])
                share = weight * float(p.gather(1, tokens.T).prod())
                after[word] = after.get(word, 0.0) + share
        states = after
    return states


def distance(order):
    """Total variation between what is sampled and the chain."""
    found = sampled(order)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    return sum(abs(found.get(word, 0.0) - chain_probability(word)) for word in WORDS) / 2


@pytest.mark.parametrize("order", BLIND)
def test_an_order_that_does_not_look_at_the_draw_samples_the_model(order):
    assert distance(order) < 1e-12


def test_the_published_order_samples_something_else():
    assert distance("low_confidence") > 0.2


@pytest.mark.parametrize("name", ["sampler_settings_llada", "orders_llada"])
def test_settings_and_orders_are_read_without_torch(name):
    code = f"import sys, modelling_final.{name}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


# --- the sampler follows the table


@pytest.mark.parametrize("order", BLIND)
@pytest.mark.parametrize("parallel", ["none", "threshold"])
def test_generate_decides_what_scores_best(order, parallel):
    model = peaked_model().double()
    settings = {"gen_length": 8, "block_length": 4, "temperature": 0.8, "remasking": order}
    if parallel != "none" and order not in PROBABILITIES:
        with pytest.raises(
            ValueError, match=f"needs remasking low_confidence or max_probability, not {order}"
        ):
            LLaDAGenerationConfig(**settings, parallel_decoding=parallel)
        return
    settings |= {"parallel_decoding": parallel, "threshold": 0.5, "early_stop": False}
    trace = generate(model, PROMPTS[:1], return_trace=True, **settings).trace
    answer = [MASK] * 8
    for entry in trace:
        block = range(4 * entry["block"], 4 * entry["block"] + 4)
        masked = [i for i in block if answer[i] == MASK]
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[0] + answer])).logits[0, len(PROMPTS[0]) :]
        score = PROBABILITIES[order] if parallel != "none" else ORDERS[order]
        scores = score(logits[None, masked], torch.zeros(1, len(masked), dtype=torch.long))[0]
        sure = [masked[i] for i in (scores >= 0.5).nonzero()[:, 0].tolist()] if parallel != "none" else []
        assert entry["positions"] == (sure or [masked[int(scores.argmax())]])
        for position, token in zip(entry["positions"], entry["token_ids"], strict=True):
            answer[position] = token
    assert MASK not in answer


def test_early_stop_is_the_same_text_under_every_order():
    model = peaked_model().double()
    for order in ORDERS:
        settings = {"gen_length": 16, "block_length": 4, "remasking": order, "confidence_eos_eot_inf": True}
        full = generate(model, PROMPTS, early_stop=False, **settings)
        assert generate(model, PROMPTS, **settings).completions == full.completions
        assert EOS in full.sequences[:, -16:]
