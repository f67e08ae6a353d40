"""Load, save and adapt checkpoints; the one table of special tokens.

Shapes: none; everything here is about folders, tokenizers and modules.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from llada.flags import read_yaml
from modelling_final import LLaDAConfig, LLaDAModelLM

ROPE_SCALING = ("none", "linear", "ntk", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How a model's positions are stretched to a longer context.

    linear divides positions by `factor`; ntk raises rope_theta by factor^(d / (d - 2)), d the head's width;
    yarn does either by frequency (arXiv 2309.00071). `factor` is the new context over the original one.
    """

    kind: str
    factor: float
    max_length: int

    def apply(self, config: LLaDAConfig) -> LLaDAConfig:
        """The config with stretched positions, changed in place; ValueError if the two do not fit."""
        if self.kind == "none":
            if self.factor != 1.0:
                raise ValueError(f"--rope_factor {self.factor} needs --rope_scaling")
            return config
        if self.factor <= 1.0:
            raise ValueError(
                f"--rope_factor {self.factor}: must be above 1, the new context / the original one"
            )
        old = config.rope_parameters
        original = old.get("original_max_position_embeddings", config.max_sequence_length)
        if self.max_length > round(original * self.factor):
            raise ValueError(
                f"--rope_factor {self.factor} stretches {original} tokens to "
                f"{round(original * self.factor)}, --max_length is {self.max_length}"
            )
        if self.kind == "ntk":
            config.rope_theta *= self.factor ** (config.head_dim / (config.head_dim - 2))
        else:
            config.rope_parameters = {
                "rope_type": self.kind,
                "factor": self.factor,
                "original_max_position_embeddings": original,
                "rope_theta": config.rope_theta,
            }
        config.max_sequence_length = max(self.max_length, config.max_sequence_length)
        return config


NO_SCALING = RopeScaling("none", 1.0, 0)


ROOT = Path(__file__).resolve().parent.parent

# role -> text, as in the tokenizer of LLaDA-8B-Instruct. Ids always come from a tokenizer or a config.
SPECIAL_TOKENS = {
    "bos": "<|startoftext|>",
    "eos": "<|endoftext|>",
    "mask": "<|mdm_mask|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "eot": "<|eot_id|>",
}

# The published template always appends the assistant's header; this one does so only when asked.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Names of LLaDA's linear layers inside a block, each with the name Llama-style code gives it.
LINEAR_LAYERS = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "attn_out": "o_proj",
    "ff_proj": "gate_proj",
    "up_proj": "up_proj",
    "ff_out": "down_proj",
}


@dataclass(frozen=True)
class SpecialIds:
    """Token ids by role. `eot` is None for a model without an end-of-turn token."""

    mask: int
    eos: int
    pad: int
    eot: int | None

    @property
    def ends(self) -> set[int]:
        """Ids at which an answer ends."""
        return {self.eos, self.eot} - {None}


def resolve_checkpoint(path: str) -> str:
    """The folder (or hub name) that a user means by `path`.

    A checkpoint folder is itself; a run's output folder means its `final` (else `best`) checkpoint; the
    predecessors' `.../best_model.pt` and `.../best_sft_model.pt` mean the `best` (else `final`) folder
    beside it.

    Raises:
        ValueError: the path looks local and there is no checkpoint.
    """
    folder = Path(path)
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return str(folder)
    if folder.name in ("best_model.pt", "best_sft_model.pt") and not folder.exists():
        candidates = [folder.parent / "best", folder.parent / "final"]
    else:
        candidates = [folder / "final", folder / "best"]
    for candidate in candidates:
        if candidate.is_dir():
            return resolve_checkpoint(str(candidate))
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        wanted = "config.json or adapter_config.json, or a run's final/ or best/ folder"
        raise ValueError(f"--model_name_or_path {path}: no checkpoint there (looked for {wanted})")
    return path


