"""The estimator with gradients: unbiased by enumeration, exact cancellation, two passes equal one."""

import itertools
import math

import numpy as np
import pytest
import torch

import exact_llada
from llada.diffusion.bound_estimator import MaskPlan, enumerate_masks
from llada.diffusion.bound_gradient import (
    differentiate,
    draw_values,
    gradient_parts,
    make_draws,
    plan_draws,
)
from llada.diffusion.likelihood import Request, score_answers
from llada.diffusion.losses import LossParts
from llada.diffusion.settings import LikelihoodSettings, MaskSettings
from llada.policies.kto_reference import mask_hash
from tiny_llada import make_model

MASK, PAD = 39, 0
REQUESTS = [
    Request((1, 2, 3), (4, 5, 6, 7), "four"),
    Request((8,), (9, 10, 11, 12, 13), "five"),
    Request((7, 7), tuple(range(10, 22)), "long"),
]


@pytest.fixture(scope="module")
def model():
    model = make_model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model


def draws_of(requests, num_draws, *, seed=3, **options):
    plans = plan_draws(requests, MaskSettings(num_draws, **options), seed, "test")
    return make_draws(requests, plans, num_draws, mask_id=MASK, pad_id=PAD)


def with_graph(model, draws):
    """B of each sequence of an ExactModel in one pass, all graphs kept: what two passes must reproduce."""
    total = torch.zeros(draws.num_sequences, dtype=torch.float64)
    for batch, weights in zip(draws.batches, draws.weights, strict=True):
        log_probs = model.log_probs(batch.input_ids, batch.attention_mask).flatten(0, 1)[batch.rows]
        owners = batch.rows // batch.input_ids.shape[1]
        sums = torch.zeros_like(total).index_add(0, owners, log_probs.gather(1, batch.targets[:, None])[:, 0])
        total = total + weights * sums
    return total


def test_all_masks_give_the_exact_bound(model):
    for request in REQUESTS[:2]:
        plan = enumerate_masks(len(request.answer))
        draws = make_draws([request], [plan], len(plan.masks), mask_id=MASK, pad_id=PAD)
        (expected,) = score_answers(model, [request], LikelihoodSettings())
        assert float(draw_values(model, [draws]).sum()) == pytest.approx(expected.log_likelihood, rel=1e-6)


def token_terms(model, request):
    """[2^T, T]: log p of every token under every mask that hides it, 0 elsewhere."""
    num_tokens = len(request.answer)
    plan = enumerate_masks(num_tokens)
    table = np.zeros((2**num_tokens, num_tokens))
    for mask in plan.masks:
        one = MaskPlan(mask[None], np.ones(1), "iid")
        (batch,) = make_draws([request], [one], 1, mask_id=MASK, pad_id=PAD).batches
        with torch.no_grad():
            nll = model(batch.input_ids, rows=batch.rows, targets=batch.targets).nll
        table[int(mask @ (1 << np.arange(num_tokens))), mask] = -nll.double().numpy()
    return table


@pytest.mark.parametrize("size_law", ["uniform", "inv_sqrt"])
def test_every_size_law_is_unbiased_summed_over_all_its_masks(model, size_law):
    # E = sum over l of q(l) * mean over masks of size l of w(l) * sum log p, with nothing left to chance
    request = REQUESTS[0]
    num_tokens = len(request.answer)
    table = token_terms(model, request).sum(axis=1)
    law = np.arange(1, num_tokens + 1) ** (-0.5 if size_law == "inv_sqrt" else 0.0)
    law /= law.sum()
    weight_of = {}
    for seed in range(60):
        (plan,) = plan_draws([request], MaskSettings(2, estimator="iid", size_law=size_law), seed, "law")
        weight_of |= {int(m.sum()): w for m, w in zip(plan.masks, plan.weights, strict=True)}
    expected = 0.0
    for size in range(1, num_tokens + 1):
        codes = [sum(1 << i for i in c) for c in itertools.combinations(range(num_tokens), size)]
        expected += law[size - 1] * np.mean([2 * weight_of[size] * table[code] for code in codes])
    (truth,) = score_answers(model, [request], LikelihoodSettings())
    assert expected == pytest.approx(truth.log_likelihood, rel=1e-6)


def stratified_size_probabilities(num_tokens, num_draws, law):
    """[N, T]: how much of stratum n's slice of [0, 1) falls on each size."""
    ends = np.concatenate([[0.0], np.cumsum(law)])
    low, high = np.arange(num_draws) / num_draws, np.arange(1, num_draws + 1) / num_draws
    overlap = np.minimum(high[:, None], ends[1:]) - np.maximum(low[:, None], ends[:-1])
    return np.maximum(overlap, 0) * num_draws


