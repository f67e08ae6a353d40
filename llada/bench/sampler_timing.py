"""Runs samplers under the clock: what an arm of a benchmark is, and what is noted of it."""

import ctypes
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llada.bench.reference_sampler import Sampler
from modelling_final import LLaDAGenerationConfig, LLaDAModelLM


@dataclass
class Answers:
    """What an arm made of a batch."""

    tokens: list[list[int]]  # each answer before its first EOS or EoT
    num_decided: int


@dataclass
class Prompt:
    """A prompt of the file, and its record, for the verifiers."""

    index: int
    token_ids: list[int]
    record: dict[str, Any]


Arm = Callable[[list[Prompt]], Answers]


def before_end(answer: list[int], end_ids: set[int]) -> list[int]:
    """The tokens before the first EOS or EoT."""
    return next((answer[:i] for i, token in enumerate(answer) if token in end_ids), answer)


def our_arm(model: LLaDAModelLM, settings: LLaDAGenerationConfig) -> Arm:
    """An arm that runs our sampler."""

    def run(prompts: list[Prompt]) -> Answers:
        token_ids, names = [p.token_ids for p in prompts], [p.index for p in prompts]
        output = model.generate(token_ids, generation_config=settings, record_ids=names)
        return Answers(output.completions, round(output.tokens_per_forward * int(output.steps.sum())))

    return run


def canvas_arm(model: LLaDAModelLM, sampler: Sampler) -> Arm:
    """An arm that runs a sampler of whole canvases."""
    end_ids = {model.config.eos_token_id, model.config.eot_token_id} - {None}

    def run(prompts: list[Prompt]) -> Answers:
        answers = sampler([p.token_ids for p in prompts])
        return Answers([before_end(answer, end_ids) for answer in answers], sum(map(len, answers)))

    return run


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
            self.start = self._status("VmRSS")

    def read(self) -> float:
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated() - self.start) / 2**20
        return (self._status("VmHWM") - self.start) / 2**20 if sys.platform == "linux" else math.nan

    def _status(self, name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


@dataclass
class Result:
    """What an arm did with all prompts at one batch size; timed runs accumulate."""

    seconds: list[float] = field(default_factory=list)
    memory: float = 0.0  # MiB
    tokens: dict[int, list[int]] = field(default_factory=dict)  # prompt index -> answer
    num_decided: int = 0
    num_calls: int = 0
    num_sequences: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))


def time_arm(
    arm: Arm, batches: list[list[Prompt]], result: Result, calls: Calls, device: torch.device
) -> None:
    """Runs all batches once and adds to the result."""
    result.tokens, result.num_decided = {}, 0
    calls.num_calls = calls.num_sequences = 0
    memory = PeakMemory(device)
    started = time.perf_counter()
    for batch in batches:
        answers = arm(batch)
        result.tokens |= {p.index: tokens for p, tokens in zip(batch, answers.tokens, strict=True)}
        result.num_decided += answers.num_decided
    if device.type == "cuda":
        torch.cuda.synchronize()
    result.seconds.append(time.perf_counter() - started)
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
