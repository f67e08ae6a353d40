"""LLaDA in PyTorch: a pre-norm transformer whose attention looks both ways, under the published module names.

B sequences, L input rows, R rows that get a query, M rows that get the LM head, D model width, E head outputs
(`config.embedding_size`, at least the tokenizer's size).

Mathematically this is Llama with a bidirectional mask (attn_out = o_proj, ff_proj = gate_proj, ff_out =
down_proj), with no time input and with logits that are not shifted: row i predicts token i.
"""

import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_llada import LLaDAAttention, LLaDARotaryEmbedding, make_attention_mask, take_rows
from .block_llada import LLaDALlamaBlock, LLaDARMSNorm
from .cache_llada import CACHE, WindowCache
from .configuration_llada import LLaDAConfig
from .documents_llada import check_borders, document_positions, left_neighbours
from .families_llada import register_weight_names
from .generation_llada import LLaDAGenerationMixin
from .loss_llada import LLaDAHead, Score
from .moe_llada import LLaDAExperts, LLaDARouter, draw_weights

register_weight_names()


@dataclass
class LLaDAOutput(CausalLMOutputWithPast):  # has the cache by the name that each transformers calls it
    """What a forward gives; the fields not asked for are None.

    loss: sum(weights * nll), or the mean over labels; scalar float32.
    logits: [B, L, E], [B, R, E] with query_positions, [M, E] with rows.
    """

    nll: Tensor | None = None  # [M] float32, detached; with a score, the rows' losses


class Inputs(TypedDict, total=False):
    """What a forward takes beside tokens, padding, cache and the choice of rows."""

    position_ids: Tensor  # [B or 1, L]; default the columns, also under padding, as published
    inputs_embeds: Tensor  # [B, L, D], instead of input_ids
    attention_bias: Tensor  # [B or 1, 1 or H, L, K]; boolean or integer (nonzero = may attend), or added
    document_borders: Tensor  # [D + 1], documents that do not see one another; see `documents_llada`
    clean_columns: Tensor  # [B, L], of each row's clean copy, a clean row's own; see `two_streams`
    use_cache: bool  # without past_key_values: start a cache
    output_hidden_states: bool
    output_attentions: bool


def given(inputs: Inputs) -> Inputs:
    """Those that are not None; TypeError for a name that does not exist."""
    if unknown := inputs.keys() - Inputs.__annotations__.keys():
        raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
    # transformers looks at the config for what to capture if a name is not there
    return {name: value for name, value in inputs.items() if value is not None}


