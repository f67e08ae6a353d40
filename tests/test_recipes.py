"""Each recipe's objective, value and gradient, against a plain one-pass transcription of the published one.

The masks are the builder's (their laws: test_grpo_masks.py); everything else is written down again, token by
token in float64, with autograd through the whole loss where production walks the masks twice.
"""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from conftest import ROOT, load_script
from llada.flags.parser import parse
from llada.flags.recipes import FOLDER, recipe_names
from llada.flags.yaml_files import read_yaml
from llada.policies.grpo import GroupBatch, grpo_loss, nll_weights, term_weights
from llada.policies.grpo_config import GrpoConfig
from llada.policies.term_builder import Answer, TermBuilder
from modelling_final import LLaDAGenerationConfig
from test_policy_gradient import IDS, MASK, PROMPT, Model

CANVAS = 4
COMPLETIONS = [  # up to and with the end token, and what was sampled behind it
    ([1, 2, 1, 2], [1, 2, 1, 2]),
    ([2, 0], [2, 0, 1, 0]),
    ([1, 2, 0], [1, 2, 0, 2]),
]
ADVANTAGES = [1.0, -0.7, 0.3]
IS_RIGHT = [True, False, True]
ORDERS = [[(1, 0), (0, 1)], [(0, 1), (1, 0)], [(1, 0), (1, 0)]]  # of each completion, in both blocks


def config_of(name, **changes):
    flags = read_yaml(FOLDER / f"{name}.yaml")["flags"]
    known = {field.name for field in dataclasses.fields(GrpoConfig)}
    own = {key: value for key, value in flags.items() if key in known} | changes
    config = GrpoConfig(model_name_or_path="x", output_dir="x", **own | {"micro_batch_size": 2, "seed": 5})
    sampler = {key: flags[key] for key in ("temperature",) if key in flags}
    block = 1 if flags.get("block_length") == 1 else 2
    settings = LLaDAGenerationConfig(
        gen_length=CANVAS, steps=CANVAS, block_length=block, method="semi_autoregressive_padding",
        early_stop=False, **sampler,
    )  # fmt: skip
    return config, settings


def trace_of(tokens, orders, width):
    if width == 1:
        return [{"block": i, "positions": [i], "token_ids": [t]} for i, t in enumerate(tokens)]
    return [
        {"block": b, "positions": [2 * b + p], "token_ids": [tokens[2 * b + p]]}
        for b in (0, 1)
        for p in orders[b]
    ]


def models():
    """The policy, and two that are near it: ratios on both sides of the clip."""
    policy, random = Model(seed=3, length=CANVAS), torch.Generator().manual_seed(1)
    near = []
    for scale in (0.05, 0.1):
        other = copy.deepcopy(policy)
        for parameter in other.parameters():
            parameter.data += scale * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        near.append(other)
    return policy, *near


def answers_of(config, settings, iteration=1):
    width = settings.block_of(CANVAS)
    return [
        Answer(PROMPT, tokens, f"0/{n}@{iteration}", trace_of(canvas, orders, width), canvas=canvas,
               iteration=iteration, is_negative=advantage < 0)
        for n, ((tokens, canvas), orders, advantage) in enumerate(
            zip(COMPLETIONS, ORDERS, ADVANTAGES, strict=True))
    ]  # fmt: skip


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def production(config, builder, answers, *, is_on_policy):
    policy, before, reference = models()
    terms = builder(answers)
    old = None if is_on_policy or config.surrogate == "linear" else terms.values(before)
    ref = (old if config.kl_to == "old" else terms.values(reference)) if config.beta else None
    weights, units = term_weights(config.loss_type, *builder.counts(answers), longest=CANVAS)
    if not config.count_zero_advantages:
        units = units * (torch.tensor(ADVANTAGES) != 0)
    batch = GroupBatch(
        terms=terms, advantages=torch.tensor(ADVANTAGES, dtype=torch.float64), weights=weights, old=old,
        ref=ref, nll=nll_weights(config.nll_weight, torch.tensor(IS_RIGHT), units),
        num_units=float(units.sum()), record_ids=[],
    )  # fmt: skip
    loss = grpo_loss(policy, batch, batch.num_units, flags=config)
    for part in loss.parts:
        part().backward()
    return float(loss.value), gradient_of(policy)


