"""Distances to a teacher against float64 written out, for full and top-k distributions, and their meaning."""

import math
from itertools import pairwise

import pytest
import torch

from llada.diffusion.distillation_losses import (
    RowObjective,
    RowScore,
    TeacherRows,
    acceptance,
    accepted_length,
    categories,
    kl_divergence,
    lk_loss,
    streak_weights,
    temper,
)

R, E, K = 9, 40, 6


def random_logits(seed, scale=2.0, columns=E, dtype=torch.float32):
    return (torch.randn(R, columns, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def dense(teacher_logits):
    log_probs = teacher_logits.double().log_softmax(-1).float()
    return TeacherRows(None, log_probs, torch.full((len(log_probs),), -torch.inf))


def top(teacher_logits, k, shuffled=False):
    """The k most likely tokens (in any order) and the rest."""
    log_probs = teacher_logits.double().log_softmax(-1)
    best, ids = log_probs.topk(k, dim=-1)
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    if shuffled:
        order = torch.randperm(k, generator=torch.Generator().manual_seed(9))
        best, ids = best[:, order], ids[:, order]
    return TeacherRows(ids, best.float(), rest.float())


def reference_kl(teacher_logits, logits, *, temperature=1.0, k=None):
    """KL in float64, a row at a time; with k over the k most likely tokens and one bucket for the others."""
    found = []
    for t, s in zip(teacher_logits.double(), logits.double(), strict=True):
        p, q = torch.softmax(t, -1), torch.softmax(s, -1)
        if k is not None:
            ids = p.topk(k).indices
            is_top = torch.zeros(len(p), dtype=torch.bool)
            is_top[ids] = True
            p = torch.cat([p[ids], p[~is_top].sum()[None]])
            q = torch.cat([q[ids], q[~is_top].sum()[None]])
        p, q = (x ** (1 / temperature) / (x ** (1 / temperature)).sum() for x in (p, q))
        found.append(sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True) if a > 0))
    return torch.tensor(found, dtype=torch.float64)


def test_the_reverse_kl_and_its_clip_are_those_of_d_opsd():
    logits, told = random_logits(1).requires_grad_(), random_logits(2)
    parts = torch.nn.functional.kl_div(  # its arguments are the other way round
        told.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True
    )
    clipped = parts.clamp(max=0.05)
    assert 0 < int((clipped < parts).sum()) < parts.numel()
    (expected,) = torch.autograd.grad(clipped.sum(), logits)
    objective = RowObjective(0, 1, is_reverse=True, clip=0.05)
    found = objective.distance(*categories(logits, dense(told)))
    torch.testing.assert_close(found, clipped.sum(-1), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)

    # of the top k the student's tail is one part against the teacher's
    p, q = told.double().softmax(-1), logits.detach().double().softmax(-1)
    ids = p.topk(K).indices
    pairs = [(q.gather(1, ids), p.gather(1, ids))]
    pairs += [tuple(1 - x.sum(1, keepdim=True) for x in pairs[0])]
    by_hand = sum((a * (a / b).log()).sum(1) for a, b in pairs)
    found = RowObjective(0, 1, is_reverse=True).distance(*categories(logits.detach(), top(told, K)))
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-4, atol=1e-5)


def divergence(logits, teacher, temperature=1.0):
    log_p, log_q = categories(logits, teacher)
    return kl_divergence(temper(log_p, temperature), temper(log_q, temperature))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0, 4.0])
