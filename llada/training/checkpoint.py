"""Save and resume training state.

A save is written to `step-N.tmp`, renamed to `step-N` when whole, and only then named in `latest`, so
whatever kills the run, `latest` names a complete checkpoint. Everything random is keyed by the step, so the
state is the weights, the optimizer and one integer.
"""

import fcntl
import json
import os
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from llada.resumable import read_object, write_atomically
from llada.run import Run, barrier

# Only what is trained: with LoRA the base weights are reread from their own folder.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class Saver:
    """Saves states in the background: training goes on while the files are written.

    A save takes a copy of the state at once, and its files become a checkpoint when all ranks have written
    theirs, at a step boundary where all ranks agree on it. One save is under way at a time.
    """

    def __init__(self, output_dir: Path, run: Run, *, keep: int) -> None:
        self._output_dir, self._run, self._keep = output_dir, run, keep
        # Its own group: on the default one, the saver's collectives would mix with those of training, and
        # abort.
        patience = timedelta(hours=12)  # a slow disk; a rank that dies is noticed otherwise
        self._group = dist.new_group(backend="gloo", timeout=patience) if dist.is_initialized() else None
        self._pending: tuple[int, Mapping[str, Any], Future] | None = None
        if run.is_main:
            for partial in output_dir.glob("step-*.tmp"):  # what a killed run was writing
                shutil.rmtree(partial)

    @property
    def is_written(self) -> bool:
        """Whether this rank has a save under way whose files are all written."""
        return self._pending is not None and self._pending[2].done()

    def load(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """`load_state`, in which ranks wait for one another however long it takes to read."""
        load_state(folder, model, optimizer, group=self._group)
        barrier()

    def start(
        self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, meta: Mapping[str, Any]
    ) -> None:
        """Begins to save the state after `step` steps, when the save before it is complete.

        `meta`: what a resume must agree with (see `check_meta`), and results so far; stored as JSON.
        """
        self.finish()
        partial = self._output_dir / f"step-{step}.tmp"
        if self._run.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
        state = {"model": model_state, "optimizer": optimizer_state}
        future = dcp.async_save(state, checkpoint_id=partial, process_group=self._group)
        self._pending = (step, meta, future)

    def finish(self) -> None:
        """Waits for the save under way, if there is one, and makes it the latest checkpoint.

        OSError: it could not be written (a full disk, for example); earlier checkpoints are untouched.
        """
        if self._pending is None:
            return
        step, meta, future = self._pending
        self._pending = None  # first: after an error nothing is under way
        folder, partial = self._output_dir / f"step-{step}", self._output_dir / f"step-{step}.tmp"
        try:
            future.result()
            barrier()  # all ranks have written
            if self._run.is_main:
                write_atomically(partial / "meta.json", json.dumps({"step": step, **meta}, indent=1))
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
                # last: whatever kills the run before, `latest` names a whole checkpoint
                write_atomically(self._output_dir / "latest", folder.name)
        except (Exception, CheckpointException) as error:  # DCP's is a BaseException
            if self._run.is_main:
                shutil.rmtree(partial, ignore_errors=True)  # its room is needed
            free = shutil.disk_usage(self._output_dir).free / 1e9
            raise OSError(
                f"{partial}: the training state could not be saved ({_reason(error)}); is the disk full? It "
                f"has {free:.3f} GB free without what was written of this state. "
                f"The last complete checkpoint is the one that {self._output_dir / 'latest'} names"
            ) from error
        if self._run.is_main and self._keep > 0:  # -1 keeps all
            for old in _saved_steps(self._output_dir)[: -self._keep]:
                shutil.rmtree(self._output_dir / f"step-{old}")
        barrier()


def load_state(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fills model and optimizer from a saved state; ValueError if its tensors do not fit this model."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    state = {"model": model_state, "optimizer": optimizer_state}
    _load(folder, state, group)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_OPTIONS,
    )


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Fills the model's trained weights from a saved state, whatever ranks wrote it; ValueError as above."""
    state = {"model": get_model_state_dict(model, options=_OPTIONS)}
    _load(folder, state, None)
    set_model_state_dict(model, state["model"], options=_OPTIONS)


def _load(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    try:
        dcp.load(state, checkpoint_id=folder, process_group=group)
    except (CheckpointException, RuntimeError, OSError, EOFError) as error:
        others = [str(folder.parent / f"step-{step}") for step in _saved_steps(folder.parent)]
        others = [other for other in others if other != str(folder)] or ["none"]
        raise ValueError(
            f"--resume_from_checkpoint {folder}: cannot be loaded: {_reason(error)}. Other states to name "
            f"with --resume_from_checkpoint: {', '.join(others)}"
        ) from error


def _reason(error: Exception) -> str:
    """What went wrong, in a line. DCP wraps it into the errors of all ranks."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [repr(error)]
    return next((line for line in reversed(lines) if "Error" in line), lines[0]).strip()[:300]


def read_meta(folder: Path) -> dict[str, Any]:
    """What `Saver` noted beside the tensors; ValueError if the folder is not a whole checkpoint."""
    try:
        return read_object(folder / "meta.json", "step", "max_steps")
    except (OSError, ValueError) as error:
        problem = f"not a complete checkpoint ({error})"
        raise ValueError(f"--resume_from_checkpoint {folder}: {problem}") from error


def check_meta(folder: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_meta` gives; ValueError naming each flag whose value differs from that of the saved run.

    A finished run may be lengthened: --max_steps may then be larger.
    """
    saved = read_meta(folder)
    may_grow = "max_steps" if saved["step"] == saved["max_steps"] < meta["max_steps"] else None
    changed = [f"--{name} was {saved.get(name)!r}, now {value!r}" for name, value in meta.items()
               if saved.get(name) != value and name != may_grow]  # fmt: skip
    if changed:
        raise ValueError(
            f"{folder}: the saved run was started otherwise: {'; '.join(changed)}. "
            "Give the same values to resume it, or another --output_dir to start anew"
        )
    return saved


def find_resume(output_dir: Path, wish: str) -> Path | None:
    """The state folder to resume from, or None for a fresh start.

    `wish`: "auto" = the latest in `output_dir` if there is one; "none"; or a folder, `step-N` or a run's.
    """
    if wish == "none":
        return None
    folder = output_dir if wish == "auto" else Path(wish)
    if (folder / "meta.json").is_file():
        return folder
    latest = folder / "latest"
    if latest.is_file():
        return folder / latest.read_text().strip()
    if wish == "auto":
        return None
    raise ValueError(f"--resume_from_checkpoint {wish}: no saved state there (neither meta.json nor latest)")


def _saved_steps(output_dir: Path) -> list[int]:
    names = [path.name.removeprefix("step-") for path in output_dir.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds the folder for this process: a second run in it would overwrite states and metrics of the first.

    The lock ends with the process, however that ends. ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # "a": the holder's name is read before it is replaced
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(
                f"--output_dir {folder}: another run ({holder}) is writing there; wait for it, stop it, or "
                "give another folder"
            ) from error
        # network file systems without locks are used without one
        except OSError as error:
            warnings.warn(f"{folder}: no lock on this file system ({error.strerror})", stacklevel=2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