def put_code_beside(folder: str | Path) -> None:
    """Copies this code into a saved model's folder, which then loads with trust_remote_code alone."""
    for file in Path(__file__).parent.glob("*_llada.py"):
        if not Path(folder, file.name).exists() or not file.samefile(Path(folder, file.name)):
            shutil.copyfile(file, Path(folder, file.name))


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
    # transformers looks for the words @use_experts_implementation in this file; they stand in moe_llada.py.
    _can_record_outputs: ClassVar = {
        "hidden_states": LLaDALlamaBlock,
        "attentions": OutputRecorder(LLaDAAttention, index=1),
    }

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """As in transformers, with the code beside the weights: config.json's auto_map names it."""
        super().save_pretrained(save_directory, *args, **options)
        if options.get("is_main_process", True):
            put_code_beside(save_directory)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws init_fn "mitchell": N(0, 1/fan_in) within 3 sigma, residual outputs smaller; or "normal"."""
        if isinstance(module, LLaDARouter | LLaDAExperts):
            return draw_weights(module)
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
        past_key_values: WindowCache | None = None,
        query_positions: Tensor | None = None,
        **inputs: Unpack[Inputs],
    ) -> BaseModelOutputWithPast:
        """Final hidden states after ln_f: [B, L, D], or [B, R, D]. Arguments as in `LLaDAModelLM.forward`."""
        inputs = given(inputs)
        self._check(input_ids, past_key_values, inputs)
        embeds, borders = inputs.get("inputs_embeds"), inputs.get("document_borders")
        hidden_states = self.transformer.wte(input_ids) if embeds is None else embeds
        if past_key_values is None and inputs.get("use_cache"):
            past_key_values = WindowCache(self.config)
        position_ids = self._positions(hidden_states, inputs.get("position_ids"), borders, past_key_values)
        key_positions = position_ids
        if past_key_values is not None:
            key_positions = past_key_values.put_positions(position_ids)
        mask = make_attention_mask(
            self.config,
            hidden_states,
            attention_mask=attention_mask,
            attention_bias=inputs.get("attention_bias"),
            key_positions=key_positions,
            cache=past_key_values,
            document_borders=borders,
            clean_columns=inputs.get("clean_columns"),
        )
        # Kernels with a mask format of their own (flash: 2-D, flex: blocks) compute all rows; we pick later.
        has_rows = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)
        prunes = query_positions is not None and has_rows

        hidden_states = self.transformer.emb_drop(hidden_states)
        cos, sin = self.rotary_emb(hidden_states, position_ids)
        position_embeddings = cos[:, :, None], sin[:, :, None]
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
            (hidden_states,) = take_rows(query_positions, hidden_states)
        return BaseModelOutputWithPast(self.transformer.ln_f(hidden_states), past_key_values)

    def _check(self, input_ids: Tensor | None, cache: WindowCache | None, inputs: Inputs) -> None:
        if (input_ids is None) == (inputs.get("inputs_embeds") is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs.get("output_attentions") and self.config._attn_implementation != "eager":
            raise ValueError("output_attentions needs attn_implementation='eager'; other kernels form none")
        if cache is not None and not isinstance(cache, WindowCache):
            raise ValueError(f"past_key_values must be a WindowCache, got {type(cache).__name__}")

    @staticmethod
    def _positions(
        hidden_states: Tensor, position_ids: Tensor | None, borders: Tensor | None, cache: WindowCache | None
    ) -> Tensor:
        """[B or 1, L] position ids: those given, or counted in each document, or else the columns."""
        batch, num_rows = hidden_states.shape[:2]
        if borders is not None:
            check_borders(borders, batch, num_rows)
        if position_ids is None and borders is not None:
            return document_positions(borders, batch, num_rows)
        if position_ids is None:  # columns, under padding too, as published
            start, end = cache.span(num_rows) if cache is not None else (0, num_rows)
            return torch.arange(start, end, device=hidden_states.device)[None]
        if position_ids.shape not in ((1, num_rows), (batch, num_rows)):
            raise ValueError(
                f"position_ids must have shape (1 or {batch}, {num_rows}), got {tuple(position_ids.shape)}"
            )
        return position_ids


def _kept(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """The rows that transformers' `logits_to_keep` names: the last n, the same of all, or each sequence's."""
    if isinstance(keep, int):
        return hidden[:, -keep:]
    if keep.ndim < 2:
        return hidden[:, keep]
    return hidden[keep] if keep.dtype == torch.bool else hidden.take_along_dim(keep[..., None], dim=1)


class LLaDAModelLM(LLaDAGenerationMixin, LLaDAPreTrainedModel):
    """LLaDA with its LM head: a mask predictor p(x_0 | x_t)."""

    accepts_loss_kwargs = False  # transformers' Trainer would add its own to **inputs
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
        past_key_values: WindowCache | None = None,
        *,
        replace_position: Tensor | tuple[int, int] | None = None,
        logits_to_keep: int | Tensor = 0,
        query_positions: Tensor | None = None,
        labels: Tensor | None = None,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        score: Score | None = None,
        **inputs: Unpack[Inputs],
    ) -> LLaDAOutput:
        """Logits, or the loss of chosen rows without ever forming all logits.

        One of four may choose the rows that the head sees; by default it sees all.

        Args:
            input_ids: [B, L] long; or `inputs_embeds`.
            attention_mask: [B, K], 1 = keep, over all keys (K = L without a cache); or 4-D, as
                `attention_bias`.
            past_key_values: a `WindowCache`; the input is appended to it, or overwrites its window.
            replace_position: the cache window for this call only: (start, end), or a boolean mask [B, K].
            logits_to_keep: (1) the last n rows, or indices, as everywhere in transformers.
            query_positions: (2) [B, R] long, rows of each sequence; the last block computes nothing else.
            labels: (3) [B, L], rows that are not -100; `loss` is their mean nll, not shifted.
            rows: (4) [M] long, flat rows b * L + i; logits are [M, E].
            targets: [M] long, with rows, instead of logits: `nll`, and `loss` = sum(weights * nll) with its
                gradients formed chunk by chunk; `weights`: [M] float32, ones by default.
            score: with rows, instead of targets: any loss of their logits, chunk by chunk; `loss` is its sum.
            inputs: see `Inputs`.

        Raises:
            ValueError: arguments that exclude one another, or a mask the attention kernel cannot honour.
        """
        keeps = isinstance(logits_to_keep, Tensor) or logits_to_keep != 0
        if (labels is not None) + (rows is not None) + (query_positions is not None) + keeps > 1:
            raise ValueError("labels, rows, query_positions and logits_to_keep choose rows; give one of them")
        if (targets is not None and rows is None) or (weights is not None and targets is None):
            raise ValueError("targets need rows, and weights need targets")
        if score is not None and (rows is None or targets is not None):
            raise ValueError("a score needs rows, and takes the place of targets")
        if labels is not None:
            rows = (labels != -100).flatten().nonzero()[:, 0]
            targets = labels.flatten()[rows]
            weights = torch.full(rows.shape, 1 / max(1, rows.numel()), device=rows.device)

        outputs = self._hidden(
            input_ids, attention_mask, past_key_values, replace_position, query_positions, given(inputs)
        )
        hidden = outputs.last_hidden_state
        loss = logits = nll = None
        if rows is not None:
            hidden = hidden.flatten(0, 1).index_select(0, rows)
        elif keeps:
            hidden = _kept(hidden, logits_to_keep)
        if targets is None and score is None:
            logits = self.get_output_embeddings()(hidden)
        else:
            loss, nll = self._score(hidden, targets, weights, score)
        outputs = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return LLaDAOutput(loss=loss, logits=logits, nll=nll, **outputs)

    def _hidden(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: WindowCache | None,
        replace_position: Tensor | tuple[int, int] | None,
        query_positions: Tensor | None,
        inputs: Inputs,
    ) -> BaseModelOutputWithPast:
        """The final hidden states that predict the tokens of their own rows: [B, L, D], or [B, R, D]."""
        if replace_position is not None and cache is None:
            raise ValueError("replace_position is a window of a cache; give past_key_values")
        shifts = self.config.logit_shift
        with cache.replacing(replace_position) if replace_position is not None else nullcontext():
            outputs = self.model(
                input_ids,
                attention_mask,
                cache,
                # a shifted model needs the rows' left neighbours too, so it computes all
                None if shifts else query_positions,
                **inputs,
            )
            if shifts:
                hidden = self._shift(outputs.last_hidden_state, getattr(outputs, CACHE), inputs)
                if query_positions is not None:
                    (hidden,) = take_rows(query_positions, hidden)
                outputs.last_hidden_state = hidden
        return outputs

    def _shift(self, hidden: Tensor, cache: WindowCache | None, inputs: Inputs) -> Tensor:
        """Hidden states one row later: what predicts token i is found at row i - 1 of such a model."""
        if cache is not None:
            return cache.put_hidden(hidden)
        if "clean_columns" in inputs:
            return take_rows(left_neighbours(inputs, self.config.attention_block_size), hidden)[0]
        shifted = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        if "document_borders" not in inputs:
            return shifted
        is_first = document_positions(inputs["document_borders"], *hidden.shape[:2]) == 0
        return torch.where(is_first[..., None], hidden, shifted)

    def _score(
        self, hidden: Tensor, targets: Tensor | None, weights: Tensor | None, score: Score | None
    ) -> tuple[Tensor, Tensor]:
        head = self.get_output_embeddings()
        if hasattr(head, "base_layer"):  # peft's wrapper: the loss would read the base weight only
            raise ValueError(
                "the LM head model.transformer.ff_out has an adapter, which the chunked loss cannot apply; "
                r"keep target_modules to the blocks, for example '.*blocks\.\d+\.(q_proj|ff_out)'"
            )
        if targets is not None and weights is None:
            weights = torch.ones(targets.shape, device=targets.device)
        return head(hidden, targets, weights, score)
