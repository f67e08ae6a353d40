"""Data and grades of the protocol by which d1 and its successors evaluate: countdown, sudoku, GSM8K, MATH500.

The prompts stand in d1_*.yaml, the sampler's settings in the presets d1-128, d1-256 and d1-512. As there,
only 256 puzzles of a kind are asked, here the first. Data, in the folder of local_data.py:

    countdown/test.jsonl    {"input": "15,44,79,50"}: the numbers, then the target
    sudoku/test.csv         Puzzle,Solution: 16 digits, 0 for an empty cell
    gsm8k/test.jsonl        {"question", "answer"}
    math500/test.jsonl      {"problem", "answer"}

Source: github.com/dllm-reasoning/d1, eval/
"""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from local_data import data_file, read_jsonl

from llada.rewards.functions import BUILT_IN

NUM_PUZZLES = 256


def _questions(name: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(text, what its reward needs) of each question."""
    if name == "sudoku":
        with open(path, encoding="utf-8", newline="") as lines:
            puzzles = list(csv.DictReader(lines))[:NUM_PUZZLES]
        return [(row["Puzzle"], {"puzzle": row["Puzzle"], "solution": row["Solution"]}) for row in puzzles]
    records = read_jsonl(path)
    if name == "countdown":
        puzzles = [[int(n) for n in record["input"].split(",")] for record in records[:NUM_PUZZLES]]
        return [
            (f"Numbers: {n}\nTarget: {target}", {"numbers": n, "target": target}) for *n, target in puzzles
        ]
    return [(record.get("problem") or record["question"], {"answer": record["answer"]}) for record in records]


def _task(name: str, reward: str, file: str, *, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Split test; what the reward needs is kept as JSON text."""
    rows = [
        {"text": text, "reward": reward, "fields": json.dumps(fields)}
        for text, fields in _questions(name, data_file([file], data_dir))
    ]
    return DatasetDict({"test": Dataset.from_list(rows)})


countdown = partial(_task, "countdown", "countdown", "countdown/test.jsonl")
sudoku = partial(_task, "sudoku", "sudoku_cells", "sudoku/test.csv")
gsm8k = partial(_task, "gsm8k", "math", "gsm8k/test.jsonl")
math500 = partial(_task, "math500", "math", "math500/test.jsonl")


def graded(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """What the reward gives for the completion; of a sudoku the share of empty cells filled rightly."""
    columns = {name: [value] for name, value in json.loads(doc["fields"]).items()}
    (value,) = BUILT_IN[doc["reward"]](prompts=[""], completions=["<reasoning>" + results[0]], **columns)
    return {"accuracy": value}