def load_config(path: str) -> LLaDAConfig:
    """The config of a checkpoint; ValueError if it cannot be found or is not a LLaDA model.

    An adapter has its own only if it was trained on stretched positions; else it is that of its base.
    """
    path = resolve_checkpoint(path)
    if Path(path, "adapter_config.json").is_file() and not Path(path, "config.json").is_file():
        path = resolve_checkpoint(LoraConfig.from_pretrained(path).base_model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise _not_found(path, error) from error
    if not isinstance(config, LLaDAConfig):
        raise ValueError(
            f"--model_name_or_path {path}: model_type {config.model_type!r} is not a LLaDA model; "
            "scripts/convert_ar.py makes one from an autoregressive checkpoint"
        )
    return config


def _not_found(path: str, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[0]
    return ValueError(
        f"--model_name_or_path {path}: not a folder here, and the hub did not give it ({reason}). "
        "Give a checkpoint folder, or fetch one first: python scripts/download.py --help"
    )


def load_tokenizer(path: str, *, chat: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with its padding and mask tokens set.

    Args:
        path: checkpoint folder, run folder, tokenizer folder, or hub name.
        chat: also make sure of the header and end-of-turn tokens and of a chat template: LLaDA-8B-Base lacks
        the
            three tokens that Instruct has, and added here they get the same ids.
    """
    if not Path(path, "tokenizer_config.json").is_file():
        path = resolve_checkpoint(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise _not_found(path, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.mask_token is None and Path(path, "config.json").is_file():
        # Published tokenizers leave mask_token unset; the model's config knows the id.
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(load_config(path).mask_token_id)
    if chat:
        if tokenizer.chat_template is None:
            tokenizer.chat_template = CHAT_TEMPLATE
        wanted = [SPECIAL_TOKENS[role] for role in ("start_header", "end_header", "eot")]
        missing = [token for token in wanted if token not in tokenizer.get_vocab()]
        if missing and SPECIAL_TOKENS["start_header"] in tokenizer.chat_template:
            added = {"additional_special_tokens": missing}
            tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    return tokenizer


def special_ids(config: LLaDAConfig, tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Token ids by role: the model's config decides, the tokenizer must agree.

    Raises:
        ValueError: the tokenizer has more tokens than the embedding has rows, or names another mask token.
    """
    if len(tokenizer) > config.embedding_size:
        raise ValueError(
            f"--tokenizer_name: the tokenizer has {len(tokenizer)} tokens and the model's embedding only "
            f"{config.embedding_size} rows; use the tokenizer that belongs to this model"
        )
    if tokenizer.mask_token_id not in (None, config.mask_token_id):
        raise ValueError(
            f"--tokenizer_name: the tokenizer's mask token {tokenizer.mask_token!r} has id "
            f"{tokenizer.mask_token_id}, the model's mask_token_id is {config.mask_token_id}"
        )
    eot = config.eot_token_id
    if eot is None:
        eot = tokenizer.get_vocab().get(SPECIAL_TOKENS["eot"])
    return SpecialIds(mask=config.mask_token_id, eos=config.eos_token_id, pad=config.pad_token_id, eot=eot)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, closing: int | None) -> list[int]:
    """Ids that end an answer of an autoregressive model; LLaDA's: `SpecialIds.ends`, `LLaDAConfig.end_ids`.

    Those of its generation config, its tokenizer's EOS, and `closing`, the end of a turn in its template.
    """
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({*named, tokenizer.eos_token_id, closing} - {None})


def base_and_adapter(path: str, adapter_path: str | None = None) -> tuple[str, str | None]:
    """(the checkpoint with the weights, the LoRA adapter on it or None) that these paths mean.

    An adapter folder names its base itself.
    """
    path = resolve_checkpoint(path)
    if adapter_path is None and Path(path, "adapter_config.json").is_file():
        adapter_path = path
        path = LoraConfig.from_pretrained(adapter_path).base_model_name_or_path
    return resolve_checkpoint(path), None if adapter_path is None else resolve_checkpoint(adapter_path)


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    adapter_path: str | None = None,
    attn_implementation: str | None = None,
    device: torch.device | str | None = None,
    merge_adapter: bool = True,
    rope: RopeScaling = NO_SCALING,
    has_values: bool = True,
) -> LLaDAModelLM | PeftModel:
    """The model of a checkpoint, with every weight accounted for.

    Args:
        path: checkpoint folder, run folder, hub name, or a LoRA adapter folder (its base is then loaded too).
        dtype: of the parameters: float32, bfloat16, float16, or auto (as saved).
        adapter_path: LoRA adapter to put on the model.
        attn_implementation: transformers' name of an attention kernel; default sdpa.
        device: where to put it; default CPU.
        merge_adapter: fold the adapter into the weights (for inference); else return a trainable PeftModel.
        rope: how to stretch the positions.
        has_values: False builds it on the meta device, from the configuration alone.

    Raises:
        ValueError: no such checkpoint, or one with missing or unexpected weights.
    """
    path, adapter_path = base_and_adapter(path, adapter_path)
    config = load_config(path)
    if adapter_path is not None and Path(adapter_path, "config.json").is_file():
        stretched = load_config(adapter_path)  # an adapter trained on stretched positions says so there
        for name in ("rope_theta", "rope_parameters", "max_sequence_length"):
            setattr(config, name, getattr(stretched, name))
    config = rope.apply(config)
    if not has_values:
        with torch.device("meta"):
            model = LLaDAModelLM(config).to(DTYPES[dtype])
            if adapter_path is None:
                return model
            adapter = LoraConfig.from_pretrained(adapter_path)
            adapter.inference_mode = False  # as saved; what training continues is trainable
            return get_peft_model(model, adapter)
    model, report = LLaDAModelLM.from_pretrained(
        path,
        config=config,
        dtype=DTYPES.get(dtype, dtype),
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            keys = sorted(map(str, report[kind]))
            raise ValueError(
                f"--model_name_or_path {path}: {len(keys)} {kind.replace('_', ' ')}: {keys[:3]} ..."
            )
    if adapter_path is not None:
        try:
            model = PeftModel.from_pretrained(model, adapter_path, is_trainable=not merge_adapter)
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(
                f"--adapter_path {adapter_path}: does not fit this base model: {error}"
            ) from error
        if merge_adapter:
            model = model.merge_and_unload()
    return model.to(device) if device is not None else model


def load_for_inference(
    path: str,
    *,
    chat: bool,
    dtype: str = "auto",
    adapter_path: str | None = None,
    attn_implementation: str | None = None,
    device: torch.device | str | None = None,
) -> tuple[LLaDAModelLM, PreTrainedTokenizerBase]:
    """A model that answers, in eval mode, and its tokenizer; arguments as for `load_model`.

    Args:
        chat: the tokenizer is asked for a chat template.
    """
    tokenizer = load_tokenizer(path, chat=chat)
    model = load_model(
        path, dtype=dtype, adapter_path=adapter_path, attn_implementation=attn_implementation, device=device
    )
    # the sampler stops at EoT too, which published configs do not name
    model.config.eot_token_id = special_ids(model.config, tokenizer).eot
    return model.eval(), tokenizer


def start_model(flags: Any, *, has_values: bool = True) -> LLaDAModelLM | PeftModel:
    """What a run starts from: new weights, a checkpoint, or one with the adapter that training continues.

    Args:
        flags: a stage's Config, or the flags in a run's config.yaml; those a stage has not may be absent.
        has_values: False builds it on the meta device.
    """
    if getattr(flags, "config_name", None) is not None:
        tokenizer = load_tokenizer(flags.tokenizer_name)
        with nullcontext() if has_values else torch.device("meta"):
            return new_model(flags.config_name, tokenizer, seed=flags.seed, max_length=flags.max_length)
    kind, factor = getattr(flags, "rope_scaling", "none"), getattr(flags, "rope_factor", 1.0)
    return load_model(
        flags.model_name_or_path,
        dtype=flags.dtype if flags.use_lora else "float32",  # all that is trained is float32
        adapter_path=getattr(flags, "sft_adapter_path", None),
        attn_implementation=getattr(flags, "attn_implementation", None),
        merge_adapter=False,
        rope=RopeScaling(kind, factor, flags.max_length),
        has_values=has_values,
    )


def build_model(flags: Any, *, has_values: bool = True) -> LLaDAModelLM | PeftModel:
    """The model that a run trains, before its first step: `start_model`, with fresh adapters for --use_lora.

    Training, its dry run and scripts/export_checkpoint.py all build it here.
    """
    model = start_model(flags, has_values=has_values)
    if not flags.use_lora or hasattr(model, "peft_config"):
        return model
    with nullcontext() if has_values else torch.device("meta"):
        return attach_lora(
            model,
            rank=flags.lora_r,
            alpha=flags.lora_alpha,
            dropout=flags.lora_dropout,
            target_modules=flags.lora_target_modules,
            seed=flags.seed,
        )


def has_fresh_adapter(flags: Any) -> bool:
    """Whether `build_model` puts on an adapter of its own: off, the model is the one the run started from."""
    continues = getattr(flags, "sft_adapter_path", None)
    return flags.use_lora and base_and_adapter(flags.model_name_or_path, continues)[1] is None


def new_config(config_name: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> LLaDAConfig:
    """The configuration of a named size, shaped for this tokenizer.

    Args:
        config_name: a size in configs/models (for example `1m`), or a YAML/JSON file of LLaDAConfig fields.
        tokenizer: decides the vocabulary and the special ids; must have a mask token.
        max_length: context in tokens, unless the size names its own `max_sequence_length`.
    """
    sizes = sorted(file.stem for file in (ROOT / "configs/models").glob("*.yaml"))
    file = Path(config_name) if Path(config_name).is_file() else ROOT / f"configs/models/{config_name}.yaml"
    if not file.is_file():
        raise ValueError(
            f"--config_name {config_name}: neither a file nor one of the sizes {', '.join(sizes)}"
        )
    if tokenizer.mask_token_id is None:
        raise ValueError("--tokenizer_name: the tokenizer has no mask token; see scripts/train_tokenizer.py")
    shape = {"max_sequence_length": max_length, **read_yaml(file)}
    return LLaDAConfig(
        **shape,
        vocab_size=len(tokenizer),
        embedding_size=-(-len(tokenizer) // 64) * 64,  # rows in multiples of 64 keep matrix kernels fast
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eot_token_id=tokenizer.get_vocab().get(SPECIAL_TOKENS["eot"]),
    )


def new_model(
    config_name: str, tokenizer: PreTrainedTokenizerBase, *, seed: int, max_length: int
) -> LLaDAModelLM:
    """A randomly initialised model of a named size; see `new_config`. `seed`: of the initial weights."""
    config = new_config(config_name, tokenizer, max_length=max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LLaDAModelLM(config)


def attach_lora(
    model: LLaDAModelLM, *, rank: int, alpha: float, dropout: float, target_modules: list[str], seed: int
) -> PeftModel:
    """The model with trainable LoRA adapters on linear layers of its blocks, never on the LM head.

    LLaDA calls both the MLP's down-projection and the LM head `ff_out`, so plain names would hit the head
    too;
    the pattern made here is anchored to the blocks.

    Args:
        target_modules: names of `LINEAR_LAYERS` (LLaDA's or Llama's spelling), or ["all-linear"].
        seed: of the initial A matrices (B starts at zero), so that all ranks have the same.
    """
    by_spelling = {spelling: ours for ours, llama in LINEAR_LAYERS.items() for spelling in (ours, llama)}
    unknown = [name for name in target_modules if name != "all-linear" and name not in by_spelling]
    if unknown:
        raise ValueError(f"--lora_target_modules {unknown}: choose from {list(LINEAR_LAYERS)} or all-linear")
    if "all-linear" in target_modules:
        names = list(LINEAR_LAYERS)
    else:
        names = sorted({by_spelling[name] for name in target_modules})
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf".*\bblocks\.\d+\.({'|'.join(map(re.escape, names))})",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def save_model(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a plain checkpoint folder (or adapter folder, for a PeftModel); the folder appears whole or not
    at all.

    Args:
        state_dict: the full weights, where the module itself only holds a shard of them.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial, state_dict=state_dict)
    if hasattr(model, "peft_config"):
        model.get_base_model().config.save_pretrained(partial)  # see load_model
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which colleagues on a cluster cannot read
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


_PIECES, _PIECE_BYTES = 256, 1 << 16  # of a weight file: 16 MiB, so that every matrix is met
# Where the files were written, not what they hold.
_NOISE = ("transformers_version", "peft_version", "base_model_name_or_path", "auto_map", "_name_or_path")


def describe_checkpoint(*paths: str | Path | None) -> str:
    """A hash of the weights and settings of these checkpoints, the same on any machine; None is skipped.

    Of weights, pieces spread over each file, so it is always cheap; of an adapter, its base too.

    Args:
        paths: folders, run folders, hub names, or single files (GGUF).
    """
    digest = hashlib.sha256()
    for path in filter(None, paths):
        parts = [str(path)] if Path(path).is_file() else filter(None, base_and_adapter(str(path)))
        files = [file for part in parts for file in _described_files(Path(part))]
        if not any(file.suffix != ".json" for file in files):
            raise ValueError(f"{path}: no weight files there to recognise the checkpoint by")
        for file in files:
            if file.suffix == ".json":
                settings = json.loads(file.read_text(encoding="utf-8"))
                kept = {name: value for name, value in settings.items() if name not in _NOISE}
                digest.update(json.dumps(kept, sort_keys=True).encode())
                continue
            size = file.stat().st_size
            digest.update(f"{file.name} {size};".encode())
            with file.open("rb") as stream:
                if size <= _PIECES * _PIECE_BYTES:
                    digest.update(stream.read())
                    continue
                for place in range(_PIECES):
                    stream.seek(place * (size - _PIECE_BYTES) // (_PIECES - 1))
                    digest.update(stream.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]


def _described_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = path if path.is_dir() else Path(cached_file(str(path), "config.json")).parent
    named = ("config.json", "adapter_config.json")
    return [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin") or f.name in named]
