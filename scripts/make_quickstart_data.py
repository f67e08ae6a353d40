"""Makes the quickstart's data: puzzles with verifiers, as text, as conversations, and as held-out prompts.

Puzzles come from reasoning-gym: 4x4 sudoku, and the distance of each cell of a 4x4 matrix to its nearest 0;
with --tasks worked_matrix, the same distances after a thought that works them out, one step at a time.

Run:
    python scripts/make_quickstart_data.py --output_dir runs/quickstart/data

Writes pretrain.jsonl and pretrain_validation.jsonl ({"text"}), sft.jsonl and sft_validation.jsonl
({"messages"}), and {"id", "task", "prompt", "answer", "metadata"} records: heldout.jsonl for generation and
lm_eval, prompts.jsonl (training puzzles of the first task) for post-training.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of the data maker."""

    output_dir: str = flag(help="Folder for the files.", writes="new folder")
    tasks: list[str] = flag(
        ["mini_sudoku", "binary_matrix"],
        help="Kinds of puzzles.",
        choices=["mini_sudoku", "binary_matrix", "worked_matrix"],
    )
    num_train: int = flag(
        24000, help="Training puzzles of each task (fewer where the task has fewer).", at_least=1
    )
    num_heldout: int = flag(250, help="Held-out puzzles of each task.", at_least=1)
    num_prompts: int = flag(
        4000, help="Training puzzles of the first task that are also prompts.", at_least=1
    )
    seed: int = flag(7, help="Key of the puzzles.", at_least=0)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import reasoning_gym

from llada.diffusion.masking import generator
from llada.resumable import whole_folder

HELDOUT_SHARE = 0.25

Puzzle = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """How a reasoning-gym data set is asked, thought about and split."""

    name: str
    options: dict[str, Any]
    question: Callable[[Puzzle], str]
    thought: Callable[[Puzzle], str]
    identity: Callable[[Puzzle], str]


def _grid(rows: list[list[int]]) -> str:
    return "\n".join(" ".join(map(str, row)) for row in rows)


def _distances_within(puzzle: Puzzle) -> str:
    """Two grids before the answer: the distances as far as they are known after one step, and after two."""
    rows = [[int(cell) for cell in row.split()] for row in puzzle["answer"].strip().splitlines()]
    return "\n\n".join(_grid([[min(cell, limit) for cell in row] for row in rows]) for limit in (2, 3))


SUDOKU = Task(
    "mini_sudoku",
    {"min_empty": 4, "max_empty": 8},
    lambda puzzle: "Sudoku:\n" + _grid(puzzle["metadata"]["puzzle"]),
    lambda _: "rows, columns, boxes",
    lambda puzzle: puzzle["answer"],
)
MATRIX = Task(
    "binary_matrix",
    {"min_n": 4, "max_n": 4},
    lambda puzzle: "Distances:\n" + _grid(puzzle["metadata"]["matrix"]),
    lambda _: "steps to the nearest 0",
    lambda puzzle: _grid(puzzle["metadata"]["matrix"]),
)
# A question and its answer always take the same number of tokens (an empty cell is a 0), so that a
# small model finds the cell that belongs to an answer at a constant distance. The thought of the first two is
# the same for all puzzles: what such a model can only guess (a count) would be noise to a stage that learns
# from its samples.
TASKS = {
    "mini_sudoku": SUDOKU,
    "binary_matrix": MATRIX,
    "worked_matrix": replace(MATRIX, thought=_distances_within),
}


def puzzles(task: Task, *, heldout: bool, count: int, seed: int) -> Iterator[Puzzle]:
    """Distinct puzzles of one part, in an order that depends on the seed only; perhaps fewer than `count`."""
    size = 4 * count + 1000
    source = reasoning_gym.create_dataset(task.name, seed=seed, size=size, **task.options)
    seen: set[str] = set()
    for index in range(size):
        puzzle = source[index]
        question = task.question(puzzle)
        # by what identifies a puzzle, whatever the seed: a held-out one has never been seen in any form
        is_heldout = generator(0, task.name, task.identity(puzzle)).random() < HELDOUT_SHARE
        if is_heldout == heldout and question not in seen:
            seen.add(question)
            yield puzzle
            if len(seen) == count:
                return


def as_text(task: Task, puzzle: Puzzle) -> dict[str, str]:
    """A pretraining record."""
    return {"text": f"{task.question(puzzle)}\n{task.thought(puzzle)}\n{puzzle['answer'].strip()}"}


def as_conversation(task: Task, puzzle: Puzzle) -> dict[str, list[dict[str, str]]]:
    """An SFT record: question, thought, answer."""
    answer = f"<think>{task.thought(puzzle)}</think>\n{puzzle['answer'].strip()}"
    turns = [("user", task.question(puzzle)), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def as_prompt(task: Task, puzzle: Puzzle, index: int) -> dict[str, Any]:
    """The question, and what the verifier needs."""
    return {
        "id": f"{task.name}-{index}",
        "task": task.name,
        "prompt": task.question(puzzle),
        "answer": puzzle["answer"],
        "metadata": puzzle["metadata"],
    }


def main(argv: list[str] | None = None) -> None:
    """Writes the files."""
    config = parse(Config, argv, description=__doc__)
    names = ("pretrain", "pretrain_validation", "sft", "sft_validation", "heldout", "prompts")
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for task in (TASKS[name] for name in dict.fromkeys(config.tasks)):
        train = list(puzzles(task, heldout=False, count=config.num_train, seed=config.seed))
        heldout = list(puzzles(task, heldout=True, count=config.num_heldout, seed=config.seed + 1))
        files["pretrain"] += [as_text(task, puzzle) for puzzle in train]
        files["pretrain_validation"] += [as_text(task, puzzle) for puzzle in heldout]
        files["sft"] += [as_conversation(task, puzzle) for puzzle in train]
        files["sft_validation"] += [as_conversation(task, puzzle) for puzzle in heldout]
        files["heldout"] += [as_prompt(task, puzzle, i) for i, puzzle in enumerate(heldout)]
        if not files["prompts"]:
            chosen = train[-config.num_prompts :]
            files["prompts"] = [as_prompt(task, puzzle, i) for i, puzzle in enumerate(chosen)]
        print(f"{task.name}: {len(train)} training and {len(heldout)} held-out puzzles", flush=True)
    with whole_folder(Path(config.output_dir)) as folder:
        for name, records in files.items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
