"""The preflight against hand counts, against tensors that training really keeps, and on broken input."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from conftest import ROOT, load_script
from llada.data.prepared import load
from llada.data.rows import ConversationRows
from llada.models.building import attach_lora
from llada.models.tokens import load_tokenizer
from llada.run import Run
from llada.training import dry_run as preflight
from llada.training.config import RowsConfig
from llada.training.cost import GB, Ranks, block_bytes, count_parameters, flops_per_token, memory
from modelling_final import LLaDAConfig, LLaDAModelLM

pretrain = load_script("pretraining/pretrain.py")
train_sft = load_script("sft_training/train_sft.py")
SFT = str(ROOT / "data/samples/sft.jsonl")


def train_config(**values):
    return RowsConfig(output_dir="", **{"batch_size": 1, "micro_batch_size": 1, **values})


def parameters_8b(*, lora, dtype=torch.float32):
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig()).to(dtype)
        if lora:
            model = attach_lora(model, rank=16, alpha=32, dropout=0, target_modules=["all-linear"], seed=0)
    return count_parameters(model)


def test_llada_8b_by_hand():
    full = parameters_8b(lora=False)
    # embedding and head; a block: four square matrices, three of the MLP, two norms; the last norm
    block = 4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096
    assert full.total == full.trainable == 2 * 126464 * 4096 + 32 * block + 4096
    assert full.total == 8_015_581_184
    lora = parameters_8b(lora=True, dtype=torch.bfloat16)
    # rank 16 on q, k, v, attn_out (4,096 -> 4,096) and on three MLP layers (4,096 <-> 12,288)
    assert lora.trainable == 32 * 16 * (4 * 8192 + 3 * 16384) == 41_943_040
    assert lora.total == full.total
    assert lora.weight_bytes == 2 * full.total + 4 * lora.trainable

    # GFLOP a token with the head on all rows: full, LoRA, and LoRA with recomputed blocks
    shape = LLaDAConfig()
    settings = {"length": 4096, "masked_share": 1.0}
    assert flops_per_token(shape, full, **settings) / 1e9 == pytest.approx(51.43, abs=0.01)
    assert flops_per_token(shape, lora, **settings) / 1e9 == pytest.approx(36.43, abs=0.01)
    assert flops_per_token(shape, lora, recompute=True, **settings) / 1e9 == pytest.approx(52.54, abs=0.01)


def test_memory_of_llada_8b_by_hand():
    full = parameters_8b(lora=False)
    one = memory(LLaDAConfig(), train_config(), full, Ranks(1, 1), length=1)
    assert one["weights"] == one["gradients"] == 4 * full.total
    assert one["AdamW"] == 8 * full.total
    # 8 of 64 ranks share a copy; the second micro-batch of a step keeps whole gradients beside the shards
    config = train_config(shard="hybrid", dtype="bfloat16", batch_size=64)
    ranks = Ranks.of("hybrid", 64, 8)
    shared = memory(LLaDAConfig(), config, full, ranks, length=1)
    assert {kind: shared[kind] * 8 for kind in ("weights", "gradients", "AdamW")} == {
        kind: one[kind] for kind in ("weights", "gradients", "AdamW")
    }
    config.batch_size = 128
    accumulated = memory(LLaDAConfig(), config, full, ranks, length=1)
    assert accumulated["gradients"] == shared["gradients"] + 4 * full.total
    # LoRA r16 in bf16 on one sequence of 4,096 with recomputed blocks: about 19 GB
    config = train_config(dtype="bfloat16", use_lora=True, activation_checkpointing="full")
    lora = parameters_8b(lora=True, dtype=torch.bfloat16)
    total = sum(memory(LLaDAConfig(), config, lora, Ranks(1, 1), length=4096).values())
    assert total / GB == pytest.approx(19, abs=0.5)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shard", "targets"),
    [("none", []), ("full", []), ("none", ["all-linear"]), ("full", ["all-linear"]), ("none", ["q_proj"])],
)
def test_activations_are_what_autograd_keeps(shard, targets, dtype, kv_heads):
    config = train_config(dtype=dtype, shard=shard, use_lora=bool(targets))
    num_tokens, kept = 2 * 32, []
    for num_blocks in (1, 2):
        shape = LLaDAConfig(
            d_model=128, n_heads=4, n_kv_heads=kv_heads, n_layers=num_blocks, mlp_hidden_size=320,
            vocab_size=64, embedding_size=64, mask_token_id=1, eos_token_id=2, pad_token_id=2,
        )  # fmt: skip
        model = LLaDAModelLM(shape)
        if targets or shard == "full":  # FSDP gathers weights in --dtype, without autocast
            model.to(getattr(torch, dtype))
        if targets:
            model = attach_lora(model, rank=2, alpha=4, dropout=0, target_modules=targets, seed=0)
        if shard == "full":
            model.to(getattr(torch, dtype))
        casts = dtype == "bfloat16" and shard == "none"
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages = {}

        def keep(tensor, own=own, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        context = torch.autocast("cpu", dtype=torch.bfloat16) if casts else nullcontext()
        trunk = (model.get_base_model() if targets else model).model
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
            trunk(input_ids=torch.zeros(2, 32, dtype=torch.long))
        parameters = count_parameters(model)
        casts_of_weights = 2 * parameters.blocks if casts and not targets else 0
        kept.append(sum(size for size, _ in storages.values()) - casts_of_weights)
    estimate, _ = block_bytes(shape, config, parameters)
    assert estimate == pytest.approx((kept[1] - kept[0]) / num_tokens, rel=0.03)


def sft_flags(folder, model_dir, *more):
    return [
        "--model_name_or_path", str(model_dir), "--train_data_path", SFT, "--output_dir", str(folder),
        "--max_length", "256", "--batch_size", "4", "--dry_run", *more,
    ]  # fmt: skip


def printed(capsys):
    lines = [
        line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line.strip()
    ]
    return {name: text.strip() for name, text in lines}


def test_report_of_sft(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LLaDAModelLM, "from_pretrained", None)  # weights are never loaded
    train_sft.main(sft_flags(tmp_path / "run", model_dir, "--eval_data_path", SFT))
    lines = printed(capsys)
    tokenizer = load_tokenizer(str(model_dir), chat=True)
    alone = Run(0, 1, torch.device("cpu"))
    rows = load([SFT], ConversationRows(256), tokenizer, prepared=tmp_path / "rows", run=alone)
    num_tokens = sum(map(len, rows["input_ids"]))
    assert lines["data"].startswith(f"{len(rows)} rows, {num_tokens:,} tokens")
    assert lines["held out"] == lines["data"]
    steps = max(1, round(len(rows) / 4))
    assert (
        lines["steps"]
        == f"{steps} = {steps * 4 / len(rows):.2f} epochs; {4 * num_tokens / len(rows):,.0f} tokens a step"
    )
    shape = json.loads((model_dir / "config.json").read_text())
    total = 2 * shape["embedding_size"] * 16 + 2 * (4 * 16**2 + 3 * 16 * 24 + 2 * 16) + 16
    assert lines["parameters"] == f"{total:,}, trainable {total:,} (100.00%)"
    assert lines["output"].endswith("a new run")
    assert not (tmp_path / "run").exists()

    # prepared rows say the same
    train_sft.main(sft_flags(tmp_path / "run", model_dir, "--train_data_path", str(tmp_path / "rows/0")))
    assert printed(capsys)["data"] == lines["data"]
    # two data sets, 3 : 1, until both have been seen in full
    train_sft.main(sft_flags(tmp_path, model_dir, "--train_data_path", SFT, SFT, "--data_weights", "3", "1"))
    assert printed(capsys)["data"].startswith(f"about {4 * len(rows)} rows, {4 * num_tokens:,} tokens")


def test_report_of_lora_and_of_an_adapter_folder(model_dir, tmp_path, capsys):
    lora = ("--use_lora", "--lora_r", "2")
    train_sft.main(sft_flags(tmp_path, model_dir, *lora))
    trainable = 2 * 2 * (4 * 32 + 3 * 40)  # blocks x rank x (in + out) of seven layers, 16 and 24 wide
    assert f"trainable {trainable:,} " in printed(capsys)["parameters"]
    with torch.random.fork_rng():
        model = LLaDAModelLM.from_pretrained(model_dir)
        adapted = attach_lora(model, rank=4, alpha=8, dropout=0, target_modules=["q_proj"], seed=0)
        adapted.save_pretrained(tmp_path / "adapter")
    flags = ("--tokenizer_name", str(model_dir), "--use_lora")
    train_sft.main(sft_flags(tmp_path, tmp_path / "adapter", *flags))
    assert f"trainable {2 * 4 * 32:,} " in printed(capsys)["parameters"]


def test_report_of_pretraining_at_64_ranks(tokenizer_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    flags = [
        "--config_name", "8b", "--tokenizer_name", str(tokenizer_dir), "--output_dir", str(tmp_path / "run"),
        "--train_data_path", str(ROOT / "data/samples/pretrain.jsonl"), "--max_length", "64", "--dry_run",
        "--shard", "hybrid", "--dtype", "bfloat16", "--batch_size", "256", "--micro_batch_size", "2",
    ]  # fmt: skip
    pretrain.main(flags)
    lines = printed(capsys)
    assert lines["batch"] == "256 rows = 64 ranks x 2 x 2 micro-batches"
    total = int(lines["parameters"].split(", trainable")[0].replace(",", ""))
    assert lines["weights"] == f"{4 * total / 8 / GB:.3f} GB"
    with pytest.raises(ValueError, match=r"--batch_size 96 must be a multiple of .* x 64 ranks = 128"):
        pretrain.main([*flags, "--batch_size", "96"])
    # packed, documents are counted and no number has to divide another
    pretrain.main([*flags, "--batch_size", "96", "--packing"])
    lines = printed(capsys)
    assert "96 records in about" in lines["batch"] and lines["batch"].endswith(
        "64 ranks x 2 x 1 micro-batches"
    )
    monkeypatch.setenv("RANK", "1")
    pretrain.main([*flags, "--batch_size", "96"])  # rank 0 alone looks
    assert capsys.readouterr().out == ""


def test_large_raw_files_are_judged_by_their_first_records(model_dir, tmp_path, monkeypatch):
    large = tmp_path / "large.jsonl"
    num_records = 20 * (ROOT / "data/samples/sft.jsonl").read_text().count("\n")
    large.write_text(20 * (ROOT / "data/samples/sft.jsonl").read_text())
    tokenizer = load_tokenizer(str(model_dir), chat=True)
    options = {"kind": ConversationRows(256)}
    exact = preflight.data_rows(str(large), tokenizer, **options)
    assert exact.is_exact
    monkeypatch.setattr(preflight, "SAMPLE_RECORDS", num_records // 10)
    guess = preflight.data_rows(str(large), tokenizer, **options)
    assert not guess.is_exact
    assert (guess.num_rows, guess.num_tokens) == pytest.approx((exact.num_rows, exact.num_tokens), rel=1e-6)
    # Parquet tells its bytes a thousand records at a time
    lines = [json.loads(line) for line in large.read_text().splitlines()]
    Dataset.from_list(10 * lines).to_parquet(tmp_path / "large.parquet")
    guess = preflight.data_rows(str(tmp_path / "large.parquet"), tokenizer, **options)
    assert guess.num_rows == pytest.approx(10 * exact.num_rows, rel=1e-2)


def test_what_would_stop_the_run_stops_the_preflight(model_dir, tokenizer_dir, tmp_path, capsys):
    def fails(message, *more, model=model_dir, folder=tmp_path / "run"):
        with pytest.raises(ValueError, match=message):
            train_sft.main(sft_flags(folder, model, *more))

    fails("no such file", "--train_data_path", str(tmp_path / "absent.jsonl"))
    fails("no checkpoint there", model=tmp_path / "absent")
    fails("--data_weights has 1 numbers for 2", "--train_data_path", SFT, SFT, "--data_weights", "1")
    fails("sft.jsonl:1.*do not fit in --max_length 8", "--max_length", "8")
    fails("--shard full needs several processes", "--shard", "full")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "no conversation"}\n')
    fails("bad.jsonl:1", "--train_data_path", str(bad))

    bare = shutil.copytree(model_dir, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    fails("no weights there, only a configuration", model=bare)
    whole = shutil.copytree(model_dir, tmp_path / "whole")
    tensors = load_file(whole / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, whole / "model.safetensors")
    fails("holds I8: quantised weights are not read", model=whole)
    fails("no such file", "--eval_data_path", str(tmp_path / "absent.jsonl"))
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails("model.safetensors is damaged", model=broken)
    other = shutil.copytree(model_dir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"mlp_hidden_size": 32}))
    fails("tensors are not what config.json asks for", model=other)
    (other / "config.json").write_text(json.dumps(config | {"mask_token_id": 5}))
    fails("mask token .* has id", "--tokenizer_name", str(tokenizer_dir), model=other)

    # a state of another run in the folder
    run = sft_flags(tmp_path / "done", model_dir, "--max_steps", "1")
    train_sft.main([*run, "--dry_run", "false"])
    fails("--learning_rate was 2e-05, now 0.1", "--max_steps", "1", "--lr", "0.1", folder=tmp_path / "done")
    capsys.readouterr()
    train_sft.main(run)
    assert printed(capsys)["output"].endswith("step-1 at step 1")
