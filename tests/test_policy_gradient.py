"""Policy gradients are exact: sums over all trajectories of a sampler, not samples of them.

A model of 3 tokens and answers of 3 positions in float64: every state, step and answer is enumerated.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import exact_llada
from llada.diffusion.sampler_likelihood import replay
from llada.models.tokens import SpecialIds
from llada.policies.completions import Completion
from llada.policies.grpo import GroupBatch, group_advantages, grpo_loss, term_losses, term_weights
from llada.policies.grpo_config import GrpoConfig, SurrogateFlags
from llada.policies.rollouts import _flat, _per_owner
from llada.policies.term_builder import Answer, TermBuilder
from modelling_final import LLaDAGenerationConfig

TOKENS, LENGTH = 3, 3  # what can be drawn is 0, 1, 2
MASK = exact_llada.MASK
PROMPT = (1, 2)
IDS = SpecialIds(mask=MASK, eos=0, pad=0, eot=None)


class Model(exact_llada.ExactModel):
    """Also gives logits as LLaDAModelLM does, with a column for the mask; token 3 is never predicted."""

    def __init__(self, *, is_product=False, seed=0, length=LENGTH):
        super().__init__(length=len(PROMPT) + length, seed=seed)
        if is_product:  # positions that do not look at each other: all orders of decoding are one
            with torch.no_grad():
                self.mixing.zero_()
            self.mixing.requires_grad_(False)

    def log_probs(self, input_ids, attention_mask=None):
        log_p = super().log_probs(input_ids, attention_mask)
        log_p = log_p.masked_fill(torch.arange(exact_llada.V) >= TOKENS, -math.inf)
        return log_p.log_softmax(-1)

    def forward(self, input_ids, attention_mask=None, query_positions=None, **rest):
        if query_positions is None:
            return super().forward(input_ids, attention_mask, **rest)
        log_p = self.log_probs(input_ids, attention_mask)
        log_p = torch.nn.functional.pad(log_p, (0, 1), value=-math.inf)
        wide = query_positions[..., None].expand(-1, -1, log_p.shape[-1])
        return SimpleNamespace(logits=log_p.gather(1, wide))


def settings_of(**changes):
    return LLaDAGenerationConfig(
        **{"gen_length": LENGTH, "temperature": 1.0, "method": "fixed_length"} | changes
    )


def builder_of(settings, **changes):
    options = {"likelihood": "trajectory", "num_masks": 2, "size_law": "uniform", "seed": 0,
               "micro_batch_size": 64, "model_name_or_path": "x", "output_dir": "x"}  # fmt: skip
    return TermBuilder(GrpoConfig(**options | changes), settings, IDS)


def trajectories(settings):
    """Every trace that the sampler could give: any subset of the block's masks, any tokens."""
    width, per_step = settings.block_of(LENGTH), settings.block_of(LENGTH) // settings.steps_per_block(LENGTH)

    def grow(trace, open_positions):
        if not open_positions:
            yield trace
            return
        block = min(open_positions) // width
        inside = [p for p in open_positions if p // width == block]
        for kept in itertools.combinations(inside, per_step):
            for tokens in itertools.product(range(TOKENS), repeat=per_step):
                entry = {"block": block, "positions": list(kept), "token_ids": list(tokens)}
                yield from grow([*trace, entry], [p for p in open_positions if p not in kept])

    yield from grow([], list(range(LENGTH)))


def answer_of(trace):
    answer = [0] * LENGTH
    for entry in trace:
        for position, token in zip(entry["positions"], entry["token_ids"], strict=True):
            answer[position] = token
    return answer


def number_of_orders(settings):
    """Random order: each of these is equally likely whatever the model says."""
    seen = {tuple(tuple(entry["positions"]) for entry in trace) for trace in trajectories(settings)}
    return len(seen)


SAMPLERS = {
    "low confidence": {},
    "low confidence, block of one: left to right": {
        "method": "semi_autoregressive_padding",
        "block_length": 1,
    },
    "all at once": {"steps": 1},
    "cold": {"temperature": 0.6},
    "random order": {"remasking": "random"},
}


def reward_of(answer):
    """Any reward will do."""
    return float(np.random.default_rng(answer).normal())


def trajectory_terms(settings):
    traces = list(trajectories(settings))
    answers = [Answer(PROMPT, answer_of(trace), str(i), trace) for i, trace in enumerate(traces)]
    return builder_of(settings, micro_batch_size=4096)(answers), answers


def log_likelihoods(model, terms, num_answers):
    """[N] of whole trajectories, with the graph."""
    values = torch.cat([terms._log_probs(model, chunk) for chunk in terms.chunks])
    return torch.zeros(num_answers, dtype=torch.float64).index_add(0, terms.owners, values)


def gradient_of(model, total):
    model.zero_grad()
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def production_gradient(model, terms, advantages, *, weights=None, total=1.0):
    """What `fit` would add up of the loss of GRPO."""
    batch = GroupBatch(
        terms=terms,
        advantages=advantages,
        weights=torch.ones_like(advantages) if weights is None else weights,
        old=None,
        ref=None,
        num_units=1.0,
        record_ids=[],
    )
    loss = grpo_loss(model, batch, total, flags=SurrogateFlags())
    model.zero_grad()
    for part in loss.parts:
        part().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectories_are_a_distribution_and_their_gradient_is_that_of_the_expected_reward(name):
    settings, model = settings_of(**SAMPLERS[name]), Model()
    terms, answers = trajectory_terms(settings)
    log_pi = log_likelihoods(model, terms, len(answers))
    if settings.remasking == "random":
        log_pi = log_pi - math.log(number_of_orders(settings))
    assert float(log_pi.detach().exp().sum()) == pytest.approx(1.0, abs=1e-8)  # MIN_LOG_F leaves 2e-9
    rewards = torch.tensor([reward_of(answer.answer) for answer in answers], dtype=torch.float64)
    exact = gradient_of(model, (log_pi.exp() * rewards).sum())

    probabilities = log_pi.exp().detach()
    for baseline in (0.0, 1.7):  # E[A grad log pi], and any baseline leaves it as it is
        found = production_gradient(model, terms, rewards - baseline, weights=probabilities)
        torch.testing.assert_close(-found, exact, rtol=1e-6, atol=1e-8)


def test_without_the_order_term_the_gradient_is_another_one():
    settings, model = settings_of(), Model()
    terms, answers = trajectory_terms(settings)
    probabilities = log_likelihoods(model, terms, len(answers)).exp().detach()
    rewards = torch.tensor([reward_of(answer.answer) for answer in answers], dtype=torch.float64)
    exact = production_gradient(model, terms, rewards, weights=probabilities)
    terms.order = False
    tokens_only = production_gradient(model, terms, rewards, weights=probabilities)
    cosine = torch.nn.functional.cosine_similarity(exact, tokens_only, dim=0)
    assert 0.5 < float(cosine) < 0.999


def test_the_elbo_gradient_is_exact_where_orders_agree_and_a_token_estimate_too():
    model, settings = Model(is_product=True), settings_of()
    answers = [
        Answer(PROMPT, tokens, str(i))
        for i, tokens in enumerate(itertools.product(range(TOKENS), repeat=LENGTH))
    ]
    canvas = torch.tensor([[*PROMPT, *[MASK] * LENGTH]])
    log_p = model.log_probs(canvas)[0, len(PROMPT) :]
    log_pi = torch.stack([log_p[range(LENGTH), list(answer.answer)].sum() for answer in answers])
    rewards = torch.tensor([reward_of(answer.answer) for answer in answers], dtype=torch.float64)
    exact = gradient_of(model, (log_pi.exp() * rewards).sum())
    probabilities = log_pi.exp().detach()
    for options in (
        {"likelihood": "elbo", "num_masks": 7},  # all masks
        {"likelihood": "elbo", "num_masks": 2, "mask_plan": "complementary"},
        {"likelihood": "diffu", "p_mask_prompt": 0.0},
    ):
        terms = builder_of(settings, **options)(answers)

        found = production_gradient(model, terms, rewards, weights=probabilities)
        if options.get("mask_plan"):  # one draw of each answer: right in expectation only
            assert torch.nn.functional.cosine_similarity(-found, exact, dim=0) > 0.5
        else:
            torch.testing.assert_close(-found, exact, rtol=1e-6, atol=1e-9)


def test_the_elbo_gradient_is_that_of_the_bound():
    model, settings = Model(), settings_of()
    answers = [Answer(PROMPT, (0, 1, 2), "a"), Answer(PROMPT, (2, 2), "b")]
    terms = builder_of(settings, likelihood="elbo", num_masks=7)(answers)
    advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)
    ones, lengths = torch.ones(2, dtype=torch.float64), torch.tensor([3.0, 2.0], dtype=torch.float64)
    weights, units = term_weights("sequence", ones, lengths, longest=LENGTH)
    found = production_gradient(model, terms, advantages, weights=weights, total=float(units.sum()))

    def bound(answer):
        total = torch.zeros((), dtype=torch.float64)
        size = len(answer)
        for mask in itertools.product([False, True], repeat=size):
            if any(mask):
                shown = [MASK if m else t for m, t in zip(mask, answer, strict=True)]
                log_p = model.log_probs(torch.tensor([[*PROMPT, *shown]]))[0, len(PROMPT) :]
                weight = 1 / (sum(mask) * math.comb(size, sum(mask)))
                total = total + weight * sum(log_p[i, answer[i]] for i in range(size) if mask[i])
        return total

    surrogate = -(1.0 * bound((0, 1, 2)) / 3 - 0.5 * bound((2, 2)) / 2) / 2
    torch.testing.assert_close(found, gradient_of(model, surrogate), rtol=1e-6, atol=1e-9)


