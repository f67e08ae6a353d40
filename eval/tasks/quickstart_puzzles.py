"""The quickstart's held-out puzzles as lm_eval tasks, with the same verifier as the pipeline's own accuracy.

Data: heldout.jsonl of scripts/make_quickstart_data.py, in the folder that --metadata data_dir=... names.
"""

import json
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict
from local_data import data_file, read_jsonl

from llada.rewards.functions import puzzle_solved


def _puzzles(name: str, *, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Split test: the puzzles of one task; what the verifier needs is kept as JSON text."""
    records = [
        record for record in read_jsonl(data_file(["heldout.jsonl"], data_dir)) if record["task"] == name
    ]
    rows = [{"prompt": r["prompt"], "record": json.dumps(r)} for r in records]
    return DatasetDict({"test": Dataset.from_list(rows)})


mini_sudoku = partial(_puzzles, "mini_sudoku")
binary_matrix = partial(_puzzles, "binary_matrix")


def solved(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the completion solves the puzzle."""
    return {"accuracy": puzzle_solved(results[0], json.loads(doc["record"]))}
