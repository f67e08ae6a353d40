"""Presets are their sources, the d1 protocol runs on local data, and two evaluations are compared."""

import json

import pytest
import yaml

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
