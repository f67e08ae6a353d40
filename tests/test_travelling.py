"""A saved folder works without this repository: torch, transformers, peft and the folder are enough."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from llada.models.building import attach_lora, new_model
from llada.models.checkpoints import load_model
from llada.models.saving import Origin, save_model
from llada.models.tokens import load_tokenizer

AWAY = """
import sys, torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
ids = torch.arange(1, 9)[None]
found = {}
for root in sys.argv[1:]:
    folder = root + "/model"
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        model, report = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(report.values())
        found[root, auto.__name__] = model.eval()(ids).logits.detach()
    adapted = PeftModel.from_pretrained(model, root + "/adapter").eval()
    found[root, "PeftModel"] = adapted(ids).logits.detach()
    assert adapted.generate(ids, max_new_tokens=8).shape == (1, 16)
assert not {"llada", "modelling_final"} & set(sys.modules)
tokenizer = AutoTokenizer.from_pretrained(folder)
assert tokenizer.mask_token_id == model.config.mask_token_id and tokenizer.chat_template
torch.save(found, "found.pt")

fill = pipeline("fill-mask", model=folder, trust_remote_code=True)
guesses = fill(f"12 + {fill.tokenizer.mask_token} = 3", top_k=2)
assert len(guesses) == 2 and guesses[0]["score"] >= guesses[1]["score"]
write = pipeline("text-generation", model=folder, trust_remote_code=True)
(greedy,), (again,) = (write("12 + 3", max_new_tokens=8, do_sample=False) for _ in range(2))
assert greedy == again and greedy["generated_text"].startswith("12 + 3")
assert [len(rows) for rows in write(["one", "two"], max_new_tokens=8, num_return_sequences=2)] == [2, 2]
(reply,) = write([{"role": "user", "content": "12 + 3"}], max_new_tokens=8, temperature=0.7, do_sample=True)
assert reply["generated_text"][-1]["role"] == "assistant"
"""


def save_pair(root, tokenizer, *, tied):
    """A model folder and an adapter folder for it, as training saves them."""
    root.mkdir()
    (root / "size.yaml").write_text(
        "{d_model: 16, n_layers: 2, n_heads: 2, n_kv_heads: 2, mlp_hidden_size: 24, rope_theta: 1e4, "
        f"weight_tying: {str(tied).lower()}}}"
    )
    model = new_model(str(root / "size.yaml"), tokenizer, seed=0, max_length=256)
    flags = {"train_data_path": "rows/train", "learning_rate": 1e-3}
    save_model(model, tokenizer, root / "model", origin=Origin("train.py", None, flags, {"eval_loss": 2.5}))
    adapted = attach_lora(
        load_model(str(root / "model")), rank=2, alpha=4, dropout=0.0, target_modules=["all-linear"], seed=0
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_model(adapted, tokenizer, root / "adapter", origin=Origin("train.py", str(root / "model")))
    return root


@pytest.fixture(scope="module")
def roots(tokenizer_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("travelling")
    tokenizer = load_tokenizer(str(tokenizer_dir), chat=True)
    return [save_pair(folder / name, tokenizer, tied=name == "tied") for name in ("tied", "untied")]


def test_auto_classes_peft_generate_and_pipelines(roots, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", AWAY, *map(str, roots)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    ids = torch.arange(1, 9)[None]
    for root in roots:
        with torch.no_grad():
            expected = load_model(str(root / "model")).eval()(ids).logits
            adapted = load_model(str(root / "adapter"), merge_adapter=False).eval()(ids).logits
        for name in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"):
            assert torch.equal(found[str(root), name], expected), (root.name, name)
        assert torch.equal(found[str(root), "PeftModel"], adapted) and not torch.equal(adapted, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_folder_holds(roots, tied):
    folders = [roots[0 if tied else 1] / name for name in ("model", "adapter")]
    model = folders[0]
    code = {path.name for path in model.glob("*_llada.py")}
    assert {"modeling_llada.py", "configuration_llada.py", "generation_llada.py"} <= code
    for folder in folders:
        assert code == {path.name for path in folder.glob("*_llada.py")}
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"]["AutoModelForMaskedLM"] == "modeling_llada.LLaDAModelLM"
        settings = json.loads((folder / "generation_config.json").read_text())
        ends = sorted([config["eos_token_id"], config["eot_token_id"]])
        assert (settings["eos_token_id"], settings["pad_token_id"]) == (ends, config["pad_token_id"])
    with safe_open(model / "model.safetensors", "pt") as file:
        heads = {"model.transformer.ff_out.weight", "model.transformer.wte.weight"} & set(file.keys())
    assert config["weight_tying"] == tied and len(heads) == (1 if tied else 2)


def test_model_cards_tell_what_it_is_and_how_to_load_it(roots):
    model, adapter = ((roots[0] / name / "README.md").read_text() for name in ("model", "adapter"))
    for text in ("# model\n", "masked diffusion language model", "Made by `train.py` from new weights."):
        assert text in model
    assert "- train_data_path: rows/train" in model and "| eval_loss | 2.5 |" in model
    assert "learning_rate: 0.001" in model and 'from_pretrained("FOLDER", trust_remote_code=True)' in model
    assert "library_name: peft" in adapter and 'PeftModel.from_pretrained(model, "FOLDER")' in adapter
    assert f'from_pretrained("{roots[0] / "model"}", trust_remote_code=True)' in adapter
