"""Pretraining of a masked diffusion language model: from scratch, from an AR model, or continued.

Every token is masked with probability p = (1 - eps) t + eps, t ~ U(0, 1) per sequence, and the loss is the
cross-entropy of the masked tokens divided by p: a bound of the negative log-likelihood, in nats per token.

Run:
    # from scratch: a named size from configs/models and a tokenizer
    torchrun --nproc_per_node 8 pretraining/pretrain.py --config_name 1b --tokenizer_name tokenizer \\
        --train_data_path corpus/train --eval_data_path corpus/validation --output_dir runs/pretrain

    # continued, from a checkpoint; raw text is tokenised first (prepare_corpus.py does that for large data)
    python pretraining/pretrain.py --model_name_or_path GSAI-ML/LLaDA-8B-Base \\
        --train_data_path data/train.jsonl --output_dir checkpoints/pretraining \\
        --max_steps 100000 --batch_size 4 --learning_rate 4e-4

    # documents of differing length, several in a row, none of which sees another; YaRN to 8,192 tokens
    python pretraining/pretrain.py --config configs/pretrain_8k.yaml

The same command continues an interrupted run.
"""

from dataclasses import dataclass
from functools import partial

from llada.data.flags import TextFlags
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.training.config import RowsConfig, finished_before


@dataclass(kw_only=True)
class Config(TextFlags, RowsConfig):
    """Pretraining."""

    train_data_path: str = flag(
        help="Folder made by prepare_corpus.py, or raw .jsonl {'text'}, .txt, .parquet or dataset folder.",
        reads="path",
    )
    eval_data_path: str | None = flag(None, "The same for validation.", reads="path")
    model_name_or_path: str | None = flag(None, "Checkpoint to continue from.", reads="model")
    config_name: str | None = flag(
        None,
        "Start from scratch: a size in configs/models or a YAML file of LLaDAConfig fields.",
        reads="size",
    )
    random_length_probability: float = flag(
        0.01,
        "Share of sequences cut to a uniformly random length, so that short inputs are seen.",
        at_least=0,
        at_most=1,
        fixed=True,
    )
    packing: bool = flag(
        False,
        "Put several documents into a row of --max_length tokens, none of which sees another; --batch_size "
        "counts documents, --micro_batch_size rows.",
    )
    rope_scaling: str = flag(
        "none",
        "Stretch the positions of a model beyond its context.",
        choices=["none", "linear", "ntk", "yarn"],
        fixed=True,
    )
    rope_factor: float = flag(
        1.0, "New context / the model's original one.", at_least=1, needs="rope_scaling", fixed=True
    )
    start_length: int = flag(
        0,
        "Length curriculum: documents are cut to this many tokens at first.",
        at_least=0,
        needs="length_steps",
        fixed=True,
    )
    length_steps: int = flag(
        0,
        "Length curriculum: steps until they are whole; 0 = off, as LLaDA.",
        at_least=0,
        needs="start_length",
        fixed=True,
    )
    start_mask_ratio: float = flag(
        1.0,
        "Masking curriculum: the largest t of the first step.",
        above=0,
        at_most=1,
        needs="mask_steps",
        fixed=True,
    )
    mask_steps: int = flag(
        0, "Masking curriculum: steps until it is 1; 0 = off, as LLaDA.", at_least=0, fixed=True
    )

    def check_flags(self) -> None:
        """What the run starts from."""
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("give either --model_name_or_path (continue) or --config_name (from scratch)")
        if self.config_name is not None and self.tokenizer_name is None:
            raise ValueError("--config_name starts from scratch and needs --tokenizer_name")


if __name__ == "__main__":
    check_command_line(Config, __doc__, answer=finished_before)

import numpy as np
from datasets import Dataset

from llada.data.rows import CorpusRows
from llada.diffusion.batches import Example
from llada.diffusion.masking import generator
from llada.diffusion.stream import Curriculum, ExampleOf
from llada.models.checkpoints import RopeScaling, load_config
from llada.models.tokens import SpecialIds
from llada.training.rows_stage import train_on_rows


def example_of(rows: Dataset, config: Config, cut: bool, record_id: int, epoch: int, _: int) -> Example:
    """One row, every token of it maskable; with `cut`, a random prefix of it in 1 % of the cases."""
    input_ids = rows[record_id]["input_ids"]
    if cut:
        random = generator(config.seed, "length", record_id, epoch)
        if random.random() < config.random_length_probability:
            input_ids = input_ids[: random.integers(1, len(input_ids) + 1)]
    return Example(input_ids, np.ones(len(input_ids), dtype=bool), weight=1.0, num_units=len(input_ids))


def main(argv: list[str] | None = None) -> None:
    """Runs pretraining with the given flags."""
    config = parse(Config, argv, description=__doc__)
    rope = RopeScaling(config.rope_scaling, config.rope_factor, config.max_length)
    if config.model_name_or_path is not None:
        rope.apply(load_config(config.model_name_or_path))  # says now what does not fit

    def example_of_rows(rows: Dataset, _: SpecialIds, is_training: bool) -> ExampleOf:
        return partial(example_of, rows, config, is_training)

    train_on_rows(
        config,
        CorpusRows(
            config.max_length,
            config.reader(),
            config.parse_special_tokens,
            rows="documents" if config.packing else "joined",
        ),
        example_of_rows,
        curriculum=Curriculum(
            config.start_length,
            config.max_length,
            config.length_steps,
            config.start_mask_ratio,
            config.mask_steps,
        ),
    )


if __name__ == "__main__":
    run_main(main)
