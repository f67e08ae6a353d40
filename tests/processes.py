"""Stage scripts in processes of their own, forked from one that has paid the imports already."""

import multiprocessing
import os
import socket
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from conftest import ROOT, load_script

DEADLINE = 240  # seconds; a loaded machine is slow
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["processes", "stage_scripts"])


def _main(script: str, flags: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    with open(log, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        try:
            load_script(script).main(flags)
        except BaseException:
            traceback.print_exc()
            raise


def start(script: str, flags: list[object], log: Path, **environment: object) -> BaseProcess:
    """The script with these flags and environment variables, started; its output goes to `log`."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    saved = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=path, OMP_NUM_THREADS=str(torch.get_num_threads()))  # rounding is by threads
    variables = {name: str(value) for name, value in environment.items()}
    process = _context.Process(target=_main, args=(script, list(map(str, flags)), variables, log))
    process.start()
    for name, value in saved.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return process


def finish(process: BaseProcess, log: Path, status: int = 0) -> None:
    """Waits for the process, which must end with this status."""
    process.join(DEADLINE)
    is_late = process.is_alive()
    process.kill()
    process.join()
    text = log.read_text() if log.exists() else ""
    assert not is_late and process.exitcode == status, f"status {process.exitcode}\n{text[-3000:]}"


def start_ranks(
    world_size: int, script: str, flags: list[object], folder: Path, *, num_nodes: int = 1
) -> list[tuple[BaseProcess, Path]]:
    """The script started on so many ranks, as torchrun would; their processes and logs, in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    local = world_size // num_nodes
    common = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "127.0.0.1"}
    return [
        (start(script, flags, log, RANK=rank, LOCAL_RANK=rank % local, MASTER_PORT=port, **common), log)
        for rank, log in enumerate(logs)
    ]


def run_ranks(
    world_size: int, script: str, flags: list[object], folder: Path, *, num_nodes: int = 1
) -> list[Path]:
    """Runs the script on so many ranks to its end; their logs."""
    started = start_ranks(world_size, script, flags, folder, num_nodes=num_nodes)
    for process, log in started:
        finish(process, log)
    return [log for _, log in started]


def kill_after(process: BaseProcess, folder: Path, num_lines: int) -> None:
    """Kills a training without warning once its metrics.jsonl has so many lines and a state is saved."""
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + DEADLINE
    while process.is_alive() and time.monotonic() < deadline:
        is_far = metrics.exists() and metrics.read_bytes().count(b"\n") >= num_lines
        if is_far and (folder / "latest").exists():  # a state is written while training goes on
            break
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (folder / "DONE").exists(), "the run ended before it could be killed"
