"""Train a byte-level BPE tokenizer with LLaDA's special tokens on your own text.

Any UTF-8 text is encoded without an unknown token and decoded back unchanged. Digits are split one by one.
`<think>` is ordinary text. The special tokens take the last ids, as in LLaDA's own tokenizer; padding is EOS.

Run:
    python scripts/train_tokenizer.py --data data/samples/pretrain.jsonl data/samples/sft.jsonl \\
        --vocab_size 512 --output_dir runs/tokenizer
    python scripts/train_tokenizer.py --extend checkpoints/other --output_dir runs/extended  # EOS, mask, chat
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass
class Config:
    """Flags of this script."""

    output_dir: str = flag(help="Folder that receives the tokenizer.", writes="new folder")
    data: list[str] = flag(
        [], help="Files or folders: JSONL with text or conversations, text, Parquet.", reads="path"
    )
    extend: str | None = flag(
        None,
        help="Tokenizer or checkpoint folder: a copy with the special tokens it lacks, instead of training.",
        reads="model",
    )
    vocab_size: int = flag(4096, help="Number of tokens, bytes and special tokens included.", at_least=1)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llada.data.messages import valid
from llada.data.reading import to_messages
from llada.data.records import read_records
from llada.models.tokens import CHAT_TEMPLATE, SPECIAL_TOKENS, extend_tokenizer
from llada.resumable import whole_folder

NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; the same texts give the same tokenizer."""
    # texts that run out of pairs to merge give a smaller one, never a larger
    specials = list(SPECIAL_TOKENS.values())
    smallest = NUM_BYTES + len(specials)
    if vocab_size < smallest:
        raise ValueError(
            f"--vocab_size {vocab_size} is too small: {NUM_BYTES} bytes and {len(specials)} special tokens "
            f"need at least {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    # each digit with the space before it if there is one: numbers of any length share twenty tokens
    digits = pre_tokenizers.Split(Regex(r" ?\d"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte, seen or not
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS["bos"],
        eos_token=SPECIAL_TOKENS["eos"],
        pad_token=SPECIAL_TOKENS["eos"],
        mask_token=SPECIAL_TOKENS["mask"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def read_texts(paths: list[str]) -> Iterator[str]:
    """Every text of the files: documents, and the roles and contents of the messages of conversations."""
    for path in paths:
        for where, record in read_records(path):
            if isinstance(record.get("text"), str):
                yield valid(record["text"], where)
            else:
                yield from (text for message in to_messages(record, where) for text in message.values())


def main(argv: list[str] | None = None) -> None:
    """Train on --data, or extend another tokenizer, and write it to --output_dir."""
    config = parse(Config, argv, description=__doc__)
    if bool(config.data) == (config.extend is not None):
        raise ValueError("give either --data to train on, or --extend with a tokenizer")
    if Path(config.output_dir, "config.json").is_file():
        raise ValueError(f"--output_dir {config.output_dir}: holds a model, whose tokenizer is its own")
    if config.extend is not None:
        tokenizer = extend_tokenizer(config.extend)
    else:
        tokenizer = train_tokenizer(read_texts(config.data), vocab_size=config.vocab_size)
    with whole_folder(Path(config.output_dir)) as folder:
        tokenizer.save_pretrained(folder)
    print(f"{len(tokenizer)} tokens -> {config.output_dir}")


if __name__ == "__main__":
    run_main(main)
