"""Chunked head and cross-entropy against the two lines it replaces."""

import pytest
import torch
from torch.nn import functional as F

from modelling_final.loss_llada import LLaDAHead, chunk_rows, chunked_cross_entropy, chunked_score

M, D, V = 37, 16, 50


def problem(dtype=torch.float32, rows=M):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / 4).to(dtype).requires_grad_()
    targets = torch.randint(V, (rows,), generator=generator)
    return hidden, weight, targets, torch.rand(rows, generator=generator)


def plain(hidden, weight, targets, weights):
    nll = F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")
    return (nll * weights).sum(), nll


@pytest.mark.parametrize("chunk_size", [1, 10, 37, 100, None])
def test_loss_nll_and_gradients_equal_the_plain_ones(chunk_size):
    hidden, weight, targets, weights = problem()
    expected, expected_nll = plain(hidden, weight, targets, weights)
    expected_grads = torch.autograd.grad(3 * expected, (hidden, weight))

    loss, nll = chunked_cross_entropy(hidden, weight, targets, weights, chunk_size=chunk_size)
    grads = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-6)
    assert not nll.requires_grad and nll.dtype == loss.dtype == torch.float32


def test_uniform_head_costs_log_v():
    hidden, _, targets, weights = problem()
    _, nll = chunked_cross_entropy(hidden, torch.zeros(V, D), targets, weights)
    torch.testing.assert_close(nll, torch.full((M,), float(V)).log())


