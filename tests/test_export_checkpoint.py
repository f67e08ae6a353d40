"""A state of any step becomes the plain checkpoint that the run would have written there."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import load_script
from llada.autoregressive.causal_lm import load_causal_lm
from llada.models.building import load_for_inference
from llada.models.saving import save_model
from llada.speculative.bridge import Bridge
from llada.speculative.decoder import SpeculativeDecoder, ends_with
from llada.speculative.pard import load_drafter
from llada.speculative.settings import SpeculativeSettings
from processes import run_ranks
from speculation import make_verifier
from test_stages import pretrain_flags, sft_flags

export = load_script("scripts/export_checkpoint.py").main
pretrain = load_script("pretraining/pretrain.py").main
train_sft = load_script("sft_training/train_sft.py").main


def weights(folder):
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def assert_same(folder, other):
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tied", [False, True])
def test_pretraining_from_scratch_at_the_end_and_on_the_way(tied, tokenizer_dir, tmp_path):
    size = "d_model: 16, n_layers: 2, n_heads: 2, n_kv_heads: 2, mlp_hidden_size: 24, rope_theta: 1e4"
    (tmp_path / "own.yaml").write_text(f"{{{size}, weight_tying: {str(tied).lower()}}}")
    flags = ["--lr_scheduler_type", "constant", "--save_interval", "2"]
    flags += ["--config_name", str(tmp_path / "own.yaml")]
    pretrain(pretrain_flags(tmp_path / "run", tokenizer_dir, tmp_path, *flags))
    export(["--run", str(tmp_path / "run"), "--output_dir", str(tmp_path / "latest")])
    assert_same(tmp_path / "latest", tmp_path / "run/final")
    export(["--run", str(tmp_path / "run"), "--step", "2", "--output_dir", str(tmp_path / "two")])
    pretrain(pretrain_flags(tmp_path / "short", tokenizer_dir, tmp_path, *flags, "--max_steps", "2"))
    assert_same(tmp_path / "two", tmp_path / "short/final")
    assert len({"model.transformer.ff_out.weight"} & weights(tmp_path / "two").keys()) == (not tied)
    # every stage reads it
    for name, lora in (("sft", []), ("lora", ["--use_lora", "--lora_r", "2"])):
        train_sft(sft_flags(tmp_path / name, tmp_path / "two", "--max_steps", "1", *lora))
        export(["--run", str(tmp_path / name), "--output_dir", str(tmp_path / f"of_{name}")])
        assert_same(tmp_path / f"of_{name}", tmp_path / name / "final")


def test_what_was_trained_by_blocks_attends_by_blocks(model_dir, tmp_path):
    by_blocks = ["--objective", "block_diffusion", "--block_size", "4", "--max_steps", "1"]
    for name, lora in (("sft", []), ("lora", ["--lora_r", "2"])):
        train_sft(sft_flags(tmp_path / name, model_dir, *by_blocks, *lora))
        export(["--run", str(tmp_path / name), "--output_dir", str(tmp_path / f"of_{name}")])
        merged = ["--adapter_path", str(tmp_path / "lora/final"), "--output_dir", str(tmp_path / "merged")]
        if lora:
            load_script("scripts/merge_lora.py").main(merged)
    for folder in ("sft/final", "of_sft", "lora/final", "of_lora", "merged"):
        model, _ = load_for_inference(str(tmp_path / folder), chat=False)
        found = (model.config.attention_pattern, model.config.attention_block_size)
        assert found == ("block_causal", 4) and model.generation_config.block_length == 4, folder


@pytest.mark.parametrize("shard", ["none", "full"])
def test_adapters_saved_by_two_ranks(shard, model_dir, tmp_path):
    flags = sft_flags(tmp_path / "run", model_dir, "--use_lora", "--lora_r", "2", "--shard", shard)
    run_ranks(2, "sft_training/train_sft.py", [*flags, "--micro_batch_size", "2"], tmp_path)
    export(["--run", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")])
    assert_same(tmp_path / "out", tmp_path / "run/final")
    names = {path.name for path in (tmp_path / "run/final").iterdir()}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}


def test_an_adapter_that_training_continues(model_dir, tmp_path):
    """Its own rank and alpha, not the flags': the update would be many times too strong."""
    lora = ["--use_lora", "--lora_r", "2", "--lora_alpha", "3"]
    train_sft(sft_flags(tmp_path / "sft", model_dir, *lora))
    adapter = str(tmp_path / "sft/final")
    train_dpo = load_script("rlhf/train_dpo.py").main
    pair = {"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "4"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    flags = ["--train_data_path", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "run")]
    flags += ["--max_steps", "2", "--batch_size", "1", "--max_length", "64", "--learning_rate", "1e-2"]
    train_dpo(["--model_name_or_path", str(model_dir), "--sft_adapter_path", adapter, *flags])
    export(["--run", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")])
    assert_same(tmp_path / "out", tmp_path / "run/final")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    assert not torch.equal(*(next(iter(weights(tmp_path / f / "final").values())) for f in ("run", "sft")))


def test_half_precision(model_dir, tmp_path):
    train_sft(sft_flags(tmp_path / "run", model_dir))
    flags = ["--run", str(tmp_path / "run"), "--dtype", "bfloat16", "--output_dir", str(tmp_path / "half")]
    export(flags)
    assert {value.dtype for value in weights(tmp_path / "half").values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="exists; give another place"):
        export(flags)


def test_what_is_not_there_is_named(model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.yaml there"):
        export(["--run", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    train_sft(sft_flags(tmp_path / "run", model_dir))
    with pytest.raises(ValueError, match="no such state there; it has step-3"):
        export(["--run", str(tmp_path / "run"), "--step", "7", "--output_dir", str(tmp_path / "out")])


@pytest.fixture(scope="module")
def drafter_dirs(tmp_path_factory):
    """A verifier of a spare row, and a causal drafter of it that is not always right."""
    folder = tmp_path_factory.mktemp("drafter")
    tokenizer = load_script("scripts/train_tokenizer.py").train_tokenizer(["What is 2 + 3?"], vocab_size=300)
    tokenizer.mask_token = None
    verifier = make_verifier(len(tokenizer) + 4, eos_id=tokenizer.eos_token_id, dtype=torch.float32)
    with torch.no_grad():  # embeddings alike: what a mask is read as says something about what comes
        verifier.model.embed_tokens.weight += torch.linspace(-1, 1, verifier.config.hidden_size)
    verifier.save_pretrained(folder / "verifier")
    tokenizer.save_pretrained(folder / "verifier")
    convert = load_script("scripts/convert_ar.py").main
    out = ["--output_dir", str(folder / "drafter"), "--drafter", "causal"]
    convert(["--model_name_or_path", str(folder / "verifier"), *out])
    model, tokenizer = load_for_inference(str(folder / "drafter"), chat=False)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    save_model(model, tokenizer, folder / "drafter")
    return folder


# What an engine does, in transformers alone, written apart from the suite: accepted tokens of each round.
ENGINE = """
import json, sys, torch, transformers as t
drafter, verifier = (t.AutoModelForCausalLM.from_pretrained(path).eval() for path in sys.argv[1:3])
tokenizer = t.AutoTokenizer.from_pretrained(sys.argv[1])
mask, end = json.load(open(sys.argv[1] + "/config.json"))["pard_token"], verifier.config.eos_token_id
rows = lambda model, ids: model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
for prompt in sys.argv[3:]:
    text, rounds, room = tokenizer(prompt)["input_ids"], [], 16
    while room and (room == 16 or text[-1] != end):
        width = min(4, room - 1)
        draft = rows(drafter, text + [mask] * (width - 1))[len(text) - 1:] if width else []
        wanted = rows(verifier, text + draft)[len(text) - 1:]
        right = [a == b for a, b in zip(draft, wanted)] + [False]
        new = wanted[: right.index(False) + 1]
        new = new[: new.index(end) + 1] if end in new else new
        rounds, text, room = rounds + [right.index(False)], text + new, room - len(new)
    print(json.dumps({"accepted": rounds, "text": text}))
assert "llada" not in sys.modules and "modelling_final" not in sys.modules
"""


def test_plain_transformers_accepts_the_same_tokens(drafter_dirs, tmp_path):
    prompts, folders = [f"What is {n}?" for n in range(6)], (tmp_path / "pard", drafter_dirs / "verifier")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    export(
        ["--run", str(drafter_dirs / "drafter"), "--format", "pard", "--verifier", str(folders[1]),
         "--prompts_file", str(tmp_path / "prompts.jsonl"), "--draft_length", "4", "--max_new_tokens", "16",
         "--output_dir", str(folders[0])]
    )  # fmt: skip
    command = [sys.executable, "-c", ENGINE, *map(str, folders), *prompts]
    nothing = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=nothing, stdout=subprocess.PIPE, text=True, check=True)
    alone = [json.loads(line) for line in done.stdout.splitlines()]
    drafter, own = load_drafter(str(folders[0]), chat=False)
    verifier, tokenizer = load_causal_lm(str(folders[1]), flag="--verifier")
    bridge = Bridge("none", drafter.config, own, tokenizer, num_outputs=verifier.config.vocab_size)
    settings = SpeculativeSettings(draft_length=4, max_new_tokens=16)
    decoder, ends = SpeculativeDecoder(drafter, verifier, bridge, settings), [tokenizer.eos_token_id]
    for prompt, told in zip(prompts, alone, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        answer, stats = decoder.decode(ids, ids, record_id=0, is_done=ends_with(ends))
        assert ids + answer == told["text"] and stats.rounds == len(told["accepted"])
        assert stats.accepted == [sum(n > k for n in told["accepted"]) for k in range(len(stats.accepted))]
    assert len({n for told in alone for n in told["accepted"]}) > 2  # all, some and none


def test_a_drafter_for_engines_is_tried_before_it_is_served(drafter_dirs, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(3)))
    common = ["--run", str(drafter_dirs / "drafter"), "--format", "pard", "--prompts_file", str(prompts)]
    common += ["--max_new_tokens", "16", "--draft_length", "4", "--output_dir"]
    verifier = ["--verifier", str(drafter_dirs / "verifier")]
    export([*common, str(tmp_path / "pard"), *verifier])
    out = capsys.readouterr().out
    lengths = re.findall(r"acceptance length ([\d.]+), by position (.*)", out)
    assert len(lengths) == 2 and lengths[0] == lengths[1] and 1 < float(lengths[0][0]) < 5
    assert '"num_speculative_tokens": 4' in out and "PARDDecodingConfig" in out
    config = json.loads((tmp_path / "pard/config.json").read_text())
    assert config["model_type"] == "llama" and f"mask_token_id={config['pard_token']}" in out
    # and the folder is a drafter of speculative_decode.py
    report = tmp_path / "report.json"
    load_script("inference/speculative_decode.py").main(
        ["--drafter", str(tmp_path / "pard"), *verifier, "--prompts_file", str(prompts),
         "--draft_length", "4", "--max_new_tokens", "16", "--output_path", str(tmp_path / "o.jsonl"),
         "--report_path", str(report)]
    )  # fmt: skip
    found = json.loads(report.read_text())
    assert found["equal"] == 3 and f"{found['acceptance_length']:.3f}" == lengths[0][0]
    with pytest.raises(ValueError, match="--format pard needs --verifier and --prompts_file"):
        export([*common, str(tmp_path / "none")])
