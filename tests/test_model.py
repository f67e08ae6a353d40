"""Checkpoints and special tokens: what is found, what is refused, and where LoRA may go."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llada.models.building import attach_lora, new_model
from llada.models.checkpoints import load_model, resolve_checkpoint
from llada.models.saving import save_model
from llada.models.tokens import SPECIAL_TOKENS, load_tokenizer, special_ids


@pytest.fixture
def copy_of_model(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "copy")


def test_a_run_folder_means_its_final_checkpoint(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "run/final")
    assert resolve_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run/final")
    # the predecessors' names for the best weights
    assert resolve_checkpoint(str(tmp_path / "run/best_model.pt")) == str(tmp_path / "run/final")
    shutil.copytree(model_dir, tmp_path / "run/best")
    assert resolve_checkpoint(str(tmp_path / "run/best_sft_model.pt")) == str(tmp_path / "run/best")
    assert resolve_checkpoint("GSAI-ML/LLaDA-8B-Base") == "GSAI-ML/LLaDA-8B-Base"


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere", "no/such/folder"])
def test_a_missing_folder_is_named(path):
    with pytest.raises(ValueError, match=f"--model_name_or_path {path}: no checkpoint there"):
        load_model(path)


def test_a_hub_name_offline_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"the hub did not give it .*scripts/download\.py"):
            load("GSAI-ML/LLaDA-8B-Base")


def test_another_kind_of_model_is_refused(copy_of_model):
    (copy_of_model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"model_type 'llama' is not a LLaDA model; scripts/convert_ar\.py"):
        load_model(str(copy_of_model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.transformer.ln_f.weight"), "1 missing keys: .*ln_f"),
        (lambda tensors: tensors.update(stray=torch.zeros(2)), "1 unexpected keys: .*stray"),
    ],
)
def test_missing_and_extra_weights_are_refused(change, message, copy_of_model):
    file = copy_of_model / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_model(str(copy_of_model))


def test_a_tokenizer_larger_than_the_embedding_is_refused(model_dir):
    tokenizer = load_tokenizer(str(model_dir))
    model = load_model(str(model_dir))
    tokenizer.add_tokens([f"extra{i}" for i in range(100)])
    with pytest.raises(
        ValueError, match=r"the tokenizer has \d+ tokens and the model's embedding only \d+ rows"
    ):
        special_ids(model.config, tokenizer)


def test_another_mask_token_is_refused(model_dir):
    tokenizer = load_tokenizer(str(model_dir))
    model = load_model(str(model_dir))
    model.config.mask_token_id = 3
    with pytest.raises(ValueError, match=r"mask token .* has id \d+, the model's mask_token_id is 3"):
        special_ids(model.config, tokenizer)


def test_special_ids_come_from_config_and_tokenizer(model_dir):
    tokenizer = load_tokenizer(str(model_dir))
    ids = special_ids(load_model(str(model_dir)).config, tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert (ids.mask, ids.eos, ids.eot) == tuple(
        vocabulary[SPECIAL_TOKENS[role]] for role in ("mask", "eos", "eot")
    )
    assert ids.pad == ids.eos


def test_published_tokenizers_leave_the_mask_token_to_the_config(copy_of_model):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = copy_of_model / name
        if file.exists():
            values = {
                key: value for key, value in json.loads(file.read_text()).items() if key != "mask_token"
            }
            file.write_text(json.dumps(values))
    assert load_tokenizer(str(copy_of_model)).mask_token == SPECIAL_TOKENS["mask"]


@pytest.mark.parametrize("has_template", [True, False])
def test_base_tokenizers_get_the_chat_tokens(has_template, copy_of_model):
    # LLaDA-8B-Base has the template, but neither header tokens nor an end of turn
    full = load_tokenizer(str(copy_of_model))
    state = json.loads(full.backend_tokenizer.to_str())
    chat = [SPECIAL_TOKENS[role] for role in ("start_header", "end_header", "eot")]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in chat]
    for token in chat:
        state["model"]["vocab"].pop(token, None)
    base = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=SPECIAL_TOKENS["eos"],
        bos_token=SPECIAL_TOKENS["bos"], mask_token=SPECIAL_TOKENS["mask"],
    )  # fmt: skip
    base.chat_template = full.chat_template
    base.save_pretrained(copy_of_model)
    if not has_template:
        (copy_of_model / "chat_template.jinja").unlink()
    assert SPECIAL_TOKENS["eot"] not in load_tokenizer(str(copy_of_model)).get_vocab()
    tokenizer = load_tokenizer(str(copy_of_model), chat=True)
    assert set(chat) <= set(tokenizer.get_vocab())
    assert tokenizer.mask_token == SPECIAL_TOKENS["mask"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"


def test_lora_never_touches_the_head_and_knows_both_spellings(model_dir):
    model = attach_lora(
        load_model(str(model_dir)),
        rank=2,
        alpha=4,
        dropout=0.0,
        target_modules=["q_proj", "o_proj", "ff_out"],
        seed=0,
    )
    adapted = {
        name.rpartition(".lora_A")[0].rpartition(".")[2]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }
    assert adapted == {"q_proj", "attn_out", "ff_out"}
    assert not [name for name, _ in model.named_parameters() if "lora" in name and "blocks" not in name]


def test_unknown_lora_targets_are_refused(model_dir):
    with pytest.raises(ValueError, match=r"--lora_target_modules \['qproj'\]: choose from"):
        attach_lora(
            load_model(str(model_dir)), rank=2, alpha=4, dropout=0.0, target_modules=["qproj"], seed=0
        )


def test_an_adapter_folder_loads_with_its_base(model_dir, tmp_path):
    base = load_model(str(model_dir))
    adapted = attach_lora(base, rank=2, alpha=4, dropout=0.0, target_modules=["all-linear"], seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_model(adapted, load_tokenizer(str(model_dir)), tmp_path / "adapter")
    ids = torch.arange(6)[None]
    wanted = adapted.eval()(input_ids=ids).logits
    for loaded in (
        load_model(str(tmp_path / "adapter")),
        load_model(str(model_dir), adapter_path=str(tmp_path / "adapter")),
    ):
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_an_adapter_for_another_base_is_refused(model_dir, tokenizer_dir, tmp_path):
    tokenizer = load_tokenizer(str(tokenizer_dir))
    size = tmp_path / "wider.yaml"
    size.write_text(
        "{d_model: 32, n_layers: 2, n_heads: 2, n_kv_heads: 2, mlp_hidden_size: 24, rope_theta: 1e4}"
    )
    other = new_model(str(size), tokenizer, seed=0, max_length=64)
    save_model(
        attach_lora(other, rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"], seed=0),
        tokenizer,
        tmp_path / "adapter",
    )
    with pytest.raises(ValueError, match=r"--adapter_path .*: does not fit this base model"):
        load_model(str(model_dir), adapter_path=str(tmp_path / "adapter"))


def test_initial_weights_depend_on_the_seed_only(tokenizer_dir):
    tokenizer = load_tokenizer(str(tokenizer_dir))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = (new_model("1m", tokenizer, seed=seed, max_length=64) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    key = "model.transformer.wte.weight"
    assert torch.equal(first.state_dict()[key], second.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_unknown_size_lists_the_sizes(tokenizer_dir):
    with pytest.raises(ValueError, match=r"--config_name 3q: neither a file nor one of the sizes .*1m"):
        new_model("3q", load_tokenizer(str(tokenizer_dir)), seed=0, max_length=64)


def test_saving_replaces_a_folder_whole(model_dir, tmp_path):
    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))
    for _ in range(2):
        save_model(model, tokenizer, tmp_path / "out")
    (tmp_path / "out/marker").touch()
    save_model(model, tokenizer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out/marker").exists()
