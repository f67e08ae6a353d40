"""Mask plans and what is read from them, against exact sums and against models whose likelihood is known."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from conftest import load_script
from llada.diffusion.bound_estimator import (
    MaskPlan,
    _features,
    enumerate_masks,
    estimate,
    plan_masks,
)
from llada.diffusion.masking import generator
from llada.diffusion.settings import MaskSettings

bench = load_script("scripts/benchmarks/bench_coverage.py")
MarkovChain = bench.MarkovChain  # exact conditionals under any mask, whose bound is log p(answer)


def random_table(num_tokens, seed=0):
    """An arbitrary log p_i(M), for every mask M, as a function of [N, T] masks; no structure to exploit."""
    table = -generator(seed, "table").exponential(size=(2**num_tokens, num_tokens))
    powers = 1 << np.arange(num_tokens)
    return lambda masks: table[masks @ powers]


def exact_value(log_probs, num_tokens):
    plan = enumerate_masks(num_tokens)
    return float(plan.weights @ np.where(plan.masks, log_probs(plan.masks), 0).sum(axis=1))


def test_enumeration_has_every_mask_once_with_the_weights_of_the_bound():
    plan = plan_masks(4, generator(0), MaskSettings(1))
    assert plan.design == "exact"
    assert len({tuple(mask) for mask in plan.masks}) == len(plan.masks) == 15
    expected = [1 / (m.sum() * math.comb(4, m.sum())) for m in plan.masks]
    assert plan.weights == pytest.approx(expected)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 9])
def test_all_forms_of_the_bound_agree_on_enumerated_masks(num_tokens):
    # subset form = average over permutations of the chain rule
    log_probs = random_table(num_tokens)
    if num_tokens > 5:
        return
    powers = 1 << np.arange(num_tokens)
    total = 0.0
    orders = list(itertools.permutations(range(num_tokens)))
    for order in orders:
        left = np.ones(num_tokens, dtype=bool)
        for i in order:
            total += log_probs(left[None])[0, i]
            left[i] = False
    assert powers.sum() == 2**num_tokens - 1
    assert exact_value(log_probs, num_tokens) == pytest.approx(total / len(orders), abs=1e-12)


def test_when_masks_are_enumerated():
    assert plan_masks(7, generator(0), MaskSettings(32)).design == "exact"
    assert plan_masks(8, generator(0), MaskSettings(255)).design == "exact"
    assert plan_masks(8, generator(0), MaskSettings(254)).design == "stratified"
    assert plan_masks(7, generator(0), MaskSettings(32, exact_tokens=0)).design == "stratified"
    assert plan_masks(7, generator(0), MaskSettings(32, estimator="iid")).design == "iid"


def test_the_same_key_gives_the_same_masks():
    first, second, other = (
        plan_masks(20, generator(3, "likelihood", key), MaskSettings(16)) for key in ("a", "a", "b")
    )
    assert (first.masks == second.masks).all()
    assert (first.masks != other.masks).any()


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "stratified"},
        {"estimator": "iid"},
        {"estimator": "iid", "size_law": "inv_sqrt"},
        {"estimator": "complementary"},
    ],
)
def test_plain_weighted_sums_are_unbiased(settings):
    num_tokens, num_plans = 6, 1500
    log_probs = random_table(num_tokens)
    exact = exact_value(log_probs, num_tokens)
    values = []
    for i in range(num_plans):
        plan = plan_masks(
            num_tokens, generator(i, str(settings)), MaskSettings(8, exact_tokens=0, **settings)
        )
        values.append(plan.weights @ np.where(plan.masks, log_probs(plan.masks), 0).sum(axis=1))
    error = np.std(values) / math.sqrt(num_plans)
    assert abs(np.mean(values) - exact) < 4 * error


def test_every_mask_of_a_size_is_equally_likely_in_a_stratified_plan():
    counts, num_plans = Counter(), 4000
    for i in range(num_plans):
        plan = plan_masks(4, generator(i), MaskSettings(4, exact_tokens=0))
        assert plan.masks.sum(axis=1).tolist() == [1, 2, 3, 4]  # N = T: one draw of each size
        counts.update(tuple(np.flatnonzero(mask)) for mask in plan.masks)
    for size in (1, 2, 3):
        found = [counts[subset] for subset in itertools.combinations(range(4), size)]
        expected = num_plans / math.comb(4, size)
        chi_square = sum((n - expected) ** 2 / expected for n in found)
        assert chi_square < 20.5  # 0.1 % point with 5 degrees of freedom


def test_a_stratified_plan_masks_the_tokens_evenly():
    plan = plan_masks(11, generator(0), MaskSettings(32))
    times = plan.masks.sum(axis=0)
    assert times.max() - times.min() <= 1


def test_reference_sizes_are_the_published_ones():
    # the published loop at b = 8 and T = 4: k + 0.5 j rounds half to even, so 2 and 4 come thrice as often
    sizes = Counter()
    for i in range(2000):
        plan = plan_masks(4, generator(i), MaskSettings(8, estimator="reference", reference_batch=8))
        sizes.update(plan.masks.sum(axis=1).tolist())
        assert plan.weights == pytest.approx(4 / (plan.masks.sum(axis=1) * 8))
    share = {size: n / sizes.total() for size, n in sizes.items()}
    assert share == pytest.approx({1: 0.125, 2: 0.375, 3: 0.125, 4: 0.375}, abs=0.02)


def test_features_have_the_expectation_that_the_estimate_relies_on():
    # over all masks of each size, every feature but the constant averages to 0 within the bound's weights
    plan = enumerate_masks(7)
    draw, token, phi = _features(plan.masks)
    sizes = plan.masks.sum(axis=1)[draw]
    for i in range(7):
        for size in range(1, 8):
            here = (token == i) & (sizes == size)
            assert phi[here][:, 2:].mean(axis=0) == pytest.approx(0, abs=1e-12)
        # sizes are uniform in the bound, so the size feature averages to 0 over them
        per_size = [phi[(token == i) & (sizes == size)][0, 1] for size in range(1, 8)]
        assert np.mean(per_size) == pytest.approx(0, abs=1e-12)


def test_the_structured_solver_is_the_plain_ridge_regression():
    plan = plan_masks(9, generator(1), MaskSettings(24, exact_tokens=0))
    log_probs = random_table(9)(plan.masks)
    draw, token, phi = _features(plan.masks)
    weight = plan.weights[draw]
    relative = weight / weight.mean()
    own = (np.eye(9)[token][:, :, None] * phi[:, None, :]).reshape(len(draw), -1)
    design = np.concatenate([phi, own], axis=1)
    penalty = np.full(design.shape[1], 1.0)
    penalty[: phi.shape[1]] = 0.1
    inverse = np.linalg.inv((design * relative[:, None]).T @ design + np.diag(penalty))
    observed = log_probs[draw, token]
    fit = inverse @ ((design * relative[:, None]).T @ observed)
    residual = observed - design @ fit
    expectation = np.zeros(design.shape[1])
    expectation[0] = 9
    expectation[phi.shape[1] :: phi.shape[1]] = 1
    value, error = estimate(plan, log_probs)
    assert value == pytest.approx(expectation @ fit + weight @ residual, rel=1e-9)
    variance = 0.0
    for n in range(24):
        rows = draw == n
        hat = design[rows] @ inverse @ (design[rows] * relative[rows][:, None]).T
        left_out = np.linalg.solve(np.eye(rows.sum()) - hat, residual[rows])
        variance += max(0.0, (weight[rows] @ residual[rows]) * (weight[rows] @ left_out))
    assert error == pytest.approx(math.sqrt(variance * 24 / 19), rel=1e-9)


def test_a_fit_without_error_gives_the_exact_value():
    # log p_i = a_i + b * (l/T): inside the regression's reach up to its shrinkage
    token_effect = np.linspace(-3, -1, 12)
    plan = plan_masks(12, generator(2), MaskSettings(64, exact_tokens=0))
    log_probs = token_effect + plan.masks.sum(axis=1, keepdims=True) / 12
    exact = token_effect.sum() + 12 * (13 / 24)
    value, error = estimate(plan, log_probs)
    assert value == pytest.approx(exact, abs=0.05)
    assert error < 0.1


def test_default_at_32_masks_beats_the_published_estimator_at_128():
    chain, random = MarkovChain(), generator(0, "answers")
    ours, published, covered = [], [], []
    for k in range(200):
        tokens = chain.draw(int(random.integers(8, 31)), random)
        truth = chain.log_likelihood(tokens)
        plan = plan_masks(len(tokens) - 1, generator(k, "ours"), MaskSettings(32, exact_tokens=0))
        value, error = estimate(plan, chain.log_probs(tokens, plan.masks))
        ours.append(value - truth)
        covered.append(abs(value - truth) < 1.96 * error)
        plan = plan_masks(
            len(tokens) - 1, generator(k, "published"), MaskSettings(128, estimator="reference")
        )
        published.append(plan.weights @ chain.log_probs(tokens, plan.masks).sum(axis=1) - truth)
    ours_rms, published_rms = (math.sqrt(np.mean(np.square(e))) for e in (ours, published))
    assert ours_rms < 0.85 * published_rms
    # a printed error that is honest: 95 % within +- 2 standard deviations of a count of 200
    assert np.mean(covered) >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / 200)


def test_errors_of_the_simple_estimators():
    plan = MaskPlan(np.eye(3, dtype=bool), np.array([1.0, 1.0, 1.0]), "iid")
    value, error = estimate(plan, np.diag([-1.0, -2.0, -6.0]))
    assert (value, error) == (-9.0, pytest.approx(math.sqrt(3 * 7.0)))  # 3 draws of variance 7
    assert math.isnan(estimate(MaskPlan(plan.masks[:1], np.ones(1), "iid"), np.zeros((1, 3)))[1])
    pairs = plan_masks(9, generator(0), MaskSettings(16, estimator="complementary"))
    assert estimate(pairs, np.full((len(pairs.masks), 9), -1.0))[1] == pytest.approx(0, abs=2.0)


def test_the_printed_error_of_few_pairs_covers_the_truth():
    config = bench.Config(num_answers=300)
    for num_masks in (8, 16):
        found = bench.measure(config, MarkovChain(), "complementary", num_masks)
        # nominal 95 %; the standard error of 300 answers' share is 1.3 %
        assert 0.92 < found.covered_196 < 0.98


def test_the_coverage_table(tmp_path, capsys):
    sizes = ["--num_answers", "8", "--num_masks", "4", "--estimators", "iid", "complementary"]
    bench.main([*sizes, "--output", str(tmp_path / "coverage.json")])
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert len(json.loads((tmp_path / "coverage.json").read_text())["found"]) == 2
