"""Longer contexts: what stretches positions, that it is kept in checkpoints, and the bound by position."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, load_script
from llada.flags.parser import parse
from llada.models.checkpoints import NO_SCALING, RopeScaling, load_config, load_model
from llada.run import Run
from llada.training.config import RowsConfig
from llada.training.rows_stage import validation_loss
from modelling_final import LLaDAConfig
from test_stages import SAMPLES
from tiny_llada import make_model

bench_context = load_script("scripts/benchmarks/bench_context.py")
pretrain = load_script("pretraining/pretrain.py")


def test_linear_scaling_halves_positions_and_yarn_leaves_the_fast_ones():
    config = LLaDAConfig(d_model=256, n_heads=2, n_kv_heads=2, max_sequence_length=64, rope_theta=1e4)
    changed = {}
    for kind in ("linear", "yarn", "ntk"):
        stretched = RopeScaling(kind, 2.0, 128).apply(LLaDAConfig(**config.to_dict()))
        assert stretched.max_sequence_length == 128
        changed[kind] = make_model(
            d_model=256, n_heads=2, n_kv_heads=2, rope_theta=stretched.rope_theta,
            rope_parameters=stretched.rope_parameters,
        ).model.rotary_emb.inv_freq / (1e4 ** (-torch.arange(64) / 64))  # fmt: skip
    assert torch.allclose(changed["linear"], torch.full((64,), 0.5))
    assert changed["yarn"][0] == pytest.approx(1.0) and changed["yarn"][-1] == pytest.approx(0.5)
    # ntk: the slowest turns half as fast, the fastest as before
    assert changed["ntk"][0] == pytest.approx(1.0) and changed["ntk"][-1] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (RopeScaling("none", 2.0, 64), "--rope_factor 2.0 needs --rope_scaling"),
        (RopeScaling("yarn", 1.0, 64), "must be above 1"),
        (RopeScaling("yarn", 2.0, 200), "stretches 64 tokens to 128, --max_length is 200"),
    ],
)
def test_stretches_that_do_not_fit_are_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        rope.apply(LLaDAConfig(max_sequence_length=64))


def flags(folder, model_dir, *more):
    return [
        "--model_name_or_path", str(model_dir), "--train_data_path", str(SAMPLES / "pretrain.jsonl"),
        "--output_dir", str(folder), "--max_length", "512", "--rope_scaling", "yarn", "--rope_factor", "2",
        "--packing", "--max_steps", "2", "--batch_size", "4", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("extra", [(), ("--use_lora", "--lora_r", "2")], ids=["weights", "lora"])
def test_the_stretch_stays_in_what_is_saved(extra, model_dir, tmp_path):
    pretrain.main(flags(tmp_path / "run", model_dir, *extra))
    for checkpoint in (tmp_path / "run", tmp_path / "merged"):
        if "merged" in checkpoint.name:
            if not extra:
                continue
            load_script("scripts/merge_lora.py").main(
                ["--base_model", str(model_dir), "--adapter_path", str(tmp_path / "run/final"),
                 "--output_dir", str(checkpoint)]
            )  # fmt: skip
        config = load_model(str(checkpoint)).config
        assert config.max_sequence_length == 512
        assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 2.0
    if extra:
        assert load_config(str(model_dir)).rope_parameters["rope_type"] == "default"
        merged, adapted = load_model(str(tmp_path / "merged")), load_model(str(tmp_path / "run"))
        ids = torch.randint(0, 300, (1, 400), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-5)
    # a second stretch counts from the context of the first model
    again = RopeScaling("yarn", 4.0, 1024).apply(load_model(str(tmp_path / "run")).config)
    assert again.rope_parameters["original_max_position_embeddings"] == 256


def test_the_curriculum_flags_change_what_is_learned_and_must_agree_on_resume(model_dir, tmp_path):
    curriculum = [
        "--start_length",
        "64",
        "--length_steps",
        "2",
        "--start_mask_ratio",
        "0.5",
        "--mask_steps",
        "2",
    ]
    pretrain.main(flags(tmp_path / "plain", model_dir))
    pretrain.main(flags(tmp_path / "curriculum", model_dir, *curriculum))
    plain, other = (
        load_file(tmp_path / name / "final/model.safetensors") for name in ("plain", "curriculum")
    )
    assert not all(torch.equal(plain[name], other[name]) for name in plain)
    with pytest.raises(ValueError, match="--start_length was 64, now 0"):
        pretrain.main(flags(tmp_path / "curriculum", model_dir))


@pytest.fixture
def text(tmp_path):
    """A file with enough text for rows of 128 tokens."""
    lines = (SAMPLES / "pretrain.jsonl").read_text().splitlines()
    (tmp_path / "text.jsonl").write_text("\n".join(lines * 2) + "\n")
    return tmp_path / "text.jsonl"


def test_the_bound_by_position_adds_up_to_the_validation_bound(model_dir, text, tmp_path, capsys):
    output = tmp_path / "bound.json"
    bench_context.main([
        "--model_name_or_path", str(model_dir), str(model_dir), "--data_path", str(text),
        "--max_length", "128", "--num_rows", "6", "--num_parts", "4", "--output", str(output),
        "--rope_scaling", "none", "linear", "--rope_factor", "1", "2", "--batch_size", "2",
    ])  # fmt: skip
    plain, stretched = (np.array(bound) for bound in json.loads(output.read_text()).values())
    assert plain.shape == stretched.shape == (6, 4)
    assert not np.allclose(plain, stretched)
    printed = capsys.readouterr().out
    assert "96-128" in printed and "linear 2" in printed and f"{plain.mean():.3f}" in printed

    config = bench_context.Config(
        model_name_or_path=[str(model_dir)], data_path=str(text), max_length=128, num_rows=6
    )
    model = load_model(str(model_dir))
    batches = bench_context.masks_of(bench_context.full_rows(config), config, model.config.mask_token_id)

    class Stream:
        def validation(self, _limit):
            return iter(batches)

    run = Run(rank=0, world_size=1, device=torch.device("cpu"))
    bound = validation_loss(
        model, stream=Stream(), config=RowsConfig(output_dir="", dtype="float32"), run=run
    )
    assert plain.mean() == pytest.approx(bound, rel=1e-5)
    assert math.isfinite(bound) and NO_SCALING.apply(model.config) is model.config


def test_what_bench_context_cannot_do_is_said(model_dir, text):
    base = ["--model_name_or_path", str(model_dir), "--data_path", str(text), "--max_length", "128"]
    for more, message in (
        (["--num_rows", "9999"], "full rows of 128 tokens"),
        (["--num_parts", "3"], "must be a multiple of --num_parts 3"),
        (["--rope_scaling", "yarn", "yarn"], "one entry for each of the 1 models"),
    ):
        with pytest.raises(ValueError, match=message):
            bench_context.main([*base, *more])


def test_the_8k_config_fits_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        (tmp_path / "corpus_8k" / split).mkdir(parents=True)
    config = parse(pretrain.Config, ["--config", str(ROOT / "configs/pretrain_8k.yaml")])
    assert (config.max_length, config.rope_scaling, config.packing) == (8192, "yarn", True)
