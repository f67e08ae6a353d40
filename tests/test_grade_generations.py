"""scripts/benchmarks/grade_generations.py: published generations, our verdict beside theirs."""

import json

from conftest import load_script


def test_verdicts_are_compared_and_differences_listed(tmp_path, capsys):
    end = "<|eot_id|><|endoftext|>"
    generations = {
        "9 * 2\n</reasoning>\n<answer>\n\\boxed{18}\n</answer>": (18.0, True),
        "<answer>\\boxed{43,500}</answer>": (43500.0, False),
        "<answer>\n\\boxed{36>": (36.0, False),
        "\\boxed{1}": (None, False),
    }
    gsm8k = [
        {"ground_truth": gold, "generation": text + end, "is_correct": is_correct}
        for text, (gold, is_correct) in generations.items()
    ]
    countdown = {
        "ground_truth": [[60, 85, 87], 62],
        "generation": "\\boxed{87 - 85 + 60}",
        "is_correct": True,
    }
    puzzle, solved = "1004420020433410", "1324423121433412"
    sudoku = {"question": f"Solve: {puzzle}", "ground_truth": solved, "correct_cells": 6, "empty_cells": 9}
    sudoku["generation"] = "</reasoning><answer>132442312143000</answer>" + end
    files = {"gsm8k": gsm8k, "countdown": [countdown], "sudoku": [sudoku]}
    paths = [tmp_path / f"{name}.jsonl" for name in files]
    for path, records in zip(paths, files.values(), strict=True):
        path.write_text("".join(json.dumps({"question": "?", **record}) + "\n" for record in records))
    load_script("scripts/benchmarks/grade_generations.py").main(["--input", *map(str, paths)])
    printed = capsys.readouterr().out
    assert "gsm8k.jsonl: 4 answers, d1 1 (25.00%), ours 2 (50.00%), 1 judged differently" in printed
    assert "gsm8k.jsonl:2: d1 0, ours 1.0; gold 43500.0; answer '43,500'" in printed
    assert "countdown.jsonl: 1 answers, d1 1 (100.00%), ours 1 (100.00%), 0 judged differently" in printed
    assert "sudoku.jsonl: 1 answers, d1 0.666667 (66.67%)" in printed
