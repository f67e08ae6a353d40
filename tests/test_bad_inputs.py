"""What users write wrong, over all entry points: one line that names the flag or the file, nothing written.

The first table derives cases from every declaration of every program; the second holds records, the third
checkpoints and side files, that are damaged; the fourth what the flags together exclude; the last what must
go through.
"""

import dataclasses
import gzip
import json
import runpy
import shutil
import typing
from pathlib import Path

import pytest

from conftest import ROOT, load_script
from llada.flags import paths
from llada.flags.declaration import said_of
from llada.flags.parser import _value_type, parse, run_main

SAMPLES = ROOT / "data/samples"
MODEL, OUT = "{model}", "{out}"
TRAIN = f"--model_name_or_path {MODEL} --output_dir {OUT} --max_length 256 --max_steps 1 --batch_size 2"
SAMPLE = {
    name: f"{SAMPLES}/{name}.jsonl" for name in ("pretrain", "sft", "preference", "kto", "prompts", "puzzles")
}

# Every program with a command line of flags, and one that works as far as flags go.
PROGRAMS = {
    "pretraining/prepare_corpus.py": (
        f"--input {SAMPLE['pretrain']} --tokenizer_name {MODEL} --output_dir {OUT}"
    ),
    "pretraining/pretrain.py": f"{TRAIN} --train_data_path {SAMPLE['pretrain']}",
    "sft_training/prepare_sft.py": f"--input {SAMPLE['sft']} --tokenizer_name {MODEL} --output_dir {OUT}",
    "sft_training/train_sft.py": f"{TRAIN} --train_data_path {SAMPLE['sft']}",
    "alignment/train_teacher.py": f"{TRAIN} --tokenizer_name {MODEL} --train_data_path {SAMPLE['sft']}",
    "alignment/precompute_teacher.py": (
        f"--input {SAMPLES}/teacher_logits.json --tokenizer_name {MODEL} --output_dir {OUT}"
    ),
    "alignment/train_kl.py": f"{TRAIN} --train_data_path {SAMPLE['sft']}",
    "rlhf/make_preferences.py": (
        f"--model_name_or_path {MODEL} --prompts_file {SAMPLE['puzzles']} --output_dir {OUT} --gen_length 8 "
        "--reward_funcs format"
    ),
    "rlhf/precompute_bref.py": (
        f"--model_name_or_path {MODEL} --input {SAMPLE['kto']} --num_masks 2 --output_path {OUT}/b.jsonl"
    ),
    "rlhf/train_dpo.py": f"{TRAIN} --train_data_path {SAMPLE['preference']}",
    "rlhf/train_elbo_kto.py": f"{TRAIN} --train_data_path {SAMPLE['kto']}",
    "rlhf/train_grpo.py": (
        f"{TRAIN} --train_data_path {SAMPLE['puzzles']} --gen_length 8 --num_generations 2 "
        "--reward_funcs format"
    ),
    "inference/generate.py": f"--model_name_or_path {MODEL} --prompt Hi --gen_length 8",
    "inference/chat.py": f"--model_name_or_path {MODEL} --gen_length 8",
    "inference/serve.py": f"--model_name_or_path {MODEL} --gen_length 8",
    "inference/speculative_decode.py": f"--model_name_or_path {MODEL} --verifier {MODEL} --prompt Hi",
    "scripts/convert_ar.py": f"--model_name_or_path {MODEL} --output_dir {OUT}",
    "scripts/download.py": f"--model base --output_dir {OUT}",
    "scripts/export_checkpoint.py": f"--run {MODEL} --output_dir {OUT}",
    "scripts/make_quickstart_data.py": f"--output_dir {OUT}",
    "scripts/merge_lora.py": f"--adapter_path {MODEL} --output_dir {OUT}",
    "scripts/plot_metrics.py": f"--runs {MODEL} --output {OUT}/plot.png",
    "scripts/replay.py": f"--trace {SAMPLE['sft']} --tokenizer_name {MODEL} --output {OUT}/page.html",
    "scripts/train_tokenizer.py": f"--data {SAMPLE['pretrain']} --output_dir {OUT}",
    "scripts/benchmarks/bench_blocks.py": f"--text {SAMPLE['pretrain']}",
    "scripts/benchmarks/bench_context.py": f"--model_name_or_path {MODEL} --data_path {SAMPLE['pretrain']}",
    "scripts/benchmarks/bench_coverage.py": "",
    "scripts/benchmarks/bench_drafters.py": (
        f"--teacher {MODEL} --train_prompts {SAMPLE['sft']} --test_prompts {SAMPLE['sft']} --output_dir {OUT}"
    ),
    "scripts/benchmarks/bench_forward.py": "",
    "scripts/benchmarks/bench_grpo.py": "",
    "scripts/benchmarks/bench_inference.py": "--shape micro-random",
    "scripts/benchmarks/bench_on_policy.py": f"--quickstart {SAMPLES} --output_dir {OUT}",
    "scripts/benchmarks/bench_orders.py": "",
    "scripts/benchmarks/bench_packing.py": f"--train_data_path {SAMPLE['sft']} --tokenizer_name {MODEL}",
    "scripts/benchmarks/bench_posttraining.py": (f"--checkpoint {MODEL} --data {SAMPLES} --output_dir {OUT}"),
    "scripts/benchmarks/bench_recipes.py": f"--checkpoints {MODEL} --data {SAMPLES} --output_dir {OUT}",
    "scripts/benchmarks/bench_serving.py": f"--prompts_file {SAMPLE['prompts']}",
    "scripts/benchmarks/bench_step.py": "--shape micro",
    "scripts/benchmarks/bench_variance.py": f"--data {SAMPLE['pretrain']}",
    "scripts/benchmarks/grade_generations.py": f"--input {SAMPLES}",
    "scripts/benchmarks/kill_test.py": f"--output_dir {OUT}",
    "scripts/benchmarks/prove.py": f"--output {OUT}/proofs.md",
}


