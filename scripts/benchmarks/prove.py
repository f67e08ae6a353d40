"""Runs the proof of every claim and writes the table claim | published | ours | interval | command.

A proof is a program of this repository that anyone can run alone: an exact test (a sum over all masks, draws
or trajectories of a small model) or a measurement with its interval. A row that does not hold ends the run
with status 1, after the table is written.

Run:
    python scripts/benchmarks/prove.py --output docs/proofs.md
    python scripts/benchmarks/prove.py --only order variance --output proofs.md
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of this script."""

    output: str = flag("docs/proofs.md", help="Page to write.", writes="store")
    only: list[str] = flag([], help="Proofs to run, by name; default all.")
    input: list[str] = flag([], help="Published generations (d1's) to grade again.", reads="path")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from llada.training.stages import ROOT

Found = tuple[str, str, bool]
"""What was found, its interval, and whether the claim holds."""


@dataclass(frozen=True)
class Proof:
    """A claim and the command that proves it; `read` makes its finding of the command's output."""

    name: str
    claim: str
    published: str
    command: str
    read: Callable[[str], list[tuple[str, Found]]] | None = None  # more rows of their own; None: a test


def tests(name: str, claim: str, published: str, *names: str) -> Proof:
    """A claim that exact tests prove."""
    return Proof(name, claim, published, f"python -m pytest -q {' '.join(names)}")


def read_tests(output: str) -> Found:
    """pytest's last line."""
    passed = re.search(r"(\d+) passed", output)
    failed = re.search(r"(\d+) (failed|error)", output)
    return f"{passed[1] if passed else 0} tests pass", "exact", bool(passed) and not failed


def read_orders(output: str) -> list[tuple[str, Found]]:
    """The rows of bench_orders.py that the claim is about."""
    result = json.loads(output)
    floor = result["the chain itself"]["tv_interval"][1]
    rows = []
    for order in ("low_confidence", "random", "max_probability", "margin", "entropy"):
        found = result[f"{order}, one token a step"]
        is_exact = found["tv"] <= floor * 1.5
        text = f"TV {found['tv']:.4f}, {found['nats']:.3f} nats/token"
        interval = "TV [{:.4f}, {:.4f}]".format(*found["tv_interval"])
        rows.append((order, (text, interval, is_exact == (order != "low_confidence"))))
    return rows


def read_variance(output: str) -> list[tuple[str, Found]]:
    """Variance ratios of bench_variance.py: only a scheme that the claim names must be lower."""
    rows = []
    for name, scheme in json.loads(output)["schemes"].items():
        ratio, low, high = scheme["variance"]
        holds = high < 1.0 if "exact" in name else True
        rows.append((name, (f"{ratio:.2f} of iid", f"[{low:.2f}, {high:.2f}]", holds)))
    return rows


def read_estimators(output: str) -> list[tuple[str, Found]]:
    """Squared errors of bench_coverage.py's estimators over that of VRPO's independent masks."""
    found = {each["estimator"]: each for each in json.loads(output)["found"]}
    rows = []
    for name in ("stratified", "complementary"):
        ratio = (found[name]["rms_error"] / found["iid"]["rms_error"]) ** 2
        covered = f"printed error x 1.96 covers {found[name]['covered_196']:.0%}"
        rows.append((name, (f"{ratio:.2f} of iid", covered, ratio < 1 and found[name]["covered_196"] > 0.85)))
    return rows


def read_kills(output: str) -> list[tuple[str, Found]]:
    """The last line of kill_test.py."""
    line = output.strip().splitlines()[-1]
    return [("", (line, "bitwise", True))]  # it fails where a run does not end as the undisturbed one


def read_grades(output: str) -> list[tuple[str, Found]]:
    """The counts of grade_generations.py, a row a file."""
    return [("", (line.strip(), "", True)) for line in output.splitlines() if re.match(r"\S+: ", line)]