def test_a_random_subset_of_steps_has_the_same_expectation():
    settings, model = settings_of(), Model()
    trace = next(itertools.islice(trajectories(settings), 40, None))
    answer = Answer(PROMPT, answer_of(trace), "x", trace)
    states = replay(PROMPT, trace, settings, mask_id=MASK)
    whole = builder_of(settings)([answer]).values(model)
    counts = np.zeros(len(states))
    for key in range(60):
        terms = builder_of(settings, trajectory_steps=2, seed=key)([answer])
        assert terms.shares.tolist() == [1.5, 1.5]
        for value in terms.values(model):
            counts[int((whole - value).abs().argmin())] += 1.5 / 60
    assert np.abs(counts - 1).max() < 5 * math.sqrt(0.5 / 60)  # each step counts once in expectation


def test_kl_identities():
    # of the KL terms that are in use only k2 has the gradient of KL(pi || ref) on policy
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=random, dtype=torch.float64).requires_grad_()
    ref = torch.randn(6, generator=random, dtype=torch.float64).log_softmax(0)
    log_pi = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_pi.exp() * (log_pi - ref)).sum(), logits, retain_graph=True)
    zeros, ones = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    k2, logged = term_losses(SurrogateFlags(beta=1.0), log_pi, log_pi.detach(), ref, zeros, ones)
    (found,) = torch.autograd.grad((log_pi.detach().exp() * k2).sum(), logits, retain_graph=True)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(logged["kl"], (log_pi - ref).detach() ** 2 / 2)
    k1 = (log_pi.detach().exp() * (log_pi - ref)).sum()
    (gradient,) = torch.autograd.grad(k1, logits)
    assert gradient.abs().max() < 1e-14


