"""Which answers are right: sudoku, countdown, and reasoning-gym's own puzzles.

Sudoku and countdown are bounded by themselves; the library behind `reasoning_gym` may hang on a text, or
evaluate it, and is only called in a `llada.rewards.sandbox.ConfinedModule`.
"""

import ast
import math
import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

from llada.data.final_answer import final_answer, plain, undressed, without_thoughts
from llada.rewards.mathematics import MAX_CHARACTERS, same_value

__all__ = ["same_value"]  # for the one process with the libraries

MAX_DIGITS = 12  # of a number in a sum: products of larger ones cost time and prove nothing

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
# What draws a grid in text, Markdown or LaTeX, between its digits.
_LINES = re.compile(r"\\(?:begin|end)\s*\{\w+\}(?:\{[^{}]*\})?|\\hline|\\\\|[&|+,\[\]\s-]")


def has_format(text: str, first: str, second: str | None = None) -> bool:
    """Whether a text is something in tags `first`, then something (in tags `second`), each tag once."""
    tags = [f"<{end}{name}>" for name in (first, second) if name for end in ("", "/")]
    parts = [text]
    for tag in tags:
        *head, last = parts
        parts = [*head, *last.split(tag)]
    if len(parts) != len(tags) + 1:
        return False
    is_filled = [bool(part.strip()) for part in parts]
    return is_filled == ([False, True, True] if second is None else [False, True, False, True, False])


def cells(grid: str | Sequence[Any]) -> list[int]:
    """A sudoku as a flat list, 0 for an empty cell: from lists, or from text of digits with 0, _ or '.'."""
    if not isinstance(grid, str):
        return [int(cell) for row in grid for cell in (row if isinstance(row, Sequence) else [row])]
    return [int(c) if c.isdecimal() else 0 for c in grid if c in "0123456789_."]


def sudoku_solved(answer: str, puzzle: Sequence[int]) -> bool:
    """Whether the answer's digits are a full grid that agrees with the puzzle's givens and breaks no rule.

    ValueError: the puzzle is no grid of n^2 x n^2 cells with n 2 or 3.
    """
    side = math.isqrt(len(puzzle))
    box = math.isqrt(side)
    if side**2 != len(puzzle) or box**2 != side or side not in (4, 9):
        raise ValueError(f"a sudoku has 4 x 4 or 9 x 9 cells, got {len(puzzle)}")
    if len(answer) > MAX_CHARACTERS:
        return False
    grid = [int(digit) for digit in _grid_of(answer)]
    if len(grid) != len(puzzle):
        return False
    if any(given not in (0, value) for given, value in zip(puzzle, grid, strict=True)):
        return False
    groups = [grid[side * i : side * (i + 1)] for i in range(side)]
    groups += [grid[i::side] for i in range(side)]
    groups += [
        [grid[(r + i) * side + c + j] for i in range(box) for j in range(box)]
        for r in range(0, side, box)
        for c in range(0, side, box)
    ]
    return all(sorted(group) == list(range(1, side + 1)) for group in groups)


def _grid_of(answer: str) -> str:
    """The digits of the last lines of a text that are rows of a grid."""
    rows: list[str] = []
    for line in reversed(answer.splitlines()):
        row = _LINES.sub("", line.strip("$`* "))
        if row.isdecimal():
            rows.append(row)
        elif row and rows:
            break
    return "".join(reversed(rows))


