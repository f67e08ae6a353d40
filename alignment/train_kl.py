"""Align a LLaDA model with an autoregressive teacher, above all so that it drafts what the teacher accepts.

Reads the rows of alignment/precompute_teacher.py (with --loss_type ce also conversations, as SFT does).

What is scored (--positions):
    windows   [prompt, answer[:s], masks]: exactly what a drafter sees; the masks are scored
    masked    a random part of the answer is masked and scored, each token weighted with 1 / p
    answer    the same noise, and every token of the answer is scored, also the visible ones
Where (--on_policy), instead of at random places of the rows' answers:
    drafts    windows begin where drafts of the student would, behind what the verifier has accepted
    answers   the student answers prompts, and --teacher judges a state that its sampler has visited
    self      the same, judged by the student itself when it sees more of a verified answer of its own
How (--loss_type):
    ce        cross-entropy of the tokens that stand there
    kl        T^2-scaled or plain KL(teacher || student), both at --temperature T
    reverse_kl  the same of KL(student || teacher)
    hybrid    --alpha * ce + --beta * kl
    lk        lambda KL + (1 - lambda) TV, lambda = exp(-3 acceptance): maximises acceptance itself
    auto      kl if the rows have a teacher, else ce

Run:
    torchrun --nproc_per_node 8 alignment/train_kl.py --model_name_or_path models/LLaDA-8B-Instruct \\
        --train_data_path runs/teacher/train --eval_data_path runs/teacher/validation --loss_type lk \\
        --use_lora --output_dir runs/aligned --batch_size 64 --learning_rate 1e-4
    python alignment/train_kl.py --model_name_or_path runs/start --train_data_path prompts.jsonl \\
        --on_policy answers --teacher models/SmolLM2-135M-Instruct --gen_length 64 --output_dir runs/converted
    python alignment/train_kl.py --data_path sft_data/processed_alignment --model_name models/llada \\
        --positions answer --loss_type kl --output_dir alignment_output --batch_size 2 --epochs 3

The same command continues an interrupted run. What is logged, and how to choose: docs/alignment.md.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llada.autoregressive.flags import OnPolicyFlags
from llada.flags.declaration import own_names
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.flags.recipes import RecipeFlags
from llada.models.flags import MaskTokenFlag
from llada.training.config import (
    LoraDropoutFlags,
    NoiseFlags,
    PrefetchFlags,
    ScaleFlags,
    TrainConfig,
    finished_before,
)


@dataclass(kw_only=True)
class Config(
    RecipeFlags,
    OnPolicyFlags,
    NoiseFlags,
    LoraDropoutFlags,
    ScaleFlags,
    PrefetchFlags,
    TrainConfig,
    MaskTokenFlag,
):
    """Alignment."""

    stage = "alignment/train_kl.py"

    model_name_or_path: str = flag(help="Checkpoint to align.", reads="model")
    train_data_path: str = flag(help="Folder made by precompute_teacher.py, or prompts.", reads="path")
    eval_data_path: str | None = flag(None, "The same for validation.", reads="path")
    loss_type: str = flag(
        "auto",
        "ce, kl, reverse_kl, hybrid, lk; auto: kl with a teacher.",
        choices=["auto", "ce", "kl", "reverse_kl", "hybrid", "lk"],
        fixed=True,
    )
    positions: str = flag(
        "windows", "What is masked and scored.", choices=["masked", "answer", "windows"], fixed=True
    )
    t_sampling: str = flag("iid", needs="positions=masked|answer")
    mask_count: str = flag("bernoulli", needs="positions=masked|answer")
    alpha: float = flag(0.5, "Weight of the cross-entropy.", at_least=0, needs="loss_type=hybrid", fixed=True)
    beta: float = flag(0.5, "Weight of the KL.", at_least=0, needs="loss_type=hybrid", fixed=True)
    temperature: float = flag(1.0, "Of both distributions in the KL.", above=0, fixed=True)
    temperature_squared: bool = flag(False, "Multiply the KL with T^2.", fixed=True)
    kl_clip: float = flag(
        0.0,
        "No token's part of a row's KL counts for more than this, in nats; 0: no clip.",
        at_least=0,
        needs="loss_type=auto|kl|reverse_kl|hybrid",
        fixed=True,
    )
    window_length: int = flag(8, "Masks of a window.", at_least=1, fixed=True)
    window_weights: str = flag(
        "uniform",
        "Weight of the k-th mask: all alike; exp(-(k - 1) / --window_decay); or the probability that all "
        "before it are accepted (streak).",
        choices=["uniform", "decay", "streak"],
        needs="positions=windows",
        fixed=True,
    )
    window_decay: float = flag(
        4.0, "Masks over which a weight falls to 1 / e.", above=0, needs="window_weights=decay", fixed=True
    )
    keep_rate: float | None = flag(
        None,
        "For causal drafters: a window from every place of the answer in one forward, of which a share "
        "max(rate^(k-1), --keep_min) keeps its k-th mask. PARD takes 0.7; 1 keeps all.",
        above=0,
        at_most=1,
        needs="positions=windows",
        fixed=True,
    )
    keep_min: float = flag(
        0.2, "Least share that --keep_rate keeps.", at_least=0, at_most=1, needs="keep_rate", fixed=True
    )
    learning_rate: float = 2.5e-5
    weight_decay: float = 0.1
    warmup_steps: int = 50
    lr_scheduler_type: str = "linear"
    log_level: str = flag(
        "INFO",
        "Of OUTPUT_DIR/training_log.log; DEBUG has a line a micro-batch.",
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    )

    def agreed(self) -> dict[str, Any]:
        """With the flags of what the student visits."""
        return super().agreed() | {name: getattr(self, name) for name in own_names(OnPolicyFlags)}

    def check_flags(self) -> None:
        """A loss that is more than nothing, and states that there are."""
        if self.asks_student and self.shard != "none":
            raise ValueError(
                f"--on_policy {self.on_policy} asks the whole model: leave --shard {self.shard} out"
            )
        if self.on_policy != "none":
            self.num_workers = 0  # what the student visits depends on its weights
        if self.on_policy == "drafts" and self.positions != "windows":
            raise ValueError(f"--on_policy drafts is about --positions windows, not {self.positions}")
        if self.loss_type == "hybrid" and self.alpha + self.beta == 0:
            raise ValueError("--loss_type hybrid with --alpha 0 and --beta 0 has no loss")

    def row_objective(self, has_teacher: bool) -> "RowObjective":
        """The loss of a row; ValueError if it needs a teacher and there is none."""
        kind = self.loss_type
        if kind == "auto":
            kind = "kl" if has_teacher else "ce"
        if kind != "ce" and not has_teacher:
            raise ValueError(
                f"--loss_type {kind} needs a teacher, and --train_data_path {self.train_data_path} has none; "
                "make one with alignment/precompute_teacher.py, or use --loss_type ce"
            )
        alpha, beta = {"ce": (1.0, 0.0), "hybrid": (self.alpha, self.beta)}.get(kind, (0.0, 1.0))
        return RowObjective(
            alpha, beta, self.temperature, self.temperature_squared, is_lk=kind == "lk",
            is_reverse=kind == "reverse_kl", clip=self.kl_clip or math.inf,
        )  # fmt: skip

    def windows(self) -> "Windows":
        """The windows that the flags describe."""
        decay = self.window_decay if self.window_weights == "decay" else math.inf
        return Windows(self.window_length, decay, self.keep_rate, self.keep_min)


if __name__ == "__main__":
    check_command_line(Config, __doc__, answer=finished_before)

import torch
from transformers import PreTrainedTokenizerBase

from llada.autoregressive.alignment import Alignment, check_rows, has_teacher, load_aligned, refuse_sharing
from llada.autoregressive.on_policy import own_states, prompts_of, starts_over_ranks
from llada.autoregressive.teacher_stream import AlignmentStream, Windows
from llada.data.rows import ConversationRows
from llada.data.shards import read_manifest
from llada.diffusion.distillation_losses import RowObjective
from llada.models.building import run_tokenizer
from llada.run import Run
from llada.training import dry_run as preflight
from llada.training.loop import end_training, fit, load_with_ids, start_training
from llada.training.rows_stage import validation_means


def planned_rows(path: str, tokenizer: PreTrainedTokenizerBase, *, config: Config) -> preflight.DataSize:
    """How much data `path` holds, for --dry_run."""
    if config.asks_student and path == config.train_data_path:
        prompts, _ = prompts_of(config, path, tokenizer)
        answers = len(prompts) * config.gen_length
        num_tokens = sum(len(prompt.token_ids) for prompt in prompts) + answers
        return preflight.DataSize(len(prompts), num_tokens, answers, is_exact=True)
    if not has_teacher(path):
        return preflight.data_rows(path, tokenizer, kind=ConversationRows(config.max_length))
    check_rows(path, tokenizer, config.max_length)
    counts = read_manifest(path)["statistics"]
    return preflight.DataSize(counts["rows"], counts["tokens"], counts["answer_tokens"], is_exact=True)


def log_to_file(path: Path, level: str) -> None:
    """Appends log records of this level and above, those of libraries included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(level)


