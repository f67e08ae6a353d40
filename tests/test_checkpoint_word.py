"""A checkpoint is taken at its word: unbuilt keys, missing ids, damaged files, foreign code are refused."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import load_script
from llada.models.checkpoints import load_config, load_model
from llada.models.tokens import load_tokenizer, special_ids
from modelling_final import LLaDAConfig


@pytest.fixture
def folder(model_dir, tmp_path):
    """A checkpoint folder to spoil; `change(name=value)` edits config.json, None as a value removes a key."""
    shutil.copytree(model_dir, tmp_path / "model")
    return tmp_path / "model"


def change(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value != "remove"}
    (folder / "config.json").write_text(json.dumps(config))


def drop_mask_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mask_id, tokenizer.mask_token = tokenizer.mask_token_id, None
    tokenizer.save_pretrained(folder)
    return mask_id


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_norm", True), ("use_qk_norm", True), ("clip_qkv", 8.0), ("num_experts", 64),
        ("n_routed_experts", 8), ("sliding_window", 4096), ("attention_bias", True), ("mlp_bias", True),
        ("partial_rotary_factor", 0.5), ("layer_types", ["sliding_attention"]), ("logits_scaling", 8.0),
        ("final_logit_softcapping", 30.0), ("quantization_config", {"bits": 4}), ("norm_softmax", True),
        ("use_mrope", True), ("scale_logits", True), ("alibi", True), ("block_type", "sequential"),
        ("moe_num_shared_experts", 2), ("q_lora_rank", 512), ("is_causal", True), ("is_decoder", True),
        ("is_encoder_decoder", True), ("position_embedding_type", "absolute"), ("rotary_pct", 0.25),
        ("no_rope_layers", [1, 0]), ("use_parallel_residual", True), ("mm_vision_tower", "clip"),
        ("text_config", {"hidden_size": 8}), ("lm_head_bias", True), ("logit_scale", 0.1),
        ("rope_scaling", {"factor": 2.0}), ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("architectures", ["LLaDAVisionModel"]), ("n_layers", 0), ("n_heads", -2), ("rope_theta", "1e6"),
        ("model_type", "remove"),
    ],
)  # fmt: skip
def test_keys_that_ask_for_what_is_not_built_are_refused_by_name(folder, key, value):
    change(folder, **{key: value})
    with pytest.raises(ValueError, match=rf"--model_name_or_path {folder}: config.json: .*{key}") as caught:
        load_config(str(folder))
    assert "\n" not in str(caught.value)


def test_harmless_keys_load_and_unknown_ones_are_listed(folder):
    off = {"sliding_window": 4096, "use_sliding_window": False, "qk_norm": False, "clip_qkv": None}
    change(folder, **off, head_dim=8, max_window_layers=28, flash_attn_varlen=True, num_experts=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config(str(folder)).head_dim == 8
    change(folder, moon_phase="full", an_option=3)
    with pytest.warns(UserWarning, match="nothing here reads an_option, moon_phase"):
        load_config(str(folder))


def test_a_mask_token_is_never_guessed(folder):
    config = load_config(str(folder))
    change(folder, mask_token_id="remove", eos_token_id="remove", pad_token_id="remove")
    assert LLaDAConfig.from_pretrained(folder).mask_token_id is None
    found = load_config(str(folder))  # from the tokenizer
    assert (found.mask_token_id, found.eos_token_id, found.pad_token_id) == (
        config.mask_token_id, config.eos_token_id, config.pad_token_id,
    )  # fmt: skip
    mask_id = drop_mask_token(folder)
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(ValueError, match="names a mask token; give --mask_token_id"):
            load(str(folder))
    assert load_config(str(folder), mask_token_id=mask_id).mask_token_id == mask_id
    tokenizer = load_tokenizer(str(folder), mask_token_id=mask_id)
    model = load_model(str(folder), mask_token_id=mask_id)
    assert special_ids(model.config, tokenizer).mask == tokenizer.mask_token_id == mask_id
    change(folder, mask_token_id=mask_id)
    with pytest.raises(ValueError, match=f"--mask_token_id 5: {folder} has {mask_id} in config.json"):
        load_config(str(folder), mask_token_id=5)


def test_the_flag_reaches_training(folder, tmp_path):
    from test_stages import sft_flags

    change(folder, mask_token_id="remove")
    mask_id = drop_mask_token(folder)
    train_sft = load_script("sft_training/train_sft.py").main
    flags = sft_flags(tmp_path / "run", folder, "--max_steps", "1")
    with pytest.raises(ValueError, match="give --mask_token_id"):
        train_sft(flags)
    train_sft([*flags, "--mask_token_id", str(mask_id)])
    assert json.loads((tmp_path / "run/final/config.json").read_text())["mask_token_id"] == mask_id


def test_other_architectures_and_code_beside_the_weights(folder, capsys):
    change(folder, model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    with pytest.raises(ValueError, match=r"model_type 'qwen3' is not a LLaDA model; scripts/convert_ar.py"):
        load_config(str(folder))
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    change(folder, model_type="new_kind", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    with pytest.raises(ValueError, match="model_type 'new_kind' is not a LLaDA model") as caught:
        load_config(str(folder))
    assert "trust_remote_code" not in str(caught.value) and "Do you wish" not in capsys.readouterr().out


def test_damaged_and_whole_number_weights_are_named(folder):
    file = folder / "model.safetensors"
    weights, data = load_file(file), file.read_bytes()
    file.write_bytes(data[:-64])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: "):
        load_model(str(folder))
    name = "model.transformer.blocks.0.q_proj.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, file)
    with pytest.raises(ValueError, match=f"{name} holds I8: quantised weights are not read here"):
        load_model(str(folder))
    file.unlink()
    with pytest.raises(ValueError, match=r"cannot be read: .*no file named model.safetensors"):
        load_model(str(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is damaged"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="--model_name_or_path"):
        load_model(str(folder))


def test_a_tokenizer_without_special_tokens_is_named_with_what_adds_them(tmp_path):
    core = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no EOS token; add what is missing: python scripts/train_tok"):
        load_tokenizer(str(tmp_path / "bare"))
    extend = load_script("scripts/train_tokenizer.py").main
    extend(["--extend", str(tmp_path / "bare"), "--output_dir", str(tmp_path / "whole")])
    tokenizer = load_tokenizer(str(tmp_path / "whole"), chat=True)
    assert tokenizer("a b", is_split_into_words=False)["input_ids"]
    assert None not in (tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id)
    assert len(tokenizer) == 2 + 5 and tokenizer.chat_template  # eos, mask, two headers, end of turn
    with pytest.raises(ValueError, match="either --data to train on, or --extend"):
        extend(["--output_dir", str(tmp_path / "none")])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model, whose tokenizer is its own"):
        extend(["--extend", str(tmp_path / "bare"), "--output_dir", str(tmp_path / "model"), "--overwrite"])