# Programs under the names of other systems, and those whose command line is not all ours.
OTHERS = [
    ("inference/inference.py", "--output_path=x", "required: --model_name_or_path"),
    ("inference/inference.py", "--model_path=x --gen_length=0", "--gen_length 0: must be at least 1"),
    (
        "inference/inference.py",
        "--model_path ./x --prompt Hi",
        "--model_name_or_path ./x: no checkpoint there",
    ),
    ("alignment/finetune_llada_alignment.py", "--epochs 0", "--num_train_epochs 0.0: must be above 0"),
    ("alignment/finetune_llada_alignment.py", "--alpha 0.2", "--alpha 0.2: has no effect"),
    ("alignment/preprocess_alignment_data.py", "--max_length 0", "--max_length 0: must be at least 1"),
    ("alignment/preprocess_alignment_data.py", "--input_file x.json", "--input x.json: no such file"),
    ("pretraining/pretrain_llada_extended.py", "--val-mc-runs 4", "--val-mc-runs 4.0: here it is always 1"),
    ("pretraining/pretrain_llada_extended.py", "--lr fast", "--lr: invalid float value: 'fast'"),
    ("pretraining/pretrain_llada_extended.py", "--lora-r 0", "--use_lora: --lora_r 0 is no adapter"),
    ("sft_training/sft_train_new_dataset.py", "--lr -1", "--learning_rate -1.0: must be at least 0"),
    ("sft_training/sft_train_new_dataset.py", "--pretraining-lora-weights x", "fold them in first"),
    (
        "sft_training/sft_train_new_dataset.py",
        "--grad-clip-norm nan",
        "--max_grad_norm nan: must be a finite",
    ),
    ("scripts/train_pipeline.py", "--config nowhere.yaml", "nowhere.yaml: cannot be read"),
    ("scripts/train_pipeline.py", "--nonsense 1", "unrecognized arguments: --nonsense 1"),
    (
        "scripts/train_pipeline.py",
        f"--config {ROOT}/configs/quickstart.yaml --stage x",
        "has no such section",
    ),
    (
        "eval/eval_llada.py",
        "--tasks gsm9k --model_args model_path=a/x",
        "--tasks gsm9k: unknown; did you mean",
    ),
    ("eval/eval_llada.py", "--tasks gsm8k --model_args model_path=x", "--model_path x: no checkpoint there"),
    ("eval/eval_llada.py", "--tasks gsm8k", "--model_args model_path=FOLDER is missing"),
    ("eval/eval_llada.py", "--tasks gsm8k --model_args model_path=x,stepz=3", "stepz"),
    ("eval/eval_llada.py", "--preset nonsense", "--preset nonsense: unknown"),
]


def test_every_entry_point_is_tried():
    tried = {*PROGRAMS, *(program for program, _, _ in OTHERS)}
    folders = ("pretraining", "sft_training", "alignment", "rlhf", "inference", "eval", "scripts")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)) for path in files if "__main__" in path.read_text()}
    assert tried <= found
    assert all("benchmarks" in path for path in found - tried)


