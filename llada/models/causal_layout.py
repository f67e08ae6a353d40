"""Llama-style checkpoints and ours: the same blocks under other names, with another mask and one token more.

A LLaDA model whose blocks are one token long, with shifted logits, computes what the Llama computes: that is
its causal form. R rows of a source's embedding, E rows of ours, D width.
"""

import sys
from collections.abc import Iterable

import torch
from transformers import (
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from llada.models.tokens import CHAT_ROLES, SPECIAL_TOKENS, end_of_turn
from modelling_final import LLaDAConfig, LLaDAModelLM
from modelling_final.families_llada import LLAMA_NAMES

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
# model_type -> fields of LLaDAConfig that this kind always has
_NORMS = {"query_key_norm": True}
SUPPORTED_TYPES = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": _NORMS, "qwen3_moe": _NORMS,
    "olmoe": {"query_key_norm": "whole"},
}  # fmt: skip
NAMES = (("mlp.experts", "moe.experts"), ("mlp.gate", "moe.router"), *LLAMA_NAMES)
ROWS_MULTIPLE = 64  # keeps matrix kernels fast


def refuse_what_llada_lacks(source: PreTrainedConfig, *, num_layers: int | None = None) -> None:
    """Raises ValueError where the source computes something that LLaDA's blocks cannot."""
    reason = None
    rope = getattr(source, "rope_parameters", None) or {}
    if source.model_type not in SUPPORTED_TYPES:
        reason = f"model_type {source.model_type!r} is not one of {', '.join(SUPPORTED_TYPES)}"
    elif getattr(source, "mlp_bias", False) or getattr(source, "attention_bias", False):
        reason = "its attn_out or MLP layers have biases, and LLaDA has them on q, k and v only"
    elif getattr(source, "clip_qkv", None):
        reason = f"clip_qkv {source.clip_qkv} is not built here"
    elif getattr(source, "mlp_only_layers", None) or getattr(source, "decoder_sparse_step", 1) != 1:
        reason = "layers without experts between others (mlp_only_layers, decoder_sparse_step)"
    elif rope.get("rope_type", "default") not in SUPPORTED_ROPE:
        reason = f"rope_type {rope['rope_type']!r} is not one of {', '.join(SUPPORTED_ROPE)}"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        reason = f"only {rope['partial_rotary_factor']} of each head is rotated, and LLaDA rotates all of it"
    elif num_layers is not None and not 1 <= num_layers <= source.num_hidden_layers:
        reason = f"--num_layers {num_layers}: the source has {source.num_hidden_layers} layers"
    if reason is not None:
        raise ValueError(reason)
    if getattr(source, "sliding_window", None):
        window = source.sliding_window
        print(
            f"warning: the source attends {window} positions back; LLaDA attends everywhere", file=sys.stderr
        )


def convert(
    source: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    logit_shift: bool = False,
    block_size: int | None = None,
    mask_token: str | None = None,
    mask_id: int | None = None,
) -> LLaDAModelLM:
    """The LLaDA model with the source's weights, shared in memory except for an embedding that had to grow.

    Adds the mask token (and padding, if the source has none) to `tokenizer` in place.

    Args:
        block_size: attention by blocks of so many tokens; None: full. 1 is the causal form: it is shifted
            and keeps the number of rows, for a drafter that engines run with the source.
        mask_token: a token that serves as mask; default the tokenizer's own, or a new one.
        mask_id: the row of the mask, where the source was trained with one.

    ValueError: no EOS, no such mask token, or no row for one in a causal drafter.
    """
    known = tokenizer.get_vocab()
    num_known = max(known.values()) + 1
    if mask_token is not None and mask_token not in known:
        raise ValueError(f"--mask_token {mask_token!r}: the tokenizer has no such token")
    if mask_token is None and mask_id in known.values():
        mask_token = tokenizer.convert_ids_to_tokens(mask_id)
    mask_token = mask_token or tokenizer.mask_token or SPECIAL_TOKENS["mask"]
    num_rows = source.get_input_embeddings().num_embeddings
    causal = block_size == 1
    if causal and mask_id is None and mask_token not in known and num_known >= num_rows:
        raise ValueError(
            "--drafter causal: every row of the embedding belongs to a token; name one that no text holds "
            f"with --mask_token, for example {' or '.join(_unused(tokenizer)[:3]) or 'a reserved token'}"
        )
    tokenizer.add_special_tokens({"mask_token": mask_token})
    config = llada_config(source, tokenizer, logit_shift=logit_shift or causal, block_size=block_size)
    if mask_id is not None:
        config.mask_token_id = mask_id

    weights = {}
    for name, weight in source.state_dict().items():
        if name == "lm_head.weight" and config.weight_tying:
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            new_mask = config.mask_token_id if mask_id is None else None
            weight = with_mean_rows(weight, config.embedding_size, num_known, new_mask)
        weights[_renamed(name, NAMES)] = weight
    model, report = LLaDAModelLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=source.dtype, output_loading_info=True
    )
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]), report
    return model.eval()


