"""LLaDAConfig: published fields in and out unchanged, and every field that would be ignored is refused."""

import json
import math

import pytest
import torch
from transformers import AutoConfig

from modelling_final import LLaDAConfig
from modelling_final.attention_llada import LLaDARotaryEmbedding
from tiny_llada import PUBLISHED

OURS = {
    "eot_token_id": None,
    "logit_shift": False,
    "attention_pattern": "full",
    "attention_block_size": None,
    "rope_parameters": None,
}


def write(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def saved(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_published_file_loads_and_saves_field_by_field(tmp_path):
    assert len(PUBLISHED) == 46
    config = AutoConfig.from_pretrained(write(tmp_path, PUBLISHED))
    assert type(config) is LLaDAConfig
    for name, value in PUBLISHED.items():
        assert name == "transformers_version" or getattr(config, name) == value, name
    after = saved(config, tmp_path / "again")
    del after["transformers_version"]
    masked_lm = {"AutoModelForMaskedLM": "modeling_llada.LLaDAModelLM"}
    auto_map = {"auto_map": PUBLISHED["auto_map"] | masked_lm}
    assert after == {k: v for k, v in PUBLISHED.items() if k != "transformers_version"} | OURS | auto_map


def test_defaults_are_the_published_8b_model():
    fields = LLaDAConfig().to_dict()
    for name in PUBLISHED.keys() - {"architectures", "auto_map", "transformers_version"}:
        assert fields[name] == PUBLISHED[name], name


def test_transformers_names_reach_the_published_fields():
    config = LLaDAConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    assert (config.d_model, config.n_layers, config.n_heads, config.n_kv_heads) == (64, 3, 4, 2)
    assert (config.intermediate_size, config.max_position_embeddings) == (12288, 4096)
    assert config.tie_word_embeddings is False and config.hidden_act == "silu" and config.head_dim == 16
    assert "hidden_size" not in config.to_dict()


def test_null_sizes_are_derived():
    config = LLaDAConfig(d_model=64, n_heads=4, n_kv_heads=None, mlp_hidden_size=None, embedding_size=None)
    assert (config.n_kv_heads, config.mlp_hidden_size, config.embedding_size) == (4, 256, config.vocab_size)
    assert LLaDAConfig(n_kv_heads=None, multi_query_attention=True).n_kv_heads == 1
    assert LLaDAConfig(d_model=64, mlp_hidden_size=None, mlp_ratio=2.5).mlp_hidden_size == 160


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alibi": True}, "alibi True"),
        ({"input_emb_norm": True}, "input_emb_norm True"),
        ({"scale_logits": True}, "scale_logits True"),
        ({"attention_layer_norm": True}, "attention_layer_norm True"),
        ({"block_type": "sequential"}, "block_type 'sequential'"),
        ({"block_group_size": 4}, "block_group_size 4"),
        ({"layer_norm_type": "default"}, "layer_norm_type 'default'"),
        ({"activation_type": "swiglu"}, "activation_type 'swiglu'"),
        ({"include_bias": True}, "include_bias True"),
        ({"bias_for_layer_norm": True}, "bias_for_layer_norm True"),
        ({"layer_norm_with_affine": False}, "layer_norm_with_affine False"),
        ({"init_fn": "kaiming_normal"}, "init_fn 'kaiming_normal'"),
        ({"rope": False}, "rope False"),
        ({"n_heads": 3}, "d_model 4096 must be n_heads 3"),
        ({"n_kv_heads": 5}, "n_heads 32 must be a multiple of n_kv_heads 5"),
        ({"embedding_size": 100}, "embedding_size 100"),
        ({"vocab_size": 100, "embedding_size": 128}, "mask_token_id .* is outside the embedding's 128"),
        ({"eot_token_id": -1}, "eot_token_id -1"),
        ({"attention_pattern": "block_causal"}, "needs attention_block_size"),
        ({"attention_block_size": 32}, "only has a meaning with attention_pattern"),
        ({"rope_parameters": {"rope_type": "nope"}}, "rope_type 'nope'"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "rope_theta 10000.0 and"),
        ({"yarn": True}, "rope and yarn are both true"),
        ({"rope": False, "yarn": True, "yarn_extrapolation_factor": 0.5}, "yarn_extrapolation_factor 0.5"),
    ],
)
def test_unsupported_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        LLaDAConfig(**fields)


