"""Published checkpoints load with exact keys and return unchanged; peft, plans, resizing find their names."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import modelling_final
from modelling_final import LLaDAConfig, LLaDAModelLM
from modelling_final.loss_llada import LLaDAHead
from tiny_llada import PUBLISHED, SHAPE, B, L, make_batch, make_model

VARIANTS = {
    "plain": {},
    "tied": {"weight_tying": True},
    "gqa": {"n_kv_heads": 2},
    "padded_vocabulary": {"embedding_size": 64},
}
LORA_TARGETS = r".*blocks\.\d+\.(q_proj|v_proj|ff_out)"


def test_the_8b_model_has_the_published_names_and_sizes():
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig())
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    d, ff, vocab = 4096, 12288, 126464
    expected = {
        "model.transformer.wte.weight": (vocab, d),
        "model.transformer.ln_f.weight": (d,),
        "model.transformer.ff_out.weight": (vocab, d),
    }
    for i in range(32):
        block = f"model.transformer.blocks.{i}."
        expected |= {f"{block}{name}.weight": (d,) for name in ("attn_norm", "ff_norm")}
        expected |= {f"{block}{name}.weight": (d, d) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        expected |= {f"{block}ff_proj.weight": (ff, d), f"{block}up_proj.weight": (ff, d)}
        expected |= {f"{block}ff_out.weight": (d, ff)}
    assert shapes == expected and len(shapes) == 291
    assert sum(math.prod(shape) for shape in shapes.values()) == 8_015_581_184
    assert (
        sum(p.numel() for p in model.parameters()) * 2 == 16_031_162_368
    )  # bytes of the published bf16 shards


def write_published_layout(folder, changes):
    """A checkpoint as published: config.json of 46 fields, three shards with scattered blocks, an index."""
    fields = PUBLISHED | SHAPE | changes
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    state = make_model(**changes).state_dict()
    if fields["weight_tying"]:
        del state["model.transformer.ff_out.weight"]
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(x.shape, generator=generator) / 4 for name, x in state.items()}
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {key: names[i % 3] for i, key in enumerate(sorted(state))}
    for name in names:
        save_file(
            {k: state[k] for k in state if weight_map[k] == name}, folder / name, metadata={"format": "pt"}
        )
    index = {"metadata": {"total_size": sum(x.nbytes for x in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return fields, state


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_published_layout_loads_exactly_and_survives_saving(tmp_path, variant):
    fields, state = write_published_layout(tmp_path, VARIANTS[variant])
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is LLaDAModelLM and not any(report.values())
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value), name
    ids, mask, _ = make_batch("left")
    logits = model(ids, attention_mask=mask).logits
    assert logits.shape == (B, L, fields["embedding_size"])

    again = tmp_path / "again"
    model.save_pretrained(again, max_shard_size="20KB")
    index = json.loads((again / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == state.keys()
    after = json.loads((again / "config.json").read_text(encoding="utf-8"))
    for name in fields.keys() - {"transformers_version"}:
        expected = fields[name]
        if name == "auto_map":  # fill-mask pipelines ask for one more class
            expected = expected | {"AutoModelForMaskedLM": "modeling_llada.LLaDAModelLM"}
        assert after[name] == expected, name
    reloaded, report = LLaDAModelLM.from_pretrained(again, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(reloaded(ids, attention_mask=mask).logits, logits)


def test_auto_classes_choose_this_code_even_where_auto_map_names_other(tmp_path):
    write_published_layout(tmp_path, {})
    assert type(AutoConfig.from_pretrained(tmp_path)) is LLaDAConfig
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        assert type(auto.from_pretrained(tmp_path)) is LLaDAModelLM
    assert type(AutoModel.from_pretrained(tmp_path, trust_remote_code=True)) is LLaDAModelLM


def test_the_folder_works_copied_beside_the_weights(tmp_path):
    write_published_layout(tmp_path, {})
    for file in Path(modelling_final.__file__).parent.glob("*.py"):
        shutil.copy(file, tmp_path)
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
load = AutoModelForCausalLM.from_pretrained
model, report = load(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert "modelling_final" not in sys.modules and not any(report.values())
torch.save(model(torch.arange(1, 9)[None]).logits.detach(), sys.argv[1] + "/logits.pt")
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, cwd=tmp_path)
    with torch.no_grad():
        expected = LLaDAModelLM.from_pretrained(tmp_path)(torch.arange(1, 9)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_resized_embeddings_load_again_and_still_score(tmp_path):
    for changes in ({}, {"weight_tying": True}):
        model = make_model(**changes)
        model.resize_token_embeddings(50)
        assert (model.config.vocab_size, model.config.embedding_size) == (50, 50)
        assert type(model.get_output_embeddings()) is LLaDAHead
        model.save_pretrained(tmp_path)
        reloaded, report = LLaDAModelLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        ids, _, _ = make_batch()
        assert torch.equal(reloaded(ids).logits, model(ids).logits) and model(ids).logits.shape[-1] == 50
        assert model(ids, rows=torch.arange(4), targets=ids[0, :4]).nll.shape == (4,)


def test_tied_weights_are_one_tensor():
    model = make_model(weight_tying=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert make_model().get_output_embeddings().weight is not make_model().get_input_embeddings().weight


def test_plans_name_modules_that_exist():
    model = make_model()
    names = {name for name, _ in model.model.named_modules()}
    plans = [*LLaDAConfig.base_model_tp_plan, *LLaDAConfig.base_model_fsdp_plan]
    for entry in plans:
        for name in entry if isinstance(entry, tuple) else (entry,):
            assert name.replace("*", "0") in names, name
    assert type(model.model.transformer.blocks[0]).__name__ in model._no_split_modules


def test_lora_trains_the_blocks_and_not_the_head():
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * 3 * 2 and all(".blocks." in name for name in trainable)
    ids, _, _ = make_batch()
    model(input_ids=ids, rows=torch.arange(6), targets=ids.flatten()[:6]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)
    assert model.get_base_model().get_output_embeddings().weight.grad is None


def test_lora_on_the_head_is_refused_where_it_would_be_skipped():
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["ff_out"], task_type="CAUSAL_LM"))
    ids, _, _ = make_batch()
    with pytest.raises(ValueError, match=r"the LM head model\.transformer\.ff_out has an adapter"):
        model(input_ids=ids, rows=torch.arange(6), targets=ids.flatten()[:6])
