"""Presets are their sources, the d1 protocol runs on local data, and two evaluations are compared."""

import json

import pytest
import yaml
from transformers import AutoTokenizer

from conftest import ROOT, load_script
from llada.inference.eval_compare import compare

# EVAL.md, opencompass/examples of ML-GSAI/LLaDA; examples/llada/eval.sh, README.md of ZHZisZZ/dllm ca17675:
# (tasks, shots, gen_length, block_length, late EOS, never EOS, published, reachable)
SOURCES = {
    "gsm8k-instruct": (["gsm8k"], 4, 256, 8, False, False, "78.6 / 78.9", None),
    "gsm8k-instruct-lm-eval": (["gsm8k_cot"], 5, 512, 512, True, False, "69.4 / 68.8", "74.7"),
    "math-instruct-lm-eval": (["minerva_math"], 4, 512, 512, True, False, "31.9 / 29.6", "31.9"),
    "math-instruct": (["minerva_math"], 0, 512, 64, False, False, "42.2 / 42.7", None),
    "math-instruct-256": (["minerva_math"], 0, 256, 256, False, False, None, None),
    "mmlu-instruct-lm-eval": (["mmlu_generative"], 0, 3, 3, False, False, "65.5 / 65.4", "69.8"),
    "mmlu-pro-instruct": (["mmlu_pro"], 0, 256, 256, False, False, "37.0 / 36.6", "36.2"),
    "hellaswag-instruct": (["hellaswag_letters"], 0, 3, 3, False, False, "74.6 / 75.3", None),
    "arc-challenge-instruct": (["arc_challenge_chat"], 0, 512, 512, False, False, "88.5 / 89.2", "86.4"),
    "gpqa-instruct": (["gpqa_diamond_generative_n_shot"], 5, 64, 64, True, False, "33.3 / 32.3", "30.6"),
    "gpqa-instruct-128": (["gpqa_diamond_generative_n_shot"], 5, 128, 64, False, False, None, None),
    "humaneval-instruct": (["humaneval_instruct"], 0, 512, 512, False, True, "49.4 / 47.0", "47.0"),
    "humaneval-instruct-blocks": (["humaneval_instruct"], 0, 512, 32, False, False, None, None),
    "mbpp-instruct-lm-eval": (["mbpp_instruct"], 3, 256, 256, True, False, "41.0 / 39.6", "40.0"),
    "mbpp-instruct-blocks": (["mbpp_instruct"], 4, 512, 32, False, False, None, None),
    "ifeval-instruct": (["ifeval"], 0, 512, 512, True, False, None, None),
    "gsm8k-1.5": (["gsm8k"], 4, 256, 16, True, False, "83.8 / 83.6", None),
    "math-1.5": (["minerva_math"], 0, 1024, 128, True, False, "42.6 / 42.3", None),
    "gpqa-1.5": (["gpqa_diamond_generative_n_shot"], 5, 256, 16, False, False, "36.9 / 34.8", None),
    "humaneval-1.5": (["humaneval_instruct"], 0, 512, 32, True, False, "52.4 / 51.2", None),
    "mbpp-1.5": (["mbpp_instruct"], 4, 512, 32, True, False, "42.8 / 42.6", None),
    "ifeval-1.5": (["ifeval"], 0, 256, 16, True, False, "66.2 / 65.2", None),
    "gsm8k-base-256": (["gsm8k"], 5, 256, 256, False, False, "70.0", "70.7"),
    "math-base": (["minerva_math"], 4, 1024, 1024, False, False, "31.4", "32.4"),
}  # fmt: skip

