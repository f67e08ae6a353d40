"""The bound by blocks with gradients, in DPO, ELBO-KTO and GRPO: against the sum over every block's masks."""

import math

import numpy as np
import pytest
import torch

from llada.diffusion.bound_estimator import block_lengths, draw_of, plan_answer
from llada.diffusion.bound_gradient import differentiate, draw_values, gradient_parts, make_draws, plan_draws
from llada.diffusion.likelihood import Request, score_answers
from llada.diffusion.masking import generator
from llada.diffusion.settings import LikelihoodSettings, MaskSettings
from llada.models.tokens import SpecialIds
from llada.policies.grpo_config import GrpoConfig
from llada.policies.kto_reference import base_seed, draw_masks, find_masks, mask_checks, plan_of
from llada.policies.term_builder import Answer, TermBuilder
from modelling_final import LLaDAGenerationConfig
from tiny_llada import V, make_model

MASK, SIZE = V - 1, 2
REQUESTS = [
    Request((1, 2, 3), (4, 5, 6, 7, 8), "begins within a block"),
    Request((8, 9), (9, 10, 11), "ends within one"),
    Request((7,), (20,), "one token"),
]
ESTIMATORS = [
    {},
    {"size_law": "inv_sqrt"},
    {"estimator": "iid"},
    {"estimator": "iid", "size_law": "inv_sqrt"},
    {"estimator": "complementary"},
]


