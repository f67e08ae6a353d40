"""Masks mean the same to every kernel or are refused; padding is never seen; rotary tables stay exact."""

import pytest
import torch
from torch.testing import assert_close

from modelling_final import LLaDAModelLM, WindowCache
from tiny_llada import B, L, additive, clone, make_batch, make_model


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_never_seen(kernel, side):
    model = make_model(kernel=kernel)
    ids, mask, positions = make_batch(side)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert logits.isfinite().all()
    for row in range(B):
        alone = model(ids[row][mask[row].bool()][None]).logits[0]
        assert_close(logits[row][mask[row].bool()], alone, atol=1e-5, rtol=0)
    for form in (mask.bool(), mask.float(), mask[:, None, None, :].expand(B, 1, L, L).bool()):
        assert_close(
            model(ids, attention_mask=form, position_ids=positions).logits, logits, atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_positions_are_columns_by_default_under_padding_too():
    model = make_model()
    ids, mask, positions = make_batch("left")
    columns = torch.arange(L)[None]
    default = model(ids, attention_mask=mask).logits
    assert torch.equal(default, model(ids, attention_mask=mask, position_ids=columns).logits)
    # rotary attention only knows differences, so counting from the first real token changes rounding at most
    counted = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(counted[mask.bool()], default[mask.bool()], atol=1e-4, rtol=0)


@torch.no_grad()
def test_dense_masks_mean_the_same_to_every_kernel_and_combine_with_padding():
    ids, mask, _ = make_batch("right")
    sdpa, eager = make_model(), make_model(kernel="eager")
    allowed = torch.rand(B, 1, L, L, generator=torch.Generator().manual_seed(0)) < 0.6
    allowed |= torch.eye(L, dtype=torch.bool)
    expected = sdpa(ids, attention_mask=allowed & mask[:, None, None, :].bool()).logits
    for model in (sdpa, eager):
        for bias in (allowed, allowed.to(torch.int8), additive(allowed)):
            logits = model(ids, attention_mask=mask, attention_bias=bias).logits
            assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


def test_masks_that_a_kernel_would_misread_are_refused():
    ids, mask, _ = make_batch("right")
    dense = torch.ones(B, 1, L, L, dtype=torch.bool)
    model = make_model(kernel="flex_attention")
    with pytest.raises(ValueError, match="flex_attention cannot take a dense 4-D mask"):
        model(ids, attention_mask=dense)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 cannot take a dense 4-D mask"):
        model(ids, attention_bias=dense)
    with pytest.raises(ValueError, match="flash_attention_2 takes the last rows' padding"):
        cache = WindowCache(model.config)
        model.config._attn_implementation = "sdpa"
        model(ids, past_key_values=cache)
        model.config._attn_implementation = "flash_attention_2"
        cache.window = (2, 4)
        model(ids[:, 2:4], attention_mask=mask, past_key_values=cache)
    model = make_model(attention_pattern="block_causal", attention_block_size=4)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 has no block-causal attention"):
        model(ids)
    with pytest.raises(ValueError, match="attention_mask is 4-D"):
        model(ids, attention_mask=dense, attention_bias=dense)
    with pytest.raises(
        ValueError, match=r"attention_mask must cover all keys: shape \(3, 12\), not \(3, 5\)"
    ):
        model(ids, attention_mask=mask[:, :5])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_block_causal_rows_see_no_later_block(kernel, side):
    ids, mask, positions = make_batch(side)
    model = make_model(kernel=kernel, attention_pattern="block_causal", attention_block_size=4)
    block = positions // 4
    allowed = (block[:, None, :] <= block[:, :, None]) & mask[:, None, :].bool()
    expected = clone(model, kernel=kernel)(
        ids, attention_mask=allowed[:, None], position_ids=positions
    ).logits
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
    # by default blocks are of columns; then a padded row may see no key at all, and has to stay finite
    assert model(ids, attention_mask=mask).logits.isfinite().all()
    # counted by true positions, a sequence does not notice its padding
    alone = model(ids[1][mask[1].bool()][None]).logits[0]
    assert_close(logits[1][mask[1].bool()], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_block_causal_combines_with_a_dense_mask():
    ids, _, _ = make_batch()
    model = make_model(attention_pattern="block_causal", attention_block_size=4)
    causal = torch.ones(1, 1, L, L, dtype=torch.bool).tril()
    expected = clone(model)(
        ids, attention_mask=causal
    ).logits  # within blocks of 4, causal is the stricter one
    assert_close(model(ids, attention_bias=causal).logits, expected, atol=1e-5, rtol=0)
    assert_close(model(ids, attention_bias=additive(causal)).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rotary_tables_stay_float32_in_a_bfloat16_model(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = LLaDAModelLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = model.model.rotary_emb.inv_freq.clone()
    model = model.bfloat16()
    for each in (model, loaded):
        assert torch.equal(each.model.rotary_emb.inv_freq, exact)
        cos, _ = each.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[4095]]))
        assert cos.dtype == torch.float32
        assert_close(cos[0, 0, :4], (4095 * exact.double()).cos().float(), atol=1e-3, rtol=0)
    ids, _, _ = make_batch()
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_a_model_made_on_meta_gets_its_rotary_tables_back(tmp_path):
    make_model().save_pretrained(tmp_path)  # from_pretrained builds on meta, then fills
    assert torch.equal(
        LLaDAModelLM.from_pretrained(tmp_path).model.rotary_emb.inv_freq,
        make_model().model.rotary_emb.inv_freq,
    )
