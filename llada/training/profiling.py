"""Where the time and the memory of a step go: a profiler's trace, and what the GPU held when it was full."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from llada.run import Run

_BEFORE = 3  # steps that compile, fill the allocator's pools and make the optimizer's state


@contextmanager
def profiled(folder: Path, run: Run, num_steps: int) -> Iterator["profile | None"]:
    """A profiler whose `step` ends a step; traces this many steps of every rank after the first three.

    The trace is `profile/rankR.json.gz` in `folder`, for Perfetto or chrome://tracing. None with 0 steps.
    """
    if num_steps == 0:
        yield None
        return
    path = folder / "profile" / f"rank{run.rank}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(max_entries=100_000)  # for a snapshot, see below

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        if run.is_main:
            print(f"--profile: {path.parent} has a trace of {num_steps} steps of each rank", flush=True)

    plan = schedule(wait=_BEFORE - 1, warmup=1, active=num_steps, repeat=1)
    with profile(
        activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True, profile_memory=True
    ) as profiler:
        yield profiler


@contextmanager
def memory_snapshot(folder: Path, run: Run) -> Iterator[None]:
    """Within its body a GPU that is full leaves a snapshot of its memory, which the error names.

    With --profile the snapshot also says which line allocated each block.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        path = folder / f"memory-rank{run.rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        raise torch.OutOfMemoryError(
            f"{error}\n{path} says what the memory held (docs.pytorch.org/memory_viz). "
            "--micro_batch_size, --gradient_checkpointing, --shard full and --use_lora need less; "
            "--dry_run --gpu_memory_gb N counts before"
        ) from error
