"""Families of published models against numbers of their published code; see families.json.

Each entry holds a config.json, how many tensors its file has, a hash of their names and shapes, and logits of
the family's own program, every fifth column, made with the transformers version named there, in float32, from
the weights that `draw` gives, without padding and padded left and right (4 columns of the second row).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llada.models.building import attach_lora
from llada.models.checkpoints import check_weight_files, load_config, load_model
from llada.training.monitor import expert_load
from modelling_final import LLaDAConfig, LLaDAModelLM, WindowCache
from modelling_final.moe_llada import LLaDARouter

PUBLISHED = json.loads((Path(__file__).parent / "families.json").read_text())
B, L, V = 2, 9, 40
BLOCK = 4
IDS = torch.arange(B * L).view(B, L) * 7 % (V - 4)
LEFT = torch.ones(B, L, dtype=torch.long)
LEFT[1, :4] = 0
PADDING = {"none": None, "left": LEFT, "right": LEFT.flip(1)}
MOE = ["sdar_moe", "llada_moe", "llada2_moe"]


def draw(shapes):
    """Weights by published name, in the order of the names; routers wide, so that choices are clear."""
    random = np.random.RandomState(1)
    weights = {}
    for name in sorted(shapes):
        value = random.standard_normal(tuple(shapes[name])).astype("float32")
        if "norm" in name:
            value = 1 + 0.3 * value
        elif "expert_bias" in name:
            value = 0.2 * value
        else:
            value = value * (3 if "gate.weight" in name else 1) * shapes[name][-1] ** -0.5
        weights[name] = torch.from_numpy(np.asarray(value, dtype="float32"))
    return weights


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders in the published layout, one a family, with the weights that the references were made from."""
    base = tmp_path_factory.mktemp("families")
    for family, entry in PUBLISHED.items():
        config = LLaDAConfig.from_dict(dict(entry["config"]))
        LLaDAModelLM(config).save_pretrained(base / family)
        shapes = {name: value.shape for name, value in load_file(base / family / "model.safetensors").items()}
        save_file(draw(shapes), base / family / "model.safetensors", {"format": "pt"})
        (base / family / "config.json").write_text(json.dumps(entry["config"]))
    return base


