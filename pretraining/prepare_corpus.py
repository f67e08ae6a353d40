"""Tokenise text for pretraining: documents closed by EOS, joined, and cut into rows of --max_length tokens.
Or, with --rows documents, each in a row of its own, for pretrain.py --packing.

Reads JSONL {"text"}, plain text, Parquet and HF dataset folders (data/README.md), and writes memory-mapped
rows to OUTPUT_DIR/train and, with --validation_fraction, OUTPUT_DIR/validation. Documents are held out by a
hash of their text: the choice does not depend on their order, and copies stay on one side. A stopped run goes
on where it was when the same command is given again.

Run:
    python pretraining/prepare_corpus.py --input data/samples/pretrain.jsonl --tokenizer runs/tokenizer \\
        --max_length 64 --validation_fraction 0.2 --output_dir runs/corpus
    python pretraining/prepare_corpus.py --config configs/debug/prepare_corpus.yaml
"""

from dataclasses import dataclass

from llada.data.records import TEXT_DOCUMENTS
from llada.data.rows import ROWS, read_manifest, tokenize_corpus
from llada.flags import flag, parse
from llada.models import load_tokenizer


@dataclass
class Config:
    """Flags of this script."""

    input: list[str] = flag(help="Files or folders: .jsonl, .json, .txt, .parquet, HF dataset folder.")
    tokenizer: str = flag(help="Folder of the tokenizer, or of the checkpoint to be trained.")
    output_dir: str = flag(help="Folder for train/ and validation/.")
    max_length: int = flag(4096, help="Tokens a row.")
    validation_fraction: float = flag(0.0, help="Share of the documents to hold out, in [0, 1).")
    rows: str = flag(
        "joined",
        help="joined: documents one after the other, cut every --max_length tokens; documents: each in a row "
        "of its own, for --packing.",
        choices=list(ROWS),
    )
    text_documents: str = flag(
        "blank_line", help="What a document is in a .txt file.", choices=list(TEXT_DOCUMENTS)
    )
    num_proc: int = flag(1, help="Processes that tokenise.")
    shard_size: int = flag(10_000, help="Documents a shard: a stopped run repeats at most one.")
    overwrite: bool = flag(False, help="Start again where OUTPUT_DIR holds rows already.")


def main(argv: list[str] | None = None) -> None:
    """Writes the rows and prints what they hold."""
    config = parse(Config, argv, description=__doc__)
    fraction = config.validation_fraction
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"--validation_fraction {fraction} must be in [0, 1)")
    tokenizer = load_tokenizer(config.tokenizer)
    splits = {"train": (fraction, 1.0)} | ({"validation": (0.0, fraction)} if fraction else {})
    for split, hash_range in splits.items():
        folder = f"{config.output_dir}/{split}"
        tokenize_corpus(
            config.input,
            tokenizer,
            folder,
            max_length=config.max_length,
            rows=config.rows,
            text_documents=config.text_documents,
            hash_range=hash_range,
            shard_size=config.shard_size,
            num_proc=config.num_proc,
            overwrite=config.overwrite,
        )
        counts = read_manifest(folder)["statistics"]
        print(
            f"{folder}: {counts['records']} documents ({counts['empty']} empty), {counts['tokens']} tokens "
            f"in {counts['rows']} rows, unigram entropy {counts['unigram_entropy']:.3f} nats/token"
        )


if __name__ == "__main__":
    main()
