"""The documented ELBO-KTO and DPO commands of the systems this suite succeeds, flags as written, our paths.

They run on a small checkpoint that stands in folders named like the documented ones; only lengths and steps
are cut, by flags at the end.
"""

import json
import shlex
import shutil

import pytest
import torch

from conftest import ROOT, load_script
from llada.flags.parser import parse
from llada.run import Run
from llada.training.metrics import read_metrics

BREF = """rlhf/precompute_bref.py --num_gpus 8 --batch_size 8 --model_path GSAI-ML/LLaDA-8B-Instruct
    --dataset data/kto-mix-14k --k_vals 1,2,4,8 --output_file data/kto-mix-14k-processed/train.jsonl
    --split train --max_samples 64"""
KTO = """rlhf/train_elbo_kto.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct
    --train_dataset_path data/kto-mix-14k-processed/train.jsonl --logging_steps 1 --n_mc_samples 8
    --z0_mode global_mean --kto_beta 0.1 --learning_rate 1e-6 --warmup_ratio 0.03
    --output_dir models/elbo-kto-finetuned"""
DPO_DOCUMENTED = """rlhf/train_dpo.py --pretrain ./llada_local_1.5 --sft_adapter ./checkpoints/sft_adapter
    --output_dir ./dpo_checkpoints_lora --train_batch 64 --micro_batch 2 --zero_stage 2 --max_len 4096
    --epochs 1 --lr 5e-5 --beta 0.2 --lora_rank 128 --lora_alpha 256
    --target_modules q_proj v_proj k_proj attn_out"""
DPO_REAL = """rlhf/train_dpo.py --pretrain ./llada_local_1.5 --dataset pairs --dataset_probs 1.0
    --save_path ./dpo_checkpoints_lora --max_len 4096 --train_batch_size 64 --micro_train_batch_size 2
    --zero_stage 2 --learning_rate 5e-5 --beta 0.2 --adam_betas 0.9 0.95 --l2 0.01 --lr_warmup_ratio 0.003
    --max_epochs 1 --logging_steps 1 --save_steps -1 --eval_steps -1 --use_wandb false
    --wandb_project LLada-Reasoning --wandb_run_name VRPO_lora_hh_golden_rlhf --gradient_checkpointing --bf16
    --flash_attn --lora_rank 128 --lora_alpha 256 --lora_dropout 0.1
    --target_modules q_proj v_proj k_proj attn_out"""

SMALL = ("--max_len", "256", "--train_batch_size", "8")


def run(command, *more):
    script, *flags = shlex.split(command)
    load_script(script).main([*flags, *more])


@pytest.fixture
def project(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("GSAI-ML/LLaDA-8B-Instruct", "llada_local_1.5"):
        shutil.copytree(model_dir, folder)
    for folder, name in (("data/kto-mix-14k", "kto"), ("pairs", "preference")):
        (tmp_path / folder / "data").mkdir(parents=True)
        # as the hub lays a data set out; other splits must not be read
        shutil.copy(ROOT / f"data/samples/{name}.jsonl", f"{folder}/data/train-00000-of-00001.jsonl")
    (tmp_path / "data/kto-mix-14k/data/test-00000-of-00001.jsonl").write_text("not a record")
    return tmp_path


def test_elbo_kto(project, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    run(BREF, "--max_length", "256")
    written = (project / "data/kto-mix-14k-processed/train.jsonl").read_text()
    records = [json.loads(line) for line in written.splitlines()]
    assert len(records) == 8 and set(records[0]["B_ref"]) == {"1", "2", "4", "8"}
    # one process stands for the documented eight, each with one record
    run(KTO, "--gradient_accumulation_steps", "8")
    (step,) = (entry for entry in read_metrics("models/elbo-kto-finetuned/metrics.jsonl") if "loss" in entry)
    assert step["loss"] == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(ValueError, match="--z0_mode global_mean with a batch of one record"):
        run(KTO, "--resume_from_checkpoint", "none")


def test_dpo_as_documented(project):
    # the SFT stage's adapter, as that stage leaves it
    run("sft_training/train_sft.py --model_name_or_path ./llada_local_1.5 --train_data_path sft.jsonl "
        "--output_dir ./checkpoints/sft_adapter --use_lora --lora_dropout 0.1 --max_steps 1 --max_length 256 "
        "--lora_target_modules q_proj k_proj v_proj attn_out",
        "--train_data_path", str(ROOT / "data/samples/sft.jsonl"))  # fmt: skip
    run(
        DPO_DOCUMENTED,
        "--dataset",
        "pairs",
        "--apply_chat_template",
        "--max_len",
        "256",
        "--train_batch",
        "8",
    )
    assert json.loads((project / "dpo_checkpoints_lora/results.json").read_text())["steps"] == 1
    assert (project / "dpo_checkpoints_lora/final/adapter_model.safetensors").is_file()


def test_dpo_with_the_real_spellings(project):
    script, *flags = shlex.split(DPO_REAL)
    module = load_script(script)
    config = parse(module.Config, flags)
    config.settle(Run(rank=0, world_size=1, device=torch.device("cpu")))
    assert (config.output_dir, config.batch_size, config.micro_batch_size) == (
        "./dpo_checkpoints_lora",
        64,
        2,
    )
    assert (config.dtype, config.use_lora, config.lora_r, config.warmup_ratio) == (
        "bfloat16",
        True,
        128,
        0.003,
    )
    assert (config.save_interval, config.eval_interval, config.report_to) == (0, 0, "none")
    assert (config.adam_beta1, config.adam_beta2, config.activation_checkpointing) == (0.9, 0.95, "full")
    run(DPO_REAL, "--apply_chat_template", *SMALL)
    assert (project / "dpo_checkpoints_lora/final/adapter_model.safetensors").is_file()


def test_a_key_given_as_a_flag_is_not_written_down(project, paths_unchecked):
    config = parse(load_script("rlhf/train_dpo.py").Config, [
        "--pretrain", "m", "--dataset", "d", "--save_path", "o", "--use_wandb", "a secret"])  # fmt: skip
    config.settle(Run(rank=0, world_size=1, device=torch.device("cpu")))
    assert config.report_to == "wandb" and "a secret" not in vars(config).values()
