"""Alignment on the student's own tracks against stored answers, with the quickstart's teacher.

As a converter: the teacher's weights with full attention become a diffusion model, which is scored by the
share of held-out puzzles it solves.

    ce, kl     --positions masked on the teacher's stored answers: SFT on them, and its distributions
    answers    --on_policy answers: the student answers the prompts of those records, the teacher judges

As a drafter: the teacher in its causal form, scored by the acceptance length on held-out prompts.

    one        --positions windows at random places of the stored answers
    drafts     --on_policy drafts

Every arm trains for --steps at a constant rate and is scored on the way; CPU seconds are those of the
training so far, sampling included, tokens those it has been trained on. Finished parts are kept.

Run:
    python scripts/benchmarks/bench_on_policy.py --quickstart runs/quickstart --output_dir runs/on_policy \\
        --seeds 0 1 2
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main

MASKED, WINDOWS = {"positions": "masked"}, {"positions": "windows", "loss_type": "kl"}
ARMS = {
    "ce": ("convert", {**MASKED, "loss_type": "ce"}),
    "kl": ("convert", {**MASKED, "loss_type": "kl"}),
    "answers": ("convert", {"on_policy": "answers", "loss_type": "kl"}),
    "one": ("draft", WINDOWS),
    "drafts": ("draft", {**WINDOWS, "on_policy": "drafts"}),
}


@dataclass(kw_only=True)
class Config:
    """Flags of this benchmark."""

    quickstart: str = flag(
        "runs/quickstart", "Folder of the main job, up to its stage precompute_teacher.", reads="path"
    )
    output_dir: str = flag(help="Folder of everything that is made.", writes="folder")
    arms: list[str] = flag(list(ARMS), "Which to run.", choices=list(ARMS))
    seeds: list[int] = flag([0], "Seeds of the trainings.", at_least=0)
    steps: int = flag(200, "Steps of a training.", at_least=1)
    interval: int = flag(50, "Steps between scores.", at_least=1)
    batch_size: int = flag(32, "Records, or prompts, a step.", at_least=1)
    learning_rate: float = flag(1e-3, "Peak learning rate.", above=0)
    sampling_steps: int = flag(8, "Denoising steps of the student's answers, of 32 tokens.", at_least=1)
    num_prompts: int = flag(250, "Held-out prompts.", at_least=1)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from finished_runs import run_once
from llada.data.records import read_records
from llada.rewards.functions import puzzle_solved


def train(config: Config, folder: Path, arm: str, seed: int) -> dict[str, float]:
    """One training with all its states: CPU seconds and trained tokens."""
    start, flags = ARMS[arm]
    root, output = Path(config.quickstart), folder / f"{arm}-{seed}"
    data = root / "teacher_rows/train"
    if arm == "answers":
        data = folder / "prompts.jsonl"
        lines = (root / "data/sft.jsonl").read_text(encoding="utf-8").splitlines()[:4000]
        data.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        own = {"teacher": root / "teacher/final", "gen_length": 32, "steps": config.sampling_steps}
        flags = flags | own
    flags = flags | {
        "model_name_or_path": folder / start, "train_data_path": data, "output_dir": output,
        "max_steps": config.steps, "save_interval": config.interval, "save_total_limit": -1,
        "batch_size": config.batch_size, "seed": seed,
        "learning_rate": config.learning_rate, "lr_scheduler_type": "constant",
    }  # fmt: skip
    log = folder / f"{arm}-{seed}-log"
    if not log.exists():
        shutil.rmtree(output, ignore_errors=True)  # of a killed one the CPU seconds would be lost
    spent = run_once("alignment/train_kl.py", flags, log)
    return {"cpu_seconds": spent, "tokens": json.loads((output / "results.json").read_text())["num_tokens"]}


def score(config: Config, folder: Path, arm: str, seed: int, step: int) -> float:
    """Share of puzzles solved, or acceptance length, of one state."""
    root, state = Path(config.quickstart), folder / f"{arm}-{seed}-{step}"
    answers, report = (state.with_name(state.name + end) for end in (".jsonl", ".report.json"))
    held_out = root / "data/heldout.jsonl"
    common = {"prompts_file": held_out, "is_instruct": True, "output_path": answers}
    common |= {"max_samples": config.num_prompts, "model_name_or_path": state}
    of_step = {"run": folder / f"{arm}-{seed}", "step": step, "output_dir": state}
    run_once("scripts/export_checkpoint.py", of_step, folder / f"{state.name}-export")
    if ARMS[arm][0] == "draft":
        common |= {"verifier": root / "teacher/final", "draft_length": 8, "max_new_tokens": 32}
        common |= {"compare": False, "report_path": report}
        run_once("inference/speculative_decode.py", common, folder / f"{state.name}-log")
        return json.loads(report.read_text())["acceptance_length"]
    run_once("inference/generate.py", {**common, "gen_length": 32}, folder / f"{state.name}-log")
    records = [record for _, record in read_records(held_out)][: config.num_prompts]
    texts = [json.loads(line)["completion"] for line in answers.read_text(encoding="utf-8").splitlines()]
    return sum(puzzle_solved(*pair) for pair in zip(texts, records, strict=True)) / len(texts)


def main(argv: list[str] | None = None) -> None:
    """Trains, scores and prints the table."""
    config = parse(Config, argv, description=__doc__)
    folder, root = Path(config.output_dir), Path(config.quickstart)
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in (("convert", {"logit_shift": True}), ("draft", {"drafter": "causal"})):
        teacher = {"model_name_or_path": root / "teacher/final", "output_dir": folder / name}
        run_once("scripts/convert_ar.py", teacher | kind, folder / f"{name}-log")
    lines = [
        "| arm | seed | steps | CPU s | trained tokens | solved, or acceptance length |",
        "|---" * 6 + "|",
    ]
    for arm in config.arms:
        for seed in config.seeds:
            spent = train(config, folder, arm, seed)
            for step in range(config.interval, config.steps + 1, config.interval):
                done, value = step / config.steps, score(config, folder, arm, seed, step)
                cost = f"{done * spent['cpu_seconds']:.0f} | {done * spent['tokens']:.0f}"
                lines.append(f"| {arm} | {seed} | {step} | {cost} | {value:.3f} |")
                print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    run_main(main)
