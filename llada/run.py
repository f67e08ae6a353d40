"""Where a run lives: its processes, its device and its precision."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# What our libraries say to each other: nothing that a user can act on.
for _message in (
    "torch.distributed is disabled, unavailable or uninitialized",  # one process is a normal way to train
    "`is_gradient_checkpointing` is deprecated",  # peft asks transformers
):
    warnings.filterwarnings("ignore", message=_message)


@dataclass(frozen=True)
class Run:
    """This process among its peers. Rank 0 alone writes and prints."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_run(device: str | None = None) -> Run:
    """Joins the process group that torchrun or accelerate launch describes in the environment, if there is
    one.

    Args:
        device: "cpu", "cuda", ...; default the GPU of this process's LOCAL_RANK where there is one, else the
        CPU.
    """
    run = described_run(device)
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    if run.world_size > 1 and not dist.is_initialized():
        # gloo beside nccl: CPU tensors (counts, flags, checkpoints) travel on it
        backend = "cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return run


def start_processes(script: str, argv: list[str] | None, wanted: int | None, device: str | None) -> bool:
    """Runs `script` as several processes under torchrun; False if this process is to work itself.

    Args:
        argv: the script's flags; None is `sys.argv[1:]`.
        wanted: at most one a GPU, without GPUs one a CPU core; None is all GPUs.
    """
    if "WORLD_SIZE" in os.environ:
        return False
    available = torch.cuda.device_count() if device in (None, "cuda") else 0
    wanted = max(1, available) if wanted is None else wanted
    number = min(wanted, available or os.cpu_count() or 1)
    if number < wanted:
        print(f"--num_gpus {wanted}: {available} GPUs here, so {number} processes", flush=True)
    if number <= 1:
        return False
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    flags = sys.argv[1:] if argv is None else argv
    subprocess.run([sys.executable, *launcher, str(Path(script).resolve()), *flags], check=True)
    return True


def described_run(device: str | None = None) -> Run:
    """The run that the environment describes, without joining it: enough for a dry run. As `start_run`."""
    if device is None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    return Run(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        device=torch.device(device),
    )


def end_run() -> None:
    """Leaves the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Each value summed over all ranks, in float64 so that counts stay exact."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


Sums = dict[str, tuple[float, float]]
"""Name -> (sum, number of values): what micro-batches and ranks add up before a mean is taken."""


def add_sums(sums: Sums, more: Sums) -> None:
    """Adds `more` to `sums`, name by name."""
    for name, (total, number) in more.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + total, before[1] + number)


def means_over_ranks(sums: Sums) -> dict[str, float]:
    """The mean of each name over all ranks, which must name the same; one without values is left out."""
    if not sums:
        return {}
    flat = sum_over_ranks([number for pair in sums.values() for number in pair])
    pairs = zip(sums, flat[::2], flat[1::2], strict=True)
    return {name: total / number for name, total, number in pairs if number}


def max_over_ranks(value: float) -> float:
    """The largest of all ranks' values."""
    if not dist.is_initialized():
        return float(value)
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def barrier() -> None:
    """Waits for all ranks; nothing to wait for in a single process."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_rank_first(run: Run) -> Iterator[None]:
    """Rank 0 runs the body while the others wait, then they run it and find its files done."""
    if not run.is_main:
        barrier()
    yield
    if run.is_main:  # not after an error: the launcher ends the others
        barrier()


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Matrix products in `dtype`, parameters and sums as they are; does nothing for float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))