@pytest.mark.parametrize(("program", "more", "says"), OTHERS)
def test_programs_under_other_names_end_in_one_line_too(program, more, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [program, *more.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and says in line and line.count("error: ") == 1, line
    assert not list(tmp_path.iterdir())


@pytest.fixture
def words(model_dir, tmp_path):
    """words(program, *more): its command line, with `more` behind."""

    def of(program: str, *more: object) -> list[str]:
        base = PROGRAMS[program].format(model=model_dir, out=tmp_path / "out")
        return [*base.split(), *map(str, more)]

    return of


def bad_values(name: str, kind: typing.Any, said: dict) -> list[list[str]]:
    """Values of a flag that its own declaration excludes."""
    if kind is bool:
        return [["perhaps"]]
    if "choices" in said:
        return [["nonsense"]]
    if kind in (int, float):
        low, high = said.get("at_least", said.get("above")), said.get("at_most", said.get("below"))
        bad = [["nan"], ["inf"], ["many"], ["9" * 30]] + (
            [["1.5"], ["9" * 5000]] if kind is int else [["1e999"]]
        )
        bad += [[str(low - 1)], [str(low)] if "above" in said else [str(low - 7)]] if low is not None else []
        return bad + ([[str(high + 1)]] if high is not None else [])
    if "reads" in said:
        return [["/no/such/place"], ["a\0b"], ["x" * 5000], [""], ["\udcff"]]
    if said.get("writes") in ("file", "store"):
        return [["/tmp"], ["/proc/version/x"], ["a\0b"], ["\udcff"]]
    if "writes" in said:
        return [["/proc/version/x"], ["a\0b"], [""]]
    return [["\udcff"]]


def test_every_declaration_refuses_what_it_excludes(words, capsys):
    num, wrong, seen = 0, [], set()
    for program in PROGRAMS:
        config_class = load_script(program).Config
        hints = typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            kind = _value_type(hints[field.name])
            is_list = typing.get_origin(kind) is list
            kind, said = typing.get_args(kind)[0] if is_list else kind, said_of(config_class, field.name)
            if (field.name, repr(said)) in seen:  # inherited: one declaration, tried once
                continue
            seen.add((field.name, repr(said)))
            cases = [[f"--{field.name}", *value] for value in bad_values(field.name, kind, said)]
            cases += [[f"--{field.name}"]] if kind is not bool else []  # no value
            cases += [[f"--{field.name}", "1", "2"]] if kind in (int, float) and not is_list else []
            for case in cases:
                num += 1
                try:
                    parse(config_class, words(program, *case))
                    wrong.append(f"{program} {case}: accepted")
                except ValueError as error:
                    text = str(error)
                    if (
                        (f"--{field.name}" not in text and "unknown argument '2'" not in text)
                        or "\n" in text
                        or len(text) > 400
                    ):
                        wrong.append(f"{program} {case}: {text[:200]}")
                except Exception as error:
                    wrong.append(f"{program} {case}: {type(error).__name__}")
    assert not wrong, "\n".join(wrong[:20])
    assert num > 300


PAIR = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
RECORDS = {
    "deep.jsonl": b'{"messages": ' + b"[" * 100_000,
    "deep.json": b'[{"text": ' + b"[" * 100_000,
    "long_number.jsonl": b'{"text": "a", "prompt": "a", "id": ' + b"9" * 5000 + b"}",
    "half_a_character.jsonl": json.dumps(PAIR | {"text": "\ud800", "prompt": "\ud800"}).encode(),
    "cut.jsonl": json.dumps(PAIR).encode()[:-9],
    "cut.json": json.dumps([PAIR]).encode()[:-9],
    "latin.jsonl": b'{"text": "\xff", "prompt": "\xff"}\n',
    "empty.jsonl": b"",
    "numbers.jsonl": b"1\n2\n",
    "no_field.jsonl": b'{"nonsense": 1}\n',
    "names.docx": b"PK",
    "damaged.jsonl.gz": gzip.compress(json.dumps(PAIR).encode())[:-8],
    "damaged.parquet": b"PAR1 no table PAR1",
    "numbers_as_texts.jsonl": json.dumps(
        {"text": 1, "prompt": 2, "messages": 3, "chosen": 4, "rejected": 5, "completion": 6}
    ).encode(),
}
READERS = {
    "pretraining/prepare_corpus.py": "--input", "sft_training/prepare_sft.py": "--input",
    "pretraining/pretrain.py": "--train_data_path", "sft_training/train_sft.py": "--train_data_path",
    "alignment/train_teacher.py": "--train_data_path", "alignment/precompute_teacher.py": "--input",
    "alignment/train_kl.py": "--train_data_path", "rlhf/precompute_bref.py": "--input",
    "rlhf/train_dpo.py": "--train_data_path", "rlhf/train_elbo_kto.py": "--train_data_path",
    "rlhf/train_grpo.py": "--train_data_path", "rlhf/make_preferences.py": "--prompts_file",
    "inference/generate.py": "--prompts_file", "scripts/train_tokenizer.py": "--data",
}  # fmt: skip


def refusal(program, argv, capsys, monkeypatch):
    """What a program says on its way out with status 2."""
    monkeypatch.setattr("sys.argv", [program, *argv])
    monkeypatch.setattr("logging.raiseExceptions", False)  # a logger may hold the stream of an earlier test
    main = load_script(program).main
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: main(argv))
    text = capsys.readouterr().err
    assert stop.value.code == 2, text
    assert "Traceback" not in text
    return text.splitlines()[-1]


@pytest.mark.parametrize("file", RECORDS)
@pytest.mark.parametrize("program", READERS)
def test_damaged_records_are_named(program, file, words, tmp_path, capsys, monkeypatch):
    path = tmp_path / file
    path.write_bytes(RECORDS[file])
    argv = words(program, READERS[program], path)
    if program == "inference/generate.py":
        argv = [*argv[:2], *argv[4:], "--output_path", str(tmp_path / "out.jsonl")]
    line = refusal(program, argv, capsys, monkeypatch)
    assert file in line and len(line) < 600, line
    assert not list(tmp_path.glob("out/final")) and not (tmp_path / "out.jsonl").exists()


def damage(folder: Path, kind: str) -> None:
    """Damages a checkpoint folder in one way."""
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind.endswith(".json cut"):
        file = folder / kind.removesuffix(" cut")
        file.write_bytes(file.read_bytes()[:40])
    elif kind.endswith(".json list"):
        (folder / kind.removesuffix(" list")).write_text("[1, 2]")
    elif kind == "other model":
        (folder / "config.json").write_text('{"model_type": "bert", "vocab_size": 10}')
    elif kind == "no weights":
        weights.unlink()
    elif kind == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "weights empty":
        weights.write_bytes(b"")
    elif kind == "weights text":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9)
    elif kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "wider":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"d_model": 32}))


