"""The stage: every estimator learns, rollouts are reused and resumed exactly, ranks add up."""

import json
import os
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, load_script
from fake_judge import FakeServer
from llada.flags.parser import parse
from llada.flags.recipes import recipe_names
from llada.training.metrics import read_metrics

REWARD = (
    "def even(prompts, completions, completion_ids, **columns):\n"
    "    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]\n"
)
WORDS = ["iron", "rust", "river", "seven", "water", "salt", "cold", "tree"]


@pytest.fixture
def flags(model_dir, tmp_path):
    (tmp_path / "even.py").write_text(REWARD)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": word, "prompt": f"Say {word}."}) + "\n" for word in WORDS))
    return [
        "--model_name_or_path", str(model_dir), "--train_data_path", str(prompts), "--max_length", "64",
        "--reward_funcs", f"{tmp_path}/even.py:even", "--gen_length", "4", "--early_stop", "false",
        "--batch_size", "16", "--num_generations", "4", "--learning_rate", "3e-3", "--log_interval", "1",
        "--lr_scheduler_type", "constant", "--rollout_batch_size", "8",
    ]  # fmt: skip


def main(*arguments):
    load_script("rlhf/train_grpo.py").main(list(map(str, arguments)))


def logged(folder, *names):
    return [
        [entry[name] for name in ("step", *names)]
        for entry in read_metrics(folder / "metrics.jsonl")
        if "loss" in entry
    ]


def weights_of(folder):
    return load_file(folder / "final/model.safetensors")


