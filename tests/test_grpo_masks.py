"""The laws of GRPO's masks, which test_recipes.py takes as they are, and small formulas."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llada.diffusion.bound_estimator import plan_masks
from llada.diffusion.masking import generator
from llada.diffusion.sampler_likelihood import check_settings, merge_steps, replay
from llada.diffusion.settings import MaskSettings
from llada.policies.completions import Completion
from llada.policies.grpo import kl_terms, softmax_advantages
from llada.policies.grpo_config import GrpoConfig
from llada.policies.rollouts import RolloutStream
from llada.policies.term_builder import Answer, TermBuilder
from llada.rewards.scoring import compute_rewards, load_rewards
from modelling_final import LLaDAGenerationConfig
from test_policy_gradient import IDS, MASK, PROMPT

CANVAS, WIDTH = 12, 4


def builder_of(**flags):
    settings = LLaDAGenerationConfig(
        gen_length=CANVAS, block_length=WIDTH, method="semi_autoregressive_padding", temperature=1.0
    )
    config = GrpoConfig(model_name_or_path="x", output_dir="x", **{"micro_batch_size": 4, "seed": 1} | flags)
    return TermBuilder(config, settings, IDS)


def masks_of(size, count=400, **flags):
    builder = builder_of(mask_plan="block", num_masks=2, **flags)
    return [builder._masks(Answer(PROMPT * 10, [1] * size, f"{n}/0")) for n in range(count)]


def test_block_masks_are_those_of_spg():
    size, rate = 10, 0.15  # two whole blocks, and one of two tokens
    found = masks_of(size, p_mask_prompt=rate)
    earlier, inside, blocks = [], {0: [], 1: [], 2: []}, []
    for masks in found:
        for mask, weight in zip(masks.is_masked, masks.weights, strict=True):
            # the block is the last one with a token in the clear, or partly masked by its size law
            clear = np.flatnonzero(~mask)
            block = int(clear.max()) // WIDTH if len(clear) else 0
            assert mask[(block + 1) * WIDTH :].all()
            blocks.append(block)
            earlier += mask[: block * WIDTH].tolist()
            inside[block].append(int(mask[block * WIDTH : (block + 1) * WIDTH].sum()))
            assert weight == pytest.approx(size / (2 * mask.sum()))
    assert abs(np.mean(earlier) - rate) < 4 * math.sqrt(rate * (1 - rate) / len(earlier)) + 0.05
    hidden = np.concatenate([masks.is_hidden.ravel() for masks in found])
    assert abs(hidden.mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / len(hidden))
    # where the last token of the answer stays clear, the size inside its block is uniform on 1 .. size - 1
    last = [n for n in inside[1] if n < WIDTH]
    counts = np.bincount(last, minlength=WIDTH)[1:]
    assert counts.min() > 0.6 * counts.mean()


def test_blocks_are_drawn_without_repetition_among_those_of_the_answer():
    builder = builder_of(mask_plan="block", num_masks=3, p_mask_prompt=0.0)
    for n in range(50):
        masks = builder._masks(Answer(PROMPT, [1] * CANVAS, f"{n}/0"))
        # nothing is masked before the block, everything behind it: each block is met once
        starts = sorted(int(np.flatnonzero(mask)[0]) // WIDTH for mask in masks.is_masked)
        assert starts == [0, 1, 2]


def test_gauss_masks_are_at_the_published_nodes():
    random = generator(0, "gauss")
    published = {
        2: ([-math.sqrt(1 / 3), math.sqrt(1 / 3)], [1, 1]),
        3: ([-math.sqrt(3 / 5), 0, math.sqrt(3 / 5)], [5 / 9, 8 / 9, 5 / 9]),
    }
    for nodes, (points, weights) in published.items():
        plan = plan_masks(100, random, MaskSettings(nodes, "gauss"))
        times = [0.5 + 0.5 * point for point in points]
        assert plan.masks.sum(axis=1).tolist() == [int(100 * time) for time in times]
        expected = [w / 2 / time for w, time in zip(weights, times, strict=True)]
        assert plan.weights.tolist() == pytest.approx(expected)
    few = plan_masks(4, random, MaskSettings(3, "gauss"))
    assert few.masks.sum(axis=1).tolist() == [0, 2, 3]  # int(0.11 x 4) masks nothing


def test_many_gauss_nodes_have_the_bias_of_their_rounded_sizes():
    # int(t T) tokens at t with weight 1 / t: size l is met for t in l/T .. (l+1)/T, which is log(1 + 1/l) in
    # all, where the bound has 1 / l, and size T never
    size = 5
    plan = plan_masks(size, generator(0), MaskSettings(4000, "gauss"))
    found = np.bincount(plan.masks.sum(axis=1), plan.weights, minlength=size + 1)
    expected = [math.log1p(1 / length) for length in range(1, size)]
    assert found[1:size].tolist() == pytest.approx(expected, abs=2e-3) and found[size] == 0


def test_ratio_masks_grow_from_one_start_to_everything():
    builder = builder_of(mask_plan="ratio", num_masks=1, num_iterations=4, redraw_masks=True)
    rates = np.zeros((300, 4))
    for n, iteration in itertools.product(range(300), range(4)):
        answer = Answer(PROMPT, [1] * CANVAS, f"{n}/0@{iteration}", iteration=iteration)
        rates[n, iteration] = builder._masks(answer).is_masked.mean()
    assert (rates[:, 3] == 1.0).all()
    # E[t0 + (1 - t0) i / 3] with t0 uniform
    assert rates.mean(axis=0) == pytest.approx([1 / 2, 2 / 3, 5 / 6, 1.0], abs=0.07)


def test_coupled_masks_are_complements_and_their_weights_those_of_the_ratio():
    builder = builder_of(likelihood="coupled")
    for n in range(50):
        masks = builder._masks(Answer(PROMPT, [1] * CANVAS, f"{n}/0"))
        full, half, rest = masks.is_masked
        assert full.all() and (half != rest).all() and not masks.is_hidden.any()
        one, two = 1 / (2 * masks.weights[1]), 1 / (2 * masks.weights[2])
        assert one + two == pytest.approx(1.0) and 0.2 <= one <= 0.8 and masks.weights[0] == 0.5


def chunks_of(**flags):
    answers = [Answer(PROMPT, [1, 2, 0], "0/0@0", canvas=[1, 2, 0, 1, *[2] * 8])]
    return builder_of(**flags)(answers).chunks[0]


def test_what_follows_the_end_of_an_answer():
    ended = [*PROMPT, MASK, MASK, MASK]
    everything = {"likelihood": "diffu", "p_mask_prompt": 0.0}
    one = chunks_of(**everything, eos="one")
    assert one.input_ids.tolist() == [ended] and one.targets.tolist() == [1, 2, 0]
    tail = chunks_of(**everything, eos="tail")
    assert tail.input_ids.tolist() == [[*PROMPT, *[MASK] * CANVAS]] and tail.targets.tolist() == [1, 2, 0]
    filled = chunks_of(**everything, eos="filled")
    assert filled.targets.tolist() == [1, 2, 0, *[IDS.eos] * 9]
    canvas = chunks_of(**everything, eos="canvas")
    assert canvas.targets.tolist() == [1, 2, 0, 1, *[2] * 8]
    assert filled.input_ids.tolist() == canvas.input_ids.tolist() == tail.input_ids.tolist()


@pytest.mark.parametrize("likelihood", ["elbo", "diffu", "coupled"])
@pytest.mark.parametrize("level", ["auto", "mask", "token"])
def test_counts_are_those_of_the_terms(likelihood, level):
    if likelihood != "elbo" and level == "mask":
        return
    answers = [Answer(PROMPT, [1] * size, f"{n}/0") for n, size in enumerate((3, 1, 7))]
    for plan in ("stratified", "iid", "complementary", "gauss", "reference", "ratio", "block"):
        uniform = {"size_law": "uniform"} if plan not in ("stratified", "iid") else {}
        builder = builder_of(likelihood=likelihood, ratio_level=level, mask_plan=plan, num_masks=2, **uniform)
        terms = builder(answers)
        counts, shares = builder.counts(answers)
        owned = torch.bincount(terms.owners, minlength=3)
        assert counts.tolist() == owned.tolist(), plan
        added = torch.zeros(3, dtype=torch.float64).index_add(0, terms.owners, terms.shares)
        torch.testing.assert_close(added, shares)
        assert len({len(chunk.input_ids) for chunk in terms.chunks}) == 1  # as many forwards for each


def test_masks_shared_by_a_group_or_not_and_drawn_again_or_not():
    prompt = SimpleNamespace(index=7, token_ids=list(PROMPT))
    completions = [
        Completion(prompt=7, candidate=n, answer=[1] * 6, text="", has_ended=True, steps=1, trace=None)
        for n in range(2)
    ]

    def keys(**flags):
        config = GrpoConfig(model_name_or_path="x", output_dir="x", micro_batch_size=2, batch_size=2,
                            num_generations=2, num_iterations=2, **flags)  # fmt: skip
        stream = RolloutStream(None, [prompt], None, config, SimpleNamespace(rank=0, is_main=True))
        return [[answer.key for answer in stream._answers(completions, 3, i)] for i in range(2)]

    assert keys() == [["3/7", "3/7"]] * 2
    assert keys(group_masks=False) == [["3/7/0", "3/7/1"]] * 2
    assert keys(redraw_masks=True) == [["3/7@0", "3/7@0"], ["3/7@1", "3/7@1"]]
    masks = [builder_of()._masks(Answer(PROMPT, [1] * CANVAS, key)).is_masked for key in ("3/7@0", "3/7@1")]
    assert (masks[0] != masks[1]).any()


def trace_of(*steps):
    return [{"block": 0, "positions": list(p), "token_ids": list(t)} for p, t in steps]


def test_merged_steps_are_scored_from_the_first_ones_state():
    settings = LLaDAGenerationConfig(gen_length=4, method="fixed_length", temperature=1.0)
    trace = trace_of(((3,), (2,)), ((0,), (1,)), ((2,), (0,)), ((1,), (1,)))
    states = replay(PROMPT, trace, settings, mask_id=MASK)
    assert merge_steps(states, 1) == states
    first, second = merge_steps(states, 3)
    assert first.token_ids.tolist() == [*PROMPT, *[MASK] * 4]
    assert first.positions.tolist() == [2, 4, 5] and first.tokens.tolist() == [1, 0, 2]
    assert second.token_ids.tolist() == [*PROMPT, 1, MASK, 0, 2] and second.tokens.tolist() == [1]


def test_tokens_of_threshold_decoding_are_scored_and_its_order_is_not():
    settings = LLaDAGenerationConfig(parallel_decoding="threshold", threshold=0.9, temperature=1.0)
    check_settings(settings, order=False)
    with pytest.raises(ValueError, match="parallel_decoding 'threshold' has no exact step likelihood"):
        check_settings(settings)


def test_softmax_advantages_are_those_of_wd1():
    rewards = np.array([1.0, 0.0, 2.0, 0.5, math.nan, 1.0])
    found = softmax_advantages(rewards, 3)
    centred = torch.tensor(rewards[:3] - rewards[:3].mean())
    expected = 3 * (torch.softmax(centred, 0) - torch.softmax(-centred, 0))
    assert found[:3].tolist() == pytest.approx(expected.tolist())
    assert found[4] == 0.0 and found[3] == -found[5]


def test_kl_estimators_are_unbiased_and_their_gradients_are_not_all():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=random, dtype=torch.float64).requires_grad_()
    ref = torch.randn(6, generator=random, dtype=torch.float64).log_softmax(0)
    log_pi = logits.log_softmax(0)
    pi = log_pi.detach().exp()
    kl = (log_pi.exp() * (log_pi - ref)).sum()
    backward = (ref.exp() * (ref - log_pi)).sum()
    wanted = {"k1": torch.zeros(6, dtype=torch.float64)}
    (wanted["k2"],) = torch.autograd.grad(kl, logits, retain_graph=True)
    (wanted["k3"],) = torch.autograd.grad(backward, logits, retain_graph=True)
    for name, gradient in wanted.items():
        value = (pi * kl_terms(log_pi - ref, name)).sum()
        if name != "k2":
            assert float(value.detach()) == pytest.approx(float(kl.detach()))
        (found,) = torch.autograd.grad(value, logits, retain_graph=True)
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


def test_groups_are_chosen_by_their_accuracy():
    config = GrpoConfig(model_name_or_path="x", output_dir="x", batch_size=6, num_generations=2,
                        group_accuracy=[0.2, 0.8])  # fmt: skip
    sampler = SimpleNamespace(rewards=[SimpleNamespace(name="solved")])
    stream = RolloutStream(sampler, [], None, config, SimpleNamespace(rank=0, is_main=True))
    completions = [
        Completion(prompt=n // 2, candidate=n % 2, answer=[1], text="", has_ended=True, steps=1, trace=None,
                   reward=reward, rewards={"solved": solved})
        for n, (reward, solved) in enumerate([(1, 1), (2, 1), (1, 0), (3, 1), (2, None), (1, None)])
    ]  # fmt: skip
    stream._give_advantages(completions)
    assert [c.advantage for c in completions] == [0, 0, -2.0, 2.0, 0, 0]


def test_each_reward_is_normalised_before_they_are_added():
    config = GrpoConfig(model_name_or_path="x", output_dir="x", batch_size=8, num_generations=4,
                        multi_objective_aggregation="normalize_then_sum",
                        group_accuracy=[0.001, 1.0])  # fmt: skip
    names = ("solved", "speed")
    rewards = [
        SimpleNamespace(name=name, weight=weight) for name, weight in zip(names, (1.0, 0.5), strict=True)
    ]
    stream = RolloutStream(SimpleNamespace(rewards=rewards), [], None, config, SimpleNamespace(rank=0))
    table = np.array(
        [[1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0], [2, 3, 5, 5, 4, 4, 4, 4, 1, 2, 3, 4]], dtype=float
    )
    completions = [
        Completion(prompt=n // 4, candidate=n % 4, answer=[1], text="", has_ended=True, steps=1, trace=None,
                   reward=solved + speed, rewards={"solved": solved, "speed": speed})
        for n, (solved, speed) in enumerate(table.T)
    ]  # fmt: skip
    stream._give_advantages(completions)
    # the third group is all wrong: it counts in neither mean
    groups = table[:, :8].reshape(2, 2, 4)
    scores = (groups - groups.mean(axis=2, keepdims=True)) / (
        groups.std(axis=2, ddof=1, keepdims=True) + 1e-4
    )
    summed = (scores[0] + 0.5 * scores[1]).reshape(-1)
    expected = (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4)
    assert [c.advantage for c in completions] == pytest.approx([*expected, 0, 0, 0, 0])
    assert summed[4] == summed[6] == summed[7] < 0  # equally fast: solving alone decides


def test_speed_is_tokens_per_forward():
    columns = {"completion_ids": [[1] * 12, [1] * 3], "num_forwards": [4, 3]}
    totals, _ = compute_rewards(load_rewards(["speed"]), ["p"] * 2, ["a"] * 2, [{}, {}], **columns)
    assert totals.tolist() == [3.0, 1.0]