# The sources that eval/presets.yaml names above each family: the sampler's settings, and by task of ours
# (lm_eval's task, shots, published, reachable)
DREAM = {"remasking": "entropy", "temperature": 0.1, "top_p": 0.9}
DREAM_BASE = {"remasking": "entropy", "add_bos_token": True}
DREAM_MASKS = {"num_masks": 128, "add_bos_token": True}
TOKENS_1024 = {"gen_length": 1024, "steps": 1024, "block_length": 1024}
SURE = {"gen_length": 16384, "block_length": 32, "parallel_decoding": "threshold", "cache": "blocks"}
FAMILIES = [
    ("-illada-base", TOKENS_1024, {
        "bbh": ("bbh", None, "71.3", None), "gsm8k": ("gsm8k", None, "81.9", None),
        "math": ("minerva_math", 4, "38.4", None), "humaneval": ("humaneval", None, "50.0", None),
        "mbpp": ("mbpp", 3, "57.8", None)}),
    ("-illada-base", {"mask_plan": "reference"}, {
        "mmlu": ("mmlu", 5, "74.8", None), "arc-challenge": ("arc_challenge", 0, "60.8", None),
        "hellaswag": ("hellaswag", 0, "76.6", None)}),
    ("-dream-base", DREAM_BASE | {"gen_length": 512, "steps": 512}, {
        "bbh": ("bbh", 3, "57.9", "63.7"), "math": ("minerva_math", 4, "39.6", "42.4")}),
    ("-dream-base", DREAM_BASE | {"gen_length": 256, "steps": 256}, {
        "gsm8k": ("gsm8k_cot", 8, "77.2", "77.0")}),
    ("-dream-base", DREAM_BASE | {"gen_length": 512, "steps": 512, "temperature": 0.2, "top_p": 0.95}, {
        "humaneval": ("humaneval_instruct", 0, "57.9", "56.7"), "mbpp": ("mbpp", 3, "56.2", "56.0")}),
    ("-dream-base", DREAM_MASKS, {
        "mmlu": ("mmlu", 5, "69.5", "70.0"), "arc-easy": ("arc_easy", 0, "83.9", "83.8"),
        "arc-challenge": ("arc_challenge", 0, "59.9", "59.0"), "hellaswag": ("hellaswag", 0, "73.3", "73.5"),
        "piqa": ("piqa", 0, "75.8", "76.4"), "gpqa": ("gpqa_main_n_shot", 5, "36.6", "34.6"),
        "winogrande": ("winogrande", 5, "74.8", "72.5"), "race": ("race", 0, "44.7", "45.6")}),
    ("-dream", DREAM | {"gen_length": 128, "steps": 128}, {
        "mmlu": ("mmlu_generative", 4, "67.0", None), "mmlu-pro": ("mmlu_pro", 4, "43.3", "45.5")}),
    ("-dream", DREAM | {"gen_length": 256, "steps": 256}, {"gsm8k": ("gsm8k_cot", 0, "81.0", "82.0")}),
    ("-dream", DREAM | {"gen_length": 512, "steps": 512}, {"math": ("minerva_math", 0, "39.2", "48.6")}),
    ("-dream", {"num_masks": 128}, {"gpqa": ("gpqa_main_n_shot", 5, "33.0", "31.5")}),
    ("-dream", DREAM | {"gen_length": 768, "steps": 768}, {
        "humaneval": ("humaneval_instruct", 0, "55.5", None)}),
    ("-dream", DREAM | {"gen_length": 1024, "steps": 1024}, {"mbpp": ("mbpp_instruct", 0, "58.8", None)}),
    ("-dream", DREAM | {"gen_length": 1280, "steps": 1280}, {"ifeval": ("ifeval", 0, "62.5", "59.7")}),
    ("-dream-coder-base", DREAM_BASE | {"gen_length": 512, "temperature": 0.2, "top_p": 0.9}, {
        "humaneval": ("humaneval", 0, None, None)}),
    ("-dream-coder-base", DREAM_BASE | {"gen_length": 512, "temperature": 0.1, "top_p": 0.9}, {
        "mbpp": ("mbpp", 0, None, None)}),
    ("-dream-coder", {"remasking": "entropy", "gen_length": 512, "steps": 512, "temperature": 0.1}, {
        "humaneval": ("humaneval_instruct", 0, "82.9", None), "mbpp": ("mbpp_instruct", 0, "79.6", None)}),
    ("-diffucoder", {"remasking": "entropy", "gen_length": 256, "temperature": 0.4, "top_p": 0.95}, {
        "humaneval": ("humaneval_instruct", 0, "73.2", None), "mbpp": ("mbpp_instruct", 0, "78.6", None)}),
    ("-sdar", {"gen_length": 4096, "steps": 4096, "block_length": 4}, {
        "mmlu": ("mmlu_generative", 5, "62.9 / 74.9 / 78.6 / 82.8", None),
        "gsm8k": ("gsm8k_cot_zeroshot", 0, "80.1 / 89.9 / 91.3 / 91.4", None),
        "math500": ("minerva_math500", 0, "63.2 / 72.8 / 78.6 / 77.8", None),
        "humaneval": ("humaneval_instruct", 0, "61.6 / 72.0 / 78.7 / 87.2", None),
        "mbpp": ("mbpp_instruct", 0, "61.1 / 65.4 / 72.0 / 71.6", None),
        "ifeval": ("ifeval", 0, "43.4 / 56.6 / 61.4 / 60.6", None)}),
    ("-llada-moe", {"gen_length": 1024, "block_length": 64, "threshold": 0.76, "cache": "dual"}, {
        "gsm8k": ("gsm8k", 4, "82.41", None), "mbpp": ("mbpp_instruct", 0, "70.02", None)}),
    ("-llada2.0", SURE | {"threshold": 0.95}, {
        "mmlu": ("mmlu_generative", 0, "80.53", None), "mmlu-pro": ("mmlu_pro", 0, "63.22", None),
        "arc-challenge": ("arc_challenge_chat", 0, "93.56", None),
        "hellaswag": ("hellaswag_letters", 0, "79.01", None),
        "gpqa": ("gpqa_diamond_generative_n_shot", 0, "47.98", None),
        "gsm8k": ("gsm8k_cot_zeroshot", 0, "94.24", None), "math": ("minerva_math", 0, "93.22", None),
        "humaneval": ("humaneval_instruct", 0, "86.59", None), "mbpp": ("mbpp_instruct", 0, "81.50", None),
        "ifeval": ("ifeval", 0, "80.78", None)}),
    ("-llada2.1-speed", SURE | {"threshold": 0.5, "editing_threshold": 0.0}, {
        "mmlu-pro": ("mmlu_pro", 0, "63.42", None), "hellaswag": ("hellaswag_letters", 0, "75.71", None),
        "gpqa": ("gpqa_diamond_generative_n_shot", 0, "48.36", None),
        "mbpp-plus": ("mbpp_plus_instruct", 0, "73.28", None), "ifeval": ("ifeval", 0, "81.33", None)}),
    ("-llada2.1-quality", SURE | {"threshold": 0.7, "editing_threshold": 0.5}, {
        "mmlu-pro": ("mmlu_pro", 0, "64.84", None), "hellaswag": ("hellaswag_letters", 0, "76.19", None),
        "gpqa": ("gpqa_diamond_generative_n_shot", 0, "53.28", None),
        "mbpp-plus": ("mbpp_plus_instruct", 0, "74.07", None), "ifeval": ("ifeval", 0, "83.18", None)}),
]  # fmt: skip


