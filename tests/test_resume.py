"""kill -9 in the middle of a run: the same command ends with the weights and metrics of a run that was not
killed."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, load_script
from llada.run import read_metrics

SAMPLES = ROOT / "data/samples"
NUM_STEPS = 120


def flags(stage, folder, model_dir):
    data = {"pretraining/pretrain.py": "pretrain.jsonl", "sft_training/train_sft.py": "sft.jsonl"}[stage]
    return [
        "--model_name_or_path", str(model_dir), "--output_dir", str(folder), "--max_length", "256",
        "--train_data_path", str(SAMPLES / data), "--max_steps", str(NUM_STEPS), "--batch_size", "2",
        "--learning_rate", "1e-3", "--save_interval", "5", "--log_interval", "1", "--lora_r", "2",
    ]  # fmt: skip


def kill_at_random_step(command, folder, random_number):
    """Starts the command and kills it without warning once it has logged a random number of steps."""
    steps = random_number.randrange(6, NUM_STEPS // 2)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (folder / "DONE").exists(), "the run ended before it could be killed"


@pytest.mark.parametrize(
    ("stage", "extra"),
    [("pretraining/pretrain.py", ()), ("sft_training/train_sft.py", ("--use_lora",))],
    ids=["pretraining", "sft with lora"],
)
def test_killed_and_resumed_equals_uninterrupted(stage, extra, model_dir, tmp_path):
    main = load_script(stage).main
    main([*flags(stage, tmp_path / "whole", model_dir), *extra])
    command = [sys.executable, str(ROOT / stage), *flags(stage, tmp_path / "killed", model_dir), *extra]
    kill_at_random_step(command, tmp_path / "killed", random.Random(str(extra)))
    main([*flags(stage, tmp_path / "killed", model_dir), *extra])

    name = "adapter_model.safetensors" if extra else "model.safetensors"
    whole, resumed = (load_file(tmp_path / run / "final" / name) for run in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    curves = [
        [
            (entry["step"], entry["loss"])
            for entry in read_metrics(tmp_path / run / "metrics.jsonl")
            if "loss" in entry
        ]
        for run in ("whole", "killed")
    ]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == list(range(1, NUM_STEPS + 1))