@pytest.mark.parametrize("size_law", ["uniform", "inv_sqrt"])
def test_strata_are_unbiased_summed_over_all_their_masks(model, size_law):
    request, num_draws = REQUESTS[1], 3
    num_tokens = len(request.answer)
    table = token_terms(model, request).sum(axis=1)
    law = np.arange(1, num_tokens + 1) ** (-0.5 if size_law == "inv_sqrt" else 0.0)
    law /= law.sum()
    sizes = np.arange(1, num_tokens + 1)
    means = [
        np.mean([table[sum(1 << i for i in c)] for c in itertools.combinations(range(num_tokens), size)])
        for size in sizes
    ]
    probabilities = stratified_size_probabilities(num_tokens, num_draws, law)
    expected = (probabilities * (np.array(means) / (num_draws * law * sizes))).sum()
    (truth,) = score_answers(model, [request], LikelihoodSettings())
    assert expected == pytest.approx(truth.log_likelihood, rel=1e-6)
    # and the code draws those sizes with those weights
    seen = np.zeros((num_draws, num_tokens))
    for seed in range(3000):
        (plan,) = plan_draws([request], MaskSettings(num_draws, size_law=size_law), seed, "strata")
        found = plan.masks.sum(axis=1)
        np.testing.assert_allclose(plan.weights, 1 / (num_draws * law[found - 1] * found))
        seen[np.arange(num_draws), found - 1] += 1
    error = np.sqrt(probabilities * (1 - probabilities) / 3000)
    assert (np.abs(seen / 3000 - probabilities) <= 4.5 * error + 1e-12).all()


def test_complementary_pairs_are_unbiased_summed_over_all_pairs(model):
    request = REQUESTS[0]
    num_tokens = len(request.answer)
    table = token_terms(model, request).sum(axis=1)
    whole = 2**num_tokens - 1
    expected = 0.0
    for code in range(whole + 1):
        size = bin(code).count("1")
        chance = 1 / (num_tokens + 1) / math.comb(num_tokens, size)
        for side in (code, whole ^ code):
            sides = bin(side).count("1")
            expected += chance * (num_tokens + 1) / (2 * sides) * table[side] if sides else 0.0
    (truth,) = score_answers(model, [request], LikelihoodSettings())
    assert expected == pytest.approx(truth.log_likelihood, rel=1e-6)
    draws = draws_of([request], 4, estimator="complementary")
    assert all(batch.input_ids.shape == (1, 7) for batch in draws.batches)


@pytest.mark.parametrize(
    "options",
    [{}, {"estimator": "iid"}, {"size_law": "inv_sqrt"}, {"estimator": "complementary"}],
    ids=["stratified", "iid", "inv_sqrt", "pairs"],
)
def test_the_drawn_estimate_meets_the_bound(model, options):
    request, repeats, num_draws = REQUESTS[1], 500, 4
    plans = plan_draws([request] * repeats, MaskSettings(num_draws), 0, "z")  # same key, same masks
    assert all((plan.masks == plans[0].masks).all() for plan in plans)
    requests = [request._replace(key=str(i)) for i in range(repeats)]
    draws = make_draws(
        requests,
        plan_draws(requests, MaskSettings(num_draws, **options), 0, "z"),
        num_draws,
        mask_id=MASK,
        pad_id=PAD,
    )
    values = draw_values(model, [draws]).sum(0).numpy()
    (truth,) = score_answers(model, [request], LikelihoodSettings())
    z = (values.mean() - truth.log_likelihood) / (values.std(ddof=1) / math.sqrt(repeats))
    assert abs(z) < 4


EXACT_REQUESTS = [Request((1,), (2, 3, 0), "a"), Request((2, 2), (1, 0, 3, 3), "b"), Request((), (3, 1), "c")]


def exact_draws(num_draws=3):
    plans = plan_draws(EXACT_REQUESTS, MaskSettings(num_draws, estimator="iid"), 0, "exact")
    return make_draws(EXACT_REQUESTS, plans, num_draws, mask_id=exact_llada.MASK, pad_id=0)


def nonlinear(values):
    return -torch.nn.functional.logsigmoid(0.3 * (values[0] - values[1])) + 0.01 * values[2].square()


def two_pass_gradient(model, draws):
    leaf = draw_values(model, [draws]).sum(0).requires_grad_()
    coefficients = differentiate(nonlinear(leaf), leaf)
    model.zero_grad()
    total = 0.0
    for part in gradient_parts(model, [draws], coefficients):
        value = part()
        value.backward()
        total += float(value.detach())
    assert total == pytest.approx(float(coefficients @ leaf.detach()), rel=1e-12)
    return [parameter.grad for parameter in model.parameters()]


def test_two_passes_give_the_gradient_of_one():
    model, draws = exact_llada.ExactModel(), exact_draws()
    values = with_graph(model, draws)
    torch.testing.assert_close(draw_values(model, [draws]).sum(0), values.detach(), rtol=1e-14, atol=1e-14)
    one_pass = torch.autograd.grad(nonlinear(values), list(model.parameters()))
    for found, expected in zip(two_pass_gradient(model, draws), one_pass, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_the_gradient_is_that_of_central_differences():
    model, draws = exact_llada.ExactModel(), exact_draws()
    gradient = two_pass_gradient(model, draws)
    random = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=random, dtype=torch.float64) for p in model.parameters()]

    def loss_at(step):
        with torch.no_grad():
            for parameter, d in zip(model.parameters(), direction, strict=True):
                parameter.add_(d, alpha=step)
            loss = float(nonlinear(draw_values(model, [draws]).sum(0)))
            for parameter, d in zip(model.parameters(), direction, strict=True):
                parameter.sub_(d, alpha=step)
        return loss

    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    assert slope == pytest.approx((loss_at(1e-5) - loss_at(-1e-5)) / 2e-5, rel=1e-6)


