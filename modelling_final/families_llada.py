"""Families of published masked diffusion models: one row each, from their files to ours and back.

A row tells which published key is which field of `LLaDAConfig`, what the architecture always does, which keys
ask for paths that are not built, and how its weights are called. What is trained here is written back under
the published names, so that engines which know the family serve it.

Sources: the modelling code published with each checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

try:
    from transformers.core_model_loading import Split
except ImportError:  # transformers 5.17: in equal parts alone; others end as weights of the wrong shape
    from transformers.core_model_loading import Chunk as Split

_OFF = (None, False, 0)
_ON = (None, True)

LLAMA_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
    "hidden_act": "activation_type",
    "initializer_range": "init_std",
}
MOE_FIELDS = {
    "num_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_experts_per_token",
    "moe_intermediate_size": "moe_hidden_size",
}
# Keys that do not change the function; they are written back as they came.
QUIET = (
    "use_cache", "attn_implementation", "bos_token_id", "_name_or_path", "max_window_layers", "debug",
    "output_router_logits", "router_aux_loss_coef", "ep_size", "fuse_cross_entropy", "micro_forward",
    "skip_checkpoint", "use_deepep", "partial_rotary_factor", "rope_scaling", "model_type", "moe_layer_freq",
)  # fmt: skip

# (published, ours) in the order of loading. The head comes last: in the other direction it is then first, and
# gone before the blocks' own `ff_out` is looked for.
LLAMA_NAMES = (
    ("model.embed_tokens", "model.transformer.wte"),
    ("model.norm", "model.transformer.ln_f"),
    ("model.layers", "model.transformer.blocks"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ff_norm"),
    *((f"self_attn.{name}", name) for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")),
    ("self_attn.o_proj", "attn_out"),
    ("mlp.gate_proj", "ff_proj"),
    ("mlp.up_proj", "up_proj"),
    ("mlp.down_proj", "ff_out"),
    ("lm_head", "model.transformer.ff_out"),
)
# The experts' matrices get names of their own first, that the blocks' rules do not meet.
MOE_NAMES = (
    *((rf"mlp.experts.(\d+).{name}_proj", rf"moe.experts.\1.w_{name}") for name in ("gate", "up", "down")),
    ("mlp.gate", "moe.router"),
)
LLADA2_NAMES = (
    ("model.word_embeddings", "model.transformer.wte"),
    ("attention.query_layernorm", "q_norm"),
    ("attention.key_layernorm", "k_norm"),
    ("attention.dense", "attn_out"),
    ("mlp.shared_experts", "moe.shared.mlp"),  # whose matrices Llama's rules then name
    *MOE_NAMES,
    # Back, a name of ours must have one of theirs: no Llama name for what has another here.
    *(pair for pair in LLAMA_NAMES if "attn" not in pair[0] and "embed_tokens" not in pair[0]),
)


def _expert_stacks() -> list[WeightConverter]:
    """One matrix an expert there, one stack of them here, gate above up."""
    each = [f"moe.experts.*.w_{name}.weight" for name in ("gate", "up", "down")]
    gate_up = [MergeModulelist(dim=0), Concatenate(dim=1)]
    return [
        WeightConverter(each[:2], "moe.experts.gate_up_proj", gate_up),
        WeightConverter(each[2], "moe.experts.down_proj", [MergeModulelist(dim=0)]),
    ]


def _fused_qkv() -> list[WeightConverter]:
    """[all q | all k | all v] there, three matrices here."""
    three = [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    return [WeightConverter("attention.query_key_value.weight", three, [Split(dim=0)])]


@dataclass(frozen=True)
class Family:
    """One row."""

    name: str
    architecture: str
    model_types: tuple[str, ...]
    # published key -> field of ours
    fields: Mapping[str, str] = field(default_factory=lambda: LLAMA_FIELDS)
    # fields that the architecture decides
    fixed: Mapping[str, Any] = field(default_factory=dict)
    # fields that older files of the family leave out
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # published keys -> the values under which they are built here
    off: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    # published -> our weight names
    names: tuple[tuple[str, str], ...] = LLAMA_NAMES
    experts: bool = False
    fused_qkv: bool = False

    def to_ours(self, published: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `LLaDAConfig` from a published config.json; ValueError for a path that is not built."""
        values = without_what_is_off(published)
        own = {key: (value,) for key, value in self.fixed.items()}
        for key, built in (COMMON_OFF | self.off | own).items():
            if key in values and values[key] not in built:
                raise ValueError(f"{key} {values[key]!r} asks for what is not built here ({self.name})")
        ours = {"family": self.name, "activation_type": "silu", **self.defaults}
        for key, value in published.items():
            if key not in (*QUIET, *self.off, *COMMON_OFF):
                ours[self.fields.get(key, key)] = value
        if self.experts and not ours.get("moe_num_experts"):
            raise ValueError(f"num_experts {published.get('num_experts')}: a {self.name} model has experts")
        rest = {key: value for key, value in published.items() if key not in WRITTEN_ANEW}
        ours |= {"embedding_size": None, "init_fn": "normal", "published": rest, **self.fixed}
        if layers := published.get("moe_layer_freq"):
            ours["moe_num_dense"] = layers.index(1) if 1 in layers else len(layers)
            if 0 in layers[ours["moe_num_dense"] :]:
                raise ValueError(f"moe_layer_freq {layers}: dense layers behind others are not built here")
        factor = published.get("partial_rotary_factor") or 1.0
        if published.get("rope_scaling") or factor != 1.0:
            scaling = dict(published.get("rope_scaling") or {})
            scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
            ours["rope_parameters"] = scaling | ({"partial_rotary_factor": factor} if factor != 1.0 else {})
        return ours

    def to_published(self, ours: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of a model of the family; what the layout has no name for keeps ours.

        `ours`: fields of a `LLaDAConfig`, `defaults`: those of its class.
        """
        output = {"model_type": self.model_types[0], **(ours.get("published") or {})}
        published = {name: key for key, name in self.fields.items()}
        known = {**defaults, **self.defaults, **self.fixed, "activation_type": "silu", "init_fn": "normal"}
        hidden = ("family", "published", "vocab_size", "embedding_size", "rope_parameters", "model_type",
                  "use_cache")  # fmt: skip
        for name, value in ours.items():
            if name in published:
                output[published[name]] = value
            elif name not in hidden and (name in output or value not in (None, known.get(name))):
                output[name] = value
        output["vocab_size"] = ours["embedding_size"]
        scaling = {k: v for k, v in (ours["rope_parameters"] or {}).items() if k not in ROPE_ELSEWHERE}
        if scaling.get("rope_type", "default") != "default":
            output["rope_scaling"] = scaling
        if "moe_layer_freq" in output:  # says it already
            output.pop("moe_num_dense", None)
        output["architectures"] = [self.architecture]
        return output


WRITTEN_ANEW = ("dtype", "torch_dtype", "transformers_version", "auto_map", "architectures", "published")
ROPE_ELSEWHERE = ("rope_theta", "partial_rotary_factor")
COMMON_OFF: dict[str, Sequence[Any]] = {
    **dict.fromkeys(("sliding_window", "use_sliding_window", "use_mrope", "clip_qkv", "mlp_bias"), _OFF),
    **dict.fromkeys(("attention_bias", "use_bias", "use_qkv_bias", "quantization_config"), _OFF),
    "layer_types": (None, []),
}
_BLOCKS = {"query_key_norm": True, "attention_pattern": "block_causal"}
_QWEN3_MOE = {"decoder_sparse_step": (None, 1), "mlp_only_layers": (None, [])}
_LLADA2_OFF = {
    **dict.fromkeys(
        ("norm_head", "norm_softmax", "using_split_qkv_in_self_attention", "output_dropout"), _OFF
    ),
    **dict.fromkeys(("use_rmsnorm", "use_qk_norm", "moe_router_enable_expert_bias"), _ON),
    "score_function": (None, "sigmoid"),
    # Published and never read there: weights are always renormalised, routers always float32.
    "norm_topk_prob": (None, True, False),
    "router_dtype": (None, "fp32"),
    "rotary_dim": (None, *range(1, 1025)),
}
_LLADA_MOE_OFF = {
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_router_enable_expert_bias"), _OFF),
    **dict.fromkeys(("router_num_group", "router_topk_group"), _OFF),
    "moe_router_score_function": (None, "softmax"),
    # Published and never read there.
    "norm_topk_prob": (None, True, False),
    "routed_scaling_factor": (None, 1, 1.0),
}

FAMILIES = {
    row.name: row
    for row in (
        Family("illada", "ILLaDAForCausalLM", ("illada",), LLAMA_FIELDS | {"resid_pdrop": "residual_dropout"},
               off={"layer_norm_eps": (None,)}),
        # Logits at a row belong to the next token.
        Family("dream", "DreamModel", ("Dream",), fixed={"include_qkv_bias": True, "logit_shift": True},
               off={"qkv_bias": _ON}),
        # The first files named no block; the published programs take 4.
        Family("sdar", "SDARForCausalLM", ("sdar",), LLAMA_FIELDS | {"block_size": "attention_block_size"},
               fixed=_BLOCKS, defaults={"attention_block_size": 4}),
        Family("sdar_moe", "SDARMoeForCausalLM", ("sdar_moe",),
               LLAMA_FIELDS | MOE_FIELDS | {"block_size": "attention_block_size",
                                            "norm_topk_prob": "moe_renormalise"},
               fixed=_BLOCKS, defaults={"attention_block_size": 4}, off=_QWEN3_MOE,
               names=MOE_NAMES + LLAMA_NAMES, experts=True),
        Family("llada_moe", "LLaDAMoEModelLM", ("lladamoe", "llada"),
               LLAMA_FIELDS | MOE_FIELDS | {"dense_intermediate_size": "mlp_hidden_size",
                                            "expert_intermediate_size": "moe_hidden_size",
                                            "qk_layernorm": "query_key_norm"},
               off=_LLADA_MOE_OFF, names=MOE_NAMES + LLAMA_NAMES, experts=True),
        # Its files name no block either; all of its programs take 32.
        Family("llada2_moe", "LLaDA2MoeModelLM", ("llada2_moe",),
               LLAMA_FIELDS | MOE_FIELDS | {"first_k_dense_replace": "moe_num_dense",
                                            "n_group": "moe_num_groups", "topk_group": "moe_groups_per_token",
                                            "routed_scaling_factor": "moe_scaling",
                                            "num_shared_experts": "moe_num_shared"},
               fixed=_BLOCKS | {"moe_router": "sigmoid", "moe_renormalise": True},
               defaults={"attention_block_size": 32}, off=_LLADA2_OFF,
               names=LLADA2_NAMES, experts=True, fused_qkv=True),
    )
}  # fmt: skip


MODEL_TYPES = sorted({kind for row in FAMILIES.values() for kind in row.model_types})


def to_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `LLaDAConfig` from a config.json, or ValueError: LLaDA's own are these already."""
    kind, architectures = config.get("model_type", "llada"), config.get("architectures") or ()
    if "family" in config:
        return config  # from here
    for row in FAMILIES.values():
        if row.architecture in architectures or (kind in row.model_types and kind != "llada"):
            return row.to_ours(config)
    if kind == "llada" and "hidden_size" in config and config.get("num_experts"):
        return FAMILIES["llada_moe"].to_ours(config)  # its model_type is LLaDA's
    if kind != "llada":
        raise ValueError(
            f"model_type {kind!r} is not a LLaDA model; scripts/convert_ar.py makes one from an "
            f"autoregressive checkpoint; known: llada, {', '.join(FAMILIES)}"
        )
    if architectures and "LLaDAModelLM" not in architectures:
        known = ", ".join(["LLaDAModelLM", *(row.architecture for row in FAMILIES.values())])
        raise ValueError(f"architectures {architectures} is not a LLaDA model; known: {known}")
    return config


def without_what_is_off(given: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's keys, with None for what another key, or the value itself, switches off."""
    values = dict(given)
    if not values.get("use_sliding_window", True):
        values["sliding_window"] = None
    if set(values.get("layer_types") or ()) == {"full_attention"}:  # as files of newer versions spell it out
        values["layer_types"] = None
    return values


def register_weight_names() -> None:
    """Tells transformers how each family's weights are called, in both directions."""
    for row in FAMILIES.values():
        mapping = [WeightRenaming(theirs, ours) for theirs, ours in row.names]
        mapping += _fused_qkv() if row.fused_qkv else []
        mapping += _expert_stacks() if row.experts else []
        register_checkpoint_conversion_mapping(row.name, mapping, overwrite=True)