def test_kl_equals_the_reference(temperature):
    teacher, student = random_logits(0), random_logits(1)
    full = divergence(student, dense(teacher), temperature)
    torch.testing.assert_close(
        full.double(), reference_kl(teacher, student, temperature=temperature), rtol=1e-5, atol=1e-6
    )
    for k in (1, K, E - 1):
        bucketed = divergence(student, top(teacher, k, shuffled=True), temperature)
        expected = reference_kl(teacher, student, temperature=temperature, k=k)
        torch.testing.assert_close(bucketed.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_tokens_as_top_k_are_the_full_distribution(temperature):
    teacher, student = random_logits(2), random_logits(3)
    torch.testing.assert_close(
        divergence(student, top(teacher, E), temperature), divergence(student, dense(teacher), temperature)
    )


def test_a_top_k_kl_is_a_lower_bound_that_grows():
    teacher, student = random_logits(4), random_logits(5)
    values = [divergence(student, top(teacher, k)) for k in range(1, E + 1)]
    for smaller, larger in pairwise(values):
        assert (larger >= smaller - 1e-6).all()


@pytest.mark.parametrize("make", [dense, lambda logits: top(logits, K)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_student_equal_to_the_teacher_has_no_loss_and_no_gradient(make, temperature):
    teacher = random_logits(6)
    for is_lk in (False, True):
        student = teacher.clone().requires_grad_()
        objective = RowObjective(0.0, 1.0, temperature, is_lk=is_lk)
        loss = objective.distance(*categories(student, make(teacher)))
        if is_lk and make is not dense:  # what happens in the rest is not known, and counts as rejected
            continue
        torch.testing.assert_close(loss, torch.zeros(R), atol=2e-6, rtol=0)
        if not is_lk:  # at its minimum the total variation has a kink
            loss.sum().backward()
            torch.testing.assert_close(student.grad, torch.zeros(R, E), atol=2e-6, rtol=0)


@pytest.mark.parametrize("make", [dense, lambda logits: top(logits, K)])
def test_gradients_equal_finite_differences(make):
    teacher = make(random_logits(7)[:2])
    teacher = TeacherRows(teacher.ids, teacher.log_probs[:, :E], teacher.log_rest)
    student = random_logits(8)[:2].double().requires_grad_()
    step = 1e-3

    def total(logits):
        return divergence(logits, teacher, 2.0).double().sum()

    total(student).backward()
    for column in range(0, E, 7):
        change = torch.zeros(2, E, dtype=torch.float64)
        change[0, column] = step
        slope = float(total(student.detach() + change) - total(student.detach() - change)) / (2 * step)
        assert slope == pytest.approx(float(student.grad[0, column]), abs=2e-3)


def test_temperature_squared_keeps_the_size_of_the_gradient():
    # for high temperatures the gradient falls with 1 / T^2 (Hinton et al., section 2.1)
    sizes = {}
    for temperature in (50.0, 100.0):
        student = random_logits(10).requires_grad_()
        log_p, log_q = categories(student, dense(random_logits(11)))
        RowObjective(0.0, 1.0, temperature, times_t2=True).distance(log_p, log_q).sum().backward()
        sizes[temperature] = float(student.grad.norm())
    assert sizes[100.0] == pytest.approx(sizes[50.0], rel=0.05)


@pytest.mark.parametrize("make", [dense, lambda logits: top(logits, K)])
@pytest.mark.parametrize(
    "objective", [RowObjective(0, 1), RowObjective(0, 1, 2.0, True), RowObjective(0, 1, is_lk=True)]
)
def test_extreme_bfloat16_logits_give_no_nan(make, objective):
    teacher = random_logits(12).sign() * 1e4
    student = (random_logits(13).sign() * 1e4).bfloat16().requires_grad_()
    loss = objective.distance(*categories(student, make(teacher)))
    assert loss.isfinite().all() and loss.dtype == torch.float32
    loss.sum().backward()
    assert student.grad.isfinite().all()


def test_acceptance_is_one_minus_total_variation():
    teacher, student = random_logits(14), random_logits(15)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    alpha = acceptance(*categories(student, dense(teacher)))
    torch.testing.assert_close(alpha.double(), 1 - (p - q).abs().sum(-1) / 2, rtol=1e-5, atol=1e-6)
    assert (acceptance(*categories(student, top(teacher, K))) <= alpha + 1e-6).all()


def test_lk_loss_goes_from_kl_to_rejection():
    log_p, log_q = categories(random_logits(16), dense(random_logits(17)))
    alpha, kl = acceptance(log_p, log_q), kl_divergence(log_p, log_q)
    share = torch.exp(-3 * alpha)
    torch.testing.assert_close(lk_loss(log_p, log_q), share * kl + (1 - share) * (1 - alpha))


def test_tokens_that_the_student_cannot_say_belong_to_the_rest():
    teacher, student = random_logits(18), random_logits(19)
    student[:, 3] = -torch.inf  # forbidden
    log_p, log_q = categories(student, dense(teacher))
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    keep = [v for v in range(E) if v != 3]
    # nothing is left for the student's rest, so the teacher's is dropped
    expected = p[:, keep] / p[:, keep].sum(-1, keepdim=True)
    torch.testing.assert_close(log_p[:, keep].exp().double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log_q[:, keep].exp().double(), q[:, keep], rtol=1e-5, atol=1e-7)
    # with a column that the teacher does not know there is a rest, and the mass goes there
    wider = torch.cat([student, torch.zeros(R, 1)], dim=1)
    log_p, log_q = categories(wider, dense(teacher))
    torch.testing.assert_close(log_p[:, -1].exp().double(), p[:, 3], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(R))
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(R))
    assert kl_divergence(log_p, log_q).isfinite().all()


def test_missing_candidates_and_repeated_padding_are_ignored():
    teacher, student = random_logits(20), random_logits(21)
    known = top(teacher, 3)
    padded = TeacherRows(
        torch.cat([known.ids, torch.full((R, 2), -1)], dim=1),
        torch.cat([known.log_probs, torch.full((R, 2), -torch.inf)], dim=1),
        known.log_rest,
    )
    torch.testing.assert_close(divergence(student, padded), divergence(student, known))


def test_streaks_and_accepted_length_by_hand():
    alpha = torch.tensor([0.5, 0.8, 0.25, 1.0, 0.5])
    starts = torch.tensor([True, False, False, True, False])
    weights, carried = streak_weights(alpha, starts, 1.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5, 0.4, 1.0, 1.0]))
    assert carried == 0.5
    torch.testing.assert_close(
        accepted_length(alpha, starts), torch.tensor([1 + 0.5 + 0.4 + 0.1, 1 + 1.0 + 0.5])
    )
    # cut in two the product is carried over
    first, carried = streak_weights(alpha[:2], starts[:2], 1.0)
    second, _ = streak_weights(alpha[2:], starts[2:], carried)
    torch.testing.assert_close(torch.cat([first, second]), weights)
    assert accepted_length(alpha[:0], starts[:0]).shape == (0,)


