"""Reading the records that rlhf/precompute_bref.py writes, and the published program's."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llada.bref import PUBLISHED, find_masks
from llada.data.answers import Encoding, Tokens, encode_answers
from llada.data.messages import to_labelled
from llada.data.records import read_records


@dataclass(frozen=True)
class BrefRecord:
    """A record that can be learned from; `where` is its "file:line".

    masks: [K, T] bool, those that `reference` = B_ref was averaged over, in nats.
    """

    where: str
    tokens: Tokens
    masks: np.ndarray
    reference: float
    is_desirable: bool


@dataclass(frozen=True)
class BrefFile:
    """The usable records of a file, and what their B_ref was made with.

    fingerprint: None for the published program's records, which do not say.
    """

    records: list[BrefRecord]
    fingerprint: dict[str, Any] | None
    eos: str
    max_length: int


def read_bref(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_draws: int,
    eos: str | None = None,
    max_length: int | None = None,
    long: str = "truncate",
    verify: bool = True,
) -> BrefFile:
    """The records of a file that have an answer.

    Args:
        num_draws: K; B_ref must be there for it.
        eos, max_length: None is what the records say.
        verify: compare the masks with the records' checks.

    Raises:
        ValueError: `file:line` and what is missing, or a B_ref that was made for other tokens or masks.
    """
    located = list(read_records(path))
    where, first = located[0]
    made_with = first.get("fingerprint")
    settings = made_with or PUBLISHED
    for name, wanted in (("eos", eos), ("max_length", max_length)):
        if wanted not in (None, settings[name]):
            raise ValueError(f"--{name} {wanted}: {where} has B_ref for {name} {settings[name]!r}")
    for where, record in located:
        _check(record, where, num_draws)
        if record.get("fingerprint") != made_with:
            raise ValueError(f"{where}: B_ref was made differently from that of {located[0][0]}")
    encoding = Encoding(tokenizer, settings["eos"], settings.get("chat", False), settings["max_length"], long)
    items = [to_labelled(record, where)[0] for where, record in located]
    encoded = encode_answers(
        [(where, item.prompt, item.completion) for (where, _), item in zip(located, items, strict=True)],
        encoding,
    )
    records = []
    for (where, record), item, found in zip(located, items, encoded, strict=True):
        if found.tokens is None or not any(record["l_values"]):  # precompute_bref.py --long drop left it out
            continue
        masks = find_masks(record, len(found.tokens.answer), num_draws, where, verify=verify)
        reference = float(record["B_ref"][str(num_draws)])
        records.append(BrefRecord(where, found.tokens, masks, reference, item.label))
    return BrefFile(records, made_with, settings["eos"], settings["max_length"])


def _check(record: dict[str, Any], where: str, num_draws: int) -> None:
    missing = [name for name in ("seed", "l_values", "masked_idx_sums", "B_ref") if name not in record]
    if missing:
        raise ValueError(f"{where}: no {missing[0]!r}; make the file with rlhf/precompute_bref.py")
    if record["B_ref"].get(str(num_draws)) is None:
        raise ValueError(
            f"--n_mc_samples {num_draws}: {where} has B_ref for K = {', '.join(record['B_ref'])}"
        )


def subsample(
    records: Sequence[BrefRecord], share_desirable: float, share_undesirable: float, seed: int
) -> list[BrefRecord]:
    """A share of the desirable and one of the undesirable records, in their order; at least one of each."""
    if share_desirable == share_undesirable == 1.0:
        return list(records)
    chance = random.Random(seed)
    kept: list[int] = []
    for label, share in ((True, share_desirable), (False, share_undesirable)):
        indices = [n for n, record in enumerate(records) if record.is_desirable == label]
        number = max(int(len(indices) * share), min(1, len(indices))) if share > 0 else 0
        kept += chance.sample(indices, number)
    return [records[n] for n in sorted(kept)]
