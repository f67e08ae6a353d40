"""README, configs and launchers for 8B on eight GPUs of 80 GB: their own dry runs say that they fit."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT, load_script
from llada.models.building import new_config
from llada.models.tokens import load_tokenizer
from test_docs import commands

SAMPLES = ROOT / "data/samples"
MODELS = (
    "models/LLaDA-8B-Base", "models/mine", "GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct",
    "checkpoints/pretrain_run", "checkpoints/sft_newdataset",
)  # fmt: skip
DATA = {  # of the launchers, and what stands there
    "data_pretrain_stratified/train_new.txt": SAMPLES / "pretrain.jsonl",
    "preferences/paired.jsonl": SAMPLES / "preference.jsonl",
}
ELSEWHERE = {f"{stage}_OUTPUT": f"runs/{stage}" for stage in ("PRETRAIN", "SFT", "DPO", "GRPO")}
ELSEWHERE["SFT_DATA"] = "data/samples/sft.jsonl"
PUZZLES = {"GRPO_REWARDS": "reasoning_gym", "GRPO_DATA": "data/samples/puzzles.jsonl"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_dir, model_dir) -> Path:
    """A folder with an 8B model's configuration wherever the commands name one, and their data."""
    folder = tmp_path_factory.mktemp("eight")
    big, tokenizer = folder / "big", load_tokenizer(str(tokenizer_dir))
    shape = new_config(str(ROOT / "configs/models/8b.yaml"), tokenizer, max_length=4096)
    shape.vocab_size = shape.embedding_size = 126_464  # of the hub's checkpoints
    tokenizer.save_pretrained(big)
    shape.save_pretrained(big)
    (big / "pytorch_model.bin").touch()  # weights that a dry run does not look into
    for name in MODELS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(big)
    (folder / "data").symlink_to(ROOT / "data")
    before = Path.cwd()
    os.chdir(folder)
    load_script("rlhf/precompute_bref.py").main(
        ["--model_name_or_path", str(model_dir), "--dataset", str(SAMPLES / "kto.jsonl"), "--k_vals", "8",
         "--output_file", "runs/bref.jsonl"]
    )  # fmt: skip
    load_script("alignment/precompute_teacher.py").main(
        ["--input", str(SAMPLES / "teacher_positions.json"), "--tokenizer", "models/mine",
         "--max_length", "256", "--output_dir", "teacher-rows"]
    )  # fmt: skip
    for words in commands(ROOT / "README.md"):
        if "pretraining/prepare_corpus.py" in words:
            load_script(words[1]).main(words[2:])
            more = ["--rows", "documents", "--max_length", "8192", "--output_dir", "corpus_8k"]
            load_script(words[1]).main([*words[2:], *more])
    for name, sample in DATA.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(sample)
    os.chdir(before)
    return folder


def dry_run(script: str, flags: list[str], world_size: int, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    load_script(script).main([*flags, "--dry_run", "--gpu_memory_gb", "80"])


def training_of(words: list[str]) -> int | None:
    """The place of a training script among the words of a command."""
    found = (i for i, word in enumerate(words) if re.search(r"/(pretrain|train_(?!pipe)\w+)\.py$", word))
    return next(found, None)


def trainings(page: Path) -> list[tuple[str, list[str], int]]:
    """(script, flags, ranks) of each training command of a page."""
    found = []
    for words in commands(page):
        if (script := training_of(words)) is not None:
            found.append((words[script], words[script + 1 :], 8 if words[0] == "torchrun" else 1))
    return found


@pytest.mark.parametrize(
    ("script", "flags", "ranks"), trainings(ROOT / "README.md"), ids=lambda x: str(x)[:30]
)
def test_commands_of_the_readme_fit(script, flags, ranks, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    dry_run(script, flags, ranks, monkeypatch)
    assert "; fits into 80.0 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        ("pretrain.sh", {}),
        ("pretrain.sh", {"PRETRAIN_CONFIG": "8b", "PRETRAIN_TOKENIZER": "models/mine"}),
        ("sft.sh", {}),
        ("sft.sh", {"SFT_LORA_TARGETS": ""}),
        ("dpo.sh", {}),
        ("dpo.sh", {"DPO_LORA_TARGETS": ""}),
        ("grpo.sh", {**PUZZLES}),
        ("grpo.sh", {**PUZZLES, "GRPO_LORA_TARGETS": ""}),
        ("run_alignment_fine_tuning.sh", {"PROCESSED_FILE": "teacher-rows"}),
        ("run_fine_tuning.sh", {"PROCESSED_LOGITS_FILE": "teacher-rows"}),
    ],
    ids=str,
)
def test_launchers_fit(launcher, variables, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command = ["bash", str(ROOT / "scripts/launch" / launcher)]
    environment = {**os.environ, **ELSEWHERE, **variables, "DRY_RUN": "1", "NUM_GPUS": "8"}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    (words,) = [words for line in printed.splitlines() if training_of(words := shlex.split(line)) is not None]
    script = training_of(words)
    dry_run(words[script].removeprefix(f"{ROOT}/"), words[script + 1 :], 8, monkeypatch)
    assert "; fits into 80.0 GB" in capsys.readouterr().out


def test_continued_pretraining_at_8k_fits(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    dry_run("pretraining/pretrain.py", ["--config", str(ROOT / "configs/pretrain_8k.yaml")], 8, monkeypatch)
    assert "; fits into 80.0 GB" in capsys.readouterr().out
