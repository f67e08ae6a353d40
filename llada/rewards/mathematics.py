"""Whether an answer is the golden one: as text, as a number, or as mathematics.

A careful reader takes "$18", "18.00 dollars", "x = 18" and "eighteen" for 18, and takes "18 or 19", "2 * 9",
"about 18" and "18x" for none. Text and numbers are compared here, exactly. What is more than a number is
math-verify's business; it may hang on a text, so `same_value` is only called in a
`llada.rewards.sandbox.ConfinedModule`.
"""

import re
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

from llada.data.final_answer import final_answer, is_balanced, plain, undressed

MAX_CHARACTERS, MAX_NUMBER = 4000, 200  # a longer answer, a longer number is wrong

# 1,234 and 12.5 and .5; in 1,23 the comma parts two numbers
_N = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_FORMS = [re.compile(form) for form in (
    rf"(?P<whole>{_N})?\s*\\frac\s*\{{\s*(?P<top>-?(?:{_N}))\s*\}}\s*\{{\s*(?P<bottom>{_N})\s*\}}",
    rf"(?:(?P<whole>\d+)\s+)?(?P<top>{_N})\s*/\s*(?P<bottom>{_N})",
    rf"(?P<whole>{_N})(?:\s*[*x]\s*10\s*\^\s*\{{?|[eE])(?P<power>[-+]?\d{{1,2}})\}}?",
    rf"(?P<whole>{_N})",
)]  # fmt: skip
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SHORT = "mm|cm|km|kg|mg|ml|mL|hrs?|min|ft|in|lbs?|oz|mph|kph|kW|am|pm|m|g|l|L|h|s|°[CF]"
_WORD = rf"(?:[A-Za-z][A-Za-z'’.-]+|(?:{_SHORT})(?![A-Za-z]))(?:\s*\^\s*[23]|[²³])?"
_BEHIND = re.compile(  # what may stand behind a number and still leaves it that number
    rf"(?:st|nd|rd|th)?(?:\s*(?P<scale>{'|'.join(_SCALES)})\b)?\s*(?P<symbol>[%°$€£¢]?)"
    rf"(?P<words>(?:(?:\s*(?:{_SHORT})(?![A-Za-z])(?:\s*\^\s*[23]|[²³])?|\s+{_WORD})(?:\s*[\s/]\s*{_WORD})*)?)"
    r"(?:\s*\([A-Za-z .°%-]+\))?\s*"
)
_SYMBOLS = {"dollar": "$", "dollars": "$", "usd": "$", "cents": "¢", "cent": "¢", "euro": "€", "euros": "€"}

# Words with which a text says something else than its number: "not 18", "18 or 19", "about 18", "step 18".
_OTHERWISE = re.compile(
    r"n't\b|\?|\b(?:not|no|never|x?or|and|nor|n?either|between|than|to|from|but|if|unless|except|without|about|"
    r"approx\w*|around|roughly|nearly|almost|least|most|up|maybe|perhaps|possibly|probably|might|may|could|should|"
    r"would|guess|think|believe|unsure|wrong|incorrect|instead|minus|plus|times|twice|double|triple|over|out|point|half|halves|"
    r"thirds?|quarters?|\w+ths|squared|cubed|factorial|negative|step|question|problem|example|equation|figure|part|"
    r"case|mod)\b",
    re.IGNORECASE,
)
_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
         "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
         "nineteen"]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_NUMBER_WORDS = {word: n for n, word in enumerate(_ONES)} | {w: 10 * n for n, w in enumerate(_TENS, start=2)}


class Number(NamedTuple):
    """A number that somebody wrote down: its exact value, its unit, whether it is a division left undone."""

    value: Fraction
    unit: str = ""
    is_division: bool = False


