"""What a run has done so far: tokens, time per phase, useful FLOPs and memory, over all its resumes."""

import math
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llada.run import gather_over_ranks, sum_over_ranks
from modelling_final.moe_llada import take_load

MAX_SKIPPED_IN_A_ROW = 10  # then it is not a batch that is broken, but the weights


def gather_records(record_ids: list[int]) -> list[int]:
    """The records of all ranks, sorted, each once; every rank must call it."""
    return sorted({record for part in gather_over_ranks(record_ids) for record in part})


@dataclass
class LossWatch:
    """Notices a loss far above those before it; state: what a resumed run needs to go on watching.

    A spike moves the averages as any other loss does, so a run that settles higher stops complaining.
    """

    sigmas: float  # standard deviations above the mean that make a spike; 0 = never
    mean: float = 0.0
    variance: float = 0.0
    num_losses: int = 0
    decay: float = 0.98  # of exponential averages over about 1 / (1 - decay) steps
    warmup: int = 50  # losses to know before one can be a spike

    def note(self, loss: float) -> float | None:
        """The loss's distance above the mean in standard deviations if it is a spike, else None."""
        if not math.isfinite(loss):
            return None
        excess = loss - self.mean
        deviation = math.sqrt(self.variance)
        is_known = self.sigmas > 0 and self.num_losses >= self.warmup and deviation > 0
        distance = excess / deviation if is_known else 0.0
        # the plain average at first, so that the start value is forgotten at once
        share = max(1 - self.decay, 1 / (self.num_losses + 1))
        self.mean += share * excess
        self.variance = (1 - share) * (self.variance + share * excess**2)
        self.num_losses += 1
        return distance if is_known and distance > self.sigmas else None

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "variance": self.variance, "num_losses": self.num_losses}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean, self.variance, self.num_losses = state["mean"], state["variance"], state["num_losses"]


@dataclass
class EarlyStop:
    """Ends a run before --max_steps; state: what a resumed run needs to go on counting."""

    target: float | None = None  # a held-out loss that is good enough
    patience: int = 0  # validations without a lower loss after which the run ends; 0 = never
    best: float | None = None
    num_since_best: int = 0
    is_reached: bool = False

    def note(self, eval_loss: float) -> None:
        """One more validation."""
        if self.best is None or eval_loss < self.best:
            self.best, self.num_since_best = eval_loss, 0
        else:
            self.num_since_best += 1
        is_good = self.target is not None and eval_loss <= self.target
        self.is_reached = is_good or 0 < self.patience <= self.num_since_best

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "num_since_best": self.num_since_best, "is_reached": self.is_reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.num_since_best = state["best"], state["num_since_best"]
        self.is_reached = state["is_reached"]


# Dense bf16 FLOP/s of GPUs whose name contains the key (vendors' data sheets), for MFU.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
PHASES = ("data", "forward_backward", "optimizer")


def peak_flops(gpu: str, dtype: str) -> float | None:
    """Dense FLOP/s of this GPU, None if unknown; float32 products run as TF32, at half the rate."""
    rate = next((rate for key, rate in PEAK_FLOPS.items() if key in gpu), None)
    return rate / 2 if rate is not None and dtype == "float32" else rate


def expert_load(model: torch.nn.Module) -> dict[str, float]:
    """How evenly all ranks' tokens, padding too, met the experts since the last call; {} without experts.

    `expert_load_max`: the busiest expert's share of a layer's tokens over an even share, mean of all layers
    (1: even, E / k: all tokens at the same experts). `experts_idle`: share of experts that met no token.
    """
    load = take_load(model)
    if load is None:
        return {}
    load = torch.tensor(sum_over_ranks(load.flatten().tolist())).view_as(load)
    busiest = load.max(dim=1).values * load.shape[1] / load.sum(dim=1)
    return {"expert_load_max": float(busiest.mean()), "experts_idle": float((load == 0).float().mean())}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU since the last call; on a CPU, the process ever."""
    if device.type != "cuda":
        return peak_resident()
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most


def peak_resident() -> int:
    """The most bytes of memory that this process ever had."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return 1024 * int(found[1])
    # that of a new process starts at what its parent had; macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Phases:
    """Seconds spent in each phase of the steps: `mark(name)` gives the time since the last mark to `name`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """Ends the phase `name` here."""
        # an event in the GPU's queue: nothing waits for it
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((name, now))

    def read(self) -> dict[str, float]:
        """{phase: seconds} since the last call; waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (_, before), (name, now) in zip(self._marks, self._marks[1:], strict=False):
            passed = before.elapsed_time(now) / 1e3 if self._on_gpu else now - before
            seconds[name] = seconds.get(name, 0.0) + passed
        self._marks = self._marks[-1:]
        return seconds