def read_presets():
    presets = yaml.safe_load((ROOT / "eval/presets.yaml").read_text())
    del presets["_shared"]
    return presets


@pytest.mark.parametrize("name", SOURCES)
def test_presets_are_their_sources(name):
    preset = read_presets()[name]
    arguments, sampler = preset["arguments"], preset["arguments"]["model_args"]
    found = (
        *(arguments["tasks"], arguments["num_fewshot"], sampler["gen_length"], sampler["block_length"]),
        *(sampler.get("confidence_eos_eot_inf", False), sampler.get("logits_eos_inf", False)),
        *(preset["published"], preset["reachable"]),
    )
    assert found == SOURCES[name]
    assert arguments.get("apply_chat_template", False) == ("base" not in name)


def test_presets_of_other_families_are_their_sources():
    presets, seen = read_presets(), set()
    for family, sampler, tasks in FAMILIES:
        for task, (name, num_fewshot, published, reachable) in tasks.items():
            preset = presets[task + family]
            seen.add(task + family)
            arguments = preset["arguments"]
            assert arguments["model_args"].items() >= sampler.items(), task + family
            assert (arguments["tasks"], arguments.get("num_fewshot")) == ([name], num_fewshot), task + family
            assert (preset["published"], preset["reachable"]) == (published, reachable), task + family
            assert arguments.get("apply_chat_template", False) == ("base" not in family)
    others = ("illada", "dream", "diffucoder", "sdar", "moe", "llada2")
    assert seen == {name for name in presets if any(word in name for word in others)}


