"""Runs samplers under the clock: what is noted of an arm, on which machine, and the table of it."""

import ctypes
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llada.data.prompts import Prompt
from llada.models.building import ROOT
from llada.training.monitor import peak_resident
from modelling_final import LLaDAModelLM
from sampler_arms import Arm


def describe_machine(device: str) -> dict[str, str]:
    """What a number has to be quoted with: processor, threads, torch, and this code's commit."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        text = cpuinfo.read_text() if cpuinfo.exists() else ""
        found = re.search(r"^model name\s*: (.+)$", text, flags=re.MULTILINE)
        name = found[1] if found else platform.processor() or platform.machine()
        name += f", {torch.get_num_threads()} threads"
    git = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    commit = git.stdout.strip() or "unknown"  # a copy of the code without its history
    return {"machine": name, "torch": torch.__version__, "commit": commit}


class Calls:
    """Counts the calls of a model, and the sequences in them."""

    def __init__(self, model: LLaDAModelLM) -> None:
        self.num_calls = self.num_sequences = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        input_ids = args[0] if args else kwargs["input_ids"]
        self.num_calls += 1
        self.num_sequences += input_ids.shape[0]


class PeakMemory:
    """The peak of memory above what was in use at the start, in MiB; nan where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # else the arm runs in what earlier arms left behind
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            status = Path("/proc/self/status").read_text()
            self.start = 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])

    def read(self) -> float:
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated() - self.start) / 2**20
        return (peak_resident() - self.start) / 2**20 if sys.platform == "linux" else math.nan


@dataclass
class Result:
    """What an arm did with all prompts; timed runs accumulate, the rest is that of the last run."""

    seconds: list[float] = field(default_factory=list)
    memory: float = 0.0  # MiB, the highest of all runs
    tokens: dict[int, list[int]] = field(default_factory=dict)  # prompt index -> answer
    num_decided: int = 0
    num_calls: int = 0
    num_sequences: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))


def time_arm(
    arm: Arm,
    batches: list[list[Prompt]],
    result: Result,
    calls: Calls,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Runs all batches once and adds to the result; `clock` tells seconds."""
    result.tokens, result.num_decided = {}, 0
    calls.num_calls = calls.num_sequences = 0
    memory = PeakMemory(device)
    started = clock()
    for batch in batches:
        answers = arm(batch)
        result.tokens |= {p.index: tokens for p, tokens in zip(batch, answers.tokens, strict=True)}
        result.num_decided += answers.num_decided
    if device.type == "cuda":
        torch.cuda.synchronize()
    result.seconds.append(clock() - started)
    result.memory = max(result.memory, memory.read())
    result.num_calls, result.num_sequences = calls.num_calls, calls.num_sequences


def agreement(tokens: dict[int, list[int]], reference: dict[int, list[int]]) -> tuple[int, float]:
    """How many answers are equal, and the share of equal tokens at equal positions of the longer answer."""
    num_equal = num_same = num_all = 0
    for index, answer in tokens.items():
        other = reference[index]
        num_equal += answer == other
        num_same += sum(a == b for a, b in zip(answer, other, strict=False))
        num_all += max(len(answer), len(other))
    return num_equal, num_same / max(1, num_all)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows under their names, columns aligned."""
    cells = [list(rows[0])] + [[_shown(value) for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"
