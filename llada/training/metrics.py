"""Where the numbers of a run go: the terminal, metrics.jsonl, and a tracker."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

# Behind all others in the terminal, where a line has no room for everything.
_LESS_WATCHED = (
    "tflops_per_second", "peak_memory_gb", "num_tokens", "share_data", "share_forward_backward",
    "share_optimizer",
)  # fmt: skip
Send = Callable[[Mapping[str, float], int], None]


class Metrics:
    """Numbers of a run, under the same names in the terminal, in metrics.jsonl and in the tracker.

    Made on every rank, where all but rank 0 give `folder` as None and write nothing.
    """

    def __init__(
        self,
        folder: Path | None,
        config: Mapping[str, Any],
        *,
        total_steps: int,
        first_step: int,
        report_to: str,
    ) -> None:
        self._folder = folder
        if folder is None:
            return
        for name in ("metrics.jsonl", "loss_spikes.jsonl", "ranks.jsonl"):
            _keep_lines_before(folder / name, first_step)
        self._width = shutil.get_terminal_size((110, 24)).columns
        self._bar = tqdm(
            total=total_steps, initial=first_step, desc=folder.name, unit="step", mininterval=2,
            ncols=min(100, self._width - 1),
        )  # fmt: skip
        is_over = first_step >= total_steps
        self._send, self._close = _tracker("none" if is_over else report_to, folder, config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line {"step", "time", names: values}."""
        if self._folder is None:
            return
        self._append("metrics.jsonl", {"step": step, "time": round(time.time(), 3), **values})
        self._bar.write(in_one_line(step, values, self._width))
        log.info("step %d: %s", step, " ".join(f"{name} {shown(value)}" for name, value in values.items()))
        self._send(values, step)

    def log_spike(self, step: int, spike: Mapping[str, Any]) -> None:
        """Appends one line to loss_spikes.jsonl, with the records of the step, and says so."""
        if self._folder is None:
            return
        self._append("loss_spikes.jsonl", {"step": step, **spike})
        self._bar.write(
            f"step {step}: loss {spike['loss']:.4g} is {spike['loss_spike']:.1f} standard deviations above "
            f"its mean; the records are in {self._folder / 'loss_spikes.jsonl'}"
        )

    def log_ranks(self, step: int, ranks: Mapping[str, list[float]]) -> None:
        """Appends one line to ranks.jsonl: what each rank spent, in the order of ranks."""
        if self._folder is not None:
            self._append("ranks.jsonl", {"step": step, **ranks})

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        with open(self._folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        if self._folder is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Ends the progress bar and the tracker's run."""
        if self._folder is not None:
            self._bar.close()
            self._close()


def shown(value: float) -> str:
    """Four digits, and no exponent for large numbers."""
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1e4 else f"{value:.4g}"


def in_one_line(step: int, values: Mapping[str, float], width: int) -> str:
    """The values that fit into a terminal's line, the most watched ones first; all are in metrics.jsonl."""
    names = [name for name in values if name not in _LESS_WATCHED]
    line = f"step {step}:"
    for name in [*names, *(name for name in _LESS_WATCHED if name in values)]:
        more = f" {name} {shown(values[name])}"
        if len(line) + len(more) > width:
            break
        line += more
    return line


def _tracker(kind: str, folder: Path, config: Mapping[str, Any]) -> tuple[Send, Callable[[], None]]:
    """How to send numbers to W&B, TensorBoard or trackio, and how to end that."""
    if kind == "none":
        return lambda values, step: None, lambda: None
    try:  # imported here: slow, and most runs do not use them
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(folder / "tensorboard")

            def add(values: Mapping[str, float], step: int) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)

            return add, writer.close
        named = {"project": config["wandb_project"], "name": config["run_name"] or folder.name}
        if kind == "trackio":
            import trackio

            trackio.init(**named, config=dict(config), resume="allow")
            return lambda values, step: trackio.log(dict(values), step=step), trackio.finish
        import wandb
    except ImportError as error:
        raise ValueError(f"--report_to {kind}: pip install {error.name or kind}") from error
    return _wandb(wandb, folder, config, named)


def _wandb(
    wandb: Any, folder: Path, config: Mapping[str, Any], named: dict[str, str]
) -> tuple[Send, Callable[[], None]]:
    noted = folder / "wandb_run_id"  # a resumed run continues the same curve
    known = noted.read_text().strip() if noted.exists() else None
    run = wandb.init(
        **named, id=config["wandb_run_id"] or known, config=dict(config), resume="allow",
        dir=os.environ.get("WANDB_DIR", str(folder)),
        settings=wandb.Settings(console="off"),  # else it takes the terminal, and the bar breaks in two
    )  # fmt: skip
    noted.write_text(run.id + "\n")

    def send(values: Mapping[str, float], step: int) -> None:
        if step >= run.step:  # W&B has the steps that a resumed run repeats, and wants them once
            run.log(dict(values), step=step)

    return send, run.finish


def read_metrics(path: str | Path) -> Iterator[dict[str, float]]:
    """The lines of a metrics.jsonl."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _keep_lines_before(path: Path, step: int) -> None:
    """A resumed run repeats the steps after its state: their first lines go, so that none stands twice."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the half-written last line of a killed run
        if entry["step"] <= step and step > 0:
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
