"""Tokenise conversations for SFT: rows of tokens, and which of them belong to an answer and are learned.

Reads every conversation format of data/README.md and writes memory-mapped rows to OUTPUT_DIR/train and, with
--validation_fraction, OUTPUT_DIR/validation. Conversations are held out by a hash of what comes before the
first answer, so one question never stands on both sides. A stopped run goes on where it was when the same
command is given again. To mix data sets with weights, prepare each and give train_sft.py all of them.

Run:
    python sft_training/prepare_sft.py --input data/samples/sft.jsonl data/samples/sft_multiturn.jsonl \\
        --tokenizer runs/tokenizer --max_length 512 --output_dir runs/sft_data
    python sft_training/prepare_sft.py --config configs/debug/prepare_sft.yaml
"""

from dataclasses import dataclass

from llada.data.chat import TURNS
from llada.data.rows import LONG, read_manifest, tokenize_conversations
from llada.flags import flag, parse
from llada.models import load_tokenizer


@dataclass
class Config:
    """Flags of this script."""

    input: list[str] = flag(help="Files or folders: .jsonl, .json, .parquet, HF dataset folder.")
    tokenizer: str = flag(help="Folder of the tokenizer, or of the checkpoint to be trained.")
    output_dir: str = flag(help="Folder for train/ and validation/.")
    max_length: int = flag(4096, help="Longest row in tokens.")
    turns: str = flag(
        "all",
        help="Which assistant turns are learned: all in one row, the last, or split = a row for each turn.",
        choices=list(TURNS),
    )
    long: str = flag(
        "error",
        help="Rows over --max_length: error, drop, or truncate at the end; the last two are counted.",
        choices=list(LONG),
    )
    validation_fraction: float = flag(0.0, help="Share of the conversations to hold out, in [0, 1).")
    num_proc: int = flag(1, help="Processes that tokenise.")
    shard_size: int = flag(10_000, help="Conversations a shard: a stopped run repeats at most one.")
    overwrite: bool = flag(False, help="Start again where OUTPUT_DIR holds rows already.")


def main(argv: list[str] | None = None) -> None:
    """Writes the rows and prints what they hold."""
    config = parse(Config, argv, description=__doc__)
    fraction = config.validation_fraction
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"--validation_fraction {fraction} must be in [0, 1)")
    tokenizer = load_tokenizer(config.tokenizer, chat=True)
    splits = {"train": (fraction, 1.0)} | ({"validation": (0.0, fraction)} if fraction else {})
    for split, hash_range in splits.items():
        folder = f"{config.output_dir}/{split}"
        tokenize_conversations(
            config.input,
            tokenizer,
            folder,
            max_length=config.max_length,
            turns=config.turns,
            long=config.long,
            hash_range=hash_range,
            shard_size=config.shard_size,
            num_proc=config.num_proc,
            overwrite=config.overwrite,
        )
        counts = read_manifest(folder)["statistics"]
        print(
            f"{folder}: {counts['records']} conversations in {counts['rows']} rows ({counts['dropped']} rows "
            f"dropped, {counts['truncated']} truncated), {counts['tokens']} tokens, "
            f"{counts['answer_tokens']} of them in answers"
        )
        if counts["system_left_out"]:
            print(
                f"  the chat template leaves out system messages: {counts['system_left_out']} conversations "
                "lost theirs"
            )


if __name__ == "__main__":
    main()
