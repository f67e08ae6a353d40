"""Answers that a careful reader accepts are right, and near misses are wrong, in every dress."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.data.final_answer import final_answer
from llada.rewards.functions import BUILT_IN
from llada.rewards.mathematics import Number, compare, gold_answer, is_comparable, number, same_value

# Golden answers of MATH and GSM8K and what else is written for them.
RIGHT = {
    "18": [
        "18", "$18", "18.0", "18.00 dollars", "x = 18", "eighteen", "18 dollars", r"\$18",
        r"18\text{ minutes}", "+18", "018", "The answer is 18. Let me know if you have questions!",
        "So Janet makes $18 every day.", r"9 \times 2 = 18",
        r"Thus, she makes \(9 \times 2 = 18\) dollars per day.", "18 square feet", "18cm", "18 cm^2",
        "18°", r"18\%", "**18** eggs", r"1.8 \times 10^1", "18 miles per hour", "18 miles/hour",
        "Total: 18", "<answer>18 eggs</answer>", r"\boxed{18 \text{ eggs}}", r"\boxed{x=18}",
        r"$\boxed{18}$", r"$$\boxed{18}$$", r"\fbox{18}", r"\boxed{\$18}", r"\boxed{18",
        "Final Answer: 18", "The final answer is **18**.", "18 (eighteen)", "  18\n", "Answer: $18",
        r"\(18\)", "18 kg", "18th", "Janet makes 18 dollars.", "#### 18", "The answer is: 18",
        r"The answer is \(\boxed{18}\).", "```\n18\n```", "```latex\n18\n```", "<answer>\n18\n</answer>",
        "=18", "= 18"
    ],
    r"\frac{1}{2}": [
        "1/2", "0.5", ".5", r"\frac12", r"\dfrac{1}{2}", "50%", r"\frac{2}{4}", "2/4", r"\tfrac{1}{2}",
        r"\frac {1} {2}"
    ],
    r"\$36": [
        "36", "$36", "36 dollars", r"\$36.00", "36 USD", "36.00"
    ],
    r"36^\circ": [
        "36", "36°", "36 degrees", r"36^{\circ}", r"36\degree", r"\angle A = 36^\circ"
    ],
    "2516_8": [
        "2516_8", "2516_{8}", "2516"
    ],
    "(2,4)": [
        "(2, 4)", r"\left(2,4\right)", "(2.0,4)", r"(2,\frac{8}{2})"
    ],
    r"(-\infty, 2) \cup (3, \infty)": [
        r"(-\infty,2)\cup(3,\infty)", r"\left(-\infty, 2\right) \cup \left(3, \infty\right)",
        r"(3, \infty) \cup (-\infty, 2)"
    ],
    r"x \in [-2,7]": [
        "[-2,7]", r"x\in[-2,7]", r"-2 \le x \le 7", r"-2 \leq x \leq 7"
    ],
    r"\begin{pmatrix} -18 \\ -49 \\ 96 \end{pmatrix}": [
        r"\begin{bmatrix} -18 \\ -49 \\ 96 \end{bmatrix}", r"\begin{pmatrix}-18\\-49\\96\end{pmatrix}"
    ],
    r"\sqrt{3}": [
        r"\sqrt3", "3^{1/2}", r"\sqrt{3}"
    ],
    r"2\sqrt{5}": [
        r"\sqrt{20}", r"2 \sqrt{5}", r"2\sqrt5"
    ],
    r"12\pi": [
        r"12 \pi", r"12\cdot\pi", r"12*\pi"
    ],
    r"\text{Evelyn}": [
        "Evelyn", "evelyn", "**Evelyn**", r"\boxed{\text{Evelyn}}", "The answer is Evelyn."
    ],
    r"\text{(B)}": [
        "B", "(B)", r"\text{B}"
    ],
    "3, 5, 7": [
        "3,5,7", "7, 5, 3", "3, 5, 7"
    ],
    "15x - 80": [
        "15x-80", "-80+15x", "5(3x-16)", "15*x - 80"
    ],
    "x=5": [
        "5", "x = 5"
    ],
    r"1 \pm \sqrt{19}": [
        r"1\pm\sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"
    ],
    "y = 2x + 3": [
        "2x+3", "y=3+2x"
    ],
    "58,500": [
        "58500", "58,500", r"\$58,500", "58{,}500"
    ],
    r"137 \frac{1}{2}": [
        "137.5", r"\frac{275}{2}", "137 1/2", "275/2"
    ],
    r"1\frac{4}{5}": [
        "1.8", "9/5", r"\frac{9}{5}"
    ],
    r"11,\! 111,\! 111,\! 100": [
        "11111111100", "11,111,111,100"
    ],
    r"15\mbox{ cm}^2": [
        "15", "15 cm^2", r"15\text{ cm}^2", "15 square centimeters"
    ],
    r"864 \mbox{ inches}^2": [
        "864", "864 square inches", "864 in^2"
    ],
    r"\frac{270}7\text{ degrees}": [
        r"\frac{270}{7}", "270/7", r"\frac{270}{7}^\circ"
    ],
    r"5.4 \text{ cents}": [
        "5.4", "5.4 cents"
    ],
    ".35625": [
        "0.35625"
    ],
    ".0000672": [
        "0.0000672", r"6.72 \times 10^{-5}", "6.72e-5"
    ],
    r"60\%": [
        "60", "60%", "0.6", "60 percent", r"\frac{3}{5}"
    ],
    "6 - 5i": [
        "6-5i", "-5i+6"
    ],
    r"\cot x": [
        r"\cot(x)", r"\frac{\cos x}{\sin x}"
    ],
    "42": [
        "forty-two", "forty two"
    ],
    "200": [
        "two hundred", "two hundred dollars"
    ],
    "1500": [
        "1.5 thousand", "one thousand five hundred", "1,500"
    ],
}  # fmt: skip
RIGHT |= {
    r"10,\!080": [r"10\,080", "10080", "10,080", "10{,}080", "10080.0"],
    r"2 \text{ and } 3": ["2 and 3", r"2\text{ and }3"],
    r"(-\infty, 0]": [r"(-\infty,0]", r"x \le 0"],
    r"\frac{\sqrt{2}}{2}": [r"\frac{\sqrt2}2", r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}"],
    "no solution": ["No solution.", r"\text{no solution}"],
}
WRONG = {
    "18": [
        "-18", "18.5", "180", "118", "1 8", "0.18", "18e2", "18 or 19", "18, 19", "not 18", "about 18",
        "approximately 18", "18 > 17", "x > 18", "18-19", "18:00", "18/2", "18^2", "18!", "(18", "2*9",
        r"9 \times 2", r"\frac{36}{2}", "36/2", "18x", "I am not sure, maybe 18?", "between 17 and 18",
        "18.0.0", "eighteen hundred", "18 + 0", "18 thousand", "18 million", "18 and a half",
        "18 percent of 100 is not it", "18 out of 20", "Step 18", "The answer is not 18.",
        "The answer is 18 or 19.", r"\boxed{18x}", r"\boxed{18 or 19}", r"\boxed{19}",
        "\\boxed{18}\n\\boxed{20}", "<answer>18</answer><answer>20</answer>", "<think>18",
        "<think>18</think>", r"<think>\boxed{18}</think>20", "18\n20", "18 apples and 3 pears",
        "x = 18, y = 2", r"\boxed{\frac{18", "She has 18 apples and eats 3.", "18 < 20", r"\sqrt{324}",
        "10+8", "six times three", "3 hours and 18 minutes", "18 half", "18_9", "18.01", "17.999999",
        r"\boxed{18 and so on, as we said before", "18i", "18, 18.5", r"\{18, 19\}", "(18, 19)",
        "[18, 19]", r"18 \pm 1", r"18\pi", r"\pm 18", "|18|x", "18th of 20", "At least 18",
        "more than 18", "18 less 2", "twice 18", "less than 18", "18 times", "no 18", "", " ", "####",
        "#### 1 8", "2x = 18", "x + 2 = 18", r"6 \times r = 18", "So 2x = 18.",
        "So x = 3, y = 18 and z = 4", "f(18)", "18 = 2x", "P(x) = 18x", "Question 18", "I guess 18",
        "It could be 18.", "18 is wrong", "18 or more", "about $18", "18 - 2", "It is not 18.",
        "There are 18 boys and 3 girls.", "<answer>18 or 19</answer>", "The answer is 18 and 19.",
        r"\boxed{18, 19}", "answer: 18 to 20", "18 ÷ 1", "18:1", "1.8", "0x18"
    ],
    r"\frac{1}{2}": [
        r"\frac{2}{1}", "1/3", "0.05", "1 2", r"\frac12 x", r"-\frac{1}{2}", "1/2/2", "1 1/2",
        r"\frac{1}{2", "1-1/2", "0.5000001", r"\frac{1}{20}"
    ],
    r"\$36": [
        "36 cents", "36%", "$360", "36°", "€36", "-$36"
    ],
    r"36^\circ": [
        "36%", r"\$36", r"63^\circ", "36^2", r"144^\circ"
    ],
    "2516_8": [
        "2516_9", "1358", "2517_8", "2516_{10}", "0.2516_8"
    ],
    "(2,4)": [
        "[2,4]", "(4,2)", "(2,4]", r"\{2,4\}", "(2,5)", "(2,4,0)", "2", "6"
    ],
    "(3,4]": [
        "(3,4)", "[3,4]", "3,4", "(4,3]"
    ],
    r"(-\infty, 2) \cup (3, \infty)": [
        r"(-\infty, 2] \cup (3, \infty)", r"(-\infty, 3) \cup (2, \infty)", r"(-\infty, 2)",
        r"\mathbb{R}"
    ],
    r"\begin{pmatrix} -18 \\ -49 \\ 96 \end{pmatrix}": [
        r"\begin{pmatrix} -18 \\ -49 \\ 95 \end{pmatrix}",
        r"\begin{pmatrix} -18 & -49 & 96 \end{pmatrix}", "96"
    ],
    r"\sqrt{3}": [
        "1.7320508", "3", r"\sqrt{2}", r"-\sqrt{3}", "1.73", r"\sqrt[3]{3}", r"\sqrt{3}x"
    ],
    r"12\pi": [
        "37.69911184307752", "12", r"\pi", r"12\pi^2", r"6\pi"
    ],
    r"\pi": [
        "3.1415927", "3.14", r"\frac{22}{7}"
    ],
    r"\text{Evelyn}": [
        "Eve", "Navin", "Evelyn or Navin", "not Evelyn"
    ],
    r"\text{(B)}": [
        "(C)", "A", "b or c", "(B) or (C)"
    ],
    "3, 5, 7": [
        "3, 5", "3,5,8", "357", "3 5"
    ],
    "15x - 80": [
        "15x + 80", "15y - 80", "15x", "-80", "80 - 15x"
    ],
    "x=5": [
        "y=5", "x=6", "x>5", "5x"
    ],
    r"1 \pm \sqrt{19}": [
        r"1+\sqrt{19}", r"1-\sqrt{19}", r"\pm\sqrt{19}"
    ],
    "6 - 5i": [
        "6+5i", "5-6i", "6"
    ],
    "5x - 7y + 11z + 4 = 0": [
        "5x - 7y + 11z + 5 = 0", "5x - 7y + 11z + 4", "5x-7y"
    ],
    "y = 2x + 3": [
        "y=2x-3", "x=2y+3", "3"
    ],
    "even": [
        "odd", "not even", "eve"
    ],
    "58,500": [
        "58.5", "58,50", "585,00", "5850", "58 500 or so"
    ],
    r"137 \frac{1}{2}": [
        "137", "1371/2", r"\frac{137}{2}", r"137 \frac{1}{3}"
    ],
    r"11,\! 111,\! 111,\! 100": [
        "11,111,111,101", "11"
    ],
    r"60\%": [
        "6%", r"60\$", "0.06"
    ],
}  # fmt: skip
WRONG |= {
    "1,234": ["1.234", "12,34", "1234.5", "1 234 or so", "234"],
    r"\frac{3}{4}": [r"\frac{4}{3}", "0.74", "3:4", "34"],
    r"2 \text{ and } 3": ["2 or 3", "2", "5"],
    r"(-\infty, 0]": [r"x < 0", r"[0, \infty)", "0"],
    "18.5": ["18 dollars and 5 cents", "18 and a half", "18", "19"],
}
DRESSES = [
    "{}", "${}$", r"\boxed{{{}}}", "**{}**", "```\n{}\n```", "The answer is {}.", "<answer>{}</answer>",
    "<think>perhaps \\boxed{{9}}</think>\n{}", r"\({}\)", r"\[{}\]", "**Answer:** {}", "#### {}", "`{}`",
    "So the final answer is $\\boxed{{{}}}$.",
    "<reasoning>7 + 2</reasoning>\n<answer>\n\\boxed{{{}}}\n</answer>",
]  # fmt: skip


def is_right(completion, gold, **options):
    """`math`, in this process."""
    found = compare(final_answer(completion), gold, **options)
    return same_value(final_answer(completion), gold) if found is None else found


@pytest.mark.parametrize("gold", RIGHT)
def test_what_a_reader_accepts_is_right(gold):
    assert [text for text in RIGHT[gold] if not is_right(text, gold)] == []


@pytest.mark.parametrize("gold", WRONG)
def test_near_misses_are_wrong(gold):
    assert [text for text in WRONG[gold] if is_right(text, gold)] == []


@pytest.mark.parametrize("gold", sorted(RIGHT.keys() | WRONG.keys()))
def test_the_golden_answer_is_right_in_every_dress(gold):
    assert is_comparable(gold)
    assert [dress for dress in DRESSES if not is_right(dress.format(gold), gold)] == []


def test_the_reward_is_the_same():
    golds = [
        "18",
        r"2\sqrt{5}",
        r"\text{Evelyn}",
        "She sells 9.\n#### 18",
        r"So it is $\boxed{\frac{1}{2}}$.",
    ]
    texts = [r"\boxed{18}", r"$\sqrt{20}$", "The answer is Evelyn.", "18 eggs", "50%"]
    assert BUILT_IN["math"](prompts=[""] * 5, completions=texts, answer=golds) == [1.0] * 5
    assert BUILT_IN["math"](prompts=[""] * 5, completions=texts, answer=[*golds[1:], golds[0]]) == [0.0] * 5
    assert BUILT_IN["math"](prompts=[""], completions=["18.0"], answer=[18]) == [1.0]
    cut = {"prompts": ["", ""], "completions": [r"\boxed{18", r"\boxed{18"], "answer": ["18", "18"]}
    assert BUILT_IN["math"](**cut) == [1.0, 1.0]


def test_expressions_count_only_where_they_are_allowed():
    for text in ("36/2", r"9 \times 2", r"\sqrt{324}", "10 + 8"):
        assert not is_right(text, "18")
        assert is_right(text, "18", allow_expressions=True)
    assert not is_right("36/3", "18", allow_expressions=True)


def test_golden_answers_that_cannot_be_compared_with():
    assert [
        gold for gold in ("", " ", "#### ", r"\frac{1}{", "???", r"\boxed{}", "2 +") if is_comparable(gold)
    ] == []
    assert gold_answer("9 * 2 = <<9*2=18>>18.\n#### 1,018") == "1,018"
    assert gold_answer(r"We get $\boxed{\frac{3}{4}}$ at last.") == r"\frac{3}{4}"


def test_numbers():
    assert number("-$1,234.50") == Number(Fraction("-1234.5"), "$")
    assert number(r"-1\frac{4}{5}\text{ cm}^2") == Number(Fraction(-9, 5), "cm ^2")
    assert number("two million three hundred thousand and twenty-one dollars") == Number(
        Fraction(2300021), "$"
    )
    assert number("6.02e23").value == Fraction("6.02e23")
    assert number(r"x = 9 \times 2 = 18").value == 18
    assert [
        text for text in ("", "x", "1/0", "1,23", "1.2.3", "5 - 3", "9" * 300, "2x = 18") if number(text)
    ] == []


NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9).map(lambda n: (Fraction(n), [str(n), f"{n:,}", f"{n}.0", f"x = {n}"])),
    st.decimals(-(10**6), 10**6, places=3).map(lambda d: (Fraction(d), [str(d), f"{d:,}", f"{d}0"])),
    st.fractions(-1000, 1000, max_denominator=50).filter(lambda f: f.denominator > 1).map(
        lambda f: (f, [f"{f}", rf"{'-' * (f < 0)}\frac{{{abs(f.numerator)}}}{{{f.denominator}}}"])
    ),
)  # fmt: skip
UNITS = ["", " dollars", "%", r"\%", r"\text{ minutes}", " square feet", r"^\circ"]


@given(NUMBERS, st.sampled_from(DRESSES), st.sampled_from(UNITS), st.data())
@settings(max_examples=300, deadline=None)
def test_any_number_is_itself_and_no_other(written, dress, unit, data):
    value, spellings = written
    gold, text = data.draw(st.sampled_from(spellings)), data.draw(st.sampled_from(spellings))
    assert is_right(dress.format(text + unit), gold)
    other = data.draw(NUMBERS.filter(lambda other: other[0] not in (value, 100 * value)))
    assert not is_right(dress.format(other[1][0] + unit), gold)


TERMS = st.sampled_from(["x", "y^2", r"\sqrt{2}", r"\pi", "n", r"\frac{a}{b}"])


@given(
    st.lists(
        st.tuples(st.integers(1, 9), TERMS, st.sampled_from("+-")),
        min_size=1,
        max_size=3,
        unique_by=lambda t: t[1],
    )
)
@settings(max_examples=15, deadline=None)
def test_any_expression_is_itself_in_any_order_and_no_other(terms):
    def written(terms):
        return " ".join(f"{sign} {factor}{term}" for factor, term, sign in terms).removeprefix("+ ")

    gold = written(terms)
    for dress in DRESSES:
        assert is_right(dress.format(gold), gold)
    assert is_right(written(terms[::-1]), gold)
    (factor, term, sign), *others = terms
    assert not is_right(written([(factor + 1, term, sign), *others]), gold)
    assert not is_right(written([(factor, term, "-+"[sign == "-"]), *others]), gold)


@given(
    st.lists(st.tuples(st.integers(1, 99), st.sampled_from("+-*")), min_size=2, max_size=4),
    st.sampled_from(DRESSES),
)
@settings(max_examples=100, deadline=None)
def test_any_countdown_is_solved_by_the_sum_that_made_it(parts, dress):
    numbers = [n for n, _ in parts]
    text = "".join(f"{sign}{n}" for n, sign in parts)[1:]
    target = eval(text)

    def solved(text, target):
        columns = {"numbers": [numbers], "target": [target]}
        return BUILT_IN["countdown"](prompts=[""], completions=[dress.format(text)], **columns) == [1.0]

    assert solved(text, target) and solved(text.replace("*", r" \times "), target)
    assert solved(f"{text} = {target}", target) and not solved(f"{text} = {target + 1}", target)
    assert not solved(text, target + 1) and not solved(f"{text}+0", target)
    assert not solved(text.replace(str(numbers[0]), str(numbers[0] + 1), 1), target)
