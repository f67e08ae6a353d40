"""Supervised fine-tuning of a masked diffusion language model on conversations, all weights or LoRA.

Only answer tokens are masked, with probability p = (1 - eps) t + eps; prompts are never noised. The loss of a
record is the cross-entropy of its masked tokens, divided by p and by the number of answer tokens.

Run:
    python sft_training/train_sft.py --model_name_or_path checkpoints/pretraining \\
        --train_data_path sft.jsonl --output_dir checkpoints/sft \\
        --max_steps 10000 --batch_size 4 --learning_rate 2e-5

    # LoRA on 8 GPUs, two data sets mixed 7 : 3, prepared by prepare_sft.py
    torchrun --nproc_per_node 8 sft_training/train_sft.py --model_name_or_path GSAI-ML/LLaDA-8B-Base \\
        --train_data_path chat/train math/train --data_weights 0.7 0.3 --use_lora \\
        --eval_data_path chat/validation --output_dir runs/sft --batch_size 128 --micro_batch_size 2

The same command continues an interrupted run. Padding: by default one EOS ends an answer, and padding is
neither attended nor scored; `--eos_padding` is LLaDA's recipe, where every row is filled up to the longest of
its global batch with EOS tokens that count as answer.
"""

from dataclasses import dataclass
from functools import partial

from llada.data.flags import ConversationFlags, SpellingFlags
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.training.config import RowsConfig, finished_before


@dataclass(kw_only=True)
class Config(ConversationFlags, SpellingFlags, RowsConfig):
    """SFT."""

    model_name_or_path: str = flag(help="Checkpoint to fine-tune.", reads="model")
    train_data_path: list[str] = flag(
        help="Folders made by prepare_sft.py, or raw conversation files (formats: data/README.md).",
        reads="path",
    )
    data_weights: list[float] | None = flag(
        None, "Share of each of several --train_data_path; default: every row once.", above=0
    )
    eval_data_path: str | None = flag(None, "Conversations for validation.", reads="path")
    turns: str = flag(
        "all",
        "Which assistant turns are learned: all, the last, or each in a row of its own.",
        choices=["all", "last", "split"],
    )
    long: str = flag(
        "error",
        "Conversations beyond --max_length: stop, drop and count, or cut and count.",
        choices=["error", "drop", "truncate"],
    )
    eos_padding: bool = flag(
        False, "Fill rows with EOS that is attended, masked and scored (LLaDA's recipe).", fixed=True
    )
    full_padding_probability: float = flag(
        0.0,
        "Share of the batches that is filled up to --max_length instead, so that the model also meets "
        "canvases much longer than its answers.",
        at_least=0,
        at_most=1,
        needs="eos_padding",
        fixed=True,
    )
    packing: bool = flag(
        False,
        "Put several records into a row of --max_length tokens, none of which sees another; --batch_size "
        "counts records, --micro_batch_size rows.",
    )
    learning_rate: float = 2e-5


if __name__ == "__main__":
    check_command_line(Config, __doc__, answer=finished_before)

import numpy as np
from datasets import Dataset

from llada.data.rows import ConversationRows
from llada.diffusion.batches import Example
from llada.diffusion.stream import ExampleOf
from llada.models.tokens import SpecialIds
from llada.training.rows_stage import train_on_rows


def example_of(rows: Dataset, config: Config, eos_id: int, record_id: int, _: int, longest: int) -> Example:
    """One conversation; its answer tokens are maskable and weigh 1 / their number."""
    row = rows[record_id]
    input_ids, in_answer = row["input_ids"], row["in_answer"].astype(bool)
    if config.eos_padding:
        padding = longest - len(input_ids)
        input_ids = np.pad(input_ids, (0, padding), constant_values=eos_id)
        in_answer = np.pad(in_answer, (0, padding), constant_values=True)
    # padding up to the longest of the global batch, not of this rank: the same answer length on any rank
    return Example(input_ids, in_answer, weight=1.0 / in_answer.sum(), num_units=1.0)


def main(argv: list[str] | None = None) -> None:
    """Runs SFT with the given flags."""
    config = parse(Config, argv, description=__doc__)

    def example_of_rows(rows: Dataset, ids: SpecialIds, _: bool) -> ExampleOf:
        return partial(example_of, rows, config, ids.eos)

    train_on_rows(
        config,
        ConversationRows(
            config.max_length,
            config.reader(),
            config.parse_special_tokens,
            turns=config.turns,
            long=config.long,
        ),
        example_of_rows,
        weights=config.data_weights,
        fills_rows=config.eos_padding,
        full_length=config.max_length,
        full_length_probability=config.full_padding_probability,
    )


if __name__ == "__main__":
    run_main(main)