DAMAGES = (
    "no config", "config.json cut", "config.json list", "other model", "no weights", "weights cut",
    "weights empty", "weights text", "no tokenizer", "tokenizer.json cut", "tokenizer.json list",
    "tokenizer_config.json cut", "wider",
)  # fmt: skip
OPENERS = (
    "inference/generate.py",
    "sft_training/train_sft.py",
    "rlhf/train_dpo.py",
    "rlhf/precompute_bref.py",
)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("program", OPENERS)
def test_damaged_checkpoints_are_named(program, kind, words, model_dir, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "damaged"
    shutil.copytree(model_dir, folder)
    damage(folder, kind)
    line = refusal(program, words(program, "--model_name_or_path", folder), capsys, monkeypatch)
    assert "damaged" in line and len(line) < 800, line
    assert not list(tmp_path.glob("out/final")) and not (tmp_path / "out/b.jsonl").exists()


DEVICED = (
    "pretraining/pretrain.py", "sft_training/train_sft.py", "alignment/train_teacher.py",
    "alignment/train_kl.py", "rlhf/train_dpo.py", "rlhf/train_grpo.py", "rlhf/make_preferences.py",
    "rlhf/precompute_bref.py",
    "inference/generate.py", "inference/speculative_decode.py", "inference/chat.py",
)  # fmt: skip


@pytest.mark.parametrize("device", ["nonsense", "cuda:7", "xpu"])
@pytest.mark.parametrize("program", DEVICED)
def test_a_device_that_is_not_here_is_named(program, device, words, capsys, monkeypatch):
    assert f"--device {device}" in refusal(program, words(program, "--device", device), capsys, monkeypatch)


PRETRAIN, SFT, KL = "pretraining/pretrain.py", "sft_training/train_sft.py", "alignment/train_kl.py"
DPO, KTO, GRPO = "rlhf/train_dpo.py", "rlhf/train_elbo_kto.py", "rlhf/train_grpo.py"
GENERATE, SPECULATE = "inference/generate.py", "inference/speculative_decode.py"
PREFERENCES, TEACHER = "rlhf/make_preferences.py", "alignment/precompute_teacher.py"

# Program, further words, what the refusal says: ruinous values, flags without effect, contradictions.
EXCLUDED = [
    (SFT, "--max_grad_norm -1", "--max_grad_norm -1.0: must be at least 0"),
    (SFT, "--save_total_limit 0", "--save_total_limit 0: would delete every state"),
    (SFT, "--save_total_limit -2", "--save_total_limit -2: must be at least -1"),
    (SFT, "--max_steps 0", "--max_steps 0: nothing to do"),
    (SFT, "--max_steps -2", "--max_steps -2: must be at least -1"),
    (SFT, "--log_interval 0", "--log_interval 0: must be at least 1"),
    (SFT, "--eval_interval 5", "--eval_interval 5: has no effect without --eval_data_path"),
    (SFT, "--eval_limit 5", "--eval_limit 5: has no effect without --eval_data_path"),
    (SFT, "--save_best", "--save_best True: has no effect without --eval_data_path"),
    (SFT, "--full_padding_probability 0.5", "has no effect without --eos_padding"),
    (SFT, "--cpu_offload", "--cpu_offload True: has no effect without --shard"),
    (SFT, "--reduce_always", "--reduce_always True: has no effect without --shard"),
    (SFT, "--reduce_dtype bfloat16", "--reduce_dtype 'bfloat16': has no effect without --shard"),
    (SFT, "--decay_ratio 0.5", "--decay_ratio 0.5: has no effect without --lr_scheduler_type wsd"),
    (
        SFT,
        "--min_learning_rate 1e-6 --lr_scheduler_type constant",
        "--min_learning_rate 1e-06: has no effect",
    ),
    (SFT, "--min_learning_rate 1", "--min_learning_rate 1.0 exceeds --learning_rate"),
    (SFT, "--use_lora false --lora_r 8", "--lora_r 8: without effect, LoRA is turned off"),
    (SFT, "--use_lora --lora_r 0", "--use_lora: --lora_r 0 is no adapter"),
    (SFT, "--lora_target_modules q_proj qproj", "--lora_target_modules 'qproj': choose from all-linear"),
    (SFT, "--lora_dropout 1", "--lora_dropout 1.0: must be at least 0 and below 1"),
    (SFT, "--batch_size 3 --micro_batch_size 2", "--batch_size 3 must be a multiple of --micro_batch_size 2"),
    (SFT, "--gradient_accumulation_steps 3 --micro_batch_size 2", "--gradient_accumulation_steps 3"),
    (SFT, "--gpu_memory_gb 80", "--gpu_memory_gb 80.0: has no effect without --dry_run"),
    (SFT, "--data_weights 1 2", "--data_weights"),
    (SFT, "--data_weights 0", "--data_weights 0.0: must be above 0"),
    (SFT, "--random_length_probability 0.1", "unknown argument '--random_length_probability'"),
    (SFT, "--beta 0.1", "unknown argument '--beta'"),
    (SFT, "--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere: no such file or folder"),
    (SFT, "--ref_model x", "unknown argument '--ref_model'"),
    (SFT, "--learn 1", "unknown argument '--learn'"),
    (SFT, "--learning_rte 1", "did you mean 'learning_rate'"),
    (GENERATE, "stray", "unknown argument 'stray'"),
    (SFT, "--adam_betas 0.9", "--adam_betas 0.9: give two numbers"),
    (SFT, "--adam_betas 0.9 1.5", "--adam_beta2 1.5: must be at least 0 and below 1"),
    (SFT, "--zero_stage many", "--zero_stage many"),
    (SFT, f"--output_dir {MODEL}", "is what --model_name_or_path reads"),
    (SFT, f"--output_dir {SAMPLES}/sft.jsonl", "is a file, so no folder can be there"),
    (SFT, "--config nowhere.yaml", "nowhere.yaml: cannot be read"),
    (PRETRAIN, "--config_name 1m", "give either --model_name_or_path (continue) or --config_name"),
    (PRETRAIN, "--rope_factor 2", "--rope_factor 2.0: has no effect without --rope_scaling"),
    (PRETRAIN, "--rope_factor 0.5 --rope_scaling yarn", "--rope_factor 0.5: must be at least 1"),
    (PRETRAIN, "--start_mask_ratio 0.5", "--start_mask_ratio 0.5: has no effect without --mask_steps"),
    (PRETRAIN, "--start_length 5", "--start_length 5: has no effect without --length_steps"),
    ("scripts/benchmarks/bench_packing.py", "--config_name huge", "--config_name huge: no such file or"),
    (PRETRAIN, "--eos_padding", "unknown argument '--eos_padding'"),
    (KL, "--alpha 0.2", "--alpha 0.2: has no effect without --loss_type hybrid"),
    (KL, "--loss_type hybrid --alpha 0 --beta 0", "--loss_type hybrid with --alpha 0 and --beta 0"),
    (KL, "--window_decay 2", "--window_decay 2.0: has no effect without --window_weights decay"),
    (KL, "--t_sampling stratified", "--t_sampling 'stratified': has no effect without --positions"),
    (KL, "--temperature 0", "--temperature 0.0: must be above 0"),
    (KL, "--loss_type kl", "needs a teacher"),
    (KL, "--on_policy answers", "needs --teacher"),
    (DPO, "--beta 0", "--beta 0.0: must be above 0"),
    (DPO, "--beta -0.1", "--beta -0.1: must be above 0"),
    (DPO, "--label_smoothing 1.5", "--label_smoothing 1.5: must be at least 0 and below 0.5"),
    (DPO, "--label_smoothing 0.1 --loss_type hinge", "--label_smoothing 0.1: has no effect"),
    (DPO, "--loss_weights 1 2", "--loss_weights"),
    (DPO, "--t_sampling iid", "unknown argument '--t_sampling'"),
    (DPO, "--num_masks 0", "--num_masks 0: must be at least 1"),
    (DPO, "--lora_alpha 0", "--lora_alpha 0.0: must be above 0"),
    (KTO, "--desirable_weight -1", "--desirable_weight -1.0: must be at least 0"),
    (KTO, "--n_D 0 --n_U 0", "no record is left"),
    (KTO, "--n_D 2", "--n_D 2.0: must be at least 0 and at most 1"),
    (KTO, "--apply_chat_template", "unknown argument '--apply_chat_template'"),
    (KTO, "--kto_beta 0", "--beta 0.0: must be above 0"),
    (GRPO, "--num_generations 1", "--num_generations 1: must be at least 2"),
    (GRPO, "--batch_size 3", "--batch_size 3"),
    (GRPO, "--negative_weight -1", "--negative_weight -1.0: must be at least 0"),
    (GRPO, "--patience 2", "--patience 2: has no effect without --eval_data_path"),
    (GRPO, "--p_mask_prompt 0.5 --likelihood trajectory", "--p_mask_prompt"),
    (GRPO, "--judge_model x", "--judge_model 'x': has no effect without --reward_funcs judge"),
    (GRPO, "--judge_orders 2", "--judge_orders 2: has no effect"),
    (GRPO, "--reward_weights 1 2", "--reward_weights [1.0, 2.0]: give one for each of --reward_funcs"),
    (GRPO, "--reward_funcs nonsense", "--reward_funcs nonsense"),
    (GRPO, "--num_workers 2", "unknown argument '--num_workers'"),
    (GRPO, "--recipe nonsense", "--recipe nonsense: not one of"),
    (GRPO, "--ref_model_name_or_path {model}", "has no effect without --beta"),
    (GENERATE, "--prompts_file {sft}", "give either --prompt TEXT or --prompts_file FILE"),
    (GENERATE, "--method fixed_length --block_length 4", "--block_length 4: has no effect"),
    (GENERATE, "--threshold 0.5", "--threshold 0.5: has no effect without --parallel_decoding"),
    (GENERATE, "--remdm_eta 0.5", "--remdm_eta 0.5: has no effect without --remdm"),
    (GENERATE, "--cache_refresh_interval 4", "--cache_refresh_interval 4: has no effect without --cache"),
    (GENERATE, "--gen_length 0", "--gen_length 0: must be at least 1"),
    (GENERATE, "--gen_length 10 --block_length 4", "gen_length 10 is not a multiple of block_length 4"),
    (GENERATE, "--steps 3 --block_length 4", "steps 3 cannot be shared out evenly"),
    (GENERATE, "--temperature -1", "--temperature -1.0: must be at least 0"),
    (GENERATE, "--best_of majority", "--best_of majority: has no effect"),
    (GENERATE, "--batch_size 0", "--batch_size 0: must be at least 1"),
    (GENERATE, "--adapter_path nowhere", "--adapter_path nowhere: no checkpoint there"),
    (GENERATE, "--attn_implementation nonsense", "nonsense"),
    (SPECULATE, "--draft_steps 2", "--draft_steps 2: has no effect without --draft"),
    (SPECULATE, "--num_chains 2", "--num_chains 2 would be the same chain"),
    (SPECULATE, "--top_p 0", "--top_p 0.0: must be above 0 and at most 1"),
    (SPECULATE, "--top_k 5", "--top_k 5: has no effect without --temperature"),
    (SPECULATE, "--gamma 0", "--draft_length 0: must be at least 1"),
    (PREFERENCES, "--temperature 0", "--temperature 0.0: must be above 0"),
    (PREFERENCES, "--num_generations 1", "--num_generations 1: must be at least 2"),
    (TEACHER, "--teacher {model} --server http://x", "give --teacher or --server, not both"),
    (TEACHER, "--server http://x --top_k 0", "--top_k 0: a server gives the most likely tokens only"),
    (TEACHER, "--responses generate", "--responses 'generate': has no effect without --teacher"),
    (TEACHER, "--teacher {model}", "a LLaDA model is not autoregressive"),
    ("pretraining/prepare_corpus.py", "--validation_fraction 1", "--validation_fraction 1.0: must be"),
    ("sft_training/prepare_sft.py", "--num_proc 0", "--num_proc 0: must be at least 1"),
    ("rlhf/precompute_bref.py", "--k_vals 1,x", "--num_masks: invalid int value: 'x'"),
    ("rlhf/precompute_bref.py", "--k_vals 0", "--num_masks 0: must be at least 1"),
    ("rlhf/precompute_bref.py", "--mask_id 3", "3"),
    ("alignment/train_teacher.py", "--use_lora", "unknown argument '--use_lora'"),
    ("alignment/train_teacher.py", "", "a LLaDA model is not autoregressive"),
    ("scripts/convert_ar.py", "", "a LLaDA model is not autoregressive"),
    ("scripts/convert_ar.py", "--num_layers 0", "--num_layers 0: must be at least 1"),
    ("scripts/merge_lora.py", "", "adapter"),
    ("scripts/export_checkpoint.py", "", "config.yaml"),
    ("scripts/export_checkpoint.py", "--output_dir {model}", "is what --run reads"),
    ("scripts/train_tokenizer.py", "--output_dir {model}", "exists; give another place, or --overwrite"),
    ("scripts/train_tokenizer.py", "--vocab_size 5", "--vocab_size 5"),
    ("scripts/download.py", "--model nonsense", "--model nonsense"),
    ("scripts/plot_metrics.py", "", "no metrics.jsonl"),
    ("inference/chat.py", "--load nowhere.jsonl", "--load nowhere.jsonl: no such file or folder"),
    ("inference/serve.py", "--port 70000", "--port 70000: must be at least 0 and at most 65535"),
]


@pytest.mark.parametrize(("program", "more", "says"), EXCLUDED)
def test_what_flags_exclude_is_refused(program, more, says, words, model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = more.format(model=model_dir, sft=SAMPLE["sft"]).split()
    line = refusal(program, words(program, *more), capsys, monkeypatch)
    assert says in line and len(line) < 700, line
    assert not list(tmp_path.glob("out/final"))


YAML = [
    ("learning_rte: 1", "unknown key 'learning_rte': did you mean 'learning_rate'"),
    ("learning_rate: fast", "--learning_rate: invalid float value: 'fast'"),
    ("learning_rate: .nan", "--learning_rate nan: must be a finite number"),
    ("learning_rate: [1, 2]", "unknown argument '2'"),
    ("learning_rate: {a: 1}", "learning_rate holds names of its own"),
    ("learning_rate:", "learning_rate has no value; remove the line to keep its default"),
    ("batch_size: true", "--batch_size: invalid int value: 'True'"),
    ("batch_size: 1.5", "--batch_size: invalid int value: '1.5'"),
    ("warmup_steps: -3", "--warmup_steps -3: must be at least 0"),
    ("packing: 7", "'7' is neither true nor false"),
    ("lora_target_modules: [qproj]", "--lora_target_modules 'qproj': choose from"),
    ("- a", "expected 'key: value' lines, got list"),
    ("a: [1", "not valid YAML"),
    ("a: \xff\x00", "not valid YAML"),
    ("", "expected 'key: value' lines"),
    ("1: 2", "unknown key 1"),
    ("turns: none", "--turns 'none': choose from all, last, split"),
]


@pytest.mark.parametrize(("text", "says"), YAML)
def test_bad_configuration_files_are_named(text, says, words, tmp_path, capsys, monkeypatch):
    file = tmp_path / "flags.yaml"
    file.write_text(text, encoding="latin-1")
    assert says in refusal(SFT, words(SFT, "--config", file), capsys, monkeypatch)


def test_a_files_flag_that_another_overrules_is_told_and_a_flag_of_no_effect_refused(words, tmp_path, capsys):
    file, config_class = tmp_path / "flags.yaml", load_script(SFT).Config
    file.write_text("objective: block_diffusion\nblock_size: 4\n")
    overruled = words(SFT, "--config", file, "--objective", "masked_diffusion")
    assert parse(config_class, overruled).block_size == 4
    assert "--block_size 4: has no effect without --objective block_diffusion" in capsys.readouterr().err
    file.write_text("block_size: 4\n")
    for wrong in (["--config", file], ["--config", file, "--block_size", "8"], ["--block_size", "8"]):
        with pytest.raises(ValueError, match=r"--block_size .: has no effect without --objective"):
            parse(config_class, words(SFT, *wrong))


def test_damaged_states_and_rows_are_named(words, tmp_path, capsys, monkeypatch):
    load_script(SFT).main(words(SFT))
    run = tmp_path / "out"
    again = words(SFT, "--max_steps", 2)
    meta, manifest = run / "step-1/meta.json", run / "data/train/0/manifest.json"
    for file, content in ((meta, "{"), (meta, "[]"), (run / "latest", "step-7")):
        whole = file.read_bytes()
        file.write_text(content)
        assert str(run) in refusal(SFT, again, capsys, monkeypatch), (file, content)
        file.write_bytes(whole)
    rows = ["--train_data_path", manifest.parent, "--output_dir", tmp_path / "other"]
    for file in (manifest, *manifest.parent.glob("*.arrow")):
        whole = file.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"[]"):
            file.write_bytes(content)
            line = refusal(SFT, words(SFT, *rows), capsys, monkeypatch)
            assert str(manifest.parent) in line, (file, content[:20], line)
        file.write_bytes(whole)
    assert not (tmp_path / "other/final").exists()


def test_what_a_run_or_a_job_keeps_is_named_where_it_is_damaged(
    words, model_dir, tmp_path, capsys, monkeypatch
):
    load_script(SFT).main(words(SFT))
    run, out = tmp_path / "out", tmp_path / "exported"
    export = ["--run", str(run), "--output_dir", str(out)]
    for file in (run / "config.yaml", run / "step-1/meta.json", *run.glob("step-1/*.distcp")):
        whole = file.read_bytes()
        for content in (b"", whole[: len(whole) // 3], b"\x00\xff", b"[1, 2]", b"a: ["):
            file.write_bytes(content)
            line = refusal("scripts/export_checkpoint.py", export, capsys, monkeypatch)
            assert str(run) in line and len(line) < 900 and not out.exists(), (file, content[:9], line)
        file.write_bytes(whole)
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    for number in range(len(lines)):  # cut anywhere before the model's name
        if lines[number - 1].startswith("model_name_or_path"):
            break
        (run / "config.yaml").write_text("".join(lines[:number]))
        line = refusal("scripts/export_checkpoint.py", export, capsys, monkeypatch)
        assert str(run) in line and not out.exists(), (number, line)
    (run / "config.yaml").write_text("".join(lines))

    asked = ["--model_name_or_path", model_dir, "--prompts_file", SAMPLE["puzzles"], "--gen_length", "8"]
    asked = [*map(str, asked), "--max_samples", "2", "--output_path", str(tmp_path / "a.jsonl")]
    parts = tmp_path / "a.jsonl.parts"
    parts.mkdir()
    (parts / "rank-0.jsonl").write_text('{"key": "k", "result": 1}\n')
    for content in ("", "[]", '{"seed": '):
        (parts / "settings.json").write_text(content)
        assert str(parts) in refusal(GENERATE, asked, capsys, monkeypatch), content


def test_no_output_of_another_command_is_replaced(words, tmp_path, capsys, monkeypatch):
    script, answers, asked = load_script(GENERATE), tmp_path / "answers.jsonl", tmp_path / "asked.txt"
    asked.write_text("Hi\n")
    argv = [word for word in words(GENERATE) if word not in ("--prompt", "Hi")]
    argv += ["--prompts_file", str(asked), "--output_path", str(answers)]
    exists = "exists; give another place, or --overwrite"
    answers.write_text("mine")
    assert exists in refusal(GENERATE, argv, capsys, monkeypatch)
    assert answers.read_text() == "mine"
    run_main(lambda: script.main([*argv, "--overwrite"]))
    made = answers.read_text()
    assert made != "mine"

    parse(script.Config, argv)
    assert paths.finished == [str(answers)]  # the same command, on the same input
    parse(script.Config, [*argv, "--overwrite"])
    assert not paths.finished
    assert exists in refusal(GENERATE, [*argv, "--seed", "7"], capsys, monkeypatch)
    asked.write_text("Hi\nthere\n")
    run_main(lambda: script.main(argv))  # its own output, from another input
    assert not paths.finished and len(answers.read_text().splitlines()) == 2
    answers.write_text("mine again")
    assert exists in refusal(GENERATE, argv, capsys, monkeypatch)
    assert answers.read_text() == "mine again"


def test_folders_appear_whole_and_only_in_place_of_their_like(tmp_path, capsys, monkeypatch):
    program, out = "scripts/train_tokenizer.py", tmp_path / "tokenizer"
    argv = ["--data", SAMPLE["pretrain"], "--vocab_size", "300", "--output_dir", str(out)]
    main = load_script(program).main
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", _interrupt)
        main(argv)
    assert not out.exists()
    run_main(lambda: main(argv))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["tokenizer"]
    parse(load_script(program).Config, argv)
    assert paths.finished == [str(out)]
    (out / "notes").mkdir()
    (out / "notes/mine.txt").write_text("keep")
    assert "exists" in refusal(program, argv, capsys, monkeypatch)
    assert "folders in it would be lost" in refusal(program, [*argv, "--overwrite"], capsys, monkeypatch)


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# What must go through as far as flags are concerned: older spellings, hyphens, edges of ranges.
ACCEPTED = [
    (SFT, "--lr 1e-5"), (SFT, "--lr=1e-5"), (SFT, "--learning-rate 1e-5"), (SFT, "--learning_rate 0"),
    (SFT, "--epochs 3 --max_steps -1"), (SFT, "--max_grad_norm 0"), (SFT, "--save_total_limit -1"),
    (SFT, "--save_steps -1"), (SFT, "--eval_steps -1"), (SFT, "--bf16"), (SFT, "--bf16 false"),
    (SFT, "--gradient_checkpointing"), (SFT, "--activation_checkpointing selective"), (SFT, "--lora_rank 8"),
    (SFT, "--use_lora"), (SFT, "--use_lora --lora_target_modules q_proj o_proj"), (SFT, "--lora_r 0"),
    (SFT, "--per_device_train_batch_size 2"), (SFT, "--gradient_accumulation_steps 1"),
    (SFT, "--adam_betas 0.9 0.99"), (SFT, "--use_wandb false"), (SFT, "--flash_attn"),
    (SFT, "--local_rank 0"), (SFT, "--lr_scheduler_type cosine_with_min_lr"), (SFT, "--warmup_ratio 0.03"),
    (SFT, "--torch_dtype bfloat16"), (SFT, "--report_to none"), (SFT, "--shard full --cpu_offload"),
    (SFT, "--seed 0"), (SFT, "--num_workers 0"),
    (SFT, "--eval_data_path {sft} --eval_interval 1 --save_best"), (SFT, "--packing"),
    (SFT, "--spike_sigmas 0"), (SFT, "--eos_padding --full_padding_probability 1"), (SFT, "--turns split"),
    (SFT, "--long truncate"), (SFT, "--output_dir {out}/new/deep"), (SFT, "--resume_from_checkpoint none"),
    (SFT, "--run_name x --wandb_project y"), (SFT, "--num_train_epochs 3"),
    (SFT, "--dry_run --gpu_memory_gb 80"),
    (SFT, "--dataloader_num_workers 2"), (SFT, "--use_lora false"), (SFT, "--zero_stage 2"),
    (SFT, "--wandb_entity me"), (PRETRAIN, "--random_length_probability 0"),
    (PRETRAIN, "--rope_scaling yarn --rope_factor 2"), (PRETRAIN, "--start_length 16 --length_steps 2"),
    (PRETRAIN, "--start_mask_ratio 0.5 --mask_steps 9"),
    (PRETRAIN, "--t_sampling stratified --mask_count exact"), (PRETRAIN, "--text_key text"),
    (KL, "--loss_type hybrid --alpha 0.2 --beta 0.8"), (KL, "--gamma 4"),
    (KL, "--positions masked --t_sampling iid"), (KL, "--window_weights decay --window_decay 2"),
    (KL, "--log_level DEBUG"), (KL, "--data_path {sft}"), (DPO, "--beta 0.5"), (DPO, "--n_mc_samples 4"),
    (DPO, "--estimator iid --l_sampling uniform"), (DPO, "--ipo"),
    (DPO, "--loss_type sigmoid sft --loss_weights 1 0.1"), (DPO, "--label_smoothing 0.1"),
    (DPO, "--rpo_alpha 1"), (DPO, "--dataset {sft}"), (DPO, "--lora_dropout 0.1"),
    (DPO, "--ref_model {model}"), (KTO, "--kto_beta 0.1 --kto_lambda_D 1 --kto_lambda_U 2"),
    (KTO, "--n_D 0"), (KTO, "--fsdp full_shard"), (KTO, "--disable_mask_verification"),
    (KTO, "--save_strategy no"), (KTO, "--train_dataset_path {sft}"), (GRPO, "--estimator trajectory"),
    (GRPO, "--likelihood diffu --p_mask_prompt 0"), (GRPO, "--beta 0.1"), (GRPO, "--group_size 4"),
    (GRPO, "--remasking_threshold 0.9"), (GRPO, "--scale_rewards true"),
    (GRPO, "--train_data_path openai/gsm8k@main"),
    (GRPO, "--reward_funcs math format --reward_weights 1 -0.2"), (GENERATE, "--block_length 4"),
    (GENERATE, "--steps 4"), (GENERATE, "--temperature 0.7"),
    (GENERATE, "--parallel_decoding threshold --threshold 0.5"),
    (GENERATE, "--num_return_sequences 2 --best_of majority"),
    (GENERATE, "--cache dual --cache_refresh_interval 4"), (GENERATE, "--is_instruct"),
    (GENERATE, "--no_early_stop"), (GENERATE, "--model_path an/example"), (SPECULATE, "--gamma 4"),
    (SPECULATE, "--temperature 1 --top_k 5 --top_p 0.9"),
    (SPECULATE, "--draft left_to_right --draft_steps 2"), (TEACHER, "--model_name {model}"),
    (TEACHER, "--top_k 0"), ("rlhf/precompute_bref.py", "--k_vals 1,2,4,8"),
    ("rlhf/precompute_bref.py", "--dataset {sft}"),
    ("pretraining/prepare_corpus.py", "--tokenizer {model} --validation_fraction 0.5"),
    ("scripts/merge_lora.py", "--lora_weights {model} --model_name {model}"),
    ("scripts/download.py", "--model an/example"),
]  # fmt: skip


def test_what_is_right_goes_through(words, model_dir, tmp_path):
    places = {"model": model_dir, "sft": SAMPLE["sft"], "out": tmp_path / "out"}
    assert len(ACCEPTED) >= 80
    for program, more in ACCEPTED:
        parse(load_script(program).Config, words(program, *more.format(**places).split()))
