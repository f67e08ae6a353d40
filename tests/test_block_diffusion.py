"""Block diffusion: two streams in one row, against sums, other losses and forwards that need no streams."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from llada.diffusion.batches import Example, Noised, collate
from llada.diffusion.likelihood import Request, score_answers
from llada.diffusion.losses import masked_diffusion_loss
from llada.diffusion.masking import draw_block_noise, draw_noise, generator
from llada.diffusion.settings import LikelihoodSettings, MaskSettings
from modelling_final.generation_llada import generate
from modelling_final.lean_llada import LeanForward
from tiny_llada import V, make_model

MASK = V - 1
LENGTH = 10
X_0 = np.random.RandomState(0).randint(1, MASK, LENGTH)
BLOCKS = {"attention_pattern": "block_causal"}


def batch_of(*items, block_size, packed=False):
    """A batch whose rows are records given as (tokens, is_masked, weight)."""
    rows = [
        Noised(Example(tokens, np.ones(len(tokens), dtype=bool), 1.0, len(tokens)), is_masked, weight, i)
        for i, (tokens, is_masked, weight) in enumerate(items)
    ]
    rows = [rows] if packed else [[row] for row in rows]
    return collate(rows, mask_id=MASK, pad_id=0, packed=packed, block_size=block_size)


def nll_of(model, x_0, is_masked, block_size):
    """[M] -log p of the masked tokens of one record."""
    with torch.no_grad():
        return model(**batch_of((x_0, is_masked, 1.0), block_size=block_size).inputs).nll


def nll_block_by_block(model, x_0, is_masked, block_size):
    """The same with a forward for every block: clean tokens before it, its noised ones, and nothing else."""
    found = []
    for start in range(0, len(x_0), block_size):
        end = min(start + block_size, len(x_0))
        row = torch.tensor(x_0[:end])
        row[start:end][torch.from_numpy(is_masked[start:end])] = MASK
        with torch.no_grad():
            log_p = model(row[None]).logits[0, start:end].log_softmax(-1)
        nll = -log_p.gather(1, torch.tensor(x_0[start:end])[:, None])[:, 0]
        found.append(nll[torch.from_numpy(is_masked[start:end])])
    return torch.cat(found)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("shift", [False, True])
def test_one_forward_gives_what_a_forward_for_each_block_gives(block_size, shift, kernel):
    model = make_model(kernel=kernel, **BLOCKS, attention_block_size=block_size, logit_shift=shift)
    is_masked = np.random.RandomState(1).rand(LENGTH) < 0.6
    one = nll_of(model, X_0, is_masked, block_size)
    torch.testing.assert_close(one, nll_block_by_block(model, X_0, is_masked, block_size), atol=2e-6, rtol=0)


def test_blocks_of_one_token_all_masked_are_the_autoregressive_loss():
    model = make_model(**BLOCKS, attention_block_size=1, logit_shift=True)
    all_masked = np.ones(LENGTH, dtype=bool)
    found = nll_of(model, X_0, all_masked, 1)[1:]  # nothing stands before the first token
    shifted = make_model(**BLOCKS, attention_block_size=1)  # the same weights, read as an AR model
    with torch.no_grad():
        log_p = shifted(torch.tensor(X_0)[None]).logits[0, :-1].log_softmax(-1)
    ar = -log_p.gather(1, torch.tensor(X_0[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, ar, atol=1e-6, rtol=1e-6)


def test_one_block_of_full_length_is_the_masked_diffusion_loss():
    maskable = np.arange(LENGTH) >= 2
    one, weight = draw_noise(maskable, 1.0, generator(0, "mask", 1))
    blocks, weights = draw_block_noise(maskable, 1.0, generator(0, "mask", 1), block_size=LENGTH)
    assert np.array_equal(one, blocks) and np.all(weights == weight)
    full, model = make_model(), make_model(**BLOCKS, attention_block_size=LENGTH)
    there = batch_of((X_0, one, weight), block_size=None)
    here = batch_of((X_0, blocks, weights), block_size=LENGTH)
    losses = [masked_diffusion_loss(full, there, 3.0), masked_diffusion_loss(model, here, 3.0)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for one, other in zip(full.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-4)


def test_the_expected_loss_is_the_sum_over_all_masks():
    # every mask of each block, by its exact probability at p = 1/2: the mean of many draws must be that sum
    size, num = 2, 4
    model = make_model(**BLOCKS, attention_block_size=size)
    x_0 = X_0[:num]
    masks = [np.array(bits, dtype=bool) for bits in itertools.product([0, 1], repeat=num)]
    losses = {
        mask.tobytes(): float(nll_of(model, x_0, mask, size).sum() / 0.5) for mask in masks if mask.any()
    }
    exact = sum(losses.values()) / len(masks)
    by_block = 0.0  # the same sum, block by block: the noise of one block does not reach another
    for start in range(0, num, size):
        for bits in itertools.product([0, 1], repeat=size):
            mask = np.zeros(num, dtype=bool)
            mask[start : start + size] = bits
            by_block += losses.get(mask.tobytes(), 0.0) / 2**size
    assert by_block == pytest.approx(exact, abs=1e-4)

    half = (0.5 - 1e-3) / (1 - 1e-3)  # the time at which p_mask is 1/2
    draws = [
        draw_block_noise(np.ones(num, dtype=bool), 1.0, generator(0, i), block_size=size,
                         t_range=(half - 1e-12, half + 1e-12))
        for i in range(4000)
    ]  # fmt: skip
    assert all(np.allclose(weights, 2.0) for _, weights in draws)
    found = np.array([losses.get(mask.tobytes(), 0.0) for mask, _ in draws])
    assert abs(found.mean() - exact) < 4 * found.std() / len(draws) ** 0.5


def test_times_of_blocks_are_their_own_and_in_range():
    maskable = np.ones(4000, dtype=bool)
    _, weights = draw_block_noise(maskable, 1.0, generator(0), block_size=100, t_range=(0.3, 0.8))
    p = 1 / weights.reshape(40, 100)
    assert np.all(p == p[:, :1]) and len(np.unique(p[:, 0])) == 40
    assert p.min() >= 0.3 and p.max() <= 0.8 + 1e-3 and p.min() < 0.35 and p.max() > 0.75


@pytest.mark.parametrize("packed", [False, True])
def test_no_leak(packed):
    # the loss of a noised block must not depend on its own clean tokens, on later ones, or on other records
    size = 4
    model = make_model(**BLOCKS, attention_block_size=size)
    is_masked = np.ones(LENGTH, dtype=bool)
    other = (X_0[::-1].copy(), is_masked, 1.0)
    batch = batch_of((X_0, is_masked, 1.0), other, block_size=size, packed=packed)
    embeds = model.model.transformer.wte(batch.input_ids).detach().requires_grad_()
    inputs = {name: value for name, value in batch.inputs.items() if name not in ("input_ids", "targets")}
    block = 1
    rows = torch.arange(block * size, (block + 1) * size)  # of the first record's noised copy
    logits = model(inputs_embeds=embeds, **inputs | {"rows": rows}).logits
    logits.log_softmax(-1)[torch.arange(size), torch.tensor(X_0[rows])].sum().backward()
    reach = embeds.grad.abs().sum(-1).flatten()
    seen = torch.zeros_like(reach, dtype=torch.bool)
    seen[rows] = True
    seen[LENGTH : LENGTH + block * size] = True  # the clean blocks before it
    assert (reach[seen] > 0).all() and (reach[~seen] == 0).all()


@pytest.mark.parametrize("shift", [False, True])
def test_packed_rows_give_the_loss_of_padded_ones(shift):
    size = 4
    model = make_model(**BLOCKS, attention_block_size=size, logit_shift=shift)
    random = np.random.RandomState(2)
    items = [(random.randint(1, MASK, n), random.rand(n) < 0.5, 1 / n) for n in (10, 3, 7)]
    padded, packed = (batch_of(*items, block_size=size, packed=p) for p in (False, True))
    assert padded.attention_mask is not None and packed.document_borders is not None
    one, other = (masked_diffusion_loss(model, batch, 2.0) for batch in (padded, packed))
    torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6)


def test_streams_need_attention_by_blocks():
    batch = batch_of((X_0, np.ones(LENGTH, dtype=bool), 1.0), block_size=4)
    with pytest.raises(ValueError, match="clean_columns need attention_pattern block_causal"):
        make_model()(**batch.inputs)


PROMPTS = [[5, 6, 7], [*range(8, 21)], [15]]  # of differing length: blocks begin at other columns


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_length": 8},
        {"block_length": 3, "gen_length": 12},
        {"steps": 8},
        {"temperature": 1.0},
        {"early_stop": False},
        {"parallel_decoding": "threshold", "threshold": 0.1},
        {"num_return_sequences": 2, "temperature": 1.0},
        {"method": "semi_autoregressive_origin"},
        {"remdm": "cap"},
    ],
    ids=str,
)
def test_the_cache_of_finished_blocks_changes_no_token(settings, shift):
    model = make_model(**BLOCKS, attention_block_size=4, logit_shift=shift, eos_token_id=3)
    settings = {"gen_length": 16, "block_length": 4, "seed": 1, **settings}
    plain = generate(model, PROMPTS, **settings)
    cached = generate(model, PROMPTS, cache="blocks", **settings)
    assert torch.equal(cached.sequences, plain.sequences) and cached.forwards == plain.forwards
    assert cached.is_approximate == ("parallel_decoding" in settings or "remdm" in settings)


def test_the_cache_of_finished_blocks_reads_each_column_once(monkeypatch):
    model = make_model(**BLOCKS, attention_block_size=4)
    monkeypatch.setattr(LeanForward, "fits", lambda _: False)  # so that every forward is the module's own
    seen = []
    model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    generate(model, [[5, 6, 7, 8]], gen_length=12, block_length=4, steps=6, cache="blocks")
    # the prompt, and each block twice; what was decided last in a block is read once more to be kept
    assert seen == [4, 4, 4, 4, 4, 4, 4, 4, 4]


def test_the_cache_of_finished_blocks_is_refused_where_it_would_change_tokens():
    with pytest.raises(ValueError, match="cache blocks needs a model that attends by blocks"):
        generate(make_model(), PROMPTS, gen_length=4, cache="blocks")
    with pytest.raises(ValueError, match="cache blocks keeps no second branch for cfg_scale"):
        generate(make_model(), PROMPTS, gen_length=4, cache="blocks", cfg_scale=0.5)


def test_a_likelihood_is_the_sum_of_its_blocks_bounds():
    size, context = 4, X_0[:3]
    answer = np.random.RandomState(3).randint(1, MASK, 7)
    x_0, exact = np.concatenate([context, answer]), 0.0
    model = make_model(**BLOCKS, attention_block_size=size)
    for start, end in ((3, 4), (4, 8), (8, 10)):  # the answer's first block begins in the context
        n = end - start
        for bits in itertools.product([0, 1], repeat=n):
            if num := sum(bits):
                is_masked = np.zeros(len(x_0), dtype=bool)
                is_masked[start:end] = bits
                nll = float(nll_block_by_block(model, x_0, is_masked, size).sum())
                exact -= nll * (n / num) / math.comb(n, num) / n  # l ~ U{1..n}, then a set of l tokens
    request = Request(tuple(context.tolist()), tuple(answer.tolist()), "key")
    (score,) = score_answers(model, [request], LikelihoodSettings())
    assert score.log_likelihood == pytest.approx(exact, abs=1e-4)
    assert score.standard_error == 0 and score.num_forwards == 1 + 15 + 3
    masks = MaskSettings(num_masks=2, exact_tokens=0, estimator="iid")
    draws = [
        score_answers(model, [request._replace(key=str(i))], LikelihoodSettings(masks=masks))[0]
        for i in range(300)
    ]
    values = np.array([draw.log_likelihood for draw in draws])
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5
    told = np.mean([draw.standard_error**2 for draw in draws]) ** 0.5
    assert told == pytest.approx(values.std(), rel=0.3)  # both are estimates themselves


def test_the_likelihood_of_blocks_of_one_token_is_exact():
    model = make_model(**BLOCKS, attention_block_size=1, logit_shift=True)
    x_0 = torch.tensor(X_0)
    with torch.no_grad():
        log_p = model(x_0[None]).logits[0].log_softmax(-1)
    (score,) = score_answers(
        model, [Request(tuple(X_0[:2].tolist()), tuple(X_0[2:].tolist()), "")], LikelihoodSettings()
    )
    exact = float(log_p[torch.arange(2, LENGTH), x_0[2:]].sum())
    assert score.log_likelihood == pytest.approx(exact, abs=1e-5) and score.standard_error == 0


def edited(model, prompt, gen_length, size, threshold, editing_threshold):
    """LLaDA2.1's loop, written for one sequence without a cache and without an end."""
    x = torch.tensor([[*prompt, *[MASK] * gen_length]])
    for start in range(len(prompt), len(prompt) + gen_length, size):
        block, post = slice(start, start + size), 0
        for _ in range(size + 16):
            with torch.no_grad():
                logits = model(x[:, : start + size]).logits[0, block]
            best = logits.index_fill(1, torch.tensor([MASK]), -torch.inf).argmax(-1)
            p = logits.softmax(-1).gather(1, best[:, None])[:, 0]
            old, masked = x[0, block], x[0, block] == MASK
            sure = masked & (p > threshold)
            if masked.any() and not sure.any():
                sure[torch.where(masked, p, -1).argmax()] = True
            edits = ~masked & (p > editing_threshold) & (best != old)
            x[0, block] = torch.where(sure | edits, best, old)
            post += int(not masked.any())
            if not (x[0, block] == MASK).any() and (not edits.any() or post >= 16):
                break
    return x[0, len(prompt) :].tolist()


