"""Where the answer stands: thoughts, boxes, tags, sentences, fences, and dress."""

import time

import pytest

from llada.data.final_answer import code_blocks, final_answer, opens_thought, undressed, without_thoughts


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>\n4", "4"),
        ("\n <think>a</think>\n\n4\n", "4\n"),
        ("a</think> 4", "4"),  # the template has opened it
        ("<think>a<think>b</think>c</think>4", "4"),
        ("<think>a</think>x<think>b</think>y", "xy"),
        ("4<think>never ends", "4"),
        ("<think>never ends", ""),
        ("  no thought", "  no thought"),
    ],
)
def test_thoughts_are_taken_off(text, answer):
    assert without_thoughts(text) == answer


def test_a_text_can_begin_inside_a_thought():
    assert opens_thought("<|assistant|>\n<think>\n") and not opens_thought("<think>\n\n</think>\n\n")
    assert without_thoughts("so 4</think>\n5", starts_inside=True) == "5"
    assert without_thoughts("so it is 4", starts_inside=True) == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>the <answer>1</answer>?</think><answer>2</answer><answer> 3 </answer>!", "3"),
        (r"\boxed{3} or \boxed{4}", "4"),
        (r"\boxed{} \boxed{2} \boxed{...}", "2"),
        (r"<answer>5</answer> \boxed{4}", "4"),
        ("<answer>7</answer> <answer></answer>", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{ 1, \{2\} \right.}", r"\left\{ 1, \{2\} \right."),
        (r"\boxed{a = \boxed{1}}", "1"),
        (r"\fbox{4}", "4"),
        ("<answer>boxed{4}</answer>", "4"),
        ("<answer>\n\\boxed{62\n</answer>", "62"),  # its content ends with the tag
        ("<answer>\\boxed{}101</answer>", "101"),
        ("<answer>145</answer}", "145"),
        ("<answer>\n42", "42"),
        ("The answer is: 3. No, the answer is 4.\n\nI hope this helps!", "4"),
        ("**Answer:** 18", "18"),
        ("**The answer is 18.**", "18"),
        ("The answer is\n1 2\n3 4\nas asked", "1 2\n3 4"),
        ("4 * 2 = 8\n#### 8", "8"),
        ("#### Step 1\nIt is 7", "#### Step 1\nIt is 7"),  # a heading
        ("Here:\n```\n1 2\n```\nand\n```text\n3 4\n```\nDone.", "3 4"),
        ("```python\nx = 1\n```\nIt is 4", "```python\nx = 1\n```\nIt is 4"),  # a program is no answer
        ("<reasoning>3 apples</reasoning>\n4", "4"),
        ("$\\text{Evelyn}$.", "Evelyn"),
        ("$1$ and $2$", "$1$ and $2$"),
        ("**1** or **2**", "**1** or **2**"),
        ("94**4", "94**4"),
        ("$18", "$18"),
        ("wait ...", "wait ..."),
        ("", ""),
    ],
)
def test_the_answer_is_found(text, answer):
    assert final_answer(text) == answer


def test_a_box_without_its_brace_counts_only_where_the_text_was_cut():
    text = r"So \boxed{120\text{ minutes}"
    assert final_answer(text) == final_answer(text, was_cut=True) == r"120\text{ minutes}"
    assert final_answer(text, was_cut=False) == text
    assert final_answer(r"\boxed{7} then \boxed{\frac{1}{2") == "7"  # an open fraction is not complete
    assert final_answer(r"\boxed{18 and so on</answer>", was_cut=True) == r"18 and so on"
    assert final_answer("\\boxed{18\nand then more") == "18\nand then more"


def test_programs_in_fences():
    text = "```python\nx = 1\n```\n```\ny\n```\n```bash\nls\n```\n```py\nz"
    assert code_blocks(text) == ["x = 1\n", "y\n", "z"]


def test_dress_in_dress():
    assert undressed(r"**$\boxed{\text{(B)}}$**.") == "(B)"
    assert undressed("```\n18\n```") == "18"


HOSTILE = [
    "<think>",
    "</think>",
    r"\boxed{",
    "{",
    "}",
    "$",
    "**",
    "<answer>",
    "answer is ",
    "#### ",
    "#### \n",
    "\\",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_takes_long(text):
    started = time.monotonic()
    for hostile in (text * 10_000, r"\text{" * 3000 + text * 3000 + "}" * 3000):
        final_answer(hostile)
    assert time.monotonic() - started < 2
