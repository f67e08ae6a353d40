"""The puzzles of the quickstart: what is asked, thought and answered."""

import json

from conftest import load_script
from llada.rewards.functions import puzzle_solved


def test_answers_are_thought_through_and_right_and_prompts_are_sudokus(tmp_path):
    sizes = ["--num_train", "20", "--num_heldout", "5", "--num_prompts", "10"]
    load_script("scripts/make_quickstart_data.py").main([*sizes, "--output_dir", str(tmp_path / "data")])
    records = {
        name: [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sft", "prompts", "heldout")
    }
    assert [len(records[name]) for name in records] == [40, 10, 10]
    assert {record["task"] for record in records["prompts"]} == {"mini_sudoku"}
    answers = {turns[0]["content"]: turns[1]["content"] for turns in (r["messages"] for r in records["sft"])}
    for record in records["prompts"]:
        answer = answers[record["prompt"]]
        assert puzzle_solved(answer, record) == 1
        assert answer == f"<think>rows, columns, boxes</think>\n{record['answer'].strip()}"
