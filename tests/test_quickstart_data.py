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


def test_worked_distances_are_thought_in_grids_that_come_closer(tmp_path):
    sizes = ["--num_train", "30", "--num_heldout", "5", "--num_prompts", "30"]
    out = tmp_path / "data"
    load_script("scripts/make_quickstart_data.py").main(
        ["--tasks", "worked_matrix", *sizes, "--output_dir", str(out)]
    )
    sft, prompts = (
        [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sft", "prompts")
    )
    farthest = 0
    for conversation, record in zip(sft, prompts, strict=True):
        question, answer = (turn["content"] for turn in conversation["messages"])
        assert question == record["prompt"] and puzzle_solved(answer, record) == 1
        thought, last = answer.removeprefix("<think>").split("</think>\n")
        one, two = thought.split("\n\n")
        distances = [int(cell) for cell in last.split()]
        assert [int(cell) for cell in one.split()] == [min(cell, 2) for cell in distances]
        assert [int(cell) for cell in two.split()] == [min(cell, 3) for cell in distances]
        farthest = max(farthest, *distances)
    assert farthest > 3
