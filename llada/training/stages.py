"""The one table of stages: pipeline, kill test, tests and docs read it.

To add a stage: its script, configs/debug/<script>.yaml, and an entry of STAGES.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llada.flags.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stage:
    """A script with a debug config."""

    script: str  # its path in the repository
    after: tuple[str, ...] = ()  # stages whose output the debug config reads
    reads_checkpoint: bool = False  # it needs a LLaDA model, which a pipeline hands on from earlier stages
    trains: bool = False  # it calls `fit`: it then saves, resumes, and has a dry run
    is_trunk: bool = False  # a pipeline's later stages start from its checkpoint
    # name -> further flags under which kills and ranks are tried too
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def debug_config(self) -> str:
        """Its small config, a path in the repository."""
        return f"configs/debug/{Path(self.script).stem}.yaml"

    @property
    def debug_output(self) -> Path:
        """What the debug config makes; relative to the folder that the script is started in."""
        return output_of(read_yaml(ROOT / self.debug_config))


def output_of(flags: Mapping[str, Any]) -> Path:
    """The folder or file that a stage with these flags writes; the working directory if it names none."""
    named = (flags[name] for name in ("output_dir", "output_path", "output_file") if name in flags)
    return Path(next(named, ""))


_BLOCKS = ("--objective", "block_diffusion", "--block_size", "4")
STAGES = {
    "data": Stage("scripts/make_quickstart_data.py"),
    "tokenizer": Stage("scripts/train_tokenizer.py"),
    "prepare_corpus": Stage("pretraining/prepare_corpus.py", after=("tokenizer",)),
    "pretraining": Stage(
        "pretraining/pretrain.py",
        after=("prepare_corpus",),
        trains=True,
        is_trunk=True,
        variants={
            "packed": ("--packing",),
            "blocks": _BLOCKS,
        },
    ),
    "prepare_sft": Stage("sft_training/prepare_sft.py", after=("tokenizer",)),
    "sft": Stage(
        "sft_training/train_sft.py",
        after=("pretraining", "prepare_sft"),
        reads_checkpoint=True,
        trains=True,
        is_trunk=True,
        variants={
            "lora": ("--use_lora", "--lora_r", "4"),
            "blocks": (
                *("--objective", "block_diffusion", "--block_size", "8", "--t_range", "0.3", "0.8"),
                *("--packing", "--lora_r", "4"),
            ),
        },
    ),
    "teacher": Stage("alignment/train_teacher.py", after=("tokenizer",), trains=True),
    "precompute_teacher": Stage("alignment/precompute_teacher.py", after=("sft", "teacher")),
    "alignment": Stage(
        "alignment/train_kl.py",
        after=("precompute_teacher",),
        reads_checkpoint=True,
        trains=True,
        variants={
            "lora": ("--use_lora", "--lora_r", "2", "--loss_type", "hybrid"),
            "streak": ("--window_weights", "streak"),
            "on policy": ("--on_policy", "drafts"),
        },
    ),
    "drafter": Stage("scripts/convert_ar.py", after=("teacher",)),
    "export": Stage("scripts/export_checkpoint.py", after=("drafter",)),
    "speculative": Stage("inference/speculative_decode.py", after=("alignment",), reads_checkpoint=True),
    "preferences": Stage("rlhf/make_preferences.py", after=("sft",), reads_checkpoint=True),
    "dpo": Stage(
        "rlhf/train_dpo.py",
        after=("sft",),
        reads_checkpoint=True,
        trains=True,
        variants={"blocks": _BLOCKS},
    ),
    "precompute_bref": Stage("rlhf/precompute_bref.py", after=("sft",), reads_checkpoint=True),
    "kto": Stage(
        "rlhf/train_elbo_kto.py",
        after=("precompute_bref",),
        reads_checkpoint=True,
        trains=True,
        variants={"ema": ("--z0_mode", "ema")},
    ),
    "grpo": Stage(
        "rlhf/train_grpo.py",
        after=("sft",),
        reads_checkpoint=True,
        trains=True,
        variants={
            "trajectory": ("--estimator", "trajectory", "--loss_type", "dapo", "--scale_rewards", "batch"),
            "redrawn": (
                *("--mask_plan", "block", "--block_length", "4", "--eos", "tail", "--loss_type", "token"),
                *("--redraw_masks", "true", "--group_masks", "false", "--num_iterations", "2"),
                *("--beta", "0.1", "--kl_estimator", "k3", "--count_zero_advantages", "false"),
                *("--multi_objective_aggregation", "normalize_then_sum", "--nll_weight", "0.1"),
            ),
            "blocks": (*_BLOCKS, "--num_iterations", "2", "--beta", "0.1"),
            "threshold, lora": (
                *("--parallel_decoding", "threshold", "--threshold", "0.3", "--lora_r", "2"),
                *("--beta", "0.1", "--eval_limit", "1"),
            ),
        },
    ),
    "inference": Stage("inference/generate.py", after=("sft",), reads_checkpoint=True),
    "eval": Stage("eval/eval_llada.py", after=("sft",), reads_checkpoint=True),
}
