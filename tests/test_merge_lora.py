"""scripts/merge_lora.py against peft itself: the merged folder gives the logits of the unmerged adapter."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from conftest import load_script
from llada.models.checkpoints import load_model
from llada.models.tokens import load_tokenizer
from modelling_final import LLaDAConfig, LLaDAModelLM

merge_lora = load_script("scripts/merge_lora.py")

BLOCKS = r".*\bblocks\.\d+\.(q_proj|v_proj|attn_out|ff_proj|ff_out)"


def make_base(folder, *, dtype=torch.float32, shard="12KB", **changes) -> LLaDAModelLM:
    shape = dict(d_model=32, n_heads=4, n_kv_heads=2, n_layers=2, mlp_hidden_size=48, vocab_size=64)
    ids = dict(embedding_size=64, mask_token_id=63, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    model = LLaDAModelLM(LLaDAConfig(**{**shape, **ids, **changes})).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer("base").save_pretrained(folder)
    return model


def tokenizer(pad: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({pad: 0, "eos": 1, "mask": 63}, unk_token=pad))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, eos_token="eos", mask_token="mask")


def make_adapter(folder, model, **options):
    """An adapter folder, every tensor of it random, and its peft model, unmerged."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": BLOCKS, "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(model, LoraConfig(**settings)).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


def run(tmp_path, *flags):
    flags = flags or ("--base_model", f"{tmp_path}/base", "--adapter_path", f"{tmp_path}/adapter")
    merge_lora.main([*flags, "--output_dir", str(tmp_path / "out")])
    return load_model(str(tmp_path / "out"), dtype="auto").eval()


@torch.no_grad()
def logits(model):
    return model(torch.arange(64).reshape(2, 32)).logits


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 9},
    "patterns": {
        "rank_pattern": {"blocks.1.q_proj": 2, "ff_out": 3},
        "alpha_pattern": {r"blocks\.0\..*": 16, "ff_proj": 5},
    },
    "rslora_patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "modules_to_save": {"modules_to_save": ["ln_f", "wte", "attn_norm"]},
    "head_whole": {"modules_to_save": ["transformer.ff_out"]},
    "embedding": {"target_modules": ["wte", "q_proj"]},
    "head": {"target_modules": r".*transformer\.ff_out"},
    "all-linear": {"target_modules": "all-linear"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dora": {"use_dora": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},  # peft switches it off for nn.Linear
    "square_fan_in_fan_out": {"fan_in_fan_out": True, "target_modules": ["q_proj"]},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", OPTIONS)
def test_logits_are_those_of_the_unmerged_adapter(tmp_path, kind):
    base = make_base(tmp_path / "base")
    before = logits(base)
    adapted = make_adapter(tmp_path / "adapter", base, **OPTIONS[kind])
    expected = logits(adapted)
    assert (expected - before).abs().max() > 0.05  # the adapter does something
    model = run(tmp_path)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    oracle = adapted.merge_and_unload().state_dict()
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, oracle[key]), key


def test_biases_of_the_adapter_replace_the_bases(tmp_path):
    base = make_base(tmp_path / "base", include_qkv_bias=True)
    adapted = make_adapter(tmp_path / "adapter", base, bias="all")
    torch.testing.assert_close(logits(run(tmp_path)), logits(adapted), atol=1e-5, rtol=1e-5)