def _unused(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that neither the chat template nor the tokenizer itself writes."""
    own = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [text for text in special if text not in own and text not in (tokenizer.chat_template or "")]


def llada_config(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, logit_shift: bool, block_size: int | None
) -> LLaDAConfig:
    """The source's shape under LLaDA's names; token ids from the tokenizer.

    Where there is no chat template, rows are kept free for the chat tokens that fine-tuning then adds.
    """
    ar, rows = source.config, source.get_input_embeddings().num_embeddings
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    spare = 0 if tokenizer.chat_template or block_size == 1 else len(CHAT_ROLES)
    if num_tokens + spare > rows:
        rows = -(-(num_tokens + spare) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    eos = tokenizer.eos_token_id
    if eos is None:
        eos = ar.eos_token_id[0] if isinstance(ar.eos_token_id, list) else ar.eos_token_id
    if eos is None:
        raise ValueError("--model_name_or_path: neither the tokenizer nor config.json names an EOS token")
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rope = dict(ar.rope_parameters)
    return LLaDAConfig(
        d_model=ar.hidden_size,
        n_heads=ar.num_attention_heads,
        n_kv_heads=ar.num_key_value_heads,
        n_layers=ar.num_hidden_layers,
        mlp_hidden_size=ar.intermediate_size,
        mlp_ratio=ar.intermediate_size / ar.hidden_size,
        head_dim=getattr(ar, "head_dim", None),
        **SUPPORTED_TYPES[ar.model_type],
        **_expert_fields(ar),
        activation_type=ar.hidden_act,
        rms_norm_eps=ar.rms_norm_eps,
        rope_theta=rope.pop("rope_theta"),
        rope_parameters=rope if rope["rope_type"] != "default" else None,
        max_sequence_length=ar.max_position_embeddings,
        include_qkv_bias=source.model.layers[0].self_attn.q_proj.bias is not None,
        weight_tying=ar.tie_word_embeddings,
        vocab_size=num_tokens,
        embedding_size=rows,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        eot_token_id=end_of_turn(tokenizer),
        logit_shift=logit_shift,
        attention_pattern="block_causal" if block_size else "full",
        attention_block_size=block_size,
    )


def _expert_fields(source: PreTrainedConfig) -> dict[str, int | bool]:
    if not getattr(source, "num_experts", None):
        return {}
    return {
        "moe_num_experts": source.num_experts,
        "moe_experts_per_token": source.num_experts_per_tok,
        "moe_hidden_size": getattr(source, "moe_intermediate_size", source.intermediate_size),
        "moe_renormalise": source.norm_topk_prob,
    }


def causal_form(model: LLaDAModelLM) -> PreTrainedModel:
    """The Llama, Qwen2 or Qwen3 that computes what this model computes, with its weights, shared in memory.

    Its config names the mask as `pard_token`, as engines with parallel drafting expect it.

    Raises:
        ValueError: a model that looks to the right, or is not shifted.
    """
    ours = model.config
    if (ours.attention_pattern, ours.attention_block_size, ours.logit_shift) != ("block_causal", 1, True):
        raise ValueError(
            f"--format pard: attention_pattern {ours.attention_pattern}, attention_block_size "
            f"{ours.attention_block_size}, logit_shift {ours.logit_shift}: only a causal drafter has this "
            "form; scripts/convert_ar.py --drafter causal makes one"
        )
    config = causal_config(ours)
    config.pard_token = ours.mask_token_id
    back = [(ours, theirs) for theirs, ours in reversed(NAMES)]
    weights = {_renamed(name, back): weight for name, weight in model.state_dict().items()}
    if ours.weight_tying:
        weights.pop("lm_head.weight", None)
    found, report = _causal_class(ours).from_pretrained(
        None, config=config, state_dict=weights, dtype=model.dtype, output_loading_info=True
    )
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]), report
    return found.eval()


def _causal_class(ours: LLaDAConfig) -> type[PreTrainedModel]:
    if ours.moe_num_experts or ours.query_key_norm == "whole":
        raise ValueError("a model with experts, or with OLMoE's norms, has no Llama form")
    if ours.query_key_norm:
        return Qwen3ForCausalLM
    return Qwen2ForCausalLM if ours.include_qkv_bias else LlamaForCausalLM


def causal_config(ours: LLaDAConfig, *, bos_token_id: int | None = None) -> PreTrainedConfig:
    """The shape and ids of a LLaDA model as those of a Llama, Qwen2 or Qwen3."""
    return _causal_class(ours).config_class(
        hidden_size=ours.d_model,
        num_attention_heads=ours.n_heads,
        num_key_value_heads=ours.n_kv_heads,
        num_hidden_layers=ours.n_layers,
        head_dim=ours.head_dim,
        intermediate_size=ours.mlp_hidden_size,
        hidden_act=ours.activation_type,
        rms_norm_eps=ours.rms_norm_eps,
        rope_parameters={
            "rope_type": "default", **(ours.rope_parameters or {}), "rope_theta": ours.rope_theta
        },
        max_position_embeddings=ours.max_sequence_length,
        tie_word_embeddings=ours.weight_tying,
        vocab_size=ours.embedding_size,
        bos_token_id=bos_token_id,
        eos_token_id=ours.end_ids,
        pad_token_id=ours.pad_token_id,
    )  # fmt: skip


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    name += "."  # whole words: mlp.gate is no mlp.gate_proj
    for old, new in pairs:
        name = name.replace(f"{old}.", f"{new}.")
    return name.removesuffix(".")


@torch.no_grad()
def with_mean_rows(weight: torch.Tensor, num_rows: int, num_known: int, mask_id: int | None) -> torch.Tensor:
    """[R, D] -> [E, D]: the mask's row, and every row past R, is the mean of the source's rows of tokens."""
    # as a head row the mean gives the average logit: the new token is neither favoured nor ruled out
    mean = weight[:num_known].mean(0, dtype=torch.float32).to(weight.dtype)
    if num_rows > weight.shape[0]:
        weight = torch.cat([weight, mean.expand(num_rows - weight.shape[0], -1)])
    if mask_id is not None:
        weight[mask_id] = mean
    return weight
