"""Likelihoods: against enumeration, against each other, and never dependent on how requests are batched."""

import itertools
import math
from dataclasses import fields

import pytest
import torch

from llada.diffusion.likelihood import Request, iter_greedy, iter_scores, score_answers
from llada.diffusion.settings import LikelihoodSettings, MaskSettings
from tiny_llada import make_model

MASK = 39  # of tiny_llada
REQUESTS = [
    Request((1, 2, 3), (4, 5, 6, 7), "four"),
    Request((1, 2, 3), (4,), "choice a"),
    Request((1, 2, 3), (9,), "choice b"),
    Request((8,), (4, 5, 6), "short context"),
    Request((), (4, 5), "no context"),
    Request((7, 7), tuple(range(10, 22)), "long"),
]
# Where there are only masks, all positions have one confidence, and rounding would decide.
ORDERED = [request for request in REQUESTS if request.context]


@pytest.fixture(scope="module")
def model():
    # sharper than at initialisation, so that an error in the last digits would show
    model = make_model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model


def logits_of(model, context, answer, masked, cfg_scale=0.0):
    ids = torch.tensor([[*context, *(MASK if i in masked else y for i, y in enumerate(answer))]])
    with torch.no_grad():
        logits = model(ids).logits[0]
        if cfg_scale:
            ids[:, : len(context)] = MASK
            without = model(ids).logits[0]
            logits = without + (1 + cfg_scale) * (logits - without)
    return logits[len(context) :].log_softmax(-1)


def score(model, requests, **options):
    masks = {f.name: options.pop(f.name) for f in fields(MaskSettings) if f.name in options}
    return score_answers(model, requests, LikelihoodSettings(masks=MaskSettings(**masks), **options))


def bound_by_enumeration(model, context, answer, cfg_scale=0.0):
    """sum over l of the mean over the masks of size l of the mean log p of a masked token"""
    total = 0.0
    for size in range(1, len(answer) + 1):
        masks = list(itertools.combinations(range(len(answer)), size))
        for masked in masks:
            log_p = logits_of(model, context, answer, masked, cfg_scale)
            total += sum(float(log_p[i, answer[i]]) for i in masked) / size / len(masks)
    return total


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_short_answers_are_exact(model, cfg_scale):
    requests = REQUESTS[:5]
    for request, found in zip(requests, score(model, requests, cfg_scale=cfg_scale), strict=True):
        expected = bound_by_enumeration(model, request.context, request.answer, cfg_scale)
        # the model hands out its nll in float32
        assert found.log_likelihood == pytest.approx(expected, abs=1e-6, rel=1e-7)
        assert found.standard_error == 0.0
        assert found.num_forwards == 2 ** len(request.answer) - 1


def test_left_to_right_is_the_chain_rule(model):
    for request, found in zip(REQUESTS, score(model, REQUESTS, kind="l2r"), strict=True):
        steps = range(len(request.answer))
        rows = [
            logits_of(model, request.context, request.answer, set(range(t, len(steps))))[t] for t in steps
        ]
        expected = sum(float(row[y]) for row, y in zip(rows, request.answer, strict=True))
        assert found.log_likelihood == pytest.approx(expected, abs=1e-5)
        assert (found.standard_error, found.num_forwards) == (0.0, len(steps))


def reveal_by_hand(model, request, stop):
    masked, total = set(range(len(request.answer))), 0.0
    while masked:
        log_p = logits_of(model, request.context, request.answer, masked)
        position = max(sorted(masked), key=lambda i: float(log_p[i].max()))
        token = request.answer[position]
        total += float(log_p[position, token])
        if stop and int(log_p[position].argmax()) != token:
            return total, False
        masked.remove(position)
    return total, True


def greedy_answer(model, context, length):
    answer, masked = [MASK] * length, set(range(length))
    while masked:
        log_p = logits_of(model, context, answer, set())
        position = max(sorted(masked), key=lambda i: float(log_p[i].max()))
        answer[position] = int(log_p[position].argmax())
        masked.remove(position)
    return tuple(answer)


def test_policy_follows_the_models_confidence(model):
    for request, found in zip(ORDERED, score(model, ORDERED, kind="policy", batch_size=2), strict=True):
        assert found.log_likelihood == pytest.approx(reveal_by_hand(model, request, False)[0], abs=1e-6)
        assert found.num_forwards == len(request.answer)


