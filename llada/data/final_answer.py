"""Where the answer stands in what a model wrote: behind its thoughts, in a box, a tag, a sentence or a fence.

Rewards, held-out accuracy, lm_eval, best-of-n and the judge all read completions through this file, so that
one text has one answer everywhere. Whatever the text is, its length bounds the time.
"""

import re

THINK, THINK_END = "<think>", "</think>"

# Copied from a prompt, these are no answer.
_NOTHING = re.compile(r"[\s.?…]*|\\[lc]?dots|(?:your |final |the )*answer", re.IGNORECASE)
_BOX = re.compile(r"\\?\b(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is no brace
# "The answer is", "Answer:", "**Final answer:**"; GSM8K's "####" in the last line
_SAYS = re.compile(r"(?i:\banswer\b\W{0,4}(?::|=|\bis\b|\bare\b):?)|####(?=[^\n]*\s*\Z)")
_FENCE = re.compile(r"```[^\S\n]*([\w+-]*)[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_PROGRAM = ("", "python", "py", "python3")
_TEXT = ("", "text", "txt", "latex", "tex", "math", "markdown", "md")
_DRESS = [
    *[(f"\\{name}{{", "}") for name in ("boxed", "fbox", "text", "textbf", "mathbf", "mathrm", "mbox")],
    (r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"), ("```", "```"), ("***", "***"), ("**", "**"),
    ("__", "__"), ("*", "*"), ("`", "`"), ('"', '"'), ("“", "”"),
]  # fmt: skip

# LaTeX that only sets type, and what it means.
_TYPESETTING = [(re.compile(pattern), meaning) for pattern, meaning in (
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
    (r",\s*\\!\s*|\{,\}|(?<=\d)(?:\\,|[\u2009\u202f])(?=\d{3}(?!\d))", ","),  # thousands separators
    (r"\\[,;:!> ]|~|\\q?quad\b|[\u00a0\u2009\u202f]", " "),
    (r"\\(?:text(?:rm|bf|it)?|mbox|math(?:rm|bf|it)|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\w)", r"\\frac{\1}"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])|[×·⋅∗]", "*"),
    (r"\\div(?![A-Za-z])|÷", "/"),
    (r"[−–]", "-"),
    (r"\\%|\bper ?cent\b", "%"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\bdegrees?\b", "°"),
    (r"\\le(?:q|qslant)?(?![A-Za-z])", "≤"), (r"\\ge(?:q|qslant)?(?![A-Za-z])", "≥"),
    (r"\\\$", "$"),
    (r"_\s*\{(\w+)\}", r"_\1"), (r"\^\s*\{(\w)\}", r"^\1"),
)]  # fmt: skip


def without_thoughts(text: str, *, starts_inside: bool = False) -> str:
    """The text behind its thoughts; of an unfinished thought nothing is left.

    `starts_inside`: the prompt ended in `<think>`, so that a text without `</think>` is all thought.
    """
    # A `</think>` without a `<think>` before it ends a thought that the chat template has opened.
    *closed, last = (THINK + text if starts_inside else text).split(THINK_END)
    answer = ""
    for part in closed:
        before, opened, _ = part.partition(THINK)
        answer = answer + before if opened else ""
    answer += last.partition(THINK)[0]
    # The white space between a thought and its answer is of neither, and a stop string must not find it.
    return answer.lstrip() if closed else answer


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends in an open `<think>`, so that the completion begins inside."""
    return prompt.rstrip().endswith(THINK)


def code_blocks(text: str) -> list[str]:
    """The programs in fences of three backticks; the last fence may be open."""
    return [body for language, body in _FENCE.findall(text) if language.lower() in _PROGRAM]


def final_answer(completion: str, *, was_cut: bool | None = None) -> str:
    """The answer that a completion ends with, undressed; "" where there is none.

    Of what is there, the first counts: the last `\\boxed{}` with content, the last `<answer>` with content,
    what follows the last "The answer is" (or "Answer:", "####"), the last fence, all of the text. `was_cut`
    False: the model ended its text, so that a box without its brace is no box; None: not known.
    """
    text = without_thoughts(completion)
    found = _last_box(text, may_be_cut=was_cut is not False) or last_tag(text)
    if found is None:
        # d1's format has its reasoning beside the answer
        text = re.sub(r"</?(?:answer|reasoning)>", "", text.rpartition("</reasoning>")[2].strip() or text)
        fences = [body for language, body in _FENCE.findall(text) if language.lower() in _TEXT]
        found = _said(text) or next((body for body in reversed(fences) if body.strip()), text)
    return undressed(found)


def undressed(text: str) -> str:
    """A text without the Markdown and LaTeX around it, and without its full stop; what is inside stays."""
    for _ in range(8):  # nobody dresses an answer more often, and a text must not cost its square
        before = text
        text = re.sub(r"\\?\bboxed\s*\{\s*\}", "", text).strip()
        text = re.sub(r"(?<!\.)(?<!\\right)[.。]$", "", text).strip()  # not of "..." and "\right."
        inside = next(filter(None, (_inside(text, *pair) for pair in _DRESS)), None)
        text = inside or _without_half_pairs(text)
        if text == before:
            break
    return text


def plain(text: str) -> str:
    """A text with the LaTeX that only sets type written plainly."""
    for pattern, meaning in _TYPESETTING:
        text = pattern.sub(meaning, text)
    return " ".join(text.split())


def _inside(text: str, start: str, end: str) -> str | None:
    """What this one pair holds; None where the text is not one such pair: `$a$ and $b$` is not."""
    if not (text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end)):
        return None
    inside = text[len(start) : -len(end)]
    if end == "}":
        return inside if is_balanced(inside) else None
    if start == "$":
        return None if "$" in inside.replace(r"\$", "") else inside
    if start == "**":  # inside, x**2 is a power
        return None if re.search(r"(?:^|\s)\*\*|\*\*(?:\s|$)", inside) else inside
    return None if start in inside or end in inside else inside


def _without_half_pairs(text: str) -> str:
    """Without the one end of a pair whose other end was cut off, or stood before "The answer is"."""
    text = re.sub(r"^\*\*\s+|\s+\*\*$", "", text)
    if text.count("**") == 1:
        text = text.removeprefix("**").removesuffix("**").strip()
    if text.endswith("$") and text.count("$") == 1 and not text.endswith(r"\$"):
        text = text[:-1]
    box = _BOX.match(text)
    return text[box.end() :] if box and is_balanced(text[box.end() :]) else text


def is_balanced(text: str) -> bool:
    """Whether every brace of a text has its partner."""
    depth = 0
    for match in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth < 0:
            return False
    return depth == 0


def _last_box(text: str, *, may_be_cut: bool) -> str | None:
    """Content of the last box that has some."""
    unclosed: list[int] = []
    ends: dict[int, int] = {}
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            unclosed.append(match.start())
        elif match[0] == "}" and unclosed:
            ends[unclosed.pop()] = match.start()
    boxes = [match.end() for match in _BOX.finditer(text)]
    for start in reversed(boxes):
        end = ends.get(start - 1)
        inside = text[start:end].strip()
        # without its brace it counts where a cut text ends inside it, and nothing of its content is open
        if end is None and not (
            may_be_cut and unclosed[-1:] == [start - 1] and not re.search(r"[<>\n]", inside)
        ):
            continue
        if not _NOTHING.fullmatch(inside):
            return inside
    return None


def last_tag(text: str) -> str | None:
    """What the last `<answer>` with content holds; the last one may be open."""
    for part in reversed(re.split("<answer>", text, flags=re.IGNORECASE)[1:]):
        inside = re.split("</answer", part, maxsplit=1, flags=re.IGNORECASE)[0].strip()
        if not _NOTHING.fullmatch(inside):
            return inside
    return None


def said_last(text: str) -> str:
    """All that follows the last "The answer is"; the text itself where it does not say so."""
    said = re.split(_SAYS, text)[-1]
    return said if said.strip() else text


def _said(text: str) -> str | None:
    """What follows the last "The answer is": to the end of its sentence, and lines below it without words."""
    if (said := said_last(text)) == text:
        return None
    first, *lines = said.strip().splitlines()
    statement = [re.split(r"(?<=[^\s.])[.!]\s+(?=[A-Z])", first)[0]]
    for line in lines:
        if re.search(r"(?<!\\)\b[A-Za-z]{3,}", line):
            break
        statement.append(line)
    return "\n".join(statement)
