"""Llama-style checkpoints and ours: the same blocks under other names, with another mask and one token more.

A LLaDA model whose blocks are one token long, with shifted logits, computes what the Llama computes: that is
its causal form. R rows of a source's embedding, E rows of ours, D width.
"""

import sys

import torch
from transformers import (
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
)

from llada.models.tokens import CHAT_ROLES, SPECIAL_TOKENS
from modelling_final import LLaDAConfig, LLaDAModelLM

SUPPORTED_TYPES = ("llama", "mistral", "qwen2")
SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
OUTER_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_OUTER_OF_OURS = {ours: theirs for theirs, ours in OUTER_NAMES.items()}
_BLOCK_OF_OURS = {ours: theirs for theirs, ours in BLOCK_NAMES.items()}
ROWS_MULTIPLE = 64  # keeps matrix kernels fast


def refuse_what_llada_lacks(source: PreTrainedConfig, *, num_layers: int | None = None) -> None:
    """Raises ValueError where the source computes something that LLaDA's blocks cannot."""
    reason = None
    rope = getattr(source, "rope_parameters", None) or {}
    width = source.hidden_size // source.num_attention_heads
    if source.model_type.startswith("qwen3"):
        reason = "Qwen3 normalises queries and keys (q_norm, k_norm), and LLaDA has no such layers"
    elif source.model_type not in SUPPORTED_TYPES:
        reason = f"model_type {source.model_type!r} is not one of {', '.join(SUPPORTED_TYPES)}"
    elif getattr(source, "mlp_bias", False) or getattr(source, "attention_bias", False):
        reason = "its attn_out or MLP layers have biases, and LLaDA has them on q, k and v only"
    elif (getattr(source, "head_dim", None) or width) != width:
        reason = f"head_dim {source.head_dim} is not hidden_size / heads, and LLaDA has no head_dim field"
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
    causal: bool = False,
    mask_token: str | None = None,
    mask_id: int | None = None,
) -> LLaDAModelLM:
    """The LLaDA model with the source's weights, shared in memory except for an embedding that had to grow.

    Adds the mask token (and padding, if the source has none) to `tokenizer` in place.

    Args:
        causal: keep the causal form and the number of rows, for a drafter that engines run with the source.
        mask_token: a token that serves as mask; default the tokenizer's own, or a new one.
        mask_id: the row of the mask, where the source was trained with one.

    Raises:
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
    if causal and mask_id is None and mask_token not in known and num_known >= num_rows:
        raise ValueError(
            "--drafter causal: every row of the embedding belongs to a token; name one that no text holds "
            f"with --mask_token, for example {' or '.join(_unused(tokenizer)[:3]) or 'a reserved token'}"
        )
    tokenizer.add_special_tokens({"mask_token": mask_token})
    config = llada_config(source, tokenizer, logit_shift=logit_shift or causal, causal=causal)
    if mask_id is not None:
        config.mask_token_id = mask_id

    weights = {}
    for name, weight in source.state_dict().items():
        if name == "lm_head.weight" and config.weight_tying:
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            new_mask = config.mask_token_id if mask_id is None else None
            weight = with_mean_rows(weight, config.embedding_size, num_known, new_mask)
        weights[llada_name(name)] = weight
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
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, logit_shift: bool, causal: bool
) -> LLaDAConfig:
    """The source's shape under LLaDA's names; token ids from the tokenizer.

    Where there is no chat template, rows are kept free for the chat tokens that fine-tuning then adds.
    """
    ar, rows = source.config, source.get_input_embeddings().num_embeddings
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    spare = 0 if tokenizer.chat_template or causal else len(CHAT_ROLES)
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
        attention_pattern="block_causal" if causal else "full",
        attention_block_size=1 if causal else None,
    )


def causal_form(model: LLaDAModelLM) -> PreTrainedModel:
    """The Llama or Qwen2 that computes what this model computes, with its weights, shared in memory.

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
    weights = {causal_name(name): weight for name, weight in model.state_dict().items()}
    if ours.weight_tying:
        weights.pop("lm_head.weight", None)
    kind = Qwen2ForCausalLM if ours.include_qkv_bias else LlamaForCausalLM
    found, report = kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=model.dtype, output_loading_info=True
    )
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]), report
    return found.eval()


def causal_config(ours: LLaDAConfig, *, bos_token_id: int | None = None) -> PreTrainedConfig:
    """The shape and ids of a LLaDA model as those of a Llama, or with biases on q, k and v of a Qwen2."""
    kind = Qwen2ForCausalLM if ours.include_qkv_bias else LlamaForCausalLM
    return kind.config_class(
        hidden_size=ours.d_model,
        num_attention_heads=ours.n_heads,
        num_key_value_heads=ours.n_kv_heads,
        num_hidden_layers=ours.n_layers,
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


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the first special token that the chat template writes after an assistant's answer, if any."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in special), None)


def llada_name(name: str) -> str:
    """The published LLaDA name of a Llama weight."""
    module, _, kind = name.rpartition(".")
    if module in OUTER_NAMES:
        return f"{OUTER_NAMES[module]}.{kind}"
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"model.transformer.blocks.{layer}.{BLOCK_NAMES[inner]}.{kind}"


def causal_name(name: str) -> str:
    """The Llama name of one of our weights."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER_OF_OURS:
        return f"{_OUTER_OF_OURS[module]}.{kind}"
    layer, _, inner = module.removeprefix("model.transformer.blocks.").partition(".")
    return f"model.layers.{layer}.{_BLOCK_OF_OURS[inner]}.{kind}"


@torch.no_grad()
def with_mean_rows(weight: torch.Tensor, num_rows: int, num_known: int, mask_id: int | None) -> torch.Tensor:
    """[R, D] -> [E, D]: the mask's row, and every row past R, is the mean of the rows of the source's tokens.

    As a head row the mean gives the average logit: the new token is neither favoured nor ruled out.
    """
    mean = weight[:num_known].mean(0, dtype=torch.float32).to(weight.dtype)
    if num_rows > weight.shape[0]:
        weight = torch.cat([weight, mean.expand(num_rows - weight.shape[0], -1)])
    if mask_id is not None:
        weight[mask_id] = mean
    return weight
