"""Requests of many clients become batches of one model, in a thread of its own.

A job is one request: a prompt and how many candidates of an answer to it. Jobs with equal sampler settings go
through `model.generate` together, whatever their lengths; draws are keyed by (seed, record, candidate), so an
answer does not depend on the batch it was made in.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from modelling_final import LLaDAGenerationConfig, LLaDAModelLM

GATHER_SECONDS = 0.005  # requests that arrive together shall share their first batch


class QueueIsFull(Exception):
    """There are as many waiting requests as the server holds."""


class _NobodyWaits(Exception):
    """Every client of the running batch has its answer or has gone."""


@dataclass
class Row:
    """One answer while it is decided: `canvas` holds token ids, None for a mask."""

    canvas: list[int | None]
    end_ids: frozenset[int]
    num_decided: int = 0  # length of the decided beginning
    end: int | None = None  # where the answer ends in that beginning

    def note(self, entry: dict[str, Any]) -> None:
        """Takes over one step of `generate`'s trace."""
        for position, token_id in zip(entry["positions"], entry["token_ids"], strict=True):
            self.canvas[position] = token_id
        for position in entry["remasked"]:
            self.canvas[position] = None
            self.num_decided = min(self.num_decided, position)
        while self.end is None and self.num_decided < len(self.canvas):
            token_id = self.canvas[self.num_decided]
            if token_id is None:
                return
            if token_id in self.end_ids:
                self.end = self.num_decided
            self.num_decided += 1

    def beginning(self, block_length: int) -> list[int]:
        """Token ids of the blocks that are finished, up to the answer's end."""
        if self.end is not None:
            return self.canvas[: self.end]
        return self.canvas[: self.num_decided // block_length * block_length]


@dataclass(eq=False)
class Job:
    """One request."""

    prompt_ids: list[int]
    suffix_ids: list[int]  # behind the answer, for infill; with them the answer fills its length
    settings: LLaDAGenerationConfig  # gen_length is this job's own; all else must be equal within a batch
    record_id: int  # with the settings' seed, the key of its random draws
    # Both are called in the engine's thread: on_step with (candidate, trace entry, row), on_done once, with
    # the candidates' token ids, each with whether it ended by itself, or with what ended the batch.
    on_step: Callable[[int, dict[str, Any], Row], None] | None
    on_done: Callable[[list[tuple[list[int], bool]] | Exception], None]
    is_cancelled: bool = False
    is_done: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return self.settings.num_return_sequences

    def batch_key(self) -> str:
        """Equal for jobs that may share a batch."""
        values = self.settings.to_dict() | {"gen_length": None}
        return repr((sorted(values.items(), key=str), bool(self.suffix_ids)))

    def finish(self, result: list[tuple[list[int], bool]] | Exception) -> None:
        if not self.is_done:
            self.is_done = True
            self.on_done(result)


class Engine:
    """A queue of jobs and the thread that works it off."""

    def __init__(self, model: LLaDAModelLM, *, max_batch_size: int, max_queue: int) -> None:
        self.model, self.end_ids = model, frozenset(model.config.end_ids)
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        self.num_running = self.num_forwards = 0
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_closing

    def submit(self, job: Job) -> None:
        """Queues a job. QueueIsFull: `max_queue` jobs wait already."""
        with self._changed:
            if self._is_closing or len(self._waiting) >= self.max_queue:
                raise QueueIsFull
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Answers what was accepted, then ends the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closing:
                    self._changed.wait()
                if not self._waiting:
                    return
            time.sleep(GATHER_SECONDS)
            batch = self._take()
            self.num_running = len(batch)
            try:
                if batch:
                    self._answer(batch)
            except _NobodyWaits:
                pass
            except Exception as error:  # the clients of this batch are told, the others go on
                for job in batch:
                    job.finish(error)
            self.num_running = 0

    def _take(self) -> list[Job]:
        """The oldest job, and those behind it that may share its batch."""
        batch: list[Job] = []
        with self._changed:
            left: deque[Job] = deque()
            num_rows = 0
            for job in self._waiting:
                if job.is_cancelled:
                    continue
                # a job larger than a batch goes alone
                fits = num_rows + job.num_rows <= self.max_batch_size or not batch
                if fits and (not batch or job.batch_key() == batch[0].batch_key()):
                    batch.append(job)
                    num_rows += job.num_rows
                else:
                    left.append(job)
            self._waiting = left
        return batch

    def _answer(self, batch: list[Job]) -> None:
        num = batch[0].num_rows
        for job in batch:
            job.rows = [Row([None] * job.settings.gen_length, self.end_ids) for _ in range(num)]
        # with remasking or without early stop, tokens behind a first end may still move it
        ends_early = batch[0].settings.early_stop and batch[0].settings.remdm == "none"

        def on_step(entry: dict[str, Any]) -> None:
            job, candidate = batch[entry["row"] // num], entry["row"] % num
            row = job.rows[candidate]
            row.note(entry)
            if job.on_step is not None and not job.is_cancelled and not job.is_done:
                job.on_step(candidate, entry, row)
            # of a batch's answers the short ones need not wait for the long ones
            if ends_early and row.end is not None and all(other.end is not None for other in job.rows):
                job.finish([(other.canvas[: other.end], True) for other in job.rows])
            if all(other.is_done or other.is_cancelled for other in batch):
                raise _NobodyWaits

        suffixes = [job.suffix_ids for job in batch]
        output = self.model.generate(
            [job.prompt_ids for job in batch],
            generation_config=batch[0].settings,
            return_dict_in_generate=True,
            gen_length=[job.settings.gen_length for job in batch],
            record_ids=[job.record_id for job in batch],
            on_step=on_step,
            **({"suffixes": suffixes} if any(suffixes) else {}),
        )
        self.num_forwards += output.forwards
        for i, job in enumerate(batch):
            answers = output.completions[i * num : (i + 1) * num]
            job.finish([(answer, len(answer) < job.settings.gen_length) for answer in answers])