def test_leave_one_out_is_unbiased_and_the_inclusive_mean_shrinks():
    # over all groups of two draws of a three-armed bandit
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    rewards = np.array([1.0, 0.0, 0.4])
    p = logits.softmax(0)
    (exact,) = torch.autograd.grad((p * torch.from_numpy(rewards)).sum(), logits, retain_graph=True)
    for baseline, factor in (("leave_one_out", 1.0), ("group_mean", 0.5)):
        total = torch.zeros((), dtype=torch.float64)
        for group in itertools.product(range(3), repeat=2):
            advantages = group_advantages(rewards[list(group)], 2, baseline=baseline, scale="none")
            log_p = logits.log_softmax(0)[list(group)]
            probability = float(p[list(group)].prod().detach())
            total = total + probability * (torch.from_numpy(advantages) * log_p).mean()
        (found,) = torch.autograd.grad(total, logits)
        torch.testing.assert_close(found, factor * exact, rtol=1e-12, atol=1e-14)


def test_advantages():
    rewards = np.array([1.0, 0.0, 0.5, math.nan, 2.0, 2.0, 2.0, 2.0, math.nan, math.nan, 1.0, math.nan])
    found = group_advantages(rewards, 4, baseline="group_mean", scale="none")
    np.testing.assert_allclose(found, [0.5, -0.5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    found = group_advantages(rewards, 4, baseline="leave_one_out", scale="none")
    np.testing.assert_allclose(found[:4], [0.75, -0.75, 0, 0])
    found = group_advantages(rewards, 4, baseline="group_mean", scale="group")
    np.testing.assert_allclose(found[:4], np.array([0.5, -0.5, 0, 0]) / (0.5 + 1e-4))
    found = group_advantages(rewards, 4, baseline="group_mean", scale="batch", batch_std=2.0)
    np.testing.assert_allclose(found[:4], np.array([0.5, -0.5, 0, 0]) / (2 + 1e-4))


def test_the_surrogate_clips_as_ppo_does():
    ratios = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5], dtype=torch.float64)
    for sign in (1.0, -1.0):
        new = ratios.log().requires_grad_()
        advantages = torch.full_like(ratios, sign)
        losses, logged = term_losses(
            SurrogateFlags(epsilon=0.2, epsilon_high=0.3),
            new,
            torch.zeros_like(ratios),
            None,
            advantages,
            torch.ones_like(ratios),
        )
        (gradient,) = torch.autograd.grad(losses.sum(), new)
        if sign > 0:
            expected = -torch.minimum(ratios, ratios.clamp(0.8, 1.3))
            assert (gradient == 0).tolist() == [False, False, False, False, True]
            assert logged["clip_ratio/high_mean"].tolist() == [0, 0, 0, 0, 1]
        else:
            expected = torch.maximum(ratios, ratios.clamp(0.8, 1.3))
            assert (gradient == 0).tolist() == [True, False, False, False, False]
            assert logged["clip_ratio/low_mean"].tolist() == [1, 0, 0, 0, 0]
        torch.testing.assert_close(losses.detach(), expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "sequence", "token", "sum"])
