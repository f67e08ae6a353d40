"""What post-training gains on sudoku, from one half-trained SFT checkpoint: GRPO three ways, DPO, ELBO-KTO.

For every method and seed: train (for DPO and KTO on preferences made from the checkpoint's own answers), then
solve the held-out puzzles, whose solutions occur in no training puzzle, at temperature 0. The interval of a
gain is a bootstrap over seeds and puzzles, each puzzle compared with itself before training. CPU minutes are
those of all processes of a run, preferences included, evaluation not. Finished runs are not repeated.

--remasking samples rollouts and preferences in another order. --num_samples N also draws N answers to each of
the first 50 puzzles from the trained model (temperature 1, max_probability, one token a step: its own
distribution) and counts, for a puzzle, the distinct ones and the distinct correct ones.

Run:
    from=runs/quickstart  # after the main job
    python scripts/make_quickstart_data.py --num_heldout 500 --num_prompts 12000 \\
        --output_dir runs/bench/data
    python sft_training/train_sft.py --model_name_or_path $from/pretraining \\
        --train_data_path $from/data/sft.jsonl --max_length 96 --eos_padding --batch_size 64 \\
        --max_steps 450 --learning_rate 2e-3 --lr_scheduler_type constant --warmup_steps 50 \\
        --output_dir runs/bench/half
    python scripts/benchmarks/bench_posttraining.py --checkpoint runs/bench/half/final \\
        --data runs/bench/data --output_dir runs/bench/posttraining --seeds 1 2 3

The table is printed and written to --output_dir/table.md; docs/results.md holds one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.flags.yaml_files import read_yaml
from modelling_final.orders_llada import ORDERS

ROOT = Path(__file__).resolve().parents[2]


@dataclass(kw_only=True)
class Config:
    """Flags of the benchmark."""

    checkpoint: str = flag(help="The SFT checkpoint that every run starts from.", reads="model")
    data: str = flag(help="Folder of make_quickstart_data.py: prompts.jsonl and heldout.jsonl.", reads="path")
    output_dir: str = flag(help="Folder of the runs and of the table.", writes="folder")
    methods_file: str = flag(
        str(ROOT / "configs/bench_posttraining.yaml"),
        help="Flags of every method, and what all share.",
        reads="path",
    )
    methods: list[str] | None = flag(None, help="Only these; default all of the file.")
    seeds: list[int] = flag([1, 2, 3], help="Each method runs once for each.", at_least=0)
    task: str = flag("mini_sudoku", help="Puzzles of the data that count.")
    max_heldout: int | None = flag(None, help="Only the first so many held-out puzzles.", at_least=1)
    remasking: str | None = flag(
        None, help="Order of rollouts and preferences; default --methods_file's.", choices=tuple(ORDERS)
    )
    num_samples: int = flag(0, help="Answers to a puzzle for diversity; 0: none.", at_least=0)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np

from finished_runs import interval, records_of_task, run_once
from llada.rewards.functions import puzzle_solved


@dataclass
class Bench:
    """The commands of the benchmark and their results."""

    config: Config

    def __post_init__(self) -> None:
        self.folder = Path(self.config.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        sections = read_yaml(self.config.methods_file)
        self.shared = sections.pop("shared", {})
        self.preferences = sections.pop("preferences", {})
        self.heldout_flags = sections.pop("heldout", {})
        self.sections = sections
        if self.config.remasking is not None:
            rollouts = [s for s in sections.values() if s["script"] == "rlhf/train_grpo.py"]
            for sampling in [self.preferences, *rollouts]:
                sampling["remasking"] = self.config.remasking
        unknown = [name for name in self.config.methods or [] if name not in sections]
        if unknown:
            raise ValueError(f"--methods {unknown}: {self.config.methods_file} has {', '.join(sections)}")
        self.prompts = self._only_task("prompts.jsonl", None)
        self.heldout = self._only_task("heldout.jsonl", self.config.max_heldout)

    def _only_task(self, name: str, limit: int | None) -> Path:
        """A file with the records of --task alone."""
        lines = records_of_task(Path(self.config.data, name), self.config.task)[:limit]
        path = self.folder / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    def run(self, script: str, flags: dict[str, object], folder: Path) -> float:
        """Runs a script unless it has finished before; its CPU seconds."""
        return run_once(script, flags, folder)

    def solved(self, checkpoint: Path | str, folder: Path) -> np.ndarray:
        """[puzzles] whether the checkpoint solves each held-out puzzle."""
        answers = self.answers(checkpoint, folder / "heldout")
        return np.array([puzzle_solved(entry["completion"], record) for record, entry in answers])

    def distinct(self, checkpoint: Path | str, folder: Path) -> tuple[float, float]:
        """Of --num_samples answers to a puzzle, on average: the distinct ones, and the correct among them."""
        drawn = {"temperature": 1, "remasking": "max_probability", "max_samples": 50}
        drawn |= {"num_return_sequences": self.config.num_samples, "batch_size": 25}
        answers = self.answers(checkpoint, folder / "samples", **drawn)
        kinds = [(record, set(entry["completions"])) for record, entry in answers]
        right = [sum(puzzle_solved(text, record) for text in texts) for record, texts in kinds]
        return float(np.mean([len(texts) for _, texts in kinds])), float(np.mean(right))

    def answers(self, checkpoint: Path | str, folder: Path, **flags: object) -> list[tuple[dict, dict]]:
        """(puzzle, what generate.py wrote for it)."""
        path = folder.with_name(f"{folder.name}_answers.jsonl")
        if not path.is_file():
            wanted = {"model_name_or_path": checkpoint, "prompts_file": self.heldout, "output_path": path}
            self.run("inference/generate.py", {**self.heldout_flags, **wanted, **flags}, folder)
        records = [json.loads(line) for line in self.heldout.read_text(encoding="utf-8").splitlines()]
        by_id = {entry["id"]: entry for entry in map(json.loads, path.open(encoding="utf-8"))}
        return [(record, by_id[record["id"]]) for record in records if record["id"] in by_id]

    def train(self, method: str, seed: int) -> tuple[Path, float]:
        """The run's folder and its CPU seconds, preferences included."""
        section = dict(self.sections[method])
        script = section.pop("script")
        uses, precompute = section.pop("uses", None), section.pop("precompute", None)
        folder, seconds = self.folder / method / f"seed-{seed}", 0.0
        flags = {**self.shared, **section, "model_name_or_path": self.config.checkpoint, "seed": seed}
        if uses is None:
            flags["train_data_path"] = self.prompts
        else:
            made = self.folder / "preferences" / f"seed-{seed}"
            wanted = {"model_name_or_path": self.config.checkpoint, "prompts_file": self.prompts}
            wanted |= {"output_dir": made, "seed": seed}
            seconds += self.run("rlhf/make_preferences.py", {**self.preferences, **wanted}, made)
            flags["train_data_path"] = made / uses
        if precompute is not None:
            wanted = {"model_path": self.config.checkpoint, "dataset": flags["train_data_path"]}
            flags["train_data_path"] = wanted["output_file"] = folder / "bref.jsonl"
            seconds += self.run("rlhf/precompute_bref.py", {**precompute, **wanted}, folder / "bref")
        seconds += self.run(script, {**flags, "output_dir": folder / "run"}, folder)
        return folder, seconds