def test_the_model_of_float32_gives_that_gradient_too(model):
    # LLaDA's own forward, whose norms and cross-entropy are float32 whatever the weights are
    draws = draws_of(REQUESTS, 4)
    leaf = draw_values(model, [draws]).sum(0).requires_grad_()
    coefficients = differentiate(nonlinear(0.1 * leaf), leaf)
    expected = 0.0
    for batch, weights in zip(draws.batches, draws.weights, strict=True):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, rows=batch.rows).logits
        log_p = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        expected = expected + ((weights * coefficients)[batch.rows // batch.input_ids.shape[1]] * log_p).sum()
    one_pass = torch.autograd.grad(expected, list(model.parameters()))
    model.zero_grad()
    for part in gradient_parts(model, [draws], coefficients):
        part().backward()
    for parameter, gradient in zip(model.parameters(), one_pass, strict=True):
        error = (parameter.grad - gradient).norm() / gradient.norm()
        assert error < 1e-5
    model.zero_grad()


@pytest.mark.parametrize("num_draws", [1, 2, 8])
def test_equal_weights_cancel_to_the_last_bit(num_draws):
    policy, reference = make_model(), make_model()
    draws = draws_of(REQUESTS, num_draws)
    difference = draw_values(policy, [draws]).sum(0) - draw_values(reference, [draws]).sum(0)
    assert (difference == 0.0).all()
    other = draws_of(REQUESTS, num_draws, seed=4)
    resampled = draw_values(policy, [draws]).sum(0) - draw_values(reference, [other]).sum(0)
    assert (resampled != 0.0).all()  # or the masks would not depend on the key


def test_values_do_not_depend_on_the_chunks(model):
    whole = draw_values(model, [draws_of(REQUESTS, 4)])
    split = draw_values(model, [draws_of([request], 4) for request in REQUESTS])
    torch.testing.assert_close(whole, split, rtol=1e-6, atol=1e-6)


def test_only_the_answer_is_masked_and_short_answers_get_empty_draws():
    requests = [Request((1, 2), (3,), "one token"), Request((4,), (5, 6, 7), "three")]
    draws = draws_of(requests, 8)
    assert [int(batch.rows.numel() > 0) for batch in draws.batches] == [1] * 7 + [0]  # 2^3 - 1 masks
    assert draws.weights[1:, 0].eq(0).all() and float(draws.weights[0, 0]) == 1.0
    for batch in draws.batches:
        prompt = batch.input_ids[0, :2].tolist() + batch.input_ids[1, :1].tolist()
        assert prompt == [1, 2, 4]
        assert batch.input_ids[0, 3] == PAD and batch.attention_mask[0].tolist() == [1, 1, 1, 0]


def test_filled_rows_are_attended_and_never_masked():
    draws = make_draws(
        REQUESTS[:1],
        plan_draws(REQUESTS[:1], MaskSettings(2), 0, "t"),
        2,
        mask_id=MASK,
        pad_id=PAD,
        fill=(25, 10),
    )
    for batch in draws.batches:
        assert batch.attention_mask is None and batch.input_ids[0, 7:].tolist() == [25] * 3


def test_hashes_tell_masks_apart():
    masks = np.array(list(itertools.product([False, True], repeat=10)))
    assert len({mask_hash(mask) for mask in masks}) == 1024
    assert mask_hash([True, False]) != mask_hash([True, False] + [False] * 8)


def test_a_loss_in_parts_is_one_step(tmp_path):
    from llada.diffusion.losses import masked_diffusion_loss
    from llada.training.loop import fit
    from llada.training.metrics import read_metrics
    from test_training import CPU, NoTokenizer, make_config, make_stream, tiny_model

    def whole(model, batch, count):
        return masked_diffusion_loss(model, batch, count)

    def halves(model, batch, count):
        with torch.no_grad():
            value = whole(model, batch, count)
        half = lambda: 0.5 * whole(model, batch, count)  # noqa: E731
        return LossParts(value, [half, half], {"records": (len(batch.record_ids), 1.0), "none": (0.0, 0.0)})

    curves = []
    for name, loss in (("whole", whole), ("halves", halves)):
        config = make_config(tmp_path / name)
        fit(tiny_model(), NoTokenizer(), config, CPU, stream=make_stream(config), loss=loss, validate=None,
            data="")  # fmt: skip
        curves.append([entry for entry in read_metrics(tmp_path / name / "metrics.jsonl")])
    for one, two in zip(*curves, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert two["records"] == 4.0 and "none" not in two
