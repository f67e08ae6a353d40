"""WindowCache: over unchanged tokens a window forward gives the full forward's logits."""

import pytest
import torch
from torch.testing import assert_close

from modelling_final import WindowCache
from modelling_final.cache_llada import window_of
from tiny_llada import B, L, make_batch, make_model

PATTERNS = [{}, {"attention_pattern": "block_causal", "attention_block_size": 4}, {"logit_shift": True}]


@pytest.fixture(params=PATTERNS, ids=["full", "block_causal", "logit_shift"])
def model(request):
    return make_model(**request.param)


@pytest.mark.parametrize("window", [(4, 8), (6, L), (0, L)])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_window_over_unchanged_tokens_equals_the_full_forward(model, side, window):
    ids, mask, positions = make_batch(side)
    full = model(ids, attention_mask=mask, position_ids=positions).logits
    cache = WindowCache(model.config)
    filled = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert filled.past_key_values is cache
    assert_close(filled.logits, full, atol=1e-5, rtol=0)
    keys_before = cache.layers[1].keys.clone()
    storage = cache.layers[1].keys.data_ptr()

    start, end = cache.window = window
    for _ in range(2):  # a second time over what the first has overwritten
        part = model(
            ids[:, start:end],
            attention_mask=mask,
            position_ids=positions[:, start:end],
            past_key_values=cache,
        ).logits
        assert_close(part, full[:, start:end], atol=1e-5, rtol=0)
    assert cache.layers[1].keys.data_ptr() == storage and cache.get_seq_length() == L
    assert_close(cache.layers[1].keys, keys_before, atol=1e-5, rtol=0)


@torch.no_grad()
def test_default_positions_follow_the_window():
    model = make_model()
    ids, _, _ = make_batch("none")
    cache = WindowCache(model.config)
    full = model(ids, past_key_values=cache).logits
    cache.window = (5, 9)
    assert_close(model(ids[:, 5:9], past_key_values=cache).logits, full[:, 5:9], atol=1e-5, rtol=0)


@torch.no_grad()
def test_changed_tokens_change_the_window_and_only_its_keys():
    model = make_model()
    ids, mask, _ = make_batch("right")
    cache = WindowCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    changed = ids.clone()
    changed[:, 4:8] = model.config.mask_token_id
    cache.window = (4, 8)
    part = model(changed[:, 4:8], attention_mask=mask, past_key_values=cache).logits
    for layer, old in zip(cache.layers, before, strict=True):
        is_same = (layer.keys == old).all(dim=-1).all(dim=1).all(dim=0)
        assert is_same.tolist() == [not 4 <= i < 8 for i in range(L)]
    # deeper layers attend to old keys outside the window: an approximation of the full forward
    assert (part - model(changed, attention_mask=mask).logits[:, 4:8]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["none", "right"])
@torch.no_grad()
def test_appending_block_by_block_is_exact_for_a_block_causal_model(side):
    model = make_model(attention_pattern="block_causal", attention_block_size=4)
    ids, mask, _ = make_batch(side)
    full = model(ids, attention_mask=mask).logits
    cache, parts = WindowCache(model.config), []
    for start in range(0, L, 4):
        rows = slice(start, start + 4)
        parts.append(model(ids[:, rows], attention_mask=mask[:, : rows.stop], past_key_values=cache).logits)
    assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=0)


@torch.no_grad()
def test_finished_sequences_leave_the_batch(model):
    ids, mask, positions = make_batch("left")
    full = model(ids, attention_mask=mask, position_ids=positions).logits
    for kept in (torch.tensor([2, 0]), torch.tensor([False, True, True])):
        cache = WindowCache(model.config)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.batch_select_indices(kept)
        cache.window = (5, 9)
        part = model(
            ids[kept, 5:9],
            attention_mask=mask[kept],
            position_ids=positions[kept, 5:9],
            past_key_values=cache,
        ).logits
        assert_close(part, full[kept, 5:9], atol=1e-5, rtol=0)


