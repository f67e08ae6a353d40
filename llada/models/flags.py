"""The flag of every script that takes a checkpoint which may not say all about itself."""

from dataclasses import dataclass

from llada.flags.declaration import flag


@dataclass(kw_only=True)
class MaskTokenFlag:
    """For a config.json without `mask_token_id` beside a tokenizer without mask token."""

    mask_token_id: int | None = flag(None, at_least=0, help="Mask token id of a checkpoint that names none.")
