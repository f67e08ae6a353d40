"""Where a run lives: its processes, its device and its precision."""

import atexit
import ctypes
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

# What our libraries say to each other: nothing that a user can act on.
for _message in (
    "torch.distributed is disabled, unavailable or uninitialized",  # one process is a normal way to train
    "`is_gradient_checkpointing` is deprecated",  # peft asks transformers
):
    warnings.filterwarnings("ignore", message=_message)


T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """This process among its peers. Rank 0 alone writes and prints."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def build_device(self) -> torch.device:
        """Where this rank builds what it trains: rank 0 alone holds values, which all then take from it."""
        return self.device if self.is_main else torch.device("meta")


def start_run(device: str | None = None, *, step_seconds: float | None = None) -> Run:
    """Joins the process group that torchrun or accelerate launch describes in the environment, if any.

    Args:
        device: "cpu", "cuda", ...; default the GPU of this process's LOCAL_RANK where there is one, else the
            CPU.
        step_seconds: how long a rank may wait for another within a step; default half an hour.
    """
    global _peers
    run = described_run(device)
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    if run.world_size > 1 and not dist.is_initialized():
        # gloo beside nccl: CPU tensors (counts, flags, checkpoints) travel on it
        backend = "cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=step_seconds or 1800))
        _peers = _Peers(run)
    return run


def keep_freed_memory() -> None:
    """Lets this process keep the memory it frees, for a step on a CPU to take again without page faults.

    Where the environment says how memory is allocated (MALLOC_...), or the C library is not glibc, no change.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    # malloc.h: large blocks come from the heap too, which never shrinks and grows by 256 MB
    mmap_max, trim_threshold, top_pad = -4, -1, -2
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
        libc.mallopt(option, value)


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
        device=_usable(device),
    )


def _usable(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # each kind of device has its own way to be missing
        reason = str(error).strip().splitlines()[0].partition(" device type at")[0]
        raise ValueError(f"--device {name}: not here ({reason})") from error
    return device


def end_run() -> None:
    """Leaves the process group, if this process is in one."""
    global _peers
    if _peers is not None:
        _peers.close()
        _peers = None
    if dist.is_initialized():
        dist.destroy_process_group()


# A thread of each rank says every few seconds where it is: a silent rank has died or was stopped. What FSDP
# and DDP do within a step has a timeout.
BEAT_SECONDS, SILENT_SECONDS, STEP_SECONDS = 3.0, 40.0, 50.0


class _Peers:
    """Where each rank is, told over the job's store; ends the job where one has stopped answering."""

    def __init__(self, run: Run) -> None:
        self.run, self.place = run, "the start"
        # Waits for a rank that prepares data or writes a checkpoint, however long that takes.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        name = f"llada {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {next(_starts)}"
        self._store = dist.PrefixStore(name, dist.TCPStore(address, port, is_master=False))
        self.ended = threading.Event()
        self._say(0)
        dist.barrier(self.group)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that is inside the store when Python ends aborts the process

    def close(self) -> None:
        """Ends the watch."""
        self.ended.set()
        self._thread.join(BEAT_SECONDS)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """All ranks wait for one another here; TimeoutError if one of them does so elsewhere."""
        before, self.place = self.place, f"{self.place}, {what}"
        place = torch.tensor(zlib.crc32(self.place.encode()))
        total = place.clone()
        dist.all_reduce(total, group=self.group)
        if total != place * self.run.world_size:
            self._say(-1)
            dist.barrier(self.group)  # all have seen it, and say where they are
            raise TimeoutError(f"ranks wait for one another in different places: {self.places()}")
        yield
        self.place = before

    def _say(self, beat: int) -> None:
        self._store.set(str(self.run.rank), json.dumps([beat, self.place]))

    def _heard(self, ranks: list[int]) -> list[tuple[int, str]]:
        return [json.loads(text) for text in self._store.multi_get(list(map(str, ranks)))]

    def places(self) -> str:
        """Where the ranks are, those at one place together."""
        found: dict[str, list[str]] = {}
        for rank, (_, place) in enumerate(self._heard(list(range(self.run.world_size)))):
            found.setdefault(place, []).append(str(rank))
        return "; ".join(f"rank {', '.join(ranks)}: {place}" for place, ranks in found.items())

    def wait_for_news(self) -> None:
        """Waits until each rank has said where it is by now; one that has died says nothing any more."""
        self._say(-1)
        everyone = list(range(self.run.world_size))
        before, deadline = self._heard(everyone), time.monotonic() + 3 * BEAT_SECONDS + 1
        is_old = True
        while is_old and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 4)
            is_old = any(new[0] == old[0] for new, old in zip(self._heard(everyone), before, strict=True))

    def _watch(self) -> None:
        # Rank 0 watches all, the others rank 0: the store serves one reader after the other.
        others = list(range(1, self.run.world_size)) if self.run.is_main else [0]
        last_beats, heard_at = [0] * len(others), [time.monotonic()] * len(others)
        looked_at = time.monotonic()
        for beat in itertools.count(1):
            if self.ended.wait(BEAT_SECONDS):
                return
            try:
                self._say(beat)
                heard = self._heard(others)
            except (RuntimeError, OSError):  # the store has ended with the job
                return
            now = time.monotonic()
            was_stopped, looked_at = now - looked_at > 3 * BEAT_SECONDS, now  # and the others perhaps with us
            for i, (number, place) in enumerate(heard):
                if was_stopped or number != last_beats[i]:
                    last_beats[i], heard_at[i] = number, now
                elif now - heard_at[i] > SILENT_SECONDS:
                    silence = f"has not answered for {now - heard_at[i]:.0f} s, last at {place}"
                    text = f"rank {self.run.rank}, at {self.place}: rank {others[i]} {silence}"
                    print("\n" + text, file=sys.stderr, flush=True)
                    os._exit(1)  # the main thread waits and cannot be reached