class Transcription:
    """What the formulas below are made of: log p of single tokens under a state that is spelled out."""

    def __init__(self, config, settings, builder, answers):
        self.config, self.settings, self.answers = config, settings, answers
        self.masks = [None] * len(answers)
        if config.likelihood != "trajectory":
            self.masks = [builder._masks(answer) for answer in answers]

    def log_p(self, model, prompt, body, target, place, temperature=1.0):
        logits = model(
            torch.tensor([[*prompt, *body]]), query_positions=torch.tensor([[len(prompt) + place]])
        ).logits[0, 0]
        return (logits / temperature).log_softmax(-1)[target]

    def masked(self, model, n, k, *, scored, tail):
        """{place: log p} of the tokens that mask k of completion n hides."""
        is_masked = self.masks[n].is_masked[k]
        hidden = self.masks[n].is_hidden[min(k, len(self.masks[n].is_hidden) - 1)]
        prompt = [MASK if hide else token for hide, token in zip(hidden, PROMPT, strict=True)]
        body = [MASK if is_masked[i] else token for i, token in enumerate(scored)] + [MASK] * tail
        return {int(i): self.log_p(model, prompt, body, scored[i], int(i)) for i in np.flatnonzero(is_masked)}

    def steps(self, model, n, shrink=1):
        """Of each group of steps [log p of a token, ...], from the state before the group."""
        body, groups, temperature = [MASK] * CANVAS, [], self.settings.temperature
        trace = self.answers[n].trace
        for start in range(0, len(trace), shrink):
            state, group = list(body), []
            for entry in trace[start : start + shrink]:
                (place,), (token,) = entry["positions"], entry["token_ids"]
                group.append(self.log_p(model, PROMPT, state, token, place, temperature))
                body[place] = token
            groups.append(group)
        return groups

    def clip(self, new, old, advantage):
        ratio = (new - old).exp()
        low, high = 1 - self.config.epsilon, 1 + self.config.epsilon
        return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def k3(new, ref):
    return (ref - new).exp() - (ref - new) - 1


def token_loss(t, values, divide):
    """Clip and beta k3 of each token; `values(model, n)` gives their log p."""
    policy, before, reference = t.models
    losses = []
    for n, advantage in enumerate(ADVANTAGES):
        rows = zip(*(values(model, n) for model in (policy, before, reference)), strict=True)
        losses.append(
            [t.clip(a, b.detach(), advantage) + t.config.beta * k3(a, r.detach()) for a, b, r in rows]
        )
    return divide(losses)


def over_all(losses):
    return sum(sum(own) for own in losses) / sum(len(own) for own in losses)


def over_each(losses):
    return sum(sum(own) / len(own) for own in losses) / len(losses)


def d1(t):
    def values(model, n):
        scored = COMPLETIONS[n][0]
        return list(t.masked(model, n, 0, scored=scored, tail=CANVAS - len(scored)).values())

    return token_loss(t, values, over_all)


def wd1(t):
    total = 0
    for n, advantage in enumerate(ADVANTAGES):
        scored = COMPLETIONS[n][0]
        total += advantage * sum(
            t.masked(t.models[0], n, 0, scored=scored, tail=CANVAS - len(scored)).values()
        )
    return -total / len(ADVANTAGES)


def coupled(t):
    def values(model, n):
        scored = COMPLETIONS[n][0]
        full, half, rest = (t.masked(model, n, k, scored=scored, tail=CANVAS - len(scored)) for k in range(3))
        w = 2 * t.masks[n].weights  # 1, 1 / t, 1 / (1 - t)
        return [
            0.5 * (full[i] + (w[1] * half[i] if i in half else w[2] * rest[i])) for i in range(len(scored))
        ]

    return token_loss(t, values, over_all)


def unigrpo(t):
    def values(model, n):
        scored = COMPLETIONS[n][0]
        return list(t.masked(model, n, 0, scored=scored, tail=CANVAS - len(scored)).values())

    return token_loss(t, values, over_each)


def bound(t, model, n, weigh, scored, tail=0):
    """sum_k weigh(k, masked tokens) sum of log p."""
    total = torch.zeros((), dtype=torch.float64)
    for k in range(len(t.masks[n].is_masked)):
        found = t.masked(model, n, k, scored=scored, tail=tail)
        if found:
            total = total + weigh(k, len(found)) * sum(found.values())
    return total


def espo(t):
    policy, before, reference = t.models
    pairs, total = t.config.num_masks // 2, 0
    weigh = lambda _, size: (CANVAS + 1) / size / 2 / pairs  # noqa: E731
    for n, advantage in enumerate(ADVANTAGES):
        new, old, ref = (bound(t, m, n, weigh, COMPLETIONS[n][1]) for m in (policy, before, reference))
        total += t.clip(new / CANVAS, old.detach() / CANVAS, advantage)
        total += t.config.beta * (new - ref.detach()) ** 2 / 2 / CANVAS
    return total / len(ADVANTAGES)


