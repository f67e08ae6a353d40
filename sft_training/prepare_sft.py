"""Tokenise conversations for SFT: rows of tokens, and which of them belong to an answer and are learned.

Reads every conversation format of data/README.md and writes memory-mapped rows to OUTPUT_DIR/train and, with
--validation_fraction, OUTPUT_DIR/validation. Conversations are held out by a hash of what comes before the
first answer, so one question never stands on both sides. A stopped run resumes when the same command is given
again. To mix data sets with weights, prepare each and give train_sft.py all of them.

Run:
    python sft_training/prepare_sft.py --input data/samples/sft.jsonl data/samples/sft_multiturn.jsonl \\
        --tokenizer runs/tokenizer --max_length 512 --output_dir runs/sft_data
    python sft_training/prepare_sft.py --config configs/debug/prepare_sft.yaml
"""

from dataclasses import dataclass

from llada.data.flags import ConversationFlags, PrepareFlags, SpellingFlags
from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config(PrepareFlags, ConversationFlags, SpellingFlags):
    """Flags of this script."""

    turns: str = flag(
        "all",
        help="Which assistant turns are learned: all in one row, the last, or split = a row for each turn.",
        choices=["all", "last", "split"],
    )
    long: str = flag(
        "error",
        help="Rows over --max_length: error, drop, or truncate at the end; the last two are counted.",
        choices=["error", "drop", "truncate"],
    )


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from llada.data.prepared import write_splits
from llada.data.rows import ConversationRows
from llada.models.tokens import load_tokenizer


def main(argv: list[str] | None = None) -> None:
    """Writes the rows and prints what they hold."""
    config = parse(Config, argv, description=__doc__)
    rows = ConversationRows(
        config.max_length, config.reader(), config.parse_special_tokens, turns=config.turns, long=config.long
    )
    write_splits(config, rows, load_tokenizer(config.tokenizer_name, chat=True))


if __name__ == "__main__":
    run_main(main)