PROOFS = [
    tests("loss", "the training loss is the exact sum over all masks", "LLaDA eq. 3",
          "tests/test_losses.py", "tests/test_masking.py"),
    tests("bound", "estimators of the bound are unbiased, two passes give the gradient of one", "LLaDA eq. 6",
          "tests/test_elbo.py", "tests/test_likelihood.py"),
    tests("blocks", "block diffusion is the AR loss at blocks of one token and LLaDA's at one full block",
          "BD3LM", "tests/test_block_diffusion.py"),
    tests("sampler", "the sampler's tokens are those of the published program", "LLaDA generate.py",
          "tests/test_generation_llada.py"),
    tests("policy gradient", "GRPO's gradient is that of the expected reward, by enumeration", "exact",
          "tests/test_policy_gradient.py"),
    tests("speculation", "speculative decoding has the verifier's distribution", "exact",
          "tests/test_speculative.py", "tests/test_acceptance.py"),
    Proof("order", "orders that do not look at the draw sample the model, the published one does not",
          "low_confidence TV 0.750, max_probability 0.009 (another chain)",
          "python scripts/benchmarks/bench_orders.py --num_samples 2000 --output {json}", read_orders),
    Proof("variance", "exact counts of masked tokens lower the variance of the loss", "-",
          "python scripts/benchmarks/bench_variance.py --data data/samples/pretrain.jsonl --length 32"
          " --num_records 16 --gradient_draws 0 --output {json}", read_variance),
    Proof("estimators", "masks of policies are less noisy than VRPO's, and errors say how noisy", "iid: 1",
          "python scripts/benchmarks/bench_coverage.py --num_masks 8 --output {json}", read_estimators),
    Proof("kills", "a killed run ends as if nothing had happened", "-",
          "python scripts/benchmarks/kill_test.py --kills 5 --output_dir {folder}", read_kills),
]  # fmt: skip


def run(proof: Proof) -> tuple[list[tuple[str, Found]], float]:
    """The rows that a proof gives, and its seconds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        places = {"json": f"{folder}/out.json", "folder": f"{folder}/runs"}
        command = [sys.executable if word == "python" else word for word in shlex.split(proof.command)]
        command = [word.format(**places) if "{" in word else word for word in command]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        output = done.stdout
        if "{json}" in proof.command and done.returncode == 0:
            output = Path(places["json"]).read_text()
    seconds = time.monotonic() - started
    if proof.read is None:
        return [("", read_tests(output))], seconds
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [("", (f"failed: {last}", "", False))], seconds
    return proof.read(output), seconds


def page_of(rows: list[list[Any]], seconds: float) -> str:
    """The whole page."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    head = (
        "# Proofs\n\nWritten by `bash scripts/prove.sh` in "
        f"{seconds / 60:.0f} minutes at {commit}, {os.cpu_count()} cores ({platform.machine()}). Each "
        "line can be run alone.\n\n| claim | published | ours | interval | holds | seconds | command |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def main(argv: list[str] | None = None) -> None:
    """Writes the page; ends with status 1 if a claim does not hold."""
    config = parse(Config, argv, description=__doc__)
    proofs = list(PROOFS)
    if config.input:
        command = shlex.join(["python", "scripts/benchmarks/grade_generations.py", "--input", *config.input])
        proofs.append(
            Proof("grades", "published generations, graded again", "d1's parser", command, read_grades)
        )
    names = [proof.name for proof in proofs]
    if unknown := set(config.only) - set(names):
        raise ValueError(f"--only {sorted(unknown)[0]}: no such proof; there are {', '.join(names)}")
    rows, started, failed = [], time.monotonic(), []
    for proof in proofs:
        if config.only and proof.name not in config.only:
            continue
        found, seconds = run(proof)
        for part, (ours, interval, holds) in found:
            claim = f"{proof.claim}: {part}" if part else proof.claim
            answer = "yes" if holds else "**no**"
            rows.append(
                [claim, proof.published, ours, interval, answer, round(seconds), f"`{proof.command}`"]
            )
            print(f"{answer:6s} {claim}: {ours} {interval} ({seconds:.0f} s)", flush=True)
            failed += [] if holds else [claim]
    Path(config.output).write_text(page_of(rows, time.monotonic() - started), encoding="utf-8")
    print(f"{len(rows)} rows -> {config.output}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
