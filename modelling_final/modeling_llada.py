"""LLaDA in PyTorch: a pre-norm transformer whose attention looks both ways, under the published module names.

B sequences, L input rows, R rows that get a query, M rows that get the LM head, D model width, E head outputs
(`config.embedding_size`, at least the tokenizer's size).

Mathematically this is Llama with a bidirectional mask (attn_out = o_proj, ff_proj = gate_proj, ff_out =
down_proj), with no time input and with logits that are not shifted: row i predicts token i.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_llada import (
    LLaDAAttention,
    LLaDARotaryEmbedding,
    make_attention_mask,
    rotate,
    take_mask_rows,
    take_rows,
)
from .cache_llada import WindowCache
from .configuration_llada import LLaDAConfig
from .documents_llada import check_borders, document_positions
from .generation_llada import LLaDAGenerationMixin
from .loss_llada import LLaDAHead, Score


@dataclass
class LLaDAOutput(ModelOutput):
    """What a forward gives; the fields not asked for are None."""

    loss: Tensor | None = None  # sum(weights * nll), or the mean over labels; scalar float32
    logits: Tensor | None = None  # [B, L, E], [B, R, E] with query_positions, [M, E] with rows
    nll: Tensor | None = None  # [M] float32, detached; with a score, the rows' losses
    past_key_values: WindowCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class LLaDARMSNorm(nn.Module):
    """x / rms(x) * weight, normalised in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class LLaDALlamaBlock(GradientCheckpointingLayer):
    """Attention, then SwiGLU, each on a normed copy and added back."""

    def __init__(self, config: LLaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        d_model, head_dim, d_ff = config.d_model, config.head_dim, config.mlp_hidden_size
        qkv_bias = config.include_qkv_bias
        self.attn_norm = LLaDARMSNorm(d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(d_model, config.n_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, config.n_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, config.n_kv_heads * head_dim, bias=qkv_bias)
        self.attention = LLaDAAttention(config, layer_idx)
        self.attn_out = nn.Linear(d_model, d_model, bias=False)
        self.ff_norm = LLaDARMSNorm(d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.ff_out = nn.Linear(d_ff, d_model, bias=False)
        self.activation = ACT2FN[config.activation_type]
        self.dropout = nn.Dropout(config.residual_dropout)
        # "mitchell": what is added to the residual stream starts smaller, the deeper the block
        self.attn_out.init_shrink = self.ff_out.init_shrink = math.sqrt(2 * (layer_idx + 1))

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
        precise = self.config.rope_full_precision
        normed = self.attn_norm(hidden_states)
        key = rotate(self._heads(self.k_proj(normed)), cos, sin, full_precision=precise)
        value = self._heads(self.v_proj(normed))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        if query_positions is not None:
            hidden_states, normed, cos, sin = (
                take_rows(x, query_positions) for x in (hidden_states, normed, cos, sin)
            )
            attention_mask = take_mask_rows(attention_mask, query_positions)
        query = rotate(self._heads(self.q_proj(normed)), cos, sin, full_precision=precise)

        attended, _ = self.attention(query, key, value, attention_mask)
        hidden_states = hidden_states + self.dropout(self.attn_out(attended.flatten(2)))
        normed = self.ff_norm(hidden_states)
        mlp = self.ff_out(self.activation(self.ff_proj(normed)) * self.up_proj(normed))
        return hidden_states + self.dropout(mlp)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # [B, H, L, head_dim]


class LLaDAPreTrainedModel(PreTrainedModel):
    """What transformers has to know about the family."""

    config: LLaDAConfig
    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["LLaDALlamaBlock"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar = {
        "hidden_states": LLaDALlamaBlock,
        "attentions": OutputRecorder(LLaDAAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws init_fn "mitchell": N(0, 1/fan_in) within 3 sigma, residual outputs smaller; or "normal"."""
        if not isinstance(module, nn.Linear | nn.Embedding):
            super()._init_weights(module)  # norms to one; rotary tables again, where they were made on meta
            return
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)
        if self.config.init_fn == "mitchell":
            std, cutoff = 1 / (math.sqrt(module.weight.shape[1]) * getattr(module, "init_shrink", 1.0)), 3.0
        else:
            std, cutoff = self.config.init_std, self.config.init_cutoff_factor
        if cutoff:
            init.trunc_normal_(module.weight, mean=0.0, std=std, a=-cutoff * std, b=cutoff * std)
        else:
            init.normal_(module.weight, mean=0.0, std=std)


class LLaDAModel(LLaDAPreTrainedModel):
    """Embedding, blocks and final norm. The LM head sits in here, as published, but is not applied."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "emb_drop": nn.Dropout(config.embedding_dropout),
                "blocks": nn.ModuleList(LLaDALlamaBlock(config, i) for i in range(config.n_layers)),
                "ln_f": LLaDARMSNorm(config.d_model, config.rms_norm_eps),
                "ff_out": LLaDAHead(config.d_model, config.embedding_size, bias=False),
            }
        )
        self.rotary_emb = LLaDARotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: WindowCache | None = None,
        inputs_embeds: Tensor | None = None,
        attention_bias: Tensor | None = None,
        use_cache: bool | None = None,
        query_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        document_borders: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Final hidden states after ln_f: [B, L, D], or [B, R, D]. Arguments as in `LLaDAModelLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError("output_attentions needs attn_implementation='eager'; other kernels form none")
        if past_key_values is None and use_cache:
            past_key_values = WindowCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, WindowCache):
            raise ValueError(f"past_key_values must be a WindowCache, got {type(past_key_values).__name__}")

        hidden_states = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        batch, num_rows = hidden_states.shape[:2]
        if document_borders is not None:
            check_borders(document_borders, batch, num_rows)
            if position_ids is None:
                position_ids = document_positions(document_borders, batch, num_rows)
        if position_ids is None:  # columns, under padding too, as published
            start, end = past_key_values.span(num_rows) if past_key_values is not None else (0, num_rows)
            position_ids = torch.arange(start, end, device=hidden_states.device)[None]
        if position_ids.shape not in ((1, num_rows), (batch, num_rows)):
            raise ValueError(
                f"position_ids must have shape (1 or {batch}, {num_rows}), got {tuple(position_ids.shape)}"
            )
        key_positions = position_ids
        if past_key_values is not None:
            key_positions = past_key_values.put_positions(position_ids)
        mask = make_attention_mask(
            self.config,
            hidden_states,
            attention_mask=attention_mask,
            attention_bias=attention_bias,
            key_positions=key_positions,
            cache=past_key_values,
            document_borders=document_borders,
        )
        # Kernels with a mask format of their own (flash: 2-D, flex: blocks) compute all rows; we pick later.
        has_rows = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)
        prunes = query_positions is not None and has_rows

        hidden_states = self.transformer.emb_drop(hidden_states)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        last = len(self.transformer.blocks) - 1
        for i, block in enumerate(self.transformer.blocks):
            hidden_states = block(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                query_positions=query_positions if prunes and i == last else None,
            )
        if query_positions is not None and not prunes:
            hidden_states = take_rows(hidden_states, query_positions)
        return BaseModelOutputWithPast(
            last_hidden_state=self.transformer.ln_f(hidden_states), past_key_values=past_key_values
        )


class LLaDAModelLM(LLaDAGenerationMixin, LLaDAPreTrainedModel):
    """LLaDA with its LM head: a mask predictor p(x_0 | x_t)."""

    _tied_weights_keys: ClassVar = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"}

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.transformer.ff_out

    def set_output_embeddings(self, value: nn.Linear) -> None:
        if type(value) is nn.Linear:  # transformers builds a plain one when it resizes
            head = LLaDAHead(value.in_features, value.out_features, bias=False, device="meta")
            head.weight = value.weight
            value = head
        self.model.transformer.ff_out = value

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As in transformers, and `embedding_size` follows `vocab_size`, or a saved model would not load."""
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.embedding_size = embedding.num_embeddings
        return embedding

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: WindowCache | None = None,
        inputs_embeds: Tensor | None = None,
        attention_bias: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        replace_position: Tensor | tuple[int, int] | None = None,
        logits_to_keep: int | Tensor = 0,
        query_positions: Tensor | None = None,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        score: Score | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        document_borders: Tensor | None = None,
    ) -> LLaDAOutput:
        """Logits, or the loss of chosen rows without ever forming all logits.

        Args:
            input_ids: [B, L] long; or `inputs_embeds`: [B, L, D].
            attention_mask: [B, K], 1 = keep, over all keys (K = L without a cache); or 4-D, as below.
            position_ids: [B or 1, L]; by default columns, also under padding. Count the true positions
                yourself for left-padded input to a block-causal model.
            past_key_values: a `WindowCache`; the input is appended to it, or overwrites its window.
            attention_bias: [B or 1, 1 or H, L, K]; boolean or integer (nonzero = may attend), or added.
            labels: [B, L]; loss is the mean nll where they are not -100, not shifted; no logits.
            replace_position: the cache window for this call only: (start, end), or a boolean mask [B, K].
            logits_to_keep: last n rows, or indices, as everywhere in transformers.
            query_positions: [B, R] long, input rows wanted; the last block and the head compute nothing else.
            rows: [M] long, flat input rows b * L + i that get the head; logits are [M, E].
            targets: [M] long, with rows: no logits; `nll`, and `loss` = sum(weights * nll) with its
                gradients formed chunk by chunk.
            weights: [M] float32, with targets; ones by default.
            document_borders: [D + 1], several documents per row that do not see one another: the flat
                positions b * L + i where they begin, and B * L. Positions count within each by default.
            score: with rows, instead of targets: any loss of their logits, chunk by chunk; `loss` is its sum.

        Raises:
            ValueError: arguments that exclude one another, or a mask the attention kernel cannot honour.
        """
        keeps = not isinstance(logits_to_keep, int) or logits_to_keep != 0
        if (labels is not None) + (rows is not None) + (query_positions is not None) + keeps > 1:
            raise ValueError("labels, rows, query_positions and logits_to_keep choose rows; give one of them")
        if (targets is not None and rows is None) or (weights is not None and targets is None):
            raise ValueError("targets need rows, and weights need targets")
        if score is not None and (rows is None or targets is not None):
            raise ValueError("a score needs rows, and takes the place of targets")
        if replace_position is not None and past_key_values is None:
            raise ValueError("replace_position is a window of a cache; give past_key_values")
        # transformers' capturing falls back to the config only for what is not passed at all
        captured = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        captured = {name: value for name, value in captured.items() if value is not None}

        with past_key_values.replacing(replace_position) if replace_position is not None else nullcontext():
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                attention_bias=attention_bias,
                use_cache=use_cache,
                # a shifted model needs the rows' left neighbours too, so it computes all
                query_positions=None if self.config.logit_shift else query_positions,
                document_borders=document_borders,
                **captured,
            )
            hidden = outputs.last_hidden_state
            if self.config.logit_shift:
                hidden = self._shift(hidden, outputs.past_key_values, document_borders)
                hidden = hidden if query_positions is None else take_rows(hidden, query_positions)

        loss = logits = nll = None
        if labels is not None:
            rows = (labels != -100).flatten().nonzero()[:, 0]
            targets = labels.flatten()[rows]
            weights = torch.full(rows.shape, 1 / max(1, rows.numel()), device=rows.device)
        if targets is not None:
            if weights is None:
                weights = torch.ones(rows.shape, device=rows.device)
            loss, nll = self._score(hidden.flatten(0, 1).index_select(0, rows), targets, weights)
        elif score is not None:
            loss, nll = self._score(hidden.flatten(0, 1).index_select(0, rows), score=score)
        elif rows is not None:
            logits = self.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, rows))
        else:
            logits = self.get_output_embeddings()(slice_logits_to_keep(hidden, logits_to_keep))
        return LLaDAOutput(
            loss=loss,
            logits=logits,
            nll=nll,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _shift(self, hidden: Tensor, cache: WindowCache | None, document_borders: Tensor | None) -> Tensor:
        """Hidden states one row later: what predicts token i is found at row i - 1 of such a model."""
        if cache is not None:
            return cache.put_hidden(hidden)
        shifted = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        if document_borders is None:
            return shifted
        is_first = document_positions(document_borders, *hidden.shape[:2]) == 0
        return torch.where(is_first[..., None], hidden, shifted)

    def _score(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        score: Score | None = None,
    ) -> tuple[Tensor, Tensor]:
        head = self.get_output_embeddings()
        if hasattr(head, "base_layer"):  # peft's wrapper: the loss would read the base weight only
            raise ValueError(
                "the LM head model.transformer.ff_out has an adapter, which the chunked loss cannot apply; "
                r"keep target_modules to the blocks, for example '.*blocks\.\d+\.(q_proj|ff_out)'"
            )
        return head(hidden, targets, weights, score)
