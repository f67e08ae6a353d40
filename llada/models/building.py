"""The model that a run trains, from its flags: new weights or a checkpoint, with LoRA adapters or without."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from llada.flags.yaml_files import read_yaml
from llada.models.checkpoints import RopeScaling, base_and_adapter, is_meta, load_model
from llada.models.flags import EXPERTS, LINEAR_LAYERS
from llada.models.tokens import HOW_TO_ADD, SPECIAL_TOKENS, load_tokenizer, special_ids
from modelling_final import LLaDAConfig, LLaDAModelLM
from modelling_final.families_llada import to_fields

ROOT = Path(__file__).resolve().parent.parent.parent


def load_for_inference(
    path: str,
    *,
    chat: bool,
    dtype: str = "auto",
    adapter_path: str | None = None,
    attn_implementation: str | None = None,
    device: torch.device | str | None = None,
    mask_token_id: int | None = None,
) -> tuple[LLaDAModelLM, PreTrainedTokenizerBase]:
    """A model that answers, in eval mode, and its tokenizer; arguments as for `load_model`."""
    tokenizer = load_tokenizer(path, chat=chat, mask_token_id=mask_token_id)
    model = load_model(
        path,
        dtype=dtype,
        adapter_path=adapter_path,
        attn_implementation=attn_implementation,
        device=device,
        mask_token_id=mask_token_id,
    )
    # the sampler stops at EoT too, which published configs do not name
    model.config.eot_token_id = special_ids(model.config, tokenizer).eot
    return model.eval(), tokenizer


def run_tokenizer(flags: Any, *, chat: bool) -> PreTrainedTokenizerBase:
    """The tokenizer that a run's flags name: --tokenizer_name, else the model's own."""
    path = getattr(flags, "tokenizer_name", None) or flags.model_name_or_path
    return load_tokenizer(path, chat=chat, mask_token_id=getattr(flags, "mask_token_id", None))


def settle_blocks(flags: Any, model: LLaDAConfig) -> None:
    """Makes the model one that attends by blocks of --block_size, or takes the size from it; ValueError."""
    if "objective" not in vars(flags):  # of a stage without such a choice
        return
    if flags.objective != "block_diffusion":
        # the sampler's own steps show a model no noise where it reads finished blocks
        if (model.attention_block_size or 1) > 1 and getattr(flags, "likelihood", None) != "trajectory":
            raise ValueError(
                "--objective masked_diffusion: the model attends by blocks, and would see noise where it "
                "reads finished blocks; give --objective block_diffusion"
            )
        return
    flags.block_size = flags.block_size or model.attention_block_size
    if flags.block_size is None:
        raise ValueError("--objective block_diffusion: the model names no block size; give --block_size")
    model.attention_pattern, model.attention_block_size = "block_causal", flags.block_size


def start_model(flags: Any, *, device: torch.device | str = "cpu") -> LLaDAModelLM | PeftModel:
    """What a run starts from: new weights, a checkpoint, or one with the adapter that training continues.

    Args:
        flags: a stage's Config, or those in a run's config.yaml.
        device: where new weights are drawn; a checkpoint is read into host memory. On "meta" the model has
            shapes and no values.
    """
    model = _loaded(flags, device)
    settle_blocks(flags, (model.get_base_model() if isinstance(model, PeftModel) else model).config)
    return model


def _loaded(flags: Any, device: torch.device | str) -> LLaDAModelLM | PeftModel:
    if getattr(flags, "config_name", None) is not None:
        return new_model(
            flags.config_name,
            load_tokenizer(flags.tokenizer_name),
            seed=flags.seed,
            max_length=flags.max_length,
            attn_implementation=getattr(flags, "attn_implementation", None),
            device=device,
        )
    kind, factor = getattr(flags, "rope_scaling", "none"), getattr(flags, "rope_factor", 1.0)
    return load_model(
        flags.model_name_or_path,
        dtype=flags.dtype if flags.use_lora else "float32",  # all that is trained is float32
        adapter_path=getattr(flags, "sft_adapter_path", None),
        attn_implementation=getattr(flags, "attn_implementation", None),
        merge_adapter=False,
        rope=RopeScaling(kind, factor, flags.max_length),
        mask_token_id=getattr(flags, "mask_token_id", None),
        device=device if is_meta(device) else None,
    )


def build_model(flags: Any, *, device: torch.device | str = "cpu") -> LLaDAModelLM | PeftModel:
    """The model that a run trains, before its first step: `start_model`, with fresh adapters for --use_lora.

    Training, its dry run and scripts/export_checkpoint.py all build it here.
    """
    model = start_model(flags, device=device)
    if not flags.use_lora or hasattr(model, "peft_config"):
        return model
    with torch.device(device) if is_meta(device) else nullcontext():
        return attach_lora(
            model,
            rank=flags.lora_r,
            alpha=flags.lora_alpha,
            dropout=getattr(flags, "lora_dropout", 0.0),
            target_modules=flags.lora_target_modules,
            seed=flags.seed,
        )


def adopt_adapter(flags: Any) -> None:
    """Where training continues an adapter, makes the LoRA flags say what that one has, or ValueError."""
    if getattr(flags, "config_name", None) is not None:
        return
    path = base_and_adapter(flags.model_name_or_path, getattr(flags, "sft_adapter_path", None))[1]
    if path is None:
        return
    adapter = PeftConfig.from_pretrained(path)
    targets = str(getattr(adapter, "target_modules", ""))
    found = {
        "lora_r": getattr(adapter, "r", None),
        "lora_alpha": float(getattr(adapter, "lora_alpha", 0)),
        "lora_dropout": float(getattr(adapter, "lora_dropout", 0)),
        "lora_target_modules": [name for name in LINEAR_LAYERS if re.search(rf"\b{name}\b", targets)],
    }
    for name, value in found.items():
        if not hasattr(flags, name):  # not a flag of this stage
            continue
        given = getattr(flags, name)
        wants = list(LINEAR_LAYERS) if given == ["all-linear"] else given
        if isinstance(wants, list):  # in any order and spelling
            wants = [ours for ours, llama in LINEAR_LAYERS.items() if {ours, llama} & set(wants)]
        if name in getattr(flags, "given_of_lora", ()) and wants != value:
            raise ValueError(f"--{name} {given}: the adapter that training continues, {path}, has {value}")
        setattr(flags, name, value)
    flags.use_lora = True


def has_fresh_adapter(flags: Any) -> bool:
    """Whether `build_model` puts on an adapter of its own: off, the model is the one the run started from."""
    continues = getattr(flags, "sft_adapter_path", None)
    return flags.use_lora and base_and_adapter(flags.model_name_or_path, continues)[1] is None


def new_config(config_name: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> LLaDAConfig:
    """The configuration of a named size, shaped for this tokenizer.

    Args:
        config_name: a size in configs/models (for example `1m`), or a YAML/JSON file of LLaDAConfig fields,
            or the config.json of a published family, in whose layout the model is then saved. Vocabulary and
            special ids are the tokenizer's.
        max_length: context in tokens, unless the size names its own `max_sequence_length`.
    """
    sizes = sorted(file.stem for file in (ROOT / "configs/models").glob("*.yaml"))
    file = Path(config_name) if Path(config_name).is_file() else ROOT / f"configs/models/{config_name}.yaml"
    if not file.is_file():
        raise ValueError(
            f"--config_name {config_name}: neither a file nor one of the sizes {', '.join(sizes)}"
        )
    if tokenizer.mask_token_id is None:
        how = HOW_TO_ADD.format(tokenizer.name_or_path)
        raise ValueError(f"--tokenizer_name: the tokenizer has no mask token; {how}")
    own = ("vocab_size", "embedding_size")  # and ids: a published file's belong to another vocabulary
    shape = {k: v for k, v in read_yaml(file).items() if k not in own and not k.endswith("_token_id")}
    fields = {"max_sequence_length": max_length, **to_fields(shape)}
    fields.pop("embedding_size", None)
    return LLaDAConfig(
        **fields,
        vocab_size=len(tokenizer),
        embedding_size=-(-len(tokenizer) // 64) * 64,  # rows in multiples of 64 keep matrix kernels fast
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eot_token_id=tokenizer.get_vocab().get(SPECIAL_TOKENS["eot"]),
    )


def new_model(
    config_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_length: int,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
) -> LLaDAModelLM:
    """A randomly initialised model of a named size; see `new_config`.

    Args:
        seed: of the initial weights, which also depend on the kind of `device` that draws them.
    """
    config = new_config(config_name, tokenizer, max_length=max_length)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device(device):
            model = LLaDAModelLM(config)
    if not is_meta(device):
        # a GPU rounds powers otherwise, and a resumed run makes the tables of its checkpoint on the CPU
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def attach_lora(
    model: LLaDAModelLM, *, rank: int, alpha: float, dropout: float, target_modules: list[str], seed: int
) -> PeftModel:
    """The model with trainable LoRA adapters on linear layers of its blocks, never on the LM head.

    Args:
        target_modules: names of `LINEAR_LAYERS` (LLaDA's or Llama's spelling), or ["all-linear"].
        seed: of the initial A matrices (B starts at zero), so that all ranks have the same.
    """
    by_spelling = {spelling: ours for ours, llama in LINEAR_LAYERS.items() for spelling in (ours, llama)}
    known = {*by_spelling, "all-linear", EXPERTS}
    if unknown := [name for name in target_modules if name not in known]:
        choices = f"{', '.join(LINEAR_LAYERS)}, all-linear, {EXPERTS}"
        raise ValueError(f"--lora_target_modules {unknown}: choose from {choices}")
    if EXPERTS in target_modules and not model.config.moe_num_experts:
        raise ValueError(f"--lora_target_modules {EXPERTS}: the model has none")
    if EXPERTS in target_modules and dropout:
        raise ValueError(f"--lora_target_modules {EXPERTS}: their adapters take no --lora_dropout")
    names = sorted({by_spelling[name] for name in target_modules if name in by_spelling})
    if "all-linear" in target_modules:
        names = list(LINEAR_LAYERS)
    experts = ["moe.experts.gate_up_proj", "moe.experts.down_proj"] if EXPERTS in target_modules else None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf".*\bblocks\.\d+\.(moe\.shared\.)?({'|'.join(names)})" if names else [],
        target_parameters=experts,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)
