"""Grades generations that others have published with our rewards, and lists every answer judged differently.

Records as d1 (github.com/dllm-reasoning/d1, eval/eval_baselines) keeps them, one a line, compressed or not:
{"question", "ground_truth", "generation", "is_correct"}, or for sudoku "correct_cells" and "empty_cells".
Its ground truth tells what a record asks: numbers and a target are countdown, a number GSM8K, a text MATH.

Run:
    python scripts/benchmarks/grade_generations.py --input d1_generations/*.jsonl.gz

Prints for each file how many answers d1's parser and ours call right (for sudoku the share of empty cells
filled rightly), and the answers on which they differ, with what our finder takes for the answer.
"""

import re
from dataclasses import dataclass
from typing import Any

from llada.flags.declaration import flag
from llada.flags.parser import check_command_line, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of the grader."""

    input: list[str] = flag(help="Files of generations, or folders of them.", reads="path")
    prefill: str = flag("<reasoning>", help="What the prompt had put before each generation.")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from llada.data.final_answer import final_answer
from llada.data.records import read_records
from llada.rewards.functions import BUILT_IN

ENDS = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")


def task_of(record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name of the reward, the fields it needs) of a record."""
    gold = record["ground_truth"]
    if "correct_cells" in record:
        return "sudoku_cells", {"puzzle": re.search(r"\b\d{16}\b", record["question"])[0], "solution": gold}
    if isinstance(gold, list):
        return "countdown", {"numbers": gold[0], "target": gold[1]}
    is_whole = isinstance(gold, float) and gold.is_integer()
    return "math", {"answer": None if gold is None else str(int(gold) if is_whole else gold)}


def grade(path: str, prefill: str) -> None:
    """Prints what this file's answers are worth, and where two graders differ."""
    ours, theirs, differing = [], [], []
    for where, record in read_records(path):
        name, fields = task_of(record)
        text, *ended = ENDS.split(record["generation"], maxsplit=1)
        columns = {field: [value] for field, value in (fields | {"was_cut": not ended}).items()}
        (value,) = BUILT_IN[name](prompts=[""], completions=[prefill + text], **columns)
        ours.append(value or 0.0)
        if "correct_cells" in record:
            theirs.append(record["correct_cells"] / record["empty_cells"])
        else:
            theirs.append(float(record["is_correct"]))
        if ours[-1] != theirs[-1]:
            found = final_answer(prefill + text, was_cut=not ended)
            verdicts = f"d1 {theirs[-1]:g}, ours {value}; gold {record['ground_truth']}"
            differing.append(f"    {where}: {verdicts}; answer {found[-100:]!r}")
    num = len(ours)
    print(
        f"{path}: {num} answers, d1 {sum(theirs):g} ({sum(theirs) / num:.2%}), "
        f"ours {sum(ours):g} ({sum(ours) / num:.2%}), {len(differing)} judged differently"
    )
    print(*differing, sep="\n")


def main(argv: list[str] | None = None) -> None:
    """Grades every file."""
    config = parse(Config, argv, description=__doc__)
    for path in config.input:
        grade(path, config.prefill)


if __name__ == "__main__":
    run_main(main)
