"""Attention without a causal order: rotary positions, kernel call, masks that mean the same to every kernel.

B sequences, L input rows, R rows that get a query, K keys, H heads, G key/value heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import and_masks, create_bidirectional_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_llada import CACHE, WindowCache
from .configuration_llada import LLaDAConfig
from .documents_llada import Documents, document_attention, same_document


class LLaDARotaryEmbedding(nn.Module):
    """Cosines and sines of position ids as `rotate` takes them; any rope type of transformers."""

    inv_freq: Tensor

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_sequence_length
        self.rope_type = config.rope_parameters["rope_type"]
        init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: LLaDAConfig, **_: object) -> tuple[Tensor, float]:
        """Inverse frequencies theta^(-2i / d), d what is rotated of a head, and the factor 1 on tables."""
        width = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return 1.0 / config.rope_theta**exponents, 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `model.bfloat16()` would round the frequencies, and positions with them: 3 digits are left of 4096.
        exact = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != exact[0].dtype:
            self.inv_freq, self.original_inv_freq = (table.to(self.inv_freq.device) for table in exact)
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # Multiplication, not a matrix product: autocast would turn that into bfloat16.
        angles = position_ids[:, :, None].float() * self.inv_freq.to(x.device)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, full_precision: bool) -> Tensor:
    """Queries or keys [B, L, H, head_dim] turned by their positions; cos, sin: [B or 1, L, 1, rotated].

    Halves, not neighbours, form the pairs, as in Llama: (a, b) -> (a cos - b sin, b cos + a sin), the minus
    already in the first half of `sin`. In float32 and cast back, unless told otherwise.
    """
    if cos.shape[-1] < x.shape[-1]:  # only the first part of each head turns
        turned = rotate(x[..., : cos.shape[-1]], cos, sin, full_precision=full_precision)
        return torch.cat((turned, x[..., cos.shape[-1] :]), dim=-1)
    y = x.float() if full_precision else x
    if cos.dtype != y.dtype:
        cos, sin = cos.to(y.dtype), sin.to(y.dtype)
    return (y * cos + y.roll(y.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attention written out: returns [B, R, H, head_dim] and the probabilities [B, H, R, K]."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, *, scaling: float
) -> tuple[Tensor, None]:
    """PyTorch's kernel, as transformers calls it: [B, R, H, head_dim], and no probabilities."""
    return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling).transpose(1, 2), None


