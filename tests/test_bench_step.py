"""The benchmarks: equal losses and gradients in every arm, FLOPs counted by hand, and whole runs."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, load_script
from llada.diffusion.masking import generator
from llada.flags.parser import parse
from reference_losses import noise

bench_step = load_script("scripts/benchmarks/bench_step.py")
bench_variance = load_script("scripts/benchmarks/bench_variance.py")


def make_bench(**flags):
    config = bench_step.Config(shape="micro", **flags)
    return bench_step.make_bench(config, config.resolve()), config


@pytest.mark.parametrize("mask_ratio", [0.5, 1.0])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_every_arm_computes_the_published_loss_and_gradient(mask_ratio, lora_r):
    bench, config = make_bench(ablations=True, lora_r=lora_r)
    arms = bench_step.make_arms(config, bench.shape.vocab_size - 1)
    assert [arm.name for arm in arms][:4] == ["published", "dllm", "ours", "ours-rows"]
    errors = bench_step.compare(bench, arms, bench.batch(mask_ratio, seed=0))
    assert set(errors) == {arm.name for arm in arms}
    for error in list(errors.values())[1:]:
        assert error["loss"] < 1e-6 and error["gradient"] < 2e-6 and error["worst_tensor"] < 1e-4


def test_an_arm_with_another_loss_is_refused():
    bench, config = make_bench()
    published, *_ = bench_step.make_arms(config, bench.shape.vocab_size - 1)
    wrong = bench_step.Arm("wrong", lambda model, batch: 1.001 * published.loss(model, batch), "float32")
    with pytest.raises(RuntimeError, match="wrong does not compute what published does"):
        bench_step.compare(bench, [published, wrong], bench.batch(0.5, seed=0))


def test_steps_leave_the_weights_alone_and_share_moments():
    bench, config = make_bench()
    before = [p.clone() for p in bench.parameters]
    for arm in bench_step.make_arms(config, bench.shape.vocab_size - 1):
        bench.seconds(arm, bench.batch(0.5, seed=0))
    assert all(torch.equal(p, q) for p, q in zip(bench.parameters, before, strict=True))
    states = [optimizer.state[bench.parameters[0]]["exp_avg"] for optimizer in bench._optimizers.values()]
    assert states[0] is states[1] and states[0].any()


def test_compiled_blocks_share_their_parameters_with_eager_ones():
    bench, _ = make_bench(compile=True)
    assert all(p is q for p, q in zip(bench.model.parameters(), bench._compiled.parameters(), strict=True))
    assert bench.model is not bench._compiled


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 1.0])
def test_noise_masks_the_share_asked_for_and_weighs_by_its_times(mask_ratio):
    x_0 = torch.arange(8 * 64).reshape(8, 64)
    batch = noise(x_0, mask_id=999, mask_ratio=mask_ratio, random=generator(0, "test"))
    assert batch.is_masked.float().mean() == mask_ratio
    assert torch.equal(batch.x_t == 999, batch.is_masked)
    assert torch.equal(batch.targets, x_0.flatten()[batch.rows])
    # each sequence has t L masked tokens of weight 1 / (t B L), so all weights sum to one
    assert batch.weights.sum().item() == pytest.approx(1.0, rel=0.02)


def test_peak_rate_and_mfu_come_out_in_the_same_unit():
    seconds, rates = {"published": [2.0, 4.0], "ours": [1.0, 1.0]}, {"published": 100, "ours": 100}
    rows = bench_step.summarize(seconds, tokens=100, flops=50.0, rates=rates)
    assert rows["ours"]["mfu"] == 0.5 and rows["ours"]["tokens_per_second"] == 100
    assert rows["ours"]["x_published"] == [3.0, 2.0, 4.0]  # median, lowest, highest of neighbouring steps


def test_flops_are_those_counted_by_hand():
    bench, config = make_bench()
    # 2 blocks of 4 x 32 x 32 + 3 x 32 x 48, half the rows in a head of 200 x 32, 24 positions
    by_hand = 6 * 2 * (4 * 32 * 32 + 3 * 32 * 48) + 6 * 0.5 * 200 * 32 + 12 * 2 * 24 * 32
    arms = bench_step.make_arms(config, bench.shape.vocab_size - 1)[:1]
    config.repeats = 1
    result = bench_step.measure(bench, arms, config, mask_ratio=0.5, flags=[])
    assert result["flops"] == 4 * 24 * by_hand


PEER = """
import torch

class LinearAlphaScheduler:
    pass

class MDLMTrainer:  # as much of dllm as the adapter touches
    def __init__(self):
        raise AssertionError("needs data and folders")

    def compute_loss(self, model, inputs):
        x_0 = inputs["input_ids"]
        t = self.time_epsilon + (1 - self.time_epsilon) * torch.rand(x_0.shape[0], device=x_0.device)
        is_masked = torch.rand(x_0.shape, device=x_0.device) < t[:, None]
        x_t = torch.where(is_masked, self.processing_class.mask_token_id, x_0)
        logits = model(input_ids=x_t, attention_mask=None).logits
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x_0, reduction="none")
        return (nll * is_masked / t[:, None]).sum() / x_0.numel()
