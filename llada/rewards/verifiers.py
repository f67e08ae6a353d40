"""Which answers are right: sudoku, countdown, mathematics, and reasoning-gym's own puzzles.

Every function takes text that a model wrote. Sudoku and countdown are bounded by themselves; the libraries
behind `math_equal` and `reasoning_gym` may hang on a text, or evaluate it, and are only called in a
`llada.rewards.sandbox.ConfinedModule`.
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

MAX_CHARACTERS = 4000  # a longer answer is wrong
MAX_DIGITS = 12

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_DIGIT_GRID = re.compile(r"[1-9]")


def final_answer(completion: str) -> str:
    """The completion without its `<think>` parts, or what stands in its last `<answer>` tags.

    An unfinished `<think>` leaves no answer at all.
    """
    answer = []
    while True:
        before, opened, rest = completion.partition("<think>")
        answer.append(before)
        if not opened:
            break
        _, closed, completion = rest.partition("</think>")
        if not closed:
            break
    text = "".join(answer)
    if "<answer>" in text:
        text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    return text.strip()


def code_blocks(text: str) -> list[str]:
    """The Python in fences of three backticks; the last fence may be open."""
    return re.findall(r"```(?:[Pp]ython|py)?[^\S\n]*\n(.*?)(?:```|\Z)", text, flags=re.DOTALL)


def is_thought_format(completion: str) -> bool:
    """Whether it is `<think>`, some text, `</think>`, and an answer, each tag once."""
    text = completion.strip()
    if not text.startswith("<think>") or text.count("<think>") != 1 or text.count("</think>") != 1:
        return False
    thought, _, answer = text.removeprefix("<think>").partition("</think>")
    return bool(thought.strip()) and bool(answer.strip())


def cells(grid: str | Sequence[Any]) -> list[int]:
    """A sudoku as a flat list, 0 for an empty cell: from lists, or from text of digits with 0, _ or '.'."""
    if not isinstance(grid, str):
        return [int(cell) for row in grid for cell in (row if isinstance(row, Sequence) else [row])]
    return [int(c) if c.isdecimal() else 0 for c in grid if c in "0123456789_."]


def sudoku_solved(answer: str, puzzle: Sequence[int]) -> bool:
    """Whether the answer's digits are a full grid that agrees with the puzzle's givens and breaks no rule.

    Raises:
        ValueError: the puzzle is no grid of n^2 x n^2 cells with n 2 or 3.
    """
    side = math.isqrt(len(puzzle))
    box = math.isqrt(side)
    if side**2 != len(puzzle) or box**2 != side or side not in (4, 9):
        raise ValueError(f"a sudoku has 4 x 4 or 9 x 9 cells, got {len(puzzle)}")
    if len(answer) > MAX_CHARACTERS or not set(answer) <= set("0123456789 \t\r\n|+-,[]"):
        return False
    grid = [int(digit) for digit in _DIGIT_GRID.findall(answer)]
    if len(grid) != len(puzzle) or "0" in answer:
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


def countdown_solved(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the answer makes `target` of all the `numbers`, each once.

    Accepted: an expression, `94*4 - 61 - 6`, also with `= 309` behind it; or steps that use the results of
    earlier ones, `44-15=29,79-29=50`.
    """
    if len(answer) > MAX_CHARACTERS:
        return False
    steps = [step for step in re.split(r"[,;\n]", answer) if step.strip()]
    if not 1 <= len(steps) <= len(numbers):
        return False
    available, result = Counter(numbers), None
    for step in steps:
        expression, equals, claimed = step.partition("=")
        found = evaluate(expression)
        if found is None:
            return False
        result, used = found
        if equals and (not claimed.strip().removeprefix("-").isdecimal() or len(claimed) > MAX_DIGITS):
            return False
        if (equals and int(claimed) != result) or (not equals and len(steps) > 1):
            return False
        if Counter(used) - available:
            return False
        available -= Counter(used)
        if len(steps) > 1 and result.denominator == 1:
            available[int(result)] += 1
    left = available if len(steps) == 1 else available - Counter([target])
    return result == target and not +left


def gold_number(answer: str) -> str:
    """What stands behind GSM8K's `####`, or the whole text."""
    return answer.rpartition("####")[2].strip().replace(",", "") if "####" in answer else answer


def math_equal(answer: str, gold: str) -> bool | None:
    """Whether the answer is the same value as the gold one; None if the gold one is no mathematics.

    Source: math-verify, which reads LaTeX, fractions, percentages, sets and intervals.
    """
    from math_verify import parse, verify

    # The worker has limits; the library's own use signals, which are for its caller.
    expected = parse(_as_latex(gold_number(gold)), parsing_timeout=None)
    if not expected:
        return None
    if len(answer) > MAX_CHARACTERS:
        return False
    given = answer.rpartition("####")[2] if "####" in answer else answer
    return bool(verify(expected, parse(given, parsing_timeout=None), timeout_seconds=None))


def _as_latex(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text}$"


def import_libraries() -> None:
    """What `math_equal` and `reasoning_gym` need, so that no answer's time goes into imports."""
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