class LLaDAAttention(nn.Module):
    """The kernel call alone: no parameters, so the published names stay and a hook can read probabilities."""

    is_causal = False

    def __init__(self, config: LLaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.scaling = config.head_dim**-0.5

    @property
    def is_plain(self) -> bool:
        """Whether `plain_attention` is all that the kernel does."""
        return self.num_key_value_groups == 1 and self.config._attn_implementation == "sdpa"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Documents | None
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.config.attention_dropout if self.training else 0.0
        if isinstance(mask, Documents):
            return document_attention(query, key, value, mask, scaling=self.scaling, dropout=dropout), None
        if self.is_plain:
            return plain_attention(query, key, value, mask, dropout, scaling=self.scaling)
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        return kernel(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, is_causal=False)


def make_attention_mask(
    config: LLaDAConfig,
    inputs_embeds: Tensor,
    *,
    attention_mask: Tensor | None,
    attention_bias: Tensor | None,
    key_positions: Tensor,
    cache: WindowCache | None,
    document_borders: Tensor | None = None,
    clean_columns: Tensor | None = None,
) -> Tensor | Documents | None:
    """The mask in the form that the configured kernel wants; None where every row sees every key.

    Args:
        inputs_embeds: [B, L, D]; its shape, type and device are used.
        attention_mask: [B, K], 1 = keep, padding on either side; or 4-dimensional, as `attention_bias`.
        attention_bias: [B or 1, 1 or H, L, K], bool or integer (nonzero = may attend), or floating (added).
        key_positions: [B or 1, K] position ids; with block-causal attention a row sees the keys of its own
            and of earlier blocks of positions.
        cache: tells how many keys there are, and where the rows stand among them.
        document_borders: [D + 1], see `documents_llada`; rows see the keys of their own document only.
        clean_columns: [B, L], see `two_streams`.

    ValueError: a mask of another shape, or one that the configured kernel would ignore or misread.
    """
    batch, num_rows = inputs_embeds.shape[:2]
    num_keys = key_positions.shape[1]
    kernel = config._attn_implementation or "eager"
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        if attention_bias is not None:
            raise ValueError("attention_mask is 4-D, so attention_bias cannot be given too; combine them")
        attention_mask, attention_bias = None, attention_mask
    if isinstance(attention_mask, Tensor) and attention_mask.shape != (batch, num_keys):
        raise ValueError(
            f"attention_mask must cover all keys: shape ({batch}, {num_keys}), "
            f"not {tuple(attention_mask.shape)}"
        )
    is_block_causal = config.attention_pattern == "block_causal"
    _check_kernel(kernel, has_bias=attention_bias is not None, is_block_causal=is_block_causal)
    sees = None
    if clean_columns is not None:
        if not is_block_causal or cache is not None:
            raise ValueError("clean_columns need attention_pattern block_causal, and go with no cache")
        sees = two_streams(key_positions.expand(batch, -1), config.attention_block_size, clean_columns)
    elif is_block_causal:
        sees = _block_causal(key_positions.expand(batch, -1), config.attention_block_size)
    if document_borders is not None:
        if attention_mask is not None or cache is not None or "flash" in kernel:
            raise ValueError(
                "document_borders go with no attention_mask (padding is a document of its own), with no "
                f"cache, and with sdpa, eager or flex_attention (here {kernel}); on a GPU sdpa is flash too"
            )
        if kernel == "sdpa" and sees is None and attention_bias is None:
            return Documents(document_borders)
        same = same_document(document_borders, batch, num_rows)
        sees = same if sees is None else and_masks(sees, same)

    if kernel in ("sdpa", "eager"):
        start = 0 if cache is None else cache.get_query_offset()
        mask = _own_mask(
            sees, attention_mask, (batch, start, start + num_rows, num_keys), inputs_embeds.device
        )
        if kernel == "eager" and mask is not None:
            mask = _additive(mask, inputs_embeds.dtype)
    else:
        mask = create_bidirectional_mask(
            config, inputs_embeds, attention_mask, and_mask_function=sees, **{CACHE: cache}
        )
    if mask is not None and "flash" in kernel and num_rows != num_keys:
        raise ValueError(
            f"attn_implementation {kernel} takes the last rows' padding for a cache window's; "
            "use sdpa, or no padding"
        )
    return mask if attention_bias is None else _combine(attention_bias, mask, inputs_embeds.dtype, kernel)


def _own_mask(
    sees: Callable[..., Tensor] | None,
    attention_mask: Tensor | None,
    span: tuple[int, int, int, int],
    device: torch.device,
) -> Tensor | None:
    """[B, 1, L or 1, K] bool, what `sees` says without padding; span: (B, first row, end of rows, K)."""
    # Not by transformers' builder: it asks a rule through vmap, which takes longer than the rest of a small
    # model's forward; looks at the padding's values, for which a GPU has to be waited for; and repeats
    # padding for every row, which then every layer keeps for its backward.
    padding = None
    if attention_mask is not None and not (attention_mask.device.type == "cpu" and attention_mask.all()):
        padding = attention_mask[:, None, None, :].bool()
    if sees is None:
        return padding
    batch, start, end, num_keys = span
    index = torch.arange(max(batch, end, num_keys), device=device)
    mask = sees(index[:batch, None, None], None, index[None, start:end, None], index[None, None, :num_keys])
    mask = mask.expand(batch, end - start, num_keys)[:, None]
    return mask if padding is None else mask & padding


def _check_kernel(kernel: str, *, has_bias: bool, is_block_causal: bool) -> None:
    if has_bias and ("flex" in kernel or "flash" in kernel):
        raise ValueError(
            f"attn_implementation {kernel} cannot take a dense 4-D mask: flash kernels have no such "
            "argument, flex attention would misread it; use sdpa or eager (or attention_pattern block_causal)"
        )
    if is_block_causal and "flash" in kernel:
        raise ValueError(
            f"attn_implementation {kernel} has no block-causal attention; use sdpa, eager or flex_attention"
        )


def _block_causal(key_positions: Tensor, block_size: int) -> Callable[..., Tensor]:
    block = key_positions // block_size  # [B, K]

    def sees(batch_idx: Tensor, head_idx: Tensor, query_idx: Tensor, key_idx: Tensor) -> Tensor:
        # transformers counts query_idx among the keys, so with a cache too one table serves both
        return block[batch_idx, key_idx] <= block[batch_idx, query_idx]

    return sees


def two_streams(key_positions: Tensor, block_size: int, clean_columns: Tensor) -> Callable[..., Tensor]:
    """The rule of training by blocks, where each record stands in a row twice: noised, and as it is.

    A row sees its own block of its own copy, and the clean copies of all blocks before: of a noised block
    never the clean tokens, which it has to predict, nor noise of another block. Source: BD3LM, arXiv
    2503.09573, section 3.
    """
    block = key_positions // block_size  # [B, K]
    is_noisy = clean_columns != torch.arange(clean_columns.shape[1], device=clean_columns.device)

    def sees(batch_idx: Tensor, head_idx: Tensor, query_idx: Tensor, key_idx: Tensor) -> Tensor:
        query, key = block[batch_idx, query_idx], block[batch_idx, key_idx]
        query_noisy, key_noisy = is_noisy[batch_idx, query_idx], is_noisy[batch_idx, key_idx]
        # `<` and not `<=`: with the same block's clean copy in sight there would be nothing to predict
        return (~key_noisy & (key < query)) | ((key_noisy == query_noisy) & (key == query))

    return sees


def _combine(bias: Tensor, mask: Tensor | None, dtype: torch.dtype, kernel: str) -> Tensor:
    if not bias.is_floating_point():
        bias = bias != 0
    if kernel != "eager" and bias.dtype == torch.bool:
        return bias if mask is None else bias & mask
    # Eager attention adds its mask, so a boolean one would count as 0 and 1.
    total = _additive(bias, dtype)
    return total if mask is None else (total + _additive(mask, dtype)).clamp_min(torch.finfo(dtype).min)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def take_rows(positions: Tensor, *tables: Tensor) -> list[Tensor]:
    """Rows [B, R, ...] of each table [B or 1, L, ...] at `positions` [B, R]."""
    batch = positions.shape[0]
    index = (torch.arange(batch, device=positions.device)[:, None], positions)
    return [x.expand(batch, *x.shape[1:])[index] for x in tables]


def take_mask_rows(mask: Tensor | None, positions: Tensor) -> Tensor | None:
    """The mask [B, 1 or H, R, K] of the rows at `positions` [B, R], from that of all rows."""
    if mask is None or mask.shape[2] == 1:
        return mask
    mask = mask.expand(positions.shape[0], -1, -1, -1)
    return mask.gather(2, positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
