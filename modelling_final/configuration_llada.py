"""LLaDAConfig: every field of the published config.json, and five properties of ours.

Defaults are the values published with GSAI-ML/LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5 (one and the
same file), so `LLaDAConfig()` is the 8B model. A file is taken at its word: what it asks for exists here or
is refused, fields that nothing here reads are listed in a warning, and special ids are never filled in.
"""

import dataclasses
import math
import re
import warnings
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .families_llada import FAMILIES, LLAMA_FIELDS, to_fields, without_what_is_off

# Published field -> the only values whose code path exists here. Nobody has published a LLaDA that uses
# another.
SUPPORTED = {
    "activation_type": ("silu", "gelu", "relu"),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "include_bias": (False,),
    "init_fn": ("mitchell", "normal"),
    "input_emb_norm": (False,),
    "is_encoder_decoder": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "scale_logits": (False,),
}
# Keys of other models' files that change the function -> the values under which they do not.
_OFF = (None, False, 0)
UNBUILT = {
    **dict.fromkeys(("qk_norm", "use_qk_norm", "clip_qkv", "attention_bias", "mlp_bias", "use_bias"), _OFF),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "num_shared_experts"), _OFF),
    **dict.fromkeys(("sliding_window", "use_sliding_window", "use_mrope", "norm_head", "norm_softmax"), _OFF),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "quantization_config"), _OFF),
    **dict.fromkeys(("partial_rotary_factor", "embedding_multiplier", "logits_scaling"), (None, 1)),
    **dict.fromkeys(("residual_multiplier", "attention_multiplier", "query_pre_attn_scalar"), (None, 1)),
    **dict.fromkeys(("add_cross_attention", "is_decoder"), _OFF),
    "use_rmsnorm": (None, True),
    "layer_types": (None, []),
}
# What every file may hold, and switches of others' programs that do not change the function.
IGNORED = (
    "auto_map", "model_type", "bos_token_id", "max_window_layers", "flash_attn_varlen", "debug", "ep_size",
    "use_deepep", "fuse_cross_entropy", "micro_forward", "skip_checkpoint", "num_labels", "id2label",
    "label2id", "task_specific_params", "_attn_implementation_autoset",
)  # fmt: skip
AUTO_MAP = {
    "AutoConfig": "configuration_llada.LLaDAConfig",
    **dict.fromkeys(
        ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"), "modeling_llada.LLaDAModelLM"
    ),
}
# Fields that LLaDA's own published file does not have.
EXTENSIONS = (
    "head_dim", "query_key_norm", "moe_num_experts", "moe_experts_per_token", "moe_hidden_size",
    "moe_num_shared", "moe_num_dense", "moe_router", "moe_renormalise", "moe_scaling", "moe_num_groups",
    "moe_groups_per_token", "family", "published",
)  # fmt: skip
# In names of keys that would change what the network computes.
PARTS = re.compile(
    "rout|expert|moe|attention|attn|rope|rotary|norm|window|bias|scal|(delete|split)_token|causal|alibi|parallel|"
    "residual|lora_rank|soft_?cap|topk|scor(e|ing)|group|layer|position|pos_emb|vision|image|audio|video|^mm_|conditioning"
)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@strict
class LLaDAConfig(PreTrainedConfig):
    """Configuration of a LLaDA model: the published fields under their published names, then ours.

    A null `n_kv_heads`, `mlp_hidden_size` or `embedding_size` means n_heads (1 with `multi_query_attention`),
    mlp_ratio * d_model and vocab_size; the number is filled in at construction. `flash_attention`,
    `precision` and `init_device` are kept for the record only: transformers' `attn_implementation`, `dtype`
    and device decide. ValueError: a field asks for a code path that does not exist here, or fields contradict
    each other.
    """

    model_type = "llada"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "cache"]  # by transformers' version
    attribute_map: ClassVar = LLAMA_FIELDS
    base_model_tp_plan: ClassVar = {
        "transformer.blocks.*.q_proj": "colwise",
        "transformer.blocks.*.k_proj": "colwise",
        "transformer.blocks.*.v_proj": "colwise",
        "transformer.blocks.*.attn_out": "rowwise",
        "transformer.blocks.*.ff_proj": "colwise",
        "transformer.blocks.*.up_proj": "colwise",
        "transformer.blocks.*.ff_out": "rowwise",
    }
    base_model_fsdp_plan: ClassVar = {
        "transformer.wte": "free_full_weight",
        "transformer.blocks.*": "free_full_weight",
        ("transformer.ln_f", "transformer.ff_out"): "keep_full_weight",
    }

    activation_type: str = "silu"
    alibi: bool = False
    alibi_bias_max: float | int = 8.0
    attention_dropout: float | int = 0.0
    attention_layer_norm: bool = False
    attention_layer_norm_with_affine: bool = True
    bias_for_layer_norm: bool | None = False
    block_group_size: int = 1
    block_type: str = "llama"
    d_model: int = 4096
    embedding_dropout: float | int = 0.0
    embedding_size: int | None = 126464
    eos_token_id: int | None = 126081
    flash_attention: bool = False
    include_bias: bool = False
    include_qkv_bias: bool = False
    init_cutoff_factor: float | int | None = None
    init_device: str | None = "meta"
    init_fn: str = "mitchell"
    init_std: float | int = 0.02
    input_emb_norm: bool = False
    layer_norm_type: str = "rms"
    layer_norm_with_affine: bool = True
    mask_token_id: int | None = 126336
    max_sequence_length: int = 4096
    mlp_hidden_size: int | None = 12288
    mlp_ratio: float | int = 4
    multi_query_attention: bool | None = None
    n_heads: int = 32
    n_kv_heads: int | None = 32
    n_layers: int = 32
    pad_token_id: int | None = 126081
    precision: str | None = "amp_bf16"
    residual_dropout: float | int = 0.0
    rms_norm_eps: float | int = 1e-5
    rope: bool = True
    rope_full_precision: bool = True
    rope_theta: float | int = 500000.0
    scale_logits: bool = False
    use_cache: bool = False
    vocab_size: int = 126464
    weight_tying: bool = False

    # end of a chat turn, or None where the model has no such token
    eot_token_id: int | None = None
    # The network's output at i predicts token i+1 (models adapted from AR ones, such as Dream). The model
    # undoes the shift itself: its logits at i always belong to token i.
    logit_shift: bool = False
    # block_causal: position i sees every key whose block is not later than its own
    attention_pattern: Literal["full", "block_causal"] = "full"
    # positions per block
    attention_block_size: int | None = None
    # transformers' standard dictionary, also with `partial_rotary_factor`. None: plain rotary positions with
    # `rope_theta`; NTK scaling is nothing but a larger one.
    rope_parameters: dict | None = None

    # width of a head; default d_model / n_heads
    head_dim: int | None = None
    # queries and keys are normed before they are rotated: each head by itself, or "whole" as one row
    query_key_norm: bool | Literal["whole"] = False
    # layers from `moe_num_dense` on have experts instead of one MLP; see `moe_llada`
    moe_num_experts: int = 0
    moe_experts_per_token: int = 0
    moe_hidden_size: int | None = None
    moe_num_shared: int | None = 0
    moe_num_dense: int = 0
    moe_router: Literal["softmax", "sigmoid"] = "softmax"
    moe_renormalise: bool = False
    moe_scaling: float | int = 1.0
    moe_num_groups: int = 1
    moe_groups_per_token: int = 1
    # The published layout that files are read and written in: llada, or a row of `families_llada`;
    # `published`: keys of its file that mean nothing here.
    family: str = "llada"
    published: dict | None = None

    @property
    def end_ids(self) -> list[int]:
        """Ids at which an answer ends: EOS and the end of a chat turn, where there are such tokens."""
        return sorted({self.eos_token_id, self.eot_token_id} - {None})

    def is_moe(self, layer_idx: int) -> bool:
        """Whether this layer has experts."""
        return self.moe_num_experts > 0 and layer_idx >= self.moe_num_dense

    def __post_init__(self, **kwargs: Any) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = 1 if self.multi_query_attention else self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = int(self.mlp_ratio * self.d_model)
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        kwargs = self._translate_yarn(kwargs)
        self._settle_rope_theta()
        self._refuse_unbuilt(kwargs)
        super().__post_init__(**kwargs)
        self._refuse_impossible_sizes()
        if self.head_dim is None:  # only now: the base class has set what came under transformers' names
            self.head_dim = self.d_model // self.n_heads
        if self.family != "llada":
            self.model_type = self.family  # by which transformers finds the weights' names
        unread = sorted(name for name in kwargs if name in vars(self) and name not in (*IGNORED, *UNBUILT))
        self._refuse_unknown_parts(unread)
        if unread:
            warnings.warn(f"config.json: nothing here reads {', '.join(unread)}", stacklevel=4)
        self._refuse_what_is_not_here()

    @classmethod
    def get_config_dict(cls, path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields in a folder's config.json, of whichever family, and the arguments that are left."""
        settings, rest = super().get_config_dict(path, **kwargs)
        return to_fields({"model_type": None, **settings}), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LLaDAConfig":
        """As everywhere in transformers; a special id that the file does not name is None, not ours."""
        unnamed = dict.fromkeys(("mask_token_id", "eos_token_id", "pad_token_id"))
        return super().from_dict({**unnamed, **to_fields(config_dict)}, **kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        # The base class keeps a second copy of theta: `config.rope_theta *= 4` (NTK) has to reach it.
        if key == "rope_theta" and self.__dict__.get("_post_init_done"):
            self.rope_parameters["rope_theta"] = value
        elif key == "rope_parameters" and self.__dict__.get("_post_init_done"):
            self.rope_theta = value.get("rope_theta", self.rope_theta)

    def to_dict(self) -> dict[str, Any]:
        """The fields as saved, in the layout of the family.

        LLaDA's own has theta once, by its published name, and says nothing of what LLaDA does not do.
        """
        output = super().to_dict()
        parameters = {k: v for k, v in (output.get("rope_parameters") or {}).items() if k != "rope_theta"}
        output["rope_parameters"] = None if parameters in ({}, {"rope_type": "default"}) else parameters
        defaults = {declared.name: declared.default for declared in dataclasses.fields(self)}
        defaults["head_dim"] = self.d_model // self.n_heads
        if self.family == "llada":
            output = {k: v for k, v in output.items() if k not in EXTENSIONS or v != defaults[k]}
        else:
            output = FAMILIES[self.family].to_published(output, defaults)
        output["auto_map"] = AUTO_MAP  # the files beside the weights: see `save_pretrained` of the model
        return output

    def _settle_rope_theta(self) -> None:
        if self.rope_parameters is None:
            return
        self.rope_parameters = dict(self.rope_parameters)  # the caller's dictionary is not ours to change
        theta = self.rope_parameters.get("rope_theta", self.rope_theta)
        if self.rope_theta not in (theta, type(self).rope_theta):
            raise ValueError(
                f"rope_theta {self.rope_theta} and rope_parameters['rope_theta'] {theta} differ; "
                "give one of them"
            )
        self.rope_theta = theta

    def _translate_yarn(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Turns the `yarn_*` fields of LLada-Reasoning into `rope_parameters`; returns the other fields."""
        yarn = {name: kwargs[name] for name in kwargs if name == "yarn" or name.startswith("yarn_")}
        rest = {name: value for name, value in kwargs.items() if name not in yarn}
        if not yarn.get("yarn"):
            return rest  # `yarn: false` switches the others off
        if self.rope:
            raise ValueError("rope and yarn are both true; a YaRN checkpoint of this kind has rope: false")
        if yarn.get("yarn_extrapolation_factor", 1.0) != 1.0:
            raise ValueError(
                f"yarn_extrapolation_factor {yarn['yarn_extrapolation_factor']} is not supported; "
                "only 1.0 is YaRN"
            )
        scale = float(yarn.get("yarn_scale", 1.0))
        parameters = {
            "rope_type": "yarn",
            "factor": scale,
            "original_max_position_embeddings": int(
                yarn.get("yarn_original_max_position_embeddings", self.max_sequence_length)
            ),
            "beta_fast": float(yarn.get("yarn_beta_fast", 32.0)),
            "beta_slow": float(yarn.get("yarn_beta_slow", 1.0)),
        }
        if yarn.get("yarn_attn_factor", 1.0) != 1.0:
            own = 0.1 * math.log(scale) + 1.0 if scale > 1.0 else 1.0
            parameters["attention_factor"] = own * yarn["yarn_attn_factor"]
        if parameters["beta_fast"] < parameters["beta_slow"] and scale != 1.0:
            warnings.warn(
                f"yarn_beta_fast {parameters['beta_fast']} < yarn_beta_slow {parameters['beta_slow']}: "
                "swapped, the inverse of YaRN. Used as written, because the checkpoint was trained so; "
                "a new run should have 32 and 1.",
                stacklevel=2,
            )
        self.rope = True
        self.rope_parameters = parameters
        return rest

    def _refuse_unbuilt(self, given: dict[str, Any]) -> None:
        given = without_what_is_off(given)
        for name, harmless in UNBUILT.items():
            if (value := given.get(name)) not in harmless:
                raise ValueError(f"{name} {value!r} asks for what is not built here")

    def _refuse_unknown_parts(self, unread: list[str]) -> None:
        for name in unread:  # a later model of the family under the same class name, such as LLaDA2.2
            value = getattr(self, name)  # a dictionary of its own is the config of a further network
            if value not in (None, False, 0, "", [], {}) and (PARTS.search(name) or isinstance(value, dict)):
                raise ValueError(f"{name} {value!r} asks for what is not built here ({self.family})")

    def _refuse_impossible_sizes(self) -> None:
        sizes = ("n_layers", "d_model", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "head_dim")
        for name in sizes:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if not self.moe_num_experts:
            return
        if not self.moe_hidden_size:
            raise ValueError("moe_num_experts needs moe_hidden_size")
        if self.moe_num_experts % self.moe_num_groups:
            raise ValueError(
                f"moe_num_experts {self.moe_num_experts} must be a multiple of {self.moe_num_groups} groups"
            )
        for name, least, most in (
            ("moe_experts_per_token", 1, self.moe_num_experts),
            ("moe_groups_per_token", 1, self.moe_num_groups),
            ("moe_num_dense", 0, self.n_layers),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)} must be between {least} and {most}")

    def _refuse_what_is_not_here(self) -> None:
        for name, supported in SUPPORTED.items():
            if (value := getattr(self, name)) not in supported:
                raise ValueError(f"{name} {value!r} is not supported; it must be one of {supported}")
        if self.bias_for_layer_norm:
            raise ValueError("bias_for_layer_norm True is not supported; RMS norms here have no bias")
        if (rope_type := self.rope_parameters["rope_type"]) not in ROPE_TYPES:
            raise ValueError(f"rope_parameters: rope_type {rope_type!r} is not one of {ROPE_TYPES}")
        more = sorted(self.rope_parameters.keys() - {"rope_type", "rope_theta", "partial_rotary_factor"})
        if rope_type == "default" and more:  # a factor without a type, or a type for each kind of layer
            raise ValueError(f"rope_parameters, rope_scaling: {', '.join(more)}: not of rope_type 'default'")
        if not self.rope:
            raise ValueError("rope False is not supported: without rope or yarn the model knows no order")
        rotated = self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0)
        is_derived = self.head_dim == self.d_model // self.n_heads
        if (is_derived and self.d_model % self.n_heads) or self.head_dim % 2:
            raise ValueError(f"d_model {self.d_model} must be n_heads {self.n_heads} times an even number")
        if rotated % 2:
            raise ValueError(f"partial_rotary_factor: {rotated} of head_dim {self.head_dim} is not even")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.embedding_size < self.vocab_size:
            raise ValueError(f"embedding_size {self.embedding_size} < vocab_size {self.vocab_size}")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id", "eot_token_id"):
            token_id = getattr(self, name)
            if token_id is not None and not 0 <= token_id < self.embedding_size:
                raise ValueError(f"{name} {token_id} is outside the embedding's {self.embedding_size} rows")
        if self.attention_pattern == "block_causal" and (self.attention_block_size or 0) < 1:
            raise ValueError(
                f"attention_pattern block_causal needs attention_block_size, got {self.attention_block_size}"
            )
        if self.attention_pattern == "full" and self.attention_block_size is not None:
            raise ValueError("attention_block_size only has a meaning with attention_pattern block_causal")