def test_ntk_scaling_is_a_larger_theta(tmp_path):
    config = LLaDAConfig()
    config.rope_theta *= 4  # as LongLLaDA does for 8k
    assert config.rope_parameters["rope_theta"] == 2e6
    exponents = torch.arange(0, 128, 2) / 128
    torch.testing.assert_close(LLaDARotaryEmbedding(config).inv_freq, 1 / 2e6**exponents)
    fields = saved(config, tmp_path)
    assert fields["rope_theta"] == 2e6 and fields["rope_parameters"] is None
    assert LLaDAConfig.from_pretrained(tmp_path, rope_theta=3e6).rope_parameters["rope_theta"] == 3e6


def test_rope_parameters_survive_saving_with_one_theta(tmp_path):
    given = {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "rope_theta": 1e4,
    }
    config = LLaDAConfig(rope_parameters=given, max_sequence_length=8192)
    assert config.rope_theta == 1e4 and len(given) == 4
    fields = saved(config, tmp_path)
    assert fields["rope_theta"] == 1e4 and "rope_theta" not in fields["rope_parameters"]
    again = LLaDAConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters and again.to_dict() == config.to_dict()


def yarn_by_hand(scale, length, beta_fast, beta_slow, theta=500000.0, dim=128):
    """Inverse frequencies and factor of LLada-Reasoning's YaRN, written from its description."""
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    low, high = (
        rounded(dim * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(theta)))
        for rounded, beta in ((math.floor, beta_fast), (math.ceil, beta_slow))
    )
    low, high = max(low, 0), min(high, dim - 1)
    ramp = [min(1.0, max(0.0, (i - low) / (high - low))) for i in range(dim // 2)]
    frequencies = [f / scale * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
    return torch.tensor(frequencies), 0.1 * math.log(scale) + 1.0 if scale > 1 else 1.0


@pytest.mark.parametrize(("beta_fast", "beta_slow", "is_swapped"), [(32.0, 1.0, False), (1.0, 32.0, True)])
def test_predecessor_yarn_is_translated_and_swapped_betas_are_honoured(
    tmp_path, recwarn, beta_fast, beta_slow, is_swapped
):
    fields = PUBLISHED | {
        "rope": False,
        "yarn": True,
        "yarn_scale": 2.0,
        "yarn_original_max_position_embeddings": 4096,
        "yarn_extrapolation_factor": 1.0,
        "yarn_attn_factor": 1.0,
        "yarn_beta_fast": beta_fast,
        "yarn_beta_slow": beta_slow,
    }
    config = LLaDAConfig.from_pretrained(write(tmp_path, fields))
    assert any("swapped" in str(w.message) for w in recwarn) == is_swapped
    rotary = LLaDARotaryEmbedding(config)
    frequencies, factor = yarn_by_hand(2.0, 4096, beta_fast, beta_slow)
    torch.testing.assert_close(rotary.inv_freq, frequencies)
    assert rotary.attention_scaling == pytest.approx(factor)
    # right betas leave dims < 14 alone and halve dims >= 32; swapped ones do the inverse
    unscaled = 1 / 500000.0 ** (torch.arange(64) / 64)
    ratio = rotary.inv_freq / unscaled
    assert torch.allclose(ratio[:13], torch.tensor(0.5 if is_swapped else 1.0))
    assert torch.allclose(ratio[33:], torch.tensor(1.0 if is_swapped else 0.5))
    after = saved(config, tmp_path / "again")
    assert after["rope"] is True and not any(name.startswith("yarn") for name in after)


def test_yarn_scale_one_is_plain_rope_and_attn_factor_multiplies():
    yarn = {"rope": False, "yarn": True, "yarn_beta_fast": 1.0, "yarn_beta_slow": 32.0}
    torch.testing.assert_close(
        LLaDARotaryEmbedding(LLaDAConfig(**yarn)).inv_freq, LLaDARotaryEmbedding(LLaDAConfig()).inv_freq
    )
    config = LLaDAConfig(rope=False, yarn=True, yarn_scale=4.0, yarn_attn_factor=0.5)
    assert config.rope_parameters["attention_factor"] == pytest.approx((0.1 * math.log(4) + 1) / 2)
    assert LLaDAConfig(yarn=False, yarn_scale=2.0).rope_parameters["rope_type"] == "default"
