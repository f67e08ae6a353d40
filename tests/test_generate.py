"""inference/generate.py: prompts in, answers out, whatever the batch, the ranks or a kill."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import load_script

QUICK = ["--gen_length", "8", "--steps", "4", "--block_length", "4"]


@pytest.fixture
def run(model_dir, tmp_path):
    """Runs the script on the tiny checkpoint; returns the records it wrote."""

    def call(*flags, output="out.jsonl"):
        target = ["--output_path", str(tmp_path / output), "--overwrite"] if output else []
        load_script("inference/generate.py").main(["--model_path", str(model_dir), *target, *QUICK, *flags])
        return [json.loads(line) for line in (tmp_path / output).read_text().splitlines()] if output else None

    return call


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    records = [
        {"id": "a", "prompt": "What is the capital of France?", "answer": "Paris"},
        {"prompt": [{"role": "user", "content": "hi"}]},
        {"question": "2 + 3 = ?", "answer": "5"},
        {"id": 7, "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
        {"instruction": "Name a colour.", "output": "red"},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def test_one_prompt_goes_to_the_terminal(run, capsys, model_dir):
    run("--prompt", "The capital of France", output=None)
    assert capsys.readouterr().out.count("\n") >= 1


def test_records_of_every_kind_in_input_order(run, prompts):
    records = run("--prompts_file", prompts, "--is_instruct")
    assert [record["id"] for record in records] == ["a", 1, 2, 7, 4]
    assert records[0]["prompt"] == "What is the capital of France?"
    assert all(isinstance(record["completion"], str) for record in records)


def test_text_files_have_a_prompt_a_line(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("first prompt\n\nsecond prompt\nthird\n")
    assert [record["prompt"] for record in run("--prompts_file", str(file))] == [
        "first prompt", "second prompt", "third",
    ]  # fmt: skip
    assert len(run("--dataset_path", str(file), "--max_samples", "2")) == 2


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--temperature", "1"],
        ["--remasking", "random"],
        ["--parallel_decoding", "factor", "--cache", "dual"],
        ["--method", "semi_autoregressive_origin", "--cfg_scale", "0.5"],
    ],
)
def test_batch_size_changes_nothing(run, prompts, flags):
    common = ["--prompts_file", prompts, "--is_instruct", *flags]
    one = run(*common, "--batch_size", "1", "--dtype", "float64")
    assert run(*common, "--batch_size", "3", "--dtype", "float64", output="other.jsonl") == one


def test_ranks_share_the_work_and_write_the_same(run, prompts, tmp_path, monkeypatch):
    flags = ["--prompts_file", prompts, "--is_instruct", "--temperature", "1"]
    alone = run(*flags)
    script = load_script("inference/generate.py")
    this = script.start_run("cpu")
    # one after the other in this process: rank 1 leaves its part, rank 0 comes last and merges
    monkeypatch.setattr(script, "start_run", lambda device: replace(this, rank=1, world_size=2))
    with pytest.raises(FileNotFoundError):
        run(*flags, output="two.jsonl")
    part = tmp_path / "two.jsonl.parts/rank-1.jsonl"
    assert len(part.read_text().splitlines()) == 2
    monkeypatch.setattr(script, "start_run", lambda device: replace(this, rank=0, world_size=2))
    assert run(*flags, output="two.jsonl") == alone
    assert not part.parent.exists()


def test_a_killed_run_goes_on_where_it_stopped(run, prompts, tmp_path, monkeypatch):
    common = ["--prompts_file", prompts, "--is_instruct", "--batch_size", "2"]
    whole = run(*common)
    script = load_script("inference/generate.py")
    generate = script.answer_batches
    answered = []

    def dies(*args):
        for item, *rest in generate(*args):
            if len(answered) == 3:
                raise KeyboardInterrupt
            answered.append(item.index)
            yield item, *rest

    monkeypatch.setattr(script, "answer_batches", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*common, output="killed.jsonl")
    part = tmp_path / "killed.jsonl.parts/rank-0.jsonl"
    part.write_text(part.read_text() + '{"key": "cut in the mid')

    def notes(*args):
        for item, *rest in generate(*args):
            answered.append(item.index)
            yield item, *rest

    monkeypatch.setattr(script, "answer_batches", notes)
    report = tmp_path / "report.json"
    assert run(*common, "--report_path", str(report), output="killed.jsonl") == whole
    assert sorted(answered) == [0, 1, 2, 3, 4]
    speed = json.loads(report.read_text())
    assert 0 < speed["tokens"] <= 2 * 8  # of the two prompts that were left
    assert speed["tokens_per_second"] == pytest.approx(speed["tokens"] / speed["seconds"])


def test_a_corrupt_line_stops_the_run_and_keeps_what_was_finished(run, prompts, tmp_path, monkeypatch):
    script = load_script("inference/generate.py")
    generate, answered = script.answer_batches, []

    def notes(*args):
        for item, *rest in generate(*args):
            answered.append(item.index)
            yield item, *rest

    monkeypatch.setattr(script, "answer_batches", notes)
    monkeypatch.setattr(script, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("--prompts_file", prompts, "--is_instruct", "--max_samples", "3")
    monkeypatch.undo()
    monkeypatch.setattr(script, "answer_batches", notes)
    good = Path(prompts).read_text()
    Path(prompts).write_text(good + '{"prompt": "cut')
    with pytest.raises(ValueError, match=r"prompts.jsonl:6: malformed JSON"):
        run("--prompts_file", prompts, "--is_instruct")
    assert len((tmp_path / "out.jsonl.parts/rank-0.jsonl").read_text().splitlines()) == 3
    Path(prompts).write_text(good)
    assert len(run("--prompts_file", prompts, "--is_instruct")) == 5
    assert sorted(answered) == [0, 1, 2, 3, 4]


def test_other_flags_do_not_reuse_answers(run, prompts, tmp_path, monkeypatch):
    common = ["--prompts_file", prompts, "--is_instruct"]
    script = load_script("inference/generate.py")
    monkeypatch.setattr(script, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(*common)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"other settings: temperature was 0.0, is 2.0. Give the same ones"):
        run(*common, "--temperature", "2")
    shutil.rmtree(tmp_path / "out.jsonl.parts")
    warm = run(*common, "--temperature", "2")
    assert warm == run(*common, "--temperature", "2", output="fresh.jsonl")


def test_long_prompts(run, tmp_path, capsys):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "short"}) + "\n" + json.dumps({"prompt": "x " * 400}) + "\n")
    with pytest.raises(ValueError, match=r"long.jsonl:2: \d+ prompt tokens .* --long_prompts"):
        run("--prompts_file", str(file))
    assert [record["id"] for record in run("--prompts_file", str(file), "--long_prompts", "drop")] == [0]
    assert "long prompts, drop: 1" in capsys.readouterr().out
    assert len(run("--prompts_file", str(file), "--long_prompts", "truncate")) == 2


def test_several_answers_and_the_best(run, prompts):
    flags = ["--prompts_file", prompts, "--is_instruct", "--num_return_sequences", "3", "--temperature", "1"]
    for rule in ("first", "majority", "likelihood"):
        records = run(*flags, "--best_of", rule)
        assert all(len(record["completions"]) == 3 for record in records)
        assert all(record["completion"] in record["completions"] for record in records)


def test_trace_has_every_step(run, prompts, tmp_path):
    trace = tmp_path / "steps.jsonl"
    flags = ["--prompts_file", prompts, "--is_instruct", "--no_early_stop", "--trace", str(trace)]
    records = run(*flags)
    entries = [json.loads(line) for line in trace.read_text().splitlines()]
    assert len(entries) == 5 * 4 and {entry["id"] for entry in entries} == {
        record["id"] for record in records
    }
    assert {"candidate", "block", "step", "positions", "token_ids", "confidences"} <= set(entries[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad.jsonl: holds no records"),
        ('{"prompt": "a"}\n{"prompt": \n', "bad.jsonl:2: malformed JSON"),
        ('{"prompt": ""}\n', "bad.jsonl:1: empty prompt"),
        ('{"text": "a"}\n{"nothing": 1}\n', "bad.jsonl:2: no prompt in fields"),
        ('{"prompt": "a <|mdm_mask|>"}\n', "bad.jsonl:1: .*mask token"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
         '{"role": "user", "content": "c"}]}\n', "bad.jsonl:1: .* 3 messages needs --is_instruct"),
    ],
)  # fmt: skip
def test_bad_prompt_files(run, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        run("--prompts_file", str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --prompt TEXT or --prompts_file"),
        (["--prompt", "a", "--gen_length", "10"], "gen_length 10 is not a multiple of block_length 4"),
        (["--prompt", "a", "--steps", "1"], "steps 1 cannot be shared out evenly over 2 blocks"),
        (
            ["--prompt", "a", "--best_of", "majority"],
            "--best_of majority: has no effect without --num_return_sequences",
        ),
        (["--prompt", "a", "--gen_length", "256", "--steps", "256"], "leaves no room in a context of 256"),
    ],
)
def test_bad_flags(run, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(*flags)


def test_num_gpus_starts_processes(run, prompts, monkeypatch):
    started = []
    monkeypatch.setattr("llada.run.os.cpu_count", lambda: 3)
    monkeypatch.setattr("llada.run.torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("llada.run.torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("llada.run.subprocess.run", lambda command, check: started.append(command))
    with pytest.raises(FileNotFoundError):  # nobody answered
        run("--prompts_file", prompts, "--is_instruct", "--num_gpus", "4")
    (command,) = started
    assert "--nproc_per_node=3" in command and str(prompts) in command


def test_answers_as_messages(run, prompts):
    flags = ["--prompts_file", prompts, "--is_instruct"]
    texts = run(*flags)
    for line, text in zip(run(*flags, "--completion_format", "messages"), texts, strict=True):
        assert line["completion"] == [{"role": "assistant", "content": text["completion"]}]
        assert line["prompt"][-1]["role"] == "user" and line["id"] == text["id"]


def test_the_methods_of_the_predecessor(model_dir):
    script = load_script("inference/generate.py")

    def parse(*flags):
        words = ["--model_path", str(model_dir), "--prompt", "Hi", *flags]
        return script.sampler_settings(script.parse(script.Config, words))

    assert parse().method == "fixed_length"
    assert parse("--block_length", "32").method == "semi_autoregressive_padding"
    with pytest.raises(ValueError, match="--block_length 32: has no effect with --method fixed_length"):
        parse("--method", "fixed_length", "--block_length", "32")
    assert parse("--method", "semi_autoregressive_origin").block_of(128) == 32