class Whole:
    """A teacher whose rows are in memory."""

    def __init__(self, rows):
        self.rows = rows

    def take(self, start, stop, device):
        ids = None if self.rows.ids is None else self.rows.ids[start:stop]
        return TeacherRows(ids, self.rows.log_probs[start:stop], self.rows.log_rest[start:stop])


def score_of(objective, teacher, *, has_teacher=None, uses_streaks=False, targets=None, weights=None):
    has_teacher = torch.ones(R, dtype=torch.bool) if has_teacher is None else has_teacher
    weights = torch.ones(R) if weights is None else weights
    return RowScore(
        objective,
        targets=torch.zeros(R, dtype=torch.long) if targets is None else targets,
        weights=weights,
        teacher=Whole(teacher),
        has_teacher=has_teacher,
        teacher_weights=weights * has_teacher,
        starts_window=torch.arange(R) % 4 == 0,
        forbidden_ids=torch.tensor([E - 1]),
        uses_streaks=uses_streaks,
    )


@pytest.mark.parametrize("uses_streaks", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 5, R])
def test_row_scores_do_not_depend_on_the_chunks(chunk, uses_streaks):
    teacher, logits = top(random_logits(22), K), random_logits(23)
    has_teacher = torch.arange(R) != 5
    teacher = TeacherRows(*(x[has_teacher] for x in (teacher.ids, teacher.log_probs, teacher.log_rest)))
    targets, weights = torch.arange(R), torch.rand(R, generator=torch.Generator().manual_seed(1))
    options = {
        "has_teacher": has_teacher,
        "uses_streaks": uses_streaks,
        "targets": targets,
        "weights": weights,
    }
    whole = score_of(RowObjective(0.3, 0.7), teacher, **options)
    expected = whole(logits, slice(0, R))
    parts = score_of(RowObjective(0.3, 0.7), teacher, **options)
    found = torch.cat([parts(logits[i : i + chunk], slice(i, min(i + chunk, R))) for i in range(0, R, chunk)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(parts.alpha, whole.alpha)
    assert float(whole.alpha[5]) == 0 and torch.equal(parts.matches, whole.matches)


def test_hybrid_is_the_weighted_sum_and_never_says_the_forbidden():
    teacher, logits = dense(random_logits(24)), random_logits(25)
    parts = {
        name: score_of(RowObjective(*weights), teacher)(logits, slice(0, R))
        for name, weights in {"ce": (1.0, 0.0), "kl": (0.0, 1.0), "hybrid": (0.25, 0.5)}.items()
    }
    torch.testing.assert_close(parts["hybrid"], 0.25 * parts["ce"] + 0.5 * parts["kl"])
    # the cross-entropy is that of the columns that are left
    nll = -logits[:, :-1].double().log_softmax(-1)[:, 0]
    torch.testing.assert_close(parts["ce"].double(), nll, rtol=1e-5, atol=1e-6)


def test_matches_are_equal_most_likely_tokens():
    teacher_logits, logits = random_logits(26), random_logits(27)
    teacher_logits[:, 7] = 50.0
    logits[::2, 7] = 50.0
    for teacher in (dense(teacher_logits), top(teacher_logits, K)):
        score = score_of(RowObjective(0.0, 1.0), teacher)
        score(logits, slice(0, R))
        expected = logits[:, :-1].argmax(-1) == 7
        assert torch.equal(score.matches, expected) and expected[::2].all()


def test_uniform_student_costs_log_v():
    student = torch.zeros(R, E)
    point = torch.full((R, E), -torch.inf)
    point[:, 2] = 0.0
    value = divergence(student, TeacherRows(None, point, torch.full((R,), -torch.inf)))
    torch.testing.assert_close(value, torch.full((R,), math.log(E)))
