"""The sampler's lean forward is the model's to the bit, and is left where a module does more than compute."""

from functools import partial

import pytest
import torch

from bench_forward import peak_bytes
from modelling_final import WindowCache, lean_llada, remasking_llada
from modelling_final.lean_llada import LeanForward
from modelling_final.orders_llada import ORDERS, confidence
from modelling_final.remasking_llada import choose_tokens, order_scores
from peaked_llada import PROMPTS, answers, peaked_model
from tiny_llada import B, L, make_batch, make_model

MODELS = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "biased": {"include_qkv_bias": True},
    "tied": {"weight_tying": True},
    "block causal": {"attention_pattern": "block_causal", "attention_block_size": 4},
    "eager": {"kernel": "eager"},
    "normed heads": {"query_key_norm": True},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_logits_are_the_models_bit_by_bit(name, dtype, side):
    model = make_model(**MODELS[name]).to(dtype)
    ids, mask, positions = make_batch(side)
    wanted = torch.tensor([[11, 3], [6, 8], [5, 11]])
    given = {"attention_mask": mask, "position_ids": positions} if side == "left" else {}
    assert LeanForward.fits(model)
    lean = LeanForward(model, L)
    for rows in (None, wanted):
        expected = model(ids, query_positions=rows, **given).logits
        assert torch.equal(lean(ids, query_positions=rows, **given), expected)
    caches = [WindowCache(model.config) for _ in range(2)]
    for run, cache in zip((lambda **x: model(**x).logits, lean), caches, strict=True):
        run(input_ids=ids, past_key_values=cache, **given)
        cache.window = (4, 8)
    window = {"input_ids": ids[:, 4:8].flip(1), "position_ids": positions[:, 4:8] if given else None}
    window |= {"attention_mask": mask} if given else {}
    model_logits = model(**window, past_key_values=caches[0]).logits
    assert torch.equal(lean(**window, past_key_values=caches[1]), model_logits)
    assert torch.equal(caches[0].layers[0].keys, caches[1].layers[0].keys) and len(ids) == B


def test_a_module_that_does_more_is_run_as_it_is():
    assert not LeanForward.fits(make_model(logit_shift=True))
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not LeanForward.fits(make_model(rope_parameters=scaling))
    model = make_model()
    hook = model.model.transformer.blocks[1].up_proj.register_forward_hook(lambda *_: None)
    assert not LeanForward.fits(model)
    hook.remove()
    assert LeanForward.fits(model)


@torch.no_grad()
def test_forwards_put_into_modules_and_autocast_are_heeded():
    model, ids = make_model(query_key_norm=True), make_batch()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LeanForward(model, L)(ids), model(ids).logits)
    part = model.model.transformer.blocks[1].up_proj
    part.forward = lambda x: 2 * type(part).forward(part, x)  # as accelerate does
    assert torch.equal(LeanForward(model, L)(ids), model(ids).logits)


@pytest.mark.parametrize("settings", [{}, {"cache": "dual"}, {"cfg_scale": 1.5}, {"temperature": 0.7}])
def test_answers_are_those_of_the_models_forward(monkeypatch, settings):
    model = peaked_model()
    settings = {"gen_length": 16, "block_length": 8, **settings}
    lean = model.generate(PROMPTS, return_dict_in_generate=True, **settings)
    monkeypatch.setattr(lean_llada.LeanForward, "fits", lambda model: False)
    assert answers(model.generate(PROMPTS, return_dict_in_generate=True, **settings), 16) == answers(lean, 16)


@pytest.mark.parametrize("last_ids", [None, torch.tensor([2, 5])])
def test_rows_at_a_time_give_the_same_bits(monkeypatch, last_ids):
    logits = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = choose_tokens(logits, draws, temperature=0.7, mask_id=10)
    functions = [confidence, *(score for score in ORDERS.values() if score is not None)]
    expected = [order_scores(score, logits, whole, last_ids) for score in functions]
    for num_rows in (1, 2, 5):
        monkeypatch.setitem(remasking_llada.CHUNK_ELEMENTS, "cpu", num_rows * 11)
        assert torch.equal(choose_tokens(logits, draws, temperature=0.7, mask_id=10), whole)
        for score, values in zip(functions, expected, strict=True):
            assert torch.equal(order_scores(score, logits, whole, last_ids), values)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 2},
        {"steps": 2, "cache": "dual", "confidence_eos_eot_inf": True},
        {"parallel_decoding": "threshold", "threshold": 8e-6},
        {"parallel_decoding": "threshold", "threshold": 8e-6, "editing_threshold": 0.9},
        {"steps": 4, "remdm": "cap", "remasking": "random"},
    ],
)
def test_sampling_needs_little_beside_the_logits_of_one_forward(settings):
    # 32 rows of the published vocabulary; a step's logits are gone before the next forward makes its own
    model = make_model(d_model=8, n_layers=1, vocab_size=126_464, embedding_size=126_464)
    lengths = {"gen_length": 32, "block_length": 32, "temperature": 1.0, "early_stop": False}
    prompt = torch.ones(1, 4, dtype=torch.long)
    run = partial(model.generate, prompt, **lengths, **settings)
    run()
    assert peak_bytes(run, "cpu") < 1.1 * 32 * 126_464 * 4
