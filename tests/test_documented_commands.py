"""The documented commands of the training system this suite succeeds, with our script paths, flags as
written.

They run on a small checkpoint that stands in a folder named like the hub's, and on small data under the
documented
names; only the number of steps is lowered, by one more flag at the end.
"""

import json
import shlex
import shutil

import pytest

from conftest import ROOT, load_script

PRETRAIN = """pretraining/pretrain.py
    --model_name_or_path "GSAI-ML/LLaDA-8B-Base" --train_data_path "./data/train.jsonl"
    --output_dir "./checkpoints/pretraining" --max_steps 100000 --batch_size 4 --learning_rate 4e-4"""
SFT = """sft_training/train_sft.py
    --model_name_or_path "./checkpoints/pretraining/best_model.pt" --train_data_path "./data/sft_train.jsonl"
    --output_dir "./checkpoints/sft" --max_steps 10000 --batch_size 4 --learning_rate 2e-5"""
INFERENCE = """inference/generate.py
    --model_name_or_path "./checkpoints/sft/best_sft_model.pt" --prompt "What is the capital of France?"
    --method fixed_length --gen_length 128 --steps 128 --remasking low_confidence --is_instruct"""
ORIGIN = """inference/generate.py --model_name_or_path ./checkpoints/sft/best_sft_model.pt --prompt Hi
    --method semi_autoregressive_origin --gen_length 128"""
PADDING = """inference/generate.py --model_name_or_path ./checkpoints/sft/best_sft_model.pt --prompt Hi
    --method semi_autoregressive_padding --gen_length 128 --block_length 32"""


def run(command, *more):
    script, *flags = shlex.split(command)
    load_script(script).main([*flags, *more])


@pytest.fixture
def project(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "GSAI-ML/LLaDA-8B-Base")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data/samples/pretrain.jsonl", "data/train.jsonl")
    shutil.copy(ROOT / "data/samples/sft.jsonl", "data/sft_train.jsonl")
    return tmp_path


def test_three_stages_by_hand(project, capsys):
    run(PRETRAIN, "--max_steps", "2", "--max_length", "64")
    run(SFT, "--max_steps", "2", "--max_length", "256")
    for command in (INFERENCE, ORIGIN, PADDING):
        capsys.readouterr()
        run(command)
        assert capsys.readouterr().out.strip()
    assert json.loads((project / "checkpoints/sft/results.json").read_text())["steps"] == 2


def test_the_pipeline(project, capsys):
    (project / "config.yaml").write_text(
        "model: {name_or_path: GSAI-ML/LLaDA-8B-Base, max_length: 256}\n"
        "pretraining: {train_data_path: ./data/train.jsonl, output_dir: ./checkpoints/pretraining, "
        "max_steps: 1, learning_rate: 4e-4}\n"
        "sft: {train_data_path: ./data/sft_train.jsonl, output_dir: ./checkpoints/sft, max_steps: 1}\n"
        "inference: {default_method: fixed_length, gen_length: 32, remasking: low_confidence}\n"
    )
    main = load_script("scripts/train_pipeline.py").main
    main(["--config", "config.yaml", "--stage", "all"])
    capsys.readouterr()
    main(["--config", "config.yaml", "--stage", "all"])
    out = capsys.readouterr().out
    assert out.count("finished before") == 3
    assert (project / "checkpoints/loss_curves.png").is_file()


# The commands of the two KL alignment READMEs (llada-8b-fine-tune), with our script paths.
PREPROCESS_ALIGNMENT = """alignment/preprocess_alignment_data.py --input_file sft_data/llama_logits.json
    --output_file sft_data/processed_alignment.pt --model_name GSAI-ML/LLaDA-8B-Instruct --max_length 4096"""
ALIGN = """alignment/train_kl.py --data_path sft_data/processed_alignment.pt --positions answer
    --model_name GSAI-ML/LLaDA-8B-Instruct --output_dir alignment_output --batch_size 2 --learning_rate 2.5e-5
    --weight_decay 0.1 --epochs 3 --warmup_steps 50 --save_steps 500 --local_rank -1 --log_level INFO
    --gradient_accumulation_steps 1 --max_grad_norm 1.0 --temperature 1.0 --log_interval 100"""
PREPROCESS_LOGITS = """alignment/precompute_teacher.py --input_file sft_data/llama_logits_example.json
    --output_file sft_data/processed_logits.pt --model_name GSAI-ML/LLaDA-8B-Instruct --max_length 4096"""