def table_row(
    method: str, before: np.ndarray, after: np.ndarray, minutes: list[float], kinds: list[tuple[float, float]]
) -> str:
    """A line of the table: [puzzles] before, [seeds, puzzles] after; kinds: of each seed's samples."""
    gains = 100 * (after - before)
    low, high = interval(gains)
    each = ", ".join(f"{100 * row.mean():.1f}" for row in after)
    line = (
        f"| {method} | {100 * before.mean():.1f} | {100 * after.mean():.1f} ({each}) | "
        f"{gains.mean():+.1f} [{low:+.1f}, {high:+.1f}] | {np.mean(minutes):.1f} |"
    )
    if kinds:
        distinct, right = zip(*kinds, strict=True)
        line += f" {np.mean(distinct):.2f} | {np.mean(right):.2f} ({', '.join(f'{n:.2f}' for n in right)}) |"
    return line


def main(argv: list[str] | None = None) -> None:
    """Runs what is not there yet, and makes the table."""
    config = parse(Config, argv, description=__doc__)
    bench = Bench(config)
    before = bench.solved(config.checkpoint, bench.folder / "before")
    lines = [
        f"Held-out {config.task}: {len(before)} puzzles, {len(config.seeds)} seeds, percent solved.",
        "",
        "| method | before | after (each seed) | gain [95 %] | CPU minutes |",
        "|---|---|---|---|---|",
    ]
    if config.num_samples:
        of_start = bench.distinct(config.checkpoint, bench.folder / "before")
        lines[2] += f" distinct of {config.num_samples} | distinct and correct |"
        lines[3] += "---|---|"
        lines[0] += f" Before training {of_start[0]:.2f} distinct, {of_start[1]:.2f} of them correct."
        print(lines[0])
    for method in config.methods or bench.sections:
        after, minutes, kinds = [], [], []
        for seed in config.seeds:
            folder, seconds = bench.train(method, seed)
            after.append(bench.solved(folder / "run" / "final", folder))
            minutes.append(seconds / 60)
            kinds += [bench.distinct(folder / "run" / "final", folder)] if config.num_samples else []
        lines.append(table_row(method, before, np.stack(after), minutes, kinds))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    (bench.folder / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    run_main(main)