def open_model(folders, family, **changes):
    config = LLaDAConfig.from_pretrained(folders / family)
    config.mask_token_id = V - 1
    if config.attention_pattern == "block_causal":
        config.attention_block_size = BLOCK
    for name, value in changes.items():
        setattr(config, name, value)
    return LLaDAModelLM.from_pretrained(folders / family, config=config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", PUBLISHED)
def test_logits_are_those_of_the_published_code(folders, family):
    model, entry = open_model(folders, family), PUBLISHED[family]
    assert model.config.family == family
    for side, mask in PADDING.items():
        with torch.no_grad():
            logits = model(IDS, attention_mask=mask).logits[..., ::5]
        theirs = torch.tensor(entry[side])
        is_real = torch.ones(B, L, dtype=torch.bool) if mask is None else mask.bool()
        if model.config.logit_shift:  # the first real row, shifted, is a padding row's: it predicts nothing
            is_real = is_real & torch.cat([is_real[:, :1], is_real[:, :-1]], dim=1)
        torch.testing.assert_close(logits[is_real], theirs[is_real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_is_saved_has_the_published_names_and_equal_tensors(folders, family, tmp_path):
    entry = PUBLISHED[family]
    before = load_file(folders / family / "model.safetensors")
    lines = "\n".join(f"{name} {list(value.shape)}" for name, value in sorted(before.items()))
    assert len(before) == entry["num_keys"]
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == entry["keys"]
    open_model(folders, family).save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    config = json.loads((tmp_path / "config.json").read_text())
    written_anew = ("auto_map", "dtype", "torch_dtype", "transformers_version")
    assert {k: config.get(k) for k in entry["config"] if k not in written_anew} | {"block_size": 0} == {
        **{k: v for k, v in entry["config"].items() if k not in written_anew}, "block_size": 0,
    }  # fmt: skip
    assert all((tmp_path / f"{name}_llada.py").is_file() for name in ("families", "moe", "modeling"))
    with torch.no_grad():
        again = LLaDAModelLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(IDS).logits
    torch.testing.assert_close(again[..., ::5], torch.tensor(entry["none"]), atol=1e-4, rtol=0)
    check_weight_files(str(tmp_path), open_model(folders, family))


@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize("family", ["sdar", "sdar_moe", "llada2_moe"])
def test_finished_blocks_from_the_cache_give_the_same_logits(folders, family, side):
    model, mask = open_model(folders, family), PADDING[side]
    cache = WindowCache(model.config)
    rows = []
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask).logits
        for start in range(0, L, BLOCK):
            seen = None if mask is None else mask[:, : start + BLOCK]
            rows.append(
                model(IDS[:, start : start + BLOCK], attention_mask=seen, past_key_values=cache).logits
            )
    is_real = torch.ones(B, L, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(torch.cat(rows, 1)[is_real], whole[is_real], atol=1e-5, rtol=0)


SIZES = {  # of the published files, and the parameters that their model cards tell
    "illada": ({"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 155136}, 7.62e9),
    "dream": ({"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
               "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064}, 7.62e9),
    "sdar": ({"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128,
              "num_key_value_heads": 8, "intermediate_size": 12288, "vocab_size": 151936}, 8.19e9),
    "sdar_moe": ({"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128,
                  "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128,
                  "num_experts_per_tok": 8, "vocab_size": 151936}, 30.53e9),
    "llada_moe": ({"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
                   "num_key_value_heads": 16, "expert_intermediate_size": 1024, "num_experts": 64,
                   "num_experts_per_tok": 8, "vocab_size": 157184, "moe_layer_freq": [1] * 16}, 7.36e9),
    "llada2_moe": ({"hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "head_dim": 128,
                    "num_key_value_heads": 4, "intermediate_size": 5120, "moe_intermediate_size": 512,
                    "num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
                    "vocab_size": 157184}, 16.26e9),
}  # fmt: skip


@pytest.mark.parametrize("family", SIZES)
def test_published_sizes_have_the_published_number_of_parameters(family):
    sizes, total = SIZES[family]
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig.from_dict({**PUBLISHED[family]["config"], **sizes}))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(total, abs=5e6)


def test_the_table_says_what_each_family_does():
    found = {name: LLaDAConfig.from_dict(dict(entry["config"])) for name, entry in PUBLISHED.items()}
    blocks = {name: (c.attention_pattern, c.attention_block_size) for name, c in found.items()}
    assert {name for name, (pattern, _) in blocks.items() if pattern == "full"} == {
        "illada", "dream", "llada_moe",
    }  # fmt: skip
    assert blocks["llada2_moe"][1] == 32 and blocks["sdar"][1] == blocks["sdar_moe"][1] == 4
    assert [name for name, c in found.items() if c.logit_shift] == ["dream"]
    assert [name for name, c in found.items() if c.weight_tying] == ["illada"]
    assert found["llada2_moe"].rope_parameters["partial_rotary_factor"] == 0.5
    assert not found["llada_moe"].moe_renormalise and found["sdar_moe"].moe_renormalise
    # LLaDA-MoE has been published under LLaDA's own model_type: its experts tell it from the dense model
    renamed = PUBLISHED["llada_moe"]["config"] | {"model_type": "llada", "architectures": None}
    assert LLaDAConfig.from_dict(renamed).family == "llada_moe"
    # the first SDAR files name no block; later ones do
    older = {k: v for k, v in PUBLISHED["sdar"]["config"].items() if k != "block_size"}
    assert LLaDAConfig.from_dict(older).attention_block_size == 4
    assert LLaDAConfig.from_dict(older | {"block_size": 16}).attention_block_size == 16


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("illada", {"mlp_bias": True}), ("illada", {"layer_norm_eps": 1e-5}),
        ("dream", {"use_sliding_window": True, "sliding_window": 64}), ("dream", {"use_mrope": True}),
        ("sdar", {"attention_bias": True}), ("sdar", {"quantization_config": {"bits": 4}}),
        ("sdar_moe", {"mlp_only_layers": [1]}), ("sdar_moe", {"decoder_sparse_step": 2}),
        ("llada_moe", {"shared_expert_intermediate_size": 64}), ("llada_moe", {"router_num_group": 4}),
        ("llada_moe", {"moe_router_score_function": "sigmoid"}), ("llada_moe", {"moe_layer_freq": [1, 0, 1]}),
        ("llada2_moe", {"score_function": "softmax"}), ("llada2_moe", {"use_qkv_bias": True}),
        ("llada2_moe", {"use_qk_norm": False}), ("llada2_moe", {"norm_head": True}),
        ("llada2_moe", {"block_routing_max_experts": 48}), ("llada2_moe", {"delete_token_id": 39}),
        ("llada2_moe", {"layer_group_size": 4}), ("llada2_moe", {"kv_lora_rank": 16}),
        ("llada2_moe", {"partial_rotary_factor": 0.3}), ("llada_moe", {"num_shared_experts": 1}),
        ("llada_moe", {"num_experts": 0}), ("sdar_moe", {"scoring_func": "sigmoid"}),
        ("sdar", {"rope_scaling": {"factor": 2.0}}),
        ("sdar", {"attention_pattern": "full"}), ("dream", {"logit_shift": False}),
        ("dream", {"qkv_bias": False}), ("dream", {"vision_config": {"hidden_size": 8}}),
        ("dream", {"is_causal": True}), ("dream", {"layer_types": ["sliding_attention"]}),
    ],
)  # fmt: skip
def test_a_path_that_is_not_built_is_refused_in_one_line(family, change, folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[family]["config"] | change))
    with pytest.raises(ValueError, match=f"config.json: .*{list(change)[-1]}") as caught:
        load_config(str(tmp_path), mask_token_id=V - 1)
    assert "\n" not in str(caught.value)


def test_special_ids_come_from_config_tokenizer_or_flag_and_are_never_guessed(tmp_path):
    config = PUBLISHED["sdar_moe"]["config"]
    bare = {k: v for k, v in config.items() if not k.endswith("token_id")}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    with pytest.raises(ValueError, match="names a mask token; give --mask_token_id"):
        load_config(str(tmp_path))
    assert load_config(str(tmp_path), mask_token_id=7).mask_token_id == 7
    # Without a vocabulary beside it transformers would count these tokens from 0 on.
    added = {"35": {"content": "<|MASK|>"}, "33": {"content": "<|endoftext|>"}}
    names = {"mask_token": "<|MASK|>", "eos_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, **names}))
    found = load_config(str(tmp_path))
    assert (found.mask_token_id, found.eos_token_id, found.pad_token_id) == (35, 33, 33)
    with pytest.raises(ValueError, match=r"--mask_token_id 7: .* has 39 in config.json"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"mask_token_id": 39}))
        load_config(str(tmp_path), mask_token_id=7)


@pytest.mark.parametrize("family", MOE)
def test_routers_are_float32_in_a_bfloat16_model(folders, family):
    model = open_model(folders, family).to(torch.bfloat16)
    router = next(module for module in model.modules() if isinstance(module, LLaDARouter))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        experts, weights = router(x)
    exact, exact_weights = router.float()(x.float())
    assert weights.dtype == torch.float32 and torch.equal(experts, exact)
    torch.testing.assert_close(weights, exact_weights)


def test_expert_load_is_counted_in_training_alone(folders):
    model = open_model(folders, "llada2_moe")
    model(IDS)
    assert expert_load(model) == {}
    model.train()
    routers = [module for module in model.modules() if isinstance(module, LLaDARouter)]
    for router in routers:  # all tokens to experts 0 to 3, of 8: each has twice its even share
        router.expert_bias.copy_(torch.tensor([9.0] * 4 + [0.0] * 4))
    model(IDS)
    assert expert_load(model) == {"expert_load_max": 2.0, "experts_idle": 0.5}
    assert expert_load(model) == {}  # since the call before
    assert expert_load(open_model(folders, "dream")) == {}


@pytest.mark.parametrize("family", MOE)
def test_experts_train_by_lora_and_merge_into_the_published_layout(folders, family, tmp_path):
    model = open_model(folders, family)
    lora = attach_lora(model, rank=2, alpha=4, dropout=0.0, target_modules=["all-linear", "experts"], seed=0)
    trained = {name: parameter for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert any(".experts." in name for name in trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        adapted = lora(IDS).logits
    lora(IDS).logits.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(folders / family / "model.safetensors").keys()
    )
    with torch.no_grad():
        again = load_model(str(tmp_path), mask_token_id=V - 1).eval()(IDS).logits
        before = open_model(folders, family)(IDS).logits
    assert (adapted - before).abs().max() > 0.1
    torch.testing.assert_close(again, adapted, atol=1e-4, rtol=0)
