"""The sampler against a plain transcription of the published algorithm, and against itself."""

import itertools
import json

import pytest
import reference_sampler as oracle
import torch
from tiny_llada import make_model
from transformers import GenerationConfig

from modelling_final import LLaDAGenerationConfig, LLaDAModelLM
from modelling_final.remasking_llada import (
    ORDER_DRAW,
    TOKEN_DRAW,
    choose_tokens,
    pick_entropy_bounded,
    pick_factor,
    pick_threshold,
    random_key,
    transfer_schedule,
    uniform,
)

SMALL = {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 24}
EOS, EOT = 0, 1
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24]]


def peaked_model(*, sharpness=3.0, eos_boost=0.0, **changes):
    """A random model whose predictions are as sure as a trained one's, optionally in love with EOS."""
    model = make_model(eot_token_id=EOT, **SMALL | changes)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharpness)
        if eos_boost:
            # the final norm gives every row length sqrt(D): this lifts EOS nearly everywhere
            model.get_output_embeddings().weight[EOS] += eos_boost * model.get_output_embeddings().weight[
                2:12
            ].mean(0)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return peaked_model(eos_boost=1.0).double()


def answers(output, gen_length):
    return output.sequences[:, -gen_length:].tolist()


# --- the published tokens -------------------------------------------------------------------------------------

SHAPES = [  # method, gen_length, block_length, steps: S = M, S < M, S > M, shares that do not divide
    ("fixed_length", 12, None, 12),
    ("fixed_length", 12, None, 5),
    ("semi_autoregressive_padding", 16, 4, 16),
    ("semi_autoregressive_padding", 16, 4, 8),
    ("semi_autoregressive_padding", 16, 8, 6),
    ("semi_autoregressive_padding", 16, 4, 24),
    ("semi_autoregressive_origin", 16, 4, 16),
    ("semi_autoregressive_origin", 16, 8, 6),
]
GUIDANCE = [0.0, 1.5]
EOS_FLAGS = [{}, {"logits_eos_inf": True}, {"confidence_eos_eot_inf": True}]
REMASKING = ["low_confidence", "random"]
TEMPERATURES = [0.0, 0.8]
GRID = list(itertools.product(SHAPES, GUIDANCE, EOS_FLAGS, REMASKING, TEMPERATURES))


