"""The sampler gives the tokens of a plain transcription of the published one; its interface and errors."""

import itertools
import json

import pytest
import torch
from transformers import GenerationConfig

import published_sampler as oracle
from modelling_final import LLaDAGenerationConfig, LLaDAModelLM
from modelling_final.generation_llada import generate
from modelling_final.remasking_llada import (
    ORDER_DRAW,
    TOKEN_DRAW,
    random_key,
    transfer_schedule,
    uniform,
)
from peaked_llada import EOS, EOT, PAD, PROMPTS, Spy, answers, peaked_model


@pytest.fixture(scope="module")
def model():
    return peaked_model().double()


# --- the published tokens

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
        output = generate(
            model,
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
    model = peaked_model()
    for shape in SHAPES:
        output = generate(
            model,
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
    lengths = generate(model, PROMPTS, gen_length=16, block_length=4).lengths.tolist()
    assert any(0 < length < 16 for length in lengths), lengths


# --- what is left out without changing a token


@pytest.mark.parametrize("method", ["semi_autoregressive_padding", "semi_autoregressive_origin"])
@pytest.mark.parametrize("remasking", REMASKING)
@pytest.mark.parametrize("block_length", [4, 16])
def test_early_stop_gives_the_same_text_with_fewer_forwards(model, method, remasking, block_length):
    settings = {"method": method, "remasking": remasking, "gen_length": 16, "block_length": block_length}
    full = generate(model, PROMPTS, early_stop=False, **settings)
    short = generate(model, PROMPTS, **settings)
    assert short.completions == full.completions
    assert short.lengths.tolist() == full.lengths.tolist()
    assert (short.steps <= full.steps).all() and full.steps.tolist() == [16, 16, 16]
    for row, length in zip(answers(short, 16), short.lengths.tolist(), strict=True):
        assert all(token == PAD for token in row[length + 1 :])


def test_early_stop_saves_forwards(model):
    assert generate(model, PROMPTS, gen_length=64, block_length=4).steps.min() < 32


def test_steps_that_decide_nothing_are_not_run(model):
    output = generate(model, PROMPTS, gen_length=8, block_length=4, steps=40, early_stop=False)
    assert output.forwards == 8 and output.steps.tolist() == [8, 8, 8] and output.tokens_per_forward == 1.0
    assert transfer_schedule(4, 6) == [1, 1, 1, 1, 0, 0] and transfer_schedule(7, 3) == [3, 2, 2]


def test_the_head_sees_only_what_can_be_decided(model):
    spy = Spy(model)
    generate(spy, PROMPTS, gen_length=8, block_length=4, early_stop=False)
    assert spy.wanted == [4, 3, 2, 1] * 2 and set(spy.sequences) == {3}
    spy = Spy(model)
    generate(spy, PROMPTS, gen_length=8, block_length=4, steps=4, remasking="random", early_stop=False)
    assert spy.wanted == [2, 2, 2, 2]
    spy = Spy(model)
    generate(spy, PROMPTS, gen_length=8, cfg_scale=0.5, early_stop=False)
    assert set(spy.sequences) == {6}


def test_finished_sequences_leave_the_batch(model):
    spy = Spy(model)
    output = generate(spy, PROMPTS, gen_length=64, block_length=4)
    assert spy.sequences[-1] < 3 and sum(spy.sequences) == int(output.steps.sum())


# --- interface


def test_trace_replays_the_answer(model):
    seen = []
    output = generate(
        model,
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
    generate(model, PROMPTS, gen_length=2)
    assert model.training and not model.model.transformer.blocks[0].training
    model.eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 10, "block_length": 4}, "10 is not a multiple of block_length 4.*gen_length 8"),
        ({"gen_length": 16, "block_length": 4, "steps": 10}, "steps 10 .* over 4 blocks.*for example 8"),
        ({"gen_length": 16, "block_length": 4, "steps": 2}, "must be a multiple of 4, for example 4"),
        ({"gen_length": 0}, "gen_length must be a whole number of at least 1, got 0"),
        ({"gen_len": 4}, "no setting 'gen_len'; did you mean 'gen_length'"),
        ({"num_beams": 4}, "num_beams 4 has no meaning for a diffusion sampler; num_return_sequences"),
        ({"min_new_tokens": 4}, "min_new_tokens 4 has no meaning"),
        ({"guidance_scale": 2.0}, "guidance_scale 2.0 has no meaning .*; cfg_scale guides"),
        ({"top_k": 4}, "top_k 4 cuts a distribution; it needs a temperature above 0"),
        ({"top_p": 0.0, "do_sample": True}, "top_p must be a number from 0 to 1, got 0"),
        ({"stop_strings": ["x"]}, "stop_strings are found in text: give generate.. the tokenizer"),
        ({"remasking": "lowconf"}, "remasking 'lowconf' is not one of low_confidence, random, max_"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0, got -1.0"),
        ({"threshold": 1.5}, "threshold must be a number from 0 to 1, got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0, got 0.0"),
        ({"entropy_bound": float("nan")}, "entropy_bound must be a number of at least 0, got nan"),
        ({"steps": 2.0}, "steps must be a whole number of at least 1, got 2.0"),
        ({"early_stop": "yes"}, "early_stop must be true or false, got 'yes'"),
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
        generate(model, PROMPTS, **settings)


def test_errors_about_prompts(model):
    with pytest.raises(ValueError, match=r"prompt 1 is empty.*BOS"):
        generate(model, [[1], []])
    with pytest.raises(ValueError, match="prompt 0 contains the mask token 39"):
        generate(model, [[1, 39]])
    with pytest.raises(ValueError, match="no prompts"):
        generate(model, [])
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(model, ids, attention_mask=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="must have the shape"):
        generate(model, ids, attention_mask=torch.ones(1, 4, dtype=torch.long))


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
    assert torch.equal(generate(again, PROMPTS).sequences, generate(model, PROMPTS).sequences)
    assert GenerationConfig.from_pretrained(tmp_path).gen_length == 8  # transformers' own class reads it
    assert LLaDAGenerationConfig.from_pretrained(tmp_path).cache == "dual"


def test_max_new_tokens_is_another_name(model):
    assert generate(model, PROMPTS, max_new_tokens=6).sequences.shape == (3, 13)
    assert LLaDAGenerationConfig(max_new_tokens=6).gen_length == 6
    foreign = GenerationConfig(max_new_tokens=5)
    assert generate(model, PROMPTS, generation_config=foreign).sequences.shape == (3, 12)


@pytest.mark.parametrize("method", ["fixed_length", "semi_autoregressive_padding"])
def test_infill_reads_what_stands_behind_the_hole(method):
    model = peaked_model()
    mask_id = model.config.mask_token_id
    prompts, suffixes, lengths = PROMPTS[:2], [[9, 30, 4], [17]], [4, 8]
    output = generate(
        model,
        prompts,
        gen_length=lengths,
        suffixes=suffixes,
        method=method,
        block_length=4,
        early_stop=False,
        logits_eos_inf=True,
    )
    for prompt, suffix, length, answer in zip(prompts, suffixes, lengths, output.completions, strict=True):
        canvas, start = torch.tensor([*prompt, *[mask_id] * length, *suffix]), len(prompt)
        width = length if method == "fixed_length" else 4
        for step in range(length):  # the surest masked token of the block, one after the other
            logits = model(input_ids=canvas[None]).logits[0].float()
            logits[:, mask_id] = logits[:, EOS] = -torch.inf
            sure, tokens = logits.softmax(-1).max(-1)
            first = start + step // width * width
            open_now = [i for i in range(first, first + width) if canvas[i] == mask_id]
            best = max(open_now, key=lambda i: float(sure[i]))
            canvas[best] = tokens[best]
        decided = canvas[start : start + length].tolist()
        end = next((i for i, token in enumerate(decided) if token == EOT), length)
        assert answer == decided[:end]
    with pytest.raises(ValueError, match="exceed the model's context"):
        generate(model, [[5]], gen_length=4, suffixes=[[6] * model.config.max_sequence_length])
    with pytest.raises(ValueError, match="semi_autoregressive_origin has none"):
        generate(
            model, [[5]], gen_length=4, suffixes=[[6]], method="semi_autoregressive_origin", block_length=4
        )
