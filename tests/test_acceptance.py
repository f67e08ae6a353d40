"""Exactness by enumeration: the output distribution of each acceptance rule, over all outcomes."""

import itertools

import numpy as np
import pytest
import torch

from all_outcomes import all_outcomes
from llada.speculative.acceptance import GreedyDraws, KeyedDraws, by_block, by_match, by_token
from modelling_final.remasking_llada import transfer_schedule

V = 3
EXACT = 1e-12


class Tables:
    """Random p(. | prefix) of the verifier and q(. | what is known of the draft) of the drafter, float64."""

    def __init__(self, seed, concentration=0.5):
        self._random = np.random.default_rng(seed)
        self._concentration, self._rows = concentration, {}

    def row(self, *key):
        if key not in self._rows:
            row = self._random.dirichlet([self._concentration] * V)
            self._rows[key] = torch.from_numpy(row)
        return self._rows[key]

    def p(self, prefix):
        return self.row("p", *prefix)

    def p_of(self, chains):
        return torch.stack([torch.stack([self.p(c[:i]) for i in range(len(c) + 1)]) for c in chains])


def one_forward(tables, length, draws):
    q = torch.stack([tables.row("q", k) for k in range(length)])
    return draws.choose(q), q


def left_to_right(tables, length, draws):
    chain, rows = [], []
    for _ in range(length):
        rows.append(tables.row("q", *chain, "next"))
        chain += draws.choose(rows[-1][None])
    return chain, torch.stack(rows)


def any_order(tables, length, draws, num_steps=None):
    """The surest token first; q is the row that each token was drawn from."""
    known, q = [None] * length, [None] * length
    for count in transfer_schedule(length, num_steps or length):
        columns = [k for k in range(length) if known[k] is None]
        rows = torch.stack([tables.row("q", k, *known) for k in columns])
        tokens = draws.choose(rows)
        order = sorted(range(len(columns)), key=lambda i: -rows[i, tokens[i]])
        for i in order[:count]:
            known[columns[i]], q[columns[i]] = tokens[i], rows[i]
    return known, torch.stack(q)


DRAFTS = {"one forward": one_forward, "left to right": left_to_right, "any order": any_order}


def error(tables, draft, rule, length, num_chains=1):
    """Total variation between the verifier's distribution and that of accept, resample, and go on by p."""

    def procedure(draws):
        drafted = [draft(tables, length, draws) for _ in range(num_chains)]
        chains, q = [chain for chain, _ in drafted], torch.stack([q for _, q in drafted])
        p = tables.p_of(chains)
        if rule == "match":
            result = by_match(chains, p, draws, 0)
        elif rule == "block":
            result = by_block(chains[0], q[0], p[0], draws)
        else:
            result = by_token(chains, q, p, draws)
        return (*chains[result.chain][: result.num], result.token)

    outcomes = all_outcomes(procedure)
    assert sum(outcomes.values()) == pytest.approx(1, abs=1e-12)
    total = 0.0
    for tokens in itertools.product(range(V), repeat=length + 1):
        after = [float(tables.p(tokens[:i])[tokens[i]]) for i in range(length + 1)]
        ours = sum(outcomes.get(tokens[:i], 0) * np.prod(after[i:]) for i in range(1, length + 2))
        total += abs(ours - np.prod(after)) / 2
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("draft", "rule", "length", "num_chains"),
    [
        ("one forward", "token", 3, 1),
        ("one forward", "block", 3, 1),
        ("one forward", "match", 2, 1),
        ("left to right", "token", 3, 1),
        ("left to right", "block", 3, 1),
        ("left to right", "match", 2, 1),
        ("any order", "match", 2, 1),
        ("one forward", "token", 2, 2),
        ("one forward", "token", 1, 3),
        ("one forward", "match", 1, 2),
        ("left to right", "token", 2, 2),
        ("any order", "match", 1, 2),
    ],
)
def test_the_output_has_the_verifiers_distribution(draft, rule, length, num_chains, seed):
    assert error(Tables(seed), DRAFTS[draft], rule, length, num_chains) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
def test_this_test_finds_what_is_not_exact(rule):
    # tokens drawn in order of confidence, with the row each was drawn from as q: the known mistake
    errors = [error(Tables(seed), any_order, rule, 2) for seed in range(20)]
    assert np.mean(errors) > 0.01 and max(errors) > 0.05


def test_not_renormalising_q_is_not_exact():
    # the drafter may not draw token 0; p / q with the q before that restriction
    def restricted(tables, length, draws, renormalised):
        q = torch.stack([tables.row("q", k) for k in range(length)])
        allowed = q * torch.tensor([0.0, 1.0, 1.0])
        chain = draws.choose(allowed)
        return chain, allowed / allowed.sum(-1, keepdim=True) if renormalised else q

    for rule in ("token", "block"):
        errors = [
            error(Tables(3), lambda *a, r=renormalised: restricted(*a, r), rule, 2)
            for renormalised in (True, False)
        ]
        assert errors[0] < EXACT and errors[1] > 1e-3


