"""A head-to-head of RL recipes on puzzles: what do likelihood, masks and sampler change, beyond noise?

For every starting checkpoint, block (one sampler for all arms) and arm of the YAML file:
    1. the learning rate: each of --learning_rates with one seed, judged on one half of the held-out puzzles
       (a single rate is taken as it is)
    2. --seeds fresh seeds with the best rate; the last checkpoint is judged on the other half

Puzzles are solved at temperature 0. Every run has the same budget of forwards: a completion costs the steps
of its sampler, and for each forward that its likelihood asks 3 in an update, 1 for old or reference values.
The interval of a gain is a bootstrap over seeds and puzzles, each puzzle compared with itself before
training; the difference to the first arm of the block has equal puzzles on both sides. A run has collapsed if
it ends below half of where it began. Finished runs are not repeated, so the benchmark can be made in pieces.

Run:
    from=runs/quickstart  # after the main job
    python scripts/make_quickstart_data.py --num_heldout 500 --num_prompts 12000 \\
        --output_dir runs/bench/data
    python sft_training/train_sft.py --model_name_or_path $from/pretraining \\
        --train_data_path runs/bench/data/sft.jsonl --max_length 96 --eos_padding --batch_size 64 \\
        --max_steps 450 --learning_rate 2e-3 --lr_scheduler_type constant --warmup_steps 50 \\
        --output_dir runs/bench/half
    python scripts/benchmarks/bench_recipes.py --checkpoints runs/bench/half/final --data runs/bench/data \\
        --output_dir runs/bench/recipes --blocks random --max_minutes 60

A task with text before its answer is --task binary_matrix, of data made with --tasks worked_matrix.
The table is printed and written to --output_dir/TASK/table.md; docs/results.md holds one.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.flags.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass(kw_only=True)
class Config:
    """Flags of the benchmark."""

    checkpoints: list[str] = flag(help="The SFT checkpoints that runs start from.", reads="model")
    data: str = flag(help="Folder of make_quickstart_data.py: prompts.jsonl and heldout.jsonl.", reads="path")
    output_dir: str = flag(help="Folder of the runs and of the table.", writes="folder")
    recipes_file: str = flag(
        str(ROOT / "configs/bench_recipes.yaml"), help="Blocks, arms, and what all share.", reads="path"
    )
    blocks: list[str] | None = flag(None, help="Only these; default all of the file.")
    arms: list[str] | None = flag(None, help="Only these; default all of the file.")
    task: str = flag("mini_sudoku", help="Puzzles of the data that count.")
    budget: float = flag(250_000, help="Forwards of one sequence that a run may spend.", above=0)
    learning_rates: list[float] = flag([1e-4, 3e-4, 1e-3], help="Tried in step 1.", above=0)
    seeds: list[int] = flag([1, 2, 3, 4, 5, 6], help="Of step 2; step 1 has seed 0.", at_least=0)
    max_heldout: int = flag(500, help="Held-out puzzles, of which each step judges a half.", at_least=2)
    max_minutes: float | None = flag(
        None, help="Begin no run after so many minutes; the table says what lacks.", above=0
    )


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np

from finished_runs import NUM_RESAMPLES, interval, records_of_task, run_once
from llada.diffusion.masking import generator
from llada.flags.recipes import RecipeFlags
from llada.rewards.functions import puzzle_solved

Flags = dict[str, Any]
FORWARDS = {"diffu": 1, "coupled": 3}


class GrpoRecipes(RecipeFlags):
    """Recipes of rlhf/train_grpo.py."""

    stage = "rlhf/train_grpo.py"


def flags_of(sections: Flags, task: str, block: str, arm: str) -> Flags:
    """What an arm runs with: its recipe's own word on its loss and terms, the block's on the sampler."""
    own = {name: value for name, value in sections["arms"][arm].items() if name != "blocks"}
    canvas = sections["tasks"][task]
    sampler = {"block_length": canvas["gen_length"], **sections["blocks"][block]}
    steps = max(canvas["steps"], canvas["gen_length"] // sampler["block_length"])
    return {**sections["shared"], **canvas, **sampler, "steps": steps, **own}


def cost(flags: Flags) -> float:
    """Forwards of one sequence that a completion costs in one optimizer step, sampling included."""
    recipe = GrpoRecipes.flags_of_recipe(flags["recipe"]) if flags.get("recipe") else {}
    known = {**recipe, **flags}
    asked = FORWARDS.get(known.get("likelihood", "elbo"))
    if known.get("likelihood") == "trajectory":
        asked = -(-known["steps"] // known.get("trajectory_shrink", 1))
    elif asked is None:
        asked = known.get("num_masks", 2)
    updates = known.get("num_iterations", 1)
    remembered = (updates > 1) + (known.get("beta", 0) > 0)
    sets = updates if known.get("redraw_masks") else 1
    return known["steps"] / updates + 3 * asked + remembered * asked * sets / updates


@dataclass
class RecipeBench:
    """The runs of the benchmark, and what comes of them."""

    config: Config

    def __post_init__(self) -> None:
        self.folder = Path(self.config.output_dir, self.config.task)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sections = read_yaml(self.config.recipes_file)
        chosen = {"blocks": self.config.blocks, "arms": self.config.arms, "task": [self.config.task]}
        for name, wanted in chosen.items():
            known = self.sections["tasks" if name == "task" else name]
            unknown = [item for item in wanted or () if item not in known]
            if unknown:
                raise ValueError(f"--{name} {unknown}: {', '.join(known)}")
        self.started = time.monotonic()
        lines = {name: records_of_task(Path(self.config.data, f"{name}.jsonl"), self.config.task)
                 for name in ("prompts", "heldout")}  # fmt: skip
        heldout = lines.pop("heldout")[: self.config.max_heldout]
        half = len(heldout) // 2
        lines |= {"tuning": heldout[:half], "judged": heldout[half:]}
        self.files = {name: self.folder / f"{name}.jsonl" for name in lines}
        for name, path in self.files.items():
            path.write_text("".join(line + "\n" for line in lines[name]), encoding="utf-8")
        self.records = {name: [json.loads(line) for line in part] for name, part in lines.items()}

    def has_time(self) -> bool:
        """Whether another run may begin."""
        limit = self.config.max_minutes
        return limit is None or time.monotonic() - self.started < 60 * limit

    def solved(self, checkpoint: str | Path, folder: Path, part: str) -> np.ndarray:
        """[puzzles] whether the checkpoint solves each held-out puzzle of a part."""
        answers = folder / f"{part}.jsonl"
        if not answers.is_file():
            flags = {"model_name_or_path": checkpoint, "prompts_file": self.files[part]}
            length = self.sections["tasks"][self.config.task]["gen_length"]
            flags |= {"gen_length": length, "block_length": length, "steps": length}
            flags |= {"output_path": answers, **self.sections["heldout"]}
            run_once("inference/generate.py", flags, folder / part)
        by_id = {entry["id"]: entry for entry in map(json.loads, answers.open(encoding="utf-8"))}
        found = [puzzle_solved(by_id[record["id"]]["completion"], record) for record in self.records[part]]
        return np.array(found)

    def run(
        self, checkpoint: str, block: str, arm: str, rate: float, seed: int, part: str
    ) -> np.ndarray | None:
        """[puzzles] solved after training; None if there is no time for what is not there yet."""
        flags = flags_of(self.sections, self.config.task, block, arm)
        flags |= {"learning_rate": rate, "seed": seed, "model_name_or_path": checkpoint}
        per_step = cost(flags) * flags["batch_size"]
        flags |= {"max_steps": max(1, round(self.config.budget / per_step))}
        name = f"{Path(checkpoint).parent.name}-{Path(checkpoint).name}"
        folder = self.folder / name / block / arm / f"lr-{rate:g}-seed-{seed}"
        if not (folder / f"{part}.jsonl").is_file() and not self.has_time():
            return None
        flags |= {"train_data_path": self.files["prompts"], "output_dir": folder / "run"}
        run_once("rlhf/train_grpo.py", flags, folder)
        return self.solved(folder / "run" / "final", folder, part)

    def arm(self, checkpoint: str, block: str, arm: str) -> tuple[float, np.ndarray] | None:
        """(learning rate, [seeds, judged puzzles]); None before the first seed is there."""
        best, *others = self.config.learning_rates
        if others:
            tried = {rate: self.run(checkpoint, block, arm, rate, 0, "tuning") for rate in (best, *others)}
            if any(found is None for found in tried.values()):
                return None
            best = max(tried, key=lambda rate: tried[rate].mean())
        runs = [self.run(checkpoint, block, arm, best, seed, "judged") for seed in self.config.seeds]
        done = [found for found in runs if found is not None]
        return (best, np.stack(done)) if done else None

    def lines(self, checkpoint: str, block: str) -> list[str]:
        """The table's lines of one checkpoint and sampler."""
        name = checkpoint.strip("/").replace("/", "-")
        before = self.solved(checkpoint, self.folder / "before" / name, "judged")
        lines, first = [], None
        for arm in self.config.arms or self.sections["arms"]:
            if block not in self.sections["arms"][arm].get("blocks", self.sections["blocks"]):
                continue
            found = self.arm(checkpoint, block, arm)
            if found is None:
                lines.append(f"| {block} | {arm} | not run | | | |")
                continue
            rate, after = found
            first = after if first is None else first
            gains, apart = 100 * (after - before), f"{100 * (after.mean() - first.mean()):+.1f}"
            if after is not first:
                low, high = difference(after, first)
                apart += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
            low, high = interval(gains)
            collapsed = int((after.mean(axis=1) < before.mean() / 2).sum())
            each = ", ".join(f"{100 * row.mean():.1f}" for row in after)
            lines.append(
                f"| {block} | {arm} | {rate:g} | {100 * after.mean():.1f} ({each}) | "
                f"{gains.mean():+.1f} [{low:+.1f}, {high:+.1f}] | {apart} | {collapsed} of {len(after)} |"
            )
            print(lines[-1], flush=True)
        head = f"Start {checkpoint}: {100 * before.mean():.1f} % of {len(before)} puzzles."
        columns = (
            "sampler",
            "arm",
            "rate",
            "solved (each seed)",
            "gain [95 %]",
            "to the first arm",
            "collapsed",
        )
        return [head, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines, ""]


def difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """95 % interval of one mean over [seeds, puzzles] less another: equal puzzles, seeds of their own."""
    random, means = generator(0, "difference"), np.empty(NUM_RESAMPLES)
    for i in range(len(means)):
        columns = random.integers(one.shape[1], size=one.shape[1])
        a, b = (rows[random.integers(len(rows), size=len(rows))].mean(axis=0) for rows in (one, other))
        means[i] = (a - b)[columns].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main(argv: list[str] | None = None) -> None:
    """Runs what is not there yet, and makes the table of what is."""
    config = parse(Config, argv, description=__doc__)
    bench = RecipeBench(config)
    lines = []
    for checkpoint in config.checkpoints:
        for block in config.blocks or bench.sections["blocks"]:
            lines += bench.lines(checkpoint, block)
            (bench.folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    run_main(main)
