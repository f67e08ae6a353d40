"""The training stages as their users run them: through main(), on raw files, on one process and on two."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, load_script
from llada.flags.yaml_files import read_yaml
from llada.training.metrics import read_metrics

pretrain = load_script("pretraining/pretrain.py")
train_sft = load_script("sft_training/train_sft.py")
SAMPLES = ROOT / "data/samples"


def pretrain_flags(folder, tokenizer_dir, tmp_path, *more):
    size = tmp_path / "size.yaml"
    size.write_text(
        "{d_model: 16, n_layers: 2, n_heads: 2, n_kv_heads: 2, mlp_hidden_size: 24, rope_theta: 1e4}"
    )
    return [
        "--config_name", str(size), "--tokenizer_name", str(tokenizer_dir), "--output_dir", str(folder),
        "--train_data_path", str(SAMPLES / "pretrain.jsonl"),
        "--eval_data_path", str(SAMPLES / "pretrain.jsonl"),
        "--max_length", "32", "--max_steps", "4", "--batch_size", "4", "--learning_rate", "1e-2", *more,
    ]  # fmt: skip


def sft_flags(folder, model_dir, *more):
    return [
        "--model_name_or_path", str(model_dir), "--output_dir", str(folder), "--max_length", "256",
        "--train_data_path", str(SAMPLES / "sft.jsonl"), "--eval_data_path", str(SAMPLES / "sft.jsonl"),
        "--max_steps", "3", "--batch_size", "4", "--learning_rate", "1e-2", "--log_interval", "1", *more,
    ]  # fmt: skip


def final_weights(folder):
    return load_file(folder / "final/model.safetensors")


def losses(folder):
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]


def test_pretraining_from_scratch_learns_and_saves_a_checkpoint(tokenizer_dir, tmp_path):
    pretrain.main(pretrain_flags(tmp_path / "run", tokenizer_dir, tmp_path, "--max_steps", "30"))
    results = json.loads((tmp_path / "run/results.json").read_text())
    # uniform over the embedding rows, but for logits of about unit variance, worth half a nat
    rows = json.loads((tmp_path / "run/final/config.json").read_text())["embedding_size"]
    assert results["eval_loss_before"] == pytest.approx(math.log(rows) + 0.5, abs=0.3)
    assert results["eval_loss"] < results["eval_loss_before"] - 0.5
    # the next stage takes the run's folder, or the predecessor's name for its best weights
    pretrain.main([
        "--model_name_or_path", str(tmp_path / "run/best_model.pt"), "--output_dir", str(tmp_path / "more"),
        "--train_data_path", str(SAMPLES / "pretrain.jsonl"), "--max_length", "32", "--max_steps", "1",
    ])  # fmt: skip
    assert (tmp_path / "more/final/model.safetensors").is_file()


def test_written_config_reproduces_the_run(tokenizer_dir, tmp_path):
    pretrain.main(pretrain_flags(tmp_path / "a", tokenizer_dir, tmp_path))
    pretrain.main(["--config", str(tmp_path / "a/config.yaml"), "--output_dir", str(tmp_path / "b")])
    first, second = final_weights(tmp_path / "a"), final_weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sft_learns_only_answers_and_saves_the_best(model_dir, tmp_path):
    train_sft.main(sft_flags(tmp_path, model_dir, "--max_steps", "20", "--eval_interval", "5", "--save_best"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"]
    assert (tmp_path / "best/model.safetensors").is_file()


def example(rows, eos_padding, longest):
    config = train_sft.Config(
        output_dir="", model_name_or_path="", train_data_path=[""], eos_padding=eos_padding
    )
    return train_sft.example_of(rows, config, 9, 0, 0, longest)


def test_eos_policies():
    rows = [{"input_ids": np.array([1, 2, 3, 9]), "in_answer": np.array([0, 0, 1, 1])}]
    default = example(rows, False, 6)
    assert default.input_ids.tolist() == [1, 2, 3, 9]
    assert default.weight == 1 / 2
    # LLaDA's recipe: padding is EOS, it may be masked, and it counts in the answer length
    padded = example(rows, True, 6)
    assert padded.input_ids.tolist() == [1, 2, 3, 9, 9, 9]
    assert padded.maskable.tolist() == [False, False, True, True, True, True]
    assert padded.weight == 1 / 4


def test_data_sets_are_mixed_by_weight(model_dir, tmp_path):
    files = [str(SAMPLES / "sft.jsonl"), str(SAMPLES / "sft_multiturn.jsonl")]
    train_sft.main(sft_flags(tmp_path, model_dir, "--train_data_path", *files, "--data_weights", "3", "1"))
    assert (tmp_path / "DONE").exists()


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (pretrain.main, ["--config_name", "1m"], "needs --tokenizer_name"),
        (pretrain.main, [], "give either --model_name_or_path"),
        (
            pretrain.main,
            ["--config_name", "1m", "--model_name_or_path", "x"],
            "give either --model_name_or_path",
        ),
    ],
)
def test_contradictory_flags(main, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main([*flags, "--train_data_path", "x", "--output_dir", str(tmp_path)])


def test_a_corrupt_record_is_named(model_dir, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text((SAMPLES / "sft.jsonl").read_text().splitlines()[0] + "\n{not json\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: malformed JSON"):
        train_sft.main(sft_flags(tmp_path / "run", model_dir, "--train_data_path", str(file)))


def test_a_run_from_an_adapter_says_what_it_trains(model_dir, tmp_path):
    targets = ("--lora_target_modules", "q_proj", "ff_out")
    lora = ("--use_lora", "--lora_r", "2", "--lora_alpha", "8", *targets, "--max_steps", "1")
    train_sft.main(sft_flags(tmp_path / "first", model_dir, *lora))
    train_sft.main(sft_flags(tmp_path / "second", tmp_path / "first", "--max_steps", "1"))
    said = read_yaml(tmp_path / "second/config.yaml")
    assert (said["use_lora"], said["lora_r"], said["lora_alpha"]) == (True, 2, 8.0)
    assert said["lora_target_modules"] == ["q_proj", "ff_out"]
    assert (tmp_path / "second/final/adapter_model.safetensors").is_file()
    for more, message in (
        (("--use_lora", "--lora_r", "4"), r"--lora_r 4: the adapter that training continues, .*, has 2"),
        (("--use_lora", "--lora_target_modules", "k_proj"), r"has \['q_proj', 'ff_out'\]"),
    ):
        for dry in ((), ("--dry_run",)):
            with pytest.raises(ValueError, match=message):
                train_sft.main(sft_flags(tmp_path / "third", tmp_path / "first", *more, *dry))