def oracle_answer(model, row, shape, cfg_scale, eos_flags, remasking, temperature, **more):
    method, gen_length, block_length, steps = shape
    key = random_key(0, row, 0)
    width = block_length or gen_length

    def draw(kind, block, step):
        return uniform([key], block=block, step=step, draw=kind, width=width)[0]

    def choose(logits, temperature, block, step):
        # the oracle's own sampling is tested by its distribution; here it follows our random numbers
        span = slice(len(PROMPTS[row]) + block * width, len(PROMPTS[row]) + (block + 1) * width)
        tokens = logits.argmax(dim=-1)
        for i, u in zip(range(span.start, span.stop), draw(TOKEN_DRAW, block, step), strict=True):
            cumulative = (logits[i] / temperature).softmax(dim=-1).cumsum(dim=-1)
            tokens[i] = int((cumulative <= u * cumulative[-1]).sum())
        return tokens

    return oracle.sample(
        model,
        PROMPTS[row],
        gen_length=gen_length,
        steps=steps,
        block_length=width,
        grows=method == "semi_autoregressive_origin",
        temperature=temperature,
        cfg_scale=cfg_scale,
        remasking=remasking,
        choose=choose,
        order_draw=lambda block, step: draw(ORDER_DRAW, block, step),
        **eos_flags,
        **more,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-{s[1]}-{s[2]}-{s[3]}")
def test_tokens_are_those_of_the_published_algorithm(model, shape):
    # 24 settings for each of 8 shapes: 192 in all, each in a ragged batch
    method, gen_length, block_length, steps = shape
    for i, (_, cfg_scale, eos_flags, remasking, temperature) in enumerate(g for g in GRID if g[0] == shape):
        output = model.generate(
            PROMPTS,
            method=method,
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            cfg_scale=cfg_scale,
            remasking=remasking,
            temperature=temperature,
            early_stop=False,
            **eos_flags,
        )
        row = i % 3
        expected = oracle_answer(model, row, shape, cfg_scale, eos_flags, remasking, temperature)
        assert answers(output, gen_length)[row] == expected, (cfg_scale, eos_flags, remasking, temperature)


@pytest.mark.parametrize("cfg_scale", GUIDANCE)
def test_tokens_in_float32_are_those_of_the_published_algorithm(cfg_scale):
    model = peaked_model(eos_boost=1.0)
    for shape in SHAPES:
        output = model.generate(
            PROMPTS,
            method=shape[0],
            gen_length=shape[1],
            block_length=shape[2],
            steps=shape[3],
            cfg_scale=cfg_scale,
            early_stop=False,
        )
        expected = oracle_answer(model, 0, shape, cfg_scale, {}, "low_confidence", 0.0)
        assert answers(output, shape[1])[0] == expected


def test_left_padding_of_the_oracle_changes_nothing(model):
    plain = oracle_answer(model, 0, SHAPES[2], 1.5, {}, "low_confidence", 0.0)
    assert oracle_answer(model, 0, SHAPES[2], 1.5, {}, "low_confidence", 0.0, pad_to=9) == plain


def test_answers_sometimes_end_early_or_the_grid_would_show_little(model):
    lengths = model.generate(PROMPTS, gen_length=16, block_length=4).lengths.tolist()
    assert any(0 < length < 16 for length in lengths), lengths


# --- what is left out without changing a token ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["semi_autoregressive_padding", "semi_autoregressive_origin"])
@pytest.mark.parametrize("remasking", REMASKING)
@pytest.mark.parametrize("block_length", [4, 16])
def test_early_stop_gives_the_same_text_with_fewer_forwards(model, method, remasking, block_length):
    settings = {"method": method, "remasking": remasking, "gen_length": 16, "block_length": block_length}
    full = model.generate(PROMPTS, early_stop=False, **settings)
    short = model.generate(PROMPTS, **settings)
    assert short.completions == full.completions
    assert short.lengths.tolist() == full.lengths.tolist()
    assert (short.steps <= full.steps).all() and full.steps.tolist() == [16, 16, 16]
    for row, length in zip(answers(short, 16), short.lengths.tolist(), strict=True):
        assert all(token == EOS for token in row[length + 1 :])


def test_early_stop_saves_forwards(model):
    assert model.generate(PROMPTS, gen_length=64, block_length=4).steps.min() < 32


def test_steps_that_decide_nothing_are_not_run(model):
    output = model.generate(PROMPTS, gen_length=8, block_length=4, steps=40, early_stop=False)
    assert output.forwards == 8 and output.steps.tolist() == [8, 8, 8] and output.tokens_per_forward == 1.0
    assert transfer_schedule(4, 6) == [1, 1, 1, 1, 0, 0] and transfer_schedule(7, 3) == [3, 2, 2]


class Spy(torch.nn.Module):
    """Counts the rows that the model is asked for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device
        self.generation_config = model.generation_config
        self.asked, self.sequences = [], []

    def forward(self, **inputs):
        self.sequences.append(inputs["input_ids"].shape[0])
        self.asked.append(inputs["query_positions"].shape[1])
        return self.model(**inputs)


def test_the_head_sees_only_what_can_be_decided(model):
    from modelling_final.generation_llada import generate

    spy = Spy(model)
    generate(spy, PROMPTS, gen_length=8, block_length=4, early_stop=False)
    assert spy.asked == [4, 3, 2, 1] * 2 and set(spy.sequences) == {3}
    spy = Spy(model)
    generate(spy, PROMPTS, gen_length=8, block_length=4, steps=4, remasking="random", early_stop=False)
    assert spy.asked == [2, 2, 2, 2]
    spy = Spy(model)
    generate(spy, PROMPTS, gen_length=8, cfg_scale=0.5, early_stop=False)
    assert set(spy.sequences) == {6}


def test_finished_sequences_leave_the_batch(model):
    from modelling_final.generation_llada import generate

    spy = Spy(model)
    output = generate(spy, PROMPTS, gen_length=64, block_length=4)
    assert spy.sequences[-1] < 3 and sum(spy.sequences) == int(output.steps.sum())


# --- a sequence does not depend on its batch ------------------------------------------------------------------

MODES = {
    "exact": {},
    "sampled": {"temperature": 1.0},
    "random": {"remasking": "random", "temperature": 0.5},
    "guided": {"cfg_scale": 1.0},
    "penalised": {"repetition_penalty": 1.3},
    "origin": {"method": "semi_autoregressive_origin"},
    "threshold": {"parallel_decoding": "threshold", "threshold": 0.4},
    "factor": {"parallel_decoding": "factor", "factor": 2.0},
    "entropy": {"parallel_decoding": "entropy", "entropy_bound": 2.0},
    "klass": {"parallel_decoding": "klass", "threshold": 0.2, "klass_kl": 0.5, "klass_steps": 1},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "refreshed": {"cache": "dual", "cache_refresh_interval": 2},
    "dual factor": {"cache": "dual", "parallel_decoding": "factor", "factor": 2.0},
    "dual guided klass": {"cache": "dual", "cfg_scale": 0.5, "parallel_decoding": "klass", "threshold": 0.2},
    "prefix threshold": {"cache": "prefix", "parallel_decoding": "threshold", "threshold": 0.3},
    "cap": {"remdm": "cap", "remdm_eta": 0.3, "temperature": 1.0},
    "rescale": {"remdm": "rescale", "remdm_eta": 0.3, "steps": 32},
    "conf": {"remdm": "conf", "cache": "dual"},
}


def padded(prompts, side, width):
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        columns = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("mode", MODES)
def test_batch_size_order_and_padding_change_nothing(model, mode):
    settings = {"gen_length": 16, "block_length": 8, **MODES[mode]}
    together = model.generate(PROMPTS, **settings)
    assert together.is_approximate == any(
        name in settings for name in ("parallel_decoding", "cache", "remdm")
    )
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate([prompt], record_ids=[row], **settings)
        assert answers(alone, 16)[0] == answers(together, 16)[row]
        assert int(alone.steps[0]) == int(together.steps[row]) or settings.get("remdm")
    order = [2, 0, 1]
    for side in ("left", "right"):
        batch = padded([PROMPTS[row] for row in order], side, width=9)
        output = model.generate(**batch, record_ids=order, **settings)
        assert output.sequences.shape == (3, 9 + 16)
        assert answers(output, 16) == [answers(together, 16)[row] for row in order]
        assert output.sequences[0, 9 - len(PROMPTS[2]) : 9].tolist() == PROMPTS[2]


@pytest.mark.parametrize("mode", MODES)
def test_every_sequence_may_have_its_own_length(model, mode):
    settings = {"block_length": 4, **MODES[mode]}
    settings.pop("steps", None)
    lengths = [8, 16, 4]
    output = model.generate(PROMPTS, gen_length=lengths, **settings)
    assert output.sequences.shape == (3, 7 + 16)
    for row, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        alone = model.generate([prompt], record_ids=[row], gen_length=length, **settings)
        assert output.sequences[row, 7 : 7 + length].tolist() == answers(alone, length)[0]
    whole = model.generate(PROMPTS, gen_length=lengths, method="fixed_length")
    assert (
        whole.sequences[2, 7:11].tolist()
        == answers(model.generate([PROMPTS[2]], gen_length=4, method="fixed_length"), 4)[0]
    )


# --- sampling -------------------------------------------------------------------------------------------------


def test_candidates_follow_the_published_distribution():
    # Every path of a two-token answer over 5 tokens, against 6000 draws: chi-square with its 99.9 % quantile.
    changes = {"vocab_size": 6, "embedding_size": 6, "mask_token_id": 5}
    model = peaked_model(sharpness=1.5, **changes).double()
    prompt, temperature = [2, 3], 0.7

    def predictions(x):
        logits = model(torch.tensor([x])).logits[0, 2:]
        chosen_from = logits.clone()
        chosen_from[:, 5] = -torch.inf
        return logits.softmax(-1), (chosen_from / temperature).softmax(-1)

    expected = torch.zeros(5, 5, dtype=torch.float64)
    p, q = predictions([2, 3, 5, 5])
    for a, b in itertools.product(range(5), repeat=2):
        weight = q[0, a] * q[1, b]
        if p[0, a] >= p[1, b]:  # position 0 is the surer one and stays; position 1 is drawn again
            expected[a] += weight * predictions([2, 3, a, 5])[1][1, :5]
        else:
            expected[:, b] += weight * predictions([2, 3, 5, b])[1][0, :5]
    num = 6000
    output = model.generate(
        [prompt], gen_length=2, temperature=temperature, num_return_sequences=num, early_stop=False
    )
    observed = torch.zeros(5, 5, dtype=torch.float64)
    for a, b in answers(output, 2):
        observed[a, b] += 1
    chi_square = float(((observed - num * expected) ** 2 / (num * expected)).sum())
    assert expected.sum() == pytest.approx(1.0) and float(expected.min()) * num > 5
    assert chi_square < 51.2  # 24 degrees of freedom


def test_inversion_and_gumbel_max_draw_alike():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 9, generator=generator, dtype=torch.float64).expand(1, 20000, 9).clone()
    draws = torch.rand(1, 20000, generator=generator, dtype=torch.float64)
    ours = choose_tokens(logits, draws, temperature=0.5, mask_id=8)[0]
    logits[..., 8] = -torch.inf
    noise = torch.rand(20000, 9, generator=generator, dtype=torch.float64)
    theirs = oracle.gumbel_argmax(logits[0], 0.5, noise)
    p = (logits[0, 0] / 0.5).softmax(-1)[:8]
    for tokens in (ours, theirs):
        counts = torch.bincount(tokens, minlength=8)[:8]
        assert float(((counts - 20000 * p) ** 2 / (20000 * p)).sum()) < 24.3  # 7 degrees of freedom, 99.9 %


def test_a_draw_never_leaves_the_support():
    logits = torch.tensor([[[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf, 9.0]]])
    edge = 1 - 2**-53
    for u, token in ((0.0, 1), (0.499, 1), (0.5, 3), (edge, 3)):
        draw = torch.tensor([[u]], dtype=torch.float64)
        assert choose_tokens(logits.clone(), draw, temperature=1.0, mask_id=5).item() == token


def test_random_order_is_uniform():
    model = peaked_model().double()
    first = []
    model.generate(
        [[5]] * 1200,
        gen_length=4,
        remasking="random",
        early_stop=False,
        on_step=lambda entry: first.append(entry["positions"][0]) if entry["step"] == 0 else None,
    )
    counts = torch.bincount(torch.tensor(first), minlength=4)
    assert float(((counts - 300) ** 2 / 300).sum()) < 16.3  # 3 degrees of freedom, 99.9 %


def test_candidates_differ_and_repeat_with_the_seed(model):
    settings = {"gen_length": 8, "temperature": 1.0, "num_return_sequences": 3}
    output = model.generate(PROMPTS, **settings)
    assert output.sequences.shape == (9, 15)
    assert len({tuple(row) for row in answers(output, 8)[:3]}) == 3
    assert torch.equal(output.sequences, model.generate(PROMPTS, **settings).sequences)
    assert not torch.equal(output.sequences, model.generate(PROMPTS, **settings, seed=1).sequences)
    # candidate 0 does not depend on how many there are
    one = model.generate(PROMPTS, **{**settings, "num_return_sequences": 1})
    assert answers(one, 8) == answers(output, 8)[::3]


# --- rules ----------------------------------------------------------------------------------------------------


def test_parallel_rules_on_numbers_by_hand():
    scores = torch.tensor([[0.95, 0.6, 0.99, 0.9], [0.2, 0.1, 0.15, 0.0]])
    valid = torch.tensor([[True, True, True, True], [True, True, True, False]])
    assert pick_threshold(scores, valid, 0.9).tolist() == [
        [True, False, True, True],
        [True, False, False, False],
    ]
    # n = 1: 2 x .01 < 1; n = 2: 3 x .05; n = 3: 4 x .1 = .4; n = 4: 5 x .4 = 2
    assert pick_factor(scores, valid, 1.0).tolist() == [
        [True, False, True, True],
        [True, False, False, False],
    ]
    assert pick_factor(scores, valid, 0.3).tolist()[0] == [True, False, True, False]
    entropies = torch.tensor([[0.2, 1.0, 0.1, 0.3], [2.0, 2.0, 2.0, 0.0]])
    # order 2, 0, 3, 1: sum - max is 0, .1, .3, .6
    assert pick_entropy_bounded(scores, entropies, valid, 0.3).tolist()[0] == [True, False, True, True]
    assert pick_entropy_bounded(scores, entropies, valid, 0.0).tolist()[1] == [True, False, False, False]


def test_parallel_decoding_needs_fewer_steps_and_agrees_where_it_is_sure(model):
    exact = model.generate(PROMPTS, gen_length=16, early_stop=False)
    strict = model.generate(
        PROMPTS, gen_length=16, early_stop=False, parallel_decoding="threshold", threshold=1.0
    )
    assert answers(strict, 16) == answers(exact, 16) and strict.forwards == 16
    loose = model.generate(
        PROMPTS, gen_length=16, early_stop=False, parallel_decoding="threshold", threshold=0.0
    )
    assert loose.forwards == 1 and loose.tokens_per_forward == 16.0


def test_a_cache_refreshed_at_every_step_is_exact(model):
    exact = model.generate(PROMPTS, gen_length=16, block_length=8)
    for cache in ("prefix", "dual"):
        output = model.generate(PROMPTS, gen_length=16, block_length=8, cache=cache, cache_refresh_interval=1)
        assert answers(output, 16) == answers(exact, 16)


def test_a_cached_step_only_feeds_the_window(model):
    from modelling_final.generation_llada import generate

    class Widths(Spy):
        def forward(self, **inputs):
            self.asked.append(inputs["input_ids"].shape[1])
            return self.model(**inputs)

    for cache, widths in (("dual", [23, 4, 4, 4]), ("prefix", [23, 16, 16, 16])):
        spy = Widths(model)
        generate(spy, PROMPTS, gen_length=16, block_length=4, cache=cache, early_stop=False)
        assert spy.asked[:4] == widths


def test_block_causal_models_have_an_exact_prefix_cache():
    model = peaked_model(attention_pattern="block_causal", attention_block_size=4).double()
    settings = {"gen_length": 16, "block_length": 4, "early_stop": False}
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16]]
    exact = model.generate(prompts, **settings)
    for cache in ("prefix", "dual"):
        assert torch.equal(model.generate(prompts, cache=cache, **settings).sequences, exact.sequences)


@pytest.mark.parametrize("rule", ["cap", "rescale", "conf"])
def test_remdm_takes_tokens_back_and_ends_without_masks(model, rule):
    output = model.generate(
        PROMPTS, gen_length=8, steps=24, remdm=rule, remdm_eta=0.5, temperature=1.0, early_stop=False,
        return_trace=True,
    )  # fmt: skip
    assert any(entry["remasked"] for entry in output.trace)
    assert model.config.mask_token_id not in output.sequences
    assert all(len(completion) <= 8 for completion in output.completions)


def test_repetition_penalty_makes_repetition_less_likely():
    model = peaked_model().double()
    prompts = [[5, 6, 7, 8]] * 1

    def repeated(penalty):
        row = answers(model.generate(prompts, gen_length=16, repetition_penalty=penalty), 16)[0]
        return 16 - len(set(row) - set(prompts[0]))

    assert repeated(1.5) < repeated(1.0) < repeated(0.5)


def test_eos_flags(model):
    plain = model.generate(PROMPTS, gen_length=16, early_stop=False)
    assert EOS in plain.sequences[:, -16:]
    assert EOS not in model.generate(PROMPTS, gen_length=16, logits_eos_inf=True).sequences[:, -16:]
    trace = model.generate(
        PROMPTS, gen_length=16, temperature=0.8, confidence_eos_eot_inf=True, early_stop=False, return_trace=True
    ).trace  # fmt: skip
    for row in range(3):
        confidences = [c for entry in trace if entry["row"] == row for c in entry["confidences"]]
        # an EOS is only decided where a step has nothing else to offer
        tokens = [t for entry in trace if entry["row"] == row for t in entry["token_ids"]]
        assert [t in (EOS, EOT) for t in tokens] == [c < 0 for c in confidences]


# --- interface ------------------------------------------------------------------------------------------------


def test_trace_replays_the_answer(model):
    seen = []
    output = model.generate(
        PROMPTS,
        gen_length=8,
        block_length=4,
        steps=4,
        return_trace=True,
        on_step=seen.append,
        early_stop=False,
    )
    assert seen == output.trace and len(seen) == 12
    for row in range(3):
        replay = [None] * 8
        for entry in (entry for entry in output.trace if entry["row"] == row):
            for position, token in zip(entry["positions"], entry["token_ids"], strict=True):
                replay[position] = token
        assert replay == answers(output, 8)[row]
    json.dumps(output.trace)


def test_training_mode_is_put_back(model):
    model.train()
    model.model.transformer.blocks[0].eval()
    model.generate(PROMPTS, gen_length=2)
    assert model.training and not model.model.transformer.blocks[0].training
    model.eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 10, "block_length": 4}, "gen_length 10 is not a multiple of block_length 4.*gen_length 8"),
        ({"gen_length": 16, "block_length": 4, "steps": 10}, "steps 10 .* over 4 blocks.*for example 8"),
        ({"gen_length": 16, "block_length": 4, "steps": 2}, "must be a multiple of 4, for example 4"),
        ({"gen_length": 0}, "gen_length must be a whole number from 1, got 0"),
        ({"gen_len": 4}, "no setting 'gen_len'; did you mean 'gen_length'"),
        ({"do_sample": True}, "no setting 'do_sample'"),
        ({"remasking": "lowconf"}, "remasking 'lowconf' is not one of low_confidence, random"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"threshold": 1.5}, "threshold must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"num_return_sequences": 2}, "would repeat one answer"),
        ({"parallel_decoding": "factor", "remdm": "cap"}, "choose one of them"),
        ({"parallel_decoding": "factor", "remasking": "random"}, "needs remasking low_confidence"),
        ({"cache_refresh_interval": 4}, "needs cache prefix or dual"),
        ({"max_new_tokens": 8, "gen_length": 4}, "give one of them"),
        ({"gen_length": 4096}, "prompt 0 of 3 tokens and gen_length 4096 exceed the model's context of 4096"),
        ({"gen_length": [4, 4]}, "gen_length has 2 entries for 3 prompts"),
        ({"record_ids": [1]}, "record_ids has 1 entries for 3 prompts"),
    ],
)  # fmt: skip
def test_errors_name_the_setting_and_what_would_be_right(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, **settings)


def test_errors_about_prompts(model):
    with pytest.raises(ValueError, match="prompt 1 is empty.*BOS"):
        model.generate([[1], []])
    with pytest.raises(ValueError, match="prompt 0 contains the mask token 39"):
        model.generate([[1, 39]])
    with pytest.raises(ValueError, match="no prompts"):
        model.generate([])
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(ValueError, match="padding inside a prompt"):
        model.generate(ids, attention_mask=torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        model.generate(ids, attention_mask=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="must have the shape"):
        model.generate(ids, attention_mask=torch.ones(1, 4, dtype=torch.long))


def test_generation_config_is_saved_with_the_model_and_read_back(tmp_path):
    model = peaked_model()
    assert isinstance(model.generation_config, LLaDAGenerationConfig)
    settings = {"gen_length": 8, "block_length": 4, "temperature": 0.5, "num_return_sequences": 2, "seed": 3}
    model.generation_config = LLaDAGenerationConfig(**settings, cache="dual")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["gen_length"] == 8 and saved["do_sample"] is True and "threshold" not in saved
    again = LLaDAModelLM.from_pretrained(tmp_path)
    assert isinstance(again.generation_config, LLaDAGenerationConfig)
    for name, value in settings.items():
        assert getattr(again.generation_config, name) == value
    assert torch.equal(again.generate(PROMPTS).sequences, model.generate(PROMPTS).sequences)
    assert GenerationConfig.from_pretrained(tmp_path).gen_length == 8  # transformers' own class reads it
    assert LLaDAGenerationConfig.from_pretrained(tmp_path).cache == "dual"


def test_max_new_tokens_is_another_name(model):
    assert model.generate(PROMPTS, max_new_tokens=6).sequences.shape == (3, 13)
    assert LLaDAGenerationConfig(max_new_tokens=6).gen_length == 6
    foreign = GenerationConfig(max_new_tokens=5)
    assert model.generate(PROMPTS, generation_config=foreign).sequences.shape == (3, 12)
