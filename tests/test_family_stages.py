"""Every published family through the stages, at tiny size, and out again in its own layout."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, load_script
from llada.models.saving import save_model
from llada.models.tokens import load_tokenizer
from modelling_final import LLaDAConfig, LLaDAModelLM
from processes import finish, kill_after, run_ranks, start
from test_every_stage import results, weights
from test_families import PUBLISHED, SIZES

SFT, PRETRAIN = "sft_training/train_sft.py", "pretraining/pretrain.py"


def some(*families):
    """All families; those that are not named only with `-m families`, where every cell is run."""
    marks = {False: [pytest.mark.families], True: []}
    return [pytest.param(family, marks=marks[family in families]) for family in PUBLISHED]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer_dir):
    """Folders with a model of each family over the tokenizer of the other tests."""
    base, tokenizer = tmp_path_factory.mktemp("families"), load_tokenizer(str(tokenizer_dir), chat=True)
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    for family, entry in PUBLISHED.items():
        changes = {"vocab_size": len(tokenizer), "initializer_range": 0.1, "max_position_embeddings": 512}
        torch.manual_seed(0)
        model = LLaDAModelLM(
            LLaDAConfig.from_dict({**entry["config"], **ids, **changes, "bos_token_id": None})
        )
        save_model(model, tokenizer, base / family)
    return base


def run(script, *flags):
    load_script(script).main([str(flag) for flag in flags])


def sft_flags(model, output, *more):
    data = ROOT / "data/samples/sft.jsonl"
    return [
        "--model_name_or_path", model, "--train_data_path", data, "--output_dir", output, "--batch_size", 4,
        "--max_length", 256, "--log_interval", 1, *more,
    ]  # fmt: skip


def debug(name, model, *more):
    return ["--config", ROOT / f"configs/debug/{name}.yaml", "--model_name_or_path", model, *more]


@pytest.mark.parametrize("family", PUBLISHED)
def test_adapters_preferences_rewards_and_answers(family, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = load_file(checkpoints / family / "model.safetensors")
    layers = ["all-linear", *(["experts"] if "moe" in family else [])]
    objective = objective_of(family)
    if objective:
        with pytest.raises(ValueError, match=r"attends by blocks.*; give --objective block_diffusion"):
            run(SFT, *sft_flags(checkpoints / family, tmp_path / "other", "--max_steps", 1))
    lora = ["--max_steps", 1, "--lora_r", 2, "--learning_rate", 0.1, "--lora_target_modules", *layers]
    run(SFT, *sft_flags(checkpoints / family, tmp_path / "sft", *lora, *objective))
    first = json.loads((tmp_path / "sft/metrics.jsonl").read_text().splitlines()[0])
    assert ("expert_load_max" in first) == ("moe" in family)
    run(
        "scripts/merge_lora.py", "--adapter_path", tmp_path / "sft/final", "--output_dir", tmp_path / "merged"
    )
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == before.keys()
    assert any(not torch.equal(merged[name], before[name]) for name in merged if "mlp" in name)

    small = ["--max_steps", 1, "--batch_size", 2, "--micro_batch_size", 2, *objective]
    dpo = [*debug("train_dpo", tmp_path / "merged"), *small, "--num_masks", 1]
    run("rlhf/train_dpo.py", *dpo, "--output_dir", tmp_path / "dpo")
    start_loss = json.loads((tmp_path / "dpo/metrics.jsonl").read_text().splitlines()[0])["eval_loss"]
    assert start_loss == pytest.approx(0.6931, abs=1e-4)  # log 2: policy and reference are the same
    grpo = [*debug("train_grpo", tmp_path / "merged"), *small, "--num_generations", 2]
    run("rlhf/train_grpo.py", *grpo, "--output_dir", tmp_path / "grpo")
    trained = weights(tmp_path / "grpo")
    assert trained.keys() == before.keys()
    config = json.loads((tmp_path / "grpo/final/config.json").read_text())
    assert config["model_type"] == PUBLISHED[family]["config"]["model_type"]
    answers = ["--output_path", tmp_path / "answers.jsonl"]
    run("inference/generate.py", *debug("generate", tmp_path / "grpo/final", *answers))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("family", some("dream", "llada2_moe"))
def test_multiple_choice_and_free_answers_are_scored(family, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = f"model_path={checkpoints / family},gen_length=8,block_length=8"
    flags = ["--config", "configs/debug/eval_llada.yaml", "--model_args", model, "--output_path", tmp_path]
    run("eval/eval_llada.py", *flags, "--limit", 2)
    (file,) = tmp_path.rglob("results_*.json")
    assert set(json.loads(file.read_text())["results"]) >= {"gsm8k_local", "mmlu_local"}


def objective_of(family):
    return ["--objective", "block_diffusion"] if "sdar" in family or "llada2" in family else []


def assert_resumed(script, flags, tmp_path):
    """A run that was killed and continued ends as one that was not, bit by bit."""
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    more = ["--max_steps", 8, "--save_interval", 2, "--log_interval", 1]
    run(script, *flags(whole), *more)
    kill_after(start(script, [*flags(killed), *more], log), killed, 4)
    finish(start(script, [*flags(killed), *more], log), log)
    assert results(killed) == results(whole)
    one, other = weights(whole), weights(killed)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("lora", ["full", pytest.param("lora", marks=pytest.mark.families)])
@pytest.mark.parametrize("family", some("llada2_moe"))
def test_sft_killed_and_resumed_equals_uninterrupted(family, lora, checkpoints, tmp_path):
    more = [*objective_of(family), *(["--lora_r", 2] if lora == "lora" else [])]
    assert_resumed(SFT, lambda folder: sft_flags(checkpoints / family, folder, *more), tmp_path)


@pytest.mark.parametrize("family", some("sdar_moe"))
def test_pretraining_from_scratch_and_on(family, checkpoints, tmp_path):
    data = ["--train_data_path", ROOT / "data/samples/pretrain.jsonl", "--max_length", 64, "--batch_size", 4]
    data += objective_of(family)
    new = ["--config_name", checkpoints / family / "config.json", "--tokenizer_name", checkpoints / family]
    run(PRETRAIN, *data, *new, "--max_steps", 1, "--output_dir", tmp_path / "new")
    there = load_file(checkpoints / family / "model.safetensors")
    made = weights(tmp_path / "new")
    assert {name: value.dim() for name, value in made.items()} == {n: v.dim() for n, v in there.items()}
    config = json.loads((tmp_path / "new/final/config.json").read_text())
    assert config["model_type"] == PUBLISHED[family]["config"]["model_type"]

    def flags(folder):
        return [*data, "--model_name_or_path", tmp_path / "new/final", "--output_dir", folder]

    assert_resumed(PRETRAIN, flags, tmp_path)
    assert any(not torch.equal(value, made[name]) for name, value in weights(tmp_path / "whole").items())


@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("family", some("llada2_moe", "llada_moe"))
def test_two_ranks_equal_one_process(family, shard, checkpoints, tmp_path):
    more = ["--max_steps", 3, "--adam_epsilon", 1e-2, *objective_of(family)]
    run(SFT, *sft_flags(checkpoints / family, tmp_path / "one", *more))
    two = sft_flags(checkpoints / family, tmp_path / "two", *more, "--micro_batch_size", 1, "--shard", shard)
    run_ranks(2, SFT, two, tmp_path)
    for one, other in zip(results(tmp_path / "one"), results(tmp_path / "two"), strict=True):
        same = {key: value for key, value in one.items() if "expert" not in key}  # they count padding, too
        assert {key: other[key] for key in same} == pytest.approx(same, rel=1e-4, abs=1e-5)
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "experts"),  # parameters: layers x experts x 3 matrices x width x width of an expert
    [("llada2_moe", 19 * 256 * 3 * 2048 * 512), ("sdar_moe", 48 * 128 * 3 * 2048 * 768), ("sdar", 0)],
)
def test_a_dry_run_at_the_published_size_names_memory_by_kind(
    family, experts, checkpoints, tmp_path, monkeypatch, capsys
):
    config = json.loads((checkpoints / family / "config.json").read_text())
    (tmp_path / "tokenizer.json").symlink_to(checkpoints / family / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").symlink_to(checkpoints / family / "tokenizer_config.json")
    del config["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config | SIZES[family][0]))
    (tmp_path / "pytorch_model.bin").touch()  # weights that a dry run does not look into
    for ranks in (8, 64):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        flags = ["--dry_run", "--shard", "full", "--dtype", "bfloat16", "--batch_size", ranks]
        flags += [*objective_of(family), "--gpu_memory_gb", 141]
        run(SFT, *sft_flags(tmp_path, tmp_path / "run", *flags))
        said = " ".join(capsys.readouterr().out.split())
        total = int(re.search("parameters ([0-9,]+)", said)[1].replace(",", ""))
        assert total == pytest.approx(SIZES[family][1], abs=5e6) and "; fits into 141.0 GB" in said
        kinds = {"weights": 4 * (total - experts), "gradients": 4 * total, "AdamW": 8 * total}
        for kind, size in (kinds | ({"experts": 4 * experts} if experts else {})).items():
            shown = float(re.search(rf"{kind} ([0-9.]+) GB", said.partition(" at that rate ")[2])[1])
            assert shown == pytest.approx(size / ranks / 1e9, abs=0.002)
        assert ("experts" in said) == bool(experts)
