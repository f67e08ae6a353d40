"""Two evaluations of the same questions, compared question by question.

The difference of two scores varies far less than the scores do, since both models meet the same easy and hard
questions: its interval comes from the differences of single questions.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Comparison(NamedTuple):
    """A metric of two runs over the questions that both have answered."""

    name: str  # task/metric,filter
    num_questions: int
    first: float
    second: float
    difference: float  # second - first
    half_width: float  # of the 95 % interval: 1.96 standard errors of the mean difference


def _latest_samples(folder: str) -> dict[tuple[str, str], float]:
    """(task/metric,filter, question) -> value, of the newest samples file of each task under a folder."""
    found: dict[tuple[str, str], float] = {}
    paths = sorted(Path(folder).rglob("samples_*.jsonl"), key=lambda path: path.name.rpartition("_")[2])
    if not paths:
        raise ValueError(
            f"--compare {folder}: no samples_*.jsonl there; evaluate with --output_path and --log_samples"
        )
    for path in paths:  # a newer file overwrites an older one's values
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            for metric in sample["metrics"]:
                if isinstance(value := sample.get(metric), int | float):
                    found[f"{task}/{metric},{sample['filter']}", sample["doc_hash"]] = float(value)
    return found


def compare(first: str, second: str) -> Iterator[Comparison]:
    """Every metric that two output folders share, with the paired difference; ValueError if there is none."""
    one, other = _latest_samples(first), _latest_samples(second)
    shared = sorted(one.keys() & other.keys())
    if not shared:
        raise ValueError(f"--compare {first} {second}: no question of one task in both")
    for name in dict.fromkeys(name for name, _ in shared):
        pairs = [(one[key], other[key]) for key in shared if key[0] == name]
        num = len(pairs)
        means = [math.fsum(values) / num for values in zip(*pairs, strict=True)]
        gaps = [b - a for a, b in pairs]
        mean = math.fsum(gaps) / num
        variance = math.fsum((gap - mean) ** 2 for gap in gaps) / max(num - 1, 1)
        error = math.sqrt(variance / num) if num > 1 else math.nan
        yield Comparison(name, num, *means, mean, 1.96 * error)


def table(first: str, second: str) -> str:
    """The comparison as a Markdown table."""
    lines = [
        f"| task/metric | questions | {first} | {second} | difference | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for c in compare(first, second):
        low, high = c.difference - c.half_width, c.difference + c.half_width
        lines.append(
            f"| {c.name} | {c.num_questions} | {c.first:.4f} | {c.second:.4f} "
            f"| {c.difference:+.4f} | {low:+.4f} to {high:+.4f} |"
        )
    return "\n".join(lines)
