"""Tokenise text for pretraining: documents closed by EOS, joined, and cut into rows of --max_length tokens.
Or, with --rows documents, each in a row of its own, for pretrain.py --packing.

Reads JSONL {"text"}, plain text, Parquet and HF dataset folders (data/README.md), and writes memory-mapped
rows to OUTPUT_DIR/train and, with --validation_fraction, OUTPUT_DIR/validation. Documents are held out by a
hash of their text: the choice does not depend on their order, and copies stay on one side. A stopped run
resumes when the same command is given again.

Run:
    python pretraining/prepare_corpus.py --input data/samples/pretrain.jsonl --tokenizer runs/tokenizer \\
        --max_length 64 --validation_fraction 0.2 --output_dir runs/corpus
    python pretraining/prepare_corpus.py --config configs/debug/prepare_corpus.yaml
"""

from dataclasses import dataclass

from llada.data.flags import PrepareFlags, TextFlags
from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config(PrepareFlags, TextFlags):
    """Flags of this script."""

    rows: str = flag(
        "joined",
        help="joined: documents one after the other, cut every --max_length tokens; documents: each in a row "
        "of its own, for --packing.",
        choices=["joined", "documents"],
    )
    text_documents: str = flag(
        "blank_line", help="What a document is in a .txt file.", choices=["blank_line", "line", "file"]
    )


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from llada.data.prepared import write_splits
from llada.data.rows import CorpusRows
from llada.models.tokens import load_tokenizer


def main(argv: list[str] | None = None) -> None:
    """Writes the rows and prints what they hold."""
    config = parse(Config, argv, description=__doc__)
    rows = CorpusRows(
        config.max_length, config.reader(), config.parse_special_tokens, config.rows, config.text_documents
    )
    write_splits(config, rows, load_tokenizer(config.tokenizer_name))


if __name__ == "__main__":
    run_main(main)