@torch.no_grad()
def test_crop_then_append_is_fast_dllms_prefix_cache(model):
    ids, mask, positions = make_batch("right")
    full = model(ids, attention_mask=mask, position_ids=positions).logits
    cache = WindowCache(model.config)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.crop(-(L - 6))
    rest = model(ids[:, 6:], attention_mask=mask, position_ids=positions[:, 6:], past_key_values=cache).logits
    assert_close(rest, full[:, 6:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_replace_position_is_a_window_for_one_call():
    model = make_model()
    ids, mask, _ = make_batch("right")
    cache = WindowCache(model.config)
    full = model(ids, attention_mask=mask, past_key_values=cache).logits
    marked = torch.zeros(B, L, dtype=torch.bool)
    marked[:, 3:7] = True
    for given in (marked, (3, 7)):
        part = model(ids[:, 3:7], attention_mask=mask, past_key_values=cache, replace_position=given).logits
        assert_close(part, full[:, 3:7], atol=1e-5, rtol=0)
        assert cache.window is None
    with pytest.raises(ValueError, match="has 4"):
        model(ids[:, 3:8], past_key_values=cache, replace_position=marked)
    assert cache.window is None


@torch.no_grad()
def test_query_positions_inside_a_window(model):
    ids, mask, positions = make_batch("left")
    full = model(ids, attention_mask=mask, position_ids=positions).logits
    cache = WindowCache(model.config)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.window = (4, 10)
    wanted = torch.tensor([[0, 5], [3, 1], [2, 2]])  # counted from the window's start
    part = model(
        ids[:, 4:10],
        attention_mask=mask,
        position_ids=positions[:, 4:10],
        past_key_values=cache,
        query_positions=wanted,
    ).logits
    assert_close(part, full[torch.arange(B)[:, None], wanted + 4], atol=1e-5, rtol=0)


def test_reset_and_repeat():
    model = make_model(logit_shift=True)
    ids, mask, positions = make_batch("left")
    cache = WindowCache(model.config)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        cache.batch_repeat_interleave(2)
        cache.window = (5, 9)
        twice = [x.repeat_interleave(2, dim=0) for x in (ids, mask, positions)]
        part = model(
            twice[0][:, 5:9], attention_mask=twice[1], position_ids=twice[2][:, 5:9], past_key_values=cache
        ).logits
    assert_close(part, full[:, 5:9].repeat_interleave(2, dim=0), atol=1e-5, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.window is cache.positions is cache.hidden is None


def test_use_cache_makes_one():
    model = make_model()
    ids, _, _ = make_batch("none")
    with torch.no_grad():
        assert model(ids).past_key_values is None
        cache = model(ids, use_cache=True).past_key_values
    assert isinstance(cache, WindowCache) and cache.get_seq_length() == L


def test_wrong_windows_and_masks_are_refused():
    model = make_model()
    ids, mask, _ = make_batch("right")
    cache = WindowCache(model.config)
    with pytest.raises(ValueError, match=r"window \(0, 4\) must lie within the 0 keys"):
        cache.window = (0, 4)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"window \(10, 14\) must lie within the 12 keys"):
        cache.window = (10, 14)
    cache.window = (2, 6)
    with pytest.raises(ValueError, match=r"input has 5 rows and cache.window \(2, 6\) has 4"):
        model(ids[:, 2:7], past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"attention_mask must cover all keys: shape \(3, 12\), not \(3, 4\)"
    ):
        model(ids[:, 2:6], attention_mask=mask[:, 2:6], past_key_values=cache)
    with pytest.raises(ValueError, match="must be a WindowCache, got list"):
        model(ids, past_key_values=[])
    with pytest.raises(ValueError, match="give past_key_values"):
        model(ids, replace_position=(0, 4))
    gap = torch.tensor([[True, False, True]])
    for marks in (gap, ~torch.eye(3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="one contiguous span"):
            window_of(marks)
