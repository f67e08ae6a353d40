"""DPO and KTO losses: TRL's formulas written out, values and slopes by hand, and where their minimum lies."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import exact_llada
from llada.diffusion.bound_estimator import enumerate_masks
from llada.diffusion.bound_gradient import differentiate, draw_values, gradient_parts, make_draws
from llada.diffusion.likelihood import Request
from llada.diffusion.preference_losses import dpo_losses, kto_baseline, kto_losses

RANDOM = torch.Generator().manual_seed(0)
PAIRS = 6


def numbers(*shape, scale=5.0):
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64) * scale - 20.0


POLICY, REFERENCE = numbers(PAIRS, 2), numbers(PAIRS, 2)
LENGTHS = torch.randint(3, 20, (PAIRS, 2), generator=RANDOM)


def trl_dpo(loss_type, beta, label_smoothing=0.0):
    """TRL's formulas, pair by pair in plain floats (trl 1.16 dpo_trainer.py, _compute_loss)."""
    losses = []
    for policy, reference, lengths in zip(POLICY.tolist(), REFERENCE.tolist(), LENGTHS.tolist(), strict=True):
        chosen, rejected = (p - r for p, r in zip(policy, reference, strict=True))
        delta = chosen - rejected
        if loss_type == "sigmoid":
            loss = math.log1p(math.exp(-beta * delta)) * (1 - label_smoothing)
            loss += math.log1p(math.exp(beta * delta)) * label_smoothing
        elif loss_type == "hinge":
            loss = max(0.0, 1 - beta * delta)
        elif loss_type == "ipo":
            loss = (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
        losses.append(loss)
    return losses


@pytest.mark.parametrize("beta", [0.05, 0.3])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_dpo_is_that_of_trl(loss_type, beta):
    found = dpo_losses(POLICY, REFERENCE, LENGTHS, beta=beta, loss_types=[loss_type])
    assert found.tolist() == pytest.approx(trl_dpo(loss_type, beta), rel=1e-12)


def test_label_smoothing_and_terms():
    found = dpo_losses(
        POLICY, REFERENCE, LENGTHS, beta=0.1, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.05],
        label_smoothing=0.2,
    )  # fmt: skip
    sft = (-POLICY[:, 0] / LENGTHS[:, 0]).tolist()
    expected = [a + 0.05 * b for a, b in zip(trl_dpo("sigmoid", 0.1, 0.2), sft, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_policy_equal_to_reference_gives_the_known_constants():
    beta = 0.1
    for name, value in (("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 1 / (4 * beta**2))):
        found = dpo_losses(POLICY, POLICY, LENGTHS, beta=beta, loss_types=[name])
        assert found.tolist() == pytest.approx([value] * PAIRS, rel=1e-15)
    labels = torch.tensor([True, False] * 3)
    found = kto_losses(
        torch.zeros(6, dtype=torch.float64), labels, torch.zeros(()), beta=beta, lambda_d=1.0, lambda_u=3.0
    )
    assert found.tolist() == [0.5, 1.5] * 3


def test_slopes_by_hand():
    beta = 0.2
    policy = POLICY.clone().requires_grad_()
    losses = dpo_losses(policy, REFERENCE, LENGTHS, beta=beta)
    slopes = differentiate(losses.sum(), policy)
    ratios = POLICY - REFERENCE
    s = beta * (ratios[:, 0] - ratios[:, 1])
    expected = -beta * torch.sigmoid(-s)
    torch.testing.assert_close(slopes, torch.stack([expected, -expected], dim=1))

    r = (0.1 * numbers(PAIRS)).requires_grad_()
    labels = torch.tensor([True, True, False, True, False, False])
    z0 = r.detach().mean()
    losses = kto_losses(r, labels, r.mean(), beta=beta, lambda_d=1.3, lambda_u=0.7)
    s = beta * (r.detach() - z0)
    sign = torch.where(labels, -1.3, 0.7)
    # z0 is computed from r and still has no gradient
    torch.testing.assert_close(
        differentiate(losses.sum(), r), sign * beta * torch.sigmoid(s) * torch.sigmoid(-s)
    )


def test_labels_mirror_and_weights_scale():
    r, z0 = 0.1 * numbers(PAIRS), torch.tensor(0.3, dtype=torch.float64)
    labels = torch.tensor([True, False, True, False, True, False])
    one = kto_losses(r - z0, labels, torch.zeros(()), beta=0.5, lambda_d=1.0, lambda_u=1.0)
    mirrored = kto_losses(z0 - r, ~labels, torch.zeros(()), beta=0.5, lambda_d=1.0, lambda_u=1.0)
    torch.testing.assert_close(one, mirrored)
    doubled = kto_losses(r - z0, labels, torch.zeros(()), beta=0.5, lambda_d=2.0, lambda_u=2.0)
    torch.testing.assert_close(doubled, 2 * one)


def test_the_mean_is_inside_the_sigmoid():
    draws = numbers(
        8, PAIRS, 2
    )  # by Jensen the mean of the draws' losses is never below the loss of the mean
    inside = dpo_losses(draws.mean(0), REFERENCE, LENGTHS, beta=0.1)
    outside = torch.stack([dpo_losses(draw, REFERENCE, LENGTHS, beta=0.1) for draw in draws]).mean(0)
    assert (outside > inside).all()


def test_baselines():
    r = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    found = {
        mode: kto_baseline(r, mode=mode, total=9.0, count=3, previous=None).tolist()
        for mode in ("zero", "global_mean", "loo_mean", "ema", "kl_mismatched")
    }
    assert found == {
        "zero": [0.0] * 3,
        "global_mean": [3.0] * 3,
        "loo_mean": [4.0, 3.5, 1.5],
        "ema": [3.0] * 3,
        "kl_mismatched": [3.0] * 3,
    }
    moved = kto_baseline(r, mode="ema", total=9.0, count=3, previous=13.0)
    assert moved.tolist() == pytest.approx([12.0] * 3)
    assert kto_baseline(r, mode="kl_mismatched", total=-9.0, count=3, previous=None).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="--z0_mode 'median' is not one of"):
        kto_baseline(r, mode="median", total=9.0, count=3, previous=None)


def test_what_a_user_can_get_wrong():
    with pytest.raises(ValueError, match=r"--loss_weights \[1.0\]"):
        dpo_losses(POLICY, REFERENCE, LENGTHS, beta=0.1, loss_types=["sigmoid", "sft"], loss_weights=[1.0])
    with pytest.raises(ValueError, match="--loss_type 'nca' is not one of"):
        dpo_losses(POLICY, REFERENCE, LENGTHS, beta=0.1, loss_types=["nca"])


def test_dpo_with_all_preferences_of_a_reward_ends_at_the_tilted_reference():
    # pairs from Bradley-Terry on r, all of them with their probability: the minimum is ref * exp(r / beta)
    random, beta, size = torch.Generator().manual_seed(3), 0.5, 6
    reward = torch.randn(size, generator=random, dtype=torch.float64)
    reference = torch.randn(size, generator=random, dtype=torch.float64).log_softmax(0)
    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    pairs = torch.tensor(list(itertools.permutations(range(size), 2)))
    wins = torch.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        losses = dpo_losses(policy[pairs], reference[pairs], torch.ones_like(pairs), beta=beta)
        loss = (wins * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = (reference + reward / beta).log_softmax(0)
    policy = logits.detach().log_softmax(0)
    assert float((best.exp() * (best - policy)).sum()) < 1e-8


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_training_raises_the_exact_margin(kind):
    # every mask of every answer is enumerated, so B is exact and the margin has no noise
    model, reference = exact_llada.ExactModel(seed=1), exact_llada.ExactModel(seed=1)
    requests = [Request((1,), (2, 3, 0), "w"), Request((1,), (0, 1, 1), "l")]
    plans = [enumerate_masks(3)] * 2
    draws = [make_draws(requests, plans, len(plans[0].masks), mask_id=exact_llada.MASK, pad_id=0)]
    known = draw_values(reference, draws).sum(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    margins = []
    for _ in range(30):
        leaf = draw_values(model, draws).sum(0).requires_grad_()
        r = leaf - known
        margins.append(float(r.detach()[0] - r.detach()[1]))
        if kind == "dpo":
            loss = dpo_losses(leaf[None], known[None], torch.full((1, 2), 3), beta=0.5).mean()
        else:
            z0 = kto_baseline(r, mode="global_mean", total=float(r.detach().sum()), count=2, previous=None)
            loss = kto_losses(r, torch.tensor([True, False]), z0, beta=0.5, lambda_d=1.0, lambda_u=1.0).mean()
        optimizer.zero_grad()
        for part in gradient_parts(model, draws, differentiate(loss, leaf)):
            part().backward()
        optimizer.step()
    assert margins[0] == 0.0 and margins[-1] > 3.0
    assert float(-logsigmoid(torch.tensor(0.5 * margins[-1]))) < math.log(2) / 2
