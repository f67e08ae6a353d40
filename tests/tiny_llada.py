"""A model small enough for tests, a padded batch for it, and the published configuration."""

import torch

from modelling_final import LLaDAConfig, LLaDAModelLM

B, L, V = 3, 12, 40
SHAPE = {"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3, "mlp_hidden_size": 48}
SHAPE |= {"vocab_size": V, "embedding_size": V, "mask_token_id": V - 1, "eos_token_id": 0, "pad_token_id": 0}


def make_model(*, kernel="sdpa", **changes):
    """A model of SHAPE with the same random weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LLaDAModelLM._from_config(LLaDAConfig(**SHAPE | changes), attn_implementation=kernel).eval()


def clone(model, **changes):
    """The same weights under another configuration."""
    other = make_model(**changes)
    other.load_state_dict(model.state_dict())
    return other


def make_batch(side="none"):
    """Tokens [B, L], attention mask [B, L] ragged on one side, true positions [B, L]."""
    ids = torch.randint(1, V, (B, L), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([torch.arange(L) < n for n in ((L, L, L) if side == "none" else (L, 7, 9))]).long()
    mask = mask.flip(1) if side == "left" else mask
    return ids * mask, mask, (mask.cumsum(1) - 1).clamp_min(0)


def additive(allowed):
    """The floating form of a boolean mask: 0 where allowed, the lowest number elsewhere."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


# config.json of GSAI-ML/LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5, complete: 46 fields
PUBLISHED = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