DISTIL = """alignment/train_kl.py --data_path sft_data/processed_logits.pt --positions masked
    --model_name GSAI-ML/LLaDA-8B-Instruct --output_dir sft_output --batch_size 2 --learning_rate 2.5e-5
    --epochs 1 --loss_type hybrid --temperature 2.0 --alpha 0.5 --beta 0.5"""
EXAMPLE = """inference/generate.py --model_path sft_output/final --prompt "What is the capital of France?"
    --gen_length 32 --steps 32 --block_length 32 --method semi_autoregressive_padding --is_instruct"""


FINETUNE_ALIGNMENT = """alignment/finetune_llada_alignment.py --data_path sft_data/processed_alignment.pt
    --model_name GSAI-ML/LLaDA-8B-Instruct --output_dir alignment_output --batch_size 2 --learning_rate 2.5e-5
    --epochs 3 --warmup_steps 50 --temperature 1.0 --log_interval 100 --log_level DEBUG"""
# The command of the ELBO-KTO system, its inference script's path changed.
ANSWER = """inference/inference.py --model_path=GSAI-ML/LLaDA-8B-Instruct --dataset_path=data/chosen.jsonl
    --output_path=out/chosen.jsonl --max_samples=2 --num_gpus=1"""


def test_the_alignment_script_by_its_old_name(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "GSAI-ML/LLaDA-8B-Instruct")
    (tmp_path / "sft_data").mkdir()
    shutil.copy(ROOT / "data/samples/teacher_positions.json", "sft_data/llama_logits.json")
    for command in (PREPROCESS_ALIGNMENT, FINETUNE_ALIGNMENT):
        run(command)
    assert json.loads((tmp_path / "alignment_output/results.json").read_text())["steps"] == 3
    log = (tmp_path / "alignment_output/training_log.log").read_text()
    assert "INFO llada.training.metrics: step 3: loss" in log and "metrics: step 0: eval_" not in log
    assert "DEBUG llada.autoregressive.alignment: records [" in log


def test_answers_to_conversations_by_the_old_name(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "GSAI-ML/LLaDA-8B-Instruct")
    config = json.loads((tmp_path / "GSAI-ML/LLaDA-8B-Instruct/config.json").read_text())
    (tmp_path / "GSAI-ML/LLaDA-8B-Instruct/config.json").write_text(
        json.dumps({**config, "max_sequence_length": 1024})
    )
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    completion = [{"role": "assistant", "content": "chosen"}]
    records = [{"id": n, "prompt": turns[2 - n :], "completion": completion} for n in (2, 0)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/chosen.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run(ANSWER, "--steps", "16")
    lines = [json.loads(line) for line in (tmp_path / "out/chosen.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [2, 0] and lines[0]["prompt"] == turns
    for line in lines:
        ((role, text),) = [message.values() for message in line["completion"]]
        assert role == "assistant" and text != "chosen"


def test_kl_alignment(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "GSAI-ML/LLaDA-8B-Instruct")
    (tmp_path / "sft_data").mkdir()
    shutil.copy(ROOT / "data/samples/teacher_positions.json", "sft_data/llama_logits.json")
    shutil.copy(ROOT / "data/samples/teacher_logits.json", "sft_data/llama_logits_example.json")
    for command in (PREPROCESS_ALIGNMENT, ALIGN, PREPROCESS_LOGITS, DISTIL):
        run(command)
    for folder, steps in (("alignment_output", 3), ("sft_output", 2)):
        assert json.loads((tmp_path / folder / "results.json").read_text())["steps"] == steps
    capsys.readouterr()
    run(EXAMPLE)
    assert capsys.readouterr().out.strip()


def test_the_config_that_the_readme_prints(model_dir, tmp_path, monkeypatch):
    """Without folders and data: they are where the file that it ships names them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "GSAI-ML/LLaDA-8B-Base")
    for name in ("pretrain", "sft"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(ROOT / f"data/samples/{name}.jsonl", f"data/{name}/train.jsonl")
    printed = """model:
  name_or_path: "GSAI-ML/LLaDA-8B-Base"
  max_length: 256

pretraining:
  max_steps: 1
  batch_size: 4
  learning_rate: 4e-4

sft:
  max_steps: 1
  learning_rate: 2e-5

inference:
  default_method: "fixed_length"
  gen_length: 16
  remasking: "low_confidence"
"""
    (tmp_path / "config.yaml").write_text(printed)
    load_script("scripts/train_pipeline.py").main(["--config", "config.yaml", "--stage", "all"])
    for stage in ("pretraining", "sft"):
        assert json.loads((tmp_path / f"checkpoints/{stage}/results.json").read_text())["steps"] == 1
