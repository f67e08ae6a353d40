"""Where a run lives: its processes, its device, its precision, and where its numbers go."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """This process among its peers. Rank 0 alone writes and prints."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


# What SLURM and torchrun send before they kill, and what a closed terminal sends.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_handlers_before: dict[int, Any] = {}


def start_run(device: str | None = None, *, output_dir: str | None = None) -> Run:
    """Joins the process group that torchrun or accelerate launch describes in the environment, if there is
    one.

    Args:
        device: "cpu", "cuda", ...; default the GPU of this process's LOCAL_RANK where there is one, else the
        CPU.
        output_dir: of a training: a signal outside its steps (while data are prepared or a model is loaded)
        leaves PREEMPTED there and ends the process with status 0, as one between two steps does.
    """
    run = described_run(device)
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    if run.world_size > 1 and not dist.is_initialized():
        # gloo beside nccl: CPU tensors (counts, flags, checkpoints) travel on it
        backend = "cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    if output_dir is not None:
        _stop_cleanly_on_signals(run, Path(output_dir))
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


def _stop_cleanly_on_signals(run: Run, output_dir: Path) -> None:
    def stop(*_: object) -> None:
        if run.is_main:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / "PREEMPTED").touch()
            print("stopped by a signal outside the training steps; the same command continues", flush=True)
        sys.exit(0)

    for number in STOP_SIGNALS:
        _handlers_before[number] = signal.signal(number, stop)


def end_run() -> None:
    """Leaves the process group, if this process is in one, and gives signals back to whoever had them."""
    while _handlers_before:
        signal.signal(*_handlers_before.popitem())
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


def first_rank_first(run: Run) -> AbstractContextManager[None]:
    """Rank 0 runs the body while the others wait, then they run it and find its files done."""

    class _Turns(AbstractContextManager):
        def __enter__(self) -> None:
            if not run.is_main:
                barrier()

        def __exit__(self, error_type: type | None, *_: object) -> None:
            if run.is_main and error_type is None:
                barrier()

    return _Turns()


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Matrix products in `dtype`, parameters and sums as they are; does nothing for float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


class Metrics:
    """Numbers of a run, under the same names in the terminal, in metrics.jsonl and in W&B. Rank 0 only."""

    def __init__(
        self,
        run: Run,
        folder: Path,
        *,
        report_to: str,
        config: Mapping[str, Any],
        total_steps: int,
        first_step: int,
    ) -> None:
        self._wandb = None
        self._bar = None
        if not run.is_main:
            return
        self._path = folder / "metrics.jsonl"
        self._spikes = folder / "loss_spikes.jsonl"
        for path in (self._path, self._spikes):
            _keep_lines_before(path, first_step)
        self._bar = tqdm(total=total_steps, initial=first_step, desc=folder.name, unit="step", mininterval=2)
        if report_to == "wandb":
            import wandb  # only here: it is slow to import and most runs do not use it

            name = config.get("run_name") or folder.name
            # The same id continues the same curve after a resume.
            self._wandb = wandb.init(
                project=config.get("wandb_project"), name=name, id=config.get("wandb_run_id"),
                config=dict(config), resume="allow", dir=str(folder),
            )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line {"step", "time", names: values}."""
        if self._bar is None:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.write(f"step {step}: {shown}")
        log.info("step %d: %s", step, shown)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def log_spike(self, step: int, spike: Mapping[str, Any]) -> None:
        """Appends one line to loss_spikes.jsonl, with the records of the step, and says so."""
        if self._bar is None:
            return
        with open(self._spikes, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **spike}) + "\n")
        self._bar.write(
            f"step {step}: loss {spike['loss']:.4g} is {spike['loss_spike']:.1f} standard deviations above "
            f"its mean; the records are in {self._spikes}"
        )

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Ends the progress bar and the W&B run."""
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: str | Path) -> Iterator[dict[str, float]]:
    """The lines of a metrics.jsonl."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _keep_lines_before(path: Path, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint; their first lines are dropped, so none stands
    twice."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the half-written last line of a killed run
        if entry["step"] <= step and step > 0:
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