def test_dtype_and_untouched_weights_stay(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    untouched = {key: value.clone() for key, value in base.state_dict().items()}
    make_adapter(tmp_path / "adapter", base)
    model = run(tmp_path)
    assert model.dtype == torch.bfloat16
    assert sum(file.suffix == ".safetensors" for file in (tmp_path / "base").iterdir()) > 3  # shards are read
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer_config.json", "model.safetensors"} <= names
    assert "adapter_config.json" not in names
    for key, weight in model.state_dict().items():
        is_target = any(f".{name}." in key for name in ("q_proj", "v_proj", "attn_out", "ff_proj"))
        is_target = is_target or ("blocks" in key and "ff_out" in key)
        assert torch.equal(weight, untouched[key]) != is_target, key


def test_bfloat16_is_rounded_once(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, r=16, lora_alpha=32)
    model = run(tmp_path)
    name = "model.transformer.blocks.1.q_proj"
    parts = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (parts[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    base_weight = load_model(str(tmp_path / "base"), dtype="auto").get_submodule(name).weight.double()
    exact = base_weight + 2 * (b @ a)
    error = (model.get_submodule(name).weight.double() - exact).abs() / exact.abs()
    assert error.max() <= 2**-8  # half a unit of bfloat16's last place, relative


def test_the_predecessors_spellings_and_the_base_named_in_the_adapter(tmp_path):
    base = make_base(tmp_path / "base", shard="1GB")
    base.name_or_path = str(tmp_path / "base")
    expected = logits(make_adapter(tmp_path / "run/final", base))
    spellings = [
        ["--model_name", f"{tmp_path}/base", "--lora_weights", f"{tmp_path}/run", "--output_dir"],
        ["--base_model", f"{tmp_path}/base", "--adapter_path", f"{tmp_path}/run/final", "--output_path"],
        ["--adapter-path", f"{tmp_path}/run", "--output-path"],
    ]
    for i, flags in enumerate(spellings):
        out = str(tmp_path / f"out{i}")
        merge_lora.main([*flags, out])
        torch.testing.assert_close(logits(load_model(out)), expected, atol=1e-5, rtol=1e-5)


def test_the_adapters_tokenizer_wins(tmp_path):
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"))
    run(tmp_path)
    assert load_tokenizer(str(tmp_path / "out")).pad_token == "base"
    shutil.rmtree(tmp_path / "out")
    own = tokenizer("own")
    own.chat_template = "template"
    own.save_pretrained(tmp_path / "adapter")
    run(tmp_path)
    found = load_tokenizer(str(tmp_path / "out"))
    assert (found.pad_token, found.chat_template) == ("own", "template")


def refusal(tmp_path, *flags) -> str:
    with pytest.raises(ValueError) as caught:
        run(tmp_path, *flags)
    assert not list(tmp_path.glob("out*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changed the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' changed the base"),
        ({"peft_type": "LOHA"}, "40 of its weights are missing"),
        ({"peft_type": "NONSENSE"}, "adapter_config.json cannot be read: KeyError('NONSENSE')"),
    ],
)
def test_adapters_that_cannot_be_folded_in_are_refused(tmp_path, change, reason):
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"))
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert reason in refusal(tmp_path)


def test_adapter_of_another_base_is_named_before_anything_is_written(tmp_path):
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "other", n_layers=3))
    make_base(tmp_path / "base")
    message = refusal(tmp_path)
    assert "10 of its weights have no place in the base; the adapter was made for another one" in message
    assert "First: base_model.model.model.transformer.blocks.2.attn_out.lora_A.weight" in message

    make_adapter(tmp_path / "adapter", make_base(tmp_path / "wide", mlp_hidden_size=64))
    message = refusal(tmp_path)
    assert "does not fit this base model" in message
    assert "ff_proj.lora_B.default.weight: copying a param with shape torch.Size([64, 4])" in message


def test_damaged_adapter(tmp_path):
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"))
    path = tmp_path / "adapter/adapter_model.safetensors"
    parts = load_file(path)
    key = "base_model.model.model.transformer.blocks.0.q_proj"
    save_file({k: v for k, v in parts.items() if k != f"{key}.lora_B.weight"}, path)
    assert f"1 of its weights are missing; the file is damaged. First: {key}.lora_B.weight" in refusal(
        tmp_path
    )
    save_file({**parts, f"{key}.lora_magnitude_vector": torch.ones(3)}, path)
    assert f"have no place in the base; the adapter was made for another one. First: {key}.lora_m" in (
        refusal(tmp_path)
    )
    path.write_bytes(path.read_bytes()[:-100])
    assert "does not fit this base model: Error while deserializing" in refusal(tmp_path)


@pytest.mark.parametrize("target", [{"target_modules": ["wte"]}, {"modules_to_save": ["wte"]}])
def test_tied_embedding_cannot_be_changed_alone(tmp_path, target):
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base", weight_tying=True), **target)
    message = refusal(tmp_path)
    assert "it changes base_model.model.model.transformer.wte." in message
    assert "and the base ties the embedding to the head: merged, both would change" in message


def test_tied_base_merges_in_its_blocks(tmp_path):
    adapted = make_adapter(tmp_path / "adapter", make_base(tmp_path / "base", weight_tying=True))
    torch.testing.assert_close(logits(run(tmp_path)), logits(adapted), atol=1e-5, rtol=1e-5)


def test_folders_that_are_not_what_they_should_be(tmp_path):
    adapter = ("--adapter_path", f"{tmp_path}/adapter")
    assert f"--adapter_path {tmp_path}/adapter: no checkpoint there" in refusal(tmp_path, *adapter)
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"))
    assert "it names no base; give its --base_model" in refusal(tmp_path, *adapter)
    assert "no adapter_config.json" in refusal(tmp_path, "--adapter_path", f"{tmp_path}/base")
    missing = refusal(tmp_path, *adapter, "--base_model", f"{tmp_path}/nowhere")
    assert missing.startswith(f"--base_model {tmp_path}/nowhere: no checkpoint there")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists; give another place"):
        run(tmp_path)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
