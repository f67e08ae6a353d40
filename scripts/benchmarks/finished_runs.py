"""Runs of scripts that are made once, and intervals of what comes of them; for the benchmarks of training."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from llada.diffusion.masking import generator

ROOT = Path(__file__).resolve().parents[2]
NUM_RESAMPLES = 10_000


def run_once(script: str, flags: dict[str, object], folder: Path) -> float:
    """Runs a script with its log in `folder`, unless it has finished there before; its CPU seconds."""
    mark = folder / "cpu_seconds.json"
    if mark.is_file():
        return json.loads(mark.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / script), *arguments(flags)]
    print(f"== {folder}", flush=True)
    before = _children_seconds()
    with open(folder / "log.txt", "wb") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        tail = (folder / "log.txt").read_text(errors="replace").splitlines()[-20:]
        raise SystemExit("\n".join([f"failed: {' '.join(command)}", *tail]))
    seconds = round(_children_seconds() - before, 1)
    mark.write_text(json.dumps(seconds))
    return seconds


def _children_seconds() -> float:
    """CPU seconds, user and system, of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def arguments(flags: dict[str, object]) -> list[str]:
    arguments = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return arguments


def records_of_task(path: Path, task: str) -> list[str]:
    """The lines of a puzzle file that are of one task."""
    lines = path.read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if json.loads(line)["task"] == task]
    if not chosen:
        raise ValueError(f"--data {path.parent}: {path.name} has no puzzle of --task {task}")
    return chosen


def interval(gains: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `gains` [seeds, puzzles], resampling both."""
    random = generator(0, "bootstrap")
    num_seeds, num_puzzles = gains.shape
    means = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        rows = random.integers(num_seeds, size=num_seeds)
        columns = random.integers(num_puzzles, size=num_puzzles)
        means[i] = gains[rows].mean(axis=0)[columns].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