"""


def test_the_peers_own_trainer_is_made_to_draw_our_noise(tmp_path):
    file = tmp_path / "dllm/core/trainers/mdlm.py"
    file.parent.mkdir(parents=True)
    file.write_text(PEER)
    (tmp_path / "dllm/__init__.py").write_text("raise ImportError('needs another transformers')")
    bench, config = make_bench(peer_path=str(tmp_path))
    try:
        arms = bench_step.make_arms(config, bench.shape.vocab_size - 1)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "dllm"]:
            del sys.modules[name]
    errors = bench_step.compare(bench, arms, bench.batch(0.5, seed=0))
    assert errors["dllm-real"]["gradient"] < 2e-6


def test_a_folder_without_the_peer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--peer_path .*checkout of dllm"):
        bench_step.make_arms(bench_step.Config(peer_path=str(tmp_path)), 0)


def test_the_step_benchmark_runs_and_writes_its_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_step, "_peaks_in_new_process", lambda arm, flags: {"loss": 2e6, "step": 3e6})
    output = tmp_path / "step.json"
    bench_step.main(
        ["--shape", "micro", "--repeats", "2", "--mask_ratio", "0.5", "--memory", "--output", str(output)]
    )
    printed = capsys.readouterr().out
    assert "mask ratio 0.5" in printed and "x published" in printed and "matrix product" in printed
    report = json.loads(output.read_text())["0.5"]
    assert set(report["arms"]) == {"published", "dllm", "ours"}
    assert len(report["seconds"]["ours"]) == 2 and report["memory"]["ours"] == {"loss": 0.0, "step": 3e6}


def test_memory_of_one_arm_is_printed_as_json(capsys):
    bench_step.main(["--shape", "micro", "--mask_ratio", "0.5", "--memory_of", "trunk"])
    assert json.loads(capsys.readouterr().out)["step"] > 1e6


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mask_ratio", "0.5", "1.5"], "--mask_ratio"),
        (["--repeats", "0"], "--repeats 0"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_bad_flags_are_named(flags, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        bench_step.main(["--shape", "micro", *flags])


def test_the_variance_benchmark_runs_on_the_samples(tmp_path, capsys):
    output = tmp_path / "variance.json"
    bench_variance.main(
        ["--data", str(ROOT / "data/samples/pretrain.jsonl"), "--length", "16", "--num_records", "8",
         "--d_model", "16", "--n_layers", "1", "--train_steps", "2", "--draws", "30", "--gradient_draws", "4",
         "--resamples", "50", "--output", str(output)]
    )  # fmt: skip
    assert "stratified + exact" in capsys.readouterr().out
    schemes = json.loads(output.read_text())["schemes"]
    assert set(schemes) == set(bench_variance.SCHEMES)
    assert schemes["iid"]["variance"][0] == 1.0 and len(schemes["exact count"]["losses"]) == 30
    # stratified times keep the masked share steady, whatever the model
    assert schemes["stratified + exact"]["masked_share"][1] < schemes["iid"]["masked_share"][1] / 2


def test_bootstrap_range_holds_the_ratio_of_two_known_variances():
    random = generator(0, "test")
    base, values = random.normal(size=4000), 0.5 * random.normal(size=4000)
    ratio, low, high = bench_variance.relative(values, base, np.var, random, 500)
    # the ratio of two sample variances has standard error 0.25 sqrt(4 / 4000) = 0.008
    assert low < ratio < high and ratio == pytest.approx(0.25, abs=0.03) and high - low < 0.06


@pytest.mark.parametrize("parts", [(), ("more",), ("grpo", "step-1b")])
@pytest.mark.parametrize("shapes", [{}, {"MICRO": "1"}])
def test_the_gpu_script_prints_commands_that_parse(parts, shapes, paths_unchecked):
    folders = {"DLLM": "a folder/dllm", "FAST_DLLM": "a folder", "BANDWIDTH": "4.8"}
    environment = {
        **os.environ,
        **folders,
        **shapes,
        "DRY_RUN": "1",
        "PYTHON": "python",
        "OUTPUT": os.devnull,
    }
    printed = subprocess.run(
        ["bash", str(ROOT / "scripts/benchmarks/gpu.sh"), *parts],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip
    commands = [shlex.split(line) for line in printed.splitlines()]
    assert len(commands) == {(): 6, ("more",): 5}.get(parts, 2)
    for program, path, *flags in commands:
        script = load_script(path)
        config = parse(script.Config, flags)
        assert program == "python" and (config.device == "cpu") == bool(shapes)
        if path.endswith("bench_step.py"):
            assert config.peer_path == "a folder/dllm" and config.compile == config.memory == (not shapes)
        if path.endswith("bench_inference.py"):
            assert config.peer_path == ["a folder"] and (shapes or config.bandwidth == 4.8)
            config.device = "cpu"
            script.check(config)


def test_a_grpo_step_on_one_sharded_rank(capsys):
    flags = ["--sharded", "--repeats", "1", "--gen_length", "8", "--prompt_length", "8", "--num_prompts", "1"]
    load_script("scripts/benchmarks/bench_grpo.py").main(flags)
    assert re.search(r"GRPO whole: .*\nGRPO sharded: ", capsys.readouterr().out)


def test_packed_documents_give_what_padded_rows_give(capsys):
    flags = ["--what", "packed", "--packed_length", "16", "--repeats", "1"]
    load_script("scripts/benchmarks/bench_forward.py").main(flags)
    assert float(capsys.readouterr().out.split("difference ")[1]) < 1e-4