def gdpo(t):
    policy, before, _ = t.models
    points, weights = [-math.sqrt(3 / 5), 0.0, math.sqrt(3 / 5)], [5 / 9, 8 / 9, 5 / 9]
    weigh = lambda k, _: 0.5 * weights[k] / (0.5 + 0.5 * points[k])  # noqa: E731
    total = 0
    for n, advantage in enumerate(ADVANTAGES):
        new, old = (bound(t, m, n, weigh, COMPLETIONS[n][1]) / CANVAS for m in (policy, before))
        total += t.clip(new, old.detach(), advantage)
    return total / len(ADVANTAGES)


def bgpo(t):
    total = 0
    for n, advantage in enumerate(ADVANTAGES):
        scored = COMPLETIONS[n][0]
        masks = [
            sum(t.masked(t.models[0], n, k, scored=scored, tail=CANVAS - len(scored)).values()) / sizes
            for k, sizes in enumerate(t.masks[n].is_masked.sum(axis=1))
        ]  # B_j / L of each mask
        ratios = [1 + (b - b.detach()) if advantage > 0 else (b - b.detach()).exp() for b in masks]
        total += -len(scored) * advantage * sum(ratios) / len(ratios)
    return total / sum(len(tokens) for tokens, _ in COMPLETIONS)


def spg(t):
    b, omega, total = t.config.eubo_beta, t.config.eubo_weight, 0
    for n, advantage in enumerate(ADVANTAGES):
        scored = COMPLETIONS[n][0]
        size, masks = len(scored), range(len(t.masks[n].is_masked))
        found = [t.masked(t.models[0], n, k, scored=scored, tail=CANVAS - size) for k in masks]
        lower = sum(sum(own.values()) / len(own) for own in found) / len(found)
        shares = [sum((own[i] * b).exp() / (len(own) / size) for own in found if i in own) / len(found)
                  for i in range(size)]  # fmt: skip
        covered = [share.log() for share in shares if not isinstance(share, float)]
        upper = sum(covered) / len(covered) / b
        value = lower if advantage > 0 else omega * upper + (1 - omega) * lower
        total += -advantage * value * size
    return total / sum(len(tokens) for tokens, _ in COMPLETIONS)


def step_loss(t, shrink, divide):
    policy, before, reference = t.models
    rows = []
    for n, advantage in enumerate(ADVANTAGES):
        others = reference if t.config.kl_to == "reference" else before
        found = [t.steps(model, n, shrink) for model in (policy, before, others)]
        for new, old, ref in zip(*found, strict=True):
            tokens = [
                t.clip(a, b.detach(), advantage) + t.config.beta * k3(a, r.detach())
                for a, b, r in zip(new, old, ref, strict=True)
            ]
            rows.append(sum(tokens) / len(tokens))
    return divide(rows)


def cj(t):
    return step_loss(t, 1, lambda rows: sum(rows) / len(rows))


def tracerl(t):
    return step_loss(t, t.config.trajectory_shrink, lambda rows: sum(rows) / len(rows))


def lightningrl(t):
    def values(model, n):
        return [token for step in t.steps(model, n) for token in step]

    right = [values(t.models[0], n) for n, is_right in enumerate(IS_RIGHT) if is_right]
    nll = -sum(sum(own) / len(own) for own in right) / len(right)
    return token_loss(t, values, over_each) + t.config.nll_weight * nll


def justgrpo(t):
    total = 0
    for n, advantage in enumerate(ADVANTAGES):
        for (new,) in t.steps(t.models[0], n):
            total += -((new - new.detach()).exp() * advantage)
    return total / CANVAS / sum(advantage != 0 for advantage in ADVANTAGES)


def gdsd(t):
    policy, before, reference = t.models
    low, high = math.log(1 - t.config.epsilon), math.log(1 + t.config.epsilon)
    total = 0
    for n, advantage in enumerate(ADVANTAGES):
        new, old, ref = (
            bound(t, m, n, lambda *_: 0.5, COMPLETIONS[n][1]) for m in (policy, before, reference)
        )
        moved = (new - old.detach()).clamp(low, high)
        total += (moved / CANVAS - t.config.squared_target * advantage) ** 2
        total += t.config.beta * (new - ref.detach()) ** 2 / 2 / CANVAS
    return total / len(ADVANTAGES)


OBJECTIVES = {f.__name__: f for f in (
    d1, wd1, coupled, unigrpo, espo, gdpo, bgpo, spg, cj, tracerl, lightningrl, justgrpo,
    gdsd)}  # fmt: skip