def sudoku_cells(
    completion: str, puzzle: Sequence[int], solution: Sequence[int], *, was_cut: bool | None = None
) -> float:
    """Share of the puzzle's empty cells filled as in its solution. Source: d1's parse_and_get_acc.py."""
    size, text = len(puzzle), without_thoughts(completion)
    before, opened, rest = text.partition("<answer>")
    inside, closed, behind = (rest if opened else before).partition("</answer>")
    given = ""
    if opened and (closed or not was_cut):
        fence = re.search(r"```\s*([\d\s]+)```", rest)
        given = fence[1] if fence else undressed(inside)
    if closed and not given.strip():
        given = behind
    if not given.strip():
        digits = re.search(rf"(\d{{{size}}})\s*</answer>|\b\d{{{size}}}\b", text)
        given = _grid_of(final_answer(text)) or (digits[1] or digits[0] if digits else "")
    # What is no digit stands in a cell's place: d1 pads or cuts an answer in tags to the grid.
    drawn = _LINES.sub("", given)
    cells = drawn if drawn.isdecimal() and len(drawn) == size else re.sub(r"\s", "", given)
    if len(cells) > MAX_CHARACTERS:
        return 0.0
    empty = [i for i, cell in enumerate(puzzle) if cell == 0]
    return sum(cells[i : i + 1] == str(solution[i]) for i in empty) / max(len(empty), 1)


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """Value of + - * / over whole numbers, exactly, and the numbers used; None for anything else."""
    if len(expression) > 200:  # also bounds the parser's depth
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        numbers: list[int] = []
        return _value(tree, numbers), numbers
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10**MAX_DIGITS:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, numbers)
    raise ValueError(f"not arithmetic: {ast.dump(node)[:40]}")


def _arithmetic(text: str) -> str:
    """An expression as Python writes it, from LaTeX, brackets of all kinds, and signs left out."""
    text, before = plain(undressed(text)), ""
    while before != text:
        before, text = text, re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"(?<=\d)\.0+(?!\d)", "", text)  # 62.0
    text = re.sub(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])", "*", text.translate(str.maketrans("[]{}", "()()")))
    return re.sub(r"(?<=\d)\s*(?=\()|(?<=\))\s*(?=[\d(])", "*", text)


def countdown_solved(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the answer makes `target` of all the `numbers`, each once.

    An expression, `94*4 - 61 - 6`, also with `= 309` behind it or `309 =` before it; or steps that use the
    results of earlier ones, `44-15=29,79-29=50`.
    """
    if len(answer) > MAX_CHARACTERS:
        return False
    steps = [step for step in re.split(r"[,;\n]|\\\\", answer) if step.strip()]
    if not 1 <= len(steps) <= len(numbers):
        return False
    available, result = Counter(numbers), None
    for step in steps:
        sides = re.sub(r"^\s*(?:[Ss]tep\s*)?\d+\s*[:.)]\s+(?=\S)", "", step).split("=")  # "1. 44 - 15 = 29"
        found = [evaluate(_arithmetic(side)) for side in sides]
        if len(found) > 2 or None in found or len({value for value, _ in found}) > 1:
            return False
        if len(steps) > 1 and len(found) == 1:
            return False
        # the longer side of `309 = 94*4 - 61 - 6` is the sum, the other only says what it is
        result, used = max(found, key=lambda side: len(side[1]))
        if len(found) == 2 and min(len(side[1]) for side in found) > 1:
            return False
        if Counter(used) - available:
            return False
        available -= Counter(used)
        if len(steps) > 1 and result.denominator == 1:
            available[int(result)] += 1
    # +Counter drops zeros: every number is used, and of the steps only the target may be left
    left = available if len(steps) == 1 else available - Counter([target])
    return result == target and not +left


def import_libraries() -> None:
    """What `same_value` and `reasoning_gym` need, so that no answer's time goes into imports."""
    import math_verify
    import reasoning_gym

    math_verify.verify(math_verify.parse("1", parsing_timeout=None), math_verify.parse("$1$"))
    reasoning_gym.get_score_answer_fn("mini_sudoku")


@cache
def _verifier(task: str) -> Any:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


def reasoning_gym(task: str, answer: str, entry: Mapping[str, Any]) -> float:
    """The library's own score of an answer, from 0 to 1. ValueError for a task that it does not have."""
    return float(_verifier(task)(answer, dict(entry)))
