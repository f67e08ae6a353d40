"""Right answers give 1.0, wrong ones 0, and no text does harm."""

import json
import math
import time

import numpy as np
import pytest

from llada.data.prompts import Prompt
from llada.models.building import load_for_inference
from llada.policies.completions import Sampler
from llada.rewards import functions as rewards
from llada.rewards.flags import RewardFlags
from llada.rewards.functions import puzzle_solved
from llada.rewards.scoring import Reward, compute_rewards, load_rewards
from llada.rewards.verifiers import cells, countdown_solved, evaluate, sudoku_solved
from modelling_final import LLaDAGenerationConfig

PUZZLE = "1004420020433410"
SOLVED = "1324423121433412"

ADVERSARIAL = [
    "",
    " " * 10_000,
    "<think>" * 20_000,
    "<think>" * 50 + "</think>" * 50,
    "</think>\n<answer></answer><answer>",
    "9" * 10_000,
    "9**9**9**9",
    "((((" * 5_000,
    "1+" * 5_000 + "1",
    "\\frac{" * 500,
    "\\boxed{10^{10^{10}}}",
    "#### " + "9" * 5_000,
    "__import__('os').system('touch harm')",
    "```python\nimport os\nwhile True: os.fork()\n```",
    "```python\nimport time\ntime.sleep(60)\n```",
    "\ud800 \x00 \u202e",
    "<|mdm_mask|>" * 100,
]


def answers(name, completions, **fields):
    columns = {field: [value] * len(completions) for field, value in fields.items()}
    return rewards.BUILT_IN[name](prompts=["p"] * len(completions), completions=completions, **columns)


def test_sudoku():
    rows = "\n".join(" ".join(SOLVED[i : i + 4]) for i in range(0, 16, 4))
    grid = [[int(c) for c in PUZZLE[i : i + 4]] for i in range(0, 16, 4)]
    texts = [rows, SOLVED, f"<think>8 empty</think>\n{rows}", SOLVED[:-1], SOLVED + "1", "4" * 16, PUZZLE]
    assert answers("sudoku", texts, puzzle=PUZZLE) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert answers("sudoku", texts, metadata={"puzzle": grid}) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    other = SOLVED.translate(str.maketrans("12", "21"))  # a valid grid of another puzzle
    assert answers("sudoku", [other], puzzle=PUZZLE) == [0.0]
    assert answers("sudoku", [SOLVED], puzzle=None, metadata={}) == [None]
    cells_of = {"puzzle": PUZZLE, "solution": SOLVED}
    half = "<answer>13244___21433412</answer>"
    assert answers(
        "sudoku_cells", [rows, f"<answer>{SOLVED}</answer>", half, PUZZLE, "none"], **cells_of
    ) == [*(1.0, 1.0, 6 / 9, 0.0, 0.0)]
    table = "| 1 | 3 | 2 | 4 |\n|---|---|---|---|\n| 4 | 2 | 3 | 1 |\n| 2 | 1 | 4 | 3 |\n| 3 | 4 | 1 | 2 |"
    latex = r"\[\begin{array}{|cc|cc|} 1&3&2&4\\4&2&3&1\\ \hline 2&1&4&3\\3&4&1&2 \end{array}\]"
    drawn = [table, f"Here it is:\n\n{rows}\n\nEvery row has all digits.", latex, f"```\n{rows}\n```"]
    assert answers("sudoku", drawn, puzzle=PUZZLE) == [1.0] * 4
    assert cells("1__4\n42.0") == [1, 0, 0, 4, 4, 2, 0, 0]
    with pytest.raises(ValueError, match="4 x 4 or 9 x 9"):
        sudoku_solved("1", [0] * 25)
    with pytest.raises(ValueError, match="no field 'puzzle'"):
        rewards.sudoku(prompts=["p"], completions=["1"])


def test_countdown():
    right = [
        "94*4 - 61 - 6",
        "94*4-61-6 = 309",
        "94*4=376,376-61=315,315-6=309",
        "(94*4)-(61+6)",
        "-6-61+94*4",
        "309 = 94*4-61-6",
        r"94 \times 4 - 61 - 6 = 309.0",
        r"$\left(94 \cdot 4\right) - [61 + 6]$",
        "**94 × 4 − 61 − 6**",
        "4(94) - 61 - 6",
        "1. 94*4 = 376\n2. 376 - 61 = 315\n3. 315 - 6 = 309",
    ]
    wrong = ["309", "94*4 - 61", "94*4-61-6=308", "94*4=376,376-61=315", "94*4=377,377-61=316,316-6=310",
             "94*4-61-6+0", "94*4-61-6; print(1)", "94**4", "94*4=376", "=309",
             "94*4-61 = 309+6", "94*4-61-6 = 309 = 300", "not 94*4-61-6",
             "94*4=376-61=315-6=309"]  # fmt: skip
    for answer in right:
        assert countdown_solved(answer, [6, 61, 94, 4], 309), answer
    for answer in wrong:
        assert not countdown_solved(answer, [6, 61, 94, 4], 309), answer
    assert countdown_solved(r"\frac{8}{3 - \frac{8}{3}}", [8, 3, 8, 3], 24)
    graded = {"numbers": [6, 61, 94, 4], "target": 309}
    texts = ["<answer>94*4-61-6</answer>", "<answer>94*4</answer>", "<think><answer>1</answer></think>309"]
    assert answers("countdown_graded", texts, **graded) == [1.0, 0.1, 0.0]
    assert countdown_solved("8/(3-8/3)", [8, 3, 8, 3], 24)  # exact: 23.999999 in floating point
    assert answers("countdown", ["94*4 - 61 - 6"], numbers=[6, 61, 94, 4], target=309) == [1.0]
    assert evaluate("1/0") is None and evaluate("f(1)") is None and evaluate("1e9") is None