ESTIMATORS = {
    "elbo": ["--likelihood", "elbo"],
    "trajectory": ["--likelihood", "trajectory", "--steps", "2"],
    "trajectory, some steps": ["--likelihood", "trajectory", "--trajectory_steps", "2"],
    "diffu": ["--likelihood", "diffu"],
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_raises_the_reward(flags, tmp_path, name):
    out = tmp_path / "out"
    evaluation = [
        "--eval_data_path",
        tmp_path / "prompts.jsonl",
        "--batch_size",
        "32",
        "--eval_interval",
        "8",
    ]
    main(*flags, *ESTIMATORS[name], *evaluation, "--output_dir", out, "--max_steps", "16")
    rewards = [reward for _, reward in logged(out, "reward")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    assert all(ratio == 1.0 for _, ratio in logged(out, "ratio/mean"))
    results = json.loads((out / "results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"]
    assert (out / "best/model.safetensors").is_file()
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 16 * 32
    assert {line["id"] for line in lines} == set(WORDS)
    group = [line for line in lines if line["step"] == 3 and line["id"] == lines[3 * 32]["id"]][:4]
    assert sum(line["advantage"] for line in group) == pytest.approx(0.0, abs=1e-9)


def test_rollouts_are_reused_and_their_first_ratio_is_one(flags, tmp_path):
    out = tmp_path / "out"
    more = ["--num_iterations", "3", "--beta", "0.1", "--likelihood", "elbo", "--learning_rate", "1e-2"]
    main(*flags, *more, "--output_dir", out, "--max_steps", "6")
    rows = logged(out, "ratio/mean", "kl", "reward")
    assert [ratio == 1.0 for _, ratio, _, _ in rows] == [True, False, False, True, False, False]
    assert rows[0][2] == 0.0  # the policy is the reference before its first step
    assert all(kl > 0 for _, _, kl, _ in rows[1:])
    assert rows[0][3] == rows[1][3] == rows[2][3]
    steps = {json.loads(line)["step"] for line in (out / "completions.jsonl").read_text().splitlines()}
    assert steps == {0, 3}


@pytest.mark.parametrize("estimator", ["elbo", "trajectory", "diffu"])
def test_a_run_stopped_within_a_rollout_goes_on_exactly(flags, tmp_path, monkeypatch, estimator):
    more = ["--num_iterations", "3", "--likelihood", estimator, "--max_steps", "6", "--seed", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(*flags, *more, "--output_dir", whole)

    script = load_script("rlhf/train_grpo.py")
    make = script.RolloutStream.__call__

    def stop_at_four(stream, step):
        if step == 4:
            os.kill(os.getpid(), 15)  # as SLURM does; noticed before step 4 is made
        return make(stream, step)

    monkeypatch.setattr(script.RolloutStream, "__call__", stop_at_four)
    main(*flags, *more, "--output_dir", cut)
    assert (cut / "PREEMPTED").exists() and not (cut / "DONE").exists()
    monkeypatch.undo()
    shutil.copytree(cut, tmp_path / "lost")
    main(*flags, *more, "--output_dir", cut)
    names = ("loss", "grad_norm", "ratio/mean", "reward")
    assert logged(cut, *names) == logged(whole, *names)
    a, b = weights_of(whole), weights_of(cut)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (cut / "completions.jsonl").read_text() == (whole / "completions.jsonl").read_text()

    shutil.rmtree(tmp_path / "lost/rollouts")
    with pytest.raises(ValueError, match="16 completions of rollout 1 are not there"):
        main(*flags, *more, "--output_dir", tmp_path / "lost")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_left_out_of_a_step_does_not_change_it(flags, tmp_path, monkeypatch, name):
    """Completions without an advantage, and copies of others, cost no forward and change nothing."""
    more = [*ESTIMATORS[name], "--max_steps", "3", "--loss_type", "dapo", "--temperature", "0.05"]
    # Adam divides a gradient of 1e-8 by its own size: with its usual epsilon rounding would move weights
    more += ["--adam_epsilon", "1e-3"]
    script = load_script("rlhf/train_grpo.py")
    sizes = []
    needed = script.RolloutStream._needed

    def all_of_them(stream):
        sizes.append((len(needed(stream)[0]), len(stream._completions)))
        return range(len(stream._completions)), [c.advantage for c in stream._completions]

    main(*flags, *more, "--output_dir", tmp_path / "some")
    monkeypatch.setattr(script.RolloutStream, "_needed", all_of_them)
    main(*flags, *more, "--output_dir", tmp_path / "all")
    assert any(some < count for some, count in sizes)
    some, every = (logged(tmp_path / folder, "loss", "grad_norm") for folder in ("some", "all"))
    for a, b in zip(some, every, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)  # at that temperature gradients nearly vanish


def test_it_stops_at_an_accuracy_and_when_nothing_gets_better(flags, tmp_path):
    evaluation = ["--eval_data_path", tmp_path / "prompts.jsonl", "--eval_interval", "2", "--max_steps", "20"]
    out = tmp_path / "reached"
    main(*flags, *evaluation, "--output_dir", out, "--stop_accuracy", "0.01")  # as it is before any step
    assert json.loads((out / "results.json").read_text())["steps"] == 0
    out = tmp_path / "patience"
    for _ in range(2):  # the second time it does nothing more
        main(*flags, *evaluation, "--output_dir", out, "--patience", "2", "--learning_rate", "0")
        assert json.loads((out / "results.json").read_text())["steps"] == 4


DOCUMENTED = """rlhf/train_grpo.py --pretrain ./llada_local_1.5 --sft_adapter ./checkpoints/sft_adapter
    --output_dir ./grpo_checkpoints_lora --train_batch 32 --micro_batch 1 --zero_stage 2 --max_len 4096
    --epochs 1 --lr 3e-5 --group_size 4 --lora_rank 128 --lora_alpha 256
    --target_modules q_proj v_proj k_proj attn_out"""
SCRIPTED = """rlhf/train_grpo.py --save_path ./grpo_2 --ckpt_path ./grpo_2/ckpt --save_steps 20
    --logging_steps 1 --eval_steps -1 --train_batch_size 8 --micro_train_batch_size 1
    --gradient_accumulation_steps 8 --pretrain ./llada_local_1.5
    --sft_adapter_path ./checkpoints/sft_adapter --bf16 --max_epochs 1
    --max_len 4096 --zero_stage 0 --learning_rate 1e-6 --beta 0.04 --dataset ./prompts.jsonl
    --input_key question
    --num_samples_per_prompt 4 --gen_steps 4 --gen_length 4 --temperature 0.7 --remasking_threshold 0.9
    --repetition_penalty 1.2 --lora_rank 128 --lora_alpha 256 --lora_dropout 0.1 --l2 0.01
    --target_modules q_proj v_proj k_proj attn_out --adam_betas 0.9 0.95 --lr_warmup_ratio 0.003
    --gradient_checkpointing --flash_attn --use_ms --max_samples 100 --disable_ds_ckpt --max_ckpt_num 2"""


@pytest.fixture
def predecessor(model_dir, tmp_path, monkeypatch, flags):
    """Its folders, with a small model and adapter in them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "llada_local_1.5")
    load_script("sft_training/train_sft.py").main(
        ["--model_name_or_path", "llada_local_1.5", "--train_data_path", str(ROOT / "data/samples/sft.jsonl"),
         "--output_dir", "sft", "--max_steps", "1", "--max_length", "256", "--use_lora",
         "--lora_dropout", "0.1", "--lora_target_modules", "q_proj", "k_proj", "v_proj", "attn_out"]
    )  # fmt: skip
    shutil.copytree("sft/final", "checkpoints/sft_adapter")
    questions = [{"question": f"Say {word}.", "answer": word} for word in WORDS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in questions))
    return ["--reward_funcs", f"{tmp_path}/even.py:even", "--max_steps", "1", "--gen_length", "4"]


def test_documented_commands(predecessor, tmp_path):
    script, *arguments = shlex.split(DOCUMENTED)
    load_script(script).main([*arguments, "--dataset", "prompts.jsonl", *predecessor])
    assert (tmp_path / "grpo_checkpoints_lora/final/adapter_model.safetensors").is_file()
    script, *arguments = shlex.split(SCRIPTED)
    load_script(script).main([*arguments, *predecessor, "--dtype", "float32"])
    rows = logged(tmp_path / "grpo_2", "kl")
    assert rows == [[1, 0.0]]


def test_steps_without_any_reward_end_the_run(flags, tmp_path, caplog):
    """NaN is no reward, None neither; the function is named, and what it says of itself is logged."""
    (tmp_path / "dead.py").write_text(
        "def dead(prompts, completions, **columns):\n"
        "    return [None, float('nan')] * (len(completions) // 2)\n"
    )
    dead = ["--reward_funcs", f"{tmp_path}/dead.py:dead"]
    with pytest.raises(ValueError, match=r"--reward_funcs dead: no reward in 3 steps in a row"):
        main(*flags, *dead, "--output_dir", tmp_path / "out", "--max_steps", "5", "--max_dead_steps", "3")
    assert caplog.text.count("--reward_funcs dead: None or NaN for every completion of a step") == 3
    main(*flags, *dead, "--output_dir", tmp_path / "on", "--max_steps", "2", "--max_dead_steps", "0")
    both = ["--reward_funcs", f"{tmp_path}/dead.py:dead", f"{tmp_path}/even.py:even", "--max_dead_steps", "1"]
    main(*flags, *both, "--output_dir", tmp_path / "both", "--max_steps", "2")  # learns from the other


def test_a_judge_that_always_fails_is_a_dead_reward(flags, tmp_path, caplog):
    server = FakeServer(lambda body, number: "I cannot say.")
    judge = ["--reward_funcs", "judge", "--judge_base_url", server.url, "--judge_model", "judge"]
    out = ["--output_dir", tmp_path / "out", "--max_steps", "2", "--judge_retries", "1"]
    with pytest.raises(ValueError, match=r"--reward_funcs judge: no reward in 2 steps in a row"):
        main(*flags, *judge, *out, "--max_dead_steps", "2")
    assert logged(tmp_path / "out", "judge/failed", "judge/retried", "judge/cached") == [[1, 1.0, 1.0, 0.0]]
    server.shutdown()


def test_records_that_no_answer_can_match_are_refused(flags, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1 + 1?", "answer": "2"}\n{"prompt": "2 + 2?", "answer": "\\\\frac{4}{"}\n')
    more = ["--train_data_path", bad, "--reward_funcs", "math", "--output_dir", tmp_path / "out"]
    for dry in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match=r"--reward_funcs math: 'answer' .* \(.*bad.jsonl:2\)"):
            main(*flags, *more, *dry)


BLOCKS = ["--objective", "block_diffusion", "--block_size", "2"]


def test_a_model_that_attends_by_blocks_answers_in_them(flags, tmp_path):
    main(*flags, *BLOCKS, "--output_dir", tmp_path / "one", "--max_steps", "1")
    assert "block_length: 2" in (tmp_path / "one/config.yaml").read_text()
    policy = ["--model_name_or_path", tmp_path / "one/final", "--max_steps", "1"]
    with pytest.raises(ValueError, match=r"the model attends by blocks.*; give --objective block_diffusion"):
        main(*flags, *policy, "--output_dir", tmp_path / "two")
    # the sampler's own steps are what they are in every model
    main(*flags, *policy, "--likelihood", "trajectory", "--beta", "0.1", "--output_dir", tmp_path / "steps")
    assert logged(tmp_path / "steps", "ratio/mean", "kl") == [[1, 1.0, 0.0]]


def test_mistakes_are_named(flags, tmp_path):
    out = ["--output_dir", tmp_path / "out", "--max_steps", "1"]
    for more, message in (
        (["--num_generations", "1"], "--num_generations 1"),
        (["--num_generations", "5"], "--batch_size 16 must be a multiple of --num_generations 5"),
        (["--likelihood", "trajectory", "--cache", "dual"], "--likelihood trajectory: cache 'dual'"),
        (["--likelihood", "trajectory", "--temperature", "0"], "--temperature 0"),
        (["--patience", "2"], "--patience 2: has no effect without --eval_data_path"),
        (["--num_iterations", "0"], "--num_iterations 0"),
        (["--likelihood", "diffu", *BLOCKS], "--objective 'block_diffusion': has no effect without --like"),
        ([*BLOCKS, "--mask_plan", "block"], "--mask_plan block: SPG's masks of a whole answer; it has no"),
        ([*BLOCKS, "--surrogate", "linear", "--eubo_weight", "0.5"], "--eubo_weight: SPG's bound of a whole"),
        (BLOCKS[:2], "the model names no block size; give --block_size"),
        (["--temperature", "0"], "temperature above 0"),
        (["--max_length", "8"], "where 4 fit beside --gen_length"),
        (["--input_key", "question"], "no field 'question'"),
        (["--train_data_path", "no/such/file.jsonl"], "no/such/file.jsonl: no such file"),
        (["--reward_funcs", "judge", "--judge_base_url", "http://127.0.0.1:9/v1"], "no server answers there"),
    ):
        with pytest.raises(ValueError, match=message):
            main(*flags, *out, *more)


def test_a_dry_run_never_trains(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # ranks that are described and not there: none is waited for
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    held_out = ["--eval_data_path", tmp_path / "prompts.jsonl"]
    more = ["--output_dir", tmp_path / "out", "--dry_run", "--num_iterations", "3"]
    main(*flags, *held_out, *more)
    printed = capsys.readouterr().out
    assert printed.count("32 rows") == 2  # 8 prompts x 4 completions, twice
    assert "6 = " in printed  # 32 completions / 16 a rollout x 3 steps each
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"no/such\.jsonl"):
        main(*flags, *more, "--eval_data_path", "no/such.jsonl")


TINY = ["--gen_length", "4", "--max_length", "64", "--batch_size", "16", "--num_generations", "4",
        "--max_steps", "4", "--micro_batch_size", "8", "--learning_rate", "3e-3", "--lora_r", "2",
        "--num_iterations", "2", "--save_interval", "3"]  # fmt: skip


@pytest.mark.parametrize("name", recipe_names("rlhf/train_grpo.py"))
def test_a_recipe_runs_and_resumes_and_says_what_it_is(flags, tmp_path, name, capsys):
    recipe = [*flags, "--recipe", name, "--rollout_batch_size", "8", *TINY, "--lora_alpha", "4"]
    recipe += ["--steps", "4", "--lr_scheduler_type", "constant", "--log_interval", "1"]
    recipe += ["--block_length", "1" if name == "justgrpo" else "2"]
    if name in ("d1", "wd1", "coupled", "unigrpo", "bgpo", "spg", "tracerl"):
        recipe += ["--early_stop", "true"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(*recipe, "--output_dir", whole)
    notes = (whole / "recipe.txt").read_text().splitlines()
    assert notes[0].startswith(f"recipe {name} (") and notes[1].startswith("differs from the paper in: ")
    assert "--gen_length 4 (recipe: " in notes[2] and all(
        note in capsys.readouterr().out for note in notes[:1]
    )
    rows = logged(whole, "loss", "grad_norm")
    assert len(rows) == 4 and any(norm > 0 for *_, norm in rows)

    script = load_script("rlhf/train_grpo.py")
    make = script.RolloutStream.__call__

    def stop_at_three(stream, step):
        if step == 3:
            os.kill(os.getpid(), 15)
        return make(stream, step)

    script.RolloutStream.__call__ = stop_at_three
    try:
        main(*recipe, "--output_dir", cut)
    finally:
        script.RolloutStream.__call__ = make
    assert (cut / "PREEMPTED").exists()
    main(*recipe, "--output_dir", cut)
    assert logged(cut, "loss", "grad_norm") == rows


def test_redrawn_masks_are_shared_by_old_new_and_reference(flags, tmp_path):
    more = ["--num_iterations", "3", "--redraw_masks", "true", "--group_masks", "false", "--beta", "0.1"]
    more += [
        "--learning_rate",
        "0",
        "--num_masks",
        "2",
        "--max_steps",
        "6",
        "--output_dir",
        tmp_path / "out",
    ]
    main(*flags, *more)
    rows = logged(tmp_path / "out", "ratio/mean", "kl", "grad_norm")
    assert all(ratio == 1.0 and kl == 0.0 for _, ratio, kl, _ in rows)
    norms = [norm for *_, norm in rows]
    assert len(set(norms[:3])) == 3  # other masks, other gradients


def test_recipes_are_refused_by_name(flags, tmp_path):
    for name, message in (
        ("d2", "--recipe d2: not one of bgpo, cj, "),
        ("vrpo", "--recipe vrpo: a recipe of rlhf/train_dpo.py"),
        ("d-opsd", "--recipe d-opsd: a recipe of alignment/train_kl.py"),
        ("mdpo", "--recipe mdpo: cannot be said yet; missing: rewards of the full prediction"),
    ):
        with pytest.raises(ValueError, match=message):
            main(*flags, "--recipe", name, "--output_dir", tmp_path / "out")
    for more, message in (
        (["--ratio_level", "step"], "--ratio_level step: --likelihood elbo has no such terms"),
        (
            ["--likelihood", "trajectory", "--ratio_level", "token"],
            "--ratio_level token, --trajectory_shrink",
        ),
        (["--eos", "canvas", "--early_stop", "true"], "--eos canvas: "),
        (["--mask_plan", "block", "--num_masks", "2"], "--mask_plan block: 2 masks"),
    ):
        with pytest.raises(ValueError, match=message):
            main(*flags, *more, "--output_dir", tmp_path / "out")


def test_a_recipe_in_a_config_file_gives_way_to_the_file_and_the_command_line(tmp_path):
    config_class = load_script("rlhf/train_grpo.py").Config
    file = tmp_path / "run.yaml"
    file.write_text("recipe: espo\nbeta: 0.5\nmodel_name_or_path: x\noutput_dir: y\nreward_funcs: [math]\n")
    config = parse(config_class, ["--config", str(file), "--epsilon", "0.1", "--model_name_or_path", "a/b"])
    assert (config.beta, config.epsilon, config.mask_plan) == (0.5, 0.1, "complementary")
    assert config.recipe_notes[2] == "overridden: --epsilon 0.1 (recipe: 0.2), --beta 0.5 (recipe: 0.001)"
