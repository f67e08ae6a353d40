"""Several documents in one row: attention that stays inside each, by the fastest kernel that can do it.

B sequences, L rows, H heads, G key/value heads, D documents of all sequences together.

Documents are told by their borders [D + 1]: the flat positions b * L + i where they begin, in order, and
B * L at the end. Each sequence begins with one; padding is a document too. Repeated borders are empty
documents, so that the number of borders can be kept the same from batch to batch.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Documents(NamedTuple):
    """Takes the place of a mask in the blocks."""

    borders: Tensor  # [D + 1] int


def check_borders(borders: Tensor, batch: int, length: int) -> None:
    """ValueError if the borders are not a vector of integers; values on the CPU are looked at too."""
    if borders.dim() != 1 or borders.shape[0] < 2 or borders.is_floating_point():
        raise ValueError(
            f"document_borders must be a vector of integers, got {borders.dtype} {borders.shape}"
        )
    if borders.device.type != "cpu":
        return  # a look would wait for the GPU
    begins = set(borders.tolist())
    if borders[0] != 0 or borders[-1] != batch * length or bool((borders.diff() < 0).any()):
        raise ValueError(f"document_borders must rise from 0 to {batch * length}, got {borders.tolist()}")
    if missing := [b for b in range(batch) if b * length not in begins]:
        raise ValueError(f"document_borders: sequence {missing[0]} does not begin with a document of its own")


def document_of_position(borders: Tensor, batch: int, length: int) -> Tensor:
    """[B, L] number of the document at each position."""
    flat = torch.arange(batch * length, device=borders.device)
    return (torch.bucketize(flat, borders.to(flat.dtype), right=True) - 1).view(batch, length)


def document_positions(borders: Tensor, batch: int, length: int) -> Tensor:
    """[B, L] position ids that count from 0 in each document."""
    flat = torch.arange(batch * length, device=borders.device).view(batch, length)
    return flat - borders.to(flat.dtype)[document_of_position(borders, batch, length)]


def left_neighbours(inputs: Mapping[str, Tensor], block_size: int) -> Tensor:
    """[B, L] columns whose hidden states predict each row in a model with shifted logits and two streams."""
    positions, clean_columns = inputs["position_ids"], inputs["clean_columns"]
    columns = torch.arange(positions.shape[1], device=positions.device)
    # left of a block's first row stands a finished block, so the clean copy
    left = torch.where(positions % block_size == 0, clean_columns, columns) - 1
    return torch.where(positions == 0, columns, left)


def same_document(borders: Tensor, batch: int, length: int) -> Callable[..., Tensor]:
    """The rule "query and key are of one document", in the form transformers makes masks from."""
    number = document_of_position(borders, batch, length)

    def sees(batch_idx: Tensor, head_idx: Tensor, query_idx: Tensor, key_idx: Tensor) -> Tensor:
        return number[batch_idx, key_idx] == number[batch_idx, query_idx]

    return sees


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, *, scaling: float, dropout: float
) -> Tensor:
    """Attention inside each document: [B, L, H, head_dim] from [B, H, L, head_dim] and keys of G heads."""
    batch, _, length, _ = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B L, H, head_dim]
    # FlashAttention over variable lengths, as it comes with torch; else one call for each document, which
    # costs the sum of squared lengths too and no mask
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0:
        from torch.nn.attention.varlen import varlen_attn  # only here: older versions of torch lack it

        borders = documents.borders.to(torch.int32)
        options = {"scale": scaling}
        if (repeats := query.shape[1] // key.shape[1]) > 1:
            if "enable_gqa" in signature(varlen_attn).parameters:
                options["enable_gqa"] = True
            else:  # before torch 2.12
                key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        attended = varlen_attn(query, key, value, borders, borders, length, length, **options)
    else:
        attended = _one_by_one(query, key, value, documents.borders, scaling=scaling, dropout=dropout)
    return attended.unflatten(0, (batch, length))


@torch.compiler.disable  # lengths are numbers of the program here: every batch would be compiled anew
def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, *, scaling: float, dropout: float
) -> Tensor:
    lengths = borders.diff().tolist()
    # split, not slices: its backward joins the pieces once, that of a slice fills a whole tensor with zeros
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    attended = [
        scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in part), dropout_p=dropout, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )[0].transpose(0, 1)
        for part in parts
        if part[0].shape[0]
    ]  # fmt: skip
    return torch.cat(attended)