def test_mathematics():
    gold = "She sells 9 eggs: 9 * 2 = <<9*2=18>>18.\n#### 18"
    assert answers("math", ["#### 18", "The answer is 18.", "\\boxed{18}", "$18.0"], answer=gold) == [1.0] * 4
    assert answers("math", ["\\boxed{36/2}"], answer=gold) == [0.0]  # a sum left undone
    assert answers("math", ["\\boxed{36/2}"], answer=gold, allow_expressions=True) == [1.0]
    assert answers("math", ["#### 19", "no idea", "", "<think>18"], answer=gold) == [0.0] * 4
    assert answers("math", ["0.5"], answer="\\frac{1}{2}") == [1.0]
    assert answers("math", ["#### 1200"], answer="#### 1,200") == [1.0]
    assert answers("math", ["4"], answer=None) == [None]


def test_format_and_code():
    texts = [
        "<think>a</think>b",
        "b",
        "<think></think>b",
        "<think>a</think>",
        "<think>a</think>b<think>c</think>",
    ]
    assert answers("format", texts) == [1.0, 0.0, 0.0, 0.0, 0.0]
    texts = [
        "<reasoning>a</reasoning>\n<answer>b</answer>",
        "<reasoning>a</reasoning>b",
        "<answer>b</answer>",
    ]
    assert answers("reasoning_format", texts) == [1.0, 0.0, 0.0]
    test = "def check(candidate):\n    assert candidate(2) == 4"
    good, bad = "def double(x):\n    return 2 * x", "def double(x):\n    return x"
    texts = [
        good,
        f"<think>x</think>Sure:\n```python\n{good}\n```\nor\n```\nprint(1)\n```",
        bad,
        "```python\n",
    ]
    assert answers("code", texts, test=test, entry_point="double") == [1.0, 1.0, 0.0, 0.0]
    assert answers("code", [good], test="assert double(1) == 2") == [1.0]


def test_reasoning_gym_gives_no_partial_credit():
    record = {"task": "countdown", "answer": "", "metadata": {"numbers": [6, 61, 94, 4], "target": 309}}
    assert answers("reasoning_gym", ["94*4 - 61 - 6", "309"], **record) == [1.0, 0.0]
    assert puzzle_solved("<think>4</think>94*4 - 61 - 6", record) == 1.0
    with pytest.raises(ValueError, match=r"record 7: no field \['metadata'\]"):
        puzzle_solved("1", {"id": 7, "task": "countdown", "answer": ""})
    with pytest.raises(ValueError, match="sudokku"):
        puzzle_solved("1", {**record, "task": "sudokku"})


def test_no_text_does_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards, "SECONDS", 0.5)
    columns = {"puzzle": PUZZLE, "answer": "#### 18", "numbers": [6, 61], "target": 67, "test": "assert 0"}
    columns |= {"solution": SOLVED, "task": "countdown", "metadata": {"numbers": [6, 61], "target": 67}}
    started = time.monotonic()
    for name in rewards.BUILT_IN.keys() - {"speed"}:  # which reads no text
        given = answers(name, ADVERSARIAL, **columns)
        # reasoning-gym's own score gives a few hundredths for any answer at all
        highest = 0.05 if name == "reasoning_gym_partial" else 0.0
        assert all(0.0 <= value <= highest for value in given), (name, given)
    assert time.monotonic() - started < 60
    assert not list(tmp_path.iterdir())