@pytest.mark.parametrize("cache", ["none", "blocks"])
def test_editing_is_the_published_loop(cache):
    model = make_model(**BLOCKS, attention_block_size=4)
    flags = {"parallel_decoding": "threshold", "threshold": 0.15, "block_length": 4, "gen_length": 16}
    flags |= {"early_stop": False, "cache": cache}
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16], [17, 18, 19, 20]]
    found = generate(model, prompts, editing_threshold=0.05, **flags)
    plain = generate(model, prompts, **flags)
    answers = found.sequences[:, 8:].tolist()
    assert answers == [edited(model, prompt, 16, 4, 0.15, 0.05) for prompt in prompts]
    assert answers != plain.sequences[:, 8:].tolist() and found.is_approximate
    never = generate(model, prompts, editing_threshold=1.0, **flags)
    assert torch.equal(never.sequences, plain.sequences)
    with pytest.raises(
        ValueError, match=r"editing_threshold 0\.5 needs parallel_decoding threshold, not none"
    ):
        generate(model, prompts, editing_threshold=0.5, gen_length=4)


def test_blocks_longer_than_the_models_are_warned_of():
    model = make_model(**BLOCKS, attention_block_size=4)
    with pytest.warns(
        UserWarning, match=r"attends by blocks of 4 .* here blocks of 8 .* give block_length 4"
    ):
        generate(model, PROMPTS, gen_length=8, block_length=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, PROMPTS, gen_length=8, block_length=4)
        generate(make_model(**BLOCKS, attention_block_size=1), PROMPTS, gen_length=8, block_length=8)
