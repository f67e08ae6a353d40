"""Draws the curves of one or more runs side by side into a PNG.

Run:
    python scripts/plot_metrics.py --runs runs/quickstart/pretraining runs/quickstart/sft --output curves.png
"""

from dataclasses import dataclass
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of the plotter."""

    runs: list[str] = flag(help="Run folders, each with a metrics.jsonl.")
    output: str = flag(help="PNG file to write.")
    metrics: list[str] = flag(["loss", "eval_loss"], help="Names to draw, as in metrics.jsonl.")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import matplotlib.pyplot as plt

from llada.training.metrics import read_metrics


def main(argv: list[str] | None = None) -> None:
    """Draws one panel per run."""
    config = parse(Config, argv, description=__doc__)
    figure, panels = plt.subplots(
        1, len(config.runs), figsize=(5 * len(config.runs), 3.5), squeeze=False, constrained_layout=True
    )
    for panel, run in zip(panels[0], config.runs, strict=True):
        path = Path(run, "metrics.jsonl")
        if not path.is_file():
            raise ValueError(f"--runs {run}: no metrics.jsonl there")
        entries = list(read_metrics(path))
        for name in config.metrics:
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            if points:
                panel.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 12 else None)
        panel.set(title=Path(run).name, xlabel="step", ylabel="nats per token")
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(config.output, dpi=120)
    print(f"wrote {config.output}")


if __name__ == "__main__":
    run_main(main)
