"""The signals that stop a training, and what then happens."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# What SLURM and torchrun send before they kill, what a closed terminal sends, and Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# A terminal, a launcher and a pipeline may each pass on the same signal.
_SAME_SIGNAL_SECONDS = 1.0
_handlers_before: dict[int, Any] = {}


def leave_marker_on_signals(output_dir: str, *, is_main: bool) -> None:
    """From now on a signal outside the steps, while data are prepared or a model is loaded, ends the process.

    It leaves PREEMPTED in `output_dir`, as one between two steps does.
    """

    def stop(number: int, _: object) -> None:
        if is_main:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "PREEMPTED").touch()
            print("stopped by a signal outside the training steps; the same command continues", flush=True)
        sys.exit(exit_status(number))

    for number in STOP_SIGNALS:
        _handlers_before[number] = signal.signal(number, stop)


def give_signals_back() -> None:
    """To whoever had them before `leave_marker_on_signals`."""
    while _handlers_before:
        signal.signal(*_handlers_before.popitem())


def exit_status(number: int) -> int:
    """That of a run which a signal has stopped cleanly: 0, but after Ctrl-C a script must not go on."""
    return 128 + number if number == signal.SIGINT else 0


class StopSignal:
    """Within its body a stop signal is only noted, so that the loop can save; a second one aborts."""

    def __init__(self) -> None:
        self.number, self._came_at = 0, 0.0  # the signal that came; 0 = none
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number and time.monotonic() - self._came_at > _SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        self.number, self._came_at = number, time.monotonic()
        if sys.stderr.isatty():  # print() may not be interrupted by itself
            os.write(2, b"\nthe state is saved after this step; once more stops without saving\n")
