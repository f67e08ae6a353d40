"""Runs the stages of a project in order, and shows what each one gained.

The config file holds one section per stage, in the order in which they run; a section's keys are the flags of
the stage's script. A stage may run several times, as NAME:VARIANT. A section without `model_name_or_path`
gets the checkpoint of the last of pretraining and SFT before it; `{output_dir}` in a value stands for the
top-level `output_dir`. A finished stage is not run twice, a failed one stops the line. A section `heldout`,
or heldout:NAME, holds flags of generate.py for held-out prompts, and `after`, the stages whose checkpoints
answer them; with a `cache` their speed is shown beside that of the checkpoint before.

Run:
    python scripts/train_pipeline.py --config configs/quickstart.yaml --stage all
    python scripts/train_pipeline.py --config configs/quickstart.yaml --stage sft --dry_run  # prints commands
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llada.flags.parser import OneLineParser, run_main
from llada.flags.yaml_files import read_yaml
from llada.resumable import read_object
from llada.rewards.functions import puzzle_solved
from llada.training.signals import STOP_SIGNALS
from llada.training.stages import ROOT, STAGES, Stage, output_of

TAIL_LINES = 30
# Names in results.json that the table shows.
METRICS = {
    "eval_loss": "validation loss",
    "eval_accuracy": "validation accuracy",
    "eval_tau": "predicted acceptance length",
}


# Sections of the predecessor's config.yaml that only explain.
PROSE_SECTIONS = ("data_format", "hardware", "performance_tips")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags of this script; `--config` is the pipeline's file, not a file of flags."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", default="configs/pipeline.yaml", help="pipeline file (default %(default)s)"
    )
    parser.add_argument("--stage", default="all", help="which stage to run: a section of the file, or all")
    parser.add_argument("--resume_from_checkpoint", help="training state for the first training stage run")
    parser.add_argument("--sft_model_path", help="checkpoint for SFT instead of the pretraining's")
    parser.add_argument("--inference_model_path", help="checkpoint for inference instead of the last trained")
    parser.add_argument("--prompt", help="prompt of the inference stage")
    parser.add_argument("--is_instruct", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    return parser.parse_args(argv)


def script_of(section: str) -> Stage | None:
    """The stage that a section NAME or NAME:VARIANT runs."""
    return STAGES.get(section.partition(":")[0])


SHIPPED_DATA = {"pretraining": "./data/pretrain/train.jsonl", "sft": "./data/sft/train.jsonl"}


class Pipeline:
    """The commands of a config file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        config = read_yaml(arguments.config)
        known = {*STAGES, *PROSE_SECTIONS, "model", "output_dir", "heldout", "nproc_per_node"}
        unknown = [name for name in config if name.partition(":")[0] not in known]
        if unknown:
            raise self._wrong(f"unknown section {unknown[0]!r}; known: {sorted(known)}")
        self.output_dir = Path(config.get("output_dir", "checkpoints"))
        self.model = config.get("model") or {}
        self.nproc = int(config.get("nproc_per_node", 1))
        self.sections = {name: dict(config[name] or {}) for name in config if script_of(name)}
        self.heldout: dict[str, dict[str, Any]] = {}  # stage -> flags of generate.py after it
        for name, section in config.items():
            if name.partition(":")[0] != "heldout":
                continue
            if not {"after", "prompts_file"} <= set(section or {}):
                raise self._wrong(f"section {name!r} needs `after` and `prompts_file`")
            for stage in section["after"]:
                if stage not in self.sections:
                    raise self._wrong(f"section {name!r}: no section {stage!r} to come after")
                self.heldout[stage] = {flag: value for flag, value in section.items() if flag != "after"}

    def _wrong(self, message: str) -> ValueError:
        return ValueError(f"--config {self.arguments.config}: {message}")

    def selected(self) -> list[str]:
        """The stages to run, in order."""
        if self.arguments.stage == "all":
            return list(self.sections)
        if self.arguments.stage not in self.sections:
            raise ValueError(
                f"--stage {self.arguments.stage}: {self.arguments.config} has no such section; it has "
                f"{', '.join(self.sections)}"
            )
        return [self.arguments.stage]

    def checkpoint_before(self, stage: str) -> str | None:
        """The output folder of the last trunk stage before `stage`."""
        override = {"sft": "sft_model_path", "inference": "inference_model_path"}.get(stage)
        if override and getattr(self.arguments, override):
            return getattr(self.arguments, override)
        order = list(self.sections)
        earlier = [name for name in order[: order.index(stage)] if script_of(name).is_trunk]
        return self.flags(earlier[-1])["output_dir"] if earlier else self.model.get("name_or_path")

    def flags(self, stage: str) -> dict[str, Any]:
        """The flags of a stage: its section, and what the shared sections and earlier stages add."""
        flags = {name: self.fill(value) for name, value in self.sections[stage].items() if value is not None}
        script = script_of(stage)
        if stage == "eval":
            arguments = flags.get("model_args", "")
            if "model_path=" not in arguments:
                named = f"model_path={self.checkpoint_before(stage)}"
                flags["model_args"] = ",".join(filter(None, [named, arguments]))
            return flags
        if script.reads_checkpoint or (script.trains and "config_name" not in flags):
            flags.setdefault("model_name_or_path", self.checkpoint_before(stage))
        if script.trains:
            # what the predecessor's README leaves out of its config.yaml, as in the file that it ships
            flags.setdefault("output_dir", str(self.output_dir / stage.replace(":", "-")))
            if stage in SHIPPED_DATA and "config_name" not in flags:
                flags.setdefault("train_data_path", SHIPPED_DATA[stage])
            for name in ("tokenizer_name", "max_length", "dtype"):
                if self.model.get(name) is not None:
                    flags.setdefault(name, self.fill(self.model[name]))
            if self.arguments.resume_from_checkpoint and stage == self.selected()[0]:
                flags["resume_from_checkpoint"] = self.arguments.resume_from_checkpoint
        if stage == "inference":
            self._add_inference(flags)
        return flags

    def _add_inference(self, flags: dict[str, Any]) -> None:
        """The predecessor's spelling of the method, and the flags of this script."""
        if "default_method" in flags:
            flags["method"] = flags.pop("default_method")
        if flags.get("method") != "semi_autoregressive_padding":
            flags.pop("block_length", None)
        if self.arguments.prompt:
            flags["prompt"] = self.arguments.prompt
        elif "prompts_file" not in flags:
            flags.setdefault("prompt", "What is the capital of France?")
        if self.arguments.is_instruct:
            flags["is_instruct"] = True

    def fill(self, value: Any) -> Any:
        """The value with {output_dir} replaced, in the items of a list too."""
        if isinstance(value, list):
            return [self.fill(item) for item in value]
        return value.replace("{output_dir}", str(self.output_dir)) if isinstance(value, str) else value

    def command(self, stage: str) -> list[str]:
        """The exact command of a stage."""
        script = script_of(stage)
        start = [sys.executable]
        if self.nproc > 1 and (script.trains or script.reads_checkpoint):
            # Its own patience with a stopped process is 30 s: too little for a save.
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc}"]
            start += ["--shutdown-timeout=300", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGHUP"]
        return [*start, str(ROOT / script.script), *as_arguments(self.flags(stage))]

    def heldout_command(self, stage: str) -> tuple[list[str], Path]:
        """Generation on the held-out prompts with the checkpoint of `stage`, and its output file."""
        output = self.output_dir / "heldout" / f"{stage}.jsonl"
        flags = {name: self.fill(value) for name, value in self.heldout[stage].items()}
        flags |= {"model_name_or_path": self.flags(stage)["output_dir"], "output_path": str(output)}
        flags["report_path"] = str(output.with_suffix(".json"))
        return [sys.executable, str(ROOT / STAGES["inference"].script), *as_arguments(flags)], output


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Command-line arguments that say the same as a mapping of flags."""
    arguments: list[str] = []
    for name, value in flags.items():
        if value is False:
            arguments.append(f"--{name}=false")
        elif value is True:
            arguments.append(f"--{name}")
        else:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def run_once(name: str, command: list[str], logs: Path, marker: Path | None = None) -> float:
    """Runs a command unless it has finished before; its seconds. Stops the program if it fails or is stopped.

    `marker` is what a training leaves when a signal stops it; it then ends with status 0.
    """
    logs.mkdir(parents=True, exist_ok=True)
    mark = logs / f"{name}.done"
    text = shlex.join(command)
    if mark.is_file():
        done = read_object(mark, "command", "seconds")
        if done["command"] == text:  # the same flags: a changed config runs again
            print(f"== {name}: finished before, in {done['seconds']} s", flush=True)
            return done["seconds"]
    print(f"== {name}: {text}", flush=True)
    started = time.time()
    log = logs / f"{name}.log"
    with (
        open(log, "wb") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
        passing_on_signals(process) as received,
    ):
        while chunk := process.stdout.read1(65536):  # what there is, not a full buffer: progress bars move
            file.write(chunk)
            file.flush()
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    was_saved = marker is not None and marker.exists()
    if received or was_saved:
        if not was_saved:  # else the training has said it
            print(f"== {name}: stopped by a signal; the same command continues", flush=True)
        raise SystemExit(128 + max(received, default=signal.SIGTERM))
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        print(f"\n== {name} failed with status {process.returncode}; the end of {log}:", *tail, sep="\n")
        raise SystemExit(process.returncode)
    seconds = round(time.time() - started, 1)
    mark.write_text(json.dumps({"command": text, "seconds": seconds}))
    return seconds


@contextmanager
def passing_on_signals(process: subprocess.Popen) -> Iterator[list[int]]:
    """Within its body stop signals are noted and go to the process, which saves; else we would end first."""
    received: list[int] = []

    # The process may also get them from whoever signals the whole group; `fit` takes both for one.
    def pass_on(number: int, _: object) -> None:
        received.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def accuracy_by_task(completions: Path, prompts: Path) -> dict[str, float]:
    """Share of held-out puzzles solved, for each task."""
    records = {
        record["id"]: record for record in map(json.loads, prompts.read_text(encoding="utf-8").splitlines())
    }
    solved: dict[str, list[float]] = {}
    for line in completions.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        record = records[answer["id"]]
        solved.setdefault(record["task"], []).append(puzzle_solved(answer["completion"], record))
    return {task: sum(values) / len(values) for task, values in solved.items()}


def stage_rows(
    stage: str, flags: Mapping[str, Any], seconds: float, earlier: list[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """The table's lines about a finished stage: what its own results files say, or that it ran.

    `earlier` are the lines above; an earlier variant of the stage shows what was before.
    """
    folder = output_of(flags)
    found: list[tuple[str, str, str]] = []  # metric, before, after
    if (folder / "results.json").is_file():
        values = read_object(folder / "results.json")
        found = [
            (label, f"{values[f'{name}_before']:.3f}", f"{values[name]:.3f}")
            for name, label in METRICS.items()
            if f"{name}_before" in values
        ]
    elif stage == "eval":
        newest = max(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
        found = [
            (f"lm_eval {task} {name.partition(',')[0]}", "", f"{value:.1%}")
            for task, values in json.loads(newest.read_text())["results"].items()
            for name, value in values.items()
            if isinstance(value, float) and "stderr" not in name
        ]
    elif "report_path" in flags:
        figures = read_object(Path(flags["report_path"]), "acceptance_length")
        name = stage.partition(":")[0]
        before = next((row[3] for row in earlier if row[0].partition(":")[0] == name), "")
        found = [("acceptance length", before, f"{figures['acceptance_length']:.3f}")]
    return [(stage, *row, f"{seconds:.0f}", str(folder)) for row in found or [("", "", "")]]


def main(argv: list[str] | None = None) -> None:
    """Runs, or prints, the selected stages; ends with a table of what each one gained."""
    arguments = parse_arguments(argv)
    pipeline = Pipeline(arguments)
    rows: list[tuple[str, ...]] = []
    accuracy: dict[str, dict[str, float]] = {}  # checkpoint -> task -> share solved
    rates: dict[str, str] = {}  # checkpoint -> tokens of answers a second
    for stage in pipeline.selected():
        command = pipeline.command(stage)
        heldout = pipeline.heldout.get(stage)
        if arguments.dry_run:
            print(shlex.join(command))
            if heldout:
                print(shlex.join(pipeline.heldout_command(stage)[0]))
            continue
        logs = pipeline.output_dir / "logs"
        flags = pipeline.flags(stage)
        seconds = run_once(stage, command, logs, output_of(flags) / "PREEMPTED")
        rows += stage_rows(stage, flags, seconds, rows)
        if heldout:
            command, completions = pipeline.heldout_command(stage)
            completions.parent.mkdir(parents=True, exist_ok=True)
            seconds = run_once(f"heldout_{stage}", command, logs)
            solved = accuracy_by_task(completions, Path(pipeline.fill(heldout["prompts_file"])))
            start = flags.get("model_name_or_path")
            before = accuracy.get(start, {})
            accuracy[flags["output_dir"]] = solved
            for task, value in solved.items():
                shown = f"{before[task]:.1%}" if task in before else ""
                rows.append(
                    (stage, f"held-out {task}", shown, f"{value:.1%}", f"{seconds:.0f}", str(completions))
                )
            report = completions.with_suffix(".json")
            rate = rates[flags["output_dir"]] = f"{read_object(report)['tokens_per_second']:.0f}"
            if "cache" in heldout:
                rows.append((stage, "tokens/s", rates.get(start, ""), rate, f"{seconds:.0f}", str(report)))
    if not arguments.dry_run:
        finish(pipeline, rows)


def finish(pipeline: Pipeline, rows: list[tuple[str, ...]]) -> None:
    """Prints the table, and draws the loss curves of the training stages."""
    header = ("stage", "held-out metric", "before", "after", "seconds", "folder")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print()
    for row in [header, tuple("-" * width for width in widths), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    runs = [pipeline.flags(stage)["output_dir"] for stage in pipeline.selected() if script_of(stage).trains]
    if runs:
        curves = pipeline.output_dir / "loss_curves.png"
        script = str(ROOT / "scripts/plot_metrics.py")
        command = [sys.executable, script, "--runs", *runs, "--output", str(curves), "--overwrite"]
        if status := subprocess.run(command).returncode:  # it has said why
            raise SystemExit(status)


if __name__ == "__main__":
    run_main(main)