CHANGES = {
    "tracerl": {"trajectory_shrink": 2},
    "lightningrl": {"num_iterations": 2},  # with one every ratio is 1
    "gdsd": {"epsilon": 0.4},  # the published one leaves no gradient once the policy has moved
    "bgpo": {"num_masks": 4},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_that_of_its_paper(name):
    config, settings = config_of(name, **CHANGES.get(name, {}))
    builder, answers = TermBuilder(config, settings, IDS), answers_of(*config_of(name))
    is_on_policy = config.num_iterations == 1
    value, gradient = production(config, builder, answers, is_on_policy=is_on_policy)
    written = Transcription(config, settings, builder, answers)
    written.models = models()
    loss = OBJECTIVES[name](written)
    loss.backward()
    expected = gradient_of(written.models[0])
    assert float(expected.norm()) > 1e-4
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert value == pytest.approx(float(loss.detach()), rel=1e-9)


def test_the_likelihood_of_right_answers_beside_a_surrogate_on_policy():
    config, settings = config_of("espo", num_iterations=1, beta=0.0, nll_weight=0.3)
    builder, answers = TermBuilder(config, settings, IDS), answers_of(*config_of("espo"))
    value, gradient = production(config, builder, answers, is_on_policy=True)
    written, policy = Transcription(config, settings, builder, answers), models()[0]
    pairs = config.num_masks // 2
    per_token = [
        bound(written, policy, n, lambda _, size: (CANVAS + 1) / size / 2 / pairs, canvas) / CANVAS
        for n, (_, canvas) in enumerate(COMPLETIONS)
    ]
    surrogate = -sum((b - b.detach()).exp() * a for b, a in zip(per_token, ADVANTAGES, strict=True)) / 3
    right = [b for b, is_right in zip(per_token, IS_RIGHT, strict=True) if is_right]
    loss = surrogate - 0.3 * sum(right) / len(right)
    loss.backward()
    torch.testing.assert_close(gradient, gradient_of(policy), rtol=1e-9, atol=1e-12)
    assert value == pytest.approx(float(loss.detach()), rel=1e-9)


def test_every_recipe_that_can_be_said_has_its_objective_tested():
    assert set(recipe_names("rlhf/train_grpo.py")) == set(OBJECTIVES)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_files(path):
    found = read_yaml(path)
    assert found["source"] and (ROOT / found["stage"]).is_file()
    assert ("missing" in found) != ("flags" in found and "differs" in found)
    assert all(isinstance(line, str) for line in found.get("differs", found.get("missing")))
    config_class = load_script(found["stage"]).Config
    known = {field.name for field in dataclasses.fields(config_class)}
    assert set(found.get("flags", {})) <= known
    if "missing" in found:
        with pytest.raises(ValueError, match=f"--recipe {path.stem}: cannot be said yet; missing: "):
            config_class.flags_of_recipe(path.stem)


def test_every_arm_of_the_benchmark_has_flags_that_hold_and_a_cost(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/benchmarks"))
    bench = load_script("scripts/benchmarks/bench_recipes.py")
    from finished_runs import arguments

    sections = read_yaml(ROOT / "configs/bench_recipes.yaml")
    (tmp_path / "model").mkdir()
    (tmp_path / "prompts.jsonl").touch()
    more = {"model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "out", "max_steps": 1,
            "train_data_path": tmp_path / "prompts.jsonl"}  # fmt: skip
    costs = {}
    for task, block in itertools.product(sections["tasks"], sections["blocks"]):
        for arm in sections["arms"]:
            if block not in sections["arms"][arm].get("blocks", sections["blocks"]):
                continue
            flags = bench.flags_of(sections, task, block, arm)
            config = parse(load_script("rlhf/train_grpo.py").Config, arguments(flags | more))
            assert not config.use_lora and config.batch_size == 128 and config.max_grad_norm == 1.0
            costs.setdefault((block, arm), bench.cost(flags))  # of sudoku, the first
    # sampled in 16 steps; 4 masks forward and backward, or 16 steps, or one mask
    assert costs["random", "elbo"] == 16 + 3 * 4 and costs["random", "trajectory"] == 16 + 3 * 16
    assert costs["random", "d1"] == 16 + 3
    # four updates from a rollout, old values under masks of their own for each; or the same masks for all
    assert costs["random", "espo 4"] == 16 / 4 + 3 * 4 + 4
    assert costs["random", "espo 4, masks kept"] == 16 / 4 + 3 * 4 + 1