@pytest.fixture(scope="module")
def model():
    model = make_model(attention_pattern="block_causal", attention_block_size=SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model


def draws_of(requests, num_draws, *, seed=3, block_size=SIZE, **options):
    plans = plan_draws(requests, MaskSettings(num_draws, **options), seed, "test", block_size=block_size)
    return make_draws(requests, plans, num_draws, mask_id=MASK, pad_id=0, block_size=block_size)


def exact(model, requests):
    """[N] the sum over all masks of each block, by forwards that hold no second stream."""
    scores = score_answers(model, requests, LikelihoodSettings())
    assert all(score.standard_error == 0 for score in scores)
    return torch.tensor([score.log_likelihood for score in scores], dtype=torch.float64)


def test_blocks_count_from_the_first_token_of_all():
    assert block_lengths(3, 5, 2) == [1, 2, 2] and block_lengths(2, 3, 2) == [2, 1]
    assert block_lengths(1, 1, 4) == [1] and block_lengths(4, 4, 4) == [4] and block_lengths(0, 3, 8) == [3]
    assert block_lengths(3, 5, None) == [5] and block_lengths(5, 3, 1) == [1, 1, 1]


@pytest.mark.parametrize("num_draws", [3, 6, 7])  # of two tokens there are three masks
def test_all_masks_give_the_exact_bound_in_one_stream_or_two(model, num_draws):
    values = draw_values(model, [draws_of(REQUESTS, num_draws)])
    torch.testing.assert_close(values.sum(0), exact(model, REQUESTS), atol=1e-4, rtol=0)
    # a block of one token has one mask, which every draw shows
    assert float(values[:, 2].std()) < 1e-6


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
def test_every_estimator_means_that_bound(model, options):
    request, repeats = REQUESTS[0], 400
    requests = [request._replace(key=str(i)) for i in range(repeats)]
    values = draw_values(model, [draws_of(requests, 2, **options)]).sum(0).numpy()
    error = values.std(ddof=1) / math.sqrt(repeats)
    assert abs(values.mean() - float(exact(model, [request]))) < 4 * error + 1e-6


def test_pairs_of_all_blocks_stay_together():
    plan = plan_answer(1, 8, generator(0), MaskSettings(6, "complementary"), block_size=3)
    masks = plan.masks.reshape(3, 2, 8)
    assert (masks[:, 0] ^ masks[:, 1]).all() and draw_of(plan).tolist() == [0, 0, 1, 1, 2, 2]
    assert len({tuple(mask) for mask in plan.masks[:, :2].T}) > 1  # and blocks have masks of their own


def test_one_block_of_full_length_is_the_ordinary_bound():
    whole, full = 16, make_model()
    model = make_model(attention_pattern="block_causal", attention_block_size=whole)
    draws = [draws_of(REQUESTS, 3, estimator="iid", block_size=size) for size in (None, whole)]
    values = [draw_values(*pair) for pair in ((full, draws[:1]), (model, draws[1:]))]
    torch.testing.assert_close(values[1], values[0], atol=1e-5, rtol=1e-6)
    for each, drawn in ((full, draws[0]), (model, draws[1])):
        for part in gradient_parts(each, [drawn], torch.tensor([1.0, -2.0, 0.5])):
            part().backward()
    for one, other in zip(full.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-4, rtol=1e-4)


def test_no_leak(model):
    # what a block's tokens are scored with must not depend on them, nor on what comes after
    request = REQUESTS[0]
    other = request._replace(answer=(*request.answer[:3], 30, 31))
    plans = plan_draws([request], MaskSettings(4, "iid"), 0, "leak", block_size=SIZE)
    nll = [
        [
            model(**batch.inputs).nll
            for batch in make_draws([one], plans, 4, mask_id=MASK, pad_id=0, block_size=SIZE).batches
        ]
        for one in (request, other)
    ]
    for mask, one, two in zip(plans[0].masks, *nll, strict=True):
        before = int(mask[:3].sum())
        assert torch.equal(one[:before], two[:before])
    own = request._replace(answer=(30, *request.answer[1:]))  # the first block, all of it masked
    batches = [draws_of([one], 1, estimator="iid").batches[0] for one in (request, own)]
    with torch.no_grad():
        logits = [
            model(**{k: v for k, v in batch.inputs.items() if k != "targets"}).logits for batch in batches
        ]
    assert torch.equal(logits[0][0], logits[1][0]) and not torch.equal(logits[0][1:], logits[1][1:])


def nonlinear(values):
    return -torch.nn.functional.logsigmoid(0.3 * (values[0] - values[1])) + 0.01 * values[2].square()


@pytest.mark.parametrize("options", [{}, {"estimator": "complementary"}], ids=str)
def test_two_passes_give_the_gradient_of_one(model, options):
    draws = draws_of(REQUESTS, 2, **options)
    total = torch.zeros(3, dtype=torch.float64)
    for batch in draws.batches:
        inputs = {name: value for name, value in batch.inputs.items() if name != "targets"}
        log_p = model(**inputs).logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        owners = batch.rows // batch.input_ids.shape[1]
        total = total.index_add(0, owners, log_p.double() * batch.weights)
    one_pass = torch.autograd.grad(nonlinear(0.1 * total), list(model.parameters()))
    leaf = draw_values(model, [draws]).sum(0).requires_grad_()
    torch.testing.assert_close(leaf.detach(), total.detach(), atol=1e-4, rtol=1e-6)
    model.zero_grad()
    for part in gradient_parts(model, [draws], differentiate(nonlinear(0.1 * leaf), leaf)):
        part().backward()
    for parameter, gradient in zip(model.parameters(), one_pass, strict=True):
        assert (parameter.grad - gradient).norm() < 1e-4 * gradient.norm() + 1e-9
    model.zero_grad()


def test_equal_weights_cancel_to_the_last_bit(model):
    draws = draws_of(REQUESTS, 3, estimator="iid")
    assert torch.equal(
        draw_values(model, [draws]), draw_values(model, [draws_of(REQUESTS, 3, estimator="iid")])
    )
    assert not torch.equal(draw_values(model, [draws]), draw_values(model, [draws_of(REQUESTS, 3, seed=4)]))


def terms_of(requests, **changes):
    options = {"objective": "block_diffusion", "block_size": SIZE, "num_masks": 3, "size_law": "uniform",
               "seed": 0, "micro_batch_size": 2, "model_name_or_path": "x", "output_dir": "x"}  # fmt: skip
    settings = LLaDAGenerationConfig(gen_length=6, block_length=SIZE, method="semi_autoregressive_padding")
    ids = SpecialIds(mask=MASK, eos=3, pad=0, eot=None)
    builder = TermBuilder(GrpoConfig(**options | changes), settings, ids)
    return builder([Answer(request.context, request.answer, request.key) for request in requests])


@pytest.mark.parametrize("level", ["completion", "mask"])
@pytest.mark.parametrize("eos", ["one", "filled"])
def test_the_terms_of_grpo_are_that_bound(model, level, eos):
    terms = terms_of(REQUESTS, ratio_level=level, eos=eos)
    values = terms.values(model)
    found = torch.zeros(3, dtype=torch.float64).index_add(0, terms.owners, values)
    found /= torch.bincount(terms.owners)  # a mask alone estimates the whole
    if eos == "filled":
        filled = [r._replace(answer=(*r.answer, *[3] * (6 - len(r.answer)))) for r in REQUESTS]
        torch.testing.assert_close(found, exact(model, filled), atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(found, exact(model, REQUESTS), atol=1e-4, rtol=0)


def test_the_gradient_of_grpo_is_that_of_the_bound(model):
    terms = terms_of(REQUESTS, mask_plan="iid", micro_batch_size=1)
    slopes = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    _, parts = terms.parts(model, lambda new, _: (slopes * new).sum(), on_policy=False)
    model.zero_grad()
    for part in parts:
        part().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    plans = [
        plan_answer(len(r.context), len(r.answer), generator(0, "grpo", r.key), MaskSettings(3, "iid"),
                    block_size=SIZE)
        for r in REQUESTS
    ]  # fmt: skip
    draws = make_draws(REQUESTS, plans, 3, mask_id=MASK, pad_id=0, block_size=SIZE)
    for part in gradient_parts(model, [draws], slopes):
        part().backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-4, rtol=1e-3)
    model.zero_grad()


def test_ratios_that_grow_show_blocks_too(model):
    terms = terms_of(REQUESTS[:1], mask_plan="ratio", num_iterations=1)
    assert torch.isfinite(terms.values(model)).all()
    shown = [batch.clean_columns is not None for batch in terms.chunks]
    assert all(shown)


def test_reference_values_of_kto_mean_that_bound(model):
    request, repeats = REQUESTS[0], 400
    lengths = block_lengths(len(request.context), len(request.answer), SIZE)
    masks = [draw_masks(base_seed(i), lengths, 2) for i in range(repeats)]
    assert (masks[0][:, :1] == draw_masks(base_seed(0), lengths[:1], 2)).all()
    draws = make_draws(
        [request] * repeats, [plan_of(own, lengths) for own in masks], 2, mask_id=MASK, pad_id=0,
        block_size=SIZE,
    )  # fmt: skip
    values = draw_values(model, [draws]).mean(0).numpy()
    error = values.std(ddof=1) / math.sqrt(repeats)
    assert abs(values.mean() - float(exact(model, [request]))) < 4 * error
    record = {
        "seed": str(base_seed(7)),
        "l_values": masks[7].sum(axis=1).tolist(),
        "prompt_length": 3,
        **mask_checks(masks[7], 3),
    }
    assert (find_masks(record, lengths, 2, "f:1", verify=True) == masks[7]).all()
    with pytest.raises(ValueError, match="f:1: "):
        find_masks(record, [5], 2, "f:1", verify=True)


def test_one_block_has_the_published_masks_and_weights():
    one = plan_of(draw_masks(base_seed(2), [20], 4), [20])
    assert one.weights.shape == (4,) and one.weights.tolist() == (20 / one.masks.sum(axis=1)).tolist()
    two = plan_of(draw_masks(base_seed(2), [20, 3], 4), [20, 3])
    assert (two.masks[:, :20] == one.masks).all()
    np.testing.assert_allclose(two.weights[:, :20], np.repeat(one.weights[:, None], 20, axis=1))
    np.testing.assert_allclose(two.weights[:, 20], 3 / two.masks[:, 20:].sum(axis=1))
