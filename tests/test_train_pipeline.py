"""The pipeline: exact commands, checkpoints handed on, nothing run twice, a failure shown."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, load_script
from llada.flags.parser import parse

pipeline = load_script("scripts/train_pipeline.py")

PREDECESSOR = """
model: {name_or_path: GSAI-ML/LLaDA-8B-Base, tokenizer_name: null, mask_token_id: 126336, max_length: 4096, dtype: bfloat16}
pretraining: {train_data_path: ./train.jsonl, eval_data_path: ./eval.jsonl, output_dir: %(out)s/pretraining,
  max_steps: 100, batch_size: 4, learning_rate: 4e-4, min_learning_rate: 1e-5, log_interval: 100, num_workers: 4, seed: 42}
sft: {train_data_path: ./sft.jsonl, output_dir: %(out)s/sft, max_steps: 10, batch_size: 4, learning_rate: 2e-5}
inference: {default_method: fixed_length, gen_length: 128, block_length: 32, steps: null, temperature: 0.0}
data_format: {sft: {description: prose}}
performance_tips: ["prose"]
"""  # noqa: E501


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(PREDECESSOR % {"out": tmp_path})
    return path


def dry_run(capsys, *argv):
    pipeline.main([*argv, "--dry_run"])
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def flags_of(command):
    return dict(zip(command[2::2], command[3::2], strict=False))


def test_dry_run_prints_the_commands_of_the_predecessors_config(config, tmp_path, capsys):
    pretraining, sft, inference = dry_run(capsys, "--config", str(config), "--stage", "all")
    assert pretraining[:2] == [sys.executable, str(ROOT / "pretraining/pretrain.py")]
    assert float(flags_of(pretraining)["--learning_rate"]) == 4e-4
    assert flags_of(pretraining)["--model_name_or_path"] == "GSAI-ML/LLaDA-8B-Base"
    assert flags_of(sft)["--model_name_or_path"] == f"{tmp_path}/pretraining"
    assert flags_of(sft)["--max_length"] == "4096"
    assert flags_of(inference)["--model_name_or_path"] == f"{tmp_path}/sft"
    assert flags_of(inference)["--method"] == "fixed_length"
    assert flags_of(inference)["--prompt"] == "What is the capital of France?"
    assert "--steps" not in inference and "--block_length" not in inference
    assert not list(tmp_path.glob("pretraining"))  # a dry run leaves nothing behind


def test_single_stages_and_overrides(config, capsys):
    (command,) = dry_run(
        capsys, "--config", str(config), "--stage", "inference", "--prompt", "Hello, how are you?",
        "--is_instruct", "--inference_model_path", "elsewhere",
    )  # fmt: skip
    assert flags_of(command)["--prompt"] == "Hello, how are you?"
    assert flags_of(command)["--model_name_or_path"] == "elsewhere"
    assert command[-1] == "--is_instruct"
    (command,) = dry_run(
        capsys, "--config", str(config), "--stage", "sft", "--sft_model_path", "base",
        "--resume_from_checkpoint", "step-5",
    )  # fmt: skip
    assert flags_of(command)["--model_name_or_path"] == "base"
    assert flags_of(command)["--resume_from_checkpoint"] == "step-5"


@pytest.mark.parametrize("name", ["quickstart", "pipeline"])
def test_every_flag_of_our_configs_exists(name, capsys, paths_unchecked):
    for command in dry_run(capsys, "--config", str(ROOT / f"configs/{name}.yaml")):
        module = load_script(command[1].removeprefix(f"{ROOT}/"))
        if hasattr(module, "Config"):
            parse(module.Config, command[2:])  # exits on an unknown flag
        else:
            module.parse_arguments(command[2:])


def test_a_stages_checkpoint_answers_the_prompts_of_its_held_out_section(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(
        "sft: {model_name_or_path: base, output_dir: a}\ndpo: {model_name_or_path: a, output_dir: b}\n"
        "heldout: {after: [sft], prompts_file: all}\n"
        "'heldout:some': {after: [dpo], prompts_file: few, steps: 4}\n"
    )
    _, after_sft, _, after_dpo = dry_run(capsys, "--config", str(path))
    assert flags_of(after_sft)["--prompts_file"] == "all" and "--steps" not in after_sft
    assert flags_of(after_sft)["--model_name_or_path"] == "a"
    assert flags_of(after_dpo)["--prompts_file"] == "few" and flags_of(after_dpo)["--steps"] == "4"
    assert flags_of(after_dpo)["--model_name_or_path"] == "b" and "--after" not in after_dpo


def test_a_cache_is_shown_with_its_speed_beside_that_of_the_checkpoint_before(tmp_path, capsys, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": 0, "task": "sums", "answer": "4"}\n')
    config, speeds = tmp_path / "config.yaml", iter([100.0, 250.0])
    config.write_text(
        f"output_dir: {tmp_path}\nsft: {{model_name_or_path: base, output_dir: {tmp_path}/a}}\n"
        f"'sft:blocks': {{model_name_or_path: {tmp_path}/a, output_dir: {tmp_path}/b}}\n"
        f"heldout: {{after: [sft], prompts_file: {prompts}}}\n"
        f"'heldout:blocks': {{after: ['sft:blocks'], prompts_file: {prompts}, cache: blocks}}\n"
    )

    def answers(name, command, *_):
        if name.startswith("heldout"):
            flags = flags_of(command)
            Path(flags["--output_path"]).write_text('{"id": 0, "completion": "4"}\n')
            Path(flags["--report_path"]).write_text(json.dumps({"tokens_per_second": next(speeds)}))
        return 1.0

    monkeypatch.setattr(pipeline, "run_once", answers)
    monkeypatch.setattr(pipeline, "puzzle_solved", lambda answer, record: answer == record["answer"])
    monkeypatch.setattr(pipeline.subprocess, "run", lambda _: argparse.Namespace(returncode=0))
    pipeline.main(["--config", str(config)])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in table if "tokens/s" in row] == [["sft:blocks", "tokens/s", "100", "250"]]
    assert [row[:5] for row in table if "sums" in row][1] == [
        "sft:blocks", "held-out", "sums", "100.0%", "100.0%",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sfft: {}\n", "unknown section 'sfft'"),
        ("sft: {}\n", "has no such section"),
        ("heldout: {after: [sft]}\n", "section 'heldout' needs `after` and `prompts_file`"),
        ("heldout: {after: [sft], prompts_file: x}\n", "section 'heldout': no section 'sft' to come after"),
    ],
)
def test_bad_sections(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        pipeline.main(["--config", str(path), "--stage", "pretraining", "--dry_run"])


def test_a_finished_stage_is_not_run_twice_and_a_changed_one_is(tmp_path, capfd):
    counter = tmp_path / "count"
    command = [sys.executable, "-c", f"open({str(counter)!r}, 'a').write('x')"]
    for _ in range(2):
        pipeline.run_once("stage", command, tmp_path / "logs")
    assert counter.read_text() == "x"
    pipeline.run_once("stage", [*command, "changed"], tmp_path / "logs")
    assert counter.read_text() == "xx"


def test_a_failed_stage_stops_the_line_and_shows_its_log(tmp_path, capfd):
    command = [sys.executable, "-c", "print('some output'); raise ValueError('what went wrong')"]
    with pytest.raises(SystemExit) as stop:
        pipeline.run_once("stage", command, tmp_path)
    assert stop.value.code == 1
    out = capfd.readouterr().out
    assert out.index("stage failed with status 1") < out.rindex("ValueError: what went wrong")
    assert not (tmp_path / "stage.done").exists()


def test_the_curves_are_those_of_the_stages_of_the_last_command(tmp_path, capfd):
    config, times = tmp_path / "config.yaml", []
    stages = [f"{name}: {{output_dir: {tmp_path}/{name}}}" for name in ("pretraining", "sft")]
    config.write_text("\n".join([f"output_dir: {tmp_path}", "model: {name_or_path: x}", *stages]))
    for name in ("pretraining", "sft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        arguments = pipeline.parse_arguments(["--config", str(config), "--stage", name])
        pipeline.finish(pipeline.Pipeline(arguments), [])
        times.append((tmp_path / "loss_curves.png").stat().st_mtime_ns)
    assert times[0] < times[1]
    (tmp_path / "sft/metrics.jsonl").unlink()
    with pytest.raises(SystemExit) as stop:
        pipeline.finish(pipeline.Pipeline(arguments), [])
    assert stop.value.code == 2 and "no metrics.jsonl there" in capfd.readouterr().err


def test_accuracy_counts_solved_puzzles_of_each_task(tmp_path):
    record = {"id": "a", "task": "chain_sum", "answer": "5", "metadata": {}}
    prompts, completions = tmp_path / "p.jsonl", tmp_path / "c.jsonl"
    prompts.write_text("".join(json.dumps({**record, "id": name}) + "\n" for name in "abcd"))
    answers = {"a": "<think>2 , 5</think>\n5", "b": "<think>5", "c": "4", "d": "5"}
    completions.write_text(
        "".join(json.dumps({"id": name, "completion": text}) + "\n" for name, text in answers.items())
    )
    assert pipeline.accuracy_by_task(completions, prompts) == {"chain_sum": 0.5}


def start_group(config, log):
    """The pipeline in a process group of its own, as a shell starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "scripts/train_pipeline.py"), "--config", str(config)]
    with open(log, "w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def test_a_signal_to_the_whole_group_saves_and_the_same_command_continues(model_dir, tmp_path):
    text = (
        "output_dir: {out}\nsft: {{model_name_or_path: {model}, train_data_path: {data}, "
        "output_dir: {out}/sft, max_length: 256, max_steps: 300, batch_size: 2, learning_rate: 1e-3, "
        "log_interval: 1}}\n"
    )
    data, configs = ROOT / "data/samples/sft.jsonl", {}
    for name in ("cut", "whole"):
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(text.format(out=tmp_path / name, model=model_dir, data=data))
    log, metrics = tmp_path / "log", tmp_path / "cut/sft/metrics.jsonl"
    for number, num_lines in ((signal.SIGTERM, 20), (signal.SIGINT, 60)):
        process = start_group(configs["cut"], log)
        deadline = time.monotonic() + 240
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < num_lines:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.01)
        os.killpg(process.pid, number)
        assert process.wait(60) == 128 + number
        said = [line for line in log.read_text().splitlines() if "stopped by" in line]
        assert len(said) == 1 and "state saved; the same command continues" in said[0], said
        assert not (tmp_path / "cut/logs/sft.done").exists()
        saved = int((tmp_path / "cut/sft/latest").read_text().removeprefix("step-"))
        assert num_lines <= saved < 300
    for name in ("cut", "whole"):
        assert start_group(configs[name], log).wait(240) == 0, log.read_text()[-3000:]
    one, other = (load_file(tmp_path / name / "sft/final/model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)