@pytest.mark.parametrize(
    ("holes", "name"),
    [("SingleLine", "SingleLineInfilling"), ("RandomSpanLight", "RandomSpanInfillingLight")],
)
def test_holes_are_filled_between_prompt_and_suffix(model_dir, tmp_path, holes, name):
    folder, out = tmp_path / "data/humaneval_infilling", tmp_path / "out"
    folder.mkdir(parents=True)
    problem = {
        "task_id": f"{name}/HumanEval/0/L0", "entry_point": "f", "prompt": "def f(x):\n",
        "suffix": "\n    return y",
        "canonical_solution": "    y = x + 1", "test": "def check(f):\n    assert f(1) == 2\n",
    }  # fmt: skip
    (folder / f"HumanEval-{name}.jsonl").write_text(json.dumps(problem) + "\n")
    main = load_script("eval/eval_llada.py").main
    metadata = json.dumps({"data_dir": str(tmp_path / "data"), "holes": holes})
    flags = [
        "--preset",
        "humaneval-fim-base",
        "--metadata",
        metadata,
        "--output_path",
        str(out),
        "--log_samples",
    ]
    for more in ("", ",gen_length=12,block_length=8"):
        main([*flags, "--model_args", f"model_path={model_dir}{more}"])
    lines = [line for path in out.glob("requests/**/rank-0.jsonl") for line in path.read_text().splitlines()]
    whole, wider = sorted((json.loads(line) for line in lines), key=lambda line: line["num_tokens"])
    assert whole["prompt"] == wider["prompt"] == problem["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    solution = tokenizer(problem["canonical_solution"], add_special_tokens=False)["input_ids"]
    # a hole has no end of its own: every mask of it is filled, of whole blocks
    assert (whole["num_tokens"], wider["num_tokens"]) == (len(solution), 16)
    (sample,) = (json.loads(line) for line in next(out.glob("*/samples_*.jsonl")).read_text().splitlines())
    ((program,),) = sample["filtered_resps"]
    assert program.startswith(problem["prompt"]) and program.endswith(problem["suffix"])
    execution = load_script("eval/tasks/code_execution.py")
    programs = execution.fill_hole([[problem["canonical_solution"], "    y = x"]], [problem])
    checks = [f"{problem['test']}\ncheck(f)"]
    assert [execution.pass_at_1(checks, [[program]])["pass@1"] for program in programs[0]] == [1.0, 0.0]
    with pytest.raises(ValueError, match="--metadata holes=Words: choose from SingleLine"):
        load_script("eval/tasks/local_data.py").humaneval_infilling(data_dir=str(tmp_path), holes="Words")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for name in ("countdown", "sudoku", "gsm8k", "math500"):
        (folder / name).mkdir(parents=True)
    (folder / "countdown/test.jsonl").write_text('{"input": "87,85,60,62", "output": ""}\n' * 300)
    (folder / "sudoku/test.csv").write_text("Puzzle,Solution\n1004420020433410,1324423121433412\n")
    (folder / "gsm8k/test.jsonl").write_text('{"question": "9 * 2?", "answer": "#### 18"}\n')
    (folder / "math500/test.jsonl").write_text('{"problem": "pi?", "answer": "\\\\pi"}\n')
    return folder


def test_the_d1_protocol_on_local_data(model_dir, data, tmp_path):
    out = tmp_path / "out"
    load_script("eval/eval_llada.py").main(
        ["--preset", "d1-128", "--metadata", f"data_dir={data}", "--limit", "1", "--log_samples",
         "--model_args", f"model_path={model_dir}", "--output_path", str(out)]
    )  # fmt: skip
    (file,) = out.glob("*/results_*.json")
    found = json.loads(file.read_text())["results"]
    assert set(found) == {"d1_countdown", "d1_sudoku", "d1_gsm8k", "d1_math500"}
    assert all("accuracy,none" in values for values in found.values())
    lines = [line for path in out.glob("requests/**/*.jsonl") for line in path.read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(prompts) == 4 and all(prompt.endswith("<reasoning>") for prompt in prompts)
    (countdown,) = (prompt for prompt in prompts if "Numbers: [87, 85, 60]\nTarget: 62" in prompt)
    assert "Using only the provided numbers, create an arithmetic expression" in countdown
    assert (out / "command.txt").read_text().startswith("python eval/eval_llada.py --preset d1-128")


def test_the_d1_protocol_grades_as_the_rewards_do(data):
    protocol = load_script("eval/tasks/d1_protocol.py")
    assert len(protocol.countdown(data_dir=str(data))["test"]) == 256
    for name, answer, value in (
        ("countdown", "x</reasoning><answer>\\boxed{87 - 85 + 60}</answer>", 1.0),
        ("sudoku", "x</reasoning><answer>132442312143341</answer>", 5 / 6),
        ("gsm8k", "x</reasoning><answer>\\boxed{18}</answer>", 1.0),
        ("math500", "x</reasoning><answer>3.14</answer>", 0.0),
    ):
        doc = getattr(protocol, name)(data_dir=str(data))["test"][0]
        assert protocol.graded(doc, [answer]) == {"accuracy": value}


def test_two_evaluations_are_compared_question_by_question(tmp_path, capsys):
    for folder, values in (("a", [1, 0, 0, 1]), ("b", [1, 1, 0, 1]), ("c", [])):
        (tmp_path / folder / "m").mkdir(parents=True)
        lines = [
            {"doc_hash": str(n), "metrics": ["acc"], "filter": "none", "acc": float(value)}
            for n, value in enumerate(values)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / folder / "m/samples_my_task_2026-01-01T00-00-00.0.jsonl").write_text(text)
    first, second, third = (str(tmp_path / folder) for folder in "abc")
    (found,) = compare(first, second)
    assert found[:5] == ("my_task/acc,none", 4, 0.5, 0.75, 0.25)
    assert found.half_width == pytest.approx(1.96 * 0.25)  # the differences are 0, 1, 0, 0
    main = load_script("eval/eval_llada.py").main
    main(["--compare", first, second])
    assert "| 4 | 0.5000 | 0.7500 | +0.2500 | -0.2400 to +0.7400 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no samples_"):
        main(["--compare", first, str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="no question of one task in both"):
        main(["--compare", first, third])
