"""Llama-style checkpoints and ours: the same blocks under other names, with another mask and one token more.

A LLaDA model whose blocks are one token long, with shifted logits, computes what the Llama computes: that is
its causal form. R rows of a source's embedding, E rows of ours, D width.
"""

import sys

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, logit_shift: bool = False
) -> LLaDAModelLM:
    """The LLaDA model with the source's weights, shared in memory except for an embedding that had to grow.

    Adds the mask token (and padding, if the source has none) to `tokenizer` in place.
    """
    num_known = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_special_tokens({"mask_token": SPECIAL_TOKENS["mask"]})
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    config = llada_config(source, tokenizer, num_tokens=num_tokens, logit_shift=logit_shift)

    weights = {}
    for name, weight in source.state_dict().items():
        if name == "lm_head.weight" and config.weight_tying:
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = with_mean_rows(weight, config.embedding_size, num_known, config.mask_token_id)
        weights[llada_name(name)] = weight
    model, report = LLaDAModelLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=source.dtype, output_loading_info=True
    )
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]), report
    return model.eval()


def llada_config(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, num_tokens: int, logit_shift: bool
) -> LLaDAConfig:
    """The source's shape under LLaDA's names; token ids from the tokenizer.

    Where there is no chat template, rows are kept free for the chat tokens that fine-tuning then adds.
    """
    ar, rows = source.config, source.get_input_embeddings().num_embeddings
    spare = 0 if tokenizer.chat_template else len(CHAT_ROLES)
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
    )


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


@torch.no_grad()
def with_mean_rows(weight: torch.Tensor, num_rows: int, num_known: int, mask_id: int) -> torch.Tensor:
    """[R, D] -> [E, D]: the mask's row, and every row past R, is the mean of the rows of the source's tokens.

    As a head row the mean gives the average logit: the new token is neither favoured nor ruled out.
    """
    mean = weight[:num_known].mean(0, dtype=torch.float32).to(weight.dtype)
    if num_rows > weight.shape[0]:
        weight = torch.cat([weight, mean.expand(num_rows - weight.shape[0], -1)])
    weight[mask_id] = mean
    return weight