def lengths_by(decide):
    """A one-forward or left-to-right draft that ends where `decide` finds its q too flat."""

    def draft(tables, length, draws):
        chain, q = decide(tables, length, draws)
        num = next((k for k in range(1, length) if q[k].max() < 0.7), length)
        return chain[:num], q

    return draft


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("draft", [one_forward, left_to_right])
def test_ending_a_draft_where_q_is_flat_is_exact(draft, rule):
    class Padded(Tables):
        def p_of(self, chains):  # rows behind a short chain's end are never read
            rows = [[self.p(c[: min(i, len(c))]) for i in range(4)] for c in chains]
            return torch.stack([torch.stack(row) for row in rows])

    for seed in range(4):
        assert error(Padded(seed), lengths_by(draft), rule, 3) < EXACT


def mean_accepted(tables, rule, length, num_chains=1):
    outcomes = {}

    def procedure(draws):
        drafted = [one_forward(tables, length, draws) for _ in range(num_chains)]
        chains, q = [chain for chain, _ in drafted], torch.stack([q for _, q in drafted])
        p = tables.p_of(chains)
        if rule == "block":
            return by_block(chains[0], q[0], p[0], draws).num
        return by_token(chains, q, p, draws).num if rule == "token" else by_match(chains, p, draws, 0).num

    outcomes = all_outcomes(procedure)
    return sum(num * probability for num, probability in outcomes.items())


def test_how_many_tokens_the_rules_accept():
    for seed in range(4):
        tables = Tables(seed)
        p, q = tables.p(()), tables.row("q", 0)
        assert mean_accepted(tables, "token", 1) == pytest.approx(float(torch.minimum(p, q).sum()))
        assert mean_accepted(tables, "match", 1) == pytest.approx(float((p * q).sum()))
        assert mean_accepted(tables, "block", 3) >= mean_accepted(tables, "token", 3) - 1e-12
        assert mean_accepted(tables, "token", 1, 2) > mean_accepted(tables, "token", 1)


def test_equal_distributions_accept_everything():
    class Same(Tables):
        def row(self, *key):
            return super().row(len([k for k in key if isinstance(k, int)]) if key[0] == "p" else key[1])

    tables = Same(1)
    for rule in ("token", "block"):
        assert mean_accepted(tables, rule, 3) == pytest.approx(3)


def test_keyed_choices_follow_the_weights():
    weights = torch.tensor([0.0, 0.1, 0.6, 0.3, 0.0])
    num = 40_000
    draws = KeyedDraws(0, 5, "verify")
    for chosen in (
        draws.choose(weights.expand(num, -1)),
        draws.choose_at(range(num), weights.expand(num, -1)),
    ):
        shares = torch.bincount(torch.tensor(chosen), minlength=5) / num
        # 5 standard errors
        assert (shares - weights).abs().max() < 5 * 0.5 / num**0.5 and shares[0] == shares[4] == 0


def test_keyed_choices_at_a_position_do_not_depend_on_the_call():
    weights = torch.rand(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = KeyedDraws(3, 1, "verify").choose_at(range(20, 27), weights)
    again = KeyedDraws(3, 1, "draft")
    assert [again.choose_at([20 + i], weights[i : i + 1])[0] for i in range(7)] == chosen
    assert KeyedDraws(3, 2, "verify").choose_at(range(20, 27), weights) != chosen
    assert KeyedDraws(4, 1, "verify").choose_at(range(20, 27), weights) != chosen
    assert KeyedDraws(3, 1, "verify").choose(weights) != KeyedDraws(3, 1, "draft").choose(weights)


def test_shared_noise_matches_more_often_than_independent_draws():
    generator = torch.Generator().manual_seed(1)
    num, vocabulary = 4000, 20
    p = (torch.randn(num, vocabulary, generator=generator) * 2).softmax(-1)
    q = (p.log() + 0.5 * torch.randn(num, vocabulary, generator=generator)).softmax(-1)
    one, other = KeyedDraws(0, 0, "verify"), KeyedDraws(0, 0, "draft")
    same = np.mean(np.array(one.choose_at(range(num), p)) == np.array(other.choose_at(range(num), q)))
    tv = (p - q).abs().sum(-1) / 2
    # Daliri et al., theorem 1: at least (1 - TV) / (1 + TV) on average; independent draws: sum p q
    assert same > float(((1 - tv) / (1 + tv)).mean()) - 5 * 0.5 / num**0.5
    assert same > float((p * q).sum(-1).mean()) + 0.1


def test_greedy_draws_take_the_largest():
    scores = torch.tensor([[0.0, -1.0, 5.0], [2.0, 1.0, -torch.inf]])
    assert GreedyDraws().choose(scores) == [2, 0] == GreedyDraws().choose_at([4, 5], scores)
    assert by_match([[2, 1]], torch.stack([scores[[0, 1, 0]]]), GreedyDraws(), 0) == (0, 1, 0)
