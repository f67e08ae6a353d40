"""One layer of LLaDA: attention, then SwiGLU, each on a normed copy and added back.

B sequences, L input rows, R rows that get a query, H heads, D model width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_llada import LLaDAAttention, rotate, take_mask_rows, take_rows
from .cache_llada import WindowCache
from .configuration_llada import LLaDAConfig
from .moe_llada import LLaDAMoE


class LLaDARMSNorm(nn.Module):
    """x / rms(x) * weight, normalised in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def is_fused(self, dtype: torch.dtype | None) -> bool:
        """Whether one call gives the published norm's bits: where nothing is rounded to half precision."""
        return dtype == self.weight.dtype and dtype in (torch.float32, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.is_fused(x.dtype):
            return F.rms_norm(x, weight.shape, weight, self.eps)
        y = x.float()  # published: rounded to half precision before the weight, which the fused norm is not
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * y.to(x.dtype)


class LLaDALlamaBlock(GradientCheckpointingLayer):
    """Attention, then SwiGLU, each on a normed copy and added back."""

    def __init__(self, config: LLaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        # plain attributes: a config's own take longer to read than a small matrix product
        self.head_dim, self.full_precision = config.head_dim, config.rope_full_precision
        d_model, head_dim, d_ff = config.d_model, config.head_dim, config.mlp_hidden_size
        qkv_bias = config.include_qkv_bias
        self.attn_norm = LLaDARMSNorm(d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(d_model, config.n_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, config.n_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, config.n_kv_heads * head_dim, bias=qkv_bias)
        self.q_norm = self.k_norm = None
        self.norms_whole = config.query_key_norm == "whole"
        if config.query_key_norm:
            heads, kv_heads = (config.n_heads, config.n_kv_heads) if self.norms_whole else (1, 1)
            self.q_norm = LLaDARMSNorm(heads * head_dim, config.rms_norm_eps)
            self.k_norm = LLaDARMSNorm(kv_heads * head_dim, config.rms_norm_eps)
        self.attention = LLaDAAttention(config, layer_idx)
        self.attn_out = nn.Linear(config.n_heads * head_dim, d_model, bias=False)
        self.ff_norm = LLaDARMSNorm(d_model, config.rms_norm_eps)
        # "mitchell": what is added to the residual stream starts smaller, the deeper the block
        self.attn_out.init_shrink = math.sqrt(2 * (layer_idx + 1))
        self.moe = LLaDAMoE(config) if config.is_moe(layer_idx) else None
        if self.moe is None:
            self.ff_proj = nn.Linear(d_model, d_ff, bias=False)
            self.up_proj = nn.Linear(d_model, d_ff, bias=False)
            self.ff_out = nn.Linear(d_ff, d_model, bias=False)
            self.ff_out.init_shrink = self.attn_out.init_shrink
        self.activation = ACT2FN[config.activation_type]
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: WindowCache | None = None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D], or [B, R, D] with `query_positions` [B, R]: every row still gives its key and value."""
        cos, sin = position_embeddings
        normed = self.attn_norm(hidden_states)
        key = self._heads(self.k_proj(normed), self.k_norm)
        key = rotate(key, cos, sin, full_precision=self.full_precision).transpose(1, 2)
        value = self._heads(self.v_proj(normed)).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        if query_positions is not None:
            hidden_states, normed, cos, sin = take_rows(query_positions, hidden_states, normed, cos, sin)
            attention_mask = take_mask_rows(attention_mask, query_positions)
        query = self._heads(self.q_proj(normed), self.q_norm)
        query = rotate(query, cos, sin, full_precision=self.full_precision).transpose(1, 2)

        attended, _ = self.attention(query, key, value, attention_mask)
        added = self.attn_out(attended.flatten(2))
        hidden_states = hidden_states + (self.dropout(added) if self.training else added)
        normed = self.ff_norm(hidden_states)
        if self.moe is not None:
            added = self.moe(normed)
        else:
            added = self.ff_out(self.activation(self.ff_proj(normed)) * self.up_proj(normed))
        return hidden_states + (self.dropout(added) if self.training else added)

    def _heads(self, x: Tensor, norm: LLaDARMSNorm | None = None) -> Tensor:
        if norm is not None and self.norms_whole:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and not self.norms_whole:
            x = norm(x)
        return x  # [B, L, H, head_dim]: turned like this, in the order of memory, it takes half the time