def lengths(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


async def later(prompts, completions, gold, **columns):
    return [None if text != right else 1.0 for text, right in zip(completions, gold, strict=True)]


def test_several_rewards_are_weighted_and_none_counts_for_nothing():
    records = [{"gold": "a", "prompt": "x"}, {"gold": "b", "prompt": "x"}]
    both = [Reward("lengths", lengths, 0.5), Reward("later", later, 2.0)]
    totals, table = compute_rewards(both, ["x", "x"], ["a", "ccc"], records)
    np.testing.assert_allclose(totals, [2.5, 1.5])
    assert table["later"][0] == 1.0 and math.isnan(table["later"][1])
    totals, _ = compute_rewards(both[1:], ["x", "x"], ["c", "b"], records)
    assert math.isnan(totals[0]) and totals[1] == 2.0


def test_rewards_are_loaded_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def one(prompts, completions, **columns):\n    return [1.0] * len(completions)\n")
    loaded = load_rewards(
        ["sudoku", f"{file}:one", "json:dumps", "judge"], [1, 2, 3, 4], own={"judge": lengths}
    )
    assert [(r.name, r.weight) for r in loaded] == [("sudoku", 1), ("one", 2), ("dumps", 3), ("judge", 4)]
    assert loaded[2].function is json.dumps
    for name, reason in (
        ("sudokku", "use reasoning_gym"),
        ("judge", "--judge_model"),
        ("no.module:f", "cannot"),
        (f"{file}:two", "cannot"),
        (f"{tmp_path}/none.py:f", "cannot"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_rewards([name])
    with pytest.raises(ValueError, match="one for each"):
        load_rewards(["sudoku"], [1, 2])


def test_a_reward_that_misbehaves_is_named():
    def short(prompts, completions, **columns):
        return [1.0]

    def endless(prompts, completions, **columns):
        return [math.inf] * len(completions)

    def picky(prompts, completions, **columns):
        return [1.0 / len(text) for text in completions]

    def jealous(prompts, completions, **columns):
        return [1.0, 2.0] if len(set(completions)) == 1 else [].pop()

    texts = ["a", ""]
    for function, reason in (
        (short, "gave 1 values for 2 completions"),
        (endless, r"gave an infinite value \(f.jsonl:1\)"),
        (picky, r"ZeroDivisionError: float division by zero \(f.jsonl:2\)"),
        (jealous, "IndexError: pop from empty list"),
    ):
        with pytest.raises(ValueError, match=f"--reward_funcs {function.__name__}: {reason}"):
            records, where = [{}, {}], ["f.jsonl:1", "f.jsonl:2"]
            compute_rewards([Reward(function.__name__, function)], ["p"] * 2, texts, records, where=where)
    with pytest.raises(ValueError, match=r"--reward_funcs later.*'gold'.*fields are \['answer'\]"):
        compute_rewards([Reward("later", later)], ["p"], ["a"], [{"answer": "1"}])


def test_records_that_cannot_be_scored_are_refused_at_start():
    flags = RewardFlags(reward_funcs=["math", "format"])
    prompts = [
        Prompt(n, [1], {"answer": gold}, where=f"f.jsonl:{n}") for n, gold in enumerate(("1", "x^2", 5))
    ]
    flags.check_records(prompts)
    prompts.append(Prompt(3, [1], {"answer": r"\frac{1}{"}, where="f.jsonl:3"))
    with pytest.raises(
        ValueError, match=r"--reward_funcs math: 'answer' '.*frac.*' is no number.*\(f.jsonl:3\)"
    ):
        flags.check_records(prompts)
    with pytest.raises(ValueError, match=r"--reward_funcs sudoku: the records have no field 'puzzle'"):
        RewardFlags(reward_funcs=["sudoku"]).check_records(prompts)
    boards = [Prompt(0, [1], {"puzzle": "1" * 25}, where="f.jsonl:1")]
    with pytest.raises(ValueError, match=r"--reward_funcs sudoku: a sudoku has 4 x 4 or .*25 \(f.jsonl:1\)"):
        RewardFlags(reward_funcs=["sudoku"]).check_records(boards)


def test_sums_left_undone_are_answers_where_a_flag_says_so():
    for flags, expected in (({}, 0.0), ({"math_allow_expressions": True}, 1.0)):
        rewards = RewardFlags(reward_funcs=["math"], **flags).load_rewards()
        totals, _ = compute_rewards(rewards, ["q"], ["9 * 2"], [{"answer": "18"}])
        assert totals.tolist() == [expected]


def test_a_thought_that_the_template_opened_is_no_answer(model_dir):
    """Qwen3-Thinking and R1 templates end the prompt in <think>: a completion begins inside it."""
    model, tokenizer = load_for_inference(str(model_dir), chat=False, device="cpu")
    seen = []

    def note(prompts, completions, was_cut, **columns):
        seen.append((completions, was_cut))
        return [0.0] * len(completions)

    prompts = [Prompt(n, tokenizer("Say" + end)["input_ids"], {}) for n, end in enumerate(("", "<think>\n"))]
    settings = LLaDAGenerationConfig(gen_length=4, temperature=1.0)
    sampler = Sampler(model, tokenizer, [Reward("note", note)], settings, 8, chat=False)
    texts = [completion.text for completion in sampler.answer(prompts, seed=0, num_generations=1)]
    ((completions, was_cut),) = seen
    assert completions == [texts[0], "<think>" + texts[1]] and len(was_cut) == 2
