"""Kills training runs with kill -9 at random steps; the resumed runs must end as if nothing had happened.

Every stage that trains (llada/training/stages.py) runs once undisturbed. Then runs of it are killed at a
random moment after a random step, started again by the same command, and must end with the same weights, bit
by bit, and the same loss curve. With --ranks 2 --resume_ranks 1 the run goes on with fewer processes: weights
then differ by rounding, and the loss curve must agree to --tolerance.

Run:
    python scripts/benchmarks/kill_test.py --kills 20 --output_dir runs/kill_test
    python scripts/benchmarks/kill_test.py --kills 2 --ranks 2 --resume_ranks 1 \\
        --output_dir runs/kill_test_ranks
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.training.stages import ROOT, STAGES, Stage

RUNS = {
    ", ".join(filter(None, [name, variant])): (stage, flags)
    for name, stage in STAGES.items()
    if stage.trains
    for variant, flags in {"": (), **stage.variants}.items()
}
"""What is killed: every stage that trains, plain and in its variants."""


@dataclass(kw_only=True)
class Config:
    """Flags of the test."""

    output_dir: str = flag(help="New folder for all runs.", writes="folder")
    stages: list[str] = flag(list(RUNS), help="What to kill, of: " + "; ".join(RUNS) + ".")
    kills: int = flag(20, help="Kills in all, spread over the stages.", at_least=1)
    steps: int = flag(60, help="Steps of a run; it saves every 5.", at_least=1)
    ranks: int = flag(1, help="Processes of a run until it is killed.", at_least=1)
    resume_ranks: int | None = flag(None, help="Processes afterwards; default the same.", at_least=1)
    tolerance: float = flag(
        1e-6, help="Of the loss curve where the number of ranks changes, relative.", above=0
    )
    seed: int = flag(0, help="Of the moments.", at_least=0)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np
import torch
from safetensors.torch import load_file

from llada.diffusion.masking import generator
from llada.training.metrics import read_metrics


def command_of(name: str, output: Path, config: Config, ranks: int) -> list[str]:
    """The command line of a run."""
    stage, flags = RUNS[name]
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [
        *start, str(ROOT / stage.script), "--config", str(ROOT / stage.debug_config), *flags,
        "--output_dir", str(output), "--max_steps", str(config.steps), "--save_interval", "5",
        "--log_interval", "1", *(["--micro_batch_size", "1"] if config.ranks > 1 else []),
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """One thread a process, so that sums are formed in one order."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def prepare(stage: Stage) -> None:
    """Runs the debug configs that come before that of `stage`, where runs/debug lacks their output."""
    for before in (STAGES[name] for name in stage.after):
        if not (ROOT / before.debug_output).exists():
            prepare(before)
            command = [sys.executable, str(ROOT / before.script), "--config", before.debug_config]
            subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)


def finish(command: list[str], output: Path) -> None:
    """Runs the command to its end; RuntimeError with its last words if it fails."""
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode or not (output / "DONE").exists():
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def kill_after(command: list[str], output: Path, steps: int, delay: float) -> int:
    """Starts the command, kills all its processes `delay` seconds after `steps` logged steps; steps then."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = output / "metrics.jsonl"
    while process.poll() is None and num_lines(metrics) < steps:
        time.sleep(0.002)
    time.sleep(delay)
    for number in [*children_of(process.pid), process.pid]:  # torchrun's workers outlive it
        os.kill(number, signal.SIGKILL)
    process.wait()
    if (output / "DONE").exists():
        raise RuntimeError(f"{output}: the run ended before it was killed; give more --steps")
    return num_lines(metrics)


def num_lines(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def children_of(parent: int) -> list[int]:
    """Processes that this process has started, from /proc."""
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[1]) == parent:
            children.append(int(status.parent.name))
    return children


def curve(output: Path) -> np.ndarray:
    """[steps, 2] step and loss."""
    entries = read_metrics(output / "metrics.jsonl")
    return np.array([(entry["step"], entry["loss"]) for entry in entries if "loss" in entry])


def compare(whole: Path, resumed: Path) -> tuple[bool, float]:
    """Whether the final weights are the same bit by bit, and the largest relative difference of a loss.

    Raises:
        RuntimeError: a step is missing or stands twice.
    """
    (file,) = (whole / "final").glob("*model.safetensors")
    expected, found = load_file(file), load_file(resumed / "final" / file.name)
    is_same = expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    a, b = curve(whole), curve(resumed)
    if a.shape != b.shape or not (a[:, 0] == b[:, 0]).all():
        raise RuntimeError(f"{resumed}: logged steps {b[:, 0].astype(int).tolist()}")
    # GRPO's loss is 0 at every step at which all answers to a prompt are equally good.
    return is_same, float((np.abs(a[:, 1] - b[:, 1]) / np.abs(a[:, 1]).clip(1e-12)).max())


def main(argv: list[str] | None = None) -> None:
    """Runs, kills, resumes and compares; RuntimeError if a run does not end as it should."""
    config = parse(Config, argv, description=__doc__)
    if unknown := set(config.stages) - set(RUNS):
        raise ValueError(f"--stages {sorted(unknown)}: choose from {'; '.join(RUNS)}")
    output_dir = Path(config.output_dir).absolute()
    if output_dir.exists():
        raise ValueError(f"--output_dir {output_dir}: exists; give a new folder")
    for name in config.stages:
        prepare(RUNS[name][0])
    resume_ranks = config.resume_ranks or config.ranks
    random = generator(config.seed, "kill test")
    wrong = []
    for number in range(config.kills):
        stage = config.stages[number % len(config.stages)]
        name = stage.replace(", ", "_")
        whole, killed = output_dir / name, output_dir / f"{name}_killed"
        if not whole.exists():
            finish(command_of(stage, whole, config, config.ranks), whole)
        shutil.rmtree(killed, ignore_errors=True)
        steps, delay = int(random.integers(1, config.steps - 15)), float(random.uniform(0, 0.3))
        at = kill_after(command_of(stage, killed, config, config.ranks), killed, steps, delay)
        state = (killed / "latest").read_text() if (killed / "latest").exists() else "the start"
        finish(command_of(stage, killed, config, resume_ranks), killed)
        is_same, off = compare(whole, killed)
        good = off <= config.tolerance if resume_ranks != config.ranks else is_same and off == 0.0
        wrong += [] if good else [number]
        print(
            f"{number + 1:3} {stage:20} killed after {at:3} logged steps, resumed from {state:10} on "
            f"{resume_ranks}: weights {'bitwise equal' if is_same else 'differ'}, losses off by {off:.1e}"
            f"{'' if good else '   WRONG'}",
            flush=True,
        )
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {config.kills} runs did not end as the undisturbed one")
    print(f"{config.kills} kills, {config.kills} runs as if nothing had happened")


if __name__ == "__main__":
    run_main(main)
