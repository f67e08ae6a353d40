"""ELBO-KTO's reference values B_ref: which masks each record gets, how they are checked, what they belong to.

A record's draws depend on its index alone, so that training finds the masks that B_ref was made with:

    base = mix64(GLOBAL_SEED ^ index)
    l_k  = 1 + mix64(derive(base, k, 0)) mod T
    mask_k = the first l_k of argsort(rand(T)), the generator seeded with derive(base, k, 1)
    b_k  = (T / l_k) sum over mask_k of log p,   B^(K) = mean of b_1 .. b_K

By blocks (`plan_answer` in llada/diffusion/bound_estimator.py) every block is such an answer, the first with
the record's base, later ones with derive(base, number of the block, 2); b_k is the sum over the blocks.

Shapes: T answer tokens, K draws.

Source: vaibhavjindal/elbo-kto precompute_bref.py (file format and seeds); arXiv 2510.23658.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llada.data.answers import Encoding, Tokens, encode_answers
from llada.data.reading import to_labelled
from llada.data.records import read_records
from llada.data.shards import describe_tokenizer
from llada.diffusion.bound_estimator import MaskPlan, block_lengths
from llada.models.checkpoints import describe_checkpoint
from llada.resumable import refuse_changes


@dataclass(frozen=True)
class BrefRecord:
    """A record that can be learned from."""

    where: str  # "file:line"
    tokens: Tokens
    plan: MaskPlan  # the K masks that `b_ref` was averaged over
    b_ref: float  # nats
    is_desirable: bool


@dataclass(frozen=True)
class BrefFile:
    """The usable records of a file, and what their B_ref was made with."""

    records: list[BrefRecord]
    fingerprint: dict[str, Any] | None  # None for the published program's records, which do not say
    eos: str
    max_length: int
    block_size: int | None  # of the blocks whose bounds B_ref adds up


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
    encoding = Encoding(
        tokenizer, settings["eos"], settings.get("chat", False), settings["max_length"], long,
        settings.get("parse_special_tokens", False),
    )  # fmt: skip
    items = [to_labelled(record, where)[0] for where, record in located]
    encoded = encode_answers(
        [(where, item.prompt, item.completion) for (where, _), item in zip(located, items, strict=True)],
        encoding,
    )
    records = []
    for (where, record), item, found in zip(located, items, encoded, strict=True):
        # precompute_bref.py --long drop leaves an answer out by sizes of 0
        if found.tokens is None or not any(record["l_values"]):
            continue
        lengths = answer_blocks(found.tokens, settings.get("block_size"))
        masks = find_masks(record, lengths, num_draws, where, verify=verify)
        b_ref = float(record["B_ref"][str(num_draws)])
        records.append(BrefRecord(where, found.tokens, plan_of(masks, lengths), b_ref, item.label))
    return BrefFile(records, made_with, settings["eos"], settings["max_length"], settings.get("block_size"))


def answer_blocks(tokens: Tokens, block_size: int | None) -> list[int]:
    """Tokens of each block of an answer; see `block_lengths`."""
    return block_lengths(len(tokens.context), len(tokens.answer), block_size)


def _check(record: dict[str, Any], where: str, num_draws: int) -> None:
    missing = [name for name in ("seed", "l_values", "masked_idx_sums", "B_ref") if name not in record]
    if missing:
        raise ValueError(f"{where}: no {missing[0]!r}; make the file with rlhf/precompute_bref.py")
    if record["B_ref"].get(str(num_draws)) is None:
        raise ValueError(f"--num_masks {num_draws}: {where} has B_ref for K = {', '.join(record['B_ref'])}")


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


GLOBAL_SEED = 0x1A2B3C4D5E6F7788
_BITS = 2**64 - 1
ESTIMATOR = "elbo-kto 1"  # changes when the same flags would give other numbers
# How the published program encodes.
PUBLISHED = {"eos": "padded", "max_length": 4096, "parse_special_tokens": True}


def mix64(x: int) -> int:
    """One step of SplitMix64, modulo 2^64."""
    x = (x + 0x9E3779B97F4A7C15) & _BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _BITS
    return x ^ (x >> 31)


def base_seed(index: int) -> int:
    """The seed of the record at position `index` of its split."""
    return mix64(GLOBAL_SEED ^ index)


def derive_seed(base: int, draw: int, tag: int) -> int:
    """The seed of draw 1, 2, ... for its size (tag 0) or its mask (tag 1)."""
    return mix64((base ^ (draw * 0x9E3779B97F4A7C15) ^ (tag * 0xD1342543DE82EF95)) & _BITS)


def mask_sizes(base: int, num_tokens: int, num_draws: int) -> list[int]:
    """l_1 .. l_K, uniform on 1..T; 0 for an answer without tokens."""
    if num_tokens <= 0:
        return [0] * num_draws
    return [1 + mix64(derive_seed(base, k, 0)) % num_tokens for k in range(1, num_draws + 1)]


def draw_masks(base: int, lengths: Sequence[int], num_draws: int, *, device: str = "cpu") -> np.ndarray:
    """[K, T] bool, for blocks of so many tokens. `device`: another only for masks that were drawn there."""
    # The CPU's generator whatever the model runs on, else a file made on a GPU could not be checked on a CPU.
    blocks = []
    for number, num_tokens in enumerate(lengths):
        seed = derive_seed(base, number, 2) if number else base
        masks = np.zeros((num_draws, num_tokens), dtype=bool)
        for k, size in enumerate(mask_sizes(seed, num_tokens, num_draws)):
            random = torch.Generator(device).manual_seed(derive_seed(seed, k + 1, 1))
            order = torch.rand(num_tokens, generator=random, device=device).argsort(stable=True)
            masks[k, order[:size].cpu().numpy()] = True
        blocks.append(masks)
    return np.concatenate(blocks, axis=1)


def plan_of(masks: np.ndarray, lengths: Sequence[int]) -> MaskPlan:
    """The plan of a record's masks, for blocks of so many tokens."""
    # T / l and not T / (K l): B is the mean over draws, so that prefixes of the draws give it for fewer
    blocks = np.split(masks, np.cumsum(lengths)[:-1], axis=1)
    weights = [block.shape[1] / np.maximum(1, block.sum(axis=1)) for block in blocks]
    if len(weights) > 1:
        weights = [np.repeat(np.stack(weights, axis=1), lengths, axis=1)]
    return MaskPlan(masks, weights[0], "iid")


