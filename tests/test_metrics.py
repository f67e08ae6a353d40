"""What a person reads: lines that fit, numbers that are rounded, trackers that continue."""

import json
import sys
from types import SimpleNamespace

import pytest

from conftest import load_script
from llada.training.metrics import Metrics, in_one_line, shown

VALUES = {"loss": 6.99612, "grad_norm": 4.62, "learning_rate": 0.00093816, "rewards/chosen": -1.887e-08}
VALUES |= {"tokens_per_second": 1234567.8, "share_data": 0.1288, "num_tokens": 3e9}
CONFIG = {"wandb_project": "p", "run_name": None, "wandb_run_id": None}


def test_numbers_have_four_digits_and_large_ones_no_exponent():
    assert [shown(value) for value in (6.99612, 1234567.8, -12345.6, 9.38e-5, float("inf"), 0.0)] == [
        "6.996", "1,234,568", "-12,346", "9.38e-05", "inf", "0",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [20, 80, 110, 1000])
def test_a_line_fits_its_terminal(width):
    line = in_one_line(7, VALUES, width)
    assert line.startswith("step 7: loss 6.996") and len(line) <= width
    assert ("share_data" in line) == (width == 1000)


class Tracker:
    """Stands where W&B would be."""

    Settings = SimpleNamespace

    def __init__(self):
        self.started, self.logged, self.step, self.finish = [], [], 0, lambda: None

    def init(self, **options):
        self.started.append(options)
        self.id = options["id"] or f"run{len(self.started)}"
        return self

    def log(self, values, step):
        self.logged.append((step, values))
        self.step = step + 1


def test_a_resumed_run_continues_its_wandb_run(tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    config = CONFIG | {"report_to": "wandb"}
    for first in (0, 2):  # the second one repeats step 3
        metrics = Metrics(tmp_path, config, total_steps=4, first_step=first, report_to="wandb")
        for step in (1, 2, 3) if first == 0 else (3, 4):
            metrics.log(step, {"loss": 1.0})
        metrics.close()
    assert [options["id"] for options in tracker.started] == [None, "run1"]
    assert [step for step, _ in tracker.logged] == [1, 2, 3, 4]
    assert tracker.started[0]["dir"] == str(tmp_path) and tracker.started[0]["settings"].console == "off"
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    Metrics(
        tmp_path, config | {"wandb_run_id": "mine"}, total_steps=9, first_step=4, report_to="wandb"
    ).close()
    assert (tracker.started[2]["dir"], tracker.started[2]["id"]) == ("elsewhere", "mine")
    Metrics(
        tmp_path, config, total_steps=4, first_step=4, report_to="wandb"
    ).close()  # a finished run opens none
    assert len(tracker.started) == 3


@pytest.mark.parametrize("kind", ["wandb", "tensorboard", "trackio"])
def test_a_missing_tracker_is_named(kind, tmp_path, monkeypatch):
    for name in ("wandb", "trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"--report_to {kind}: pip install"):
        Metrics(tmp_path, CONFIG, total_steps=4, first_step=0, report_to=kind)


def test_a_panel_holds_one_metric_of_all_runs(tmp_path, monkeypatch):
    plot = load_script("scripts/plot_metrics.py")
    for run in "ab":
        (tmp_path / run / "sft").mkdir(parents=True)
        lines = [{"step": step, "loss": 1 / step, "tokens_per_second": 1e5} for step in (1, 2)]
        (tmp_path / run / "sft/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    flags = ["--runs", *(str(tmp_path / run / "sft") for run in "ab"), "--output", str(tmp_path / "c.png")]
    plot.main([*flags, "--metrics", "loss", "tokens_per_second", "eval_loss"])
    panels = figures[0].axes
    assert [(panel.get_title(), panel.get_ylabel()) for panel in panels] == [
        ("loss", "nats per token"), ("tokens_per_second", "tokens / s"),
    ]  # fmt: skip
    assert all(len(panel.lines) == 2 for panel in panels)
    assert {line.get_label() for line in panels[0].lines} == {str(tmp_path / run / "sft") for run in "ab"}
    with pytest.raises(ValueError, match=r"--metrics \['lossy'\]: none was logged; there are \['loss', "):
        plot.main([*flags[:-1], str(tmp_path / "d.png"), "--metrics", "lossy"])