@dataclass
class Progress:
    """Totals of a run over all its resumes, and rates since they were last logged."""

    device: torch.device
    world_size: int  # for rates per device
    dtype: str = "float32"  # of the matrix products
    step: int = 0  # optimizer steps so far
    results: dict[str, float] = field(default_factory=dict)  # what else goes to results.json
    phases: Phases = field(init=False)
    of_ranks: dict[str, list[float]] = field(default_factory=dict)  # seconds of each phase, and memory
    _tokens_seen: float = 0.0
    _seconds: float = 0.0
    _window: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.phases = Phases(self.device)
        on_gpu = self.device.type == "cuda"
        self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device), self.dtype) if on_gpu else None
        self._clear()

    def _clear(self) -> None:
        self._window = {"tokens": 0.0, "flops": 0.0, **dict.fromkeys(PHASES, 0.0)}

    def note_step(self, tokens: float, flops: float) -> None:
        """One more step, of so many tokens and useful FLOPs over all ranks."""
        self.step += 1
        self._tokens_seen += tokens
        self._window["tokens"] += tokens
        self._window["flops"] += flops

    def note_skipped(self) -> None:
        """One more step that changed nothing, since its loss or gradient was not finite."""
        self.results["num_skipped_steps"] = self.results.get("num_skipped_steps", 0) + 1

    def note_validation(self, values: Mapping[str, float]) -> None:
        """Held-out numbers, `eval_loss` among them; the first ones are kept as NAME_before."""
        for name, value in values.items():
            self.results.setdefault(f"{name}_before", value)
            self.results[name] = value
        loss = values["eval_loss"]
        self.results["best_eval_loss"] = min(loss, self.results.get("best_eval_loss", math.inf))

    def _read_phases(self) -> None:
        seconds = self.phases.read()
        for name in PHASES:
            self._window[name] += seconds[name]
            self._seconds += seconds[name]

    def rates(self) -> dict[str, float]:
        """What is logged beside the loss, since the last call: tokens of all ranks, the rest per device."""
        self._read_phases()
        window = self._window
        total = max(sum(window[name] for name in PHASES), 1e-9)
        found = {"tokens_per_second": window["tokens"] / total, "num_tokens": self._tokens_seen}
        if window["flops"]:
            # useful FLOPs alone, see llada/training/cost.py
            rate = window["flops"] / total / self.world_size
            found["tflops_per_second"] = rate / 1e12
            if self.peak_flops is not None:
                found["mfu"] = rate / self.peak_flops
        found |= {f"share_{name}": window[name] / total for name in PHASES}
        found["peak_memory_gb"] = peak_memory(self.device) / 1e9
        mine = [round(window[name], 4) for name in PHASES] + [found["peak_memory_gb"]]
        ranks = zip(*gather_over_ranks(mine), strict=True)
        self.of_ranks = dict(zip((*PHASES, "peak_memory_gb"), map(list, ranks), strict=True))
        self._clear()
        return found

    def state_dict(self) -> dict[str, float]:
        """Everything to write into results.json."""
        self._read_phases()
        totals = {"steps": self.step, "num_tokens": self._tokens_seen, "seconds": round(self._seconds, 1)}
        return self.results | totals

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from a saved `state_dict`."""
        self.results = dict(state)
        self._tokens_seen, self._seconds = state["num_tokens"], state["seconds"]