def test_loss_types_against_their_definitions(loss_type):
    lengths = [3, 1, 4]
    per_token = [np.arange(1, n + 1) / (i + 1) for i, n in enumerate(lengths)]
    counts = torch.tensor(lengths, dtype=torch.float64)
    weights, units = term_weights(loss_type, counts, counts, longest=5)
    total = sum(float(w) * values.sum() for w, values in zip(weights, per_token, strict=True))
    found = total / float(units.sum())
    expected = {
        "grpo": np.mean([values.mean() for values in per_token]),
        "dapo": sum(values.sum() for values in per_token) / sum(lengths),
        "dr_grpo": sum(values.sum() for values in per_token) / (3 * 5),
        "sum": sum(values.sum() for values in per_token) / 3,
    }
    expected["sequence"] = expected["grpo"]  # the same where a term is a token
    assert found == pytest.approx(expected.get(loss_type, expected["dapo"]))
    # a completion of one term with the share of its tokens: its mean over tokens, or its tokens' weight
    one_term = [float(values.mean()) for values in per_token]
    weights, units = term_weights(loss_type, torch.ones(3, dtype=torch.float64), counts, longest=5)
    if loss_type in ("sequence", "token", "sum"):
        shared = zip(weights, lengths, one_term, strict=True)
        assert found == pytest.approx(sum(float(w) * n * v for w, n, v in shared) / float(units.sum()))