def main(argv: list[str] | None = None) -> None:
    """Runs alignment with the given flags."""
    config = parse(Config, argv, description=__doc__)
    if config.dry_run:
        preflight.report(
            config, partial(planned_rows, config=config), train=[config.train_data_path],
            held_out=config.eval_data_path, chat=True,
        )  # fmt: skip
        return
    run = start_training(config)
    if run.is_main:
        log_to_file(Path(config.output_dir, "training_log.log"), config.log_level)
    tokenizer = run_tokenizer(config, chat=True)
    model, ids = load_with_ids(config, tokenizer, device=run.build_device)
    if config.keep_rate is not None:
        refuse_sharing(model.config)
    data_dir = Path(config.output_dir, "data")  # for conversations that have to be tokenised
    load = partial(load_aligned, tokenizer=tokenizer, max_length=config.max_length, run=run)
    make_stream = partial(AlignmentStream.over, config=config, run=run, ids=ids)
    if config.asks_student:
        stream, data = own_states(config, model, tokenizer, run, ids)
    else:
        rows = load(config.train_data_path, prepared=data_dir / "train")
        config.resolve(run, len(rows))
        stream = make_stream(rows, rule=config.positions, windows=config.windows())
        data = f"{len(rows)} rows, {stream.lengths.sum()} tokens"
    if config.on_policy == "drafts":
        stream.starts_of = partial(starts_over_ranks, model, stream, config, run)
    has_windows = config.positions == "windows" and not config.asks_student
    alignment = Alignment(
        config.row_objective(stream.has_teacher),
        torch.tensor([ids.mask, *range(len(tokenizer), model.config.embedding_size)]),
        uses_streaks=config.window_weights == "streak" and has_windows,
        window_length=config.window_length if has_windows else 0,
        has_whole_windows=config.keep_rate is None,
    )
    validate = None
    if config.eval_data_path is not None:
        held_out = load(config.eval_data_path, prepared=data_dir / "validation")
        whole = replace(config.windows(), keep_rate=None)
        validate = partial(
            validation_numbers, alignment=alignment, config=config, run=run,
            make_stream=partial(make_stream, held_out, windows=whole),
        )  # fmt: skip
    fit(model, tokenizer, config, run, stream=stream, loss=alignment.loss, validate=validate, data=data)
    end_training()


def validation_numbers(
    model: torch.nn.Module,
    *,
    alignment: Alignment,
    make_stream: Callable[..., AlignmentStream],
    config: Config,
    run: Run,
) -> dict[str, float]:
    """The held-out loss under --positions; acceptance and tau always on draft windows."""
    measure = partial(validation_means, model, config=config, run=run)
    drafts = replace(alignment, window_length=config.window_length, has_whole_windows=True)
    if config.positions == "windows":
        return measure(stream=make_stream(rule="windows"), loss=drafts.loss)
    found = measure(stream=make_stream(rule=config.positions), loss=replace(drafts, window_length=0).loss)
    windows = make_stream(rule="windows")
    if windows.has_teacher:
        found = {**measure(stream=windows, loss=drafts.loss), "eval_loss": found["eval_loss"]}
    return found


if __name__ == "__main__":
    run_main(main)