def canonical(text: str) -> str:
    """What all spellings of one answer have in common: no dress, no spaces but between words."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain(undressed(text)).rstrip("."))
    # letters have their case where they are variables; a word has not
    text = re.sub(r"(?<!\\)[A-Za-z]{2,}", lambda word: word[0].lower(), text)
    return re.sub(r"\s(?!\w)|(?<!\w)\s", "", text)


def number(text: str) -> Number | None:
    """The number that a text is; None for a text that is another thing, or says more.

    Signs, thousands separators, decimals, fractions, mixed numbers, powers of ten, percent, money, a unit
    behind the number, number words, and what stands behind the last "=" are read.
    """
    text = plain(undressed(text))
    if len(text) > MAX_NUMBER:
        return None
    if (behind := _behind_equals(text)) != text:
        text = plain(undressed(behind))
    sign, money, sign_behind, text = re.fullmatch(r"([-+]?)\s*([$€£]?)\s*(-?)\s*(.*)", text).groups()
    for form in _FORMS:
        if (match := form.match(text)) and (behind := _BEHIND.fullmatch(text, match.end())):
            break
    else:
        match, behind = None, None
    if match is None:
        value, behind = _from_words(text)  # "eighteen"
        is_division = False
    else:
        value, is_division = _value(match.groupdict())
    if value is None or behind is None or _OTHERWISE.search(behind["words"]):
        return None
    value *= _SCALES.get(behind["scale"], 1) * (-1 if (sign + sign_behind).count("-") == 1 else 1)
    words = behind["words"].strip()
    return Number(value, money or behind["symbol"] or _SYMBOLS.get(words.lower(), words), is_division)


def _behind_equals(text: str) -> str:
    """What stands behind the last "=" of `x = 9 * 2 = 18`; all of an equation that has yet to be solved."""
    before, equals, behind = text.rpartition("=")
    unsolved = r"\d\s*\*?\s*[A-Za-z]\b|\b[A-Za-z]\s*[-+*/^]|[-+*/^]\s*[A-Za-z]\b|[≤≥<>≠]|\\ne"
    several = r"=[^=]*(?:[,;]|\band\b|\bor\b)[^=]*="
    if re.search(unsolved, before) or re.search(several, text):
        return text
    return behind if equals else text


def _value(parts: dict[str, str | None]) -> tuple[Fraction | None, bool]:
    """(value, whether it is a whole number written as a division) of the parts of a form."""
    whole, top, bottom, power = (
        # "1,234." is a number at the end of a sentence
        None if parts.get(name) is None else Fraction(parts[name].replace(",", "").rstrip("."))
        for name in ("whole", "top", "bottom", "power")
    )
    if power is not None:
        return whole * Fraction(10) ** int(power), False
    if bottom is None:
        return whole, False
    if bottom == 0:
        return None, False
    return (whole or 0) + top / bottom, (top / bottom).denominator == 1


def _from_words(text: str) -> tuple[Fraction | None, re.Match | None]:
    """(value, what stands behind) of "twenty-one" and "two hundred dollars"."""
    total, part, end = 0, 0, None
    for word in re.finditer(r"([A-Za-z]+)(?:[\s-]+|$)", text):
        name = word[1].lower()
        if name in _NUMBER_WORDS:
            part += _NUMBER_WORDS[name]
        elif name in _SCALES and end:
            part *= _SCALES[name]
            if name != "hundred":
                total, part = total + part, 0
        elif name != "and" or end is None:
            break
        end = word.end(1)
    if end is None:
        return None, None
    return Fraction(total + part), _BEHIND.fullmatch(text, end)


def told(text: str) -> Number | None:
    """The only number of a text's last sentence, "So she makes $18 a day."; None where it is not so plain."""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    sentence = re.split(r"(?<=[.!?:])\s+(?=\S)", last.strip())[-1]
    sentence = plain(re.sub(r"\\[()\[\]]|(?<!\\)\$(?!\s?[\d.])|\*\*|`", " ", sentence))
    behind = _behind_equals(sentence)
    # digits that touch a letter or an operator are no number of their own
    found = re.findall(r"(?<![\w.^_*/+({-])-?[$€£]?\s?(?:" + _N + r")%?(?!\.?[\w^_*/+({<>!-])", behind)
    if len(found) != 1 or len(re.findall(r"\d+(?:[.,]\d+)*", behind)) != 1:
        return None
    if _OTHERWISE.search(sentence) or re.search(r"[=<>≤≥≠≈|^_*/+{}\\]", behind):
        return None
    return number(found[0])


def gold_answer(gold: str) -> str:
    """The golden answer in GSM8K's text with `####`, or a solution with a box; else all of the text."""
    if "####" in gold:
        return gold.rpartition("####")[2].strip()
    return final_answer(gold) if "boxed{" in gold else gold.strip()


def equal_numbers(given: Number, gold: Number) -> bool:
    """Whether two numbers are one answer. 60 % is 60, where percent are asked for, and 0.6."""
    # Of these units one is never another; what others are called is up to the question.
    units = {given.unit, gold.unit} & {"$", "€", "£", "¢", "%", "°"}
    if len(units) > 1:
        return False
    if given.value == gold.value:
        return gold.is_division or not given.is_division
    percent, other = (given, gold) if given.unit == "%" else (gold, given)
    return units == {"%"} and not other.unit and percent.value / 100 == other.value


