"""LLada-Reasoning's documented commands under their old names: LoRA by default, its data and folders.

They run on a small checkpoint in folders named like its own; sizes and steps are cut by flags at the end.
"""

import json
import os
import shlex
import shutil

import pytest
from datasets import Dataset, DatasetDict

from conftest import ROOT, load_script
from llada.flags.llada_reasoning import todays_arguments
from llada.models.checkpoints import load_config

PRETRAIN = """pretraining/pretrain_llada_extended.py
    --train-data ./data_pretrain_stratified/train_new.txt --val-data ./data_pretrain_stratified/val_new.txt
    --output-dir ./checkpoints/pretrain_experiment --pretrained-model ./llada_local --batch-size 64
    --local-batch 8 --seq-len 8192 --lr 1e-5 --max-train-steps 500 --use-lora --lora-r 128 --lora-alpha 256"""
PRETRAIN_SHORT = "pretraining/pretrain_llada_extended.py --output-dir ./checkpoints/pretrain_run"
SFT = """sft_training/sft_train_new_dataset.py --pretrained-model ./llada_local_1.5
    --sft-data ./filtered_conversational_dataset/ --output-dir ./checkpoints/sft_experiment --lr 1e-5
    --epochs 3 --local-batch 8 --batch-size 128 --warmup-ratio 0.1
    --lora-target-modules q_proj v_proj k_proj attn_out"""
SFT_SHORT = """sft_training/sft_train_new_dataset.py --pretrained-model ./pretrain_merged_model
    --output-dir ./checkpoints/sft_run"""
GRPO = """rlhf/train_grpo.py --pretrain ./llada_local_1.5 --sft_adapter ./checkpoints/sft_adapter
    --output_dir ./grpo_checkpoints_lora --train_batch 32 --micro_batch 1 --zero_stage 2 --max_len 4096
    --epochs 1 --lr 3e-5 --group_size 4 --lora_rank 128 --lora_alpha 256
    --target_modules q_proj v_proj k_proj attn_out"""
MERGE = """scripts/merge_lora.py --base_model ./llada_local_1.5 --adapter_path ./checkpoints/sft_adapter
    --output_path ./merged_model"""
MERGE_SHORT = "scripts/merge_lora.py --base_model ./llada_local_1.5 --adapter_path ./checkpoints/sft_adapter"
SMALL = "--dtype float32 --batch-size 2 --local-batch 2"


def run(command, more=""):
    script, *flags = shlex.split(command)
    main = load_script(script).main
    main([*flags, *shlex.split(more)])


def results(folder):
    return json.loads((folder / "results.json").read_text())


def adapter(folder):
    return json.loads((folder / "final/adapter_config.json").read_text())


@pytest.fixture
def project(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("llada_local", "llada_local_1.5", "pretrain_merged_model"):
        shutil.copytree(model_dir, name)
    texts = [json.loads(line)["text"] for line in (ROOT / "data/samples/pretrain.jsonl").open()]
    (tmp_path / "data_pretrain_stratified").mkdir()
    for name in ("train_new", "val_new"):
        lines = "".join(text.replace("\n", " ") + "\n" for text in texts)
        (tmp_path / f"data_pretrain_stratified/{name}.txt").write_text(lines)
    rows = Dataset.from_dict({"user": [f"{n} + 1?" for n in range(6)], "assistant": ["yes"] * 6})
    DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(
        "filtered_conversational_dataset"
    )
    return tmp_path


def test_pretraining_continues_with_adapters(project):
    run(PRETRAIN, f"{SMALL} --max-train-steps 2 --seq-len 64 --min-lr-ratio 0.5 --val-limit-batches 1")
    config = (project / "checkpoints/pretrain_experiment/config.yaml").read_text()
    for line in ("use_lora: true", "min_learning_rate: 5.0e-06", "eval_limit: 2", "report_to: none"):
        assert line in config, line
    assert "activation_checkpointing: full" in config and "lr_scheduler_type: linear" in config
    found = adapter(project / "checkpoints/pretrain_experiment")
    assert (found["r"], found["lora_alpha"], found["lora_dropout"]) == (128, 256, 0.05)
    run(PRETRAIN_SHORT, f"{SMALL} --max-train-steps 1 --seq-len 64 --activation-checkpointing")
    assert results(project / "checkpoints/pretrain_run")["steps"] == 1


def test_sft_on_its_dataset_and_on_from_its_adapter(project):
    run(SFT, f"{SMALL} --seq-len 128 --torch-dtype float32 --eps 0.001 --answer-weight 1.0 --epochs 1")
    folder = project / "checkpoints/sft_experiment"
    assert results(folder)["steps"] == 3 and "eval_loss" in results(folder)
    run(
        "sft_training/sft_train_new_dataset.py --output-dir ./checkpoints/more "
        "--sft-lora-weights ./checkpoints/sft_experiment/final",
        f"{SMALL} --seq-len 128 --epochs 1",
    )
    assert adapter(project / "checkpoints/more")["base_model_name_or_path"].endswith("llada_local_1.5")
    run(SFT_SHORT, f"{SMALL} --seq-len 128 --epochs 1")
    assert results(project / "checkpoints/sft_run")["steps"] == 3


def test_grpo_and_merging_take_the_adapter(project):
    run(SFT, f"{SMALL} --seq-len 128 --epochs 1")
    shutil.copytree(project / "checkpoints/sft_experiment/final", "checkpoints/sft_adapter")
    (project / "questions.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 2)
    run(
        GRPO,
        "--dataset questions.jsonl --reward_funcs math --max_len 128 --train_batch 8 --gen_length 8 "
        "--max_steps 1 --block_length 8 --steps 4",
    )
    assert results(project / "grpo_checkpoints_lora")["steps"] == 1
    for command, folder in ((MERGE, "merged_model"), (MERGE_SHORT, "merged_model_final")):
        run(command)
        assert load_config(folder).n_layers == load_config("llada_local").n_layers


def test_flags_that_mean_something_else(monkeypatch):
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    words = ["--use-wandb", "--wandb-entity", "team", "--resume-from-checkpoint", "", "--val_mc_runs", "1"]
    assert todays_arguments([*words, "--lr", "1e-4", "--min-lr-ratio", "0.1"]) == [
        "--report_to=wandb", "--learning_rate=0.0001", "--min_learning_rate=1e-05",
    ]  # fmt: skip
    assert os.environ["WANDB_ENTITY"] == "team"
    with pytest.raises(ValueError, match=r"--val-mc-runs 4.0: here it is always 1"):
        todays_arguments(["--val-mc-runs", "4"])
    with pytest.raises(ValueError, match=r"--pretraining-lora-weights x: fold them in first: .*merge_lora"):
        todays_arguments(["--pretraining-lora-weights", "x"])