def test_greedy_answers_are_recognised(model):
    requests = [
        Request(context, greedy_answer(model, context, length), "greedy")
        for context in [(1, 2, 3), (5,), (6, 7)]
        for length in (1, 4)
    ]
    spoilt = [request._replace(answer=(*request.answer[:-1], request.answer[-1] ^ 1)) for request in requests]
    found = dict(iter_greedy(model, requests + spoilt, LikelihoodSettings(batch_size=3)))
    assert [found[i] for i in range(12)] == [True] * 6 + [False] * 6


def test_scores_do_not_depend_on_batch_size_order_or_company(model):
    kwargs = {"num_masks": 32, "exact_tokens": 3, "seed": 5}
    alone = [score(model, [request], batch_size=1, **kwargs)[0] for request in REQUESTS]
    for batch_size in (2, 7, 64):
        together = score(model, REQUESTS[::-1], batch_size=batch_size, **kwargs)[::-1]
        for a, b in zip(alone, together, strict=True):
            assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-5)
            assert a.num_forwards == b.num_forwards
    assert score(model, REQUESTS[-1:], num_masks=32, seed=6)[0] != alone[-1]


def test_single_token_choices_cost_one_forward_together(model):
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    choices = [Request((1, 2, 3), (token,), "question") for token in (4, 5, 6, 7)]
    found = score(model, choices, batch_size=8)
    handle.remove()
    assert shapes == [(1, 4)]
    log_p = logits_of(model, (1, 2, 3), (4,), {0})
    assert [s.log_likelihood for s in found] == pytest.approx(
        [float(log_p[0, t]) for t in (4, 5, 6, 7)], rel=1e-6
    )


def test_scores_arrive_as_they_get_ready(model):
    requests = [Request((1,) * n, (4, 5, 6), str(n)) for n in range(1, 30)]
    first, _ = next(iter_scores(model, requests, LikelihoodSettings(batch_size=2)))
    assert first == 28  # the longest


def test_the_bound_lies_below_the_random_order_likelihood(model):
    # log of the probability that revealing one token at a time in uniformly random order gives the answer
    context, answer = (1, 2, 3), (4, 5, 6, 7)
    orders = list(itertools.permutations(range(4)))
    log_p = {
        masked: logits_of(model, context, answer, masked)
        for size in range(1, 5)
        for masked in itertools.combinations(range(4), size)
    }
    paths = []
    for order in orders:
        left, total = set(range(4)), 0.0
        for i in order:
            total += float(log_p[tuple(sorted(left))][i, answer[i]])
            left.remove(i)
        paths.append(total)
    exact = score(model, [Request(context, answer, "x")])[0].log_likelihood
    assert exact == pytest.approx(sum(paths) / len(paths), abs=1e-6)
    assert exact <= math.log(sum(map(math.exp, paths)) / len(paths))


def test_estimates_approach_the_exact_value(model):
    request = Request((1, 2, 3), tuple(range(10, 20)), "ten")
    exact = score(model, [request], exact_tokens=10)[0]
    assert exact.num_forwards == 1023
    for estimator in ("stratified", "iid", "complementary"):
        found = score(model, [request], estimator=estimator, num_masks=256, exact_tokens=0)[0]
        assert abs(found.log_likelihood - exact.log_likelihood) < 4 * found.standard_error
        assert found.standard_error < 0.1 * abs(exact.log_likelihood)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "perplexity"}, "likelihood 'perplexity' is not one of elbo, l2r, policy"),
        ({"estimator": "magic"}, "estimator 'magic' is not one of"),
        ({"estimator": "complementary", "num_masks": 3}, "must be even"),
        ({"estimator": "reference", "num_masks": 12}, "must be a multiple of"),
        ({"num_masks": 0}, "at least 1 token and 1 mask"),
    ],
)
def test_bad_settings_are_explained(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        score(model, REQUESTS[:1], **kwargs)


def test_an_empty_answer_is_refused(model):
    with pytest.raises(ValueError, match="'empty': the answer has no token"):
        score(model, [Request((1,), (), "empty")])