def prefix_means(values: np.ndarray) -> np.ndarray:
    """[K, N] B^(1) .. B^(K) from b_1 .. b_K [K, N]."""
    # added one by one: where policy and reference are equal their difference is then 0 to the last bit
    return np.cumsum(values, axis=0) / np.arange(1, len(values) + 1)[:, None]


def mask_hash(is_masked: np.ndarray) -> int:
    """64 bits that name a mask: blake2b of its positions [T] as bits, first position lowest."""
    bits = np.packbits(np.asarray(is_masked, dtype=bool), bitorder="little").tobytes()
    return int.from_bytes(hashlib.blake2b(bits, digest_size=8).digest(), "little")


def mask_checks(masks: np.ndarray, prompt_length: int) -> dict[str, list[Any]]:
    """What a record keeps to recognise its masks by: position sums as published, and 64-bit hashes."""
    # published: positions in the whole sequence, not in the answer
    positions = np.arange(masks.shape[1]) + prompt_length
    return {
        "masked_idx_sums": [int(positions[mask].sum()) for mask in masks],
        "mask_hashes": [str(mask_hash(mask)) for mask in masks],
    }


def find_masks(
    record: dict[str, Any], lengths: Sequence[int], num_draws: int, where: str, *, verify: bool
) -> np.ndarray:
    """[K, T] the masks that the record's B_ref was made with; ValueError: how it differs from its seed's."""
    base = int(record["seed"])
    masks = draw_masks(base, lengths, num_draws)
    sizes = masks.sum(axis=1).tolist()
    if record["l_values"][:num_draws] != sizes:
        raise ValueError(
            f"{where}: l_values {record['l_values'][:num_draws]} do not belong to seed {base} and an answer "
            f"of {sum(lengths)} tokens, which gives {sizes}: another tokenizer, --max_length or --eos?"
        )
    if not verify or _matches(record, masks, num_draws):
        return masks
    # The published program drew its masks on the device that it ran on.
    if torch.cuda.is_available() and "mask_hashes" not in record:
        masks = draw_masks(base, lengths, num_draws, device="cuda")
        if _matches(record, masks, num_draws):
            return masks
    raise ValueError(
        f"{where}: masked_idx_sums or mask_hashes differ from the masks of seed {base}, so B_ref belongs to "
        "other masks. Records of the published program made on a GPU need a GPU here too; or make them again "
        "with rlhf/precompute_bref.py. --disable_mask_verification goes on all the same, with noisy ratios"
    )


def _matches(record: dict[str, Any], masks: np.ndarray, num_draws: int) -> bool:
    found = mask_checks(masks, record["prompt_length"])
    return all(name not in record or record[name][:num_draws] == values for name, values in found.items())


class BrefSettings(NamedTuple):
    """The flags that B_ref depends on."""

    max_length: int
    mask_id: int
    eos: str
    chat: bool
    dtype: str
    weights_dtype: str
    block_size: int | None


def fingerprint(
    checkpoint: str, tokenizer: PreTrainedTokenizerBase, settings: BrefSettings
) -> dict[str, Any]:
    """Everything that B_ref depends on besides the record."""
    return {
        "estimator": ESTIMATOR,
        "model": describe_checkpoint(checkpoint),
        "tokenizer": describe_tokenizer(tokenizer, with_template=True),
        # what is None was not there when older files were written
        **{name: value for name, value in settings._asdict().items() if value is not None},
    }


def check_fingerprint(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """ValueError naming what B_ref was made with and training would not use."""
    refuse_changes(
        found, expected, f"{where}: B_ref was made differently",
        "Make it again with rlhf/precompute_bref.py, or give the flags it was made with "
        "(--ref_model_name_or_path names the reference where training starts from another checkpoint)",
    )  # fmt: skip