_starts = itertools.count()
_peers: _Peers | None = None


def at(place: str) -> None:
    """Says where this rank is from now on; all ranks must be at the same places in the same order."""
    if _peers is not None:
        _peers.place = place


@contextmanager
def naming_ranks() -> Iterator[None]:
    """Within its body a collective that fails or times out is a TimeoutError that says where ranks are."""
    try:
        yield
    except RuntimeError as error:
        if _peers is None or not re.search("gloo|NCCL|timed? ?out|onnection", str(error)):
            raise
        _peers.wait_for_news()
        reason = f"{str(error).strip().splitlines()[0][-120:]}; {_peers.places()}"
        raise TimeoutError(f"rank {_peers.run.rank}, at {_peers.place}: {reason}") from error


def _all_reduce(values: list[float], what: str, op: dist.ReduceOp = dist.ReduceOp.SUM) -> list[float]:
    if _peers is None:
        return [float(value) for value in values]
    with _peers.waiting(what):
        total = torch.tensor(values, dtype=torch.float64)
        if len(values):
            dist.all_reduce(total, op=op, group=_peers.group)
    return total.tolist()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Each value summed over all ranks, in float64 so that counts stay exact."""
    return _all_reduce(values, "sums")


def max_over_ranks(value: float) -> float:
    """The largest of all ranks' values."""
    return _all_reduce([value], "largest", dist.ReduceOp.MAX)[0]


def barrier() -> None:
    """Waits for all ranks, as long as they live; nothing to wait for in a single process."""
    _all_reduce([], "barrier")


def gather_over_ranks(value: T) -> list[T]:
    """The value of each rank, which is pickled."""
    if _peers is None:
        return [value]
    values = [value] * _peers.run.world_size
    with _peers.waiting("gathering"):
        dist.all_gather_object(values, value, group=_peers.group)
    return values


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
