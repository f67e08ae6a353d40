"""Draws the curves of one or more runs into a PNG: a panel for each metric, all runs in it.

Run:
    python scripts/plot_metrics.py --runs runs/quickstart/pretraining runs/quickstart/sft --output curves.png
"""

import io
from dataclasses import dataclass
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of the plotter."""

    runs: list[str] = flag(help="Run folders, each with a metrics.jsonl.", reads="path")
    output: str = flag(help="PNG file to write.", writes="file")
    metrics: list[str] = flag(["loss", "eval_loss"], help="Names to draw, as in metrics.jsonl.")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import matplotlib

from llada.resumable import write_atomically
from llada.training.metrics import read_metrics

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

# Axis labels by the name's last part; of others the name says it.
UNITS = {
    "loss": "nats per token", "tokens_per_second": "tokens / s", "peak_memory_gb": "1e9 bytes",
    "tflops_per_second": "1e12 FLOP / s", "num_tokens": "tokens",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Draws one panel per metric."""
    config = parse(Config, argv, description=__doc__)
    curves = {}
    for run in config.runs:
        path = Path(run, "metrics.jsonl")
        if not path.is_file():
            raise ValueError(f"--runs {run}: no metrics.jsonl there")
        curves[run] = list(read_metrics(path))
    known = {name for entries in curves.values() for entry in entries for name in entry}
    names = [name for name in config.metrics if name in known]
    if not names:
        raise ValueError(f"--metrics {config.metrics}: none was logged; there are {sorted(known)}")
    figure, panels = plt.subplots(
        1, len(names), figsize=(5 * len(names), 3.5), squeeze=False, constrained_layout=True
    )
    # a folder's name where it tells the runs apart
    short = [Path(run).name for run in config.runs]
    labels = short if len(set(short)) == len(short) else config.runs
    for panel, name in zip(panels[0], names, strict=True):
        for label, entries in zip(labels, curves.values(), strict=True):
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            if points:
                marker = "o" if len(points) < 12 else None
                panel.plot(*zip(*points, strict=True), label=label, marker=marker)
        unit = UNITS.get(name.removeprefix("eval_"), "")
        panel.set(title=name, xlabel="step", ylabel=unit)
        panel.legend()
        panel.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    write_atomically(Path(config.output), drawn.getvalue())
    plt.close(figure)
    print(f"wrote {config.output}")


if __name__ == "__main__":
    run_main(main)