@pytest.mark.parametrize("likelihood", ["elbo", "trajectory", "diffu"])
def test_the_policy_that_sampled_has_ratio_one_and_kl_zero_exactly(likelihood):
    settings, model = settings_of(), Model()
    traces = list(itertools.islice(trajectories(settings), 0, 60, 7))
    answers = [Answer(PROMPT, answer_of(trace), str(i), trace) for i, trace in enumerate(traces)]
    terms = builder_of(settings, likelihood=likelihood, micro_batch_size=4)(answers)
    values = terms.values(model)
    advantages = torch.linspace(-1, 1, len(answers), dtype=torch.float64)
    flags = SurrogateFlags(beta=0.1)
    batch = GroupBatch(
        terms=terms, advantages=advantages, weights=torch.ones_like(advantages), old=values, ref=values,
        num_units=1.0, record_ids=[],
    )  # fmt: skip
    loss = grpo_loss(model, batch, float(terms.shares.sum()), flags=flags)
    model.zero_grad()
    for part in loss.parts:
        part().backward()
    with_values = [p.grad.clone() for p in model.parameters()]
    assert loss.sums["ratio/mean"][0] == loss.sums["ratio/mean"][1]
    assert loss.sums["kl"][0] == 0.0
    mean = float((terms.shares * advantages[terms.owners]).sum() / terms.shares.sum())
    assert float(loss.value) == pytest.approx(-mean, abs=1e-12)

    batch.old = batch.ref = None  # nothing needs to be known, and the gradient is the same
    production = grpo_loss(model, batch, float(terms.shares.sum()), flags=flags)
    model.zero_grad()
    for part in production.parts:
        part().backward()
    for parameter, gradient in zip(model.parameters(), with_values, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_steps_that_only_keep_ranks_in_step_belong_to_no_completion(monkeypatch):
    settings, model = settings_of(), Model()
    traces = list(itertools.islice(trajectories(settings), 0, 40, 7))
    traces[0] = traces[0][:1]  # ended early
    answers = [Answer(PROMPT, answer_of(trace), str(i), trace) for i, trace in enumerate(traces)]
    completions = [Completion(prompt=0, candidate=i, answer=[], text="", has_ended=True, steps=0, trace=None)
                   for i in range(len(answers))]  # fmt: skip

    def remembered_and_loss():
        terms = builder_of(settings, micro_batch_size=4)(answers)
        owned = dict(enumerate(v for _, v in _per_owner(completions, terms, terms.values(model))))
        old = _flat(list(owned.values()), terms)
        advantages = torch.linspace(-1, 1, len(answers), dtype=torch.float64)
        batch = GroupBatch(terms=terms, advantages=advantages, weights=torch.ones_like(advantages), old=old,
                           ref=None, num_units=1.0, record_ids=[])  # fmt: skip
        loss = grpo_loss(model, batch, 1.0, flags=SurrogateFlags())
        for part in loss.parts:
            part()
        return owned, float(loss.value), loss.sums["ratio/mean"], len(loss.parts)

    owned, value, ratio, num_parts = remembered_and_loss()
    monkeypatch.setattr("llada.policies.term_builder.max_over_ranks", lambda own: own + 2)
    padded = remembered_and_loss()
    assert padded[0] == owned and padded[1] == pytest.approx(value) and padded[3] == num_parts + 2
    assert ratio[0] == ratio[1] == padded[2][0]  # every ratio is 1