@pytest.mark.parametrize("has_hidden", [True, False])
@pytest.mark.parametrize("has_weight", [True, False])
def test_only_wanted_gradients_are_formed(has_hidden, has_weight):
    hidden, weight, targets, weights = problem()
    expected = torch.autograd.grad(plain(hidden, weight, targets, weights)[0], (hidden, weight))
    hidden.requires_grad_(has_hidden)
    weight.requires_grad_(has_weight)
    loss, _ = chunked_cross_entropy(hidden, weight, targets, weights, chunk_size=10)
    assert loss.requires_grad == (has_hidden or has_weight)
    if loss.requires_grad:
        assert [g is None for g in loss.grad_fn.grads] == [not has_hidden, not has_weight]
        loss.backward()
    for x, grad, wanted in zip((hidden, weight), expected, (has_hidden, has_weight), strict=True):
        assert (x.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(x.grad, grad, rtol=1e-5, atol=1e-6)


def test_no_grad_forms_none_and_gives_the_same_loss():
    hidden, weight, targets, weights = problem()
    with torch.no_grad():
        loss, nll = chunked_cross_entropy(hidden, weight, targets, weights, chunk_size=10)
    assert not loss.requires_grad
    torch.testing.assert_close((loss, nll), plain(hidden, weight, targets, weights), check_stride=False)


def test_no_rows_give_zero_loss_zero_gradients_and_a_graph():
    hidden, weight, targets, weights = problem(rows=0)
    loss, nll = chunked_cross_entropy(hidden, weight, targets, weights)
    loss.backward()
    assert loss.item() == 0.0 and nll.shape == (0,)
    assert hidden.grad.shape == (0, D) and not weight.grad.any()


def test_bfloat16_head_keeps_softmax_and_accumulation_in_float32():
    hidden, weight, targets, weights = problem(torch.bfloat16, rows=500)
    loss, nll = chunked_cross_entropy(hidden, weight, targets, weights, chunk_size=10)
    exact, exact_nll = plain(hidden.double(), weight.double(), targets, weights)
    assert loss.grad_fn.grads[1].dtype == torch.float32
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    # bfloat16 logits are off by up to 2^-9 of themselves, about 0.01 here; the sum is far closer than one row
    torch.testing.assert_close(nll, exact_nll.float(), atol=0.03, rtol=0)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    expected = torch.autograd.grad(exact, weight)[0].float()
    assert (weight.grad.float() - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_products(dtype):
    hidden, weight, targets, weights = problem(rows=200)
    exact = plain(hidden, weight, targets, weights)[0]
    expected = torch.autograd.grad(exact, (hidden, weight))
    tiny = weights * 1e-9  # below float16's smallest number: gradients must survive without loss scaling
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = chunked_cross_entropy(hidden, weight, targets, tiny, chunk_size=64)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item() * 1e-9, rel=2e-3)
    for x, grad in zip((hidden, weight), expected, strict=True):
        assert x.grad.dtype == torch.float32
        assert (x.grad * 1e9 - grad).norm() / grad.norm() < 0.01


def test_second_backward_is_an_error_not_a_wrong_gradient():
    loss, _ = chunked_cross_entropy(*problem())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()


def test_unequal_lengths_are_refused():
    hidden, weight, targets, weights = problem()
    with pytest.raises(ValueError, match="one entry per row, got 37, 36 and 37"):
        chunked_cross_entropy(hidden, weight, targets[1:], weights)


def test_chunk_is_about_a_quarter_gigabyte_of_logits():
    assert chunk_rows(126464) == 512  # LLaDA-8B
    assert 0.2e9 < chunk_rows(126464) * 126464 * 4 < 0.3e9
    assert chunk_rows(1_000_000) == 256 and chunk_rows(512) == 2048


def test_head_gives_logits_or_scores():
    hidden, weight, targets, weights = problem()
    head = LLaDAHead(D, V, bias=False)
    head.weight = torch.nn.Parameter(weight.detach())
    torch.testing.assert_close(head(hidden), hidden @ weight.t())
    torch.testing.assert_close(head(hidden, targets, weights)[0], plain(hidden, weight, targets, weights)[0])


@pytest.mark.parametrize("chunk_size", [1, 10, 37, 100])
def test_any_score_has_the_gradients_of_the_plain_loss(chunk_size):
    hidden, weight, targets, weights = problem()
    expected, expected_nll = plain(hidden, weight, targets, weights)
    expected_grads = torch.autograd.grad(3 * expected, (hidden, weight))
    seen = []

    def score(logits, chunk):
        seen.append((chunk.start, chunk.stop))
        return weights[chunk] * F.cross_entropy(logits, targets[chunk], reduction="none")

    loss, losses = chunked_score(hidden, weight, score, chunk_size=chunk_size)
    grads = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses, (weights * expected_nll).detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-6)
    assert seen == [(start, min(start + chunk_size, M)) for start in range(0, M, chunk_size)]


def test_a_score_without_gradient_or_rows_still_has_a_backward():
    hidden, weight, _, _ = problem()
    for rows in (hidden, hidden[:0]):
        loss, _ = chunked_score(rows, weight, lambda logits, _: logits.new_zeros(len(logits)), chunk_size=10)
        hidden.grad = weight.grad = None
        loss.backward()
        assert loss.item() == 0 and not weight.grad.any()
    with torch.no_grad():
        loss, _ = chunked_score(hidden, weight, lambda logits, _: logits.sum(-1))
    assert not loss.requires_grad


def test_a_score_sees_float32_logits_of_a_bfloat16_head():
    hidden, weight, targets, _ = problem(torch.bfloat16)

    def score(logits, chunk):
        assert logits.dtype == torch.float32
        return F.cross_entropy(logits, targets[chunk], reduction="none")

    loss, _ = chunked_score(hidden, weight, score)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_nothing_is_formed_for_a_backward_that_cannot_come(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "modelling_final.loss_llada._product_dtype",
        lambda hidden, head, grads: asked.append(grads) or head.dtype,
    )
    hidden, weight, targets, weights = problem()
    chunked_cross_entropy(hidden, weight, targets, weights)
    with torch.no_grad():
        chunked_cross_entropy(hidden, weight, targets, weights)
    chunked_cross_entropy(hidden.detach(), weight.detach(), targets, weights)
    assert asked == [True, False, False]
