"""Random draws: their distribution, and what they depend on."""

import itertools

import pytest
import torch

import published_sampler as oracle
from modelling_final.generation_llada import generate
from modelling_final.remasking_llada import (
    choose_tokens,
)
from peaked_llada import PROMPTS, answers, peaked_model


@pytest.fixture(scope="module")
def model():
    return peaked_model().double()


# --- sampling


def test_candidates_follow_the_published_distribution():
    # Every path of a two-token answer over 5 tokens, against 8000 draws: chi-square with its 99.9 % quantile.
    changes = {"vocab_size": 6, "embedding_size": 6, "mask_token_id": 5, "eos_token_id": 0}
    model = peaked_model(sharpness=0.4, **changes).double()
    prompt, temperature = [2, 3], 0.7

    def predictions(x):
        logits = model(torch.tensor([x])).logits[0, 2:]
        chosen_from = logits.clone()
        chosen_from[:, 5] = -torch.inf
        return logits.softmax(-1), (chosen_from / temperature).softmax(-1)

    expected = torch.zeros(5, 5, dtype=torch.float64)
    p, q = predictions([2, 3, 5, 5])
    for a, b in itertools.product(range(5), repeat=2):
        weight = q[0, a] * q[1, b]
        if p[0, a] >= p[1, b]:  # position 0 is the surer one and stays; position 1 is drawn again
            expected[a] += weight * predictions([2, 3, a, 5])[1][1, :5]
        else:
            expected[:, b] += weight * predictions([2, 3, 5, b])[1][0, :5]
    num = 8000
    output = generate(
        model, [prompt], gen_length=2, temperature=temperature, num_return_sequences=num, early_stop=False
    )
    observed = torch.zeros(5, 5, dtype=torch.float64)
    for a, b in answers(output, 2):
        observed[a, b] += 1
    chi_square = float(((observed - num * expected) ** 2 / (num * expected)).sum())
    assert expected.sum() == pytest.approx(1.0) and float(expected.min()) * num > 5
    assert chi_square < 51.2  # 24 degrees of freedom


def test_inversion_and_gumbel_max_draw_alike():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 9, generator=generator, dtype=torch.float64).expand(1, 20000, 9).clone()
    draws = torch.rand(1, 20000, generator=generator, dtype=torch.float64)
    ours = choose_tokens(logits, draws, temperature=0.5, mask_id=8)[0]
    logits[..., 8] = -torch.inf
    noise = torch.rand(20000, 9, generator=generator, dtype=torch.float64)
    theirs = oracle.gumbel_argmax(logits[0], 0.5, noise)
    p = (logits[0, 0] / 0.5).softmax(-1)[:8]
    for tokens in (ours, theirs):
        counts = torch.bincount(tokens, minlength=8)[:8]
        assert float(((counts - 20000 * p) ** 2 / (20000 * p)).sum()) < 24.3  # 7 degrees of freedom, 99.9 %


def test_a_draw_never_leaves_the_support():
    logits = torch.tensor([[[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf, 9.0]]])
    edge = 1 - 2**-53
    for u, token in ((0.0, 1), (0.499, 1), (0.5, 3), (edge, 3)):
        draw = torch.tensor([[u]], dtype=torch.float64)
        assert choose_tokens(logits.clone(), draw, temperature=1.0, mask_id=5).item() == token


def test_random_order_is_uniform():
    model = peaked_model().double()
    first = []
    generate(
        model,
        [[5]] * 1200,
        gen_length=4,
        remasking="random",
        early_stop=False,
        on_step=lambda entry: first.append(entry["positions"][0]) if entry["step"] == 0 else None,
    )
    counts = torch.bincount(torch.tensor(first), minlength=4)
    assert float(((counts - 300) ** 2 / 300).sum()) < 16.3  # 3 degrees of freedom, 99.9 %


def test_candidates_differ_and_repeat_with_the_seed(model):
    settings = {"gen_length": 8, "temperature": 1.0, "num_return_sequences": 3}
    output = generate(model, PROMPTS, **settings)
    assert output.sequences.shape == (9, 15)
    assert len({tuple(row) for row in answers(output, 8)[:3]}) == 3
    assert torch.equal(output.sequences, generate(model, PROMPTS, **settings).sequences)
    assert not torch.equal(output.sequences, generate(model, PROMPTS, **settings, seed=1).sequences)
    # candidate 0 does not depend on how many there are
    one = generate(model, PROMPTS, **{**settings, "num_return_sequences": 1})
    assert answers(one, 8) == answers(output, 8)[::3]