def compare(answer: str, gold: str, *, allow_expressions: bool = False) -> bool | None:
    """Whether an answer is the golden one, as far as text and numbers tell; None: ask `same_value`.

    `allow_expressions`: 2 * 9 is an answer where 18 is asked for.
    """
    if len(answer) > MAX_CHARACTERS or not answer.strip():
        return False
    gold = gold_answer(gold)
    if canonical(answer) == canonical(gold):
        return True
    # `y = 18` is no answer where `x = 18` is
    names = [re.match(r"\s*([A-Za-z])\s*=", plain(undressed(text))) for text in (answer, gold)]
    if all(names) and names[0][1] != names[1][1]:
        return False
    # a golden number is compared as one: math-verify would take 2 * 9 for 18
    if (expected := number(gold)) is None:
        return None
    if (given := number(answer) or told(answer)) is None:
        return None if allow_expressions else False
    return equal_numbers(given._replace(is_division=given.is_division and not allow_expressions), expected)


def is_text(gold: str) -> bool:
    """Whether a golden answer is a word or a few, or a choice such as (B)."""
    return re.fullmatch(r"\(?[A-Za-z][\w'’.)-]*(?:,? [\w'’.()-]+){0,4}", plain(undressed(gold))) is not None


def is_comparable(gold: str) -> bool:
    """Whether an answer can be compared with a golden one: a number, mathematics, or a few words."""
    gold = plain(gold_answer(gold))
    num_words = len(re.findall(r"(?<!\\)\b[A-Za-z]{2,}\b", gold))
    is_broken = not is_balanced(gold) or re.search(r"[-+*/^_=({\\]$", gold)
    return re.search(r"\w", gold) is not None and not is_broken and num_words <= 8


def same_value(answer: str, gold: str) -> bool:
    """Whether two texts are the same mathematics, by math-verify, both read as LaTeX and as expressions."""
    from math_verify import verify

    gold = gold_answer(gold)
    choices = [re.fullmatch(r"\(?([A-Za-z])\)?", plain(undressed(text))) for text in (answer, gold)]
    if all(choices):
        return choices[0][1] == choices[1][1]
    if is_text(gold):
        return False
    answer, gold = _set_of(answer), _set_of(gold)
    # "18 or 19", "not 18": math-verify would take a number out of such a text
    said, meant = (
        set(_OTHERWISE.findall(re.sub(r"\\[A-Za-z]+", "", plain(text)))) for text in (answer, gold)
    )
    if said - meant:
        return False
    bases = [set(re.findall(r"\d_(\w+)", plain(text))) for text in (answer, gold)]
    if bases[0] - bases[1]:  # math-verify does not look at them
        return False
    # math-verify takes (2, 4), [2, 4] and {2, 4} for one another in places
    if _brackets(answer) not in ("", _brackets(gold)):
        return False
    if (given := number(answer)) is not None and given.value.denominator > 1:
        # it also rounds: 3.1415927 would be pi
        exact = _parsed(rf"\frac{{{given.value.numerator}}}{{{given.value.denominator}}}")
        return any(a.equals(b) for a in exact[:1] for b in _parsed(gold)[:1] if hasattr(a, "equals"))
    return bool(
        verify(list(_parsed(gold)), list(_parsed(answer)), timeout_seconds=None, allow_set_relation_comp=True)
    )


def _set_of(text: str) -> str:
    """Without `x \\in` before a set: what is asked for is the set."""
    return re.sub(r"^\s*[A-Za-z]\s*\\in\b", "", undressed(text)).strip()


def _brackets(text: str) -> str:
    text = re.sub(r"\\(?=[{}])", "", plain(text))
    ends = text[:1] + text[-1:]
    return ends if ends in ("()", "[]", "(]", "[)", "{}") else ""


@cache
def _parsed(text: str) -> tuple[Any, ...]:
    """What math-verify reads in a text, as LaTeX or else as a plain expression."""
    from math_verify import parse

    latex = text if re.search(r"\$|\\\(|\\\[|\\boxed", text) else f"${text}$"
    # The process has limits; the library's own use signals, which are for its caller.
    return tuple(parse(latex, parsing_timeout=None) or parse(text, parsing_timeout=None))
